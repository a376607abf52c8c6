"""`fusewire run IMAGE:TARGET:rw`: what is written, where it goes, by the kernel's overlayfs and by ours."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import squashfs_images
from e2e import USER, World

CHANGE = (
    "cd /opt/env && echo new > new && echo more >> hello.txt && rm -r directory && mkdir made && chmod 600 link"
    " && cat hello.txt new && test ! -e directory"
)
CHANGED = "hello world\nmore\nnew\n"


@pytest.fixture(params=[0, USER], ids=["root", "rootless"])
def uid(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def ramfs(world: World, uid: int) -> Iterator[Path]:
    """A directory on a filesystem that overlayfs of the kernel does not take: it has no attributes."""
    place = world.home() / "ram"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(place)], check=True)
    try:
        (place / "mine").mkdir()
        os.chown(place / "mine", uid, uid)
        yield place / "mine"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def test_changes_in_memory_are_forgotten(world: World, small: Path, uid: int) -> None:
    for options in ([], ["--overlay", "tmpfs"]):
        done = world.fw("run", *options, f"{small}:/opt/env:rw", "--", "sh", "-c", CHANGE, uid=uid)
        assert (done.returncode, done.stdout, done.stderr) == (0, CHANGED, "")
    done = world.fw("run", f"{small}:/opt/env", "--", "cat", "/opt/env/hello.txt", uid=uid)
    assert done.stdout == "hello world\n"
    assert os.listdir(world.home(uid)) == []


def test_changes_in_a_directory_are_there_the_next_time(world: World, small: Path, uid: int) -> None:
    done = world.fw("run", "--overlay", "changes", f"{small}:/opt/env", "--", "sh", "-c", CHANGE, uid=uid)
    assert (done.returncode, done.stdout, done.stderr) == (0, CHANGED, "")
    upper = world.home(uid) / "changes" / "upper"
    assert sorted(os.listdir(upper)) == ["directory", "hello.txt", "made", "new"]
    assert (upper / "new").read_text() == "new\n"
    assert (upper / "directory").is_char_device()
    script = "ls /opt/env/; cat /opt/env/hello.txt"
    again = world.fw("run", "--overlay", "changes", f"{small}:/opt/env:rw", "--", "sh", "-c", script, uid=uid)
    assert "hello world\nmore\n" in again.stdout
    assert "directory\n" not in again.stdout
    assert "made\nnew\n" in again.stdout


def test_root_of_the_mount_keeps_its_mode(world: World, small: Path, uid: int) -> None:
    plain = world.fw("run", f"{small}:/opt/env", "--", "stat", "-c", "%a", "/opt/env", uid=uid).stdout
    for place in ("tmpfs", "changes"):
        done = world.fw("run", "--overlay", place, f"{small}:/opt/env", "--", "stat", "-c", "%a", "/opt/env", uid=uid)
        assert (done.stdout, done.stderr) == (plain, "")


@pytest.mark.parametrize("maps", [[], ["--map-root"]], ids=["self", "map-root"])
def test_our_own_overlay_takes_over_where_the_kernels_cannot_be_had(
    world: World, small: Path, uid: int, ramfs: Path, maps: list[str]
) -> None:
    layer = str(ramfs / "changes")
    done = world.fw("run", *maps, "--overlay", layer, f"{small}:/opt/env", "--", "sh", "-c", CHANGE, uid=uid)
    assert (done.returncode, done.stdout) == (0, CHANGED), done.stderr
    assert "the kernel's overlayfs cannot be had" in done.stderr
    assert "has no extended attributes" in done.stderr
    upper = Path(layer) / "upper"
    assert (upper / "new").read_text() == "new\n"
    assert (upper / "new").stat().st_uid == uid
    script = "cd /opt/env && cat new && mv data moved && mv bin made/ && ls -A . made"  # a ramfs leaves no whiteouts
    again = world.fw("run", *maps, "--overlay", layer, f"{small}:/opt/env", "--", "sh", "-c", script, uid=uid)
    listed = ".:\nhello.txt\nlink\nmade\nmoved\nnew\nnot-executable\nprivate\n\nmade:\nbin\n"
    assert (again.returncode, again.stdout) == (0, f"new\n{listed}"), again.stderr
    assert not [name for name in os.listdir(upper) if name.startswith(".wh.")]


def test_root_of_our_own_overlay_has_the_mode_of_the_images(
    world: World, uid: int, ramfs: Path, tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    image = squashfs_images.mksquashfs(tmp_path / "tree", world.home() / "i.sqsh", "-all-root", "-root-mode", "711")
    image.chmod(0o644)
    words = ("run", "--overlay", str(ramfs / "changes"), f"{image}:/opt/env", "--", "stat", "-c", "%a", "/opt/env")
    done = world.fw(*words, uid=uid)
    assert (done.returncode, done.stdout) == (0, "711\n"), done.stderr


@pytest.mark.parametrize("name", ["upper", "work"])
def test_changes_do_not_go_where_a_link_in_their_place_leads(world: World, small: Path, uid: int, name: str) -> None:
    changes, elsewhere = (world.home(uid) / name for name in ("changes", "elsewhere"))
    for path in (changes, elsewhere):
        path.mkdir()
        os.chown(path, uid, uid)
    (changes / name).symlink_to(elsewhere)
    script = "touch /opt/env/new"
    done = world.fw("run", "--overlay", "changes", f"{small}:/opt/env", "--", "sh", "-c", script, uid=uid)
    assert done.returncode == 125
    assert "the place of an overlay has to be a directory" in done.stderr
    assert os.listdir(elsewhere) == []


def test_our_own_overlay_can_forget_too(world: World, small: Path, uid: int) -> None:
    program = (
        "import sys; from fusewire import cli; from fusewire.linux import overlay\n"
        "from fusewire.linux.mount_base import RefusedError\n"
        "def probe(directory): raise RefusedError(38, 'no overlays today', 'wait')\n"
        "overlay.probe = probe; sys.exit(cli.main(sys.argv[1:]))"
    )
    before = {name for place in ("/dev/shm", "/tmp") for name in os.listdir(place) if name.startswith("fusewire-layer")}
    words = [*world.words(uid)[1], "-c", program, "run", f"{small}:/opt/env:rw", "--", "sh", "-c", CHANGE]
    done = world.do(*words, uid=uid)
    assert (done.returncode, done.stdout) == (0, CHANGED)
    assert done.stderr == "fusewire: the kernel's overlayfs cannot be had: no overlays today; wait\n"
    after = {name for place in ("/dev/shm", "/tmp") for name in os.listdir(place) if name.startswith("fusewire-layer")}
    assert after <= before


def test_directory_is_written_to_itself_unless_a_layer_is_named(world: World, uid: int) -> None:
    tree = world.home(uid) / "tree"
    tree.mkdir()
    (tree / "file").write_text("old")
    for path in (tree, tree / "file"):
        os.chown(path, uid, uid)
    script = "echo new > /opt/tree/file"
    done = world.fw("run", "--overlay", "tmpfs", f"{tree}:/opt/tree:rw", "--", "sh", "-c", script, uid=uid)
    assert (done.returncode, done.stderr, (tree / "file").read_text()) == (0, "", "old")
    done = world.fw("run", f"{tree}:/opt/tree:rw", "--", "sh", "-c", script, uid=uid)
    assert (done.returncode, done.stderr, (tree / "file").read_text()) == (0, "", "new\n")


def test_one_directory_is_for_one_run_at_a_time(world: World, small: Path, uid: int) -> None:
    words: Any = ("run", "--overlay", "changes", f"{small}:/opt/env", "--")
    job = world.start(
        "fusewire", *words, "sh", "-c", "echo there; read line", uid=uid, popen={"stdin": subprocess.PIPE}
    )
    assert job.line() == "there"
    done = world.fw(*words, "true", uid=uid)
    assert done.returncode == 125
    assert "another overlay keeps its changes there now" in done.stderr
    job.finish()
    assert world.fw(*words, "true", uid=uid).returncode == 0


def test_two_mounts_have_layers_of_their_own(world: World, small: Path, uid: int) -> None:
    specs = (f"{small}:/opt/one:rw", f"{small}:/opt/one/directory:rw")
    script = "echo 1 > /opt/one/x; echo 2 > /opt/one/directory/x; cat /opt/one/x /opt/one/directory/x"
    done = world.fw("run", *specs, "--", "sh", "-c", script, uid=uid)
    assert (done.stdout, done.stderr) == ("1\n2\n", "")
    done = world.fw("run", "--overlay", "a", "--overlay", "b", *specs, "--", "sh", "-c", script, uid=uid)
    assert (done.stdout, done.stderr) == ("1\n2\n", "")
    assert (world.home(uid) / "a/upper/x").read_text() == "1\n"
    assert (world.home(uid) / "b/upper/x").read_text() == "2\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--overlay", "a", "IMAGE:/opt/one", "IMAGE:/opt/two"], "say which of the mounts it is for"),
        (["--overlay", "a", "IMAGE:/opt/one:rw", "IMAGE:/opt/two:rw"], "was given 1 times, and 2 mounts"),
        (["--overlay", "missing/a", "IMAGE:/opt/one"], "cannot be made: No such file or directory: "),
        (["--overlay", "/dev/null", "IMAGE:/opt/one"], "has to be a directory"),
    ],
)
def test_what_is_wrong_with_a_layer_is_said(world: World, small: Path, words: list[str], complaint: str) -> None:
    done = world.fw("run", *(word.replace("IMAGE", str(small)) for word in words), "--", "true")
    assert done.returncode == 125
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(world.home() / "a", ignore_errors=True)
    assert os.listdir(world.home()) == []
