"""Names and extensions inside a request: the checks that every name passes before a filesystem sees it.

Layer `wire`: bytes in, values out; no I/O, no state. Both transports and every sandbox mode go through here, so a
filesystem may rely on it: no empty name, no "." or "..", no "/" or NUL, nothing longer than 255 bytes.
"""

from __future__ import annotations

import errno
from typing import Any

from fusewire.wire import abi, codec
from fusewire.wire.table import layout

_TWO_U32 = layout("fuse_ext_header").unpack_from
_SLASH = ord("/")


class BadRequest(Exception):  # noqa: N818 - it is an answer, not a fault of ours
    """A request whose shape is wrong; carries the errno to answer."""


def is_name(name: bytes) -> bool:
    """Tell whether a directory can have an entry of this name, path_resolution(7): "." and ".." are not among them."""
    # Numbers: where CPython is to find bytes in bytes, it first raises a TypeError and forgets it. That takes ten times
    # as long.
    return 0 < len(name) <= abi.NAME_MAX and name not in (b".", b"..") and _SLASH not in name and 0 not in name


def check_name(name: bytes, *, terminated: bool = True) -> None:
    """Refuse what may never reach a filesystem: empty, ".", "..", with "/" or NUL, too long, not terminated."""
    if len(name) > abi.NAME_MAX:
        raise BadRequest(errno.ENAMETOOLONG)
    if not terminated or not is_name(name):
        raise BadRequest(errno.EINVAL)


def names(request: Any, start: int, count: int) -> tuple[list[bytes], int]:
    """Cut `count` NUL-terminated names from `start`; give them and where they end. Only real names pass."""
    found = []
    data = bytes(request[start : start + 2 * (abi.NAME_MAX + 2)]) if count == 2 else bytes(request[start : start + 257])
    position = 0
    for _ in range(count):
        end = data.find(b"\0", position)
        if end < 0:
            raise BadRequest(errno.ENAMETOOLONG if len(data) - position > abi.NAME_MAX else errno.EINVAL)
        name = data[position:end]
        check_name(name)
        found.append(name)
        position = end + 1
    return found, start + position


def xattr_name(request: Any, start: int) -> tuple[bytes, int]:
    """An xattr's name is any string of 1..255 bytes, xattr(7): "/" and dots are fine in it."""
    data = bytes(request[start : start + abi.NAME_MAX + 1])
    end = data.find(b"\0")
    if end < 1:
        raise BadRequest(errno.ERANGE if end < 0 and len(data) > abi.NAME_MAX else errno.EINVAL)
    return data[:end], start + end + 1


def parse_extensions(request: Any, start: int, extlen: int) -> tuple[list[tuple[bytes, bytes]], tuple[int, ...]]:
    """Parse what follows a creating request's names: fuse_ext_header records, `extlen` units of 8 bytes at the end.

    Raises BadRequest(EINVAL) when the records do not fit together.
    """
    data = bytes(request)
    end = len(data)
    position = end - 8 * extlen
    if position < start:
        raise BadRequest(errno.EINVAL)
    security: list[tuple[bytes, bytes]] = []
    groups: tuple[int, ...] = ()
    while position < end:
        if end - position < 8:
            raise BadRequest(errno.EINVAL)
        size, kind = _TWO_U32(data, position)
        if size < 8 or size > end - position:
            raise BadRequest(errno.EINVAL)
        body = data[position + 8 : position + size]
        if kind == abi.FUSE_EXT_GROUPS:
            if len(body) < 4:
                raise BadRequest(errno.EINVAL)
            (count,) = codec.U32.unpack_from(body)
            if count * 4 > len(body) - 4:
                raise BadRequest(errno.EINVAL)
            groups = tuple(item for (item,) in codec.U32.iter_unpack(body[4 : 4 + 4 * count]))
        elif kind <= abi.FUSE_MAX_NR_SECCTX:
            # fuse_secctx_header: its nr_secctx stands where fuse_ext_header has the type.
            at = 0
            for _ in range(kind):
                if len(body) - at < 8:
                    raise BadRequest(errno.EINVAL)
                (length,) = codec.U32.unpack_from(body, at)
                stop = body.find(b"\0", at + 8)
                if stop < 0 or stop + 1 + length > len(body):
                    raise BadRequest(errno.EINVAL)
                security.append((body[at + 8 : stop], body[stop + 1 : stop + 1 + length]))
                at = stop + 1 + length + (-(stop + 1 + length) & 7)
        position += size + (-size & 7)
    return security, groups
