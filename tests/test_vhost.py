"""The vhost-user state machine: the message orders of real front ends, and everything that none of them would send."""

import json
from importlib import resources

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fusewire.transport import vhost_wire as wire
from fusewire.transport.vhost import MAX_SLOTS, Device, Ending
from vhost_ledger import Frontend, Ledger

OFFERED = 0x1_7400_0000  # VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC, LOG_ALL
PROTOCOL = 0xB02B  # MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS
QEMU_FEATURES = OFFERED & ~wire.F_LOG_ALL
GUEST, USER, SIZE = 0x4000_0000, 0x7F00_0000_0000, 0x10_0000
DESC, AVAIL, USED = USER, USER + 0x1000, USER + 0x2000


def u64(number):
    return wire.U64.pack(number)


def region(guest=GUEST, size=SIZE, user=USER, offset=0):
    return wire.REGION.pack(guest, size, user, offset)


def table(*regions):
    return wire.TABLE_HEADER.pack(len(regions), 0) + b"".join(regions)


def addresses(index, *, flags=0, desc=DESC, used=USED, avail=AVAIL, log=0):
    apart = index * 0x10000
    return wire.ADDRESSES.pack(index, flags, desc + apart, used + apart, avail + apart, log)


def set_up(front, index, *, size=128, base=0, fd=1, log=None):
    """What precedes SET_VRING_KICK, in QEMU's order, and that."""
    front.state(wire.SET_VRING_NUM, index, size)
    front.state(wire.SET_VRING_BASE, index, base)
    front.send(wire.SET_VRING_ADDR, addresses(index, flags=log is not None, log=log or 0))
    return front.send(wire.SET_VRING_KICK, u64(index), fds=fd)


def serving(*, queues=2, protocol=PROTOCOL, tag=b""):
    """A front end with agreed features, memory, and all rings running and enabled."""
    front = Frontend(queues=queues, tag=tag)
    front.send(wire.SET_PROTOCOL_FEATURES, u64(protocol))
    front.send(wire.SET_FEATURES, u64(QEMU_FEATURES))
    front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
    for index in range(queues):
        set_up(front, index)
        front.state(wire.SET_VRING_ENABLE, index, 1)
    assert set(front.ledger.running) == set(range(queues))
    assert front.lines == []
    return front


def refused(front, request, payload=b"", **options):
    """A message that must be answered with non-zero and change nothing; gives the line that says why, if it is new."""
    before = state_of(front)
    lines, calls = len(front.lines), len(front.ledger.calls)
    assert front.ask(request, payload, need_reply=True, **options) != 0
    assert state_of(front) == before
    assert front.ledger.calls[calls:] == []
    new = front.lines[lines:]
    assert len(new) <= 1  # none where the same was said before
    return "".join(new)


def state_of(front):
    rings = [tuple(getattr(ring, name) for name in ring.__slots__) for ring in front.device.rings]
    return rings, front.device.features, front.device.protocol_features, dict(front.ledger.slots), front.ledger.memory


# What front ends really send


def qemu_connects(front, queues=2):
    assert front.ask(wire.GET_FEATURES) == OFFERED
    assert front.ask(wire.GET_PROTOCOL_FEATURES) == PROTOCOL
    assert front.send(wire.SET_PROTOCOL_FEATURES, u64(PROTOCOL & 0x8C2B)) is None
    assert front.ask(wire.GET_QUEUE_NUM) == front.device.queues
    assert front.ask(wire.GET_MAX_MEM_SLOTS) == 509
    assert front.ask(wire.SET_BACKEND_REQ_FD, fds=1, need_reply=True) == 0
    assert front.send(wire.SET_OWNER) is None
    assert front.ask(wire.GET_FEATURES) == OFFERED
    for index in range(queues):
        assert front.send(wire.SET_VRING_CALL, u64(index), fds=1) is None
        assert front.send(wire.SET_VRING_ERR, u64(index), fds=1) is None


def qemu_driver_ok(front, *, newest, memory=True, queues=2, bases=(0, 0)):
    for index in range(queues):
        front.send(wire.SET_VRING_CALL, u64(index), fds=1)
    assert front.send(wire.SET_FEATURES, u64(QEMU_FEATURES)) is None
    if memory:
        low, high = region(0, 0xA0000, USER), region(0x10_0000, 0x800_0000, USER + 0x10_0000, 0x10_0000)
        assert front.ask(wire.ADD_MEM_REG, bytes(8) + low, fds=1, need_reply=True) == 0
        assert front.ask(wire.ADD_MEM_REG, bytes(8) + high, fds=1, need_reply=True) == 0
    for index in range(queues):
        assert set_up(front, index, base=bases[index]) is None
    for index in range(queues):
        reply = front.state(wire.SET_VRING_ENABLE, index, 1, need_reply=newest)
        assert reply == (u64(0) if newest else None)
    for index in range(queues):
        front.send(wire.SET_VRING_CALL, u64(index), fds=1)


def qemu_stops(front, *, newest, queues=2):
    for index in range(queues):
        front.state(wire.SET_VRING_ENABLE, index, 0, need_reply=newest)
    bases = [wire.STATE.unpack(front.state(wire.GET_VRING_BASE, index)) for index in range(queues)]
    for index in range(queues):
        front.send(wire.SET_VRING_CALL, u64(index), fds=1)
    assert [index for index, _ in bases] == list(range(queues))
    return [base for _, base in bases]


@pytest.mark.parametrize("newest", [False, True], ids=["qemu-7.2", "qemu-10.0"])
def test_qemu_connects_runs_reboots_the_guest_and_leaves(newest):
    front = Frontend()
    ledger = front.ledger
    qemu_connects(front)
    assert ledger.running == {}
    qemu_driver_ok(front, newest=newest)
    assert ledger.named("start_queue", "enable_queue") == [
        ("start_queue", 0, 0, False),
        ("start_queue", 1, 0, False),
        ("enable_queue", 0, True),
        ("enable_queue", 1, True),
    ]
    assert ledger.running[1].features == QEMU_FEATURES
    assert len(ledger.memory) == 2
    ledger.progress = 7
    assert qemu_stops(front, newest=newest) == [7, 7]
    assert ledger.running == {}
    # The guest has rebooted: no new memory, no reset; its driver begins at 0 again.
    ledger.calls.clear()
    qemu_driver_ok(front, newest=newest, memory=False)
    assert ledger.named("start_queue", "set_memory", "map_region", "reset") == [
        ("start_queue", 0, 0, False),
        ("start_queue", 1, 0, False),
    ]
    assert all(vring.enabled for vring in ledger.running.values())
    qemu_stops(front, newest=newest)
    front.device.disconnect()
    assert ledger.open == set()
    assert ledger.mapped == []
    assert front.lines == []


