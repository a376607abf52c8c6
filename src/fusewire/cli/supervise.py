"""Stand between a shell and a command: forward signals, follow job control, give the command's exit status on.

Layer `cli`. Used by `run` for the command, and again inside an own PID namespace for its init. It starts nothing.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Signals that we wait for instead of letting them act. Those that the terminal sends to the whole foreground process
# group (SI_KERNEL) have reached the command already; only what a process sent to us alone is passed on.
FORWARDED = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
        signal.SIGCONT,
        signal.SIGTSTP,
    }
)
ENDING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
WAITED = FORWARDED | {signal.SIGCHLD}

# The tool's own failures, as env(1), timeout(1) and container engines number them.
EXIT_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


def block() -> set[signal.Signals]:
    """Hold back the signals that `supervise` will wait for; give the mask that the command is to start with."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)
    return {number for number in before if isinstance(number, signal.Signals)}


def _ending() -> set[signal.Signals]:
    """The signals that are to end us: those that the caller ignores are not."""
    return {number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN}


def pending() -> int:
    """The signal that is to end us and has been held back, 0 if there is none."""
    info = signal.sigtimedwait(_ending(), 0)
    return 0 if info is None else info.si_signo


def read_unless_ended(fd: int) -> tuple[bytes, int]:
    """Read a pipe to its end, or until somebody wants us to end: what has been read, and that signal or 0.

    For the time before there is a command that could hear it. Signals must be held back (`block`).
    """
    import select

    from fusewire.linux import syscalls

    signals = syscalls.signalfd(_ending())
    watch = select.poll()
    watch.register(fd, select.POLLIN)
    watch.register(signals, select.POLLIN)
    parts: list[bytes] = []
    try:
        while True:
            if fd not in (ready for ready, _ in watch.poll()):
                return b"".join(parts), pending()
            part = os.read(fd, 65536)
            if not part:
                return b"".join(parts), 0
            parts.append(part)
    finally:
        os.close(signals)


def restore(mask: set[signal.Signals]) -> None:
    """Undo what Python has changed for a process that is about to become another program; `mask` is the old mask.

    What the caller ignores (nohup, a script's `command &`) stays ignored: Python leaves it so, but for the two that it
    ignores itself. An ignored SIGPIPE would break pipelines.
    """
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def supervise(
    child: int,
    *,
    others: Callable[[int, int], bool] | None = None,
    wait_all: bool = False,
    ignore: frozenset[int] = frozenset(),
    init: bool = False,
) -> int:
    """Wait for `child` and give its wait status; signals must be held back (`block`) since before the fork.

    `others(pid, status)` hears of every other child that ends; giving True ends the wait with the child still there
    (-1 is returned). With `wait_all`, go on until no child but those in `ignore` is left, or until we are told to end
    when the command has ended. `init`: this process is the first one of a PID namespace.
    """
    status: int | None = None
    while True:
        # Reap before waiting: a SIGCHLD may stand for many.
        while True:
            try:
                pid, result = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return status if status is not None else -1
            if pid == 0:
                break
            if os.WIFSTOPPED(result):
                if pid == child and init:
                    _stop_group(os.WSTOPSIG(result))
                elif pid == child:
                    _stop_with(child)
            elif pid == child:
                status = result
                if not wait_all:
                    return status
            elif others is not None and others(pid, result) and (status is None or not wait_all):
                return -1 if status is None else status
        if status is not None and not _has_other_children(ignore):
            return status
        info = signal.sigwaitinfo(WAITED)
        if info.si_signo == signal.SIGCHLD:
            continue
        if status is not None:
            if info.si_signo in ENDING:
                return status  # the command cannot be told any more; whoever else is left has no say
        elif info.si_code <= 0 or _is_hang_up(info.si_signo):
            _forward(child, info.si_signo)


def _is_hang_up(number: int) -> bool:
    """Tell whether a signal of the terminal's came to us alone: a hang-up goes to the leader of the session only."""
    return number == signal.SIGHUP and os.getsid(0) == os.getpid()


def _has_other_children(ignore: frozenset[int]) -> bool:
    """Tell whether a child is left that is not in `ignore`, /proc/PID/task/TID/children."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
            return any(int(pid) not in ignore for pid in file.read().split())
    except OSError:
        return False


def _forward(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _stop_with(child: int) -> None:
    """Stop as the command stopped, so that the shell sees its job stopped; when continued, continue the command."""
    os.kill(os.getpid(), signal.SIGSTOP)
    _forward(child, signal.SIGCONT)


def _stop_group(number: int) -> None:
    """Stop those outside who wait for this init, as the command stopped; when continued, they pass that on to us.

    The kernel spares the first process of a PID namespace from stopping (pid_namespaces(7)), and it cannot name those
    outside. They are in its process group, which the terminal stops as a whole anyway; what has stopped by another
    signal than the terminal's stays a matter between the command and whoever sent it.
    """
    if number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        os.kill(0, signal.SIGSTOP)


def leave(status: int) -> int:
    """Turn a wait status into our own end: the exit status to return, or the same signal on ourselves."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command's core is the one that matters
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout.flush()
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        return 128 + number
    return os.waitstatus_to_exitcode(status)
