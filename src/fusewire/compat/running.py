"""Mounting and serving one program's filesystem, as `FUSE()` does it: until it is unmounted, or a signal ends it.

Layer `compat`, the only module of it that starts threads and changes signal handlers; it puts both back.
"""

from __future__ import annotations

import errno
import os
import signal
import threading

from fusewire.compat import keeper
from fusewire.compat.context import CONTEXT
from fusewire.linux import mount as mounting
from fusewire.linux import process
from fusewire.serve import DEFAULT_THREADS, Server, guarded
from fusewire.session import Session
from fusewire.trace import trace_to_stderr
from fusewire.transport.devfuse import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.compat.bridge import Bridge
    from fusewire.compat.options import Settings
    from fusewire.linux.mount_base import Mount, Options

# A program's methods wait for networks, and for each other: as libfuse, start more when all of them do. The limit is
# ours, since each has a buffer of 1 MiB.
_THREADS = max(10, DEFAULT_THREADS)
_MOST_THREADS = 200
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)  # as fuse_set_signal_handlers(3) of libfuse
# Who still has a file open when the mount is told to end gets ENOTCONN after so many seconds, as at once with libfuse.
_PATIENCE = 1.0
_KICKS = 200
_KICK_PAUSE = 0.02


class Held:
    """A mount of this process's, and how to end it. `owner`: the only ids that it knows, if it knows no others."""

    def __init__(self, target: bytes, options: Options) -> None:
        """Mount by the first way that works: `linux.mount`'s, but for a namespace, which a keeper holds.

        Raises MountError, with a line for each way.
        """
        self.owner: tuple[int, int] | None = None
        self.failure: str | None = None
        self._mount: Mount | None = None
        self._keeper = self._socket = -1
        self._lock = threading.Lock()
        attempts: list[tuple[str, str, str]] = []
        number = errno.EPERM
        for strategy in ("fd", "direct", "fusermount3"):
            try:
                self._mount = mounting.mount(target, options, strategy)
            except mounting.MountError as error:
                number = error.errno or number
                attempts += error.attempts
            else:
                self.fd, self._mount.fd = self._mount.fd, -1  # the channel owns it from now on
                self.strategy = strategy
                return
        try:
            self._keeper, self._socket = keeper.start()
            answer, self.fd = keeper.ask(self._socket, target, options)
        except OSError as error:
            self.unmount()
            found = getattr(error, "attempts", [("namespace", str(error.strerror or error), "")])
            raise mounting.MountError(error.errno or number, target, attempts + found) from None
        self.strategy = "namespace"
        if answer["new_user"]:
            self.owner = os.geteuid(), os.getegid()

    def wait_shown(self) -> None:
        """Wait until the mount is there for all, in a process that does not serve it.

        Raises OSError if that fails.
        """
        os.close(self.fd)  # else we would keep alive what a dead server leaves unanswered
        if self._socket >= 0 and (failure := keeper.wait_shown(self._socket)) is not None:
            raise OSError(errno.EIO, failure)

    def unmount(self) -> None:
        """Take the mount away from sight, and put back what was there; who has files open keeps them for now."""
        with self._lock:
            held, self._mount = self._mount, None
            sock, self._socket = self._socket, -1
        if held is not None:
            self._unmount(held)
        if sock >= 0:
            self._end_keeper(sock)

    def _unmount(self, held: Mount) -> None:
        # `Mount` looks whether it is connected by a descriptor of its own; the channel's may be closed by now.
        try:
            held.fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) if self.fd < 0 else os.dup(self.fd)
            held.unmount(lazy=True)
        except OSError as error:
            raise OSError(error.errno, f"cannot unmount: {error.strerror}", os.fsdecode(held.target)) from error
        finally:
            try:
                held.close()
            except ChildProcessError:  # the helper of auto_unmount, which is a child of the process we were forked from
                pass

    def _end_keeper(self, sock: int) -> None:
        import socket

        said = b""
        with socket.socket(fileno=sock) as connection:
            try:
                connection.shutdown(socket.SHUT_WR)  # our forked children may hold copies of it
                while part := connection.recv(1 << 16):  # until it has ended
                    said += part
            except OSError:
                pass  # it has
        try:
            os.waitpid(self._keeper, 0)
        except ChildProcessError:
            pass  # it is a child of the process that we were forked from
        if b'"failed"' in said:
            import json

            self.failure = json.loads(said.splitlines()[0])["failed"]


