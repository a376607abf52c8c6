"""The floor benchmark's filesystem for Fusewire: usage fusewire_server.py TARGET FILE_SIZE THREADS."""

from __future__ import annotations

import errno
import os
import stat
import sys

from pattern import PATTERN_BYTES, doubled_pattern

from fusewire.linux.syscalls import mount
from fusewire.ops import Attr, Caller, Entry, Operations, attr
from fusewire.serve import Server
from fusewire.wire.abi import FOPEN_DIRECT_IO
from fusewire.wire.codec import DirBuffer

ROOT, FILE = 1, 2
MS_NOSUID, MS_NODEV = 2, 4


class Floor(Operations):
    """One directory, one file, nothing cached; attributes are made once, as a careful author would."""

    announces_blocking = True  # nothing here ever blocks

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = memoryview(doubled_pattern())
        self.file = attr(FILE, stat.S_IFREG | 0o644, size)
        self.attributes = {ROOT: (attr(ROOT, stat.S_IFDIR | 0o755), 0.0), FILE: (self.file, 0.0)}
        self.entry = Entry(FILE, self.file, 0, 0)

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Entry:
        if name != b"data":
            raise FileNotFoundError(errno.ENOENT, "no such file", name)
        return self.entry

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        return self.attributes[nodeid]

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        return 1, FOPEN_DIRECT_IO

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> memoryview:
        if offset + size > self.size:
            size = max(0, self.size - offset)
        start = offset % PATTERN_BYTES
        return self.data[start : start + size]

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> bytearray:
        listing = DirBuffer(size)
        if offset == 0:
            listing.add(b"data", FILE, 1, stat.S_IFREG >> 12)
        return listing.data


def main() -> None:
    target, size, threads = os.fsencode(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    mount(b"floor", target, b"fuse.floor", MS_NOSUID | MS_NODEV, options.encode())
    # 0 threads: as many as Fusewire takes when nobody says a number.
    server = Server(Floor(size), fd, threads=threads) if threads else Server(Floor(size), fd)
    server.start()
    server.wait()


main()
