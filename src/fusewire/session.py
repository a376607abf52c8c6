"""The FUSE session, sans-IO: INIT negotiation, dispatch, errno mapping, interrupts and notifications.

Layer `session`: one call, `handle(request) -> reply`, safe to make from many threads; it owns no fd, no thread and no
clock. Transports are pumps around that call. Rules that hold here: malformed input never raises out of `handle`; a
request that wants a reply gets exactly one; nothing is allocated or looked up per request that could be done once.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from collections.abc import Callable, Iterable
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fusewire.adapters import (
    ADAPTERS,
    CHECKS,
    IOV_MAX,
    Reply,
    is_async,
    length_of,
    lookup,
    named,
    plain,
    short_setxattr,
    sized,
    with_caller,
)
from fusewire.ops import Buffer, Caller, FileRange, Gathered, Operations, Pending, Statfs
from fusewire.wire import abi, codec
from fusewire.wire.requests import BadRequest, check_name
from fusewire.wire.table import OPCODE_LIMIT, TABLE, Op, layout

if TYPE_CHECKING:
    from fusewire.aio import Runner

EIO: Final = errno.EIO
_OUT = codec.OUT_HEADER.pack
_HEADER = codec.IN_HEADER.unpack_from
_NEW = tuple.__new__

# Opcodes that change the filesystem: EROFS on one that says it is read_only.
_CHANGING = frozenset(
    {"setattr", "symlink", "mknod", "mkdir", "unlink", "rmdir", "rename", "rename2", "link", "write", "setxattr"}
    | {"removexattr", "create", "tmpfile", "fallocate", "copy_file_range", "copy_file_range_64"}
)
# open(2)'s access mode, and what empties a file; access(2)'s W_OK: as every Linux machine but alpha and mips has them.
_O_ACCMODE, _O_TRUNC, _W_OK = 3, 0o1000, 2


def _open_for_reading(handler: Any) -> Any:
    def checked(caller: Caller, nodeid: int, flags: int, open_flags: int) -> Any:
        if flags & (_O_ACCMODE | _O_TRUNC):
            raise OSError(errno.EROFS, "the filesystem is read-only", nodeid)
        return handler(caller, nodeid, flags, open_flags)

    return checked


def _access_for_reading(handler: Any) -> Any:
    def checked(caller: Caller, nodeid: int, mask: int) -> Any:
        if mask & _W_OK:
            raise OSError(errno.EROFS, "the filesystem is read-only", nodeid)
        return handler(caller, nodeid, mask)

    return checked


# Requests that a filesystem which says that it is read_only may serve, in part.
_WATCHED = {"open": _open_for_reading, "access": _access_for_reading}
# Requests whose answer without a handler is success, because they only end something.
_ENDING = frozenset({"release", "releasedir", "destroy"})
# fuse_init_in was 16 bytes long before 7.36: the only struct that a kernel of our minors may send shorter.
_INIT_IN_OLD = 16
# Two rows share a handler when the protocol has two requests for one operation.
_METHOD_OF = {"rename2": "rename", "copy_file_range_64": "copy_file_range"}

# Agreed whenever the kernel offers them: each saves round trips or is needed for correctness, and none changes what
# a filesystem has to do. SETXATTR_EXT only changes a struct that we parse both ways.
_ALWAYS = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_ASYNC_DIO
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_ABORT_ERROR
    | abi.FUSE_MAX_PAGES
    | abi.FUSE_SETXATTR_EXT
    | abi.FUSE_INIT_EXT
    | abi.FUSE_HAS_EXPIRE_ONLY
    | abi.FUSE_HAS_RESEND
)
# Never agreed, whatever a filesystem wants: bit 31 is reserved, and after OVER_IO_URING requests come by rings only.
_NEVER = 1 << 31 | abi.FUSE_OVER_IO_URING
# The kernel refuses some pairs (process_init_reply): the first gives way.
_EXCLUSIVE = (
    (abi.FUSE_PASSTHROUGH, abi.FUSE_WRITEBACK_CACHE),
    (abi.FUSE_AUTO_INVAL_DATA, abi.FUSE_EXPLICIT_INVAL_DATA),
)

Log = Callable[[str, BaseException | None], None]


Send = Callable[[list[Buffer]], None]


class Agreed(NamedTuple):
    """What INIT agreed on, all that a later server of the same mount has to be told (`Session.resume`). Plain ints."""

    minor: int
    flags: int
    max_write: int
    max_readahead: int
    max_pages: int


def to_errno(error: BaseException) -> int:
    """Map an exception to an errno that a reply may carry (1..511, fuse_dev_do_write); 0 if it has none."""
    if isinstance(error, OSError):
        number = error.errno
        # OSError("any", "thing") has whatever it was given as its errno.
        if type(number) is int and 0 < number < 512:
            return number
        number = _ERRNO_OF.get(type(error))
        if number is not None:
            return number
    if isinstance(error, (OSError, NotImplementedError)):
        for kind in type(error).__mro__:
            if kind in _ERRNO_OF:
                return _ERRNO_OF[kind]
    return 0


# What the builtin subclasses stand for when they carry no errno, as the interpreter maps them (PEP 3151).
_ERRNO_OF: dict[type, int] = {
    NotImplementedError: errno.ENOSYS,
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    InterruptedError: errno.EINTR,
    BlockingIOError: errno.EAGAIN,
    TimeoutError: errno.ETIMEDOUT,
    ChildProcessError: errno.ECHILD,
    ProcessLookupError: errno.ESRCH,
    BrokenPipeError: errno.EPIPE,
    ConnectionAbortedError: errno.ECONNABORTED,
    ConnectionRefusedError: errno.ECONNREFUSED,
    ConnectionResetError: errno.ECONNRESET,
}


class Session:
    """The protocol state of one mount.

    `handle` takes one whole request and gives its reply; `send`, set by the transport, carries what the server says on
    its own account (notifications, late answers). `ready` becomes true when INIT is answered, then `on_ready` is
    called once.
    """

    def __init__(
        self,
        operations: Operations,
        *,
        max_write: int = 1 << 20,
        max_pages: int = 256,
        max_readahead: int = 1 << 20,
        max_background: int = 64,
        congestion_threshold: int = 48,
        log: Log | None = None,
    ) -> None:
        """Prepare to serve `operations`. Sizes in bytes; `max_pages` of 4 KiB bounds one READ or WRITE."""
        self.operations = operations
        self.send: Send | None = None
        self.on_ready: Callable[[], None] | None = None
        self.on_destroy: Callable[[], None] | None = None
        self.on_block: Callable[[bool], None] | None = None
        # A second INIT, from a client that has begun anew: takes the request, and gives the body of another session's
        # reply. Without it the same session answers once more.
        self.on_again: Callable[[Any], Buffer] | None = None
        self.on_backing_open: Callable[[int], int] | None = None
        self.on_backing_close: Callable[[int], None] | None = None
        self.ready = False
        self.refused = ""
        self.minor = 0
        self.flags = 0
        self.page_size = 4096
        # Without a write handler the kernel need not be offered more than its own minimum (4096): buffers stay small.
        self.max_write = max(max_write, 4096) if self._offers("write") else 4096
        self.max_pages = max_pages
        self.max_readahead = max_readahead
        self.max_background = max_background
        self.congestion_threshold = congestion_threshold
        self.dropped = 0
        self.bad_replies = 0
        self._log = log
        self._logged: set[str] = set()
        self._lock = allocate_lock()  # over _pending, _interrupted and _destroyed; no call goes out under it
        self._destroyed = False
        self._pending: dict[int, Pending] = {}
        self._interrupted: dict[int, None] = {}
        self._retrieves: dict[int, Callable[[int, memoryview], None]] = {}
        self._retrieve_numbers = count(1)
        self.extended = False
        # Runs `async def` methods, if there are any; they are found once, here, so that others pay nothing for them.
        self.runner: Runner | None = None
        self._forget = operations.forget
        self._prepare_async()
        self._rows: list[tuple[Any, ...] | None] = [None] * OPCODE_LIMIT
        self._refusals: list[int] = [-errno.ENOSYS] * OPCODE_LIMIT
        for op in TABLE:
            self._bind(op)

    def limit(self, max_readahead: int | None, max_background: int | None, congestion_threshold: int | None) -> None:
        """Set what INIT is to say of them, where it is given; the threshold is else 3/4 of max_background."""
        if max_readahead is not None:
            self.max_readahead = max_readahead
        if max_background is not None:
            self.max_background = max_background
            self.congestion_threshold = max_background * 3 // 4
        if congestion_threshold is not None:
            self.congestion_threshold = congestion_threshold

    # The table, bound to one filesystem

    def _prepare_async(self) -> None:
        operations = self.operations
        if not any(is_async(getattr(operations, name, None)) for name in _METHODS):
            return
        from fusewire.aio import Runner

        self.runner = runner = Runner()
        forget: Any = operations.forget
        if is_async(forget):

            def done(error: BaseException | None) -> None:
                if error is not None:
                    self.log_once("forget failed", error)

            def deferred(nodeid: int, nlookup: int) -> None:
                runner.pending(forget(nodeid, nlookup), done)

            self._forget = deferred

    def _wait_for(self, result: Any) -> None:
        if self.runner is not None and hasattr(result, "__await__"):
            self.runner.wait(result)

    def _method(self, name: str) -> Any:
        """Give the filesystem's method as `handle` can call it."""
        if name == "forget":
            return self._forget
        handler = getattr(self.operations, name)
        return self.runner.deferred(handler) if self.runner is not None and is_async(handler) else handler

    def _offers(self, name: str) -> bool:
        method = getattr(type(self.operations), name, None)
        base = getattr(Operations, name, None)
        return method is not None and base is not None and method is not base

    def _bind(self, op: Op) -> None:
        code, name = op.code, op.name
        handler: Any
        if name in _OWN and self._serves_itself(name):
            handler = getattr(self, "_" + name)
        elif self.operations.read_only and name in _CHANGING:
            self._refusals[code] = -errno.EROFS
            return
        elif self._offers(_METHOD_OF.get(name, name)):
            handler = self._method(_METHOD_OF.get(name, name))
            if self.operations.read_only and name in _WATCHED:
                handler = _WATCHED[name](handler)
        else:
            if name in _ENDING:
                self._refusals[code] = 0
            return
        args = layout(op.args) if op.args else None
        encode = getattr(codec, "encode_" + op.reply) if op.reply else None
        adapter = getattr(Session, "_" + name) if name in _OWN_ARGUMENTS else ADAPTERS.get(name)
        if adapter is None:
            adapter = named if op.names else plain if not op.caller else with_caller
        self._rows[code] = (
            handler,
            adapter,
            args.unpack_from if args else None,
            40 + (_INIT_IN_OLD if name == "init" else args.size if args else 0),
            encode,
            CHECKS.get(op.reply),
            codec.WHOLE.get(op.reply),
            op,
        )

    def _serves_itself(self, name: str) -> bool:
        if name == "interrupt":
            return self.operations.interruptible or self.runner is not None
        return name != "batch_forget" or self._offers("forget")

    # The one call

    def handle(self, request: Any) -> Reply:
        """Serve one whole request (a buffer that starts with fuse_in_header) and give what to send back, if anything.

        The reply is a list of buffers to be written as one message, or a `FileReply`. Never raises for what the peer
        sent or for what a handler did; only BaseExceptions that are no Exceptions pass.
        """
        if type(request) is not memoryview:
            request = memoryview(request)
        length = len(request)
        if length < 40:
            self.dropped += 1
            return None
        _len, opcode, unique, nodeid, uid, gid, pid, extlen = _HEADER(request)
        row = self._rows[opcode] if opcode < OPCODE_LIMIT else None
        if row is None:
            return self._refuse(opcode, unique)
        handler, adapter, unpack, need, encode, check, whole, op = row
        try:
            if length < need or _len != length:
                raise BadRequest(errno.EINVAL if _len == length else EIO)
            if adapter is plain:
                result = handler(nodeid, *unpack(request, 40)) if unpack is not None else handler(nodeid)
            elif adapter is lookup:
                name = request[40:-1].tobytes()
                if length > 296 or not name or name[0] == 46 or 47 in name or 0 in name or request[-1]:
                    check_name(name, terminated=not request[-1])
                result = handler(_NEW(Caller, (uid, gid, pid, unique, None)), nodeid, name)
                if result is None:
                    return [_OUT(16, -errno.ENOENT, unique)]
            else:
                result = adapter(
                    self, handler, _NEW(Caller, (uid, gid, pid, unique, None)), nodeid, request, row, extlen
                )
            if encode is None:
                return None
            if type(result) is Pending:
                return self._defer(result, unique, row, request)
            if whole is not None:
                return [whole(unique, result)]
            if check is not None:
                return check(self, unique, result, request, op)  # type: ignore[no-any-return]
            data = encode(result)
            return [_OUT(16 + len(data), 0, unique), data]
        except BadRequest as bad:
            return None if encode is None else [_OUT(16, -bad.args[0], unique)]
        except Exception as error:  # noqa: BLE001 - the session's guard: whatever a handler does, the kernel gets an answer
            return self._failed(error, unique, op)

    def handle_write(self, head: bytes, data: Gathered) -> Reply:
        """Serve a WRITE whose data lie apart from their header, in any number of pieces: for shared memory.

        `head` is fuse_in_header and fuse_write_in, 80 bytes. The pieces reach a filesystem that `gathers` as they are.
        """
        length, opcode, unique, nodeid, *_ = _HEADER(head)
        row = self._rows[abi.FUSE_WRITE]
        if row is None:
            return self._refuse(opcode, unique)
        handler, _, unpack, _, encode, _, _, op = row
        try:
            fh, offset, size, write_flags, lock_owner, flags = unpack(head, 40)
            if isinstance(data, list):
                count, total = len(data), sum(map(len, data))
            else:
                count, total = data.count, data.nbytes
            if length != 80 + size or size > self.max_write or total != size:
                raise BadRequest(errno.EINVAL)
            if self.operations.gathers and 1 < count <= IOV_MAX:
                pieces: Any = data
            else:
                views = data if isinstance(data, list) else data.views()
                pieces = views[0] if len(views) == 1 else memoryview(b"".join(views))
            result = handler(nodeid, fh, offset, pieces, write_flags, lock_owner, flags)
            if type(result) is Pending:
                return self._defer(result, unique, row, head)
            return [_OUT(24, 0, unique) + encode(result)]
        except BadRequest as bad:
            return [_OUT(16, -bad.args[0], unique)]
        except Exception as error:  # noqa: BLE001 - as in handle
            return self._failed(error, unique, op)

    def bound_sizes(self) -> None:
        """Refuse READ, READDIR and READDIRPLUS of more than was agreed on: where the peer is no kernel of this machine.

        A filesystem need not fear then that a size is made up: it is what an answer may take in memory.
        """
        for code in (abi.FUSE_READ, abi.FUSE_READDIR, abi.FUSE_READDIRPLUS):
            row = self._rows[code]
            if row is not None:
                self._rows[code] = (row[0], sized, *row[2:])

    def _refuse(self, opcode: int, unique: int) -> Reply:
        if opcode >= OPCODE_LIMIT:
            return [_OUT(16, -errno.ENOSYS, unique)]
        if opcode in NO_REPLY:
            return None
        if opcode == abi.FUSE_STATFS:
            data = codec.encode_statfs(Statfs())
            return [_OUT(16 + len(data), 0, unique), data]
        if opcode in (abi.FUSE_OPEN, abi.FUSE_OPENDIR) and not self.flags & _NO_OPEN_FLAG[opcode]:
            keep = abi.FOPEN_KEEP_CACHE | (abi.FOPEN_CACHE_DIR if opcode == abi.FUSE_OPENDIR else 0)
            data = codec.encode_open((0, keep if self.operations.immutable else 0))
            return [_OUT(16 + len(data), 0, unique), data]
        return [_OUT(16, self._refusals[opcode], unique)]

    def _failed(self, error: BaseException, unique: int, op: Op) -> Reply:
        number = to_errno(error)
        if number == 0:
            self.log_once(f"{op.name} failed", error)
            number = EIO
        if op.reply == "":
            return None
        return [_OUT(16, -number, unique)]

    def bad_reply(self, unique: int, op: Op, what: str) -> Reply:
        """Answer EIO in the place of a result that the kernel would refuse, and report it once per operation."""
        self.bad_replies += 1
        self.log_once(f"{op.name} gave {what}", place=op.name)
        return [_OUT(16, -EIO, unique)]

    def log_once(self, message: str, error: BaseException | None = None, *, place: str = "") -> None:
        """Report a fault the first time that it happens at its place; a flood of equal faults makes one report.

        The place is where `error` was raised; without one, what `place` names, or else the message itself.
        """
        key = place or message
        trace = error.__traceback__ if error is not None else None
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None:
            key = f"{message} {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        if key in self._logged or len(self._logged) > 1000:
            return
        self._logged.add(key)
        try:
            if self._log is not None:
                self._log(message, error)
                return
            import logging

            logging.getLogger("fusewire").error(message, exc_info=error)
        except Exception:  # noqa: BLE001, S110 - a report that fails must not cost a caller its answer
            pass

    # Late answers and interrupts

    def _defer(self, pending: Pending, unique: int, row: tuple[Any, ...], request: Any) -> Reply:
        head = bytes(request[:80])  # the worker's buffer is used again before the answer comes

        def answer(result: Any, error: BaseException | None) -> None:
            with self._lock:
                self._pending.pop(unique, None)
            reply = self._late(unique, row, head, result, error)
            if self.send is not None and isinstance(reply, list):
                self.send(reply)

        # Known before it is bound: from then on it may be settled, and `answer` takes it out again.
        with self._lock:
            self._pending[unique] = pending
            interrupted = self._interrupted.pop(unique, self) is None
        try:
            settled = pending.bind(answer)
        except RuntimeError as error:  # it waits for another request already; that one keeps it
            with self._lock:
                self._pending.pop(unique, None)
            return self._failed(error, unique, row[-1])
        if settled is not None:
            with self._lock:
                self._pending.pop(unique, None)
            return self._late(unique, row, head, *settled)
        if interrupted:
            self._give_up(pending)
        return None

    def _give_up(self, pending: Pending) -> None:
        # Guarded here: an exception that reached `handle` from `_defer` would make a second answer.
        interrupt = pending.interrupt  # once: it goes when the answer comes
        if interrupt is not None:
            try:
                interrupt()
            except Exception as error:  # noqa: BLE001 - as in handle
                self.log_once("interrupt failed", error)

    def _late(self, unique: int, row: tuple[Any, ...], head: bytes, result: Any, error: BaseException | None) -> Reply:
        _, _, _, _, encode, check, _, op = row
        try:
            if error is not None:
                raise error
            if type(result) is FileRange:
                raise OSError(EIO, "a late answer has to carry its data")
            if result is None and op.code == abi.FUSE_LOOKUP:
                return [_OUT(16, -errno.ENOENT, unique)]
            if check is not None:
                return check(self, unique, result, head, op)  # type: ignore[no-any-return]
            data = encode(result)
            return [_OUT(16 + len(data), 0, unique), data]
        except Exception as failure:  # noqa: BLE001 - as in handle
            return self._failed(failure, unique, op)

    def _interrupt(self, nodeid: int, unique: int) -> None:
        with self._lock:
            pending = self._pending.get(unique)
            if pending is None:
                # Its handler may not have returned yet. Not answered: EAGAIN would make the kernel repeat it at once.
                if len(self._interrupted) >= 1024:
                    del self._interrupted[next(iter(self._interrupted))]
                self._interrupted[unique] = None
        if pending is not None:
            self._give_up(pending)

    # INIT and DESTROY

    def _init(
        self, handler: Any, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
    ) -> bytes:
        if self.ready and self.on_again is not None:
            return bytes(self.on_again(request))
        # Short before 7.36; flags2 counts only with INIT_EXT.
        body = bytes(request[40:104]).ljust(64, b"\0")
        major, minor, readahead, flags, flags2 = _INIT_IN(body, 0)
        if major < abi.FUSE_KERNEL_VERSION or (major == abi.FUSE_KERNEL_VERSION and minor < abi.MINOR_MIN):
            self.refused = (
                f"the kernel speaks FUSE {major}.{minor}; 7.{abi.MINOR_MIN} or newer is needed (Linux 4.18 and later)"
            )
            self.log_once(self.refused)
            raise BadRequest(errno.EPROTO)
        if major > abi.FUSE_KERNEL_VERSION:
            # The kernel will send another INIT with our major; it reads nothing else of this reply.
            return _INIT_OUT(abi.FUSE_KERNEL_VERSION, abi.FUSE_KERNEL_MINOR_VERSION, *[0] * 11)
        offered = flags | (flags2 << 32 if flags & abi.FUSE_INIT_EXT else 0)
        self.minor = min(minor, abi.MINOR_MAX)
        self.flags = agreed = self._agree(offered)
        self.max_readahead = min(readahead, self.max_readahead)
        if not agreed & abi.FUSE_MAX_PAGES:
            self.max_pages = 32
        self.max_write = min(self.max_write, self.max_pages * self.page_size)
        answer = _INIT_OUT(
            abi.FUSE_KERNEL_VERSION,
            self.minor,
            self.max_readahead,
            agreed & 0xFFFFFFFF,
            self.max_background,
            self.congestion_threshold,
            self.max_write,
            self.operations.time_gran,
            self.max_pages if agreed & abi.FUSE_MAX_PAGES else 0,
            0,
            agreed >> 32,
            1 if agreed & abi.FUSE_PASSTHROUGH else 0,
            0,
        )
        self._begin()
        return answer

    def _begin(self) -> None:
        self.extended = bool(self.flags & (abi.FUSE_SECURITY_CTX | abi.FUSE_CREATE_SUPP_GROUP))
        if not self.flags & abi.FUSE_SETXATTR_EXT:
            self._shorten_setxattr()
        if not self.ready:
            try:
                self._wait_for(self.operations.init(self))
            except Exception as error:
                self.refused = f"the filesystem would not start: {error}"
                raise
        self.ready = True

    @property
    def agreed(self) -> Agreed:
        """What INIT agreed on: to be kept by whoever wants to `resume` the mount after this server."""
        return Agreed(self.minor, self.flags, self.max_write, self.max_readahead, self.max_pages)

    def resume(self, agreed: Agreed) -> None:
        """Take up a mount whose INIT another server answered; `agreed` is that session's. Calls `on_ready`.

        Node ids, handles and lookup counts that the kernel holds are the filesystem's to know again; FORGETs that the
        other server had read are lost. `notify_resend`, once the transport serves, brings back what it left
        unanswered (FUSE_NOTIFY_RESEND, Linux 6.9). Raises what the filesystem's `init` does.
        """
        self.minor, self.flags, self.max_write, self.max_readahead, self.max_pages = agreed
        self._begin()
        if self.on_ready is not None:
            self.on_ready()

    def _agree(self, offered: int) -> int:
        operations = self.operations
        want = _ALWAYS | operations.want
        if operations.immutable:
            want |= abi.FUSE_CACHE_SYMLINKS | abi.FUSE_EXPLICIT_INVAL_DATA
        elif not want & abi.FUSE_EXPLICIT_INVAL_DATA:
            want |= abi.FUSE_AUTO_INVAL_DATA
        if not self._offers("open"):
            want |= abi.FUSE_NO_OPEN_SUPPORT
        elif self._offers("create") or self._offers("setattr"):
            want |= abi.FUSE_ATOMIC_O_TRUNC
        if not self._offers("opendir"):
            want |= abi.FUSE_NO_OPENDIR_SUPPORT
        if self._offers("readdirplus"):
            want |= abi.FUSE_DO_READDIRPLUS
        if self._offers("setlk"):
            want |= abi.FUSE_POSIX_LOCKS | abi.FUSE_FLOCK_LOCKS
        agreed = want & offered & ~operations.refuse & ~_NEVER
        if not agreed & abi.FUSE_INIT_EXT:
            agreed &= 0xFFFFFFFF
        for loser, winner in _EXCLUSIVE:
            if agreed & loser and agreed & winner:
                agreed &= ~loser
        return agreed

    def _shorten_setxattr(self) -> None:
        """Before SETXATTR_EXT, fuse_setxattr_in ends after `flags` (FUSE_COMPAT_SETXATTR_IN_SIZE)."""
        row = self._rows[abi.FUSE_SETXATTR]
        if row is not None:
            self._rows[abi.FUSE_SETXATTR] = (*row[:2], short_setxattr, 48, *row[4:])

    def _destroy(self, nodeid: int = 0) -> None:
        self.close()
        if self.on_destroy is not None:
            self.on_destroy()

    def close(self) -> bool:
        """End the filesystem: its `destroy` is called once, however the mount ended, and never raises from here.

        False if another thread has begun to end it, and may be at it still.
        """
        with self._lock:
            destroyed, self._destroyed = self._destroyed, True
        if destroyed:
            return False
        try:
            if self.runner is not None:
                self.runner.end()
            self._wait_for(self.operations.destroy())
        except Exception as error:  # noqa: BLE001 - nobody is left who could be told
            self.log_once("destroy failed", error)
        return True

    # FORGET

    def _batch_forget(
        self, handler: Any, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
    ) -> None:
        (count,) = codec.U32.unpack_from(request, 40)
        forget = self._forget
        body = request[48 : 48 + 16 * min(count, (len(request) - 48) // 16)]
        for node, nlookup in codec.FORGET_ONE.iter_unpack(body):
            try:
                forget(node, nlookup)
            except Exception as error:  # noqa: BLE001 - the other nodes of the batch are forgotten all the same
                self._failed(error, 0, row[-1])

    def may_block(self, long: bool = False) -> None:
        """Hear from a handler that it is about to be slow; `long`: milliseconds rather than microseconds."""
        if self.on_block is not None:
            self.on_block(long)

    # Backing files (FUSE_PASSTHROUGH): what the transport does for a filesystem.

    def backing_open(self, fd: int) -> int:
        """Have the kernel read and write the file `fd` itself; give the id for `open`'s third value.

        Raises OSError: EPERM without CAP_SYS_ADMIN in the first user namespace, EOPNOTSUPP where it is not agreed.
        """
        if self.on_backing_open is None or not self.flags & abi.FUSE_PASSTHROUGH:
            raise OSError(errno.EOPNOTSUPP, "backing files were not agreed on")
        return self.on_backing_open(fd)

    def backing_close(self, backing_id: int) -> None:
        """Let go of a backing file; what is open goes on."""
        if self.on_backing_close is not None:
            self.on_backing_close(backing_id)

    # Notifications: what the server says unasked. Each gives False when the kernel does not know the node or the name.

    def _notify(self, code: int, parts: list[Buffer]) -> bool:
        if self.send is None:
            raise OSError(errno.ENOTCONN, "the session has no transport to notify through")
        try:
            self.send([_OUT(16 + sum(map(length_of, parts)), code, 0), *parts])
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EINVAL, errno.ENOSYS):
                return False
            raise
        return True

    def notify_inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        """Drop cached attributes and the pages of a range; length 0: to the end; offset -1: attributes only."""
        return self._notify(abi.FUSE_NOTIFY_INVAL_INODE, [_INVAL_INODE(nodeid, offset, length)])

    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool = False) -> bool:
        """Drop a name from the cache; `expire_only` makes the kernel ask again instead (7.38)."""
        flags = abi.FUSE_EXPIRE_ONLY if expire_only and self.flags & abi.FUSE_HAS_EXPIRE_ONLY else 0
        return self._notify(abi.FUSE_NOTIFY_INVAL_ENTRY, [_INVAL_ENTRY(parent, len(name), flags), name + b"\0"])

    def notify_delete(self, parent: int, child: int, name: bytes) -> bool:
        """Tell that a name is gone: as inval_entry, and inotify watchers hear of it."""
        return self._notify(abi.FUSE_NOTIFY_DELETE, [_DELETE(parent, child, len(name)), name + b"\0"])

    def notify_store(self, nodeid: int, offset: int, data: Buffer) -> bool:
        """Put data into the kernel's page cache of a node."""
        return self._notify(abi.FUSE_NOTIFY_STORE, [_STORE(nodeid, offset, length_of(data)), data])

    def notify_retrieve(self, nodeid: int, offset: int, size: int, done: Callable[[int, memoryview], None]) -> bool:
        """Ask for what the page cache holds; `done(offset, data)` is called later, on a worker's thread.

        `data` is the request's memory: copy what is kept.
        """
        number = next(self._retrieve_numbers)
        self._retrieves[number] = done
        found = False
        try:
            found = self._notify(abi.FUSE_NOTIFY_RETRIEVE, [_RETRIEVE(number, nodeid, offset, size)])
        finally:
            if not found:
                self._retrieves.pop(number, None)
        return found

    def notify_poll(self, kh: int) -> bool:
        """Wake who polls the handle that POLL named `kh`."""
        return self._notify(abi.FUSE_NOTIFY_POLL, [codec.U64.pack(kh)])

    def notify_resend(self) -> bool:
        """Ask for every request that was read and not answered again, `unique` with bit 63 set (7.40)."""
        return self._notify(abi.FUSE_NOTIFY_RESEND, [])

    def notify_inc_epoch(self) -> bool:
        """Make every cached name be looked up again (7.44)."""
        return self._notify(abi.FUSE_NOTIFY_INC_EPOCH, [])

    def notify_prune(self, nodeids: Iterable[int]) -> bool:
        """Ask the kernel to forget nodes that nobody uses (7.45)."""
        nodes = list(nodeids)
        return self._notify(abi.FUSE_NOTIFY_PRUNE, [_PRUNE(len(nodes)), b"".join(map(codec.U64.pack, nodes))])

    def _notify_reply(
        self, handler: Any, caller: Caller, nodeid: int, request: Any, row: tuple[Any, ...], extlen: int
    ) -> None:
        done = self._retrieves.pop(caller.unique, None)
        if done is not None:
            offset, size = row[2](request, 40)
            start = row[3]
            done(offset, memoryview(request)[start : start + size])


