"""Tar archives against GNU tar and Python's tarfile: every format, every compressor, and what nobody should write."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import random
import resource
import stat
import struct
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive_trees import make_tree, need, on_disk, opened, refused, run, same, served
from fusewire.formats import archive_streams, archive_tree, archive_zstd
from fusewire.formats.archive_points import FARTHEST, points_of
from fusewire.formats.archive_streams import CHUNK, Decoder, Stream
from fusewire.fs import archive as archive_module
from fusewire.fs.archive import recognise
from fusewire.fs.archive_data import Native
from fusewire.ops import FileRange
from fusewire.testing import body_of
from fusewire.wire import abi
from squashfs_images import noise, text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tarfile")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_tree(tmp_path_factory.mktemp("tar") / "tree")
    try:
        os.setxattr(root / "small", "user.greeting", b"\xff\x00 binary \n=")
        os.setxattr(root / "d", "user.a=b%c", b"odd name")
    except OSError:
        pass  # a filesystem without them: the archives have none either
    return root


def pack(tree: Path, archive: Path, *words: str) -> Path:
    run("tar", "-C", tree, *words, "-cf", archive, ".")
    return archive


def unpack(archive: Path, place: Path) -> Path:
    place.mkdir()
    run("tar", "-C", place, "--xattrs", "--xattrs-include=*", "-xpf", archive)
    return place


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.GNU_FORMAT) -> Path:
    """An archive of files with that content, or of members as they are."""
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def member(name: str, kind: bytes, target: str = "", **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def paths(archive: Path) -> dict[str, Any]:
    """Path -> content, link target or None."""
    with opened(archive) as (_, kernel):
        return {path: row[7] for path, row in served(kernel).items() if path != "."}


# -- The same as what tar unpacks


@pytest.mark.parametrize(
    "words",
    [
        ("--format=gnu",),
        ("--format=gnu", "-S"),
        ("--format=oldgnu", "-S"),
        ("--format=posix", "--xattrs"),
        ("--format=posix", "--xattrs", "-S", "--sparse-version=0.0"),
        ("--format=posix", "--xattrs", "-S", "--sparse-version=0.1"),
        ("--format=posix", "--xattrs", "-S", "--sparse-version=1.0"),
    ],
    ids=" ".join,
)
def test_what_is_shown_is_what_gnu_tar_unpacks(tree: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    archive = pack(tree, tmp_path / "a.tar", *words)
    with opened(archive) as (filesystem, kernel):
        same(served(kernel), on_disk(unpack(archive, tmp_path / "out")))
        assert filesystem.notes == []


@pytest.mark.parametrize("form", ["ustar", "v7"])
def test_old_formats_are_shown_as_gnu_tar_unpacks_them(tmp_path: Path, form: str) -> None:
    root = tmp_path / "tree"
    (root / "d").mkdir(parents=True)
    (root / "d" / "file").write_bytes(b"content")
    (root / "link").symlink_to("d/file")
    os.link(root / "d" / "file", root / "hard")
    archive = pack(root, tmp_path / "a.tar", f"--format={form}")
    with opened(archive) as (_, kernel):
        same(served(kernel), on_disk(unpack(archive, tmp_path / "out")))


def zstd_frames(plain: Path, out: Path) -> None:
    """Frames of 1 MB that say their size, one after another, as pzstd makes them."""
    zstd = archive_streams.zstd_module()
    data = plain.read_bytes()
    out.write_bytes(b"".join(zstd.compress(data[at : at + 1_000_000]) for at in range(0, len(data), 1_000_000)))


def zstd_seekable(plain: Path, out: Path) -> None:
    """The seekable format: frames that do not say their size, and a table of them at the end."""
    zstd = archive_streams.zstd_module()
    data = plain.read_bytes()
    packed, table = b"", b""
    for at in range(0, len(data), 700_000):
        piece = data[at : at + 700_000]
        compressor = zstd.ZstdCompressor()
        frame = compressor.compress(piece[:1]) + compressor.compress(piece[1:]) + compressor.flush()
        packed += frame
        table += struct.pack("<II", len(frame), len(piece))
    count = len(table) // 8
    table += struct.pack("<IBI", count, 0, 0x8F92EAB1)
    out.write_bytes(packed + struct.pack("<II", 0x184D2A5E, len(table)) + table)


COMPRESSORS: dict[str, tuple[str | Callable[[Path, Path], None], str]] = {
    "gz": ("gzip -kc {0} > {1}", "Stream"),
    "gz-members": ("head -c 3000000 {0} | gzip -c > {1}; tail -c +3000001 {0} | gzip -c >> {1}", "Stream"),
    "gz-padded": ("gzip -kc {0} > {1}; head -c 600 /dev/zero >> {1}", "Stream"),
    "xz-blocks": ("xz -T2 --block-size=1MiB -kc {0} > {1}", "Stream"),
    "xz-one": ("xz -T1 -kc {0} > {1}", "Stream"),
    "xz-streams": ("head -c 2000000 {0} | xz -c > {1}; tail -c +2000001 {0} | xz -c >> {1}", "Stream"),
    "bz2": ("bzip2 -kc {0} > {1}", "Spooled"),
    "zst-one": ("zstd -q -c {0} > {1}", "Stream"),
    "zst-pipe": ("zstd -q -c < {0} > {1}", "Spooled"),
    "zst-frames": (zstd_frames, "Stream"),
    "zst-seekable": (zstd_seekable, "Stream"),
}


def compress(kind: str, plain: Path, out: Path) -> Path:
    how = COMPRESSORS[kind][0]
    if callable(how):
        try:
            how(plain, out)
        except ImportError:
            pytest.skip("no zstd module: backports.zstd is missing")
    else:
        need(kind.partition("-")[0].replace("gz", "gzip").replace("bz2", "bzip2").replace("zst", "zstd"))
        run("sh", "-c", how.format(plain, out))
    return out


@pytest.fixture
def without_rapidgzip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_has_rapidgzip", lambda: False)


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.usefixtures("without_rapidgzip")
def test_a_compressed_archive_shows_what_the_plain_one_shows(tree: Path, tmp_path: Path, kind: str) -> None:
    plain = pack(tree, tmp_path / "a.tar", "--format=posix", "-S", "--xattrs")
    packed = compress(kind, plain, tmp_path / "a")
    with opened(plain) as (_, kernel):
        wanted = served(kernel)
    for _ in range(2):  # the second time with the index from the cache
        with opened(packed, cache=str(tmp_path / "cache")) as (filesystem, kernel):
            assert type(filesystem._reader).__name__ == COMPRESSORS[kind][1]
            same(served(kernel), wanted)


@pytest.mark.parametrize("kind", ["gz", "bz2"])
def test_rapidgzip_shows_the_same_and_its_places_are_kept(tree: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("rapidgzip", reason="the library of the extra `archives` is missing")
    plain = pack(tree, tmp_path / "a.tar", "--format=posix")
    packed = compress(kind, plain, tmp_path / "a")
    with opened(plain) as (_, kernel):
        wanted = served(kernel)
    threads = len(os.listdir("/proc/self/task"))
    for _ in range(2):
        with opened(packed, cache=str(tmp_path / "cache")) as (filesystem, kernel):
            assert type(filesystem._reader).__name__ == "Native"
            assert len(os.listdir("/proc/self/task")) == threads  # a namespace may still have to be entered
            same(served(kernel), wanted)


@pytest.mark.parametrize("kind", ["gz", "xz-blocks", "xz-one", "zst-frames", "zst-pipe", "bz2"])
@pytest.mark.usefixtures("without_rapidgzip")
def test_reads_at_random_places_give_what_is_there(tmp_path: Path, kind: str) -> None:
    data = text(1_000_000) * 3 + b"".join(noise(300_000, seed) for seed in range(5))
    packed = compress(kind, tar(tmp_path / "a.tar", ("big", data)), tmp_path / "a")
    generator = random.Random(1)
    with opened(packed, "cache_size=1M") as (_, kernel):
        nodeid = kernel.lookup(1, b"big").nodeid
        for _ in range(25):
            offset, size = generator.randrange(len(data) + 1000), generator.choice([1, 4096, 131072, 1 << 20])
            assert kernel.read(nodeid, 0, offset, size) == data[offset : offset + size]


def test_plain_data_are_given_as_ranges_of_the_file(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", ("f", text(100_000)))
    with opened(archive) as (filesystem, kernel):
        found = filesystem.read(kernel.lookup(1, b"f").nodeid, 0, 1000, 5000, 0, 0, 0)
        assert isinstance(found, FileRange)
        assert os.pread(found.fd, found.size, found.offset) == text(100_000)[1000:6000]


@pytest.mark.parametrize("form", ["tar", "gz", "zip"])
def test_an_archive_that_is_replaced_stays_and_one_that_is_cut_off_is_an_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("f", noise(300_000))
    else:
        tar(path, ("f", noise(300_000)))
    if form == "gz":
        path = compress("gz", path, tmp_path / "a.gz")
    with opened(path) as (_, kernel):
        nodeid = kernel.lookup(1, b"f").nodeid
        path.rename(tmp_path / "old")
        path.write_bytes(b"something else")
        assert kernel.read(nodeid, 0, 200_000, 5000) == noise(300_000)[200_000:205_000]
    with opened(tmp_path / "old") as (_, kernel):
        os.truncate(tmp_path / "old", 150_000)
        if form == "gz":
            return  # what is decompressed already may be given
        assert kernel.read(nodeid, 0, 0, 5000) == noise(300_000)[:5000]
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            kernel.read(nodeid, 0, 200_000, 5000)


def test_an_archive_may_begin_behind_something_else(tmp_path: Path) -> None:
    plain = tar(tmp_path / "a.tar", ("f", text(100_000)))
    for name, data in (("plain", plain.read_bytes()), ("gz", gzip.compress(plain.read_bytes()))):
        path = tmp_path / name
        path.write_bytes(b"x" * 777 + data)
        with opened(path, "offset=777") as (_, kernel):
            assert kernel.read_file(b"f") == text(100_000)


def test_copies_of_zlibs_state_make_far_places_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_streams, "SPACING", 1 << 20)
    data = noise(6_000_000)
    packed = gzip.compress(data, 1)
    reads: list[int] = []

    def pread(offset: int, size: int) -> bytes:
        reads.append(offset)
        return packed[offset : offset + size]

    points = points_of("gz", pread, len(packed))
    assert points is not None
    stream = Stream(points, archive_streams.Chunks(1), copies=4)
    assert b"".join(stream.read(0, len(data))) == data
    assert 3 <= len(points) <= 4  # one of two was dropped, and the others are twice as far apart
    stream._cursors.clear()
    reads.clear()
    assert b"".join(stream.read(5_000_000, 10)) == data[5_000_000:5_000_010]
    assert min(reads) > 2_000_000


def test_what_is_kept_for_a_place_to_begin_is_zlibs_state_and_little_else() -> None:
    packed = gzip.compress(noise(12_000_000), 1)
    points = points_of("gz", lambda offset, size: packed[offset : offset + size], len(packed))
    assert points is not None
    stream = Stream(points, archive_streams.Chunks(1), copies=100)
    stream.read(0, 1)
    tracemalloc.start()
    try:
        stream.read(11_900_000, 1)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(points) > 20
    assert held / len(points) < 64 << 10


@pytest.mark.parametrize("size", [6_000_000, 12_000_000])
def test_rapidgzip_is_given_places_to_begin_that_are_near_to_each_other(tmp_path: Path, size: int) -> None:
    pytest.importorskip("rapidgzip", reason="the library of the extra `archives` is missing")
    packed = compress("gz", tar(tmp_path / "a.tar", ("f", noise(size))), tmp_path / "a")
    with opened(packed, cache=str(tmp_path / "cache")):
        pass
    with opened(packed, cache=str(tmp_path / "cache")) as (filesystem, kernel):
        assert kernel.read(kernel.lookup(1, b"f").nodeid, 0, size - 5, 100) == noise(size)[-5:]
        reader = filesystem._reader
        assert isinstance(reader, Native)
        places = sorted(reader._file.block_offsets().values())
        assert max(after - before for before, after in pairwise(places)) < 1 << 20


def test_holes_are_found_by_lseek(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
        file.truncate(3 << 20)
    run("tar", "-C", tmp_path, "-S", "-cf", tmp_path / "a.tar", "sparse")
    with opened(tmp_path / "a.tar") as (_, kernel):
        entry = kernel.lookup(1, b"sparse")
        assert entry.attr[2] < 100  # blocks
        assert kernel.lseek(entry.nodeid, 0, 0, os.SEEK_DATA) == 1 << 20
        assert kernel.lseek(entry.nodeid, 0, 0, os.SEEK_HOLE) == 0
        assert kernel.lseek(entry.nodeid, 0, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            kernel.lseek(entry.nodeid, 0, 2 << 20, os.SEEK_DATA)


def test_attributes_that_only_pax_headers_hold(tmp_path: Path) -> None:
    info = tarfile.TarInfo("f")
    info.pax_headers = {
        "mtime": "-12.25",
        "atime": "4000000000.000000001",
        "ctime": "1.5",
        "uid": "4000000000",
        "gid": "99999999999",
        "SCHILY.xattr.user.x": "value",
        "LIBARCHIVE.xattr.user.y%20z": "AAEC",
        "RHT.security.selinux": "label",
    }
    archive = tar(tmp_path / "a.tar", info, form=tarfile.PAX_FORMAT)
    with opened(archive) as (_, kernel):
        entry = kernel.lookup(1, b"f")
        attr = entry.attr
        assert (attr[3], attr[6]) == (4_000_000_000, 1)
        assert (attr[4] - (1 << 64), attr[7]) == (-13, 750_000_000)
        assert (attr[5], attr[8]) == (1, 500_000_000)
        assert (attr[11], attr[12]) == (4_000_000_000, 65534)
        assert kernel.getxattr(entry.nodeid, b"user.x") == b"value"
        assert kernel.getxattr(entry.nodeid, b"user.y z") == b"\0\1\2"
        assert kernel.getxattr(entry.nodeid, b"security.selinux") == b"label\0"


def test_owners_and_modes_can_be_overridden(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", member("f", tarfile.REGTYPE, mode=0o777, uid=5, gid=6))
    with opened(archive, "uid=1,gid=2,umask=022") as (_, kernel):
        attr = kernel.lookup(1, b"f").attr
        assert (attr[9], attr[11], attr[12]) == (0o100755, 1, 2)


# -- What paths mean


def test_no_name_leads_above_the_root(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar",
        ("/absolute", b"1"),
        ("../../outside", b"2"),
        ("./dot/./../b", b"3"),
        ("c//d///e", b"4"),
        ("dot/..", b"5"),
        ("..", b"6"),
    )
    assert paths(archive) == {
        "absolute": b"1",
        "outside": b"2",
        "dot": None,
        "b": b"3",
        "c": None,
        "c/d": None,
        "c/d/e": b"4",
    }


def test_missing_parents_are_made_and_their_own_members_may_come_later(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", ("a/b/c", b""), member("a", tarfile.DIRTYPE, mode=0o700, uid=9, mtime=77))
    with opened(archive) as (_, kernel):
        entry = kernel.lookup(1, b"a")
        assert (entry.attr[9], entry.attr[11], entry.attr[4], entry.attr[10]) == (0o040700, 9, 77, 3)
        assert kernel.lookup(entry.nodeid, b"b").attr[9] == 0o040755


def test_the_last_of_two_members_wins(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar",
        ("f", b"old"),
        member("keeps", tarfile.LNKTYPE, "f"),
        ("f", b"new and longer"),
        ("d/inner", b"x"),
        ("d", b"a directory stays one while something is in it"),
        member("was a directory", tarfile.DIRTYPE),
        ("was a directory", b"file"),
    )
    assert paths(archive) == {
        "f": b"new and longer",
        "keeps": b"old",
        "d": None,
        "d/inner": b"x",
        "was a directory": b"file",
    }


def test_a_link_as_parent_is_followed_within_the_archive(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar",
        member("usr/lib", tarfile.DIRTYPE),
        member("lib", tarfile.SYMTYPE, "usr/lib"),
        ("lib/a", b"1"),
        member("up", tarfile.SYMTYPE, "../../../usr"),
        ("up/b", b"2"),
        member("abs", tarfile.SYMTYPE, "/usr/lib"),
        ("abs/c", b"3"),
        member("loop", tarfile.SYMTYPE, "loop"),
        ("loop/d", b"4"),
        member("out", tarfile.SYMTYPE, "/etc"),
        ("out/passwd", b"5"),
    )
    found = paths(archive)
    assert {path: data for path, data in found.items() if path.startswith("usr")} == {
        "usr": None,
        "usr/lib": None,
        "usr/lib/a": b"1",
        "usr/b": b"2",
        "usr/lib/c": b"3",
    }
    assert found["loop"] == b"loop"
    assert found["out"] == b"/etc"
    assert b"4" not in found.values()
    assert b"5" not in found.values()


def test_hard_links_forward_in_circles_and_to_nothing(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar",
        member("before", tarfile.LNKTYPE, "f"),
        member("second", tarfile.LNKTYPE, "before"),
        ("f", b"data"),
        member("self", tarfile.LNKTYPE, "self"),
        member("x", tarfile.LNKTYPE, "y"),
        member("y", tarfile.LNKTYPE, "x"),
        member("nowhere", tarfile.LNKTYPE, "nothing"),
        member("above", tarfile.LNKTYPE, "../f"),
        member("directory", tarfile.LNKTYPE, "."),
    )
    with opened(archive) as (filesystem, kernel):
        entries = dict(kernel.walk())
        assert sorted(entries) == [b"above", b"before", b"f", b"second"]
        assert {entry.nodeid for entry in entries.values()} == {entries[b"f"].nodeid}
        assert entries[b"f"].attr[10] == 4
        assert "hard link" in filesystem.notes[0]
        assert "5 times" in filesystem.notes[0]


def test_names_that_no_directory_can_hold_are_left_out_and_said(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "a.tar",
        ("n" * 255, b"1"),
        ("n" * 256, b"2"),
        ("m" * 300 + "/x", b"3"),
        ("/".join("deep" for _ in range(20_000)), b"4"),
        ("ok", b"5"),
        member("no target", tarfile.SYMTYPE, ""),
        member("long target", tarfile.SYMTYPE, "t" * 5000),
        member("volume", b"V"),
    )
    with opened(archive) as (filesystem, kernel):
        assert sorted(path for path, _ in kernel.walk()) == [b"n" * 255, b"ok"]
        assert len(filesystem.notes) >= 3
        assert all("a.tar: left out: " in note for note in filesystem.notes)


def test_a_name_with_nul_in_a_pax_header_is_left_out(tmp_path: Path) -> None:
    info = tarfile.TarInfo("f")
    info.pax_headers = {"path": "a\0b"}
    archive = tar(tmp_path / "a.tar", info, ("ok", b""), form=tarfile.PAX_FORMAT)
    assert list(paths(archive)) == ["ok"]


def test_a_listing_is_in_the_archives_order_and_goes_on_at_any_cookie(tmp_path: Path) -> None:
    names = [f"{number * 7919 % 1000:03}" for number in range(1000)]
    archive = tar(tmp_path / "a.tar", *((name, b"") for name in names))
    with opened(archive) as (_, kernel):
        for read in (kernel.readdir, kernel.readdirplus):
            found, offset = [], 0
            while entries := read(1, 0, offset, 1000):
                found += [entry.name for entry in entries]
                offset = entries[-1].cookie
            assert found == [b".", b"..", *(name.encode() for name in names)]
            assert read(1, 0, (1 << 64) - 1, 4096) == []
        assert all(kernel.lookup(1, name.encode()).nodeid for name in names)
        assert kernel.lookup(1, b"0005").nodeid == 0


@pytest.mark.parametrize("nodeid", [3, 1000, 1 << 40, (1 << 64) - 1])
def test_a_forged_node_id_is_an_error_and_nothing_else(tmp_path: Path, nodeid: int) -> None:
    with opened(tar(tmp_path / "a.tar", ("f", b""))) as (_, kernel):
        for ask in (kernel.getattr, kernel.readlink, kernel.readdir, kernel.readdirplus):
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                ask(nodeid, *([0] if "dir" in ask.__name__ else []))


# -- Recognised by content


def test_archives_are_recognised_by_their_content_alone(tmp_path: Path) -> None:
    plain = tar(tmp_path / "a.tar", ("f", b"x" * 2000)).read_bytes()
    v7 = pack(tmp_path, tmp_path / "v7.tar", "--format=v7", "--exclude=*").read_bytes()
    empty = bytes(10240)
    cases = [
        (plain, "tar"),
        (v7, "tar"),
        (empty, "tar"),
        (gzip.compress(plain), "tar.gz"),
        (lzma.compress(plain), "tar.xz"),
        (gzip.compress(empty), "tar.gz"),
        (gzip.compress(b"just text" * 1000), None),
        (lzma.compress(b""), None),
        (b"\x1f\x8b\x08" + b"x" * 100, None),
        (bytes(1 << 20), None),
        (b"hsqs" + bytes(200), None),
        (b"", None),
        (b"x", None),
    ]
    for data, kind in cases:
        assert recognise(lambda offset, size, data=data: data[offset : offset + size], len(data)) == kind


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.tar"
    path.write_bytes(b"this is no archive\n" * 100)
    assert refused(path, "not an archive").errno == errno.EINVAL


# -- Damaged and hostile


def test_a_truncated_archive_is_refused_not_half_shown(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", *((f"f{number}", noise(5000, number)) for number in range(20))).read_bytes()
    path = tmp_path / "cut"
    for length in (600, 5000, 20_000, 60_001, 100_000):
        path.write_bytes(whole[:length])
        refused(path, "damaged archive.*complete")


@pytest.mark.parametrize("kind", ["gz", "xz-blocks", "bz2", "zst-one", "zst-frames"])
@pytest.mark.usefixtures("without_rapidgzip")
def test_truncated_compressed_archives_are_refused(tmp_path: Path, kind: str) -> None:
    plain = tar(tmp_path / "a.tar", *((f"f{number}", noise(50_000, number)) for number in range(40)))
    packed = compress(kind, plain, tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(packed[: len(packed) // 2])
    refused(path, "damaged archive")


def test_a_flipped_bit_in_compressed_data_is_an_error_of_its_reader(tmp_path: Path) -> None:
    data = noise(3_000_000)
    plain = tar(tmp_path / "a.tar", ("first", b"1"), ("big", data))
    packed = bytearray(lzma.compress(plain.read_bytes(), preset=0))
    cache = str(tmp_path / "cache")
    path = tmp_path / "a.tar.xz"
    path.write_bytes(packed)
    with opened(path, cache=cache) as (_, kernel):
        assert kernel.read_file(b"big") == data
    packed[len(packed) // 2] ^= 1
    state = path.stat()
    path.write_bytes(packed)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    refused(path, "damaged archive", cache=cache)  # not taken for the old one: its ctime has changed


def header(name: bytes, size: bytes = b"00000000000", kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "data",
    [
        header(b"f", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7) + bytes(2048),  # 2^63
        header(b"f", b"\xff" * 12) + bytes(2048),  # -1
        header(b"f", b"\xff" + b"\x80" + bytes(10)) + bytes(2048),  # far below 0
        header(b"f", b"77777777777") + bytes(2048),  # 8 GiB that are not there
        header(b"x", b"77777777777", b"x") + bytes(2048),  # a pax header of 8 GiB
        header(b"x", b"\xff" * 12, b"x") + bytes(2048),
        header(b"x", b"\xff" * 12, b"L") + bytes(2048),
        header(b"x", b"00000001000", b"x") + b"99999999999 a=b\n".ljust(512, b"\0") + header(b"f") + bytes(1024),
        header(b"x", b"00000001000", b"x") + b"12 size=-99\n".ljust(512, b"\0") + header(b"f") + bytes(1024),
        header(b"x", b"00000001000", b"x") + b"20 size=-9999999999\n".ljust(512, b"\0") + header(b"f") + bytes(1024),
        b"".join(header(b"x", b"0" * 11, b"x") for _ in range(3000)) + header(b"f") + bytes(1024),
        header(b"f") + b"garbage".ljust(512, b"!") + bytes(1024),
        header(b"s", b"0" * 11, b"S") + bytes(2048),
    ],
)
def test_hostile_headers_are_refused_or_harmless(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(data)
    said = survived(path)
    assert said is None or "hostile: damaged archive" in str(said)


def survived(path: Path) -> OSError | None:
    """Open an archive and look at everything in it; give the error that this came to."""
    try:
        with opened(path) as (_, kernel):
            for _, entry in kernel.walk():
                if stat.S_ISREG(entry.attr[9]):
                    kernel.read(entry.nodeid, 0, 0, 4096)
    except OSError as error:
        return error
    return None


def test_a_sparse_map_that_lies_is_refused(tmp_path: Path) -> None:
    for held in ("5,10,3,10", "0,999999", "0,-5", "a,b"):
        info = tarfile.TarInfo("f")
        info.size = 100
        info.pax_headers = {"GNU.sparse.map": held, "GNU.sparse.size": "1000"}
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info, io.BytesIO(bytes(100)))
        refused(path, "damaged archive")


def test_names_of_directories_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_tree, "_IMPLIED", 4000)
    with opened(tar(tmp_path / "deep.tar", ("a/" * 3000 + "f", b"deep"))) as (_, kernel):
        nodeid = 1
        for _ in range(3000):
            nodeid = kernel.lookup(nodeid, b"a").nodeid
        assert kernel.read(kernel.lookup(nodeid, b"f").nodeid, 0, 0, 10) == b"deep"
    wide = tar(tmp_path / "a.tar", *((f"{number}/" + "a/" * 3000 + "f", b"") for number in range(4)))
    assert refused(wide, "too many directories").errno == errno.EFBIG


def test_links_to_paths_of_links_cost_no_more_than_forty(tmp_path: Path) -> None:
    links = [member("l0", tarfile.SYMTYPE, ".")]
    links += [member(f"l{n}", tarfile.SYMTYPE, "/".join([f"l{n - 1}"] * 300)) for n in range(1, 12)]
    found = paths(tar(tmp_path / "a.tar", *links, ("l1/f", b""), ("l0/g", b"g")))
    assert found["g"] == b"g"
    assert sorted(found) == sorted([*(f"l{n}" for n in range(12)), "g"])  # l1 leads through 300 links


def test_a_long_chain_of_hard_links_forward_is_followed(tmp_path: Path) -> None:
    chain = [member(f"h{n:03}", tarfile.LNKTYPE, f"h{n + 1:03}") for n in range(500)]
    with opened(tar(tmp_path / "a.tar", *chain, ("h500", b"end"))) as (filesystem, kernel):
        assert filesystem.notes == []
        assert kernel.lookup(1, b"h000").attr[10] == 501
        assert kernel.read_file(b"h000") == b"end"


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("size", ["-5", "-600", str(1 << 70), "100000"])
def test_an_impossible_size_never_hides_a_member(tmp_path: Path, place: str, size: str) -> None:
    wrong = member("wrong", tarfile.REGTYPE, pax_headers={"size": size})
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [("f", b"1"), ("g", b"2")]
    members.insert({"first": 0, "middle": 1, "last": 2}[place], wrong)
    refused(tar(tmp_path / "a.tar", *members, form=tarfile.PAX_FORMAT), "damaged archive")


def test_a_file_of_very_many_pieces_is_read_at_once(tmp_path: Path) -> None:
    count = 50_000
    held = b"%d\n" % count + b"".join(b"%d\n1\n" % (2 * number) for number in range(count))
    held += bytes(-len(held) % 512)
    info = tarfile.TarInfo("f")
    info.size = len(held) + count
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2 * count)}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(held + b"x" * count))
    with opened(path) as (filesystem, kernel):
        entry = kernel.lookup(1, b"f")
        assert entry.attr[2] == (count + 511) // 512
        assert kernel.read_file(b"f") == b"x\0" * count
        assert len(filesystem.read(entry.nodeid, 0, 999, 70_000, 0, 0, 0)) == 1
        assert kernel.read(entry.nodeid, 0, 999, 4) == b"\0x\0x"


def test_a_bomb_costs_what_is_read_of_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.xz"
    huge = 80 << 20
    info = tarfile.TarInfo("zeros")
    info.size = huge
    compressor = lzma.LZMACompressor(preset=0)
    with path.open("wb") as file:
        file.write(compressor.compress(info.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(huge >> 20):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.compress(bytes(1024)) + compressor.flush())
    assert path.stat().st_size < 1 << 20
    assert refused(path, "spool_size", spool_size=1 << 20).errno == errno.EFBIG
    with opened(path, spool=[str(tmp_path)]) as (filesystem, kernel):
        assert huge > FARTHEST
        assert type(filesystem._reader).__name__ == "Spooled"
        assert kernel.read(kernel.lookup(1, b"zeros").nodeid, 0, huge - 5, 100) == bytes(5)
    assert os.listdir(tmp_path) == ["bomb.tar.xz"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_give_an_error_or_a_tree(tmp_path: Path, data: st.DataObject) -> None:
    place = tmp_path / "original"
    if not place.exists():
        info = tarfile.TarInfo("pax")
        info.pax_headers = {"mtime": "1.5", "SCHILY.xattr.user.a": "b", "path": "p" * 150}
        tar(place, ("f", b"1" * 600), member("l", tarfile.LNKTYPE, "f"), info, form=tarfile.PAX_FORMAT)
    whole = bytearray(place.read_bytes()[:8192])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    # Checksums that fit, so that the damage is not seen by them.
    for at in range(0, 4096, 512):
        if whole[at + 257 : at + 262] == b"ustar":
            whole[at + 148 : at + 156] = b" " * 8
            whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    said = survived(path)
    assert said is None or said.errno in (errno.EIO, errno.EINVAL)


def test_long_waits_are_answered_later_and_may_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_streams, "_STRIDE", CHUNK)
    data = text(3_000_000)
    packed = compress("zst-pipe", tar(tmp_path / "a.tar", ("f", data)), tmp_path / "a")
    cache = str(tmp_path / "cache")
    with opened(packed, cache=cache):
        pass
    with opened(packed, cache=cache) as (filesystem, kernel):  # nothing is decompressed yet
        nodeid = kernel.lookup(1, b"f").nodeid
        assert kernel.read(nodeid, 0, 2_900_000, 5000) == data[2_900_000:2_905_000]
        assert kernel.read(nodeid, 0, 0, 5000) == data[:5000]
        assert not filesystem._waiting._jobs


class Slow:
    """A reader that comes nearer only when it is told to."""

    consumed = 0

    def __init__(self) -> None:
        self.near = threading.Event()

    def ready(self, offset: int, length: int) -> bool:
        return False

    def approach(self, offset: int, length: int) -> bool:
        return self.near.is_set()

    def read(self, offset: int, length: int) -> list[bytes]:
        return [bytes([offset % 251]) * length]


def test_a_reader_that_gives_up_is_let_go_and_others_go_on(tmp_path: Path) -> None:
    with opened(tar(tmp_path / "a.tar", ("f", text(100_000)))) as (filesystem, kernel):
        slow = Slow()
        filesystem._reader = slow
        nodeid = kernel.lookup(1, b"f").nodeid
        begin = filesystem.tree.node(nodeid - 1)[12]
        started = [kernel.start(abi.FUSE_READ, nodeid, body_of("read", 0, at, 10, 0, 0, 0)) for at in (0, 5000, 9000)]
        assert not any(kernel.answered(unique) for unique in started)
        assert kernel.interrupt(started[1])
        with pytest.raises(InterruptedError):
            kernel.finish(started[1])
        assert kernel.lookup(1, b"f").nodeid == nodeid
        slow.near.set()
        for unique, at in ((started[0], 0), (started[2], 9000)):
            assert kernel.finish(unique) == bytes([(begin + at) % 251]) * 10


def test_no_memory_for_one_reader_is_no_end_for_the_others(tmp_path: Path) -> None:
    class Short(Slow):
        def read(self, offset: int, length: int) -> list[bytes]:
            if length == 10:
                raise MemoryError
            return super().read(offset, length)

    with opened(tar(tmp_path / "a.tar", ("f", text(100_000)))) as (filesystem, kernel):
        slow = filesystem._reader = Short()
        nodeid = kernel.lookup(1, b"f").nodeid
        started = [kernel.start(abi.FUSE_READ, nodeid, body_of("read", 0, 0, size, 0, 0, 0)) for size in (10, 11)]
        slow.near.set()
        with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
            kernel.finish(started[0])
        assert len(kernel.finish(started[1])) == 11


def test_who_waits_when_it_is_unmounted_gets_an_answer(tmp_path: Path) -> None:
    with opened(tar(tmp_path / "a.tar", ("f", text(100_000)))) as (filesystem, kernel):
        filesystem._reader = Slow()
        nodeid = kernel.lookup(1, b"f").nodeid
        started = kernel.start(abi.FUSE_READ, nodeid, body_of("read", 0, 0, 10, 0, 0, 0))
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        kernel.finish(started)


def no_zstd_module() -> Any:
    raise ModuleNotFoundError("No module named 'backports.zstd'", name="backports.zstd")


def test_without_a_library_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libzstd.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(archive_streams, "zstd_module", no_zstd_module)
    monkeypatch.setattr(archive_zstd, "libzstd", missing)
    path = tmp_path / "a.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    assert refused(path, r"pip install 'fusewire\[archives\]', or install Debian's libzstd1").errno == errno.ENOPKG


@pytest.fixture
def only_libzstd(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        archive_zstd.libzstd()
    except OSError:
        pytest.skip("libzstd.so.1 is missing")
    monkeypatch.setattr(archive_streams, "zstd_module", no_zstd_module)


@pytest.mark.parametrize("kind", ["zst-frames", "zst-pipe"])
def test_the_systems_libzstd_is_enough(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    data = text(1_000_000) * 3 + noise(300_000)
    packed = compress(kind, tar(tmp_path / "a.tar", ("f", data)), tmp_path / "a")
    request.getfixturevalue("only_libzstd")
    with opened(packed) as (_, kernel):
        assert kernel.read_file(b"f") == data
        nodeid = kernel.lookup(1, b"f").nodeid
        for offset in (2_999_999, 5, 1_234_567):
            assert kernel.read(nodeid, 0, offset, 70_000) == data[offset : offset + 70_000]


@pytest.mark.usefixtures("only_libzstd")
def test_libzstd_refuses_what_is_damaged_cut_off_or_wants_too_much_memory(tmp_path: Path) -> None:
    whole = compress("zst-pipe", tar(tmp_path / "a.tar", ("f", text(500_000))), tmp_path / "a").read_bytes()
    wide = whole[:4] + bytes([whole[4] & ~0x20, 20 << 3]) + whole[6:]  # a window of 1 GiB
    for name, data in (("flip", whole[:20] + b"\xff\xff" + whole[22:]), ("cut", whole[:-20]), ("wide", wide)):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "damaged archive|not an archive")


# -- The cache of indexes


def test_the_index_is_built_once(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", ("f", b"data"), member("bad", tarfile.LNKTYPE, "nothing"))
    cache = str(tmp_path / "cache")
    heard: list[tuple[int, int]] = []
    for count in (1, 2):
        with opened(archive, cache=cache, progress=lambda *said: heard.append(said)) as (filesystem, kernel):
            assert kernel.read_file(b"f") == b"data"
            assert len(filesystem.notes) == 1
        if count == 1:
            assert heard
            assert heard[-1][1] == archive.stat().st_size
            heard.clear()
    assert heard == []
    (index,) = Path(cache).iterdir()
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(cache).stat().st_mode) == 0o700


def test_a_changed_archive_has_another_index(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    path = tar(tmp_path / "a.tar", ("f", b"old"))
    for content in (b"old", b"new"):
        tar(path, ("f", content))
        with opened(path, cache=cache) as (_, kernel):
            assert kernel.read_file(b"f") == content


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "version", "link", "fifo", "foreign", "writable", "longer"])
def test_a_cache_file_that_cannot_be_trusted_is_built_anew(tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    path = tar(tmp_path / "a.tar", ("f", b"data"))
    with opened(path, cache=str(cache)):
        pass
    (index,) = cache.iterdir()
    whole = index.read_bytes()
    if damage == "flip":
        index.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    elif damage == "cut":
        index.write_bytes(whole[:-10])
    elif damage == "longer":
        index.write_bytes(whole + b"x")
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "version":
        index.write_bytes(whole[:23] + b"\xff" + whole[24:])
    elif damage == "link":
        (tmp_path / "other").write_bytes(whole)
        index.unlink()
        index.symlink_to(tmp_path / "other")
    elif damage == "fifo":
        index.unlink()
        os.mkfifo(index)
    elif damage == "foreign":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file to somebody else")
        os.chown(index, 12345, 12345)
    else:
        index.chmod(0o666)
    heard: list[tuple[int, int]] = []
    with opened(path, cache=str(cache), progress=lambda *said: heard.append(said)) as (_, kernel):
        assert kernel.read_file(b"f") == b"data"
    assert heard, "the index was taken from the cache"
    (index,) = cache.iterdir()
    assert index.read_bytes() == whole


def test_a_cache_directory_of_others_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with opened(tar(tmp_path / "a.tar", ("f", b"data")), cache=str(cache)) as (_, kernel):
        assert kernel.read_file(b"f") == b"data"
    assert list(cache.iterdir()) == []


def test_a_cache_file_holds_nothing_but_data(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with opened(tar(tmp_path / "a.tar", ("f", b"data")), cache=str(cache)):
        pass
    (index,) = cache.iterdir()
    assert json.loads(index.read_bytes().rpartition(b"[")[1] + index.read_bytes().rpartition(b"[")[2]) == []


@pytest.mark.parametrize("packed", [False, True])
def test_ctrl_c_while_the_index_is_built_leaves_nothing_behind(tmp_path: Path, packed: bool) -> None:
    archive = tar(tmp_path / "a.tar", *((f"f{number}", noise(9000, number)) for number in range(50)))
    if packed:
        archive = compress("gz", archive, tmp_path / "a.tar.gz")
    before = [len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with (  # the failure keeps all frames, as at the end of a program
        pytest.raises(KeyboardInterrupt) as failure,
        opened(archive, cache=str(tmp_path / "cache"), progress=stop),
    ):
        pass
    assert [len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")] == before, failure
    assert not (tmp_path / "cache").exists()


def test_ctrl_c_or_a_full_disk_while_the_index_is_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    archive = tar(tmp_path / "a.tar", ("f", b"data"))
    real = os.write

    def interrupted(fd: int, data: bytes) -> int:
        real(fd, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt), opened(archive, cache=str(cache)):
            pass
    assert list(cache.iterdir()) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a write beyond it is cut off, and fails then
    try:
        with opened(archive, cache=str(cache)) as (_, kernel):
            assert kernel.read_file(b"f") == b"data"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache.iterdir()) == []


def test_two_that_index_the_same_archive_do_not_disturb_each_other(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    archive = tar(tmp_path / "a.tar", ("f", b"data"), ("g", b"more"))
    inner = 0

    def meanwhile(done: int, total: int) -> None:
        nonlocal inner
        with opened(archive, cache=cache) as (_, kernel):
            inner += kernel.read_file(b"g") == b"more"

    with opened(archive, cache=cache, progress=meanwhile) as (_, kernel):
        assert kernel.read_file(b"f") == b"data"
    assert inner == 2
    (index,) = os.listdir(cache)
    assert index.endswith(".index")


def test_the_index_of_an_archive_that_is_being_written_is_not_kept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    archive = tar(tmp_path / "a.tar", ("f", b"data"))
    with opened(archive, cache=str(cache), progress=lambda *_: os.utime(archive)) as (_, kernel):
        assert kernel.read_file(b"f") == b"data"
    assert not cache.exists()


def test_many_members_take_little_memory(tmp_path: Path) -> None:
    from fusewire.formats.archive_tree import S_IFREG, Builder, Member, Tree

    builder = Builder()
    for number in range(20_000):
        builder.add(b"dir%d/file-%06d" % (number // 1000, number), Member(S_IFREG | 0o644, number))
    packed = builder.pack()
    assert len(packed) / 20_000 < 110
    tree = Tree(packed)
    assert tree.count == 20_021


def test_a_decoder_copies_only_what_can_be_copied() -> None:
    data = gzip.compress(text(1_000_000))
    decoder = Decoder(lambda offset, size: data[offset : offset + size], 0, len(data), "gz")
    first = b""
    while len(first) < 500_000:
        first += decoder.more(1000)
    copy = decoder.copy()
    for one in (decoder, copy):
        rest = b""
        while part := one.more(1 << 16):
            rest += part
        assert first + rest == text(1_000_000)
