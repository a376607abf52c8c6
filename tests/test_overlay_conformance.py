"""The conformance list on real mounts of our own overlay over a directory, in both forms of whiteouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import conformance

MAKE = """
import os
from fusewire.fs.overlay import open_overlay
from fusewire.fs.passthrough import Config, open_directory
for name in ("lower", "upper", "work"):
    os.mkdir("{place}/" + name)
fds = [os.open("{place}/" + name, os.O_RDONLY | os.O_DIRECTORY) for name in ("upper", "work")]
operations = open_overlay(open_directory("{place}/lower"), *fds, config=Config(posix_acl=True))
"""
BY_NAME = "\noperations._marks.devices, operations._marks.opaque = False, ()\n"
# The kernel's overlayfs refuses it too: a whiteout that somebody makes would be taken for one of the overlay's own.
FAILS = {
    "rename_leaves_a_whiteout": "whiteouts are the overlay's own",
    "device_nodes_keep_their_numbers": "the device 0:0 is a whiteout",
}


@pytest.fixture(scope="module")
def mount_of_root() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE, tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def rootless_mount() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE, uid=conformance.NOBODY, tmpfs=False) as mounted:
        yield mounted


@pytest.mark.parametrize("name", conformance.cases(fails=FAILS))
def test_mount_of_root_does_what_a_directory_does(mount_of_root: conformance.Mounted, name: str) -> None:
    mount_of_root.check(name)


@pytest.mark.parametrize("name", conformance.cases("root"))
def test_rootless_mount_does_what_a_directory_does(rootless_mount: conformance.Mounted, name: str) -> None:
    rootless_mount.check(name)
