"""What the vhost-user state machine needs of the one who drives it: `Backend`; and what it tells of a ring: `Vring`.

Layer `transport`: an interface and a record, no behaviour, no I/O.
"""

from __future__ import annotations

from typing import Any, Protocol


class Vring:
    """One ring as the front end has set it up. The backend only reads it.

    `desc`, `avail` and `used` are addresses of the front end's (None until SET_VRING_ADDR), which lie in the memory
    regions' user addresses whenever the ring runs; `log` is the guest-physical address under which writes to the used
    ring are marked in the dirty log, None if they are not. `size` is a power of two, 0 until SET_VRING_NUM. `base` is
    the next index to be taken from the available ring. `features` are those agreed on when the ring was started.
    """

    __slots__ = ("avail", "base", "desc", "enabled", "features", "kick", "log", "running", "size", "used")

    def __init__(self) -> None:
        """Begin as the specification has it: stopped and disabled ("Ring states")."""
        self.size = 0
        self.desc: int | None = None
        self.avail: int | None = None
        self.used: int | None = None
        self.log: int | None = None
        self.base = 0
        self.kick = -1
        self.features = 0
        self.enabled = False
        self.running = False

    def areas(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, address, length and alignment of the ring's three parts (virtio 1.2, 2.7); none without addresses."""
        if self.desc is None or self.avail is None or self.used is None:
            return ()
        return (
            ("descriptor table", self.desc, 16 * self.size, 16),
            ("available ring", self.avail, 6 + 2 * self.size, 2),
            ("used ring", self.used, 6 + 8 * self.size, 4),
        )


class Backend(Protocol):
    """What a device needs done: mappings, eventfds, threads.

    Every descriptor in an argument belongs to the backend from the call on, also where the call raises. A call with -1
    for a descriptor lets go of the one before and never fails. OSError and ValueError refuse the message that led to
    the call, and are allowed where it says so; the text reaches the log. All calls come from the thread that calls the
    device.
    """

    def close_fd(self, fd: int) -> None:
        """Close a descriptor that nobody wants."""

    def map_region(self, fd: int, size: int, mmap_offset: int, guest_addr: int, user_addr: int) -> Any:
        """Map `size` bytes of guest memory, shared, from byte `mmap_offset` of `fd`; give the region.

        The layout has been checked: no overlap, no wrap-around, no empty region; `mmap_offset` need not be a multiple
        of the page, but is as aligned as `user_addr`, to 16 bytes. Not in use before `set_memory`.
        Raises OSError, ValueError.
        """

    def unmap_region(self, region: Any) -> None:
        """Let go of a region that is in use no more, or never was; requests in work may still hold parts of it."""

    def set_memory(self, regions: list[Any]) -> None:
        """Serve from these regions and no others from now on: one step, also for the rings that run.

        Every ring that runs lies in them. Those that did not have been stopped before.
        """

    def start_queue(self, index: int, vring: Vring) -> None:
        """Begin to serve the ring, or to wait for `enable_queue` if it is not `vring.enabled`; take over `vring.kick`.

        Look at once whether there are requests: "back-ends SHOULD NOT rely on receiving a kick". Raises OSError,
        ValueError; the ring is stopped then.
        """

    def stop_queue(self, index: int) -> int:
        """Finish what is in work, serve the ring no more, close its kick; give the next index of the available ring.

        On return nothing touches the ring's memory or its call descriptor on its behalf any more.
        """

    def enable_queue(self, index: int, enabled: bool) -> None:
        """Serve a running ring, or let it wait: a request neither gets lost nor is begun while it is disabled."""

    def update_queue(self, index: int, vring: Vring) -> None:
        """Take the addresses and the `log` of a running ring anew from `vring`: requests in work are pushed there."""

    def set_call(self, index: int, fd: int) -> None:
        """Notify the driver by this eventfd from now on, running or not, and close the one before; -1: not at all.

        On a running ring, signal the new one once: what completed in between must not be lost.
        """

    def set_err(self, index: int, fd: int) -> None:
        """Tell the front end of a ring that has become unusable by this eventfd, and close the one before."""

    def set_log(self, fd: int, size: int, offset: int) -> None:
        """Map the dirty log, `size` bytes from `offset`: bit N stands for the guest-physical page N of 4 KiB.

        Replaces the one before. Raises OSError, ValueError.
        """

    def set_log_enabled(self, enabled: bool) -> None:
        """Mark all that is written to guest memory (VHOST_F_LOG_ALL). May come before there is a log to mark in."""

    def set_backend_channel(self, fd: int) -> None:
        """Keep the socket on which a device may make requests of its own; close the one before."""

    def make_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int, int]:
        """Make a zeroed region for tracking what is in flight; give a descriptor, its size and its offset in that.

        The descriptor stays the backend's: it goes out with the reply, and has to live until the next call of this, or
        `set_inflight` with -1. Raises OSError, ValueError.
        """

    def set_inflight(self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> None:
        """Track requests in this region from the next start of a ring on, and resume what it says is in flight.

        -1 lets go of it and of what `make_inflight` made. Raises OSError, ValueError.
        """

    def reset(self) -> None:
        """Forget what the driver has brought about (the FUSE session): a reset of the device; all rings are stopped."""
