"""Turns the figures of a run into goals, each met or not, and into tables for a person."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

import archives
import directory
import floor
import hello
import images
import remote
import share

# The block cache that a Fusewire server has unless told otherwise; memory goals are beside it.
BLOCK_CACHE_MIB = 64
MEMORY_MIB = BLOCK_CACHE_MIB + 40


class Goal(NamedTuple):
    """One promise: `value` is to be at most `limit` (or at least, when `least`)."""

    suite: str
    text: str
    value: float
    limit: float
    least: bool = False

    @property
    def figure(self) -> str:
        return "none" if math.isinf(self.value) else f"{self.value:.2f}"

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


# Against Debian's squashfuse_ll. A multi-threaded squashfuse 0.6.2 needs 0.57 of its time for four readers.
IMAGE_GOALS = {
    "walk": 0.5,
    "sequential": 0.6,
    "parallel": 0.57,
    "random1": 0.9,
    "random4": 0.9,
    "tar": 1.0,
    "grep": 1.0,
}


def goals(results: dict[str, Any]) -> list[Goal]:
    """Give every goal that the results have both figures for."""
    found: list[Goal] = []
    if "floor" in results:
        found += _floor_goals(results["floor"])
    if "hello" in results:
        found += _hello_goals(results["hello"])
    if "images" in results:
        found += _image_goals(results["images"])
    if "directory" in results:
        found += _directory_goals(results["directory"])
    if "share" in results:
        found += _share_goals(results["share"])
    startup = results.get("startup", {})
    if "ratio" in startup:
        found.append(Goal("start-up", "run -- true against python -c pass", startup["ratio"], 6))
    return found


def _floor_goals(results: dict[str, Any]) -> list[Goal]:
    servers = results["servers"]
    found: list[Goal] = []
    if floor.FUSEWIRE not in servers or floor.C not in servers:
        return found

    def times(name: str, other: str, operation: str, case: str = "latency") -> float:
        return paired(servers[name][operation][case]["samples_us"], servers[other][operation][case]["samples_us"])

    for operation in floor.OPERATIONS:
        ratio = times(floor.FUSEWIRE, floor.C, operation)
        found.append(Goal("floor", f"{operation}: latency, times the C server's", ratio, 1.15))
    for operation in floor.OPERATIONS:
        ratio = times(floor.FUSEWIRE, floor.C, operation, "parallel")
        text = f"{operation}: time for the same work, {results['clients']} clients, times C's"
        found.append(Goal("floor", text, ratio, 1.5))
    # mfusepy runs with a pool of threads or with one: like is compared with like, and the smaller figure counts.
    pairs = {
        floor.PYFUSE3: ((floor.FUSEWIRE, floor.PYFUSE3),),
        floor.MFUSEPY: ((floor.FUSEWIRE, floor.MFUSEPY), (floor.FUSEWIRE_1, floor.MFUSEPY_1)),
    }
    for peer, limit in ((floor.PYFUSE3, 2.0), (floor.MFUSEPY, 1.2)):
        there = [(ours, theirs) for ours, theirs in pairs[peer] if ours in servers and theirs in servers]
        for operation in floor.OPERATIONS if there else ():
            ratio, theirs = min((times(theirs, ours, operation), theirs) for ours, theirs in there)
            possible = times(theirs, floor.C, operation)
            text = f"{operation}: times faster than {theirs} (the C server: {possible:.2f})"
            found.append(Goal("floor", text, ratio, limit, least=True))
    return found


# How many times less CPU an operation on the smallest filesystem needs than with each peer.
HELLO_LIMITS = {hello.PYFUSE3: 2.0, hello.MFUSEPY: 1.5, hello.FUSEPY: 2.0}


def _hello_goals(results: dict[str, Any]) -> list[Goal]:
    """CPU on one CPU, each server as it is by default."""
    servers = results["servers"]
    found: list[Goal] = []
    for ours in (hello.LEVEL_2, hello.LEVEL_1):
        for peer, limit in HELLO_LIMITS.items():
            for operation, title in results["operations"].items() if ours in servers and peer in servers else ():
                value = hello_ratio(servers, peer, ours, operation, "one_cpu")
                found.append(Goal("hello", f"{title}: {ours}, times less CPU than {peer}", value, limit, least=True))
    return found


def hello_ratio(servers: dict[str, Any], name: str, other: str, operation: str, case: str) -> float:
    """Tell how many times the other's CPU a server needs for an operation."""
    ours, theirs = servers[name][operation][case], servers[other][operation][case]
    return paired(ours["cpu_samples_us"], theirs["cpu_samples_us"])


