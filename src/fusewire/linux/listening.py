"""Listening AF_UNIX sockets that one daemon at a time holds: a lock file beside the path, stale ones cleared away.

Layer: linux (bottom). It speaks no protocol and keeps no clients. Abstract addresses are not offered: whoever knows
one may connect, for they have no permission bits.

Three rules. Whatever is found at a path stays unless it is a socket that nobody has bound any more. Nobody can connect
before group and mode are those asked for: the socket listens only then, and is made with the descriptor's mode, which
bind(2) takes over, so that the process's umask is never changed. And what is removed at the end is what was made here,
by device and inode, not by name.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import files, process

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Self

    Identity = tuple[int, int]

_SUN_PATH = 107  # bytes of sockaddr_un.sun_path, unix(7), without the NUL that ends it
_PID_LENGTH = 32


class Place:
    """A name in a directory that is held by descriptor: it stays that name there, whatever the path leads to later."""

    __slots__ = ("directory", "name", "path")

    def __init__(self, path: str, what: str) -> None:
        """Open the directory. `what` is for messages. Raises OSError that says what is wrong with the path."""
        above, self.name = os.path.split(path)
        self.path = path
        if self.name in ("", ".", "..") or "\0" in path:
            raise OSError(errno.EINVAL, f"{path!r} names no {what}: give a file name in an existing directory")
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self.directory = process.above_stdio(os.open(above or ".", flags))
        except OSError as error:
            raise OSError(
                error.errno, f"cannot put the {what} {path} into {above or '.'}: {error.strerror}; make it first"
            ) from error

    def close(self) -> None:
        """Let go of the directory."""
        if self.directory >= 0:
            os.close(self.directory)
            self.directory = -1

    def stat(self) -> os.stat_result | None:
        """What is there now, not followed if it is a symlink; None for nothing."""
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def is_still(self, identity: Identity) -> bool:
        """True if the name still leads to that device and inode."""
        found = self.stat()
        return found is not None and _identity(found) == identity

    def remove(self, identity: Identity) -> None:
        """Remove the name if it still leads there. Another's file of that name stays."""
        try:
            if self.is_still(identity):
                os.unlink(self.name, dir_fd=self.directory)
        except OSError:
            return  # the directory has become unwritable: whoever comes next finds it stale


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino


class PidFile:
    """A file with this process's id, locked as long as it is held: one holder at a time.

    The lock is one of the open file (F_OFD_SETLK, fcntl(2)), which conflicts with those of lockf(3) that other daemons
    take. It ends with the last copy of the descriptor, so also when the process is killed.
    """

    __slots__ = ("_fd", "_guarded", "_identity", "_place", "path")

    def __init__(self, path: str, guarded: str = "") -> None:
        """Make the file or take it over, lock it, write the id. `guarded`: the path of what the lock is for.

        Raises OSError: EADDRINUSE if another process holds it, whose id the message has; others where the path is
        taken by something that is no pid file of this user.
        """
        self.path = path
        self._guarded = guarded or path
        self._place = Place(path, "pid file")
        self._fd = -1
        try:
            self._fd = self._open()
            self._identity = _identity(os.fstat(self._fd))
            os.fchmod(self._fd, 0o600)  # whatever the umask was
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except BaseException:
            self._drop()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        while True:
            try:
                fd = os.open(self._place.name, flags, 0o600, dir_fd=self._place.directory)
            except OSError as error:
                raise OSError(error.errno, f"cannot lock {self.path}: {_why(error)}") from error
            fd = process.above_stdio(fd)
            try:
                if self._lock(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _lock(self, fd: int) -> bool:
        """Lock an opened file; False if it was removed meanwhile by the one who held it."""
        import fcntl

        found = os.fstat(fd)
        refusal = ""
        if not stat.S_ISREG(found.st_mode):
            refusal = "it is no ordinary file"
        elif found.st_uid != os.geteuid():
            refusal = f"it belongs to user {found.st_uid}"
        elif found.st_nlink > 1:
            refusal = "it has other names too"  # whose contents would be overwritten
        if refusal:
            raise OSError(errno.EEXIST, f"cannot lock {self.path}: {refusal}; remove it, or choose another path")
        try:
            files.ofd_setlk(fd, fcntl.F_WRLCK, 0, files.OFFSET_MAX)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(error.errno, f"cannot lock {self.path}: {_why(error)}") from error
            pid = os.pread(fd, _PID_LENGTH, 0).strip()
            holder = f"process {pid.decode()}" if pid.isdigit() else "another process, which has just begun,"
            raise OSError(
                errno.EADDRINUSE,
                f"{holder} is at {self._guarded} already (it holds {self.path}): end that one first, or choose "
                "another path",
            ) from error
        if not self._place.is_still(_identity(found)):
            return False
        if os.pread(fd, _PID_LENGTH, 0).strip(b"0123456789 \n"):
            raise OSError(errno.EEXIST, f"{self.path} is no pid file: remove it, or choose another path")
        return True

    @property
    def files(self) -> list[int]:
        """The descriptors that it needs."""
        return [self._fd, self._place.directory]

    def release(self) -> None:
        """Leave the file to another process that has a copy of this; its descriptors are closed here already."""
        self._fd = -1
        self._place.directory = -1

    def close(self) -> None:
        """Remove the file, if it is still this one, and then let others have the lock."""
        if self._fd >= 0:
            self._place.remove(self._identity)
            self._drop()

    def _drop(self) -> None:
        self._place.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a symlink; remove it, or choose another path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}; choose a path in a directory of yours"
    return str(error.strerror)


