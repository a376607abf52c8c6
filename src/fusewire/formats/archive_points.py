"""Where a compressed file can be entered: the blocks of an xz file, the frames of a zstd file.

Layer `formats`: given a `pread(offset, size) -> bytes`; does no other I/O. Indexes and headers are untrusted: what they
say is bounded here, and what does not hold shows when it is decompressed.
"""

from __future__ import annotations

from struct import Struct
from struct import error as StructError  # noqa: N812

from fusewire.formats.archive_streams import MAGICS, Blocks, Decoder, Point, damaged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Pread = Callable[[int, int], bytes]

FARTHEST = 64 << 20  # an xz block or zstd frame that is larger is no help to who wants its end
_APART = 1 << 20  # places to begin that are nearer to each other are not worth remembering


def points_of(kind: str, pread: Pread, size: int) -> list[Point] | None:
    """Where a compressed file can be entered; None if only at its start. Gzip's come while it is read."""
    if kind == "gz":
        return [Point(0, lambda: Decoder(pread, 0, size, kind))]
    if kind == "xz":
        return xz_points(pread, size)
    if kind == "zst":
        return zstd_points(pread, size)
    return None


def xz_points(pread: Pread, size: int) -> list[Point] | None:
    """The blocks of an xz file by its index (The .xz File Format, section 4); None if one is too large.

    Raises ArchiveError if the index cannot be right.
    """
    streams: list[list[tuple[bytes, int, int, int]]] = []
    end = size
    try:
        while end > 0:
            footer = pread(end - 12, 12)
            if footer[8:] == b"\0\0\0\0" and end >= 4:
                end -= 4  # stream padding
                continue
            if footer[10:] != b"YZ":
                raise damaged("the xz data do not end with a footer; is the file complete?")
            length = (int.from_bytes(footer[4:8], "little") + 1) * 4
            if length > 64 << 20 or length + 24 > end:
                raise damaged("the index of the xz data is impossible")
            index = pread(end - 12 - length, length)
            records, total = _xz_records(index)
            start = end - 12 - length - total - 12
            header = pread(start, 12) if start >= 0 else b""
            if header[:6] != MAGICS["xz"] or header[6:8] != footer[8:10]:
                raise damaged("the index of the xz data does not fit them")
            place = start + 12
            blocks = []
            for unpadded, unpacked in records:
                if unpacked > FARTHEST:
                    return None
                padded = (unpadded + 3) & ~3
                blocks.append((header, place, padded, unpacked))
                place += padded
            streams.append(blocks)
            end = start
    except IndexError:
        raise damaged("the index of the xz data is cut off") from None
    every = [block for stream in reversed(streams) for block in stream if block[3]]
    points: list[Point] = []
    offset = 0
    for number, block in enumerate(every):
        if not points or offset - points[-1].offset >= _APART:
            points.append(Point(offset, lambda number=number: Blocks(pread, every, number)))  # type: ignore[misc]
        offset += block[3]
    return points or None


def _xz_records(index: bytes) -> tuple[list[tuple[int, int]], int]:
    """(unpadded size, uncompressed size) of all blocks, and the sum of their padded sizes. Raises IndexError."""
    place = 1

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = index[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 56:
                raise damaged("the index of the xz data holds an impossible number")

    records = []
    total = 0
    for _ in range(number()):
        unpadded = number()
        records.append((unpadded, number()))
        total += (unpadded + 3) & ~3
    return records, total


_SEEK_FOOTER = Struct("<IBI")
_SEEK_MAGIC = 0x8F92EAB1


def zstd_points(pread: Pread, size: int) -> list[Point] | None:
    """The frames of a zstd file; None if one is too large, or does not say how much it holds.

    By the seek table of the seekable format (zstd contrib/seekable_format), else from header to header (RFC 8878, 3.1).
    """
    points: list[Point] = []
    unpacked = 0
    try:
        frames = _zstd_seek_table(pread, size) or _zstd_frames(pread, size)
        for start, length in frames:
            if length > FARTHEST:
                return None
            if not points or unpacked - points[-1].offset >= _APART:
                points.append(Point(unpacked, lambda start=start: Decoder(pread, start, size, "zst")))  # type: ignore[misc]
            unpacked += length
    except (IndexError, StructError, _UnknownSizeError):
        return None
    return points or None


class _UnknownSizeError(Exception):
    """A frame does not say how much it holds, or is not one."""


def _zstd_seek_table(pread: Pread, size: int) -> list[tuple[int, int]]:
    if size < 17:
        return []
    count, descriptor, magic = _SEEK_FOOTER.unpack(pread(size - 9, 9))
    if magic != _SEEK_MAGIC or descriptor & 0x7C:
        return []
    entry = 12 if descriptor & 0x80 else 8
    length = count * entry
    if length > min(size - 17, 256 << 20):
        return []
    table = pread(size - 9 - length, length)
    found = []
    place = 0
    for packed, unpacked in Struct("<II4x" if entry == 12 else "<II").iter_unpack(table):
        found.append((place, unpacked))
        place += packed
    return found if place == size - 17 - length else []


def _zstd_frames(pread: Pread, size: int) -> Sequence[tuple[int, int]]:
    found = []
    place = 0
    while place < size:
        head = pread(place, 18)
        if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
            place += 8 + int.from_bytes(head[4:8], "little")
            continue
        if head[:4] != MAGICS["zst"]:
            break  # behind the last frame: ignored when decompressing too
        descriptor = head[4]
        single = descriptor >> 5 & 1
        field = (single, 2, 4, 8)[descriptor >> 6]
        if not field:
            raise _UnknownSizeError
        at = 6 - single + (0, 1, 2, 4)[descriptor & 3]
        length = int.from_bytes(head[at : at + field], "little") + (256 if field == 2 else 0)
        found.append((place, length))
        if length > FARTHEST:
            return found
        place += at + field
        last = blocks = 0
        while not last:
            blocks += 1
            if place >= size or blocks > 1 << 16:
                raise _UnknownSizeError
            block = int.from_bytes(pread(place, 3), "little")
            last = block & 1
            place += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        place += 4 if descriptor & 4 else 0
    return found
