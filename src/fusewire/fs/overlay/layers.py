"""The two filesystems below an overlay, each behind the few calls that merging needs.

Layer `fs`, a part of `fs.overlay`. `Lower` takes any read-only `Operations` that answers at once, and smooths out what
it does not offer. `Upper` is a directory of the host: the passthrough filesystem, with a way past its protocol for what
an overlay does on its own account.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from fusewire.adapters import is_async
from fusewire.fs.passthrough import MODES, Config, Passthrough
from fusewire.fs.passthrough.base import Handle, device
from fusewire.fs.passthrough.nodes import Fd, status_of
from fusewire.linux import files
from fusewire.ops import Caller, FileRange, Operations
from fusewire.wire import abi
from fusewire.wire.codec import ATTR_OUT, DIRENT, ENTRY_OUT
from fusewire.wire.requests import is_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from threading import RLock

    from fusewire.linux.caller import AsCaller
    from fusewire.ops import Attr, Buffer, Connection, Entry

OURSELVES = Caller(0, 0, 0, 0)  # who asks on the overlay's own account
Found = tuple[int, "Attr"]  # node id and attributes
INO, SIZE, MODE, NLINK, RDEV = 0, 1, 9, 10, 13  # places in Attr
_LISTED_AT_ONCE = 1 << 16
_READ_AT_ONCE = 1 << 20
_NEEDED = ("lookup", "getattr", "read", "readdir")
_SMOOTHED = ("open", "opendir", "readlink", "getxattr", "listxattr", "forget", "lseek", "release", "releasedir")


class Inner:
    """The connection as the two filesystems see it: they notify nobody, for their node ids are not the kernel's."""

    def __init__(self, connection: Connection) -> None:
        self.minor = connection.minor
        # Backing files would bypass us: one node may be open in both filesystems.
        self.flags = connection.flags & ~abi.FUSE_PASSTHROUGH
        self.max_write = connection.max_write
        self.max_readahead = connection.max_readahead
        self.max_pages = connection.max_pages
        self.may_block = connection.may_block
        self.log_once = connection.log_once

    def backing_open(self, fd: int) -> int:
        """Refuse."""
        raise OSError(errno.EOPNOTSUPP, "there are no backing files below an overlay", fd)

    def backing_close(self, backing_id: int) -> None:
        """Do nothing: there are none."""

    def notify_inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        """Do nothing."""
        return False

    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool = False) -> bool:
        """Do nothing."""
        return False

    def notify_delete(self, parent: int, child: int, name: bytes) -> bool:
        """Do nothing."""
        return False

    def notify_store(self, nodeid: int, offset: int, data: Buffer) -> bool:
        """Do nothing."""
        return False

    def notify_retrieve(self, nodeid: int, offset: int, size: int, done: Callable[[int, memoryview], None]) -> bool:
        """Do nothing."""
        return False

    def notify_poll(self, kh: int) -> bool:
        """Do nothing."""
        return False

    def notify_resend(self) -> bool:
        """Do nothing."""
        return False

    def notify_inc_epoch(self) -> bool:
        """Do nothing."""
        return False

    def notify_prune(self, nodeids: Iterable[int]) -> bool:
        """Do nothing."""
        return False


def entry_of(result: Entry | bytes | None) -> Found | None:
    """Give what a lookup has found."""
    if result is None:
        return None
    if isinstance(result, bytes):
        fields = ENTRY_OUT.unpack(result)
        return (fields[0], fields[6:]) if fields[0] else None
    return (result.nodeid, result.attr) if result.nodeid else None


def attr_of(result: tuple[Attr, float] | bytes) -> Attr:
    """Give the attributes in a reply."""
    if isinstance(result, bytes):
        return ATTR_OUT.unpack(result)[2:]
    return result[0]


