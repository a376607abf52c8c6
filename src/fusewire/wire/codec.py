"""Encoders and decoders on the way of every request.

Layer `wire`: bytes in, bytes out; no I/O, no state. An encoder takes what a handler returned and gives the reply's
body. A handler of an entry or of attributes that has them in wire form already returns `bytes`, which pass unchanged.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from fusewire.wire.table import layout

IN_HEADER = layout("fuse_in_header")
OUT_HEADER = layout("fuse_out_header")
ATTR = layout("fuse_attr")
ENTRY_OUT = layout("fuse_entry_out")
ATTR_OUT = layout("fuse_attr_out")
OPEN_OUT = layout("fuse_open_out")
WRITE_OUT = layout("fuse_write_out")
KSTATFS = layout("fuse_kstatfs")
GETXATTR_OUT = layout("fuse_getxattr_out")
FILE_LOCK = layout("fuse_file_lock")
IOCTL_OUT = layout("fuse_ioctl_out")
POLL_OUT = layout("fuse_poll_out")
STATX_OUT = layout("fuse_statx_out")
DIRENT = layout("fuse_dirent")
DIRENTPLUS = Struct(ENTRY_OUT.format + DIRENT.format[1:])
FORGET_ONE = layout("fuse_forget_one")
U64 = Struct("=Q")
U32 = Struct("=I")

# Longest timeout that is sent, in seconds. The kernel clamps at MAX_JIFFY_OFFSET anyway (timespec64_to_jiffies).
FOREVER = 1 << 32


def timeout(seconds: float) -> tuple[int, int]:
    """Split a cache lifetime in seconds into (seconds, nanoseconds); inf and anything beyond FOREVER mean for ever."""
    if seconds >= FOREVER:
        return FOREVER, 0
    if seconds <= 0:
        return 0, 0
    whole = int(seconds)
    return whole, int((seconds - whole) * 1_000_000_000)


def encode_entry(result: Any) -> bytes:
    """(nodeid, attr, entry_timeout, attr_timeout, generation) -> fuse_entry_out."""
    if type(result) is bytes:
        if len(result) != 128:
            raise ValueError("an entry in wire form has 128 bytes")
        return result
    nodeid, attr, entry_timeout, attr_timeout, generation = result
    es, en = timeout(entry_timeout)
    as_, an = timeout(attr_timeout)
    return ENTRY_OUT.pack(nodeid, generation, es, as_, en, an, *attr)


def encode_attr(result: Any) -> bytes:
    """(attr, timeout) -> fuse_attr_out."""
    if type(result) is bytes:
        if len(result) != 104:
            raise ValueError("attributes in wire form have 104 bytes")
        return result
    attr, seconds = result
    whole, nano = timeout(seconds)
    return ATTR_OUT.pack(whole, nano, *attr)


def encode_open(result: Any) -> bytes:
    """(fh, open_flags) or (fh, open_flags, backing_id) -> fuse_open_out."""
    if len(result) == 2:
        return OPEN_OUT.pack(result[0], result[1], 0)
    return OPEN_OUT.pack(*result)


def encode_create(result: Any) -> bytes:
    """(entry, open) -> fuse_entry_out followed by fuse_open_out."""
    entry, opened = result
    return encode_entry(entry) + encode_open(opened)


def encode_count(result: Any) -> bytes:
    """Number of bytes written or copied -> fuse_write_out."""
    return WRITE_OUT.pack(result)


def encode_u64(result: Any) -> bytes:
    """One u64: fuse_lseek_out, fuse_bmap_out, fuse_copy_file_range_out."""
    return U64.pack(result)


def encode_statfs(result: Any) -> bytes:
    """(blocks, bfree, bavail, files, ffree, bsize, namelen, frsize) -> fuse_kstatfs."""
    return KSTATFS.pack(*result)


def encode_lock(result: Any) -> bytes:
    """(start, end, type, pid) -> fuse_lk_out."""
    return FILE_LOCK.pack(*result)


def encode_ioctl(result: Any) -> bytes:
    """(result, data) -> fuse_ioctl_out followed by the output buffer."""
    value, data = result
    return IOCTL_OUT.pack(value, 0, 0, 0) + bytes(data)


def encode_poll(result: Any) -> bytes:
    """Ready events, as poll(2) has them -> fuse_poll_out."""
    return POLL_OUT.pack(result)


def encode_statx(result: Any) -> bytes:
    """(fields of fuse_statx without padding, timeout, flags) -> fuse_statx_out."""
    fields, seconds, flags = result
    whole, nano = timeout(seconds)
    return STATX_OUT.pack(whole, nano, flags, *fields)


def encode_none(result: Any) -> bytes:
    """A reply that is a header alone."""
    return b""


def encode_raw(result: Any) -> Any:
    """A body that is in wire form already, or that a check of its length turns into one."""
    return result


# The replies of the most frequent requests as one message, header and body packed at once: `(unique, result) -> bytes`.
# A second pack, a second buffer and writev(2) in the place of write(2) cost half a microsecond each time.

_OUT = OUT_HEADER.pack
_ENTRY_REPLY = Struct(OUT_HEADER.format + ENTRY_OUT.format[1:]).pack
_ATTR_REPLY = Struct(OUT_HEADER.format + ATTR_OUT.format[1:]).pack


def reply_entry(unique: int, result: Any) -> bytes:
    """Make a whole reply of what `encode_entry` takes."""
    if type(result) is not bytes:
        nodeid, attr, entry_timeout, attr_timeout, generation = result
        es, en = (
            (entry_timeout, 0)
            if type(entry_timeout) is int and 0 <= entry_timeout <= FOREVER
            else timeout(entry_timeout)
        )
        as_, an = (
            (attr_timeout, 0) if type(attr_timeout) is int and 0 <= attr_timeout <= FOREVER else timeout(attr_timeout)
        )
        return _ENTRY_REPLY(144, 0, unique, nodeid, generation, es, as_, en, an, *attr)
    if len(result) != 128:
        raise ValueError("an entry in wire form has 128 bytes")
    return _OUT(144, 0, unique) + result


def reply_attr(unique: int, result: Any) -> bytes:
    """Make a whole reply of what `encode_attr` takes."""
    if type(result) is not bytes:
        attr, seconds = result
        whole, nano = (seconds, 0) if type(seconds) is int and 0 <= seconds <= FOREVER else timeout(seconds)
        return _ATTR_REPLY(120, 0, unique, whole, nano, *attr)
    if len(result) != 104:
        raise ValueError("attributes in wire form have 104 bytes")
    return _OUT(120, 0, unique) + result


def reply_none(unique: int, result: Any) -> bytes:
    """Make a reply that is a header alone."""
    return _OUT(16, 0, unique)


WHOLE = {"entry": reply_entry, "attr": reply_attr, "none": reply_none}


encode_data = encode_xattr = encode_link = encode_init = encode_raw


class DirBuffer:
    """A directory listing in wire form, never longer than `size` bytes (readdir, readdirplus).

    The cookie of an entry is the `offset` that a later request carries to go on *after* it; 0 is the beginning.
    A filesystem that counts lookups asks `room_for_plus` before it looks an entry up: what is not added does not count.
    """

    __slots__ = ("data", "size")

    def __init__(self, size: int) -> None:
        self.data = bytearray()
        self.size = size

    def add(self, name: bytes, ino: int, cookie: int, dtype: int) -> bool:
        """Append a fuse_dirent; give False, and add nothing, when it does not fit. `dtype` is DT_* of <dirent.h>."""
        data = self.data
        length = len(name)
        if len(data) + 24 + length + (-length & 7) > self.size:
            return False
        data += DIRENT.pack(ino, cookie, length, dtype)
        data += name
        data += b"\0" * (-length & 7)
        return True

    def room_for_plus(self, name: bytes) -> bool:
        """Tell whether `add_plus` of this name would fit."""
        length = len(name)
        return len(self.data) + 152 + length + (-length & 7) <= self.size

    def add_plus(self, name: bytes, cookie: int, entry: Any, ino: int = 0, dtype: int = 0) -> bool:
        """Append a fuse_direntplus; give False, and add nothing, when it does not fit.

        `entry` is as for `lookup`, or None for an entry without a lookup (".", "..": `ino` and `dtype` are used).
        """
        if not self.room_for_plus(name):
            return False
        if entry is None:
            self.data += bytes(128)
        else:
            self.data += encode_entry(entry)
            if type(entry) is bytes:
                (ino,), (mode,) = U64.unpack_from(entry, 40), U32.unpack_from(entry, 100)
            else:
                ino, mode = entry[1][0], entry[1][9]
            dtype = mode >> 12
        length = len(name)
        self.data += DIRENT.pack(ino, cookie, length, dtype)
        self.data += name
        self.data += b"\0" * (-length & 7)
        return True
