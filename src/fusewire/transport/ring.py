"""Split virtqueues, device side: takes requests from a guest's rings, puts them back used.

Layer `transport`, over memoryviews of mapped guest memory and nothing else: no descriptors, no threads, no system
calls. What kicks and calls are made with, and who maps and unmaps the memory, is the transport's.
Virtio 1.2, 2.7 "Split Virtqueues"; the section numbers below are that document's.

**The driver is hostile.** It may write to all of its memory at any time. So a descriptor is read once, into Python
integers, and only those are checked and used; an indirect table is read once as a whole. What is wrong with one chain
is said in that chain (`Chain.bad`), and the next one is served as if nothing had been. Only indices that run away end
the ring (RingError). A head that comes again while it is in flight is served again (while a log is kept: is bad), and
comes back as often as it was made available; what the driver makes of that is the driver's.

**Memory ordering.** An index is one aligned 16-bit word, loaded and stored as such. Python keeps its own order, so what
remains is the processor's. There are four places (2.7.13, 2.7.14 and the notification sections 2.7.7, 2.7.10):
avail.idx is loaded before what it announces, used elements are stored before used.idx (load-load and store-store: x86
keeps both by itself), used.idx is stored before used_event is loaded, and avail_event before avail.idx is looked at
again (store-load: every processor reorders these). A fence is the release and the acquisition of a lock that is held
all the time (a POSIX semaphore or an atomic byte, by the interpreter's version). On x86 each of the two is a locked
instruction, a full barrier. On arm64 the first is an atomic with release semantics and the second one with acquire
semantics: what stands before the release is done before it, what stands behind the acquisition comes after it, and an
acquisition does not overtake a release before it (RCsc), so nothing passes from one side to the other. The first two
places need it only where `strong_ordering` is not said, that is not on x86.
Big-endian hosts are refused before anything comes here: words are loaded natively and virtio is little-endian.

One thread may take from a queue while another puts back: `pop`, `sleep` and `wake` are one side, `push` and `publish`
the other. Two threads on the same side need a lock of their own, and `start`, `stop`, `remap` and `set_log` need both.
"""

from __future__ import annotations

from _thread import allocate_lock
from struct import Struct
from typing import TYPE_CHECKING

from fusewire.transport.chain import Chain
from fusewire.transport.guest_memory import BadAddress, GuestMemory, Log, Region
from fusewire.transport.inflight import Inflight, InflightError
from fusewire.transport.pages import FEWEST, LONGEST, gather, in_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Pages

__all__ = ["MOST_ENTRIES", "BadAddress", "Chain", "GuestMemory", "Log", "Queue", "Region", "RingError"]

# struct virtq_desc: le64 addr, le32 len, le16 flags, le16 next. Flags and next as one number are called the link.
_DESC = Struct("<QIHH").unpack_from
_PLACES = Struct("<QI4x").iter_unpack
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_DESC_SIZE = 16

_NO_INTERRUPT = 1  # VIRTQ_AVAIL_F_NO_INTERRUPT
_NO_NOTIFY = 1  # VIRTQ_USED_F_NO_NOTIFY

MOST_ENTRIES = 32768
"""The longest ring, and the longest indirect table: 2.7.5.3.1 wants chains no longer than the ring whatever they are
made of, but Linux's virtiofs builds longer ones on a small ring, and every other device takes them."""

# 2.7.5.2: no chain is longer than 2^32 bytes in total, and used.len must be able to say how much was written.
_MOST_BYTES = (1 << 32) - 1

# Tables of up to so many entries have a struct of their own, which reads them in one go.
_SHORT = 16
_FOUR = 4 * _DESC_SIZE
_SHORT_TABLES = {_DESC_SIZE * n: Struct("<" + "QII" * n).unpack_from for n in range(1, _SHORT + 1)}
_READ_FOUR = _SHORT_TABLES[_FOUR]
# How many forms of short tables a queue remembers. Honest drivers have a dozen.
_MOST_SHAPES = 64


