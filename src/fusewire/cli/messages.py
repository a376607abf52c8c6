"""What is said to a person: an exception or the end of a process in words, and where a daemon's messages go.

Layer: cli.
"""

from __future__ import annotations

import errno
import os
import stat

LEVELS = ("off", "error", "warn", "info", "debug", "trace")


def explain(error: BaseException) -> str:
    """Give an exception's message for a person."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    if type(error).__str__ is not OSError.__str__ or error.strerror is None:
        return str(error)
    if isinstance(error, BlockingIOError) and error.strerror == os.strerror(errno.EAGAIN):
        return "no more processes can be started: the limit (`ulimit -u`) is reached"  # fork(2) says no more than that
    name = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    hint = "; /proc has to be mounted" if error.errno == errno.ENOENT and name.startswith(": /proc/self/") else ""
    return f"{error.strerror}{name}{hint}"


def describe(status: int) -> str:
    """Say how a process ended, from its wait status."""
    if os.WIFSIGNALED(status):
        import signal

        name = signal.Signals(os.WTERMSIG(status)).name
        hint = ": a system call that its filter does not allow, --seccomp trap names it" if name == "SIGSYS" else ""
        return f"killed by {name}{hint}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"


class Messages:
    """Where messages go: to standard error or to syslog, from a level on. Called by the server, from any thread."""

    def __init__(self, name: str, level: str, *, syslog: bool) -> None:
        """`level` is one of LEVELS."""
        self.name = name
        self.level = LEVELS.index(level)
        self._syslog = syslog
        self.files: list[int] = []  # descriptors that it needs
        if syslog:
            import syslog as system

            before = set(os.listdir("/proc/self/fd"))
            # Connected at once: later there may be no socket to be had.
            system.openlog(name, system.LOG_PID | system.LOG_NDELAY, system.LOG_DAEMON)
            new = [int(fd) for fd in set(os.listdir("/proc/self/fd")) - before]
            self.files = [fd for fd in new if stat.S_ISSOCK(_mode(fd))]

    def __call__(self, message: str, error: BaseException | None = None) -> None:
        """Take what a session reports: a fault, with the exception that showed it if there is one."""
        if error is not None and self.level >= LEVELS.index("error"):
            import traceback

            message = f"{message}\n{''.join(traceback.format_exception(error))}".rstrip()
        self.say("error" if error is not None else "warn", message)

    def say(self, level: str, message: str) -> None:
        """Write a message, if its level is one of those that are wanted."""
        if LEVELS.index(level) > self.level:
            return
        if not self._syslog:
            try:
                os.write(2, os.fsencode(f"{self.name}: {message}\n"))
            except OSError:
                pass  # whoever read them has gone: no reason to stop serving
            return
        import syslog as system

        priorities = {"error": system.LOG_ERR, "warn": system.LOG_WARNING, "info": system.LOG_INFO}
        for line in message.splitlines():
            system.syslog(priorities.get(level, system.LOG_DEBUG), line)


def _mode(fd: int) -> int:
    try:
        return os.fstat(fd).st_mode
    except OSError:  # that of the listing itself
        return 0
