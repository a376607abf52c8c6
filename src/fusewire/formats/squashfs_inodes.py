"""The inodes of a squashfs image, found by reference or number; formats layer, no I/O of its own.

The lowest part of `squashfs.Image`, which adds directories and file data to it.
"""

from __future__ import annotations

from errno import EINVAL, ENOENT
from struct import error as struct_error
from typing import NamedTuple

from .blockcache import Generations
from .squashfs_layout import (
    ABSENT,
    BODIES,
    COMMON_INODE,
    DIRECTORY,
    EXTENDED_DIRECTORY,
    EXTENDED_FILE,
    EXTENDED_SYMLINK,
    FILE,
    FILE_SIZE_MAX,
    FORMAT_BITS,
    HEADER,
    METADATA_SIZE,
    NONE,
    SYMLINK,
    SYMLINK_MAX,
    U32,
    U64,
    NotSquashfsError,
    SquashfsError,
    damaged,
    option_block,
    parse_superblock,
)
from .squashfs_metadata import Metadata, Pread
from .squashfs_xattrs import XattrTable


class Inode(NamedTuple):
    """One inode, basic or extended, with what is needed to read what it holds.

    `type` is the basic one (1 to 7), `mode` has the S_IFMT bits, `uid` and `gid` are real ids, `blocks` are those of
    stat(2) as the kernel's squashfs reports them, `rdev` has the kernel's 32-bit layout (new_encode_dev), `xattr` is an
    index or NONE. `start` is the position of a file's first block, or of a directory's metadata block relative to its
    table; `offset` is the place in the fragment or in that metadata block; `tail_block` and `tail_offset` say where the
    block list, the symlink's target or the directory index lies.
    """

    ref: int
    type: int
    mode: int
    uid: int
    gid: int
    mtime: int
    number: int
    nlink: int
    size: int
    blocks: int
    rdev: int
    xattr: int
    start: int
    fragment: int
    offset: int
    parent: int
    index_count: int
    tail_block: int
    tail_offset: int


_new = tuple.__new__  # Inode(...) goes through a Python function: 0.2 us


