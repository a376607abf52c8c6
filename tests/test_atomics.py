"""The dirty log: bits set by a futex operation, seen from another process, none lost."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading

import pytest

from fusewire.linux.atomics import DirtyLog

PAGE = 4096


def pages(view: memoryview) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(view) if byte for bit in range(8) if byte >> bit & 1}


def mark_each_fourth(log: DirtyLog, first: int) -> None:
    for page in range(first, 16384, 4):
        log.mark(page * PAGE, 1)


@pytest.fixture
def view() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))


@pytest.mark.parametrize(
    ("address", "length", "expected"),
    [
        (0, 1, {0}),
        (0, 0, set()),
        (PAGE - 1, 1, {0}),
        (PAGE - 1, 2, {0, 1}),
        (5 * PAGE, PAGE, {5}),
        (5 * PAGE + 1, PAGE, {5, 6}),
        (30 * PAGE, 4 * PAGE, {30, 31, 32, 33}),
        (31 * PAGE, 1, {31}),
        (32767 * PAGE, 9 * PAGE, {32767}),
        (32768 * PAGE, 1, set()),
        (1 << 63, 1 << 32, set()),
    ],
)
def test_the_pages_that_were_written_to_are_marked(
    view: memoryview, address: int, length: int, expected: set[int]
) -> None:
    DirtyLog(view).mark(address, length)
    assert pages(view) == expected


def test_bits_that_are_there_stay(view: memoryview) -> None:
    log = DirtyLog(view)
    for page in range(200):
        log.mark(page * 3 * PAGE, 1)
    assert pages(view) == set(range(0, 600, 3))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_a_log_of_an_odd_length_ends_where_it_ends(view: memoryview, length: int) -> None:
    DirtyLog(view[:length]).mark(0, 1 << 40)
    assert pages(view) == set(range(8 * length))


def test_a_log_at_an_odd_address_is_refused(view: memoryview) -> None:
    with pytest.raises(ValueError, match="aligned"):
        DirtyLog(view[1:])


def test_threads_and_processes_that_mark_the_same_words_lose_nothing() -> None:
    fd = os.memfd_create("log", 0)
    program = f"""
import mmap
from fusewire.linux.atomics import DirtyLog
log = DirtyLog(memoryview(mmap.mmap({fd}, {PAGE})))
for page in range(0, 16384, 4):
    log.mark(page * {PAGE}, 1)
"""
    try:
        os.ftruncate(fd, PAGE)
        with mmap.mmap(fd, PAGE) as mapped:
            view = memoryview(mapped)
            log = DirtyLog(view)
            other = subprocess.Popen([sys.executable, "-c", program], pass_fds=[fd])
            threads = [threading.Thread(target=mark_each_fourth, args=(log, first)) for first in (1, 2, 3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert other.wait(60) == 0
            assert pages(view) == set(range(16384))
            del log, threads
            view.release()
    finally:
        os.close(fd)
