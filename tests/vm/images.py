"""What guests are booted from: a Debian kernel and busybox, a Python for them, this package, and disks.

    python3 tests/vm/images.py --fetch [backports]     # once, with a network: needs apt and dpkg, no root

keeps kernel and busybox in the cache, which is `cache()`; nothing is installed. The rest is made of this machine's own
files: a disk with /usr/bin/python3 and its libraries (once, also kept there) and the initramfs (for each guest). This
module imports nothing but the standard library, so it runs before there is a virtual environment.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PYTHON = "/usr/bin/python3"
PACKAGE = Path(__file__).resolve().parents[2] / "src" / "fusewire"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # an ordinary user's PATH has none of them
WEEK = 7 * 86400
FETCH = f"{PYTHON} tests/vm/images.py --fetch"

MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtiofs")
"""Loaded in every guest, with what they need; those that a kernel has built in are not missed."""

# What the interpreter never needs in a guest: 60 of its 90 MB.
UNWANTED = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data", "distutils"}
UNWANTED |= {"site-packages", "dist-packages"}

PROGRAMS = ("/bin/echo", "/bin/sleep")
"""Programs of this machine that guests have in place of busybox's: behaviours run copies by other names."""

SYSTEM = """
import glob, json, sys, sysconfig
library = sysconfig.get_path("stdlib")
print(json.dumps([list(sys.version_info[:3]), sys.executable, library, glob.glob(library + "/lib-dynload/*.so")]))
"""


class ImageError(Exception):
    """Something that a guest needs is not there, and cannot be made."""


class Kernel(NamedTuple):
    """A guest's kernel, the directory of its modules, and the words that start a QEMU it runs on."""

    image: Path
    modules: Path
    qemu: tuple[str, ...]


def cache() -> Path:
    """The directory for what is fetched or takes long to make; FUSEWIRE_VM_CACHE names another one."""
    if named := os.environ.get("FUSEWIRE_VM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusewire-vm"


def find_program(name: str) -> str | None:
    """The path of a program, also one that only root has in his PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN}")


def missing(flavour: str = "stable") -> str:
    """What this machine lacks for a guest, and the way to it; "" if nothing."""
    if platform.machine() != "x86_64":
        return f"guests are booted on x86_64 only, and this is {platform.machine()}"
    for program, package in {
        "qemu-system-x86_64": "qemu-system-x86",
        "setpriv": "util-linux",
        "mkfs.ext4": "e2fsprogs",
        "ldd": "libc-bin",
    }.items():
        if find_program(program) is None:
            return f"{program} is not installed (Debian package {package})"
    try:
        find_kernel(flavour)
        find_busybox()
        _interpreter()
    except ImageError as error:
        return str(error)
    return ""


# Fetching


def fetch(flavour: str = "stable") -> None:
    """Fetch what is not in the cache yet: a kernel and busybox.

    `stable` is the cloud kernel of the release that this machine runs. `backports` is the newer one of its backports,
    together with the QEMU of the same place: the release's older QEMU emulates the newer kernel wrongly (random
    corruption of lists in the guest).
    """
    directory = cache()
    directory.mkdir(parents=True, exist_ok=True)
    for program, package in {"apt-get": "apt", "dpkg-deb": "dpkg"}.items():
        if shutil.which(program) is None:
            raise ImageError(f"{program} is not installed (package {package}): kernels are fetched on Debian only")
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "busybox").exists():
            _unpack(directory / "busybox", _Apt([]), lambda apt: ["busybox-static"])
        if not (directory / flavour).exists():
            if flavour == "backports":
                with tempfile.TemporaryDirectory(dir=directory) as own:
                    apt = _Apt(_backports(Path(own)), suite=f"{_release()}-backports")
                    _unpack(
                        directory / flavour, apt, lambda apt: [*apt.kernel(), "qemu-system-x86", "qemu-system-data"]
                    )
            else:
                _unpack(directory / flavour, _Apt([]), _Apt.kernel)


class _Apt:
    """apt-get as whoever runs this, with a configuration of its own if need be."""

    def __init__(self, options: list[str], suite: str = "") -> None:
        # As root it would download as a user who cannot write where we want it.
        self._options = ["-q", "-o", "APT::Sandbox::User=root", *options]
        self._suite = suite and f"/{suite}"

    def __call__(self, program: str, *words: str, cwd: Path | None = None) -> str:
        command = [program, *self._options, *words]
        done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise ImageError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def kernel(self) -> list[str]:
        """The package that the metapackage stands for at the moment, and since Debian 14 those it is made of."""
        told = self("apt-cache", "depends", f"linux-image-cloud-amd64{self._suite}")
        found = re.search(r"Depends: (linux-image-\d\S*)", told)
        if found is None:
            raise ImageError(f"apt knows no linux-image-cloud-amd64{self._suite}: this is no Debian?")
        told = self("apt-cache", "depends", f"{found[1]}{self._suite}")
        return [found[1], *re.findall(r"Depends: (linux-(?:binary|modules)-\d\S*)", told)]

    def download(self, packages: Sequence[str], directory: Path) -> list[Path]:
        self("apt-get", "download", *[f"{name}{self._suite}" for name in packages], cwd=directory)
        return sorted(directory.glob("*.deb"))


def _unpack(place: Path, apt: _Apt, packages: Callable[[_Apt], list[str]]) -> None:
    """Make `place` the tree of the packages that `packages` names, all or nothing."""
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:
        try:
            found = apt.download(packages(apt), Path(directory))
        except ImageError:  # the lists are old, or there are none yet
            apt("apt-get", "update")
            found = apt.download(packages(apt), Path(directory))
        tree = Path(directory) / "tree"
        for package in found:
            subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
        tree.chmod(0o755)
        tree.rename(place)


def _release() -> str:
    """This Debian's name."""
    found = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise ImageError("/etc/os-release tells no VERSION_CODENAME: backports are fetched on Debian only")
    return found[1]


