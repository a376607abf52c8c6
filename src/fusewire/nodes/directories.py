"""Directories of a tree: `Dir`, a table of names that may change, or computed by a class that overrides it.

Layer `nodes`. The rules of names are here, those of rename(2) too; the kernel's bookkeeping is filesystem.py's.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from fusewire.nodes.base import TREES, Node, Special, Symlink
from fusewire.nodes.files import Bytes
from fusewire.ops import FOREVER, Statfs
from fusewire.wire.abi import NAME_MAX
from fusewire.wire.requests import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Iterator, Mapping
    from typing import Any, Self

    from fusewire.ops import Connection

# <linux/fs.h>
_NOREPLACE, _EXCHANGE, _WHITEOUT = 1, 2, 4
# What a class overrides to compute its names.
_COMPUTING = frozenset({"children", "lookup", "names"})


def check_node(name: bytes, node: object) -> None:
    """Raise TypeError unless a name leads to a node."""
    if isinstance(node, Node):
        return
    if isinstance(node, type) and issubclass(node, Node):
        raise TypeError(
            f"{os.fsdecode(name)!r}: {node.__name__} is a class: give an object of it, {node.__name__}(...)"
        )
    raise TypeError(
        f"{os.fsdecode(name)!r}: a node is a fusewire.Dir, File, Bytes, Symlink or Special, not {type(node).__name__}"
    )


def encoded(name: bytes | str) -> bytes:
    """Give a name as bytes. Raises ValueError for what no directory can have: path_resolution(7), NAME_MAX."""
    name = os.fsencode(name)
    if not is_name(name):
        raise ValueError(
            f"{os.fsdecode(name)!r} cannot be a name: 1 to {NAME_MAX} bytes, no '/' nor NUL, not '.', '..'"
        )
    return name


class Dir(Node):
    """A directory: a table of nodes by name, or, where a class overrides `children`, whatever that gives.

    For large or computed trees override `lookup` and `names` instead. The table is a mapping: `d[b"name"] = node` and
    `del d[b"name"]` change it while it is mounted, and tell the kernel. With `writable` callers change it, too.
    """

    kind = stat.S_IFDIR
    mode = 0o755
    timeout: float = FOREVER
    """For how many seconds what `children` and `lookup` give holds, here and in the kernel: 0 asks each time. In a
    class that overrides one of these it is 1.0 unless the class says otherwise."""
    negative_timeout: float | None = None
    """For how many seconds the kernel may keep that a name does not exist; None: `timeout`."""

    _table: dict[bytes, Node]
    _parent: Dir | None
    _subdirs: int
    _listed: tuple[float, dict[bytes, Node]] | None  # what `children` gave, and until when (monotonic) it holds
    _version: int  # moves when that is dropped
    _computed = False
    _looks_up = False
    _lists = False

    def __new__(cls, *args: Any, **options: Any) -> Self:
        self = super().__new__(cls)
        self._table = {}
        self._parent = None
        self._subdirs = 0
        self._listed = None
        self._version = 0
        return self

    def __init__(
        self,
        children: Mapping[bytes, Node] | Mapping[str, Node] | None = None,
        /,
        *,
        writable: bool = False,
        **named: Node,
    ) -> None:
        """Begin with `children`, and names given as keywords (but for `writable`). Raises ValueError as `d[name] =`."""
        super().__init__()
        if writable:
            self.writable = True
        for name, node in (*(children.items() if children is not None else ()), *named.items()):
            self[name] = node
        if self.writable:
            self._born()
        else:
            self.mtime_ns = self.ctime_ns = None  # not when it was made: it may be made anew each time

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._looks_up = cls.lookup is not Dir.lookup
        cls._lists = cls.names is not Dir.names
        cls._computed = cls._looks_up or cls._lists or cls.children is not Dir.children
        if _COMPUTING & set(cls.__dict__) and not any(
            "timeout" in base.__dict__ for base in cls.__mro__ if base is not Dir
        ):
            cls.timeout = 1.0

    # What is in it

    def children(
        self,
    ) -> Mapping[bytes, Node] | Mapping[str, Node] | Awaitable[Mapping[bytes, Node] | Mapping[str, Node]]:
        """Give all names with their nodes. May be async. Kept for `timeout` seconds, or until `changed()`."""
        return self._table

    def lookup(self, name: bytes) -> Node | Awaitable[Node | None] | None:
        """Give the node of a name, or None. May be async. Overridden, it is asked in the place of `children`."""
        return self._table.get(name)

    def names(self) -> Iterable[bytes] | Iterable[str] | Awaitable[Iterable[bytes] | Iterable[str]]:
        """Give all names for a listing; each is then looked up. May be async. Goes with `lookup`."""
        return list(self._table)

    def statfs(self) -> Statfs | Awaitable[Statfs]:
        """Give the filesystem's statistics, statvfs(3): the root is asked. May be async.

        By default all is 0, and where callers can make files, what there is of memory, as tmpfs(5) has it.
        """
        if not self.writable:
            return Statfs()
        free = os.sysconf("SC_AVPHYS_PAGES")
        return Statfs(max(free, os.sysconf("SC_PHYS_PAGES") // 2), free, free, free, free)

    def init(self, connection: Connection) -> Awaitable[None] | None:
        """Begin: called of the root, in the process that serves. May be async. Threads are started here, not before."""
        return None

    def destroy(self) -> Awaitable[None] | None:
        """End: called of the root, after the last request. May be async."""
        return None

    # The table, for the program

    def __getitem__(self, name: bytes | str) -> Node:
        return self._table[os.fsencode(name)]

    def __contains__(self, name: bytes | str) -> bool:
        return os.fsencode(name) in self._table

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._table))

    def __len__(self) -> int:
        return len(self._table)

    def __bool__(self) -> bool:
        return True

    def __setitem__(self, name: bytes | str, node: Node) -> None:
        """Let a name lead to `node`, also in mounts that there are. The same file may have several names.

        Raises ValueError for what cannot be a name, for a second name of a directory, and for a directory in itself;
        TypeError for what is no node.
        """
        name = encoded(name)
        check_node(name, node)
        with TREES:
            if isinstance(node, Dir) and self._table.get(name) is not node:
                if self._is_below(node):
                    raise ValueError(f"{os.fsdecode(name)!r}: a directory cannot be below itself")
                if node._links:
                    raise ValueError(f"{os.fsdecode(name)!r}: the directory has a name already, and can have only one")
            self._attach(name, node)
            self._changed_table()
        self.changed(name)

    def __delitem__(self, name: bytes | str) -> None:
        """Take a name away, also in mounts that there are; what is open stays so. Raises KeyError if there is none."""
        name = os.fsencode(name)
        with TREES:
            del self._table[self._detach(name)]
            self._changed_table()
        self.changed(name)

    def changed(self, name: bytes | str | None = None, *, wait: bool = False) -> None:
        """Have what is kept of the names forgotten, here and in the kernel: of all, or of one. See `Node.changed`."""
        self._listed = None
        self._version += 1
        for home, inode in list(self._homes.items()):
            home.tell(inode, None if name is None else os.fsencode(name), wait)

    @property
    def nlink(self) -> int:
        if self._placed and not self._links:
            return 0
        return 2 + self._subdirs

    def size(self) -> int | Awaitable[int]:
        return 0

    # What callers do. All of these may be async, and raise OSError. A class may override any of them, with `lookup`.

    def create(self, name: bytes, mode: int) -> Node | Awaitable[Node]:
        """Make a regular file and give its node, open(2) with O_CREAT. Raises EROFS unless `writable`, EEXIST."""
        return self._add(name, Bytes(writable=True), mode)

    def mkdir(self, name: bytes, mode: int) -> Node | Awaitable[Node]:
        """Make a directory, mkdir(2)."""
        return self._add(name, Dir(writable=True), mode)

    def symlink(self, name: bytes, target: bytes) -> Node | Awaitable[Node]:
        """Make a symbolic link, symlink(2)."""
        return self._add(name, Symlink(target, writable=True), 0o777)

    def mknod(self, name: bytes, mode: int, rdev: int) -> Node | Awaitable[Node]:
        """Make a fifo, a socket or a device node, mknod(2): `mode` has the type."""
        return self._add(name, Special(mode, rdev, writable=True), mode)

    def tmpfile(self, mode: int) -> Node | Awaitable[Node]:
        """Make a regular file without a name, open(2) with O_TMPFILE."""
        self._check_writable()
        node = Bytes(writable=True, mode=mode & 0o7777)
        node._placed = True
        node._born()
        return node

    def link(self, name: bytes, node: Node) -> Awaitable[None] | None:
        """Give a node of this tree another name, link(2)."""
        self._check_writable()
        with TREES:
            self._check_takes(name)
            if isinstance(node, Dir):
                raise OSError(errno.EPERM, "a directory has one name only", name)
            if not node._placed:
                raise OSError(errno.EXDEV, "a node of a computed directory has no names elsewhere", name)
            self._attach(name, node)
            self._changed_table()
            node.ctime_ns = self.ctime_ns
        return None

    def unlink(self, name: bytes) -> Awaitable[None] | None:
        """Take a name away that is no directory's, unlink(2). The node lives on while it is open."""
        self._check_writable()
        with TREES:
            node = self._named(name)
            if node.kind == stat.S_IFDIR:
                raise OSError(errno.EISDIR, "a directory", name)
            del self._table[self._detach(name)]
            self._changed_table()
        return None

    def rmdir(self, name: bytes) -> Awaitable[None] | None:
        """Take an empty directory away, rmdir(2)."""
        self._check_writable()
        with TREES:
            node = self._named(name)
            if not isinstance(node, Dir):
                raise OSError(errno.ENOTDIR, "not a directory", name)
            if node._table or node._computed:
                raise OSError(errno.ENOTEMPTY, "the directory is not empty, or its names are computed", name)
            del self._table[self._detach(name)]
            self._changed_table()
        return None

    def rename(self, name: bytes, newdir: Dir, newname: bytes, flags: int) -> Awaitable[None] | None:
        """Move a name to `newname` of `newdir`, renameat2(2): `flags` are RENAME_NOREPLACE, _EXCHANGE, _WHITEOUT."""
        self._check_writable()
        newdir._check_writable()
        if flags & ~(_NOREPLACE | _EXCHANGE | _WHITEOUT) or (flags & _EXCHANGE and flags != _EXCHANGE):
            raise OSError(errno.EINVAL, "flags that do not go together", flags)
        with TREES:
            node = self._named(name)
            target = newdir._table.get(newname)
            if newdir._gone():
                raise OSError(errno.ENOENT, "the directory has been removed", newname)
            if newdir._is_below(node):
                raise OSError(errno.EINVAL, "a directory cannot be moved below itself", newname)
            if flags & _EXCHANGE:
                self._exchange(name, node, newdir, newname, target)
            else:
                if target is node:
                    return None  # two names of one file: rename(2) does nothing
                if target is not None:
                    _check_replaced(node, target, newname, flags)
                self._detach(name)
                newdir._attach(newname, node)
                if flags & _WHITEOUT:
                    whiteout = Special(stat.S_IFCHR, 0, writable=True)
                    whiteout._born()
                    self._attach(name, whiteout, detached=True)
                else:
                    del self._table[name]
            self._changed_table()
            newdir._changed_table()
            node.ctime_ns = newdir.ctime_ns
        return None

    # Ours. All of these are called under TREES.

    def _exchange(self, name: bytes, node: Node, newdir: Dir, newname: bytes, target: Node | None) -> None:
        if target is None:
            raise OSError(errno.ENOENT, "no such file or directory", newname)
        if self._is_below(target):
            raise OSError(errno.EINVAL, "a directory cannot be moved below itself", newname)
        self._detach(name)
        newdir._detach(newname)
        self._attach(name, target, detached=True)
        newdir._attach(newname, node, detached=True)
        target.ctime_ns = time.time_ns()

    def _gone(self) -> bool:
        return self._placed and not self._links

    def _is_below(self, node: Node) -> bool:
        """Tell whether this directory is `node`, or anywhere below it."""
        place: Dir | None = self
        while place is not None:
            if place is node:
                return True
            place = place._parent
        return False

    def _named(self, name: bytes) -> Node:
        node = self._table.get(name)
        if node is None:
            raise OSError(errno.ENOENT, "no such file or directory", name)
        return node

    def _check_takes(self, name: bytes) -> None:
        if self._gone():
            raise OSError(errno.ENOENT, "the directory has been removed", name)
        if name in self._table:
            raise OSError(errno.EEXIST, "the name exists", name)

    def _add(self, name: bytes, node: Node, mode: int) -> Node:
        """Put a new node there, for a caller. Takes TREES itself."""
        self._check_writable()
        node.mode = mode & 0o7777
        with TREES:
            self._check_takes(name)
            self._attach(name, node)
            node._born()
            self._changed_table()
        return node

    def _attach(self, name: bytes, node: Node, *, detached: bool = False) -> None:
        """Let a name lead to a node; what it led to before loses it, unless that is `detached` already."""
        if name in self._table and not detached:
            self._detach(name)
        self._table[name] = node
        node._placed = True
        node._links += 1
        if isinstance(node, Dir):
            node._parent = self
            self._subdirs += 1

    def _detach(self, name: bytes) -> bytes:
        """Take a name from its node; the table is the caller's. Raises KeyError."""
        node = self._table[name]
        node._links -= 1
        if isinstance(node, Dir):
            node._parent = None
            self._subdirs -= 1
        node.ctime_ns = time.time_ns()
        return name

    def _changed_table(self) -> None:
        self._listed = None
        self._version += 1
        self._modified()


def _check_replaced(node: Node, target: Node, name: bytes, flags: int) -> None:
    """renameat2(2): only a directory replaces a directory, and only an empty one is replaced."""
    if flags & _NOREPLACE:
        raise OSError(errno.EEXIST, "the name exists", name)
    if isinstance(target, Dir):
        if node.kind != stat.S_IFDIR:
            raise OSError(errno.EISDIR, "a directory", name)
        if target._table or target._computed:
            raise OSError(errno.ENOTEMPTY, "the directory is not empty, or its names are computed", name)
    elif node.kind == stat.S_IFDIR:
        raise OSError(errno.ENOTDIR, "not a directory", name)
