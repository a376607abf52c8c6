"""The /dev/fuse transport: reads whole requests, hands them to the session, writes whole replies.

Layer `transport`. One `Channel` owns one /dev/fuse fd; any number of threads may call `serve` on it, each with a
buffer of its own. It mounts nothing and unmounts nothing.
"""

from __future__ import annotations

import errno
import os
import select
from _thread import allocate_lock, get_ident, start_new_thread
from io import FileIO
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fusewire.adapters import FileReply
from fusewire.session import Session
from fusewire.wire import abi, codec
from fusewire.wire.table import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Buffer

# read(2) on /dev/fuse, fuse_dev_do_read: ENOENT the request was interrupted before it could be read; EINTR and EAGAIN
# as everywhere. ENODEV: unmounted. ECONNABORTED: aborted (ABORT_ERROR was agreed). EBADF: closed by us.
TRY_AGAIN = frozenset({errno.ENOENT, errno.EINTR, errno.EAGAIN})
ENDED = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})
# write(2), fuse_dev_do_write: ENOENT says that nobody waits for this reply any more.
_NOBODY_WAITS = errno.ENOENT

_BACKING_MAP = layout("fuse_backing_map").pack

# A wait below this (seconds) could have been spent looking; a look takes about a microsecond.
_SHORT_WAIT = 0.0001
_MOST_TRIES = 64
# Up to so many bytes of a file are read without looking whether another worker could be at work meanwhile.
_LITTLE = 256 << 10
_CAN_SPIN = len(os.sched_getaffinity(0)) > 1


