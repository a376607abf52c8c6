"""`fusewire demo`, for real: by a user who may do nothing, by root, and where it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusewire
import rootless

ROOT = Path(__file__).parent.parent
IMAGE = Path(fusewire.__file__).parent / "data" / "demo.sqsh"
SCRIPT = ROOT / "scripts" / "make_demo_image.sh"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up being root")


def play(command: list[str], tmp_path: Path, **environ: str) -> tuple[int, str, str]:
    """Run a demo with temporary files below `tmp_path`; nothing may be left there, nor anything mounted."""
    work = tmp_path / "work"
    work.mkdir()
    if os.geteuid() == 0:
        for directory in (tmp_path, *tmp_path.parents):
            if directory == Path("/tmp"):
                break
            os.chmod(directory, 0o755)
        os.chmod(work, 0o777)
    done = subprocess.run(
        command,
        env=os.environ | environ | {"TMPDIR": str(work)},
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert os.listdir(work) == [], done.stdout
    assert str(work) not in Path("/proc/self/mountinfo").read_text()
    return done.returncode, done.stdout, done.stderr


def assert_complete(code: int, out: str, err: str) -> None:
    assert (code, err) == (0, ""), out + err
    assert [line.split(".")[0] for line in out.splitlines() if line[:1].isdigit()] == [str(n) for n in range(1, 9)]
    assert "You are reading a file inside a squashfs image." in out
    assert "hello from /opt/fusewire-demo/bin/hello" in out
    assert "/opt/fusewire-demo does not exist" in out
    assert out.endswith("every step worked.\n")
    assert "\x1b" not in out  # plain text, here as on a terminal


def test_every_step_works_for_a_user_who_may_do_nothing(tmp_path):
    code, out, err = play([*rootless.rootless_python(), "-m", "fusewire", "demo"], tmp_path)
    assert_complete(code, out, err)
    assert "NoNewPrivs: 1 " in out
    if os.geteuid() == 0:
        assert f"Uid:        {rootless.NOBODY} " in out
        assert "CapBnd:     0000000000000000" in out
        assert "although this user may not write in /opt" in out


@as_root
def test_root_gives_up_everything_first(tmp_path):
    rootless.open_fuse_device()
    words = rootless.rootless_python()
    python, path = words[-3], next(word for word in words if word.startswith("PYTHONPATH="))
    code, out, err = play([python, "-m", "fusewire", "demo"], tmp_path, PYTHONPATH=path.partition("=")[2])
    assert_complete(code, out, err)
    assert "(started as root, which it has given up for this)" in out
    assert f"Uid:        {rootless.NOBODY} " in out


@as_root
def test_a_package_that_is_closed_to_others_is_copied_for_them(tmp_path):
    rootless.open_fuse_device()
    python = rootless.rootless_python()[-3]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copytree(IMAGE.parent.parent, closed / "fusewire", ignore=shutil.ignore_patterns("__pycache__"))
    code, out, err = play(
        [python, "-m", "fusewire", "demo"], tmp_path, PYTHONPATH=str(closed), PYTHONDONTWRITEBYTECODE="1"
    )
    assert_complete(code, out, err)
    assert "runs a copy of the package" in out
    assert f"Uid:        {rootless.NOBODY} " in out


@as_root
def test_root_stays_root_and_says_so_where_nobody_else_could_do_it(tmp_path):
    # A directory for temporary files that others cannot reach stands for an interpreter that they cannot read.
    closed = tmp_path / "work" / "closed"
    script = f"mkdir -m 700 {closed}; TMPDIR={closed} {sys.executable} -m fusewire demo; c=$?; rmdir {closed}; exit $c"
    code, out, err = play(["sh", "-c", script], tmp_path)
    assert_complete(code, out, err)
    assert "started as root, and stays root" in out


@as_root
def test_a_failed_step_is_named_and_leaves_nothing(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is missing")
    script = f"mount --bind /dev/null /dev/fuse && exec {sys.executable} -m fusewire demo"
    code, out, err = play(["unshare", "--mount", "sh", "-c", script], tmp_path)
    assert code == 1
    assert "step 2 failed: `fusewire mount" in err
    assert "fusewire doctor" in err
    assert "every step worked" not in out


def test_it_takes_little_room():
    assert IMAGE.stat().st_size <= 8192


def test_the_image_is_what_its_script_makes(tmp_path):
    for program in ("mksquashfs", "unsquashfs"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} (squashfs-tools) is missing")
    again = tmp_path / "again.sqsh"
    subprocess.run([SCRIPT, again], check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1"})
    once_more = tmp_path / "once-more.sqsh"
    subprocess.run([SCRIPT, once_more], check=True, capture_output=True)
    assert again.read_bytes() == once_more.read_bytes()
    if again.read_bytes() != IMAGE.read_bytes():  # another version of mksquashfs: then at least the same tree
        assert tree(again, tmp_path / "a") == tree(IMAGE, tmp_path / "b")


def test_the_image_holds_what_the_demo_speaks_of(tmp_path):
    if shutil.which("unsquashfs") is None:
        pytest.skip("unsquashfs (squashfs-tools) is missing")
    names = tree(IMAGE, tmp_path / "tree")
    assert names["latest"] == "-> README"
    assert names["README"] == names["docs/README"]
    assert (tmp_path / "tree/README").samefile(tmp_path / "tree/docs/README")
    assert os.access(tmp_path / "tree/bin/hello", os.X_OK)


def tree(image: Path, place: Path) -> dict[str, str]:
    """What is in an image, by squashfs-tools: contents, link targets, modes and times."""
    subprocess.run(["unsquashfs", "-q", "-no-progress", "-d", place, image], check=True, capture_output=True)
    found = {}
    for path in sorted(place.rglob("*")):
        info = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(place))] = f"-> {os.readlink(path)}"
        else:
            text = path.read_text() if path.is_file() else ""
            found[str(path.relative_to(place))] = f"{info.st_mode:o} {info.st_mtime} {text}"
    return found
