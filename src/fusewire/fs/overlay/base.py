"""What all parts of the overlay share: its two filesystems, its nodes, its locks, and how a name is found in both.

Layer `fs`, a part of `fs.overlay`. Two locks, always taken in this order: `_copying`, held while something is copied
up, so that names and parents stay where they are meanwhile for all who move them; and `_names`, over the nodes and
over every step that looks at both filesystems, which never waits for a file's data.
"""

from __future__ import annotations

import errno
import os
import stat
from threading import RLock
from typing import TYPE_CHECKING

from fusewire.fs.overlay.layers import INO, MODE, NLINK, OURSELVES, Inner, Lower, Upper, is_whiteout
from fusewire.fs.overlay.marks import PREFIX, Marks, entries, is_reserved
from fusewire.fs.overlay.nodes import Node, Nodes
from fusewire.fs.passthrough import Config
from fusewire.inodes import HandleTable
from fusewire.ops import FOREVER, Operations
from fusewire.wire import abi
from fusewire.wire.codec import ATTR_OUT, ENTRY_OUT, timeout

if TYPE_CHECKING:
    from fusewire.fs.overlay.layers import Found
    from fusewire.fs.overlay.nodes import LowerKey
    from fusewire.ops import Attr, Caller, Connection

# Inode numbers of the lower filesystem are marked by this bit: both kinds are shown under one device number, and two
# files of one number would be taken for one with two names.
LOWER_MARK = 1 << 62
NONE = -1  # no handle: a filesystem that has no `open` gives 0


class Handle:
    """An open file: its handle in the upper filesystem, and in the lower one, where it is open there; else NONE.

    Who was opened below stays so until the end, for somebody may be reading there when the file is copied up.
    """

    __slots__ = ("below", "fh", "node")

    def __init__(self, node: Node, fh: int, below: int = NONE) -> None:
        self.node = node
        self.fh = fh
        self.below = below


class Listing:
    """An open directory: what was in it when it was listed from the beginning, and the cookie of each name."""

    __slots__ = ("cookies", "items", "next", "node", "places")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.items: list[tuple[int, bytes, int, int, Found | None]] | None = None  # cookie, name, ino, type, lower
        self.places: list[int] = []  # the cookies of `items`
        self.cookies: dict[bytes, int] = {}
        self.next = 3  # after those of "." and ".."


