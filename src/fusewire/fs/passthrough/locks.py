"""Locks of a served host directory: taken on the host, so that its own processes see them.

Layer `fs`, a part of `Passthrough`. A POSIX lock belongs to a process of the client (its lock owner), an OFD lock to an
open file: so each owner has a descriptor of its own per inode. An flock(2) belongs to the client's open file, which is
one of ours.

Nobody waits in a lock call: such a thread could not hear that its client has given up, and neither the client nor the
server could end. A lock that is not to be had yet is tried again at once when a lock of ours on that inode is released,
and every few milliseconds, for those that processes of the host hold.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from time import monotonic
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import Base
from fusewire.linux import files
from fusewire.ops import Lock, Pending
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.fs.passthrough.base import Handle
    from fusewire.fs.passthrough.config import Config
    from fusewire.fs.passthrough.nodes import Fd, Node
    from fusewire.ops import Caller

_FIRST_TRY, _LAST_TRY = 0.001, 0.05  # seconds between tries for a lock that the host holds, doubled each time
_UNLOCKED = frozenset({errno.EAGAIN, errno.EACCES})
_FLOCK = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}


def _settled() -> bool:
    """Stand in the place of an attempt, which holds a descriptor and would live until the collector comes by."""
    return False


class _Waiter:
    """Somebody who waits for a lock."""

    __slots__ = ("attempt", "delay", "due", "node", "pending")

    def __init__(self, node: Node, attempt: Callable[[], bool]) -> None:
        self.node = node
        self.attempt = attempt
        self.delay = _FIRST_TRY
        self.due = monotonic() + self.delay
        self.pending = Pending()


class Waiters:
    """Those who wait for locks, and the thread that tries for them; it runs only while there are any."""

    def __init__(self) -> None:
        self._waiting: list[_Waiter] = []
        self._changed = threading.Condition()
        self._running = False
        self._closed = False

    def wait(self, node: Node, attempt: Callable[[], bool]) -> Pending:
        """Give an answer that comes when `attempt` gives True or raises, or when the client gives up."""
        waiter = _Waiter(node, attempt)

        def give_up() -> None:
            with self._changed:
                if waiter not in self._waiting:
                    return
                self._waiting.remove(waiter)
                waiter.attempt = _settled
            waiter.pending.fail(InterruptedError(errno.EINTR, "interrupted while waiting for a lock"))

        waiter.pending.interrupt = give_up
        with self._changed:
            if self._closed:
                raise OSError(errno.ENOTCONN, "the filesystem has ended")
            self._waiting.append(waiter)
            if self._running:
                self._changed.notify()
            else:
                self._running = True
                threading.Thread(target=self._work, name="fuse-locks", daemon=True).start()
        return waiter.pending

    def released(self, node: Node) -> None:
        """Hear that a lock on this inode has been released: who waits for one tries again now."""
        if not self._waiting:
            return
        with self._changed:
            for waiter in self._waiting:
                if waiter.node is node:
                    waiter.due = 0.0
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running = False
                    return
                now = monotonic()
                first = min(waiter.due for waiter in self._waiting)
                if first > now:
                    self._changed.wait(first - now)
                    continue
                for waiter in [waiter for waiter in self._waiting if waiter.due <= now]:
                    # Under the lock, so that who gives up is never given the lock afterwards; a try never blocks.
                    if self._try(waiter):
                        self._waiting.remove(waiter)
                        waiter.attempt = _settled

    @staticmethod
    def _try(waiter: _Waiter) -> bool:
        try:
            if waiter.attempt():
                waiter.pending.complete(None)
                return True
        except OSError as error:
            waiter.pending.fail(error)
            return True
        waiter.delay = min(2 * waiter.delay, _LAST_TRY)
        waiter.due = monotonic() + waiter.delay
        return False

    def close(self) -> None:
        """Let everybody go: the mount has ended."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for waiter in waiting:
            waiter.attempt = _settled
            waiter.pending.fail(OSError(errno.ENOTCONN, "the filesystem has ended"))


