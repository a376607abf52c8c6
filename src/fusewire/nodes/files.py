"""Regular files of a tree: `File`, whose methods a class overrides, and `Bytes`, which holds its data.

Layer `nodes`.
"""

from __future__ import annotations

import errno
import os
import stat
from _thread import allocate_lock

from fusewire.nodes.base import Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence
    from typing import Any

    from fusewire.ops import Buffer, FileRange
    from fusewire.sparse import SparseData

# <linux/falloc.h>
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_FALLOCATE_MODES = (0, _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE, _ZERO_RANGE | _KEEP_SIZE)
_MAX_SIZE = (1 << 63) - 1


class File(Node):
    """A regular file: override `read`, and `size` unless it is unknown, and `write` and `truncate` to be written to.

    All methods may be `async def`. Where `open` gives an object, that object's methods of the names `read`, `write`,
    `truncate`, `flush`, `fsync` and `release` serve what is done by that open file, where it has them.
    """

    kind = stat.S_IFREG
    keep_cache: bool = False
    """What the kernel has of the data stays valid from one open to the next, FOPEN_KEEP_CACHE."""
    direct_io: bool = False
    """Every read(2) and write(2) is asked for, whatever the size, FOPEN_DIRECT_IO. So it is where `size` is missing."""

    _sizeless = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "write" in cls.__dict__ and "writable" not in cls.__dict__:
            cls.writable = True
        cls._sizeless = cls.size is File.size

    def open(self, flags: int) -> object | Awaitable[object]:
        """Begin for a caller: `flags` as open(2) has them. Gives an object for this open file, or None."""
        return None

    def read(
        self, offset: int, size: int
    ) -> Buffer | Sequence[Buffer] | FileRange | Awaitable[Buffer | Sequence[Buffer] | FileRange]:
        """Give up to `size` bytes at `offset`; less means the end of the file, read(2)."""
        return b""

    def write(self, offset: int, data: bytes) -> int | Awaitable[int | None] | None:
        """Take `data` at `offset` and give how many bytes, None for all, write(2)."""
        raise OSError(errno.EROFS, "read-only: the class has no `write`", type(self).__name__)

    def truncate(self, size: int) -> Awaitable[None] | None:
        """Cut or grow to `size`, truncate(2). What is writable and does not override it, ignores it."""
        self._check_writable()
        return None

    def allocate(self, offset: int, length: int, mode: int) -> Awaitable[None] | None:
        """Reserve or give back space, fallocate(2)."""
        raise OSError(errno.EOPNOTSUPP, "space cannot be reserved", type(self).__name__)

    def seek(self, offset: int, whence: int) -> int | Awaitable[int]:
        """Find data or a hole: `whence` is os.SEEK_DATA or os.SEEK_HOLE, lseek(2). By default all of it is data."""
        size = self.size()
        if not isinstance(size, int):
            return _seek_later(size, offset, whence)
        return _seek(size, offset, whence)

    def flush(self) -> Awaitable[None] | None:
        """Answer a close(2); what it raises is close's error."""
        return None

    def fsync(self, datasync: bool) -> Awaitable[None] | None:
        """Make it durable, fsync(2), fdatasync(2)."""
        return None


def _seek(size: int, offset: int, whence: int) -> int:
    if offset >= size:
        raise OSError(errno.ENXIO, "after the last data", offset)
    return offset if whence == os.SEEK_DATA else size


async def _seek_later(size: Awaitable[int], offset: int, whence: int) -> int:
    return _seek(await size, offset, whence)


