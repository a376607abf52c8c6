"""A filesystem that a forked child serves for the program, which may then use the mount in any way.

Layer: above serve, below mounts.py; import from there. `InChild` is the program's side, `_Child` the process that
serves. They share a socket: the program asks by one byte, the child answers by one packet.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

from fusewire.linux import mount as mounting
from fusewire.linux import process, syscalls, userns
from fusewire.mounts_held import (
    GRACE,
    LIVE,
    PATIENCE,
    Mounted,
    Quiet,
    check_strategy,
    close_all,
    cover,
    described,
    first_look,
    fork,
    make_server,
    private_directory,
    raise_described,
    reason,
    receive,
    send,
    wait_for,
)

if TYPE_CHECKING:
    from fusewire.linux.mount_base import Mount, Options
    from fusewire.ops import Operations
    from fusewire.serve import Server
    from fusewire.session import Log

# Commands to a child that serves.
_PLAIN, _LAZY, _END = b"u", b"l", b"e"
_MOMENT = 0.2
_SAVING = 30.0  # seconds that `destroy` may take when the mount has ended


class InChild(Mounted):
    """Served by a child, to which a socket leads: it ends when that is closed, or when this process has died."""

    def __init__(self, pid: int, control: int, private: str) -> None:
        self.pid = pid
        self.path = ""
        self._control = control
        self._private = private
        self._tree = self._pidfd = -1
        self._fds: list[int] = []
        try:
            self._pidfd = syscalls.pidfd_open(pid)
        except OSError:
            pass  # Linux before 5.3: the end of the socket says that it has ended, unless another child has a copy
        self._record: dict[str, Any] | None = None
        self._status: int | None = None
        self._gone = False
        self._words = ""
        self._finished = False
        self._unmounted = False
        self._lock = threading.RLock()
        LIVE.add(self)

    def start(self, operations: Operations, quiet: Quiet) -> None:
        """Wait until it serves. Raises what it has failed with."""
        done = False
        try:
            quiet.end()
            message = self._receive()
            if message["kind"] == "mounted":
                self._record = message["record"]
                message = self._receive()
            if message["kind"] == "gone":
                self._abandon()
                done = True
                raise OSError(
                    errno.EIO, f"the process that serves the filesystem {self._fate()} before the mount was ready"
                )
            if message["kind"] != "ready":
                raise_described(message)
            self.path = message["path"]
            if self._fds:
                self._tree = self._fds[0]
                self._fds = []
                if syscalls.get_dumpable() == 1:  # else others may not look into our /proc/PID/fd: the child's will do
                    self.path = f"/proc/{os.readlink('/proc/self')}/fd/{self._tree}"
            first_look(operations, self.path)
            done = True
        finally:
            if not done:
                self._abandon()

    def _receive(self) -> dict[str, Any]:
        """Hear the child, or that it has ended; `_fds` is what came with it."""
        import select

        watch = select.poll()
        for fd in (self._pidfd, self._control):  # in this order: what it has said before it ended is not lost
            if fd >= 0:
                watch.register(fd, select.POLLIN)
        if all(fd != self._control for fd, _ in watch.poll()):
            return {"kind": "gone"}
        with Quiet():
            message, self._fds = receive(self._control, 1)
        return message

    def _abandon(self) -> None:
        """End a child that will not serve: it has said why and is ending, or hangs at its start."""
        os.close(self._control)
        self._control, self._gone = -1, True
        held = process.hold(self.pid, process.start_time(self.pid) or 0)
        if held is not None:
            with held:
                if not held.wait(_MOMENT):
                    held.kill(15)
                    if not held.wait(PATIENCE):
                        held.kill(9)
        self._finish()

    def unmount(self, lazy: bool = False) -> None:
        with self._lock:
            if self._finished or self._unmounted:
                return
            if self._status is not None:
                self._end()
                return
            # Our own descriptor would keep it busy; the number stays taken, or `path` would soon lead to another file.
            if self._tree >= 0:
                cover(self._tree)
            self._tell(_LAZY if lazy else _PLAIN)
            message = self._receive()
            if message["kind"] == "done":
                self._unmounted = True
                if not lazy:
                    self._finish()
                return
            if message["kind"] in ("gone", "ended"):
                self._hear(message)
                self._finish()
                if self._status != 0:
                    self.check()
                return
            if self._fds:
                os.dup2(self._fds[0], self._tree, inheritable=False)
                os.close(self._fds.pop())
            raise_described(message)

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return self._status is None and not self._has_ended()

    def _has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # the program waits for any children, and has taken our status
            return True

    def check(self) -> None:
        with self._lock:
            if self.is_alive:
                return
            self._reap()
            raise OSError(
                errno.ENOTCONN,
                f"the filesystem is not served any more: process {self.pid} {self._fate()}",
                self.path,
            )

    def _fate(self) -> str:
        if self._status is None or self._status < 0:
            return "has ended, nobody knows how"
        if os.WIFSIGNALED(self._status):
            return f"was killed by signal {os.WTERMSIG(self._status)}"
        if self._words:
            return f"has ended: {self._words}"
        if self._status:
            return f"has ended with status {os.waitstatus_to_exitcode(self._status)}"
        return "has ended, as the mount was unmounted"

    def forget(self) -> None:
        self._status, self._finished = 0, True
        self._close()

    def _close(self) -> None:
        LIVE.discard(self)
        close_all(self._control, self._tree, self._pidfd, *self._fds)
        self._control = self._tree = self._pidfd = -1
        self._fds = []

    def _hear(self, message: dict[str, Any]) -> None:
        self._gone = message["kind"] == "gone"
        self._words = str(message.get("text", self._words))

    def _reap(self) -> None:
        """Wait for the end of the child, and hear its last words."""
        while self._status is None and not self._gone:
            self._hear(self._receive())
        if self._status is None:
            self._status = wait_for(self.pid)

    def _finish(self) -> None:
        """Let go of it all, and clear up after a child that could not do it itself."""
        self._reap()
        self._finished = True
        self._close()
        if self._status != 0 and self._record is not None:
            try:
                mounting.clean_up(self._record)
            except OSError:
                pass  # `check` says that it is dead; whoever comes there hears ENOTCONN
        try:
            os.rmdir(self._private)
        except OSError:
            pass  # the child has done it

    def _end(self) -> None:
        with self._lock:
            if self._finished:
                return
            died = not self._unmounted and not self.is_alive
            if not died and not self._unmounted:
                try:
                    self.unmount()
                except OSError as error:
                    died = error.errno != errno.EBUSY
            if not self._finished:
                if self._tree >= 0:
                    cover(self._tree)
                if self._status is None:
                    self._tell(_END)
            self._finish()
            if died and self._status != 0:
                self.check()

    def _tell(self, command: bytes) -> None:
        try:
            os.write(self._control, command)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; what it has said before is still to be read

    def __del__(self) -> None:
        """End a mount that nobody can name any more."""
        if not getattr(self, "_finished", True):
            try:
                import warnings
            except ImportError:  # Python is ending, and that ends the child
                return
            try:
                warnings.warn(f"{self.path} was mounted and not unmounted: use `with`", ResourceWarning, stacklevel=2)
            finally:  # that may be an error
                self._end()


# The child


class Job:
    """What a child is to serve where, and how."""

    def __init__(
        self,
        operations: Operations,
        target: bytes | None,
        options: Options,
        strategy: str,
        threads: int | None,
        debug: bool,
        log: Log | None,
    ) -> None:
        check_strategy(target, strategy)
        self.operations = operations
        self.target = target
        self.options = options
        self.strategy = strategy if target is not None else "namespace"
        self.threads = threads
        self.debug = debug
        self.log = log


def start_child(job: Job) -> InChild:
    with Quiet() as quiet:
        found = _fork(job)
        found.start(job.operations, quiet)
    return found


def _fork(job: Job) -> InChild:
    private = private_directory()
    found = None
    parent = -1
    fds: tuple[int, ...] = ()
    try:
        ours, theirs = fds = process.socket_pair(packets=True)
        program = os.getpid()
        try:
            parent = syscalls.pidfd_open(program)
        except OSError:
            pass  # Linux before 5.3: the socket's end says that we have died, unless another child has a copy of it
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or the child writes the same again
        pid = fork(quiet=False)
        if pid == 0:
            os.close(ours)
            _run_child(job, theirs, program, parent, private)
        found = InChild(pid, ours, private)
        return found
    finally:
        close_all(parent, *fds[1:])
        if found is None:  # no child could be made
            close_all(*fds[:1])
            os.rmdir(private)


def _run_child(job: Job, control: int, program: int, parent: int, private: str) -> NoReturn:
    """Serve, and end: neither the program's exit handlers nor its `finally` clauses are this process's business."""
    status = 1
    try:
        _become_server()
        status = _Child(job, control, program, parent, private).run()
    except BaseException as error:  # noqa: BLE001 - the child's last stop
        try:
            send(control, described(error))
        except OSError:
            pass  # nobody is there to be told
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        finally:
            os._exit(status)


def _become_server() -> None:
    """Leave the program's terminal and signals. The working directory becomes /, so that it keeps nobody's busy."""
    import gc
    import signal

    signal.set_wakeup_fd(-1)  # an event loop of the program's would hear of our signals
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)  # the filesystem may hang at its start: until it is ready, that ends us
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    if null:
        os.dup2(null, 0)
        os.close(null)
    gc.freeze()
    sys.setswitchinterval(0.0002)  # whoever waits to answer gets the interpreter after 0.2 ms instead of 5


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


class _Child:
    """The process that serves. `program` is the pid of the one that wants it, `parent` a pidfd of it or -1."""

    def __init__(self, job: Job, control: int, program: int, parent: int, private: str) -> None:
        self._job = job
        self._control = control
        self._program = program
        self._parent = parent
        self._private = private
        self._ended = os.eventfd(0, os.EFD_CLOEXEC)
        self._mount: Mount | None = None
        self._server: Server | None = None
        self._left = False
        LIVE.add(self)

    def forget(self) -> None:
        """Close our copies, in a process that the filesystem has forked: they would keep the mount busy, or alive."""
        close_all(self._control, getattr(self._mount, "fd", -1), getattr(self._mount, "_tree", -1))

    def run(self) -> int:
        """Mount, serve until the mount is gone or the program does not want it any more; give the exit status."""
        try:
            server = self._begin()
            self._attend()
        finally:
            self._clear_up()
        if server.failure is not None:
            send(self._control, {"kind": "ended", "text": reason(server.failure)})
            return 1
        return 0

    def _begin(self) -> Server:
        import signal

        job = self._job
        self._die_with_program(signal.SIGTERM)
        self._mount = held = mounting.mount(job.target, job.options, job.strategy, private=os.fsencode(self._private))
        self._die_with_program(signal.SIGTERM)  # forgotten where a user namespace was entered
        send(self._control, {"kind": "mounted", "record": held.record()})  # to clear up, if `init` ends this process
        job.operations.serve_namespace(*userns.maps_of(os.getpid()))
        server = make_server(job.operations, held.fd, job.options, job.threads, job.debug, job.log)
        self._server = server
        server.on_end = lambda: os.eventfd_write(self._ended, 1)
        server.begin()
        signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(self._ended, 1))
        self._die_with_program(0)  # it would come with the end of the thread that has forked us
        path = held.outside if held.outside is not None and job.target is None else held.target
        send(self._control, {"kind": "ready", "path": os.fsdecode(path)}, self._tree())
        return server

    def _die_with_program(self, number: int) -> None:
        """Get a signal when the program dies, while nobody looks whether it does; 0: none any more."""
        try:
            process.set_pdeathsig(number, self._program)
        except ProcessLookupError:
            if number:
                raise

    def _tree(self) -> list[int]:
        """The descriptor that makes up the mount's path, if it has no other place."""
        if self._job.target is not None or self._mount is None or self._mount.outside is None:
            return []
        return [int(os.path.basename(self._mount.outside))]

    def _attend(self) -> None:
        """Do as the program says until the end."""
        import select

        watch = select.poll()
        for fd in (self._control, self._parent, self._ended):
            if fd >= 0:
                watch.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in watch.poll()}
            if ready & {self._parent, self._ended}:
                return
            try:
                command = os.read(self._control, 1)
            except ConnectionResetError:
                return
            if command not in (_PLAIN, _LAZY) or self._unmount(lazy=command == _LAZY):
                return

    def _unmount(self, *, lazy: bool) -> bool:
        """Unmount, say so; True if that was the end."""
        assert self._mount is not None
        try:
            self._mount.unmount(lazy=lazy)
        except OSError as error:
            send(self._control, described(error), self._tree())
            return False
        self._left = True
        send(self._control, {"kind": "done"})
        return not lazy or self._mount.stays

    def _clear_up(self) -> None:
        held, server = self._mount, self._server
        if held is not None:
            patience = GRACE if server is not None and server.session.ready and not held.stays else 0.0
            try:
                if not self._left:
                    held.unmount(lazy=True)
            except OSError:
                patience = 0.0  # it ends with this process
            if server is not None and not server.wait_end(patience) and not server.session.close():
                server.wait_end(_SAVING)  # the last worker is in `destroy`
        try:
            os.rmdir(self._private)
        except OSError:
            pass  # somebody has cleared up in /tmp