class Base(Operations):
    """The state of an overlay."""

    def __init__(
        self,
        lower: Operations,
        upper: int,
        work: int,
        *,
        config: Config | None = None,
        entry_timeout: float = FOREVER,
        attr_timeout: float = FOREVER,
        negative_timeout: float = FOREVER,
        durable: bool = True,
        keep: tuple[int, ...] = (),
    ) -> None:
        """Take over the lower filesystem, descriptors of the upper and the work directory, and those of `keep`.

        config: as for `Passthrough`, of which posix_acl, remote, proc, trusted, and what concerns ids count here (it is
        changed). Timeouts are in seconds; what changes comes through this mount alone, so they need no end. durable: a
        copy is written to the disk before it takes its place. Raises TypeError for a lower filesystem that does not
        answer at once, OSError if the work directory cannot be written to, or is not on the upper one's filesystem.
        """
        if os.fstat(upper).st_dev != os.fstat(work).st_dev:
            raise OSError(errno.EXDEV, "an overlay's upper and work directory have to be on one filesystem")
        self._lower = Lower(lower)
        config = config or Config()
        try:
            self._marks = Marks(work, config.proc)
        except OSError as error:
            raise OSError(
                error.errno, f"the overlay's work directory cannot be written to: {error.strerror}", error.filename
            ) from error
        self._copying = RLock()
        self._names = RLock()
        source = os.open(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper)
        self._upper = Upper(source, config, self._names)
        self._work = work
        self._keep = (upper, work, *keep)
        self._durable = durable
        (entry, entry_ns), (attr, attr_ns) = timeout(entry_timeout), timeout(attr_timeout)
        self._valid = (0, entry, attr, entry_ns, attr_ns)  # generation first, as in fuse_entry_out
        self._attr_valid = (attr, attr_ns)
        self._attr_seconds = attr_timeout
        seconds, nanoseconds = timeout(negative_timeout)
        self._missing = ENTRY_OUT.pack(0, 0, seconds, 0, nanoseconds, 0, *[0] * 16) if negative_timeout else None
        self.announces_blocking = lower.announces_blocking
        # What the kernel keeps holds for ever, and whatever changes comes through it.
        self.want = abi.FUSE_HANDLE_KILLPRIV_V2 | abi.FUSE_READDIRPLUS_AUTO | abi.FUSE_CREATE_SUPP_GROUP
        self.want |= abi.FUSE_EXPLICIT_INVAL_DATA
        if config.posix_acl:
            self.want |= abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK
        root = Node(abi.FUSE_ROOT_ID, stat.S_IFDIR, self._lower.attr(1)[INO] | LOWER_MARK)
        root.upper = root.lower = root.handed = 1
        self._nodes = Nodes(root, self._drop)
        if self._marks.is_opaque(upper):
            root.lower = 0
        # Inode number in the upper filesystem -> the one that it is shown by, of all that was copied up: the number
        # that it had before. An entry may outlive its file, whose number may be given to another one then: no harm,
        # for nothing else is shown by that of a file that is gone.
        self._shown: dict[int, int] = {}
        self._handles: HandleTable[Handle] = HandleTable()
        self._listings: HandleTable[Listing] = HandleTable()
        self._connection: Connection | None = None

    def serve_namespace(self, uid_map: str, gid_map: str, inside: bool) -> None:
        """Speak the ids of the mount's user namespace, in both filesystems; see `Passthrough.serve_namespace`."""
        for operations in (self._upper, self._lower.operations):
            operations.serve_namespace(uid_map, gid_map, inside)

    def init(self, connection: Connection) -> None:
        self._connection = connection
        inner = Inner(connection)
        self._upper.init(inner)
        self._lower.operations.init(inner)

    def renumber(self, first: int) -> None:
        """Number nodes and handles from `first` on."""
        self._nodes.renumber(first)
        self._handles.renumber(first)
        self._listings.renumber(first)

    def destroy(self) -> None:
        self._listings.drain()
        for handle in self._handles.drain():
            if handle.below != NONE:
                self._lower.release(handle.node.handed, handle.below)
        self._upper.destroy()
        self._lower.operations.destroy()
        keep, self._keep = self._keep, ()
        for fd in keep:
            os.close(fd)

    def _slow(self, long: bool = True) -> None:
        """Let another worker read requests: what follows may take long."""
        if self._connection is not None:
            self._connection.may_block(long)

    def _drop(self, node: Node) -> None:
        if node.upper:
            self._upper.forget(node.upper, 1)
        if node.handed:
            self._lower.forget(node.handed)

    # Attributes

    def _look(self, node: Node) -> Attr:
        """Give a node's attributes as they are shown."""
        return self._show(node, self._attr(node))

    def _attr(self, node: Node) -> Attr:
        """Give a node's attributes as the filesystem that counts has them."""
        upper = node.upper
        # Not `lower`: it is 0 for a directory that has come to hide the lower one since.
        return self._upper.attr(upper) if upper else self._lower.attr(node.handed)

    def _show(self, node: Node, attr: Attr) -> Attr:
        # A directory that is in both has subdirectories of both, and counting them would take a listing: 1 stands for
        # "not known" (find(1) knows that), as the kernel's overlayfs has it.
        merged = node.upper and node.lower and node.kind == stat.S_IFDIR
        links = 1 if merged else attr[NLINK]
        return (node.ino, *attr[1:NLINK], links, *attr[NLINK + 1 : 15], 0)  # type: ignore[return-value]

    def _entry(self, node: Node, attr: Attr) -> bytes:
        """Make fuse_entry_out of a node whose lookup is counted."""
        return ENTRY_OUT.pack(node.nodeid, *self._valid, *self._show(node, attr))

    def _attributes(self, node: Node, attr: Attr) -> bytes:
        """Make fuse_attr_out."""
        return ATTR_OUT.pack(*self._attr_valid, *self._show(node, attr))

    # Nodes. All of these are called under `_names`.

    def _directory(self, nodeid: int) -> Node:
        node = self._nodes.get(nodeid)
        if node.kind != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", nodeid)
        return node

    def _hidden(self, node: Node) -> set[bytes]:
        """Give the names in a merged directory of which a `.wh.` file says that they are gone."""
        if node.hidden is None:
            hidden: set[bytes] = set()
            if node.upper and node.lower:
                fd = self._upper.open_listing(node.upper)
                hidden = {name[len(PREFIX) :] for name, *_ in entries(fd.number) if is_reserved(name)}
            node.hidden = hidden
        return node.hidden

    def _below(self, parent: Node, name: bytes) -> Found | None:
        """Look a name up in the lower filesystem, if it can be seen there as far as its directory goes."""
        if not parent.lower or (parent.upper and name in self._hidden(parent)):
            return None
        found = self._lower.find(parent.lower, name)
        if found is not None and is_whiteout(found[1]):  # a lower directory that was an upper one elsewhere
            self._lower.forget(found[0])
            return None
        return found

    def _find(self, parent: Node, name: bytes) -> tuple[Node, Attr] | None:
        """Look a name up in both, count it, and give the node with the attributes of whichever filesystem counts."""
        if is_reserved(name):
            return None
        found = self._upper.find(parent.upper, name) if parent.upper else None
        if found is None:
            below = self._below(parent, name)
            return None if below is None else self._found_below(parent, name, below)
        if is_whiteout(found[1]):
            self._upper.forget(found[0], 1)
            return None
        return self._found_above(parent, name, found)

    def _found_above(self, parent: Node, name: bytes, found: Found, made: bool = False) -> tuple[Node, Attr]:
        """Count what is in the upper filesystem; `made`: just now, by us."""
        upper, attr = found
        node = self._nodes.of_upper(upper)
        if node is not None:
            self._upper.forget(upper, 1)  # it holds one already
            if (node.parent is not parent or node.name != name) and node is not self._nodes.root:
                self._nodes.place(node, parent, name)
        else:
            kind = stat.S_IFMT(attr[MODE])
            try:
                if not made and kind in (stat.S_IFREG, stat.S_IFDIR):
                    self._check_whole(parent, name)
                below = self._merged_with(parent, name, upper) if kind == stat.S_IFDIR else None
            except OSError:
                self._upper.forget(upper, 1)
                raise
            if below is not None:
                ino = below[1][INO] | LOWER_MARK
            else:
                ino = self._shown.get(attr[INO], attr[INO])
            node = self._nodes.add(kind, ino, parent, name)
            self._nodes.put_upper(node, upper)
            if below is not None:
                self._nodes.put_lower(node, below[0], None)
        node.lookups += 1
        return node, attr

    def _check_whole(self, parent: Node, name: bytes) -> None:
        """Refuse what has to be completed from a place in the lower filesystem that this overlay does not look at."""
        fd = self._upper.reach(parent.upper)
        try:
            self._marks.check_whole(fd.number, name)
        except PermissionError as error:
            if self._connection is not None:
                self._connection.log_once(f"{os.fsdecode(name)}: {error.strerror}", place="another overlay's upper")
            raise

    def _merged_with(self, parent: Node, name: bytes, upper: int) -> Found | None:
        """Give the lower directory that an upper one is merged with."""
        below = self._below(parent, name)
        if below is None:
            return None
        merged = False
        try:
            fd = self._upper.reach(upper)
            merged = stat.S_ISDIR(below[1][MODE]) and not self._marks.is_opaque(fd.number)
        finally:
            if not merged:
                self._lower.forget(below[0])
        return below if merged else None

    def _found_below(self, parent: Node, name: bytes, found: Found) -> tuple[Node, Attr]:
        lower, attr = found
        kind = stat.S_IFMT(attr[MODE])
        key: LowerKey = lower if kind == stat.S_IFDIR or attr[NLINK] < 2 else (lower, parent, name)
        node = self._nodes.of_lower(key)
        if node is not None:
            self._lower.forget(lower)
        else:
            node = self._nodes.add(kind, attr[INO] | LOWER_MARK, parent, name)
            self._nodes.put_lower(node, lower, key)
        node.lookups += 1
        return node, attr

    def _known(self, parent: Node, name: bytes) -> Node:
        """Find a name and count it, to be given back by `_leave`. Raises FileNotFoundError."""
        found = self._find(parent, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such name", name)
        return found[0]

    def _leave(self, node: Node) -> None:
        """Give back what `_known` has counted."""
        with self._names:
            self._nodes.forget(node, 1)

    def _covers(self, parent: Node, name: bytes) -> bool:
        """Tell whether the lower filesystem has a name that is not to be seen once the upper one has it no more."""
        found = self._below(parent, name)
        if found is not None:
            self._lower.forget(found[0])
        return found is not None

    # For the parts on top

    def _copy_up(self, node: Node, length: int | None = None) -> None:
        raise NotImplementedError

    def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
        with self._names:
            found = self._find(self._directory(parent), name)
            return self._missing if found is None else self._entry(*found)

    def forget(self, nodeid: int, nlookup: int) -> None:
        with self._names:
            try:
                node = self._nodes.get(nodeid)
            except OSError:
                return
            self._nodes.forget(node, nlookup)

    def readlink(self, nodeid: int) -> bytes:
        node = self._nodes.get(nodeid)
        return self._upper.readlink(node.upper) if node.upper else self._lower.readlink(node.handed)


__all__ = ["LOWER_MARK", "NONE", "OURSELVES", "Base", "Handle", "Listing"]
