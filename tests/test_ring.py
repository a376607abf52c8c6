"""Split virtqueues, device side: honest drivers, notifications, life, memory and the dirty log."""

from __future__ import annotations

import itertools
import mmap
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.transport.ring import BadAddress, Chain, GuestMemory, Queue, Region, RingError
from ring_driver import BESIDE, END, FOUR, INDIRECT, LIKELY, LOW, MIB, NEXT, PAGE, RINGS, USER, WRITE, Driver, expand


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("size", [1, 2, 8, 256, 32768])
def test_a_ring_of_any_size_serves_a_direct_and_an_indirect_request(size, event_idx):
    driver = Driver(size, event_idx=event_idx)
    for _ in range(5):
        driver.honest()
    driver.make_available(driver.direct([(BESIDE, 5, False)], [size - 1]))
    chain = driver.queue.pop()
    assert chain.head == size - 1
    assert driver.bytes_of(chain.readable) == expand([(BESIDE, 5, False)])[0]


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("parts", [LIKELY, FOUR, LIKELY[:1], LIKELY[:3], FOUR * 0 + LIKELY + [(LOW, 9, True)]])
def test_pieces_are_where_the_descriptors_say_each_time(parts, strong):
    driver = Driver(strong=strong)
    for _ in range(3):
        for make in (driver.indirect, driver.direct):
            driver.make_available(make(parts))
            chain = driver.queue.pop()
            assert chain.bad == ""
            assert [[driver.offset_of(v) for v in side] for side in (chain.readable, chain.writable)] == [
                [a for a, _, w in parts if not w],
                [a for a, _, w in parts if w],
            ]
            assert [len(v) for v in chain.readable + chain.writable] == [n for _, n, _ in parts]
            driver.queue.push(chain.head, 0)
            driver.queue.publish()


def test_descriptors_may_be_chained_in_any_order():
    driver = Driver()
    for order in itertools.permutations(range(4)):
        for indirect in (False, True):
            # a table is entered at its first entry
            inside = [0, *(i for i in order if i)]
            driver.make_available(driver.indirect(LIKELY, order=inside) if indirect else driver.direct(LIKELY, order))
            chain = driver.queue.pop()
            assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(LIKELY)
            driver.queue.push(chain.head, 0)
            driver.queue.publish()


