"""What squashfs 4.0 looks like on disk: structures, the superblock's checks, what is refused; formats layer, no I/O.

All numbers are little-endian and packed (Linux fs/squashfs/squashfs_fs.h). Positions are bytes from the image's start.
"""

from __future__ import annotations

from errno import EINVAL, EIO
from itertools import pairwise
from struct import Struct
from typing import NamedTuple

SUPERBLOCK_SIZE = 96
METADATA_SIZE = 8192
ABSENT = 0xFFFF_FFFF_FFFF_FFFF  # a table that the image does not have
NONE = 0xFFFF_FFFF  # no fragment, no xattrs

COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}

# Superblock flags. Only COMPRESSOR_OPTIONS changes how the image is read; the others say how it was made.
COMPRESSOR_OPTIONS = 0x400
EXPORTABLE = 0x80
FLAGS = {
    0x1: "uncompressed inodes",
    0x2: "uncompressed data",
    0x8: "uncompressed fragments",
    0x10: "no fragments",
    0x20: "always fragments",
    0x40: "duplicates removed",
    EXPORTABLE: "exportable",
    0x100: "uncompressed xattrs",
    0x200: "no xattrs",
    COMPRESSOR_OPTIONS: "compressor options",
    0x800: "uncompressed ids",
}

# Inode types; a directory entry has the basic one, the extended form of an inode is 7 higher.
DIRECTORY, FILE, SYMLINK, BLOCK_DEVICE, CHARACTER_DEVICE, FIFO, SOCKET = range(1, 8)
EXTENDED_DIRECTORY, EXTENDED_FILE, EXTENDED_SYMLINK = 8, 9, 10
# By on-disk type, 0 to 14: the S_IFMT bits of st_mode.
FORMAT_BITS = (0, *(0o040000, 0o100000, 0o120000, 0o060000, 0o020000, 0o010000, 0o140000) * 2)

# Data block size words: stored as it is, and the bits that must be 0.
UNCOMPRESSED = 1 << 24
SIZE_MASK = UNCOMPRESSED - 1

SUPERBLOCK = Struct("<5I6H8Q")
HEADER = Struct("<HHHHII")  # type, mode, uid index, gid index, mtime, inode number
# What follows HEADER, by on-disk type.
BODIES = {
    1: Struct("<IIHHI"),  # start, nlink, size, offset, parent
    2: Struct("<IIII"),  # start, fragment, fragment offset, size; then block sizes
    3: Struct("<II"),  # nlink, size; then the target
    4: Struct("<II"),  # nlink, rdev
    5: Struct("<II"),
    6: Struct("<I"),  # nlink
    7: Struct("<I"),
    8: Struct("<IIIIHHI"),  # nlink, size, start, parent, index count, offset, xattr; then the index
    9: Struct("<QQQIIII"),  # start, size, sparse bytes, nlink, fragment, fragment offset, xattr; then block sizes
    10: Struct("<II"),  # nlink, size; then the target, then the xattr index
    11: Struct("<III"),  # nlink, rdev, xattr
    12: Struct("<III"),
    13: Struct("<II"),  # nlink, xattr
    14: Struct("<II"),
}
# HEADER and 16 bytes of body in one: a whole basic file or directory, and what listing needs of most other types.
COMMON_INODE = Struct("<HHHHIIIIII")
EXTENDED_FILE_INODE = Struct("<HHHHIIQQQIIII")

RUN_HEADER = Struct("<III")  # entries - 1, inode block start, base inode number
ENTRY = Struct("<HhHH")  # offset in the inode block, inode number - base, basic type, name length - 1; then the name
ENTRY_BRIEF = Struct("<H4xH")  # what attributes need of an ENTRY: the offset and the name's length - 1
ENTRY_MAX = ENTRY.size + 256
INDEX_ENTRY = Struct("<III")  # position in the listing, metadata block start, name length - 1; then the name
FRAGMENT = Struct("<QII")  # start, size word, unused
XATTR_TABLE = Struct("<QII")  # start of names and values, count, unused; then the index
XATTR_ID = Struct("<QII")  # reference, count, size
XATTR_NAME = Struct("<HH")  # prefix and flags, length; then the name without its prefix
XATTR_OUT_OF_LINE = 0x100
XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
U32 = Struct("<I")
U64 = Struct("<Q")

NAME_MAX = 255
SYMLINK_MAX = 65535
XATTR_SIZE_MAX = 65536  # <linux/limits.h>, for a value and for a list of names
FILE_SIZE_MAX = (1 << 63) - 1


class SquashfsError(OSError):
    """The image cannot give what was asked for; EIO and the structure's name and position where it is damaged."""


class NotSquashfsError(SquashfsError):
    """EINVAL: the bytes are no squashfs image, or one of a kind that is not read here; the message says which."""


def damaged(what: str, position: int) -> SquashfsError:
    """The error for a structure that breaks the format's rules, at a byte position of the image."""
    return SquashfsError(EIO, f"damaged squashfs image: {what} (at byte {position} of the image)")


