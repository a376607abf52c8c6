"""Archives: a tar, a tar.gz and a zip mounted by Fusewire and by ratarmount, beside the tree that was packed.

Every sample is one server, freshly mounted, doing one case; the archive lies on a tmpfs, so that no disk decides. Both
keep an index between mounts: "first" is a mount without one, all others have one. Servers take turns, the order rotates
from round to round, and a figure counts only if the answer is what the tree itself gives.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from harness import Bench, BenchError, MissingError, Server, fusewire_command
from images import Record

FUSEWIRE, RATARMOUNT = "Fusewire", "ratarmount"
SERVERS = (FUSEWIRE, RATARMOUNT)
FORMATS = ("tar", "tar.gz", "zip")
TITLES = {
    "first": "first mount, index built",
    "second": "second mount, index kept",
    "walk": "walk with stat of everything",
    "readall": "read of everything",
    "small": "random 4 KiB reads",
}
CASES = tuple(TITLES)
# What a peer may not get wrong without losing its figure; other differences are remarked. Fusewire may get nothing
# wrong, but for what zip does not keep (owners).
_ESSENTIAL = {"walk": {"entries", "directories", "bytes"}, "readall": {"bytes", "check"}, "small": {"bytes", "check"}}
_KEPT_BY_NO_ZIP = {"digest"}
_LIMIT = 90.0  # seconds for one sample
_OLD = 1_600_000_000  # mtime of the oldest member; zip counts in steps of two seconds
_PER_FOLDER = 50


class Plan(NamedTuple):
    """How many files there are, of how many bytes the large ones, and how many random reads."""

    small: int
    large: int
    large_bytes: int
    reads: int


FULL = Plan(small=5_000, large=8, large_bytes=24 << 20, reads=1_000)
QUICK = Plan(small=1_000, large=3, large_bytes=6 << 20, reads=100)


class Kind(NamedTuple):
    """How a server is started on an archive, with an index in a directory of its own."""

    name: str
    command: Callable[[Path, Path, Path], list[str]]
    version: str


class Work:
    """The tmpfs with the tree, its archives and the lists of what is read; the answers of the tree itself."""

    def __init__(self, bench: Bench, formats: tuple[str, ...]) -> None:
        """Make all of it. Raises BenchError when memory is short."""
        self.bench = bench
        self.plan = QUICK if bench.quick else FULL
        self.top = bench.temporary / "archives"
        self.tree = self.top / "tree"
        self.lists = {case: self.top / case for case in ("readall", "small")}
        self.top.mkdir()
        room = 4 * self.plan.large * self.plan.large_bytes + (256 << 20)
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found is not None and int(found[1]) * 1024 < 2 * room:
            raise BenchError(f"archives: {2 * room >> 20} MiB of free memory are needed; --quick takes less")
        bench.tmpfs(self.top, room)
        bench.progress.say("making what is archived")
        self.paths, self.content = self._make_tree()
        self.archives = {name: self._pack(name) for name in formats}
        nobody = Server(bench, "the tree itself", self.tree)
        self.truth = {case: ask(self, nobody, case)[1] for case in _ESSENTIAL}

    def _make_tree(self) -> tuple[list[str], int]:
        """Words at random, so that it is compressed to a third as sources are; large files between the small ones."""
        chance = random.Random(5)
        words = [chance.randbytes(chance.randrange(2, 12)).hex().encode() for _ in range(4_000)]
        piece = b" ".join(chance.choices(words, k=100_000))
        plan, paths, content = self.plan, [], 0
        large = {(number + 1) * plan.small // (plan.large + 1) for number in range(plan.large)}
        for number in range(plan.small):
            folder = f"area{number // _PER_FOLDER // 20:02d}/folder{number // _PER_FOLDER % 20:02d}"
            (self.tree / folder).mkdir(parents=True, exist_ok=True)
            new = [(f"{folder}/file{number:05d}.txt", chance.randrange(12_000))]
            new += [(f"{folder}/large{number:05d}.bin", plan.large_bytes)] if number in large else []
            for name, size in new:
                with (self.tree / name).open("wb") as file:
                    for at in range(0, size, 1 << 20):
                        length = min(size - at, 1 << 20)
                        start = chance.randrange(len(piece) - length)
                        file.write(piece[start : start + length])
                paths.append(name)
                content += size
        for order, path in enumerate(sorted(self.tree.rglob("*"), reverse=True)):  # what is in a folder, then it
            os.utime(path, (_OLD, _OLD + 2 * order))
        self.lists["readall"].write_text("".join(f"{path}\n" for path in paths))
        big = [path for path in paths if path.endswith(".bin")]
        places = (f"{chance.randrange(plan.large_bytes >> 12) << 12} {chance.choice(big)}\n" for _ in range(plan.reads))
        self.lists["small"].write_text("".join(places))
        return paths, content

    def _pack(self, name: str) -> Path:
        made = self.top / f"archive.{name}"
        members = sorted(path for path in self.tree.rglob("*") if path.is_dir())
        members += [self.tree / path for path in self.paths]
        if name == "zip":
            with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as zipped:
                for path in members:
                    zipped.write(path, path.relative_to(self.tree))
        elif name == "tar":
            with tarfile.open(made, "w", format=tarfile.PAX_FORMAT) as packed:
                for path in members:
                    packed.add(path, path.relative_to(self.tree), recursive=False)
        else:
            with tarfile.open(made, "w:gz", format=tarfile.PAX_FORMAT, compresslevel=6) as squeezed:
                for path in members:
                    squeezed.add(path, path.relative_to(self.tree), recursive=False)
        return made


def kinds(bench: Bench, only: set[str], missing: dict[str, str]) -> list[Kind]:
    """Give the servers that are there and wanted; `missing` gets the reason for each that is wanted and not there."""
    found: list[Kind] = []
    ours = fusewire_command()
    if not only or FUSEWIRE.lower() in only:
        done = subprocess.run([*ours, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        number = re.search(r"(\d+\.\d+[\w.]*)", done.stdout)
        version = (number[1] if number else "unknown") + (" with rapidgzip" if find_spec("rapidgzip") else "")

        def mount(archive: Path, index: Path, target: Path) -> list[str]:
            serve = [*ours, "mount", str(archive), str(target), "-f", "--strategy", "direct"]
            return ["env", f"XDG_CACHE_HOME={index}", *serve]

        found.append(Kind(FUSEWIRE, mount, version))
    if not only or RATARMOUNT in only:
        try:
            python = bench.peer("ratarmount", "ratarmount")
        except MissingError as reason:
            missing[RATARMOUNT] = str(reason)
        else:
            script = str(python.with_name("ratarmount"))

            def ratarmount(archive: Path, index: Path, target: Path) -> list[str]:
                return [script, "-f", "--index-file", str(index / "index.sqlite"), str(archive), str(target)]

            found.append(Kind(RATARMOUNT, ratarmount, bench.peer_version(python, RATARMOUNT)))
    return found


def ask(work: Work, server: Server, case: str) -> tuple[float, Any]:
    """Do one case; gives seconds, and what must be the same for every server."""
    if case == "walk":
        arguments: tuple[object, ...] = ("walk", server.target)
    else:
        arguments = ("random" if case == "small" else "read", server.target, work.lists[case], 1)
    result = work.bench.client(*arguments, server=server, limit=_LIMIT)
    return result.pop("ns") / 1e9, result


def run(bench: Bench, rounds: int, only: set[str], cases: set[str]) -> dict[str, Any]:
    """Measure all servers; {"archives": {format: {"facts", "servers": {name: {case: figures}}}}, "missing": ...}."""
    wanted = [case for case in CASES if not cases or case in cases]
    missing: dict[str, str] = {}
    result: dict[str, Any] = {
        "rounds": rounds,
        "place": "tmpfs, and a fresh mount for every sample",
        "missing": missing,
        "versions": {},
        "archives": {},
    }
    if not wanted:
        return result
    available = kinds(bench, only, missing)
    work = Work(bench, FORMATS)
    for name in FORMATS:
        usable = [kind for kind in available if _works(work, kind, name, missing)]
        records = {kind.name: {case: Record() for case in wanted} for kind in usable}
        total, done = rounds * len(wanted) * len(usable), 0
        for turn in range(rounds):
            start = turn % max(1, len(usable))
            for case in wanted:
                for kind in usable[start:] + usable[:start]:
                    bench.progress.step(f"archives: {name} {case}, round {turn + 1}: {kind.name}", done, total)
                    done += 1
                    record = records[kind.name][case]
                    if not record.trouble:
                        _measure(work, kind, name, case, record)
        bench.progress.clear()
        result["versions"] |= {kind.name: kind.version for kind in usable}
        result["archives"][name] = {
            "facts": {
                "files": len(work.paths),
                "content_bytes": work.content,
                "archive_bytes": work.archives[name].stat().st_size,
            },
            "servers": {
                server: {case: record.summary() for case, record in by_case.items()}
                for server, by_case in records.items()
            },
        }
    return result


def _index(work: Work, kind: Kind, name: str) -> Path:
    """Give the directory for the index that a server keeps of an archive, from its first mount on."""
    return work.bench.temporary / f"index-{kind.name}-{name}"


def _works(work: Work, kind: Kind, name: str, missing: dict[str, str]) -> bool:
    """Mount once, unmeasured: warms the program and makes the index that is kept."""
    index = _index(work, kind, name)
    index.mkdir()
    server = work.bench.server(kind.name)
    try:
        server.start(kind.command(work.archives[name], index, server.target), limit=_LIMIT)
    except (BenchError, OSError) as reason:
        missing[f"{kind.name}, {name}"] = str(reason)
        return False
    finally:
        server.stop()
    if not any(path.is_file() for path in index.rglob("*")):
        missing[f"{kind.name}, {name}, its index"] = "none was kept, so its second mount is a first one"
    return True


def _measure(work: Work, kind: Kind, name: str, case: str, record: Record) -> None:
    server = work.bench.server(kind.name)
    index = _index(work, kind, name)
    if case == "first":
        index = index.with_suffix(".first")
        index.mkdir()
    answer: Any = {}
    try:
        server.start(kind.command(work.archives[name], index, server.target), limit=_LIMIT)
        seconds, before = server.mount_seconds, 0.0
        if case in _ESSENTIAL:
            before = server.cost().cpu
            seconds, answer = ask(work, server, case)
        after = server.cost()
    except (BenchError, OSError, subprocess.TimeoutExpired) as reason:
        record.fail(reason, _LIMIT)
        return
    finally:
        server.stop()
        if case == "first":
            shutil.rmtree(index)
    _judge(work, kind, name, case, answer, record)
    record.add(seconds, after.cpu - before, after.peak, answer)


def _judge(work: Work, kind: Kind, name: str, case: str, answer: Any, record: Record) -> None:
    """Strike out the figures of a server that gives something else than the tree does."""
    truth = work.truth.get(case, {})
    differing = {key: [answer.get(key), truth[key]] for key in truth if answer.get(key) != truth[key]}
    if kind.name == FUSEWIRE and name != "zip":
        wrong = set(differing)
    else:
        wrong = differing.keys() & _ESSENTIAL[case] if differing else set()
    if wrong:
        record.trouble = f"wrong answer: {differing}"
    elif differing and not (name == "zip" and differing.keys() <= _KEPT_BY_NO_ZIP):
        record.remark = f"not as the tree: {differing}"
