"""From a long table of descriptors to an array of struct iovec, without a Python object for each page.

Layer `transport`, beside ring.py, which is the only one to call this. Pure: it works on a copy of the table, byte by
byte of all entries at once (extended slices of bytes), where a loop over 256 pages (1 MiB) takes twenty times as long.
The array leads into a `Window` of all the guest's memory (linux/window.py), which an address can leave for nowhere
else: so none is looked at but for being small enough.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from fusewire.ops import Pages
from fusewire.transport.guest_memory import BadAddress

if TYPE_CHECKING:
    from fusewire.transport.guest_memory import GuestMemory

FEWEST = 16
"""From so many entries on it pays."""
LONGEST = 1024
"""Of longer tables nothing is known here (IOV_MAX). Linux asks for 256 pages (1 MiB) and a few headers."""
_NEXT, _WRITE = b"\1", b"\2"  # VIRTQ_DESC_F_*, the lower byte of flags
_BOTH = b"\3"
_ZEROS = bytes(LONGEST)
# The field `next` of entries that are in order: its lower and its upper byte.
_NEXT_LOW = bytes(number & 0xFF for number in range(1, LONGEST + 1))
_NEXT_HIGH = bytes(number >> 8 for number in range(1, LONGEST + 1))
_MOST_BYTES = 0x7FFFF000  # MAX_RW_COUNT: what one call moves
_PLACES = Struct("<QI4x").iter_unpack


def in_order(table: bytes) -> int:
    """Tell how many of a table's entries are readable, if each leads to the next and the writable ones come last.

    -1 for any other table, and for one of more than LONGEST entries.
    """
    count = len(table) >> 4
    if count > LONGEST:
        return -1
    flags = table[12::16]
    readables = flags.find(_BOTH)
    if readables < 0:
        readables = count - 1 if flags.endswith(_WRITE) else count
    # But for the last one, which leads nowhere.
    body = count - 1
    if readables < count:
        wanted = _NEXT * readables + _BOTH * (body - readables) + _WRITE
    else:
        wanted = _NEXT * body + b"\0"
    if (
        flags != wanted
        or table[13:-16:16] != _ZEROS[:body]
        or table[14:-16:16] != _NEXT_LOW[:body]
        or table[15:-16:16] != _NEXT_HIGH[:body]
    ):
        return -1
    return readables


def gather(table: bytes, memory: GuestMemory) -> Pages | None:
    """Make the array of a table of descriptors that is not shared with the driver any more.

    None where it takes the general way: memory that is in no window, addresses beyond it, or more bytes than one call
    moves. The pieces themselves may be no memory, as `Pages` has it.
    """
    window = memory.window
    count = len(table) >> 4
    zeros = _ZEROS[:count]
    # le64 address: one of 1 TiB has 40 bits.
    if window is None or table[5::16] != zeros or table[6::16] != zeros or table[7::16] != zeros:
        return None
    total = 0
    for place in range(4):  # le32 length
        digits = table[8 + place :: 16]
        if digits != zeros:
            # All are equal, as a rule: to be sure of that takes a tenth of the time.
            total += (digits[0] * count if digits == digits[:1] * count else sum(digits)) << 8 * place
    if total > _MOST_BYTES:
        return None
    array = bytearray(table)
    array[5::16] = (window.base >> 40).to_bytes(1, "little") * count
    for place in range(12, 16):  # le16 flags and le16 next, where the length of an iovec goes on
        array[place::16] = zeros

    def views() -> list[memoryview]:
        pieces: list[memoryview] = []
        base, limit, view = 0, -1, memoryview(b"")
        for address, length in _PLACES(table):
            start = address - base
            if not 0 <= start <= start + length <= limit:
                try:
                    base, limit, _, view, _ = memory.find(address)
                    start = address - base
                    if start + length > limit:
                        pieces += memory.slices(address, length)
                        continue
                except BadAddress:
                    continue
            if length:
                pieces.append(view[start : start + length])
        return pieces

    return Pages(bytes(array), count, total, views)
