"""Runners: the only place that joins a session, a transport and a mount.

Layer `serve`. A `Server` serves one mount with worker threads. It decides nothing about processes: a server must not
live in a process that uses its own mount (an mmap of a file of it holds the GIL that the answer needs), so the command
line forks first and `Server` runs in the child.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from fusewire.session import Session
from fusewire.trace import trace_to_stderr
from fusewire.transport.devfuse import Channel
from fusewire.wire import abi
from fusewire.wire.codec import IN_HEADER, OUT_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.adapters import Reply
    from fusewire.ops import Operations
    from fusewire.session import Log

# More workers than processors only fight for the interpreter lock; fewer than two would let one slow read hold up all.
DEFAULT_THREADS = min(8, max(2, os.cpu_count() or 1))


class Server:
    """Serves one filesystem on one /dev/fuse descriptor with `threads` workers."""

    def __init__(
        self,
        operations: Operations,
        fd: int,
        *,
        threads: int = DEFAULT_THREADS,
        clone_fd: bool = False,
        debug: bool = False,
        log: Log | None = None,
        max_write: int = 1 << 20,
        owner: tuple[int, int] | None = None,
        devices: list[int] | None = None,
    ) -> None:
        """Take over `fd` (closed by `close`) and the filesystem (`destroy` is called once, at the end).

        devices: descriptors of /dev/fuse that nothing is mounted with, taken over too: `clone_fd` makes its clones of
        these then, and opens none. With `owner` (uid and gid in the mount's user namespace) only that user and root get
        in: see `guarded`.
        """
        self.session = Session(operations, log=log, max_write=max_write)
        if owner is not None:
            self.session.handle = guarded(self.session.handle, *owner)  # type: ignore[method-assign, assignment]
        self.channel = Channel(fd, self.session, clone_fd=clone_fd, devices=devices)
        self.threads = max(1, threads)
        self.started = time.monotonic()
        self.failure: BaseException | None = None
        self._trace: Callable[[Any, Any], None] | None = trace_to_stderr if debug else None
        self.workers: list[threading.Thread] = []
        self._left = 0
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self.on_end: Callable[[], None] | None = None
        self.session.on_ready = self._add_workers

    def start(self) -> None:
        """Start serving: one worker until INIT is answered, then all of them, or as many as the system allows.

        Raises OSError(EAGAIN) if it does not allow a single one.
        """
        self.add_worker()

    def begin(self) -> None:
        """Start serving, and wait until INIT has been answered. Raises OSError if the connection has ended before."""
        self.start()
        if not self.wait_ready():
            self.wait()
            raise OSError(errno.EIO, self.session.refused or "the mount ended before it was ready")

    def add_worker(self) -> None:
        """Start one more thread that serves, kept in `workers`. Raises OSError(EAGAIN) if the system allows none."""
        worker = threading.Thread(target=self._work, name=f"fuse-{len(self.workers)}", daemon=True)
        with self._lock:
            self.workers.append(worker)
            self._left += 1
        try:
            worker.start()
        except RuntimeError as error:
            with self._lock:
                self.workers.remove(worker)
                self._left -= 1
            raise OSError(
                errno.EAGAIN, f"{error}: the limit of processes (`ulimit -u`) or of memory (`ulimit -v`) is reached"
            ) from error

    def _add_workers(self) -> None:
        try:
            for _ in range(self.threads - 1):
                self.add_worker()
        except OSError as error:
            self.session.log_once(f"fewer workers than asked for: {error.strerror}")
        self._ready.set()

    def _work(self) -> None:
        try:
            self.channel.serve(self._trace)
        except BaseException as error:  # noqa: BLE001 - the thread's end: kept for `wait`, which raises it
            self.failure = self.failure or error
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.session.close()
            self._ready.set()
            self._ended.set()
            if self.on_end is not None:
                self.on_end()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until INIT has been answered; give False if the connection ended before, or time ran out."""
        self._ready.wait(timeout)
        return self.session.ready

    def wait_end(self, timeout: float | None = None) -> bool:
        """Wait until the connection has ended, whatever ended it; give False when time ran out."""
        return self._ended.wait(timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as `wait_end`; raises what ended the connection, if that was not an unmount."""
        if not self._ended.wait(timeout):
            return False
        if self.failure is not None:
            raise self.failure
        return True

    @property
    def requests(self) -> int:
        """How many requests have been served."""
        return self.channel.requests

    def close(self) -> None:
        """End the connection from our side: callers that wait get ENOTCONN. Unmount first where that is possible."""
        self.channel.close()


# Requests that the kernel makes on nobody's behalf, or that only end what somebody was allowed to begin.
_UNGUARDED = frozenset(
    {abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INIT, abi.FUSE_DESTROY, abi.FUSE_READ, abi.FUSE_WRITE}
    | {abi.FUSE_RELEASE, abi.FUSE_RELEASEDIR, abi.FUSE_FLUSH, abi.FUSE_INTERRUPT, abi.FUSE_NOTIFY_REPLY}
)


# Where mode, uid and gid are in a reply to GETATTR: fuse_out_header, fuse_attr_out up to attr, fuse_attr.
_ATTR_MODE = 16 + 16 + 60
_ATTR_OWNER = 16 + 16 + 68


def guarded(handle: Callable[[Any], Reply], uid: int, gid: int) -> Callable[[Any], Reply]:
    """Wrap a session's `handle` so that only a user and root get in: allow_root, which the kernel does not know.

    Others' requests are answered EACCES; but what the kernel has cached it gives without asking us. So the root
    directory is shown as the user's, mode 0700, and the kernel itself lets nobody else pass: the mount must have
    default_permissions. (An asynchronous getattr of the root directory is not covered.)
    """

    def handle_allowed(request: Any) -> Reply:
        if len(request) < 40:
            return handle(request)
        _, opcode, unique, nodeid, caller, _, _, _ = IN_HEADER.unpack_from(request)
        if caller not in (0, uid) and opcode not in _UNGUARDED:
            return [OUT_HEADER.pack(16, -errno.EACCES, unique)]
        if nodeid != abi.FUSE_ROOT_ID or opcode not in (abi.FUSE_GETATTR, abi.FUSE_STATX):
            return handle(request)
        if opcode == abi.FUSE_STATX:
            return [OUT_HEADER.pack(16, -errno.ENOSYS, unique)]  # the kernel asks by GETATTR then
        reply = handle(request)
        if type(reply) is not list:
            return reply
        data = bytearray().join(reply)
        if len(data) > _ATTR_OWNER + 8:
            struct.pack_into("=I", data, _ATTR_MODE, stat.S_IFDIR | stat.S_IRWXU)
            struct.pack_into("=II", data, _ATTR_OWNER, uid, gid)
        return [data]

    return handle_allowed