def test_qemu_is_killed_while_it_runs_and_the_next_one_connects():
    front = Frontend()
    for _ in range(2):
        qemu_connects(front)
        qemu_driver_ok(front, newest=True)
        assert len(front.ledger.running) == 2
        front.device.disconnect()
        assert front.ledger.running == {}
        assert front.ledger.open == set()
        assert front.ledger.mapped == []
    assert front.lines == []


def test_qemu_with_more_queues_than_are_served_is_told_what_to_do_and_the_others_work():
    front = Frontend()
    qemu_connects(front, queues=4)
    qemu_driver_ok(front, newest=False, queues=4, bases=(0,) * 4)
    assert set(front.ledger.running) == {0, 1}
    assert [line.partition(":")[0] for line in front.lines] == ["there is no ring 2", "there is no ring 3"]
    assert "start with --queues 2 or more" in front.lines[0]
    assert "num-request-queues=1" in front.lines[0]
    assert qemu_stops(front, newest=False, queues=4) == [0, 0, 0, 0]
    qemu_driver_ok(front, newest=False, queues=4, bases=(0,) * 4, memory=False)
    assert set(front.ledger.running) == {0, 1}
    assert len(front.lines) == 2


def test_logging_begins_under_a_running_ring_and_ends_again():
    front = serving()
    ledger = front.ledger
    ledger.calls.clear()
    assert front.ask(wire.SET_LOG_BASE, wire.LOG.pack(0x2000, 0), fds=1) == 0
    assert front.ask(wire.SET_FEATURES, u64(OFFERED), need_reply=True) == 0
    for index in range(2):
        assert front.ask(wire.SET_VRING_ADDR, addresses(index, flags=1, log=0x9000), need_reply=True) == 0
    assert ledger.calls == [
        ("set_log", 0x2000, 0),
        ("set_log_enabled", True),
        ("update_queue", 0, 0x9000),
        ("update_queue", 1, 0x9000),
    ]
    qemu_stops(front, newest=True)
    set_up(front, 1, log=0x9000)
    assert ledger.running[1].log == 0x9000
    front.send(wire.SET_FEATURES, u64(QEMU_FEATURES))
    front.send(wire.SET_VRING_ADDR, addresses(1))
    assert ledger.calls[-2:] == [("set_log_enabled", False), ("update_queue", 1, None)]
    assert front.lines == []


def test_a_second_log_takes_the_place_of_the_first():
    front = serving()
    for number in (1, 2):
        assert front.ask(wire.SET_LOG_BASE, wire.LOG.pack(number * 4096, 0), fds=1) == 0
    assert front.ledger.named("set_log") == [("set_log", 4096, 0), ("set_log", 8192, 0)]


def test_cloud_hypervisor_sets_up_resets_and_hotplugs_memory():
    front = Frontend(queues=3)
    ledger = front.ledger
    wanted = wire.P_MQ | wire.P_CONFIGURE_MEM_SLOTS | wire.P_REPLY_ACK | wire.P_INFLIGHT_SHMFD | wire.P_LOG_SHMFD
    assert front.send(wire.SET_OWNER) is None
    assert front.ask(wire.GET_FEATURES) == OFFERED
    assert front.ask(wire.GET_PROTOCOL_FEATURES) & wanted == wanted
    assert front.send(wire.SET_PROTOCOL_FEATURES, u64(wanted)) is None
    front.need_reply = True  # on every message from now on
    assert front.ask(wire.GET_QUEUE_NUM) == 3
    assert front.ask(wire.SET_FEATURES, u64(QEMU_FEATURES)) == 0
    assert front.ask(wire.SET_MEM_TABLE, table(region()), fds=1) == 0
    size, offset, rings, entries = wire.INFLIGHT.unpack_from(
        front.send(wire.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, 3, 1024) + bytes(4))
    )
    assert (size, offset, rings, entries) == (3 * (16 + 16 * 1024), 0, 3, 1024)
    assert front.device.reply_fds == [ledger.slots["made"]]
    region_of_ours = wire.INFLIGHT.pack(size, offset, rings, entries) + bytes(4)
    assert front.ask(wire.SET_INFLIGHT_FD, region_of_ours, fds=1) == 0
    for index in range(3):
        assert front.ask(wire.SET_VRING_NUM, wire.STATE.pack(index, 1024)) == 0
        assert front.ask(wire.SET_VRING_ADDR, addresses(index, avail=USER + 0x5000, used=USER + 0x8000)) == 0
        assert front.ask(wire.SET_VRING_BASE, wire.STATE.pack(index, 0)) == 0
        assert front.ask(wire.SET_VRING_CALL, u64(index), fds=1) == 0
        assert front.ask(wire.SET_VRING_KICK, u64(index), fds=1) == 0
    for index in range(3):
        assert front.ask(wire.SET_VRING_ENABLE, wire.STATE.pack(index, 1)) == 0
    assert set(ledger.running) == {0, 1, 2}
    assert front.ask(wire.ADD_MEM_REG, bytes(8) + region(1 << 40, SIZE, 1 << 44), fds=1) == 0
    assert set(ledger.running) == {0, 1, 2}
    assert len(ledger.memory) == 2
    ledger.progress = 5
    for index in range(3):
        assert front.ask(wire.SET_VRING_ENABLE, wire.STATE.pack(index, 0)) == 0
        assert front.state(wire.GET_VRING_BASE, index) == wire.STATE.pack(index, 5)
    assert ledger.running == {}
    assert front.lines == []


def test_cloud_hypervisor_that_wants_protocol_features_of_others_is_refused_them_all():
    front = Frontend()
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK))
    assert "0x80000" in refused(front, wire.SET_PROTOCOL_FEATURES, u64(wire.P_MQ | 1 << 19))
    assert front.device.protocol_features == wire.P_REPLY_ACK


def test_crosvm_reads_the_tag_and_never_asks_for_acknowledgement():
    front = Frontend(queues=5, tag=b"files")
    offered = front.ask(wire.GET_FEATURES)
    assert front.send(wire.SET_OWNER) is None
    assert front.ask(wire.GET_PROTOCOL_FEATURES) == PROTOCOL | wire.P_CONFIG
    wanted = wire.P_CONFIG | wire.P_MQ | wire.P_BACKEND_REQ | wire.P_REPLY_ACK
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wanted))
    assert front.ask(wire.GET_QUEUE_NUM) == 5
    reply = front.send(wire.GET_CONFIG, wire.CONFIG.pack(0, 40, 1) + bytes(40))
    assert reply == wire.CONFIG.pack(0, 40, 1) + b"files".ljust(36, b"\0") + b"\4\0\0\0"
    reply = front.send(wire.GET_CONFIG, wire.CONFIG.pack(36, 4, 0) + bytes(4))
    assert reply[12:] == b"\4\0\0\0"
    reply = front.send(wire.GET_CONFIG, wire.CONFIG.pack(40, 216, 0) + bytes(216))
    assert reply[12:] == bytes(216)
    assert front.send(wire.SET_FEATURES, u64(offered & ~wire.F_LOG_ALL)) is None
    assert front.send(wire.SET_MEM_TABLE, table(region(), region(1 << 33, SIZE, USER + SIZE)), fds=2) is None
    for index in range(5):
        assert front.state(wire.SET_VRING_NUM, index, 64) is None
        assert front.send(wire.SET_VRING_ADDR, addresses(index)) is None
        assert front.state(wire.SET_VRING_BASE, index) is None
        assert front.send(wire.SET_VRING_CALL, u64(index), fds=1) is None
        assert front.send(wire.SET_VRING_KICK, u64(index), fds=1) is None
        assert front.state(wire.SET_VRING_ENABLE, index, 1) is None
    assert len(front.ledger.running) == 5
    for index in range(5):
        assert front.state(wire.GET_VRING_BASE, index) == wire.STATE.pack(index, 0)
    assert front.lines == []


