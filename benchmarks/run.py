"""Runs the benchmarks: python benchmarks/run.py [SUITE] [--quick]; README.md says more."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import directory
import floor
import hello
import images
import remote
import report
import share
import startup
from harness import HERE, Bench, BenchError, MissingError, Progress, machine

SUITES = ("floor", "hello", "images", "startup", "directory", "archives", "remote", "share")
SERVERS = {
    name.lower()
    for name in (
        *(floor.C, floor.FUSEWIRE, floor.PYFUSE3, floor.MFUSEPY),
        *(images.LOW_LEVEL, images.HIGH_LEVEL, images.GIVEN, images.RATARMOUNT, images.KERNEL),
        *directory.SERVERS,
        *share.SERVERS,
        *hello.SERVERS,
        *archives.SERVERS,
    )
}


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "fusewire-bench")


def _names(text: str) -> set[str]:
    return {name.strip().lower() for name in text.split(",") if name.strip()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Measures Fusewire beside its peers.")
    parser.add_argument("suite", nargs="?", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--quick", action="store_true", help="minutes: little work, few rounds")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="rounds of floor, hello, images, directory, archives, remote and share (default: 31, 21, 5, 5, 5, 5 and "
        "21; quick: 5, 3, 2, 1, 1, 1 and 3)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the figures go (default: in the cache directory)"
    )
    parser.add_argument(
        "--chart", type=Path, metavar="FILE.png", help="where the chart goes (default: in the cache directory)"
    )
    parser.add_argument("--no-chart", action="store_true", help="draw none")
    parser.add_argument(
        "--cache", type=Path, default=_default_cache(), metavar="DIR", help="images, peers, compiled programs"
    )
    parser.add_argument("--squashfuse-ll", metavar="PATH", help="another squashfuse_ll to measure beside Debian's")
    parser.add_argument("--servers", type=_names, default=set(), metavar="A,B", help="only these servers")
    parser.add_argument(
        "--cases",
        type=_names,
        default=set(),
        metavar="A,B",
        help=f"only these; images: {', '.join(images.CASES)}; directory: {', '.join(directory.NAMES)}; "
        f"share: {', '.join(share.NAMES)}; hello: {', '.join(hello.OPERATIONS)}; "
        f"archives: {', '.join(archives.CASES)}; remote: {', '.join(remote.CASES)}",
    )
    parser.add_argument(
        "--compressors", type=_names, default=set(images.COMPRESSORS), metavar="A,B", help="only these images"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="floor: threads of our two servers (default: Fusewire's default)"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 when a goal is not met")
    arguments = parser.parse_args()
    known = {*images.CASES, *directory.NAMES, *share.NAMES, *hello.OPERATIONS, *archives.CASES, *remote.CASES}
    unknown = arguments.cases - known
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --help lists them")
    unknown = arguments.servers - SERVERS
    if unknown:
        parser.error(f"no such server: {', '.join(sorted(unknown))}; there are {', '.join(sorted(SERVERS))}")
    unknown = arguments.compressors - set(images.COMPRESSORS)
    if unknown:
        parser.error(f"no image with {', '.join(sorted(unknown))}; there are {', '.join(images.COMPRESSORS)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


def _measure(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    quick, rounds, servers = arguments.quick, arguments.rounds, arguments.servers
    compressors = tuple(name for name in images.COMPRESSORS if name in arguments.compressors)
    results: dict[str, Any] = {"machine": machine(), "quick": quick, "failed": {}}
    with Bench(arguments.cache.resolve(), quick=quick, progress=progress) as bench:
        suites: dict[str, Callable[[], dict[str, Any]]] = {
            "floor": lambda: floor.run(bench, rounds or (5 if quick else 31), servers, arguments.threads),
            "hello": lambda: hello.run(bench, rounds or (3 if quick else 21), servers, arguments.cases),
            "startup": lambda: startup.run(bench, 20),
            "images": lambda: images.run(
                bench, rounds or (2 if quick else 5), arguments.squashfuse_ll, servers, arguments.cases, compressors
            ),
            "directory": lambda: directory.run(bench, rounds or (1 if quick else 5), servers, arguments.cases),
            "archives": lambda: archives.run(bench, rounds or (1 if quick else 5), servers, arguments.cases),
            "remote": lambda: remote.run(bench, rounds or (1 if quick else 5), servers, arguments.cases),
            "share": lambda: share.run(bench, rounds or (3 if quick else 21), servers, arguments.cases),
        }
        for name, suite in suites.items():
            if arguments.suite in (name, "all"):
                try:
                    results[name] = suite()
                except BenchError as reason:
                    results["failed"][name] = str(reason)
        if not arguments.no_chart:
            results["chart_python"] = _chart_python(bench)
    return results


def _chart_python(bench: Bench) -> str:
    """Give an interpreter that has matplotlib: this one, else the peers' environment; "" when neither can."""
    probe = [sys.executable, "-c", "import matplotlib"]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return sys.executable
    try:
        return str(bench.peer("matplotlib", "matplotlib"))
    except MissingError as reason:
        print(f"no chart: {reason}", file=sys.stderr)
        return ""


def main() -> int:
    """Measure, print, write; gives the exit status."""
    arguments = _arguments()
    progress = Progress()
    try:
        results = _measure(arguments, progress)
    except KeyboardInterrupt:
        print("stopped; everything is unmounted", file=sys.stderr)
        return 130
    except (BenchError, OSError) as reason:
        print(f"benchmarks: {reason}", file=sys.stderr)
        return 1
    python = results.pop("chart_python", "")
    found = report.goals(results)
    results["goals"] = [
        {**goal._asdict(), "met": goal.met, "value": None if math.isinf(goal.value) else round(goal.value, 4)}
        for goal in found
    ]
    print(report.text(results))
    suffix = "-quick" if arguments.quick else ""
    json_path = arguments.json or arguments.cache / f"results-{arguments.suite}{suffix}.json"
    json_path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nFigures: {json_path}")
    if python:
        chart = arguments.chart or json_path.with_suffix(".png")
        done = subprocess.run(
            [python, str(HERE / "chart.py"), str(json_path), str(chart)], capture_output=True, text=True
        )
        print(f"Chart:   {chart}" if done.returncode == 0 else f"no chart: {done.stderr.strip()[-300:]}")
    if results["failed"]:
        return 1
    return 1 if arguments.check and not (found and all(goal.met for goal in found)) else 0


if __name__ == "__main__":
    sys.exit(main())
