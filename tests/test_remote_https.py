"""Files behind https: certificates, redirects between http and https, tunnels, and servers that do their worst."""

from __future__ import annotations

import errno
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from fusewire.fs.remote import shown, visible
from fusewire.fs.remote.http import HttpFile
from fusewire.fs.remote.retry import Patience
from remote_server import RangeServer, certificate

DATA = random.Random(2).randbytes(300_000)
QUICK = Patience(attempts=3, timeout=3, total=10, first_pause=0.01)

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed, to make certificates"
)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, pem: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))


@pytest.fixture
def secure(pem: Path) -> Iterator[RangeServer]:
    with RangeServer({"/file": DATA}, certificate=pem) as server:
        yield server


@pytest.fixture
def plain() -> Iterator[RangeServer]:
    with RangeServer({"/file": DATA}) as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Callable[..., HttpFile]]:
    files: list[HttpFile] = []

    def open_file(url: str, patience: Patience = QUICK) -> HttpFile:
        files.append(HttpFile(url, patience))
        return files[-1]

    yield open_file
    for file in files:
        file.close()


def fails(number: int, function, *arguments) -> str:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


# Certificates


def test_certificate_of_an_own_authority_is_trusted_by_the_environment(secure, trusted, opened):
    file = opened(secure.url + "/file")
    assert file.size == len(DATA)
    assert file.fetch(200_000, 50) == DATA[200_000:200_050]


def test_certificate_that_nobody_trusts_is_refused_with_the_way_out(secure, opened):
    text = fails(errno.EACCES, opened, secure.url + "/file")
    assert secure.url + "/file" in text
    assert "SSL_CERT_FILE" in text
    assert secure.requests == 0


def test_certificate_of_another_host_is_refused(secure, trusted, opened):
    assert "127.0.0.1" in fails(errno.EACCES, opened, secure.url.replace("localhost", "127.0.0.1") + "/file")
    assert secure.requests == 0


def test_server_that_speaks_no_tls_is_an_error_with_its_url(plain, opened):
    url = plain.url.replace("http:", "https:") + "/file"
    assert url in fails(errno.EIO, opened, url)


# Redirects


def test_redirect_to_https_is_followed_without_the_password(plain, secure, trusted, opened):
    plain.fault = lambda handler, number: handler.plain(301, Location=secure.url + "/file")
    file = opened(plain.url.replace("//", "//me:secret@") + "/link")
    assert file.fetch(5, 10) == DATA[5:15]
    assert "Authorization" in plain.headers[0]
    assert not any("Authorization" in headers for headers in secure.headers)


def test_redirect_to_http_is_refused(plain, secure, trusted, opened):
    secure.fault = lambda handler, number: handler.plain(302, Location=plain.url + "/file")
    text = fails(errno.EACCES, opened, secure.url.replace("//", "//me:secret@") + "/link")
    assert "not encrypted" in text
    assert "secret" not in text
    assert plain.requests == 0


def test_redirect_to_another_https_server_gets_no_password(pem, secure, trusted, opened):
    with RangeServer({"/file": DATA}, certificate=pem) as other:
        secure.fault = lambda handler, number: handler.plain(307, Location=other.url + "/file")
        assert opened(secure.url.replace("//", "//me:secret@") + "/link").size == len(DATA)
        assert "Authorization" in secure.headers[0]
        assert "Authorization" not in other.headers[0]


@pytest.mark.parametrize(
    "location", ["http://[half/x", "http://a..b/x", "http://a b/x", "http://h:99999/", "ftp://host/x"]
)
def test_redirect_to_nonsense_is_an_error_and_no_crash(plain, opened, location):
    plain.fault = lambda handler, number: handler.plain(302, Location=location)
    fails(errno.EINVAL, opened, plain.url + "/link")


def test_names_of_hosts_that_cannot_be_are_errors_with_the_url(opened):
    for url in ("http://a..b/x", "http://a b/x", "http://[half/x", f"http://{'a' * 64}.b/x"):
        assert url in fails(errno.EINVAL, opened, url)


def test_what_a_server_says_cannot_write_on_the_terminal(plain, opened):
    plain.fault = lambda handler, number: handler.plain(302, Location="ftp://host/\x1b[2J\x07")
    text = fails(errno.EINVAL, opened, plain.url + "/link")
    assert "\x1b" not in text
    assert "\x07" not in text


def test_old_redirects_that_refuse_many_readers_at_once_are_asked_anew_by_each(plain, opened):
    begun = threading.Barrier(4)

    def fault(handler: Any, number: int) -> bool:
        if handler.path == "/link":
            return bool(handler.plain(302, Location="/file?2" if number > 2 else "/file?1"))
        if handler.path == "/file?1" and number > 2:
            begun.wait(10)
            return bool(handler.plain(403))
        return False

    plain.fault = fault
    file = opened(plain.url + "/link")
    got: list[Any] = []

    def read() -> None:
        try:
            got.append(file.fetch(70_000, 10))
        except OSError as error:
            got.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [DATA[70_000:70_010]] * 4


def test_target_of_a_redirect_that_has_gone_away_is_asked_for_anew(plain, opened):
    with RangeServer({"/file": DATA}) as other:
        plain.fault = lambda handler, number: (
            handler.path == "/link" and handler.plain(302, Location=other.url + "/file")
        )
        file = opened(plain.url + "/link")
        assert file.fetch(5, 10) == DATA[5:15]
    file._drop_idle()
    plain.fault = lambda handler, number: handler.path == "/link" and handler.plain(302, Location="/file")
    assert file.fetch(50, 10) == DATA[50:60]


