"""User namespaces: which ids to map, how to enter one, and why a kernel refuses.

Layer: linux. It makes namespaces of the calling process, which must have one thread; it mounts nothing.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux import process, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LAST_ID = 0xFFFFFFFE  # 2^32-1 means "no change" to chown(2), so it is not an id


class IdMap:
    """One line of uid_map or gid_map: ids `inside`... of the new namespace are `outside`... of its parent."""

    __slots__ = ("count", "inside", "outside")

    def __init__(self, inside: int, outside: int, count: int = 1) -> None:
        self.inside = inside
        self.outside = outside
        self.count = count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash(self.fields())

    def __repr__(self) -> str:
        return f"IdMap({self.inside}, {self.outside}, {self.count})"

    def fields(self) -> tuple[int, int, int]:
        """The three numbers in the order of the kernel's line."""
        return self.inside, self.outside, self.count


class Plan:
    """What namespaces to make and which ids to map in them.

    `new_user` False: only the others, for a caller who has CAP_SYS_ADMIN already. `helpers`: the maps are written by
    newuidmap(1) and newgidmap(1), which know /etc/subuid and /etc/subgid; they allow setgroups(2) inside, which an
    unprivileged writer of gid_map must give up (user_namespaces(7)).
    """

    __slots__ = ("gids", "helpers", "new_user", "uids")

    def __init__(
        self, uids: tuple[IdMap, ...] = (), gids: tuple[IdMap, ...] = (), new_user: bool = True, helpers: bool = False
    ) -> None:
        self.uids = uids
        self.gids = gids
        self.new_user = new_user
        self.helpers = helpers

    def __repr__(self) -> str:
        return f"Plan({self.uids}, {self.gids}, new_user={self.new_user}, helpers={self.helpers})"


class UsernsError(OSError):
    """A namespace could not be made. `cause` says why as far as it can be known, `remedy` what to do about it."""

    def __init__(self, number: int, message: str, cause: str, remedy: str) -> None:
        super().__init__(number, message)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.strerror}: {self.cause}; {self.remedy}"


def current_plan() -> Plan:
    """No user namespace of our own: for real root and for root of a namespace that somebody else made."""
    return Plan(new_user=False)


def self_plan() -> Plan:
    """The caller mapped to itself: programs inside see the ids that they see outside."""
    uid, gid = os.geteuid(), os.getegid()
    return Plan((IdMap(uid, uid),), (IdMap(gid, gid),))


def root_plan() -> Plan:
    """The caller mapped to root."""
    return Plan((IdMap(0, os.geteuid()),), (IdMap(0, os.getegid()),))


def ranges_plan(as_root: bool = False) -> Plan:
    """The caller and all subordinate ids that /etc/subuid and /etc/subgid give, for newuidmap and newgidmap.

    `as_root`: the caller is 0 and the subordinate ids follow from 1. Otherwise the caller keeps its ids and the
    subordinate ones fill 0, 1, ... around it, so that root of an image is a subordinate id.

    Raises UsernsError with ENOENT if the files give this user nothing or the helpers are missing.
    """
    uid, gid = os.geteuid(), os.getegid()
    names = [str(uid).encode(), *_login_names(uid)]
    maps = []
    for path, helper, own in (("/etc/subuid", "newuidmap", uid), ("/etc/subgid", "newgidmap", gid)):
        ranges = subordinate_ranges(path, names)
        if not ranges:
            user = os.fsdecode(names[-1])
            raise UsernsError(
                errno.ENOENT,
                "cannot map id ranges",
                f"{path} gives no range to user {user}",
                f"ask the administrator for a line `{user}:100000:65536` in {path}, or do without ranges",
            )
        if find_helper(helper) is None:
            raise UsernsError(
                errno.ENOENT,
                "cannot map id ranges",
                f"{helper} is not installed",
                "install it (Debian and Ubuntu: uidmap, Fedora: shadow-utils-subid), or do without ranges",
            )
        maps.append(_lay_out(0 if as_root else own, own, ranges))
    return Plan(maps[0], maps[1], helpers=True)


def default_plan() -> Plan:
    """No user namespace if CAP_SYS_ADMIN is here already, else the caller mapped to itself."""
    return current_plan() if syscalls.has_capability(syscalls.CAP_SYS_ADMIN) else self_plan()


