"""Sockets that a daemon listens on: who may be there, who may connect, what is removed; and the daemons' own life."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import rootless
from fusewire.linux.listening import PidFile, adopt, listen

PATIENCE = 20.0
ROOT = os.geteuid() == 0
LISTENER = """
import os, sys
from fusewire.linux.listening import listen
sys.stdin.readline()
try:
    held = listen(sys.argv[1])
except OSError as error:
    print(error.errno, error.strerror, flush=True)
else:
    print("listening", os.getpid(), flush=True)
    sys.stdin.readline()
    held.close()
"""


@pytest.fixture
def place():
    """A directory with a short path, which every user can enter."""
    with tempfile.TemporaryDirectory(prefix="fw-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def descriptors():
    """Fail a test that leaves a descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)


class Starter:
    """A process that listens when it is told, and lets go when it is told again."""

    def __init__(self, path, words=(sys.executable, "-W", "error")):
        self.process = subprocess.Popen(
            [*words, "-c", LISTENER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def go(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self):
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], "no answer"
        return self.process.stdout.readline().strip()

    def start(self):
        self.go()
        assert self.answer() == f"listening {self.process.pid}"


def connects(path):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(os.fspath(path))
        except OSError as error:
            return error.errno
        return 0


def leave_socket(path, kind=socket.SOCK_STREAM):
    """A socket that nobody has bound any more."""
    with socket.socket(socket.AF_UNIX, kind) as left:
        left.bind(os.fspath(path))


# Modes and names


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.parametrize(
    ("how", "mode"), [({}, 0o600), ({"mode": 0o666}, 0o666), ({"group": str(os.getegid())}, 0o660)]
)
def test_the_socket_has_its_mode_whatever_the_umask(place, umask, how, mode):
    before = os.umask(umask)
    try:
        with listen(str(place / "s"), **how) as held:
            assert os.umask(umask) == umask
            found = os.lstat(place / "s")
            assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, mode)
            lock = os.lstat(place / "s.pid")
            assert (stat.S_ISREG(lock.st_mode), stat.S_IMODE(lock.st_mode)) == (True, 0o600)
            assert (place / "s.pid").read_text() == f"{os.getpid()}\n"
            assert not os.get_inheritable(held.fileno())
            assert connects(place / "s") == 0
    finally:
        os.umask(before)
    assert os.listdir(place) == []


def test_the_socket_is_given_to_its_group(place):
    if not ROOT:
        pytest.skip("only root can give a socket to any group")
    import grp

    group = grp.getgrgid(1)
    for name in (group.gr_name, "1"):
        with listen(str(place / "s"), group=name, mode=0o620):
            found = os.lstat(place / "s")
            assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (1, 0o620)


