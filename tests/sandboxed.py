"""A process that enters a sandbox and then does what it is asked, so that it can be looked at from both sides.

with Sandboxed("chroot", shared) as box:
    assert box.ask("os.listdir('/')") == ["file"]
    assert box.link("root") == str(shared)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

PATIENCE = 20.0

PROGRAM = r"""
import ctypes, errno, json, os, resource, signal, socket, sys, threading, traceback
from fusewire.linux import capabilities, files, landlock, sandbox, sandbox_enter, syscalls, userns
given = json.loads(sys.argv[1])
wire = socket.socket(fileno=given["wire"])
shared = given["shared"]
if given["by_descriptor"]:
    shared = os.open(shared, os.O_PATH | os.O_DIRECTORY)
elif shared is not None:
    shared = os.fsencode(shared)
held = os.open(given["outside"], os.O_PATH | os.O_DIRECTORY)  # what must not be there any more afterwards
directory = os.open("/", os.O_RDONLY)
image = os.open(given["image"], os.O_RDONLY) if given["image"] else -1
keep = {wire.fileno()} | ({image} if image >= 0 else set())
def say(**what):
    wire.sendall(json.dumps(what, default=repr).encode() + b"\n")
def run_hook(name):
    say(hook=name, pid=os.getpid())
    if given["seccomp_fails"] and name == "seccomp":
        raise OSError(errno.ENOSYS, "no filters here")
try:
    plan = sandbox.plan(given["mode"], shared=shared, **given["options"])
    hooks = ("imports", "serving", "waiting", "seccomp")
    entered = sandbox_enter.enter(plan, keep=keep, **{name: lambda name=name: run_hook(name) for name in hooks})
except sandbox_enter.ServerEnded as ended:
    status = {line.split(":")[0]: line.split()[1] for line in open("/proc/self/status") if len(line.split()) > 1}
    open_to = os.path.exists(given["outside"])
    say(waiter=[status["CapEff"], status["CapPrm"], status["CapBnd"], status["NoNewPrivs"]], sees=open_to)
    raise
except (OSError, ValueError) as error:
    say(error=str(error), step=getattr(error, "step", ""), kind=type(error).__name__)
    os._exit(3)
say(entered={name: getattr(entered, name) for name in entered.__slots__ if name != "proc"},
    proc=entered.proc.decode(), mode=plan.mode, refused=plan.refused)
def tried(call, *args, **named):
    try:
        call(*args, **named)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
space = dict(globals())
for line in wire.makefile("r"):
    try:
        answer = {"answer": eval(json.loads(line), space)}
    except OSError as error:
        answer = {"answer": errno.errorcode[error.errno]}
    except BaseException as error:
        answer = {"raised": repr(error)}
    say(**answer)
os._exit(5)
"""


class Sandboxed:
    """The waiter is `process`, the server inside `pid`; both are gone after `close`."""

    def __init__(
        self,
        mode: str,
        shared: object = None,
        words: Sequence[str] = (sys.executable, "-W", "error"),
        *,
        by_descriptor: bool = False,
        image: object = None,
        seccomp_fails: bool = False,
        pass_fds: Sequence[int] = (),
        stdin: Any = subprocess.DEVNULL,
        program: str = PROGRAM,
        **options: Any,
    ) -> None:
        """Start it and wait until it is inside, or has failed: then `error` says how."""
        mine, theirs = socket.socketpair()
        mine.settimeout(PATIENCE)
        given = {
            "mode": mode,
            "shared": None if shared is None else str(shared),
            "by_descriptor": by_descriptor,
            "outside": "/usr",
            "image": None if image is None else str(image),
            "seccomp_fails": seccomp_fails,
            "options": options,
            "wire": theirs.fileno(),
        }
        with theirs:
            self.process = subprocess.Popen(
                [*words, "-c", program, json.dumps(given)],
                stdin=stdin,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), *pass_fds),
            )
        self._wire = mine
        self._lines = mine.makefile("r")
        self.hooks: list[tuple[str, int]] = []
        self.error: dict[str, str] = {}
        self.entered: dict[str, Any] = {}
        self.pid = -1
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        while not self.error and not self.entered:
            said = self._hear()
            if "error" in said:
                self.error = said
            elif "entered" in said:
                self.entered = said["entered"] | {"proc": said["proc"], "refused": said["refused"]}
        if self.entered:
            with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as children:
                numbers = children.read().split()
            self.pid = int(numbers[0]) if numbers else self.process.pid

    def _hear(self) -> dict[str, Any]:
        while True:
            line = self._lines.readline()
            if not line:
                raise AssertionError(f"it ended: {self._errors()}")
            said: dict[str, Any] = json.loads(line)
            if "hook" not in said:
                return said
            self.hooks.append((said["hook"], said["pid"]))

    def _errors(self) -> str:
        try:
            return self.process.communicate(timeout=PATIENCE)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "and its starter hung"

    def ask(self, expression: str) -> Any:
        """The value of an expression in the server; the name of an errno if it raised OSError."""
        self._wire.sendall(json.dumps(expression).encode() + b"\n")
        said = self._hear()
        assert "answer" in said, said
        return said["answer"]

    def tell_last(self) -> dict[str, Any]:
        """Have the server end (with status 5) and give what the waiter says of itself."""
        self._wire.shutdown(socket.SHUT_WR)
        return self._hear()

    def status(self, pid: int = 0) -> dict[str, str]:
        """/proc/PID/status of the server."""
        with open(f"/proc/{pid or self.pid}/status") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}

    def link(self, name: str) -> str:
        """A symlink in /proc/PID of the server: root, cwd, ns/net."""
        return os.readlink(f"/proc/{self.pid}/{name}")

    def mounts(self) -> list[list[str]]:
        """The lines of its mountinfo, in words."""
        with open(f"/proc/{self.pid}/mountinfo") as file:
            return [line.split() for line in file]

    def descriptors(self) -> dict[int, str]:
        """What the server has open."""
        place = f"/proc/{self.pid}/fd"
        return {int(number): os.readlink(f"{place}/{number}") for number in os.listdir(place)}

    def wait(self) -> int:
        """The exit status of the waiter."""
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End both."""
        self._lines.close()
        self._wire.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
