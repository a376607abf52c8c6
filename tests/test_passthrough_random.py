"""Random calls, made both on a mount of a directory and on a plain directory: whatever differs is a fault.

The server is a process of its own, one mount serves all examples of a way of caching. The length of a run is set by
FUSEWIRE_RANDOM_EXAMPLES (each of some dozens of steps); with FUSEWIRE_RANDOM_SEED=random each run is another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import e2e
from fusewire.testing import calls

EXAMPLES = int(os.environ.get("FUSEWIRE_RANDOM_EXAMPLES", "10"))
STEPS = int(os.environ.get("FUSEWIRE_RANDOM_STEPS", "40"))
SAME_EACH_TIME = os.environ.get("FUSEWIRE_RANDOM_SEED", "") != "random"
LARGEST = 100_000  # bytes
OPEN_AT_MOST = 8

# name -> (options, words before the server's program)
MOUNTS = {
    "none": ("cache=none", []),
    "none, served": ("cache=none,passthrough=off", []),
    "auto": ("cache=auto,passthrough=off", []),
    "always": ("cache=always,passthrough=off", []),
    "few descriptors": ("cache=none,passthrough=off", ["prlimit", "-n56:56"]),
}

_libc = ctypes.CDLL(None, use_errno=True)

NAMES = st.sampled_from(("a", "b", "c", "d"))
# What these numbers and names stand for, `Machine.path` says: mostly something that is there.
PATHS = st.tuples(st.integers(0, 40), NAMES)
NEW = st.tuples(st.integers(17, 40), NAMES)
TEXTS = st.sampled_from(("a", "b", "dir/a", "dir", ".", "./below", "nowhere", "a/"))
WHERE = st.none() | st.integers(0, 40)  # from the root, or from a directory that is open
SLOTS = st.integers(0, 40)
Place = tuple[int, str]
PLACES = st.sampled_from((0, 1, 100, 4095, 4096, 4097, 10_000, 40_000, 66_000))
LENGTHS = st.sampled_from((0, 1, 10, 4095, 4096, 4097, 20_000))
MODES = st.sampled_from((0o644, 0o600, 0o755, 0o000, 0o444, 0o4755, 0o2755, 0o1777, 0o6777))
XATTRS = st.sampled_from(("user.a", "user.b", "user." + "long" * 50, "trusted.a", "user.", "nothing.x"))
FLAGS = st.tuples(
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)),
    st.sampled_from((0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL)),
    st.sampled_from((0, 0, 0, os.O_TRUNC)),
    st.sampled_from((0, 0, 0, os.O_APPEND, os.O_NOFOLLOW, os.O_DIRECTORY, os.O_SYNC, os.O_NOATIME, os.O_PATH)),
).map(sum)


def _rename(one: tuple[int | None, str], two: tuple[int | None, str], flags: int) -> None:
    at = [calls.AT_FDCWD if fd is None else fd for fd, _ in (one, two)]
    if _libc.renameat2(at[0], os.fsencode(one[1]), at[1], os.fsencode(two[1]), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _ofd(fd: int, command: int, kind: int, start: int, length: int) -> Any:
    answer = fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))
    found, _, start, length, _ = struct.unpack("hhqqi4x", answer)
    if command == fcntl.F_OFD_GETLK:
        return found, (start, length) if found != fcntl.F_UNLCK else None
    return None


def _content(mark: int, length: int) -> bytes:
    word = b"%07d," % mark
    return (word * (length // len(word) + 1))[:length]


def _put(path: str, length: int) -> None:
    with open(path, "xb", buffering=0) as file:
        file.write(_content(1, length))


class Side:
    """One of the two directories, and what is open of it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        self.open: list[int | None] = [None] * OPEN_AT_MOST
        self.times: dict[str, tuple[int, int, int]] = {}
        self.known: list[str] = []  # the paths that there were after the last step
        self.directories = ["."]

    def place(self, where: int | None, path: Place) -> tuple[int | None, str]:
        """Give (dir_fd, path)."""
        if where is None:
            return None, self.path(path)
        return self.slot(where), self.relative(path)

    def path(self, path: Place) -> str:
        """Give a path from the root."""
        return f"{self.root}/{self.relative(path)}"

    def relative(self, path: Place) -> str:
        """Give a path that is there, or might be: below a directory that is there, or a wrong one."""
        number, name = path
        if number < 20 and self.known:
            return self.known[number % len(self.known)]
        if number < 38 and self.directories:
            return f"{self.directories[number % len(self.directories)]}/{name}"
        return name if number == 38 else f"{name}/{name}" if number == 39 else "."

    def free(self, path: Place) -> str:
        """Give a path in a directory that is there; what is there by that name, if anything, is in the way."""
        number, name = path
        return f"{self.root}/{self.directories[number % len(self.directories)]}/{name}"

    def slot(self, number: int) -> int:
        """Give what is open there, the next that is. Raises EBADF."""
        opened = [fd for fd in self.open if fd is not None]
        if not opened:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return opened[number % len(opened)]

    def close(self) -> None:
        for fd in (*self.open, self.fd):
            if fd is not None:
                os.close(fd)