def test_the_least_front_end_agrees_on_no_protocol_feature():
    front = Frontend()
    assert front.ask(wire.GET_FEATURES) == OFFERED
    assert front.send(wire.SET_PROTOCOL_FEATURES, u64(0)) is None
    assert front.send(wire.SET_OWNER) is None
    assert front.send(wire.SET_FEATURES, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES)) is None
    assert front.send(wire.SET_MEM_TABLE, table(region()), fds=1) is None
    for index in range(2):
        assert set_up(front, index) is None
        assert front.ledger.calls[-1] == ("start_queue", index, 0, False)
        assert front.state(wire.SET_VRING_ENABLE, index, 1) is None
    assert front.ledger.running[1].features == wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES
    assert front.lines == []


def test_rings_are_enabled_from_the_start_without_protocol_features():
    front = Frontend()
    front.send(wire.SET_FEATURES, u64(wire.F_VERSION_1))
    front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
    set_up(front, 1)
    assert front.ledger.calls[-1] == ("start_queue", 1, 0, True)


def test_features_without_protocol_features_enable_rings_that_already_run():
    front = Frontend()
    front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
    set_up(front, 1)
    front.send(wire.SET_FEATURES, u64(wire.F_VERSION_1))
    assert front.ledger.calls[-1] == ("enable_queue", 1, True)


# Replies


def test_an_acknowledgement_comes_only_where_it_is_agreed_on_and_asked_for():
    front = Frontend()
    assert front.send(wire.SET_OWNER, need_reply=True) is None
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK))
    assert front.send(wire.SET_OWNER) is None
    assert front.ask(wire.SET_OWNER, need_reply=True) == 0
    assert front.ask(wire.SET_FEATURES, u64(1), need_reply=True) == 1
    assert front.send(wire.SET_FEATURES, u64(1)) is None


def test_the_message_that_agrees_on_acknowledgements_is_acknowledged():
    front = Frontend()
    assert front.ask(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK), need_reply=True) == 0
    assert front.send(wire.SET_PROTOCOL_FEATURES, u64(0), need_reply=True) is None


def test_a_message_with_a_reply_of_its_own_is_answered_once():
    front = serving()
    front.need_reply = True
    assert front.ask(wire.GET_FEATURES) == OFFERED
    assert front.ask(wire.GET_PROTOCOL_FEATURES) == PROTOCOL
    assert front.ask(wire.GET_QUEUE_NUM) == 2
    assert front.ask(wire.GET_MAX_MEM_SLOTS) == 509
    assert front.ask(wire.SET_LOG_BASE, wire.LOG.pack(4096, 0), fds=1) == 0
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 0)


@pytest.mark.parametrize("need_reply", [False, True])
def test_who_waits_for_a_value_that_cannot_be_given_gets_a_reply_that_is_none(need_reply):
    front = serving()
    front.need_reply = need_reply
    assert front.send(wire.GET_FEATURES, u64(0)) == b""
    assert front.send(wire.GET_VRING_BASE, u64(0), fds=1) == b""
    assert front.send(wire.GET_CONFIG, wire.CONFIG.pack(0, 40, 0) + bytes(40)) == bytes(12)  # no tag, no CONFIG
    assert front.send(wire.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, 9, 128) + bytes(4)) == bytes(24)
    assert front.ask(wire.SET_LOG_BASE, wire.LOG.pack(0, 0), fds=1) == 1
    assert front.ask(wire.SET_DEVICE_STATE_FD, bytes(8), fds=1) == 0x101
    assert front.ask(wire.CHECK_DEVICE_STATE) == 1
    assert len(front.lines) == 7


def test_a_log_without_shared_memory_is_refused_and_has_no_reply_of_its_own():
    front = Frontend()
    assert front.send(wire.SET_LOG_BASE, u64(0), fds=1) is None
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK))
    assert front.ask(wire.SET_LOG_BASE, wire.LOG.pack(4096, 0), fds=1, need_reply=True) == 1
    assert front.ledger.named("set_log") == []


@pytest.mark.parametrize("request_number", [0, 19, 20, 23, 27, 29, 33, 35, 39, 46, 100, 0xFFFF_FFFF])
def test_what_is_not_known_is_refused_and_its_descriptors_are_closed(request_number):
    front = serving()
    refused(front, request_number, bytes(40), fds=3)
    assert front.send(request_number, bytes(40), fds=3) is None


def test_a_reply_that_nobody_asked_for_is_ignored():
    front = serving()
    before = state_of(front)
    assert front.send(wire.SET_MEM_TABLE, table(), fds=2, flags=wire.VERSION | wire.FLAG_REPLY) is None
    assert state_of(front) == before
    assert "reply" in front.lines[-1]


@pytest.mark.parametrize(
    ("request_number", "payload", "fds"),
    [
        (wire.SET_BACKEND_REQ_FD, b"", 1),
        (wire.RESET_DEVICE, b"", 0),
        (wire.GET_MAX_MEM_SLOTS, b"", 0),
        (wire.ADD_MEM_REG, bytes(8) + region(), 1),
        (wire.REM_MEM_REG, bytes(8) + region(), 1),
        (wire.GET_INFLIGHT_FD, bytes(24), 0),
        (wire.SET_INFLIGHT_FD, bytes(24), 1),
        (wire.GET_CONFIG, wire.CONFIG.pack(0, 4, 0) + bytes(4), 0),
        (wire.SET_CONFIG, wire.CONFIG.pack(0, 4, 0) + bytes(4), 0),
    ],
)
def test_a_message_of_a_feature_that_is_not_agreed_on_is_refused(request_number, payload, fds):
    front = serving(protocol=0, tag=b"tag")
    before = state_of(front)
    front.send(request_number, payload, fds=fds)
    assert state_of(front) == before
    assert "not agreed on" in front.lines[-1]


# Headers


