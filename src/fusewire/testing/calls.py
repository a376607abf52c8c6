"""System calls that the conformance list makes and that the standard library lacks or wraps too well.

Layer `testing`, by the C library's own functions. Separate from `fusewire.linux` on purpose: what judges a filesystem
shares no code with what serves it. Each raises OSError with errno and the path.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, NamedTuple

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_COLLAPSE_RANGE = 8
FALLOC_FL_ZERO_RANGE = 16
FALLOC_FL_INSERT_RANGE = 32
# <linux/fs.h>, as _IOR and _IOW make them for a `long` of this machine.
_LONG = ctypes.sizeof(ctypes.c_long)
FS_IOC_GETFLAGS = 2 << 30 | _LONG << 16 | ord("f") << 8 | 1
FS_IOC_SETFLAGS = 1 << 30 | _LONG << 16 | ord("f") << 8 | 2
FS_IOC_FSGETXATTR = 2 << 30 | 28 << 16 | ord("X") << 8 | 31
FS_IOC_FSSETXATTR = 1 << 30 | 28 << 16 | ord("X") << 8 | 32
FS_NODUMP_FL = 0x40
FS_XFLAG_NODUMP = 0x80
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800
IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE = 2, 4, 8
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x40, 0x80, 0x100, 0x200

_libc = ctypes.CDLL(None, use_errno=True)
_SIZES = frozenset({"getxattr", "listxattr", "readlink", "getdents64"})


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_long)]


class Statx(NamedTuple):
    """What the list looks at of struct statx(2); times in nanoseconds."""

    mask: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    atime_ns: int
    btime_ns: int
    ctime_ns: int
    mtime_ns: int


class Dirent(NamedTuple):
    """A struct linux_dirent64."""

    ino: int
    offset: int
    type: int
    name: bytes


def _call(name: str, path: Any, *arguments: Any) -> int:
    function = getattr(_libc, name, None)
    if function is None:
        raise OSError(errno.ENOSYS, f"the C library has no {name}")
    # An `int` comes in half a register: read as more, an error would look like success.
    function.restype = ctypes.c_ssize_t if name in _SIZES else ctypes.c_int
    result = int(function(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def rename2(old: str, new: str, flags: int) -> None:
    """renameat2(2)."""
    _call("renameat2", old, AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags))


def link_fd(fd: int, new: str) -> None:
    """Give an open file a name, as open(2) describes it for O_TMPFILE: linkat(2) of /proc/self/fd/N."""
    old = b"/proc/self/fd/%d" % fd
    _call("linkat", new, AT_FDCWD, old, AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW)


def utimens(path: str, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = True) -> None:
    """utimensat(2) with (seconds, nanoseconds or UTIME_NOW or UTIME_OMIT)."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _call("utimensat", path, AT_FDCWD, os.fsencode(path), times, 0 if follow else AT_SYMLINK_NOFOLLOW)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    _call("fallocate64", fd, fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    _call("syncfs", fd, fd)


def getxattr(path: str, name: str, size: int) -> int:
    """getxattr(2) into a buffer of `size` bytes; gives the length."""
    buffer = ctypes.create_string_buffer(max(1, size))
    return _call("getxattr", path, os.fsencode(path), os.fsencode(name), buffer, ctypes.c_size_t(size))


def listxattr(path: str, size: int) -> int:
    """listxattr(2) into a buffer of `size` bytes; gives the length."""
    buffer = ctypes.create_string_buffer(max(1, size))
    return _call("listxattr", path, os.fsencode(path), buffer, ctypes.c_size_t(size))


def readlink(path: str, size: int) -> bytes:
    """readlink(2) into a buffer of `size` bytes."""
    buffer = ctypes.create_string_buffer(max(1, size))
    length = _call("readlink", path, os.fsencode(path), buffer, ctypes.c_size_t(size))
    return buffer.raw[:length]


def statx(path: str, *, follow: bool = True) -> Statx:
    """statx(2) with the time of birth."""
    buffer = ctypes.create_string_buffer(256)
    mask = ctypes.c_uint(STATX_BASIC_STATS | STATX_BTIME)
    _call("statx", path, AT_FDCWD, os.fsencode(path), 0 if follow else AT_SYMLINK_NOFOLLOW, mask, buffer)
    import struct

    got, _, _, nlink, uid, gid, mode, ino, size = struct.unpack_from("=IIQIIIHxxQQ", buffer)
    times = [seconds * 10**9 + nano for seconds, nano in struct.iter_unpack("=qIxxxx", buffer.raw[64:128])]
    return Statx(got, nlink, uid, gid, mode, ino, size, *times)


def getdents(fd: int, size: int) -> list[Dirent]:
    """getdents64(2) into a buffer of `size` bytes."""
    import struct

    buffer = ctypes.create_string_buffer(size)
    length = _call("getdents64", fd, fd, buffer, ctypes.c_size_t(size))
    found = []
    position = 0
    while position < length:
        ino, offset, record, kind = struct.unpack_from("=QqHB", buffer, position)
        name = buffer.raw[position + 19 : position + record].split(b"\0", 1)[0]
        found.append(Dirent(ino, offset, kind, name))
        position += record
    return found


def inotify(path: str, mask: int) -> int:
    """Give an inotify(7) descriptor, non-blocking, that watches `path`."""
    fd = _call("inotify_init1", path, os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _call("inotify_add_watch", path, fd, os.fsencode(path), ctypes.c_uint32(mask))
    except OSError:
        os.close(fd)
        raise
    return fd
