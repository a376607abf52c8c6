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
import time
from _thread import allocate_lock
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from fusewire.adapters import IOV_MAX, FileReply, length_of
from fusewire.linux import vectors
from fusewire.session import NO_REPLY, Session, to_errno
from fusewire.wire import abi, codec
from fusewire.wire.table import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.adapters import Reply
    from fusewire.ops import Buffer, Gathered, Operations, Pages
    from fusewire.session import Agreed, Log
    from fusewire.transport.ring import Chain

_OUT = codec.OUT_HEADER.pack
_OUT_SIZE: Final = 16
_IN_HEADER: Final = 40
_WRITE_HEAD: Final = 80
_OPCODE_UNIQUE = Struct("=4xIQ").unpack_from
_HEADER = codec.IN_HEADER.pack
_INIT_IN = layout("fuse_init_in")
# A request of up to so many bytes is copied out as a whole; of a longer one, only WRITE's payload stays where it is.
_SMALL: Final = 8192
# WRITE of whole sectors stays as well: with O_DIRECT the host wants its memory aligned, which a copy is not.
_SECTOR: Final = 512
_DIRECT: Final = _WRITE_HEAD + _SECTOR
# The longest that is copied out at all: a batch of FORGETs or an attribute's value, with room to spare.
_LARGEST: Final = 1 << 20

# So many different lines are said of one front end's guest: what a guest brings about must not fill a disk.
_MOST_LINES: Final = 200
# So many small replies may be held back for company, if the filesystem tells before it is slow (`may_block`).
_BATCH: Final = 4

DEFERRED: Final = -1
"""Given in the place of a length: the answer comes later, through `Exchange.on_late`."""