class Channel:
    """One connection to the kernel. Owns `fd`; -1 once closed."""

    def __init__(self, fd: int, session: Session, *, clone_fd: bool = False, devices: list[int] | None = None) -> None:
        """Take over `fd`, a /dev/fuse descriptor that has been mounted or is about to be.

        devices: others that nothing is mounted with, for clones; None: they are opened when they are needed.
        """
        self.fd = fd
        self._devices = devices
        self.session = session
        self.clone_fd = clone_fd
        self.ended = False
        self._counts: list[list[int]] = []
        self._lock = (
            allocate_lock()
        )  # over fd, _clones, _serving and _stale where they change, and where a clone is borrowed
        self._clones: list[int] = []
        self._serving = 0
        self._stale = -1
        # Held by the worker that reads requests, where the filesystem announces what is slow; `_leader` is its thread.
        self._lead = allocate_lock()
        self._leader = 0
        self._leading: list[int] = [0]  # the leader's count of requests
        self._asleep = False  # the leader waits for a request
        self._watched = False
        self._bell = allocate_lock()  # wakes the thread that watches the leader
        self._parked = False
        self._spin = 0
        self._nowait = hasattr(os, "RWF_NOWAIT")
        self._slow = False
        self._waiting = select.poll()
        self._waiting.register(fd, select.POLLIN)
        if session.operations.announces_blocking:
            session.on_block = self._hand_over
        session.on_backing_open = self._backing_open
        session.on_backing_close = self._backing_close
        session.page_size = os.sysconf("SC_PAGE_SIZE")
        session.send = self.send

    @property
    def requests(self) -> int:
        """How many requests have been read."""
        return sum(count[0] for count in self._counts)

    def send(self, buffers: list[Buffer]) -> None:
        """Write one message: a late reply, or a notification. Raises OSError as the kernel gives it to a notification.

        A late reply never fails: nobody waits for it any more, or the kernel refuses it and its caller gets EIO.
        """
        unique = codec.OUT_HEADER.unpack_from(buffers[0])[2]
        if not unique:
            os.writev(self.fd, buffers)
            return
        # Only the descriptor that a request was read from takes its answer; to the others it is unknown (ENOENT).
        with self._lock:
            for fd in (self.fd, *self._clones):
                try:
                    os.writev(fd, buffers)
                except OSError as error:
                    if error.errno == _NOBODY_WAITS or error.errno in ENDED:
                        continue
                    self._refused(fd, unique, error)
                return

    def serve(self, trace: Callable[[Any, Any], None] | None = None) -> None:
        """Serve requests on this thread until the connection ends: unmounted, aborted, or closed.

        Raises OSError for what the device should never say (EIO, EFAULT, ...).
        """
        fd = shared = self._enter()
        if fd < 0:
            return
        count = [0]
        self._counts.append(count)
        # The kernel refuses a buffer smaller than max(8192, header + write_in + max_write) with EINVAL.
        buffer = bytearray(max(abi.FUSE_MIN_READ_BUFFER, self.session.max_write + 4096))
        view = memoryview(buffer)
        room = bytearray()  # for the data of files, once there is any
        handle, write, writev = self.session.handle, os.write, os.writev
        try:
            if self.clone_fd and len(self._counts) > 1:
                fd = self._clone()
            if not self.session.ready and not self._handshake(fd, buffer, trace):
                return
            # FileIO.readinto and write(2) instead of readv and writev where one buffer will do: 0.3 us less each.
            receive = FileIO(fd, "r", closefd=False).readinto
            operations = self.session.operations
            in_turn, me = self.session.on_block is not None, get_ident()
            tries = 0
            if in_turn:
                os.set_blocking(fd, False)
                self._start_watching()
            while True:
                if in_turn and self._leader != me:
                    self._lead.acquire()
                    self._leader = me
                    self._leading = count
                try:
                    length = receive(buffer)
                except OSError as error:
                    if error.errno in TRY_AGAIN:
                        continue
                    if error.errno in ENDED:
                        return
                    raise
                if length is None:  # EAGAIN: only a leader's descriptor does not block
                    if tries > 0:
                        tries -= 1
                    else:
                        self._wait()
                    continue
                tries = self._spin
                count[0] += 1
                try:
                    reply = handle(view[:length])
                    if trace is not None:
                        trace(view[:length], reply)
                except BaseException:
                    # Not an Exception of a handler, those are answered: this thread ends, but its caller must not wait.
                    self._refused(fd, codec.IN_HEADER.unpack_from(view)[2], OSError(errno.EIO, "the worker ended"))
                    raise
                if reply is None:
                    continue
                try:
                    if type(reply) is list:
                        if len(reply) == 1:
                            write(fd, reply[0])
                        else:
                            writev(fd, reply)
                    elif type(reply) is FileReply:
                        if len(room) < 16 + reply.range.size:
                            room = bytearray(16 + reply.range.size)
                        self._write_file(fd, reply, room)
                        reply = None  # it may hold the last reference to a descriptor
                    if operations.idle_work and self._leader == me and not self._more():
                        operations.idle()
                except OSError as error:
                    if error.errno == _NOBODY_WAITS:
                        continue
                    if error.errno in ENDED:
                        return
                    self._refused(fd, codec.IN_HEADER.unpack_from(view)[2], error)
        finally:
            self._release(get_ident())
            self._leave(fd if fd != shared else -1)

    def _wait(self) -> None:
        """Sleep until there is something to read, and decide how often to look again before the next sleep.

        A request that comes within microseconds finds this thread awake if it goes on looking; put to sleep, it would
        cost both sides a wake-up, on virtual machines more than all the rest. As the kernel's halt polling does, look
        on where waits have been short, twice as long each time, and stop at once where one was not.
        """
        before = perf_counter()
        self._asleep = True
        try:
            self._waiting.poll()
        except RuntimeError:
            return  # another worker waits there: it has taken the lead from this one
        finally:
            self._asleep = False
        waited = perf_counter() - before
        if self._parked:
            self._ring()
        if waited < _SHORT_WAIT and _CAN_SPIN:
            self._spin = min(max(2 * self._spin, 4), _MOST_TRIES)
        elif waited > 10 * _SHORT_WAIT:
            self._spin = 0

    def _hand_over(self, long: bool) -> None:
        """Let another worker read, if this one does and there is something to read, or it will be away for long."""
        me = get_ident()
        if self._leader == me and (long or self._more()):
            self._release(me)

    def _more(self) -> bool:
        """Tell whether there is a request to be read."""
        try:
            return bool(self._waiting.poll(0))
        except RuntimeError:
            return False  # another worker waits there: it has taken the lead from this one

    def _release(self, leader: int) -> None:
        """Let somebody else lead, if `leader` still does."""
        with self._lock:
            if self._leader != leader:
                return
            self._leader = 0
        self._lead.release()

    def _ring(self) -> None:
        """Wake the thread that watches."""
        with self._lock:
            self._parked = False
            if self._bell.locked():
                self._bell.release()

    def _watch(self) -> None:
        """Take the lead away from a worker that has been in one request for long, unannounced: a slow disk, NFS.

        Looks every 20 ms while there are requests, and sleeps too once the leader has done so for a second.
        """
        seen, last, quiet = 0, -1, 0
        self._bell.acquire()
        while not self.ended:
            if self._asleep:
                quiet += 1
                if quiet > 50:
                    self._parked = True
                    if self._asleep:  # else it may have woken up before it could see that we are parked
                        self._bell.acquire()
                    self._parked = False
                    quiet = 0
            else:
                quiet = 0
                leader, done = self._leader, self._leading[0]
                if leader and leader == seen and done == last and not self._asleep:
                    self._release(leader)
                seen, last = leader, done
            self._bell.acquire(timeout=0.02)

    def _start_watching(self) -> None:
        with self._lock:
            if self._watched or len(self._counts) < 2:
                return
            self._watched = True
        try:
            start_new_thread(self._watch, ())
        except RuntimeError:
            pass  # the system allows no more threads (RLIMIT_NPROC)

    def _enter(self) -> int:
        with self._lock:
            if self.fd >= 0:
                self._serving += 1
            return self.fd

    def _leave(self, clone: int) -> None:
        with self._lock:
            self.ended = True
            if self._watched and self._bell.locked():
                self._bell.release()  # the watching thread sees the end
            if clone >= 0:
                self._clones.remove(clone)
                os.close(clone)
            self._serving -= 1
            if self._serving == 0 and self._stale >= 0:
                os.close(self._stale)
                self._stale = -1

    def _handshake(self, fd: int, buffer: bytearray, trace: Callable[[Any, Any], None] | None) -> bool:
        """Serve INIT and say so through `on_ready` once its answer is with the kernel; False if there is no INIT."""
        session = self.session
        while not session.ready:
            try:
                length = os.readv(fd, [buffer])
            except OSError as error:
                if error.errno in TRY_AGAIN:
                    continue
                if error.errno in ENDED:
                    return False
                raise
            request = memoryview(buffer)[:length]
            reply = session.handle(request)
            if trace is not None:
                trace(request, reply)
            if isinstance(reply, list):
                os.writev(fd, reply)
            if session.refused:
                raise OSError(errno.EPROTO, session.refused)
        if session.on_ready is not None:
            session.on_ready()
        return True

    def _refused(self, fd: int, unique: int, error: OSError) -> None:
        """Answer EIO when the kernel would not take a reply: the caller must not wait for ever."""
        self.session.bad_replies += 1
        self.session.log_once("the kernel refused a reply", error)
        try:
            os.writev(fd, [codec.OUT_HEADER.pack(16, -errno.EIO, unique)])
        except OSError as again:
            if again.errno != _NOBODY_WAITS and again.errno not in ENDED:
                raise

    def _write_file(self, fd: int, reply: FileReply, room: bytearray) -> None:
        """Answer with a range of a file, read into `room` behind the header: one copy in, one write out."""
        number, offset, size, _keep = reply.range
        view = memoryview(room)
        target = view[16 : 16 + size]
        try:
            if self._leader != get_ident():
                length = os.preadv(number, [target], offset)
            elif size > _LITTLE:
                self._hand_over(False)
                length = os.preadv(number, [target], offset)
            elif not self._nowait:
                length = self._read_unsure(number, target, offset)
            else:
                length = self._read_little(number, target, offset)
        except OSError as error:
            os.writev(fd, [codec.OUT_HEADER.pack(16, -(error.errno or errno.EIO), reply.unique)])
            return
        codec.OUT_HEADER.pack_into(room, 0, 16 + length, 0, reply.unique)
        os.write(fd, view[: 16 + length])

    def _read_little(self, number: int, target: memoryview, offset: int) -> int:
        """Read a little as the leader: at once if it is in the page cache, else let another worker lead meanwhile."""
        size = len(target)
        try:
            length = os.preadv(number, [target], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            length = 0
            self._hand_over(True)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._nowait = False  # a filesystem that cannot tell
            return self._read_unsure(number, target, offset)
        if length < size:  # the end of the file, or of what was in the cache
            length += os.preadv(number, [target[length:]], offset + length)
        return length

    def _read_unsure(self, number: int, target: memoryview, offset: int) -> int:
        """Read a little from where nobody can tell how long it takes: as the last time, is the best guess."""
        if self._slow:
            self._hand_over(True)
        before = perf_counter()
        length = os.preadv(number, [target], offset)
        self._slow = perf_counter() - before > _SHORT_WAIT
        return length

    def _clone(self) -> int:
        """Open a second descriptor of the same connection, FUSE_DEV_IOC_CLONE: its own queue of requests in work."""
        import fcntl

        if self._devices is None:
            clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        else:
            with self._lock:
                if not self._devices:
                    return self.fd
                clone = self._devices.pop()
        try:
            fcntl.ioctl(clone, abi.FUSE_DEV_IOC_CLONE, self.fd.to_bytes(4, "little"))
        except OSError:
            os.close(clone)
            raise
        with self._lock:
            self._clones.append(clone)
        return clone

    def _backing_open(self, fd: int) -> int:
        import fcntl

        # A bytearray: with bytes, ioctl() would return those and not the id.
        backing: int = fcntl.ioctl(self.fd, abi.FUSE_DEV_IOC_BACKING_OPEN, bytearray(_BACKING_MAP(fd, 0)))
        return backing

    def _backing_close(self, backing_id: int) -> None:
        import fcntl

        try:
            fcntl.ioctl(self.fd, abi.FUSE_DEV_IOC_BACKING_CLOSE, codec.U32.pack(backing_id))
        except OSError as error:
            if error.errno not in ENDED and error.errno != errno.ENOENT:
                raise

    def close(self) -> None:
        """Close the descriptor. The last one of a connection ends it: whoever waits gets ENOTCONN.

        close(2) does not wake a thread that sits in read(2), which holds the connection: unmount or abort first where
        workers still serve. Until they have left, the descriptor's number stays taken by something that cannot be
        read, so that none of them ever reads a file that was opened meanwhile.
        """
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd < 0:
                return
            if self._serving == 0:
                os.close(fd)
                return
            self._stale = fd
            null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(null, fd, inheritable=False)
            finally:
                os.close(null)
