"""What all parts of the passthrough filesystem share: nodes, handles, credentials, and how a status becomes a reply.

Layer `fs`. The parts (`names`, `attributes`, `data`, `directories`, `locks`) are classes on top of `Base`, one per
family of operations; `Passthrough` joins them.
"""

from __future__ import annotations

import errno
import os
from _thread import _local as threading_local
from _thread import allocate_lock
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from fusewire.fs.idmap import IdMap, namespace_rules, parse_translations
from fusewire.fs.passthrough.nodes import STATUS, Fd, Node, Nodes, status_of
from fusewire.fs.xattrmap import XattrMap
from fusewire.inodes import HandleTable
from fusewire.linux import caller as credentials
from fusewire.linux import files
from fusewire.ops import Operations
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.fs.passthrough.config import Config
    from fusewire.ops import Attr, Caller, Connection

S_IFMT, S_IFDIR, S_IFREG, S_IFLNK = 0o170000, 0o040000, 0o100000, 0o120000
_U64 = 0xFFFFFFFFFFFFFFFF

# A plain tuple in the shape of Entry: (node id, attributes, entry timeout, attribute timeout, generation).
EntryTuple = tuple[int, "Attr", float, float, int]


class Handle:
    """An open file or directory: its descriptor, its node, and what a directory's listing has read ahead."""

    __slots__ = ("cookie", "ended", "fd", "flags", "lock", "node", "owners", "pending")

    def __init__(self, node: Node, fd: Fd, flags: int) -> None:
        self.node = node
        self.fd = fd
        self.flags = flags
        # Directories only: entries that were read and not given yet, and the cookie that the first of them follows.
        self.pending: list[tuple[bytes, int, int, int]] = []
        self.cookie = 0
        self.lock: Any = None
        self.owners: set[int] | None = None  # lock owners that have taken POSIX or OFD locks by it
        self.ended = False  # no lock is taken by it any more


def attributes(status: tuple[int, ...], uid: int, gid: int, flags: int = 0) -> Attr:
    """Make fuse_attr's fields of a statx."""
    times = _TIMES(status)
    if min(times) < 0:  # before 1970; on the wire they are unsigned
        times = tuple([time & _U64 for time in times])
    major, minor = status[files.SX_RDEV_MAJOR], status[files.SX_RDEV_MINOR]
    rdev = (minor & 0xFF | major << 8 | (minor & 0xFFF00) << 12) if major or minor else 0
    attr: Attr = (*_FIRST(status), *times, *_REST(status), uid, gid, rdev, status[files.SX_BLKSIZE], flags)
    return attr


_FIRST = itemgetter(files.SX_INO, files.SX_SIZE, files.SX_BLOCKS)
_TIMES = itemgetter(files.SX_ATIME, files.SX_MTIME, files.SX_CTIME)
_REST = itemgetter(files.SX_ATIME_NS, files.SX_MTIME_NS, files.SX_CTIME_NS, files.SX_MODE, files.SX_NLINK)


def device(rdev: int) -> int:
    """Turn the kernel's 32-bit device number (new_encode_dev) into what mknod(2) takes."""
    return os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)


def whole_seconds(seconds: float) -> float:
    """Give an int for a whole number: the encoder has a shorter way for it."""
    return int(seconds) if seconds == int(seconds) else seconds


