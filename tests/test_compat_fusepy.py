"""fusepy's interface: how a program's methods are called, and what their answers mean to the kernel.

Most of it without a mount: FakeKernel drives the session of a program's class. The rest are programs of a user who may
do nothing, mounted for real; that published programs run is shown by test_compat_programs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import fusewire.compat
from compat_programs import Program, as_user, user_directory
from fusewire.compat import bridge, fusepy, mfusepy, options
from fusewire.compat.paths import PathTable
from fusewire.ops import Lock
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.wire import abi

BOTH = pytest.mark.parametrize("fuse", [fusepy, mfusepy], ids=["fusepy", "mfusepy"])


def tree(fuse: types.ModuleType) -> type:
    """A filesystem in memory, written as one would for fusepy; every call is noted in `calls`."""

    class Tree(fuse.Operations):  # type: ignore[misc, name-defined]
        use_ns = True

        def __init__(self) -> None:
            self.calls: list[tuple[Any, ...]] = []
            self.files: dict[str, Any] = {"/": None}
            self.modes = {"/": stat.S_IFDIR | 0o755}
            self.times: dict[str, tuple[int, int]] = {}
            self.handles: dict[int, str] = {}

        def _note(self, *call: Any) -> None:
            self.calls.append(call)

        def getattr(self, path, fh=None):
            self._note("getattr", path, fh)
            if path not in self.files:
                raise fuse.FuseOSError(errno.ENOENT)
            atime, mtime = self.times.get(path, (0, 0))
            size = len(self.files[path] or b"")
            return {"st_mode": self.modes[path], "st_size": size, "st_atime": atime, "st_mtime": mtime, "st_uid": 7}

        def _make(self, path, mode, content):
            self.files[path], self.modes[path] = content, mode

        def create(self, path, mode, fi=None):
            self._note("create", path, mode, fi)
            self._make(path, mode, b"")
            return self.open(path, os.O_RDWR)

        def open(self, path, flags):
            self._note("open", path, flags)
            self.handles[len(self.handles) + 5] = path
            return len(self.handles) + 4

        def read(self, path, size, offset, fh):
            self._note("read", path, size, offset, fh)
            return self.files[path][offset : offset + size]

        def write(self, path, data, offset, fh):
            self._note("write", path, data, offset, fh)
            old = self.files[path]
            self.files[path] = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]
            return len(data)

        def truncate(self, path, length, fh=None):
            self._note("truncate", path, length, fh)
            self.files[path] = self.files[path][:length].ljust(length, b"\0")

        def release(self, path, fh):
            self._note("release", path, fh)

        def mkdir(self, path, mode):
            self._make(path, stat.S_IFDIR | mode, None)

        def mknod(self, path, mode, dev):
            self._note("mknod", path, mode, dev)
            self._make(path, mode, b"")

        def symlink(self, target, source):
            self._make(target, stat.S_IFLNK | 0o777, source.encode())

        def readlink(self, path):
            return self.files[path].decode()

        def link(self, target, source):
            self._note("link", target, source)
            self.files[target], self.modes[target] = self.files[source], self.modes[source]

        def unlink(self, path):
            self._note("unlink", path)
            del self.files[path]

        rmdir = unlink

        def rename(self, old, new):
            self._note("rename", old, new)
            for path in [p for p in self.files if p == old or p.startswith(old + "/")]:
                self.files[new + path[len(old) :]] = self.files.pop(path)
                self.modes[new + path[len(old) :]] = self.modes[path]

        def readdir(self, path, fh):
            prefix = path.rstrip("/") + "/"
            inside = [p[len(prefix) :] for p in self.files if p.startswith(prefix) and p != "/"]
            return [".", "..", *[name for name in inside if "/" not in name]]

        def chmod(self, path, mode):
            self.modes[path] = mode

        def chown(self, path, uid, gid):
            self._note("chown", path, uid, gid)

        def utimens(self, path, times=None):
            self._note("utimens", path, times)
            self.times[path] = times

    return Tree


def kernel_of(
    operations: Any, fuse: types.ModuleType = fusepy, *, raw_fi: bool = False, owner: Any = None, **kwargs: Any
) -> FakeKernel:
    """A kernel that has what `FUSE(operations, ..., **kwargs)` would serve."""
    made = bridge.bridge(
        fuse.FUSE._calls(operations),
        options.parse("test", kwargs),
        raw_fi=raw_fi,
        encoding="utf-8",
        errors="surrogateescape",
        use_ns=bool(getattr(operations, "use_ns", False)),
        nullpath=bool(getattr(operations, "flag_nullpath_ok", False)),
    )
    made.owner = owner
    kernel = FakeKernel(Session(made))
    kernel.init()
    return kernel


def fails(number: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args, **kwargs)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


# --- files and names


@BOTH
def test_a_file_is_made_written_read_and_removed(fuse: types.ModuleType) -> None:
    program = tree(fuse)()
    kernel = kernel_of(program, fuse)
    entry, fh, _ = kernel.create(1, b"file", mode=stat.S_IFREG | 0o640)
    assert fh == 5
    assert kernel.write(entry.nodeid, fh, 0, b"hello") == 5
    assert kernel.read(entry.nodeid, fh, 1, 3) == b"ell"
    assert kernel.getattr(entry.nodeid)[0][1] == 5
    assert ("getattr", "/file", 5) in program.calls  # after create, by the handle
    kernel.release(entry.nodeid, fh)
    assert program.calls[-1] == ("release", "/file", 5)
    kernel.unlink(1, b"file")
    fails(errno.ENOENT, kernel.lookup, 1, b"file")


@BOTH
def test_names_in_directories_are_paths_from_the_root(fuse: types.ModuleType) -> None:
    program = tree(fuse)()
    kernel = kernel_of(program, fuse)
    outer = kernel.mkdir(1, b"outer")
    inner = kernel.mkdir(outer.nodeid, b"inner")
    kernel.mknod(inner.nodeid, b"file", stat.S_IFIFO | 0o600)
    kernel.symlink(1, b"link", b"outer/inner")
    assert list(program.files) == ["/", "/outer", "/outer/inner", "/outer/inner/file", "/link"]
    assert [item.name for item in kernel.listdir(1)] == [b".", b"..", b"outer", b"link"]
    assert kernel.readlink(kernel.lookup(1, b"link").nodeid) == b"outer/inner"
    assert [path for path, _ in kernel.walk()] == [b"outer", b"outer/inner", b"outer/inner/file", b"link"]


def test_names_that_are_no_text_come_back_as_they_were() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    kernel.mkdir(1, b"\xff\xfe")
    assert list(program.files)[1] == "/\udcff\udcfe"
    assert kernel.listdir(1)[-1].name == b"\xff\xfe"


def test_a_renamed_directory_takes_all_below_it_along() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    old = kernel.mkdir(1, b"old")
    below = kernel.mkdir(old.nodeid, b"below")
    file, fh, _ = kernel.create(below.nodeid, b"file")
    place = kernel.mkdir(1, b"place")
    kernel.rename(1, b"old", place.nodeid, b"new")
    kernel.write(file.nodeid, fh, 0, b"x")
    assert program.calls[-1] == ("write", "/place/new/below/file", b"x", 0, fh)
    assert kernel.resolve(b"place/new/below/file").nodeid == file.nodeid
    fails(errno.ENOENT, kernel.lookup, 1, b"old")


def test_a_rename_with_flags_is_refused_as_one_without_is_all_there_is() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    kernel.mkdir(1, b"a")
    fails(errno.EINVAL, kernel.rename, 1, b"a", 1, b"b", 1)
    assert "/a" in program.files


def test_link_is_called_with_the_new_name_first() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    entry, _, _ = kernel.create(1, b"a")
    kernel.link(entry.nodeid, 1, b"b")
    assert ("link", "/b", "/a") in program.calls


def test_a_regular_file_of_mknod_is_created_and_closed() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    kernel.mknod(1, b"file", stat.S_IFREG | 0o644)
    made = [call[0] for call in program.calls]
    assert "create" in made
    assert made[-1] == "release"
    assert "mknod" not in made


def test_mknod_makes_the_file_where_create_is_not_there_after_all() -> None:
    class Older(tree(fusepy)):  # type: ignore[misc]
        def create(self, path, mode, fi=None):
            raise fusepy.FuseOSError(errno.ENOSYS)

    program = Older()
    kernel_of(program).mknod(1, b"file", stat.S_IFREG | 0o644)
    assert ("mknod", "/file", stat.S_IFREG | 0o644, 0) in program.calls


# --- many threads


def in_thread(call: Callable[..., Any], *args: Any) -> Future[Any]:
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(call(*args))
        except OSError as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


class Slow(tree(fusepy)):  # type: ignore[misc]
    """Stops in one method of one path, until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = ("", "")
        self.stopped, self.go_on = threading.Event(), threading.Event()

    def __call__(self, op, path, *args):
        if (op, path) == self.stop:
            self.stop = ("", "")
            self.stopped.set()
            assert self.go_on.wait(30)
            self._note("went on", path)
        return getattr(self, op)(path, *args)