class Locks(Base):
    """The operations on locks."""

    def __init__(self, source: int, config: Config) -> None:
        super().__init__(source, config)
        self._waiters = Waiters()
        self._owners: dict[tuple[Node, int], Fd] = {}  # (node, lock owner) -> the descriptor that has its locks
        self._pids: dict[tuple[Node, int], int] = {}  # (node, lock owner) -> the client's process, as it says
        self._owners_lock = threading.Lock()
        self.nodes.others.append(self._owners)

    def _owner(self, handle: Handle, owner: int) -> Fd:
        """Give the descriptor that holds an owner's POSIX locks on an inode."""
        key = handle.node, owner
        with self._owners_lock:
            if handle.ended:
                raise OSError(errno.EBADF, "the file was closed meanwhile", handle.node.name)
            fd = self._owners.get(key)
            if fd is None:
                # One for reading and writing where that is to be had: the owner may open the file again otherwise. That
                # a lock fits the access mode (EBADF) is checked by the client's kernel.
                try:
                    fd = self._reopen(handle.node, os.O_RDWR)
                except OSError:
                    fd = self._reopen(handle.node, handle.flags & os.O_ACCMODE)
                self._owners[key] = fd
            if handle.owners is None:
                handle.owners = set()
            handle.owners.add(owner)
            return fd

    def getlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Lock:
        handle = self.handles.get(fh)
        if lock.type not in _FLOCK:
            raise OSError(errno.EINVAL, "no such kind of lock", lock.type)
        fd = self._owner(handle, owner)
        kind, start, end, _ = files.ofd_getlk(fd.number, lock.type, lock.start, lock.end)
        if kind == fcntl.F_UNLCK:
            return Lock(lock.start, lock.end, kind, 0)
        return Lock(start, end, kind, self._holder(handle.node, owner, kind, start, end))

    def _holder(self, node: Node, asking: int, kind: int, start: int, end: int) -> int:
        """Give the client's process that holds a lock, 0 if it is none of this mount.

        The host names no process for the lock of an open file. But an owner's own descriptor does not meet its own
        locks: the one that sees something else there holds this one.
        """
        for (place, owner), fd in list(self._owners.items()):
            if place is node and owner != asking:
                found = files.ofd_getlk(fd.number, fcntl.F_WRLCK, start, end)
                if found[:3] != (kind, start, end):
                    return self._pids.get((node, owner), 0)
        return 0

    def setlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> None:
        if not self._attempt(self.handles.get(fh), owner, lock, lk_flags)():
            raise BlockingIOError(errno.EAGAIN, "somebody else holds a lock", nodeid)

    def setlkw(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Pending | None:
        handle = self.handles.get(fh)
        attempt = self._attempt(handle, owner, lock, lk_flags)
        if attempt():
            return None
        return self._waiters.wait(handle.node, attempt)

    def _attempt(self, handle: Handle, owner: int, lock: Lock, lk_flags: int) -> Callable[[], bool]:
        """Give a function that tries once; True if the lock was taken, or dropped."""
        node, kind = handle.node, lock.type
        if kind not in _FLOCK:
            raise OSError(errno.EINVAL, "no such kind of lock", kind)
        if lk_flags & abi.FUSE_LK_FLOCK:
            if not self.config.flock:
                raise OSError(errno.EOPNOTSUPP, "flock is not offered", node.name)
            opened = handle.fd

            def flock() -> bool:
                try:
                    fcntl.flock(opened.number, _FLOCK[kind] | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in _UNLOCKED:
                        return False
                    raise
                if kind != fcntl.F_WRLCK:
                    self._waiters.released(node)
                return True

            return flock
        if not self.config.posix_lock:
            raise OSError(errno.EOPNOTSUPP, "locks are not offered", node.name)
        fd = self._owner(handle, owner)
        if kind != fcntl.F_UNLCK:
            self._pids[node, owner] = lock.pid

        def record() -> bool:
            try:
                files.ofd_setlk(fd.number, kind, lock.start, lock.end)
            except OSError as error:
                if error.errno in _UNLOCKED:
                    return False
                raise
            if kind != fcntl.F_WRLCK:
                self._waiters.released(node)
            return True

        return record

    def _locks_end(self, handle: Handle, owner: int) -> None:
        """Drop an owner's POSIX locks on a file: close(2) of any of his descriptors of it does."""
        if handle.owners is not None:
            handle.owners.discard(owner)
        self._pids.pop((handle.node, owner), None)
        fd = self._owners.pop((handle.node, owner), None)
        if fd is not None:
            # Not by closing it alone: it may be in use for a moment longer.
            files.ofd_setlk(fd.number, fcntl.F_UNLCK, 0, files.OFFSET_MAX)
            self._waiters.released(handle.node)

    def _handle_end(self, handle: Handle, release_flags: int) -> None:
        """Drop the locks of an open file that ends: its descriptor may be in use for a moment longer.

        The owner of an OFD lock is the open file itself; the kernel says nothing of its end but RELEASE. POSIX locks
        that were taken by it are gone already: each process that closed it has sent FLUSH.
        """
        with self._owners_lock:
            handle.ended = True
        for owner in tuple(handle.owners or ()):
            self._locks_end(handle, owner)
        if release_flags & abi.FUSE_RELEASE_FLOCK_UNLOCK:
            fcntl.flock(handle.fd.number, fcntl.LOCK_UN)
        self._waiters.released(handle.node)

    def destroy(self) -> None:
        self._waiters.close()
        self._owners.clear()
        self._pids.clear()
        super().destroy()
