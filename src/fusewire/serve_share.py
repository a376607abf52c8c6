"""Runs a vhost-user-fs device on a listening socket: one front end after the other.

Layer `serve`. It joins a session, the virtio-fs transport and the vhost-user state machine; it makes no socket, no
sandbox and no decision about processes.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING

from fusewire.linux.wakeup import Wakeup
from fusewire.trace import trace_to_stderr
from fusewire.transport.exchange import Exchange
from fusewire.transport.vhost import HEADER_SIZE, Device, Ending
from fusewire.transport.virtiofs import Abandoned, Share

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Operations
    from fusewire.session import Log

# SCM_MAX_FD of the kernel: no message carries more.
_MOST_FDS = 253
# When we are to end, so long may requests that are at work take; and so long nobody is accepted for want of
# descriptors; and so long a front end may take to read a reply. Seconds.
_GRACE, _PAUSE, _PATIENCE = 0.3, 1.0, 10.0
_WANT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class ShareServer:
    """Serves a filesystem to virtual machines over `listening`, a Unix socket that stays the caller's."""

    _stop = -1

    def __init__(
        self,
        make_operations: Callable[[], Operations],
        listening: socket.socket,
        *,
        queues: int,
        tag: bytes = b"",
        threads: int = 0,
        once: bool = False,
        log: Log | None = None,
        debug: bool = False,
    ) -> None:
        """Serve what `make_operations` gives, a fresh one for each guest's start.

        queues: request queues, the high-priority one not counted. threads: workers of each of them; 0: two, of which
        the second one is only there for when the first is busy with something slow. once: end with the first client.
        """
        self._make = make_operations
        self._listening = listening
        self._queues = queues + 1
        self._tag = tag
        self._workers = max(2, threads)
        self._once = once
        self._log = log
        self._debug = debug
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wakeup = Wakeup()
        self._stopped_at = 0.0
        self.requests = 0

    def __del__(self) -> None:
        """Close what `stop` signals: it may be called after the end, too."""
        if self._stop >= 0:
            os.close(self._stop)

    def stop(self) -> None:
        """End `serve`, from any thread or a signal handler, before or after it has ended."""
        try:
            os.eventfd_write(self._stop, 1)
        except BlockingIOError:
            return  # it has been called 2^64 times

    def serve(self) -> int:
        """Serve front ends in turn until `stop`, or with `once` until the first one has gone; give the exit status.

        If a request takes no end, it is left at work: the process has to end then, before the guest's memory is used
        for anything else.
        """
        with self._wakeup:
            while True:
                client = self._accept()
                if client is None:
                    return 0
                with client:
                    ended = self._serve_client(client)
                if ended or self._once:
                    return 0

    def _wait(self, source: socket.socket, events: int = select.POLLIN, seconds: float | None = None) -> bool:
        """Wait until the socket is ready; False when we are to stop, or after so many seconds."""
        poll = select.poll()
        poll.register(source, events)
        poll.register(self._stop, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while self._wakeup.fileno() in (ready := dict(poll.poll(None if seconds is None else seconds * 1000))):
            self._wakeup.drain()  # a handler may have called `stop` by now
        return bool(ready) and self._stop not in ready

    def _to_stop(self, seconds: float = 0) -> bool:
        return bool(select.select([self._stop], [], [], seconds)[0])

    def _to_end(self) -> bool:
        """Tell whether we are to stop and have waited long enough for what is at work."""
        if not self._to_stop():
            return False
        self._stopped_at = self._stopped_at or time.monotonic()
        return time.monotonic() - self._stopped_at >= _GRACE

    def _accept(self) -> socket.socket | None:
        while self._wait(self._listening):
            try:
                client, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                if error.errno not in _WANT:
                    raise
                self.say(f"a front end has to wait: {error} (`ulimit -n`)")
                if self._to_stop(_PAUSE):
                    return None
                continue
            client.setblocking(False)
            return client
        return None

    def say(self, message: str) -> None:
        """Report what a person may have to know."""
        if self._log is not None:
            self._log(message, None)

    def _serve_client(self, client: socket.socket) -> bool:
        """Serve one front end until it goes; True when we are to stop."""
        exchange = Exchange(self._make, log=self._log, trace=trace_to_stderr if self._debug else None)
        share = Share(exchange, queues=self._queues, workers=self._workers, log=self.say, ending=self._to_end)
        device = Device(share, queues=self._queues, tag=self._tag, log=self.say)
        try:
            try:
                self._converse(client, device)
            except Ending as error:
                self.say(f"the front end was let go: {error}")
            finally:
                device.disconnect()
                self.requests += share.requests
                share.close()
        except Abandoned:
            return True
        return self._to_stop()

    def _converse(self, client: socket.socket, device: Device) -> None:
        """Obey messages until the front end goes, or we are to stop. Raises Ending."""
        while True:
            message = self._receive(client, device)
            if message is None:
                return
            reply = device.receive(*message)
            if reply is not None and not self._send(client, reply, device.reply_fds):
                return

    def _receive(self, client: socket.socket, device: Device) -> tuple[bytes, bytes, list[int]] | None:
        """Give the next message with its descriptors; None at the end, or when we are to stop. Raises Ending."""
        fds: list[int] = []
        try:
            header = self._read(client, HEADER_SIZE, fds)
            if header is None:
                return None
            payload = self._read(client, device.expect(header), fds)
            if payload is None:
                return None
            found, fds = fds, []
            return header, payload, found
        finally:
            for fd in fds:
                os.close(fd)

    def _read(self, client: socket.socket, size: int, fds: list[int]) -> bytes | None:
        data = b""
        while len(data) < size:
            if not self._wait(client):
                return None
            try:
                part, new, flags, _ = socket.recv_fds(client, size - len(data), _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                continue
            except ConnectionError:
                return None
            except OSError as error:
                raise Ending(str(error)) from error
            fds += new
            if not part:
                return None
            if flags & socket.MSG_CTRUNC:
                raise Ending("a message with more descriptors than we may have open (`ulimit -n`)")
            data += part
        return data

    def _send(self, client: socket.socket, reply: bytes, fds: list[int]) -> bool:
        """Send a reply; False if the front end is gone or does not take it in time, or when we are to stop."""
        rest = memoryview(reply)
        while rest:
            if not self._wait(client, select.POLLOUT, _PATIENCE):
                return False
            try:
                sent = socket.send_fds(client, [rest], fds)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:
                return False
            rest, fds = rest[sent:], []
        return True
