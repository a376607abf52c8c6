"""What each step of a sandbox plan does, to the process that takes it.

Layer: linux. In which order, and for whom, is said by the plan; `sandbox_enter` goes through it. A step changes this
process for good, and finds what it needs in the State that it shares with the others.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import caller, landlock, process, syscalls
from fusewire.linux import capabilities as caps
from fusewire.linux.sandbox_plan import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fusewire.linux import userns
    from fusewire.linux.sandbox_plan import Plan

    Hook = Callable[[], object]

PROC = b"/proc/self/fd/"
_HERE = b"."
_EMPTY_PLACES = ("/tmp", "/dev/shm", "/run", "/var/tmp")  # noqa: S108  the directory loses its name at once


class Entered:
    """What a server has to know inside.

    root: an O_PATH descriptor of the shared directory, -1 for an image. It has the number of the plan's descriptor, if
    the plan had one. proc: the prefix of the paths of this process's descriptors. switch_ids: whether it can act with
    other ids than its own, which cannot be found out any more without /proc. landlock: the ABI version in use, or 0.
    notes: what is weaker than planned, found on the way.
    """

    __slots__ = ("capabilities", "landlock", "mode", "notes", "proc", "root", "switch_ids")

    def __init__(self, plan: Plan) -> None:
        self.mode = plan.mode
        self.root = -1
        self.proc = PROC
        self.capabilities = plan.keep
        self.switch_ids = False
        self.landlock = plan.landlock
        self.notes: list[str] = []


class State:
    """What the steps hand on to each other."""

    __slots__ = ("before", "entered", "hooks", "keep", "lifeline", "plan", "proc", "report", "server", "shared")

    def __init__(self, plan: Plan, keep: Collection[int], hooks: dict[str, Hook | None]) -> None:
        self.plan = plan
        self.server = -1  # in the process that has started it
        self.keep = frozenset(keep)
        self.hooks = hooks
        self.entered = Entered(plan)
        self.shared = -1
        self.proc = -1
        self.report = -1  # the server's way to tell the waiter how it went
        self.lifeline = -1  # a pipe that only the waiter can write to; at its end there is no waiter any more
        self.before: set[int] = set()  # signals that were blocked at the start

    def call(self, name: str) -> None:
        hook = self.hooks[name]
        if hook is not None:
            hook()


def _limits(state: State) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wanted = state.plan.rlimit_nofile
    if wanted is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (OSError, ValueError) as error:
        raise SandboxError(
            errno.EPERM,
            f"{wanted} descriptors are more than the {hard} that may be open",
            "ask for fewer (--rlimit-nofile), or raise the limit (`ulimit -Hn`)",
            "limits",
        ) from error


def _ids(state: State) -> None:
    """Prefer 0, for which leaving the own filesystem id takes the capabilities over files along (capabilities(7))."""
    gid = _inside(state.plan.gids, os.getegid())
    uid = _inside(state.plan.uids, os.geteuid())
    if (gid,) * 3 != os.getresgid():
        os.setresgid(gid, gid, gid)
    if (uid,) * 3 != os.getresuid():
        os.setresuid(uid, uid, uid)


def _inside(maps: tuple[userns.IdMap, ...], own: int) -> int:
    mapped = [one for one in maps if one.inside <= 0 < one.inside + one.count]
    if mapped:
        return 0
    if any(one.inside <= own < one.inside + one.count for one in maps):
        return own
    return maps[0].inside


def _groups(state: State) -> None:
    if not os.getgroups():
        return
    try:
        os.setgroups([])
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
        state.entered.notes.append(
            "the supplementary groups stay: this user may not drop them (start it with CAP_SETGID, or map id ranges)"
        )


def _umask(state: State) -> None:
    os.umask(0)


def _session(state: State) -> None:
    os.setsid()
    null = process.above_stdio(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
    for fd in (0, 1, 2):
        if fd == 0 or not _usable(fd):
            os.dup2(null, fd)
    os.close(null)


def _usable(fd: int) -> bool:
    """False for a standard descriptor that is closed, and for a directory, which would lead outside."""
    try:
        return not stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:
        return False


def _descriptors(state: State) -> None:
    state.call("serving")
    process.close_inherited_fds({0, 1, 2, state.report, state.lifeline, state.shared, *state.keep})


def _proc(state: State) -> None:
    if state.plan.mode == "chroot":
        state.proc = os.open(PROC, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
    # Mounted nowhere: a copy of the mount whose root is this directory, so that its `..` is itself. A fresh mount of
    # proc would need one that is visible in full, which containers do not have (mount_namespaces(7)).
    state.proc = syscalls.open_tree(syscalls.AT_FDCWD, PROC, flags)


def _root(state: State) -> None:
    plan, entered = state.plan, state.entered
    entered.switch_ids = bool(
        plan.keep >> syscalls.CAP_SETUID & plan.keep >> syscalls.CAP_SETGID & 1 and caller.can_switch()
    )
    if plan.shared is None:
        _empty_root(plan.mode)
        return
    if plan.mode == "none":
        entered.root = state.shared
        return
    wanted = os.fstat(state.shared)
    if plan.mode == "namespace":
        _pivot(_bind_here())
    else:
        os.fchdir(state.shared)
        os.chroot(_HERE)
        os.chdir("/")
    found = os.stat("/")
    if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
        raise OSError(errno.ESTALE, "the root is not the shared directory")
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    # The same number, now in this tree: the one before leads to the tree that was left, and by `..` out of it.
    os.dup2(root, state.shared, inheritable=False)
    os.close(root)
    entered.root = state.shared
    entered.proc = b""


def _bind_here() -> int:
    """Make the working directory the root of a mount, with all mounts below it; give a descriptor of it."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_RECURSIVE
    tree = syscalls.open_tree(syscalls.AT_FDCWD, _HERE, flags)
    try:
        # The server opens no device and runs nothing; so that whoever takes it over, and may make devices, cannot
        # either. Mounts that the host adds later are as the host makes them.
        attributes = syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOSUID
        syscalls.mount_setattr(tree, b"", syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE, attributes)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # before Linux 5.12
            raise
    syscalls.move_mount(tree, b"", syscalls.AT_FDCWD, _HERE, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
    return tree


def _pivot(tree: int) -> None:
    """Make a mount the root and detach everything else: pivot_root(2), the way without a place for the old root."""
    old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(tree)
    syscalls.pivot_root(_HERE, _HERE)
    os.fchdir(old)
    syscalls.mount(None, _HERE, None, syscalls.MS_REC | syscalls.MS_SLAVE)
    syscalls.umount2(_HERE, syscalls.MNT_DETACH)
    os.fchdir(tree)
    os.close(old)
    os.close(tree)


def _empty_root(mode: str) -> None:
    if mode == "none":
        return
    if mode == "namespace":
        place = b"/proc"
        flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
        syscalls.mount(b"fusewire-empty", place, b"tmpfs", flags, b"mode=555,size=4k")
        _pivot(os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return
    # A directory that was removed stays empty: nothing can be made in it.
    refusal: OSError | None = None
    for place_name in _EMPTY_PLACES:
        path = f"{place_name}/fusewire-empty-{os.getpid()}-{os.urandom(8).hex()}"
        try:
            os.mkdir(path, 0o500)
        except OSError as error:
            refusal = error
            continue
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.rmdir(path)
        os.fchdir(directory)
        os.close(directory)
        os.chroot(_HERE)
        os.chdir("/")
        return
    raise refusal or OSError(errno.ENOENT, "there is no directory to make an empty one in")


def _modules(state: State) -> None:
    """Have the interpreter look into its own binary only for what it has not loaded.

    All places that it would look into will lie inside the new root, and so belong to the guest: the path of a module
    that nobody has imported in time would be a way to run code. The C library has one such case too: the first thread
    that ends by pthread_exit(3) loads libgcc_s.
    """
    import sys
    from importlib.machinery import BuiltinImporter, FrozenImporter

    process.preload_thread_exit()
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    sys.path_importer_cache.clear()


def _directory(state: State) -> None:
    if state.proc >= 0:
        os.fchdir(state.proc)
    else:
        os.chdir("/")


def _no_new_privs(state: State) -> None:
    syscalls.set_no_new_privs()


def _capabilities(state: State) -> None:
    if not caps.drop(state.plan.keep):
        state.entered.notes.append(
            "the capability bounding set stays as it is, for want of CAP_SETPCAP; no_new_privs closes that way"
        )


def _memory(state: State) -> None:
    # RLIMIT_CORE does not count for a core_pattern that is a pipe (core(5)). A process finds its own /proc/self/fd
    # nevertheless, and its parent may still signal it.
    syscalls.set_dumpable(False)


def _parent(state: State) -> None:
    """After every change of ids, which makes the kernel forget it; workers that switch theirs do it for themselves.

    SIGKILL: the first process of a PID namespace gets no signal that it has no handler for, but this one.
    """
    import select
    import signal

    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    watch = select.poll()
    watch.register(state.lifeline, 0)
    if watch.poll(0):
        os._exit(1)  # it ended before we asked for the signal


def _landlock(state: State) -> None:
    plan = state.plan
    allowed = []
    if state.entered.root >= 0:
        access = landlock.READ_WRITE if plan.writable else landlock.READ_ONLY
        allowed.append((state.entered.root, access | (landlock.EXECUTE if plan.executes else 0)))
    others = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in plan.readable]
    try:
        landlock.restrict(plan.landlock, (*allowed, *((fd, landlock.READ_ONLY) for fd in others)))
    finally:
        for fd in others:
            os.close(fd)


def _seccomp(state: State) -> None:
    state.call("seccomp")


STEPS: dict[str, Callable[[State], None]] = {
    "limits": _limits,
    "ids": _ids,
    "groups": _groups,
    "umask": _umask,
    "session": _session,
    "descriptors": _descriptors,
    "proc": _proc,
    "root": _root,
    "modules": _modules,
    "directory": _directory,
    "no_new_privs": _no_new_privs,
    "capabilities": _capabilities,
    "memory": _memory,
    "parent": _parent,
    "landlock": _landlock,
    "seccomp": _seccomp,
}
"""The steps that concern one process, by their names."""