class Exchange:
    """Requests of one front end's guest. `serve` may be called by many threads.

    on_late(token, chain, buffers): answer a chain that `serve` has deferred; it is called by any thread, at most once
    for each chain. on_agreed: INIT was answered, or (None) DESTROY. `batch`: how many replies may be held back.

    A guest that was reset sends another INIT, and an ill-willed one sends it, or DESTROY, while it has requests in
    work: handlers of a session that has ended may still run, and answer what they find.
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
        self.on_late: Callable[[Any, Chain, list[Buffer]], None] | None = None
        self.on_agreed: Callable[[Agreed | None], None] | None = None
        self._begin_lock = allocate_lock()  # over the change of sessions
        self._late_lock = allocate_lock()  # over the two below, and over the change of `_session`
        # By `unique`, of which only an honest guest has one at a time: each answer goes to one chain, the oldest.
        self._waiting: dict[int, list[tuple[Any, Chain]]] = {}
        # Answers that came before `serve` could say who waits for them.
        self._early: dict[int, list[list[Buffer]]] = {}
        self._said: set[str] = set()
        self._ahead: Operations | None = None
        self._ahead_lock = allocate_lock()  # queues are many, and a filesystem's `idle` is called once at a time
        self.batch = 1
        self._session: Session | None = None
        self._handle: Callable[[Any], Reply] = self._before_init
        self._write: Callable[[bytes, Gathered], Reply] | None = None

    # Sessions

    def _new_session(self) -> Session:
        """End the session there is, and make another; under `_begin_lock`. Raises what making a filesystem does."""
        self._end_session()
        session = Session(self._make(), log=self.say, max_write=self._max_write)
        session.bound_sizes()
        session.send = lambda buffers: self._send(session, buffers)
        session.on_again = self._again
        session.on_destroy = lambda: self._destroyed(session)
        if session.operations.announces_blocking:
            session.on_block = self._block
        with self._late_lock:
            self._session = session
        return session

    def _end_session(self) -> None:
        """End it; under `_begin_lock`. Who waits for a lock gets the answer that there is no filesystem any more."""
        session = self._session
        self._idle()
        if session is None:
            return
        session.close()
        with self._late_lock:
            self._session = None
            self._waiting.clear()
            self._early.clear()
        session.send = _to_nobody  # not None, which a thread might have found to be something a moment ago

    def _idle(self) -> None:
        self._handle, self._write, self.batch, self._ahead = self._before_init, None, 1, None

    def _serve_from(self, session: Session) -> None:
        self.batch = _BATCH if session.operations.announces_blocking else 1
        self._write = session.handle_write
        self._ahead = session.operations
        self._handle = session.handle if self._trace is None else self._traced(session.handle)

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
            except Exception as error:  # noqa: BLE001 - whatever it is, the guest gets an answer
                number = to_errno(error)
                self.say(f"the filesystem cannot be opened again: {error}", None if number else error)
                return [_OUT(_OUT_SIZE, -(number or errno.EIO), unique)]
            reply = session.handle(request)
            if session.ready:
                self._serve_from(session)
                if self.on_agreed is not None:
                    self.on_agreed(session.agreed)
            else:
                self._end_session()
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

    def _destroyed(self, session: Session) -> None:
        with self._begin_lock:
            if session is not self._session:  # one that had been replaced meanwhile
                return
            self._idle()
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
        """Go on with a guest whose INIT an earlier server answered.

        `agreed` comes from memory that others may write to. So the filesystem is asked by an INIT that offers just
        that, and has to agree to the same. Raises ValueError if it does not, OSError and what making a filesystem does.

        The guest goes on to use node ids and handles of before. A filesystem that numbers them as they come would give
        the same numbers to other files, and a write would go to the wrong one: it has to have `renumber(first)`, which
        makes it begin with numbers that were never given. Where nothing ever changes they mean the same again.
        """
        minor, flags, _, readahead, _ = agreed
        body = _INIT_IN.pack(abi.FUSE_KERNEL_VERSION, minor, readahead, flags & 0xFFFFFFFF, flags >> 32)
        header = _HEADER(_IN_HEADER + len(body), abi.FUSE_INIT, 0, 0, 0, 0, 0, 0)
        with self._begin_lock:
            session = self._new_session()
            try:
                session.operations.renumber(time.time_ns())  # nobody gives out a number each nanosecond
            except OSError:
                if not session.operations.immutable:
                    self._end_session()
                    raise ValueError(
                        "this filesystem does not know which files its node ids named in an earlier server"
                    ) from None
            session.handle(header + body)
            if not session.ready or session.agreed != agreed:
                found = session.agreed if session.ready else session.refused or "nothing"
                self._end_session()
                raise ValueError(f"an earlier server agreed on {agreed}, this one would on {found}")
            self._serve_from(session)

    @property
    def ready(self) -> bool:
        """True from INIT to DESTROY."""
        return self._write is not None

    def close(self) -> None:
        """End the session: the front end is gone."""
        with self._begin_lock:
            self._end_session()

    def say(self, message: str, error: BaseException | None = None) -> None:
        """Report something, once: also if it happens again in the guest's next session."""
        kind = "" if error is None else f" {type(error).__name__}"
        if message + kind in self._said or len(self._said) >= _MOST_LINES:
            return
        self._said.add(message + kind)
        if self._log is not None:
            self._log(message, error)

    def work_ahead(self) -> bool:
        """Let the filesystem use a moment in which a queue has nothing to do; False if it has no use for it."""
        operations = self._ahead
        if operations is None or not operations.idle_work or not self._ahead_lock.acquire(False):
            return False
        try:
            operations.idle()
        finally:
            self._ahead_lock.release()
        return True

    def _block(self, long: bool) -> None:
        if self.on_block is not None:
            self.on_block(long)

    # Requests

    def serve(self, chain: Chain, token: Any) -> int:
        """Serve one request and give how many bytes were written, or DEFERRED; `token` is for `on_late` then.

        What it raises is a fault of ours or of the filesystem's: `fault` gives what to do then.
        """
        readable, writable = chain.readable, chain.writable
        total = len(readable[0]) + len(readable[1]) if len(readable) == 2 else sum(map(len, readable))
        if (total < _DIRECT or (total <= _SMALL and (total - _WRITE_HEAD) % _SECTOR)) and not chain.pages_in:
            request = b"".join(readable)
            reply = self._handle(request)
        else:
            request, reply = self._serve_large(chain, total)
        if type(reply) is list:
            if chain.pages is not None and not chain.pages_in:
                _spread(chain)
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
            return self._give_file(chain, reply)
        if len(request) < _IN_HEADER:
            return 0
        opcode, unique = _OPCODE_UNIQUE(request)
        if opcode in NO_REPLY or opcode == abi.FUSE_INTERRUPT:
            return 0
        return self._wait_for(unique, token, chain)

    def fault(self, chain: Chain, error: BaseException) -> int:
        """Answer EIO to a request that made `serve` raise, and report it; give the length. Never raises."""
        self.say("a request failed", error)
        try:
            _spread(chain)
            head, _ = _split(chain.readable, _IN_HEADER)
            opcode, unique = _OPCODE_UNIQUE(head)
            return 0 if opcode in NO_REPLY else self.give(chain.writable, [_OUT(_OUT_SIZE, -errno.EIO, unique)])
        except Exception as another:  # noqa: BLE001 - the thread that serves has to live on
            self.say("a request cannot be answered", another)
            return 0

    def _serve_large(self, chain: Chain, total: int) -> tuple[bytes, Reply]:
        data: Gathered
        if chain.pages is not None and chain.pages_in:
            if total == _WRITE_HEAD:
                head, data = b"".join(chain.readable), chain.pages
            else:
                _spread(chain)
                head, data = _split(chain.readable, _WRITE_HEAD)
            total += chain.pages.nbytes if chain.pages is not None else 0
        else:
            head, data = _split(chain.readable, _WRITE_HEAD)
        if len(head) < _IN_HEADER:
            return head, None
        opcode, unique = _OPCODE_UNIQUE(head)
        write = self._write
        if opcode == abi.FUSE_WRITE and write is not None:
            reply = write(head, data)
            if self._trace is not None:
                self._trace(head, reply)
            return head, reply
        if total > _LARGEST:
            return head, None if opcode in NO_REPLY else [_OUT(_OUT_SIZE, -errno.EINVAL, unique)]
        _spread(chain)
        request = b"".join(chain.readable)
        return request, self._handle(request)

    # Replies

    def give(self, writable: list[memoryview], reply: list[Buffer]) -> int:
        """Write a reply where the guest has room for it, and tell its length; what has no room is EIO, if that has."""
        room = sum(map(len, writable))
        if sum(map(length_of, reply)) > room:
            _, _, unique = codec.OUT_HEADER.unpack_from(reply[0])
            self.say("the guest left too little room for a reply: such requests get EIO")
            reply = [_OUT(_OUT_SIZE, -errno.EIO, unique)]
            if room < _OUT_SIZE:
                return 0
        written = 0
        pieces = iter(writable)
        target = _NOWHERE
        for part in reply:
            source = memoryview(part).cast("B")
            at, end = 0, len(source)
            while at < end:
                room = len(target)
                if 0 < room <= end - at:  # pages, as a rule: filled whole
                    target[:] = source[at : at + room]
                    at += room
                    target = _NOWHERE
                elif room:
                    target[: end - at] = source[at:]
                    target = target[end - at :]
                    at = end
                else:
                    target = next(pieces)
            written += end
        return written

    def _give_file(self, chain: Chain, reply: FileReply) -> int:
        """Read a range of a file straight into the guest's memory."""
        fd, offset, size, _keep = reply.range
        writable, pages = chain.writable, chain.pages
        if pages is not None:
            if len(writable) == 1 and len(writable[0]) == _OUT_SIZE and pages.nbytes == size and not chain.pages_in:
                return self._give_pages(writable[0], pages, reply)
            _spread(chain)
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
        if writable and len(writable[0]) == _OUT_SIZE:
            writable[0][:] = header
            return _OUT_SIZE + length
        return self.give(writable, [header]) + length

    def _give_pages(self, header: memoryview, pages: Pages, reply: FileReply) -> int:
        """Read a range of a file into many pages of the guest's memory."""
        fd, offset, _, _keep = reply.range
        self._block(False)
        try:
            length = vectors.preadv(fd, pages.iovec, pages.count, offset)
        except OSError as error:
            header[:] = _OUT(_OUT_SIZE, -(error.errno or errno.EIO), reply.unique)
            return _OUT_SIZE
        header[:] = _OUT(_OUT_SIZE + length, 0, reply.unique)
        return _OUT_SIZE + length

    # Answers that come later

    def _wait_for(self, unique: int, token: Any, chain: Chain) -> int:
        with self._late_lock:
            early = self._early.get(unique)
            if early is None:
                _spread(chain)
                self._waiting.setdefault(unique, []).append((token, chain))
                return DEFERRED
            buffers = early.pop(0)
            if not early:
                del self._early[unique]
        _spread(chain)
        return self.give(chain.writable, buffers)

    def _send(self, session: Session, buffers: list[Buffer]) -> None:
        """Take what a session says on its own account. There is no queue for notifications, in Linux or here."""
        _, code, unique = codec.OUT_HEADER.unpack_from(buffers[0])
        if code > 0:
            raise OSError(errno.ENOSYS, "a guest cannot be notified")
        with self._late_lock:
            if session is not self._session:
                return
            waiting = self._waiting.get(unique)
            if waiting is None:
                self._early.setdefault(unique, []).append(buffers)
                return
            token, chain = waiting.pop(0)
            if not waiting:
                del self._waiting[unique]
        if self.on_late is not None:
            self.on_late(token, chain, buffers)

    def give_up(self, token: Any) -> None:
        """Interrupt what was deferred with this token: its queue is no more. The answers go to `on_late` all the same.

        Otherwise a guest that is reset again and again would have more and more waiting.
        """
        with self._late_lock:
            uniques = [unique for unique, found in self._waiting.items() if any(of == token for of, _ in found)]
            session = self._session
        if session is None:
            return
        for unique in uniques:
            body = codec.U64.pack(unique)
            header = _HEADER(_IN_HEADER + len(body), abi.FUSE_INTERRUPT, 0, 0, 0, 0, 0, 0)
            session.handle(header + body)


def _to_nobody(buffers: list[Buffer]) -> None:
    return


_NOWHERE = memoryview(b"")


def _spread(chain: Chain) -> None:
    """Put what is in `pages` where it belongs, piece by piece: for whatever has no short way."""
    pages, chain.pages = chain.pages, None
    if pages is not None:
        (chain.readable if chain.pages_in else chain.writable).extend(pages.views())
        chain.pages_in = False


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
