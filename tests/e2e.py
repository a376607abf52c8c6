"""What the end-to-end tests share: a world of users and directories of their own, and the command line run in it.

Every process of a world carries a mark in its environment, so whatever survives a test is found, named and ended.
Run as a program (`python e2e.py snapshot DIR`, ...) this file is also what looks at a mount from inside: it needs
nothing but the standard library there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pickle
import pty
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = os.path.abspath(__file__)
ROOT = os.geteuid() == 0
USER = 4242 if ROOT else os.geteuid()  # has no name and no subordinate ids
OTHER = 4243
NOBODY = 65534  # has a name
MARK = "FUSEWIRE_TEST_WORLD"
PATIENCE = 20.0  # seconds; nothing here takes so long unless it hangs
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

Result = subprocess.CompletedProcess[str]


class World:
    """The directories, users and processes of one test. `close` ends and removes everything and tells what was left."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="fusewire-e2e-", dir="/tmp"))
        self.base.chmod(0o755)
        self.mark = self.base.name
        self.program = str(shutil.copy(HERE, self.base))
        os.chmod(self.program, 0o755)
        self._shared = {uid: os.path.lexists(f"/tmp/fusewire-{uid}") for uid in (0, USER, OTHER, NOBODY)}
        self._processes: list[Process] = []

    # Places

    def _own(self, path: Path, uid: int, mode: int) -> Path:
        if not path.exists():
            path.mkdir()
            path.chmod(mode)
            if ROOT:
                os.chown(path, uid, uid)
        return path

    def home(self, uid: int = USER) -> Path:
        """The directory where commands of that user start."""
        return self._own(self.base / f"home-{uid}", uid, 0o755)

    def runtime(self, uid: int = USER) -> Path:
        """The XDG_RUNTIME_DIR of that user."""
        return self._own(self.base / f"run-{uid}", uid, 0o700)

    def records(self, uid: int = USER) -> list[Path]:
        """The directories of the mounts that are on record for that user."""
        with contextlib.suppress(FileNotFoundError):
            return sorted((self.runtime(uid) / "fusewire").iterdir())
        return []

    # Commands

    def words(
        self,
        uid: int = USER,
        *,
        fusermount: bool = False,
        env: dict[str, str] | None = None,
        outer: Sequence[str] = (),
        wrap: Sequence[str] = (),
    ) -> tuple[list[str], list[str]]:
        """The words that make a process of this world and user, and the words of its Python.

        outer: words before root becomes that user. wrap: words of the user, before the program.
        """
        import rootless

        if uid == 0 or uid == os.geteuid():
            interpreter, path = [sys.executable, "-W", "error"], f"{os.path.dirname(rootless.TESTS)}/src"
            become = [] if uid == 0 or fusermount else ["setpriv", "--no-new-privs", "--"]
        else:
            all_words = rootless.rootless_python(uid, fusermount=fusermount)
            become, interpreter = all_words[: all_words.index("env")], all_words[-3:]
            path = next(word for word in all_words if word.startswith("PYTHONPATH="))[11:]
        environment = {
            "PATH": PATH,
            "HOME": str(self.home(uid)),
            "TMPDIR": str(self.home(uid)),
            "XDG_RUNTIME_DIR": str(self.runtime(uid)),
            "LANG": "C.UTF-8",
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: self.mark,
            **(env or {}),
        }
        assignments = [f"{name}={value}" for name, value in environment.items()]
        return [*outer, *become, "env", "-i", *assignments, *wrap], interpreter

    def command(self, kind: str, arguments: Sequence[str | os.PathLike[str]], uid: int, **how: Any) -> list[str]:
        """The whole command line for `fusewire ARGUMENTS`, a program, or this file's own commands."""
        process, python = self.words(uid, **how)
        middle = {"fusewire": [*python, "-m", "fusewire"], "program": [], "tool": [*python, self.program]}[kind]
        return [*process, *middle, *map(os.fspath, arguments)]

    def _run(self, kind: str, arguments: Sequence[str | os.PathLike[str]], uid: int, how: dict[str, Any]) -> Result:
        cwd, text_in, fds = how.pop("cwd", None), how.pop("input", None), how.pop("pass_fds", ())
        with subprocess.Popen(
            self.command(kind, arguments, uid, **how),
            cwd=cwd or self.home(uid),
            stdin=subprocess.DEVNULL if text_in is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="surrogateescape",
            pass_fds=fds,
        ) as process:
            try:
                out, err = process.communicate(text_in, timeout=PATIENCE * 2)
            except subprocess.TimeoutExpired:
                self.end_processes()
                raise
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def fw(self, *arguments: str | os.PathLike[str], uid: int = USER, **how: Any) -> Result:
        """Run `fusewire ARGUMENTS` to its end. `how`: cwd, input, pass_fds, and `words`'s."""
        return self._run("fusewire", arguments, uid, how)

    def do(self, *arguments: str | os.PathLike[str], uid: int = USER, **how: Any) -> Result:
        """Run a program in a process that has nothing to do with Fusewire's, as another shell of that user would."""
        return self._run("program", arguments, uid, how)

    def sh(self, script: str, uid: int = USER, **how: Any) -> Result:
        """Run a shell script in such a process."""
        return self._run("program", ["sh", "-c", script], uid, how)

    def start(self, kind: str, *arguments: str | os.PathLike[str], uid: int = USER, **how: Any) -> Process:
        """Start a command (see `command` for the kinds) and go on."""
        cwd, popen = how.pop("cwd", None) or self.home(uid), how.pop("popen", {})
        process = Process(self.command(kind, arguments, uid, **how), cwd, popen)
        self._processes.append(process)
        return process

    def tool(self, *arguments: str | os.PathLike[str], uid: int = USER) -> list[str]:
        """The words for one of this file's own commands, for a process that has this world's environment already."""
        return [*self.words(uid)[1], self.program, *map(os.fspath, arguments)]

    def mount(self, *arguments: str | os.PathLike[str], uid: int = USER, **how: Any) -> dict[str, Any]:
        """`fusewire mount --json ARGUMENTS`: what it says of the mount."""
        done = self.fw("mount", "--json", *arguments, uid=uid, **how)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextlib.contextmanager
    def mounted(self, *arguments: str | os.PathLike[str], uid: int = USER, **how: Any) -> Iterator[dict[str, Any]]:
        """A mount for the time of a block; it is unmounted in the orderly way, and that has to work."""
        found = self.mount(*arguments, uid=uid, **how)
        yield found
        done = self.fw("umount", found["target"], uid=uid)
        assert (done.returncode, done.stderr) == (0, "")

    def listed(self, uid: int = USER, **how: Any) -> list[dict[str, Any]]:
        """What `fusewire list --json` says of the mounts of this world."""
        done = self.fw("list", "--json", uid=uid, **how)
        assert done.returncode == 0, done.stderr
        # root's are the machine's, and a descriptor's mount has no target of ours.
        places = (f"{self.base}/", f"{self.base.parent}/fusewire-images-")
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return [row for row in found if any(str(row[name]).startswith(places) for name in ("source", "target"))]

    # What is left

    def pids(self) -> list[int]:
        """The living processes of this world."""
        return marked(self.mark)

    def end_processes(self) -> None:
        end_marked(self.mark)

    def mounts(self) -> list[str]:
        """Mount points on the host that are in this world or show something of it."""
        return mounts_of(str(self.base))

    def close(self) -> list[str]:
        """End what is left, remove everything; give what a test should not have left behind."""
        left = []
        for process in self._processes:
            process.close_pipes()
        # What is about to end by itself may do so: each of them is waited for, not polled.
        deadline = time.monotonic() + PATIENCE / 4
        for pid in self.pids():
            if not ends(pid, max(0.0, deadline - time.monotonic())):
                left.append(f"process {pid}: {' '.join(command_line(pid))}")
        left += [f"mount {place}" for place in self.mounts()]
        for uid in (0, USER, OTHER, NOBODY):
            if (self.base / f"run-{uid}").exists():
                left += [f"record {path}" for path in self.records(uid)]
            if not self._shared[uid] and os.path.lexists(f"/tmp/fusewire-{uid}"):
                left.append(f"directory /tmp/fusewire-{uid}")
                shutil.rmtree(f"/tmp/fusewire-{uid}")
        self.end_processes()
        for process in self._processes:
            process.reap()
        for place in self.mounts():
            detach(place)
        shutil.rmtree(self.base)
        return left


