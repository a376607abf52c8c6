"""Images: Fusewire beside squashfuse, squashfuse_ll, ratarmount and the kernel, on a piece of this machine's /usr.

Every sample is one server, freshly mounted, doing one case: nothing of an earlier sample is in any cache of the mount.
The image file itself is in the page cache for all (it is read before each sample), so that no disk decides. Servers
take turns, the order rotates from round to round, and a figure counts only if the answer was the same as everybody's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import Bench, BenchError, MissingError, Server, fusewire_command

FUSEWIRE, LOW_LEVEL, HIGH_LEVEL, RATARMOUNT, KERNEL = "Fusewire", "squashfuse_ll", "squashfuse", "ratarmount", "kernel"
GIVEN = "squashfuse_ll (given)"
COMPRESSORS = ("zstd", "gzip")
CASES = ("walk", "sequential", "parallel", "random1", "random4", "tar", "grep")
TITLES = {
    "walk": "walk with stat of everything",
    "sequential": "sequential read, largest files",
    "parallel": "the same, 4 readers at once",
    "random1": "random 4 KiB reads, 1 thread",
    "random4": "random 4 KiB reads, 4 threads",
    "tar": "tar c of the tree",
    "grep": "grep -r over the tree",
    "mount": "mount until the root answers",
}
# What a peer may not get wrong without losing its figure; other differences (say, symbolic links of size 0) are
# remarked. Fusewire may get nothing wrong.
_ESSENTIAL = {
    "walk": {"entries", "directories"},
    "sequential": {"bytes", "check"},
    "parallel": {"bytes", "check"},
    "random1": {"bytes", "check"},
    "random4": {"bytes", "check"},
    "tar": {"bytes"},
    "grep": {"files", "digest"},
}
_BLOCK = 128 << 10
_LIMIT = 90.0  # seconds for one sample
_PATTERN = "copyright"


class Plan(NamedTuple):
    """How much of /usr to take, and how much of it the cases read."""

    content: int
    image: int
    files: int
    read: int
    reads: int


# The image is to be 300 MB; what that is before compression depends on the machine, so the content is three times that.
FULL = Plan(content=1_000_000_000, image=300_000_000, files=20_000, read=200_000_000, reads=1000)
QUICK = Plan(content=60_000_000, image=0, files=3_000, read=30_000_000, reads=200)


# ---- the image ----


class _File(NamedTuple):
    path: str
    size: int
    inode: tuple[int, int]


def _scan(root: str) -> dict[str, list[_File]]:
    """Give what there is below `root`, in units of directories two levels down: {unit: regular files}."""
    units: dict[str, list[_File]] = {}
    device = os.stat(root).st_dev
    stack = [""]
    while stack:
        folder = stack.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except PermissionError:
            continue
        for entry in entries:
            path = os.path.join(folder, entry.name)
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                if status.st_dev == device and not entry.is_symlink():
                    stack.append(path)
                    units.setdefault("/".join(path.split("/")[:2]), [])
                continue
            unit = units.setdefault("/".join(path.split("/")[:2]), [])
            if stat.S_ISREG(status.st_mode) and os.access(entry.path, os.R_OK) and "\n" not in path:
                unit.append(_File(path, status.st_size, (status.st_dev, status.st_ino)))
    # A directory that holds only directories two levels down is no unit of its own.
    parents = {unit.split("/")[0] for unit in units if "/" in unit}
    return {unit: files for unit, files in units.items() if "/" in unit or unit not in parents}


def _choose(units: dict[str, list[_File]], plan: Plan) -> set[str]:
    """Choose units in an order that looks random and is the same on every run, until both minima are reached."""
    chosen: set[str] = set()
    files = size = 0
    for unit in sorted(units, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()):
        count, weight = len(units[unit]), sum(file.size for file in units[unit])
        if files >= plan.files and size >= plan.content:
            break
        if files + count > plan.files * 1.6 or size + weight > plan.content * 1.25:
            continue
        chosen.add(unit)
        files += count
        size += weight
    if files < plan.files or size < plan.content * 0.5:
        raise BenchError(
            f"/usr gives {files} files and {size / 1e6:.0f} MB; {plan.files} and {plan.content / 1e6:.0f} are asked"
        )
    return chosen


def prepare(bench: Bench, compressor: str, source: str = "/usr") -> dict[str, Any]:
    """Make the image, or take it from the cache; gives its path, its figures and the lists of files for the cases."""
    plan = QUICK if bench.quick else FULL
    maker = shutil.which("mksquashfs")
    if maker is None:
        raise BenchError("no mksquashfs: apt-get install squashfs-tools")
    key = hashlib.sha256(json.dumps([plan, source, compressor, _BLOCK, 2]).encode()).hexdigest()[:12]
    base = bench.cache / f"usr-{'quick' if bench.quick else 'full'}-{compressor}-{key}"
    facts_path = base.with_suffix(".json")
    image = base.with_suffix(".sqsh")
    if not (facts_path.exists() and image.exists()):
        bench.progress.say(f"choosing files of {source}")
        units = _scan(source)
        chosen = _choose(units, plan)
        files = [file for unit in sorted(chosen) for file in units[unit]]
        _make_image(bench, maker, source, image, compressor, set(units) - chosen)
        facts = _facts(files, plan) | {"compressor": compressor, "image_bytes": image.stat().st_size}
        for stale in bench.cache.glob(f"{base.name}.index*"):
            stale.unlink()
        facts_path.write_text(json.dumps(facts))
    facts = json.loads(facts_path.read_text())
    facts["path"] = str(image)
    facts["index"] = str(base.with_suffix(".index.sqlite"))
    facts["full_size"] = not bench.quick and facts["image_bytes"] >= plan.image and facts["files"] >= plan.files
    return facts  # type: ignore[no-any-return]


def _make_image(bench: Bench, maker: str, source: str, image: Path, compressor: str, excluded: set[str]) -> None:
    bench.progress.say(f"making the {compressor} image (once; a full one takes minutes)")
    fresh = Path(f"{image}.new")
    fresh.unlink(missing_ok=True)
    exclude = bench.temporary / "exclude"
    exclude.write_text("".join(f"{unit}\n" for unit in sorted(excluded)))
    argv = [maker, source, str(fresh), "-comp", compressor, "-b", str(_BLOCK), "-noappend", "-quiet", "-no-progress"]
    done = subprocess.run([*argv, "-ef", str(exclude)], capture_output=True, text=True, start_new_session=True)
    if done.returncode != 0 or not fresh.exists():
        raise BenchError(f"mksquashfs: {(done.stderr or done.stdout).strip()[-400:]}")
    fresh.replace(image)


def _facts(files: list[_File], plan: Plan) -> dict[str, Any]:
    """Give figures of the tree, its largest files, and places for random reads, each in a block of its own."""
    once = list({file.inode: file for file in files}.values())
    by_size = sorted(once, key=lambda file: (-file.size, file.path))
    largest: list[_File] = []
    total = 0
    for file in by_size:
        if file.size <= plan.read // 4 and total < plan.read:  # one giant would make four readers one
            largest.append(file)
            total += file.size
    chance = random.Random(1)
    candidates = [file for file in once if file.size >= 8 * _BLOCK]
    chance.shuffle(candidates)
    places = [(file.path, block * _BLOCK) for file in candidates[:64] for block in range(file.size // _BLOCK)]
    chance.shuffle(places)
    reads = [(path, at + chance.randrange(_BLOCK // 4096) * 4096) for path, at in places[: plan.reads]]
    return {
        "files": len(files),
        "content_bytes": sum(file.size for file in once),
        "largest": [file.path for file in largest],
        "largest_bytes": total,
        "random": reads,
    }


# ---- the servers ----


class Kind(NamedTuple):
    """How a server is started: `command(image facts, target)`; how many rounds at most; what it is."""

    name: str
    command: Callable[[dict[str, Any], Path], list[str]]
    version: str
    rounds: int = 1000


def _words(argv: list[str], pattern: str) -> str:
    """Give the first version number that a program prints."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(pattern, done.stdout + done.stderr)
    return found[1] if found else "unknown"


