"""The conformance list on mounts whose server is in a sandbox: what a sandbox costs in function is shown here.

The server enters it with /dev/fuse open, then makes the filesystem from what `enter` gave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import conformance
from fusewire.linux import landlock

# The server's own waiting process takes the place of the one that conformance.py started.
MAKE = """
import os, stat, sys
from fusewire.linux import sandbox, sandbox_enter
from fusewire.fs.passthrough import Config, Passthrough
import fusewire.serve, fusewire.transport.devfuse, queue, threading, traceback, linecache, tokenize
import fusewire.fs.passthrough, fusewire.fs.passthrough.watch
open_now = []
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        if number > 2 and not stat.S_ISDIR(os.fstat(number).st_mode):
            open_now.append(number)
    except OSError:
        pass
plan = sandbox.plan(%r, shared=b'{place}', landlock=%r)
def let_go():
    for number in open_now:
        os.close(number)
try:
    entered = sandbox_enter.enter(plan, keep=open_now, waiting=let_go)
except sandbox_enter.ServerEnded as ended:
    os._exit(ended.code)
config = Config(posix_acl=True, proc=entered.proc, switch_ids=entered.switch_ids)
operations = Passthrough(os.dup(entered.root), config)
"""
_TRUSTED = "trusted and most security attributes take CAP_SYS_ADMIN on the host (--modcaps=+sys_admin)"
KNOWN = {
    "description_locks_and_record_locks_meet": "FUSE does not tell which locks are those of open files",
    "trusted_attributes_are_for_root": _TRUSTED,
    "trusted_attributes_are_hidden_from_others": _TRUSTED,
    "trusted_attributes_need_the_capability": _TRUSTED,
    "security_attributes_are_kept": _TRUSTED,
}


def _mounted(mode: str, rules: str) -> Iterator[conformance.Mounted]:
    if rules == "require" and landlock.abi() < landlock.MOVES_FILES:
        pytest.skip(landlock.missing() or "Landlock of ABI 1 only")
    if os.geteuid() != 0:
        pytest.skip("needs root, for the chroot and for every behaviour of the list")
    with conformance.Mounted(MAKE % (mode, rules), tmpfs=False) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def namespace() -> Iterator[conformance.Mounted]:
    yield from _mounted("namespace", "off")


@pytest.fixture(scope="module")
def chroot_and_landlock() -> Iterator[conformance.Mounted]:
    yield from _mounted("chroot", "require")


@pytest.mark.parametrize("name", conformance.cases(fails=KNOWN))
def test_server_in_namespaces_does_what_the_directory_does(namespace, name):
    namespace.check(name)


@pytest.mark.parametrize("name", conformance.cases(fails=KNOWN))
def test_server_in_a_chroot_with_landlock_does_what_the_directory_does(chroot_and_landlock, name):
    chroot_and_landlock.check(name)
