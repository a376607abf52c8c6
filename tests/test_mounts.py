"""Ways to run a filesystem from Python, as root and as a user without any privilege: each test is a program of its own.

What a program prints is what the test looks at; it ends with status 0 unless something in it has failed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rootless
from fusewire.testing.guest import FakeGuest

PATIENCE = 30.0

# A filesystem with one file, which says how often it has been read, and in which process it lives.
PRELUDE = """
import ctypes  # libffi 3.5 opens itself then
import errno, json, mmap, os, signal, stat, subprocess, sys, threading, time
import fusewire

class Hello(fusewire.Operations):
    text = b"hello world\\n"
    def __init__(self):
        self.reads = 0
        self.life = []
    def init(self, connection):
        self.life.append("init")
    def destroy(self):
        self.life.append("destroy")
    def _attr(self, nodeid):
        mode, size = (stat.S_IFDIR | 0o755, 0) if nodeid == 1 else (stat.S_IFREG | 0o644, len(self.text))
        return fusewire.attr(nodeid, mode, size, uid=os.getuid(), gid=os.getgid())
    def lookup(self, caller, parent, name):
        return fusewire.Entry(2, self._attr(2)) if name == b"hello" else None
    def getattr(self, nodeid, flags, fh):
        return self._attr(nodeid), 1
    def open(self, caller, nodeid, flags, open_flags):
        return 0, 0
    def read(self, nodeid, fh, offset, size, *rest):
        self.reads += 1
        return self.text[offset : offset + size]
    def readdir(self, nodeid, fh, offset, size, *rest):
        from fusewire.wire.codec import DirBuffer
        listing = DirBuffer(size)
        names = [(b".", 1, 4), (b"..", 1, 4), (b"hello", 2, 8)]
        for cookie, (name, child, kind) in enumerate(names[offset:], offset + 1):
            if not listing.add(name, child, cookie, kind):
                break
        return listing.data

def read(path):
    with open(path, "rb") as file:
        return file.read()

def children():
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
        return file.read().split()

def fds():
    return sorted(os.listdir("/proc/self/fd"))

