"""Decompress in parallel, and ahead of a reader that goes through a file, or through the whole image, in order.

Layer `fs`. A `Prefetcher` has a few threads that only call `Image.load`: the decompressors let the interpreter go, so
they run beside each other and beside the workers that answer the kernel. It owns no data: blocks land in the image's
own bounded cache.
"""

from __future__ import annotations

import os
from _queue import SimpleQueue
from typing import TYPE_CHECKING

from fusewire.formats.squashfs_layout import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusewire.formats.squashfs import Image, Inode, Key
    from fusewire.ops import Buffer

# How far ahead of a sequential reader to decompress, in bytes. The kernel reads ahead 128 to 256 KiB by itself.
WINDOW = 1 << 20
_FILES_WATCHED = 256

# tar, grep -r, cp -r and a compiler that loads its headers open file after file in the order in which mksquashfs gave
# out inode numbers. After this many files in a row that lie near each other, the next ones are decompressed ahead;
# symlinks and directories take numbers too, so near is not next. Of each file only the beginning: it may be all that
# is wanted, and who reads on is noticed by its reading.
_IN_A_ROW = 4
_NEAR = 64
_BEGINNING = 256 << 10
_MOST_INODES = 512
_NOT_NOW = 1 << 62


def _helpers() -> int:
    """One thread per processor: the worker that answers mostly waits for them. With one processor nobody can help."""
    processors = len(os.sched_getaffinity(0))
    return min(processors, 8) if processors > 1 else 0


class Prefetcher:
    """Reads files of one image with the help of `threads` decompressing threads, started at the first use."""

    def __init__(self, image: Image, threads: int | None = None, window: int = WINDOW) -> None:
        self._image = image
        self._threads = threads if threads is not None else _helpers()
        self._jobs: SimpleQueue[list[Key] | int | None] = SimpleQueue()
        self._started = False
        self._next: dict[int, int] = {}  # inode reference -> where a sequential reader would go on
        self._ahead: dict[int, int] = {}  # inode reference -> how far has been asked for already
        self._window = window
        self._follows = image.superblock.export_table != ABSENT
        self._last = 0  # inode number of the file that was begun last
        self._in_a_row = 0
        self._refill = 0  # inode number from which on the next files are to be fetched
        self._fetched = 0  # inode number up to which they have been
        self.may_block: Callable[[bool], None] | None = None

    def read(self, inode: Inode, offset: int, size: int) -> Sequence[Buffer]:
        """Give the bytes of a range of a file; blocks that are missing are decompressed side by side."""
        image = self._image
        pieces = image.plan(inode, offset, size)
        if self._threads:
            ref = inode.ref
            busy = self._jobs.qsize() > 2 * self._threads
            if len(pieces) > 1:
                self._share([piece[0] for piece in pieces[1:] if piece[0] is not None])
            if not offset and self._follows:
                self._follow(inode.number)
            if offset and self._next.get(ref) == offset and not busy:
                self._run_ahead(inode, offset + size)
            elif len(self._next) >= _FILES_WATCHED:
                self._next.clear()
                self._ahead.clear()
            self._next[ref] = offset + size
        if self.may_block is not None:
            held = image.held
            for key, _, _ in pieces:
                if key is not None and not held(key):
                    self.may_block(False)
                    break
        return image.gather(pieces)

    def _run_ahead(self, inode: Inode, position: int) -> None:
        start = max(position, self._ahead.get(inode.ref, 0))
        end = min(position + self._window, inode.size)
        if end - start < min(self._window // 2, inode.size - start) or start >= end:
            return
        self._ahead[inode.ref] = end
        self._share([piece[0] for piece in self._image.plan(inode, start, end - start) if piece[0] is not None])

    def _follow(self, number: int) -> None:
        """Notice a reader that opens files in the image's order, and have the next ones fetched."""
        step = number - self._last
        self._last = number
        if not 0 < step <= _NEAR:
            self._in_a_row = self._refill = self._fetched = 0
            return
        self._in_a_row += 1
        if self._in_a_row >= _IN_A_ROW and number >= self._refill:
            self._refill = _NOT_NOW
            if self._help():
                self._jobs.put(number + 1)

    def _fetch_files(self, number: int) -> None:
        """Load the beginnings of the files from inode `number` on, up to the window's size; on a helping thread."""
        image = self._image
        first = number = max(number, self._fetched)
        room = self._window
        while room > 0 and number - first < _MOST_INODES:
            try:
                inode = image.inode(image.find_inode(number))
                if inode.type == 2:
                    size = min(inode.size, _BEGINNING)
                    for key, _, _ in image.plan(inode, 0, size):
                        if key is not None:
                            image.load(key)
                    room -= size
            except OSError:
                break  # the last one, or damage that its reader will meet
            number += 1
        self._fetched = number
        self._refill = (first + number) // 2

    def _share(self, keys: list[Key]) -> None:
        """Have blocks loaded by the threads, in order; many small ones go in a few jobs."""
        held = self._image.held
        missing = [key for key in keys if not held(key)]
        if not missing or not self._help():
            return
        step = max(1, len(missing) // (2 * self._threads))
        for first in range(0, len(missing), step):
            self._jobs.put(missing[first : first + step])

    def _help(self) -> bool:
        """Start the threads, once; False if the system allows none (RLIMIT_NPROC): the workers do without."""
        if not self._started:
            import threading

            self._started = True
            wanted, self._threads = self._threads, 0
            for number in range(wanted):
                try:
                    threading.Thread(target=self._work, name=f"decompress-{number}", daemon=True).start()
                except RuntimeError:
                    break
                self._threads += 1
        return self._threads > 0

    def _work(self) -> None:
        load = self._image.load
        while (job := self._jobs.get()) is not None:
            if isinstance(job, int):
                self._fetch_files(job)
                continue
            for key in job:
                try:
                    load(key)
                except OSError:
                    continue  # whoever reads the block meets the error itself

    def close(self) -> None:
        """End the threads, once what they have begun is done."""
        if self._started:
            for _ in range(self._threads):
                self._jobs.put(None)
