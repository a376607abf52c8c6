"""Hello: what one operation on the smallest filesystem costs, by Fusewire's ways to write one and by its peers.

Every server has the filesystem of servers/hello.py: one directory, one file of 4 KiB, nothing cached. All are mounted
at once and measured in turn, batch by batch, so that what disturbs the machine disturbs them all. An operation is what
a program does (several requests), each is timed by itself, and its cost is all CPU of the server's processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import Any, NamedTuple

from harness import HERE, Bench, BenchError, MissingError, Server

TITLES = {"stat": "stat", "read": "open, read, close", "listdir": "listdir"}
OPERATIONS = tuple(TITLES)
LEVEL_1, LEVEL_2, COMPAT = "Fusewire Operations", "Fusewire nodes", "Fusewire compat.fusepy"
PYFUSE3, MFUSEPY, FUSEPY = "pyfuse3", "mfusepy", "fusepy"
OURS, PEERS = (LEVEL_1, LEVEL_2, COMPAT), (PYFUSE3, MFUSEPY, FUSEPY)
SERVERS = (*OURS, *PEERS)
_BATCH_NS = 30_000_000
_FEW = 100


class Kind(NamedTuple):
    """One way to serve it: `script` is what servers/hello.py calls it, `module` what a peer is imported as."""

    name: str
    script: str
    module: str
    threaded: bool


_KINDS = (
    Kind(LEVEL_1, "operations", "", threaded=True),
    Kind(LEVEL_2, "nodes", "", threaded=True),
    Kind(COMPAT, "compat", "", threaded=True),
    Kind(PYFUSE3, "pyfuse3", "pyfuse3", threaded=False),
    Kind(MFUSEPY, "mfusepy", "mfusepy", threaded=True),
    Kind(FUSEPY, "fusepy", "fuse", threaded=True),
)


class Case(NamedTuple):
    """How it is asked: `one_cpu` keeps client and server on one CPU, without the price of waking another from idle."""

    name: str
    one_cpu: bool


CASES = (Case("free", one_cpu=False), Case("one_cpu", one_cpu=True))


class Sample(NamedTuple):
    """What a batch gave, in nanoseconds per operation."""

    latency: float
    slow: float  # the 90th percentile
    cpu: float


def single(name: str) -> str:
    """Give the name of a server when it has one thread."""
    return name if name == PYFUSE3 else f"{name}, 1 thread"


def run(bench: Bench, rounds: int, only: set[str], cases: set[str]) -> dict[str, Any]:
    """Measure all servers; {"servers": {name: {operation: {case: figures}}}, "missing": {name: reason}, ...}."""
    wanted = [operation for operation in OPERATIONS if not cases or operation in cases]
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    servers = _start(bench, only, missing, versions) if wanted else []
    samples: dict[tuple[str, str, str], list[Sample]] = {}
    counts = {(server.name, name): _calibrate(bench, server, name) for server in servers for name in wanted}
    everywhere = set(os.sched_getaffinity(0))
    total, done = rounds * len(wanted) * len(CASES) * len(servers), 0
    for turn in range(rounds):
        first = turn % max(1, len(servers))
        for operation in wanted:
            for case in CASES:
                for server in servers[first:] + servers[:first]:
                    title = f"hello: {operation} {case.name}, round {turn + 1}: {server.name}"
                    bench.progress.step(title, done, total)
                    done += 1
                    sample = _batch(
                        bench,
                        server,
                        operation,
                        counts[server.name, operation],
                        {min(everywhere)} if case.one_cpu else everywhere,
                    )
                    samples.setdefault((server.name, operation, case.name), []).append(sample)
    bench.progress.clear()
    for server in servers:
        server.stop()
    return {
        "rounds": rounds,
        "operations": {operation: TITLES[operation] for operation in wanted},
        "versions": versions,
        "missing": missing,
        "servers": {
            server.name: {
                operation: {case.name: _figures(samples[server.name, operation, case.name]) for case in CASES}
                for operation in wanted
            }
            for server in servers
        },
    }


def _start(bench: Bench, only: set[str], missing: dict[str, str], versions: dict[str, str]) -> list[Server]:
    """Mount all that are there and wanted, each with its default of threads, and with one."""
    servers = []
    script = str(HERE / "servers" / "hello.py")
    for kind in _KINDS:
        if only and kind.name.lower() not in only:
            continue
        try:
            python, version = _python(bench, kind)
        except MissingError as reason:
            missing[kind.name] = str(reason)
            continue
        for name, threads in ((kind.name, 0), (single(kind.name), 1)) if kind.threaded else ((kind.name, 0),):
            server = bench.server(name)
            try:
                server.start([python, script, kind.script, str(server.target), str(threads)])
                for operation in OPERATIONS:  # the client looks at all that it is given
                    _ask(bench, server, operation, 1)
            except (BenchError, OSError, subprocess.TimeoutExpired) as reason:
                missing[name] = str(reason)
                server.abort()
                server.stop()
                continue
            servers.append(server)
            versions[name] = version
    return servers


def _python(bench: Bench, kind: Kind) -> tuple[str, str]:
    """Give the interpreter that has what a kind needs, and the version of that. Raises MissingError."""
    if kind.module:
        python = bench.peer(kind.name, kind.module)
        return str(python), bench.peer_version(python, kind.name)
    code = "import fusewire; print(fusewire.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise MissingError(f"fusewire does not import: {done.stderr.strip()[-200:]}")
    return sys.executable, done.stdout.strip()


def _ask(bench: Bench, server: Server, operation: str, count: int, cpus: set[int] | None = None) -> dict[str, int]:
    argv = [str(bench.program("hello")), str(server.target), operation, str(count)]
    found: dict[str, int] = json.loads(bench.run(argv, server, limit=30, cpus=cpus))
    return found


def _calibrate(bench: Bench, server: Server, operation: str) -> int:
    """Choose how many make a batch; also the warm-up."""
    return max(_FEW, int(_BATCH_NS * _FEW / _ask(bench, server, operation, _FEW)["ns"]))


def _batch(bench: Bench, server: Server, operation: str, count: int, cpus: set[int]) -> Sample:
    server.pin(cpus)
    before = _cpu(server)
    result = _ask(bench, server, operation, count, cpus)
    return Sample(result["median_ns"], result["p90_ns"], (_cpu(server) - before) / (count + 1))


def _cpu(server: Server) -> int:
    """Give the nanoseconds of user and system time of the server's processes, ended threads among them.

    That is the CPU-time clock of a process: clock_getcpuclockid(3), CPUCLOCK_SCHED of <linux/posix-timers.h>.
    """
    return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in server.pids if os.path.exists(f"/proc/{pid}/exe"))


def _figures(samples: list[Sample]) -> dict[str, Any]:
    return {
        "us": round(median(sample.latency for sample in samples) / 1000, 2),
        "p90_us": round(median(sample.slow for sample in samples) / 1000, 2),
        "cpu_us": round(median(sample.cpu for sample in samples) / 1000, 2),
        "samples_us": [round(sample.latency / 1000, 2) for sample in samples],
        "cpu_samples_us": [round(sample.cpu / 1000, 2) for sample in samples],
    }
