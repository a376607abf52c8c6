"""The system's libzstd through ctypes, in the shape of the standard library's decompressors, for Pythons without zstd.

Layer `formats`, for `formats.archive_streams`; does no I/O. (`formats.compression` has it for whole blocks, which is
all that squashfs needs.)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class LibzstdError(ValueError):
    """What the library says of data that cannot be right."""


def libzstd() -> Callable[[], Libzstd]:
    """Give what makes a decompressor. Raises OSError or AttributeError where the library is missing or too old."""
    import ctypes

    class Span(ctypes.Structure):
        """ZSTD_inBuffer and ZSTD_outBuffer of <zstd.h>."""

        _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t))

    library = ctypes.CDLL("libzstd.so.1")
    for name, result, arguments in (
        ("createDStream", ctypes.c_void_p, []),
        ("freeDStream", ctypes.c_size_t, [ctypes.c_void_p]),
        ("decompressStream", ctypes.c_size_t, [ctypes.c_void_p, ctypes.POINTER(Span), ctypes.POINTER(Span)]),
        ("isError", ctypes.c_uint, [ctypes.c_size_t]),
        ("getErrorName", ctypes.c_char_p, [ctypes.c_size_t]),
    ):
        function = getattr(library, f"ZSTD_{name}")
        function.restype, function.argtypes = result, arguments
    return lambda: Libzstd(library, Span)


class Libzstd:
    """Decompresses one frame, as compression.zstd.ZstdDecompressor does; windows of at most 128 MiB, its own limit."""

    __slots__ = ("_context", "_left", "_library", "_made", "_span", "eof", "needs_input", "unused_data")

    def __init__(self, library: Any, span: Any) -> None:
        """Begin a frame. Raises MemoryError."""
        from ctypes import create_string_buffer

        self._library = library
        self._span = span
        self._made = create_string_buffer(128 << 10)
        self._left = b""
        self.eof = False
        self.needs_input = True
        self.unused_data = b""
        self._context = library.ZSTD_createDStream()
        if not self._context:
            raise MemoryError("no memory for a zstd decompressor")

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Give up to `max_length` bytes, or less, of what comes of `data` and all before it. Raises LibzstdError."""
        from ctypes import byref, c_char_p, c_void_p, cast, string_at

        data = self._left + data
        room = min(max_length, len(self._made))
        source = self._span(cast(c_char_p(data), c_void_p), len(data), 0)
        target = self._span(cast(self._made, c_void_p), room, 0)
        while not self.eof:
            status = self._library.ZSTD_decompressStream(self._context, byref(target), byref(source))
            if self._library.ZSTD_isError(status):
                raise LibzstdError(self._library.ZSTD_getErrorName(status).decode())
            self.eof = not status
            if target.position == room or source.position == len(data):
                break
        self._left = data[source.position :]
        if self.eof:
            self.unused_data, self._left = self._left, b""
        self.needs_input = not self.eof and not self._left and target.position < room
        return string_at(self._made, target.position)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.ZSTD_freeDStream(self._context)
