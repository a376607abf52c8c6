"""Blocks of remote files: a bounded cache, ranges fetched side by side and once, and ahead of who reads in order.

Layer `fs`, part of `fs.remote`. It is given a `fetch(offset, length)` for each file and knows nothing of protocols,
retries or FUSE. Data of one version of a file never meet those of another: a `RemoteData` is one version.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fusewire.fs.remote.crew import Crew
    from fusewire.ops import Buffer

BLOCK_SIZE = 1 << 17
# The largest range that one request asks for, and the smallest one that is worth a request of its own beside others.
_MOST = 1 << 20
_LEAST = 1 << 18
# How far ahead of a reader in order, in bytes: twice as far each time, up to this.
_WINDOW = 4 << 20
_STREAMS = 8
_OVERHEAD = 200  # bytes that a block costs beside its data


class _Run:
    """Neighbouring blocks that one request fetches. `done` is held until it has ended, one way or the other."""

    __slots__ = ("data", "done", "error", "first", "owner", "stop")

    def __init__(self, owner: RemoteData, first: int, stop: int) -> None:
        self.owner = owner
        self.first = first
        self.stop = stop
        self.data = b""
        self.error: OSError | None = OSError(errno.EIO, "the request was given up")
        self.done = allocate_lock()
        self.done.acquire()


class Blocks:
    """Blocks of any number of files, together at most `capacity` bytes, and up to 1 MiB for each request under way.

    The least recently used ones go first. `crew`: threads for ranges side by side and ahead; without one each reader
    fetches its own, one after the other.
    """

    def __init__(self, capacity: int, block_size: int = BLOCK_SIZE, crew: Crew | None = None) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.crew = crew
        self.hits = 0  # blocks that were there, or on their way
        self.misses = 0
        self.requests = 0
        self.fetched = 0  # bytes
        self.held = 0  # bytes
        self._lock = allocate_lock()
        self._blocks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._flying: dict[tuple[int, int], _Run] = {}
        self._numbers = count(1)

    def statistics(self) -> dict[str, int]:
        """Give the counters, all since the beginning; sizes in bytes."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "requests": self.requests,
            "bytes_fetched": self.fetched,
            "bytes_held": self.held,
            "capacity": self.capacity,
        }

    def name(self) -> int:
        """Give a number that no other file has."""
        return next(self._numbers)

    def holds(self, owner: int, numbers: Iterable[int]) -> bool:
        """Tell whether all these blocks are here."""
        blocks = self._blocks
        return all((owner, number) in blocks for number in numbers)

    def claim(
        self, owner: RemoteData, first: int, last: int, dense: int, window: int
    ) -> tuple[dict[int, bytes], list[_Run], list[_Run]]:
        """Find the blocks first to last: those held, runs that somebody fetches already, and runs for the caller.

        dense: how many more blocks to add to what is missing at the end. window: how many to have fetched ahead.
        """
        name, blocks, flying = owner.number, self._blocks, self._flying
        held: dict[int, bytes] = {}
        shared: list[_Run] = []
        missing: list[int] = []
        with self._lock:
            for number in range(first, last + 1):
                key = (name, number)
                data = blocks.get(key)
                if data is not None:
                    blocks.move_to_end(key)
                    held[number] = data
                elif (run := flying.get(key)) is not None:
                    if not shared or shared[-1] is not run:
                        shared.append(run)
                else:
                    missing.append(number)
            self.hits += last + 1 - first - len(missing)
            self.misses += len(missing)
            if missing and missing[-1] == last:
                for number in range(last + 1, min(last + 1 + dense, owner.count)):
                    if (name, number) in blocks or (name, number) in flying:
                        break
                    missing.append(number)
            mine = self._runs(owner, missing)
            if window and self.crew is not None:
                self._ahead(owner, last + 1, min(last + 1 + window, owner.count), self.crew)
        return held, shared, mine

    def _runs(self, owner: RemoteData, missing: list[int]) -> list[_Run]:
        """Make runs of blocks, and say that they are on their way; the lock is held."""
        runs: list[_Run] = []
        size = self.block_size
        # Where threads can work side by side, what is large is cut, but not into crumbs.
        share = len(missing) * size // (self.crew.most if self.crew is not None else 1)
        most = max(min(max(share, _LEAST), _MOST) // size, 1)
        for number in missing:
            run = runs[-1] if runs else None
            if run is not None and run.stop == number and number - run.first < most:
                run.stop += 1
            else:
                run = _Run(owner, number, number + 1)
                runs.append(run)
            self._flying[owner.number, number] = run
        return runs

    def _ahead(self, owner: RemoteData, first: int, stop: int, crew: Crew) -> None:
        name = owner.number
        missing = [
            number
            for number in range(first, stop)
            if (name, number) not in self._blocks and (name, number) not in self._flying
        ]
        if 2 * len(missing) < stop - first:
            return  # wait until it is worth a request
        for run in self._runs(owner, missing):
            if not crew.submit(lambda run=run: self.fetch(run), spare=True):  # type: ignore[misc]
                for number in range(run.first, run.stop):
                    del self._flying[name, number]

    def fetch(self, run: _Run) -> None:
        """Fetch a run; what went wrong is said in it."""
        size, owner = self.block_size, run.owner
        offset = run.first * size
        length = min(run.stop * size, owner.size) - offset
        try:
            data = owner.fetch(offset, length)
            if len(data) != length:
                raise OSError(errno.EIO, f"{len(data)} bytes at {offset} where {length} were asked for")
            run.data, run.error = data, None
        except OSError as error:
            run.error = error
        finally:
            with self._lock:
                self.requests += 1
                self.fetched += len(run.data)
                for number in range(run.first, run.stop):
                    self._flying.pop((owner.number, number), None)
                if run.error is None and not owner.closed:
                    for number in range(run.first, run.stop):
                        start = (number - run.first) * size
                        self._put((owner.number, number), run.data[start : start + size])
            run.done.release()

    def put(self, owner: int, number: int, data: bytes) -> None:
        """Keep a block that came in another way."""
        with self._lock:
            self._put((owner, number), data)

    def _put(self, key: tuple[int, int], data: bytes) -> None:
        cost = len(data) + _OVERHEAD
        if cost > self.capacity or key in self._blocks:
            return
        self._blocks[key] = data
        self.held += cost
        while self.held > self.capacity:
            self.held -= len(self._blocks.popitem(last=False)[1]) + _OVERHEAD

    def drop(self, owner: int) -> None:
        """Forget all blocks of a file."""
        with self._lock:
            for key in [key for key in self._blocks if key[0] == owner]:
                self.held -= len(self._blocks.pop(key)) + _OVERHEAD


class RemoteData:
    """One version of a remote file: `fetch(offset, length)` gives exactly that range, or raises OSError.

    `dense`: a region (start, stop) of which much is read in small pieces; what is missing there is fetched in larger
    ones. `size` is the file's, in bytes.
    """

    __slots__ = ("_blocks", "_streams", "closed", "count", "dense", "fetch", "number", "size")

    def __init__(self, blocks: Blocks, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._blocks = blocks
        self.fetch = fetch
        self.size = size
        self.count = (size + blocks.block_size - 1) // blocks.block_size
        self.number = blocks.name()
        self.dense = (0, 0)
        self.closed = False
        self._streams: list[list[int]] = []  # [block that would come next, window in blocks]

    def ready(self, offset: int, length: int) -> bool:
        """Tell whether `read` would answer at once."""
        size = self._blocks.block_size
        end = min(offset + length, self.size)
        return not 0 <= offset < end or self._blocks.holds(self.number, range(offset // size, (end - 1) // size + 1))

    def pread(self, offset: int, length: int) -> bytes:
        """Give up to `length` bytes at `offset`, as pread(2) does. Raises what `fetch` raises."""
        return b"".join(self.read(offset, length))

    def read(self, offset: int, length: int) -> list[Buffer]:
        """As `pread`, in pieces that are not copied."""
        end = min(offset + length, self.size)
        if not 0 <= offset < end:
            return []
        blocks = self._blocks
        size = blocks.block_size
        first, last = offset // size, (end - 1) // size
        dense = _LEAST // size if self.dense[0] <= offset < self.dense[1] else 0
        held, shared, mine = blocks.claim(self, first, last, dense, self._window(first, last))
        crew = blocks.crew
        for run in mine[1:]:
            if crew is None or not crew.submit(lambda run=run: blocks.fetch(run)):  # type: ignore[misc]
                blocks.fetch(run)
        if mine:
            blocks.fetch(mine[0])
        for run in [*mine, *shared]:
            with run.done:
                pass
            if run.error is not None:
                error = run.error
                raise OSError(error.errno or errno.EIO, error.strerror or str(error)) from error
            for number in range(max(run.first, first), min(run.stop, last + 1)):
                start = (number - run.first) * size
                held[number] = run.data[start : start + size]
        parts: list[Buffer] = []
        for number in range(first, last + 1):
            data = held[number]
            start, stop = max(offset - number * size, 0), min(end - number * size, size)
            parts.append(data if stop - start == len(data) else memoryview(data)[start:stop])
        return parts

    def _window(self, first: int, last: int) -> int:
        """Tell how many blocks behind `last` to have fetched: none, unless somebody reads in order.

        Not under a lock: two readers at once may disturb a guess, no more.
        """
        streams = self._streams
        for stream in streams:
            if stream[0] - 1 <= first <= stream[0] + 1 and last + 1 >= stream[0]:
                if last + 1 > stream[0]:
                    stream[1] = min(max(2 * stream[1], 2), max(_WINDOW // self._blocks.block_size, 1))
                    stream[0] = last + 1
                return stream[1]
        streams.append([last + 1, 0])
        if len(streams) > _STREAMS:
            del streams[0]
        return 0

    def close(self) -> None:
        """Forget its blocks."""
        self.closed = True
        self._blocks.drop(self.number)
