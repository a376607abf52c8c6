"""Node ids and file handles: what a filesystem keeps about the objects that the kernel knows by number.

Layer `inodes`: plain tables, no I/O, safe to use from many threads, every operation O(1). Whoever names nodes by
something of his own (an offset in an image) needs none of this.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from collections.abc import Hashable
from itertools import count
from typing import Any, Generic, TypeVar

from fusewire.wire.abi import FUSE_ROOT_ID

T = TypeVar("T")


class InodeTable(Generic[T]):
    """Node id -> object, with the lookup count that the kernel holds on it.

    The kernel's rule (fuse_entry_out, fuse_forget_in): each Entry in a reply adds one to the node's count, FORGET and
    BATCH_FORGET take back; at 0 the number is not used again. Ids are given once and never twice, so `generation` may
    be the same for all of them: it is for who takes up an earlier server's mount and hands out ids anew.

    A FORGET is a claim of the peer's (with a virtual machine: a hostile one's): an unknown node is ignored, a count
    never falls below 0, and the root stays.
    """

    def __init__(self, root: T, *, generation: int = 0) -> None:
        """Begin with `root` as node 1; its count is without end."""
        self.generation = generation
        self._lock = allocate_lock()  # over both maps and every count; no call goes out under it
        self._nodes: dict[int, list[Any]] = {FUSE_ROOT_ID: [root, 0, None, FUSE_ROOT_ID]}  # [object, count, key, id]
        self._by_key: dict[Hashable, list[Any]] = {}
        self._numbers = count(FUSE_ROOT_ID + 1)

    def __len__(self) -> int:
        """How many nodes there are, with the root."""
        return len(self._nodes)

    def get(self, nodeid: int) -> T:
        """Give the object of a node. Raises OSError(ESTALE) for a number that the kernel should not have."""
        try:
            return self._nodes[nodeid][0]  # type: ignore[no-any-return]
        except KeyError:
            raise OSError(errno.ESTALE, "the kernel named a node that does not exist", nodeid) from None

    def enter(self, item: T, key: Hashable = None) -> tuple[int, T]:
        """Count one lookup of `item` and give (node id, object): to be answered as an Entry right after.

        With a `key` (such as (st_dev, st_ino)) the node that has it is used again, and the object given is the one
        that it holds: when that is not `item`, the caller disposes of his. Without one each call makes a node.
        """
        with self._lock:
            if key is not None:
                node = self._by_key.get(key)
                if node is not None:
                    node[1] += 1
                    return node[3], node[0]
            nodeid = next(self._numbers)
            self._nodes[nodeid] = node = [item, 1, key, nodeid]
            if key is not None:
                self._by_key[key] = node
            return nodeid, item

    def again(self, key: Hashable) -> tuple[int, T] | None:
        """Count one more lookup of what has `key`: (node id, object), or None if nothing has it."""
        node = self._by_key.get(key)
        if node is None:
            return None
        with self._lock:
            if node[2] is None:  # forgotten or detached this moment
                return None
            node[1] += 1
            return node[3], node[0]

    def key_root(self, key: Hashable) -> None:
        """Give the root a key, so that a lookup that leads back to it finds node 1."""
        with self._lock:
            root = self._nodes[FUSE_ROOT_ID]
            root[2] = key
            self._by_key[key] = root

    def find(self, key: Hashable) -> int:
        """Give the node that has `key`, 0 if none; counts nothing (a notification wants the number)."""
        node = self._by_key.get(key)
        return 0 if node is None else node[3]

    def renumber(self, first: int) -> None:
        """Give ids from `first` on: where a client may still use some that an earlier server gave."""
        self._numbers = count(max(first, FUSE_ROOT_ID + 1))

    def numbers(self) -> list[int]:
        """Give all node ids, the root's too: to invalidate every one."""
        with self._lock:
            return list(self._nodes)

    def detach(self, nodeid: int) -> None:
        """Part a node from its key: the next `enter` with it makes another node (the file was removed or replaced)."""
        with self._lock:
            node = self._nodes.get(nodeid)
            if node is not None:
                self._unkey(node)

    def forget(self, nodeid: int, nlookup: int) -> T | None:
        """Take `nlookup` back; give the object if that was the last of it, to be disposed of by the caller."""
        with self._lock:
            node = self._nodes.get(nodeid)
            if node is None or nodeid == FUSE_ROOT_ID:
                return None
            node[1] -= nlookup
            if node[1] > 0:
                return None
            del self._nodes[nodeid]
            self._unkey(node)
            return node[0]  # type: ignore[no-any-return]

    def lookups(self, nodeid: int) -> int:
        """Tell the lookup count of a node; 0 for one that does not exist, and for the root, which needs none."""
        node = self._nodes.get(nodeid)
        return 0 if node is None or nodeid == FUSE_ROOT_ID else node[1]

    def drain(self) -> list[T]:
        """Forget everything but the root and give the objects: at the end the kernel sends no FORGETs."""
        with self._lock:
            root = self._nodes.pop(FUSE_ROOT_ID)
            items = [node[0] for node in self._nodes.values()]
            self._nodes = {FUSE_ROOT_ID: root}
            self._by_key = {} if root[2] is None else {root[2]: root}
            return items

    def _unkey(self, node: list[Any]) -> None:
        key, node[2] = node[2], None
        if key is not None and self._by_key.get(key) is node:
            del self._by_key[key]


class HandleTable(Generic[T]):
    """File handle -> object: what OPEN, CREATE and OPENDIR give and RELEASE ends. Numbers are never given twice."""

    def __init__(self) -> None:
        self._items: dict[int, T] = {}
        self._lock = allocate_lock()
        self._numbers = count(1)

    def renumber(self, first: int) -> None:
        """Give handles from `first` on: where a client may still use some that an earlier server gave."""
        self._numbers = count(first)

    def __len__(self) -> int:
        """How many handles are open."""
        return len(self._items)

    def add(self, item: T) -> int:
        """Give `item` a handle."""
        with self._lock:
            fh = next(self._numbers)
            self._items[fh] = item
            return fh

    def get(self, fh: int) -> T:
        """Give the object of a handle. Raises OSError(EBADF) for one that is not open."""
        try:
            return self._items[fh]
        except KeyError:
            raise OSError(errno.EBADF, "the kernel named a handle that is not open", fh) from None

    def remove(self, fh: int) -> T:
        """End a handle and give its object. Raises OSError(EBADF), also the second time."""
        try:
            return self._items.pop(fh)
        except KeyError:
            raise OSError(errno.EBADF, "the kernel named a handle that is not open", fh) from None

    def drain(self) -> list[T]:
        """End all handles and give their objects: at the end of a mount."""
        items = []
        while self._items:
            try:
                items.append(self._items.popitem()[1])
            except KeyError:  # the last one was removed meanwhile
                break
        return items