def test_a_directory_is_renamed_when_nobody_uses_a_path_below_it_any_more() -> None:
    program = Slow()
    kernel = kernel_of(program)
    directory = kernel.mkdir(1, b"old")
    entry, fh, _ = kernel.create(directory.nodeid, b"file")
    aside, other, _ = kernel.create(1, b"aside")
    paths = kernel.session.operations._paths  # type: ignore[attr-defined]
    program.stop = ("write", "/old/file")
    written = in_thread(kernel.write, entry.nodeid, fh, 0, b"first")
    assert program.stopped.wait(30)
    renamed = in_thread(kernel.rename, 1, b"old", 1, b"new")
    while not paths.in_move:
        os.sched_yield()
    late = in_thread(kernel.write, entry.nodeid, fh, 5, b"second")
    assert kernel.write(aside.nodeid, other, 0, b"others go on") == 12
    assert not renamed.done()
    assert not late.done()
    program.go_on.set()
    assert written.result(30) == 5
    renamed.result(30)
    assert late.result(30) == 6
    calls = [call[:3] for call in program.calls if call[0] in ("write", "rename", "went on")]
    assert calls == [
        ("write", "/aside", b"others go on"),
        ("went on", "/old/file"),
        ("write", "/old/file", b"first"),
        ("rename", "/old", "/new"),
        ("write", "/new/file", b"second"),
    ]
    assert not paths.users
    assert not paths.in_move


def test_an_open_file_is_hidden_when_nobody_writes_to_it_any_more() -> None:
    program = Slow()
    kernel = kernel_of(program)
    entry, fh, _ = kernel.create(1, b"file")
    program.stop = ("write", "/file")
    written = in_thread(kernel.write, entry.nodeid, fh, 0, b"kept")
    assert program.stopped.wait(30)
    removed = in_thread(kernel.unlink, 1, b"file")
    while not kernel.session.operations._paths.in_move:  # type: ignore[attr-defined]
        os.sched_yield()
    program.go_on.set()
    assert written.result(30) == 4
    removed.result(30)
    assert kernel.read(entry.nodeid, fh, 0, 9) == b"kept"


def test_a_file_that_is_being_opened_while_it_is_removed_is_hidden() -> None:
    program = Slow()
    kernel = kernel_of(program)
    entry = kernel.mknod(1, b"file", stat.S_IFREG | 0o600)
    program.stop = ("open", "/file")
    opened = in_thread(kernel.open, entry.nodeid)
    assert program.stopped.wait(30)
    removed = in_thread(kernel.unlink, 1, b"file")
    while not kernel.session.operations._paths.in_move:  # type: ignore[attr-defined]
        os.sched_yield()
    program.go_on.set()
    fh, _ = opened.result(30)
    removed.result(30)
    assert kernel.write(entry.nodeid, fh, 0, b"kept") == 4
    kernel.release(entry.nodeid, fh)
    assert list(program.files) == ["/"]


def test_a_file_that_is_closed_while_it_is_removed_is_not_hidden_for_ever() -> None:
    program = Slow()
    kernel = kernel_of(program)
    entry, fh, _ = kernel.create(1, b"file")
    program.stop = ("release", "/file")
    closed = in_thread(kernel.release, entry.nodeid, fh)
    assert program.stopped.wait(30)
    removed = in_thread(kernel.unlink, 1, b"file")
    while not kernel.session.operations._paths.in_move:  # type: ignore[attr-defined]
        os.sched_yield()
    program.go_on.set()
    closed.result(30)
    removed.result(30)
    assert list(program.files) == ["/"]


# --- files that are removed while they are open


def test_an_open_file_that_is_removed_is_hidden_until_it_is_closed() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"kept")
    kernel.unlink(1, b"file")
    fails(errno.ENOENT, kernel.lookup, 1, b"file")
    hidden = [path for path in program.files if path.startswith("/.fuse_hidden")]
    assert len(hidden) == 1
    assert kernel.read(entry.nodeid, fh, 0, 9) == b"kept"
    assert kernel.getattr(entry.nodeid, fh)[0][10] == 0
    kernel.release(entry.nodeid, fh)
    assert list(program.files) == ["/"]


def test_an_open_file_that_is_replaced_is_hidden_too() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    old, fh, _ = kernel.create(1, b"file")
    kernel.write(old.nodeid, fh, 0, b"old")
    new, other, _ = kernel.create(1, b"new")
    kernel.release(new.nodeid, other)
    kernel.rename(1, b"new", 1, b"file")
    assert kernel.read(old.nodeid, fh, 0, 9) == b"old"
    assert kernel.lookup(1, b"file").nodeid == new.nodeid
    kernel.release(old.nodeid, fh)
    assert list(program.files) == ["/", "/file"]


def test_hard_remove_removes_at_once_and_calls_with_the_old_path() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program, hard_remove=True)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.unlink(1, b"file")
    assert list(program.files) == ["/"]
    kernel.release(entry.nodeid, fh)
    assert program.calls[-1] == ("release", "/file", fh)


def test_a_program_that_wants_no_path_of_a_removed_file_gets_none() -> None:
    class Nameless(tree(fusepy)):  # type: ignore[misc]
        flag_nullpath_ok = True

    program = Nameless()
    kernel = kernel_of(program, hard_remove=True)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.unlink(1, b"file")
    kernel.release(entry.nodeid, fh)
    assert program.calls[-1] == ("release", None, fh)


def test_a_program_that_cannot_rename_has_open_files_removed_at_once() -> None:
    class Fixed(fusepy.Operations):
        there = True

        def getattr(self, path, fh=None):
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755}
            if not self.there:
                raise fusepy.FuseOSError(errno.ENOENT)
            return {"st_mode": stat.S_IFREG | 0o644}

        def unlink(self, path):
            self.there = False

    kernel = kernel_of(Fixed())
    entry = kernel.lookup(1, b"file")
    fh, _ = kernel.open(entry.nodeid)
    kernel.unlink(1, b"file")
    fails(errno.ENOENT, kernel.lookup, 1, b"file")
    kernel.release(entry.nodeid, fh)


