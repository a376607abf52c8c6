"""What an unkind machine, unkind neighbours and bad luck do to the command line; nothing may break, nothing remain."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import squashfs_images
from e2e import OTHER, USER, Process, Result, World, digest, ends
from fusewire import serve
from fusewire.cli import state, umount
from fusewire.linux import mount, mount_base, mount_namespace, mountinfo, process, syscalls
from fusewire.ops import Operations

HELLO = "hello world\n"
LONER = 4299  # a user of this file alone: its processes are counted


def mask(world: World, commands: str) -> list[str]:
    """Words that start a program in a mount namespace where root has run shell commands first."""
    if subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mount namespaces cannot be made here")
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{commands}; exec "$@"', "sh"]


def python(world: World, code: str, *arguments: str, uid: int = USER) -> Result:
    """Run the command line with `code` before it: what happens in it, happens in the middle of a command."""
    script = f"import os, signal, sys\nfrom fusewire import cli\n{code}\nsys.exit(cli.main(sys.argv[1:]))"
    return world.do(*world.words(uid)[1], "-c", script, *arguments, uid=uid)


# --- what the caller hands over


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_place_for_an_image(world: World, small: Path, closed: str) -> None:
    words = " ".join(world.words()[1])
    assert world.sh(f"{words} -m fusewire mount {small} env {closed}").returncode == 0
    assert world.do("cat", "env/hello.txt").stdout == HELLO
    assert world.sh(f"{words} -m fusewire umount env {closed}").returncode == 0
    done = world.sh(f"{words} -m fusewire run {small}:env -- sh -c 'cat env/hello.txt >out' {closed}")
    assert done.returncode == 0
    assert (world.home() / "out").read_text() == HELLO


def test_umask_that_denies_the_owner_is_the_commands_alone(world: World, small: Path) -> None:
    wrap = ["sh", "-c", 'umask 0777; exec "$@"', "sh"]
    done = world.fw("run", f"{small}:new/env", "--", "sh", "-c", "umask; cat new/env/hello.txt", wrap=wrap)
    assert (done.returncode, done.stdout) == (0, f"0777\n{HELLO}")
    with world.mounted(small, "env", wrap=wrap):
        assert world.do("cat", "env/hello.txt").stdout == HELLO
    assert os.listdir(world.home()) == []


def test_limit_of_processes_costs_workers_and_not_an_endless_wait(world: World, small: Path) -> None:
    # A run needs its three processes, a locked-in one with a worker, who listens to that, and for a moment one more; a
    # mount its two, its own, one who watches, and two who listen.
    for limit, code in ((8, 0), (5, 125), (4, 125), (3, 125)):
        done = world.fw("run", f"{small}:env", "--", "cat", "env/hello.txt", uid=LONER, wrap=["prlimit", f"-u{limit}"])
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == HELLO if code == 0 else "ulimit -u" in done.stderr
    done = world.fw("mount", small, "env", uid=LONER, wrap=["prlimit", "-u4"])
    assert done.returncode == 125
    assert "ulimit -u" in done.stderr
    with world.mounted(small, "env", uid=LONER, wrap=["prlimit", "-u10"]):
        assert world.do("cat", "env/hello.txt", uid=LONER).stdout == HELLO
    assert os.listdir(world.home(LONER)) == []


def test_server_that_gets_no_thread_at_all_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reader, writer = os.pipe()
    server = serve.Server(Operations(), reader)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(BlockingIOError, match="ulimit -u"):
        server.start()
    server.close()
    os.close(writer)


def test_working_directory_without_a_path_is_no_obstacle_to_absolute_names(world: World, small: Path) -> None:
    gone = ["sh", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "sh"]
    target = world.home() / "env"
    assert world.fw("run", f"{small}:{target}", "--", "cat", target / "hello.txt", wrap=gone).stdout == HELLO
    with world.mounted(small, target, wrap=gone):
        assert world.fw("exec", target, "--", "cat", target / "hello.txt", wrap=gone).stdout == HELLO


def test_exec_starts_a_command_as_a_shell_does(world: World, small: Path) -> None:
    with world.mounted(small, "env"):
        plain, inside = (
            [line for line in done.stdout.splitlines() if line.startswith(("SigIgn", "SigBlk"))]
            for done in (
                world.do("cat", "/proc/self/status"),
                world.fw("exec", "env", "--", "cat", "/proc/self/status"),
            )
        )
        assert plain == inside


def test_source_with_a_long_path_is_mounted(world: World, small: Path) -> None:
    deep = world.home().joinpath(*["d" * 100] * 4)
    deep.mkdir(parents=True)
    image = shutil.copy(small, deep)
    with world.mounted(image, "env", "--strategy", "namespace"):
        assert world.do("cat", "env/hello.txt").stdout == HELLO


def test_number_of_no_descriptor_is_refused(world: World, small: Path) -> None:
    done = world.fw("mount", small, f"/dev/fd/{10**30}")
    assert done.returncode == 125
    assert "the mount point is not /dev/fd/N" in done.stderr
    assert "Traceback" not in done.stderr


def test_mount_made_in_one_locale_is_unmounted_in_another(world: World, small: Path) -> None:
    target = os.fsdecode(b"caf\xc3\xa9 \xff")
    bytes_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for first, second in ((bytes_only, {}), ({}, bytes_only)):
        assert world.fw("mount", small, target, env=first).returncode == 0
        assert world.fw("path", target, env=second).stdout.startswith("/proc/")
        assert world.fw("umount", target, env=second).returncode == 0
        assert os.listdir(os.fsencode(world.home())) == []
        assert world.pids() == []


# --- what the machine lacks


def test_without_proc_it_is_said_what_is_missing(world: World, small: Path) -> None:
    outer = mask(world, "umount -l /proc")
    for words in (["run", f"{small}:env", "--", "true"], ["mount", small, "env"], ["list"]):
        done = world.fw(*words, outer=outer)
        assert done.returncode != 0
        assert "; /proc has to be mounted" in done.stderr
    done = world.fw("doctor", outer=outer)
    assert done.returncode == 1
    assert "mount /proc" in done.stdout
    assert "fusewire run:   does not work here" in done.stdout


def test_device_that_is_another_one_is_named(world: World, small: Path) -> None:
    outer = mask(world, "mount --bind /dev/null /dev/fuse")
    for words in (["run", f"{small}:env", "--", "true"], ["mount", small, "env"]):
        done = world.fw(*words, outer=outer)
        assert done.returncode == 125
        assert "/dev/fuse is not the character device 10:229 - ask for `mknod" in done.stderr


def test_ids_that_are_not_mapped_are_named_as_the_cause(world: World, small: Path) -> None:
    done = world.fw("run", f"{small}:env", "--", "true", wrap=["unshare", "-U"])
    assert done.returncode == 125
    assert "this user's ids have no mapping in the user namespace that it is in" in done.stderr
    assert "unshare --map-current-user" in done.stderr


# --- what the neighbours do


def test_link_of_somebody_else_ends_nobodys_server(world: World, small: Path) -> None:
    with world.mounted(small, "env") as found:
        link = world.home(OTHER) / "env"
        link.symlink_to(os.readlink(world.home() / "env"))
        os.chown(link, OTHER, OTHER, follow_symlinks=False)
        os.chmod(world.home(OTHER), 0o777)
        (world.runtime() / "fusewire").rename(world.runtime() / "lost")  # its record cannot speak for the server
        try:
            assert world.fw("umount", link).returncode == 0
            assert os.readlink(world.home() / "env") == found["path"]
            assert world.do("cat", "env/hello.txt").stdout == HELLO
        finally:
            (world.runtime() / "lost").rename(world.runtime() / "fusewire")


def test_link_to_another_programs_device_does_not_end_that_program(world: World) -> None:
    code = "import os; fd = os.open('/dev/fuse', os.O_RDWR); print(fd, flush=True); input()"
    other = world.start("program", *world.words()[1], "-c", code)
    link = world.home() / "env"
    link.symlink_to(f"/proc/{other.pid}/fd/{other.line()}")
    os.chown(link, USER, USER, follow_symlinks=False)
    assert world.fw("umount", "env").returncode == 0
    assert not os.path.lexists(link)
    other.say("end")
    assert other.wait() == 0


def test_directory_of_somebody_else_does_not_make_umount_all_fail(world: World, small: Path) -> None:
    squatted = Path(f"/tmp/fusewire-{LONER}")
    squatted.mkdir(mode=0o777)
    try:
        os.chown(squatted, OTHER, OTHER)
        world.mount(small, "env", uid=LONER)
        done = world.fw("umount", "--all", uid=LONER)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        squatted.rmdir()


def elsewhere(place: Path) -> Path:
    """Another directory in the place of `place`, by a symlink, as somebody makes it who may rename in its parent."""
    place.rename(place.parent / "moved")
    other = place.parent / "elsewhere"
    other.mkdir()
    place.symlink_to("elsewhere")
    return other


def test_link_is_made_where_it_was_asked_for_whatever_others_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    for before in ("missing", "empty"):
        if before == "empty":
            (parent / "target").mkdir(mode=0o750)
        place = mount_namespace.find_place(os.fsencode(parent / "target"))
        other = elsewhere(parent)
        try:
            mount_namespace._replace(place, b"/proc/1/fd/7")
            assert os.readlink(tmp_path / "moved" / "target") == "/proc/1/fd/7"
            assert os.listdir(other) == []
            # And what is at the place now is not undone.
            (other / "target").symlink_to("/proc/1/fd/7")
            aside = place.aside if place.existed else None
            mount_namespace.put_back(place.path, b"/proc/1/fd/7", aside, place.identity)
            assert os.listdir(other) == ["target"]
        finally:
            place.close()
        (other / "target").unlink()
        other.rmdir()
        parent.unlink()
        (tmp_path / "moved").rename(parent)
        mount_namespace.put_back(place.path, b"/proc/1/fd/7", aside, place.identity)
        assert os.listdir(parent) == ([] if before == "missing" else ["target"])
    assert stat.S_IMODE((parent / "target").stat().st_mode) == 0o750


def test_directory_that_was_made_is_removed_where_it_was_made(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    made = os.fsencode(parent / "target")
    mount_base.make_directory(made)
    known = mount_base.identity(parent.stat())
    other = elsewhere(parent)
    (other / "target").mkdir()
    assert not mount_base.rmdir_if_ours(made)
    parent.unlink()
    other.rename(parent)
    assert not mount_base.rmdir_if_ours(made, known)
    assert os.listdir(parent) == ["target"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts and unmounts by path")
def test_unmount_goes_to_the_mount_that_was_made_and_no_other(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "target").mkdir(parents=True)
    ours = mount.mount(os.fsencode(parent / "target"), mount_base.Options(), "direct")
    other = elsewhere(parent)
    (other / "target").mkdir()
    syscalls.mount(b"innocent", os.fsencode(other / "target"), b"tmpfs", 0)
    try:
        with pytest.raises(OSError, match="is not the same place any more"):
            mount_base.unmount_path(ours.inside, True, ours.target)
        with pytest.raises(OSError, match="another filesystem is mounted over it"):
            ours.unmount(lazy=True)
        parent.unlink()
        other.rename(parent)
        with pytest.raises(OSError, match="is not the same place any more"):
            mount_base.unmount_path(ours.inside, True, ours.target, ours._mount_id)
        assert mountinfo.at(ours.inside).fstype == b"tmpfs"
    finally:
        for place in (parent, tmp_path / "moved"):
            with contextlib.suppress(OSError):
                syscalls.umount2(os.fsencode(place / "target"), syscalls.MNT_DETACH)
        ours.close()


def test_what_was_put_in_an_empty_directory_at_the_last_moment_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    place = mount_namespace.find_place(os.fsencode(target))
    (target / "file").touch()
    with pytest.raises(OSError, match="it is not empty any more"):
        mount_namespace._replace(place, b"/proc/1/fd/7")
    place.close()
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["file"]


def test_what_has_been_put_in_the_place_of_a_link_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    place = mount_namespace.find_place(os.fsencode(target))
    mount_namespace._replace(place, b"/proc/1/fd/7")
    place.close()
    target.unlink()
    target.write_text("mine")
    mount_namespace.put_back(place.path, b"/proc/1/fd/7", place.aside, place.identity)
    assert os.listdir(tmp_path) == ["target"]
    assert target.read_text() == "mine"


def test_mount_point_that_has_become_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "target").mkdir(parents=True)
    (tmp_path / "parent").symlink_to("elsewhere")
    swapped = os.fsencode(tmp_path / "parent" / "target")
    monkeypatch.setattr(mount, "find_mount_point", lambda target, options: (swapped, False))
    monkeypatch.setattr(mount, "_check_direct", lambda target, options: None)
    with pytest.raises(mount.MountError, match="is not the same place any more"):
        mount.mount(swapped, mount_base.Options(), "direct")


@contextlib.contextmanager
def silent(path: str) -> Iterator[None]:
    """A control socket that accepts and never answers."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    try:
        yield
    finally:
        listener.close()
        os.unlink(path)


