"""`fusewire share` locked in: served from inside each mode, looked at from outside, ended, killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import daemons
import rootless
from fusewire.testing.guest import FakeGuest
from fusewire.testing.replies import body_of
from fusewire.wire import abi

pytestmark = pytest.mark.skipif(bool(daemons.missing("fusewire")), reason=daemons.missing("fusewire") or "-")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a server that others of its user may not look into")
PATIENCE = 20.0


class Locked:
    """A share in a sandbox, the process that waits for it, and the one that serves."""

    def __init__(self, process: subprocess.Popen[str], socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.said: list[str] = []
        while not self.said or " is shared at " not in self.said[-1]:
            assert process.stderr is not None
            assert select.select([process.stderr], [], [], PATIENCE)[0], self.said
            line = process.stderr.readline()
            assert line, self.said
            self.said.append(line.strip())

    @property
    def server(self) -> int:
        found = self.process.pid
        while children := Path(f"/proc/{found}/task/{found}/children").read_text().split():
            found = int(children[0])
        return found

    def status(self, field: str) -> str:
        for line in Path(f"/proc/{self.server}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.strip()
        raise AssertionError(field)


@contextmanager
def locked(source: Path, socket: Path, *options: str, words: tuple[str, ...] = ()) -> Iterator[Locked]:
    command = [*(words or (sys.executable, "-W", "error")), "-m", "fusewire", "share", str(source)]
    process = subprocess.Popen(
        [*command, "--socket-path", str(socket), *options], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        yield Locked(process, socket)
    finally:
        process.kill()
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:  # somebody below it lives on and has its standard error: not this failure's
            process.stderr.close()
            process.wait()
            raise


@pytest.fixture
def share(tmp_path: Path) -> Path:
    place = tmp_path / "share"
    place.mkdir()
    (place / "hello.txt").write_bytes(b"hello world\n")
    os.symlink("/etc/passwd", place / "outside")
    return place


def use(socket: Path) -> None:
    """Everything that a guest does in passing, some of it wrong."""
    with FakeGuest.connect(str(socket)) as guest:
        guest.init()
        assert guest.read_file(b"hello.txt") == b"hello world\n"
        entry, fh, _ = guest.create(1, b"new", os.O_RDWR, 0o644)
        data = os.urandom(300_000)
        assert guest.write(entry.nodeid, fh, 0, data) == len(data)
        assert guest.read(entry.nodeid, fh, 0, len(data)) == data
        guest.setxattr(entry.nodeid, b"user.x", b"value")
        guest.rename(1, b"new", 1, b"moved")
        with pytest.raises(FileNotFoundError):
            guest.lookup(1, b"new")
        assert guest.readlink(guest.lookup(1, b"outside").nodeid) == b"/etc/passwd"
        guest.call("setlk", entry.nodeid, fh, 1, 0, 9, 1, 1, 0)
        other, _ = guest.open(entry.nodeid, os.O_RDWR)
        waiting = guest.start(abi.FUSE_SETLKW, entry.nodeid, body_of("setlkw", other, 2, 0, 9, 1, 1, 0))
        guest.call("setlk", entry.nodeid, fh, 1, 0, 9, 2, 1, 0)
        guest.finish(waiting)
        guest.release(entry.nodeid, other)
        guest.release(entry.nodeid, fh)
        guest.unlink(1, b"moved")
        guest.reboot()
        guest.init()
        assert guest.read_file(b"hello.txt") == b"hello world\n"


MODES = [
    ("--sandbox=auto",),
    ("--sandbox=namespace", "--landlock=off"),
    ("--sandbox=chroot",),
    ("--sandbox=chroot", "--landlock=off"),
    ("--sandbox=none",),
    ("--sandbox=none", "--landlock=off"),
]


@as_root
@pytest.mark.parametrize("options", MODES, ids=" ".join)
def test_a_guest_is_served_from_inside(share: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    socket = tmp_path / "s"
    with locked(share, socket, *options) as found:
        for _ in range(2):
            use(socket)
        assert found.status("Seccomp") == "2"
        assert found.status("NoNewPrivs") == "1"
        assert int(found.status("CapEff"), 16) == 0x880000DB
        assert int(found.status("CapBnd"), 16) == 0
        assert found.status("Groups") == ""
        mode = options[0].partition("=")[2]
        root = os.readlink(f"/proc/{found.server}/root")
        if mode in ("auto", "namespace"):
            mounts = Path(f"/proc/{found.server}/mountinfo").read_text().splitlines()
            assert mounts[0].split()[4] == "/"
            for kind in ("mnt", "pid", "net"):
                assert os.readlink(f"/proc/{found.server}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        else:
            assert root == (str(share) if mode == "chroot" else "/")
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(PATIENCE) == 0
    assert sorted(os.listdir(tmp_path)) == ["share"]


def test_an_ordinary_user_is_locked_in_as_far_as_it_goes(share: Path) -> None:
    home = Path(rootless.rootless_home())
    (home / "served").mkdir(exist_ok=True)
    (home / "served" / "hello.txt").write_bytes(b"hello world\n")
    try:
        with locked(home / "served", home / "s", words=tuple(rootless.rootless_python())) as found:
            assert found.said[0].startswith("fusewire: sandbox: "), found.said
            with FakeGuest.connect(str(home / "s")) as guest:
                guest.init()
                assert guest.read_file(b"hello.txt") == b"hello world\n"
            found.process.send_signal(signal.SIGTERM)
            assert found.process.wait(PATIENCE) == 0
    finally:
        (home / "served" / "hello.txt").unlink()
        (home / "served").rmdir()
    assert not {"s", "s.pid"} & set(os.listdir(home))


@as_root
def test_the_server_dies_with_the_process_that_waits_for_it(share: Path, tmp_path: Path) -> None:
    with locked(share, tmp_path / "s") as found:
        watch = os.pidfd_open(found.server)
        try:
            found.process.kill()
            assert select.select([watch], [], [], PATIENCE)[0]
        finally:
            os.close(watch)
    with locked(share, tmp_path / "s") as again:  # what it has left is stale
        use(again.socket)


@as_root
def test_a_server_that_is_killed_leaves_nothing_behind(share: Path, tmp_path: Path) -> None:
    with locked(share, tmp_path / "s") as found:
        os.kill(found.server, signal.SIGKILL)
        assert found.process.wait(PATIENCE) == 128 + signal.SIGKILL
    assert os.listdir(tmp_path) == ["share"]


@as_root
def test_a_daemon_is_locked_in_too(share: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "fusewire", "share", str(share), "--daemonize", "--json"]
    done = subprocess.run(
        [*command, "--socket-path", str(tmp_path / "s")], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    pid = json.loads(done.stdout)["pid"]
    watch = os.pidfd_open(pid)
    try:
        use(tmp_path / "s")
    finally:
        signal.pidfd_send_signal(watch, signal.SIGTERM)
        assert select.select([watch], [], [], PATIENCE)[0]
        os.close(watch)
    assert os.listdir(tmp_path) == ["share"]


@as_root
def test_an_image_is_served_by_who_can_open_nothing_else(tmp_path: Path) -> None:
    image = Path(__file__).parents[1] / "src" / "fusewire" / "data"
    found_image = next(path for path in image.iterdir() if path.suffix in (".sqsh", ".squashfs"))
    with locked(found_image, tmp_path / "s") as found:
        for _ in range(2):
            with FakeGuest.connect(str(tmp_path / "s")) as guest:
                guest.init()
                assert guest.getattr(1)[0][9] >> 12 == 4
        assert int(found.status("CapEff"), 16) == 0
        assert os.listdir(f"/proc/{found.server}/root") == []
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(PATIENCE) == 0


def test_a_mode_that_cannot_be_had_says_what_can(share: Path, tmp_path: Path) -> None:
    words = rootless.rootless_python()
    home = Path(rootless.rootless_home())
    command = [*words, "-m", "fusewire", "share", str(home), "--socket-path", str(home / "s"), "--sandbox=chroot"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "chroot" in done.stderr and "--sandbox" in done.stderr
    assert not (home / "s").exists()
