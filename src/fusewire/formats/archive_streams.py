"""Compressed data read at any place: gzip, xz, zstd, bzip2, and what members of a zip archive are packed with.

Layer `formats`: given a `pread(offset, size) -> bytes`; knows nothing of FUSE nor of what the data mean, and does no
I/O but through what it is given. Decompressors work forward only. What makes them random access:

* deflate: zlib's whole state can be copied (about 45 KiB), so `Stream` keeps copies some MiB apart;
* xz blocks and zstd frames are places to begin (`formats.archive_points` finds them), if none is too far from the next;
* the rest (bzip2, one xz block or zstd frame for everything) is decompressed once into a `Store`: `Spooled`.

Output is bounded by what is asked for, never by what the data claim: a decompression bomb costs its reader time only.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from bisect import bisect_right

from fusewire.formats.blockcache import BlockCache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    Pread = Callable[[int, int], bytes]

    class Store(Protocol):
        """Where decompressed data are kept: a file that grows at its end."""

        def append(self, data: bytes) -> None: ...
        def pread(self, offset: int, length: int) -> bytes: ...

    class Reader(Protocol):
        """What all of them are to their users. `consumed`: how far the first pass has come in the stored bytes."""

        @property
        def consumed(self) -> int: ...
        def read(self, offset: int, length: int) -> Sequence[bytes | bytearray | memoryview]: ...
        def ready(self, offset: int, length: int) -> bool: ...
        def approach(self, offset: int, length: int) -> bool: ...


CHUNK = 128 << 10  # what is cached, and the most that is decompressed at a time
_INPUT = 16 << 10  # the most that is read at a time: a copy of zlib's state holds on to what is left of it
SPACING = 512 << 10  # bytes between copies of a zlib state, at first: 2 ms of work
_STRIDE = 8 << 20  # how much is decompressed in one go: tens of milliseconds, or some hundred for xz
_CURSORS = 3  # readers of one stream that each go forward for themselves
LZMA_MEMORY = 256 << 20  # `xz -9` needs 65 MiB
ZSTD_WINDOW_LOG = 27  # 128 MiB, the limit of the zstd command too

MAGICS = {"gz": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\0", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh"}
INSTALL = "pip install 'fusewire[archives]'"


class ArchiveError(OSError):
    """The archive is damaged, or is not what it was taken for."""


def damaged(text: str) -> ArchiveError:
    """Make the error for data that cannot be right, EIO."""
    return ArchiveError(errno.EIO, f"damaged archive: {text}")


# -- Decompressors of one stream


def zstd_module() -> Any:
    """The standard library's zstd module, or the package that is the same. Raises ImportError."""
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd


def maker(kind: str) -> tuple[Callable[[], Any], tuple[type[BaseException], ...]]:
    """For 'gz', 'deflate', 'xz', 'lzma' (as in .lzma files), 'bz2' or 'zst': what makes a decompressor, its errors.

    Raises ArchiveError (ENOPKG) where there is none, with the way to get one.
    """
    try:
        if kind in ("gz", "deflate"):
            import zlib

            bits = 31 if kind == "gz" else -15
            return lambda: zlib.decompressobj(bits), (zlib.error,)
        if kind in ("xz", "lzma"):
            import lzma

            form = lzma.FORMAT_XZ if kind == "xz" else lzma.FORMAT_ALONE
            return lambda: lzma.LZMADecompressor(form, memlimit=LZMA_MEMORY), (lzma.LZMAError,)
        if kind == "bz2":
            import bz2

            return bz2.BZ2Decompressor, (OSError, ValueError)
    except ImportError as error:
        raise ArchiveError(errno.ENOPKG, f"this Python was built without {error.name}: use one that has it") from None
    try:
        zstd = zstd_module()
    except ImportError:
        from fusewire.formats.archive_zstd import LibzstdError, libzstd

        try:
            return libzstd(), (LibzstdError,)
        except (ImportError, OSError, AttributeError):
            text = f"no zstd decompressor is installed: {INSTALL}, or install Debian's libzstd1"
            raise ArchiveError(errno.ENOPKG, text) from None
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    return lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError,)


