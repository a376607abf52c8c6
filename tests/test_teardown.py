"""How mounts end: every violent death, damaged and full state directories, hostile images; nothing may remain."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rootless
import squashfs_images
from e2e import OTHER, USER, Process, World, children, ends, status
from fusewire.linux import syscalls

HELLO = "hello world\n"
COLD = "attr_timeout=0,entry_timeout=0,cache_size=0"  # so that every look at the mount needs its server
STRATEGIES = ["direct", "fusermount3", "namespace"]


@pytest.fixture(params=STRATEGIES)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Who mounts in a way that `auto` takes that strategy."""
    if request.param == "direct":
        return {"uid": 0}
    if request.param == "fusermount3":
        return {"uid": request.getfixturevalue("fuse_user"), "fusermount": True}
    return {"uid": USER}


# --- the parts of `fusewire run`


class Running:
    """A `fusewire run` whose command waits: `supervisor`, `server`, `command` are its processes."""

    def __init__(
        self, world: World, image: Path, *options: str, target: str = "new/deep/place", script: str = ""
    ) -> None:
        script = script or "echo up; while read line; do cat new/deep/place/hello.txt; done; echo end"
        words = ["run", "-o", COLD, *options, f"{image}:{target}", "--", "sh", "-c", script]
        self.process: Process = world.start("fusewire", *words)
        assert self.process.line() == "up"
        self.supervisor = self.process.pid
        self.server, self.command = children(self.supervisor)


@pytest.fixture
def running(world: World, small: Path) -> Callable[..., Running]:
    return lambda *options, **how: Running(world, small, *options, **how)


@pytest.mark.parametrize("options", [[], ["--pid"]], ids=["plain", "pid"])
def test_killed_server_ends_the_command_and_says_so(
    world: World, running: Callable[..., Running], options: list[str]
) -> None:
    job = running(*options)
    os.kill(job.server, signal.SIGKILL)
    assert job.process.wait() == 125
    done = job.process.finish()
    assert done.stderr == "fusewire: the server of the mounts has died (killed by SIGKILL); ending the command\n"
    assert world.pids() == []
    assert os.listdir(world.home()) == []


@pytest.mark.parametrize("options", [[], ["--pid"]], ids=["plain", "pid"])
def test_killed_command_ends_the_server(world: World, running: Callable[..., Running], options: list[str]) -> None:
    job = running(*options)
    os.kill(job.command, signal.SIGKILL)
    assert job.process.wait() == -signal.SIGKILL
    assert ends(job.server)
    assert world.pids() == []
    assert os.listdir(world.home()) == []


@pytest.mark.parametrize("options", [[], ["--pid"], ["--wait", "all"]], ids=["plain", "pid", "wait"])
def test_killed_run_leaves_nothing(world: World, running: Callable[..., Running], options: list[str]) -> None:
    # A background child in a session of its own, which no terminal and no process group would end.
    script = "setsid sh -c 'echo up; exec sleep 600' & exec sleep 600"
    job = running(*options, script=script)
    os.kill(job.supervisor, signal.SIGKILL)
    job.process.wait()
    for pid in (job.server, job.command, *world.pids()):
        assert ends(pid)
    assert os.listdir(world.home()) == []


@pytest.fixture
def left_over(world: World, running: Callable[..., Running]) -> Path:
    """The mount point of a run whose supervisor and server were killed at once, so that nobody could remove it."""
    job = running()
    os.kill(job.server, signal.SIGSTOP)  # else it may hear of the end of the supervisor before its own
    for pid in (job.supervisor, job.server):
        os.kill(pid, signal.SIGKILL)
    job.process.wait()
    for pid in (job.server, job.command):
        assert ends(pid)
    place = world.home() / "new" / "deep" / "place"
    assert os.listdir(place) == []
    return place


