"""Share, in a real guest: the cache modes of one share beside each other.

Under QEMU's emulation the guest is what takes the time, so these figures compare modes, and never daemons.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import HERE, Bench, BenchError, MissingError, fusewire_command

MODES = ("none", "metadata", "auto", "always")
LINES = {
    "create": "small files created and written",
    "unlink": "and removed",
    "walk": "walk with stat of everything",
    "walk again": "the same again",
    "stat": "stat storm",
    "seqread": "sequential read",
    "seqread again": "the same again",
    "seqwrite": "sequential write",
    "randread": "random 4 KiB reads",
    "randwrite": "random 4 KiB writes",
}
_PER_FOLDER = 25
_LIMIT = 240.0


def _plan(quick: bool) -> dict[str, int]:
    return {
        "small": 100 if quick else 400,
        "entries": 250 if quick else 2000,
        "passes": 4,
        "big": (8 if quick else 64) << 20,
        "blocks": 300 if quick else 3000,
    }


def _rig() -> tuple[Any, Any]:
    """Give the test suite's modules that boot guests and start daemons. Raises MissingError."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    try:
        rig, daemons = importlib.import_module("vm.rig"), importlib.import_module("vm.daemons")
    except ImportError as reason:
        raise MissingError(f"guests are booted by tests/vm, which needs pytest: {reason}") from reason
    finally:
        sys.path.pop(0)
    lacking = rig.images.missing()
    if lacking:
        raise MissingError(lacking)
    return rig, daemons


def _make_source(home: Path, plan: dict[str, int]) -> list[str]:
    """Make what each mode shares: a tree and a file. Gives the names of the tree's files."""
    names = []
    for number in range(plan["entries"]):
        folder = home / "tree" / f"{number // _PER_FOLDER:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}").write_bytes(b"x" * (number % 999))
        names.append(f"tree/{folder.name}/{number:05d}")
    with (home / "big").open("wb", buffering=0) as file:
        for number in range(plan["big"] >> 20):
            file.write(number.to_bytes(4, "little") * (1 << 18))
    return names


def _fio(mode: str, plan: dict[str, int]) -> str:
    """Give fio's command line: all jobs one after the other, since only to start it takes a second there."""
    common = "--ioengine=psync --thread --randrepeat=1 --output-format=json --allow_file_create=1 --invalidate=0"
    big, blocks = plan["big"], plan["blocks"]
    jobs = [
        ("seqread", f"--rw=read --bs=1m --filename=/mnt/{mode}/big"),
        ("seqread again", f"--rw=read --bs=1m --filename=/mnt/{mode}/big"),
        ("seqwrite", f"--rw=write --bs=1m --end_fsync=1 --filename=/mnt/{mode}/out"),
        ("randread", f"--rw=randread --bs=4k --number_ios={blocks} --filename=/mnt/{mode}/out"),
        ("randwrite", f"--rw=randwrite --bs=4k --number_ios={blocks} --end_fsync=1 --filename=/mnt/{mode}/out"),
    ]
    words = " ".join(f"--name='{name}' --stonewall --size={big} {how}" for name, how in jobs)
    return f"echo 3 >/proc/sys/vm/drop_caches; fio {common} {words}"


def run(bench: Bench) -> dict[str, Any]:
    """Measure all modes in one guest; {"modes": {mode: {line: seconds}}, "plan": {...}}. Raises MissingError."""
    rig, daemons = _rig()
    fio = shutil.which("fio")
    if fio is None:
        raise MissingError("no fio: apt-get install fio")
    plan = _plan(bench.quick)
    top = bench.temporary / "guest"
    top.mkdir()
    bench.tmpfs(top, 1 << 30)
    client = bench.program("client")
    bench.progress.say("share: booting a guest")
    with ExitStack() as stack:
        shares = []
        for mode in MODES:
            home = top / mode
            home.mkdir()
            names = _make_source(home, plan)
            words = [*fusewire_command(), "share", str(home), "--fd={fd}", f"--cache={mode}"]
            daemon = stack.enter_context(daemons.Daemon(words, env=bench.environment))
            shares.append(rig.Share(daemon.path, mode, queue_size=1024))
        names_file = top / "names"
        names_file.write_text("".join(f"{name}\n" for name in names))
        put = [(names_file, "/rig/names")]
        try:
            guest = stack.enter_context(rig.Guest(shares, put=put, programs=[fio, str(client)]))
            modes = {mode: _mode(bench, guest, mode, plan) for mode in MODES}
        except rig.RigError as reason:
            raise BenchError(f"the guest: {str(reason)[-600:]}") from reason
    return {"modes": modes, "plan": plan, "lines": LINES}


def _mode(bench: Bench, guest: Any, mode: str, plan: dict[str, int]) -> dict[str, float]:
    bench.progress.say(f"share: in a guest, cache={mode}")

    def client(words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(guest.check(f"client {words}", _LIMIT))
        return found

    home = f"/mnt/{mode}"
    guest.check(f"mkdir -p {home} && mount -t virtiofs {mode} {home} && mkdir {home}/made")
    figures: dict[str, float] = {}
    for line, words in (
        ("create", f"create {home}/made {plan['small']}"),
        ("unlink", f"unlink {home}/made {plan['small']}"),
        ("walk", f"walk {home}/tree"),
        ("walk again", f"walk {home}/tree"),
        ("stat", f"stat {home} /rig/names {plan['passes']}"),
    ):
        got = client(words)
        figures[line] = got["ns"] / 1e9
        if line.startswith("walk") and got["entries"] < plan["entries"]:
            raise BenchError(f"cache={mode}: a walk saw {got['entries']} entries of {plan['entries']}")
    output = guest.check(_fio(mode, plan), _LIMIT)
    for job in json.loads(output[output.index(b"{") :])["jobs"]:
        if job["error"]:
            raise BenchError(f"cache={mode}: fio's {job['jobname']}: error {job['error']}")
        figures[job["jobname"]] = job["job_runtime"] / 1000
    guest.check(f"umount {home}")
    return {line: round(seconds, 4) for line, seconds in figures.items()}
