"""The seccomp filter of a server: what a server does goes on under it, and nothing else does.

Long because of two lists: what a guest may ask for, and what nobody may.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rootless
import squashfs_images
from fusewire.linux import seccomp_filter
from fusewire.ops import Lock
from fusewire.testing.guest import FakeGuest, Shape
from fusewire.testing.guest_frontend import Frontend, connect
from fusewire.testing.guest_ring import PAGE
from fusewire.testing.replies import BY_CODE, request
from fusewire.wire import abi
from fusewire.wire.table import TABLE, layout

ROOT = os.geteuid() == 0
PATIENCE = 30.0
HERE = os.path.dirname(os.path.abspath(__file__))


def why_no_filter() -> str:
    """Why no filter can be loaded here, or an empty string."""
    try:
        seccomp_filter.program("kill")
    except OSError as error:
        return str(error)
    return ""


WHY = why_no_filter()
pytestmark = pytest.mark.skipif(bool(WHY), reason=WHY or "-")

# A share as `fusewire share` makes it, with the filter between start and first client. A line when it listens, and one
# at the end that names the modules which were imported meanwhile.
SERVER = """
import json, os, signal, sys
action, source, path, ending, *rest = sys.argv[1:]
import socket
from fusewire.cli import messages, share, share_options
from fusewire.linux import seccomp_filter
from fusewire.serve_share import ShareServer

options = share_options.parse([source, "--socket-path", path, *rest], share_options.SHARE)
factory = share.Source(options.source, options.mount)

def fault(self, nodeid):
    raise RuntimeError("a fault of the filesystem")

def make():
    made = factory()
    if hasattr(type(made), "statx"):
        made.__class__ = type("Faulty", (type(made),), {"statx": lambda self, *arguments: fault(self, 1)})
    return made