@pytest.mark.parametrize(
    "header",
    [
        b"",
        bytes(11),
        wire.HEADER.pack(wire.GET_FEATURES, 0, 0),
        wire.HEADER.pack(wire.GET_FEATURES, 2, 0),
        wire.HEADER.pack(wire.GET_FEATURES, 3, 0),
        wire.HEADER.pack(wire.GET_FEATURES, 1, 4097),
        wire.HEADER.pack(wire.SET_MEM_TABLE, 1, 0xFFFF_FFFF),
        b"GET / HTTP/1",
    ],
)
def test_a_header_of_no_message_ends_the_connection_and_leaks_nothing(header):
    front = serving()
    with pytest.raises(Ending):
        front.device.expect(header)
    with pytest.raises(Ending):
        front.device.receive(header, b"", [front.ledger.fresh(), front.ledger.fresh()])
    front.ledger.settle()
    front.device.disconnect()
    assert front.ledger.open == set()


def test_a_payload_of_the_greatest_size_is_read():
    front = Frontend()
    assert front.device.expect(wire.HEADER.pack(wire.SET_MEM_TABLE, 1, 4096)) == 4096


# Features


@pytest.mark.parametrize("strange", [1, wire.F_VERSION_1 << 1, 1 << 34, 1 << 63])
def test_features_that_were_not_offered_are_refused(strange):
    front = serving()
    assert f"{strange:#x}" in refused(front, wire.SET_FEATURES, u64(QEMU_FEATURES | strange))


def test_a_ring_keeps_the_features_that_it_was_started_with():
    front = serving()
    front.send(wire.SET_FEATURES, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    assert front.ledger.running[1].features == QEMU_FEATURES
    front.state(wire.GET_VRING_BASE, 1)
    set_up(front, 1)
    assert front.ledger.running[1].features == wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES


def test_the_configuration_is_offered_only_with_a_tag_and_cannot_be_written():
    assert not Frontend().ask(wire.GET_PROTOCOL_FEATURES) & wire.P_CONFIG
    front = serving(protocol=PROTOCOL | wire.P_CONFIG, tag=b"t" * 36)
    assert front.send(wire.GET_CONFIG, wire.CONFIG.pack(0, 36, 0) + bytes(36))[12:] == b"t" * 36
    for offset, size, length in [(0, 0, 0), (0, 257, 257), (256, 1, 1), (0, 8, 4), (0, 4, 8), (2**32 - 1, 4, 4)]:
        assert front.send(wire.GET_CONFIG, wire.CONFIG.pack(offset, size, 0) + bytes(length)) == bytes(12)
    assert front.send(wire.GET_CONFIG, bytes(11)) == bytes(12)
    refused(front, wire.SET_CONFIG, wire.CONFIG.pack(0, 4, 1) + b"evil")


@pytest.mark.parametrize(("queues", "tag"), [(0, b""), (1, b""), (257, b""), (2, b"t" * 37)])
def test_a_device_that_cannot_be_is_not_made(queues, tag):
    with pytest.raises(ValueError, match=r"virtqueues|tag"):
        Device(Ledger(), queues=queues, tag=tag)


# Memory


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (region(GUEST + SIZE, 0, USER + SIZE), "empty"),
        (region(2**64 - 4096, 8192, USER + SIZE), "beyond"),
        (region(GUEST + SIZE, 8192, 2**64 - 4096), "beyond"),
        (region(GUEST + SIZE, 2**64 - 1, USER + SIZE), "beyond"),
        (region(GUEST + SIZE, 8192, USER + SIZE, 2**63 - 4096), "too far"),
        (region(GUEST + SIZE, 8192, USER + SIZE, 8), "askew"),
        (region(), "overlap"),
        (region(GUEST + SIZE - 4096, SIZE, USER + SIZE), "overlap at guest"),
        (region(GUEST - 4096, 4097, USER + SIZE), "overlap at guest"),
        (region(GUEST + SIZE, SIZE, USER + SIZE - 16), "overlap at user"),
        (region(GUEST + SIZE, 1, USER + 4096), "overlap at user"),
        (region(0, 2**63, USER + SIZE), "overlap at guest"),
    ],
)
def test_memory_that_cannot_be_is_refused_in_a_table_and_alone(second, why):
    front = serving()
    assert why in refused(front, wire.ADD_MEM_REG, bytes(8) + second, fds=1)
    assert why in refused(front, wire.SET_MEM_TABLE, table(region(), second), fds=2)


def test_memory_up_to_the_last_address_is_served():
    front = serving()
    last = region(2**64 - 4096, 4096, 2**64 - 4096)
    assert front.ask(wire.ADD_MEM_REG, bytes(8) + last, fds=1, need_reply=True) == 0


@pytest.mark.parametrize("fds", [0, 1, 3, 8])
def test_a_table_has_one_descriptor_for_each_region(fds):
    front = serving()
    refused(front, wire.SET_MEM_TABLE, table(region(), region(0, SIZE, 0)), fds=fds)


@pytest.mark.parametrize("payload", [table(), table(region(), region(0, SIZE, 0))], ids=["none", "two"])
def test_a_table_says_how_many_regions_it_has(payload):
    front = serving()
    number, _ = wire.TABLE_HEADER.unpack_from(payload)
    for wrong in (number + 1, 0xFFFF_FFFF):
        refused(front, wire.SET_MEM_TABLE, wire.TABLE_HEADER.pack(wrong, 0) + payload[8:], fds=number)


def test_what_was_mapped_of_a_table_that_fails_is_let_go_and_the_old_one_stays():
    front = serving()
    ledger = front.ledger
    memory = list(ledger.memory)
    real = ledger.map_region

    def map_two(fd, *fields):
        if fields[2] >= 2 * SIZE:
            ledger.close_fd(fd)
            raise ValueError("not a memfd")
        return real(fd, *fields)

    ledger.map_region = map_two
    payload = table(*(region(number * SIZE, SIZE, number * SIZE) for number in range(4)))
    assert front.ask(wire.SET_MEM_TABLE, payload, fds=4, need_reply=True) == 1
    assert front.lines == ["SET_MEM_TABLE refused: not a memfd"]
    assert ledger.memory == memory
    assert len(ledger.named("unmap_region")) == 2


def test_a_region_that_cannot_be_mapped_is_refused_and_nothing_else_changes():
    front = serving()
    front.ledger.refuse = {"map_region"}
    before = state_of(front)
    assert front.ask(wire.ADD_MEM_REG, bytes(8) + region(0, SIZE, 0), fds=1, need_reply=True) == 1
    assert state_of(front) == before
    assert "cannot now" in front.lines[-1]


def test_all_slots_can_be_filled_and_no_more():
    front = serving()
    for number in range(1, MAX_SLOTS):
        payload = bytes(8) + region(1 << 40 | number << 16, 4096, 1 << 40 | number << 16)
        assert front.ask(wire.ADD_MEM_REG, payload, fds=1, need_reply=True) == 0
    assert len(front.ledger.memory) == MAX_SLOTS
    assert "509" in refused(front, wire.ADD_MEM_REG, bytes(8) + region(0, 4096, 0), fds=1)
    assert front.ask(wire.REM_MEM_REG, payload, need_reply=True) == 0
    assert front.ask(wire.ADD_MEM_REG, bytes(8) + region(0, 4096, 0), fds=1, need_reply=True) == 0


