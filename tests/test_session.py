"""The session's rules, request by request: what INIT agrees on, what is answered for a filesystem, and how it fails."""

import errno
import stat
import sys
import threading

import pytest

from fusewire.ops import Entry, FileRange, Operations, Pending, attr
from fusewire.session import Session, to_errno
from fusewire.testing import OFFERED, FakeKernel, check_reply, request
from fusewire.wire import abi
from fusewire.wire.table import TABLE

DIRECTORY = attr(1, stat.S_IFDIR | 0o755, nlink=2)
EVERYTHING = (1 << 43) - 1


def filesystem(base=Operations, /, **members) -> Operations:
    """Give a filesystem with these attributes and methods; a method is given as a function without `self`."""

    def method(function):
        return lambda self, *arguments: function(*arguments)

    return type("Given", (base,), {k: method(v) if callable(v) else v for k, v in members.items()})()


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def agreed(operations: Operations, *, flags: int = EVERYTHING, **limits) -> int:
    session = Session(operations, **limits)
    FakeKernel(session).init(flags=flags)
    return session.flags


def fails(number: int, function, *arguments) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number, caught.value


# INIT


@pytest.mark.parametrize(
    "flag",
    [
        abi.FUSE_ASYNC_READ,
        abi.FUSE_BIG_WRITES,
        abi.FUSE_ASYNC_DIO,
        abi.FUSE_PARALLEL_DIROPS,
        abi.FUSE_ABORT_ERROR,
        abi.FUSE_MAX_PAGES,
        abi.FUSE_SETXATTR_EXT,
        abi.FUSE_INIT_EXT,
        abi.FUSE_HAS_EXPIRE_ONLY,
        abi.FUSE_HAS_RESEND,
        abi.FUSE_AUTO_INVAL_DATA,
        abi.FUSE_NO_OPEN_SUPPORT,
        abi.FUSE_NO_OPENDIR_SUPPORT,
    ],
)
def test_flag_that_costs_nothing_is_agreed_if_the_kernel_offers_it(flag):
    assert agreed(Operations()) & flag
    assert not agreed(Operations(), flags=EVERYTHING & ~flag) & flag
    assert not agreed(filesystem(refuse=flag)) & flag


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        ("readdirplus", abi.FUSE_DO_READDIRPLUS),
        ("setlk", abi.FUSE_POSIX_LOCKS),
        ("setlk", abi.FUSE_FLOCK_LOCKS),
    ],
)
def test_flag_of_an_operation_is_agreed_only_where_it_is_offered(method, flag):
    assert not agreed(Operations()) & flag
    assert agreed(filesystem(**{method: lambda *arguments: None})) & flag


@pytest.mark.parametrize("flag", [1 << bit for bit in range(43) if bit != 31])
def test_every_other_flag_waits_to_be_wanted(flag):
    if not agreed(Operations()) & flag:
        assert bool(agreed(filesystem(want=flag)) & flag) == (flag != abi.FUSE_OVER_IO_URING)
        assert not agreed(filesystem(want=flag), flags=EVERYTHING & ~flag) & flag


def test_io_uring_and_the_reserved_bit_are_never_agreed():
    assert not agreed(filesystem(want=(1 << 64) - 1)) & (abi.FUSE_OVER_IO_URING | 1 << 31)


def test_open_is_spared_only_where_it_is_not_offered():
    with_open = filesystem(open=lambda *arguments: (0, 0), opendir=lambda *arguments: (0, 0))
    assert not agreed(with_open) & (abi.FUSE_NO_OPEN_SUPPORT | abi.FUSE_NO_OPENDIR_SUPPORT)


def test_truncating_open_is_agreed_with_who_can_open_and_change():
    both = filesystem(open=lambda *arguments: (0, 0), setattr=lambda *arguments: None)
    assert agreed(both) & abi.FUSE_ATOMIC_O_TRUNC
    assert not agreed(filesystem(open=lambda *arguments: (0, 0))) & abi.FUSE_ATOMIC_O_TRUNC
    assert not agreed(filesystem(setattr=lambda *arguments: None)) & abi.FUSE_ATOMIC_O_TRUNC


def test_immutable_filesystem_is_cached_for_good():
    flags = agreed(filesystem(immutable=True))
    assert flags & abi.FUSE_CACHE_SYMLINKS
    assert flags & abi.FUSE_EXPLICIT_INVAL_DATA
    assert not flags & abi.FUSE_AUTO_INVAL_DATA


def test_flags_that_exclude_each_other_are_never_both_agreed():
    writeback = filesystem(want=abi.FUSE_PASSTHROUGH | abi.FUSE_WRITEBACK_CACHE)
    assert agreed(writeback) & abi.FUSE_WRITEBACK_CACHE
    assert not agreed(writeback) & abi.FUSE_PASSTHROUGH
    both = filesystem(want=abi.FUSE_AUTO_INVAL_DATA | abi.FUSE_EXPLICIT_INVAL_DATA)
    assert agreed(both) & abi.FUSE_EXPLICIT_INVAL_DATA
    assert not agreed(both) & abi.FUSE_AUTO_INVAL_DATA