listening = socket.socket(socket.AF_UNIX)
listening.bind(path)
listening.listen(1)
listening.setblocking(False)
say = messages.Messages("share", "info", syslog=False)
server = ShareServer(make, listening, queues=2, tag=b"share", threads=2, log=say)
signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
seccomp_filter.import_all("fusewire.fs.sources")
before = set(sys.modules)
seccomp_filter.load(action)
print("listening", flush=True)
server.serve()
print(json.dumps(sorted(set(sys.modules) - before)), flush=True)
listening.close()
factory.close()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can reach."""
    with tempfile.TemporaryDirectory(prefix="fusewire-seccomp-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


class Server:
    """A running server; `python` are the words to start one with."""

    def __init__(self, python: list[str], action: str, source: Path, place: Path, *options: str) -> None:
        self.socket = str(place / "socket")
        command = [*python, "-c", SERVER, action, str(source), self.socket, "", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "listening\n":
            raise AssertionError(self.process.communicate(timeout=PATIENCE))

    def end(self) -> tuple[int, list[str], str]:
        """End it: its status, the modules that it has imported late, what it has said."""
        self.process.send_signal(signal.SIGTERM)
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        # A traceback marks places within lines with the help of `ast`, if it has the lines; it can do without.
        late = set(json.loads(out) if out else []) - {"ast", "_ast"}
        return self.process.returncode, sorted(late), err


@contextmanager
def serving(python: list[str], action: str, source: Path, place: Path, *options: str) -> Iterator[Server]:
    """A server that has to end as it should, having imported nothing while it served."""
    server = Server(python, action, source, place, *options)
    try:
        server.wait()
        yield server
        status, late, said = server.end()
        assert (status, late) == (0, []), said
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
        os.unlink(server.socket)


def tried(function: Callable[..., Any], *arguments: Any, **named: Any) -> int:
    """Call it, and give the errno of what comes of it, 0 for success."""
    try:
        function(*arguments, **named)
    except OSError as error:
        return error.errno or -1
    return 0


def use(guest: FakeGuest) -> None:
    """Everything that a guest asks of a directory, once at least, and a few things that go wrong."""
    guest.init()
    top = guest.mkdir(1, b"top").nodeid
    entry, fh, _ = guest.create(top, b"file")
    node = entry.nodeid
    for size in (5, 200_000):
        assert guest.write(node, fh, 0, b"x" * size) == size
        assert guest.read(node, fh, 0, size) == b"x" * size
    guest.flush(node, fh)
    guest.fsync(node, fh)
    guest.fsync(node, fh, abi.FUSE_FSYNC_FDATASYNC)
    tried(guest.lseek, node, fh, 0, os.SEEK_DATA)  # not offered with the writeback cache
    guest.fallocate(node, fh, 0, 300_000)
    guest.fallocate(node, fh, 0, 4096, 3)  # a hole
    guest.copy_file_range(node, fh, 0, node, fh, 300_000, 5000)
    attributes(guest, node, fh)
    locks(guest, node, fh)
    for command, size in ((0x80086601, 4), (0x801C581F, 28)):
        tried(guest.ioctl, node, fh, command, out_size=size)
    assert tried(guest.ioctl, node, fh, 0x5401, out_size=64) == errno.ENOTTY
    tried(guest.poll, node, fh, 1)
    tried(guest.bmap, node, 0, 4096)
    names(guest, top, node)
    guest.release(node, fh)
    directory, _ = guest.opendir(top)
    assert guest.readdir(top, directory)
    assert guest.readdirplus(top, directory)
    guest.fsyncdir(top, directory)
    guest.releasedir(top, directory)
    guest.statfs()
    tried(guest.syncfs)
    assert tried(guest.statx, node) == errno.EIO  # the fault, whose traceback goes to the log
    everything(guest)
    for name in (b"file", b"other"):
        tried(guest.unlink, top, name)
    guest.rmdir(1, b"top")
    tried(guest.unlink, 1, b"one")
    tried(guest.rmdir, 1, b"one")
    guest.forget_all()


def attributes(guest: FakeGuest, node: int, fh: int) -> None:
    guest.getattr(node)
    guest.getattr(node, fh)
    own = os.geteuid()
    for valid, fields in (
        (abi.FATTR_MODE, {"mode": 0o640}),
        (abi.FATTR_SIZE, {"size": 250_000}),
        (abi.FATTR_SIZE | abi.FATTR_FH, {"size": 260_000, "fh": fh}),
        (abi.FATTR_ATIME | abi.FATTR_MTIME, {"atime": 5, "mtime": 6}),
        (abi.FATTR_ATIME_NOW | abi.FATTR_ATIME, {}),
        (abi.FATTR_UID | abi.FATTR_GID, {"uid": own, "gid": own}),
        (0, {}),
    ):
        tried(guest.setattr, node, valid, **fields)
    tried(guest.access, node, os.R_OK)
    for name in (b"user.one", b"trusted.two", b"security.three"):
        tried(guest.setxattr, node, name, b"value")
        tried(guest.getxattr, node, name)
        tried(guest.listxattr, node)
        tried(guest.removexattr, node, name)
    assert tried(guest.lookup, 1, b"nothing") == errno.ENOENT
    assert tried(guest.getattr, 12345) == errno.ESTALE


def locks(guest: FakeGuest, node: int, fh: int) -> None:
    """Locks of both kinds, and waits for them that end well, or are given up."""
    one, other = Lock(0, 9, fcntl.F_WRLCK, 1), Lock(5, 20, fcntl.F_WRLCK, 2)
    guest.setlk(node, fh, 1, one)
    assert guest.getlk(node, fh, 2, other).type == fcntl.F_WRLCK
    assert tried(guest.setlk, node, fh, 2, other) == errno.EAGAIN
    waiting = guest.start(abi.FUSE_SETLKW, node, struct.pack("=QQQQIIII", fh, 2, *other, 0, 0))
    guest.setlk(node, fh, 1, one._replace(type=fcntl.F_UNLCK))
    guest.finish(waiting)
    waiting = guest.start(abi.FUSE_SETLKW, node, struct.pack("=QQQQIIII", fh, 1, *one, 0, 0))
    guest.interrupt(waiting)
    assert tried(guest.finish, waiting) == errno.EINTR
    for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK):
        guest.setlk(node, fh, 3, one._replace(type=kind), lk_flags=abi.FUSE_LK_FLOCK)


def names(guest: FakeGuest, top: int, node: int) -> None:
    link = guest.symlink(top, b"link", b"/nowhere").nodeid
    assert guest.readlink(link) == b"/nowhere"
    for kind in (stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFCHR):
        if tried(guest.mknod, top, b"node", kind | 0o600, 0x103 if kind == stat.S_IFCHR else 0) == 0:
            guest.unlink(top, b"node")
    guest.link(node, top, b"hard")
    guest.rename(top, b"hard", top, b"other")
    assert tried(guest.rename, top, b"other", top, b"file", 1) == errno.EEXIST
    guest.rename(top, b"other", top, b"file", 2)
    tried(guest.rename, top, b"link", top, b"moved", 4)
    for name in (b"link", b"moved"):
        tried(guest.unlink, top, name)
    before = guest.uid
    for uid in (0, 1000) if ROOT else (0,):  # made as somebody else, with ids of his in the thread
        guest.uid = guest.gid = uid
        if tried(guest.mkdir, top, b"inner") == 0:
            guest.rmdir(top, b"inner")
    guest.uid = guest.gid = before
    if tried(guest.tmpfile, top) == 0:
        guest.tmpfile(top)
    guest.batch_forget([(link, 1)])


def everything(guest: FakeGuest) -> None:
    """Every opcode that there is, and one that there is not, with nothing in its arguments."""
    left_out = {"init", "destroy", "interrupt", "notify_reply"}
    codes = sorted(op.code for op in TABLE if op.name not in left_out)
    for number, code in enumerate((*codes, 4000)):
        op = BY_CODE.get(code)
        body = (bytes(layout(op.args).size) if op is not None and op.args else b"") + b"one\0two\0"
        sent = request(code, 1, body, unique=1_000_000 + 2 * number)
        guest.request(sent, room=guest.room_of(sent))


def live(guest: FakeGuest, path: str) -> None:
    """What virtual machines do with a device besides requests."""
    front = guest.front
    assert front.get_config()
    region = guest.memory.plug(1 << 20)
    front.add_mem_reg(region)
    guest.shape = Shape(at=region.gpa + PAGE)
    guest.getattr(1)
    guest.shape = Shape()
    guest.memory.unplug(region)
    front.rem_mem_reg(region)
    guest.pause()
    inflight = front.get_inflight_fd(3, 128)
    front.set_inflight_fd(inflight)
    guest.resume()
    front.start_log()
    guest.getattr(1)
    assert front.dirty()
    front.stop_log()
    guest.reboot()
    guest.init()
    guest.getattr(1)
    guest.reconnect()
    guest.restart()
    guest.init()
    guest.getattr(1)
    guest.front.hang_up()
    # Nonsense: the server lets go of this client, says so, and takes the next one.
    with connect(path) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(b"\xff" * 300)
        while tried(sock.recv, 100) == 0 and sock.recv(100):
            pass
    with Frontend(path) as mad:
        mad.negotiate()


def whole(server: Server) -> None:
    with FakeGuest.connect(server.socket, queues=2) as guest:
        use(guest)
        guest.queue = 2
        use_again(guest)
        live(guest, server.socket)
    with FakeGuest.connect(server.socket) as guest:
        use_again(guest)
        guest.destroy()


def use_again(guest: FakeGuest) -> None:
    guest.init()
    assert {item.name for item in guest.listdir()} >= {b".", b".."}
    guest.forget_all()


@pytest.fixture(params=["root", "nobody"])
def python(request: pytest.FixtureRequest) -> list[str]:
    """The words to start Python with, as this user and as one who may do nothing."""
    if request.param == "root":
        if not ROOT:
            pytest.skip("needs root")
        return [sys.executable, "-W", "error"]
    return rootless.rootless_python()


@pytest.fixture
def source(place: Path, python: list[str]) -> Path:
    """The directory to share, the server's own; so is the place of its socket."""
    found = place / "source"
    found.mkdir()
    if ROOT and python[0] == "setpriv":
        os.chown(found, rootless.NOBODY, rootless.NOBODY)
        os.chown(place, rootless.NOBODY, rootless.NOBODY)
    return found


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--cache", "none", "--posix-acl", "--xattrmap", ":map::user.virtiofs.:"),
        ("--cache", "always", "--inode-file-handles=prefer", "--writeback"),
    ],
    ids=["plain", "none", "handles"],
)
def test_directory_is_served_under_the_filter(
    python: list[str], source: Path, place: Path, options: tuple[str, ...]
) -> None:
    with serving(python, "kill", source, place, *options) as server:
        whole(server)
        task = f"/proc/{server.process.pid}/status"
        status = dict(line.split(":\t", 1) for line in Path(task).read_text().splitlines() if ":\t" in line)
        assert status["Seccomp"].strip() == "2"
        assert status["NoNewPrivs"].strip() == "1"
    assert os.listdir(source) == []


