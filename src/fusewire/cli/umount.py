"""`fusewire umount`, `exec` and `path`: what is done to a mount that lives in the background.

Layer `cli`. Nothing here looks into a mount: a dead or hanging server must not hang the tool.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys

from fusewire.cli import control, state, supervise
from fusewire.cli.messages import explain
from fusewire.cli.supervise import EXIT_FAILED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND
from fusewire.linux import process

# A server that does not answer within this many seconds is called hung; how long we wait for its process to leave.
PATIENCE = 30.0
_ENDING = 5.0  # one that has closed its socket already, or that need not be asked twice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from fusewire.linux import mountinfo


def umount(targets: list[str], *, lazy: bool = False, everything: bool = False, program: str | None = None) -> int:
    """Unmount each target (or all mounts of this user) and put back what was there; give the exit status."""
    store = state.of_user(os.environ)
    code = 0
    if everything:
        records, problems = store.load_all()
        records.reverse()  # a later mount may lie on an earlier one, or come from an image in it
        for problem in problems:
            print(f"fusewire: {problem}", file=sys.stderr)
            code = EXIT_FAILED
    else:
        records = []
        for target in targets:
            record = store.find(target)
            if record is not None:
                records.append(record)
            else:
                code = max(code, _umount_other(target, lazy, program))
    for record in records:
        try:
            _umount_record(store, record, lazy, program)
        except OSError as error:
            print(f"fusewire: cannot unmount {record.target}: {explain(error)}", file=sys.stderr)
            code = EXIT_FAILED
    if everything:
        from fusewire.cli import places

        places.sweep(os.environ)  # last: it looks at what may lie on a filesystem that hangs
    return code


def _umount_record(store: state.Store, record: state.Record, lazy: bool, program: str | None) -> None:
    if state.alive(record):
        server = process.hold(record.pid, record.starttime) if state.is_near(record) else None
        with server or contextlib.nullcontext():
            _ask(record, server, lazy)
            if lazy and not os.path.lexists(record.directory):
                return  # its server goes on for those who have something open
            if server is not None and not server.wait(PATIENCE):
                if not lazy:
                    raise OSError(errno.ETIMEDOUT, f"unmounted, but its server (pid {record.pid}) has not ended")
                server.kill(signal.SIGKILL)
                server.wait(PATIENCE)
        if (server is None and not lazy) or not os.path.lexists(record.directory):
            return
    # The server is dead: clear up what it left, for it was killed, or could not remove what it was mounted on itself.
    from fusewire.linux import mount

    if record.mount is not None:
        mount.clean_up(record.mount, program)
    elif record.created is not None:
        _undo(store, record, record.created, program)
    store.remove(record)


def _undo(store: state.Store, record: state.Record, begun: dict[str, Any], program: str | None) -> None:
    """Undo what a server had begun at its target when it died: it had no time to note its mount."""
    from fusewire.linux import mount_base, mount_namespace, mountinfo

    place, made, parent = os.fsencode(str(begun.get("place"))), begun.get("kind") == "missing", begun.get("parent")
    aside = os.fsencode(str(begun.get("aside")))
    link = _link_of(place)
    found = mountinfo.at(place)
    if link is not None:
        if link[0] == record.pid:
            mount_namespace.put_back(place, os.readlink(place), aside, parent)
    elif found is not None and found.fstype.startswith(b"fuse.fusewire"):
        known = [other.mount["mount_id"] for other in store.load_all()[0] if other.mount is not None]
        if found.id not in (begun.get("mount_id"), *known):
            _clean_at(place, found, made, program)
    else:
        if made:
            mount_base.rmdir_if_ours(place, parent)
        mount_namespace.put_back(place, b"", aside, parent)


def _ask(record: state.Record, server: process.Hold | None, lazy: bool) -> None:
    """Tell a server to unmount."""
    if record.mount is None and server is not None:
        server.kill(signal.SIGTERM)  # it is about to mount, and does not listen yet
        return
    try:
        patience = min(PATIENCE, _ENDING) if lazy else PATIENCE
        answer = control.control(record.control, {"command": "umount", "lazy": lazy}, patience)
    except OSError as error:
        if error.errno == errno.ECONNRESET:
            return  # it has ended meanwhile
        if error.errno in (errno.ECONNREFUSED, errno.ENOENT) and server is not None and server.wait(_ENDING):
            return  # somebody else has told it already
        if not lazy:
            raise OSError(
                error.errno,
                f"its server (pid {record.pid}) does not answer: {error.strerror}; `fusewire umount --lazy` ends it",
            ) from error
        if server is None:
            raise OSError(
                error.errno,
                f"its server (pid {record.pid}) does not answer, and lives in another PID namespace; unmount it there",
            ) from error
        server.kill(signal.SIGKILL)
        return
    if not answer.get("ok"):
        number = int(answer.get("errno", errno.EIO))
        hint = "; --lazy detaches it all the same" if number == errno.EBUSY else ""
        raise OSError(number, f"{answer.get('error', 'the server refused')}{hint}")


def _umount_other(target: str, lazy: bool, program: str | None) -> int:
    """Unmount a FUSE mount of ours of which no record is left; refuse everything else."""
    from fusewire.linux import mountinfo

    place = os.fsencode(state.place(target))
    if (link := _link_of(place)) is not None:
        return _umount_link(target, place, *link)
    found = mountinfo.at(place)
    if found is None or not found.is_fuse:
        print(f"fusewire: {target}: nothing that Fusewire mounted (see `fusewire list`)", file=sys.stderr)
        return EXIT_FAILED
    if not found.fstype.startswith(b"fuse.fusewire"):
        print(
            f"fusewire: {target}: mounted by another program ({os.fsdecode(found.fstype)}); "
            "use umount(8) or fusermount3 -u",
            file=sys.stderr,
        )
        return EXIT_FAILED
    try:
        _clean_at(place, found, False, program)
    except OSError as error:
        print(f"fusewire: cannot unmount {target}: {explain(error)}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _clean_at(place: bytes, found: mountinfo.Mount, created: bool, program: str | None) -> None:
    from fusewire.linux import mount

    mount.clean_up(
        {
            "strategy": "direct",
            "target": os.fsdecode(place),
            "inside": os.fsdecode(place),
            "outside": None,
            "created": created,
            "mount_id": found.id,
            "device": os.fsdecode(found.device),
        },
        program,
    )


def _link_of(place: bytes) -> tuple[int, int] | None:
    """Give PID and N if `place` is a link to /proc/PID/fd/N, as a mount in a namespace leaves at its target."""
    try:
        words = os.readlink(place).decode("ascii", "replace").split("/")
    except OSError:
        return None
    if len(words) != 5 or words[:2] != ["", "proc"] or words[3] != "fd":
        return None
    return (int(words[2]), int(words[4])) if words[2].isdecimal() and words[4].isdecimal() else None


def _holds(pid: int, fd: int) -> bool:
    """Tell whether a descriptor of a process is on a mount of Fusewire's. Raises PermissionError if it is another's."""
    from fusewire.linux import mountinfo

    try:
        number = mountinfo.id_of_fd(fd, pid)
        if number is None:
            return False
        found = mountinfo.by_id(number, mountinfo.read(pid))
        if found is not None:
            return found.fstype.startswith(b"fuse.fusewire")
        # Its private mount point went with the record, and the kernel detached it from there: it is in no table.
        names = os.listdir(f"/proc/{pid}/fd")
        return any(os.readlink(f"/proc/{pid}/fd/{name}") == "/dev/fuse" for name in names)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _umount_link(target: str, place: bytes, pid: int, fd: int) -> int:
    """End the server that a link leads to, whose record is lost (a session's end may remove $XDG_RUNTIME_DIR)."""
    start = process.start_time(pid)
    if any(record.pid == pid and record.starttime == start for record in state.of_user(os.environ).load_all()[0]):
        start = None  # the link is older than that server, and says nothing of it
    server = process.hold(pid, start) if start is not None else None
    with server or contextlib.nullcontext():
        try:
            # Anybody can make a link that says so: it counts from the one whose server it names.
            if server is not None and os.lstat(place).st_uid == os.stat(f"/proc/{pid}").st_uid and _holds(pid, fd):
                server.kill(signal.SIGTERM)
                if not server.wait(PATIENCE):
                    server.kill(signal.SIGKILL)
                    server.wait(PATIENCE)
        except PermissionError:
            print(f"fusewire: {target}: the mount of another user (its server is pid {pid})", file=sys.stderr)
            return EXIT_FAILED
    from fusewire.linux import mount_namespace

    mount_namespace.put_back(place, b"/proc/%d/fd/%d" % (pid, fd), mount_namespace.find_aside(place), None)
    return 0


def _living(target: str) -> state.Record:
    record = state.of_user(os.environ).find(target)
    if record is None:
        raise OSError(errno.ENOENT, f"{target}: nothing that Fusewire mounted (see `fusewire list`)")
    if not state.alive(record):
        raise OSError(
            errno.ENOTCONN, f"{target}: its server (pid {record.pid}) is dead; `fusewire umount {target}` clears up"
        )
    if not state.is_near(record):
        raise OSError(errno.ESRCH, f"{target}: its server lives in another PID namespace; go there (a container?)")
    return record


def path_of(target: str) -> int:
    """Print a path of the mount that every process of this user can use."""
    record = _living(target)
    sys.stdout.buffer.write(os.fsencode(record.outside or record.target or "") + b"\n")  # a path is bytes
    return 0


def _keep_sight() -> None:
    """Let the command follow the link at the target, /proc/PID/fd/N of the server.

    The kernel opens that to a process of the same namespace only if its capabilities are no fewer than the server's,
    or if it has CAP_SYS_PTRACE (cap_ptrace_access_check). The server keeps CAP_SYS_ADMIN to unmount, and exec drops
    everything of an id that is not root, so that one capability is made ambient (capabilities(7)): it counts inside
    this user namespace alone, over processes that are this user's anyway.
    """
    from fusewire.linux import syscalls

    held = syscalls.capget()
    bit = 1 << syscalls.CAP_SYS_PTRACE
    syscalls.capset(held.effective, held.permitted, held.inheritable | bit)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, syscalls.CAP_SYS_PTRACE)


def execute(target: str, command: list[str]) -> NoReturn:
    """Become COMMAND inside the namespace of a mount; in our own where the mount is visible everywhere.

    Raises OSError if the mount is not there or the namespace cannot be entered.
    """
    record = _living(target)
    if record.strategy == "namespace":
        from fusewire.linux import userns

        try:
            cwd = os.getcwd()
        except FileNotFoundError:  # it has been removed, or has no path from here
            cwd = "/"
        try:
            userns.join(record.pid)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot enter the namespace of {target}: {error.strerror}; only the user who mounted it may, "
                "from outside of any other user namespace",
            ) from error
        _keep_sight()
        try:
            os.chdir(cwd)
        except OSError:
            os.chdir("/")
    supervise.restore(supervise.block())
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        print(f"fusewire: {command[0]}: no such command inside", file=sys.stderr)
        sys.exit(EXIT_NOT_FOUND)
    except OSError as error:
        print(f"fusewire: {command[0]}: cannot be executed: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_NOT_EXECUTABLE)
