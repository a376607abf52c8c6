"""What a thread serves now: for `fuse_get_context()` and `fuse_exit()`, which have no argument to find it by.

Layer `compat`. Kept by thread, set for every request by running.py; nothing here looks into requests but for the ids.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

from fusewire.wire.codec import IN_HEADER


class Ending(Protocol):
    """What serves, and can be told to end."""

    def end(self) -> None:
        """Have it end soon."""


class Context(threading.local):
    """The request that this thread serves, and whose it is; both None outside of one."""

    request: Any = None
    runner: Ending | None = None

    def ids(self) -> tuple[int, int, int]:
        """Give (uid, gid, pid) of who asks; zeros outside of a request."""
        if self.request is None:
            return 0, 0, 0
        _, _, _, _, uid, gid, pid, _ = IN_HEADER.unpack_from(self.request)
        return uid, gid, pid

    def copy(self) -> tuple[bytes | None, Ending | None]:
        """Give it to `resume` in another thread, which goes on with the request when this one has left it."""
        return None if self.request is None else bytes(self.request[: IN_HEADER.size]), self.runner

    def resume(self, context: tuple[bytes | None, Ending | None]) -> None:
        """Serve in this thread what `copy` was called in."""
        self.request, self.runner = context


CONTEXT = Context()
