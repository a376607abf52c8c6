"""What a filesystem in memory consists of: nodes, open directories, and the rules for a single one of them.

Layer `fs`, below memory.py; without a lock: who calls holds it.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time

from fusewire.fs import memory_acl
from fusewire.sparse import SparseData

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.ops import Attr

BLOCK = 4096
SECOND = 1_000_000_000
FIRST_COOKIE = 3  # of a directory's names: 1 and 2 are "." and ".."
ACLS = (memory_acl.ACCESS, memory_acl.DEFAULT)
_DAY = 86400 * SECOND
_STATX_ALL = 0xFFF  # STATX_BASIC_STATS | STATX_BTIME
_U64 = (1 << 64) - 1
_NAMESPACES = (b"user.", b"trusted.", b"security.")
_CAPABILITY = b"security.capability"
# The ioctl(2) requests by type and number: their sizes are those of the caller's `long`.
_GETFLAGS, _SETFLAGS, _FSGETXATTR, _FSSETXATTR = (ord("f"), 1), (ord("f"), 2), (ord("X"), 31), (ord("X"), 32)
_FL_NODUMP, _FL_NOATIME = 0x40, 0x80
_FLAGS = ((_FL_NODUMP, 0x80), (_FL_NOATIME, 0x40))  # FS_*_FL and the FS_XFLAG_* that says the same


class Node:
    """A file of any type. `names` is a directory's: name -> (node, cookie); times are nanoseconds since the epoch."""

    __slots__ = (
        "acl",
        "atime",
        "btime",
        "ctime",
        "data",
        "default_acl",
        "flags",
        "gid",
        "ino",
        "mode",
        "mtime",
        "names",
        "next_cookie",
        "nlink",
        "parent",
        "rdev",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, ino: int, mode: int, uid: int, gid: int, rdev: int = 0) -> None:
        self.ino, self.mode, self.uid, self.gid, self.rdev = ino, mode, uid, gid, rdev
        self.nlink = 1
        self.atime = self.mtime = self.ctime = self.btime = time.time_ns()
        self.flags = 0
        self.target = b""
        self.xattrs: dict[bytes, bytes] = {}
        self.acl: memory_acl.Entries | None = None
        self.default_acl: memory_acl.Entries | None = None
        self.data: SparseData | None = SparseData() if stat.S_ISREG(mode) else None
        self.parent: Node = self
        self.names: dict[bytes, tuple[Node, int]] | None = None
        self.next_cookie = FIRST_COOKIE
        if stat.S_ISDIR(mode):
            self.names = {}
            self.nlink = 2

    def attributes(self) -> Attr:
        """Give what fuse_attr holds."""
        data = self.data
        if data is not None:
            size, blocks = data.size, (data.allocated + 511) // 512
        else:
            size, blocks = len(self.target), 0
        a, an = divmod(self.atime, SECOND)
        m, mn = divmod(self.mtime, SECOND)
        c, cn = divmod(self.ctime, SECOND)
        return (
            self.ino, size, blocks, a & _U64, m & _U64, c & _U64, an, mn, cn,
            self.mode, self.nlink, self.uid, self.gid, self.rdev, BLOCK, 0,
        )  # fmt: skip

    def extended(self) -> tuple[int, ...]:
        """Give what fuse_statx holds, without its padding."""
        ino, size, blocks, *_ = self.attributes()
        times: list[int] = []
        for moment in (self.atime, self.btime, self.ctime, self.mtime):
            times += divmod(moment, SECOND)
        ids = (self.nlink, self.uid, self.gid, self.mode, ino, size, blocks)
        return (_STATX_ALL, BLOCK, 0, *ids, 0, *times, os.major(self.rdev), os.minor(self.rdev), 0, 0)

    def is_directory(self) -> bool:
        """Tell whether there can be names in it."""
        return self.names is not None

    def accessed(self, now: int) -> None:
        """Move the access time if it is older than the others or a day: relatime, mount(2)."""
        if self.access_is_due(now):
            self.atime = now

    def access_is_due(self, now: int) -> bool:
        """Tell whether reading would move the access time."""
        atime = self.atime
        if self.flags & _FL_NOATIME:
            return False
        return atime <= self.mtime or atime <= self.ctime or now - atime >= _DAY

    def modified(self) -> None:
        """Move the times that a change of the content moves."""
        self.mtime = self.ctime = time.time_ns()

    def drop_privileges(self, *, identity: bool = True) -> int:
        """Kill what FUSE_HANDLE_KILLPRIV_V2 leaves to the filesystem (<linux/fuse.h>): file capabilities always.

        With `identity` set-user-ID too, and set-group-ID where a group may execute. Gives the bytes that became free.
        """
        if identity and self.mode & (stat.S_ISUID | stat.S_ISGID) and not self.is_directory():
            self.mode &= ~stat.S_ISUID
            if self.mode & stat.S_IXGRP:
                self.mode &= ~stat.S_ISGID
        if not self.xattrs or _CAPABILITY not in self.xattrs:
            return 0
        return len(_CAPABILITY) + len(self.xattrs.pop(_CAPABILITY))


