"""What is known of the files of a store: nodes by number and by name, with what has been seen of them and when.

Layer `fs`, part of `fs.remote`. Plain tables: no request goes out from here. The caller holds the lock.
"""

from __future__ import annotations

import errno
import os
from _thread import RLock, allocate_lock
from hashlib import blake2b
from time import monotonic, time_ns

from fusewire.fs.remote.blocks import Blocks, RemoteData
from fusewire.fs.remote.looks import Info, same
from fusewire.fs.remote.store import Reader, Store, fetch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SPOOLS = ("/var/tmp", "/tmp")  # noqa: S108 - files there have no name


class Spool:
    """A file of no name that holds the contents of a remote one while it is written. Closed with its last user."""

    __slots__ = ("fd", "place")

    def __init__(self, places: Sequence[str] = SPOOLS) -> None:
        """Make it in the first of these directories that can have it, and in memory where none can."""
        self.fd = -1
        for place in places:
            try:
                self.fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError:
                continue
            self.place = place
            return
        self.place = ""
        self.fd = os.memfd_create("fusewire-spool", os.MFD_CLOEXEC)  # in a sandbox without directories

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return os.fstat(self.fd).st_size

    @property
    def blocks(self) -> int:
        """How many blocks of 512 bytes it takes."""
        return os.fstat(self.fd).st_blocks

    def write(self, offset: int, data: memoryview | bytes) -> int:
        """Write `data`, or as much of it as there is room for. Raises OSError, when that is nothing."""
        view = memoryview(data)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                if done:
                    break  # the next one hears of it
                where = f"{self.place}, where what is written is kept until it is uploaded; TMPDIR is tried first"
                text = f"{error.strerror}: {where}" if self.place else error.strerror
                raise OSError(error.errno, text) from None
        return done

    def keep(self, name: bytes) -> str:
        """Give it a name in its directory, so that it outlives us: that path. Raises OSError."""
        if not self.place:
            raise OSError(errno.EOPNOTSUPP, "it is in memory")
        last = f"fusewire-unsaved-{os.urandom(4).hex()}-{os.fsdecode(name[:100])}"
        path = os.path.join(self.place, last)
        # link(2) would link the magic link itself; with a directory given, though none is needed, it is linkat(2).
        os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)
        return path

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Version:
    """The contents of a file as of one look at it: blocks of them, and how to get more."""

    __slots__ = ("_reader", "data", "info", "users")

    def __init__(self, store: Store, blocks: Blocks, info: Info) -> None:
        self.info = info
        self.users = 0  # handles, and 1 for the node
        self._reader = reader = None if store.is_async else Reader(store, info.path)
        self.data = RemoteData(
            blocks, lambda offset, length: fetch(store, info, reader, offset, length), info.size or 0
        )

    def leave(self) -> None:
        """Be one user less; the last one closes it."""
        self.users -= 1
        if not self.users:
            self.data.close()
            if self._reader is not None:
                self._reader.close()


class Handle:
    """An open file."""

    __slots__ = ("node", "version", "writing")

    def __init__(self, node: Node, writing: bool) -> None:
        self.node = node
        self.writing = writing
        self.version: Version | None = None

    def leave(self) -> None:
        """Let go of the version that it reads."""
        version, self.version = self.version, None
        if version is not None:
            version.leave()


class Node:
    """A file or a directory that the kernel knows, or that is not (all) in the store yet."""

    __slots__ = (
        "atime",
        "cached",
        "changes",
        "checked",
        "children",
        "count",
        "ctime",
        "handles",
        "info",
        "ino",
        "listed",
        "listing",
        "local",
        "lock",
        "mode",
        "mtime",
        "name",
        "nodeid",
        "parent",
        "saved",
        "spool",
        "unlinked",
        "version",
    )

    def __init__(self, nodeid: int, parent: Node | None, name: bytes, info: Info) -> None:
        self.nodeid = nodeid
        self.parent = parent
        self.name = name
        self.info = info
        self.checked = 0.0  # when `info` was seen; monotonic
        # The same as long as nobody renames it, also when it was forgotten meanwhile. 1 is the root's.
        self.ino = _number(info.path)
        self.count = 0  # lookups
        self.children: dict[bytes, Node] = {}
        self.listing: dict[bytes, Info] = {}
        self.listed = 0.0
        self.local = False  # it is nowhere else yet: a new file, or a directory in a store without directories
        self.unlinked = False
        self.handles: set[Handle] = set()
        self.spool: Spool | None = None
        self.changes = 0  # of the spool
        self.saved = 0  # the number of the last change that is in the store
        self.version: Version | None = None
        self.cached: Info | None = None  # the version that the kernel may have pages of
        self.lock = RLock()  # over what takes long: filling the spool, and uploading it
        self.mode: int | None = None
        self.mtime: int | None = None
        self.atime = info.mtime
        self.ctime = 0

    def renumber(self) -> None:
        """Be another file than the one that had this path."""
        self.ino = _number(f"{self.info.path}\0{time_ns()}")

    @property
    def dirty(self) -> bool:
        """Whether the spool has what the store has not."""
        return self.changes != self.saved and not self.unlinked

    @property
    def writers(self) -> int:
        """How many have it open for writing."""
        return sum(handle.writing for handle in self.handles)

    def see(self, info: Info, now: float) -> None:
        """Take what a look at it showed."""
        if self.spool is not None and self.changes != self.saved:
            return  # ours is newer
        if self.version is not None and not same(self.version.info, info):
            self.drop_version()
        if not same(info, self.info):
            self.mtime = None
        self.info = info._replace(path=self.info.path)  # it may have been moved while somebody looked
        self.checked = now
        self.local = False

    def drop_version(self) -> None:
        """Forget the contents."""
        version, self.version = self.version, None
        if version is not None:
            version.leave()

    def touched(self) -> None:
        """Note a change of the spool."""
        self.changes += 1
        self.mtime = None
        self.info = self.info._replace(mtime=time_ns())


