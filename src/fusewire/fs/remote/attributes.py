"""Attributes of remote files: what the store tells, and what is only remembered.

Layer `fs`, part of `fs.remote`: the part of `filesystem.RemoteFS` between `files` and names.
"""

from __future__ import annotations

import errno
import os
import stat
from time import time_ns
from typing import TYPE_CHECKING

from fusewire.fs.remote.blocks import Blocks
from fusewire.fs.remote.files import RemoteFiles
from fusewire.fs.remote.looks import Info
from fusewire.fs.remote.store import Store
from fusewire.ops import Entry, Statfs
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewire.fs.remote.tree import Node
    from fusewire.ops import Attr, Caller, Pending, Setattr

HOLDS = 5.0  # seconds that what was seen holds, unless the options say otherwise
_BLOCK = 1 << 17
_JOBS = 16  # callers that wait at a time
_SPACE = 1 << 28  # blocks of 4 KiB, said to be free: nobody knows how many are
_NO_ATTR = (0,) * 16
_U64 = (1 << 64) - 1


class RemoteAttributes(RemoteFiles):
    """Attributes. Times are in seconds."""

    def __init__(
        self,
        store: Store,
        *,
        uid: int | None = None,
        gid: int | None = None,
        umask: int = 0o022,
        entry_timeout: float = HOLDS,
        attr_timeout: float = HOLDS,
        negative_timeout: float = HOLDS,
        cache_size: int = 64 << 20,
        read_only: bool = False,
        spools: Sequence[str] = (),
    ) -> None:
        """Serve `store`, which is closed at the end. No thread is started here.

        spools: directories to try for temporary files, before /var/tmp and /tmp.
        """
        super().__init__(store, Info(store.root, True), Blocks(cache_size, _BLOCK), _JOBS, spools)
        self.read_only = read_only or not store.writable
        self._uid = os.getuid() if uid is None else uid
        self._gid = os.getgid() if gid is None else gid
        self._mask = ~umask & 0o777
        self._entry_timeout = entry_timeout
        self._fresh = self._attr_timeout = attr_timeout
        self._negative = negative_timeout

    def _attributes(self, node: Node) -> Attr:
        info = node.info
        if info.directory:
            mode = stat.S_IFDIR | (0o777 & self._mask if node.mode is None else node.mode)
            size, blocks = 4096, 8
        else:
            plain = 0o666 | (info.mode & 0o111 if info.mode else 0)
            mode = stat.S_IFREG | (plain & self._mask if node.mode is None else node.mode)
            size, blocks = info.size or 0, ((info.size or 0) + 511) // 512
            if node.spool is not None:
                size, blocks = node.spool.size, node.spool.blocks
        mtime = node.mtime if node.mtime is not None else info.mtime
        seconds, rest = divmod(mtime, 1_000_000_000)
        atime, atime_rest = divmod(node.atime, 1_000_000_000)
        ctime, ctime_rest = divmod(max(node.ctime, info.mtime), 1_000_000_000)
        nlink = 0 if node.unlinked else 2 if info.directory else 1
        return (
            node.ino, size, blocks, atime & _U64, seconds & _U64, ctime & _U64, atime_rest, rest, ctime_rest,
            mode, nlink, self._uid, self._gid, 0, _BLOCK, 0,
        )  # fmt: skip

    def _entry(self, node: Node) -> Entry:
        """Count a lookup; the lock is held, and the answer goes out."""
        node.count += 1
        return Entry(node.nodeid, self._attributes(node), self._entry_timeout, self._attr_timeout)

    def _missing(self) -> Entry | None:
        return Entry(0, _NO_ATTR, self._negative, 0) if self._negative else None

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float] | Pending:
        with self._lock:
            node = self._tree.get(nodeid)
            if nodeid == 1 or self._is_fresh(node) or (self._store.web and node.info.directory):
                return self._attributes(node), self._attr_timeout

        def work() -> None:
            try:
                self._look_again(node)
            except FileNotFoundError:
                if not node.handles and not node.info.directory:
                    raise

        return self._later(work, lambda _: (self._attributes(node), self._attr_timeout))

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> tuple[Attr, float] | Pending:
        valid = change.valid
        with self._lock:
            node = self._tree.get(nodeid)
            for bit, new, old in ((abi.FATTR_UID, change.uid, self._uid), (abi.FATTR_GID, change.gid, self._gid)):
                if valid & bit and new != old:
                    raise OSError(errno.EPERM, "remote files have no owners that could be changed")
        if not valid & abi.FATTR_SIZE:
            with self._lock:
                return self._set(node, change)
        self._tree.file(nodeid)
        with self._lock:
            if node.spool is not None and node.writers:
                os.ftruncate(node.spool.fd, change.size)
                node.touched()
                return self._set(node, change)

        def work() -> None:
            with self._lock:
                fresh = self._is_fresh(node)
            if not fresh:
                self._look_again(node)
            self._truncate(node, change.size)

        return self._later(work, lambda _: self._set(node, change), lasting=True)

    def _set(self, node: Node, change: Setattr) -> tuple[Attr, float]:
        """Note mode and times, which are known here only, and as long as the node is; the lock is held."""
        valid = change.valid
        if valid & abi.FATTR_MODE:
            node.mode = change.mode & 0o7777
        if valid & abi.FATTR_MTIME:
            node.mtime = time_ns() if valid & abi.FATTR_MTIME_NOW else _moment(change.mtime, change.mtimensec)
        if valid & abi.FATTR_ATIME:
            node.atime = time_ns() if valid & abi.FATTR_ATIME_NOW else _moment(change.atime, change.atimensec)
        if valid:
            node.ctime = time_ns()
        return self._attributes(node), self._attr_timeout

    def statfs(self, nodeid: int) -> Statfs:
        free = 0 if self.read_only else _SPACE
        return Statfs(_SPACE, free, free, _SPACE, free)


def _moment(seconds: int, nanoseconds: int) -> int:
    """Make nanoseconds of a time on the wire, where seconds are signed."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * 1_000_000_000 + nanoseconds
