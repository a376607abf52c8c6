"""Invariant: whatever a driver puts into its memory, a queue raises nothing but RingError and gives nothing but memory.

Run: python fuzz/fuzz_ring.py [CORPUS] [-max_total_time=SECONDS]. Needs atheris. Without a directory for the corpus it
begins with one honest request of each kind, in a temporary directory.
The input: one byte says what was negotiated (indirect, event_idx, a log, an in-flight region, fences) and one how large
the ring is; the next say how the device goes about it, a step each, up to a zero; the rest is the in-flight region if
there is one, and memory from its begin on, where the ring is. Memory is small and at low addresses, so that numbers at
random are addresses; two regions are neighbours and one is not.
"""

import ctypes
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import atheris

with atheris.instrument_imports(include=["fusewire.transport"]):
    from fusewire.transport.inflight import inflight_size
    from fusewire.transport.ring import GuestMemory, Queue, Region, RingError

INDIRECT, EVENT_IDX, LOG, INFLIGHT, STRONG = 1, 2, 4, 8, 16
# Guest address, size, the front end's address.
PLACES = ((0x0, 0x1000, 0x10000), (0x1000, 0x800, 0x40000), (0x4000, 0x400, 0x20000))
USER = PLACES[0][2]


class Log:
    def __init__(self, used: int) -> None:
        self.used = used

    def mark(self, guest_addr: int, length: int) -> None:
        assert length > 0
        used = self.used <= guest_addr and guest_addr + length <= self.used + 6 + 8 * 32
        inside = any(a <= guest_addr < a + n for a, n, _ in PLACES)
        assert used or (inside and guest_addr + length <= 0x4400), "a mark outside of memory"


def check(view: memoryview, limits: list[tuple[int, int]]) -> None:
    assert len(view) > 0
    begin = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert any(low <= begin and begin + len(view) <= high for low, high in limits), "a view outside of memory"


def one_input(data: bytes) -> None:
    if len(data) < 3:
        return
    mode, size = data[0], 1 << (data[1] % 6)
    end = data.find(0, 2)
    steps, rest = (data[2:end], data[end + 1 :]) if end >= 0 else (data[2:], b"")
    region = None
    if mode & INFLIGHT:
        region = memoryview(bytearray(rest[: inflight_size(size)].ljust(inflight_size(size), b"\0")))
        rest = rest[inflight_size(size) :]
    parts = []
    for _, length, _ in PLACES:
        parts.append(bytearray(rest[:length].ljust(length, b"\0")))
        rest = rest[length:]
    limits = []
    for part in parts:
        begin = ctypes.addressof(ctypes.c_char.from_buffer(part))
        limits.append((begin, begin + len(part)))
    memory = GuestMemory(
        Region(guest, length, user, memoryview(part)) for (guest, length, user), part in zip(PLACES, parts, strict=True)
    )
    avail = 16 * size
    used = avail + 4 * (-(-(6 + 2 * size) // 4))
    log = Log(1 << 40) if mode & LOG else None
    queue = Queue(
        indirect=bool(mode & INDIRECT), event_idx=bool(mode & EVENT_IDX), log=log, strong_ordering=bool(mode & STRONG)
    )

    def start(base: int) -> None:
        queue.start(memory, size, USER, USER + avail, USER + used, base, used_log=1 << 40, inflight=region)

    taken = []
    ram = parts[0]
    try:
        start(0)
        for step in steps:
            what, value = step & 7, step >> 3
            if what <= 2:
                chain = queue.pop()
                if chain is not None:
                    assert 0 <= chain.head <= 0xFFFF
                    assert not chain.bad or not chain.readable + chain.writable
                    for view in chain.readable + chain.writable:
                        check(view, limits)
                    assert sum(map(len, chain.readable + chain.writable)) < 1 << 32
                    for view in chain.writable[:4]:
                        view[0] = value  # into the rings too, if the driver wants it so
                    taken.append(chain)
            elif what == 3 and taken:
                chain = taken.pop(value % len(taken))
                queue.push(chain.head, min(sum(map(len, chain.writable)), 1 << value))
            elif what == 4:
                queue.publish()
                if value & 1:
                    queue.sleep()
                else:
                    queue.wake()
            elif what == 5:
                # The driver makes some more available.
                index = struct.unpack_from("<H", ram, avail + 2)[0]
                struct.pack_into("<H", ram, avail + 2, (index + value % 8) & 0xFFFF)
            elif what == 6:
                ram[value * 37 % len(ram)] = value * 11 & 0xFF
            elif what == 7:
                base = queue.stop()
                taken.clear()
                start(base)
            assert queue.in_flight == len(taken) <= size
    except RingError:
        pass
    finally:
        queue.stop()


def seeds() -> Iterator[bytes]:
    for size_bits in (0, 2, 3, 5):
        size = 1 << size_bits
        for mode in range(32):
            ram = bytearray(0x1C00)
            table = 0xC00
            for i in range(24):
                last = i in (3, 23)
                entry = 0x1000 + 40 * i, 40, (0 if last else 1) | (2 if i > 1 else 0), i + 1
                struct.pack_into("<QIHH", ram, table + 16 * i, *entry)
                if i < size:
                    struct.pack_into("<QIHH", ram, 16 * i, *entry[:2], entry[2] & ~(i + 1 == size), entry[3])
            if mode & INDIRECT:
                struct.pack_into("<QIHH", ram, 0, table, 64, 4, 0)
                if size > 1:
                    struct.pack_into("<QIHH", ram, 16, table + 16 * 4, 16 * 20, 4, 0)
            struct.pack_into("<HHHH", ram, 16 * size, 0, 1, 0, 1 % size)
            region = bytes(inflight_size(size)) if mode & INFLIGHT else b""
            steps = bytes([1, 8 | 3, 12, 8 | 5, 1, 7, 1, 4, 16 | 5, 1, 2, 3, 8 | 3, 4])
            yield bytes([mode, size_bits]) + steps + b"\0" + region + bytes(ram)


def main() -> None:
    arguments = sys.argv
    if not any(os.path.isdir(argument) for argument in arguments[1:]):
        # The fuzzer ends its process without any cleaning up: the directory is removed by a parent.
        with tempfile.TemporaryDirectory(prefix="fuzz-ring-") as corpus:
            for number, seed in enumerate(seeds()):
                with open(f"{corpus}/{number:04}", "wb") as file:
                    file.write(seed)
            sys.exit(subprocess.call([sys.executable, *arguments, corpus]))
    atheris.Setup([*arguments, "-timeout=10", "-max_len=10000"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