def test_pid_of_another_namespace_is_nobody_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umount, "PATIENCE", 0.05)
    store = state.Store([os.fspath(tmp_path / "state")])
    record = store.create("image", os.fspath(tmp_path / "target"))
    innocent = subprocess.Popen(["sleep", "60"])
    try:
        record.pid, record.starttime, record.pidns = innocent.pid, process.start_time(innocent.pid) or 0, 1
        record.mount = {"strategy": "fd"}
        store.save(record)
        with silent(record.control), pytest.raises(OSError, match="lives in another PID namespace; unmount it there"):
            umount._umount_record(store, record, True, None)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


# --- bad moments


KILLED_WHEN = {
    "before its record is written": "from fusewire.cli import state; state._write = lambda *a: os.kill(os.getpid(), 9)",
    "before its link is made": (
        "from fusewire.linux import mount_namespace; mount_namespace.os = type('os', (), {**vars(os), "
        "'symlink': staticmethod(lambda *a, **k: os.kill(os.getpid(), 9))})"
    ),
    "before its mount is noted": (
        "from fusewire.cli.state import Store; Store.save = lambda *a: os.kill(os.getpid(), 9)"
    ),
}


@pytest.mark.parametrize("before", ["missing", "empty"])
@pytest.mark.parametrize("moment", KILLED_WHEN)
def test_server_that_is_killed_while_it_mounts_leaves_what_umount_undoes(
    world: World, small: Path, moment: str, before: str
) -> None:
    target = world.home() / "env"
    if before == "empty":
        target.mkdir()
        target.chmod(0o750)
        os.chown(target, USER, USER)
    done = python(world, KILLED_WHEN[moment], "mount", str(small), "env")
    assert done.returncode == 125
    assert "the server died before the mount was ready (killed by SIGKILL)" in done.stderr
    world.fw("umount", "env")
    assert world.records() == []
    assert not target.is_symlink()
    if before == "empty":
        assert stat.S_IMODE(target.stat().st_mode) == 0o750
    else:
        assert not target.exists()
    done = world.fw("list")
    assert (done.returncode, done.stderr) == (0, "nothing is mounted\n")


