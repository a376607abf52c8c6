"""URLs on the command line: images on a web server, of which only what is read is fetched, and fsspec's filesystems."""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import squashfs_images
from e2e import PATIENCE, USER, World, command_line
from remote_server import RangeServer, certificate

needs_fsspec = pytest.mark.skipif(importlib.util.find_spec("fsspec") is None, reason="fsspec is not installed")


@pytest.fixture(params=[0, USER], ids=["root", "rootless"])
def uid(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image of more than 50 MiB, with a small file in it."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(50):
        (root / f"noise{number}").write_bytes(random.Random(number).randbytes(1 << 20))
    (root / "sub").mkdir()
    (root / "sub" / "hello.txt").write_text("hello world\n")
    path: Path = squashfs_images.mksquashfs(root, tmp_path_factory.mktemp("image") / "env.sqsh")
    return path.read_bytes()


@pytest.fixture
def server(image: bytes) -> Iterator[RangeServer]:
    with RangeServer({"/env.sqsh": image, "/plain.sqsh": b"nothing that we know"}) as found:
        yield found


def test_image_on_a_web_server_is_not_downloaded(world: World, server: RangeServer, uid: int) -> None:
    done = world.fw("run", f"{server.url}/env.sqsh:/opt/env", "--", "cat", "/opt/env/sub/hello.txt", uid=uid)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello world\n", "")
    assert server.sent < 2 << 20
    with world.mounted(f"{server.url}/env.sqsh", "mnt", uid=uid) as found:
        assert found["source"] == f"{server.url}/env.sqsh"
        assert world.sh("ls mnt/ | wc -l; head -c 5 mnt/sub/hello.txt", uid=uid).stdout == "51\nhello"
    assert server.sent < 4 << 20


def test_image_on_a_web_server_can_be_written_over(world: World, server: RangeServer, uid: int) -> None:
    script = "echo more >> /opt/env/sub/hello.txt; cat /opt/env/sub/hello.txt"
    done = world.fw("run", f"{server.url}/env.sqsh:/opt/env:rw", "--", "sh", "-c", script, uid=uid)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello world\nmore\n", "")


@pytest.mark.parametrize(
    ("path", "complaint"), [("/none.sqsh", "No such file"), ("/plain.sqsh", "no squashfs image")], ids=["none", "plain"]
)
def test_what_is_wrong_with_a_url_is_said(
    world: World, server: RangeServer, uid: int, path: str, complaint: str
) -> None:
    for words in (["mount", f"{server.url}{path}", "mnt"], ["run", f"{server.url}{path}:/opt/env", "--", "true"]):
        done = world.fw(*words, uid=uid)
        assert done.returncode == 125
        assert f"{server.url}{path}" in done.stderr
        assert "Traceback" not in done.stderr
    assert world.records(uid) == []


def test_url_cannot_be_locked_in(world: World, server: RangeServer) -> None:
    done = world.fw("mount", "--sandbox", "namespace", f"{server.url}/env.sqsh", "mnt")
    assert done.returncode == 125
    assert "which is a url: leave it out" in done.stderr


@needs_fsspec
def test_filesystem_of_fsspec_is_written_to(world: World) -> None:
    script = "echo hi > /opt/m/file; mkdir /opt/m/sub; mv /opt/m/file /opt/m/sub; cat /opt/m/sub/file"
    done = world.fw("run", "memory://place:/opt/m", "--", "sh", "-c", script, uid=0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")


@needs_fsspec
def test_storage_options_reach_fsspec(world: World) -> None:
    (world.home(0) / "d").mkdir()
    done = world.fw(
        *("run", "-o", "storage=auto_mkdir=true", f"file://{world.home(0)}/d:/opt/d", "--"),
        *("sh", "-c", "echo hi > /opt/d/file"),
        uid=0,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (world.home(0) / "d" / "file").read_text() == "hi\n"
    done = world.fw("run", "-o", "storage=nonsense", "memory://x:/opt/d", "--", "true", uid=0)
    assert done.returncode == 125
    assert "is no KEY=VALUE" in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed, to make certificates")
def test_https_is_checked_against_the_certificates_that_the_environment_names(
    world: World, image: bytes, uid: int
) -> None:
    pem = certificate(world.base / "certificate")
    with RangeServer({"/env.sqsh": image}, certificate=pem) as server:
        words = ["run", f"{server.url}/env.sqsh:/opt/env", "--", "cat", "/opt/env/sub/hello.txt"]
        done = world.fw(*words, uid=uid, env={"SSL_CERT_FILE": str(pem)})
        assert (done.returncode, done.stdout, done.stderr) == (0, "hello world\n", "")
        assert server.sent < 2 << 20
        done = world.fw(*words, uid=uid)
        assert done.returncode == 125
        assert f"{server.url}/env.sqsh" in done.stderr
        assert "SSL_CERT_FILE" in done.stderr


def test_password_is_shown_nowhere(world: World, server: RangeServer, uid: int) -> None:
    url = server.url.replace("//", "//me:secret@") + "/env.sqsh?key=hidden"
    look = "cat /proc/self/mounts; grep -r . $XDG_RUNTIME_DIR/fusewire"
    with world.mounted("-o", 'storage=headers={"X-Token":"token"}', url, "mnt", uid=uid) as found:
        said = [str(found), world.sh(look, uid=uid).stdout]
        said += [world.fw("list", *words, uid=uid).stdout for words in ([], ["--json"])]
        said += [str(command_line(pid)) for pid in world.pids()]
    for source in (url, url.replace("env", "none"), url.replace("env", "plain")):
        running = world.start("fusewire", "run", f"{source}:/opt/env", "--", "sh", "-c", f"{look}; echo; cat", uid=uid)
        while (line := running.line()).strip():
            said.append(line)
        said += [str(command_line(pid)) for pid in world.pids()]
        done = running.finish()
        said += [done.stdout, done.stderr]
    assert any(f"{server.url}/env.sqsh?..." in text for text in said)
    for secret in ("secret", "hidden", "token"):
        assert [text for text in said if secret in text] == []


def appearing(world: World, pattern: str) -> list[Path]:
    """Files at home, as soon as there are any."""
    deadline = time.monotonic() + PATIENCE
    while not (found := list(world.home().glob(pattern))):
        assert time.monotonic() < deadline
    return found


@needs_fsspec
def test_what_cannot_be_saved_is_kept_in_a_file_when_the_mount_ends(world: World) -> None:
    script = "mkdir d; chmod 555 d"
    assert world.sh(script).returncode == 0
    with world.mounted(f"file://{world.home()}/d", "mnt"):
        world.sh("echo hi > mnt/file")  # the shell does not look at what close(2) says
    (kept,) = appearing(world, "fusewire-unsaved-*-file")  # by the server, which ends after its mount
    assert kept.read_text() == "hi\n"
    done = world.fw("run", f"file://{world.home()}/d:/opt/d", "--", "sh", "-c", "echo hi > /opt/d/other")
    assert "/fusewire-unsaved-" in done.stderr
    assert len(appearing(world, "fusewire-unsaved-*-other")) == 1
