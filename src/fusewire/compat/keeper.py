"""The process that holds a mount's namespace, so that the program which serves the mount stays outside of it.

Layer `compat`. A user namespace can only be made by a process of one thread, and changes what ids mean to whoever is in
it; a program that calls `FUSE()` may have threads, and wants neither. So a new interpreter is started: it makes the
namespace, mounts, sends the /dev/fuse descriptor back, and waits. When the program ends, however that comes, or when
the keeper is told to end (SIGTERM), it puts back what was at the mount point and goes; its namespace goes with it.

It imports nothing of the program's, and never looks at the mount while nobody could answer.
"""

from __future__ import annotations

import os
import sys

from fusewire.linux import mount, mount_base, mount_namespace, process, syscalls, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.linux.mount_base import Mount, Options

SOCKET = 3
"""The descriptor of the keeper's end of the socket."""
_LARGEST = 1 << 16


def start() -> tuple[int, int]:
    """Start a keeper; give its pid and our end of its socket.

    Raises OSError: it cannot be started.
    """
    import errno

    if not sys.executable:
        raise OSError(errno.ENOENT, "this Python does not know its own interpreter (sys.executable is empty)")
    import fusewire

    package = os.path.dirname(os.path.dirname(os.path.abspath(fusewire.__file__)))
    code = "import sys; sys.path.insert(0, sys.argv[1]); from fusewire.compat.keeper import main; main()"
    ours, theirs = process.socket_pair()
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    actions.append((os.POSIX_SPAWN_DUP2, theirs, SOCKET))
    try:
        # -I -S: nothing of the user's environment, and no site-packages, is needed to mount.
        words = [sys.executable, "-I", "-S", "-c", code, package]
        pid = os.posix_spawn(sys.executable, words, dict(os.environ), file_actions=actions)
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return pid, ours


def ask(sock: int, target: bytes, options: Options) -> tuple[dict[str, Any], int]:
    """Have a keeper mount; give what it says, and the /dev/fuse descriptor.

    Raises OSError if it has ended, and MountError as `linux.mount.mount` does.
    """
    import errno
    import json

    wanted = {
        "target": os.fsdecode(target),
        "fsname": os.fsdecode(options.fsname),
        "subtype": os.fsdecode(options.subtype),
        "flags": options.flags,
        "allow_other": options.allow_other,
        "allow_root": options.allow_root,
        "default_permissions": options.default_permissions,
        "max_read": options.max_read,
    }
    process.send_fds(sock, json.dumps(wanted).encode() + b"\n", ())
    data, fds = process.recv_fds(sock, _LARGEST)
    if not data:
        raise OSError(errno.EIO, "the process that should hold the mount's namespace has ended", os.fsdecode(target))
    answer = json.loads(data)  # one message: what comes next waits for us to serve
    if "attempts" in answer:
        raise mount.MountError(answer["errno"], target, [tuple(attempt) for attempt in answer["attempts"]])
    return answer, fds[0]


def wait_shown(sock: int) -> str | None:
    """Wait until the mount can be used at its target; give what went wrong, None if nothing did."""
    import json

    line = b""
    while not line.endswith(b"\n"):
        part = os.read(sock, _LARGEST)
        if not part:
            return "the process that held the mount's namespace has ended"
        line += part
    failure: str | None = json.loads(line.splitlines()[0]).get("failed")
    return failure


def main() -> None:
    """Be a keeper, on `SOCKET`; ends with the process."""
    import json
    import signal

    os.setsid()  # Ctrl-C in the program's terminal is not for us: it ends the program, and that ends us
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    process.close_inherited_fds({0, 1, 2, SOCKET})
    process.allow_owner()
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(SOCKET, _LARGEST)
        if not part:
            return
        line += part
    wanted = json.loads(line)
    target = os.fsencode(wanted.pop("target"))
    wanted["fsname"], wanted["subtype"] = os.fsencode(wanted["fsname"]), os.fsencode(wanted["subtype"])
    from fusewire.linux.mount_base import Options

    _keep(target, Options(**wanted))


def _keep(target: bytes, options: Options) -> None:
    import json
    import tempfile

    def say(fds: tuple[int, ...] = (), **answer: object) -> None:
        process.send_fds(SOCKET, json.dumps(answer).encode() + b"\n", fds)

    private = os.fsencode(tempfile.mkdtemp(prefix="fusewire-"))
    held = None
    try:
        plan = userns.default_plan()
        try:
            place = mount_namespace.find_place(target)
            held = mount.mount(None, options, "namespace", private=private, plan=plan)
        except mount.MountError as error:
            say(errno=error.errno, attempts=error.attempts)
            return
        except OSError as error:
            say(errno=error.errno, attempts=[("namespace", error.strerror, getattr(error, "remedy", ""))])
            return
        say((held.fd,), new_user=plan.new_user)
        held.close()  # else we would keep alive what a dead program leaves unanswered
        _look_first(held.inside)
        try:
            _show(held, place)
        except OSError as error:
            say(failed=f"{error.strerror}: {os.fsdecode(target)}")
            return
        say(shown=True)
        os.read(SOCKET, 1)  # until the program has closed its end
    finally:
        if held is not None:
            _leave(held)
        try:
            os.rmdir(private)
        except OSError:  # a seccomp filter forbids umount2(2): it goes with whoever sweeps that directory
            pass


def _look_first(path: bytes) -> None:
    """Look at the mount first, in a process that may wait for the answer."""
    looker = os.fork()
    if looker == 0:
        try:
            process.close_inherited_fds(())
            mount_base.first_look(path)
        finally:
            os._exit(0)
    os.waitpid(looker, 0)


def _leave(held: Mount) -> None:
    held.unmount()  # its descriptor is closed, so this only puts back what was at the target
    try:
        syscalls.umount2(held.inside, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except OSError:
        pass  # it ends with this process


def _show(held: Mount, place: mount_namespace.Place) -> None:
    """Put the link to a mount at its target: only now, when everything can be done there."""
    try:
        assert isinstance(held, mount_namespace.NamespaceMount)
        assert held.outside is not None
        mount_namespace._replace(place, held.outside)
        held._place = place
    finally:
        place.close()
