"""URLs that are mounted in processes of their own, for tests as root and as a user who may do nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import served
from rootless import NOBODY, rootless_home, rootless_python

# What mounts a URL and serves it: in a namespace of its own, so that nothing can be left behind. Then the orders, each
# of them a line of Python that runs in a process beside the server and leaves its answer in `answer`.
MAKE = """
from fusewire.fs.remote import open_url, storage_options
options = parse(given["options"])
options = type("Options", (), {name: getattr(options, name) for name in dir(options) if name[0] != "_"})()
options.storage = given["storage"]
exec(given["prepare"])
filesystem = open_url(given["url"], options)
"""
PROGRAM = (
    served.mounted(MAKE)
    + r"""
print(json.dumps(place), flush=True)

def read_bytes(name):
    with open(os.path.join(place, name), "rb") as file:
        return file.read()

def read(name):
    return read_bytes(name).decode()

def write(name, data, mode="wb"):
    with open(os.path.join(place, name), mode) as file:
        file.write(data.encode())

space = {"place": place, "read_bytes": read_bytes, "read": read, "write": write, "os": os}
for line in sys.stdin:
    try:
        space["answer"] = None
        exec(json.loads(line), space)
        answer = [space["answer"], None]
    except BaseException as error:
        answer = [None, f"{type(error).__name__}: {error}"]
    print(json.dumps(answer), flush=True)
os.chdir("/")
syscalls.umount2(place.encode(), 0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
)


class Mount:
    """A URL that is mounted in processes of its own; `run` executes lines there and gives what they left in `answer`.

    In them, `place` is the mount point; `read(name)`, `read_bytes(name)` and `write(name, text)` do what they say.
    """

    def __init__(
        self,
        url: str,
        *,
        uid: int = NOBODY,
        storage: Any = None,
        options: str = "",
        prepare: str = "",
        warnings: str = "error",
        said: str = "",
    ):
        """`warnings`: what to do with them in there, for libraries that have some of their own. `said`: what the server
        complains of at the end, among other things."""
        self.said = said
        words = [*(rootless_python(uid) if uid else [sys.executable]), "-W", warnings]
        self.base = os.path.join(rootless_home(uid) if uid else "/tmp", f"fusewire-remote-{os.getpid()}")
        os.mkdir(self.base, 0o755)
        if uid and os.geteuid() == 0:
            os.chown(self.base, uid, uid)
        orders = {"url": url, "place": self.base, "storage": storage or {}, "options": options, "prepare": prepare}
        self.process = subprocess.Popen(
            [*words, "-c", PROGRAM, json.dumps(orders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        self.errors = ""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            self.close(failed=True)
            pytest.fail(self.errors, pytrace=False)

    def run(self, code: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(code), file=self.process.stdin, flush=True)
        answer, wrong = json.loads(self.process.stdout.readline())
        assert wrong is None, wrong
        return answer

    def close(self, *, failed: bool = False) -> None:
        try:
            _, self.errors = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, self.errors = self.process.communicate()
            failed = False
        os.rmdir(self.base)
        assert failed or self.process.returncode == 0
        assert failed or (self.said in self.errors if self.said else self.errors == "")


@contextmanager
def mounting() -> Iterator[Callable[..., Mount]]:
    """Give the maker of mounts that are ended afterwards."""
    mounts: list[Mount] = []

    def make(url: str, **options: Any) -> Mount:
        mounts.append(Mount(url, **options))
        return mounts[-1]

    yield make
    for one in mounts:
        one.close()
