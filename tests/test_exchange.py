"""`Exchange` with chains made by hand: what no ring and no thread is needed for."""

from __future__ import annotations

import array
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fusewire.ops import Attr, Caller, FileRange, Lock, Operations, Pending, attr
from fusewire.session import Agreed
from fusewire.testing.replies import body_of, request
from fusewire.transport.exchange import DEFERRED, Exchange
from fusewire.transport.ring import Chain
from fusewire.wire import abi, codec
from fusewire.wire.table import layout

READ = layout("fuse_read_in")
OFFERED = (1 << 64) - 1


class Simple(Operations):
    """Reads from a file, waits for locks, counts its ends."""

    interruptible = True

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd
        self.offset = 0
        self.data: Any = None
        self.ended = 0
        self.waiting: list[Pending] = []
        self.written: list[bytes] = []

    def renumber(self, first: int) -> None:
        pass

    def destroy(self) -> None:
        self.ended += 1
        for pending in self.waiting:
            pending.fail(OSError(errno.ENOTCONN, "ended"))

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        return attr(1, 0o40755), 0.0

    def read(self, nodeid: int, fh: int, offset: int, size: int, *_: int) -> Any:
        return FileRange(self.fd, offset + self.offset, size) if self.data is None else self.data

    def write(self, nodeid: int, fh: int, offset: int, data: Any, *_: int) -> int:
        self.written.append(bytes(data))
        return len(data)

    def setlkw(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Any:
        pending = Pending()
        pending.interrupt = lambda: pending.fail(InterruptedError(errno.EINTR, "given up"))
        self.waiting.append(pending)
        return pending


class Guest:
    """Asks an Exchange, and keeps what it answers late and what it says."""

    def __init__(self, make: Callable[[], Operations], **options: Any) -> None:
        self.said: list[str] = []
        self.late: list[tuple[Any, int, list[Any]]] = []
        self.agreed: list[Agreed | None] = []
        self.exchange = Exchange(make, log=lambda message, error: self.said.append(message), **options)
        self.exchange.on_late = lambda token, chain, buffers: self.late.append((token, chain.head, buffers))
        self.exchange.on_agreed = self.agreed.append
        self.heads = 0

    def raw(self, sent: bytes, room: Sequence[int] = (16, 65536), cuts: Sequence[int] = (), token: Any = "t") -> Any:
        """Serve bytes; give (length, what was written), the length alone if that is DEFERRED."""
        places = [0, *cuts, len(sent)]
        readable = [memoryview(sent[a:b]) for a, b in pairwise(places) if a < b]
        writable = [memoryview(bytearray(size)) for size in room]
        self.heads += 1
        length = self.exchange.serve(Chain(self.heads, readable, writable), token)
        if length == DEFERRED:
            return length
        assert length <= sum(room)
        return length, b"".join(writable)[:length]

    def ask(self, name: str, opcode: int, *fields: int, tail: bytes = b"", unique: int = 4, **options: Any) -> Any:
        """Serve a request; give (error, body), None if it was deferred."""
        body = body_of(name, *fields) + tail
        found = self.raw(request(opcode, 1, body, unique=unique), **options)
        if found == DEFERRED:
            return None
        length, data = found
        assert length >= 16
        said, error, answered = codec.OUT_HEADER.unpack_from(data)
        assert (said, answered) == (length, unique)
        return -error, data[16:]

    def init(self, minor: int = abi.MINOR_MAX, major: int = 7) -> int:
        body = layout("fuse_init_in").pack(major, minor, 1 << 17, OFFERED & 0xFFFFFFFF, OFFERED >> 32)
        _, data = self.raw(request(abi.FUSE_INIT, 0, body, unique=2))
        return -int(codec.OUT_HEADER.unpack_from(data)[1])

    def getattr(self) -> int:
        return int(self.ask("getattr", abi.FUSE_GETATTR, 0, 0)[0])

    def read(self, size: int, offset: int = 0, **options: Any) -> Any:
        return self.ask("read", abi.FUSE_READ, 1, offset, size, 0, 0, 0, **options)

    def lock(self, unique: int = 4, token: Any = "t") -> Any:
        return self.ask("setlkw", abi.FUSE_SETLKW, 1, 1, 0, 9, 1, 1, 0, unique=unique, token=token)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def fs(file: int) -> Simple:
    return Simple(file)


@pytest.fixture
def guest(fs: Simple) -> Guest:
    found = Guest(lambda: fs)
    assert found.init() == 0
    return found


# READ


@pytest.mark.parametrize("room", [(), (7,), (15,), (16,), (8, 8), (16, 1), (1,) * 16])
def test_a_read_of_nothing_never_says_that_it_wrote_more_than_there_is_room(
    guest: Guest, room: tuple[int, ...]
) -> None:
    sent = request(abi.FUSE_READ, 1, READ.pack(1, 0, 0, 0, 0, 0), unique=6)
    length, _ = guest.raw(sent, room)
    assert length == (16 if sum(room) >= 16 else 0)


@pytest.mark.parametrize("room", [(16,), (16, 99), (115,), (10,), ()])
def test_a_read_with_less_room_than_it_asks_for_is_an_error(guest: Guest, room: tuple[int, ...]) -> None:
    sent = request(abi.FUSE_READ, 1, READ.pack(1, 0, 100, 0, 0, 0), unique=6)
    length, data = guest.raw(sent, room)
    if sum(room) < 16:
        assert length == 0
    else:
        assert -codec.OUT_HEADER.unpack(data)[1] == errno.EINVAL


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63 - 4096, 2**63, 2**64 - 1])
def test_a_read_behind_the_end_of_all_files_is_an_error(guest: Guest, offset: int) -> None:
    assert guest.read(4096, offset)[0] in (0, errno.EINVAL, errno.EIO)
    assert guest.getattr() == 0


