"""`serve_async`: a filesystem served inside somebody's event loop, asyncio's or trio's, without a thread of its own.

Layer: above serve, beside mounts.py. The loop tells when /dev/fuse can be read; a request is read, dispatched and,
where its handler is a plain function, answered at once on the loop's thread. An `async def` handler becomes a task.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Any

from fusewire.aio import HERE, Runner
from fusewire.loops_device import Device
from fusewire.mounts import as_operations
from fusewire.mounts_held import GRACE, Quiet, first_look, hold, options_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from fusewire.linux.mount_base import Options
    from fusewire.mounts import Filesystem, Path
    from fusewire.mounts_held import Held
    from fusewire.session import Log


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

    asyncio's loop or one like it (uvloop) will do, and trio's run, where `async def` methods await what trio has.
    Raises OSError: `MountError`, or what has ended the connection.
    """
    serve = _backend()
    operations = as_operations(fs)
    chosen = options_for(fs, operations, options)
    held: Held | None = None
    try:
        with Quiet():
            if fd < 0:
                held = hold(None if path is None else os.path.join(os.getcwdb(), os.fsencode(path)), chosen, strategy)
                fd = held.fd
                if held.maps is not None:
                    operations.serve_namespace(*held.maps)
            device = Device(operations, fd, debug=debug, log=log, owned=chosen.allow_root)
    except BaseException:
        if held is not None:
            held.unmount(lazy=True)
            held.close()
        raise
    await serve(device, held, ready)


def _backend() -> Callable[[Device, Held | None, Callable[[str], object] | None], Awaitable[None]]:
    try:
        asyncio.get_running_loop()
        return _serve
    except RuntimeError:
        pass
    trio = sys.modules.get("trio")
    try:
        if trio is not None:
            trio.lowlevel.current_trio_token()
            from fusewire.loops_trio import serve

            return serve
    except RuntimeError:
        pass
    raise RuntimeError(
        "serve_async needs a running event loop, of asyncio (uvloop's will do) or trio: call it in a coroutine that"
        " asyncio.run() or trio.run() runs, or use fusewire.mounted()"
    )


async def _serve(device: Device, held: Held | None, ready: Callable[[str], object] | None) -> None:
    pump = _Pump(device, asyncio.get_running_loop())
    before = HERE.set(pump.runner)
    try:
        await pump.begin()
        if held is not None:
            where = os.fsdecode(held.path)
            await asyncio.to_thread(first_look, device.operations, where)
            if ready is not None:
                ready(where)
        await pump.ended.wait()
        if device.failure is not None:
            raise device.failure
    finally:
        await _to_the_end(pump.leave(held))
        HERE.reset(before)


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
    """Has a device served when asyncio's loop says that there are requests."""

    def __init__(self, device: Device, loop: asyncio.AbstractEventLoop) -> None:
        self._device = device
        self._loop = loop
        self.runner = Runner(loop)
        self.ended = asyncio.Event()
        self._readable = asyncio.Event()

    async def begin(self) -> None:
        """Serve INIT, and from then on all requests. Raises OSError if the filesystem would not start."""
        device = self._device
        while not device.session.ready and not device.over:
            request = device.receive()
            if request is None:
                self._readable.clear()
                self._loop.add_reader(device.fd, self._readable.set)
                await self._readable.wait()
                continue
            self._loop.remove_reader(device.fd)
            if device.waits("init"):
                device.answer(request, await asyncio.to_thread(device.handle, bytes(request)))
            else:
                device.answer(request, device.handle(request))
            device.check_started()
        self._loop.add_reader(device.fd, self._serve)

    def _serve(self) -> None:
        self._device.serve_some()
        if self._device.over:
            self._loop.remove_reader(self._device.fd)
            self.ended.set()

    async def leave(self, held: Held | None) -> None:
        """Unmount, end what is at work, and close the descriptor."""
        device = self._device
        if held is not None and not device.over and device.session.ready:
            # In a thread: the kernel may write back what it has cached, and this thread answers.
            try:
                await asyncio.to_thread(held.unmount, True)
            except OSError as error:
                device.session.log_once("cannot unmount", error)
            try:
                await asyncio.wait_for(self.ended.wait(), GRACE)
            except TimeoutError:
                pass  # somebody still has files open
        elif held is not None:
            held.unmount(lazy=True)
        self._loop.remove_reader(device.fd)
        self.ended.set()
        await self.runner.stop(GRACE)
        if device.waits("destroy"):
            await asyncio.to_thread(device.session.close)
        else:
            device.session.close()
        await self.runner.stop(GRACE, cancel=False)  # async methods that only end something
        device.close(held)
