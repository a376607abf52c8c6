"""An atomic OR on shared memory, which Python has no other way to do: the dirty log of a migrating virtual machine.

Layer: linux. Several back ends write to one log at the same time as the front end reads and clears it, so a bit may not
be set by reading and writing a byte.
"""

from __future__ import annotations

import ctypes
import os

_PAGE_SHIFT = 12  # of the log: VHOST_LOG_PAGE, 4 KiB, whatever the machine's pages are

# <linux/futex.h>. FUTEX_WAKE_OP changes the second word atomically before it wakes anybody; here nobody waits.
_FUTEX_WAKE_OP = 5
_FUTEX_OP_OR, _FUTEX_OP_OPARG_SHIFT = 2, 8
_OR_BIT = (_FUTEX_OP_OR | _FUTEX_OP_OPARG_SHIFT) << 28
_NUMBERS = {"x86_64": 202, "i386": 240, "arm": 240, "aarch64": 98, "riscv64": 98, "loongarch64": 98}


class DirtyLog:
    """A bitmap in shared memory, a bit for each guest-physical page of 4 KiB: vhost-user.rst, "Migration"."""

    def __init__(self, view: memoryview) -> None:
        """Mark in `view`, writable, from page 0 on. Raises OSError(ENOSYS) on a machine that is not known here."""
        number = _NUMBERS.get(os.uname().machine)
        if number is None:
            raise OSError(38, f"no dirty log on {os.uname().machine}: migration is not offered there")
        self._view = view
        self._pages = len(view) * 8
        self._words = view[: len(view) // 4 * 4]
        self._first = ctypes.c_char.from_buffer(view)
        self._address = ctypes.addressof(self._first)
        if self._address % 4:
            raise ValueError("the dirty log is not aligned to 4 bytes")
        self._number = ctypes.c_long(number)
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._nobody = ctypes.c_uint32()

    def mark(self, guest_addr: int, length: int) -> None:
        """Note that `length` bytes of guest-physical memory were written to. Pages beyond the log are left out."""
        first, last = guest_addr >> _PAGE_SHIFT, guest_addr + length - 1 >> _PAGE_SHIFT
        for page in range(first, min(last, self._pages - 1) + 1):
            if not self._view[page >> 3] >> (page & 7) & 1:
                self._set(page)

    def _set(self, page: int) -> None:
        word = ctypes.c_void_p(self._address + (page >> 5 << 2))
        operation = ctypes.c_uint32(_OR_BIT | (page & 31) << 12)
        none = ctypes.c_long(0)
        if self._syscall(self._number, ctypes.byref(self._nobody), _FUTEX_WAKE_OP, 0, none, word, operation) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"futex: {os.strerror(number)}")