def _number(path: str) -> int:
    return int.from_bytes(blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest(), "big") >> 1 | 2


class Tree:
    """All nodes of a mount."""

    def __init__(self, root: Info) -> None:
        self.lock = allocate_lock()
        self.root = Node(1, None, b"", root)
        self.root.ino = 1
        self.nodes: dict[int, Node] = {1: self.root}
        self._next = 2

    def get(self, nodeid: int) -> Node:
        """Give a node. Raises OSError(ESTALE)."""
        try:
            return self.nodes[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "the kernel named a node that does not exist", nodeid) from None

    def directory(self, nodeid: int) -> Node:
        """Give a directory. Raises OSError: ESTALE, ENOTDIR, and ENOENT for one that was removed."""
        node = self.get(nodeid)
        if not node.info.directory:
            raise OSError(errno.ENOTDIR, "not a directory", nodeid)
        if node.unlinked:
            raise OSError(errno.ENOENT, "the directory was removed", nodeid)
        return node

    def file(self, nodeid: int) -> Node:
        """Give a file. Raises OSError: ESTALE, EISDIR."""
        node = self.get(nodeid)
        if node.info.directory:
            raise OSError(errno.EISDIR, "a directory", nodeid)
        return node

    def child(self, parent: Node, name: bytes, info: Info, checked: float = 0.0) -> Node:
        """Give the node of a name, with what has been seen of it; made if there is none."""
        node = parent.children.get(name)
        if node is not None and node.info.directory != info.directory and not node.local:
            self.part(node)
            node = None
        if node is None:
            node = Node(self._next, parent, name, info)
            self._next += 1
            self.nodes[node.nodeid] = parent.children[name] = node
            node.checked = checked or monotonic()
        elif checked >= node.checked:
            node.see(info, checked or monotonic())
        return node

    def part(self, node: Node) -> None:
        """Take a node from its name; it lives on while somebody uses it."""
        node.unlinked = True
        node.local = False
        parent = node.parent
        if parent is not None and parent.children.get(node.name) is node:
            del parent.children[node.name]
        self.prune(node)

    def prune(self, node: Node | None) -> None:
        """Remove a node that nobody needs, and those above it that were there for it."""
        while node is not None and node.nodeid != 1:
            if node.count or node.local or node.children or node.handles or node.dirty:
                return
            if self.nodes.pop(node.nodeid, None) is None:
                return
            node.drop_version()
            parent = node.parent
            if parent is not None and parent.children.get(node.name) is node:
                del parent.children[node.name]
            node = parent

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Take back lookups; a peer that lies does no harm."""
        node = self.nodes.get(nodeid)
        if node is not None and nodeid != 1:
            node.count = max(0, node.count - nlookup)
            self.prune(node)

    def move(self, node: Node, parent: Node, name: bytes, path: str) -> None:
        """Give a node another name, and all below it other paths."""
        old = node.parent
        if old is not None and old.children.get(node.name) is node:
            del old.children[node.name]
        node.parent, node.name = parent, name
        parent.children[name] = node
        before = node.info.path
        for each in self.below(node):
            each.info = each.info._replace(path=path + each.info.path[len(before) :])
            each.listed = 0.0
            each.listing = {}
            each.drop_version()
            for handle in each.handles:
                handle.leave()
        self.prune(old)

    def below(self, node: Node) -> list[Node]:
        """Give a node and all that are below it."""
        found = [node]
        for each in found:
            found += each.children.values()
        return found

    def above(self, node: Node, other: Node) -> bool:
        """Tell whether `node` is `other` or above it."""
        step: Node | None = other
        while step is not None:
            if step is node:
                return True
            step = step.parent
        return False
