"""A client that lies, against the passthrough filesystem: requests as bytes, in process, while the host changes too.

Whatever comes, each request has one answer that the kernel would take, the server neither follows, waits nor dies,
nothing outside of the served directory is read or written, and no descriptor number is used after it changed hands.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import e2e
from fusewire.fs.passthrough import Config, Passthrough, open_directory
from fusewire.linux import mountinfo
from fusewire.ops import Lock
from fusewire.session import Session
from fusewire.testing import OFFERED, FakeKernel, body_of, request
from fusewire.testing.replies import BY_NAME
from fusewire.wire import abi
from fusewire.wire.table import TABLE, layout

SECRET = b"nobody may read this"
NUMBERS = (0, 1, 2, 3, 7, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
# Requests that begin or end the connection, and the one that answers a question of the server's.
LIFE = {"init", "destroy", "notify_reply", "interrupt"}
LARGEST = 64 << 20  # bytes; what a file of these tests may grow to
PATIENCE = 20.0


class Rig:
    """A served directory, the client of it, and what is outside."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.served = base / "served"
        self.outside = base / "outside"
        self.served.mkdir()
        self.outside.mkdir()
        (self.outside / "secret").write_bytes(SECRET)
        (self.outside / "secret").chmod(0o640)
        self.complaints: list[str] = []
        self._opened: list[Passthrough] = []

    def client(self, **options: Any) -> FakeKernel:
        """Serve the directory; `options` are Config's."""
        options.setdefault("fd_budget", 512)
        filesystem = open_directory(os.fspath(self.served), Config(**options))
        self._opened.append(filesystem)

        def log(message: str, error: BaseException | None) -> None:
            if os.geteuid() == 0 or not message.startswith("files belong to the server's user"):  # true of others
                self.complaints.append(f"{message}: {error!r}")

        kernel = FakeKernel(Session(filesystem, log=log), uid=os.geteuid(), gid=os.getegid(), pid=os.getpid())
        kernel.init(flags=OFFERED & ~abi.FUSE_PASSTHROUGH)
        return kernel

    def nodes(self) -> Any:
        """The nodes of the filesystem that was made last."""
        return self._opened[-1].nodes

    def evict(self) -> None:
        """Close the descriptor of every node that can get it back, as a shortage does."""
        nodes = self.nodes()
        with nodes._lock:
            for node in list(nodes._held):
                if not node.pinned:
                    del nodes._held[node]
                    node.fd = None

    def close(self) -> None:
        """End all of it; what is outside must be as it was."""
        for filesystem in self._opened:
            filesystem.destroy()
        assert (self.outside / "secret").read_bytes() == SECRET
        assert stat.S_IMODE((self.outside / "secret").stat().st_mode) == 0o640
        assert sorted(os.listdir(self.outside)) == ["secret"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A directory and its surroundings. Nothing may be complained of, no descriptor may be left, nothing may wait."""
    umask = os.umask(0o022)  # a worker has an umask of its own; the thread of this test is one
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, limit[1]))
    before = len(os.listdir("/proc/self/fd"))
    made = Rig(tmp_path)
    try:
        with e2e.deadline("no process has this mark", PATIENCE * 4):
            yield made
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        os.umask(umask)
        made.close()
        del made._opened[:]
        gc.collect()  # frames of errors that the tests have caught
    assert made.complaints == []
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors leaked"


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> int:
    """Give the errno of a call that has to fail."""
    with pytest.raises(OSError) as caught:
        call(*arguments, **named)
    assert caught.value.errno is not None
    return caught.value.errno


@contextlib.contextmanager
def may_fail(*numbers: int) -> Iterator[None]:
    """Let a block fail with one of these errnos (any, if there are none)."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise


def in_time(call: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Give what `call` gives, or raise what it raises; fail if it takes too long: it waits for something."""
    done: list[Any] = []

    def work() -> None:
        try:
            done.append((call(), None))
        except Exception as error:  # noqa: BLE001 - raised again below
            done.append((None, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
    assert done, "the server waits"
    result, error = done[0]
    if error is not None:
        raise error
    return result


def fill(directory: Path) -> None:
    """Make one thing of each kind."""
    (directory / "file").write_bytes(b"content of the file")
    (directory / "directory").mkdir()
    (directory / "directory" / "inner").write_bytes(b"inner")
    (directory / "link").symlink_to("/etc/passwd")
    os.mkfifo(directory / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(directory)  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    if os.geteuid() == 0:
        os.mknod(directory / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))


# Numbers that nobody gave out


def plain_body(name: str, *fields: int) -> bytes:
    """A body of the right shape, with names and data that are all right."""
    op = BY_NAME[name]
    count = {"rename": 2, "rename2": 2, "symlink": 2}.get(name, op.names)
    names = [b"user.name" if "xattr" in name else b"name%d" % number for number in range(count)]
    return body_of(name, *fields, names=names, tail=b"\0" * 64 if name in ("write", "setxattr", "ioctl") else b"")


def widths(name: str) -> list[int]:
    """How many bits each field of an operation's struct has."""
    args = BY_NAME[name].args
    if not args:
        return []
    struct = layout(args)
    sizes = {"Q": 64, "q": 64, "I": 32, "i": 32, "H": 16, "h": 16, "B": 8}
    found = []
    count = ""
    for letter in struct.format.lstrip("<=@>!"):
        if letter.isdigit():
            count += letter
            continue
        if letter in sizes:
            found += [sizes[letter]] * int(count or 1)
        count = ""
    return found


EVERY = [op.name for op in TABLE if op.name not in LIFE]


@pytest.mark.parametrize("name", EVERY)
def test_every_request_survives_unknown_nodes_and_handles(rig: Rig, name: str) -> None:
    fill(rig.served)
    kernel = rig.client()
    fields = widths(name)
    for nodeid in (0, 2, 5, 2**32, 2**63, 2**64 - 1):
        for number in (0, 1, 2, 2**64 - 1):
            body = plain_body(name, *[number & (1 << bits) - 1 for bits in fields])
            unique = kernel.start(BY_NAME[name].code, nodeid, body)
            with may_fail():
                kernel.finish(unique, 5.0)
    assert kernel.read_file(b"file") == b"content of the file"


@pytest.mark.parametrize("name", EVERY)
def test_every_field_of_every_request_may_be_anything(rig: Rig, name: str) -> None:
    fill(rig.served)
    kernel = rig.client()
    file, directory = kernel.lookup(1, b"file").nodeid, kernel.lookup(1, b"directory").nodeid
    fh, other = kernel.open(file, os.O_RDWR)[0], kernel.opendir(directory)[0]
    plain = [1 if bits == 32 else fh for bits in widths(name)]
    waiting = []
    for nodeid, handle in ((file, fh), (directory, other), (file, other), (directory, fh), (1, fh)):
        for place, bits in enumerate(widths(name)):
            for number in NUMBERS:
                if number >> bits:
                    continue
                fields = [handle, *plain[1:]] if plain and plain[0] == fh else list(plain)
                fields[place] = number
                waiting.append(kernel.start(BY_NAME[name].code, nodeid, plain_body(name, *fields)))
    for unique in waiting:
        if not kernel.answered(unique):
            kernel.interrupt(unique)
    for unique in waiting:
        with may_fail():
            kernel.finish(unique, 5.0)
    kernel.getattr(1)
    rig.served.chmod(0o755)  # SETATTR took the mode away, and an ordinary user needs it
    assert kernel.resolve(b"directory").nodeid


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(EVERY),
    nodeid=st.sampled_from((1, 2, 3, 4, 5, 6, 2**64 - 1)),
    body=st.binary(max_size=120),
    extlen=st.sampled_from((0, 0, 0, 1, 2, 65535)),
)
def test_requests_of_random_bytes_are_answered(
    rig_of_all: tuple[Rig, FakeKernel], name: str, nodeid: int, body: bytes, extlen: int
) -> None:
    _, kernel = rig_of_all
    unique = kernel.start(BY_NAME[name].code, nodeid, body, extlen=extlen)
    if not kernel.answered(unique):
        kernel.interrupt(unique)
    with may_fail():
        kernel.finish(unique, 5.0)


@pytest.fixture
def rig_of_all(rig: Rig) -> tuple[Rig, FakeKernel]:
    """A directory with one of each kind, all of them looked up, and handles 1 and 2 of a file and a directory."""
    fill(rig.served)
    kernel = rig.client()
    for name in sorted(os.listdir(rig.served)):
        kernel.lookup(1, os.fsencode(name))
    kernel.open(kernel.lookup(1, b"file").nodeid, os.O_RDWR)
    kernel.opendir(1)
    return rig, kernel


def test_handles_of_files_are_no_handles_of_directories_and_the_reverse(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    file, directory = kernel.lookup(1, b"file").nodeid, kernel.lookup(1, b"directory").nodeid
    fh, _ = kernel.open(file, os.O_RDWR)
    dh, _ = kernel.opendir(directory)
    assert refused(kernel.readdir, directory, fh) == errno.ENOTDIR
    assert refused(kernel.readdirplus, file, fh) == errno.ENOTDIR
    assert refused(kernel.raw, abi.FUSE_WRITE, file, body_of("write", dh, 0, 3, 0, 0, 0, tail=b"abc")) == errno.EBADF
    assert refused(kernel.setattr, file, abi.FATTR_SIZE | abi.FATTR_FH, fh=dh, size=0) in (errno.EINVAL, errno.EBADF)
    assert refused(kernel.fallocate, file, dh, 0, 4096) in (errno.EBADF, errno.ENODEV)
    assert refused(kernel.copy_file_range, file, fh, 0, directory, dh, 0, 10) in (errno.EISDIR, errno.EBADF)
    assert refused(kernel.open, directory, os.O_RDONLY) == errno.EISDIR
    assert refused(kernel.opendir, file) == errno.ENOTDIR
    assert refused(kernel.lookup, file, b"name") == errno.ENOTDIR
    assert refused(kernel.releasedir, file, fh) == errno.ENOTDIR
    kernel.release(file, fh)
    kernel.release(directory, dh)
    for handle in (fh, dh):
        assert refused(kernel.release, file, handle) == errno.EBADF
        assert refused(kernel.getattr, file, handle) == errno.EBADF
    assert (rig.served / "file").read_bytes() == b"content of the file"


def test_a_handle_with_another_node_reaches_the_handles_file_and_no_third(rig: Rig) -> None:
    for name in ("a", "b"):
        (rig.served / name).write_bytes(name.encode() * 4)
    kernel = rig.client()
    a, b = kernel.lookup(1, b"a").nodeid, kernel.lookup(1, b"b").nodeid
    fh, _ = kernel.open(a, os.O_RDWR)
    assert kernel.read(b, fh, 0, 10) == b"aaaa"
    assert kernel.write(b, fh, 0, b"x") == 1
    kernel.setlk(b, fh, 77, Lock(0, 1, fcntl.F_WRLCK, 1))
    kernel.flush(b, fh, 77)
    kernel.flush(a, fh, 77)
    kernel.release(b, fh)
    assert [(rig.served / name).read_bytes() for name in ("a", "b")] == [b"xaaa", b"bbbb"]


@pytest.mark.parametrize(
    "name",
    [b"", b".", b"..", b"/", b"a/b", b"../outside/secret", b"/etc/passwd", b"a\0b", b"n" * 256, b"n" * 4096, b"./file"],
)
def test_names_that_are_no_names_reach_nothing(rig: Rig, name: bytes) -> None:
    fill(rig.served)
    kernel = rig.client()
    inner = kernel.lookup(1, b"directory").nodeid
    before = sorted(os.listdir(rig.served))
    for operation in ("lookup", "unlink", "rmdir", "mkdir", "mknod", "create", "symlink", "rename", "rename2", "link"):
        op = BY_NAME[operation]
        fixed = [kernel.lookup(1, b"file").nodeid if operation == "link" else inner] if op.args else []
        fixed += [0] * (len(widths(operation)) - len(fixed)) if op.args else []
        for names in ([name, b"ok"], [b"file", name]):
            count = {"symlink": 2, "rename": 2, "rename2": 2}.get(operation, 1)
            if operation == "symlink" and names[0] != name:
                continue  # the second is a target, and may be anything
            if count == 1 and names[0] != name:
                continue
            with may_fail():
                kernel.call(operation, inner, *fixed, names=names[:count])
                # Names with a NUL are two: what is before it is a name, and the rest is too much or another one.
                assert b"\0" in name, f"{operation} took {name!r}"
    assert sorted(os.listdir(rig.served)) == before
    assert {"inner"} <= set(os.listdir(rig.served / "directory")) <= {"inner", "a", "b"}


# What the host plants between two requests


def plant(path: Path, kind: str, target: Path) -> None:
    """Put something else where a file or directory was."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 9))
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"planted")


@pytest.mark.parametrize("held", [False, True], ids=["by name", "by descriptor"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "device", "directory"])
def test_what_is_planted_in_the_place_of_a_file_is_neither_opened_nor_followed(rig: Rig, kind: str, held: bool) -> None:
    if kind == "device" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    place = rig.served / "file"
    place.write_bytes(b"content")
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    if held:
        kernel.open(file)
    plant(place, kind, rig.outside / "secret")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
        with may_fail(errno.ESTALE, errno.EBADF, errno.ENOENT):
            fh, _ = in_time(lambda flags=flags: kernel.open(file, flags))
            assert held
            if flags != os.O_WRONLY:
                assert kernel.read(file, fh, 0, 100) in (b"content", b"")
    for change in (
        lambda: kernel.setattr(file, abi.FATTR_SIZE, size=0),
        lambda: kernel.setattr(file, abi.FATTR_MODE, mode=0o777),
        lambda: kernel.setxattr(file, b"user.name", b"value"),
        lambda: kernel.link(file, 1, b"another"),
        lambda: kernel.create(1, b"file", os.O_RDWR),
    ):
        with may_fail():
            in_time(change)
    status = os.lstat(place)
    assert stat.S_IFMT(status.st_mode) == {
        "symlink": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "device": stat.S_IFCHR,
        "directory": stat.S_IFDIR,
    }.get(kind)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "file"])
def test_what_gets_the_inode_number_of_a_file_that_is_gone_is_not_taken_for_it(rig: Rig, kind: str) -> None:
    kernel = rig.client()
    if kind == "file" and mountinfo.holding(os.fsencode(rig.served)).fstype == b"overlay":
        pytest.skip("overlayfs has no lasting times of birth, by which two files of one kind could be told apart")
    for attempt in range(50):
        place = rig.served / f"file{attempt}"
        place.write_bytes(b"content")
        number = place.stat().st_ino
        node = kernel.lookup(1, os.fsencode(place.name)).nodeid
        plant(place, kind, rig.outside / "secret")
        if os.lstat(place).st_ino == number:
            break
    else:
        pytest.skip("this filesystem gives an inode's number away later")
    gone = (errno.ESTALE, errno.EBADF)
    assert refused(lambda: in_time(lambda: kernel.open(node, os.O_RDONLY))) in gone
    assert refused(lambda: in_time(lambda: kernel.setattr(node, abi.FATTR_SIZE, size=0))) in gone
    again = kernel.lookup(1, os.fsencode(place.name))
    assert stat.S_IFMT(again.attr[9]) == {"symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO, "file": stat.S_IFREG}[kind]
    assert again.nodeid != node


@pytest.mark.parametrize("held", [False, True], ids=["by name", "by descriptor"])
def test_a_directory_that_becomes_a_symlink_leads_nowhere(rig: Rig, held: bool) -> None:
    (rig.served / "d").mkdir()
    (rig.served / "d" / "secret").write_bytes(b"own")
    kernel = rig.client()
    directory = kernel.lookup(1, b"d").nodeid
    file = kernel.lookup(directory, b"secret").nodeid
    if not held:
        rig.evict()
    shutil.rmtree(rig.served / "d")
    (rig.served / "d").symlink_to(rig.outside)
    for attempt in (
        lambda: kernel.lookup(directory, b"secret"),
        lambda: kernel.read(file, kernel.open(file)[0], 0, 100),
        lambda: kernel.create(directory, b"new"),
        lambda: kernel.unlink(directory, b"secret"),
        lambda: kernel.rename(directory, b"secret", 1, b"mine"),
        lambda: kernel.setattr(file, abi.FATTR_MODE, mode=0o777),
    ):
        assert refused(attempt) in (errno.ESTALE, errno.ENOENT)
    link = kernel.lookup(1, b"d")
    assert stat.S_ISLNK(link.attr[9])
    assert refused(kernel.lookup, link.nodeid, b"secret") == errno.ENOTDIR
    assert refused(kernel.open, link.nodeid) == errno.EBADF
    assert refused(kernel.opendir, link.nodeid) == errno.ENOTDIR
    with may_fail():
        kernel.setattr(link.nodeid, abi.FATTR_MODE, mode=0o777)
    with may_fail():
        kernel.setxattr(link.nodeid, b"user.x", b"")


def test_a_symlink_that_appears_where_a_file_is_created_is_not_followed(rig: Rig) -> None:
    kernel = rig.client()
    (rig.served / "new").symlink_to(rig.outside / "made")
    assert refused(kernel.create, 1, b"new", os.O_RDWR | os.O_EXCL) == errno.EEXIST
    assert refused(kernel.create, 1, b"new", os.O_RDWR | os.O_TRUNC) in (errno.EEXIST, errno.ESTALE)
    assert kernel.lookups.get(2, 0) <= 1


@pytest.mark.parametrize("name", ["fifo", "socket", "device", "link"])
def test_special_files_are_never_opened_and_never_hold_up_the_server(rig: Rig, name: str) -> None:
    fill(rig.served)
    if name == "device" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    kernel = rig.client()
    node = kernel.lookup(1, name.encode()).nodeid
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        assert refused(lambda flags=flags: in_time(lambda: kernel.open(node, flags))) == errno.EBADF
    assert refused(lambda: in_time(lambda: kernel.opendir(node))) == errno.ENOTDIR
    assert refused(lambda: in_time(lambda: kernel.setattr(node, abi.FATTR_SIZE, size=0))) == errno.EBADF
    assert refused(lambda: in_time(lambda: kernel.create(1, name.encode()))) in (
        errno.EBADF,
        errno.ESTALE,
        errno.EEXIST,
    )
    in_time(lambda: kernel.getattr(node))
    in_time(lambda: kernel.listxattr(node))
    in_time(lambda: kernel.statfs(node))


# Trees that move


@pytest.mark.parametrize("held", [False, True], ids=["by name", "by descriptor"])
def test_a_file_of_a_directory_that_moves_on_the_host_is_right_or_stale(rig: Rig, held: bool) -> None:
    for name in "ab":
        (rig.served / name / "below").mkdir(parents=True)
        (rig.served / name / "below" / "file").write_bytes(name.encode())
    kernel = rig.client()
    below = kernel.resolve(b"a/below").nodeid
    file = kernel.lookup(below, b"file").nodeid
    if held:
        kernel.release(file, kernel.open(file)[0])
    else:
        rig.evict()
    # Each is where the other was.
    (rig.served / "a").rename(rig.served / "c")
    (rig.served / "b").rename(rig.served / "a")
    (rig.served / "c").rename(rig.served / "b")
    right_or_stale = contextlib.nullcontext if held else lambda: may_fail(errno.ESTALE)
    with right_or_stale():
        fh, _ = kernel.open(file)
        assert kernel.read(file, fh, 0, 10) == b"a"
    with right_or_stale():
        assert kernel.getattr(kernel.lookup(below, b"file").nodeid)[0][1] == 1
    # By their names, everything is where it is now.
    for name, content in ((b"a", b"b"), (b"b", b"a")):
        assert kernel.read_file(name + b"/below/file") == content


def test_a_directory_that_moves_into_its_own_child_ends_in_no_loop(rig: Rig) -> None:
    (rig.served / "a" / "b").mkdir(parents=True)
    (rig.served / "a" / "b" / "file").write_bytes(b"deep")
    kernel = rig.client()
    a = kernel.lookup(1, b"a").nodeid
    b = kernel.lookup(a, b"b").nodeid
    file = kernel.lookup(b, b"file").nodeid
    kernel.opendir(b)  # its descriptor is there
    (rig.served / "a" / "b").rename(rig.served / "b")
    (rig.served / "a").rename(rig.served / "b" / "a")
    assert kernel.lookup(b, b"a").nodeid == a  # now each is the other's parent, as far as is known
    rig.evict()
    for node in (a, b):
        with may_fail(errno.ESTALE):
            in_time(lambda node=node: kernel.getattr(node))
            in_time(lambda node=node: kernel.opendir(node))
    with may_fail(errno.ESTALE):
        in_time(lambda: kernel.open(file))
    assert kernel.read_file(b"b/file") == b"deep"
    assert kernel.resolve(b"b/a").nodeid == a
    assert refused(kernel.rename, 1, b"b", kernel.resolve(b"b/a").nodeid, b"c") == errno.EINVAL


@pytest.mark.parametrize("held", [False, True], ids=["by name", "by descriptor"])
def test_a_directory_that_moves_out_of_the_tree_leads_to_nothing_else_outside(rig: Rig, held: bool) -> None:
    (rig.served / "d").mkdir()
    (rig.served / "d" / "own").write_bytes(b"own")
    kernel = rig.client()
    directory = kernel.lookup(1, b"d").nodeid
    dh, _ = kernel.opendir(directory)
    kernel.lookup(directory, b"own")
    if not held:
        rig.evict()
    moved = rig.outside / "d"
    (rig.served / "d").rename(moved)
    try:
        for name in (b"..", b"secret", b"../secret", b"outside"):
            with may_fail():
                found = kernel.lookup(directory, name)
                assert found.nodeid == 0, name
        for entry in kernel.readdirplus(directory, dh):
            assert entry.name in (b".", b"..", b"own")
            assert entry.entry is None or entry.name == b"own"
        # What was below it is the client's still, as with any open directory of the host; what is beside it is not.
        with may_fail():
            kernel.rename(directory, b"own", 1, b"back")
        with may_fail():
            kernel.rename(1, b"back", directory, b"own")
        assert refused(kernel.lookup, 1, b"d") == errno.ENOENT
    finally:
        shutil.rmtree(moved)


def test_an_open_file_lives_when_its_name_moves_and_its_descriptor_was_closed(rig: Rig) -> None:
    (rig.served / "file").write_bytes(b"content")
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(file, os.O_RDWR)
    rig.evict()
    (rig.served / "file").rename(rig.served / "elsewhere")
    (rig.served / "file").write_bytes(b"another")
    assert kernel.read(file, fh, 0, 100) == b"content"
    assert kernel.getattr(file, fh)[0][1] == 7
    with may_fail(errno.ESTALE):
        assert kernel.getattr(file)[0][1] == 7
    assert kernel.write(file, fh, 0, b"C") == 1
    kernel.setattr(file, abi.FATTR_SIZE | abi.FATTR_FH, fh=fh, size=3)
    assert (rig.served / "elsewhere").read_bytes() == b"Con"
    assert (rig.served / "file").read_bytes() == b"another"


# Numbers that are too large


def test_offsets_beyond_every_file_are_refused(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(file, os.O_RDWR)
    for offset in (2**63, 2**63 + 4096, 2**64 - 1):
        assert refused(kernel.read, file, fh, offset, 10) in (errno.EINVAL, errno.EIO, errno.EOVERFLOW)
        assert refused(kernel.write, file, fh, offset, b"abc") in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW)
        assert refused(kernel.lseek, file, fh, offset, os.SEEK_DATA) in (errno.EINVAL, errno.ENXIO, errno.EOVERFLOW)
        assert refused(kernel.fallocate, file, fh, offset, 10) in (errno.EINVAL, errno.EFBIG)
        assert refused(kernel.fallocate, file, fh, 0, offset) in (errno.EINVAL, errno.EFBIG)
        assert refused(kernel.setattr, file, abi.FATTR_SIZE, size=offset) in (errno.EINVAL, errno.EFBIG)
        assert refused(kernel.copy_file_range, file, fh, offset, file, fh, 0, 10) in (errno.EINVAL, errno.EOVERFLOW)
        assert refused(kernel.copy_file_range, file, fh, 0, file, fh, offset, 10) in (
            errno.EINVAL,
            errno.EOVERFLOW,
            errno.EFBIG,
        )
    assert kernel.read(file, fh, 2**62, 10) == b""
    assert refused(kernel.write, file, fh, 2**63 - 2, b"abc") in (errno.EINVAL, errno.EFBIG, errno.EOVERFLOW)
    assert (rig.served / "file").read_bytes() == b"content of the file"


def test_locks_with_absurd_ranges_and_kinds_are_refused(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(file, os.O_RDWR)
    top = 2**63 - 1
    for start, end in ((5, 4), (2**63, 2**64 - 1), (2**64 - 1, 2**64 - 1), (2**64 - 1, 0), (top, 0)):
        for wait in (False, True):
            lock = Lock(start, end, fcntl.F_WRLCK, 1)
            assert refused(kernel.setlk, file, fh, 1, lock, wait=wait) in (errno.EINVAL, errno.EOVERFLOW)
        assert refused(kernel.getlk, file, fh, 1, Lock(start, end, fcntl.F_WRLCK, 1)) in (
            errno.EINVAL,
            errno.EOVERFLOW,
        )
    for start, end in ((0, top), (top, top), (0, 2**64 - 1), (0, 0)):
        kernel.setlk(file, fh, 1, Lock(start, end, fcntl.F_WRLCK, 1))
        kernel.setlk(file, fh, 1, Lock(start, end, fcntl.F_UNLCK, 1))
    for kind in (3, 4, 8, 0x7FFF, 0x8000, 0xFFFF, 2**31, 2**32 - 1):
        lock = Lock(0, 10, kind, 1)
        assert refused(kernel.setlk, file, fh, 1, lock) == errno.EINVAL
        assert refused(kernel.setlk, file, fh, 1, lock, wait=True) == errno.EINVAL
        assert refused(kernel.setlk, file, fh, 1, lock, lk_flags=abi.FUSE_LK_FLOCK) == errno.EINVAL
        assert refused(kernel.getlk, file, fh, 1, lock) == errno.EINVAL


def test_a_lock_for_which_nobody_waits_any_more_is_given_to_the_next(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    one, two = (kernel.open(file, os.O_RDWR)[0] for _ in range(2))
    whole = Lock(0, 2**63 - 1, fcntl.F_WRLCK, 1)
    kernel.setlk(file, one, 1, whole)
    waiting = [kernel.start(abi.FUSE_SETLKW, file, body_of("setlkw", two, owner, *whole, 0)) for owner in range(2, 40)]
    assert not any(map(kernel.answered, waiting))
    for unique in waiting[1:]:
        assert kernel.interrupt(unique)
    for unique in waiting[1:]:
        assert refused(kernel.finish, unique) == errno.EINTR
    kernel.flush(file, one, 1)
    assert kernel.finish(waiting[0]) == b""
    assert refused(kernel.setlk, file, one, 1, whole) == errno.EAGAIN
    kernel.flush(file, two, 2)
    kernel.setlk(file, one, 1, whole)


def test_locks_and_open_descriptors_end_with_the_handle_that_took_them(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client(fd_budget=64)
    file = kernel.lookup(1, b"file").nodeid
    whole = Lock(0, 2**63 - 1, fcntl.F_WRLCK, 1)
    for owner in range(1, 300):
        # An OFD lock of the client (its owner is an open file): the kernel says nothing when it ends but RELEASE.
        fh, _ = kernel.open(file, os.O_RDWR)
        kernel.setlk(file, fh, owner, whole)
        kernel.release(file, fh)
    for _ in range(300):
        with may_fail():
            fh, _ = kernel.open(file, os.O_RDWR)
            kernel.forget_all()
            kernel.release(file, fh)
        file = kernel.lookup(1, b"file").nodeid


def test_ioctls_that_are_not_on_the_list_reach_nothing(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    file = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(file, os.O_RDWR)
    dh, _ = kernel.opendir(1)
    listed = {0x80086601, 0x80046601, 0x801C581F, 0x40086602, 0x40046602, 0x401C5820}
    dangerous = [
        0x5401,  # TCGETS
        0x5412,  # TIOCSTI
        0x40049409,  # FICLONE: its argument is a descriptor, and would be one of the server's
        0x4020940D,  # FICLONERANGE
        0xC0189436,  # FIDEDUPERANGE
        0xC0045877,  # FIFREEZE
        0xC0045878,  # FITHAW
        0xC0185879,  # FITRIM
        0x1260,  # BLKGETSIZE
        0x125D,  # BLKFLSBUF
        0x6601,
        0x8008662C,  # FS_IOC_GETFSUUID and others of that letter
        0x800C6613,  # FS_IOC_SET_ENCRYPTION_POLICY
        0x40086604,
        0x541B,  # FIONREAD
        0x5421,  # FIONBIO
        0x5450,  # FIONCLEX
    ]
    for handle, node in ((fh, file), (dh, 1)):
        for command in (*dangerous, *range(0x80006600, 0x80006640), 0, 2**32 - 1):
            for flags in (0, abi.FUSE_IOCTL_COMPAT, abi.FUSE_IOCTL_UNRESTRICTED, abi.FUSE_IOCTL_DIR, 2**32 - 1):
                body = body_of("ioctl", handle, flags, command, 2**64 - 1, 64, 64, tail=b"\1" * 64)
                assert command not in listed
                assert refused(kernel.raw, abi.FUSE_IOCTL, node, body) == errno.ENOTTY
        for command in listed:
            for in_size, out_size in ((0, 0), (0, 64), (64, 0), (3, 3), (4096, 4096)):
                body = body_of("ioctl", handle, 0, command, 2**64 - 1, in_size, out_size, tail=b"\0" * in_size)
                with may_fail():
                    kernel.raw(abi.FUSE_IOCTL, node, body)


def test_xattr_names_of_all_kinds_reach_the_host_as_they_are_or_not_at_all(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    node = kernel.lookup(1, b"file").nodeid
    names = [b"user.../../x", b"user./", b"user." + b"x" * 250, b"user.\xff\xfe", b"user.=", b"user.\n", b"user. "]
    kept = []
    for name in names:
        with may_fail(errno.ENOSPC, errno.EOPNOTSUPP, errno.ERANGE):
            kernel.setxattr(node, name, b"value")
            kept.append(name)
            assert kernel.getxattr(node, name) == b"value"
            assert os.getxattr(rig.served / "file", name) == b"value"
    assert sorted(kernel.listxattr(node)) == sorted(kept)
    for name in (
        b"user.",
        b"",
        b"x" * 256,
        b"user." + b"x" * 4000,
        b"nothing.known",
        b"user",
        b"system.posix_acl_access",
    ):
        assert refused(kernel.setxattr, node, name, b"v") in (errno.EINVAL, errno.ERANGE, errno.EOPNOTSUPP)
        assert refused(kernel.getxattr, node, name) in (
            errno.EINVAL,
            errno.ERANGE,
            errno.EOPNOTSUPP,
            errno.ENODATA,
        )
    for flags in (1, 2, 3, 4, 2**31, 2**32 - 1):
        with may_fail():
            kernel.setxattr(node, b"user.flags", b"", flags)
    assert refused(kernel.setxattr, node, b"user.large", b"x" * 100_000) in (
        errno.E2BIG,
        errno.ENOSPC,
    )


def test_cookies_that_nobody_gave_out_are_answered(rig: Rig) -> None:
    for number in range(200):
        (rig.served / f"name {number}").touch()
    kernel = rig.client()
    dh, _ = kernel.opendir(1)
    everything = {entry.name for entry in kernel.listdir(1)}
    rng = random.Random(1)
    cookies = [*NUMBERS, *(rng.getrandbits(64) for _ in range(200)), *(rng.getrandbits(31) for _ in range(200))]
    for call in (kernel.readdir, kernel.readdirplus):
        for cookie in cookies:
            for size in (0, 1, 24, 152, 160, 4096, 100_000):
                with may_fail(errno.EINVAL):
                    assert {entry.name for entry in call(1, dh, cookie, size)} <= everything
        # It is still a directory that can be listed from the beginning.
        found = []
        while part := call(1, dh, found[-1].cookie if found else 0, 4096):
            found += part
        assert {entry.name for entry in found} == everything


def test_a_listing_by_several_at_once_through_one_handle_gives_only_what_is_there(rig: Rig) -> None:
    for number in range(500):
        (rig.served / f"name {number}").touch()
    kernel = rig.client()
    dh, _ = kernel.opendir(1)
    names = {b".", b"..", *(b"name %d" % number for number in range(500))}
    wrong: list[Any] = []

    def list_it(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            found: list[Any] = []
            while part := kernel.readdir(1, dh, found[-1].cookie if found else 0, rng.choice((300, 4096))):
                found += part
            if {entry.name for entry in found} != names or len(found) != len(names):
                wrong.append(len(found))

    run_all([lambda seed=seed: list_it(seed) for seed in range(4)])
    assert wrong == []


# FORGET and RELEASE while others work


def run_all(works: list[Callable[[], Any]], seconds: float = PATIENCE * 3) -> None:
    """Run each in a thread of its own; whatever one raises is raised."""
    failures: list[BaseException] = []

    def guard(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=guard, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), "somebody waits"
    if failures:
        raise failures[0]


def test_forgetting_too_much_takes_nothing_that_is_not_there(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    nodes = [kernel.lookup(1, os.fsencode(name)).nodeid for name in sorted(os.listdir(rig.served))]
    for nlookup in (2**64 - 1, 2**63, 1, 0):
        for nodeid in (0, 1, *nodes, 12345, 2**64 - 1):
            kernel.forget(nodeid, nlookup)
    kernel.batch_forget([(1, 2**64 - 1)] * 100)
    kernel.raw(abi.FUSE_BATCH_FORGET, 0, b"\xff" * 8 + b"\x01" * 16)
    kernel.lookups.clear()
    for node in nodes:
        assert refused(kernel.getattr, node) == errno.ESTALE
    assert {name for name, _ in kernel.walk()} >= {b"file", b"directory/inner"}
    assert len(rig.nodes().table) > 1


@pytest.mark.parametrize("handles", ["never", "prefer"])
def test_a_number_of_a_closed_descriptor_is_never_used(rig: Rig, handles: str) -> None:
    """Every file says which it is. Threads read, stat and write them while others take everything away all the time."""
    count, files, directories = 24, [], 4
    for directory in range(directories):
        (rig.served / f"d{directory}").mkdir()
        for number in range(count // directories):
            name = f"d{directory}/{number}"
            (rig.served / name).write_bytes(name.encode() * 50)
            os.truncate(rig.served / name, 1000 + len(files))
            os.setxattr(rig.served / name, b"user.name", name.encode())
            files.append(name)
    kernel = rig.client(fd_budget=40, inode_file_handles=handles, cache="none")
    stop = threading.Event()
    handles_now: list[tuple[int, int]] = []
    done = [0]
    ok = {errno.ESTALE, errno.EBADF, errno.ENFILE}

    def read(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            number = rng.randrange(count)
            name = files[number].encode()
            try:
                directory = kernel.lookup(1, name.split(b"/")[0]).nodeid
                entry = kernel.lookup(directory, name.split(b"/")[1])
                assert entry.attr[1] == 1000 + number, (name, entry)
                fh, _ = kernel.open(entry.nodeid, os.O_RDWR)
                handles_now.append((entry.nodeid, fh))
                assert kernel.getattr(entry.nodeid)[0][1] == 1000 + number, name
                assert kernel.getattr(entry.nodeid, fh)[0][1] == 1000 + number, name
                data = kernel.read(entry.nodeid, fh, 0, 150)
                assert data == (name * 50)[:150].ljust(150, b"\0"), (name, data[:20])
                kernel.write(entry.nodeid, fh, 0, name)
                # Without a handle: descriptors that live for the time of one request.
                assert kernel.getxattr(entry.nodeid, b"user.name") == name
                kernel.setxattr(entry.nodeid, b"user.name", name)
                kernel.setattr(entry.nodeid, abi.FATTR_SIZE, size=1000 + number)
                kernel.setattr(entry.nodeid, abi.FATTR_MODE | abi.FATTR_MTIME, mode=0o600 + number, mtime=number)
                for item in kernel.readdirplus(directory, kernel.opendir(directory)[0]):
                    if item.entry is not None:
                        place = files.index(f"d{name[1:2].decode()}/{item.name.decode()}")
                        assert item.entry.attr[1] == 1000 + place
                kernel.release(entry.nodeid, fh)
                done[0] += 1
            except OSError as error:
                if error.errno not in ok:
                    raise

    def take_away(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            highest = max(kernel.lookups, default=2)
            for _ in range(10):
                kernel.call("forget", rng.randrange(1, highest + 2), 2**63)
            highest = handles_now[-1][1] if handles_now else 1
            for fh in range(max(1, highest - 60), highest + 10):
                if rng.random() < 0.3:
                    with may_fail():
                        kernel.call("release", 1, fh, 0, 0, 0)
            rig.evict()

    def end() -> None:
        deadline = time.monotonic() + float(os.environ.get("FUSEWIRE_STRESS_SECONDS", "2"))
        while time.monotonic() < deadline:
            stop.wait(0.05)
        stop.set()

    run_all(
        [*(lambda seed=seed: _ending(stop, read, seed) for seed in range(3))]
        + [*(lambda seed=seed: _ending(stop, take_away, seed) for seed in range(2)), end]
    )
    assert done[0] > 20
    for number, name in enumerate(files):
        data = (rig.served / name).read_bytes()
        assert data == (name.encode() * 50)[: 1000 + number].ljust(1000 + number, b"\0")
        assert os.getxattr(rig.served / name, b"user.name") == name.encode()
        assert stat.S_IMODE((rig.served / name).stat().st_mode) in (0o644, 0o600 + number)
    # All of it was lies, and none of it is left.
    for nodeid in range(2, max(kernel.lookups) + 1):
        kernel.call("forget", nodeid, 2**63)
    for fh in range(1, 1_000_000):
        try:
            kernel.call("release", 1, fh, 0, 0, 0)
        except OSError:
            if fh > max(fh for _, fh in handles_now) + 1000:
                break
    assert len(rig.nodes().table) == 1
    assert rig.nodes().descriptors == 0, "the root's own does not count"


def _ending(stop: threading.Event, work: Callable[[int], None], seed: int) -> None:
    try:
        work(seed)
    finally:
        stop.set()


def test_names_that_go_while_their_nodes_are_forgotten_leave_no_descriptors(rig: Rig) -> None:
    kernel = rig.client(fd_budget=48)
    stop = threading.Event()

    def make() -> None:
        for number in range(600):
            name = b"name %d" % number
            with may_fail():
                entry, fh, _ = kernel.create(1, name)
                kernel.release(entry.nodeid, fh)
            with may_fail():
                kernel.unlink(1, name)
            with may_fail():
                _, fh, _ = kernel.tmpfile(1)
                kernel.release(1, fh)
        stop.set()

    def forget() -> None:
        while not stop.is_set():
            highest = max(list(kernel.lookups), default=2)
            for nodeid in range(max(2, highest - 5), highest + 3):
                kernel.call("forget", nodeid, 2**63)

    run_all([make, forget, forget])
    for nodeid in range(2, max(kernel.lookups) + 3):
        kernel.call("forget", nodeid, 2**63)
    assert len(rig.nodes()) == 1
    assert rig.nodes().descriptors == 0, "the root's own does not count"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(rig.served)
        rig.served.mkdir()


def test_the_end_of_the_mount_while_requests_run_harms_nobody(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client(cache="none")
    file = kernel.lookup(1, b"file").nodeid
    begun = threading.Barrier(4)

    def work() -> None:
        begun.wait()
        for _ in range(300):
            with may_fail(errno.ESTALE, errno.EBADF, errno.ENOTCONN):
                fh, _ = kernel.open(file)
                assert kernel.read(file, fh, 0, 7) == b"content"
            with may_fail():
                kernel.lookup(1, b"directory")

    def end() -> None:
        begun.wait()
        kernel.destroy()

    run_all([work, work, work, end])
    # Files may have been opened after it; the descriptors of those that were not released go with the filesystem.


# Shortage


def test_thousands_of_opens_meet_enfile_and_releases_make_room_again(rig: Rig) -> None:
    for number in range(300):
        (rig.served / str(number)).write_bytes(b"%d" % number)
    kernel = rig.client(fd_budget=64)
    for _ in range(3):
        opened, errors = [], set()
        for number in range(3000):
            try:
                node = kernel.lookup(1, b"%d" % (number % 300)).nodeid
                opened.append((number % 300, node, kernel.open(node)[0]))
            except OSError as error:
                errors.add(error.errno)
        assert errors == {errno.ENFILE}
        assert len(opened) >= 16
        for number, node, fh in opened:
            assert kernel.read(node, fh, 0, 10) == b"%d" % number
            assert kernel.getattr(node, fh)[0][1] == len(str(number))
        for _, node, fh in opened:
            kernel.release(node, fh)
        for number in range(300):
            assert kernel.read_file(b"%d" % number) == b"%d" % number


def test_files_whose_names_could_not_be_removed_do_not_hold_descriptors_for_ever(rig: Rig) -> None:
    kernel = rig.client(fd_budget=32)
    for number in range(200):
        (rig.served / f"d{number}").mkdir()
        (rig.served / f"d{number}" / "inner").touch()
        kernel.lookup(1, b"d%d" % number)
        assert refused(kernel.rmdir, 1, b"d%d" % number) == errno.ENOTEMPTY
        assert refused(kernel.unlink, 1, b"d%d" % number) in (errno.EISDIR, errno.EPERM)
    for number in range(200):
        assert kernel.resolve(b"d%d/inner" % number).attr[1] == 0


def test_a_server_under_a_small_limit_of_descriptors_lives_through_thousands_of_opens(world: e2e.World) -> None:
    source, target = world.home(0) / "source", world.home(0) / "target"
    source.mkdir()
    target.mkdir()
    for number in range(100):
        (source / str(number)).write_bytes(b"%d" % number)
    with world.mounted(source, target, "--strategy", "direct", "-o", "cache=none", uid=0, wrap=["prlimit", "-n96:96"]):
        for _ in range(2):
            opened: list[int] = []
            errors = set()
            try:
                for number in range(500):
                    try:
                        opened.append(os.open(target / str(number % 100), os.O_RDONLY))
                    except OSError as error:
                        errors.add(error.errno)
                assert errors == {errno.ENFILE}
                assert len(opened) >= 30
                for number, fd in enumerate(opened):
                    assert os.pread(fd, 10, 0) == b"%d" % number
            finally:
                for fd in opened:
                    os.close(fd)
            for number in range(100):
                assert (target / str(number)).read_bytes() == b"%d" % number


def test_requests_shorter_and_longer_than_they_say_are_answered_or_dropped(rig: Rig) -> None:
    fill(rig.served)
    kernel = rig.client()
    kernel.lookup(1, b"file")
    for op in TABLE:
        if op.name in LIFE:
            continue
        whole = request(op.code, 1, plain_body(op.name, *[0] * len(widths(op.name))))
        for length in range(0, len(whole), 3):
            reply = kernel.session.handle(memoryview(whole[:length]))
            assert reply is None or isinstance(reply, list)
        kernel.session.handle(memoryview(whole + b"\0" * 100))
    assert kernel.read_file(b"file")


@pytest.mark.parametrize("budget", [512, 40])
def test_no_descriptor_waits_for_the_garbage_collector(rig: Rig, budget: int) -> None:
    """A lock that nobody has any more, a file that was removed: they end when the client says so, not at some time."""
    fill(rig.served)
    kernel = rig.client(fd_budget=budget)
    gc.collect()
    gc.disable()
    try:
        file, directory = kernel.lookup(1, b"file").nodeid, kernel.lookup(1, b"directory").nodeid
        before = None
        for owner in range(1, 60):
            for failing in (
                lambda: kernel.lookup(file, b"name"),
                lambda: kernel.open(directory),
                lambda: kernel.unlink(file, b"name"),
                lambda: kernel.rename(1, b"file", file, b"name"),
                lambda: kernel.rename(1, b"directory", 1, b"file"),
                lambda: kernel.rmdir(1, b"file"),
                lambda: kernel.create(1, b"file", os.O_RDWR | os.O_EXCL),
                lambda: kernel.create(file, b"file", os.O_RDWR),
                lambda: kernel.tmpfile(file),
                lambda: kernel.getxattr(file, b"user.none"),
                lambda: kernel.readlink(file),
                lambda: kernel.link(file, file, b"name"),
                lambda: kernel.setattr(directory, abi.FATTR_SIZE, size=1),
            ):
                with may_fail():
                    failing()
            fh, _ = kernel.open(file, os.O_RDWR)
            lock = Lock(0, 10, fcntl.F_WRLCK, 1)
            kernel.setlk(file, fh, owner, lock)
            late = kernel.start(abi.FUSE_SETLKW, file, body_of("setlkw", fh, 1000 + owner, *lock, 0))
            given_up = kernel.start(abi.FUSE_SETLKW, file, body_of("setlkw", fh, 2000 + owner, *lock, 0))
            kernel.interrupt(given_up)
            with may_fail(errno.EINTR):
                kernel.finish(given_up)
            kernel.flush(file, fh, owner)
            kernel.finish(late)
            kernel.release(file, fh)
            if owner == 10:
                before = set(os.listdir("/proc/self/fd"))
        # The thread that tries for locks has the last attempt in its frame until it has ended.
        in_time(lambda: wait_for(lambda: "fuse-locks" not in {thread.name for thread in threading.enumerate()}))
        assert before is not None
        assert len(os.listdir("/proc/self/fd")) <= len(before)
    finally:
        gc.enable()


def wait_for(condition: Callable[[], bool]) -> None:
    """Come back when it is true."""
    while not condition():
        os.sched_yield()


def test_only_files_whose_close_has_nothing_to_tell_are_closed_without_flush(rig: Rig) -> None:
    fill(rig.served)
    how = {"reader": os.O_RDONLY, "writer": os.O_WRONLY, "both": os.O_RDWR}

    def unflushed(**options: Any) -> set[str]:
        kernel = rig.client(**options)
        file = kernel.lookup(1, b"file").nodeid
        return {name for name, flags in how.items() if kernel.open(file, flags)[1] & abi.FOPEN_NOFLUSH}

    # What flush ends are the POSIX locks of a process.
    assert unflushed() == set()
    assert unflushed(posix_lock=False, writeback=True) == set()
    kind = subprocess.run(["stat", "-f", "-c", "%t", rig.served], capture_output=True, text=True, check=True).stdout
    silent = int(kind, 16) in (0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994)
    assert unflushed(posix_lock=False) == (set(how) if silent else {"reader"})
