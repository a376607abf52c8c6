"""Extended attributes of a squashfs image; formats layer, no I/O of its own.

Names and values lie in a chain of metadata blocks that inodes reach through a table of ids; equal sets of attributes
are stored once, and so are equal large values ("out of line"). squashfs knows the prefixes user, trusted and security.
"""

from __future__ import annotations

from collections.abc import Iterator

from .blockcache import Generations
from .squashfs_layout import (
    ABSENT,
    METADATA_SIZE,
    NAME_MAX,
    NONE,
    U32,
    U64,
    XATTR_ID,
    XATTR_NAME,
    XATTR_OUT_OF_LINE,
    XATTR_PREFIXES,
    XATTR_SIZE_MAX,
    XATTR_TABLE,
    damaged,
)
from .squashfs_metadata import Metadata

WALK_MAX = 16 << 20
"""Bytes of one inode's names and values: 256 of the largest values that Linux has."""


class XattrTable:
    """The attributes of an image by the index that inodes have; nothing is read before it is asked for."""

    __slots__ = ("_metadata", "_table", "known", "present")

    def __init__(self, metadata: Metadata, table: int) -> None:
        self._metadata = metadata
        self._table = table
        self.present = table != ABSENT
        self.known: Generations[int, int] = Generations(4096)  # what `blocks` has answered

    def blocks(self, index: int) -> int:
        """What the kernel's squashfs adds to st_blocks for attributes: their size in units of 512 bytes.

        Raises SquashfsError (EIO) when the image has no such set of attributes; the kernel then refuses the inode.
        """
        found = self.known.get(index)
        if found is None:
            found = 0
            if index != NONE and self.present:
                found = self._set(index)[3] + 511 >> 9
            self.known.put(index, found)
        return found

    def _set(self, index: int) -> tuple[int, int, int, int]:
        """Start of all values, then reference, count and size of one set of attributes."""
        table = self._table
        start, ids, _ = XATTR_TABLE.unpack(self._metadata.fetch(table, XATTR_TABLE.size, "xattr table"))
        if index >= ids:
            raise damaged(f"xattr index {index} of {ids}", table)
        block = self._metadata.table_block(table + XATTR_TABLE.size, index >> 9, "xattr")
        ref, count, size = XATTR_ID.unpack(self._metadata.span(block, (index & 511) << 4, 16, "xattr table")[0])
        return start, ref, count, size

    def _entries(self, index: int) -> Iterator[tuple[bytes, tuple[int, int, int, bool]]]:
        """Each full name and where its value lies: start of all values, metadata block, offset, whether out of line."""
        if index == NONE or not self.present:
            return
        span = self._metadata.span
        start, ref, count, _ = self._set(index)
        position, inside = self._place(start, ref)
        walked = 0
        for _ in range(count):
            raw, position, inside = span(position, inside, XATTR_NAME.size, "xattr name")
            kind, length = XATTR_NAME.unpack(raw)
            if length > NAME_MAX:
                raise damaged(f"xattr name of {length} bytes", position)
            name, position, inside = span(position, inside, length, "xattr name")
            value = (start, position, inside, bool(kind & XATTR_OUT_OF_LINE))
            raw, position, inside = span(position, inside, 4, "xattr value")
            (size,) = U32.unpack(raw)
            walked += 8 + length + size
            if b"\0" in name or size > XATTR_SIZE_MAX or walked > WALK_MAX:
                raise damaged("xattr with an impossible name or size", position)
            if kind & 0xFF < len(XATTR_PREFIXES):  # the kernel skips prefixes that it does not know as well
                yield XATTR_PREFIXES[kind & 0xFF] + name, value
            _, position, inside = span(position, inside, size, "xattr value")

    def _place(self, start: int, ref: int) -> tuple[int, int]:
        position = start + (ref >> 16)
        if position >= self._table or ref & 0xFFFF > METADATA_SIZE:
            raise damaged("xattr reference leads outside its table", position)
        return position, ref & 0xFFFF

    def _value(self, start: int, position: int, inside: int, elsewhere: bool) -> bytes:
        span = self._metadata.span
        if elsewhere:
            raw = span(position, inside, 12, "xattr value")[0]
            position, inside = self._place(start, U64.unpack_from(raw, 4)[0])
        raw, position, inside = span(position, inside, 4, "xattr value")
        (size,) = U32.unpack(raw)
        if size > XATTR_SIZE_MAX:
            raise damaged(f"xattr value of {size} bytes", position)
        return span(position, inside, size, "xattr value")[0]

    def names(self, index: int) -> list[bytes]:
        """The full names, at most 64 KiB of them (XATTR_LIST_MAX). Raises SquashfsError (EIO)."""
        names: list[bytes] = []
        total = 0
        for name, _ in self._entries(index):
            total += len(name) + 1
            if total > XATTR_SIZE_MAX:
                raise damaged("xattr names of more than 64 KiB", self._table)
            names.append(name)
        return names

    def value(self, index: int, name: bytes) -> bytes | None:
        """The value of one attribute by its full name, or None. Raises SquashfsError (EIO)."""
        for found, place in self._entries(index):
            if found == name:
                return self._value(*place)
        return None

    def items(self, index: int) -> list[tuple[bytes, bytes]]:
        """All names and values, up to 16 MiB. Raises SquashfsError (EIO)."""
        found: list[tuple[bytes, bytes]] = []
        total = 0
        for name, place in self._entries(index):
            value = self._value(*place)
            total += len(name) + len(value)
            if total > WALK_MAX:
                raise damaged("xattrs of more than 16 MiB", self._table)
            found.append((name, value))
        return found
