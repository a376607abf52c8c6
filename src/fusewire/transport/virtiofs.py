"""The virtio-fs device over vhost-user: maps guest memory, runs threads for every queue, wakes, and is woken.

Layer `transport`. `Share` is the `Backend` of one front end's connection: what the state machine in vhost.py decides,
it does. It serves no socket of its own and knows no sandbox.

Each queue has threads of its own, the high-priority one (index 0) too, so that no FORGET waits behind a READ. One of a
queue's threads leads: it takes requests and serves them one after the other, without a change of thread. Before
something slow (`Connection.may_block`) it lets the next one lead. Whatever changes a queue from outside ends its
threads first and starts new ones: that is rare, and needs no other lock on a request's way.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
import threading
import time
from _thread import allocate_lock, get_ident
from typing import TYPE_CHECKING

from fusewire.linux.atomics import DirtyLog
from fusewire.linux.window import Window
from fusewire.session import Agreed
from fusewire.transport.exchange import DEFERRED, Exchange
from fusewire.transport.guest_memory import BadAddress, GuestMemory, Region
from fusewire.transport.handed import map_shared, signal, signallable
from fusewire.transport.inflight import inflight_size
from fusewire.transport.ring import Queue, RingError
from fusewire.transport.vhost_wire import F_EVENT_IDX, F_INDIRECT_DESC

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Buffer
    from fusewire.transport.ring import Chain
    from fusewire.transport.vhost_backend import Vring

STRONG_ORDERING = os.uname().machine in ("x86_64", "i386", "i486", "i586", "i686")
# A reply of so many bytes is shown to the driver at once; a few smaller ones may wait for each other
# (`Exchange.batch`). A single one is never held back.
_LONG_REPLY = 16384
# How often we look whether we are to end while a request holds us up, and after how long that is said; seconds.
_LOOK, _LONG_WAIT = 0.1, 2.0
# What a later server has to know of the session, behind the queues' regions in the in-flight buffer.
_SAVED = struct.Struct("<8sIQIII")
_SAVED_MAGIC = b"fusewire"


class Abandoned(Exception):  # noqa: N818 - an end, not a fault
    """We are to end, and a request is still at work: nothing may be done any more but to end the process.

    Its thread may go on to write to guest memory, so nobody may be told that its queue has stopped.
    """


class _Runner:
    """One queue: its ring, its descriptors and its threads.

    A request that was deferred belongs to the ring that it came from, the object: while that is the queue's, the
    answer has a place to go. A ring stopped with requests deferred is kept. If the front end starts the queue where it
    stood, as after a pause, it goes on. Otherwise the driver has begun anew, and memory of its requests is not ours.
    """

    def __init__(self, share: Share, index: int, workers: int) -> None:
        self.share = share
        self.index = index
        self.workers = workers
        self.requests = 0
        self.vring: Vring | None = None
        self.ring = Queue(indirect=False, event_idx=False)
        self.call = -1
        self.err = -1
        self.kick = -1
        self.enabled = False
        self._lead = allocate_lock()
        self._leader = 0
        # Over push and publish, over `call` and `err`, and over the change of rings.
        self._done = allocate_lock()
        self._unseen = 0
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._bell = -1
        self._poll: select.epoll | None = None
        self._late: list[tuple[Chain, list[Buffer]]] = []
        self._paused: tuple[object, ...] | None = None

    # Threads

    def run(self) -> None:
        """Start the threads, if the queue is to be served. Raises OSError."""
        poll = self._poll
        if self.vring is None or not self.enabled or self._threads or poll is None:
            return
        self._stopping = False
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass  # nobody has rung it yet
        for number in range(self.workers):
            thread = threading.Thread(
                target=self._work, args=(poll,), name=f"virtiofs-{self.index}.{number}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                why = f"no thread for queue {self.index}: {error} (`ulimit -u`)"
                if not self._threads:
                    raise OSError(errno.EAGAIN, why) from error
                self.share.exchange.say(f"{why}; {len(self._threads)} of {self.workers} serve it")
                break
            self._threads.append(thread)
        with self._done:
            late, self._late = self._late, []
            for chain, buffers in late:
                self._put(chain, buffers)
            self._publish()

    def halt(self) -> None:
        """End the threads; each finishes what it is at. Raises Abandoned."""
        if not self._threads:
            return
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        for thread in self._threads:
            self._join(thread)
        self._threads.clear()
        with self._done:
            self._publish()

    def _join(self, thread: threading.Thread) -> None:
        began, said = time.monotonic(), False
        while True:
            thread.join(_LOOK)
            if not thread.is_alive():
                return
            if self.share.ending():
                self.share.say(f"queue {self.index}: ended with a request at work, {_where(thread)}")
                raise Abandoned
            if not said and time.monotonic() - began > _LONG_WAIT:
                said = True
                self.share.say(
                    f"queue {self.index} cannot stop: a request is still at work, {_where(thread)}; "
                    "until it is done, it may write to the guest's memory"
                )

    def _open_bell(self) -> None:
        self._poll = poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        poll.register(self._bell, select.EPOLLIN)
        # By its edges: a kick counts once, and nobody has to read it.
        poll.register(self.kick, select.EPOLLIN | select.EPOLLET)

    def _close_bell(self) -> None:
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        if self._poll is not None:
            self._poll.close()  # not left to the collector, should an error keep the frame of a thread
            self._poll = None

    def _work(self, poll: select.epoll) -> None:
        me = get_ident()
        share, ring, lead, done = self.share, self.ring, self._lead, self._done
        exchange = share.exchange
        pop, push, serve = ring.pop, ring.push, exchange.serve
        token = (self, ring)
        share.runners_by_thread[me] = self
        try:
            while True:
                if self._leader != me:
                    lead.acquire()
                    self._leader = me
                chain = None
                if not self._stopping:
                    chain = pop()
                if chain is None:
                    if self._unseen:
                        with done:
                            self._publish()
                    if self._stopping:
                        return
                    if exchange.work_ahead():
                        continue
                    if ring.sleep():
                        poll.poll()
                    ring.wake()
                    continue
                self.requests += 1
                if chain.bad:
                    exchange.say(f"queue {self.index}: {chain.bad}")
                    written = 0
                elif chain.readable:
                    try:
                        written = serve(chain, token)
                    except BaseException as error:  # noqa: BLE001 - also of a handler that calls sys.exit
                        written = exchange.fault(chain, error)
                    if written == DEFERRED:
                        continue
                else:
                    written = 0
                with done:
                    push(chain.head, written)
                    self._unseen += 1
                    if self._unseen >= exchange.batch or written > _LONG_REPLY or self._leader != me:
                        self._publish()
        except RingError as error:
            self._broken(str(error), None)
        except Exception as error:  # noqa: BLE001 - no queue stops without a word
            self._broken(f"{type(error).__name__}: {error}", error)
        finally:
            del share.runners_by_thread[me]
            if self._leader == me:
                self._leader = 0
                lead.release()

    def _broken(self, why: str, error: BaseException | None) -> None:
        """Serve the queue no more, and say so, to the front end too; the others go on."""
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        self.fail(why, error)

    def fail(self, why: str, error: BaseException | None = None) -> None:
        """Tell that the queue is not served any more."""
        self.share.exchange.say(f"queue {self.index} has stopped: {why}", error)
        with self._done:
            if self.err >= 0:
                signal(self.err)

    def _publish(self) -> None:
        """Show the driver what was pushed, and call it if it wants to be; under `_done`."""
        self._unseen = 0
        if self.ring.publish() and self.call >= 0:
            signal(self.call)

    def hand_over(self, long: bool) -> None:
        """Let another thread take requests while this one, which leads, is busy for long."""
        if long and self.workers > 1 and self._leader == get_ident():
            if self._unseen:
                with self._done:
                    self._publish()
            self._leader = 0
            self._lead.release()

    def complete(self, ring: Queue, chain: Chain, buffers: list[Buffer]) -> None:
        """Answer a request that was deferred; while the queue stands still, that waits until it runs again."""
        with self._done:
            if ring is not self.ring:
                return
            if not self._threads:
                self._late.append((chain, buffers))
                return
            self._put(chain, buffers)
            self._publish()

    def _put(self, chain: Chain, buffers: list[Buffer]) -> None:
        try:
            written = self.share.exchange.give(chain.writable, buffers)
        except (ValueError, TypeError, BufferError) as error:  # what the filesystem gave as data
            written = self.share.exchange.fault(chain, error)
        self.ring.push(chain.head, written)

    # What the front end sets up

    def start(self, vring: Vring) -> None:
        """Begin with a ring. Raises OSError, ValueError."""
        self.kick, self.enabled = vring.kick, vring.enabled
        try:
            if self._paused is not None and self._paused == self._place_of(vring, vring.base):
                self._go_on()
            else:
                self._begin(vring)
            self.vring = vring
            self._open_bell()
            self.run()
        except BaseException:
            self.stop()
            raise

    def _begin(self, vring: Vring) -> None:
        share = self.share
        ring = Queue(
            indirect=bool(vring.features & F_INDIRECT_DESC),
            event_idx=bool(vring.features & F_EVENT_IDX),
            log=share.log,
            strong_ordering=STRONG_ORDERING,
        )
        self._drop()
        self._place(ring, vring)
        with self._done:
            self.ring = ring

    def _go_on(self) -> None:
        self._paused = None
        try:
            self.ring.remap(self.share.memory)
        except RingError as error:
            raise ValueError(str(error)) from error
        with self._done:
            if self.call >= 0:
                signal(self.call)  # as in set_call: what was last pushed may have called in vain

    def _drop(self) -> None:
        """Have nothing to do any more with what was deferred."""
        with self._done:
            old, self.ring = self.ring, Queue(indirect=False, event_idx=False)
            self._late.clear()
        if self._paused is not None:
            self._paused = None
            old.stop()
            self.share.exchange.give_up((self, old))

    def _place_of(self, vring: Vring, base: int) -> tuple[object, ...] | None:
        """Give what a ring has to have in common with a later one to be the same; None if that cannot be said."""
        share = self.share
        if vring.used is None:
            return None
        try:
            used = bytes(share.memory.at_user(vring.used + 2, 2))
        except BadAddress:
            return None
        kind = vring.features & (F_INDIRECT_DESC | F_EVENT_IDX)
        where = (vring.size, vring.desc, vring.avail, vring.used, base, used)
        return (*where, kind, vring.log if share.log else None, share.log is None, share.inflight_number)

    def _place(self, ring: Queue, vring: Vring, base: int | None = None) -> None:
        desc, avail, used = vring.desc, vring.avail, vring.used
        assert desc is not None and avail is not None and used is not None
        try:
            ring.start(
                self.share.memory, vring.size, desc, avail, used, vring.base if base is None else base,
                used_log=vring.log, inflight=self.share.inflight_of(self.index, vring.size),
            )  # fmt: skip
        except RingError as error:
            raise ValueError(str(error)) from error

    def stop(self) -> int:
        """Finish what is in work and let go of the ring; give its next available index. Raises Abandoned."""
        self.halt()
        vring, self.vring = self.vring, None
        self._close_bell()
        if self.kick >= 0:
            os.close(self.kick)
            self.kick = -1
        if vring is not None and self.ring.in_flight:
            self._paused = self._place_of(vring, self.ring.last_avail)
            if self._paused is not None:
                return self.ring.last_avail
        if self._paused is not None:
            return self.ring.last_avail
        return self.ring.stop()

    def close(self) -> None:
        """Let go of everything. Raises Abandoned."""
        self.stop()
        self._drop()
        self.set_call(-1)
        self.set_err(-1)

    def again(self, change: Callable[[], None]) -> None:
        """Stand still while `change` is made; if the ring or the threads do not stand that, the queue has stopped."""
        ran = bool(self._threads)
        self.halt()
        try:
            change()
            if ran:
                self.run()
        except OSError as error:
            self.fail(error.strerror or str(error))
        except (RingError, ValueError) as error:
            self.fail(str(error))

    def set_call(self, fd: int) -> None:
        """Call the driver by another descriptor from now on."""
        with self._done:
            old, self.call = self.call, fd
            if fd >= 0 and self._threads:
                signal(fd)
        if old >= 0:
            os.close(old)

    def set_err(self, fd: int) -> None:
        """Tell of a broken ring by another descriptor."""
        with self._done:
            old, self.err = self.err, fd
        if old >= 0:
            os.close(old)


def _where(thread: threading.Thread) -> str:
    """Say where a thread is: the innermost function that it is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    if frame is None:
        return "which is done by now"
    code = frame.f_code
    return f"in {code.co_name} at {os.path.basename(code.co_filename)}:{frame.f_lineno}"


