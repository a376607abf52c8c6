"""What the behaviours of the conformance list are written with: outcomes as plain data, children, a clock.

Layer `testing`. A behaviour gives a transcript that is equal on every filesystem that works: so paths, inode numbers,
times and sizes of directories do not go in, but what can be said of them does ("the time moved").
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
Function = TypeVar("Function", bound=Callable[..., Any])


class Behaviour(NamedTuple):
    """One behaviour: `run(root)` works in the empty directory `root` and gives a transcript that JSON can hold.

    `marks` say what it needs: root (uid 0 with all capabilities), user_switch (children under other uids; implies
    root), xattr, acl, locks, inode_flags (ioctl_iflags(2)).
    """

    name: str
    run: Callable[[str], object]
    marks: frozenset[str]


def needs(*marks: str) -> Callable[[Function], Function]:
    """Mark a behaviour."""

    def decorate(function: Function) -> Function:
        function.__dict__["marks"] = frozenset(marks) | ({"root"} if "user_switch" in marks else set())
        return function

    return decorate


def collect(module: dict[str, Any]) -> tuple[Behaviour, ...]:
    """Give the behaviours of a module: its own functions whose names begin with no underscore."""
    return tuple(
        Behaviour(name, item, getattr(item, "marks", frozenset()))
        for name, item in module.items()
        if not name.startswith("_") and getattr(item, "__module__", "") == module["__name__"] and callable(item)
    )


# Outcomes


def plain(value: Any) -> Any:
    """Give a value as JSON can hold it: long bytes by their digest."""
    if value is None:
        return "done"
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        return repr(data) if len(data) <= 64 else f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, os.stat_result):
        return facts(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call, and give the result or the name of the errno."""
    try:
        return plain(function(*arguments, **options))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


def facts(status: os.stat_result | str | int) -> dict[str, Any]:
    """What is the same everywhere about a file: a path is not followed."""
    if not isinstance(status, os.stat_result):
        status = os.fstat(status) if isinstance(status, int) else os.lstat(status)
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    found = {"type": kind, "mode": oct(stat.S_IMODE(status.st_mode)), "uid": status.st_uid, "gid": status.st_gid}
    if kind != "directory":
        found["links"] = status.st_nlink
        found["size"] = status.st_size
    if kind.endswith("device"):
        found["device"] = status.st_rdev
    return found


def opening(path: str, flags: int, mode: int = 0o666) -> Any:
    """Open and close; "opened" or the name of the errno."""
    try:
        os.close(os.open(path, flags, mode))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0)
    return "opened"


@contextmanager
def opened(path: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> Iterator[int]:
    """Have a descriptor for a while."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def put(path: str, data: bytes = b"", mode: int = 0o644) -> str:
    """Write a file and give its path."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode) as fd:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    return path


def get(path: str) -> bytes:
    """Read a file."""
    with open(path, "rb") as file:
        return file.read()


def noise(size: int, seed: int = 1) -> bytes:
    """Give bytes that look like no others, the same each time."""
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def names(path: str | int) -> list[str]:
    """List a directory in an order that is the same everywhere."""
    return sorted(os.listdir(path))


# Time


class Clock:
    """Tells which time stamps of a file an operation moves. It owns a file in `root`, which should be there first."""

    def __init__(self, root: str) -> None:
        """Make the file."""
        self.path = put(f"{root}/.clock")

    def tick(self) -> None:
        """Let the filesystem's clock go on, so that the next stamp is later than all before."""
        for _ in range(2):  # once reaches the last stamp of other files, which may be as late as the next one
            before = os.stat(self.path).st_ctime_ns
            while os.stat(self.path).st_ctime_ns <= before:
                os.utime(self.path)

    def moved(self, path: str | int, operation: Callable[[], Any]) -> str:
        """Give the letters of those of atime, mtime and ctime that `operation` moves; a path is not followed."""

        def look() -> os.stat_result:
            return os.fstat(path) if isinstance(path, int) else os.lstat(path)

        before = look()
        self.tick()
        operation()
        after = look()
        letters = ""
        for letter, field in (("a", "st_atime_ns"), ("m", "st_mtime_ns"), ("c", "st_ctime_ns")):
            if getattr(after, field) != getattr(before, field):
                letters += letter if getattr(after, field) > getattr(before, field) else f"{letter} back "
        return letters


# Other processes


def _leave(status: int) -> NoReturn:
    os._exit(status)


def in_child(function: Callable[..., Any], *arguments: Any, ids: tuple[int, int, list[int]] | None = None) -> Any:
    """Give the outcome of a call in a forked child, or how that died. `ids`: its uid, gid and groups."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            if ids is not None:
                os.setgroups(ids[2])
                os.setresgid(ids[1], ids[1], ids[1])
                os.setresuid(ids[0], ids[0], ids[0])
            os.write(writer, json.dumps(outcome(function, *arguments)).encode())
            _leave(0)
        except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent, whatever happens
            os.write(writer, json.dumps({"exception": traceback.format_exc()}).encode())
            _leave(1)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    found = json.loads(answer)
    if isinstance(found, dict) and "exception" in found:
        raise AssertionError(found["exception"])
    return found


class Other:
    """Another process that does what it is told, one call after another: for what two of them do to each other.

    SIGUSR1 interrupts what it does (EINTR).
    """

    def __init__(self, **commands: Callable[..., Any]) -> None:
        """Fork; `commands` are what it can be told by name."""
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._socket.close()
                self._obey(theirs, commands)
            finally:
                _leave(0)
        theirs.close()
        self._file = self._socket.makefile("r")

    def _obey(self, wire: socket.socket, commands: dict[str, Callable[..., Any]]) -> None:
        def interrupt(*_: object) -> None:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))

        signal.signal(signal.SIGUSR1, interrupt)
        with wire.makefile("r") as lines:
            for line in lines:
                name, *arguments = json.loads(line)
                wire.sendall(b"begun\n")
                try:
                    answer = outcome(commands[name], *arguments)
                except Exception:  # noqa: BLE001 - told to the parent, which raises it
                    answer = {"exception": traceback.format_exc()}
                wire.sendall(json.dumps(answer).encode() + b"\n")

    def start(self, name: str, *arguments: Any) -> None:
        """Tell it to begin."""
        self._socket.sendall(json.dumps([name, *arguments]).encode() + b"\n")
        assert self._file.readline() == "begun\n"

    def result(self) -> Any:
        """Wait for the outcome of what was begun."""
        answer = json.loads(self._file.readline())
        if isinstance(answer, dict) and "exception" in answer:
            raise AssertionError(answer["exception"])
        return answer

    def call(self, name: str, *arguments: Any) -> Any:
        """Tell it to do something and give the outcome."""
        self.start(name, *arguments)
        return self.result()

    def wait_until_it_sleeps(self) -> None:
        """Wait until it waits in the kernel for what was begun, proc(5)."""
        while True:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                state = file.read().rpartition(b")")[2].split()[0]
            if state in b"SZX":
                return
            os.sched_yield()

    def has_answered(self, timeout: float = 0.0) -> bool:
        """Tell whether the outcome is there."""
        import select

        return bool(select.select([self._socket], [], [], timeout)[0])

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it."""
        if self.pid > 0:
            os.kill(self.pid, number)
            os.waitpid(self.pid, 0)
            self.pid = -1
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it has not ended."""
        self.end()
