"""Contents of remote files: read by blocks, written to a file of no name that is uploaded at close and fsync.

Layer `fs`, part of `fs.remote`: the half of `filesystem.RemoteFS` that has to do with open files.
"""

from __future__ import annotations

import errno
import os
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any

from fusewire.fs.remote.blocks import Blocks
from fusewire.fs.remote.crew import Crew
from fusewire.fs.remote.jobs import Gate, Job
from fusewire.fs.remote.looks import same
from fusewire.fs.remote.tree import SPOOLS, Handle, Node, Spool, Tree, Version
from fusewire.inodes import HandleTable
from fusewire.ops import FileRange, Operations
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusewire.fs.remote.looks import Info
    from fusewire.fs.remote.store import Store
    from fusewire.ops import Buffer, Caller, Connection, Pending

_STEP = 1 << 20  # of a file that is copied into its spool
# What is open and is removed: contents up to this size are fetched before. Bytes.
_RESCUED = 64 << 20
# Failures that are the caller's own and of which nothing needs to be said.
_SILENT = frozenset({
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL, errno.EINTR, errno.EROFS,
    errno.EILSEQ,
})  # fmt: skip


class RemoteFiles(Operations):
    """Open files. `_lock` is over all tables, and never held while a request is out."""

    def __init__(self, store: Store, root: Info, blocks: Blocks, jobs: int, spools: Sequence[str]) -> None:
        self._store = store
        self._spools = (*spools, *SPOOLS)
        self._paths = Gate()  # uploads go through; it is shut while a directory is moved with what is below it
        self._tree = Tree(root)
        self._lock = self._tree.lock
        self._blocks = blocks
        self._crew = Crew(jobs, "remote")
        self._open: HandleTable[Handle] = HandleTable()
        self._connection: Connection | None = None
        self._fresh = 0.0  # seconds that what was seen holds

    def _later(
        self, work: Callable[[], Any], commit: Callable[[Any], Any] | None = None, *, lasting: bool = False
    ) -> Pending:
        """Have `work` done by a thread, then `commit` under the lock; the answer is what that gives."""

        def locked(result: Any) -> Any:
            with self._lock:
                return commit(result) if commit is not None else result

        job = Job(work, locked, self._failed, lasting=lasting)
        if not self._crew.submit(job):
            job()  # no thread can be had: the worker waits itself
        return job.pending

    def _failed(self, error: OSError) -> None:
        if error.errno not in _SILENT and self._connection is not None:
            self._connection.log_once(error.strerror or str(error))

    def _is_fresh(self, node: Node) -> bool:
        """Tell whether what is known of a node needs no look at the store; the lock is held."""
        return node.local or node.unlinked or node.spool is not None or monotonic() - node.checked < self._fresh

    def _look_again(self, node: Node) -> None:
        """Ask the store about a file."""
        now, path = monotonic(), node.info.path
        try:
            info = self._store.info(path)
        except FileNotFoundError:
            if node.info.path != path:
                return  # it was moved meanwhile, and is there
            raise
        with self._lock:
            if info.directory == node.info.directory:
                node.see(info, now)
                return
        raise OSError(errno.ESTALE, f"{self._store.name_of(node.info.path)}: it is of another type by now")

    # Opening

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int] | Pending:
        with self._lock:
            node = self._tree.file(nodeid)
            if self._is_fresh(node):
                return self._opened(node, flags)
        return self._later(lambda: self._look_again(node), lambda _: self._opened(node, flags))

    def _opened(self, node: Node, flags: int) -> tuple[int, int]:
        """Make a handle; the lock is held."""
        writing = flags & os.O_ACCMODE != os.O_RDONLY
        if writing and self.read_only:
            raise OSError(errno.EROFS, "the filesystem is mounted read-only")
        if flags & os.O_TRUNC and writing:
            if node.spool is None:
                node.spool = Spool(self._spools)
            os.ftruncate(node.spool.fd, 0)
            node.touched()
        handle = Handle(node, writing)
        node.handles.add(handle)
        fh = self._open.add(handle)
        if node.spool is not None:
            node.cached = None
            return fh, 0
        if node.info.size is None:
            return fh, abi.FOPEN_DIRECT_IO
        kept = node.info.told and node.cached is not None and same(node.cached, node.info)
        node.cached = node.info
        self._version(handle)
        return fh, abi.FOPEN_KEEP_CACHE if kept else 0

    def _version(self, handle: Handle) -> Version:
        """Give what a handle reads: the version that it was opened at, or of our own last upload; the lock is held."""
        if handle.version is None:
            node = handle.node
            if node.version is None:
                node.version = Version(self._store, self._blocks, node.info)
                node.version.users = 1
            handle.version = node.version
            handle.version.users += 1
        return handle.version

    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> Pending | None:
        handle = self._open.remove(fh)
        node = handle.node
        with self._lock:
            if not (handle.writing and node.dirty and node.writers == 1):
                self._released(handle)
                return None

        def work() -> None:
            try:
                self._upload(node)
            except OSError as error:
                self._failed(error)  # nobody hears of it here; who closes or saves it next tries again
            finally:
                with self._lock:
                    self._released(handle)

        return self._later(work, lasting=True)

    def _released(self, handle: Handle) -> None:
        node = handle.node
        handle.leave()
        node.handles.discard(handle)
        self._drop_spool(node)
        self._tree.prune(node)

    def _drop_spool(self, node: Node) -> None:
        """Let go of what has been uploaded, or can be no more; the lock is held."""
        if node.spool is not None and not node.dirty and not (node.handles if node.unlinked else node.writers):
            node.spool = None
            node.saved = node.changes
            node.cached = None

    # Reading

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Sequence[Buffer] | FileRange | Pending:
        handle = self._open.get(fh)
        node = handle.node
        with self._lock:
            if node.spool is not None:
                return FileRange(node.spool.fd, offset, size, node.spool)
            data = self._version(handle).data if node.info.size is not None else None
        if data is not None:
            if data.ready(offset, size):
                return data.read(offset, size)
            return self._later(lambda: data.read(offset, size))

        def unsized() -> FileRange:
            spool = self._fill(node)
            return FileRange(spool.fd, offset, size, spool)

        def give(found: FileRange) -> bytes:
            return os.pread(found.fd, found.size, found.offset)

        return self._later(unsized, give)

    def _fill(self, node: Node, keep: int | None = None) -> Spool:
        """Give the spool, with what the store has, or `keep` bytes of that."""
        with node.lock:
            with self._lock:
                if node.spool is not None:
                    return node.spool
                version = node.version
                if version is None:
                    version = node.version = Version(self._store, self._blocks, node.info)
                    version.users = 1
                version.users += 1
            try:
                spool = Spool(self._spools)
                if version.info.size is None:
                    self._store.copy(version.info.path, spool.fd)
                else:
                    size = version.info.size if keep is None else min(keep, version.info.size)
                    for offset in range(0, size, _STEP):
                        part = memoryview(version.data.pread(offset, min(_STEP, size - offset)))
                        done = 0
                        while done < len(part):
                            done += spool.write(offset + done, part[done:])
            finally:
                with self._lock:
                    version.leave()
            with self._lock:
                node.spool = spool
            return spool

    # Writing

    def write(
        self, nodeid: int, fh: int, offset: int, data: Any, write_flags: int, lock_owner: int, flags: int
    ) -> int | Pending:
        node = self._open.get(fh).node
        with self._lock:
            if node.spool is not None:
                return self._write(node, node.spool, offset, data)
        kept = bytes(data)

        def commit(spool: Spool) -> int:
            # It may have been uploaded and dropped meanwhile, with nothing of ours in it.
            if node.spool is None:
                node.spool = spool
            return self._write(node, node.spool, offset, kept)

        return self._later(lambda: self._fill(node), commit, lasting=True)

    def _write(self, node: Node, spool: Spool, offset: int, data: memoryview | bytes) -> int:
        try:
            done = spool.write(offset, data)
        except OSError as error:
            self._failed(error)
            raise
        node.touched()
        return done

    def _truncate(self, node: Node, size: int) -> None:
        """Give a file another size; if nobody has it open for writing, in the store too."""
        spool = self._fill(node, size)
        with self._lock:
            if node.spool is None:
                node.spool = spool
            os.ftruncate(node.spool.fd, size)
            node.touched()
            if node.writers:
                return
        try:
            self._upload(node)
        finally:
            with self._lock:
                self._drop_spool(node)

    def _upload(self, node: Node) -> None:
        """Bring a file into the store as it is now. Its errors are those of close(2) and fsync(2)."""
        with node.lock:
            self._paths.enter()
            try:
                self._upload_now(node)
            finally:
                self._paths.leave()

    def _upload_now(self, node: Node) -> None:
        """As `_upload`, for who has seen to it that the path stays what it is."""
        with self._lock:
            spool, before, path = node.spool, node.changes, node.info.path
            if spool is None or not node.dirty:
                return
        size = spool.size
        self._store.put(path, spool.fd, size)
        now = monotonic()
        try:
            info = self._store.info(path)
        except OSError:
            # It is there all the same. What it looks like is asked again as soon as somebody wants to know.
            info = node.info._replace(size=size, mtime=time_ns(), tags=())
            now = 0.0
        with self._lock:
            node.saved = before
            node.local = False
            node.drop_version()
            node.info = info if not node.dirty else node.info
            node.checked = now
            for handle in node.handles:
                handle.leave()
            parent = node.parent
            if parent is not None and parent.listed and not node.unlinked:
                parent.listing[node.name] = info

    def flush(self, nodeid: int, fh: int, lock_owner: int) -> Pending | None:
        handle = self._open.get(fh)
        return self.fsync(nodeid, fh, 0) if handle.writing else None

    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> Pending | None:
        node = self._open.get(fh).node
        return self._later(lambda: self._upload(node), lasting=True) if node.dirty else None

    def _rescue(self, node: Node) -> None:
        """See that who has a file open can go on reading when it is removed from the store."""
        with self._lock:
            wanted = node.handles and node.spool is None and (node.info.size or 0) <= _RESCUED
        if wanted:
            try:
                self._fill(node)
            except OSError as error:
                self._failed(error)

    def _save_all(self) -> None:
        """Upload what is not in the store yet. What cannot be stays in a file, and standard error says where."""
        with self._lock:
            dirty = [node for node in self._tree.nodes.values() if node.dirty]
        for node in dirty:
            try:
                self._upload(node)
            except OSError as error:
                try:
                    spool = node.spool
                    said = "kept in " + spool.keep(node.name) if spool is not None else "lost"
                except OSError as worse:
                    said = f"lost ({worse.strerror})"
                if self._connection is not None:
                    self._connection.log_once(f"{error.strerror}; what was written is {said}")
