"""Runners: the only place that joins a session, a transport and a mount.

Layer `serve`. A `Server` serves one mount with worker threads. It decides nothing about processes: a server must not
live in a process that uses its own mount (an mmap of a file of it holds the GIL that the answer needs), so the command
line forks first and `Server` runs in the child.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from fusewire.session import Session
from fusewire.transport.devfuse import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Operations
    from fusewire.session import Log

DEFAULT_THREADS = 4


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
    ) -> None:
        """Take over `fd` (closed by `close`) and the filesystem (`destroy` is called once, at the end)."""
        self.session = Session(operations, log=log, max_write=max_write)
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

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the connection has ended; give False when time ran out. Raises what ended it, if not an unmount."""
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


def trace_to_stderr(request: Any, reply: Any) -> None:
    """Print one line per request, as `-o debug` asks."""
    from fusewire.wire.codec import IN_HEADER, OUT_HEADER
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