def _lay_out(own_inside: int, own: int, ranges: list[tuple[int, int]]) -> tuple[IdMap, ...]:
    maps = [IdMap(own_inside, own)]
    inside = 0
    for start, count in ranges:
        while count > 0 and inside <= _LAST_ID:
            if inside == own_inside:
                inside += 1
            room = own_inside - inside if inside < own_inside else _LAST_ID + 1 - inside
            part = min(count, room)
            maps.append(IdMap(inside, start, part))
            inside, start, count = inside + part, start + part, count - part
    return tuple(sorted(maps, key=IdMap.fields))


def _login_names(uid: int) -> list[bytes]:
    import pwd

    try:
        return [os.fsencode(pwd.getpwuid(uid).pw_name)]
    except KeyError:
        return []


def subordinate_ranges(path: str, names: list[bytes]) -> list[tuple[int, int]]:
    """The (start, count) that a file like /etc/subuid gives to any of `names`, a login name or a number: subuid(5)."""
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        name, _, rest = line.partition(b":")
        start, _, count = rest.partition(b":")
        if name in names and start.isdigit() and count.strip().isdigit() and int(count) > 0:
            ranges.append((int(start), int(count)))
    return ranges


def find_helper(name: str) -> str | None:
    """Where a program is in PATH, None if it is not there. Whether it may run shows only when it is run."""
    for directory in (*os.get_exec_path(), "/usr/bin", "/bin"):
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            return path
    return None


def enter(plan: Plan, flags: int = 0) -> None:
    """Move this process into new namespaces: a mount namespace, by the plan a user namespace, and those in `flags`.

    Nothing that is mounted afterwards reaches the namespace we came from. With CLONE_NEWPID the *next child* is the
    first process of the new PID namespace (pid_namespaces(7)).

    Raises UsernsError. After a failed write of a map the process is in a namespace without ids: it can only end.
    """
    if not plan.new_user:
        try:
            syscalls.unshare(syscalls.CLONE_NEWNS | flags)
        except OSError as error:
            raise _refused(error, "unshare", "cannot make a mount namespace") from error
        # With a new user namespace the kernel does this by itself: its mounts belong to somebody less privileged.
        try:
            _become_slave()
        except OSError as error:
            message = "cannot keep what will be mounted from the namespace that we came from"
            raise _refused(error, "mount", message) from error
        return
    if syscalls.get_dumpable() != 1:  # /proc/self belongs to root then, and so does uid_map
        syscalls.set_dumpable()
    finish = _start_helpers(plan) if plan.helpers else None
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | flags)
    except OSError as error:
        if finish:
            finish(False)
        raise _refused(error, "unshare", "cannot make a user namespace") from error
    if finish:
        finish(True)
        return
    for name, text in (("setgroups", b"deny"), ("uid_map", _lines(plan.uids)), ("gid_map", _lines(plan.gids))):
        try:
            _write(f"/proc/self/{name}", text)
        except FileNotFoundError:  # setgroups came with Linux 3.19, and a kernel without it wants no such write
            continue
        except OSError as error:
            raise _refused(error, name, f"cannot map ids in the new user namespace (writing {name})") from error


def _become_slave() -> None:
    """Have nothing that is mounted here reach the namespace that we came from (mount_namespaces(7))."""
    try:
        syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_SLAVE)
    except OSError as error:
        try:  # a seccomp filter may know the older call only
            syscalls.mount_setattr(syscalls.AT_FDCWD, b"/", syscalls.AT_RECURSIVE, 0, propagation=syscalls.MS_SLAVE)
        except OSError:
            raise error from None


def join(pid: int, flags: int = 0) -> None:
    """Enter the user and mount namespace of a process, and those in `flags`: setns(2) by pidfd.

    Before Linux 5.8, which has no such setns, by /proc/PID/ns, one after the other; `flags` are refused there.

    Needs the same user that made the namespace (or privilege in it). The working directory becomes that namespace's
    root. Raises OSError, ESRCH if the process has ended.
    """
    wanted = syscalls.CLONE_NEWNS | flags
    if os.stat("/proc/self/ns/user").st_ino != os.stat(f"/proc/{pid}/ns/user").st_ino:
        wanted |= syscalls.CLONE_NEWUSER  # entering the one that we are in is refused
    # Opened first: once in the other user namespace, nothing says that this may still be read.
    spaces = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("user", "mnt")]
    try:
        pidfd = -1
        try:
            pidfd = syscalls.pidfd_open(pid)
            syscalls.setns(pidfd, wanted)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL) or flags:
                raise
            if wanted & syscalls.CLONE_NEWUSER:
                syscalls.setns(spaces[0], syscalls.CLONE_NEWUSER)
            syscalls.setns(spaces[1], syscalls.CLONE_NEWNS)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
    finally:
        for fd in spaces:
            os.close(fd)