def kinds(bench: Bench, given: str | None, only: set[str], missing: dict[str, str]) -> list[Kind]:
    """Give the servers that are there and wanted; `missing` gets the reason for each that is wanted and not there."""
    absent: dict[str, str] = {}
    found = [kind for kind in _kinds(bench, given, only, absent) if not only or kind.name.lower() in only]
    missing.update({name: reason for name, reason in absent.items() if not only or name.lower() in only})
    return found


def _kinds(bench: Bench, given: str | None, only: set[str], missing: dict[str, str]) -> list[Kind]:
    found = []
    ours = fusewire_command()
    found.append(
        Kind(
            FUSEWIRE,
            lambda facts, target: [*ours, "mount", facts["path"], str(target), "-f"],
            _words([*ours, "--version"], r"(\d+\.\d+[\w.]*)"),
        )
    )
    for name in (LOW_LEVEL, HIGH_LEVEL):
        program = shutil.which(name)
        if program is None:
            missing[name] = "apt-get install squashfuse"
            continue
        found.append(_squashfuse(name, program))
    if given is not None:
        if os.access(given, os.X_OK):
            found.append(_squashfuse(GIVEN, given))
        else:
            missing[GIVEN] = f"{given} is not a program"
    try:
        if only and RATARMOUNT not in only:
            raise MissingError("not asked for")
        python = bench.peer("ratarmount[squashfs]", "PySquashfsImage")
        script = str(python.with_name("ratarmount"))
        found.append(
            Kind(
                RATARMOUNT,
                lambda facts, target: [script, "-f", "--index-file", facts["index"], facts["path"], str(target)],
                bench.peer_version(python, "ratarmount"),
                rounds=1,
            )
        )
    except MissingError as reason:
        missing[RATARMOUNT] = str(reason)
    if not bench.root:
        missing[KERNEL] = "needs root: the kernel mounts squashfs for nobody else"
    elif not re.search(r"\bsquashfs$", Path("/proc/filesystems").read_text(), re.MULTILINE):
        missing[KERNEL] = "this kernel has no squashfs"
    else:
        found.append(
            Kind(
                KERNEL,
                lambda facts, target: ["mount", "-t", "squashfs", "-o", "loop,ro", facts["path"], str(target)],
                os.uname().release,
            )
        )
    return found