def fails(number, function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno == number, error
        return str(error)
    raise AssertionError("it did not fail")
"""


class User:
    """Runs programs as root or as nobody, and has a directory of theirs."""

    def __init__(self, name: str) -> None:
        if name == "root" and os.geteuid() != 0:
            pytest.skip("needs root")
        self.name = name
        self.place = Path(tempfile.mkdtemp(prefix="fusewire-mounts-", dir="/tmp"))
        if name == "root":
            rootless.open_fuse_device()
            self.words = [sys.executable, "-W", "error"]
        else:
            self.words = rootless.rootless_python(fusermount=name == "fusermount")
            if os.geteuid() == 0:
                os.chown(self.place, rootless.NOBODY, rootless.NOBODY)

    def start(self, program: str, *arguments: object) -> subprocess.Popen[str]:
        words = [*self.words, "-c", PRELUDE + program, *map(str, arguments)]
        return subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.place
        )

    def run(self, program: str, *arguments: object, status: int = 0) -> tuple[str, str]:
        with self.start(program, *arguments) as process:
            try:
                out, err = process.communicate(timeout=PATIENCE)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == status, err
        return out, err


def users(*names: str) -> Iterator[User]:
    for name in names:
        user = User(name)
        try:
            yield user
        finally:
            left = os.listdir(user.place)
            for name in left:
                subprocess.run(["umount", "-l", user.place / name], stderr=subprocess.DEVNULL)
            shutil.rmtree(user.place)
        assert left == []


@pytest.fixture(params=["root", "rootless"])
def user(request) -> Iterator[User]:
    yield from users(request.param)


@pytest.fixture
def rootless_user() -> Iterator[User]:
    yield from users("rootless")


@pytest.fixture(params=[False, True], ids=["child", "in_process"])
def in_process(request) -> bool:
    return request.param


# mounted()


def test_mount_without_a_mount_point_is_used_by_the_program_its_threads_and_its_children(user, in_process):
    out, _ = user.run(
        """
before = fds(), children()
with fusewire.mounted(Hello(), in_process=IN_PROCESS) as m:
    found = [os.listdir(m.path), read(m.path + "/hello").decode()]
    thread = threading.Thread(target=lambda: found.append(read(m.path + "/hello").decode()))
    thread.start(); thread.join()
    found.append(subprocess.check_output(["cat", m.path + "/hello"], text=True))
    assert m.is_alive and (m.pid == os.getpid()) == IN_PROCESS
    m.check()
    assert os.path.samefile(m.path, m.path + "/.")
assert not m.is_alive and not os.path.exists(m.path + "/hello")
assert (fds(), children()) == before, (fds(), children(), before)
print(json.dumps(found))
""".replace("IN_PROCESS", str(in_process))
    )
    text = "hello world\n"
    assert json.loads(out) == [["hello"], text, text, text]


def test_file_can_be_mapped_by_the_program_that_a_child_serves(user):
    user.run(
        """
with fusewire.mounted(Hello()) as m, open(m.path + "/hello", "rb") as file:
    with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == Hello.text
"""
    )


def test_other_processes_of_the_user_find_it(rootless_user):
    with rootless_user.start(
        "with fusewire.mounted(Hello()) as m:\n    print(m.path, flush=True)\n    sys.stdin.read()\n"
    ) as server:
        path = server.stdout.readline().strip()
        out, _ = rootless_user.run("print(read(sys.argv[1] + '/hello').decode(), end='')", path)
        assert out == "hello world\n"
        server.communicate(timeout=PATIENCE)
    assert server.returncode == 0


def test_mount_at_a_path_is_gone_afterwards(user, in_process):
    out, _ = user.run(
        """
for place in ("new", "there"):
    with fusewire.mounted(Hello(), place, in_process=IN_PROCESS) as m:
        assert m.path == os.path.abspath(place)
        assert read(place + "/hello") == Hello.text
        assert subprocess.check_output(["cat", m.path + "/hello"]) == Hello.text
        print(os.path.islink(place))
    assert not os.path.lexists("new")
    os.makedirs("there", exist_ok=True)
assert os.listdir("there") == []
os.rmdir("there")
""".replace("IN_PROCESS", str(in_process))
    )
    assert out.split() == [str(user.name == "rootless")] * 2


def test_filesystem_in_the_process_shares_its_state(user):
    user.run(
        """
here, there = Hello(), Hello()
with fusewire.mounted(here, in_process=True) as m:
    read(m.path + "/hello")
    assert here.reads > 0
    here.text = b"changed\\n"
    time.sleep(0)
with fusewire.mounted(there) as m:
    read(m.path + "/hello")
assert there.reads == 0 and there.life == []
assert here.life == ["init", "destroy"]
"""
    )


def test_mount_ends_with_an_exception(user, in_process):
    user.run(
        """
before = fds()
try:
    with fusewire.mounted(Hello(), "mnt", in_process=IN_PROCESS) as m:
        raise ValueError("in the middle")
except ValueError as error:
    assert not hasattr(error, "__notes__")
assert not os.path.lexists("mnt") and fds() == before and not children()
""".replace("IN_PROCESS", str(in_process))
    )


def test_filesystem_that_does_not_start_says_so(user, in_process):
    out, _ = user.run(
        """
class Broken(Hello):
    def init(self, connection):
        raise ValueError("no such source")
before = fds()
for place in (None, "mnt"):
    print(fails(errno.EPROTO, lambda: fusewire.mounted(Broken(), place, in_process=IN_PROCESS, log=lambda *_: None)))
assert not os.path.lexists("mnt") and fds() == before and not children()
""".replace("IN_PROCESS", str(in_process))
    )
    assert out.count("no such source") == 2


def test_place_that_cannot_be_a_mount_point_is_told(user, in_process):
    out, _ = user.run(
        """
open("file", "w").close()
try:
    fusewire.mounted(Hello(), "file", in_process=IN_PROCESS)
except fusewire.MountError as error:
    print(error)
os.unlink("file")
assert not children()
""".replace("IN_PROCESS", str(in_process))
    )
    assert "not a directory" in out and "namespace:" in out


def test_server_that_is_killed_is_told_and_leaves_no_hanging_calls(user):
    out, _ = user.run(
        """
for place in (None, "mnt"):
    try:
        with fusewire.mounted(Hello(), place) as m:
            file = open(m.path + "/hello", "rb", buffering=0)
            os.kill(m.pid, signal.SIGKILL)
            while m.is_alive:
                time.sleep(0.001)
            print(fails(errno.ENOTCONN, m.check))
            number = errno.ENOENT if os.path.islink(m.path) and place else errno.ENOTCONN
            fails(number, os.listdir, m.path)
            fails(errno.ENOTCONN, file.close)
    except OSError as error:
        assert error.errno == errno.ENOTCONN
        print(error)
    else:
        raise AssertionError("nobody was told")
    assert not os.path.lexists("mnt"), os.listdir(".")
assert not children()
"""
    )
    assert out.count("was killed by signal 9") == 4


def test_exception_that_a_killed_server_causes_has_a_note(user):
    user.run(
        """
try:
    with fusewire.mounted(Hello()) as m:
        os.kill(m.pid, signal.SIGKILL)
        while m.is_alive:
            time.sleep(0.001)
        read(m.path + "/hello")
except OSError as error:
    assert error.errno == errno.ENOTCONN and "killed by signal 9" in error.__notes__[0], error.__notes__
"""
    )


def test_server_ends_when_the_program_is_killed(user):
    with user.start(
        """
m = fusewire.mounted(Hello(), "mnt")
keep = os.pipe()
if os.fork() == 0:      # a child with copies of all descriptors, who outlives the program
    os.setsid()
    os.read(keep[0], 1)
    time.sleep(60)
print(m.pid, children()[-1], flush=True)
sys.stdin.read()
"""
    ) as program:
        server, bystander = map(int, program.stdout.readline().split())
        watch = select.poll()
        pidfd = os.pidfd_open(server)
        try:
            watch.register(pidfd, select.POLLIN)
            program.kill()
            assert watch.poll(PATIENCE * 1000)
        finally:
            os.close(pidfd)
            os.kill(bystander, signal.SIGKILL)
        program.communicate()
    assert os.listdir(user.place) == []


def test_server_that_hangs_at_its_start_ends_with_the_program(user):
    with user.start(
        """
class Hanging(Hello):
    def init(self, connection):
        print(os.getpid(), flush=True)
        threading.Event().wait()
fusewire.mounted(Hanging(), "mnt")
"""
    ) as program:
        pidfd = os.pidfd_open(int(program.stdout.readline()))
        try:
            watch = select.poll()
            watch.register(pidfd, select.POLLIN)
            program.kill()
            assert watch.poll(PATIENCE * 1000)
        finally:
            os.close(pidfd)
        program.communicate()
    assert os.listdir(user.place) == []


def test_server_that_dies_at_its_start_leaves_no_mount(user):
    out, _ = user.run(
        """
class Dying(Hello):
    def init(self, connection):
        os.kill(os.getpid(), signal.SIGKILL)
before = fds()
for place in (None, "mnt"):
    print(fails(errno.EIO, fusewire.mounted, Dying(), place))
    assert not os.path.lexists("mnt")
assert fds() == before and not children()
assert str(os.getcwd()) not in read("/proc/self/mountinfo").decode()
"""
    )
    assert out.count("was killed by signal 9 before the mount was ready") == 2


def test_error_before_the_start_leaves_nothing(user, in_process):
    user.run(
        """
before = fds()
for place in (None, "mnt"):
    try:
        fusewire.mounted(Hello(), place, in_process=IN_PROCESS, threads="many")
    except (TypeError, RuntimeError) as error:
        assert "not supported between instances" in str(error)
    else:
        raise AssertionError("it has started")
assert fds() == before and not children() and os.listdir() == []
fails(errno.EINVAL, lambda: fusewire.mounted(Hello(), in_process=IN_PROCESS, strategy="direct"))
""".replace("IN_PROCESS", str(in_process))
    )


def test_method_that_ends_its_thread_ends_the_mount_in_the_end_and_nobody_hangs(user, in_process):
    out, _ = user.run(
        """
class Ending(Hello):
    def read(self, *arguments):
        raise SystemExit("enough")
before = fds()
try:
    with fusewire.mounted(Ending(), in_process=IN_PROCESS, threads=2, log=lambda *_: None) as m:
        numbers = set()
        while errno.ENOTCONN not in numbers:
            try:
                read(m.path + "/hello")
            except OSError as error:
                numbers.add(error.errno)
        assert numbers <= {errno.EIO, errno.ECONNABORTED, errno.ENOTCONN}, numbers
        while m.is_alive:
            time.sleep(0.001)
        print(fails(errno.ENOTCONN, m.check))
except OSError as error:
    print(error)
assert fds() == before and not children()
""".replace("IN_PROCESS", str(in_process))
    )
    assert out.count("a method raised SystemExit('enough')") == 2


def test_processes_that_the_filesystem_forks_do_not_keep_the_mount(user, in_process):
    user.run(
        """
reader, writer = os.pipe()
class Forking(Hello):
    def init(self, connection):
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
with fusewire.mounted(Forking(), in_process=IN_PROCESS) as m:
    read(m.path + "/hello")
    m.unmount()
    assert not m.is_alive
os.close(writer)
if IN_PROCESS:
    os.wait()
""".replace("IN_PROCESS", str(in_process))
    )


def test_threads_mount_at_the_same_time(user):
    user.run(
        """
before, failures = fds(), []
def work(in_process):
    try:
        for _ in range(5):
            with fusewire.mounted(Hello(), in_process=in_process) as m:
                assert read(m.path + "/hello") == Hello.text
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work, args=(number % 2 == 1,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
assert fds() == before and not children()
"""
    )


def test_copies_of_its_socket_do_not_hide_the_end_of_a_child(user):
    user.run(
        """
from fusewire.linux import process
copies, pair = [], process.socket_pair
def copied(**options):
    ours, theirs = pair(**options)
    copies.extend([os.dup(ours), os.dup(theirs)])   # as in a child that another thread has forked meanwhile
    return ours, theirs
process.socket_pair = copied
for in_process in (False, True):
    with fusewire.mounted(Hello(), in_process=in_process) as m:
        assert read(m.path + "/hello") == Hello.text
    assert not children()
assert len(copies) == 4
"""
    )


def test_fifty_mounts_leave_nothing(user, in_process):
    user.run(
        """
import tempfile
tempfile.tempdir = os.getcwd()
with fusewire.mounted(Hello(), in_process=IN_PROCESS):
    pass
before = fds()
for _ in range(50):
    with fusewire.mounted(Hello(), in_process=IN_PROCESS) as m:
        read(m.path + "/hello")
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)
assert fds() == before and not children() and threading.active_count() == 1 and os.listdir() == []
""".replace("IN_PROCESS", str(in_process))
    )


def test_filesystem_in_the_process_may_use_its_own_mount(user):
    user.run(
        """
class Looking(Hello):
    def read(self, *arguments):
        return str(os.listdir(m.path)).encode()
    def open(self, caller, nodeid, flags, open_flags):
        return 0, 1  # direct_io: it is read as far as it goes
with fusewire.mounted(Looking(), in_process=True, threads=3) as m:
    descriptor = os.open(m.path + "/hello", os.O_RDONLY)
    assert os.read(descriptor, 100) == b"['hello']"
    os.close(descriptor)
"""
    )


def test_program_that_is_interrupted_while_it_waits_leaves_nothing(user, in_process):
    out, _ = user.run(
        """
class Hanging(Hello):
    def init(self, connection):
        os.kill(PROGRAM, signal.SIGINT)
        threading.Event().wait()
PROGRAM = os.getpid()
try:
    fusewire.mounted(Hanging(), "mnt", in_process=IN_PROCESS)
except KeyboardInterrupt:
    print("interrupted")
assert not os.path.lexists("mnt") and not children()
""".replace("IN_PROCESS", str(in_process))
    )
    assert out == "interrupted\n"


def test_signal_that_comes_at_any_moment_of_the_start_leaves_nothing(user):
    user.run(
        """
import tempfile, warnings
warnings.simplefilter("ignore")   # of mounts that nobody has got
class Interrupted(BaseException): pass
def interrupt(*_):
    raise Interrupted
tempfile.tempdir = os.getcwd()
with fusewire.mounted(Hello()):
    pass
before, count = fds(), 0
signal.signal(signal.SIGALRM, interrupt)
for number in range(1, 31):
    m = None
    try:
        signal.setitimer(signal.ITIMER_REAL, number / 2000)
        m = fusewire.mounted(Hello())
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        count += 1
    if m is not None:
        with m:
            pass
assert count > 0
assert fds() == before and not children() and os.listdir() == [], (fds(), children(), os.listdir())
"""
    )


def test_thread_that_mounted_may_end(user):
    user.run(
        """
found = []
thread = threading.Thread(target=lambda: found.append(fusewire.mounted(Hello())))
thread.start(); thread.join()
with found[0] as m:
    assert read(m.path + "/hello") == Hello.text
"""
    )


def test_mount_in_use_is_busy_and_lives_on(user):
    user.run(
        """
with fusewire.mounted(Hello()) as m:
    for _ in range(2):
        with open(m.path + "/hello", "rb", buffering=0) as file:
            assert "in use" in fails(errno.EBUSY, m.unmount)
            assert read(m.path + "/hello") == Hello.text and m.is_alive
    m.unmount()
    assert not m.is_alive and not children()
    m.unmount()
"""
    )


def test_lazy_unmount_leaves_it_to_those_who_have_it_open(user, in_process):
    user.run(
        """
with fusewire.mounted(Hello(), in_process=IN_PROCESS) as m:
    with open(m.path + "/hello", "rb", buffering=0) as file:
        m.unmount(lazy=True)
        fails(errno.ENOTDIR if not IN_PROCESS else errno.ENOENT, os.stat, m.path + "/hello")
        assert file.read() == Hello.text
assert not m.is_alive and not children()
""".replace("IN_PROCESS", str(in_process))
    )


def test_end_does_not_wait_for_those_who_stay(user):
    user.run(
        """
with fusewire.mounted(Hello()) as m:
    file = open(m.path + "/hello", "rb", buffering=0)
assert not children()
fails(errno.ENOTCONN, file.read)
fails(errno.ENOTCONN, file.close)
"""
    )


def test_those_who_stay_are_served_on_by_the_program_itself(user):
    user.run(
        """
fs = Hello()
with fusewire.mounted(fs, in_process=True) as m:
    file = open(m.path + "/hello", "rb", buffering=0)
assert not os.path.exists(m.path + "/hello") and fs.life == ["init"]
assert file.read() == Hello.text
file.close()
while fs.life != ["init", "destroy"]:
    time.sleep(0.001)
while m.is_alive:
    time.sleep(0.001)
"""
    )


def test_forked_children_do_not_keep_a_mount(user, in_process):
    user.run(
        """
with fusewire.mounted(Hello(), in_process=IN_PROCESS) as first, fusewire.mounted(Hello()) as second:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        ok = read(first.path + "/hello") == read(second.path + "/hello") == Hello.text
        os.read(reader, 1)
        os._exit(not ok)
    os.close(reader)
    time.sleep(0.05)
    assert read(second.path + "/hello") == Hello.text
    second.unmount()
    assert read(first.path + "/hello") == Hello.text
    os.write(writer, b"x")
    assert os.waitpid(child, 0)[1] == 0
    first.unmount()
    assert not first.is_alive
os.close(writer)
""".replace("IN_PROCESS", str(in_process))
    )


def test_program_may_write(user, in_process):
    user.run(
        """
from fusewire.fs.memory import MemoryFS
with fusewire.mounted(MemoryFS(), in_process=IN_PROCESS) as m:
    with open(m.path + "/new", "wb") as file:
        file.write(bytes(3_000_000))
    os.mkdir(m.path + "/directory")
    os.rename(m.path + "/new", m.path + "/directory/old")
    assert os.stat(m.path + "/directory/old").st_size == 3_000_000
""".replace("IN_PROCESS", str(in_process))
    )


def test_directory_of_the_host_keeps_its_owners(user, in_process):
    user.run(
        """
from fusewire.fs.passthrough import Passthrough
os.mkdir("source")
with fusewire.mounted(Passthrough(os.open("source", os.O_PATH)), in_process=IN_PROCESS) as m:
    with open(m.path + "/file", "w") as file:
        file.write("text")
    assert os.stat(m.path + "/file").st_uid == os.stat("source/file").st_uid == os.getuid()
os.unlink("source/file"); os.rmdir("source")
""".replace("IN_PROCESS", str(in_process))
    )


def test_mount_that_is_forgotten_is_ended_with_a_warning(user):
    user.run(
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fusewire.mounted(Hello(), "mnt")
assert [str(w.message).endswith("use `with`") for w in caught] == [True]
assert not os.path.lexists("mnt") and not children()
"""
    )


