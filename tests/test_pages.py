"""Long tables of descriptors as arrays of struct iovec, and preadv(2) and pwritev(2) by them."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.linux import vectors
from fusewire.linux.window import SPAN, Window
from fusewire.ops import Pages
from fusewire.transport.guest_memory import GuestMemory, Region
from fusewire.transport.pages import FEWEST, LONGEST, gather, in_order

PAGE = 4096
SIZE = 64 * PAGE
NEXT, WRITE = 1, 2
MOST = 0x7FFFF000


def mapped(guest_addr: int, user_addr: int = 0) -> Region:
    room = mmap.mmap(-1, SIZE)
    view = memoryview(room)
    return Region(guest_addr, SIZE, user_addr, view, ctypes.addressof(ctypes.c_char.from_buffer(view)))


def seen(*regions: Region) -> GuestMemory:
    """Memory, and a window of it."""
    return GuestMemory(regions, Window((region.guest_addr, region.address, region.size) for region in regions))


def table(entries: list[tuple[int, int]], flags: int = 0xABCD, following: int = 0xFFFF) -> bytes:
    return b"".join(struct.pack("<QIHH", address, size, flags, following) for address, size in entries)


def decoded(pages: Pages) -> list[tuple[int, int]]:
    return list(struct.iter_unpack("<QQ", pages.iovec))


@pytest.mark.parametrize("guest_addr", [0, PAGE, 1 << 32, SPAN - SIZE], ids=hex)
def test_every_entry_is_where_its_descriptor_says(guest_addr: int) -> None:
    memory = seen(mapped(guest_addr))
    (region,) = memory.regions
    entries = [(guest_addr + (i * 7 % 64) * PAGE, PAGE) for i in range(FEWEST)]
    pages = gather(table(entries), memory)
    assert pages is not None and memory.window is not None
    assert decoded(pages) == [(address + memory.window.base, size) for address, size in entries]
    assert (pages.count, pages.nbytes) == (FEWEST, FEWEST * PAGE)
    for view, (address, _) in zip(pages.views(), entries, strict=True):
        view[:8] = struct.pack("<Q", address)
        assert region.view[address - guest_addr : address - guest_addr + 8] == struct.pack("<Q", address)
    for (there, _), (address, _) in zip(decoded(pages), entries, strict=True):
        assert ctypes.string_at(there, 8) == struct.pack("<Q", address)  # the same pages once more


_PLACES = st.integers(0, 4 * SIZE) | st.integers(0, (1 << 64) - 1) | st.integers(0, SPAN + 2)
_SIZES = st.integers(0, 3 * PAGE) | st.integers(0, (1 << 32) - 1)


@given(st.lists(st.tuples(_PLACES, _SIZES), min_size=1, max_size=80))
def test_an_entry_leads_into_memory_or_nowhere(entries: list[tuple[int, int]]) -> None:
    memory = seen(mapped(SIZE), mapped(3 * SIZE, 1 << 40))
    pages = gather(table(entries), memory)
    assert memory.window is not None
    if pages is None:
        assert any(at >= SPAN for at, _ in entries) or sum(size for _, size in entries) > MOST
        return
    begin, end = memory.window.base, memory.window.base + SPAN + (1 << 32)
    for (there, length), (at, size) in zip(decoded(pages), entries, strict=True):
        assert (there - begin, length) == (at, size)
        assert begin <= there <= there + length < end
    assert pages.nbytes == sum(size for _, size in entries)
    whole = [(at, size) for at, size in entries if size and memory_holds(at, size)]
    assert sum(map(len, pages.views())) == sum(size for _, size in whole)


def memory_holds(at: int, size: int) -> bool:
    return any(start <= at and at + size <= start + SIZE for start in (SIZE, 3 * SIZE))


def test_nothing_but_memory_is_in_a_window() -> None:
    memory = seen(mapped(SIZE), mapped(3 * SIZE, 1 << 40))
    assert memory.window is not None
    base = memory.window.base
    assert base and base % SPAN == 0
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin < base + SPAN + (1 << 32) and end > base:
            # Neighbours with no access either are shown as one with it.
            found.append((max(begin, base) - base, min(end - base, SPAN + (1 << 32)), line.split()[1]))
    there = [piece for piece in found if piece[2] != "---p"]
    assert [(begin, end) for begin, end, _ in there] == [(SIZE, 2 * SIZE), (3 * SIZE, 4 * SIZE)]
    assert found[0][0] == 0 and found[-1][1] == SPAN + (1 << 32)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(found))
    del memory
    gc.collect()
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{base:x}-")]


def test_what_is_no_memory_is_a_fault_of_the_call_and_of_nothing_else(tmp_path: Path) -> None:
    memory = seen(mapped(SIZE))
    (tmp_path / "file").write_bytes(os.urandom(8 * PAGE))
    fd = os.open(tmp_path / "file", os.O_RDWR)
    try:
        for hole in (0, SIZE - PAGE, 2 * SIZE, SPAN - 1):
            pages = gather(table([(SIZE, PAGE), (SIZE + PAGE, PAGE), (hole, 2 * PAGE), (SIZE, PAGE)]), memory)
            assert pages is not None
            # What lies before it is moved; how much of a page that is there in part, is the kernel's.
            assert 2 * PAGE <= vectors.preadv(fd, pages.iovec, pages.count, 0) <= 3 * PAGE
            assert 2 * PAGE <= vectors.pwritev(fd, pages.iovec, pages.count, 0) <= 3 * PAGE
            pages = gather(table([(hole & -PAGE, PAGE if hole != SIZE - PAGE else 8)]), memory)
            assert pages is not None
            for call in (vectors.preadv, vectors.pwritev):
                with pytest.raises(OSError, match=call.__name__) as caught:
                    call(fd, pages.iovec, pages.count, 0)
                assert caught.value.errno == errno.EFAULT
    finally:
        os.close(fd)


def test_memory_without_a_window_goes_the_general_way() -> None:
    region = mapped(0)
    assert gather(table([(i * PAGE, PAGE) for i in range(FEWEST)]), GuestMemory([region])) is None


def test_more_than_one_call_moves_goes_the_general_way() -> None:
    memory = seen(mapped(0))
    pages = gather(table([(0, SIZE)] * LONGEST), memory)
    assert pages is not None and pages.nbytes == LONGEST * SIZE
    most = [(0, MOST // 512)] * 512
    assert gather(table(most), memory) is not None
    assert gather(table([*most, (0, MOST - 512 * (MOST // 512) + 1)]), memory) is None


def test_a_window_that_cannot_be_had_says_why() -> None:
    region = mapped(0)
    for place in (100, SPAN - PAGE, SPAN):
        with pytest.raises(OSError, match="not whole pages below 1 TiB"):
            Window([(place, region.address, SIZE)])
    private = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with pytest.raises(OSError, match="mremap"):
        Window([(0, ctypes.addressof(ctypes.c_char.from_buffer(private)), SIZE)])
    script = (
        "import resource\nfrom fusewire.linux.window import Window\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try:\n    Window(())\nexcept OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "mmap: Cannot allocate memory" in done.stdout


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
    assert in_order(good) == readable
    for spot in range(count):
        for change in (NEXT, WRITE, 4, 0x8000):
            if spot == count - 1 and change == 0x8000:
                continue  # a flag that nobody knows, where no next entry is read from the same word
            bad = bytearray(good)
            bad[16 * spot + 12] ^= change & 0xFF
            bad[16 * spot + 13] ^= change >> 8
            moved = change == WRITE and spot in (readable - 1, readable)  # it is the other kind then, in order still
            assert in_order(bytes(bad)) == (-1 if not moved else readable + (1 if spot == readable else -1))


def test_data_go_between_a_file_and_the_pages(tmp_path: Path) -> None:
    region = mapped(1 << 32)
    order = [i * 37 % 64 for i in range(64)]
    pages = gather(table([((1 << 32) + i * PAGE, PAGE) for i in order]), seen(region))
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