def test_a_group_that_cannot_be_is_named(place):
    with pytest.raises(OSError, match="there is no group nobody-has-this-one"):
        listen(str(place / "s"), group="nobody-has-this-one")
    code = "import sys; from fusewire.linux.listening import listen; listen(sys.argv[1], group='0')"
    home = rootless.rootless_home()
    words = [*rootless.rootless_python(), "-c", code, f"{home}/s"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 1
    assert "its group and mode: Operation not permitted; only root and its members can" in found.stderr
    assert not {"s", "s.pid"} & set(os.listdir(home))


@pytest.mark.usefixtures("descriptors")
def test_a_path_longer_than_an_address_is_bound_all_the_same(place):
    deep = place / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with listen(str(deep / "s")):
        assert {"s", "s.pid"} == set(os.listdir(deep))
        directory = os.open(deep, os.O_PATH)
        try:
            assert connects(f"/proc/self/fd/{directory}/s") == 0
        finally:
            os.close(directory)
        with pytest.raises(OSError, match=f"process {os.getpid()} is at "):
            listen(str(deep / "s"))
    leave = os.getcwd()
    os.chdir(deep)
    try:
        leave_socket("s")
        with listen("s"):
            assert connects("s") == 0
    finally:
        os.chdir(leave)
    assert os.listdir(deep) == []
    with pytest.raises(OSError, match="too long: choose a shorter one"):
        listen(str(deep / ("n" * 120)))


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize(
    ("path", "message"),
    [("", "names no socket"), ("sub/", "names no socket"), ("..", "names no socket"), ("no/s", "make it first")],
)
def test_a_path_that_names_no_file_is_refused(place, path, message):
    with pytest.raises(OSError, match=message):
        listen(f"{place}/{path}" if path else "")
    assert os.listdir(place) == []


def test_a_directory_of_somebody_else_is_refused_with_a_way_out(place):
    if not ROOT:
        pytest.skip("root may write everywhere; the directory has to be another's")
    with Starter(place / "s", rootless.rootless_python()) as starter:
        starter.go()
        answer = starter.answer()
    assert answer.startswith(str(errno.EACCES))
    assert answer.endswith("Permission denied; choose a path in a directory of yours")


# Who is there already


@pytest.mark.usefixtures("descriptors")
def test_a_second_daemon_is_refused_with_the_id_of_the_first(place):
    path = place / "s"
    with Starter(path) as first:
        first.start()
        with pytest.raises(OSError, match=f"process {first.process.pid} is at {path} already") as caught:
            listen(str(path))
        assert caught.value.errno == errno.EADDRINUSE
        assert connects(path) == 0
        first.go()
        assert first.process.wait(PATIENCE) == 0
    assert os.listdir(place) == []


@pytest.mark.usefixtures("descriptors")
def test_a_second_listen_in_the_same_process_is_refused_and_harms_nothing(place):
    with listen(str(place / "s")):
        with pytest.raises(OSError, match=f"process {os.getpid()} is at"):
            listen(str(place / "s"))
        with Starter(place / "s") as other:  # the lock is held still
            other.go()
            assert f"process {os.getpid()} is at" in other.answer()
        assert connects(place / "s") == 0


@pytest.mark.usefixtures("descriptors")
def test_a_killed_daemon_is_followed_by_the_next(place):
    path = place / "s"
    with Starter(path) as first:
        first.start()
        first.process.kill()
        first.process.wait(PATIENCE)
    assert set(os.listdir(place)) == {"s", "s.pid"}
    (place / "s.pid").write_text("12345678901234567890\n")  # longer than any id: nothing of it stays
    with listen(str(path)):
        assert connects(path) == 0
        assert (place / "s.pid").read_text() == f"{os.getpid()}\n"
    assert os.listdir(place) == []


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_stale_socket_is_replaced_and_a_live_one_left_alone(place, kind):
    path = place / "s"
    leave_socket(path, kind)
    with listen(str(path)):
        assert connects(path) == 0
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen(1)
        with pytest.raises(OSError, match=f"another process listens at {path} already") as caught:
            listen(str(path))
        assert caught.value.errno == errno.EADDRINUSE
        assert not select.select([other], [], [], 0)[0], "it was taken for a client"
    assert os.listdir(place) == ["s"]


def make_file(path):
    path.write_bytes(b"mine")


def make_symlink(path):
    leave_socket(path.with_name("target"))
    path.symlink_to("target")


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize(
    "make",
    [make_file, make_symlink, Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")],
    ids=["file", "symlink", "directory", "fifo", "dangling"],
)
def test_what_is_no_socket_stays(place, make):
    make(place / "s")
    before = {name: os.lstat(place / name)[:6] for name in os.listdir(place)}
    with pytest.raises(OSError, match="is there and is no socket: remove it"):
        listen(str(place / "s"))
    assert {name: os.lstat(place / name)[:6] for name in os.listdir(place)} == before


@pytest.mark.usefixtures("descriptors")
def test_a_lock_file_that_is_something_else_stays(place):
    lock, other = place / "s.pid", place / "other"
    other.write_text("precious")
    for make, message in (
        (lambda: lock.symlink_to("other"), "it is a symlink"),
        (lambda: lock.hardlink_to(other), "it has other names too"),
        (lambda: lock.write_text("precious"), "is no pid file"),
        (lambda: os.mkfifo(lock), "it is no ordinary file"),
        (lock.mkdir, "Is a directory"),
    ):
        make()
        before = os.lstat(lock)[:7]
        with pytest.raises(OSError, match=message):
            listen(str(place / "s"))
        assert os.lstat(lock)[:7] == before
        assert other.read_text() == "precious"
        if stat.S_ISDIR(before[0]):
            lock.rmdir()
        else:
            lock.unlink()
    assert os.listdir(place) == ["other"]


@pytest.mark.usefixtures("descriptors")
def test_the_lock_file_of_another_user_is_refused(place):
    if not ROOT:
        pytest.skip("only root can make a file of another user")
    lock = place / "s.pid"
    lock.touch()
    os.chown(lock, rootless.NOBODY, rootless.NOBODY)
    with pytest.raises(OSError, match=f"it belongs to user {rootless.NOBODY}"):
        listen(str(place / "s"))
    assert os.lstat(lock).st_uid == rootless.NOBODY


@pytest.mark.usefixtures("descriptors")
def test_the_lock_of_another_kind_of_daemon_counts(place):
    with open(place / "s.pid", "w") as other:
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OSError, match="another process, which has just begun, is at"):
            listen(str(place / "s"))


def test_of_daemons_that_start_together_one_listens(place):
    path = place / "s"
    leave_socket(path)
    starters = []
    try:
        for _ in range(6):
            starters.append(Starter(path))
        for starter in starters:
            starter.go()
        answers = {starter.process.pid: starter.answer() for starter in starters}
        winners = [pid for pid, answer in answers.items() if answer == f"listening {pid}"]
        assert len(winners) == 1
        assert all(answer.startswith(str(errno.EADDRINUSE)) for pid, answer in answers.items() if pid not in winners), (
            answers
        )
        assert connects(path) == 0
        assert (place / "s.pid").read_text() == f"{winners[0]}\n"
    finally:
        for starter in starters:
            starter.__exit__()


# The end


@pytest.mark.usefixtures("descriptors")
def test_what_another_has_put_there_meanwhile_stays(place):
    held = listen(str(place / "s"))
    for name in ("s", "s.pid"):
        (place / name).unlink()
    leave_socket(place / "s")
    (place / "s.pid").write_text("1\n")
    held.close()
    held.close()
    assert set(os.listdir(place)) == {"s", "s.pid"}
    assert (place / "s.pid").read_text() == "1\n"


@pytest.mark.usefixtures("descriptors")
def test_the_names_are_those_in_the_directory_it_was_bound_in(place):
    (place / "a").mkdir()
    held = listen(str(place / "a" / "s"))
    (place / "a").rename(place / "b")
    (place / "a").mkdir()
    leave_socket(place / "a" / "s")
    held.close()
    assert (os.listdir(place / "a"), os.listdir(place / "b")) == (["s"], [])


@pytest.mark.usefixtures("descriptors")
def test_a_pid_file_is_removed_and_can_be_had_again(place):
    for _ in range(3):
        file = PidFile(str(place / "p"))
        assert (place / "p").read_text() == f"{os.getpid()}\n"
        with pytest.raises(OSError, match=f"process {os.getpid()} is at {place}/p already"):
            PidFile(str(place / "p"))
        file.close()
        assert os.listdir(place) == []


# Clients


@pytest.mark.usefixtures("descriptors")
def test_clients_are_accepted_until_time_is_up_or_we_are_told_to_stop(place):
    stop = os.eventfd(0)
    with listen(str(place / "s")) as held, socket.socket(socket.AF_UNIX) as client:
        assert held.accept(stop, 0.0) is None
        client.connect(str(place / "s"))
        accepted = held.accept(stop, PATIENCE)
        assert accepted is not None
        with accepted:
            assert accepted.getblocking()
            assert not accepted.get_inheritable()
            client.send(b"x")
            assert accepted.recv(1) == b"x"
        with socket.socket(socket.AF_UNIX) as hasty:
            hasty.connect(str(place / "s"))
        assert held.accept(timeout=PATIENCE).close() is None
        os.eventfd_write(stop, 1)
        assert held.accept(stop) is None
    os.close(stop)


# Inherited sockets


@pytest.mark.usefixtures("descriptors")
def test_a_listening_socket_is_adopted_and_its_name_stays(place):
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(place / "s"))
    given.listen(1)
    number = given.detach()
    os.set_inheritable(number, True)
    with adopt(number) as held, socket.socket(socket.AF_UNIX) as client:
        assert held.path == ""
        assert not held.socket.get_inheritable()
        client.connect(str(place / "s"))
        held.accept(timeout=PATIENCE).close()
    assert os.listdir(place) == ["s"]


