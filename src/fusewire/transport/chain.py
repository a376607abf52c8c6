"""One request as it lies in guest memory.

Layer `transport`, below ring.py, which makes it, and exchange.py, which serves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusewire.ops import Pages


class Chain:
    """One request: what the driver wrote, where the device may write, in order and without empty pieces.

    `bad` is empty, or says why the chain cannot be used: then there is nothing in it, and it is to be pushed with
    length 0. A request may be cut anywhere, and pieces may overlap: that is the driver's business.

    Where there are very many pieces, the last ones are in `pages`: they continue `writable`, or `readable` if
    `pages_in` says so.
    """

    __slots__ = ("bad", "head", "pages", "pages_in", "readable", "writable")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        bad: str = "",
        pages: Pages | None = None,
        pages_in: bool = False,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.bad = bad
        self.pages = pages
        self.pages_in = pages_in
