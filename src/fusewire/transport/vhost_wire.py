"""vhost-user on the wire: numbers, layouts and one row per message that a front end may send.

Layer `transport`, without I/O and without state: values only. Sections are those of QEMU's docs/interop/vhost-user.rst.
All numbers are in the machine's byte order ("Message Specification"), but the device's configuration is little-endian.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

# "Header": request, flags, size of the payload. Bits 0-1 of the flags are the version, always 1.
HEADER: Final = Struct("=III")
HEADER_SIZE: Final = HEADER.size
VERSION_MASK: Final = 3
VERSION: Final = 1
FLAG_REPLY: Final = 1 << 2
FLAG_NEED_REPLY: Final = 1 << 3

# "Payload": the descriptions that our messages carry.
U64: Final = Struct("=Q")
STATE: Final = Struct("=II")  # index of the ring, number
ADDRESSES: Final = Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
REGION: Final = Struct("=QQQQ")  # guest address, size, user address, mmap offset
TABLE_HEADER: Final = Struct("=II")  # number of regions, padding
LOG: Final = Struct("=QQ")  # size, offset
CONFIG: Final = Struct("=III")  # offset, size, flags; the bytes follow
INFLIGHT: Final = Struct("=QQHH")  # mmap size, mmap offset, number of queues, size of the queues

# A table of 127 regions, more than the 32 that anybody sends; SCM_RIGHTS carries no more than 253 descriptors.
MAX_PAYLOAD: Final = 4096
# The configuration space of a virtio device in this protocol, VHOST_USER_MAX_CONFIG_SIZE.
CONFIG_SIZE: Final = 256
# What one queue takes in the in-flight region, "Inflight I/O tracking": struct QueueRegionSplit, then a
# struct DescStateSplit for each descriptor.
INFLIGHT_HEADER: Final = 16
INFLIGHT_DESCRIPTOR: Final = 16

# SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR: the ring's index, and that no descriptor comes along.
RING_INDEX_MASK: Final = 0xFF
RING_NO_FD: Final = 1 << 8
# SET_VRING_ADDR's flags: VHOST_VRING_F_LOG.
RING_LOG: Final = 1 << 0

# Feature bits, <linux/virtio_ring.h>, <linux/virtio_config.h>, <linux/vhost_types.h>, and vhost-user's own bit 30.
F_LOG_ALL: Final = 1 << 26
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_PROTOCOL_FEATURES: Final = 1 << 30
F_VERSION_1: Final = 1 << 32

# "Protocol features", as masks.
P_MQ: Final = 1 << 0
P_LOG_SHMFD: Final = 1 << 1
P_REPLY_ACK: Final = 1 << 3
P_BACKEND_REQ: Final = 1 << 5
P_CONFIG: Final = 1 << 9
P_INFLIGHT_SHMFD: Final = 1 << 12
P_RESET_DEVICE: Final = 1 << 13
P_CONFIGURE_MEM_SLOTS: Final = 1 << 15
# In a row of the table: belongs to something that we never offer.
P_NEVER: Final = 1 << 63

# "Front-end message types".
GET_FEATURES: Final = 1
SET_FEATURES: Final = 2
SET_OWNER: Final = 3
RESET_OWNER: Final = 4
SET_MEM_TABLE: Final = 5
SET_LOG_BASE: Final = 6
SET_LOG_FD: Final = 7
SET_VRING_NUM: Final = 8
SET_VRING_ADDR: Final = 9
SET_VRING_BASE: Final = 10
GET_VRING_BASE: Final = 11
SET_VRING_KICK: Final = 12
SET_VRING_CALL: Final = 13
SET_VRING_ERR: Final = 14
GET_PROTOCOL_FEATURES: Final = 15
SET_PROTOCOL_FEATURES: Final = 16
GET_QUEUE_NUM: Final = 17
SET_VRING_ENABLE: Final = 18
SET_BACKEND_REQ_FD: Final = 21
GET_CONFIG: Final = 24
SET_CONFIG: Final = 25
GET_INFLIGHT_FD: Final = 31
SET_INFLIGHT_FD: Final = 32
RESET_DEVICE: Final = 34
GET_MAX_MEM_SLOTS: Final = 36
ADD_MEM_REG: Final = 37
REM_MEM_REG: Final = 38
SET_DEVICE_STATE_FD: Final = 42
CHECK_DEVICE_STATE: Final = 43


class Message(NamedTuple):
    """One kind of message: how it must look, and what has to be negotiated before."""

    name: str
    sizes: tuple[int, ...]  # of the payload; empty: its handler looks
    fds: tuple[int, ...]  # how many descriptors; empty: its handler looks
    needs: int = 0  # a protocol feature
    refusal: bytes | None = None  # what a front end that waits for its own reply gets when we cannot serve it


# A message that has a reply of its own is answered also when it is refused, because its sender waits and QEMU does so
# with its main loop stopped. The answer is one that nobody takes for a value: none where a value is asked for (as the
# specification has it for GET_CONFIG, in the payload's own payload), a number that is not zero where a status is.
_NONE: Final = b""
_FAILED: Final = U64.pack(1)

MESSAGES: Final[dict[int, Message]] = {
    GET_FEATURES: Message("GET_FEATURES", (0,), (0,), 0, _NONE),
    SET_FEATURES: Message("SET_FEATURES", (8,), (0,)),
    SET_OWNER: Message("SET_OWNER", (0,), (0,)),
    RESET_OWNER: Message("RESET_OWNER", (0,), (0,)),
    SET_MEM_TABLE: Message("SET_MEM_TABLE", (), ()),
    SET_LOG_BASE: Message("SET_LOG_BASE", (LOG.size,), (1,), P_LOG_SHMFD, _FAILED),
    SET_LOG_FD: Message("SET_LOG_FD", (0,), (1,)),
    SET_VRING_NUM: Message("SET_VRING_NUM", (STATE.size,), (0,)),
    SET_VRING_ADDR: Message("SET_VRING_ADDR", (ADDRESSES.size,), (0,)),
    SET_VRING_BASE: Message("SET_VRING_BASE", (STATE.size,), (0,)),
    GET_VRING_BASE: Message("GET_VRING_BASE", (STATE.size,), (0,), 0, _NONE),
    SET_VRING_KICK: Message("SET_VRING_KICK", (8,), (0, 1)),
    SET_VRING_CALL: Message("SET_VRING_CALL", (8,), (0, 1)),
    SET_VRING_ERR: Message("SET_VRING_ERR", (8,), (0, 1)),
    GET_PROTOCOL_FEATURES: Message("GET_PROTOCOL_FEATURES", (0,), (0,), 0, _NONE),
    SET_PROTOCOL_FEATURES: Message("SET_PROTOCOL_FEATURES", (8,), (0,)),
    # Legal once MQ has been seen in GET_PROTOCOL_FEATURES: it need not have been agreed on.
    GET_QUEUE_NUM: Message("GET_QUEUE_NUM", (0,), (0,), 0, _NONE),
    SET_VRING_ENABLE: Message("SET_VRING_ENABLE", (STATE.size,), (0,)),
    SET_BACKEND_REQ_FD: Message("SET_BACKEND_REQ_FD", (0,), (1,), P_BACKEND_REQ),
    GET_CONFIG: Message("GET_CONFIG", (), (0,), P_CONFIG, CONFIG.pack(0, 0, 0)),
    SET_CONFIG: Message("SET_CONFIG", (), (0,), P_CONFIG),
    # The struct ends in four bytes of padding where C lays it out, as it does in QEMU and in rust-vmm.
    GET_INFLIGHT_FD: Message("GET_INFLIGHT_FD", (20, 24), (0,), P_INFLIGHT_SHMFD, INFLIGHT.pack(0, 0, 0, 0) + bytes(4)),
    SET_INFLIGHT_FD: Message("SET_INFLIGHT_FD", (20, 24), (1,), P_INFLIGHT_SHMFD),
    RESET_DEVICE: Message("RESET_DEVICE", (0,), (0,), P_RESET_DEVICE),
    GET_MAX_MEM_SLOTS: Message("GET_MAX_MEM_SLOTS", (0,), (0,), P_CONFIGURE_MEM_SLOTS, _NONE),
    ADD_MEM_REG: Message("ADD_MEM_REG", (8 + REGION.size,), (1,), P_CONFIGURE_MEM_SLOTS),
    # "No file descriptors SHOULD be passed", but there are front ends that do, and it is to be closed.
    REM_MEM_REG: Message("REM_MEM_REG", (8 + REGION.size,), (0, 1), P_CONFIGURE_MEM_SLOTS),
    # What belongs to features that are never offered: known for the reply that its sender waits for.
    19: Message("SEND_RARP", (), (), P_NEVER),
    20: Message("NET_SET_MTU", (), (), P_NEVER),
    22: Message("IOTLB_MSG", (), (), P_NEVER, _FAILED),
    23: Message("SET_VRING_ENDIAN", (), (), P_NEVER),
    26: Message("CREATE_CRYPTO_SESSION", (), (), P_NEVER, _NONE),
    27: Message("CLOSE_CRYPTO_SESSION", (), (), P_NEVER),
    28: Message("POSTCOPY_ADVISE", (), (), P_NEVER, _NONE),
    29: Message("POSTCOPY_LISTEN", (), (), P_NEVER),
    30: Message("POSTCOPY_END", (), (), P_NEVER, _FAILED),
    33: Message("GPU_SET_SOCKET", (), (), P_NEVER),
    35: Message("VRING_KICK", (), (), P_NEVER),
    39: Message("SET_STATUS", (), (), P_NEVER),
    40: Message("GET_STATUS", (), (), P_NEVER, _NONE),
    41: Message("GET_SHARED_OBJECT", (), (), P_NEVER, _NONE),
    SET_DEVICE_STATE_FD: Message("SET_DEVICE_STATE_FD", (), (), P_NEVER, U64.pack(RING_NO_FD | 1)),
    CHECK_DEVICE_STATE: Message("CHECK_DEVICE_STATE", (), (), P_NEVER, _FAILED),
    44: Message("GET_SHMEM_CONFIG", (), (), P_NEVER, _NONE),
    45: Message("GET_VRING_BASE_SKIP_DRAIN", (), (), P_NEVER, _NONE),
}
