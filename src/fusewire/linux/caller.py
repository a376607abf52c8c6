"""Acting on host files as the process that asks: its groups, and this thread's ids while one request is served.

Layer: linux. Only the filesystem ids and the supplementary groups of the calling thread change (credentials(7)), never
those of the process: `os.setfsuid` does not exist and `os.setgroups` is for all threads.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux import files, syscalls
from fusewire.linux.userns import in_first_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_BOTH = 1 << syscalls.CAP_SETGID | 1 << syscalls.CAP_SETUID
_STATUS_SIZE = 16384  # bytes; what /proc/PID/status has without thousands of groups


def groups_of(pid: int) -> tuple[int, ...]:
    """The supplementary groups of a process or thread, from /proc/PID/status: proc_pid_status(5).

    () if there is no such process any more, or it cannot be seen from here (0 in a request of FUSE: it is outside of
    the server's PID namespace). A number that another process has got since is not noticed.
    """
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # gone, or /proc is mounted with hidepid
        return ()
    try:
        text = os.read(fd, _STATUS_SIZE)
        while (start := text.find(b"\nGroups:")) < 0 or (end := text.find(b"\n", start + 8)) < 0:
            more = os.read(fd, 1 << 20)
            if not more:
                return ()
            text += more
    except OSError:  # ESRCH: gone meanwhile
        return ()
    finally:
        os.close(fd)
    return tuple(map(int, text[start + 8 : end].split()))


def can_switch() -> bool:
    """True if AsCaller can act as somebody else: CAP_SETUID and CAP_SETGID, several ids in this user namespace, and
    setgroups(2) not denied there. In a namespace with a single id there is nobody else: user_namespaces(7).
    """
    if files.effective_capabilities() & _BOTH != _BOTH:
        return False
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/self/{name}", "rb") as lines:
                if sum(int(line.split()[2]) for line in lines) < 2:
                    return False
        with open("/proc/self/setgroups", "rb") as word:
            return word.read().strip() == b"allow"
    except FileNotFoundError:  # a kernel without user namespaces: all ids are there
        return True


def may_administer() -> bool:
    """True if this thread has CAP_SYS_ADMIN in the first user namespace: trusted xattrs and backing files need it."""
    return bool(files.effective_capabilities() >> syscalls.CAP_SYS_ADMIN & 1) and in_first_namespace()


class AsCaller:
    """One stay of one thread in the ids of somebody else; for many threads, or nested, it takes several.

        person = AsCaller()
        person.enter(uid, gid, groups)
        try:
            os.mkdir(...)
        finally:
            person.leave()

    `enter` either takes effect as a whole or raises with nothing changed, and `leave` brings back what was before, also
    from half way in. For the root user (id 0) the capabilities that override permissions (CAP_DAC_OVERRIDE,
    CAP_FOWNER, ...) are off meanwhile, and `leave` turns on again all of them that are permitted: who has dropped some
    of them in this thread drops them again. Another user keeps the capabilities that he has.
    A signal handler that raises may do so between `enter` and `try`: serve in threads other than the first.
    """

    __slots__ = ("_gid", "_groups", "_uid")

    def __init__(self) -> None:
        self._gid = -1  # what to go back to; -1 and None: nothing was changed
        self._groups: list[int] | None = None
        self._uid = -1

    def enter(self, uid: int, gid: int, groups: Iterable[int]) -> None:
        """Take on the filesystem group, the supplementary groups and the filesystem user, in this order.

        The user comes last because the way back needs no capability from him; group ids first take CAP_SETGID.
        Raises OSError: EPERM that names the id which the thread may not take on.
        """
        if self._gid >= 0 or self._groups is not None or self._uid >= 0:
            raise RuntimeError("AsCaller.enter: it has not left yet")
        done = False
        try:
            # What changes is remembered before, so that the way back is known at every moment.
            own = files.setfsgid(files.NO_ID)
            if gid != own:
                self._gid = own
                files.setfsgid(gid)
                if files.setfsgid(files.NO_ID) != gid:
                    raise _refused(f"group {gid}")
            wanted, here = sorted(groups), sorted(os.getgroups())
            if wanted != here:
                self._groups = here
                self._take_groups(wanted)
            own = files.setfsuid(files.NO_ID)
            if uid != own:
                self._uid = own
                files.setfsuid(uid)
                if files.setfsuid(files.NO_ID) != uid:
                    raise _refused(f"user {uid}")
            done = True
        finally:
            if not done:
                self.leave()

    def _take_groups(self, groups: list[int]) -> None:
        try:
            files.setgroups(groups)
        except OSError as error:
            self._groups = None  # nothing to undo, and no right to try
            if error.errno not in (errno.EPERM, errno.EINVAL):  # EINVAL: not in this user namespace
                raise
            raise _refused(f"the groups {groups}") from error

    def leave(self) -> None:
        """Go back to the ids before `enter`; without one it does nothing.

        Raises OSError: EPERM if the kernel has kept an id, which it does not for ids that this process has.
        """
        uid, self._uid = self._uid, -1
        groups, self._groups = self._groups, None
        gid, self._gid = self._gid, -1
        try:
            if uid >= 0:
                files.setfsuid(uid)
                if files.setfsuid(files.NO_ID) != uid:
                    raise _refused(f"its own user {uid} again")
        finally:
            try:
                if groups is not None:
                    files.setgroups(groups)
            finally:
                if gid >= 0:
                    files.setfsgid(gid)
                    if files.setfsgid(files.NO_ID) != gid:
                        raise _refused(f"its own group {gid} again")


def _refused(who: str) -> OSError:
    return OSError(
        errno.EPERM,
        f"this thread may not take on {who}: it needs CAP_SETUID and CAP_SETGID, and the id in its user namespace",
    )
