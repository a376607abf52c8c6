"""The system calls of a filesystem over host files that `os` and `fcntl` lack: statx, openat2, handles, locks, ids.

Layer: linux. Like `syscalls` it decides nothing and retries nothing: a call works or raises OSError with errno, a
message that begins with the name of the call, and the path where there is one. EINTR is passed up too. Every call
releases the GIL. Names are bytes and must not hold a NUL: unlike `os`, ctypes ends them there without a word.

Functions of the C library are used where glibc and musl both have them in every version that can be met. The others,
and those whose libc wrapper would do something else (setgroups(2) in glibc changes all threads), are raw calls:
numbers from 403 on are the same everywhere but on alpha and mips, the older ones are in a table per machine. A
machine that is not in it gets ENOSYS, as from an old kernel.

The hot ones are called without `argtypes` and with a fresh buffer: checking the five arguments of statx costs 0.5 us,
a buffer from threading.local saves 0.05 us over a new one (0.12 us), one from a bytearray costs 1 us more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from fusewire.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_STATX_FORCE_SYNC = 0x2000
AT_STATX_DONT_SYNC = 0x4000
AT_HANDLE_FID = 0x200  # name_to_handle_at, Linux 6.5: an identity only, that open_by_handle_at may refuse
AT_HANDLE_MNT_ID_UNIQUE = 0x001  # name_to_handle_at, Linux 6.12

# <linux/stat.h>
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800
STATX_MNT_ID = 0x1000  # Linux 5.8
STATX_DIOALIGN = 0x2000  # Linux 6.1
STATX_MNT_ID_UNIQUE = 0x4000  # Linux 6.8
STATX_ATTR_IMMUTABLE = 0x10
STATX_ATTR_APPEND = 0x20
STATX_ATTR_AUTOMOUNT = 0x1000
STATX_ATTR_MOUNT_ROOT = 0x2000  # Linux 5.8
STATX_ATTR_DAX = 0x200000

# Places in what statx() returns; times are two places each, seconds and nanoseconds.
SX_MASK, SX_BLKSIZE, SX_ATTRIBUTES, SX_NLINK, SX_UID, SX_GID, SX_MODE, SX_INO, SX_SIZE, SX_BLOCKS = range(10)
SX_ATTRIBUTES_MASK, SX_ATIME, SX_ATIME_NS, SX_BTIME, SX_BTIME_NS, SX_CTIME, SX_CTIME_NS = range(10, 17)
SX_MTIME, SX_MTIME_NS, SX_RDEV_MAJOR, SX_RDEV_MINOR, SX_DEV_MAJOR, SX_DEV_MINOR = range(17, 23)
SX_MNT_ID, SX_DIO_MEM_ALIGN, SX_DIO_OFFSET_ALIGN = range(23, 26)

# Places in what status() returns.
ST_BLKSIZE, ST_OWNER, ST_MODE, ST_INO, ST_SIZE, ST_ATIME, ST_ATIME_NS, ST_BIRTH, ST_CTIME, ST_CTIME_NS = range(10)
ST_MTIME, ST_MTIME_NS, ST_RDEV, ST_PLACE = range(10, 14)

# <linux/openat2.h>
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20  # Linux 5.12

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_INSERT_RANGE = 0x20
FALLOC_FL_UNSHARE_RANGE = 0x40

OFFSET_MAX = (1 << 63) - 1  # the last byte of a lock to the end of the file, as FUSE writes it

# <linux/inotify.h>
IN_ACCESS = 0x001
IN_MODIFY = 0x002
IN_ATTRIB = 0x004
IN_CLOSE_WRITE = 0x008
IN_CLOSE_NOWRITE = 0x010
IN_OPEN = 0x020
IN_MOVED_FROM = 0x040
IN_MOVED_TO = 0x080
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000
IN_DONT_FOLLOW = 0x02000000
IN_EXCL_UNLINK = 0x04000000
IN_MASK_CREATE = 0x10000000
IN_MASK_ADD = 0x20000000
IN_ISDIR = 0x40000000
IN_ONESHOT = 0x80000000

CLONE_FS = 0x200
# <linux/magic.h>; XFS has its number in its own header.
OVERLAYFS_SUPER_MAGIC = 0x794C7630
EXT4_SUPER_MAGIC = 0xEF53
XFS_SUPER_MAGIC = 0x58465342
BTRFS_SUPER_MAGIC = 0x9123683E
F2FS_SUPER_MAGIC = 0xF2F52010
TMPFS_MAGIC = 0x01021994
NO_ID = 0xFFFFFFFF  # (uid_t) -1: no user or group has it

_MAX_HANDLE_SZ = 128
_GENERIC = (291, 276, 61, 88, 151, 152, 159)  # <asm-generic/unistd.h>
# <asm/unistd.h> of each machine; on 32 bit the calls with 32 bit ids and 64 bit times (utimensat_time64, Linux 5.1).
_OLD_NUMBERS = {
    #          statx renameat2 getdents64 utimensat setfsuid setfsgid setgroups
    "x86_64": (332, 316, 217, 280, 122, 123, 116),
    "i386": (383, 353, 220, 412, 215, 216, 206),
    "arm": (397, 382, 217, 412, 215, 216, 206),
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
    "ppc64le": (383, 357, 202, 304, 138, 139, 81),
    "s390x": (379, 347, 220, 315, 215, 216, 206),
}


def _machine() -> str:
    """The machine whose system calls this interpreter makes, which may be narrower than the kernel's."""
    machine = os.uname().machine
    if struct.calcsize("P") == 4:  # an interpreter of 32 bits, as i686 or on a kernel of 64
        return {"x86_64": "i386", "i486": "i386", "i586": "i386", "i686": "i386"}.get(
            machine, "arm" if machine.startswith(("arm", "aarch64")) else machine
        )
    return machine


