"""What a front end hands over: memory to be mapped, and descriptors to be signalled. Neither is taken at its word.

Layer `transport`, below virtiofs.py.
"""

from __future__ import annotations

import mmap
import os
import stat

_PAGE = mmap.PAGESIZE


def map_shared(fd: int, size: int, offset: int) -> memoryview:
    """Map `size` bytes of a shared file from `offset` on, and close `fd`; the mapping lives as long as its views.

    Raises OSError, ValueError: a file that is shorter would kill us with SIGBUS at the first touch.
    """
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("what is to be mapped is no file")
        if offset + size > found.st_size:
            raise ValueError(f"a mapping to byte {offset + size} of a file of {found.st_size} bytes")
        page = max(_PAGE, found.st_blksize if found.st_blksize >= 1 << 20 else _PAGE)  # hugetlbfs
        start = offset // page * page
        length = -(-(offset + size - start) // page) * page
        mapped = mmap.mmap(fd, min(length, found.st_size - start), offset=start)
        return memoryview(mapped)[offset - start : offset - start + size]
    finally:
        os.close(fd)


def signal(fd: int) -> None:
    """Wake whoever waits on an eventfd."""
    try:
        os.eventfd_write(fd, 1)
    except OSError:
        return  # whatever the front end gave us there, it is not waiting for it any more


def signallable(fd: int) -> int:
    """Give a descriptor that can be signalled without end; -1, and it is closed, for one that could hold us up."""
    if fd < 0:
        return fd
    mode = os.fstat(fd).st_mode
    # An eventfd has no type at all; pipes and sockets can fill up.
    if stat.S_IFMT(mode) == 0 or (stat.S_ISFIFO(mode) and not os.get_blocking(fd)):
        return fd
    os.close(fd)
    return -1
