"""Decompressors for squashfs blocks, chosen by measured speed and bounded in output; formats layer.

A decompressor is `function(stored, bound) -> bytes`: whole blocks in, at most `bound` bytes out. More than that, or
anything that is not one complete stream, raises CorruptDataError; nothing larger than `bound` and the codec's own state
is ever allocated, so a decompression bomb costs what an honest block costs. (lzallright, which knows no bound, may take
16 times as much.) Every one of them may be called from several threads at once and releases the GIL while it works.
Nothing is imported or opened before a codec is asked for. No I/O, no knowledge of where a block comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["CorruptDataError", "Decompress", "MissingDecompressorError", "available", "decompressor"]

Decompress = Callable[[bytes, int], bytes]

# liblzma allocates the dictionary that a stream asks for. An honest block asks for at most its own size, 1 MiB.
LZMA_MEMORY_LIMIT = 4 << 20


class CorruptDataError(ValueError):
    """The stored bytes are not one complete stream of at most the expected length."""


class MissingDecompressorError(ImportError):
    """No library for this compressor is installed; the message says how to get one."""


class _Contexts:
    """A codec's C contexts, lent to one thread at a time; there are as many as were ever in use at once."""

    __slots__ = ("_create", "_free", "_release")

    def __init__(self, create: Callable[[], int | None], release: Callable[[int], object]) -> None:
        self._create = create
        self._release = release
        self._free: list[int] = []

    def take(self) -> int:
        try:
            return self._free.pop()
        except IndexError:
            context = self._create()
        if not context:
            raise MemoryError("no memory for a decompression context")
        return context

    def give(self, context: int) -> None:
        self._free.append(context)

    def __del__(self) -> None:
        for context in self._free:
            self._release(context)


def _new_bytes() -> Callable[[None, int], bytes]:
    """`function(None, n)` makes a bytes object of n unset bytes, for a C library to fill before anybody else sees it.

    A bytearray would be cleared first and cannot be hashed, searched or sliced without the wrapping that costs 3 us of
    the 5 us that an 8 KiB lz4 block takes. n must not be 0: the empty bytes object is shared.
    """
    import ctypes

    function = ctypes.pythonapi.PyBytes_FromStringAndSize
    function.restype = ctypes.py_object
    function.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
    return function


# -- gzip: microseconds for 128 KiB | 8 KiB on CPython 3.11: libdeflate 285|25, isal 335|30, zlib 710|48.


def _libdeflate() -> Decompress:
    import ctypes

    library = ctypes.CDLL("libdeflate.so.0")
    create = library.libdeflate_alloc_decompressor
    create.restype = ctypes.c_void_p
    create.argtypes = []
    release = library.libdeflate_free_decompressor
    release.restype = None
    release.argtypes = [ctypes.c_void_p]
    inflate = library.libdeflate_zlib_decompress
    inflate.restype = ctypes.c_int
    size_t = ctypes.c_size_t
    inflate.argtypes = [ctypes.c_void_p, ctypes.c_char_p, size_t, ctypes.c_char_p, size_t, ctypes.POINTER(size_t)]
    contexts = _Contexts(create, release)
    blank = _new_bytes()
    reasons = {1: "not a valid zlib stream", 2: "zlib stream ends early"}

    def decompress(stored: bytes, bound: int) -> bytes:
        out = blank(None, bound)
        length = size_t()
        context = contexts.take()
        try:
            status = inflate(context, stored, len(stored), out, bound, length)
        finally:
            contexts.give(context)
        if status:
            raise CorruptDataError(reasons.get(status, f"zlib stream holds more than {bound} bytes"))
        return out if length.value == bound else out[: length.value]

    return decompress


def _stream(make: Callable[[], Any], error: Any, name: str) -> Decompress:
    """The decompressor of the standard library's kind of object: `decompress(data, max_length)` and `eof`."""

    def decompress(stored: bytes, bound: int) -> bytes:
        stream = make()
        try:
            out: bytes = stream.decompress(stored, bound + 1)
        except error as exc:
            raise CorruptDataError(f"not a valid {name} stream: {exc}") from None
        if len(out) > bound:
            raise CorruptDataError(f"{name} stream holds more than {bound} bytes")
        if not stream.eof:
            raise CorruptDataError(f"{name} stream ends early")
        return out

    return decompress


def _isal() -> Decompress:
    from isal import isal_zlib

    return _stream(isal_zlib.decompressobj, isal_zlib.error, "zlib")


def _zlib() -> Decompress:
    import zlib

    return _stream(zlib.decompressobj, zlib.error, "zlib")


# -- zstd: microseconds for 128 KiB | 8 KiB: libzstd through ctypes 244|23, backports.zstd 298|26. The packages also
# cost 7 ms to import (enum); ctypes is there already.


