"""What the ways to run a filesystem from Python share: a mount that this process holds, and how its end is seen.

Layer: above serve, below mounts.py; import from there. It serves nothing itself.

This process never enters a namespace: where one is needed, a child makes it, and the mount in it, and sends out the
descriptors of the mount and of /dev/fuse, which work anywhere (SCM_RIGHTS of unix(7)).
"""

from __future__ import annotations

import errno
import os
import time
from _weakrefset import WeakSet
from typing import TYPE_CHECKING, Any, NoReturn

from fusewire.linux import mount as mounting
from fusewire.linux import mount_base, mount_namespace, process, syscalls, userns
from fusewire.linux.mount_base import Mount, Options
from fusewire.linux.mount_namespace import put_back
from fusewire.serve import DEFAULT_THREADS, Server

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol, Self

    from fusewire.ops import Operations
    from fusewire.session import Log

# How long those inside get to finish after a lazy unmount, and how long a server that should end may take. Seconds.
GRACE, PATIENCE = 1.0, 5.0
MESSAGE = 1 << 16
# How long a mount may be in use when it is unmounted before that is an error: a process that has just been forked still
# has to close its copies of descriptors. Seconds.
_PASSING = 0.5


class Held:
    """A mount that somebody in this process is about to serve: `fd` is /dev/fuse, `path` leads other processes there.

    `unmount` is what ends it; nobody may serve any more when it is closed.
    """

    __slots__ = ("__weakref__", "_mount", "_place", "_tree", "fd", "maps", "path")

    def __init__(self, fd: int, path: bytes) -> None:
        self.fd = fd
        self.path = path
        self.maps: tuple[str, str, bool] | None = None
        self._mount: Mount | None = None
        self._tree = -1
        self._place: mount_namespace.Place | None = None
        LIVE.add(self)

    def unmount(self, lazy: bool = False) -> None:
        """Unmount; a mount without a mount point is always left lazily. Raises OSError(EBUSY) if it is in use."""
        if self._mount is not None:
            deadline = time.monotonic() + _PASSING
            while True:
                try:
                    self._mount.unmount(lazy=lazy)
                    return
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                time.sleep(0.01)
        place, self._place = self._place, None
        if place is not None:
            put_back(place.path, self._link(), place.aside if place.existed else None, place.identity)
        self._close_tree()

    def close(self, server: Server | None = None) -> None:
        """Let go of the descriptors. A server whose workers are still at work keeps /dev/fuse until they leave."""
        self._close_tree()
        fd, self.fd = self.fd, -1
        if server is not None:
            server.close()
            if self._mount is not None:
                self._mount.fd = -1
        elif fd >= 0 and self._mount is None:
            os.close(fd)
        if self._mount is not None:
            self._mount.close()

    def abandon(self) -> None:
        """Have all calls there fail with ENOTCONN, when nobody will answer; `unmount` and `close` are still due."""
        if self.fd >= 0:
            cover(self.fd)

    def forget(self) -> None:
        """Close our copies, in a child that was forked with them: they would keep the mount alive."""
        close_all(self.fd, self._tree)
        self.fd = self._tree = -1
        self._mount = self._place = None

    def _close_tree(self) -> None:
        tree, self._tree = self._tree, -1
        if tree >= 0:
            os.close(tree)

    def _link(self) -> bytes:
        return b"/proc/%s/fd/%d" % (os.readlink(b"/proc/self"), self._tree)

    def adopt(self, tree: int, place: mount_namespace.Place | None) -> None:
        """Take over a mount that has left its namespace, by the descriptor of its root, and say so at its place."""
        self._tree = tree
        link = self._link()
        if place is None:
            self.path = link
            return
        mount_namespace._replace(place, link)
        self._place = place


