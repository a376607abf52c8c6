"""fusermount3 and fusermount: the set-user-ID helpers that mount for a user, spoken to as libfuse does.

Layer: linux. It knows the programs, their option string and their socket; what a mount is, mount.py knows.

The protocol: one end of an AF_UNIX socket pair is inherited by the helper and named in `_FUSE_COMMFD`; the helper
mounts, and sends the /dev/fuse descriptor back with one byte (SCM_RIGHTS). With `auto_unmount` it then stays, and
unmounts a dead mount when the other end of the socket is closed, by whatever death.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import process, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("fusermount3", "fusermount")
_SIGPIPE = 13
_CAPABILITY_XATTR = "security.capability"
_ST_NOSUID = 2
_MTAB = "/etc/mtab"  # getmntent(3); a link to /proc/self/mounts on all but the barest systems

# What the helper prints -> what to do. First match counts.
_REMEDIES = (
    ("mounting over filesystem type", "choose a mount point on another filesystem ($XDG_RUNTIME_DIR or /tmp)"),
    ("user_allow_other", "leave out allow_other, or ask for the line `user_allow_other` in /etc/fuse.conf"),
    ("too many FUSE filesystems", "unmount some, or ask for a larger `mount_max` in /etc/fuse.conf"),
    ("user has no write access to mountpoint", "choose a mount point that you own"),
    ("not owned by user", "choose a mount point that you own"),
    ("fuse device not found", "ask the administrator for `modprobe fuse`"),
    ("Device or resource busy", "close what is open there, or unmount lazily"),
    (
        "mount failed: Permission denied",
        (
            "this is AppArmor (Ubuntu 25.04 and later allow mount points below your home, /tmp, /mnt, /media and "
            "$XDG_RUNTIME_DIR only): choose one of those, or extend /etc/apparmor.d/local/fusermount3"
        ),
    ),
    ("Permission denied", "choose a mount point that you own"),
    ("Operation not permitted", "see whether this is a container without the set-user-ID helper's privileges"),
)


class HelperError(OSError):
    """The helper cannot be used or has refused. `strerror` says why, `remedy` what to do about it."""

    def __init__(self, number: int, reason: str, remedy: str) -> None:
        super().__init__(number, reason)
        self.remedy = remedy


def find(program: str | None = None) -> list[str]:
    """The helpers to try in order: `program` alone if it is given, else fusermount3 and fusermount in PATH.

    Only the directory entry is looked at: a helper is often executable without being readable.
    """
    if program is not None:
        return [program]
    found = []
    for name in NAMES:
        for directory in (*os.get_exec_path(), "/usr/bin", "/bin", "/usr/local/bin"):
            path = os.path.join(directory, name)
            if os.path.isfile(path):
                found.append(path)
                break
    return found


def check(program: str) -> None:
    """Raise HelperError if this helper cannot mount for us: no set-user-ID root, or nothing would come of it."""
    info = os.stat(program)
    if os.geteuid() == 0:
        return
    if not os.path.exists(_MTAB):
        # It would mount, and then refuse to unmount.
        raise HelperError(
            errno.ENOENT,
            f"there is no {_MTAB}, without which {program} cannot unmount",
            f"ask the administrator for `ln -s ../proc/self/mounts {_MTAB}`",
        )
    if not (info.st_mode & stat.S_ISUID and info.st_uid == 0) and not _has_file_capabilities(program):
        raise HelperError(
            errno.EPERM,
            f"{program} is not set-user-ID root",
            f"ask the administrator for `chmod u+s {program}`",
        )
    if syscalls.get_no_new_privs():
        raise HelperError(
            errno.EPERM,
            "no_new_privs is set, a set-user-ID helper gains nothing",
            "start from a process without no_new_privs (containers: allowPrivilegeEscalation)",
        )
    if os.statvfs(program).f_flag & _ST_NOSUID:
        raise HelperError(
            errno.EPERM,
            f"{program} is on a filesystem mounted nosuid",
            "use a helper that is installed on the system itself",
        )


def _has_file_capabilities(program: str) -> bool:
    try:
        return bool(os.getxattr(program, _CAPABILITY_XATTR))
    except OSError:
        return False


def user_allow_other() -> bool:
    """True if /etc/fuse.conf lets users mount with allow_other."""
    try:
        with open("/etc/fuse.conf", "rb") as conf:
            return any(line.strip() == b"user_allow_other" for line in conf)
    except OSError:
        return False


def escape(value: bytes) -> bytes:
    """A value inside an option string: the helper takes commas and backslashes for its own unless escaped."""
    return value.replace(b"\\", b"\\\\").replace(b",", b"\\,")


def mount(program: str, target: bytes, options: bytes, stay: bool = False) -> tuple[int, int, int]:
    """Have the helper mount on `target`: the /dev/fuse descriptor, and with `stay` its pid and the socket, else -1.

    `stay` goes with `auto_unmount` in `options`: the helper lives until the socket is closed everywhere.

    Raises HelperError with what the helper printed.
    """
    ours, theirs = process.socket_pair()
    complaints = -1
    fds: list[int] = []
    pid = -1
    done = False
    try:
        pid, complaints = _start(program, [b"-o", options, b"--", target], theirs)
        os.close(theirs)
        theirs = -1
        fds = process.recv_fds(ours)[1]
        if len(fds) != 1:
            printed = _printed(complaints)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            pid = -1
            raise _refused(program, target, printed or f"it ended with status {code} and sent no descriptor")
        fd = process.above_stdio(fds[0])
        if stay:
            done = True
            return fd, pid, ours
        os.waitpid(pid, 0)
        done = True
        return fd, -1, -1
    finally:
        if not (stay and done):
            os.close(ours)  # also ends a helper that stays
        for other in (theirs, complaints):
            if other >= 0:
                os.close(other)
        if not done:
            for fd in fds:
                os.close(fd)
            if pid >= 0:
                os.waitpid(pid, 0)


def unmount(program: str, target: bytes, lazy: bool = False) -> None:
    """Have the helper unmount `target`, which it does for the user who owns the mount.

    Raises HelperError: EBUSY if something is open there and `lazy` is False, else EPERM, with what it printed.
    """
    pid, complaints = _start(program, [b"-u", *([b"-z"] if lazy else []), b"--", target], -1)
    try:
        printed = _printed(complaints)
    finally:
        os.close(complaints)
        status = os.waitpid(pid, 0)[1]
    if status:
        raise _refused(program, target, printed or f"it ended with status {os.waitstatus_to_exitcode(status)}")


def _refused(program: str, target: bytes, printed: str) -> HelperError:
    number = errno.EBUSY if "Device or resource busy" in printed else errno.EPERM
    remedy = next((text for part, text in _REMEDIES if part in printed), "")
    return HelperError(number, f"{program} on {os.fsdecode(target)}: {printed}", remedy)


def _start(program: str, arguments: Sequence[bytes], comm: int) -> tuple[int, int]:
    """Start the helper: its pid, and where it complains.

    It gets /dev/null, that pipe as stdout and stderr, the socket `comm`, and nothing else: a helper that stays would
    keep every other descriptor open. All descriptors handed over are above 2 here, so none overwrites another.
    """
    reader, writer = (process.above_stdio(fd) for fd in os.pipe())
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_CLOSE, fd) for fd in process.open_fds() if fd > 2 and _inheritable(fd)
    ]
    actions += [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, writer, 1),
        (os.POSIX_SPAWN_DUP2, writer, 2),
    ]
    environment = dict(os.environb)
    environment.pop(b"_FUSE_COMMFD2", None)
    if comm >= 0:
        inherited = 4 if comm == 3 else 3  # a dup2(2) onto itself would leave it close-on-exec
        actions.append((os.POSIX_SPAWN_DUP2, comm, inherited))
        environment[b"_FUSE_COMMFD"] = b"%d" % inherited
    try:
        pid = os.posix_spawn(
            program,
            [os.fsencode(os.path.basename(program)), *arguments],
            environment,
            file_actions=actions,
            setsigmask=(),
            setsigdef=(_SIGPIPE,),
        )
    except OSError as error:
        os.close(reader)
        raise HelperError(
            error.errno or errno.EPERM,
            f"{program} does not run: {error.strerror}",
            "install fuse3, or name a helper that runs in FUSERMOUNT_PROG",
        ) from error
    finally:
        os.close(writer)
    return pid, reader


def _inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # the one that listed the directory
        return False


def _printed(fd: int) -> str:
    text = process.read_all(fd).decode(errors="replace").strip()
    return text.removeprefix("fusermount3: ").removeprefix("fusermount: ")