def _image_goals(results: dict[str, Any]) -> list[Goal]:
    found: list[Goal] = []
    for compressor, image in results["images"].items():
        servers = image["servers"]
        ours = servers.get(images.FUSEWIRE, {})
        for case, limit in IMAGE_GOALS.items():
            ratio = _ratio(servers, images.FUSEWIRE, images.LOW_LEVEL, case)
            text = f"{compressor}: {images.TITLES[case]}, against squashfuse_ll"
            if ratio is not None:
                found.append(Goal("images", text, ratio, limit))
            elif case in ours and case in servers.get(images.LOW_LEVEL, {}):  # one of them failed, so nobody won
                found.append(Goal("images", text, math.inf, limit))
        ratio = _ratio(servers, images.FUSEWIRE, images.KERNEL, "walk")
        if ratio is not None:
            found.append(Goal("images", f"{compressor}: {images.TITLES['walk']}, against the kernel", ratio, 1.0))
        peaks = [figure["server_peak_mib"] for figure in ours.values() if "server_peak_mib" in figure]
        if peaks:
            text = f"{compressor}: peak memory of the server, MiB (block cache of {BLOCK_CACHE_MIB} MiB and 40)"
            found.append(Goal("images", text, max(peaks), MEMORY_MIB))
    return found


# Against the fastest C peer of each line, by what decides there.
PEER_LIMITS = {directory.OFF: 1.2, directory.ON: 1.0, directory.DEFAULT: 1.0}
PYTHON_LIMIT = 1.5


def _directory_goals(results: dict[str, Any]) -> list[Goal]:
    """Without root the kernel does not move contents past the server, so there those lines are judged as well."""
    found: list[Goal] = []
    servers = results["servers"]
    for line in directory.LINES:
        for name in (directory.FUSEWIRE, directory.ROOTLESS) if line.data else (directory.FUSEWIRE,):
            if line.name not in servers.get(name, {}):
                continue
            title = line.title if name == directory.FUSEWIRE else f"{line.title} (as without root)"
            fastest = directory.fastest_c(servers, line.name)
            if fastest is not None:
                ratio = _ratio(servers, name, fastest, line.name)
                value = math.inf if ratio is None else ratio
                found.append(Goal("directory", f"{title}, against {fastest}", value, PEER_LIMITS[line.caching]))
            for peer in directory.PYTHON_PEERS:
                ratio = _ratio(servers, peer, name, line.name)
                if ratio is not None:
                    text = f"{title}, times faster than {peer}"
                    found.append(Goal("directory", text, ratio, PYTHON_LIMIT, least=True))
    return found


# Against C virtiofsd's CPU on one request queue; one wake-up serves many requests where many are in flight.
SHARE_BIG, SHARE_SMALL = 1.1, {1: 2.0, 16: 1.5}


def _share_goals(results: dict[str, Any]) -> list[Goal]:
    """CPU with one queue; with two, which C virtiofsd has not, requests per second."""
    cases = {name: daemon["cases"] for name, daemon in results["daemons"].items()}
    ours, theirs = cases.get(share.FUSEWIRE, {}), cases.get(share.C, {})
    found: list[Goal] = []
    for case in share.CASES:
        their = theirs.get(case._replace(queues=1).key)
        if case.key not in ours or their is None:
            continue
        our, title = ours[case.key], f"{share.TITLES[case.operation]}, depth {case.depth}"
        if case.queues == 1:
            limit = SHARE_BIG if "1m" in case.operation else SHARE_SMALL[case.depth]
            value = paired(our["cpu_samples_us"], their["cpu_samples_us"])
            found.append(Goal("share", f"{title}: CPU, times {share.C}'s", value, limit))
        else:
            value = paired(their["samples_us"], our["samples_us"])
            text = f"{title}: requests per second on {case.queues} queues, times {share.C}'s on its one"
            found.append(Goal("share", text, value, 1.0, least=True))
    return found