def test_fault_under_the_filter_is_reported_with_its_traceback(source: Path, place: Path, python: list[str]) -> None:
    server = Server(python, "kill", source, place)
    try:
        server.wait()
        with FakeGuest.connect(server.socket) as guest:
            guest.init()
            assert tried(guest.statx, 1) == errno.EIO
    finally:
        status, late, said = server.end()
        os.unlink(server.socket)
    assert (status, late) == (0, [])
    assert "RuntimeError: a fault of the filesystem" in said
    assert "Traceback (most recent call last)" in said


@pytest.mark.parametrize("compressor", squashfs_images.COMPRESSORS)
def test_image_is_served_under_the_filter(place: Path, compressor: str) -> None:
    python = rootless.rootless_python()
    tree = place / "tree"
    tree.mkdir()
    (tree / "text").write_bytes(squashfs_images.text(300_000))
    (tree / "noise").write_bytes(squashfs_images.noise(200_000))
    (tree / "link").symlink_to("text")
    image = squashfs_images.mksquashfs(tree, place / "image", "-comp", compressor)
    if ROOT:
        os.chown(place, rootless.NOBODY, rootless.NOBODY)
    with serving(python, "kill", image, place) as server:
        for _ in range(2):
            with FakeGuest.connect(server.socket) as guest:
                guest.init()
                for name in ("text", "noise"):
                    assert guest.read_file(name.encode()) == (tree / name).read_bytes()
                assert guest.readlink(guest.lookup(1, b"link").nodeid) == b"text"
                guest.listdir()
                guest.statfs()
                everything(guest)


