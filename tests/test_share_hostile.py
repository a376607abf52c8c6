"""A hostile guest, and a front end that has gone mad: `fusewire share` answers or drops, and goes on.

After each case the same connection still answers an honest request, the daemon holds the descriptors that it held
before, and no byte next to guest memory has changed (the fixture `guest`). Long because it is a list of cases.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import daemons
from fusewire.testing.guest import FakeGuest, Shape
from fusewire.testing.guest_frontend import (
    F_INDIRECT,
    F_LOG_ALL,
    FEATURES,
    NEED_REPLY,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    REPLY,
    VERSION,
    Frontend,
    Message,
    Refused,
)
from fusewire.testing.guest_ring import DESCRIPTOR, INDIRECT, NEXT, PAGE, WRITE, Broken, Memory
from fusewire.testing.replies import BY_NAME, body_of, request
from fusewire.wire import abi, codec
from fusewire.wire.table import TABLE, layout

KIND = "fusewire"
WHY = daemons.missing(KIND)
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

PATIENCE = 10.0
MEMORY = 512 << 20  # more than a daemon needs for what an honest guest asks for
NOWHERE = 0xDEAD_BEEF_0000
Case = Callable[[FakeGuest], object]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fusewire-hostile-", dir="/tmp") as name:
        root = Path(name)
        share = root / "share"
        (share / "dir" / "inner").mkdir(parents=True)
        (share / "hello.txt").write_bytes(b"hello world\n")
        (share / "ab").write_bytes(b"two letters\n")
        (share / "big").write_bytes(bytes(range(256)) * 8192)
        (root / "secret").write_bytes(b"not shared\n")
        yield root


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[daemons.Daemon]:
    found = daemons.Daemon(KIND, place / "share", place, ["--tag", "fs"])
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
def daemon(running: daemons.Daemon) -> daemons.Daemon:
    """One daemon for all cases: what one case leaves behind, the next ones meet."""
    assert running.alive(), "an earlier case has ended the daemon"
    return running


def look(guest: FakeGuest) -> None:
    """An honest look at the share."""
    assert guest.read_file(b"hello.txt") == b"hello world\n"
    guest.forget_all()


def open_files(daemon: daemons.Daemon) -> list[str]:
    return sorted(target.partition(":[")[0] for target in daemon.descriptors().values())


def peak(daemon: daemons.Daemon) -> int:
    """The most memory that the daemon has ever had, in bytes."""
    with open(f"/proc/{daemon.pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


@pytest.fixture
def guest(daemon: daemons.Daemon) -> Iterator[FakeGuest]:
    """A guest that is at home. When the case is over, it gets honest answers; after a reset, all is as before."""
    with FakeGuest.connect(daemon.socket, memory=Memory(16 << 20, 3)) as found:
        found.init()
        look(found)
        before, said = open_files(daemon), len(daemon.output())
        yield found
        assert daemon.alive(), daemon.output()
        found.shape = Shape()
        look(found)
        found.check()
        recover(found)
        look(found)
        deadline = time.monotonic() + PATIENCE
        while (after := open_files(daemon)) != before and time.monotonic() < deadline:
            look(found)
        assert after == before
        assert peak(daemon) < MEMORY
        assert "Traceback" not in daemon.output()[said:]


def recover(guest: FakeGuest) -> None:
    """Reset the device, as a driver does that finds its ring broken: on the same connection."""
    guest.reboot()
    guest.init()


# Chains. Each case gives rows of a descriptor table; the chain begins at the first.

Row = tuple[int, int, int, int]


class Block:
    """A good LOOKUP in memory, as material for chains that are not good."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.sent = request(abi.FUSE_LOOKUP, 1, b"hello.txt\0", unique=4242)
        self.gpa = guest.memory.alloc(PAGE)
        self.reply = guest.memory.alloc(PAGE)
        guest.memory.write(self.gpa, self.sent)
        self.size = len(self.sent)
        region = guest.memory.region(self.gpa)
        self.end = region.gpa + region.size

    def good(self, first: int = 0, at: int = 0) -> list[Row]:
        return [(self.gpa, self.size, NEXT, at + first + 1), (self.reply, 144, WRITE, 0)]