def _numbers() -> dict[str, ctypes.c_long]:
    machine = _machine()
    names = ("statx", "renameat2", "getdents64", "utimensat", "setfsuid", "setfsgid", "setgroups")
    found = dict(zip(names, _OLD_NUMBERS.get(machine, (-1,) * len(names)), strict=True))
    shifted = machine.startswith(("mips", "alpha"))
    found["openat2"] = -1 if shifted else 437
    found["fchmodat2"] = -1 if shifted else 452
    return {name: ctypes.c_long(number) for name, number in found.items()}  # -1: the kernel answers ENOSYS


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall  # takes ints as 32 bits; what the kernel reads as long or pointer comes as c_long or bytes
_NR = _numbers()
_NR_OPENAT2 = _NR["openat2"]
_NR_FCHMODAT2 = _NR["fchmodat2"]
_NR_RENAMEAT2 = _NR["renameat2"]
_NR_GETDENTS64 = _NR["getdents64"]
_NR_UTIMENSAT = _NR["utimensat"]
_NR_SETFSUID = _NR["setfsuid"]
_NR_SETFSGID = _NR["setfsgid"]
_NR_SETGROUPS = _NR["setgroups"]

_Statx = ctypes.c_char * 256
_Statfs = ctypes.c_char * 256
_long = struct.Struct("@l").unpack_from
_statx_unpack = struct.Struct("=IIQIIIH2xQQQQqI4xqI4xqI4xqI4xIIIIQII").unpack_from
_status_unpack = struct.Struct("=4x4s8x12sH2xQ16s8x8s4s4x12s4x8s4s4x8s4s4xQ16s").unpack_from
_STATUS = STATX_BASIC_STATS | STATX_BTIME | STATX_MNT_ID
_open_how = struct.Struct("=QQQ").pack
_OPEN_HOW_SIZE = ctypes.c_long(24)
_two_times = struct.Struct("=qqqq").pack
_flock = struct.Struct("hhqqi0q")  # native alignment: CPython is built with 64 bit offsets everywhere
_dirent = struct.Struct("=QQHB").unpack_from
_DIRENT_NAME = 19
_inotify_event = struct.Struct("=iIII").unpack_from
_file_handle = struct.Struct("=Ii")
_Handle = ctypes.c_char * (8 + _MAX_HANDLE_SZ)
_MountId = ctypes.c_char * 8
_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3; the kernel writes to it for other versions only
_CapData = ctypes.c_char * 24
_cap_words = struct.Struct("=6I")