def test_a_read_into_more_pieces_than_preadv_takes(guest: Guest) -> None:
    assert guest.read(5000, 3, room=(16, *[1] * 5000)) == (0, (bytes(range(256)) * 64)[3:5003])
    assert guest.read(5000, 16000, room=(*[1] * 16, *[3] * 2000)) == (0, (bytes(range(256)) * 64)[16000:])


def test_a_read_from_a_closed_file_is_an_error(guest: Guest, fs: Simple) -> None:
    fs.fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fs.fd)
    assert guest.read(10)[0] == errno.EBADF


@pytest.mark.parametrize("data", [array.array("I", range(4)), memoryview(array.array("Q", range(2)))])
@pytest.mark.parametrize("room", [(16, 16), (3, 29), (1,) * 32])
def test_data_of_wide_items_count_in_bytes(guest: Guest, fs: Simple, data: Any, room: tuple[int, ...]) -> None:
    fs.data = data
    assert guest.read(16, room=room) == (0, bytes(memoryview(data).cast("B")))
    fs.data = array.array("I", range(5))  # 20 bytes for 16
    assert guest.read(16, room=room)[0] == errno.EIO
    fs.data = array.array("I", range(4))
    assert guest.read(16, room=(16, 4))[0] == errno.EIO


# WRITE


@pytest.mark.parametrize("size", [1, 8000, 9000, 100_000])
@pytest.mark.parametrize("cuts", [(), (1,), (39, 41), (40,), (79,), (80,), (81,), (40, 80), tuple(range(1, 100))])
def test_a_write_may_be_cut_anywhere(guest: Guest, fs: Simple, size: int, cuts: tuple[int, ...]) -> None:
    data = os.urandom(size)
    found = guest.ask("write", abi.FUSE_WRITE, 1, 0, size, 0, 0, 0, tail=data, cuts=[c for c in cuts if c < size + 80])
    assert found == (0, codec.WRITE_OUT.pack(size))
    assert fs.written == [data]


# Sessions