class Machine(RuleBasedStateMachine):
    """The two directories. Each rule makes one call on both."""

    numbers = itertools.count()
    mount = ""
    plain = ""
    times_count = False
    forgets = False
    # Where the kernel writes to the files itself, set-user-ID bits go with each write, also with root's.
    bits = 0o7777
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        name = f"example-{os.getpid()}-{next(self.numbers)}"
        self.sides: list[Side] = []
        for base in (self.mount, self.plain):
            os.mkdir(f"{base}/{name}", 0o755)
            self.sides.append(Side(f"{base}/{name}"))
        self.mark = 0

    def teardown(self) -> None:
        for side in self.sides:
            side.close()
            shutil.rmtree(side.root)

    def both(self, call: Callable[[Side], Any]) -> Any:
        """Call for both sides; the outcomes have to be equal."""
        self.mark += 1
        type(self).steps += 1
        outcomes = []
        for side in self.sides:
            try:
                outcomes.append(("gives", call(side)))
            except OSError as error:
                outcomes.append(("fails", errno.errorcode.get(error.errno or 0)))
        assert outcomes[0] == outcomes[1], f"mount {outcomes[0]}, directory {outcomes[1]}"
        return outcomes[0]

    # Names

    @initialize(lengths=st.lists(LENGTHS, min_size=4, max_size=4))
    def begin(self, lengths: list[int]) -> None:
        """Have something of each kind, and some of it open."""

        def call(side: Side) -> None:
            root = side.root
            os.mkdir(f"{root}/dir")
            os.mkdir(f"{root}/dir/below")
            for path, length in zip(("a", "dir/b", "dir/below/c"), lengths, strict=False):
                _put(f"{root}/{path}", length)
            os.symlink("dir/b", f"{root}/l")
            os.link(f"{root}/a", f"{root}/dir/a")
            ways = {"a": os.O_RDWR, "dir/b": os.O_RDWR, "dir": os.O_RDONLY, "dir/below/c": os.O_WRONLY | os.O_APPEND}
            side.open[:5] = [os.open(f"{root}/{path}", way) for path, way in (*ways.items(), ("a", os.O_RDWR))]

        self.both(call)

    @rule(where=WHERE, path=NEW, mode=MODES)
    def mkdir(self, where: int | None, path: Place, mode: int) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            os.mkdir(name, mode & self.bits | 0o700, dir_fd=fd)

        self.both(call)

    @rule(where=WHERE, path=NEW, text=TEXTS)
    def symlink(self, where: int | None, path: Place, text: str) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            os.symlink(text, name, dir_fd=fd)

        self.both(call)

    @rule(path=PATHS, kind=st.sampled_from((stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFCHR)), mode=MODES)
    def mknod(self, path: Place, kind: int, mode: int) -> None:
        self.both(lambda side: os.mknod(side.path(path), kind | mode & self.bits, os.makedev(1, 3)))

    @rule(where=WHERE, path=PATHS)
    def unlink(self, where: int | None, path: Place) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            os.unlink(name, dir_fd=fd)

        self.both(call)

    @rule(where=WHERE, path=PATHS)
    def rmdir(self, where: int | None, path: Place) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            os.rmdir(name, dir_fd=fd)

        self.both(call)

    @rule(
        one=st.tuples(WHERE, PATHS),
        two=st.tuples(WHERE, PATHS),
        flags=st.sampled_from((0, 0, 0, calls.RENAME_NOREPLACE, calls.RENAME_EXCHANGE, calls.RENAME_WHITEOUT, 3, 8)),
    )
    def rename(self, one: tuple[int | None, Place], two: tuple[int | None, Place], flags: int) -> None:
        self.both(lambda side: _rename(side.place(*one), side.place(*two), flags))

    @rule(where=WHERE, path=PATHS, new=NEW, follow=st.booleans())
    def link(self, where: int | None, path: Place, new: Place, follow: bool) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            os.link(name, side.free(new), src_dir_fd=fd, follow_symlinks=follow)

        self.both(call)

    @rule(slot=SLOTS, new=NEW)
    def link_what_is_open(self, slot: int, new: Place) -> None:
        self.both(lambda side: calls.link_fd(side.slot(slot), side.free(new)))

    @rule(where=WHERE, path=PATHS)
    def readlink(self, where: int | None, path: Place) -> None:
        def call(side: Side) -> str:
            fd, name = side.place(where, path)
            return os.readlink(name, dir_fd=fd)

        self.both(call)

    @rule(path=PATHS)
    def listdir(self, path: Place) -> None:
        self.both(lambda side: sorted(os.listdir(side.path(path))))

    @rule(path=PATHS, size=st.sampled_from((300, 4096)), skip=st.integers(0, 6))
    def list_and_seek(self, path: Place, size: int, skip: int) -> None:
        def call(side: Side) -> list[bytes]:
            fd = os.open(side.path(path), os.O_RDONLY | os.O_DIRECTORY)
            try:
                everything: list[calls.Dirent] = []
                while part := calls.getdents(fd, size):
                    everything += part
                if skip < len(everything):
                    os.lseek(fd, everything[skip].offset, os.SEEK_SET)
                    rest: list[calls.Dirent] = []
                    while part := calls.getdents(fd, size):
                        rest += part
                    assert rest == everything[skip + 1 :]
                os.lseek(fd, 0, os.SEEK_SET)
                assert calls.getdents(fd, 4096)[0] == everything[0]
                for entry in everything:
                    status = os.lstat(f"{side.path(path)}/{os.fsdecode(entry.name)}")
                    assert stat.S_IFMT(status.st_mode) >> 12 == entry.type
                    assert entry.name == b".." or status.st_ino == entry.ino
                return sorted(entry.name for entry in everything)
            finally:
                os.close(fd)

        self.both(call)

    # Attributes

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: Place, mode: int) -> None:
        self.both(lambda side: os.chmod(side.path(path), mode & self.bits))

    @rule(slot=SLOTS, mode=MODES)
    def fchmod(self, slot: int, mode: int) -> None:
        self.both(lambda side: os.fchmod(side.slot(slot), mode & self.bits))

    @rule(path=PATHS, uid=st.sampled_from((-1, 0, 1000)), gid=st.sampled_from((-1, 0, 1000)), follow=st.booleans())
    def chown(self, path: Place, uid: int, gid: int, follow: bool) -> None:
        self.both(lambda side: os.chown(side.path(path), uid, gid, follow_symlinks=follow))

    @rule(path=PATHS, times=st.tuples(*[st.integers(-(2**31), 2**33)] * 2), nano=st.integers(0, 999_999_999))
    def utimens(self, path: Place, times: tuple[int, int], nano: int) -> None:
        def call(side: Side) -> tuple[int, int]:
            calls.utimens(side.path(path), (times[0], nano), (times[1], nano), follow=False)
            status = os.lstat(side.path(path))
            return status.st_atime_ns, status.st_mtime_ns

        self.both(call)

    @rule(slot=SLOTS)
    def futimens(self, slot: int) -> None:
        def call(side: Side) -> int:
            os.utime(side.slot(slot), ns=(10**18 + 1, 10**18 + 2))
            return os.fstat(side.slot(slot)).st_mtime_ns

        self.both(call)

    @rule(path=PATHS, name=XATTRS, size=st.sampled_from((0, 1, 100, 3000)), flags=st.sampled_from((0, 0, 1, 2)))
    def setxattr(self, path: Place, name: str, size: int, flags: int) -> None:
        value = _content(self.mark, size)
        self.both(lambda side: os.setxattr(side.path(path), name, value, flags, follow_symlinks=False))

    @rule(path=PATHS, name=XATTRS, size=st.sampled_from((0, 1, 50, 4000)))
    def getxattr(self, path: Place, name: str, size: int) -> None:
        self.both(lambda side: calls.getxattr(side.path(path), name, size))

    @rule(slot=SLOTS, name=XATTRS)
    def fsetxattr(self, slot: int, name: str) -> None:
        self.both(lambda side: os.setxattr(side.slot(slot), name, b"by descriptor"))

    @rule(path=PATHS, name=XATTRS)
    def removexattr(self, path: Place, name: str) -> None:
        self.both(lambda side: os.removexattr(side.path(path), name, follow_symlinks=False))

    @rule(path=PATHS, mode=st.integers(0, 7))
    def access(self, path: Place, mode: int) -> None:
        self.both(lambda side: os.access(side.path(path), mode))

    @rule(path=PATHS)
    def statvfs(self, path: Place) -> None:
        def call(side: Side) -> tuple[int, ...]:
            found = os.statvfs(side.path(path))
            return found.f_bsize, found.f_frsize, found.f_blocks, found.f_files, found.f_namemax

        self.both(call)

    @rule(path=PATHS, size=PLACES)
    def truncate(self, path: Place, size: int) -> None:
        self.both(lambda side: os.truncate(side.path(path), size))

    # Open files

    @rule(slot=SLOTS, where=WHERE, path=PATHS, flags=FLAGS, mode=MODES)
    def open(self, slot: int, where: int | None, path: Place, flags: int, mode: int) -> None:
        def call(side: Side) -> None:
            fd, name = side.place(where, path)
            # A FIFO would wait for its other end.
            new = os.open(name, flags | os.O_NONBLOCK, mode & self.bits, dir_fd=fd)
            old, side.open[slot % OPEN_AT_MOST] = side.open[slot % OPEN_AT_MOST], new
            if old is not None:
                os.close(old)

        self.both(call)

    @rule(slot=SLOTS, path=PATHS, excl=st.sampled_from((0, os.O_EXCL)))
    def tmpfile(self, slot: int, path: Place, excl: int) -> None:
        def call(side: Side) -> None:
            new = os.open(side.path(path), os.O_TMPFILE | os.O_RDWR | excl, 0o640)
            old, side.open[slot % OPEN_AT_MOST] = side.open[slot % OPEN_AT_MOST], new
            if old is not None:
                os.close(old)

        self.both(call)

    @rule(slot=SLOTS)
    def close(self, slot: int) -> None:
        def call(side: Side) -> None:
            fd = side.slot(slot)
            side.open[side.open.index(fd)] = None
            os.close(fd)

        self.both(call)

    @rule(slot=SLOTS, length=LENGTHS)
    def read(self, slot: int, length: int) -> None:
        self.both(lambda side: self.regular(os.read(side.slot(slot), length)))

    @rule(slot=SLOTS, length=LENGTHS, offset=PLACES)
    def pread(self, slot: int, length: int, offset: int) -> None:
        self.both(lambda side: self.regular(os.pread(side.slot(slot), length, offset)))

    @staticmethod
    def regular(data: bytes) -> bytes:
        return data

    @rule(slot=SLOTS, length=LENGTHS)
    def write(self, slot: int, length: int) -> None:
        def call(side: Side) -> tuple[int, int]:
            fd = side.slot(slot)
            if os.fstat(fd).st_size > LARGEST:
                return 0, 0
            return os.write(fd, _content(self.mark, length)), os.lseek(fd, 0, os.SEEK_CUR)

        self.both(call)

    @rule(slot=SLOTS, length=LENGTHS, offset=PLACES)
    def pwrite(self, slot: int, length: int, offset: int) -> None:
        def call(side: Side) -> int:
            fd = side.slot(slot)
            if os.fstat(fd).st_size > LARGEST:
                return 0
            return os.pwritev(fd, [_content(self.mark, length), b"end"], offset)

        self.both(call)

    @rule(slot=SLOTS, offset=PLACES | st.integers(-3, 3), whence=st.integers(0, 4))
    def lseek(self, slot: int, offset: int, whence: int) -> None:
        def call(side: Side) -> Any:
            fd = side.slot(slot)
            if stat.S_ISDIR(os.fstat(fd).st_mode):  # positions in directories are not the same in two of them
                return None
            return os.lseek(fd, offset, whence)

        self.both(call)

    @rule(slot=SLOTS, size=PLACES)
    def ftruncate(self, slot: int, size: int) -> None:
        self.both(lambda side: os.ftruncate(side.slot(slot), size))

    @rule(
        slot=SLOTS,
        mode=st.sampled_from((0, 1, 3, 16, 17, 2, 64)),
        offset=PLACES,
        length=st.sampled_from((0, 1, 4096, 10_000, 50_000)),
    )
    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        self.both(lambda side: calls.fallocate(side.slot(slot), mode, offset, length))

    @rule(source=SLOTS, goal=SLOTS, length=LENGTHS, offsets=st.tuples(PLACES, PLACES))
    def copy_file_range(self, source: int, goal: int, length: int, offsets: tuple[int, int]) -> None:
        self.both(lambda side: os.copy_file_range(side.slot(source), side.slot(goal), length, *offsets))

    @rule(slot=SLOTS, offset=PLACES, length=st.sampled_from((1, 100, 5000)))
    def map_and_write(self, slot: int, offset: int, length: int) -> None:
        def call(side: Side) -> bytes | None:
            fd = side.slot(slot)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size < offset + length:
                return None
            with mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
                before = view[offset : offset + length]
                view[offset : offset + length] = _content(self.mark, length)
                view.flush()
            return before

        self.both(call)

    @rule(slot=SLOTS, only_data=st.booleans())
    def fsync(self, slot: int, only_data: bool) -> None:
        self.both(lambda side: (os.fdatasync if only_data else os.fsync)(side.slot(slot)))

    # Locks: the open files of one process are in each other's way, by flock and by OFD locks

    @rule(slot=SLOTS, kind=st.sampled_from((fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)))
    def flock(self, slot: int, kind: int) -> None:
        self.both(lambda side: fcntl.flock(side.slot(slot), kind | fcntl.LOCK_NB))

    @rule(
        slot=SLOTS,
        command=st.sampled_from((fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK, fcntl.F_SETLK)),
        kind=st.sampled_from((fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK)),
        start=st.sampled_from((0, 1, 10, 2**40)),
        length=st.sampled_from((0, 1, 10)),
    )
    def lock(self, slot: int, command: int, kind: int, start: int, length: int) -> None:
        self.both(lambda side: _ofd(side.slot(slot), command, kind, start, length))

    # What has to be true after each step

    @invariant()
    def the_trees_are_equal(self) -> None:
        if not self.sides:
            return
        ours, theirs = (self.tree(side) for side in self.sides)
        assert ours == theirs

    @invariant()
    def the_open_files_are_equal(self) -> None:
        for slot, pair in enumerate(zip(*[side.open for side in self.sides], strict=True)):
            ours, theirs = (fd is not None and (self.facts(os.fstat(fd)), self.readable(fd)) for fd in pair)
            assert ours == theirs, f"slot {slot}"

    @staticmethod
    def readable(fd: int) -> bytes | str | None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        try:
            return os.pread(fd, LARGEST * 2, 0)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    @staticmethod
    def facts(status: os.stat_result) -> tuple[int, ...]:
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        return status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, size

    def tree(self, side: Side) -> dict[str, Any]:
        """Give everything that can be said of a directory, by path; inodes are named by their first path."""
        found: dict[str, Any] = {}
        directories: list[str] = []
        first: dict[int, str] = {}
        times: dict[str, tuple[int, int, int]] = {}
        stack = ["."]
        while stack:
            path = stack.pop()
            whole = f"{side.root}/{path}"
            status = os.lstat(whole)
            row: list[Any] = [self.facts(status), first.setdefault(status.st_ino, path)]
            if stat.S_ISDIR(status.st_mode):
                directories.append(path)
                stack += [f"{path}/{name}" for name in sorted(os.listdir(whole), reverse=True)]
            elif stat.S_ISLNK(status.st_mode):
                row.append(os.readlink(whole))
            elif stat.S_ISREG(status.st_mode):
                with open(whole, "rb", buffering=0) as file:
                    row.append(file.read())
            names = sorted(os.listxattr(whole, follow_symlinks=False))
            row.append([(name, os.getxattr(whole, name, follow_symlinks=False)) for name in names])
            if self.times_count:
                times[path] = now = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
                before = side.times.get(path)
                # Which of mtime and ctime has moved since the last step, if it is the same file still.
                same = before is not None and before[0] == now[0]
                row.append([old == new for old, new in zip(before, now, strict=True)] if before and same else None)
            found[path] = row
        side.times, side.directories = times, directories
        side.known = [path for path in found if path != "."]
        return found

    @precondition(lambda self: self.forgets and self.mark % 10 == 9)
    @rule()
    def drop_what_is_cached(self) -> None:
        """The kernel gives back what it knows, as for want of memory: the server must know the way back."""
        with contextlib.suppress(OSError):
            fd = os.open("/proc/sys/vm/drop_caches", os.O_WRONLY)
            try:
                os.write(fd, b"2\n")
            finally:
                os.close(fd)


