"""`fusewire run SOURCE:TARGET ... -- COMMAND`: namespaces, all mounts, the command; its exit status is ours.

Layer `cli`. Three processes, so that nobody touches a mount that it serves and every end takes the rest with it:

* the supervisor (the process that was started) stays outside; it forwards signals and gives the exit status on;
* the server, in a session of its own, opens the sources and answers the kernel, from outside the namespaces too;
* the command makes the namespaces and the mounts, hands the /dev/fuse descriptors to the server, and becomes COMMAND.

The kernel ends the mounts with the namespace, the server with its mounts, and both children with the supervisor.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

from fusewire.cli import mount_points, private, supervise
from fusewire.cli.messages import describe, explain
from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from fusewire.cli.options import MountOptions
    from fusewire.cli.overlays import Layer
    from fusewire.cli.server_process import Locks
    from fusewire.cli.source import Source
    from fusewire.linux.userns import Plan


_PATIENCE = 1.0  # seconds that a killed process may take to end; one that hangs in the kernel takes longer
# Seconds that the server may take to stop serving; and where it may have something to save, a program or a store.
_FAREWELL, _LONG_FAREWELL = 5.0, 35.0


class Spec:
    """One SOURCE:TARGET of the command line; `writable` with :rw behind it, `layer` is what takes the changes then."""

    __slots__ = ("layer", "source", "target", "writable")

    def __init__(self, source: str, target: str, *, writable: bool = False) -> None:
        self.source = source
        self.target = target
        self.writable = writable
        self.layer: Layer | None = None


class Run:
    """What to run, where, with which mounts."""

    __slots__ = ("command", "cwd", "environment", "locks", "maps", "options", "own_pids", "specs", "wait_all")

    def __init__(
        self,
        specs: list[Spec],
        command: list[str],
        options: MountOptions,
        *,
        maps: str = "self",
        own_pids: bool = False,
        wait_all: bool = False,
        environment: dict[str, str] | None = None,
        cwd: str | None = None,
        locks: Locks | None = None,
    ) -> None:
        self.locks = locks
        self.specs = specs
        self.command = command
        self.options = options
        self.maps = maps
        self.own_pids = own_pids
        self.wait_all = wait_all
        self.environment = environment or {}
        self.cwd = cwd


def parse_spec(text: str) -> Spec:
    """Cut SOURCE:TARGET or SOURCE:TARGET:rw at its last colon.

    Raises ValueError with a message for the person.
    """
    rest = text.removesuffix(":rw")
    writable = rest != text and ":" in rest
    source, colon, target = (rest if writable else text).rpartition(":")
    if not colon or not source or not target:
        raise ValueError(f"{text!r} is not SOURCE:TARGET (for example env.sqsh:/opt/env)")
    return Spec(source, os.path.abspath(target), writable=writable)


def add_layers(specs: list[Spec], places: list[str]) -> None:
    """Give the specs that are to be written to their layers: `places` are those of --overlay, in their order.

    A directory is written to as it is, unless a place was named. Raises ValueError with a message for the person.
    """
    from fusewire.cli.overlays import TMPFS, Layer

    chosen = [spec for spec in specs if spec.writable and (places or not os.path.isdir(spec.source))]
    if places and not chosen and len(specs) == 1:
        chosen = specs
    if not chosen and places:
        raise ValueError("--overlay: say which of the mounts it is for, by SOURCE:TARGET:rw")
    if places in ([], [TMPFS]):
        places = [TMPFS] * len(chosen)
    if len(places) != len(chosen):
        raise ValueError(f"--overlay was given {len(places)} times, and {len(chosen)} mounts are to be written to")
    for spec, place in zip(chosen, places, strict=True):
        spec.layer = Layer(place)


def run(job: Run) -> int:
    """Do the job and give the exit status: the command's, or 125 to 127 when it could not be started."""
    job.specs.sort(key=lambda spec: spec.target.count("/"))  # the outer mounts first
    layers = [spec.layer for spec in job.specs if spec.layer is not None]
    try:
        for layer in layers:
            layer.choose(plan_of(job.maps))
            if layer.own:
                print(f"fusewire: the kernel's overlayfs cannot be had: {layer.reason}", file=sys.stderr)
        return _run(job)
    finally:
        for layer in layers:
            layer.remove()


