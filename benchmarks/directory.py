"""Directory: a host directory served by Fusewire, by the C peers and by the Python peers, beside the directory itself.

Every sample is one server, freshly mounted, doing one line; what is served lies on a tmpfs, so that no disk decides.
Servers take turns, the order rotates from round to round. A figure counts only if the server has done the work: what
was read is compared with what the native directory gives, what was written is looked at in the directory that was
served, after the server has ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import libfuse
from harness import HERE, Bench, BenchError, MissingError, Server, fusewire_command
from images import Record

from served import BLOCK, LIMIT, Work

NATIVE, FUSEWIRE, ROOTLESS = "native", "Fusewire", "Fusewire rootless-like"
BINDFS, OVERLAY = "bindfs", "fuse-overlayfs"
LOW_LEVEL, HIGH_PERFORMANCE, HIGH_LEVEL = libfuse.EXAMPLES
PYFUSE3, MFUSEPY = "pyfuse3", "mfusepy"
C_PEERS = (BINDFS, OVERLAY, LOW_LEVEL, HIGH_PERFORMANCE, HIGH_LEVEL)
PYTHON_PEERS = (PYFUSE3, MFUSEPY)
SERVERS = (NATIVE, FUSEWIRE, ROOTLESS, *C_PEERS, *PYTHON_PEERS)

# What a line asks of caching. OFF: names and attributes are asked for anew each time. ON: nobody else changes the
# directory. DEFAULT: as each server is when nobody says anything about it.
OFF, ON, DEFAULT = "off", "on", "default"
# What a peer may get wrong without losing its figure, as libfuse 2 does with a time that is set alone: permissions,
# owners and times. Fusewire may get nothing wrong.
_REMARKED = {"untar": {"digest"}}


Body = Callable[["Work", Server, Path], tuple[float, Any]]


class Line(NamedTuple):
    """One row of the tables: what is done in `body`, and how what it left is looked at in `check`."""

    name: str
    title: str
    caching: str
    data: bool  # how fast contents move decides, rather than names and attributes
    fresh: str  # what the served directory holds: "tree", "repository", "files", or "" for an empty one to write to
    body: Body
    check: Callable[[Work, Path], Any] | None = None


# ---- the lines ----


def _client(work: Work, server: Server, *arguments: object) -> tuple[float, Any]:
    result = work.bench.client(*arguments, server=server, limit=LIMIT)
    return result.pop("ns") / 1e9, result


def _stat(name: str) -> Body:
    def body(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
        passes = work.plan.passes if name == "stat_on" else 1
        return _client(work, server, "stat", server.target, work.lists / name, passes)

    return body


def _walk(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
    return _client(work, server, "walk", server.target)


def _create(work: Work, server: Server, source: Path) -> tuple[float, Any]:
    """Create all files; look at them where they are served from; remove them."""
    count = work.plan.small
    made, result = _client(work, server, "create", server.target, count)
    seen = work.look("read", source, work.lists / "small", 1)
    removed, _ = _client(work, server, "unlink", server.target, count)
    return made + removed, {**result, "check": seen["check"], "seen": seen["bytes"]}


def _left(_work: Work, source: Path) -> Any:
    return {"left": sorted(os.listdir(source))}


def _untar(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
    argv = ["tar", "-xf", str(work.top / "archive.tar"), "-C", str(server.target)]
    began = time.perf_counter()
    work.bench.run(argv, server, limit=LIMIT)
    return time.perf_counter() - began, {}


def _untarred(work: Work, source: Path) -> Any:
    for mark in list(source.rglob(".wh.*opq")):  # fuse-overlayfs leaves them in every directory that is new
        status = mark.parent.stat()
        mark.unlink()
        os.utime(mark.parent, ns=(status.st_atime_ns, status.st_mtime_ns))
    walked, read = work.look("walk", source), work.look("read", source, work.lists / "untar", 1)
    return {name: walked[name] for name in ("entries", "directories", "digest")} | {
        name: read[name] for name in ("bytes", "check")
    }


def _git(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
    git = work.git(server.target)
    if git is None:
        raise BenchError("no git: apt-get install git")
    began = time.perf_counter()
    output = work.bench.run([*git, "status", "--porcelain"], server, limit=LIMIT)
    passed = time.perf_counter() - began
    return passed, {"lines": output.count(b"\n"), "digest": hashlib.sha256(output).hexdigest()[:16]}


def _sequential_read(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
    return _client(work, server, "read", server.target, work.lists / "big", 1)


def _sequential_write(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
    return _client(work, server, "write", server.target / "new", work.plan.big)


def _written(work: Work, source: Path) -> Any:
    return work.look("read", source, work.lists / "new", 1)


def _fio(direction: str, threads: int) -> Body:
    """Random blocks, each at most once, so that no read is answered by the page cache of the mount.

    fio compares every block that it reads with what it must be, the block's own offset. The time of writes includes the
    fsync at the end: some servers have the kernel collect writes.
    """

    def body(work: Work, server: Server, _source: Path) -> tuple[float, Any]:
        program = shutil.which("fio")
        if program is None:
            raise BenchError("no fio: apt-get install fio")
        span, blocks = work.plan.span // threads, work.plan.blocks // threads
        reading = direction == "randread"
        argv = [program, "--name=random", f"--rw={direction}", f"--bs={BLOCK}", "--ioengine=psync", "--thread"]
        argv += [
            f"--filename={server.target / ('big' if reading else 'new')}",
            "--output-format=json",
            "--randrepeat=1",
        ]
        argv += [f"--numjobs={threads}", f"--size={span}", f"--offset_increment={span}", f"--number_ios={blocks}"]
        argv += ["--verify=pattern", "--verify_pattern=%o", "--verify_fatal=1", "--verify_state_save=0"]
        argv += ["--allow_file_create=0"] + ([] if reading else ["--do_verify=0", "--end_fsync=1"])
        output = work.bench.run(argv, server, limit=LIMIT)
        jobs = json.loads(output[output.index(b"{") :])["jobs"]
        figures = [job["read" if reading else "write"] for job in jobs]
        errors = [job["error"] for job in jobs if job["error"]]
        if errors:
            raise BenchError(f"fio on {server.name}: error {errors[0]}")
        if reading:  # without the time that fio itself takes to compare
            passed = max(figure["lat_ns"]["mean"] * figure["total_ios"] for figure in figures) / 1e9
        else:
            passed = max(figure["runtime"] for figure in figures) / 1000
        return passed, {"blocks": sum(figure["total_ios"] for figure in figures)}

    return body


LINES = (
    Line("stat_off", "stat storm, caching off", OFF, False, "tree", _stat("stat_off")),
    Line("create_off", "create, write, close, unlink; caching off", OFF, False, "", _create, _left),
    Line("stat_on", "stat storm, caching on", ON, False, "tree", _stat("stat_on")),
    Line("walk", "walk with stat of everything", ON, False, "tree", _walk),
    Line("create_on", "create, write, close, unlink; caching on", ON, False, "", _create, _left),
    Line("untar", "tar x", DEFAULT, False, "", _untar, _untarred),
    Line("git", "git status", DEFAULT, False, "repository", _git),
    Line("seqread", "sequential read", DEFAULT, True, "files", _sequential_read),
    Line("seqwrite", "sequential write", DEFAULT, True, "", _sequential_write, _written),
    Line("randread1", "random 4 KiB reads, depth 1", DEFAULT, True, "files", _fio("randread", 1)),
    Line("randread4", "random 4 KiB reads, 4 threads", DEFAULT, True, "files", _fio("randread", 4)),
    Line("randwrite1", "random 4 KiB writes, depth 1", DEFAULT, True, "", _fio("randwrite", 1), _written),
    Line("randwrite4", "random 4 KiB writes, 4 threads", DEFAULT, True, "", _fio("randwrite", 4), _written),
)
NAMES = tuple(line.name for line in LINES)


# ---- the servers ----


class Kind(NamedTuple):
    """How a server is started for a line; for which lines a remark is due."""

    name: str
    command: Callable[[Work, Line, Path, Path], list[str]]
    version: str
    remark: Callable[[Line], str] = lambda _line: ""


def _native(_work: Work, _line: Line, source: Path, target: Path) -> list[str]:
    return ["mount", "--bind", str(source), str(target)]


def _fusewire(*options: str) -> Callable[[Work, Line, Path, Path], list[str]]:
    ours = fusewire_command()
    modes = {OFF: "cache=none", ON: "cache=always", DEFAULT: "cache=auto"}

    def command(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
        chosen = ",".join((modes[line.caching], *options))
        return [*ours, "mount", str(source), str(target), "-f", "--strategy", "direct", "-o", chosen]

    return command


def _bindfs(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
    timeouts = {OFF: ["-o", "entry_timeout=0,attr_timeout=0"], ON: ["-o", "entry_timeout=86400,attr_timeout=86400"]}
    return ["bindfs", "-f", *timeouts.get(line.caching, []), str(source), str(target)]


def _overlay(work: Work, line: Line, source: Path, target: Path) -> list[str]:
    """What is read is the lower directory; what is written to, the upper one (else the first write copies the file)."""
    upper = work.scratch("upper") if line.fresh else source
    lower = source if line.fresh else work.empty
    layers = f"lowerdir={lower},upperdir={upper},workdir={work.scratch('overlay')}"
    timeout = {OFF: ",timeout=0", ON: ",timeout=86400"}.get(line.caching, "")
    return ["fuse-overlayfs", "-f", "-o", layers + timeout, str(target)]


def _low_level(program: Path) -> Callable[[Work, Line, Path, Path], list[str]]:
    modes = {OFF: "cache=never", ON: "cache=always", DEFAULT: "cache=auto"}

    def command(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
        return [str(program), "-f", "-o", f"source={source},{modes[line.caching]}", str(target)]

    return command


def _high_performance(program: Path) -> Callable[[Work, Line, Path, Path], list[str]]:
    def command(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
        off = ["--nocache"] if line.caching == OFF else []
        return [str(program), "--foreground", *off, str(source), str(target)]

    return command


def _high_level(program: Path) -> Callable[[Work, Line, Path, Path], list[str]]:
    def command(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
        plus = [] if line.caching == OFF else ["--plus"]
        return [str(program), "-f", *plus, "-o", f"modules=subdir,subdir={source}", str(target)]

    return command


def _python(python: Path, name: str) -> Callable[[Work, Line, Path, Path], list[str]]:
    script = str(HERE / "servers" / f"{name}_passthrough.py")
    timeouts = {OFF: "0", ON: "86400", DEFAULT: "1"}

    def command(_work: Work, line: Line, source: Path, target: Path) -> list[str]:
        return [str(python), script, str(source), str(target), timeouts[line.caching]]

    return command


def kinds(bench: Bench, only: set[str], missing: dict[str, str]) -> list[Kind]:
    """Give the servers that are there and wanted; `missing` gets the reason for each that is wanted and not there."""
    found = [Kind(NATIVE, _native, "")]

    def wanted(name: str) -> bool:
        return not only or name.lower() in only

    def program_version(argv: list[str], pattern: str) -> str:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        match = re.search(pattern, done.stdout + done.stderr)
        return match[1] if match else "unknown"

    if wanted(FUSEWIRE):
        version = program_version([*fusewire_command(), "--version"], r"(\d+\.\d+[\w.]*)")
        found += [Kind(FUSEWIRE, _fusewire(), version), Kind(ROOTLESS, _fusewire("passthrough=off"), "")]
    for name, command in ((BINDFS, _bindfs), (OVERLAY, _overlay)):
        if not wanted(name):
            continue
        if shutil.which(name) is None:
            missing[name] = f"apt-get install {name}"
        else:
            found.append(Kind(name, command, program_version([name, "--version"], r"(?:bindfs|version) v?(\d[\w.]*)")))
    makers = {LOW_LEVEL: _low_level, HIGH_PERFORMANCE: _high_performance, HIGH_LEVEL: _high_level}
    for name, maker in makers.items():
        if not wanted(name):
            continue
        try:
            program = libfuse.example(bench, name)
        except MissingError as reason:
            missing[name] = str(reason)
            continue
        remark = _uncached if name == HIGH_LEVEL else lambda _line: ""
        found.append(Kind(name, maker(program), libfuse.version(), remark))
    for name in PYTHON_PEERS:
        if not wanted(name):
            continue
        try:
            python = bench.peer(name, name)
        except MissingError as reason:
            missing[name] = str(reason)
            continue
        found.append(Kind(name, _python(python, name), bench.peer_version(python, name)))
    return found


def _uncached(line: Line) -> str:
    return "it has no option for its timeouts, which are 0" if line.caching == ON else ""


# ---- the run ----


def _raise_limit(entries: int) -> None:
    """Let servers that keep a descriptor per file have them, as far as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = entries * 2 + 4096
    for limits in ((enough, max(hard, enough)), (hard, hard)):
        if soft >= enough:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (OSError, ValueError):
            continue
        return


