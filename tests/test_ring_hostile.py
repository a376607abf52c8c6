"""Split virtqueues, device side: drivers that are not honest, and any chain at all against a model."""

from __future__ import annotations

import mmap
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.transport import ring as ring_module
from fusewire.transport.ring import MOST_ENTRIES, GuestMemory, Queue, Region
from ring_driver import BESIDE, END, INDIRECT, LIKELY, LOW, MIB, NEXT, RINGS, WRITE, Driver, expand

# What no honest driver does. Each takes a driver, prepares, and gives the head.


def loop(d):
    d.descriptor(0, LOW, 1, NEXT, 1)
    d.descriptor(1, LOW, 1, NEXT, 0)
    return 0


def itself(d):
    d.descriptor(3, LOW, 1, NEXT, 3)
    return 3


def loop_of_nothing(d):
    d.descriptor(3, LOW, 0, NEXT, 3)
    return 3


def loop_in_table(d, count=3, following=0):
    d.indirect([(LOW, 1, False)] * count)
    struct.pack_into("<HH", d.ram, 0x80000 + 16 * (count - 1) + 12, NEXT, following)
    return 0


def next_outside(d):
    d.descriptor(0, LOW, 1, NEXT, d.size)
    return 0


def change_entry(count, index, **change):
    """An honest table but for one field of one entry, after the same one was served in its honest form."""

    def prepare(d):
        parts = [(RINGS + 0x40000 + 0x100 * i, 16, i > 1) for i in range(count)]
        d.make_available(d.indirect(parts))
        chain = d.queue.pop()
        assert chain.bad == ""
        d.queue.push(chain.head, 0)
        d.queue.publish()
        d.reap()
        at = 0x80000 + 16 * index
        fields = dict(zip(("address", "length", "flags", "next"), struct.unpack_from("<QIHH", d.ram, at), strict=True))
        struct.pack_into("<QIHH", d.ram, at, *{**fields, **change}.values())
        return 0

    return prepare


def one(address, length, flags=0):
    def prepare(d):
        d.descriptor(0, address, length, flags)
        return 0

    return prepare


def table_of(length):
    def prepare(d):
        d.indirect(LIKELY)
        d.descriptor(0, RINGS + 0x80000, length, INDIRECT)
        return 0

    return prepare


def readable_behind_writable(d):
    return d.direct([(LOW, 4, True), (LOW, 4, False)])


def too_much(d):
    return d.indirect([(RINGS, 2 * MIB, False)] * 2048)


def too_much_in_order(d):
    return d.indirect([(RINGS + i % 2, 2 * MIB - 1, False) for i in range(1024)] * 2)


def indirect_with_next(d):
    d.indirect(LIKELY)
    d.descriptor(0, RINGS + 0x80000, 64, INDIRECT | NEXT, 1)
    return 0


