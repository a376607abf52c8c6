"""An fsspec filesystem with calls that wait and fail as system calls do.

Layer `fs`, part of `fs.remote`, and the only place that loads fsspec. Filesystems that are async run on fsspec's own
loop, where any number of requests wait beside each other; the others run in the thread that calls. Only reading is
tried again. It keeps nothing: caches are in `filesystem` and `blocks`.
"""

from __future__ import annotations

import errno
import os
from ssl import SSLCertVerificationError
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from fusewire.fs.remote import visible
from fusewire.fs.remote.http import SMALL
from fusewire.fs.remote.looks import Info, info_of, same
from fusewire.fs.remote.retry import Patience, Transient, persist
from fusewire.wire.requests import is_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What is written in one call; larger files go piece by piece (a multipart upload, where that is meant).
_PIECE = 8 << 20
# Of the builtin OSErrors, those that say something about the file: not the network's.
_ABOUT_FILES = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
}
_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT, 416: errno.ESTALE}
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
# A commit does not change, and requests are counted. (fsspec's filesystem can remove files, but write none.)
_COMMITS = ("github",)


def _container(fs: Any) -> tuple[Any, str, Info] | None:
    """Give the filesystem, the path and the looks of the file that an archive is in; None for what is no archive."""
    file = getattr(fs, "fo", None)
    below, path = getattr(file, "fs", None), getattr(file, "path", None)
    if not isinstance(path, str) or below is None:
        return None
    return below, path, info_of(path, below.info(path))