def _run(job: Run) -> int:
    if any("://" in spec.source for spec in job.specs):
        from fusewire.cli.source import hide_words, shown

        hide_words({spec.source: shown(spec.source) for spec in job.specs})
    old_mask = supervise.block()
    supervisor = os.getpid()
    to_server, to_command = process.socket_pair()
    complaints, complain = os.pipe()

    server = os.fork()
    if server == 0:
        os.close(to_server)
        os.close(complaints)
        os.close(complain)
        _child(lambda: _serve(job, to_command, supervisor, old_mask), to_command)

    command = os.fork()
    if command == 0:
        os.close(to_command)
        os.close(complaints)
        _child(lambda: _command(job, to_server, supervisor, old_mask, complain), complain)

    os.close(to_server)
    os.close(to_command)
    os.close(complain)
    if job.wait_all and not job.own_pids:
        process.become_subreaper()
    report, ended_by = supervise.read_unless_ended(complaints)
    failure = parse_report(report)
    made = [field[1:] for field in report.split(b"\0") if field.startswith(b"M")]
    os.close(complaints)
    try:
        if failure is not None:
            _end(command, signal.SIGKILL)
            _end(server, signal.SIGKILL)
            print(f"fusewire: {failure}", file=sys.stderr)
            return failure.code
        if ended_by:
            _give_up(command, server)
            status: int | None = ended_by
        else:
            status = _supervise(job, command, server)
    finally:
        mount_points.remove([spec.target for spec in job.specs], made)
    return supervise.EXIT_FAILED if status is None else supervise.leave(status)


def _give_up(command: int, server: int) -> None:
    """End both before the command has begun. The server may hang, in a source that somebody has lost patience with."""
    _end(command, signal.SIGKILL)
    _end(server, signal.SIGKILL)


def _supervise(job: Run, command: int, server: int) -> int | None:
    """Wait for the command and give its wait status; None if the server has died before it."""
    namespace = _mount_namespace(command)
    lost = False

    def other_child(pid: int, status: int) -> bool:
        nonlocal lost
        if pid != server or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
            return False  # the mounts have ended, and with them the server: the namespace is gone
        lost = True
        print(f"fusewire: the server of the mounts has died ({describe(status)}); ending the command", file=sys.stderr)
        return True

    status = supervise.supervise(command, others=other_child, wait_all=job.wait_all, ignore=frozenset({server}))
    if lost:
        end_namespace(namespace)
        if status == -1:
            _end(command, signal.SIGKILL)
        return None
    saves = any(":" in spec.source for spec in job.specs)
    _end(server, signal.SIGTERM, _LONG_FAREWELL if saves else _FAREWELL)
    return status


def parse_report(report: bytes) -> Refused | None:
    """Read what a child has said on its pipe: b"E", an exit status, a space, a text and NUL, for why it failed.

    Other fields are b"M", the path of a directory that it is about to make on the host, and NUL.
    """
    for field in report.split(b"\0")[:-1]:
        if field.startswith(b"E"):
            code, _, text = os.fsdecode(field[1:]).partition(" ")
            return Refused(text, int(code))
    return None


def _mount_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def end_namespace(namespace: str) -> None:
    """Kill every process of the user's in the mount namespace `namespace` ("mnt:[inode]"), until none is left.

    One that is stuck in the kernel, waiting for another filesystem (D state), ends when that answers: it is told once.
    """
    if not namespace or namespace == os.readlink("/proc/self/ns/mnt"):
        return
    told: set[tuple[int, int]] = set()
    while True:
        found = []
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            if _mount_namespace(pid) != namespace or (pid, start := process.start_time(pid) or 0) in told:
                continue
            held = process.hold(pid, start)
            if held is None:
                continue
            told.add((pid, start))
            try:
                held.kill(signal.SIGKILL)
                found.append(held)
            except PermissionError:
                held.close()
        if not found:
            return
        deadline = time.monotonic() + _PATIENCE
        for held in found:
            with held:
                held.wait(max(0.0, deadline - time.monotonic()))


