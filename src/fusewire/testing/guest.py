r"""A virtual machine without one: `FakeGuest` drives a vhost-user-fs daemon as QEMU and a guest's kernel do together.

Layer `testing`. It has the methods of `FakeKernel` and judges replies as that does, and besides what a device may do to
memory that is not its own. What it is made of is public too, for cases that no honest guest makes: `guest_frontend` for
messages, `guest_ring` for memory and queues. A daemon of any make can be tested.

    with FakeGuest.connect("/run/share.sock") as guest:
        guest.init()
        assert guest.read_file(b"hello.txt") == b"hello world\n"
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Self

from fusewire.ops import Operations
from fusewire.session import Session
from fusewire.testing.guest_frontend import FEATURES, PROTOCOL, Frontend
from fusewire.testing.guest_ring import PAGE, DriverQueue, Memory, Segment, Used, Waiter
from fusewire.testing.kernel import FakeKernel
from fusewire.testing.replies import BY_CODE, BadReply, _bounds, check_reply, request
from fusewire.wire import abi, codec
from fusewire.wire.table import layout

# What may overtake everything else goes to queue 0 (Virtio 1.2, 5.11.6.1).
_URGENT = frozenset({abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT})
_ROOM = PAGE  # for the reply to an opcode that is not in the table
_CANARY = b"\xd7\x1c"
_MARGIN = 64


class Shape(NamedTuple):
    """How a request is cut into descriptors. The default is what Linux makes of it (virtio_fs_enqueue_req).

    There are descriptors for fuse_in_header, for the arguments, for each `page` bytes of data, for fuse_out_header and
    for each `page` bytes of the reply. `plain`: one for all that the device reads and one for all that it may write
    instead. `readable` and `writable` are offsets at which these are cut besides. `every`: each so many bytes are cut.
    `gap`: so many bytes of memory, which the device may not touch, lie between any two descriptors. `at`: the
    guest-physical address, if it is not to be allocated.
    """

    page: int = PAGE
    plain: bool = False
    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    every: int = 0
    gap: int = 0
    at: int | None = None

    def sizes(self, total: int, fixed: Iterable[int], extra: Iterable[int]) -> list[int]:
        """Give the lengths of the descriptors of `total` bytes that begin with parts which end at `fixed`."""
        cuts = {0, total, *extra}
        if self.every:
            cuts |= set(range(0, total, self.every))
        if not self.plain:
            last = max(fixed)
            cuts |= {*fixed, *range(last, total, self.page)}
        points = sorted(cut for cut in cuts if 0 <= cut <= total)
        return [end - start for start, end in pairwise(points)]


LINUX = Shape()


class Placed(NamedTuple):
    """A request in guest memory: its block, the descriptors, and what of the block the device must not change."""

    gpa: int
    size: int
    segments: list[Segment]
    owned: bool
    before: bytearray

    @property
    def room(self) -> int:
        """How many bytes the device may write."""
        return sum(segment.size for segment in self.segments if segment.writable)


class Done(NamedTuple):
    """A request that the device is done with: errno (0: success), the reply's body, and the length that it wrote."""

    unique: int
    error: int
    body: bytes
    written: int


