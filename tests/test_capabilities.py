"""Which capabilities are kept, what --modcaps makes of them, and that the others are gone from every set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fusewire.linux import capabilities as caps
from fusewire.linux import syscalls
from rootless import rootless_python

VIRTIOFSD = 0x880000DB  # what the C virtiofsd was seen with


def test_kept_set_is_that_of_virtiofsd() -> None:
    assert caps.KEPT == VIRTIOFSD
    assert caps.wanted((), caps.ALL) == VIRTIOFSD
    assert caps.wanted((), caps.ALL, handles=True) == VIRTIOFSD | 1 << syscalls.CAP_DAC_READ_SEARCH


def test_names_have_the_numbers_of_the_kernel() -> None:
    eight = ("chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap")
    assert tuple(caps.names(VIRTIOFSD)) == eight
    assert caps.number("sys_admin") == syscalls.CAP_SYS_ADMIN
    assert caps.number("CAP_SETFCAP") == syscalls.CAP_SETFCAP
    assert caps.NAMES[40] == "checkpoint_restore"
    assert caps.names(1 << 63) == ["63"]


def test_modcaps_adds_and_takes_away() -> None:
    changes = caps.parse_changes("+sys_admin:-CAP_CHOWN")
    assert changes == (("sys_admin", True), ("chown", False))
    assert caps.wanted(changes, caps.ALL) == VIRTIOFSD & ~1 | 1 << syscalls.CAP_SYS_ADMIN
    assert caps.wanted((("chown", False), ("chown", True)), caps.ALL) == VIRTIOFSD


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("+nothing", "'nothing' is no capability"),
        ("chown", "'chown' has neither + nor - before it"),
        ("", "'' has neither"),
        ("+chown:", "'' has neither"),
    ],
)
def test_modcaps_that_make_no_sense_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint.replace("+", r"\+")):
        caps.parse_changes(text)


def test_modcaps_cannot_add_what_is_not_permitted() -> None:
    with pytest.raises(ValueError, match="may not keep sys_admin"):
        caps.wanted((("sys_admin", True),), caps.KEPT)
    assert caps.wanted((("sys_admin", True), ("sys_admin", False)), caps.KEPT) == VIRTIOFSD


def test_what_is_kept_by_default_is_kept_as_far_as_it_is_there() -> None:
    assert caps.wanted((), 1 << syscalls.CAP_CHOWN) == 1 << syscalls.CAP_CHOWN
    assert caps.wanted((), 0) == 0


def test_file_handles_and_the_capability_that_they_take_go_together() -> None:
    with pytest.raises(ValueError, match="-dac_read_search drops what file handles take"):
        caps.wanted((("dac_read_search", False),), caps.ALL, handles=True)


SETS = """
from fusewire.linux import capabilities as caps, syscalls
import sys
def sets():
    return {line.split(":")[0]: int(line.split()[1], 16)
            for line in open("/proc/thread-self/status") if line.startswith("Cap")}
"""


def run(code: str, words: list[str]) -> str:
    done = subprocess.run([*words, "-c", SETS + code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have capabilities to lose")
def test_dropping_leaves_the_kept_ones_in_two_sets_and_none_in_the_others() -> None:
    out = run(
        """
full = syscalls.capget().permitted
syscalls.capset(full, full, 1)
syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, 0)
assert sets()["CapAmb"] == 1
print(caps.drop(3), sorted(sets().items()))
import threading
threading.Thread(target=lambda: print(sorted(sets().values()))).start()
""",
        [sys.executable],
    )
    lines = out.splitlines()
    assert lines[0] == "True [('CapAmb', 0), ('CapBnd', 0), ('CapEff', 3), ('CapInh', 0), ('CapPrm', 3)]"
    assert lines[1] == "[0, 0, 0, 3, 3]"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to have capabilities to lose")
def test_without_setpcap_the_bounding_set_stays_and_is_reported() -> None:
    out = run(
        "before = caps.bounding(); print(caps.drop(1), caps.bounding() == before, sets()['CapPrm'])",
        ["setpriv", "--bounding-set=-setpcap", sys.executable],
    )
    assert out == "False True 1"


def test_in_a_user_namespace_of_its_own_another_user_drops_them_too() -> None:
    out = run(
        """
from fusewire.linux import userns
userns.enter(userns.self_plan())
import os
assert os.geteuid() != 0 and syscalls.has_capability(syscalls.CAP_SYS_ADMIN)
print(caps.drop(0), set(sets().values()))
""",
        rootless_python(),
    )
    assert out == "True {0}"