def _end(pid: int, number: int, seconds: float = _PATIENCE) -> None:
    """Signal a child and wait for its end, unless it hangs: nobody can end it then before that is over."""
    deadline = time.monotonic() + seconds
    try:
        os.kill(pid, number)
        while os.waitpid(pid, os.WNOHANG)[0] == 0 and (left := deadline - time.monotonic()) > 0:
            signal.sigtimedwait({signal.SIGCHLD}, left)  # it is held back, as all that the supervisor waits for
    except (ProcessLookupError, ChildProcessError):
        pass


def _hand_over(socket: int, note: bytes, fds: list[int]) -> None:
    """Give a mount's descriptor and the lock of its place to the server and wait until it is served."""
    try:
        process.send_fds(socket, note, fds)
    except BrokenPipeError:
        pass  # the server has ended already, and what it had to say is waiting to be read
    try:
        answer = os.read(socket, 1)
    except ConnectionResetError:  # it has ended without reading what we sent
        answer = b""
    if answer != b"R":
        report = answer + process.read_all(socket)
        raise parse_report(report) or Refused("the server of the mounts died before they were ready")


def is_nested(spec: Spec, specs: list[Spec]) -> bool:
    """Tell whether a target lies inside another one."""
    return any(spec.target.startswith(other.target.rstrip("/") + "/") for other in specs)


