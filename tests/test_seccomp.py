"""Seccomp filters that refuse some of the calls that mounting needs: what has another way goes it, the rest says so."""

from __future__ import annotations

import errno
import json
import os
import platform
from pathlib import Path

import pytest

from e2e import USER, World, ends

HELLO = "hello world\n"
# <asm/unistd.h>; those of 2019 and later are the same everywhere.
OLD = {"x86_64": {"mount": 165, "umount2": 166}, "aarch64": {"mount": 40, "umount2": 39}}
NEW = {"move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442}

pytestmark = pytest.mark.skipif(platform.machine() not in OLD, reason="the numbers of mount and umount2 are not known")

# <linux/seccomp.h>, <linux/filter.h>: load the number of the call, answer with an errno where it is one of those.
FILTER = """
import ctypes, os, struct, sys
action, *numbers = map(int, sys.argv[1].split(","))
program = [struct.pack("HBBI", 0x20, 0, 0, 0)]
for number in numbers:
    program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, action)]
program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
raw = ctypes.create_string_buffer(b"".join(program))
head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(raw)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.addressof(head), 0, 0) == 0, ctypes.get_errno()
os.execvp(sys.argv[2], sys.argv[2:])
"""


def refuse(world: World, number: int, *calls: str, uid: int = USER) -> list[str]:
    """Words that start a program for which these calls give that errno."""
    known = OLD[platform.machine()] | NEW
    action = ",".join(str(word) for word in (0x00050000 | number, *(known[call] for call in calls)))
    return [*world.words(uid)[1], "-c", FILTER, action]


@pytest.fixture(params=[errno.EPERM, errno.ENOSYS], ids=["EPERM", "ENOSYS"])
def number(request: pytest.FixtureRequest) -> int:
    """What the filter answers: engines differ in that."""
    return int(request.param)


@pytest.mark.parametrize("calls", [["fsopen"], ["fsconfig"], ["fsmount"], ["move_mount"], ["mount"]], ids="-".join)
def test_mount_goes_the_way_that_is_open(world: World, small: Path, number: int, calls: list[str]) -> None:
    with world.mounted(small, "env", wrap=refuse(world, number, *calls)) as found:
        assert found["strategy"] == "namespace"
        assert world.do("cat", "env/hello.txt").stdout == HELLO
        assert world.fw("exec", "env", "--", "cat", "env/hello.txt").stdout == HELLO
    assert os.listdir(world.home()) == []


@pytest.mark.parametrize("uid", [USER, 0], ids=["user", "root"])
def test_run_goes_the_way_that_is_open(world: World, small: Path, number: int, uid: int) -> None:
    wrap = refuse(world, number, "mount", uid=uid)
    words = ["run", "-o", "noexec", f"{small}:new/env", "--", "sh", "-c"]
    done = world.fw(*words, "cat new/env/hello.txt; grep new/env /proc/self/mountinfo", uid=uid, wrap=wrap)
    assert done.returncode == 0, done.stderr
    text, line = done.stdout.splitlines()
    assert text == HELLO.strip()
    for word in ("ro", "nosuid", "nodev", "noexec", "fuse.fusewire", f"user_id={uid}", *(["allow_other"] * (not uid))):
        assert word in line.replace(" ", ",").split(",")
    assert world.mounts() == []
    assert os.listdir(world.home(uid)) == []


def test_direct_mount_goes_the_way_that_is_open(world: World, small: Path, number: int) -> None:
    with world.mounted(small, "env", uid=0, wrap=refuse(world, number, "mount", uid=0)) as found:
        assert found["strategy"] == "direct"
        assert world.do("cat", "env/hello.txt", uid=0).stdout == HELLO


def test_unmounting_without_umount2_ends_the_server(world: World, small: Path, number: int) -> None:
    (world.home() / "env").mkdir()
    os.chown(world.home() / "env", USER, USER)
    wrap = refuse(world, number, "umount2")
    for options in ([], ["--lazy"]):
        found = world.mount(small, "env", wrap=wrap)
        assert world.do("cat", "env/hello.txt").stdout == HELLO
        done = world.fw("umount", *options, "env", wrap=wrap)
        assert (done.returncode, done.stderr) == (0, "")
        assert ends(found["pid"], 0.0)
        assert world.records() == []
        assert os.listdir(world.home()) == ["env"]
        assert not (world.home() / "env").is_symlink()


def test_unmounting_a_direct_mount_without_umount2_names_the_call_and_the_way_out(
    world: World, small: Path, number: int
) -> None:
    wrap = refuse(world, number, "umount2", uid=0)
    found = world.mount(small, "env", uid=0, wrap=wrap)
    done = world.fw("umount", "env", uid=0, wrap=wrap)
    assert done.returncode == 125
    assert "umount2(2) is refused: a seccomp filter forbids it" in done.stderr
    assert "outside of that sandbox" in done.stderr
    os.kill(found["pid"], 9)
    assert ends(found["pid"])
    assert world.fw("umount", "env", uid=0).returncode == 0
    assert os.listdir(world.home(0)) == []


def test_refusal_without_another_way_names_the_call_and_the_way_out(world: World, small: Path, number: int) -> None:
    both = refuse(world, number, "mount", "fsopen")
    for words in (["mount", "--strategy", "namespace", small, "env"], ["run", f"{small}:env", "--", "true"]):
        done = world.fw(*words, wrap=both)
        assert done.returncode == 125
        assert "mount(2) is refused: a seccomp filter forbids it" in done.stderr
        assert "start the container with" in done.stderr
        assert "Traceback" not in done.stderr
    done = world.fw("run", f"{small}:/opt/new", "--", "true", wrap=refuse(world, number, "mount"))
    assert done.returncode == 125
    assert "the mount point cannot be made, mount(2) is refused: a seccomp filter forbids it" in done.stderr
    assert "choose one that exists" in done.stderr
    done = world.fw(
        "run", f"{small}:env", "--", "true", uid=0, wrap=refuse(world, number, "mount", "mount_setattr", uid=0)
    )
    assert done.returncode == 125
    assert "cannot keep what will be mounted" in done.stderr
    assert "a seccomp filter forbids it" in done.stderr
    done = world.fw("run", "--pid", f"{small}:env", "--", "true", wrap=refuse(world, number, "mount"))
    assert done.returncode == 125
    assert "--pid: a new /proc cannot be mounted" in done.stderr
    assert os.listdir(world.home()) == []


def test_doctor_tries_in_spite_of_a_filter_that_can_be_got_around(world: World, number: int) -> None:
    done = world.fw("doctor", "--json", wrap=refuse(world, number, "umount2", "fsconfig"))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    row = next(row for row in found["checks"] if row["name"] == "seccomp")
    assert (row["verdict"], row["finding"]) == ("warning", "a filter forbids umount2")
    assert (found["mount"], found["run"]) == ("namespace", False)  # the trial of `run` has to unmount