# --- attributes


def test_times_are_seconds_or_nanoseconds_as_the_program_wants() -> None:
    whole = 1_600_000_000
    for use_ns, value, nanoseconds in ((True, whole * 10**9 + 5, 5), (False, whole + 0.5, 500_000_000)):
        program = tree(fusepy)()
        program.use_ns = use_ns
        kernel = kernel_of(program)
        program.times["/"] = (value, value)
        attr = kernel.getattr(1)[0]
        assert (attr[3], attr[6], attr[4], attr[7]) == (whole, nanoseconds, whole, nanoseconds)
        kernel.setattr(1, abi.FATTR_ATIME | abi.FATTR_MTIME, atime=whole, mtime=whole, mtimensec=nanoseconds)
        later = whole * 10**9 + nanoseconds if use_ns else whole + 0.5
        assert program.times["/"] == (whole * 10**9 if use_ns else whole, later)


def test_times_before_1970_go_both_ways() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    attr, _ = kernel.setattr(
        1, abi.FATTR_ATIME | abi.FATTR_MTIME, atime=(1 << 64) - 2, atimensec=5, mtime=(1 << 64) - 1
    )
    assert program.times["/"] == (-2 * 10**9 + 5, -(10**9))
    assert (attr[3], attr[6]) == ((1 << 64) - 2, 5)


def test_a_time_that_stays_as_it_is_comes_from_the_program() -> None:
    program = tree(fusepy)()
    program.times["/"] = (11, 22)
    kernel = kernel_of(program)
    kernel.setattr(1, abi.FATTR_MTIME, mtime=3)
    assert program.times["/"] == (11, 3 * 10**9)


def test_chown_leaves_the_other_id_alone() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    kernel.setattr(1, abi.FATTR_GID, gid=4)
    assert ("chown", "/", -1, 4) in program.calls


def test_truncate_has_a_handle_only_where_there_is_one() -> None:
    class Truncated(tree(fusepy)):  # type: ignore[misc]
        def truncate(self, path, length, *rest):
            self._note("truncate", path, length, *rest)

    program = Truncated()
    kernel = kernel_of(program)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.setattr(entry.nodeid, abi.FATTR_SIZE, size=3)
    kernel.setattr(entry.nodeid, abi.FATTR_SIZE | abi.FATTR_FH, size=4, fh=fh)
    assert [call for call in program.calls if call[0] == "truncate"] == [
        ("truncate", "/file", 3),
        ("truncate", "/file", 4, fh),
    ]


def test_ids_numbers_and_modes_follow_the_options() -> None:
    program = tree(fusepy)()
    attr = kernel_of(program).getattr(1)[0]
    assert (attr[0], attr[9], attr[11]) == (1, stat.S_IFDIR | 0o755, 7)
    attr = kernel_of(program, uid=1, gid="2", umask="027").getattr(1)[0]
    assert (attr[9], attr[11], attr[12]) == (stat.S_IFDIR | 0o750, 1, 2)
    assert kernel_of(program, owner=(65534, 65533)).getattr(1)[0][11:13] == (65534, 65533)

    class Numbered(fusepy.Operations):
        def getattr(self, path, fh=None):
            return {"st_mode": stat.S_IFDIR | 0o755, "st_ino": 99}

    assert kernel_of(Numbered(), use_ino=True).getattr(1)[0][0] == 99
    assert kernel_of(Numbered()).getattr(1)[0][0] == 1


def test_timeouts_follow_the_options() -> None:
    kernel = kernel_of(tree(fusepy)())
    kernel.mkdir(1, b"d")
    assert (kernel.lookup(1, b"d").entry_timeout, kernel.getattr(1)[1]) == (1.0, 1.0)
    fails(errno.ENOENT, kernel.lookup, 1, b"nope")
    kernel = kernel_of(tree(fusepy)(), entry_timeout=5, attr_timeout=0, negative_timeout=2)
    kernel.mkdir(1, b"d")
    assert (kernel.lookup(1, b"d").entry_timeout, kernel.getattr(1)[1]) == (5.0, 0.0)
    assert kernel.lookup(1, b"nope")[:1] == (0,)


# --- what answers and exceptions mean


class Failing(fusepy.Operations):
    """Fails as `how` says."""

    how: Any = None

    def getattr(self, path, fh=None):
        return {"st_mode": stat.S_IFDIR | 0o755}

    def mkdir(self, path, mode):
        if isinstance(self.how, BaseException):
            raise self.how
        return self.how


@pytest.mark.parametrize(
    ("how", "number"),
    [
        (fusepy.FuseOSError(errno.ENOSPC), errno.ENOSPC),
        (OSError(errno.EDQUOT, "full"), errno.EDQUOT),
        (FileNotFoundError(), errno.ENOENT),  # where fusepy gives up the mount
        (OSError(-5, "odd"), errno.EINVAL),
        (ValueError("nonsense"), errno.EINVAL),
        (NotImplementedError(), errno.EINVAL),
        (-errno.EXDEV, errno.EXDEV),
    ],
)
def test_failures_are_errnos(how: Any, number: int) -> None:
    program = Failing()
    program.how = how
    fails(number, kernel_of(program).mkdir, 1, b"d")


@pytest.mark.parametrize("how", [None, 0, True, 17, "text"])
def test_any_other_answer_is_success(how: Any) -> None:
    program = Failing()
    program.how = how
    kernel_of(program).mkdir(1, b"d")


def test_what_is_no_oserror_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    program = Failing()
    program.how = ValueError("nonsense")
    kernel = kernel_of(program)
    for _ in range(2):
        fails(errno.EINVAL, kernel.mkdir, 1, b"d")
    assert [(record.name, record.levelname) for record in caplog.records] == [("fuse", "ERROR")] * 2
    assert "in mkdir" in caplog.text
    assert "ValueError: nonsense" in caplog.text


def test_what_is_no_exception_ends_the_mount() -> None:
    program = Failing()
    program.how = SystemExit(3)
    kernel = kernel_of(program)
    filesystem = kernel.session.operations
    assert isinstance(filesystem, bridge.Bridge)
    ended: list[bool] = []
    filesystem.on_critical = lambda: ended.append(True)
    fails(errno.EFAULT, kernel.mkdir, 1, b"d")
    assert ended == [True]
    assert isinstance(filesystem.critical, SystemExit)


def test_attributes_that_are_none_are_an_error_and_no_lookup() -> None:
    class Odd(fusepy.Operations):
        def getattr(self, path, fh=None):
            return {"st_mode": stat.S_IFDIR | 0o755} if path == "/" else None

    kernel = kernel_of(Odd())
    fails(errno.EINVAL, kernel.lookup, 1, b"x")
    assert kernel.lookups == {}


def test_reading_more_than_was_asked_for_is_an_error() -> None:
    class Generous(tree(fusepy)):  # type: ignore[misc]
        def read(self, path, size, offset, fh):
            return bytes(size + 1)

    kernel = kernel_of(Generous())
    entry, fh, _ = kernel.create(1, b"file")
    fails(errno.EINVAL, kernel.read, entry.nodeid, fh, 0, 10)


