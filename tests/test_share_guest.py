"""Real guests on `fusewire share`: their lives and deaths, the daemon's, locks, and an image.

What a share does is told by the conformance list (test_share_guest_list.py); here is what happens around it. Most of
it is done in one guest with three shares: a directory, another one that is unplugged and plugged in, and an image.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import squashfs_images
from vm.daemons import Daemon, fusewire
from vm.rig import Guest, Share, need

pytestmark = pytest.mark.slow

MIB = 1 << 20
PATIENCE = 60.0
MOUNT = "mount -t virtiofs"
LOOK = """
import pathlib, pickle, sys
sys.path.insert(0, "/rig")
import squashfs_images
sys.stdout.buffer.write(pickle.dumps(squashfs_images.snapshot(pathlib.Path("/mnt/image"))))
"""
# Says what it has, keeps it, and says nothing more.
HOLD = """
import fcntl, os, struct, sys
fd = os.open("/mnt/fs/locked", os.O_RDWR)
kind, wait = sys.argv[1:]
if kind == "flock":
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait == "wait" else fcntl.LOCK_NB))
else:
    fcntl.lockf(fd, fcntl.LOCK_EX | (0 if wait == "wait" else fcntl.LOCK_NB))
print("locked", flush=True)
if wait != "wait":
    open("/run/held").read()
os.close(fd)
print("released", flush=True)
"""
# Six processes that wait for a lock, each in its turn.
WAIT = """
import fcntl, os, sys

def wait():
    fd = os.open("/mnt/fs/locked", os.O_RDWR)
    os.write(writer, b"+")
    (fcntl.flock if sys.argv[1] == "flock" else fcntl.lockf)(fd, fcntl.LOCK_EX)
    print("locked", flush=True)
    os._exit(0)

