"""What `fusewire doctor` tries for real: each way to mount, in processes that are killed when they take too long.

Layer: cli. A broken machine cannot hang it, and nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import stat

from fusewire.linux import fusermount, mount, mount_base, mountinfo, process, syscalls, userns
from fusewire.ops import Entry, Operations, attr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Attr, Caller

DEADLINE = 15.0  # seconds for one trial; an idle machine needs 0.2
_HELLO = b"fusewire\n"


class Outcome:
    """What became of a trial: `text` is what it gave, or why it failed."""

    __slots__ = ("ok", "remedy", "text")

    def __init__(self, ok: bool, text: str, remedy: str = "") -> None:
        self.ok = ok
        self.text = text
        self.remedy = remedy


def attempt(work: Callable[[], str], seconds: float = DEADLINE) -> Outcome:
    """Do something in a child, which is killed with all its children when it has ended or time is up."""
    reader, writer = os.pipe()
    doctor = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            process.set_pdeathsig(signal.SIGKILL, doctor)
            try:
                answer = ("+", work(), "")
            except OSError as error:
                answer = ("-", *_why(error))
            os.write(writer, "\0".join(answer).encode(errors="surrogateescape") + b"\0\n")
        finally:
            os._exit(0)
    os.close(writer)
    report = b""
    try:
        os.setpgid(child, child)
    except OSError:  # it has done so itself
        pass
    try:
        watch = select.poll()
        watch.register(reader, select.POLLIN)
        while not report.endswith(b"\0\n") and watch.poll(seconds * 1000) and (part := os.read(reader, 65536)):
            report += part
        late = not report and not watch.poll(0)
    finally:
        os.close(reader)
        os.killpg(child, signal.SIGKILL)  # the child is not waited for yet, so the number is still its group's
        status = os.waitpid(child, 0)[1]
    if not report:
        reason = f"gave no answer within {seconds:g} s" if late else f"died ({os.waitstatus_to_exitcode(status)})"
        return Outcome(False, f"the trial {reason}", "see the kernel log")
    sign, text, remedy, _ = report.decode(errors="surrogateescape").split("\0")
    return Outcome(sign == "+", text, remedy)


def _why(error: OSError) -> tuple[str, str]:
    if isinstance(error, mount.MountError):
        return error.attempts[-1][1], error.attempts[-1][2]
    if isinstance(error, userns.UsernsError):
        return f"{error.strerror}: {error.cause}", error.remedy
    where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
    return f"{error.strerror}{where}", str(getattr(error, "remedy", ""))


class _Tiny(Operations):
    """A directory with one file, to have something to mount."""

    immutable = True
    read_only = True

    def _attributes(self, nodeid: int) -> Attr:
        return attr(1, stat.S_IFDIR | 0o755) if nodeid == 1 else attr(2, stat.S_IFREG | 0o644, len(_HELLO))

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        return self._attributes(nodeid), 60.0

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Entry:
        if name != b"hello":
            raise FileNotFoundError(errno.ENOENT, "there is only `hello`")
        return Entry(2, self._attributes(2))

    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> bytes:
        return _HELLO[offset : offset + size]


def try_mount(kind: str, seconds: float = DEADLINE, helper: str | None = None) -> Outcome:
    """Mount for real as `kind` does: direct, fusermount3, namespace, or `run`; somebody else reads, then unmount."""
    import tempfile

    try:
        base = os.path.realpath(tempfile.mkdtemp(prefix="fusewire-doctor-"))
    except OSError as error:
        return Outcome(False, f"no temporary directory: {error.strerror}", "set TMPDIR to a directory of yours")
    target, private = os.fsencode(base) + b"/target", os.fsencode(base) + b"/private"
    os.mkdir(target)
    os.mkdir(private)
    outcome = Outcome(False, "it was broken off")
    try:
        outcome = attempt(lambda: _mount_and_read(kind, target, private, helper), seconds)
    finally:
        try:
            _clear_up(target, helper)
            for path in (target, private, os.fsencode(base)):
                (os.unlink if os.path.islink(path) else os.rmdir)(path)
        except OSError as error:
            outcome = Outcome(
                False, f"{outcome.text}; {base} is left behind: {error.strerror}", "unmount and remove it"
            )
    return outcome


def _mount_and_read(kind: str, target: bytes, private: bytes, helper: str | None) -> str:
    """The trial process holds the mount and never touches it: one child serves, another one looks."""
    if kind == "run":
        userns.enter(userns.default_plan())
    elif kind == "direct" and syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
        userns.enter(userns.current_plan())  # a mount in a namespace of its own cannot be left behind
    parent = os.getpid()
    go_reader, go = os.pipe()
    seen, seen_writer = os.pipe()
    looker = os.fork()  # now: it has to be outside the namespace that the next step may make
    if looker == 0:
        _child(lambda: _look_at(target, go_reader), seen_writer, parent)
    os.close(seen_writer)
    held = mount.mount(
        target, mount_base.Options(), "direct" if kind == "run" else kind, private=private, program=helper
    )
    ready, ready_writer = os.pipe()
    server = os.fork()
    if server == 0:
        process.close_inherited_fds({0, 1, 2, held.fd, ready_writer})  # a descriptor of the tree would keep it busy
        _child(lambda: _serve(held.fd, ready_writer), ready_writer, parent)
    os.close(ready_writer)
    if answer := _read_all(ready):
        raise OSError(errno.EIO, f"the server failed: {answer}")
    os.write(go, b"g")
    answer = _read_all(seen)
    held.unmount()
    held.close()
    if answer:
        raise OSError(errno.EIO, f"mounted, but another process cannot use it: {answer}")
    process.wait(looker)
    if not held.stays:  # else it ends with us
        process.wait(server)
    return ""


def _child(work: Callable[[], None], complaints: int, parent: int) -> None:
    """Be a child that does one thing and says what went wrong: nothing but its end is read as success."""
    try:
        process.set_pdeathsig(signal.SIGKILL, parent)
        work()
    except OSError as error:
        os.write(complaints, (error.strerror or type(error).__name__).encode())
    finally:
        os._exit(0)


def _look_at(target: bytes, go: int) -> None:
    os.read(go, 1)
    info = os.stat(target)
    if not stat.S_ISDIR(info.st_mode):
        raise OSError(errno.ENOTDIR, "its root is no directory")
    with open(target + b"/hello", "rb") as file:
        if file.read() != _HELLO:
            raise OSError(errno.EIO, "a file does not hold what it should")


def _serve(fd: int, ready: int) -> None:
    from fusewire.serve import Server

    server = Server(_Tiny(), fd, threads=2)
    server.begin()
    os.close(ready)
    server.wait()


def _read_all(fd: int) -> str:
    try:
        return process.read_all(fd).decode(errors="replace")
    finally:
        os.close(fd)


def _clear_up(target: bytes, helper: str | None) -> None:
    """Unmount what a killed trial has left; only fusermount3 can leave anything."""
    found = mountinfo.at(target)
    if found is None or not found.is_fuse:
        return
    if syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
        syscalls.umount2(target, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        return
    for program in fusermount.find(helper)[:1]:
        fusermount.unmount(program, target, lazy=True)