def test_mount_that_is_forgotten_is_ended_where_warnings_are_errors(user):
    _, said = user.run(
        """
import warnings
warnings.simplefilter("error")
fusewire.mounted(Hello(), "mnt")
assert not os.path.lexists("mnt") and not children()
"""
    )
    assert "use `with`" in said


def test_program_that_ends_without_unmounting_leaves_nothing(user):
    user.run('kept = fusewire.mounted(Hello(), "mnt", in_process=True)\nassert read("mnt/hello") == Hello.text\n')
    assert os.listdir(user.place) == []


def test_exit_handlers_run_once(user):
    out, _ = user.run(
        """
import atexit
atexit.register(print, "the end")
print("begun", end=" ")
with fusewire.mounted(Hello()) as m:
    try:
        os.listdir(m.path)
    finally:
        print("cleared up")
"""
    )
    assert out == "begun cleared up\nthe end\n"


def test_class_in_the_place_of_a_filesystem_is_refused(rootless_user):
    out, _ = rootless_user.run("try:\n    fusewire.mounted(Hello)\nexcept TypeError as error:\n    print(error)\n")
    assert out == "Hello is a class: give an instance, Hello()\n"


def test_tree_of_nodes_is_a_filesystem(user, in_process):
    user.run(
        """
class Tree(fusewire.Dir):
    def children(self):
        return {b"hello.txt": fusewire.Bytes(b"hello world\\n")}
with fusewire.mounted(Tree(), in_process=IN_PROCESS) as m:
    assert os.listdir(m.path) == ["hello.txt"] and read(m.path + "/hello.txt") == Hello.text
""".replace("IN_PROCESS", str(in_process))
    )


