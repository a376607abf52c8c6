"""Names of directories, found and listed: a part of `NodeFilesystem`.

Layer `nodes`. A cookie is 1 after ".", 2 after "..", and then a place in the names as the handle has seen them when it
was last read from the start; what went since then is left out.
"""

from __future__ import annotations

from time import monotonic

from fusewire.inodes import HandleTable
from fusewire.nodes.attributes import Attributes
from fusewire.nodes.directories import Dir, check_node, encoded
from fusewire.nodes.steps import run
from fusewire.ops import FOREVER
from fusewire.wire import abi
from fusewire.wire.codec import DirBuffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from fusewire.nodes.base import Inode, Node
    from fusewire.nodes.steps import Steps
    from fusewire.ops import Caller

    T = TypeVar("T")

_FIRST = 3


class Listing:
    """An open directory: its names in order, with their nodes where they are known."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[bytes, Node | None]] | None = None


class Listings(Attributes):
    """Names of directories."""

    def __init__(self, root: Dir, max_timeout: float) -> None:
        super().__init__(root, max_timeout)
        self._listings: HandleTable[Listing] = HandleTable()

    def find(self, directory: Dir, name: bytes) -> Steps[Node | None]:
        """Give what a name leads to, None if nothing."""
        if not directory._computed:
            return directory._table.get(name)
        if directory._looks_up:
            node: Node | None = yield directory.lookup(name)
            if node is not None:
                check_node(name, node)
            return node
        return (yield from self._children(directory)).get(name)

    def _children(self, directory: Dir) -> Steps[dict[bytes, Node]]:
        """Give what `children` gives, or gave while that holds."""
        listed = directory._listed
        if listed is not None and monotonic() < listed[0]:
            return listed[1]
        version = directory._version
        given = yield directory.children()
        if not hasattr(given, "items"):
            raise TypeError(
                f"{type(directory).__name__}.children gives a mapping of names to nodes, not {type(given).__name__}"
            )
        names: dict[bytes, Node] = {}
        for name, node in list(given.items()):  # a copy, made in one step: the program may go on changing its dict
            self._take(directory, name, node, names)
        _count_twins(names)
        if directory._version == version and directory.timeout > 0:
            until = monotonic() + directory.timeout if directory.timeout < FOREVER else float("inf")
            directory._listed = (until, names)
        return names

    def _take(self, directory: Dir, name: bytes | str, node: T, names: dict[bytes, T]) -> None:
        """Put a name that a class has given into `names`, unless it cannot be: one such must not cost all others."""
        try:
            whole = encoded(name)
            if node is not None:
                check_node(whole, node)
        except (TypeError, ValueError) as error:
            if self._connection is not None:
                self._connection.log_once(f"{type(directory).__name__} left out a name: {error}")
        else:
            names[whole] = node

    # Directories

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        directory = self.directory(nodeid)[1]
        fixed = directory.timeout >= FOREVER <= self.max_timeout and not directory.writable
        return self._listings.add(Listing()), abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE if fixed else 0

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        self._listings.remove(fh)

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        self._listings.get(fh)

    def _items(self, inode: Inode, directory: Dir, fh: int, offset: int) -> Steps[list[tuple[bytes, Node | None]]]:
        listing = self._listings.get(fh)
        items = listing.items
        if items is not None and offset:
            return items
        if not directory._computed:
            directory._accessed()
            items = [*directory._table.items()]
        elif directory._looks_up or directory._lists:
            given = yield directory.names()
            names: dict[bytes, Node | None] = {}
            for name in list(given):
                self._take(directory, name, None, names)
            items = [*names.items()]
        else:
            items = [*(yield from self._children(directory)).items()]
        if directory._computed:
            self.only(inode, {name for name, _ in items})
        listing.items = items
        return items

    def _node(self, directory: Dir, name: bytes, node: Node | None) -> Steps[Node | None]:
        """Give the node of a listed name as it is now; None if it is gone."""
        if not directory._computed:
            return directory._table.get(name)
        if node is None:
            try:
                node = yield from self.find(directory, name)
            except OSError:
                return None  # a listing goes on; who asks for that name hears of it
        return node

    def _dots(self, inode: Inode, directory: Dir) -> list[tuple[bytes, int]]:
        above = directory._parent
        parent = above._homes.get(self) if above is not None else next(iter(inode.parents), (inode,))[0]
        return [(b".", directory.ino or inode.number), (b"..", _number(parent or inode))]

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Any:
        return b"" if self._is_read(fh, offset) else run(self._readdir(nodeid, fh, offset, size))

    def _is_read(self, fh: int, offset: int) -> bool:
        """Tell whether nothing comes behind a cookie: the last request of every listing asks that."""
        items = self._listings.get(fh).items
        return offset > 0 and items is not None and offset >= len(items) + _FIRST - 1

    def _readdir(self, nodeid: int, fh: int, offset: int, size: int) -> Steps[bytearray]:
        inode, directory = self.directory(nodeid)
        items = yield from self._items(inode, directory, fh, offset)
        buffer = DirBuffer(size)
        for place, (name, number) in enumerate(self._dots(inode, directory), 1):
            if place > offset and not buffer.add(name, number, place, 4):
                return buffer.data
        for place in range(max(0, offset - _FIRST + 1), len(items)):
            name = items[place][0]
            node = yield from self._node(directory, name, items[place][1])
            if node is not None:
                known = self.remember(inode, name, node, looked_up=False)
                if not buffer.add(name, _number(known), place + _FIRST, node.kind >> 12):
                    break
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Any:
        return b"" if self._is_read(fh, offset) else run(self._readdirplus(nodeid, fh, offset, size))

    def _readdirplus(self, nodeid: int, fh: int, offset: int, size: int) -> Steps[bytearray]:
        inode, directory = self.directory(nodeid)
        items = yield from self._items(inode, directory, fh, offset)
        buffer = DirBuffer(size)
        for place, (name, number) in enumerate(self._dots(inode, directory), 1):
            if place > offset and not buffer.add_plus(name, place, None, number, 4):
                return buffer.data
        counted = []
        try:
            for place in range(max(0, offset - _FIRST + 1), len(items)):
                name = items[place][0]
                if not buffer.room_for_plus(name):
                    break
                node = yield from self._node(directory, name, items[place][1])
                if node is None:
                    continue
                try:
                    entry = yield from self.entry(inode, directory, name, node)
                except OSError:  # as in _node
                    known = self.remember(inode, name, node, looked_up=False)
                    buffer.add_plus(name, place + _FIRST, None, _number(known), node.kind >> 12)
                else:
                    counted.append(entry.nodeid)
                    buffer.add_plus(name, place + _FIRST, entry)
        except BaseException:
            for number in counted:  # the kernel will not hear of them
                self.forget(number, 1)
            raise
        return buffer.data


def _number(inode: Inode) -> int:
    return inode.node.ino or inode.number


def _count_twins(names: dict[bytes, Node]) -> None:
    """Say of nodes that have several names in one mapping how many: they are hard links."""
    counts: dict[int, int] = {}
    if len({id(node) for node in names.values()}) < len(names):
        for node in names.values():
            counts[id(node)] = counts.get(id(node), 0) + 1
    for node in names.values():
        node._twins = counts.get(id(node), 0)