def probe(plan: Plan) -> UsernsError | None:
    """Try in a child whether `enter(plan)` works; None if it does."""

    def attempt(writer: int) -> int:
        try:
            enter(plan)
        except UsernsError as error:
            os.write(writer, "\0".join((str(error.errno), str(error.strerror), error.cause, error.remedy)).encode())
            return 1
        return 0

    report, status = process.in_child(attempt)
    if report:
        number, message, cause, remedy = report.decode().split("\0")
        return UsernsError(int(number), message, cause, remedy)
    if status:
        return UsernsError(errno.EIO, "cannot make a user namespace", "the trial process died", "see the kernel log")
    return None


def _lines(maps: tuple[IdMap, ...]) -> bytes:
    return b"".join(b"%d %d %d\n" % m.fields() for m in maps)


def _write(path: str, text: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text)  # one write: the kernel takes a map once and whole
    finally:
        os.close(fd)


def _start_helpers(plan: Plan) -> Callable[[bool], None]:
    """Start a child that stays outside and runs newuidmap and newgidmap for us once we have unshared.

    It must exist before: helpers started from inside would have no privilege over the map. The function returned
    tells it to go on (or to give up), waits for it and raises UsernsError with what a helper complained of.
    """
    if syscalls.get_no_new_privs() and os.geteuid() != 0:
        raise UsernsError(
            errno.EPERM,
            "cannot map id ranges",
            "no_new_privs is set, so newuidmap and newgidmap gain no privilege",
            "do without ranges, or start from a process without no_new_privs",
        )
    go_reader, go_writer = os.pipe()
    report_reader, report_writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(go_writer)
            os.close(report_reader)
            if os.read(go_reader, 1):
                _run_helper("newuidmap", parent, plan.uids, report_writer)
                _run_helper("newgidmap", parent, plan.gids, report_writer)
            status = 0
        except OSError as error:
            os.write(report_writer, str(error.strerror).encode())
        finally:
            os._exit(status)
    os.close(go_reader)
    os.close(report_writer)

    def finish(go: bool) -> None:
        try:
            if go:
                os.write(go_writer, b"g")
            os.close(go_writer)
            complaint = process.read_all(report_reader).decode(errors="replace").strip()
        finally:
            os.close(report_reader)
            status = os.waitpid(pid, 0)[1]
        if go and status:
            raise UsernsError(
                errno.EPERM,
                "cannot map id ranges",
                complaint or "the helper process died",
                "compare the ranges in /etc/subuid and /etc/subgid, or do without ranges",
            )

    return finish


def _run_helper(name: str, pid: int, maps: tuple[IdMap, ...], complaints: int) -> None:
    path = find_helper(name)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, f"{name} is not installed")
    numbers = [str(number) for m in maps for number in m.fields()]
    actions = [(os.POSIX_SPAWN_DUP2, complaints, 1), (os.POSIX_SPAWN_DUP2, complaints, 2)]
    try:
        child = os.posix_spawn(path, [name, str(pid), *numbers], os.environ, file_actions=actions)
    except OSError as error:
        raise OSError(error.errno, f"{path} does not run: {error.strerror}") from error
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(errno.EPERM, f" ({name} ended with status {status})")


def _sysctl(name: str) -> str | None:
    try:
        with open("/proc/sys/" + name, "rb") as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return None


def apparmor_profile() -> str | None:
    """The AppArmor profile that confines this process, None without AppArmor or if it is unconfined."""
    for path in ("/proc/self/attr/apparmor/current", "/proc/self/attr/current"):
        try:
            with open(path, "rb") as file:
                profile = file.read().decode(errors="replace").strip("\0\n ")
        except OSError:
            continue
        return None if profile in ("", "unconfined", "kernel") else profile
    return None


def apparmor_restricts() -> bool:
    """True if AppArmor takes the capabilities away inside unprivileged user namespaces (Ubuntu 23.10 and later)."""
    return _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1"


def seccomp_filtered() -> bool:
    """True if a seccomp filter holds for this process, as in most containers: `Seccomp: 2` of proc_pid_status(5)."""
    return _status(b"Seccomp") == b"2"


def _is_mapped(name: str, number: int) -> bool:
    with open(f"/proc/self/{name}", "rb") as file:
        for line in file:
            inside, _, count = map(int, line.split())
            if inside <= number < inside + count:
                return True
    return False


