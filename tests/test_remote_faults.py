"""Sources of fsspec when things go wrong: stores that refuse, servers that lie, full disks, killed programs."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from fusewire.cli.options import parse
from fusewire.fs.remote.crew import Crew
from fusewire.fs.remote.retry import Patience
from fusewire.session import Session
from fusewire.testing import FakeKernel
from remote_mounts import Mount, mounting
from remote_server import RangeServer, certificate
from rootless import NOBODY

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (extra remote)")

from fusewire.fs.remote.filesystem import RemoteFS, open_fsspec  # noqa: E402
from fusewire.fs.remote.store import Store  # noqa: E402

QUICK = Patience(attempts=2, timeout=5, total=10, first_pause=0.01)


class World:
    """Kernels on filesystems of this process, which end with the test; what they said is in `said`."""

    def __init__(self) -> None:
        self.filesystems: list[RemoteFS] = []
        self.said: list[str] = []

    def kernel(self, url: str, text: str = "", **storage: Any) -> FakeKernel:
        found = parse(text)
        given = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
        filesystem = open_fsspec(url, type("Options", (), {**given, "storage": storage})(), patience=QUICK)
        self.filesystems.append(filesystem)
        kernel = FakeKernel(Session(filesystem, log=lambda message, error: self.said.append(message)))
        kernel.init()
        return kernel

    def close(self) -> None:
        filesystems, self.filesystems = self.filesystems, []
        for filesystem in filesystems:
            filesystem.destroy()


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    for _ in range(2):
        fs.store.clear()
        fs.pseudo_dirs[:] = [""]
        if _ == 0:
            yield fs


@pytest.fixture
def mount() -> Iterator[Callable[..., Mount]]:
    with mounting() as make:
        yield make


@pytest.fixture
def web() -> Iterator[RangeServer]:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed, which fsspec needs for http")
    with RangeServer({"/": b'<a href="big">', "/big": os.urandom(1 << 20) * 20}) as server:
        server.types["/"] = "text/html"
        yield server


def fails(number: int, function, *arguments, **more) -> str:
    with pytest.raises(OSError) as caught:
        function(*arguments, **more)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


def beside(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begin something in a thread; call what this gives for its result."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(work())
        except OSError as error:
            got.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(20)
        assert not thread.is_alive()
        return got[0]

    return result


# Web servers


def test_web_server_that_ignores_ranges_is_refused_and_not_taken_in(world, web):
    kernel = world.kernel(web.url + "/")
    node = kernel.lookup(1, b"big").nodeid
    web.ranges_given = False
    web.reset()
    fh, _ = kernel.open(node)
    fails(errno.EOPNOTSUPP, kernel.read, node, fh, 10_000_000, 5000)
    assert any("the server gives no ranges" in line for line in world.said)
    assert web.sent == 0  # of what is sent as a whole: the connection was closed in the middle
    web.files["/small"] = bytes(range(256)) * 4000
    node = kernel.lookup(1, b"small").nodeid
    fh, _ = kernel.open(node)
    assert kernel.read(node, fh, 300_000, 512) == web.files["/small"][300_000:300_512]


def test_web_server_that_gives_other_bytes_is_not_believed(world, web):
    kernel = world.kernel(web.url + "/")
    node = kernel.lookup(1, b"big").nodeid
    fh, _ = kernel.open(node)
    for fault in (
        lambda handler, number: handler.answer(say=f"bytes 7-131078/{20 << 20}"),
        lambda handler, number: handler.answer(cut=1000),
    ):
        web.fault = fault
        fails(errno.EIO, kernel.read, node, fh, 0, 5000)
    web.fault = lambda handler, number: handler.answer(say="bytes 0-131071/999")
    fails(errno.ESTALE, kernel.read, node, fh, 0, 5000)


def test_file_of_a_web_directory_is_read_without_a_second_request_for_each_range(world, web):
    kernel = world.kernel(web.url + "/")
    node = kernel.lookup(1, b"big").nodeid
    fh, _ = kernel.open(node)
    web.reset()
    assert kernel.read(node, fh, 5_000_000, 5000) == web.files["/big"][5_000_000:5_005_000]
    assert web.ranges == [("/big", "bytes=4980736-5111807")]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed, to make certificates")
def test_certificate_of_a_web_directory_is_checked(world, tmp_path, web):
    pem = certificate(tmp_path / "certificate")
    with RangeServer(web.files, certificate=pem) as server:
        server.types = web.types
        text = fails(errno.EACCES, world.kernel, server.url + "/")
        assert "SSL_CERT_FILE" in text
        assert server.url in text
        code = (
            "import sys; from fusewire.fs.remote.store import Store; print(*Store(sys.argv[1], {}).list(sys.argv[1]))"
        )
        words, environment = [sys.executable, "-c", code, server.url + "/"], {**os.environ, "SSL_CERT_FILE": str(pem)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "b'big'\n"


def test_zip_on_a_web_server_that_is_replaced_is_stale(world, web):
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("hello.txt", b"hello")
        archive.writestr("x", bytes(6 << 20))
    web.files["/a.zip"] = packed.getvalue()
    kernel = world.kernel(f"zip://::{web.url}/a.zip", skip_instance_cache=True)
    assert kernel.read_file(b"hello.txt") == b"hello"
    node = kernel.lookup(1, b"x").nodeid
    fh, _ = kernel.open(node)
    assert kernel.read(node, fh, 0, 10) == bytes(10)
    web.files["/a.zip"], web.etag = packed.getvalue().replace(bytes(1000), b"x" * 1000), '"2"'
    fails(errno.ESTALE, kernel.read, node, fh, 5 << 20, 10)
    assert any("it has changed since it was mounted" in line for line in world.said)


# Other filesystems


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("az://container/x", "adlfs")])
def test_package_that_is_missing_is_named(world, url, package):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom fusewire.fs.remote.store import Store\n"
    code += f"try: Store({url!r}, {{}})\nexcept OSError as error: print(error)\n"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert url in said
    assert package in said
    assert "pip install" in said or "conda install" in said


def test_repository_of_github_is_a_read_only_directory(world, monkeypatch):
    pytest.importorskip("requests", reason="requests is not installed, which fsspec needs for github")
    from fsspec.implementations.github import GithubFileSystem

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    files = {"README": b"hello\n", "bin/run": b"#!/bin/sh\n"}
    tree = {
        "branch": [
            {"path": "README", "mode": "100644", "type": "blob", "size": 6, "sha": "1"},
            {"path": "bin", "mode": "040000", "type": "tree", "sha": "2"},
        ],
        "2": [{"path": "run", "mode": "100755", "type": "blob", "size": 10, "sha": "3"}],
    }
    with RangeServer({}) as server:

        def fault(handler: Any, number: int) -> bool:
            kind, _, rest = handler.path[1:].partition("/")
            if kind == "tree" and rest in tree:
                return bool(handler.plain(200, json.dumps({"tree": tree[rest]}).encode()))
            if kind == "content" and rest in files:
                content = base64.b64encode(files[rest]).decode()
                return bool(handler.plain(200, json.dumps({"content": content, "encoding": "base64"}).encode()))
            return bool(handler.plain(403 if rest == "locked" else 404))

        server.fault = fault
        monkeypatch.setattr(GithubFileSystem, "url", server.url + "/tree/{sha}")
        monkeypatch.setattr(GithubFileSystem, "content_url", server.url + "/content/{path}")
        kernel = world.kernel("github://org:repository@branch/", skip_instance_cache=True)
        assert sorted(item.name for item in kernel.listdir())[2:] == [b"README", b"bin"]
        assert kernel.read_file(b"README") == b"hello\n"
        directory = kernel.lookup(1, b"bin").nodeid
        node = kernel.lookup(directory, b"run")
        assert node.attr[9] & 0o777 == 0o755
        assert kernel.read(node.nodeid, kernel.open(node.nodeid)[0], 0, 100) == b"#!/bin/sh\n"
        fails(errno.EROFS, kernel.create, 1, b"new")
        server.reset()
        text = fails(errno.EACCES, world.kernel, "github://org:repository@locked/", skip_instance_cache=True)
        assert "github://org:repository@locked/" in text
        assert server.requests == 1


# Writing


def test_data_that_nobody_wants_at_the_end_is_kept_in_a_file_that_is_named(memory, monkeypatch, tmp_path):
    world = World()
    kernel = world.kernel("memory://top")
    world.filesystems[0]._spools = (str(tmp_path),)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    fails(errno.EACCES, kernel.flush, entry.nodeid, fh)
    world.close()
    (said,) = [line for line in world.said if "kept in" in line]
    found = re.search(r"memory://top: file: .* kept in (/\S+)$", said)
    assert found is not None
    kept = Path(found[1])
    assert (kept.parent, kept.read_bytes(), kept.stat().st_mode & 0o777) == (tmp_path, b"content", 0o600)
    assert kept.name.endswith("-file")


def test_fsync_of_who_has_it_open_for_reading_saves_what_others_have_written(world, memory):
    kernel = world.kernel("memory://top")
    entry, fh, _ = kernel.create(1, b"file")
    reader, _ = kernel.open(entry.nodeid)
    kernel.write(entry.nodeid, fh, 0, b"content")
    kernel.fsync(entry.nodeid, reader)
    assert memory.cat("/top/file") == b"content"


def test_two_writers_see_each_other_and_the_last_one_to_close_leaves_both(world, memory):
    memory.pipe_file("/top/file", b"0123456789")
    kernel = world.kernel("memory://top")
    node = kernel.lookup(1, b"file").nodeid
    one, other = (kernel.open(node, os.O_RDWR)[0] for _ in range(2))
    kernel.write(node, one, 0, b"AB")
    kernel.write(node, other, 8, b"YZ")
    assert kernel.read(node, one, 0, 100) == b"AB234567YZ"
    kernel.flush(node, one)
    kernel.release(node, one)
    kernel.write(node, other, 4, b"--")
    kernel.flush(node, other)
    kernel.release(node, other)
    assert memory.cat("/top/file") == b"AB23--67YZ"


def test_upload_waits_for_a_directory_that_is_being_moved_and_goes_where_it_is_then(world, memory, monkeypatch):
    kernel = world.kernel("memory://top")
    directory = kernel.mkdir(1, b"old").nodeid
    entry, fh, _ = kernel.create(directory, b"file")
    kernel.flush(entry.nodeid, fh)
    begun, go = threading.Event(), threading.Event()
    move = Store.move

    def slow(self: Store, old: str, new: str, *, directory: bool) -> None:
        begun.set()
        assert go.wait(10)
        move(self, old, new, directory=directory)

    monkeypatch.setattr(Store, "move", slow)
    moved = beside(lambda: kernel.rename(1, b"old", 1, b"new"))
    assert begun.wait(10)
    kernel.write(entry.nodeid, fh, 0, b"content")
    flushed = beside(lambda: kernel.flush(entry.nodeid, fh))
    lock = world.filesystems[0]._tree.nodes[entry.nodeid].lock
    while lock.acquire(blocking=False):  # until the upload has begun
        lock.release()
    assert memory.cat("/top/old/file") == b""
    go.set()
    assert moved() is None
    assert flushed() is None
    kernel.release(entry.nodeid, fh)
    assert {key: memory.cat(key) for key in memory.store} == {"/top/new/file": b"content"}
    assert kernel.read(entry.nodeid, kernel.open(entry.nodeid)[0], 0, 10) == b"content"


def test_look_at_what_is_moved_meanwhile_does_not_undo_the_move(world, memory, monkeypatch):
    memory.pipe_file("/top/old/file", b"content")
    kernel = world.kernel("memory://top", "attr_timeout=0,entry_timeout=0")
    directory = kernel.lookup(1, b"old").nodeid
    node = kernel.lookup(directory, b"file").nodeid
    info, begun, go = Store.info, threading.Barrier(3), threading.Event()

    def slow(self: Store, path: str) -> Any:
        found = info(self, path)
        if path == "/top/old/file":
            begun.wait(10)
            assert go.wait(10)
        return found

    monkeypatch.setattr(Store, "info", slow)
    looks = [beside(lambda: kernel.getattr(node)), beside(lambda: kernel.lookup(directory, b"file"))]
    begun.wait(10)
    monkeypatch.setattr(Store, "info", info)
    kernel.rename(1, b"old", 1, b"new")
    go.set()
    assert looks[0]()[0][1] == 7
    again = looks[1]()
    assert isinstance(again, OSError)
    assert again.errno == errno.ESTALE  # upon which the kernel asks again
    assert kernel.getattr(node)[0][1] == 7
    assert kernel.read(node, kernel.open(node)[0], 0, 10) == b"content"


def test_full_disk_is_an_error_that_says_which_and_loses_nothing_else(mount):
    mounted = mount(
        "memory://top",
        uid=NOBODY,
        prepare="syscalls.mount(b'tmpfs', b'/var/tmp', b'tmpfs', 0, b'size=1m')",
        said="No space left on device: /var/tmp, where what is written is kept until it is uploaded; TMPDIR",
    )
    answer = mounted.run(
        "fd = os.open(place + '/file', os.O_CREAT | os.O_RDWR)\n"
        "written = 0\n"
        "try:\n"
        "    while True: written += os.write(fd, b'x' * 100_000)\n"
        "except OSError as error: answer = [error.errno, written]\n"
        "os.close(fd)"
    )
    assert answer == [errno.ENOSPC, 1 << 20]
    assert mounted.run("answer = len(read('file'))") == 1 << 20
    mounted.run("os.unlink(place + '/file'); write('other', 'content')")
    assert mounted.run("answer = read('other')") == "content"


def test_what_a_killed_program_has_written_is_uploaded(images):
    place = images / "remote-killed"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    with mounting() as make:
        mounted = make(f"file://{place}", uid=NOBODY)
        mounted.run(
            "import subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import sys, time; "
            'file = open(sys.argv[1], "wb", 0); file.write(b"content"); print(flush=True); time.sleep(99)\', '
            "place + '/file'], stdout=subprocess.PIPE)\n"
            "child.stdout.readline()\n"
        )
        assert not (place / "file").exists()
        assert mounted.run("child.kill(); answer = child.wait(); child.stdout.close()") == -signal.SIGKILL
    assert (place / "file").read_bytes() == b"content"


# Threads


def test_threads_end_with_the_mount(memory):
    world = World()
    memory.pipe_file("/top/file", b"content")
    kernel = world.kernel("memory://top", "attr_timeout=0,entry_timeout=0")
    assert kernel.read_file(b"file") == b"content"
    ours = [thread for thread in threading.enumerate() if thread.name.startswith(("remote-", "fetch-"))]
    assert ours != []
    world.close()
    for thread in ours:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_dies_is_replaced():
    crew = Crew(1, "test")
    dead = threading.Event()

    def die() -> None:
        dead.set()
        raise RuntimeError("a bug")

    assert crew.submit(die)
    assert dead.wait(10)
    for thread in threading.enumerate():
        if thread.name.startswith("test-"):
            thread.join(10)
    done = threading.Event()
    assert crew.submit(done.set)
    assert done.wait(10)
    crew.close()
