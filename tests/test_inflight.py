"""Requests in flight outlive the device that serves them: the region that the front end keeps."""

from __future__ import annotations

import struct
import sys

import pytest

from fusewire.transport import inflight as inflight_module
from fusewire.transport import ring as ring_module
from fusewire.transport.inflight import inflight_size
from fusewire.transport.ring import Queue, RingError
from ring_driver import LOW, Driver


def inflight_region(size):
    return memoryview(bytearray(inflight_size(size)))


def states(view, size):
    """Give (version, desc_num, last_batch_head, used_idx) and the heads in flight by their counters."""
    entries = [struct.unpack_from("<B5xHQ", view, 16 + 16 * i) for i in range(size)]
    heads = sorted((i for i in range(size) if entries[i][0]), key=lambda i: entries[i][2])
    return struct.unpack_from("<HHHH", view, 8), heads


def test_the_size_of_a_region_has_room_for_the_ring_and_keeps_the_next_one_aligned():
    for size in (1, 2, 8, 128, 1024, 32768):
        assert inflight_size(size) >= 16 + 16 * size
        assert inflight_size(size) % 64 == 0


def test_the_region_says_what_is_in_flight():
    view = inflight_region(8)
    driver = Driver(8, region=view, base=5)
    assert states(view, 8) == ((1, 8, 0, 5), [])
    for head in (6, 1, 4):
        driver.direct([(LOW, 4, False)], [head])
    driver.make_available(6, 1, 4)
    for _ in range(3):
        driver.queue.pop()
    assert states(view, 8) == ((1, 8, 0, 5), [6, 1, 4])
    driver.queue.push(1, 0)
    assert states(view, 8) == ((1, 8, 1, 5), [6, 1, 4])
    driver.queue.publish()
    assert states(view, 8) == ((1, 8, 1, 6), [6, 4])
    driver.queue.push(4, 0)
    driver.queue.push(6, 0)
    driver.queue.publish()
    assert states(view, 8) == ((1, 8, 6, 8), [])


def test_what_was_in_flight_comes_first_again_and_in_order():
    view = inflight_region(8)
    driver = Driver(8, region=view, base=0xFFFE)
    for head in range(8):
        driver.direct([(LOW + head, 4, False)], [head])
    driver.make_available(6, 1, 4, 2)
    for _ in range(3):
        driver.queue.pop()
    driver.queue.push(1, 0)
    driver.queue.publish()
    again = Queue(indirect=True, event_idx=True)
    driver.start(again, 0xFFFF, view)  # a front end that lost its back end gives the used index
    assert again.in_flight == 0
    assert again.sleep() is False
    heads = []
    while chain := again.pop():
        assert driver.offset_of(chain.readable[0]) == LOW + chain.head
        heads.append(chain.head)
    assert heads == [6, 4, 2]
    assert again.in_flight == 3
    for head in heads:
        again.push(head, 0)
    again.publish()
    assert again.in_flight == 0
    assert [head for head, _ in driver.reap()] == [1, 6, 4, 2]
    assert again.stop() == 2
    assert states(view, 8)[1] == []


class Snapshots:
    """Copies of the guest's memory and of the region before each line that the device's code executes."""

    def __init__(self, driver, view):
        self.driver, self.view = driver, view
        self.taken = {}
        self.files = {ring_module.__file__, inflight_module.__file__}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)
        self.take()

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.take()
        return self.trace

    def take(self):
        driver = self.driver
        key = bytes(driver.ram[: driver.free]), bytes(self.view)
        self.taken.setdefault(key, driver.next)


def restored(key, index, size):
    memory, view = key
    driver = Driver(size)
    driver.ram[: driver.free] = memory
    driver.next = index
    return driver, memoryview(bytearray(view))


def finish(driver, view, order):
    """Serve all that a restarted device finds. Each request must have come back once, in all lives together."""
    assert struct.unpack_from("<H", driver.ram, driver.avail + 2)[0] == driver.next
    left = order[: driver.next]
    before = [head for head, _ in driver.reap()]
    for head in before:
        left.remove(head)  # the first: a head comes back before it is used again
    queue = Queue(indirect=True, event_idx=True)
    driver.start(queue, driver.used_index, view)
    assert queue.sleep() is not bool(left)
    served = []
    while chain := queue.pop():
        assert chain.bad == ""
        served.append(chain.head)
        queue.push(chain.head, 7)
        queue.publish()
    assert served == left
    assert driver.reap() == [(head, 7) for head in left]
    last = [0, *before, *served][-1]
    assert states(view, driver.size) == ((1, driver.size, last, driver.used_index), [])
    assert queue.in_flight == 0


ORDER = [6, 1, 4, 2, 7, 1, 6, 0]