def run(bench: Bench, rounds: int, only: set[str], cases: set[str]) -> dict[str, Any]:
    """Measure all servers on all lines; {"servers": {name: {line: figures}}, "missing": {name: reason}, ...}."""
    wanted = [line for line in LINES if not cases or line.name in cases]
    missing: dict[str, str] = {}
    if not wanted:
        return {"servers": {}, "missing": missing, "versions": {}, "lines": {}, "rounds": 0}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    work = Work(bench, {line.fresh for line in wanted} | {"archive" for line in wanted if line.name == "untar"})
    _raise_limit(work.plan.entries)
    try:
        available = kinds(bench, only, missing)
        usable = _try_each(work, available, missing)
        records = {kind.name: {line.name: Record() for line in wanted} for kind in usable}
        total, done = rounds * len(wanted) * len(usable), 0
        for turn in range(rounds):
            start = turn % max(1, len(usable))
            for line in wanted:
                for kind in usable[start:] + usable[:start]:
                    bench.progress.step(f"directory: {line.title}, round {turn + 1}: {kind.name}", done, total)
                    done += 1
                    record = records[kind.name][line.name]
                    if not record.trouble:
                        _measure(work, kind, line, record)
        bench.progress.clear()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    _compare(records, wanted)
    return {
        "rounds": rounds,
        "plan": work.plan._asdict(),
        "place": "tmpfs, and a fresh mount for every sample",
        "lines": {line.name: line.title for line in wanted},
        "versions": {kind.name: kind.version for kind in usable},
        "missing": missing,
        "servers": {
            name: {line: record.summary(costs=name != NATIVE) for line, record in by_line.items()}
            for name, by_line in records.items()
        },
    }