@pytest.mark.parametrize("fds", [0, 1])
def test_a_region_is_removed_by_addresses_and_size_and_a_descriptor_is_closed(fds):
    front = serving()
    extra = region(0, SIZE, 0, 4096)
    front.send(wire.ADD_MEM_REG, bytes(8) + extra, fds=1)
    for wrong in (region(0, SIZE - 1, 0), region(0, SIZE, 16), region(4096, SIZE, 0)):
        assert "no memory region" in refused(front, wire.REM_MEM_REG, bytes(8) + wrong, fds=fds)
    assert front.ask(wire.REM_MEM_REG, bytes(8) + region(0, SIZE, 0, 0), fds=fds, need_reply=True) == 0
    assert len(front.ledger.memory) == 1
    assert set(front.ledger.running) == {0, 1}
    refused(front, wire.REM_MEM_REG, bytes(8) + extra, fds=fds)


def test_memory_is_replaced_in_one_step_under_rings_that_run():
    front = serving()
    front.ledger.calls.clear()
    assert front.ask(wire.SET_MEM_TABLE, table(region(), region(0, SIZE, 0)), fds=2, need_reply=True) == 0
    assert [call[0] for call in front.ledger.calls] == ["map_region", "map_region", "set_memory", "unmap_region"]
    assert set(front.ledger.running) == {0, 1}


def test_a_ring_whose_memory_is_taken_away_stops_before_and_says_where_it_was():
    front = serving()
    ledger = front.ledger
    ledger.progress = 9
    ledger.calls.clear()
    low = region(GUEST, 0x10000, USER)  # holds ring 0 only
    assert front.ask(wire.SET_MEM_TABLE, table(low), fds=1, need_reply=True) == 0
    assert [call[0] for call in ledger.calls] == ["map_region", "stop_queue", "set_memory", "unmap_region"]
    assert set(ledger.running) == {0}
    assert "ring 1 stopped: the memory of its descriptor table" in front.lines[-1]
    assert "does not lie in guest memory" in refused(front, wire.SET_VRING_KICK, u64(1), fds=1)
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 9)
    front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 0
    assert ledger.calls[-1] == ("start_queue", 1, 9, True)


def test_the_last_region_may_go_while_rings_run():
    front = serving()
    assert front.ask(wire.REM_MEM_REG, bytes(8) + region(), need_reply=True) == 0
    assert front.ledger.running == {}
    assert front.ledger.memory == []


# Rings


def test_ring_addresses_may_come_before_the_memory_that_holds_them():
    front = Frontend()
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK))
    front.need_reply = True
    assert front.ask(wire.SET_VRING_ADDR, addresses(1)) == 0
    assert front.ask(wire.SET_VRING_NUM, wire.STATE.pack(1, 128)) == 0
    refused(front, wire.SET_VRING_KICK, u64(1), fds=1)
    assert front.ask(wire.SET_MEM_TABLE, table(region()), fds=1) == 0
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1) == 0
    assert set(front.ledger.running) == {1}


def test_a_kick_before_the_ring_is_set_up_says_what_is_missing():
    front = Frontend()
    front.send(wire.SET_PROTOCOL_FEATURES, u64(wire.P_REPLY_ACK))
    front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
    assert "SET_VRING_NUM" in refused(front, wire.SET_VRING_KICK, u64(1), fds=1)
    front.state(wire.SET_VRING_NUM, 1, 128)
    assert "SET_VRING_ADDR" in refused(front, wire.SET_VRING_KICK, u64(1), fds=1)
    front.send(wire.SET_VRING_ADDR, addresses(1))
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 0


def test_polling_is_refused_and_says_why():
    front = serving()
    assert "polled" in refused(front, wire.SET_VRING_KICK, u64(1 | wire.RING_NO_FD))


@pytest.mark.parametrize("size", [0, 3, 129, 32769, 65535, 65536, 2**31, 2**32 - 1])
def test_a_ring_of_a_size_that_cannot_be_is_refused(size):
    front = serving()
    refused(front, wire.SET_VRING_NUM, wire.STATE.pack(1, size))


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_the_smallest_and_the_greatest_ring_can_be(size):
    front = serving()
    front.state(wire.GET_VRING_BASE, 1)
    payload = wire.ADDRESSES.pack(1, 0, USER, USER + 0x8_0000, USER + 0xE_0000, 0)
    assert front.ask(wire.SET_VRING_NUM, wire.STATE.pack(1, size), need_reply=True) == 0
    assert front.ask(wire.SET_VRING_ADDR, payload, need_reply=True) == 0
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 0
    assert front.ledger.running[1].size == size


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"desc": USER - 16}, "descriptor table"),
        ({"desc": USER + SIZE - 2048 + 16}, "descriptor table"),
        ({"avail": USER + SIZE - 262 + 2}, "available ring"),
        ({"used": USER + SIZE - 1030 + 2}, "used ring"),
        ({"used": 0}, "used ring"),
        ({"used": 2**64 - 4}, "used ring"),
        ({"desc": 2**64 - 16}, "descriptor table"),
    ],
)
def test_a_ring_that_does_not_lie_in_memory_does_not_start(wrong, part):
    front = serving()
    front.state(wire.GET_VRING_BASE, 0)
    fields = {"desc": DESC, "used": USED, "avail": AVAIL} | wrong
    payload = wire.ADDRESSES.pack(0, 0, fields["desc"], fields["used"] & ~3, fields["avail"], 0)
    assert front.ask(wire.SET_VRING_ADDR, payload, need_reply=True) == 0
    assert part in refused(front, wire.SET_VRING_KICK, u64(0), fds=1)


@pytest.mark.parametrize("wrong", [{"desc": DESC + 8}, {"avail": AVAIL + 1}, {"used": USED + 2}])
def test_a_ring_that_is_not_aligned_is_refused(wrong):
    assert "multiple" in refused(serving(), wire.SET_VRING_ADDR, addresses(1, **wrong))


def test_flags_of_addresses_that_are_not_known_are_refused():
    refused(serving(), wire.SET_VRING_ADDR, addresses(1, flags=2))


def test_a_ring_across_two_regions_does_not_start():
    front = serving()
    front.state(wire.GET_VRING_BASE, 0)
    low, high = region(GUEST, 0x400, USER), region(GUEST + 0x400, SIZE, USER + 0x400, 0x400)
    front.send(wire.SET_MEM_TABLE, table(low, high), fds=2)
    assert "descriptor table" in refused(front, wire.SET_VRING_KICK, u64(0), fds=1)


