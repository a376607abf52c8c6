"""/dev/fuse with the real kernel: this process mounts and uses, a child of it serves.

The child is this file run as a program. It gets mounted descriptors, never touches its own mounts, and tells in lines
of JSON what happens; what it reads from its standard input are commands.
"""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fusewire.linux import syscalls
from fusewire.ops import FOREVER, Entry, FileRange, Operations, Pending, attr
from fusewire.serve import Server
from fusewire.session import Agreed, Session
from fusewire.testing import READ_ONLY, request
from fusewire.transport.devfuse import Channel
from fusewire.wire import abi, codec

CONTENT = bytes(range(256)) * 400
PATIENCE = 40.0
NAMES = {b"hello": 2, b"wait": 3, b"meet1": 4, b"meet2": 5, b"header": 6, b"body": 7, b"stuck": 8, b"range": 9}
SIZES = dict.fromkeys(NAMES.values(), 4096) | {2: len(CONTENT)}


def tell(event: str, **details: Any) -> None:
    os.write(1, json.dumps({"event": event, **details}).encode() + b"\n")  # whole lines, from any thread


class Tree(Operations):
    """What the child serves. Everything is cached until it is told otherwise."""

    interruptible = True

    def __init__(self, label: bytes = b"") -> None:
        self.connection: Any = None
        self.names = dict(NAMES)
        self.contents = {2: CONTENT, 10: label}
        self.names[b"label"] = 10
        self.counts = {"lookup": 0, "read": 0, "forget": 0, "destroy": 0}
        self.meeting = threading.Barrier(2)
        self.pending: list[Pending] = []
        self.made = bytearray()
        self.file = os.memfd_create("range")
        os.write(self.file, CONTENT)

    def init(self, connection):
        self.connection = connection

    def destroy(self):
        os.close(self.file)
        self.counts["destroy"] += 1

    def _attr(self, nodeid):
        if nodeid == 1:
            return attr(1, stat.S_IFDIR | 0o755, nlink=2)
        if nodeid == 50:
            return attr(50, stat.S_IFREG | 0o600, len(self.made))
        size = len(self.contents[nodeid]) if nodeid in self.contents else SIZES[nodeid]
        return attr(nodeid, stat.S_IFREG | 0o644, size)

    def lookup(self, caller, parent, name):
        self.counts["lookup"] += 1
        if name == b"slow":
            return self.later()
        if name not in self.names:
            raise FileNotFoundError
        return Entry(self.names[name], self._attr(self.names[name]), FOREVER, FOREVER)

    def forget(self, nodeid, nlookup):
        self.counts["forget"] += nlookup

    def getattr(self, nodeid, flags, fh):
        return self._attr(nodeid), FOREVER

    def readdir(self, nodeid, fh, offset, size, *rest):
        buffer = codec.DirBuffer(size)
        entries = [(b".", 1, 4), (b"..", 1, 4), *((name, node, 8) for name, node in self.names.items())]
        for cookie, (name, node, dtype) in enumerate(entries[offset:], offset + 1):
            if not buffer.add(name, node, cookie, dtype):
                break
        return buffer.data

    def read(self, nodeid, fh, offset, size, *rest):
        self.counts["read"] += 1
        if nodeid in self.contents:
            return self.contents[nodeid][offset : offset + size]
        if nodeid == 50:
            return bytes(self.made[offset : offset + size])
        if nodeid == 9:
            return FileRange(self.file, offset, size)
        if nodeid in (4, 5):
            self.meeting.wait(PATIENCE / 2)
        if nodeid in (3, 8):
            return self.later()
        return CONTENT[offset : min(offset + size, SIZES[nodeid])]

    def later(self):
        pending = Pending(lambda: self.give_up(pending))
        self.pending.append(pending)
        tell("waiting")
        return pending

    def give_up(self, pending):
        tell("interrupted")
        pending.fail(InterruptedError())

    def tmpfile(self, caller, parent, flags, mode, umask, open_flags):
        return Entry(50, self._attr(50)), (0, 0)

    def write(self, nodeid, fh, offset, data, *rest):
        self.made[offset : offset + len(data)] = data
        return len(data)

    def setattr(self, caller, nodeid, change):
        return self._attr(nodeid), 0