# Rows that the session serves itself, whatever the filesystem offers.
_OWN_ARGUMENTS = frozenset({"init", "batch_forget", "notify_reply"})
_OWN = frozenset({"init", "destroy", "interrupt", "batch_forget", "notify_reply"})

# What of a filesystem may be `async def`.
_METHODS = frozenset({_METHOD_OF.get(op.name, op.name) for op in TABLE} - (_OWN - {"init", "destroy"}))

# Requests that are never answered. INTERRUPT is only without a handler: ENOSYS ends it.
NO_REPLY = frozenset(op.code for op in TABLE if op.reply == "" and op.name != "interrupt")
_NO_OPEN_FLAG = {abi.FUSE_OPEN: abi.FUSE_NO_OPEN_SUPPORT, abi.FUSE_OPENDIR: abi.FUSE_NO_OPENDIR_SUPPORT}
_INIT_IN = layout("fuse_init_in").unpack_from
_INIT_OUT = layout("fuse_init_out").pack
_INVAL_INODE = layout("fuse_notify_inval_inode_out").pack
_INVAL_ENTRY = layout("fuse_notify_inval_entry_out").pack
_DELETE = layout("fuse_notify_delete_out").pack
_STORE = layout("fuse_notify_store_out").pack
_RETRIEVE = layout("fuse_notify_retrieve_out").pack
_PRUNE = layout("fuse_notify_prune_out").pack
