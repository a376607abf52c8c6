"""What all nodes of a tree have: attributes, extended attributes, identity, and `changed`.

Layer `nodes`. A node knows by which filesystems it is served (`_homes`), and nothing of requests. Methods marked so may
be `async def`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from _thread import allocate_lock

from fusewire.nodes.steps import is_awaitable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Hashable, Iterable, MutableMapping
    from typing import Any, Protocol, Self

    class Home(Protocol):
        """A filesystem, as nodes need it."""

        ended: bool

        def tell(self, inode: Inode, name: bytes | None, wait: bool) -> None: ...


# Over what spans several nodes: the tables of directories, numbers of names, parents. One for all trees, since a rename
# touches two directories, and trees are joined and parted at any time. Nothing is called under it. A fork waits for it:
# the child could never release what another thread of the parent held.
TREES = allocate_lock()
os.register_at_fork(before=TREES.acquire, after_in_parent=TREES.release, after_in_child=TREES.release)

_DAY = 86400 * 1_000_000_000
_CAPABILITY = b"security.capability"
_NAMESPACES = (b"user.", b"trusted.", b"security.")


class Inode:
    """What one filesystem keeps about a node: its number, and the names by which the kernel has seen it.

    `names` and `missing` are a directory's; `nlookup` is the kernel's count of lookups; `parents` tells for each name
    the directory object in which the node was last found by it. All under that filesystem's lock.
    """

    __slots__ = ("key", "missing", "names", "nlookup", "node", "number", "parents")

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.number = number
        self.nlookup = 0
        self.key: Hashable = None
        self.parents: dict[tuple[Inode, bytes], Node] = {}
        self.names: dict[bytes, Inode] = {}
        self.missing: dict[bytes, None] = {}


class Node:
    """A file of any type; derive from `Dir`, `File`, `Symlink` or `Special`.

    Everything here is an attribute of the class or of the object. What a program changes by assignment reaches the
    kernel when what it has kept runs out (`attr_timeout`), or by `changed()`.
    """

    kind: int = 0
    """The type, S_IFMT of stat(2)."""
    mode: int = 0o644
    """Permissions, 07777 of stat(2); the kernel checks them where the mount has default_permissions."""
    uid: int | None = None
    """The owner; None: the user who serves. What is created by a caller becomes the caller's."""
    gid: int | None = None
    """The group; None: that of the process that serves."""
    rdev: int = 0
    """The device, os.makedev, of a device node."""
    ino: int = 0
    """The inode number to show; 0: one is given, which stays as long as the object lives."""
    writable: bool = False
    """May be changed by callers: data, attributes, names. Else they get EROFS."""
    entry_timeout: float | None = None
    """For how many seconds the kernel may keep that this name leads here; None: the directory's `timeout`."""
    attr_timeout: float | None = None
    """For how many seconds the kernel may keep the attributes, the size among them; None: as the class has it."""
    atime_ns: int | None = None
    """Time of last access in nanoseconds since the epoch; None, as for all times: when the tree was mounted."""
    mtime_ns: int | None = None
    """Time of last change of the content."""
    ctime_ns: int | None = None
    """Time of last change of content or attributes."""
    btime_ns: int | None = None
    """Time of birth, shown by statx(2)."""
    xattrs: MutableMapping[bytes, bytes] | None = None
    """Extended attributes, name with namespace (`user.x`) to value. A writable node gets a dict when one is set."""

    _lasting = 1.0  # attr_timeout where it is None
    _homes: dict[Home, Inode]
    _links: int  # names in tables of directories
    _placed: bool  # has ever had a name in one: `_links` says the truth
    _twins: int  # names in one mapping that was computed

    def __new__(cls, *args: Any, **options: Any) -> Self:  # not __init__, which a class may define without calling ours
        self = object.__new__(cls)
        self._homes = {}
        self._links = 0
        self._placed = False
        self._twins = 0
        return self

    def __init__(self) -> None:
        pass

    @property
    def key(self) -> Hashable:
        """What the node is, for nodes that are made anew each time: same key, same inode, whatever the name.

        None: the object is what counts, and in a directory that is computed, the name as long as the kernel knows it.
        """
        return None

    @property
    def nlink(self) -> int:
        """How many names it has in directories that are tables, stat(2) st_nlink."""
        return self._links if self._placed else max(1, self._twins)

    def size(self) -> int | Awaitable[int]:
        """Give the size in bytes, stat(2) st_size. May be async."""
        return 0

    # Changes that callers make

    def chmod(self, mode: int) -> Awaitable[None] | None:
        """Take other permissions, chmod(2). May be async. Raises OSError(EROFS) unless `writable`."""
        self._check_writable()
        self.mode = mode
        self.ctime_ns = time.time_ns()
        return None

    def chown(self, uid: int | None, gid: int | None) -> Awaitable[None] | None:
        """Take another owner, group, or both (None: as it is), chown(2). May be async. Raises as `chmod`."""
        self._check_writable()
        if uid is not None:
            self.uid = uid
        if gid is not None:
            self.gid = gid
        self._drop_privileges()
        self.ctime_ns = time.time_ns()
        return None

    def utime(self, atime_ns: int | None, mtime_ns: int | None) -> Awaitable[None] | None:
        """Take other times (None: as it is), utimensat(2). May be async. Raises as `chmod`."""
        self._check_writable()
        if atime_ns is not None:
            self.atime_ns = atime_ns
        if mtime_ns is not None:
            self.mtime_ns = mtime_ns
        self.ctime_ns = time.time_ns()
        return None

    # Extended attributes, xattr(7)

    def getxattr(self, name: bytes) -> bytes | Awaitable[bytes]:
        """Give an attribute's value, by default of `xattrs`. May be async. Raises OSError(ENODATA) if there is none."""
        xattrs = self.xattrs
        if xattrs is not None and (value := xattrs.get(name)) is not None:
            return value
        if xattrs is None and not self.writable:
            raise OSError(errno.EOPNOTSUPP, "extended attributes are not supported", name)
        _check_namespace(name)
        raise OSError(errno.ENODATA, "no such attribute", name)

    def listxattr(self) -> Iterable[bytes] | Awaitable[Iterable[bytes]]:
        """Give the names of all attributes. May be async."""
        return list(self.xattrs) if self.xattrs is not None else ()

    def setxattr(self, name: bytes, value: bytes, flags: int) -> Awaitable[None] | None:
        """Set an attribute; `flags` are os.XATTR_CREATE, os.XATTR_REPLACE. May be async. Raises as setxattr(2)."""
        self._check_writable()
        _check_namespace(name)
        if self.xattrs is None:
            self.xattrs = {}
        known = name in self.xattrs
        if flags & os.XATTR_CREATE and known:
            raise OSError(errno.EEXIST, "the attribute exists", name)
        if flags & os.XATTR_REPLACE and not known:
            raise OSError(errno.ENODATA, "no such attribute", name)
        self.xattrs[name] = value
        self.ctime_ns = time.time_ns()
        return None

    def removexattr(self, name: bytes) -> Awaitable[None] | None:
        """Remove an attribute. May be async. Raises OSError(ENODATA) if there is none."""
        self._check_writable()
        _check_namespace(name)
        if self.xattrs is None or name not in self.xattrs:
            raise OSError(errno.ENODATA, "no such attribute", name)
        del self.xattrs[name]
        self.ctime_ns = time.time_ns()
        return None

    # The kernel

    def changed(self, *, wait: bool = False) -> None:
        """Have the kernel forget what it keeps of this node, data and attributes, in every mount that it is in.

        May be called from anywhere, also by a method of a node: another thread tells the kernel. With `wait` this
        thread does, and what is read from now on is new; but not from a method of a node, nor with a lock held that
        one takes: the kernel may be waiting for that method itself.
        """
        for home, inode in list(self._homes.items()):
            home.tell(inode, None, wait)

    # Ours

    def _check_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EROFS, "read-only: the node is not `writable`", type(self).__name__)

    def _blocks(self, size: int) -> int:
        return (size + 511) // 512

    def _modified(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def _born(self) -> None:
        self.atime_ns = self.mtime_ns = self.ctime_ns = self.btime_ns = time.time_ns()

    def _access_is_due(self) -> bool:
        """Tell whether reading would move the access time: relatime, mount(2)."""
        atime, mtime, ctime = self.atime_ns, self.mtime_ns, self.ctime_ns
        if not self.writable or atime is None or mtime is None or ctime is None:
            return False
        return atime <= mtime or atime <= ctime or time.time_ns() - atime >= _DAY

    def _accessed(self) -> None:
        if self._access_is_due():
            self.atime_ns = time.time_ns()

    def _drop_privileges(self, *, identity: bool = True) -> None:
        """Kill what FUSE_HANDLE_KILLPRIV_V2 leaves to the filesystem (<linux/fuse.h>): file capabilities always.

        With `identity` set-user-ID too, and set-group-ID where a group may execute.
        """
        if identity and self.mode & (stat.S_ISUID | stat.S_ISGID) and self.kind != stat.S_IFDIR:
            self.mode &= ~(stat.S_ISUID | (stat.S_ISGID if self.mode & stat.S_IXGRP else 0))
        if self.writable and self.xattrs:
            self.xattrs.pop(_CAPABILITY, None)

    def _succeeds(self, before: Node) -> None:
        """Hear that the kernel takes this node for `before`, which had the same name or key."""


def _check_namespace(name: bytes) -> None:
    space = next((space for space in _NAMESPACES if name.startswith(space)), None)
    if space is None:
        raise OSError(errno.EOPNOTSUPP, "attributes of that namespace are not supported", name)
    if name == space:
        raise OSError(errno.EINVAL, "the name of an attribute ends with its namespace", name)


class Symlink(Node):
    """A symbolic link to `target`, or to what `readlink` gives."""

    kind = stat.S_IFLNK
    mode = 0o777
    _lasting = 1 << 32

    def __init__(self, target: bytes | str, *, writable: bool = False) -> None:
        """Point to `target`: up to 4095 bytes without NUL, symlink(7)."""
        super().__init__()
        self.target = os.fsencode(target)
        self.writable = writable or self.writable

    def readlink(self) -> bytes | Awaitable[bytes]:
        """Give the target. May be async."""
        return self.target

    def size(self) -> int | Awaitable[int]:
        target: Any = self.readlink()
        return _length_of(target) if is_awaitable(target) else len(target)


async def _length_of(target: Awaitable[bytes]) -> int:
    return len(await target)


class Special(Node):
    """A fifo, a socket or a device node, mknod(2): the kernel does what it stands for."""

    _lasting = 1 << 32

    def __init__(self, mode: int, rdev: int = 0, *, writable: bool = False) -> None:
        """Take type and permissions (`stat.S_IFIFO | 0o600`), and the device. Raises ValueError for other types."""
        super().__init__()
        self.kind = stat.S_IFMT(mode)
        if self.kind not in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise ValueError(f"mode {mode:#o} is of no fifo, socket or device: give stat.S_IFIFO | 0o600 or the like")
        self.mode = mode & 0o7777
        self.rdev = rdev
        self.writable = writable