def _named(name: str) -> ctypes._NamedFuncPointer:
    """A function of the C library, or if it lacks that (musl before 1.2.5) the system call of this name."""
    try:
        return _libc[name]
    except AttributeError:
        number = _NR[name]

    def raw(*args: object) -> int:
        return int(_syscall(number, *args))

    return raw  # type: ignore[return-value]


_statx = _named("statx")
try:
    _fallocate = _libc["fallocate64"]  # the plain one has 32 bit offsets in a glibc of 32 bits
except AttributeError:
    _fallocate = _libc["fallocate"]  # musl
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_linkat = _libc.linkat
_fchownat = _libc.fchownat
_syncfs = _libc.syncfs
_fstatfs = _libc.fstatfs
_name_to_handle_at = _libc.name_to_handle_at
_open_by_handle_at = _libc.open_by_handle_at
_inotify_init1 = _libc.inotify_init1
_inotify_add_watch = _libc.inotify_add_watch
_inotify_rm_watch = _libc.inotify_rm_watch
_capget = _libc.capget
_capset = _libc.capset


def _fail(what: str, path: bytes | None = None) -> NoReturn:
    number = ctypes.get_errno()
    if path:
        raise OSError(number, f"{what}: {os.strerror(number)}", os.fsdecode(path))
    raise OSError(number, f"{what}: {os.strerror(number)}")


def statx(directory: int, name: bytes, flags: int, mask: int) -> tuple[int, ...]:
    """Everything the kernel knows of a file, as a tuple whose places are SX_*: statx(2), Linux 4.11.

    The descriptor itself is meant by the name b"" with AT_EMPTY_PATH. What the filesystem did not fill in is 0 and
    its bit missing in the first place, which may have more bits than `mask` asked for.
    """
    buffer = _Statx()
    if _statx(directory, name, flags, mask, buffer):
        _fail("statx", name)
    return _statx_unpack(buffer)


def status(directory: int, name: bytes, flags: int) -> tuple[Any, ...]:
    """As statx(), with its birth and mount, in pieces as they stand in struct statx: to be sent on, not reckoned with.

    A tuple whose places are ST_*. Plain ints: the mode, the inode number, and the device that a node stands for (major
    number in the lower half). Bytes: block size (4), links, user and group (12), size and blocks (16), times in seconds
    (8) and nanoseconds (4), the birth with both (12), the device and the mount that the file is on (16).

    Whoever passes them on saves 1.5 us over unpacking and packing two dozen numbers.
    """
    buffer = _Statx()
    if _statx(directory, name, flags, _STATUS, buffer):
        _fail("statx", name)
    return _status_unpack(buffer)


def status_if_any(directory: int, name: bytes, flags: int) -> tuple[Any, ...] | None:
    """As status(); None if there is no such name, which is no error to who only looks."""
    buffer = _Statx()
    if _statx(directory, name, flags, _STATUS, buffer):
        if ctypes.get_errno() == errno.ENOENT:
            return None
        _fail("statx", name)
    return _status_unpack(buffer)


def filesystem_type(fd: int) -> int:
    """The magic number of the filesystem that a descriptor, also an O_PATH one, is on: fstatfs(2)."""
    buffer = _Statfs()
    if _fstatfs(fd, buffer):
        _fail("fstatfs")
    return int(_long(buffer)[0]) & 0xFFFFFFFF