def test_calls_of_a_server_are_on_the_list(place: Path) -> None:
    """A tracer sees all of them, also those that a log would leave out for their number."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    source, trace = place / "source", place / "trace"
    source.mkdir()
    os.mkfifo(trace)
    words: list[str] = []
    reader = threading.Thread(target=lambda: words.append(trace.read_text()))
    reader.start()
    # -D: the tracer is the server's grandchild, and not the other way round.
    tracer = [strace, "-D", "-f", "-qq", "-e", "signal=none", "-o", str(trace)]
    with serving([*tracer, sys.executable, "-W", "error"], "log", source, place) as server:
        whole(server)
    reader.join(PATIENCE)
    lines = words[0].splitlines()
    loaded = max(number for number, line in enumerate(lines) if "SECCOMP_SET_MODE_FILTER" in line)
    calls = {found[1] for line in lines[loaded + 1 :] if (found := re.match(r"\d+ +(\w+)\(", line))}
    assert len(calls) > 40
    assert calls - seccomp_filter.ALLOWED - seccomp_filter.LIMITED == set()


# What must not be done. Each in a process of its own that has loaded the filter: the signal that ended it, or the
# errno, or "done".
PROBES = """
import ctypes, errno, json, os, signal, sys
from fusewire.linux import seccomp_filter
action, *probes = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
library = seccomp_filter._Library()
found = []
for name, *arguments in probes:
    number = name if isinstance(name, int) else library.number(name)
    if number is None:
        found.append("no such call")
        continue
    arguments = [
        word[0].encode() if isinstance(word, list) else ctypes.c_long(os.getpid() if word == "parent" else word)
        for word in arguments
    ]
    child = os.fork()
    if child == 0:
        seccomp_filter.load(action)
        result = libc.syscall(ctypes.c_long(number), *arguments)
        os._exit(ctypes.get_errno() if result == -1 else 200)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    found.append("done" if code == 200 else signal.Signals(-code).name if code < 0 else errno.errorcode[code])
