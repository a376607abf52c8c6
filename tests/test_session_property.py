"""Whatever the peer sends and a filesystem does: `handle` never raises, and each request has its one answer."""

import errno
import stat
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.ops import Entry, Extensions, FileRange, Operations, Pending, attr
from fusewire.session import Session
from fusewire.testing import OFFERED, check_reply, request
from fusewire.wire import abi
from fusewire.wire.codec import IN_HEADER, OUT_HEADER
from fusewire.wire.table import TABLE, layout

METHODS = sorted(
    name
    for name, member in vars(Operations).items()
    if callable(member) and not name.startswith("_") and name not in ("init", "destroy")
)
NAMED = {"lookup", "symlink", "mknod", "mkdir", "unlink", "rmdir", "rename", "link", "create"}
FILE = attr(2, stat.S_IFREG | 0o644, 5)
ENTRY = Entry(2, FILE)
PLAUSIBLE = {
    "getattr": (FILE, 1.0),
    "setattr": (FILE, 1.0),
    "statx": ((0,) * 23, 1.0, 0),
    "readlink": b"target",
    "read": b"12345",
    "readdir": bytes(24),
    "readdirplus": b"",
    "getxattr": b"value",
    "listxattr": b"user.a\0",
    "open": (1, 0),
    "opendir": (1, 0),
    "create": (ENTRY, (1, 0)),
    "tmpfile": (ENTRY, (1, 0)),
    "write": 5,
    "copy_file_range": 5,
    "lseek": 5,
    "bmap": 5,
    "poll": 1,
    "statfs": (1, 1, 1, 1, 1, 4096, 255, 4096),
    "getlk": (0, 1, 2, 3),
    "ioctl": (0, b""),
} | dict.fromkeys(("lookup", "symlink", "mknod", "mkdir", "link"), ENTRY)

INITIALIZED = layout("fuse_init_in").pack(7, 45, 131072, OFFERED & 0xFFFFFFFF, OFFERED >> 32)


def check_names(method: str, arguments: tuple) -> None:
    if method not in NAMED:
        return
    names = [item for item in arguments if type(item) is bytes]
    if method == "symlink":
        names.pop()  # the target, which may be anything
    for name in names:
        assert name not in (b"", b".", b"..")
        assert len(name) <= 255
        assert b"/" not in name
        assert b"\0" not in name
    assert len(names) == (2 if method == "rename" else 1)


def everything(answer) -> Operations:
    """Give a filesystem that offers all; each method gives `answer(its name)`, and checks the names that it gets."""

    def make(method):
        def handler(self, *arguments):
            check_names(method, arguments)
            return answer(method)

        return handler

    members = {method: make(method) for method in METHODS}
    want = abi.FUSE_SECURITY_CTX | abi.FUSE_CREATE_SUPP_GROUP
    return type("Everything", (Operations,), {**members, "interruptible": True, "want": want})()


