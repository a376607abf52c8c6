"""A complete read-write filesystem in memory: gone when it is unmounted, as tmpfs is.

Layer `fs`. One lock over everything: the interpreter runs one thread at a time anyway, and no handler ever waits for
anything else. Mount it with default_permissions: modes are the kernel's to check. Locks are the kernel's too (no
`setlk`: all users of a mount are on one kernel), as is fsync (there is nothing more durable than this). Whatever
changes comes through the kernel, so names and attributes are given for ever, and the page cache is dropped only where
an access time is due.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from _thread import allocate_lock
from bisect import bisect_right
from itertools import count

from fusewire.fs import memory_acl
from fusewire.fs.memory_nodes import (
    ACLS,
    BLOCK,
    FIRST_COOKIE,
    Listing,
    Node,
    check_descent,
    check_replaced,
    control,
    moment,
    named,
    set_acl,
    xattr,
    xattr_names,
)
from fusewire.inodes import HandleTable, InodeTable
from fusewire.ops import FOREVER, Entry, Operations, Statfs
from fusewire.sparse import CHUNK, SparseData
from fusewire.wire import abi
from fusewire.wire.codec import DirBuffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fusewire.ops import Attr, Buffer, Caller, Connection, Setattr

# <linux/fs.h>: RENAME_*, FALLOC_FL_*.
_NOREPLACE, _EXCHANGE, _WHITEOUT = 1, 2, 4
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_FALLOCATE_MODES = (0, _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE, _ZERO_RANGE, _ZERO_RANGE | _KEEP_SIZE)
_NODES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
_MAX_SIZE = (1 << 63) - 1
_COPIED_AT_ONCE = 1 << 28
_LONG = 1 << 22  # bytes that take milliseconds to move
_MISSING = Entry(0, (0,) * 16, FOREVER, 0)


class MemoryFS(Operations):
    """Files in memory, up to `max_bytes` of data and `max_nodes` of files; ENOSPC beyond."""

    announces_blocking = True  # nothing here waits: one worker does it all
    want = (
        abi.FUSE_HANDLE_KILLPRIV_V2
        | abi.FUSE_EXPLICIT_INVAL_DATA
        | abi.FUSE_READDIRPLUS_AUTO
        | abi.FUSE_POSIX_ACL
        | abi.FUSE_DONT_MASK
    )

    def __init__(
        self,
        *,
        max_bytes: int | None = None,
        max_nodes: int | None = None,
        mode: int = 0o755,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        """Begin with an empty root directory of that mode and owner, by default this process's.

        The default limits are tmpfs's: half of the machine's memory, and a file for each page of that (tmpfs(5)).
        """
        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        self.max_bytes = half if max_bytes is None else max_bytes
        self.max_nodes = half // BLOCK if max_nodes is None else max_nodes
        self.used_bytes = 0
        self.used_nodes = 1
        self._lock = allocate_lock()  # over all nodes and both counts; may_block is called under it, nothing else
        self._numbers = count(abi.FUSE_ROOT_ID + 1)
        owner = (os.geteuid() if uid is None else uid, os.getegid() if gid is None else gid)
        root = Node(abi.FUSE_ROOT_ID, stat.S_IFDIR | mode & 0o7777, *owner)
        self._nodes: InodeTable[Node] = InodeTable(root)
        self._nodes.key_root(root.ino)
        self._listings: HandleTable[Listing] = HandleTable()
        self._connection: Connection | None = None
        self._masked = True  # the kernel has applied the umask

    def init(self, connection: Connection) -> None:
        self._connection = connection
        self._masked = not connection.flags & abi.FUSE_DONT_MASK

    def destroy(self) -> None:
        with self._lock:
            self._listings.drain()
            self._nodes.drain()

    # Nodes

    def _directory(self, nodeid: int) -> tuple[Node, dict[bytes, tuple[Node, int]]]:
        node = self._nodes.get(nodeid)
        if node.names is None:
            raise OSError(errno.ENOTDIR, "not a directory", nodeid)
        return node, node.names

    def _file(self, nodeid: int) -> tuple[Node, SparseData]:
        node = self._nodes.get(nodeid)
        if node.data is None:
            raise OSError(errno.EISDIR if node.is_directory() else errno.EINVAL, "not a regular file", nodeid)
        return node, node.data

    def _entry(self, node: Node) -> Entry:
        return Entry(self._nodes.enter(node, node.ino)[0], node.attributes(), FOREVER, FOREVER)

    def _claim(self, size: int) -> None:
        """Make sure that there is room for so many more bytes. Raises OSError(ENOSPC)."""
        if size > 0 and self.used_bytes + size > self.max_bytes:
            raise OSError(errno.ENOSPC, "the filesystem's limit of bytes is reached", self.max_bytes)

    def _claim_node(self) -> None:
        if self.used_nodes >= self.max_nodes:
            raise OSError(errno.ENOSPC, "the filesystem's limit of files is reached", self.max_nodes)

    def _new(self, caller: Caller, parent: Node, mode: int, umask: int, rdev: int = 0) -> Node:
        """Make a node without a name. A directory's group and default ACL are inherited: mkdir(2), acl(5)."""
        if parent.nlink == 0:
            raise OSError(errno.ENOENT, "the directory has been removed", parent.ino)
        self._claim_node()
        acl, default = None, None if stat.S_ISLNK(mode) else parent.default_acl
        if default is not None:
            acl, mode = memory_acl.inherit(default, mode)
        elif not self._masked:
            mode &= ~umask
        gid = caller.gid
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        node = Node(next(self._numbers), mode, caller.uid, gid, rdev)
        if acl is not None and not memory_acl.is_mode_only(acl):
            node.acl = acl
        if stat.S_ISDIR(mode):
            node.default_acl = default
        self.used_nodes += 1
        return node

    def _name(self, parent: Node, names: dict[bytes, tuple[Node, int]], name: bytes, node: Node) -> None:
        """Let a name lead to a node. One that is there already keeps its place in listings."""
        known = names.get(name)
        if known is not None:
            names[name] = (node, known[1])
        else:
            names[name] = (node, parent.next_cookie)
            parent.next_cookie += 1
        if node.is_directory():
            node.parent = parent

    def _create(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int, rdev: int = 0) -> Node:
        directory, names = self._directory(parent)
        if name in names:
            raise OSError(errno.EEXIST, "the name exists", name)
        node = self._new(caller, directory, mode, umask, rdev)
        self._name(directory, names, name, node)
        if node.is_directory():
            directory.nlink += 1
        directory.modified()
        return node

    def _unlinked(self, node: Node) -> None:
        """Let go of a node that has lost a name; it lives on while the kernel knows it."""
        node.nlink = 0 if node.is_directory() else node.nlink - 1
        node.ctime = time.time_ns()
        if node.nlink:
            self.used_nodes -= 1  # each name counts, or hard links would have no limit
        elif not self._nodes.find(node.ino):
            self._dispose(node)

    def _dispose(self, node: Node) -> None:
        self.used_nodes -= 1
        self.used_bytes -= sum(len(name) + len(value) for name, value in node.xattrs.items())
        node.xattrs = {}
        if node.data is not None:
            self.used_bytes -= node.data.allocated
            node.data = SparseData()

    def forget(self, nodeid: int, nlookup: int) -> None:
        with self._lock:
            node = self._nodes.forget(nodeid, nlookup)
            if node is not None and node.nlink == 0:
                self._dispose(node)

    # Names

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Entry:
        with self._lock:
            found = self._directory(parent)[1].get(name)
            return self._entry(found[0]) if found is not None else _MISSING

    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> Entry:
        if stat.S_IFMT(mode) not in _NODES:
            raise OSError(errno.EINVAL, "no node of such a type can be made", name)
        with self._lock:
            return self._entry(self._create(caller, parent, name, mode, umask, rdev))

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> Entry:
        with self._lock:
            return self._entry(self._create(caller, parent, name, stat.S_IFDIR | mode & 0o7777, umask))

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Entry:
        with self._lock:
            node = self._create(caller, parent, name, stat.S_IFLNK | 0o777, 0)
            node.target = target
            return self._entry(node)

    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> Entry:
        with self._lock:
            node = self._nodes.get(nodeid)
            directory, names = self._directory(newparent)
            if node.is_directory():
                raise OSError(errno.EPERM, "a directory has one name only", newname)
            if newname in names:
                raise OSError(errno.EEXIST, "the name exists", newname)
            if directory.nlink == 0:
                raise OSError(errno.ENOENT, "the directory has been removed", newname)
            if node.nlink:  # a file without a name counts already
                self._claim_node()
                self.used_nodes += 1
            self._name(directory, names, newname, node)
            node.nlink += 1
            directory.modified()
            node.ctime = directory.ctime
            return self._entry(node)

    def unlink(self, caller: Caller, parent: int, name: bytes) -> None:
        with self._lock:
            directory, names = self._directory(parent)
            node = named(names, name)
            if node.is_directory():
                raise OSError(errno.EISDIR, "a directory", name)
            del names[name]
            directory.modified()
            self._unlinked(node)

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> None:
        with self._lock:
            directory, names = self._directory(parent)
            node = named(names, name)
            if node.names is None:
                raise OSError(errno.ENOTDIR, "not a directory", name)
            if node.names:
                raise OSError(errno.ENOTEMPTY, "the directory is not empty", name)
            del names[name]
            directory.nlink -= 1
            directory.modified()
            self._unlinked(node)

    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        if flags & ~(_NOREPLACE | _EXCHANGE | _WHITEOUT) or (flags & _EXCHANGE and flags != _EXCHANGE):
            raise OSError(errno.EINVAL, "flags that do not go together", flags)
        with self._lock:
            old, old_names = self._directory(parent)
            new, new_names = self._directory(newparent)
            node = named(old_names, name)
            found = new_names.get(newname)
            target = found[0] if found is not None else None
            if new.nlink == 0:
                raise OSError(errno.ENOENT, "the directory has been removed", newname)
            check_descent(node, new, errno.EINVAL)
            if flags & _EXCHANGE:
                if target is None:
                    raise OSError(errno.ENOENT, "no such file or directory", newname)
                check_descent(target, old, errno.EINVAL)
            elif target is not None:
                if flags & _NOREPLACE:
                    raise OSError(errno.EEXIST, "the name exists", newname)
                if target is node:
                    return  # two names of one file: rename(2) does nothing
                check_replaced(node, target, newname)
            whiteout = self._new(caller, old, stat.S_IFCHR, 0) if flags & _WHITEOUT else None
            self._name(new, new_names, newname, node)
            moved = node.is_directory() - (target is not None and target.is_directory())
            if flags & _EXCHANGE and target is not None:
                self._name(old, old_names, name, target)
                old.nlink -= moved
                target.ctime = time.time_ns()
            else:
                if whiteout is not None:
                    self._name(old, old_names, name, whiteout)
                else:
                    del old_names[name]
                old.nlink -= node.is_directory()
                if target is not None:
                    self._unlinked(target)
            new.nlink += moved
            old.modified()
            new.modified()
            node.ctime = new.ctime

    def readlink(self, nodeid: int) -> bytes:
        with self._lock:
            node = self._nodes.get(nodeid)
            if not stat.S_ISLNK(node.mode):
                raise OSError(errno.EINVAL, "not a symbolic link", nodeid)
            node.accessed(time.time_ns())
            return node.target

    # Attributes

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        with self._lock:
            return self._nodes.get(nodeid).attributes(), FOREVER

    def statx(self, nodeid: int, flags: int, fh: int, sx_flags: int, sx_mask: int) -> tuple[Sequence[int], float, int]:
        with self._lock:
            return self._nodes.get(nodeid).extended(), FOREVER, 0

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> tuple[Attr, float]:
        valid = change.valid
        with self._lock:
            node = self._nodes.get(nodeid)
            now = time.time_ns()
            if valid & abi.FATTR_SIZE:
                node, data = self._file(nodeid)
                self._resize(data, change.size)
                self.used_bytes -= node.drop_privileges(identity=bool(valid & abi.FATTR_KILL_SUIDGID))
                node.mtime = now
            if valid & (abi.FATTR_UID | abi.FATTR_GID):
                if valid & abi.FATTR_UID:
                    node.uid = change.uid
                if valid & abi.FATTR_GID:
                    node.gid = change.gid
                self.used_bytes -= node.drop_privileges()
            if valid & abi.FATTR_MODE:
                node.mode = stat.S_IFMT(node.mode) | change.mode & 0o7777
                if node.acl is not None:
                    node.acl = memory_acl.with_mode(node.acl, node.mode)
            if valid & abi.FATTR_ATIME:
                node.atime = now if valid & abi.FATTR_ATIME_NOW else moment(change.atime, change.atimensec)
            if valid & abi.FATTR_MTIME:
                node.mtime = now if valid & abi.FATTR_MTIME_NOW else moment(change.mtime, change.mtimensec)
            node.ctime = moment(change.ctime, change.ctimensec) if valid & abi.FATTR_CTIME else now
            return node.attributes(), FOREVER

    def _resize(self, data: SparseData, size: int) -> None:
        if size > _MAX_SIZE:
            raise OSError(errno.EFBIG, "beyond the largest offset", size)
        self.used_bytes -= data.allocated
        data.truncate(size)
        self.used_bytes += data.allocated

    def statfs(self, nodeid: int) -> Statfs:
        with self._lock:
            free = max(0, self.max_bytes - self.used_bytes) // BLOCK
            return Statfs(self.max_bytes // BLOCK, free, free, self.max_nodes, self.max_nodes - self.used_nodes)

    # Extended attributes

    def setxattr(self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int) -> None:
        with self._lock:
            node = self._nodes.get(nodeid)
            known = xattr(node, name)
            if flags & os.XATTR_CREATE and known is not None:
                raise OSError(errno.EEXIST, "the attribute exists", name)
            if flags & os.XATTR_REPLACE and known is None:
                raise OSError(errno.ENODATA, "no such attribute", name)
            if name in ACLS:
                entries = memory_acl.parse(value)
                set_acl(node, name, entries, bool(setxattr_flags & abi.FUSE_SETXATTR_ACL_KILL_SGID))
            else:
                size = len(value) - len(known) if known is not None else len(name) + len(value)
                self._claim(size)
                self.used_bytes += size
                node.xattrs[name] = value
            node.ctime = time.time_ns()

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        with self._lock:
            value = xattr(self._nodes.get(nodeid), name)
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute", name)
        return value

    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        with self._lock:
            # xattr(7): trusted.* is not shown to who lacks CAP_SYS_ADMIN. The kernel leaves that to us.
            return b"".join(name + b"\0" for name in xattr_names(self._nodes.get(nodeid), trusted=caller.uid == 0))

    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> None:
        with self._lock:
            node = self._nodes.get(nodeid)
            value = xattr(node, name)
            if name == memory_acl.ACCESS:
                node.acl = None  # no error where there was none: setfacl -b
            elif name == memory_acl.DEFAULT:
                node.default_acl = None
            elif value is None:
                raise OSError(errno.ENODATA, "no such attribute", name)
            else:
                del node.xattrs[name]
                self.used_bytes -= len(name) + len(value)
            node.ctime = time.time_ns()

    # Files

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        with self._lock:
            node, data = self._file(nodeid)
            self._opened(node, data, flags, open_flags)
            # What the kernel has cached it reads without asking: let it ask while that would move the access time.
            return 0, 0 if node.access_is_due(time.time_ns()) else abi.FOPEN_KEEP_CACHE

    def _opened(self, node: Node, data: SparseData, flags: int, open_flags: int) -> None:
        if flags & os.O_TRUNC:
            self._resize(data, 0)
            self.used_bytes -= node.drop_privileges(identity=bool(open_flags & abi.FUSE_OPEN_KILL_SUIDGID))
            node.modified()

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[Entry, tuple[int, int]]:
        with self._lock:
            found = self._directory(parent)[1].get(name)
            if found is not None and found[0].data is not None and not flags & os.O_EXCL:
                node = found[0]
                self._opened(node, found[0].data, flags, open_flags)
            else:
                node = self._create(caller, parent, name, stat.S_IFREG | mode & 0o7777, umask)
            return self._entry(node), (0, 0)

    def tmpfile(
        self, caller: Caller, parent: int, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[Entry, tuple[int, int]]:
        with self._lock:
            node = self._new(caller, self._directory(parent)[0], stat.S_IFREG | mode & 0o7777, umask)
            node.nlink = 0
            return self._entry(node), (0, 0)

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Sequence[Buffer]:
        with self._lock:
            node, data = self._file(nodeid)
            if not flags & os.O_NOATIME:
                node.accessed(time.time_ns())
            return data.read(offset, size)

    def write(
        self, nodeid: int, fh: int, offset: int, data: memoryview, write_flags: int, lock_owner: int, flags: int
    ) -> int:
        with self._lock:
            node, content = self._file(nodeid)
            self._put(content, offset, data)
            self.used_bytes -= node.drop_privileges(identity=bool(write_flags & abi.FUSE_WRITE_KILL_SUIDGID))
            node.modified()
            return len(data)

    def _put(self, content: SparseData, offset: int, data: memoryview) -> None:
        if offset + len(data) > _MAX_SIZE:
            raise OSError(errno.EFBIG, "beyond the largest offset", offset)
        if self.used_bytes + len(data) + CHUNK > self.max_bytes:
            self._claim(content.grows(offset, len(data)))
        before = content.allocated
        content.write(offset, data)
        self.used_bytes += content.allocated - before

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> None:
        if mode not in _FALLOCATE_MODES:
            raise OSError(errno.EOPNOTSUPP, "an unknown mode of fallocate", mode)
        end = offset + length
        if end > _MAX_SIZE:
            raise OSError(errno.EFBIG, "beyond the largest offset", end)
        with self._lock:
            node, data = self._file(nodeid)
            self._may_block(length)
            before = data.allocated
            if not mode & _PUNCH_HOLE:
                self._claim(data.grows(offset, length))
            if mode & (_PUNCH_HOLE | _ZERO_RANGE):
                data.zero(offset, length)
            if not mode & _PUNCH_HOLE:
                data.reserve(offset, length)
            if not mode & _KEEP_SIZE:
                data.size = max(data.size, end)
            self.used_bytes += data.allocated - before
            # Of the caller's privileges nothing is said here: rather too much is killed.
            self.used_bytes -= node.drop_privileges()
            node.modified()

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        with self._lock:
            data = self._file(nodeid)[1]
            if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
                raise OSError(errno.EINVAL, "the kernel seeks otherwise itself", whence)
            found = data.next_data(offset) if whence == os.SEEK_DATA else data.next_hole(offset)
            if offset >= data.size or (whence == os.SEEK_DATA and found >= data.size):
                raise OSError(errno.ENXIO, "after the last data", offset)
            return found

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> int:
        if flags:
            raise OSError(errno.EINVAL, "copy_file_range has no flags", flags)
        with self._lock:
            source = self._file(nodeid)[1]
            node, target = self._file(nodeid_out)
            length = min(length, _COPIED_AT_ONCE, max(0, source.size - offset))
            self._may_block(length)
            done = 0
            while done < length:
                step = min(CHUNK - (offset + done) % CHUNK, length - done)
                if (offset + done) // CHUNK in source.chunks:
                    data = memoryview(b"".join(source.read(offset + done, step)))
                    try:
                        self._put(target, offset_out + done, data)
                    except OSError:
                        if not done:
                            raise
                        break
                else:  # a hole stays one
                    before = target.allocated
                    target.zero(offset_out + done, step)
                    self.used_bytes += target.allocated - before
                    target.size = max(target.size, offset_out + done + step)
                done += step
            if done:
                self.used_bytes -= node.drop_privileges()
                node.modified()
            return done

    def _may_block(self, length: int) -> None:
        if length >= _LONG and self._connection is not None:
            self._connection.may_block(True)

    def ioctl(
        self, caller: Caller, nodeid: int, fh: int, flags: int, cmd: int, arg: int, data: memoryview, out_size: int
    ) -> tuple[int, Buffer]:
        with self._lock:
            return control(self._nodes.get(nodeid), cmd, data, out_size)

    # Directories. A cookie is 1 after ".", 2 after "..", and then a name's own, which it keeps as long as it exists.

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        with self._lock:
            self._directory(nodeid)
            return self._listings.add(Listing()), 0

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        self._listings.remove(fh)

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        buffer = DirBuffer(size)
        with self._lock:
            for name, cookie, node in self._rest(nodeid, fh, offset):
                if not buffer.add(name, node.ino, cookie, node.mode >> 12):
                    break
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        buffer = DirBuffer(size)
        with self._lock:
            for name, cookie, node in self._rest(nodeid, fh, offset):
                if not buffer.room_for_plus(name):
                    break
                if cookie < FIRST_COOKIE:
                    buffer.add_plus(name, cookie, None, node.ino, node.mode >> 12)
                else:
                    buffer.add_plus(name, cookie, self._entry(node))
        return buffer.data

    def _rest(self, nodeid: int, fh: int, offset: int) -> Iterator[tuple[bytes, int, Node]]:
        """Give (name, cookie, node) of what comes after a cookie: names as they were at the start, less those gone."""
        directory, names = self._directory(nodeid)
        listing = self._listings.get(fh)
        if offset == 0 or not listing.cookies:
            directory.accessed(time.time_ns())
            listing.begin(names)
        if offset < 1:
            yield b".", 1, directory
        if offset < 2:
            yield b"..", 2, directory.parent
        for place in range(bisect_right(listing.cookies, offset), len(listing.cookies)):
            name, cookie = listing.names[place], listing.cookies[place]
            found = names.get(name)
            if found is not None and found[1] == cookie:
                yield name, cookie, found[0]
