"""A writable layer over a read-only filesystem: our own overlay, for where the kernel's cannot be had.

Layer `fs`. The lower filesystem is any of ours that answers at once (an image, a directory); the upper one is a
directory of the host, laid out as the kernel's overlayfs and fuse-overlayfs have it, so that each of the three can go
on where another one has stopped.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fusewire.fs.overlay.data import Data
from fusewire.fs.overlay.layers import MODE, Lower
from fusewire.fs.overlay.marks import TEMPORARY, entries, remove_tree
from fusewire.wire.abi import FUSE_ROOT_ID

if TYPE_CHECKING:
    from fusewire.ops import Operations

__all__ = ["Overlay", "open_overlay", "root_mode"]


class Overlay(Data):
    """Shows `lower`, and keeps what is changed in a directory: `Overlay(lower, upper_fd, work_fd)`."""


def root_mode(lower: Operations) -> int:
    """Give the mode of a filesystem's root, which a new upper directory should have."""
    return Lower(lower).attr(FUSE_ROOT_ID)[MODE] & 0o7777


def open_overlay(lower: Operations, upper: int, work: int, **how: Any) -> Overlay:
    """Take over the lower filesystem and the descriptors of two directories, and lay one over the other.

    What an earlier overlay has left in the work directory is removed: nobody else may use it at the same time. `how`:
    further arguments of Overlay. Raises OSError; the descriptors are closed then, and the lower one is left alone.
    """
    try:
        for name, *_ in entries(work):
            # Nothing else: it may be a directory of that name in which somebody works.
            if name.startswith(TEMPORARY):
                remove_tree(work, name)
        return Overlay(lower, upper, work, **how)
    except BaseException:
        os.close(upper)
        os.close(work)
        raise