class RingError(Exception):
    """A ring that cannot be used, or not any more; str says what is wrong with it."""


class _BadChain(Exception):  # noqa: N818 - it is an answer
    """A chain that cannot be used; str says why."""


def _too_long() -> _BadChain:
    return _BadChain(f"a chain of more than {_MOST_BYTES} bytes")


class Queue:
    """One virtqueue. Without `start`, and after `stop`, it is always empty and what is pushed goes nowhere.

    `last_avail` is the number (of 16 bits) of the next request to be taken, `size` the ring's, 0 while stopped.
    """

    # fmt: off
    __slots__ = (
        "_acquire", "_addresses", "_again", "_avail", "_base", "_called", "_desc", "_elements", "_event_idx",
        "_event_wanted", "_event_word", "_heads", "_indirect", "_inflight", "_limit", "_log", "_marks", "_mask",
        "_memory", "_offset", "_published", "_quiet", "_release", "_seen", "_shapes", "_tables", "_tracked",
        "_used", "_used_log", "_view", "_weak", "_words", "last_avail", "size",
    )
    # fmt: on

    def __init__(
        self, *, indirect: bool, event_idx: bool, log: Log | None = None, strong_ordering: bool = False
    ) -> None:
        """Make a queue by what was negotiated: VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VHOST_F_LOG_ALL.

        `strong_ordering` says that the processor is an x86 (TSO): two fences fewer for each request.
        """
        held = allocate_lock()
        held.acquire()
        self._release = held.release
        self._acquire = held.acquire
        self._weak = not strong_ordering
        self._event_idx = event_idx
        self._indirect = indirect
        # A table's length -> what reads it. Where there is a log, `pop` has no short way.
        self._tables: dict[int, Callable[..., tuple[int, ...]]] = _SHORT_TABLES if indirect and log is None else {}
        # Links of a short table in the usual order -> how many of its entries are readable.
        self._shapes: dict[tuple[int, ...], int] = {}
        self._log = log
        self._used_log: int | None = None
        # While there is a log: head -> how often it is in flight, and where its chain may be written to.
        self._marks: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._inflight: Inflight | None = None
        self._tracked = False
        # Heads that come again after a restart, the oldest last.
        self._again: list[int] = []
        self.last_avail = 0
        self._used = 0
        self._idle()

    def start(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        base: int,
        *,
        used_log: int | None = None,
        inflight: memoryview | None = None,
    ) -> None:
        """Serve the ring of `size` entries at three addresses of the front end's, from available index `base` on.

        The used index goes on from what the ring says. `used_log` is the guest-physical address under which the used
        ring is logged (VHOST_VRING_F_LOG). `inflight` is this queue's region of the front end's in-flight buffer (see
        inflight.py): the requests that it holds come first again, oldest first, and `base` counts only if it is new.
        A queue may be started again when all that it gave before has been pushed: take a new one otherwise.
        Raises RingError, and is stopped then.
        """
        self._idle()
        if size <= 0 or size & (size - 1) or size > MOST_ENTRIES:
            raise RingError(f"a ring of {size} entries: it must be a power of two up to {MOST_ENTRIES}")
        for name, address, alignment in (
            ("descriptor table", desc, 16),
            ("available ring", avail, 2),
            ("used ring", used, 4),
        ):
            if address % alignment:
                raise RingError(f"the {name}'s address {address:#x} is not aligned to {alignment} bytes")
        if not 0 <= base <= 0xFFFF:
            raise RingError(f"index {base} of the available ring is no 16-bit number")
        self.size = size
        self._mask = size - 1
        self._addresses = (desc, avail, used)
        self._event_wanted = 2 + size  # used_event: the word behind the available ring
        self._event_word = 2 + 4 * size  # avail_event: the word behind the used ring
        self._used_log = used_log
        self.remap(memory)
        self._used = self._published = self._words[1]
        self._called = False
        self.last_avail = base
        if inflight is not None:
            try:
                self._inflight = Inflight(inflight, size)
            except InflightError as error:
                self._idle()
                raise RingError(str(error)) from error
            heads = self._inflight.resume(self._used, self._avail[1])
            if heads is not None:
                self._again = heads[::-1]
                self.last_avail = (self._used + len(heads)) & 0xFFFF
        self._seen = self.last_avail
        self._offset = (self.last_avail - self._used) - len(self._again)
        self._tracked = self._inflight is not None or self._log is not None
        self._quiet = True
        self._set_quiet(False)

    def remap(self, memory: GuestMemory) -> None:
        """Go on in other memory, where the rings are at the same addresses. Chains in flight keep the old one.

        Raises RingError if the rings are not there; the queue is stopped then.
        """
        if not self.size:
            return
        desc, avail, used = self._addresses
        size, event = self.size, 2 if self._event_idx else 0
        views = []
        for name, address, length in (
            ("descriptor table", desc, _DESC_SIZE * size),
            ("available ring", avail, 4 + 2 * size + event),
            ("used ring", used, 4 + 8 * size + event),
        ):
            try:
                views.append(memory.at_user(address, length))
            except BadAddress as error:
                self._idle()
                raise RingError(f"the {name} is not in memory: {error}") from error
        self._memory = memory
        self._desc = views[0]
        self._avail = views[1].cast("H")
        self._heads = self._avail[2 : 2 + size]
        self._words = views[2].cast("H") if event else views[2][:4].cast("H")
        self._elements = views[2][4 : 4 + 8 * size].cast("Q")
        # The region that was used last: most requests lie in one.
        self._base, self._limit, _, self._view, _ = memory.regions[0]

    def stop(self) -> int:
        """Stop, let go of all memory, and give the index of the next available request (for GET_VRING_BASE).

        What was pushed is published before. Chains that are in flight keep their memory; push them in vain or drop
        them. Where there is an in-flight region they come again at the next start.
        """
        self.publish()
        self._idle()
        return self.last_avail

    def _idle(self) -> None:
        """Stand on a ring of our own, of one entry, always empty: nothing on a request's way asks whether we run."""
        self.size = 0
        self._mask = 0
        self._addresses = (0, 0, 0)
        self._memory = GuestMemory(())
        self._desc = memoryview(bytearray(_DESC_SIZE))
        self._avail = memoryview(bytearray(8)).cast("H")
        self._avail[1] = self.last_avail
        self._avail[0] = _NO_INTERRUPT
        self._heads = self._avail[2:3]
        self._words = memoryview(bytearray(14)).cast("H")
        self._elements = memoryview(bytearray(8)).cast("Q")
        self._event_wanted = 3
        self._event_word = 6
        self._base, self._limit, self._view = 0, 0, memoryview(b"")
        self._seen = self.last_avail
        self._published = self._used
        self._called = True
        self._quiet = False
        self._again = []
        self._offset = 0
        self._marks.clear()
        self._inflight = None
        self._tracked = False

    @property
    def in_flight(self) -> int:
        """How many requests were popped and not pushed."""
        if not self.size:
            return 0
        return (self.last_avail - self._used - self._offset - len(self._again)) & 0xFFFF

    def set_log(self, log: Log | None, used_log: int | None = None) -> None:
        """Begin to log, or end it, while nothing is in flight. Raises ValueError otherwise.

        Where a chain lies is not remembered without a log: drain the queue before a migration begins.
        """
        if self.in_flight:
            raise ValueError(f"{self.in_flight} requests are in flight: logging begins between requests only")
        self._log = log
        self._used_log = used_log
        self._tables = _SHORT_TABLES if self._indirect and log is None else {}
        self._tracked = bool(self.size) and (log is not None or self._inflight is not None)

    def pop(self) -> Chain | None:
        """Take the next available request; None if there is none.

        Raises RingError if the driver's index has run away: the ring can only be stopped.
        """
        last = self.last_avail
        if last == self._seen:
            if self._again:
                head = self._again.pop()
                return self._walk(head, _DESC(self._desc, head << 4))
            # One look for as many requests as there are: the driver's line of the cache is in its hands meanwhile.
            seen = self._avail[1]
            if seen == last:
                return None
            if (seen - last) & 0xFFFF > self.size or (seen - self._used - self._offset) & 0xFFFF > self.size:
                raise RingError(
                    f"available index {seen} where {last} is next and {self.in_flight} are in flight: "
                    f"more than the ring's {self.size} entries"
                )
            self._seen = seen
            if self._weak:
                self._release()
                self._acquire()
        self.last_avail = (last + 1) & 0xFFFF
        head = self._heads[last & self._mask]
        if head >= self.size:
            return Chain(head, [], [], f"descriptor {head} of a ring of {self.size}")
        if self._inflight is not None:
            self._inflight.take(head)
        first = _DESC(self._desc, head << 4)
        address, length, flags, _ = first
        # The way of nearly all requests: one short indirect table, its entries in order, all in the region used last.
        # What does not look like that is read afresh by `_walk`; nothing that was read of a table is believed there.
        if flags & _INDIRECT and not flags & _NEXT and length in self._tables:
            base, limit, view = self._base, self._limit, self._view
            start = address - base
            if start < 0 or start + length > limit:
                return self._walk(head, first)
            if length == _FOUR:
                # Header and arguments, header and answer: as below in a loop, at half the time.
                a, a_size, a_link, b, b_size, b_link, c, c_size, c_link, d, d_size, d_link = _READ_FOUR(view, start)
                if a_link == 0x10001 and b_link == 0x20001 and c_link == 0x30003 and d_link & 7 == _WRITE:
                    a -= base
                    b -= base
                    c -= base
                    d -= base
                    a_end = a + a_size
                    b_end = b + b_size
                    c_end = c + c_size
                    d_end = d + d_size
                    if (
                        (0 <= a < a_end <= limit and 0 <= b < b_end <= limit)
                        and (0 <= c < c_end <= limit and 0 <= d < d_end <= limit)
                        and a_size + b_size + c_size + d_size <= _MOST_BYTES
                    ):
                        return Chain(head, [view[a:a_end], view[b:b_end]], [view[c:c_end], view[d:d_end]])
                return self._walk(head, first)
            fields = self._tables[length](view, start)
            readable = self._shapes.get(fields[2::3])
            lengths = fields[1::3]
            if readable is not None and sum(lengths) <= _MOST_BYTES:
                pieces: list[memoryview] = []
                for place, size in zip(fields[::3], lengths, strict=False):
                    start = place - base
                    stop = start + size
                    if not 0 <= start < stop <= limit:
                        break
                    pieces.append(view[start:stop])
                else:
                    return Chain(head, pieces[:readable], pieces[readable:])
        return self._walk(head, first)

    def _walk(self, head: int, first: tuple[int, ...]) -> Chain:
        """Take any chain whose first descriptor has been read, also those that `pop` has a short way for."""
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        places: list[tuple[int, int]] = []
        pages: list[tuple[Pages, bool]] = []
        bad = ""
        try:
            self._follow(first, readable, writable, places, pages)
        except (_BadChain, BadAddress) as error:
            bad = str(error)
        if self._log is not None:
            # One head out twice: nobody could tell which chain comes back, and what of memory was written to.
            count, before = self._marks.get(head, (0, places))
            if count:
                bad = bad or f"descriptor {head} is in flight already"
            self._marks[head] = count + 1, before
        if bad:
            return Chain(head, [], [], bad)
        return Chain(head, readable, writable, "", *pages[0]) if pages else Chain(head, readable, writable)

    def _follow(
        self,
        first: tuple[int, ...],
        readable: list[memoryview],
        writable: list[memoryview],
        places: list[tuple[int, int]],
        pages: list[tuple[Pages, bool]],
    ) -> None:
        """Follow a chain from its first descriptor to its end. Raises _BadChain and BadAddress."""
        table, count, left = self._desc, self.size, self.size
        inner = writing = False
        out, total = readable, 0
        base, limit, view, log = self._base, self._limit, self._view, self._log
        address, length, flags, following = first
        while True:
            if flags & (_INDIRECT | _WRITE):
                if flags & _INDIRECT:
                    # 2.7.5.3.2: alone or behind ordinary descriptors, always the last; its own WRITE says nothing.
                    if inner:
                        raise _BadChain("an indirect table within an indirect table")
                    if not self._indirect:
                        raise _BadChain("an indirect table, which was not negotiated")
                    if flags & _NEXT:
                        raise _BadChain("an indirect table that has a next descriptor")
                    count, rest = divmod(length, _DESC_SIZE)
                    if rest or not 0 < count <= MOST_ENTRIES:
                        raise _BadChain(f"an indirect table of {length} bytes")
                    # The only copy: the driver may go on writing to the table.
                    copy = b"".join(self._memory.slices(address, length))
                    straight = _SHORT < count <= LONGEST and not total and not writing and log is None
                    if straight and self._join(copy, readable, writable, pages):
                        return
                    table = memoryview(copy)
                    left, inner = count, True
                    address, length, flags, following = _DESC(table, 0)
                    continue
                if not writing:
                    writing, out = True, writable
            elif writing:
                raise _BadChain("a readable descriptor behind a writable one")
            if length:
                total += length
                start = address - base
                stop = start + length
                if start < 0 or stop > limit:
                    base, limit, _, view, _ = self._memory.find(address)
                    start = address - base
                    stop = start + length
                if stop <= limit:
                    out.append(view[start:stop])
                else:
                    out += self._memory.slices(address, length)
                if log is not None and writing:
                    places.append((address, length))
            if not flags & _NEXT:
                break
            if following >= count:
                raise _BadChain(f"a next descriptor {following} of {count}")
            left -= 1
            if not left:
                raise _BadChain(f"more than {count} descriptors in a chain: a loop")
            address, length, flags, following = _DESC(table, following << 4)
        self._base, self._limit, self._view = base, limit, view
        if total > _MOST_BYTES:
            raise _too_long()
        if inner and count <= _SHORT:
            self._learn(table)

    def _learn(self, table: memoryview) -> None:
        """Remember the form of a short table which has been followed to its end, if its entries are all in order."""
        links = _SHORT_TABLES[len(table)](table)[2::3]
        if any(not link & _NEXT or link >> 16 != i for i, link in enumerate(links[:-1], 1)):
            return
        if len(self._shapes) >= _MOST_SHAPES:
            self._shapes.clear()
        self._shapes[links] = sum(not link & _WRITE for link in links)

    def _join(
        self,
        table: bytes,
        readable: list[memoryview],
        writable: list[memoryview],
        pages: list[tuple[Pages, bool]],
    ) -> bool:
        """Take a long indirect table whose entries are in order: that of a READ or WRITE of many pages.

        The pages become one array for preadv(2), where memory has a window. Otherwise those that lie behind one
        another are joined: a third of the general way's time. False, and nothing taken, for a table of any other
        order; then `_follow` finds out what is wrong with it, if anything is. Raises BadAddress.
        """
        readables = in_order(table)
        if readables < 0:
            return False
        memory, base, limit, view = self._memory, self._base, self._limit, self._view
        turn = _DESC_SIZE * readables
        for part, out in ((table[:turn], readable), (table[turn:], writable)):
            begin = end = 0
            # Behind the header and arguments that a request begins with, and the header of an answer.
            first = _DESC_SIZE * (2 if out is readable else 1)
            if len(part) >= _DESC_SIZE * FEWEST and not pages:
                rest = gather(part[first:], memory)
                if rest is not None:
                    pages.append((rest, out is readable))
                    part = part[:first]
            for address, length in _PLACES(part):
                start = address - base
                if start == end:
                    end += length
                    continue
                if 0 <= begin < end <= limit:
                    out.append(view[begin:end])
                elif begin != end:
                    begin, end = begin + base, end + base
                    out += memory.slices(begin, end - begin)
                    base, limit, _, view, _ = memory.find(begin)
                    start = address - base
                begin = start
                end = start + length
            out += memory.slices(begin + base, end - begin)
        total = sum(map(len, readable)) + sum(map(len, writable))
        if total + (pages[0][0].nbytes if pages else 0) > _MOST_BYTES:
            raise _too_long()
        self._base, self._limit, self._view = base, limit, view
        return True

    def push(self, head: int, written: int) -> None:
        """Give a request back, with how many bytes of its writable pieces were written. `publish` shows it."""
        used = self._used
        self._elements[used & self._mask] = written << 32 | head  # struct virtq_used_elem: le32 id, le32 len
        self._used = (used + 1) & 0xFFFF
        if self._tracked:
            self._note(head, written)

    def _note(self, head: int, written: int) -> None:
        if self._inflight is not None:
            self._inflight.push(head)
        if self._log is None:
            return
        count, places = self._marks.pop(head, (0, []))
        if count > 1:
            self._marks[head] = count - 1, places
        left = written
        for address, length in places:
            if left <= 0:
                break
            self._log.mark(address, min(length, left))
            left -= length

    def publish(self) -> bool:
        """Let the driver see what was pushed; tell whether it wants a call for that (2.7.7, 2.7.10).

        With event_idx: whether the used index has passed used_event since the last look, and always at the first.
        """
        used, before = self._used, self._published
        if used == before:
            return False
        if self._weak:
            self._release()
            self._acquire()
        self._words[1] = used
        self._published = used
        if self._tracked:
            self._settle(used, before)
        self._release()
        self._acquire()
        if not self._event_idx:
            return not self._avail[0] & _NO_INTERRUPT
        event = self._avail[self._event_wanted]
        if not self._called:
            self._called = True
            return True
        return (used - event - 1) & 0xFFFF < (used - before) & 0xFFFF

    def _settle(self, used: int, before: int) -> None:
        if self._inflight is not None:
            self._inflight.settle(used)
        if self._log is None or self._used_log is None:
            return
        first, count = before & self._mask, (used - before) & 0xFFFF
        straight = min(count, self.size - first)
        self._log.mark(self._used_log + 4 + 8 * first, 8 * straight)
        if count > straight:
            self._log.mark(self._used_log + 4, 8 * (count - straight))
        self._log.mark(self._used_log + 2, 2)

    def sleep(self) -> bool:
        """Ask the driver for a kick at its next request; False if there is one already, and no kick may come for it.

        With event_idx: avail_event says which one (2.7.10). Otherwise VIRTQ_USED_F_NO_NOTIFY is taken back (2.7.7).
        """
        last = self.last_avail
        if self._event_idx:
            word = self._event_word
            self._words[word] = last
            if self._log is not None:
                self._mark_word(word)
        else:
            self._set_quiet(False)
        if last != self._seen or self._again:
            return False
        self._release()
        self._acquire()
        return self._avail[1] == last

    def wake(self) -> None:
        """Tell the driver that no kicks are needed. With event_idx nothing has to be said."""
        if not self._event_idx:
            self._set_quiet(True)

    def _set_quiet(self, quiet: bool) -> None:
        if quiet is not self._quiet:
            self._quiet = quiet
            self._words[0] = _NO_NOTIFY if quiet else 0
            if self._log is not None:
                self._mark_word(0)

    def _mark_word(self, word: int) -> None:
        if self._log is not None and self._used_log is not None:
            self._log.mark(self._used_log + 2 * word, 2)
