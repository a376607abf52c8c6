"""Listing directories of an overlay: the names of both filesystems, each once.

Layer `fs`, a part of `fs.overlay`. A listing is made when a directory is read from its beginning, and read on from
there. A name keeps its cookie as long as the directory is open, so seekdir(3) works also after rewinddir(3).
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from typing import TYPE_CHECKING

from fusewire.fs.overlay.base import LOWER_MARK, Listing
from fusewire.fs.overlay.copyup import CopyUp
from fusewire.fs.overlay.marks import entries, is_reserved, is_whiteout_at
from fusewire.wire import abi
from fusewire.wire.codec import DirBuffer

if TYPE_CHECKING:
    from fusewire.fs.overlay.layers import Found
    from fusewire.fs.overlay.nodes import Node
    from fusewire.ops import Attr, Buffer, Caller

_DT_UNKNOWN, _DT_CHR, _DT_DIR = 0, 2, 4
_KEPT = abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE
_MOST = 1 << 20  # bytes of an answer


class Directories(CopyUp):
    """The operations on open directories."""

    def _merged(self, node: Node) -> list[tuple[bytes, int, int, Found | None]]:
        """Give (name, inode number, type, what it leads to below if that is known) of all names in a directory."""
        items: list[tuple[bytes, int, int, Found | None]] = []
        taken: set[bytes] = set()
        both: dict[bytes, int] = {}  # directories that may be merged: where they are in `items`
        if node.upper:
            fd = self._upper.open_listing(node.upper)
            for name, ino, _, kind in entries(fd.number):
                if is_reserved(name):
                    continue
                taken.add(name)
                if kind == _DT_UNKNOWN:
                    kind = stat.S_IFMT(os.stat(name, dir_fd=fd.number, follow_symlinks=False).st_mode) >> 12
                if kind == _DT_CHR and is_whiteout_at(fd.number, name):
                    continue
                if kind == _DT_DIR:
                    both[name] = len(items)
                items.append((name, self._shown.get(ino, ino), kind, None))
        if not node.lower:
            return items
        hidden = self._hidden(node)
        for name, ino, kind, found in self._lower.entries(node.lower):
            if name in hidden or is_reserved(name):
                continue
            if name not in taken:
                if kind in (_DT_CHR, _DT_UNKNOWN) and not self._covers(node, name):
                    continue
                taken.add(name)
                items.append((name, ino | LOWER_MARK, kind, found))
            elif name in both:
                place = both.pop(name)
                items[place] = (name, self._number_of(node, name, items[place][1]), _DT_DIR, None)
        return items

    def _number_of(self, parent: Node, name: bytes, ino: int) -> int:
        """Give the inode number that stat(2) will give, which is what a listing has to say; else `ino`."""
        try:
            node = self._known(parent, name)
        except OSError:  # whoever looks it up hears why
            return ino
        ino = node.ino
        self._nodes.forget(node, 1)
        return ino

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        with self._names:
            return self._listings.add(Listing(self._directory(nodeid))), _KEPT

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        self._listings.remove(fh)

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        node = self._nodes.get(nodeid)
        if node.upper:
            self._slow()
            self._upper.synchronise(node.upper, fsync_flags)

    def _list(self, listing: Listing, offset: int) -> list[tuple[int, bytes, int, int, Found | None]]:
        """Give what comes after the cookie `offset`: (cookie, name, inode number, type, where it leads to below)."""
        if listing.items is None or not offset:
            node = listing.node
            above = node.parent or node
            cookies = listing.cookies
            items: list[tuple[int, bytes, int, int, Found | None]] = [
                (1, b".", node.ino, _DT_DIR, None),
                (2, b"..", above.ino, _DT_DIR, None),
            ]
            merged = self._merged(node)
            gone = cookies.keys() - {item[0] for item in merged} if cookies else ()
            for name in gone:
                del cookies[name]
            for name, ino, kind, found in merged:
                cookie = cookies.get(name)
                if cookie is None:
                    cookie = cookies[name] = listing.next
                    listing.next += 1
                items.append((cookie, name, ino, kind, found))
            items.sort(key=lambda item: item[0])
            listing.items = items
            listing.places = [item[0] for item in items]
        return listing.items[bisect_right(listing.places, offset) :]

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        buffer = DirBuffer(size)
        listing = self._listings.get(fh)
        with self._names:
            for cookie, name, ino, kind, _ in self._list(listing, offset):
                if not buffer.add(name, ino, cookie, kind):
                    break
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        buffer = DirBuffer(min(size, _MOST))
        listing = self._listings.get(fh)
        node = listing.node
        with self._names:
            for cookie, name, ino, kind, below in self._list(listing, offset):
                if not buffer.room_for_plus(name):
                    break
                found: tuple[Node, Attr] | None = None
                if cookie > 2:
                    try:
                        found = self._plus(node, name, below)
                    except OSError:
                        pass  # a name without an inode: whoever looks it up hears why
                if found is None:
                    buffer.add_plus(name, cookie, None, ino, kind)
                else:
                    buffer.add_plus(name, cookie, self._entry(*found))
        return buffer.data

    def _plus(self, parent: Node, name: bytes, below: Found | None) -> tuple[Node, Attr] | None:
        if below is not None and not parent.upper:  # what is listed here can only be found there
            return self._found_below(parent, name, below)
        return self._find(parent, name)