class Bytes(File):
    """A file that holds its data."""

    writable = False  # but for those that are made so
    keep_cache = True
    limit: int = 1 << 32
    """How many bytes of memory a writable one takes at most; ENOSPC beyond. Holes take none."""
    _lasting = 1 << 32

    def __init__(self, data: bytes | str = b"", *, writable: bool = False, mode: int | None = None) -> None:
        """Begin with `data` (str: in UTF-8)."""
        super().__init__()
        self._lock = allocate_lock()  # over the sparse data
        # One attribute for both forms: who reads without the lock sees one of them, and never the gap between two.
        self._content: bytes | SparseData = data.encode() if isinstance(data, str) else bytes(data)
        if writable:
            self.writable = True
            self._born()
        if mode is not None:
            self.mode = mode

    @property
    def data(self) -> bytes:
        """The content. Assignment puts other content there, moves the times, and tells the kernel."""
        content = self._content
        if isinstance(content, bytes):
            return content
        with self._lock:
            return b"".join(content.read(0, content.size))

    @data.setter
    def data(self, data: bytes | str) -> None:
        with self._lock:
            self._content = data.encode() if isinstance(data, str) else bytes(data)
            self._modified()
        self.changed()

    def __repr__(self) -> str:
        return f"<Bytes of {self.size()} bytes>"

    def size(self) -> int:
        content = self._content
        return len(content) if isinstance(content, bytes) else content.size

    def read(self, offset: int, size: int) -> Buffer | Sequence[Buffer]:
        content = self._content
        if isinstance(content, bytes):
            return content[offset : offset + size]
        with self._lock:
            return content.read(offset, size)

    def _changeable(self) -> SparseData:
        """Give the data in the form that can be written to. Under the lock."""
        self._check_writable()
        content = self._content
        if isinstance(content, bytes):
            from fusewire.sparse import SparseData

            sparse = SparseData()
            if content:
                sparse.write(0, memoryview(content))
            self._content = content = sparse
        return content

    def _check_end(self, end: int) -> None:
        if end > _MAX_SIZE:
            raise OSError(errno.EFBIG, "beyond the largest offset", end)

    def _claim(self, sparse: SparseData, offset: int, length: int) -> None:
        if sparse.allocated + sparse.grows(offset, length) > self.limit:
            raise OSError(errno.ENOSPC, "the file's limit of bytes is reached", self.limit)

    def write(self, offset: int, data: bytes | memoryview) -> int:
        view = memoryview(data)
        self._check_end(offset + len(view))
        with self._lock:
            sparse = self._changeable()
            self._claim(sparse, offset, len(view))
            sparse.write(offset, view)
            self._modified()
        return len(view)

    def truncate(self, size: int) -> None:
        self._check_end(size)
        with self._lock:
            self._changeable().truncate(size)
            self._modified()

    def allocate(self, offset: int, length: int, mode: int) -> None:
        if mode not in _FALLOCATE_MODES:
            raise OSError(errno.EOPNOTSUPP, "an unknown mode of fallocate", mode)
        end = offset + length
        self._check_end(end)
        with self._lock:
            sparse = self._changeable()
            if not mode & _PUNCH_HOLE:
                self._claim(sparse, offset, length)
            if mode & (_PUNCH_HOLE | _ZERO_RANGE):
                sparse.zero(offset, length)
            if not mode & _PUNCH_HOLE:
                sparse.reserve(offset, length)
            if not mode & _KEEP_SIZE:
                sparse.size = max(sparse.size, end)
            self._drop_privileges()
            self._modified()

    def seek(self, offset: int, whence: int) -> int:
        content = self._content
        if isinstance(content, bytes):
            return _seek(len(content), offset, whence)
        with self._lock:
            found = content.next_data(offset) if whence == os.SEEK_DATA else content.next_hole(offset)
            if offset >= content.size or (whence == os.SEEK_DATA and found >= content.size):
                raise OSError(errno.ENXIO, "after the last data", offset)
            return found

    def _blocks(self, size: int) -> int:
        content = self._content
        return ((size if isinstance(content, bytes) else content.allocated) + 511) // 512

    def _succeeds(self, before: Node) -> None:
        if self.mtime_ns is None and isinstance(before, Bytes):
            if before._content == self._content:
                self.mtime_ns, self.ctime_ns = before.mtime_ns, before.ctime_ns
            else:
                self._modified()  # the kernel sees by the time that its pages are old (FUSE_AUTO_INVAL_DATA)
