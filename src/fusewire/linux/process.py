"""Processes: death signals, descriptors that must not leak, start times, descriptors sent over sockets.

Layer: linux (bottom). It starts no programs and keeps no list of children. `_socket` is used instead of `socket`, and
`signal` is loaded late: both build enums for several milliseconds on the way to every mount.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from fusewire.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from typing import Self

_INT = struct.calcsize("i")


def set_pdeathsig(signum: int, parent: int) -> None:
    """Have the kernel send `signum` to this process when its parent `parent` ends: PR_SET_PDEATHSIG.

    `parent` is what getppid(2) gave in the parent's child before anything could happen: os.getpid() before the fork,
    or 0 for the first process of a new PID namespace. The kernel ties the signal to the *thread* that forked, and
    forgets it at fork(2) and at an execve(2) that gains privileges.

    Raises ProcessLookupError if the parent has ended already, so that no signal would ever come.
    """
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, f"the parent process {parent} has ended")


def become_subreaper() -> None:
    """Make orphans below this process its children instead of init's: PR_SET_CHILD_SUBREAPER."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)


def close_inherited_fds(keep: Collection[int] = (0, 1, 2)) -> None:
    """Close every descriptor that is not in `keep`.

    Whoever holds a stray copy of a pipe, a lock or a /dev/fuse descriptor keeps it alive for all. What stays open is
    libffi: it (3.5) maps more of itself through a descriptor of its own when ctypes makes callbacks, and would map
    whatever had the number by then, as code.
    """
    for fd in open_fds():
        if fd not in keep:
            try:
                if not os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).startswith("libffi."):
                    os.close(fd)
            except OSError:  # the one that listed the directory
                continue


def open_fds() -> list[int]:
    """The numbers of this process's open descriptors. One of them was open for the listing only."""
    return [int(name) for name in os.listdir("/proc/self/fd")]


class Stat:
    """What /proc/PID/stat says: proc_pid_stat(5). `start` is in clock ticks since boot."""

    __slots__ = ("parent", "pid", "start", "state")

    def __init__(self, pid: int, state: str, parent: int, start: int) -> None:
        self.pid = pid
        self.state = state
        self.parent = parent
        self.start = start


def parse_stat(line: bytes) -> Stat:
    """Read one /proc/PID/stat. The command in it may hold blanks and parentheses: only the last `)` ends it."""
    head, _, rest = line.rpartition(b")")
    fields = rest.split()
    return Stat(int(head.split(b" ", 1)[0]), fields[0].decode(), int(fields[1]), int(fields[19]))


def stat(pid: int) -> Stat | None:
    """The state of a process, None if there is none with that pid (or /proc hides it)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return parse_stat(file.read())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def start_time(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; with the pid it names a process for ever (until a reboot)."""
    found = stat(pid)
    return None if found is None else found.start


def is_alive(pid: int, start: int) -> bool:
    """True if the process with that pid began at `start` and has not ended. A zombie has ended."""
    found = stat(pid)
    return found is not None and found.start == start and found.state not in "ZX"