def hold(target: bytes | None, options: Options, strategy: str = "auto") -> Held:
    """Mount by the first strategy that works, without entering a namespace; None for a mount without a mount point.

    Raises MountError.
    """
    if target is not None:
        target = os.path.join(os.getcwdb(), target)
        try:
            held = mounting.mount(target, options, strategy)
        except mounting.MountError as error:
            if error.attempts[-1][0] != "namespace":
                raise
            try:
                return _hold_in_namespace(target, options)
            except OSError as last:
                attempts = [*error.attempts[:-1], *_attempts_of(last)]
                raise mounting.MountError(last.errno or errno.EPERM, target, attempts) from None  # it says it all
        result = Held(held.fd, target)
        result._mount = held
        result.maps = userns.maps_of(os.getpid())
        return result
    check_strategy(target, strategy)
    return _hold_in_namespace(None, options)


def check_strategy(target: bytes | None, strategy: str) -> None:
    if target is None and strategy not in ("auto", "namespace"):
        raise OSError(errno.EINVAL, f"the strategy {strategy} needs a mount point: name one, or leave the strategy out")


def _attempts_of(error: OSError) -> list[tuple[str, str, str]]:
    if isinstance(error, mounting.MountError):
        return error.attempts
    return [("namespace", str(error.strerror or error), str(getattr(error, "remedy", "")))]


def _hold_in_namespace(target: bytes | None, options: Options) -> Held:
    place = None if target is None else mount_namespace.find_place(target)
    fds: list[int] = []
    done = False
    try:
        pid = 0
        ours, theirs = process.socket_pair(packets=True)
        private = ""
        try:
            try:
                private = private_directory()
                pid = fork(quiet=True)
                if pid == 0:
                    _run_helper(theirs, ours, options, private)
            finally:
                os.close(theirs)
            message, fds = receive(ours, 2)
            if message["kind"] != "ready":
                raise_described(message)
            maps = userns.maps_of(pid)
        finally:
            if pid:
                try:
                    os.write(ours, b"e")  # not only the end of the socket: another thread's child may hold a copy
                except (BrokenPipeError, ConnectionResetError):
                    pass  # it has ended
                wait_for(pid)
            os.close(ours)
            if private:
                os.rmdir(private)
        held = Held(fds[0], target or b"")
        held.maps = maps
        held.adopt(fds[1], place)
        done = True
        return held
    finally:
        if place is not None:
            place.close()
        if not done:
            close_all(*fds)


def _run_helper(control: int, other: int, options: Options, private: str) -> NoReturn:
    """Make the namespace and the mount in a child, and send both descriptors. The mount outlives it by them."""
    try:
        os.close(other)
        try:
            held = mounting.mount(None, options, "namespace", private=os.fsencode(private))
        except OSError as error:
            send(control, described(error))
        else:
            assert held.outside is not None
            send(control, {"kind": "ready"}, [held.fd, int(os.path.basename(held.outside))])
            os.read(control, 1)
    finally:
        os._exit(0)


def close_all(*fds: int) -> None:
    """Close descriptors; -1 is none."""
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def cover(fd: int) -> None:
    """Close what a descriptor stands for, and keep its number taken: it would soon stand for another file."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)


def wait_for(pid: int) -> int:
    """Give the wait status of a child, -1 where the program has its children waited for by somebody else."""
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return -1


def private_directory() -> str:
    """Make a directory to mount on, in a namespace where only the mount's holder sees it."""
    import tempfile

    return tempfile.mkdtemp(prefix="fusewire-")


def fork(*, quiet: bool) -> int:
    """Fork; `quiet` for a child that only makes system calls, for which it does not matter what threads were doing."""
    if not quiet:
        return os.fork()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class Quiet:
    """Has signals wait while this thread makes what an exception of a signal handler, as of Ctrl-C, would leave behind.

    `end` lets them come, where somebody clears up.
    """

    def __enter__(self) -> Self:
        import signal

        self._before: set[Any] | None = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        return self

    def end(self) -> None:
        import signal

        before, self._before = self._before, None
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(self, *exception: object) -> None:
        self.end()


# Messages between a program and its child: one packet each


def send(control: int, message: dict[str, Any], fds: list[int] | None = None) -> None:
    import json

    process.send_fds(control, json.dumps(message).encode()[:MESSAGE], fds or [])