def test_directory_that_a_killed_run_has_left_is_removed_by_umount_all(world: World, left_over: Path) -> None:
    done = world.fw("list")
    assert done.stderr.splitlines() == [
        f"fusewire: {left_over}: left by a run that was killed; `fusewire umount --all` removes it",
        "nothing is mounted",
    ]
    assert world.fw("umount", "--all").returncode == 0
    assert os.listdir(world.home()) == []
    assert os.listdir(world.runtime()) == []


def test_directory_that_a_killed_run_has_left_is_removed_by_the_next_run_that_makes_one(
    world: World, small: Path, left_over: Path
) -> None:
    assert world.fw("run", f"{small}:/opt/image", "--", "true").returncode == 0  # which has made none
    assert left_over.exists()
    (left_over / "file").touch()
    assert world.fw("run", f"{small}:other", "--", "true").returncode == 0
    assert os.listdir(left_over) == ["file"]
    (left_over / "file").unlink()
    assert world.fw("run", f"{small}:other", "--", "true").returncode == 0
    assert os.listdir(world.home()) == []
    assert os.listdir(world.runtime()) == []


def test_directory_that_is_not_the_one_that_a_killed_run_has_left_stays(
    world: World, small: Path, left_over: Path
) -> None:
    left_over.rmdir()
    left_over.mkdir()  # often with the same inode number
    os.chown(left_over, USER, USER)
    assert world.fw("umount", "--all").returncode == 0
    assert left_over.exists()
    left_over.rename(world.home() / "moved")
    (world.home() / "moved").chmod(0o1755)
    left_over.parent.rename(world.home() / "elsewhere")
    assert world.fw("umount", "--all").returncode == 0
    assert sorted(os.listdir(world.home())) == ["elsewhere", "moved"]  # not what was put in its place


@pytest.mark.parametrize("target", ["mine", "mine/new", "mine/new/deeper"])
def test_directory_of_the_users_that_looks_like_one_of_ours_stays(world: World, small: Path, target: str) -> None:
    mine = world.home() / "mine"
    mine.mkdir()
    mine.chmod(0o1755)
    os.chown(mine, USER, USER)
    for _ in range(2):
        assert world.fw("run", f"{small}:{target}", "--", "cat", f"{target}/hello.txt").stdout == HELLO
        assert os.listdir(world.home()) == ["mine"]
        assert os.listdir(mine) == []


def test_directory_that_cannot_be_noted_is_removed_all_the_same(world: World, small: Path) -> None:
    shared = Path(f"/tmp/fusewire-{USER}")
    shared.mkdir(mode=0o700)
    try:
        os.chown(shared, OTHER, OTHER)
        env = {"XDG_RUNTIME_DIR": "/nowhere"}
        done = world.fw("run", f"{small}:new/deep", "--", "cat", "new/deep/hello.txt", env=env)
    finally:
        shared.rmdir()
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")
    assert os.listdir(world.home()) == []


def test_directory_of_a_run_that_goes_on_is_not_told_of(world: World, running: Callable[..., Running]) -> None:
    job = running()
    assert world.fw("list").stderr == "nothing is mounted\n"
    assert world.fw("umount", "--all").returncode == 0
    job.process.say("")
    assert job.process.line() == HELLO.strip()
    job.process.close_stdin()
    assert job.process.wait() == 0
    assert os.listdir(world.home()) == []
    assert os.listdir(world.runtime()) == []


def test_everything_killed_at_once_leaves_no_process(world: World, running: Callable[..., Running]) -> None:
    job = running(target="/opt/image", script="echo up; exec sleep 600")
    for pid in (job.server, job.supervisor, job.command):
        os.kill(pid, signal.SIGKILL)
    for pid in (job.server, job.supervisor, job.command):
        if pid != job.supervisor:
            assert ends(pid)
    job.process.wait()


STUCK = """
import os, sys, rootless
fd = int(sys.argv[1])
while (reply := rootless.reply_to(request := os.read(fd, 1 << 18))) is not None:
    if b"stuck" in request:
        print("stuck", flush=True)
        break
    os.write(fd, reply)
sys.stdin.read()
"""


