"""From a request to a handler's arguments, and from its result to a reply that the kernel will take.

Layer `session`, below session.py, which is the only one to call this. An adapter is named by the opcode table's row;
a check guards replies whose length the request bounds. No I/O, no state.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol

from fusewire.ops import Buffer, Caller, Extensions, FileRange, Lock, Setattr
from fusewire.wire import codec
from fusewire.wire.requests import BadRequest, names, parse_extensions, xattr_name
from fusewire.wire.table import Op, layout

_OUT = codec.OUT_HEADER.pack
_NEW = tuple.__new__


class FileReply:
    """A READ reply whose data the transport fetches: a header with `unique`, then the bytes of `range`."""

    __slots__ = ("range", "unique")

    def __init__(self, unique: int, source: FileRange) -> None:
        self.unique = unique
        self.range = source


Reply = list[Buffer] | FileReply | None


class Handler(Protocol):
    """A method of a filesystem."""

    def __call__(self, *args: Any) -> Any: ...


class Owner(Protocol):
    """What adapters and checks need of the session."""

    page_size: int
    max_pages: int
    extended: bool

    def bad_reply(self, unique: int, op: Op, what: str) -> Reply:
        """Answer EIO in the place of a result that the kernel would refuse."""


# `co_flags` of what `async def` makes, and of a generator that types.coroutine() has marked (inspect.CO_*).
_CO_COROUTINES = 0x80 | 0x100


def is_async(handler: Any) -> bool:
    """Tell whether calling `handler` gives a coroutine, as far as it says so: inspect.iscoroutinefunction, not loaded.

    A plain function that is to count as one is marked by inspect.markcoroutinefunction (Python 3.12).
    """
    function = getattr(handler, "__func__", handler)
    code = getattr(function, "__code__", None)
    return bool(getattr(code, "co_flags", 0) & _CO_COROUTINES) or hasattr(function, "_is_coroutine_mark")


# Adapters: from a request to a handler's arguments. `handle` has the two most frequent ones inline; they stand here
# as marks.


def plain(*_: Any) -> Any:
    raise NotImplementedError


def lookup(*_: Any) -> Any:
    raise NotImplementedError


def with_caller(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(caller, nodeid, *row[2](request, 40)) if row[2] is not None else handler(caller, nodeid)


def sized(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    """As `plain`, for requests of data: not of more than was agreed on."""
    arguments = row[2](request, 40)
    if arguments[2] > session.max_pages * session.page_size:
        raise BadRequest(errno.EINVAL)
    return handler(nodeid, *arguments)


def named(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    """(caller, parent, name, *struct): mknod, mkdir, unlink, rmdir, removexattr, create, tmpfile."""
    unpack, need = row[2], row[3]
    (name,), end = names(request, need, 1)
    if extlen and session.extended:
        caller = caller._replace(extensions=Extensions(*parse_extensions(request, end, extlen)))
    return handler(caller, nodeid, name, *unpack(request, 40)) if unpack is not None else handler(caller, nodeid, name)


def _setattr(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(caller, nodeid, _NEW(Setattr, row[2](request, 40)))


def _tmpfile(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    # The kernel names a file without a name "/" (vfs_tmpfile): it is skipped, never given on.
    unpack, start = row[2], row[3]
    stop = bytes(request[start : start + 257]).find(b"\0")
    if stop < 0:
        raise BadRequest(errno.EINVAL)
    if extlen and session.extended:
        caller = caller._replace(extensions=Extensions(*parse_extensions(request, start + stop + 1, extlen)))
    return handler(caller, nodeid, *unpack(request, 40))


def _symlink(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    (name,), end = names(request, 40, 1)
    data = bytes(request[end : end + 4097])
    stop = data.find(b"\0")
    if stop < 1:
        raise BadRequest(errno.ENAMETOOLONG if len(data) > 4096 else errno.EINVAL)
    if extlen and session.extended:
        caller = caller._replace(extensions=Extensions(*parse_extensions(request, end + stop + 1, extlen)))
    return handler(caller, nodeid, name, data[:stop])


def _rename(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    newdir, *flags = row[2](request, 40)
    (old, new), _ = names(request, row[3], 2)
    return handler(caller, nodeid, old, newdir, new, flags[0] if flags else 0)


def _link(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    (oldnodeid,) = row[2](request, 40)
    (name,), _ = names(request, row[3], 1)
    return handler(caller, oldnodeid, nodeid, name)


def _write(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    fh, offset, size, write_flags, lock_owner, flags = row[2](request, 40)
    data = memoryview(request)[80 : 80 + size]
    if len(data) != size:
        raise BadRequest(errno.EINVAL)
    return handler(nodeid, fh, offset, data, write_flags, lock_owner, flags)


def _setxattr(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    size, flags, setxattr_flags = row[2](request, 40)
    name, end = xattr_name(request, row[3])
    value = bytes(request[end : end + size])
    if len(value) != size:
        raise BadRequest(errno.EINVAL)
    return handler(caller, nodeid, name, value, flags, setxattr_flags)


def short_setxattr(request: Any, offset: int) -> tuple[int, int, int]:
    size, flags = _TWO_U32(request, offset)
    return size, flags, 0


def _getxattr(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(caller, nodeid, xattr_name(request, row[3])[0])


def _removexattr(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(caller, nodeid, xattr_name(request, 40)[0])


def _listxattr(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(caller, nodeid)


def _locking(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    fh, owner, start, end, kind, pid, lk_flags = row[2](request, 40)
    return handler(caller, nodeid, fh, owner, _NEW(Lock, (start, end, kind, pid)), lk_flags)


def _ioctl(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    fh, flags, cmd, arg, in_size, out_size = row[2](request, 40)
    data = memoryview(request)[72 : 72 + in_size]
    if len(data) != in_size:
        raise BadRequest(errno.EINVAL)
    return handler(caller, nodeid, fh, flags, cmd, arg, data, out_size)


def _flush(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    fh, lock_owner = row[2](request, 40)
    return handler(nodeid, fh, lock_owner)


def _node_only(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    return handler(nodeid)


def _not_offered(
    session: Owner, handler: Handler, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
) -> Any:
    raise BadRequest(errno.ENOSYS)


# Checks: replies whose length the request bounds. Too much would make the kernel refuse the write and the caller hang;
# what is no buffer would end the worker that writes it.


def length_of(part: Any) -> int:
    """Give the length of a buffer in bytes (`len` counts items). Raises TypeError for what writev(2) cannot take."""
    kind = type(part)
    if kind is bytes or kind is bytearray:
        return len(part)
    view = memoryview(part)
    if not view.c_contiguous:
        raise TypeError("a reply's buffer has to be contiguous")
    return view.nbytes


def _check_data(session: Owner, unique: int, result: Any, request: Any, op: Op) -> Reply:
    size = _READ_SIZE(request, 56)[0]
    kind = type(result)
    if kind is bytes or kind is bytearray:
        length = len(result)
        if length <= size:
            return [_OUT(16 + length, 0, unique), result]
    elif kind is FileRange:
        fd, offset, count, keep = result
        plain = type(fd) is type(offset) is type(count) is int
        if not (plain and 0 <= fd < 1 << 31 and 0 <= offset < 1 << 63 and count >= 0):
            return session.bad_reply(unique, op, "a range of a file that cannot be")
        return FileReply(unique, FileRange(fd, offset, min(count, size), keep))
    elif kind is list:
        length = 0
        for part in result:
            length += length_of(part)
        if length <= size:
            if len(result) >= IOV_MAX:
                result = [b"".join(result)]
            return [_OUT(16 + length, 0, unique), *result]
    else:
        length = length_of(result)
        if length <= size:
            return [_OUT(16 + length, 0, unique), result]
    return session.bad_reply(unique, op, f"{length} bytes where {size} were asked for")


def _check_xattr(session: Owner, unique: int, result: Any, request: Any, op: Op) -> Reply:
    size = codec.U32.unpack_from(request, 40)[0]
    length = length_of(result)
    if size == 0:
        return [_OUT(24, 0, unique), codec.GETXATTR_OUT.pack(length)]
    if length > size:
        return [_OUT(16, -errno.ERANGE, unique)]
    return [_OUT(16 + length, 0, unique), result]


def _check_link(session: Owner, unique: int, result: Any, request: Any, op: Op) -> Reply:
    if type(result) is not bytes:
        result = bytes(memoryview(result))
    length = len(result)
    if length >= session.page_size:
        return [_OUT(16, -errno.ENAMETOOLONG, unique)]
    if length == 0 or 0 in result:
        return session.bad_reply(unique, op, "a target that is empty or has a NUL")
    return [_OUT(16 + length, 0, unique), result]


def _check_ioctl(session: Owner, unique: int, result: Any, request: Any, op: Op) -> Reply:
    out_size = codec.U32.unpack_from(request, 68)[0]
    value, data = result
    length = length_of(data)
    if length > out_size:
        return session.bad_reply(unique, op, f"{length} bytes where {out_size} were asked for")
    body = codec.encode_ioctl((value, data))
    return [_OUT(16 + len(body), 0, unique), body]


# writev(2) takes 1024 buffers, IOV_MAX of <limits.h>; one is the header.
IOV_MAX = 1024
CHECKS = {"data": _check_data, "xattr": _check_xattr, "link": _check_link, "ioctl": _check_ioctl}

ADAPTERS: dict[str, Any] = {
    "lookup": lookup,
    "setattr": _setattr,
    "symlink": _symlink,
    "tmpfile": _tmpfile,
    "rename": _rename,
    "rename2": _rename,
    "link": _link,
    "write": _write,
    "setxattr": _setxattr,
    "getxattr": _getxattr,
    "removexattr": _removexattr,
    "listxattr": _listxattr,
    "getlk": _locking,
    "setlk": _locking,
    "setlkw": _locking,
    "ioctl": _ioctl,
    "flush": _flush,
    "syncfs": _node_only,
    # DAX windows belong to a virtio-fs device; a filesystem is never asked.
    "setupmapping": _not_offered,
    "removemapping": _not_offered,
}
_TWO_U32 = layout("fuse_ext_header").unpack_from
_READ_SIZE = codec.U32.unpack_from