class Runner:
    """Serves one mount in this process."""

    def __init__(self, bridge: Bridge, held: Held, settings: Settings) -> None:
        """Prepare to serve; takes over the mount and its descriptor."""
        self._bridge = bridge
        self._held = held
        self._settings = settings
        self._server: Server | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._ending: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}
        self._watch: threading.Thread | None = None
        self._told = self._tell = self._told_before = -1
        self._main = threading.get_ident()
        self.failure: BaseException | None = None
        bridge.on_critical = self.end
        max_write = settings.max_write or 1 << 20
        if settings.nothreads:
            self._session = Session(bridge, max_write=max_write)
            self._channel = Channel(held.fd, self._session)
        else:
            server = self._server = Server(
                bridge,
                held.fd,
                threads=settings.max_threads or _THREADS,
                clone_fd=settings.clone_fd,
                debug=settings.debug,
                max_write=max_write,
            )
            self._session, self._channel = server.session, server.channel
            server.on_end = self._ended.set
        self._tune()

    def _tune(self) -> None:
        settings, session = self._settings, self._session
        session.limit(settings.max_readahead, settings.max_background, settings.congestion_threshold)
        if settings.kernel.allow_root:
            session.handle = guarded(session.handle, os.getuid(), os.getgid())  # type: ignore[method-assign, assignment]
        handle = session.handle

        server = None if settings.max_threads else self._server
        busy: list[None] = []

        def in_context(request: Any) -> Any:
            CONTEXT.request = request
            CONTEXT.runner = self
            if server is None:
                return handle(request)
            busy.append(None)
            if len(busy) == len(server.workers) < _MOST_THREADS and session.ready:
                self._add_worker(server)
            try:
                return handle(request)
            finally:
                busy.pop()

        session.handle = in_context  # type: ignore[method-assign]

    def _add_worker(self, server: Server) -> None:
        try:
            server.add_worker()
        except OSError as error:
            self._session.log_once(f"no more workers: {error.strerror}")

    def run(self) -> None:
        """Serve until the mount is gone, or `end`; in this very thread with `nothreads`, as libfuse does."""
        import atexit

        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            self._catch()
        else:
            atexit.register(self._held.unmount)  # a daemon thread, which the interpreter does not wait for
        try:
            if self._server is None:
                self._serve_here()
            else:
                self._server.start()
                self._ended.wait()
                self.failure = self._server.failure
        finally:
            try:
                self._finish()
            finally:
                if in_main:
                    self._restore()
                else:
                    atexit.unregister(self._held.unmount)

    def _serve_here(self) -> None:
        try:
            self._channel.serve(trace_to_stderr if self._settings.debug else None)
        except OSError as error:
            self.failure = error
        finally:
            self._session.close()
            self._ended.set()
            CONTEXT.request = CONTEXT.runner = None

    def _finish(self) -> None:
        if not self._ended.is_set():  # an exception of a signal handler of the program's
            self.end()
        if self._ending is not None:
            self._ending.join()
        self._session.close()
        try:
            self._held.unmount()
        finally:
            self._channel.close()
        if self._held.failure is not None:
            self.failure = OSError(errno.EIO, self._held.failure)

    def end(self) -> None:
        """Have `run` return soon; from any thread."""
        with self._lock:
            if self._ending is not None:
                return
            # A thread of its own: unmounting may wait for an answer of ours.
            self._ending = threading.Thread(target=self._leave, name="fuse-end", daemon=True)
        self._ending.start()

    def _leave(self) -> None:
        try:
            self._held.unmount()
        except OSError as error:
            self.failure = self.failure or error
        if self._ended.wait(_PATIENCE):
            return
        # Somebody has a file open there. With the last descriptor they get ENOTCONN, but a thread that sits in read(2)
        # holds it: a signal, which the interpreter does nothing about in such a thread, has it look again.
        self._channel.close()
        number = next(iter(self._handlers), None)
        for _ in range(_KICKS):
            if number is not None:
                self._kick(number)
            if self._ended.wait(_KICK_PAUSE):
                return
        self._ended.set()  # a method of the program's does not come back: it is left alone with its thread

    def _kick(self, number: int) -> None:
        if self._server is None:
            signal.pthread_kill(self._main, number)
            return
        for thread in threading.enumerate():
            if thread in self._server.workers and thread.ident is not None:
                signal.pthread_kill(thread.ident, number)

    def _catch(self) -> None:
        # A thread hears of signals; a handler would wait for ever if one came right before the main thread sleeps, and
        # would find the lock taken by that thread itself if one came while it is in `end`.
        self._told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._told_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._watch_signals, name="fuse-signals", daemon=True)
        self._watch.start()
        for number in _ENDING:
            handler = signal.getsignal(number)
            if number == signal.SIGINT or handler is signal.SIG_DFL:  # SIGINT even from the program, as fusepy
                self._handlers[number] = handler
                signal.signal(number, lambda *_: None)

    def _watch_signals(self) -> None:
        while number := os.read(self._told, 1)[0]:
            if number in self._handlers:
                self.end()

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._told_before)
        os.write(self._tell, b"\0")  # not closed: a child that the program has forked may have a copy
        if self._watch is not None:
            self._watch.join()
        os.close(self._tell)
        os.close(self._told)
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def go_to_background(held: Held) -> None:
    """Go on in a child that has left the terminal; this process ends when the mount is there, without cleaning up.

    As fuse_daemonize(3) of libfuse: what waits for the program goes on, and can use the mount.

    Raises OSError, in the process that has called, if nobody will see the mount.
    """
    import sys

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "flush"):  # a program may have put anything there
            stream.flush()
    if os.fork():
        held.wait_shown()
        os._exit(0)
    process.detach_from_terminal()
