"""Guests on shares that are locked in: the conformance list, with daemons in a sandbox and under a filter that kills.

Two daemons, in one guest: one in namespaces, as root has it by default; and one in a container without CAP_SYS_ADMIN,
which therefore is in a chroot. A system call that is not on the filter's list ends a daemon, and with it whatever of
the list is left. The gate runs what a sandbox could spoil; the whole list of both is run by night:
`FUSEWIRE_GUEST_LIST=whole ./dev test -o timeout=600 -o faulthandler_timeout=0 tests/test_share_guest_sandbox.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fusewire.linux import capabilities, syscalls
from fusewire.testing import conformance_attributes, conformance_special, conformance_xattrs
from fusewire.testing.conformance import BEHAVIOURS
from vm.behaviours import FAILS_EVERYWHERE, UNINTERRUPTIBLE, Behaviours, booted
from vm.daemons import Daemon, container, share
from vm.rig import Share, need

pytestmark = pytest.mark.slow

WHOLE = os.environ.get("FUSEWIRE_GUEST_LIST") == "whole"
PATIENCE = 500.0 if WHOLE else 90.0  # seconds for those behaviours that are run at a time
KINDS = ("namespace", "container")

_TRUSTED = "trusted and most security attributes take CAP_SYS_ADMIN on the host (--modcaps=+sys_admin)"
KNOWN = {
    **FAILS_EVERYWHERE,
    "trusted_attributes_are_for_root": _TRUSTED,
    "trusted_attributes_are_hidden_from_others": _TRUSTED,
    "trusted_attributes_need_the_capability": _TRUSTED,
    "security_attributes_are_kept": _TRUSTED,
}
# What a sandbox could spoil: ids and capabilities, what is reached by a descriptor's name, waiting, and special files.
CHOSEN = (
    *(
        behaviour.name
        for module in (conformance_attributes, conformance_xattrs, conformance_special)
        for behaviour in module.BEHAVIOURS
    ),
    "path_descriptor_of_a_removed_file_still_knows_it",
    "tmpfile_can_be_given_a_name",
    "tmpfile_has_its_mode_less_the_umask",
    "removed_file_can_be_opened_again_through_proc",
    "direct_io_moves_whole_pages",
    "mode_bits_keep_out_who_is_not_root",
    "strangers_open_what_the_mode_says",
    "noatime_is_for_the_owner",
    "files_made_by_others_are_theirs",
    "sticky_directories_protect_the_files_of_others",
    "removed_file_can_be_written_and_truncated",
    "file_size_limit_of_a_process_holds",
    "shared_map_is_written_to_the_file",
    "allocation_may_keep_the_size",
    "punched_hole_is_read_as_zeros",
    "data_is_found_where_it_is",
    "range_is_copied_to_another_file",
    "rename_between_directories_keeps_everything",
    "rename_exchanges_any_two",
    "rename_leaves_a_whiteout",
    "link_of_an_open_file_works",
    "symlinks_are_followed_in_the_middle_and_at_the_end",
    "dots_are_the_directory_and_its_parent",
    "setgid_directories_give_their_group",
    "setgid_of_a_new_file_is_for_members_of_its_group",
    "listing_has_types_and_inode_numbers",
    "removed_directory_is_dead",
    "directory_descriptor_survives_a_rename",
    "locks_go_with_any_close_and_with_the_process",
    "two_that_wait_both_get_the_lock",
    "description_locks_and_record_locks_meet",
    "flock_waits_and_is_woken",
)


def names() -> list[str]:
    """The behaviours that are run."""
    assert not {*CHOSEN, *KNOWN} - set(BEHAVIOURS)
    return [name for name in (BEHAVIOURS if WHOLE else CHOSEN) if name not in UNINTERRUPTIBLE]


def cases() -> Iterator[Any]:
    for kind in KINDS:
        for name in names():
            marks = [pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else []
            yield pytest.param(kind, name, marks=marks, id=f"{kind}-{name}")


class Locked(NamedTuple):
    """A daemon, what it shares, and what runs behaviours on that."""

    daemon: Daemon
    directory: Path
    behaviours: Behaviours
    server: int

    def status(self, field: str) -> str:
        """A line of proc(5)'s status."""
        text = Path(f"/proc/{self.server}/status").read_text()
        return next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(f"{field}:"))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Locked]]:
    need()
    if os.geteuid() != 0:
        pytest.skip("the list needs a daemon of root, which gives files to other users")
    directory = tmp_path_factory.mktemp("shares")
    with ExitStack() as stack:
        daemons = {}
        for kind in KINDS:
            (directory / kind).mkdir()
            options = ["--seccomp=kill", "--posix-acl"]
            if kind == "container":
                daemons[kind] = share(directory / kind, *options, within=container())
            else:
                daemons[kind] = share(directory / kind, "--sandbox=namespace", *options)
            stack.callback(_end, daemons[kind])
        guest = stack.enter_context(booted([Share(daemons[kind].path, kind) for kind in KINDS]))
        for kind in KINDS:
            guest.check(f"mkdir /mnt/{kind} && mount -t virtiofs {kind} /mnt/{kind}")
        yield {
            kind: Locked(daemon, directory / kind, Behaviours(guest, names(), PATIENCE), daemon.server)
            for kind, daemon in daemons.items()
        }
        guest.check("killall python3; while pidof python3 >/dev/null; do usleep 10000; done")
        for kind in KINDS:
            assert guest.check(f"ls -A /mnt/{kind}") == b""
            guest.check(f"umount /mnt/{kind}")


def _end(daemon: Daemon) -> None:
    said = daemon.said()
    assert daemon.close() == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_daemon_of_the_guest_is_locked_in(locked: dict[str, Locked], kind: str) -> None:
    found = locked[kind]
    assert found.status("Seccomp") == "2"
    assert found.status("NoNewPrivs") == "1"
    assert int(found.status("CapPrm"), 16) == int(found.status("CapEff"), 16) == capabilities.KEPT
    assert not int(found.status("CapBnd"), 16) >> syscalls.CAP_SYS_ADMIN & 1
    root = Path(f"/proc/{found.server}/root").stat()
    assert (root.st_dev, root.st_ino) == (found.directory.stat().st_dev, found.directory.stat().st_ino)
    for name in ("mnt", "pid", "net", "user"):
        own = os.readlink(f"/proc/{found.server}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        assert own == (kind == "namespace" and name != "user")


def test_daemon_in_a_container_says_why_it_makes_no_namespace(locked: dict[str, Locked]) -> None:
    first, *notes = locked["container"].daemon.said().splitlines()
    assert first.startswith("fusewire: sandbox: chroot")
    refused = (
        "not namespace: --sandbox namespace cannot be had here, `namespaces` failed: cannot make a user namespace: "
    )
    assert refused + "a seccomp filter forbids it" in first
    assert any("chroot is less than namespace" in note for note in notes)
    assert "not namespace" not in locked["namespace"].daemon.said()


@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_share_of_a_locked_in_daemon_does_what_a_filesystem_does(
    locked: dict[str, Locked], kind: str, name: str
) -> None:
    locked[kind].behaviours.check(f"/mnt/{kind}", name)
