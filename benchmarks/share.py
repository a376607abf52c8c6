"""Share: what a request of a virtual machine costs a vhost-user-fs daemon, without a virtual machine.

`frontend.c` is QEMU and the guest's kernel to every daemon: Fusewire, QEMU's virtiofsd (C, up to QEMU 7.2), the one
that followed it (Rust). Each shares a directory of a tmpfs; Fusewire also shares a squashfs image, which no peer can
do. All daemons run at once, each with its front end connected, and are measured in turn, batch by batch, so that what
disturbs the machine disturbs them all. CPU is what the daemon's threads have run for (schedstat). It says more than
requests per second do: those also depend on how fast another CPU can be woken.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import share_guest
from harness import Bench, BenchError, MissingError, cpu_nanoseconds, descendants, fusewire_command, peak_memory

FUSEWIRE, IMAGE = "Fusewire", "Fusewire, image"
C, RUST = "C virtiofsd", "Rust virtiofsd"
SERVERS = (FUSEWIRE, C, RUST)
DAEMONS = (FUSEWIRE, C, RUST, IMAGE)
TITLES = {
    "lookup": "LOOKUP",
    "getattr": "GETATTR",
    "read4k": "READ 4 KiB",
    "write4k": "WRITE 4 KiB",
    "read1m": "READ 1 MiB",
    "read1m_pages": "READ 1 MiB in pages",
    "write1m": "WRITE 1 MiB",
    "write1m_pages": "WRITE 1 MiB in pages",
}
GUEST = "guest"
NAMES = (*TITLES, GUEST)
DEPTHS = (1, 16)
QUEUES = (1, 2)
# Fits into the block cache that an image's blocks come from, and not into the CPU's caches: there 1 MiB is copied in a
# third of the time, and fixed costs weigh more.
FILE_SIZE = 32 << 20
BLOCK = 4096
# Where virtiofsd is when it is not in PATH: Debian 12 (C); Debian 13, Fedora (Rust); Arch.
_PLACES = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
_PATIENCE = 30.0
_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")


class Case(NamedTuple):
    """One thing that is measured: so many requests in flight on each of so many request queues."""

    operation: str
    depth: int
    queues: int

    @property
    def key(self) -> str:
        return f"{self.operation} {self.depth} {self.queues}"


CASES = tuple(Case(name, depth, queues) for name in TITLES for depth in DEPTHS for queues in QUEUES)


class Sample(NamedTuple):
    """What one batch gave, in nanoseconds per request, and how often who was woken."""

    time: float
    cpu: float
    own: float
    kicks: float
    calls: float


class Daemon:
    """One daemon that shares `source`, and the front end that is connected to it."""

    def __init__(self, bench: Bench, name: str, command: list[str], source: Path, new: Path | None) -> None:
        """Start both. `{fd}` in `command` becomes a listening socket, `{path}` the path of one to be made.

        `new` is the file that is written to. Raises BenchError with the daemon's last words.
        """
        self.bench, self.name, self.source, self.new = bench, name, source, new
        self.place = bench.temporary / f"share{len(os.listdir(bench.temporary))}"
        self.place.mkdir()
        self.log = self.place / "log"
        path = self.place / "socket"
        before = descendants(os.getpid())
        listener = None
        handed: tuple[int, ...] = ()
        if any("{fd}" in word for word in command):
            # C virtiofsd leaves its pid file behind where it makes the socket itself.
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
            listener.listen()
            handed = (listener.fileno(),)
        words = [word.replace("{path}", str(path)).replace("{fd}", "".join(map(str, handed))) for word in command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=bench.environment,
                start_new_session=True,
                pass_fds=handed,
            )
        if listener is not None:
            listener.close()
        with (self.place / "front").open("wb") as said:
            self.front = subprocess.Popen(
                [str(bench.program("frontend")), str(path), "data", "new" if new else "-", str(max(QUEUES))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=bench.environment,
                start_new_session=True,
            )
        try:
            self.queues = int(self._answer()["queues"])
        except BenchError:
            _end(self.process)
            raise
        self.pids = {pid for pid in descendants(os.getpid()) - before if Path(f"/proc/{pid}/exe").exists()}
        self.pids.discard(self.front.pid)
        self.written = 0  # blocks of `new` that must have been written to

    def last_words(self) -> str:
        texts = [path.read_text(errors="replace").strip() for path in (self.place / "front", self.log) if path.exists()]
        return " / ".join(text[-300:] for text in texts if text) or "it said nothing"

    def _answer(self) -> dict[str, Any]:
        assert self.front.stdout is not None
        deadline = time.monotonic() + _PATIENCE
        line = b""
        while not line and time.monotonic() < deadline and self.process.poll() is None:
            if select.select([self.front.stdout], [], [], 0.1)[0]:
                line = self.front.stdout.readline()
                break
        if not line:
            self.front.kill()
            self.front.wait(5)
            raise BenchError(f"{self.name} does not answer: {self.last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def able(self, case: Case) -> bool:
        """Tell whether it has so many queues, and can be written to if that is wanted."""
        return case.queues <= self.queues and (self.new is not None or not case.operation.startswith("write"))

    def batch(self, case: Case, count: int) -> tuple[Sample, int]:
        """Make `count` requests; also gives the ticks of user and of system time, as a sum of 2**32 * user + system."""
        assert self.front.stdin is not None
        cpu, ticks = self._cpu(), self._ticks()
        self.front.stdin.write(f"{case.operation} {case.depth} {case.queues} {count}\n".encode())
        self.front.stdin.flush()
        got = self._answer()
        cpu, ticks = self._cpu() - cpu, self._ticks() - ticks
        if case.operation.startswith("write") and case.queues == 1:
            size = count * (BLOCK if case.operation == "write4k" else 1 << 20)
            self.written = max(self.written, min(size, FILE_SIZE) // BLOCK)
        figures = (got["ns"], cpu, got["own_cpu_ns"], got["kicks"], got["calls"])
        return Sample(*(figure / count for figure in figures)), ticks

    def _cpu(self) -> int:
        return sum(cpu_nanoseconds(pid) for pid in self.pids if Path(f"/proc/{pid}/task").exists())

    def _ticks(self) -> int:
        total = 0
        for pid in self.pids:
            stat = Path(f"/proc/{pid}/stat").read_text()
            user, system = map(int, stat[stat.rindex(")") + 2 :].split()[11:13])
            total += (user << 32) + system
        return total

    def peak(self) -> int:
        """Give the peak memory of its processes, without what it shares with the guest."""
        return max(peak_memory(pid) for pid in self.pids)

    def stop(self) -> None:
        """End both. What was written must be what the directory holds: BenchError if it is not."""
        if self.front.stdin is not None:
            self.front.stdin.close()
        try:
            self.front.wait(5)
        except subprocess.TimeoutExpired:
            self.front.kill()
            self.front.wait(5)
        _end(self.process)
        if self.new is None:
            return
        blocks = 0
        with self.new.open("rb") as file:
            for offset in range(0, FILE_SIZE, BLOCK):
                word = file.read(BLOCK)[:8]
                if word == (~offset & (1 << 64) - 1).to_bytes(8, "little"):
                    blocks += 1
                elif word != bytes(8):
                    raise BenchError(f"{self.name} wrote something else at {offset} than it was given")
        if blocks < self.written:
            raise BenchError(f"{self.name} wrote {blocks} blocks of at least {self.written}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process: C virtiofsd does so by itself when its front end is gone."""
    for number, patience in ((0, 0.5), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        process.send_signal(number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return


# ---- daemons ----


class Kind(NamedTuple):
    """How a daemon is started on a source."""

    name: str
    command: Callable[[Path], list[str]]
    version: str


def _version(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.search(r"(\d+\.\d+[\w.]*)", done.stdout + done.stderr)
    return found[1] if found else "unknown"


def _virtiofsd() -> dict[str, str]:
    """Give the paths of the two programs of this name; they are told apart by their options."""
    found: dict[str, str] = {}
    for path in dict.fromkeys((shutil.which("virtiofsd"), *_PLACES)):
        if path is not None and os.access(path, os.X_OK):
            done = subprocess.run([path, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
            found.setdefault(RUST if "--shared-dir" in done.stdout + done.stderr else C, path)
    return found


def kinds(only: set[str], missing: dict[str, str]) -> list[Kind]:
    """Give the daemons that are there and wanted; `missing` gets the reason for each that is wanted and not there."""
    found: list[Kind] = []
    ours = [*fusewire_command(), "share"]

    def wanted(name: str) -> bool:
        return not only or name.lower() in only

    if wanted(FUSEWIRE):
        version = _version([*fusewire_command(), "--version"])
        for name in (FUSEWIRE, IMAGE):
            found.append(
                Kind(name, lambda source: [*ours, str(source), "--socket-path={path}", "--cache=auto"], version)
            )
    there = _virtiofsd()
    ways = {
        C: ("apt-get install qemu-system-common (Debian 12; later ones have the other virtiofsd)", _c_command),
        RUST: ("no virtiofsd of that kind in PATH (Debian 13: apt-get install virtiofsd)", _rust_command),
    }
    for name, (way_out, command) in ways.items():
        if not wanted(name):
            continue
        if name in there:
            path = there[name]
            found.append(
                Kind(name, lambda source, p=path, c=command: c(p, source), _version([path, "--version"]))  # type: ignore[misc]
            )
        else:
            missing[name] = way_out
    return found


def _c_command(path: str, source: Path) -> list[str]:
    return [path, "--fd={fd}", "-f", "-o", f"source={source},sandbox=chroot,cache=auto"]


def _rust_command(path: str, source: Path) -> list[str]:
    return [path, "--socket-path={path}", f"--shared-dir={source}", "--sandbox=chroot", "--cache=auto"]


def _make_image(bench: Bench, top: Path) -> Path:
    maker = shutil.which("mksquashfs")
    if maker is None:
        raise MissingError("no mksquashfs: apt-get install squashfs-tools")
    image = top / "image.sqsh"
    argv = [maker, str(top / "image"), str(image), "-comp", "gzip", "-noappend", "-quiet", "-no-progress"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=bench.environment)
    if done.returncode != 0:
        raise MissingError(f"mksquashfs: {done.stderr.strip()[-300:]}")
    return image


def _make_data(top: Path) -> None:
    """Make the file that is read: every block holds its own offset."""
    (top / "image").mkdir()
    with (top / "image" / "data").open("wb", buffering=0) as file:
        for start in range(0, FILE_SIZE, 1 << 20):
            offsets = range(start, start + (1 << 20), BLOCK)
            file.write(b"".join(offset.to_bytes(8, "little") * (BLOCK // 8) for offset in offsets))


def _make_source(top: Path, name: str) -> Path:
    """Make a directory with that file, and with one of zeros that is written to."""
    home = top / name.replace(" ", "-").lower()
    home.mkdir()
    os.link(top / "image" / "data", home / "data")
    with (home / "new").open("wb", buffering=0) as file:
        for _ in range(FILE_SIZE >> 20):
            file.write(bytes(1 << 20))
    return home


def _start(bench: Bench, found: list[Kind], missing: dict[str, str]) -> list[Daemon]:
    top = bench.temporary / "shared"
    top.mkdir()
    bench.tmpfs(top, (len(found) + 2) * FILE_SIZE + (64 << 20))
    _make_data(top)
    daemons: list[Daemon] = []
    for kind in found:
        try:
            if kind.name == IMAGE:
                daemons.append(Daemon(bench, kind.name, kind.command(_make_image(bench, top)), top, None))
            else:
                source = _make_source(top, kind.name)
                daemons.append(Daemon(bench, kind.name, kind.command(source), source, source / "new"))
        except (BenchError, MissingError, OSError) as reason:
            missing[kind.name] = str(reason)
    return daemons


# ---- the run ----


def run(bench: Bench, rounds: int, only: set[str], cases: set[str]) -> dict[str, Any]:
    """Measure all daemons; {"daemons": {name: {"queues": n, "cases": {key: figures}}}, "missing": {...}, ...}.

    The guest's part is done only when it is asked for by its name: it takes minutes, and compares modes, not daemons.
    """
    wanted = [case for case in CASES if not cases or case.operation in cases]
    missing: dict[str, str] = {}
    results: dict[str, Any] = {"rounds": rounds, "missing": missing, "versions": {}, "daemons": {}}
    if wanted:
        results |= _measure(bench, rounds, only, wanted, missing)
    if GUEST in cases:
        try:
            results["guest"] = share_guest.run(bench)
        except MissingError as reason:
            missing["the guest"] = str(reason)
    return results


def _measure(bench: Bench, rounds: int, only: set[str], wanted: list[Case], missing: dict[str, str]) -> dict[str, Any]:
    found = kinds(only, missing)
    daemons = _start(bench, found, missing)
    plan = [(case, [daemon for daemon in daemons if daemon.able(case)]) for case in wanted]
    counts = _calibrate(bench, plan)
    samples: dict[tuple[str, str], list[Sample]] = {}
    ticks: dict[tuple[str, str], int] = {}
    total, done = rounds * sum(len(able) for _, able in plan), 0
    for turn in range(rounds):
        for case, able in plan:
            for daemon in able[turn % len(able) :] + able[: turn % len(able)] if able else ():
                bench.progress.step(f"share: {case.key}, round {turn + 1}: {daemon.name}", done, total)
                done += 1
                key = daemon.name, case.key
                sample, spent = daemon.batch(case, counts[key])
                samples.setdefault(key, []).append(sample)
                ticks[key] = ticks.get(key, 0) + spent
    bench.progress.clear()
    peaks = {daemon.name: daemon.peak() for daemon in daemons}
    for daemon in daemons:
        daemon.stop()
    return {
        "file_bytes": FILE_SIZE,
        "versions": {kind.name: kind.version for kind in found if kind.name in peaks},
        "daemons": {
            daemon.name: {
                "queues": daemon.queues,
                "peak_mib": round(peaks[daemon.name] / (1 << 20), 1),
                "cases": {
                    case.key: _figures(samples[daemon.name, case.key], ticks[daemon.name, case.key])
                    for case in wanted
                    if (daemon.name, case.key) in samples
                },
            }
            for daemon in daemons
        },
    }


def _calibrate(bench: Bench, plan: list[tuple[Case, list[Daemon]]]) -> dict[tuple[str, str], int]:
    """Choose how many requests make a batch of 40 ms (quick: 25). Also the warm-up: all memory has been touched."""
    batch = 25_000_000 if bench.quick else 40_000_000
    counts = {}
    bench.progress.say("share: warming up")
    for case, able in plan:
        few = 2 * case.depth * case.queues + (24 if "1m" in case.operation else 200)
        for daemon in able:
            daemon.batch(case, few)
            sample, _ = daemon.batch(case, few)
            least = 4 * case.depth * case.queues
            counts[daemon.name, case.key] = max(least, int(batch / sample.time))
    return counts


def _figures(samples: list[Sample], ticks: int) -> dict[str, Any]:
    user, system = ticks >> 32, ticks & 0xFFFFFFFF
    figures: dict[str, Any] = {
        "cpu_us": round(median(sample.cpu for sample in samples) / 1000, 3),
        "per_second": round(1e9 / median(sample.time for sample in samples)),
        "frontend_cpu_us": round(median(sample.own for sample in samples) / 1000, 3),
        "kicks": round(median(sample.kicks for sample in samples), 3),
        "calls": round(median(sample.calls for sample in samples), 3),
        "cpu_samples_us": [round(sample.cpu / 1000, 3) for sample in samples],
        "samples_us": [round(sample.time / 1000, 3) for sample in samples],
    }
    # The kernel counts these in ticks: too few of them say nothing.
    if (user + system) * _TICK_NS >= 200_000_000:
        figures["system_share"] = round(system / (user + system), 3)
    return figures
