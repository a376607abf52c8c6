"""Mounts served by a process of their own, which is locked in before it reads the first request.

Layer `cli`. Who holds a mount (its record, its namespace, what was made for it) stays outside and never reads a byte
of an image or of a request: a `ServerProcess` is what it sees of the child that does. They speak by packets on a socket
pair, the first byte of which says what one is:

  to the child    M mount number, uid_map, gid_map, 1 or 0, each with NUL, and descriptors: serve this mount
                  S: how many requests have there been?      (end of file): end
  from the child  R: the mount is served     E text: it cannot be, and why     D: the connection of a mount has ended
                  S requests, blank, bad replies

The child dies with the process that started it; when it dies alone, that one hears the end of the socket.
"""

from __future__ import annotations

import _socket
import errno
import os
import time
from _queue import Empty, SimpleQueue

from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from fusewire.cli.options import MountOptions
    from fusewire.cli.source import Source
    from fusewire.linux.sandbox_plan import Plan, SandboxError
    from fusewire.linux.sandbox_steps import Entered
    from fusewire.serve import Server

_PACKET = 1 << 16
_MOST_FDS = 253  # SCM_MAX_FD, unix(7)
_ANSWER = 0.7  # seconds that a child may take to say how it is; whoever asks us waits no longer than one
# Seconds that it may take to end; and where it may have something to save: one that is a program, or sends to a store.
_FAREWELL, _LONG_FAREWELL = 1.0, 30.0

# What the server of a directory keeps of the holder's capabilities beside those of every server of files: without them
# backing files, trusted attributes, file handles, immutable files, reserved blocks and labels would be lost.
_OF_FILES = ("sys_admin", "dac_read_search", "linux_immutable", "sys_resource", "mac_admin", "mac_override")


class Locks:
    """How a server is to be locked in: the words of --sandbox, --landlock and --seccomp.

    auto, for the sandbox: whatever costs no function. The server of images needs no file but those, and gets the
    strongest mode that works here. The server of a directory keeps its root, for it looks up the groups of callers in
    /proc. For the filter: kill, or none where there is no libseccomp.
    """

    __slots__ = ("landlock", "sandbox", "seccomp")

    def __init__(self, sandbox: str = "auto", landlock: str = "auto", seccomp: str = "auto") -> None:
        self.sandbox = sandbox
        self.landlock = landlock
        self.seccomp = seccomp

    def plan(self, source: Source | None, attempt: Callable[[Plan], SandboxError | None] | None = None) -> Plan:
        """Give the steps for the server of a directory, or of images (None). Raises OSError: none can be had."""
        from fusewire.linux import caller, sandbox, syscalls
        from fusewire.linux import capabilities as caps

        directory = None if source is None else source.directory
        if source is None or directory is None:
            return sandbox.plan(self.sandbox, shared=None, landlock=self.landlock, child=True, attempt=attempt)
        own = syscalls.capget()
        return sandbox.plan(
            "none" if self.sandbox == "auto" else self.sandbox,
            shared=directory,
            capabilities=own,
            modcaps=[(name, True) for name in _OF_FILES if own.permitted >> caps.number(name) & 1],
            handles=source.by_handle,
            landlock=self.landlock,
            writable=not source.read_only,
            readable=(b"/proc",) if caller.can_switch() else (),
            executes=True,
            child=True,
            attempt=attempt,
        )

    def asked(self) -> list[str]:
        """What was asked for, as opposed to what comes by itself."""
        words = (("sandbox", self.sandbox), ("landlock", self.landlock), ("seccomp", self.seccomp))
        return [f"--{name} {value}" for name, value in words if value not in ("auto", "none", "off")]

    def filter(self) -> tuple[str, str]:
        """Give the action of the system call filter, and why there is none where that was not asked for.

        The library is loaded by this, where it can still be found. Raises OSError: it was asked for and is missing.
        """
        if self.seccomp == "none":
            return "none", ""
        from fusewire.linux import seccomp_filter

        try:
            seccomp_filter.check()
        except OSError as error:
            if self.seccomp != "auto":
                raise
            return "none", str(error.strerror)
        return "kill" if self.seccomp == "auto" else self.seccomp, ""


