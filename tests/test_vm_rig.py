"""The rig that boots guests (tests/vm): what scripts do and say there, disks, reboots, shares, and daemons that die.

The daemon is QEMU's own, C virtiofsd, so that these tell what the rig does and not what we do. One guest serves nearly
all of them, and the last leaves it without its daemon.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from vm import behaviours, images
from vm.daemons import Daemon, virtiofsd, virtiofsd_missing
from vm.rig import Disk, Guest, RigError, Share, need

pytestmark = pytest.mark.slow

MOUNT = "mount -t virtiofs"


class Sharing(NamedTuple):
    """What is shared with the guest as "fs" and as "other", and by whom."""

    directory: Path
    other: Path
    daemon: Daemon
    other_daemon: Daemon


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing | None]:
    need()
    if virtiofsd_missing():
        yield None
        return
    directory, other = (tmp_path_factory.mktemp(name) for name in ("fs", "other"))
    with virtiofsd(directory, "cache=auto") as daemon, virtiofsd(other) as other_daemon:
        yield Sharing(directory, other, daemon, other_daemon)


@pytest.fixture(scope="module")
def guest(shares: Sharing | None) -> Iterator[Guest]:
    with ExitStack() as stack:
        if shares:
            devices = [
                Share(shares.daemon.path),
                Share(shares.other_daemon.path, "other", properties={"event_idx": False}),
            ]
            yield stack.enter_context(behaviours.booted(devices))
        else:
            yield stack.enter_context(Guest())


@pytest.fixture
def sharing(shares: Sharing | None, guest: Guest) -> Iterator[Sharing]:
    if shares is None:
        pytest.skip(virtiofsd_missing())
    (shares.directory / "greeting").write_bytes(b"hello\n")
    guest.check(f"{MOUNT} fs /mnt")
    yield shares
    if shares.daemon.process.poll() is None:  # else it hangs
        guest.check("umount /mnt")


# Scripts


def test_script_gives_its_status_and_what_it_wrote_on_either_side(guest):
    result = guest.run("echo out; echo err >&2; exit 3")
    assert (result.status, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_script_killed_by_a_signal_gives_the_shells_status(guest):
    assert guest.run("kill -9 $$").status == 128 + signal.SIGKILL


def test_script_has_no_input_and_no_descriptors_of_the_rig(guest):
    assert guest.check("wc -c; ls /proc/self/fd").split() == [b"0", b"0", b"1", b"2", b"3"]  # 3: ls has the directory


def test_output_is_binary_and_of_any_length(guest):
    written = guest.check("dd if=/dev/urandom of=/tmp/noise bs=64k count=64 2>&-; sha256sum /tmp/noise")
    noise = guest.check("cat /tmp/noise; rm /tmp/noise")
    assert len(noise) == 4 << 20
    assert hashlib.sha256(noise).hexdigest().encode() == written.split()[0]
    assert guest.check(r"printf '\0\r\n\377\033'") == b"\0\r\n\xff\x1b"


def test_both_outputs_may_be_full_at_once(guest):
    guest.check("dd if=/dev/zero of=/tmp/zeros bs=1M count=1")
    result = guest.run("cat /tmp/zeros & cat /tmp/zeros >&2; wait")
    assert (len(result.stdout), len(result.stderr)) == (1 << 20, 1 << 20)


def test_check_raises_with_what_a_failing_script_said(guest):
    with pytest.raises(AssertionError, match="status 1 of 'cat /nowhere' in the guest: cat: can't open '/nowhere'"):
        guest.check("cat /nowhere")


def test_guest_has_this_machines_python_and_this_package(guest):
    told = guest.check("python3 -c 'import sys, fusewire; print(sys.version_info[:3], fusewire.__file__)'")
    here = subprocess.run([images.PYTHON, "-c", "import sys; print(sys.version_info[:3])"], capture_output=True)
    assert told.strip() == here.stdout.strip() + b" /fusewire/fusewire/__init__.py"


# QEMU and its end


def test_qemu_refuses_with_its_own_words(guest):
    assert guest.qmp("query-status")["running"] is True
    with pytest.raises(RigError, match="QEMU refuses device_del: Device 'no-such-device' not found"):
        guest.qmp("device_del", id="no-such-device")


def test_nothing_is_left_of_a_guest_but_what_is_on_its_disks(tmp_path, monkeypatch):
    need()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disk = images.blank_ext4(tmp_path / "image", 64 << 20)
    with Guest(disks=[Disk(disk, "data")], python=False) as guest:
        guest.check("mount /dev/disk/data /mnt && echo kept >/mnt/file")
        pid = guest.pid
    assert not os.path.exists(f"/proc/{pid}")
    assert os.listdir(tmp_path) == ["image"]
    debugfs = images.find_program("debugfs")
    assert debugfs is not None
    assert subprocess.run([debugfs, "-R", "cat /file", disk], capture_output=True).stdout == b"kept\n"


def test_qemu_ends_with_the_process_that_started_it(tmp_path):
    need()
    program = """
