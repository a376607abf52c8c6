"""Attributes, extended attributes and statistics of a served host directory.

Layer `fs`, a part of `Passthrough`.
"""

from __future__ import annotations

import errno
import os
from struct import Struct
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import S_IFDIR, S_IFLNK, Base
from fusewire.fs.passthrough.nodes import status_of
from fusewire.linux import files
from fusewire.ops import Statfs
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewire.fs.passthrough.base import Handle
    from fusewire.fs.passthrough.nodes import Node
    from fusewire.ops import Caller, Setattr

_ACL = b"system.posix_acl_"
_CAPABILITY = b"security.capability"
_S_ISUID, _S_ISGID, _S_IXGRP = 0o4000, 0o2000, 0o0010
_STATX = files.STATX_BASIC_STATS | files.STATX_BTIME
_OWNER = Struct("=III").unpack  # of ST_OWNER
_CHANGES = abi.FATTR_MODE | abi.FATTR_SIZE | abi.FATTR_ATIME | abi.FATTR_MTIME


class Attributes(Base):
    """The operations on what an inode says of itself."""

    def getattr(self, nodeid: int, flags: int, fh: int) -> bytes:
        node = self.nodes.get(nodeid)
        if flags & abi.FUSE_GETATTR_FH:
            fd = self.handles.get(fh).fd
            status = status_of(fd.number)
        else:
            status = self._status(node)
        return self._attr(node, status)

    def statx(self, nodeid: int, flags: int, fh: int, sx_flags: int, sx_mask: int) -> tuple[Sequence[int], float, int]:
        node = self.nodes.get(nodeid)
        opened = self.handles.get(fh) if flags & abi.FUSE_GETATTR_FH else None
        fd = opened.fd if opened is not None else self.nodes.fd(node)
        how = files.AT_EMPTY_PATH | sx_flags & (files.AT_STATX_FORCE_SYNC | files.AT_STATX_DONT_SYNC)
        status = files.statx(fd.number, b"", how, _STATX)
        ino, uid, gid = status[files.SX_INO], status[files.SX_UID], status[files.SX_GID]
        if self._uids is not None:
            uid = self._uids.to_guest(uid)
        if self._gids is not None:
            gid = self._gids.to_guest(gid)
        # The fields of fuse_statx are those of statx(2), in its order; ids and inode number are the client's.
        fields = (
            *status[: files.SX_UID],
            uid,
            gid,
            status[files.SX_MODE],
            ino ^ self._elsewhere(node),
            *status[files.SX_SIZE : files.SX_MNT_ID],
        )
        return fields, self._attr_timeout, 0

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> bytes:
        node = self.nodes.get(nodeid)
        valid = change.valid
        opened = self.handles.get(change.fh) if valid & abi.FATTR_FH else None
        fd = opened.fd if opened is not None else self.nodes.fd(node)
        kill = valid & abi.FATTR_KILL_SUIDGID and self.flags & abi.FUSE_HANDLE_KILLPRIV_V2
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            self._chown(node, fd.number, change)
        elif not valid & _CHANGES:
            # A request that changes nothing is chown(2) with -1 for both: it moves ctime, and clears set-user-ID bits.
            # Or it is fallocate(2), which clears them too. Where they are left to us, the kernel has checked nothing.
            self._check_clearing(caller, node, fd.number)
            self._chown(node, fd.number, change)
        if valid & abi.FATTR_MODE:
            self._chmod(node, fd.number, change.mode & 0o7777)
        if valid & abi.FATTR_SIZE:
            self._truncate(node, opened, change.size)
            if kill:
                self._drop_privileges(node)
        if valid & (abi.FATTR_ATIME | abi.FATTR_MTIME):
            access = self._time(valid, abi.FATTR_ATIME, abi.FATTR_ATIME_NOW, change.atime, change.atimensec)
            modified = self._time(valid, abi.FATTR_MTIME, abi.FATTR_MTIME_NOW, change.mtime, change.mtimensec)
            self._utimens(fd.number, access, modified)
        status = status_of(fd.number)
        return self._attr(node, status)

    def _chown(self, node: Node, fd: int, change: Setattr) -> None:
        uid = change.uid if change.valid & abi.FATTR_UID else files.NO_ID
        gid = change.gid if change.valid & abi.FATTR_GID else files.NO_ID
        if uid != files.NO_ID and self._uids is not None:
            uid = self._uids.to_host(uid)
        if gid != files.NO_ID and self._gids is not None:
            gid = self._gids.to_host(gid)
        try:
            files.fchownat_empty(fd, uid, gid)
        except OSError as error:
            if error.errno == errno.EINVAL and not self._switch:
                # An id that is not in this user namespace (chown(2)): to the client it is one that may not be given.
                raise PermissionError(errno.EPERM, "the server's user namespace has no such id", node.name) from error
            if error.errno == errno.EPERM:
                self._say_who_owns(error)
            raise
        self._clear_capability(node)

    def _check_clearing(self, caller: Caller, node: Node, fd: int) -> None:
        """Refuse to clear the set-user-ID bits of a file for who neither owns it nor may write to it."""
        status = status_of(fd)
        mode = status[files.ST_MODE]
        _, uid, gid = _OWNER(status[files.ST_OWNER])
        if node.kind == S_IFDIR or not mode & (_S_ISUID | _S_ISGID) or caller.uid == 0:
            return
        if (caller.uid if self._uids is None else self._uids.to_host(caller.uid)) == uid:
            return
        own = caller.gid if self._gids is None else self._gids.to_host(caller.gid)
        if not mode & (0o020 if gid == own or gid in self._groups(caller) else 0o002):
            raise PermissionError(errno.EPERM, "the file belongs to somebody else", node.name)

    def _say_who_owns(self, error: OSError) -> None:
        if not self._switch and self._connection is not None:
            self._connection.log_once(
                f"files belong to the server's user ({self._own_uid}): it may not give them to another one "
                "(CAP_CHOWN); run the server as root, or map ids"
            )

    def _chmod(self, node: Node, fd: int, mode: int) -> None:
        if node.kind == S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode", node.name)
        try:
            os.chmod(b"%s%d" % (self._proc, fd), mode)
        except OSError as error:
            # Over the magic link of a descriptor that is open for real, where /proc is not to be had.
            if error.errno != errno.ENOENT:
                raise
            os.fchmod(fd, mode)

    def _truncate(self, node: Node, opened: Handle | None, size: int) -> None:
        if size >= 1 << 63:
            raise OSError(errno.EFBIG, "no file is that long", node.name)
        if opened is not None:
            os.ftruncate(opened.fd.number, size)
        else:
            fd = self._reopen(node, os.O_WRONLY | os.O_NONBLOCK)
            os.ftruncate(fd.number, size)
        self._clear_capability(node)

    def _utimens(self, fd: int, access: tuple[int, int], modified: tuple[int, int]) -> None:
        try:
            files.utimensat(fd, b"", access, modified, files.AT_EMPTY_PATH)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Kernels before 5.8 know no AT_EMPTY_PATH here.
            files.utimensat(files.AT_FDCWD, b"%s%d" % (self._proc, fd), access, modified)

    @staticmethod
    def _time(valid: int, wanted: int, now: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
        if not valid & wanted:
            return 0, files.UTIME_OMIT
        if valid & now:
            return 0, files.UTIME_NOW
        return (seconds - (1 << 64) if seconds >> 63 else seconds), nanoseconds

    def _drop_privileges(self, node: Node) -> None:
        """Clear what makes a program run as somebody else, as the kernel does for a writer without CAP_FSETID."""
        fd = self.nodes.fd(node)
        mode = status_of(fd.number)[files.ST_MODE]
        kept = mode & ~_S_ISUID
        if mode & (_S_ISGID | _S_IXGRP) == _S_ISGID | _S_IXGRP:
            kept &= ~_S_ISGID
        if kept != mode:
            os.chmod(self._path(fd), kept & 0o7777)
        self._clear_capability(node)

    def _clear_capability(self, node: Node) -> None:
        """Remove file capabilities that are stored under another name: of the real one the host takes care."""
        if self._xattrs is None or not self.config.xattr:
            return
        try:
            name = self._xattrs.to_host(_CAPABILITY)
        except OSError:
            return
        if name == _CAPABILITY:
            return
        fd = self.nodes.fd(node)
        try:
            os.removexattr(self._path(fd), name)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
                raise

    def access(self, caller: Caller, nodeid: int, mask: int) -> None:
        """Ask the host: only without default_permissions, where the caller and the server are the same user."""
        fd = self.nodes.fd(self.nodes.get(nodeid))
        if not os.access(self._path(fd), mask & (os.R_OK | os.W_OK | os.X_OK), effective_ids=True):
            raise PermissionError(errno.EACCES, "permission denied", nodeid)

    def statfs(self, nodeid: int) -> Statfs:
        fd = self.nodes.fd(self.nodes.get(nodeid))
        found = os.statvfs(fd.number)
        return Statfs(
            blocks=found.f_blocks,
            bfree=found.f_bfree,
            bavail=found.f_bavail,
            files=found.f_files,
            ffree=found.f_ffree,
            bsize=found.f_bsize,
            namelen=found.f_namemax,
            frsize=found.f_frsize,
        )

    # Extended attributes, by the magic link: it reaches every kind of inode, and opens nothing.

    def _host_name(self, name: bytes) -> bytes:
        if not self.config.xattr:
            raise OSError(errno.ENOSYS, "extended attributes are switched off")
        if name.startswith(_ACL) and not self.flags & abi.FUSE_POSIX_ACL:
            raise OSError(errno.EOPNOTSUPP, "access control lists are switched off", name)
        return name if self._xattrs is None else self._xattrs.to_host(name)

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        try:
            host = self._host_name(name)
        except PermissionError:  # a name that the rules forbid: to who only reads, it is not there
            raise OSError(errno.ENODATA, "no such attribute", name) from None
        fd = self.nodes.fd(self.nodes.get(nodeid))
        return os.getxattr(self._path(fd), host)

    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        if not self.config.xattr:
            raise OSError(errno.ENOSYS, "extended attributes are switched off")
        fd = self.nodes.fd(self.nodes.get(nodeid))
        names = [os.fsencode(name) for name in os.listxattr(self._path(fd))]
        if not self.flags & abi.FUSE_POSIX_ACL:
            names = [name for name in names if not name.startswith(_ACL)]
        if caller.uid or not self._trusted:
            # xattr(7): visible to CAP_SYS_ADMIN of the first namespace only. The server may see them for somebody else.
            names = [name for name in names if not name.startswith(b"trusted.")]
        if self._xattrs is not None:
            names = [seen for name in names if (seen := self._xattrs.to_client(name)) is not None]
        return b"".join(name + b"\0" for name in names)

    def setxattr(self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int) -> None:
        host = self._host_name(name)
        node = self.nodes.get(nodeid)
        fd = self.nodes.fd(node)
        if flags > os.XATTR_CREATE | os.XATTR_REPLACE:
            raise OSError(errno.EINVAL, "unknown flags of setxattr", hex(flags))
        os.setxattr(self._path(fd), host, value, flags)
        if setxattr_flags & abi.FUSE_SETXATTR_ACL_KILL_SGID:
            mode = status_of(fd.number)[files.ST_MODE]
            if mode & _S_ISGID:
                os.chmod(self._path(fd), mode & 0o7777 & ~_S_ISGID)

    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> None:
        host = self._host_name(name)
        fd = self.nodes.fd(self.nodes.get(nodeid))
        os.removexattr(self._path(fd), host)
