"""Draws the results of a run: python benchmarks/chart.py RESULTS.json CHART.png.

Needs matplotlib, and nothing else here does.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import share
from directory import LINES, fastest_c
from report import IMAGE_GOALS, PEER_LIMITS, SHARE_BIG, SHARE_SMALL

COLOURS = {
    "Fusewire": "#d1495b",
    "Fusewire, 1 thread": "#e79aa3",
    "C": "#3d3d3d",
    "kernel": "#3d3d3d",
    "squashfuse_ll": "#2e86ab",
    "squashfuse_ll (given)": "#59a5c4",
    "squashfuse": "#8fb8ca",
    "ratarmount": "#c9a227",
    "pyfuse3": "#2e86ab",
    "mfusepy": "#c9a227",
    "mfusepy, 1 thread": "#e0c46c",
    "native": "#3d3d3d",
    "Fusewire rootless-like": "#e79aa3",
    "bindfs": "#5f7f5f",
    "fuse-overlayfs": "#8fb38f",
    "passthrough_ll": "#2a5d67",
    "passthrough_hp": "#6b8f97",
    "passthrough": "#a9bfc4",
    "Fusewire, image": "#e79aa3",
    "C virtiofsd": "#3d3d3d",
    "Rust virtiofsd": "#b5651d",
}
CASES = {
    "walk": "walk\n+ stat",
    "sequential": "sequential",
    "parallel": "4 readers",
    "random1": "random\n1 thread",
    "random4": "random\n4 threads",
    "tar": "tar",
    "grep": "grep -r",
    "mount": "mount",
}


def _bars(axes: Any, names: list[str], groups: list[str], values: dict[str, list[float | None]]) -> None:
    """Draw one group of bars per label with the figure on top of each."""
    width = 0.84 / max(1, len(names))
    for index, name in enumerate(names):
        at = [group + (index - (len(names) - 1) / 2) * width for group in range(len(groups))]
        heights = [value or 0 for value in values[name]]
        bars = axes.bar(at, heights, width * 0.94, label=name, color=COLOURS.get(name, "#999999"))
        labels = [
            "" if value is None else f"{value:.2g}".removeprefix("0") if value < 10 else f"{value:.0f}"
            for value in values[name]
        ]
        axes.bar_label(bars, labels, fontsize=6, padding=1)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _floor(axes: Any, results: dict[str, Any], case: str, title: str) -> None:
    names = list(results["servers"])
    operations = list(results["servers"][names[0]])
    values = {name: [results["servers"][name][operation][case]["us"] for operation in operations] for name in names}
    _bars(axes, names, [operation.upper() for operation in operations], values)
    axes.set_yscale("log")
    axes.set_ylabel("µs per request", fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False)


def _cut(axes: Any) -> None:
    """End the axis at 3; a bar that is cut keeps its figure."""
    for text in axes.texts:
        text.set_clip_on(False)
        if text.xy[1] > 3:
            text.xy = (text.xy[0], 3)
    axes.set_ylim(0, 3)


def _image(axes: Any, compressor: str, image: dict[str, Any]) -> None:
    """Draw times as multiples of squashfuse_ll's, cut at 3, with the goals as lines."""
    servers = image["servers"]
    base = servers.get("squashfuse_ll", {})
    cases = [case for case in CASES if "seconds" in base.get(case, {})]
    names = [name for name in servers if any("seconds" in servers[name].get(case, {}) for case in cases)]
    values: dict[str, list[float | None]] = {}
    for name in names:
        seconds = [servers[name].get(case, {}).get("seconds") for case in cases]
        values[name] = [
            None if second is None else second / base[case]["seconds"]
            for case, second in zip(cases, seconds, strict=True)
        ]
    _bars(axes, names, [CASES[case] for case in cases], values)
    _cut(axes)
    for index, case in enumerate(cases):
        if case in IMAGE_GOALS:
            axes.plot(
                [index - 0.45, index + 0.45], [IMAGE_GOALS[case]] * 2, color="#d1495b", linewidth=1, linestyle=":"
            )
    axes.set_ylabel("time, squashfuse_ll = 1", fontsize=8)
    facts = image["facts"]
    size = f"{facts['files']:,} files, {facts['content_bytes'] / 1e6:,.0f} MB in {facts['image_bytes'] / 1e6:,.0f} MB"
    axes.set_title(
        f"{compressor} image of /usr: {size} (less is better; dotted: goal)", fontsize=10, loc="left", pad=12
    )
    axes.legend(fontsize=7, frameon=False, ncols=len(names), loc="upper left", bbox_to_anchor=(-0.01, -0.17))


