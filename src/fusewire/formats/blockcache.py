"""Byte-bounded caches for blocks that never change, shared by threads; formats layer, no I/O of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["BlockCache", "Generations"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

ENTRY_OVERHEAD = 256  # bytes that an entry costs beside its data: key tuple, its ints, dict slot, bytes header


class BlockCache(Generic[Key]):
    """Least recently used blocks up to a number of bytes; two threads that want the same block make it once."""

    __slots__ = ("_blocks", "_lock", "_making", "capacity", "held", "hits", "misses")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0  # bytes, with ENTRY_OVERHEAD for each block
        self.hits = 0
        self.misses = 0
        self._lock = Lock()
        self._blocks: OrderedDict[Key, bytes] = OrderedDict()
        self._making: dict[Key, Lock] = {}  # the lock is held while its block is being made

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: Key) -> bool:
        """Whether `load` would answer at once, or is already at work on it: what a prefetcher asks before queueing."""
        return key in self._blocks or key in self._making

    def load(self, key: Key, make: Callable[[Key], bytes]) -> bytes:
        """The block of `key`, made by `make(key)` outside the lock unless it is held or another thread makes it.

        What `make` raises is raised to the thread that ran it; threads that waited for it then try for themselves.
        """
        lock = self._lock
        while True:
            with lock:
                block = self._blocks.get(key)
                if block is not None:
                    self._blocks.move_to_end(key)
                    self.hits += 1
                    return block
                maker = self._making.get(key)
                if maker is None:
                    maker = self._making[key] = Lock()
                    maker.acquire()
                    self.misses += 1
                    break
            with maker:
                pass
        try:
            block = make(key)
            with lock:
                self._hold(key, block)
        finally:
            with lock:
                del self._making[key]
            maker.release()
        return block

    def _hold(self, key: Key, block: bytes) -> None:
        cost = len(block) + ENTRY_OVERHEAD
        if cost > self.capacity:
            return
        self._blocks[key] = block
        self.held += cost
        while self.held > self.capacity:
            self.held -= len(self._blocks.popitem(last=False)[1]) + ENTRY_OVERHEAD


class Generations(Generic[Key, Value]):
    """A bounded dict whose hits cost one dict look-up and no lock: entries not used for a whole generation are dropped.

    `young.get(key)` is the hot path, by the caller itself; `get` also finds what is old and makes it young again.
    It never holds more than `limit` entries. Exact order of use is given up for the 60 ns that a lock would cost.
    """

    __slots__ = ("_half", "_lock", "_old", "young")

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._lock = Lock()
        self.young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self.young) + len(self._old)

    def get(self, key: Key) -> Value | None:
        value = self.young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            self.young[key] = value
            if len(self.young) >= self._half:
                self._old = self.young
                self.young = {}
