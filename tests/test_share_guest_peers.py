"""Real guests where another program's habits count: C virtiofsd beside us, its command line, QEMU's arguments, users.

One guest has the same directory's worth of operations done by C virtiofsd, by `fusewire share`, and by
`fusewire-virtiofsd` with C virtiofsd's words and with the Rust one's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daemons import missing
from rootless import NOBODY, rootless_home, rootless_python
from vm import daemons
from vm.daemons import Daemon
from vm.rig import Guest, Share, need

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("guest_operations.py")
OPERATIONS = int(os.environ.get("FUSEWIRE_GUEST_OPERATIONS", "800"))
PATIENCE = 60.0 + OPERATIONS / 20
SEED = 7

# What C virtiofsd does not have, by the operation of the script: it says ENOTSUP. None of these changes anything.
LACKING = {"tmpfile": "it knows no FUSE_TMPFILE, which is younger (Linux 6.1) than itself"}

# Who is compared with C virtiofsd, by the tag.
OURS = ("share", "like-c", "like-rust")


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What the script has printed on each daemon's share, by the tag."""
    need()
    if reason := missing("virtiofsd"):  # where its name leads to the Rust one, there is none to compare with
        pytest.skip(reason)
    places = {tag: tmp_path_factory.mktemp(tag) for tag in ("c", *OURS)}
    with ExitStack() as stack:
        made = {
            "c": daemons.virtiofsd(places["c"], "xattr", "posix_lock", "flock", "modcaps=+sys_admin"),
            "share": daemons.fusewire(places["share"]),
            "like-c": daemons.fusewire_virtiofsd(
                "-o", f"source={places['like-c']},sandbox=chroot,xattr,posix_lock,flock,modcaps=+sys_admin"
            ),
            "like-rust": daemons.fusewire_virtiofsd(
                f"--shared-dir={places['like-rust']}",
                "--sandbox=none",
                "--xattr",
                "--cache=auto",
                "--log-level=warn",
                "--modcaps=+sys_admin",
            ),
        }
        shares = [Share(stack.enter_context(daemon).path, tag) for tag, daemon in made.items()]
        with Guest(shares, put=[(SCRIPT, "/rig/operations.py")]) as guest:
            found = {}
            for tag in made:
                guest.check(f"mkdir -p /mnt/{tag} && mount -t virtiofs {tag} /mnt/{tag}")
                said = guest.check(f"python3 /rig/operations.py /mnt/{tag} {SEED} {OPERATIONS}", PATIENCE)
                found[tag] = said.decode().splitlines()
                guest.check(f"umount /mnt/{tag}")
        yield found
        for tag in OURS:
            assert "Traceback" not in made[tag].said()


@pytest.mark.parametrize("tag", OURS)
def test_script_says_the_same_as_on_c_virtiofsd(operations: dict[str, list[str]], tag: str) -> None:
    ours, theirs = operations[tag], operations["c"]
    assert len(ours) == len(theirs) > OPERATIONS
    differences = [pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1]]
    assert [pair for pair in differences if not _lacks(pair[0])] == []
    assert {pair[0].split()[1] for pair in differences} == set(LACKING)


def _lacks(line: str) -> bool:
    """What C virtiofsd has said is that it lacks something of LACKING."""
    _, operation, outcome = line.split(maxsplit=2)
    return operation in LACKING and outcome == "ENOTSUP"


def test_printed_arguments_boot_a_guest(tmp_path: Path) -> None:
    need()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "greeting").write_bytes(b"hello\n")
    with daemons.fusewire(tmp_path / "shared") as daemon:
        words = [sys.executable, "-m", "fusewire", "share", str(tmp_path / "shared"), f"--socket-path={daemon.path}"]
        told = subprocess.run([*words, "--tag=pasted", "--print-qemu", "--json"], capture_output=True, check=True)
        with Guest(python=False, memory="", arguments=json.loads(told.stdout)) as guest:
            assert guest.check("mount -t virtiofs pasted /mnt && cat /mnt/greeting") == b"hello\n"
            guest.check("umount /mnt")


def test_daemon_of_an_unprivileged_user_serves_what_he_may() -> None:
    """Without privileges and without new ones; whoever writes in the guest, the files are his."""
    need()
    if os.geteuid() != 0:
        pytest.skip("needs root: the daemon becomes a user without any privilege")
    shared = Path(rootless_home(NOBODY)) / "shared"
    shared.mkdir()
    (shared / "secret").write_bytes(b"of root\n")
    (shared / "secret").chmod(0o600)
    (shared / "greeting").write_bytes(b"hello\n")
    os.chown(shared, NOBODY, NOBODY)
    words = [*rootless_python(NOBODY), "-m", "fusewire", "share", str(shared), "--fd={fd}"]
    with Daemon(words) as daemon, Guest([Share(daemon.path)], python=False) as guest:
        guest.check("mount -t virtiofs fs /mnt")
        assert guest.check("cat /mnt/greeting") == b"hello\n"
        refused = guest.run("cat /mnt/secret")
        assert (refused.status, refused.stdout) == (1, b"")
        assert b"Permission denied" in refused.stderr
        script = "cd /mnt && mkdir new && echo mine >new/file && mv new/file new/other && chmod 600 new/other"
        guest.check(f"{script} && ln -s other new/link && dd if=/dev/zero of=big bs=1M count=8 2>&-; sync")
        made = shared / "new" / "other"
        assert (made.read_bytes(), made.stat().st_uid, made.stat().st_mode & 0o777) == (b"mine\n", NOBODY, 0o600)
        assert (shared / "big").stat().st_size == 8 << 20
        assert b"Operation not permitted" in guest.run("chown 1000 /mnt/new/other").stderr
        guest.check("rm -r /mnt/new /mnt/big && umount /mnt")
        assert sorted(os.listdir(shared)) == ["greeting", "secret"]
        assert "Traceback" not in daemon.said()


def test_command_line_of_virtiofsd_listens_on_a_path_and_ends_with_the_guest(tmp_path: Path) -> None:
    need()
    (tmp_path / "greeting").write_bytes(b"hello\n")
    path = Path(rootless_home(os.geteuid())) / "socket"
    words = [f"--socket-path={path}", f"--shared-dir={tmp_path}", "--sandbox=none", "--thread-pool-size=4"]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "fusewire.cli.virtiofsd", *words], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert any("is shared at" in line for line in iter(process.stderr.readline, ""))
            with Guest([Share(path)], python=False) as guest:
                assert guest.check("mount -t virtiofs fs /mnt && cat /mnt/greeting") == b"hello\n"
            assert process.wait(10) == 0
        finally:
            process.kill()
    assert not path.exists()