# mount()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_mount_blocks_until_a_signal(user, number):
    with user.start(
        """
class Telling(Hello):
    def getattr(self, nodeid, flags, fh):
        print("mounted", flush=True)
        return super().getattr(nodeid, flags, fh)
fs = Telling()
fusewire.mount(fs, "mnt")
assert fs.life == ["init", "destroy"] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print("left", flush=True)
"""
    ) as program:
        assert program.stdout.readline() == "mounted\n"
        if user.name == "root":
            assert (user.place / "mnt" / "hello").read_text() == "hello world\n"
        program.send_signal(number)
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, err) == (0, "")
    assert out.endswith("left\n")
    assert os.listdir(user.place) == []


# The main thread sleeps on when another one gets the signal, as when it comes right before it goes to sleep.
OTHER = """
def get_signal():
    sleeps = False
    while not sleeps:
        where = sys._current_frames()[threading.main_thread().ident].f_code.co_name
        with open(f"/proc/self/task/{os.getpid()}/stat") as file:
            sleeps = where in ("wait", "_wait") and file.read().rpartition(")")[2].split()[0] == "S"
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=get_signal, daemon=True).start()
"""


@pytest.mark.parametrize("way", ["mount(Hello(), 'mnt')", "share(Hello, 'socket')"])
def test_signal_that_another_thread_gets_is_an_end_too(user, way):
    assert user.run(f"{OTHER}fusewire.{way}\nprint('left')\n")[0] == "left\n"


