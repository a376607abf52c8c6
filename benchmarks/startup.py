"""Start-up: what it costs to run a command with an image mounted, against starting the interpreter."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import Bench, BenchError, fusewire_command


def _image(bench: Bench) -> Path:
    """Give a small image, made once."""
    made = bench.cache / "startup.sqsh"
    if not made.exists():
        maker = shutil.which("mksquashfs")
        if maker is None:
            raise BenchError("no mksquashfs: apt-get install squashfs-tools")
        tree = bench.temporary / "small"
        for number in range(10):
            folder = tree / f"folder{number}"
            folder.mkdir(parents=True)
            for name in ("one", "two", "three"):
                (folder / name).write_text(f"{name} of {number}\n" * 100)
        argv = [maker, str(tree), f"{made}.new", "-comp", "gzip", "-noappend", "-quiet", "-no-progress"]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchError(f"mksquashfs: {done.stderr.strip()[-300:]}")
        Path(f"{made}.new").replace(made)
    return made


def run(bench: Bench, rounds: int) -> dict[str, Any]:
    """Time both commands in turn; gives medians in milliseconds, or {"missing": reason}."""
    image = _image(bench)
    target = "/mnt" if Path("/mnt").is_dir() else str(bench.server("startup").target)
    python = [sys.executable, "-c", "pass"]
    ours = [*fusewire_command(), "run", f"{image}:{target}", "--", "true"]
    # That `true` succeeds proves nothing about the mount: first see through it.
    probe = [*ours[:-1], "cat", f"{target}/folder7/two"]
    try:
        seen = subprocess.run(
            probe,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=bench.environment,
            timeout=60,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as reason:
        return {"missing": f"Fusewire: {reason}"}
    if seen.returncode != 0 or seen.stdout != b"two of 7\n" * 100:
        words = seen.stderr.decode(errors="replace").strip()[-300:]
        return {"missing": f"Fusewire: status {seen.returncode}, {len(seen.stdout)} bytes read: {words}"}
    times: dict[str, list[float]] = {"python": [], "fusewire": []}
    for turn in range(rounds + 1):
        bench.progress.step("start-up", turn, rounds + 1)
        for name, argv in (("python", python), ("fusewire", ours)):
            began = time.perf_counter()
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, env=bench.environment, start_new_session=True
            )
            passed = time.perf_counter() - began
            if done.returncode != 0:
                raise BenchError(f"{' '.join(argv)}: {done.stderr.decode(errors='replace').strip()[-300:]}")
            if turn:  # the first turn warms the caches
                times[name].append(passed * 1000)
    bench.progress.clear()
    result: dict[str, Any] = {"rounds": rounds, "target": target}
    for name, values in times.items():
        result[f"{name}_ms"] = round(median(values), 2)
        result[f"{name}_samples_ms"] = [round(value, 2) for value in values]
    result["ratio"] = round(result["fusewire_ms"] / result["python_ms"], 3)
    return result
