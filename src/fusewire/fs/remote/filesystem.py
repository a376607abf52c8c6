"""Any filesystem of fsspec as one of ours: names and directories.

Layer `fs`, part of `fs.remote`; contents are in `files`, attributes in `attributes`, what is known in `tree`, requests
in `store`. What has been seen of a file or a directory holds for some seconds, here and in the kernel. Every request
that goes out is made by a thread while the caller waits; interrupting one that changes nothing gives up the wait.
"""

from __future__ import annotations

import errno
import os
import stat
from time import monotonic, time_ns
from typing import TYPE_CHECKING

from fusewire.fs.remote.attributes import HOLDS, RemoteAttributes
from fusewire.fs.remote.crew import Crew
from fusewire.fs.remote.looks import Info
from fusewire.fs.remote.store import Store
from fusewire.fs.remote.tree import Node, Spool
from fusewire.ops import Entry
from fusewire.wire.codec import DirBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from fusewire.fs.remote.retry import Patience
    from fusewire.fs.sources import SourceOptions
    from fusewire.ops import Buffer, Caller, Connection, Pending

_REQUESTS = 8  # ranges at a time
_NOREPLACE = 1  # renameat2(2)
_DIRECTORY = Info("", True)


class _Listing:
    """An open directory: the names as they were when it was read from the beginning."""

    __slots__ = ("names", "read")

    def __init__(self) -> None:
        self.names: list[tuple[bytes, Info]] = []
        self.read = False


