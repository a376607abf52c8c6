"""Listing a served host directory.

Layer `fs`, a part of `Passthrough`. A cookie is the host filesystem's own position (d_off, 64 bits): seekdir(3) works
as on the host, also while names come and go.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from struct import Struct
from time import monotonic
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import ATTR, S_IFDIR, Handle, wire_device
from fusewire.fs.passthrough.watch import Watch
from fusewire.linux import files
from fusewire.wire.codec import DIRENT, DirBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fusewire.fs.passthrough.nodes import Node
    from fusewire.linux.files import Dirent
    from fusewire.ops import Buffer, Caller

_THEMSELVES = (b".", b"..")
_MOST = 32768  # bytes of entries that are read from the host at once
_MOST_PLUS = 1 << 20  # bytes of an answer; what a client asks for is only a claim
_DIRENTPLUS = Struct("=Q32s" + ATTR + DIRENT.format[1:]).pack_into
_DIRENT = DIRENT.pack_into


class Directories(Watch):
    """The operations on open directories."""

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        node = self.nodes.get(nodeid)
        if node.kind != S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", node.name)
        handle = Handle(node, self.nodes.open_directory(node), flags)
        node.lend(handle.fd)
        handle.lock = allocate_lock()
        if self.watching:
            self._look_at(node, handle.fd)
        return self.handles.add(handle), self.config.mode.dir_flags

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        handle = self._directory(fh)  # a file's has more to it
        self.handles.remove(fh)
        handle.node.lent.remove(handle.fd)  # type: ignore[attr-defined]

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        self._sync(self.handles.get(fh).fd, fsync_flags)

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        handle = self._directory(fh)
        buffer = DirBuffer(size)
        mark = self._elsewhere(handle.node)
        with handle.lock:
            for entries in self._listing(handle, offset, size):
                for name, ino, cookie, kind in entries:
                    if not buffer.add(name, ino ^ mark, cookie, kind):
                        break
                    handle.cookie = cookie
                    handle.given += 1
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        handle = self._directory(fh)
        node, directory, plain, valid = handle.node, handle.fd.number, self._plain, self._entry_valid
        find, enter, shown, pack = files.status, self.nodes.enter, self._shown, _DIRENTPLUS
        size = min(size, _MOST_PLUS)
        data = bytearray(size)
        end = 0
        with handle.lock:
            for entries in self._listing(handle, offset, size):
                if not offset and not end:
                    handle.bare = self._is_known(node, len(entries))
                bare = handle.bare
                for name, ino, cookie, kind in entries:
                    length = len(name)
                    after = end + 152 + (length + 7 & ~7)
                    if after > size:
                        break
                    status = None
                    if not bare and (name[0] != 46 or name not in _THEMSELVES):
                        try:
                            status = find(directory, name, files.AT_SYMLINK_NOFOLLOW)
                        except OSError:
                            pass  # removed since it was read, or a dead network mount: whoever looks it up hears why
                    if status is None:
                        _DIRENT(data, end + 128, ino, cookie, length, kind)  # a name without an inode
                    else:
                        flags = 0
                        nodeid, child = enter(node, handle.fd, name, status)
                        blksize, owner, mode, ino, blocks, at, at_ns, _, ct, ct_ns, mt, mt_ns, rdev, place = status
                        if place != plain:
                            ino, owner, flags = shown(child, ino, owner)
                        pack(
                            data, end, nodeid, valid, ino, blocks, at, mt, ct, at_ns, mt_ns, ct_ns,
                            mode, owner, wire_device(rdev) if rdev else 0, blksize, flags,
                            ino, cookie, length, mode >> 12,
                        )  # fmt: skip
                    data[end + 152 : end + 152 + length] = name
                    end = after
                    handle.cookie = cookie
                    handle.given += 1
        del data[end:]
        return data

    def _is_known(self, node: Node, entries: int) -> bool:
        """Tell whether the client has looked up most of a directory's names just now, one by one.

        Then their attributes need not come with the names once more: `git status` looks at all files that it knows of,
        and lists their directories after that.
        """
        looked, node.looked = node.looked, 0
        return 2 * looked > entries and monotonic() - node.looked_since < self._attr_timeout

    def _directory(self, fh: int) -> Handle:
        handle = self.handles.get(fh)
        if handle.lock is None:
            raise NotADirectoryError(errno.ENOTDIR, "the handle is that of a file", fh)
        return handle

    def _listing(self, handle: Handle, offset: int, size: int) -> Iterator[Sequence[Dirent]]:
        """Give the entries after the cookie `offset`, in portions, until one of them is not used up.

        Whoever takes them sets `handle.cookie` to the cookie of the last that he took, and counts them in
        `handle.given`.
        """
        pending, handle.pending = handle.pending, ()
        if offset != handle.cookie or not offset:
            pending = ()
            # lseek(2) takes positions as signed numbers; some network filesystems use all 64 bits.
            os.lseek(handle.fd.number, offset - (1 << 64) if offset >> 63 else offset, os.SEEK_SET)
            handle.cookie = offset
        while True:
            if not pending:
                buffer = bytearray(min(max(size, 4096), _MOST))
                try:
                    length = files.getdents64(handle.fd.number, buffer)
                except OSError:
                    if handle.cookie != offset:  # what has been counted has to be given; the error comes again
                        return
                    raise
                if not length:
                    return
                pending = files.parse_dents(buffer, length)
            handle.given = 0
            yield pending
            if handle.given < len(pending):
                handle.pending = pending[handle.given :]
                return
            pending = ()