def _libzstd() -> Decompress:
    import ctypes

    library = ctypes.CDLL("libzstd.so.1")
    create = library.ZSTD_createDCtx
    create.restype = ctypes.c_void_p
    create.argtypes = []
    release = library.ZSTD_freeDCtx
    release.restype = ctypes.c_size_t
    release.argtypes = [ctypes.c_void_p]
    error_name = library.ZSTD_getErrorName
    error_name.restype = ctypes.c_char_p
    error_name.argtypes = [ctypes.c_size_t]
    run = library.ZSTD_decompressDCtx
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    contexts = _Contexts(create, release)
    blank = _new_bytes()

    def decompress(stored: bytes, bound: int) -> bytes:
        out = blank(None, bound)
        context = contexts.take()
        try:
            length: int = run(context, out, bound, stored, len(stored))
        finally:
            contexts.give(context)
        if length > bound:  # errors are the highest values of size_t
            raise CorruptDataError(f"not a valid zstd frame of at most {bound} bytes: {error_name(length).decode()}")
        return out if length == bound else out[:length]

    return decompress


def _zstd_module(module: Any) -> Decompress:
    # A frame may ask for a window of 2 GiB: squashfs needs at most its block size, and the kernel allows no more.
    options = {module.DecompressionParameter.window_log_max: 20}
    return _stream(lambda: module.ZstdDecompressor(options=options), module.ZstdError, "zstd")


def _compression_zstd() -> Decompress:
    from compression import zstd

    return _zstd_module(zstd)


def _backports_zstd() -> Decompress:
    from backports import zstd

    return _zstd_module(zstd)


def _zstandard() -> Decompress:
    import zstandard

    return _stream(lambda: _BoundedZstandard(zstandard), zstandard.ZstdError, "zstd")


class _BoundedZstandard:
    """zstandard behind the standard library's shape: its own decompressobj knows no output limit, its reader does."""

    __slots__ = ("_module", "eof")

    def __init__(self, module: Any) -> None:
        self._module = module
        self.eof = True  # the reader raises at a frame that ends early, or gives less than the caller expects

    def decompress(self, stored: bytes, limit: int) -> bytes:
        reader = self._module.ZstdDecompressor(max_window_size=1 << 20).stream_reader(stored)
        out: bytes = reader.read(limit)
        return out


# -- lz4: 57|4.8 through ctypes, 64|4.5 by the lz4 package: the one without an import first.


def _liblz4() -> Decompress:
    import ctypes

    run = ctypes.CDLL("liblz4.so.1").LZ4_decompress_safe
    run.restype = ctypes.c_int
    run.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    blank = _new_bytes()

    def decompress(stored: bytes, bound: int) -> bytes:
        out = blank(None, bound)
        length: int = run(stored, out, len(stored), bound)
        if length < 0:
            raise CorruptDataError(f"not a valid lz4 block of at most {bound} bytes")
        return out if length == bound else out[:length]

    return decompress


def _lz4_package() -> Decompress:
    from lz4 import block

    def decompress(stored: bytes, bound: int) -> bytes:
        try:
            out: bytes = block.decompress(stored, uncompressed_size=bound)
        except (block.LZ4BlockError, ValueError) as exc:
            raise CorruptDataError(f"not a valid lz4 block of at most {bound} bytes: {exc}") from None
        return out

    return decompress


# -- lzo: 330|24 through ctypes, 270|18 by lzallright; but only the C library's function is told a limit.


def _liblzo() -> Decompress:
    import ctypes

    run = ctypes.CDLL("liblzo2.so.2").lzo1x_decompress_safe
    run.restype = ctypes.c_int
    size_t = ctypes.c_size_t
    run.argtypes = [ctypes.c_char_p, size_t, ctypes.c_char_p, ctypes.POINTER(size_t), ctypes.c_void_p]
    blank = _new_bytes()

    def decompress(stored: bytes, bound: int) -> bytes:
        out = blank(None, bound)
        length = size_t(bound)
        status = run(stored, len(stored), out, length, None)
        if status or length.value > bound:
            raise CorruptDataError(f"not a valid lzo block of at most {bound} bytes (lzo error {status})")
        return out if length.value == bound else out[: length.value]

    return decompress


def _lzallright() -> Decompress:
    import lzallright

    codec = lzallright.LZOCompressor()

    def decompress(stored: bytes, bound: int) -> bytes:
        # The package grows its output as the stream asks (255 bytes for a stored one). Cheap ceiling first: a zero byte
        # can stand for 255 bytes, the three opcodes that start a long match for 288, any other byte for 11. Honest
        # blocks stay below 16 bounds; what does not is measured by walking the stream.
        count = stored.count
        ceiling = 255 * count(0) + 288 * (count(0x10) + count(0x18) + count(0x20)) + 11 * len(stored)
        if ceiling > 16 * bound and lzo_length(stored, bound) > bound:
            raise CorruptDataError(f"lzo block holds more than {bound} bytes")
        try:
            out: bytes = codec.decompress(stored, bound)
        except lzallright.LZOError as exc:
            raise CorruptDataError(f"not a valid lzo block: {exc}") from None
        if len(out) > bound:
            raise CorruptDataError(f"lzo block holds more than {bound} bytes")
        return out

    return decompress


