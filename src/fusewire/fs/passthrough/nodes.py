"""What the kernel knows of a host directory: nodes, the descriptors that stand for them, and their budget.

Layer `fs`. A node is known by the identity of its inode (device, inode number, mount), never by a path that the
client gave. Its O_PATH descriptor is opened when something needs it, from its parent's descriptor and its
name, and only counts if the identity is the same: a million known files need no million descriptors, and where
descriptors grow short the ones that were not used lately are closed. A node whose name was removed keeps its
descriptor. Where the server may (CAP_DAC_READ_SEARCH), a file handle replaces the name: then nothing that happens on
the host makes a node unreachable.

What is lost against a descriptor per node, as the C servers have it: where somebody on the host moves a file that the
client has looked up but not used, its next use is answered ESTALE, and the kernel looks the path up again.
"""

from __future__ import annotations

import errno
import os
from _thread import RLock, allocate_lock
from typing import TYPE_CHECKING, Any

from fusewire.inodes import InodeTable
from fusewire.linux import files

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHAIN = 4096  # components of a path that is opened anew; PATH_MAX leaves room for no more


# What statx says of a file, as files.status() gives it, and the identity of its inode: see Nodes.identity.
Status = tuple[Any, ...]
Key = tuple[Any, ...]


def status_of(fd: int) -> Status:
    """Give the status of what a descriptor stands for."""
    return files.status(fd, b"", files.AT_EMPTY_PATH)


