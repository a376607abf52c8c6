"""One file on a web server, read by ranges: the standard library's http.client, and nothing else.

Layer `fs`, part of `fs.remote`. It caches no data; `blocks` does. Requests are GETs only, so each may be repeated.
RFC 9110 is what it goes by: Range and Content-Range (14), validators (8.8), redirects (15.4).
"""

from __future__ import annotations

import errno
import http.client
import io
import os
import ssl
from _thread import allocate_lock
from base64 import b64encode
from threading import Event
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from fusewire.fs.remote import shown
from fusewire.fs.remote.retry import Patience, Transient, persist

# A server without ranges: files up to this size are kept in memory as a whole. Bytes.
SMALL = 4 << 20
_FIRST = 1 << 16  # what the first request asks for
_REDIRECTS = 10
_IDLE = 8  # connections that are kept
_PIECE = 1 << 16
_MOVED = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED = {
    401: (errno.EACCES, "the server wants a name and a password (https://NAME:PASSWORD@HOST/...)"),
    403: (errno.EACCES, "the server refuses access"),
    404: (errno.ENOENT, "there is no such file on the server"),
    407: (errno.EACCES, "the proxy wants a name and a password (in https_proxy)"),
    410: (errno.ENOENT, "the file is gone from the server"),
}
_SAFE = "%/:=&?~#+!$,;'@()*[]"


class _Place(NamedTuple):
    """Where a request goes: `url` is for messages, `authorization` for this host only."""

    scheme: str
    host: str
    port: int
    path: str
    authorization: str
    url: str


class _Refused(OSError):  # noqa: N818 - it is told from other errors here only
    """An answer that says no: for good, if it was not that of a place where a redirect has led some time ago."""