def _squashfuse(name: str, program: str) -> Kind:
    return Kind(
        name,
        lambda facts, target: [program, "-f", facts["path"], str(target)],
        _words([program, "--help"], r"squashfuse (\d[\w.]*)"),
    )


# ---- the cases ----


def _pipeline(bench: Bench, server: Server, argv: list[str]) -> tuple[float, Any]:
    """Run `argv` in the mount with its output counted by our sink (tar does not read when it writes to /dev/null)."""
    sink = [str(bench.program("client")), "sink"]
    words = bench.temporary / "errors"
    with words.open("wb") as errors:
        began = time.perf_counter()
        source = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=server.target,
            env=bench.environment,
            start_new_session=True,
        )
    try:
        output = bench.run_with_input(sink, source, server, limit=_LIMIT)
        code = source.wait(_LIMIT)
    except BaseException:
        server.abort()
        source.kill()
        source.wait(5)
        raise
    finally:
        if source.stdout is not None:
            source.stdout.close()
    passed = time.perf_counter() - began
    if code != 0:
        said = words.read_text(errors="replace").strip()[-300:]
        raise BenchError(f"{argv[0]} on {server.name}: status {code}: {said}")
    return passed, json.loads(output)


def _sample(bench: Bench, server: Server, case: str, lists: dict[str, Path]) -> tuple[float, Any]:
    """Do one case on a fresh mount; gives seconds, and what must be the same for every server."""
    if case == "tar":
        return _pipeline(bench, server, ["tar", "-cf", "-", "."])
    if case == "grep":
        began = time.perf_counter()
        argv = ["grep", "-r", "-a", "-c", "-F", _PATTERN, str(server.target)]
        output = bench.run(argv, server, limit=_LIMIT)
        passed = time.perf_counter() - began
        prefix = os.fsencode(f"{server.target}/")
        lines = sorted(line.removeprefix(prefix) for line in output.splitlines())
        return passed, {"files": len(lines), "digest": hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]}
    arguments: tuple[object, ...]
    if case == "walk":
        arguments = ("walk", server.target)
    elif case in ("sequential", "parallel"):
        arguments = ("read", server.target, lists["largest"], 4 if case == "parallel" else 1)
    else:
        arguments = ("random", server.target, lists["random"], 4 if case == "random4" else 1)
    result = bench.client(*arguments, server=server, limit=_LIMIT)
    return result.pop("ns") / 1e9, result


def _warm(image: str) -> None:
    """Bring the image into the page cache."""
    with open(image, "rb", buffering=0) as file:
        while file.read(4 << 20):
            pass


