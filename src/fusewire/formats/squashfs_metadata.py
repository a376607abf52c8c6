"""The metadata of a squashfs image: blocks of 8 KiB, chained and cached, and the tables that index them; formats layer.

Given a `pread(offset, size) -> bytes`; does no I/O of its own and may be used from several threads at once.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from errno import EINVAL

from .blockcache import Generations
from .compression import CorruptDataError, MissingDecompressorError, decompressor
from .squashfs_layout import (
    COMPRESSORS,
    METADATA_SIZE,
    SUPERBLOCK_SIZE,
    U64,
    NotSquashfsError,
    Superblock,
    damaged,
)

Pread = Callable[[int, int], bytes]


def words(raw: bytes) -> array[int]:
    """Little-endian 32-bit numbers."""
    found = array("I", raw)
    if sys.byteorder == "big":
        found.byteswap()
    return found


class Metadata:
    """Access to an image's bytes by positions that count from the image's start, bounded by what the superblock says.

    `size` bounds the decompressed blocks that are kept, in bytes. Raises NotSquashfsError (EINVAL) when nothing here
    decompresses the image.
    """

    __slots__ = ("_cache", "_decompress", "_end", "_offset", "_pread", "_tables", "codec", "misses", "provider")

    def __init__(self, pread: Pread, offset: int, superblock: Superblock, size: int) -> None:
        self._pread = pread
        self._offset = offset
        self._end = superblock.bytes_used
        self.codec = COMPRESSORS[superblock.compression]
        try:
            self.provider, self._decompress = decompressor(self.codec)
        except MissingDecompressorError as exc:
            raise NotSquashfsError(EINVAL, f"this image is compressed with {self.codec}, but {exc}") from None
        self._cache: Generations[int, tuple[bytes, int]] = Generations(size // (METADATA_SIZE + 200))
        self._tables: Generations[int, int] = Generations(4096)
        self.misses = 0

    def __len__(self) -> int:
        return len(self._cache)

    def fetch(self, position: int, length: int, what: str) -> bytes:
        """Exactly `length` stored bytes. Raises SquashfsError (EIO) where the image does not have them."""
        if position < SUPERBLOCK_SIZE or position + length > self._end:
            raise damaged(f"{what} lies outside the image", position)
        stored = self._pread(self._offset + position, length)
        if len(stored) != length:
            raise damaged(f"{what} is cut off: the file became shorter", position)
        return stored

    def unpack(self, stored: bytes, bound: int, what: str, position: int) -> bytes:
        """Decompress a block of at most `bound` bytes. Raises SquashfsError (EIO)."""
        try:
            return self._decompress(stored, bound)
        except CorruptDataError as exc:
            raise damaged(f"{what}: {exc}", position) from None

    def block(self, position: int) -> tuple[bytes, int]:
        """The metadata block at `position`, decompressed, and the position behind it, which is always higher.

        Raises SquashfsError (EIO): a block has 1 to 8192 bytes, stored and decompressed, and lies inside the image.
        """
        found = self._cache.young.get(position) or self._cache.get(position)
        if found is None:
            found = self._read(position)
            self._cache.put(position, found)
        return found

    def _read(self, position: int) -> tuple[bytes, int]:
        self.misses += 1
        room = self._end - position
        if position < SUPERBLOCK_SIZE or room < 3:
            raise damaged("metadata block lies outside the image", position)
        stored = self._pread(self._offset + position, min(room, METADATA_SIZE + 2))
        header = int.from_bytes(stored[:2], "little")
        length = header & 0x7FFF
        body = stored[2 : 2 + length]
        if not 0 < length <= METADATA_SIZE or len(body) != length:
            raise damaged("metadata block with an impossible size", position)
        if not header & 0x8000:
            body = self.unpack(body, METADATA_SIZE, "metadata block", position)
            if not body:
                raise damaged("metadata block is empty", position)
        return body, position + 2 + length

    def span(self, position: int, inside: int, length: int, what: str) -> tuple[bytes, int, int]:
        """`length` bytes from byte `inside` of the block at `position` on, over block borders, and where they end.

        Raises SquashfsError (EIO) when the chain of full blocks ends before.
        """
        data, following = self.block(position)
        stop = inside + length
        if stop <= len(data):
            return data[inside:stop], position, stop
        parts = []
        while True:
            part = data[inside : inside + length]
            parts.append(part)
            length -= len(part)
            if not length:
                return b"".join(parts), position, inside + len(part)
            if len(data) != METADATA_SIZE or inside > METADATA_SIZE:
                raise damaged(f"{what} reaches past the end of its table", position)
            position, inside = following, 0
            data, following = self.block(position)

    def table_block(self, table: int, number: int, what: str) -> int:
        """The position of metadata block `number` of a table whose list of block positions lies at `table`.

        Raises SquashfsError (EIO) when that is not before the list, as the kernel demands.
        """
        place = table + 8 * number
        found = self._tables.get(place)
        if found is None:
            (found,) = U64.unpack(self.fetch(place, 8, f"{what} table"))
            if found >= table:
                raise damaged(f"{what} table points past itself", place)
            self._tables.put(place, found)
        return found

    def ids(self, superblock: Superblock) -> tuple[int, ...]:
        """The id table: user and group ids by the index that inodes have. Raises SquashfsError (EIO)."""
        table, size = superblock.id_table, superblock.ids * 4
        raw = b""
        for number in range((size + METADATA_SIZE - 1) // METADATA_SIZE):
            raw += self.block(self.table_block(table, number, "id"))[0]
            if len(raw) != min(size, (number + 1) * METADATA_SIZE):
                raise damaged("id table has the wrong length", table)
        return tuple(words(raw))
