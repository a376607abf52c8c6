"""The squashfs filesystem behind a session, with no kernel: names, listings made ahead, reading ahead, ownership."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import squashfs_images
from fusewire.cli.options import parse
from fusewire.fs.sources import open_source
from fusewire.fs.squashfs import SquashFS, SquashFSWithXattrs
from fusewire.ops import FOREVER
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.wire import abi


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for top in range(4):
        for middle in range(5):
            place = root / f"d{top}" / f"e{middle}"
            place.mkdir(parents=True)
            for number in range(7):
                (place / f"file{number}").write_bytes(squashfs_images.text(3000 * number + 1, seed=top * 100 + middle))
    (root / "many").mkdir()
    for number in range(700):
        (root / "many" / f"name-{number:04}").write_bytes(b"%d" % number)
    (root / "big").write_bytes(squashfs_images.text(3_000_000))
    (root / "link").symlink_to("d0/e0/file3")
    (root / "script").write_text("#!/bin/sh\n")
    (root / "script").chmod(0o4750)
    return root


@pytest.fixture(scope="module")
def image(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return squashfs_images.mksquashfs(tree, tmp_path_factory.mktemp("image") / "i.sqsh", "-comp", "gzip", "-b", "16K")


@pytest.fixture
def filesystem(image: Path) -> Iterator[SquashFS]:
    found = open_source(str(image), parse(""))
    assert isinstance(found, SquashFS)
    yield found
    found.destroy()


def kernel_of(filesystem: SquashFS) -> FakeKernel:
    kernel = FakeKernel(Session(filesystem))
    kernel.init()
    return kernel


@pytest.fixture
def kernel(filesystem: SquashFS) -> FakeKernel:
    return kernel_of(filesystem)


def outcome(ask: Callable[[], object]) -> object:
    """What a request gives: its result, or its errno."""
    try:
        return ask()
    except OSError as error:
        return error.errno


def test_everything_is_read_as_it_is_in_the_tree(kernel: FakeKernel, tree: Path) -> None:
    found = dict(kernel.walk())
    expected = {os.fsencode(path.relative_to(tree)) for path in tree.rglob("*")}
    assert {path.lstrip(b"/") for path in found} - {b""} == expected
    for path, entry in found.items():
        there = tree / os.fsdecode(path.lstrip(b"/"))
        assert entry.attr[9] == there.lstat().st_mode
        if stat.S_ISREG(entry.attr[9]):
            assert kernel.read_file(path) == there.read_bytes()


def test_no_open_no_release_no_flush_is_ever_needed(filesystem: SquashFS) -> None:
    session = Session(filesystem)
    FakeKernel(session).init()
    assert session.flags & abi.FUSE_NO_OPEN_SUPPORT
    assert session.flags & abi.FUSE_NO_OPENDIR_SUPPORT
    assert session.flags & abi.FUSE_CACHE_SYMLINKS
    assert not session.flags & abi.FUSE_AUTO_INVAL_DATA
    assert session.max_write == 4096


def test_a_missing_name_is_remembered_for_ever(kernel: FakeKernel) -> None:
    entry = kernel.lookup(1, b"nothing")
    assert (entry.nodeid, entry.entry_timeout) == (0, FOREVER)


def test_negative_timeout_0_answers_enoent(image: Path) -> None:
    found = open_source(str(image), parse("negative_timeout=0"))
    assert isinstance(found, SquashFS)
    with pytest.raises(FileNotFoundError):
        kernel_of(found).lookup(1, b"nothing")
    found.destroy()


@pytest.mark.parametrize("size", [200, 1000, 4096, 32768])
@pytest.mark.parametrize("plus", [False, True])
def test_a_directory_read_in_pieces_has_every_name_once(kernel: FakeKernel, size: int, plus: bool) -> None:
    nodeid = kernel.lookup(1, b"many").nodeid
    read = kernel.readdirplus if plus else kernel.readdir
    names, offset = [], 0
    while entries := read(nodeid, 0, offset, size + 100):
        names += [entry.name for entry in entries]
        offset = entries[-1].cookie
    assert names == [b".", b".."] + [b"name-%04d" % number for number in range(700)]


def test_a_listing_goes_on_at_any_cookie(kernel: FakeKernel) -> None:
    nodeid = kernel.lookup(1, b"many").nodeid
    entries = kernel.listdir(nodeid, 1 << 16)
    for index in (0, 1, 2, 3, 77, 500, len(entries) - 1):
        rest = kernel.readdir(nodeid, 0, entries[index].cookie, 1 << 16)
        assert [entry.name for entry in rest] == [entry.name for entry in entries[index + 1 :]]


@pytest.mark.parametrize("cookie", [3, 4, 1000, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_a_forged_cookie_is_answered_and_nothing_breaks(kernel: FakeKernel, cookie: int) -> None:
    nodeid = kernel.lookup(1, b"many").nodeid
    for read in (kernel.readdir, kernel.readdirplus):
        found = outcome(lambda read=read: {entry.name for entry in read(nodeid, 0, cookie, 4096)})
        assert found == errno.EIO or found <= {b"name-%04d" % number for number in range(700)}


@pytest.mark.parametrize("nodeid", [2, 3, 12345, 1 << 40, (1 << 64) - 1])
def test_a_forged_node_id_is_an_error_and_nothing_else(kernel: FakeKernel, nodeid: int) -> None:
    for ask in (
        lambda: kernel.getattr(nodeid),
        lambda: kernel.lookup(nodeid, b"x"),
        lambda: kernel.readdir(nodeid, 0),
        lambda: kernel.readdirplus(nodeid, 0),
        lambda: kernel.read(nodeid, 0, 0, 4096),
        lambda: kernel.readlink(nodeid),
    ):
        assert outcome(ask) in (errno.EIO, errno.ENOTDIR, errno.EINVAL, errno.EISDIR) or nodeid == 2


def test_listings_made_ahead_are_those_that_are_asked_for(filesystem: SquashFS, image: Path) -> None:
    plain = open_source(str(image), parse(""))
    assert isinstance(plain, SquashFS)
    ask, ask_plain = kernel_of(filesystem), kernel_of(plain)
    ahead = 0
    pending = [1]
    while pending:
        nodeid = pending.pop()
        ahead += nodeid in filesystem._ahead.ready
        entries = ask.readdirplus(nodeid, 0, 0, 32768)
        assert entries == ask_plain.readdirplus(nodeid, 0, 0, 32768)
        while filesystem.idle_work and len(filesystem._ahead.ready) < 3:
            before = len(filesystem._ahead.ready)
            filesystem.idle()
            if len(filesystem._ahead.ready) == before:
                break
        inner = [entry.entry.nodeid for entry in entries if entry.dtype == 4 and entry.entry]
        pending += reversed(inner)
    assert ahead > 15  # of 25 directories; the first ones had to show that this is a walk
    plain.destroy()


def test_listings_made_ahead_are_dropped_when_the_walk_ends(filesystem: SquashFS) -> None:
    kernel = kernel_of(filesystem)
    top = [entry.entry.nodeid for entry in kernel.readdirplus(1, 0, 0, 32768) if entry.dtype == 4 and entry.entry]
    for nodeid in top[:3]:
        kernel.readdirplus(nodeid, 0, 0, 32768)
        filesystem.idle()
    kernel.readdirplus(top[0], 0, 0, 32768)
    assert not filesystem.idle_work
    assert filesystem._ahead.ready == {}


def test_files_read_in_order_are_decompressed_ahead(filesystem: SquashFS) -> None:
    kernel = kernel_of(filesystem)
    prefetcher = filesystem._prefetcher
    prefetcher._threads = 1  # also where there is one processor
    nodeid = kernel.lookup(1, b"many").nodeid
    files = [entry.entry.nodeid for entry in kernel.readdirplus(nodeid, 0, 0, 1 << 20) if entry.dtype == 8]
    for file in files[:6]:
        kernel.read(file, 0, 0, 4096)
    while prefetcher._refill == 1 << 62:  # until the helping thread has done what it was asked for
        pass
    held = filesystem.image.held
    inode = filesystem.image.inode(files[40] - 2)
    assert all(held(key) for key, _, _ in filesystem.image.plan(inode, 0, inode.size) if key)


def test_a_file_read_in_order_is_decompressed_ahead(filesystem: SquashFS) -> None:
    kernel = kernel_of(filesystem)
    filesystem._prefetcher._threads = 1
    nodeid = kernel.lookup(1, b"big").nodeid
    for offset in range(0, 3 << 16, 1 << 16):
        kernel.read(nodeid, 0, offset, 1 << 16)
        while filesystem._prefetcher._jobs.qsize():
            pass  # a helping thread that has much to do is not given more
    inode = filesystem.image.inode(nodeid - 2)
    ahead = filesystem.image.plan(inode, 3 << 16, 1 << 18)
    while not all(filesystem.image.held(key) for key, _, _ in ahead if key):
        pass  # the helping thread is at it


def test_reads_end_at_the_end_of_the_file(kernel: FakeKernel, tree: Path) -> None:
    nodeid = kernel.lookup(1, b"big").nodeid
    size = (tree / "big").stat().st_size
    data = (tree / "big").read_bytes()
    assert kernel.read(nodeid, 0, size - 10, 4096) == data[-10:]
    assert kernel.read(nodeid, 0, size, 4096) == b""
    assert kernel.read(nodeid, 0, size + (1 << 40), 4096) == b""
    assert kernel.read(nodeid, 0, 16383, 2) == data[16383:16385]


def test_owners_and_modes_can_be_overridden(image: Path) -> None:
    found = open_source(str(image), parse("uid=42,gid=43,umask=027"))
    assert isinstance(found, SquashFS)
    kernel = kernel_of(found)
    for entry in (kernel.lookup(1, b"script"), next(e.entry for e in kernel.readdirplus(1, 0) if e.name == b"script")):
        assert entry.attr[11:13] == (42, 43)
        assert entry.attr[9] == stat.S_IFREG | 0o4750
    assert kernel.lookup(1, b"big").attr[9] & 0o777 == 0o640
    found.destroy()


def test_squash_owner_makes_all_the_callers(image: Path) -> None:
    found = open_source(str(image), parse("squash_owner"))
    assert isinstance(found, SquashFS)
    assert kernel_of(found).lookup(1, b"big").attr[11:13] == (os.getuid(), os.getgid())
    found.destroy()


def test_wrong_kinds_get_their_errors(kernel: FakeKernel) -> None:
    big, many = kernel.lookup(1, b"big").nodeid, kernel.lookup(1, b"many").nodeid
    for number, ask in (
        (errno.ENOTDIR, lambda: kernel.lookup(big, b"x")),
        (errno.ENOTDIR, lambda: kernel.readdir(big, 0)),
        (errno.EISDIR, lambda: kernel.read(many, 0, 0, 10)),
        (errno.EINVAL, lambda: kernel.readlink(big)),
        (errno.EROFS, lambda: kernel.mkdir(1, b"new")),
        (errno.EROFS, lambda: kernel.unlink(1, b"big")),
    ):
        with pytest.raises(OSError) as caught:
            ask()
        assert caught.value.errno == number


def test_statfs_tells_the_images_size(kernel: FakeKernel, image: Path) -> None:
    found = kernel.statfs()
    assert found.bsize == 16384
    assert found.bfree == found.ffree == 0
    assert abs(found.blocks * found.frsize - image.stat().st_size) < 2 * 16384
    assert found.files >= 700


def test_an_image_without_xattrs_lets_the_kernel_stop_asking(image: Path, filesystem: SquashFS) -> None:
    assert not isinstance(filesystem, SquashFSWithXattrs)
    with pytest.raises(OSError) as caught:
        kernel_of(filesystem).getxattr(1, b"user.x")
    assert caught.value.errno == errno.ENOSYS


def test_the_sources_descriptor_is_closed_at_the_end(image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = open_source(str(image), parse(""))
    found.destroy()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 5000, b"hsqs" + b"\0" * 200, b"sqsh" + b"\0" * 5000])
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not-an-image"
    path.write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="not-an-image"):
        open_source(str(path), parse(""))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_fifo_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="neither a file nor a block device"):
        open_source(str(tmp_path / "fifo"), parse(""))
