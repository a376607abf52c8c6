"""The squashfs reader against images that the real tools make, with the kernel's own squashfs mount as the judge."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.formats.squashfs import Image, SquashfsError
from squashfs_images import (
    COMPRESSORS,
    contents,
    find,
    image_snapshot,
    kernel_mount,
    list_all,
    make_tree,
    mksquashfs,
    need,
    need_root,
    opened,
    run,
    snapshot,
    text,
)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("squashfs") / "tree", block=65536)


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("squashfs-small") / "tree", block=4096)


@pytest.fixture(scope="session")
def image_file(tree: Path) -> Path:
    return mksquashfs(tree, tree.parent / "image", "-comp", "zstd", "-b", "64K")


@pytest.fixture
def image(image_file: Path) -> Iterator[Image]:
    with opened(image_file) as found:
        yield found


def same_as_kernel(path: Path, tmp_path: Path, offset: int = 0) -> None:
    with kernel_mount(path, tmp_path / "kernel", offset) as mounted, opened(path, offset=offset) as image:
        assert image_snapshot(image) == snapshot(mounted)


# -- the tree is the one that the kernel shows


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_compressor_gives_the_tree_that_was_packed(small_tree: Path, tmp_path: Path, compressor: str) -> None:
    path = mksquashfs(small_tree, tmp_path / "image", "-comp", compressor, "-b", "4K")
    with opened(path) as image:
        assert image_snapshot(image, blocks=False) == snapshot(small_tree, blocks=False)
        assert image.summary()["compressor"] == compressor


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c != "lzma"])  # the kernel has no lzma
def test_every_compressor_gives_what_the_kernel_shows(tree: Path, tmp_path: Path, compressor: str) -> None:
    same_as_kernel(mksquashfs(tree, tmp_path / "image", "-comp", compressor, "-b", "64K"), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ("-b", "4K"),
        ("-b", "128K"),
        ("-b", "1M"),
        ("-noI", "-noD", "-noF", "-noX"),
        ("-noI", "-noId"),
        ("-noD",),
        ("-no-fragments",),
        ("-always-use-fragments", "-b", "64K"),
        ("-no-exports",),
        ("-no-xattrs",),
        ("-no-duplicates", "-no-sparse"),
        ("-comp", "xz", "-Xbcj", "x86,arm", "-b", "256K"),
        ("-comp", "lz4", "-Xhc"),
        ("-comp", "gzip", "-Xcompression-level", "1", "-Xwindow-size", "8"),
        ("-all-root", "-all-time", "4294967295"),
    ],
    ids=" ".join,
)
def test_every_way_of_packing_gives_what_the_kernel_shows(
    small_tree: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    same_as_kernel(mksquashfs(small_tree, tmp_path / "image", *options), tmp_path)


def test_an_image_behind_a_prefix_is_read_at_its_offset(small_tree: Path, tmp_path: Path) -> None:
    path = mksquashfs(small_tree, tmp_path / "image", "-offset", "12288")
    same_as_kernel(path, tmp_path, offset=12288)
    odd = tmp_path / "odd"
    odd.write_bytes(b"#!/bin/sh\n" + path.read_bytes()[12288:])
    with opened(path, offset=12288) as image, opened(odd, offset=10) as moved:
        assert image_snapshot(image) == image_snapshot(moved)


def test_gensquashfs_images_give_what_the_kernel_shows(small_tree: Path, tmp_path: Path) -> None:
    need_root()
    path = tmp_path / "image"
    run(need("gensquashfs"), "-D", small_tree, "-c", "zstd", "-b", "65536", "-x", "-k", "-q", path)
    same_as_kernel(path, tmp_path)


def test_tar2sqfs_images_give_what_the_kernel_shows(small_tree: Path, tmp_path: Path) -> None:
    need_root()
    tar = run("tar", "-C", small_tree, "--xattrs", "--xattrs-include=user.*", "--exclude=./socket", "-c", ".")
    path = tmp_path / "image"
    run(need("tar2sqfs"), "-c", "lz4", "-b", "8192", "-q", path, stdin=tar)
    same_as_kernel(path, tmp_path)


def test_an_image_that_was_appended_to_gives_what_the_kernel_shows(small_tree: Path, tmp_path: Path) -> None:
    path = mksquashfs(small_tree, tmp_path / "image", "-b", "4K")
    more = tmp_path / "more"
    more.mkdir()
    more.joinpath("later").write_bytes(text(9000))
    run(need("mksquashfs"), more, path, "-no-progress", "-quiet")
    same_as_kernel(path, tmp_path)


@pytest.mark.parametrize("maker", ["mksquashfs", "tar2sqfs", "gensquashfs"])
def test_an_empty_image_has_an_empty_root(tmp_path: Path, maker: str) -> None:
    path, source = tmp_path / "image", tmp_path / "source"
    source.mkdir()
    if maker == "mksquashfs":
        mksquashfs(source, path)
    elif maker == "tar2sqfs":
        run(need("tar2sqfs"), "-q", path, stdin=bytes(10240))
    else:
        run(need("gensquashfs"), "-D", source, "-q", path)
    with opened(path) as image:
        assert stat.S_ISDIR(image.root_inode.mode)
        assert list(image.entries(image.root_inode)) == []
        assert image.attributes(image.root_inode) == []
        assert image.attributes(image.root_inode, 1 << 62) == []
        assert image.lookup(image.root_inode, b"anything") is None


# -- large counts


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 70,001 inodes: one directory of 20,000 names, 125 of 400, each with an owner of its own."""
    base = tmp_path_factory.mktemp("crowd")
    lines = ["dir /big 0755 0 0"]
    # Names backwards: the tool inserts each into a sorted list, at once when it comes first.
    for i, name in enumerate(sorted(crowd_names(), reverse=True)):
        lines.append(f"slink /big/{name.decode()} 0777 0 {i % 300} target{i}")
    for i in range(125):
        lines.append(f"dir /d{i:03} 0755 {1000 + i} 5")
        lines += [f"nod /d{i:03}/n{j:03} 0600 {70000 + j} 5 c {j} {i}" for j in reversed(range(400))]
    listing = base / "listing"
    listing.write_text("\n".join(lines) + "\n")
    path = base / "image"
    run(need("gensquashfs"), "-F", listing, "-c", "lz4", "-e", "-q", path)
    return path


