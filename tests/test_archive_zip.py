"""Zip archives against unzip and Python's zipfile: methods, names, times, and what nobody should write."""

from __future__ import annotations

import errno
import io
import os
import random
import stat
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archive_trees import make_tree, need, on_disk, opened, refused, run, same, served
from fusewire.formats import zip as zip_format
from fusewire.formats.archive_streams import CHUNK
from fusewire.fs import archive as archive_module
from fusewire.fs.archive import recognise
from fusewire.ops import FileRange
from squashfs_images import noise, text

Members = list[tuple[str | zipfile.ZipInfo, bytes]]


def make(path: Path, members: Members, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            if isinstance(name, zipfile.ZipInfo):
                archive.writestr(name, data)
            else:
                archive.writestr(name, data, method)
    return path


def info(name: str, mode: int = 0, *, system: int = 3, **fields: Any) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo("x", (2020, 2, 3, 4, 5, 6))
    found.filename = name  # as it is: the constructor cuts at NUL and turns other separators
    found.external_attr = mode << 16
    found.create_system = system
    for key, value in fields.items():
        setattr(found, key, value)
    return found


def contents(path: Path) -> dict[str, Any]:
    with opened(path) as (_, kernel):
        return {name: row[7] for name, row in served(kernel).items() if name != "."}


def test_what_is_shown_is_what_unzip_unpacks(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "tree", special=False)
    run("zip", "-qry", tmp_path / "a.zip", ".", cwd=root)
    out = tmp_path / "out"
    run("unzip", "-qXK", "-d", out, tmp_path / "a.zip")
    wanted = on_disk(out, xattrs=False)
    with opened(tmp_path / "a.zip") as (filesystem, kernel):
        got = served(kernel)
        assert filesystem.notes == []
    del got["."], wanted["."]
    for path, row in wanted.items():
        if stat.S_ISLNK(row[0]):  # unzip gives links no times
            wanted[path] = row[:4] + got[path][4:5] + row[5:]
    same(got, wanted)


METHODS = {"stored": 0, "deflated": 8, "bz2": 12, "lzma": 14}


@pytest.mark.parametrize("method", METHODS)
def test_members_of_every_method_are_read_at_any_place(tmp_path: Path, method: str) -> None:
    big = b"".join(text(500_000, seed) + noise(100_000, seed) for seed in range(4))
    members: Members = [("empty", b""), ("one", b"1"), ("chunk", text(CHUNK)), ("more", text(CHUNK + 1)), ("big", big)]
    path = make(tmp_path / "a.zip", members, METHODS[method])
    generator = random.Random(1)
    with opened(path, "cache_size=512K") as (filesystem, kernel):
        for name, data in members:
            assert kernel.read_file(str(name).encode()) == data
        nodeid = kernel.lookup(1, b"big").nodeid
        for _ in range(30):
            offset, size = generator.randrange(len(big) + 1000), generator.choice([1, 4096, 131072, 1 << 20])
            assert kernel.read(nodeid, 0, offset, size) == big[offset : offset + size]
        assert isinstance(filesystem.read(nodeid, 0, 0, 10, 0, 0, 0), FileRange) == (method == "stored")


def test_large_members_of_slow_methods_are_spooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_SPOOLED_FROM", 1 << 20)
    data = text(3_000_000)
    path = make(tmp_path / "a.zip", [("f", data)], zipfile.ZIP_BZIP2)
    with opened(path, spool=[str(tmp_path)]) as (filesystem, kernel):
        nodeid = kernel.lookup(1, b"f").nodeid
        assert kernel.read(nodeid, 0, 2_999_990, 100) == data[-10:]
        assert kernel.read_file(b"f") == data
        assert type(filesystem._streams[nodeid - 1]).__name__ == "Spooled"
    with opened(path, spool_size=1 << 20) as (_, kernel):
        nodeid = kernel.lookup(1, b"f").nodeid
        assert kernel.read(nodeid, 0, 0, 10) == data[:10]
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            kernel.read(nodeid, 0, 2_000_000, 10)


def test_a_zstd_member_is_read(tmp_path: Path) -> None:
    try:
        from fusewire.formats.archive_streams import zstd_module

        zstd = zstd_module()
    except ImportError:
        pytest.skip("no zstd module: backports.zstd is missing")
    data = text(1_000_000)
    path = patched(make(tmp_path / "a.zip", [("f", zstd.compress(data))], zipfile.ZIP_STORED), data, 93)
    assert contents(path) == {"f": data}


def patched(path: Path, data: bytes, method: int) -> Path:
    """Say in a zip file of one stored member that it is packed so, and holds these data."""
    import zlib

    whole = bytearray(path.read_bytes())
    central = whole.rfind(b"PK\1\2")
    whole[central + 10 : central + 12] = struct.pack("<H", method)
    whole[central + 16 : central + 20] = struct.pack("<L", zlib.crc32(data))
    whole[central + 24 : central + 28] = struct.pack("<L", len(data))
    path.write_bytes(whole)
    return path


def test_modes_types_and_links_come_from_unix_attributes(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.zip",
        [
            (info("file", 0o100640), b"x"),
            (info("setuid", 0o104755), b"x"),
            (info("typeless", 0o600), b"x"),
            (info("nothing", external_attr=1 << 3), b"x"),
            (info("dir/", 0o040700), b""),
            (info("link", 0o120777), b"dir/target"),
            (info("fifo", 0o010644), b""),
            (info("strange", 0o170644), b"x"),
            (info("dos", system=0), b"x"),
            (info("readonly", system=0, external_attr=1), b"x"),
            (info("dosdir/", system=0, external_attr=0x10), b""),
            (info("empty link", 0o120777), b""),
            (info("nul link", 0o120777), b"a\0b"),
        ],
    )
    with opened(path) as (filesystem, kernel):
        found = {name: row[0] for name, row in served(kernel).items() if name != "."}
        assert kernel.readlink(kernel.lookup(1, b"link").nodeid) == b"dir/target"
        assert len(filesystem.notes) == 1
    assert {name: oct(mode) for name, mode in found.items()} == {
        "file": "0o100640",
        "setuid": "0o104755",
        "typeless": "0o100600",
        "nothing": "0o100644",
        "dir": "0o40700",
        "link": "0o120777",
        "fifo": "0o10644",
        "strange": "0o100644",
        "dos": "0o100644",
        "readonly": "0o100444",
        "dosdir": "0o40755",
    }


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_names_are_what_their_writers_meant(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.zip",
        [
            ("späß€", b"utf-8 flag"),
            (info("back\\slash\\file", system=0), b"windows"),
            (info("keeps\\it", system=3), b"unix"),
            ("/absolute", b"1"),
            ("../../up", b"2"),
            ("implied/a/b", b"3"),
            ("same", b"old"),
            ("other", b""),
            ("same", b"new"),
        ],
    )
    assert contents(path) == {
        "späß€": b"utf-8 flag",
        "back": None,
        "back/slash": None,
        "back/slash/file": b"windows",
        "keeps\\it": b"unix",
        "absolute": b"1",
        "up": b"2",
        "implied": None,
        "implied/a": None,
        "implied/a/b": b"3",
        "same": b"new",
        "other": b"",
    }


def test_names_without_the_utf8_flag_are_cp437_unless_unix_wrote_utf8(tmp_path: Path) -> None:
    for system, raw, wanted in (
        (0, b"\x81ber", "über"),
        (3, "über".encode(), "über"),
        (3, b"\x81ber", "über"),
        (0, b"plain", "plain"),
    ):
        path = make(tmp_path / "a.zip", [(info("n" * len(raw), system=system), b"x")])
        path.write_bytes(path.read_bytes().replace(b"n" * len(raw), raw))
        assert list(contents(path)) == [wanted]


def test_times_come_from_extra_fields_where_there_are_some(tmp_path: Path) -> None:
    ntfs = struct.pack("<HHLHHQQQ", 10, 32, 0, 1, 24, 116_444_736_000_000_000 + 1_234_567_890_123_456_7, 0, 0)
    path = make(
        tmp_path / "a.zip",
        [
            (info("dos"), b""),
            (info("ut", extra=struct.pack("<HHBl", 0x5455, 5, 1, 1_600_000_001)), b""),
            (info("early", extra=struct.pack("<HHBl", 0x5455, 5, 1, -5)), b""),
            (info("ntfs", extra=ntfs), b""),
            (info("owner", extra=struct.pack("<HHBBLBL", 0x7875, 11, 1, 4, 1000, 4, 100)), b""),
            (info("cut", extra=struct.pack("<HHB", 0x5455, 500, 1)), b""),
            (info("never", date_time=(1980, 0, 0, 0, 0, 0)), b""),
        ],
    )
    with opened(path) as (_, kernel):
        found = served(kernel)
    local = int(time.mktime((2020, 2, 3, 4, 5, 6, 0, 0, -1))) * 1_000_000_000
    assert found["dos"][4] == local
    assert found["ut"][4] == 1_600_000_001_000_000_000
    assert found["early"][4] == -5_000_000_000
    assert found["ntfs"][4] == 1_234_567_890_123_456_700
    assert found["owner"][1:3] == (1000, 100)
    assert found["cut"][4] == local
    assert found["never"][4] == 0


def test_encrypted_members_say_so_and_the_others_are_read(tmp_path: Path) -> None:
    run("zip", "-q", "-P", "secret", tmp_path / "a.zip", "a", cwd=_with(tmp_path, "a", b"hidden"))
    run("zip", "-q", tmp_path / "a.zip", "b", cwd=_with(tmp_path, "b", b"open"))
    with opened(tmp_path / "a.zip") as (filesystem, kernel):
        assert kernel.read_file(b"b") == b"open"
        entry = kernel.lookup(1, b"a")
        assert entry.attr[1] == 6
        with pytest.raises(PermissionError):
            kernel.read(entry.nodeid, 0, 0, 100)
        with pytest.raises(PermissionError, match=r"a\.zip: it is encrypted"):
            filesystem.read(entry.nodeid, 0, 0, 100, 0, 0, 0)


def _with(place: Path, name: str, data: bytes) -> Path:
    (place / name).write_bytes(data)
    return place


def test_a_method_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = patched(make(tmp_path / "a.zip", [("f", b"x" * 100)], zipfile.ZIP_STORED), b"x" * 100, 9)
    with opened(path) as (filesystem, kernel):
        with pytest.raises(OSError, match="deflate64") as failure:
            filesystem.read(kernel.lookup(1, b"f").nodeid, 0, 0, 100, 0, 0, 0)
        assert failure.value.errno == errno.EOPNOTSUPP


def test_zip64_and_a_program_before_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive, archive.open(info("f", 0o100644), "w", force_zip64=True) as file:
        file.write(text(100_000))
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    size, offset = struct.unpack_from("<LL", data, end + 12)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    ending = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    for whole in (data, data[:end] + record + locator + ending):
        for before in (b"", b"#!/usr/bin/env python3\n", b"\x7fELF" + bytes(5000)):
            path.write_bytes(before + whole)
            assert contents(path) == {"f": text(100_000)}


def test_zip_files_are_recognised_by_their_content(tmp_path: Path) -> None:
    data = make(tmp_path / "a.zip", [("f", b"x")]).read_bytes()
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    for whole, kind in (
        (data, "zip"),
        (empty.getvalue(), "zip"),
        (b"#!/bin/sh\n" + data, "zip"),
        (b"hsqs" + data, None),
        (data[-40:], None),
        (b"text PK\5\6 and more text, too short for anything", None),
    ):
        assert recognise(lambda offset, size, whole=whole: whole[offset : offset + size], len(whole)) == kind


# -- Damaged and hostile


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.zip", [(f"f{number}", noise(500, number)) for number in range(50)]).read_bytes()
    path = tmp_path / "cut.zip"
    for length in (30, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "damaged archive.*complete")


def test_a_wrong_checksum_and_a_wrong_size_are_errors_of_their_readers(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for length in (1000, 400_000):
            data = text(length)
            path = make(tmp_path / "a.zip", [("f", data), ("g", b"fine")], method)
            whole = path.read_bytes()
            central = whole.find(b"PK\1\2")
            for at, change in ((16, b"\0\0\0\1"), (24, struct.pack("<L", length + 1))):
                damaged = bytearray(whole)
                damaged[central + at : central + at + 4] = change
                path.write_bytes(damaged)
                with opened(path) as (_, kernel):
                    assert kernel.read_file(b"g") == b"fine"
                    if method != zipfile.ZIP_STORED:
                        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                            kernel.read_file(b"f")


def test_a_bomb_gives_no_more_than_it_says(tmp_path: Path) -> None:
    data = bytes(50 << 20)
    path = make(tmp_path / "a.zip", [("f", data)])
    whole = bytearray(path.read_bytes())
    central = whole.find(b"PK\1\2")
    whole[central + 24 : central + 28] = struct.pack("<L", 1 << 20)
    path.write_bytes(whole)
    with opened(path) as (filesystem, kernel):
        nodeid = kernel.lookup(1, b"f").nodeid
        assert kernel.read(nodeid, 0, 0, 1000) == bytes(1000)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            kernel.read_file(b"f")  # its checksum is that of more
        assert filesystem._cache.held < 2 << 20


def test_members_that_lie_over_each_other_or_nowhere(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", [("f", text(1000)), ("g", text(1000))])
    whole = bytearray(path.read_bytes())
    second = whole.rfind(b"PK\1\2")
    for offset in (1, len(whole) - 10, 0x7FFFFFFF):
        whole[second + 42 : second + 46] = struct.pack("<L", offset)
        path.write_bytes(whole)
        with opened(path) as (_, kernel):
            assert kernel.read_file(b"f") == text(1000)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                kernel.read_file(b"g")


def test_a_directory_that_counts_wrong_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.zip", [("f", b"x"), ("g", b"y")])
    whole = path.read_bytes()
    end = whole.rfind(b"PK\5\6")
    for change in (
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, *struct.unpack_from("<LL", whole, end + 12), 0),
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, 0xFFFFFF, 0xFFFFFF, 0),
        struct.pack("<4s4H2LH", b"PK\5\6", 1, 1, 2, 2, *struct.unpack_from("<LL", whole, end + 12), 0),
    ):
        path.write_bytes(whole[:end] + change)
        refused(path, "damaged archive|several")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_give_an_error_or_a_tree(tmp_path: Path, data: st.DataObject) -> None:
    place = tmp_path / "original"
    if not place.exists():
        make(place, [("d/f", b"1" * 600), (info("l", 0o120777), b"d/f"), (info("\\w", system=0), b"")])
    whole = bytearray(place.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    errors = []
    try:
        with opened(path) as (_, kernel):
            for _, entry in kernel.walk():
                if stat.S_ISREG(entry.attr[9]):
                    try:
                        kernel.read(entry.nodeid, 0, 0, 4096)
                    except OSError as error:
                        errors.append(error)
    except OSError as error:
        errors.append(error)
    assert {error.errno for error in errors} <= {errno.EIO, errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP}


def test_unzip_agrees_that_the_archives_of_these_tests_are_whole(tmp_path: Path) -> None:
    need("unzip")
    path = make(tmp_path / "a.zip", [("f", text(100_000)), (info("link", 0o120777), b"f")])
    run("unzip", "-tq", path)
    assert zip_format.find_directory(
        lambda offset, size: path.read_bytes()[offset : offset + size], path.stat().st_size
    )
