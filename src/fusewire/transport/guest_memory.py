"""A guest's memory: from its addresses, and the front end's, to memoryviews of the mappings.

Layer `transport`, below ring.py. It maps and unmaps nothing: whoever does keeps a mapping for as long as views of it
are in use.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class BadAddress(ValueError):  # noqa: N818 - it is an answer, not a fault of ours
    """An address, or a part of what begins there, that is no memory of the guest's."""


class Region(NamedTuple):
    """A piece of guest memory: guest-physical address, size in bytes, the front end's address, the mapping.

    `address` is where the mapping begins in this process; 0 if nobody needs it.
    """

    guest_addr: int
    size: int
    user_addr: int
    view: memoryview
    address: int = 0


class Window(Protocol):
    """Where guest-physical address `a` is at `base + a`, and what is not memory is nothing: linux/window.py."""

    base: int


class GuestMemory:
    """All of a guest's memory. Never changed once made: new memory is a new object."""

    __slots__ = ("_by_user", "_starts", "_user_starts", "regions", "window")

    def __init__(self, regions: Iterable[Region], window: Window | None = None) -> None:
        """Take regions in any order, and a window of all of them if there is one.

        Raises ValueError for sizes of zero, wrap-around, and overlap.
        """
        self.window = window
        self.regions = tuple(sorted(regions, key=lambda region: region.guest_addr))
        for region in self.regions:
            where = f"the memory region at {region.guest_addr:#x}"
            if region.size <= 0:
                raise ValueError(f"{where} has {region.size} bytes")
            if len(region.view) != region.size or region.view.format != "B" or region.view.readonly:
                raise ValueError(f"{where} has a mapping that is no {region.size} writable bytes")
            for address in (region.guest_addr, region.user_addr):
                if address < 0 or address + region.size > 1 << 64:
                    raise ValueError(f"{where} of {region.size} bytes does not end within 64 bits of address")
        self._by_user = sorted(self.regions, key=lambda region: region.user_addr)
        for one, other in zip(self.regions, self.regions[1:], strict=False):
            if one.guest_addr + one.size > other.guest_addr:
                raise ValueError(f"the memory regions at {one.guest_addr:#x} and {other.guest_addr:#x} overlap")
        for one, other in zip(self._by_user, self._by_user[1:], strict=False):
            if one.user_addr + one.size > other.user_addr:
                raise ValueError(
                    f"the memory regions at {one.guest_addr:#x} and {other.guest_addr:#x} overlap in the front end"
                )
        self._starts = [region.guest_addr for region in self.regions]
        self._user_starts = [region.user_addr for region in self._by_user]

    def find(self, address: int) -> Region:
        """Give the region that holds the byte at a guest-physical address. Raises BadAddress."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            region = self.regions[index]
            if address < region.guest_addr + region.size:
                return region
        raise BadAddress(f"{address:#x} is not in memory")

    def slices(self, address: int, length: int) -> list[memoryview]:
        """Give `length` bytes at a guest-physical address, in as many pieces as they lie in adjacent regions.

        Raises BadAddress if a single byte is not memory. Nothing is at every address: no pieces.
        """
        pieces = []
        while length > 0:
            base, size, _, view, _ = self.find(address)
            start = address - base
            part = min(length, size - start)
            pieces.append(view[start : start + part])
            address += part
            length -= part
        return pieces

    def at_user(self, address: int, length: int) -> memoryview:
        """Give `length` bytes at an address of the front end's, all of one region. Raises BadAddress."""
        index = bisect_right(self._user_starts, address) - 1
        if index >= 0:
            region = self._by_user[index]
            start = address - region.user_addr
            if 0 <= length <= region.size - start:
                return region.view[start : start + length]
        raise BadAddress(f"{length} bytes at {address:#x} are not in one region of memory")


class Log(Protocol):
    """The dirty log of a migration (VHOST_F_LOG_ALL): the front end copies again what was written to."""

    def mark(self, guest_addr: int, length: int) -> None:
        """Note that `length` bytes of guest-physical memory were written to."""
