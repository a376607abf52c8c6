"""The conformance list itself: two filesystems of the host agree on all of it, and it sees what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from conformance import Answering, cases
from fusewire.linux import syscalls
from fusewire.testing.conformance import BEHAVIOURS, compare, differences, transcript
from fusewire.testing.observe import Behaviour, in_child, outcome

ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """A directory of the disk and one of a tmpfs, or of the disk again where only root may mount."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("directory", "tmpfs"))
    for place in (first, *first.parents):
        if place.stat().st_uid == os.geteuid() and place.name.startswith("pytest-"):
            place.chmod(place.stat().st_mode | 0o055)  # behaviours switch to other users
    first.chmod(0o755)
    mounted = False
    if ROOT and syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
        syscalls.mount(b"tmpfs", os.fsencode(second), b"tmpfs", 0, b"mode=755")
        mounted = True
    try:
        yield str(first), str(second)
    finally:
        if mounted:
            syscalls.umount2(os.fsencode(second), 0)


@pytest.fixture(scope="module")
def host(places) -> Iterator[Answering]:
    """Runs the list on both, in a process of its own: it forks, and what it forks must not be this one."""
    with Answering([sys.executable, "-W", "error", "-m", "fusewire.testing", "--answer", *places]) as answering:
        yield answering


@pytest.mark.parametrize("name", cases() if ROOT else cases("root"))
def test_two_filesystems_of_the_host_agree(host, name):
    host.check(name)


def test_list_is_a_program_too(places):
    words = [sys.executable, "-W", "error", "-m", "fusewire.testing", *places]
    names = ["hard_links_are_one_file", "holes_are_read_as_zeros"]
    found = subprocess.run([*words, *names], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.splitlines() == [*(f"ok     {name}" for name in names), "0 of 2 failed"]


def test_difference_is_told_where_it_is():
    ours = {"a": [1, {"b": "x"}], "same": 1}
    theirs = {"a": [1, {"b": "y"}], "same": 1, "more": 2}
    assert differences(ours, ours) == []
    told = "\n".join(differences(ours, theirs))
    assert "[a][1][b]" in told
    assert "'x'" in told
    assert "[more]" in told
    assert "same" not in told
    assert differences([1], [1, 2]) != []
    assert differences(True, 1) != []


def test_comparison_fails_with_what_differs(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def looks_at_its_place(root: str) -> object:
        return os.path.basename(os.path.dirname(root))

    with pytest.raises(AssertionError, match="'one'") as caught:
        compare(Behaviour("looks", looks_at_its_place, frozenset()), str(tmp_path / "one"), str(tmp_path / "two"))
    assert "'two'" in str(caught.value)
    assert os.listdir(tmp_path / "one") == []


def test_error_under_test_is_a_difference_and_one_of_the_oracle_is_not(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def fails_in_one(root: str) -> object:
        if root.endswith("one/fails"):
            raise PermissionError(1, "not here")
        return 0

    behaviour = Behaviour("fails", fails_in_one, frozenset())
    with pytest.raises(AssertionError, match="not here"):
        compare(behaviour, str(tmp_path / "one"), str(tmp_path / "two"))
    with pytest.raises(PermissionError):
        compare(behaviour, str(tmp_path / "two"), str(tmp_path / "one"))


def test_descriptor_left_open_is_noticed(tmp_path):
    left = []

    def leaves(root: str) -> object:
        left.append(os.open(root, os.O_RDONLY))
        return 0

    with pytest.raises(AssertionError, match="descriptors"):
        transcript(Behaviour("leaves", leaves, frozenset()), str(tmp_path))
    os.close(left[0])


def test_child_tells_how_it_ended():
    assert in_child(lambda: 42) == 42
    assert in_child(os.stat, "/missing") == "ENOENT"
    assert in_child(lambda: os.kill(os.getpid(), 9)) == "SIGKILL"
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_child(lambda: 1 // 0)


def test_outcomes_are_plain_data(tmp_path):
    for value in (None, b"short", bytes(100), (1, [b"x"]), {"a": os.stat(tmp_path)}, True):
        json.dumps(outcome(lambda value=value: value))
    assert outcome(os.rmdir, "/missing") == "ENOENT"


def test_names_of_behaviours_are_names_of_directories():
    assert all(name.isidentifier() and len(name) < 100 for name in BEHAVIOURS)
