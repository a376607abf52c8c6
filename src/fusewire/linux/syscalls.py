"""Every ctypes call of the project: thin typed functions over system calls that the standard library lacks.

Layer: linux (bottom). It decides nothing and retries nothing; a call either works or raises OSError with errno, a
message that begins with the name of the call, and the path where there is one.

The C library's own function is used where every libc has it (glibc and musl export all of those named here), so no
table of call numbers is needed for them. The mount API of 2019 and later has wrappers only in glibc 2.36+; its
numbers (424 and above) are the same on x86_64, i386, arm, aarch64, riscv64, ppc64le, s390x and loongarch64, and
only alpha and mips shift them: there those calls answer ENOSYS, as on an old kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# <linux/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x00100000

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_EMPTY_PATH = 0x40
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_GET_DUMPABLE = 3
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

# <linux/capability.h>
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_SYS_CHROOT = 18
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21
CAP_MKNOD = 27
CAP_SETFCAP = 31
_CAPABILITY_VERSION_3 = 0x20080522

_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_MOUNT_SETATTR = 442
_NUMBERS_SHIFTED = os.uname().machine.startswith(("mips", "alpha"))

_libc = ctypes.CDLL(None, use_errno=True)
_int, _uint, _ulong, _str, _ptr = ctypes.c_int, ctypes.c_uint, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_void_p


def _call(name: str, *argtypes: type) -> ctypes._NamedFuncPointer:
    function = _libc[name]
    function.argtypes = argtypes
    function.restype = _int
    return function


_unshare = _call("unshare", _int)
_setns = _call("setns", _int, _int)
_mount = _call("mount", _str, _str, _str, _ulong, _str)
_umount2 = _call("umount2", _str, _int)
_prctl = _call("prctl", _int, _ulong, _ulong, _ulong, _ulong)


def _fail(what: str, path: bytes | None = None, detail: str = "") -> NoReturn:
    number = ctypes.get_errno()
    message = f"{what}: {detail or os.strerror(number)}"
    if path is None:
        raise OSError(number, message)
    raise OSError(number, message, os.fsdecode(path))


def _syscall(
    number: int, *args: int | bytes | ctypes.Array[ctypes.c_char] | ctypes._Pointer[ctypes.c_int] | None
) -> int:
    """One raw system call; every integer is passed in full register width, as syscall(2) wants it."""
    if _NUMBERS_SHIFTED:
        ctypes.set_errno(errno.ENOSYS)
        return -1
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return int(_libc.syscall(ctypes.c_long(number), *wide))


def unshare(flags: int) -> None:
    """Move this process into new namespaces: unshare(2). CLONE_NEWUSER needs a process of one thread."""
    if _unshare(flags):
        _fail("unshare")


def setns(fd: int, nstype: int) -> None:
    """Enter the namespace behind `fd`, or with a pidfd (Linux 5.8) all of `nstype`: setns(2)."""
    if _setns(fd, nstype):
        _fail("setns")


def mount(source: bytes | None, target: bytes, fstype: bytes | None, flags: int, data: bytes | None = None) -> None:
    """mount(2)."""
    if _mount(source, target, fstype, flags, data):
        _fail(f"mount {os.fsdecode(fstype or source or b'')}".rstrip(), target)


def umount2(target: bytes, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    if _umount2(target, flags):
        _fail("umount", target)


def pivot_root(new_root: bytes, put_old: bytes) -> None:
    """pivot_root(2)."""
    if _call("pivot_root", _str, _str)(new_root, put_old):
        _fail("pivot_root", new_root)


def _kernel_message(context: int) -> str:
    """What the kernel wrote to a filesystem context about the last failure: `e fuse: Bad value for 'fd'`.

    Each read(2) gives one message, ENODATA ends them (fsopen(2)).
    """
    reason = os.strerror(ctypes.get_errno())
    lines = []
    while True:
        try:
            line = os.read(context, 4096)
        except OSError:
            break
        lines.append(line[2:].decode(errors="replace").strip())
    return f"{reason} ({'; '.join(lines)})" if lines else reason


def fsopen(fstype: bytes, flags: int = FSOPEN_CLOEXEC) -> int:
    """Open a context for making a filesystem: fsopen(2), Linux 5.2."""
    fd = _syscall(_NR_FSOPEN, fstype, flags)
    if fd < 0:
        _fail(f"fsopen {os.fsdecode(fstype)}")
    return fd


def fsconfig_set_string(context: int, key: bytes, value: bytes) -> None:
    """Give one parameter with a value. `source` is one of them."""
    if _syscall(_NR_FSCONFIG, context, FSCONFIG_SET_STRING, key, value, 0):
        _fail(f"fsconfig {os.fsdecode(key)}={os.fsdecode(value)}", None, _kernel_message(context))


def fsconfig_set_flag(context: int, key: bytes) -> None:
    """Give one parameter without a value."""
    if _syscall(_NR_FSCONFIG, context, FSCONFIG_SET_FLAG, key, None, 0):
        _fail(f"fsconfig {os.fsdecode(key)}", None, _kernel_message(context))


def fsconfig_create(context: int) -> None:
    """Make the superblock."""
    if _syscall(_NR_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0):
        _fail("fsconfig create", None, _kernel_message(context))


def fsmount(context: int, flags: int = FSMOUNT_CLOEXEC, attributes: int = 0) -> int:
    """A detached mount of the context's superblock, as an O_PATH descriptor of its root."""
    fd = _syscall(_NR_FSMOUNT, context, flags, attributes)
    if fd < 0:
        _fail("fsmount", None, _kernel_message(context))
    return fd