CHAINS: dict[str, Callable[[Block], list[Row]]] = {
    "a descriptor that follows itself": lambda b: [(b.gpa, b.size, NEXT, 0)],
    "a loop of two": lambda b: [(b.gpa, b.size, NEXT, 1), (b.gpa, 1, NEXT, 0)],
    "a loop of what is writable": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 144, NEXT | WRITE, 1)],
    "a loop of empty descriptors": lambda b: [(b.gpa, 0, NEXT, 1), (b.gpa, 0, NEXT, 0)],
    "next behind the table": lambda b: [(b.gpa, b.size, NEXT, 5000)],
    "next as large as can be": lambda b: [(b.gpa, b.size, NEXT, 0xFFFF)],
    "an address outside memory": lambda b: [(NOWHERE, 40, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "a reply outside memory": lambda b: [(b.gpa, b.size, NEXT, 1), (NOWHERE, 144, WRITE, 0)],
    "an address before the end of addresses": lambda b: [(2**64 - 8, 40, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "a reply that reaches over the end of addresses": lambda b: [
        (b.gpa, b.size, NEXT, 1),
        (2**64 - 8, 144, WRITE, 0),
    ],
    "a request over the end of its region": lambda b: [(b.end - 8, 40, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "a reply over the end of its region": lambda b: [(b.gpa, b.size, NEXT, 1), (b.end - 8, 144, WRITE, 0)],
    "a reply that begins at the end of its region": lambda b: [(b.gpa, b.size, NEXT, 1), (b.end, 144, WRITE, 0)],
    "a length of 2^32 - 1": lambda b: [(b.gpa, 2**32 - 1, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "a reply of 2^32 - 1": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 2**32 - 1, WRITE, 0)],
    "readable behind writable": lambda b: [(b.reply, 144, NEXT | WRITE, 1), (b.gpa, b.size, 0, 0)],
    "writable between readable": lambda b: [
        (b.gpa, 40, NEXT, 1),
        (b.reply, 144, NEXT | WRITE, 2),
        (b.gpa + 40, b.size - 40, 0, 0),
    ],
    "nothing but an empty descriptor": lambda b: [(b.gpa, 0, 0, 0)],
    "empty descriptors outside memory": lambda b: [(NOWHERE, 0, NEXT, 1), (NOWHERE, 0, WRITE, 0)],
    "nothing to read": lambda b: [(b.reply, 144, WRITE, 0)],
    "flags that do not exist": lambda b: [(b.gpa, b.size, 0xFFF8 | NEXT, 1), (b.reply, 144, 0xFFF8 | WRITE, 0)],
    "a request of one byte": lambda b: [(b.gpa, 1, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "a request of 39 bytes": lambda b: [(b.gpa, 39, NEXT, 1), (b.reply, 144, WRITE, 0)],
    "no room to answer": lambda b: [(b.gpa, b.size, 0, 0)],
    "room for a byte": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 1, WRITE, 0)],
    "room for 15 bytes": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 15, WRITE, 0)],
    "room for the header only": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 16, WRITE, 0)],
    "room for all but a byte": lambda b: [(b.gpa, b.size, NEXT, 1), (b.reply, 143, WRITE, 0)],
}


def check_strays(guest: FakeGuest, room: int) -> None:
    """What was used of chains that no honest driver makes claims no more bytes than there was room for."""
    assert all(used.written <= room for used in guest.strays)
    guest.strays.clear()


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_descriptors_in_the_ring(guest: FakeGuest, name: str) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    for _ in range(3):
        rows = CHAINS[name](block)
        slots = sorted(queue.free[: len(rows)])
        for slot, (gpa, size, flags, following) in zip(slots, rows, strict=True):
            queue.write_desc(slot, gpa, size, flags, slots[following] if following < len(slots) else following)
        del queue.free[: len(rows)]
        guest.throw(slots[0])
        look(guest)
        queue.free += slots
    assert [used.head for used in guest.strays], "the device keeps the descriptors"
    check_strays(guest, 144)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_descriptors_in_a_table(guest: FakeGuest, name: str) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    slot = queue.free.pop()
    for padding in (0, 3, 2000):
        table = guest.memory.alloc(1 << 16)
        size = queue.write_table(table, CHAINS[name](block) + [(block.gpa, 1, 0, 0)] * padding)
        queue.write_desc(slot, table, size, INDIRECT)
        guest.throw(slot)
        look(guest)
        guest.memory.free(table, 1 << 16)
    queue.free.append(slot)
    assert len(guest.strays) == 3, "the device keeps the descriptors"
    check_strays(guest, 144)


TABLES: dict[str, Callable[[Block, int], Row]] = {
    "empty": lambda b, table: (table, 0, INDIRECT, 0),
    "of one byte": lambda b, table: (table, 1, INDIRECT, 0),
    "of 17 bytes": lambda b, table: (table, 17, INDIRECT, 0),
    "of 31 bytes": lambda b, table: (table, 31, INDIRECT, 0),
    "of 2^32 - 16 bytes": lambda b, table: (table, 2**32 - 16, INDIRECT, 0),
    "of 2^32 - 1 bytes": lambda b, table: (table, 2**32 - 1, INDIRECT, 0),
    "outside memory": lambda b, table: (NOWHERE, 32, INDIRECT, 0),
    "over the end of a region": lambda b, table: (b.end - 16, 32, INDIRECT, 0),
    "over the end of addresses": lambda b, table: (2**64 - 16, 32, INDIRECT, 0),
    "at an odd address": lambda b, table: (table + 1, 32, INDIRECT, 0),
    "and something after it": lambda b, table: (table, 32, INDIRECT | NEXT, 0),
    "that is writable": lambda b, table: (table, 32, INDIRECT | WRITE, 0),
    "with everything set": lambda b, table: (table, 32, 0xFFFF, 0xFFFF),
    "in the ring's own table": lambda b, table: (b.guest.front.queues[1].desc_gpa, 16 * 128, INDIRECT, 0),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_descriptors(guest: FakeGuest, name: str) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    table = guest.memory.alloc(PAGE)
    queue.write_table(table, block.good())
    slot = queue.free.pop()
    queue.write_desc(slot, *TABLES[name](block, table))
    guest.throw(slot)
    look(guest)
    assert guest.strays, "the device keeps the descriptor"
    check_strays(guest, 144)


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE])
def test_a_table_within_a_table(guest: FakeGuest, flags: int) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    inner, outer = guest.memory.alloc(PAGE), guest.memory.alloc(PAGE)
    queue.write_table(inner, block.good())
    for rows in (
        [(inner, 32, flags, 1), (block.reply, 144, WRITE, 0)],
        [(block.gpa, block.size, NEXT, 1), (inner, 32, flags, 0)],
        [(outer, 16, flags, 0)],
    ):
        slot = queue.free.pop()
        queue.write_desc(slot, outer, queue.write_table(outer, rows), INDIRECT)
        guest.throw(slot)
        look(guest)
    assert len(guest.strays) == 3
    assert {used.written for used in guest.strays} == {0}


def test_a_table_after_descriptors_of_the_ring(guest: FakeGuest) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    table = guest.memory.alloc(PAGE)
    queue.write_table(table, block.good())
    first, second = queue.free.pop(), queue.free.pop()
    queue.write_desc(first, block.gpa, block.size, NEXT, second)
    queue.write_desc(second, table, 32, INDIRECT)
    guest.throw(first)
    look(guest)
    check_strays(guest, 144)


@pytest.mark.parametrize("rows", [20_000, 65_536, 262_144])
@pytest.mark.parametrize("size", [0, 1])
def test_a_table_of_very_many_descriptors(guest: FakeGuest, rows: int, size: int) -> None:
    """More than a ring may have. `next` has 16 bits: beyond those, it leads back."""
    block = Block(guest)
    queue = guest.front.queues[1]
    table = guest.memory.alloc(16 * rows)
    data = b"".join(DESCRIPTOR.pack(block.gpa, size, NEXT, (number + 1) & 0xFFFF) for number in range(rows))
    guest.memory.write(table, data)
    slot = queue.free.pop()
    queue.write_desc(slot, table, len(data), INDIRECT)
    guest.throw(slot)
    look(guest)
    assert [used.written for used in guest.strays] == [0]


def test_room_for_more_than_four_gigabytes(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"big")
    fh, _ = guest.open(entry.nodeid)
    queue = guest.front.queues[1]
    body = body_of("read", fh, 0, 0xFFFF_FFFF, 0, 0, 0)
    sent = request(abi.FUSE_READ, entry.nodeid, body, unique=4242)
    gpa, room = guest.memory.alloc(PAGE), guest.memory.alloc(1 << 20)
    guest.memory.write(gpa, sent)
    table = guest.memory.alloc(1 << 17)
    count = 4200  # times a megabyte, the same one
    rows = [(gpa, len(sent), NEXT, 1)]
    rows += [
        (room, 1 << 20, WRITE | (NEXT if n < count else 0), n + 1 if n < count else 0) for n in range(1, count + 1)
    ]
    slot = queue.free.pop()
    queue.write_desc(slot, table, queue.write_table(table, rows), INDIRECT)
    guest.throw(slot)
    look(guest)
    assert len(guest.strays) == 1
    guest.release(entry.nodeid, fh)
    guest.forget_all()


def test_a_request_of_more_than_four_gigabytes(guest: FakeGuest) -> None:
    queue = guest.front.queues[1]
    gpa, data, reply = guest.memory.alloc(PAGE), guest.memory.alloc(1 << 20), guest.memory.alloc(PAGE)
    for count in (3, 4200):  # times a megabyte, the same one
        body = body_of("write", 0, 0, min(count << 20, 0xFFFF_FFFF), 0, 0, 0)
        sent = request(abi.FUSE_WRITE, 1, body, unique=4242)
        length = min(len(sent) + (count << 20), 0xFFFF_FFFF)
        guest.memory.write(gpa, struct.pack("=I", length) + sent[4:])
        table = guest.memory.alloc(1 << 17)
        rows = [(gpa, len(sent), NEXT, 1)]
        rows += [(data, 1 << 20, NEXT, n + 1) for n in range(1, count + 1)]
        rows.append((reply, 24, WRITE, 0))
        slot = queue.free.pop()
        queue.write_desc(slot, table, queue.write_table(table, rows), INDIRECT)
        guest.throw(slot)
        look(guest)
    assert len(guest.strays) == 2
    check_strays(guest, 24)


