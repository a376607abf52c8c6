"""A real mount of any filesystem for the conformance list: one process mounts, one serves, one runs the behaviours.

    with Mounted("from fusewire.fs.memory import MemoryFS; operations = MemoryFS()") as mounted:
        mounted.check("rename_replaces_a_file")

The three live in a mount namespace of their own, which an unprivileged user has within a user namespace of his; what
runs the behaviours has no capabilities there. They end together, so that nothing can be left behind.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from typing import Any, Self

import pytest

import e2e
from fusewire.testing.conformance import BEHAVIOURS
from rootless import NOBODY, rootless_home, rootless_python

PATIENCE = 60.0  # seconds for one behaviour; none takes longer than three

# What the first process runs, with its orders as JSON in argv[1].
PROGRAM = """
import json, os, subprocess, sys
from fusewire.linux import mount_base, syscalls, userns
given = json.loads(sys.argv[1])
place = given["mount"].encode()
userns.enter(userns.default_plan())
if given["tmpfs"]:
    syscalls.mount(b"tmpfs", given["oracle"].encode(), b"tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, b"mode=755")
fd = mount_base.open_device()
options = mount_base.Options(allow_other=True, default_permissions=True)
mount_base.mount_by_string(fd, place, options)

def die_with_the_parent():
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)

reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        os.close(reader)
        die_with_the_parent()
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.umask(0)
        from fusewire.serve import Server
        def log(message, error):
            import traceback
            print(message, "".join(traceback.format_exception(error)) if error else "", file=sys.stderr, flush=True)
        space = {}
        exec(given["make"], space)
        server = Server(space["operations"], fd, threads=given["threads"], log=log)
        server.start()
        if server.wait_ready(20):
            os.write(writer, b"+")
            server.wait()
            status = 0
        else:
            print("no INIT:", server.session.refused, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
os.close(writer)
os.close(fd)
ready = os.read(reader, 1) == b"+"
if ready:
    words = [sys.executable, "-W", "error", "-m", "fusewire.testing", "--answer"]
    subprocess.run([*words, given["mount"], given["oracle"]], preexec_fn=die_with_the_parent)
syscalls.umount2(place, 0 if ready else syscalls.MNT_DETACH)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class Answering:
    """A process that runs behaviours, one after another, as `check` names them."""

    def __init__(self, words: list[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, bufsize=1, cwd="/"
        )

    def check(self, name: str) -> None:
        """Run one behaviour in both places; pytest fails with what differs."""
        process = self._process
        assert process is not None, "the process is gone since an earlier behaviour"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(name, file=process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer is missing then
        answered, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if answered else ""
        if not line:
            why = "ended its process" if answered else f"hangs\n{e2e.described(process.pid)}"
            self._end(kill=True)
            pytest.fail(f"{name} {why}\n{self._said()}", pytrace=False)
        if wrong := json.loads(line):
            pytest.fail(wrong, pytrace=False)

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def _end(self, *, kill: bool) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        if kill:
            process.kill()
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return process.returncode

    def close(self) -> None:
        """End it; what was said on standard error fails the test."""
        try:
            status = self._end(kill=False)
            said = self._said()
        finally:
            self._errors.close()
        assert (status, said) == (0, "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Mounted(Answering):
    """A mount of what `make` leaves in `operations`. `{place}` in it is an empty directory that the server may use."""

    def __init__(self, make: str, *, uid: int = 0, tmpfs: bool = True, threads: int = 4) -> None:
        if uid == 0 and os.geteuid() != 0:
            pytest.skip("mounting by the direct way needs root")
        if not os.path.exists("/dev/fuse"):
            pytest.skip("/dev/fuse is missing")
        words = rootless_python(uid) if uid else [sys.executable, "-W", "error"]
        self.base = tempfile.mkdtemp(prefix="fusewire-conformance-", dir=rootless_home(uid) if uid else "/tmp")
        os.chmod(self.base, 0o755)
        orders: dict[str, Any] = {"tmpfs": tmpfs, "threads": threads}
        for name in ("mount", "oracle", "served"):
            place = orders[name] = os.path.join(self.base, name)
            os.mkdir(place, 0o755)
            if uid and os.geteuid() == 0:  # else the server is of the same user
                os.chown(place, uid, uid)
        orders["make"] = make.replace("{place}", orders["served"])
        super().__init__([*words, "-c", PROGRAM, json.dumps(orders)])

    def close(self) -> None:
        """Unmount and remove everything; what the server had to complain of fails the test."""
        try:
            super().close()
        finally:
            shutil.rmtree(self.base)


def cases(*without: str, marked: str = "", fails: dict[str, str] | None = None) -> list[Any]:
    """The behaviours as parameters: without those of the marks `without`, or only those `marked` so.

    `fails`: those that are known to fail, and the reasons.
    """
    fails = fails or {}
    assert not set(fails) - set(BEHAVIOURS)
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=fails[name], strict=True)) if name in fails else name
        for name, behaviour in BEHAVIOURS.items()
        if not behaviour.marks & set(without) and (not marked or marked in behaviour.marks)
    ]


__all__ = ["NOBODY", "Answering", "Mounted", "cases"]