def test_a_large_write_after_destroy_reaches_nobody(guest: Guest, fs: Simple) -> None:
    assert guest.ask("destroy", abi.FUSE_DESTROY)[0] == 0
    assert fs.ended == 1
    assert guest.ask("write", abi.FUSE_WRITE, 1, 0, 9000, 0, 0, 0, tail=bytes(9000))[0] == errno.EIO
    assert fs.written == []
    assert not guest.exchange.ready
    assert guest.agreed[-1] is None


def test_a_filesystem_that_cannot_be_opened_again_is_an_answer_and_not_the_last(file: int) -> None:
    made: list[Simple] = []
    errors: list[Exception] = [ValueError("rubbish"), OSError(errno.ENXIO, "gone"), RuntimeError("?")]

    def make() -> Operations:
        if len(made) == 1 and errors:
            raise errors.pop(0)
        made.append(Simple(file))
        return made[-1]

    guest = Guest(make)
    assert guest.init() == 0
    assert [guest.init() for _ in range(4)] == [errno.EIO, errno.ENXIO, errno.EIO, 0]
    assert guest.getattr() == 0
    guest.exchange.close()
    assert [fs.ended for fs in made] == [1, 1]


def test_an_init_that_is_refused_leaves_no_filesystem_open() -> None:
    made: list[Simple] = []
    guest = Guest(lambda: made.append(Simple()) or made[-1])  # type: ignore[func-returns-value]
    for _ in range(3):
        assert guest.init(minor=5) == errno.EPROTO
        assert guest.getattr() == errno.EIO
    assert guest.init(major=8) == 0
    assert guest.getattr() == errno.EIO
    assert [fs.ended for fs in made] == [1, 1, 1, 1]
    assert len(guest.said) == 1, "said for each INIT: a guest could fill a disk"
    assert guest.init() == 0
    assert guest.getattr() == 0


def test_a_destroy_of_a_session_that_was_replaced_meanwhile_leaves_the_new_one_alone(file: int) -> None:
    class Held(Simple):
        started, go = threading.Event(), threading.Event()

        def destroy(self) -> None:
            super().destroy()
            if self.ended == 1 and not self.started.is_set():
                self.started.set()
                assert self.go.wait(10)

    guest = Guest(lambda: Held(file))
    assert guest.init() == 0
    thread = threading.Thread(target=guest.ask, args=("destroy", abi.FUSE_DESTROY))
    thread.start()
    try:
        assert Held.started.wait(10)
        assert guest.init() == 0
    finally:
        Held.go.set()
        thread.join()
    assert guest.getattr() == 0
    assert guest.agreed[-1] is not None


def test_what_a_guest_brings_about_is_said_a_bounded_number_of_times(file: int) -> None:
    guest = Guest(lambda: Simple(file))
    for number in range(2000):
        guest.exchange.say(f"a fault at {number}")
    assert len(guest.said) <= 200
    guest.exchange.say("a fault at 0")
    again = Guest(lambda: Simple(file))
    for room in range(16, 60):
        assert again.init() == 0
        assert again.ask("getattr", abi.FUSE_GETATTR, 0, 0, room=(room,))[0] == errno.EIO
    assert len(again.said) == 1


# Answers that come later


def answers(guest: Guest) -> list[tuple[Any, int, int]]:
    return [(token, head, -codec.OUT_HEADER.unpack_from(buffers[0])[1]) for token, head, buffers in guest.late]


def test_the_same_number_twice_gets_an_answer_for_each_chain(guest: Guest, fs: Simple) -> None:
    assert guest.lock(unique=8, token="a") is None
    assert guest.lock(unique=8, token="b") is None
    fs.waiting[1].complete(None)
    fs.waiting[0].complete(None)
    assert answers(guest) == [("a", 2, 0), ("b", 3, 0)]
    assert not guest.exchange._waiting
    assert not guest.exchange._early


def test_number_zero_is_answered_like_any_other(guest: Guest, fs: Simple) -> None:
    assert guest.lock(unique=0) is None
    fs.waiting[0].complete(None)
    assert answers(guest) == [("t", 2, 0)]


def test_a_notification_is_refused(guest: Guest, fs: Simple) -> None:
    session = guest.exchange._session
    assert session is not None
    assert session.notify_inval_inode(1) is False
    assert guest.late == []