@pytest.mark.parametrize("count", [5, 16, 17, 40])
def test_the_entries_of_a_table_may_be_in_almost_the_usual_order(count):
    driver = Driver()
    parts = [(LOW + 100 * i, 1 + i, i > count // 2) for i in range(count)]
    for at in range(count - 1):
        order = list(range(count))
        order[at : at + 2] = order[at : at + 2][:: -1 if at else 1]
        for _ in range(2):
            driver.make_available(driver.indirect(parts, order=order))
            chain = driver.queue.pop()
            assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)
            driver.queue.push(chain.head, 0)
            driver.queue.publish()


def test_a_driver_of_many_forms_is_not_remembered_for_ever():
    driver = Driver()
    for form in range(300):
        driver.indirect([(LOW, 4, False)] * 3)
        struct.pack_into("<H", driver.ram, 0x80000 + 12, NEXT | form << 3)
        driver.make_available(0)
        assert driver.queue.pop().bad == ""
        driver.queue.push(0, 0)
        driver.queue.publish()
        assert len(driver.queue._shapes) <= 64


def test_an_indirect_table_may_follow_direct_descriptors():
    driver = Driver()
    driver.table(LIKELY, LOW)
    driver.descriptor(3, BESIDE, 7, NEXT, 5)
    driver.descriptor(5, LOW, 64, INDIRECT | WRITE)  # 2.7.5.3.2: WRITE is to be ignored there
    for _ in range(2):
        driver.make_available(3)
        chain = driver.queue.pop()
        assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(
            [(BESIDE, 7, False), *LIKELY]
        )


def test_a_table_may_end_before_its_end_and_say_what_it_likes_behind():
    for n in (4, 5, 20, 1100):
        driver = Driver()
        parts = [(LOW + 64 * i, 64, i > 0) for i in range(n)]
        driver.indirect(parts)
        struct.pack_into("<H", driver.ram, 0x80000 + 16 * (n - 2) + 12, WRITE)
        struct.pack_into("<HH", driver.ram, 0x80000 + 16 * (n - 1) + 12, 0xFFFF, 0xFFFF)
        driver.make_available(0, 0)
        for _ in range(2):
            chain = driver.queue.pop()
            assert driver.bytes_of(chain.writable) == expand(parts[:-1])[1]


@pytest.mark.parametrize("count", [3, 16, 17, 40, 300, 1024, 1025, 2000])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_descriptors_of_one_byte_each_make_up_a_request(count, step, order):
    driver = Driver(2048)
    parts = [(RINGS + 0xC0000 + step * i, 1, i >= count // 3) for i in range(count)]
    if order == "backwards":
        parts = [(a, 1, w) for (a, _, _), (_, _, w) in zip(parts[::-1], parts, strict=True)]
    for make in (driver.indirect, driver.direct):
        for _ in range(2):
            driver.make_available(make(parts))
            chain = driver.queue.pop()
            assert chain.bad == ""
            assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)
            driver.queue.push(chain.head, 0)
            driver.queue.publish()


def test_pages_of_a_long_request_that_lie_behind_one_another_are_joined():
    driver = Driver()
    pages = [(BESIDE + PAGE * i, PAGE, True) for i in range(200)]
    parts = [(LOW, 40, False), (RINGS + 0x40000, 40, False), (LOW + 64, 16, True), *pages]
    driver.make_available(driver.indirect(parts))
    chain = driver.queue.pop()
    assert [(driver.offset_of(v), len(v)) for v in chain.readable] == [(LOW, 40), (RINGS + 0x40000, 40)]
    assert [(driver.offset_of(v), len(v)) for v in chain.writable] == [(LOW + 64, 16), (BESIDE, 200 * PAGE)]


@pytest.mark.parametrize("tail", [[], [(LOW, 1, True)] * 20])
def test_a_piece_may_lie_across_two_adjacent_regions(tail):
    driver = Driver(32)
    parts = [(BESIDE - 3, 10, False), (BESIDE - 1, 2, True), *tail]
    for make in (driver.direct, driver.indirect):
        for _ in range(2):
            driver.make_available(make(parts))
            chain = driver.queue.pop()
            assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)
            driver.queue.push(chain.head, 0)
            driver.queue.publish()


@pytest.mark.parametrize("count", [4, 30])
def test_an_indirect_table_may_lie_across_two_adjacent_regions(count):
    driver = Driver()
    parts = [(LOW + 10 * i, 10, i > 2) for i in range(count)]
    driver.make_available(driver.indirect(parts, at=BESIDE - 24))
    chain = driver.queue.pop()
    assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)


@pytest.mark.parametrize("count", [1, 4, 6, 30])
def test_empty_descriptors_are_skipped_wherever_they_point(count):
    driver = Driver(64)
    parts = [(LOW + 10 * i, 9 * (i % 2), i > 1) for i in range(count)]
    parts[0] = (1 << 63, 0, False)
    for make in (driver.direct, driver.indirect):
        for _ in range(2):
            driver.make_available(make(parts))
            chain = driver.queue.pop()
            assert chain.bad == ""
            assert all(chain.readable) and all(chain.writable)
            assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)


def test_a_head_made_available_twice_comes_back_twice():
    driver = Driver()
    head = driver.indirect(LIKELY)
    driver.make_available(head, head)
    assert [driver.queue.pop().bad, driver.queue.pop().bad, driver.queue.pop()] == ["", "", None]
    driver.queue.push(head, 1)
    driver.queue.push(head, 2)
    driver.queue.publish()
    assert driver.reap() == [(head, 1), (head, 2)]
    driver.honest()


@pytest.mark.parametrize("ahead", [9, 100, 0x8000, 0xFFFF])
def test_an_available_index_that_runs_away_ends_the_ring(ahead):
    driver = Driver(base=0xFFFE)
    driver.set_index(0xFFFE + ahead & 0xFFFF)
    with pytest.raises(RingError, match="more than the ring's 8 entries"):
        driver.queue.pop()
    assert driver.queue.sleep() is False
    with pytest.raises(RingError):
        driver.queue.pop()
    assert driver.queue.stop() == 0xFFFE