@pytest.mark.usefixtures("descriptors")
def test_what_is_no_listening_unix_socket_is_refused_by_what_it_is(place):
    pair = socket.socketpair()
    others = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)]
    inet = socket.socket(socket.AF_INET)
    inet.bind(("127.0.0.1", 0))
    inet.listen(1)
    file = os.open(place, os.O_RDONLY)
    try:
        for number, message in (
            (pair[0].fileno(), "is a socket that does not listen"),
            (others[0].fileno(), "is a socket that does not listen"),
            (others[1].fileno(), "is a socket of SOCK_DGRAM"),
            (inet.fileno(), "is a socket of AF_INET"),
            (file, "is no socket"),
            (987654, "is not open"),
        ):
            with pytest.raises(OSError, match=f"descriptor {number} {message}: hand over a listening unix socket"):
                adopt(number)
            if number != 987654:
                os.fstat(number)  # it is still the caller's
    finally:
        os.close(file)
        for one in (*pair, *others, inet):
            one.close()


# The daemons


SHARE = "import sys; from fusewire.cli.share import main; sys.exit(main(sys.argv[1:]))"
needs_server = pytest.mark.skipif(
    importlib.util.find_spec("fusewire.serve_share") is None, reason="fusewire.serve_share, the server, is missing"
)


