"""`serve_async` in a run of trio: handlers are tasks of a nursery, and may await what trio has.

Layer: above serve, below loops.py, which loads it where trio runs; trio is imported by nobody else. anyio's programs
run on asyncio or on trio, and need nothing more.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import trio

from fusewire.aio import HERE, Runner
from fusewire.mounts_held import GRACE, first_look
from fusewire.ops import FileRange, Pending

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fusewire.loops_device import Device
    from fusewire.mounts_held import Held


async def serve(device: Device, held: Held | None, ready: Callable[[str], object] | None) -> None:
    """Serve until the mount is gone, or this is cancelled."""
    failure: OSError | None = None
    runner = _Runner()
    before = HERE.set(runner)
    try:
        async with trio.open_nursery() as nursery:
            pump = _Pump(device, runner)
            nursery.start_soon(pump.run)
            try:
                await pump.begun.wait()
                device.check_started()
                if held is not None:
                    where = os.fsdecode(held.path)
                    await trio.to_thread.run_sync(first_look, device.operations, where)
                    if ready is not None:
                        ready(where)
                await pump.ended.wait()
                failure = device.failure
            except OSError as error:
                failure = error  # raised outside of the nursery, which would make a group of it
            finally:
                with trio.CancelScope(shield=True):
                    await pump.leave(held)
    finally:
        HERE.reset(before)
    if failure is not None:
        raise failure


class _Runner(Runner):
    """Runs awaitables as tasks of `nursery`."""

    def __init__(self) -> None:
        super().__init__()
        self.nursery: trio.Nursery | None = None

    def pending(self, awaitable: Awaitable[Any], done: Callable[[BaseException | None], None] | None = None) -> Pending:
        assert self.nursery is not None
        scope = trio.CancelScope()
        pending = Pending(scope.cancel)
        if _is_here():
            self.nursery.start_soon(self._run, awaitable, scope, pending, done)
        else:
            trio.from_thread.run_sync(self.nursery.start_soon, self._run, awaitable, scope, pending, done)
        return pending

    def wait(self, awaitable: Awaitable[Any]) -> None:
        if _is_here():
            self.pending(awaitable)
        else:
            trio.from_thread.run(_as_coroutine, awaitable)

    async def _run(
        self,
        awaitable: Awaitable[Any],
        scope: trio.CancelScope,
        pending: Pending,
        done: Callable[[BaseException | None], None] | None,
    ) -> None:
        result: Any = None
        failure: BaseException | None = InterruptedError(errno.EINTR, "the caller gave up")
        try:
            with scope:
                result = await awaitable
                if type(result) is FileRange:
                    fd, offset, size, _keep = result
                    result = await trio.to_thread.run_sync(os.pread, fd, size, offset)
                failure = None
        except Exception as error:  # noqa: BLE001 - the caller's answer: the session makes an errno of it
            failure = error
        except trio.Cancelled:
            failure = OSError(errno.ECANCELED, "the filesystem is not served any more")
            raise
        except BaseException as error:
            failure = RuntimeError(f"a method raised {error!r}")
            raise
        finally:
            if failure is None:
                pending.complete(result)
            else:
                pending.fail(failure)
            if done is not None:
                done(failure)


def _is_here() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class _Pump:
    """Has a device served when trio says that there are requests."""

    def __init__(self, device: Device, runner: _Runner) -> None:
        self._device = device
        self._runner = runner
        self._scope = trio.CancelScope(shield=True)  # until `leave` ends it: unmounting needs answers
        self._gone = trio.Event()
        self.begun, self.ended = trio.Event(), trio.Event()

    async def run(self) -> None:
        """Serve INIT, and then all requests, until there are no more."""
        device = self._device
        try:
            with self._scope:
                async with trio.open_nursery() as self._runner.nursery:
                    await self._begin()
                    self.begun.set()
                    while not device.over:
                        if device.serve_some():
                            await trio.lowlevel.checkpoint()
                        elif not device.over:
                            await trio.lowlevel.wait_readable(device.fd)
                    self.ended.set()
        finally:
            self._gone.set()

    async def _begin(self) -> None:
        device = self._device
        while not device.session.ready and not device.session.refused and not device.over:
            request = device.receive()
            if request is None:
                await trio.lowlevel.wait_readable(device.fd)
            elif device.waits("init"):
                device.answer(request, await trio.to_thread.run_sync(device.handle, bytes(request)))
            else:
                device.answer(request, device.handle(request))

    async def leave(self, held: Held | None) -> None:
        """Unmount, end what is at work, and close the descriptor."""
        device = self._device
        if held is not None:
            try:
                await trio.to_thread.run_sync(held.unmount, True)
            except OSError as error:
                device.session.log_once("cannot unmount", error)
            if device.session.ready and not self._gone.is_set():
                with trio.move_on_after(GRACE):
                    await self.ended.wait()
        self._scope.cancel()
        await self._gone.wait()
        async with trio.open_nursery() as self._runner.nursery:  # for async methods that only end something
            if device.waits("destroy"):
                await trio.to_thread.run_sync(device.session.close)
            else:
                device.session.close()
        device.close(held)
