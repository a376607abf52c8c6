"""Reader of squashfs 4.0 images: inodes, directories, file data, xattrs; formats layer.

`Image` is given a `pread(offset, size) -> bytes` and does no I/O of its own; it knows nothing of FUSE. Every method may
be called from several threads at once. All that is read from an image is untrusted: whatever the bytes say, the outcome
is a value or a SquashfsError, in memory bounded by the caches and in time bounded by what the image really holds. A
directory that is its own ancestor through others is not recognised here (it would take state per directory): the
kernel's dentry cache answers ELOOP, and a program that walks an image must bound its depth.

Not here, on purpose: versions 1 to 3 and big-endian images, which the kernel does not mount either.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from errno import EINVAL, EISDIR, ENOENT, ENOTDIR
from itertools import accumulate
from struct import error as struct_error
from typing import NamedTuple

from .blockcache import BlockCache, Generations
from .squashfs_layout import (
    ABSENT,
    BODIES,
    COMMON_INODE,
    COMPRESSOR_OPTIONS,
    DIRECTORY,
    ENTRY,
    ENTRY_BRIEF,
    ENTRY_MAX,
    EXTENDED_DIRECTORY,
    EXTENDED_FILE,
    EXTENDED_FILE_INODE,
    EXTENDED_SYMLINK,
    FILE,
    FILE_SIZE_MAX,
    FLAGS,
    FORMAT_BITS,
    FRAGMENT,
    HEADER,
    INDEX_ENTRY,
    METADATA_SIZE,
    NAME_MAX,
    NONE,
    RUN_HEADER,
    SIZE_MASK,
    SUPERBLOCK_SIZE,
    SYMLINK,
    SYMLINK_MAX,
    U32,
    U64,
    UNCOMPRESSED,
    NotSquashfsError,
    SquashfsError,
    Superblock,
    compressor_options,
    damaged,
    parse_superblock,
    probe,
)
from .squashfs_metadata import Metadata, Pread, words
from .squashfs_xattrs import XattrTable

__all__ = ["Attributes", "Image", "Inode", "Key", "NotSquashfsError", "Piece", "SquashfsError", "Superblock", "probe"]

# Where a listing starts: the kernel's squashfs has "." at 0 and ".." at 1, and so leaves room for whoever adds them.
FIRST_COOKIE = 3
# A file's block list is read in segments of this many blocks: 4 KiB of the list, 128 MiB of a file of 128 KiB blocks.
SEGMENT_LOG = 10
SEGMENT = 1 << SEGMENT_LOG
# At least so much of a listing that spans metadata blocks is joined at a time.
WINDOW = 64 << 10

Key = tuple[int, int, int]
"""A data block: position in the image, size word, uncompressed length (0: a fragment block, at most the block size)."""

Piece = tuple[Key | None, int, int]
"""A part of a file: bytes start to stop of a data block; None is a block of zeros that the image does not store."""

Attributes = tuple[int, bytes, int, int, int, int, int, int, int, int, int, int, int]
"""cookie, name, ref, type, number, mode, uid, gid, size, blocks, mtime, nlink, rdev; mode 0: the inode is damaged."""


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


class _Run:
    """Entries of a listing under one header, all in `data`; whoever walks them leaves `pos` behind the last one."""

    __slots__ = ("block", "count", "data", "number", "pos", "shift", "whole")

    data: bytes
    pos: int  # in data, of the first entry
    shift: int  # position in the listing - position in data
    count: int
    block: int  # metadata block of all the inodes, relative to the inode table
    number: int  # base of the inode numbers
    whole: bool  # data reaches to the end of what is walked


class Image:
    """A squashfs image, opened and checked; everything else is read when it is asked for.

    `pread(offset, size)` gives the bytes there, fewer at the end of the file; an OSError of its own passes through.
    `size` is the file's length, `offset` where the image starts in it. `cache_size` bounds the decompressed data blocks
    and `metadata_size` the decompressed metadata that are kept, both in bytes.

    Raises NotSquashfsError (EINVAL) for what is not read here, SquashfsError (EIO) for damage.
    """

    __slots__ = (
        "_block", "_blocks", "_checkpoints", "_directory_table", "_fragments", "_ids", "_indexes", "_inode_table",
        "_inodes", "_marks", "_metadata", "_offset", "_options", "_segments", "_xattrs", "_zeros", "block_size", "root",
        "root_inode", "superblock",
    )  # fmt: skip

    def __init__(
        self,
        pread: Pread,
        size: int,
        *,
        offset: int = 0,
        cache_size: int = 64 << 20,
        metadata_size: int = 8 << 20,
    ) -> None:
        if not 0 <= offset <= size:
            raise NotSquashfsError(EINVAL, f"offset {offset} lies outside the file, which has {size} bytes")
        head = pread(offset, 256)
        superblock = self.superblock = parse_superblock(head, size - offset)
        self._metadata = Metadata(pread, offset, superblock, metadata_size)
        self._block = self._metadata.block
        self._xattrs = XattrTable(self._metadata, superblock.xattr_table)
        self._offset = offset
        self._inode_table = superblock.inode_table
        self._directory_table = superblock.directory_table
        self.block_size = superblock.block_size
        self.root = superblock.root
        self._options = b""
        if superblock.flags & COMPRESSOR_OPTIONS and len(head) > SUPERBLOCK_SIZE + 2:
            length = int.from_bytes(head[SUPERBLOCK_SIZE : SUPERBLOCK_SIZE + 2], "little") & 0x7FFF
            self._options = head[SUPERBLOCK_SIZE + 2 : SUPERBLOCK_SIZE + 2 + length]
        self._zeros = memoryview(bytes(self.block_size))
        self._blocks: BlockCache[Key] = BlockCache(cache_size)
        self._inodes: Generations[int, Inode] = Generations(2048)
        self._segments: Generations[tuple[int, int], tuple[array[int], array[int]]] = Generations(256)
        self._checkpoints: Generations[tuple[int, int], tuple[int, int, int]] = Generations(16384)
        self._marks: Generations[tuple[int, int], tuple[int, int]] = Generations(8192)
        self._indexes: Generations[int, tuple[list[bytes], list[int], list[int]]] = Generations(8)
        self._fragments: Generations[int, Key] = Generations(4096)
        self._ids = self._metadata.ids(superblock)
        self.root_inode = self.inode(self.root)
        if self.root_inode.type != DIRECTORY:
            raise damaged("root inode is not a directory", self._inode_table + (self.root >> 16))

    # -- inodes

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

    # -- directories

    def _runs(self, directory: Inode, position: int, head: int, block: int, end: int) -> Iterator[_Run]:
        """The runs of a listing from byte `position` to `end`, the first one cut to start there.

        `head`, at or before `position`, is where a run header lies, in the metadata block at `block`.
        """
        base = directory.offset
        run = _Run()
        if base + end <= METADATA_SIZE:  # a listing in one metadata block, as most are
            data = self._block(block)[0]
            run.data, run.shift, run.whole = data, -base, True
            index, stop = base, base + end
            while index < stop:
                count, run.block, run.number = RUN_HEADER.unpack_from(data, index)
                if count > 255:
                    raise damaged(f"directory run of {count + 1} entries", block)
                count += 1
                index += 12
                while count and index < position + base:
                    index += 9 + (data[index + 6] | data[index + 7] << 8)
                    count -= 1
                run.pos, run.count = index, count
                if count:
                    yield run
                index = run.pos
            if index > stop:
                raise damaged("directory run reaches past the end of its directory", block)
            return
        put_mark = self._marks.put
        data = b""
        shift = high = 0  # data[i] is byte i + shift of the listing; it ends at byte `high`
        positions = [block]  # of the metadata blocks in data, the first one holding byte `low` of the listing
        low = head
        while head < end:
            here = (base + head >> 13) - (base + low >> 13)
            index = head - shift
            need = 12
            if high >= min(end, head + 12):
                need += min(int.from_bytes(data[index : index + 4], "little") + 1, 256) * ENTRY_MAX
            if high < min(end, head + need):
                block, low = positions[here], head
                inside = base + head & (METADATA_SIZE - 1)
                wanted = inside + min(end - head, max(WINDOW, need))
                data, following = self._block(block)
                positions = [block]
                if len(data) < wanted:
                    parts = [data]
                    got = len(data)
                    while got < wanted:
                        if len(parts[-1]) != METADATA_SIZE:
                            raise damaged("directory reaches past the end of its table", block)
                        positions.append(following)
                        data, following = self._block(following)
                        parts.append(data)
                        got += len(data)
                    data = b"".join(parts)
                shift = head - inside
                high = len(data) + shift
                continue
            count, start, number = RUN_HEADER.unpack_from(data, index)
            if count > 255:
                raise damaged(f"directory run of {count + 1} entries", positions[here])
            count += 1
            # Where to go on from the next metadata block: the last run that starts in this one.
            put_mark((directory.ref, (base + head >> 13) + 1), (head, positions[here]))
            index += 12
            while count and index + shift < position:
                index += 9 + (data[index + 6] | data[index + 7] << 8)
                count -= 1
            run.data, run.pos, run.shift, run.count = data, index, shift, count
            run.block, run.number, run.whole = start, number, high >= end
            if count:
                yield run
            head = run.pos + shift
            if head > end:
                raise damaged("directory run reaches past the end of its directory", positions[here])

    def _runs_from(self, directory: Inode, cookie: int) -> Iterator[_Run]:
        if directory.type != DIRECTORY:
            raise SquashfsError(ENOTDIR, f"inode {directory.number} is not a directory")
        end = directory.size - 3
        position = max(0, cookie - FIRST_COOKIE)
        head, block = 0, self._directory_table + directory.start
        target = directory.offset + position >> 13
        if target and position < end:
            # A run spans at most 9 metadata blocks, so whoever read up to here left a mark within 9 of it.
            for number in range(target, max(0, target - 9), -1):
                mark = self._marks.get((directory.ref, number))
                if mark is not None:
                    head, block = mark
                    break
            else:
                if directory.index_count:
                    _, heads, blocks = self._index(directory)
                    if found := bisect_right(heads, position):
                        head, block = heads[found - 1], blocks[found - 1]
        return self._runs(directory, position, head, block, end)

    def entries(self, directory: Inode, start: int = 0) -> Iterator[tuple[int, bytes, int, int, int]]:
        """(cookie, name, ref, type, number) of each entry, in the image's order, which is that of the names' bytes.

        A cookie is where to go on behind its entry, in this process or another; it is at least 4 and at most the
        directory's size, so 0 to 3 all mean the beginning. "." and ".." are not among the entries.

        Raises SquashfsError: ENOTDIR, or EIO at the first damaged or impossible entry.
        """
        unpack = ENTRY.unpack_from
        try:
            for run in self._runs_from(directory, start):
                data, pos, number = run.data, run.pos, run.number
                base = run.block << 16
                shift = FIRST_COOKIE + run.shift
                for _ in range(run.count):
                    offset, delta, kind, length = unpack(data, pos)
                    stop = pos + 9 + length
                    name = data[pos + 8 : stop]
                    pos = stop
                    self._check_entry(directory, name, length, base | offset)
                    yield pos + shift, name, base | offset, kind, number + delta
                run.pos = pos
        except (struct_error, IndexError):
            raise damaged("directory is cut off", self._directory_table + directory.start) from None

    def _check_entry(self, directory: Inode, name: bytes, length: int, ref: int) -> None:
        """Refuse what no file system may pass on: an impossible name, or a directory inside itself."""
        if length >= NAME_MAX or len(name) != length + 1 or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise damaged(f"directory entry with the impossible name {name!r}", self._directory_table + directory.start)
        if ref in (directory.ref, self.root):
            raise damaged("directory that contains itself", self._directory_table + directory.start)

    def attributes(self, directory: Inode, start: int = 0, limit: int = 1024) -> list[Attributes]:
        """Up to `limit` entries from a cookie on, each with its inode's attributes; an empty list is the end.

        The same entries as `entries`, with `type` and `number` from the inode. An entry whose inode is damaged has a
        mode of 0, and a damaged listing gives what lies before the damage first.
        This is what walking a tree costs, so it is one loop without a call or an object per entry beyond the tuple:
        about 1.1 us an entry on CPython 3.11, where lookup and inode would cost 6.

        Raises SquashfsError: ENOTDIR, or EIO when the entry at `start` is damaged.
        """
        out: list[Attributes] = []
        try:
            self._collect(directory, start, limit, out)
        except SquashfsError:
            if not out:
                raise
        except (struct_error, IndexError):
            if not out:
                raise damaged("directory is cut off", self._directory_table + directory.start) from None
        return out

    def _collect(self, directory: Inode, start: int, limit: int, out: list[Attributes]) -> None:
        entry, common, extended = ENTRY_BRIEF.unpack_from, COMMON_INODE.unpack_from, EXTENDED_FILE_INODE.unpack_from
        ids = self._ids
        forbidden = (directory.ref, self.root)
        append = out.append
        room = limit
        for run in self._runs_from(directory, start):
            data, pos = run.data, run.pos
            base = run.block << 16
            shift = FIRST_COOKIE + run.shift
            inodes = self._inode_block(run.block)
            last_common = len(inodes) - 32
            last_extended = last_common - 24
            count = min(run.count, room)
            for _ in range(count):
                offset, length = entry(data, pos)
                stop = pos + 9 + length
                name = data[pos + 8 : stop]
                pos = stop
                if not 1 < length < NAME_MAX or b"/" in name or b"\0" in name:
                    self._check_entry(directory, name, length, -1)
                try:
                    if offset <= last_common:
                        kind, mode, uid, gid, mtime, number, a, b, c, d = common(inodes, offset)
                        if kind == 2:
                            append((
                                pos + shift, name, base | offset, 2, number, mode & 4095 | 32768, ids[uid], ids[gid],
                                d, d + 511 >> 9, mtime, 1, 0,
                            ))  # fmt: skip
                            continue
                        if kind == 1:
                            if base | offset in forbidden:
                                self._check_entry(directory, name, length, base | offset)
                            append((
                                pos + shift, name, base | offset, 1, number, mode & 4095 | 16384, ids[uid], ids[gid],
                                c & 0xFFFF, 0, mtime, b, 0,
                            ))  # fmt: skip
                            continue
                        if kind == 3:
                            append((
                                pos + shift, name, base | offset, 3, number, mode & 4095 | 40960, ids[uid], ids[gid],
                                b, 0, mtime, a, 0,
                            ))  # fmt: skip
                            continue
                        if kind == 9 and offset <= last_extended:
                            _, mode, uid, gid, mtime, number, _, a, b, c, _, _, d = extended(inodes, offset)
                            if a <= FILE_SIZE_MAX and d == NONE:
                                append((
                                    pos + shift, name, base | offset, 2, number, mode & 4095 | 32768, ids[uid],
                                    ids[gid], a, a - b + 511 >> 9 if b < a else 0, mtime, c, 0,
                                ))  # fmt: skip
                                continue
                except IndexError:
                    pass
                # Other types, an inode that straddles two metadata blocks, and whatever is wrong.
                self._check_entry(directory, name, length, base | offset)
                try:
                    i = self.inode(base | offset)
                except SquashfsError:
                    number = run.number + int.from_bytes(
                        data[pos - length - 7 : pos - length - 5], "little", signed=True
                    )
                    append((pos + shift, name, base | offset, 0, number, 0, 0, 0, 0, 0, 0, 0, 0))
                else:
                    append((
                        pos + shift, name, i.ref, i.type, i.number, i.mode, i.uid, i.gid, i.size, i.blocks, i.mtime,
                        i.nlink, i.rdev,
                    ))  # fmt: skip
            room -= count
            if not room:
                return
            run.pos = pos

    def _inode_block(self, block: int) -> bytes:
        """A metadata block of inodes for a listing; nothing at all where it is damaged, so that each inode says so."""
        position = self._inode_table + block
        if position >= self._directory_table:
            return b""
        try:
            return self._block(position)[0]
        except SquashfsError:
            return b""

    def lookup(self, directory: Inode, name: bytes) -> tuple[int, int, int] | None:
        """(ref, type, number) of the entry of that name, or None.

        The directory index leads to the one metadata block that can hold the name; there the name is searched as bytes
        (with its length in front) at C speed, and entries are stepped over only to prove a hit genuine.

        Raises SquashfsError: ENOTDIR, or EIO when that part of the directory is damaged.
        """
        if directory.type != DIRECTORY:
            raise SquashfsError(ENOTDIR, f"inode {directory.number} is not a directory")
        length = len(name)
        if not 0 < length <= NAME_MAX:
            return None
        head, block, end = 0, self._directory_table + directory.start, directory.size - 3
        if directory.index_count:
            names, heads, blocks = self._index(directory)
            found = bisect_right(names, name)
            if found < len(heads):
                end = min(end, heads[found])
            if found:
                head, block = heads[found - 1], blocks[found - 1]
        pattern = bytes((length - 1, 0)) + name
        data = None
        try:
            for run in self._runs(directory, head, head, block, end):
                pos = run.pos
                if run.data is not data:
                    data = run.data
                    found = data.find(pattern, pos) - 6
                if found < 0 and run.whole:
                    return None
                for _ in range(run.count):
                    if pos >= found >= 0:
                        if pos == found:
                            offset, delta, kind, _ = ENTRY.unpack_from(data, pos)
                            ref = run.block << 16 | offset
                            self._check_entry(directory, name, length - 1, ref)
                            return ref, kind, run.number + delta
                        found = data.find(pattern, pos + 7) - 6  # the bytes occurred inside something else
                    pos += 9 + data[pos + 6]  # a length above 255 is damage that listing reports; here it finds nothing
                run.pos = pos
        except (struct_error, IndexError):
            raise damaged("directory is cut off", self._directory_table + directory.start) from None
        return None

    def _index(self, directory: Inode) -> tuple[list[bytes], list[int], list[int]]:
        """A directory's index: first names, their runs' positions in the listing, their metadata blocks' positions."""
        found = self._indexes.get(directory.ref)
        if found is not None:
            return found
        names: list[bytes] = []
        heads: list[int] = []
        blocks: list[int] = []
        position, inside = directory.tail_block, directory.tail_offset
        before = 0
        for _ in range(directory.index_count):
            raw, position, inside = self._metadata.span(position, inside, 12, "directory index")
            head, block, length = INDEX_ENTRY.unpack(raw)
            if length > NAME_MAX or head < before:
                raise damaged("directory index runs backwards or has an impossible name", position)
            name, position, inside = self._metadata.span(position, inside, length + 1, "directory index")
            before = head
            names.append(name)
            heads.append(head)
            blocks.append(self._directory_table + block)
        found = (names, heads, blocks)
        if (
            len(names) <= 16384
        ):  # else 4 million names: the index is then read again for each look-up, in bounded memory
            self._indexes.put(directory.ref, found)
        return found

    # -- file data

    def plan(self, inode: Inode, offset: int, size: int) -> list[Piece]:
        """Which parts of which blocks make bytes offset to offset + size of a file, clipped at its end.

        The keys go to `load`, in any order and from any thread. Raises SquashfsError: EISDIR or EINVAL for what is no
        regular file, EIO for a damaged block list.
        """
        if inode.type != FILE:
            raise SquashfsError(EISDIR if inode.type == DIRECTORY else EINVAL, f"inode {inode.number} is no file")
        total = inode.size
        end = min(offset + size, total)
        if not 0 <= offset < end:
            return []
        block_size = self.block_size
        log = self.superblock.block_log
        fragment = inode.fragment
        if fragment == NONE:
            count = total + block_size - 1 >> log
        else:
            count = total >> log
            if not total & (block_size - 1):
                raise damaged("file with a fragment but no tail", inode.tail_block)
        pieces: list[Piece] = []
        start = offset & (block_size - 1)
        segment = -1
        sizes = starts = array("Q")
        for index in range(offset >> log, (end - 1 >> log) + 1):
            stop = min(block_size, end - (index << log))
            if index >= count:
                pieces.append((self._fragment(fragment), inode.offset + start, inode.offset + stop))
                break
            if index >> SEGMENT_LOG != segment:
                segment = index >> SEGMENT_LOG
                sizes, starts = self._segment(inode, count, segment)
            inner = index & (SEGMENT - 1)
            word = sizes[inner]
            if word:
                pieces.append(((starts[inner], word, min(block_size, total - (index << log))), start, stop))
            else:
                pieces.append((None, start, stop))
            start = 0
        return pieces

    def _fragment(self, number: int) -> Key:
        found = self._fragments.young.get(number) or self._fragments.get(number)
        if found is None:
            if number >= self.superblock.fragments:
                raise damaged(
                    f"fragment number {number} of {self.superblock.fragments}", self.superblock.fragment_table
                )
            block = self._metadata.table_block(self.superblock.fragment_table, number >> 9, "fragment")
            start, word, _ = FRAGMENT.unpack(self._metadata.span(block, (number & 511) << 4, 16, "fragment table")[0])
            found = (start, word, 0)
            self._fragments.put(number, found)
        return found

    def _segment(self, inode: Inode, count: int, segment: int) -> tuple[array[int], array[int]]:
        """Size words and positions of blocks segment * SEGMENT and on of a file of `count` blocks."""
        found = self._segments.young.get((inode.ref, segment)) or self._segments.get((inode.ref, segment))
        if found is not None:
            return found
        # A metadata block takes at least 3 bytes of the image: sizes beyond all reason end here, before any walk.
        if count * 4 > ((self._directory_table - self._inode_table) // 3 + 1) * METADATA_SIZE:
            raise damaged(f"file of {inode.size} bytes, more than its block list can describe", inode.tail_block)
        # Positions add up, so the segments before must have been walked once. The places remembered on the way are few
        # enough for one file to leave room for others.
        stride = (count >> SEGMENT_LOG) // 2048 + 1
        get = self._checkpoints.get
        at = segment
        place = get((inode.ref, at))
        if place is None:
            at -= at % stride
            while at and (place := get((inode.ref, at))) is None:
                at -= stride
        position, inside, start = place or (inode.tail_block, inode.tail_offset, inode.start)
        while True:
            length = 4 * min(SEGMENT, count - at * SEGMENT)
            raw, position, inside = self._metadata.span(position, inside, length, "block list")
            if at == segment:
                sizes = words(raw)
                if max(sizes) >= UNCOMPRESSED << 1:
                    raise damaged("block list with an impossible block size", position)
                starts = array("Q", accumulate((word & SIZE_MASK for word in sizes), initial=start))
                self._checkpoints.put((inode.ref, at + 1), (position, inside, starts[-1]))
                self._segments.put((inode.ref, segment), (sizes, starts))
                return sizes, starts
            if raw.count(0) != length:  # else all of it is a hole
                start += sum(word & SIZE_MASK for word in words(raw))
            at += 1
            if not at % stride:
                self._checkpoints.put((inode.ref, at), (position, inside, start))

    def load(self, key: Key) -> bytes:
        """A data or fragment block, decompressed and kept in the cache; threads that want the same one wait for one.

        Raises SquashfsError (EIO) when it is damaged.
        """
        return self._blocks.load(key, self._read_block)

    def held(self, key: Key) -> bool:
        """Whether `load` would find the block in the cache or on its way there: then prefetching it is pointless."""
        return key in self._blocks

    def _read_block(self, key: Key) -> bytes:
        position, word, expected = key
        length = word & SIZE_MASK
        if not 0 < length <= self.block_size or word >= UNCOMPRESSED << 1:
            raise damaged(f"data block with the impossible size word {word:#x}", position)
        block = self._metadata.fetch(position, length, "data block")
        if not word & UNCOMPRESSED:
            block = self._metadata.unpack(block, expected or self.block_size, "data block", position)
        if expected and len(block) != expected:
            raise damaged(f"data block of {len(block)} bytes where {expected} belong", position)
        return block

    def gather(self, pieces: list[Piece]) -> list[bytes | memoryview]:
        """The bytes of a plan, as slices of cached blocks, uncopied; holes are slices of one block of zeros."""
        out: list[bytes | memoryview] = []
        for key, start, stop in pieces:
            if key is None:
                out.append(self._zeros[: stop - start])
                continue
            block = self._blocks.load(key, self._read_block)
            if stop > len(block):
                raise damaged("fragment is shorter than a file's tail", key[0])
            out.append(block if stop - start == len(block) else memoryview(block)[start:stop])
        return out

    def read(self, inode: Inode, offset: int, size: int) -> list[bytes | memoryview]:
        """Bytes offset to offset + size of a file, clipped at its end: `gather(plan(...))`, with their errors."""
        return self.gather(self.plan(inode, offset, size))

    # -- extended attributes

    # -- extended attributes

    @property
    def has_xattrs(self) -> bool:
        """Whether any inode can have extended attributes."""
        return self._xattrs.present

    def xattr_names(self, inode: Inode) -> list[bytes]:
        """The full names of an inode's extended attributes: user., trusted. or security. and the rest.

        Raises SquashfsError (EIO) for damage, and for names of more than 64 KiB together (XATTR_LIST_MAX).
        """
        return self._xattrs.names(inode.xattr)

    def xattr(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of one extended attribute by its full name, or None. Raises SquashfsError (EIO) for damage."""
        return self._xattrs.value(inode.xattr, name)

    def xattrs(self, inode: Inode) -> list[tuple[bytes, bytes]]:
        """All extended attributes of an inode, full names and values, up to 16 MiB of them.

        Raises SquashfsError (EIO) for damage and for more than that.
        """
        return self._xattrs.items(inode.xattr)

    # -- about the image

    def summary(self) -> dict[str, object]:
        """What the superblock says, in words and plain values; nothing is walked. Times are seconds, sizes bytes."""
        superblock = self.superblock
        return {
            "format": "squashfs 4.0",
            "compressor": self._metadata.codec,
            "compressor_options": compressor_options(superblock.compression, self._options),
            "decompressor": self._metadata.provider,
            "block_size": superblock.block_size,
            "inodes": superblock.inodes,
            "fragments": superblock.fragments,
            "ids": superblock.ids,
            "bytes_used": superblock.bytes_used,
            "offset": self._offset,
            "created": superblock.mkfs_time,
            "flags": [text for bit, text in FLAGS.items() if superblock.flags & bit],
            "xattrs": superblock.xattr_table != ABSENT,
            "exportable": superblock.export_table != ABSENT,
        }

    def statistics(self) -> dict[str, int]:
        """Counters of the caches since the image was opened; bytes are those of decompressed blocks that are held."""
        blocks = self._blocks
        return {
            "data_hits": blocks.hits,
            "data_misses": blocks.misses,
            "data_blocks": len(blocks),
            "data_bytes": blocks.held,
            "data_capacity": blocks.capacity,
            "metadata_misses": self._metadata.misses,
            "metadata_blocks": len(self._metadata),
        }