def openat2(directory: int, name: bytes, flags: int, mode: int, resolve: int) -> int:
    """Open under the rules RESOLVE_*: openat2(2), Linux 5.6. O_CLOEXEC is not implied.

    The kernel refuses (EINVAL) unknown flags and a mode without O_CREAT or O_TMPFILE, which open(2) ignores. ELOOP and
    EXDEV are how the rules speak; EAGAIN means that something was renamed meanwhile and the call may be repeated.
    """
    fd: int = _syscall(_NR_OPENAT2, directory, name, _open_how(flags, mode, resolve), _OPEN_HOW_SIZE)
    if fd < 0:
        _fail("openat2", name)
    return fd


def name_to_handle(directory: int, name: bytes, flags: int) -> tuple[bytes, int]:
    """A handle that names the inode as long as it exists, and its mount's id: name_to_handle_at(2).

    The bytes are a whole struct file_handle (length, type, opaque part) as open_by_handle() takes it. Two handles of
    one filesystem are equal exactly if the inodes are. EOPNOTSUPP: this filesystem has no handles.
    """
    handle, mount = _Handle(), _MountId()
    _file_handle.pack_into(handle, 0, _MAX_HANDLE_SZ, 0)
    if _name_to_handle_at(directory, name, handle, mount, flags):
        _fail("name_to_handle_at", name)
    size = 8 + _file_handle.unpack_from(handle)[0]
    (mount_id,) = struct.unpack_from("=Q" if flags & AT_HANDLE_MNT_ID_UNIQUE else "=i", mount)
    return handle.raw[:size], mount_id


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open the inode of a handle: open_by_handle_at(2).

    `mount_fd` is any descriptor on the same filesystem, but not an O_PATH one. Needs CAP_DAC_READ_SEARCH, before Linux
    6.11 in the first user namespace. ESTALE: the inode is gone.
    """
    # The kernel copies and does not write to the handle, so bytes will do.
    fd: int = _open_by_handle_at(mount_fd, handle, flags)
    if fd < 0:
        _fail("open_by_handle_at")
    return fd


def renameat2(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """Rename under RENAME_* flags: renameat2(2). EINVAL: the filesystem does not know the flag."""
    if _syscall(_NR_RENAMEAT2, old_directory, old, new_directory, new, flags):
        _fail(f"renameat2 {os.fsdecode(old)}", new)


def utimensat(
    directory: int, name: bytes | None, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0
) -> None:
    """Set access and modification time, each (signed seconds, nanoseconds or UTIME_NOW or UTIME_OMIT).

    utimensat(2): without a name the open file `directory` is meant; an O_PATH descriptor needs the name b"" and
    AT_EMPTY_PATH, which kernels before 5.8 refuse with EINVAL.
    """
    if _syscall(_NR_UTIMENSAT, directory, name, _two_times(*atime, *mtime), flags):
        _fail("utimensat", name)


def fchmodat2(directory: int, name: bytes, mode: int, flags: int) -> None:
    """chmod(2) that knows AT_EMPTY_PATH and AT_SYMLINK_NOFOLLOW: fchmodat2(2), Linux 6.6, ENOSYS before.

    Before, an O_PATH descriptor is reached by os.chmod of /proc/self/fd/N. The mode of a symlink: EOPNOTSUPP.
    """
    if _syscall(_NR_FCHMODAT2, directory, name, mode, flags):
        _fail("fchmodat2", name)


def fchownat(directory: int, name: bytes, uid: int, gid: int, flags: int) -> None:
    """chown(2), with AT_EMPTY_PATH and the name b"" of an O_PATH descriptor. NO_ID leaves an id as it is."""
    if _fchownat(directory, name, uid, gid, flags):
        _fail("fchownat", name)


def fchownat_empty(fd: int, uid: int, gid: int) -> None:
    """Change the owner of what a descriptor, also an O_PATH one, stands for (os.chown answers EBADF for those)."""
    if _fchownat(fd, b"", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW):
        _fail("fchownat")


def linkat(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """One more name for a file: linkat(2).

    By descriptor: the name b"" with AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH (ENOENT without; since Linux 6.10 not for a
    file that the same credentials opened); b"/proc/self/fd/N" with AT_SYMLINK_FOLLOW needs /proc only.
    """
    if _linkat(old_directory, old, new_directory, new, flags):
        _fail(f"linkat {os.fsdecode(old)}".rstrip(), new)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Allocate, punch, zero, collapse or insert a range, by FALLOC_FL_*: fallocate(2), in bytes."""
    if _fallocate(fd, mode, offset, length):
        _fail("fallocate")


