"""A line on the terminal that says how far something long has come, and is gone when it is done.

Layer: cli. It goes to standard error, and only where that is a terminal: in a pipe, a log or a batch job nothing is
ever printed. Nothing is printed either for what is done within half a second.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_FIRST = 0.5  # seconds before the first word
_EVERY = 0.1
_BAR = 24


class Progress:
    """Call it with (done, total), in bytes; `close`, or leaving the block, clears the line."""

    __slots__ = ("_fd", "_label", "_next", "_on", "_shown")

    def __init__(self, label: str, fd: int = 2) -> None:
        """Speak of `label` on the terminal `fd`."""
        self._label = label
        self._fd = fd
        self._on = os.isatty(fd)
        self._next = time.monotonic() + _FIRST
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """Say how far it has come, now and then."""
        if not self._on:
            return
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        part = min(1.0, done / total) if total > 0 else 0.0
        filled = int(part * _BAR)
        text = f" [{'#' * filled}{'.' * (_BAR - filled)}] {int(part * 100):3} %"
        try:
            width = os.get_terminal_size(self._fd).columns or 80  # a serial line knows none
        except OSError:
            width = 80
        room = max(0, width - len(text) - 1)
        label = self._label if len(self._label) <= room else "..." + self._label[len(self._label) - room + 3 :]
        self._write(f"\r{label[:room]}{text}"[: max(1, width)])

    def _write(self, text: str) -> None:
        try:
            os.write(self._fd, text.encode(errors="replace"))
        except OSError:
            self._on = False  # the terminal is gone: nobody to tell
        self._shown = True

    def close(self) -> None:
        """Clear the line."""
        if self._on and self._shown:
            self._write("\r\x1b[K")
        self._on = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
