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
from errno import EINVAL, EISDIR
from itertools import accumulate

from .blockcache import BlockCache, Generations
from .squashfs_directories import Attributes, Directories
from .squashfs_inodes import Inode
from .squashfs_layout import (
    ABSENT,
    DIRECTORY,
    FILE,
    FLAGS,
    FRAGMENT,
    METADATA_SIZE,
    NONE,
    SIZE_MASK,
    UNCOMPRESSED,
    NotSquashfsError,
    SquashfsError,
    Superblock,
    compressor_options,
    damaged,
    probe,
)
from .squashfs_metadata import Pread, words

__all__ = ["Attributes", "Image", "Inode", "Key", "NotSquashfsError", "Piece", "SquashfsError", "Superblock", "probe"]

# A file's block list is read in segments of this many blocks: 4 KiB of the list, 128 MiB of a file of 128 KiB blocks.
SEGMENT_LOG = 10
SEGMENT = 1 << SEGMENT_LOG

Key = tuple[int, int, int]
"""A data block: position in the image, size word, uncompressed length (0: a fragment block, at most the block size)."""

Piece = tuple[Key | None, int, int]
"""A part of a file: bytes start to stop of a data block; None is a block of zeros that the image does not store."""


class Image(Directories):
    """A squashfs image, opened and checked; everything else is read when it is asked for.

    `pread(offset, size)` gives the bytes there, fewer at the end of the file; an OSError of its own passes through.
    `size` is the file's length, `offset` where the image starts in it. `cache_size` bounds the decompressed data blocks
    and `metadata_size` the decompressed metadata that are kept, both in bytes.

    Raises NotSquashfsError (EINVAL) for what is not read here, SquashfsError (EIO) for damage.
    """

    __slots__ = ("_blocks", "_checkpoints", "_fragments", "_segments", "_zeros")

    def __init__(
        self,
        pread: Pread,
        size: int,
        *,
        offset: int = 0,
        cache_size: int = 64 << 20,
        metadata_size: int = 8 << 20,
    ) -> None:
        super().__init__(pread, size, offset, metadata_size)
        self._zeros = memoryview(bytes(self.block_size))
        self._blocks: BlockCache[Key] = BlockCache(cache_size)
        self._segments: Generations[tuple[int, int], tuple[array[int], array[int]]] = Generations(256)
        self._checkpoints: Generations[tuple[int, int], tuple[int, int, int]] = Generations(16384)
        self._fragments: Generations[int, Key] = Generations(4096)

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