@pytest.mark.parametrize("index", [2, 3, 128, 255])
def test_a_ring_that_does_not_exist_is_refused(index):
    front = serving()
    assert f"--queues {index}" in refused(front, wire.SET_VRING_NUM, wire.STATE.pack(index, 1))
    for request in (wire.SET_VRING_BASE, wire.SET_VRING_ENABLE):
        refused(front, request, wire.STATE.pack(index, 1))
    refused(front, wire.SET_VRING_ADDR, addresses(index))
    for request in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
        refused(front, request, u64(index), fds=1)
    assert front.state(wire.GET_VRING_BASE, index) == wire.STATE.pack(index, 0)
    assert len(front.lines) == 1


@pytest.mark.parametrize("index", [256, 2**31, 2**32 - 1])
def test_a_ring_index_is_no_number_to_be_wrapped(index):
    front = serving()
    for request in (wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.SET_VRING_ENABLE):
        refused(front, request, wire.STATE.pack(index, 1))
    assert front.state(wire.GET_VRING_BASE, index) == wire.STATE.pack(index, 0)


def test_the_newest_call_descriptor_wins_and_the_old_one_is_closed():
    front = Frontend()
    for number in range(1, 6):
        front.send(wire.SET_VRING_CALL, u64(1), fds=1)
        assert front.ledger.open == {number}
    front.send(wire.SET_VRING_CALL, u64(1 | wire.RING_NO_FD))
    assert front.ledger.open == set()
    assert front.ledger.calls[-1] == ("set_call", 1, -1)


def test_a_call_descriptor_can_change_on_a_running_ring():
    front = serving()
    front.send(wire.SET_VRING_CALL, u64(1), fds=1)
    front.send(wire.SET_VRING_CALL, u64(1), fds=1)
    assert set(front.ledger.running) == {0, 1}
    assert front.lines == []


@pytest.mark.parametrize("request_number", [wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR])
def test_descriptors_of_a_ring_are_as_many_as_it_says(request_number):
    front = serving()
    refused(front, request_number, u64(1), fds=0)
    refused(front, request_number, u64(1), fds=2)
    refused(front, request_number, u64(1 | wire.RING_NO_FD), fds=1)


def test_a_ring_stops_where_it_was_and_starts_where_it_is_told():
    front = serving()
    ledger = front.ledger
    ledger.progress = 65535
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 65535)
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 65535)
    assert ledger.named("stop_queue") == [("stop_queue", 1)]
    front.send(wire.SET_VRING_KICK, u64(1), fds=1)
    assert ledger.calls[-1] == ("start_queue", 1, 65535, True)
    ledger.progress = 3
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 2)  # the index wraps around
    front.state(wire.SET_VRING_BASE, 1, 400)
    front.send(wire.SET_VRING_KICK, u64(1), fds=1)
    assert ledger.calls[-1] == ("start_queue", 1, 400, True)


def test_an_index_of_a_packed_ring_is_refused():
    refused(serving(), wire.SET_VRING_BASE, wire.STATE.pack(1, 0x8000_8000))


def test_a_ring_that_never_ran_says_the_base_that_it_was_given():
    front = Frontend()
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 0)
    front.state(wire.SET_VRING_BASE, 1, 77)
    assert front.state(wire.GET_VRING_BASE, 1) == wire.STATE.pack(1, 77)


def test_another_kick_restarts_the_ring_where_it_was():
    front = serving()
    front.ledger.progress = 4
    front.ledger.calls.clear()
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 0
    assert front.ledger.calls == [("stop_queue", 1), ("start_queue", 1, 4, True)]


def test_a_ring_that_is_set_up_anew_while_it_runs_is_stopped():
    front = serving()
    front.state(wire.SET_VRING_NUM, 1, 128)
    assert set(front.ledger.running) == {0, 1}  # nothing new
    front.state(wire.SET_VRING_BASE, 1, 0)
    assert set(front.ledger.running) == {0}
    front.state(wire.SET_VRING_NUM, 0, 64)
    assert front.ledger.running == {}
    assert [line.partition(":")[0] for line in front.lines] == ["ring 1 stopped", "ring 0 stopped"]
    set_up(front, 1)
    assert set(front.ledger.running) == {1}


def test_a_running_ring_can_move_within_memory_and_not_out_of_it():
    front = serving()
    front.ledger.calls.clear()
    assert front.ask(wire.SET_VRING_ADDR, addresses(1), need_reply=True) == 0
    assert front.ledger.calls == []  # nothing new
    assert front.ask(wire.SET_VRING_ADDR, addresses(1, used=USED + 0x4000), need_reply=True) == 0
    assert front.ledger.calls == [("update_queue", 1, None)]
    assert "does not lie" in refused(front, wire.SET_VRING_ADDR, addresses(1, used=USER - 0x20000))


def test_a_ring_that_the_backend_cannot_start_is_stopped_and_can_be_tried_again():
    front = serving()
    front.state(wire.GET_VRING_BASE, 1)
    front.ledger.refuse = {"start_queue"}
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 1
    assert not front.device.rings[1].running
    assert front.device.rings[1].kick == -1
    assert "start_queue cannot now" in front.lines[-1]
    front.ledger.refuse = set()
    assert front.ask(wire.SET_VRING_KICK, u64(1), fds=1, need_reply=True) == 0


def test_a_ring_is_enabled_and_disabled_only_where_that_changes_something():
    front = serving()
    front.ledger.calls.clear()
    for enabled in (1, 0, 0, 1):
        front.state(wire.SET_VRING_ENABLE, 1, enabled)
    assert front.ledger.calls == [("enable_queue", 1, False), ("enable_queue", 1, True)]
    refused(front, wire.SET_VRING_ENABLE, wire.STATE.pack(1, 2))
    refused(front, wire.SET_VRING_ENABLE, wire.STATE.pack(1, 2**32 - 1))


def test_reset_owner_disables_all_rings_and_stops_none():
    front = serving()
    front.send(wire.RESET_OWNER)
    assert set(front.ledger.running) == {0, 1}
    assert not any(vring.enabled for vring in front.ledger.running.values())


def test_reset_device_stops_all_and_keeps_the_connection_and_the_memory():
    front = serving()
    qemu_connects(front)
    front.send(wire.SET_PROTOCOL_FEATURES, u64(PROTOCOL))
    front.send(wire.SET_FEATURES, u64(OFFERED))
    front.ledger.calls.clear()
    assert front.ask(wire.RESET_DEVICE, need_reply=True) == 0
    assert front.ledger.calls == [("stop_queue", 0), ("stop_queue", 1), ("set_log_enabled", False), ("reset",)]
    assert len(front.ledger.memory) == 1
    assert {"channel", ("call", 0), ("err", 1)} <= set(front.ledger.slots)
    assert "SET_VRING_NUM" in refused(front, wire.SET_VRING_KICK, u64(1), fds=1)
    qemu_driver_ok(front, newest=True, memory=False)
    assert set(front.ledger.running) == {0, 1}


# The in-flight region