def crowd(driver, view):
    """Give all the states in which a device may die that serves eight requests, some of them in batches."""
    for head in ORDER:
        driver.direct([(LOW + head, 4, False)], [head])
    with Snapshots(driver, view) as snapshots:
        queue = Queue(indirect=True, event_idx=True)
        driver.start(queue, 0, view)
        driver.make_available(*ORDER[:3])
        for _ in range(3):
            queue.pop()
        queue.push(1, 0)
        queue.publish()
        driver.make_available(*ORDER[3:5])
        queue.pop()
        for head in (2, 6):
            queue.push(head, 0)
        queue.publish()
        queue.pop()
        driver.make_available(*ORDER[5:7])  # heads that have been in flight before
        queue.pop()
        for head in (7, 4):
            queue.push(head, 0)
        queue.publish()
        queue.pop()
        driver.make_available(ORDER[7])
        for head in (6, 1):
            queue.push(head, 0)
        queue.publish()
        queue.pop()
        queue.push(0, 0)
        queue.publish()
    return snapshots.taken


def test_a_device_may_die_at_every_step_and_no_request_is_lost_or_done_twice():
    taken = crowd(Driver(8), inflight_region(8))
    assert len(taken) > 40
    for key, index in taken.items():
        finish(*restored(key, index, 8), ORDER)


def test_the_device_that_takes_over_may_die_at_every_step_too():
    taken = crowd(Driver(8), inflight_region(8))
    for key, index in list(taken.items())[::7]:
        driver, view = restored(key, index, 8)
        with Snapshots(driver, view) as snapshots:
            queue = Queue(indirect=True, event_idx=True)
            driver.start(queue, 0, view)
            heads = []
            while chain := queue.pop():
                heads.append(chain.head)
            for head in heads[::-1]:
                queue.push(head, 0)
            queue.publish()
        for second, at in snapshots.taken.items():
            finish(*restored(second, at, 8), ORDER)


@pytest.mark.parametrize("ruin", ["reset", "size", "version 0"])
def test_a_region_that_is_not_about_this_ring_is_begun_anew(ruin):
    view = inflight_region(8)
    struct.pack_into("<HHHH", view, 8, 1, 8, 3, 1000)
    for head in range(8):
        struct.pack_into("<B5xHQ", view, 16 + 16 * head, 1, 5, (1 << 64) - 1)
    if ruin == "size":
        struct.pack_into("<H", view, 10, 16)
    elif ruin == "version 0":
        struct.pack_into("<H", view, 8, 0)
    else:
        struct.pack_into("<H", view, 14, 0)  # as if all eight were in flight, of a ring on which nothing ever was
    driver = Driver(8, region=view)
    assert states(view, 8) == ((1, 8, 0, 0), [])
    driver.honest()


def test_a_region_full_of_nonsense_costs_nothing_but_itself():
    for seed in range(50):
        view = memoryview(bytearray((i * i * 31 + seed * 977) >> 3 & 0xFF for i in range(inflight_size(8))))
        struct.pack_into("<HHHH", view, 8, 1, 8, seed * 1000, (seed * 4097) & 0xFFFF)
        driver = Driver(8)
        driver.queue.stop()
        driver.start(driver.queue, 0, view)
        while chain := driver.queue.pop():
            driver.queue.push(chain.head, 0)
        driver.queue.publish()


def test_a_counter_at_its_end_goes_on_at_nought():
    view = inflight_region(8)
    driver = Driver(8, region=view)
    driver.direct([(LOW, 4, False)], [2])
    driver.make_available(2)
    driver.queue.pop()
    struct.pack_into("<Q", view, 16 + 16 * 2 + 8, (1 << 64) - 1)
    driver.start(driver.queue, 0, view)
    driver.make_available(3)
    assert [driver.queue.pop().head, driver.queue.pop().head] == [2, 3]
    assert struct.unpack_from("<Q", view, 16 + 16 * 3 + 8) == (0,)


def test_heads_that_the_ring_does_not_have_leave_the_region_alone():
    view = inflight_region(8)
    driver = Driver(8, region=view)
    driver.make_available(8, 0xFFFF)
    for head in (8, 0xFFFF):
        assert driver.queue.pop().bad
        driver.queue.push(head, 0)
    driver.queue.publish()
    assert driver.reap() == [(8, 0), (0xFFFF, 0)]
    assert states(view, 8) == ((1, 8, 0, 2), [])


@pytest.mark.parametrize(
    ("length", "version", "reason"), [(143, 1, "has 143 bytes, a ring of 8 needs 144"), (192, 2, "of version 2")]
)
def test_a_region_too_small_or_too_new_is_refused(length, version, reason):
    view = memoryview(bytearray(length))
    struct.pack_into("<H", view, 8, version)
    with pytest.raises(RingError, match=reason):
        Driver(8, region=view)
