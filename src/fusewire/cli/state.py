"""What is known of mounts that live in the background.

Layer: cli. One directory per mount, `<root>/<id>/`, with state.json, control.sock and `mnt`, an empty directory to
mount on privately. Nothing here looks into a mount or waits for one; nothing follows a symlink below the root, and
nothing that is not ours is removed. json and threading are loaded where they are needed, as `run` needs neither.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from fusewire.cli import private
from fusewire.linux import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

VERSION = 1
STATE = "state.json"
SOCKET = "control.sock"
MOUNT_POINT = "mnt"
_OURS = (SOCKET, STATE)  # and the temporary files of STATE
_NOTE = "made-"  # the notes of runs are beside the records: places.py
_LARGEST = 1 << 20

_TEXT = (str, type(None))
_DICT = (dict, type(None))
# What state.json holds: the types that JSON may have for a field, and its value when a record is begun.
_FIELDS: dict[str, tuple[tuple[type, ...], Any]] = {
    "id": ((str,), ""),
    "source": ((str,), ""),
    "target": (_TEXT, None),
    "strategy": ((str,), ""),
    "pid": ((int,), 0),
    "starttime": ((int,), 0),
    "pidns": ((int,), 0),
    "outside": (_TEXT, None),
    "inside": (_TEXT, None),
    "options": ((list,), ()),
    "created": (_DICT, None),
    "mount": (_DICT, None),
    "mounted_at": ((int, float), 0.0),
    "fstype": ((str,), "fuse.fusewire"),
    "server": ((int,), 0),
    "sandbox": ((str,), ""),
}


class Record:
    """One mount. Paths are absolute; `mounted_at` is seconds since the epoch, `starttime` clock ticks since boot.

    created: what was at the target before, {"place": its path without symlinks, "parent": the identity of the
    directory that it is in, "kind": "missing" | "empty-directory", "mode": int | None, "aside": the name by which an
    empty directory is kept while a link is in its place, "mount_id": of what was mounted there, or None}. mount: what
    `fusewire.linux.mount.clean_up` needs when the holder is dead. pid: the process that holds the mount; pidns: the PID
    namespace that this is a number of. server: the process that answers requests, and `sandbox` how it is locked in.
    directory: where this record lives; it is not written into it.
    """

    __slots__ = (*_FIELDS, "directory")
    id: str
    source: str
    target: str | None
    strategy: str
    pid: int
    starttime: int
    pidns: int
    outside: str | None
    inside: str | None
    options: list[str]
    created: dict[str, Any] | None
    mount: dict[str, Any] | None
    mounted_at: float
    fstype: str
    server: int
    sandbox: str

    def __init__(self, directory: str, **fields: Any) -> None:
        """Make a record of the named fields. Raises TypeError for a name that is none."""
        if unknown := fields.keys() - _FIELDS.keys():
            raise TypeError(f"a record has no {', '.join(sorted(unknown))}")
        for name, (_, default) in _FIELDS.items():
            setattr(self, name, fields.get(name, default))
        self.options = list(self.options)
        self.directory = directory

    @property
    def control(self) -> str:
        """The path of the control socket."""
        return os.path.join(self.directory, SOCKET)

    @property
    def mount_point(self) -> str:
        """The private mount point."""
        return os.path.join(self.directory, MOUNT_POINT)

    def served_by(self, pid: int) -> None:
        """Note the process that serves this mount. Raises ProcessLookupError if it has ended."""
        start = process.start_time(pid)
        if start is None:
            raise ProcessLookupError(errno.ESRCH, f"the server process {pid} has ended")
        self.pid, self.starttime, self.pidns = pid, start, _pid_namespace()

    def as_dict(self) -> dict[str, Any]:
        """What state.json holds."""
        return {"version": VERSION} | {name: getattr(self, name) for name in _FIELDS}

    def __repr__(self) -> str:
        return "Record(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__) + ")"


class Problem:
    """A directory below the root that holds no readable record: left by a crash, or by another version."""

    __slots__ = ("directory", "id", "reason")

    def __init__(self, name: str, directory: str, reason: str) -> None:
        self.id = name
        self.directory = directory
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.directory}: {self.reason}"


def place(path: str) -> str:
    """The absolute path of a name whose parent is resolved: the name itself may be a dangling symlink, or hang.

    Raises FileNotFoundError if it is relative and the working directory has no path.
    """
    try:
        path = path if path.startswith("/") else os.path.join(os.getcwd(), path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "the working directory has no path from here (getcwd(2)): give an absolute path", path
        ) from error
    path = path.rstrip("/") or "/"
    parent, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent), name)


def alive(record: Record) -> bool:
    """False if the server is surely dead. A pid of another PID namespace says nothing: there the socket is asked."""
    if not is_near(record):
        try:
            from fusewire.cli import control

            control.connect(record.control).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True
    return record.pid > 0 and process.is_alive(record.pid, record.starttime)


def is_near(record: Record) -> bool:
    """Tell whether `pid` of a record is a number of this process's PID namespace, so that it names the server here."""
    return not record.pidns or record.pidns == _pid_namespace()


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class Store:
    """The records of one user. `roots` are directories; the first is for new records and is made when needed."""

    __slots__ = ("roots",)

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = list(roots)

    def create(self, source: str, target: str | None, **fields: Any) -> Record:
        """Make a directory and a record for a mount that is about to be, in the name of this process.

        Raises OSError that names the directory and the way out; nothing is left behind then.
        """
        path = self.roots[0]
        root = private.open_root(path, make=True)
        name = ""
        lock: int | None = None
        try:
            while not name:
                name = "m" + os.urandom(4).hex()
                try:
                    os.mkdir(name, 0o700, dir_fd=root)
                    lock = _lock(root, name)
                except FileExistsError:
                    name = ""
                except FileNotFoundError:  # a run that had noted something there has just removed it
                    name = ""
                    os.close(root)
                    root = private.open_root(path, make=True)
            os.mkdir(f"{name}/{MOUNT_POINT}", 0o700, dir_fd=root)
            fields = {"source": source, "mounted_at": time.time()} | fields
            fields["target"] = None if target is None else place(target)
            record = Record(os.path.join(path, name), id=name, **fields)
            record.served_by(os.getpid())
            _write(root, record)
        except OSError as error:
            if name:
                _clear(root, name)
            raise OSError(error.errno, f"cannot note the mount: {error.strerror}; {private.WAY_OUT}", path) from error
        finally:
            os.close(root)
            if lock is not None:
                os.close(lock)
        return record

    def save(self, record: Record) -> None:
        """Write a record in one step: who reads meanwhile sees the old one or the new one.

        Raises OSError that names the directory and the way out; the old record is still there then.
        """
        root = private.open_root(os.path.dirname(record.directory))
        try:
            _write(root, record)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot note the mount: {error.strerror}; {private.WAY_OUT}", record.directory
            ) from error
        finally:
            os.close(root)

    def load_all(self) -> tuple[list[Record], list[Problem]]:
        """All records, the oldest mount first, and what could not be read.

        Raises OSError if the first root is not a private directory of this user.
        """
        records: list[Record] = []
        problems: list[Problem] = []
        for path in self.roots:
            try:
                root = private.open_root(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                if path == self.roots[0]:
                    raise
                # Somebody else's /tmp/fusewire-UID must not stand in the way of who has a directory of his own: no
                # record of ours can be there.
                if os.lstat(path).st_uid == os.geteuid():
                    problems.append(Problem(os.path.basename(path), path, str(error.strerror)))
                continue
            try:
                for name in sorted(os.listdir(root)):
                    if name.startswith(_NOTE):
                        continue
                    directory = os.path.join(path, name)
                    try:
                        records.append(_read(root, name, directory))
                    except FileNotFoundError:
                        if not _clear_abandoned(root, name):
                            problems.append(Problem(name, directory, f"has no {STATE}"))
                    except (OSError, ValueError) as error:
                        problems.append(Problem(name, directory, str(getattr(error, "strerror", None) or error)))
            finally:
                os.close(root)
        records.sort(key=lambda record: record.mounted_at)
        return records, problems

    def find(self, name: str) -> Record | None:
        """The record of a mount named by its target (or a path that leads there), its id, or its server's pid.

        The target is compared by name and never looked at. Of several a living one comes first, then the newest.
        """
        records = self.load_all()[0]
        found = [r for r in records if r.id == name or (name.isdecimal() and r.pid == int(name))]
        if not (found and "/" not in name and not os.path.lexists(name)):
            path = place(name)
            found = [r for r in records if path in (r.target, r.outside, r.inside)] or found
        return max(found, key=lambda r: (alive(r), r.mounted_at), default=None)

    def remove(self, record: Record | Problem) -> None:
        """Remove a record's directory with what we put there.

        Raises OSError: EBUSY if something is still mounted on its `mnt`, ENOTEMPTY if somebody else put files there.
        """
        directory, name = os.path.split(record.directory)
        root = private.open_root(directory)
        try:
            _remove(root, name)
        except FileNotFoundError:
            return
        except OSError as error:
            reasons = {
                errno.EBUSY: f"something is still mounted on {MOUNT_POINT} in it, unmount that first",
                errno.ENOTEMPTY: "files that are not Fusewire's are in it, move them away",
            }
            reason = reasons.get(error.errno or 0, str(error.strerror))
            raise OSError(error.errno, f"cannot remove the state of a mount: {reason}", record.directory) from error
        finally:
            os.close(root)


def of_user(environ: Mapping[str, str]) -> Store:
    """The store of this user: $XDG_RUNTIME_DIR/fusewire if that names a directory of the user, else in /tmp."""
    return Store(private.roots(environ))


def _write(root: int, record: Record) -> None:
    import json

    data = memoryview(json.dumps(_converted(record.as_dict(), _as_utf8), indent=1).encode() + b"\n")
    directory = os.open(record.id, private.DIRECTORY, dir_fd=root)
    temporary = f"{STATE}.{os.urandom(4).hex()}"
    try:
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory
        )
        done = False
        try:
            try:
                while data:
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)
            os.rename(temporary, STATE, src_dir_fd=directory, dst_dir_fd=directory)
            done = True
        finally:
            if not done:
                os.unlink(temporary, dir_fd=directory)
    finally:
        os.close(directory)


