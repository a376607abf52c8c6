"""Decompress in parallel, and ahead of a reader that goes through a file in order.

Layer `fs`. A `Prefetcher` has a few threads that only call `Image.load`: the decompressors let the interpreter go, so
they run beside each other and beside the workers that answer the kernel. It owns no data: blocks land in the image's
own bounded cache.
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewire.formats.squashfs import Image, Inode, Key
    from fusewire.ops import Buffer

# How far ahead of a sequential reader to decompress, in bytes. The kernel reads ahead 128 to 256 KiB by itself.
WINDOW = 1 << 20
_FILES_WATCHED = 256


class Prefetcher:
    """Reads files of one image with the help of `threads` decompressing threads, started at the first use."""

    def __init__(self, image: Image, threads: int | None = None, window: int = WINDOW) -> None:
        self._image = image
        self._threads = threads if threads is not None else min(os.cpu_count() or 1, 8)
        self._jobs: SimpleQueue[list[Key] | None] = SimpleQueue()
        self._started = False
        self._next: dict[int, int] = {}  # inode reference -> where a sequential reader would go on
        self._ahead: dict[int, int] = {}  # inode reference -> how far has been asked for already
        self._window = window

    def read(self, inode: Inode, offset: int, size: int) -> Sequence[Buffer]:
        """Give the bytes of a range of a file; blocks that are missing are decompressed side by side."""
        image = self._image
        pieces = image.plan(inode, offset, size)
        if self._threads > 1:
            ref = inode.ref
            if len(pieces) > 1:
                self._share([piece[0] for piece in pieces[1:] if piece[0] is not None])
            if offset and self._next.get(ref) == offset:
                self._run_ahead(inode, offset + size)
            elif len(self._next) >= _FILES_WATCHED:
                self._next.clear()
                self._ahead.clear()
            self._next[ref] = offset + size
        return image.gather(pieces)

    def _run_ahead(self, inode: Inode, position: int) -> None:
        if position >= inode.size or self._jobs.qsize() > 2 * self._threads:
            return
        start = max(position, self._ahead.get(inode.ref, 0))
        end = min(position + self._window, inode.size)
        if end - start < min(self._window // 2, inode.size - start) or start >= end:
            return
        self._ahead[inode.ref] = end
        self._share([piece[0] for piece in self._image.plan(inode, start, end - start) if piece[0] is not None])

    def _share(self, keys: list[Key]) -> None:
        """Have blocks loaded by the threads, in order; many small ones go in a few jobs."""
        held = self._image.held
        missing = [key for key in keys if not held(key)]
        if not missing:
            return
        if not self._started:
            self._start()
        step = max(1, len(missing) // (2 * self._threads))
        for first in range(0, len(missing), step):
            self._jobs.put(missing[first : first + step])

    def _start(self) -> None:
        import threading

        self._started = True
        for number in range(self._threads):
            threading.Thread(target=self._work, name=f"decompress-{number}", daemon=True).start()

    def _work(self) -> None:
        load = self._image.load
        while (keys := self._jobs.get()) is not None:
            for key in keys:
                try:
                    load(key)
                except OSError:
                    continue  # whoever reads the block meets the error itself

    def close(self) -> None:
        """End the threads, once what they have begun is done."""
        if self._started:
            for _ in range(self._threads):
                self._jobs.put(None)