def test_mount_ends_when_it_is_unmounted():
    for user in users("root"):
        with user.start(
            "class T(Hello):\n    def init(self, c):\n        print('i', flush=True)\n"
            "fusewire.mount(T(), 'mnt')\nprint('left')\n"
        ) as program:
            assert program.stdout.readline() == "i\n"
            assert (user.place / "mnt" / "hello").read_text() == "hello world\n"
            subprocess.run(["umount", user.place / "mnt"], check=True)
            out, err = program.communicate(timeout=PATIENCE)
        assert (program.returncode, out, err) == (0, "left\n", "")


def test_filesystem_that_hangs_at_its_start_can_be_interrupted(user):
    with user.start(
        """
class Hanging(Hello):
    def init(self, connection):
        print("waits", flush=True)
        threading.Event().wait()
fusewire.mount(Hanging(), "mnt")
print("left", flush=True)
"""
    ) as program:
        assert program.stdout.readline() == "waits\n"
        program.send_signal(signal.SIGTERM)
        out, err = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out, err) == (0, "left\n", "")
    assert os.listdir(user.place) == []


def test_handlers_of_the_program_are_its_own(user):
    out, _ = user.run(
        """
class Interrupting(Hello):
    def getattr(self, nodeid, flags, fh):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().getattr(nodeid, flags, fh)
class Mine(Exception): pass
def handler(*_): raise Mine
signal.signal(signal.SIGTERM, handler)
try:
    fusewire.mount(Interrupting(), "mnt")
except Mine:
    print("mine")
assert not os.path.lexists("mnt")
"""
    )
    assert out == "mine\n"