class RemoteFS(RemoteAttributes):
    """Serves a `Store`. Times are in seconds."""

    interruptible = True

    def __init__(self, store: Store, **options: Any) -> None:
        """Serve `store`, which is closed at the end. No thread is started here."""
        super().__init__(store, **options)
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1

    def init(self, connection: Connection) -> None:
        self._connection = connection
        if self._store.is_async:
            self._blocks.crew = Crew(_REQUESTS, "fetch")

    def destroy(self) -> None:
        self._save_all()
        self._crew.close()
        if self._blocks.crew is not None:
            self._blocks.crew.close()
        with self._lock:
            for node in self._tree.nodes.values():
                for handle in node.handles:
                    handle.leave()
                node.drop_version()
        self._store.close()

    def statistics(self) -> dict[str, int]:
        """Give the counters of blocks and requests."""
        return {**self._blocks.statistics(), "requests": self._store.requests}

    # Names

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Entry | Pending | None:
        with self._lock:
            directory = self._tree.directory(parent)
            known = self._known(directory, name)
            if isinstance(known, Node):
                return self._entry(known)
            if known is False:
                return self._missing()

        def commit(seen: tuple[str, Info | None, float]) -> Entry | None:
            node = self._seen(directory, name, *seen)
            return self._missing() if node is None else self._entry(node)

        return self._later(lambda: self._look(directory, name), commit)

    def _known(self, directory: Node, name: bytes) -> Node | bool | None:
        """Give the node of a name if what is known is fresh, False if there is none, None if nobody knows."""
        node = directory.children.get(name)
        if node is not None and self._is_fresh(node):
            return node
        if not directory.listed or monotonic() - directory.listed > self._fresh:
            return None
        info = directory.listing.get(name)
        if info is None:
            return None if self._store.web else False
        if info.size is None:
            return None
        return self._tree.child(directory, name, info, directory.listed)

    def _look(self, directory: Node, name: bytes) -> tuple[str, Info | None, float]:
        """Ask the store for a name: in which path that was, what is there, and when it was seen."""
        store, now = self._store, monotonic()
        path = directory.info.path
        listing = directory.listing
        if store.web and not (directory.listed and now - directory.listed < self._fresh):
            try:
                listing = store.list(path)
                with self._lock:
                    directory.listing, directory.listed = listing, now
            except (FileNotFoundError, PermissionError):
                listing = {}  # a server that lists nothing
        info = listing.get(name)
        if store.web and info is not None and info.directory:
            return path, info, now
        try:
            return path, store.info(info.path.rstrip("/") if info is not None else store.join(path, name)), now
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EILSEQ):
                raise
            return path, None, now

    def _seen(self, directory: Node, name: bytes, path: str, info: Info | None, now: float) -> Node | None:
        """Note what is behind a name; the lock is held. Raises OSError(ESTALE), upon which the kernel asks again."""
        if directory.info.path != path:
            raise OSError(errno.ESTALE, f"{self._store.name_of(path)}: it was moved while somebody looked into it")
        if info is not None:
            return self._tree.child(directory, name, info, now)
        node = directory.children.get(name)
        if node is not None and (node.local or node.dirty):
            return node
        if node is not None:
            self._tree.part(node)
        return None

    def _resolve(self, directory: Node, name: bytes) -> Node | None:
        """Give the node of a name, by a look at the store if need be. Without the lock."""
        with self._lock:
            known = self._known(directory, name)
        if isinstance(known, Node):
            return known
        if known is False:
            return None
        seen = self._look(directory, name)
        with self._lock:
            return self._seen(directory, name, *seen)

    def _needed(self, directory: Node, name: bytes) -> Node:
        node = self._resolve(directory, name)
        if node is None:
            raise OSError(errno.ENOENT, "no such file or directory", name)
        return node

    def forget(self, nodeid: int, nlookup: int) -> None:
        with self._lock:
            self._tree.forget(nodeid, nlookup)

    def _new(self, directory: Node, name: bytes, *, is_directory: bool) -> Node:
        """Make a node that the store has not yet; the lock is held."""
        path = self._store.join(directory.info.path, name)
        info = Info(path, is_directory, 0, time_ns())
        node = self._tree.child(directory, name, info, monotonic())
        node.local = True
        node.renumber()
        if not is_directory:
            node.spool = Spool(self._spools)
            node.changes = node.saved + 1
        directory.info = directory.info._replace(mtime=time_ns())
        return node

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> Pending:
        with self._lock:
            directory = self._tree.directory(parent)

        def commit(node: Node | None) -> tuple[Entry, tuple[int, int]]:
            if node is not None and flags & os.O_EXCL:
                raise OSError(errno.EEXIST, "the name exists", name)
            if node is not None and node.info.directory:
                raise OSError(errno.EISDIR, "a directory", name)
            if node is None:
                node = self._new(directory, name, is_directory=False)
                node.mode = mode & 0o7777
            opened = self._opened(node, flags)
            return self._entry(node), opened

        def work() -> Node | None:
            self._store.join(directory.info.path, name)
            return self._resolve(directory, name)

        return self._later(work, commit, lasting=True)

    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> Pending:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EPERM, "remote directories hold files and directories only", name)
        with self._lock:
            directory = self._tree.directory(parent)

        def work() -> Node:
            if self._resolve(directory, name) is not None:
                raise OSError(errno.EEXIST, "the name exists", name)
            with self._lock:
                node = self._new(directory, name, is_directory=False)
                node.mode = mode & 0o7777
            try:
                self._upload(node)
            except OSError:
                with self._lock:
                    self._tree.part(node)
                raise
            with self._lock:
                self._drop_spool(node)
            return node

        return self._later(work, self._entry, lasting=True)

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> Pending:
        with self._lock:
            directory = self._tree.directory(parent)

        def work() -> Node:
            if self._resolve(directory, name) is not None:
                raise OSError(errno.EEXIST, "the name exists", name)
            path = self._store.join(directory.info.path, name)
            self._store.mkdir(path)
            with self._lock:
                node = self._new(directory, name, is_directory=True)
                node.local = self._store.flat
                node.mode = mode & 0o7777
                return node

        return self._later(work, self._entry, lasting=True)

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Entry:
        raise OSError(errno.EPERM, "remote directories hold files and directories only", name)

    def unlink(self, caller: Caller, parent: int, name: bytes) -> Pending:
        with self._lock:
            directory = self._tree.directory(parent)

        def work() -> None:
            node = self._needed(directory, name)
            if node.info.directory:
                raise OSError(errno.EISDIR, "a directory", name)
            self._rescue(node)
            with node.lock:  # not while it is being uploaded
                if not node.local:
                    self._store.remove(node.info.path)
                with self._lock:
                    self._gone(directory, name, node)

        return self._later(work, lasting=True)

    def _gone(self, directory: Node, name: bytes, node: Node) -> None:
        """Note that a name is no more; the lock is held."""
        directory.listing.pop(name, None)
        directory.info = directory.info._replace(mtime=time_ns())
        if self._store.flat and directory.nodeid != 1:
            directory.local = True  # with its last file it may be gone from the store
        self._tree.part(node)
        self._drop_spool(node)

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> Pending:
        with self._lock:
            directory = self._tree.directory(parent)

        def work() -> None:
            node = self._needed(directory, name)
            self._check_empty(node, name)
            self._store.rmdir(node.info.path)
            with self._lock:
                self._gone(directory, name, node)

        return self._later(work, lasting=True)

    def _check_empty(self, node: Node, name: bytes) -> None:
        """Look whether a directory is empty. Raises OSError: ENOTDIR, ENOTEMPTY."""
        if not node.info.directory:
            raise OSError(errno.ENOTDIR, "not a directory", name)
        if self._list(node):
            raise OSError(errno.ENOTEMPTY, "the directory is not empty", name)

    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> Pending:
        if flags & ~_NOREPLACE:
            raise OSError(errno.EINVAL, "remote files cannot be exchanged", name)
        with self._lock:
            old, new = self._tree.directory(parent), self._tree.directory(newparent)

        def work() -> None:
            node, target = self._needed(old, name), self._resolve(new, newname)
            if target is node:
                return
            if self._tree.above(node, new):
                raise OSError(errno.EINVAL, "a directory cannot be moved below itself", name)
            if target is not None:
                if flags & _NOREPLACE:
                    raise OSError(errno.EEXIST, "the name exists", newname)
                if target.info.directory and not node.info.directory:
                    raise OSError(errno.EISDIR, "a directory", newname)
                if node.info.directory:
                    self._check_empty(target, newname)
                    self._store.rmdir(target.info.path)
                else:
                    self._rescue(target)
            self._move(old, name, new, newname, node, target)

        return self._later(work, lasting=True)

    def _move(self, old: Node, name: bytes, new: Node, newname: bytes, node: Node, target: Node | None) -> None:
        path = self._store.join(new.info.path, newname)
        with node.lock:
            below = self._with_changes(node) if node.info.directory else [node]
            for each in below:
                if each is not node or not each.local:
                    self._upload(each)
            self._paths.enter(shut=node.info.directory)
            try:
                moved = self._moved(old, name, new, newname, node, target, path)
            finally:
                self._paths.leave()
        # A copy is another version: who has one of these open goes on with that.
        for each in moved:
            if not each.info.directory and not each.local and (each is node or each.handles):
                self._look_again(each)

    def _moved(
        self, old: Node, name: bytes, new: Node, newname: bytes, node: Node, target: Node | None, path: str
    ) -> list[Node]:
        """Move it, in the store and here; gives it and all that is below it."""
        if not node.local or (node.info.directory and self._list(node)):
            self._store.move(node.info.path, path, directory=node.info.directory)
        with self._lock:
            if target is not None:
                self._gone(new, newname, target)
            local = node.local
            old.listing.pop(name, None)
            new.listed = 0.0
            old.info = old.info._replace(mtime=time_ns())
            new.info = new.info._replace(mtime=time_ns())
            if self._store.flat and old.nodeid != 1:
                old.local = True
            self._tree.move(node, new, newname, path)
            node.local = local or (node.info.directory and self._store.flat)
            node.ctime = time_ns()
            moved = self._tree.below(node)
            for each in moved:
                each.checked = 0.0
            return moved

    def _with_changes(self, node: Node) -> list[Node]:
        """Give the files below a directory that are not in the store as they are."""
        with self._lock:
            found, rest = [], [node]
            while rest:
                each = rest.pop()
                rest += each.children.values()
                if each.dirty:
                    found.append(each)
            return found

    # Directories. A cookie is the place in the listing plus 3; 1 and 2 are "." and "..".

    def _list(self, directory: Node) -> dict[bytes, Info]:
        """Ask the store what is in a directory, and add what it does not have yet. Without the lock."""
        while True:
            now, path = monotonic(), directory.info.path
            try:
                listing = self._store.list(path)
            except FileNotFoundError:
                if not directory.local and directory.nodeid != 1 and directory.info.path == path:
                    raise
                listing = {}
            with self._lock:
                if directory.info.path == path:  # else it was moved meanwhile
                    directory.listing, directory.listed = listing, now
                    return self._merged(directory)

    def _merged(self, directory: Node) -> dict[bytes, Info]:
        names = dict(directory.listing)
        for name, node in directory.children.items():
            if node.local or node.dirty:
                names[name] = node.info
        return names

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        with self._lock:
            if not self._tree.get(nodeid).info.directory:
                raise OSError(errno.ENOTDIR, "not a directory", nodeid)
            fh = self._next_listing
            self._next_listing += 1
            self._listings[fh] = _Listing()
            return fh, 0

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        self._listings.pop(fh, None)

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer | Pending:
        return self._read_directory(nodeid, fh, offset, size, plus=False)

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer | Pending:
        return self._read_directory(nodeid, fh, offset, size, plus=True)

    def _read_directory(self, nodeid: int, fh: int, offset: int, size: int, *, plus: bool) -> Buffer | Pending:
        with self._lock:
            directory = self._tree.get(nodeid)
            listing = self._listings.get(fh)
            if listing is None:
                raise OSError(errno.EBADF, "the kernel named a handle that is not open", fh)
            if listing.read and offset:
                return self._fill_buffer(directory, listing, offset, size, plus)
            if directory.unlinked:
                listing.names, listing.read = [], True
                return self._fill_buffer(directory, listing, offset, size, plus)
            if directory.listed and monotonic() - directory.listed < self._fresh:
                listing.names, listing.read = list(self._merged(directory).items()), True
                return self._fill_buffer(directory, listing, offset, size, plus)

        def commit(names: dict[bytes, Info]) -> Buffer:
            listing.names, listing.read = list(names.items()), True
            return self._fill_buffer(directory, listing, offset, size, plus)

        return self._later(lambda: self._list(directory), commit)

    def _fill_buffer(self, directory: Node, listing: _Listing, offset: int, size: int, plus: bool) -> Buffer:
        buffer = DirBuffer(size)
        for cookie, name, info in self._rest(directory, listing, offset):
            node = directory.children.get(name)
            if not plus or cookie < 3 or info.size is None:
                ino = self._ino(directory, cookie, info, node)
                kind = 4 if info.directory else 8
                if plus:
                    if not buffer.add_plus(name, cookie, None, ino, kind):
                        break
                elif not buffer.add(name, ino, cookie, kind):
                    break
                continue
            if not buffer.room_for_plus(name):
                break
            if node is None or not (node.local or node.dirty):
                node = self._tree.child(directory, name, info, directory.listed)
            buffer.add_plus(name, cookie, self._entry(node))
        return buffer.data

    def _ino(self, directory: Node, cookie: int, info: Info, node: Node | None) -> int:
        if cookie == 1:
            return directory.ino
        if cookie == 2:
            return directory.parent.ino if directory.parent is not None else directory.ino
        return node.ino if node is not None else Node(0, None, b"", info).ino

    def _rest(self, directory: Node, listing: _Listing, offset: int) -> Iterator[tuple[int, bytes, Info]]:
        if offset < 1:
            yield 1, b".", _DIRECTORY
        if offset < 2:
            yield 2, b"..", _DIRECTORY
        for place in range(max(offset - 2, 0), len(listing.names)):
            name, info = listing.names[place]
            if name in directory.children or name in directory.listing:  # else it was removed meanwhile
                yield place + 3, name, info