class Decoder:
    """Decompresses forward from one place. `position` is the next byte of the file to be read.

    `joined`: streams follow each other, as in files of gzip, xz, zstd and bzip2; what follows and is none is ignored,
    as these tools do.
    """

    __slots__ = ("_data", "_end", "_errors", "_joined", "_kind", "_make", "_pread", "_stream", "position")

    def __init__(
        self, pread: Pread, start: int, end: int, kind: str, *, prefix: bytes = b"", joined: bool = True
    ) -> None:
        """Begin at `start`; nothing at or behind `end` is read. `prefix` goes to the decompressor first."""
        self._joined = joined
        self._pread = pread
        self.position = start
        self._end = end
        self._kind = kind
        self._make, self._errors = maker(kind)
        self._stream = self._make()
        self._data = prefix

    def copy(self) -> Decoder:
        """A decoder that goes on from here by itself. Only for zlib, whose state can be copied.

        What was read and not used yet is read again: kept, it would be larger than the state.
        """
        other = Decoder.__new__(Decoder)
        other._pread, other.position, other._end = self._pread, self.position - len(self._data), self._end
        other._kind, other._make, other._errors, other._joined = self._kind, self._make, self._errors, self._joined
        other._stream, other._data = self._stream.copy(), b""
        return other

    def more(self, limit: int) -> bytes:
        """Give up to `limit` of the next bytes; none at the end. Raises ArchiveError."""
        inflates = self._kind in ("gz", "deflate")
        while True:
            stream = self._stream
            if stream.eof:
                if not self._next_stream(stream.unused_data or self._data):
                    return b""
                continue
            data = self._data
            hungry = not data and (inflates or stream.needs_input)
            if hungry and self.position < self._end:
                data = self._pread(self.position, min(_INPUT, self._end - self.position))
                self.position += len(data)
            try:
                out: bytes = stream.decompress(data, limit)
            except self._errors as error:
                raise damaged(f"{error} (near byte {self.position})") from None
            except MemoryError:
                raise damaged(f"it asks for too much memory (near byte {self.position})") from None
            self._data = stream.unconsumed_tail if inflates else b""
            if out:
                return out
            if hungry and not data and not stream.eof:
                raise damaged(f"the compressed data end early, at byte {self.position}")

    def verify(self) -> None:
        """Take in what is left to be read, for the checksum in it; only for the decompressors of lzma.

        Raises ArchiveError if that is wrong, or if data are left.
        """
        data = self._data
        while data or not self._stream.needs_input or self.position < self._end:
            if not data and self._stream.needs_input:
                data = self._pread(self.position, min(_INPUT, self._end - self.position))
                self.position += len(data)
                if not data:
                    return
            try:
                out = self._stream.decompress(data, 1)
            except self._errors as error:
                raise damaged(f"{error} (near byte {self.position})") from None
            if out:
                raise damaged(f"a block holds more than the index says (near byte {self.position})")
            data = b""

    def _next_stream(self, rest: bytes) -> bool:
        """Begin the stream that follows, if there is one."""
        self._data = b""
        magic = MAGICS.get(self._kind)
        if magic is None or not self._joined:
            return False
        while True:
            if self._kind in ("xz", "gz"):
                rest = rest.lstrip(b"\0")  # padding, as on tapes
            if len(rest) >= 16 or self.position >= self._end:
                break
            more = self._pread(self.position, min(_INPUT, self._end - self.position))
            if not more:
                break
            self.position += len(more)
            rest += more
        skippable = self._kind == "zst" and rest[1:4] == b"\x2a\x4d\x18" and rest[0] >> 4 == 5
        if not (rest.startswith(magic[:2] if self._kind == "gz" else magic) or skippable):
            return False
        self._stream, self._data = self._make(), rest
        return True


# -- Where to begin


class Point:
    """A place where decompression can begin: `offset` in the decompressed data, and how."""

    __slots__ = ("begin", "offset")

    def __init__(self, offset: int, begin: Callable[[], Decoder | Blocks]) -> None:
        self.offset = offset
        self.begin = begin


class Blocks:
    """Goes through an xz file from one block to the next. Has the methods of `Decoder`.

    A block is given to liblzma as if it were the first of a stream: what follows it is never reached.
    """

    __slots__ = ("_blocks", "_decoder", "_left", "_next", "_pread", "position")

    def __init__(self, pread: Pread, blocks: list[tuple[bytes, int, int, int]], first: int) -> None:
        """Begin with the block of number `first`; each is (stream header, start, length, decompressed length)."""
        self._pread = pread
        self._blocks = blocks
        self._next = first
        self._decoder: Decoder | None = None
        self._left = 0
        self.position = blocks[first][1]

    def copy(self) -> Blocks:
        """Not needed: there are points at all blocks."""
        raise NotImplementedError

    def more(self, limit: int) -> bytes:
        while True:
            if self._decoder is None:
                if self._next >= len(self._blocks):
                    return b""
                header, start, length, self._left = self._blocks[self._next]
                self._next += 1
                self._decoder = Decoder(self._pread, start, start + length, "xz", prefix=header, joined=False)
            if not self._left:
                self._decoder = None
                continue
            data = self._decoder.more(min(limit, self._left))
            self.position = self._decoder.position
            if not data:
                raise damaged(f"an xz block ends early, at byte {self.position}")
            self._left -= len(data)
            if not self._left:
                self._decoder.verify()
            return data


