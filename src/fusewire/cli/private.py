"""The private directories of a user: where what is known of mounts and runs is noted.

Layer: cli. Whatever a path names later, a directory that has been checked is used by descriptor only.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

WAY_OUT = "set XDG_RUNTIME_DIR to a directory of yours (mode 700) that has room"
MADE = 0o1755  # the mode of a directory made to be mounted on, which tells at a glance what may be noted
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def roots(environ: Mapping[str, str]) -> list[str]:
    """Where this user's records are: the first is for new ones, all of them are searched.

    One user's shells do not all have the same XDG_RUNTIME_DIR: cron, su and ssh into a container have none.
    """
    uid = uid_outside()
    own = environ.get("XDG_RUNTIME_DIR", "")
    shared = f"/tmp/fusewire-{uid}"  # noqa: S108  checked whenever it is opened
    usual = f"/run/user/{uid}"
    first = [os.path.join(own, "fusewire")] if _is_ours(own) else []
    more = [os.path.join(usual, "fusewire")] if usual != own and _is_ours(usual) else []
    return [*first, shared, *more]


def uid_outside() -> int:
    """This user's id outside of the user namespace: root of one must not take the real root's directory for its own."""
    uid = os.geteuid()
    try:
        with open("/proc/self/uid_map", "rb") as file:
            for line in file:
                inside, outside, count = map(int, line.split())
                if inside <= uid < inside + count:
                    return outside + uid - inside
    except (OSError, ValueError):
        pass
    return uid


def _is_ours(path: str) -> bool:
    try:
        info = os.stat(path)
    except OSError:
        return False
    return path.startswith("/") and stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()


def open_root(path: str, make: bool = False) -> int:
    """A descriptor of a private directory: whatever the path names later, it stays the one that was checked."""
    if make:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise OSError(
                error.errno, f"cannot make a directory for the state of mounts: {error.strerror}; {WAY_OUT}", path
            ) from error
    try:
        fd = os.open(path, DIRECTORY)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = "it is a symlink" if os.path.islink(path) else str(error.strerror)
        raise _untrusted(error.errno or errno.EIO, reason, path) from error
    info = os.fstat(fd)
    refusal = ""
    if info.st_uid != os.geteuid():
        refusal = f"it belongs to user {info.st_uid}"
    elif info.st_mode & 0o077:
        refusal = f"others may get at it (mode {stat.S_IMODE(info.st_mode):03o})"
    if refusal:
        os.close(fd)
        raise _untrusted(errno.EPERM, refusal, path)
    return fd


def _untrusted(number: int, reason: str, path: str) -> OSError:
    return OSError(
        number, f"the directory for the state of mounts cannot be used: {reason}; remove it, or {WAY_OUT}", path
    )