class Record:
    """What one server did in one case: samples of seconds, CPU and memory, the answer, and why there is no figure."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.peak: list[int] = []
        self.answer: Any = None
        self.trouble = ""
        self.remark = ""

    def fail(self, reason: Exception, limit: float) -> None:
        """Note why there is no figure; `limit`: the seconds that a sample may take."""
        self.trouble = f"more than {limit:.0f} s" if isinstance(reason, subprocess.TimeoutExpired) else str(reason)

    def add(self, seconds: float, cpu: float, peak: int, answer: Any) -> None:
        """Add a sample."""
        self.answer = answer
        self.seconds.append(seconds)
        self.cpu.append(cpu)
        self.peak.append(peak)

    def summary(self, *, costs: bool = True) -> dict[str, Any]:
        if self.trouble or not self.seconds:
            return {"trouble": self.trouble or "not measured"}
        result: dict[str, Any] = {
            "seconds": round(median(self.seconds), 6),
            "samples": [round(second, 6) for second in self.seconds],
            "answer": self.answer,
        }
        if self.remark:
            result["remark"] = self.remark
        if costs:  # the work of the kernel is on nobody's account
            result["server_cpu_seconds"] = round(median(self.cpu), 3)
            result["server_peak_mib"] = round(max(self.peak) / (1 << 20), 1)
        return result


def run(
    bench: Bench, rounds: int, given: str | None, only: set[str], cases: set[str], compressors: tuple[str, ...]
) -> dict[str, Any]:
    """Measure all servers on all images; {"images": {compressor: {"facts", "servers"}}, "missing": {name: reason}}."""
    missing: dict[str, str] = {}
    available = kinds(bench, given, only, missing)
    result: dict[str, Any] = {
        "rounds": rounds,
        "versions": {kind.name: kind.version for kind in available},
        "missing": missing,
        "caches": "fresh mount for every sample; image file in the page cache; "
        + ("unused names and inodes dropped before" if bench.drop_caches() else "caches of the machine not dropped"),
        "images": {},
    }
    wanted = [case for case in CASES if not cases or case in cases]
    for compressor in compressors:
        facts = prepare(bench, compressor)
        lists = {name: bench.temporary / f"{name}-{compressor}" for name in ("largest", "random")}
        lists["largest"].write_text("".join(f"{path}\n" for path in facts["largest"]))
        lists["random"].write_text("".join(f"{at} {path}\n" for path, at in facts["random"]))
        usable = _try_each(bench, available, facts, missing)
        records = {kind.name: {case: Record() for case in wanted} for kind in usable}
        mounts: dict[str, list[float]] = {kind.name: [] for kind in usable}
        total = rounds * len(wanted) * len(usable)
        done = 0
        for turn in range(rounds):
            start = turn % max(1, len(usable))
            for case in wanted:
                for kind in usable[start:] + usable[:start]:
                    title = f"{compressor} image: {case}, round {turn + 1}: {kind.name}"
                    bench.progress.step(title, done, total)
                    done += 1
                    record = records[kind.name][case]
                    if turn < kind.rounds and not record.trouble:
                        _measure(bench, kind, case, facts, lists, record, mounts[kind.name])
        bench.progress.clear()
        _compare(records, wanted)
        public = {key: value for key, value in facts.items() if key not in ("largest", "random", "path", "index")}
        result["images"][compressor] = {
            "facts": public,
            "servers": {
                name: {case: record.summary(costs=name != KERNEL) for case, record in by_case.items()}
                | {"mount": _mount_summary(mounts[name])}
                for name, by_case in records.items()
            },
        }
    return result


def _try_each(bench: Bench, available: list[Kind], facts: dict[str, Any], missing: dict[str, str]) -> list[Kind]:
    """Mount once with each server, unmeasured: warms the programs, makes ratarmount's index, finds who cannot."""
    usable = []
    for kind in available:
        server = bench.server(kind.name)
        if kind.name == RATARMOUNT and not Path(facts["index"]).exists():
            bench.progress.say("ratarmount makes its index (once)")
        try:
            server.start(kind.command(facts, server.target), limit=300)
            usable.append(kind)
        except (BenchError, OSError) as reason:
            missing[kind.name] = f"{facts['compressor']}: {reason}"
        server.stop()
    return usable


def _measure(
    bench: Bench,
    kind: Kind,
    case: str,
    facts: dict[str, Any],
    lists: dict[str, Path],
    record: Record,
    mounts: list[float],
) -> None:
    server = bench.server(kind.name)
    bench.drop_caches()
    _warm(facts["path"])
    try:
        server.start(kind.command(facts, server.target))
        mounts.append(server.mount_seconds)
        before = server.cost()
        seconds, answer = _sample(bench, server, case, lists)
        after = server.cost()
    except (BenchError, OSError, subprocess.TimeoutExpired) as reason:
        record.fail(reason, _LIMIT)
        return
    finally:
        server.stop()
    if record.answer is not None and answer != record.answer:
        record.trouble = f"answers differ from round to round: {record.answer} and {answer}"
        return
    record.add(seconds, after.cpu - before.cpu, after.peak, answer)


def _mount_summary(samples: list[float]) -> dict[str, Any]:
    if not samples:
        return {"trouble": "not measured"}
    return {"seconds": round(median(samples), 4), "samples": [round(sample, 4) for sample in samples]}


def _compare(records: dict[str, dict[str, Record]], cases: list[str]) -> None:
    """Strike out figures of servers whose answer is not the kernel's (else squashfuse_ll's, else the most common)."""
    for case in cases:
        answers = {name: by_case[case].answer for name, by_case in records.items() if by_case[case].answer is not None}
        if not answers:
            continue
        everyone = list(answers.values())
        truth = answers.get(KERNEL) or answers.get(LOW_LEVEL) or max(everyone, key=everyone.count)
        for name, answer in answers.items():
            differing = {key: [answer.get(key), truth[key]] for key in truth if answer.get(key) != truth[key]}
            if not differing:
                continue
            if name != FUSEWIRE and not differing.keys() & _ESSENTIAL[case]:
                records[name][case].remark = f"not as the others: {differing}"
            else:
                records[name][case].trouble = f"wrong answer: {differing}"
