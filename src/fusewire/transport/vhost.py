"""The device's side of vhost-user: what a front end (QEMU, Cloud Hypervisor, crosvm) says, and what follows from it.

Layer `transport`, sans-IO: one call, `Device.receive(header, payload, fds) -> reply`, made by one thread. It owns no
socket, no mapping, no eventfd and no thread; all of that is the `Backend`'s, each of whose methods is one clear action.
The device holds the protocol's state: features, memory layout, the set-up of each ring. It must not do I/O.

Whatever arrives, `receive` raises nothing but `Ending`, every descriptor that came along is handed to the backend or
closed, and what is refused has changed nothing. Quotations are from QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fusewire.transport import vhost_wire as wire
from fusewire.transport.vhost_backend import Backend, Vring
from fusewire.transport.vhost_wire import HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["HEADER_SIZE", "MAX_QUEUES", "MAX_SLOTS", "Backend", "Device", "Ending", "Vring"]

# Memory slots: what the Linux kernel's KVM gives a machine, and what virtiofsd says. A slot costs no descriptor.
MAX_SLOTS: Final = 509
# The index of a ring has eight bits in SET_VRING_KICK.
MAX_QUEUES: Final = 256
MAX_RING: Final = 32768
# virtio 1.2, 5.11.4: char tag[36], padded with NUL; le32 num_request_queues.
TAG_SIZE: Final = 36

_DIFFERENT_LINES = 100
_ADDRESS_END = 1 << 64
_OFFSET_END = 1 << 63  # off_t is signed
# Of a descriptor table, the most that a ring asks for: an address that has it must have it in our mapping too, or
# indices would not be loaded and stored as a whole.
_ALIGNMENT = 16


class Ending(Exception):  # noqa: N818 - an end that the peer brings about, not a fault of ours
    """The connection cannot go on: what came is no vhost-user message. str() says why."""


class _Refused(Exception):  # noqa: N818 - it is an answer
    """The message cannot be obeyed; str() says why, for a person."""


class _NoRing(_Refused):
    """The ring does not exist. Which message was about it is of no interest to a person, who is told once for each."""


class _Region:
    __slots__ = ("guest", "handle", "mmap_offset", "size", "user")

    def __init__(self, guest: int, size: int, user: int, mmap_offset: int) -> None:
        self.guest = guest
        self.size = size
        self.user = user
        self.mmap_offset = mmap_offset
        self.handle: Any = None


def _check_layout(regions: Iterable[_Region]) -> None:
    """Refuse regions that are empty, wrap around, or overlap in guest or in user addresses."""
    found = list(regions)
    if len(found) > MAX_SLOTS:
        raise _Refused(f"{len(found)} memory regions are more than the {MAX_SLOTS} that are served")
    for region in found:
        if region.size == 0:
            raise _Refused(f"the memory region at {region.guest:#x} is empty")
        if region.guest + region.size > _ADDRESS_END or region.user + region.size > _ADDRESS_END:
            raise _Refused(f"the memory region at {region.guest:#x} of {region.size:#x} bytes ends beyond 2^64")
        if region.mmap_offset + region.size > _OFFSET_END:
            raise _Refused(
                f"the memory region at {region.guest:#x} begins too far in its file: {region.mmap_offset:#x}"
            )
        if (region.user - region.mmap_offset) % _ALIGNMENT:
            raise _Refused(f"the memory region at {region.guest:#x} would lie askew: rings in it could not be aligned")
    for kind in ("guest", "user"):
        end = 0
        for begin, size in sorted((getattr(region, kind), region.size) for region in found):
            if begin < end:
                raise _Refused(f"two memory regions overlap at {kind} address {begin:#x}")
            end = begin + size


class Device:
    """The protocol's state of one connection; after `disconnect` it is as new, for the next one.

    `features` and `protocol_features` are those agreed on, `rings` the state of each virtqueue.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        queues: int,
        tag: bytes = b"",
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Serve `queues` virtqueues, the high-priority one (index 0) counted: one more than there are request queues.

        With a `tag` (1 to 36 bytes) the device tells its configuration too (F_CONFIG); QEMU sets its own and ignores
        it, crosvm needs it. `log` is called with what a person may have to know; a line is said once.
        Raises ValueError.
        """
        if not 2 <= queues <= MAX_QUEUES:
            raise ValueError(f"{queues} virtqueues: there must be 2 to {MAX_QUEUES}, the high-priority one counted")
        if len(tag) > TAG_SIZE:
            raise ValueError(f"the tag {tag!r} is longer than {TAG_SIZE} bytes")
        self.queues = queues
        self.offered_features = (
            wire.F_VERSION_1 | wire.F_INDIRECT_DESC | wire.F_EVENT_IDX | wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL
        )
        # Not BACKEND_SEND_FD: descriptors to the front end are for DAX and host notifiers, and we have neither.
        # Not DEVICE_STATE, STATUS, PAGEFAULT, SHMEM: each promises something that is not there.
        self.offered_protocol_features = (
            wire.P_MQ
            | wire.P_LOG_SHMFD
            | wire.P_REPLY_ACK
            | wire.P_BACKEND_REQ
            | wire.P_INFLIGHT_SHMFD
            | wire.P_RESET_DEVICE
            | wire.P_CONFIGURE_MEM_SLOTS
            | (wire.P_CONFIG if tag else 0)
        )
        config = tag.ljust(TAG_SIZE, b"\0") + (queues - 1).to_bytes(4, "little")
        self._config = config.ljust(wire.CONFIG_SIZE, b"\0")
        self._backend = backend
        self._log = log
        self._fds: list[int] = []
        self._handlers: dict[int, Callable[[bytes], bytes | None]] = {
            wire.GET_FEATURES: self._get_features,
            wire.SET_FEATURES: self._set_features,
            wire.SET_OWNER: self._set_owner,
            wire.RESET_OWNER: self._reset_owner,
            wire.SET_MEM_TABLE: self._set_mem_table,
            wire.SET_LOG_BASE: self._set_log_base,
            wire.SET_LOG_FD: self._set_log_fd,
            wire.SET_VRING_NUM: self._set_vring_num,
            wire.SET_VRING_ADDR: self._set_vring_addr,
            wire.SET_VRING_BASE: self._set_vring_base,
            wire.GET_VRING_BASE: self._get_vring_base,
            wire.SET_VRING_KICK: self._set_vring_kick,
            wire.SET_VRING_CALL: self._set_vring_call,
            wire.SET_VRING_ERR: self._set_vring_err,
            wire.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            wire.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            wire.GET_QUEUE_NUM: self._get_queue_num,
            wire.SET_VRING_ENABLE: self._set_vring_enable,
            wire.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            wire.GET_CONFIG: self._get_config,
            wire.SET_CONFIG: self._set_config,
            wire.GET_INFLIGHT_FD: self._get_inflight_fd,
            wire.SET_INFLIGHT_FD: self._set_inflight_fd,
            wire.RESET_DEVICE: self._reset_device,
            wire.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            wire.ADD_MEM_REG: self._add_mem_reg,
            wire.REM_MEM_REG: self._rem_mem_reg,
        }
        self._begin()

    def _begin(self) -> None:
        self.features = 0
        self.protocol_features = 0
        self.reply_fds: list[int] = []
        self.rings = tuple(Vring() for _ in range(self.queues))
        self._regions: list[_Region] = []
        self._said: set[str] = set()

    # The connection

    def expect(self, header: bytes) -> int:
        """Give the size in bytes of the payload that follows this header.

        Raises Ending where it is none of a vhost-user message's: the stream cannot be followed any further. Whoever
        received descriptors with it has to close them.
        """
        return self._parse(header)[2]

    def receive(self, header: bytes, payload: bytes, fds: Sequence[int]) -> bytes | None:
        """Obey one message; give the reply to be sent, with the descriptors in `reply_fds`, or None if there is none.

        Takes over `fds`. Those in `reply_fds` stay the backend's: send them, do not close them.
        Raises Ending as `expect` does.
        """
        self.reply_fds = []
        self._fds = list(fds)
        try:
            request, flags, _ = self._parse(header)
            return self._answer(request, flags, payload)
        finally:
            surplus, self._fds = self._fds, []
            for fd in surplus:
                self._backend.close_fd(fd)

    def disconnect(self) -> None:
        """Let go of everything: the front end is gone. What is in work is finished before (`Backend.stop_queue`)."""
        self._stop_all()
        if self._regions:
            self._use([])
        for index in range(self.queues):
            self._backend.set_call(index, -1)
            self._backend.set_err(index, -1)
        if self.features & wire.F_LOG_ALL:
            self._backend.set_log_enabled(False)
        self._backend.set_log(-1, 0, 0)
        self._backend.set_inflight(-1, 0, 0, 0, 0)
        self._backend.set_backend_channel(-1)
        self._begin()

    @staticmethod
    def _parse(header: bytes) -> tuple[int, int, int]:
        if len(header) != wire.HEADER_SIZE:
            raise Ending(f"the connection ended within a message's header, after {len(header)} bytes")
        request, flags, size = wire.HEADER.unpack(header)
        if flags & wire.VERSION_MASK != wire.VERSION:
            raise Ending(
                f"the peer speaks version {flags & wire.VERSION_MASK} of vhost-user, or another protocol; "
                f"version {wire.VERSION} is what is served"
            )
        if size > wire.MAX_PAYLOAD:
            raise Ending(f"message {request} says it has {size} bytes; no message has more than {wire.MAX_PAYLOAD}")
        return request, flags, size

    def _answer(self, request: int, flags: int, payload: bytes) -> bytes | None:
        row = wire.MESSAGES.get(request)
        name = row.name if row is not None else f"message {request}"
        if flags & wire.FLAG_REPLY:
            self._say(f"{name}: a reply to nothing that was asked, ignored")
            return None
        reply: bytes | None = None
        failed = 1
        try:
            if row is None:
                raise _Refused("it is not known")
            self._check(row, payload)
            reply = self._handlers[request](payload)
            failed = 0
        except (_Refused, OSError, ValueError) as error:
            self._say(str(error) if isinstance(error, _NoRing) else f"{name} refused: {error}")
            self.reply_fds = []
            # SET_LOG_BASE has a reply of its own only where LOG_SHMFD is agreed on.
            if row is not None and (request != wire.SET_LOG_BASE or self.protocol_features & wire.P_LOG_SHMFD):
                reply = row.refusal
        if reply is None:
            # "VHOST_USER_PROTOCOL_F_REPLY_ACK": by what is agreed after the message, as SET_PROTOCOL_FEATURES needs it.
            if not (flags & wire.FLAG_NEED_REPLY and self.protocol_features & wire.P_REPLY_ACK):
                return None
            reply = wire.U64.pack(failed)
        return wire.HEADER.pack(request, wire.VERSION | wire.FLAG_REPLY, len(reply)) + reply

    def _check(self, row: wire.Message, payload: bytes) -> None:
        if row.needs and not self.protocol_features & row.needs:
            raise _Refused("the protocol feature that it belongs to is not agreed on")
        if row.sizes and len(payload) not in row.sizes:
            raise _Refused(f"its payload has {len(payload)} bytes and not {row.sizes[0]}")
        if row.fds and len(self._fds) not in row.fds:
            raise _Refused(f"{len(self._fds)} descriptors came along and not {row.fds[-1]}")

    def _say(self, line: str) -> None:
        """Log a line once: a front end that repeats itself must not fill a disk."""
        if self._log is not None and line not in self._said and len(self._said) < _DIFFERENT_LINES:
            self._said.add(line)
            self._log(line)

    def _take(self) -> int:
        """Take the next descriptor out of those that will be closed: the backend has it from now on."""
        return self._fds.pop(0)

    # Features

    def _get_features(self, payload: bytes) -> bytes:
        return wire.U64.pack(self.offered_features)

    def _set_features(self, payload: bytes) -> None:
        """A ring that runs goes on with what it was started with; only LOG_ALL is meant to change under it."""
        (wanted,) = wire.U64.unpack(payload)
        strange = wanted & ~self.offered_features
        if strange:
            raise _Refused(f"features {strange:#x} were not offered")
        before, self.features = self.features, wanted
        if (before ^ wanted) & wire.F_LOG_ALL:
            self._backend.set_log_enabled(bool(wanted & wire.F_LOG_ALL))
        if not wanted & wire.F_PROTOCOL_FEATURES:
            # "the back-end must enable all rings immediately": there will be no SET_VRING_ENABLE.
            for index in range(self.queues):
                self._enable(index, True)

    def _get_protocol_features(self, payload: bytes) -> bytes:
        return wire.U64.pack(self.offered_protocol_features)

    def _set_protocol_features(self, payload: bytes) -> None:
        """Bit 30 "does not need to be acknowledged by" SET_FEATURES for this, which only decides on enabling rings."""
        (wanted,) = wire.U64.unpack(payload)
        strange = wanted & ~self.offered_protocol_features
        if strange:
            raise _Refused(f"protocol features {strange:#x} were not offered")
        self.protocol_features = wanted

    def _get_queue_num(self, payload: bytes) -> bytes:
        return wire.U64.pack(self.queues)

    def _get_max_mem_slots(self, payload: bytes) -> bytes:
        return wire.U64.pack(MAX_SLOTS)

    def _get_config(self, payload: bytes) -> bytes:
        """Zeros follow what the device has: a front end may ask for more than the struct of its own day."""
        if len(payload) < wire.CONFIG.size:
            raise _Refused(f"its payload has {len(payload)} bytes and not {wire.CONFIG.size} or more")
        offset, size, flags = wire.CONFIG.unpack_from(payload)
        if size == 0 or offset + size > wire.CONFIG_SIZE or len(payload) != wire.CONFIG.size + size:
            raise _Refused(f"{size} bytes at {offset} of the configuration, in a payload of {len(payload)}")
        return wire.CONFIG.pack(offset, size, flags) + self._config[offset : offset + size]

    def _set_config(self, payload: bytes) -> None:
        raise _Refused("the configuration of a virtio-fs device can only be read")

    # The device as a whole

    def _set_owner(self, payload: bytes) -> None:
        """It begins a session, which is what a connection does already."""

    def _reset_owner(self, payload: bytes) -> None:
        """Deprecated: "either ignore this message, or use it to disable all rings"."""
        for index in range(self.queues):
            self._enable(index, False)

    def _reset_device(self, payload: bytes) -> None:
        """Back to the initial state, apart from what is the connection's and will not be sent again.

        That is the memory (QEMU sends only what has changed in it), the call and err descriptors, the protocol
        features, the channel, the log and the in-flight region, in which nothing is in flight once all rings are
        stopped.
        """
        self._stop_all()
        for ring in self.rings:
            ring.size = ring.base = 0
            ring.desc = ring.avail = ring.used = ring.log = None
            ring.enabled = False
        if self.features & wire.F_LOG_ALL:
            self._backend.set_log_enabled(False)
        self.features = 0
        self._backend.reset()

    def _set_backend_req_fd(self, payload: bytes) -> None:
        self._backend.set_backend_channel(self._take())

    def _set_log_base(self, payload: bytes) -> bytes:
        size, offset = wire.LOG.unpack(payload)
        if size == 0 or offset + size > _OFFSET_END:
            raise _Refused(f"a log of {size:#x} bytes at {offset:#x} cannot be")
        self._backend.set_log(self._take(), size, offset)
        return wire.U64.pack(0)

    def _set_log_fd(self, payload: bytes) -> None:
        """It "may be used to inform the front-end that the log has been modified": front ends look by themselves."""

    def _get_inflight_fd(self, payload: bytes) -> bytes:
        """The reply is as long as the request: with C's padding or without it, as the front end lays it out."""
        _, _, num_queues, queue_size = wire.INFLIGHT.unpack_from(payload)
        self._check_inflight(num_queues, queue_size)
        fd, mmap_size, mmap_offset = self._backend.make_inflight(num_queues, queue_size)
        self.reply_fds = [fd]
        return wire.INFLIGHT.pack(mmap_size, mmap_offset, num_queues, queue_size).ljust(len(payload), b"\0")

    def _set_inflight_fd(self, payload: bytes) -> None:
        mmap_size, mmap_offset, num_queues, queue_size = wire.INFLIGHT.unpack_from(payload)
        self._check_inflight(num_queues, queue_size)
        least = num_queues * (wire.INFLIGHT_HEADER + wire.INFLIGHT_DESCRIPTOR * queue_size)
        if mmap_size < least or mmap_offset + mmap_size > _OFFSET_END:
            raise _Refused(
                f"{mmap_size:#x} bytes at {mmap_offset:#x} are no in-flight region for {num_queues} rings of "
                f"{queue_size}, which takes {least:#x}"
            )
        running = [index for index, ring in enumerate(self.rings) if ring.running]
        if running:
            raise _Refused(f"ring {running[0]} runs: the in-flight region comes before SET_VRING_KICK")
        self._backend.set_inflight(self._take(), mmap_size, mmap_offset, num_queues, queue_size)

    def _check_inflight(self, num_queues: int, queue_size: int) -> None:
        if num_queues == 0:
            raise _Refused("an in-flight region for no rings")
        if num_queues > self.queues:
            raise _NoRing(self._too_many(num_queues - 1))
        self._check_size(queue_size)

    # Memory

    def _set_mem_table(self, payload: bytes) -> None:
        """Replace all regions. The old ones stay in use until each of the new ones is mapped."""
        if len(payload) < wire.TABLE_HEADER.size:
            raise _Refused(f"its payload has {len(payload)} bytes and not {wire.TABLE_HEADER.size} or more")
        number, _ = wire.TABLE_HEADER.unpack_from(payload)
        if len(payload) != wire.TABLE_HEADER.size + number * wire.REGION.size:
            raise _Refused(f"its payload has {len(payload)} bytes, which are not {number} regions")
        if len(self._fds) != number:
            raise _Refused(f"{len(self._fds)} descriptors came along and not {number}, one for each region")
        regions = [_Region(*fields) for fields in wire.REGION.iter_unpack(payload[wire.TABLE_HEADER.size :])]
        _check_layout(regions)
        mapped: list[_Region] = []
        try:
            for region in regions:
                self._map(region)
                mapped.append(region)
        except (OSError, ValueError):
            for region in mapped:
                self._backend.unmap_region(region.handle)
            raise
        self._use(regions)

    def _add_mem_reg(self, payload: bytes) -> None:
        region = _Region(*wire.REGION.unpack_from(payload, 8))
        regions = [*self._regions, region]
        _check_layout(regions)
        self._map(region)
        self._use(regions)

    def _rem_mem_reg(self, payload: bytes) -> None:
        """A region is "identified by its guest address, user address and size. The mmap offset is ignored."."""
        guest, size, user, _ = wire.REGION.unpack_from(payload, 8)
        left = [region for region in self._regions if (region.guest, region.size, region.user) != (guest, size, user)]
        if len(left) == len(self._regions):
            raise _Refused(f"there is no memory region of {size:#x} bytes at {guest:#x}")
        self._use(left)

    def _map(self, region: _Region) -> None:
        region.handle = self._backend.map_region(
            self._take(), region.size, region.mmap_offset, region.guest, region.user
        )

    def _use(self, regions: list[_Region]) -> None:
        """Serve from these regions; a running ring that does not lie in them any more is stopped before."""
        gone = [region for region in self._regions if region not in regions]
        for index, ring in enumerate(self.rings):
            if ring.running:
                place = self._misplaced(ring, regions)
                if place:
                    self._say(f"ring {index} stopped: the memory of its {place} was taken away")
                    self._stop(index)
        self._regions = regions
        self._backend.set_memory([region.handle for region in regions])
        for region in gone:
            self._backend.unmap_region(region.handle)

    @staticmethod
    def _misplaced(ring: Vring, regions: list[_Region]) -> str:
        """Name the part of the ring that does not lie within one of the regions; "" if all do."""
        for name, address, length, _ in ring.areas():
            if not any(r.user <= address and address + length <= r.user + r.size for r in regions):
                return name
        return ""

    # Rings

    def _too_many(self, index: int) -> str:
        served = self.queues - 1
        return (
            f"there is no ring {index}: the front end wants more request queues than the {served} served here; start "
            f"with --queues {index} or more, or give the machine no more than {served} "
            f"(QEMU: num-request-queues={served})"
        )

    def _ring(self, index: int) -> Vring:
        if index >= self.queues:
            raise _NoRing(self._too_many(index))
        return self.rings[index]

    @staticmethod
    def _check_size(size: int) -> None:
        if not 1 <= size <= MAX_RING or size & (size - 1):
            raise _Refused(f"a ring cannot have {size} entries: a power of two from 1 to {MAX_RING} is needed")

    def _set_vring_num(self, payload: bytes) -> None:
        index, size = wire.STATE.unpack(payload)
        ring = self._ring(index)
        self._check_size(size)
        if size != ring.size:
            self._set_up_anew(index)
        ring.size = size

    def _set_vring_base(self, payload: bytes) -> None:
        index, base = wire.STATE.unpack(payload)
        ring = self._ring(index)
        if base > 0xFFFF:
            raise _Refused(f"ring {index}: {base:#x} is no index of a split virtqueue (no other kind was offered)")
        self._set_up_anew(index)
        ring.base = base

    def _set_up_anew(self, index: int) -> None:
        """Stop a ring that runs although its set-up begins again, without GET_VRING_BASE.

        To refuse would leave it running in memory that the front end believes is free.
        """
        if self.rings[index].running:
            self._say(f"ring {index} stopped: it was set up anew while it ran")
            self._stop(index)

    def _set_vring_addr(self, payload: bytes) -> None:
        """The memory need not be there before SET_VRING_KICK; for a ring that runs, this is how logging begins."""
        index, flags, desc, used, avail, log = wire.ADDRESSES.unpack(payload)
        ring = self._ring(index)
        if flags & ~wire.RING_LOG:
            raise _Refused(f"ring {index}: flags {flags:#x} are not known")
        new = Vring()
        new.size, new.desc, new.used, new.avail = ring.size, desc, used, avail
        new.log = log if flags & wire.RING_LOG else None
        for name, address, _, alignment in new.areas():
            if address % alignment:
                raise _Refused(f"ring {index}: the {name}'s address {address:#x} is no multiple of {alignment}")
        if ring.running:
            place = self._misplaced(new, self._regions)
            if place:
                raise _Refused(f"ring {index} runs, and its new {place} does not lie in guest memory")
        changed = (ring.desc, ring.used, ring.avail, ring.log) != (desc, used, avail, new.log)
        ring.desc, ring.used, ring.avail, ring.log = desc, used, avail, new.log
        if changed and ring.running:
            self._backend.update_queue(index, ring)

    def _get_vring_base(self, payload: bytes) -> bytes:
        index, _ = wire.STATE.unpack(payload)
        if index >= self.queues:
            # QEMU stops the rings that it was refused, too, and waits for this reply: such a ring never ran.
            self._say(self._too_many(index))
            return wire.STATE.pack(index, 0)
        if self.rings[index].running:
            self._stop(index)
        return wire.STATE.pack(index, self.rings[index].base)

    def _ring_and_fd(self, payload: bytes) -> tuple[int, bool]:
        """Give the index of an existing ring and whether a descriptor came along; it must be what the payload says."""
        (value,) = wire.U64.unpack(payload)
        index = value & wire.RING_INDEX_MASK
        self._ring(index)
        said = not value & wire.RING_NO_FD
        if len(self._fds) != said:
            raise _Refused(f"ring {index}: {len(self._fds)} descriptors came along, and the message says {int(said)}")
        return index, said

    def _set_vring_kick(self, payload: bytes) -> None:
        index, has_fd = self._ring_and_fd(payload)
        ring = self.rings[index]
        if not has_fd:
            raise _Refused(f"ring {index} would have to be polled, which is not done: it needs a kick descriptor")
        if not ring.size:
            raise _Refused(f"ring {index} has no size yet: SET_VRING_NUM comes before it")
        if not ring.areas():
            raise _Refused(f"ring {index} has no addresses yet: SET_VRING_ADDR comes before it")
        place = self._misplaced(ring, self._regions)
        if place:
            raise _Refused(f"ring {index}: its {place} does not lie in guest memory")
        if ring.running:  # with another kick from now on
            self._stop(index)
        ring.features = self.features
        ring.kick = self._take()
        try:
            self._backend.start_queue(index, ring)
        except (OSError, ValueError):
            ring.kick = -1
            raise
        ring.running = True

    def _set_vring_call(self, payload: bytes) -> None:
        """It comes many times, before features and memory too; the newest is the one to use."""
        index, has_fd = self._ring_and_fd(payload)
        self._backend.set_call(index, self._take() if has_fd else -1)

    def _set_vring_err(self, payload: bytes) -> None:
        index, has_fd = self._ring_and_fd(payload)
        self._backend.set_err(index, self._take() if has_fd else -1)

    def _set_vring_enable(self, payload: bytes) -> None:
        index, enabled = wire.STATE.unpack(payload)
        self._ring(index)
        if enabled > 1:
            raise _Refused(f"ring {index}: {enabled} is neither 0 nor 1")
        self._enable(index, bool(enabled))

    def _enable(self, index: int, enabled: bool) -> None:
        ring = self.rings[index]
        if ring.enabled != enabled:
            ring.enabled = enabled
            if ring.running:
                self._backend.enable_queue(index, enabled)

    def _stop(self, index: int) -> None:
        ring = self.rings[index]
        ring.running = False
        ring.kick = -1
        ring.base = self._backend.stop_queue(index) & 0xFFFF

    def _stop_all(self) -> None:
        for index, ring in enumerate(self.rings):
            if ring.running:
                self._stop(index)