def test_an_available_index_that_goes_back_ends_the_ring():
    driver = Driver()
    driver.make_available(driver.indirect(LIKELY), 0, 0)
    for _ in range(3):
        driver.queue.pop()
    driver.set_index(1)
    with pytest.raises(RingError, match="available index 1 where 3 is next and 3 are in flight"):
        driver.queue.pop()


def test_no_more_requests_are_in_flight_than_the_ring_holds():
    driver = Driver()
    driver.make_available(*range(8))
    assert all(driver.queue.pop() for _ in range(8))
    driver.make_available(0)
    with pytest.raises(RingError, match="8 are in flight"):
        driver.queue.pop()
    driver.queue.push(3, 0)
    driver.queue.publish()
    assert driver.queue.pop().head == 0
    assert driver.queue.in_flight == 8


def test_indices_wrap_around_again_and_again():
    driver = Driver(4)
    queue, done = driver.queue, 0
    driver.indirect(LIKELY)
    while done < 3 * 65536:
        batch = done % 4 + 1
        driver.set_used_event((done + batch - 1) & 0xFFFF)
        driver.make_available(*[0] * batch)
        for i in range(batch):
            chain = queue.pop()
            assert len(chain.writable) == 2
            queue.push(chain.head, i)
        assert queue.pop() is None
        assert queue.publish()
        assert driver.reap() == [(0, i) for i in range(batch)]
        assert queue.sleep()
        assert driver.avail_event == driver.next == queue.last_avail
        done += batch
    assert queue.in_flight == 0


def test_a_queue_begins_at_the_base_and_goes_on_from_the_used_index():
    driver = Driver(base=0xFFFD)
    for _ in range(10):
        driver.honest()
    assert driver.queue.stop() == (0xFFFD + 10) & 0xFFFF


# Notifications


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 0xFFFF),
    st.lists(st.tuples(st.integers(0, 8), st.integers(-12, 12) | st.integers(0, 0xFFFF)), max_size=30),
)
def test_the_driver_is_called_when_the_used_index_passes_used_event(base, steps):
    driver = Driver(base=base)
    driver.descriptor(0, LOW, 4, 0)
    index, first = base, True
    for count, event in steps:
        event = (index + event) & 0xFFFF
        driver.set_used_event(event)
        for _ in range(count):
            driver.make_available(0)
            driver.queue.push(driver.queue.pop().head, 0)
        # vring_need_event: one of the requests in this batch has the number used_event.
        wanted = any((index + i) & 0xFFFF == event for i in range(count))
        assert driver.queue.publish() is bool(count and (wanted or first))
        first = first and not count
        index = (index + count) & 0xFFFF
        assert driver.used_index == index
        assert len(driver.reap()) == count


def test_without_event_idx_the_flags_speak():
    driver = Driver(event_idx=False)
    queue = driver.queue
    assert driver.used_flags == 0
    queue.wake()
    assert driver.used_flags == 1
    assert queue.sleep()
    assert driver.used_flags == 0
    queue.wake()
    driver.make_available(driver.indirect(LIKELY))
    assert queue.sleep() is False
    for flags, called in ((0, True), (1, False), (0, True)):
        if flags:
            driver.make_available(0)
        chain = queue.pop() or Chain(0, [], [])
        queue.push(chain.head, 0)
        driver.set_avail_flags(flags)
        assert queue.publish() is called
        assert queue.publish() is False
    assert not any(driver.ram[driver.used + 4 + 8 * driver.size :][:2])


def test_with_event_idx_waking_says_nothing_and_sleeping_names_the_next_request():
    driver = Driver(base=77)
    driver.queue.wake()
    assert driver.used_flags == 0
    assert driver.queue.sleep()
    assert driver.avail_event == 77
    driver.make_available(driver.direct(LIKELY), 0)
    assert driver.queue.sleep() is False
    driver.queue.pop()
    assert driver.queue.sleep() is False
    assert driver.avail_event == 78
    driver.queue.pop()
    assert driver.queue.sleep()
    assert driver.avail_event == 79


