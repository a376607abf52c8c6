"""A connection to the kernel that waits for nothing: for event loops, which know when there are requests.

Layer: below loops.py and loops_trio.py. A request is read, dispatched and, where its handler is a plain function,
answered at once by whoever calls.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from fusewire.adapters import FileReply, Reply, is_async
from fusewire.serve import guarded
from fusewire.session import Session
from fusewire.trace import trace_to_stderr
from fusewire.transport.devfuse import ENDED, TRY_AGAIN, Channel
from fusewire.wire import abi, codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.mounts_held import Held
    from fusewire.ops import Operations
    from fusewire.session import Log

# So many requests are read before others on the loop get their turn.
_TURN = 16


class Device:
    """One connection whose requests are read and answered without waiting, by whoever knows when there are any."""

    def __init__(self, operations: Operations, fd: int, *, debug: bool, log: Log | None, owned: bool) -> None:
        self.operations = operations
        self.session = session = Session(operations, log=log)
        self.handle: Callable[[Any], Reply] = session.handle
        if owned:
            self.handle = guarded(session.handle, os.getuid(), os.getgid())
        self._channel = Channel(fd, session)
        self.fd = fd
        self._trace = trace_to_stderr if debug else None
        self._buffer = bytearray(max(abi.FUSE_MIN_READ_BUFFER, session.max_write + 4096))
        self._view = memoryview(self._buffer)
        self.over = False
        self.failure: OSError | None = None
        os.set_blocking(fd, False)

    def waits(self, name: str) -> bool:
        """Tell whether `init` or `destroy` is async, the filesystem's own or that of its tree's root.

        Then it is called in another thread: on the loop's own nothing could wait for it.
        """
        root = getattr(self.operations, "root", None)
        return is_async(getattr(self.operations, name)) or is_async(getattr(root, name, None))

    def serve_some(self) -> bool:
        """Serve what there is, up to the turn of others; False if there was nothing more."""
        for _ in range(_TURN):
            request = self.receive()
            if request is None:
                return False
            self.answer(request, self.handle(request))
        return True

    def receive(self) -> memoryview | None:
        """Give a request, None if there is none now; `over` tells whether there will be any."""
        while not self.over:
            try:
                return self._view[: os.readv(self.fd, [self._buffer])]
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in TRY_AGAIN:
                    self.over = True
                    self.failure = None if error.errno in ENDED else error
        return None

    def answer(self, request: memoryview, reply: Reply) -> None:
        """Write the reply to a request, if there is one already."""
        if self._trace is not None:
            self._trace(request, reply)
        if reply is None:
            return
        try:
            os.writev(self.fd, _read_file(reply) if isinstance(reply, FileReply) else reply)
        except OSError as error:
            if error.errno in TRY_AGAIN or error.errno in ENDED:
                return  # nobody waits for it any more
            self.session.bad_replies += 1
            self.session.log_once("the kernel refused a reply", error)
            unique = codec.IN_HEADER.unpack_from(request)[2]
            self._channel.send([codec.OUT_HEADER.pack(16, -errno.EIO, unique)])

    def check_started(self) -> None:
        """Raise OSError if the filesystem would not start."""
        if self.session.refused:
            raise OSError(errno.EPROTO, self.session.refused)

    def close(self, held: Held | None) -> None:
        """Let go of the descriptor: whoever still waits gets ENOTCONN."""
        if held is not None:
            held.close()
        else:
            os.close(self.fd)
        self._channel.fd = -1


def _read_file(reply: FileReply) -> list[bytes]:
    fd, offset, size, _keep = reply.range
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        return [codec.OUT_HEADER.pack(16, -(error.errno or errno.EIO), reply.unique)]
    return [codec.OUT_HEADER.pack(16 + len(data), 0, reply.unique), data]
