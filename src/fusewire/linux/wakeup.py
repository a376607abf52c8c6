"""Waking who sleeps in poll(2) when a signal comes whose handler is a Python function.

The interpreter runs such handlers between bytecodes of the main thread. A signal that comes right before that thread
goes to sleep, or in another thread, is only noted: its handler runs when the main thread wakes up, which may be never.
So the interpreter is told to write to a pipe, too (signal.set_wakeup_fd), and that is polled with the rest.
"""

from __future__ import annotations

import os
import select
import signal
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self


class Wakeup:
    """Readable as soon as a signal has come or `notify` was called, until `drain`. In `with`, it hears of signals.

    Only in the main thread, and where the program has no such descriptor of its own; elsewhere only `notify` counts.
    """

    _reader = _writer = -1

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ours = False

    def __del__(self) -> None:
        """Close it, when nobody is left who could call `notify`."""
        for fd in (self._reader, self._writer):
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._ours = before < 0
            if not self._ours:
                signal.set_wakeup_fd(before)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ours:
            self._ours = False
            signal.set_wakeup_fd(-1)

    def fileno(self) -> int:
        return self._reader

    def notify(self) -> None:
        """Make it readable; from any thread or handler."""
        try:
            os.write(self._writer, b"\0")
        except BlockingIOError:
            return  # it is full, so it is readable

    def drain(self) -> None:
        """Make it not readable. Handlers of the signals that had come have run when this returns."""
        try:
            while os.read(self._reader, 4096):
                continue
        except BlockingIOError:
            return

    def wait(self) -> None:
        """Sleep until it is readable, and drain it."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        poll.poll()
        self.drain()