def test_a_table_where_none_was_agreed_on(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.stop()
    guest.front.features &= ~F_INDIRECT
    for queue in guest.front.queues:
        queue.reset()
        queue.indirect = False
    guest.front.start(guest.front.queues, memory=False)
    guest.init()
    block = Block(guest)
    queue = guest.front.queues[1]
    table = guest.memory.alloc(PAGE)
    slot = queue.free.pop()
    queue.write_desc(slot, table, queue.write_table(table, block.good()), INDIRECT)
    guest.throw(slot)
    look(guest)
    assert {used.written for used in guest.strays} <= {0}


@pytest.mark.parametrize("head", [128, 129, 0x7FFF, 0xFFFF])
def test_a_head_behind_the_table(guest: FakeGuest, head: int) -> None:
    guest.throw(head)
    look(guest)
    assert {used.written for used in guest.strays} <= {0}


def test_the_same_head_many_times(guest: FakeGuest) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    slot = queue.free.pop()
    table = guest.memory.alloc(PAGE)
    queue.write_desc(slot, table, queue.write_table(table, block.good()), INDIRECT)
    guest.throw(slot, times=50)
    look(guest)
    assert 1 <= len(guest.strays) <= 50
    check_strays(guest, 144)


def test_a_reply_that_overwrites_its_own_request(guest: FakeGuest) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    for shift in (0, 1, 39, 60):
        guest.memory.write(block.gpa, block.sent)
        table = guest.memory.alloc(PAGE)
        slot = queue.free.pop()
        rows = [(block.gpa, block.size, NEXT, 1), (block.gpa + shift, 144, WRITE, 0)]
        queue.write_desc(slot, table, queue.write_table(table, rows), INDIRECT)
        guest.throw(slot)
        look(guest)
        if guest.strays.pop().written:
            length, error, unique = codec.OUT_HEADER.unpack(guest.memory.read(block.gpa + shift, 16))
            assert (length, unique) == (144, 4242) or error
            guest.forget(guest.lookup(1, b"hello.txt").nodeid, 2)
            guest.lookups.clear()


def test_replies_into_the_same_memory(guest: FakeGuest) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    slot = queue.free.pop()
    table = guest.memory.alloc(PAGE)
    rows = [
        (block.gpa, block.size, NEXT, 1),
        *[(block.reply, 144, WRITE | NEXT, n) for n in range(2, 9)],
        (block.reply, 9, WRITE, 0),
    ]
    queue.write_desc(slot, table, queue.write_table(table, rows), INDIRECT)
    guest.throw(slot)
    look(guest)
    check_strays(guest, 144)


@pytest.mark.parametrize("target", ["desc", "avail", "used", "table"])
def test_a_read_into_the_rings(guest: FakeGuest, target: str) -> None:
    """The guest spoils its own ring; then it resets the device, and all is well."""
    entry = guest.lookup(1, b"big")
    fh, _ = guest.open(entry.nodeid)
    queue = guest.front.queues[1]
    gpa, table = guest.memory.alloc(PAGE), guest.memory.alloc(PAGE)
    sent = request(abi.FUSE_READ, entry.nodeid, body_of("read", fh, 0, 1000, 0, 0, 0), unique=4242)
    guest.memory.write(gpa, sent)
    where = {"desc": queue.desc_gpa, "avail": queue.avail_gpa, "used": queue.used_gpa, "table": table}[target]
    slot = queue.free.pop()
    rows = [(gpa, len(sent), NEXT, 1), (where, 200, WRITE, 0)]
    queue.write_desc(slot, table, queue.write_table(table, rows), INDIRECT)
    for _ in range(3):
        queue.push(slot)
        queue.kick(force=True)
    guest.front.sync()
    recover(guest)


@pytest.mark.parametrize("step", [129, 1000, 32768, 65535])
def test_an_available_index_that_runs_away(guest: FakeGuest, step: int) -> None:
    queue = guest.front.queues[1]
    queue.set_avail(queue.avail + step)
    os.eventfd_write(queue.kick_fd, 1)
    unique = guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0))
    with pytest.raises((Broken, TimeoutError)):
        guest.finish(unique, timeout=0.3)
    recover(guest)


def test_a_broken_queue_leaves_the_others_alone(guest: FakeGuest) -> None:
    broken, good = guest.front.queues
    broken.set_avail(5000)
    os.eventfd_write(broken.kick_fd, 1)
    for _ in range(5):
        unique = guest.submit(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0))
        assert guest.reap([good]).unique == unique
    recover(guest)


def test_kicks_without_end_and_without_reason(guest: FakeGuest) -> None:
    for queue in guest.front.queues:
        for _ in range(2000):
            os.eventfd_write(queue.kick_fd, 1)
    os.eventfd_write(guest.front.queues[1].kick_fd, 2**63)


def test_random_descriptors(guest: FakeGuest) -> None:
    """Rings full of chance: the device may take them for what they are, and after a reset all is well."""
    chance = random.Random(4)
    block = Block(guest)
    queue = guest.front.queues[1]
    places = [block.gpa, block.reply, block.end - 4, NOWHERE, queue.desc_gpa, queue.used_gpa, 0, 2**64 - 1]
    for _ in range(15):
        table = guest.memory.alloc(PAGE)
        for gpa, count in ((queue.desc_gpa, 128), (table, 64)):
            rows = []
            for _ in range(count):
                size = chance.choice([0, 1, 16, 40, 52, 100, 144, 1024, 2**16, 2**32 - 1, chance.getrandbits(32)])
                flags = chance.choice([0, NEXT, NEXT, WRITE, NEXT | WRITE, INDIRECT, 0xFFFF])
                rows.append((chance.choice([*places, table]), size, flags, chance.randrange(130)))
            queue.write_table(gpa, rows)
        for _ in range(20):
            queue.push(chance.randrange(128))
        queue.kick(force=True)
        guest.front.sync()
        assert guest.reap([guest.front.queues[0]]) if guest.submit(abi.FUSE_FORGET, 99, bytes(8)) else False
        guest.memory.free(table, PAGE)
        recover(guest)


# Requests


