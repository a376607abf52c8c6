"""Guest memory and the driver's half of a split virtqueue, as a guest's kernel has them: what `FakeGuest` is made of.

Layer `testing`. It shares no code with the transport that it judges, and knows nothing of FUSE or of messages: memory
is a memfd, notifications are eventfds. Everything that an honest driver does has a method, and below each lies a raw
one (`write_desc`, `push`, `set_avail`) for what no honest driver does.

Ordering. Ring indices are loaded and stored as native 16-bit words, never byte by byte. On x86 the only reordering that
a driver has to forbid is of a store before a later load (the index that it publishes, the notification that it then
decides on): `_fence`, a lock taken and dropped, is an atomic instruction and so a full barrier there. On other machines
a lock does not promise that much: there the driver always kicks, and looks again every few milliseconds.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from _thread import allocate_lock
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import socket

PAGE = 4096
# Descriptor flags (Virtio 1.2, 2.7.5), and the flags of the rings (2.7.6, 2.7.8).
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
DESCRIPTOR = struct.Struct("<QIHH")

# Guest-physical and user addresses lie far apart, in different orders: who takes one for the other finds nothing.
_HIGH_GPA = 1 << 32
_USER = 0x7E00_0000_0000
_CANARY = b"\xc5GUARD\xa3\n" * (PAGE // 8)
_STRONG = os.uname().machine in ("x86_64", "i686", "i386")
_LOOK = 5  # milliseconds


class Stuck(TimeoutError):  # noqa: N818 - a state of the daemon
    """The daemon did not answer in time."""


class Closed(ConnectionError):  # noqa: N818 - a state of the daemon
    """The daemon closed the connection."""


class Broken(ConnectionError):  # noqa: N818 - a state of the daemon
    """The daemon gave a ring up, and said so on its error eventfd."""


class Region:
    """A piece of guest memory: `size` bytes at guest-physical `gpa`, user address `user`, in `fd` at `offset`."""

    __slots__ = ("_guarded", "_map", "fd", "gpa", "offset", "size", "user", "view")

    def __init__(self, fd: int, offset: int, gpa: int, user: int, size: int) -> None:
        """Map the region and its guard pages; `fd` has room for a page before `offset` and one behind the end."""
        self.fd, self.offset, self.gpa, self.user, self.size = fd, offset, gpa, user, size
        self._map = mmap.mmap(fd, size + 2 * PAGE, offset=offset - PAGE)
        self._guarded = memoryview(self._map)
        self._guarded[:PAGE] = self._guarded[PAGE + size :] = _CANARY
        self.view = self._guarded[PAGE : PAGE + size]

    def intact(self) -> bool:
        """Tell whether the guard pages are as they were."""
        return bytes(self._guarded[:PAGE]) == bytes(self._guarded[PAGE + self.size :]) == _CANARY

    def close(self) -> None:
        """Unmap, unless a slice of the memory is still in use: then that happens with the last slice."""
        self.view.release()
        self._guarded.release()
        try:
            self._map.close()
        except BufferError:
            pass


class Memory:
    """Guest memory: a memfd of which each region is a part between two guard pages."""

    def __init__(self, size: int = 32 << 20, regions: int = 1, *, adjacent: bool = False) -> None:
        """Make `regions` of equal size that sum up to `size` bytes, the first at address 0 as a real guest's is.

        `adjacent`: with no gap between them in guest-physical addresses, so that a buffer may reach over a border.
        """
        self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        self.regions: list[Region] = []
        self._unplugged: list[Region] = []
        self._end = PAGE  # in the file; the first region lies at no round offset
        self._next: dict[int, int] = {}
        self._free: dict[int, list[int]] = {}
        self._turn = 0
        part = size // regions // PAGE * PAGE
        for number in range(regions):
            self.plug(part, number * part if adjacent else None)

    def plug(self, size: int, gpa: int | None = None) -> Region:
        """Add a region. The daemon learns of it by ADD_MEM_REG or the next SET_MEM_TABLE."""
        number = len(self.regions) + len(self._unplugged)
        if gpa is None:
            gpa = number * (_HIGH_GPA + 16 * PAGE)
        offset = self._end + PAGE
        self._end = offset + size + 2 * PAGE
        os.ftruncate(self.fd, self._end)
        region = Region(self.fd, offset, gpa, _USER - number * (_HIGH_GPA * 4), size)
        self.regions.append(region)
        self._next[gpa] = gpa
        return region

    def unplug(self, region: Region) -> None:
        """Take a region out: nothing is allocated there any more. What lies there stays readable through `region`."""
        self.regions.remove(region)
        self._unplugged.append(region)
        for addresses in self._free.values():
            addresses[:] = [a for a in addresses if not region.gpa <= a < region.gpa + region.size]

    def alloc(self, size: int) -> int:
        """Give the guest-physical address of `size` bytes in whole pages, each time in another region."""
        size = -(-size // PAGE) * PAGE
        if self._free.get(size):
            return self._free[size].pop()
        for _ in self.regions:
            region = self.regions[self._turn % len(self.regions)]
            self._turn += 1
            at = self._next[region.gpa]
            if at + size <= region.gpa + region.size:
                self._next[region.gpa] = at + size
                return at
        raise MemoryError(f"guest memory has no room for {size} bytes: make Memory larger")

    def free(self, gpa: int, size: int) -> None:
        """Give back what `alloc` gave."""
        if not any(region.gpa <= gpa < region.gpa + region.size for region in self.regions):
            return  # it has been unplugged meanwhile
        self._free.setdefault(-(-size // PAGE) * PAGE, []).append(gpa)

    def region(self, gpa: int, size: int = 1) -> Region:
        """Give the region that holds a range. Raises ValueError if none does."""
        for region in self.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                return region
        raise ValueError(f"no region of guest memory holds {gpa:#x} to {gpa + size:#x}")

    def at(self, gpa: int, size: int) -> memoryview:
        """Give the memory of a range within one region."""
        region = self.region(gpa, size)
        return region.view[gpa - region.gpa : gpa - region.gpa + size]

    def read(self, gpa: int, size: int) -> bytes:
        """Copy a range out; it may reach over adjacent regions."""
        parts = []
        while size:
            region = self.region(gpa)
            length = min(size, region.gpa + region.size - gpa)
            parts.append(bytes(region.view[gpa - region.gpa : gpa - region.gpa + length]))
            gpa, size = gpa + length, size - length
        return b"".join(parts)

    def write(self, gpa: int, data: bytes | bytearray) -> None:
        """Copy a range in; it may reach over adjacent regions."""
        rest = memoryview(data)
        while rest:
            region = self.region(gpa)
            length = min(len(rest), region.gpa + region.size - gpa)
            region.view[gpa - region.gpa : gpa - region.gpa + length] = rest[:length]
            gpa, rest = gpa + length, rest[length:]

    def user(self, gpa: int) -> int:
        """Give the front end's user address of a guest-physical one."""
        region = self.region(gpa)
        return gpa - region.gpa + region.user

    def check(self) -> None:
        """Raise AssertionError if a byte next to a region was written."""
        for region in self.regions + self._unplugged:
            assert region.intact(), f"the daemon wrote outside the region at {region.gpa:#x}"

    def close(self) -> None:
        """Let go of the memory."""
        for region in self.regions + self._unplugged:
            region.close()
        self.regions.clear()
        self._unplugged.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self.close()


