"""A vhost-user backend that does nothing but keep account: of descriptors, of regions, and of the order of calls.

For tests and the fuzzer. Descriptors are numbers that `fresh` gives out. Each belongs to the device, to one slot here,
or is closed; `settle` asserts it. Calls that break the contract in `fusewire.transport.vhost_backend` assert.
"""

from fusewire.transport import vhost_wire as wire
from fusewire.transport.vhost import Device


class Ledger:
    def __init__(self):
        self.given = 0
        self.open = set()
        self.slots = {}  # what holds a descriptor: its number
        self.mapped = []
        self.maps = 0
        self.memory = []
        self.running = {}
        self.calls = []
        self.log_enabled = False
        self.refuse = set()  # names of calls that raise
        self.progress = 0  # what stop_queue says was taken since the start

    def fresh(self):
        """Give a new descriptor out, as one that has just been received."""
        self.given += 1
        self.open.add(self.given)
        return self.given

    def settle(self):
        """Every descriptor is in one slot, and every mapping in the table."""
        assert sorted(self.slots.values()) == sorted(self.open)
        assert self.mapped == self.memory

    def named(self, *names):
        """The calls of these names, in order."""
        return [call for call in self.calls if call[0] in names]

    def _note(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise OSError(12, f"{name} cannot now")

    def _put(self, slot, fd):
        old = self.slots.pop(slot, None)
        if old is not None:
            self._close(old)
        if fd != -1:
            assert fd in self.open
            assert fd not in self.slots.values()
            self.slots[slot] = fd

    def _close(self, fd):
        assert fd in self.open, "closed twice, or never received"
        self.open.remove(fd)

    def close_fd(self, fd):
        assert fd not in self.slots.values()
        self._close(fd)

    def map_region(self, fd, size, mmap_offset, guest_addr, user_addr):
        self._close(fd)
        self._note("map_region", guest_addr, size, user_addr, mmap_offset)
        self.maps += 1
        region = (guest_addr, size, user_addr, mmap_offset, self.maps)
        self.mapped.append(region)
        return region

    def unmap_region(self, region):
        assert region not in self.memory
        self.mapped.remove(region)
        self.calls.append(("unmap_region", region[0]))

    def set_memory(self, regions):
        assert all(region in self.mapped for region in regions)
        self.memory = list(regions)
        for vring in self.running.values():
            self._lies_in_memory(vring)
        self.calls.append(("set_memory", len(regions)))

    def _lies_in_memory(self, vring):
        areas = vring.areas()
        assert len(areas) == 3
        for _, address, length, alignment in areas:
            assert address % alignment == 0
            assert any(user <= address and address + length <= user + size for _, size, user, *_ in self.memory)

    def start_queue(self, index, vring):
        assert index not in self.running
        assert vring.size in [1 << bit for bit in range(16)]
        assert 0 <= vring.base < 65536
        self._lies_in_memory(vring)
        if "start_queue" in self.refuse:
            self._close(vring.kick)
        else:
            self._put(("kick", index), vring.kick)
        self._note("start_queue", index, vring.base, vring.enabled)
        self.running[index] = vring

    def stop_queue(self, index):
        vring = self.running.pop(index)
        self._put(("kick", index), -1)
        self.calls.append(("stop_queue", index))
        return vring.base + self.progress

    def enable_queue(self, index, enabled):
        assert self.running[index].enabled is enabled
        self.calls.append(("enable_queue", index, enabled))

    def update_queue(self, index, vring):
        assert self.running[index] is vring
        self._lies_in_memory(vring)
        self.calls.append(("update_queue", index, vring.log))

    def set_call(self, index, fd):
        self._put(("call", index), fd)
        self.calls.append(("set_call", index, fd))

    def set_err(self, index, fd):
        self._put(("err", index), fd)
        self.calls.append(("set_err", index, fd))

    def set_log(self, fd, size, offset):
        self._put("log", -1)
        if "set_log" in self.refuse and fd != -1:
            self._close(fd)
        else:
            self._put("log", fd)
        if fd != -1:
            self._note("set_log", size, offset)

    def set_log_enabled(self, enabled):
        assert enabled is not self.log_enabled
        self.log_enabled = enabled
        self.calls.append(("set_log_enabled", enabled))

    def set_backend_channel(self, fd):
        self._put("channel", fd)

    def make_inflight(self, num_queues, queue_size):
        self._note("make_inflight", num_queues, queue_size)
        self._put("made", self.fresh())
        return self.slots["made"], num_queues * (16 + 16 * queue_size), 0

    def set_inflight(self, fd, mmap_size, mmap_offset, num_queues, queue_size):
        if fd == -1:
            self._put("made", -1)
            self._put("inflight", -1)
            return
        assert not self.running
        if "set_inflight" in self.refuse:
            self._close(fd)
        else:
            self._put("inflight", fd)
        self._note("set_inflight", mmap_size, mmap_offset, num_queues, queue_size)

    def reset(self):
        assert not self.running
        self.calls.append(("reset",))


class Frontend:
    """Drives a device as a front end would, message by message."""

    def __init__(self, *, queues=2, tag=b""):
        self.ledger = Ledger()
        self.lines = []
        self.device = Device(self.ledger, queues=queues, tag=tag, log=self.lines.append)
        self.need_reply = False

    def send(self, request, payload=b"", fds=0, *, need_reply=None, flags=wire.VERSION):
        """Send one message with `fds` new descriptors; give the payload of its reply, None if there is none."""
        if self.need_reply if need_reply is None else need_reply:
            flags |= wire.FLAG_NEED_REPLY
        header = wire.HEADER.pack(request, flags, len(payload))
        assert self.device.expect(header) == len(payload)
        reply = self.device.receive(header, payload, [self.ledger.fresh() for _ in range(fds)])
        self.ledger.settle()
        if reply is None:
            assert self.device.reply_fds == []
            return None
        number, flags, size = wire.HEADER.unpack_from(reply)
        assert (number, flags, size) == (request, 5, len(reply) - 12)
        return reply[12:]

    def ask(self, request, payload=b"", **options):
        """Send a message whose reply is one number."""
        (number,) = wire.U64.unpack(self.send(request, payload, **options))
        return number

    def state(self, request, index, number=0, **options):
        return self.send(request, wire.STATE.pack(index, number), **options)
