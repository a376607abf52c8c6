"""Ways to run a filesystem from Python: `mount` blocks, `mounted` goes on in the background, `share` serves guests.

Layer: above serve, for programs; the command line has its own ways. It decides about processes, and leaves serving to
`Server`, mounting to the strategies of `linux.mount`.

A process must not use a mount that it serves itself with a page fault (mmap): the fault holds the interpreter's lock
that the answer needs. So `mounted` serves from a forked child unless the program wants to share its state with the
filesystem. This process itself never enters a namespace: where one is needed, a child makes it, and the mount in it,
and sends out the descriptors of the mount and of /dev/fuse, which work anywhere (SCM_RIGHTS of unix(7)).
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

from fusewire.mounts_child import Job, start_child
from fusewire.mounts_held import (
    GRACE,
    LIVE,
    PATIENCE,
    Held,
    Mounted,
    Quiet,
    first_look,
    hold,
    make_server,
    options_for,
    reason,
)
from fusewire.ops import Operations

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Self

    from fusewire.linux.mount_base import Options
    from fusewire.nodes import Dir
    from fusewire.serve import Server
    from fusewire.session import Log

    Filesystem = Operations | Dir
    Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def as_operations(fs: Filesystem) -> Operations:
    """Give the level 1 filesystem of what a program calls one: itself, or a tree of nodes by its root."""
    if isinstance(fs, Operations):
        return fs
    if isinstance(fs, type):
        raise TypeError(f"{fs.__name__} is a class: give an instance, {fs.__name__}()")
    from fusewire import nodes

    return nodes.as_operations(fs)


class _InProcess(Mounted):
    """Served by threads of this process."""

    def __init__(self, operations: Operations, held: Held, server: Server) -> None:
        self.pid = os.getpid()
        self.path = os.fsdecode(held.path)
        self._operations = operations
        self._held = held
        self._server = server
        self._begun = self._ended = False
        self._lock = threading.Lock()
        self.on_end: Callable[[], None] | None = None
        server.on_end = self._left

    def start(self, quiet: Quiet) -> None:
        """Serve; raises what the filesystem's `init` does."""
        import atexit

        LIVE.add(self)
        atexit.register(self._end)
        try:
            quiet.end()
            if self._held.maps is not None:
                self._operations.serve_namespace(*self._held.maps)
            self._begun = True
            self._server.begin()
            first_look(self._operations, self.path)
        except BaseException:
            try:
                self._end()
            except OSError:
                pass  # it says the same
            raise

    def unmount(self, lazy: bool = False) -> None:
        with self._lock:
            if self._ended:
                return
            self._held.unmount(lazy=lazy)
            if self._server.wait_end(GRACE if lazy else PATIENCE):
                self._finish()

    def _left(self) -> None:
        """Hear, from the last worker, that nobody serves any more."""
        with self._lock:
            if not self._ended and self._server.failure is not None:
                # Else whoever asks waits for ever, and SIGKILL does not end a process that waits for itself.
                self._held.abandon()
        if self.on_end is not None:
            self.on_end()

    def _finish(self) -> None:
        import atexit

        self._ended = True
        atexit.unregister(self._end)
        LIVE.discard(self)
        self._server.session.close()
        self._held.close(self._server)

    def _hand_over(self) -> None:
        """Let the last worker do the rest: somebody still has files open, and is served until he is done.

        There is no other way: close(2) wakes no worker that sits in read(2), and the answer of one that wakes up after
        it would be lost.
        """
        import atexit

        atexit.unregister(self._end)

        def finish() -> None:
            with self._lock:
                if not self._ended:
                    self._finish()

        self._server.on_end = finish
        if self._server.wait_end(0):
            self._finish()

    @property
    def is_alive(self) -> bool:
        return not self._ended and not self._server.wait_end(0)

    def check(self) -> None:
        if not self.is_alive:
            failure = self._server.failure
            why = "it has been unmounted" if failure is None else reason(failure)
            raise OSError(errno.ENOTCONN, f"the filesystem is not served any more: {why}", self.path)

    def forget(self) -> None:
        import atexit

        atexit.unregister(self._end)
        self._ended = True
        self._held.forget()
        self._server.channel.fd = -1

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the connection has ended."""
        return self._server.wait_end(seconds)

    def _end(self) -> None:
        with self._lock:
            if self._ended:
                return
            try:
                self._held.unmount()
            except OSError:
                self._held.unmount(lazy=True)
            if self._begun and not self._server.wait_end(GRACE):
                self._hand_over()
                return
            failure = self._server.failure
            self._finish()
        if failure is not None:
            raise OSError(
                errno.ENOTCONN, f"serving the filesystem has ended: {reason(failure)}", self.path
            ) from failure


# What programs call


def mounted(
    fs: Filesystem,
    path: Path | None = None,
    *,
    in_process: bool = False,
    options: Options | None = None,
    strategy: str = "auto",
    threads: int | None = None,
    debug: bool = False,
    log: Log | None = None,
) -> Mounted:
    """Mount a filesystem and serve it in the background: `with fusewire.mounted(fs) as m: os.listdir(m.path)`.

    Without `path` it needs no mount point and no privilege: a user namespace holds the mount, and `m.path` leads there.
    With one, it is mounted there as `mount` does.

    A child serves, forked here: what the program changes in `fs` afterwards is not seen there, and of the program's
    threads there is none (fork before they hold locks that `fs` needs). `in_process` serves with threads of this
    process instead. Then nobody in it may mmap a file of the mount, nor call from C that holds the interpreter's lock
    while it reads there: such a call waits for an answer that waits for it.

    threads: workers, by default as many as suit the filesystem. options: of the kernel, as `fusewire.Options`.

    Raises OSError, `MountError` with a line for each way that was tried, and what the filesystem's `init` raises.
    """
    operations = as_operations(fs)
    chosen = options_for(fs, operations, options)
    target = None if path is None else os.path.join(os.getcwdb(), os.fsencode(path))
    job = Job(operations, target, chosen, strategy, threads, debug, log)
    if not in_process:
        return start_child(job)
    with Quiet() as quiet:
        here = _hold_here(job)
        here.start(quiet)
    return here


def _hold_here(job: Job) -> _InProcess:
    held = hold(job.target, job.options, job.strategy)
    try:
        server = make_server(job.operations, held.fd, job.options, job.threads, job.debug, job.log)
    except BaseException:
        held.unmount(lazy=True)
        held.close()
        raise
    return _InProcess(job.operations, held, server)


def mount(
    fs: Filesystem,
    path: Path,
    *,
    options: Options | None = None,
    strategy: str = "auto",
    threads: int | None = None,
    debug: bool = False,
    log: Log | None = None,
) -> None:
    """Mount a filesystem at `path` and serve it until it is unmounted, or until Ctrl-C, SIGTERM or SIGHUP.

    Root mounts directly, others by fusermount3, or where that does not work in a user namespace: `path` is then a
    symlink to the mount while it lasts. A missing directory is made, and removed at the end. Signals end it only in the
    main thread, and only those that the program does not handle itself.

    The program must not use the mount meanwhile (see `mounted`). Raises as `mounted`.
    """
    from fusewire.linux.wakeup import Wakeup

    operations = as_operations(fs)
    chosen = options_for(fs, operations, options)
    target = os.path.join(os.getcwdb(), os.fsencode(path))
    job = Job(operations, target, chosen, strategy, threads, debug, log)
    told: list[int] = []
    try:
        with Wakeup() as wakeup, _Signals(_give_up) as signals, Quiet() as quiet:

            def end(number: int = 0) -> None:
                told.append(number)
                wakeup.notify()

            here = _hold_here(job)
            here.on_end = end
            with here:
                here.start(quiet)  # it may hang as long as the filesystem likes, so until then a signal interrupts it
                signals.heard = end
                while not told:
                    wakeup.wait()
    except _GivenUp:
        return


class _GivenUp(BaseException):
    """A signal has come before the filesystem was ready."""


def _give_up(number: int) -> None:
    raise _GivenUp(number)


def share(
    fs: Filesystem | Callable[[], Filesystem],
    socket_path: Path,
    *,
    tag: str = "",
    queues: int = 1,
    threads: int = 0,
    once: bool = False,
    mode: int | None = None,
    group: str = "",
    debug: bool = False,
    log: Log | None = None,
) -> None:
    """Serve a filesystem to virtual machines at a Unix socket (virtio-fs) until Ctrl-C, SIGTERM or SIGHUP.

    `fs` is best something to call that makes a filesystem, such as its class: it is called anew whenever a guest
    starts, and `destroy` ends what it gave. A filesystem itself is served to one guest after the other: it meets the
    next one's `init` after `destroy`, and may not mind what the last one has left open or looked up.

    tag: what the guest mounts it by, where the front end does not say. queues: request queues. once: until the first
    front end has gone. mode, group: of the socket, by default 0600. There is no sandbox here: `fusewire share` has one.

    Raises OSError that names the socket.
    """
    from fusewire.linux import listening
    from fusewire.serve_share import ShareServer

    if isinstance(fs, Operations) or not callable(fs):
        whole: Any = fs
        make: Callable[[], Operations] = lambda: as_operations(whole)  # noqa: E731 - two of one kind
    else:
        factory = fs
        make = lambda: as_operations(factory())  # noqa: E731
    held = listening.listen(os.path.abspath(os.fsdecode(socket_path)), mode=mode, group=group)
    try:
        server = ShareServer(
            make,
            held.socket,
            queues=queues,
            tag=os.fsencode(tag),
            threads=threads,
            once=once,
            log=log or _log,
            debug=debug,
        )
        with _Signals(lambda _: server.stop()):
            server.serve()
    finally:
        held.close()


def _log(message: str, error: BaseException | None) -> None:
    import logging

    logging.getLogger("fusewire").warning(message, exc_info=error)


class _Signals:
    """Has signals that would end the program call `heard` instead, where nobody else has asked for them."""

    def __init__(self, heard: Callable[[int], None]) -> None:
        self.heard = heard
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        import signal

        def handle(number: int, frame: FrameType | None) -> None:
            self.heard(number)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, handle)
        return self

    def __exit__(self, *exception: object) -> None:
        import signal

        for number, handler in self._before.items():
            signal.signal(number, handler)