class Inodes:
    """An image's superblock, metadata and inodes."""

    __slots__ = (
        "_block", "_directory_table", "_ids", "_inode_table", "_inodes", "_metadata", "_offset", "_options", "_xattrs",
        "block_size", "root", "root_inode", "superblock",
    )  # fmt: skip

    def __init__(self, pread: Pread, size: int, offset: int, metadata_size: int) -> None:
        if not 0 <= offset <= size:
            raise NotSquashfsError(EINVAL, f"offset {offset} lies outside the file, which has {size} bytes")
        head = pread(offset, 256)
        superblock = self.superblock = parse_superblock(head, size - offset)
        self._metadata = Metadata(pread, offset, superblock, metadata_size)
        self._block = self._metadata.block
        self._xattrs = XattrTable(self._metadata, superblock.xattr_table)
        self._offset = offset
        self._options = option_block(superblock, head)
        self._inode_table = superblock.inode_table
        self._directory_table = superblock.directory_table
        self.block_size = superblock.block_size
        self.root = superblock.root
        self._inodes: Generations[int, Inode] = Generations(2048)
        self._ids = self._metadata.ids(superblock)
        self.root_inode = self.inode(self.root)
        if self.root_inode.type != DIRECTORY:
            raise damaged("root inode is not a directory", self._inode_table + (self.root >> 16))

    def inode(self, ref: int) -> Inode:
        """The inode that a reference names: metadata block relative to the inode table << 16 | offset inside it.

        Raises SquashfsError (EIO) also for a reference that this image never gave.
        """
        found = self._inodes.young.get(ref) or self._inodes.get(ref)
        if found is None:
            try:
                found = self._read_inode(ref)
            except (struct_error, IndexError):
                raise damaged("inode is cut off or has an impossible owner", self._inode_table + (ref >> 16)) from None
            self._inodes.put(ref, found)
        return found

    def _read_inode(self, ref: int) -> Inode:
        position = self._inode_table + (ref >> 16)
        inside = ref & 0xFFFF
        if not self._inode_table <= position < self._directory_table or inside >= METADATA_SIZE:
            raise damaged(f"inode reference {ref:#x} leads outside the inode table", position)
        data, following = self._block(position)
        ids = self._ids
        if inside <= len(data) - 32:  # most inodes: in one block, and of a type that these 32 bytes hold
            kind, mode, uid, gid, mtime, number, a, b, c, d = COMMON_INODE.unpack_from(data, inside)
            if kind == FILE and number:
                return _new(Inode, (
                    ref, FILE, mode & 0o7777 | 0o100000, ids[uid], ids[gid], mtime, number, 1, d, d + 511 >> 9, 0, NONE,
                    a, b, c, 0, 0, position, inside + 32,
                ))  # fmt: skip
            if kind == DIRECTORY and number:
                return _new(Inode, (
                    ref, DIRECTORY, mode & 0o7777 | 0o040000, ids[uid], ids[gid], mtime, number, b, c & 0xFFFF, 0, 0,
                    NONE, a, NONE, c >> 16, d, 0, position, inside + 32,
                ))  # fmt: skip
        whole = data
        if inside + 56 > METADATA_SIZE == len(data) and following < self._directory_table:
            whole = data + self._block(following)[0]
        kind, mode, uid, gid, mtime, number = HEADER.unpack_from(whole, inside)
        body = BODIES.get(kind)
        if body is None or not number:
            raise damaged(f"inode of unknown type {kind} or without a number", position)
        fields = body.unpack_from(whole, inside + 16)
        tail = inside + 16 + body.size
        if tail > METADATA_SIZE:
            position, tail = following, tail - METADATA_SIZE
        type_ = kind if kind < 8 else kind - 7
        size = blocks = rdev = start = offset = parent = index_count = 0
        nlink = 1
        fragment = xattr = NONE
        if kind == FILE:
            start, fragment, offset, size = fields
            blocks = (size + 511) >> 9
        elif kind == EXTENDED_FILE:
            start, size, sparse, nlink, fragment, offset, xattr = fields
            blocks = max(0, (size - sparse + 511) >> 9)
        elif kind == DIRECTORY:
            start, nlink, size, offset, parent = fields
        elif kind == EXTENDED_DIRECTORY:
            nlink, size, start, parent, index_count, offset, xattr = fields
        elif type_ == SYMLINK:
            nlink, size = fields
            if size > SYMLINK_MAX:
                raise damaged(f"symlink of {size} bytes", position)
            if kind == EXTENDED_SYMLINK:
                _, behind, inner = self._metadata.span(position, tail, size, "symlink")
                (xattr,) = U32.unpack(self._metadata.span(behind, inner, 4, "symlink")[0])
        elif type_ in (4, 5):
            nlink, rdev = fields[:2]
            if kind > 7:
                xattr = fields[2]
        else:
            nlink = fields[0]
            if kind > 7:
                xattr = fields[1]
        if size > FILE_SIZE_MAX:
            raise damaged(f"file of {size} bytes", position)
        if xattr != NONE:
            blocks += self._xattrs.blocks(xattr)
        return Inode(
            ref, type_, mode & 0o7777 | FORMAT_BITS[kind], ids[uid], ids[gid], mtime, number, nlink, size, blocks, rdev,
            xattr, start, fragment, offset, parent, index_count, position, tail,
        )  # fmt: skip

    def find_inode(self, number: int) -> int:
        """The reference of an inode number, by the export table.

        Raises SquashfsError: EINVAL when the image has no such table (mksquashfs -no-exports), ENOENT for a number
        that the image does not have.
        """
        table = self.superblock.export_table
        if table == ABSENT:
            raise SquashfsError(EINVAL, "this squashfs image has no export table (it was made with -no-exports)")
        if not 1 <= number <= self.superblock.inodes:
            raise SquashfsError(ENOENT, f"no inode number {number} in this squashfs image")
        block = self._metadata.table_block(table, (number - 1) >> 10, "export")
        ref: int = U64.unpack(self._metadata.span(block, ((number - 1) & 1023) * 8, 8, "export table")[0])[0]
        return ref

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symlink; at most 65,535 bytes, never with NUL.

        Raises SquashfsError: EINVAL for anything else than a symlink, as readlink(2).
        """
        if inode.type != SYMLINK:
            raise SquashfsError(EINVAL, f"inode {inode.number} is not a symlink")
        target = self._metadata.span(inode.tail_block, inode.tail_offset, inode.size, "symlink")[0]
        if b"\0" in target:
            raise damaged("symlink target holds a NUL byte", inode.tail_block)
        return target
