"""Our own overlay between threads, over what cannot be trusted, and in the directories of other overlays."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusewire.fs.passthrough import Passthrough, open_directory
from fusewire.fs.passthrough.nodes import Nodes
from fusewire.linux import files, overlay, syscalls
from fusewire.ops import Caller
from fusewire.wire import abi
from fusewire.wire.codec import DIRENT
from test_overlay import ME, Client, opaque

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts overlays as root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "lower"
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "file").write_bytes(b"old data")
    (tree / "other").write_bytes(b"other data")
    (tree / "dir" / "one").write_bytes(b"one")
    return tree


@pytest.fixture
def opened(tree: Path) -> Passthrough:
    return open_directory(os.fspath(tree))


class Meanwhile:
    """Runs a call in a thread of its own, which may wait for us; `result` gives what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._found: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._found.append(call())
        except OSError as error:
            self._found.append(error)

    def result(self) -> Any:
        self._thread.join(20)
        (found,) = self._found
        if isinstance(found, OSError):
            raise found
        return found


# Between threads


@pytest.mark.parametrize("what", ["getattr", "open", "list"])
def test_file_that_is_just_being_moved_is_found(
    opened: Passthrough, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    client = Client(opened, tmp_path)
    client.make("new", b"data")
    client.mkdir("made")
    path = "made" if what == "list" else "new"
    nodeid = client.node(path)
    calls: dict[str, Callable[[], Any]] = {
        "getattr": lambda: client.overlay.getattr(nodeid, 0, 0),
        "open": lambda: client.overlay.release(nodeid, client.overlay.open(ME, nodeid, os.O_RDONLY, 0)[0], 0, 0, 0),
        "list": lambda: client.overlay.fsyncdir(nodeid, 0, 0),
    }
    upper = client.overlay._upper
    upper.nodes.get(client.overlay._nodes.get(nodeid).upper).fd = None  # as when descriptors are short
    looked = threading.Event()
    moved: list[Meanwhile] = []
    rename = os.rename

    def tell(call: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            finally:
                looked.set()

        return telling

    def slow(*arguments: Any, **named: Any) -> None:
        rename(*arguments, **named)
        moved.append(Meanwhile(calls[what]))
        assert looked.wait(20)  # it has looked, while nobody knows the new name yet

    with monkeypatch.context() as patch:
        patch.setattr(Nodes, "_walk_to", tell(Nodes._walk_to))
        patch.setattr(Nodes, "_open_directory", tell(Nodes._open_directory))
        patch.setattr(os, "rename", slow)
        client.rename(path, "moved")
    moved[0].result()
    client.end()


def test_reader_goes_on_while_its_file_is_copied_up(opened: Passthrough, tmp_path: Path) -> None:
    client = Client(opened, tmp_path)
    handle = client.open("file")
    read = client.overlay._lower.read
    turns: list[int] = []

    def read_late(nodeid: int, fh: int, offset: int, size: int) -> Any:
        if not turns:
            turns.append(1)
            client.put("file", b"new")  # the file is copied up, and another reader changes over
            assert client.read(handle) == b"new data"
            other = client.open("other")
            try:
                return read(nodeid, fh, offset, size)
            finally:
                client.close(other)
        return read(nodeid, fh, offset, size)

    client.overlay._lower.read = read_late  # type: ignore[method-assign]
    assert client.read(handle) == b"old data"  # asked before the change, and answered with nothing of another file
    assert client.read(handle) == b"new data"
    client.close(handle)
    client.end()


def test_directory_that_comes_to_hide_the_lower_one_has_attributes_all_the_time(
    opened: Passthrough, tmp_path: Path
) -> None:
    client = Client(opened, tmp_path)
    node = client.overlay._nodes.get(client.node("dir"))
    attr = client.overlay._lower.attr
    turns: list[int] = []

    def attr_late(nodeid: int) -> Any:
        if not turns:
            turns.append(1)
            client.rename("dir", "moved")
        return attr(nodeid)

    client.overlay._lower.attr = attr_late  # type: ignore[method-assign]
    assert stat.S_ISDIR(client.overlay._attr(node)[9])
    client.end()


def test_directory_is_moved_while_what_is_in_it_is_removed(opened: Passthrough, tmp_path: Path) -> None:
    client = Client(opened, tmp_path)
    copy = client.overlay._copy_up

    def copy_late(node: Any, length: int | None = None) -> None:
        if node.name == b"sub" and node.parent is not None:
            client.rmdir("dir/sub")
        copy(node, length)

    client.overlay._copy_up = copy_late  # type: ignore[method-assign]
    client.rename("dir", "moved")
    assert client.list("moved").keys() == {"one"}
    client.end()


def test_tree_that_is_deeper_than_the_stack_can_be_moved(tmp_path: Path) -> None:
    depth, limit = 350, sys.getrecursionlimit()
    os.mkdir(tmp_path / "lower")
    at = os.open(tmp_path / "lower", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=at)
        at, before = os.open("d", os.O_RDONLY, dir_fd=at), at
        os.close(before)
    os.close(at)
    client = Client(open_directory(os.fspath(tmp_path / "lower")), tmp_path, durable=False)
    try:
        sys.setrecursionlimit(depth)
        client.rename("d", "moved")
        nodeid = client.node("moved")
        for _ in range(depth - 1):
            nodeid = client._count(client.overlay.lookup(ME, nodeid, b"d"))[0]  # type: ignore[arg-type]
        assert client.overlay.lookup(ME, nodeid, b"d") in (None, client.overlay._missing)
        client.end()
    finally:
        sys.setrecursionlimit(limit)
        subprocess.run(["rm", "-r", tmp_path / "lower", tmp_path / "upper"], check=True)


def test_what_fails_half_made_leaves_nothing_open(
    opened: Passthrough, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(opened, tmp_path)
    client.unlink("file")
    rename = os.rename

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "rename", full)
    for make in (client.make, client.mkdir):
        monkeypatch.setattr(files, "renameat2", full)
        with pytest.raises(OSError, match="no space"):
            make("file")
    monkeypatch.setattr(os, "rename", rename)
    assert len(client.overlay._upper.handles) == 0
    assert os.listdir(client.upper("")) == ["file"]
    client.end()


def test_holes_of_a_directorys_files_stay_holes(tree: Path, tmp_path: Path) -> None:
    with open(tree / "sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(16 << 20)
        file.write(b"data")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    client.set("sparse", abi.FATTR_MODE, mode=0o600)
    copy = client.upper("sparse")
    assert copy.stat().st_size == 64 << 20
    assert copy.stat().st_blocks * 512 < 1 << 20
    assert copy.read_bytes()[16 << 20 :][:4] == b"data"
    client.end()


# What cannot be trusted


def test_names_that_are_paths_are_none(opened: Passthrough, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"not yours")

    class Hostile(type(opened)):  # type: ignore[misc]
        def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
            return super().lookup(caller, parent, b"one" if b"/" in name else name)  # type: ignore[no-any-return]

        def readdir(self, nodeid: int, fh: int, offset: int, *rest: Any) -> bytes:
            if offset:
                return b""
            data = b""
            for number, name in enumerate((b"../../secret", b"a/b", b"", b"..", b"one", b"one"), 1):
                data += DIRENT.pack(1, number, len(name), 8) + name + bytes(-(24 + len(name)) % 8)
            return data

    opened.destroy()
    client = Client(Hostile(os.open(tree / "dir", os.O_PATH), opened.config), tmp_path)
    assert client.list().keys() == {"one"}
    client.overlay._copy_tree(client.overlay._nodes.root)
    assert os.listdir(client.upper("")) == ["one"]
    assert (tmp_path / "secret").read_bytes() == b"not yours"
    client.end()


def test_marks_of_the_lower_tree_are_not_seen(tree: Path, tmp_path: Path) -> None:
    for name in (".wh.file", ".wh..wh..opq", "dir/.wh.one", "dir/.wh..wh..opq"):
        (tree / name).touch()
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    assert client.list().keys() == {"dir", "file", "other"}
    assert client.list("dir").keys() == {"one", "sub"}
    assert not client.exists(".wh.file")
    client.unlink("dir/one")
    client.rmdir("dir/sub")
    client.rmdir("dir")
    client.mkdir("dir")
    assert client.list("dir") == {}
    client.end()


def test_lower_file_that_becomes_shorter_is_an_error_and_no_copy(tree: Path, tmp_path: Path) -> None:
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    whole = client.overlay._lower.open

    def open_late(nodeid: int, flags: int) -> int:
        os.truncate(tree / "file", 3)
        return whole(nodeid, flags)

    client.overlay._lower.open = open_late  # type: ignore[method-assign]
    with pytest.raises(OSError, match="ends before its size"):
        client.open("file", os.O_RDWR)
    assert os.listdir(client.upper("")) == []
    client.end()


def test_marks_are_made_beside_anything_that_has_their_names(tree: Path, tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    os.mkfifo(upper / ".wh.file")
    (upper / ".wh.other").symlink_to(tmp_path / "elsewhere")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    client.overlay._marks.devices, client.overlay._marks.opaque = False, ()
    assert client.list().keys() == {"dir"}
    for name in ("file", "other"):
        client.make(name)
        os.mkfifo(upper / f".wh.{name}") if name == "file" else (upper / ".wh.other").symlink_to(tmp_path / "elsewhere")
        client.overlay._nodes.root.hidden = None
        client.overlay._hide(client.overlay._nodes.root, name.encode())
        client.unlink(name)
        assert not client.exists(name)
    assert not (tmp_path / "elsewhere").exists()
    client.end()


def test_work_directory_keeps_what_no_overlay_of_ours_has_made(opened: Passthrough, tmp_path: Path) -> None:
    for name in ("thesis", ".wh..wh.tmp.1.1"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "file").touch()
    client = Client(opened, tmp_path)
    assert os.listdir(tmp_path / "work") == ["thesis"]
    shutil.rmtree(tmp_path / "work" / "thesis")
    client.end()


@pytest.mark.parametrize("name", ["upper", "work"])
def test_place_of_changes_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "changes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "changes" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError, match=f"has to be a directory.*{name}"):
        overlay.prepare(os.fsencode(tmp_path / "changes"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # what a person has named may be a link
    overlay.prepare(os.fsencode(tmp_path / "link"))


# Directories of other overlays


@pytest.mark.parametrize("attribute", ["user.overlay.redirect", "trusted.overlay.redirect"])
def test_directory_with_a_redirect_is_refused(tree: Path, tmp_path: Path, attribute: str) -> None:
    if attribute.startswith("trusted") and os.geteuid():
        pytest.skip("trusted attributes are root's")
    for name in ("moved", "whole"):
        (tmp_path / "upper" / name).mkdir(parents=True)
        os.setxattr(tmp_path / "upper" / name, attribute, b"dir")
    os.setxattr(tmp_path / "upper" / "whole", "user.overlay.opaque", b"y")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    with pytest.raises(PermissionError, match="cannot be followed here"):
        client.node("moved")
    assert client.list("whole") == {}
    assert "moved" in client.list()
    with pytest.raises(PermissionError):
        client.rmdir("moved")
    assert any(attribute in said for said in client.connection.said)
    client.end()


@pytest.mark.parametrize("attribute", ["user.overlay.metacopy", "user.containers.override_stat"])
def test_file_that_is_not_all_there_is_refused(tree: Path, tmp_path: Path, attribute: str) -> None:
    (tmp_path / "upper").mkdir()
    with open(tmp_path / "upper" / "file", "wb") as file:
        file.truncate(8)
    os.setxattr(tmp_path / "upper" / "file", attribute, b"")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    with pytest.raises(PermissionError, match="cannot be followed here"):
        client.get("file")
    client.end()


class Kernels:
    """The kernel's overlayfs, mounted by root with options of his."""

    def __init__(self, tree: Path, place: Path, options: str) -> None:
        self.mount = place / "mount"
        for name in ("mount", "upper", "work"):
            (place / name).mkdir(exist_ok=True)
        words = f"lowerdir={tree},upperdir={place}/upper,workdir={place}/work{options}"
        syscalls.mount(b"overlay", os.fsencode(self.mount), b"overlay", 0, os.fsencode(words))

    def __enter__(self) -> Path:
        return self.mount

    def __exit__(self, *_: object) -> None:
        syscalls.umount2(os.fsencode(self.mount))


@needs_root
def test_upper_directory_of_the_kernel_with_redirects_and_metacopies_shows_nothing_wrong(
    tree: Path, tmp_path: Path
) -> None:
    with Kernels(tree, tmp_path, ",redirect_dir=on,metacopy=on") as mount:
        os.rename(mount / "dir", mount / "moved")
        os.chmod(mount / "file", 0o600)
        os.unlink(mount / "other")
        (mount / "new").write_bytes(b"new")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    assert client.get("new") == b"new"
    assert not client.exists("other")
    assert not client.exists("dir")
    for name in ("moved", "file"):
        with pytest.raises(PermissionError, match="cannot be followed here"):
            client.node(name)
    client.end()


def take_a_turn(client: Client, after: str) -> None:
    """See what another overlay has made of the tree, and make something else of it."""
    assert client.list("dir").keys() == {after}
    assert (client.get("file"), client.exists("other")) == (b"2", False)
    client.unlink(f"dir/{after}")
    client.rmdir("dir")
    client.mkdir("dir")
    client.make("dir/ours", b"3")
    client.make("other", b"4")
    client.unlink("file")


def check_our_turn(mount: Path) -> None:
    assert os.listdir(mount / "dir") == ["ours"]
    assert sorted(os.listdir(mount)) == ["dir", "other"]
    assert (mount / "other").read_bytes() == b"4"


@needs_root
@pytest.mark.parametrize("options", ["", ",userxattr"], ids=["trusted", "userxattr"])
def test_kernel_and_ours_take_turns_as_root(tree: Path, tmp_path: Path, options: str) -> None:
    with Kernels(tree, tmp_path, options) as mount:
        shutil.rmtree(mount / "dir")
        (mount / "dir").mkdir()
        (mount / "dir" / "kernels").write_bytes(b"1")
        (mount / "other").unlink()
        (mount / "file").write_bytes(b"2")
    client = Client(open_directory(os.fspath(tree)), tmp_path)
    take_a_turn(client, after="kernels")
    assert opaque(client.upper("dir"))
    client.end()
    with Kernels(tree, tmp_path, options) as mount:
        check_our_turn(mount)


@needs_root
@pytest.mark.skipif(shutil.which("fuse-overlayfs") is None, reason="fuse-overlayfs is missing")
def test_fuse_overlayfs_and_ours_take_turns(tree: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    options = f"lowerdir={tree},upperdir={tmp_path}/upper,workdir={tmp_path}/fuse"
    for name in ("mount", "upper", "fuse"):
        (tmp_path / name).mkdir()

    def mounted(call: Callable[[], None]) -> None:
        subprocess.run(["fuse-overlayfs", "-o", options, mount], check=True, timeout=20)
        try:
            call()
        finally:
            syscalls.umount2(os.fsencode(mount))

    def theirs() -> None:
        shutil.rmtree(mount / "dir")
        (mount / "dir").mkdir()
        (mount / "dir" / "theirs").write_bytes(b"1")
        (mount / "other").unlink()
        (mount / "file").write_bytes(b"2")

    mounted(theirs)
    for by_name in (False, True):
        client = Client(open_directory(os.fspath(tree)), tmp_path)
        if by_name:
            client.overlay._marks.devices, client.overlay._marks.opaque = False, ()
        take_a_turn(client, after="theirs")
        client.end()

        def back() -> None:
            check_our_turn(mount)
            (mount / "dir" / "ours").rename(mount / "dir" / "theirs")
            (mount / "file").write_bytes(b"2")
            (mount / "other").unlink()

        mounted(back)
