"""From a chain of a virtqueue to a request, and from a reply to the chain's writable part (virtio 1.2, 5.11.6).

Layer `transport`. One `Exchange` serves one front end: it owns the FUSE session, which a second INIT replaces (a guest
that has been reset says no goodbye). It knows chains and sessions, no rings, threads or descriptors of its own; file
data go straight between the host's file and guest memory by preadv(2) and pwritev(2).

**Guest memory changes under our hands.** What is parsed is copied out first and only the copy is looked at. Payloads of
WRITE and data of READ are not parsed: they may change while they are moved, and nothing of ours depends on them.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from fusewire.adapters import IOV_MAX, FileReply
from fusewire.session import NO_REPLY, Session
from fusewire.wire import abi, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.adapters import Reply
    from fusewire.ops import Buffer, Operations
    from fusewire.session import Agreed, Log
    from fusewire.transport.ring import Chain

_OUT = codec.OUT_HEADER.pack
_OUT_SIZE: Final = 16
_IN_HEADER: Final = 40
_WRITE_HEAD: Final = 80
_OPCODE_UNIQUE = Struct("=4xIQ").unpack_from
# A request of up to so many bytes is copied out as a whole; of a longer one, only WRITE's payload stays where it is.
_SMALL: Final = 8192
# The longest that is copied out at all: a batch of FORGETs or an attribute's value, with room to spare.
_LARGEST: Final = 1 << 20

DEFERRED: Final = -1
"""Given in the place of a length: the answer comes later, through `Exchange.on_late`."""


class Exchange:
    """Requests of one front end's guest. `serve` may be called by many threads.

    on_late(token, writable, buffers): answer what `serve` has deferred; it is called by any thread. on_fresh(): the
    guest has begun anew, and what was deferred before is answered to nobody.
    """

    def __init__(
        self,
        make_operations: Callable[[], Operations],
        *,
        log: Log | None = None,
        trace: Callable[[Any, Any], None] | None = None,
        max_write: int = 1 << 20,
    ) -> None:
        """Serve what `make_operations` gives: a fresh one for every session, ended by its `destroy`."""
        self._make = make_operations
        self._log = log
        self._trace = trace
        self._max_write = max_write
        self.on_block: Callable[[bool], None] | None = None
        self.on_late: Callable[[Any, list[memoryview], list[Buffer]], None] | None = None
        self.on_fresh: Callable[[], None] | None = None
        self.on_agreed: Callable[[Agreed | None], None] | None = None
        self._begin_lock = allocate_lock()  # over the change of sessions
        self._late_lock = allocate_lock()  # over the two below
        self._waiting: dict[int, tuple[Any, list[memoryview]]] = {}
        self._early: dict[int, list[Buffer]] = {}  # answers that came before `serve` could say who waits for them
        self._session: Session | None = None
        self._handle: Callable[[Any], Reply] = self._before_init

    # Sessions

    def _new_session(self) -> Session:
        """End the session there is, and make another."""
        self._end_session()
        session = Session(self._make(), log=self._log, max_write=self._max_write)
        session.bound_sizes()
        session.send = lambda buffers: self._send(session, buffers)
        session.on_again = self._again
        session.on_destroy = self._destroyed
        if session.operations.announces_blocking:
            session.on_block = self._block
        self._session = session
        return session

    def _end_session(self) -> None:
        session, self._session = self._session, None
        self._handle = self._before_init
        if session is not None:
            session.send = None  # what waits for a lock gives up, and nobody hears of it
            session.close()
        with self._late_lock:
            self._waiting.clear()
            self._early.clear()
        if session is not None and self.on_fresh is not None:
            self.on_fresh()

    def _before_init(self, request: Any) -> Reply:
        """Answer whoever does not begin with INIT: there is nothing to serve him from."""
        if len(request) < _IN_HEADER:
            return None
        opcode, unique = _OPCODE_UNIQUE(request)
        if opcode in NO_REPLY:
            return None
        if opcode != abi.FUSE_INIT:
            return [_OUT(_OUT_SIZE, -errno.EIO, unique)]
        with self._begin_lock:
            try:
                session = self._new_session()
            except OSError as error:
                self.say(f"the filesystem cannot be opened again: {error}")
                return [_OUT(_OUT_SIZE, -(error.errno or errno.EIO), unique)]
            reply = session.handle(request)
            if session.ready:
                self._handle = session.handle if self._trace is None else self._traced(session.handle)
                if self.on_agreed is not None:
                    self.on_agreed(session.agreed)
            return reply

    def _again(self, request: Any) -> Buffer:
        """Begin anew with a guest that was reset: its INIT comes to the session before."""
        reply = self._before_init(request)
        assert type(reply) is list
        data = b"".join(reply)
        _, error, _ = codec.OUT_HEADER.unpack_from(data)
        if error:
            raise OSError(-error, "the guest's INIT was refused")
        return data[_OUT_SIZE:]

    def _destroyed(self) -> None:
        self._handle = self._before_init
        if self.on_agreed is not None:
            self.on_agreed(None)

    def _traced(self, handle: Callable[[Any], Reply]) -> Callable[[Any], Reply]:
        trace = self._trace
        assert trace is not None

        def traced(request: Any) -> Reply:
            reply = handle(request)
            trace(request, reply)
            return reply

        return traced

    def resume(self, agreed: Agreed) -> None:
        """Go on with a guest whose INIT an earlier server answered. Raises what the filesystem's `init` does."""
        with self._begin_lock:
            session = self._new_session()
            session.resume(agreed)
            self._handle = session.handle

    @property
    def ready(self) -> bool:
        """True once INIT has been answered."""
        session = self._session
        return session is not None and session.ready

    def close(self) -> None:
        """End the session: the front end is gone."""
        with self._begin_lock:
            self._end_session()

    def say(self, message: str) -> None:
        """Report something, once."""
        session = self._session
        if session is not None:
            session.log_once(message)
        elif self._log is not None:
            self._log(message, None)

    def _block(self, long: bool) -> None:
        if self.on_block is not None:
            self.on_block(long)

    # Requests

    def serve(self, chain: Chain, token: Any) -> int:
        """Serve one request and give how many bytes were written, or DEFERRED; `token` is for `on_late` then."""
        readable, writable = chain.readable, chain.writable
        total = len(readable[0]) + len(readable[1]) if len(readable) == 2 else sum(map(len, readable))
        if total <= _SMALL:
            request = b"".join(readable)
            reply = self._handle(request)
        else:
            request, reply = self._serve_large(readable, total)
        if type(reply) is list:
            if len(reply) == 1 and len(writable) == 2 and len(writable[0]) == _OUT_SIZE:
                # How Linux lays out nearly every request: a header and one piece behind it.
                data = reply[0]
                length = len(data)
                body = writable[1]
                if length - _OUT_SIZE <= len(body):
                    writable[0][:] = data[:_OUT_SIZE]
                    body[: length - _OUT_SIZE] = data[_OUT_SIZE:]
                    return length
            return self.give(writable, reply)
        if isinstance(reply, FileReply):
            return self._give_file(writable, reply)
        if len(request) < _IN_HEADER:
            return 0
        opcode, unique = _OPCODE_UNIQUE(request)
        if opcode in NO_REPLY or opcode == abi.FUSE_INTERRUPT:
            return 0
        return self._wait_for(unique, token, writable)

    def _serve_large(self, readable: list[memoryview], total: int) -> tuple[bytes, Reply]:
        head, data = _split(readable, _WRITE_HEAD)
        opcode, unique = _OPCODE_UNIQUE(head)
        session = self._session
        if opcode == abi.FUSE_WRITE and session is not None and session.ready:
            reply = session.handle_write(head, data)
            if self._trace is not None:
                self._trace(head, reply)
            return head, reply
        if total > _LARGEST:
            return head, None if opcode in NO_REPLY else [_OUT(_OUT_SIZE, -errno.EINVAL, unique)]
        request = b"".join(readable)
        return request, self._handle(request)

    # Replies

    def give(self, writable: list[memoryview], reply: list[Buffer]) -> int:
        """Write a reply where the guest has room for it, and tell its length; what has no room is EIO, if that has."""
        room = sum(map(len, writable))
        if sum(map(len, reply)) > room:
            _, _, unique = codec.OUT_HEADER.unpack_from(reply[0])
            self.say(f"a guest left {room} bytes for a reply that is longer")
            reply = [_OUT(_OUT_SIZE, -errno.EIO, unique)]
            if room < _OUT_SIZE:
                return 0
        written = 0
        pieces = iter(writable)
        target = next(pieces, _NOWHERE)
        for part in reply:
            source = memoryview(part).cast("B")
            while source:
                if not target:
                    target = next(pieces)
                    continue
                count = min(len(source), len(target))
                target[:count] = source[:count]
                target, source = target[count:], source[count:]
                written += count
        return written

    def _give_file(self, writable: list[memoryview], reply: FileReply) -> int:
        """Read a range of a file straight into the guest's memory."""
        fd, offset, size, _keep = reply.range
        if len(writable) == 2 and len(writable[0]) == _OUT_SIZE and len(writable[1]) == size:
            views, room = writable[1:], size
        else:
            views = _beyond(writable, _OUT_SIZE, size)
            room = sum(map(len, views))
        if room < size:
            return self.give(writable, [_OUT(_OUT_SIZE, -errno.EINVAL, reply.unique)])
        if size > _SMALL << 3:
            self._block(False)
        try:
            length = os.preadv(fd, views, offset) if len(views) <= IOV_MAX else _read_many(fd, views, offset)
        except (OSError, OverflowError) as error:  # Overflow: offset and size end beyond what a file can have
            number = error.errno if isinstance(error, OSError) else errno.EINVAL
            return self.give(writable, [_OUT(_OUT_SIZE, -(number or errno.EIO), reply.unique)])
        header = _OUT(_OUT_SIZE + length, 0, reply.unique)
        if len(writable[0]) == _OUT_SIZE:
            writable[0][:] = header
        else:
            self.give(writable, [header])
        return _OUT_SIZE + length

    # Answers that come later

    def _wait_for(self, unique: int, token: Any, writable: list[memoryview]) -> int:
        with self._late_lock:
            buffers = self._early.pop(unique, None)
            if buffers is None:
                self._waiting[unique] = token, writable
                return DEFERRED
        return self.give(writable, buffers)

    def _send(self, session: Session, buffers: list[Buffer]) -> None:
        """Take what a session says on its own account. There is no queue for notifications, in Linux or here."""
        unique = codec.OUT_HEADER.unpack_from(buffers[0])[2]
        if not unique:
            raise OSError(errno.ENOSYS, "a guest cannot be notified")
        with self._late_lock:
            if session is not self._session:
                return
            found = self._waiting.pop(unique, None)
            if found is None:
                self._early[unique] = buffers
                return
        if self.on_late is not None:
            self.on_late(*found, buffers)


