"""The conformance list on real mounts of the passthrough filesystem, against a directory of the host.

Served by a process of its own (conformance.py), with locks taken on the host and with locks left to the kernel. What
keeps the files is also what they are compared with.
"""

from collections.abc import Iterator

import pytest

import conformance

MAKE = "from fusewire.fs.passthrough import Config, open_directory; operations = open_directory('{place}', Config(%s))"
# GETLK carries no sign of whether a lock is a process's or an open file's (F_OFD_SETLK), whose F_GETLK says -1.
LOCKS = {"description_locks_and_record_locks_meet": "FUSE does not tell which locks are those of open files"}


@pytest.fixture(scope="module")
def mount_of_root() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE % "posix_acl=True", tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def mount_with_local_locks() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE % "posix_lock=False, flock=False", tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def rootless_mount() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE % "posix_acl=True", uid=conformance.NOBODY, tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def mount_with_backing_files() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE % "posix_acl=True, passthrough=True", tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def mount_without_cache() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE % "cache='none'", tmpfs=False) as mounted:
        yield mounted


@pytest.mark.parametrize("name", conformance.cases(fails=LOCKS))
def test_mount_with_backing_files_does_what_the_directory_does(mount_with_backing_files, name):
    mount_with_backing_files.check(name)


@pytest.mark.parametrize("name", conformance.cases("acl", fails=LOCKS))
def test_mount_without_cache_does_what_the_directory_does(mount_without_cache, name):
    mount_without_cache.check(name)


@pytest.mark.parametrize("name", conformance.cases(fails=LOCKS))
def test_mount_of_root_does_what_the_directory_does(mount_of_root, name):
    mount_of_root.check(name)


@pytest.mark.parametrize("name", conformance.cases(marked="locks"))
def test_locks_may_be_left_to_the_kernel(mount_with_local_locks, name):
    mount_with_local_locks.check(name)


@pytest.mark.parametrize("name", conformance.cases("root", fails=LOCKS))  # without what only root may do
def test_rootless_mount_does_what_the_directory_does(rootless_mount, name):
    rootless_mount.check(name)
