"""Fixtures of the end-to-end tests: a world per test that must be empty again when it ends, and images to mount."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import e2e
import rootless
import squashfs_images
from fusewire.linux import syscalls

DEADLINE = 90.0  # seconds until the processes of a test are ended


# A shell that starts the tests with `&` in a script has them ignore SIGINT, and so does what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def world() -> Iterator[e2e.World]:
    """Users, directories and processes for one test. Whatever of them is left afterwards fails the test."""
    if not e2e.ROOT:
        pytest.skip("needs root: the tests become users without any privilege")
    descriptors = _descriptors()
    found = e2e.World()
    with e2e.deadline(found.mark, DEADLINE):
        try:
            yield found
        finally:
            left = found.close()
    assert left == []
    assert _descriptors() == descriptors, "descriptors of the test process leaked"


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """Fail a test that leaves a child process behind, ended or not, or signals blocked, which children inherit."""
    before = set(e2e.children(os.getpid()))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert blocked == set(), "something has left signals blocked"
    yield
    assert signal.pthread_sigmask(signal.SIG_SETMASK, blocked) == blocked
    left = [f"{pid} {' '.join(e2e.command_line(pid))}" for pid in e2e.children(os.getpid()) if pid not in before]
    assert left == []


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that lists
            continue
    return found


@pytest.fixture(scope="session")
def images() -> Iterator[Path]:
    """A directory that everybody can read, for the images of this session."""
    place = Path(tempfile.mkdtemp(prefix="fusewire-images-", dir="/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def tree(images: Path) -> Path:
    """A tree with everything that an image can hold."""
    root = squashfs_images.make_tree(images / "tree")
    with (root / "big").open("wb") as file:
        for seed in range(6):
            file.write(squashfs_images.noise(500_000, seed))
            file.write(squashfs_images.text(600_000, seed))
    directory = root / "three thousand"
    directory.mkdir()
    for number in range(3000):
        (directory / f"name {number:04}").write_bytes(b"%d\n" % number)
    for path in (root / "big", directory):
        os.utime(path, (0, 1_600_000_000))
    os.utime(root, (0, 1_234_567_890))
    return root


@pytest.fixture(scope="session")
def image_of(images: Path, tree: Path) -> Callable[[str], Path]:
    """Give the image of the tree by a compressor."""

    def make(compressor: str) -> Path:
        image = images / f"{compressor}.sqsh"
        if not image.exists():
            made = squashfs_images.mksquashfs(tree, images / f"{compressor}.tmp", "-comp", compressor)
            made.chmod(0o644)
            made.rename(image)
        return image

    return make


@pytest.fixture(scope="session")
def small(images: Path) -> Path:
    """A small image: a few files, a program, a directory to mount on, and names that tell where one is."""
    root = images / "small-tree"
    (root / "bin").mkdir(parents=True)
    (root / "directory" / "inner").mkdir(parents=True)
    (root / "hello.txt").write_bytes(b"hello world\n")
    (root / "directory" / "file").write_bytes(b"in a directory\n")
    (root / "private").write_bytes(b"owner only\n")
    (root / "private").chmod(0o600)
    (root / "link").symlink_to("hello.txt")
    shutil.copy("/bin/echo", root / "bin" / "echo")
    (root / "bin" / "script").write_bytes(b"#!/bin/sh\necho script ran in $PWD\n")
    (root / "bin" / "script").chmod(0o755)
    (root / "not-executable").write_bytes(b"data\n")
    (root / "data").write_bytes(squashfs_images.text(300_000))
    image = squashfs_images.mksquashfs(root, images / "small.sqsh", "-comp", "zstd", "-all-root")
    image.chmod(0o644)
    return image


@pytest.fixture(scope="session")
def fuse_user() -> int:
    """A user for whom fusermount3 works: the machine knows its name."""
    helper = shutil.which("fusermount3", path=e2e.PATH)
    if helper is None or not os.stat(helper).st_mode & 0o4000:
        pytest.skip("fusermount3 is not installed set-user-ID (Debian package fuse3)")
    if subprocess.run(["getent", "passwd", str(e2e.NOBODY)], stdout=subprocess.DEVNULL).returncode:
        pytest.skip(f"user {e2e.NOBODY} has no name here")
    return e2e.NOBODY


@pytest.fixture
def dumpable_again() -> Iterator[None]:
    """A thread that changes its ids makes the whole process undumpable (commit_creds), which other tests look at."""
    yield
    syscalls.set_dumpable()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    """A user, to be given by indirect parametrization, and an empty directory of his."""
    uid: int = request.param
    if not uid and os.geteuid():
        pytest.skip("mounting in the first namespace needs root")
    base = tempfile.mkdtemp(prefix="fusewire-place-", dir=rootless.rootless_home(uid) if uid else "/tmp")
    if os.geteuid() == 0:
        os.chown(base, uid, uid)
    os.chmod(base, 0o755)
    try:
        yield uid, base
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", base], check=False)
        shutil.rmtree(base)