def test_a_program_may_go_on_using_the_buffer_that_it_gave() -> None:
    class Reused(tree(fusepy)):  # type: ignore[misc]
        buffer = bytearray(b"first")

        def read(self, path, size, offset, fh):
            return self.buffer

    program = Reused()
    kernel = kernel_of(program)
    entry, fh, _ = kernel.create(1, b"file")
    filesystem = kernel.session.operations
    first = filesystem.read(entry.nodeid, fh, 0, 10, 0, 0, 0)
    program.buffer[:] = b"longer than before"
    assert bytes(first) == b"first"


@pytest.mark.parametrize("data", [bytearray(b"abc"), memoryview(b"abc"), b"abc", None, b""])
def test_a_read_may_give_any_buffer_or_nothing(data: Any) -> None:
    class Buffers(tree(fusepy)):  # type: ignore[misc]
        def read(self, path, size, offset, fh):
            return data

    kernel = kernel_of(Buffers())
    entry, fh, _ = kernel.create(1, b"file")
    assert kernel.read(entry.nodeid, fh, 0, 10) == bytes(data or b"")


# --- what a class offers


def test_what_fusepy_refuses_by_itself_is_refused_so() -> None:
    kernel = kernel_of(fusepy.Operations())
    for call in (
        lambda: kernel.mkdir(1, b"d"),
        lambda: kernel.unlink(1, b"d"),
        lambda: kernel.symlink(1, b"l", b"t"),
        lambda: kernel.create(1, b"f"),
        lambda: kernel.setattr(1, abi.FATTR_MODE, mode=0o755),
    ):
        fails(errno.EROFS, call)
    assert [item.name for item in kernel.listdir(1)] == [b".", b".."]
    assert kernel.listxattr(1) == []


def test_the_kernel_is_told_not_to_ask_for_what_a_class_has_not() -> None:
    kernel = kernel_of(fusepy.Operations())
    for call in (lambda: kernel.access(1, 4), lambda: kernel.flush(1, 0), lambda: kernel.getxattr(1, b"user.x")):
        fails(errno.ENOSYS, call)
    kernel = kernel_of(mfusepy.Operations(), mfusepy)
    for call in (lambda: kernel.mkdir(1, b"d"), lambda: kernel.setattr(1, abi.FATTR_MODE, mode=0)):
        fails(errno.ENOSYS, call)


def test_a_class_that_is_no_operations_has_what_it_has() -> None:
    class Plain:
        def __call__(self, op, *args):
            return getattr(self, op)(*args)

        def getattr(self, path, fh=None):
            return {"st_mode": stat.S_IFDIR | 0o755}

    kernel = kernel_of(Plain())
    kernel.getattr(1)
    fails(errno.ENOSYS, kernel.mkdir, 1, b"d")
    fh, _ = kernel.opendir(1)
    fails(errno.ENOSYS, kernel.readdir, 1, fh)


def test_all_calls_go_through_the_object_itself_with_fusepy() -> None:
    class Watched(Failing):
        seen: list[Any] = []

        def __call__(self, op, *args):
            self.seen.append((op, *args))
            return super().__call__(op, *args)

    kernel = kernel_of(Watched())
    kernel.mkdir(1, b"d")
    kernel.access(1, 4)
    assert Watched.seen == [("init", "/"), ("mkdir", "/d", 0o755), ("getattr", "/d", None), ("access", "/", 4)]


@BOTH
def test_logging_shows_calls_and_what_came_of_them(fuse: types.ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    class Logged(fuse.LoggingMixIn, tree(fuse)):  # type: ignore[misc, name-defined]
        pass

    caplog.set_level(logging.DEBUG, "fuse.log-mixin")
    kernel = kernel_of(Logged(), fuse)
    fails(errno.ENOENT, kernel.lookup, 1, b"nope")
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"data")
    said = [record.getMessage() for record in caplog.records if record.name == "fuse.log-mixin"]
    assert any(line.startswith("-> getattr") and "/nope" in line for line in said)
    assert any(line.startswith("<- getattr") and "No such file" in line for line in said)
    assert said[-2:] == (
        [f"-> write /file (b'data', 0, {fh})", "<- write 4"]
        if fuse is fusepy
        else [f"-> write ('/file', b'data', 0, {fh})", "<- write 4"]
    )


def test_the_ends_are_called_with_the_root() -> None:
    class Lived(fusepy.Operations):
        ends: list[Any] = []

        def init(self, path):
            self.ends.append(("init", path))

        def destroy(self, path):
            self.ends.append(("destroy", path))
            raise ValueError("nobody hears")

    kernel = kernel_of(Lived())
    kernel.session.close()
    assert Lived.ends == [("init", "/"), ("destroy", "/")]


def test_what_destroy_raises_to_end_the_program_comes_out_of_fuse() -> None:
    class Ends(fusepy.Operations):
        def destroy(self, path):
            raise SystemExit(4)

    kernel = kernel_of(Ends())
    kernel.session.close()
    assert isinstance(kernel.session.operations.critical, SystemExit)  # type: ignore[attr-defined]


def test_names_of_c_types_can_be_imported_too() -> None:
    assert fusepy.c_mode_t is fusepy.c_uid_t
    assert mfusepy.ENOATTR == errno.ENODATA
    for name in (
        "c_byte_p",
        "c_uint64_p",
        "c_stat_p",
        "fuse_fi_p",
        "fuse_bufvec_pp",
        "FuseConfigPointer",
        "c_off_t",
        "c_flock_t",
        "fuse_buf",
    ):
        assert hasattr(mfusepy, name)
    assert mfusepy.fuse_config().show_help == 0


def test_errno_names_can_be_imported_from_the_module() -> None:
    from fusewire.compat.fusepy import EISDIR  # type: ignore[attr-defined]

    assert errno.EISDIR == EISDIR
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fusepy.nonsense


# --- mfusepy's own


def test_create_gets_the_flags_if_it_takes_them() -> None:
    class Two(tree(mfusepy)):  # type: ignore[misc]
        def create(self, path, mode):
            return super().create(path, mode)

    for kind, last in ((tree(mfusepy), os.O_RDWR), (Two, None)):
        program = kind()
        kernel_of(program, mfusepy).create(1, b"file", flags=os.O_RDWR)
        assert ("create", "/file", stat.S_IFREG | 0o644, last) in program.calls


def test_truncate_of_mfusepy_may_have_no_place_for_a_handle() -> None:
    class Short(tree(mfusepy)):  # type: ignore[misc]
        def truncate(self, path, length):
            super().truncate(path, length)

    for kind, has_it in ((Short, False), (tree(mfusepy), True)):
        program = kind()
        kernel = kernel_of(program, mfusepy)
        entry, fh, _ = kernel.create(1, b"file")
        kernel.setattr(entry.nodeid, abi.FATTR_SIZE | abi.FATTR_FH, size=4, fh=fh)
        assert ("truncate", "/file", 4, fh if has_it else None) in program.calls


def test_lock_of_mfusepy_has_a_pointer() -> None:
    class Locks(tree(mfusepy)):  # type: ignore[misc]
        def lock(self, path, fh, cmd, lock):
            self._note("lock", cmd, lock.contents.l_type, lock.contents.l_start)
            lock.contents.l_type = fcntl.F_UNLCK

    program = Locks()
    kernel = kernel_of(program, mfusepy)
    entry, fh, _ = kernel.create(1, b"file")
    assert kernel.getlk(entry.nodeid, fh, 9, Lock(5, 9, fcntl.F_WRLCK, 1)).type == fcntl.F_UNLCK
    assert program.calls[-1] == ("lock", fcntl.F_GETLK, fcntl.F_WRLCK, 5)