class FakeGuest(FakeKernel):
    """A guest's kernel that uses a share: one method per operation as `FakeKernel` has them. Not for several threads.

    `start` and `finish` (or `submit` and `reap`) keep many requests in flight. `queue` is the request queue that they
    go to, 1 and up; FORGET goes to queue 0. `shape` says how they are cut. With `careful`, every reply's surroundings
    in memory are looked at: a byte that changed which the device was not given to write is a BadReply.
    """

    def __init__(self, front: Frontend, *, uid: int = 0, gid: int = 0, pid: int = 1, shape: Shape = LINUX) -> None:
        """Use a front end whose queues are started, at least two of them; it is closed with the guest."""
        # The base wants a session to drive; this one is never called.
        super().__init__(Session(Operations()), uid=uid, gid=gid, pid=pid)
        self.front, self.shape = front, shape
        self.queue = 1
        self.careful = True
        self.flying: dict[tuple[int, int], tuple[int, Placed]] = {}
        self.strays: list[Used] = []
        self._thrown: list[tuple[int, int]] = []
        self._waiter: Waiter | None = None

    @classmethod
    def connect(
        cls,
        where: str | socket.socket,
        *,
        queues: int = 1,
        size: int = 128,
        memory: Memory | None = None,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        acknowledge: bool = True,
        order: str = "qemu",
        timeout: float = 10.0,
        shape: Shape = LINUX,
    ) -> Self:
        """Connect, negotiate, and start the high-priority queue and `queues` request queues of `size` descriptors."""
        front = Frontend(
            where,
            memory=memory,
            features=features,
            protocol=protocol,
            acknowledge=acknowledge,
            order=order,
            timeout=timeout,
        )
        try:
            front.negotiate()
            front.start(front.make_queues(1 + queues, size))
        except BaseException:
            front.close()
            raise
        return cls(front, shape=shape)

    @property
    def memory(self) -> Memory:
        """The guest's memory."""
        return self.front.memory

    # Requests in flight

    def place(self, sent: bytes, room: int | None, shape: Shape | None = None) -> Placed:
        """Put a request into memory, with `room` bytes for the whole reply; None: no descriptor to write to."""
        shape = shape or self.shape
        opcode = codec.IN_HEADER.unpack_from(sent)[1] if len(sent) >= 40 else 0
        op = BY_CODE.get(opcode)
        # Where data begins: what comes before is one argument, up to a page of it (a name, a struct).
        data = len(sent) if opcode != abi.FUSE_WRITE else 40 + layout(op.args).size if op is not None else 40
        sizes = [(size, False) for size in shape.sizes(len(sent), (40, data), shape.readable)]
        if room is not None:
            sizes += [(size, True) for size in shape.sizes(room, (16,), shape.writable)]
        total = sum(size + shape.gap for size, _ in sizes)
        gpa = shape.at
        if gpa is None:
            gpa = self.memory.alloc(total + 2 * _MARGIN) + _MARGIN
        segments = []
        block = bytearray(_CANARY * (total // 2 + _MARGIN + 1))[: total + 2 * _MARGIN]
        position, taken = _MARGIN, 0
        for size, writable in sizes:
            segments.append(Segment(gpa + position - _MARGIN, size, writable))
            if not writable:
                block[position : position + size] = sent[taken : taken + size]
                taken += size
            position += size + shape.gap
        self.memory.write(gpa - _MARGIN, block)
        return Placed(gpa - _MARGIN, len(block), segments, shape.at is None, block)

    def take(self, placed: Placed, written: int) -> bytes:
        """Give what the device wrote to a request. Raises BadReply if it wrote more, or elsewhere in the block."""
        if written > placed.room:
            raise BadReply(f"the device says that it wrote {written} bytes into {placed.room}")
        parts, left = [], written
        position = placed.gpa
        for gpa, size, writable in (*placed.segments, Segment(placed.gpa + placed.size, 0, True)):
            if not writable:
                continue
            if left > 0:
                parts.append(self.memory.read(gpa, min(size, left)))
                left -= size
            if self.careful:
                before = placed.before[position - placed.gpa : gpa - placed.gpa]
                if self.memory.read(position, len(before)) != before:
                    raise BadReply(f"the device changed what it may not write to, from {position:#x} to {gpa:#x}")
            position = gpa + size
        return b"".join(parts)

    def submit(
        self,
        opcode: int,
        nodeid: int,
        body: bytes = b"",
        *,
        unique: int = 0,
        extlen: int = 0,
        room: int | None = -1,
        queue: int | None = None,
        shape: Shape | None = None,
        kick: bool = True,
    ) -> int:
        """Queue a request and give its `unique`. `room` is for the reply's body, by default as much as there may be.

        `kick=False`: the device need not see it before a later one is kicked.
        """
        self._unique += 2
        unique = unique or self._unique
        sent = request(opcode, nodeid, body, unique=unique, uid=self.uid, gid=self.gid, pid=self.pid, extlen=extlen)
        self.submit_raw(sent, room=self.room_of(sent) if room == -1 else room, queue=queue, shape=shape, kick=kick)
        self._waiting[unique] = sent
        return unique

    def submit_raw(
        self,
        sent: bytes,
        *,
        room: int | None = 0,
        queue: int | None = None,
        shape: Shape | None = None,
        kick: bool = True,
    ) -> Placed:
        """Queue any bytes as a request, to be reaped as the one whose `unique` they have (bytes 8 to 16)."""
        opcode = int.from_bytes(sent[4:8], "little")
        ring = self.front.queues[queue if queue is not None else 0 if opcode in _URGENT else self.queue]
        placed = self.place(sent, None if room is None else 16 + room, shape)
        try:
            head = ring.add(placed.segments)
        except BaseException:
            self._free(placed)
            raise
        self.flying[ring.index, head] = int.from_bytes(sent[8:16], "little"), placed
        if kick:
            ring.kick()
        return placed

    def throw(self, head: int, *, queue: int = 1, times: int = 1) -> None:
        """Make any head available, whatever its descriptors say, and kick. If the device uses it, `strays` has it."""
        ring = self.front.queues[queue]
        for _ in range(times):
            self._thrown.append((queue, head))
            ring.push(head)
        ring.kick(force=True)

    def room_of(self, sent: bytes) -> int | None:
        """Give how long the body of the reply to a request may be; None: there is no reply."""
        op = BY_CODE.get(codec.IN_HEADER.unpack_from(sent)[1])
        if op is None:
            return _ROOM
        if op.name == "interrupt":  # the answer is optional
            return 0
        return _bounds(op, sent)[1] if op.reply else None

    def reap_raw(self, queues: Sequence[DriverQueue] | None = None, timeout: float | None = None) -> tuple[int, bytes]:
        """Wait for any used chain and give its request's `unique` and the bytes written. Raises Stuck, Closed, Broken.

        BadReply: the device used what it was not given, or wrote elsewhere.
        """
        timeout = self.front.timeout if timeout is None else timeout
        if queues is None:
            self._waiter = waiter = self._waiter or self.front.waiter()
        else:
            waiter = self.front.waiter(queues)
        while True:
            ring = waiter.wait(timeout)
            used = ring.pop()
            assert used is not None
            found = self.flying.pop((ring.index, used.head), None)
            if found is not None:
                break
            if (ring.index, used.head) not in self._thrown:
                raise BadReply(f"the device used head {used.head} of queue {ring.index}, which is not in flight")
            self._thrown.remove((ring.index, used.head))
            self.strays.append(used)
        unique, placed = found
        ring.release(used.head)
        try:
            return unique, self.take(placed, used.written)
        finally:
            self._free(placed)

    def reap(self, queues: Sequence[DriverQueue] | None = None, timeout: float | None = None) -> Done:
        """Wait for any request that was submitted, and give it judged (`check_reply`)."""
        unique, message = self.reap_raw(queues, timeout)
        sent = self._waiting.pop(unique)
        error, body = check_reply(sent, [message] if message else None)
        return Done(unique, error, body, len(message))

    def _free(self, placed: Placed) -> None:
        if placed.owned:
            self.memory.free(placed.gpa, placed.size)

    # As FakeKernel

    def start(self, opcode: int, nodeid: int, body: bytes = b"", *, extlen: int = 0, unique: int = 0) -> int:
        """Send a request and give its `unique`; `finish` waits for the answer."""
        return self.submit(opcode, nodeid, body, extlen=extlen, unique=unique)

    def answered(self, unique: int) -> bool:
        """Tell whether the answer to a started request is there."""
        while any(queue.used != queue.seen for queue in self.front.queues):
            self._collect(0.0)
        return unique in self._late

    def _collect(self, timeout: float | None) -> None:
        unique, message = self.reap_raw(timeout=timeout)
        self._late[unique] = [message] if message else None

    def finish(self, unique: int, timeout: float | None = None) -> bytes:
        """Give the body of the answer to a started request. Raises OSError if it is an error, Stuck, Closed."""
        timeout = self.front.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while unique not in self._late:
            self._collect(max(0.0, deadline - time.monotonic()))
        return super().finish(unique, 0.0)

    def request(
        self, sent: bytes, *, room: int | None = _ROOM, queue: int | None = None, shape: Shape | None = None
    ) -> Done:
        """Send any bytes and give the answer as it is: not judged but by its header. Nothing else may be in flight.

        `error` of an answer that was empty is ENOMSG. `room` for the answer's body; None: nothing to write to.
        """
        self.submit_raw(sent, room=room, queue=queue, shape=shape)
        unique, message = self.reap_raw()
        if not message:
            return Done(unique, errno.ENOMSG, b"", 0)
        if len(message) < 16:
            raise BadReply(f"a reply of {len(message)} bytes has no header")
        length, error, answered = codec.OUT_HEADER.unpack_from(message)
        if length != len(message):
            raise BadReply(f"the header says {length} bytes, the used ring {len(message)}")
        return Done(answered, -error, message[16:], len(message))

    # Life

    def restart(self) -> None:
        """Know of no node, no handle and no request any more, as a kernel that boots. `init` comes next."""
        for _, placed in self.flying.values():
            self._free(placed)
        self.flying.clear()
        self._thrown.clear()
        self._waiting.clear()
        self._late.clear()
        self.lookups.clear()
        self.agreed = None

    def reboot(self) -> None:
        """Reset the guest: it knows of no node and no handle any more, and has to `init` again."""
        self.front.reboot()
        self.restart()

    def pause(self) -> None:
        """Stop all queues as QEMU does for `stop`, with whatever is in flight."""
        self.front.stop()

    def resume(self) -> None:
        """Go on after `pause`."""
        self.front.start(self.front.queues, memory=False)
        for queue in self.front.queues:
            os.eventfd_write(queue.kick_fd, 1)

    def reconnect(self, where: str | socket.socket | None = None) -> None:
        """Connect again to a daemon; the guest notices nothing: what was in flight is answered by that one."""
        self._waiter = None
        self.front.reconnect(where)

    def batch(self, sent: Iterable[bytes]) -> list[Done]:
        """Queue requests, notify once, and give the answers in the order of the requests."""
        order = []
        queue = self.front.queues[self.queue]
        for message in sent:
            unique = codec.IN_HEADER.unpack_from(message)[2]
            self.submit_raw(message, room=self.room_of(message), queue=self.queue, kick=False)
            self._waiting[unique] = message
            order.append(unique)
        queue.kick()
        found = {done.unique: done for done in (self.reap([queue]) for _ in order)}
        return [found[unique] for unique in order]

    def check(self) -> None:
        """Raise AssertionError if a byte next to a region of memory was written."""
        self.memory.check()

    def close(self) -> None:
        """Close everything, as a virtual machine that is switched off. Guard pages are looked at by `check`."""
        self.front.close()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self.close()
