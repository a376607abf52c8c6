"""The server of `fusewire mount` and `run` locked in: what it is, what it cannot do, what becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e import PATIENCE, USER, World, ends, status
from fusewire.linux import landlock

PROGRAM = str(Path(__file__).with_name("probe_mount.py"))
NOTHING = "0" * 16
HELLO = "hello world\n"
RULES = landlock.abi() >= landlock.MOVES_FILES
needs_landlock = pytest.mark.skipif(not RULES, reason=landlock.missing() or "Landlock of ABI 1 only")


class Probed:
    """A mount whose server evaluates expressions."""

    def __init__(self, process: Any, target: Path) -> None:
        self._process = process
        self.target = target
        found = json.loads(process.line())
        self.server, self.how = found["server"], found["how"]

    def ask(self, expression: str) -> str:
        """What it gives, as a text; asked by a process of its own, for whom a server that dies is an error."""
        code = "import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], b'user.' + sys.argv[2].encode()))"
        words = ["/usr/bin/python3", "-c", code, str(self.target), expression]
        if os.geteuid() == 0 and self.uid:
            words = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups", "--", *words]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.stdout if done.returncode == 0 else done.stderr.splitlines()[-1]

    uid = 0

    def end(self) -> str:
        """Have it say how its server has ended."""
        return str(json.loads(self._process.line())["died"])


@contextlib.contextmanager
def probed(world: World, uid: int, *locks: str, directory: Path | None = None) -> Iterator[Probed]:
    target, private = world.home(uid) / "mnt", world.home(uid) / "private"
    for place in (target, private):
        place.mkdir()
        os.chown(place, uid, uid)
    shutil.copy(PROGRAM, world.home(uid))
    program = world.home(uid) / Path(PROGRAM).name
    program.chmod(0o644)
    words = [*world.words(uid)[1], str(program), str(target), str(private), *locks]
    job = world.start("program", *words, *map(str, [directory] if directory else []), uid=uid)
    try:
        found = Probed(job, target)
        found.uid = uid
        yield found
    finally:
        assert job.finish().returncode == 0


BOTH = pytest.mark.parametrize("uid", [0, USER], ids=["root", "rootless"])


@BOTH
def test_server_of_an_image_can_open_nothing_and_be_nobody(world: World, uid: int) -> None:
    with probed(world, uid, "auto", "auto", "none") as box:
        assert box.how.startswith("sandbox: namespace")
        assert box.ask("os.listdir('/')") == ("EACCES" if RULES else "[]")
        for attempt in ("open('/etc/passwd')", "open('/proc/self/status')", "os.open('/', os.O_RDONLY)"):
            assert box.ask(attempt) in ("ENOENT", "EACCES"), attempt
        assert box.ask("os.open('/file', os.O_CREAT|os.O_WRONLY)") in ("EROFS", "EACCES")
        assert box.ask("os.mkdir('/directory')") in ("EROFS", "EACCES")
        assert box.ask("os.stat('/proc/self/root/etc/passwd')") == "ENOENT"
        assert box.ask("os.chroot('/')") == "EPERM"
        assert box.ask("syscalls.mount(b'x', b'/', b'tmpfs', 0)") == "EPERM"
        assert box.ask("os.getpid()") == "1"
        assert box.ask("socket.socket().connect((b'127.0.0.1', 9))") in ("ENETUNREACH", "EACCES")
        assert box.ask("os.execv('/bin/sh', ['sh'])") in ("ENOENT", "EACCES")
        assert box.ask("os.kill(99999, 9)") == "ESRCH"
        assert "ImportError" in box.ask("__import__('wave')") or "ModuleNotFound" in box.ask("__import__('wave')")
        kept = status(box.server, "CapEff"), status(box.server, "CapPrm"), status(box.server, "CapAmb")
        assert kept == (NOTHING, NOTHING, NOTHING)
        assert (status(box.server, "NoNewPrivs"), status(box.server, "Groups")) == ("1", "")
        for name in ("mnt", "pid", "net", "ipc"):
            theirs = os.readlink(f"/proc/{box.server}/ns/{name}") if os.geteuid() == 0 else "?"
            assert theirs != os.readlink(f"/proc/self/ns/{name}")


@BOTH
@needs_landlock
def test_server_of_a_directory_reaches_that_and_the_groups_of_callers(world: World, uid: int) -> None:
    tree = world.home(uid) / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "file").write_text("inside")
    (tree / "out").symlink_to("/etc/passwd")
    for place in (tree, tree / "sub", tree / "sub" / "file"):
        os.chown(place, uid, uid)
    with probed(world, uid, "auto", "auto", "none", directory=tree) as box:
        assert "Landlock" in box.how
        assert box.ask(f"open('{tree}/sub/file').read()") == "'inside'"
        assert box.ask(f"open('{tree}/sub/new','w').write('x')") == "1"
        for attempt in ("open('/etc/passwd')", f"open('{tree}/out')", "os.listdir('/')"):
            assert box.ask(attempt) == "EACCES", attempt
        assert box.ask("open('/tmp/fusewire-outside','w')") == "EACCES"
        assert box.ask(f"os.link('/etc/passwd', '{tree}/linked')") in ("EACCES", "EXDEV", "EPERM")
        assert box.ask(f"os.rename('{tree}/sub/new', '{tree.parent}/new')") in ("EACCES", "EXDEV")
        assert box.ask("socket.socket().connect((b'127.0.0.1', 9))") in ("EACCES", "ECONNREFUSED")
        known = box.ask("open('/proc/1/status').read()[:5]")
        assert known == ("'Name:'" if uid == 0 else "EACCES")  # who may act as others looks up their groups
        assert status(box.server, "NoNewPrivs") == "1"
        assert status(box.server, "CapBnd") == NOTHING


@BOTH
@pytest.mark.parametrize(
    "call",
    [
        "socket.socket()",
        "os.fork()",
        "os.execv('/bin/sh',['sh'])",
        "syscalls.mount(b'x',b'/',b'tmpfs',0)",
        "os.kill(1,0)",
    ],
)
def test_server_that_calls_what_it_need_not_is_ended_and_the_mount_with_it(world: World, uid: int, call: str) -> None:
    with probed(world, uid, "auto", "auto", "auto") as box:
        assert "seccomp kill" in box.how, "libseccomp is here"
        assert status(box.server, "Seccomp") == "2"
        assert "Errno 103" in box.ask(call) or "Errno 107" in box.ask(call)  # ECONNABORTED, ENOTCONN
        assert "SIGSYS" in box.end()


def test_mount_says_how_it_is_locked_in(world: World, small: Path) -> None:
    with world.mounted(small, "mnt") as found:
        row = world.listed()[0]
        assert row["server"] == found["server"] != row["pid"]
        assert row["sandbox"].startswith("sandbox: namespace")
        assert "seccomp kill" in row["sandbox"]
    for mode in ("namespace", "none"):
        with world.mounted("--sandbox", mode, "--landlock", "off", "--seccomp", "none", small, "mnt"):
            assert world.listed()[0]["sandbox"] == f"sandbox: {mode}; seccomp none"
            assert world.sh("cat mnt/hello.txt").stdout == HELLO


def test_mode_that_cannot_be_had_fails_and_leaves_nothing(world: World, small: Path) -> None:
    done = world.fw("mount", "--sandbox", "chroot", small, "mnt")
    assert done.returncode == 125
    assert "chroot(2) takes CAP_SYS_CHROOT, which this process does not have" in done.stderr
    assert (world.records(), os.listdir(world.home())) == ([], [])
    done = world.fw("run", "--sandbox", "chroot", f"{small}:/opt/env", "--", "true")
    assert done.returncode == 125
    assert "takes CAP_SYS_CHROOT" in done.stderr


@pytest.mark.parametrize("mode", ["auto", "namespace", "chroot", "none"])
def test_run_has_its_servers_locked_in(world: World, small: Path, mode: str) -> None:
    uid = 0 if mode == "chroot" else USER
    tree = world.home(uid) / "tree"
    tree.mkdir()
    (tree / "file").write_text(HELLO)
    os.chown(tree, uid, uid)
    os.chown(tree / "file", uid, uid)
    script = "cat /opt/env/hello.txt /opt/tree/file && echo new > /opt/tree/new && cat /opt/tree/new"
    done = world.fw(
        "run", "--sandbox", mode, f"{small}:/opt/env", f"{tree}:/opt/tree", "--", "sh", "-c", script, uid=uid
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO * 2 + "new\n", "")
    assert (tree / "new").read_text() == "new\n"


def test_run_ends_when_its_server_is_killed(world: World, small: Path) -> None:
    job = world.start("fusewire", "run", f"{small}:/opt/env", "--", "sh", "-c", "echo there; exec sleep 1000")
    assert job.line() == "there"
    servers = [pid for pid in world.pids() if status(pid, "Seccomp") == "2"]
    assert len(servers) == 1
    os.kill(servers[0], signal.SIGKILL)
    done = job.finish()
    assert done.returncode == 125
    assert "the server of the mounts has died (killed by SIGKILL)" in done.stderr


@pytest.mark.parametrize("who", ["pid", "server"])
def test_killed_holder_takes_the_server_along_and_a_killed_server_the_mount(
    world: World, small: Path, who: str
) -> None:
    found = world.mount(small, "mnt")
    os.kill(found[who], signal.SIGKILL)
    assert ends(found["server"])
    assert ends(found["pid"])
    if who == "pid":
        assert world.fw("umount", "mnt").returncode == 0
    assert world.records() == []
    assert os.listdir(world.home()) == []


def test_server_that_hangs_is_told_from_one_that_answers(world: World, small: Path) -> None:
    found = world.mount(small, "mnt")
    os.kill(found["server"], signal.SIGSTOP)
    assert [row["state"] for row in world.listed()] == ["no answer"]
    assert world.fw("umount", "mnt").returncode == 0
    assert ends(found["server"], 0.0)
    assert world.records() == []


def test_without_libseccomp_a_mount_says_so_in_its_record(world: World, small: Path) -> None:
    (world.home() / "hide.py").write_text(
        "import ctypes, sys\n"
        "real = ctypes.CDLL.__init__\n"
        "def init(self, name=None, *rest, **more):\n"
        "    if name and 'seccomp' in name: raise OSError('not here')\n"
        "    real(self, name, *rest, **more)\n"
        "ctypes.CDLL.__init__ = init\n"
        "from fusewire import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    python = world.words()[1]
    done = world.do(*python, str(world.home() / "hide.py"), "mount", str(small), "mnt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "seccomp none (the system calls cannot be filtered without libseccomp" in world.listed()[0]["sandbox"]
    assert world.fw("umount", "mnt").returncode == 0
    done = world.do(*python, str(world.home() / "hide.py"), "mount", "--seccomp", "kill", str(small), "mnt")
    assert done.returncode == 125
    assert "libseccomp2" in done.stderr
    (world.home() / "hide.py").unlink()
    assert os.listdir(world.home()) == []
