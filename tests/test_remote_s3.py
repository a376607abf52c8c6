"""Buckets of S3 (moto's server in this process), mounted: read, written, and a squashfs image in one."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fusewire.cli.options import parse
from fusewire.fs.remote import open_url
from remote_mounts import Mount, mounting

pytest.importorskip("s3fs", reason="s3fs is not installed")
pytest.importorskip("moto", reason="moto[server] is not installed")

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port
    yield f"http://127.0.0.1:{port}"
    process.communicate()


@pytest.fixture
def storage(endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "key": "key", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}}


@pytest.fixture
def bucket(storage: dict[str, Any]) -> Iterator[Any]:
    """What does boto3 call it: the bucket, seen without fsspec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import boto3

        resource = boto3.resource(
            "s3",
            endpoint_url=storage["endpoint_url"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        found = resource.Bucket("bucket")
        found.create()
        yield found
        found.objects.all().delete()
        found.delete()
        resource.meta.client.close()


@pytest.fixture
def mount(storage: dict[str, Any]) -> Iterator[Callable[..., Mount]]:
    with mounting() as make:
        yield lambda url, **more: make(url, storage=storage, warnings="default", **more)


def keys(bucket: Any) -> list[str]:
    return sorted(item.key for item in bucket.objects.all())


def content(bucket: Any, key: str) -> bytes:
    return bucket.Object(key).get()["Body"].read()


def test_bucket_is_read_by_ranges(bucket, mount):
    data = os.urandom(1 << 20) * 3
    bucket.put_object(Key="top/directory/file", Body=data)
    bucket.put_object(Key="top/small", Body=b"hello")
    bucket.put_object(Key="other", Body=b"x")
    mounted = mount("s3://bucket/top")
    assert mounted.run("answer = sorted(os.path.join(d, n)[len(place):] for d, _, f in os.walk(place) for n in f)") == [
        "/directory/file",
        "/small",
    ]
    assert mounted.run("answer = read('small')") == "hello"
    assert mounted.run("answer = os.stat(place + '/directory/file').st_size") == 3 << 20
    got = mounted.run(
        "with open(place + '/directory/file', 'rb') as file: file.seek(2000000); answer = file.read(10).hex()"
    )
    assert bytes.fromhex(got) == data[2_000_000:2_000_010]
    assert mounted.run("import hashlib; answer = hashlib.sha256(read_bytes('directory/file')).hexdigest()") == (
        hashlib.sha256(data).hexdigest()
    )


def test_bucket_is_written(bucket, mount):
    mounted = mount("s3://bucket/top")
    mounted.run("os.mkdir(place + '/new'); os.mkdir(place + '/new/empty')")
    assert mounted.run("answer = os.listdir(place + '/new')") == ["empty"]
    mounted.run("write('new/file', 'content'); write('new/file', ' and more', 'ab')")
    assert content(bucket, "top/new/file") == b"content and more"
    mounted.run("os.rename(place + '/new/file', place + '/new/empty/moved')")
    assert keys(bucket) == ["top/new/empty/moved"]
    mounted.run("os.rename(place + '/new', place + '/other')")
    assert keys(bucket) == ["top/other/empty/moved"]
    assert mounted.run("answer = read('other/empty/moved')") == "content and more"
    mounted.run("os.unlink(place + '/other/empty/moved')")
    assert keys(bucket) == []
    assert mounted.run("answer = os.listdir(place + '/other')") == ["empty"]
    mounted.run("os.rmdir(place + '/other/empty'); os.rmdir(place + '/other')")
    assert mounted.run("answer = os.listdir(place)") == []


def test_large_file_is_uploaded_in_parts(bucket, mount):
    mounted = mount("s3://bucket")
    mounted.run("import shutil; write('big', 'abcdefgh' * (20 << 17)); shutil.copy(place + '/big', place + '/copy')")
    assert bucket.Object("copy").content_length == 20 << 20
    assert "-" in bucket.Object("big").e_tag
    assert content(bucket, "copy") == b"abcdefgh" * (20 << 17)


def test_object_that_changes_is_stale(bucket, mount):
    bucket.put_object(Key="file", Body=os.urandom(1 << 20) * 4)
    mounted = mount("s3://bucket", said="it has changed")
    mounted.run("space = open(place + '/file', 'rb', buffering=0); space.read(10)")
    bucket.put_object(Key="file", Body=os.urandom(1 << 20) * 4)
    got = mounted.run(
        "answer = 0\n"
        "try: os.pread(space.fileno(), 10, 3 << 20)\n"
        "except OSError as error: answer = error.errno\n"
        "space.close()"
    )
    assert got in (errno.ESTALE, errno.EIO)


def test_object_that_others_change_is_seen_after_its_directory_was_listed(bucket, mount):
    bucket.put_object(Key="file", Body=b"old")
    mounted = mount("s3://bucket", options="attr_timeout=0,entry_timeout=0,negative_timeout=0")
    assert mounted.run("answer = [read(name) for name in os.listdir(place)]") == ["old"]
    bucket.put_object(Key="file", Body=b"newer")
    assert mounted.run("answer = [os.stat(place + '/file').st_size, read('file')]") == [5, "newer"]


def test_image_in_a_bucket_is_mounted_without_downloading_it(bucket, mount, small):
    bucket.put_object(Key="env.sqsh", Body=small.read_bytes())
    mounted = mount("s3://bucket/env.sqsh")
    assert mounted.run("answer = read('hello.txt')") == "hello world\n"


def test_missing_bucket_is_said(bucket, storage):
    found = parse("")
    options = type("Options", (), {name: getattr(found, name) for name in dir(found) if not name.startswith("_")})()
    options.storage = storage
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        open_url("s3://no-such-bucket/x.sqsh", options)
