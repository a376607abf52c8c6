"""Answers that wait for the network: work in a thread, and a `Pending` in the meantime.

Layer `fs`, part of `fs.remote`.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from typing import TYPE_CHECKING, Any

from fusewire.ops import Pending

if TYPE_CHECKING:
    from collections.abc import Callable


class Job:
    """`work`, and then `commit` with what it gave, which is what the caller hears of.

    What makes the answer count (a lookup, a handle) belongs into `commit`: it is not called for one who has given up.
    lasting: it changes something, and giving up would say nothing about whether it did.
    """

    __slots__ = ("_commit", "_ended", "_failed", "_given_up", "_lock", "_work", "pending")

    def __init__(
        self,
        work: Callable[[], Any],
        commit: Callable[[Any], Any] | None,
        failed: Callable[[OSError], None],
        *,
        lasting: bool,
    ) -> None:
        self._work = work
        self._commit = commit
        self._failed = failed
        self._lock = allocate_lock()
        self._given_up = False
        self._ended = False
        self.pending = Pending(None if lasting else self._give_up)

    def _give_up(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._given_up = True
        self.pending.fail(InterruptedError(errno.EINTR, "the caller gave up"))

    def __call__(self) -> None:
        """Do it."""
        try:
            result = self._work()
            with self._lock:
                if self._given_up:
                    return
                self._ended = True
                if self._commit is not None:
                    result = self._commit(result)
        except OSError as error:
            self._failed(error)
            self.pending.fail(error)
        except Exception as error:  # noqa: BLE001 - the caller's answer: the session logs it, and makes an errno of it
            self.pending.fail(error)
        else:
            self.pending.complete(result)