def test_mount_of_roots_that_was_not_noted_is_unmounted(world: World, small: Path) -> None:
    below = world.home(0) / "env"
    below.mkdir()
    world.mount(small, below, uid=0)  # and the one that dies lies on top of it
    done = python(world, KILLED_WHEN["before its mount is noted"], "mount", str(small), "env", uid=0)
    assert done.returncode == 125
    assert len(world.mounts()) == 2
    dead = next(
        record for record in state.Store([str(world.runtime(0) / "fusewire")]).load_all()[0] if not record.mount
    )
    assert world.fw("umount", dead.id, uid=0).returncode == 0
    assert len(world.mounts()) == 1
    assert world.do("cat", below / "hello.txt", uid=0).stdout == HELLO
    assert world.fw("umount", below, uid=0).returncode == 0


def test_umount_ends_a_server_that_is_about_to_mount(world: World, small: Path) -> None:
    os.mkfifo(world.home() / "gate")
    os.chmod(world.home() / "gate", 0o666)
    code = (
        "import sys; from fusewire import cli; from fusewire.linux import mount; real = mount.mount\n"
        "def late(*a, **k): print('begun', flush=True); open('/proc/self/cwd/../gate').read(); return real(*a, **k)\n"
        f"late.__globals__['open'] = lambda path: __builtins__.open({str(world.home() / 'gate')!r})\n"
        "mount.mount = late\nsys.exit(cli.main(['mount', sys.argv[1], 'env']))"
    )
    mounting = world.start("program", *world.words()[1], "-c", code, small)
    assert mounting.line() == "begun"
    unmounting = world.start("fusewire", "umount", "--all")
    with open(world.home() / "gate", "w"):
        pass
    done = unmounting.finish()
    assert (done.returncode, done.stderr) == (0, "")
    assert mounting.wait() in (0, 125)
    assert world.records() == []
    assert os.listdir(world.home()) == ["gate"]


