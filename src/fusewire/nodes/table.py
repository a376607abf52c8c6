"""The nodes that the kernel knows, by number: lookups and FORGETs, identity, lifetimes, and what it is told of changes.

Layer `nodes`, the part of `NodeFilesystem` below all others.
"""

from __future__ import annotations

import errno
import os
import time
from _thread import allocate_lock, start_new_thread
from itertools import count

from fusewire.nodes.base import Inode
from fusewire.nodes.directories import Dir
from fusewire.ops import Entry, Operations
from fusewire.wire.abi import FUSE_ROOT_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from fusewire.nodes.base import Node
    from fusewire.ops import Caller, Connection

    Notice = tuple[int, bytes | None]  # a node's number, and a name in it or None for the node itself

_NO_ATTRIBUTES = (0,) * 16
# Names in a directory that are known to be missing; beyond that the kernel may not keep it, for nobody could tell it.
_MOST_MISSING = 4096


class Table(Operations):
    """Number -> node.

    A number is a node's as long as the object lives, or, in a directory that is computed, as long as the kernel knows
    it by the name under which objects come and go, or by its `key`. So it is the inode number as well, and a generation
    is not needed.
    """

    def __init__(self, root: Dir, max_timeout: float) -> None:
        self.root = root
        self.max_timeout = max_timeout
        self.ended = False
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.moment = divmod(time.time_ns(), 1_000_000_000)  # for times that are None
        self._connection: Connection | None = None
        self._lock = allocate_lock()  # over all inodes, both maps and the notices; no call goes out under it
        self._numbers = count(FUSE_ROOT_ID + 1)
        self._root = Inode(root, FUSE_ROOT_ID)
        self._inodes: dict[int, Inode] = {FUSE_ROOT_ID: self._root}  # what the kernel knows
        self._by_key: dict[Hashable, Inode] = {}
        self._notices: dict[Notice, None] = {}
        self._telling = False

    def begin(self, connection: Connection) -> None:
        """Take the process that serves for the owner, and the moment for the time, of what says nothing of them."""
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.moment = divmod(time.time_ns(), 1_000_000_000)  # for times that are None
        self._connection = connection
        self.ended = False
        key = self.root.key
        with self._lock:
            self._settle(self._root, key)
            if key is not None:
                self._by_key[key] = self._root

    def end(self) -> None:
        """Let go of all nodes."""
        with self._lock:
            self.ended = True
            self._connection = None
            self._notices.clear()
            for inode in self._inodes.values():
                inode.node._homes.pop(self, None)
            self._inodes = {FUSE_ROOT_ID: self._root}
            self._by_key = {}

    # Nodes

    def inode(self, nodeid: int) -> Inode:
        """Give what is known of a number. Raises OSError(ESTALE)."""
        try:
            return self._inodes[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "the kernel named a node that does not exist", nodeid) from None

    def directory(self, nodeid: int) -> tuple[Inode, Dir]:
        """Give what is known of a directory, and its node. Raises OSError(ENOTDIR)."""
        inode = self.inode(nodeid)
        node = inode.node
        if not isinstance(node, Dir):
            raise OSError(errno.ENOTDIR, "not a directory", nodeid)
        return inode, node

    def remember(self, parent: Inode | None, name: bytes, node: Node, *, looked_up: bool) -> Inode:
        """Give the inode of a node that has been found; `looked_up` counts one lookup: an Entry is answered."""
        key = node.key
        renewed = False
        with self._lock:
            inode = node._homes.get(self)
            if inode is None:
                inode = self._known_as(parent, name, node, key)
                if inode is None:
                    inode = Inode(node, next(self._numbers))
                else:
                    inode.node._homes.pop(self, None)
                    node._succeeds(inode.node)
                    inode.node = node
                    renewed = True
                self._settle(inode, key)
            if looked_up and inode is not self._root:
                self._inodes[inode.number] = inode
                inode.nlookup += 1
            if parent is not None:
                if looked_up or _is_computed(parent):
                    self._name(parent, name, inode)
                parent.missing.pop(name, None)
            stale = (*inode.names, *inode.missing) if renewed and not _is_computed(inode) else ()
        if stale:
            self._tell([(inode.number, below) for below in stale])
        return inode

    def _name(self, parent: Inode, name: bytes, inode: Inode) -> None:
        if parent.names.get(name) is not inode:
            self._lose(parent, name)
            parent.names[name] = inode
        inode.parents[parent, name] = parent.node
        if inode.key is not None:
            self._by_key[inode.key] = inode

    def _settle(self, inode: Inode, key: Hashable) -> None:
        homes = inode.node._homes
        for home in [home for home in list(homes) if home.ended]:
            del homes[home]
        homes[self] = inode
        inode.key = key

    def _known_as(self, parent: Inode | None, name: bytes, node: Node, key: Hashable) -> Inode | None:
        """Find what the kernel knows by the key of a new object, or by its name where objects come and go.

        They do in a directory that is computed, and where the directory itself is another object than before.
        """
        inode = None
        if key is not None:
            inode = self._by_key.get(key)
        elif parent is not None:
            inode = parent.names.get(name)
            if inode is not None:
                same = inode.parents.get((parent, name)) is parent.node
                placed = inode.node._placed or node._placed
                if inode.key is not None or (same and (placed or not _is_computed(parent))):
                    inode = None
        return inode if inode is not None and inode.node.kind == node.kind else None

    def missing(self, parent: Inode, name: bytes, seconds: float) -> Entry | None:
        """Answer that there is no such name, and for how long that holds."""
        seconds = min(seconds, self.max_timeout)
        with self._lock:
            self._lose(parent, name)
            if seconds <= 0 or len(parent.missing) >= _MOST_MISSING:
                return None
            parent.missing[name] = None
        return Entry(0, _NO_ATTRIBUTES, seconds, 0)

    def _lose(self, parent: Inode, name: bytes) -> Inode | None:
        inode = parent.names.pop(name, None)
        if inode is not None:
            inode.parents.pop((parent, name), None)
            if not inode.nlookup and not inode.parents:
                self._lose_key(inode)
        return inode

    def _lose_key(self, inode: Inode) -> None:
        if inode.key is not None and inode is not self._root and self._by_key.get(inode.key) is inode:
            del self._by_key[inode.key]

    def gone(self, parent: Inode, name: bytes) -> None:
        """Hear that a name was removed."""
        with self._lock:
            self._lose(parent, name)

    def moved(self, old: Inode, name: bytes, new: Inode, newname: bytes, exchange: bool) -> None:
        """Hear that a name was moved."""
        with self._lock:
            node = self._lose(old, name)
            target = self._lose(new, newname)
            if node is not None:
                self._name(new, newname, node)
            if exchange and target is not None:
                self._name(old, name, target)

    def renew(self, parent: Inode, name: bytes, node: Node) -> None:
        """Hear that a node, if it is a new one, is what the kernel knows by a name that was moved."""
        key = node.key
        with self._lock:
            inode = parent.names.get(name)
            if inode is None or self in node._homes or inode.node.kind != node.kind:
                return
            self._lose_key(inode)
            inode.node._homes.pop(self, None)
            node._succeeds(inode.node)
            inode.node = node
            self._settle(inode, key)
            if key is not None:
                self._by_key[key] = inode

    def only(self, parent: Inode, names: set[bytes]) -> None:
        """Hear what a computed directory lists: other names are let go, but for those that the kernel knows."""
        with self._lock:
            for name in [name for name, inode in parent.names.items() if name not in names and not inode.nlookup]:
                self._lose(parent, name)

    def forget(self, nodeid: int, nlookup: int) -> None:
        with self._lock:
            inode = self._inodes.get(nodeid)
            if inode is None or inode is self._root:
                return
            inode.nlookup = max(0, inode.nlookup - nlookup)
            if inode.nlookup:
                return
            del self._inodes[nodeid]
            for parent, name in inode.parents:
                if parent.names.get(name) is inode:
                    del parent.names[name]
            inode.parents.clear()
            inode.names.clear()
            inode.missing.clear()
            self._lose_key(inode)

    def own(self, caller: Caller, directory: Dir, node: Node) -> None:
        """Give what a caller has created to the caller; the group may be the directory's: mkdir(2), inode(7)."""
        if node.uid is None:
            node.uid = caller.uid
        if node.gid is None:
            node.gid = caller.gid
            if directory.mode & 0o2000:
                node.gid = self.gid if directory.gid is None else directory.gid

    # What the kernel is told. Never by the thread of a handler: the kernel takes the lock of the directory for a name,
    # and waits for the pages of a file, which a request that is being handled may hold.

    def tell(self, inode: Inode, name: bytes | None, wait: bool) -> None:
        """Tell the kernel that a node has changed, or what a name in it leads to."""
        connection = self._connection
        if connection is None:
            return
        with self._lock:
            notices: list[Notice] = []
            if name is not None:
                notices.append((inode.number, name))
                child = inode.names.get(name)
                if child is not None:
                    notices.append((child.number, None))
            else:
                notices += [(inode.number, below) for below in (*inode.names, *inode.missing)]
                notices += [(parent.number, own) for parent, own in inode.parents]
            notices.append((inode.number, None))
        if wait:
            for notice in notices:
                if notice[0] in self._inodes:
                    self._notify(connection, notice)
        else:
            self._tell(notices)

    def _tell(self, notices: list[Notice]) -> None:
        """Have another thread notify; it ends when there is nothing more."""
        connection = self._connection
        with self._lock:
            notices = [notice for notice in notices if notice[0] in self._inodes]
            if not notices or connection is None:
                return
            self._notices.update(dict.fromkeys(notices))
            if self._telling:
                return
            self._telling = True
        try:
            start_new_thread(self._tell_all, ())
        except RuntimeError as error:
            with self._lock:
                self._telling = False
            connection.log_once("changes are seen later: no thread can be started (`ulimit -u`)", error)

    def _tell_all(self) -> None:
        while True:
            with self._lock:
                connection = self._connection
                notices, self._notices = list(self._notices), {}
                if not notices or connection is None:
                    self._telling = False
                    return
            for notice in notices:
                self._notify(connection, notice)

    @staticmethod
    def _notify(connection: Connection, notice: Notice) -> None:
        number, name = notice
        try:
            if name is None:
                connection.notify_inval_inode(number)
            else:
                # Only expired: a directory that somebody works in must not lose its name (getcwd(2)).
                connection.notify_inval_entry(number, name, expire_only=True)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                connection.log_once("a change could not be told", error)

    def touched(self, inode: Inode, name: bytes) -> None:
        """Hear that a caller has changed what a name leads to."""
        if isinstance(inode.node, Dir):
            inode.node._listed = None
        self.others_see(inode, name)

    def others_see(self, inode: Inode, name: bytes | None) -> None:
        """Tell the other mounts of the same tree what came about through this one."""
        homes = inode.node._homes
        if len(homes) > 1:
            for home, theirs in list(homes.items()):
                if home is not self:
                    home.tell(theirs, name, False)


def _is_computed(inode: Inode) -> bool:
    return isinstance(inode.node, Dir) and inode.node._computed