class Listing:
    """An open directory: its names in order as they were when it was last read from the start."""

    __slots__ = ("cookies", "names")

    def __init__(self) -> None:
        self.cookies: list[int] = []
        self.names: list[bytes] = []

    def begin(self, names: dict[bytes, tuple[Node, int]]) -> None:
        """Take a directory's names as they are now."""
        by_cookie = sorted((cookie, name) for name, (_, cookie) in names.items())
        self.cookies = [cookie for cookie, _ in by_cookie]
        self.names = [name for _, name in by_cookie]


def named(names: dict[bytes, tuple[Node, int]], name: bytes) -> Node:
    try:
        return names[name][0]
    except KeyError:
        raise OSError(errno.ENOENT, "no such file or directory", name) from None


def check_descent(node: Node, place: Node, number: int) -> None:
    """Refuse to put a directory into itself or below."""
    if not node.is_directory():
        return
    while place is not node:
        if place.parent is place:
            return
        place = place.parent
    raise OSError(number, "a directory cannot be moved below itself", node.ino)


def check_replaced(node: Node, target: Node, name: bytes) -> None:
    """rename(2): only a directory replaces a directory, and only an empty one is replaced."""
    if target.names is not None:
        if not node.is_directory():
            raise OSError(errno.EISDIR, "a directory", name)
        if target.names:
            raise OSError(errno.ENOTEMPTY, "the directory is not empty", name)
    elif node.is_directory():
        raise OSError(errno.ENOTDIR, "not a directory", name)


def xattr(node: Node, name: bytes) -> bytes | None:
    """Give a value, None where there is none. Raises OSError for a name that no attribute can have, xattr(7)."""
    if name in ACLS:
        acl = node.acl if name == memory_acl.ACCESS else node.default_acl
        return memory_acl.pack(acl) if acl is not None else None
    space = next((space for space in _NAMESPACES if name.startswith(space)), None)
    if space is None:
        raise OSError(errno.EOPNOTSUPP, "attributes of that namespace are not supported", name)
    if name == space:
        raise OSError(errno.EINVAL, "the name of an attribute ends with its namespace", name)
    return node.xattrs.get(name)


def xattr_names(node: Node, *, trusted: bool) -> list[bytes]:
    """List the attributes that there are; trusted.* if wanted."""
    names = [name for name, acl in zip(ACLS, (node.acl, node.default_acl), strict=True) if acl]
    return names + [name for name in node.xattrs if trusted or not name.startswith(b"trusted.")]


def set_acl(node: Node, name: bytes, entries: memory_acl.Entries, kill_sgid: bool) -> None:
    """Keep an ACL, or change the mode where that says the same."""
    if name == memory_acl.DEFAULT:
        if not node.is_directory():
            raise OSError(errno.EACCES, "only a directory has a default ACL", node.ino)
        node.default_acl = entries
        return
    if stat.S_ISLNK(node.mode):
        raise OSError(errno.EOPNOTSUPP, "a symbolic link has no ACL", node.ino)
    node.acl = None if memory_acl.is_mode_only(entries) else entries
    node.mode = node.mode & ~0o777 | memory_acl.to_mode(entries)
    if kill_sgid:
        node.mode &= ~stat.S_ISGID


def moment(seconds: int, nano: int) -> int:
    """Give nanoseconds; the wire's seconds are of 64 bits and signed."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * SECOND + nano


def control(node: Node, cmd: int, data: memoryview, out_size: int) -> tuple[int, bytes]:
    """Serve ioctl_iflags(2) and its extended form: FS_IOC_GETFLAGS and the like of <linux/fs.h>."""
    request = (cmd >> 8 & 0xFF, cmd & 0xFF)
    if request == _GETFLAGS:
        return 0, struct.pack("=IxxxxI", node.flags, 0)[:out_size]
    if request == _FSGETXATTR:
        extended = sum(xflag for flag, xflag in _FLAGS if node.flags & flag)
        return 0, struct.pack("=5I8x", extended, 0, 0, 0, 0)[:out_size]
    if request not in (_SETFLAGS, _FSSETXATTR) or len(data) < 4:
        raise OSError(errno.ENOTTY, "no such control of a file", cmd)
    (wanted,) = struct.unpack_from("=I", data)
    names = [(flag, xflag if request == _FSSETXATTR else flag) for flag, xflag in _FLAGS]
    if wanted & ~sum(name for _, name in names):
        raise OSError(errno.EOPNOTSUPP, "an inode flag that is not supported", wanted)
    node.flags = sum(flag for flag, name in names if wanted & name)
    node.ctime = time.time_ns()
    return 0, b""
