"""A host directory served with mfusepy: mfusepy_passthrough.py SOURCE TARGET TIMEOUT.

Paths are put behind the source's; an open file is its descriptor. TIMEOUT seconds for names and attributes.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import mfusepy

_FIELDS = (
    "st_atime_ns",
    "st_blocks",
    "st_ctime_ns",
    "st_gid",
    "st_ino",
    "st_mode",
    "st_mtime_ns",
    "st_nlink",
    "st_rdev",
    "st_size",
    "st_uid",
)
_NAMES = tuple((field, field.removesuffix("_ns")) for field in _FIELDS)


class Mirror(mfusepy.Operations):  # type: ignore[misc]
    """One method per operation, most of them one call."""

    use_ns = True

    def __init__(self, source: str) -> None:
        self.source = source

    def getattr(self, path, fh=None):  # type: ignore[no-untyped-def]
        status = os.lstat(self.source + path) if fh is None else os.fstat(fh)
        return {name: getattr(status, field) for field, name in _NAMES}

    def readlink(self, path):  # type: ignore[no-untyped-def]
        return os.readlink(self.source + path)

    def mknod(self, path, mode, dev):  # type: ignore[no-untyped-def]
        os.mknod(self.source + path, mode, dev)

    def mkdir(self, path, mode):  # type: ignore[no-untyped-def]
        os.mkdir(self.source + path, mode)

    def unlink(self, path):  # type: ignore[no-untyped-def]
        os.unlink(self.source + path)

    def rmdir(self, path):  # type: ignore[no-untyped-def]
        os.rmdir(self.source + path)

    def symlink(self, target, source):  # type: ignore[no-untyped-def]
        os.symlink(source, self.source + target)

    def rename(self, old, new):  # type: ignore[no-untyped-def]
        os.rename(self.source + old, self.source + new)

    def link(self, target, source):  # type: ignore[no-untyped-def]
        os.link(self.source + source, self.source + target)

    def chmod(self, path, mode):  # type: ignore[no-untyped-def]
        os.chmod(self.source + path, mode)

    def chown(self, path, uid, gid):  # type: ignore[no-untyped-def]
        os.chown(self.source + path, uid, gid, follow_symlinks=False)

    def truncate(self, path, length, fh=None):  # type: ignore[no-untyped-def]
        os.truncate(self.source + path if fh is None else fh, length)

    def utimens(self, path, times=None):  # type: ignore[no-untyped-def]
        os.utime(self.source + path, ns=times, follow_symlinks=False)

    def access(self, path, amode):  # type: ignore[no-untyped-def]
        if not os.access(self.source + path, amode):
            raise mfusepy.FuseOSError(errno.EACCES)

    def statfs(self, path):  # type: ignore[no-untyped-def]
        status = os.statvfs(self.source + path)
        return {name: getattr(status, name) for name in dir(status) if name.startswith("f_") and name != "f_fsid"}

    def readdir(self, path, fh):  # type: ignore[no-untyped-def]
        # With use_ino a name without a number would be taken for a removed one.
        yield ".", {"st_mode": stat.S_IFDIR, "st_ino": 1}, 0
        yield "..", {"st_mode": stat.S_IFDIR, "st_ino": 1}, 0
        with os.scandir(self.source + path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    kind = stat.S_IFLNK
                else:
                    kind = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG if entry.is_file() else 0
                yield entry.name, {"st_mode": kind, "st_ino": entry.inode()}, 0

    def create(self, path, mode, fi=None):  # type: ignore[no-untyped-def]
        return os.open(self.source + path, (fi or os.O_RDWR) | os.O_CREAT, mode)

    def open(self, path, flags):  # type: ignore[no-untyped-def]
        return os.open(self.source + path, flags)

    def read(self, path, size, offset, fh):  # type: ignore[no-untyped-def]
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):  # type: ignore[no-untyped-def]
        return os.pwrite(fh, data, offset)

    def fsync(self, path, datasync, fh):  # type: ignore[no-untyped-def]
        if datasync:
            os.fdatasync(fh)
        else:
            os.fsync(fh)

    def release(self, path, fh):  # type: ignore[no-untyped-def]
        os.close(fh)


def main() -> None:
    source, target, timeout = sys.argv[1:4]
    os.umask(0)
    mfusepy.FUSE(
        Mirror(source.rstrip("/")),
        target,
        foreground=True,
        fsname="mirror",
        default_permissions=True,
        use_ino=True,
        entry_timeout=timeout,
        attr_timeout=timeout,
        negative_timeout=0,
    )


main()