def _converted(value: Any, convert: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, list):
        return [_converted(item, convert) for item in value]
    return {key: _converted(item, convert) for key, item in value.items()} if isinstance(value, dict) else value


def _as_utf8(text: str) -> str:
    """A path as every locale finds it again: what is a letter in one is two stray bytes in another."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def _as_here(text: str) -> str:
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _lock(root: int, name: str) -> int | None:
    """The lock on a directory in which there is no record yet, held by who makes one; None if somebody else has it."""
    import fcntl

    fd = os.open(name, private.DIRECTORY, dir_fd=root)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:  # a filesystem without locks
        pass
    return fd


def _clear_abandoned(root: int, name: str) -> bool:
    """Remove a directory whose maker died before it wrote a record; False if something else is in it.

    One that is being made just now, or has been removed already, is none.
    """
    if len(name) != 9 or name[0] != "m" or name[1:].strip("0123456789abcdef"):
        return False  # no name that we give
    try:
        lock = _lock(root, name)
    except FileNotFoundError:
        return True
    if lock is None:
        return True
    try:
        if STATE not in os.listdir(lock):  # else it has been written since we looked
            _remove(root, name)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _read(root: int, name: str, path: str) -> Record:
    """One record. Raises OSError, or ValueError that says what is wrong with it."""
    import json

    directory = os.open(name, private.DIRECTORY, dir_fd=root)
    try:
        fd = os.open(STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST:
                raise ValueError(f"its {STATE} is not a file of ours")
            text = b"".join(iter(lambda: os.read(fd, _LARGEST), b""))
        finally:
            os.close(fd)
    finally:
        os.close(directory)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its {STATE} is damaged or half written") from None
    if not isinstance(found, dict):
        raise ValueError(f"its {STATE} is not a record")
    if found.get("version") != VERSION:
        raise ValueError(f"written by another version of Fusewire (format {found.get('version')!r}, ours is {VERSION})")
    fields = {key: _converted(value, _as_here) for key, value in found.items() if key in _FIELDS}
    for key, value in fields.items():
        if not isinstance(value, _FIELDS[key][0]) or isinstance(value, bool):
            raise ValueError(f"its {STATE} is damaged: {key} is {value!r}")
    if fields.get("id") != name or not all(isinstance(option, str) for option in fields.get("options", ())):
        raise ValueError(f"its {STATE} is damaged: it is not the record of {name}")
    return Record(path, **fields)


def _remove(root: int, name: str) -> None:
    directory = os.open(name, private.DIRECTORY, dir_fd=root)
    try:
        if os.fstat(directory).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is not ours")
        try:
            os.rmdir(MOUNT_POINT, dir_fd=directory)  # refused with EBUSY while something is mounted there
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            raise OSError(errno.ENOTEMPTY, "a file is in the place of its mount point") from None
        for entry in os.listdir(directory):
            if entry in _OURS or entry.startswith(STATE + "."):
                os.unlink(entry, dir_fd=directory)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=root)


def _clear(root: int, name: str) -> None:
    try:
        _remove(root, name)
    except OSError:  # the error that made us clear up is the one to tell
        return
