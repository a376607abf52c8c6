"""A few threads that wait for the network in the place of workers that have better to do.

Layer `fs`, below everything else of `fs.remote`. It knows nothing of what it does. Daemon threads of its own, because
those of concurrent.futures are joined at the end of the process, which a stuck server would hold up.
"""

from __future__ import annotations

from _queue import SimpleQueue
from _thread import allocate_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Crew:
    """At most `most` threads, started one by one as there is work and nobody is free."""

    __slots__ = ("_closed", "_free", "_jobs", "_lock", "_name", "_started", "most")

    def __init__(self, most: int, name: str) -> None:
        self.most = most
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = allocate_lock()
        self._free = 0  # threads that wait, less the jobs that wait for them
        self._started = 0
        self._closed = False

    def submit(self, work: Callable[[], None], *, spare: bool = False) -> bool:
        """Have `work`, which never raises, done by one of the threads; False if there is none to do it.

        spare: only if somebody is free or can be started; else it waits for its turn.
        """
        with self._lock:
            if self._closed:
                return False
            if self._free <= 0 and self._started < self.most:
                self._start()
            if not self._started or (spare and self._free <= 0):
                return False
            self._free -= 1
        self._jobs.put(work)
        return True

    def _start(self) -> None:
        import threading

        try:
            threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        except RuntimeError:
            return  # RLIMIT_NPROC: those that run have to do, or whoever asks
        self._started += 1
        self._free += 1

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:
                with self._lock:
                    self._started -= 1  # another one takes the place of this thread
                raise
            del job
            with self._lock:
                self._free += 1

    def close(self) -> None:
        """Let the threads end once they have done what is theirs; nothing new is taken."""
        with self._lock:
            self._closed = True
            started = self._started
        for _ in range(started):
            self._jobs.put(None)
