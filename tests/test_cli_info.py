from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import time

import pytest

import rootless
from fusewire.cli.info import describe, info
from fusewire.formats import compression

needs_mksquashfs = pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="mksquashfs is missing")
pytestmark = needs_mksquashfs
MADE_AT = 1700000000


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "big").write_bytes(os.urandom(300_000))
    (root / "small").write_bytes(b"x" * 10)
    (root / "sub" / "empty").write_bytes(b"")
    os.link(root / "small", root / "sub" / "again")
    os.symlink("small", root / "link")
    os.mkfifo(root / "pipe")
    for number in range(300):
        (root / "sub" / "deeper" / f"file{number}").write_bytes(b"y")
    return root


@pytest.fixture(scope="module")
def make(tree, tmp_path_factory):
    place = tmp_path_factory.mktemp("images")

    def build(name, *arguments):
        path = place / name
        if not path.exists():
            words = [
                "mksquashfs",
                str(tree),
                str(path),
                "-noappend",
                "-quiet",
                "-no-progress",
                "-mkfs-time",
                str(MADE_AT),
            ]
            subprocess.run([*words, *arguments], check=True, stdout=subprocess.DEVNULL)
        return path

    return build


@pytest.mark.parametrize("codec", ["gzip", "lzma", "lzo", "xz", "lz4", "zstd"])
def test_info_names_the_compressor(make, codec):
    if not compression.available()[codec][0]:
        pytest.skip(f"no {codec} decompressor is installed")
    found = describe(str(make(codec, "-comp", codec)))
    assert found["compressor"] == codec
    assert found["decompressor"] == compression.available()[codec][0]
    assert found["container"] == "plain"


def test_info_tells_what_mksquashfs_was_told(make, tree):
    path = make("told", "-comp", "xz", "-b", "65536", "-no-exports", "-no-xattrs", "-no-fragments", "-Xbcj", "x86,arm")
    found = describe(str(path))
    assert found["block_size"] == 65536
    assert not found["exportable"]
    assert not found["xattrs"]
    assert "no fragments" in found["flags"]
    assert found["fragments"] == 0
    assert found["compressor_options"] == {"dictionary": 65536, "filters": "x86 arm"}
    assert (found["created"], found["created_seconds"]) == ("2023-11-14T22:13:20Z", MADE_AT)
    assert found["file_size"] == path.stat().st_size
    assert 0 < found["bytes_used"] <= found["file_size"]
    assert "files" not in found, "nothing is counted unless that was asked for"


def test_count_agrees_with_the_tree(make, tree):
    found = describe(str(make("counted")), count=True)
    walked = {tree, *tree.rglob("*")}
    assert found["directories"] == sum(path.is_dir() for path in walked) == 3
    assert found["files"] == sum(path.is_file() and not path.is_symlink() for path in walked) == 304
    assert (found["symlinks"], found["fifos"], found["sockets"], found["devices"]) == (1, 1, 0, 0)
    assert found["hard_links"] == 1
    assert found["inodes"] == len(walked) - 1
    assert found["file_bytes"] == 300_000 + 10 + 300
    assert found["damaged"] == 0


def test_xattrs_are_told(tmp_path, tree):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    try:
        os.setxattr(tmp_path / "in" / "file", "user.a", b"b")
    except OSError:
        pytest.skip("the test directory's filesystem has no user xattrs")
    subprocess.run(["mksquashfs", tmp_path / "in", tmp_path / "x.sqsh", "-quiet", "-no-progress"], check=True)
    assert describe(str(tmp_path / "x.sqsh"))["xattrs"] is True


def appimage(path, image):
    """An ELF header with one section header table entry, the mark of AppImage type 2, the image behind it."""
    elf = bytearray(64 + 64)
    elf[:16] = b"\x7fELF\x02\x01\x01\0AI\x02\0\0\0\0\0"
    struct.pack_into("<Q", elf, 40, 64)
    struct.pack_into("<HH", elf, 58, 64, 1)
    path.write_bytes(bytes(elf) + image)
    return len(elf)


def sif(path, image):
    """The header of Apptainer's container format, one descriptor of a primary squashfs partition, the image."""
    at = 4096
    header = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0")
    header += struct.pack("<10s3s3s16s8q", b"SIF_MAGIC\0", b"01\0", b"02\0", b"u" * 16, 0, 0, 47, 48, 128, 585, at, 0)
    descriptor = struct.pack("<i?IIIqqqqqqq128s", 0x4004, True, 1, 0, 0, at, len(image), len(image), 0, 0, 0, 0, b"fs")
    descriptor += struct.pack("<ii", 1, 2)
    path.write_bytes((header + descriptor.ljust(585, b"\0")).ljust(at, b"\0") + image)
    return at


