"""What compressed archives need of the system: temporary files, a thread for reads that take long, and rapidgzip.

Layer `fs`, beside `formats.archive_streams`, whose `Store` and `Reader` these are.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock

from fusewire.formats.archive_streams import ArchiveError, damaged
from fusewire.ops import Pending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from fusewire.formats.archive_streams import Reader
    from fusewire.ops import Buffer

SPOOL_SIZE = 32 << 30  # bytes that a mount may decompress to temporary files, unless told otherwise
_CHECKED = 64 << 20  # bytes between looks at what is free
_PIECE = 512 << 10  # compressed bytes between the places where rapidgzip can begin, at least; at most 8 times that
_PIECES = 512
_THREADS = 4
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


class Spool:
    """How much all temporary files of a mount may take, and where they are: they have no name, and end with the mount.

    A twentieth of the filesystem is always left free.
    """

    __slots__ = ("_left", "_lock", "_places", "limit")

    def __init__(self, places: list[str], limit: int = SPOOL_SIZE) -> None:
        """Use the first of the directories `places` in which a file can be made."""
        self._places = places
        self._left = limit
        self.limit = limit
        self._lock = allocate_lock()

    def file(self) -> SpoolFile:
        """Make a file. Raises OSError if that is possible nowhere."""
        failure: OSError | None = None
        for place in self._places:
            try:
                return SpoolFile(self, _unnamed(place), place)
            except OSError as error:
                failure = failure or error
        raise OSError(
            failure.errno if failure else errno.ENOENT,
            f"no temporary file can be made in {' or '.join(self._places)}, which reading this archive needs: "
            "set TMPDIR to a directory with room",
        )

    def take(self, length: int) -> None:
        """Count `length` bytes more. Raises ArchiveError beyond the limit."""
        with self._lock:
            self._left -= length
            if self._left >= 0:
                return
            self._left += length
        raise ArchiveError(
            errno.EFBIG,
            f"more than {self.limit} bytes of its data would have to be decompressed to a temporary file, as they can "
            "only be reached through all that is before them: allow more (spool_size), or compress it so that it can "
            "be read anywhere: gzip, `xz -T0`, or zstd in frames",
        )

    def give(self, length: int) -> None:
        """Take `length` bytes off the count."""
        with self._lock:
            self._left += length


def _unnamed(place: str) -> int:
    try:
        return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    import tempfile

    fd, name = tempfile.mkstemp(prefix="fusewire-", dir=place)
    os.unlink(name)
    return fd


class SpoolFile:
    """A temporary file that grows at its end. Owns its descriptor `fd`, closed when nobody has the object any more."""

    __slots__ = ("_checked", "_place", "_size", "_spool", "fd")

    def __init__(self, spool: Spool, fd: int, place: str) -> None:
        self._spool = spool
        self.fd = fd
        self._place = place
        self._size = 0
        self._checked = 0

    def append(self, data: bytes) -> None:
        """Write at the end. Raises ArchiveError beyond the limit, OSError(ENOSPC) when the disk is nearly full."""
        if self._size >= self._checked:
            self._checked = self._size + _CHECKED
            free = os.fstatvfs(self.fd)
            if free.f_bavail * free.f_frsize < _CHECKED + free.f_blocks * free.f_frsize // 20:
                raise OSError(errno.ENOSPC, f"{self._place} is full; set TMPDIR to a directory with more room")
        self._spool.take(len(data))
        view = memoryview(data)
        written = 0
        while written < len(data):
            written += os.pwrite(self.fd, view[written:], self._size + written)
        self._size += len(data)

    def pread(self, offset: int, length: int) -> bytes:
        """Read what has been written."""
        return os.pread(self.fd, length, offset)

    def __del__(self) -> None:
        self._spool.give(self._size)
        os.close(self.fd)


class Filled:
    """What is stored of a part of a sparse file, in the shape of a `Reader` that gives the whole part."""

    __slots__ = ("_fill", "_reader", "approach", "ready")

    def __init__(self, reader: Reader, fill: Callable[[Sequence[Buffer]], Sequence[Buffer]]) -> None:
        """`fill` puts what `reader` gives between the holes."""
        self._reader = reader
        self._fill = fill
        self.ready = reader.ready
        self.approach = reader.approach

    @property
    def consumed(self) -> int:
        return self._reader.consumed

    def read(self, offset: int, length: int) -> Sequence[Buffer]:
        return self._fill(self._reader.read(offset, length))


class Waiting:
    """Reads that take long: one thread, started at the first of them, decompresses towards each in turn."""

    __slots__ = ("_closed", "_jobs", "_lock", "_running")

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._jobs: list[tuple[Reader, int, int, Pending, Callable[[OSError], OSError]]] = []
        self._running = False
        self._closed = False

    def add(self, reader: Reader, offset: int, size: int, told: Callable[[OSError], OSError]) -> Pending:
        """Have a range read; the answer comes later. Who waits for it may give up: EINTR."""
        pending = Pending()
        pending.interrupt = lambda: self._give_up(pending)
        with self._lock:
            self._jobs.append((reader, offset, size, pending, told))
            start = not self._running
            self._running = True
        if start:
            import threading

            try:
                threading.Thread(target=self._work, name="archive", daemon=True).start()
            except RuntimeError:
                self._work()  # no thread to be had (RLIMIT_NPROC): this one does it
        return pending

    def _give_up(self, pending: Pending) -> None:
        with self._lock:
            self._jobs = [job for job in self._jobs if job[3] is not pending]
        pending.fail(InterruptedError(errno.EINTR, "interrupted"))

    def _work(self) -> None:
        turn = 0
        while True:
            with self._lock:
                if not self._jobs or self._closed:
                    self._running = False
                    return
                turn += 1
                job = self._jobs[turn % len(self._jobs)]
            reader, offset, size, pending, told = job
            try:
                if not reader.approach(offset, size):
                    continue
                result = reader.read(offset, size)
            except OSError as error:
                pending.fail(told(error))
            except MemoryError:
                pending.fail(told(OSError(errno.ENOMEM, "not enough memory to decompress it")))
            else:
                pending.complete(result)
            with self._lock:
                if job in self._jobs:
                    self._jobs.remove(job)

    def close(self) -> None:
        """Let nothing more be begun, and answer who waits."""
        with self._lock:
            self._closed = True
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job[3].fail(OSError(errno.ENOTCONN, "unmounted"))


class _Positioned:
    """What rapidgzip reads from. It gets no descriptor: it would open that anew, by a path that a sandbox lacks."""

    __slots__ = ("_position", "_pread", "_size")

    def __init__(self, pread: Callable[[int, int], bytes], size: int) -> None:
        self._pread = pread
        self._size = size
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def write(self, data: bytes) -> int:
        raise OSError(errno.EBADF, "archives are only read")

    @property
    def closed(self) -> bool:
        return False

    def close(self) -> None:
        return

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def read(self, length: int = -1) -> bytes:
        data = self._pread(self._position, length if length >= 0 else max(0, self._size - self._position))
        self._position += len(data)
        return data


class Native:
    """A gzip or bzip2 file through rapidgzip, which decompresses on several processors and can begin anywhere.

    It has threads of its own, so none is started before the first read, and `close` ends them: between building the
    index and serving, the process may have to be single-threaded (user_namespaces(7)).
    """

    __slots__ = ("_file", "_index", "_kind", "_lock", "_pread", "_size", "consumed")

    def __init__(self, pread: Callable[[int, int], bytes], size: int, kind: str, index: bytes = b"") -> None:
        """Read a file of `size` bytes; `index` is what `export` has given for it."""
        self._pread = pread
        self._size = size
        self._kind = kind
        self._index = index
        self._file: Any = None
        self._lock = allocate_lock()
        self.consumed = 0

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (RuntimeError, ValueError, ArithmeticError, LookupError, OSError) as error:
            self._file = None
            raise damaged(f"{error} (rapidgzip)") from None

    def _open(self) -> Any:
        import io

        module = rapidgzip()
        source = _Positioned(self._pread, self._size)
        if self._kind == "bz2":
            file = module.IndexedBzip2File(source, parallelization=0)
            if self._index:
                import json

                file.set_block_offsets({int(bits): offset for bits, offset in json.loads(self._index).items()})
        else:
            # It keeps 16 of these decompressed, and begins at one of them: its own 4 MiB took 290 MiB and 14 ms a read.
            piece = min(max(_PIECE, self._size // _PIECES), 8 * _PIECE)
            # Decompressing from unknown places is twice the work: two processors would gain nothing by it.
            threads = min(os.cpu_count() or 1, _THREADS)
            file = module.RapidgzipFile(source, parallelization=threads if threads > 2 else 1, chunk_size=piece)
            if self._index:
                file.import_index(io.BytesIO(self._index))
        return file

    def ready(self, offset: int, length: int) -> bool:
        """Never sure."""
        return False

    def approach(self, offset: int, length: int) -> bool:
        """The library finds its way quickly."""
        return True

    def read(self, offset: int, length: int) -> list[bytes]:
        """Give up to `length` bytes; fewer at the end. Raises ArchiveError."""

        def work() -> list[bytes]:
            if self._file is None:
                self._file = self._open()
            file = self._file
            if file.tell() != offset:
                file.seek(offset)
            parts = []
            left = length
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
            self.consumed = file.tell_compressed() // 8
            return parts

        with self._lock:
            found: list[bytes] = self._guarded(work)
            return found

    def export(self) -> bytes:
        """Give an index of the places to begin at, after everything was read."""
        import io

        def work() -> bytes:
            if self._kind == "bz2":
                import json

                return json.dumps(self._file.block_offsets()).encode()
            out = io.BytesIO()
            self._file.export_index(out, rapidgzip().IndexFormat.GZTOOL)  # a fifth of the other format's 32 KiB a point
            return out.getvalue()

        with self._lock:
            if self._file is None:
                return self._index
            self._index = self._guarded(work)
            return self._index

    def close(self) -> None:
        """End the library's threads; the next read starts them again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def rapidgzip() -> Any:
    """Import the library of the extra `archives`. Raises ImportError."""
    from importlib import import_module

    return import_module("rapidgzip")
