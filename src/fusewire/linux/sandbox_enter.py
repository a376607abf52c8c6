"""Carry out a sandbox plan: go through its steps, for this process, for a child, or for a trial.

Layer: linux; what a step does to the process that takes it is in `sandbox_steps`. It decides nothing, the plan does. It
changes the calling process for good, which must have one thread.

Up to three processes. The one that calls stays outside as the *waiter*; the *server* comes back from `enter`. With a
new PID namespace there is a third one between them, which makes the namespaces, starts the server as its first process,
and ends: so the waiter keeps its own namespaces, can remove what it has made outside, and still has the server for a
child, because it is a subreaper. What is weaker in the caller's own process (as in virtiofsd, where the waiting process
moves into the namespaces too) is then that removing, and signals to a server with an id of its own.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import capabilities as caps
from fusewire.linux import process, syscalls, userns
from fusewire.linux.sandbox_plan import Plan, SandboxError
from fusewire.linux.sandbox_steps import STEPS, Entered, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import NoReturn

    from fusewire.linux.sandbox_plan import Step
    from fusewire.linux.sandbox_steps import Hook

_ALTERNATIVES = {
    "namespace": "use --sandbox chroot (takes CAP_SYS_CHROOT only), or --sandbox none --landlock require (takes no "
    "privilege), or --sandbox auto",
    "chroot": "use --sandbox namespace, or --sandbox none --landlock require (takes no privilege), or --sandbox auto",
    "none": "see `fusewire doctor`",
}


class ServerEnded(SystemExit):
    """Raised in the waiter once the server has ended; `code` is its status as a shell gives it.

    It is no error: whoever has made something outside removes it on the way out.
    """


def enter(
    plan: Plan,
    *,
    keep: Collection[int] = (),
    imports: Hook | None = None,
    serving: Hook | None = None,
    waiting: Hook | None = None,
    seccomp: Hook | None = None,
) -> Entered:
    """Go through the steps of a plan. Comes back in the server; in the waiter ServerEnded is raised instead.

    keep: descriptors that stay open beside 0, 1 and 2; no directories. Called at their time, where given: `imports`
    before anything is done, to load every module; `serving` in the server before the other descriptors are closed, to
    forget those that it will not have; `waiting` in the waiter once the server is inside, to close what must not
    outlive it (the listening socket); `seccomp` as the last of all.

    Raises SandboxError in the caller if a step fails; without a waiter (see the plan) the process is half inside then
    and can only end. ValueError for a directory in `keep`.
    """
    if plan.child:
        raise ValueError("this plan is for `start`")
    state = State(plan, keep, {"imports": imports, "serving": serving, "waiting": waiting, "seccomp": seccomp})
    _go_through(state)
    return state.entered


def start(
    plan: Plan,
    serve: Callable[[Entered], int],
    *,
    keep: Collection[int] = (),
    imports: Hook | None = None,
    serving: Hook | None = None,
    seccomp: Hook | None = None,
) -> int:
    """Have a child go through the steps of a plan with `child`, and give its process id once it is inside.

    There it calls `serve`, and ends with the status that this gives, or with 1 where it raises: then a traceback goes
    to standard error. It dies with the calling thread. keep, imports, serving, seccomp: as for `enter`. This process
    keeps its privileges and its signal mask; in `namespace` it becomes a subreaper.

    Raises SandboxError if a step fails; ValueError for a directory in `keep`, or another plan.
    """
    if not plan.child:
        raise ValueError("this plan is for `enter`")
    state = State(plan, keep, {"imports": imports, "serving": serving, "seccomp": seccomp})
    try:
        _go_through(state)
    except _StaysOutside:
        return state.server
    status = 1
    try:
        status = serve(state.entered)
    except BaseException as error:  # noqa: BLE001 - the child's last stop
        _tell(error)
    finally:
        os._exit(status)


class _StaysOutside(Exception):  # noqa: N818 - no error: the way back of the process that has started a server
    pass


def _tell(error: BaseException) -> None:
    try:
        import traceback
    except ImportError:  # nothing can be loaded any more, and nobody has in time
        os.write(2, os.fsencode(f"fusewire: the server has failed: {type(error).__name__}: {error}\n"))
        return
    traceback.print_exception(error)


def _go_through(state: State) -> None:
    """Do all steps. Comes back in the server."""
    plan = state.plan
    _check_caller(plan, state.keep)
    owned = -1
    try:
        if isinstance(plan.shared, int):
            state.shared = plan.shared
        elif plan.shared is not None:
            owned = state.shared = _open_directory(plan.shared)
        for step in plan.steps:
            try:
                _ACTIONS[step.name](state)
            except OSError as error:
                _fail(state, step, error)
    except BaseException:
        if owned >= 0 and state.report < 0:  # in the server the number may be somebody else's already
            os.close(owned)
        raise
    if state.report >= 0:
        os.write(state.report, b"R")
        os.close(state.report)
        _await_go(state)  # not before the waiter has given up its privileges too
        os.close(state.lifeline)
        _set_mask(state.before)


def probe(plan: Plan) -> SandboxError | None:
    """Try in a child whether the plan can be carried out here; None if it can. The filter is not tried."""

    def attempt(writer: int) -> int:
        try:
            enter(plan)
        except ServerEnded as ended:
            return ended.code if isinstance(ended.code, int) else 1
        except SandboxError as error:
            os.write(writer, _pack(error))
            return 1
        return 0

    answer, status = process.in_child(attempt)
    if answer:
        return _unpack(answer)
    if status:
        return SandboxError(errno.EIO, f"the trial of --sandbox {plan.mode} died", _ALTERNATIVES[plan.mode])
    return None


def _check_caller(plan: Plan, keep: Collection[int]) -> None:
    threads = userns.thread_count()
    if threads > 1:
        raise SandboxError(
            errno.EBUSY,
            f"this process has {threads} threads, and a sandbox holds for one that has not started any",
            "enter it before threads are started",
        )
    for fd in keep:
        if plan.confined and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise ValueError(f"descriptor {fd} is a directory: kept open, it leads out of the sandbox")


def _open_directory(path: bytes) -> int:
    try:
        return process.above_stdio(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise SandboxError(
            error.errno or errno.EIO,
            f"cannot open the shared directory {os.fsdecode(path)}: {error.strerror}",
            "share one that is there",
        ) from error


# How it failed


def _fail(state: State, step: Step, error: OSError) -> NoReturn:
    mode = state.plan.mode
    failure = error if isinstance(error, SandboxError) else None
    if isinstance(error, BlockingIOError):  # fork(2) says no more than that
        text = "no more processes can be started: the limit (`ulimit -u`) is reached"
        failure = SandboxError(errno.EAGAIN, text, "", step.name)
    if failure is None:
        if isinstance(error, userns.UsernsError):
            way = error.remedy.removesuffix(", or use fusermount3")  # which helps mounts
            reason, remedy = f"{error.strerror}: {error.cause}", f"{way}; or {_ALTERNATIVES[mode]}"
        else:
            name = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            reason, remedy = f"{error.strerror}{name}", _ALTERNATIVES[mode]
        message = f"--sandbox {mode} cannot be had here, `{step.name}` failed: {reason}"
        failure = SandboxError(error.errno or errno.EIO, message, remedy, step.name)
    if state.report < 0:
        raise failure from error
    os.write(state.report, b"E" + _pack(failure))
    os._exit(1)


def _pack(error: SandboxError) -> bytes:
    return os.fsencode("\0".join((str(error.errno), str(error.strerror), error.remedy, error.step)))


def _unpack(data: bytes) -> SandboxError:
    number, message, remedy, step = os.fsdecode(data).split("\0")
    return SandboxError(int(number), message, remedy, step)


# The steps, by name


def _imports(state: State) -> None:
    # What the steps after this one take: the last of them find no library any more.
    import ctypes  # noqa: F401
    import importlib.machinery  # noqa: F401
    import resource  # noqa: F401
    import select  # noqa: F401
    import signal  # noqa: F401

    state.call("imports")
    _check_caller(state.plan, ())


def _wait(state: State) -> None:
    """Fork. Comes back in the server only, or with a new PID namespace in the process that will start the server."""
    import signal
    import sys

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    held: set[int] = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}
    held |= {signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM}
    state.before = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, held)}
    report_reader, report_writer = (process.above_stdio(fd) for fd in os.pipe())
    life_reader, life_writer = (process.above_stdio(fd) for fd in os.pipe())
    if state.plan.mode == "namespace":
        process.become_subreaper()  # before there is a child: the one between may end at any time
    pid = os.fork()
    if pid == 0:
        os.close(report_reader)
        os.close(life_writer)
        state.report, state.lifeline = report_writer, life_reader
        if state.plan.mode != "namespace":
            _await_go(state)
        return
    os.close(report_writer)
    os.close(life_reader)
    try:
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the status away
        server = _see_in(state, pid, report_reader, life_writer)
    except BaseException:
        _set_mask(state.before)
        raise
    finally:
        os.close(report_reader)
    if state.plan.child:
        state.server = server
        _set_mask(state.before)
        _go(life_writer)
        os.close(life_writer)
        raise _StaysOutside
    state.call("waiting")
    syscalls.set_no_new_privs()
    caps.drop(0)
    _go(life_writer)
    raise ServerEnded(_pass_on(server, held))


def _see_in(state: State, pid: int, report: int, lifeline: int) -> int:
    """See the server in, and give its process id. Raises SandboxError with what it reports, after its end."""
    server = pid
    text = b""
    if state.plan.mode == "namespace":
        text = os.read(report, 4096)  # the answer of the process between: a number, or a failure
        os.waitpid(pid, 0)
        # Now the server is our child, and not before: what it ties to its parent from here on is tied to us.
        server = int(text[1:]) if text.startswith(b"P") else -1
    if server >= 0:
        _go(lifeline)
        text = process.read_all(report)
        if text == b"R":
            return server
    os.close(lifeline)
    if server >= 0:
        os.waitpid(server, 0)
    if text.startswith(b"E"):
        raise _unpack(text[1:])
    mode = state.plan.mode
    raise SandboxError(errno.EIO, f"the server died on its way into --sandbox {mode}", _ALTERNATIVES[mode])


def _pass_on(server: int, held: set[int]) -> int:
    """Wait for the server, pass signals on to it, and give its status."""
    import signal

    while True:
        info = signal.sigwaitinfo(held)
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(server, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            continue
        # Also what a terminal sends to its whole process group: the server has left that.
        os.kill(server, info.si_signo)


def _set_mask(before: set[int]) -> None:
    import signal

    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _go(lifeline: int) -> None:
    try:
        os.write(lifeline, b"g")
    except BrokenPipeError:
        pass  # it has ended, and why is known by other ways


def _await_go(state: State) -> None:
    if not os.read(state.lifeline, 1):
        os._exit(1)  # the waiter has ended: nobody is there to serve for


def _namespaces(state: State) -> None:
    plan = state.plan
    os.fchdir(state.shared) if state.shared >= 0 else os.chdir("/")
    ids = userns.Plan(plan.uids, plan.gids, new_user=plan.new_user, helpers=plan.helpers)
    # The working directory moves along, into the copy of its mount in the new namespace: no path is looked up again.
    userns.enter(ids, syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC)
    server = os.fork()
    if server:
        os.write(state.report, b"P%d" % server)
        os._exit(0)
    _await_go(state)


_ACTIONS: dict[str, Callable[[State], None]] = {
    "imports": _imports,
    "wait": _wait,
    "namespaces": _namespaces,
    **STEPS,
}