class Lying(Session):
    """Answers READ of two nodes with what the kernel refuses."""

    def handle(self, sent):
        reply = super().handle(sent)
        _, opcode, unique, node, *_ = codec.IN_HEADER.unpack_from(sent)
        if opcode == abi.FUSE_READ and node == 6:
            return [codec.OUT_HEADER.pack(99, 0, unique), b"data"]
        if opcode == abi.FUSE_READ and node == 7:
            return [codec.OUT_HEADER.pack(16 + (1 << 20), 0, unique), bytes(1 << 20)]
        return reply


def commands(trees: list[Tree], servers: list[Server]) -> dict[str, Callable[..., Any]]:
    """What the child does at a word."""
    tree, server = trees[0], servers[0]

    def retrieve(nodeid: int, offset: int, size: int) -> bool:
        def done(where: int, data: memoryview) -> None:
            tell("retrieved", offset=where, data=bytes(data).decode())

        return bool(tree.connection.notify_retrieve(nodeid, offset, size, done))

    def close() -> dict[str, int]:
        old = server.channel.fd
        server.close()
        other = os.open("/dev/null", os.O_RDONLY)
        os.close(other)
        return {"old": old, "other": other}

    def set_content(nodeid: int, data: str) -> None:
        tree.contents[nodeid] = data.encode()

    def complete(data: str) -> None:
        tree.pending.pop().complete(data.encode())

    def rename(name: str, nodeid: int) -> None:
        tree.names.pop(name.encode(), None)
        if nodeid:
            tree.names[name.encode()] = nodeid

    notify = {
        name: lambda *arguments, name=name: getattr(tree.connection, name)(
            *(item.encode() if isinstance(item, str) else item for item in arguments)
        )
        for name in vars(Session)
        if name.startswith("notify_")
    }
    return {
        **notify,
        "expire": lambda parent, name: tree.connection.notify_inval_entry(parent, name.encode(), expire_only=True),
        "notify_retrieve": retrieve,
        "close": close,
        "set": set_content,
        "complete": complete,
        "name": rename,
        "counts": lambda: tree.counts,
        "fds": lambda: len(os.listdir("/proc/self/fd")),
        "fuse_fds": lambda: sum(map(is_fuse, os.listdir("/proc/self/fd"))),
        "bad_replies": lambda: server.session.bad_replies,
        "end": lambda index: servers[index].wait(PATIENCE) and servers[index].close(),
    }