def _backports(directory: Path) -> list[str]:
    """Words for an apt that has its lists, and its one source, below `directory`."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if not sources.exists():
        raise ImageError(f"{sources} is missing: it tells where Debian's packages are had")
    stanza = sources.read_text().strip().split("\n\n")[0]
    (directory / "lists" / "partial").mkdir(parents=True)
    own = directory / "own.sources"
    own.write_text(re.sub(r"(?m)^Suites:.*", f"Suites: {_release()}-backports", stanza) + "\n")
    settings = {
        "Dir::Etc::sourcelist": own,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": directory / "lists",
        "Dir::Cache": directory,
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


# What has been fetched


def find_kernel(flavour: str = "stable") -> Kernel:
    """The kernel that was fetched. Raises ImageError with the command that fetches it."""
    tree = cache() / flavour
    images = {path.name.removeprefix("vmlinuz-"): path for path in tree.glob("boot/vmlinuz-*")}
    images |= {path.parent.name: path for path in tree.glob("usr/lib/modules/*/vmlinuz")}  # since Debian 14
    if not images:
        asked = FETCH if flavour == "stable" else f"{FETCH} {flavour}"
        raise ImageError(f"there is no guest kernel in {tree}: `{asked}` fetches it")
    own = tree / "usr/bin/qemu-system-x86_64"
    data = [str(tree / "usr/share/qemu"), "/usr/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"]
    words = [str(own), *(word for place in data for word in ("-L", place))] if own.exists() else ["qemu-system-x86_64"]
    version, image = max(images.items())
    for place in ("lib", "usr/lib"):  # up to Debian 12, and since
        if (modules := tree / place / "modules" / version).is_dir():
            return Kernel(image, modules, tuple(words))
    raise ImageError(f"there are no modules of {version} in {tree}: remove it, and fetch the kernel again")


def release(flavour: str = "stable") -> tuple[int, ...]:
    """The first two numbers of the kernel that was fetched; (0, 0) if none was."""
    try:
        name = find_kernel(flavour).modules.name
    except ImageError:
        return (0, 0)
    return tuple(int(number) for number in name.split(".")[:2])


def find_busybox() -> Path:
    """The static busybox that was fetched. Raises ImageError with the command that fetches it."""
    for place in ("bin", "usr/bin"):  # up to Debian 12, and since
        if (path := cache() / "busybox" / place / "busybox").exists():
            return path
    raise ImageError(f"there is no busybox in {cache()}: `{FETCH}` fetches it")


def modules_in_order(directory: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """The `wanted` modules and those they depend on, by file name, each after what it needs.

    A kernel package that was only unpacked has no modules.dep: dependencies are read from the modules themselves.
    """
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in directory.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in files and f"{name}.ko" not in found:
            data = files[name].read_bytes()
            if files[name].suffix == ".xz":
                data = lzma.decompress(data)
            told = re.search(rb"\0depends=([^\0]*)\0", data)
            for needed in told[1].decode().split(",") if told else []:
                add(needed.replace("-", "_"))
            found[f"{name}.ko"] = data

    for name in wanted:
        add(name)
    return found


# What is made of this machine's files


class Cpio:
    """Writes the "newc" archive that the kernel unpacks into its first root (kernel: early-userspace/buffer-format)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """Add one entry and the directories above it; of two of one name the first wins. mode: as st_mode."""
        name = name.strip("/")
        if name and name not in self._names:
            self.add(os.path.dirname(name), stat.S_IFDIR | 0o755)
            self._entry(name, mode, data)

    def _entry(self, name: str, mode: int, data: bytes = b"") -> None:
        self._names.add(name)
        raw = os.fsencode(name) + b"\0"
        fields = (len(self._names), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def add_path(self, path: Path, name: str) -> None:
        """Add a file, a symbolic link, or a directory with everything in it, under another name."""
        status = path.lstat()
        if path.is_symlink():
            self.add(name, status.st_mode, os.fsencode(os.readlink(path)))
        elif path.is_dir():
            self.add(name, status.st_mode)
            for below in sorted(path.iterdir()):
                self.add_path(below, f"{name}/{below.name}")
        else:
            self.add(name, status.st_mode, path.read_bytes())

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)


