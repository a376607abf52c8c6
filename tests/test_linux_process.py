"""Processes: death signals, start times, descriptors that travel and descriptors that must not leak."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire.linux import process, syscalls


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    script = "import os, sys\nfrom fusewire.linux import process, syscalls\n" + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, **options)


def test_a_child_dies_with_its_parent() -> None:
    code = """
parent = os.getpid()
ready, tell = os.pipe()
never, _ = os.pipe()
pid = os.fork()
if pid == 0:
    process.set_pdeathsig(9, parent)
    os.write(tell, b"x")
    os.close(1); os.close(2)
    os.read(never, 1)
os.read(ready, 1)
os.write(1, b"%d" % pid)
os._exit(0)
"""
    pid = int(python(code).stdout)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([pidfd], [], [])
    os.close(pidfd)


def test_a_parent_that_has_ended_already_is_noticed() -> None:
    with pytest.raises(ProcessLookupError, match="the parent process 1000000 has ended"):
        try:
            process.set_pdeathsig(signal.SIGTERM, 1000000)
        finally:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)


def test_a_subreaper_gets_the_orphans() -> None:
    code = """
process.become_subreaper()
reader, writer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.read(reader, 1)
        os._exit(7)
    os._exit(3)
print(process.wait(-1))
os.write(writer, b"x")
print(process.wait(-1))
"""
    assert python(code).stdout == "3\n7\n"


def test_statuses_are_told_as_a_shell_tells_them() -> None:
    code = """
import signal
for end in (lambda: os._exit(5), lambda: os.kill(os.getpid(), signal.SIGKILL)):
    pid = os.fork()
    if pid == 0: end()
    print(process.wait(pid))
"""
    assert python(code).stdout == "5\n137\n"


def test_only_the_kept_descriptors_stay_open() -> None:
    code = """
keep = os.open("/dev/null", os.O_RDONLY)
for _ in range(5): os.open("/dev/null", os.O_RDONLY)
process.close_inherited_fds((0, 1, 2, keep))
paths = [f"/proc/self/fd/{fd}" for fd in process.open_fds() if fd > 2]
print([name for name in map(os.readlink, filter(os.path.lexists, paths)) if "libffi" not in name])
"""
    assert python(code).stdout == "['/dev/null']\n"


def test_callbacks_can_be_made_when_descriptors_have_been_closed() -> None:
    code = """
import ctypes
process.close_inherited_fds((0, 1, 2))
for _ in range(5): os.open("/dev/null", os.O_RDONLY)  # what libffi would map, had it been closed
callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
print(sum(made(number) == number for number, made in enumerate([callback(lambda n: n) for _ in range(2000)])))
"""
    assert python(code).stdout == "2000\n"


@given(st.binary(max_size=15).filter(lambda name: b"\n" not in name), st.integers(0, 1 << 60))
def test_a_stat_line_is_read_whatever_the_command_is_called(comm: bytes, start: int) -> None:
    line = b"4711 (" + comm + b") S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 %d 20 21\n" % start
    found = process.parse_stat(line)
    assert (found.pid, found.state, found.parent, found.start) == (4711, "S", 1, start)


def test_a_command_named_like_a_stat_line_does_not_confuse() -> None:
    pid = os.fork()
    if pid == 0:
        with open("/proc/self/comm", "wb") as comm:
            comm.write(b") Z 1 1 1 (x) 1")
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    try:
        found = process.stat(pid)
        assert found is not None
        assert (found.state, found.parent) == ("T", os.getpid())
        assert process.is_alive(pid, found.start)
        assert not process.is_alive(pid, found.start + 1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        start = process.start_time(pid)
        assert start is not None
        assert not process.is_alive(pid, start), "a zombie has ended"
        os.waitpid(pid, 0)
    assert process.stat(pid) is None
    assert process.hold(pid, start) is None


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_hold_is_on_the_process_that_was_meant(old_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if old_kernel:  # before Linux 5.3

        def missing(pid: int) -> int:
            raise OSError(errno.ENOSYS, "pidfd_open", pid)

        monkeypatch.setattr(syscalls, "pidfd_open", missing)
    start = process.start_time(os.getpid())
    assert start is not None
    assert process.hold(os.getpid(), start + 1) is None
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    begun = process.start_time(child.pid)
    assert begun is not None
    held = process.hold(child.pid, begun)
    assert held is not None
    with held:
        assert not held.wait(0)
        held.kill(signal.SIGTERM)
        assert held.wait(10)
        child.communicate()
        held.kill(signal.SIGTERM)  # nobody is hit any more
    assert child.returncode == -signal.SIGTERM


def test_descriptors_travel_over_a_socket_and_arrive_close_on_exec() -> None:
    ours, theirs = process.socket_pair()
    reader, writer = os.pipe()
    process.send_fds(ours, b"pipe", [reader, writer])
    process.send_fds(ours, b"none", [])
    data, fds = process.recv_fds(theirs, 4, 2)
    assert (data, len(fds)) == (b"pipe", 2)
    os.write(fds[1], b"through")
    assert os.read(reader, 100) == b"through"
    assert not any(os.get_inheritable(fd) for fd in (*fds, ours, theirs))
    assert process.recv_fds(theirs, 4, 2) == (b"none", [])
    os.close(ours)
    assert process.recv_fds(theirs) == (b"", [])
    for fd in (theirs, reader, writer, *fds):
        os.close(fd)


def test_standard_descriptors_are_never_handed_out() -> None:
    code = """
out = os.dup(1)
os.set_inheritable(out, False)
for fd in (0, 1, 2): os.close(fd)
pair = process.socket_pair()
os.write(out, repr([fd > 2 for fd in pair]).encode())
os.write(out, repr([os.path.exists(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]).encode())
os._exit(0)
"""
    assert python(code).stdout == "[True, True][False, False, False]"


def test_a_detached_process_has_its_own_session_and_no_terminal() -> None:
    code = """
out = os.dup(1)
os.set_inheritable(out, False)
pid = os.fork()
if pid == 0:
    process.detach_from_terminal()
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
    os.write(out, repr((os.getsid(0) == os.getpid(), os.getcwd(), set(links))).encode())
    os._exit(0)
os.waitpid(pid, 0)
"""
    assert python(code).stdout == "(True, '/', {'/dev/null'})"


def test_importing_stays_cheap() -> None:
    heavy = "subprocess socket enum typing dataclasses inspect contextlib asyncio signal re collections"
    path = os.path.dirname(os.path.dirname(os.path.dirname(process.__file__)))
    code = f"""
import sys
sys.path.insert(0, {path!r})
from fusewire.linux import fusermount, mount, process, shadow, userns
print(*[name for name in {heavy.split()!r} if name in sys.modules])
"""
    words = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "\n"


def test_errno_of_a_refused_call_reaches_the_caller() -> None:
    with pytest.raises(OSError, match="umount: ") as caught:
        syscalls.umount2(b"/nonexistent/place")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    assert caught.value.filename == "/nonexistent/place"