class Lower:
    """The read-only filesystem below."""

    def __init__(self, operations: Operations) -> None:
        """Take it over. Raises TypeError if it does not answer at once (async handlers), or lacks what it takes."""
        kind = type(operations)
        for name in (*_NEEDED, *_SMOOTHED):
            if is_async(getattr(operations, name)):
                raise TypeError(f"{kind.__name__}.{name} is async: an overlay's lower filesystem has to answer at once")
        offered = {name for name in (*_NEEDED, *_SMOOTHED) if getattr(kind, name) is not getattr(Operations, name)}
        for name in _NEEDED:
            if name not in offered:
                raise TypeError(f"{kind.__name__} has no {name}: it cannot be an overlay's lower filesystem")
        self.operations: Any = operations  # its answers are no coroutines, which the type allows
        self._offers = offered
        self._counts = "forget" in offered
        # Where nobody counts lookups, those of names that are not given on need not be taken back.
        self.lists_attributes = not self._counts and kind.readdirplus is not Operations.readdirplus

    def find(self, parent: int, name: bytes) -> Found | None:
        """Look a name up and count it."""
        try:
            return entry_of(self.operations.lookup(OURSELVES, parent, name))
        except FileNotFoundError:
            return None

    def has(self, parent: int, name: bytes) -> bool:
        """Tell whether there is such a name."""
        found = self.find(parent, name)
        if found is None:
            return False
        self.forget(found[0])
        return True

    def forget(self, nodeid: int) -> None:
        """Take one lookup back."""
        if self._counts:
            self.operations.forget(nodeid, 1)

    def attr(self, nodeid: int) -> Attr:
        """Give the attributes of a node."""
        return attr_of(self.operations.getattr(nodeid, 0, 0))

    def statx(self, nodeid: int, ino: int) -> tuple[int, ...]:
        """Give the fields of fuse_statx as far as attributes have them: there is no time of birth."""
        attr = self.attr(nodeid)
        rdev = device(attr[RDEV])
        owner_and_mode = (attr[NLINK], attr[11], attr[12], attr[MODE])
        access, changed, written = signed(attr[3]), signed(attr[5]), signed(attr[4])
        times = [(access, attr[6]), (0, 0), (changed, attr[8]), (written, attr[7])]  # (0, 0): the birth
        return (
            *(files.STATX_BASIC_STATS, attr[14], 0, *owner_and_mode, ino, attr[SIZE], attr[2], 0),
            *(number for pair in times for number in pair),
            *(os.major(rdev), os.minor(rdev), 0, 0),
        )

    def open(self, nodeid: int, flags: int) -> int:
        """Open a file to be read."""
        fh: int = self.operations.open(OURSELVES, nodeid, flags, 0)[0] if "open" in self._offers else 0
        return fh

    def release(self, nodeid: int, fh: int) -> None:
        """End that."""
        if "release" in self._offers:
            self.operations.release(nodeid, fh, 0, 0, 0)

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> Any:
        """Give data as a reply to READ has them."""
        return self.operations.read(nodeid, fh, offset, size, 0, 0, os.O_RDONLY)

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        """Find data or a hole; where holes are not known, all of a file is data (lseek(2))."""
        if "lseek" in self._offers:
            found: int = self.operations.lseek(nodeid, fh, offset, whence)
            return found
        size = self.attr(nodeid)[SIZE]
        if offset >= size:  # negative ones too: they are unsigned here
            raise OSError(errno.ENXIO, "past the end of the file", offset)
        return offset if whence == os.SEEK_DATA else size

    def copy(self, nodeid: int, target: int, length: int) -> None:
        """Write the first `length` bytes of a file to the empty one behind `target`; holes stay holes.

        Raises OSError(EIO) if the file turns out to be shorter than its attributes say.
        """
        fh = self.open(nodeid, os.O_RDONLY)
        try:
            offset = end = 0
            while offset < length:
                if offset == end:
                    offset, end = self._data(nodeid, fh, offset, length)
                    continue
                got = _write_out(self.read(nodeid, fh, offset, min(_READ_AT_ONCE, end - offset)), target, offset)
                if not got:
                    raise _ends_early(nodeid)
                offset += got
            os.ftruncate(target, length)
        finally:
            self.release(nodeid, fh)

    def _data(self, nodeid: int, fh: int, offset: int, length: int) -> tuple[int, int]:
        """Give where the next data begin and end; (length, length) if there are no more."""
        if "lseek" not in self._offers:
            return offset, length
        try:
            start = min(max(offset, self.operations.lseek(nodeid, fh, offset, os.SEEK_DATA)), length)
            return start, min(max(start + 1, self.operations.lseek(nodeid, fh, start, os.SEEK_HOLE)), length)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole, or the file has become shorter
                if self.attr(nodeid)[SIZE] < length:
                    raise _ends_early(nodeid) from None
                return length, length
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                return offset, length
            raise

    def readlink(self, nodeid: int) -> bytes:
        """Give a symbolic link's target."""
        if "readlink" not in self._offers:
            raise OSError(errno.EINVAL, "not a symbolic link", nodeid)
        target: bytes = self.operations.readlink(nodeid)
        return target

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        """Give an attribute's value. Raises ENODATA."""
        if "getxattr" not in self._offers:
            raise OSError(errno.ENODATA, "no such attribute", name)
        value: bytes = self.operations.getxattr(caller, nodeid, name)
        return value

    def listxattr(self, caller: Caller, nodeid: int) -> list[bytes]:
        """Give the names of attributes."""
        if "listxattr" not in self._offers:
            return []
        names: bytes = self.operations.listxattr(caller, nodeid)
        return names.split(b"\0")[:-1]

    def entries(self, nodeid: int) -> Iterator[tuple[bytes, int, int, Found | None]]:
        """Give (name, inode number, DT_* type, what it leads to if that is known) of all names but "." and ".."."""
        operations = self.operations
        fh = operations.opendir(OURSELVES, nodeid, os.O_RDONLY, 0)[0] if "opendir" in self._offers else 0
        plus = self.lists_attributes
        listing = operations.readdirplus if plus else operations.readdir
        try:
            offset = 0
            while data := bytes(listing(nodeid, fh, offset, _LISTED_AT_ONCE, 0, 0, os.O_RDONLY)):
                place = 0
                while place < len(data):
                    start = place + 128 if plus else place
                    ino, offset, length, kind = DIRENT.unpack_from(data, start)
                    name = data[start + 24 : start + 24 + length]
                    # Nobody between has checked it, and it is to be a name in a directory of the host.
                    if is_name(name):
                        found = entry_of(data[place : place + 128]) if plus else None
                        yield name, ino, kind, found
                    place = start + (24 + length + 7 & ~7)
        finally:
            if "releasedir" in self._offers:
                operations.releasedir(nodeid, fh, 0, 0, 0)