class Fd:
    """Owns a descriptor, which is closed with the last reference.

    Whoever uses the number holds the object in a local variable meanwhile: neither a FORGET nor a shortage of
    descriptors can then make the number mean another file under him.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)


class Node:
    """An inode that the kernel knows: its identity, the last known name, and its descriptor if it has one."""

    # Most nodes never have more than what __init__ sets: these are the class's until then, which halves the making.
    fd: Fd | None = None
    lent: Sequence[Fd] = ()  # descriptors of open files of this inode, which do as well; a list from the first on
    handle: bytes | None = None
    pinned = False
    gone = False  # forgotten: whoever is still at it keeps no descriptor in it
    used = False
    seen: tuple[bytes, ...] = ()  # size and mtime when it was opened last: what the page cache holds is of then
    opened = 0
    backing = 0
    looked = 0  # directories: names that were looked up one by one since it was listed last, the first of them when
    looked_since = 0.0

    def __init__(self, key: Key, kind: int, parent: Node | None, name: bytes) -> None:
        self.key = key
        self.kind = kind  # S_IFMT bits; an inode never changes them
        self.parent = parent
        self.name = name

    @property
    def place(self) -> bytes:
        """The device and the mount that it is on, as ST_PLACE has them."""
        return self.key[1]  # type: ignore[no-any-return]

    def lend(self, fd: Fd) -> None:
        """Keep the descriptor of an open file of the inode, which does as well as its own."""
        if type(self.lent) is list:
            self.lent.append(fd)
        else:
            self.lent = [fd]


class Nodes:
    """All nodes of one served directory; `root` is node 1. Safe to use from many threads."""

    def __init__(self, root: int, *, budget: int, handles: bool = False, proc: bytes = b"/proc/self/fd/") -> None:
        """Take over `root`, an O_PATH descriptor. At most `budget` descriptors are open, those of `files` counted.

        proc: prefix of this process's descriptors as paths.
        """
        self._proc = proc
        status = status_of(root)
        self._born = files.filesystem_type(root) != files.OVERLAYFS_SUPER_MAGIC
        node = Node(self.identity(status), status[files.ST_MODE] & 0o170000, None, b"")
        node.fd = Fd(root)
        node.pinned = True
        self.root = node
        self.table: InodeTable[Node] = InodeTable(node)
        self.table.key_root(node.key)
        self.get = self.table.get
        self.others: list[Sized] = []  # what else holds a descriptor each, and cannot be closed to make room
        self._budget = budget
        self._by_handle = handles
        self._mounts: dict[bytes, Fd] = {}
        self._held: dict[Node, None] = {}  # nodes with a descriptor, the longest held first
        self._lock = allocate_lock()  # over _held and _mounts, where more than one step belongs together
        # Held by who moves names: between rename(2) and the note of it a node without a descriptor is nowhere. Who does
        # not find one in its place looks once more when it has arrived.
        self.moving = RLock()

    def identity(self, status: Status) -> Key:
        """Give what tells an inode from all others: its number, its device and mount, and its time of birth.

        A number may be given out anew as soon as nobody holds the inode, and then the birth tells; but overlayfs
        changes that when it copies a file up.
        """
        if self._born:
            return status[files.ST_INO], status[files.ST_PLACE], status[files.ST_BIRTH]
        return status[files.ST_INO], status[files.ST_PLACE]

    def __len__(self) -> int:
        """How many nodes the kernel knows."""
        return len(self.table)

    @property
    def descriptors(self) -> int:
        """How many descriptors there are."""
        count = len(self._held)
        for other in self.others:
            count += len(other)
        return count

    def fd(self, node: Node) -> Fd:
        """Give a descriptor of the inode, to be held in a local variable while its number is used.

        It is an O_PATH one, or that of an open file: good for *at() calls and for its path below /proc.
        Raises OSError: ESTALE if the inode cannot be reached any more, ENFILE if there are too many open files.
        """
        found = node.fd
        if found is not None:
            node.used = True
            return found
        return self.lent(node) or self._reopen(node)[0]

    def reach(self, node: Node) -> tuple[Fd, Status]:
        """Give a descriptor as `fd` does, and the node's status of now."""
        found = node.fd or self.lent(node)
        if found is None:
            return self._reopen(node)
        node.used = True
        return found, status_of(found.number)

    def open_directory(self, node: Node) -> Fd:
        """Open a directory for real, to be listed. Raises as `fd` does, and what open(2) does."""
        try:
            return self._open_directory(node)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with self.moving:
            return self._open_directory(node)

    def _open_directory(self, node: Node) -> Fd:
        self.reserve()
        parent = node.parent
        above = None if node.fd is not None or node.handle is not None or parent is None else parent.fd
        try:
            if above is None:
                fd = self.fd(node)
                try:
                    return Fd(os.open(b".", _LIST, dir_fd=fd.number))
                except PermissionError:  # may be read and not searched; the magic link asks for no more than that
                    return Fd(os.open(b"%s%d" % (self._proc, fd.number), _LIST & ~os.O_NOFOLLOW))
            # Under its name at once: with O_DIRECTORY nothing else can be opened, and the identity tells.
            new = Fd(os.open(node.name, _LIST, dir_fd=above.number))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise OSError(errno.ESTALE, "the directory is no longer where it was", node.name) from error
            raise self.explain(error) from None
        if self.identity(status_of(new.number)) != node.key:
            raise OSError(errno.ESTALE, "another directory is where this one was", node.name)
        return new

    @staticmethod
    def lent(node: Node) -> Fd | None:
        """Give the descriptor of an open file of the node, if there is one."""
        lent = node.lent
        if lent:  # as a rule there is none, and an exception would cost more than all the rest
            try:
                return lent[-1]
            except IndexError:
                pass  # it was closed this moment
        return None

    def _reopen(self, node: Node) -> tuple[Fd, Status]:
        if node.handle is not None:
            return self._open_handle(node)
        try:
            return self._walk_to(node)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with self.moving:
            return self._walk_to(node)

    def _walk_to(self, node: Node) -> tuple[Fd, Status]:
        """Open what lies between the node and one above it that has a descriptor."""
        chain = []
        at: Node | None = node
        found: Fd | None = None
        while at is not None and (found := at.fd or self.lent(at)) is None:
            chain.append(at)
            at = at.parent
            if len(chain) > _CHAIN:
                at = None
        if found is None:
            raise OSError(errno.ESTALE, "the file cannot be reached any more", node.name)
        fd, status = found, ()
        for at in reversed(chain):
            try:
                new = Fd(os.open(at.name, _PATH, dir_fd=fd.number))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise OSError(errno.ESTALE, "the file is no longer where it was", at.name) from error
                raise self.explain(error) from None
            status = status_of(new.number)
            # The number of an inode that is gone may be that of a FIFO by now, which must not be opened for real.
            if self.identity(status) != at.key or status[files.ST_MODE] & 0o170000 != at.kind:
                raise OSError(errno.ESTALE, "another file is where this one was", at.name)
            self.hold(at, new)
            fd = new
        return fd, status or status_of(fd.number)

    def _open_handle(self, node: Node) -> tuple[Fd, Status]:
        assert node.handle is not None
        with self._lock:
            mount = self._mounts.get(node.place)
        if mount is None:
            raise OSError(errno.ESTALE, "the mount of the file is gone", node.name)
        try:
            new = Fd(files.open_by_handle(mount.number, node.handle, os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            raise self.explain(error) from None
        status = status_of(new.number)
        # The name may have come to mean something else between its status and its handle: a device, say.
        if self.identity(status) != node.key or status[files.ST_MODE] & 0o170000 != node.kind:
            node.handle = None  # it goes by its name from now on
            raise OSError(errno.ESTALE, "the handle is that of another file", node.name)
        self.hold(node, new)
        return new, status

    def _remember_handle(self, node: Node, directory: Fd, name: bytes) -> None:
        """Learn the node's file handle, if its filesystem has them; if not, it goes by name like the others."""
        try:
            node.handle, _ = files.name_to_handle(directory.number, name, 0)
            if node.place not in self._mounts:
                opened = Fd(os.open(b"%s%d" % (self._proc, directory.number), os.O_RDONLY | os.O_CLOEXEC))
                if status_of(opened.number)[files.ST_PLACE] == node.place:
                    with self._lock:
                        self._mounts.setdefault(node.place, opened)
                else:
                    node.handle = None  # the root of a submount: its own descriptor is as good
        except OSError:
            node.handle = None

    def hold(self, node: Node, fd: Fd) -> None:
        """Give a node its descriptor, and make room where there are too many."""
        node.used = True
        with self._lock:
            if node.gone:
                return
            node.fd = fd
            self._held[node] = None
        if self.descriptors > self._budget:
            self._make_room()

    def pin(self, node: Node, fd: Fd) -> None:
        """Give a node that has no name the descriptor that it keeps as long as it lives."""
        node.pinned = True
        self.hold(node, fd)

    def reserve(self) -> None:
        """Make room for one more open file. Raises OSError(ENFILE) when everything is in use."""
        if self.descriptors >= self._budget:
            self._make_room()

    def _make_room(self) -> None:
        """Close descriptors of nodes that were not used lately, a sixteenth of the budget at once."""
        with self._lock:
            least = self._budget - max(1, self._budget // 16)
            chances = 2 * len(self._held)
            while self.descriptors > least and chances:
                chances -= 1
                node = next(iter(self._held), None)
                if node is None:
                    break
                del self._held[node]
                if node.pinned or node.used:
                    node.used = False
                    self._held[node] = None
                else:
                    node.fd = None
            if self.descriptors > self._budget:
                raise OSError(errno.ENFILE, "too many open files on the server")

    def explain(self, error: OSError) -> OSError:
        """Turn the server's own lack of descriptors into the client's "too many open files in system".

        To be raised `from None`: an exception that is its own cause would keep the descriptors of its frames open.
        """
        if error.errno == errno.EMFILE:
            return OSError(errno.ENFILE, "too many open files on the server", error.filename)
        return error

    # Names

    def enter(self, parent: Node, directory: Fd, name: bytes, status: Status) -> tuple[int, Node]:
        """Count a lookup of what `name` in `parent` leads to, whose status is given: (node id, node)."""
        key = (status[3], status[13], status[7]) if self._born else (status[3], status[13])  # as identity() has it
        kind = status[2] & 0o170000
        known = self.table.again(key)
        if known is not None:
            nodeid, node = known
            if node.kind == kind:
                if node.name != name or node.parent is not parent:
                    self._renamed(node, parent, name)
                return known
            # The inode's number has been given to another file on the host.
            self.table.detach(nodeid)
            self.table.forget(nodeid, 1)
        fresh = Node(key, kind, parent, name)
        nodeid, node = self.table.enter(fresh, key)
        if node is fresh and self._by_handle:
            self._remember_handle(node, directory, name)
        return nodeid, node

    def _renamed(self, node: Node, parent: Node, name: bytes) -> None:
        if node is not self.root and name:
            node.parent, node.name = parent, name
            node.pinned = False

    def _known(self, status: Status) -> Node | None:
        nodeid = self.table.find(self.identity(status))
        try:
            return self.table.get(nodeid) if nodeid else None
        except OSError:  # forgotten this moment
            return None

    def at(self, directory: Fd, name: bytes) -> Node | None:
        """Give the node that a name leads to, if the kernel knows it."""
        try:
            return self._known(files.status(directory.number, name, files.AT_SYMLINK_NOFOLLOW))
        except FileNotFoundError:
            return None

    def keep(self, directory: Fd, name: bytes) -> Node | None:
        """Keep what a name leads to reachable, which is about to go; give it, if it was not kept already.

        If the name stays, `node.pinned` is to be taken back.
        """
        try:
            fd = Fd(os.open(name, _PATH, dir_fd=directory.number))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.explain(error) from None
        status = status_of(fd.number)
        node = self._known(status)
        # Of another kind, it only has the number of an inode that is gone: it must not be opened in that one's place.
        if node is None or node is self.root or status[files.ST_MODE] & 0o170000 != node.kind:
            return None
        with self._lock:
            before, node.pinned = node.pinned, True
            missing = node.fd is None
        if missing:
            self.pin(node, fd)
        return None if before else node

    def forget(self, nodeid: int, nlookup: int) -> Node | None:
        """Take lookups back; give the node if those were the last."""
        node = self.table.forget(nodeid, nlookup)
        if node is not None:
            with self._lock:
                node.gone = True
                self._held.pop(node, None)
                node.fd = None
        return node

    def close(self) -> None:
        """Let go of everything: at the end of the mount."""
        for node in (*self.table.drain(), self.root):
            node.fd = None
            node.lent = ()
        with self._lock:
            self._held.clear()
            self._mounts.clear()