def syncfs(fd: int) -> None:
    """Write back the filesystem that holds an open file: syncfs(2). An O_PATH descriptor is EBADF."""
    if _syncfs(fd):
        _fail("syncfs")


def getdents64(fd: int, buffer: bytearray) -> int:
    """Fill `buffer` with directory entries from the descriptor's position on; 0 at the end: getdents64(2).

    Positions are the `d_off` of entries, for os.lseek. EINVAL: not even one entry has room.
    """
    size = len(buffer)
    got: int = _syscall(_NR_GETDENTS64, fd, ctypes.byref(ctypes.c_char.from_buffer(buffer)), size)
    if got < 0:
        _fail("getdents64")
    return got


Dirent = tuple[bytes, int, int, int]  # name, inode number, offset of the next entry, DT_* type


def parse_dents(buffer: bytes | bytearray, size: int) -> list[Dirent]:
    """The entries in what getdents64() read, "." and ".." too. Offsets are unsigned, as FUSE has them."""
    data = bytes(memoryview(buffer)[:size])
    unpack, end_of_name = _dirent, data.index
    entries: list[Dirent] = []
    append = entries.append
    place = 0
    while place < size:
        inode, offset, length, kind = unpack(data, place)
        start = place + _DIRENT_NAME
        # What follows the NUL is left from earlier calls: the kernel does not clear it.
        append((data[start : end_of_name(0, start)], inode, offset, kind))
        place += length
    return entries


def setfsuid(uid: int) -> int:
    """Make this thread's file accesses those of `uid`, and tell the id before: setfsuid(2).

    The kernel reports no refusal: whether it took effect is seen by a second call, with NO_ID, which changes nothing.
    From user 0 to another the thread loses the effective capabilities over files (CAP_CHOWN, CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID, CAP_LINUX_IMMUTABLE, CAP_MAC_OVERRIDE, CAP_MKNOD), and gets all of
    those that it is permitted on the way back: capabilities(7). A thread whose id is not 0 keeps its capabilities.
    """
    previous: int = _syscall(_NR_SETFSUID, uid)
    if previous == -1:
        _fail("setfsuid")
    return previous & 0xFFFFFFFF


def setfsgid(gid: int) -> int:
    """As setfsuid() for the group: setfsgid(2). Supplementary groups stay."""
    previous: int = _syscall(_NR_SETFSGID, gid)
    if previous == -1:
        _fail("setfsgid")
    return previous & 0xFFFFFFFF


def setgroups(groups: Iterable[int]) -> None:
    """Set the supplementary groups of this thread alone, where os.setgroups does for all threads: setgroups(2)."""
    ids = tuple(groups)
    if _syscall(_NR_SETGROUPS, len(ids), struct.pack(f"={len(ids)}I", *ids)):
        _fail("setgroups")


def effective_capabilities() -> int:
    """The effective capabilities of this thread as a mask of bits CAP_X: capget(2)."""
    data = _CapData()
    if _capget(_CAP_HEADER, data):
        _fail("capget")
    words: tuple[int, ...] = _cap_words.unpack_from(data)
    return words[0] | words[3] << 32


def set_effective_capabilities(mask: int) -> int:
    """Set the effective capabilities of this thread, and tell those before: capset(2).

    The permitted and inheritable ones stay, so that it can be undone. EPERM: `mask` has more than the permitted ones.
    """
    before = effective_capabilities()
    capability_setter(mask)()
    return before


