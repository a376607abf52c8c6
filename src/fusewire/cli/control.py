"""The control socket of a mount's server: one JSON line asks, one answers.

Layer: cli. Both ends are here. It knows nothing of records and mounts, and no client can hold up the others. json and
threading are loaded where they are needed.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from typing import Any

    Handler = Callable[[dict[str, Any]], dict[str, Any]]

_LARGEST = 1 << 20
_LINE = 1 << 16
_CLIENTS = 32
_PATIENCE = 5.0  # seconds that a client may take over its one line
_SUN_PATH = 107


def _address(path: str) -> tuple[str, int]:
    """A name for a socket that fits in sun_path (108 bytes, unix(7)), and the descriptor that it goes through or -1."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        return path, -1
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}", fd


def connect(path: str, timeout: float = _PATIENCE) -> _socket.socket:
    """A connection to a control socket, for `control` or to see whether anybody listens."""
    short, fd = _address(path)
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    done = False
    try:
        # A socket with Python's timeout gets EAGAIN at once while the server's queue is full; with the kernel's own
        # it waits for room (unix_stream_connect).
        whole = int(timeout)
        sock.setsockopt(
            _socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", whole, int((timeout - whole) * 1e6) or 1)
        )
        sock.connect(short)
        sock.settimeout(timeout)
        done = True
    finally:
        if not done:
            sock.close()
        if fd >= 0:
            os.close(fd)
    return sock


def control(path: str, request: dict[str, Any], timeout: float = _PATIENCE) -> dict[str, Any]:
    """Ask the server behind a control socket; its answer has "ok", and "error" where that is false.

    timeout: seconds for all of it. Raises OSError: ECONNREFUSED or ENOENT if the server is gone, ETIMEDOUT if it does
    not answer, ECONNRESET if it ended meanwhile, EPROTO if the answer is none.
    """
    import json

    deadline = time.monotonic() + timeout
    answer = bytearray()
    try:
        sock = connect(path, timeout)
        try:
            sock.sendall(json.dumps(request).encode() + b"\n")
            while not answer.endswith(b"\n") and len(answer) <= _LARGEST:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                sock.settimeout(left)
                part = sock.recv(_LINE)
                if not part:
                    raise ConnectionResetError(errno.ECONNRESET, "the server ended without an answer", path)
                answer += part
        finally:
            sock.close()
    except (TimeoutError, BlockingIOError):  # EAGAIN: its queue of connections is full
        raise TimeoutError(errno.ETIMEDOUT, f"the server gave no answer within {timeout:g} s", path) from None
    except (ConnectionRefusedError, FileNotFoundError) as error:
        raise OSError(error.errno, "the server is gone", path) from None
    except BrokenPipeError:
        raise ConnectionResetError(errno.ECONNRESET, "the server ended without an answer", path) from None
    try:
        found = json.loads(bytes(answer))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OSError(errno.EPROTO, "the server's answer is not one", path)
    return found


