"""libfuse's passthrough examples: found on this machine or in Debian's source package, and compiled.

Debian ships the C ones with libfuse3-dev. The C++ one is only in the source package, which is fetched with apt-get into
the cache directory, with package lists of its own: nothing outside of the cache directory is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from harness import Bench, MissingError

EXAMPLES = ("passthrough_ll", "passthrough_hp", "passthrough")
_DOCUMENTS = Path("/usr/share/doc/libfuse3-dev/examples")
# What libfuse's own build finds out about glibc and Linux; without them operations are left out (utimens, for one).
_HAS = ("UTIMENSAT", "SETXATTR", "POSIX_FALLOCATE", "FALLOCATE", "FDATASYNC", "COPY_FILE_RANGE")


def example(bench: Bench, name: str) -> Path:
    """Give the compiled example; MissingError says why there is none."""
    made = bench.cache / "build" / name
    if made.exists():
        return made
    source = _source(bench, f"{name}.cc" if name == "passthrough_hp" else f"{name}.c")
    compiler = shutil.which("g++" if source.suffix == ".cc" else "gcc")
    if compiler is None:
        raise MissingError("no compiler: apt-get install gcc g++")
    flags = _output(["pkg-config", "--cflags", "--libs", "fuse3"], "apt-get install pkg-config libfuse3-dev").split()
    made.parent.mkdir(exist_ok=True)
    defined = [f"-DHAVE_{name}" for name in _HAS]
    # -w: warnings of somebody else's code help nobody here.
    argv = [compiler, "-O2", "-w", "-pthread", *defined, "-o", f"{made}.new", str(source), *flags]
    _output(argv, f"{source.name} has to compile")
    os.replace(f"{made}.new", made)
    return made


def version() -> str:
    """Give the version of the libfuse that the examples are linked with."""
    done = subprocess.run(["pkg-config", "--modversion", "fuse3"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _output(argv: list[str], way_out: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise MissingError(f"{reason} ({way_out})") from reason
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise MissingError(f"{argv[0]}: {words[-1][:200]} ({way_out})")
    return done.stdout


def _source(bench: Bench, name: str) -> Path:
    if (_DOCUMENTS / name).exists():
        return _DOCUMENTS / name
    home = bench.cache / "fuse3-source"
    for found in home.glob(f"fuse*/example/{name}"):
        return found
    home.mkdir(exist_ok=True)
    refused = home / "refused"
    if refused.exists() and time.time() - refused.stat().st_mtime < 600:
        raise MissingError(refused.read_text())
    bench.progress.say("fetching Debian's source package of libfuse")
    try:
        _fetch(home)
    except MissingError as reason:
        refused.write_text(str(reason))
        raise
    for found in home.glob(f"fuse*/example/{name}"):
        return found
    raise MissingError(f"{name} is neither in {_DOCUMENTS} nor in Debian's source package of fuse3")


def _fetch(home: Path) -> None:
    """Fetch and unpack the source package fuse3 from where apt has the binary packages from."""
    template = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = _output(
        ["apt-get", "indextargets", "--format", template, "Created-By: Packages", "Origin: Debian"],
        "the example is in Debian's source package fuse3",
    )
    if not targets.strip():
        raise MissingError("apt has no list of Debian's packages: apt-get update, and libfuse3-dev for the examples")
    (home / "sources.list").write_text("".join(f"deb-src {line}\n" for line in sorted(set(targets.splitlines()))))
    for folder in ("lists/partial", "cache/archives/partial"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-q", "-o", f"Dir::Etc::sourcelist={home}/sources.list", "-o", "Dir::Etc::sourceparts=-"]
    apt += ["-o", f"Dir::State::lists={home}/lists", "-o", f"Dir::Cache={home}/cache", "-o", "APT::Sandbox::User="]
    _output([*apt, "update"], "package lists could not be fetched", home)
    _output([*apt, "source", "--download-only", "fuse3"], "the source package could not be fetched", home)
    archives = sorted(home.glob("fuse3_*.orig.tar.*"))
    archive = next((path for path in archives if path.suffix != ".asc"), None)
    if archive is None:
        raise MissingError("Debian's source package fuse3 holds no archive")
    _output(["tar", "-xf", str(archive)], "apt-get install xz-utils", home)
