"""Archives on real mounts, as a user who may do nothing: what programs see is what tar and unzip unpack."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import served
from archive_trees import make_tree, run
from rootless import rootless_python

# What the unprivileged process runs: a mount in namespaces of its own, a server, and a comparison with a directory.
MAKE = """
from fusewire.fs.archive import open_archive
archive = os.open(given["archive"], os.O_RDONLY)
size = os.fstat(archive).st_size
filesystem = open_archive(archive, size, given["archive"], parse("squash_owner"), cache=given["cache"])
assert threading.active_count() == 1
"""
PROGRAM = (
    served.mounted(MAKE, flags="syscalls.MS_RDONLY")
    + r"""
problems = []
try:
    from fusewire.testing import READ_ONLY
    for name, check in READ_ONLY.items():
        try:
            check(place)
        except (AssertionError, OSError) as error:
            problems.append(f"{name}: {error}")

    def look(root):
        found = {}
        for directory, directories, files in os.walk(root):
            for name in directories + files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                data = ""
                if stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as file:
                        data = hashlib.file_digest(file, "sha256").hexdigest()
                elif stat.S_ISLNK(status.st_mode):
                    data = os.readlink(path)
                times = status.st_mtime_ns if not stat.S_ISLNK(status.st_mode) or not given["seconds"] else 0
                size = status.st_size if not stat.S_ISDIR(status.st_mode) else 0
                nlink = status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0
                attributes = {}
                if stat.S_ISREG(status.st_mode):
                    try:
                        attributes = {key: os.getxattr(path, key).hex() for key in os.listxattr(path)}
                    except OSError as error:
                        if error.errno != 95:  # EOPNOTSUPP: the archive has none
                            raise
                found[os.path.relpath(path, root)] = (status.st_mode, size, times, nlink, data, attributes)
        return found

    mine, theirs = look(place), look(given["wanted"])
    problems += [f"{path!r}: only in one" for path in set(mine) ^ set(theirs)]
    problems += [f"{path!r}: {mine[path]} {row}" for path, row in theirs.items() if path in mine and mine[path] != row]
    with open(place + "/d/text", "rb") as file:
        import mmap
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            with open(given["wanted"] + "/d/text", "rb") as other:
                if view[-10:] != other.read()[-10:]:
                    problems.append("mmap shows something else")
    script = "tar -C %s -cf - . | tar -tf - | wc -l" % place
    count = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    if int(count) != len(theirs) + 1:
        problems.append(f"tar finds {count} names")
finally:
    syscalls.umount2(place.encode(), 0 if sys.exc_info()[0] is None else syscalls.MNT_DETACH)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        problems.append("the server ended in an error")
print(json.dumps(problems))
"""
)

KINDS = {
    "plain": ("", "tar"),
    "gz": ("gzip -c", "tar"),
    "xz": ("xz -T2 --block-size=1MiB -c", "tar"),
    "bz2": ("bzip2 -c", "tar"),
    "zst": ("zstd -qc", "tar"),
    "zip": ("", "zip"),
}


@pytest.fixture(scope="module")
def places() -> Iterator[Path]:
    """A tree that everybody can read; a place of the unprivileged user's."""
    base = Path(tempfile.mkdtemp(prefix="fusewire-archives-", dir="/tmp"))
    base.chmod(0o755)
    root = make_tree(base / "tree", special=False)
    try:
        os.setxattr(root / "small", "user.greeting", b"\xff\x00 hello")
    except OSError:
        pass  # no such attributes here: the archive has none either
    yield base
    shutil.rmtree(base)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_see_what_would_be_unpacked(places: Path, kind: str) -> None:
    if kind == "zst":
        pytest.importorskip("backports.zstd", reason="backports.zstd is missing")
    if shutil.which("unzip") is None:
        pytest.skip("unzip is missing")
    squeeze, form = KINDS[kind]
    archive, wanted, cache = places / f"{kind}.archive", places / f"{kind}.wanted", places / f"{kind}.cache"
    wanted.mkdir()
    if form == "zip":
        run("sh", "-c", f"zip -qry - . > {archive}", cwd=places / "tree")
        run("unzip", "-qXK", "-d", wanted, archive)
    else:
        run("tar", "-C", places / "tree", "--format=posix", "-S", "--xattrs", "-cf", places / "t.tar", ".")
        run("sh", "-c", f"{squeeze or 'cat'} {places}/t.tar > {archive}")
        run("tar", "-C", wanted, "--xattrs", "--xattrs-include=*", "-xpf", places / "t.tar")
    mount = places / f"{kind}.mount"
    for directory in (cache, mount):
        directory.mkdir()
        if os.geteuid() == 0:
            os.chown(directory, 65534, 65534)
    given: dict[str, Any] = {
        "archive": str(archive),
        "wanted": str(wanted),
        "place": str(mount),
        "cache": str(cache),
        "seconds": form == "zip",  # unzip gives links no times
    }
    done = subprocess.run(
        [*rootless_python(), "-c", PROGRAM, json.dumps(given)], capture_output=True, text=True, timeout=100, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert done.stderr == ""
    assert len(list(cache.iterdir())) == 1