# Proxies


class Tunnel:
    """A proxy for CONNECT, one connection after the other. `status`: what it says."""

    def __init__(self, status: str = "200 Yes") -> None:
        self.status = status
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://user:word@127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    part = client.recv(1000)
                    if not part:
                        return  # it is to end
                    head += part
                self.asked.append(head)
                client.sendall(f"HTTP/1.1 {self.status}\r\n\r\n".encode())
                if not self.status.startswith("200"):
                    continue
                host, _, port = head.split()[1].decode().rpartition(":")
                with socket.create_connection((host, int(port))) as server:
                    back = threading.Thread(target=self._carry, args=(server, client))
                    back.start()
                    self._carry(client, server)
                    back.join()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while part := source.recv(65536):
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()


def test_https_goes_through_the_tunnel_of_a_proxy(secure, trusted, monkeypatch):
    with Tunnel() as tunnel:
        monkeypatch.setenv("https_proxy", tunnel.url)
        monkeypatch.setenv("no_proxy", "")
        file = HttpFile(secure.url.replace("//", "//me:secret@") + "/file", QUICK)
        assert file.fetch(5, 10) == DATA[5:15]
        file.close()
        assert b"Proxy-Authorization: Basic dXNlcjp3b3Jk" in tunnel.asked[0]
        assert b"\r\nAuthorization" not in tunnel.asked[0]
        assert "Proxy-Authorization" not in secure.headers[0]


def test_proxy_that_refuses_is_said_and_not_asked_again(secure, trusted, monkeypatch, opened):
    with Tunnel("407 Who are you") as tunnel:
        monkeypatch.setenv("https_proxy", tunnel.url)
        text = fails(errno.EACCES, opened, secure.url + "/file")
        assert "proxy" in text
        assert "407" in text
        assert len(tunnel.asked) == 1


def test_proxy_of_another_kind_is_refused_with_the_way_out(plain, monkeypatch, opened):
    for url in ("socks5://me:secret@host:1080", "https://me:secret@host"):
        monkeypatch.setenv("all_proxy", url)
        text = fails(errno.EINVAL, opened, plain.url + "/file")
        assert "no_proxy" in text
        assert "secret" not in text


# Hostile servers


def test_answer_that_comes_drop_by_drop_is_not_waited_for_without_end(plain, opened):
    """Each drop comes in time; in the head of an answer as in its body."""
    file = opened(plain.url + "/file")
    file._patience = Patience(attempts=1, timeout=2, total=0.3)
    over = threading.Event()

    def head(handler: Any, number: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 206 Partial\r\nX: ")
        while not over.wait(0.05):
            handler.wfile.write(b"x")
        return bool(handler.drop())

    def body(handler: Any, number: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 206 x\r\nContent-Range: bytes 5-14/300000\r\nContent-Length: 10\r\n\r\n")
        while not over.wait(0.2):
            handler.wfile.write(b"x")
        return bool(handler.drop())

    try:
        for fault in (head, body):
            plain.fault = fault
            file._drop_idle()
            assert "no whole answer within 0.3 s" in fails(errno.ETIMEDOUT, file.fetch, 5, 10)
    finally:
        over.set()


@pytest.mark.parametrize("status", [200, 206])
def test_compressed_answer_is_refused_with_the_way_out(plain, opened, status):
    plain.fault = lambda handler, number: handler.plain(
        status, b"x" * 100, Content_Encoding="gzip", Content_Range="bytes 0-99/100"
    )
    assert "compresses" in fails(errno.EOPNOTSUPP, opened, plain.url + "/file")
    assert plain.requests == 1


def test_whole_file_in_the_place_of_a_range_is_not_taken_in(plain, opened):
    file = opened(plain.url + "/file")
    received = file.received
    plain.files["/file"] = bytes(50 << 20)
    plain.ranges_given = False
    assert "no ranges any more" in fails(errno.EIO, file.fetch, 5, 10)
    assert file.received == received


def test_body_that_does_not_end_is_cut(plain, opened):
    def fault(handler: Any, number: int) -> bool:
        handler.wfile.write(b"HTTP/1.1 200 x\r\n\r\n")
        while True:
            handler.wfile.write(bytes(1 << 20))

    plain.fault = fault
    assert "more than 4 MiB" in fails(errno.EOPNOTSUPP, opened, plain.url + "/file")


def test_sizes_that_cannot_be_are_refused_or_end_in_errors(plain, opened):
    for said in ("bytes 0-65535/99999999999999999999999", "bytes 0-65535/-5", "bytes 0-65535/65535"):
        plain.fault = lambda handler, number, said=said: handler.answer(say=said)
        fails(errno.EIO, opened, plain.url + "/file")
    plain.fault = lambda handler, number: handler.answer(say="bytes 0-65535/9999999999999999999")
    file = opened(plain.url + "/file")
    plain.fault = None
    fails(errno.ESTALE, file.fetch, 1 << 62, 10)


# Messages


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:secret@host:1/x?key=hidden#f", "https://host:1/x?..."),
        ("https://token@host", "https://host"),
        ("http://me:secret@[half/x", "http://[half/x"),
        ("https://me:secret@host:99999/x", "https://host:99999/x"),
        ("sftp://me:secret@host/x", "sftp://me@host/x"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("github://org:repository@branch/x", "github://org:repository@branch/x"),
        ("zip://a::https://me:secret@host/x?key=hidden", "zip://a::https://host/x?..."),
        ("memory://", "memory://"),
    ],
)
def test_url_is_said_without_its_secrets(url, said):
    assert visible(url) == said
    if "::" not in url:
        assert shown(url) == said