@pytest.mark.parametrize("padding", [0, 4])
def test_the_inflight_region_is_described_as_the_front_end_lays_it_out(padding):
    front = serving()
    reply = front.send(wire.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, 2, 128) + bytes(padding))
    assert reply == wire.INFLIGHT.pack(2 * (16 + 16 * 128), 0, 2, 128) + bytes(padding)
    assert front.device.reply_fds == [front.ledger.slots["made"]]
    front.send(wire.SET_OWNER)
    assert front.device.reply_fds == []


def test_an_inflight_region_that_cannot_be_made_is_answered_as_none():
    front = serving()
    front.ledger.refuse = {"make_inflight"}
    assert front.send(wire.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, 2, 128) + bytes(4)) == bytes(24)
    assert front.device.reply_fds == []


@pytest.mark.parametrize(("rings", "size"), [(0, 128), (3, 128), (2, 0), (2, 3), (2, 40000), (65535, 65535)])
def test_an_inflight_region_for_rings_that_cannot_be_is_refused(rings, size):
    front = serving(queues=2)
    for index in range(2):
        front.state(wire.GET_VRING_BASE, index)
    assert front.send(wire.GET_INFLIGHT_FD, wire.INFLIGHT.pack(0, 0, rings, size) + bytes(4)) == bytes(24)
    refused(front, wire.SET_INFLIGHT_FD, wire.INFLIGHT.pack(1 << 30, 0, rings, size) + bytes(4), fds=1)


def test_an_inflight_region_comes_whole_and_before_the_rings_start():
    front = serving()
    enough = 2 * (16 + 16 * 128)
    good = wire.INFLIGHT.pack(enough, 4096, 2, 128)
    assert "runs" in refused(front, wire.SET_INFLIGHT_FD, good, fds=1)
    for index in range(2):
        front.state(wire.GET_VRING_BASE, index)
    refused(front, wire.SET_INFLIGHT_FD, good, fds=0)
    refused(front, wire.SET_INFLIGHT_FD, good, fds=2)
    refused(front, wire.SET_INFLIGHT_FD, wire.INFLIGHT.pack(enough - 1, 0, 2, 128), fds=1)
    refused(front, wire.SET_INFLIGHT_FD, wire.INFLIGHT.pack(enough, 2**63, 2, 128), fds=1)
    assert front.ask(wire.SET_INFLIGHT_FD, good, fds=1, need_reply=True) == 0
    assert front.ask(wire.SET_INFLIGHT_FD, good, fds=1, need_reply=True) == 0
    assert front.ledger.calls[-1] == ("set_inflight", enough, 4096, 2, 128)
    front.ledger.refuse = {"set_inflight"}
    assert front.ask(wire.SET_INFLIGHT_FD, good, fds=1, need_reply=True) == 1


# Whatever comes


HONEST = {
    wire.GET_FEATURES: (b"", 0),
    wire.SET_FEATURES: (u64(QEMU_FEATURES), 0),
    wire.SET_OWNER: (b"", 0),
    wire.RESET_OWNER: (b"", 0),
    wire.SET_MEM_TABLE: (table(region()), 1),
    wire.SET_LOG_BASE: (wire.LOG.pack(4096, 0), 1),
    wire.SET_LOG_FD: (b"", 1),
    wire.SET_VRING_NUM: (wire.STATE.pack(1, 128), 0),
    wire.SET_VRING_ADDR: (addresses(1), 0),
    wire.SET_VRING_BASE: (wire.STATE.pack(1, 0), 0),
    wire.GET_VRING_BASE: (wire.STATE.pack(1, 0), 0),
    wire.SET_VRING_KICK: (u64(1), 1),
    wire.SET_VRING_CALL: (u64(1), 1),
    wire.SET_VRING_ERR: (u64(1), 1),
    wire.GET_PROTOCOL_FEATURES: (b"", 0),
    wire.SET_PROTOCOL_FEATURES: (u64(PROTOCOL | wire.P_CONFIG), 0),
    wire.GET_QUEUE_NUM: (b"", 0),
    wire.SET_VRING_ENABLE: (wire.STATE.pack(1, 1), 0),
    wire.SET_BACKEND_REQ_FD: (b"", 1),
    wire.GET_CONFIG: (wire.CONFIG.pack(0, 40, 0) + bytes(40), 0),
    wire.GET_INFLIGHT_FD: (wire.INFLIGHT.pack(0, 0, 2, 128) + bytes(4), 0),
    wire.SET_INFLIGHT_FD: (wire.INFLIGHT.pack(1 << 20, 0, 2, 128) + bytes(4), 1),
    wire.RESET_DEVICE: (b"", 0),
    wire.GET_MAX_MEM_SLOTS: (b"", 0),
    wire.ADD_MEM_REG: (bytes(8) + region(0, SIZE, 0), 1),
    wire.REM_MEM_REG: (bytes(8) + region(), 0),
}


def test_each_message_that_is_handled_is_in_the_list_of_honest_ones():
    handled = {number for number, row in wire.MESSAGES.items() if row.needs != wire.P_NEVER}
    assert handled == set(HONEST) | {wire.SET_CONFIG}


@pytest.mark.parametrize("request_number", HONEST)
def test_every_wrong_length_and_every_wrong_number_of_descriptors_is_refused(request_number):
    payload, right = HONEST[request_number]
    front = serving(protocol=PROTOCOL | wire.P_CONFIG, tag=b"tag")
    refusal = wire.MESSAGES[request_number].refusal
    for length in [*range(300), 1000, 4096]:
        wrong = payload[:length].ljust(length, b"\0")
        if length == len(payload) or length in wire.MESSAGES[request_number].sizes:
            continue
        before = state_of(front)
        reply = front.send(request_number, wrong, fds=right, need_reply=True)
        assert reply == (u64(1) if refusal is None else refusal)
        assert state_of(front) == before
    for number in range(6):
        if number == right or number in (wire.MESSAGES[request_number].fds if right < 1 else ()):
            continue
        before = state_of(front)
        reply = front.send(request_number, payload, fds=number, need_reply=True)
        assert reply == (u64(1) if refusal is None else refusal)
        assert state_of(front) == before
    assert front.lines


@pytest.mark.parametrize("request_number", HONEST)
def test_every_honest_message_is_obeyed_at_any_time(request_number):
    payload, fds = HONEST[request_number]
    for front in (Frontend(tag=b"tag"), serving(protocol=PROTOCOL | wire.P_CONFIG, tag=b"tag")):
        front.send(request_number, payload, fds=fds)
        front.send(request_number, payload, fds=fds, need_reply=True)
        front.device.disconnect()
        assert front.ledger.open == set()
        assert front.ledger.mapped == []


def test_a_front_end_that_repeats_itself_does_not_fill_the_log():
    front = Frontend()
    for number in range(1000):
        front.send(1000 + number % 500)
    assert len(front.lines) == 100
    front.device.disconnect()
    front.send(1000)
    assert len(front.lines) == 101


