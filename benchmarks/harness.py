"""What every benchmark needs: servers that are always cleaned up, their cost, the compiled programs, the peers.

Standard library only. Nothing here measures; it starts, watches and ends. Three things make the clean-up certain: the
whole run has a mount namespace of its own, so no mount is seen or left outside; it is a subreaper, so a server that
daemonizes stays our descendant and `Bench` ends it; and when the run itself is killed, a watcher ends what it left,
which it knows by that namespace.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

HERE = Path(__file__).resolve().parent
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_MS_NOATIME = 0x400
_MNT_FORCE, _MNT_DETACH = 1, 2
_PR_SET_CHILD_SUBREAPER = 36
_LIBFUSE = "libfuse3.so.3"
_TICK = 1 / os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something that this run needs did not work; the text names it and the way out."""


class MissingError(Exception):
    """A peer is not there; the text is the reason that its row shows."""


class Cost(NamedTuple):
    """What the processes of a server have used so far: CPU seconds (user and system), and peak memory in bytes."""

    cpu: float
    peak: int


# ---- processes ----


def descendants(of: int) -> set[int]:
    """Give the ids of all processes below `of`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:
                continue
            parent = int(stat[stat.rindex(")") + 2 :].split()[1])
            children.setdefault(parent, []).append(int(entry))
    found: set[int] = set()
    queue = [of]
    while queue:
        for child in children.get(queue.pop(), ()):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def cpu_seconds(pid: int) -> float:
    """Give user and system time of a process, its ended threads and its waited-for children, proc(5)."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat[stat.rindex(")") + 2 :].split()
    return sum(map(int, fields[11:15])) * _TICK


def cpu_nanoseconds(pid: int) -> int:
    """Give the time on CPU of a process's living threads, exact where the kernel has schedstats (else from ticks)."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
        except (OSError, IndexError):
            return int(cpu_seconds(pid) * 1e9)
    return total


def peak_memory(pid: int) -> int:
    """Give the largest resident size that a process has had, in bytes (VmHWM)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _mount_error(call: str, subject: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", subject)


def enter_namespace() -> bool:
    """Move this process into a mount namespace of its own; without root into a user namespace first.

    Gives True when we are root outside any namespace of ours (so loop mounts and drop_caches are possible).
    """
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    if _LIBC.unshare(flags) != 0:
        raise BenchError(
            f"no mount namespace ({os.strerror(ctypes.get_errno())}): run as root, or allow user namespaces"
        )
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        raise _mount_error("mount", "/")
    return uid == 0


def _watch(tube: int, temporary: Path) -> None:
    """Wait for the run to end; when it ends without a word, end what it has left: its mounts, processes and files."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)  # whoever reads the run's output is not to wait for us
    if os.read(tube, 1):
        return
    ours = os.readlink("/proc/self/ns/mnt")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            target = line.split()[4]
            if target.startswith(f"{temporary}/"):
                _LIBC.umount2(os.fsencode(target), _MNT_FORCE)
                _LIBC.umount2(os.fsencode(target), _MNT_DETACH)
        left = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]
        left = [pid for pid in left if _namespace(pid) == ours]
        if not left:
            break
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    shutil.rmtree(temporary, ignore_errors=True)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


class Server:
    """One mounted filesystem: its mount point, its processes, how long it took to answer."""

    def __init__(self, bench: Bench, name: str, target: Path) -> None:
        self.bench = bench
        self.name = name
        self.target = target
        self.process: subprocess.Popen[bytes] | None = None
        self.pids: set[int] = set()
        self.mount_seconds = 0.0
        self.log = target.with_suffix(".log")
        self.output = target.with_suffix(".out")

    def start(self, argv: list[str], limit: float = 60) -> None:
        """Start the command and wait until a stat of the mount's root is answered, else BenchError with its words."""
        before = descendants(os.getpid())
        outside = os.stat(self.target).st_dev
        self.bench.targets.append(self.target)
        with self.log.open("wb") as log, self.output.open("wb") as output:
            began = time.perf_counter()
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=self.bench.environment,
                start_new_session=True,
            )
        # The same yardstick for a server that tells when it is ready, one that does not, and the kernel.
        while os.stat(self.target).st_dev == outside:
            code = self.process.poll()
            if code is not None and code != 0:
                raise BenchError(f"{self.name} ended with status {code}: {self.last_words()}")
            if time.perf_counter() - began > limit:
                raise BenchError(f"{self.name} was not mounted after {limit:.0f} s: {self.last_words()}")
            time.sleep(0.0002)
        self.mount_seconds = time.perf_counter() - began
        self.pids = {pid for pid in descendants(os.getpid()) - before if Path(f"/proc/{pid}/exe").exists()}

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace").strip() or self.output.read_text(errors="replace").strip()
        return text[-400:] if text else "it said nothing"

    def cost(self) -> Cost:
        """Give what the server's processes used so far; nothing for a filesystem in the kernel."""
        cpu, peak = 0.0, 0
        for pid in self.pids:
            try:
                cpu += cpu_seconds(pid)
                peak += peak_memory(pid)
            except OSError:
                continue  # a helper that has done its part
        return Cost(cpu, peak)

    def cpu_nanoseconds(self) -> int:
        return sum(cpu_nanoseconds(pid) for pid in self.pids if Path(f"/proc/{pid}/task").exists())

    def pin(self, cpus: set[int]) -> None:
        """Let all threads of the server run on these CPUs only."""
        for pid in self.pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), cpus)

    def abort(self) -> None:
        """End the mount by force: whoever waits in it gets an error instead of waiting for ever."""
        name = os.fsencode(self.target)
        _LIBC.umount2(name, _MNT_FORCE)
        _LIBC.umount2(name, _MNT_DETACH)

    def stop(self) -> None:
        """Unmount and wait for the server to end; by force when it does not."""
        name = os.fsencode(self.target)
        deadline = time.monotonic() + 2
        while failed := _LIBC.umount2(name, 0) != 0:
            if ctypes.get_errno() != errno.EBUSY:
                break
            if time.monotonic() > deadline:
                self.abort()
                break
            time.sleep(0.01)
        if failed and self.process is not None:
            self.process.terminate()  # stopped before it had mounted: it would wait for requests for ever
        if self.target in self.bench.targets:
            self.bench.targets.remove(self.target)
        if self.process is not None:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait(5)
        self.pids.clear()


