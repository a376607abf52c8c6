"""One file, everything that can be done to its contents, and a model in memory that has to agree after each operation.

    python tests/fsx.py --operations 100000 --mount cache=auto,writeback
    python tests/fsx.py --operations 100000 --directory /some/mount --seed 7

The first form mounts a directory of its own with those options. A run is made of its seed alone: the same seed does the
same again, as long as the filesystem offers the same operations. On a difference the last operations are printed, with
what it takes to repeat them. Needs nothing but the standard library, and `fusewire` for `--mount`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

PAGE = 4096
SIZE = 160 * 1024  # the largest file; small enough that everything meets everything, more than one request long
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 16, 32
# What a filesystem may say to an operation that it does not have.
MISSING = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV}

_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Difference(AssertionError):
    """The file is not what it ought to be."""


class Exerciser:
    """Does operations to the file `path`, chosen by `seed`, and holds it against the model."""

    def __init__(self, path: str, seed: int, *, mapped: bool = True, direct: bool = True) -> None:
        """Make the file. mapped: shared mappings are used; direct: O_DIRECT is tried."""
        self.path = path
        self.rng = random.Random(seed)
        self.model = bytearray()
        self.log: collections.deque[str] = collections.deque(maxlen=60)
        self.done = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.missing: set[str] = set()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.other = os.open(path + ".other", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        # O_DIRECT needs aligned memory.
        self.aligned = mmap.mmap(-1, SIZE)
        works: list[tuple[Callable[[], str], int]] = [
            (self.read, 6),
            (self.write, 12),
            (self.write_vector, 2),
            (self.append, 3),
            (self.truncate_down, 2),
            (self.truncate_up, 3),
            (self.truncate_path, 1),
            (self.open_truncated, 1),
            (self.punch_hole, 4),
            (self.zero_range, 3),
            (self.reserve, 2),
            (self.collapse_range, 1),
            (self.insert_range, 1),
            (self.copy_range, 3),
            (self.copy_from_other, 2),
            (self.close_open, 3),
            (self.sync, 1),
            (self.seek_data, 2),
        ]
        if mapped:
            works += [(self.map_read, 4), (self.map_write, 6)]
        if direct:
            works += [(self.direct_read, 3), (self.direct_write, 4)]
        self.works = [work for work, _ in works]
        self.weights = [weight for _, weight in works]

    def run(self, operations: int) -> None:
        """Do so many. Raises Difference."""
        for _ in range(operations):
            self.step()

    def step(self) -> None:
        """Do one operation and look at the whole file."""
        (work,) = self.rng.choices(self.works, self.weights)
        name = work.__name__
        before = self.rng.getstate()
        if name in self.missing:
            return
        self.log.append(f"{self.done}: {name} ...")
        try:
            what = work()
        except OSError as error:
            if error.errno not in MISSING:
                raise self.difference(f"{name}: {error}") from error
            self.missing.add(name)
            self.rng.setstate(before)
            what = f"is not offered ({error.strerror})"
        self.log[-1] = f"{self.done}: {name} {what}"
        self.counts[name] += 1
        self.done += 1
        self.check()

    def check(self) -> None:
        """Compare size and contents with the model."""
        size = os.fstat(self.fd).st_size
        if size != len(self.model):
            raise self.difference(f"the size is {size} and should be {len(self.model)}")
        self.same(os.pread(self.fd, SIZE * 2, 0), 0, "the whole file")

    def same(self, data: bytes, offset: int, what: str, length: int | None = None) -> None:
        """Compare data with the model at that place."""
        wanted = bytes(self.model[offset : offset + length]) if length is not None else bytes(self.model[offset:])
        if data == wanted:
            return
        at = next(
            (place for place, (one, two) in enumerate(zip(data, wanted, strict=False)) if one != two),
            min(len(data), len(wanted)),
        )
        raise self.difference(
            f"{what}: {len(data)} bytes at {offset}, {len(wanted)} wanted; the first difference is at {offset + at}: "
            f"{data[at : at + 16]!r} instead of {wanted[at : at + 16]!r}"
        )

    def difference(self, text: str) -> Difference:
        """Make the error."""
        return Difference(f"{text}\nin operation {self.done}, after\n  " + "\n  ".join(self.log))

    # Places and contents

    def range(self, limit: int | None = None, *, align: int = 1) -> tuple[int, int]:
        """Give (offset, length), not empty, below `limit`."""
        limit = SIZE if limit is None else limit
        length = self.rng.choice((1, 7, 100, PAGE, PAGE + 1, 3 * PAGE, 40_000, 131_072))
        length = min(max(align, length // align * align), limit)
        offset = self.rng.randrange(0, limit - length + 1)
        near = self.rng.random()
        if near < 0.3:
            offset = offset // PAGE * PAGE
        elif near < 0.4 and len(self.model) + length <= limit:
            offset = len(self.model)  # just at the end
        return offset // align * align, length

    def within(self, *, align: int = 1) -> tuple[int, int] | None:
        """Give (offset, length) that lies in the file, None if it is too short for that."""
        limit = len(self.model) // align * align
        return self.range(limit, align=align) if limit >= align else None

    def data(self, length: int) -> bytes:
        """Give bytes that say which operation wrote them."""
        mark = b"%08d" % self.done
        return (mark * (length // len(mark) + 1))[:length]

    def put(self, offset: int, data: bytes) -> None:
        """Write to the model."""
        self.grow(offset)
        self.model[offset : offset + len(data)] = data

    def grow(self, size: int) -> None:
        """Make the model at least so long."""
        if len(self.model) < size:
            self.model += bytes(size - len(self.model))

    # Operations: each does it to both and says what it was

    def read(self) -> str:
        offset, length = self.range()
        self.same(os.pread(self.fd, length, offset), offset, "read", length)
        return f"{offset} +{length}"

    def write(self) -> str:
        offset, length = self.range()
        data = self.data(length)
        if os.pwrite(self.fd, data, offset) != length:
            raise self.difference("write: not all was written")
        self.put(offset, data)
        return f"{offset} +{length}"

    def write_vector(self) -> str:
        offset, length = self.range()
        data = self.data(length)
        parts = [data[: length // 3], data[length // 3 : length // 2], data[length // 2 :]]
        if os.pwritev(self.fd, parts, offset) != length:
            raise self.difference("writev: not all was written")
        self.put(offset, data)
        return f"{offset} +{length}"

    def append(self) -> str:
        length = self.rng.choice((1, 10, 1000, PAGE, 10_000))
        if len(self.model) + length > SIZE:
            return "(too long)"
        data = self.data(length)
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        self.model += data
        return f"+{length}"

    def _truncated(self, size: int) -> None:
        del self.model[size:]
        self.grow(size)

    def truncate_down(self) -> str:
        size = self.rng.randrange(0, len(self.model) + 1)
        os.ftruncate(self.fd, size)
        self._truncated(size)
        return f"to {size}"

    def truncate_up(self) -> str:
        size = self.rng.randrange(len(self.model), SIZE + 1)
        os.ftruncate(self.fd, size)
        self._truncated(size)
        return f"to {size}"

    def truncate_path(self) -> str:
        size = self.rng.randrange(0, SIZE + 1)
        os.truncate(self.path, size)
        self._truncated(size)
        return f"to {size}"

    def open_truncated(self) -> str:
        os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC))
        self._truncated(0)
        return ""

    def punch_hole(self) -> str:
        offset, length = self.range()
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        end = min(offset + length, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)
        return f"{offset} +{length}"

    def zero_range(self) -> str:
        offset, length = self.range()
        keep = self.rng.choice((0, KEEP_SIZE))
        fallocate(self.fd, ZERO_RANGE | keep, offset, length)
        end = offset + length
        if keep:
            end = min(end, len(self.model))
        if offset < end:
            self.put(offset, bytes(end - offset))
        return f"{offset} +{length}{' keeping the size' if keep else ''}"

    def reserve(self) -> str:
        offset, length = self.range()
        keep = self.rng.choice((0, KEEP_SIZE))
        fallocate(self.fd, keep, offset, length)
        if not keep:
            self.grow(offset + length)
        return f"{offset} +{length}{' keeping the size' if keep else ''}"

    def collapse_range(self) -> str:
        blocks = (len(self.model) - 1) // PAGE
        if blocks < 2:
            return "(too short)"
        offset = self.rng.randrange(0, blocks) * PAGE
        length = self.rng.randrange(1, blocks - offset // PAGE + 1) * PAGE
        fallocate(self.fd, COLLAPSE_RANGE, offset, length)
        del self.model[offset : offset + length]
        return f"{offset} +{length}"

    def insert_range(self) -> str:
        blocks = len(self.model) // PAGE
        room = (SIZE - len(self.model)) // PAGE
        if blocks < 1 or room < 1 or len(self.model) == 0:
            return "(no place)"
        offset = self.rng.randrange(0, blocks) * PAGE
        length = self.rng.randrange(1, room + 1) * PAGE
        if offset >= len(self.model):
            return "(no place)"
        fallocate(self.fd, INSERT_RANGE, offset, length)
        self.model[offset:offset] = bytes(length)
        return f"{offset} +{length}"

    def copy_range(self) -> str:
        place = self.within()
        if place is None:
            return "(empty)"
        source, length = place
        target = self.rng.randrange(0, SIZE - length + 1)
        if source < target + length and target < source + length:
            return "(would overlap)"
        copied = os.copy_file_range(self.fd, self.fd, length, source, target)
        if not 0 < copied <= length:
            raise self.difference(f"copy_file_range: {copied} of {length} bytes")
        self.put(target, bytes(self.model[source : source + copied]))
        return f"{source} +{length} to {target}: {copied}"

    def copy_from_other(self) -> str:
        offset, length = self.range()
        data = self.data(length)
        os.pwrite(self.other, data, offset)
        copied = os.copy_file_range(self.other, self.fd, length, offset, offset)
        if not 0 < copied <= length:
            raise self.difference(f"copy_file_range: {copied} of {length} bytes")
        self.put(offset, data[:copied])
        os.ftruncate(self.other, 0)
        return f"{offset} +{length}: {copied}"

    def close_open(self) -> str:
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)
        return ""

    def sync(self) -> str:
        if self.rng.random() < 0.5:
            os.fsync(self.fd)
            return "all"
        os.fdatasync(self.fd)
        return "data"

    def seek_data(self) -> str:
        if not self.model:
            return "(empty)"
        offset = self.rng.randrange(0, len(self.model))
        try:
            start = os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = len(self.model)
        if not offset <= start <= len(self.model) or any(self.model[offset:start]):
            raise self.difference(f"SEEK_DATA {offset} gave {start}, but there is data before")
        hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        if not offset <= hole <= len(self.model):
            raise self.difference(f"SEEK_HOLE {offset} gave {hole}")
        return f"{offset}: data at {start}, hole at {hole}"

    def map_read(self) -> str:
        place = self.within()
        if place is None:
            return "(empty)"
        offset, length = place
        with mmap.mmap(self.fd, len(self.model), mmap.MAP_SHARED, mmap.PROT_READ) as view:
            self.same(view[offset : offset + length], offset, "mmap", length)
        return f"{offset} +{length}"

    def map_write(self) -> str:
        place = self.within()
        if place is None:
            return "(empty)"
        offset, length = place
        data = self.data(length)
        how = self.rng.choice(("msync", "close", "read"))
        with mmap.mmap(self.fd, len(self.model), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
            view[offset : offset + length] = data
            if how == "msync":
                view.flush()
            elif how == "read":
                self.model[offset : offset + length] = data
                self.same(os.pread(self.fd, length, offset), offset, "read of what is mapped", length)
        self.model[offset : offset + length] = data
        return f"{offset} +{length}, {how}"

    @contextlib.contextmanager
    def _direct(self, flags: int) -> Iterator[int]:
        try:
            fd = os.open(self.path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:  # a filesystem without it
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    def direct_read(self) -> str:
        offset, length = self.range(align=PAGE)
        with self._direct(os.O_RDONLY) as fd:
            got = os.preadv(fd, [memoryview(self.aligned)[:length]], offset)
        self.same(self.aligned[:got], offset, "direct read", length)
        return f"{offset} +{length}"

    def direct_write(self) -> str:
        offset, length = self.range(align=PAGE)
        data = self.data(length)
        self.aligned[:length] = data
        with self._direct(os.O_WRONLY) as fd:
            written = os.pwritev(fd, [memoryview(self.aligned)[:length]], offset)
        if written != length:
            raise self.difference(f"direct write: {written} of {length} bytes")
        self.put(offset, data)
        return f"{offset} +{length}"

    def close(self) -> None:
        """Close and remove the files."""
        os.close(self.fd)
        os.close(self.other)
        self.aligned.close()
        os.unlink(self.path)
        os.unlink(self.path + ".other")


@contextlib.contextmanager
def mounted(options: str) -> Iterator[str]:
    """Have a new directory mounted with those options for a while."""
    base = tempfile.mkdtemp(prefix="fusewire-fsx-")
    source, target = os.path.join(base, "source"), os.path.join(base, "target")
    os.mkdir(source)
    os.mkdir(target)
    command = [sys.executable, "-m", "fusewire"]
    try:
        subprocess.run([*command, "mount", source, target, "-o", options], check=True)
        try:
            yield target
        finally:
            subprocess.run([*command, "umount", target], check=True)
    finally:
        if not os.path.ismount(target):
            shutil.rmtree(base)


def exercise(directory: str, seed: int, operations: int, *, mapped: bool = True, direct: bool = True) -> str:
    """Exercise a new file in `directory`; give a line that says what was done. Raises Difference."""
    one = Exerciser(os.path.join(directory, f"fsx-{os.getpid()}"), seed, mapped=mapped, direct=direct)
    try:
        one.run(operations)
    finally:
        one.close()
    missing = f", without {', '.join(sorted(one.missing))}" if one.missing else ""
    return f"{one.done} operations of {len(one.counts)} kinds, seed {seed}: as the model{missing}"


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 1 if there was a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--no-mmap", action="store_true", help="no shared mappings")
    parser.add_argument("--no-direct", action="store_true", help="no O_DIRECT")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--directory", help="where the file is made")
    where.add_argument("--mount", metavar="OPTIONS", help="mount a directory of its own with these -o options")
    chosen = parser.parse_args(arguments)
    place = mounted(chosen.mount) if chosen.mount is not None else contextlib.nullcontext(chosen.directory)
    try:
        with place as directory:
            print(
                exercise(
                    directory,
                    chosen.seed,
                    chosen.operations,
                    mapped=not chosen.no_mmap,
                    direct=not chosen.no_direct,
                )
            )
    except Difference as difference:
        print(f"{difference}\nto repeat it: --seed {chosen.seed} --operations {chosen.operations}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
