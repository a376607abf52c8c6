"""The few ioctls of a served host directory that are about the file and not about a device.

Layer `fs`, a part of `Passthrough`: inode flags (chattr(1), lsattr(1)) and project ids. Everything else is refused: an
ioctl can do anything at all to the host, in the server's name.
"""

from __future__ import annotations

import errno
import fcntl
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import Base

if TYPE_CHECKING:
    from fusewire.ops import Buffer, Caller

# <linux/fs.h>. Their numbers are made of sizeof(long), what they move is an int: both widths are known here.
_FLAGS_SIZE, _FSXATTR_SIZE = 4, 28
_GETTING = {0x80086601: _FLAGS_SIZE, 0x80046601: _FLAGS_SIZE, 0x801C581F: _FSXATTR_SIZE}
_SETTING = {0x40086602: _FLAGS_SIZE, 0x40046602: _FLAGS_SIZE, 0x401C5820: _FSXATTR_SIZE}


class Ioctls(Base):
    """FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR, ioctl_iflags(2)."""

    def ioctl(
        self, caller: Caller, nodeid: int, fh: int, flags: int, cmd: int, arg: int, data: memoryview, out_size: int
    ) -> tuple[int, Buffer]:
        fd = self.handles.get(fh).fd
        size = _GETTING.get(cmd)
        if size is not None:
            # Eight bytes: should a filesystem take the number at its word and write a long.
            buffer = bytearray(max(size, 8))
            fcntl.ioctl(fd.number, cmd, buffer)
            return 0, buffer[: min(size, out_size)]
        size = _SETTING.get(cmd)
        if size is None:
            raise OSError(errno.ENOTTY, "this ioctl is not passed on", hex(cmd))
        if self.read_only:
            raise OSError(errno.EROFS, "the filesystem is read-only", hex(cmd))
        if len(data) < size:
            raise OSError(errno.EINVAL, "the ioctl's data is too short", hex(cmd))
        fcntl.ioctl(fd.number, cmd, bytes(data[:size]).ljust(8, b"\0"))
        return 0, b""