class Store:
    """The files below `root` of an fsspec filesystem. Every method raises OSError that names the URL and the file."""

    def __init__(self, url: str, storage: Mapping[str, Any], patience: Patience | None = None) -> None:
        """Connect. It may start fsspec's thread: not in a process that is to fork.

        Raises OSError: ENOPKG for a package that is missing, EINVAL for what is no URL of fsspec's.
        """
        self.url = visible(url)
        self._patience = patience or Patience()
        self._closed = Event()
        self.fs, path = _connect(url, self.url, storage)
        protocol = self.fs.protocol
        self.protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
        # A page of links: names are escaped, whether one is a directory stands in its parent's listing only.
        self.web = "http" in self.protocols
        self.local = "file" in self.protocols
        self.is_async = bool(getattr(self.fs, "async_impl", False))
        self.root: str = path if self.web else self.fs._strip_protocol(path)
        self.writable = self.protocols[0] not in _COMMITS and _can_write(self.fs)
        self._container = self._guard(self.root, lambda: _container(self.fs), again=False)
        self.requests = 0
        # Paths as an object store has them need no directories: one without a file in it is not there.
        self.flat = True

    # Asking

    def info(self, path: str) -> Info:
        """Look at a file."""
        if self.protocols[0] not in _COMMITS:
            self.fs.invalidate_cache(self.fs._parent(path))  # or a listing of any age would answer
        return info_of(path, self._ask(path, "info", path))

    def list(self, path: str) -> dict[bytes, Info]:
        """List a directory. Names that cannot be one component of a path are left out, as is all that repeats."""
        self.fs.invalidate_cache(path)
        found: dict[bytes, Info] = {}
        for entry in self._ask(path, "ls", path.rstrip("/") + "/" if self.web else path, detail=True):
            name = self.leaf(path, entry)
            if name is not None and name not in found:
                found[name] = info_of(str(entry["name"]), entry)
        return found

    def range(self, path: str, start: int, stop: int) -> bytes:
        """Give the bytes start to stop of a file, by an async filesystem."""
        data: bytes = self._ask(path, "cat_file", path, start=start, end=stop)
        return data

    def web_range(self, info: Info, start: int, stop: int) -> bytes:
        """Give the bytes start to stop of that version of a file on a web server.

        Not by fsspec's own call, which takes in whatever a server without ranges sends. Raises OSError(ESTALE).
        """
        path, most = info.path, min(info.size or 0, SMALL)

        async def get() -> tuple[Info, bytes]:
            session = await self.fs.set_session()
            options = dict(self.fs.kwargs)
            headers = {
                **options.pop("headers", {}),
                "Accept-Encoding": "identity",
                "Range": f"bytes={start}-{stop - 1}",
            }
            async with session.get(self.fs.encode_url(path), headers=headers, **options) as response:
                self.fs._raise_not_found_for_status(response, path)
                said = response.headers.get("Content-Range", "")
                whole = response.status == 200
                total = response.headers.get("Content-Length", "") if whole else said.rpartition("/")[2]
                size = int(total) if total.isascii() and total.isdigit() else None
                names = ("ETag", "Content-MD5", "Digest", "Last-Modified")
                seen = info_of(path, {name: response.headers.get(name) for name in names} | {"size": size})
                if not same(seen, info):
                    raise OSError(errno.ESTALE, "it has changed while it was read; open it again")
                if whole and (info.size or 0) > SMALL:
                    raise OSError(errno.EOPNOTSUPP, "the server gives no ranges; download it and mount the copy")
                if not whole and not said.startswith(f"bytes {start}-"):
                    raise ConnectionError("an answer of other bytes than asked for")
                parts, left = [], (most if whole else stop - start) + 1
                while left and (part := await response.content.read(left)):
                    parts.append(part)
                    left -= len(part)
                return seen, b"".join(parts)[slice(start, stop) if whole else slice(None)]

        def attempt() -> bytes:
            self.requests += 1
            _, data = self._guard(path, lambda: self._wait(get()), again=True)
            if len(data) != stop - start:
                raise Transient(f"{len(data)} bytes at {start} where {stop - start} were asked for")
            return data  # type: ignore[no-any-return]

        return persist(attempt, self._patience, self._closed.wait, self.name_of(path))

    def check_container(self) -> None:
        """See that the file that an archive is in is still the same. Raises OSError(ESTALE)."""
        if self._container is None:
            return
        fs, path, known = self._container

        def look() -> Info:
            fs.invalidate_cache(fs._parent(path))
            return info_of(path, fs.info(path))

        if not same(self._guard(path, look, again=False), known):
            raise OSError(errno.ESTALE, f"{self.url}: it has changed since it was mounted; mount it again")

    def copy(self, path: str, fd: int) -> None:
        """Write a file of unknown size to `fd`, from its beginning to its end."""

        def attempt() -> None:
            with self.fs.open(path, "rb") as file:
                offset = 0
                while part := file.read(1 << 20):
                    os.pwrite(fd, part, offset)
                    offset += len(part)
                os.ftruncate(fd, offset)

        self.requests += 1
        self._guard(path, attempt, again=False)

    def leaf(self, path: str, entry: Any) -> bytes | None:
        """Give the name of an entry in the listing of `path`; None for one that cannot be used."""
        full = entry.get("name")
        if not isinstance(full, str):
            return None
        if not self.web:
            try:
                full = self.fs._strip_protocol(full)
            except (ValueError, TypeError, UnicodeError):
                return None
        base = path.rstrip("/")
        if base and not full.startswith(base + "/"):
            return None
        rest = full[len(base) :].removeprefix("/")
        rest = rest.removesuffix("/")
        if self.web:
            if "?" in rest or "#" in rest:
                return None
            rest = unquote(rest)
        try:
            name = os.fsencode(rest) if self.local else rest.encode()
        except UnicodeError:
            return None
        if not is_name(name):
            return None
        return name

    def join(self, path: str, name: bytes) -> str:
        """Give the path of a name that was in no listing. Raises OSError(EILSEQ) for one that the store cannot have."""
        try:
            text = os.fsdecode(name) if self.local else name.decode()
        except UnicodeError:
            raise OSError(errno.EILSEQ, "names in the store are of UTF-8", name) from None
        if self.web:
            from urllib.parse import quote

            text = quote(text)
        base = path.rstrip("/")
        return f"{base}/{text}" if base or path else text

    # Changing: tried once

    def put(self, path: str, fd: int, size: int) -> None:
        """Make the file at `path` of the first `size` bytes of `fd`."""
        if size <= _PIECE:
            self._change(path, lambda: self.fs.pipe_file(path, _pread(fd, 0, size)))
            return

        def send() -> None:
            file = self.fs.open(path, "wb", block_size=_PIECE)
            try:
                for offset in range(0, size, _PIECE):
                    file.write(_pread(fd, offset, min(_PIECE, size - offset)))
            except BaseException:
                discard = getattr(file, "discard", None)
                if discard is not None:
                    file.closed = True  # else its end would make what is there an object
                    discard()
                raise
            file.close()

        self._change(path, send)

    def mkdir(self, path: str) -> None:
        """Make a directory, where the store has such a thing."""
        self._change(path, lambda: self.fs.mkdir(path, create_parents=False))
        try:
            self.flat = not self.info(path).directory
        except FileNotFoundError:
            self.flat = True

    def rmdir(self, path: str) -> None:
        """Remove a directory that is empty."""
        try:
            self._change(path, lambda: self.fs.rmdir(path))
        except FileNotFoundError:
            return  # only its files made it one
        except FileExistsError:
            self._change(path, lambda: self.fs.rm_file(path.rstrip("/") + "/"))  # a marker, as consoles make them

    def remove(self, path: str) -> None:
        """Remove a file."""
        self._change(path, lambda: self.fs.rm_file(path))

    def move(self, old: str, new: str, *, directory: bool) -> None:
        """Move a file or a directory: in most stores a copy, and a removal after it.

        A directory is copied as a whole before anything of it is removed: when that fails, nothing is lost.
        """
        from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped, unused-ignore, import-not-found]

        self.fs.invalidate_cache()  # it may hold listings from before changes that we made
        if not directory or type(self.fs).mv is not AbstractFileSystem.mv:
            self._change(old, lambda: self.fs.mv(old, new))
            return
        files: list[tuple[str, str]] = []
        directories: list[str] = []
        rest = [(old, new)]
        while rest:
            place, target = rest.pop()
            directories.append(place)
            try:
                listing = self.list(place)
            except FileNotFoundError:
                continue
            self._change(target, lambda target=target: self.fs.mkdir(target, create_parents=False))  # type: ignore[misc]
            for name, info in listing.items():
                pair = (info.path, self.join(target, name))
                (rest if info.directory else files).append(pair)
        for source, target in files:
            self._change(source, lambda pair=(source, target): self.fs.cp_file(*pair))  # type: ignore[misc]
        for source, _ in files:
            self.remove(source)
        for place in reversed(directories):
            self.rmdir(place)

    # The way there

    def _ask(self, path: str, name: str, *arguments: Any, **options: Any) -> Any:
        def attempt() -> Any:
            self.requests += 1
            return self._guard(path, lambda: self._call(name, arguments, options), again=True)

        return persist(attempt, self._patience, self._closed.wait, self.name_of(path))

    def _call(self, name: str, arguments: Any, options: Any) -> Any:
        method = getattr(self.fs, "_" + name, None) if self.is_async else None
        if method is None:
            return getattr(self.fs, name)(*arguments, **options)
        return self._wait(method(*arguments, **options))

    def _wait(self, coroutine: Any) -> Any:
        """Have fsspec's loop do something, for as long as our patience lasts."""
        import asyncio
        from concurrent.futures import TimeoutError as TooLong

        future = asyncio.run_coroutine_threadsafe(coroutine, self.fs.loop)
        begun = monotonic()
        while True:
            try:
                return future.result(min(self._patience.timeout, 1.0))
            except TooLong:
                if future.done():
                    raise
                if monotonic() - begun > self._patience.timeout or self._closed.is_set():
                    future.cancel()
                    raise

    def _change(self, path: str, call: Callable[[], Any]) -> Any:
        self.requests += 1
        return self._guard(path, call, again=False)

    def _guard(self, path: str, call: Callable[[], Any], *, again: bool) -> Any:
        """Make an OSError, or `Transient` if it may be tried `again`, of what a library raises."""
        try:
            return call()
        except Exception as error:
            raise self._translate(path, error, again) from error

    def _translate(self, path: str, error: Exception, again: bool) -> Exception:
        if self.web and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # fsspec calls every failure of a look at a file on a web server so
        for kind, number in _ABOUT_FILES.items():
            if isinstance(error, kind):
                return self._error(number, path, os.strerror(number))
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, NotImplementedError):
            return self._error(errno.EOPNOTSUPP, path, f"the filesystem {self.protocols[0]} of fsspec cannot do this")
        if isinstance(error, UnicodeError):
            return self._error(errno.EILSEQ, path, text)
        status = _status(error)
        if isinstance(error, SSLCertVerificationError):
            why = getattr(getattr(error, "certificate_error", error), "verify_message", error)  # aiohttp wraps it
            text = f"the certificate does not hold: {why} (own authority: SSL_CERT_FILE)"
            return self._error(errno.EACCES, path, text)
        if status and status not in _PASSING:
            return self._error(_STATUS.get(status, errno.EIO), path, f"HTTP status {status}")
        timed_out = isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
        if isinstance(error, OSError) and error.errno in (
            errno.ENOTEMPTY,
            errno.ENOSPC,
            errno.EROFS,
            errno.EDQUOT,
            errno.ESTALE,
            errno.EOPNOTSUPP,
        ):
            return self._error(error.errno, path, error.strerror or text)
        passing = timed_out or bool(status) or isinstance(error, (ConnectionError, OSError))
        passing = passing or "Connect" in type(error).__name__ or "Disconnect" in type(error).__name__
        if again and passing:
            return Transient(text, timed_out=timed_out)
        return self._error(errno.ETIMEDOUT if timed_out else errno.EIO, path, text)

    def _error(self, number: int, path: str, text: str) -> OSError:
        return OSError(number, f"{self.name_of(path)}: {text}")

    def name_of(self, path: str) -> str:
        """Give a file's name for messages."""
        rest = path.removeprefix(self.root).strip("/")
        return f"{self.url}: {rest}" if rest else self.url

    def close(self) -> None:
        """Give up what waits, and close the connections where the filesystem lets us."""
        self._closed.set()
        session = getattr(self.fs, "_session", None)
        close = getattr(self.fs, "close_session", None)
        if session is not None and close is not None:
            try:
                close(self.fs.loop, session)
            except Exception:  # noqa: BLE001, S110 - the process ends, and its connections with it
                pass
            self.fs._session = None