# -- Random access


class Chunks(BlockCache[tuple[int, int]]):
    """The cache of chunks: (stream, number) -> data. Beside `load`, it takes what was made on the way to another."""

    __slots__ = ()

    def _hold(self, key: tuple[int, int], block: bytes) -> None:
        if key not in self._blocks:
            super()._hold(key, block)

    def put(self, key: tuple[int, int], block: bytes) -> None:
        """Keep a block that nobody has asked for."""
        with self._lock:
            self._hold(key, block)

    def get(self, key: tuple[int, int]) -> bytes | None:
        """Give a block that is there."""
        return self._blocks.get(key)


class Stream:
    """Decompressed data at any offset, through points to begin at and a bounded cache of chunks.

    With `copies`, zlib's state is copied on the first pass: first every `SPACING` bytes, and where that would be more
    than `copies` of them, twice as far apart. Safe for threads; one of them decompresses at a time.
    """

    __slots__ = (
        *("_cache", "_copies", "_crc", "_crc_at", "_cursors", "_key"),
        *("_lock", "_points", "_size", "_spacing", "consumed"),
    )

    def __init__(
        self,
        points: list[Point],
        cache: Chunks,
        key: int = 0,
        *,
        copies: int = 0,
        size: int | None = None,
        crc: int | None = None,
    ) -> None:
        """Read what begins at `points[0]`. `key` tells its chunks from others in `cache`.

        size: the length that must come out (nothing behind it is ever decompressed). crc: the CRC-32 of all of it,
        which who reads to the end is sure to have had checked.
        """
        self._points = points
        self._cache = cache
        self._key = key
        self._copies = copies
        self._spacing = SPACING
        self._size = size
        self._crc = crc
        self._crc_at: tuple[int, int] = (0, 0)  # how far the first pass has come, and the CRC up to there
        self._cursors: list[tuple[int, Decoder | Blocks]] = []  # next offset; last used last
        self._lock = allocate_lock()
        self.consumed = 0

    def ready(self, offset: int, length: int) -> bool:
        """Tell whether `read` would answer without decompressing."""
        key, cache = self._key, self._cache
        return all((key, number) in cache for number in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))

    def read(self, offset: int, length: int) -> list[bytes | memoryview]:
        """Give up to `length` bytes; fewer at the end. Raises ArchiveError."""
        if self._size is not None:
            length = min(length, self._size - offset)
        parts: list[bytes | memoryview] = []
        while length > 0:
            number, skip = divmod(offset, CHUNK)
            chunk = self._cache.load((self._key, number), self._make)
            if skip == 0 and len(chunk) <= length:
                part: bytes | memoryview = chunk
            else:
                part = memoryview(chunk)[skip : skip + length]
            if len(part):
                parts.append(part)
            if len(chunk) < CHUNK:
                break
            offset += len(part)
            length -= len(part)
        return parts

    def approach(self, offset: int, length: int) -> bool:
        """Decompress some MiB on the way to `offset`; give True when a read there would not take much longer."""
        wanted = offset // CHUNK * CHUNK
        with self._lock:
            begun, decoder = self._nearest(wanted)
            stop = min(wanted, begun + _STRIDE)
            while begun < stop:
                chunk = self._next(begun, decoder)
                self._keep(begun, chunk)
                begun += len(chunk)
                if begun % CHUNK or not chunk:
                    return True  # the end; whoever reads behind it will be told
            self._cursors.append((begun, decoder))
            del self._cursors[:-_CURSORS]
            return wanted - begun <= _STRIDE

    def _make(self, key: tuple[int, int]) -> bytes:
        wanted = key[1] * CHUNK
        with self._lock:
            made = self._cache.get(key)
            if made is not None:
                return made
            offset, decoder = self._nearest(wanted)
            while True:
                begun = offset
                chunk = self._next(begun, decoder)
                offset += len(chunk)
                if offset % CHUNK or not chunk or begun >= wanted:
                    break
                self._keep(begun, chunk)
            if chunk and not offset % CHUNK:
                self._cursors.append((offset, decoder))
                del self._cursors[:-_CURSORS]
            elif self._size is not None and offset < self._size:
                raise damaged(f"its data end at {offset} instead of {self._size} bytes")
            if begun < wanted:
                chunk = b""
            if self._size is not None and offset >= self._size and self._crc is not None:
                self._check(self._size, chunk, begun)
            return chunk

    def _keep(self, begun: int, chunk: bytes) -> None:
        """Have a chunk on the way to another in the cache: members are often read backwards, or at random."""
        if len(chunk) == CHUNK:
            self._cache.put((self._key, begun // CHUNK), chunk)

    def _next(self, begun: int, decoder: Decoder | Blocks) -> bytes:
        """Decompress up to the next multiple of `CHUNK`, whatever the point's offset was; less at the end."""
        size = CHUNK - begun % CHUNK
        parts = []
        while size and (part := decoder.more(size)):
            parts.append(part)
            size -= len(part)
        chunk = b"".join(parts)
        self._passed(begun, chunk, decoder)
        return chunk

    def _nearest(self, wanted: int) -> tuple[int, Decoder | Blocks]:
        """Take the cursor that is nearest before `wanted`, or begin at a point that is nearer."""
        best = -1
        for number, (offset, _) in enumerate(self._cursors):
            if offset <= wanted and (best < 0 or offset > self._cursors[best][0]):
                best = number
        at = bisect_right(self._points, wanted, key=lambda point: point.offset) - 1
        if best >= 0 and self._cursors[best][0] >= self._points[at].offset:
            return self._cursors.pop(best)
        point = self._points[at]
        return point.offset, point.begin()

    def _passed(self, begun: int, chunk: bytes, decoder: Decoder | Blocks) -> None:
        """On the first pass: keep a copy of the state now and then, and the checksum."""
        offset = begun + len(chunk)
        self.consumed = max(self.consumed, decoder.position)
        if self._crc is not None and begun == self._crc_at[0] and offset <= (self._size or offset):
            import zlib

            self._crc_at = (offset, zlib.crc32(chunk, self._crc_at[1]))
        if not self._copies or offset % CHUNK or offset - self._points[-1].offset < self._spacing:
            return
        assert isinstance(decoder, Decoder)
        self._points.append(Point(offset, decoder.copy().copy))
        if len(self._points) > self._copies:
            del self._points[1::2]
            self._spacing *= 2

    def _check(self, end: int, chunk: bytes, begun: int) -> None:
        import zlib

        done, crc = self._crc_at
        if done == begun:  # the last piece, longer than it should be
            crc = zlib.crc32(chunk[: end - begun], crc)
        elif done < end:
            return  # a later pass: whatever was before it has been checked or never read in order
        if crc != self._crc:
            raise damaged("its checksum is wrong")


class Spooled:
    """Data that can only be decompressed from the beginning: kept in a `Store` as far as anybody has read."""

    __slots__ = (
        *("_begin", "_crc", "_decoder", "_end", "_failure", "_filled"),
        *("_left", "_lock", "_size", "consumed", "store"),
    )

    def __init__(
        self, begin: Callable[[], Decoder], store: Store, *, size: int | None = None, crc: int | None = None
    ) -> None:
        """Decompress what `begin()` gives into `store`. size, crc: what must come out, as for `Stream`."""
        self._begin = begin
        self._decoder: Decoder | None = None
        self.store = store
        self._filled = 0
        self._end = False
        self._failure: OSError | None = None  # for good: what was lost cannot be decompressed again
        self._size = size
        self._left = crc  # the CRC to come to
        self._crc = 0
        self._lock = allocate_lock()
        self.consumed = 0

    def ready(self, offset: int, length: int) -> bool:
        """Tell whether `read` would answer without decompressing."""
        return self._end or offset + length <= self._filled

    def approach(self, offset: int, length: int) -> bool:
        """Decompress until the end of that range, or some MiB more; give True when `read` would answer at once."""
        with self._lock:
            end = offset + length if self._size is None else min(offset + length, self._size)
            stop = min(end, self._filled + _STRIDE)
            while self._filled < stop and not self._end:
                if self._failure is not None:
                    raise self._failure
                try:
                    self._more()
                except OSError as error:
                    self._failure = error
                    self._decoder = None
                    raise
            return self._end or self._filled >= end

    def _more(self) -> None:
        if self._decoder is None:
            self._decoder = self._begin()
        data = self._decoder.more(CHUNK if self._size is None else min(CHUNK, self._size - self._filled))
        self.consumed = self._decoder.position
        if not data and self._size is not None:
            raise damaged(f"its data end at {self._filled} instead of {self._size} bytes")
        if self._left is not None:
            self._sum(data)
        if data:
            self.store.append(data)
            self._filled += len(data)
        if not data or self._filled == self._size:
            self._end = True
            self._decoder = None

    def _sum(self, data: bytes) -> None:
        import zlib

        crc = zlib.crc32(data, self._crc)
        if self._filled + len(data) == self._size and crc != self._left:
            raise damaged("its checksum is wrong")
        self._crc = crc

    def read(self, offset: int, length: int) -> list[bytes]:
        """Give up to `length` bytes; fewer at the end. Raises ArchiveError, and OSError of the store."""
        while not self.approach(offset, length):
            pass
        return [self.store.pread(offset, length)]