print(json.dumps(found))
"""


def probe(action: str, *probes: list[Any]) -> list[str]:
    """What comes of raw calls, by number or name."""
    ran = subprocess.run(
        [sys.executable, "-c", PROBES, json.dumps([action, *probes])], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    found: list[str] = json.loads(ran.stdout)
    return found


FORBIDDEN: list[list[Any]] = [
    ["execve", ["/bin/true"], 0, 0],
    ["execveat", -100, ["/bin/true"], 0, 0, 0],
    ["fork"],
    ["vfork"],
    ["clone", signal.SIGCHLD, 0, 0, 0, 0],
    ["clone", 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0],  # CLONE_NEWUSER
    ["clone", 0x10010000, 0, 0, 0, 0],  # and CLONE_THREAD, which the kernel refuses by itself
    ["socket", 1, 1, 0],
    ["socketpair", 1, 1, 0, 0],
    ["connect", 0, 0, 0],
    ["bind", 0, 0, 0],
    ["listen", 0, 1],
    ["sendto", 0, 0, 0, 0, 0, 0],
    ["setsockopt", 0, 0, 0, 0, 0],
    ["ptrace", 0, 0, 0, 0],
    ["process_vm_readv", 1, 0, 0, 0, 0, 0],
    ["process_vm_writev", 1, 0, 0, 0, 0, 0],
    ["process_madvise", 0, 0, 0, 0, 0],
    ["kcmp", 1, 1, 0, 0, 0],
    ["mount", ["x"], ["/nowhere"], ["tmpfs"], 0, 0],
    ["umount2", ["/nowhere"], 0],
    ["pivot_root", ["."], ["."]],
    ["chroot", ["/"]],
    ["fsopen", ["tmpfs"], 0],
    ["fsmount", 0, 0, 0],
    ["fsconfig", 0, 0, 0, 0, 0],
    ["open_tree", -100, ["."], 1],
    ["move_mount", 0, [""], 0, [""], 0],
    ["mount_setattr", 0, [""], 0, 0, 0],
    ["unshare", 0x00020000],  # CLONE_NEWNS
    ["unshare", 0x10000000],  # CLONE_NEWUSER
    ["unshare", 0x00000600],  # CLONE_FS | CLONE_FILES
    ["setns", 0, 0],
    ["bpf", 0, 0, 0],
    ["perf_event_open", 0, 0, 0, 0, 0],
    ["keyctl", 0, 0, 0, 0, 0],
    ["add_key", 0, 0, 0, 0, 0],
    ["request_key", 0, 0, 0, 0],
    ["io_uring_setup", 1, 0],
    ["io_uring_enter", 0, 0, 0, 0, 0],
    ["io_setup", 1, 0],
    ["userfaultfd", 0],
    ["personality", 0],
    ["seccomp", 0, 0, 0],
    ["kill", "parent", 0],
    ["tkill", "parent", 0],
    ["tgkill", "parent", "parent", 0],
    ["rt_sigqueueinfo", "parent", 0, 0],
    ["pidfd_open", "parent", 0],
    ["pidfd_send_signal", 0, 0, 0, 0],
    ["pidfd_getfd", 0, 0, 0],
    ["prlimit64", "parent", 7, 0, 0],
    ["sched_setaffinity", "parent", 0, 0],
    ["setpriority", 0, "parent", 0],
    ["setuid", 0],
    ["setgid", 0],
    ["setresuid", 0, 0, 0],
    ["setresgid", 0, 0, 0],
    ["setsid"],
    ["prctl", 22, 1, 0, 0, 0],  # PR_SET_SECCOMP
    ["prctl", 35, 0, 0, 0, 0],  # PR_SET_MM
    ["prctl", 47, 2, 0, 0, 0],  # PR_CAP_AMBIENT_RAISE
    ["prctl", 28, 0, 0, 0, 0],  # PR_SET_SECUREBITS
    ["prctl", 8, 1, 0, 0, 0],  # PR_SET_KEEPCAPS
    ["arch_prctl", 0, 0],
    ["ioctl", 0, 0x5412, 0],  # TIOCSTI
    ["ioctl", 0, 0x8901, 0],  # FIOSETOWN
    ["ioctl", 0, 0x40049409, 0],  # FICLONE
    ["fcntl", 0, 8, 0],  # F_SETOWN
    ["fcntl", 0, 10, 9],  # F_SETSIG
    ["fcntl", 0, 1024, 0],  # F_SETLEASE
    ["fcntl", 0, 1026, 0],  # F_NOTIFY
    ["splice", 0, 0, 0, 0, 0, 0],
    ["vmsplice", 0, 0, 0, 0],
    ["remap_file_pages", 0, 0, 0, 0, 0],
    ["pkey_mprotect", 0, 0, 0, 0],
    ["memfd_secret", 0],
    ["shmget", 0, 4096, 0],
    ["mq_open", ["/x"], 0, 0, 0],
    ["init_module", 0, 0, 0],
    ["finit_module", 0, [""], 0],
    ["kexec_load", 0, 0, 0, 0],
    ["reboot", 0, 0, 0, 0],
    ["swapon", ["/nowhere"], 0],
    ["quotactl", 0, 0, 0, 0],
    ["acct", 0],
    ["syslog", 0, 0, 0],
    ["settimeofday", 0, 0],
    ["clock_settime", 0, 0],
    ["clock_adjtime", 0, 0],
    ["sethostname", ["x"], 0],
    ["fanotify_init", 0, 0],
    ["timer_create", 0, 0, 0],
    ["wait4", -1, 0, 1, 0],
]


def test_what_is_not_on_the_list_ends_the_process() -> None:
    outcomes = probe("kill", *FORBIDDEN)
    assert [(*what, outcome) for what, outcome in zip(FORBIDDEN, outcomes, strict=True) if outcome != "SIGSYS"] in (
        [],
        [(*what, "no such call") for what in FORBIDDEN if what[0] in ("fork", "vfork", "arch_prctl")],  # aarch64
    )


REFUSED: list[tuple[list[Any], str]] = [
    (["clone3", 0, 0], "ENOSYS"),
    ([500, 0], "ENOSYS"),  # what kernels to come may have
    (["mmap", 0, 4096, 5, 0x22, -1, 0], "EACCES"),  # PROT_READ | PROT_EXEC
    (["mmap", 0, 4096, 7, 0x22, -1, 0], "EACCES"),
    (["mprotect", 0, 4096, 4], "EACCES"),
    (["ioctl", 0, 0x5401, 0], "ENOTTY"),
    (["ioctl", 0, 0x5413, 0], "ENOTTY"),
]
DONE: list[list[Any]] = [
    ["unshare", 0x200],
    ["getppid"],
    ["mmap", 0, 4096, 3, 0x22, -1, 0],
    ["mprotect", 0, 0, 3],
    ["prctl", 38, 1, 0, 0, 0],
    ["prlimit64", 0, 7, 0, 0],
    ["memfd_create", ["x"], 0],
    ["fchdir", 9999],
]


def test_what_has_another_way_is_refused_by_an_error() -> None:
    assert probe("kill", *(what for what, _ in REFUSED)) == [outcome for _, outcome in REFUSED]


def test_what_is_on_the_list_is_done() -> None:
    assert probe("kill", *DONE) == [*["done"] * (len(DONE) - 1), "EBADF"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86_64 has the calls of another machine, x32")
def test_calls_of_another_machine_end_the_process() -> None:
    assert probe("kill", [0x40000000 | 39]) == ["SIGSYS"]


def test_log_and_none_let_everything_go_on() -> None:
    for action in ("log", "none"):
        assert probe(action, ["getpgid", 0], ["mmap", 0, 4096, 5, 0x22, -1, 0], ["sched_get_priority_max", 0]) == [
            "done",
            "done",
            "done",
        ]


def child(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_trap_names_the_call_with_a_traceback_of_its_thread() -> None:
    ran = child(
        "import os, threading\n"
        "from fusewire.linux import seccomp_filter\n"
        "seccomp_filter.import_all()\n"
        "seccomp_filter.load('trap')\n"
        "def careless(): os.getpgid(0)\n"
        "worker = threading.Thread(target=careless, name='worker-7')\n"
        "worker.start()\n"
        "worker.join()\n"
        "print('alive')\n"
    )
    assert ran.returncode == -signal.SIGSYS
    assert ran.stdout == ""
    assert "the system call getpgid is not allowed; thread worker-7 made it" in ran.stderr
    assert "in careless" in ran.stderr


def test_trap_tells_whom_it_is_given() -> None:
    ran = child(
        "import socket\n"
        "from fusewire.linux import seccomp_filter\n"
        "seccomp_filter.load('trap', say=lambda message: print('HEARD', message, flush=True))\n"
        "socket.socket()\n"
    )
    assert ran.returncode == -signal.SIGSYS
    assert ran.stdout.startswith("HEARD seccomp: the system call socket is not allowed; thread MainThread made it:\n")


@pytest.mark.parametrize(("action", "status"), [("kill", -signal.SIGSYS), ("trap", 128 + signal.SIGSYS)])
def test_first_process_of_a_namespace_is_ended_too(action: str, status: int) -> None:
    """Signals that it sends to itself do nothing to it; what the kernel forces does."""
    words = ["unshare", "--pid", "--fork", *([] if ROOT else ["--user", "--map-root-user"]), "--"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    program = (
        "import os\nfrom fusewire.linux import seccomp_filter\nassert os.getpid() == 1\n"
        f"seccomp_filter.load({action!r})\nos.getpgid(0)\nprint('alive')\n"
    )
    ran = subprocess.run([*words, sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (status, "")
    assert ("getpgid is not allowed" in ran.stderr) == (action == "trap")


def test_threads_that_run_already_are_bound_too() -> None:
    ran = child(
        "import os, threading\n"
        "from fusewire.linux import seccomp_filter\n"
        "go = threading.Event()\n"
        "worker = threading.Thread(target=lambda: (go.wait(), os.getpgid(0)))\n"
        "worker.start()\n"
        "seccomp_filter.load('kill')\n"
        "go.set()\n"
        "worker.join()\n"
        "print('alive')\n"
    )
    assert (ran.returncode, ran.stdout) == (-signal.SIGSYS, "")


def test_python_ends_as_it_should_under_the_filter() -> None:
    """Daemon threads that want the interpreter when it is gone end by pthread_exit, for which glibc loads a library."""
    ran = child(
        "import os, threading, time\n"
        "from fusewire.linux import seccomp_filter\n"
        "seccomp_filter.import_all()\n"
        "seccomp_filter.load('kill')\n"
        "def work():\n"
        "    while True: time.sleep(0)\n"
        "for _ in range(4): threading.Thread(target=work, daemon=True).start()\n"
        "print('done', flush=True)\n"
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "done\n", "")


def test_extra_calls_are_allowed() -> None:
    assert (
        child(
            "import os\nfrom fusewire.linux import seccomp_filter\n"
            "seccomp_filter.load('kill', extra=('getpgid', 'clone', 'execve', 'arch_prctl', 'wait4'))\n"
            "print(os.getpgid(0) > 0)\n"
        ).stdout
        == "True\n"
    )


def test_syslog_sends_where_it_is_connected_and_does_not_connect_again(place: Path) -> None:
    ran = child(
        "import os, socket\n"
        "from fusewire.linux import seccomp_filter\n"
        "one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "seccomp_filter.load('kill', syslog=True)\n"
        "one.send(b'message')\n"
        "print(other.recvmsg(100)[0])\n"
        "try: socket.socket(socket.AF_UNIX)\n"
        "except PermissionError: print('refused', flush=True)\n"
        f"one.sendto(b'message', {str(place / 'socket')!r})\n"
    )
    assert ran.returncode == -signal.SIGSYS
    assert ran.stdout == "b'message'\nrefused\n"


def test_bad_words_are_refused() -> None:
    with pytest.raises(ValueError, match="no such action: perhaps"):
        seccomp_filter.load("perhaps")
    with pytest.raises(ValueError, match="no such system call: opeenat"):
        seccomp_filter.load("kill", extra=("opeenat",))


def test_missing_library_is_named_with_its_package() -> None:
    ran = child(
        "import ctypes\nfrom fusewire.linux import seccomp_filter\n"
        "def missing(name, **how): raise OSError(f'{name}: cannot open shared object file')\n"
        "ctypes.CDLL = missing\n"
        "seccomp_filter.load('none')\n"
        "try: seccomp_filter.load('kill')\n"
        "except OSError as error: print(error)\n"
    )
    assert "libseccomp2" in ran.stdout
    assert "libseccomp.so.2: cannot open shared object file" in ran.stdout


def test_names_are_those_of_system_calls() -> None:
    library = seccomp_filter._Library()
    everything = seccomp_filter.ALLOWED | seccomp_filter.LIMITED
    assert {name for name in everything if not library.knows(name)} == set()
    assert not seccomp_filter.ALLOWED & seccomp_filter.LIMITED
    assert {rule[0] for rule in seccomp_filter._limited()} == seccomp_filter.LIMITED


def test_names_are_there_on_both_machines() -> None:
    """What x86_64 has and aarch64 has not are the old forms of calls, and the other way round there is nothing."""
    library = ctypes.CDLL("libseccomp.so.2")
    there = {}
    for machine, token in (("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)):
        library.seccomp_syscall_resolve_name_arch.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
        there[machine] = {
            name
            for name in seccomp_filter.ALLOWED | seccomp_filter.LIMITED
            if library.seccomp_syscall_resolve_name_arch(token, name.encode()) >= 0
        }
    assert there["aarch64"] - there["x86_64"] == set()
    old = """open stat lstat access readlink mkdir rmdir unlink link symlink rename mknod chmod chown lchown utimes
        getdents poll select epoll_wait dup2 time pause"""
    assert there["x86_64"] - there["aarch64"] == set(old.split())


def test_audit_number_has_its_name() -> None:
    number = {"x86_64": 59, "aarch64": 221}.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of execve on {platform.machine()} is not known here")
    assert seccomp_filter.syscall_name(number) == "execve"
    assert seccomp_filter.syscall_name(9999) == "number 9999"


def test_program_is_short_and_whole() -> None:
    program = seccomp_filter.program("kill")
    assert len(program) % 8 == 0
    assert 100 < len(program) // 8 < 4096  # BPF_MAXINSNS
    assert seccomp_filter.program("trap") != program
