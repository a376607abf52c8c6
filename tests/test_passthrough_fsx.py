"""One file under everything that changes contents, on real mounts in each way of caching, against a model in memory.

`fsx.py` does the work, in a process of its own: a page fault that is not answered would end or stop the tests with it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import e2e
import fsx

OPERATIONS = int(os.environ.get("FUSEWIRE_FSX_OPERATIONS", "1500"))

OPTIONS = [
    "cache=none",
    "cache=none,passthrough=off",
    "cache=metadata,passthrough=off",
    "cache=auto",
    "cache=auto,passthrough=off",
    "cache=auto,writeback",
    "cache=always",
    "cache=always,passthrough=off",
    "cache=always,writeback",
    "cache=auto,no_allow_direct_io,passthrough=off",
    "cache=auto,max_write=8192,passthrough=off",
]


@pytest.fixture
def program(world: e2e.World) -> str:
    """The exerciser where every user can read it."""
    copy = shutil.copy(fsx.__file__, world.base)
    os.chmod(copy, 0o644)
    return str(copy)


def directories(world: e2e.World, uid: int) -> tuple[Path, Path]:
    """A directory to serve and one to mount on, of that user's."""
    found = world.home(uid) / "source", world.home(uid) / "target"
    for path in found:
        path.mkdir()
        os.chown(path, uid, uid)
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_a_file_stays_what_was_done_to_it(world: e2e.World, program: str, options: str) -> None:
    source, target = directories(world, 0)
    with world.mounted(source, target, "--strategy", "direct", "-o", options, uid=0):
        arguments = ["--directory", str(target), "--operations", str(OPERATIONS), "--seed", "20"]
        done = world.do(*world.words(0)[1], program, *arguments, uid=0)
        assert done.returncode == 0, done.stderr
        assert "as the model" in done.stdout
        for name in ("read", "map_write", "truncate_path", "copy_range", "direct_write", "punch_hole"):
            assert name not in done.stdout, "an operation was not offered"
    assert os.listdir(source) == []


@pytest.mark.parametrize("options", ["cache=none", "cache=auto", "cache=auto,writeback"])
def test_a_file_stays_what_was_done_to_it_without_root(world: e2e.World, program: str, options: str) -> None:
    source, target = directories(world, e2e.NOBODY)
    python = world.words(e2e.NOBODY)[1]
    arguments = ["--directory", str(target), "--operations", str(OPERATIONS), "--seed", "21"]
    done = world.fw("run", "-o", options, f"{source}:{target}", "--", *python, program, *arguments, uid=e2e.NOBODY)
    assert done.returncode == 0, done.stderr
    assert "as the model" in done.stdout
    assert os.listdir(source) == []


def test_the_exerciser_finds_a_byte_that_is_wrong(tmp_path: Path) -> None:
    one = fsx.Exerciser(str(tmp_path / "file"), 3)
    try:
        one.run(60)
        os.ftruncate(one.fd, max(len(one.model), 100))
        one.grow(100)
        one.check()
        os.pwrite(one.fd, bytes([one.model[50] ^ 1]), 50)
        with pytest.raises(fsx.Difference, match=r"first difference is at 50(?s:.*)in operation 60, after"):
            one.check()
    finally:
        one.close()


def test_a_seed_does_the_same_again(tmp_path: Path) -> None:
    logs = []
    for _ in range(2):
        one = fsx.Exerciser(str(tmp_path / "file"), 4)
        try:
            one.run(80)
            logs.append((list(one.log), bytes(one.model)))
        finally:
            one.close()
    assert logs[0] == logs[1]