def test_the_available_index_is_looked_at_once_for_all_that_is_there():
    driver = Driver()
    driver.direct(LIKELY)
    driver.make_available(0, 0, 0)
    assert driver.queue.pop()
    driver.set_index(0x4000)  # whoever looks again raises
    assert driver.queue.pop()
    assert driver.queue.pop()
    with pytest.raises(RingError):
        driver.queue.pop()


# Life


def test_a_stopped_queue_is_empty_and_what_is_pushed_goes_nowhere():
    for queue in (Queue(indirect=True, event_idx=True), Driver().queue):
        queue.stop()
        assert queue.pop() is None
        assert queue.in_flight == queue.size == 0
        assert queue.sleep()
        queue.wake()
        queue.push(5, 100)
        queue.publish()
        queue.remap(GuestMemory([]))
        assert queue.pop() is None
        assert queue.stop() == queue.last_avail == 0


def test_stopping_publishes_what_was_pushed_and_late_answers_change_nothing():
    driver = Driver()
    driver.make_available(driver.indirect(LIKELY), 0, 0)
    driver.queue.pop()
    driver.queue.pop()
    driver.queue.push(0, 3)
    assert driver.queue.stop() == 2
    assert driver.reap() == [(0, 3)]
    before = bytes(driver.ram)
    driver.queue.push(0, 4)
    driver.queue.publish()
    driver.queue.sleep()
    assert bytes(driver.ram) == before


@pytest.mark.parametrize("count", [4, 5, 40])
def test_a_stopped_queue_has_let_go_of_the_memory(count):
    room = mmap.mmap(-1, MIB)
    queue = Queue(indirect=True, event_idx=True)
    queue.start(GuestMemory([Region(0, MIB, 0, memoryview(room))]), 8, 0, 0x1000, 0x2000, 0)
    for i in range(count):
        struct.pack_into("<QIHH", room, 0x8000 + 16 * i, 0x9000, 1, NEXT * (i + 1 < count), i + 1)
    struct.pack_into("<QIHH", room, 0, 0x8000, 16 * count, INDIRECT, 0)
    struct.pack_into("<H", room, 0x1002, 1)
    chain = queue.pop()
    assert not chain.bad
    queue.push(0, 0)
    queue.stop()
    with pytest.raises(BufferError):
        room.close()
    del chain
    room.close()


def test_a_ring_moves_to_other_memory_with_its_indices():
    driver = Driver()
    driver.honest()
    driver.make_available(driver.indirect(LIKELY))
    held = driver.queue.pop()
    other = {start: bytearray(part) for start, part in driver.parts.items()}
    memory = GuestMemory(Region(start, MIB, USER[start], memoryview(part)) for start, part in other.items())
    driver.queue.remap(memory)
    assert driver.offset_of(held.readable[0]) == LIKELY[0][0]
    driver.parts, driver.ram = other, other[RINGS]
    driver.queue.push(held.head, 1)
    driver.queue.publish()
    assert driver.reap() == [(0, 1)]
    driver.honest()
    with pytest.raises(RingError, match="the descriptor table is not in memory"):
        driver.queue.remap(GuestMemory(memory.regions[:1]))
    assert driver.queue.pop() is None
    assert driver.queue.stop() == 3


@pytest.mark.parametrize("size", [-8, 0, 3, 24, 32769, 65536, 1 << 32])
def test_a_size_that_is_no_power_of_two_or_too_large_is_refused(size):
    queue = Queue(indirect=True, event_idx=True)
    with pytest.raises(RingError, match=f"a ring of {size} entries"):
        queue.start(Driver().memory, size, USER[RINGS], USER[RINGS], USER[RINGS], 0)
    assert queue.pop() is None