def test_four_umounts_at_once_are_one(world: World, small: Path) -> None:
    world.mount(small, "env")
    jobs: list[Process] = [world.start("fusewire", "umount", *words) for words in (["env"], ["env"], ["-a"], ["-a"])]
    for done in [job.finish() for job in jobs]:
        assert done.returncode == 0 or "nothing that Fusewire mounted" in done.stderr, done.stderr
    assert os.listdir(world.home()) == []
    assert world.records() == []


def test_umount_all_begins_with_the_newest(world: World, small: Path, images: Path) -> None:
    outer = world.home() / "outer.sqsh"
    (world.home() / "tree").mkdir()
    shutil.copy(small, world.home() / "tree" / "inner.sqsh")
    squashfs_images.mksquashfs(world.home() / "tree", outer)
    outer.chmod(0o644)
    world.mount(outer, "outer")
    world.mount("outer/inner.sqsh", "inner")
    assert world.do("cat", "inner/hello.txt").stdout == HELLO
    done = world.fw("umount", "--all")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_run_whose_source_hangs(world: World, small: Path, number: int) -> None:
    (world.home() / "tree").mkdir()
    shutil.copy(small, world.home() / "tree" / "inner.sqsh")
    outer = squashfs_images.mksquashfs(world.home() / "tree", world.home() / "outer.sqsh")
    outer.chmod(0o644)
    found = world.mount(outer, "outer")
    os.kill(found["server"], signal.SIGSTOP)
    try:
        script = 'echo "$$"; exec "$@"'
        words = [*world.words()[1], "-m", "fusewire", "run", "outer/inner.sqsh:new/env", "--", "true"]
        job = world.start("program", "sh", "-c", script, "sh", *words)
        assert job.line() == str(job.pid)
        wait_for_children(job.pid, 2)
        job.kill(number)
        assert job.wait() == -number
        assert sorted(os.listdir(world.home())) == ["outer", "outer.sqsh", "tree"]
    finally:
        os.kill(found["server"], signal.SIGCONT)
    assert world.fw("umount", "outer").returncode == 0


