"""The open file that an image is read from.

Layer `fs`.
"""

from __future__ import annotations

import os
from time import perf_counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Connection

# A read of the image that takes longer (seconds) did not come from the page cache.
_SLOW_READ = 0.001


class ImageFile:
    """The open file of an image. Owns `fd`; -1 once closed.

    While reads take long (a network filesystem, a disk that sleeps), each one is announced before it begins, so that
    another worker reads requests meanwhile.
    """

    __slots__ = ("_slow", "fd", "may_block")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.may_block: Callable[[bool], None] | None = None
        self._slow = False

    def begin(self, connection: Connection) -> None:
        """Hear that serving begins."""
        self.may_block = connection.may_block

    def statistics(self) -> dict[str, int]:
        """Give counters, if it has any."""
        return {}

    def pread(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes at `offset`, pread(2); fewer at the end of the file."""
        if self._slow and self.may_block is not None:
            self.may_block(True)
        before = perf_counter()
        try:
            data = os.pread(self.fd, length, offset)
        except OverflowError:
            return b""  # an offset that no file reaches: the reader sees the end of the image
        self._slow = perf_counter() - before > _SLOW_READ
        return data

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