def test_passthrough_is_given_a_stack_depth():
    kernel = FakeKernel(Session(filesystem(want=abi.FUSE_PASSTHROUGH)))
    assert kernel.init().max_stack_depth == 1
    assert FakeKernel(Session(Operations())).init().max_stack_depth == 0


def test_upper_flags_count_only_with_init_ext():
    flags = agreed(filesystem(refuse=abi.FUSE_INIT_EXT, want=abi.FUSE_SECURITY_CTX))
    assert flags < 1 << 32
    assert agreed(Operations(), flags=EVERYTHING & ~abi.FUSE_INIT_EXT) < 1 << 32


def test_writes_are_bounded_by_the_pages_of_a_request():
    writing = filesystem(write=lambda *arguments: 0)
    kernel = FakeKernel(Session(writing, max_write=1 << 20, max_pages=256))
    assert (reply := kernel.init()).max_write == 1 << 20
    assert reply.max_pages == 256
    kernel = FakeKernel(Session(writing, max_write=1 << 20, max_pages=16))
    assert kernel.init().max_write == 65536
    kernel = FakeKernel(Session(writing, max_write=1 << 20))
    assert (reply := kernel.init(flags=OFFERED & ~abi.FUSE_MAX_PAGES)).max_write == 131072
    assert reply.max_pages == 0


def test_writes_are_never_below_the_minimum_of_the_kernel():
    assert FakeKernel(Session(filesystem(write=lambda *arguments: 0), max_write=100)).init().max_write == 4096
    assert FakeKernel(Session(Operations())).init().max_write == 4096


def test_readahead_is_the_smaller_of_both():
    assert FakeKernel(Session(Operations(), max_readahead=1 << 20)).init(max_readahead=4096).max_readahead == 4096
    assert FakeKernel(Session(Operations(), max_readahead=4096)).init(max_readahead=131072).max_readahead == 4096


def test_granularity_of_times_is_told():
    assert FakeKernel(Session(filesystem(time_gran=1_000_000_000))).init().time_gran == 1_000_000_000


def test_filesystem_learns_what_was_agreed_before_the_first_request():
    seen = []

    class Curious(Operations):
        def init(self, connection):
            seen.append((connection.minor, connection.flags, connection.max_write, connection.max_readahead))

    session = Session(Curious())
    assert not session.ready
    FakeKernel(session).init(minor=40)
    assert seen == [(40, session.flags, session.max_write, session.max_readahead)]
    assert session.ready


def test_filesystem_that_will_not_start_refuses_the_mount():
    reports = []

    class Broken(Operations):
        def init(self, connection):
            raise FileNotFoundError(errno.ENOENT, "no such image", "a.sqsh")

    session = Session(Broken(), log=lambda message, error: reports.append(message))
    fails(errno.ENOENT, FakeKernel(session).init)
    assert not session.ready
    assert "a.sqsh" in session.refused


def test_init_that_cannot_be_encoded_leaves_the_session_not_ready():
    session = Session(filesystem(time_gran="often"), log=lambda message, error: None)
    fails(errno.EIO, FakeKernel(session).init)
    assert not session.ready


def test_agreement_can_be_taken_up_by_another_session():
    operations = filesystem(setxattr=lambda *arguments: None, want=abi.FUSE_SECURITY_CTX)
    first = Session(operations)
    FakeKernel(first).init(minor=31, max_readahead=8192)
    events = []

    class Resumed(Operations):
        def init(self, connection):
            events.append("init")

        def setxattr(self, caller, nodeid, name, value, flags, setxattr_flags):
            events.append((name, value))

    second = Session(Resumed())
    second.on_ready = lambda: events.append("ready")
    second.resume(first.agreed)
    assert second.ready
    assert second.agreed == first.agreed
    assert tuple(second.agreed) == (31, first.flags, 4096, 8192, 256)
    FakeKernel(second).setxattr(1, b"user.a", b"v")
    assert events == ["init", "ready", (b"user.a", b"v")]


# Answers without a handler


def test_open_without_a_handler_succeeds_where_the_kernel_cannot_do_without():
    kernel = FakeKernel(Session(Operations()))
    kernel.init(flags=OFFERED & ~abi.FUSE_NO_OPEN_SUPPORT & ~abi.FUSE_NO_OPENDIR_SUPPORT)
    assert kernel.open(2) == (0, 0)
    assert kernel.opendir(1) == (0, 0)
    kernel = FakeKernel(Session(filesystem(immutable=True)))
    kernel.init(flags=OFFERED & ~abi.FUSE_NO_OPEN_SUPPORT & ~abi.FUSE_NO_OPENDIR_SUPPORT)
    assert kernel.open(2) == (0, abi.FOPEN_KEEP_CACHE)
    assert kernel.opendir(1) == (0, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR)