HOSTILE = {
    "a loop of two": (loop, "loop"),
    "a loop of one": (itself, "loop"),
    "a loop of nothing": (loop_of_nothing, "loop"),
    "a loop in a table": (loop_in_table, "loop"),
    "a loop in a long table": (lambda d: loop_in_table(d, 100, 50), "loop"),
    "next is no descriptor": (next_outside, "next descriptor 8 of 8"),
    "next is no descriptor of the table": (lambda d: loop_in_table(d, 4, 4), "next descriptor 4 of 4"),
    "next is no descriptor of the long table": (lambda d: loop_in_table(d, 100, 100), "next descriptor 100 of 100"),
    "head is no descriptor": (lambda d: d.size, "descriptor 8 of a ring of 8"),
    "head is no descriptor at all": (lambda d: 0xFFFF, "descriptor 65535 of a ring of 8"),
    "an address outside": (one(0x1000, 8), "0x1000 is not in memory"),
    "an address behind the last": (one(END, 1), "not in memory"),
    "a length that leads outside": (one(END - 4, 5), "not in memory"),
    "a length of nearly 2**32": (one(RINGS, 0xFFFFFFFF, WRITE), "not in memory"),
    "an address that wraps around": (one((1 << 64) - 4, 8), "not in memory"),
    "a gap between regions": (one(LOW + MIB - 1, 2), "not in memory"),
    "more than 2**32 bytes": (too_much, "more than 4294967295 bytes"),
    "readable behind writable": (readable_behind_writable, "readable descriptor behind a writable"),
    "a table with next": (indirect_with_next, "that has a next"),
    "a table of nothing": (table_of(0), "table of 0 bytes"),
    "a table of 15 bytes": (table_of(15), "table of 15 bytes"),
    "a table of 65 bytes": (table_of(65), "table of 65 bytes"),
    "a table of 2**32-16 bytes": (table_of(0xFFFFFFF0), "table of 4294967280 bytes"),
    "a table too long by one": (table_of(16 * MOST_ENTRIES + 16), "table of 524304 bytes"),
    "a table outside": (one(0x1000, 64, INDIRECT), "0x1000 is not in memory"),
    "a table that begins before memory": (one(LOW - 16, 64, INDIRECT), "not in memory"),
    "a table that ends behind memory": (one(END - 16, 64, INDIRECT), "not in memory"),
}
for _count in (4, 5, 20, 1024, 1500):
    for _index in (0, 1, 2, _count - 1):
        _where = f"{_index} of {_count}"
        HOSTILE |= {
            f"indirect in a table, {_where}": (
                change_entry(_count, _index, flags=INDIRECT, address=RINGS + 0x80000, length=64),
                "within an indirect table",
            ),
            f"a bad address, {_where}": (change_entry(_count, _index, address=END - 15), "not in memory"),
            f"a small address, {_where}": (change_entry(_count, _index, address=3), "not in memory"),
            f"a bad length, {_where}": (change_entry(_count, _index, length=0xFFFFFFFF), "not in memory"),
        }
    HOSTILE[f"indirect and writable in a table, of {_count}"] = (
        change_entry(_count, _count - 1, flags=INDIRECT | WRITE, length=64),
        "within an indirect table",
    )
    HOSTILE[f"readable behind writable, of {_count}"] = (
        change_entry(_count, _count - 1, flags=0),
        "readable descriptor behind a writable",
    )
    HOSTILE[f"no end, of {_count}"] = (
        change_entry(_count, _count - 1, flags=NEXT | WRITE, next=_count),
        "a next descriptor",
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_chain_is_said_and_costs_nobody_anything(name):
    prepare, reason = HOSTILE[name]
    driver = Driver()
    driver.honest()  # from here on it knows where requests lie
    head = prepare(driver)
    driver.make_available(head)
    chain = driver.queue.pop()
    assert reason in chain.bad
    assert (chain.head, chain.readable, chain.writable) == (head, [], [])
    assert driver.queue.in_flight == 1
    driver.queue.push(chain.head, 0)
    driver.queue.publish()
    assert driver.reap() == [(head, 0)]
    driver.honest()


def test_the_same_sum_of_lengths_is_too_much_on_every_way():
    part = 0xFFFFFFFF // 4 + 1
    room = mmap.mmap(-1, part)  # of which a page is touched
    memory = GuestMemory([Region(RINGS, MIB, 0, memoryview(bytearray(MIB))), Region(0, part, MIB, memoryview(room))])
    for count in (4, 5, 20):
        driver = Driver()
        queue = Queue(indirect=True, event_idx=False)
        queue.start(memory, 8, driver.desc, driver.avail, driver.used, 0)
        ram = memory.regions[1].view
        struct.pack_into("<QIHH", ram, driver.desc, 0x8000, 16 * count, INDIRECT, 0)
        for turn, over in enumerate((0, 0, 1, 1, 0)):  # the second time a queue may know the form
            sizes = [part] * 3 + [1] * (count - 4) + [part - (count - 4) - 1 + over]
            for i, size in enumerate(sizes):
                flags = NEXT * (i + 1 < count) | WRITE * (i > 1)
                struct.pack_into("<QIHH", room, 0x8000 + 16 * i, 0, size, flags, i + 1)
            struct.pack_into("<H", ram, driver.avail + 2, turn + 1)
            chain = queue.pop()
            assert bool(chain.bad) == bool(over)
            assert sum(map(len, chain.readable + chain.writable)) == (0 if over else 0xFFFFFFFF)
            queue.push(chain.head, 0)
            queue.publish()
        queue.stop()


def test_indirect_tables_that_were_not_negotiated_are_refused():
    driver = Driver(indirect=False)
    driver.make_available(driver.indirect(LIKELY))
    assert driver.queue.pop().bad == "an indirect table, which was not negotiated"
    driver.queue.push(0, 0)
    driver.queue.publish()
    assert driver.reap() == [(0, 0)]
    driver.honest()


def test_a_table_longer_than_the_ring_is_served():
    driver = Driver(1)
    parts = [(LOW + 2 * i, 1, i > 0) for i in range(MOST_ENTRIES)]
    table = bytearray()
    for i, (address, length, writable) in enumerate(parts):
        table += struct.pack("<QIHH", address, length, WRITE * writable | NEXT * (i + 1 < len(parts)), i + 1)
    driver.poke(BESIDE, bytes(table))
    driver.descriptor(0, BESIDE, len(table), INDIRECT)
    driver.make_available(0)
    chain = driver.queue.pop()
    assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(parts)


def test_descriptors_rewritten_after_they_were_read_change_nothing():
    driver = Driver()
    for make in (driver.indirect, driver.direct):
        driver.make_available(make(LIKELY))
        chain = driver.queue.pop()
        driver.ram[0x80000:0x80040] = b"\xff" * 64
        driver.ram[driver.desc : driver.desc + 128] = b"\xff" * 128
        assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expand(LIKELY)
        driver.queue.push(chain.head, 5)
        driver.queue.publish()
        assert driver.reap() == [(0, 5)]


# Any chain at all, against a slow and simple reading of the specification


def model(driver, head):
    """Give (readable, writable) addresses, or None for a chain that cannot be used."""
    sides, table, count, seen, inner = ([], []), driver.desc + RINGS, driver.size, 0, False
    index = head
    while True:
        if index >= count:
            return None
        address, length, flags, following = struct.unpack("<QIHH", driver.peek(table + 16 * index, 16))
        if flags & INDIRECT:
            if inner or flags & NEXT or length % 16 or not 0 < length <= 16 * MOST_ENTRIES:
                return None
            if not contiguous(address, length):
                return None
            table, count, index, seen, inner = address, length // 16, 0, 0, True
            continue
        if sides[1] and not flags & WRITE and any(w for w in sides[1]):
            return None
        sides[bool(flags & WRITE)].append((address, length))
        if length and not contiguous(address, length):
            return None
        seen += 1
        if not flags & NEXT:
            return tuple([a + i for a, n in side for i in range(n)] for side in sides)
        if seen >= count:
            return None
        index = following


def contiguous(address, length):
    return LOW <= address <= LOW + MIB - length or RINGS <= address <= END - length


addresses = st.sampled_from(
    [LOW, LOW + MIB - 8, RINGS + 0x40000, RINGS + 0x40010, BESIDE - 4, END - 8, END, LOW - 1, (1 << 64) - 1]
) | st.integers(RINGS, RINGS + 0x7000)
entries = st.tuples(
    addresses,
    st.sampled_from([0, 1, 8, 16, 16, 64]),
    st.sampled_from(
        [NEXT, NEXT, NEXT, NEXT | WRITE, NEXT | WRITE, WRITE, 0, INDIRECT, INDIRECT | WRITE, 0xFFF8 | NEXT]
    ),
    st.integers(0, 9),
)
good = st.lists(
    st.tuples(st.integers(RINGS + 0x40000, RINGS + 0x40100), st.integers(0, 64), st.booleans()), min_size=1, max_size=40
).map(lambda parts: sorted(parts, key=lambda part: part[2]))


class NoLog:
    def mark(self, guest_addr, length):
        raise AssertionError("nothing was written")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_chain_is_read_as_the_specification_says(data):
    driver = Driver(8, log=data.draw(st.sampled_from([None, NoLog()])))
    for _ in range(2):
        kind = data.draw(st.sampled_from(["wild", "honest", "broken"]))
        if kind == "wild":
            for i, entry in enumerate(data.draw(st.lists(entries, max_size=8))):
                driver.descriptor(i, *entry)
            for i, entry in enumerate(data.draw(st.lists(entries, max_size=12))):
                struct.pack_into("<QIHH", driver.ram, 0x40000 + 16 * i, *entry)
            head = data.draw(st.integers(0, 8))
        else:
            parts = data.draw(good)
            head = driver.indirect(parts, at=RINGS + 0x80000)
            if kind == "broken":
                index = data.draw(st.integers(0, len(parts) - 1))
                struct.pack_into("<QIHH", driver.ram, 0x80000 + 16 * index, *data.draw(entries))
        for _ in range(2):  # the second time a queue may know the form
            driver.make_available(head)
            chain = driver.queue.pop()
            expected = model(driver, head)
            assert (expected is None) == bool(chain.bad), chain.bad
            if expected is not None:
                assert (driver.bytes_of(chain.readable), driver.bytes_of(chain.writable)) == expected
                assert all(len(view) for view in chain.readable + chain.writable)
            driver.queue.push(chain.head, 0)
            driver.queue.publish()
        assert driver.reap() == [(head, 0)] * 2


@pytest.mark.parametrize("count", [1, 4, 5, 18])
@pytest.mark.parametrize("make", ["direct", "indirect"])
def test_descriptors_rewritten_at_any_step_of_their_reading_lead_nowhere_else(make, count):
    parts = [(RINGS + 0x40000 + 0x100 * i, 16, i > 1) for i in range(count)]
    outside = struct.pack("<QIHH", END - 8, 0xFFFFFFFF, NEXT | WRITE, 0)
    within = struct.pack("<QIHH", RINGS + 0x80000, 64, INDIRECT, 0)
    for change in (outside, within, bytes(16), b"\xff" * 16):
        step = steps = 0
        while step == steps:  # until a whole reading had no such step
            driver = Driver(64)
            head = getattr(driver, make)(parts)
            for _ in range(2):  # the second time a queue may know the form
                steps = 0
                driver.make_available(head)

                def trace(frame, event, argument, driver=driver, step=step, change=change):
                    nonlocal steps
                    if frame.f_code.co_filename != ring_module.__file__:
                        return None
                    if event == "line":
                        if steps == step:
                            driver.ram[driver.desc : driver.desc + 16 * 64] = change * 64
                            driver.ram[0x80000 : 0x80000 + 16 * count] = change * count
                        steps += steps <= step
                    return trace

                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    chain = driver.queue.pop()
                finally:
                    sys.settrace(before)
                assert all(driver.offset_of(view) and len(view) for view in chain.readable + chain.writable)
                assert not chain.bad or not chain.readable + chain.writable
                driver.queue.push(chain.head, 0)
                driver.queue.publish()
                getattr(driver, make)(parts)
            assert driver.reap() == [(head, 0)] * 2
            step += 1
        assert step > 5
