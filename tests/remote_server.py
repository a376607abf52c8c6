"""A web server with ranges in this process that counts what it sends, and that can be told to misbehave.

with RangeServer({"/image": data}) as server:
    ...server.url + "/image"
"""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

Fault = Callable[["Handler", int], bool]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 20

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.requests += 1
            owner.ranges.append((self.path, self.headers.get("Range", "")))
            owner.headers.append(dict(self.headers))
            number = owner.requests
            owner.working += 1
            owner.at_once = max(owner.at_once, owner.working)
        try:
            if owner.fault is None or not owner.fault(self, number):
                self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with owner.lock:
                owner.working -= 1

    def plain(self, status: int, body: bytes = b"", **headers: str) -> bool:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def drop(self) -> bool:
        """End the connection without an answer."""
        self.close_connection = True
        return True

    def answer(self, *, body: bool = True, say: str | None = None, cut: int | None = None) -> bool:
        owner = self.server.owner
        path = unquote(self.path.partition("?")[0])
        data = owner.files.get(path)
        if data is None:
            return self.plain(404, b"" if self.command == "HEAD" else b"no such file\n")
        start, stop, status = 0, len(data), 200
        asked = self.headers.get("Range", "")
        if asked and owner.ranges_given:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            status = 206
            if start >= len(data):
                return self.plain(416, Content_Range=f"bytes */{len(data)}")
        part = data[start:stop]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        if path in owner.types:
            self.send_header("Content-Type", owner.types[path])
        if status == 206:
            self.send_header("Content-Range", say or f"bytes {start}-{stop - 1}/{len(data)}")
        if owner.ranges_given:
            self.send_header("Accept-Ranges", "bytes")
        if owner.etag:
            self.send_header("ETag", owner.etag)
        self.end_headers()
        if body:
            if cut is not None:
                part = part[:cut]
                self.close_connection = True
            self.wfile.write(part)
            with owner.lock:
                owner.sent += len(part)
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: RangeServer

    def handle_error(self, *_: Any) -> None:
        pass


class RangeServer:
    """`files`: path -> content. `fault(handler, number of the request)` is True if it has answered itself.

    `certificate`: a file as `certificate()` makes it, for https at localhost.
    """

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True, certificate: Path | None = None) -> None:
        self.files = files
        self.types: dict[str, str] = {}
        self.ranges_given = ranges
        self.etag = '"1"'
        self.fault: Fault | None = None
        self.lock = threading.Lock()
        self.working = 0
        self.reset()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.owner = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake belongs to the connection's thread: its first read.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            self.url = f"https://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Begin to count anew."""
        self.requests = self.sent = self.at_once = 0  # not `working`: who has just answered still counts himself out
        self.ranges: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def certificate(place: Path) -> Path:
    """Make a certificate of nobody's for localhost, and its key, by the openssl tool: what SSL_CERT_FILE may name."""
    place.mkdir(mode=0o755, exist_ok=True)
    found = place / "localhost.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    words += ["-keyout", str(place / "key.pem"), "-out", str(found)]
    subprocess.run(words, check=True, capture_output=True)
    found.write_bytes(found.read_bytes() + (place / "key.pem").read_bytes())
    found.chmod(0o644)
    return found


def meet(count: int, seconds: float = 5.0) -> Fault:
    """A fault that lets requests wait until so many are there at once, then answers them all as usual."""
    barrier = threading.Barrier(count)

    def fault(handler: Handler, number: int) -> bool:
        try:
            barrier.wait(seconds)
        except threading.BrokenBarrierError:
            pass
        return False

    return fault


def slow(seconds: float) -> Fault:
    """A fault that makes every answer take that long."""

    def fault(handler: Handler, number: int) -> bool:
        time.sleep(seconds)
        return False

    return fault