HEADERS = {
    "a length of 0": lambda sent: struct.pack("=I", 0) + sent[4:],
    "a length of 39": lambda sent: struct.pack("=I", 39) + sent[4:],
    "a length of 40": lambda sent: struct.pack("=I", 40) + sent[4:],
    "a byte too short": lambda sent: struct.pack("=I", len(sent) - 1) + sent[4:],
    "a byte too long": lambda sent: struct.pack("=I", len(sent) + 1) + sent[4:],
    "a length of 2^32 - 1": lambda sent: struct.pack("=I", 2**32 - 1) + sent[4:],
    "bytes behind it": lambda sent: sent + b"behind",
    "a mebibyte behind it": lambda sent: sent + bytes(1 << 20),
    "extensions that are not there": lambda sent: sent[:36] + b"\xff\xff" + sent[38:],
    "an extension of everything": lambda sent: sent[:36] + struct.pack("=H", len(sent) // 8) + sent[38:],
    "unique 0": lambda sent: sent[:8] + bytes(8) + sent[16:],
    "the largest unique": lambda sent: sent[:8] + b"\xff" * 8 + sent[16:],
    "ids that do not exist": lambda sent: sent[:24] + b"\xff" * 12 + sent[36:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(guest: FakeGuest, name: str) -> None:
    for opcode, body in ((abi.FUSE_LOOKUP, b"hello.txt\0"), (abi.FUSE_GETATTR, bytes(16)), (abi.FUSE_MKDIR, bytes(8))):
        sent = HEADERS[name](request(opcode, 1, body, unique=77))
        done = guest.request(sent)
        assert done.unique == int.from_bytes(sent[8:16], "little")
        if done.error == 0 and opcode == abi.FUSE_LOOKUP:
            guest.forget(int.from_bytes(done.body[:8], "little"))
            guest.lookups.clear()


@pytest.mark.parametrize("opcode", [0, 7, 19, 54, 63, 64, 4095, 4096, 2**31, 2**32 - 1])
def test_an_opcode_that_does_not_exist(guest: FakeGuest, opcode: int) -> None:
    for queue in (0, 1):
        assert guest.request(request(opcode, 1, bytes(100), unique=7), queue=queue).error == errno.ENOSYS


NAMES = [
    b"",
    b"\0",
    b"hello.txt",
    b".\0",
    b"..\0",
    b"/\0",
    b"../secret\0",
    b"dir/inner\0",
    b"a" * 256 + b"\0",
]
NAMES += [b"a" * 70000 + b"\0", b"a" * 4096, b"\0" * 300, b"/etc/passwd\0", b"dir\0\0"]


@pytest.mark.parametrize("op", [op for op in TABLE if op.names], ids=lambda op: op.name)
def test_names_that_are_none(place: Path, guest: FakeGuest, op: object) -> None:
    row = BY_NAME[op.name]  # type: ignore[attr-defined]
    before = sorted(path.name for path in place.rglob("*"))
    fixed = bytes(layout(row.args).size) if row.args else b""
    for name in NAMES:
        for body in {name, b"dir\0" + name, name + b"dir\0"} if row.names == 2 else {name}:
            if row.name == "symlink" and body.count(b"\0") == 2:
                continue  # whatever is not empty may be a link's target
            done = guest.request(request(row.code, 1, fixed + body, unique=9), room=4096)
            assert done.error, f"{row.name} of {body[:40]!r}"
    assert sorted(path.name for path in place.rglob("*")) == before


def test_a_lookup_never_leaves_the_share(place: Path, guest: FakeGuest) -> None:
    shared = {path.stat().st_ino for path in [place / "share", *(place / "share").rglob("*")]}
    for name in (b"..\0", b".\0", b"../secret\0", b"dir/../../secret\0", b"/\0", b"..", b"../\0"):
        for parent in (1, 2, 0, 2**64 - 1):
            done = guest.request(request(abi.FUSE_LOOKUP, parent, name, unique=9))
            if done.error == 0:
                assert codec.ENTRY_OUT.unpack(done.body[:128])[6] in shared
                guest.forget(int.from_bytes(done.body[:8], "little"))
    guest.lookups.clear()


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
def test_bodies_of_zeros_of_ones_and_cut_short(guest: FakeGuest, op: object) -> None:
    row = BY_NAME[op.name]  # type: ignore[attr-defined]
    need = (layout(row.args).size if row.args else 0) + 8 * row.names
    for filler in (b"\0", b"\xff", b"a"):
        for size in sorted({0, 1, need // 2, max(0, need - 1), need, need + 1, need + 300}):
            for node in (0, 1, 2, 999, 2**64 - 1):
                sent = request(row.code, node, filler * size, unique=12)
                guest.request(sent, room=4096)
                guest.request(sent, room=None)
                if row.code in (abi.FUSE_DESTROY, abi.FUSE_INIT):
                    recover(guest)
    recover(guest)


COUNTS = {
    "READ": (abi.FUSE_READ, "read"),
    "READDIR": (abi.FUSE_READDIR, "readdir"),
    "READDIRPLUS": (abi.FUSE_READDIRPLUS, "readdirplus"),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("room", [None, 0, 1, 100, 4096, 1 << 20])
def test_sizes_beyond_all_room(guest: FakeGuest, name: str, room: int | None) -> None:
    opcode, field = COUNTS[name]
    entry = guest.lookup(1, b"big")
    directory = field != "read"
    node = 1 if directory else entry.nodeid
    fh, _ = guest.opendir(1) if directory else guest.open(node)
    for size in (2**32 - 1, 2**32 - 4096, 2**31, 2**31 - 1, 1 << 24, (1 << 20) + 1):
        for offset in (0, 2**63 - 1, 2**63, 2**64 - 1):
            done = guest.request(request(opcode, node, body_of(field, fh, offset, size, 0, 0, 0), unique=5), room=room)
            assert len(done.body) <= (room or 0)


@pytest.mark.parametrize("name", ["getxattr", "listxattr"])
def test_xattrs_of_four_gigabytes(guest: FakeGuest, name: str) -> None:
    for size in (2**32 - 1, 2**31, 65537):
        names = [b"user.any"] if name == "getxattr" else []
        done = guest.request(request(BY_NAME[name].code, 1, body_of(name, size, names=names), unique=5), room=100)
        assert len(done.body) <= 100
    body = body_of("setxattr", 2**32 - 1, 0, 0, names=[b"user.any"], tail=b"short")
    assert guest.request(request(abi.FUSE_SETXATTR, 1, body, unique=5)).error


def test_a_write_that_lies_of_its_length(place: Path, guest: FakeGuest) -> None:
    entry, fh, _ = guest.create(1, b"written")
    try:
        for size in (0, 3, 5, 4096, 1 << 20, 2**31, 2**32 - 1):
            for offset in (0, 2**63 - 2, 2**63, 2**64 - 1):
                for tail in (b"", b"data"):
                    body = body_of("write", fh, offset, size, 0, 0, 0, tail=tail)
                    done = guest.request(request(abi.FUSE_WRITE, entry.nodeid, body, unique=5), room=8)
                    if done.error == 0:
                        assert int.from_bytes(done.body[:4], "little") <= len(tail)
        assert (place / "share" / "written").stat().st_size <= 2 * PAGE
    finally:
        guest.release(entry.nodeid, fh)
        guest.unlink(1, b"written")
        guest.forget_all()


@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 1000, 1, 0])
def test_batch_forgets_of_what_is_not_there(guest: FakeGuest, count: int) -> None:
    items = b"".join(codec.FORGET_ONE.pack(node, 2**64 - 1) for node in (0, 1, 2, 99, 2**64 - 1))
    for tail in (b"", items, items[:-3]):
        for queue in (0, 1):
            for room in (None, 100):
                body = body_of("batch_forget", count, tail=tail)
                guest.request(request(abi.FUSE_BATCH_FORGET, 0, body, unique=3), queue=queue, room=room)


@pytest.mark.parametrize("count", [1, 2, 2**32, 2**63, 2**64 - 1])
def test_forgets_of_more_than_was_looked_up(guest: FakeGuest, count: int) -> None:
    entry = guest.lookup(1, b"hello.txt")
    for node in (entry.nodeid, 1, 0, 12345, 2**64 - 1):
        for queue in (0, 1):
            guest.request(request(abi.FUSE_FORGET, node, codec.U64.pack(count), unique=3), queue=queue, room=None)
    guest.lookups.clear()


def test_requests_on_the_wrong_queue(guest: FakeGuest) -> None:
    for _ in range(3):
        assert guest.request(request(abi.FUSE_GETATTR, 1, bytes(16), unique=3), queue=0).error == 0
    guest.request(request(abi.FUSE_INTERRUPT, 0, codec.U64.pack(5), unique=7), queue=1, room=0)
    guest.request(request(abi.FUSE_INTERRUPT, 0, codec.U64.pack(5), unique=7), queue=0, room=None)


def test_handles_and_nodes_of_nobody(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    for node in (entry.nodeid, 1, 0, 77, 2**63, 2**64 - 1):
        for fh in (0, 1, 77, 2**31, 2**64 - 1):
            for name, fields in (
                ("read", (fh, 0, 100, 0, 0, 0)),
                ("write", (fh, 0, 0, 0, 0, 0)),
                ("flush", (fh, 0)),
                ("release", (fh, 0, 0, 0)),
                ("releasedir", (fh, 0, 0, 0)),
                ("fsync", (fh, 0)),
                ("readdir", (fh, 0, 100, 0, 0, 0)),
                ("readdirplus", (fh, 0, 100, 0, 0, 0)),
                ("lseek", (fh, 0, 4)),
                ("fallocate", (fh, 0, 1, 1)),
                ("copy_file_range", (fh, 0, node, fh, 0, 2**63, 0)),
                ("getlk", (fh, 1, 0, 9, 1, 0, 0)),
                ("setlk", (fh, 1, 0, 9, 1, 0, 0)),
            ):
                guest.request(request(BY_NAME[name].code, node, body_of(name, *fields), unique=6))
    recover(guest)


def test_requests_before_init(guest: FakeGuest) -> None:
    guest.reboot()
    for op in TABLE:
        if op.name != "init":
            guest.request(request(op.code, 1, bytes(200), unique=8), room=None if not op.reply else 200)
    guest.init()


@pytest.mark.parametrize("major", [0, 6, 8, 2**32 - 1])
@pytest.mark.parametrize("minor", [0, 5, 99, 2**32 - 1])
def test_an_init_of_another_protocol(guest: FakeGuest, major: int, minor: int) -> None:
    guest.reboot()
    for size in (64, 16, 15, 0):
        body = struct.pack("=IIIII44x", major, minor, 2**32 - 1, 2**32 - 1, 2**32 - 1)[:size]
        guest.request(request(abi.FUSE_INIT, 0, body, unique=8), room=64)
    guest.reboot()
    guest.init()


def test_init_and_destroy_in_any_order(guest: FakeGuest) -> None:
    for _ in range(5):
        guest.lookup(1, b"dir")
        guest.opendir(1)
        guest.destroy()
        guest.request(request(abi.FUSE_GETATTR, 1, bytes(16), unique=8))
        guest.request(request(abi.FUSE_DESTROY, 0, unique=8), room=0)
        guest.init()
        guest.init()
        guest.lookup(1, b"dir")
    recover(guest)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Have another process of the guest do something again and again: memory is shared."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                act()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_request_that_changes_while_it_is_read(place: Path, guest: FakeGuest) -> None:
    """A name that the guest's other processor rewrites is either the one or the other, and never one that is none."""
    shared = {(place / "share" / "ab").stat().st_ino}
    sent = request(abi.FUSE_LOOKUP, 1, b"ab\0", unique=10)
    gpa = guest.memory.alloc(PAGE)
    view = guest.memory.at(gpa, len(sent))
    guest.careful = False
    length, readlink, lookup = sent[:4], struct.pack("=I", abi.FUSE_READLINK), sent[4:8]

    def rewrite() -> None:
        view[40:42] = b".."
        view[0:4] = b"\xff\xff\xff\xff"
        view[4:8] = readlink
        view[0:4] = length
        view[4:8] = lookup
        view[40:42] = b"ab"

    with meanwhile(rewrite):
        for _ in range(3000):
            done = guest.request(sent, shape=Shape(at=gpa), room=128)
            assert done.unique == 10
            if done.error == 0:
                assert codec.ENTRY_OUT.unpack(done.body[:128])[6] in shared
                guest.forget(int.from_bytes(done.body[:8], "little"))
    guest.careful = True
    guest.lookups.clear()


def test_a_table_that_changes_while_it_is_read(guest: FakeGuest) -> None:
    block = Block(guest)
    queue = guest.front.queues[1]
    table = guest.memory.alloc(PAGE)
    good = b"".join(DESCRIPTOR.pack(*row) for row in block.good())
    evil = [
        DESCRIPTOR.pack(block.gpa, 2**32 - 1, NEXT, 1) + DESCRIPTOR.pack(NOWHERE, 144, WRITE, 0),
        DESCRIPTOR.pack(block.gpa, block.size, NEXT, 0) + DESCRIPTOR.pack(block.reply, 2**31, WRITE | NEXT, 1),
    ]
    view = guest.memory.at(table, 32)
    view[:] = good
    slot = queue.free.pop()
    queue.write_desc(slot, table, 32, INDIRECT)

    def rewrite() -> None:
        for rows in evil:
            view[:] = rows
            view[:] = good

    with meanwhile(rewrite):
        for _ in range(1000):
            guest.throw(slot)
            guest.getattr(1)
    assert len(guest.strays) == 1000
    check_strays(guest, 2**31)


def test_a_lock_that_is_waited_for_stalls_nobody(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    one, _ = guest.open(entry.nodeid, os.O_RDWR)
    two, _ = guest.open(entry.nodeid, os.O_RDWR)
    lock = (0, 9, 1, 1)
    try:
        guest.call("setlk", entry.nodeid, one, 1, *lock, 0)
    except OSError:
        guest.release(entry.nodeid, one)
        guest.release(entry.nodeid, two)
        guest.forget_all()
        pytest.skip("locks are not forwarded here")
    waiting = [guest.start(abi.FUSE_SETLKW, entry.nodeid, body_of("setlkw", two, n, *lock, 0)) for n in range(2, 40)]
    for _ in range(5):
        guest.getattr(1)
    assert not any(map(guest.answered, waiting))
    recover(guest)  # with all of them waiting


# Messages


def read_any(front: Frontend) -> int:
    """Read one message from the daemon, whatever it is, and give its number."""
    fds: list[int] = []
    number, _, size = struct.unpack("<III", front._exactly(12, 0, fds))
    front._exactly(size, 0, fds)
    for fd in fds:
        os.close(fd)
    return int(number)


def settle(front: Frontend, junk: int) -> None:
    """Read whatever the daemon answers to a message `junk`, until it has answered an honest one."""
    marker = Message.GET_QUEUE_NUM if junk != Message.GET_QUEUE_NUM else Message.GET_FEATURES
    front.send(marker)
    while read_any(front) != marker:
        pass


MESSAGES = sorted(value for name, value in vars(Message).items() if name.isupper())
UNKNOWN = [0, 19, 20, 22, 23, 26, 27, 28, 29, 30, 33, 35, 39, 40, 41, 45, 99, 2**31, 2**32 - 1]
INDEXED = [Message.SET_VRING_KICK, Message.SET_VRING_CALL, Message.SET_VRING_ERR]


@pytest.mark.parametrize("number", UNKNOWN)
def test_a_message_that_does_not_exist(guest: FakeGuest, number: int) -> None:
    for payload in (b"", bytes(8), bytes(200)):
        with pytest.raises(Refused):
            guest.front.tell(number, payload)
        guest.front.send(number, payload)
        settle(guest.front, number)


def stop_and_forget(guest: FakeGuest) -> None:
    """After messages of chance nothing of the set-up need be as it was: connect anew in the same process."""
    guest.reconnect()
    recover(guest)


@pytest.mark.parametrize("number", MESSAGES)
def test_messages_of_a_wrong_length(guest: FakeGuest, number: int) -> None:
    for size in (0, 1, 4, 7, 8, 9, 12, 16, 20, 24, 32, 40, 41, 100, 256, 300):
        for flags in (VERSION, VERSION | NEED_REPLY):
            guest.front.send(number, bytes(size), flags=flags)
            settle(guest.front, number)
    stop_and_forget(guest)


@pytest.mark.parametrize("number", MESSAGES + [99])
def test_descriptors_that_nobody_asked_for(guest: FakeGuest, number: int) -> None:
    with tempfile.TemporaryFile() as file:
        for count in (1, 2, 8, 16):
            for size in (0, 8, 40):
                guest.front.send(number, bytes(size), [file.fileno()] * count)
                settle(guest.front, number)
    stop_and_forget(guest)


@pytest.mark.parametrize("number", INDEXED + [Message.SET_LOG_FD, Message.SET_BACKEND_REQ_FD])
@pytest.mark.parametrize("kind", ["pipe", "file", "directory", "socket", "null"])
def test_descriptors_of_another_kind(guest: FakeGuest, number: int, kind: str, tmp_path: Path) -> None:
    fds = []
    if kind == "pipe":
        fds += os.pipe()
    elif kind == "file":
        fds.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT))
    elif kind == "directory":
        fds.append(os.open(tmp_path, os.O_RDONLY))
    elif kind == "null":
        fds.append(os.open("/dev/null", os.O_RDWR))
    else:
        fds += [end.detach() for end in socket.socketpair()]
    try:
        payload = struct.pack("<Q", 1) if number in INDEXED else b""
        for fd in fds:
            guest.front.send(number, payload, [fd])
            settle(guest.front, number)
        guest.front.queues[1].push(0)
        os.eventfd_write(guest.front.queues[1].kick_fd, 1)
        guest.front.sync()
    finally:
        for fd in fds:
            os.close(fd)
    stop_and_forget(guest)


@pytest.mark.parametrize("number", [*INDEXED, Message.ADD_MEM_REG, Message.SET_MEM_TABLE, Message.SET_LOG_BASE])
def test_descriptors_that_are_missing(guest: FakeGuest, number: int) -> None:
    payload = {
        Message.ADD_MEM_REG: struct.pack("<5Q", 0, 1 << 50, PAGE, 1 << 50, 0),
        Message.SET_MEM_TABLE: struct.pack("<II4Q", 1, 0, 0, PAGE, 1 << 50, 0),
        Message.SET_LOG_BASE: struct.pack("<QQ", PAGE, 0),
    }.get(number, struct.pack("<Q", 1))
    guest.front.send(number, payload, flags=VERSION | NEED_REPLY)
    settle(guest.front, number)
    stop_and_forget(guest)


@pytest.mark.parametrize("size", [0, 3, 127, 32769, 65536, 2**31, 2**32 - 1])
def test_rings_of_impossible_sizes(guest: FakeGuest, size: int) -> None:
    front = guest.front
    with pytest.raises(Refused):
        front.set_vring_num(1, size)
    front.stop()
    with pytest.raises(Refused):
        front.set_vring_num(1, size)
    for queue in front.queues:
        queue.reset()
    front.start(front.queues, memory=False)
    guest.init()


def test_the_largest_ring_and_the_smallest(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.hang_up()
    for size in (1, 2, 32768):
        with FakeGuest.connect(daemon.socket, size=size) as other:
            other.init()
            look(other)
    guest.reconnect()
    recover(guest)


@pytest.mark.parametrize("index", [2, 3, 200, 255])
def test_a_queue_that_does_not_exist(guest: FakeGuest, index: int) -> None:
    front, queue = guest.front, guest.front.queues[1]
    if index < front.queue_limit:
        pytest.skip(f"there are {front.queue_limit} queues")
    for act in (
        lambda: front.set_vring_num(index, 128),
        lambda: front.set_vring_base(index, 0),
        lambda: front.set_vring_addr(index, 0, 0, 0),
        lambda: front.set_vring_kick(index, queue.kick_fd),
        lambda: front.set_vring_call(index, queue.call_fd),
        lambda: front.set_vring_err(index, queue.err_fd),
        lambda: front.set_vring_kick(index, None),
        lambda: front.set_vring_enable(index, True),
    ):
        with pytest.raises(Refused):
            act()
    look(guest)


@pytest.mark.parametrize("index", [256, 2**31, 2**32 - 1])
def test_an_index_beyond_a_byte(guest: FakeGuest, index: int) -> None:
    for number in (Message.SET_VRING_NUM, Message.SET_VRING_BASE, Message.SET_VRING_ENABLE):
        with pytest.raises(Refused):
            guest.front.tell(number, struct.pack("<II", index, 1))


def test_kicks_before_everything(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.hang_up()
    with Frontend(daemon.socket) as front:
        front.negotiate()
        queues = front.make_queues(2)
        front.queues = queues
        for queue in queues:
            os.eventfd_write(queue.kick_fd, 1)
            for act in (
                lambda queue=queue: front.set_vring_enable(queue.index, True),
                lambda queue=queue: front.set_vring_kick(queue.index, queue.kick_fd),
                lambda queue=queue: front.set_vring_num(queue.index, 128),
                lambda queue=queue: front.set_vring_kick(queue.index, queue.kick_fd),
            ):
                try:
                    act()
                except Refused:
                    continue
            os.eventfd_write(queue.kick_fd, 1)
        front.sync()
        for queue in queues:
            front.get_vring_base(queue.index)
        front.start(queues)
        other = FakeGuest(front)
        other.init()
        look(other)
    guest.reconnect()
    recover(guest)


ADDRESSES = ["zero", "nowhere", "odd", "end", "wrap", "gpa"]


@pytest.mark.parametrize("what", ADDRESSES)
@pytest.mark.parametrize("ring", ["desc", "used", "avail"])
def test_rings_outside_memory(guest: FakeGuest, what: str, ring: str) -> None:
    front, queue = guest.front, guest.front.queues[1]
    front.stop()
    user = front.memory.user
    good = {"desc": user(queue.desc_gpa), "used": user(queue.used_gpa), "avail": user(queue.avail_gpa)}
    region = front.memory.region(queue.desc_gpa)
    good[ring] = {
        "zero": 0,
        "nowhere": NOWHERE,
        "odd": good[ring] + 1,
        "end": region.user + region.size - 16,
        "wrap": 2**64 - 16,
        "gpa": queue.desc_gpa + 1,
    }[what]
    for act in (
        lambda: front.set_vring_addr(1, good["desc"], good["used"], good["avail"]),
        lambda: front.set_vring_kick(1, queue.kick_fd),
        lambda: front.set_vring_enable(1, True),
    ):
        try:
            act()
        except Refused:
            continue
    os.eventfd_write(queue.kick_fd, 1)
    front.sync()
    guest.reboot()
    guest.init()


def region_row(gpa: int, size: int, user: int, offset: int) -> bytes:
    return struct.pack("<QQQQ", gpa, size, user, offset)


FAR = 1 << 50
REGIONS = {
    "of no size": (FAR, 0, FAR, 0),
    "over the end of guest addresses": (2**64 - PAGE, 2 * PAGE, FAR, 0),
    "over the end of user addresses": (FAR, 2 * PAGE, 2**64 - PAGE, 0),
    "of all there is": (0, 2**64 - 1, 0, 0),
    "that begins behind its file": (FAR, PAGE, FAR, 1 << 40),
    "that ends behind its file": (FAR, 1 << 40, FAR, 0),
    "at an offset that wraps": (FAR, 2 * PAGE, FAR, 2**64 - PAGE),
    "at a negative offset": (FAR, PAGE, FAR, 2**63),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region(guest: FakeGuest, name: str) -> None:
    with pytest.raises(Refused):
        guest.front.tell(Message.ADD_MEM_REG, bytes(8) + region_row(*REGIONS[name]), [guest.memory.fd])
    look(guest)


def test_regions_that_overlap(guest: FakeGuest) -> None:
    first = guest.memory.regions[0]
    for gpa, user in (
        (first.gpa, FAR),
        (first.gpa + first.size - PAGE, FAR),
        (FAR, first.user),
        (FAR, first.user + first.size - 1),
    ):
        with pytest.raises(Refused):
            guest.front.tell(Message.ADD_MEM_REG, bytes(8) + region_row(gpa, 2 * PAGE, user, 0), [guest.memory.fd])
        look(guest)


def test_regions_of_what_cannot_be_mapped(guest: FakeGuest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    reader, writer = os.pipe()
    fds = [reader, writer, os.open("/dev/null", os.O_RDWR), os.open(tmp_path, os.O_RDONLY)]
    fds.append(os.open(tmp_path / "file", os.O_RDONLY))
    try:
        for fd in fds:
            with pytest.raises(Refused):
                guest.front.tell(Message.ADD_MEM_REG, bytes(8) + region_row(FAR, PAGE, FAR, 0), [fd])
            look(guest)
    finally:
        for fd in fds:
            os.close(fd)


def test_more_regions_than_there_are_slots(guest: FakeGuest) -> None:
    slots = guest.front.get_max_mem_slots()
    taken = 0
    for number in range(slots + 5):
        at = FAR + number * PAGE
        try:
            guest.front.tell(Message.ADD_MEM_REG, bytes(8) + region_row(at, PAGE, at, 0), [guest.memory.fd])
        except Refused:
            break
        taken += 1
    assert taken == slots - len(guest.memory.regions)
    for number in range(taken):
        at = FAR + number * PAGE
        guest.front.tell(Message.REM_MEM_REG, bytes(8) + region_row(at, PAGE, at, 0))


def test_a_region_taken_away_that_was_never_there(guest: FakeGuest) -> None:
    region = guest.memory.regions[0]
    for row in (
        region_row(FAR, PAGE, FAR, 0),
        region_row(region.gpa, region.size - PAGE, region.user, region.offset),
        region_row(region.gpa + PAGE, region.size, region.user, region.offset),
    ):
        for fds in ((), (region.fd,)):
            with pytest.raises(Refused):
                guest.front.tell(Message.REM_MEM_REG, bytes(8) + row, fds)


def test_memory_with_the_rings_unplugged(guest: FakeGuest) -> None:
    """Rings that are not in memory any more end; a set-up with memory serves again."""
    front = guest.front
    for region in front.memory.regions:
        try:
            front.rem_mem_reg(region)
        except Refused:
            continue
    for queue in front.queues:
        queue.push(0)
        queue.kick(force=True)
    front.sync()
    for queue in front.queues:
        front.get_vring_base(queue.index)
        queue.reset()
    for region in front.memory.regions:
        try:
            front.add_mem_reg(region)
        except Refused:  # it was not taken away
            continue
    front.start(front.queues, memory=False)
    guest.restart()
    guest.init()


def test_memory_with_requests_in_flight_unplugged(guest: FakeGuest) -> None:
    """Reads into memory that goes away meanwhile: they may fail or be dropped, and the others are served."""
    entry = guest.lookup(1, b"big")
    fh, _ = guest.open(entry.nodeid)
    body = body_of("read", fh, 0, 256 << 10, 0, 0, 0)
    for _ in range(10):
        region = guest.memory.plug(1 << 20)
        guest.front.add_mem_reg(region)
        for number in range(3):
            sent = request(abi.FUSE_READ, entry.nodeid, body, unique=100 + number)
            guest.submit_raw(sent, room=256 << 10, shape=Shape(at=region.gpa + PAGE + number * (300 << 10)))
        guest.front.rem_mem_reg(region)
        for _ in range(3):
            guest.reap_raw()
        assert region.intact()
        guest.memory.unplug(region)
    look(guest)
    guest.release(entry.nodeid, fh)
    guest.forget_all()


def test_memory_replaced_while_in_use(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"big")
    fh, _ = guest.open(entry.nodeid)
    body = body_of("read", fh, 0, 64 << 10, 0, 0, 0)
    for _ in range(10):
        started = [guest.start(abi.FUSE_READ, entry.nodeid, body) for _ in range(5)]
        guest.front.set_mem_table()
        for unique in started:
            assert len(guest.finish(unique)) == 64 << 10
    guest.release(entry.nodeid, fh)
    guest.forget_all()


def test_a_table_of_no_memory(guest: FakeGuest) -> None:
    front = guest.front
    for count, fds in ((0, 0), (1, 1), (8, 8), (2**32 - 1, 1)):
        row = region_row(FAR, 0, FAR, 0)
        payload = struct.pack("<II", count, 0) + row * min(count, 8)
        front.send(Message.SET_MEM_TABLE, payload, [front.memory.fd] * fds, flags=VERSION | NEED_REPLY)
        settle(front, Message.SET_MEM_TABLE)
    front.queues[1].kick(force=True)
    stop_and_forget(guest)


def test_features_that_were_not_offered(guest: FakeGuest) -> None:
    for bit in (0, 5, 27, 34, 40, 63):
        with pytest.raises(Refused):
            guest.front.set_features(guest.front.features | 1 << bit)
        look(guest)
    with pytest.raises(Refused):
        guest.front.tell(Message.SET_PROTOCOL_FEATURES, struct.pack("<Q", 2**64 - 1))


def test_eventfds_again_and_again(guest: FakeGuest) -> None:
    for _ in range(100):
        for queue in guest.front.queues:
            guest.front.set_vring_call(queue.index, queue.call_fd)
            guest.front.set_vring_err(queue.index, queue.err_fd)
            guest.front.set_vring_kick(queue.index, queue.kick_fd)
    look(guest)


def test_queues_switched_on_and_off_while_they_work(guest: FakeGuest) -> None:
    body = body_of("getattr", 0, 0)
    for _ in range(50):
        started = [guest.start(abi.FUSE_GETATTR, 1, body) for _ in range(3)]
        guest.front.set_vring_enable(1, False)
        guest.front.set_vring_enable(1, True)
        os.eventfd_write(guest.front.queues[1].kick_fd, 1)
        for unique in started:
            guest.finish(unique)
    for _ in range(50):
        started = [guest.start(abi.FUSE_GETATTR, 1, body) for _ in range(3)]
        guest.pause()
        guest.resume()
        for unique in started:
            guest.finish(unique)


def test_a_base_that_is_asked_for_twice(guest: FakeGuest) -> None:
    bases = guest.front.stop()
    assert [guest.front.get_vring_base(queue.index) for queue in guest.front.queues] == bases
    for wrong in (0x10000, 2**32 - 1):
        guest.front.send(Message.SET_VRING_BASE, struct.pack("<II", 1, wrong), flags=VERSION | NEED_REPLY)
        settle(guest.front, Message.SET_VRING_BASE)
    for queue in guest.front.queues:
        queue.reset()
    guest.front.start(guest.front.queues, memory=False)
    guest.init()


@pytest.mark.parametrize("base", [1, 127, 5000, 0xFFFF])
def test_a_base_that_is_not_the_rings(guest: FakeGuest, base: int) -> None:
    guest.front.stop()
    for queue in guest.front.queues:
        queue.base = base
    guest.front.start(guest.front.queues, memory=False)
    for queue in guest.front.queues:
        os.eventfd_write(queue.kick_fd, 1)
    guest.front.sync()
    recover(guest)


LOGS = {"of nothing": (0, 0), "of a byte": (1, 0), "behind its file": (1 << 40, 0), "at an odd offset": (PAGE, 3)}
LOGS |= {"at a far offset": (PAGE, 1 << 40), "that wraps": (PAGE, 2**64 - PAGE), "of everything": (2**64 - 1, 0)}


@pytest.mark.parametrize("name", LOGS)
def test_a_log(guest: FakeGuest, name: str) -> None:
    front = guest.front
    if not front.protocol & P_LOG_SHMFD:
        pytest.skip("this daemon does not log")
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        front.send(Message.SET_LOG_BASE, struct.pack("<QQ", *LOGS[name]), [fd])
        settle(front, Message.SET_LOG_BASE)
    finally:
        os.close(fd)
    try:
        front.set_features(front.features | F_LOG_ALL)
    except Refused:
        pass
    for queue in front.queues:
        try:
            front.place(queue, log=True)
        except Refused:
            continue
    look(guest)
    stop_and_forget(guest)


INFLIGHTS = {
    "of no queues": (PAGE, 0, 0, 128),
    "of many queues": (1 << 20, 0, 65535, 128),
    "of no ring": (PAGE, 0, 2, 0),
    "of a huge ring": (1 << 20, 0, 2, 65535),
    "that is too small": (16, 0, 2, 128),
    "of no size": (0, 0, 2, 128),
    "behind its file": (1 << 40, 0, 2, 128),
    "at a far offset": (PAGE, 1 << 40, 2, 128),
    "that wraps": (2**64 - 1, 2**64 - 1, 2, 128),
}


@pytest.mark.parametrize("name", INFLIGHTS)
def test_a_region_for_what_is_in_flight(guest: FakeGuest, name: str) -> None:
    front = guest.front
    if not front.protocol & P_INFLIGHT_SHMFD:
        pytest.skip("this daemon does not tell what is in flight")
    front.stop()
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        payload = struct.pack("<QQHHxxxx", *INFLIGHTS[name])
        for fds in ((), (fd,), (fd, fd)):
            front.send(Message.SET_INFLIGHT_FD, payload, fds, flags=VERSION | NEED_REPLY)
            settle(front, Message.SET_INFLIGHT_FD)
        front.send(Message.GET_INFLIGHT_FD, payload, [fd])
        settle(front, Message.GET_INFLIGHT_FD)
    finally:
        os.close(fd)
    stop_and_forget(guest)


def test_a_region_for_what_is_in_flight_that_holds_nonsense(guest: FakeGuest) -> None:
    front = guest.front
    if not front.protocol & P_INFLIGHT_SHMFD:
        pytest.skip("this daemon does not tell what is in flight")
    chance = random.Random(5)
    for _ in range(10):
        front.stop()
        inflight = front.get_inflight_fd(2, 128)
        kept = os.pread(inflight.fd, inflight.mmap_size, inflight.mmap_offset)
        spoilt = bytearray(kept)
        for _ in range(300):
            spoilt[chance.randrange(len(spoilt))] = chance.choice([1, 0xFF, chance.randrange(256)])
        os.pwrite(inflight.fd, spoilt, inflight.mmap_offset)
        for queue in front.queues:
            queue.reset()
        front.set_inflight_fd(inflight)
        try:
            front.start(front.queues, memory=False)
        except Refused:
            pass
        for queue in front.queues:
            os.eventfd_write(queue.kick_fd, 1)
        front.sync()
    stop_and_forget(guest)


# Connections


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        struct.pack("<III", 1, VERSION, 2**32 - 1),
        struct.pack("<III", 1, VERSION, 5000) + bytes(5000),
        struct.pack("<III", 5, VERSION, 40) + bytes(39),
        struct.pack("<III", 1, 0, 0),
        struct.pack("<III", 1, 2, 0),
        struct.pack("<III", 1, VERSION | REPLY, 0),
        struct.pack("<III", 1, 2**32 - 1, 0),
        bytes(4096),
        b"GET / HTTP/1.1\r\n\r\n" * 100,
    ],
    ids=range(11),
)
def test_bytes_that_are_no_messages_end_only_their_connection(
    daemon: daemons.Daemon, guest: FakeGuest, data: bytes
) -> None:
    guest.front.hang_up()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(PATIENCE)
            wire.connect(daemon.socket)
            try:
                wire.sendall(data)
                wire.shutdown(socket.SHUT_WR)
                while wire.recv(4096):
                    pass
            except ConnectionError:
                continue
    guest.reconnect()
    recover(guest)


def test_descriptors_by_the_hundred(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.hang_up()
    with socket.socket(socket.AF_UNIX) as wire, tempfile.TemporaryFile() as file:
        wire.settimeout(PATIENCE)
        wire.connect(daemon.socket)
        fds = [file.fileno()] * 250
        try:
            for _ in range(5):
                socket.send_fds(wire, [struct.pack("<III", 5, VERSION, 40)], fds)
                socket.send_fds(wire, [bytes(40)], fds)
            wire.shutdown(socket.SHUT_WR)
            while wire.recv(4096):
                pass
        except ConnectionError:
            pass
    guest.reconnect()
    recover(guest)


def test_guests_that_crash_with_work_in_flight(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.hang_up()
    for _ in range(5):
        with FakeGuest.connect(daemon.socket) as other:
            other.init()
            entry = other.lookup(1, b"big")
            fh, _ = other.open(entry.nodeid)
            for _ in range(8):
                other.start(abi.FUSE_READ, entry.nodeid, body_of("read", fh, 0, 1 << 20, 0, 0, 0))
            other.front.hang_up()
    guest.reconnect()
    recover(guest)


def test_a_front_end_of_few_features_sees_the_same_share(daemon: daemons.Daemon, guest: FakeGuest) -> None:
    guest.front.hang_up()
    with FakeGuest.connect(daemon.socket, features=FEATURES & ~F_INDIRECT, protocol=0, acknowledge=False) as other:
        other.init()
        look(other)
    guest.reconnect()
    recover(guest)