class Segment(NamedTuple):
    """What one descriptor describes: guest-physical address, length, whether the device may write there."""

    gpa: int
    size: int
    writable: bool


class Used(NamedTuple):
    """A used element: the chain's head and the bytes that the device says it wrote."""

    head: int
    written: int


class _Held(NamedTuple):
    slots: list[int]
    table: int
    table_size: int


_NOTHING = _Held([], 0, 0)


class DriverQueue:
    """The driver's half of a split virtqueue (Virtio 1.2, 2.7), with its three eventfds. Not for several threads."""

    def __init__(
        self, memory: Memory, index: int, size: int = 128, *, indirect: bool = True, event_idx: bool = True
    ) -> None:
        """Lay the rings out in `memory`. `index` is the queue's number for vhost-user: 0 is the high-priority one."""
        self.memory, self.index, self.size = memory, index, size
        self.indirect, self.event_idx = indirect, event_idx
        self.base = 0  # where the device begins, for SET_VRING_BASE
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        # Sizes of the three parts: 2.7, "Split Virtqueues".
        desc, avail, used = 16 * size, 6 + 2 * size, 6 + 8 * size
        self.desc_gpa, self.avail_gpa, self.used_gpa = (memory.alloc(n) for n in (desc, avail, used))
        self._sizes = (desc, avail, used)
        self._desc = memory.at(self.desc_gpa, desc)
        self._avail = memory.at(self.avail_gpa, avail).cast("H")
        raw = memory.at(self.used_gpa, used)
        self._used, self._ring = raw[:4].cast("H"), raw[4 : 4 + 8 * size].cast("I")
        self._avail_event = raw[4 + 8 * size :].cast("H")
        self._lock = allocate_lock()
        self._held: dict[int, _Held] = {}
        self.reset()

    def reset(self, index: int = 0) -> None:
        """Empty the rings, as a driver that is loaded anew does; the device has to be stopped.

        `index`: where all indices begin, as after so many requests of earlier times.
        """
        self.base = self.avail = self.seen = index
        self.kicks = self.calls = 0
        self._published = index
        self.free: list[int] = []
        for head in list(self._held):
            self.release(head)
        self.free = list(range(self.size - 1, -1, -1))
        for gpa, size in zip((self.desc_gpa, self.avail_gpa, self.used_gpa), self._sizes, strict=True):
            self.memory.at(gpa, size)[:] = bytes(size)
        self._avail[1] = self._used[1] = self._avail_event[0] = index
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            drain(fd)

    def _fence(self) -> None:
        with self._lock:
            pass

    # Chains

    def write_desc(self, slot: int, gpa: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write one descriptor of the ring's own table (raw: any values)."""
        DESCRIPTOR.pack_into(self._desc, 16 * slot, gpa, size, flags, following)

    def write_table(self, gpa: int, rows: Iterable[tuple[int, int, int, int]]) -> int:
        """Write an indirect table of (address, length, flags, next) at `gpa` and give its size in bytes (raw)."""
        data = b"".join(DESCRIPTOR.pack(*row) for row in rows)
        self.memory.at(gpa, len(data))[:] = data
        return len(data)

    def lay(self, segments: Sequence[Segment]) -> int:
        """Lay a chain out and give its head: in one indirect table if it may, else in descriptors of the ring.

        It is not queued yet: `push` may do that any number of times. Raises MemoryError if the ring is full.
        """
        count = len(segments)
        in_table = self.indirect and count > 1
        if len(self.free) < (1 if in_table else count):
            raise MemoryError(
                f"queue {self.index} has {len(self.free)} free descriptors of {self.size}; {count} wanted"
            )
        slots = [self.free.pop() for _ in range(1 if in_table else count)]
        following = range(1, count + 1) if in_table else [*slots[1:], 0]
        rows = [
            (gpa, size, (WRITE if writable else 0) | (NEXT if number < count else 0), after if number < count else 0)
            for number, ((gpa, size, writable), after) in enumerate(zip(segments, following, strict=True), 1)
        ]
        table = table_size = 0
        if in_table:
            table, table_size = self.memory.alloc(16 * count), 16 * count
            self.write_table(table, rows)
            self.write_desc(slots[0], table, table_size, INDIRECT)
        else:
            for slot, row in zip(slots, rows, strict=True):
                self.write_desc(slot, *row)
        self._held[slots[0]] = _Held(slots, table, table_size)
        return slots[0]

    def release(self, head: int) -> None:
        """Take a chain's descriptors back; a head that `lay` did not give is ignored."""
        held = self._held.pop(head, _NOTHING)
        self.free += held.slots
        if held.table_size:
            self.memory.free(held.table, held.table_size)

    # The available ring

    def push(self, head: int) -> None:
        """Put a head into the available ring (raw: any number). The device sees it after `kick`."""
        self._avail[2 + self.avail % self.size] = head
        self.avail = (self.avail + 1) & 0xFFFF

    def add(self, segments: Sequence[Segment]) -> int:
        """Lay a chain out, put it into the available ring, and give its head."""
        head = self.lay(segments)
        self.push(head)
        return head

    def set_avail(self, index: int) -> None:
        """Store any available index (raw) and go on from there."""
        self.avail = index & 0xFFFF
        self._avail[1] = self.avail

    def kick(self, *, force: bool = False) -> bool:
        """Publish what was pushed, notify the device if it asks for that (2.7.13.4), and tell whether it did."""
        self._avail[1] = self.avail
        self._fence()
        new, old = self.avail, self._published
        self._published = new
        if self.event_idx:
            wanted = ((new - self._avail_event[0] - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        else:
            wanted = not self._used[0] & NO_NOTIFY
        if not (wanted or force or not _STRONG):
            return False
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)
        return True

    # The used ring

    @property
    def used(self) -> int:
        """The device's index into the used ring."""
        return self._used[1]

    def pop(self) -> Used | None:
        """Give the next used element, if there is one. Its chain stays laid out until `release`."""
        if self._used[1] == self.seen:
            return None
        at = self.seen % self.size * 2
        found = Used(self._ring[at], self._ring[at + 1])
        self.seen = (self.seen + 1) & 0xFFFF
        return found

    def ask_for_call(self) -> bool:
        """Ask to be called for the next used element; tell whether there is one already."""
        if self.event_idx:
            self._avail[2 + self.size] = self.seen
        else:
            self._avail[0] = 0
        self._fence()
        return self._used[1] != self.seen

    def refuse_calls(self) -> None:
        """Say that no call is wanted, as a driver that polls does; with EVENT_IDX, not for the next 2**16 elements."""
        if self.event_idx:
            self._avail[2 + self.size] = (self.seen - 1) & 0xFFFF
        else:
            self._avail[0] = NO_INTERRUPT

    def close(self) -> None:
        """Close the eventfds and give the rings' memory back."""
        if self.kick_fd < 0:
            return
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1
        for head in list(self._held):
            self.release(head)
        for gpa, size in zip((self.desc_gpa, self.avail_gpa, self.used_gpa), self._sizes, strict=True):
            self.memory.free(gpa, size)
        for view in (self._desc, self._avail, self._used, self._ring, self._avail_event):
            view.release()


class Waiter:
    """Sleeps until one of several queues has used elements; hears of a closed connection and of a broken ring."""

    def __init__(self, queues: Sequence[DriverQueue], connection: socket.socket) -> None:
        """Watch `queues` and `connection`, which stay open while this is used."""
        self.queues = list(queues)
        self._poll = select.poll()
        self._calls = {queue.call_fd: queue for queue in queues}
        self._errors = {queue.err_fd: queue for queue in queues}
        for fd in (*self._calls, *self._errors):
            self._poll.register(fd, select.POLLIN)
        self._poll.register(connection, select.POLLRDHUP)

    def wait(self, timeout: float) -> DriverQueue:
        """Give a queue that has a used element. Raises Stuck after `timeout` seconds, Closed, Broken."""
        for queue in self.queues:
            if queue.used != queue.seen:
                return queue
        deadline = time.monotonic() + timeout
        while True:
            for queue in self.queues:
                if queue.ask_for_call():
                    return queue
            left = max(0.0, deadline - time.monotonic()) * 1000
            ready = self._poll.poll(left if _STRONG else min(left, _LOOK))
            closed = False
            for fd, _ in ready:
                if fd in self._calls:
                    self._calls[fd].calls += drain(fd)
                elif fd in self._errors:
                    raise Broken(f"the daemon signalled an error of queue {self._errors[fd].index}")
                else:
                    closed = True
            if closed and not any(queue.used != queue.seen for queue in self.queues):
                raise Closed("the daemon closed the connection while requests were waiting")
            if not ready and time.monotonic() >= deadline:
                numbers = ", ".join(str(queue.index) for queue in self.queues)
                raise Stuck(f"the daemon used nothing of queue {numbers} within {timeout:g} s")


def drain(fd: int) -> int:
    """Give the count of an eventfd, 0 if there was no event, and make it 0."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
