"""How often and how long to try again, for requests that may be repeated.

Layer `fs`, part of `fs.remote`. Only what changes nothing on the other side comes here.
"""

from __future__ import annotations

import errno
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")

_FIRST_PAUSE = 0.2  # seconds; each further one is twice as long
_LONGEST_PAUSE = 10.0
_LONGEST_WISH = 60.0  # what a server may ask for by Retry-After


class Patience(NamedTuple):
    """`attempts` in all; `timeout`: seconds without a byte that end one; `total`: seconds after which none begins."""

    attempts: int = 5
    timeout: float = 30.0
    total: float = 120.0
    first_pause: float = _FIRST_PAUSE


class Transient(Exception):  # noqa: N818 - it is not the error that anybody sees
    """An attempt that failed in a way that may pass. `after`: how many seconds the server asks for."""

    def __init__(self, reason: str, *, timed_out: bool = False, after: float = 0.0) -> None:
        super().__init__(reason)
        self.timed_out = timed_out
        self.after = after


def persist(attempt: Callable[[], T], patience: Patience, pause: Callable[[float], bool], what: str) -> T:
    """Give what `attempt` gives, trying again on `Transient`. `pause(seconds)` waits, and is True when to give up.

    Raises OSError that names `what`: ETIMEDOUT when the last attempt took too long, else EIO.
    """
    begun = monotonic()
    wait = patience.first_pause
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except Transient as error:
            left = patience.total - (monotonic() - begun)
            rest = max(wait, min(error.after, _LONGEST_WISH))
            if number >= patience.attempts or left <= rest or pause(rest):
                code = errno.ETIMEDOUT if error.timed_out else errno.EIO
                tries = f" (tried {number} times)" if number > 1 else ""
                raise OSError(code, f"{what}: {error}{tries}") from error
            wait = min(2 * wait, _LONGEST_PAUSE)
