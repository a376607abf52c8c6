"""The directories of a squashfs image: listing, with attributes or without, and look-up; formats layer, no own I/O.

A listing is a chain of runs: a header, then up to 256 entries whose inodes lie in one metadata block. A position in it
says nothing of the header in force, so reading on from a cookie needs to know where the last header lies: marks are
left at every metadata block that is walked through, and the image's own index (large directories) serves as well.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from errno import ENOTDIR
from struct import error as struct_error

from .blockcache import Generations
from .squashfs_inodes import Inode, Inodes
from .squashfs_layout import (
    COMMON_INODE,
    DIRECTORY,
    ENTRY,
    ENTRY_BRIEF,
    ENTRY_MAX,
    EXTENDED_FILE_INODE,
    FILE_SIZE_MAX,
    INDEX_ENTRY,
    METADATA_SIZE,
    NAME_MAX,
    NONE,
    RUN_HEADER,
    SquashfsError,
    damaged,
)
from .squashfs_metadata import Pread

# Where a listing starts: the kernel's squashfs has "." at 0 and ".." at 1, and so leaves room for whoever adds them.
FIRST_COOKIE = 3
# At least so much of a listing that spans metadata blocks is joined at a time.
WINDOW = 64 << 10

Attributes = tuple[int, bytes, int, int, int, int, int, int, int, int, int, int, int]
"""cookie, name, ref, type, number, mode, uid, gid, size, blocks, mtime, nlink, rdev; mode 0: the inode is damaged."""


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


class Directories(Inodes):
    """An image's inodes, and the directories that name them."""

    __slots__ = ("_indexes", "_marks")

    def __init__(self, pread: Pread, size: int, offset: int, metadata_size: int) -> None:
        super().__init__(pread, size, offset, metadata_size)
        self._marks: Generations[tuple[int, int], tuple[int, int]] = Generations(8192)
        self._indexes: Generations[int, tuple[list[bytes], list[int], list[int]]] = Generations(8)

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
        if position >= end:
            return iter(())
        head, block = 0, self._directory_table + directory.start
        target = directory.offset + position >> 13
        if target:
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
                    if pos + shift > directory.size:
                        raise self._cut_off(directory)
                    yield pos + shift, name, base | offset, kind, number + delta
                run.pos = pos
        except (struct_error, IndexError):
            raise self._cut_off(directory) from None

    def _check_entry(self, directory: Inode, name: bytes, length: int, ref: int) -> None:
        """Refuse what no file system may pass on: an impossible name, or a directory inside itself."""
        if length >= NAME_MAX or len(name) != length + 1 or 47 in name or 0 in name or name in (b".", b".."):
            raise damaged(f"directory entry with the impossible name {name!r}", self._directory_table + directory.start)
        if ref in (directory.ref, self.root):
            raise damaged("directory that contains itself", self._directory_table + directory.start)

    def attributes(self, directory: Inode, start: int = 0, limit: int = 1024) -> list[Attributes]:
        """Up to `limit` entries from a cookie on, each with its inode's attributes; an empty list is the end.

        The same entries as `entries`, with `type` and `number` from the inode. An entry whose inode is damaged has a
        mode of 0, and a damaged listing gives what lies before the damage first.
        This is what walking a tree costs, so it is one loop without a call or an object per entry beyond the tuple:
        about 1.4 us an entry on CPython 3.11, where listing, look-up and inode one by one cost 8.

        Raises SquashfsError: ENOTDIR, or EIO when the entry at `start` is damaged.
        """
        out: list[Attributes] = []
        failure = None
        try:
            self._collect(directory, start, limit, out)
        except SquashfsError as exc:
            failure = exc
        except (struct_error, IndexError):
            failure = self._cut_off(directory)
        while out and out[-1][0] > directory.size:
            out.pop()
            failure = self._cut_off(directory)
        if failure and not out:
            raise failure
        return out

    def _cut_off(self, directory: Inode) -> SquashfsError:
        return damaged("directory is cut off", self._directory_table + directory.start)

    def _collect(self, directory: Inode, start: int, limit: int, out: list[Attributes]) -> None:
        entry, common, extended = ENTRY_BRIEF.unpack_from, COMMON_INODE.unpack_from, EXTENDED_FILE_INODE.unpack_from
        ids = self._ids
        forbidden = (directory.ref, self.root)
        append = out.append
        xattr_blocks = self._xattrs.known.young.get
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
                if not 1 < length < NAME_MAX or 47 in name or 0 in name:
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
                            more = 0 if d == NONE else xattr_blocks(d)
                            if a <= FILE_SIZE_MAX and more is not None:
                                append((
                                    pos + shift, name, base | offset, 2, number, mode & 4095 | 32768, ids[uid],
                                    ids[gid], a, more + (a - b + 511 >> 9 if b < a else 0), mtime, c, 0,
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
        hit = -1  # where the entry starts in data, if that is what was found
        try:
            for run in self._runs(directory, head, head, block, end):
                pos = run.pos
                if run.data is not data:
                    data = run.data
                    hit = data.find(pattern, pos) - 6
                if hit < 0:
                    if run.whole:
                        return None
                    hit = sys.maxsize
                for _ in range(run.count):
                    if pos >= hit:
                        if pos > hit:  # the bytes had occurred inside something else
                            hit = data.find(pattern, pos + 6) - 6
                            if hit < 0:
                                hit = sys.maxsize
                        if pos == hit:
                            offset, delta, kind, _ = ENTRY.unpack_from(data, pos)
                            ref = run.block << 16 | offset
                            self._check_entry(directory, name, length - 1, ref)
                            if pos + 8 + length + run.shift > directory.size - 3:
                                raise self._cut_off(directory)
                            return ref, kind, run.number + delta
                    pos += 9 + data[pos + 6]  # lengths above 255 are damage that listing tells; here they hide names
                run.pos = pos
        except (struct_error, IndexError):
            raise self._cut_off(directory) from None
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
