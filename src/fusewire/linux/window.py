"""A window: mappings at their own addresses in a stretch of address space that holds nothing else.

Layer: linux. What begins at address `a` of another numbering (a guest's physical memory) is at `Window.base + a` here.
Around it there is nothing: an address that leads nowhere is EFAULT to a system call, whoever chose it, and the data of
this process are never in its reach. So an array of struct iovec can be made of such addresses without a look at each.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_mremap = _libc.mremap
_munmap = _libc.munmap
try:
    _mmap = _libc.mmap64  # the plain one has 32 bit offsets in a glibc of 32 bits
except AttributeError:
    _mmap = _libc.mmap  # musl
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_mmap.restype = _mremap.restype = _POINTER
_mmap.argtypes = (_POINTER, _SIZE, _INT, _INT, _INT, ctypes.c_int64)
_mremap.argtypes = (_POINTER, _SIZE, _SIZE, _INT, _POINTER)
_munmap.argtypes = (_POINTER, _SIZE)
_FAILED = ctypes.c_void_p(-1).value

_PROT_NONE = 0
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x20, 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2

SPAN = 1 << 40
"""Addresses of a window, in bytes: 1 TiB. Its base is a multiple of that."""
_BEYOND = 1 << 32  # what begins at the last address may be so long: a length of 32 bits
_WHOLE = SPAN + _BEYOND


class Window:
    """Address space that goes with the object: whoever has a system call use it holds the object meanwhile."""

    __slots__ = ("base",)

    def __init__(self, mappings: Iterable[tuple[int, int, int]]) -> None:
        """Show shared mappings of this process, (where in the window, address here, size in bytes) each, once more.

        Raises OSError: where they cannot be had side by side (ENOTSUP: not whole pages, or beyond SPAN; EINVAL: not
        shared, or of huge pages), or so much address space cannot (ENOMEM: `ulimit -v`, processors with 39 bits).
        """
        self.base = 0
        page = mmap.PAGESIZE
        wanted = tuple(mappings)
        for numbers in wanted:
            if any(number % page for number in numbers) or numbers[0] + numbers[2] > SPAN:
                raise OSError(errno.ENOTSUP, "a mapping that is not whole pages below 1 TiB")
        self.base = _reserve()
        for place, address, size in wanted:
            # A length of 0 leaves the shared mapping where it is, and makes another one of the same pages: mremap(2).
            there = _mremap(address, 0, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, self.base + place)
            if there == _FAILED:
                raise _fail("mremap")

    def __del__(self) -> None:
        base, self.base = self.base, 0
        if base:
            _munmap(base, _WHOLE)


def _reserve() -> int:
    """Take address space of _WHOLE bytes that begins at a multiple of SPAN, where the kernel has put it."""
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
    start = _mmap(None, SPAN + _WHOLE, _PROT_NONE, flags, -1, 0)
    if start == _FAILED:
        raise _fail("mmap")
    base: int = -(-start // SPAN) * SPAN
    _munmap(start, base - start)
    _munmap(base + _WHOLE, start + SPAN - base)
    return base


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