@pytest.fixture
def stuck(world: World) -> Iterator[tuple[Path, Process]]:
    """A file that hangs in the kernel whoever looks at it (D state), also against SIGKILL; and who is told of it."""
    place = world.home(0) / "hangs"
    place.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    data = b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % device
    syscalls.mount(b"x", os.fsencode(place), b"fuse", 0, data)
    env = {"PYTHONPATH": rootless.TESTS}
    words = [*world.words(0)[1], "-c", STUCK, str(device)]
    server = world.start("program", *words, uid=0, env=env, popen={"pass_fds": [device]})
    os.close(device)
    yield place / "stuck", server
    server.reap()
    syscalls.umount2(os.fsencode(place), syscalls.MNT_DETACH)


@pytest.mark.parametrize("how", ["", "exec "], ids=["child", "command"])
def test_process_that_hangs_in_the_kernel_does_not_keep_a_run(
    world: World, running: Callable[..., Running], stuck: tuple[Path, Process], how: str
) -> None:
    job = running(script=f"echo up; {how}cat {stuck[0]}; exec sleep 600")
    assert stuck[1].line() == "stuck"
    os.kill(job.server, signal.SIGKILL)
    assert job.process.wait() == 125
    assert world.pids() != []
    stuck[1].reap()
    assert "the server of the mounts has died" in job.process.finish().stderr
    for pid in world.pids():
        assert ends(pid)
    world.fw("umount", "--all")  # of the place that it was in, too
    assert os.listdir(world.home()) == []


def test_reader_in_the_middle_of_a_request_gets_an_error_when_the_server_dies(
    world: World, running: Callable[..., Running]
) -> None:
    script = "echo up; read x; cat new/deep/place/data >/dev/null 2>&1; echo $?; sleep 600"
    job = running(script=script)
    os.kill(job.server, signal.SIGSTOP)  # so the request waits
    job.process.say("")
    os.kill(job.server, signal.SIGKILL)
    assert job.process.finish().returncode == 125
    assert world.pids() == []


def test_signal_to_all_processes_of_a_job_leaves_the_command_its_files(
    world: World, running: Callable[..., Running]
) -> None:
    # A command that cleans up when a service manager ends its job.
    script = "trap 'cat new/deep/place/hello.txt; exit 7' TERM; echo up; while :; do read line || exit 1; done"
    job = running(script=script)
    for pid in (job.server, job.supervisor, job.command):
        os.kill(pid, signal.SIGTERM)
    done = job.process.finish()
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.startswith(
        HELLO
    )  # twice, if it was not yet on its way out when the supervisor passed its own on


def test_runs_that_share_a_place_do_not_take_it_from_each_other(world: World, running: Callable[..., Running]) -> None:
    # rmdir(2) of a mount point detaches it in all namespaces: the first that ends must leave it.
    first, second, third = running(), running(), running(target="new/deep/other", script="echo up; read x")
    first.process.close_stdin()
    assert first.process.wait() == 0
    second.process.say("")
    assert second.process.line() == HELLO.strip()
    second.process.close_stdin()
    assert second.process.wait() == 0
    assert os.listdir(world.home() / "new" / "deep") == ["other"]
    third.process.close_stdin()
    assert third.process.wait() != 125
    assert os.listdir(world.home()) == []


