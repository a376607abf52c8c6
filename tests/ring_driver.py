"""A guest's half of a split virtqueue, as simple as can be: what tests of the device's half are driven by."""

from __future__ import annotations

import ctypes
import struct

from fusewire.transport.ring import GuestMemory, Queue, Region

NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE = 4096
MIB = 1 << 20

# Three regions: RINGS and BESIDE are neighbours in the guest (and far apart in the front end), LOW is elsewhere.
RINGS = 1 << 32
BESIDE = RINGS + MIB
END = BESIDE + MIB
LOW = 0x10000
USER = {RINGS: 0x7E00_0000_0000, BESIDE: 0x7D00_0000_0000, LOW: 0x7E80_0000_0000}


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Driver:
    """The guest: memory, a ring of `size` entries in it, and what is put there."""

    def __init__(self, size=8, *, indirect=True, event_idx=True, log=None, strong=True, base=0, region=None):
        self.size, self.event_idx = size, event_idx
        self.parts = {RINGS: bytearray(MIB), BESIDE: bytearray(MIB), LOW: bytearray(MIB)}
        self.memory = GuestMemory(
            Region(start, len(part), USER[start], memoryview(part)) for start, part in self.parts.items()
        )
        # 2.7.2: the three parts one behind the other, 16, 2 and 4 aligned.
        self.desc = 0x100
        self.avail = self.desc + 16 * size
        self.used = -(-(self.avail + 6 + 2 * size) // 4) * 4
        self.free = self.used + 6 + 8 * size
        self.next = base
        self.seen = base
        self.ram = self.parts[RINGS]
        struct.pack_into("<H", self.ram, self.avail + 2, base)
        struct.pack_into("<H", self.ram, self.used + 2, base)
        self.queue = Queue(indirect=indirect, event_idx=event_idx, log=log, strong_ordering=strong)
        self.start(self.queue, base, region)

    def start(self, queue, base, region=None, used_log=None):
        user = USER[RINGS]
        addresses = (user + self.desc, user + self.avail, user + self.used)
        queue.start(self.memory, self.size, *addresses, base, used_log=used_log, inflight=region)

    def poke(self, address, data):
        for start, part in self.parts.items():
            if start <= address and address + len(data) <= start + len(part):
                part[address - start : address - start + len(data)] = data
                return
        raise AssertionError(hex(address))

    def peek(self, address, length):
        return b"".join(self.memory.slices(address, length))

    def descriptor(self, index, address, length, flags, following=0):
        struct.pack_into("<QIHH", self.ram, self.desc + 16 * index, address, length, flags, following)

    def make_available(self, *heads):
        for head in heads:
            struct.pack_into("<H", self.ram, self.avail + 4 + 2 * (self.next % self.size), head)
            self.next = (self.next + 1) & 0xFFFF
        self.set_index(self.next)

    def set_index(self, index):
        struct.pack_into("<H", self.ram, self.avail + 2, index)

    def set_used_event(self, index):
        struct.pack_into("<H", self.ram, self.avail + 4 + 2 * self.size, index)

    def set_avail_flags(self, flags):
        struct.pack_into("<H", self.ram, self.avail, flags)

    @property
    def used_flags(self):
        return struct.unpack_from("<H", self.ram, self.used)[0]

    @property
    def used_index(self):
        return struct.unpack_from("<H", self.ram, self.used + 2)[0]

    @property
    def avail_event(self):
        return struct.unpack_from("<H", self.ram, self.used + 4 + 8 * self.size)[0]

    def reap(self):
        """Give the (id, len) that are new in the used ring."""
        new = []
        while self.seen != self.used_index:
            new.append(struct.unpack_from("<II", self.ram, self.used + 4 + 8 * (self.seen % self.size)))
            self.seen = (self.seen + 1) & 0xFFFF
        return new

    def direct(self, parts, indices=None):
        """Write a chain of ordinary descriptors: (address, length, writable) each."""
        indices = list(range(len(parts))) if indices is None else indices
        for i, (address, length, writable) in enumerate(parts):
            more = i + 1 < len(parts)
            flags = WRITE * writable | NEXT * more
            self.descriptor(indices[i], address, length, flags, indices[i + 1] if more else 0)
        return indices[0]

    def table(self, parts, at, order=None):
        """Write an indirect table and give its length."""
        order = list(range(len(parts))) if order is None else order
        for i, (address, length, writable) in enumerate(parts):
            more = i + 1 < len(parts)
            flags = WRITE * writable | NEXT * more
            following = order[i + 1] if more else 0
            raw = struct.pack("<QIHH", address, length, flags, following)
            for k, byte in enumerate(raw):
                self.poke(at + 16 * order[i] + k, bytes([byte]))
        return 16 * len(parts)

    def indirect(self, parts, at=RINGS + 0x80000, head=0, order=None):
        self.descriptor(head, at, self.table(parts, at, order), INDIRECT)
        return head

    def offset_of(self, view):
        """Give the guest address of a view."""
        where = address_of(view)
        for start, part in self.parts.items():
            begin = address_of(memoryview(part))
            if begin <= where and where + len(view) <= begin + len(part):
                return start + where - begin
        raise AssertionError("a view outside of memory")

    def bytes_of(self, views):
        """Give the guest address of each byte of a list of views."""
        return [start + i for view in views for start in (self.offset_of(view),) for i in range(len(view))]

    def honest(self):
        """Let one honest request through, and see it come back."""
        data, room = RINGS + 0x40000, RINGS + 0x41000
        self.poke(data, b"a question")
        parts = [(data, 10, False), (room, 16, True)]
        self.make_available(self.indirect(parts) if self.queue._indirect else self.direct(parts))
        chain = self.queue.pop()
        assert chain.bad == ""
        assert b"".join(chain.readable) == b"a question"
        chain.writable[0][:9] = b"an answer"
        self.queue.push(chain.head, 9)
        self.queue.publish()
        assert self.reap() == [(0, 9)]
        assert self.parts[RINGS][0x41000:0x41009] == b"an answer"
        assert self.queue.in_flight == 0


def expand(parts):
    """Give the address of each byte of a chain, readable and writable."""
    return tuple([a + i for a, n, w in parts if w is side for i in range(n)] for side in (False, True))


FOUR = [(RINGS + 0x40000, 40, False), (RINGS + 0x50000, 16, False), (LOW + 8, 16, True), (RINGS + 0x60000, 104, True)]
LIKELY = [(RINGS + 0x40000 + 0x1000 * i, 24 + i, i > 1) for i in range(4)]
