"""The floor benchmark's filesystem for pyfuse3: pyfuse3_server.py TARGET FILE_SIZE THREADS (it has one thread)."""

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio
from pattern import PATTERN_BYTES, doubled_pattern

FILE_NODE = 2


class Floor(pyfuse3.Operations):  # type: ignore[misc]
    """One directory, one file, nothing cached; attribute objects are made once, as a careful author would."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.data = doubled_pattern()
        self.attributes = {}
        for node, mode, length in (
            (pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, 0),
            (FILE_NODE, stat.S_IFREG | 0o644, size),
        ):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino, entry.st_mode, entry.st_size, entry.st_blksize = node, mode, length, 4096
            entry.st_nlink, entry.st_blocks = 1, (length + 511) // 512
            entry.entry_timeout = entry.attr_timeout = 0
            self.attributes[node] = entry
        self.info = pyfuse3.FileInfo(fh=1, direct_io=True)

    async def lookup(self, parent_inode, name, ctx=None):  # type: ignore[no-untyped-def]
        if name != b"data":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes[FILE_NODE]

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        return self.attributes[inode]

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        return self.info

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        if off + size > self.size:
            size = max(0, self.size - off)
        start = off % PATTERN_BYTES
        return self.data[start : start + size]

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        return inode

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        if start_id == 0:
            pyfuse3.readdir_reply(token, b"data", self.attributes[FILE_NODE], 1)


def main() -> None:
    target, size = sys.argv[1], int(sys.argv[2])
    options = set(pyfuse3.default_options) | {"fsname=floor"}
    pyfuse3.init(Floor(size), target, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


main()