_NOWHERE = memoryview(b"")


def _split(pieces: list[memoryview], size: int) -> tuple[bytes, list[memoryview]]:
    """Copy the first `size` bytes out, and give the rest as it lies."""
    first = pieces[0]
    if len(first) == size:
        return bytes(first), pieces[1:]
    head = bytearray()
    for index, piece in enumerate(pieces):
        head += piece[: size - len(head)]
        if len(head) == size:
            return bytes(head), _beyond(pieces, size, sum(map(len, pieces[index:])))
    return bytes(head), []


def _beyond(pieces: list[memoryview], skip: int, size: int) -> list[memoryview]:
    """Give at most `size` bytes behind the first `skip`, in pieces."""
    found = []
    for piece in pieces:
        length = len(piece)
        if skip >= length:
            skip -= length
            continue
        part = piece[skip : skip + size]
        skip = 0
        size -= len(part)
        found.append(part)
        if not size:
            break
    return found


def _read_many(fd: int, views: list[memoryview], offset: int) -> int:
    """Read into more pieces than one preadv(2) takes."""
    total = 0
    for start in range(0, len(views), IOV_MAX):
        some = views[start : start + IOV_MAX]
        length = os.preadv(fd, some, offset + total)
        total += length
        if length < sum(map(len, some)):
            break
    return total
