"""A tree to pack, an archive opened in this process, and what both show, in the same words."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusewire.cli.options import parse
from fusewire.fs.archive import Archive, open_archive
from fusewire.session import Session
from fusewire.testing import FakeKernel
from squashfs_images import noise, text

Seen = dict[str, tuple[Any, ...]]


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is missing")
    return found


def run(*words: str | os.PathLike[str], cwd: Path | None = None) -> None:
    done = subprocess.run([need(str(words[0])), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_tree(root: Path, *, special: bool = True) -> Path:
    """Files of all sizes and kinds; `special`: also names and nodes that not every format can hold."""
    root.mkdir()
    (root / "d" / "deep" / "er").mkdir(parents=True)
    (root / "empty directory").mkdir()
    (root / "empty").write_bytes(b"")
    (root / "small").write_bytes(b"hello\n")
    (root / "d" / "text").write_bytes(text(700_001))
    (root / "d" / "noise").write_bytes(noise(300_000))
    (root / "d" / ("long name " * 20)).write_bytes(b"long")
    deep = root / "d" / "deep" / "er" / ("x" * 120) / ("y" * 120)
    deep.mkdir(parents=True)
    (deep / "far").write_bytes(b"far")
    for number in range(50):
        (root / "d" / "deep" / f"n{number:02}").write_bytes(b"%d" % number)
    (root / "link").symlink_to("d/text")
    (root / "dangling").symlink_to("../" * 60 + "nowhere/" + "z" * 150)
    os.link(root / "small", root / "d" / "hard")
    os.link(root / "small", root / "hard2")
    with (root / "sparse").open("wb") as file:
        for offset in (1_000_000, 3_500_000):
            file.seek(offset)
            file.write(noise(70_000, offset))
        file.truncate(6_000_000)
    (root / "executable").write_bytes(b"#!/bin/sh\n")
    (root / "executable").chmod(0o4755)
    if special:
        (root / "späß\n€").write_bytes(b"name")
        with open(os.fsencode(root) + b"/not \xff utf-8", "wb") as file:
            file.write(b"bytes")
    if special and os.geteuid() == 0:
        os.mkfifo(root / "fifo", 0o600)
        os.mknod(root / "block", 0o060640, os.makedev(259, 70000))
        os.mknod(root / "null", 0o020666, os.makedev(1, 3))
        os.chown(root / "small", 1000, 3_000_000_000)
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(0, 1_500_000_000_123_456_789 + number * 1_000_000_007), follow_symlinks=False)
    os.utime(root, ns=(0, 1_400_000_000_000_000_001))
    return root


def on_disk(root: Path, *, xattrs: bool = True) -> Seen:
    """What a directory of the host shows."""
    found: Seen = {}
    for directory, directories, files in os.walk(os.fsencode(root)):
        for name in [b"", *directories, *files] if directory == os.fsencode(root) else [*directories, *files]:
            path = os.path.join(directory, name) if name else directory
            status = os.lstat(path)
            data: Any = None
            if stat.S_ISREG(status.st_mode):
                data = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                data = os.readlink(path)
            names = sorted(os.listxattr(path, follow_symlinks=False)) if xattrs else []
            key = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            found[key] = _row(
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
                0 if stat.S_ISDIR(status.st_mode) else status.st_nlink,
                status.st_rdev if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode) else 0,
                data,
                {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
            )
    return found


def _row(
    mode: int, uid: int, gid: int, size: int, mtime: int, nlink: int, rdev: int, data: Any, xattrs: Any
) -> tuple[Any, ...]:
    return (mode, uid, gid, 0 if stat.S_ISDIR(mode) else size, mtime, nlink, rdev, data, xattrs)


def served(kernel: FakeKernel) -> Seen:
    """What a mounted archive shows."""
    found: Seen = {}
    root, _ = kernel.getattr(1)
    for path, nodeid, attr in [(b".", 1, root), *((p, e.nodeid, e.attr) for p, e in kernel.walk())]:
        mode = attr[9]
        data: Any = None
        if stat.S_ISREG(mode):
            data = kernel.read_file(path)
        elif stat.S_ISLNK(mode):
            data = kernel.readlink(nodeid)
        try:
            names = sorted(os.fsdecode(name) for name in kernel.listxattr(nodeid))
        except OSError:
            names = []
        found[os.fsdecode(path)] = _row(
            mode,
            attr[11],
            attr[12],
            attr[1],
            _signed(attr[4]) * 1_000_000_000 + attr[7],
            0 if stat.S_ISDIR(mode) else attr[10],
            attr[13],
            data,
            {name: kernel.getxattr(nodeid, os.fsencode(name)) for name in names},
        )
    return found


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def same(got: Seen, wanted: Seen) -> None:
    """Compare; what differs is said without the data."""
    assert sorted(got) == sorted(wanted)
    for path, row in wanted.items():
        for name, mine, theirs in zip(
            ["mode", "uid", "gid", "size", "mtime", "nlink", "rdev", "data", "xattrs"], got[path], row, strict=True
        ):
            assert mine == theirs if name != "data" else mine == theirs or not "the same data", (path, name)


@contextmanager
def opened(path: Path | str, options: str = "", **how: Any) -> Iterator[tuple[Archive, FakeKernel]]:
    """An archive served in this process."""
    fd = os.open(path, os.O_RDONLY)
    try:
        filesystem = open_archive(fd, os.fstat(fd).st_size, os.path.basename(path), parse(options), **how)
    except BaseException:
        os.close(fd)
        raise
    kernel = FakeKernel(Session(filesystem))
    kernel.init()
    try:
        yield filesystem, kernel
    finally:
        kernel.destroy()


def refused(path: Path, match: str, **how: Any) -> OSError:
    """Opening it fails, and says so in words that begin with its name."""
    with pytest.raises(OSError, match=match) as failure, opened(path, **how):
        pass
    assert os.path.basename(path) in str(failure.value)
    return failure.value
