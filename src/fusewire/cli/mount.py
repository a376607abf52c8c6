"""`fusewire mount SOURCE TARGET`: a server in the background, a mount that every shell of the user can use.

Layer `cli`. The process that was started forks the server, waits on a pipe until INIT has been answered, and leaves.
The server is the holder of the mount, in a session of its own; it never looks into the mount.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from fusewire.cli import background, state
from fusewire.cli.control import ControlServer
from fusewire.cli.messages import describe, explain
from fusewire.cli.supervise import EXIT_FAILED
from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.cli.options import MountOptions
    from fusewire.cli.server_process import Locks, ServerProcess
    from fusewire.cli.source import Source
    from fusewire.linux.mount_base import Mount

_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
_PATIENCE = 5.0
_GRACE = 0.5


class Job:
    """What to mount where, and how."""

    __slots__ = ("as_json", "foreground", "locks", "maps", "options", "program", "source", "strategy", "target")

    def __init__(
        self,
        source: str,
        target: str,
        options: MountOptions,
        *,
        strategy: str = "auto",
        maps: str = "self",
        foreground: bool = False,
        as_json: bool = False,
        program: str | None = None,
        locks: Locks | None = None,
    ) -> None:
        self.locks = locks
        self.source = source
        self.target = target
        self.options = options
        self.strategy = strategy
        self.maps = maps
        self.foreground = foreground
        self.as_json = as_json
        self.program = program


def mount(job: Job) -> int:
    """Mount, and give the exit status: 0 once the mount can be used."""
    if job.foreground:
        try:
            _Daemon(job).run(None)
        except OSError as error:
            print(f"fusewire: {explain(error)}", file=sys.stderr)
            return EXIT_FAILED
        return 0

    def serve(tell: int) -> int:
        _Daemon(job).run(tell)
        return 0

    return background.start(
        serve,
        keep=_named_fds(job),
        name="fusewire",
        died="the server died before the mount was ready",
        failed=EXIT_FAILED,
        give_up=_give_up,
    )


def _give_up(server: int) -> None:
    """End a server that has not mounted yet: it may hang, in a source that somebody has lost patience with."""
    start = process.start_time(server) or 0
    held = process.hold(server, start)
    if held is not None:
        with held:
            held.kill(signal.SIGTERM)
            if held.wait(_GRACE):
                return  # it has undone what it had begun
            held.kill(signal.SIGKILL)
            if not held.wait(_GRACE):
                return  # it hangs in the kernel; `umount` clears up once that has let it go
    from fusewire.cli import umount

    store = state.of_user(os.environ)
    umount.umount([record.id for record in store.load_all()[0] if (record.pid, record.starttime) == (server, start)])


def _named_fds(job: Job) -> list[int]:
    """Give the descriptors that the command line names as /dev/fd/N."""
    found = []
    for path in (job.source, job.target):
        directory, _, number = path.rpartition("/")
        if directory in ("/dev/fd", "/proc/self/fd") and number.isdecimal():
            found.append(int(number))
    return found


def _before(target: str) -> dict[str, Any] | None:
    """What is at a target before anything is mounted there, as `Record.created`; None if nobody could mount there."""
    import stat

    from fusewire.linux import mount_base, mount_namespace, mountinfo

    try:
        place = mount_base.locate(os.fsencode(target.rstrip("/") or "/"))
    except OSError:  # the strategies say why, each
        return None
    try:
        mode = stat.S_IMODE(os.lstat(place).st_mode)
    except FileNotFoundError:
        mode = None
    except OSError:  # a dead mount
        return None
    over = mountinfo.at(place)
    return {
        "kind": "missing" if mode is None else "empty-directory",
        "mode": mode,
        "place": os.fsdecode(place),
        "parent": mount_base.identity(os.stat(os.path.dirname(place))),
        "aside": os.fsdecode(mount_namespace.aside_name(place)),
        "mount_id": None if over is None else over.id,
    }


class _FirstLooker:
    """A process that looks at the mount first, for its holder must not. It waits until that is served."""

    def __init__(self, path: bytes, fd: int) -> None:
        """`fd` is the mount's own descriptor: who held it would wait for himself if it is never served."""
        from fusewire.linux.mount_base import first_look

        told, self._tell = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._tell)
                os.close(fd)
                if os.read(told, 1):
                    first_look(path)
            finally:
                os._exit(0)
        os.close(told)

    def end(self, *, look: bool) -> None:
        """Have it look, or not, and wait for its end."""
        if look:
            os.write(self._tell, b"g")
        os.close(self._tell)
        os.waitpid(self._pid, 0)


