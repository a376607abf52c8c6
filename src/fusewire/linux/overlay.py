"""The kernel's overlayfs over one of our mounts: does it work here, and mount it.

Layer: linux. It runs in the process that has a mount namespace of its own, and decides nothing: whoever calls `probe`
and is refused takes our own overlay (fs.overlay) and can tell the person why.

An unprivileged user has it with the option userxattr since Linux 5.11. What changes goes to an upper directory; a work
directory beside it, on the same filesystem, is the kernel's own. Both are here below one directory, DIR/upper and
DIR/work, so that DIR is all that a person has to name and DIR/upper is what he finds afterwards.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux import files, syscalls, userns
from fusewire.linux.mount_base import REFUSALS, RefusedError

_KIND = b"overlay"
_OPAQUE = b"user.overlay.opaque"
_SPECIAL = frozenset(b"\\,:\n")
_LONGEST = 1024  # bytes of a path in the options, which have one page (mount(2)) for three of them
_FIRST = (5, 11)  # the version of Linux that lets unprivileged users mount it

# <linux/magic.h>, and those that are not in it: to say on what it is that something does not work. The kernel refuses
# none of them by its type (Linux 5.7), and whether one has what it takes is a matter of its server and of its options.
_KNOWN = {
    0x65735546: "FUSE",
    0x6969: "NFS",
    0xFF534D42: "SMB",
    0xFE534D42: "SMB",
    0x01021997: "9p",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0xAAD7AAEA: "PanFS",
    0x19830326: "BeeGFS",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x4D44: "FAT",
    files.OVERLAYFS_SUPER_MAGIC: "overlayfs",
}
_ELSEWHERE = "name a directory on a local filesystem, such as ext4, xfs or btrfs"


def prepare(directory: bytes, mode: int = 0o755) -> tuple[bytes, bytes]:
    """Make DIR (its parent has to be there), DIR/upper and DIR/work where they are missing; give the last two.

    `mode` is that of a new DIR/upper, which is what the root of the overlay shows. Raises OSError that names the path.
    """
    upper, work = os.path.join(directory, b"upper"), os.path.join(directory, b"work")
    prepare_place(directory)
    _make(upper, mode)
    _make(work, 0o700)
    return upper, work


def prepare_place(directory: bytes) -> None:
    """Make DIR alone, if it is missing. Raises as `prepare` does."""
    _make(directory, 0o700, named=True)


def _make(path: bytes, mode: int, named: bool = False) -> None:
    """Make a directory if it is missing; only one that a person has `named` may be found through a symlink."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path) or (os.path.islink(path) and not named):
            raise NotADirectoryError(
                errno.ENOTDIR, "the place of an overlay has to be a directory", os.fsdecode(path)
            ) from None
    except OSError as error:
        raise OSError(
            error.errno, f"the directory of an overlay cannot be made: {error.strerror}", os.fsdecode(path)
        ) from error
    else:
        os.chmod(path, mode)


def claim(directory: bytes) -> int:
    """Lock DIR for one overlay at a time; give the descriptor that holds the lock (flock(2)) as long as it is open.

    -1 if the filesystem has no locks. Raises OSError(EBUSY) while another one uses it: two of them on one upper
    directory would each overwrite what the other one believes.
    """
    import fcntl

    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return -1
        raise OSError(
            errno.EBUSY,
            "another overlay keeps its changes there now: wait until it has ended, or name another directory",
            os.fsdecode(directory),
        ) from error
    return fd


