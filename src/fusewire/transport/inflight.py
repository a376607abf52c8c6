"""The region in which a split virtqueue's requests in flight outlive the process that serves them.

Layer `transport`, beside ring.py, which is the only one to call this. It works on one queue's part of a buffer that
the front end keeps ("Inflight I/O tracking", vhost-user.rst; the messages are GET_INFLIGHT_FD and SET_INFLIGHT_FD).
It must not touch the rings, descriptors or anything with a system call in it.

    u64 features        0
    u16 version         1; 0 says that nobody has used the region yet
    u16 desc_num        the ring's size
    u16 last_batch_head the request pushed last; each `next` leads to the one pushed before it
    u16 used_idx        used.idx after the last batch whose `inflight` bytes are known to be cleared
    desc_num times:
        u8 inflight, 5 bytes of padding, u16 next, u64 counter

A process may end between any two stores. Whoever maps the region next sees all stores made until then, in order as far
as they matter: a store is never seen by another process of the same machine before one that the dead process had seen
done. So no fences are needed here.
"""

from __future__ import annotations

_HEADER = 16
_STATE = 16
# Queues' regions follow each other in one buffer. vhost-user.rst leaves a region's size to the back end; a multiple of
# a cache line keeps two queues' threads out of each other's lines, and every field aligned.
_ALIGNMENT = 64

# Indices of 16-bit words from the region's begin; `next` of entry i is word _NEXT + 8 * i.
_VERSION, _NUMBER, _LAST_BATCH, _USED, _NEXT = 4, 5, 6, 7, 11
# Entry i: `counter` is 64-bit word _COUNTER + 2 * i, `inflight` is byte _FLAG + 16 * i.
_COUNTER, _FLAG = 3, 16
_KNOWN_VERSION = 1
_U64 = (1 << 64) - 1


def inflight_size(queue_size: int) -> int:
    """Give the bytes that a queue of `queue_size` entries takes in the buffer: its region and padding behind it."""
    return -(-(_HEADER + _STATE * queue_size) // _ALIGNMENT) * _ALIGNMENT


class InflightError(ValueError):
    """A region that cannot be used; str says why."""


class Inflight:
    """One queue's region. `take`, `push` and `settle` are the protocol's steps, in the order of a request's life."""

    __slots__ = ("_batch", "_counter", "_counters", "_flags", "_size", "_words")

    def __init__(self, region: memoryview, size: int) -> None:
        """Use a region for a ring of `size` entries. Raises InflightError if it is too small or of another version."""
        end = _HEADER + _STATE * size
        if len(region) < end:
            raise InflightError(f"the in-flight region has {len(region)} bytes, a ring of {size} needs {end}")
        self._size = size
        self._flags = region[:end]
        self._words = self._flags.cast("H")
        self._counters = self._flags.cast("Q")
        self._counter = 0
        self._batch: list[int] = []
        version = self._words[_VERSION]
        if version > _KNOWN_VERSION:
            raise InflightError(f"the in-flight region is of version {version}, known is {_KNOWN_VERSION}")

    def resume(self, used: int, available: int) -> list[int] | None:
        """Give the heads in flight, oldest first; None if the region holds nothing about this ring and was cleared.

        `used` and `available` are the ring's two indices. Every request that was taken is in flight or used, so the
        ones taken were `used` plus the heads given, and `available` cannot be behind that or more than a ring's size
        ahead. A region that says otherwise was kept by the front end while the driver set up its ring anew.
        """
        words, size = self._words, self._size
        if words[_VERSION] == 0 or words[_NUMBER] != size:
            self._clear(used)
            return None
        # Published, but maybe not cleared: the last batch. A list that leads astray ends with the batch's count.
        pushed = (used - words[_USED]) & 0xFFFF
        head = words[_LAST_BATCH]
        for _ in range(min(pushed, size)):
            if head >= size:
                break
            self._flags[_FLAG + _STATE * head] = 0
            head = words[_NEXT + 8 * head]
        words[_USED] = used
        flags, counters = self._flags[_FLAG::_STATE], self._counters[_COUNTER::2]
        heads = [head for head in range(size) if flags[head]]
        if (available - used - len(heads)) & 0xFFFF > size:
            self._clear(used)
            return None
        heads.sort(key=counters.__getitem__)
        if heads:
            self._counter = (counters[heads[-1]] + 1) & _U64
        return heads

    def _clear(self, used: int) -> None:
        words = self._words
        words[_VERSION] = 0  # first: should we end in between, the next process clears again
        flags = self._flags
        for head in range(self._size):
            flags[_FLAG + _STATE * head] = 0
        words[_NUMBER] = self._size
        words[_LAST_BATCH] = 0
        words[_USED] = used
        words[_VERSION] = _KNOWN_VERSION

    def take(self, head: int) -> None:
        """Note that a request was taken from the available ring."""
        self._counters[_COUNTER + 2 * head] = self._counter
        self._flags[_FLAG + _STATE * head] = 1
        self._counter = (self._counter + 1) & _U64

    def push(self, head: int) -> None:
        """Note that a request has its used element, which the driver cannot see yet."""
        if head < self._size:  # a head that the ring does not have was never taken
            words = self._words
            words[_NEXT + 8 * head] = words[_LAST_BATCH]
            words[_LAST_BATCH] = head
            self._batch.append(head)

    def settle(self, used: int) -> None:
        """Note that `used` is published as used.idx: all that was pushed is with the driver."""
        flags = self._flags
        for head in self._batch:
            flags[_FLAG + _STATE * head] = 0
        self._batch.clear()
        self._words[_USED] = used
