"""Filesystems that are programs, on the command line: `module:Name`, and those of installed packages."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from e2e import USER, World, ends, status
from fusewire.testing.guest import FakeGuest

HELLO = """
import fusewire

class Hello(fusewire.Dir):
    def children(self):
        return {b"hello.txt": fusewire.Bytes(b"hello world\\n")}

class Holder:
    inner = Hello

tree = fusewire.Dir({b"note": fusewire.Bytes(b"old\\n", writable=True)}, writable=True)
number = 5

def broken():
    raise RuntimeError("not today")
"""
PACKAGE = """
import fusewire

def words(rest):
    return fusewire.Dir({word.encode(): fusewire.Bytes(b"") for word in rest.split("+")})
"""


@pytest.fixture(params=[0, USER], ids=["root", "rootless"])
def uid(request: pytest.FixtureRequest, world: World) -> int:
    (world.home(request.param) / "mine.py").write_text(HELLO)
    return int(request.param)


def test_program_is_mounted_and_unmounted(world: World, uid: int) -> None:
    with world.mounted("mine:Hello", "mnt", uid=uid) as found:
        assert found["source"] == "mine:Hello"
        assert world.sh("ls mnt/; cat mnt/hello.txt", uid=uid).stdout == "hello.txt\nhello world\n"
        assert "Read-only" in world.sh("echo > mnt/new", uid=uid).stderr
        assert world.listed(uid)[0]["sandbox"] == "sandbox: none, for it is a program"
        assert status(found["server"], "Seccomp") == status("self", "Seccomp")  # type: ignore[arg-type]
    assert ends(found["server"], 0.0)
    assert sorted(path.name for path in world.home(uid).iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_program_can_be_written_to_and_used_by_a_run_beside_an_image(world: World, small: Path, uid: int) -> None:
    script = (
        "echo new > /opt/w/note; mkdir /opt/w/d; cat /opt/w/note /opt/w/../h/hello.txt /opt/env/hello.txt; ls /opt/w"
    )
    done = world.fw(
        *("run", "mine:tree:/opt/w", "mine:Holder.inner:/opt/h", f"{small}:/opt/env", "--", "sh", "-c", script), uid=uid
    )
    assert (done.stdout, done.stderr) == ("new\nhello world\nhello world\nd\nnote\n", "")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("mine:Nothing", "the module mine has no Nothing"),
        ("nowhere:Nothing", "there is neither a file nowhere:Nothing nor a module nowhere"),
        ("mine:number", "mine:number: "),
        ("mine:broken", "not today"),
    ],
)
def test_what_is_wrong_with_a_program_is_said(world: World, uid: int, source: str, complaint: str) -> None:
    done = world.fw("mount", source, "mnt", uid=uid)
    assert done.returncode == 125
    assert complaint in done.stderr
    assert world.records(uid) == []
    done = world.fw("run", f"{source}:/opt/x", "--", "true", uid=uid)
    assert done.returncode == 125
    assert complaint in done.stderr


def test_program_cannot_be_locked_in(world: World, uid: int) -> None:
    done = world.fw("mount", "--sandbox", "namespace", "mine:Hello", "mnt", uid=uid)
    assert done.returncode == 125
    assert "--sandbox namespace is not for mine:Hello, which is a program" in done.stderr


def test_file_with_a_colon_is_a_file(world: World, small: Path, uid: int) -> None:
    (world.home(uid) / "mine:Hello").write_bytes(small.read_bytes())
    with world.mounted("mine:Hello", "mnt", uid=uid):
        assert "directory" in world.sh("ls mnt/", uid=uid).stdout


def test_package_brings_a_kind_of_source(world: World, uid: int) -> None:
    place = world.home(uid) / "site"
    info = place / "words-1.dist-info"
    info.mkdir(parents=True)
    (place / "wordlist.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: words\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fusewire.filesystems]\nwords = wordlist:words\n")
    path = next(word for word in world.words(uid)[0] if word.startswith("PYTHONPATH="))[11:]
    how = {"uid": uid, "env": {"PYTHONPATH": f"{place}:{path}"}}
    with world.mounted("words:one+two", "mnt", **how):  # type: ignore[arg-type]
        assert world.sh("ls mnt/", uid=uid).stdout == "one\ntwo\n"


def test_program_is_shared_with_a_guest(world: World, uid: int) -> None:
    socket = world.home(uid) / "s"
    job = world.start("fusewire", "share", "mine:Hello", "--socket-path", str(socket), "--json", uid=uid)
    assert '"source": "mine:Hello"' in job.line()
    try:
        for _ in range(2):  # made anew for each
            with FakeGuest.connect(str(socket)) as guest:
                guest.init()
                assert guest.read_file(b"hello.txt") == b"hello world\n"
    finally:
        job.kill(signal.SIGTERM)
    done = job.finish()
    assert done.returncode == 0, done.stderr
    assert "sandbox: none" in done.stderr
    refused = world.fw("share", "mine:Hello", "--sandbox", "namespace", "--socket-path", str(socket), uid=uid)
    assert refused.returncode == 1
    assert "--sandbox is not for mine:Hello, which is a program" in refused.stderr


def test_program_has_the_time_that_it_takes_to_end(world: World, uid: int) -> None:
    """What it has in memory is its own to save, in destroy."""
    program = """
import pathlib, time, fusewire

class Slow(fusewire.Dir):
    place = pathlib.Path({place!r})

    def destroy(self):
        time.sleep(3)
        self.place.write_text("saved")
"""
    place = world.home(uid) / "saved"
    (world.home(uid) / "slow.py").write_text(program.format(place=str(place)))
    with world.mounted("slow:Slow", "mnt", uid=uid) as found:
        pass
    assert ends(found["server"])
    assert place.read_text() == "saved"
    place.unlink()
    assert world.fw("run", "slow:Slow:/opt/slow", "--", "ls", "/opt/slow", uid=uid).returncode == 0
    assert place.read_text() == "saved"
