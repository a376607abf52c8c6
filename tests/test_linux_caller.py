"""Acting as the process that asks: ids of one thread, and what stays when something goes wrong on the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest

from fusewire.linux import files, syscalls
from fusewire.linux.caller import AsCaller, can_switch, groups_of
from rootless import rootless_python

pytestmark = pytest.mark.usefixtures("dumpable_again")


ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root: others' ids are taken on")


def ids() -> tuple[int, int, list[int]]:
    return files.setfsuid(files.NO_ID), files.setfsgid(files.NO_ID), os.getgroups()


def in_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def run(words: list[str], script: str) -> str:
    script = (
        "import os\nfrom fusewire.linux import files, syscalls, userns\nfrom fusewire.linux.caller import *\n" + script
    )
    result = subprocess.run([*words, "-c", script], capture_output=True, text=True, cwd="/", timeout=20)
    assert result.returncode == 0, result.stderr
    return result.stdout


def unprivileged(script: str) -> str:
    return run(rootless_python(), script)


@pytest.fixture
def open_to_all() -> Iterator[bytes]:
    """A directory that every user can reach and write to."""
    with tempfile.TemporaryDirectory(prefix="fusewire-caller-", dir="/tmp") as place:
        os.chmod(place, 0o1777)
        yield os.fsencode(place)


def test_groups_of_a_process_are_those_it_has() -> None:
    assert list(groups_of(os.getpid())) == os.getgroups()
    assert list(groups_of(threading.get_native_id())) == os.getgroups()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as ended:
        pass
    for pid in (ended.pid, 0, -1, 2**31 - 1):
        assert groups_of(pid) == ()


@needs_root
@pytest.mark.parametrize("groups", [[], [0], [5], [4, 24, 70_000, 4_294_967_294], list(range(30_000, 40_000))])
def test_groups_of_another_process_are_read_whole(groups: list[int]) -> None:
    code = "import os,sys; os.setgroups(eval(sys.stdin.readline())); print(flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{groups}\n")
        process.stdin.flush()
        process.stdout.readline()
        found = groups_of(process.pid)
    assert sorted(found) == groups


@needs_root
def test_groups_of_a_thread_are_its_own() -> None:
    def switched() -> object:
        files.setgroups([7, 9])
        return groups_of(threading.get_native_id()), groups_of(os.getpid())

    assert in_thread(switched) == ((7, 9), tuple(os.getgroups()))


@needs_root
def test_a_thread_acts_as_the_caller_and_comes_back(open_to_all: bytes) -> None:
    def served() -> object:
        before = ids()
        person = AsCaller()
        person.enter(40_001, 40_002, [40_004, 40_003])
        within = ids()
        os.mkdir(open_to_all + b"/made")
        person.leave()
        assert ids() == before
        person.leave()  # nothing left to do
        assert ids() == before
        return within

    assert in_thread(served) == (40_001, 40_002, [40_003, 40_004])
    made = os.stat(open_to_all + b"/made")
    assert (made.st_uid, made.st_gid) == (40_001, 40_002)


@needs_root
def test_permissions_count_as_the_callers(open_to_all: bytes) -> None:
    os.mkdir(open_to_all + b"/shared", 0)
    os.chown(open_to_all + b"/shared", 0, 40_003)
    os.chmod(open_to_all + b"/shared", 0o2070)

    def tried(groups: list[int]) -> object:
        person = AsCaller()
        person.enter(40_001, 40_002, groups)
        try:
            fd = os.open(open_to_all + b"/shared/file", os.O_CREAT | os.O_EXCL, 0o2711)
            os.close(fd)
            return True
        except PermissionError:
            return False
        finally:
            person.leave()

    assert in_thread(lambda: tried([])) is False
    assert in_thread(lambda: tried([40_003])) is True
    made = os.stat(open_to_all + b"/shared/file")
    assert (made.st_uid, made.st_gid) == (40_001, 40_003)


@needs_root
def test_a_set_group_id_bit_is_not_kept_for_a_group_that_the_caller_lacks(open_to_all: bytes) -> None:
    os.mkdir(open_to_all + b"/shared")
    os.chown(open_to_all + b"/shared", 0, 40_003)
    os.chmod(open_to_all + b"/shared", 0o2777)

    def created(name: bytes, groups: list[int]) -> object:
        person = AsCaller()
        person.enter(40_001, 40_002, groups)
        try:
            os.mknod(open_to_all + b"/shared/" + name, 0o102775)
        finally:
            person.leave()
        return os.stat(open_to_all + b"/shared/" + name).st_mode & 0o2000

    mask = os.umask(0)
    try:
        assert in_thread(lambda: created(b"stranger", [])) == 0
        assert in_thread(lambda: created(b"member", [40_003])) == 0o2000
    finally:
        os.umask(mask)


@needs_root
def test_threads_under_different_ids_do_not_mix(open_to_all: bytes) -> None:
    wrong: list[object] = []
    start = threading.Barrier(4)

    def serve(number: int) -> None:
        start.wait()
        before = ids()
        for turn in range(100):
            uid, gid = 41_000 + number, 42_000 + (turn + number) % 7
            name = open_to_all + b"/%d-%d" % (number, turn)
            person = AsCaller()
            person.enter(uid, gid, [43_000 + number] * (turn % 2))
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                if ids() != (uid, gid, [43_000 + number] * (turn % 2)):
                    wrong.append((number, turn, ids()))
            finally:
                person.leave()
            made = os.stat(name)
            if (made.st_uid, made.st_gid) != (uid, gid) or ids() != before:
                wrong.append((number, turn, made.st_uid, made.st_gid, ids()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert len(os.listdir(open_to_all)) == 400


@needs_root
def test_an_id_that_nobody_has_is_refused_and_nothing_changes() -> None:
    def tried(uid: int, gid: int) -> object:
        before = ids()
        person = AsCaller()
        with pytest.raises(PermissionError) as caught:
            person.enter(uid, gid, [5])
        assert ids() == before
        person.enter(1, 2, [3])  # still of use
        person.leave()
        assert ids() == before
        return str(caught.value)

    for uid, gid, who in ((files.NO_ID, 1, "user 4294967295"), (1, files.NO_ID, "group 4294967295")):
        message = in_thread(lambda uid=uid, gid=gid: tried(uid, gid))  # type: ignore[misc]
        assert f"this thread may not take on {who}: it needs CAP_SETUID and CAP_SETGID" in str(message)


@needs_root
def test_a_second_enter_without_a_leave_is_a_mistake() -> None:
    def tried() -> object:
        before = ids()
        person = AsCaller()
        person.enter(1, 2, [3])
        with pytest.raises(RuntimeError):
            person.enter(4, 5, [6])
        within = ids()
        inner = AsCaller()
        inner.enter(7, 8, [])
        inner.leave()
        assert ids() == within
        person.leave()
        assert ids() == before
        return within

    assert in_thread(tried) == (1, 2, [3])


class InterruptedHereError(Exception):
    """What a signal handler may raise at any line."""


@needs_root
def test_whatever_is_raised_on_the_way_in_the_thread_is_not_left_switched() -> None:
    code = AsCaller.enter.__code__

    def interrupted(at: int) -> bool:
        """Raise at the line event number `at` of enter; False if it has fewer."""
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            if frame.f_code is not code:
                return None
            if event == "line" and not frame.f_locals.get("done"):  # then it is the caller's `try` that counts
                lines += 1
                if lines == at:
                    sys.settrace(None)
                    raise InterruptedHereError
            return trace

        before = ids()
        person = AsCaller()
        sys.settrace(trace)
        try:
            person.enter(1, 2, [3])
        except InterruptedHereError:
            assert ids() == before
            return True
        finally:
            sys.settrace(None)
        person.leave()
        assert ids() == before
        return False

    def every_line() -> object:
        at = 1
        while interrupted(at):
            at += 1
        return at

    count = in_thread(every_line)
    assert isinstance(count, int) and count > 15


def test_without_privilege_nobody_else_can_be_acted_as() -> None:
    out = unprivileged("""