class Daemon:
    """`fusewire share` or `fusewire-virtiofsd` in the foreground, ready once it says that it shares."""

    def __init__(self, *arguments, virtiofsd=False, words=(sys.executable, "-W", "error"), **how):
        # One process: who waits for one in a sandbox is looked at in test_share_sandbox.py.
        alone = [] if virtiofsd else ["--sandbox=none", "--landlock=off"]
        program = ["-m", "fusewire.cli.virtiofsd"] if virtiofsd else ["-c", SHARE, *alone]
        self.process = subprocess.Popen(
            [*words, *program, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how
        )
        self.said = []

    def __enter__(self):
        while not self.said or " is shared at " not in self.said[-1]:
            assert select.select([self.process.stderr], [], [], PATIENCE)[0], self.said
            line = self.process.stderr.readline()
            if not line:
                break
            if ": sandbox: " not in line:
                self.said.append(line.strip())
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture
def shared(place):
    (place / "dir").mkdir()
    return place / "dir"


@needs_server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_share_ends_by_a_signal_with_0_and_leaves_nothing(place, shared, number):
    with Daemon(shared, "--socket-path", place / "s", "--pid-file", place / "p", "--mode=640") as daemon:
        assert daemon.said == [f"fusewire: {shared} is shared at {place}/s"]
        assert (place / "p").read_text() == (place / "s.pid").read_text() == f"{daemon.process.pid}\n"
        assert stat.S_IMODE(os.lstat(place / "s").st_mode) == 0o640
        assert daemon.end(number) == 0
    assert os.listdir(place) == ["dir"]


@needs_server
def test_a_share_waits_for_the_next_client_and_virtiofsd_ends_with_its_first(place, shared):
    with Daemon(shared, "--socket-path", place / "s") as daemon:
        for _ in range(3):
            assert connects(place / "s") == 0
        assert daemon.end() == 0
    with Daemon("-o", f"source={shared}", "--socket-path", place / "s", virtiofsd=True) as daemon:
        assert connects(place / "s") == 0
        assert daemon.process.wait(PATIENCE) == 0
    assert os.listdir(place) == ["dir"]


@needs_server
def test_a_share_that_was_killed_is_started_again_and_a_live_one_is_not_disturbed(place, shared):
    with Daemon(shared, "--socket-path", place / "s") as first:
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    with Daemon(shared, "--socket-path", place / "s") as second:
        with Daemon(shared, "--socket-path", place / "s") as third:
            assert third.process.wait(PATIENCE) == 1
        assert third.said[0].startswith(f"fusewire: process {second.process.pid} is at {place}/s already")
        assert connects(place / "s") == 0
        assert second.end() == 0


@needs_server
def test_an_inherited_socket_is_served(place, shared):
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(place / "s"))
        given.listen(1)
        number = given.fileno()
        with Daemon(
            f"--fd={number}", "--shared-dir", shared, "--sandbox", "none", virtiofsd=True, pass_fds=[number]
        ) as daemon:
            assert daemon.said == [f"fusewire-virtiofsd: {shared} is shared at descriptor {number}"]
            assert connects(place / "s") == 0
            assert daemon.process.wait(PATIENCE) == 0
    assert "s" in os.listdir(place)


