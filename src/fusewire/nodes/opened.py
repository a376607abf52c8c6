"""Open files of a tree of nodes: from open to release. A part of `NodeFilesystem`.

Layer `nodes`. A file whose class has no `open` of its own needs no handle: it is 0 then.
"""

from __future__ import annotations

import errno
import os

from fusewire.inodes import HandleTable
from fusewire.nodes.files import Bytes, File
from fusewire.nodes.steps import is_awaitable, later, run, settled
from fusewire.nodes.table import Table
from fusewire.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.nodes.base import Inode, Node
    from fusewire.nodes.directories import Dir
    from fusewire.nodes.steps import Steps
    from fusewire.ops import Caller


class OpenFile:
    """What `open` of a node gave, and what serves it: the object's own methods, or the node's."""

    __slots__ = ("flush", "flushes", "fsync", "node", "read", "release", "truncate", "write")

    def __init__(self, node: File, handle: object) -> None:
        self.node = node
        self.read = getattr(handle, "read", node.read)
        self.write = getattr(handle, "write", node.write)
        self.truncate = getattr(handle, "truncate", node.truncate)
        self.flush = getattr(handle, "flush", node.flush)
        self.fsync = getattr(handle, "fsync", node.fsync)
        self.release = getattr(handle, "release", None)
        self.flushes = hasattr(handle, "flush") or type(node).flush is not File.flush


def _copies(node: File | OpenFile) -> bool:
    return isinstance(node, Bytes) and type(node).write is Bytes.write


class OpenFiles(Table):
    """Data of files."""

    def __init__(self, root: Dir, max_timeout: float) -> None:
        super().__init__(root, max_timeout)
        self._opened: HandleTable[OpenFile] = HandleTable()

    def file(self, nodeid: int) -> tuple[Inode, File]:
        """Give what is known of a regular file, and its node. Raises OSError(EISDIR, EINVAL)."""
        inode = self.inode(nodeid)
        if not isinstance(inode.node, File):
            directory = inode.node.kind == 0o040000
            raise OSError(errno.EISDIR if directory else errno.EINVAL, "not a regular file", nodeid)
        return inode, inode.node

    def serving(self, nodeid: int, fh: int) -> File | OpenFile:
        """Give what serves the data of an open file."""
        return self._opened.get(fh) if fh else self.file(nodeid)[1]

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> Any:
        return run(self.open_steps(self.file(nodeid)[1], flags, open_flags, False))

    def open_steps(self, node: Node, flags: int, open_flags: int, new: bool) -> Steps[tuple[int, int]]:
        """Open a file for a caller and give (handle, FOPEN_* flags); a `new` one may be opened for writing anyway."""
        if not isinstance(node, File):
            raise TypeError(f"create and tmpfile give a File, not {type(node).__name__}")
        if flags & (os.O_ACCMODE | os.O_TRUNC) and not new:
            node._check_writable()
        fh, flushes = 0, type(node).flush is not File.flush
        if type(node).open is not File.open:
            handle = yield node.open(flags)
            if handle is not None:
                opened = OpenFile(node, handle)
                flushes = opened.flushes
                fh = self._opened.add(opened)
        if flags & os.O_TRUNC:
            try:
                yield (self._opened.get(fh) if fh else node).truncate(0)
            except BaseException:
                self.give_up(fh)
                raise
            node._drop_privileges(identity=bool(open_flags & abi.FUSE_OPEN_KILL_SUIDGID))
            self._written(node)
        given = 0 if flushes else abi.FOPEN_NOFLUSH
        if node.direct_io or node._sizeless:
            given |= abi.FOPEN_DIRECT_IO
        elif node.keep_cache and not node._access_is_due():
            # What the kernel has it reads without asking: let it ask while that would move the access time.
            given |= abi.FOPEN_KEEP_CACHE
        return fh, given

    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> Any:
        if fh:
            data: Any = self._opened.get(fh).read(offset, size)
        else:
            node = self.file(nodeid)[1]
            if node.writable and not flags & os.O_NOATIME:
                node._accessed()
            data = node.read(offset, size)
        if type(data) is not bytes and is_awaitable(data):
            return later(data)
        return data

    def write(self, nodeid: int, fh: int, offset: int, data: Any, write_flags: int, lock_owner: int, flags: int) -> Any:
        node: File | OpenFile = self._opened.get(fh) if fh else self.file(nodeid)[1]
        length = len(data)
        # The request's memory is used again for the next one: only our own write may see it, which copies and is done.
        result: Any = node.write(offset, data if _copies(node) else bytes(data))
        if type(result) is not int and result is not None:
            return run(self._write(node, result, length, write_flags))
        return self._wrote(node, length if result is None else result, write_flags)

    def _write(self, node: File | OpenFile, result: Any, length: int, write_flags: int) -> Steps[int]:
        result = yield result
        return self._wrote(node, length if result is None else result, write_flags)

    def _wrote(self, opened: File | OpenFile, count: int, write_flags: int) -> int:
        node = opened if isinstance(opened, File) else opened.node
        node._drop_privileges(identity=bool(write_flags & abi.FUSE_WRITE_KILL_SUIDGID))
        self._written(node)
        return count

    def _written(self, node: File) -> None:
        """Tell the other mounts of the same tree."""
        if len(node._homes) > 1:
            inode = node._homes.get(self)
            if inode is not None:
                self.others_see(inode, None)

    def flush(self, nodeid: int, fh: int, lock_owner: int) -> Any:
        return settled(self.serving(nodeid, fh).flush())

    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> Any:
        return settled(self.serving(nodeid, fh).fsync(bool(fsync_flags & abi.FUSE_FSYNC_FDATASYNC)))

    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> Any:
        return settled(self._end(fh)) if fh else None

    def _end(self, fh: int) -> Any:
        release = self._opened.remove(fh).release
        return release() if release is not None else None

    def give_up(self, fh: int) -> None:
        """End what could not be opened after all; 0 is nothing."""
        if fh:
            settled(self._end(fh))

    def close_all(self) -> None:
        """End what is open still when the mount is gone."""
        for opened in self._opened.drain():
            if opened.release is not None:
                settled(opened.release())

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> Any:
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the kernel seeks otherwise itself", whence)
        return settled(self.file(nodeid)[1].seek(offset, whence))

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> Any:
        node = self.file(nodeid)[1]
        result = node.allocate(offset, length, mode)
        self._written(node)
        return settled(result)