@pytest.mark.parametrize("options", [[], ["-f"]], ids=["background", "foreground"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_a_mount_whose_source_hangs(world: World, small: Path, number: int, options: list[str]) -> None:
    (world.home() / "tree").mkdir()
    shutil.copy(small, world.home() / "tree" / "inner.sqsh")
    outer = squashfs_images.mksquashfs(world.home() / "tree", world.home() / "outer.sqsh")
    outer.chmod(0o644)
    found = world.mount(outer, "outer")
    os.kill(found["server"], signal.SIGSTOP)
    others = world.pids()
    try:
        job = world.start("fusewire", "mount", *options, "outer/inner.sqsh", "env", popen={"start_new_session": True})
        while not any(waits_for_a_server(pid) for pid in world.pids() if pid not in others):
            assert not ends(job.pid, 0.01)
        if number == signal.SIGINT:  # Ctrl-C: to all of them
            os.killpg(job.pid, number)
        else:
            job.kill(number)
        done = job.finish()
        assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
        assert world.pids() == others  # at once
    finally:
        os.kill(found["server"], signal.SIGCONT)
    assert world.fw("umount", "outer").returncode == 0
    assert not os.path.lexists(world.home() / "env")


def waits_for_a_server(pid: int) -> bool:
    """Tell whether a process waits in the kernel for the answer of a FUSE server."""
    with contextlib.suppress(OSError):
        return "request_wait" in Path(f"/proc/{pid}/wchan").read_text()
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_mount_whose_target_hangs(world: World, small: Path, number: int) -> None:
    (world.home() / "tree" / "place").mkdir(parents=True)
    outer = squashfs_images.mksquashfs(world.home() / "tree", world.home() / "outer.sqsh")
    outer.chmod(0o644)
    found = world.mount("-o", "attr_timeout=0,entry_timeout=0", outer, "outer")
    os.kill(found["server"], signal.SIGSTOP)
    others = world.pids()
    records = world.records()
    try:
        job = world.start("fusewire", "mount", small, "outer/place/env", popen={"start_new_session": True})
        while not any(waits_for_a_server(pid) for pid in world.pids() if pid not in others):
            assert not ends(job.pid, 0.01)
        job.kill(number)
        assert job.wait() == -number
        assert world.pids() == others
        assert world.records() == records
    finally:
        os.kill(found["server"], signal.SIGCONT)
    assert world.fw("umount", "outer").returncode == 0


def test_mount_that_the_terminal_has_hung_up_on_goes_on_if_it_ignores_that(world: World, small: Path) -> None:
    os.mkfifo(world.home() / "image")
    os.chmod(world.home() / "image", 0o666)
    ignore = ["sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh"]  # nohup(1)
    code = (
        "import sys; from fusewire import cli; from fusewire.fs import sources; real = sources.open_fd\n"
        f"def slow(*a): print('begun', flush=True); open({str(world.home() / 'image')!r}).read(); return real(*a)\n"
        "sources.open_fd = slow\nsys.exit(cli.main(['mount', sys.argv[1], 'env']))"
    )
    job = world.start("program", *world.words()[1], "-c", code, small, wrap=ignore)
    assert job.line() == "begun"
    for number in (signal.SIGHUP, signal.SIGINT):
        job.kill(number)
    with open(world.home() / "image", "w"):
        pass
    assert job.wait() == 0
    assert world.do("cat", "env/hello.txt").stdout == HELLO
    assert world.fw("umount", "env").returncode == 0


def wait_for_children(pid: int, count: int) -> None:
    """Wait until a process has started that many; what it does before is short."""
    path = f"/proc/{pid}/task/{pid}/children"
    while len(Path(path).read_text().split()) < count:
        assert not ends(pid, 0.01)


def test_run_onto_the_link_of_a_mount_is_refused(world: World, small: Path) -> None:
    with world.mounted(small, "env"):
        done = world.fw("run", f"{small}:env", "--", "true")
        assert done.returncode == 125
        assert "lies in a mount of another namespace" in done.stderr


# --- what programs do to a mount


READS = """
import ctypes, errno, mmap, os, random, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
top, plain = sys.argv[1:]
SYS_getdents64 = {"x86_64": 217}.get(os.uname().machine, 61)

def getdents(fd, size):
    buffer = ctypes.create_string_buffer(size)
    length = libc.syscall(SYS_getdents64, fd, buffer, size)
    if length < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    at, found = 0, []
    while at < length:
        _, offset, record = struct.unpack_from("QqH", buffer.raw, at)
        found.append((buffer.raw[at + 19 : at + record].split(b"\\0")[0], offset))
        at += record
    return found

fd = os.open(f"{top}/three thousand", os.O_RDONLY)
found = []
while part := getdents(fd, 64):  # one name or two at a time
    found += part
names = [name for name, _ in found]
assert sorted(names) == sorted([b".", b"..", *os.listdir(os.fsencode(f"{plain}/three thousand"))])
for index in random.Random(1).sample(range(len(found) - 1), 200):  # telldir(3), seekdir(3)
    os.lseek(fd, found[index][1], os.SEEK_SET)
    assert getdents(fd, 4096)[0][0] == names[index + 1]
for odd in (1, 4, 5, 4099, 1 << 40, (1 << 63) - 1):  # positions that were never given out harm nobody
    os.lseek(fd, odd, os.SEEK_SET)
    try:
        getdents(fd, 4096)
    except OSError as error:
        assert error.errno in (errno.EIO, errno.EINVAL), error
os.lseek(fd, 0, os.SEEK_SET)
assert getdents(fd, 64)[0][0] == b"."

with open(f"{plain}/big", "rb") as file:
    data = file.read()
direct = os.open(f"{top}/big", os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
assert b"".join(iter(lambda: buffer[: os.readv(direct, [buffer])], b"")) == data
assert os.pread(direct, 1000, 777) == data[777:1777]
file = os.open(f"{top}/big", os.O_RDONLY)
memory = os.memfd_create("copy")
while os.sendfile(memory, file, None, 1 << 20):
    pass
assert os.pread(memory, len(data) + 1, 0) == data
assert os.lseek(file, 0, os.SEEK_HOLE) == len(data) and os.lseek(file, 5, os.SEEK_DATA) == 5
assert os.pread(file, 10, 1 << 62) == b""
assert mmap.mmap(file, 0, prot=mmap.PROT_READ)[:] == data
for length, number in ((255, errno.ENOENT), (256, errno.ENAMETOOLONG)):
    try:
        os.stat(f"{top}/{'x' * length}")
    except OSError as error:
        assert error.errno == number
opened = [os.open(f"{top}/big", os.O_RDONLY) for _ in range(900)]
for index, one in enumerate(opened):
    assert os.pread(one, 5, index * 1000) == data[index * 1000 :][:5]
"""


def test_mount_is_read_in_every_way_that_a_program_can(
    world: World, tree: Path, image_of: Callable[[str], Path]
) -> None:
    with world.mounted(image_of("gzip"), "env"):
        done = world.do(*world.words()[1], "-c", READS, "env", tree)
        assert (done.returncode, done.stderr) == (0, "")


def test_image_is_replaced_and_removed_under_a_mount(world: World, small: Path) -> None:
    image = world.home() / "image.sqsh"
    shutil.copy(small, image)
    with world.mounted(image, "env"):
        other = world.home() / "other"
        other.write_bytes(b"something else")
        other.rename(image)
        assert world.do("cat", "env/hello.txt").stdout == HELLO
        image.unlink()
        expected = squashfs_images.text(300_000)
        (world.home() / "expected").write_bytes(expected)
        wanted = digest(os.fsencode(world.home() / "expected"))
        assert world.do(*world.tool("digest", "env/data")).stdout.strip() == wanted