def _ends_early(nodeid: int) -> OSError:
    return OSError(errno.EIO, "the lower file ends before its size", nodeid)


def _write_out(data: Any, fd: int, offset: int) -> int:
    """Write what a READ was answered with, and leave out pieces that are zeros; give its length."""
    if isinstance(data, FileRange):
        return _copy_range(data, fd, offset)
    start = offset
    for piece in data if isinstance(data, (list, tuple)) else [data]:
        view = memoryview(piece).cast("B")
        if any(view[:64]) or bytes(view).count(0) != len(view):
            while view:
                written = os.pwrite(fd, view, offset)
                view = view[written:]
                offset += written
        else:
            offset += len(view)
    return offset - start


def _copy_range(data: FileRange, fd: int, offset: int) -> int:
    try:
        return os.copy_file_range(data.fd, fd, data.size, data.offset, offset)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    return _write_out(os.pread(data.fd, data.size, data.offset), fd, offset)


class Upper(Passthrough):
    """The directory of the host that takes all changes."""

    def __init__(self, directory: int, config: Config, moving: RLock) -> None:
        """Take over an O_PATH descriptor, and of `config` what concerns ids, access control lists and the sandbox.

        Lifetimes in its replies do not matter, and locks are the kernel's. moving: held by who moves names here.
        """
        config.mode = MODES["always"]
        config.xattr, config.xattrmap = True, None
        config.posix_lock = config.flock = config.watch = config.writeback = False
        config.announce_submounts = config.passthrough = False
        super().__init__(directory, config)
        self.nodes.moving = moving

    def _as(self, caller: Caller) -> AsCaller | None:
        return None if caller is OURSELVES else super()._as(caller)

    def find(self, parent: int, name: bytes) -> Found | None:
        """Look a name up and count it; a whiteout is found like anything else."""
        return entry_of(self.lookup(OURSELVES, parent, name))

    def attr(self, nodeid: int) -> Attr:
        """Give the attributes of a node."""
        return attr_of(self.getattr(nodeid, 0, 0))

    def reach(self, nodeid: int) -> Fd:
        """Give a descriptor (O_PATH or better) of a node; to be held while its number is used."""
        return self.nodes.fd(self.nodes.get(nodeid))

    def path(self, fd: Fd) -> bytes:
        """Give the path that leads to what a descriptor stands for, as long as it is held."""
        return self._path(fd)

    def open_listing(self, nodeid: int) -> Fd:
        """Open a directory to be listed."""
        return self.nodes.open_directory(self.nodes.get(nodeid))

    def adopt(self, opened: Fd) -> int:
        """Make a node, with one lookup, of a file that has no name."""
        root = self.nodes.root
        nodeid, node = self.nodes.enter(root, opened, b"", status_of(opened.number))
        self.nodes.pin(node, opened)
        return nodeid

    def own(self, fd: int, uid: int, gid: int) -> bool:
        """Give what a descriptor stands for to a user as the client names him; False if that is not ours to give."""
        try:
            uid = uid if self._uids is None else self._uids.to_host(uid)
            gid = gid if self._gids is None else self._gids.to_host(gid)
            files.fchownat_empty(fd, uid, gid)
        except OSError as error:
            # EINVAL: this user namespace does not know him; EOVERFLOW and EPERM: the translation does not.
            if error.errno in (errno.EPERM, errno.EINVAL, errno.EOVERFLOW):
                return False
            raise
        return True

    def set_times(self, fd: int, access: tuple[int, int], modified: tuple[int, int]) -> None:
        """Set the times of what a descriptor stands for, each (seconds, nanoseconds)."""
        self._utimens(fd, access, modified)

    def control(self, caller: Caller, nodeid: int, cmd: int, data: memoryview, out_size: int) -> tuple[int, Buffer]:
        """Pass on a control call for a file or a directory, however it is open. Raises ENOTTY."""
        node = self.nodes.get(nodeid)
        fh = self.handles.add(Handle(node, self._reopen(node, os.O_RDONLY | os.O_NONBLOCK), os.O_RDONLY))
        try:
            return self.ioctl(caller, nodeid, fh, 0, cmd, 0, data, out_size)
        finally:
            self.handles.remove(fh)

    def synchronise(self, nodeid: int, fsync_flags: int) -> None:
        """Make a directory durable."""
        self._sync(self.open_listing(nodeid), fsync_flags)


def signed(seconds: int) -> int:
    """Give a time before 1970 its sign back; fuse_attr has none."""
    return seconds - (1 << 64) if seconds >> 63 else seconds


def is_whiteout(attr: Attr) -> bool:
    """Tell whether attributes are those of a whiteout of the kernel's form."""
    return attr[RDEV] == 0 and stat.S_ISCHR(attr[MODE])
