"""A host directory served with pyfuse3: pyfuse3_passthrough.py SOURCE TARGET TIMEOUT (it has one thread).

An inode is known by its number and the paths that lead to it; an open file is its descriptor. TIMEOUT seconds for names
and attributes.
"""

from __future__ import annotations

import errno
import os
import sys

import pyfuse3
import trio

_SAME = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")


class Mirror(pyfuse3.Operations):  # type: ignore[misc]
    """Files keep their inode numbers; several links to one are one inode with the path that was seen last."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, source: bytes, timeout: float) -> None:
        super().__init__()
        self.timeout = timeout
        self.paths = {pyfuse3.ROOT_INODE: source}
        self.counts = {pyfuse3.ROOT_INODE: 1}
        self.root = os.stat(source).st_ino
        self.listings: dict[int, tuple[int, list[os.DirEntry[bytes]]]] = {}
        self.listed = 0

    def _entry(self, status: os.stat_result):  # type: ignore[no-untyped-def]
        entry = pyfuse3.EntryAttributes()
        for name in _SAME:
            setattr(entry, name, getattr(status, name))
        entry.st_ino = self._number(status)
        entry.st_blksize, entry.st_blocks = 4096, status.st_blocks
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = self.timeout
        return entry

    def _number(self, status: os.stat_result) -> int:
        """A host inode whose number is that of FUSE's root gets another one."""
        number = status.st_ino
        return pyfuse3.ROOT_INODE if number == self.root else number if number != pyfuse3.ROOT_INODE else (1 << 63) + 1

    def _known(self, path: bytes):  # type: ignore[no-untyped-def]
        """Give the attributes of what a path leads to, and count a lookup of it."""
        try:
            entry = self._entry(os.lstat(path))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None
        self._count(entry.st_ino, path)
        return entry

    def _count(self, number: int, path: bytes) -> None:
        self.paths[number] = path
        self.counts[number] = self.counts.get(number, 0) + 1

    async def forget(self, inode_list):  # type: ignore[no-untyped-def]
        for number, count in inode_list:
            left = self.counts.get(number, 0) - count
            if left > 0 or number == pyfuse3.ROOT_INODE:
                self.counts[number] = left
            else:
                self.counts.pop(number, None)
                self.paths.pop(number, None)

    async def lookup(self, parent_inode, name, ctx=None):  # type: ignore[no-untyped-def]
        return self._known(self.paths[parent_inode] + b"/" + name)

    async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
        try:
            return self._entry(os.lstat(self.paths[inode]))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def setattr(self, inode, attr, fields, fh, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[inode]
        what = path if fh is None else fh
        try:
            if fields.update_size:
                os.truncate(what, attr.st_size)
            if fields.update_mode:
                os.chmod(what, attr.st_mode & 0o7777)
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                gid = attr.st_gid if fields.update_gid else -1
                os.chown(path, uid, gid, follow_symlinks=False)
            if fields.update_atime or fields.update_mtime:
                status = os.lstat(path)
                atime = attr.st_atime_ns if fields.update_atime else status.st_atime_ns
                mtime = attr.st_mtime_ns if fields.update_mtime else status.st_mtime_ns
                os.utime(path, ns=(atime, mtime), follow_symlinks=False)
            return self._entry(os.lstat(path))
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def readlink(self, inode, ctx):  # type: ignore[no-untyped-def]
        return os.readlink(self.paths[inode])

    async def mknod(self, parent_inode, name, mode, rdev, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[parent_inode] + b"/" + name
        return self._made(path, os.mknod, path, mode & ~ctx.umask, rdev)

    async def mkdir(self, parent_inode, name, mode, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[parent_inode] + b"/" + name
        return self._made(path, os.mkdir, path, mode & ~ctx.umask)

    async def symlink(self, parent_inode, name, target, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[parent_inode] + b"/" + name
        return self._made(path, os.symlink, target, path)

    async def link(self, inode, new_parent_inode, new_name, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[new_parent_inode] + b"/" + new_name
        return self._made(path, os.link, self.paths[inode], path)

    def _made(self, path, call, *arguments):  # type: ignore[no-untyped-def]
        self._do(call, *arguments)
        return self._known(path)

    def _do(self, call, *arguments):  # type: ignore[no-untyped-def]
        try:
            return call(*arguments)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    async def unlink(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        self._do(os.unlink, self.paths[parent_inode] + b"/" + name)

    async def rmdir(self, parent_inode, name, ctx):  # type: ignore[no-untyped-def]
        self._do(os.rmdir, self.paths[parent_inode] + b"/" + name)

    async def rename(self, parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx):  # type: ignore[no-untyped-def]
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        old = self.paths[parent_inode_old] + b"/" + name_old
        new = self.paths[parent_inode_new] + b"/" + name_new
        self._do(os.rename, old, new)
        for number, path in self.paths.items():  # and everything below it
            if path == old or path.startswith(old + b"/"):
                self.paths[number] = new + path[len(old) :]

    async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
        with self._do(os.scandir, self.paths[inode]) as entries:
            listing = list(entries)
        self.listed += 1
        self.listings[self.listed] = (inode, listing)
        return self.listed

    async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
        listing = self.listings[fh][1]
        for position in range(start_id, len(listing)):
            entry = listing[position]
            try:
                attributes = self._entry(entry.stat(follow_symlinks=False))
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, entry.name, attributes, position + 1):
                return
            self._count(attributes.st_ino, entry.path)

    async def releasedir(self, fh):  # type: ignore[no-untyped-def]
        del self.listings[fh]

    async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
        return pyfuse3.FileInfo(fh=self._do(os.open, self.paths[inode], flags & ~(os.O_CREAT | os.O_EXCL)))

    async def create(self, parent_inode, name, mode, flags, ctx):  # type: ignore[no-untyped-def]
        path = self.paths[parent_inode] + b"/" + name
        fd = self._do(os.open, path, flags | os.O_CREAT, mode & ~ctx.umask)
        return pyfuse3.FileInfo(fh=fd), self._known(path)

    async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
        return self._do(os.pread, fh, size, off)

    async def write(self, fh, off, buf):  # type: ignore[no-untyped-def]
        return self._do(os.pwrite, fh, buf, off)

    async def fsync(self, fh, datasync):  # type: ignore[no-untyped-def]
        self._do(os.fdatasync if datasync else os.fsync, fh)

    async def release(self, fh):  # type: ignore[no-untyped-def]
        os.close(fh)

    async def statfs(self, ctx):  # type: ignore[no-untyped-def]
        status = os.statvfs(self.paths[pyfuse3.ROOT_INODE])
        data = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail", "namemax"):
            field = "f_" + name
            setattr(data, field, getattr(status, field))
        return data


def main() -> None:
    source, target, timeout = os.fsencode(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    os.umask(0)
    pyfuse3.init(Mirror(source, timeout), target, set(pyfuse3.default_options) | {"fsname=mirror"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


main()