class _Timed(io.RawIOBase):
    """What a server sends, until a moment: drop by drop, each in time, it could go on for ever."""

    def __init__(self, raw: io.RawIOBase, seconds: float) -> None:
        self._raw = raw
        self._seconds = seconds
        self._until = monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if monotonic() > self._until:
            raise TimeoutError(f"no whole answer within {self._seconds:g} s")
        return self._raw.readinto(buffer)  # type: ignore[no-any-return, attr-defined, unused-ignore]

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Responses:
    """Makes the responses of a connection, each of which is to end within that many seconds."""

    __slots__ = ("_last", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last: http.client.HTTPResponse | None = None

    def __call__(self, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
        self._last = response = http.client.HTTPResponse(*arguments, **options)
        response.fp = io.BufferedReader(_Timed(response.fp.detach(), self._seconds))
        return response

    def close(self) -> None:
        if self._last is not None:
            self._last.close()


def _place(url: str, base: str = "") -> _Place:
    try:
        parts = urlsplit(urljoin(base, url) if base else url)
        port = parts.port
    except ValueError as error:
        raise OSError(errno.EINVAL, f"{shown(url)}: not a URL: {error}") from None
    url = parts.geturl()
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OSError(errno.EINVAL, f"{shown(url)}: not the URL of a file on a web server (https://HOST/PATH)")
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + b64encode(pair.encode()).decode()
    path = quote(parts.path or "/", _SAFE) + ("?" + quote(parts.query, _SAFE) if parts.query else "")
    default = 443 if parts.scheme == "https" else 80
    return _Place(parts.scheme, parts.hostname, port or default, path, authorization, shown(url))


class _Answer(NamedTuple):
    """What matters of a response that is no error. `total` is the file's size, -1 if it was not said."""

    status: int
    data: bytes
    start: int
    total: int
    validators: tuple[str, str]


class HttpFile:
    """A file at an http or https URL, of which any range can be had. `size` in bytes.

    Redirects are followed anew once their target refuses (signed URLs run out). Proxies are those of the environment.
    """

    def __init__(self, url: str, patience: Patience | None = None, *, small: int = SMALL) -> None:
        """Ask for the beginning, which tells size, version and whether there are ranges.

        Raises OSError that names the URL: ENOENT, EACCES, ETIMEDOUT, EIO; EOPNOTSUPP for a server without ranges.
        """
        self._origin = _place(url)
        self.url = self._origin.url
        self._target = self._origin
        self._patience = patience or Patience()
        self._lock = allocate_lock()
        self._idle: list[tuple[tuple[str, str, int], http.client.HTTPConnection]] = []
        self._pid = os.getpid()
        self._closed = Event()
        self._ssl: ssl.SSLContext | None = None
        self._changed = False
        self._small = small
        self._validators = ("", "")
        self.size = -1
        self.requests = 0
        self.received = 0  # bytes of bodies
        self.whole: bytes | None = None
        """All of it, from a server that gives no ranges."""
        try:
            answer = self._persist(0, _FIRST)
        except BaseException:
            self.close()
            raise
        self._validators = answer.validators
        self.beginning = answer.data
        """As much of it as came with the first answer."""
        if answer.status == 200:
            self.whole = answer.data
            self.size = len(answer.data)
        else:
            self.size = answer.total

    def fetch(self, offset: int, length: int) -> bytes:
        """Give exactly `length` bytes at `offset`, which lie within the file.

        Raises OSError that names the URL: ESTALE once the file is another one than at the beginning, EIO, ETIMEDOUT,
        EACCES, ENOENT.
        """
        if self.whole is not None:
            return self.whole[offset : offset + length]
        if self._changed:
            raise self._stale("it has changed")
        return self._persist(offset, length).data

    def _stale(self, what: str) -> OSError:
        self._changed = True
        return OSError(errno.ESTALE, f"{self.url}: {what} since it was mounted; mount it again")

    def _persist(self, offset: int, length: int) -> _Answer:
        return persist(lambda: self._attempt(offset, length), self._patience, self._closed.wait, self.url)

    def _attempt(self, offset: int, length: int) -> _Answer:
        """Send one request, and those that redirects make of it."""
        place = remembered = self._target
        for _ in range(_REDIRECTS + 1):
            try:
                answer, location = self._exchange(place, offset, length)
            except (_Refused, Transient) as error:
                if remembered is self._origin:
                    raise
                self._target = self._origin  # it may lead elsewhere by now
                if place is not remembered or isinstance(error, Transient):
                    raise
                place = remembered = self._origin
                continue
            if answer is not None:
                self._target = place
                return answer
            following = _place(location, f"{place.scheme}://{_netloc(place)}{place.path}")
            if place.scheme == "https" and following.scheme == "http":
                raise OSError(errno.EACCES, f"{self.url}: the server leads to {following.url}, which is not encrypted")
            if not following.authorization and _same_host(place, following):
                following = following._replace(authorization=place.authorization)
            place = following
        raise OSError(errno.ELOOP, f"{self.url}: more than {_REDIRECTS} redirects")

    def _exchange(self, place: _Place, offset: int, length: int) -> tuple[_Answer | None, str]:
        """Send one request: an answer, or where else to ask."""
        key = (place.scheme, place.host, place.port)
        headers = {
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",
            "User-Agent": "fusewire",
        }
        if place.authorization:
            headers["Authorization"] = place.authorization
        proxy = _proxy(place)
        path = place.path
        if proxy is not None and place.scheme == "http":
            path = f"http://{_netloc(place)}{place.path}"
            if proxy.authorization:
                headers["Proxy-Authorization"] = proxy.authorization
        connection = kept = self._take(key)
        usable = False
        try:
            if connection is None:
                connection = self._connect(place, proxy)
            try:
                response = self._ask(connection, path, headers)
            except (http.client.HTTPException, OSError) as error:
                if kept is None or isinstance(error, TimeoutError):
                    raise
                # The server has closed the idle connection meanwhile, and with it probably the others.
                connection.close()
                self._drop_idle()
                connection = self._connect(place, proxy)
                response = self._ask(connection, path, headers)
            answer, location = self._judge(response, offset, length)
            usable = not response.will_close and response.isclosed()
            return answer, location
        except (http.client.HTTPException, OSError, UnicodeError) as error:
            if isinstance(error, OSError) and (error.strerror or "").startswith(self.url):
                raise  # what we made of an answer
            raise self._failure(place, error) from error
        finally:
            if usable and connection is not None:
                self._keep(key, connection)
            elif connection is not None:
                connection.close()
                # It has let go of one that says `Connection: close`, and of a proxy's that refuses.
                connection.response_class.close()  # type: ignore[call-arg]

    def _ask(
        self, connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        self.requests += 1
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def _failure(self, place: _Place, error: Exception) -> Exception:
        import socket

        if isinstance(error, ssl.SSLCertVerificationError):
            text = (
                f"the certificate of {place.host} does not hold: {error.verify_message} (own authority: SSL_CERT_FILE)"
            )
            return OSError(errno.EACCES, f"{self.url}: {text}")
        if isinstance(error, socket.gaierror):
            if error.errno == socket.EAI_AGAIN:
                return Transient(f"the address of {place.host} cannot be found now: {error.strerror}")
            return _Refused(errno.EHOSTUNREACH, f"{self.url}: no such host: {place.host} ({error.strerror})")
        if isinstance(error, TimeoutError):
            text = str(error) if error.args and not error.errno else ""
            slow = text if text.startswith("no whole") else f"no answer within {self._patience.timeout:g} s"
            return Transient(f"{place.host}: {slow}", timed_out=True)
        if isinstance(error, (http.client.InvalidURL, UnicodeError)):
            return OSError(errno.EINVAL, f"{self.url}: `{place.host}` cannot be the name of a host")
        tunnel = str(error).removeprefix("Tunnel connection failed: ")
        if tunnel != str(error) and _number(tunnel[:3]) not in _PASSING:
            return OSError(
                errno.EACCES, f"{self.url}: the proxy of the environment refuses: HTTP status {_clean(tunnel)}"
            )
        if isinstance(error, http.client.IncompleteRead):
            return Transient("the connection ended in the middle of an answer")
        return Transient(f"no answer from {place.host}: {_clean(str(error)) or type(error).__name__}")

    def _judge(self, response: http.client.HTTPResponse, offset: int, length: int) -> tuple[_Answer | None, str]:
        status = response.status
        if status in _MOVED:
            location = response.getheader("Location", "")
            if not location:
                raise OSError(errno.EIO, f"{self.url}: a redirect (HTTP {status}) to nowhere")
            self._read(response, _PIECE)
            return None, location
        validators = (response.getheader("ETag", ""), response.getheader("Last-Modified", ""))
        if status in (200, 206) and response.getheader("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise OSError(errno.EOPNOTSUPP, f"{self.url}: the server compresses the file on its way; {_WAY_OUT}")
        if status == 206:
            return self._partial(response, offset, length, validators), ""
        if status == 200:
            return self._all(response, validators), ""
        self._read(response, _PIECE)
        if status == 416:
            total = _number(response.getheader("Content-Range", "").removeprefix("bytes */"))
            if self.size < 0 and total == 0:
                return _Answer(206, b"", 0, 0, validators), ""
            raise self._stale("it has become shorter" if self.size >= 0 else "it cannot be read from the beginning on")
        if status in _PASSING:
            after = _number(response.getheader("Retry-After", ""))
            raise Transient(f"HTTP status {status} ({_clean(response.reason)})", after=max(after, 0))
        code, text = _REFUSED.get(status, (errno.EIO, "the server gives something else than a file"))
        raise _Refused(code, f"{self.url}: HTTP status {status}: {text}")

    def _partial(
        self, response: http.client.HTTPResponse, offset: int, length: int, validators: tuple[str, str]
    ) -> _Answer:
        said = response.getheader("Content-Range", "")
        unit, _, rest = said.partition(" ")
        span, _, total_text = rest.partition("/")
        start_text, _, last_text = span.partition("-")
        start, last, total = _number(start_text), _number(last_text), _number(total_text)
        wanted = min(length, total - offset) if total >= 0 else length
        if unit != "bytes" or start != offset or last != offset + wanted - 1 or total < 0:
            raise Transient(f"an answer of other bytes than asked for (Content-Range: {_clean(said) or 'missing'})")
        self._compare(validators, total)
        data = self._read(response, wanted + 1)
        if len(data) != wanted:
            raise Transient(f"{len(data)} bytes at {offset} where {wanted} were promised")
        return _Answer(206, data, offset, total, validators)

    def _compare(self, validators: tuple[str, str], total: int) -> None:
        """See that it is still the same file. A validator that one of both answers lacks says nothing."""
        if self.size < 0:
            return
        differs = any(old and new and old != new for old, new in zip(self._validators, validators, strict=True))
        if differs or total != self.size:
            raise self._stale("it has changed on the server")

    def _all(self, response: http.client.HTTPResponse, validators: tuple[str, str]) -> _Answer:
        """Take the whole file from a server without ranges, if it is small."""
        if self.size >= 0:
            raise Transient("the server suddenly gives no ranges any more")
        size = _number(response.getheader("Content-Length", ""))
        data = self._read(response, self._small + 1) if size <= self._small else b""
        if size > self._small or len(data) > self._small:
            much = f"{size / (1 << 20):.0f} MiB" if size >= 0 else f"more than {self._small >> 20} MiB"
            raise OSError(errno.EOPNOTSUPP, f"{self.url}: the server gives no ranges of a file of {much}; {_WAY_OUT}")
        if size >= 0 and len(data) != size:
            raise Transient(f"{len(data)} bytes where {size} were promised")
        return _Answer(200, data, 0, len(data), validators)

    def _read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """Read a body, `most` bytes of it."""
        parts: list[bytes] = []
        length = 0
        while length < most and (part := response.read1(min(_PIECE, most - length))):
            parts.append(part)
            length += len(part)
            self.received += len(part)
        if length < most and not response.length:
            response.close()  # it is at its end, so that the connection can be used again
        return b"".join(parts)

    # Connections

    def _connect(self, place: _Place, proxy: _Place | None) -> http.client.HTTPConnection:
        host, port = (place.host, place.port) if proxy is None else (proxy.host, proxy.port)
        connection: http.client.HTTPConnection
        if place.scheme == "http":
            connection = http.client.HTTPConnection(host, port, timeout=self._patience.timeout)
        else:
            if self._ssl is None:
                self._ssl = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=self._patience.timeout, context=self._ssl)
            if proxy is not None:
                secret = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
                connection.set_tunnel(place.host, place.port, secret)
        connection.response_class = _Responses(self._patience.total)  # type: ignore[assignment]
        return connection

    def _take(self, key: tuple[str, str, int]) -> http.client.HTTPConnection | None:
        if self._pid != os.getpid():
            # A forked child has its parent's connections: they are the parent's to use.
            self._drop_idle()
            self._pid = os.getpid()
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index][0] == key:
                    return self._idle.pop(index)[1]
        return None

    def _keep(self, key: tuple[str, str, int], connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < _IDLE and not self._closed.is_set():
                self._idle.append((key, connection))
                return
        connection.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections; whoever waits for another attempt gives up."""
        self._closed.set()
        self._drop_idle()


_WAY_OUT = "download it and mount the copy, or let a server with ranges give it (nginx, Apache, any object store)"


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1


def _clean(text: str) -> str:
    """Make what a server says fit for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])


def _netloc(place: _Place) -> str:
    host = f"[{place.host}]" if ":" in place.host else place.host
    default = 443 if place.scheme == "https" else 80
    return host if place.port == default else f"{host}:{place.port}"


def _same_host(one: _Place, other: _Place) -> bool:
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def _proxy(place: _Place) -> _Place | None:
    """The proxy that the environment names for a host: http_proxy, https_proxy, all_proxy, no_proxy."""
    from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

    proxies = getproxies_environment()
    url = proxies.get(place.scheme) or proxies.get("all")
    if not url or proxy_bypass_environment(f"{place.host}:{place.port}", proxies):
        return None
    url = url if "://" in url else f"http://{url}"
    if not url.startswith("http://"):
        way_out = "set http_proxy and https_proxy to an http:// one, or no_proxy"
        raise OSError(errno.EINVAL, f"{place.url}: {shown(url)} of the environment is no http proxy; {way_out}")
    return _place(url)
