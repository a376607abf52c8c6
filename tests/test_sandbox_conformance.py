"""The conformance list on mounts whose server is in a sandbox and under a filter that kills: what these cost is here.

The server enters with /dev/fuse open, loads the filter as the last step, and makes the filesystem from what `enter`
gave it. A system call that is not on the filter's list ends it, and with it whatever of the list is left.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import conformance
from fusewire.linux import sandbox, seccomp_filter
from fusewire.testing.conformance import BEHAVIOURS

# The server's own waiting process takes the place of the one that conformance.py started.
MAKE = """
import os, stat, sys
from fusewire.linux import sandbox, sandbox_enter, seccomp_filter
from fusewire.fs.passthrough import Config, Passthrough
import fusewire.serve, fusewire.transport.devfuse
import fusewire.fs.passthrough.watch
mode, action = %r
open_now = []
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        if number > 2 and not stat.S_ISDIR(os.fstat(number).st_mode):
            open_now.append(number)
    except OSError:
        pass
plan = sandbox.plan(mode, shared=b'{place}')
seccomp_filter.program(action)  # libseccomp is loaded where it can be found
def let_go():
    for number in open_now:
        os.close(number)
try:
    entered = sandbox_enter.enter(
        plan, keep=open_now, waiting=let_go,
        imports=lambda: seccomp_filter.import_all("queue", "threading"),
        seccomp=lambda: seccomp_filter.load(action),
    )
except sandbox_enter.ServerEnded as ended:
    os._exit(ended.code)
config = Config(posix_acl=True, proc=entered.proc, switch_ids=entered.switch_ids)
operations = Passthrough(os.dup(entered.root), config)
"""
PATIENCE = 20.0
NETLINK_AUDIT, AUDIT_NLGRP_READLOG, AUDIT_SECCOMP = 9, 1, 1326  # <linux/netlink.h>, <linux/audit.h>
_TRUSTED = "trusted and most security attributes take CAP_SYS_ADMIN on the host (--modcaps=+sys_admin)"
KNOWN = {
    "description_locks_and_record_locks_meet": "FUSE does not tell which locks are those of open files",
    "trusted_attributes_are_for_root": _TRUSTED,
    "trusted_attributes_are_hidden_from_others": _TRUSTED,
    "trusted_attributes_need_the_capability": _TRUSTED,
    "security_attributes_are_kept": _TRUSTED,
}


class Boxed(conformance.Mounted):
    """A mount whose server is in a sandbox, with Landlock where there is one, and under a filter."""

    def __init__(self, mode: str, action: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root, for the chroot and for every behaviour of the list")
        try:
            seccomp_filter.program(action)
        except OSError as error:
            pytest.skip(str(error))
        super().__init__(MAKE % ((mode, action),), tmpfs=False)
        try:
            self.check("rename_replaces_a_file")  # it serves
            assert self._process is not None
            found = [pid for pid in below(self._process.pid) if filters(pid) > filters("self")]
            assert len(found) == 1
            self.server = found[0]
        except BaseException:
            self.close()
            raise


def below(pid: int) -> Iterator[int]:
    """The descendants of a process."""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        yield child
        yield from below(child)


def filters(pid: int | str) -> int:
    """How many filters a process is under; from Linux 5.9 on it is told, before only whether there are any."""
    found = re.findall(r"(?m)^Seccomp(?:_filters)?:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[-1])


class Records:
    """The kernel's records of system calls that filters have logged, as they come: audit's multicast group, netlink(7).

    No daemon is needed, and nothing is left out as it may be in the kernel's log. It takes CAP_AUDIT_READ.
    """

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT)
            self._socket.bind((0, AUDIT_NLGRP_READLOG))
        except OSError as error:
            pytest.skip(f"the kernel's audit records cannot be read here: {error}")
        self._socket.settimeout(PATIENCE)
        self._found: list[tuple[int, str]] = []
        try:
            self._read_on()
        except TimeoutError:
            self._socket.close()
            pytest.skip("the kernel does not tell what a filter logs (CONFIG_AUDIT, or kernel.seccomp.actions_logged)")

    def _read_on(self) -> None:
        """Take in everything up to now: up to what a process does that is started for this."""
        program = "import os; from fusewire.linux import seccomp_filter as f; f.load('log'); os.getpgid(0)"
        with subprocess.Popen([sys.executable, "-c", program]) as last:
            assert last.wait(PATIENCE) == 0
        while (last.pid, "getpgid") not in self._found:
            record = self._socket.recv(1 << 16)
            told = re.search(rb" pid=(\d+) .* syscall=(\d+) ", record[16:])  # behind a struct nlmsghdr
            if struct.unpack_from("=IH", record)[1] == AUDIT_SECCOMP and told is not None:
                self._found.append((int(told[1]), seccomp_filter.syscall_name(int(told[2]))))

    def of(self, pid: int) -> list[str]:
        """The calls of a process that have been logged."""
        self._read_on()
        return [name for number, name in self._found if number == pid]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module", params=sandbox.MODES)
def boxed(request: pytest.FixtureRequest) -> Iterator[Boxed]:
    with Boxed(request.param, "kill") as mounted:
        yield mounted


@pytest.mark.parametrize("name", conformance.cases(fails=KNOWN))
def test_server_in_a_sandbox_does_what_the_directory_does(boxed: Boxed, name: str) -> None:
    boxed.check(name)


@pytest.fixture
def records() -> Iterator[Records]:
    found = Records()
    yield found
    found.close()


@pytest.mark.slow
def test_nothing_is_logged_that_the_list_has_the_server_do(records: Records) -> None:
    """Not even what is refused by an error under `kill`, such as to load a library."""
    with Boxed("namespace", "log") as mounted:
        for name in BEHAVIOURS:
            if name not in KNOWN:
                mounted.check(name)
        assert records.of(mounted.server) == []