def test_init_with_config_sees_and_changes_the_options() -> None:
    class Configured(mfusepy.Operations):
        def init_with_config(self, conn_info, config_3):
            self.seen = conn_info.proto_minor, config_3.attr_timeout
            config_3.attr_timeout = 30
            config_3.use_ino = True

        def getattr(self, path, fh=None):
            return {"st_mode": stat.S_IFDIR | 0o755, "st_ino": 44}

    program = Configured()
    kernel = kernel_of(program, mfusepy)
    attr, timeout = kernel.getattr(1)
    assert (attr[0], timeout) == (44, 30.0)
    assert program.seen == (kernel.session.minor, 1.0)


def test_a_listing_by_offsets_is_asked_for_again_where_it_stopped() -> None:
    class Long(mfusepy.Operations):
        asked: list[int] = []

        def readdir_with_offset(self, path, offset, fh):
            self.asked.append(offset)
            for number in range(offset, 300):
                yield f"name-{number:04}", stat.S_IFREG, number + 1

    program = Long()
    kernel = kernel_of(program, mfusepy)
    found = kernel.listdir(1)
    assert [item.name for item in found] == [b"name-%04d" % number for number in range(300)]
    assert len(program.asked) > 2


def test_flock_and_fallocate_reach_the_program() -> None:
    class More(tree(mfusepy)):  # type: ignore[misc]
        def flock(self, path, fh, op):
            self._note("flock", path, fh, op)
            if op & fcntl.LOCK_SH:
                raise mfusepy.FuseOSError(errno.EWOULDBLOCK)

        def fallocate(self, path, mode, offset, size, fh):
            self._note("fallocate", path, mode, offset, size, fh)

    program = More()
    kernel = kernel_of(program, mfusepy)
    assert kernel.session.flags & abi.FUSE_FLOCK_LOCKS
    assert not kernel.session.flags & abi.FUSE_POSIX_LOCKS
    entry, fh, _ = kernel.create(1, b"file")
    everything = Lock(0, (1 << 63) - 1, fcntl.F_WRLCK, 1)
    kernel.setlk(entry.nodeid, fh, 9, everything, lk_flags=abi.FUSE_LK_FLOCK)
    kernel.setlk(entry.nodeid, fh, 9, everything, lk_flags=abi.FUSE_LK_FLOCK, wait=True)
    shared = everything._replace(type=fcntl.F_RDLCK)
    fails(errno.EWOULDBLOCK, kernel.setlk, entry.nodeid, fh, 9, shared, lk_flags=abi.FUSE_LK_FLOCK, wait=True)
    kernel.fallocate(entry.nodeid, fh, 1, 2, 3)
    assert [call[2:] for call in program.calls if call[0] == "flock"] == [
        (fh, fcntl.LOCK_EX | fcntl.LOCK_NB),
        (fh, fcntl.LOCK_EX),
        (fh, fcntl.LOCK_SH),
    ]
    assert program.calls[-1] == ("fallocate", "/file", 3, 1, 2, fh)


def test_overrides_finds_methods_that_override_nothing() -> None:
    with pytest.raises(TypeError, match="raed"):

        class Mistyped(mfusepy.Operations):
            @mfusepy.overrides(mfusepy.Operations)
            def raed(self, path, size, offset, fh):
                return b""


# --- handles, listings, extended attributes, locks, ioctl


def test_raw_fi_gives_the_program_an_object_in_the_place_of_a_handle() -> None:
    class Raw(fusepy.Operations):
        seen: list[Any] = []

        def getattr(self, path, fh=None):
            self.seen.append(fh)
            return {"st_mode": (stat.S_IFDIR if path == "/" else stat.S_IFREG) | 0o755}

        def open(self, path, fi):
            fi.fh, fi.direct_io, fi.nonseekable = 77, 1, 1
            assert fi.flags & os.O_ACCMODE == os.O_WRONLY
            return 0

        create = None

        def write(self, path, data, offset, fi):
            self.seen.append((fi.fh, fi.direct_io))
            return len(data)

        def release(self, path, fi):
            self.seen.append(("release", fi.fh))

    program = Raw()
    kernel = kernel_of(program, raw_fi=True)
    entry = kernel.lookup(1, b"file")
    handles = [kernel.open(entry.nodeid, os.O_WRONLY) for _ in range(2)]
    assert handles[0][0] != handles[1][0]
    assert handles[0][1] == abi.FOPEN_DIRECT_IO | abi.FOPEN_NONSEEKABLE
    assert kernel.write(entry.nodeid, handles[0][0], 0, b"abc") == 3
    assert program.seen[-1] == (77, 1)
    kernel.getattr(entry.nodeid, handles[1][0])
    assert program.seen[-1].fh == 77
    kernel.release(entry.nodeid, handles[0][0])
    assert program.seen[-1] == ("release", 77)


def test_caches_follow_the_options() -> None:
    for given, flags in (({}, 0), ({"kernel_cache": True}, abi.FOPEN_KEEP_CACHE), ({"direct_io": True}, 1)):
        kernel = kernel_of(tree(fusepy)(), **given)
        assert kernel.create(1, b"file")[2] == flags
    program = tree(fusepy)()
    kernel = kernel_of(program, auto_cache=True)
    entry, _, first = kernel.create(1, b"file")
    assert (first, kernel.open(entry.nodeid)[1]) == (0, abi.FOPEN_KEEP_CACHE)
    program.files["/file"] = b"longer"
    assert kernel.open(entry.nodeid)[1] == 0


def test_a_file_is_open_even_if_its_time_cannot_be_had_for_the_cache() -> None:
    class Closed(tree(fusepy)):  # type: ignore[misc]
        def getattr(self, path, fh=None):
            if self.handles and fh == max(self.handles):
                raise fusepy.FuseOSError(errno.EACCES)
            return super().getattr(path, fh)

    program = Closed()
    kernel = kernel_of(program, auto_cache=True)
    kernel.mknod(1, b"file", stat.S_IFIFO | 0o600)
    entry = kernel.lookup(1, b"file")
    assert kernel.open(entry.nodeid) == (5, 0)


def test_o_trunc_is_left_to_truncate_unless_the_program_asks_for_it() -> None:
    assert not kernel_of(tree(fusepy)()).session.flags & abi.FUSE_ATOMIC_O_TRUNC
    assert kernel_of(tree(fusepy)(), atomic_o_trunc=True).session.flags & abi.FUSE_ATOMIC_O_TRUNC


def test_listings_have_names_or_tuples_and_nothing_that_is_no_name(caplog: pytest.LogCaptureFixture) -> None:
    class Mixed(fusepy.Operations):
        def opendir(self, path):
            return 31

        def readdir(self, path, fh):
            assert fh == 31
            yield "."
            yield "plain", None, 0
            yield "file", {"st_mode": stat.S_IFREG | 0o644, "st_ino": 5}, 0
            yield "directory", {"st_mode": stat.S_IFDIR}, 7
            yield "a/b"
            yield ""

    found = kernel_of(Mixed()).listdir(1)
    assert [(item.name, item.dtype) for item in found] == [
        (b".", stat.S_IFDIR >> 12),
        (b"plain", 0),
        (b"file", stat.S_IFREG >> 12),
        (b"directory", stat.S_IFDIR >> 12),
    ]
    assert "'a/b'" in caplog.text
    assert next(item.ino for item in kernel_of(Mixed(), use_ino=True).listdir(1) if item.name == b"file") == 5


