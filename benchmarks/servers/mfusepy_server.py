"""The floor benchmark's filesystem for mfusepy: usage mfusepy_server.py TARGET FILE_SIZE THREADS.

One thread is libfuse's single-threaded loop, any other number its pool of threads as it is by default.
"""

from __future__ import annotations

import errno
import stat
import sys

import mfusepy
from pattern import PATTERN_BYTES, doubled_pattern


class Floor(mfusepy.Operations):  # type: ignore[misc]
    """One directory, one file; the attribute dictionaries are made once, as a careful author would."""

    use_ns = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = doubled_pattern()
        common = {"st_nlink": 1, "st_uid": 0, "st_gid": 0, "st_atime": 0, "st_mtime": 0, "st_ctime": 0}
        self.attributes = {
            "/": {"st_mode": stat.S_IFDIR | 0o755, "st_size": 0, **common},
            "/data": {"st_mode": stat.S_IFREG | 0o644, "st_size": size, "st_blocks": size // 512, **common},
        }

    def getattr(self, path, fh=None):  # type: ignore[no-untyped-def]
        try:
            return self.attributes[path]
        except KeyError:
            raise mfusepy.FuseOSError(errno.ENOENT) from None

    def open(self, path, flags):  # type: ignore[no-untyped-def]
        return 1

    def read(self, path, size, offset, fh):  # type: ignore[no-untyped-def]
        if offset + size > self.size:
            size = max(0, self.size - offset)
        start = offset % PATTERN_BYTES
        return self.data[start : start + size]

    def readdir(self, path, fh):  # type: ignore[no-untyped-def]
        return [".", "..", "data"]


def main() -> None:
    target, size, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    mfusepy.FUSE(
        Floor(size),
        target,
        foreground=True,
        nothreads=threads == 1,
        fsname="floor",
        direct_io=True,
        entry_timeout=0,
        attr_timeout=0,
        negative_timeout=0,
    )


main()
