"""Files of an overlay: their data, attributes and extended attributes, from the filesystem that counts.

Layer `fs`, a part of `fs.overlay`. A file that is open for reading follows its node: once that has been copied up, it
is read from the copy. (The kernel's overlayfs goes on reading the old file; programs that rely on that are not known,
and the page cache, which is one per file here, would not know whose pages it has.)
"""

from __future__ import annotations

import errno
import os
import stat
from time import time
from typing import TYPE_CHECKING, Any

from fusewire.fs.overlay.base import NONE, Handle
from fusewire.fs.overlay.layers import OURSELVES, attr_of, entry_of
from fusewire.fs.overlay.marks import is_private
from fusewire.fs.overlay.names import Names
from fusewire.linux import files
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewire.fs.overlay.nodes import Node
    from fusewire.ops import Buffer, Caller, Setattr, Statfs

_KEPT = abi.FOPEN_KEEP_CACHE
_DAY = 86400
_SETTING = (0x40086602, 0x40046602, 0x401C5820)  # FS_IOC_SETFLAGS of either width, FS_IOC_FSSETXATTR: ioctl_iflags(2)


class Data(Names):
    """The operations on files."""

    gathers = True

    # Attributes

    def getattr(self, nodeid: int, flags: int, fh: int) -> bytes:
        node = self._nodes.get(nodeid)
        return self._attributes(node, self._attr(node))

    def statx(self, nodeid: int, flags: int, fh: int, sx_flags: int, sx_mask: int) -> tuple[Sequence[int], float, int]:
        node = self._nodes.get(nodeid)
        if node.upper:
            fields, _, _ = self._upper.statx(node.upper, 0, 0, sx_flags, sx_mask)
            merged = list(fields)
            merged[files.SX_INO] = node.ino
            if node.kind == stat.S_IFDIR and node.lower:
                merged[files.SX_NLINK] = 1
            fields = merged
        else:
            fields = self._lower.statx(node.handed, node.ino)
        return fields, self._attr_seconds, 0

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> bytes:
        node = self._nodes.get(nodeid)
        if not node.upper:
            self._copy_up(node, change.size if change.valid & abi.FATTR_SIZE else None)
        if change.valid & abi.FATTR_FH:
            fh = self._handles.get(change.fh).fh
            change = change._replace(fh=fh) if fh != NONE else change._replace(valid=change.valid & ~abi.FATTR_FH)
        return self._attributes(node, attr_of(self._upper.setattr(caller, node.upper, change)))

    def access(self, caller: Caller, nodeid: int, mask: int) -> None:
        """Ask the host: only without default_permissions, where the caller and the server are the same user."""
        node = self._nodes.get(nodeid)
        if node.upper:
            self._upper.access(caller, node.upper, mask)

    def statfs(self, nodeid: int) -> Statfs:
        return self._upper.statfs(abi.FUSE_ROOT_ID)

    def syncfs(self, nodeid: int) -> None:
        self._upper.syncfs(abi.FUSE_ROOT_ID)

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        if is_private(name):
            raise OSError(errno.EOPNOTSUPP, "attributes of overlay filesystems are not to be seen here", name)
        node = self._nodes.get(nodeid)
        if node.upper:
            return self._upper.getxattr(caller, node.upper, name)
        return self._lower.getxattr(caller, node.handed, name)

    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        node = self._nodes.get(nodeid)
        if node.upper:
            names = self._upper.listxattr(caller, node.upper).split(b"\0")[:-1]
        else:
            names = self._lower.listxattr(caller, node.handed)
        return b"".join(name + b"\0" for name in names if not is_private(name))

    def setxattr(self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int) -> None:
        upper = self._changed(nodeid, name)
        self._upper.setxattr(caller, upper, name, value, flags, setxattr_flags)

    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> None:
        self._upper.removexattr(caller, self._changed(nodeid, name), name)

    def _changed(self, nodeid: int, name: bytes) -> int:
        if is_private(name):
            raise OSError(errno.EOPNOTSUPP, "attributes of overlay filesystems are not to be set here", name)
        node = self._nodes.get(nodeid)
        if not node.upper:
            self._copy_up(node)
        return node.upper

    # Opening

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, ...]:
        node = self._nodes.get(nodeid)
        if node.kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, "is a directory", nodeid)
        if not node.upper and (flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC):
            self._copy_up(node, 0 if flags & os.O_TRUNC else None)
        if node.upper:
            fh, *answer = self._upper.open(caller, node.upper, flags, open_flags)
            keep = answer[0]
            if self._is_read_late(node.upper):
                # Reading is to move the access time (relatime, mount(8)): the host hears of it this once.
                keep &= ~_KEPT
            return self._handles.add(Handle(node, fh)), keep
        return self._handles.add(Handle(node, NONE, self._lower.open(node.handed, flags))), _KEPT

    def _is_read_late(self, upper: int) -> bool:
        attr = self._upper.attr(upper)
        accessed = attr[3], attr[6]
        return accessed <= (attr[4], attr[7]) or accessed <= (attr[5], attr[8]) or time() - accessed[0] > _DAY

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[bytes, tuple[int, ...]]:
        above = self._in(parent)
        with self._names:
            try:
                reply, opened = self._make(
                    above,
                    name,
                    lambda at, by: self._upper.create(caller, at, by, flags | os.O_EXCL, mode, umask, open_flags),
                )
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                found = self._find(above, name)
                if found is None:
                    raise OSError(errno.ESTALE, "the name has gone again", name) from None
                node = found[0]
            else:
                return self._created(above, name, reply, opened)
        # Somebody was quicker; the kernel had not heard of it. It is opened outside of the lock: it may be copied up.
        try:
            if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
                raise OSError(errno.ESTALE, "there is something else by that name now", name)
            answer = self.open(caller, node.nodeid, flags, open_flags)
            return self._entry(node, self._attr(node)), answer
        except BaseException:
            self._leave(node)
            raise

    def _created(self, parent: Node, name: bytes, reply: Any, opened: tuple[int, ...]) -> tuple[bytes, tuple[int, ...]]:
        found = entry_of(reply)
        assert found is not None
        node, attr = self._found_above(parent, name, found, True)
        return self._entry(node, attr), (self._handles.add(Handle(node, opened[0])), opened[1])

    def tmpfile(
        self, caller: Caller, parent: int, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[bytes, tuple[int, ...]]:
        above = self._in(parent)
        with self._names:
            reply, opened = self._upper.tmpfile(caller, above.upper, flags, mode, umask, open_flags)
            return self._created(above, b"", reply, opened)

    def flush(self, nodeid: int, fh: int, lock_owner: int) -> None:
        handle = self._handles.get(fh)
        if handle.fh != NONE:
            self._upper.flush(handle.node.upper, handle.fh, lock_owner)

    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        handle = self._handles.remove(fh)
        if handle.below != NONE:
            self._lower.release(handle.node.handed, handle.below)
        if handle.fh != NONE:
            self._upper.release(handle.node.upper, handle.fh, flags, release_flags, lock_owner)

    # Data

    def _is_lower(self, handle: Handle) -> bool:
        """Tell whether a handle is (still) one of the lower filesystem; one whose file was copied up changes over."""
        if handle.fh != NONE:
            return False
        node = handle.node
        if not node.upper:
            return True
        with self._names:
            if handle.fh == NONE:
                try:
                    handle.fh = self._upper.open(OURSELVES, node.upper, os.O_RDONLY, 0)[0]
                except PermissionError:  # its mode has been changed since; who has it open may go on
                    return True
        return False

    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> Any:
        handle = self._handles.get(fh)
        if self._is_lower(handle):
            return self._lower.read(handle.node.handed, handle.below, offset, size)
        return self._upper.read(handle.node.upper, handle.fh, offset, size, read_flags, lock_owner, flags)

    def _writable(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle.fh == NONE:
            raise OSError(errno.EBADF, "the file is not open for writing", fh)
        return handle

    def write(self, nodeid: int, fh: int, offset: int, data: Any, write_flags: int, lock_owner: int, flags: int) -> int:
        handle = self._writable(fh)
        return self._upper.write(handle.node.upper, handle.fh, offset, data, write_flags, lock_owner, flags)

    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        handle = self._handles.get(fh)
        if not self._is_lower(handle):
            self._upper.fsync(handle.node.upper, handle.fh, fsync_flags)

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        handle = self._handles.get(fh)
        if self._is_lower(handle):
            return self._lower.lseek(handle.node.handed, handle.below, offset, whence)
        return self._upper.lseek(handle.node.upper, handle.fh, offset, whence)

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> None:
        handle = self._writable(fh)
        self._upper.fallocate(handle.node.upper, handle.fh, offset, length, mode)

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        source, target = self._handles.get(fh), self._writable(fh_out)
        if self._is_lower(source):
            raise OSError(errno.EXDEV, "the two files are in different filesystems", nodeid)  # the kernel copies itself
        upper = target.node.upper
        return self._upper.copy_file_range(
            source.node.upper, source.fh, offset, upper, target.fh, offset_out, length, flags
        )

    def ioctl(
        self, caller: Caller, nodeid: int, fh: int, flags: int, cmd: int, arg: int, data: memoryview, out_size: int
    ) -> tuple[int, Buffer]:
        node = self._nodes.get(nodeid)
        if not node.upper and cmd in _SETTING:
            self._copy_up(node)
        if not node.upper or node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.ENOTTY, "the lower filesystem has no control calls", nodeid)
        return self._upper.control(caller, node.upper, cmd, data, out_size)
