"""Where the index of an archive is kept between mounts: one file for each archive, in a directory of the user's own.

Layer `fs`. Nothing in a cache file is ever executed or unpickled: it is a header, and blocks of bytes behind checksums.
A file that is damaged, of another version, of another archive or of another user is as good as none, and the cache is
never in the way: where it cannot be written, indexes are built anew each time.
"""

from __future__ import annotations

import os
import stat
import sys
from struct import Struct
from struct import error as StructError  # noqa: N812
from zlib import crc32

# Another layout of the tree or another meaning of its fields needs another number: old files are then rebuilt.
VERSION = 2
_MAGIC = b"fusewire archive index\n"
_HEADER = Struct("<23sBBxH4x32sQQII")  # magic, version, byte order, kept free, key, lengths and checksums of two blocks
_LARGEST = 1 << 32  # bytes of a cache file
_KEEP = 4 << 30  # bytes of all of them together: the ones used longest ago go
_ORDER = {"little": 1, "big": 2}


def key_of(status: os.stat_result, kind: str, offset: int, extra: str = "") -> bytes:
    """What tells this state of this archive from all others: the file, its size and its times, to the nanosecond.

    The path has no part in it: an archive that was renamed is the same, and one that lies at an old one's path has
    another inode. The time of the last change (ctime) cannot be set by anybody.
    """
    from hashlib import sha256

    said = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, kind, offset, extra)
    return sha256(repr(said).encode()).digest()


class Cache:
    """The indexes of one user, in a directory that only that user can write to."""

    def __init__(self, path: str | None) -> None:
        """Use `path`, made if need be; None: keep nothing."""
        self._path = path

    def _open_directory(self, make: bool) -> int:
        """Open the directory; -1 if there is none, or it is not this user's alone."""
        if self._path is None:
            return -1
        try:
            if make:
                os.makedirs(self._path, 0o700, exist_ok=True)
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return -1
        if _is_ours(os.fstat(fd)):
            return fd
        os.close(fd)
        return -1

    def load(self, key: bytes) -> tuple[bytes, bytes] | None:
        """The two blocks that were stored under `key`; None if there are none that can be trusted."""
        place = self._open_directory(False)
        if place < 0:
            return None
        try:
            fd = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=place)
        except OSError:
            return None
        finally:
            os.close(place)
        try:
            return _read(fd, key)
        except (OSError, MemoryError):
            return None
        finally:
            os.close(fd)

    def store(self, key: bytes, first: bytes, second: bytes = b"") -> bool:
        """Keep two blocks under `key`; give False if that is not possible, which is no error to anybody."""
        if len(first) + len(second) > _LARGEST:
            return False
        place = self._open_directory(True)
        if place < 0:
            return False
        name = _name(key)
        temporary = f"{name}.{os.urandom(4).hex()}.new"
        header = _HEADER.pack(
            _MAGIC, VERSION, _ORDER[sys.byteorder], 0, key, len(first), len(second), crc32(first), crc32(second)
        )
        try:
            _write(temporary, place, (header, first, second))
            os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=place)
            temporary = ""
            _tidy(place)
        except OSError:
            return not temporary  # only tidying went wrong: somebody else does it at the same time
        finally:
            if temporary:  # a full disk, or Ctrl-C
                _remove(temporary, place)
            os.close(place)
        return True


def _write(name: str, place: int, blocks: tuple[bytes, ...]) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=place)
    try:
        for block in blocks:
            view = memoryview(block)
            while view:
                view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _remove(name: str, place: int) -> None:
    try:
        os.unlink(name, dir_fd=place)
    except OSError:
        pass


def _name(key: bytes) -> str:
    return key.hex()[:40] + ".index"


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _read(fd: int, key: bytes) -> tuple[bytes, bytes] | None:
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) and _is_ours(status) and status.st_size <= _LARGEST + _HEADER.size):
        return None
    try:
        magic, version, order, _, found, length, length_2, crc, crc_2 = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    except StructError:
        return None
    if (magic, version, order, found) != (_MAGIC, VERSION, _ORDER[sys.byteorder], key):
        return None
    if _HEADER.size + length + length_2 != status.st_size:
        return None
    first, second = _all(fd, _HEADER.size, length), _all(fd, _HEADER.size + length, length_2)
    if crc32(first) != crc or crc32(second) != crc_2:
        return None
    try:
        os.utime(fd)  # used now: the next one to be removed is another
    except OSError:
        pass
    return first, second


def _all(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, min(length, 1 << 30), offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _tidy(place: int) -> None:
    """Remove the files that were used longest ago, until the others are few enough; and what a dead writer has left."""
    from time import time

    found = []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.endswith((".index", ".new")):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".new") and status.st_mtime < time() - 86400:
                    os.unlink(entry.name, dir_fd=place)
                    continue
                found.append((status.st_mtime, status.st_size, entry.name))
    total = sum(size for _, size, _ in found)
    for _, size, name in sorted(found):
        if total <= _KEEP:
            break
        os.unlink(name, dir_fd=place)
        total -= size
