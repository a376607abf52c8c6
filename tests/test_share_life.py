"""A share's life: guests that pause, are reset and die, filesystems that hang and fail, front ends that misbehave.

Most cases serve a filesystem made for the purpose, in this process, to `FakeGuest`; the others start a daemon. Long
because it is a list of cases.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

import daemons
from fusewire.ops import Attr, Caller, Connection, Lock, Operations, Pending, attr
from fusewire.serve_share import ShareServer
from fusewire.testing.guest import FakeGuest
from fusewire.testing.guest_frontend import Frontend, Message
from fusewire.testing.guest_ring import Memory
from fusewire.testing.replies import body_of
from fusewire.transport import handed
from fusewire.transport.exchange import Exchange
from fusewire.transport.inflight import inflight_size
from fusewire.wire import abi

PATIENCE = 10.0
INFLIGHT_TAIL = struct.Struct("<8sIQIII")


class Filesystem(Operations):
    """Reads that block until they are let go, and locks that are granted when the test says so."""

    interruptible = True

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.waiting: list[Pending] = []
        self.asked = threading.Semaphore(0)
        self.ended = 0

    def init(self, connection: Connection) -> None:
        self.connection = connection

    def destroy(self) -> None:
        self.ended += 1
        for pending in self.waiting:
            pending.fail(OSError(errno.ENOTCONN, "ended"))

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        return attr(1, 0o40755), 0.0

    def read(self, nodeid: int, fh: int, offset: int, size: int, *_: int) -> bytes:
        if fh == 99:
            sys.exit("a handler that ends its thread")
        if fh:
            assert self.connection is not None
            if fh == 2:
                self.connection.may_block(True)
            self.entered.release()
            assert self.go.wait(PATIENCE)
        return b"x" * size

    def setlkw(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Any:
        pending = Pending()
        pending.interrupt = lambda: pending.fail(InterruptedError(errno.EINTR, "given up"))
        self.waiting.append(pending)
        self.asked.release()
        return pending


class Resumable(Filesystem):
    """Has no numbers that a later server could confuse."""

    def renumber(self, first: int) -> None:
        assert first > 1 << 56


class Handing(Filesystem):
    announces_blocking = True


class Service:
    """A ShareServer in a thread, and the guests of it."""

    def __init__(self, place: Path, make: Callable[[], Operations], **options: Any) -> None:
        self.path = str(place / "share.sock")
        self.said: list[str] = []
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(self.path)
        self.listening.listen(8)
        self.listening.setblocking(False)
        self.server = ShareServer(
            make, self.listening, queues=2, log=lambda message, error: self.said.append(message), **options
        )
        self.status: list[int] = []
        self.thread = threading.Thread(target=lambda: self.status.append(self.server.serve()), daemon=True)
        self.thread.start()
        self.guests: list[FakeGuest] = []

    def connect(self, **options: Any) -> FakeGuest:
        options.setdefault("memory", Memory(4 << 20))
        guest = FakeGuest.connect(self.path, queues=2, size=64, **options)
        self.guests.append(guest)
        return guest

    def guest(self, **options: Any) -> FakeGuest:
        guest = self.connect(**options)
        guest.init()
        return guest

    def heard(self, words: str) -> bool:
        """Wait until something with these words was said."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if any(words in line for line in list(self.said)):
                return True
            self.thread.join(0.02)
        return False

    def end(self) -> float:
        """Stop, and give how long that took."""
        began = time.monotonic()
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "serve() does not end"
        return time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.close()
        self.server.stop()
        self.thread.join(PATIENCE)
        self.listening.close()


@pytest.fixture
def fs() -> Iterator[Filesystem]:
    found = Filesystem()
    yield found
    found.go.set()


@pytest.fixture
def handing() -> Iterator[Handing]:
    found = Handing()
    yield found
    found.go.set()


@pytest.fixture
def service(tmp_path: Path, fs: Filesystem) -> Iterator[Service]:
    with Service(tmp_path, lambda: fs) as found:
        yield found
        fs.go.set()


def wait_for_lock(guest: FakeGuest, fs: Filesystem, count: int = 1) -> list[int]:
    """Have so many processes of the guest wait for locks."""
    found = []
    for owner in range(count):
        found.append(guest.start(abi.FUSE_SETLKW, 1, body_of("setlkw", 1, owner, 0, 9, 1, 1, 0)))
        assert fs.asked.acquire(timeout=PATIENCE)
    guest.getattr(1)  # so they have been deferred, or a thread behind is about to
    return found