class _Daemon:
    """The server process of one mount, from opening the source to clearing up."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.store = state.of_user(os.environ)
        self.record: state.Record | None = None
        self.mount: Mount | None = None
        self.server: ServerProcess | None = None

    def run(self, tell: int | None) -> None:
        """Mount, report, serve until the mount is gone, clear up."""
        from fusewire.cli.serving import own_ids_inside
        from fusewire.cli.source import Source

        control = None
        process.allow_owner()
        # A source may hang as long as it likes, so that any of these signals ends us: nothing has been made yet. From
        # then on they wait until we look for them.
        on_interrupt = signal.getsignal(signal.SIGINT)
        if callable(on_interrupt):  # Python's own, which would wait for what hangs
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        own_ids_inside(self.job.options, self.job.maps)
        source = Source(self.job.source, self.job.options)
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            report = self._begin(source)
            assert self.record is not None
            control = ControlServer(self.record.control, {"status": self._status, "umount": self._umount})
            control.start()
            if tell is None:
                sys.stdout.write(report)
                sys.stdout.flush()
            else:
                os.write(tell, b"R" + os.fsencode(report))  # EPIPE if nobody is left to be told: then it is not wanted
                os.close(tell)
                process.detach_from_terminal()
            self._wait()
        finally:
            self._clear_up()
            if control is not None:
                control.close()
            if self.record is not None and not (self.mount is not None and self.mount.stays):
                self.store.remove(self.record)  # else `umount` does it, or it is listed as dead

    def _begin(self, source: Source) -> str:
        from fusewire.cli.run import plan_of
        from fusewire.cli.server_process import Locks, ServerProcess
        from fusewire.cli.serving import kernel_options, spare_devices
        from fusewire.linux import mount

        job = self.job
        target = job.target if job.target.startswith("/") else os.path.join(os.getcwd(), job.target)
        self.record = record = self.store.create(
            source.path, job.target, options=job.options.given, created=_before(target)
        )
        options = kernel_options(job.options, job.source, checked=source.checked)
        os.chdir("/")  # a server keeps nobody's directory busy, and works when that has been removed
        locks = job.locks or Locks()

        def start() -> ServerProcess:
            return ServerProcess([source], job.options, locks, silent=not job.foreground)

        if source.directory is None:
            self.server = start()  # locks itself in while we mount
        self.mount = held = mount.mount(
            os.fsencode(target),
            options,
            job.strategy,
            private=os.fsencode(record.mount_point),
            plan=None if job.maps == "self" else plan_of(job.maps),
            program=job.program,
            aside=None if record.created is None else os.fsencode(record.created["aside"]),
        )
        if self.server is None:
            self.server = start()  # as one of the mount's namespace
        server = self.server
        server.on_end = lambda: os.kill(os.getpid(), signal.SIGUSR1)
        looker = None if source.read_only else _FirstLooker(held.inside, held.fd)
        devices = spare_devices(job.options, source.workers)
        served = False
        try:
            server.add(0, [held.fd, *devices], os.getpid())
            served = True
        finally:
            for fd in devices:
                os.close(fd)
            if looker is not None:
                looker.end(look=served)
        record.strategy = held.strategy
        record.outside = None if held.outside is None else os.fsdecode(held.outside)
        record.inside = os.fsdecode(held.inside)
        record.mount = held.record()
        record.mounted_at = time.time()
        record.server = server.pid
        record.sandbox = server.summary
        record.served_by(os.getpid())
        self.store.save(record)
        return self._report(record)

    def _report(self, record: state.Record) -> str:
        if self.job.as_json:
            import json

            return (
                json.dumps(
                    {
                        "source": record.source,
                        "target": record.target,
                        "strategy": record.strategy,
                        "pid": record.pid,
                        "server": record.server,
                        "path": record.outside or record.target,
                        "id": record.id,
                    }
                )
                + "\n"
            )
        return ""

    def _wait(self) -> None:
        """Wait for a signal, for the end of the connection, or for `timeout=` seconds without a request."""
        assert self.server is not None
        assert self.mount is not None
        idle = self.job.options.timeout
        seen = -1
        while True:
            if not idle:
                signal.sigwait(_ENDING)
                return
            if signal.sigtimedwait(_ENDING, idle) is not None:
                return
            try:
                before, seen = seen, self.server.counts()[0]
                if seen != before:
                    continue
                self.mount.unmount()
            except OSError:
                continue  # it hangs; or somebody has a file open, or works there
            return

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server is not None
        requests, bad_replies = self.server.counts()
        return {
            "requests": requests,
            "uptime": time.monotonic() - self.server.started,
            "bad_replies": bad_replies,
        }

    def _umount(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.mount is not None
        lazy = bool(request.get("lazy"))
        self.mount.unmount(lazy=lazy)
        if not lazy or self.mount.strategy == "fd" or self.mount.stays:
            os.kill(os.getpid(), signal.SIGUSR1)
        elif self.record is not None:
            # Out of sight, and off the record; we serve those who have something open until they are done.
            record, self.record = self.record, None
            self.store.remove(record)
        return {}

    def _clear_up(self) -> None:
        died = self.server.died if self.server is not None else 0
        if died:
            print(f"fusewire: the server of {self.job.target} has died ({describe(died)})", file=sys.stderr)
        if self.mount is not None:
            self._unmount(0.0 if died else _PATIENCE)
        elif self.server is not None:
            self.server.close()

    def _unmount(self, patience: float) -> None:
        assert self.mount is not None
        if self.mount.strategy == "fd":
            patience = 0.0  # that one stays mounted, and nobody leaves it
        try:
            # Lazily: we are leaving, and with the last descriptor whoever is still inside gets ENOTCONN.
            self.mount.unmount(lazy=True)
        except OSError as error:
            patience = 0.0
            print(f"fusewire: {explain(error)}", file=sys.stderr)
        if self.mount.stays:
            patience = 0.0
        if self.server is not None:
            self.server.wait_end(patience)
            self.server.close()
        self.mount.close()