def test_statistics_without_a_handler_are_zeros_that_statvfs_understands():
    found = FakeKernel(Session(Operations())).statfs()
    assert (found.blocks, found.files, found.bsize, found.namelen) == (0, 0, 4096, 255)


CHANGING = ["setattr", "symlink", "mknod", "mkdir", "unlink", "rmdir", "rename", "rename2", "link", "write", "setxattr"]
CHANGING += ["removexattr", "create", "tmpfile", "fallocate", "copy_file_range", "copy_file_range_64"]


@pytest.mark.parametrize("name", CHANGING)
def test_read_only_filesystem_is_never_asked_to_change(name):
    def never(*arguments):
        raise AssertionError("it was asked")

    method = {"rename2": "rename", "copy_file_range_64": "copy_file_range"}.get(name, name)
    code = next(op.code for op in TABLE if op.name == name)
    for operations in (filesystem(read_only=True), filesystem(read_only=True, **{method: never})):
        fails(errno.EROFS, FakeKernel(Session(operations)).raw, code, 1, bytes(200))


def test_helper_that_is_named_like_a_request_is_not_taken_for_a_handler():
    def never(*arguments):
        raise AssertionError("it was asked")

    names = ("interrupt", "notify_reply", "batch_forget", "setupmapping", "removemapping")
    kernel = FakeKernel(Session(filesystem(**dict.fromkeys(names, never))))
    assert kernel.interrupt(6) is False
    kernel.batch_forget([(2, 1)])
    kernel.notify_reply(1, 0, b"data")
    fails(errno.ENOSYS, kernel.raw, abi.FUSE_SETUPMAPPING, 1, bytes(40))


# Failures


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EXDEV, "other device"), errno.EXDEV),
        (FileNotFoundError(), errno.ENOENT),
        (PermissionError(), errno.EACCES),
        (PermissionError(errno.EPERM, "no"), errno.EPERM),
        (FileExistsError(), errno.EEXIST),
        (NotADirectoryError(), errno.ENOTDIR),
        (IsADirectoryError(), errno.EISDIR),
        (InterruptedError(), errno.EINTR),
        (BlockingIOError(), errno.EAGAIN),
        (TimeoutError(), errno.ETIMEDOUT),
        (ProcessLookupError(), errno.ESRCH),
        (ConnectionResetError(), errno.ECONNRESET),
        (type("OwnError", (FileNotFoundError,), {})(), errno.ENOENT),
        (NotImplementedError(), errno.ENOSYS),
        (OSError(511, "the last one"), 511),
        (OSError(), 0),
        (OSError("just words"), 0),
        (OSError("two", "words"), 0),
        (OSError(512, "ERESTARTSYS is the kernel's own"), 0),
        (OSError(-2, "a sign too many"), 0),
        (OSError(1 << 70, "huge"), 0),
        (ValueError(), 0),
        (KeyError(2), 0),
    ],
)
def test_exception_becomes_the_errno_that_it_stands_for(error, number):
    assert to_errno(error) == number

    def fail(*arguments):
        raise error

    session = Session(filesystem(lookup=fail), log=lambda message, error: None)
    fails(number or errno.EIO, FakeKernel(session).lookup, 1, b"f")


def test_fault_is_reported_once_per_place_with_its_traceback():
    reports = []

    class Broken(Operations):
        def lookup(self, caller, parent, name):
            if name == b"a":
                raise KeyError(name)
            raise KeyError(name)

    kernel = FakeKernel(Session(Broken(), log=lambda message, error: reports.append((message, error))))
    for name in (b"a", b"b", b"a", b"b", b"a"):
        fails(errno.EIO, kernel.lookup, 1, name)
    assert [message for message, _ in reports] == ["lookup failed", "lookup failed"]
    assert all(error.__traceback__ is not None for _, error in reports)


def test_errno_is_no_fault_and_not_reported():
    reports = []

    def fail(*arguments):
        raise FileNotFoundError

    session = Session(filesystem(lookup=fail), log=lambda message, error: reports.append(message))
    fails(errno.ENOENT, FakeKernel(session).lookup, 1, b"f")
    assert not reports


def test_results_that_are_too_long_are_reported_once_whatever_their_length():
    reports = []
    sizes = iter(range(101, 200))
    operations = filesystem(read=lambda *arguments: bytes(next(sizes)))
    session = Session(operations, log=lambda message, error: reports.append(message))
    kernel = FakeKernel(session)
    for _ in range(10):
        fails(errno.EIO, kernel.read, 2, 0, 0, 100)
    assert session.bad_replies == 10
    assert reports == ["read gave 101 bytes where 100 were asked for"]