class _Client:
    __slots__ = ("deadline", "line", "sock")

    def __init__(self, sock: _socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.line = bytearray()


class ControlServer:
    """Answers on a control socket, one thread for all clients: none that is silent or slow keeps another waiting.

    `handlers` maps a command to a function of the whole request whose dict is the answer; what it raises as OSError
    is answered as a failure. Handlers run one at a time. Only the same user and root are answered; in a user
    namespace that maps no other ids, root outside is nobody.
    """

    __slots__ = ("_clients", "_handlers", "_listener", "_thread", "_wake", "path")

    def __init__(self, path: str, handlers: Mapping[str, Handler]) -> None:
        """Take the name `path` and listen; clients wait until `start`."""
        self.path = path
        self._handlers = handlers
        self._clients: dict[int, _Client] = {}
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        done = False
        fd = -1
        try:
            short, fd = _address(path)
            self._listener.bind(short)
            os.chmod(short, 0o600)
            self._listener.listen(_CLIENTS)
            self._listener.setblocking(False)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            done = True
        except OSError as error:
            raise OSError(error.errno, f"cannot make the control socket: {error.strerror}", path) from error
        finally:
            if not done:
                self._listener.close()
            if fd >= 0:
                os.close(fd)

    def start(self) -> None:
        """Begin to answer, on a daemon thread. Raises OSError(EAGAIN) if the system allows no more threads."""
        import threading

        thread = threading.Thread(target=self._serve, name="control", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise OSError(
                errno.EAGAIN, f"no thread for the control socket: {error} (raise `ulimit -u` or `ulimit -v`)"
            ) from error
        self._thread = thread

    def close(self) -> None:
        """Stop, after the answer that is being given, and give up the name. A server calls this before it ends."""
        import threading

        if self._wake < 0:
            return
        os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)
        try:
            os.unlink(self.path)
        except OSError:  # gone with its directory, or a filesystem that went away
            pass
        if self._thread is None:
            self._end()

    def _end(self) -> None:
        for client in self._clients.values():
            client.sock.close()
        self._clients.clear()
        self._listener.close()
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)

    def _serve(self) -> None:
        watch = select.poll()
        watch.register(self._wake, select.POLLIN)
        watch.register(self._listener.fileno(), select.POLLIN)
        try:
            while True:
                now = time.monotonic()
                for late in [c for c in self._clients.values() if c.deadline <= now]:
                    self._drop(late, watch)
                wait = min((c.deadline - now for c in self._clients.values()), default=None)
                for fd, _ in watch.poll(None if wait is None else wait * 1000 + 1):
                    if fd == self._wake:
                        return
                    if fd == self._listener.fileno():
                        self._accept(watch)
                    elif client := self._clients.get(fd):  # not one that had to make room just now
                        self._hear(client, watch)
        finally:
            self._end()

    def _accept(self, watch: select.poll) -> None:
        try:
            fd = self._listener._accept()[0]  # type: ignore[attr-defined]  # socket.accept is made of it
        except OSError:  # the client has gone again; or we have no descriptors left, and other clients will end
            return
        sock = _socket.socket(fileno=fd)
        if len(self._clients) >= _CLIENTS:
            self._drop(min(self._clients.values(), key=lambda c: c.deadline), watch)
        sock.setblocking(False)
        self._clients[fd] = _Client(sock, time.monotonic() + _PATIENCE)
        watch.register(fd, select.POLLIN)

    def _drop(self, client: _Client, watch: select.poll) -> None:
        fd = client.sock.fileno()
        watch.unregister(fd)
        del self._clients[fd]
        client.sock.close()

    def _hear(self, client: _Client, watch: select.poll) -> None:
        try:
            part = client.sock.recv(_LINE)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        client.line += part
        line, newline, _ = bytes(client.line).partition(b"\n")
        if part and not newline and len(client.line) < _LINE:
            return
        if newline or part:
            self._answer(client, line if newline else b"")
        self._drop(client, watch)

    def _answer(self, client: _Client, line: bytes) -> None:
        import json

        answer = self._reply(client, line)
        client.sock.settimeout(1.0)  # its socket buffer takes any answer of ours at once
        try:
            client.sock.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:  # it does not want the answer any more
            return

    def _reply(self, client: _Client, line: bytes) -> dict[str, Any]:
        import json

        credentials = client.sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("iII", credentials)[1]
        if uid not in (0, os.geteuid()):
            return {"ok": False, "error": f"user {uid} may not control a mount of user {os.geteuid()}", "errno": 1}
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            return {"ok": False, "error": "not a request: one JSON object in one line is", "errno": errno.EINVAL}
        handler = self._handlers.get(str(request.get("command")))
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return {"ok": False, "error": f"unknown command; known are {known}", "errno": errno.ENOSYS}
        try:
            return {"ok": True} | handler(request)
        except OSError as error:
            return {"ok": False, "error": str(error.strerror or error), "errno": error.errno or errno.EIO}
        except Exception as error:  # noqa: BLE001  this thread's guard: the mount must stay controllable
            return {"ok": False, "error": f"{type(error).__name__}: {error}", "errno": errno.EIO}