def in_first_namespace() -> bool:
    """True if all ids are themselves, as in the first user namespace of the machine (and of no other in practice)."""
    with open("/proc/self/uid_map", "rb") as uid_map:
        return uid_map.read().split() == [b"0", b"0", b"4294967295"]


def maps_of(pid: int) -> tuple[str, str, bool]:
    """The uid_map and gid_map of process `pid`'s user namespace, seen from ours, and whether it is ours.

    Raises OSError if the process is gone.
    """
    inside = os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user")
    maps = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}") as lines:
            maps.append(lines.read())
    return maps[0], maps[1], inside


def thread_count() -> int:
    """How many threads this process has."""
    return int(_status(b"Threads") or 1)


def _status(field: bytes) -> bytes | None:
    with open("/proc/self/status", "rb") as status:
        for line in status:
            name, _, value = line.partition(b":")
            if name == field:
                return value.strip()
    return None


def chrooted() -> bool:
    """True if the root directory is surely not the root of a mount: then user namespaces are refused.

    A chroot(2) onto a mount point looks like any other root from inside and is not recognised.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        return all(line.split(b" ", 5)[4] != b"/" for line in file)


_APPARMOR = (
    "AppArmor restricts unprivileged user namespaces (kernel.apparmor_restrict_unprivileged_userns=1)",
    "ask the administrator for an AppArmor profile with `userns,` for this interpreter, or use fusermount3",
)
_CONTAINER = (
    "a seccomp filter forbids it, as container engines' default profiles do",
    "start the container with `--cap-add SYS_ADMIN` or with a seccomp profile that allows unshare and mount",
)


def explain(step: str, number: int) -> tuple[str, str]:
    """Cause and remedy for an errno at a step: unshare, setgroups, uid_map, gid_map, or mount.

    The kernel tells little more than EPERM; the rest is read from /proc and said as what it is, a likely cause.
    """
    text = os.strerror(number)
    if step == "unshare":
        if number in (errno.ENOSPC, errno.EUSERS):
            limit = _sysctl("user/max_user_namespaces")
            if limit == "0":
                return (
                    "user namespaces are switched off (user.max_user_namespaces=0)",
                    "ask the administrator for `sysctl user.max_user_namespaces=10000`",
                )
            return (
                f"too many user namespaces exist (user.max_user_namespaces={limit}), or they are nested 32 deep",
                "end programs that hold some, or ask the administrator to raise user.max_user_namespaces",
            )
        if number == errno.EINVAL:
            if thread_count() > 1:
                return (
                    f"this process has {thread_count()} threads, and a user namespace needs a process of one",
                    "enter the namespace before any thread is started",
                )
            return (
                "this kernel has no user namespaces",
                "ask the administrator to switch them on (RHEL 7: user_namespace.enable=1 at boot), or use fusermount3",
            )
        if number == errno.EPERM and _sysctl("kernel/unprivileged_userns_clone") == "0":
            return (
                "user namespaces are for root only (kernel.unprivileged_userns_clone=0)",
                "ask the administrator for `sysctl kernel.unprivileged_userns_clone=1`, or use fusermount3",
            )
    if number == errno.ENOSYS and seccomp_filtered():
        return _CONTAINER
    if number in (errno.EPERM, errno.EACCES):
        if apparmor_restricts() and (step == "unshare" or not in_first_namespace()):
            return _APPARMOR
        if seccomp_filtered():
            return _CONTAINER
        if step == "unshare" and not (_is_mapped("uid_map", os.geteuid()) and _is_mapped("gid_map", os.getegid())):
            return (
                "this user's ids have no mapping in the user namespace that it is in",
                "have the namespace map them (`unshare --map-current-user`), or run outside of it",
            )
        if step == "unshare" and chrooted():
            return (
                "this process is in a chroot, where no user namespace can be made",
                "run outside the chroot, or enter it with pivot_root or a container engine",
            )
        if (profile := apparmor_profile()) is not None:
            return f"the AppArmor profile {profile} forbids it", "ask the administrator to allow `userns,` in it"
        if step.endswith("_map"):
            return (
                f"the kernel refuses this map ({text}): without privilege only the caller's own id can be mapped",
                "map only yourself, or use newuidmap and newgidmap with ranges from /etc/subuid and /etc/subgid",
            )
    return text, "see `fusewire doctor`"


def _refused(error: OSError, step: str, message: str) -> UsernsError:
    number = error.errno or errno.EIO
    return UsernsError(number, message, *explain(step, number))