class Superblock(NamedTuple):
    """The first 96 bytes of an image, field by field; times are seconds since the epoch, sizes bytes."""

    magic: int
    inodes: int
    mkfs_time: int
    block_size: int
    fragments: int
    compression: int
    block_log: int
    flags: int
    ids: int
    major: int
    minor: int
    root: int
    bytes_used: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int
    export_table: int


def probe(head: bytes) -> bool:
    """Whether these first bytes (96 or more) are a squashfs 4.0 superblock: magic, version and block size agree."""
    if len(head) < SUPERBLOCK_SIZE or head[:4] != b"hsqs":
        return False
    found = Superblock._make(SUPERBLOCK.unpack_from(head))
    return found.major == 4 and 12 <= found.block_log <= 20 and found.block_size == 1 << found.block_log


def _refuse(text: str) -> NotSquashfsError:
    return NotSquashfsError(EINVAL, text)


def parse_superblock(head: bytes, size: int) -> Superblock:
    """The superblock in `head`, checked as the kernel does at mount time; `size` bytes are there from its first one on.

    Raises NotSquashfsError (EINVAL) with what the image is instead, or with what is wrong in it.
    """
    magic = head[:4]
    if magic == b"sqsh":
        raise _refuse(
            "big-endian squashfs image (version 3 or older): only version 4.0 is read here, as by the kernel; "
            "'unsquashfs' reads it, and 'mksquashfs' makes a new image from what that extracts"
        )
    if magic in (b"sqlz", b"qshs", b"shsq", b"hsqt", b"tqsh"):
        raise _refuse(f"squashfs image of a device vendor's own kind (magic {magic!r}): 'sasquatch' may read it")
    if magic != b"hsqs":
        raise _refuse("not a squashfs image (no magic number 'hsqs'): where it lies inside a file, give offset=BYTES")
    if len(head) < SUPERBLOCK_SIZE:
        raise _refuse(f"squashfs image cut off in its superblock: only {len(head)} bytes are there")
    found = Superblock._make(SUPERBLOCK.unpack_from(head))
    if (found.major, found.minor) != (4, 0):
        raise _refuse(
            f"squashfs image of version {found.major}.{found.minor}: only version 4.0 is read here, as by the kernel"
            + ("; 'unsquashfs' reads it, and 'mksquashfs' makes a new image from that" if found.major < 4 else "")
        )
    if found.compression not in COMPRESSORS:
        raise _refuse(f"squashfs image with an unknown compressor (number {found.compression})")
    if not 12 <= found.block_log <= 20 or found.block_size != 1 << found.block_log:
        raise _refuse(f"squashfs image with an impossible block size ({found.block_size}, log {found.block_log})")
    if found.bytes_used > size:
        raise _refuse(
            f"squashfs image is cut off: it needs {found.bytes_used} bytes and {size} are there; "
            "copy or download it again"
        )
    if found.root & 0xFFFF >= METADATA_SIZE or not found.ids:
        raise _refuse("squashfs image with an impossible superblock (root inode or number of ids)")
    # The order that the kernel demands. The fragment table counts only when there are fragments.
    tables = [found.inode_table, found.directory_table]
    if found.fragments:
        tables.append(found.fragment_table)
    if found.export_table != ABSENT:
        tables.append(found.export_table)
    tables.append(found.id_table)
    if found.xattr_table != ABSENT:
        tables.append(found.xattr_table)
    tables.append(found.bytes_used)
    if found.inode_table < SUPERBLOCK_SIZE or any(a >= b for a, b in pairwise(tables)):
        raise _refuse("squashfs image with an impossible superblock (its tables are out of order or past its end)")
    return found


def option_block(superblock: Superblock, head: bytes) -> bytes:
    """The body of the block of compressor options, which lies uncompressed behind the superblock in `head`, if any."""
    if not superblock.flags & COMPRESSOR_OPTIONS:
        return b""
    start = SUPERBLOCK_SIZE + 2
    return head[start : start + (int.from_bytes(head[SUPERBLOCK_SIZE:start], "little") & 0x7FFF)]


def compressor_options(compression: int, block: bytes) -> dict[str, int | str]:
    """The options that the image's maker gave to the compressor, as text for people; nothing here is needed to read.

    `block` is the body of the block behind the superblock. Unknown or short blocks give an empty result.
    """
    count = len(block) // 4
    words = Struct(f"<{count}I").unpack_from(block)
    name = COMPRESSORS.get(compression)
    if name == "gzip" and count >= 2:
        return {"level": words[0], "window": words[1] & 0xFFFF, "strategies": words[1] >> 16}
    if name == "lzo" and count >= 2:
        return {"algorithm": words[0], "level": words[1]}
    if name == "xz" and count >= 2:
        filters = ("x86", "powerpc", "ia64", "arm", "armthumb", "sparc", "arm64", "riscv")
        chosen = [filter_ for bit, filter_ in enumerate(filters) if words[1] >> bit & 1]
        return {"dictionary": words[0], "filters": " ".join(chosen) or "none"}
    if name == "lz4" and count >= 2:
        return {"version": words[0], "high compression": words[1] & 1}
    if name == "zstd" and count >= 1:
        return {"level": words[0]}
    return {}
