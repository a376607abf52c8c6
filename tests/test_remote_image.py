"""Squashfs images on a web server, mounted: what is in them, and how few bytes of them are fetched."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import squashfs_images
from fusewire.cli.options import parse
from fusewire.fs.remote import is_url, open_url, storage_options
from fusewire.fs.remote.image import open_image_url
from fusewire.fs.remote.retry import Patience
from fusewire.session import Session
from fusewire.testing import FakeKernel
from remote_mounts import Mount, mounting
from remote_server import RangeServer, slow
from rootless import NOBODY

QUICK = Patience(attempts=3, timeout=5, total=10, first_pause=0.01)


@pytest.fixture
def mount() -> Iterator[Callable[..., Mount]]:
    with mounting() as make:
        yield make


@pytest.fixture(scope="module")
def big(images: Path) -> Path:
    """An image of more than 50 MiB: 600 large files that do not compress, and 3000 small ones."""
    root = images / "remote-tree"
    for number in range(30):
        directory = root / f"directory {number:02}"
        directory.mkdir(parents=True)
        (directory / "data").write_bytes(squashfs_images.noise(2 << 20, number))
        for small in range(100):
            (directory / f"small {small:02}").write_bytes(b"%d %d\n" % (number, small))
    image = squashfs_images.mksquashfs(root, images / "remote.sqsh", "-comp", "gzip", "-all-root")
    assert image.stat().st_size > 50 << 20
    return image


@pytest.fixture
def server(big: Path) -> Iterator[RangeServer]:
    with RangeServer({"/big.sqsh": big.read_bytes()}) as server:
        yield server


def open_image(url: str, options: str = "") -> Any:
    return open_image_url(url, parse(options), patience=QUICK)


def kernel_of(filesystem: Any, said: list[str] | None = None) -> FakeKernel:
    kernel = FakeKernel(Session(filesystem, log=lambda message, error: said is not None and said.append(message)))
    kernel.init()
    return kernel


@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "rootless"])
def test_small_file_of_a_large_image_costs_little(server, mount, uid):
    if uid == 0 and os.geteuid() != 0:
        pytest.skip("needs root")
    mounted = mount(server.url + "/big.sqsh", uid=uid)
    data = mounted.run("answer = read('directory 17/small 42')")
    assert data == "17 42\n"
    assert server.sent < 1_000_000
    assert server.requests < 12


def test_walk_fetches_metadata_only(server, mount):
    mounted = mount(server.url + "/big.sqsh")
    names = mounted.run("import os; answer = [n for _, d, f in os.walk(place) for n in d + f]")
    assert len(names) == 30 + 30 * 101
    sizes = mounted.run(
        "answer = sum(os.stat(os.path.join(d, n)).st_size for d, _, f in os.walk(place) for n in f if n == 'data')"
    )
    assert sizes == 30 * (2 << 20)
    assert server.sent < 600_000
    assert server.requests < 12


def test_large_file_is_read_as_it_is_with_few_requests(server, mount, big):
    mounted = mount(server.url + "/big.sqsh")
    digest = mounted.run(
        "import hashlib\n"
        "with open(place + '/directory 03/data', 'rb') as file:\n"
        "    answer = hashlib.file_digest(file, 'sha256').hexdigest()"
    )
    assert digest == hashlib.sha256(squashfs_images.noise(2 << 20, 3)).hexdigest()
    assert server.sent < (2 << 20) + (6 << 20)
    assert server.requests < 40


def test_readers_do_not_wait_for_each_other(server):
    filesystem = open_image(server.url + "/big.sqsh")
    assert filesystem.announces_blocking
    assert filesystem.workers >= 4
    filesystem.destroy()


def test_one_reader_waits_while_others_are_served(server, mount):
    mounted = mount(server.url + "/big.sqsh")
    mounted.run("import os; answer = os.listdir(place + '/directory 05')")
    server.fault = slow(0.5)
    answer = mounted.run(
        "import threading, time\n"
        "thread = threading.Thread(target=read_bytes, args=('directory 09/data',)); thread.start()\n"
        "begun = time.monotonic(); count = 0\n"
        "while thread.is_alive():\n"
        "    os.statvfs(place + '/directory 05'); count += 1\n"
        "answer = [count, time.monotonic() - begun]"
    )
    server.fault = None
    assert answer[0] > 50


def test_image_without_ranges_is_served_from_memory_if_it_is_small(small, mount):
    with RangeServer({"/small.img": small.read_bytes()}, ranges=False) as server:
        mounted = mount(server.url + "/small.img")
        assert mounted.run("answer = read('hello.txt')") == "hello world\n"
        assert server.requests == 1


def test_image_that_changes_gives_no_wrong_data(server, big):
    said: list[str] = []
    filesystem = open_image(server.url + "/big.sqsh")
    kernel = kernel_of(filesystem, said)
    directory = kernel.lookup(1, b"directory 11").nodeid
    file = kernel.lookup(directory, b"data").nodeid
    server.etag = '"changed"'
    with pytest.raises(OSError) as caught:
        kernel.read(file, 0, 0, 4096)
    assert caught.value.errno == errno.ESTALE
    assert any(server.url in line and "mount it again" in line for line in said)
    filesystem.destroy()


def test_server_that_fails_is_an_error_and_comes_back(server):
    said: list[str] = []
    filesystem = open_image(server.url + "/big.sqsh")
    kernel = kernel_of(filesystem, said)
    directory = kernel.lookup(1, b"directory 11").nodeid
    file = kernel.lookup(directory, b"data").nodeid
    server.fault = lambda handler, number: handler.plain(503)
    with pytest.raises(OSError) as caught:
        kernel.read(file, 0, 0, 4096)
    assert caught.value.errno == errno.EIO
    assert any("503" in line and server.url in line for line in said)
    server.fault = None
    assert kernel.read(file, 0, 0, 4096) == squashfs_images.noise(2 << 20, 11)[:4096]
    assert filesystem.statistics()["bytes_fetched"] > 4096
    filesystem.destroy()


def test_what_is_no_image_is_said_with_the_url(server):
    server.files["/page"] = b"<html>"
    server.files["/file.zip"] = b"PK\x03\x04" + bytes(10_000)
    for path, text in (("/page", "not a squashfs image"), ("/file.zip", "a zip archive")):
        with pytest.raises(OSError, match=text) as caught:
            open_image(server.url + path)
        assert server.url + path in str(caught.value)


def test_no_thread_is_started_before_init(server):
    import threading

    before = set(threading.enumerate())
    filesystem = open_url(server.url + "/big.sqsh", parse(""))
    new = [thread for thread in set(threading.enumerate()) - before if "process_request" not in thread.name]
    assert new == []
    filesystem.destroy()


def test_urls_are_told_from_paths():
    for url in ("https://host/x", "s3://bucket/x", "memory://", "zip://a::https://host/x.zip", "zip://::file:///x.zip"):
        assert is_url(url)
    for path in ("/a/b", "a", "./a://b", "env.sqsh:/opt/env", "://x", "", "a b://c"):
        assert not is_url(path)


def test_storage_options_are_values_by_protocol():
    words = ["anon=true", "s3.endpoint_url=http://host:1/", "s3.config_kwargs.retries=3", 'key="5"', "secret=a=b"]
    assert storage_options(words) == {
        "anon": True,
        "s3": {"endpoint_url": "http://host:1/", "config_kwargs": {"retries": 3}},
        "key": "5",
        "secret": "a=b",
    }
    for wrong in ("anon", "=5", "a..b=1", ".a=1"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            storage_options([wrong])
    with pytest.raises(ValueError, match="has a value"):
        storage_options(["a=1", "a.b=2"])