def sleeps(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "SD"

reader, writer = os.pipe()
pids = []
for number in range(6):
    pids.append(os.fork())
    if not pids[-1]:
        wait()
    os.read(reader, 1)
    while not sleeps(pids[-1]):
        os.sched_yield()
print("all wait", flush=True)
for pid in pids:
    os.waitpid(pid, 0)
print("all are gone", flush=True)
"""
KINDS: dict[str, Callable[[int, int], None]] = {"flock": fcntl.flock, "record": fcntl.lockf}


class Sharing:
    """A guest, and what is shared with it as "fs", "other" and "image"."""

    def __init__(self, guest: Guest, daemons: list[Daemon], directories: list[Path]) -> None:
        self.guest = guest
        self.daemon, self.other_daemon, _ = daemons
        self.directory, self.other = directories

    def mount(self) -> None:
        """Mount "fs", which has one file; an earlier test may have failed in the middle."""
        (self.directory / "greeting").write_bytes(b"hello\n")
        self.guest.check(f"umount /mnt/fs 2>&-; {MOUNT} fs /mnt/fs")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """An image with one of everything, but no large directory: that takes an emulated machine ten seconds."""
    path = tmp_path_factory.mktemp("image") / "image.sqsh"
    return squashfs_images.mksquashfs(tree, path, "-comp", "gzip", "-e", "three thousand")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Iterator[Sharing]:
    need()
    with ExitStack() as stack:
        directories = [tmp_path_factory.mktemp(name) for name in ("fs", "other")]
        daemons = [stack.enter_context(fusewire(source)) for source in (*directories, image)]
        shares = [Share(daemon.path, tag) for daemon, tag in zip(daemons, ("fs", "other", "image"), strict=True)]
        put = [
            (Path(squashfs_images.__file__), "/rig/squashfs_images.py"),
            (_script(tmp_path_factory, HOLD), "/rig/hold.py"),
            (_script(tmp_path_factory, WAIT), "/rig/wait.py"),
            (_script(tmp_path_factory, LOOK), "/rig/look.py"),
        ]
        guest = stack.enter_context(Guest(shares, put=put))
        guest.check("mkdir /mnt/fs /mnt/other /mnt/image")
        yield Sharing(guest, daemons, directories)


def _script(factory: pytest.TempPathFactory, text: str) -> Path:
    path = factory.mktemp("script") / "script.py"
    path.write_text(text)
    return path


@pytest.fixture
def sharing(three: Sharing) -> Iterator[Sharing]:
    """With "fs" mounted."""
    three.mount()
    yield three
    three.guest.check("umount /mnt/fs")


def digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


# Data


def test_64_mib_are_the_same_on_both_sides(sharing: Sharing) -> None:
    guest, directory = sharing.guest, sharing.directory
    told = guest.check("dd if=/dev/urandom of=/mnt/fs/big bs=1M count=64 2>&- && sha256sum /mnt/fs/big", PATIENCE)
    assert (directory / "big").stat().st_size == 64 * MIB
    assert digest(directory / "big") == told.split()[0]
    (directory / "back").write_bytes(os.urandom(64 * MIB))
    assert guest.check("sha256sum </mnt/fs/back", PATIENCE).split()[0] == digest(directory / "back")
    guest.check("rm /mnt/fs/big /mnt/fs/back")
    assert os.listdir(directory) == ["greeting"]


def test_changes_of_the_host_are_seen_by_the_guest(sharing: Sharing) -> None:
    guest, directory = sharing.guest, sharing.directory
    assert guest.check("cat /mnt/fs/greeting") == b"hello\n"
    (directory / "greeting").write_bytes(b"something longer\n")
    (directory / "new").write_bytes(b"")
    seen = "for i in $(seq 200); do [ -e /mnt/fs/new ] && grep -q longer /mnt/fs/greeting && break; usleep 20000; done"
    assert (
        guest.check(f"{seen}; cat /mnt/fs/greeting; ls /mnt/fs; rm /mnt/fs/new") == b"something longer\ngreeting\nnew\n"
    )


# An image


def test_image_is_what_the_kernels_own_squashfs_shows(three: Sharing, image: Path, tmp_path: Path) -> None:
    squashfs_images.need_root()
    three.guest.check(f"{MOUNT} image /mnt/image")
    seen = pickle.loads(three.guest.check("python3 /rig/look.py", PATIENCE))
    refused = three.guest.run("echo >/mnt/image/new")
    three.guest.check("umount /mnt/image")
    with squashfs_images.kernel_mount(image, tmp_path) as mounted:
        expected = squashfs_images.snapshot(mounted)
    assert len(seen) > 30
    assert {path: (seen.get(path), expected[path]) for path in expected if seen.get(path) != expected[path]} == {}
    assert set(seen) == set(expected)
    assert b"Read-only file system" in refused.stderr


# Lives and deaths


def test_guest_is_reset_with_everything_open_and_finds_all_of_it_again(three: Sharing) -> None:
    guest, directory = three.guest, three.directory
    use = "cat /mnt/fs/greeting && ls /mnt/fs"
    (directory / "locked").write_bytes(b"")
    three.mount()
    assert guest.check(use) == b"hello\ngreeting\nlocked\n"
    before = _kinds(three.daemon)
    script = """
rm -f /run/held; mkfifo /run/held; mkdir /mnt/fs/directory
for i in $(seq 40); do echo $i >/mnt/fs/file$i; sleep 1000 <>/mnt/fs/file$i & done >/dev/null
(cd /mnt/fs/directory && exec sleep 1000) & rm /mnt/fs/file7
for kind in record flock; do python3 /rig/hold.py $kind now >/run/$kind 2>&1 & done
for kind in record flock; do until grep . /run/$kind; do usleep 20000; done; done
dd if=/dev/zero of=/mnt/fs/unfinished bs=1M count=64 2>/dev/null &
until [ -s /mnt/fs/unfinished ]; do usleep 1000; done
"""
    assert guest.check(script, PATIENCE) == b"locked\nlocked\n"
    assert len(three.daemon.descriptors()) > len(before) + 40
    guest.reboot()
    for path in directory.glob("file*"):
        path.unlink()
    (directory / "unfinished").unlink()
    (directory / "directory").rmdir()
    guest.check("mkdir -p /mnt/fs /mnt/other /mnt/image")
    three.mount()
    assert guest.check(use) == b"hello\ngreeting\nlocked\n"
    assert _kinds(three.daemon) == before
    with (directory / "locked").open("r+b") as file:  # the guest's locks went with it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    guest.check("umount /mnt/fs")
    (directory / "locked").unlink()


def _kinds(daemon: Daemon) -> list[str]:
    """What a daemon has open, without the numbers of sockets."""
    return sorted(name.partition(":[")[0] if name.startswith("socket") else name for name in daemon.descriptors())


def test_driver_is_unloaded_and_loaded(three: Sharing) -> None:
    three.mount()
    reload = three.guest.reloading()
    assert three.guest.check(f"umount /mnt/fs && {reload} && {MOUNT} fs /mnt/fs && cat /mnt/fs/greeting") == b"hello\n"
    three.guest.check("umount /mnt/fs")


def test_device_is_taken_from_its_driver_and_given_back(three: Sharing) -> None:
    script = """
cd /sys/bus/virtio/drivers/virtiofs
for round in 1 2 3; do
  for device in virtio*; do echo $device >unbind || exit 1; echo $device >bind || exit 1; done
  mount -t virtiofs fs /mnt/fs && cat /mnt/fs/greeting && umount /mnt/fs || exit 1
done
"""
    three.mount()
    three.guest.check("umount /mnt/fs")
    assert three.guest.check(script) == b"hello\n" * 3


def test_device_is_taken_from_under_a_mount(three: Sharing) -> None:
    """Whatever is mounted then answers that it is not connected, and can be unmounted and mounted again."""
    three.mount()
    script = """
cd /sys/bus/virtio/drivers/virtiofs
exec 9</mnt/fs/greeting; all=$(echo virtio*)
for device in $all; do echo $device >unbind; done
cat /mnt/fs/greeting 2>&1; exec 9<&-; umount /mnt/fs
for device in $all; do echo $device >bind; done
mount -t virtiofs fs /mnt/fs && cat /mnt/fs/greeting && umount /mnt/fs
"""
    assert b"not connected\nhello\n" in three.guest.check(script)


def test_daemon_that_was_killed_is_replaced_under_a_running_guest(three: Sharing) -> None:
    guest = three.guest
    (three.other / "greeting").write_bytes(b"first\n")
    assert guest.check(f"{MOUNT} other /mnt/other && cat /mnt/other/greeting") == b"first\n"
    three.other_daemon.kill()
    guest.unplug(1)
    assert guest.run("ls /mnt/other/x").status != 0
    guest.check("umount /mnt/other")
    (three.other / "greeting").write_bytes(b"second\n")
    with fusewire(three.other) as another:
        guest.shares[1] = Share(another.path, "again")
        guest.plug(1)
        assert guest.check(f"{_until(f'{MOUNT} again /mnt/other 2>&-')}; cat /mnt/other/greeting") == b"second\n"
        guest.check("umount /mnt/other")
        guest.unplug(1)
        assert another.process.poll() is None  # it waits for the next one
        guest.plug(1)
        assert guest.check(f"{_until(f'{MOUNT} again /mnt/other 2>&-')}; cat /mnt/other/greeting") == b"second\n"
        guest.check("umount /mnt/other")
        guest.unplug(1)
        another.process.terminate()
        assert another.process.wait(10) == 0


def _until(command: str) -> str:
    return f"for i in $(seq 400); do {command} && break; usleep 20000; done"


def test_killed_guest_is_followed_by_another_at_the_same_daemon(tmp_path: Path) -> None:
    need()
    (tmp_path / "file").write_bytes(b"data\n")
    with fusewire(tmp_path) as daemon:
        with Guest([Share(daemon.path)], python=False) as guest:
            guest.check(f"{MOUNT} fs /mnt && sleep 1000 </mnt/file & {_until('[ -e /mnt/file ]')}")
            deadline = time.monotonic() + PATIENCE
            first: list[str] = []
            while not any(path.endswith("/file") for path in first):
                assert time.monotonic() < deadline
                first = daemon.descriptors()
            os.kill(guest.pid, signal.SIGKILL)
        with Guest([Share(daemon.path)], python=False) as guest:
            # The one before has gone once this one is answered.
            assert guest.check(f"{MOUNT} fs /mnt && cat /mnt/file") == b"data\n"
            assert len(daemon.descriptors()) <= len(first)
            guest.check("echo more >>/mnt/file; umount /mnt")
        assert (tmp_path / "file").read_bytes() == b"data\nmore\n"
        assert daemon.process.poll() is None
        assert "Traceback" not in daemon.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_daemon_ends_cleanly_while_the_guest_works(tmp_path: Path, number: signal.Signals) -> None:
    need()
    with fusewire(tmp_path) as daemon, Guest([Share(daemon.path)], python=False) as guest:
        guest.check(f"{MOUNT} fs /mnt")
        guest.check(
            "(while :; do dd if=/dev/zero of=/mnt/big bs=64k count=100; rm /mnt/big; done) >/dev/null 2>&1 & "
            f"(while :; do ls -l /mnt; done) >/dev/null 2>&1 & {_until('[ -e /mnt/big ]')}"
        )
        daemon.process.send_signal(number)
        assert daemon.process.wait(10) == 0
        assert "Traceback" not in daemon.said()
        assert guest.qmp("query-status")["running"] is True
        guest.close(kill=True)


# Locks


@contextmanager
def held(sharing: Sharing, kind: str) -> Iterator[None]:
    """The guest has a lock on "locked"."""
    script = f"""
rm -f /run/held /run/said; mkfifo /run/held; python3 /rig/hold.py {kind} now >/run/said 2>&1 &
{_until("grep -q . /run/said")}; cat /run/said
"""
    assert sharing.guest.check(script) == b"locked\n"
    try:
        yield
    finally:
        sharing.guest.check(f"echo >/run/held; {_until('grep -q released /run/said')}")


@pytest.mark.parametrize("kind", KINDS)
def test_lock_of_the_guest_keeps_the_host_out(sharing: Sharing, kind: str) -> None:
    path = sharing.directory / "locked"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        with held(sharing, kind), pytest.raises(BlockingIOError):
            KINDS[kind](file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        KINDS[kind](file.fileno(), fcntl.LOCK_EX)  # it waits: the guest's RELEASE comes behind its close(2)


@pytest.mark.parametrize("kind", KINDS)
def test_lock_of_the_host_keeps_the_guest_out(sharing: Sharing, kind: str) -> None:
    path = sharing.directory / "locked"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        KINDS[kind](file.fileno(), fcntl.LOCK_EX)
        refused = sharing.guest.run(f"python3 /rig/hold.py {kind} now")
        assert refused.status == 1
        assert b"BlockingIOError: [Errno 11]" in refused.stderr
        KINDS[kind](file.fileno(), fcntl.LOCK_UN)
        with held(sharing, kind):
            pass


def test_holder_in_the_host_is_described_to_the_guest(sharing: Sharing) -> None:
    path = sharing.directory / "locked"
    path.write_bytes(bytes(100))
    ask = (
        "import fcntl, os, struct; fd = os.open('/mnt/fs/locked', os.O_RDWR); "
        "print(struct.unpack('hhqqi4x', fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack('hhqqi4x', 1, 0, 0, 0, 0)))[:4])"
    )
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 30, 20)
        assert sharing.guest.check(f'python3 -c "{ask}"') == f"{(fcntl.F_WRLCK, 0, 20, 30)}\n".encode()


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_for_locks_holds_up_nothing_else_of_the_guest(sharing: Sharing, kind: str) -> None:
    """More wait than there are threads for the one queue that this guest has."""
    path = sharing.directory / "locked"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        KINDS[kind](file.fileno(), fcntl.LOCK_EX)
        wait = f"rm -f /run/said; python3 /rig/wait.py {kind} >/run/said 2>&1 & {_until('grep -q . /run/said')}"
        work = "ls /mnt/fs; cat /mnt/fs/greeting; echo new >/mnt/fs/new; cat /mnt/fs/new; rm /mnt/fs/new; cat /run/said"
        assert sharing.guest.check(f"{wait}; {work}") == b"greeting\nlocked\nhello\nnew\nall wait\n"
        KINDS[kind](file.fileno(), fcntl.LOCK_UN)
    said = sharing.guest.check(f"{_until('grep -q gone /run/said')}; cat /run/said")
    assert said == b"all wait\n" + b"locked\n" * 6 + b"all are gone\n"


def test_two_guests_keep_one_another_out(sharing: Sharing, tmp_path: Path) -> None:
    (sharing.directory / "locked").write_bytes(b"")
    (tmp_path / "hold.py").write_text(HOLD)
    with (
        fusewire(sharing.directory) as daemon,
        Guest([Share(daemon.path)], put=[(tmp_path / "hold.py", "/rig/hold.py")]) as other,
    ):
        other.check(f"mkdir /mnt/fs && {MOUNT} fs /mnt/fs")
        for kind in KINDS:
            with held(sharing, kind):
                assert b"BlockingIOError" in other.run(f"python3 /rig/hold.py {kind} now").stderr
                other.check(f"python3 /rig/hold.py {kind} wait >/run/{kind} 2>&1 &")
            assert other.check(f"{_until(f'grep -q released /run/{kind}')}; cat /run/{kind}") == b"locked\nreleased\n"
        other.check("umount /mnt/fs")