@pytest.mark.parametrize(("build", "container"), [(appimage, "AppImage"), (sif, "SIF")])
def test_image_in_a_container_is_found(make, tmp_path, build, container):
    offset = build(tmp_path / "container", make("plain").read_bytes())
    found = describe(str(tmp_path / "container"))
    assert (found["container"], found["offset"]) == (container, offset)
    assert found["inodes"] == describe(str(make("plain")))["inodes"]


def test_offset_by_hand_is_taken(make, tmp_path):
    path = tmp_path / "shifted"
    path.write_bytes(b"junk".ljust(1000, b"\0") + make("plain").read_bytes())
    assert describe(str(path), 1000)["offset"] == 1000
    assert describe(str(path), 1000)["container"] == "unknown"
    with pytest.raises(OSError, match=re.escape(str(path))):
        describe(str(path))
    with pytest.raises(OSError, match="no magic number"):
        describe(str(path), 999)
    with pytest.raises(OSError, match="outside the file"):
        describe(str(path), 1 << 40)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a squashfs image"),
        (b"\x7fELF" + bytes(200), "a program with no squashfs image behind it"),
        (b"sqsh" + bytes(200), "big-endian"),
        (b"hsqs" + bytes(200), "version 0.0"),
        (b"hsqs", "cut off"),
        (b"PK\x03\x04" + bytes(99), "damaged archive"),
    ],
)
def test_what_is_no_image_is_refused_by_name_with_what_it_is(tmp_path, content, reason):
    path = tmp_path / "thing"
    path.write_bytes(content)
    with pytest.raises(OSError, match=reason) as caught:
        info(str(path))
    assert str(path) in str(caught.value)


def test_what_cannot_be_opened_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        info(f"{tmp_path}/missing")
    with pytest.raises(OSError, match="can be mounted, but is no image"):
        info(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="neither a file nor a block device"):
        info(f"{tmp_path}/fifo")
    code = "from fusewire.cli.info import info\ntry: info('/etc/shadow')\nexcept PermissionError as e: print(e)"
    said = subprocess.check_output([*rootless.rootless_python(), "-c", code], text=True)
    assert "/etc/shadow" in said


def test_truncated_image_is_refused(make, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(make("plain").read_bytes()[:5000])
    with pytest.raises(OSError, match="cut off"):
        info(str(path))


def test_damage_in_the_tables_is_counted_or_refused_and_never_hangs(make, tmp_path, capsys):
    whole = make("uncompressed", "-noI").read_bytes()
    inodes, directories = struct.unpack_from("<QQ", whole, 64)
    path = tmp_path / "damaged"
    damaged, refused = 0, []
    for at in range(inodes, min(directories + 4000, len(whole)), 37):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 0xFF,)) + whole[at + 1 :])
        try:
            damaged += describe(str(path), count=True)["damaged"] > 0
        except OSError as error:
            refused.append(str(error))
    assert damaged
    assert all(str(path) in text for text in refused)


def test_lines_are_for_people_and_json_is_for_programs(make, capsys):
    path = make("zstd", "-comp", "zstd")
    if not compression.available()["zstd"][0]:
        pytest.skip("no zstd decompressor is installed")
    assert info(str(path), count=True) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert lines["compressor"].strip().startswith("zstd")
    assert lines["created"].strip() == "2023-11-14T22:13:20Z"
    assert lines["contents"].strip() == "3 directories, 304 files, 1 symlinks, 1 fifos"
    assert lines["unpacked"].strip() == "293.3 KiB (300310 bytes)"
    assert info(str(path), json=True) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(describe(str(path))))


def test_name_that_is_not_utf8_is_printed(make, tmp_path, capsys):
    path = os.path.join(os.fsencode(tmp_path), b"\xffname\n.sqsh")
    shutil.copy(make("plain"), path)
    info(os.fsdecode(path))
    assert r"\xffname\n.sqsh" in capsys.readouterr().out.splitlines()[0]
    info(os.fsdecode(path), json=True)
    assert json.loads(capsys.readouterr().out)["image"] == os.fsdecode(path)


def test_no_descriptor_is_left_open(make, tmp_path):
    (tmp_path / "x").write_text("no image")
    before = os.listdir("/proc/self/fd")
    describe(str(make("plain")), count=True)
    with pytest.raises(OSError, match="not a squashfs image"):
        describe(str(tmp_path / "x"))
    assert os.listdir("/proc/self/fd") == before


def test_time_is_utc_wherever_we_are(make, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        assert describe(str(make("told")))["created"] == "2023-11-14T22:13:20Z"
    finally:
        monkeypatch.undo()
        time.tzset()
