"""The passthrough filesystem for clients on another machine: their process ids mean nothing on this one."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusewire.fs.passthrough import Config, Passthrough, open_directory
from fusewire.ops import Caller, Extensions
from fusewire.wire import abi

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files in other users' names")

ROOT = 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Passthrough, Path]]:
    """A directory that only group 4321 may write to, and a subdirectory that passes its group on."""
    place = tmp_path / "served"
    place.mkdir()
    os.chown(place, 0, 4321)
    place.chmod(0o2770)
    filesystem = open_directory(str(place), Config(remote=True))
    yield filesystem, place
    filesystem.destroy()


@contextmanager
def member_of_a_group_on_this_machine() -> Iterator[int]:
    """A process of this machine that is in group 4321."""
    waits, ends = os.pipe()
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ends)
        os.setgroups([4321])
        os.write(told, b"x")
        os.read(waits, 1)
        os._exit(0)
    os.close(waits)
    os.close(told)
    try:
        assert os.read(ready, 1)
        yield pid
    finally:
        os.close(ready)
        os.close(ends)
        os.waitpid(pid, 0)


def test_groups_are_never_those_of_a_local_process_with_the_callers_number(served: tuple[Passthrough, Path]) -> None:
    filesystem, _ = served
    with member_of_a_group_on_this_machine() as pid:
        assert filesystem._groups(Caller(1000, 1000, pid, 2)) == ()
        local = open_directory(str(served[1]), Config())
        try:
            assert local._groups(Caller(1000, 1000, pid, 2)) == (4321,)
        finally:
            local.destroy()


def test_who_may_create_by_a_group_that_the_client_cannot_tell_creates(served: tuple[Passthrough, Path]) -> None:
    filesystem, place = served
    filesystem.flags = 0
    filesystem.mkdir(Caller(1000, 1000, 1, 2), ROOT, b"made", 0o755, 0)
    filesystem.symlink(Caller(1000, 1000, 1, 2), ROOT, b"link", b"target")
    found = (place / "made").stat()
    assert (found.st_uid, found.st_gid) == (1000, 4321)
    assert (place / "link").lstat().st_uid == 1000
    # And afterwards the thread is itself again.
    filesystem.mkdir(Caller(0, 0, 1, 2), ROOT, b"own", 0o755, 0)
    os.chown(place / "own", 77, 77)
    assert (place / "own").stat().st_uid == 77


def test_groups_that_the_client_tells_are_believed_and_no_more_is_allowed(served: tuple[Passthrough, Path]) -> None:
    filesystem, place = served
    filesystem.flags = abi.FUSE_CREATE_SUPP_GROUP
    told = Caller(1000, 1000, 1, 2, Extensions((), (4321,)))
    filesystem.mkdir(told, ROOT, b"made", 0o755, 0)
    assert (place / "made").stat().st_uid == 1000
    with pytest.raises(PermissionError):
        filesystem.mkdir(Caller(1000, 1000, 1, 2, Extensions((), ())), ROOT, b"other", 0o755, 0)


def test_a_set_group_bit_stays_for_a_member_that_the_client_tells_of(served: tuple[Passthrough, Path]) -> None:
    filesystem, place = served
    filesystem.flags = abi.FUSE_CREATE_SUPP_GROUP
    told = Caller(1000, 1000, 1, 2, Extensions((), (4321,)))
    filesystem.mknod(told, ROOT, b"file", stat.S_IFREG | 0o2755, 0, 0)
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o2755


@pytest.mark.parametrize("allowed", [False, True])
def test_direct_reads_and_writes_reach_the_host_only_where_allowed(tmp_path: Path, allowed: bool) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8192)
    filesystem = open_directory(str(tmp_path), Config(remote=True, allow_direct_io=allowed))
    try:
        entry = filesystem.lookup(Caller(0, 0, 1, 2), ROOT, b"file")
        assert isinstance(entry, bytes)
        nodeid = int.from_bytes(entry[:8], "little")
        fh = filesystem.open(Caller(0, 0, 1, 2), nodeid, os.O_RDWR | os.O_DIRECT, 0)[0]
        host = filesystem.read(nodeid, fh, 0, 4096, 0, 0, 0).fd
        assert bool(fcntl.fcntl(host, fcntl.F_GETFL) & os.O_DIRECT) is allowed
        with mmap.mmap(-1, 4096) as page:
            page[:] = b"y" * 4096
            assert filesystem.write(nodeid, fh, 4096, memoryview(page), 0, 0, os.O_DIRECT) == 4096
        assert (tmp_path / "file").read_bytes() == b"x" * 4096 + b"y" * 4096
    finally:
        filesystem.destroy()