def open_fsspec(url: str, options: SourceOptions, *, patience: Patience | None = None) -> RemoteFS:
    """Serve what fsspec has at `url`: a directory, read-write where its filesystem can write.

    `options.storage`, if there is one, is what the filesystem is made with. Connecting may start fsspec's thread, so
    this belongs into the process that serves. Raises OSError that names the URL.
    """
    storage: dict[str, Any] = getattr(options, "storage", None) or {}
    store = Store(url, storage, patience)
    try:
        _check_root(store)
        if options.offset is not None:
            raise OSError(errno.EINVAL, f"{store.url}: `offset=` is for images")

        def seconds(value: float | None) -> float:
            return HOLDS if value is None else value

        return RemoteFS(
            store,
            uid=options.uid,
            gid=options.gid,
            umask=0o022 if options.umask is None else options.umask,
            entry_timeout=seconds(options.entry_timeout),
            attr_timeout=seconds(options.attr_timeout),
            negative_timeout=seconds(options.negative_timeout),
            cache_size=options.cache_size,
            spools=getattr(options, "archive", {}).get("spool", ()),
            read_only=options.read_only,
        )
    except BaseException:
        store.close()
        raise


def _check_root(store: Store) -> None:
    """See that there is a directory. An empty prefix of a bucket is one too: the first file will make it."""
    if store.web:
        store.list(store.root)
        return
    try:
        info = store.info(store.root)
    except FileNotFoundError:
        if store.writable and not store.local:
            return
        raise
    if not info.directory:
        raise OSError(
            errno.ENOTDIR,
            f"{store.url}: a file; mount the directory that it is in, or an archive by zip::{store.url}",
        )
