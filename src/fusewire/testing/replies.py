"""Requests as bytes, and the judgement of every reply as fuse_dev_do_write (fs/fuse/dev.c) makes it.

Layer `testing`, below kernel.py. No state and no I/O but the reading of a `FileReply`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fusewire.adapters import FileReply, Reply
from fusewire.ops import Attr, Entry
from fusewire.wire import abi, codec
from fusewire.wire.table import TABLE, Op, layout

OFFERED = 0x73FFFFFB | 0x5FD << 32
"""The INIT flags that Linux 6.18 offers to a mount in a user namespace."""

BY_NAME = {op.name: op for op in TABLE}
BY_CODE = {op.code: op for op in TABLE}
# Sizes of replies that are of one size; the others are bounded by the request (out_argvar in fs/fuse).
_SIZES = {"none": 0, "entry": 128, "attr": 104, "open": 16, "create": 144, "count": 8, "u64": 8, "statfs": 80}
_SIZES |= {"lock": 24, "poll": 8, "statx": 288}


class BadReply(AssertionError):  # noqa: N818 - a verdict, as BadRequest is
    """A reply that the kernel would refuse, or that must not be: a fault of the server's."""


class Dirent(NamedTuple):
    """One directory entry; `entry` is there in a READDIRPLUS reply whose entry was looked up."""

    name: bytes
    ino: int
    cookie: int
    dtype: int
    entry: Entry | None = None


def request(
    opcode: int,
    nodeid: int,
    body: bytes = b"",
    *,
    unique: int = 2,
    uid: int = 0,
    gid: int = 0,
    pid: int = 1,
    extlen: int = 0,
) -> bytes:
    """Give a whole request: fuse_in_header and `body`."""
    return codec.IN_HEADER.pack(40 + len(body), opcode, unique, nodeid, uid, gid, pid, extlen) + body


def body_of(name: str, *fields: int, names: Iterable[bytes] = (), tail: bytes = b"") -> bytes:
    """Give an operation's body: its struct of the table filled with `fields`, the names each with a NUL, the tail."""
    op = BY_NAME[name]
    fixed = layout(op.args).pack(*fields) if op.args else b""
    return fixed + b"".join(item + b"\0" for item in names) + tail


def flatten(reply: Reply) -> bytes | None:
    """Give a reply as the bytes that a transport would write; the data of a `FileReply` is read."""
    if reply is None:
        return None
    if isinstance(reply, FileReply):
        data = os.pread(reply.range.fd, reply.range.size, reply.range.offset)
        return codec.OUT_HEADER.pack(16 + len(data), 0, reply.unique) + data
    return b"".join(bytes(memoryview(part)) for part in reply)


def check_reply(sent: bytes, reply: Reply) -> tuple[int, bytes]:
    """Judge a reply to the request `sent` as the kernel would; give its errno (0 for success) and its body.

    Raises BadReply for what the kernel would refuse with EINVAL, and for an answer where none may be or is due.
    """
    _, opcode, unique, *_ = codec.IN_HEADER.unpack_from(sent)
    op = BY_CODE.get(opcode)
    message = flatten(reply)
    if message is None:
        if op is None or op.reply:
            raise BadReply(f"{title(opcode)} got no reply")
        return 0, b""
    if op is not None and not op.reply and opcode != abi.FUSE_INTERRUPT:
        raise BadReply(f"{title(opcode)} got a reply, and must not")
    if len(message) < 16:
        raise BadReply(f"{title(opcode)}: a reply of {len(message)} bytes has no header")
    length, error, answered = codec.OUT_HEADER.unpack_from(message)
    body = message[16:]
    if length != len(message):
        raise BadReply(f"{title(opcode)}: the header says {length} bytes, the reply has {len(message)}")
    if answered != unique:
        raise BadReply(f"{title(opcode)}: request {unique:#x} was answered as {answered:#x}")
    if not -512 < error <= 0:
        raise BadReply(f"{title(opcode)}: error {error} is out of range")
    if error and body:
        raise BadReply(f"{title(opcode)}: an error with {len(body)} bytes of data")
    if opcode == abi.FUSE_INTERRUPT and error not in (-errno.ENOSYS, -errno.EAGAIN):
        raise BadReply(f"INTERRUPT: answered {error}")
    if not error and op is not None:
        least, most = _bounds(op, sent)
        if not least <= len(body) <= most:
            raise BadReply(f"{title(opcode)}: a body of {len(body)} bytes where {least} to {most} are right")
    return -error, body


def title(opcode: int) -> str:
    op = BY_CODE.get(opcode)
    return op.name.upper() if op is not None else f"opcode {opcode}"


def _bounds(op: Op, sent: bytes) -> tuple[int, int]:
    def u32(offset: int) -> int:
        return int(codec.U32.unpack_from(sent, offset)[0])

    if op.reply == "data":
        return 0, u32(56)
    if op.reply == "xattr":
        return (0, u32(40)) if u32(40) else (8, 8)
    if op.reply == "link":
        return 1, os.sysconf("SC_PAGE_SIZE") - 1
    if op.reply == "ioctl":
        return 16, 16 + u32(68)
    if op.reply == "init":
        return 8, 64
    size = _SIZES[op.reply]
    return size, size


def parse_entry(body: bytes) -> Entry:
    """Give a fuse_entry_out as the `Entry` that it was made of."""
    nodeid, generation, es, as_, en, an, *attr = codec.ENTRY_OUT.unpack_from(body)
    return Entry(nodeid, as_attr(attr), es + en / 1e9, as_ + an / 1e9, generation)


def as_attr(fields: Sequence[Any]) -> Attr:
    attr: Attr = tuple(fields)
    return attr


def parse_dirents(body: bytes, *, plus: bool = False) -> list[Dirent]:
    """Cut a READDIR or READDIRPLUS body into entries, as fuse_parse_dirfile does: a cut-off last one is dropped.

    Raises BadReply for what makes the kernel answer EIO: an empty or too long name, or one with "/".
    """
    found = []
    position = 0
    while position + (152 if plus else 24) <= len(body):
        entry = parse_entry(body[position : position + 128]) if plus else None
        start = position + (128 if plus else 0)
        ino, cookie, length, dtype = codec.DIRENT.unpack_from(body, start)
        name = body[start + 24 : start + 24 + length]
        if not 0 < length <= 1024:
            raise BadReply(f"a directory entry's name is {length} bytes long")
        position = start + 24 + length + (-length & 7)
        if position > len(body):
            break
        if b"/" in name:
            raise BadReply(f"a directory entry is named {name!r}")
        found.append(Dirent(name, ino, cookie, dtype, entry if entry is not None and entry.nodeid else None))
    return found