def crowd_names() -> list[bytes]:
    return [b"%s-%05d%s" % ((b"alpha", b"beta", b"gamma")[i % 3], i, b"x" * (i % 40)) for i in range(20_000)]


def test_more_than_65536_inodes_and_256_owners_are_read(crowd: Path) -> None:
    with opened(crowd) as image:
        assert image.superblock.inodes > 65536
        assert image.superblock.ids > 256
        total = 0
        numbers = set()
        for entry in list_all(image, image.root_inode):
            directory = image.inode(entry[2])
            for child in list_all(image, directory, 1000):
                total += 1
                numbers.add(child[4])
                if entry[1] != b"big":
                    i, j = int(entry[1][1:]), int(child[1][1:])
                    assert child[6] == 70000 + j
                    assert child[12] == j << 8 | i
        assert total == 70_000
        assert len(numbers) == 70_000


def test_every_one_of_20000_names_is_found_and_no_other(crowd: Path) -> None:
    with opened(crowd) as image:
        directory = find(image, b"big")
        assert directory.index_count > 50
        listed = {entry[1]: entry[2:] for entry in image.entries(directory)}
        names = crowd_names()
        assert sorted(names) == list(listed)
        for name in names:
            assert image.lookup(directory, name) == listed[name]
        for name in names[:500]:
            assert image.lookup(directory, name[:-1] + b"~") is None
            assert image.lookup(directory, name + b"\0") is None
        for name in (b"", b"a", b"zzz", b"\xff" * 255, b"\xff" * 256, b"\x01", b"alpha"):
            assert image.lookup(directory, name) is None


def test_lookup_needs_only_the_metadata_that_the_index_names(crowd: Path) -> None:
    with opened(crowd) as image:
        directory = find(image, b"big")
        image.lookup(directory, b"alpha-00000")
        before = image.statistics()["metadata_misses"]
        assert image.lookup(directory, b"gamma-19997" + b"x" * 37) is not None
        assert image.statistics()["metadata_misses"] - before <= 3