def name_of(pid: int) -> str:
    """The name of a process's program; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_wait_all_can_be_ended_by_a_signal_after_the_command(world: World, small: Path) -> None:
    script = "(exec sleep 600 >/dev/null 2>&1) & echo up"
    process = world.start("fusewire", "run", "--wait", "all", f"{small}:/opt/image", "--", "sh", "-c", script)
    assert process.line() == "up"
    left = [pid for pid in world.pids() if name_of(pid) == "sleep"]
    while any(name_of(pid) == "sh" for pid in children(process.pid)):
        os.sched_yield()  # until the command has been reaped
    process.kill(signal.SIGTERM)
    assert process.wait() == 0
    for pid in {*left, *(p for p in world.pids() if name_of(p) == "sleep")}:
        if name_of(pid) == "sleep":
            os.kill(pid, signal.SIGKILL)


# --- the server of `fusewire mount`


def test_killed_server_is_listed_as_dead_hangs_nobody_and_is_cleaned_up(
    world: World, small: Path, how: dict[str, Any]
) -> None:
    uid = how["uid"]
    target = world.home(uid) / "mnt"
    target.mkdir(mode=0o750)
    os.chown(target, uid, uid)
    found = world.mount("-o", COLD, small, "mnt", **how)
    os.kill(found["pid"], signal.SIGKILL)
    assert ends(found["pid"])
    # Whoever looks gets an error at once: no shell hangs.
    done = world.sh("ls mnt/; cat mnt/hello.txt; echo over", uid=uid)
    assert done.stdout == "over\n"
    assert done.stderr.count("\n") == 2
    assert [row["state"] for row in world.listed(uid)] == ["dead"]
    assert "dead" in world.fw("list", uid=uid).stdout
    done = world.fw("path", "mnt", uid=uid)
    assert done.returncode != 0
    assert f"its server (pid {found['pid']}) is dead; `fusewire umount mnt` clears up" in done.stderr
    again = world.fw("mount", small, "mnt", **how)
    assert again.returncode == 125
    assert "fusewire umount" in again.stderr
    done = world.fw("umount", "mnt", **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.listed(uid) == []
    assert world.records(uid) == []
    info = target.lstat()
    assert stat.S_ISDIR(info.st_mode)
    assert stat.S_IMODE(info.st_mode) == 0o750
    with world.mounted(small, "mnt", **how):
        assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO


def test_killed_server_with_somebody_inside_is_cleaned_up(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    found = world.mount("-o", COLD, small, "mnt", **how)
    script = "cd mnt/directory; exec 9<file; echo in; read x; cat <&9; ls; cd /; echo out"
    reader = world.start("program", "sh", "-c", script, uid=uid)
    assert reader.line() == "in"
    os.kill(found["pid"], signal.SIGKILL)
    assert ends(found["pid"])
    reader.say("")
    assert reader.line() == "out"
    assert reader.wait() == 0
    assert world.fw("umount", "mnt", **how).returncode == 0
    assert os.listdir(world.home(uid)) == []


def test_umount_lazy_ends_a_server_that_hangs(
    world: World, small: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = how["uid"]
    found = world.mount("-o", COLD, small, "mnt", **how)
    os.kill(found["pid"], signal.SIGSTOP)
    assert [row["state"] for row in world.listed(uid)] == ["no answer"]
    # In a program, to shorten its patience.
    program = (
        "import sys; from fusewire import cli; from fusewire.cli import umount; umount.PATIENCE = 0.2; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    python = world.tool(uid=uid)[:-1]
    done = world.do(*python, "-c", program, "umount", "mnt", **how)
    assert done.returncode == 125
    assert f"its server (pid {found['pid']}) does not answer" in done.stderr
    assert "`fusewire umount --lazy` ends it" in done.stderr
    done = world.do(*python, "-c", program, "umount", "--lazy", "mnt", **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert ends(found["pid"])
    assert os.listdir(world.home(uid)) == []
    assert world.records(uid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_mount_that_is_interrupted_before_it_is_ready_leaves_nothing(world: World, small: Path, number: int) -> None:
    for _ in range(4):
        process = world.start("fusewire", "mount", small, "mnt", popen={"start_new_session": True})
        if number == signal.SIGINT:  # Ctrl-C: to all of them
            os.killpg(process.pid, number)
        else:
            while not children(process.pid):  # until there is a server that could be left alone
                os.sched_yield()
            process.kill()
        if process.wait() == 0:  # it was faster, and has said so
            assert world.fw("umount", "mnt").returncode == 0
        for pid in world.pids():
            assert ends(pid)
        assert world.records() == []
        assert not os.path.lexists(world.home() / "mnt")


def test_mount_whose_record_is_lost_can_be_unmounted(world: World, small: Path, how: dict[str, Any]) -> None:
    # The end of a session may remove $XDG_RUNTIME_DIR, and leave processes alone.
    uid = how["uid"]
    for alive in (True, False):
        found = world.mount("-o", COLD, small, "mnt", **how)
        shutil.rmtree(world.records(uid)[0])
        if alive:
            assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO
        else:
            os.kill(found["pid"], signal.SIGKILL)
            assert ends(found["pid"])
        done = world.fw("umount", "mnt", **how)
        assert (done.returncode, done.stderr) == (0, "")
        assert ends(found["pid"])
        assert not os.path.islink(world.home(uid) / "mnt")
        if (world.home(uid) / "mnt").exists():  # a helper's or root's: that we had made it was in the record
            (world.home(uid) / "mnt").rmdir()


# --- records


def test_full_state_directory_is_an_error_that_says_what_to_do(world: World, small: Path) -> None:
    runtime = world.runtime()
    script = (
        f"mount -t tmpfs -o size=4k,mode=700,uid={USER},gid={USER} none {runtime} && "
        f'cp /bin/sh {runtime}/filler 2>/dev/null; exec "$@"'
    )
    outer = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    done = world.fw("mount", small, "mnt", outer=outer)
    assert done.returncode == 125
    assert "No space left on device" in done.stderr
    assert "set XDG_RUNTIME_DIR" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(world.home()) == []
    # What needs no record does not care.
    done = world.fw("run", f"{small}:/opt/image", "--", "cat", "/opt/image/hello.txt", outer=outer)
    assert (done.returncode, done.stdout) == (0, HELLO)


def test_state_directory_that_fills_up_after_mounting_is_no_obstacle_to_umount(world: World, small: Path) -> None:
    runtime = world.runtime()
    words = " ".join(world.command("fusewire", [], USER))
    script = (
        f"mount -t tmpfs -o size=64k,mode=700,uid={USER},gid={USER} none {runtime} && "
        f"{words} mount {small} {world.home()}/mnt && cp /bin/sh {runtime}/filler 2>/dev/null; "
        f"{words} list --json && {words} umount {world.home()}/mnt && ls -A {runtime}/fusewire"
    )
    done = world.do("unshare", "-m", "--propagation", "private", "sh", "-c", script, uid=0)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["state"] for row in json.loads(done.stdout)] == ["serving"]
    assert not os.path.lexists(world.home() / "mnt")


def test_read_only_state_directory_is_an_error_that_says_what_to_do(world: World, small: Path) -> None:
    runtime = world.runtime()
    script = f'mount -t tmpfs -o ro,mode=700,uid={USER},gid={USER} none {runtime} && exec "$@"'
    outer = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    done = world.fw("mount", small, "mnt", outer=outer)
    assert done.returncode == 125
    assert "Read-only file system; set XDG_RUNTIME_DIR" in done.stderr
    assert os.listdir(world.home()) == []


def test_runtime_directory_that_does_not_exist_is_replaced_by_one_in_tmp(world: World, small: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(world.base / "nothing")}
    shared = Path(f"/tmp/fusewire-{USER}")
    try:
        found = world.mount(small, "mnt", env=env)
        info = shared.lstat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o700, USER)
        assert world.listed()[0]["id"] == found["id"]  # also by who has XDG_RUNTIME_DIR
        assert world.fw("umount", "mnt", env=env).returncode == 0
        assert os.listdir(shared) == []
    finally:
        with contextlib.suppress(FileNotFoundError):
            shared.rmdir()


def test_directory_of_somebody_else_in_tmp_is_not_in_the_way(world: World, small: Path) -> None:
    shared = Path(f"/tmp/fusewire-{USER}")
    shared.mkdir(mode=0o700)
    os.chown(shared, OTHER, OTHER)
    try:
        with world.mounted(small, "mnt") as found:
            assert world.listed()[0]["id"] == found["id"]
    finally:
        world.fw("umount", "mnt")
        for pid in world.pids():
            os.kill(pid, signal.SIGTERM)
        shared.rmdir()


GARBAGE = {
    "no-json": b"\0\xff{]",
    "empty": b"",
    "cut": b'{"version": 1, "id": "x", "sou',
    "list": b"[]",
    "version": b'{"version": 999}',
    "types": b'{"version": 1, "id": "mffffffff", "pid": "many"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_in_a_record_is_told_and_harms_nobody(world: World, small: Path, kind: str) -> None:
    with world.mounted(small, "mnt") as found:
        damaged = world.runtime() / "fusewire" / "mffffffff"
        damaged.mkdir(mode=0o700)
        (damaged / "state.json").write_bytes(GARBAGE[kind])
        for path in (damaged, damaged / "state.json"):
            os.chown(path, USER, USER)
        done = world.fw("list", "--json")
        assert done.returncode == 0
        assert [row["id"] for row in json.loads(done.stdout)] == [found["id"]]
        assert str(damaged) in done.stderr
        assert done.stderr.count("\n") == 1
        assert world.sh("cat mnt/hello.txt").stdout == HELLO
        shutil.rmtree(damaged)


@pytest.fixture
def innocent(world: World) -> Process:
    """A process of the user's that has nothing to do with it."""
    process = world.start("program", "sleep", "600")
    yield process
    process.reap()


