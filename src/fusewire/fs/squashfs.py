"""A squashfs image as a read-only filesystem.

Layer `fs`; the format is `formats.squashfs`. A node id is the inode's reference in the image (plus 2, so that 0 and
the root's 1 stay free): the server holds no state per file, a second server can go on where one died, and a hostile
id is only a reference that the reader checks. Everything is immutable, so every answer holds for ever, and neither
OPEN nor RELEASE nor FLUSH ever reaches us: what is left is one READDIRPLUS per directory and the READs.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING

from fusewire.fs.prefetch import Prefetcher
from fusewire.ops import FOREVER, Operations, Statfs
from fusewire.wire.codec import ATTR_OUT, DIRENT, ENTRY_OUT, DirBuffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewire.formats.squashfs import Image, Inode
    from fusewire.fs.imagefile import ImageFile
    from fusewire.ops import Buffer, Caller, Connection

# fuse_direntplus with everything zero left out: generation, nanoseconds, flags. What remains, in order: nodeid,
# entry_valid, attr_valid, ino, size, blocks, atime, mtime, ctime, mode, nlink, uid, gid, rdev, blksize; then the
# dirent's ino, off, namelen, type.
_PLUS = Struct("=Q8xQQ8xQQQQQQ12xIIIIII4xQQII")
_PLUS_SIZE = _PLUS.size
_PADDING = [b"\0" * (-length & 7) for length in range(8)]

# Listings made ahead (each as large as a READDIRPLUS request: 32 KiB, more only for who has a larger buffer), and how
# many directories of a walk are remembered.
_LISTINGS = 3
_EXPECTED = 4096

# DT_DIR of <dirent.h>.
_DT_DIR = 4


class SquashFS(Operations):
    """Serves an `Image`. `uid`, `gid`, `umask` override what is stored; timeouts are in seconds."""

    immutable = True
    read_only = True
    announces_blocking = True
    time_gran = 1_000_000_000

    def __init__(
        self,
        image: Image,
        *,
        uid: int | None = None,
        gid: int | None = None,
        umask: int = 0,
        entry_timeout: float = FOREVER,
        attr_timeout: float = FOREVER,
        negative_timeout: float = FOREVER,
        prefetch: bool = True,
        file: ImageFile | None = None,
    ) -> None:
        """Serve `image`; `file` is what it reads from, closed at the end."""
        self.image = image
        self.root = image.root
        self._uid = uid
        self._gid = gid
        self._mode_mask = ~umask & 0xFFFF
        self._owned = uid is not None or gid is not None or umask != 0
        self._entry_valid = _seconds(entry_timeout)
        self._attr_valid = _seconds(attr_timeout)
        self._missing = ENTRY_OUT.pack(0, 0, _seconds(negative_timeout), 0, *[0] * 18) if negative_timeout else None
        self._prefetcher = Prefetcher(image, None if prefetch else 0)
        self._ahead = _Walk()
        self._file = file
        self._blksize = image.superblock.block_size

    def init(self, connection: Connection) -> None:
        self._prefetcher.may_block = connection.may_block
        if self._file is not None:
            self._file.begin(connection)

    def destroy(self) -> None:
        self._prefetcher.close()
        if self._file is not None:
            self._file.close()

    def statistics(self) -> dict[str, int]:
        """Give the counters of the image's caches, and of the file that it is read from."""
        return self.image.statistics() | (self._file.statistics() if self._file is not None else {})

    # Node ids

    def _inode(self, nodeid: int) -> Inode:
        return self.image.inode(self.root if nodeid == 1 else nodeid - 2)

    def _directory(self, nodeid: int) -> Inode:
        inode = self._inode(nodeid)
        if inode.type != 1:
            raise OSError(errno.ENOTDIR, "not a directory", nodeid)
        return inode

    # Names and attributes

    def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
        found = self.image.lookup(self._directory(parent), name)
        if found is None:
            return self._missing
        nodeid = found[0] + 2
        valid = self._entry_valid
        return ENTRY_OUT.pack(nodeid, 0, valid, self._attr_valid, 0, 0, *self._attr(self._inode(nodeid)))

    def getattr(self, nodeid: int, flags: int, fh: int) -> bytes:
        return ATTR_OUT.pack(self._attr_valid, 0, *self._attr(self._inode(nodeid)))

    def _attr(self, inode: Inode) -> tuple[int, ...]:
        uid, gid, mode, mtime = inode.uid, inode.gid, inode.mode, inode.mtime
        if self._owned:
            uid = self._uid if self._uid is not None else uid
            gid = self._gid if self._gid is not None else gid
            mode &= self._mode_mask
        return (
            inode.number,
            inode.size,
            inode.blocks,
            mtime,
            mtime,
            mtime,
            0,
            0,
            0,
            mode,
            inode.nlink,
            uid,
            gid,
            inode.rdev,
            self._blksize,
            0,
        )

    def readlink(self, nodeid: int) -> bytes:
        inode = self._inode(nodeid)
        if inode.type != 3:
            raise OSError(errno.EINVAL, "not a symbolic link", nodeid)
        return self.image.readlink(inode)

    # Directories. A cookie is 1 after ".", 2 after "..", and the image's own after that, which is always more.

    def _dots(self, nodeid: int, inode: Inode, offset: int) -> list[tuple[bytes, int, int]]:
        parent = inode.number if nodeid == 1 else inode.parent
        return [(b".", inode.number, 1), (b"..", parent, 2)][offset:] if offset < 2 else []

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        inode = self._directory(nodeid)
        buffer = DirBuffer(size)
        for name, number, cookie in self._dots(nodeid, inode, offset):
            if not buffer.add(name, number, cookie, _DT_DIR):
                return buffer.data
        for cookie, name, _, kind, number in self.image.entries(inode, offset if offset > 2 else 0):
            if not buffer.add(name, number, cookie, _DTYPE[kind]):
                break
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        ahead = self._ahead
        if offset:
            data, directories = self._list(nodeid, offset, size)
        else:
            ready = ahead.ready.pop(nodeid, None)
            data, directories = ready[1:] if ready is not None and ready[0] == size else self._list(nodeid, 0, size)
            self.idle_work = ahead.listed(nodeid, size)
        if directories:
            ahead.expect(directories)
        return data

    def idle(self) -> None:
        """List one of the directories that a walk through the tree will come to next."""
        ahead = self._ahead
        nodeid = ahead.next()
        if nodeid:
            try:
                ahead.ready[nodeid] = (ahead.size, *self._list(nodeid, 0, ahead.size))
            except OSError:
                return  # who comes there will meet the error
        self.idle_work = nodeid != 0

    def _list(self, nodeid: int, offset: int, size: int) -> tuple[bytearray, list[int]]:
        """Make a READDIRPLUS reply, and tell which directories are in it."""
        inode = self._directory(nodeid)
        data = bytearray()
        directories: list[int] = []
        if offset >= inode.size > 3:
            return data, directories  # the image's cookies end there: the second question of everybody who lists
        for name, number, cookie in self._dots(nodeid, inode, offset):
            # No lookup goes with these two: the kernel skips a node id of 0.
            if len(data) + 160 > size:
                return data, directories
            data += bytes(128) + DIRENT.pack(number, cookie, len(name), _DT_DIR) + name.ljust(8, b"\0")
        pack, entry_valid, attr_valid, blksize = _PLUS.pack, self._entry_valid, self._attr_valid, self._blksize
        room = size - len(data)
        owned, own_uid, own_gid, mask = self._owned, self._uid, self._gid, self._mode_mask
        for (
            cookie,
            name,
            ref,
            kind,
            number,
            mode,
            uid,
            gid,
            length,
            blocks,
            mtime,
            nlink,
            rdev,
        ) in self.image.attributes(inode, offset if offset > 2 else 0, size // 160 + 1):
            count = len(name)
            padding = _PADDING[count & 7]
            room -= _PLUS_SIZE + count + len(padding)
            if room < 0:
                break
            if not mode:
                # A damaged inode: its name is listed, and whoever looks at it gets the error.
                data += bytes(128) + DIRENT.pack(number, cookie, count, 0) + name + padding
                continue
            if owned:
                uid = own_uid if own_uid is not None else uid
                gid = own_gid if own_gid is not None else gid
                mode &= mask
            if kind == 1:
                directories.append(ref + 2)
            data += pack(
                ref + 2, entry_valid, attr_valid, number, length, blocks, mtime, mtime, mtime,
                mode, nlink, uid, gid, rdev, blksize, number, cookie, count, mode >> 12,
            )  # fmt: skip
            data += name
            data += padding
        return data, directories

    # Data

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Sequence[Buffer]:
        inode = self._inode(nodeid)
        if inode.type != 2:
            raise OSError(errno.EISDIR if inode.type == 1 else errno.EINVAL, "not a regular file", nodeid)
        return self._prefetcher.read(inode, offset, size)

    def statfs(self, nodeid: int) -> Statfs:
        superblock = self.image.superblock
        size = superblock.block_size
        return Statfs(
            blocks=(superblock.bytes_used + size - 1) // size,
            files=superblock.inodes,
            bsize=size,
            frsize=size,
            namelen=255,
        )


class _Walk:
    """Knows where somebody who walks the tree will go next, and keeps a few listings that were made for him.

    Between an answer and the next request the other processor is at work with the answer: time enough to make the next
    listing. `find`, `tar` and `ls -R` take a directory's subdirectories in order, each with all that is below it.
    """

    __slots__ = ("_expected", "_found", "ready", "size")

    def __init__(self) -> None:
        self.ready: dict[int, tuple[int, bytearray, list[int]]] = {}  # node id -> size asked for, reply, directories
        self.size = 0
        self._expected: list[int] = []  # node ids, the next one last
        self._found = 0

    def listed(self, nodeid: int, size: int) -> bool:
        """Hear that a directory is being listed from its beginning; tell whether this is a walk."""
        self.size = size
        expected = self._expected
        if nodeid in expected[-_LISTINGS - 1 :]:
            self._found += 1
            while expected and expected.pop() != nodeid:
                pass
        elif expected or self.ready:
            self._found = 0
            expected.clear()
            self.ready.clear()
        return self._found > 1

    def expect(self, directories: list[int]) -> None:
        """Hear what is in the directory that has just been listed."""
        self._expected += reversed(directories)
        del self._expected[:-_EXPECTED]

    def next(self) -> int:
        """Give the node id of the directory to list ahead, or 0 if enough is ready."""
        ready = self.ready
        if len(ready) < _LISTINGS:
            for nodeid in self._expected[: -_LISTINGS - 1 : -1]:
                if nodeid not in ready:
                    return nodeid
        return 0


class SquashFSWithXattrs(SquashFS):
    """For images that store extended attributes; the others let the kernel stop asking after the first question.

    xattr(7): trusted.* is visible to CAP_SYS_ADMIN of the first user namespace only. The kernel refuses to read them
    to others, but what is listed is ours to say, and copying tools complain of a name that has no value.
    `trusted`: whether root, as it calls us, may be one with that capability.
    """

    trusted = False

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        value = self.image.xattr(self._inode(nodeid), name)
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute", name)
        return value

    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        names = self.image.xattr_names(self._inode(nodeid))
        if not (self.trusted and caller.uid == 0):
            names = [name for name in names if not name.startswith(b"trusted.")]
        return b"".join(name + b"\0" for name in names)


def _seconds(timeout: float) -> int:
    """Squashfs keeps whole seconds, and so do its lifetimes: a fraction is rounded up."""
    return min(int(-(-timeout // 1)), FOREVER)


# Basic inode type (1..7) -> DT_* of <dirent.h>.
_DTYPE = (0, 4, 8, 10, 6, 2, 1, 12)