print(can_switch())
person = AsCaller()
person.enter(os.getuid(), os.getgid(), os.getgroups())  # itself
person.leave()
groups = os.getgroups()  # one who keeps them is asked for nothing but the rest
for ids in ((1, os.getgid(), groups), (os.getuid(), 1, groups), (os.getuid(), os.getgid(), (7, 5))):
    try: person.enter(*ids)
    except PermissionError as error: print(error.errno, error.strerror.partition(":")[0])
    print(files.setfsuid(files.NO_ID) == os.getuid(), files.setfsgid(files.NO_ID) == os.getgid())
""")
    assert out.splitlines() == [
        "False",
        *("1 this thread may not take on user 1", "True True"),
        *("1 this thread may not take on group 1", "True True"),
        *("1 this thread may not take on the groups [5, 7]", "True True"),
    ]


def test_the_only_user_of_a_namespace_cannot_act_as_others() -> None:
    out = unprivileged("""
userns.enter(userns.root_plan())
print(can_switch(), os.getuid())
try: AsCaller().enter(1000, 0, os.getgroups())
except PermissionError as error: print(error.strerror.partition(":")[0])
""")
    if os.geteuid() == 0 or not set(os.getgroups()) - {os.getegid()}:
        assert out == "False 0\nthis thread may not take on user 1000\n"
    else:  # more groups of the tests' user are 65534 there, out of order, and that may be where it ends
        assert out.startswith("False 0\nthis thread may not take on ")


NAMESPACE = """
ready, go = os.pipe(), os.pipe()
child = os.fork()
if child:
    os.read(ready[0], 1)
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{child}/{name}", "w") as file: file.write("0 0 1000")
    os.write(go[1], b".")
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
syscalls.unshare(syscalls.CLONE_NEWUSER)
os.write(ready[1], b".")
os.read(go[0], 1)
"""


@needs_root
def test_in_a_namespace_of_several_ids_those_can_be_taken_on_and_others_not() -> None:
    out = run(
        [sys.executable],
        NAMESPACE
        + """