class Listening:
    """A socket that listens; `close` removes what was made for it. `path` is "" for an inherited one."""

    __slots__ = ("_identity", "_lock", "_place", "path", "socket")

    def __init__(
        self,
        bound: socket.socket,
        path: str = "",
        place: Place | None = None,
        lock: PidFile | None = None,
        identity: Identity = (0, 0),
    ) -> None:
        """Take over all of them."""
        self.socket = bound
        self.path = path
        self._place = place
        self._lock = lock
        self._identity = identity

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor, for poll(2)."""
        return self.socket.fileno()

    def accept(self, stop: int = -1, timeout: float | None = None) -> socket.socket | None:
        """Give the next client's socket; None once `stop` (an eventfd, a pipe) can be read, or time (seconds) is up.

        A client that has gone again before it was accepted is none.
        """
        import select
        import time

        watch = select.poll()
        watch.register(self.socket, select.POLLIN)
        if stop >= 0:
            watch.register(stop, select.POLLIN)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            ready = dict(watch.poll(left))
            if stop in ready or not ready:
                return None
            try:
                client, _ = self.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            client.setblocking(True)
            return client

    @property
    def files(self) -> list[int]:
        """The descriptors that it needs to be closed as it should, beside the socket."""
        held = [] if self._place is None else [self._place.directory]
        return held if self._lock is None else [*held, *self._lock.files]

    def release(self) -> None:
        """Leave the name and the lock file to another process that has a copy of this; go on listening."""
        if self._place is not None:
            self._place.directory = -1
            self._place = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def close(self) -> None:
        """Remove the socket's name and the lock file, if they are still the ones that were made here; stop listening.

        Who is connected stays so.
        """
        if self._place is not None:
            self._place.remove(self._identity)
            self._place.close()
            self._place = None
        self.socket.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def listen(path: str, *, mode: int | None = None, group: str = "", backlog: int = 1) -> Listening:
    """Listen at `path`, and hold `path`.pid locked with this process's id in it.

    mode: permission bits, by default 0600, or 0660 with a `group` (name or number) that the socket is given to. A
    socket that is left over from a process that has ended is replaced. A path longer than sockaddr_un takes is bound
    through /proc/self/fd; clients have to find such a way too.

    Raises OSError that names the path and a way out: EADDRINUSE if somebody listens there, with the id of the process
    where it holds the lock.
    """
    import socket

    gid = -1 if not group else _group(group)
    if mode is None:
        mode = 0o660 if group else 0o600
    place = Place(path, "socket")
    lock = None
    bound = None
    identity = (0, 0)
    try:
        address = _address(place)
        lock = PidFile(f"{path}.pid", path)
        _clear_stale(place, address)
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        os.fchmod(bound.fileno(), 0o600)
        identity = _bind(bound, place, address, mode, gid)
        bound.listen(backlog)
    except BaseException:
        if bound is not None:
            place.remove(identity)
            bound.close()
        if lock is not None:
            lock.close()
        place.close()
        raise
    return Listening(bound, path, place, lock, identity)


def _group(name: str) -> int:
    import grp

    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OSError(
            errno.EINVAL, f"there is no group {name}: give the name or number of one (`getent group`)"
        ) from None


def _address(place: Place) -> str:
    """A path for bind(2) and connect(2) that is short enough."""
    absolute = os.path.abspath(place.path)
    if len(os.fsencode(absolute)) <= _SUN_PATH:
        return absolute
    short = f"/proc/self/fd/{place.directory}/{place.name}"
    if len(os.fsencode(short)) > _SUN_PATH:
        raise OSError(errno.ENAMETOOLONG, f"the name of the socket {place.path} is too long: choose a shorter one")
    return short


def _clear_stale(place: Place, address: str) -> None:
    """Remove a socket that no process has bound any more. Raises OSError for everything else that is there.

    A datagram socket asks: of a bound stream socket it hears EPROTOTYPE, of a stale one ECONNREFUSED (unix(7)). To
    connect a stream would tell as much, and some daemon that serves one client would take us for it and then end.
    """
    import socket

    found = place.stat()
    if found is None:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.EEXIST, f"{place.path} is there and is no socket: remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(address)
        except ConnectionRefusedError:
            place.remove(_identity(found))
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise OSError(
                    error.errno, f"cannot tell who listens at {place.path}: {error.strerror}; choose another path"
                ) from error
    raise OSError(
        errno.EADDRINUSE,
        f"another process listens at {place.path} already (`ss -xlp` names it): end that one first, "
        "or choose another path",
    )


def _bind(bound: socket.socket, place: Place, address: str, mode: int, gid: int) -> Identity:
    """Bind, give the socket its group and mode, and tell which one it is. It does not listen yet."""
    try:
        bound.bind(address)
    except OSError as error:
        raise OSError(error.errno, f"cannot make the socket {place.path}: {_why(error)}") from error
    name = os.open(place.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.directory)
    try:
        found = os.fstat(name)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EEXIST, f"{place.path} was replaced meanwhile: choose a path in a directory of yours")
        try:
            if gid >= 0:
                os.chown(f"/proc/self/fd/{name}", -1, gid)
            os.chmod(f"/proc/self/fd/{name}", mode)
        except OSError as error:
            place.remove(_identity(found))
            hint = "; only root and its members can give a file to a group" if error.errno == errno.EPERM else ""
            raise OSError(
                error.errno, f"cannot give {place.path} its group and mode: {error.strerror}{hint}"
            ) from error
        return _identity(found)
    finally:
        os.close(name)


def adopt(fd: int) -> Listening:
    """Take over an inherited descriptor of an AF_UNIX stream socket that listens already.

    Raises OSError that says what the descriptor is instead.
    """
    import socket

    wanted = "hand over a listening unix socket, not yet connected"
    try:
        found = os.fstat(fd)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd} is not open: {wanted}") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(errno.ENOTSOCK, f"descriptor {fd} is no socket: {wanted}")
    given = socket.socket(fileno=fd)
    refusal = ""
    if given.family != socket.AF_UNIX:
        refusal = f"is a socket of {getattr(given.family, 'name', given.family)}"
    elif given.type != socket.SOCK_STREAM:
        refusal = f"is a socket of {getattr(given.type, 'name', given.type)}"
    elif not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        refusal = "is a socket that does not listen"
    given.detach()
    if refusal:
        raise OSError(errno.EINVAL, f"descriptor {fd} {refusal}: {wanted}")
    own = socket.socket(fileno=process.above_stdio(fd))
    own.set_inheritable(False)
    own.setblocking(False)
    return Listening(own)