class Hold:
    """Exactly one process, whoever gets its pid later: by pidfd_open(2), before Linux 5.3 by pid and start time."""

    __slots__ = ("_fd", "_pid", "_start")

    def __init__(self, pid: int, start: int, fd: int) -> None:
        self._pid = pid
        self._start = start
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def kill(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        try:
            if self._fd >= 0:
                syscalls.pidfd_send_signal(self._fd, number)
            elif is_alive(self._pid, self._start):
                os.kill(self._pid, number)
        except ProcessLookupError:
            return

    def wait(self, seconds: float) -> bool:
        """Wait for its end; False if that has not come after so many seconds."""
        if self._fd >= 0:
            import select

            watch = select.poll()
            watch.register(self._fd, select.POLLIN)
            return bool(watch.poll(seconds * 1000))
        import time

        deadline = time.monotonic() + seconds
        while is_alive(self._pid, self._start):  # such a kernel cannot tell us about a process that is not our child
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True


def hold(pid: int, start: int) -> Hold | None:
    """Hold exactly the process that began at `start`; None if it has ended."""
    fd = -1
    try:
        fd = syscalls.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # an old kernel, or a filter that does not know the call
            raise
    found = Hold(pid, start, fd)
    if is_alive(pid, start):  # asked after the open: what we hold is what we asked about
        return found
    with found:
        return None


def wait(pid: int) -> int:
    """Wait for a child; its exit status as a shell gives it: 0-255, or 128 + the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def allow_owner() -> int:
    """Take the owner's own bits out of the umask, or we could not use what we make; give the mask as it was."""
    before = os.umask(0o077)
    os.umask(before & 0o077)
    return before


def socket_pair(*, packets: bool = False) -> tuple[int, int]:
    """Two connected AF_UNIX sockets as close-on-exec descriptors above 2: streams, or with `packets` SOCK_SEQPACKET."""
    kind = _socket.SOCK_SEQPACKET if packets else _socket.SOCK_STREAM
    first, second = _socket.socketpair(_socket.AF_UNIX, kind)
    return above_stdio(first.detach()), above_stdio(second.detach())


def preload_thread_exit() -> None:
    """Load what glibc loads when a thread ends by pthread_exit(3), as daemon threads do when Python ends.

    It aborts the process where it can find libgcc_s no more, or may not map it.
    """
    import ctypes

    try:
        ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        pass  # another C library, or one that needs none


def above_stdio(fd: int) -> int:
    """The same open file under a number above 2, close-on-exec; `fd` itself is closed if it was moved.

    A process started with its standard descriptors closed gets 0, 1 and 2 from the next open(2)s, and whatever
    redirects stdio in a child would overwrite them.
    """
    if fd > 2:
        return fd
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def in_child(action: Callable[[int], int]) -> tuple[bytes, int]:
    """Have a forked child do `action` and end: what it has written to the pipe that it is given, and its wait status.

    The action gives the exit status; one that raises ends it with 1.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            status = action(writer)
        finally:
            os._exit(status)
    os.close(writer)
    try:
        answer = read_all(reader)
    finally:
        os.close(reader)
        status = os.waitpid(pid, 0)[1]
    return answer, status


def read_all(fd: int) -> bytes:
    """What a pipe or a socket gives until its other end is closed everywhere, with unread data or without."""
    parts = []
    try:
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def send_fds(sock: int, data: bytes, fds: Iterable[int]) -> None:
    """Send at least one byte and, with its first one, descriptors over an AF_UNIX socket: SCM_RIGHTS of unix(7)."""
    packed = b"".join(struct.pack("i", fd) for fd in fds)
    borrowed = _socket.socket(fileno=sock)
    try:
        borrowed.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if packed else [])
    finally:
        borrowed.detach()


def recv_fds(sock: int, size: int = 1, count: int = 1) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes and `count` descriptors, close-on-exec; no bytes mean that the other end is closed."""
    borrowed = _socket.socket(fileno=sock)
    try:
        room = _socket.CMSG_SPACE(count * _INT)
        data, ancillary, _, _ = borrowed.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC)
    finally:
        borrowed.detach()
    fds = []
    for level, kind, packed in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            whole = len(packed) - len(packed) % _INT
            fds += [number for (number,) in struct.iter_unpack("i", packed[:whole])]
    return data, fds


def detach_from_terminal(stderr: int | None = None) -> None:
    """Leave the caller's session, directory and terminal, in a child that goes on as a server.

    A new session has no terminal, so Ctrl-C and hang-ups of the caller's do not reach it (setsid(2)). Standard input
    and output become /dev/null, standard error `stderr` or /dev/null. The working directory becomes `/`, so that it
    keeps nobody's filesystem busy.
    """
    os.setsid()
    os.chdir("/")
    null = above_stdio(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
    try:
        for fd in (0, 1, 2):
            os.dup2(stderr if fd == 2 and stderr is not None else null, fd)
    finally:
        os.close(null)
