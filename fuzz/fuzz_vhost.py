"""Invariant: whatever a front end sends, the vhost-user device raises only Ending, and loses no descriptor or mapping.

Run: python fuzz/fuzz_vhost.py [CORPUS] [-max_total_time=SECONDS]. Needs atheris. Without a directory for the corpus it
begins with what QEMU and Cloud Hypervisor send, in a temporary directory.
The input is a stream of messages as it comes through the socket, after one byte: bit 0 mends each header's version, so
that more of a mutated stream is read; bit 1 lets each second call fail that may. How many descriptors come along is in
bits 8 to 10 of a header's flags, which the device does not look at. What must hold is asserted in `vhost_ledger`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

with atheris.instrument_imports(include=["fusewire"]):
    from fusewire.transport import vhost_wire as wire
    from fusewire.transport.vhost import Device, Ending

from vhost_ledger import Ledger

MAY_FAIL = {"map_region", "start_queue", "set_log", "make_inflight", "set_inflight"}


def check_reply(reply: bytes | None, request: int) -> None:
    if reply is not None:
        number, flags, size = wire.HEADER.unpack_from(reply)
        assert (number, flags, size) == (request, 5, len(reply) - 12)


def one_input(data: bytes) -> None:
    if not data:
        return
    mend, fail = data[0] & 1, data[0] & 2
    ledger = Ledger()
    device = Device(ledger, queues=3, tag=b"tag", log=str.encode)  # a line that is no text would not do
    position, number = 1, 0
    while position + 12 <= len(data):
        request, flags, size = wire.HEADER.unpack_from(data, position)
        if mend:
            flags = flags & ~3 | 1
            size = min(size, len(data) - position - 12)
        header = wire.HEADER.pack(request, flags, size)
        fds = [ledger.fresh() for _ in range(flags >> 8 & 7)]
        number += 1
        ledger.refuse = MAY_FAIL if fail and number % 2 else set()
        try:
            assert device.expect(header) == size
            payload = data[position + 12 : position + 12 + size]
            check_reply(device.receive(header, payload, fds), request)
        except Ending:
            for fd in fds:
                if fd in ledger.open:
                    ledger.close_fd(fd)
            break
        ledger.settle()
        assert set(ledger.running) == {index for index, ring in enumerate(device.rings) if ring.running}
        position += 12 + size
    device.disconnect()
    assert not ledger.open
    assert not ledger.mapped
    assert not ledger.running


def message(request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> bytes:
    return wire.HEADER.pack(request, flags | fds << 8, len(payload)) + payload


def rings(count: int) -> Iterator[bytes]:
    for index in range(count):
        at = 0x7F00_0000_0000 + index * 0x10000
        yield message(wire.SET_VRING_CALL, wire.U64.pack(index), 1)
        yield message(wire.SET_VRING_ERR, wire.U64.pack(index), 1)
        yield message(wire.SET_VRING_NUM, wire.STATE.pack(index, 128))
        yield message(wire.SET_VRING_BASE, wire.STATE.pack(index, 0))
        yield message(wire.SET_VRING_ADDR, wire.ADDRESSES.pack(index, 0, at, at + 0x1000, at + 0x2000, 0))
        yield message(wire.SET_VRING_KICK, wire.U64.pack(index), 1)
        yield message(wire.SET_VRING_ENABLE, wire.STATE.pack(index, 1))


def seeds() -> Iterator[bytes]:
    memory = wire.REGION.pack(0x4000_0000, 0x10_0000, 0x7F00_0000_0000, 0)
    more = wire.REGION.pack(0, 4096, 0, 4096)
    inflight = wire.INFLIGHT.pack(3 * (16 + 16 * 128), 0, 3, 128) + bytes(4)
    begin = [
        message(wire.GET_FEATURES),
        message(wire.GET_PROTOCOL_FEATURES),
        message(wire.SET_PROTOCOL_FEATURES, wire.U64.pack(0xB22B)),
        message(wire.GET_QUEUE_NUM),
        message(wire.GET_MAX_MEM_SLOTS),
        message(wire.SET_BACKEND_REQ_FD, fds=1),
        message(wire.SET_OWNER),
        message(wire.SET_FEATURES, wire.U64.pack(0x1_7400_0000)),
    ]
    table = message(wire.SET_MEM_TABLE, wire.TABLE_HEADER.pack(1, 0) + memory, 1)
    added = message(wire.ADD_MEM_REG, bytes(8) + memory, 1, 9) + message(wire.ADD_MEM_REG, bytes(8) + more, 1, 9)
    middles = [
        [message(wire.SET_LOG_BASE, wire.LOG.pack(8192, 0), 1)],
        [message(wire.GET_CONFIG, wire.CONFIG.pack(0, 40, 0) + bytes(40))],
        [message(wire.REM_MEM_REG, bytes(8) + memory)],
        [message(wire.SET_MEM_TABLE, wire.TABLE_HEADER.pack(2, 0) + more + memory, 2)],
        [message(wire.SET_VRING_ADDR, wire.ADDRESSES.pack(1, 1, 0x7F00_0000_0000, *(0x7F00_0000_8000,) * 2, 4096))],
        [message(wire.GET_VRING_BASE, wire.STATE.pack(1, 0)), *rings(2)],
        [message(wire.RESET_DEVICE), *rings(3)],
        [message(wire.RESET_OWNER)],
        [message(wire.SET_DEVICE_STATE_FD, bytes(8), 1), message(wire.CHECK_DEVICE_STATE)],
    ]
    took_over = [message(wire.GET_INFLIGHT_FD, inflight), message(wire.SET_INFLIGHT_FD, inflight, 1)]
    for middle in middles:
        for start in ([*begin, table], [*begin, added], [*begin, table, *took_over], [table]):
            for mode in range(4):
                yield bytes([mode]) + b"".join([*start, *rings(3), *middle])


def main() -> None:
    arguments = sys.argv
    if not any(os.path.isdir(argument) for argument in arguments[1:]):
        # The fuzzer ends its process without any cleaning up: the directory is removed by a parent.
        with tempfile.TemporaryDirectory(prefix="fuzz-vhost-") as corpus:
            for number, seed in enumerate(seeds()):
                with open(os.path.join(corpus, str(number)), "wb") as file:
                    file.write(seed)
            sys.exit(subprocess.call([sys.executable, *arguments, corpus]))
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