class Refused(Exception):  # noqa: N818 - an answer for the person, with the exit status that goes with it
    """Why the command cannot be started."""

    def __init__(self, text: str, code: int = supervise.EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


def _child(work: object, report_to: int) -> NoReturn:
    """Run a child's part and never return into the parent's code; tell on `report_to` what went wrong."""
    code = supervise.EXIT_FAILED
    try:
        work()  # type: ignore[operator]
        code = 0
    except Refused as refused:
        code = refused.code
        os.write(report_to, os.fsencode(f"E{code} {refused}\0"))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:  # noqa: BLE001 - the child's last stop: the supervisor tells the person
        if not isinstance(error, OSError):
            import traceback

            traceback.print_exc()
        os.write(report_to, os.fsencode(f"E{code} {explain(error)}\0"))
    finally:
        os._exit(code)


# The server


def _serve(job: Run, socket: int, supervisor: int, mask: set[signal.Signals]) -> None:
    """Serve, and clear up if the supervisor cannot."""
    os.setsid()
    # SIGTERM, not SIGKILL: when the supervisor dies by violence, nobody else is left to end what runs inside.
    process.set_pdeathsig(signal.SIGTERM, supervisor)
    namespace: list[bytes] = []
    locks: list[int] = []
    try:
        _serve_mounts(job, socket, supervisor, namespace, locks)
    finally:
        if os.getppid() != supervisor:
            for name in namespace[:1]:
                end_namespace(os.fsdecode(name))
            for fd in locks:
                os.close(fd)
            mount_points.remove([spec.target for spec in job.specs], [])


def _serve_mounts(job: Run, socket: int, supervisor: int, namespace: list[bytes], locks: list[int]) -> None:
    """Open the sources, start servers, hand them the descriptors, wait until the mounts are gone.

    What the command's side tells of its namespace and its mount points is added to the lists.
    """
    from fusewire.cli.server_process import Locks, ServerProcess
    from fusewire.cli.serving import own_ids_inside

    own_ids_inside(job.options, job.maps)
    try:
        sources = [_source_of(spec, job) for spec in job.specs]
    except OSError as error:
        raise Refused(explain(error)) from error
    how = job.locks or Locks()
    owner = (0, 0) if "root" in job.maps else None
    # One process for all images, whose server has no other files; one for each directory, the only one that it sees.
    images = [source for source in sources if source.directory is None and not source.is_free]
    groups = [images] * bool(images) + [[source] for source in sources if source not in images]
    place = {}
    try:
        for group in groups:
            server = ServerProcess(group, job.options, how, owner)
            # A thread that waits for a lock does not hear a signal that another one takes: the main thread waits for
            # the signal itself, and each connection that ends sends one.
            server.on_end = lambda: os.kill(os.getpid(), signal.SIGUSR1)
            place.update({source: (server, at) for at, source in enumerate(group)})
    except OSError as error:
        raise Refused(explain(error)) from error
    servers = {server for server, _ in place.values()}
    # One after the other: a mount point inside another mount can only be found once that one is served.
    for source in sources:
        data, fds = process.recv_fds(socket, 65536, 253)
        if not fds:
            return  # the command's side failed and has said so
        name, pid, held = data.split(b" ")
        namespace.append(name)
        cut = len(fds) - int(held)
        locks += fds[cut:]
        server, at = place[source]
        try:
            server.add(at, fds[:cut], int(pid))
        except OSError as error:
            said = explain(error)
            raise Refused(said if said.startswith(source.path) else f"{source.path}: {said}") from error
        for fd in fds[:cut]:
            os.close(fd)
        os.write(socket, b"R")
    os.close(socket)
    while not all(server.wait_end(0) for server in servers):
        # Somebody ends all processes of a job alike, as service managers do. The command hears it too, and needs its
        # files until it has ended.
        sender = signal.sigwaitinfo({signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}).si_pid
        if sender == supervisor or os.getppid() != supervisor:
            break
    died = [server.died for server in servers if server.died]
    for server in servers:
        server.close()
    if died:  # as it has: the supervisor tells the person
        os._exit(supervise.leave(died[0]))


def _source_of(spec: Spec, job: Run) -> Source:
    from fusewire.cli.serving import own_ids_inside
    from fusewire.cli.source import Source

    if spec.layer is None:
        return Source(spec.source, job.options)
    from fusewire.cli import overlays

    options = job.options if os.path.isdir(spec.source) else overlays.options_under(job.options, job.maps)
    own_ids_inside(options, job.maps)
    if spec.layer.own:
        return overlays.LayeredSource(spec.source, options, spec.layer)
    return Source(spec.source, options)


# The command


def _command(job: Run, socket: int, supervisor: int, mask: set[signal.Signals], complain: int) -> None:
    """Make the namespaces and the mounts, wait until they are served, and become the command."""
    process.set_pdeathsig(signal.SIGKILL, supervisor)
    from fusewire.cli.serving import kernel_options, spare_devices
    from fusewire.linux import mount, mount_base, shadow, syscalls, userns

    plan = plan_of(job.maps)
    # Real root, and a namespace that knows many ids, run programs under other ids too: they are let in, as they would
    # be on a kernel filesystem. Root of either kind reads everything in spite of the modes.
    opened = not plan.new_user or (plan.helpers and "root" in job.maps)
    try:
        cwd = job.cwd or os.getcwd()
    except FileNotFoundError:  # the working directory has been removed: it stays the command's all the same
        cwd = "."
    userns.enter(plan, syscalls.CLONE_NEWPID if job.own_pids else 0)
    # The kernel clears the death signal when a process's ids or capabilities change (prctl(2)).
    process.set_pdeathsig(signal.SIGKILL, supervisor)
    namespace = os.fsencode(f"{os.readlink('/proc/self/ns/mnt')} {os.readlink('/proc/self')}")
    umask = process.allow_owner()
    places = shadow.Shadow(lambda directory: mount_points.announce(complain, directory), private.MADE)
    # Together, where they do not depend on each other: one cover for many targets in one directory.
    for spec in job.specs:
        if not is_nested(spec, job.specs):
            mount_points.make(places, os.fsencode(spec.target))
    for spec in job.specs:
        target, lock = mount_points.claim(places, os.fsencode(spec.target), is_nested(spec, job.specs))
        upper = None
        if spec.layer is not None and not spec.layer.own:
            from fusewire.cli.overlays import Upper

            upper = Upper(spec.layer, target)
            lock += [upper.claim] if upper.claim >= 0 else []  # which is held as long as the mounts are
        options = kernel_options(job.options, spec.source, opened=opened)
        if spec.layer is not None and spec.layer.own:
            options.flags &= ~syscalls.MS_RDONLY
            options.default_permissions = True
        held = mount.mount(target, options, "direct")
        devices = spare_devices(job.options)
        _hand_over(socket, b"%s %d" % (namespace, len(lock)), [held.fd, *devices, *lock])
        mount_base.first_look(target)
        held.close()
        if upper is not None:
            upper.mount(target, options.flags & ~syscalls.MS_RDONLY)
        for fd in (*devices, *lock):
            os.close(fd)
    places.seal()
    os.close(socket)
    os.umask(umask)
    if job.own_pids:
        _own_pids(job, cwd, mask, complain)
    _become(job, cwd, mask)


def plan_of(maps: str) -> Plan:
    """Give the user namespace plan for `--map-root`, `--map-ranges` or the default."""
    from fusewire.linux import userns

    if maps == "root":
        return userns.root_plan()
    if maps == "ranges":
        return userns.ranges_plan()
    if maps == "root-ranges":
        return userns.ranges_plan(as_root=True)
    return userns.default_plan()


def _own_pids(job: Run, cwd: str, mask: set[signal.Signals], complain: int) -> NoReturn:
    """Start the first process of the new PID namespace and wait for it: it reaps, and its end ends all others."""
    told, tell = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(told)
        _child(lambda: _init(job, cwd, mask, complain, tell), complain)
    os.close(complain)
    os.close(tell)
    status = supervise.supervise(init)
    # The first process of a PID namespace cannot die of a signal of its own: it says how the command has ended.
    word = os.read(told, 4)
    os._exit(supervise.leave(int.from_bytes(word, "little") if len(word) == 4 else status))


def _as_code(status: int) -> int:
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def _init(job: Run, cwd: str, mask: set[signal.Signals], complain: int, tell: int) -> None:
    from fusewire.linux import syscalls

    process.set_pdeathsig(signal.SIGKILL, 0)
    try:
        syscalls.mount(b"proc", b"/proc", b"proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    except OSError as error:
        raise Refused(
            f"--pid: a new /proc cannot be mounted ({error.strerror}); this container's own /proc is masked. "
            "Run without --pid, or have the container started with an unmasked /proc"
        ) from error
    command = os.fork()
    if command == 0:
        _child(lambda: _become(job, cwd, mask), complain)
    os.close(complain)
    status = supervise.supervise(command, wait_all=job.wait_all, init=True)
    if status >= 0:
        os.write(tell, status.to_bytes(4, "little"))
    os._exit(_as_code(status))


def _become(job: Run, cwd: str, mask: set[signal.Signals]) -> NoReturn:
    """Replace this process by the command, as a shell would start it."""
    try:
        # By name, again: what the working directory was may lie under a mount now.
        os.chdir(cwd)
    except OSError as error:
        if job.cwd is not None:
            raise Refused(f"--cwd {job.cwd}: {error.strerror}") from error
    environment = {**os.environ, **job.environment}
    supervise.restore(mask)
    program = job.command[0]
    try:
        os.execvpe(program, job.command, environment)
    except FileNotFoundError as error:
        raise Refused(f"{program}: no such command inside", supervise.EXIT_NOT_FOUND) from error
    except OSError as error:
        code = supervise.EXIT_NOT_FOUND if error.errno == errno.ENOTDIR else supervise.EXIT_NOT_EXECUTABLE
        raise Refused(f"{program}: cannot be executed: {error.strerror}", code) from error
