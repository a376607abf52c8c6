"""Where the squashfs image lies in a file: at its start, behind an AppImage's ELF program, in a SIF; formats layer.

Given a `pread(offset, size) -> bytes`; does no I/O of its own. Everything read is untrusted: a lying header leads to a
refusal, never to more than some 1.5 MiB read.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL
from struct import Struct

from .squashfs_layout import SUPERBLOCK_SIZE, NotSquashfsError, probe

__all__ = ["find_image"]

Pread = Callable[[int, int], bytes]

# SIF, the container format of Apptainer and SingularityCE (sif/pkg/sif/sif.go, descriptor.go): packed, little-endian.
SIF_MAGIC = b"SIF_MAGIC\0"
SIF_MAGIC_OFFSET = 32
SIF_HEADER = Struct(
    "<10s3s3s16s8q"
)  # magic, version, arch, uuid, ctime, mtime, free, total, table, table size, data...
SIF_DESCRIPTOR = Struct("<i?IIIqqqqqqq128sii")
SIF_DESCRIPTOR_SIZE = 585  # what Go's encoding/binary makes of the descriptor, with 384 bytes of "extra" at its end
SIF_PARTITION = 0x4004
SIF_SQUASHFS = 1
SIF_ENCRYPTED_SQUASHFS = 5
SIF_PRIMARY = 2
SIF_DESCRIPTORS_MAX = 1024  # 48 is what the tools make

NOBITS = 8  # a section without bytes in the file

_KINDS = (  # what people hand over instead, by the bytes at an offset
    (0, b"sqsh", "a big-endian squashfs image (version 3 or older); 'unsquashfs' reads it"),
    (0, b"\x1f\x8b", "a gzip file; unpack it first"),
    (0, b"\xfd7zXZ\0", "an xz file; unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (0, b"BZh", "a bzip2 file; unpack it first"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive; 'tar2sqfs' makes a squashfs image from it"),
    (0, b"!<arch>\n", "an ar archive or Debian package"),
    (0, b"DWARFS", "a DwarFS image; 'dwarfs' mounts it"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 filesystem; 'fuse2fs' mounts it"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS image; 'erofsfuse' mounts it"),
    (0x8001, b"CD001", "an ISO 9660 image or an AppImage of type 1; 'fuseiso' mounts it"),
)


def _refuse(text: str) -> NotSquashfsError:
    return NotSquashfsError(EINVAL, text)


def find_image(pread: Pread, size: int) -> int:
    """The offset of the squashfs image in a file of `size` bytes: 0, or where an AppImage or a SIF keeps it.

    Raises NotSquashfsError (EINVAL) that says what the file is instead, where that can be told, and the way out. An
    image of the wrong version at the very start counts as found, so that opening it tells what is wrong with it.
    """
    head = pread(0, 4096)
    if not head:
        raise _refuse("not a squashfs image: the file is empty")
    if head[:4] == b"hsqs":
        return 0
    if head[:4] == b"\x7fELF":
        offset = _elf_end(pread, size, head)
        if offset is not None and probe(pread(offset, SUPERBLOCK_SIZE)):
            return offset
        if head[8:11] == b"AI\x02" and offset is not None:
            if pread(offset, 6) == b"DWARFS":
                raise _refuse("an AppImage with a DwarFS image inside: 'dwarfs' mounts it with '-o offset=auto'")
            raise _refuse(f"an AppImage without a squashfs image behind its program (at byte {offset})")
        raise _refuse("a program with no squashfs image behind it; where there is one elsewhere, use -o offset=BYTES")
    if head[SIF_MAGIC_OFFSET : SIF_MAGIC_OFFSET + len(SIF_MAGIC)] == SIF_MAGIC:
        return _sif_partition(pread, size, head)
    if head[:2] == b"#!" and b"singularity" in head[:64]:  # Singularity 2.4 to 2.6: a launch line, then the image
        offset = head.find(b"\n") + 1
        if probe(head[offset : offset + SUPERBLOCK_SIZE]):
            return offset
    for offset, magic, what in _KINDS:
        if pread(offset, len(magic)) == magic:
            raise _refuse(f"not a squashfs image but {what}")
    raise _refuse("not a squashfs image (nor an AppImage or SIF); where one lies inside the file, use -o offset=BYTES")


def _elf_end(pread: Pread, size: int, head: bytes) -> int | None:
    """Where an ELF file's headers and sections end, elf(5); None when they do not fit in the file."""
    if len(head) < 64 or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    order = "<" if head[5] == 1 else ">"
    if head[4] == 1:
        table, entry_size, count = Struct(order + "32xI10xHH2x").unpack_from(head)
        section = Struct(order + "4xI8xII16x")  # type, offset, size
    else:
        table, entry_size, count = Struct(order + "40xQ10xHH2x").unpack_from(head)
        section = Struct(order + "4xI16xQQ24x")
    end: int = table + entry_size * count
    if entry_size < section.size or end > size:
        return None
    headers = pread(table, min(entry_size * count, 1 << 20))
    for place in range(0, len(headers) - section.size + 1, entry_size):
        kind, offset, length = section.unpack_from(headers, place)
        if kind != NOBITS and offset + length <= size:
            end = max(end, offset + length)
    return end


def _sif_partition(pread: Pread, size: int, head: bytes) -> int:
    """The offset of a SIF's primary system partition, or of its first squashfs partition when none is primary."""
    if len(head) < SIF_MAGIC_OFFSET + SIF_HEADER.size:
        raise _refuse("a SIF file that is cut off in its header")
    fields = SIF_HEADER.unpack_from(head, SIF_MAGIC_OFFSET)
    total, table = fields[7], fields[8]
    if not (0 <= total <= SIF_DESCRIPTORS_MAX and 0 <= table <= size):
        raise _refuse("a damaged SIF file: its descriptor table is impossible")
    descriptors = pread(table, total * SIF_DESCRIPTOR_SIZE)
    fallback: int | None = None
    for place in range(0, len(descriptors) - SIF_DESCRIPTOR_SIZE + 1, SIF_DESCRIPTOR_SIZE):
        kind, used, _, _, _, offset, length, *_, filesystem, part = SIF_DESCRIPTOR.unpack_from(descriptors, place)
        if kind != SIF_PARTITION or not used:
            continue
        if part == SIF_PRIMARY and filesystem == SIF_ENCRYPTED_SQUASHFS:
            raise _refuse("a SIF file with an encrypted system partition: 'apptainer' reads it, with its key")
        if part == SIF_PRIMARY and filesystem != SIF_SQUASHFS:
            raise _refuse(f"a SIF file whose system partition is no squashfs image (SIF filesystem type {filesystem})")
        if filesystem == SIF_SQUASHFS and 0 <= offset <= offset + length <= size:
            if not probe(pread(offset, SUPERBLOCK_SIZE)):
                continue
            if part == SIF_PRIMARY:
                found: int = offset
                return found
            if fallback is None:
                fallback = offset
    if fallback is None:
        raise _refuse("a SIF file without a readable squashfs partition")
    return fallback
