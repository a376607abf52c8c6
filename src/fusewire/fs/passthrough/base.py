"""What all parts of the passthrough filesystem share: nodes, handles, credentials, and how a status becomes a reply.

Layer `fs`. The parts (`names`, `attributes`, `data`, `directories`, `locks`) are classes on top of `Base`, one per
family of operations; `Passthrough` joins them.
"""

from __future__ import annotations

import errno
import os
from _thread import _local as threading_local
from _thread import allocate_lock
from struct import Struct
from typing import TYPE_CHECKING, Any

from fusewire.fs.idmap import IdMap, namespace_rules, parse_translations
from fusewire.fs.passthrough.nodes import Fd, Node, Nodes, status_of
from fusewire.fs.xattrmap import XattrMap
from fusewire.inodes import HandleTable
from fusewire.linux import caller as credentials
from fusewire.linux import files, syscalls
from fusewire.ops import Operations
from fusewire.wire import abi
from fusewire.wire.codec import timeout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fusewire.fs.passthrough.config import Config
    from fusewire.fs.passthrough.nodes import Status
    from fusewire.ops import Caller, Connection

# Flags of open(2) that say how an open file behaves, and have been checked by the client's kernel.
KEPT = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NONBLOCK | os.O_NOATIME
S_IFMT, S_IFDIR, S_IFREG, S_IFLNK = 0o170000, 0o040000, 0o100000, 0o120000

# What the thread of a server loses when it takes on another user, setfsuid(2); and the one that it may need there.
_OVER_FILES = sum(1 << number for number in (0, 1, 2, 3, 4, 9, 27, 32))
_OVERRIDE = 1 << syscalls.CAP_DAC_OVERRIDE

# fuse_attr of a file's status: numbers that are only passed on stay the bytes that they are.
ATTR = "Q16s8s8s8s4s4s4sI12sI4sI"
_ENTRY_OUT = Struct("=Q32s" + ATTR).pack  # node id; generation and timeouts
_ATTR_OUT = Struct("=16s" + ATTR).pack  # timeout
_TIMEOUTS = Struct("=QQQII").pack
_TIMEOUT = Struct("=QI4x").pack
_OWNER = Struct("=4sII")


class Handle:
    """An open file or directory: its descriptor, its node, and what a directory's listing has read ahead."""

    # Most never have more than what __init__ sets: these are the class's until then, which halves the making.
    # Directories only: entries that were read and not given yet, and the cookie that the first of them follows.
    pending: Sequence[files.Dirent] = ()
    cookie = 0
    given = 0  # how many of the portion at hand have been given
    bare = False  # READDIRPLUS gives names alone
    lock: Any = None
    owners: set[int] | None = None  # lock owners that have taken POSIX or OFD locks by it
    ended = False  # no lock is taken by it any more

    def __init__(self, node: Node, fd: Fd, flags: int) -> None:
        self.node = node
        self.fd = fd
        self.flags = flags


def wire_device(rdev: int) -> int:
    """Turn the device of a status into the kernel's 32-bit form (new_encode_dev)."""
    major, minor = rdev & 0xFFFFFFFF, rdev >> 32
    return minor & 0xFF | major << 8 | (minor & 0xFFF00) << 12


