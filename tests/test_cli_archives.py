"""Archives from the command line, read by a server that is locked in: also the second time, from the kept index."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from e2e import USER, World
from fusewire.cli import progress

KINDS = {
    "tar": ["tar", "-cf"],
    "tar.gz": ["tar", "-czf"],
    "tar.bz2": ["tar", "-cjf"],
    "tar.xz": ["tar", "-cJf"],
    "zip": ["zip", "-qr"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uid", [0, USER], ids=["root", "rootless"])
def test_archive_is_mounted_twice_written_over_and_shared_by_runs(world: World, kind: str, uid: int) -> None:
    tree = world.home(uid) / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "small").write_text("small\n")
    (tree / "large").write_bytes(os.urandom(3 << 20))
    archive = world.home(uid) / f"a.{kind}"
    subprocess.run([*KINDS[kind], str(archive), "."], cwd=tree, check=True)
    archive.chmod(0o644)
    check = "cat mnt/sub/small && cmp mnt/large tree/large && tail -c 100 mnt/large | cmp - small.tail"
    (world.home(uid) / "small.tail").write_bytes((tree / "large").read_bytes()[-100:])
    for _ in range(2):
        with world.mounted(archive, "mnt", uid=uid):
            done = world.sh(check, uid=uid)
            assert (done.stdout, done.stderr) == ("small\n", "")
    script = "echo more >> /opt/a/sub/small; cat /opt/a/sub/small; cmp /opt/a/large tree/large"
    done = world.fw("run", f"{archive}:/opt/a:rw", "--", "sh", "-c", script, uid=uid)
    assert (done.stdout, done.stderr) == ("small\nmore\n", "")
    kept = world.home(uid) / ".cache" / "fusewire" / "archives"
    assert kept.is_dir()
    assert kept.stat().st_mode & 0o077 == 0


def test_damaged_archive_is_refused_by_name(world: World) -> None:
    path: Path = world.home() / "bad.tar.gz"
    path.write_bytes(b"\x1f\x8b\x08\x00" + os.urandom(4000))
    done = world.fw("mount", path, "mnt")
    assert done.returncode == 125
    assert "bad.tar.gz" in done.stderr
    assert world.records() == []


def test_progress_is_silent_in_a_pipe_and_clears_its_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FIRST", 0)
    for make, wanted in ((os.pipe, b""), (pty.openpty, b"\ra.tar [############............]  50 %\r\x1b[K")):
        ours, theirs = make()
        try:
            with progress.Progress("a.tar", theirs) as told:
                told(1, 2)
            os.set_blocking(ours, False)
            try:
                assert os.read(ours, 1000) == wanted
            except BlockingIOError:
                assert wanted == b""
        finally:
            os.close(ours)
            os.close(theirs)