@pytest.mark.parametrize("fixture", ["crowd", "image_file"])
def test_a_listing_goes_on_at_every_cookie(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    with opened(path) as image:
        directory = find(image, b"big" if fixture == "crowd" else b"many")
        whole = list(image.entries(directory))
        assert [e[0] for e in whole] == sorted({e[0] for e in whole})
        assert whole[-1][0] == directory.size
        picks = random.Random(1).sample(range(len(whole)), 150)
    # With what earlier reads left behind, and (fresh image each time) without.
    with opened(path) as warm:
        list(warm.entries(directory))
        for pick in picks:
            cookie = whole[pick][0]
            assert [e[:3] for e in warm.attributes(directory, cookie, 20)] == [
                e[:3] for e in whole[pick + 1 : pick + 21]
            ]
            if pick % 10 == 0:
                with opened(path) as cold:
                    found = cold.attributes(directory, cookie, 20)
                    assert [e[:3] for e in found] == [e[:3] for e in whole[pick + 1 : pick + 21]]


def test_a_listing_in_chunks_reads_each_part_once(crowd: Path) -> None:
    with opened(crowd, metadata_size=64 << 20) as image:
        directory = find(image, b"big")
        steps = 0
        inner = image._metadata.block

        def counting(position: int) -> tuple[bytes, int]:
            nonlocal steps
            steps += 1
            return inner(position)

        image._block = counting
        list_all(image, directory, 1000)
        coarse, steps = steps, 0
        list_all(image, directory, 20)  # 50 times as many calls, each with a few blocks of its own
        assert steps < coarse + 1000 * 14


def test_cookies_that_no_listing_gave_are_answered_with_whole_entries_or_eio(image: Image) -> None:
    directory = find(image, b"many")
    names = {entry[1] for entry in image.entries(directory)}
    for cookie in [
        *range(-5, 3000, 7),
        directory.size - 1,
        directory.size,
        directory.size + 1,
        1 << 31,
        1 << 63,
        1 << 70,
    ]:
        try:
            found = image.attributes(directory, cookie, 10)
        except SquashfsError:
            continue
        assert {entry[1] for entry in found} <= names


def test_both_ways_of_listing_begin_anew_at_cookies_0_to_3(image: Image) -> None:
    first = image.attributes(image.root_inode, 0, 5)
    for cookie in (1, 2, 3):
        assert image.attributes(image.root_inode, cookie, 5) == first
    assert first[0][0] > 3


def test_inode_numbers_lead_back_to_their_inodes(image: Image, small_tree: Path, tmp_path: Path) -> None:
    for entry in image.entries(find(image, b"many")):
        assert image.find_inode(entry[4]) == entry[2]
    assert image.find_inode(image.root_inode.number) == image.root
    for number in (0, -1, image.superblock.inodes + 1, 1 << 40):
        with pytest.raises(SquashfsError, match="no inode number"):
            image.find_inode(number)
    with opened(mksquashfs(small_tree, tmp_path / "image", "-no-exports")) as other:
        with pytest.raises(SquashfsError, match="no export table"):
            other.find_inode(1)
        assert other.summary()["exportable"] is False


def test_hard_links_are_one_inode(image: Image) -> None:
    assert find(image, b"noise") == find(image, b"hard-link")
    assert find(image, b"noise").nlink == 2
    assert find(image, b"short-link").ref == find(image, b"hard-link-of-symlink").ref


# -- file data


def test_any_range_of_a_file_is_its_bytes(tree: Path, image: Image) -> None:
    generator = random.Random(7)
    for name in ("size-131849", "holes", "tail-hole", "noise", "size-65537", "size-1", "size-0"):
        body = tree.joinpath(name).read_bytes()
        inode = find(image, name.encode())
        for _ in range(60):
            start = generator.randrange(len(body) + 10)
            length = generator.choice((1, 17, 4096, 65536, 200_000, 10_000_000))
            assert b"".join(image.read(inode, start, length)) == body[start : start + length]
        assert image.read(inode, -1, 10) == []
        assert image.read(inode, 0, 0) == []
        assert image.read(inode, 1 << 63, 1 << 20) == []


def test_holes_share_one_buffer_and_take_no_cache(image: Image) -> None:
    inode = find(image, b"all-hole")
    parts = image.read(inode, 0, inode.size)
    assert len(parts) == 3
    assert all(part.obj is parts[0].obj for part in parts if isinstance(part, memoryview))
    assert image.statistics()["data_blocks"] == 0
    assert inode.blocks == 1  # as the kernel reports a file that is one hole: mksquashfs leaves a byte of it


def test_whole_blocks_are_given_uncopied(image: Image) -> None:
    inode = find(image, b"noise")
    key, start, stop = image.plan(inode, 0, 65536)[0]
    assert (start, stop) == (0, 65536)
    assert key is not None
    assert image.read(inode, 0, 65536)[0] is image.load(key)
    part = image.read(inode, 10, 100)[0]
    assert isinstance(part, memoryview)
    assert part.obj is image.load(key)


def test_a_plan_can_be_loaded_ahead_by_other_threads(image: Image) -> None:
    inode = find(image, b"size-131849")
    keys = [key for key, _, _ in image.plan(inode, 0, inode.size) if key]
    assert len(keys) == 3
    assert not any(image.held(key) for key in keys)
    threads = [threading.Thread(target=image.load, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(image.held(key) for key in keys)
    before = image.statistics()["data_misses"]
    list(contents(image, inode))
    assert image.statistics()["data_misses"] == before == 3


def test_threads_that_want_the_same_block_decompress_it_once(image_file: Path) -> None:
    calls = []
    everybody = threading.Barrier(6)
    with opened(image_file) as image:
        inode = find(image, b"size-131849")
        plain = image._metadata._decompress

        def slow(stored: bytes, bound: int) -> bytes:
            calls.append(len(stored))
            return plain(stored, bound)

        image._metadata._decompress = slow
        results = []

        def reader() -> None:
            everybody.wait()
            results.append(b"".join(image.read(inode, 0, inode.size)))

        threads = [threading.Thread(target=reader) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(results)) == 1
        assert len(results) == 6
        assert image.statistics()["data_misses"] == 3
        assert len([size for size in calls if size > 100]) <= 3 + 2  # and at most two of metadata


@pytest.mark.parametrize("cache_size", [0, 100_000, 200_000])
def test_the_block_cache_stays_within_its_bytes(image_file: Path, tree: Path, cache_size: int) -> None:
    with opened(image_file, cache_size=cache_size) as image:
        for name in ("noise", "size-131849", "holes", "noise"):
            inode = find(image, name.encode())
            assert b"".join(image.read(inode, 0, inode.size)) == tree.joinpath(name).read_bytes()
            assert image.statistics()["data_bytes"] <= cache_size


def test_metadata_that_is_kept_stays_within_its_bytes(crowd: Path) -> None:
    with opened(crowd, metadata_size=100_000) as image:
        for entry in list_all(image, image.root_inode):
            list_all(image, image.inode(entry[2]), 1000)
        assert image.statistics()["metadata_blocks"] <= 100_000 // 8192


def test_a_large_file_of_many_blocks_is_read_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with source.joinpath("large").open("wb") as f:  # 600 MiB in blocks of 4 KiB: a block list of 150 segments
        for place in (0, 5_000_000, 400_000_123, (600 << 20) - 4):
            f.seek(place)
            f.write(b"mark")
    path = mksquashfs(source, tmp_path / "image", "-b", "4K", "-comp", "lz4")
    with opened(path) as image:
        inode = find(image, b"large")
        assert inode.size == 600 << 20
        for place in ((600 << 20) - 4, 5_000_000, 400_000_123, 0, (600 << 20) - 4, 400_000_123):
            assert b"".join(image.read(inode, place, 4)) == b"mark"
            if place:
                assert b"".join(image.read(inode, place - 9000, 9000)) == bytes(9000)


# -- the rest


def test_xattrs_are_found_by_their_full_names(image: Image) -> None:
    need_root()
    inode = find(image, b"size-1")
    assert image.has_xattrs
    assert dict(image.xattrs(inode)) == {
        b"trusted.secret": b"\0\1\2",
        b"security.label": b"confined",
        b"user.empty": b"",
    }
    assert image.xattr(inode, b"trusted.secret") == b"\0\1\2"
    assert image.xattr(inode, b"user.empty") == b""
    for missing in (b"secret", b"user.secret", b"user.", b"user.empt", b"user.empty2", b"security.", b""):
        assert image.xattr(inode, missing) is None
    assert image.xattrs(find(image, b"size-0")) == []
    big = image.xattr(find(image, b"small/file 003"), b"user.big")
    assert big is not None
    assert len(big) == 3000


def test_the_summary_says_how_the_image_was_made(tree: Path, tmp_path: Path) -> None:
    options = ("-comp", "xz", "-Xbcj", "x86", "-b", "256K", "-mkfs-time", "1600000000", "-no-fragments")
    with opened(mksquashfs(tree, tmp_path / "image", *options)) as image:
        summary = image.summary()
        assert summary["compressor"] == "xz"
        assert summary["compressor_options"] == {"dictionary": 262144, "filters": "x86"}
        assert summary["block_size"] == 262144
        assert summary["created"] == 1600000000
        assert summary["fragments"] == 0
        assert "no fragments" in summary["flags"]
        assert summary["exportable"] is True
        assert summary["inodes"] == image.superblock.inodes > 700


def test_readlink_and_reading_refuse_what_is_of_another_type(image: Image) -> None:
    with pytest.raises(SquashfsError, match="not a symlink"):
        image.readlink(image.root_inode)
    with pytest.raises(SquashfsError) as failure:
        image.read(image.root_inode, 0, 1)
    assert failure.value.errno == errno.EISDIR
    with pytest.raises(SquashfsError) as failure:
        image.lookup(find(image, b"noise"), b"x")
    assert failure.value.errno == errno.ENOTDIR
    with pytest.raises(SquashfsError) as failure:
        image.attributes(find(image, b"noise"))
    assert failure.value.errno == errno.ENOTDIR


def test_errors_of_the_file_itself_pass_through(image_file: Path) -> None:
    fd = os.open(image_file, os.O_RDONLY)
    image = Image(lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size)
    inode = find(image, b"noise")
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        image.read(inode, 0, 10)