class Process:
    """A command that runs beside the test, with pipes to it."""

    def __init__(self, command: list[str], cwd: Path, popen: dict[str, Any]) -> None:
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        self.popen = subprocess.Popen(command, cwd=cwd, text=True, errors="surrogateescape", **how)
        self.pid = self.popen.pid

    def line(self) -> str:
        """The next line of its standard output, without the newline; "" at its end."""
        assert self.popen.stdout is not None
        readable, _, _ = select.select([self.popen.stdout], [], [], PATIENCE)
        assert readable, "nothing was printed"
        return str(self.popen.stdout.readline()).rstrip("\n")

    def say(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(text + "\n")
        self.popen.stdin.flush()

    def close_stdin(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE)

    def finish(self) -> Result:
        """Wait for the end; what it has printed since."""
        out, err = self.popen.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(self.popen.args, self.popen.returncode, out, err)

    def close_pipes(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def reap(self) -> None:
        self.popen.kill()
        self.popen.wait()


class Terminal:
    """A process with a terminal of its own, as the leader of a session."""

    def __init__(self, world: World, *words: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 200, 0, 0))
        modes = termios.tcgetattr(slave)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, modes)

        popen = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process: Process = world.start("program", *words, popen=popen, outer=["setsid", "--ctty"])
        os.close(slave)
        self.seen = b""

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def until(self, text: bytes) -> bytes:
        """Read until `text` was shown; everything up to it."""
        while text not in self.seen:
            assert select.select([self.master], [], [], PATIENCE)[0], f"no {text!r} in {self.seen!r}"
            try:
                part = os.read(self.master, 4096)
            except OSError:  # EIO: the other side is closed
                part = b""
            assert part, f"no {text!r} in {self.seen!r}"
            self.seen += part
        before, _, self.seen = self.seen.partition(text)
        return before


