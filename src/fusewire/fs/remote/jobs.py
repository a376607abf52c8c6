"""Answers that wait for the network: work in a thread, and a `Pending` in the meantime.

Layer `fs`, part of `fs.remote`.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from threading import Condition
from typing import TYPE_CHECKING, Any

from fusewire.ops import Pending

if TYPE_CHECKING:
    from collections.abc import Callable


class Gate:
    """Any number go through at a time, or one behind whom it is shut, and who has waited until nobody is inside."""

    __slots__ = ("_changed", "_inside", "_shut")

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside = 0
        self._shut = False

    def enter(self, *, shut: bool = False) -> None:
        """Wait for who is before us."""
        with self._changed:
            while self._shut:
                self._changed.wait()
            self._shut = shut
            while shut and self._inside:
                self._changed.wait()
            self._inside += not shut

    def leave(self) -> None:
        """Let the next one in."""
        with self._changed:
            if self._inside:
                self._inside -= 1
            else:
                self._shut = False
            self._changed.notify_all()


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