def lzo_length(stored: bytes, bound: int) -> int:
    """How many bytes an LZO1X stream makes, counted without making them; stops soon after `bound`.

    The stream format is that of the kernel's Documentation/staging/lzo.rst, without its RLE extension, which squashfs
    does not use. A stream that ends early is counted as far as it goes: the decompressor refuses it.
    """
    total = 0
    try:
        for length in _lzo_steps(stored):
            total += length
            if total > bound:
                break
    except IndexError:
        pass
    return total


def _lzo_steps(stored: bytes) -> Iterator[int]:
    position = 0
    literals = 0  # how many literals the last instruction copied, 4 for a long run
    if stored[0] > 17:
        literals = stored[0] - 17
        position = 1 + literals
        yield literals
    while True:
        code = stored[position]
        position += 1
        if code >= 64:  # short match, one more distance byte
            yield (code >> 5) + 1
            literals = code & 3
            position += 1
        elif code >= 16:  # match with a 16-bit distance whose two lowest bits count literals
            mask = 31 if code >= 32 else 7
            length = code & mask
            if not length:
                length = mask
                while not stored[position]:
                    length += 255
                    position += 1
                length += stored[position]
                position += 1
            distance = stored[position] | stored[position + 1] << 8
            position += 2
            if code < 32 and not code & 8 and not distance >> 2:
                return  # the end marker
            yield length + 2
            literals = distance & 3
        elif not literals:  # a run of literals
            length = code
            if not length:
                length = 15
                while not stored[position]:
                    length += 255
                    position += 1
                length += stored[position]
                position += 1
            position += length + 3
            yield length + 3
            literals = 4
            continue
        else:  # two or three bytes from nearby, or right after a run
            yield 3 if literals >= 4 else 2
            position += 1
            literals = code & 3
        position += literals
        yield literals


# -- xz and lzma: 3.7 ms for 128 KiB whoever calls liblzma, so the standard library's binding it is.


def _xz() -> Decompress:
    import lzma

    return _stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_LIMIT), lzma.LZMAError, "xz")


def _lzma() -> Decompress:
    import lzma

    # squashfs keeps LZMA1 as .lzma files have it: 5 bytes of properties, 8 of length, the stream.
    return _stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY_LIMIT), lzma.LZMAError, "lzma")


class _Codec(NamedTuple):
    providers: tuple[tuple[str, Callable[[], Decompress]], ...]  # best first
    hint: str  # what to install when there is none


_CODECS = {
    "gzip": _Codec(
        (("libdeflate", _libdeflate), ("isal", _isal), ("zlib", _zlib)),
        "this Python was built without zlib: use one that has it, or: pip install 'fusewire[fast]'",
    ),
    "lzma": _Codec((("lzma", _lzma),), "this Python was built without lzma: use one that has it"),
    "lzo": _Codec(
        (("liblzo2", _liblzo), ("lzallright", _lzallright)),
        "pip install 'fusewire[squashfs]', or install Debian's liblzo2-2",
    ),
    "xz": _Codec((("lzma", _xz),), "this Python was built without lzma: use one that has it"),
    "lz4": _Codec(
        (("liblz4", _liblz4), ("lz4", _lz4_package)),
        "pip install 'fusewire[squashfs]', or install Debian's liblz4-1",
    ),
    "zstd": _Codec(
        (
            ("libzstd", _libzstd),
            ("compression.zstd", _compression_zstd),
            ("backports.zstd", _backports_zstd),
            ("zstandard", _zstandard),
        ),
        "pip install 'fusewire[squashfs]', or install Debian's libzstd1",
    ),
}


def _providers(name: str) -> Iterator[tuple[str, Decompress]]:
    for provider, make in _CODECS[name].providers:
        try:
            function = make()
        except (ImportError, OSError, AttributeError):  # no package, no library, or one without the function
            continue
        yield provider, function


def decompressor(name: str) -> tuple[str, Decompress]:
    """The fastest decompressor that is installed for 'gzip', 'lzma', 'lzo', 'xz', 'lz4' or 'zstd', and who provides it.

    Raises MissingDecompressorError, with the way to get one, and KeyError for another name.
    """
    for found in _providers(name):
        return found
    raise MissingDecompressorError(f"no {name} decompressor is installed: {_CODECS[name].hint}")


def available() -> dict[str, tuple[str | None, str]]:
    """For each compressor: what decompresses it here (None: nothing does), and what to install for it."""
    return {name: (next(_providers(name), (None, None))[0], codec.hint) for name, codec in _CODECS.items()}