own = os.getgroups()
print(can_switch())
def state(): return files.setfsuid(files.NO_ID), files.setfsgid(files.NO_ID), os.getgroups() == own
for ids in ((999, 998, (997,)), (1000, 998, (997,)), (999, 1000, ()), (999, 998, (997, 1000))):
    person = AsCaller()
    try:
        person.enter(*ids)
        print(files.setfsuid(files.NO_ID), files.setfsgid(files.NO_ID), os.getgroups())
    except PermissionError as error: print(error.strerror.partition(":")[0])
    finally: person.leave()
    print(*state())
""",
    )
    back = "0 0 True"
    assert out.splitlines() == [
        *("True", "999 998 [997]", back),
        *("this thread may not take on user 1000", back),
        *("this thread may not take on group 1000", back),
        *("this thread may not take on the groups [997, 1000]", back),
    ]


@needs_root
def test_switching_takes_both_capabilities() -> None:
    def without(capability: int) -> object:
        before = ids()
        files.set_effective_capabilities(files.effective_capabilities() & ~(1 << capability))
        able = can_switch()
        with pytest.raises(PermissionError) as caught:
            AsCaller().enter(1, 2, [3])
        assert ids() == before
        assert caught.value.errno == errno.EPERM
        return able

    assert can_switch()
    assert in_thread(lambda: without(syscalls.CAP_SETGID)) is False
    assert in_thread(lambda: without(syscalls.CAP_SETUID)) is False
