"""Listing a served host directory.

Layer `fs`, a part of `Passthrough`. A cookie is the host filesystem's own position (d_off, 64 bits): seekdir(3) works
as on the host, also while names come and go.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import S_IFDIR, Handle
from fusewire.fs.passthrough.nodes import STATUS
from fusewire.fs.passthrough.watch import Watch
from fusewire.linux import files
from fusewire.wire.codec import DIRENTPLUS, DirBuffer, timeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.ops import Buffer, Caller

_MOST = 32768  # bytes of entries that are read from the host at once


class Directories(Watch):
    """The operations on open directories."""

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        node = self.nodes.get(nodeid)
        if node.kind != S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", node.name)
        handle = Handle(node, self._reopen(node, os.O_RDONLY | os.O_DIRECTORY), flags)
        handle.lock = allocate_lock()
        if self.watching:
            self._look_at(node, handle.fd)
        return self.handles.add(handle), self.config.mode.dir_flags

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        self._directory(fh)  # a file's has more to it
        self.handles.remove(fh)

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        self._sync(self.handles.get(fh).fd, fsync_flags)

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        handle = self._directory(fh)
        buffer = DirBuffer(size)
        mark = self._elsewhere(handle.node)
        if not mark:
            self._list(handle, offset, size, buffer.add)
        else:
            self._list(handle, offset, size, lambda name, ino, cookie, kind: buffer.add(name, ino ^ mark, cookie, kind))
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        handle = self._directory(fh)
        buffer = DirBuffer(size)
        node, directory, data = handle.node, handle.fd, buffer.data
        statx, enter, attributes, add, pack = (
            files.statx,
            self.nodes.enter,
            self._attr,
            buffer.add_plus,
            DIRENTPLUS.pack,
        )
        (entry_s, entry_ns), (attr_s, attr_ns) = timeout(self._entry_timeout), timeout(self._attr_timeout)

        def add_entry(name: bytes, ino: int, cookie: int, kind: int) -> bool:
            if name in (b".", b".."):
                return add(name, cookie, None, ino, kind)
            length = len(name)
            padding = -length & 7
            if len(data) + 152 + length + padding > size:
                return False
            try:
                status = statx(directory.number, name, files.AT_SYMLINK_NOFOLLOW, STATUS)
            except OSError:
                # Removed since it was read, or not to be had (a dead network mount): a name without an inode. Whoever
                # looks it up hears why.
                return add(name, cookie, None, ino, kind)
            nodeid, child = enter(node, directory, name, status)
            attr = attributes(child, status)
            data.extend(pack(
                nodeid, 0, entry_s, attr_s, entry_ns, attr_ns, *attr, attr[0], cookie, length, attr[9] >> 12
            ))  # fmt: skip
            data.extend(name + bytes(padding))
            return True

        self._list(handle, offset, size, add_entry)
        return buffer.data

    def _directory(self, fh: int) -> Handle:
        handle = self.handles.get(fh)
        if handle.lock is None:
            raise NotADirectoryError(errno.ENOTDIR, "the handle is that of a file", fh)
        return handle

    def _list(self, handle: Handle, offset: int, size: int, add: Callable[[bytes, int, int, int], bool]) -> None:
        """Give the entries after the cookie `offset` to `add`, until it takes no more or the directory ends."""
        with handle.lock:
            pending = handle.pending
            if offset != handle.cookie or not offset:
                pending = []
                # lseek(2) takes positions as signed numbers; some network filesystems use all 64 bits.
                os.lseek(handle.fd.number, offset - (1 << 64) if offset >> 63 else offset, os.SEEK_SET)
                handle.cookie = offset
            full = False
            while not full:
                if not pending:
                    buffer = bytearray(min(max(size, 4096), _MOST))
                    try:
                        length = files.getdents64(handle.fd.number, buffer)
                    except OSError:
                        if handle.cookie != offset:  # what has been counted has to be given; the error comes again
                            break
                        raise
                    if not length:
                        break
                    pending = files.parse_dents(buffer, length)
                for done, (name, ino, cookie, kind) in enumerate(pending):
                    if not add(name, ino, cookie & 0xFFFFFFFFFFFFFFFF, kind):
                        pending = pending[done:]
                        full = True
                        break
                    handle.cookie = cookie & 0xFFFFFFFFFFFFFFFF
                else:
                    pending = []
            handle.pending = pending
