"""`NodeFilesystem`: a tree of nodes as `Operations`: the root, names that are looked up, changes of names.

Layer `nodes`, the top of it. No method of a node is called under a lock.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.nodes.directories import Dir
from fusewire.nodes.listings import Listings
from fusewire.nodes.steps import is_awaitable, run
from fusewire.ops import FOREVER, Entry, Operations, Statfs
from fusewire.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.nodes.base import Inode, Node
    from fusewire.nodes.steps import Steps
    from fusewire.ops import Caller, Connection

_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>


class NodeFilesystem(Listings):
    """Serves the tree below `root`; the same tree may be served several times."""

    default_permissions = True  # the modes of nodes count
    interruptible = True  # what is async is cancelled when its caller gives up
    want = abi.FUSE_HANDLE_KILLPRIV_V2 | abi.FUSE_READDIRPLUS_AUTO

    def __init__(self, root: Dir, *, read_only: bool = False, max_timeout: float = FOREVER) -> None:
        """Serve `root`.

        With `read_only` whatever is writable in it is not. `max_timeout` bounds, in seconds, what the kernel may keep:
        for where it cannot be told of changes (virtual machines), and something changes.
        """
        super().__init__(root, max_timeout)
        self.read_only = read_only

    def init(self, connection: Connection) -> None:
        self.begin(connection)
        self._wait(self.root.init(connection))

    def destroy(self) -> None:
        try:
            self.close_all()
            self._wait(self.root.destroy())
        finally:
            self.end()

    def _wait(self, given: Any) -> None:
        if is_awaitable(given):
            from fusewire.aio import wait

            wait(given)

    # Names

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Any:
        inode, directory = self.directory(parent)
        if not directory._computed and (node := directory._table.get(name)) is not None:
            size = node.size()
            if type(size) is int:  # nothing is waited for: no generator is needed
                return self.found(inode, directory, name, node, size)
        return run(self._lookup(parent, name))

    def _lookup(self, parent: int, name: bytes) -> Steps[Entry | None]:
        inode, directory = self.directory(parent)
        node = yield from self.find(directory, name)
        if node is not None:
            return (yield from self.entry(inode, directory, name, node))
        seconds = directory.timeout if directory.negative_timeout is None else directory.negative_timeout
        return self.missing(inode, name, seconds)

    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> Any:
        return run(self._mknod(caller, parent, name, mode, rdev))

    def _mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int) -> Steps[Entry]:
        inode, directory = self.directory(parent)
        if stat.S_ISREG(mode):
            node = yield directory.create(name, mode & 0o7777)
        elif stat.S_IFMT(mode) in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            node = yield directory.mknod(name, mode, rdev)
        else:
            raise OSError(errno.EINVAL, "no node of such a type can be made", name)
        return (yield from self._made(caller, inode, directory, name, node))

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> Any:
        return run(self._mkdir(caller, parent, name, mode))

    def _mkdir(self, caller: Caller, parent: int, name: bytes, mode: int) -> Steps[Entry]:
        inode, directory = self.directory(parent)
        mode = mode & 0o7777 | directory.mode & stat.S_ISGID  # mkdir(2)
        node = yield directory.mkdir(name, mode)
        return (yield from self._made(caller, inode, directory, name, node))

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Any:
        return run(self._symlink(caller, parent, name, target))

    def _symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Steps[Entry]:
        inode, directory = self.directory(parent)
        node = yield directory.symlink(name, target)
        return (yield from self._made(caller, inode, directory, name, node))

    def _made(self, caller: Caller, inode: Inode, directory: Dir, name: bytes, node: Node) -> Steps[Entry]:
        self.own(caller, directory, node)
        self.touched(inode, name)
        return (yield from self.entry(inode, directory, name, node))

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> Any:
        return run(self._create(caller, parent, name, flags, mode, open_flags))

    def _create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, open_flags: int
    ) -> Steps[tuple[Entry, tuple[int, int]]]:
        inode, directory = self.directory(parent)
        made = True
        try:
            node = yield directory.create(name, mode & 0o7777)
        except FileExistsError:
            # It was made since the kernel looked. O_EXCL apart, that is an open.
            node = None if flags & os.O_EXCL else (yield from self.find(directory, name))
            if node is None or node.kind != stat.S_IFREG:
                raise
            made = False
        if made:
            self.own(caller, directory, node)
            self.touched(inode, name)
            flags &= ~os.O_TRUNC
        return (yield from self._opened_entry(inode, directory, name, node, flags, open_flags, made))

    def _opened_entry(
        self, inode: Inode | None, directory: Dir, name: bytes, node: Node, flags: int, open_flags: int, new: bool
    ) -> Steps[tuple[Entry, tuple[int, int]]]:
        opened = yield from self.open_steps(node, flags, open_flags, new)
        try:
            entry = yield from self.entry(inode, directory, name, node)
        except BaseException:
            self.give_up(opened[0])
            raise
        return entry, opened

    def tmpfile(self, caller: Caller, parent: int, flags: int, mode: int, umask: int, open_flags: int) -> Any:
        return run(self._tmpfile(caller, parent, flags, mode, open_flags))

    def _tmpfile(
        self, caller: Caller, parent: int, flags: int, mode: int, open_flags: int
    ) -> Steps[tuple[Entry, tuple[int, int]]]:
        _, directory = self.directory(parent)
        node = yield directory.tmpfile(mode & 0o7777)
        self.own(caller, directory, node)
        return (yield from self._opened_entry(None, directory, b"", node, flags, open_flags, True))

    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> Any:
        return run(self._link(nodeid, newparent, newname))

    def _link(self, nodeid: int, newparent: int, newname: bytes) -> Steps[Entry]:
        node = self.inode(nodeid).node
        inode, directory = self.directory(newparent)
        yield directory.link(newname, node)
        self.touched(inode, newname)
        return (yield from self.entry(inode, directory, newname, node))

    def unlink(self, caller: Caller, parent: int, name: bytes) -> Any:
        return run(self._remove(parent, name, "unlink"))

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> Any:
        return run(self._remove(parent, name, "rmdir"))

    def _remove(self, parent: int, name: bytes, how: str) -> Steps[None]:
        inode, directory = self.directory(parent)
        yield directory.rmdir(name) if how == "rmdir" else directory.unlink(name)
        self.gone(inode, name)
        self.touched(inode, name)

    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> Any:
        return run(self._rename(parent, name, newparent, newname, flags))

    def _rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> Steps[None]:
        old, directory = self.directory(parent)
        new, newdir = self.directory(newparent)
        yield directory.rename(name, newdir, newname, flags)
        self.moved(old, name, new, newname, bool(flags & _EXCHANGE))
        self.touched(old, name)
        self.touched(new, newname)
        # In a directory that is computed another object has the name now; the kernel goes on with the same inode.
        for inode, place, at in ((new, newdir, newname), (old, directory, name))[: 2 if flags & _EXCHANGE else 1]:
            if place._computed:
                try:
                    found = yield from self.find(place, at)
                except OSError:
                    continue  # it has been moved all the same
                if found is not None:
                    self.renew(inode, at, found)

    # The whole

    def statfs(self, nodeid: int) -> Any:
        return run(self._statfs())

    def _statfs(self) -> Steps[Statfs]:
        statistics: Statfs = yield self.root.statfs()
        return statistics


def as_operations(filesystem: object, *, read_only: bool = False, max_timeout: float = FOREVER) -> Operations:
    """Give what serves `filesystem`: itself if it is `Operations`, else a `NodeFilesystem`. Raises TypeError."""
    if isinstance(filesystem, Dir):
        return NodeFilesystem(filesystem, read_only=read_only, max_timeout=max_timeout)
    if isinstance(filesystem, Operations):
        return filesystem
    if isinstance(filesystem, type) and issubclass(filesystem, (Dir, Operations)):
        raise TypeError(f"{filesystem.__name__} is a class: give an object of it, {filesystem.__name__}(...)")
    raise TypeError(
        f"a filesystem is a fusewire.Dir or fusewire.Operations object, not {type(filesystem).__name__}"
        + (": put the node into a Dir" if hasattr(filesystem, "_homes") else "")
    )
