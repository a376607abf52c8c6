"""What the kernel knows of an overlay: merged nodes, each with its place in the upper and in the lower filesystem.

Layer `fs`, a part of `fs.overlay`: tables only. Every method but `get` is called under the overlay's lock of names.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count

from fusewire.wire.abi import FUSE_ROOT_ID

# A lower file is known by its node id; one with several names by its name too, for each name is copied up by itself.
LowerKey = int | tuple[int, "Node", bytes]


class Node:
    """A file or directory: `upper` and `lower` are node ids of the two filesystems, 0 where it is not (seen) in one.

    Of a file the upper one counts where both are set; a directory is then the merger of both.
    """

    __slots__ = (
        "children",
        "handed",
        "hidden",
        "ino",
        "key",
        "kind",
        "lookups",
        "lower",
        "name",
        "nodeid",
        "parent",
        "upper",
    )

    def __init__(self, nodeid: int, kind: int, ino: int) -> None:
        self.nodeid = nodeid
        self.kind = kind
        self.ino = ino
        self.upper = 0
        self.lower = 0
        self.handed = 0  # the lower node id whose lookup count is to be given back; `lower` may end before
        self.key: LowerKey | None = None
        self.parent: Node | None = None  # None: the root, or the (last known) name was removed
        self.name = b""
        self.lookups = 0
        self.children = 0  # nodes whose parent this is: it is kept for them
        self.hidden: set[bytes] | None = None  # names of which a `.wh.` file says that they are gone; None: not read


class Nodes:
    """All nodes, by number and by either place."""

    def __init__(self, root: Node, drop: Callable[[Node], None]) -> None:
        """Begin with the root. `drop` gives back what a node holds in the two filesystems, when it ends."""
        self.root = root
        self._drop = drop
        self._nodes: dict[int, Node] = {FUSE_ROOT_ID: root}
        self._upper: dict[int, Node] = {root.upper: root}
        self._lower: dict[LowerKey, Node] = {root.lower: root}
        self._numbers = count(FUSE_ROOT_ID + 1)

    def __len__(self) -> int:
        """How many nodes there are, with the root."""
        return len(self._nodes)

    def get(self, nodeid: int) -> Node:
        """Give a node. Raises OSError(ESTALE) for a number that the kernel should not have."""
        try:
            return self._nodes[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "the kernel named a node that does not exist", nodeid) from None

    def renumber(self, first: int) -> None:
        """Give numbers from `first` on."""
        self._numbers = count(max(first, FUSE_ROOT_ID + 1))

    def of_upper(self, upper: int) -> Node | None:
        """Give the node that is there in the upper filesystem."""
        return self._upper.get(upper)

    def of_lower(self, key: LowerKey) -> Node | None:
        """Give the node that is there in the lower filesystem, and not (yet) in the upper one."""
        return self._lower.get(key)

    def add(self, kind: int, ino: int, parent: Node, name: bytes) -> Node:
        """Make a node."""
        node = Node(next(self._numbers), kind, ino)
        self._nodes[node.nodeid] = node
        self.place(node, parent, name)
        return node

    def put_upper(self, node: Node, upper: int) -> None:
        """Say where a node is in the upper filesystem; it is found there from now on, and no more in the lower one."""
        node.upper = upper
        self._upper[upper] = node
        self._unkey(node)

    def put_lower(self, node: Node, lower: int, key: LowerKey | None) -> None:
        """Say where a node is in the lower filesystem; with a `key` it is found there."""
        node.lower = node.handed = lower
        if key is not None:
            node.key = key
            self._lower[key] = node

    def _unkey(self, node: Node) -> None:
        key, node.key = node.key, None
        if key is not None and self._lower.get(key) is node:
            del self._lower[key]

    def place(self, node: Node, parent: Node | None, name: bytes) -> None:
        """Note the name that leads to a node, or with None that it has none any more."""
        before, node.parent, node.name = node.parent, parent, name
        if before is parent:
            return
        if parent is not None:
            parent.children += 1
        if before is not None:
            before.children -= 1
            self._end(before)

    def removed(self, node: Node) -> None:
        """Note that the name of a lower node is gone, or that of a directory: nobody finds it there again."""
        self._unkey(node)
        self.place(node, None, node.name)

    def forget(self, node: Node, nlookup: int) -> None:
        """Take lookups back; what nobody needs any more ends."""
        if node is self.root:
            return
        node.lookups -= nlookup
        self._end(node)

    def _end(self, node: Node | None) -> None:
        """End a node that nobody needs any more, and then those above it that were kept for it alone."""
        while node is not None and node.lookups <= 0 and not node.children and node is not self.root:
            if self._nodes.pop(node.nodeid, None) is None:
                return
            self._unkey(node)
            if self._upper.get(node.upper) is node:
                del self._upper[node.upper]
            self._drop(node)
            above, node.parent = node.parent, None
            if above is not None:
                above.children -= 1
            node = above
