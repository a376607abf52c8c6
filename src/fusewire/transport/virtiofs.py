"""The virtio-fs device over vhost-user: maps guest memory, runs threads for every queue, wakes, and is woken.

Layer `transport`. `Share` is the `Backend` of one front end's connection: what the state machine in vhost.py decides,
it does. It serves no socket of its own and knows no sandbox.

Each queue has threads of its own, the high-priority one (index 0) too, so that no FORGET waits behind a READ. One of a
queue's threads leads: it takes requests and serves them one after the other, without a change of thread. Before
something slow (`Connection.may_block`) it lets the next one lead. Whatever changes a queue from outside ends its
threads first and starts new ones: that is rare, and needs no other lock on a request's way.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import stat
import struct
import sys
import threading
from _thread import allocate_lock, get_ident
from typing import TYPE_CHECKING

from fusewire.linux.atomics import DirtyLog
from fusewire.session import Agreed
from fusewire.transport.exchange import DEFERRED, Exchange
from fusewire.transport.guest_memory import GuestMemory, Region
from fusewire.transport.inflight import inflight_size
from fusewire.transport.ring import Queue, RingError
from fusewire.transport.vhost_wire import F_EVENT_IDX, F_INDIRECT_DESC

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Buffer
    from fusewire.transport.vhost_backend import Vring

STRONG_ORDERING = os.uname().machine in ("x86_64", "i386", "i486", "i586", "i686")
# So many small replies, or so many bytes, are shown to the driver at once; a single one is never held back.
_BATCH = 4
_LONG_REPLY = 16384
_PAGE = mmap.PAGESIZE
# What a later server has to know of the session, behind the queues' regions in the in-flight buffer.
_SAVED = struct.Struct("<8sIQIII")
_SAVED_MAGIC = b"fusewire"


def _map(fd: int, size: int, offset: int) -> memoryview:
    """Map `size` bytes of a shared file from `offset` on, and close `fd`; the mapping lives as long as its views.

    Raises OSError, ValueError: a file that is shorter would kill us with SIGBUS at the first touch.
    """
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("what is to be mapped is no file")
        if offset + size > found.st_size:
            raise ValueError(f"a mapping to byte {offset + size} of a file of {found.st_size} bytes")
        page = max(_PAGE, found.st_blksize if found.st_blksize >= 1 << 20 else _PAGE)  # hugetlbfs
        start = offset // page * page
        length = -(-(offset + size - start) // page) * page
        mapped = mmap.mmap(fd, min(length, found.st_size - start), offset=start)
        return memoryview(mapped)[offset - start : offset - start + size]
    finally:
        os.close(fd)


class _Runner:
    """One queue: its ring, its descriptors and its threads."""

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
        # Over push and publish, and over `call`, where others than the leader complete requests.
        self._done = allocate_lock()
        self._unseen = 0
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._bell = -1
        self._poll: select.epoll | None = None
        self._late: list[tuple[int, list[memoryview], list[Buffer]]] = []

    # Threads

    def run(self) -> None:
        """Start the threads, if the queue is to be served. Raises OSError."""
        if self.vring is None or not self.enabled or self._threads:
            return
        self._stopping = False
        self._poll = poll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            poll.register(self._bell, select.EPOLLIN)
            # By its edges: a kick counts once, and nobody has to read it.
            poll.register(self.kick, select.EPOLLIN | select.EPOLLET)
            for number in range(self.workers):
                thread = threading.Thread(
                    target=self._work, args=(poll,), name=f"virtiofs-{self.index}.{number}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            if not self._threads:
                self._close_bell()
                raise OSError(errno.EAGAIN, f"no thread for queue {self.index}: {error} (`ulimit -u`)") from error
        except OSError:
            self._close_bell()
            raise
        with self._done:
            late, self._late = self._late, []
            for head, writable, buffers in late:
                self.ring.push(head, self.share.exchange.give(writable, buffers))
            self._publish()

    def halt(self) -> None:
        """End the threads; each finishes what it is at."""
        if not self._threads:
            return
        self._stopping = True
        os.eventfd_write(self._bell, 1)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._close_bell()
        with self._done:
            self._publish()

    def _close_bell(self) -> None:
        os.close(self._bell)
        self._bell = -1
        if self._poll is not None:
            self._poll.close()  # not left to the collector, should an error keep the frame of a thread
            self._poll = None

    def _work(self, poll: select.epoll) -> None:
        me = get_ident()
        share, ring, lead, done = self.share, self.ring, self._lead, self._done
        pop, push, serve = ring.pop, ring.push, share.exchange.serve
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
                    if ring.sleep():
                        poll.poll()
                    ring.wake()
                    continue
                self.requests += 1
                if chain.bad:
                    share.exchange.say(f"queue {self.index}: {chain.bad}")
                    written = 0
                elif chain.readable:
                    written = serve(chain, (self, chain.head))
                    if written == DEFERRED:
                        continue
                else:
                    written = 0
                with done:
                    push(chain.head, written)
                    self._unseen += 1
                    if self._unseen >= _BATCH or written > _LONG_REPLY or self._leader != me:
                        self._publish()
        except RingError as error:
            share.say(f"queue {self.index} has stopped: {error}")
            self._stopping = True
            os.eventfd_write(self._bell, 1)
            if self.err >= 0:
                _signal(self.err)
        finally:
            del share.runners_by_thread[me]
            if self._leader == me:
                self._leader = 0
                lead.release()

    def _publish(self) -> None:
        """Show the driver what was pushed, and call it if it wants to be; under `_done`."""
        self._unseen = 0
        if self.ring.publish() and self.call >= 0:
            _signal(self.call)

    def hand_over(self, long: bool) -> None:
        """Let another thread take requests while this one, which leads, is busy for long."""
        if long and self.workers > 1 and self._leader == get_ident():
            if self._unseen:
                with self._done:
                    self._publish()
            self._leader = 0
            self._lead.release()

    def complete(self, head: int, writable: list[memoryview], buffers: list[Buffer]) -> None:
        """Answer a deferred request; while the queue stands still, it waits for the queue to run again."""
        with self._done:
            if not self._threads:
                self._late.append((head, writable, buffers))
                return
            self.ring.push(head, self.share.exchange.give(writable, buffers))
            self._publish()

    def forget_late(self) -> None:
        """Drop answers to a guest that is no more."""
        with self._done:
            self._late.clear()

    # What the front end sets up

    def start(self, vring: Vring) -> None:
        """Begin with a ring. Raises OSError, ValueError."""
        kick = vring.kick
        share = self.share
        ring = Queue(
            indirect=bool(vring.features & F_INDIRECT_DESC),
            event_idx=bool(vring.features & F_EVENT_IDX),
            log=share.log,
            strong_ordering=STRONG_ORDERING,
        )
        try:
            self._place(ring, vring)
        except BaseException:
            os.close(kick)
            raise
        self.ring, self.vring, self.kick, self.enabled = ring, vring, kick, vring.enabled
        try:
            self.run()
        except BaseException:
            self.stop()
            raise

    def _place(self, ring: Queue, vring: Vring) -> None:
        desc, avail, used = vring.desc, vring.avail, vring.used
        assert desc is not None and avail is not None and used is not None
        try:
            ring.start(
                self.share.memory, vring.size, desc, avail, used, vring.base,
                used_log=vring.log, inflight=self.share.inflight_of(self.index, vring.size),
            )  # fmt: skip
        except RingError as error:
            raise ValueError(str(error)) from error

    def stop(self) -> int:
        """Finish what is in work and let go of the ring; give its next available index."""
        self.halt()
        self.vring = None
        if self.kick >= 0:
            os.close(self.kick)
            self.kick = -1
        return self.ring.stop()

    def again(self, change: Callable[[], None]) -> None:
        """Stand still while `change` is made."""
        ran = bool(self._threads)
        self.halt()
        try:
            change()
        except (RingError, ValueError) as error:
            self.share.say(f"queue {self.index} has stopped: {error}")
            return
        if ran:
            self.run()

    def set_call(self, fd: int) -> None:
        """Call the driver by another descriptor from now on."""
        with self._done:
            old, self.call = self.call, fd
            if fd >= 0 and self._threads:
                _signal(fd)
        if old >= 0:
            os.close(old)

    def set_err(self, fd: int) -> None:
        """Tell of a broken ring by another descriptor."""
        old, self.err = self.err, fd
        if old >= 0:
            os.close(old)


def _signal(fd: int) -> None:
    try:
        os.eventfd_write(fd, 1)
    except OSError:
        return  # whatever the front end gave us there, it is not waiting for it any more


class Share:
    """One front end's device: the `Backend` that vhost.py asks for."""

    def __init__(self, exchange: Exchange, *, queues: int, workers: int, log: Callable[[str], None]) -> None:
        """Serve `queues` virtqueues, the high-priority one counted, the others with `workers` threads each."""
        if sys.byteorder != "little":
            raise OSError(errno.ENOSYS, "virtio-fs is served on little-endian machines only")
        self.exchange = exchange
        self.say = log
        self.memory = GuestMemory(())
        self.log: DirtyLog | None = None
        self._dirty: DirtyLog | None = None
        self._logging = False
        self._made_inflight = -1
        self._inflight: memoryview | None = None
        self._inflight_size = 0
        self._channel = -1
        self.runners_by_thread: dict[int, _Runner] = {}
        self._runners = [_Runner(self, index, workers if index else 1) for index in range(queues)]
        exchange.on_block = self._block
        exchange.on_late = self._late
        exchange.on_fresh = self._fresh
        exchange.on_agreed = self._keep

    @property
    def requests(self) -> int:
        """How many requests have been taken."""
        return sum(runner.requests for runner in self._runners)

    def _block(self, long: bool) -> None:
        runner = self.runners_by_thread.get(get_ident())
        if runner is not None:
            runner.hand_over(long)

    def _late(self, token: tuple[_Runner, int], writable: list[memoryview], buffers: list[Buffer]) -> None:
        runner, head = token
        runner.complete(head, writable, buffers)

    def _fresh(self) -> None:
        for runner in self._runners:
            runner.forget_late()

    # Backend: memory

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def map_region(self, fd: int, size: int, mmap_offset: int, guest_addr: int, user_addr: int) -> Region:
        return Region(guest_addr, size, user_addr, _map(fd, size, mmap_offset))

    def unmap_region(self, region: Region) -> None:
        # Nothing to do: the mapping goes with the last request that has a part of it.
        return

    def set_memory(self, regions: list[Region]) -> None:
        self.memory = memory = GuestMemory(regions)
        for runner in self._runners:
            if runner.vring is not None:
                runner.again(lambda ring=runner.ring: ring.remap(memory))  # type: ignore[misc]

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
            self.say(str(error))

    def update_queue(self, index: int, vring: Vring) -> None:
        runner = self._runners[index]

        def move() -> None:
            vring.base = runner.ring.stop()
            runner._place(runner.ring, vring)

        runner.vring = vring
        runner.again(move)

    def set_call(self, index: int, fd: int) -> None:
        self._runners[index].set_call(_wakes(fd))

    def set_err(self, index: int, fd: int) -> None:
        self._runners[index].set_err(_wakes(fd))

    # Backend: what a migration needs

    def set_log(self, fd: int, size: int, offset: int) -> None:
        view = _map(fd, size, offset) if fd >= 0 else None
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
        if fd < 0:
            self._inflight = None
            if self._made_inflight >= 0:
                os.close(self._made_inflight)
                self._made_inflight = -1
            return
        if num_queues * inflight_size(queue_size) + _SAVED.size > mmap_size:
            os.close(fd)
            raise ValueError(f"an in-flight region of {mmap_size} bytes is none of ours")
        self._inflight = _map(fd, mmap_size, mmap_offset)
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
        self.say("taking over from a server before; its open files are lost")
        self.exchange.resume(Agreed(*agreed))

    # Backend: ends

    def reset(self) -> None:
        self.exchange.close()
        self._keep(None)

    def close(self) -> None:
        """Let go of everything; the device has been disconnected, so no queue runs."""
        for runner in self._runners:
            runner.stop()
            runner.set_call(-1)
            runner.set_err(-1)
        self.exchange.close()
        self.set_backend_channel(-1)
        self.set_inflight(-1, 0, 0, 0, 0)
        self.memory = GuestMemory(())
        self.log = self._dirty = None


def _wakes(fd: int) -> int:
    """Give a descriptor that can be signalled without end; -1, and it is closed, for one that could hold us up."""
    if fd < 0:
        return fd
    mode = os.fstat(fd).st_mode
    # An eventfd has no type at all; pipes and sockets can fill up.
    if stat.S_IFMT(mode) == 0 or (stat.S_ISFIFO(mode) and not os.get_blocking(fd)):
        return fd
    os.close(fd)
    return -1