def is_fuse(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse"
    except FileNotFoundError:
        return False


def serve(arguments: str) -> None:
    """Serve: the child's part."""
    options = json.loads(arguments)
    trees = [Tree(b"label %d" % index) for index in range(len(options["fds"]))]
    servers = []
    for fd, tree in zip(options["fds"], trees, strict=True):
        server = Server(tree, fd, threads=options["threads"], clone_fd=options["clone_fd"])
        if options["lying"]:
            server.session.__class__ = Lying
        servers.append(server)
    known = commands(trees, servers)
    for server in servers:
        if options["agreed"]:
            server.session.resume(Agreed(*options["agreed"]))
        server.start()
        assert server.wait_ready(PATIENCE)
    if options["agreed"]:
        servers[0].session.notify_resend()
    tell("ready", agreed=servers[0].session.agreed)

    def listen() -> None:
        for line in sys.stdin:
            name, *given = json.loads(line)
            tell("result", value=known[name](*given))

    threading.Thread(target=listen, daemon=True).start()
    for server in servers:
        server.wait()
    tell("ended", counts=[tree.counts for tree in trees])
    # Stays for the last commands until its input ends.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.sigwait([signal.SIGUSR1])


class Child:
    """The serving process, as the tests see it."""

    def __init__(self, fds: list[int], *, threads=2, clone_fd=False, lying=False, agreed=None) -> None:
        options = {"fds": fds, "threads": threads, "clone_fd": clone_fd, "lying": lying, "agreed": agreed}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=fds,
        )
        # A test that hangs in its own mount is freed by the end of the server.
        self.watchdog = threading.Timer(PATIENCE, self.process.kill)
        self.watchdog.start()
        self.pushed: list[dict[str, Any]] = []

    def expect(self, event: str) -> dict[str, Any]:
        for seen in self.pushed:
            if seen["event"] == event:
                self.pushed.remove(seen)
                return seen
        for line in self.process.stdout:
            seen = json.loads(line)
            if seen["event"] == event:
                return seen
            self.pushed.append(seen)
        raise AssertionError(f"the server ended before it told {event!r}")

    def do(self, *command: Any) -> Any:
        print(json.dumps(command), file=self.process.stdin)
        return self.expect("result")["value"]

    def opened(self, count: int) -> None:
        """Wait until the server has as many descriptors of /dev/fuse: its workers begin one by one."""
        deadline = time.monotonic() + PATIENCE
        while self.do("fuse_fds") < count and time.monotonic() < deadline:
            pass
        assert self.do("fuse_fds") == count

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.watchdog.join()


class Mounts:
    """The mounts and processes of one test; `close` leaves nothing of them."""

    def __init__(self, base) -> None:
        self.base = base
        self.points: list[str] = []
        self.children: list[Child] = []
        self.fds: list[int] = []

    def mount(self, flags: int = syscalls.MS_NOSUID | syscalls.MS_NODEV) -> tuple[str, int]:
        """Mount; give (path, descriptor)."""
        point = str(self.base / f"mnt{len(self.points)}")
        os.mkdir(point)
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.fds.append(fd)
        data = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d" % (fd, os.getuid(), os.getgid())
        try:
            syscalls.mount(b"fusewire-test", os.fsencode(point), b"fuse", flags, data)
        except PermissionError:
            pytest.skip("mounting needs CAP_SYS_ADMIN")
        self.points.append(point)
        return point, fd

    def child(self, fds: list[int], *, keep: bool = False, **options: Any) -> Child:
        """Start a server and wait until it is ready; the descriptors are its own then, unless `keep`."""
        child = Child(fds, **options)
        self.children.append(child)
        if not keep:
            for fd in fds:
                self.fds.remove(fd)
                os.close(fd)
        child.agreed = child.expect("ready")["agreed"]
        return child

    def serve(self, *, mount_flags: int = syscalls.MS_NOSUID | syscalls.MS_NODEV, **options: Any) -> tuple[str, Child]:
        point, fd = self.mount(mount_flags)
        return point, self.child([fd], **options)

    def umount(self, point: str) -> None:
        syscalls.umount2(os.fsencode(point), 0)
        self.points.remove(point)

    def close(self) -> None:
        for child in self.children:
            child.close()
        for fd in self.fds:
            os.close(fd)
        for point in self.points:
            syscalls.umount2(os.fsencode(point), syscalls.MNT_FORCE | syscalls.MNT_DETACH)


@pytest.fixture
def mounts(tmp_path):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("/dev/fuse is missing")
    before = len(os.listdir("/proc/self/fd"))
    found = Mounts(tmp_path)
    try:
        yield found
    finally:
        found.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/mountinfo") as file:
        assert str(tmp_path) not in file.read()