ADDRESS = st.one_of(
    st.sampled_from([DESC, AVAIL, USED, USER + 0x10000, USER - 16, 0, 2**64 - 16, 2**64 - 4096, GUEST, GUEST + SIZE]),
    st.integers(0, 2**64 - 1),
)
LENGTH = st.sampled_from([0, 1, 4096, 0x10000, SIZE, 2**63, 2**64 - 1])
NUMBER = st.one_of(
    st.sampled_from([0, 1, 2, 64, 128, 32768, 32769, 65535, 65536, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
INDEX = st.one_of(st.integers(0, 3), NUMBER)
REGIONS = st.one_of(
    st.just(region()),
    st.just(region(GUEST + SIZE, SIZE, USER + SIZE, SIZE)),
    st.just(region(GUEST, 0x10000, USER)),
    st.builds(region, ADDRESS, LENGTH, ADDRESS, st.sampled_from([0, 8, 4096, SIZE, 2**63])),
)
REQUEST = st.one_of(st.sampled_from(sorted(wire.MESSAGES)), st.integers(0, 2**32 - 1))
PAYLOADS = {
    wire.SET_FEATURES: st.sampled_from([0, OFFERED, QEMU_FEATURES, wire.F_VERSION_1, 2**64 - 1]).map(u64),
    wire.SET_PROTOCOL_FEATURES: st.one_of(st.just(PROTOCOL), st.integers(0, 0xFFFF)).map(u64),
    wire.SET_MEM_TABLE: st.lists(REGIONS, max_size=4).map(lambda regions: table(*regions)),
    wire.SET_LOG_BASE: st.builds(wire.LOG.pack, LENGTH, ADDRESS),
    wire.SET_VRING_ADDR: st.one_of(
        st.builds(lambda index, flags: addresses(index, flags=flags, log=0x9000), st.integers(0, 3), st.integers(0, 2)),
        st.builds(wire.ADDRESSES.pack, INDEX, st.integers(0, 3), ADDRESS, ADDRESS, ADDRESS, ADDRESS),
    ),
    wire.ADD_MEM_REG: REGIONS.map(bytes(8).__add__),
    wire.REM_MEM_REG: REGIONS.map(bytes(8).__add__),
    wire.GET_CONFIG: st.tuples(NUMBER, st.integers(0, 260)).map(
        lambda pair: wire.CONFIG.pack(*pair, 0) + bytes(pair[1])
    ),
    wire.GET_INFLIGHT_FD: st.builds(wire.INFLIGHT.pack, LENGTH, ADDRESS, st.integers(0, 4), st.integers(0, 200)),
    wire.SET_INFLIGHT_FD: st.builds(wire.INFLIGHT.pack, LENGTH, ADDRESS, st.integers(0, 4), st.integers(0, 200)),
} | dict.fromkeys(
    (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR),
    st.one_of(st.integers(0, 3), st.integers(0x100, 0x103), st.integers(0, 2**64 - 1)).map(u64),
)
PAYLOADS |= dict.fromkeys(
    (wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.GET_VRING_BASE, wire.SET_VRING_ENABLE),
    st.builds(wire.STATE.pack, INDEX, NUMBER),
)


class AnyOrder(RuleBasedStateMachine):
    """Honest and senseless messages in any order; what must hold is in `Ledger` and in `Frontend.send`."""

    def __init__(self):
        super().__init__()
        self.front = Frontend(queues=3, tag=b"tag")

    @rule(data=st.data(), request=st.sampled_from(sorted(HONEST)), need_reply=st.booleans())
    def send_what_may_be_sent(self, data, request, need_reply):
        payload, fds = HONEST[request]
        if request in PAYLOADS:
            payload = data.draw(PAYLOADS[request])
        if request == wire.SET_MEM_TABLE:
            fds = len(payload) // 32
        elif request in (wire.SET_VRING_KICK, wire.SET_VRING_CALL, wire.SET_VRING_ERR):
            fds = not payload[1] & 1
        self.send(request, payload, fds, need_reply)

    @rule(request=REQUEST, payload=st.binary(max_size=120), fds=st.integers(0, 5), need_reply=st.booleans())
    def send_anything(self, request, payload, fds, need_reply):
        self.send(request, payload, fds, need_reply)

    @rule(index=st.integers(0, 2))
    def set_a_ring_up(self, index):
        self.front.send(wire.SET_MEM_TABLE, table(region()), fds=1)
        set_up(self.front, index)
        assert index in self.front.ledger.running  # whatever came before

    @precondition(lambda self: self.front.device.rings[1].running)
    @rule()
    def stop_a_ring(self):
        assert self.front.state(wire.GET_VRING_BASE, 1) is not None
        assert 1 not in self.front.ledger.running

    @rule(names=st.sets(st.sampled_from(["map_region", "start_queue", "set_log", "set_inflight", "make_inflight"])))
    def let_calls_fail_once(self, names):
        self.front.ledger.refuse = names
        for request in (wire.ADD_MEM_REG, wire.SET_VRING_KICK, wire.SET_LOG_BASE, wire.SET_INFLIGHT_FD):
            payload, fds = HONEST[request]
            self.send(request, payload, fds, True)
        self.front.ledger.refuse = set()

    @rule()
    def disconnect(self):
        self.front.device.disconnect()
        assert self.front.ledger.open == set()
        assert self.front.ledger.mapped == []
        assert self.front.ledger.running == {}

    def send(self, request, payload, fds, need_reply):
        reply = self.front.send(request, payload, fds, need_reply=need_reply)
        acknowledged = need_reply and self.front.device.protocol_features & wire.P_REPLY_ACK
        row = wire.MESSAGES.get(request)
        if acknowledged or (row is not None and row.refusal is not None and request != wire.SET_LOG_BASE):
            assert reply is not None
        elif request != wire.SET_LOG_BASE:
            assert reply is None

    @invariant()
    def the_device_and_the_backend_agree(self):
        running = {index for index, ring in enumerate(self.front.device.rings) if ring.running}
        assert running == set(self.front.ledger.running)
        assert self.front.ledger.log_enabled == bool(self.front.device.features & wire.F_LOG_ALL)
        for index in running:
            assert self.front.device.rings[index].kick == self.front.ledger.slots["kick", index]

    def teardown(self):
        self.disconnect()


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


# The description for management software


def test_the_description_for_management_software_has_the_fields_of_its_schema():
    text = resources.files("fusewire").joinpath("data/50-fusewire.json").read_text(encoding="utf-8")
    described = json.loads(text)
    # QEMU's docs/interop/vhost-user.json, VhostUserBackend: these and nothing else.
    assert set(described) <= {"description", "type", "binary", "tags"}
    assert described["type"] == "fs"
    assert described["description"]
    assert described["binary"].startswith("/")
    assert described["binary"].endswith("/fusewire-virtiofsd")
    assert all(isinstance(tag, str) for tag in described.get("tags", []))