def receive(control: int, most: int) -> tuple[dict[str, Any], list[int]]:
    import json

    try:
        data, fds = process.recv_fds(control, MESSAGE, most)
    except ConnectionResetError:
        data, fds = b"", []
    if not data:
        return {"kind": "gone"}, fds
    message: dict[str, Any] = json.loads(data)
    return message, [process.above_stdio(fd) for fd in fds]


def described(error: BaseException) -> dict[str, Any]:
    """What an exception of a child says, for `raise_described`."""
    if isinstance(error, mounting.MountError):
        target = error.strerror.removeprefix("cannot mount ") if error.strerror else ""
        return {"kind": "mount error", "errno": error.errno, "target": target, "attempts": error.attempts}
    if isinstance(error, OSError):
        name = error.filename
        name = os.fsdecode(name) if isinstance(name, (str, bytes)) else name
        return {"kind": "os error", "errno": error.errno, "text": str(error.strerror or error), "name": name}
    import traceback

    return {"kind": "error", "text": "".join(traceback.format_exception(error))[-MESSAGE // 4 :]}


def raise_described(message: dict[str, Any]) -> NoReturn:
    kind = message["kind"]
    if kind == "mount error":
        target = os.fsencode(message["target"])
        attempts = [(a, b, c) for a, b, c in message["attempts"]]
        raise mounting.MountError(message["errno"], None if target == b"a private mount" else target, attempts)
    if kind == "os error":
        raise OSError(message["errno"], message["text"], message["name"])
    if kind == "error":
        raise RuntimeError(f"the process that serves the filesystem has failed:\n{message['text']}")
    raise OSError(errno.EIO, "the process that serves the filesystem ended before the mount was ready")


def reason(failure: BaseException) -> str:
    """Say in a few words why serving has ended."""
    return str(failure) if isinstance(failure, OSError) else f"a method raised {failure!r}"


# Serving


def options_for(fs: object, operations: Operations, given: Options | None) -> Options:
    if given is not None:
        return given
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | (syscalls.MS_RDONLY if operations.read_only else 0)
    checks = operations.default_permissions
    return Options(fsname=os.fsencode(type(fs).__name__), flags=flags, default_permissions=checks)


def make_server(
    operations: Operations, fd: int, options: Options, threads: int | None, debug: bool, log: Log | None
) -> Server:
    return Server(
        operations,
        fd,
        threads=threads or operations.workers or DEFAULT_THREADS,
        debug=debug,
        log=log,
        owner=(os.getuid(), os.getgid()) if options.allow_root else None,
    )


def first_look(operations: Operations, path: str) -> None:
    """Look at the mount first, if anything can be made in it; see `mount_base.first_look`."""
    if not operations.read_only:
        mount_base.first_look(os.fsencode(path))


# Mounted


class Mounted:
    """A mount that is served while the program goes on. Leaving `with` ends it, and so does the end of the program.

    `path` leads to it: in this process, its threads, its children and every other process of the same user. `pid` is
    the process that serves.
    """

    path: str
    pid: int

    def unmount(self, lazy: bool = False) -> None:
        """Unmount and wait until the filesystem has been destroyed; once it is gone, this does nothing.

        `lazy`: it vanishes from sight now, and those who have it open keep it until they are done.

        Raises OSError(EBUSY) if something is open there: the mount lives on then.
        """
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        """Tell whether the filesystem is served."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise OSError(ENOTCONN) that says why, if the filesystem is not served any more."""
        raise NotImplementedError

    def forget(self) -> None:
        """Close our descriptors, in a child that was forked with them."""
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Give itself: it has been mounted already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the mount, also if something is open there: that gives ENOTCONN then, after a second.

        Raises OSError(ENOTCONN) if the process that serves has died before; to an exception on its way it is added.
        """
        try:
            self._end()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"fusewire: {failure}")


if TYPE_CHECKING:

    class Copied(Protocol):
        def forget(self) -> None: ...


# What forked children of this process must let go of, for a copy of such a descriptor keeps a mount busy, or alive.
LIVE: WeakSet[Copied] = WeakSet()


def _let_go() -> None:
    for found in list(LIVE):
        found.forget()
    LIVE.clear()


os.register_at_fork(after_in_child=_let_go)
