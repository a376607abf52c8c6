"""From a long table of descriptors to an array of struct iovec, without a Python object for each page.

Layer `transport`, beside ring.py, which is the only one to call this. Pure arithmetic over a copy of the table: the
whole of it is one long number, from which lengths' neighbours are masked out and to whose addresses the distance
between guest memory and its mapping is added. A loop over 256 pages (1 MiB) takes three times as long.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from fusewire.ops import Pages

if TYPE_CHECKING:
    from fusewire.transport.guest_memory import GuestMemory

FEWEST = 32
"""From so many entries on it pays."""
LONGEST = 1024
"""Of longer tables nothing is known here. Linux asks for 256 pages (1 MiB) and a few headers."""
_NEXT, _WRITE = 1, 2  # VIRTQ_DESC_F_*
# What flags and next are, as one number each, in tables whose entries are in order.
_READABLE_LINKS = Struct(f"<{LONGEST}I").pack(*range(1 << 16 | _NEXT, LONGEST + 1 << 16, 1 << 16))
_WRITABLE_LINKS = Struct(f"<{LONGEST}I").pack(*range(1 << 16 | _NEXT | _WRITE, LONGEST + 1 << 16, 1 << 16))
_MOST_BYTES = 0x7FFFF000  # MAX_RW_COUNT: what one call moves
_ENTRY = 128  # bits of a descriptor, and of a struct iovec
# le64 address and le32 length stay; le16 flags and le16 next go, which makes the length one of 64 bits.
_KEPT = (1 << 96) - 1


class Masks:
    """The constants for tables of some lengths: each takes as much memory as two tables."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}

    def of(self, count: int) -> tuple[int, int]:
        """Give a number that has `_KEPT` in each of `count` entries, and one that has 1 there."""
        found = self._known.get(count)
        if found is None:
            if len(self._known) >= 16:  # a guest chooses the lengths
                self._known.clear()
            ones = int.from_bytes((b"\1" + bytes(15)) * count, "little")
            found = self._known[count] = (ones * _KEPT, ones)
        return found


def in_order(table: memoryview) -> int:
    """Tell how many of a table's entries are readable, if each leads to the next and the writable ones come last.

    -1 for any other table, and for one of more than LONGEST entries.
    """
    count = len(table) >> 4
    if count > LONGEST:
        return -1
    links = table.cast("I")[3::4].tobytes()
    last, body = links[-4], 4 * (count - 1)
    readables = links[::4].find(_NEXT | _WRITE)
    if readables < 0:
        readables = count - 1 if last == _WRITE else count
    turn = min(4 * readables, body)
    if last != (_WRITE if readables < count else 0):
        return -1
    if links[:turn] != _READABLE_LINKS[:turn] or links[turn:body] != _WRITABLE_LINKS[turn:body]:
        return -1
    return readables


def gather(table: memoryview, memory: GuestMemory, masks: Masks) -> Pages | None:
    """Make the array of a table of descriptors that is not shared with the driver any more.

    None where it takes the general way: entries in several regions, or outside of all, or more bytes than one call
    moves. Every address in the array has been checked to lie in its region to the end.
    """
    count = len(table) >> 4
    if count > LONGEST:  # IOV_MAX
        return None
    addresses = table.cast("Q")[::2].tolist()
    lengths = table.cast("I")[2::4].tolist()
    lowest, end = min(addresses), max(addresses) + max(lengths)
    for region in memory.regions:
        base = region.guest_addr
        if base <= lowest and end <= base + region.size:
            break
    else:
        return None
    if not region.address:
        return None
    kept, ones = masks.of(count)
    number = int.from_bytes(table, "little") & kept
    distance = region.address - base
    # No entry's sum is below zero or beyond 64 bits, for both ends are addresses: nothing is carried between entries.
    number = number + distance * ones if distance >= 0 else number - -distance * ones
    pages = Pages(number.to_bytes(16 * count, "little"), region.view, base, addresses, lengths)
    return pages if pages.nbytes <= _MOST_BYTES else None