@functools.cache
def _applets() -> list[str]:
    told = subprocess.run([find_busybox(), "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return told.stdout.split()


def initramfs(kernel: Kernel, init: str, modules: Sequence[str], put: Iterable[tuple[Path, str]]) -> bytes:
    """The first root of a guest: busybox, modules in /rig/modules, this package in /fusewire, and files that are `put`.

    /usr is empty: the disk of `userland` is mounted there, and /lib and /lib64 lead into it.
    """
    cpio = Cpio()
    for name in ("dev", "proc", "sys", "tmp", "run", "mnt", "oracle", "root", "usr"):
        cpio.add(name, stat.S_IFDIR | (0o1777 if name == "tmp" else 0o755))
    for name in ("lib", "lib64"):
        cpio.add(name, stat.S_IFLNK | 0o777, f"usr/{name}".encode())
    cpio.add("init", stat.S_IFREG | 0o755, init.encode())
    cpio.add("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    cpio.add("etc/group", stat.S_IFREG | 0o644, b"root:x:0:\nnogroup:x:65534:\n")
    for host, guest in put:
        cpio.add_path(host, guest)
    cpio.add("bin/busybox", stat.S_IFREG | 0o755, find_busybox().read_bytes())
    for applet in _applets():
        cpio.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for number, (name, data) in enumerate(modules_in_order(kernel.modules, modules).items()):
        cpio.add(f"rig/modules/{number:02}-{name}", stat.S_IFREG | 0o644, data)
    for name, data in compiled_package().items():
        cpio.add(f"fusewire/{name}", stat.S_IFREG | 0o644, data)
    return cpio.finish()


@functools.cache
def compiled_package() -> dict[str, bytes]:
    """This package's files by name, compiled for the guests' Python, which an emulated machine does slowly."""
    with tempfile.TemporaryDirectory(prefix="fusewire-vm-") as directory:
        copy = shutil.copytree(
            PACKAGE, Path(directory) / "fusewire", ignore=shutil.ignore_patterns("__pycache__", "data")
        )
        # The initramfs keeps no times to compare.
        _compile(copy, "--invalidation-mode", "unchecked-hash")
        return {
            str(path.relative_to(directory)): path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()
        }


def _compile(directory: Path, *options: str) -> None:
    """Compile what can be; what is not Python fails where it is imported."""
    command = [PYTHON, "-I", "-m", "compileall", "-q", *options, str(directory)]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class _Interpreter(NamedTuple):
    version: tuple[int, ...]
    program: Path
    library: Path
    extensions: list[str]


@functools.cache
def _interpreter() -> _Interpreter:
    """The Python that guests get. Raises ImageError if this machine has none that will do."""
    if not os.path.exists(PYTHON):
        raise ImageError(f"{PYTHON} is missing (Debian package python3): guests run a copy of it")
    told = subprocess.run([PYTHON, "-I", "-c", SYSTEM], capture_output=True, text=True, check=True)
    version, program, library, extensions = json.loads(told.stdout)
    if version < [3, 11]:
        raise ImageError(f"{PYTHON} is of version {'.'.join(map(str, version))}: guests run a copy of it, from 3.11 on")
    if not library.startswith("/usr/"):
        raise ImageError(f"{PYTHON} has its library in {library}: guests look for it below /usr")
    return _Interpreter(tuple(version), Path(program).resolve(), Path(library), extensions)


def userland(programs: Sequence[str | os.PathLike[str]] = ()) -> Path:
    """The image of an ext4 filesystem with a guest's /usr: Python, its library, and `programs` (paths) in /usr/bin.

    It is kept for as long as none of the files that it is made of changes. PROGRAMS are always there.
    """
    python = _interpreter()
    files = {f"bin/{python.program.name}": python.program, "bin/python3": python.program}
    files |= {f"bin/{os.path.basename(program)}": Path(program) for program in (*PROGRAMS, *programs)}
    for name in _libraries([*map(str, files.values()), *python.extensions]):
        files[name.removeprefix("/usr").lstrip("/")] = Path(name)
    below_usr = str(python.library.relative_to("/usr"))
    files |= {f"{below_usr}/{name}": python.library / name for name in _library_files(python.library)}

    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name, path in files.items():
        status = path.stat()
        digest.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    image = cache() / f"userland-{digest.hexdigest()[:16]}.ext4"
    if image.exists():
        os.utime(image)
    else:
        for old in cache().glob("userland-*"):
            if old.stat().st_mtime < time.time() - WEEK:
                old.unlink(missing_ok=True)
        with _scratch(image) as scratch:
            tree = scratch / "tree"
            for name, path in files.items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, tree / name)
            (tree / "bin/env").symlink_to("/bin/busybox")
            _compile(tree / below_usr)
            size = sum(path.stat().st_size + 4096 for path in tree.rglob("*") if not path.is_symlink())
            blank_ext4(scratch / "image", size * 5 // 4 + (8 << 20), "-d", str(tree), "-O", "^has_journal", "-m", "0")
            (scratch / "image").rename(image)
    return image


@contextmanager
def _scratch(image: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="making-") as directory:
        yield Path(directory)


def _libraries(files: Iterable[str]) -> list[str]:
    """The loader and the shared libraries that these ELF files need, by the paths that they look for them at."""
    told = subprocess.run(["ldd", *files], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return sorted(set(re.findall(r"(?:=> |^\s*)(/\S+) \(0x", told.stdout, re.MULTILINE)))


def _library_files(library: Path) -> Iterator[str]:
    for directory, below, names in os.walk(library):
        below[:] = sorted(name for name in below if name not in UNWANTED and not name.startswith("config-"))
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file():  # links that lead nowhere are none
                yield str(path.relative_to(library))


def blank_ext4(path: Path, size: int, *options: str) -> Path:
    """Make a file of `size` bytes, of which few are allocated, that holds an ext4 filesystem."""
    program = find_program("mkfs.ext4")
    if program is None:
        raise ImageError("mkfs.ext4 is not installed (Debian package e2fsprogs)")
    with path.open("wb") as file:
        file.truncate(size)
    command = [program, "-q", "-F", "-E", "root_owner=0:0,lazy_itable_init=1", *options, str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"{' '.join(command)}: {done.stderr}")
    return path


def main(arguments: Sequence[str]) -> int:
    """Fetch what guests are made of; gives the exit status."""
    parser = argparse.ArgumentParser(description="What the guests of the tests are made of.")
    parser.add_argument("--fetch", nargs="?", const="stable", choices=("stable", "backports"), required=True)
    try:
        fetch(parser.parse_args(arguments).fetch)
    except (ImageError, OSError, subprocess.SubprocessError) as error:
        print(f"what the guests of the tests need could not be fetched: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