def test_record_whose_pid_is_another_process_by_now_is_dead(world: World, small: Path, innocent: Process) -> None:
    found = world.mount(small, "mnt")
    os.kill(found["pid"], signal.SIGKILL)
    assert ends(found["pid"])
    file = world.records()[0] / "state.json"
    record = json.loads(file.read_text())
    record["pid"] = innocent.pid  # as the kernel reuses it: the start time stays the dead one's
    file.write_text(json.dumps(record))
    assert [row["state"] for row in world.listed()] == ["dead"]
    done = world.fw("umount", "--all")
    assert (done.returncode, done.stderr) == (0, "")
    assert innocent.popen.poll() is None
    assert os.listdir(world.home()) == []


def test_record_of_an_earlier_boot_is_dead(world: World, small: Path, innocent: Process) -> None:
    found = world.mount(small, "mnt")
    os.kill(found["pid"], signal.SIGKILL)
    assert ends(found["pid"])
    file = world.records()[0] / "state.json"
    record = json.loads(file.read_text())
    record |= {"pid": innocent.pid, "starttime": record["starttime"] + 10**9}
    file.write_text(json.dumps(record))
    assert [row["state"] for row in world.listed()] == ["dead"]
    assert world.fw("umount", found["target"]).returncode == 0


# --- resources


