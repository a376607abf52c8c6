"""`serve_async`: a filesystem served inside somebody's asyncio event loop, without a thread of its own.

Layer: above serve, beside mounts.py. The loop tells when /dev/fuse can be read; a request is read, dispatched and,
where its handler is a plain function, answered at once on the loop's thread. An `async def` handler becomes a task.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import TYPE_CHECKING, Any

from fusewire.adapters import FileReply, Reply, is_async
from fusewire.mounts import as_operations
from fusewire.mounts_held import GRACE, first_look, hold, options_for
from fusewire.serve import guarded
from fusewire.session import Session
from fusewire.trace import trace_to_stderr
from fusewire.transport.devfuse import ENDED, TRY_AGAIN, Channel
from fusewire.wire import abi, codec

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fusewire.linux.mount_base import Options
    from fusewire.mounts import Filesystem, Path
    from fusewire.mounts_held import Held
    from fusewire.ops import Operations
    from fusewire.session import Log

# So many requests are read before others on the loop get their turn.
_TURN = 16


async def serve_async(
    fs: Filesystem,
    path: Path | None = None,
    *,
    fd: int = -1,
    ready: Callable[[str], object] | None = None,
    options: Options | None = None,
    strategy: str = "auto",
    debug: bool = False,
    log: Log | None = None,
) -> None:
    """Mount a filesystem and serve it on the running event loop until it is unmounted, or this is cancelled.

    `path` is where, None for a mount without a mount point (see `mounted`); `ready` is called with the path that leads
    to it once it can be used. Or `fd` is a descriptor of /dev/fuse that has been mounted, which is taken over.

    `async def` methods run as tasks of this loop. Plain ones run on its thread, as callbacks do: what waits should not
    be one. The loop's thread must not use the mount itself, for nobody could answer; `asyncio.to_thread` may, except
    for mmap.

    It needs asyncio's loop or one like it (uvloop). Raises OSError: `MountError`, or what has ended the connection.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError as error:
        raise RuntimeError(
            "serve_async needs a running asyncio event loop (uvloop's will do); under trio use fusewire.mounted()"
        ) from error
    operations = as_operations(fs)
    chosen = options_for(fs, operations, options)
    held: Held | None = None
    if fd < 0:
        held = hold(None if path is None else os.path.join(os.getcwdb(), os.fsencode(path)), chosen, strategy)
        fd = held.fd
        if held.maps is not None:
            operations.serve_namespace(*held.maps)
    pump = _Pump(operations, fd, loop, debug=debug, log=log, owned=chosen.allow_root)
    try:
        await pump.begin()
        if held is not None:
            where = os.fsdecode(held.path)
            await asyncio.to_thread(first_look, operations, where)
            if ready is not None:
                ready(where)
        await pump.ended
    finally:
        await _to_the_end(pump.leave(held))


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for what clears up, however often this task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            continue
    task.result()


class _Pump:
    """Reads requests of one connection when the loop says that there are any."""

    def __init__(
        self,
        operations: Operations,
        fd: int,
        loop: asyncio.AbstractEventLoop,
        *,
        debug: bool,
        log: Log | None,
        owned: bool,
    ) -> None:
        self._session = session = Session(operations, log=log)
        if session.runner is not None:
            session.runner.loop = loop
        self._handle: Callable[[Any], Reply] = session.handle
        if owned:
            self._handle = guarded(session.handle, os.getuid(), os.getgid())
        self._channel = Channel(fd, session)
        self._fd = fd
        self._loop = loop
        self._trace = trace_to_stderr if debug else None
        self._buffer = bytearray(max(abi.FUSE_MIN_READ_BUFFER, session.max_write + 4096))
        self._view = memoryview(self._buffer)
        self.ended: asyncio.Future[None] = loop.create_future()
        self._readable: asyncio.Future[None] | None = None

    async def begin(self) -> None:
        """Serve INIT, and from then on all requests. Raises OSError if the filesystem would not start."""
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self._wake)
        session = self._session
        while not session.ready and not self.ended.done():
            request = self._receive()
            if request is None:
                self._readable = self._loop.create_future()
                await self._readable
                continue
            if is_async(session.operations.init):
                # On this thread nothing could wait for it.
                self._loop.remove_reader(self._fd)
                self._answer(request, await asyncio.to_thread(self._handle, bytes(request)))
            else:
                self._answer(request, self._handle(request))
            if session.refused:
                raise OSError(errno.EPROTO, session.refused)
        self._readable = None
        self._loop.add_reader(self._fd, self._serve)

    def _wake(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    def _serve(self) -> None:
        for _ in range(_TURN):
            request = self._receive()
            if request is None:
                return
            self._answer(request, self._handle(request))

    def _receive(self) -> memoryview | None:
        while True:
            try:
                return self._view[: os.readv(self._fd, [self._buffer])]
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in TRY_AGAIN:
                    continue
                self._loop.remove_reader(self._fd)
                if not self.ended.done():
                    if error.errno in ENDED:
                        self.ended.set_result(None)
                    else:
                        self.ended.set_exception(error)
                self._wake()
                return None

    def _answer(self, request: memoryview, reply: Reply) -> None:
        if self._trace is not None:
            self._trace(request, reply)
        if reply is None:
            return
        try:
            if isinstance(reply, FileReply):
                os.writev(self._fd, _read_file(reply))
            else:
                os.writev(self._fd, reply)
        except OSError as error:
            if error.errno in TRY_AGAIN or error.errno in ENDED:
                return  # nobody waits for it any more
            self._session.bad_replies += 1
            self._session.log_once("the kernel refused a reply", error)
            unique = codec.IN_HEADER.unpack_from(request)[2]
            self._channel.send([codec.OUT_HEADER.pack(16, -errno.EIO, unique)])

    async def leave(self, held: Held | None) -> None:
        """Unmount, end what is at work, and close the descriptor: whoever still waits gets ENOTCONN."""
        if held is not None and not self.ended.done() and self._session.ready:
            # In a thread: the kernel may write back what it has cached, and this thread answers.
            try:
                await asyncio.to_thread(held.unmount, True)
            except OSError as error:
                self._session.log_once("cannot unmount", error)
            await asyncio.wait([self.ended], timeout=GRACE)
        elif held is not None:
            held.unmount(lazy=True)
        if not self.ended.done():
            self._loop.remove_reader(self._fd)
            self.ended.cancel()
        if self._session.runner is not None:
            await self._session.runner.stop(GRACE)
        if is_async(self._session.operations.destroy):
            await asyncio.to_thread(self._session.close)
        else:
            self._session.close()
        if held is not None:
            held.close()
        else:
            os.close(self._fd)
        self._channel.fd = -1


def _read_file(reply: FileReply) -> list[bytes]:
    fd, offset, size, _keep = reply.range
    try:
        data = os.pread(fd, size, offset)
    except OSError as error:
        return [codec.OUT_HEADER.pack(16, -(error.errno or errno.EIO), reply.unique)]
    return [codec.OUT_HEADER.pack(16 + len(data), 0, reply.unique), data]