def test_a_listing_stays_what_it_was_until_it_is_read_anew() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    for number in range(50):
        kernel.mkdir(1, b"name-%02d" % number)
    fh, _ = kernel.opendir(1)
    first = kernel.readdir(1, fh, 0, 512)
    program.files["/late"] = None
    rest = kernel.readdir(1, fh, first[-1].cookie, 65536)
    assert len(first) + len(rest) == 52
    assert len(kernel.readdir(1, fh, 0, 65536)) == 53
    kernel.releasedir(1, fh)


def test_extended_attributes_are_text_and_bytes() -> None:
    class Xattrs(fusepy.Operations):
        values = {"user.a": b"1"}

        def getxattr(self, path, name, position=0):
            try:
                return self.values[name]
            except KeyError:
                raise fusepy.FuseOSError(errno.ENODATA) from None

        def setxattr(self, path, name, value, options, position=0):
            assert type(value) is bytes
            self.values[name] = value

        def listxattr(self, path):
            return list(self.values)

        def removexattr(self, path, name):
            del self.values[name]

    kernel = kernel_of(Xattrs())
    kernel.setxattr(1, b"user.b", b"\0\xff")
    assert (kernel.getxattr(1, b"user.b"), kernel.listxattr(1)) == (b"\0\xff", [b"user.a", b"user.b"])
    kernel.removexattr(1, b"user.a")
    assert kernel.listxattr(1) == [b"user.b"]
    fails(errno.ENODATA, kernel.getxattr, 1, b"user.a")


def test_record_locks_reach_the_program_as_struct_flock() -> None:
    import ctypes

    class Locks(tree(fusepy)):  # type: ignore[misc]
        def lock(self, path, fh, cmd, lock):
            kind, _, start, length, _ = struct.unpack("hhxxxxqqi", ctypes.string_at(lock, 28))
            self._note("lock", cmd, kind, start, length)
            if cmd == fcntl.F_GETLK:
                ctypes.memmove(lock, struct.pack("hhxxxxqqi", fcntl.F_WRLCK, 0, 10, 5, 42), 28)

    program = Locks()
    kernel = kernel_of(program)
    assert kernel.session.flags & abi.FUSE_POSIX_LOCKS
    entry, fh, _ = kernel.create(1, b"file")
    kernel.setlk(entry.nodeid, fh, 1, Lock(3, 7, fcntl.F_RDLCK, 1))
    kernel.setlk(entry.nodeid, fh, 1, Lock(0, (1 << 63) - 1, fcntl.F_WRLCK, 1), wait=True)
    assert kernel.getlk(entry.nodeid, fh, 1, Lock(0, 9, fcntl.F_RDLCK, 1)) == Lock(10, 14, fcntl.F_WRLCK, 42)
    kernel.flush(entry.nodeid, fh, 1)
    assert [call[1:] for call in program.calls if call[0] == "lock"] == [
        (fcntl.F_SETLK, fcntl.F_RDLCK, 3, 5),
        (fcntl.F_SETLKW, fcntl.F_WRLCK, 0, 0),
        (fcntl.F_GETLK, fcntl.F_RDLCK, 0, 10),
        (fcntl.F_SETLK, fcntl.F_UNLCK, 0, 0),
    ]


def test_ioctl_has_the_address_of_what_goes_in_and_out() -> None:
    import ctypes

    class Controlled(tree(fusepy)):  # type: ignore[misc]
        def ioctl(self, path, cmd, arg, fip, flags, data):
            assert ctypes.string_at(data, 4) == b"ping"
            ctypes.memmove(data, b"pong", 4)
            return cmd

    kernel = kernel_of(Controlled())
    entry, fh, _ = kernel.create(1, b"file")
    assert kernel.ioctl(entry.nodeid, fh, 5, 1000, b"ping", 4) == (5, b"pong")


def test_statistics_have_the_names_of_statvfs() -> None:
    class Sized(fusepy.Operations):
        def statfs(self, path):
            return {"f_bsize": 1024, "f_blocks": 10, "f_bavail": 3, "f_unknown": 1}

    found = kernel_of(Sized()).statfs()
    assert (found.blocks, found.bavail, found.bsize, found.frsize, found.namelen) == (10, 3, 1024, 1024, 255)


# --- the table of paths


def test_names_are_dropped_when_the_kernel_has_forgotten_them_in_any_order() -> None:
    program = tree(fusepy)()
    kernel = kernel_of(program)
    a = kernel.mkdir(1, b"a")
    b = kernel.mkdir(a.nodeid, b"b")
    kernel.lookup(a.nodeid, b"b")
    filesystem = kernel.session.operations
    assert isinstance(filesystem, bridge.Bridge)
    assert len(filesystem._paths) == 3
    kernel.forget(a.nodeid, 1)
    assert filesystem._paths.get(b.nodeid).path == "/a/b"
    kernel.forget(b.nodeid, 2)
    assert len(filesystem._paths) == 1
    fails(errno.ESTALE, kernel.getattr, b.nodeid)


def test_a_new_file_of_an_old_name_is_another_node() -> None:
    table = PathTable("utf-8", "strict")
    old = table.enter(table.root, b"x")
    table.remove(table.root, b"x")
    new = table.enter(table.root, b"x")
    assert old.id != new.id
    table.forget(old.id, 1)
    assert table.get(new.id) is new
    with pytest.raises(FileNotFoundError):
        table.remove(table.root, b"x")
        table.path(new.id)


# --- options


def test_options_reach_the_kernel() -> None:
    settings = options.parse(
        "Name", {"ro": True, "allow_other": True, "max_read": 4096, "subtype": "x", "noexec": True, "allow_root": False}
    )
    kernel = settings.kernel
    assert (kernel.fsname, kernel.subtype, kernel.max_read) == (b"Name", b"fusewire.x", 4096)
    assert (kernel.allow_other, kernel.allow_root, kernel.flags & 9) == (True, False, 9)
    assert options.parse("Name", {"fsname": "other,name"}).kernel.fsname == b"other,name"
    assert options.parse("Name", {"allow_other,max_read=9": True}).kernel.max_read == 9


def test_numbers_that_the_kernel_has_no_room_for_are_cut_or_refused() -> None:
    settings = options.parse("Name", {"max_background": 1 << 20, "congestion_threshold": 70000})
    assert (settings.max_background, settings.congestion_threshold) == (0xFFFF, 0xFFFF)
    for name in ("uid", "max_readahead"):
        for value in (-1, 1 << 32):
            with pytest.raises(ValueError, match=name):
                options.parse("Name", {name: value})


def test_options_without_an_effect_are_taken() -> None:
    names = ("nonempty", "big_writes", "intr", "readdir_ino", "hard_remove", "use_ino", "no_remote_lock", "async_read")
    options.parse("Name", dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("given", "text"),
    [({"nonsense": 1}, "`nonsense`"), ({"attr_timeout": "soon"}, "`attr_timeout` needs seconds"), ({"umask": 9}, "9")],
)
def test_options_that_are_none_are_named(given: dict[str, Any], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=text):
        options.parse("Name", given)
    with pytest.raises(RuntimeError) as caught:
        fusepy.FUSE(fusepy.Operations(), "/nowhere/at/all", foreground=True, **given)
    assert caught.value.args == (1,)
    assert text in capfd.readouterr().err