def capability_setter(mask: int) -> Callable[[], None]:
    """Make a function that sets the effective capabilities of the thread that calls it, by one capset(2).

    The permitted and inheritable ones are taken to be those of this thread now.
    """
    data = _CapData()
    if _capget(_CAP_HEADER, data):
        _fail("capget")
    words: tuple[int, ...] = _cap_words.unpack_from(data)
    wanted = _cap_words.pack(mask & 0xFFFFFFFF, *words[1:3], mask >> 32, *words[4:])

    def set_effective() -> None:
        if _capset(_CAP_HEADER, wanted):
            _fail("capset")

    return set_effective


def unshare_fs() -> None:
    """Give this thread a working directory, root and umask of its own: unshare(2) with CLONE_FS. Needs no privilege."""
    syscalls.unshare(CLONE_FS)


def _lock(what: str, fd: int, command: int, kind: int, start: int, end: int) -> bytes:
    number = errno.EINVAL  # for what cannot be put into a struct flock
    if 0 <= start <= end and start <= OFFSET_MAX:
        length = 0 if end >= OFFSET_MAX else end - start + 1
        try:
            return fcntl.fcntl(fd, command, _flock.pack(kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            number = error.errno or errno.EIO
    raise OSError(number, f"{what}: {os.strerror(number)}")


def ofd_setlk(fd: int, kind: int, start: int, end: int) -> None:
    """Lock or unlock bytes start..end (inclusive; OFFSET_MAX: all to come), without waiting: F_OFD_SETLK, fcntl(2).

    `kind` is fcntl.F_RDLCK, F_WRLCK or F_UNLCK. The lock belongs to the open file, not to the process. EAGAIN: another
    one holds a lock in the way.
    """
    _lock("F_OFD_SETLK", fd, fcntl.F_OFD_SETLK, kind, start, end)


def ofd_getlk(fd: int, kind: int, start: int, end: int) -> tuple[int, int, int, int]:
    """A lock in the way of the one asked for, as (kind, start, end, pid), or F_UNLCK if there is none: F_OFD_GETLK.

    pid is -1 if the lock is one of an open file, and 0 for a process of an outer PID namespace.
    """
    packed = _lock("F_OFD_GETLK", fd, fcntl.F_OFD_GETLK, kind, start, end)
    kind, _whence, start, length, pid = _flock.unpack(packed)
    return kind, start, start + length - 1 if length else OFFSET_MAX, pid


def inotify_init(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """A descriptor that tells of changes: inotify_init1(2). EMFILE: max_user_instances (inotify(7)) is reached."""
    fd: int = _inotify_init1(flags)
    if fd < 0:
        _fail("inotify_init1")
    return fd


def inotify_add_watch(fd: int, path: bytes, mask: int) -> int:
    """Watch an inode for IN_* and get the watch's number, the same for the same inode: inotify_add_watch(2).

    An O_PATH descriptor is watched by its path b"/proc/self/fd/N". ENOSPC: max_user_watches (inotify(7)) is reached;
    EACCES: it cannot be read.
    """
    watch: int = _inotify_add_watch(fd, path, ctypes.c_uint32(mask))
    if watch < 0:
        _fail("inotify_add_watch", path)
    return watch


def inotify_rm_watch(fd: int, watch: int) -> None:
    """End a watch; IN_IGNORED is its last event: inotify_rm_watch(2). EINVAL: the kernel has ended it before."""
    if _inotify_rm_watch(fd, watch):
        _fail("inotify_rm_watch")


def parse_inotify(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """What one read(2) of an inotify descriptor gave, as (watch, IN_* mask, cookie, name or b""): inotify(7).

    The watch is -1 for IN_Q_OVERFLOW: events were lost.
    """
    events = []
    place = 0
    while place < len(data):
        watch, mask, cookie, length = _inotify_event(data, place)
        place += 16
        events.append((watch, mask, cookie, data[place : place + length].rstrip(b"\0")))
        place += length
    return events
