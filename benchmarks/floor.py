"""The floor: what one request costs, against a C server that does the least possible.

Every server has one directory with one file, all caching off, so one system call of the client is one request. All are
mounted at once and measured in turn, batch by batch, so that what disturbs the machine disturbs them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import Any, NamedTuple

from harness import HERE, Bench, BenchError, MissingError, Server

FILE_SIZE = 64 << 20
OPERATIONS = ("lookup", "getattr", "read4k", "read1m")
C, FUSEWIRE, PYFUSE3, MFUSEPY = "C", "Fusewire", "pyfuse3", "mfusepy"
FUSEWIRE_1, MFUSEPY_1 = "Fusewire, 1 thread", "mfusepy, 1 thread"
CLIENTS = 4
# Short batches and many rounds: what disturbs the machine for a second then falls on all servers alike.
_BATCH_NS = 30_000_000


class Case(NamedTuple):
    """One way to ask: `threads` clients at once; `one_cpu` keeps client and server on one CPU."""

    name: str
    threads: int
    one_cpu: bool


CASES = (
    Case("latency", 1, one_cpu=False),
    # Without the price of waking another CPU from idle, which under a hypervisor is most of a request.
    Case("latency_one_cpu", 1, one_cpu=True),
    Case("parallel", CLIENTS, one_cpu=False),
)


def _fusewire(expression: str) -> str:
    """Give what the installed Fusewire says, or nothing if it is not there."""
    code = f"import fusewire, fusewire.serve; print({expression})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def _commands(bench: Bench, threads: int) -> dict[str, tuple[list[str], str]]:
    """Give command line and version of our own servers; an empty argument stands for the mount point."""
    script, version = str(HERE / "servers" / "fusewire_server.py"), _fusewire("fusewire.__version__")

    def ours(count: int) -> tuple[list[str], str]:
        return [sys.executable, script, "", str(FILE_SIZE), str(count)], version

    c = [str(bench.program("floor_server")), "", str(FILE_SIZE), str(threads)]
    return {C: (c, "ours"), FUSEWIRE: ours(threads), FUSEWIRE_1: ours(1)}


def _peers(bench: Bench, found: dict[str, tuple[list[str], str]], missing: dict[str, str], only: set[str]) -> None:
    for name, package, threads in ((PYFUSE3, PYFUSE3, 1), (MFUSEPY, MFUSEPY, 0), (MFUSEPY_1, MFUSEPY, 1)):
        if only and package not in only:
            continue
        try:
            python = bench.peer(package, package)
        except MissingError as reason:
            missing[name] = str(reason)
            continue
        script = HERE / "servers" / f"{package}_server.py"
        found[name] = (
            [str(python), str(script), "", str(FILE_SIZE), str(threads)],
            bench.peer_version(python, package),
        )


def run(bench: Bench, rounds: int, only: set[str], threads: int | None) -> dict[str, Any]:
    """Measure all servers; gives {"servers": {name: {operation: {case: ...}}}, "missing": {name: reason}}.

    The C server gets as many threads as Fusewire takes when nobody says a number: a thread more costs both something.
    """
    if threads is None:
        threads = int(_fusewire("fusewire.serve.DEFAULT_THREADS") or 2)
    commands = _commands(bench, threads)
    missing: dict[str, str] = {}
    _peers(bench, commands, missing, only)
    servers: list[Server] = []
    versions = {}
    for name, (argv, version) in commands.items():
        if only and name.split(",")[0].lower() not in only and name != C:
            continue
        server = bench.server(name)
        try:
            server.start([argument or str(server.target) for argument in argv])
            bench.client("verify", server.target, FILE_SIZE, server=server)
        except (BenchError, OSError) as reason:
            missing[name] = str(reason)
            server.abort()
            server.stop()
            continue
        versions[name] = version
        servers.append(server)
    names = [server.name for server in servers]
    if C not in names:
        raise BenchError(f"the C server did not start: {missing.get(C)}")
    everywhere = set(os.sched_getaffinity(0))
    one = {min(everywhere)}
    samples: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {
        name: {operation: {case.name: [] for case in CASES} for operation in OPERATIONS} for name in names
    }
    asked = dict.fromkeys(OPERATIONS, 0)  # of the C server, to compare with what it counted
    counts = _calibrate(bench, servers, asked)
    total = rounds * len(OPERATIONS) * len(CASES) * len(servers)
    done = 0
    for turn in range(rounds):
        order = servers[turn % len(servers) :] + servers[: turn % len(servers)]
        for operation in OPERATIONS:
            for case in CASES:
                for server in order:
                    bench.progress.step(f"floor: {operation} {case.name}, round {turn + 1}: {server.name}", done, total)
                    done += 1
                    count = max(1, counts[server.name, operation] // case.threads)
                    cpus = one if case.one_cpu else None
                    server.pin(one if case.one_cpu else everywhere)
                    cpu = server.cpu_nanoseconds()
                    result = bench.client(
                        "floor", server.target, operation, count, case.threads, server=server, cpus=cpus
                    )
                    requests = count * case.threads
                    cpu = server.cpu_nanoseconds() - cpu
                    samples[server.name][operation][case.name].append((result["ns"] / requests, cpu / requests))
                    if server.name == C:
                        asked[operation] += requests
    for server in servers:
        server.stop()
    _check_counts(servers[names.index(C)], asked)
    bench.progress.clear()
    return {
        "rounds": rounds,
        "file_bytes": FILE_SIZE,
        "threads": threads,
        "clients": CLIENTS,
        "versions": versions,
        "missing": missing,
        "servers": {
            name: {
                operation: {
                    case: {
                        "us": round(median(time for time, _ in values) / 1000, 3),
                        "server_cpu_us": round(median(cpu for _, cpu in values) / 1000, 3),
                        "per_second": round(1e9 / median(time for time, _ in values)),
                        "times_c": round(_ratio(values, samples[C][operation][case]), 3),
                        "samples_us": [round(time / 1000, 3) for time, _ in values],
                    }
                    for case, values in cases.items()
                }
                for operation, cases in operations.items()
            }
            for name, operations in samples.items()
        },
    }


def _ratio(values: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Give the median of the rounds' ratios: both of a round were measured within the same moments."""
    return median(value[0] / other[0] for value, other in zip(values, others, strict=True))


def _calibrate(bench: Bench, servers: list[Server], asked: dict[str, int]) -> dict[tuple[str, str], int]:
    """Choose for each server and operation how many make a batch of about 30 ms; also the warm-up."""
    counts = {}
    for server in servers:
        for operation in OPERATIONS:
            few = 20 if operation == "read1m" else 300
            result = bench.client("floor", server.target, operation, few, 1, server=server)
            counts[server.name, operation] = max(few, int(_BATCH_NS * few / result["ns"]) // CLIENTS * CLIENTS)
            if server.name == C:
                asked[operation] += few
    return counts


def _check_counts(server: Server, asked: dict[str, int]) -> None:
    """Compare what the client did with what the C server saw; not one request each measures something else."""
    seen = json.loads(server.output.read_text().splitlines()[-1])
    expected = {
        "lookup": asked["lookup"],
        "getattr": asked["getattr"],
        "read": asked["read4k"] + asked["read1m"],
    }
    for name, number in expected.items():
        # The opens of the clients, the first stats and the verification are a few hundred more.
        if not number <= seen[name] <= number * 1.02 + 2000:
            raise BenchError(
                f"floor: {number} operations were {seen[name]} {name} requests, so the figures mean nothing"
            )
