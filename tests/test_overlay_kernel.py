"""The kernel's overlayfs over one of our mounts, as root and without any privilege, and why it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import squashfs_images
from fusewire.linux import overlay
from rootless import NOBODY, TESTS, rootless_python


def run(place: tuple[int, str], function: str, **arguments: object) -> None:
    """Run a function of the driver as the user of `place`."""
    uid, base = place
    words = rootless_python(uid) if uid else [sys.executable, "-W", "error"]
    program = shutil.copy(f"{TESTS}/overlay_driver.py", base)
    os.chmod(program, 0o755)
    orders = json.dumps({"base": base, **arguments})
    done = subprocess.run([*words, program, function, orders], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done.stderr


@pytest.mark.parametrize("kind", ["directory", "tmpfs"])
@pytest.mark.parametrize("place", [0, NOBODY], ids=["root", "rootless"], indirect=True)
def test_kernels_overlay_works_over_a_mount_of_ours(place: tuple[int, str], tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "empty").mkdir()
    (tree / "file").write_bytes(b"old data")
    (tree / "dir" / "one").write_bytes(b"one")
    (tree / "link").symlink_to("file")
    uid, base = place
    image = squashfs_images.mksquashfs(
        tree, Path(base) / "image", "-comp", "gzip", "-force-uid", str(uid), "-force-gid", str(uid)
    )
    image.chmod(0o644)
    run(place, "kernel_over_image", image=str(image), kind=kind)


@pytest.mark.parametrize("place", [0, NOBODY], ids=["root", "rootless"], indirect=True)
def test_refusals_have_a_reason_and_a_way_out(place: tuple[int, str]) -> None:
    run(place, "refusals")


def test_directory_of_changes_is_for_one_overlay_at_a_time(tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path / "changes")
    upper, work = overlay.prepare(directory, 0o711)
    assert overlay.prepare(directory, 0o755) == (upper, work)
    assert [oct(os.stat(path).st_mode & 0o7777) for path in (directory, upper, work)] == ["0o700", "0o711", "0o700"]
    fd = overlay.claim(directory)
    with pytest.raises(OSError, match="another overlay keeps its changes there"):
        overlay.claim(directory)
    os.close(fd)
    os.close(overlay.claim(directory))


def test_place_of_changes_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"has to be a directory.*file"):
        overlay.prepare(os.fsencode(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=r"cannot be made.*missing"):
        overlay.prepare(os.fsencode(tmp_path / "missing" / "changes"))
