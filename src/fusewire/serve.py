"""Runners: the only place that joins a session, a transport and a mount.

Layer `serve`. A `Server` serves one mount with worker threads. It decides nothing about processes: a server must not
live in a process that uses its own mount (an mmap of a file of it holds the GIL that the answer needs), so the command
line forks first and `Server` runs in the child.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from fusewire.session import Session
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
        only: frozenset[int] | None = None,
    ) -> None:
        """Take over `fd` (closed by `close`) and the filesystem (`destroy` is called once, at the end).

        With `only`, callers of other user ids get EACCES (`allow_root`, which the kernel does not know).
        """
        self.session = Session(operations, log=log, max_write=max_write)
        if only is not None:
            self.session.handle = guarded(self.session.handle, only)  # type: ignore[method-assign, assignment]
        self.channel = Channel(fd, self.session, clone_fd=clone_fd)
        self.threads = max(1, threads)
        self.started = time.monotonic()
        self.failure: BaseException | None = None
        self._trace: Callable[[Any, Any], None] | None = trace_to_stderr if debug else None
        self._workers: list[threading.Thread] = []
        self._left = 0
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self.on_end: Callable[[], None] | None = None
        self.session.on_ready = self._begin

    def start(self) -> None:
        """Start serving: one worker until INIT is answered, then all of them."""
        self._add_worker()

    def _add_worker(self) -> None:
        worker = threading.Thread(target=self._work, name=f"fuse-{len(self._workers)}", daemon=True)
        with self._lock:
            self._workers.append(worker)
            self._left += 1
        worker.start()

    def _begin(self) -> None:
        for _ in range(self.threads - 1):
            self._add_worker()
        self._ready.set()

    def _work(self) -> None:
        try:
            self.channel.serve(self._trace)
        except Exception as error:  # noqa: BLE001 - the thread's end: kept for `wait`, which raises it
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


def guarded(handle: Callable[[Any], Reply], only: frozenset[int]) -> Callable[[Any], Reply]:
    """Wrap a session's `handle` so that requests of user ids not in `only` are answered EACCES."""

    def handle_allowed(request: Any) -> Reply:
        if len(request) >= 40:
            _, opcode, unique, _, uid, _, _, _ = IN_HEADER.unpack_from(request)
            if uid not in only and opcode not in _UNGUARDED:
                return [OUT_HEADER.pack(16, -errno.EACCES, unique)]
        return handle(request)

    return handle_allowed


def trace_to_stderr(request: Any, reply: Any) -> None:
    """Print one line per request, as `-o debug` asks."""
    from fusewire.wire.table import TABLE

    length, opcode, unique, nodeid, uid, gid, pid, _ = IN_HEADER.unpack_from(request)
    name = next((op.name.upper() for op in TABLE if op.code == opcode), str(opcode))
    if reply is None:
        answer = "no reply"
    elif type(reply) is list:
        size, error, _ = OUT_HEADER.unpack_from(reply[0])
        answer = f"{size} bytes" if error == 0 else os.strerror(-error)
    else:
        answer = f"{reply.range.size} bytes of a file"
    print(
        f"{name} unique {unique} node {nodeid} uid {uid} gid {gid} pid {pid} ({length} bytes) -> {answer}",
        file=sys.stderr,
        flush=True,
    )