@pytest.mark.parametrize(
    ("desc", "avail", "used", "base", "reason"),
    [
        (8, 0x1000, 0x2000, 0, "the descriptor table's address 0x7e0000000008 is not aligned to 16 bytes"),
        (0, 0x1001, 0x2000, 0, "the available ring's address 0x7e0000001001 is not aligned to 2 bytes"),
        (0, 0x1000, 0x2002, 0, "the used ring's address 0x7e0000002002 is not aligned to 4 bytes"),
        (MIB - 0x70, 0x1000, 0x2000, 0, "the descriptor table is not in memory: 128 bytes at 0x7e00000fff90"),
        (0, MIB - 20, 0x2000, 0, "the available ring is not in memory: 22 bytes"),
        (0, 0x1000, MIB - 68, 0, "the used ring is not in memory: 70 bytes"),
        (0, -MIB, 0x2000, 0, "the available ring is not in memory"),
        (0, 0x1000, 0x2000, 65536, "index 65536 of the available ring is no 16-bit number"),
    ],
)
def test_ring_addresses_that_cannot_be_are_refused_by_name(desc, avail, used, base, reason):
    user = USER[RINGS]
    queue = Queue(indirect=True, event_idx=True)
    with pytest.raises(RingError, match=reason):
        queue.start(Driver().memory, 8, user + desc, user + avail, user + used, base)
    assert (queue.size, queue.pop()) == (0, None)


def test_without_event_idx_a_ring_may_end_where_the_events_would_be():
    queue = Queue(indirect=True, event_idx=False)
    user = USER[RINGS]
    queue.start(Driver().memory, 8, user, user + MIB - 20, user + 0x1000, 0)
    queue.start(Driver().memory, 8, user, user + 0x1000, user + MIB - 68, 0)
    assert queue.pop() is None


# Memory


def region(guest, size, user):
    return Region(guest, size, user, memoryview(bytearray(max(0, size))))


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([region(0x1000, 0, 0)], "0x1000 has 0 bytes"),
        ([region(0x1000, -1, 0)], "has -1 bytes"),
        ([region((1 << 64) - 8, 16, 0)], "64 bits"),
        ([region(0, 16, (1 << 64) - 8)], "64 bits"),
        ([region(0, 16, 0), region(15, 16, 100)], "0x0 and 0xf overlap"),
        ([region(0, 16, 0), region(0, 16, 0)], "0x0 and 0x0 overlap"),
        ([region(0, 16, 0), region(100, 16, 15)], "0x0 and 0x64 overlap in the front end"),
        ([Region(0, 16, 0, memoryview(bytearray(15)))], "16 writable bytes"),
        ([Region(0, 16, 0, memoryview(bytes(16)))], "16 writable bytes"),
        ([Region(0, 4, 0, memoryview(bytearray(16)).cast("I"))], "4 writable bytes"),
    ],
)
def test_regions_that_cannot_be_are_refused(regions, reason):
    for order in itertools.permutations(regions):
        with pytest.raises(ValueError, match=reason):
            GuestMemory(order)


def test_regions_may_end_where_addresses_do():
    memory = GuestMemory([region((1 << 64) - 16, 16, (1 << 64) - 16)])
    assert len(memory.slices((1 << 64) - 16, 16)[0]) == 16
    assert len(memory.at_user((1 << 64) - 1, 1)) == 1
    with pytest.raises(BadAddress):
        memory.slices((1 << 64) - 1, 2)


def test_memory_is_sliced_where_regions_meet_and_nowhere_else():
    driver = Driver()
    assert [region.guest_addr for region in driver.memory.regions] == [LOW, RINGS, BESIDE]
    assert [len(s) for s in driver.memory.slices(BESIDE - 1, MIB + 1)] == [1, MIB]
    assert driver.memory.slices(5, 0) == []
    for address, length in ((LOW - 1, 1), (LOW - 1, 2), (LOW + MIB - 1, 2), (END, 1), (-1, 1), (BESIDE - 1, MIB + 2)):
        with pytest.raises(BadAddress):
            driver.memory.slices(address, length)
    assert len(driver.memory.at_user(USER[RINGS], MIB)) == MIB
    for address, length in ((USER[RINGS] + 1, MIB), (USER[RINGS] - 1, 1), (0, 0), (USER[BESIDE] + 1, -1)):
        with pytest.raises(BadAddress):
            driver.memory.at_user(address, length)