@needs_server
def test_an_ordinary_user_shares_a_directory():
    home = Path(rootless.rootless_home())
    with Daemon(home, "--socket-path", home / "s", words=rootless.rootless_python()) as daemon:
        assert os.lstat(home / "s").st_uid == os.lstat(home).st_uid
        assert daemon.end() == 0
    assert not {"s", "s.pid"} & set(os.listdir(home))


def command(*arguments, **how):
    words = [sys.executable, "-W", "error", "-c", SHARE, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, **how)


@needs_server
def test_a_daemon_goes_on_in_the_background_once_its_socket_listens(place, shared):
    leaked, other = os.pipe()
    try:
        alone = ["--sandbox=none", "--landlock=off"]
        words = ["dir", "--socket-path=s", "--daemonize", "--json", "--tag=t", *alone]
        found = command(*words, cwd=place, pass_fds=[other])
        assert (found.returncode, found.stderr) == (0, "")
        report = json.loads(found.stdout)
        pid = report["pid"]
        watch = os.pidfd_open(pid)
        try:
            assert report == {"source": str(shared), "socket": f"{place}/s", "pid": pid, "tag": "t", "queues": 4}
            assert connects(place / "s") == 0
            assert os.getsid(pid) == pid
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
            os.close(other)
            other = -1
            assert os.read(leaked, 1) == b"", "the daemon holds a pipe of its caller"
        finally:
            signal.pidfd_send_signal(watch, signal.SIGTERM)
            assert select.select([watch], [], [], PATIENCE)[0]
            os.close(watch)
        assert os.listdir(place) == ["dir"]
    finally:
        os.close(leaked)
        if other >= 0:
            os.close(other)


@pytest.mark.parametrize("more", [[], ["--daemonize"]])
def test_what_hinders_a_share_is_said_in_a_line(place, shared, more):
    for words, message in (
        ([place / "none", f"--socket-path={place}/s"], f"cannot open the source {place}/none: No such file"),
        ([shared, f"--socket-path={place}/none/s"], "No such file or directory; make it first"),
        ([shared, f"--socket-path={shared}"], "is there and is no socket"),
        ([shared, "--fd=2345"], "descriptor 2345 is not open"),
    ):
        found = command(*words, *more)
        assert (found.returncode, found.stdout, found.stderr.count("\n")) == (1, "", 1), found.stderr
        assert found.stderr.startswith("fusewire: ")
        assert message in found.stderr
    assert os.listdir(place) == ["dir"]


@needs_server
def test_the_limit_of_descriptors_is_what_was_asked_for(place, shared):
    for words, wanted in ((["--rlimit-nofile=5000"], 5000), (["--rlimit-nofile=0"], None)):
        with Daemon(shared, "--socket-path", place / "s", *words) as daemon:
            import resource

            limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
            assert limits == (wanted, wanted) or (
                wanted is None and limits[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            )
            assert daemon.end() == 0
