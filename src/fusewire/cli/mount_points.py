"""Mount points of `run` on the host: made, noted, claimed while they are in use, removed by the last who uses them.

Layer `cli`. Runs at the same time may well share one: rmdir(2) would take it away from the others too, for since Linux
3.18 it detaches what is mounted there in other namespaces (mount_namespaces(7)). So whoever mounts on a directory holds
a shared flock(2) on it, and only one who gets it exclusively removes it. That is the last one, who need not have made
it: what some run has made is noted where each run of the user finds it (places.py).
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.cli.private import MADE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.linux.shadow import Shadow


def announce(complain: int, directory: bytes) -> None:
    """Tell the supervisor what is about to be made: it may have to end us before that is noted, or could be."""
    from fusewire.cli import places  # noqa: F401 - loaded now, so that as little as possible comes in between

    os.write(complain, b"M" + directory + b"\0")


def make(places: Shadow, target: bytes) -> bytes:
    """Make a mount point and note what was made on the host for it; other runs may remove parts of it meanwhile."""
    noted = len(places.made)  # they may be covered by a mount of ours by now; what is made anew comes first
    for _ in range(100):
        try:
            path = places.make(target)
        except FileNotFoundError:
            continue
        for directory in places.made[: len(places.made) - noted]:
            from fusewire.cli.places import note

            try:
                note(directory, os.environ)
            except FileNotFoundError:
                continue
        return path
    raise FileNotFoundError(errno.ENOENT, "other runs keep removing the mount point", target)


def claim(places: Shadow, target: bytes, nested: bool) -> tuple[bytes, list[int]]:
    """Make a mount point that will stay as long as it is needed: its path, and the descriptor that holds its lock.

    None is held if the filesystem has no locks (then nobody removes the directory), or on a directory of another of
    our mounts: the server must never have a file of its own open.
    """
    import fcntl

    for _ in range(100):  # another run may remove it at any moment until the lock is ours
        path = make(places, target)
        try:
            if nested:
                return path, []
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except PermissionError:
            return path, []
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return path, [fd]
        except FileNotFoundError:
            pass
        except OSError:
            os.close(fd)
            return path, []
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "other runs keep removing the mount point", target)


def remove(targets: list[str], made: list[bytes]) -> None:
    """Remove what runs have made for mount points at these targets, where it is empty and no other run uses it.

    made: what this run was about to make.
    """
    if made or any(_is_marked(target) for target in targets):
        from fusewire.cli import places

        places.sweep(os.environ)
        for directory in sorted(made, key=len, reverse=True):  # what was not noted, for whatever reason
            places.remove(directory)


def _is_marked(target: str) -> bool:
    """Tell whether a run has made a mount point, or as much of its path as is there."""
    path = os.path.realpath(os.fsencode(target))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    try:
        return stat.S_IMODE(os.lstat(path).st_mode) == MADE
    except OSError:  # removed by another run this moment, or not to be seen
        return False