class ServerProcess:
    """The server of some mounts, seen from the process that holds them. `pid` is its process id.

    on_end: called from another thread when a connection or the process has ended. summary: how it is locked in.
    """

    def __init__(
        self,
        sources: list[Source],
        options: MountOptions,
        locks: Locks,
        owner: tuple[int, int] | None = None,
        *,
        silent: bool = False,
    ) -> None:
        """Start it, locked in: for images, or for one directory. It serves nothing yet. Sources are closed here.

        owner: as for `make_server`. silent: faults that it finds are not reported on standard error. The calling
        process must have one thread. Raises OSError that says what failed.
        """
        from fusewire.linux import sandbox_enter
        from fusewire.linux.sandbox_plan import SandboxError
        from fusewire.linux.userns import in_first_namespace

        self.on_end: Callable[[], None] | None = None
        self.started = time.monotonic()
        self.pid = -1
        self._ended: threading.Event | None = None
        self._answers: SimpleQueue[bytes] = SimpleQueue()
        self._left = 0
        self._hung_up = False
        self._status: int | None = None
        self._farewell = _LONG_FAREWELL if sources[0].is_free else _FAREWELL
        action, lacking = ("none", "") if sources[0].is_free else locks.filter()
        ours, theirs = process.socket_pair(packets=True)
        directory = next((source for source in sources if source.directory is not None), None)
        if directory is not None:
            directory.drop_first()  # its descriptors would be closed under it
        child = _Child(sources, options, owner or (os.getuid(), os.getgid()), theirs, silent)
        keep = [theirs, *(fd for source in sources for fd in source.files_of_first)]
        for source in sources:
            source.preload()

        def start(plan: Plan) -> SandboxError | None:
            nonlocal action, lacking
            child.trusted = in_first_namespace() and not plan.new_user
            try:
                self.pid = sandbox_enter.start(
                    plan, child.serve, keep=keep, imports=_import_all, seccomp=_loader(action)
                )
            except SandboxError as error:
                if error.step != "seccomp" or locks.seccomp != "auto":
                    return error
                action, lacking = "none", str(error.strerror)
                return start(plan)
            return None

        try:
            if any(source.is_free for source in sources):
                sources[0].refuse_locks(locks.asked())
                self.pid = _start_free(child, set(sources[0].strange) - {0, 1, 2, theirs} | {ours})
                self.summary = f"sandbox: none, for it is a {sources[0].kind}"
            else:
                plan = locks.plan(directory, start)
                if self.pid < 0 and (failure := start(plan)) is not None:  # not tried yet: a mode that was asked for
                    raise failure
                self.summary = f"{plan.summary()}; seccomp {action}" + (f" ({lacking})" if lacking else "")
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
            for source in sources:
                source.close()
        self._wire = ours

    def add(self, number: int, fds: list[int], pid: int) -> None:
        """Serve the mount of source `number`: a /dev/fuse descriptor, then spare ones to clone it onto.

        pid: a process in the mount's user namespace, whose ids are spoken. Gives up nothing of `fds`.
        Raises OSError: it cannot be served, or the process has ended.
        """
        from fusewire.cli.messages import describe
        from fusewire.linux.userns import maps_of

        if self._ended is None:
            self._listen()
        uids, gids, inside = maps_of(pid)
        self._left += 1
        try:
            process.send_fds(self._wire, f"M{number}\0{uids}\0{gids}\0{inside:d}".encode(), fds)
        except BrokenPipeError:
            pass  # it has ended, which is heard from the other thread
        answer = self._answers.get()
        if not answer:
            raise OSError(errno.EIO, f"the server died ({describe(self.died)})")
        if answer[:1] != b"R":
            raise OSError(errno.EIO, os.fsdecode(answer[1:]))

    def _listen(self) -> None:
        import threading

        ended = threading.Event()
        try:
            threading.Thread(target=self._hear, args=(ended,), name="server", daemon=True).start()
        except RuntimeError as error:
            raise OSError(
                errno.EAGAIN, f"no thread to hear the server: {error} (raise `ulimit -u` or `ulimit -v`)"
            ) from error
        self._ended = ended

    def _hear(self, ended: threading.Event) -> None:
        packet = b"?"
        while packet:
            try:
                packet = os.read(self._wire, _PACKET)
            except OSError:
                packet = b""
            if packet[:1] != b"D":
                self._answers.put(packet)  # at the end too, for whoever waits for an answer
                if packet:
                    continue
            else:
                self._left -= 1
            if not packet:
                self._hung_up = True
            if not packet or not self._left:
                ended.set()
            if self.on_end is not None:
                self.on_end()

    def counts(self) -> tuple[int, int]:
        """How many requests have been served, and how many answers the kernel would have refused.

        Raises TimeoutError if the process does not say: it hangs, or has ended.
        """
        try:
            os.write(self._wire, b"S")
            requests, bad_replies = self._answers.get(timeout=_ANSWER)[1:].split()
        except (OSError, Empty, ValueError):
            raise TimeoutError(errno.ETIMEDOUT, f"the server (pid {self.pid}) gives no answer") from None
        return int(requests), int(bad_replies)

    def wait_end(self, timeout: float | None = None) -> bool:
        """Wait until all connections have ended, or the process has; False when time ran out."""
        return self._ended is None or self._ended.wait(timeout)

    @property
    def died(self) -> int:
        """Its wait status if it has ended by itself, though nobody told it to; 0 if it has not."""
        if self._status is None and self._hung_up:
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status or 0

    def close(self) -> None:
        """End it: callers who wait for an answer get ENOTCONN, once this process has closed its descriptors too."""
        if self.pid < 0:
            return
        import signal

        if self._status is None:
            _socket_shutdown(self._wire)
            held = process.hold(self.pid, process.start_time(self.pid) or 0)
            if held is not None:
                with held:
                    if not held.wait(self._farewell):
                        held.kill(signal.SIGKILL)
                        held.wait(_FAREWELL)
            try:
                self._status = os.waitpid(self.pid, os.WNOHANG)[1]
            except ChildProcessError:
                self._status = 0
        self.pid = -1
        if self._ended is None:
            os.close(self._wire)  # else the other thread reads from it, and it goes with this process