def _try_each(work: Work, available: list[Kind], missing: dict[str, str]) -> list[Kind]:
    """Mount once with each server, unmeasured: warms the programs, finds who cannot."""
    usable = []
    probe = LINES[-1]._replace(name="probe", check=None)
    for kind in available:
        server = work.bench.server(kind.name)
        source = work.source("")
        (source / "there").write_bytes(b"content")
        try:
            server.start(kind.command(work, probe, source, server.target), limit=30)
            content = work.bench.run(["cat", str(server.target / "there")], server, limit=30)
            if content == b"content":
                usable.append(kind)
            else:
                missing[kind.name] = "it does not show what it serves"
        except (BenchError, OSError, subprocess.TimeoutExpired) as reason:
            missing[kind.name] = str(reason)
        server.stop()
        shutil.rmtree(source, ignore_errors=True)
    return usable


def _measure(work: Work, kind: Kind, line: Line, record: Record) -> None:
    server = work.bench.server(kind.name)
    source = work.source(line.fresh, blank=line.name.startswith("randwrite"))
    try:
        server.start(kind.command(work, line, source, server.target))
        before = server.cost()
        seconds, answer = line.body(work, server, source)
        after = server.cost()
    except (BenchError, OSError, subprocess.TimeoutExpired) as reason:
        record.fail(reason, LIMIT)
        return
    finally:
        server.stop()
        if record.trouble and not line.fresh:
            shutil.rmtree(source, ignore_errors=True)
    try:
        if line.check is not None:
            answer |= line.check(work, source)
            answer.pop("ns", None)
    except (BenchError, OSError) as reason:
        record.trouble = f"what was served is not as it should be: {reason}"
        return
    finally:
        if not line.fresh:
            shutil.rmtree(source)
        for kept in (*work.top.glob("upper*"), *work.top.glob("overlay*")):
            shutil.rmtree(kept)
    if record.answer is not None and not _differing(answer, record.answer) <= _tolerated(kind.name, line):
        record.trouble = f"answers differ from round to round: {record.answer} and {answer}"
        return
    record.remark = kind.remark(line)
    record.add(seconds, after.cpu - before.cpu, after.peak, answer)