def has_fine_times(place: Path) -> bool:
    """Tell whether a change after a look at the times is always seen in them (Linux 6.13, most filesystems)."""
    file = place / "clock"
    found = set()
    for number in range(10):
        file.write_bytes(b"%d" % number)
        found.add(file.stat().st_ctime_ns)
    file.unlink()
    return len(found) == 10


@pytest.fixture(scope="module")
def base() -> Iterator[e2e.World]:
    """A world for all mounts of this module."""
    if not e2e.ROOT:
        pytest.skip("needs root: what only root may do is compared too")
    found = e2e.World()
    found._shared[0] = True  # other tests may make and leave it while this world lives
    try:
        yield found
    finally:
        left = found.close()
    assert left == []


@pytest.fixture(scope="module")
def mount_of(base: e2e.World) -> Iterator[Callable[[str], tuple[Path, Path]]]:
    """Give (mount, plain directory) of a way of caching."""
    made: dict[str, tuple[Path, Path]] = {}

    def give(name: str) -> tuple[Path, Path]:
        if name not in made:
            place = base.home(0) / name.replace(" ", "-").replace(",", "")
            for below in ("source", "mount", "plain"):
                (place / below).mkdir(parents=True)
            options, wrap = MOUNTS[name]
            base.mount(
                place / "source", place / "mount", "--strategy", "direct", "-o", f"dev,suid,{options}", uid=0, wrap=wrap
            )
            made[name] = place / "mount", place / "plain"
        return made[name]

    yield give
    for mount, _ in made.values():
        done = base.fw("umount", mount, uid=0)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.timeout(max(120, 20 * EXAMPLES))
@pytest.mark.parametrize("name", MOUNTS)
def test_random_calls_give_the_same_on_a_mount(
    base: e2e.World, mount_of: Callable[[str], tuple[Path, Path]], name: str
) -> None:
    mount, plain = mount_of(name)
    about = {
        "mount": str(mount),
        "plain": str(plain),
        # Elsewhere the kernel makes up times of its own until it asks again.
        "times_count": "cache=none" in MOUNTS[name][0] and has_fine_times(plain),
        "forgets": name == "few descriptors",
        "bits": 0o7777 if "passthrough=off" in MOUNTS[name][0] else 0o1777,
        "steps": 0,
    }
    kind = type("Machine", (Machine,), about)
    umask = os.umask(0o022)
    try:
        with e2e.deadline(base.mark, max(100.0, 18.0 * EXAMPLES)):
            run_state_machine_as_test(
                kind,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=STEPS,
                    deadline=None,
                    derandomize=SAME_EACH_TIME,
                    database=None,
                    print_blob=False,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        os.umask(umask)
    assert kind.steps > EXAMPLES
    assert os.listdir(mount) == os.listdir(plain) == []