class Share:
    """One front end's device: the `Backend` that vhost.py asks for."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        queues: int,
        workers: int,
        log: Callable[[str], None],
        ending: Callable[[], bool] = bool,
    ) -> None:
        """Serve `queues` virtqueues, the high-priority one counted, the others with `workers` threads each.

        `ending`: whether the process is to end, even though a request may still be at work (`Abandoned`).
        """
        if sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "virtio-fs is served on little-endian machines only")
        self.exchange = exchange
        self.say = log
        self.ending = ending
        self.memory = GuestMemory(())
        self.log: DirtyLog | None = None
        self._dirty: DirtyLog | None = None
        self._logging = False
        self._made_inflight = -1
        self._inflight: memoryview | None = None
        self._inflight_size = 0
        self.inflight_number = 0
        self._channel = -1
        self.runners_by_thread: dict[int, _Runner] = {}
        self._runners = [_Runner(self, index, workers if index else 1) for index in range(queues)]
        exchange.on_block = self._block
        exchange.on_late = self._late
        exchange.on_agreed = self._keep

    @property
    def requests(self) -> int:
        """How many requests have been taken."""
        return sum(runner.requests for runner in self._runners)

    def _block(self, long: bool) -> None:
        runner = self.runners_by_thread.get(get_ident())
        if runner is not None:
            runner.hand_over(long)

    def _late(self, token: tuple[_Runner, Queue], chain: Chain, buffers: list[Buffer]) -> None:
        runner, ring = token
        runner.complete(ring, chain, buffers)

    # Backend: memory

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def map_region(self, fd: int, size: int, mmap_offset: int, guest_addr: int, user_addr: int) -> Region:
        view = map_shared(fd, size, mmap_offset)
        return Region(guest_addr, size, user_addr, view, ctypes.addressof(ctypes.c_char.from_buffer(view)))

    def unmap_region(self, region: Region) -> None:
        # Nothing to do: the mapping goes with the last request that has a part of it.
        return

    def set_memory(self, regions: list[Region]) -> None:
        self.memory = memory = GuestMemory(regions, self._window(regions))
        for runner in self._runners:
            if runner.vring is not None:
                runner.again(lambda ring=runner.ring: ring.remap(memory))  # type: ignore[misc]

    def _window(self, regions: list[Region]) -> Window | None:
        """Make a window of all memory; where that cannot be had, long requests take longer."""
        if not regions:
            return None
        try:
            return Window((region.guest_addr, region.address, region.size) for region in regions)
        except OSError as error:
            self.exchange.say(f"requests of many pages take longer: no window of the guest's memory ({error})")
            return None

    # Backend: queues

    def start_queue(self, index: int, vring: Vring) -> None:
        self._take_over()
        self._runners[index].start(vring)

    def stop_queue(self, index: int) -> int:
        return self._runners[index].stop()

    def enable_queue(self, index: int, enabled: bool) -> None:
        runner = self._runners[index]
        runner.enabled = enabled
        if not enabled:
            runner.halt()
            return
        try:
            runner.run()
        except OSError as error:
            runner.fail(error.strerror or str(error))

    def update_queue(self, index: int, vring: Vring) -> None:
        runner = self._runners[index]

        def move() -> None:
            ring = runner.ring
            if ring.in_flight:
                raise ValueError(f"{ring.in_flight} requests wait, for a lock maybe: it cannot be moved or logged now")
            runner._place(ring, vring, ring.stop())

        runner.vring = vring
        runner.again(move)

    def set_call(self, index: int, fd: int) -> None:
        self._runners[index].set_call(signallable(fd))

    def set_err(self, index: int, fd: int) -> None:
        self._runners[index].set_err(signallable(fd))

    # Backend: what a migration needs

    def set_log(self, fd: int, size: int, offset: int) -> None:
        view = map_shared(fd, size, offset) if fd >= 0 else None
        end = max((region.guest_addr + region.size for region in self.memory.regions), default=0)
        if view is not None and size << 15 < end:
            raise ValueError(f"a dirty log of {size} bytes for memory that ends at {end:#x}")
        self._dirty = None if view is None else DirtyLog(view)
        self.set_log_enabled(self._logging)

    def set_log_enabled(self, enabled: bool) -> None:
        self._logging = enabled
        log = self._dirty if enabled else None
        if log is self.log:
            return
        self.log = log
        for runner in self._runners:
            if runner.vring is not None:
                runner.again(lambda runner=runner: runner.ring.set_log(log, runner.vring.log))  # type: ignore[misc]

    def set_backend_channel(self, fd: int) -> None:
        old, self._channel = self._channel, fd
        if old >= 0:
            os.close(old)

    # Backend: requests in flight that outlive us

    def make_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        size = num_queues * inflight_size(queue_size) + _SAVED.size
        if size > 64 << 20:
            raise ValueError(f"an in-flight region of {size} bytes")
        fd = os.memfd_create("fusewire-inflight", os.MFD_CLOEXEC)
        if self._made_inflight >= 0:
            os.close(self._made_inflight)
        self._made_inflight = fd
        os.ftruncate(fd, size)
        return fd, size, 0

    def set_inflight(self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> None:
        self.inflight_number += 1
        if fd < 0:
            self._inflight = None
            if self._made_inflight >= 0:
                os.close(self._made_inflight)
                self._made_inflight = -1
            return
        if num_queues * inflight_size(queue_size) + _SAVED.size > mmap_size:
            os.close(fd)
            raise ValueError(f"an in-flight region of {mmap_size} bytes is none of ours")
        self._inflight = map_shared(fd, mmap_size, mmap_offset)
        self._inflight_size = queue_size

    def inflight_of(self, index: int, size: int) -> memoryview | None:
        """Give a queue's part of the in-flight region; None where there is none, or it was made for smaller rings."""
        if self._inflight is None or size > self._inflight_size:
            return None
        part = inflight_size(self._inflight_size)
        if (index + 1) * part > len(self._inflight) - _SAVED.size:
            return None
        return self._inflight[index * part : (index + 1) * part]

    def _keep(self, agreed: Agreed | None) -> None:
        """Leave to the next server what it has to know."""
        if self._inflight is not None:
            saved = self._inflight[-_SAVED.size :]
            if agreed is None:
                saved[:] = bytes(_SAVED.size)
            else:
                _SAVED.pack_into(saved, 0, _SAVED_MAGIC, *agreed)

    def _take_over(self) -> None:
        """Go on with a guest that another server has left in the middle, if the in-flight region tells of one."""
        if self._inflight is None or self.exchange.ready:
            return
        magic, *agreed = _SAVED.unpack(self._inflight[-_SAVED.size :])
        if magic != _SAVED_MAGIC:
            return
        try:
            self.exchange.resume(Agreed(*agreed))
        except ValueError as error:
            self._keep(None)
            self.say(f"the guest has to mount the share again: {error}")
        else:
            self.say("taking over from a server before; its open files are lost")

    # Backend: ends

    def reset(self) -> None:
        self.exchange.close()
        self._keep(None)

    def close(self) -> None:
        """Let go of everything; the device has been disconnected, so no queue runs."""
        for runner in self._runners:
            runner.close()
        exchange = self.exchange
        exchange.close()
        exchange.on_block = exchange.on_late = exchange.on_agreed = None  # not left to the collector
        self.set_backend_channel(-1)
        self.set_inflight(-1, 0, 0, 0, 0)
        self.memory = GuestMemory(())
        self.log = self._dirty = None