class Bench:
    """One run: directories, settings, compiled programs, and everything that must be ended."""

    def __init__(self, cache: Path, *, quick: bool, progress: Progress) -> None:
        self.cache = cache
        self.quick = quick
        self.progress = progress
        self.root = False
        self.targets: list[Path] = []
        self.temporary = Path()
        self.environment: dict[str, str] = {}
        self._count = 0
        self._watcher = 0
        self._tube = -1

    def __enter__(self) -> Self:
        self.cache.mkdir(parents=True, exist_ok=True)
        self.root = enter_namespace()
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        self.temporary = Path(tempfile.mkdtemp(prefix="fusewire-bench-"))
        end, self._tube = os.pipe()
        self._watcher = os.fork()
        if self._watcher == 0:
            try:
                os.close(self._tube)
                _watch(end, self.temporary)
            finally:
                os._exit(0)
        os.close(end)
        runtime = self.temporary / "runtime"
        runtime.mkdir(mode=0o700)
        self.environment = {**os.environ, "LC_ALL": "C", "XDG_RUNTIME_DIR": str(runtime)}
        # Compiled modules are kept, as after any installation: else start-up would measure the compiler.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        # mfusepy takes libfuse 2 where both are installed (bindfs brings it); it is to be measured at its best.
        try:
            ctypes.CDLL(_LIBFUSE)
            self.environment.setdefault("FUSE_LIBRARY_PATH", _LIBFUSE)
        except OSError:
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.progress.clear()
        for target in reversed(self.targets):
            name = os.fsencode(target)
            _LIBC.umount2(name, _MNT_FORCE)
            _LIBC.umount2(name, _MNT_DETACH)
        self._end_descendants()
        shutil.rmtree(self.temporary, ignore_errors=True)
        os.write(self._tube, b"x")
        os.close(self._tube)

    def _end_descendants(self) -> None:
        for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + patience
            told: set[int] = set()
            while left := self._living():
                for pid in left - told:
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        pass
                told |= left
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            else:
                return

    def _living(self) -> set[int]:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        return descendants(os.getpid()) - {self._watcher}

    # ---- servers and clients ----

    def tmpfs(self, target: Path, size: int) -> None:
        """Mount an empty tmpfs of at most `size` bytes; it is gone with the run."""
        options = b"size=%d,mode=755" % size
        if _LIBC.mount(b"bench", os.fsencode(target), b"tmpfs", _MS_NOATIME, options) != 0:
            raise _mount_error("mount of a tmpfs", str(target))
        self.targets.append(target)

    def server(self, name: str) -> Server:
        """Make a server with a fresh mount point; not started yet."""
        self._count += 1
        target = self.temporary / f"mount{self._count}"
        target.mkdir()
        return Server(self, name, target)

    def run(self, argv: list[str], server: Server, *, limit: float = 120, cpus: set[int] | None = None) -> bytes:
        """Run a client against a server and give its output; TimeoutExpired after `limit` seconds."""
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus or everywhere)  # inherited by the client
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.temporary,
                env=self.environment,
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, everywhere)
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException:
            server.abort()  # first: a client that waits for a dead server cannot be killed
            process.kill()
            process.wait(5)
            raise
        if process.returncode != 0:
            words = errors.decode(errors="replace").strip()[-300:]
            raise BenchError(f"{os.path.basename(argv[0])} on {server.name}: status {process.returncode}: {words}")
        return output

    def run_with_input(
        self, argv: list[str], source: subprocess.Popen[bytes], server: Server, *, limit: float
    ) -> bytes:
        """Run a client that reads what `source` writes; the caller ends `source`."""
        process = subprocess.Popen(
            argv,
            stdin=source.stdout,
            stdout=subprocess.PIPE,
            cwd=self.temporary,
            env=self.environment,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException:
            server.abort()
            source.kill()  # its end closes the pipe that the client reads
            process.kill()
            process.wait(5)
            raise
        return output

    def client(self, *arguments: object, server: Server, limit: float = 120, cpus: set[int] | None = None) -> Any:
        """Run a command of client.c and give what it printed."""
        argv = [str(self.program("client")), *map(str, arguments)]
        return json.loads(self.run(argv, server, limit=limit, cpus=cpus))

    def program(self, name: str) -> Path:
        """Give the compiled form of NAME.c, compiled anew when the source is newer; BenchError without a compiler."""
        made = self.cache / "build" / name
        source = HERE / f"{name}.c"
        newest = max(path.stat().st_mtime for path in (source, HERE / "pattern.h"))
        if made.exists() and made.stat().st_mtime > newest:
            return made
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise BenchError("no C compiler: apt-get install gcc libc6-dev linux-libc-dev")
        made.parent.mkdir(exist_ok=True)
        argv = [compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", f"{made}.new", str(source)]
        done = subprocess.run(argv, capture_output=True, text=True, env=self.environment)
        if done.returncode != 0:
            raise BenchError(f"{source.name} does not compile: {done.stderr.strip()[-800:]}")
        os.replace(f"{made}.new", made)
        return made

    def drop_caches(self) -> bool:
        """Drop the kernel's unused names and inodes; only root may."""
        try:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        except OSError:
            return False
        return True

    # ---- peers from PyPI ----

    def peer(self, requirement: str, module: str) -> Path:
        """Give the Python of the peers' environment with `requirement` in it; MissingError says why it has not."""
        home = self.cache / f"peers-{sys.version_info.major}.{sys.version_info.minor}"
        python = home / "bin" / "python"
        if not python.exists():
            self.progress.say("making an environment for the peers")
            self._install([sys.executable, "-m", "venv", str(home)], "a virtual environment")
        probe = [str(python), "-c", f"import {module}"]
        if subprocess.run(probe, capture_output=True).returncode != 0:
            refused = home / f"{module}.refused"
            if refused.exists() and time.time() - refused.stat().st_mtime < 600:
                raise MissingError(refused.read_text())
            self.progress.say(f"installing {requirement}")
            try:
                self._install([str(python), "-m", "pip", "install", "-q", requirement], requirement)
                done = subprocess.run(probe, capture_output=True, text=True)
                if done.returncode != 0:
                    raise MissingError(f"{requirement} does not import: {done.stderr.strip().splitlines()[-1]}")
            except MissingError as reason:
                refused.write_text(str(reason))
                raise
        return python

    def peer_version(self, python: Path, package: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
        return done.stdout.strip() or "unknown"

    def _install(self, argv: list[str], what: str) -> None:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True)
        if done.returncode != 0:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line] or ["no reason given"]
            hint = " (needs: apt-get install libfuse3-dev pkg-config python3-dev gcc)" if "pyfuse3" in what else ""
            raise MissingError(f"{what} could not be installed{hint}: {lines[-1].strip()[:200]}")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Progress:
    """One line on a terminal that says what is going on; plain lines, fewer of them, anywhere else."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.said = ""

    def say(self, text: str) -> None:
        """Announce a phase."""
        self.clear()
        print(f"  {text} ...", file=sys.stderr, flush=True)

    def step(self, title: str, done: int, total: int) -> None:
        """Show how far a phase is."""
        if self.terminal:
            width = 24
            full = width * done // max(total, 1)
            columns = shutil.get_terminal_size().columns
            line = f"  [{'#' * full}{'.' * (width - full)}] {title}"[: columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def machine() -> dict[str, object]:
    """Give the facts without which figures mean nothing; nothing that identifies the machine."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": model[1] if model else "unknown",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[1]) // 1024 if memory else 0,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "load_before": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def fusewire_command() -> list[str]:
    """Give the command line of the Fusewire that belongs to this interpreter."""
    script = Path(sys.executable).with_name("fusewire")
    return [str(script)] if script.exists() else [sys.executable, "-m", "fusewire"]
