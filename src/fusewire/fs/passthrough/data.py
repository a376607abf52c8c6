"""Files of a served host directory: open, create, and everything that goes through a handle.

Layer `fs`, a part of `Passthrough`. READ is answered with a range of the host's file, which the transport moves; WRITE
goes from the request's memory to the file.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from fusewire.fs.passthrough.attributes import Attributes
from fusewire.fs.passthrough.backing import Backing
from fusewire.fs.passthrough.base import S_IFDIR, S_IFREG, Handle
from fusewire.fs.passthrough.locks import Locks
from fusewire.fs.passthrough.names import Names
from fusewire.fs.passthrough.nodes import Fd, status_of
from fusewire.linux import files, vectors
from fusewire.ops import FileRange, Pages
from fusewire.wire import abi

if TYPE_CHECKING:
    from fusewire.fs.passthrough.nodes import Node, Status
    from fusewire.ops import Caller, Connection

_APPEND_ONCE = 0x10  # RWF_APPEND
_LITTLE = 32 << 10  # bytes; a smaller write is over before another worker would be at work
# Filesystems whose files have no flush operation: to close one has no error to tell, written to or not.
_CLOSE_IN_SILENCE = frozenset(
    {
        files.EXT4_SUPER_MAGIC,
        files.XFS_SUPER_MAGIC,
        files.BTRFS_SUPER_MAGIC,
        files.F2FS_SUPER_MAGIC,
        files.TMPFS_MAGIC,
    }
)


class Data(Locks, Backing, Names, Attributes):
    """The operations on open files."""

    gathers = True
    _unflushed = 0  # FOPEN_NOFLUSH where FLUSH has nothing to do at the end of a file that was only read
    _silent_place = b""  # where that holds for files that were written to as well

    def init(self, connection: Connection) -> None:
        super().init(connection)
        # FLUSH ends POSIX locks, tells errors of close(2), and writes back what the client's kernel holds.
        if not connection.flags & (abi.FUSE_POSIX_LOCKS | abi.FUSE_WRITEBACK_CACHE):
            self._unflushed = abi.FOPEN_NOFLUSH
            root = self.nodes.root
            if files.filesystem_type(self.nodes.fd(root).number) in _CLOSE_IN_SILENCE:
                self._silent_place = root.place

    def _flags(self, flags: int) -> int:
        """Give the flags to open the host's file with."""
        # A local client's O_DIRECT ends at the kernel, which keeps nothing then (FOPEN_DIRECT_IO): the host would
        # refuse (EINVAL) the memory that requests come in and answers go out of: it is not aligned as a disk wants it.
        # With O_APPEND pwrite(2) would ignore the offset; each write says by itself whether it appends.
        flags &= self._kept_flags
        if self.flags & abi.FUSE_WRITEBACK_CACHE and flags & os.O_ACCMODE == os.O_WRONLY:
            # The kernel reads what it is to complete before it writes.
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        return flags

    def _opened(self, node: Node, fd: Fd, flags: int, status: Status | None = None) -> tuple[int, ...]:
        """Give the handle of an open file, and say what the kernel may keep of it."""
        handle = Handle(node, fd, flags)
        node.lend(fd)
        mode = self.config.mode
        open_flags = mode.open_flags
        if flags & os.O_DIRECT and self.config.allow_direct_io:
            open_flags |= abi.FOPEN_DIRECT_IO
        if status is None and (mode.revalidate or self._backs):
            status = status_of(fd.number)
        if status is not None and mode.revalidate:
            seen = (status[files.ST_SIZE][:8], status[files.ST_MTIME], status[files.ST_MTIME_NS])
            if seen == node.seen:
                open_flags |= abi.FOPEN_KEEP_CACHE
            node.seen = seen
        if self._unflushed and (not flags & os.O_ACCMODE or node.place == self._silent_place):
            open_flags |= self._unflushed
        backing = self._backing_of(node, fd, status[files.ST_MODE]) if status is not None else 0
        fh = self.handles.add(handle)
        if backing:
            return fh, abi.FOPEN_PASSTHROUGH, backing
        return fh, open_flags

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, ...]:
        node = self.nodes.get(nodeid)
        if node.kind == S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, "is a directory", node.name)
        if node.kind != S_IFREG:
            raise OSError(errno.EBADF, "only files and directories are opened", node.name)
        status: Status | None
        reached, status = self.nodes.reach(node)
        fd = self._open_for_real(reached, self._flags(flags))
        if flags & os.O_TRUNC:
            status = None
            # Without HANDLE_KILLPRIV_V2 the kernel clears set-user-ID bits itself, but not here (fuse_open).
            told = self.flags & abi.FUSE_HANDLE_KILLPRIV_V2
            if open_flags & abi.FUSE_OPEN_KILL_SUIDGID if told else caller.uid:
                self._drop_privileges(node)
            else:
                self._clear_capability(node)
        return self._opened(node, fd, flags, status)

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[bytes, tuple[int, ...]]:
        above = self.nodes.get(parent)
        directory = self.nodes.fd(above)
        how = self._flags(flags) & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.nodes.reserve()
        self._changing(above, name)
        labels = self._labels(caller)
        person = self._as(caller)
        number = -1
        try:
            with self._umask(umask):
                number = os.open(name, how, mode & 0o7777, dir_fd=directory.number)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        except OSError as error:
            raise self.nodes.explain(error) from None
        finally:
            if person is not None:
                person.leave()
        if number < 0:
            return self._open_existing(caller, above, directory, name, flags, open_flags)
        fd = Fd(number)
        if labels:
            self._set_labels(directory, name, labels)
        status = status_of(fd.number)
        nodeid, node = self.nodes.enter(above, directory, name, status)
        try:
            return self._entry(nodeid, node, status), self._opened(node, fd, flags, status)
        except BaseException:
            self.nodes.forget(nodeid, 1)  # the kernel hears of an error only
            raise

    def _open_existing(
        self, caller: Caller, above: Node, directory: Fd, name: bytes, flags: int, open_flags: int
    ) -> tuple[bytes, tuple[int, ...]]:
        """Open what somebody on the host was quicker to make, like anything else that is found."""
        status = files.status(directory.number, name, files.AT_SYMLINK_NOFOLLOW)
        nodeid, node = self.nodes.enter(above, directory, name, status)
        try:
            if node.kind not in (S_IFREG, S_IFDIR):
                # A symlink or a FIFO is for the client's kernel to resolve or open: it looks the name up again.
                raise OSError(errno.ESTALE, "there is something else by that name now", name)
            return self._entry(nodeid, node, status), self.open(caller, nodeid, flags, open_flags)
        except BaseException:
            self.nodes.forget(nodeid, 1)
            raise

    def tmpfile(
        self, caller: Caller, parent: int, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[bytes, tuple[int, ...]]:
        above = self.nodes.get(parent)
        directory = self.nodes.fd(above)
        self.nodes.reserve()
        how = self._flags(flags) & ~os.O_TRUNC | os.O_TMPFILE | flags & os.O_EXCL | os.O_CLOEXEC
        person = self._as(caller)
        try:
            with self._umask(umask):
                fd = Fd(os.open(b".", how, mode & 0o7777, dir_fd=directory.number))
        except OSError as error:
            raise self.nodes.explain(error) from None
        finally:
            if person is not None:
                person.leave()
        status = status_of(fd.number)
        nodeid, node = self.nodes.enter(above, directory, b"", status)
        try:
            self.nodes.pin(node, Fd(os.open(self._path(fd), os.O_PATH | os.O_CLOEXEC)))
            return self._entry(nodeid, node, status), self._opened(node, fd, flags, status)
        except BaseException:
            self.nodes.forget(nodeid, 1)
            raise

    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        handle = self.handles.remove(fh)
        if handle.lock is not None:  # a directory's
            return
        handle.node.lent.remove(handle.fd)  # type: ignore[attr-defined]
        self._handle_end(handle, release_flags)
        self._backing_end(handle.node)

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> FileRange:
        fd = self.handles.get(fh).fd
        if offset >> 63:
            raise OSError(errno.EINVAL, "no file has such an offset", offset)
        return FileRange(fd.number, offset, size, fd)

    def write(self, nodeid: int, fh: int, offset: int, data: Any, write_flags: int, lock_owner: int, flags: int) -> int:
        handle = self.handles.get(fh)
        fd = handle.fd
        kind = type(data)
        if self._may_block is not None and (kind is not memoryview or len(data) > _LITTLE):
            self._may_block(False)
        if self.watching:
            self._changing(handle.node.parent, handle.node.name)
        try:
            how = _APPEND_ONCE if flags & os.O_APPEND and not write_flags & abi.FUSE_WRITE_CACHE else 0
            if kind is Pages:
                count = vectors.pwritev(fd.number, data.iovec, data.count, offset, how)
            elif how or kind is list:
                count = os.pwritev(fd.number, data if kind is list else [data], offset, how)
            else:
                count = os.pwrite(fd.number, data, offset)
        except OverflowError:
            raise OSError(errno.EINVAL, "no file has such an offset", offset) from None
        if write_flags & abi.FUSE_WRITE_KILL_SUIDGID:
            self._drop_privileges(handle.node)
        elif self._xattrs is not None:
            self._clear_capability(handle.node)
        return count

    def flush(self, nodeid: int, fh: int, lock_owner: int) -> None:
        handle = self.handles.get(fh)
        fd = handle.fd
        if handle.flags & os.O_ACCMODE != os.O_RDONLY:
            os.close(os.dup(fd.number))  # close(2) gives the errors of delayed writes (quota, network filesystems)
        self._locks_end(handle, lock_owner)

    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        self._sync(self.handles.get(fh).fd, fsync_flags)

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        if self.flags & abi.FUSE_WRITEBACK_CACHE:
            # The kernel does not write back before it asks (fuse_lseek), so the host may see a hole where there is
            # data, and cp(1) would leave it out. Without an answer it takes the whole file for data.
            raise OSError(errno.ENOSYS, "holes are not known with writeback", nodeid)
        fd = self.handles.get(fh).fd
        if offset >> 63:  # a negative one: no file has data there, lseek(2)
            raise OSError(errno.ENXIO, "no file has such an offset", offset)
        if whence > os.SEEK_HOLE:
            raise OSError(errno.EINVAL, "no such way to seek", whence)
        return os.lseek(fd.number, offset, whence)

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> None:
        handle = self.handles.get(fh)
        self._slow()
        files.fallocate(handle.fd.number, mode, offset, length)
        self._clear_capability(handle.node)

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        source, written = self.handles.get(fh).fd, self.handles.get(fh_out)
        target = written.fd
        self._slow()
        # One call answers for at most MAX_RW_COUNT bytes, and the reply has 32 bits.
        length = min(length, 0x7FFFF000)
        try:
            count = os.copy_file_range(source.number, target.number, length, offset, offset_out)
        except OverflowError:
            raise OSError(errno.EINVAL, "no file has such an offset", offset) from None
        self._clear_capability(written.node)
        return count

    def syncfs(self, nodeid: int) -> None:
        fd = self._reopen(self.nodes.root, os.O_RDONLY | os.O_DIRECTORY)
        self._slow()
        files.syncfs(fd.number)