def test_log_that_fails_costs_nobody_an_answer():
    def fail(*arguments):
        raise ValueError

    fails(errno.EIO, FakeKernel(Session(filesystem(lookup=fail), log=fail)).lookup, 1, b"f")


def test_without_a_log_faults_go_to_logging(caplog):
    def fail(*arguments):
        raise ValueError("broken")

    fails(errno.EIO, FakeKernel(Session(filesystem(lookup=fail))).lookup, 1, b"f")
    assert [record.name for record in caplog.records] == ["fusewire"]
    assert "broken" in caplog.text


# Requests of a wrong shape


@pytest.mark.parametrize("length", [0, 1, 16, 39])
def test_request_without_a_whole_header_is_dropped_and_counted(length):
    session = Session(Operations())
    assert session.handle(bytes(length)) is None
    assert session.dropped == 1


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"n" * 256, b"n" * 5000])
def test_name_that_is_none_reaches_no_filesystem(name):
    def never(*arguments):
        raise AssertionError("it was asked")

    methods = ("lookup", "mkdir", "mknod", "unlink", "rmdir", "create", "symlink", "rename", "link")
    kernel = FakeKernel(Session(filesystem(**dict.fromkeys(methods, never))))
    wrong = errno.ENAMETOOLONG if len(name) > 255 else errno.EINVAL
    fails(wrong, kernel.lookup, 1, name)
    if b"\0" in name:  # to the others the name ends there, and what follows is another
        return
    fails(wrong, kernel.mkdir, 1, name)
    fails(wrong, kernel.mknod, 1, name, 0o100644)
    fails(wrong, kernel.unlink, 1, name)
    fails(wrong, kernel.rmdir, 1, name)
    fails(wrong, kernel.create, 1, name)
    fails(wrong, kernel.symlink, 1, name, b"target")
    fails(wrong, kernel.rename, 1, name, 1, b"new")
    fails(wrong, kernel.rename, 1, b"old", 1, name)
    fails(wrong, kernel.rename, 1, b"old", 1, name, 1)
    fails(wrong, kernel.link, 2, 1, name)


@pytest.mark.parametrize("name", [b"n", b"n" * 255, b".hidden", b"...", b"..a", b"\xff\xfe", b" ", b"a\\b"])
def test_every_other_name_reaches_it_as_it_is(name):
    entry = Entry(2, DIRECTORY)
    seen = []

    class Seeing(Operations):
        def lookup(self, caller, parent, name):
            seen.append(name)
            return entry

        def rename(self, caller, parent, name, newparent, newname, flags):
            seen.extend([name, newname])

    kernel = FakeKernel(Session(Seeing()))
    kernel.lookup(1, name)
    kernel.rename(1, name, 1, name)
    assert seen == [name] * 3


def test_name_without_its_nul_is_refused():
    kernel = FakeKernel(Session(filesystem(lookup=lambda *arguments: Entry(2, DIRECTORY))))
    fails(errno.EINVAL, kernel.raw, abi.FUSE_LOOKUP, 1, b"name")
    fails(errno.EINVAL, kernel.raw, abi.FUSE_LOOKUP, 1, b"")


def test_names_of_extended_attributes_may_be_anything_but_empty():
    kernel = FakeKernel(Session(filesystem(getxattr=lambda caller, nodeid, name: name)))
    for name in (b"user.a/b", b"..", b"x" * 255):
        assert kernel.getxattr(1, name) == name
    fails(errno.EINVAL, kernel.getxattr, 1, b"")
    fails(errno.ERANGE, kernel.getxattr, 1, b"x" * 256)


def test_request_that_was_cut_short_is_answered_eio():
    session = Session(filesystem(lookup=lambda *arguments: Entry(2, DIRECTORY)))
    whole = request(abi.FUSE_LOOKUP, 1, b"name\0")
    assert check_reply(whole, session.handle(whole[:-2])) == (errno.EIO, b"")
    assert check_reply(whole, session.handle(whole + b"x")) == (errno.EIO, b"")