def _ratio(servers: dict[str, Any], name: str, other: str, case: str) -> float | None:
    ours = servers.get(name, {}).get(case, {})
    theirs = servers.get(other, {}).get(case, {})
    return paired(ours["samples"], theirs["samples"]) if "seconds" in ours and "seconds" in theirs else None


def paired(ours: list[float], theirs: list[float]) -> float:
    """Give the median of the rounds' ratios: both samples of a round were taken close to one another."""
    if len(ours) != len(theirs):
        return median(ours) / median(theirs)
    return median(our / their for our, their in zip(ours, theirs, strict=True))


# ---- tables ----


def _table(rows: list[list[str]]) -> str:
    """Lay out rows under a head; the first column is text, the others end at the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
        if number == 0:
            lines.append("  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def text(results: dict[str, Any]) -> str:
    """Give the whole report."""
    facts = results["machine"]
    system = f"Linux {facts['kernel']} {facts['architecture']}, {facts['cpus']} CPUs ({facts['cpu']})"
    parts = [f"{system}, {facts['python']}, load {facts['load_before']} at the start"]
    if facts["load_before"] > 0.5 * facts["cpus"]:
        parts.append("The machine was busy: do not trust these figures.")
    if results["quick"]:
        parts.append(
            "Quick mode: little work and few rounds. Its figures show that things work, not how fast they are."
        )
    if "floor" in results:
        parts += _floor_tables(results["floor"])
    if "hello" in results:
        parts += _hello_tables(results["hello"])
    if "images" in results:
        parts += _image_tables(results["images"])
    if "directory" in results:
        parts += _directory_tables(results["directory"])
    if "archives" in results:
        parts += _archive_tables(results["archives"])
    if "remote" in results:
        parts += _remote_tables(results["remote"])
    if "share" in results:
        parts += _share_tables(results["share"])
    if "startup" in results:
        parts.append(_startup_text(results["startup"]))
    parts += [f"{suite} failed: {reason}" for suite, reason in results["failed"].items()]
    parts.append(goal_table(goals(results)))
    return "\n\n".join(parts)


def _floor_tables(results: dict[str, Any]) -> list[str]:
    parts = []
    servers = results["servers"]
    titles = {
        "latency": f"Floor: microseconds per request, one client; server threads: {results['threads']} "
        "(in brackets: times the C server, median of the rounds' ratios)",
        "latency_one_cpu": "Floor: the same with client and server on one CPU",
        "parallel": f"Floor: {results['clients']} clients at once, microseconds per request of all together",
    }
    for case, title in titles.items():
        rows = [["server", *floor.OPERATIONS]]
        for name, operations in servers.items():
            cells = []
            for operation in floor.OPERATIONS:
                figure = operations[operation][case]
                cells.append(f"{figure['us']:.1f} ({figure['times_c']:.2f})")
            rows.append([_versioned(name, results), *cells])
        parts.append(f"{title}\n{_table(rows)}")
    rows = [["server", *floor.OPERATIONS]]
    for name, operations in servers.items():
        cells = [f"{operations[operation]['latency_one_cpu']['server_cpu_us']:.1f}" for operation in floor.OPERATIONS]
        rows.append([_versioned(name, results), *cells])
    parts.append(f"Floor: CPU of the server per request, microseconds, one client on the same CPU\n{_table(rows)}")
    return parts + _missing(results)


def _hello_tables(results: dict[str, Any]) -> list[str]:
    servers, operations = results["servers"], results["operations"]
    parts = []
    if not servers:
        return _missing(results)
    base = hello.LEVEL_2
    for case, where in (("free", "client and server on any CPU"), ("one_cpu", "client and server on one CPU")):
        rows = [["server", *operations.values()]]
        for name, figures in servers.items():
            cells = [f"{figures[key][case]['us']:.1f} ({figures[key][case]['p90_us']:.1f})" for key in operations]
            rows.append([_versioned(name, results), *cells])
        parts.append(f"Hello: median microseconds per operation (90th percentile), {where}\n{_table(rows)}")
    for case, where in (("free", "any CPU"), ("one_cpu", "one CPU")):
        rows = [["server", *operations.values()]]
        for name, figures in servers.items():
            cells = [f"{figures[key][case]['cpu_us']:.1f}" for key in operations]
            if base in servers and name != base:
                ratios = [hello_ratio(servers, name, base, key, case) for key in operations]
                cells = [f"{cell} ({ratio:.2f})" for cell, ratio in zip(cells, ratios, strict=True)]
            rows.append([_versioned(name, results), *cells])
        title = f"Hello: CPU of the server per operation, microseconds, {where} (in brackets: times that of {base})"
        parts.append(f"{title}\n{_table(rows)}")
    return parts + _missing(results)


def _image_tables(results: dict[str, Any]) -> list[str]:
    parts = [f"Images: {results['caches']}; medians of {results['rounds']} rounds ({images.RATARMOUNT}: 1)"]
    for compressor, image in results["images"].items():
        facts, servers = image["facts"], image["servers"]
        size = (
            f"{facts['files']} files, {facts['content_bytes'] / 1e6:.0f} MB, image {facts['image_bytes'] / 1e6:.0f} MB"
        )
        names = list(servers)
        cases = [case for case in (*images.CASES, "mount") if any(case in servers[name] for name in names)]
        rows = [["seconds", *(_versioned(name, results) for name in names)]]
        rows += [[_title(case, facts), *(_seconds(servers[name].get(case, {})) for name in names)] for case in cases]
        parts.append(f"Image {compressor}: {size}\n{_table(rows)}")
        others = [name for name in (images.LOW_LEVEL, images.GIVEN, images.KERNEL) if name in servers]
        if images.FUSEWIRE in servers and others:
            rows = [["Fusewire against", *others]]
            for case in cases:
                ratios = [_ratio(servers, images.FUSEWIRE, other, case) for other in others]
                rows.append([images.TITLES[case], *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
            parts.append(_table(rows))
        users = [name for name in names if name != images.KERNEL]
        if users:
            rows = [["server CPU s / peak MiB", *users]]
            rows += [
                [images.TITLES[case], *(_cost(servers[name].get(case, {})) for name in users)]
                for case in cases
                if case != "mount"
            ]
            parts.append(_table(rows))
        for name in names:
            for case, figure in servers[name].items():
                words = figure.get("trouble") or figure.get("remark")
                if words and words != "not measured":
                    parts.append(f"  {name}, {images.TITLES[case]}: {words}")
    return parts + _missing(results)


def _directory_tables(results: dict[str, Any]) -> list[str]:
    servers, lines = results["servers"], results["lines"]
    if not servers:
        return _missing(results)
    names = list(servers)
    plan = results["plan"]
    head = (
        f"Directory: {results['place']}; medians of {results['rounds']} rounds. {plan['entries']} entries walked, "
        f"{plan['stats_off']} stats without and {plan['stats_on']} x {plan['passes']} with caching, {plan['small']} "
        f"small files, {plan['archive']} in the archive, {plan['repository']} in the repository, "
        f"{plan['big'] >> 20} MiB in sequence, {plan['blocks']} random blocks of 4 KiB in {plan['span'] >> 20} MiB"
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    rows = [["seconds", *names]]
    rows += [[title, *(_seconds(servers[name][line]) for name in names)] for line, title in lines.items()]
    parts = [head, f"Versions: {versions}", _table(rows)]
    for ours in (directory.FUSEWIRE, directory.ROOTLESS):
        others = [name for name in names if name not in (directory.FUSEWIRE, directory.ROOTLESS)]
        if ours not in servers or not others:
            continue
        rows = [[f"{ours}, against", *others]]
        for line, title in lines.items():
            ratios = [_ratio(servers, ours, other, line) for other in others]
            rows.append([title, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
        parts.append(_table(rows))
    users = [name for name in names if name != directory.NATIVE]
    if users:
        rows = [["server CPU s / peak MiB", *users]]
        rows += [[title, *(_cost(servers[name][line]) for name in users)] for line, title in lines.items()]
        parts.append(_table(rows))
    for name in names:
        for line, figure in servers[name].items():
            words = figure.get("trouble") or figure.get("remark")
            if words and words != "not measured":
                parts.append(f"  {name}, {lines[line]}: {words}")
    return parts + _missing(results)


def _archive_tables(results: dict[str, Any]) -> list[str]:
    if not results["archives"]:
        return _missing(results)
    parts = [f"Archives: {results['place']}; medians of {results['rounds']} rounds"]
    for name, archive in results["archives"].items():
        facts, servers = archive["facts"], archive["servers"]
        names = list(servers)
        head = (
            f"Archive {name}: {facts['files']} files, {facts['content_bytes'] / 1e6:.0f} MB, archive "
            f"{facts['archive_bytes'] / 1e6:.0f} MB"
        )
        cases = [case for case in archives.CASES if any(case in servers[server] for server in names)]
        both = archives.FUSEWIRE in servers and archives.RATARMOUNT in servers
        rows = [["seconds", *(_versioned(server, results) for server in names), *(["ratio"] if both else [])]]
        for case in cases:
            cells = [_seconds(servers[server].get(case, {})) for server in names]
            if both:
                ratio = _ratio(servers, archives.FUSEWIRE, archives.RATARMOUNT, case)
                cells.append("-" if ratio is None else f"{ratio:.2f}")
            rows.append([archives.TITLES[case], *cells])
        parts.append(f"{head}\n{_table(rows)}")
        rows = [["server CPU s / peak MiB", *names]]
        rows += [[archives.TITLES[case], *(_cost(servers[server].get(case, {})) for server in names)] for case in cases]
        parts.append(_table(rows))
        for server in names:
            for case, figure in servers[server].items():
                words = figure.get("trouble") or figure.get("remark")
                if words and words != "not measured":
                    parts.append(f"  {server}, {archives.TITLES[case]}: {words}")
    return parts + _missing(results)


def _remote_tables(results: dict[str, Any]) -> list[str]:
    if not results["cases"]:
        return _missing(results)
    head = (
        f"An image on a web server: {results['image_bytes'] / 1e6:.0f} MB, {results['files']} files; medians of "
        f"{results['rounds']} rounds. Needed: the stored blocks of what is read"
    )
    rows = [
        ["", "requests", "fetched kB", "needed kB", *(f"seconds, {d * 1000:.0f} ms away" for d in remote.DISTANCES)]
    ]
    for case, figures in results["cases"].items():
        seconds = [f"{figures[f'seconds_{d * 1000:.0f}ms']:.2f}" for d in remote.DISTANCES]
        kilobytes = [f"{figures[name] / 1000:.0f}" for name in ("fetched", "needed")]
        rows.append([remote.TITLES[case], str(figures["requests"]), *kilobytes, *seconds])
    return [f"{head}\n{_table(rows)}", *_missing(results)]


def _share_tables(results: dict[str, Any]) -> list[str]:
    parts = []
    cases = {name: daemon["cases"] for name, daemon in results["daemons"].items()}
    if any(cases.values()):
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        peaks = ", ".join(f"{name} {daemon['peak_mib']:.0f}" for name, daemon in results["daemons"].items())
        parts.append(
            f"Share: requests of a guest to vhost-user-fs daemons, without a guest; medians of {results['rounds']} "
            f"rounds, a file of {results['file_bytes'] >> 20} MiB on a tmpfs\n  {versions}\n  "
            f"peak memory, MiB, with what of the guest's memory was touched: {peaks}"
        )
    for depth in share.DEPTHS:
        parts += _share_cpu(cases, depth)
        parts += _share_rates(cases, depth)
    parts += _share_time(cases)
    guest = results.get("guest")
    if guest:
        plan = guest["plan"]
        rows = [["seconds", *(f"cache={mode}" for mode in guest["modes"])]]
        for line, title in guest["lines"].items():
            rows.append([title, *(f"{figures[line]:.3f}" for figures in guest["modes"].values())])
        parts.append(
            f"Share: modes in an emulated guest (it is what takes the time). {plan['small']} small files, "
            f"{plan['entries']} in the tree, {plan['passes']} passes of stat, {plan['big'] >> 20} MiB in sequence, "
            f"{plan['blocks']} random blocks\n{_table(rows)}"
        )
    return parts + _missing(results)


def _share_cpu(cases: dict[str, Any], depth: int) -> list[str]:
    theirs = cases.get(share.C, {})

    def cell(name: str, key: str) -> str:
        figure, other = cases[name].get(key), theirs.get(key)
        if figure is None:
            return "-"
        if other is None or name == share.C:
            return f"{figure['cpu_us']:.1f}"
        return f"{figure['cpu_us']:.1f} ({paired(figure['cpu_samples_us'], other['cpu_samples_us']):.2f})"

    rows = [
        [title, *(cell(name, key) for name in cases)]
        for operation, title in share.TITLES.items()
        if any((key := share.Case(operation, depth, 1).key) in found for found in cases.values())
    ]
    if not rows:
        return []
    title = f"Share, depth {depth}: CPU of the daemon per request, microseconds, one request queue"
    return [f"{title} (in brackets: times {share.C}'s)\n{_table([['operation', *cases], *rows])}"]


def _share_rates(cases: dict[str, Any], depth: int) -> list[str]:
    columns = [
        (name, queues)
        for queues in share.QUEUES
        for name, found in cases.items()
        if any(share.Case(operation, depth, queues).key in found for operation in share.TITLES)
    ]
    rows = []
    for operation, title in share.TITLES.items():
        figures = [cases[name].get(share.Case(operation, depth, queues).key) for name, queues in columns]
        if any(figures):
            rows.append([title, *("-" if figure is None else f"{figure['per_second']}" for figure in figures)])
    if not rows:
        return []
    head = ["operation", *(name if queues == 1 else f"{name}, {queues} queues" for name, queues in columns)]
    return [f"Share, depth {depth}: requests per second\n{_table([head, *rows])}"]


def _share_time(cases: dict[str, Any]) -> list[str]:
    """Where the time goes: the kernel's share of a daemon's CPU, and how often either side wakes the other."""
    rows = []
    for operation, title in share.TITLES.items():
        for depth in share.DEPTHS:
            key = share.Case(operation, depth, 1).key
            cells = []
            for found in cases.values():
                figure = found.get(key)
                if figure is None:
                    cells.append("-")
                    continue
                system = f"{figure['system_share'] * 100:.0f} %" if "system_share" in figure else "?"
                cells.append(f"{system}, {figure['kicks']:.2f}, {figure['calls']:.2f}")
            if any(cell != "-" for cell in cells):
                rows.append([f"{title}, depth {depth}", *cells])
    if not rows:
        return []
    title = "Share, one queue: the kernel's share of the daemon's CPU (?: too short a run), wake-ups of the daemon and "
    return [f"{title}of the guest per request\n{_table([['operation', *cases], *rows])}"]


def _title(case: str, facts: dict[str, Any]) -> str:
    if case in ("sequential", "parallel"):
        return f"{images.TITLES[case]} ({facts['largest_bytes'] / 1e6:.0f} MB)"
    return images.TITLES[case]


def _seconds(figure: dict[str, Any]) -> str:
    if "seconds" in figure:
        return f"{figure['seconds']:.3f}"
    trouble = figure.get("trouble", "")
    return trouble if trouble.startswith("more than") else "-" if trouble in ("", "not measured") else "failed"


def _cost(figure: dict[str, Any]) -> str:
    if "server_cpu_seconds" not in figure:
        return "-"
    return f"{figure['server_cpu_seconds']:.2f} / {figure['server_peak_mib']:.0f}"


def _versioned(name: str, results: dict[str, Any]) -> str:
    version = results["versions"].get(name, "")
    return name if version in ("", "ours", "unknown") or name == images.KERNEL else f"{name} {version}"


def _missing(results: dict[str, Any]) -> list[str]:
    return [f"  {name} is missing: {reason}" for name, reason in results["missing"].items()]


def _startup_text(results: dict[str, Any]) -> str:
    if "missing" in results:
        return f"Start-up: {results['missing']}"
    return (
        f"Start-up, median of {results['rounds']}: fusewire run image:{results['target']} -- true "
        f"{results['fusewire_ms']:.1f} ms, python -c pass {results['python_ms']:.1f} ms, ratio {results['ratio']:.2f}"
    )


def goal_table(found: list[Goal]) -> str:
    """Give all goals with their figures."""
    if not found:
        return "Goals: none could be judged (Fusewire or what it is compared with is missing)"
    rows = [["goal", "figure", "limit", "met"]]
    for goal in found:
        sign = ">=" if goal.least else "<="
        verdict = "yes" if goal.met else "NO"
        rows.append([f"{goal.suite}: {goal.text}", goal.figure, f"{sign} {goal.limit:g}", verdict])
    met = sum(goal.met for goal in found)
    return f"Goals: {met} of {len(found)} met\n{_table(rows)}"