import sys
from vm.rig import Guest
Guest._ready = lambda self, begin: None  # nobody waits for the end of the boot
print(Guest(python=False).start().pid, flush=True)
sys.stdin.read()
"""
    here = Path(__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent / 'src'}", "TMPDIR": str(tmp_path)},
    ) as starter:
        assert starter.stdout is not None
        qemu = os.pidfd_open(int(starter.stdout.readline()))
        starter.kill()
    ended, _, _ = select.select([qemu], [], [], 10)
    os.close(qemu)
    assert ended


def test_qemu_that_does_not_start_says_why(tmp_path):
    need()
    with pytest.raises(RigError, match=r"Failed to connect to .*nobody"):
        Guest([Share(tmp_path / "nobody")], python=False).start()


# Shares


def test_file_of_64_mib_is_the_same_on_both_sides(guest, sharing):
    assert guest.check("cat /mnt/greeting") == b"hello\n"
    told = guest.check("dd if=/dev/urandom of=/mnt/big bs=1M count=64 2>&- && sha256sum /mnt/big", timeout=60)
    with (sharing.directory / "big").open("rb") as big:
        assert hashlib.file_digest(big, "sha256").hexdigest().encode() == told.split()[0]
        assert os.fstat(big.fileno()).st_size == 64 << 20


def test_driver_can_be_unloaded_and_loaded(guest, sharing):
    reload = guest.reloading()
    assert guest.check(f"umount /mnt && {reload} && {MOUNT} fs /mnt && cat /mnt/greeting") == b"hello\n"


def test_behaviours_are_compared_inside_the_guest(guest, sharing):
    names = ("rename_replaces_a_file", "tmpfile_has_no_name")
    found = behaviours.Behaviours(guest, names)
    found.check("/mnt", names[0])
    with pytest.raises(pytest.fail.Exception, match=r"tmpfile_has_no_name: .*Operation not supported"):
        found.check("/mnt", names[1])  # neither virtiofsd has O_TMPFILE


def test_share_is_unplugged_and_plugged_in_again_with_another_daemon(guest, sharing):
    (sharing.other / "file").write_bytes(b"shared\n")
    guest.check(f"mkdir /tmp/other && {MOUNT} other /tmp/other && cat /tmp/other/file && umount /tmp/other")
    guest.unplug(1)
    assert sharing.other_daemon.process.wait(10) == 0
    with virtiofsd(sharing.other) as another:
        guest.shares[1] = Share(another.path, "again")
        guest.plug(1)
        mount = f"for i in $(seq 200); do {MOUNT} again /tmp/other 2>&- && break; usleep 20000; done"
        assert guest.check(f"{mount}; cat /tmp/other/file; umount /tmp/other") == b"shared\n"
        guest.unplug(1)
        assert another.process.wait(10) == 0


def test_reset_finds_the_share_again_and_ends_what_hangs(guest, sharing):
    with pytest.raises(RigError, match=r"no end in time of 'echo before; sleep 100'\n--- out\nbefore"):
        guest.run("echo before; sleep 100", timeout=0.5)
    begin = time.monotonic()
    with pytest.raises(RigError, match="an earlier script still hangs"):
        guest.run("true")
    assert time.monotonic() - begin < 0.2
    guest.reboot()
    assert b" /mnt " not in guest.check("cat /proc/mounts")
    assert guest.check(f"{MOUNT} fs /mnt && cat /mnt/greeting") == b"hello\n"


def test_dead_daemon_is_a_timeout(guest, sharing):
    sharing.daemon.kill()
    with pytest.raises(RigError, match="no end in time of 'cat /mnt/greeting'"):
        guest.run("cat /mnt/greeting", timeout=0.5)