class _StoreFile:
    """A file of a store, for an image: what `http.HttpFile` is to a web server."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self._path = path
        self.url = store.url
        self._info = info = store.info(path)
        if info.directory or info.size is None:
            raise OSError(errno.EINVAL, f"{self.url}: {'a directory' if info.directory else 'a file of no known size'}")
        self.size = info.size
        self.beginning = b""
        self.whole: bytes | None = None
        self._reader = None if store.is_async else Reader(store, path)

    def fetch(self, offset: int, length: int) -> bytes:
        """Give that range. Raises OSError: ESTALE once the file is another one."""
        return fetch(self._store, self._info, self._reader, offset, length)

    def close(self) -> None:
        """Close the file and the store."""
        if self._reader is not None:
            self._reader.close()
        self._store.close()


class Reader:
    """An open file of a filesystem that is not async: those know no ranges, but where they are in a file."""

    __slots__ = ("_file", "_lock", "_path", "_store")

    def __init__(self, store: Store, path: str) -> None:
        from _thread import allocate_lock

        self._store = store
        self._path = path
        self._file: Any = None
        self._lock = allocate_lock()

    def fetch(self, offset: int, length: int) -> bytes:
        """Give a range; fewer bytes at the end."""
        with self._lock:
            data: bytes = persist(
                lambda: self._store._guard(self._path, lambda: self._read(offset, length), again=True),
                self._store._patience,
                self._store._closed.wait,
                self._store.name_of(self._path),
            )
            return data

    def _read(self, offset: int, length: int) -> bytes:
        self._store.requests += 1
        try:
            if self._file is None:
                self._file = self._store.fs.open(self._path, "rb")
            if self._file.tell() != offset:
                self._file.seek(offset)
            parts = []
            while length and (part := self._file.read(length)):
                parts.append(part)
                length -= len(part)
            return b"".join(parts)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()


def fetch(store: Store, info: Info, reader: Reader | None, offset: int, length: int) -> bytes:
    """Give a range of one version of a file.

    Raises OSError(ESTALE) when it is another one by now: data that were fetched before are of the same version as
    these, or these are not given. What came in one piece is of one version by itself.
    """
    size = info.size or 0
    if store.web:
        return store.web_range(info, offset, offset + length)
    if reader is not None:
        data = reader.fetch(offset, length)
    else:
        data = store.range(info.path, offset, offset + length)
    store.check_container()
    if info.told and length < size:
        if not same(store.info(info.path), info):
            raise OSError(errno.ESTALE, f"{store.name_of(info.path)}: it has changed while it was read; open it again")
    elif len(data) != length:
        raise OSError(errno.ESTALE, f"{store.name_of(info.path)}: {len(data)} bytes where there were {length}")
    return data


def open_file(url: str, storage: Mapping[str, Any], patience: Patience | None = None) -> _StoreFile:
    """Open one file of a store. Raises OSError that names the URL."""
    store = Store(url, storage, patience)
    try:
        return _StoreFile(store, store.root)
    except BaseException:
        store.close()
        raise


def _connect(url: str, name: str, storage: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        from fsspec import get_filesystem_class  # type: ignore[import-untyped, unused-ignore, import-not-found]
        from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore, import-not-found]
    except ImportError as error:
        if error.name not in ("fsspec", "fsspec.core"):
            raise
        raise OSError(
            errno.ENOPKG, f"{name}: sources of this kind need fsspec: pip install 'fusewire[remote]'"
        ) from error
    try:
        for part in url.split("::"):
            get_filesystem_class(part.partition("://")[0])
        fs, path = url_to_fs(url, **storage)
    except ImportError as error:
        raise OSError(errno.ENOPKG, f"{name}: {error} (pip install it beside fusewire)") from error
    except FileNotFoundError as error:
        raise OSError(errno.ENOENT, f"{name}: {error}") from error
    except PermissionError as error:
        raise OSError(errno.EACCES, f"{name}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(errno.EINVAL, f"{name}: {error}") from error
    except Exception as error:
        code = _STATUS.get(_status(error), errno.EIO)
        raise OSError(code, f"{name}: {type(error).__name__}: {error}") from error
    return fs, path


def _status(error: Exception) -> int:
    """Give the HTTP status that an error of one of the libraries tells of; 0 for none."""
    for one, name in ((error, "status"), (error, "status_code"), (getattr(error, "response", None), "status_code")):
        status = getattr(one, name, None)
        if isinstance(status, int):
            return status
    return 0


def _can_write(fs: Any) -> bool:
    """Tell whether a filesystem can change anything: it says how something is removed."""
    from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped, unused-ignore, import-not-found]

    bases: list[type] = [AbstractFileSystem]
    if getattr(fs, "async_impl", False):
        from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped, unused-ignore, import-not-found]

        bases.append(AsyncFileSystem)
    for name in ("rm_file", "_rm_file", "_rm"):
        method = getattr(type(fs), name, None)
        if method is not None and all(method is not getattr(base, name, None) for base in bases):
            return True
    return False


def _pread(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts).ljust(sum(map(len, parts)) + length, b"\0")