def test_fusermount3_mounts_too(fuse_user, in_process):
    for user in users("fusermount"):
        user.run(
            """
with fusewire.mounted(Hello(), "mnt", strategy="fusermount3", in_process=IN_PROCESS) as m:
    assert not os.path.islink("mnt") and read("mnt/hello") == Hello.text
""".replace("IN_PROCESS", str(in_process))
        )


# share()


@pytest.mark.parametrize("what", ["Hello", "Hello()"])
def test_guests_are_served_one_after_the_other(rootless_user, what):
    path = str(rootless_user.place / "fs.sock")
    program = f"fusewire.share({what}, 'fs.sock', tag='greeting')\nprint('left')\n"
    with rootless_user.start(program) as server:
        try:
            wait_for(path, server)
            for _ in range(2):
                with FakeGuest.connect(path) as guest:
                    guest.init()
                    assert guest.read_file(b"hello") == b"hello world\n"
                    guest.reboot()
                    guest.init()
                    assert guest.read_file(b"hello") == b"hello world\n"
            server.send_signal(signal.SIGTERM)
            out, err = server.communicate(timeout=PATIENCE)
        except BaseException:
            server.kill()
            raise
    assert (server.returncode, out, err) == (0, "left\n", "")


def wait_for(path: str, server: subprocess.Popen[str]) -> None:
    """Wait until somebody listens there; inotify would not tell of listen(2)."""
    import socket
    import time

    end = time.monotonic() + PATIENCE
    while True:
        with socket.socket(socket.AF_UNIX) as trying:
            try:
                trying.connect(path)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                assert server.poll() is None, server.communicate()
                assert time.monotonic() < end


def test_what_destroy_saves_is_there_when_the_block_has_ended(user):
    user.run(
        """
class Slow(Hello):
    def destroy(self):
        time.sleep(1.5)
        os.write(told, b"saved")
heard, told = os.pipe()
with fusewire.mounted(Slow()) as m:
    read(m.path + "/hello")
os.set_blocking(heard, False)
assert os.read(heard, 9) == b"saved"
"""
    )
