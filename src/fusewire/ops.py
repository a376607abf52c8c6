"""Level 1 of the API: `Operations`, one method per FUSE request, and the plain values that pass through it.

Layer `ops`: types and contracts, no I/O. Names are bytes; node ids, handles and flags are ints under their kernel
names. A method that a class does not override is an operation that its filesystem does not offer: the session then
gives the answer that makes the kernel stop asking. Failure is an `OSError` with an errno (a bare
`FileNotFoundError` will do); any other exception is logged once per place and answered EIO. Where a signature allows
`bytes` beside an Entry or attributes, that is the reply's body in wire form, made beforehand.

Any method but `renumber` and `idle` may be an `async def`: it runs as a task of an asyncio loop, and INTERRUPT cancels
it. `Answer[T]` is T, or the coroutine of T, or a `Pending`; an override says which of them it gives.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import TypeAlias, TypeVar

    T = TypeVar("T")
    # What a method may give: its value, or as an `async def` the coroutine that gives it. Answers can be `Pending` too.
    Eventual: TypeAlias = T | Coroutine[Any, Any, T]
    Answer: TypeAlias = T | Coroutine[Any, Any, T] | "Pending"

Buffer = bytes | bytearray | memoryview

# The 16 fields of fuse_attr in wire order: ino, size, blocks (of 512 bytes), atime, mtime, ctime (seconds),
# atimensec, mtimensec, ctimensec, mode, nlink, uid, gid, rdev, blksize, flags.
Attr = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]

FOREVER = 1 << 32
"""A cache lifetime, in seconds, that never ends."""


def attr(
    ino: int,
    mode: int,
    size: int = 0,
    *,
    nlink: int = 1,
    uid: int = 0,
    gid: int = 0,
    rdev: int = 0,
    atime: float = 0,
    mtime: float = 0,
    ctime: float = 0,
    blocks: int | None = None,
    blksize: int = 4096,
    flags: int = 0,
) -> Attr:
    """Make the attributes of a file; `mode` has the type bits (stat(2)), times are seconds since the epoch."""

    def split(seconds: float) -> tuple[int, int]:
        whole = int(seconds // 1)
        return whole & 0xFFFFFFFFFFFFFFFF, int((seconds - whole) * 1_000_000_000)

    a, an = split(atime)
    m, mn = split(mtime)
    c, cn = split(ctime)
    if blocks is None:
        blocks = (size + 511) // 512
    return (ino, size, blocks, a, m, c, an, mn, cn, mode, nlink, uid, gid, rdev, blksize, flags)


class Entry(NamedTuple):
    """What a name leads to: the answer to lookup and to everything that creates a name.

    Each Entry given to the kernel adds one to the node's lookup count; `forget` takes them back. `nodeid` 0 says that
    the name does not exist and may be remembered as missing for `entry_timeout` seconds.
    """

    nodeid: int
    attr: Attr
    entry_timeout: float = 1.0
    attr_timeout: float = 1.0
    generation: int = 0


class FileRange(NamedTuple):
    """Data for a READ reply that lies in a file: the transport moves `size` bytes at `offset` of `fd` itself.

    `keep` is whatever has to live until that is done: the descriptor's owner, where another request may end it.
    """

    fd: int
    offset: int
    size: int
    keep: object = None


class Statfs(NamedTuple):
    """File system statistics, statvfs(3); sizes in units of `frsize` bytes."""

    blocks: int = 0
    bfree: int = 0
    bavail: int = 0
    files: int = 0
    ffree: int = 0
    bsize: int = 4096
    namelen: int = 255
    frsize: int = 4096


class Setattr(NamedTuple):
    """fuse_setattr_in: `valid` is FATTR_*; only the fields that it names mean anything."""

    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


class Lock(NamedTuple):
    """A POSIX or flock lock: fuse_file_lock. `end` is inclusive, `type` F_RDLCK, F_WRLCK or F_UNLCK."""

    start: int
    end: int
    type: int
    pid: int


class Extensions(NamedTuple):
    """What follows the names of a creating request: security contexts to set, and one supplementary group to use."""

    security: Sequence[tuple[bytes, bytes]] = ()
    groups: Sequence[int] = ()


class Caller(NamedTuple):
    """Who asks: fsuid, fsgid and pid as the mounting user namespace sees them (pid 0: outside our pid namespace).

    `extensions` is set on creating requests once SECURITY_CTX or CREATE_SUPP_GROUP was agreed.
    """

    uid: int
    gid: int
    pid: int
    unique: int
    extensions: Extensions | None = None


class Pages:
    """Data in many places of mapped memory: what preadv(2) and pwritev(2) take, without an object for each piece.

    `iovec` is an array of `count` struct iovec with the addresses in this process, `nbytes` their length in all. The
    addresses hold as long as this object lives; where a hostile guest has chosen one that is no memory, the call moves
    what lies before it, or is EFAULT.
    """

    __slots__ = ("_views", "count", "iovec", "nbytes")

    def __init__(self, iovec: bytes, count: int, nbytes: int, views: Callable[[], list[memoryview]]) -> None:
        """Take the array, and what gives the pieces: it has to keep the memory that they are in."""
        self.iovec = iovec
        self.count = count
        self.nbytes = nbytes
        self._views = views

    def views(self) -> list[memoryview]:
        """Give the pieces one by one; those that are empty, or no memory, are left out."""
        return self._views()


Gathered = list[memoryview] | Pages


class Pending:
    """An answer that comes later: a handler returns it instead of a value and some other thread completes it.

    `interrupt`, if given, is called when the caller gives up (FUSE INTERRUPT, signal(7)); it should make somebody
    call `fail` with EINTR soon. It never blocks, and completing twice is harmless: the first wins. One request each;
    no subclasses (the session knows it by its exact type).
    """

    __slots__ = ("_error", "_lock", "_result", "_send", "_settled", "interrupt")

    def __init__(self, interrupt: Callable[[], None] | None = None) -> None:
        from _thread import allocate_lock

        self.interrupt = interrupt
        self._lock = allocate_lock()
        self._settled = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._send: Callable[[Any, BaseException | None], None] | None = None

    def __init_subclass__(cls) -> None:
        raise TypeError("Pending has no subclasses: give it an `interrupt`, or wrap it")

    def complete(self, result: Any) -> None:
        """Give the value that the handler would have returned."""
        self._settle(result, None)

    def fail(self, error: BaseException) -> None:
        """Give the exception that the handler would have raised."""
        self._settle(None, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
            self.interrupt = None  # it often leads back to here
            send = self._send
            if send is None:
                self._result, self._error = result, error
        if send is not None:
            send(result, error)

    def bind(self, send: Callable[[Any, BaseException | None], None]) -> tuple[Any, BaseException | None] | None:
        """Say where the answer goes; if it is there already, give it instead. For the session only.

        Raises RuntimeError when another request waits for it.
        """
        with self._lock:
            if self._send is not None:
                raise RuntimeError("one Pending cannot answer two requests")
            self._send = send
            return (self._result, self._error) if self._settled else None


class Connection(Protocol):
    """What a filesystem may know and ask of the mount that it serves; handed to `Operations.init`."""

    minor: int
    flags: int
    max_write: int
    max_readahead: int
    max_pages: int

    def may_block(self, long: bool = False) -> None: ...
    def log_once(self, message: str, error: BaseException | None = None, *, place: str = "") -> None: ...
    def backing_open(self, fd: int) -> int: ...
    def backing_close(self, backing_id: int) -> None: ...
    def notify_inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool: ...
    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool = False) -> bool: ...
    def notify_delete(self, parent: int, child: int, name: bytes) -> bool: ...
    def notify_store(self, nodeid: int, offset: int, data: Buffer) -> bool: ...
    def notify_retrieve(self, nodeid: int, offset: int, size: int, done: Callable[[int, memoryview], None]) -> bool: ...
    def notify_poll(self, kh: int) -> bool: ...
    def notify_resend(self) -> bool: ...
    def notify_inc_epoch(self) -> bool: ...
    def notify_prune(self, nodeids: Iterable[int]) -> bool: ...


def _unsupported(name: str) -> NoReturn:
    raise OSError(errno.ENOSYS, "operation is not offered by this filesystem", name)


class Operations:
    """One method per FUSE operation; override what the filesystem offers.

    Class attributes tell the session what to negotiate (INIT, <linux/fuse.h>).
    """

    immutable: bool = False
    """Nothing ever changes while mounted: data and symlinks are kept by the kernel and never checked again."""
    read_only: bool = False
    """Requests that would change something are answered EROFS."""
    default_permissions: bool = False
    """The kernel checks modes and owners, mount(8), where whoever mounts has not said otherwise."""
    interruptible: bool = False
    """INTERRUPT is wanted: some handlers return `Pending` with an `interrupt`. Else the kernel is told not to ask."""
    announces_blocking: bool = False
    """Handlers call `connection.may_block()` before anything slow. One worker at a time then reads requests, and hands
    that on only when it is about to be busy: a stream of quick requests stays on one thread and one processor, where
    workers that take turns would pay for a change of thread per request."""
    gathers: bool = False
    """`write` takes a list of memoryviews too, in the place of one, or `Pages`; at most IOV_MAX (1024) pieces."""
    idle_work: bool = False
    """Set while there is something for `idle` to do; looked at after each reply."""
    want: int = 0
    """Further INIT flags (FUSE_* of `wire.abi`) to accept when the kernel offers them."""
    refuse: int = 0
    """INIT flags not to accept."""
    workers: int = 0
    """How many workers suit it; 0: as many as there are processors. More pay where handlers wait for a disk."""
    time_gran: int = 1
    """Granularity of time stamps in nanoseconds, a power of ten up to 10**9."""

    # Life

    def init(self, connection: Connection) -> Eventual[None]:
        """Begin: the protocol has been agreed; keep `connection` for notifications."""

    def renumber(self, first: int) -> None:
        """Give node ids and handles from `first` on, before `init`: the client has some of a server that ended.

        Not overridden, only a filesystem that is `immutable` can take over a client: there they mean the same again.
        """
        _unsupported("renumber")

    def serve_namespace(self, uid_map: str, gid_map: str, inside: bool) -> None:
        """Hear of the mount's user namespace, before `init`: its maps, as this process sees them; is it in it itself?

        For filesystems that show owners of files of the host, which have other numbers there: user_namespaces(7).
        """

    def destroy(self) -> Eventual[None]:
        """End: no request comes after this. Called once per mount, also when the kernel sent no DESTROY."""

    def idle(self) -> None:
        """Work ahead a little: called by a worker that has answered and finds no request waiting. Never fails.

        Only with `announces_blocking`, and while `idle_work` is set. The caller of the next request may have to wait
        for it, so it is a matter of microseconds.
        """

    # Names

    def lookup(self, caller: Caller, parent: int, name: bytes) -> Answer[Entry | bytes | None]:
        """Find `name` in directory `parent`; None (or FileNotFoundError, which takes longer) if there is none.

        An Entry with nodeid 0 says so too, and is remembered for its time.
        """
        _unsupported("lookup")

    def forget(self, nodeid: int, nlookup: int) -> Eventual[None]:
        """Take `nlookup` from the node's lookup count; at 0 the kernel will not name it again. Never fails."""

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Answer[Entry | bytes]:
        """Make a symbolic link `name` that holds `target`, symlink(2)."""
        _unsupported("symlink")

    def mknod(
        self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int
    ) -> Answer[Entry | bytes]:
        """Make a node, mknod(2). The umask is applied already unless FUSE_DONT_MASK was agreed."""
        _unsupported("mknod")

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> Answer[Entry | bytes]:
        """Make a directory, mkdir(2)."""
        _unsupported("mkdir")

    def unlink(self, caller: Caller, parent: int, name: bytes) -> Answer[None]:
        """Remove a name that is not a directory, unlink(2). The node lives on while it is open or looked up."""
        _unsupported("unlink")

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> Answer[None]:
        """Remove an empty directory, rmdir(2)."""
        _unsupported("rmdir")

    def rename(
        self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int
    ) -> Answer[None]:
        """Move a name, renameat2(2). Serves RENAME (flags 0) and RENAME2."""
        _unsupported("rename")

    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> Answer[Entry | bytes]:
        """Give the node another name, link(2)."""
        _unsupported("link")

    def readlink(self, nodeid: int) -> Answer[bytes]:
        """Give a symbolic link's target, at most PAGE_SIZE - 1 bytes without NUL, readlink(2)."""
        _unsupported("readlink")

    # Attributes

    def getattr(self, nodeid: int, flags: int, fh: int) -> Answer[tuple[Attr, float] | bytes]:
        """Give attributes and how many seconds they hold. `fh` counts when `flags` has FUSE_GETATTR_FH."""
        _unsupported("getattr")

    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> Answer[tuple[Attr, float] | bytes]:
        """Change what `change.valid` names (chmod, chown, truncate, utimensat) and give the new attributes."""
        _unsupported("setattr")

    def statx(
        self, nodeid: int, flags: int, fh: int, sx_flags: int, sx_mask: int
    ) -> Answer[tuple[Sequence[int], float, int]]:
        """Give the fields of fuse_statx without its padding, their lifetime and fuse_statx_out.flags, statx(2)."""
        _unsupported("statx")

    def access(self, caller: Caller, nodeid: int, mask: int) -> Answer[None]:
        """Check access(2); not asked when `default_permissions` is set."""
        _unsupported("access")

    def setxattr(
        self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int
    ) -> Answer[None]:
        """Set an extended attribute, setxattr(2)."""
        _unsupported("setxattr")

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> Answer[bytes]:
        """Give an attribute's value, getxattr(2). Size probing and ERANGE are the session's work. ENODATA if none."""
        _unsupported("getxattr")

    def listxattr(self, caller: Caller, nodeid: int) -> Answer[bytes]:
        """Give the names of all attributes, each with a NUL after it, listxattr(2)."""
        _unsupported("listxattr")

    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> Answer[None]:
        """Remove an extended attribute, removexattr(2)."""
        _unsupported("removexattr")

    # Files

    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> Answer[tuple[int, ...]]:
        """Give (fh, FOPEN_* flags). Not overriding it spares the kernel one round trip per open and close."""
        _unsupported("open")

    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> Answer[tuple[Entry | bytes, tuple[int, ...]]]:
        """Make and open a regular file, open(2) with O_CREAT."""
        _unsupported("create")

    def tmpfile(
        self, caller: Caller, parent: int, flags: int, mode: int, umask: int, open_flags: int
    ) -> Answer[tuple[Entry | bytes, tuple[int, ...]]]:
        """Make and open a file without a name, open(2) with O_TMPFILE."""
        _unsupported("tmpfile")

    def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Answer[Buffer | Sequence[Buffer] | FileRange]:
        """Give up to `size` bytes at `offset`: less means end of file. Buffers are sent as they are, uncopied."""
        _unsupported("read")

    def write(
        self, nodeid: int, fh: int, offset: int, data: memoryview, write_flags: int, lock_owner: int, flags: int
    ) -> Answer[int]:
        """Write `data`, a memoryview, at `offset` and give the count of bytes. It is the request's memory: copy what is
        kept. A virtual machine may change it meanwhile; only with `gathers` it comes in other forms.
        """
        _unsupported("write")

    def flush(self, nodeid: int, fh: int, lock_owner: int) -> Answer[None]:
        """Answer a close(2) of one descriptor; its error is close's error. Releases POSIX locks of `lock_owner`."""
        _unsupported("flush")

    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> Answer[None]:
        """End a handle: the last descriptor is gone. Nobody hears an error."""
        _unsupported("release")

    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> Answer[None]:
        """Make a file durable, fsync(2); FUSE_FSYNC_FDATASYNC for fdatasync."""
        _unsupported("fsync")

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> Answer[int]:
        """Find SEEK_DATA or SEEK_HOLE, lseek(2)."""
        _unsupported("lseek")

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> Answer[None]:
        """Reserve or punch space, fallocate(2)."""
        _unsupported("fallocate")

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int, flags: int
    ) -> Answer[int]:
        """Copy within the filesystem and give the count of bytes, copy_file_range(2). Also serves the 64-bit form."""
        _unsupported("copy_file_range")

    def ioctl(
        self, caller: Caller, nodeid: int, fh: int, flags: int, cmd: int, arg: int, data: memoryview, out_size: int
    ) -> Answer[tuple[int, Buffer]]:
        """Give (result, output of at most `out_size` bytes), ioctl(2)."""
        _unsupported("ioctl")

    def poll(self, nodeid: int, fh: int, kh: int, flags: int, events: int) -> Answer[int]:
        """Give the ready events; with FUSE_POLL_SCHEDULE_NOTIFY keep `kh` and call `notify_poll` on a change."""
        _unsupported("poll")

    def bmap(self, nodeid: int, block: int, blocksize: int) -> Answer[int]:
        """Map a file's block to one of the device (fuseblk only)."""
        _unsupported("bmap")

    # Directories

    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> Answer[tuple[int, int]]:
        """Give (fh, FOPEN_* flags) for a directory."""
        _unsupported("opendir")

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Answer[Buffer]:
        """Give entries after the cookie `offset`, at most `size` bytes in wire form (`wire.codec.DirBuffer`)."""
        _unsupported("readdir")

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Answer[Buffer]:
        """As readdir, with an Entry each; every one but "." and ".." adds to its node's lookup count."""
        _unsupported("readdirplus")

    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> Answer[None]:
        """End a directory handle."""
        _unsupported("releasedir")

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> Answer[None]:
        """Make a directory durable."""
        _unsupported("fsyncdir")

    # Locks

    def getlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Answer[Lock]:
        """Give the lock that stands in the way, or one of type F_UNLCK, fcntl(2) F_GETLK."""
        _unsupported("getlk")

    def setlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Answer[None]:
        """Take or drop a lock without waiting; EAGAIN if somebody holds it. FUSE_LK_FLOCK in `lk_flags`: flock(2)."""
        _unsupported("setlk")

    def setlkw(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Answer[None]:
        """Take a lock and wait for it: return a `Pending`, never hold the worker."""
        _unsupported("setlkw")

    # The whole

    def statfs(self, nodeid: int) -> Answer[Statfs]:
        """Give statistics, statvfs(3). Without it the answer is all zeros."""
        _unsupported("statfs")

    def syncfs(self, nodeid: int) -> Answer[None]:
        """Make everything durable, syncfs(2). Only virtio-fs and privileged mounts are asked."""
        _unsupported("syncfs")
