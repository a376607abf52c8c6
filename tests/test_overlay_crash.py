"""An overlay whose server is killed between any two steps: its upper directory shows what was there before, or after.

Each change is made by an overlay that ends before its first, second, third ... call that changes something, in all ways
in which an upper filesystem may be short of something; an overlay that comes after it then has to find one of the two
states, and make the change as if nothing had been.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusewire.fs.passthrough import open_directory
from fusewire.linux import files
from fusewire.wire import abi
from test_overlay import Client

CALLS = ("mkdir", "mknod", "unlink", "rmdir", "rename", "symlink", "setxattr", "chmod", "utime", "ftruncate", "pwrite")
FILES_CALLS = ("renameat2", "linkat", "fchownat_empty", "utimensat")


def build(lower: Path) -> None:
    (lower / "dir" / "sub").mkdir(parents=True)
    (lower / "other").mkdir()
    (lower / "empty").mkdir()
    for name in ("file", "second", "dir/one", "dir/sub/two", "other/three"):
        (lower / name).write_bytes(name.encode())
    (lower / "dir" / "link").symlink_to("one")


def shown(client: Client, path: str = "") -> dict[str, Any]:
    """Give all that is to be seen below a path."""
    found: dict[str, Any] = {}
    for name in client.list(path):
        inner = f"{path}/{name}"
        mode = client.attr(inner)[9]
        if stat.S_ISDIR(mode):
            found[inner] = oct(mode)
            found |= shown(client, inner)
        else:
            data = client.get(inner) if stat.S_ISREG(mode) else client.overlay.readlink(client.node(inner))
            found[inner] = oct(mode), data
    return found


def make_change(client: Client, steps: list[tuple[Any, ...]]) -> None:
    for name, *arguments in steps:
        getattr(client, name)(*arguments)


class KilledError(BaseException):
    """The process is gone."""


class Killer:
    """Ends all that changes something, from the call on before which there were `left`.

    What is raised passes every `except OSError`, and whatever wants to clear up is refused too, as if the process were
    gone: only memory is lost, and what the calls before have left stays.
    """

    def __init__(self, patch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        for module, names in ((os, CALLS), (files, FILES_CALLS)):
            for name in names:
                patch.setattr(module, name, self._watched(getattr(module, name)))
        whole = os.open

        def opened(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self.count()
            return whole(path, flags, *arguments, **named)

        patch.setattr(os, "open", opened)

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self.count()
            return call(*arguments, **named)

        return watched

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError


def spare(kind: str, client: Client, patch: pytest.MonkeyPatch) -> None:
    """Take from an overlay what a kind of filesystem lacks."""
    if "bare" in kind:
        whole = files.renameat2

        def renameat2(*arguments: Any) -> None:
            if arguments[-1] & ~files.RENAME_NOREPLACE:
                raise OSError(errno.EINVAL, "not here")
            whole(*arguments)

        patch.setattr(files, "renameat2", renameat2)
    if "names" in kind:
        client.overlay._marks.devices, client.overlay._marks.opaque = False, ()


def change(lower: Path, place: Path, kind: str, steps: list[tuple[Any, ...]], left: int | None = None) -> bool:
    """Make a change; with `left` by an overlay that is killed after so many calls. Tell whether it came to its end."""
    client = Client(open_directory(os.fspath(lower)), place, durable=False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            spare(kind, client, patch)
            if left is not None:
                Killer(patch, left)
            make_change(client, steps)
    except KilledError:
        return False
    finally:
        client.overlay.destroy()
    return True


def seen(lower: Path, place: Path) -> dict[str, Any]:
    client = Client(open_directory(os.fspath(lower)), place)
    try:
        return shown(client)
    finally:
        client.end()


EMPTIED = [("unlink", "dir/one"), ("unlink", "dir/link"), ("unlink", "dir/sub/two"), ("rmdir", "dir/sub")]
REMOVED = [*EMPTIED, ("rmdir", "dir")]
# What is there before, and the change.
CHANGES: dict[str, tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "unlink": ([], [("unlink", "file")]),
    "unlink_copy": ([("put", "file", b"new")], [("unlink", "file")]),
    "copy_up": ([], [("set", "dir/sub/two", abi.FATTR_MODE)]),
    "create": ([("unlink", "file")], [("make", "file")]),
    "mkdir": (REMOVED, [("mkdir", "dir")]),
    "mkdir_over_file": ([("unlink", "file")], [("mkdir", "file")]),
    "rmdir": ([], [("rmdir", "empty")]),
    "rmdir_merged": (EMPTIED, [("rmdir", "dir")]),
    "rmdir_made_again": ([*REMOVED, ("mkdir", "dir")], [("rmdir", "dir")]),
    "move_file": ([], [("rename", "file", "dir/sub/new")]),
    "move_over_file": ([], [("rename", "file", "second")]),
    "move_over_removed": ([("unlink", "file")], [("rename", "second", "file")]),
    "move_new_over_removed": ([("unlink", "file"), ("make", "new")], [("rename", "new", "file")]),
    "move_directory": ([], [("rename", "dir", "moved")]),
    "move_directory_over_removed": (REMOVED, [("rename", "other", "dir")]),
    "move_new_directory_over_removed": ([*REMOVED, ("mkdir", "new")], [("rename", "new", "dir")]),
    "move_directory_over_removed_file": ([("unlink", "file")], [("rename", "other", "file")]),
    "move_directory_over_emptied": (EMPTIED, [("rename", "other", "dir")]),
    "move_directory_over_empty": ([], [("rename", "other", "empty")]),
    "move_directory_back": ([("rename", "dir", "moved")], [("rename", "moved", "dir")]),
    "exchange_directories": ([], [("rename", "other", "empty", 2)]),
    "exchange_files": ([], [("rename", "file", "dir/one", 2)]),
}
BARE = {"exchange_directories", "exchange_files"}  # what cannot be had without RENAME_EXCHANGE


@pytest.mark.parametrize("kind", ["whole", "bare", "names", "bare names"])
@pytest.mark.parametrize("name", CHANGES)
def test_killed_server_leaves_what_was_there_before_or_after(tmp_path: Path, name: str, kind: str) -> None:
    if "bare" in kind and name in BARE:
        pytest.skip("two names cannot be exchanged without RENAME_EXCHANGE")
    setup, steps = CHANGES[name]
    lower, start = tmp_path / "lower", tmp_path / "start"
    build(lower)
    assert change(lower, start, kind, setup)
    before = seen(lower, start)
    places: list[Path] = []
    ended = False
    while not ended:
        places.append(tmp_path / f"after-{len(places)}")
        copy_with_marks(start, places[-1])
        ended = change(lower, places[-1], kind, steps, len(places) - 1)
    after = seen(lower, places.pop())
    assert after != before
    assert places
    for place in places:
        found = seen(lower, place)
        assert found in (before, after), place.name
        if found == before:
            assert change(lower, place, kind, steps)
            assert seen(lower, place) == after, place.name


def copy_with_marks(source: Path, target: Path) -> None:
    """Copy an upper directory with its devices and attributes."""
    target.mkdir()
    shutil.copystat(source, target)
    for name in os.listdir(source):
        one, other = source / name, target / name
        mode = one.lstat().st_mode
        if stat.S_ISDIR(mode):
            copy_with_marks(one, other)
        elif stat.S_ISCHR(mode):
            os.mknod(other, mode, 0)
        else:
            shutil.copy2(one, other, follow_symlinks=False)
