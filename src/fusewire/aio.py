"""Async handlers: from an awaitable to a `Pending` that an asyncio loop completes.

Layer: between ops and session, which loads it only for filesystems that have `async def` methods; asyncio is loaded
with the first request. It knows tasks and nothing of requests, transports or mounts.

A task runs on the loop that its `Runner` was given (`serve_async`), or on one in a thread of its own that all runners
of the process share: an event loop waits for any number of mounts. Plain methods are called by several threads at
once; the tasks of one loop take turns, and only where they await.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fusewire.ops import FileRange, Pending

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

# How long cancelled tasks get to clear up. Seconds.
_GRACE = 1.0


class Runner:
    """Runs awaitables as tasks of one asyncio loop, from any thread; `loop` None: the loop that all share."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        # The loop itself holds tasks by weak references only.
        self._jobs: set[_Job] = set()

    def pending(self, awaitable: Awaitable[Any], done: Callable[[BaseException | None], None] | None = None) -> Pending:
        """Run `awaitable` and give the `Pending` that it settles.

        When the caller gives up (INTERRUPT), the task is cancelled and the answer is EINTR, unless it catches that and
        returns. A `FileRange` is read here, in a thread: late answers carry their data. `done` hears of the end, for
        what nobody waits for.
        """
        if (other := self._other()) is not None:
            return other.pending(awaitable, done)
        loop, here = self._target()
        job = _Job(awaitable, loop, self._jobs, done)
        if here:
            job.begin()
        else:
            try:
                loop.call_soon_threadsafe(job.begin)
            except RuntimeError:
                job.refuse()  # the loop is closed
        return job.pending

    def deferred(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Pending]:
        """Make a handler that the session can call of one that is `async def`.

        A memoryview is of a request whose memory is used again as soon as the handler has returned: it is copied.
        """

        def call(*arguments: Any) -> Pending:
            return self.pending(handler(*[bytes(a) if type(a) is memoryview else a for a in arguments]))

        return call

    def wait(self, awaitable: Awaitable[Any]) -> None:
        """Run `awaitable` and wait for its end, which is not possible on the loop's own thread: there it goes on."""
        if (other := self._other()) is not None:
            other.wait(awaitable)
            return
        loop, here = self._target()
        if here:
            self.pending(awaitable)
            return
        import asyncio

        asyncio.run_coroutine_threadsafe(_as_coroutine(awaitable), loop).result()

    def end(self) -> None:
        """Cancel what is at work, from any thread, and wait a little for it to end."""
        if self._jobs:
            self.wait(self.stop(_GRACE))

    async def stop(self, seconds: float, *, cancel: bool = True) -> None:
        """Cancel what is at work, on the loop's own thread, and wait so long for it to end."""
        import asyncio

        tasks = [job.task for job in self._jobs if job.task is not None]
        for task in tasks if cancel else ():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    def _other(self) -> Runner | None:
        here = HERE.get()
        return None if here is self else here

    def _target(self) -> tuple[asyncio.AbstractEventLoop, bool]:
        """The loop to use, and whether this thread is the one that runs it."""
        import asyncio

        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        loop = self.loop or running or _SHARED.get()
        return loop, loop is running


class _Job:
    """One awaitable on its way: it may be given up before its task has begun."""

    __slots__ = ("_awaitable", "_done", "_interrupted", "_jobs", "_loop", "pending", "task")

    def __init__(
        self,
        awaitable: Awaitable[Any],
        loop: asyncio.AbstractEventLoop,
        jobs: set[_Job],
        done: Callable[[BaseException | None], None] | None,
    ) -> None:
        self._awaitable = awaitable
        self._loop = loop
        self._jobs = jobs
        self._done = done
        self._interrupted = False
        self.task: asyncio.Task[None] | None = None
        self.pending = Pending(self._give_up)

    def begin(self) -> None:
        """Make the task, on the loop's thread."""
        if self._interrupted:
            self.refuse()
            return
        self._jobs.add(self)
        self.task = self._loop.create_task(self._run())
        self.task.add_done_callback(self._is_over)

    def _is_over(self, task: asyncio.Task[None]) -> None:
        if self in self._jobs:  # it was cancelled before its first step
            self.refuse()

    def refuse(self) -> None:
        """End what has not begun."""
        close = getattr(self._awaitable, "close", None)
        if close is not None:
            close()  # a coroutine that is dropped complains
        self._settle(None, self._cancelled())

    def _cancelled(self) -> OSError:
        if self._interrupted:
            return InterruptedError(errno.EINTR, "the caller gave up")
        return OSError(errno.ECANCELED, "the event loop of the filesystem has ended")

    def _give_up(self) -> None:
        self._interrupted = True
        try:
            self._loop.call_soon_threadsafe(self._cancel)
        except RuntimeError:
            self._settle(None, self._cancelled())

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def _run(self) -> None:
        from asyncio import CancelledError

        try:
            result = await self._awaitable
            if type(result) is FileRange:
                fd, offset, size, _keep = result
                result = await self._loop.run_in_executor(None, os.pread, fd, size, offset)
        except CancelledError:
            self._settle(None, self._cancelled())
        except Exception as error:  # noqa: BLE001 - the caller's answer: the session makes an errno of it
            self._settle(None, error)
        except BaseException as error:
            self._settle(None, RuntimeError(f"a method raised {error!r}"))
            if HERE.get() is not None:
                raise  # the loop is the program's: it ends that
        else:
            self._settle(result, None)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        self._jobs.discard(self)
        if error is None:
            self.pending.complete(result)
        else:
            self.pending.fail(error)
        if self._done is not None:
            self._done(error)


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class _Shared:
    """The loop in a thread of its own, made when it is first needed. It lasts as long as the process.

    A forked child has the object without the thread, and makes another one.
    """

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Give the running loop."""
        with self._lock:
            if self._loop is None:
                self._loop = self._start()
            return self._loop

    def forget(self) -> None:
        """Begin anew, in a forked child; the lock may be held by a thread that there is not."""
        self._lock = allocate_lock()
        self._loop = None

    def _start(self) -> asyncio.AbstractEventLoop:
        import asyncio
        import threading

        loop = asyncio.new_event_loop()

        def run() -> None:
            while True:
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    continue  # of a task that a handler has made: all others still need the loop

        threading.Thread(target=run, name="fuse-async", daemon=True).start()
        return loop


HERE: ContextVar[Runner | None] = ContextVar("fusewire.aio.HERE", default=None)
"""The runner of the `serve_async` that calls: it does what others are asked for."""
# The one thing here that a process has only once, as it has one event loop per thread.
_SHARED = _Shared()
_RUNNER = Runner()
os.register_at_fork(after_in_child=_SHARED.forget)


def wait(awaitable: Awaitable[Any]) -> None:
    """Wait for `awaitable` where `pending` would run it."""
    _RUNNER.wait(awaitable)


def pending(awaitable: Awaitable[Any]) -> Pending:
    """Give a `Pending` that is settled by what `awaitable` gives or raises: for handlers that are no `async def`.

    It runs on the loop of this thread if there is one (`serve_async`), else on the one that all mounts share. When the
    caller gives up, it is cancelled; `Operations.interruptible` has to be set for that.
    """
    return _RUNNER.pending(awaitable)