# Processes and mounts, found without touching anything that could hang.


def marked(mark: str) -> list[int]:
    """The living processes (no zombies) whose environment has that mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def end_marked(mark: str) -> None:
    while found := marked(mark):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            if not ends(pid, 5):
                return  # one in D state: nothing more can be done from here


def ends(pid: int, seconds: float = PATIENCE) -> bool:
    """Wait until a process has ended; False if time ran out first."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    return []


def status(pid: int, field: str) -> str:
    """A field of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    raise KeyError(field)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def described(pid: int) -> str:
    """What a process and all below it wait for, for the report of a test in which something hangs."""
    said = [f"{pid}: {' '.join(command_line(pid))[-120:]}"]
    for name, wanted in (
        ("status", ("State", "SigQ", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")),
        ("wchan", ()),
    ):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
            said.append("  " + "; ".join(line for line in lines if not wanted or line.partition(":")[0] in wanted))
    for name in ("syscall", "stack"):
        with contextlib.suppress(OSError):
            said.append("  " + Path(f"/proc/{pid}/{name}").read_text().strip().replace("\n", "\n  "))
    with contextlib.suppress(OSError):
        said += [described(child) for child in children(pid)]
    return "\n".join(said)


def mounts_of(base: str) -> list[str]:
    from fusewire.linux import mountinfo

    found = [(os.fsdecode(mount.mount_point), os.fsdecode(mount.source)) for mount in mountinfo.mounts()]
    return [place for place, source in found if any(name.startswith(base + "/") for name in (place, source))]


def detach(place: str) -> None:
    """umount2(2) with MNT_DETACH: also of mounts whose server is dead."""
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(place), 2)


# What looks at a tree


def digest(path: bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def snapshot(top: bytes) -> dict[bytes, dict[str, object]]:
    """Everything that can be seen of each path below `top` (itself is b""): attributes, names, targets, xattrs, bytes.

    A trusted.* attribute that is listed but refused (capability CAP_SYS_ADMIN of xattr(7)) has the value None.
    """
    found: dict[bytes, dict[str, object]] = {}
    stack = [b""]
    while stack:
        relative = stack.pop()
        path = os.path.join(top, relative) if relative else top
        info = os.lstat(path)
        row: dict[str, object] = {
            name: getattr(info, f"st_{name}")
            for name in ("mode", "uid", "gid", "size", "nlink", "ino", "rdev", "blocks", "mtime_ns", "ctime_ns")
        }
        if stat.S_ISDIR(info.st_mode):
            names = sorted(os.listdir(path))
            row["names"] = names
            stack += [os.path.join(relative, name) for name in names]
        elif stat.S_ISLNK(info.st_mode):
            row["target"] = os.readlink(path)
        elif stat.S_ISREG(info.st_mode):
            row["content"] = digest(path)
        xattrs: dict[str, bytes | None] = {}
        try:
            listed = sorted(os.listxattr(path, follow_symlinks=False))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # an image without any
                raise
            listed = []
        for name in listed:
            try:
                xattrs[name] = os.getxattr(path, name, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EPERM):
                    raise
                xattrs[name] = None
        row["xattrs"] = xattrs
        found[relative] = row
    return found


def walk(top: bytes) -> dict[str, int]:
    """Touch everything below `top` in every way; how often each error came, "ok" counting what worked."""
    counts: dict[str, int] = {}

    def attempt(work: Callable[[], object]) -> object:
        try:
            result = work()
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error))
            counts[name] = counts.get(name, 0) + 1
            return None
        counts["ok"] = counts.get("ok", 0) + 1
        return result

    stack = [top]
    seen = 0
    while stack and seen < 5000:  # a damaged directory may lead in circles
        path = stack.pop()
        seen += 1
        info = attempt(lambda path=path: os.lstat(path))
        attempt(lambda path=path: os.listxattr(path, follow_symlinks=False))
        if info is None:
            continue
        assert isinstance(info, os.stat_result)
        if stat.S_ISDIR(info.st_mode) and path.count(b"/") < 40:
            names = attempt(lambda path=path: os.listdir(path))
            stack += [os.path.join(path, name) for name in names] if isinstance(names, list) else []
        elif stat.S_ISLNK(info.st_mode):
            attempt(lambda path=path: os.readlink(path))
        elif stat.S_ISREG(info.st_mode):
            attempt(lambda path=path: _read_some(path))
    return counts


def _read_some(path: bytes) -> int:
    """Read the beginning and the end of a file, at most 2 MiB: damaged sizes reach 2^63."""
    fd = os.open(path, os.O_RDONLY)
    try:
        length = len(os.pread(fd, 1 << 20, 0))
        size = os.fstat(fd).st_size
        return length + len(os.pread(fd, 1 << 20, max(0, size - (1 << 20))))
    finally:
        os.close(fd)


def _main(arguments: list[str]) -> None:
    command, rest = arguments[0], [os.fsencode(word) for word in arguments[1:]]
    if command == "snapshot":
        with open(rest[1], "wb") as file:
            pickle.dump(snapshot(rest[0]), file)
    elif command == "walk":
        print(json.dumps(walk(rest[0])))
    elif command == "map":
        _map(rest[0])
    elif command == "digest":
        print(digest(rest[0]))
    elif command == "fds":
        print(len(os.listdir("/proc/self/fd")) - 1)
    elif command == "watchdog":
        _watch(*map(os.fsdecode, rest))
    else:
        raise SystemExit(f"no such command: {command}")


def _map(path: bytes) -> None:
    """Read a file by mmap(2), as a program that is started from it does."""
    import mmap

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        print(hashlib.blake2b(view, digest_size=16).hexdigest())


def _watch(mark: str, seconds: str) -> None:
    """End all processes of a world when the test has taken too long: a hanging mount must not hang the test with it.

    It is a process of its own, since one that waits for a mount may hold its interpreter.
    """
    if not select.select([0], [], [], float(seconds))[0]:
        end_marked(mark)


@contextlib.contextmanager
def deadline(mark: str, seconds: float) -> Iterator[None]:
    """Have a world's processes ended if the block takes longer than that."""
    watch = subprocess.Popen(
        [sys.executable, "-S", "-E", HERE, "watchdog", mark, str(seconds)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert watch.stdin is not None
        watch.stdin.close()
        watch.wait()


if __name__ == "__main__":
    _main(sys.argv[1:])
