"""`FakeGuest` against real vhost-user-fs daemons: what one of them serves, each of them has to serve."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import daemons
from fusewire.ops import Lock
from fusewire.testing.guest import FakeGuest, Shape
from fusewire.testing.guest_frontend import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL,
    F_VERSION_1,
    FEATURES,
    P_CONFIG,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MEM_SLOTS,
    PROTOCOL,
    Refused,
)
from fusewire.testing.guest_ring import PAGE, Closed, Memory, Stuck
from fusewire.testing.replies import BadReply, body_of, request
from fusewire.wire import abi

DAEMONS = [*daemons.PEERS, "fusewire"]
OPTIONS = {"virtiofsd": [], "virtiofsd-rust": ["--tag", "fs"], "fusewire": ["--tag", "fs", "--queues", "3"]}
DATA = hashlib.shake_128(b"data").digest(1 << 20)
ENDS = "it ends with its first connection"
# What a peer does otherwise than the protocol and QEMU have it.
PEERS_FAIL = {
    ("virtiofsd", "test_requests_cut_in_any_way", "byte by byte and apart"): (
        "it mends a short READ's length in the first descriptor, however long that is"
    ),
    ("virtiofsd", "test_a_buffer_that_reaches_over_the_border_of_two_regions"): (
        "it takes a descriptor that it had to cut in two for a loop, and ends"
    ),
    ("virtiofsd", "test_guests_in_turn"): ENDS,
    ("virtiofsd", "test_a_guest_that_connects_again_after_its_virtual_machine_lost_the_connection"): ENDS,
    ("virtiofsd-rust", "test_a_session_from_init_to_destroy"): "it writes no reply to DESTROY",
    ("virtiofsd-rust", "test_a_buffer_that_reaches_over_the_border_of_two_regions"): "it never answers such a request",
    ("virtiofsd-rust", "test_a_driver_that_wants_no_calls_is_not_called", "flags"): (
        "it looks at what the driver wants with EVENT_IDX only"
    ),
    ("virtiofsd-rust", "test_locks_reach_the_host"): "it forwards no locks",
    ("virtiofsd-rust", "test_what_is_written_is_logged"): "it goes on logging when it was told to stop",
    (
        "virtiofsd-rust",
        "test_front_ends_of_all_kinds",
        "crosvm",
    ): "it loses a kick of a ring that it has not enabled yet",
    ("virtiofsd-rust", "test_the_configuration_space"): "it answers for more bytes than the space has",
    ("virtiofsd-rust", "test_memory_may_come_and_go"): "it closes the connection for a REM_MEM_REG with a descriptor",
    ("virtiofsd-rust", "test_guests_in_turn"): ENDS,
    ("virtiofsd-rust", "test_a_guest_that_connects_again_after_its_virtual_machine_lost_the_connection"): ENDS,
}
Connect = Callable[..., FakeGuest]


@pytest.fixture(params=DAEMONS)
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[daemons.Daemon]:
    why = daemons.missing(request.param)
    if why:
        pytest.skip(why)
    kind, name, case = request.param, request.node.originalname, request.node.callspec.id
    for failing, why in PEERS_FAIL.items():
        if failing[:2] == (kind, name) and all(case.endswith(end) for end in failing[2:]):
            pytest.skip(f"{kind}: {why}")
    share = tmp_path / "share"
    share.mkdir()
    (share / "hello.txt").write_bytes(b"hello world\n")
    found = daemons.Daemon(request.param, share, tmp_path, OPTIONS[request.param])
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
def connect(daemon: daemons.Daemon) -> Iterator[Connect]:
    """Make guests of the daemon; each is closed and its memory looked at in the end."""
    before = set(os.listdir("/proc/self/fd"))
    guests: list[FakeGuest] = []

    def make(**options: object) -> FakeGuest:
        guest = FakeGuest.connect(daemon.socket, **options)  # type: ignore[arg-type]
        guests.append(guest)
        return guest

    try:
        yield make
        for guest in guests:
            guest.check()
    finally:
        for guest in guests:
            guest.close()
    assert set(os.listdir("/proc/self/fd")) == before, "the guest left descriptors open"


@pytest.fixture
def guest(connect: Connect) -> FakeGuest:
    found = connect()
    found.init()
    return found


def look(guest: FakeGuest) -> None:
    """An honest look at the share."""
    assert guest.read_file(b"hello.txt") == b"hello world\n"


RINGS = [
    pytest.param(features, regions, protocol, id=f"{ring}-{events}-{regions}-{how}")
    for ring, indirect in (("indirect", F_INDIRECT), ("direct", 0))
    for events, event_idx in (("event_idx", F_EVENT_IDX), ("flags", 0))
    for regions in (1, 3)
    for how, protocol in (("slots", PROTOCOL), ("table", PROTOCOL & ~P_MEM_SLOTS))
    for features in (F_VERSION_1 | F_PROTOCOL | indirect | event_idx,)
]


@pytest.mark.parametrize(("features", "regions", "protocol"), RINGS)
def test_a_session_from_init_to_destroy(
    daemon: daemons.Daemon, connect: Connect, features: int, regions: int, protocol: int
) -> None:
    guest = connect(features=features, protocol=protocol, memory=Memory(16 << 20, regions), size=512)
    assert guest.front.features == features
    assert guest.init().major == 7
    hello = guest.lookup(1, b"hello.txt")
    assert guest.getattr(hello.nodeid)[0][1] == 12
    with pytest.raises(FileNotFoundError):
        guest.lookup(1, b"missing")
    entry, fh, _ = guest.create(1, b"new")
    assert guest.write(entry.nodeid, fh, 0, DATA) == len(DATA)
    assert (daemon.directory / "new").read_bytes() == DATA
    assert guest.read(entry.nodeid, fh, 0, len(DATA)) == DATA
    assert guest.read(entry.nodeid, fh, len(DATA) - 5, PAGE) == DATA[-5:]
    guest.flush(entry.nodeid, fh)
    guest.release(entry.nodeid, fh)
    assert {item.name for item in guest.listdir()} == {b".", b"..", b"hello.txt", b"new"}
    guest.unlink(1, b"new")
    assert not (daemon.directory / "new").exists()
    guest.forget(entry.nodeid)
    guest.forget_all()
    assert guest.statfs().bsize > 0
    guest.destroy()
    queue = guest.front.queues[1]
    rings = {guest.memory.region(gpa).gpa for gpa in (queue.desc_gpa, queue.avail_gpa, queue.used_gpa)}
    assert len(rings) == regions


SHAPES = {
    "two descriptors": Shape(plain=True),
    "pages of one byte": Shape(page=1),
    "pages of 512 bytes": Shape(page=512),
    "byte by byte": Shape(every=1),
    "seven bytes each": Shape(every=7),
    "the header in two": Shape(plain=True, readable=(17,), writable=(7,)),
    "a byte first": Shape(readable=(1,), writable=(1,)),
    "the header's last byte with the arguments": Shape(plain=True, readable=(39,), writable=(15,)),
    "arguments cut": Shape(readable=(41, 44, 79), writable=(17, 20)),
    "apart from each other": Shape(gap=3),
    "byte by byte and apart": Shape(every=1, gap=1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_INDIRECT], ids=["indirect", "direct"])
def test_requests_cut_in_any_way(connect: Connect, name: str, features: int) -> None:
    guest = connect(features=features, size=1024)
    guest.init()
    guest.shape = SHAPES[name]
    entry, fh, _ = guest.create(1, b"new")
    data = DATA[:400]
    assert guest.write(entry.nodeid, fh, 3, data) == 400
    assert guest.read(entry.nodeid, fh, 0, 500) == bytes(3) + data
    assert guest.read_file(b"hello.txt", 100) == b"hello world\n"


@pytest.mark.parametrize("shape", [Shape(plain=True), Shape()], ids=["plain", "linux"])
def test_a_buffer_that_reaches_over_the_border_of_two_regions(connect: Connect, shape: Shape) -> None:
    memory = Memory(8 << 20, 2, adjacent=True)
    guest = connect(memory=memory)
    guest.init()
    entry, fh, _ = guest.create(1, b"new")
    border = memory.regions[1].gpa
    assert border == memory.regions[0].gpa + memory.regions[0].size
    assert memory.user(border) != memory.user(border - 1) + 1
    for start in range(border - 200, border, 17):
        guest.shape = shape._replace(at=start)
        assert guest.write(entry.nodeid, fh, 0, DATA[:100]) == 100
        assert guest.read(entry.nodeid, fh, 0, 100) == DATA[:100]
        assert guest.getattr(entry.nodeid)[0][1] == 100


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_EVENT_IDX], ids=["event_idx", "flags"])
def test_sixteen_requests_in_flight(connect: Connect, features: int) -> None:
    guest = connect(features=features)
    guest.init()
    entry = guest.lookup(1, b"hello.txt")
    body = body_of("getattr", 0, 0)
    for round_ in range(20):
        sent = [
            request(abi.FUSE_GETATTR, entry.nodeid, body, unique=1000 + 1000 * round_ + 2 * number)
            for number in range(16)
        ]
        answers = guest.batch(sent)
        assert [answer.error for answer in answers] == [0] * 16
        assert len({answer.body[16:24] for answer in answers}) == 1
    assert guest.front.queues[1].kicks < 20 * 16


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_EVENT_IDX], ids=["event_idx", "flags"])
def test_a_driver_that_wants_no_calls_is_not_called(connect: Connect, features: int) -> None:
    guest = connect(features=features)
    guest.init()
    queue = guest.front.queues[1]
    # A call for what has been answered may still be on its way; a queue that was stopped makes none.
    guest.pause()
    guest.resume()
    queue.refuse_calls()
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(queue.call_fd)
    before = queue.calls

    def ask() -> None:
        queue.refuse_calls()
        unique = guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0))
        while not guest.answered(unique):
            os.sched_yield()
        guest.finish(unique)

    if features & F_EVENT_IDX:
        ask()
        # Behind a start there is no index that was announced last, so the first answer may always be.
        if select.select([queue.call_fd], [], [], 0.5)[0]:
            os.eventfd_read(queue.call_fd)
    for _ in range(10):
        ask()
    guest.front.sync()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(queue.call_fd)
    assert queue.calls == before


def test_indices_that_run_past_65535(connect: Connect) -> None:
    guest = connect(size=2)
    guest.pause()
    for queue in guest.front.queues:
        queue.reset(0xFFFD)
    guest.front.start(guest.front.queues, memory=False)
    guest.init()
    for _ in range(10):
        look(guest)
    assert guest.front.queues[1].avail < 1000


def test_forgets_go_by_the_queue_for_what_is_urgent(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    before = guest.front.queues[0].used
    guest.forget(entry.nodeid)
    assert guest.front.queues[0].used == before + 1
    guest.lookup(1, b"hello.txt")
    guest.forget_all()
    assert guest.front.queues[0].used == before + 2


def test_locks_reach_the_host(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    fh, _ = guest.open(entry.nodeid, os.O_RDWR)
    other, _ = guest.open(entry.nodeid, os.O_RDWR)
    guest.setlk(entry.nodeid, fh, 1, Lock(0, 9, 1, 1))
    with pytest.raises(BlockingIOError):
        guest.setlk(entry.nodeid, other, 2, Lock(0, 9, 1, 2))
    assert guest.getlk(entry.nodeid, other, 2, Lock(0, 9, 1, 0)).type == 1
    guest.setlk(entry.nodeid, fh, 1, Lock(0, 9, 2, 1))
    guest.setlk(entry.nodeid, other, 2, Lock(0, 9, 1, 2))
    guest.release(entry.nodeid, fh)
    guest.release(entry.nodeid, other)


def test_several_request_queues(connect: Connect) -> None:
    guest = connect(queues=1)
    if guest.front.queue_limit < 4:
        pytest.skip(f"this daemon has only {guest.front.queue_limit - 1} request queue")
    guest.front.hang_up()
    guest = connect(queues=3)
    guest.init()
    body = body_of("getattr", 0, 0)
    started = []
    for number in range(30):
        guest.queue = 1 + number % 3
        started.append(guest.start(abi.FUSE_GETATTR, 1, body))
    for unique in reversed(started):
        assert len(guest.finish(unique)) == 104
    assert [queue.used for queue in guest.front.queues[2:]] == [10, 10]


# Front ends and their lives


@pytest.mark.parametrize(
    "options",
    [
        {"order": "cloud-hypervisor", "protocol": PROTOCOL & ~P_MEM_SLOTS},
        {"acknowledge": False, "protocol": PROTOCOL & ~P_MEM_SLOTS},
        {"protocol": 0},
        {"features": F_VERSION_1 | F_PROTOCOL, "protocol": 0, "size": 1024},
    ],
    ids=["cloud-hypervisor", "crosvm", "no protocol features", "least"],
)
def test_front_ends_of_all_kinds(connect: Connect, options: dict[str, object]) -> None:
    guest = connect(**options)
    guest.init()
    look(guest)
    guest.reboot()
    guest.init()
    look(guest)


def test_a_guest_that_reboots_begins_anew(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    guest.open(entry.nodeid)
    for _ in range(3):
        guest.reboot()
        guest.init()
        look(guest)


def test_a_pause_loses_nothing(guest: FakeGuest) -> None:
    entry = guest.lookup(1, b"hello.txt")
    fh, _ = guest.open(entry.nodeid)
    guest.pause()
    waiting = [guest.start(abi.FUSE_READ, entry.nodeid, body_of("read", fh, 0, 100, 0, 0, 0)) for _ in range(5)]
    with pytest.raises(Stuck, match="queue 0, 1"):
        guest.finish(waiting[0], timeout=0.05)
    guest.resume()
    assert [guest.finish(unique) for unique in waiting] == [b"hello world\n"] * 5


def test_what_is_written_is_logged(guest: FakeGuest) -> None:
    if not guest.front.protocol & P_LOG_SHMFD:
        pytest.skip("this daemon does not log")
    entry = guest.lookup(1, b"hello.txt")
    fh, _ = guest.open(entry.nodeid)
    guest.front.start_log()
    guest.shape = Shape(at=(at := guest.memory.alloc(8 * PAGE)) + 100)
    assert guest.read(entry.nodeid, fh, 0, 6 * PAGE) == b"hello world\n"
    rings = {queue.used_gpa for queue in guest.front.queues}
    dirty = guest.front.dirty()
    assert {at, guest.front.queues[1].used_gpa} <= dirty
    assert dirty <= {at + PAGE * n for n in range(8)} | rings
    guest.front.stop_log()
    guest.front.dirty()  # what a queue has noted before it stopped
    guest.read(entry.nodeid, fh, 0, 100)
    assert guest.front.dirty() == set()


def test_the_configuration_space(connect: Connect) -> None:
    guest = connect()
    if not guest.front.protocol & P_CONFIG:
        pytest.skip("this daemon has no configuration space without a tag")
    config = guest.front.get_config()
    assert len(config) == 40
    assert int.from_bytes(config[36:], "little") == guest.front.queue_limit - 1
    for wrong in (257, 300):
        with pytest.raises(Refused):
            guest.front.get_config(0, wrong)
    guest.init()
    look(guest)


def test_the_region_for_what_is_in_flight(connect: Connect) -> None:
    guest = connect()
    if not guest.front.protocol & P_INFLIGHT_SHMFD:
        pytest.skip("this daemon does not tell what is in flight")
    inflight = guest.front.get_inflight_fd(2, 128)
    assert inflight.mmap_size >= 2 * 128 * 16
    assert os.fstat(inflight.fd).st_size >= inflight.mmap_offset + inflight.mmap_size
    guest.front.stop()
    guest.front.set_inflight_fd(inflight)
    guest.front.start(guest.front.queues, memory=False)
    guest.init()
    look(guest)


def test_memory_may_come_and_go(connect: Connect) -> None:
    guest = connect(memory=Memory(8 << 20))
    guest.init()
    if not guest.front.protocol & P_MEM_SLOTS:
        pytest.skip("this daemon takes memory only as a whole")
    for with_fd in (False, True):
        region = guest.memory.plug(1 << 20)
        guest.front.add_mem_reg(region)
        guest.shape = Shape(at=region.gpa + PAGE)
        look(guest)
        guest.shape = Shape()
        guest.memory.unplug(region)
        guest.front.rem_mem_reg(region, with_fd=with_fd)
        look(guest)


def test_guests_in_turn(connect: Connect) -> None:
    for how in (FakeGuest.destroy, lambda guest: guest.front.stop(), lambda guest: None):
        guest = connect()
        guest.init()
        guest.open(guest.lookup(1, b"hello.txt").nodeid)
        how(guest)
        guest.front.hang_up()


def test_a_guest_that_connects_again_after_its_virtual_machine_lost_the_connection(connect: Connect) -> None:
    guest = connect()
    guest.init()
    look(guest)
    guest.reconnect()
    guest.init()
    look(guest)


# What the fake itself notices


def test_a_daemon_that_hangs_is_told_from_one_that_has_gone(daemon: daemons.Daemon, connect: Connect) -> None:
    guest = connect()
    guest.init()
    os.kill(daemon.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)
    with pytest.raises(Stuck, match="used nothing of queue 0, 1 within"):
        guest.finish(guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0)), timeout=0.1)
    guest.front.sock.settimeout(0.1)
    with pytest.raises(Stuck, match="did not answer GET_FEATURES"):
        guest.front.sync()
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.process.wait()
    with pytest.raises(Closed):
        guest.getattr(1)
    with pytest.raises(Closed, match="GET_FEATURES"):
        guest.front.sync()


@pytest.mark.parametrize(
    "where", ["before the request", "in the request", "between descriptors", "behind the reply", "next to the region"]
)
def test_a_write_outside_what_the_device_may_write_to_is_noticed(connect: Connect, where: str) -> None:
    guest = connect()
    guest.init()
    body = body_of("getattr", 0, 0)
    placed = guest.submit_raw(request(abi.FUSE_GETATTR, 1, body), room=104, shape=Shape(gap=8), kick=False)
    first, *_, last = placed.segments
    region = guest.memory.region(first.gpa)
    gpa = {
        "before the request": first.gpa - 1,
        "in the request": first.gpa + 32,  # the caller's pid, which GETATTR does not look at
        "between descriptors": first.gpa + first.size + 1,
        "behind the reply": last.gpa + last.size,
        "next to the region": 0,
    }[where]
    if gpa:
        guest.memory.at(gpa, 1)[0] ^= 0xFF
    else:
        region._guarded[0] ^= 0xFF
        with pytest.raises(AssertionError, match="wrote outside the region"):
            guest.check()
        region._guarded[0] ^= 0xFF
    guest.front.queues[1].kick()
    if gpa:
        with pytest.raises(BadReply, match="may not write to"):
            guest.reap_raw()
    else:
        guest.reap_raw()
    look(guest)


def test_a_refusal_is_told(guest: FakeGuest) -> None:
    request = 99
    with pytest.raises((Refused, Closed)) as caught:
        guest.front.tell(request)
    assert "message 99" in str(caught.value)


def test_nobody_listening_is_stuck(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Stuck, match="nobody listens on"):
        FakeGuest.connect(str(tmp_path / "nothing"), timeout=0.05)
    assert os.listdir("/proc/self/fd") == before


def test_a_full_ring_is_named(guest: FakeGuest) -> None:
    guest.pause()
    with pytest.raises(MemoryError, match="queue 1 has 0 free descriptors of 128; 4 wanted"):
        for _ in range(129):
            guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0))
    guest.resume()
    for unique in list(guest._waiting):
        guest.finish(unique)
    look(guest)


def test_an_error_of_the_share_is_an_oserror(guest: FakeGuest) -> None:
    guest.lookup(1, b"hello.txt")
    with pytest.raises(OSError) as caught:
        guest.rmdir(1, b"hello.txt")
    assert caught.value.errno == errno.ENOTDIR