# The dirty log


class PageLog:
    def __init__(self):
        self.marks = []

    def mark(self, guest_addr, length):
        assert length > 0
        self.marks.append((guest_addr, length))

    def take(self):
        pages = {page for a, n in self.marks for page in range(a // PAGE, (a + n - 1) // PAGE + 1)}
        self.marks.clear()
        return pages


def written(parts, count):
    addresses = [a + i for a, n, w in parts if w for i in range(n)][:count]
    return {address // PAGE for address in addresses}


@pytest.mark.parametrize("written_bytes", [0, 1, 16, 17, 4112, 12304, 99999])
@pytest.mark.parametrize("make", ["direct", "indirect"])
def test_exactly_the_pages_written_to_are_logged(make, written_bytes):
    log = PageLog()
    driver = Driver(64, log=log)
    parts = [(RINGS + 0x40000, 40, False), (LOW + 0x5000, 16, True), (BESIDE - 0x800, 0x1000, True)]
    parts += [(LOW + 0x9000 + 0x2000 * i, 0x1000, True) for i in range(20)]
    log.take()
    driver.make_available(getattr(driver, make)(parts))
    chain = driver.queue.pop()
    assert chain.bad == ""
    assert log.take() == set()
    driver.queue.push(chain.head, written_bytes)
    driver.queue.publish()
    assert log.take() == written(parts, written_bytes)


@pytest.mark.parametrize("event_idx", [False, True])
def test_each_byte_of_the_used_ring_that_changes_is_logged(event_idx):
    log = PageLog()
    driver = Driver(8, event_idx=event_idx, log=log)
    driver.queue.stop()
    at = 0x5_0000_0000
    driver.start(driver.queue, 0, used_log=at)
    driver.indirect(LIKELY)
    length = 6 + 8 * 8
    for turn in range(40):
        before = bytes(driver.ram[driver.used : driver.used + length])
        driver.make_available(*[0] * (turn % 5 + 1))
        while chain := driver.queue.pop():
            driver.queue.push(chain.head, turn << 8 | turn)
        driver.queue.publish()
        if turn % 3:
            driver.queue.wake()
            driver.queue.sleep()
        after = bytes(driver.ram[driver.used : driver.used + length])
        marked = {a + i - at for a, n in log.marks if a >= at for i in range(n)}
        log.marks.clear()
        assert {i for i in range(length) if before[i] != after[i]} <= marked <= set(range(length))


def test_a_log_begins_and_ends_between_requests():
    driver, log = Driver(), PageLog()
    driver.make_available(driver.indirect(LIKELY), 0)
    for _ in range(2):
        driver.queue.pop()
    with pytest.raises(ValueError, match="2 requests are in flight"):
        driver.queue.set_log(log)
    driver.queue.push(0, 0)
    driver.queue.push(0, 0)
    driver.queue.publish()
    driver.reap()
    driver.queue.set_log(log, 1 << 40)
    driver.honest()
    assert log.take() == {(RINGS + 0x41000) // PAGE, (1 << 40) // PAGE}
    driver.queue.set_log(None)
    driver.honest()
    assert log.take() == set()


def test_while_there_is_a_log_a_head_in_flight_is_not_taken_twice():
    log = PageLog()
    driver = Driver(log=log)
    head = driver.indirect(LIKELY)
    driver.make_available(head, head, head, 3)
    first, second, third = driver.queue.pop(), driver.queue.pop(), driver.queue.pop()
    assert (first.bad, second.bad, third.bad) == ("", *["descriptor 0 is in flight already"] * 2)
    driver.queue.push(second.head, 0)
    driver.queue.push(third.head, 0)
    assert log.take() == set()
    assert driver.queue.pop().head == 3
    driver.make_available(head)
    assert driver.queue.pop().bad == "descriptor 0 is in flight already"
    driver.queue.push(head, 0)
    driver.queue.push(3, 0)
    driver.queue.push(first.head, 1)
    assert log.take() == {LIKELY[2][0] // PAGE}
    driver.queue.publish()
    driver.reap()
    driver.honest()