def test_data_of_a_write_has_to_be_there():
    kernel = FakeKernel(Session(filesystem(write=lambda *arguments: 0, setxattr=lambda *arguments: None)))
    kernel.init()
    wrong = (7, 0, 5, 0, 0, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.call("write", 2, *wrong, tail=b"four")
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.call("setxattr", 2, 5, 0, 0, names=[b"user.a"], tail=b"four")


@pytest.mark.parametrize(
    ("extlen", "extension"),
    [
        (200, b""),  # more than the request has
        (1, bytes(8)),  # a record of size 0
        (1, (7).to_bytes(4, "little") + bytes(4)),  # smaller than its header
        (1, (16).to_bytes(4, "little") + bytes(4)),  # beyond the end
        (2, bytes.fromhex("10000000 20000000 02000000 00000000")),  # two groups, room for one
        (1, bytes.fromhex("08000000 20000000")),  # no count of groups
        (2, bytes.fromhex("10000000 01000000 00000000 00000000")),  # a context without a name
        (3, bytes.fromhex("18000000 01000000 ffffffff 00000000 6100000000000000")),  # a value of 4 GiB
        (3, bytes.fromhex("18000000 1f000000 00000000 00000000 6100000000000000")),  # 31 contexts, room for one
    ],
)
def test_extension_that_does_not_fit_together_is_refused(extlen, extension):
    operations = filesystem(mkdir=lambda *arguments: Entry(2, DIRECTORY), want=abi.FUSE_SECURITY_CTX)
    kernel = FakeKernel(Session(operations))
    kernel.init()
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.call("mkdir", 1, 0o755, 0, names=[b"d"], tail=extension, extlen=extlen)


def test_extension_reaches_every_creating_request():
    seen = []
    entry = Entry(2, DIRECTORY)

    class Seeing(Operations):
        want = abi.FUSE_CREATE_SUPP_GROUP

        def mkdir(self, caller, *rest):
            seen.append(caller.extensions.groups)
            return entry

        mknod = symlink = mkdir

        def create(self, caller, *rest):
            seen.append(caller.extensions.groups)
            return entry, (0, 0)

        tmpfile = create

    kernel = FakeKernel(Session(Seeing()))
    kernel.init()
    group = bytes.fromhex("10000000 20000000 01000000 e9030000")
    kernel.call("mkdir", 1, 0o755, 0, names=[b"d"], tail=group, extlen=2)
    kernel.call("mknod", 1, 0o100644, 0, 0, names=[b"d"], tail=group, extlen=2)
    kernel.call("symlink", 1, names=[b"d", b"target"], tail=group, extlen=2)
    kernel.call("create", 1, 0, 0, 0, 0, names=[b"d"], tail=group, extlen=2)
    kernel.call("tmpfile", 1, 0, 0, 0, 0, names=[b"/"], tail=group, extlen=2)
    assert seen == [(1001,)] * 5


# Results that the kernel would refuse


@pytest.mark.parametrize(
    "result",
    [
        None,
        "text",
        7,
        object(),
        (b"da", b"ta"),
        ["text"],
        [b"data", None],
        memoryview(bytes(200))[::2],
        bytes(101),
        [bytes(50), bytes(51)],
        memoryview(bytes(104)).cast("Q"),
        FileRange(-1, 0, 1),
        FileRange(0, -1, 1),
        FileRange(0, 1 << 63, 1),
        FileRange(0, 0, -1),
        FileRange(0, 0.5, 1),
        FileRange("/dev/null", 0, 1),
    ],
)
def test_data_that_cannot_be_sent_is_answered_eio(result):
    session = Session(filesystem(read=lambda *arguments: result), log=lambda message, error: None)
    fails(errno.EIO, FakeKernel(session).read, 2, 0, 0, 100)


@pytest.mark.parametrize(
    "result",
    [
        b"0123456789",
        bytearray(b"0123456789"),
        memoryview(b"0123456789"),
        [b"01234", memoryview(b"56789")],
        [b"%d" % digit for digit in range(10)],
        memoryview(b"0123456789").cast("H"),
        type("Bytes", (bytes,), {})(b"0123456789"),
    ],
)
def test_any_buffer_is_data(result):
    kernel = FakeKernel(Session(filesystem(read=lambda *arguments: result)))
    assert kernel.read(2, 0, 0, 100) == b"0123456789"


def test_more_buffers_than_writev_takes_are_joined():
    session = Session(filesystem(read=lambda *arguments: [b"x"] * 5000))
    sent = request(abi.FUSE_READ, 2, bytes(16) + (8192).to_bytes(4, "little") + bytes(20))
    reply = session.handle(sent)
    assert len(reply) <= 1024
    assert check_reply(sent, reply) == (0, b"x" * 5000)


def test_range_of_a_file_is_cut_to_what_was_asked_for(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        kernel = FakeKernel(Session(filesystem(read=lambda *arguments: FileRange(file.fileno(), 2, 1000))))
        assert kernel.read(2, 0, 0, 4) == b"2345"
        assert kernel.read(2, 0, 0, 100) == b"23456789"


@pytest.mark.parametrize("result", [b"", b"a\0b", "text", None, 7, [1, 2]])
def test_link_target_that_is_none_is_answered_eio(result):
    session = Session(filesystem(readlink=lambda nodeid: result), log=lambda message, error: None)
    fails(errno.EIO, FakeKernel(session).readlink, 2)


def test_link_target_of_a_page_is_too_long():
    kernel = FakeKernel(Session(filesystem(readlink=lambda nodeid: b"x" * nodeid)))
    assert len(kernel.readlink(4095)) == 4095
    fails(errno.ENAMETOOLONG, kernel.readlink, 4096)


@pytest.mark.parametrize(
    "result", [2, (), (2, DIRECTORY), (2, DIRECTORY[:15], 1, 1, 0), (-1, DIRECTORY, 1, 1, 0), b"", bytes(127)]
)
def test_what_is_no_entry_is_answered_eio(result):
    session = Session(filesystem(lookup=lambda *arguments: result), log=lambda message, error: None)
    fails(errno.EIO, FakeKernel(session).lookup, 1, b"f")


def test_entry_may_be_given_in_wire_form():
    from fusewire.wire.codec import DirBuffer, encode_attr, encode_entry

    entry = Entry(2, attr(2, stat.S_IFREG | 0o644, 5), 1.5, 0.5)
    body = encode_entry(entry)

    class Ready(Operations):
        def lookup(self, caller, parent, name):
            return body

        def getattr(self, nodeid, flags, fh):
            return encode_attr((entry.attr, 0.5))

        def readdirplus(self, nodeid, fh, offset, size, *rest):
            buffer = DirBuffer(size)
            if not offset:
                buffer.add_plus(b".", 1, None, 1, stat.S_IFDIR >> 12)
                buffer.add_plus(b"f", 2, body)
                buffer.add_plus(b"g", 3, entry)
            return buffer.data

    kernel = FakeKernel(Session(Ready()))
    kernel.init()
    assert kernel.lookup(1, b"f") == entry
    assert kernel.getattr(2) == (entry.attr, 0.5)
    dot, f, g = kernel.listdir()
    assert f[1:] == (2, 2, stat.S_IFREG >> 12, entry)
    assert g[1:] == (2, 3, stat.S_IFREG >> 12, entry)
    assert dot.entry is None
    assert kernel.lookups == {2: 3}


@pytest.mark.parametrize(
    ("seconds", "sent"), [(0, 0), (-5, 0), (0.25, 0.25), (1, 1), (float("inf"), 2**32), (2**80, 2**32), (2**32, 2**32)]
)
def test_lifetime_is_sent_as_far_as_the_kernel_counts(seconds, sent):
    kernel = FakeKernel(Session(filesystem(lookup=lambda *arguments: Entry(2, DIRECTORY, seconds, seconds))))
    assert kernel.lookup(1, b"f").entry_timeout == sent


@pytest.mark.parametrize("result", [None, (0,), (0, b"x" * 9), (0, "text"), (1 << 40, b""), (0, 1 << 40)])
def test_ioctl_output_that_does_not_fit_is_answered_eio(result):
    session = Session(filesystem(ioctl=lambda *arguments: result), log=lambda message, error: None)
    fails(errno.EIO, FakeKernel(session).ioctl, 2, 0, 1, 0, b"", 8)


# FORGET and the end


def test_batch_forget_goes_on_after_a_node_that_fails():
    seen = []
    reports = []

    class Failing(Operations):
        def forget(self, nodeid, nlookup):
            if nodeid == 2:
                raise KeyError(nodeid)
            seen.append((nodeid, nlookup))

    kernel = FakeKernel(Session(Failing(), log=lambda message, error: reports.append(message)))
    kernel.batch_forget([(2, 1), (3, 4), (2, 1), (5, 6)])
    assert seen == [(3, 4), (5, 6)]
    assert reports == ["batch_forget failed"]


@pytest.mark.parametrize("count", [0, 1, 3, 2**32 - 1])
def test_batch_forget_believes_no_count_beyond_the_request(count):
    seen = []
    session = Session(filesystem(forget=lambda nodeid, nlookup: seen.append(nodeid)))
    items = b"".join(node.to_bytes(8, "little") + bytes(8) for node in (2, 3))
    FakeKernel(session).raw(abi.FUSE_BATCH_FORGET, 0, count.to_bytes(4, "little") + bytes(4) + items + b"rest")
    assert seen == [2, 3][:count]


def test_destroy_is_called_once_however_the_mount_ends():
    ends = []
    session = Session(filesystem(destroy=lambda: ends.append("destroy")))
    session.on_destroy = lambda: ends.append("told")
    FakeKernel(session).destroy()
    session.close()
    session.close()
    assert ends == ["destroy", "told"]


@pytest.mark.usefixtures("switching")
def test_destroy_is_called_once_from_many_threads():
    ends = []
    session = Session(filesystem(destroy=lambda: ends.append("destroy")))
    barrier = threading.Barrier(8)

    def end():
        barrier.wait()
        session.close()

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["destroy"]


def test_destroy_that_fails_is_reported_and_no_more():
    reports = []

    def fail():
        raise ValueError

    session = Session(filesystem(destroy=fail), log=lambda message, error: reports.append(message))
    session.on_destroy = lambda: reports.append("told")
    FakeKernel(session).destroy()
    session.close()
    assert reports == ["destroy failed", "told"]


# Notifications


def test_notification_that_the_kernel_does_not_know_is_false():
    session = Session(Operations())

    def refuse(buffers):
        raise OSError(errno.ENOENT, "no such node")

    session.send = refuse
    assert session.notify_inval_inode(77) is False
    assert session.notify_retrieve(77, 0, 10, lambda offset, data: None) is False
    assert not session._retrieves


def test_notification_without_a_transport_says_so():
    fails(errno.ENOTCONN, Session(Operations()).notify_resend)


def test_notification_that_fails_leaves_nothing_behind():
    session = Session(Operations())

    def refuse(buffers):
        raise OSError(errno.EBADF, "closed")

    session.send = refuse
    fails(errno.EBADF, session.notify_retrieve, 2, 0, 10, lambda offset, data: None)
    assert not session._retrieves


def test_expiry_is_asked_for_only_where_it_was_agreed():
    kernel = FakeKernel(Session(Operations()))
    kernel.init(flags=OFFERED & ~abi.FUSE_HAS_EXPIRE_ONLY)
    kernel.session.notify_inval_entry(1, b"f", expire_only=True)
    assert kernel.notifications[0][1][12:16] == bytes(4)


def test_stored_data_is_counted_in_bytes():
    kernel = FakeKernel(Session(Operations()))
    kernel.session.notify_store(2, 0, memoryview(bytes(16)).cast("Q"))
    assert kernel.notifications[0][1][16:20] == (16).to_bytes(4, "little")


# Answers that come later


class Later(Operations):
    """READ waits until somebody completes `pending`."""

    interruptible = True

    def __init__(self) -> None:
        self.pending: list[Pending] = []
        self.given_up: list[str] = []

    def read(self, nodeid, fh, offset, size, read_flags, lock_owner, flags):
        self.pending.append(Pending(lambda: self.given_up.append("interrupt")))
        return self.pending[-1]


def read_body(size: int = 100) -> bytes:
    return bytes(16) + size.to_bytes(4, "little") + bytes(20)


def test_late_answer_comes_once():
    later = Later()
    kernel = FakeKernel(Session(later))
    unique = kernel.start(abi.FUSE_READ, 2, read_body())
    assert not kernel.answered(unique)
    later.pending[0].complete(b"first")
    later.pending[0].complete(b"second")
    later.pending[0].fail(FileNotFoundError())
    assert kernel.finish(unique) == b"first"
    assert not kernel.unasked


def test_late_failure_is_mapped_as_any_other():
    later = Later()
    kernel = FakeKernel(Session(later, log=lambda message, error: None))
    for error, number in ((FileNotFoundError(), errno.ENOENT), (ValueError(), errno.EIO)):
        unique = kernel.start(abi.FUSE_READ, 2, read_body())
        later.pending[-1].fail(error)
        fails(number, kernel.finish, unique)


@pytest.mark.parametrize("result", [None, "text", bytes(101), FileRange(0, 0, 1), Pending()])
def test_late_result_that_cannot_be_sent_is_answered_eio(result):
    later = Later()
    kernel = FakeKernel(Session(later, log=lambda message, error: None))
    unique = kernel.start(abi.FUSE_READ, 2, read_body())
    later.pending[0].complete(result)
    fails(errno.EIO, kernel.finish, unique)


def test_answer_that_is_there_already_is_given_at_once():
    ready = Pending()
    ready.complete(b"data")
    session = Session(filesystem(read=lambda *arguments: ready))
    sent = request(abi.FUSE_READ, 2, read_body())
    assert check_reply(sent, session.handle(sent)) == (0, b"data")


def test_late_answer_does_not_need_the_request_any_more():
    later = Later()
    kernel = FakeKernel(Session(later))
    buffer = bytearray(request(abi.FUSE_READ, 2, read_body(), unique=2))
    with kernel._condition:
        kernel._waiting[2] = bytes(buffer)
    assert kernel.session.handle(memoryview(buffer)) is None
    buffer[:] = bytes(len(buffer))
    later.pending[0].complete(b"data")
    assert kernel.finish(2) == b"data"


def test_one_pending_cannot_answer_two_requests():
    shared = Pending()
    kernel = FakeKernel(Session(filesystem(read=lambda *arguments: shared), log=lambda message, error: None))
    first = kernel.start(abi.FUSE_READ, 2, read_body())
    fails(errno.EIO, kernel.raw, abi.FUSE_READ, 2, read_body())
    shared.complete(b"data")
    assert kernel.finish(first) == b"data"


def test_pending_has_no_subclasses():
    with pytest.raises(TypeError):
        type("Mine", (Pending,), {})


def test_interrupt_reaches_the_request_that_waits():
    later = Later()
    kernel = FakeKernel(Session(later))
    unique = kernel.start(abi.FUSE_READ, 2, read_body())
    assert kernel.interrupt(unique) is True
    assert later.given_up == ["interrupt"]
    later.pending[0].fail(InterruptedError())
    fails(errno.EINTR, kernel.finish, unique)


def test_interrupt_that_comes_before_the_request_waits_is_kept_for_it():
    later = Later()
    kernel = FakeKernel(Session(later))
    kernel.interrupt(2)
    kernel.start(abi.FUSE_READ, 2, read_body(), unique=2)
    assert later.given_up == ["interrupt"]


def test_interrupt_that_settles_at_once_makes_one_answer():
    class AtOnce(Operations):
        interruptible = True

        def read(self, *arguments):
            pending = Pending(lambda: pending.fail(InterruptedError()))
            return pending

    kernel = FakeKernel(Session(AtOnce()))
    kernel.interrupt(2)
    fails(errno.EINTR, kernel.finish, kernel.start(abi.FUSE_READ, 2, read_body(), unique=2))
    unique = kernel.start(abi.FUSE_READ, 2, read_body(), unique=100)
    kernel.interrupt(unique)
    fails(errno.EINTR, kernel.finish, unique)
    assert not kernel.unasked


def test_interrupt_that_fails_is_reported_and_the_answer_still_comes_once():
    reports = []
    pending = []

    class Failing(Operations):
        interruptible = True

        def read(self, *arguments):
            def fail():
                raise ValueError

            pending.append(Pending(fail))
            return pending[-1]

    kernel = FakeKernel(Session(Failing(), log=lambda message, error: reports.append(message)))
    kernel.interrupt(2)
    unique = kernel.start(abi.FUSE_READ, 2, read_body(), unique=2)
    assert not kernel.answered(unique)
    kernel.interrupt(unique)
    pending[0].complete(b"data")
    assert kernel.finish(unique) == b"data"
    assert not kernel.unasked
    assert reports == ["interrupt failed"]


def test_interrupts_of_requests_that_are_gone_take_bounded_room():
    session = Session(Later())
    kernel = FakeKernel(session)
    for unique in range(2, 10000, 2):
        kernel.interrupt(unique)
    assert len(session._interrupted) <= 1024


@pytest.mark.usefixtures("switching")
def test_interrupts_race_with_answers_and_each_request_is_answered_once():
    class Waiting(Operations):
        interruptible = True

        def read(self, *arguments):
            pending = Pending(lambda: pending.fail(InterruptedError()))
            thread = threading.Thread(target=pending.complete, args=(b"data",))
            threads.append(thread)
            thread.start()
            return pending

    threads: list[threading.Thread] = []
    kernel = FakeKernel(Session(Waiting()))

    def ask(unique: int) -> None:
        try:
            assert kernel.finish(kernel.start(abi.FUSE_READ, 2, read_body(), unique=unique)) == b"data"
        except InterruptedError:
            pass

    for round_ in range(50):
        uniques = [1000 + 20 * round_ + 2 * n for n in range(4)]
        asking = [threading.Thread(target=ask, args=(unique,)) for unique in uniques]
        asking += [threading.Thread(target=kernel.interrupt, args=(unique,)) for unique in uniques]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    for thread in threads:
        thread.join()
    assert len(threads) == 200
    assert not kernel.unasked
    assert not kernel.session._pending


@pytest.mark.usefixtures("switching")
def test_every_interrupt_is_heard_whichever_comes_first():
    """An interrupt that overtakes the return of its handler, or is overtaken by it, ends the wait all the same."""

    class Forever(Operations):
        interruptible = True

        def read(self, *arguments):
            pending = Pending(lambda: pending.fail(InterruptedError()))
            return pending

    kernel = FakeKernel(Session(Forever()))
    for unique in range(2, 1000, 2):
        interrupting = threading.Thread(target=kernel.interrupt, args=(unique,))
        interrupting.start()
        fails(errno.EINTR, kernel.finish, kernel.start(abi.FUSE_READ, 2, read_body(), unique=unique))
        interrupting.join()


def test_a_lookup_that_gives_none_is_answered_enoent() -> None:
    class Empty(Operations):
        def lookup(self, caller, parent, name):
            return None

    class Later(Operations):
        def lookup(self, caller, parent, name):
            pending = Pending()
            pending.complete(None)
            return pending

    for filesystem in (Empty(), Later()):
        kernel = FakeKernel(Session(filesystem))
        kernel.init()
        with pytest.raises(FileNotFoundError):
            kernel.lookup(1, b"nothing")