def test_an_answer_that_comes_before_anybody_waits(guest: Guest, fs: Simple) -> None:
    handle = guest.exchange._handle

    def hasty(sent: Any) -> Any:
        reply = handle(sent)
        fs.waiting[-1].complete(None)
        return reply

    guest.exchange._handle = hasty
    assert guest.lock() == (0, b"")
    assert guest.late == []
    assert not guest.exchange._early
    assert not guest.exchange._waiting


def test_who_waits_when_the_session_ends_gets_an_answer(guest: Guest, fs: Simple) -> None:
    assert guest.lock(unique=8) is None
    assert guest.init() == 0
    assert answers(guest) == [("t", 2, errno.ENOTCONN)]


def test_an_answer_for_a_session_that_is_no_more_goes_to_nobody(file: int) -> None:
    class Stubborn(Simple):
        def destroy(self) -> None:
            self.ended += 1

    made: list[Stubborn] = []
    guest = Guest(lambda: made.append(Stubborn(file)) or made[-1])  # type: ignore[func-returns-value]
    assert guest.init() == 0
    assert guest.lock(unique=8) is None
    assert guest.init() == 0
    assert guest.lock(unique=8, token="new") is None
    made[0].waiting[0].complete(None)
    assert guest.late == []
    made[1].waiting[0].complete(None)
    assert answers(guest) == [("new", 4, 0)]


def test_what_a_queue_that_is_no_more_waits_for_is_given_up(guest: Guest, fs: Simple) -> None:
    for unique in range(10, 20):
        assert guest.lock(unique=unique, token="old" if unique % 2 else "other") is None
    guest.exchange.give_up("old")
    assert {(token, error) for token, _, error in answers(guest)} == {("old", errno.EINTR)}
    assert len(guest.late) == 5
    assert len(guest.exchange._waiting) == 5


# Another server's session


def test_a_session_goes_on_as_it_was_agreed_on(fs: Simple, guest: Guest) -> None:
    agreed = guest.agreed[-1]
    assert agreed is not None
    other = Guest(lambda: fs)
    other.exchange.resume(agreed)
    assert other.exchange.ready
    assert other.exchange._session is not None
    assert other.exchange._session.agreed == agreed
    assert other.getattr() == 0


@pytest.mark.parametrize(
    "change",
    [
        {"minor": 5},
        {"minor": 2**32 - 1},
        {"flags": 2**64 - 1},
        {"flags": 0},
        {"max_write": 2**32 - 1},
        {"max_write": 0},
        {"max_pages": 2**32 - 1},
        {"max_pages": 0},
        {"max_readahead": 2**32 - 1},
    ],
)
def test_a_session_that_this_server_would_not_agree_on_is_refused(
    fs: Simple, guest: Guest, change: dict[str, int]
) -> None:
    agreed = guest.agreed[-1]
    assert agreed is not None
    other = Guest(lambda: fs)
    with pytest.raises(ValueError, match="an earlier server agreed"):
        other.exchange.resume(agreed._replace(**change))
    assert not other.exchange.ready
    assert other.getattr() == errno.EIO
    assert fs.ended == 1


# Faults


def test_a_fault_is_an_answer(guest: Guest) -> None:
    sent = request(abi.FUSE_GETATTR, 1, bytes(16), unique=6)
    writable = [memoryview(bytearray(16)), memoryview(bytearray(100))]
    assert guest.exchange.fault(Chain(1, [memoryview(sent)], writable), SystemExit(1)) == 16
    assert codec.OUT_HEADER.unpack(writable[0]) == (16, -errno.EIO, 6)
    forget = request(abi.FUSE_FORGET, 1, bytes(8), unique=6)
    assert guest.exchange.fault(Chain(1, [memoryview(forget)], writable), ValueError()) == 0
    assert guest.exchange.fault(Chain(1, [memoryview(b"short")], writable), ValueError()) == 0
    assert guest.exchange.fault(Chain(1, [], []), ValueError()) == 0
