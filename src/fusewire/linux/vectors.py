"""preadv(2) and pwritev(2) by an array of addresses: for memory in so many pieces that an object for each is too much.

Layer: linux. Nothing is checked here: whoever makes the array answers for every address in it, and keeps what it leads
to until the call has returned. Both release the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_INT64 = ctypes.c_int64
# pwritev2(2) by number, for musl before 1.2.5, which does not have it.
_NR_PWRITEV2 = {"x86_64": 328}.get(os.uname().machine, 287)


def _pwritev2_by_number(fd: int, iovec: bytes, count: int, offset: Any, flags: int) -> int:
    zero = ctypes.c_long(0)  # the upper half of the offset, where a long is too short for it
    return int(_libc.syscall(ctypes.c_long(_NR_PWRITEV2), fd, iovec, ctypes.c_long(count), offset, zero, flags))


try:
    _preadv, _pwritev2 = _libc.preadv64, _libc.pwritev64v2  # the plain ones have 32 bit offsets in a glibc of 32 bits
except AttributeError:
    _preadv = _libc.preadv
    _pwritev2 = _libc.pwritev2 if hasattr(_libc, "pwritev2") else _pwritev2_by_number  # type: ignore[assignment]


def _check(offset: int) -> None:
    if not 0 <= offset < 1 << 63:  # -1 would be the file's position, pwritev2(2)
        raise OSError(errno.EINVAL, "no file has such an offset", hex(offset))


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def preadv(fd: int, iovec: bytes, count: int, offset: int) -> int:
    """Read from `offset` on into the pieces of an array of `count` struct iovec; give how many bytes, preadv(2)."""
    _check(offset)
    length: int = _preadv(fd, iovec, count, _INT64(offset))
    if length < 0:
        raise _fail("preadv")
    return length


def pwritev(fd: int, iovec: bytes, count: int, offset: int, flags: int = 0) -> int:
    """Write the pieces from `offset` on, with RWF_* flags; give how many bytes, pwritev2(2)."""
    _check(offset)
    length: int = _pwritev2(fd, iovec, count, _INT64(offset), flags)
    if length < 0:
        raise _fail("pwritev")
    return length