class Base(Operations):
    """The state of a served directory."""

    interruptible = True
    announces_blocking = True
    workers = 10

    def __init__(self, source: int, config: Config) -> None:
        """Take over `source`, an O_PATH descriptor of the directory.

        Raises OSError where the options ask for what the server may not do; ValueError for rules that cannot be read.
        """
        self.config = config
        self._proc = config.proc
        self._entry_timeout = whole_seconds(config.entry_timeout)
        self._attr_timeout = whole_seconds(config.attr_timeout)
        self._negative_timeout = whole_seconds(config.negative_timeout)
        self._uids: IdMap | None = parse_translations(config.translate_uid) if config.translate_uid else None
        self._gids: IdMap | None = parse_translations(config.translate_gid) if config.translate_gid else None
        self._xattrs = XattrMap.parse(config.xattrmap) if config.xattrmap else None
        self._switch = credentials.can_switch() if config.switch_ids is None else config.switch_ids
        self._own_uid, self._own_gid = os.geteuid(), os.getegid()
        self._trusted = credentials.may_administer()
        # What may fail comes before this: from here on `source` is ours.
        by_handle = self._choose_handles(source)
        self.nodes = Nodes(source, budget=config.fd_budget or _budget(), handles=by_handle)
        self.handles: HandleTable[Handle] = HandleTable()
        self.nodes.others.append(self.handles)
        self._submounts = False
        self._devices: dict[tuple[int, ...], int] = {}  # devices below the directory, in the order of their appearance
        self._may_block: Callable[[bool], None] | None = None
        self._threads = threading_local()
        self._umask_lock = allocate_lock()
        self.flags = 0
        self._connection: Connection | None = None

    def _choose_handles(self, source: int) -> bool:
        wanted = self.config.inode_file_handles
        if wanted == "never":
            return False
        try:
            handle, _ = files.name_to_handle(source, b"", files.AT_EMPTY_PATH)
            mount = Fd(os.open(b"%s%d" % (self._proc, source), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            Fd(files.open_by_handle(mount.number, handle, os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            if wanted == "mandatory":
                raise OSError(
                    error.errno,
                    f"inode_file_handles=mandatory: {error.strerror}. It takes a filesystem with file handles and "
                    "CAP_DAC_READ_SEARCH in the first user namespace; use inode_file_handles=prefer",
                ) from error
            return False
        return True

    def serve_namespace(self, pid: int) -> None:
        """Speak the ids of the user namespace of process `pid`, which the mount is in.

        Rules that were given count instead. Raises OSError if the process is gone.
        """
        inside = os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
        if self._uids is None:
            with open(f"/proc/{pid}/uid_map") as lines:
                self._uids = _translation(lines.read(), os.geteuid(), inside)
        if self._gids is None:
            with open(f"/proc/{pid}/gid_map") as lines:
                self._gids = _translation(lines.read(), os.getegid(), inside)

    def init(self, connection: Connection) -> None:
        self._connection = connection
        self._may_block = connection.may_block
        self.flags = connection.flags
        self._submounts = self.config.announce_submounts and bool(connection.flags & abi.FUSE_SUBMOUNTS)

    def destroy(self) -> None:
        self.handles.drain()
        self.nodes.close()

    def _slow(self) -> None:
        """Let another worker read requests: what follows may take long."""
        if self._may_block is not None:
            self._may_block(True)

    def _sync(self, fd: Fd, fsync_flags: int) -> None:
        """Make a file or a directory durable, fsync(2) or fdatasync(2)."""
        self._slow()
        if fsync_flags & abi.FUSE_FSYNC_FDATASYNC:
            os.fdatasync(fd.number)
        else:
            os.fsync(fd.number)

    # Status and replies

    def _status(self, node: Node) -> tuple[int, ...]:
        """Give a node's statx, without opening it where it has no descriptor."""
        fd = node.fd or self.nodes.lent(node)
        if fd is None:
            parent = node.parent
            above = parent.fd if parent is not None else None  # once: another thread may close it for want of room
            if node.handle is None and above is not None:
                try:
                    status = files.statx(above.number, node.name, files.AT_SYMLINK_NOFOLLOW, STATUS)
                except FileNotFoundError:
                    status = ()
                if status and self.nodes.identity(status) == node.key and status[files.SX_MODE] & S_IFMT == node.kind:
                    return status
            fd = self.nodes.fd(node)
        return status_of(fd.number)

    def _attr(self, node: Node, status: tuple[int, ...]) -> Attr:
        uid, gid = status[files.SX_UID], status[files.SX_GID]
        if self._uids is not None:
            uid = self._uids.to_guest(uid)
        if self._gids is not None:
            gid = self._gids.to_guest(gid)
        if node.mount == self.nodes.root.mount:
            return attributes(status, uid, gid)
        if not self._submounts:
            attr = attributes(status, uid, gid)
            return (attr[0] ^ self._elsewhere(node), *attr[1:])
        parent = node.parent
        top = parent is not None and parent.mount != node.mount
        return attributes(status, uid, gid, abi.FUSE_ATTR_SUBMOUNT if top else 0)

    def _elsewhere(self, node: Node) -> int:
        """Give what to mark inode numbers of another filesystem than the root's with, where all are shown as one.

        Two files of the same number and device would be taken for one with two names, by tar, rsync and cp.
        """
        device = node.key[2:4]
        if self._submounts or device == self.nodes.root.key[2:4]:
            return 0
        return self._devices.setdefault(device, len(self._devices) + 1) << 48

    def _entry(self, parent: Node, directory: Fd, name: bytes, status: tuple[int, ...]) -> EntryTuple:
        """Count a lookup of a name whose status is given, and make the reply."""
        nodeid, node = self.nodes.enter(parent, directory, name, status)
        return nodeid, self._attr(node, status), self._entry_timeout, self._attr_timeout, 0

    def _found(self, parent: Node, directory: Fd, name: bytes) -> EntryTuple:
        """As `_entry`, of a name that has just been made."""
        status = files.statx(directory.number, name, files.AT_SYMLINK_NOFOLLOW, STATUS)
        return self._entry(parent, directory, name, status)

    def _path(self, fd: Fd) -> bytes:
        """Give the path under /proc that leads to what an O_PATH descriptor stands for, whatever its name is now.

        It holds a number only: the caller has `fd` in a local variable as long as he uses the path.
        """
        return b"%s%d" % (self._proc, fd.number)

    def _reopen(self, node: Node, flags: int) -> Fd:
        """Open a node's file or directory for real. Raises OSError: EBADF for what is neither, ENFILE, and open(2)'s.

        Nothing else is ever opened: a device or a FIFO would act, or wait, on the server's behalf.
        """
        if node.kind not in (S_IFREG, S_IFDIR):
            raise OSError(errno.EBADF, "only files and directories are opened", node.name)
        fd = self.nodes.fd(node)
        self.nodes.reserve()
        try:
            return Fd(os.open(self._path(fd), flags & ~(os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC))
        except OSError as error:
            raise self.nodes.explain(error) from None

    # Who asks

    def _groups(self, caller: Caller) -> tuple[int, ...]:
        """Give supplementary groups that count for what the caller creates, as host ids."""
        extensions = caller.extensions
        if extensions is not None and self.flags & abi.FUSE_CREATE_SUPP_GROUP:
            groups = tuple(extensions.groups)
        else:
            groups = credentials.groups_of(caller.pid)
        if self._gids is not None:
            groups = tuple(self._gids.to_host(group) for group in groups)
        return groups

    def _as(self, caller: Caller) -> credentials.AsCaller | None:
        """Make this thread act as the caller, if the server may; the result's `leave` has to be called.

        The kernel has checked the caller's permission already (default_permissions). What is made must be his, and the
        rules that depend on who makes it (setgid directories, quotas) must see him.
        """
        uid, gid = caller.uid, caller.gid
        if not self._switch and self._uids is None and self._gids is None:
            return None
        if self._uids is not None:
            uid = self._uids.to_host(uid)
        if self._gids is not None:
            gid = self._gids.to_host(gid)
        if not self._switch or (uid == self._own_uid and gid == self._own_gid):
            return None
        person = credentials.AsCaller()
        person.enter(uid, gid, self._groups(caller))
        return person


def _translation(text: str, own: int, inside: bool) -> IdMap | None:
    """Make the translation of a namespace's map; `inside`: what the server sees are that namespace's ids already."""
    ranges = [tuple(map(int, line.split())) for line in text.splitlines()]
    if inside:
        ranges = [(first, first, count) for first, _, count in ranges]
    for first, outside, count in ranges:
        if outside <= own < outside + count:
            rules = namespace_rules(ranges, first + own - outside)
            return parse_translations(rules) if rules else None
    return None


def _budget() -> int:
    """What RLIMIT_NOFILE leaves to nodes and files, after raising it as far as it goes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    if soft == resource.RLIM_INFINITY or soft > 1 << 20:
        soft = 1 << 20
    return max(16, soft - min(128, soft // 4))
