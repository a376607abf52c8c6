"""The front end of vhost-user, as QEMU, Cloud Hypervisor and crosvm are: what `FakeGuest` reaches a daemon through.

Layer `testing`. Every message that a vhost-user-fs device may get is a method (QEMU, docs/interop/vhost-user.rst,
"Front-end message types"), and `send` and `receive` are there for what no front end sends. It knows nothing of FUSE,
and shares no code with the transport that it judges.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Self

from fusewire.testing.guest_ring import PAGE, Closed, DriverQueue, Memory, Region, Stuck, Waiter


class Message:
    """The requests' numbers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


# The header's flags.
VERSION, REPLY, NEED_REPLY = 1, 4, 8
# Feature bits: of virtio and of vhost, and those of the protocol itself.
F_LOG_ALL, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 1 << 26, 1 << 28, 1 << 29, 1 << 30, 1 << 32
P_MQ, P_LOG_SHMFD, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG = 1 << 0, 1 << 1, 1 << 3, 1 << 5, 1 << 9
P_BACKEND_SEND_FD, P_INFLIGHT_SHMFD, P_RESET_DEVICE, P_MEM_SLOTS = 1 << 10, 1 << 12, 1 << 13, 1 << 15
FEATURES = F_VERSION_1 | F_PROTOCOL | F_INDIRECT | F_EVENT_IDX
PROTOCOL = (
    P_MQ | P_LOG_SHMFD | P_REPLY_ACK | P_BACKEND_REQ | P_CONFIG | P_BACKEND_SEND_FD
    | P_INFLIGHT_SHMFD | P_RESET_DEVICE | P_MEM_SLOTS
)  # fmt: skip
NO_FD = 0x100  #: in SET_VRING_KICK, CALL and ERR: no descriptor comes with it

_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDR = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
# QEMU sends and expects the struct with its padding at the end, rust-vmm the 20 bytes that it has without.
_INFLIGHT = struct.Struct("<QQHHxxxx")
_CONFIG = struct.Struct("<III")
_NAMES = {number: name for name, number in vars(Message).items() if isinstance(number, int)}
_MOST_FDS = 16


class Refused(OSError):  # noqa: N818 - a verdict
    """The daemon answered a message with a status other than 0, or with less than was asked for."""


class Inflight(NamedTuple):
    """The region in which the daemon keeps what it is at work on; `fd` belongs to the front end that asked for it."""

    fd: int
    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int


