"""Node ids for a filesystem that knows only paths: what libfuse's high level keeps in its table of nodes.

Layer `compat`: a plain table, no I/O; safe to use from many threads, and no call goes out under its lock.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock, get_ident
from itertools import count
from threading import Condition

from fusewire.wire.abi import FUSE_ROOT_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


class Node:
    """A name that the kernel knows by number; `path` follows renames.

    parent: None once the name is gone; the root is its own. lookups: what the kernel holds (fuse_forget_in). opens: how
    many handles are open. hidden: its name was removed while it was open, and it goes with the last handle. stamp: its
    time and size when it was last opened.
    """

    __slots__ = ("children", "hidden", "id", "lookups", "name", "opens", "parent", "path", "stamp")

    def __init__(self, number: int, parent: Node | None, name: bytes, path: str) -> None:
        self.id = number
        self.parent = self if parent is None else parent
        self.name = name
        self.path = path
        self.children: dict[bytes, Node] | None = None
        self.lookups = 0
        self.opens = 0
        self.hidden = False
        self.stamp: object = None

    parent: Node | None


class Moving:
    """What `PathTable.moving` gives."""

    __slots__ = ("_nodes", "_table")

    def __init__(self, table: PathTable, nodes: set[Node]) -> None:
        self._table = table
        self._nodes = nodes

    def __enter__(self) -> None:
        table, me = self._table, get_ident()
        with table.changed:
            table.in_move |= self._nodes
            while any(
                thread != me and any(table.below(node, self._nodes) for node in used)
                for thread, used in table.users.copy().items()
            ):
                table.changed.wait()

    def __exit__(self, *_: object) -> None:
        table = self._table
        with table.changed:
            table.in_move -= self._nodes
            table.changed.notify_all()


class PathTable:
    """Numbers and paths of all names that the kernel has looked up.

    One number for each path, not for each file: whoever has only paths cannot tell that two of them are hard links.
    Numbers are given once and never twice.

    A path that a program was called with stays true until it answers, as with libfuse: `use` says which nodes the
    request of a thread is about, `moving` waits until nobody uses what is to be renamed, and `use` for its end.
    """

    def __init__(self, encoding: str, errors: str) -> None:
        """Begin with the root; paths are made of names by this encoding."""
        self._encoding = encoding
        self._errors = errors
        self._lock = allocate_lock()
        self._numbers = count(FUSE_ROOT_ID + 1)
        self.root = Node(FUSE_ROOT_ID, None, b"", "/")
        self._nodes = {FUSE_ROOT_ID: self.root}
        # Thread -> what its request is about. A request writes here and then looks at `in_move`, a rename the other way
        # round: one of the two sees the other, with no lock where nothing is renamed.
        self.users: dict[int, tuple[Node, ...]] = {}
        self.in_move: set[Node] = set()
        self.changed = Condition(allocate_lock())

    def __len__(self) -> int:
        """How many names there are, with the root."""
        return len(self._nodes)

    def get(self, nodeid: int) -> Node:
        """Give a node. Raises OSError(ESTALE) for a number that the kernel should not have."""
        try:
            return self._nodes[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "the kernel named a node that does not exist", nodeid) from None

    def path(self, nodeid: int) -> str:
        """Give a node's path. Raises OSError: ENOENT if its name is gone, ESTALE if there is no such node."""
        node = self.get(nodeid)
        if node.parent is None and not node.opens:
            raise FileNotFoundError(errno.ENOENT, "the name has been removed", node.path)
        return node.path

    def use(self, *nodes: Node) -> None:
        """Keep the paths of these nodes as they are until `unuse`; waits for who is renaming them."""
        me = get_ident()
        self.users[me] = nodes
        if self.in_move:
            with self.changed:
                while any(self.below(node, self.in_move) for node in nodes):
                    del self.users[me]  # else the rename would wait for us
                    self.changed.notify_all()
                    self.changed.wait()
                    self.users[me] = nodes

    def unuse(self) -> None:
        """End what this thread has begun by `use`, if it has."""
        self.users.pop(get_ident(), None)
        if self.in_move:
            with self.changed:
                self.changed.notify_all()

    def moving(self, *nodes: Node | None) -> Moving:
        """Keep nodes and what is below them to this thread, in a `with`: waits until no other thread uses them."""
        return Moving(self, {node for node in nodes if node is not None})

    def below(self, node: Node, nodes: Collection[Node]) -> bool:
        """Tell whether a node is one of some, or lies in one of them."""
        inner: Node | None = node
        while inner is not None and inner not in nodes:
            inner = None if inner is self.root else inner.parent
        return inner is not None

    def child(self, parent: Node, name: bytes) -> str:
        """Give the path of a name in a directory, known or not."""
        text = name.decode(self._encoding, self._errors)
        return "/" + text if parent is self.root else f"{parent.path}/{text}"

    def find(self, parent: Node, name: bytes) -> Node | None:
        """Give the node of a name, if it has one; counts nothing."""
        children = parent.children
        return None if children is None else children.get(name)

    def enter(self, parent: Node, name: bytes) -> Node:
        """Count one lookup of a name: to be answered as an Entry right after."""
        with self._lock:
            if parent.children is None:
                parent.children = {}
            node = parent.children.get(name)
            if node is None:
                number = next(self._numbers)
                node = parent.children[name] = self._nodes[number] = Node(
                    number, parent, name, self.child(parent, name)
                )
            node.lookups += 1
            return node

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Take back lookups; a node without any, without handles and without known children is dropped."""
        with self._lock:
            node = self._nodes.get(nodeid)
            if node is not None and node is not self.root:
                node.lookups = max(0, node.lookups - nlookup)
                self._drop(node)

    def opened(self, node: Node) -> None:
        """Count a handle."""
        with self._lock:
            node.opens += 1

    def closed(self, node: Node) -> bool:
        """Take a handle back; True if it was the last one of a hidden file, which is to be removed now."""
        with self._lock:
            node.opens -= 1
            last = node.opens == 0 and node.hidden
            if last:
                node.hidden = False
            self._drop(node)
            return last

    def remove(self, parent: Node, name: bytes) -> None:
        """Part a node from its name, which is gone."""
        with self._lock:
            node = None if parent.children is None else parent.children.pop(name, None)
            if node is not None:
                node.parent = None
                self._drop(node)

    def move(self, parent: Node, name: bytes, new_parent: Node, new_name: bytes) -> Node | None:
        """Give a node and all below it the names that they have after rename(2); what was there is gone."""
        with self._lock:
            node = None if parent.children is None else parent.children.pop(name, None)
            if new_parent.children is None:
                new_parent.children = {}
            replaced = new_parent.children.pop(new_name, None)
            if replaced is not None and replaced is not node:
                replaced.parent = None
                self._drop(replaced)
            if node is not None:
                new_parent.children[new_name] = node
                node.parent, node.name = new_parent, new_name
                self._rename(node)
            return node

    def _rename(self, node: Node) -> None:
        waiting = [node]
        while waiting:
            node = waiting.pop()
            assert node.parent is not None
            node.path = self.child(node.parent, node.name)
            waiting += (node.children or {}).values()

    def _drop(self, node: Node) -> None:
        # The kernel forgets in any order, so a directory may have to wait for its children.
        while node is not self.root and not (node.lookups or node.opens or node.children):
            self._nodes.pop(node.id, None)
            parent = node.parent
            if parent is None:
                return
            assert parent.children is not None
            if parent.children.get(node.name) is node:
                del parent.children[node.name]
            node.parent = None
            node = parent