def device(rdev: int) -> int:
    """Turn the kernel's 32-bit device number (new_encode_dev) into what mknod(2) takes."""
    return os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)


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
        (entry, entry_ns), (attr, attr_ns) = timeout(config.entry_timeout), timeout(config.attr_timeout)
        self._entry_valid = _TIMEOUTS(0, entry, attr, entry_ns, attr_ns)
        self._attr_valid = _TIMEOUT(attr, attr_ns)
        self._attr_timeout = config.attr_timeout
        # What is remembered of a name that is missing, if anything is.
        seconds, nanoseconds = timeout(config.negative_timeout)
        negative = _ENTRY_OUT(0, _TIMEOUTS(0, seconds, 0, nanoseconds, 0), 0, *[b""] * 7, 0, b"", 0, b"", 0)
        self._missing = negative if config.negative_timeout else None
        self._uids: IdMap | None = parse_translations(config.translate_uid) if config.translate_uid else None
        self._gids: IdMap | None = parse_translations(config.translate_gid) if config.translate_gid else None
        self._xattrs = XattrMap.parse(config.xattrmap) if config.xattrmap else None
        self._switch = credentials.can_switch() if config.switch_ids is None else config.switch_ids
        self._kept_flags = KEPT if config.preserve_noatime else KEPT & ~os.O_NOATIME
        if config.remote and config.allow_direct_io:
            # A guest's data go between the host's file and the guest's own pages, which are aligned as a disk wants it.
            self._kept_flags |= os.O_DIRECT
        self._own_uid, self._own_gid = os.geteuid(), os.getegid()
        self._trusted = credentials.may_administer() if config.trusted is None else config.trusted
        self._override: Callable[[], None] | None = None
        if config.remote and self._switch and os.geteuid() == 0 and files.effective_capabilities() & _OVERRIDE:
            self._override = files.capability_setter(files.effective_capabilities() & ~_OVER_FILES | _OVERRIDE)
        # What may fail comes before this: from here on `source` is ours.
        by_handle = self._choose_handles(source)
        self.nodes = Nodes(source, budget=config.fd_budget or _budget(), handles=by_handle, proc=config.proc)
        self.handles: HandleTable[Handle] = HandleTable()
        self.nodes.others.append(self.handles)
        self._submounts = False
        # Files in the same place as the root are shown as they are; None: none are.
        self._plain = self.nodes.root.place if self._uids is None and self._gids is None else None
        self._devices: dict[bytes, int] = {}  # devices below the directory, in the order of their appearance
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

    def serve_namespace(self, uid_map: str, gid_map: str, inside: bool) -> None:
        """Speak the ids of the mount's user namespace: its maps, as this process sees them, or is it `inside`?

        Rules that were given count instead.
        """
        if self._uids is None:
            self._uids = _translation(uid_map, os.geteuid(), inside)
        if self._gids is None:
            self._gids = _translation(gid_map, os.getegid(), inside)
        if self._uids is not None or self._gids is not None:
            self._plain = None

    def renumber(self, first: int) -> None:
        """Number nodes and handles from `first` on: those of a server before us must not mean other files now."""
        self.nodes.table.renumber(first)
        self.handles.renumber(first)

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

    def _status(self, node: Node) -> Status:
        """Give a node's status, without opening it where it has no descriptor."""
        fd = node.fd or self.nodes.lent(node)
        if fd is None:
            parent = node.parent
            above = parent.fd if parent is not None else None  # once: another thread may close it for want of room
            if node.handle is None and above is not None:
                try:
                    status = files.status(above.number, node.name, files.AT_SYMLINK_NOFOLLOW)
                except FileNotFoundError:
                    status = ()
                if status and self.nodes.identity(status) == node.key and status[files.ST_MODE] & S_IFMT == node.kind:
                    return status
            fd = self.nodes.fd(node)
        return status_of(fd.number)

    def _attr(self, node: Node, status: Status) -> bytes:
        """Make fuse_attr_out."""
        blksize, owner, mode, ino, size, atime, atime_ns, _, ctime, ctime_ns, mtime, mtime_ns, rdev, place = status
        flags = 0
        if place != self._plain:
            ino, owner, flags = self._shown(node, ino, owner)
        return _ATTR_OUT(
            self._attr_valid, ino, size, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
            mode, owner, wire_device(rdev) if rdev else 0, blksize, flags,
        )  # fmt: skip

    def _shown(self, node: Node, ino: int, owner: bytes) -> tuple[int, bytes, int]:
        """Give inode number, links with owner, and FUSE_ATTR_* flags as the client is to see them."""
        if self._uids is not None or self._gids is not None:
            links, uid, gid = _OWNER.unpack(owner)
            if self._uids is not None:
                uid = self._uids.to_guest(uid)
            if self._gids is not None:
                gid = self._gids.to_guest(gid)
            owner = _OWNER.pack(links, uid, gid)
        if node.place == self.nodes.root.place:
            return ino, owner, 0
        if not self._submounts:
            return ino ^ self._elsewhere(node), owner, 0
        parent = node.parent
        top = parent is not None and parent.place != node.place
        return ino, owner, abi.FUSE_ATTR_SUBMOUNT if top else 0

    def _elsewhere(self, node: Node) -> int:
        """Give what to mark inode numbers of another filesystem than the root's with, where all are shown as one.

        Two files of the same number and device would be taken for one with two names, by tar, rsync and cp.
        """
        device = node.place[:8]
        if self._submounts or device == self.nodes.root.place[:8]:
            return 0
        return self._devices.setdefault(device, len(self._devices) + 1) << 48

    def _entry(self, nodeid: int, node: Node, status: Status) -> bytes:
        """Make fuse_entry_out of a node that has been entered."""
        blksize, owner, mode, ino, size, atime, atime_ns, _, ctime, ctime_ns, mtime, mtime_ns, rdev, place = status
        flags = 0
        if place != self._plain:
            ino, owner, flags = self._shown(node, ino, owner)
        return _ENTRY_OUT(
            nodeid, self._entry_valid, ino, size, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
            mode, owner, wire_device(rdev) if rdev else 0, blksize, flags,
        )  # fmt: skip

    def _found(self, parent: Node, directory: Fd, name: bytes) -> bytes:
        """Count a lookup of a name that has just been made, and make the reply."""
        status = files.status(directory.number, name, files.AT_SYMLINK_NOFOLLOW)
        nodeid, node = self.nodes.enter(parent, directory, name, status)
        return self._entry(nodeid, node, status)

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
        return self._open_for_real(self.nodes.fd(node), flags)

    def _open_for_real(self, fd: Fd, flags: int) -> Fd:
        """Open the file that `fd` stands for, which has to be a regular one or a directory."""
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
        elif self.config.remote:
            return ()
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
        if self._override is not None and not self.flags & abi.FUSE_CREATE_SUPP_GROUP:
            # A client that cannot say which groups the caller is in has checked by them that he may do this.
            self._override()
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