class Frontend:
    """One vhost-user connection after another to a daemon, with the guest's memory and queues. Not for several threads.

    `negotiate`, then `start` with queues; `stop`, `reboot`, `reconnect` as virtual machines do. `close` closes all that
    it made or was given: the connection, the queues, the memory.
    """

    def __init__(
        self,
        where: str | socket.socket,
        *,
        memory: Memory | None = None,
        features: int = FEATURES,
        protocol: int = PROTOCOL,
        acknowledge: bool = True,
        order: str = "qemu",
        timeout: float = 10.0,
    ) -> None:
        """Connect to the socket `where`, waiting until a daemon listens there, or use a connected socket.

        `features` and `protocol` are taken as far as they are offered. `acknowledge`: where REPLY_ACK is agreed on, ask
        for an answer to everything, as Cloud Hypervisor does; otherwise to nothing, as crosvm. `order`: that of "qemu"
        or of "cloud-hypervisor" in `start`. Seconds in `timeout`, for each answer.
        """
        self.timeout, self.order, self.acknowledge = timeout, order, acknowledge
        self._wanted = features, protocol
        self.path = "" if isinstance(where, socket.socket) else where
        self.features = self.offered = self.protocol = self.protocol_offered = 0
        self.queue_limit = 1
        self.queues: list[DriverQueue] = []
        self.backend: socket.socket | None = None
        self._log: mmap.mmap | None = None
        self._owned: list[int] = []
        self.sock = where if isinstance(where, socket.socket) else connect(where, timeout)
        self.sock.settimeout(timeout)
        self.memory = memory or Memory()

    # Messages as bytes

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """Send a message and wait for nothing (raw). `size`: what its header says of the payload."""
        data = _HEADER.pack(request, flags, len(payload) if size is None else size) + payload
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], ancillary)
            if sent < len(data):
                self.sock.sendall(data[sent:])
        except TimeoutError:
            raise Stuck(f"the daemon did not read {_title(request)} within {self.timeout:g} s") from None
        except (BrokenPipeError, ConnectionResetError):
            raise Closed(f"the daemon closed the connection before {_title(request)}") from None

    def receive(self, request: int) -> tuple[bytes, list[int]]:
        """Give the reply to `request`: payload and descriptors, which are the caller's.

        Raises Stuck, Closed, and ValueError for a reply to something else or with other flags than 5, as QEMU does.
        """
        fds: list[int] = []
        try:
            got, flags, size = _HEADER.unpack(self._exactly(_HEADER.size, request, fds))
            if got != request or flags != VERSION | REPLY:
                raise ValueError(f"{_title(request)} got a reply to {_title(got)} with flags {flags:#x}")
            return self._exactly(size, request, fds), fds
        except BaseException:
            _close_all(fds)
            raise

    def _exactly(self, size: int, request: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, ancillary, _, _ = self.sock.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * _MOST_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise Stuck(f"the daemon did not answer {_title(request)} within {self.timeout:g} s") from None
            except ConnectionResetError:
                part, ancillary = b"", []
            for level, kind, numbers in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += array("i", numbers[: len(numbers) // 4 * 4])
            if not part:
                raise Closed(f"the daemon closed the connection instead of answering {_title(request)}")
            data += part
        return data

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message that has a reply of its own, and give that; descriptors in it are closed."""
        self.send(request, payload, fds)
        data, received = self.receive(request)
        _close_all(received)
        return data

    def ask_number(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a message whose reply is a 64-bit number, and give that. Raises Refused for any other reply."""
        data = self.ask(request, payload, fds)
        if len(data) != 8:
            raise _refused(request, f"a reply of {len(data)} bytes where 8 are right")
        return int(_U64.unpack(data)[0])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, size: int | None = None) -> None:
        """Send a message that has no reply; where acknowledgements are agreed on, wait for this one's.

        Raises Refused if it is not 0.
        """
        if not (self.acknowledge and self.protocol & P_REPLY_ACK):
            self.send(request, payload, fds, size=size)
            return
        self.send(request, payload, fds, flags=VERSION | NEED_REPLY, size=size)
        data, received = self.receive(request)
        _close_all(received)
        if data != bytes(8):
            raise _refused(request, f"the status {data.hex()}")

    def sync(self) -> None:
        """Wait until the daemon has dealt with all messages that were sent."""
        self.get_features()

    # Messages by their names

    def get_features(self) -> int:
        """Ask for virtio's and vhost's feature bits."""
        return self.ask_number(Message.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """Say which of them are taken."""
        self.tell(Message.SET_FEATURES, _U64.pack(features))

    def get_protocol_features(self) -> int:
        """Ask for the protocol's feature bits."""
        return self.ask_number(Message.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        """Say which of them are taken. They hold from the next message on."""
        self.tell(Message.SET_PROTOCOL_FEATURES, _U64.pack(features))
        self.protocol = features

    def set_owner(self) -> None:
        """Take the device."""
        self.tell(Message.SET_OWNER)

    def reset_owner(self) -> None:
        """Give the device up (deprecated)."""
        self.tell(Message.RESET_OWNER)

    def reset_device(self) -> None:
        """Reset the device."""
        self.tell(Message.RESET_DEVICE)

    def get_queue_num(self) -> int:
        """Ask how many queues there may be."""
        return self.ask_number(Message.GET_QUEUE_NUM)

    def get_max_mem_slots(self) -> int:
        """Ask how many regions there may be."""
        return self.ask_number(Message.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, regions: Sequence[Region] | None = None) -> None:
        """Replace the daemon's regions; by default with all there are."""
        regions = self.memory.regions if regions is None else regions
        rows = b"".join(map(row_of, regions))
        self.tell(Message.SET_MEM_TABLE, _STATE.pack(len(regions), 0) + rows, [region.fd for region in regions])

    def add_mem_reg(self, region: Region) -> None:
        """Add one region."""
        self.tell(Message.ADD_MEM_REG, bytes(8) + row_of(region), [region.fd])

    def rem_mem_reg(self, region: Region, *, with_fd: bool = False) -> None:
        """Take one region away; some front ends send its descriptor along."""
        self.tell(Message.REM_MEM_REG, bytes(8) + row_of(region), [region.fd] if with_fd else ())

    def set_vring_num(self, index: int, size: int) -> None:
        """Say how many descriptors a queue has."""
        self.tell(Message.SET_VRING_NUM, _STATE.pack(index, size))

    def set_vring_addr(self, index: int, desc: int, used: int, avail: int, *, flags: int = 0, log: int = 0) -> None:
        """Say where the rings are, in user addresses; bit 0 of `flags`: log writes to the used ring, which is `log`."""
        self.tell(Message.SET_VRING_ADDR, _ADDR.pack(index, flags, desc, used, avail, log))

    def set_vring_base(self, index: int, base: int) -> None:
        """Say which available index comes next."""
        self.tell(Message.SET_VRING_BASE, _STATE.pack(index, base))

    def get_vring_base(self, index: int) -> int:
        """Stop a queue and ask which available index comes next. Raises Refused for another queue's answer."""
        data = self.ask(Message.GET_VRING_BASE, _STATE.pack(index, 0))
        if len(data) != 8 or _STATE.unpack(data)[0] != index:
            raise _refused(Message.GET_VRING_BASE, f"the reply {data.hex()} for queue {index}")
        return int(_STATE.unpack(data)[1])

    def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Give a queue's kick descriptor and with it start the queue; None: it has none."""
        self._vring_fd(Message.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> None:
        """Give a queue's call descriptor; None: it has none."""
        self._vring_fd(Message.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> None:
        """Give a queue's error descriptor; None: it has none."""
        self._vring_fd(Message.SET_VRING_ERR, index, fd)

    def _vring_fd(self, request: int, index: int, fd: int | None) -> None:
        self.tell(request, _U64.pack(index | (NO_FD if fd is None else 0)), () if fd is None else [fd])

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Let a queue be served, or not."""
        self.tell(Message.SET_VRING_ENABLE, _STATE.pack(index, enable))

    def set_backend_req_fd(self, fd: int) -> None:
        """Give the daemon a socket for messages of its own."""
        self.tell(Message.SET_BACKEND_REQ_FD, b"", [fd])

    def get_config(self, offset: int = 0, size: int = 40) -> bytes:
        """Ask for device configuration: `char tag[36]; le32 num_request_queues` (Virtio 1.2, 5.11.4)."""
        data = self.ask(Message.GET_CONFIG, _CONFIG.pack(offset, size, 0) + bytes(size))
        if len(data) != 12 + size:  # the daemon's way to refuse is an empty reply
            raise _refused(Message.GET_CONFIG, f"{len(data)} bytes where {12 + size} are right")
        return data[12:]

    def set_config(self, offset: int, data: bytes) -> None:
        """Write device configuration."""
        self.tell(Message.SET_CONFIG, _CONFIG.pack(offset, len(data), 0) + data)

    def get_inflight_fd(self, queues: int, queue_size: int) -> Inflight:
        """Have the daemon make the region for what is in flight. The descriptor is closed with the front end."""
        self.send(Message.GET_INFLIGHT_FD, _INFLIGHT.pack(0, 0, queues, queue_size))
        data, fds = self.receive(Message.GET_INFLIGHT_FD)
        self._owned += fds
        if len(data) not in (20, 24) or len(fds) != 1:
            raise _refused(Message.GET_INFLIGHT_FD, f"{len(data)} bytes and {len(fds)} descriptors")
        return Inflight(fds[0], *_INFLIGHT.unpack(data.ljust(24, b"\0")))

    def set_inflight_fd(self, inflight: Inflight) -> None:
        """Give the daemon the region for what is in flight."""
        self.tell(Message.SET_INFLIGHT_FD, _INFLIGHT.pack(*inflight[1:]), [inflight.fd])

    def set_log_base(self, fd: int, size: int, offset: int = 0) -> None:
        """Give the daemon the bitmap of dirty pages; with LOG_SHMFD this has a reply."""
        message = _STRUCT_LOG.pack(size, offset)
        if self.protocol & P_LOG_SHMFD:
            self.ask(Message.SET_LOG_BASE, message, [fd])
        else:
            self.tell(Message.SET_LOG_BASE, message, [fd])

    def set_log_fd(self, fd: int) -> None:
        """Give the daemon an eventfd to be signalled when the log is written."""
        self.tell(Message.SET_LOG_FD, b"", [fd])

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int:
        """Have state saved to (0) or loaded from (1) a pipe; give the reply, in which bit 8 means: no descriptor."""
        return self.ask_number(Message.SET_DEVICE_STATE_FD, _STATE.pack(direction, phase), [fd])

    def check_device_state(self) -> int:
        """Ask whether that worked: 0."""
        return self.ask_number(Message.CHECK_DEVICE_STATE)

    # What virtual machines do

    def negotiate(self) -> None:
        """Agree on features and take the device, in QEMU's order."""
        features, protocol = self._wanted
        self.protocol = 0
        self.offered = self.get_features()
        self.features = self.offered & features
        if self.features & F_PROTOCOL:
            self.protocol_offered = self.get_protocol_features()
            self.set_protocol_features(self.protocol_offered & protocol)
        if self.protocol & P_MQ:
            self.queue_limit = self.get_queue_num()
        if self.protocol & P_MEM_SLOTS:
            self.get_max_mem_slots()
        if self.protocol & P_BACKEND_REQ:
            self._drop_backend()
            self.backend, theirs = socket.socketpair()
            with theirs:
                self.set_backend_req_fd(theirs.fileno())
        self.set_owner()

    def make_queues(self, count: int, size: int = 128) -> list[DriverQueue]:
        """Lay out queues by the features that were agreed on."""
        indirect, event_idx = bool(self.features & F_INDIRECT), bool(self.features & F_EVENT_IDX)
        return [DriverQueue(self.memory, n, size, indirect=indirect, event_idx=event_idx) for n in range(count)]

    def share_memory(self) -> None:
        """Tell the daemon of all regions: one by one if it offers that, else as a table."""
        if self.protocol & P_MEM_SLOTS:
            for region in self.memory.regions:
                self.add_mem_reg(region)
        else:
            self.set_mem_table()

    def start(self, queues: Sequence[DriverQueue], *, memory: bool = True) -> None:
        """Start queues, as when the guest's driver says DRIVER_OK; they are closed with the front end.

        `memory`: tell of the regions, which a front end does once per connection.
        """
        self.queues = list(queues)
        self.set_features(self.features)
        if memory:
            self.share_memory()
        for queue in queues:
            index = queue.index
            self.set_vring_num(index, queue.size)
            if self.order == "qemu":
                self.set_vring_base(index, queue.base)
                self.place(queue)
            else:
                self.place(queue)
                self.set_vring_base(index, queue.base)
            self.set_vring_call(index, queue.call_fd)
            self.set_vring_err(index, queue.err_fd)
            self.set_vring_kick(index, queue.kick_fd)
        if self.features & F_PROTOCOL:
            for queue in queues:
                self.set_vring_enable(queue.index, True)

    def place(self, queue: DriverQueue, *, log: bool = False) -> None:
        """Tell where a queue's rings are."""
        desc, used, avail = map(self.memory.user, (queue.desc_gpa, queue.used_gpa, queue.avail_gpa))
        self.set_vring_addr(queue.index, desc, used, avail, flags=int(log), log=queue.used_gpa if log else 0)

    def stop(self) -> list[int]:
        """Stop all queues, as for a reset, a pause or a migration; give where each has to go on. `start` does so."""
        if self.features & F_PROTOCOL:
            for queue in self.queues:
                self.set_vring_enable(queue.index, False)
        for queue in self.queues:
            queue.base = self.get_vring_base(queue.index)
        return [queue.base for queue in self.queues]

    def reboot(self) -> None:
        """Reset the guest: stop, and start with empty rings. The daemon hears no more of it (the next INIT is new)."""
        self.stop()
        for queue in self.queues:
            queue.reset()
        self.start(self.queues, memory=False)

    def hang_up(self) -> None:
        """Close the connection only, as a virtual machine that crashes does."""
        self.sock.close()
        self._drop_backend()

    def reconnect(self, where: str | socket.socket | None = None) -> None:
        """Connect anew and go on with the queues as they are, as QEMU does when its socket has `reconnect=`.

        What was in flight is served (again) from the used index on.
        """
        self.hang_up()
        where = self.path if where is None else where
        self.sock = where if isinstance(where, socket.socket) else connect(where, self.timeout)
        self.sock.settimeout(self.timeout)
        self.negotiate()
        for queue in self.queues:
            queue.base = queue.used
        self.start(self.queues)
        for queue in self.queues:
            os.eventfd_write(queue.kick_fd, 1)

    def waiter(self, queues: Sequence[DriverQueue] | None = None) -> Waiter:
        """Give what waits for used elements of `queues`, by default all, on this connection."""
        return Waiter(self.queues if queues is None else queues, self.sock)

    # The log of dirty pages

    def start_log(self) -> None:
        """Have writes to guest memory logged, as for a migration."""
        end = max(region.gpa + region.size for region in self.memory.regions)
        size = -(-(end // PAGE + 1) // 8 // PAGE) * PAGE
        fd = os.memfd_create("dirty-pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._drop_log()
            self._log = mmap.mmap(fd, size)
            self.set_log_base(fd, size)
        finally:
            os.close(fd)
        self.set_features(self.features | F_LOG_ALL)
        for queue in self.queues:
            self.place(queue, log=True)

    def stop_log(self) -> None:
        """Have writes not logged any more."""
        self.set_features(self.features)
        for queue in self.queues:
            self.place(queue)

    def dirty(self) -> set[int]:
        """Give the guest-physical addresses of the pages that were logged since the last time."""
        if self._log is None:
            return set()
        found = {
            (number * 8 + bit) * PAGE
            for number, byte in enumerate(self._log[:])
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }
        self._log[:] = bytes(len(self._log))
        return found

    def _drop_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _drop_backend(self) -> None:
        if self.backend is not None:
            self.backend.close()
            self.backend = None

    def close(self) -> None:
        """Close everything."""
        self.hang_up()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        self._drop_log()
        _close_all(self._owned)
        self.memory.close()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self.close()


_STRUCT_LOG = struct.Struct("<QQ")


def connect(path: str, patience: float = 10.0) -> socket.socket:
    """Connect to a unix socket, waiting up to `patience` seconds until somebody listens there. Raises Stuck."""
    deadline = time.monotonic() + patience
    while True:
        found = socket.socket(socket.AF_UNIX)
        try:
            found.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            found.close()
            if time.monotonic() > deadline:
                raise Stuck(f"nobody listens on {path} after {patience:g} s") from None
            time.sleep(0.002)  # there is nothing to be woken by: a bound socket listens only a moment later
        except BaseException:
            found.close()
            raise
        else:
            return found


def row_of(region: Region) -> bytes:
    """Give a region as messages have it: guest-physical address, size, user address, offset in its descriptor."""
    return _REGION.pack(region.gpa, region.size, region.user, region.offset)


def _title(request: int) -> str:
    return _NAMES.get(request, f"message {request}")


def _refused(request: int, why: str) -> Refused:
    return Refused(errno.EREMOTEIO, f"{_title(request)}: the daemon gave {why}")


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