def test_an_encoding_that_is_none_is_refused_before_anything_is_mounted() -> None:
    with pytest.raises(LookupError, match="nonsense"):
        fusepy.FUSE(fusepy.Operations(), "/nowhere/at/all", encoding="nonsense", foreground=True)


# --- standing in for modules


@pytest.fixture
def modules() -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in ("fuse", "fusepy", "mfusepy")}
    yield
    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module


@pytest.mark.usefixtures("modules")
def test_install_stands_in_for_modules() -> None:
    fusewire.compat.install()
    import fuse  # type: ignore[import-untyped]
    import mfusepy as other  # type: ignore[import-untyped]

    assert fuse is fusepy
    assert other is mfusepy
    with pytest.raises(ValueError, match="pyfuse3"):
        fusewire.compat.install(["pyfuse3"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "usage:"),
        (["--help"], 0, "usage:"),
        (["-m"], 2, "name of a module"),
        (["/nonexistent"], 2, "/nonexistent: No such file"),
        (["/bin/ls"], 2, "no Python program"),
        (["/usr/bin/ldd"], 2, "no Python program"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], code: int, text: str) -> None:
    done = subprocess.run([sys.executable, "-m", "fusewire.compat", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert text in done.stdout + done.stderr


def test_a_program_is_run_as_by_itself(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 5\n")
    program = tmp_path / "program.py"
    program.write_text("import sys, beside, fuse; print(__name__, sys.argv, fuse.FUSE.__module__)\nsys.exit(7)\n")
    done = subprocess.run(
        [sys.executable, "-m", "fusewire.compat", str(program), "-x", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"__main__ {[str(program), '-x', '--help']} fusewire.compat.fusepy\n"


def test_a_command_that_pip_has_written_for_a_long_path_is_a_python_program(tmp_path: Path) -> None:
    program = tmp_path / "command"
    program.write_text(
        f"#!/bin/sh\n'''exec' {sys.executable} \"$0\" \"$@\"\n' '''\nimport fuse; print(fuse.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-m", "fusewire.compat", str(program)], capture_output=True, text=True)
    assert done.stdout == "fusewire.compat.fusepy\n", done.stderr


def test_a_safe_path_stays_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys; print(sys.path)\n")
    command = [sys.executable, "-P", "-m", "fusewire.compat", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert str(tmp_path) not in done.stdout
    alone = subprocess.run([sys.executable, "-P", str(program)], capture_output=True, text=True)
    assert done.stdout == alone.stdout


# --- mounted, by a user who may do nothing

MEMORY = """
import errno, os, stat, sys, threading
import fuse

class Memory(fuse.Operations):
    use_ns = True
    def __init__(self):
        self.files = {}
        self.thread = threading.get_ident()
    def init(self, path):
        print("ready", flush=True)
    def destroy(self, path):
        print("destroyed", flush=True)
    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path == "/context":
            return {"st_mode": stat.S_IFREG | 0o444, "st_size": 99}
        if path == "/exit":
            fuse.fuse_exit()
        if path == "/fail":
            raise SystemExit(9)
        if path == "/thread":
            return {"st_mode": stat.S_IFREG | 0o444, "st_mtime": int(threading.get_ident() == self.thread)}
        if path not in self.files:
            raise fuse.FuseOSError(errno.ENOENT)
        return {"st_mode": stat.S_IFREG | 0o644, "st_size": len(self.files[path]), "st_nlink": 1}
    def readdir(self, path, fh):
        return [".", "..", *[name[1:] for name in self.files]]
    def create(self, path, mode):
        self.files[path] = b""
        return 0
    def read(self, path, size, offset, fh):
        if path == "/context":
            return " ".join(map(str, fuse.fuse_get_context())).encode()
        return self.files[path][offset:offset + size]
    def write(self, path, data, offset, fh):
        old = self.files[path]
        self.files[path] = old[:offset].ljust(offset, bytes(1)) + data + old[offset + len(data):]
        return len(data)
    def truncate(self, path, length, fh=None):
        self.files[path] = self.files[path][:length].ljust(length, bytes(1))
    def rename(self, old, new):
        self.files[new] = self.files.pop(old)
    def unlink(self, path):
        del self.files[path]
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with user_directory() as place:
        yield place


def memory(home: Path, ending: str) -> Program:
    (home / "program.py").write_text(MEMORY + ending)
    return Program(["-m", "fusewire.compat", "program.py"], home)


def test_a_program_is_mounted_used_and_ended_by_a_signal(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True); print("returned")') as program:
        program.ready()
        assert as_user("cd mnt; echo hello > a; mv a b; cat b; ls; rm b; ls", home) == "hello\nb\n"
        assert (
            as_user("exec 5> mnt/open; rm mnt/open; echo kept >&5; ls -A mnt/ | cut -c -12", home) == ".fuse_hidden\n"
        )
        program.assert_no_libfuse()
        program.end()
        assert program.lines() == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


def test_a_directory_that_was_there_is_there_again(home: Path) -> None:
    (home / "mnt").mkdir(mode=0o700)
    os.chown(home / "mnt", *([os.stat(home).st_uid] * 2))
    before = os.stat(home / "mnt").st_ino
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True)') as program:
        program.ready()
        program.end()
    assert program.returncode == 0, program.errors
    assert os.stat(home / "mnt").st_ino == before


def test_who_asks_is_known_to_a_method(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True)') as program:
        program.ready()
        uid, gid, pid, shell = as_user("echo $(exec cat mnt/context) $$", home).replace("\0", "").split()
        owner = str(os.stat(home).st_uid)
        assert (uid, gid) == (owner, owner)
        assert int(pid) > int(shell) - 1
        program.end()


def test_who_waits_for_a_lock_is_known_too(home: Path) -> None:
    ending = """
class Locks(Memory):
    def lock(self, path, fh, cmd, lock):
        print(fuse.fuse_get_context()[:2], flush=True)
fuse.FUSE(Locks(), "mnt", foreground=True)
"""
    with memory(home, ending) as program:
        program.ready()
        as_user('$PYTHON -c \'import fcntl; fcntl.lockf(open("mnt/a", "w"), fcntl.LOCK_EX)\'', home)
        assert program.line() == str((os.stat(home).st_uid,) * 2)
        program.end()
    assert program.returncode == 0, program.errors


SLOW = """
class Slow(Memory):
    waiting = 0
    def getattr(self, path, fh=None):
        if path.startswith("/slow"):
            self.waiting += 1
            print("waiting", self.waiting, flush=True)
            with open("go-on"):
                pass
            self.waiting -= 1
            if not self.waiting:
                print("went on", flush=True)
        if path == "/other":
            print("other", flush=True)
        return super().getattr(path, fh)
"""


@pytest.mark.parametrize("nothreads", [False, True])
def test_a_slow_method_keeps_others_waiting_only_without_threads(home: Path, nothreads: bool) -> None:
    many = 1 if nothreads else 25  # more than there are threads to begin with
    os.mkfifo(home / "go-on", 0o666)
    os.chmod(home / "go-on", 0o666)
    with memory(home, SLOW + f'fuse.FUSE(Slow(), "mnt", foreground=True, nothreads={nothreads})') as program:
        program.ready()
        with contextlib.ExitStack() as users:
            for number in range(many):
                code = f"import os; os.path.exists('mnt/slow-{number}')"
                users.enter_context(Program(["-c", code], home))
            assert sorted(program.line() for _ in range(many)) == sorted(f"waiting {n + 1}" for n in range(many))
            code = "import os; print('asks', flush=True); os.path.exists('mnt/other')"
            other = users.enter_context(Program(["-c", code], home))
            assert other.line() == "asks"
            if not nothreads:
                assert program.line() == "other"
            with open(home / "go-on", "w"):
                assert program.line() == "went on"
            if nothreads:
                assert program.line() == "other"
        program.end()
    assert program.returncode == 0, program.errors


def test_a_child_that_the_program_has_forked_does_not_keep_it(home: Path) -> None:
    ending = """
class Forks(Memory):
    def init(self, path):
        if not os.fork():
            os.close(1)
            os.close(2)
            os.read(0, 1)
            os._exit(0)
        super().init(path)
fuse.FUSE(Forks(), "mnt", foreground=True)
print("returned", flush=True)
"""
    with memory(home, ending) as program:
        program.ready()
        program.end()
        assert [program.line(), program.line()] == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors


def test_nothreads_serves_in_the_thread_that_calls(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True, nothreads=True); print("returned")') as program:
        program.ready()
        assert as_user("stat -c %Y mnt/thread; echo x > mnt/a; cat mnt/a", home) == "0\nx\n"  # nanoseconds: 1
        assert as_user("stat -c %.9Y mnt/thread", home) == "0.000000001\n"
        program.end()
        assert program.lines() == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors


@pytest.mark.parametrize("nothreads", [False, True])
def test_a_signal_ends_a_mount_that_is_in_use(home: Path, nothreads: bool) -> None:
    ending = f'fuse.FUSE(Memory(), "mnt", foreground=True, nothreads={nothreads}); print("returned")'
    with memory(home, ending) as program:
        program.ready()
        with Program(["-c", "import os; f = open('mnt/a', 'w'); print('open', flush=True); input()"], home) as user:
            assert user.line() == "open"
            program.end()
            assert program.lines() == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


def test_fuse_exit_ends_the_mount_from_a_method(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True); print("returned")') as program:
        program.ready()
        as_user("ls mnt/exit 2> /dev/null; true", home)
        assert program.lines() == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors


def test_what_is_no_exception_comes_out_of_fuse(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True)') as program:
        program.ready()
        as_user("ls mnt/fail 2> /dev/null; true", home)
        assert program.lines() == ["destroyed"]
    assert program.returncode == 9, program.errors
    assert not os.path.lexists(home / "mnt")


def test_init_that_fails_comes_out_of_fuse_and_leaves_no_mount(home: Path) -> None:
    ending = """
class Broken(Memory):
    def init(self, path):
        raise ValueError("no database")
try:
    fuse.FUSE(Broken(), "mnt", foreground=True)
except ValueError as error:
    print("raised", error)
"""
    with memory(home, ending) as program:
        assert "raised no database" in program.lines()
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


def test_a_mount_that_cannot_be_is_a_runtime_error_that_is_explained(home: Path) -> None:
    (home / "mnt").mkdir()
    (home / "mnt" / "file").touch()
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True)') as program:
        assert program.lines() == []
    assert program.returncode == 1
    assert "RuntimeError: 1" in program.errors
    assert "fuse: cannot mount" in program.errors
    assert "mnt is not empty" in program.errors


def test_without_foreground_the_program_goes_on_in_the_background(home: Path) -> None:
    os.mkfifo(home / "after", 0o666)
    os.chmod(home / "after", 0o666)
    ending = """
after = os.path.abspath("after")
sys.stderr = type("Nothing", (), {"write": lambda self, text: None})()
print("before")
fuse.FUSE(Memory(), "mnt")
with open(after, "w") as file:
    file.write(os.getcwd())
"""
    with memory(home, ending) as program:
        assert program.lines() == ["before"]
        assert program.wait() == 0, program.errors
        assert as_user("echo hello > mnt/a; cat mnt/a", home) == "hello\n"
        as_user("$PYTHON -m fusewire umount mnt", home)
        assert (home / "after").read_text() == "/"
    assert not os.path.lexists(home / "mnt")


def test_it_is_unmounted_by_the_command_of_fusewire(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True); print("returned")') as program:
        program.ready()
        as_user("$PYTHON -m fusewire umount mnt", home)
        assert program.lines() == ["destroyed", "returned"]
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


def test_a_program_that_is_killed_leaves_nothing_behind(home: Path) -> None:
    with memory(home, 'fuse.FUSE(Memory(), "mnt", foreground=True)') as program:
        program.ready()
        keeper = program.children()
        assert len(keeper) == 1
        program.kill()
        program.gone(keeper[0])
    assert not os.path.lexists(home / "mnt")


def test_a_program_with_threads_mounts_from_one_of_them_and_uses_its_mount(home: Path) -> None:
    ending = """
Memory.destroy = Memory.init = lambda self, path: None
thread = threading.Thread(target=lambda: fuse.FUSE(Memory(), "mnt", foreground=True), daemon=True)
thread.start()
while not os.path.exists("mnt/"):
    os.sched_yield()
with open("mnt/a", "w") as file:
    file.write("hello")
print(os.listdir("mnt"))
"""
    with memory(home, ending) as program:
        assert program.lines()[0] == "['a']"
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 (fuse3) is not installed")
@pytest.mark.parametrize("options", ["", ", auto_unmount=True"])
def test_fusermount3_mounts_where_it_may_and_unmounts(home: Path, options: str) -> None:
    (home / "mnt").mkdir()
    os.chown(home / "mnt", *([os.stat(home).st_uid] * 2))
    (home / "program.py").write_text(MEMORY + f'fuse.FUSE(Memory(), "mnt", fsname="mem"{options})')
    with Program(["-m", "fusewire.compat", "program.py"], home, fusermount=True) as program:
        program.lines()
    assert program.returncode == 0, program.errors
    if f" {home}/mnt " not in Path("/proc/self/mounts").read_text():
        as_user("$PYTHON -m fusewire umount mnt", home)
        pytest.skip("fusermount3 does not work for users here: another way was taken")
    assert as_user("echo hello > mnt/a; cat mnt/a; fusermount3 -u mnt", home, fusermount=True) == "hello\n"
    assert f" {home}/mnt " not in Path("/proc/self/mounts").read_text()


def test_the_example_of_the_page_greets(home: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "fusepy.md").read_text()
    (home / "greeting.py").write_text(page.split("<!-- file: greeting.py -->\n```python\n")[1].split("```")[0])
    with Program(["greeting.py", "mnt"], home) as program:
        program.mounted(home / "mnt")
        assert as_user("ls mnt/; cat mnt/world mnt/you", home) == "world\nhello world\nhello you\n"
        program.end()
    assert program.returncode == 0, program.errors


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts as root")
def test_root_mounts_directly_and_others_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    code = MEMORY + 'fuse.FUSE(Memory(), sys.argv[1], foreground=True, allow_other=True, subtype="mem")'
    (tmp_path / "program.py").write_text(code)
    (tmp_path / "mnt").mkdir()
    with Program(["-m", "fusewire.compat", "program.py", "mnt"], tmp_path, root=True) as program:
        assert program.line() == "ready"
        (tmp_path / "mnt" / "a").write_bytes(b"x" * 300_000)
        assert (tmp_path / "mnt" / "a").read_bytes() == b"x" * 300_000
        mounts = Path("/proc/self/mounts").read_text()
        assert f"Memory {tmp_path}/mnt fuse.fusewire.mem rw" in mounts
        program.end()
    assert program.returncode == 0, program.errors
    assert os.listdir(tmp_path / "mnt") == []