def move_mount(from_dir: int, from_path: bytes, to_dir: int, to_path: bytes, flags: int) -> None:
    """Attach or move a mount: move_mount(2)."""
    if _syscall(_NR_MOVE_MOUNT, from_dir, from_path, to_dir, to_path, flags):
        _fail("move_mount", to_path)


def open_tree(directory: int, path: bytes, flags: int) -> int:
    """An O_PATH descriptor of a mount, or with OPEN_TREE_CLONE of a detached copy: open_tree(2)."""
    fd = _syscall(_NR_OPEN_TREE, directory, path, flags)
    if fd < 0:
        _fail("open_tree", path)
    return fd


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(
    directory: int,
    path: bytes,
    flags: int,
    attributes_set: int,
    attributes_clear: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """Change MOUNT_ATTR_* of a mount, with AT_RECURSIVE of all below it: mount_setattr(2), Linux 5.12."""
    attr = _MountAttr(attributes_set, attributes_clear, propagation, userns_fd)
    size = ctypes.sizeof(attr)
    raw = ctypes.create_string_buffer(bytes(attr), size)
    if _syscall(_NR_MOUNT_SETATTR, directory, path, flags, raw, size):
        _fail("mount_setattr", path)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2) for the options whose arguments are integers."""
    result = int(_prctl(option, arg2, arg3, arg4, arg5))
    if result < 0:
        _fail(f"prctl {option}")
    return result


def get_dumpable() -> int:
    """1 if other processes of this user may look into /proc/PID of this one: PR_GET_DUMPABLE."""
    return prctl(PR_GET_DUMPABLE)


def set_dumpable(value: bool = True) -> None:
    """PR_SET_DUMPABLE."""
    prctl(PR_SET_DUMPABLE, int(value))


def get_no_new_privs() -> bool:
    """True if no execve(2) can gain privileges any more, by set-user-ID bit or file capabilities."""
    return prctl(PR_GET_NO_NEW_PRIVS) == 1


def set_no_new_privs() -> None:
    """PR_SET_NO_NEW_PRIVS; there is no way back."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def capbset_drop(capability: int) -> None:
    """Take `capability` out of the bounding set; needs CAP_SETPCAP."""
    prctl(PR_CAPBSET_DROP, capability)


class Capabilities:
    """Capability sets as bit masks: bit CAP_X of a set."""

    __slots__ = ("effective", "inheritable", "permitted")

    def __init__(self, effective: int, permitted: int, inheritable: int) -> None:
        self.effective = effective
        self.permitted = permitted
        self.inheritable = inheritable

    def __repr__(self) -> str:
        return "Capabilities(" + ", ".join(f"{name}={getattr(self, name):#x}" for name in self.__slots__) + ")"


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def capget(pid: int = 0) -> Capabilities:
    """Effective, permitted and inheritable sets of a thread, 0 for this one: capget(2)."""
    header = _CapHeader(_CAPABILITY_VERSION_3, pid)
    data = (ctypes.c_uint32 * 6)()
    if _call("capget", _ptr, _ptr)(ctypes.byref(header), ctypes.byref(data)):
        _fail("capget")
    return Capabilities(data[0] | data[3] << 32, data[1] | data[4] << 32, data[2] | data[5] << 32)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the three sets of this thread: capset(2)."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    low = 0xFFFFFFFF
    data = (ctypes.c_uint32 * 6)(
        effective & low, permitted & low, inheritable & low, effective >> 32, permitted >> 32, inheritable >> 32
    )
    if _call("capset", _ptr, _ptr)(ctypes.byref(header), ctypes.byref(data)):
        _fail("capset")


def has_capability(capability: int) -> bool:
    """True if this thread has `capability` effective in its own user namespace (which need not be the first one)."""
    return bool(capget().effective >> capability & 1)


def signalfd(signals: Iterable[int]) -> int:
    """A descriptor that is readable while one of the signals, which must be blocked, is pending: signalfd(2)."""
    mask = sum(1 << number - 1 for number in signals)
    bits = 8 * ctypes.sizeof(_ulong)
    words = [mask >> first & (1 << bits) - 1 for first in range(0, 1024, bits)]  # sigset_t of glibc and musl
    fd = int(_call("signalfd", _int, _ptr, _int)(-1, (_ulong * len(words))(*words), os.O_CLOEXEC))
    if fd < 0:
        _fail("signalfd")
    return fd


def pidfd_open(pid: int) -> int:
    """A descriptor of a process, readable when it has ended: pidfd_open(2), Linux 5.3."""
    return os.pidfd_open(pid)


def pidfd_send_signal(pidfd: int, signum: int) -> None:
    """Signal exactly that process, never one that has got its pid since: pidfd_send_signal(2), Linux 5.1."""
    import signal  # enum makes it slow to load, and few need it

    signal.pidfd_send_signal(pidfd, signum)