def _start_free(child: _Child, close: set[int]) -> int:
    """Start a server that is not locked in, without some descriptors; it ends with this process too."""
    import signal

    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        process.close_inherited_fds(set(process.open_fds()) - close)
        process.set_pdeathsig(signal.SIGKILL, parent)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        status = child.serve(None)
    except BaseException:  # noqa: BLE001 - the child's last stop
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _socket_shutdown(fd: int) -> None:
    borrowed = _socket.socket(fileno=fd)
    try:
        borrowed.shutdown(_socket.SHUT_RDWR)
    except OSError:
        pass  # the other end has gone
    finally:
        borrowed.detach()


def _import_all() -> None:
    """Load what serving takes, and its end: in there no module and no library is found."""
    import fcntl  # noqa: F401
    import resource  # noqa: F401
    import threading  # noqa: F401

    import fusewire.cli.messages
    import fusewire.cli.serving
    import fusewire.serve  # noqa: F401


def _loader(action: str) -> Callable[[], None] | None:
    if action == "none":
        return None

    def load() -> None:
        from fusewire.linux import seccomp_filter

        seccomp_filter.load(action)

    return load


# Inside


class _Child:
    """The server's own side."""

    def __init__(
        self, sources: list[Source], options: MountOptions, owner: tuple[int, int], wire: int, silent: bool
    ) -> None:
        self._silent = silent
        self._sources = sources
        self._options = options
        self._owner = owner
        self._wire = wire
        self._servers: list[Server] = []
        self.trusted = False  # capabilities count in the first user namespace

    def serve(self, entered: Entered | None) -> int:
        """Do what the other side asks for until it hangs up; entered: the sandbox, if it is in one."""
        from fusewire.cli.serving import log_to_stderr, tune_process

        # Standard input is /dev/null by now. Whoever reads our starter's output is not to wait for us, and whoever
        # reads its errors only if we are to report any.
        for fd in (1, 2) if self._silent else (1,):
            os.dup2(0, fd)
        if entered is not None:
            for note in entered.notes if self._options.debug else ():
                log_to_stderr(f"sandbox: {note}")
            for source in self._sources:
                if source.directory is not None:
                    source.move_in(entered, trusted=self.trusted)
        tune_process()
        while True:
            try:
                packet, fds = process.recv_fds(self._wire, _PACKET, _MOST_FDS)
            except ConnectionResetError:
                break  # it has hung up, and has not read the last that we said
            if packet[:1] == b"M":
                answer = self._add(packet[1:], fds)
            elif packet[:1] == b"S":
                requests = sum(server.requests for server in self._servers)
                answer = b"S%d %d" % (requests, sum(server.session.bad_replies for server in self._servers))
            else:
                break
            try:
                os.write(self._wire, answer)
            except BrokenPipeError:
                break
        for server in self._servers:
            if not server.session.close():
                server.wait_end()  # its last worker is ending the filesystem, which may have something to save
        return 0

    def _add(self, packet: bytes, fds: list[int]) -> bytes:
        from fusewire.cli.messages import explain
        from fusewire.cli.serving import make_server

        number, uids, gids, inside = packet.split(b"\0")
        try:
            filesystem = self._sources[int(number)]()
            filesystem.serve_namespace(uids.decode(), gids.decode(), inside == b"1")
            server = make_server(filesystem, fds[0], self._options, self._owner, devices=fds[1:])
            server.on_end = self._say_end
            self._servers.append(server)
            server.begin()
        except OSError as error:
            return b"E" + os.fsencode(explain(error))
        return b"R"

    def _say_end(self) -> None:
        try:
            os.write(self._wire, b"D")
        except OSError:
            pass  # nobody listens any more