def _directory(axes: Any, results: dict[str, Any], data: bool) -> None:
    """Draw times as multiples of the fastest C peer's of each line, cut at 3, with the goals as lines."""
    servers = results["servers"]
    bases = {line: fastest_c(servers, line.name) for line in LINES if line.data == data}
    lines = [line for line, base in bases.items() if base is not None]
    values: dict[str, list[float | None]] = {}
    for name, figures in servers.items():
        seconds = [figures.get(line.name, {}).get("seconds") for line in lines]
        values[name] = [
            None if second is None else second / servers[bases[line]][line.name]["seconds"]
            for line, second in zip(lines, seconds, strict=True)
        ]
    names = [name for name in servers if any(value is not None for value in values[name])]
    _bars(axes, names, [textwrap.fill(line.title, 18) for line in lines], values)
    _cut(axes)
    for index, line in enumerate(lines):
        limit = PEER_LIMITS[line.caching]
        axes.plot([index - 0.45, index + 0.45], [limit] * 2, color="#d1495b", linewidth=1, linestyle=":")
    axes.set_ylabel("time, fastest C peer = 1", fontsize=8)
    what = "contents" if data else "names and attributes"
    axes.set_title(f"Directory: {what} (less is better; dotted: goal)", fontsize=10, loc="left", pad=12)
    axes.legend(fontsize=6, frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(-0.01, -0.25))


def _share(axes: Any, results: dict[str, Any], depth: int) -> None:
    """Draw the CPU of each request on one queue, with the goals, which are multiples of C virtiofsd's, as lines."""
    cases = {name: daemon["cases"] for name, daemon in results["daemons"].items()}
    keys = {operation: share.Case(operation, depth, 1).key for operation in share.TITLES}
    operations = [name for name, key in keys.items() if any(key in found for found in cases.values())]
    values = {
        name: [found[keys[operation]]["cpu_us"] if keys[operation] in found else None for operation in operations]
        for name, found in cases.items()
    }
    _bars(axes, list(cases), [textwrap.fill(share.TITLES[operation], 12) for operation in operations], values)
    for index, operation in enumerate(operations):
        theirs = cases.get(share.C, {}).get(keys[operation])
        if theirs is not None:
            goal = theirs["cpu_us"] * (SHARE_BIG if "1m" in operation else SHARE_SMALL[depth])
            axes.plot([index - 0.45, index + 0.45], [goal] * 2, color="#d1495b", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("CPU µs per request", fontsize=8)
    title = f"Share, depth {depth}: CPU of the daemon per request (less is better; dotted: goal)"
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=7, frameon=False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the chart of all suites that the results hold."""
    panels: list[Any] = []
    if "floor" in results:
        floor = results["floor"]
        panels.append(lambda axes: _floor(axes, floor, "latency", "One request, caching off (less is better)"))
        panels.append(
            lambda axes: _floor(axes, floor, "parallel", f"{floor['clients']} clients at once, time per request of all")
        )
    for compressor, image in results.get("images", {}).get("images", {}).items():
        if "squashfuse_ll" in image["servers"]:
            panels.append(lambda axes, c=compressor, i=image: _image(axes, c, i))
    directory = results.get("directory", {})
    for data in (False, True):
        if any(fastest_c(directory.get("servers", {}), line.name) for line in LINES if line.data == data):
            panels.append(lambda axes, d=data: _directory(axes, directory, d))
    shared = results.get("share", {})
    if any(daemon["cases"] for daemon in shared.get("daemons", {}).values()):
        panels += [lambda axes, d=depth: _share(axes, shared, d) for depth in share.DEPTHS]
    startup = results.get("startup", {})
    if "ratio" in startup:

        def start(axes: Any) -> None:
            labels = ["python -c pass", "fusewire run image:/mnt -- true"]
            bars = axes.barh(
                labels, [startup["python_ms"], startup["fusewire_ms"]], color=["#3d3d3d", "#d1495b"], height=0.5
            )
            axes.bar_label(bars, fmt="%.1f ms", fontsize=8, padding=3)
            axes.axvline(6 * startup["python_ms"], color="#d1495b", linewidth=1, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            axes.set_title("Start-up (dotted: goal)", fontsize=10, loc="left")

        panels.append(start)
    if not panels:
        sys.exit("chart: the results hold nothing to draw")
    heights = [1.0] * len(panels)
    if "ratio" in startup:
        heights[-1] = 0.4
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(10, 3.2 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for row, panel in zip(grid, panels, strict=True):
        panel(row[0])
    facts = results["machine"]
    figure.suptitle(
        f"Fusewire benchmarks: Linux {facts['kernel']}, {facts['cpus']} CPUs, {facts['python']}"
        + (" (quick mode)" if results["quick"] else ""),
        fontsize=11,
    )
    figure.get_layout_engine().set(hspace=0.06, h_pad=0.08)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
