"""Our own overlay under threads: one moves, makes and removes a few names, the others use what they have found.

They call the overlay itself, for the kernel asks once more by itself when it is answered ESTALE, and hides it. Few
descriptors are kept, so that most nodes are known by their names only.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusewire.fs.passthrough import open_directory
from fusewire.wire.codec import ENTRY_OUT
from overlay_driver import build
from test_overlay import ME, Client

STEPS = int(os.environ.get("FUSEWIRE_RANDOM_STEPS", "250")) * 40
NAMES = (b"a", b"b", b"c")
# What a name that comes and goes can be answered with; what is held is there until it is given back.
NAMED = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL, errno.EBUSY, errno.EPERM),
}
HELD = {errno.ENOENT, errno.EINVAL, errno.EISDIR}  # a removed directory has nothing in it; not a symlink; a directory


@pytest.fixture
def hurried() -> Iterator[None]:
    """Have threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class User:
    """A thread's view: it looks names up, holds what it finds, and gives it back."""

    may_fail = False  # errors of every kind are expected

    def __init__(self, client: Client, seed: int) -> None:
        self.overlay = client.overlay
        self.random = random.Random(seed)
        self.held = [1]
        self.wrong: list[str] = []

    def directory(self) -> int:
        return self.random.choice(self.held)

    def name(self) -> bytes:
        return self.random.choice(NAMES)

    def hold(self, reply: Any) -> None:
        if reply is not None and (nodeid := ENTRY_OUT.unpack(reply)[0]):
            self.held.append(nodeid)

    def drop(self) -> None:
        if len(self.held) > 8:
            self.overlay.forget(self.held.pop(self.random.randrange(1, len(self.held))), 1)

    def end(self) -> None:
        for nodeid in self.held[1:]:
            self.overlay.forget(nodeid, 1)

    def use(self, nodeid: int) -> None:
        """Open and read, or list."""
        overlay = self.overlay
        if stat.S_ISDIR(overlay._nodes.get(nodeid).kind):
            fh = overlay.opendir(ME, nodeid, 0, 0)[0]
            try:
                overlay.readdir(nodeid, fh, 0, 4096, 0, 0, 0)
            finally:
                overlay.releasedir(nodeid, fh, 0, 0, 0)
        elif stat.S_ISREG(overlay._nodes.get(nodeid).kind):
            fh = overlay.open(ME, nodeid, self.random.choice((os.O_RDONLY, os.O_RDONLY, os.O_RDWR)), 0)[0]
            try:
                for _ in range(3):
                    overlay.read(nodeid, fh, 0, 100, 0, 0, 0)
            finally:
                overlay.release(nodeid, fh, 0, 0, 0)

    def step(self) -> None:
        overlay, nodeid = self.overlay, self.directory()
        calls: list[tuple[set[int], Callable[[], Any]]] = [
            (NAMED, lambda: self.hold(overlay.lookup(ME, nodeid, self.name()))),
            (NAMED, lambda: self.hold(overlay.lookup(ME, nodeid, self.name()))),
            (HELD, lambda: overlay.getattr(nodeid, 0, 0)),
            (HELD, lambda: overlay.listxattr(ME, nodeid)),
            (HELD, lambda: overlay.readlink(nodeid)),
            (HELD, lambda: self.use(nodeid)),
        ]
        self.attempt(*self.random.choice(calls))
        self.drop()

    def attempt(self, allowed: set[int], call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in allowed and not self.may_fail:
                self.wrong.append(repr(error))

    def move(self) -> None:
        """Make one change of names; the kernel lets one after another into a directory, and so does this one thread."""
        overlay, parent, other, name, newname = (
            self.overlay,
            self.directory(),
            self.directory(),
            self.name(),
            self.name(),
        )
        if not self.goes(parent, other):
            return
        flags = self.random.choice((0, 0, 1, 2))
        calls: list[Callable[[], Any]] = [
            lambda: overlay.rename(ME, parent, name, other, newname, flags),
            lambda: overlay.rename(ME, parent, name, other, newname, flags),
            lambda: overlay.unlink(ME, parent, name),
            lambda: overlay.rmdir(ME, parent, name),
            lambda: self.hold(overlay.mkdir(ME, parent, name, 0o755, 0)),
            lambda: self.hold(overlay.symlink(ME, parent, name, b"a")),
            lambda: self.hold(overlay.mknod(ME, parent, name, stat.S_IFREG | 0o644, 0, 0)),
            lambda: self.hold(overlay.link(ME, self.directory(), parent, newname)),
        ]
        self.attempt(NAMED, lambda: self.hold(overlay.lookup(ME, parent, name)))
        self.attempt(NAMED, self.random.choice(calls))
        self.drop()

    def goes(self, parent: int, other: int) -> bool:
        """Tell whether the kernel would ask: two directories, neither removed."""
        nodes = [self.overlay._nodes.get(nodeid) for nodeid in (parent, other)]
        return all(stat.S_ISDIR(node.kind) for node in nodes)


class Outsider:
    """Moves, makes and removes names in the lower directory, with which nobody should meddle."""

    def __init__(self, lower: Path, seed: int) -> None:
        self.lower = lower
        self.random = random.Random(seed)

    def step(self) -> None:
        path, other = (
            "/".join(self.random.choice("abcde") for _ in range(self.random.choice((1, 2, 3)))) for _ in "12"
        )
        at, to = self.lower / path, self.lower / other
        calls: list[Callable[[], Any]] = [
            lambda: at.rename(to),
            at.mkdir,
            at.rmdir,
            at.unlink,
            lambda: at.symlink_to("nowhere"),
            lambda: self.write(at),
            lambda: os.truncate(at, 3),
            lambda: os.mkfifo(at),
        ]
        try:
            self.random.choice(calls)()
        except OSError:
            pass

    def write(self, path: Path) -> None:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            os.write(fd, b"x" * self.random.choice((0, 10, 50_000)))
        finally:
            os.close(fd)


def test_lower_directory_that_changes_costs_no_more_than_errors(tmp_path: Path, hurried: None) -> None:
    (tmp_path / "lower").mkdir()
    build(os.fspath(tmp_path / "lower"), random.Random(6))
    client = Client(open_directory(os.fspath(tmp_path / "lower")), tmp_path, durable=False)
    users = [User(client, seed) for seed in range(2)]
    users[0].may_fail = users[1].may_fail = True
    outsider = Outsider(tmp_path / "lower", 7)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            users[1].step()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(STEPS // 8):
            users[0].move()
            outsider.step()
    finally:
        done.set()
        thread.join(30)
    for user in users:
        user.end()
    assert not thread.is_alive()
    client.end()


@pytest.mark.parametrize("by_name", [False, True], ids=["devices", "names"])
def test_what_is_held_can_be_used_while_names_change(tmp_path: Path, hurried: None, by_name: bool) -> None:
    (tmp_path / "lower").mkdir()
    build(os.fspath(tmp_path / "lower"), random.Random(5))
    client = Client(open_directory(os.fspath(tmp_path / "lower")), tmp_path, durable=False)
    if by_name:
        client.overlay._marks.devices, client.overlay._marks.opaque = False, ()
    client.overlay._upper.nodes._budget = 16
    users = [User(client, seed) for seed in range(3)]
    done = threading.Event()

    def look(user: User) -> None:
        while not done.is_set():
            user.step()

    threads = [threading.Thread(target=look, args=(user,)) for user in users[1:]]
    for thread in threads:
        thread.start()
    try:
        for _ in range(STEPS):
            users[0].move()
    finally:
        done.set()
        for thread in threads:
            thread.join(30)
    for user in users:
        user.end()
    assert [user.wrong for user in users] == [[], [], []]
    client.end()
