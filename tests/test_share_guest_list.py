"""The conformance list inside a guest, on a share in each cache mode, against an ext4 filesystem of the guest's.

All modes are mounted in one guest, and the oracle is asked once for all. The gate runs the whole list with cache=auto,
and of the other modes what can differ by mode: the paths of data, maps, attributes and listings. By night it is the
whole list in each mode, ten minutes: `FUSEWIRE_GUEST_LIST=whole ./dev test -o timeout=600 -o faulthandler_timeout=0
tests/test_share_guest_list.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from fusewire.testing import conformance_data, conformance_space
from fusewire.testing.conformance import BEHAVIOURS
from vm import images
from vm.behaviours import FAILS_EVERYWHERE, UNINTERRUPTIBLE, Behaviours, booted
from vm.daemons import fusewire
from vm.rig import Guest, Share, need

pytestmark = pytest.mark.slow

WHOLE = os.environ.get("FUSEWIRE_GUEST_LIST") == "whole"
PATIENCE = 500.0 if WHOLE else 90.0  # seconds for those behaviours that are run at a time

MODES = ("auto", "always", "metadata", "none")

# Known differences, by the mode: they are the guest's kernel's, and C virtiofsd has them as well.
MAPS = (
    "shared_map_and_calls_see_each_other",
    "shared_map_is_written_to_the_file",
    "shared_map_is_seen_by_another_process",
    "read_only_map_shows_later_writes",
    "map_needs_a_descriptor_that_may",
    "map_of_a_removed_file_lives_on",
    "map_ends_with_the_file",
    "bytes_behind_the_end_of_a_map_are_not_kept",
    "map_of_a_hole_makes_data",
    "map_changes_the_modification_time",
)
UNMAPPED = "a file that is opened without a cache has no shared maps before Linux 6.6 (FUSE_DIRECT_IO_ALLOW_MMAP)"
WITHOUT_MAPS = dict.fromkeys(MAPS, UNMAPPED) if images.release() < (6, 6) else {}
FAILS: dict[str, dict[str, str]] = {
    "auto": FAILS_EVERYWHERE,
    "always": {
        **FAILS_EVERYWHERE,
        "reading_moves_an_old_access_time_only": "what the guest has in its cache it does not read again from the host",
    },
    "metadata": {**FAILS_EVERYWHERE, **WITHOUT_MAPS},
    "none": {**FAILS_EVERYWHERE, **WITHOUT_MAPS},
}

# Of the other modes in the gate: everything about data, and these.
CHOSEN = (
    *(behaviour.name for module in (conformance_data, conformance_space) for behaviour in module.BEHAVIOURS),
    "truncation_by_open_is_seen_by_who_has_it_open",
    "two_processes_that_append_overwrite_nothing",
    "append_can_be_switched_on_and_off",
    "tmpfile_can_be_given_a_name",
    "direct_io_moves_whole_pages",
    "removed_file_can_be_opened_again_through_proc",
    "mode_bits_keep_out_who_is_not_root",
    "link_counts_of_directories_are_consistent",
    "listing_has_types_and_inode_numbers",
    "rewinding_shows_what_is_new",
    "renaming_while_listing_loses_nobody",
    "removed_directory_is_dead",
    "changes_of_entries_move_the_times_of_the_directory",
    "chown_clears_set_user_id",
    "writing_clears_set_user_id",
    "times_survive_without_the_cache",
    "operations_move_the_times_that_they_should",
    "statx_agrees_with_stat",
    "inode_number_lasts_as_long_as_the_file",
    "blocks_tell_that_there_is_data",
)


def names(mode: str) -> list[str]:
    """The behaviours that are run in a mode."""
    wanted = BEHAVIOURS if WHOLE or mode == "auto" else CHOSEN
    return [name for name in wanted if name not in UNINTERRUPTIBLE]


def cases() -> Iterator[Any]:
    for mode in MODES:
        assert not set(FAILS[mode]) - set(BEHAVIOURS)
        for name in names(mode):
            reason = FAILS[mode].get(name)
            yield pytest.param(mode, name, marks=[pytest.mark.xfail(reason=reason, strict=True)] if reason else [])


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Behaviours]]:
    """What runs behaviours in /mnt/MODE, by the mode."""
    need()
    if os.geteuid() != 0:
        pytest.skip("the list needs a daemon of root, which gives files to other users")
    directory = tmp_path_factory.mktemp("shares")
    with ExitStack() as stack:
        shares = []
        for mode in MODES:
            (directory / mode).mkdir()
            daemon = stack.enter_context(fusewire(directory / mode, f"--cache={mode}", "--posix-acl"))
            shares.append(Share(daemon.path, mode))
        guest = stack.enter_context(booted(shares))
        for mode in MODES:
            guest.check(f"mkdir /mnt/{mode} && mount -t virtiofs {mode} /mnt/{mode}")
        yield {mode: Behaviours(guest, names(mode), PATIENCE) for mode in MODES}
        _unmounted(guest)


def _unmounted(guest: Guest) -> None:
    """Nothing is left in any share, and nothing holds one: but for behaviours that fail, which leave files open."""
    guest.check("killall python3; while pidof python3 >/dev/null; do usleep 10000; done")
    for mode in MODES:
        assert guest.check(f"ls -A /mnt/{mode}") == b""
        guest.check(f"umount /mnt/{mode}")


@pytest.mark.parametrize(("mode", "name"), list(cases()))
def test_share_does_what_a_filesystem_of_the_guest_does(modes: dict[str, Behaviours], mode: str, name: str) -> None:
    modes[mode].check(f"/mnt/{mode}", name)
