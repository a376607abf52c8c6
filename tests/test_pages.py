"""Long tables of descriptors as arrays of struct iovec, and preadv(2) and pwritev(2) by them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.linux import vectors
from fusewire.ops import Pages
from fusewire.transport.guest_memory import GuestMemory, Region
from fusewire.transport.pages import FEWEST, LONGEST, Masks, gather, in_order

PAGE = 4096
SIZE = 64 * PAGE
NEXT, WRITE = 1, 2


def mapped(guest_addr: int, user_addr: int = 0) -> Region:
    room = mmap.mmap(-1, SIZE)
    view = memoryview(room)
    return Region(guest_addr, SIZE, user_addr, view, ctypes.addressof(ctypes.c_char.from_buffer(view)))


def table(entries: list[tuple[int, int]], flags: int = 0xABCD, following: int = 0xFFFF) -> memoryview:
    return memoryview(b"".join(struct.pack("<QIHH", address, size, flags, following) for address, size in entries))


def decoded(pages: Pages) -> list[tuple[int, int]]:
    return list(struct.iter_unpack("<QQ", pages.iovec))


@pytest.mark.parametrize("guest_addr", [0, 1 << 32, 1 << 62, (1 << 64) - SIZE], ids=hex)
def test_every_entry_is_where_its_descriptor_says(guest_addr: int) -> None:
    region = mapped(guest_addr)
    entries = [(guest_addr + (i * 7 % 64) * PAGE, PAGE) for i in range(FEWEST)]
    pages = gather(table(entries), GuestMemory([region]), Masks())
    assert pages is not None
    assert decoded(pages) == [(address - guest_addr + region.address, size) for address, size in entries]
    assert (pages.count, pages.nbytes) == (FEWEST, FEWEST * PAGE)
    for view, (address, _) in zip(pages.views(), entries, strict=True):
        view[:8] = struct.pack("<Q", address)
        assert region.view[address - guest_addr : address - guest_addr + 8] == struct.pack("<Q", address)


_PLACES = st.integers(-2, SIZE + 2) | st.integers(0, (1 << 64) - 1)
_SIZES = st.integers(0, 3 * PAGE) | st.integers(0, (1 << 32) - 1)


@given(st.lists(st.tuples(_PLACES, _SIZES), min_size=1, max_size=80), st.integers(0, (1 << 48) - SIZE))
def test_no_entry_ever_leads_out_of_memory(places: list[tuple[int, int]], guest_addr: int) -> None:
    region = mapped(guest_addr)
    entries = [((guest_addr + place) % (1 << 64), size) for place, size in places]
    inside = all(guest_addr <= at and at + size <= guest_addr + SIZE for at, size in entries)
    pages = gather(table(entries), GuestMemory([region]), Masks())
    if pages is None:
        # It may give up on good tables (the last address and the longest entry need not be one), not on short ones.
        assert not inside or max(at for at, _ in entries) + max(size for _, size in entries) > guest_addr + SIZE
        return
    assert inside
    assert decoded(pages) == [(at - guest_addr + region.address, size) for at, size in entries]
    assert sum(map(len, pages.views())) == pages.nbytes == sum(size for _, size in entries)


def test_entries_in_two_regions_go_the_general_way() -> None:
    memory = GuestMemory([mapped(0), mapped(SIZE, 1 << 40)])
    entries = [(i * PAGE, PAGE) for i in range(60, 60 + FEWEST)]
    assert gather(table(entries), memory, Masks()) is None
    assert gather(table([(SIZE + i * PAGE, PAGE) for i in range(FEWEST)]), memory, Masks()) is not None


def test_more_than_one_call_moves_goes_the_general_way() -> None:
    region = mapped(0)._replace(size=SIZE)
    entries = [(0, SIZE)] * LONGEST
    pages = gather(table(entries), GuestMemory([region]), Masks())
    assert pages is not None and pages.nbytes == LONGEST * SIZE
    assert gather(table([*entries, (0, 1)]), GuestMemory([region]), Masks()) is None


def test_masks_of_many_lengths_take_no_memory_for_ever() -> None:
    masks = Masks()
    for count in range(FEWEST, LONGEST):
        kept, ones = masks.of(count)
        assert ones.bit_length() == 128 * (count - 1) + 1
        assert kept == ones * ((1 << 96) - 1)
    assert len(masks._known) <= 16


@given(st.integers(0, 40), st.integers(0, 40))
def test_order_is_known_for_what_it_is(readable: int, writable: int) -> None:
    count = readable + writable
    if not count:
        return
    entries = []
    for i in range(count):
        flags = (NEXT if i < count - 1 else 0) | (WRITE if i >= readable else 0)
        entries.append(struct.pack("<QIHH", 0, 1, flags, i + 1 if i < count - 1 else 0))
    good = b"".join(entries)
    assert in_order(memoryview(good)) == readable
    for spot in range(count):
        for change in (NEXT, WRITE, 4, 0x8000):
            if spot == count - 1 and change == 0x8000:
                continue  # a flag that nobody knows, where no next entry is read from the same word
            bad = bytearray(good)
            bad[16 * spot + 12] ^= change & 0xFF
            bad[16 * spot + 13] ^= change >> 8
            moved = change == WRITE and spot in (readable - 1, readable)  # it is the other kind then, in order still
            assert in_order(memoryview(bytes(bad))) == (-1 if not moved else readable + (1 if spot == readable else -1))


def test_data_go_between_a_file_and_the_pages(tmp_path: Path) -> None:
    region = mapped(1 << 32)
    order = [i * 37 % 64 for i in range(64)]
    pages = gather(table([((1 << 32) + i * PAGE, PAGE) for i in order]), GuestMemory([region]), Masks())
    assert pages is not None
    data = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(b"head" + data)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    try:
        assert vectors.preadv(fd, pages.iovec, pages.count, 4) == SIZE
        assert all(
            region.view[i * PAGE : (i + 1) * PAGE] == data[n * PAGE : (n + 1) * PAGE] for n, i in enumerate(order)
        )
        assert vectors.preadv(fd, pages.iovec, pages.count, SIZE) == 4
        assert vectors.pwritev(fd, pages.iovec, pages.count, 1 << 33) == SIZE
        assert os.pread(fd, 8, 1 << 33) == bytes(region.view[order[0] * PAGE :][:8])
        os.truncate(fd, 10)
        assert vectors.pwritev(fd, pages.iovec, pages.count, 0, 0x10) == SIZE  # RWF_APPEND
        assert os.fstat(fd).st_size == 10 + SIZE
        for call in (vectors.preadv, vectors.pwritev):
            for offset in (-1, 1 << 63, (1 << 64) - 1):
                with pytest.raises(OSError, match="no file has such an offset") as caught:
                    call(fd, pages.iovec, pages.count, offset)
                assert caught.value.errno == errno.EINVAL
            with pytest.raises(OSError, match=call.__name__) as caught:
                call(-1, pages.iovec, pages.count, 0)
            assert caught.value.errno == errno.EBADF
    finally:
        os.close(fd)
