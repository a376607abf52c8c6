"""Damaged and hostile squashfs images: a SquashfsError or a value, in bounded time and memory, and nothing else."""

from __future__ import annotations

import errno
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusewire.formats.squashfs import Image, NotSquashfsError, SquashfsError, probe
from squashfs_images import (
    ABSENT,
    COMPRESSORS,
    NONE,
    SMALL_CACHES,
    build,
    directory,
    exercise,
    from_bytes,
    header,
    listing,
    make_tree,
    memory,
    metadata,
    mksquashfs,
    need,
    noise,
    packers,
    regular,
    run,
    survive,
    symlink,
    text,
)

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 1 << 31, NONE, 1 << 60, ABSENT]


def refused(data: bytes, match: str = "damaged") -> None:
    with pytest.raises(SquashfsError, match=match) as failure:
        from_bytes(data)
    assert failure.value.errno in (errno.EIO, errno.EINVAL)


def eio(match: str) -> object:
    return pytest.raises(SquashfsError, match=f"damaged squashfs image: .*{match}")


# -- real images, damaged


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A small real image of each compressor, one with nothing compressed, one by another writer."""
    base = tmp_path_factory.mktemp("hostile")
    tree = make_tree(base / "tree", block=4096)
    found = []
    for compressor in COMPRESSORS:
        path = mksquashfs(tree, base / compressor, "-comp", compressor, "-b", "4K", "-nopad")
        found.append(path.read_bytes())
    plain = mksquashfs(tree, base / "plain", "-noI", "-noD", "-noF", "-noX", "-b", "4K", "-nopad")
    found += [plain.read_bytes()] * 3
    other = base / "other"
    run(need("gensquashfs"), "-D", tree, "-c", "gzip", "-b", "4096", "-x", "-q", other)
    found.append(other.read_bytes())
    # Without the padding that some writers add: what is behind bytes_used is not the image.
    return [data[: struct.unpack_from("<Q", data, 40)[0]] for data in found]


def test_the_undamaged_images_are_used_in_full(images: list[bytes]) -> None:
    for data in images:
        assert survive(data) > 100


property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@property_test
@given(data=st.data())
def test_flipped_bits_anywhere_give_eio_at_worst(images: list[bytes], data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from(images)))
    tables = struct.unpack_from("<8Q", image, 32)
    metadata_start = min(tables[3:6])
    for _ in range(data.draw(st.integers(1, 8))):
        # Most of the damage where it matters: the superblock, and the metadata behind the data.
        behind = (metadata_start, len(image))
        low, high = data.draw(st.sampled_from([(0, 96), behind, behind, (96, len(image))]))
        place = data.draw(st.integers(low, high - 1))
        image[place] ^= 1 << data.draw(st.integers(0, 7))
    survive(bytes(image))


@property_test
@given(data=st.data())
def test_fields_of_extreme_values_give_eio_at_worst(images: list[bytes], data: st.DataObject) -> None:
    image = bytearray(data.draw(st.sampled_from(images[6:])))
    tables = struct.unpack_from("<8Q", image, 32)
    start = min(tables[3:6])
    for _ in range(data.draw(st.integers(1, 4))):
        width = data.draw(st.sampled_from([2, 4, 8]))
        low, high = data.draw(st.sampled_from([(0, 96), (start, len(image))]))
        place = data.draw(st.integers(low, high - width))
        value = data.draw(st.sampled_from(EXTREMES))
        image[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    survive(bytes(image))


@property_test
@given(data=st.data())
def test_an_image_cut_off_anywhere_is_refused_or_gives_eio(images: list[bytes], data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(images))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(NotSquashfsError, match=r"cut off|not a squashfs"):
        from_bytes(cut)
    # The same when the file shrinks under an open image: the size is no longer true.
    try:
        image = Image(memory(cut), len(whole), **SMALL_CACHES)
    except SquashfsError:
        return
    exercise(image)


@property_test
@given(st.binary(max_size=400))
def test_no_bytes_at_all_do_more_than_be_refused(junk: bytes) -> None:
    survive(junk)
    survive(b"hsqs" + junk)
    probe(junk)


# -- what is refused at once, and in which words


def test_images_of_other_kinds_are_refused_with_what_they_are() -> None:
    good = build(directory(1, 0), b"x")
    assert from_bytes(good).root_inode.number == 1

    def patched(place: int, form: str, *values: int) -> bytes:
        return good[:place] + struct.pack(form, *values) + good[place + struct.calcsize(form) :]

    refused(b"sqsh" + good[4:], "big-endian.*unsquashfs")
    refused(b"sqlz" + good[4:], "vendor")
    refused(b"nope" + good[4:], "not a squashfs image.*offset=BYTES")
    refused(b"", "not a squashfs image")
    refused(good[:50], "cut off in its superblock")
    refused(good[:-1], "cut off: it needs")
    for major, minor in ((3, 1), (2, 0), (1, 0)):
        refused(patched(28, "<HH", major, minor), f"version {major}.{minor}.*unsquashfs")
    refused(patched(28, "<HH", 4, 1), "version 4.1")
    refused(patched(20, "<H", 9), "unknown compressor")
    refused(patched(20, "<H", 0), "unknown compressor")
    for size, log in ((4096, 13), (2048, 11), (1 << 21, 21), (0, 0), (5000, 12), (4096, 0xFFFF)):
        refused(patched(12, "<I", size)[:22] + struct.pack("<H", log) + good[24:], "impossible block size")
    refused(patched(26, "<H", 0), "impossible superblock")
    refused(patched(32, "<Q", 8192), "impossible superblock")
    for place in (48, 64, 72):  # id, inode and directory tables past the end, at 0, and nowhere
        for value in (len(good), 0, ABSENT, 1 << 60):
            refused(patched(place, "<Q", value), "impossible superblock|damaged")
    refused(patched(16, "<I", 5), "impossible superblock")  # fragments without a table
    refused(patched(88, "<Q", 100), "impossible superblock")  # export table before the directories
    assert from_bytes(patched(80, "<Q", 100)).root_inode.number == 1  # no fragments: their table does not matter
    for offset in (-1, len(good) + 1):
        with pytest.raises(NotSquashfsError, match="outside the file"):
            Image(memory(good), len(good), offset=offset)


def test_a_root_that_is_no_directory_is_refused() -> None:
    refused(build(symlink(1, b"x"), b"x"), "root inode is not a directory")
    refused(build(b"", b"x", inode_blocks=metadata(header(1, 1)[:10])), "cut off")
    refused(build(directory(1, 0), b"x", root=40), "cut off")
    refused(build(directory(1, 0), b"x", root=5 << 16), "damaged")
    refused(build(directory(1, 0), b"x", root=1 << 63), "damaged")


# -- directories


def with_entries(entries: list[tuple[bytes, int, int, int]], inodes: bytes = b"", raw: bytes | None = None) -> Image:
    body = listing(entries) if raw is None else raw
    return from_bytes(build(directory(1, len(body)) + inodes, body))


@pytest.mark.parametrize("name", [b".", b"..", b"a/b", b"/", b"a\0b", b"\0", b"n" * 256])
def test_names_that_no_file_can_have_are_never_passed_on(name: bytes) -> None:
    image = with_entries([(b"!good", 32, 3, 2), (name, 32, 3, 2), (b"zebra", 32, 3, 2)], symlink(2, b"x"))
    root = image.root_inode
    # What lies before the damage is given first, then the damage is told.
    first = image.attributes(root)
    assert [entry[1] for entry in first] == [b"!good"]
    with eio("impossible name"):
        image.attributes(root, first[0][0])
    entries = image.entries(root)
    assert next(entries)[1] == b"!good"
    with eio("impossible name"):
        next(entries)
    try:
        found = image.lookup(root, name)
    except SquashfsError:
        found = None
    assert found is None


def test_a_name_length_beyond_the_listing_is_eio() -> None:
    raw = listing([(b"ok", 32, 3, 2)])
    for length in (2, 100, 254, 255, 0x7FFF, 0xFFFF):
        broken = raw[:18] + struct.pack("<H", length) + raw[20:]
        image = with_entries([], symlink(2, b"x"), broken)
        with eio("impossible name|past the end|cut off"):
            list(image.entries(image.root_inode))
        assert image.lookup(image.root_inode, b"ok") is None


def test_runs_of_absurd_counts_are_eio() -> None:
    for count in (1, 255, 256, 0x7FFFFFFF, NONE):
        raw = struct.pack("<III", count, 0, 0) + listing([(b"only", 32, 3, 2)])[12:]
        image = with_entries([], symlink(2, b"x"), raw)
        with eio("directory"):
            list(image.entries(image.root_inode))
        if count > 255:
            with eio("directory run"):
                image.attributes(image.root_inode)
        else:
            assert [entry[1] for entry in image.attributes(image.root_inode)] == [b"only"]


def test_a_directory_inside_itself_is_eio() -> None:
    image = with_entries([(b"self", 0, 1, 1)])
    for use in (image.attributes, lambda d: list(image.entries(d)), lambda d: image.lookup(d, b"self")):
        with eio("contains itself"):
            use(image.root_inode)


def test_a_directory_that_leads_back_to_the_root_is_eio() -> None:
    first, second = listing([(b"below", 32, 1, 2)]), listing([(b"up", 0, 1, 1)])
    inodes = directory(1, len(first)) + directory(2, len(second), parent=1, offset=len(first))
    image = from_bytes(build(inodes, first + second))
    below = image.inode(image.attributes(image.root_inode)[0][2])
    with eio("contains itself"):
        image.attributes(below)
    with eio("contains itself"):
        image.lookup(below, b"up")


def test_a_loop_through_several_directories_stays_bounded_for_a_bounded_walk() -> None:
    first, second, third = listing([(b"a", 32, 1, 2)]), listing([(b"b", 64, 1, 3)]), listing([(b"c", 32, 1, 2)])
    inodes = directory(1, len(first)) + directory(2, len(second), 1, 0, len(first))
    inodes += directory(3, len(third), 2, 0, len(first) + len(second))
    assert exercise(from_bytes(build(inodes, first + second + third))) == 7


def test_damaged_inodes_are_listed_without_attributes() -> None:
    inodes = symlink(2, b"x") + header(99, 3) + header(3, 4, uid=500) + struct.pack("<II", 1, 0) + bytes(30)
    entries = [(b"far", 8000, 2, 5), (b"good", 32, 3, 2), (b"owner", 73, 3, 4), (b"type", 57, 2, 3)]
    image = with_entries(entries, inodes)
    found = image.attributes(image.root_inode)
    assert [entry[1] for entry in found] == [b"far", b"good", b"owner", b"type"]
    assert [bool(entry[5]) for entry in found] == [False, True, False, False]
    assert [entry[4] for entry in found] == [5, 2, 4, 3]
    for _, name, ref, *_ in found:
        if name != b"good":
            with eio("inode"):
                image.inode(ref)


def test_a_listing_that_ends_with_its_table_is_eio() -> None:
    raw = listing([(b"name", 32, 3, 2)])
    for size in (len(raw) + 1, 60_000):
        image = from_bytes(build(directory(1, size) + symlink(2, b"x"), raw))
        with eio("directory|metadata"):
            list(image.entries(image.root_inode))
    image = from_bytes(build(directory(1, 20, offset=8191), raw))
    with eio("directory"):
        list(image.entries(image.root_inode))
    image = from_bytes(build(directory(1, 20, start=1 << 31), raw))
    with eio("outside"):
        image.lookup(image.root_inode, b"x")


def test_entries_behind_the_end_of_their_directory_are_eio() -> None:
    raw = listing([(b"first", 32, 3, 2), (b"second", 32, 3, 2)])
    image = from_bytes(build(directory(1, len(raw) - 1) + symlink(2, b"x"), raw))
    root = image.root_inode
    (first,) = image.attributes(root)
    assert first[1] == b"first"
    for use in (
        lambda: list(image.entries(root)),
        lambda: image.attributes(root, first[0]),
        lambda: image.lookup(root, b"second"),
    ):
        with eio("cut off"):
            use()
    assert image.lookup(root, b"first") is not None


def indexed(entries: list[tuple[int, int, bytes]], raw: bytes, count: int | None = None) -> Image:
    inode = header(8, 1) + struct.pack(
        "<IIIIHHI", 2, len(raw) + 3, 0, 0, len(entries) if count is None else count, 0, NONE
    )
    for position, block, name in entries:
        inode += struct.pack("<III", position, block, len(name) - 1) + name
    return from_bytes(build(inode + bytes(32), raw))


def test_directory_indexes_that_lie_are_eio_or_find_nothing() -> None:
    raw = listing([(b"aa", 0, 3, 2), (b"mm", 0, 3, 2), (b"zz", 0, 3, 2)])
    for entries in (
        [(500, 0, b"b"), (100, 0, b"c")],  # backwards
        [(0, 1 << 30, b"b")],
        [(NONE, 0, b"b")],
        [(17, 0, b"b"), (18, 0, b"c")],
        [(5, 3, b"b")],
    ):
        image = indexed(entries, raw)
        for name in (b"aa", b"bb", b"mm", b"zz"):
            try:
                assert image.lookup(image.root_inode, name) in (None, (0, 3, 2))
            except SquashfsError:
                pass
    image = indexed([], raw, count=65535)
    with eio("index|metadata"):
        image.lookup(image.root_inode, b"aa")


# -- files


def test_a_file_of_2_to_the_60_bytes_is_eio_at_once() -> None:
    body = struct.pack("<QQQIIII", 96, 1 << 60, 0, 1, NONE, 0, NONE)
    raw = listing([(b"huge", 32, 2, 2)])
    image = from_bytes(build(directory(1, len(raw)) + header(9, 2) + body + bytes(4000), raw))
    huge = image.inode(32)
    assert huge.size == image.attributes(image.root_inode)[0][8] == 1 << 60
    started = time.monotonic()
    for offset in (0, 1 << 40, (1 << 60) - 1):
        with eio("more than its block list can describe"):
            image.read(huge, offset, 4096)
    assert time.monotonic() - started < 1


def test_a_file_of_negative_size_is_eio() -> None:
    for size in (1 << 63, ABSENT):
        body = struct.pack("<QQQIIII", 96, size, 0, 1, NONE, 0, NONE)
        image = from_bytes(build(directory(1, 0) + header(9, 2) + body, b"x"))
        with eio("file of"):
            image.inode(32)


@pytest.mark.parametrize(
    "word", [1 << 24, 1 << 25, 0x01000000 | 5000, 5000, 1 << 31, 0xFFFFFFFF, 0x01000000 | 4095, 7], ids=hex
)
def test_impossible_block_sizes_are_eio(word: int) -> None:
    image = from_bytes(build(directory(1, 0) + regular(2, 4096, [word]), b"x", data=noise(6000)))
    for _ in range(2):  # also when asked again
        with eio("block"):
            image.read(image.inode(32), 0, 10)
    assert image.statistics()["data_bytes"] == 0


def test_blocks_outside_the_image_are_eio() -> None:
    for start in (0, 95, 1 << 20, NONE):
        image = from_bytes(build(directory(1, 0) + regular(2, 4096, [1 << 24 | 4096], start), b"x"))
        with eio("outside the image"):
            image.read(image.inode(32), 0, 10)


def test_a_block_list_that_runs_out_of_its_table_is_eio() -> None:
    image = from_bytes(build(directory(1, 0) + regular(2, 4096 * 3000, [0]), b"x"))
    with eio("block list|more than"):
        image.read(image.inode(32), 4096 * 2500, 10)


def test_fragments_that_lie_are_eio() -> None:
    def tail(number: int, offset: int, size: int, fragments: list[tuple[int, int]]) -> list[bytes | memoryview]:
        inodes = directory(1, 0) + regular(2, size, [], fragment=number, offset=offset)
        image = from_bytes(build(inodes, b"x", data=text(4096), fragments=fragments))
        return image.read(image.inode(32), 0, 4096)

    whole = (96, 1 << 24 | 4096)
    assert b"".join(tail(0, 100, 50, [whole])) == text(4096)[100:150]
    with eio("fragment number"):
        tail(1, 0, 50, [whole])
    with eio("fragment number"):
        tail(NONE - 1, 0, 50, [whole])
    with eio("shorter"):
        tail(0, 4090, 50, [whole])
    with eio("shorter"):
        tail(0, NONE, 50, [whole])
    with eio("no tail"):
        tail(0, 0, 4096, [whole])
    with eio("data block"):
        tail(0, 0, 50, [(96, 0)])
    with eio("outside"):
        tail(0, 0, 50, [(1 << 63, 1 << 24 | 100)])


def test_symlinks_of_absurd_length_are_eio() -> None:
    for size in (65536, 1 << 31, NONE):
        image = from_bytes(build(directory(1, 0) + symlink(2, b"x", size), b"x"))
        with eio("symlink"):
            image.inode(32)
    image = from_bytes(build(directory(1, 0) + symlink(2, b"x", 60000), b"x"))
    with eio("symlink"):
        image.readlink(image.inode(32))
    image = from_bytes(build(directory(1, 0) + symlink(2, b"a\0b"), b"x"))
    with eio("NUL"):
        image.readlink(image.inode(32))


# -- bombs


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_bombs_cost_no_more_than_honest_blocks(compressor: str) -> None:
    if compressor not in packers():
        pytest.skip(f"nothing here compresses {compressor}: pip install 'fusewire[squashfs]'")
    number, pack = packers()[compressor]
    # Zeros that decompress to more than the block's size, from a stored size that is allowed.
    bomb = next(found for size in (24, 20, 17, 16, 15) if len(found := pack(bytes(1 << size))) <= 4096)
    good = pack(directory(1, 0) + regular(2, 4096, [len(bomb)]))
    inode_block = struct.pack("<H", len(good)) + good
    data = build(b"", b"x", data=bomb, compression=number, inode_blocks=inode_block)
    image = from_bytes(data)
    file = image.inode(32)
    tracemalloc.start()
    try:
        with eio("data block"):
            image.read(file, 0, 4096)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        metadata_bomb = struct.pack("<H", len(bomb)) + bomb
        refused(build(b"", b"x", compression=number, inode_blocks=metadata_bomb), "metadata block")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_metadata_blocks_without_bytes_are_eio() -> None:
    for head in (0, 0x8000, 0x8000 | 8193, 0x7FFF, 0xFFFF):
        refused(build(b"", b"x", inode_blocks=struct.pack("<H", head) + bytes(100)), "damaged")
    _, pack = packers()["gzip"]
    empty = pack(b"")
    refused(build(b"", b"x", inode_blocks=struct.pack("<H", len(empty)) + empty), "empty")


def test_a_chain_of_short_metadata_blocks_is_eio() -> None:
    raw = listing([(b"n%03d" % i, 32, 3, 2) for i in range(200)])
    blocks = metadata(raw[:1000]) + metadata(raw[1000:])
    inodes = directory(1, len(raw)) + symlink(2, b"x")
    image = from_bytes(build(inodes, b"", directory_blocks=blocks))
    with eio("table|cut off|metadata"):
        list(image.entries(image.root_inode))


def test_a_sparse_file_of_terabytes_is_read_anywhere_in_bounded_memory() -> None:
    # 2^28 blocks of zeros need 1 GiB of block list; this image has 64 metadata blocks of it and says so when they end.
    _, pack = packers()["gzip"]
    blocks = 64
    head = directory(1, 0) + header(9, 2) + struct.pack("<QQQIIII", 96, blocks * 2000 * 4096, 0, 1, NONE, 0, NONE)
    table = metadata((head + bytes(blocks * 8192))[: blocks * 8192], pack)
    image = from_bytes(build(b"", b"x", inode_blocks=table))
    file = image.inode(32)
    for offset in (file.size - 4096, 0, file.size // 2, file.size - 4096):
        assert b"".join(image.read(file, offset, 4096)) == bytes(4096)
    assert len(image._checkpoints) < 300


# -- tables


def test_id_tables_that_lie_are_refused() -> None:
    good = build(directory(1, 0), b"x")
    refused(good[:26] + struct.pack("<H", 300) + good[28:], "id table")
    image = build(directory(1, 0) + header(3, 2, uid=1) + struct.pack("<II", 1, 0), b"x")
    with eio("owner"):
        from_bytes(image).inode(32)


def with_xattrs(raw: bytes, size: int | None = None, count: int = 1) -> Image:
    inode = header(8, 1) + struct.pack("<IIIIHHI", 2, 3, 0, 0, 0, 0, 0)
    data = build(inode, b"x", xattrs=raw)
    entry = struct.pack("<QII", 0, 1, len(raw))
    assert data.count(entry) == 1
    return from_bytes(data.replace(entry, struct.pack("<QII", 0, count, len(raw) if size is None else size)))


def test_xattrs_that_lie_are_eio() -> None:
    def pair(kind: int, name: bytes, value: bytes, size: int | None = None) -> bytes:
        return (
            struct.pack("<HH", kind, len(name)) + name + struct.pack("<I", len(value) if size is None else size) + value
        )

    good = pair(0, b"name", b"value")
    image = with_xattrs(good)
    assert image.xattrs(image.root_inode) == [(b"user.name", b"value")]
    image = with_xattrs(pair(9, b"odd", b"v") + good, count=2)
    assert image.xattr_names(image.root_inode) == [b"user.name"]
    for raw, count in (
        (good, 2),
        (good, NONE),
        (pair(0, b"name", b"value", 65537), 1),
        (pair(0, b"name", b"value", NONE), 1),
        (pair(0, b"na\0me", b"value"), 1),
        (struct.pack("<HH", 0, 60000) + bytes(100), 1),
        (pair(0x100, b"far", struct.pack("<Q", 1 << 40)), 1),
        (pair(0x100, b"far", struct.pack("<Q", 8190)), 1),
        (pair(0x100, b"far", b"1"), 1),
    ):
        image = with_xattrs(raw, count=count)
        with eio("xattr|metadata|outside"):
            image.xattrs(image.root_inode)
    # A value that stands for itself, over and over, is bounded in all.
    value = struct.pack("<I", 60000) + bytes(60000)
    many = b"".join(pair(0x100, b"%04d" % i, struct.pack("<Q", 0)) for i in range(400))
    start = len(many)
    block = (8192 + 2) * (start // 8192)
    many = many.replace(struct.pack("<I", 8) + bytes(8), struct.pack("<IQ", 8, block << 16 | start % 8192))
    image = with_xattrs(many + value, count=400)
    assert len(image.xattr_names(image.root_inode)) == 400
    with eio("more than 16 MiB"):
        image.xattrs(image.root_inode)


def test_export_tables_that_lie_are_eio(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    source.joinpath("file").touch()
    data = bytearray(mksquashfs(source, tmp_path / "image", "-noI", "-noId").read_bytes())
    (table,) = struct.unpack_from("<Q", data, 88)
    data[table : table + 8] = struct.pack("<Q", 1 << 62)
    with eio("export table points past itself"):
        from_bytes(bytes(data)).find_inode(1)
    data[table : table + 8] = struct.pack("<Q", 1)
    with eio("outside"):
        from_bytes(bytes(data)).find_inode(1)
