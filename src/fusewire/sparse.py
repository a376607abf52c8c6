"""The bytes of one file in memory, sparse: what was never written takes no room, at any offset.

Layer `inodes`, for filesystems in memory; plain data without a lock, a clock or a limit: who calls holds the lock and
asks `grows` first.
"""

from __future__ import annotations

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.ops import Buffer

# Small enough that a byte in the middle of nowhere costs little, large enough that a READ of 1 MiB is few pieces.
CHUNK = 1 << 16
_ZEROS = bytes(CHUNK)


class SparseData:
    """Chunks by their number. A chunk may be short: what it lacks is zeros, as are chunks that are not there.

    Invariant: no byte at or after `size` is other than zero, so that growing needs nothing but a new size. Chunks
    after `size` exist where space was reserved.
    """

    __slots__ = ("_order", "allocated", "chunks", "size")

    def __init__(self) -> None:
        self.size = 0
        self.allocated = 0  # bytes that the chunks have
        self.chunks: dict[int, bytearray] = {}
        self._order: list[int] | None = []  # the numbers in order; None when there are others since

    def read(self, offset: int, size: int) -> list[Buffer]:
        """Give up to `size` bytes as buffers that later writes do not change."""
        parts: list[Buffer] = []
        end = min(offset + size, self.size)
        while offset < end:
            number, start = divmod(offset, CHUNK)
            stop = min(CHUNK, start + end - offset)
            offset += stop - start
            chunk = self.chunks.get(number)
            if chunk is None:
                parts.append(_ZEROS if stop - start == CHUNK else memoryview(_ZEROS)[: stop - start])
                continue
            part = bytes(memoryview(chunk)[start:stop])
            parts.append(part)
            if len(part) < stop - start:
                parts.append(memoryview(_ZEROS)[: stop - start - len(part)])
        return parts

    def grows(self, offset: int, length: int) -> int:
        """Tell by how many bytes the chunks grow at most when that range is written or reserved."""
        if length <= 0:
            return 0
        first, last = offset // CHUNK, (offset + length - 1) // CHUNK
        end = (offset + length - 1) % CHUNK + 1
        whole = (last - first) * CHUNK + end
        for number in self._between(first, last):
            whole -= min(len(self.chunks[number]), end if number == last else CHUNK)
        return whole

    def _between(self, first: int, last: int) -> list[int]:
        """Give the numbers of the chunks from `first` to `last`, by the shorter way."""
        if last - first < len(self.chunks):
            return [number for number in range(first, last + 1) if number in self.chunks]
        return [number for number in self.chunks if first <= number <= last]

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` and grow as far as that needs."""
        position, length = 0, len(data)
        while position < length:
            number, start = divmod(offset + position, CHUNK)
            count = min(CHUNK - start, length - position)
            self._put(number, start, data[position : position + count])
            position += count
        self.size = max(self.size, offset + length)

    def _put(self, number: int, start: int, data: memoryview) -> None:
        chunk = self.chunks.get(number)
        if chunk is None:
            chunk = self.chunks[number] = bytearray()
            self._order = None
        before = len(chunk)
        if start > before:
            chunk += bytes(start - before)
        chunk[start : start + len(data)] = data
        self.allocated += len(chunk) - before

    def truncate(self, size: int) -> None:
        """Cut or grow to `size`; reserved space after it goes too."""
        if self.allocated:
            edge, keep = divmod(size, CHUNK)
            for number in [number for number in self.chunks if number > edge or (number == edge and not keep)]:
                self._drop(number)
            chunk = self.chunks.get(edge)
            if chunk is not None and len(chunk) > keep:
                self.allocated -= len(chunk) - keep
                del chunk[keep:]
        self.size = size

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give back what it took; the size stays."""
        if length <= 0:
            return
        end = offset + length
        first, last = offset // CHUNK, (end - 1) // CHUNK
        for number in self._between(first, last):
            chunk = self.chunks[number]
            start = max(0, offset - number * CHUNK)
            stop = min(len(chunk), end - number * CHUNK)
            if start >= stop:
                continue
            if stop < len(chunk):
                chunk[start:stop] = bytes(stop - start)
            elif start:
                self.allocated -= len(chunk) - start
                del chunk[start:]
            else:
                self._drop(number)

    def _drop(self, number: int) -> None:
        self.allocated -= len(self.chunks.pop(number))
        self._order = None

    def reserve(self, offset: int, length: int) -> None:
        """Take room for a range, so that writing it needs no more; neither size nor data change."""
        end = offset + length
        self._order = None
        for number in range(offset // CHUNK, (end - 1) // CHUNK + 1):
            chunk = self.chunks.setdefault(number, bytearray())
            missing = min(CHUNK, end - number * CHUNK) - len(chunk)
            if missing > 0:
                chunk += bytes(missing)
                self.allocated += missing

    def next_data(self, offset: int) -> int:
        """Give where the next data at or after `offset` begins; `size` if there is none."""
        number = offset // CHUNK
        if offset < self.size:
            if number in self.chunks:
                return offset
            if self._order is None:
                self._order = sorted(self.chunks)
            place = bisect_right(self._order, number)
            if place < len(self._order):
                return min(self._order[place] * CHUNK, self.size)
        return self.size

    def next_hole(self, offset: int) -> int:
        """Give where the next hole at or after `offset` begins; the end of the file is one."""
        number = offset // CHUNK
        if number not in self.chunks:
            return min(offset, self.size)
        while number in self.chunks:
            number += 1
        return min(number * CHUNK, self.size)
