"""Where the squashfs image lies: plain files, AppImages, SIF files, and refusals that say what a file is instead."""

from __future__ import annotations

import os
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.formats.containers import find_image
from fusewire.formats.squashfs import NotSquashfsError
from squashfs_images import build, directory, find, from_bytes, listing, memory, mksquashfs, opened, symlink

IMAGE = build(directory(1, 20) + symlink(2, b"there"), listing([(b"link", 32, 3, 2)]))


def located(data: bytes) -> int:
    return find_image(memory(data), len(data))


def refusal(data: bytes) -> str:
    with pytest.raises(NotSquashfsError) as failure:
        located(data)
    assert failure.value.errno == 22
    return str(failure.value)


def elf(bits: int = 64, order: str = "<", sections: int = 5, tail: bytes = b"") -> bytes:
    """A small ELF file: header, some bytes of program, a section table that ends before `tail`, the last section."""
    body = 300
    entry = 64 if bits == 64 else 40
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    if bits == 64:
        head = struct.pack(order + "16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0, 0, body, 0, 64, 0, 0, entry, sections, 0)
        table = struct.pack(order + "IIQQQQIIQQ", 0, 1, 0, 0, 100, 50, 0, 0, 0, 0) * (sections - 1)
        end = body + entry * sections
        table += struct.pack(order + "IIQQQQIIQQ", 0, 3, 0, 0, end, len(tail), 0, 0, 0, 0)
    else:
        head = struct.pack(order + "16sHHIIIIIHHHHHH", ident, 2, 3, 1, 0, 0, body, 0, 52, 0, 0, entry, sections, 0)
        table = struct.pack(order + "IIIIIIIIII", 0, 8, 0, 0, 100, 1 << 30, 0, 0, 0, 0) * (sections - 1)
        end = body + entry * sections
        table += struct.pack(order + "IIIIIIIIII", 0, 3, 0, 0, end, len(tail), 0, 0, 0, 0)
    return head.ljust(body, b"\x90") + table + tail


def sif(partitions: list[tuple[int, int, int, bytes]], total: int = 48) -> bytes:
    """A SIF file with objects of (data type, filesystem, partition type, bytes)."""
    table, start = 4096, 32768
    head = struct.pack(
        "<32s10s3s3s16s8q", b"#!/usr/bin/env run-singularity\n", b"SIF_MAGIC\0", b"01\0", b"02\0", bytes(16),
        1, 1, total - len(partitions), total, table, 585 * total, start, 0,
    )  # fmt: skip
    descriptors = data = b""
    for number, (kind, filesystem, part, body) in enumerate(partitions, 1):
        offset = start + len(data)
        descriptors += struct.pack(
            "<i?IIIqqqqqqq128s", kind, True, number, 1, 0, offset, len(body), len(body), 1, 1, 0, 0, b""
        )
        descriptors += struct.pack("<ii3s", filesystem, part, b"02\0").ljust(384, b"\0")
        data += body + bytes(-len(body) % 4096)
    return (head.ljust(table, b"\0") + descriptors).ljust(start, b"\0") + data


def test_a_plain_image_starts_at_0(tmp_path: Path) -> None:
    assert located(IMAGE) == 0
    source = tmp_path / "source"
    source.mkdir()
    real = mksquashfs(source, tmp_path / "image").read_bytes()
    assert located(real) == 0


def test_an_image_behind_a_real_program_is_found_as_in_an_appimage(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    source.joinpath("AppRun").write_bytes(b"#!/bin/sh\n")
    image = mksquashfs(source, tmp_path / "image")
    app = tmp_path / "App.AppImage"
    for program in ("/bin/true", "/bin/ls"):
        shutil.copy(program, app)
        with app.open("ab") as f:
            f.write(image.read_bytes())
        offset = located(app.read_bytes())
        assert offset == os.path.getsize(program)
        with opened(app, offset=offset) as found:
            assert b"".join(found.read(find(found, b"AppRun"), 0, 100)) == b"#!/bin/sh\n"


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tail", [b"", b"section names after the table"])
def test_programs_of_both_widths_and_byte_orders_end_where_their_sections_end(
    bits: int, order: str, tail: bytes
) -> None:
    program = elf(bits, order, tail=tail)
    assert located(program + IMAGE) == len(program)


def test_a_program_without_an_image_is_refused() -> None:
    assert "program with no squashfs image" in refusal(elf())
    assert "program with no squashfs image" in refusal(Path("/bin/true").read_bytes())
    assert "program with no squashfs image" in refusal(elf()[:40])
    marked = bytearray(elf() + b"DWARFS and so on" + bytes(100))
    marked[8:11] = b"AI\x02"
    assert "DwarFS" in refusal(bytes(marked))


def test_a_sif_gives_its_primary_system_partition() -> None:
    other = IMAGE[:-1] + b"\1"
    file = sif([(0x4001, 0, 0, b"definition"), (0x4004, 1, 3, other), (0x4004, 1, 2, IMAGE), (0x4005, 0, 0, b"signed")])
    offset = located(file)
    assert file[offset : offset + len(IMAGE)] == IMAGE
    assert from_bytes(file, offset=offset).summary()["offset"] == offset


def test_a_sif_without_a_primary_partition_gives_its_first_squashfs() -> None:
    file = sif([(0x4004, 2, 1, b"ext3"), (0x4004, 1, 1, IMAGE), (0x4004, 1, 3, IMAGE)])
    assert located(file) == file.index(IMAGE)


def test_sif_files_that_cannot_be_used_say_why() -> None:
    assert "encrypted" in refusal(sif([(0x4004, 5, 2, b"secret")]))
    assert "no squashfs image" in refusal(sif([(0x4004, 2, 2, b"ext3")]))
    assert "without a readable squashfs" in refusal(sif([(0x4004, 1, 2, b"not an image")]))
    assert "without a readable squashfs" in refusal(sif([]))
    assert "impossible" in refusal(sif([])[:96] + struct.pack("<q", 1 << 40) * 4 + bytes(5000))
    assert "cut off" in refusal(sif([])[:60])


def test_an_old_singularity_image_starts_behind_its_launch_line() -> None:
    line = b"#!/usr/bin/env run-singularity\n"
    assert located(line + IMAGE) == len(line)


def test_other_files_are_named(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add("/bin/true")
    packed = tmp_path / "a.zip"
    with zipfile.ZipFile(packed, "w") as z:
        z.write("/bin/true")
    assert "tar archive" in refusal(archive.read_bytes())
    assert "zip archive" in refusal(packed.read_bytes())
    assert "gzip" in refusal(b"\x1f\x8b\x08" + bytes(100))
    assert "ext4" in refusal(bytes(0x438) + b"\x53\xef" + bytes(100))
    assert "ISO 9660" in refusal(bytes(0x8001) + b"CD001" + bytes(100))
    assert "big-endian" in refusal(b"sqsh" + bytes(200))
    assert "empty" in refusal(b"")
    assert "-o offset=BYTES" in refusal(bytes(5000))
    assert "-o offset=BYTES" in refusal(b"x")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_header_however_damaged_does_more_than_be_refused(data: st.DataObject) -> None:
    base = bytearray(
        data.draw(st.sampled_from([elf(64) + IMAGE, elf(32, ">") + IMAGE, sif([(0x4004, 1, 2, IMAGE)]), IMAGE]))
    )
    for _ in range(data.draw(st.integers(1, 6))):
        limit = data.draw(st.sampled_from([64, 160, min(5200, len(base)), len(base)]))
        place = data.draw(st.integers(0, min(limit, len(base)) - 1))
        base[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    cut = bytes(base[: data.draw(st.integers(0, len(base)))]) if data.draw(st.booleans()) else bytes(base)
    largest = 0

    def pread(offset: int, size: int) -> bytes:
        nonlocal largest
        largest = max(largest, size)
        assert offset >= 0
        return cut[offset : offset + size]

    try:
        offset = find_image(pread, len(cut))
    except NotSquashfsError:
        pass
    else:
        assert cut[offset : offset + 4] == b"hsqs"
    assert largest <= 1 << 20
