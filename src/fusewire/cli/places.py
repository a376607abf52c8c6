"""Directories that runs have made on the host for their mount points: how they are noted, and how they go again.

Layer: cli. A directory is noted in a private directory of the user's by a symlink, `made-DEVICE-INODE` -> path, which
is made and read in one step. It is ours as long as path, device, inode and mode agree with that: a directory that the
user has made at the same place since, even with the same inode number, has another mode. Any run of the user may find
it so: the last one that uses it, or a later one where a run was killed with all its processes.

Nothing is removed that is not empty, or that a run holds the lock of (see run.py).
"""

from __future__ import annotations

import os
import stat
import time

from fusewire.cli import private
from fusewire.cli.private import MADE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "made-"
_REMOTE = (b"fuse", b"nfs", b"cifs", b"smb", b"9p", b"virtiofs", b"ceph", b"autofs")


def note(path: bytes, environ: Mapping[str, str]) -> None:
    """Give a directory that this run has just made its mode, whatever the umask, and note it if that is possible.

    Raises FileNotFoundError if it has been removed meanwhile.
    """
    os.chmod(path, MADE)
    name = _name(os.lstat(path))
    for root in private.roots(environ):
        for _ in range(100):
            try:
                directory = private.open_root(root, make=True)
            except OSError:
                break
            try:
                _lock(directory)
                _forget(name, directory)  # an older directory had that number
                os.symlink(path, name, dir_fd=directory)
                return
            except FileNotFoundError:  # the last one who had noted something there has just removed it
                continue
            except OSError:
                break
            finally:
                os.close(directory)


def left_over(environ: Mapping[str, str]) -> list[bytes]:
    """The directories that runs have made, that are empty, and that no run uses any more.

    What lies on a filesystem that may hang is left out.
    """
    from fusewire.linux import mountinfo

    found = []
    for root in private.roots(environ):
        try:
            directory = private.open_root(root)
        except OSError:
            continue
        try:
            for path, name in _notes(directory):
                below = mountinfo.holding(path)
                if below is not None and not below.fstype.startswith(_REMOTE) and _is_left(path, name):
                    found.append(path)
        finally:
            os.close(directory)
    return found


def sweep(environ: Mapping[str, str]) -> None:
    """Remove all that runs have made and that no run uses any more, and the notes of what is gone."""
    for root in private.roots(environ):
        try:
            directory = private.open_root(root)
        except OSError:  # there is none; or it is not to be trusted
            continue
        try:
            _lock(directory)
            for path, name in _notes(directory):
                if remove(path, name):
                    _forget(name, directory)
        finally:
            os.close(directory)
        try:
            os.rmdir(root)  # it was made for notes, unless something else is in it
        except OSError:
            continue


def remove(path: bytes, name: str | None = None) -> bool:
    """Remove a directory that a run has made if it is empty and not in use; True if it is gone, or is another one now.

    name: that of its note, where it has one; else the caller knows that this run was about to make it.
    """
    import fcntl

    fds: list[int] = []
    last = os.path.basename(path)
    try:
        parent = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        fds.append(parent)
        if os.readlink(b"/proc/self/fd/%d" % parent) != os.path.dirname(path):
            return True
        fds.append(os.open(last, private.DIRECTORY, dir_fd=parent))
        info = os.fstat(fds[1])
        if name not in (None, _name(info)):
            return True
        if not (_is_marked(info) if name else info.st_mode & stat.S_ISVTX and info.st_uid == os.geteuid()):
            return False
        fcntl.flock(fds[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rmdir(last, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    finally:
        for fd in fds:
            os.close(fd)
    return True


def _name(info: os.stat_result) -> str:
    return f"{PREFIX}{info.st_dev:x}-{info.st_ino:x}"


def _is_marked(info: os.stat_result) -> bool:
    return stat.S_ISDIR(info.st_mode) and stat.S_IMODE(info.st_mode) == MADE and info.st_uid == os.geteuid()


def _is_left(path: bytes, name: str) -> bool:
    import fcntl

    try:
        fd = os.open(path, private.DIRECTORY)
    except OSError:
        return False
    try:
        info = os.fstat(fd)
        if not _is_marked(info) or name != _name(info) or os.listdir(fd):
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _notes(directory: int) -> list[tuple[bytes, str]]:
    """What is noted in a private directory, as (path, name of the note): what is in a directory before that."""
    found = []
    for name in os.listdir(directory):
        if name.startswith(PREFIX):
            try:
                found.append((os.fsencode(os.readlink(name, dir_fd=directory)), name))
            except OSError:
                continue
    return sorted(found, key=lambda note: len(note[0]), reverse=True)


def _forget(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def _lock(directory: int) -> None:
    """Have this private directory's notes for ourselves until it is closed; go on without, if its holder hangs."""
    import fcntl

    for _ in range(200):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:  # a filesystem without locks
            return