bodies = st.binary(max_size=120)
# Numbers where something changes: of sizes, offsets and lengths.
numbers = st.sampled_from([0, 1, 2, 7, 8, 40, 255, 256, 4096, 1 << 20, 1 << 31, (1 << 32) - 1]) | st.integers(
    0, 1 << 16
)
wild = st.sampled_from([(1 << 63) - 1, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1) | numbers
names = st.sampled_from(
    [b"", b".", b"..", b"a", b".a", b"a/b", b"a" * 255, b"a" * 256, b"a" * 600, b"\xff", b"user.a"]
) | st.binary(max_size=12)
opcodes = st.sampled_from([op.code for op in TABLE]) | st.integers(0, 70) | st.sampled_from([4096, (1 << 32) - 1])


@st.composite
def well_formed(draw, ops=TABLE):
    """A request that has the shape of its row, with numbers and names that may be anything."""
    op = draw(st.sampled_from(ops))
    fields = layout(op.args) if op.args else None
    raw = b""
    if fields:
        sizes = [code for code in fields.format if code in "BHIQq"]
        limits = {"H": 1 << 16, "I": 1 << 32, "Q": 1 << 64, "q": 1 << 63}
        raw = fields.pack(*(draw(wild) % limits[code] for code in sizes))
    raw += b"".join(draw(names) + b"\0" for _ in range(op.names))
    if op.tail or draw(st.booleans()):
        raw += draw(bodies)
    extlen = draw(st.sampled_from([0, 0, 1, 2, 3, 7, 65535]))
    return request(op.code, draw(wild), raw, unique=draw(st.integers(1, (1 << 64) - 1)), extlen=extlen)


@st.composite
def malformed(draw):
    """A header before anything, a request cut off or too long, a length that lies, or no request at all."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        unique = draw(st.integers(1, (1 << 64) - 1))
        return request(draw(opcodes), draw(wild), draw(bodies), unique=unique, extlen=draw(st.integers(0, 65535)))
    whole = draw(well_formed())
    if kind == 2:
        cut = whole[: draw(st.integers(0, len(whole)))]
        if len(cut) >= 40 and draw(st.booleans()):
            cut = len(cut).to_bytes(4, "little") + cut[4:]
        return cut
    return draw(st.integers(0, (1 << 32) - 1)).to_bytes(4, "little") + whole[4:]


anything = well_formed() | malformed()
quick = settings(max_examples=300, deadline=None)


class Peer:
    """Drives a session and holds it to its one answer for each request."""

    def __init__(self, operations: Operations, *, ready: bool) -> None:
        self.session = Session(operations, log=lambda message, error: None)
        self.late: dict[int, list] = {}
        self.session.send = self.receive
        if ready:
            self.session.handle(request(abi.FUSE_INIT, 0, INITIALIZED))
            assert self.session.ready

    def receive(self, buffers) -> None:
        message = b"".join(bytes(part) for part in buffers)
        self.late.setdefault(OUT_HEADER.unpack_from(message)[2], []).append(buffers)

    def ask(self, sent: bytes):
        """Send; give (errno, body), or None for what is to be answered later."""
        reply = self.session.handle(memoryview(sent))
        if len(sent) < 40:
            assert reply is None
            return None
        unique = IN_HEADER.unpack_from(sent)[2]
        if reply is None and (unique in self.session._pending or unique in self.late):
            return None
        return check_reply(sent, reply)


RESULTS = (
    None,
    0,
    -1,
    1 << 64,
    1 << 200,
    1.5,
    float("nan"),
    float("inf"),
    "text",
    b"",
    b"12345",
    bytes(128),
    bytes(104),
    bytes(70000),
    bytearray(3),
    memoryview(b"abcdefgh").cast("Q"),
    memoryview(b"abcdefgh")[::2],
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (ENTRY, 1),
    (1, b"x" * 70000),
    (1, "text"),
    (FILE, float("nan")),
    ((), 1.0),
    (FILE, None),
    ENTRY,
    Entry(1 << 64, FILE),
    Entry(2, FILE[:3]),
    Entry(2, FILE, float("nan")),
    [],
    [b""] * 3000,
    [b"x", "y"],
    [None],
    {},
    set(),
    object(),
    type,
    Exception("given, not raised"),
    FileRange(-1, 0, 1),
    FileRange(0, 1 << 64, 1),
    FileRange("0", None, 1.5),
    Extensions(),
)
ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: OSError(errno.ENOENT, "gone"),
    OSError,
    lambda: OSError("words"),
    lambda: OSError("two", "words"),
    lambda: OSError(0, "nothing"),
    lambda: OSError(-1, "negative"),
    lambda: OSError(512, "beyond"),
    lambda: OSError(1 << 80, "far beyond"),
    FileNotFoundError,
    NotImplementedError,
    KeyError,
    lambda: ValueError("x" * 10000),
    StopIteration,
    RecursionError,
    MemoryError,
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    AssertionError,
    lambda: ExceptionGroup("several", [ValueError(), OSError(2, "x")]),
    type("Own", (Exception,), {"__str__": lambda self: 1 / 0}),
)


class Script:
    """Choices drawn beforehand: a filesystem's handlers cannot ask hypothesis, whose exceptions `handle` would eat."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = iter(numbers)

    def choose(self, options):
        return options[next(self.numbers, 0) % len(options)]

    def fail(self) -> Exception:
        return self.choose(ERRORS)()


scripts = st.lists(st.integers(0, 1 << 10), max_size=80).map(Script)


@quick
@given(st.booleans(), st.lists(anything, max_size=8))
def test_filesystem_that_offers_nothing_answers_each_request(ready, messages):
    peer = Peer(Operations(), ready=ready)
    for message in messages:
        peer.ask(message)


@quick
@given(st.booleans(), st.lists(anything, max_size=8))
def test_filesystem_that_offers_everything_answers_each_request(ready, messages):
    peer = Peer(everything(PLAUSIBLE.get), ready=ready)
    for message in messages:
        peer.ask(message)


@quick
@given(st.booleans(), st.lists(well_formed(), max_size=8), scripts)
def test_filesystem_that_returns_rubbish_answers_each_request(ready, messages, script):
    peer = Peer(everything(lambda method: script.choose(RESULTS)), ready=ready)
    for message in messages:
        peer.ask(message)


@quick
@given(st.booleans(), st.lists(well_formed(), max_size=8), scripts)
def test_filesystem_that_raises_anything_answers_each_request(ready, messages, script):
    def fail(method):
        raise script.fail()

    peer = Peer(everything(fail), ready=ready)
    for message in messages:
        peer.ask(message)


@quick
@given(st.lists(well_formed(), min_size=1, max_size=6), scripts)
def test_each_late_answer_is_sent_once_whenever_it_comes(messages, script):
    """Pendings that are settled before they are returned, later, twice, or interrupted at any time."""
    pendings: list[Pending] = []

    def settle(pending: Pending) -> None:
        if script.choose((True, False)):
            pending.complete(script.choose(RESULTS))
        else:
            pending.fail(script.fail())

    def later(method):
        pending = Pending(script.choose((None, lambda: settle(pending), lambda: 1 / 0)))
        if script.choose((False, True)):
            settle(pending)
        pendings.append(pending)
        return pending

    peer = Peer(everything(later), ready=True)
    waiting = {}
    answered = set()
    for unique, message in zip(count(2, 2), messages, strict=False):
        message = message[:8] + unique.to_bytes(8, "little") + message[16:]
        interrupt = request(abi.FUSE_INTERRUPT, 0, unique.to_bytes(8, "little"), unique=unique | 1)
        if script.choose((False, True)):
            peer.ask(interrupt)
        if peer.ask(message) is None:
            waiting[unique] = message
        else:
            answered.add(unique)
        if script.choose((False, True)):
            peer.ask(interrupt)
    for pending in pendings:
        for _ in range(2):
            settle(pending)
    for unique, message in waiting.items():
        assert len(peer.late[unique]) == 1
        check_reply(message, peer.late[unique][0])
    assert not answered & peer.late.keys()
    assert not peer.session._pending


@pytest.mark.parametrize("op", TABLE, ids=lambda op: op.name)
@pytest.mark.parametrize("ready", [False, True])
def test_every_length_of_every_request_is_answered(op, ready):
    fixed = (
        layout(op.args).pack(*([0] * (len(layout(op.args).unpack(bytes(layout(op.args).size)))))) if op.args else b""
    )
    whole = fixed + b"a\0b\0"[: 2 * op.names]
    peer = Peer(everything(PLAUSIBLE.get), ready=ready)
    for length in range(len(whole) + 20):
        peer.ask(request(op.code, 1, whole[:length].ljust(length, b"z")))


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_only_names_reach_a_filesystem(name):
    seen = []

    class Seeing(Operations):
        def lookup(self, caller, parent, name):
            seen.append(name)
            raise FileNotFoundError

        def unlink(self, caller, parent, name):
            seen.append(name)

    session = Session(Seeing())
    session.handle(request(abi.FUSE_LOOKUP, 1, name + b"\0"))
    session.handle(request(abi.FUSE_UNLINK, 1, name + b"\0"))
    fine = name not in (b".", b"..") and len(name) <= 255 and not set(b"/\0") & set(name)
    if fine:
        assert seen == [name, name]
    # UNLINK's name ends at its first NUL.
    for item in seen:
        check_names("lookup", (item,))