def _compare(records: dict[str, dict[str, Record]], lines: list[Line]) -> None:
    """Strike out figures of servers that gave or left something else than the directory itself does."""
    for line in lines:
        truth = records[NATIVE][line.name].answer if NATIVE in records else None
        for name, by_line in records.items():
            record = by_line[line.name]
            if truth is None or record.answer is None or name == NATIVE or record.trouble:
                continue
            wrong = _differing(record.answer, truth)
            words = {key: [record.answer.get(key), truth.get(key)] for key in sorted(wrong)}
            if not wrong:
                continue
            if wrong <= _tolerated(name, line):
                record.remark = f"not as the others: {words}"
            else:
                record.trouble = f"wrong answer: {words}"


def _differing(answer: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in answer.keys() | other.keys() if answer.get(key) != other.get(key)}


def _tolerated(name: str, line: Line) -> set[str]:
    """Give what a server may get wrong on a line without losing its figure."""
    return set() if name in (NATIVE, FUSEWIRE, ROOTLESS) else _REMARKED.get(line.name, set())


def fastest_c(servers: dict[str, Any], line: str) -> str | None:
    """Give the C peer with the smallest median on a line."""
    there = {
        name: servers[name][line]["seconds"] for name in C_PEERS if "seconds" in servers.get(name, {}).get(line, {})
    }
    return min(there, key=lambda name: there[name]) if there else None
