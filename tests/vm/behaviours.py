"""The conformance list inside a guest: shares are compared with an ext4 filesystem that the guest has on a disk.

    with behaviours.booted([Share(daemon.path)]) as guest:
        guest.check("mkdir /mnt/list && mount -t virtiofs fs /mnt/list")
        found = Behaviours(guest)
        found.check("/mnt/list", "rename_replaces_a_file")

An emulated machine takes 20 to 50 s for the list on a share, and half as much for the oracle, which is asked once.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusewire.testing.conformance import BEHAVIOURS
from vm import images
from vm.rig import Disk, Guest, RigError, Share

ANSWER = Path(__file__).with_name("answer.py")
ORACLE = "/oracle/list"
TOGETHER = 16  # behaviours that are run at a time: each time costs 30 ms, and one behaviour at most 6 s
PATIENCE = 60.0  # seconds for those

# Linux sends no INTERRUPT over virtio-fs (virtio_fs.c: "TODO interrupts"), so who waits for a lock on the host can
# be neither interrupted nor killed: these hang, with any daemon that lets a guest wait.
UNINTERRUPTIBLE = frozenset(
    {
        "waiting_for_a_lock_is_interrupted",
        "killed_waiter_leaves_no_lock",
        "flock_that_waits_is_interrupted_or_killed",
    }
)

# What Linux in the guest cannot do on a share, whoever serves it, and the Linux that was first seen to do it.
_FAILS = {
    "description_locks_and_record_locks_meet": (None, "FUSE does not tell which locks are those of open files"),
    "time_of_birth_stays": ((6, 6), "Linux sends no STATX before 6.6"),
    "operations_move_the_times_that_they_should": (
        (6, 12),
        "FUSE's FALLOCATE moves times when a hole is punched, and ext4 of Linux 6.1 does not",
    ),
    "setgid_of_a_new_file_is_for_members_of_its_group": (
        (6, 3),
        "Linux does not send the groups of who makes a file before 6.3 (FUSE_CREATE_SUPP_GROUP)",
    ),
}
FAILS_EVERYWHERE = {name: why for name, (since, why) in _FAILS.items() if since is None or images.release() < since}

# A process that answers, and one that holds both pipes open. When the first has ended there is an answer all the same.
START = f"""
mkfifo /run/ask /run/answers
sleep 100000 0<>/run/ask 1<>/run/answers 2>&1 &
(python3 /rig/answer.py {ORACLE}; yes '["", "", ""]') </run/ask >/run/answers 2>/run/said &
"""


@contextmanager
def booted(shares: Sequence[Share], **how: Any) -> Iterator[Guest]:
    """A guest with the list's program and its oracle. `how`: as Guest has it."""
    directory = Path(tempfile.mkdtemp(prefix="fusewire-vm-"))
    try:
        disks = [Disk(images.blank_ext4(directory / "oracle", 1 << 30), "oracle"), *how.pop("disks", ())]
        put = [(ANSWER, "/rig/answer.py"), *how.pop("put", ())]
        with Guest(shares, disks=disks, put=put, **how) as guest:
            guest.check(f"mount /dev/disk/oracle /oracle && mkdir {ORACLE} && {START}")
            yield guest
    finally:
        shutil.rmtree(directory)


class Behaviours:
    """Runs behaviours in a guest of `booted`, some ahead, and keeps what was found.

    `names`: those that will be asked for; others would cost time for nothing. `patience`: seconds for TOGETHER of them.
    After one that hangs the guest is of no use until it is rebooted, and then START has to be run again.
    """

    def __init__(self, guest: Guest, names: Sequence[str] = tuple(BEHAVIOURS), patience: float = PATIENCE) -> None:
        self._guest = guest
        self._names = list(names)
        self._patience = patience
        self._found: dict[tuple[str, str], str] = {}

    def check(self, directory: str, name: str) -> None:
        """Compare a behaviour in a directory of the guest with the oracle's; pytest fails with what differs."""
        if (directory, name) not in self._found:
            at = self._names.index(name)
            self._run(directory, self._names[at : at + TOGETHER])
        wrong = self._found.get((directory, name), "the program that answers in the guest has ended")
        if wrong:
            pytest.fail(wrong, pytrace=False)

    def _run(self, directory: str, names: Sequence[str]) -> None:
        asked = "".join(f"{directory} {name}\n" for name in names)
        # Lines come out as they are answered, so that a timeout tells which one hangs.
        script = f"cat >/run/ask <<'END'\n{asked}END\nhead -n {len(names)} </run/answers; cat /run/said >&2"
        try:
            result = self._guest.run(script, self._patience)
        except RigError as error:
            self._take(error.out)
            unanswered = [name for name in names if (directory, name) not in self._found]
            pytest.fail(f"{unanswered[0]} hangs in {directory}: {error}", pytrace=False)
        self._take(result.stdout)
        assert result.stderr == b""

    def _take(self, answers: bytes) -> None:
        for line in answers.splitlines():
            if line.endswith(b"]"):  # else the rest of it has not come
                directory, name, wrong = json.loads(line)
                self._found[directory, name] = wrong