def test_fifty_mounts_leave_nothing(world: World, small: Path) -> None:
    words = " ".join([*world.tool()[:-1], "-m", "fusewire"])
    script = (
        f"for i in $(seq $((10#$1 * 10)) $((10#$1 * 10 + 9))); do {words} mount {small} m$i && cat m$i/hello.txt && "
        f"{words} umount m$i || exit 1; done"
    )
    done = world.do("bash", "-c", 'seq 0 4 | xargs -n 1 -P 2 bash -c "$0" x', script)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO * 50, "")
    assert world.pids() == []
    assert world.records() == []
    assert os.listdir(world.home()) == []


def test_server_of_many_requests_keeps_its_descriptors_and_threads(world: World, small: Path) -> None:
    with world.mounted("-o", COLD, small, "mnt") as found:
        pid = found["server"]
        world.sh("cat mnt/data mnt/hello.txt >/dev/null; ls -lR mnt/ >/dev/null")
        before = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
        assert world.sh("for i in 1 2 3 4 5; do cat mnt/data; ls -lR mnt/; done >/dev/null").returncode == 0
        for _ in range(5):
            assert world.listed()[0]["state"] == "serving"
        after = (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
        assert after == before


@pytest.fixture(scope="session")
def large(images: Path) -> Path:
    """An image of 300 MiB that unpacks to 600: the parts of one random file, again and again in another order."""
    root = images / "large-tree"
    root.mkdir()
    parts = [squashfs_images.noise(1 << 20, seed) + bytes(1 << 20) for seed in range(10)]
    for number in range(6):
        order = random.Random(number)
        with (root / f"file{number}").open("wb") as file:
            for _ in range(50):
                part = order.choice(parts)
                cut = order.randrange(len(part))
                file.write(part[cut:] + part[:cut])
    image = squashfs_images.mksquashfs(root, images / "large.sqsh", "-comp", "lz4", "-no-duplicates", "-b", "1M")
    shutil.rmtree(root)
    image.chmod(0o644)
    return image


@pytest.mark.parametrize("cache", [8, 64])
def test_memory_of_the_server_is_bounded_however_large_the_image(world: World, large: Path, cache: int) -> None:
    with world.mounted("-o", f"cache_size={cache}M", large, "mnt") as found:
        assert world.sh("for f in mnt/*; do cat $f >/dev/null & done; wait").stderr == ""
        peak = int(status(found["server"], "VmHWM").split()[0]) / 1024
        assert peak < cache + 60


# --- hostile images


def damaged(image: bytes, seed: int) -> bytes:
    """A copy that is cut off somewhere, or has flipped bits, mostly in its tables at the end."""
    order = random.Random(seed)
    data = bytearray(image)
    if seed % 4 == 0:
        return bytes(data[: order.randrange(96, len(data))])
    for _ in range(order.choice((1, 5, 50))):
        at = order.randrange(96, len(data)) if seed % 4 == 1 else order.randrange(len(data) * 9 // 10, len(data))
        data[at] ^= 1 << order.randrange(8)
    return bytes(data)


@pytest.fixture(scope="session")
def victims(images: Path) -> dict[str, bytes]:
    """Images of a tree with a bit of everything, compressed and not (so that flipped bits reach the structures)."""
    root = squashfs_images.make_tree(images / "victim", 4096)
    made = {
        "packed": squashfs_images.mksquashfs(root, images / "packed.sqsh", "-b", "4096"),
        "plain": squashfs_images.mksquashfs(root, images / "plain.sqsh", "-b", "4096", "-noI", "-noD", "-noF", "-noX"),
    }
    return {name: path.read_bytes() for name, path in made.items()}


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_damaged_images_give_errors_and_the_server_lives(world: World, victims: dict[str, bytes], kind: str) -> None:
    refused = walked = 0
    for seed in range(10):
        image = world.home() / f"damaged{seed}"
        image.write_bytes(damaged(victims[kind], seed))
        mounted = world.fw("mount", "--json", image, "mnt")
        assert "Traceback" not in mounted.stderr
        if mounted.returncode:
            assert mounted.returncode == 125
            assert str(image) in mounted.stderr
            assert mounted.stderr.count("\n") == 1
            refused += 1
            continue
        found = json.loads(mounted.stdout)
        done = world.do(*world.tool("walk", "mnt/."))
        assert done.returncode == 0, (seed, done.stderr)
        assert set(json.loads(done.stdout)) <= {"ok", "EIO", "ENOENT", "EINVAL", "ENAMETOOLONG", "ELOOP", "ENOTDIR"}
        assert [row["state"] for row in world.listed()] == ["serving"]
        assert int(status(found["server"], "VmHWM").split()[0]) < 110 * 1024
        assert world.fw("umount", "mnt").returncode == 0
        walked += 1
    assert refused + walked == 10
    assert walked


@pytest.mark.parametrize("cut", [0, 50, 96, 1000, 30_000])
def test_image_that_shrinks_while_mounted_gives_errors(world: World, victims: dict[str, bytes], cut: int) -> None:
    image = world.home() / "shrinks"
    image.write_bytes(victims["plain"])
    with world.mounted("-o", COLD, image, "mnt"):
        os.truncate(image, cut)
        done = world.do(*world.tool("walk", "mnt/."))
        assert done.returncode == 0, done.stderr
        assert "EIO" in json.loads(done.stdout)
        assert world.listed()[0]["state"] == "serving"