def mount_tmpfs(target: bytes, size: bytes | None = None) -> None:
    """Mount a tmpfs for an overlay that is to be forgotten; `size` as in tmpfs(5), half of the memory without.

    It may be mounted where the lower mount will come: `prepare` there, keep descriptors of what it gives, and name
    them to `mount` by /proc/self/fd. Raises RefusedError.
    """
    data = b"mode=700" if size is None else b"mode=700,size=" + size
    try:
        syscalls.mount(b"tmpfs", target, b"tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, data)
    except OSError as error:
        if error.errno == errno.EINVAL:
            said = os.fsdecode(size or b"")
            raise RefusedError(errno.EINVAL, f"{said} is no size of a tmpfs", "say it as 512M, 2G or 30%") from error
        cause, remedy = userns.explain("mount", error.errno or errno.EIO)
        raise RefusedError(error.errno or errno.EIO, f"a tmpfs cannot be mounted: {cause}", remedy) from error


def mount(lower: bytes, upper: bytes, work: bytes, target: bytes, flags: int | None = None) -> None:
    """Mount an overlayfs at `target`, which may be `lower` itself. `flags`: MS_*, by default nosuid and nodev.

    Any path may have any name: one with a character that means something in the options is named by a descriptor.
    Raises RefusedError with the reason.
    """
    _mount(lower, upper, work, target, syscalls.MS_NOSUID | syscalls.MS_NODEV if flags is None else flags, upper)


def _mount(lower: bytes, upper: bytes, work: bytes, target: bytes, flags: int, named: bytes) -> None:
    """Mount; `named` is the directory to be named if that is refused."""
    opened: list[int] = []
    try:
        words = [
            key + _plain(path, opened)
            for key, path in ((b"lowerdir=", lower), (b"upperdir=", upper), (b"workdir=", work))
        ]
        try:
            syscalls.mount(_KIND, target, _KIND, flags, b",".join([*words, b"userxattr"]))
        except OSError as error:
            raise _explained(error, named) from error
    finally:
        for fd in opened:
            os.close(fd)


def _plain(path: bytes, opened: list[int]) -> bytes:
    """Give a path that needs no escapes, in which kernels differ."""
    if len(path) <= _LONGEST and not _SPECIAL.intersection(path):
        return path
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    opened.append(fd)
    return b"/proc/self/fd/%d" % fd


def probe(directory: bytes) -> None:
    """Find out whether the kernel's overlayfs works here with its changes in DIR, by using it in a corner of DIR.

    To be called in a process of one thread that may mount, in its own mount namespace. Raises RefusedError that says
    why not, OSError if DIR cannot be written to.
    """
    base = os.path.join(directory, b".probe-%d" % os.getpid())
    lower, upper, work = (os.path.join(base, name) for name in (b"lower", b"upper", b"work"))
    try:
        for path in (base, lower, os.path.join(lower, b"seen"), upper, work):
            os.mkdir(path, 0o700)
        _check_xattrs(upper, directory)
        _mount(lower, upper, work, lower, syscalls.MS_NOSUID | syscalls.MS_NODEV, directory)
        try:
            _use(lower, directory)
        finally:
            syscalls.umount2(lower, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    finally:
        remove(base)


def _place(path: bytes) -> str:
    """Name a directory, with its filesystem where that may be the reason."""
    name = os.fsdecode(path)
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return name
    try:
        kind = _KNOWN.get(files.filesystem_type(fd))
    finally:
        os.close(fd)
    return name if kind is None else f"{name}, which is on {kind},"


def _check_xattrs(path: bytes, directory: bytes) -> None:
    """Opaque directories take an attribute; without them the kernel mounts, warns, and fails at the first one."""
    try:
        os.setxattr(path, _OPAQUE, b"n")
        os.removexattr(path, _OPAQUE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            raise
        reason = f"{_place(directory)} has no extended attributes of users"
        raise RefusedError(errno.EOPNOTSUPP, reason, f"{_ELSEWHERE}, or a tmpfs since Linux 6.6") from error


def _use(place: bytes, directory: bytes) -> None:
    """Do what takes a whiteout, an opaque directory and a new file."""
    seen = os.path.join(place, b"seen")
    try:
        os.rmdir(seen)
        os.mkdir(seen)
        os.close(os.open(os.path.join(seen, b"file"), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        reason = f"with its changes in {_place(directory)} an overlayfs is mounted but not writable: {error.strerror}"
        raise RefusedError(error.errno or errno.EIO, reason, _ELSEWHERE) from error


def remove(path: bytes) -> None:
    """Remove a directory with all that is in it, also with the kernel's own directories of mode 0."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return
    except PermissionError:
        os.chmod(path, 0o700)
        names = os.listdir(path)
    for name in names:
        inner = os.path.join(path, name)
        if os.path.isdir(inner) and not os.path.islink(inner):
            remove(inner)
        else:
            os.unlink(inner)
    os.rmdir(path)


def _explained(error: OSError, named: bytes) -> OSError:
    number = error.errno or errno.EIO
    release = os.uname().release
    old = _version(release) < _FIRST
    if number == errno.ENODEV:
        return RefusedError(number, "this kernel has no overlayfs", "ask the administrator for `modprobe overlay`")
    if number in (errno.EPERM, errno.EINVAL) and old:
        reason = f"Linux {release} keeps overlayfs to the administrator; others have it since 5.11"
        return RefusedError(number, reason, "a newer kernel")
    place = _place(named)
    if number == errno.EBUSY:
        return RefusedError(
            number, f"another overlay uses {place} now", "wait until it has ended, or name another directory"
        )
    if number == errno.EINVAL:
        return RefusedError(number, f"{place} cannot take an overlay's changes", _ELSEWHERE)
    if number in REFUSALS and (userns.seccomp_filtered() or userns.apparmor_restricts()):
        cause, remedy = userns.explain("mount", number)
        return RefusedError(number, f"mount(2) of an overlayfs is refused: {cause}", remedy)
    reason = f"an overlayfs with its changes in {place} cannot be mounted: {os.strerror(number)}"
    return RefusedError(number, reason, _ELSEWHERE)


def _version(release: str) -> tuple[int, int]:
    parts = release.split(".")
    try:
        return int(parts[0]), int(parts[1].split("-")[0])
    except (ValueError, IndexError):
        return _FIRST  # a release that says nothing
