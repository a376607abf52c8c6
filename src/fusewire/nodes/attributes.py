"""Attributes, symbolic links and extended attributes of a tree of nodes: a part of `NodeFilesystem`.

Layer `nodes`.
"""

from __future__ import annotations

import errno
import os
import time

from fusewire.nodes.base import Symlink
from fusewire.nodes.directories import Dir
from fusewire.nodes.opened import OpenFiles
from fusewire.nodes.steps import run, settled
from fusewire.ops import Entry
from fusewire.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fusewire.nodes.base import Inode, Node
    from fusewire.nodes.steps import Steps
    from fusewire.ops import Attr, Caller, Setattr

_SECOND = 1_000_000_000
_U64 = (1 << 64) - 1
_BLOCK = 4096
_STATX_ALL = 0xFFF  # STATX_BASIC_STATS | STATX_BTIME


class Attributes(OpenFiles):
    """What is said of one node."""

    def attributes(self, inode: Inode, node: Node, size: int) -> Attr:
        """Give what fuse_attr holds."""
        atime, mtime, ctime = node.atime_ns, node.mtime_ns, node.ctime_ns
        a, an = self.moment if atime is None else divmod(atime, _SECOND)
        m, mn = self.moment if mtime is None else divmod(mtime, _SECOND)
        c, cn = self.moment if ctime is None else divmod(ctime, _SECOND)
        uid, gid, nlink = node.uid, node.gid, node.nlink
        if nlink == 1 and not node._placed:
            nlink = max(1, len(inode.parents))
        return (
            node.ino or inode.number, size, node._blocks(size), a & _U64, m & _U64, c & _U64, an, mn, cn,
            node.kind | node.mode & 0o7777, nlink, self.uid if uid is None else uid, self.gid if gid is None else gid,
            node.rdev, _BLOCK, 0,
        )  # fmt: skip

    def lifetime(self, node: Node) -> float:
        """Tell for how long attributes may be kept."""
        seconds = node.attr_timeout
        if seconds is None:
            seconds = node.timeout if isinstance(node, Dir) else node._lasting
        return min(seconds, self.max_timeout)

    def entry(self, parent: Inode | None, directory: Dir, name: bytes, node: Node) -> Steps[Entry]:
        """Make the answer that a name leads to a node."""
        size = node.size()
        if type(size) is not int:
            size = yield size
        return self.found(parent, directory, name, node, size)

    def found(self, parent: Inode | None, directory: Dir, name: bytes, node: Node, size: int) -> Entry:
        """Make that answer once all is known; counts a lookup."""
        inode = self.remember(parent, name, node, looked_up=True)
        seconds = directory.timeout if node.entry_timeout is None else node.entry_timeout
        if seconds > self.max_timeout:
            seconds = self.max_timeout
        return Entry(inode.number, self.attributes(inode, node, size), seconds, self.lifetime(node))

    def getattr(self, nodeid: int, flags: int, fh: int) -> Any:
        inode = self.inode(nodeid)
        node = inode.node
        size = node.size()
        if type(size) is int:
            return self.attributes(inode, node, size), self.lifetime(node)
        return run(self._getattr(inode, size))

    def _getattr(self, inode: Inode, size: Any) -> Steps[tuple[Attr, float]]:
        size = yield size
        return self.attributes(inode, inode.node, size), self.lifetime(inode.node)

    def statx(self, nodeid: int, flags: int, fh: int, sx_flags: int, sx_mask: int) -> Any:
        return run(self._statx(nodeid))

    def _statx(self, nodeid: int) -> Steps[tuple[Sequence[int], float, int]]:
        inode = self.inode(nodeid)
        node = inode.node
        size = yield node.size()
        ino, _, blocks, *_, nlink, uid, gid, _, _, _ = self.attributes(inode, node, size)
        times: list[int] = []
        for moment in (node.atime_ns, node.btime_ns, node.ctime_ns, node.mtime_ns):
            times += self.moment if moment is None else divmod(moment, _SECOND)
        ids = (nlink, uid, gid, node.kind | node.mode & 0o7777, ino, size, blocks)
        fields = (_STATX_ALL, _BLOCK, 0, *ids, 0, *times, os.major(node.rdev), os.minor(node.rdev), 0, 0)
        return fields, self.lifetime(node), 0

    # Changes

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> Any:
        return run(self._setattr(nodeid, change))

    def _setattr(self, nodeid: int, change: Setattr) -> Steps[tuple[Attr, float]]:
        inode = self.inode(nodeid)
        node = inode.node
        valid = change.valid
        if valid & abi.FATTR_SIZE:
            self.file(nodeid)
            yield self.serving(nodeid, change.fh if valid & abi.FATTR_FH else 0).truncate(change.size)
            if node.writable:
                node._drop_privileges(identity=bool(valid & abi.FATTR_KILL_SUIDGID))
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            yield node.chown(
                change.uid if valid & abi.FATTR_UID else None, change.gid if valid & abi.FATTR_GID else None
            )
        if valid & abi.FATTR_MODE:
            yield node.chmod(change.mode & 0o7777)
        if valid & (abi.FATTR_ATIME | abi.FATTR_MTIME):
            now = time.time_ns()
            atime = now if valid & abi.FATTR_ATIME_NOW else _moment(change.atime, change.atimensec)
            mtime = now if valid & abi.FATTR_MTIME_NOW else _moment(change.mtime, change.mtimensec)
            yield node.utime(atime if valid & abi.FATTR_ATIME else None, mtime if valid & abi.FATTR_MTIME else None)
        self.others_see(inode, None)
        size = yield node.size()
        return self.attributes(inode, node, size), self.lifetime(node)

    def readlink(self, nodeid: int) -> Any:
        node = self.inode(nodeid).node
        if not isinstance(node, Symlink):
            raise OSError(errno.EINVAL, "not a symbolic link", nodeid)
        node._accessed()
        return settled(node.readlink())

    # Extended attributes

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> Any:
        return settled(self.inode(nodeid).node.getxattr(name))

    def listxattr(self, caller: Caller, nodeid: int) -> Any:
        return run(self._listxattr(caller.uid == 0, nodeid))

    def _listxattr(self, trusted: bool, nodeid: int) -> Steps[bytes]:
        names = yield self.inode(nodeid).node.listxattr()
        # xattr(7): trusted.* is not shown to who lacks CAP_SYS_ADMIN. The kernel leaves that to us.
        return b"".join(name + b"\0" for name in names if trusted or not name.startswith(b"trusted."))

    def setxattr(self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int) -> Any:
        return settled(self.inode(nodeid).node.setxattr(name, value, flags))

    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> Any:
        return settled(self.inode(nodeid).node.removexattr(name))


def _moment(seconds: int, nano: int) -> int:
    """Give nanoseconds; the wire's seconds are of 64 bits and signed."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * _SECOND + nano
