"""One file under everything that changes contents, in a guest, in each way of caching, against a model in memory.

`fsx.py` does the work there. FUSEWIRE_FSX_OPERATIONS says how many operations it takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

import fsx
from vm.daemons import fusewire
from vm.rig import Guest, Share, need

pytestmark = pytest.mark.slow

OPERATIONS = int(os.environ.get("FUSEWIRE_FSX_OPERATIONS", "200"))
PATIENCE = 50.0 + OPERATIONS / 5
UNMAPPED = ("none", "metadata", "direct")  # before Linux 6.6 (FUSE_DIRECT_IO_ALLOW_MMAP) they have no shared maps
MODES = {
    "none": ["--cache=none"],
    "metadata": ["--cache=metadata"],
    "auto": ["--cache=auto"],
    "writeback": ["--cache=auto", "--writeback"],
    "always": ["--cache=always", "--writeback"],
    "direct": ["--cache=none", "--allow-direct-io", "--thread-pool-size=4"],
}


class Sharing(NamedTuple):
    """A guest, and the directories that are shared with it, by the mode."""

    guest: Guest
    directories: dict[str, Path]


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    need()
    with ExitStack() as stack:
        directories = {mode: tmp_path_factory.mktemp(mode) for mode in MODES}
        daemons = {mode: stack.enter_context(fusewire(directories[mode], *MODES[mode])) for mode in MODES}
        shares = [Share(daemon.path, mode) for mode, daemon in daemons.items()]
        guest = stack.enter_context(Guest(shares, put=[(Path(fsx.__file__), "/rig/fsx.py")]))
        yield Sharing(guest, directories)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_in_a_guest_stays_what_was_done_to_it(sharing: Sharing, mode: str) -> None:
    guest, directory = sharing.guest, sharing.directories[mode]
    guest.check(f"mkdir /mnt/{mode} && mount -t virtiofs {mode} /mnt/{mode}")
    how = f"--operations {OPERATIONS} --seed 22 {'--no-mmap' if mode in UNMAPPED else ''}"
    said = guest.check(f"python3 /rig/fsx.py --directory /mnt/{mode} {how}", PATIENCE)
    guest.check(f"umount /mnt/{mode}")
    assert b"as the model" in said
    assert os.listdir(directory) == []