def read(path: str, size: int = 1 << 20, offset: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


class Reading(threading.Thread):
    """Reads a file elsewhere, because it will wait."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.data = b""
        self.error = 0
        self.start()

    def run(self) -> None:
        try:
            self.data = read(self.path)
        except OSError as error:
            self.error = error.errno or 0

    def result(self) -> bytes:
        self.join(PATIENCE)
        assert not self.is_alive()
        if self.error:
            raise OSError(self.error, os.strerror(self.error), self.path)
        return self.data


def fails(number: int, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number, caught.value


# Serving


def test_mount_can_be_used_as_soon_as_init_is_answered(mounts):
    point, child = mounts.serve()
    assert child.agreed[0] >= 26
    assert set(os.listdir(point)) == {name.decode() for name in NAMES} | {"label"}
    assert read(f"{point}/hello") == CONTENT
    fails(errno.ENOENT, os.stat, f"{point}/missing")


@pytest.mark.parametrize("name", READ_ONLY)
def test_behaviour_of_a_read_only_mount(mounts, name):
    point, child = mounts.serve(mount_flags=syscalls.MS_RDONLY)
    # Files that wait or meet have no place in a walk over everything.
    for special in ("wait", "meet1", "meet2", "stuck"):
        child.do("name", special, 0)
    READ_ONLY[name](point)


@pytest.mark.parametrize("clone_fd", [False, True])
def test_workers_serve_at_the_same_time(mounts, clone_fd):
    point, child = mounts.serve(threads=4, clone_fd=clone_fd)
    # Each of two reads waits for the other's handler.
    first, second = Reading(f"{point}/meet1"), Reading(f"{point}/meet2")
    assert first.result() == second.result() == CONTENT[:4096]
    child.opened(4 if clone_fd else 1)


@pytest.mark.parametrize("clone_fd", [False, True])
def test_late_answer_reaches_its_reader_whichever_worker_read_the_request(mounts, clone_fd):
    point, child = mounts.serve(threads=4, clone_fd=clone_fd)
    for number in range(6):
        reading = Reading(f"{point}/wait")
        child.expect("waiting")
        child.do("complete", f"answer {number}".ljust(4096))
        assert reading.result() == b"answer %d".ljust(4097) % number
        child.do("notify_inval_inode", 3)


def test_data_of_a_file_range_is_read_by_the_transport(mounts):
    point, _ = mounts.serve()
    assert read(f"{point}/range") == CONTENT[:4096]


def test_file_without_a_name_can_be_made_written_and_read(mounts):
    point, _ = mounts.serve()
    fd = os.open(point, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        assert os.pwrite(fd, b"without a name", 0) == 14
        assert os.pread(fd, 100, 0) == b"without a name"
    finally:
        os.close(fd)


def test_caller_that_is_ended_interrupts_its_request(mounts):
    # Not READ: the kernel reads ahead for nobody in particular, so nobody's end interrupts that.
    point, child = mounts.serve()
    with subprocess.Popen(["cat", f"{point}/slow"]) as caller:
        child.expect("waiting")
        caller.terminate()
        child.expect("interrupted")
        assert caller.wait(PATIENCE) == -signal.SIGTERM
    assert read(f"{point}/hello") == CONTENT


@pytest.mark.parametrize("name", ["header", "body"])
def test_reply_that_the_kernel_refuses_becomes_eio(mounts, name):
    point, child = mounts.serve(lying=True)
    fails(errno.EIO, read, f"{point}/{name}")
    assert child.do("bad_replies") > 0
    assert read(f"{point}/hello") == CONTENT


def test_kernel_that_is_too_old_is_refused_with_a_reason():
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel:
        channel = Channel(device.detach(), Session(Operations(), log=lambda message, error: None))
        begin = (7).to_bytes(4, "little") + (25).to_bytes(4, "little") + bytes(8)
        kernel.send(request(abi.FUSE_INIT, 0, begin, unique=2))
        with pytest.raises(OSError, match=r"7\.25; 7\.26 or newer is needed") as caught:
            channel.serve()
        assert caught.value.errno == errno.EPROTO
        assert kernel.recv(100) == codec.OUT_HEADER.pack(16, -errno.EPROTO, 2)
        channel.close()
        channel.close()


# The end


@pytest.mark.parametrize("clone_fd", [False, True])
def test_umount_ends_the_server_and_destroys_once(mounts, clone_fd):
    point, child = mounts.serve(threads=3, clone_fd=clone_fd)
    os.stat(f"{point}/hello")
    mounts.umount(point)
    assert child.expect("ended")["counts"][0]["destroy"] == 1


def test_server_that_dies_leaves_no_reader_waiting(mounts):
    point, child = mounts.serve()
    reading = Reading(f"{point}/wait")
    child.expect("waiting")
    child.kill()
    with pytest.raises(OSError) as caught:
        reading.result()
    assert caught.value.errno in (errno.ECONNABORTED, errno.ENOTCONN)
    fails(errno.ENOTCONN, os.stat, f"{point}/hello")


def test_abort_ends_the_server(mounts):
    point, child = mounts.serve()
    reading = Reading(f"{point}/wait")
    child.expect("waiting")
    with pytest.raises(OSError):
        syscalls.umount2(os.fsencode(point), syscalls.MNT_FORCE)
    child.expect("ended")
    with pytest.raises(OSError) as caught:
        reading.result()
    assert caught.value.errno in (errno.ECONNABORTED, errno.ENOTCONN)


def test_several_mounts_in_one_process_live_and_end_alone(mounts):
    pairs = [mounts.mount() for _ in range(3)]
    child = mounts.child([fd for _, fd in pairs])
    points = [point for point, _ in pairs]
    assert [read(f"{point}/label") for point in points] == [b"label 0", b"label 1", b"label 2"]
    mounts.umount(points[1])
    child.do("end", 1)
    assert [read(f"{points[index]}/label", 100) for index in (0, 2)] == [b"label 0", b"label 2"]
    os.stat(f"{points[0]}/hello")
    for index in (0, 2):
        mounts.umount(points[index])
        child.do("end", index)
    assert [counts["destroy"] for counts in child.expect("ended")["counts"]] == [1, 1, 1]


@pytest.mark.parametrize("clone_fd", [False, True])
def test_no_descriptor_is_left_when_the_mounts_have_ended(mounts, clone_fd):
    pairs = [mounts.mount() for _ in range(3)]
    child = mounts.child([fd for _, fd in pairs], threads=3, clone_fd=clone_fd)
    child.opened(9 if clone_fd else 3)
    before = child.do("fds")
    for index, (point, _) in enumerate(pairs):
        assert read(f"{point}/range") == CONTENT[:4096]
        mounts.umount(point)
        child.do("end", index)
    assert child.do("fuse_fds") == 0
    assert child.do("fds") == before - (9 if clone_fd else 3) - 3  # and one file of each filesystem


def test_closing_while_workers_wait_keeps_the_number_of_the_descriptor_taken(mounts):
    point, child = mounts.serve(threads=3)
    assert read(f"{point}/hello") == CONTENT
    numbers = child.do("close")
    assert numbers["old"] != numbers["other"]
    mounts.umount(point)
    child.expect("ended")
    assert child.do("fuse_fds") == 0


# A server that follows another


def test_reader_does_not_notice_that_the_server_was_killed_and_replaced(mounts):
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if release < (6, 9):
        pytest.skip(f"FUSE_NOTIFY_RESEND needs Linux 6.9; this is {os.uname().release}")
    point, fd = mounts.mount()
    first = mounts.child([fd], keep=True)
    assert read(f"{point}/hello") == CONTENT
    reading = Reading(f"{point}/stuck")
    first.expect("waiting")
    first.kill()
    second = mounts.child([fd], keep=True, agreed=first.agreed)
    second.expect("waiting")
    second.do("complete", "from the second".ljust(4096))
    assert reading.result().rstrip() == b"from the second"
    second.do("notify_inval_inode", 2)
    assert read(f"{point}/hello") == CONTENT
    assert second.agreed == first.agreed


# Notifications


def test_changed_data_is_seen_after_inval_inode(mounts):
    point, child = mounts.serve()
    assert read(f"{point}/label") == b"label 0"
    child.do("set", 10, "LABEL 1")
    assert read(f"{point}/label") == b"label 0"
    assert child.do("notify_inval_inode", 10) is True
    assert read(f"{point}/label") == b"LABEL 1"


def test_name_is_looked_up_again_after_inval_entry(mounts):
    point, child = mounts.serve()
    assert os.stat(f"{point}/label").st_ino == 10
    child.do("name", "label", 0)
    assert os.stat(f"{point}/label").st_ino == 10
    assert child.do("notify_inval_entry", 1, "label") is True
    fails(errno.ENOENT, os.stat, f"{point}/label")


def test_name_is_checked_again_after_it_expired(mounts):
    point, child = mounts.serve()
    if not child.agreed[1] & abi.FUSE_HAS_EXPIRE_ONLY:
        pytest.skip("the kernel has no FUSE_EXPIRE_ONLY (Linux 6.2)")
    os.stat(f"{point}/label")
    before = child.do("counts")["lookup"]
    os.stat(f"{point}/label")
    assert child.do("counts")["lookup"] == before
    assert child.do("expire", 1, "label") is True
    os.stat(f"{point}/label")
    assert child.do("counts")["lookup"] == before + 1


def test_deleted_name_is_gone(mounts):
    point, child = mounts.serve()
    os.stat(f"{point}/label")
    child.do("name", "label", 0)
    assert child.do("notify_delete", 1, 10, "label") is True
    fails(errno.ENOENT, os.stat, f"{point}/label")


def test_stored_data_is_read_without_asking_and_can_be_retrieved(mounts):
    point, child = mounts.serve()
    os.stat(f"{point}/label")
    assert child.do("notify_store", 10, 0, "STORED!") is True
    before = child.do("counts")["read"]
    assert read(f"{point}/label") == b"STORED!"
    assert child.do("counts")["read"] == before
    assert child.do("notify_retrieve", 10, 0, 6) is True
    assert child.expect("retrieved") == {"event": "retrieved", "offset": 0, "data": "STORED"}


def test_notification_of_what_the_kernel_does_not_know_is_false(mounts):
    point, child = mounts.serve()
    os.stat(f"{point}/hello")
    assert child.do("notify_inval_inode", 999) is False
    assert child.do("notify_inval_entry", 1, "never looked up") is False
    assert child.do("notify_inval_entry", 999, "label") is False
    assert child.do("notify_delete", 1, 999, "never looked up") is False
    assert child.do("notify_store", 999, 0, "data") is False
    assert child.do("notify_retrieve", 999, 0, 10) is False


def test_every_name_is_looked_up_again_in_a_new_epoch(mounts):
    point, child = mounts.serve()
    if child.agreed[0] < 44:
        pytest.skip("the kernel has no FUSE_NOTIFY_INC_EPOCH (Linux 6.16)")
    os.stat(f"{point}/label")
    before = child.do("counts")["lookup"]
    assert child.do("notify_inc_epoch") is True
    os.stat(f"{point}/label")
    assert child.do("counts")["lookup"] == before + 1


def test_pruned_nodes_are_forgotten(mounts):
    point, child = mounts.serve()
    if child.agreed[0] < 45:
        pytest.skip("the kernel has no FUSE_NOTIFY_PRUNE (Linux 6.18)")
    os.stat(f"{point}/label")
    os.stat(f"{point}/hello")
    assert child.do("notify_prune", [10, 2]) is True
    # FORGET needs no answer and no caller waits for it: it comes with the next requests.
    deadline = time.monotonic() + PATIENCE
    while child.do("counts")["forget"] < 2 and time.monotonic() < deadline:
        fails(errno.ENOENT, os.stat, f"{point}/missing")
    assert child.do("counts")["forget"] == 2


if __name__ == "__main__":
    serve(sys.argv[1])