def start_read(guest: FakeGuest, fs: Filesystem, handle: int = 1, size: int = 10) -> int:
    """Have the guest wait for a read that hangs; give its number."""
    found = guest.start(abi.FUSE_READ, 1, body_of("read", handle, 0, size, 0, 0, 0))
    assert fs.entered.acquire(timeout=PATIENCE)
    return found


def look(guest: FakeGuest) -> None:
    for queue in (1, 2):
        guest.queue = queue
        assert guest.getattr(1)[0][0] == 1
    guest.queue = 1


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    return thread, found


# Answers that come later, and a queue that stands still meanwhile


@pytest.mark.parametrize("tracked", [False, True], ids=["", "tracked"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_locks_that_are_granted_around_a_pause_are_answered_once(
    service: Service, fs: Filesystem, when: str, tracked: bool
) -> None:
    guest = service.guest()
    if tracked:
        guest.front.stop()
        guest.front.set_inflight_fd(guest.front.get_inflight_fd(3, 64))
        guest.resume()
    waiting = wait_for_lock(guest, fs, 5)
    if when == "before":
        for pending in fs.waiting:
            pending.complete(None)
    guest.pause()
    if when == "between":
        for pending in fs.waiting:
            pending.complete(None)
    guest.resume()
    if when == "after":
        look(guest)
        for pending in fs.waiting:
            pending.complete(None)
    for unique in waiting:
        guest.finish(unique)
    for _ in range(200):
        look(guest)
    assert len(fs.waiting) == 5, "they were asked for again"
    assert service.said == []


def test_a_lock_that_is_granted_after_a_reset_is_no_answer_to_the_next_kernel(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    wait_for_lock(guest, fs, 3)
    guest.front.stop()
    fs.waiting[0].complete(None)
    for queue in guest.front.queues:
        queue.reset()
    guest.restart()
    guest.front.start(guest.front.queues, memory=False)
    assert fs.waiting[1]._settled, "nobody waits for it any more, and it is kept"
    fs.waiting[2].complete(None)
    guest.init()  # a BadReply, had a head of before been used
    look(guest)
    assert service.said == []


def test_a_lock_is_granted_through_a_change_of_memory(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    (waiting,) = wait_for_lock(guest, fs)
    guest.front.set_mem_table()
    fs.waiting[0].complete(None)
    guest.finish(waiting)
    look(guest)


def test_locks_are_granted_while_queues_are_switched_on_and_off(service: Service, fs: Filesystem) -> None:
    def grant() -> None:
        for pending in fs.waiting:
            pending.fail(FileExistsError())

    guest = service.guest()
    for _ in range(10):
        fs.waiting.clear()
        waiting = wait_for_lock(guest, fs, 8)
        granting, _ = in_thread(grant)
        try:
            for number in range(6):
                guest.front.set_vring_enable(1, bool(number % 2))
        finally:
            granting.join()
        for unique in waiting:
            with pytest.raises(FileExistsError):
                guest.finish(unique)
    look(guest)


def test_a_guest_that_is_reset_with_locks_again_and_again_leaves_none_behind(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    for _ in range(30):
        wait_for_lock(guest, fs, 4)
        guest.reboot()  # no INIT: it goes on with the session of before
    guest.init()
    assert len(fs.waiting) == 120
    assert all(pending._settled for pending in fs.waiting)
    look(guest)


def test_an_interrupt_reaches_a_lock_across_a_pause(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    (waiting,) = wait_for_lock(guest, fs)
    guest.pause()
    guest.resume()
    guest.interrupt(waiting)
    with pytest.raises(InterruptedError):
        guest.finish(waiting)
    look(guest)


# Requests that take long


@pytest.mark.parametrize("how", ["leading", "handed over"])
def test_a_queue_does_not_stop_before_its_requests_are_done(service: Service, fs: Filesystem, how: str) -> None:
    guest = service.guest()
    waiting = start_read(guest, fs, 1 if how == "leading" else 2)
    thread, base = in_thread(lambda: guest.front.get_vring_base(1))
    assert service.heard("queue 1 cannot stop: a request is still at work, in wait at threading.py")
    assert thread.is_alive()
    fs.go.set()
    thread.join(PATIENCE)
    assert base
    assert guest.finish(waiting) == b"x" * 10


def test_another_request_is_served_while_a_slow_one_is_handed_over(tmp_path: Path, handing: Handing) -> None:
    with Service(tmp_path, lambda: handing) as service:
        guest = service.guest()
        waiting = start_read(guest, handing, 2)
        for _ in range(20):
            look(guest)
        handing.go.set()
        assert guest.finish(waiting) == b"x" * 10


def test_a_reply_is_not_held_back_by_a_slow_request_behind_it(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    first = guest.submit(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0), kick=False)
    waiting = start_read(guest, fs, 1)
    try:
        done = guest.reap()
        assert done.unique == first
    finally:
        fs.go.set()
    assert guest.reap().unique == waiting


@pytest.mark.parametrize("how", ["idle", "reading", "stopping a queue"])
def test_an_end_does_not_wait_for_a_request_that_hangs(service: Service, fs: Filesystem, how: str) -> None:
    guest = service.guest()
    start_read(guest, fs, 1)
    if how == "reading":
        guest.front.sock.send(b"\1")
    if how == "stopping a queue":
        guest.front.send(Message.GET_VRING_BASE, struct.pack("<II", 1, 0))
        assert service.heard("queue 1 cannot stop")
    assert service.end() < 1.0
    assert service.heard("queue 1: ended with a request at work")
    assert service.status == [0]
    if how == "stopping a queue":
        assert not select.select([guest.front.sock], [], [], 0)[0] or guest.front.sock.recv(100) == b"", (
            "the front end was told that the queue has stopped"
        )


SLOW = """
import os, signal, socket, sys, time
from fusewire.ops import Operations
from fusewire.serve_share import ShareServer

class Slow(Operations):
    def getattr(self, *_):
        os.write(1, b"in work\\n")
        time.sleep(1000)

with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    server = ShareServer(Slow, listening, queues=1, log=lambda message, error: print(message, file=sys.stderr))
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    sys.exit(server.serve())
"""


def test_a_signal_ends_a_process_whose_request_sleeps(tmp_path: Path) -> None:
    path = str(tmp_path / "share.sock")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        with FakeGuest.connect(path, memory=Memory(4 << 20), size=64) as guest:
            guest.init()
            guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0))
            assert process.stdout.readline() == b"in work\n"
            began = time.monotonic()
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE)
            assert time.monotonic() - began < 2.0
        assert process.returncode == 0
        assert b"ended with a request at work" in errors
        assert b"Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


# Sessions


def test_a_second_init_while_other_queues_work(service: Service, fs: Filesystem) -> None:
    guest = service.guest()
    waiting = [start_read(guest, fs, 1)]
    guest.queue = 2
    guest.init()
    waiting.append(start_read(guest, fs, 1))
    fs.go.set()
    for unique in waiting:
        assert guest.finish(unique) == b"x" * 10
    look(guest)
    assert fs.ended == 1


def test_init_destroy_and_requests_on_all_queues_at_once(tmp_path: Path) -> None:
    made: list[Filesystem] = []

    def make() -> Operations:
        made.append(Filesystem())
        return made[-1]

    with Service(tmp_path, make) as service:
        guest = service.guest()
        guest.careful = False
        body = struct.pack("<IIIII44x", 7, abi.MINOR_MAX, 1 << 17, 0xFFFFFFFF, 0xFFFFFFFF)
        for number in range(300):
            guest.queue = 1 + number % 2
            if number % 3 == 0:
                guest.start(abi.FUSE_INIT, 0, body)
            if number % 7 == 0:
                guest.start(abi.FUSE_DESTROY, 0)
            found = [guest.start(abi.FUSE_GETATTR, 1, body_of("getattr", 0, 0)) for _ in range(4)]
            if number % 5 == 0:
                for unique in found:
                    with contextlib.suppress(OSError):  # EIO, if it came between DESTROY and INIT
                        guest.finish(unique)
        guest.front.sync()
        guest.reboot()
        guest.init()
        look(guest)
        assert service.end() < 1.0
    assert [fs.ended for fs in made] == [1] * len(made)
    assert service.said == []


def test_a_handler_that_ends_its_thread_costs_one_answer(service: Service) -> None:
    guest = service.guest()
    for _ in range(5):
        with pytest.raises(OSError, match="Input/output error"):
            guest.read(1, 99, 0, 10)
    look(guest)
    assert service.said == ["a request failed"]


def test_a_filesystem_that_cannot_be_opened_again_leaves_the_queue_alive(tmp_path: Path) -> None:
    made: list[Filesystem] = []

    def make() -> Operations:
        if len(made) == 1:
            made.append(Filesystem())
            raise ValueError("no such thing")
        made.append(Filesystem())
        return made[-1]

    with Service(tmp_path, make) as service:
        guest = service.guest()
        with pytest.raises(OSError, match="Input/output error"):
            guest.init()
        with pytest.raises(OSError, match="Input/output error"):
            guest.getattr(1)
        guest.init()
        look(guest)
        assert len(service.said) == 1


# What is lacking


def test_a_queue_without_threads_is_refused_and_the_next_try_serves_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(threading.Thread):
        left = 0

        def start(self) -> None:
            if self.name.startswith("virtiofs"):
                if Refusing.left <= 0:
                    raise RuntimeError("can't start new thread")
                Refusing.left -= 1
            super().start()

    guest = service.guest()
    guest.pause()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading, "Thread", Refusing)
    Refusing.left = 1  # the high-priority queue
    guest.front.start(guest.front.queues, memory=False)
    assert service.heard("queue 1 has stopped: no thread for queue 1")
    queues = guest.front.queues
    for queue in queues[1:]:
        os.eventfd_read(queue.err_fd)  # that they have stopped was signalled
    guest.front.stop()
    assert len(os.listdir("/proc/self/fd")) == before
    Refusing.left = 2  # one each is enough
    guest.front.start(queues[:2], memory=False)
    assert service.heard("1 of 2 serve it")
    assert guest.getattr(1)[0][0] == 1
    guest.front.queues = queues


def test_a_queue_for_which_no_descriptors_are_left_is_refused_and_leaves_none_behind(tmp_path: Path) -> None:
    program = """
import os, resource, sys
from fusewire.ops import Operations
from fusewire.testing.guest_ring import DriverQueue, Memory
from fusewire.transport.exchange import Exchange
from fusewire.transport.vhost_backend import Vring
from fusewire.transport.virtiofs import Share

memory = Memory(1 << 20)
queue = DriverQueue(memory, 1, 16)
share = Share(Exchange(Operations), queues=2, workers=2, log=print)
region = memory.regions[0]
share.set_memory([share.map_region(os.dup(region.fd), region.size, region.offset, region.gpa, region.user)])
refused = 0
for spare in range(8):
    vring = Vring()
    vring.size, vring.enabled = 16, True
    vring.desc, vring.avail, vring.used = map(memory.user, (queue.desc_gpa, queue.avail_gpa, queue.used_gpa))
    vring.kick = os.dup(queue.kick_fd)
    before = set(os.listdir("/proc/self/fd"))
    free = [os.dup(0) for _ in range(spare)]
    limit = max(map(int, before | set(map(str, free)))) + 1
    hold = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    try:
        while True:
            hold.append(os.dup(0))
    except OSError:
        pass
    for fd in free:
        os.close(fd)
    try:
        share.start_queue(1, vring)
    except OSError:
        refused += 1
    else:
        share.stop_queue(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    for fd in hold:
        os.close(fd)
    after = set(os.listdir("/proc/self/fd"))
    assert len(after) == len(before) - 1, (spare, sorted(before ^ after))  # the kick
assert 1 <= refused < 8, refused
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_a_kick_that_nobody_can_wait_for_is_refused(service: Service) -> None:
    guest = service.guest()
    guest.front.get_vring_base(1)
    with open("/dev/null", "rb") as null, pytest.raises(OSError, match="SET_VRING_KICK"):
        guest.front.set_vring_kick(1, null.fileno())
    queue = guest.front.queues[1]
    guest.front.set_vring_base(1, queue.used)
    guest.front.set_vring_kick(1, queue.kick_fd)
    look(guest)


# Front ends


def test_two_hundred_front_ends_in_turn_leave_nothing_behind(tmp_path: Path) -> None:
    with Service(tmp_path, Filesystem) as service:
        seen: list[tuple[int, int]] = []
        for number in range(200):
            with FakeGuest.connect(service.path, queues=2, size=16, memory=Memory(1 << 20)) as guest:
                guest.init()
                look(guest)
                if number % 3 == 1:
                    guest.start(abi.FUSE_SETLKW, 1, body_of("setlkw", 1, 1, 0, 9, 1, 1, 0))
                if number % 20 == 5:
                    gc.collect()  # a filesystem and its session know each other
                seen.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
        assert seen[5] == seen[105] == seen[185]
        assert service.said == []


@pytest.mark.parametrize("sent", [b"", b"\1", struct.pack("<III", 1, 1, 8)[:11], struct.pack("<III", 2, 1, 8)])
def test_an_end_in_the_middle_of_a_message(service: Service, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(service.path)
        client.send(sent)
        assert service.end() < 1.0


def test_an_end_while_a_front_end_does_not_read(service: Service) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(service.path)
        client.setblocking(False)
        asked = struct.pack("<III", Message.GET_FEATURES, 1, 0) * 1000
        full = 0
        while full < 5:  # both directions, and it takes nothing any more
            _, ready, _ = select.select([], [client], [], 0.1)
            if not ready:
                full += 1
                continue
            full = 0
            client.send(asked)
        assert service.end() < 1.0


def test_stop_may_be_called_at_any_time(tmp_path: Path) -> None:
    with Service(tmp_path, Filesystem) as service:
        for _ in range(3):
            service.server.stop()
        assert service.end() < 1.0
        service.server.stop()
    assert service.status == [0]


def test_once_ends_with_the_first_front_end(tmp_path: Path) -> None:
    with Service(tmp_path, Filesystem, once=True) as service:
        guest = service.guest()
        guest.front.hang_up()
        service.thread.join(PATIENCE)
        assert service.status == [0]


# Memory


def test_memory_of_huge_pages_is_mapped_at_any_offset() -> None:
    where = Path("/proc/sys/vm/nr_hugepages")
    before = where.read_text()
    try:
        if int(before) < 4:
            where.write_text("4")
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    try:
        size = 2 << 20
        try:
            os.ftruncate(fd, 2 * size)
            with mmap.mmap(fd, 2 * size) as whole:
                whole[size + 4096] = 7
        except (OSError, ValueError) as error:
            pytest.skip(f"no huge pages here: {error}")
        view = handed.map_shared(os.dup(fd), size - 4096, size + 4096)
        assert (len(view), view[0]) == (size - 4096, 7)
        before_close = Path("/proc/self/maps").read_text().count("memfd:huge")
        view.release()
        assert Path("/proc/self/maps").read_text().count("memfd:huge") < before_close
    finally:
        os.close(fd)
        where.write_text(before)


def test_a_read_into_memory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    """Only for the reply's data, which the kernel moves. What is parsed is touched by us: that is a SIGBUS."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    source = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    try:
        os.write(source, b"data" * 1024)
        os.ftruncate(fd, 8192)
        view = handed.map_shared(os.dup(fd), 8192, 0)
        os.ftruncate(fd, 4096)
        with pytest.raises(OSError, match="Bad address"):
            os.preadv(source, [view[4096:]], 0)
        view.release()
    finally:
        os.close(source)
        os.close(fd)


# Another daemon goes on


def share(kind: str, place: Path) -> Path:
    source = place / "share"
    (source / "dir").mkdir(parents=True)
    (source / "hello.txt").write_bytes(b"hello world\n")
    if kind == "directory":
        return source
    if shutil.which("mksquashfs") is None:
        pytest.skip("mksquashfs is not there (Debian: squashfs-tools)")
    image = place / "image.squashfs"
    subprocess.run(["mksquashfs", source, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    return image


def tracked(path: str) -> tuple[FakeGuest, Any]:
    """A guest whose front end keeps a region for what is in flight."""
    guest = FakeGuest.connect(path, queues=1, size=64, memory=Memory(4 << 20))
    guest.front.stop()
    inflight = guest.front.get_inflight_fd(2, 64)
    guest.front.set_inflight_fd(inflight)
    guest.resume()
    guest.init()
    return guest, inflight


def reconnect(guest: FakeGuest, inflight: Any) -> None:
    """As FakeGuest.reconnect, with the region that was kept."""
    front = guest.front
    start = front.start

    def with_region(*args: Any, **options: Any) -> None:
        front.set_inflight_fd(inflight)
        start(*args, **options)

    front.start = with_region  # type: ignore[method-assign]
    try:
        guest.reconnect()
    finally:
        front.start = start  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_a_daemon_that_was_killed_with_requests_in_work_is_followed_by_another(tmp_path: Path, kind: str) -> None:
    why = daemons.missing("fusewire")
    if why:
        pytest.skip(why)
    source = share(kind, tmp_path)
    daemon = daemons.Daemon("fusewire", source, tmp_path)
    guest = None
    try:
        guest, inflight = tracked(daemon.socket)
        entry = guest.lookup(1, b"hello.txt")
        old, _ = guest.open(entry.nodeid)
        for _ in range(3):
            os.kill(daemon.pid, signal.SIGSTOP)
            waiting = [guest.start(abi.FUSE_LOOKUP, 1, b"hello.txt\0") for _ in range(10)]
            daemon.process.send_signal(signal.SIGKILL)
            daemon.process.wait()
            daemon = daemons.Daemon("fusewire", source, tmp_path)
            reconnect(guest, inflight)
            if kind == "directory":
                for unique in waiting:
                    assert guest.finish(unique)
                # What node ids and handles meant is forgotten. They must not mean other files now.
                fh, _ = guest.open(guest.lookup(1, b"hello.txt").nodeid, os.O_RDWR)
                assert fh != old
                with pytest.raises(OSError, match="Stale"):
                    guest.getattr(entry.nodeid)
                with pytest.raises(OSError, match="Bad file descriptor"):
                    guest.write(entry.nodeid, old, 0, b"not here")
                entry, old = guest.lookup(1, b"hello.txt"), fh
            else:
                for unique in waiting:
                    assert guest.finish(unique)
                assert guest.getattr(entry.nodeid)[0][1] == 12
            assert "taking over" in daemon.output()
            assert guest.read_file(b"hello.txt") == b"hello world\n"
            assert "Traceback" not in daemon.output()
    finally:
        if guest is not None:
            guest.close()
        daemon.end()


def test_a_filesystem_that_would_confuse_its_nodes_is_not_gone_on_with(service: Service) -> None:
    guest, inflight = tracked(service.path)
    service.guests.append(guest)
    reconnect(guest, inflight)
    assert service.heard("the guest has to mount the share again")
    with pytest.raises(OSError, match="Input/output error"):
        guest.getattr(1)
    guest.init()
    assert guest.getattr(1)[0][0] == 1


@pytest.fixture
def resumable(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, Resumable) as found:
        yield found


@pytest.mark.parametrize(
    "state",
    [
        (abi.MINOR_MAX + 7, 0, 4096, 0, 1),
        (abi.MINOR_MAX, 2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        (0, 0, 0, 0, 0),
        (abi.MINOR_MAX, abi.FUSE_MAX_PAGES, 1 << 31, 0, 1 << 19),
    ],
)
def test_a_saved_session_that_cannot_be_is_not_gone_on_with(resumable: Service, state: tuple[int, ...]) -> None:
    service = resumable
    guest, inflight = tracked(service.path)
    service.guests.append(guest)
    offset = inflight.mmap_size - INFLIGHT_TAIL.size
    assert offset >= 2 * inflight_size(64)
    os.pwrite(inflight.fd, INFLIGHT_TAIL.pack(b"fusewire", *state), offset)
    reconnect(guest, inflight)
    assert service.heard("the guest has to mount the share again")
    with pytest.raises(OSError, match="Input/output error"):
        guest.getattr(1)
    guest.init()
    assert guest.getattr(1)[0][0] == 1


def test_a_front_end_that_comes_back_goes_on_without_an_init(resumable: Service) -> None:
    service = resumable
    guest, inflight = tracked(service.path)
    service.guests.append(guest)
    for _ in range(3):
        reconnect(guest, inflight)
        assert guest.getattr(1)[0][0] == 1
    guest.destroy()
    reconnect(guest, inflight)
    with pytest.raises(OSError, match="Input/output error"):
        guest.getattr(1)


def test_a_ring_that_runs_away_ends_its_queue_with_a_word(service: Service) -> None:
    guest = service.guest()
    queue = guest.front.queues[1]
    queue.set_avail(queue.avail + 1000)
    os.eventfd_write(queue.kick_fd, 1)
    assert service.heard("queue 1 has stopped: available index")
    assert select.select([queue.err_fd], [], [], PATIENCE)[0]
    os.eventfd_read(queue.err_fd)
    guest.queue = 2
    assert guest.getattr(1)[0][0] == 1
    assert isinstance(guest.front, Frontend)
    guest.reboot()
    guest.init()
    look(guest)


def test_without_a_log_what_is_said_is_dropped() -> None:
    Exchange(Filesystem).say("anything")
