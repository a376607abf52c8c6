"""Carry out a sandbox plan: one function that goes through its steps, and a trial of it in a child.

Layer: linux. It decides nothing, the plan does. It changes the calling process for good, which must have one thread.

Up to three processes. The one that calls stays outside as the *waiter*; the *server* comes back from `enter`. With a
new PID namespace there is a third one between them, which makes the namespaces, starts the server as its first process,
and ends: so the waiter keeps its own namespaces, can remove what it has made outside, and still has the server for a
child, because it is a subreaper. What is weaker in the caller's own process (as in virtiofsd, where the waiting process
moves into the namespaces too) is then that removing, and signals to a server with an id of its own.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import caller, landlock, process, syscalls, userns
from fusewire.linux import capabilities as caps
from fusewire.linux.sandbox import Plan, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import NoReturn

    from fusewire.linux.sandbox import Step

    Hook = Callable[[], object]

PROC = b"/proc/self/fd/"
_HERE = b"."
_EMPTY_PLACES = ("/tmp", "/dev/shm", "/run", "/var/tmp")  # noqa: S108  the directory loses its name at once
_ALTERNATIVES = {
    "namespace": "use --sandbox chroot (takes CAP_SYS_CHROOT only), or --sandbox none --landlock require (takes no "
    "privilege), or --sandbox auto",
    "chroot": "use --sandbox namespace, or --sandbox none --landlock require (takes no privilege), or --sandbox auto",
    "none": "see `fusewire doctor`",
}


class ServerEnded(SystemExit):
    """Raised in the waiter once the server has ended; `code` is its status as a shell gives it.

    It is no error: whoever has made something outside removes it on the way out.
    """


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


class _State:
    """What the steps hand on to each other."""

    __slots__ = ("before", "entered", "hooks", "keep", "lifeline", "plan", "proc", "report", "shared")

    def __init__(self, plan: Plan, keep: Collection[int], hooks: dict[str, Hook | None]) -> None:
        self.plan = plan
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


def enter(
    plan: Plan,
    *,
    keep: Collection[int] = (),
    imports: Hook | None = None,
    serving: Hook | None = None,
    waiting: Hook | None = None,
    seccomp: Hook | None = None,
) -> Entered:
    """Go through the steps of a plan. Comes back in the server; in the waiter ServerEnded is raised instead.

    keep: descriptors that stay open beside 0, 1 and 2; no directories. Called at their time, where given: `imports`
    before anything is done, to load every module; `serving` in the server before the other descriptors are closed, to
    forget those that it will not have; `waiting` in the waiter once the server is inside, to close what must not
    outlive it (the listening socket); `seccomp` as the last of all.

    Raises SandboxError in the caller if a step fails; without a waiter (see the plan) the process is half inside then
    and can only end. ValueError for a directory in `keep`.
    """
    _check_caller(plan, keep)
    hooks = {"imports": imports, "serving": serving, "waiting": waiting, "seccomp": seccomp}
    state = _State(plan, keep, hooks)
    owned = -1
    try:
        if isinstance(plan.shared, int):
            state.shared = plan.shared
        elif plan.shared is not None:
            owned = state.shared = _open_directory(plan.shared)
        for step in plan.steps:
            try:
                _ACTIONS[step.name](state)
            except OSError as error:
                _fail(state, step, error)
    except BaseException:
        if owned >= 0 and state.report < 0:  # in the server the number may be somebody else's already
            os.close(owned)
        raise
    if state.report >= 0:
        os.write(state.report, b"R")
        os.close(state.report)
        _await_go(state)  # not before the waiter has given up its privileges too
        os.close(state.lifeline)
        _set_mask(state.before)
    return state.entered


def probe(plan: Plan) -> SandboxError | None:
    """Try in a child whether the plan can be carried out here; None if it can. The filter is not tried."""

    def attempt(writer: int) -> int:
        try:
            enter(plan)
        except ServerEnded as ended:
            return ended.code if isinstance(ended.code, int) else 1
        except SandboxError as error:
            os.write(writer, _pack(error))
            return 1
        return 0

    answer, status = process.in_child(attempt)
    if answer:
        return _unpack(answer)
    if status:
        return SandboxError(errno.EIO, f"the trial of --sandbox {plan.mode} died", _ALTERNATIVES[plan.mode])
    return None


def _check_caller(plan: Plan, keep: Collection[int]) -> None:
    threads = userns.thread_count()
    if threads > 1:
        raise SandboxError(
            errno.EBUSY,
            f"this process has {threads} threads, and a sandbox holds for one that has not started any",
            "enter it before threads are started",
        )
    for fd in keep:
        if plan.confined and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise ValueError(f"descriptor {fd} is a directory: kept open, it leads out of the sandbox")


def _open_directory(path: bytes) -> int:
    try:
        return process.above_stdio(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise SandboxError(
            error.errno or errno.EIO,
            f"cannot open the shared directory {os.fsdecode(path)}: {error.strerror}",
            "share one that is there",
        ) from error


# How it failed


def _fail(state: _State, step: Step, error: OSError) -> NoReturn:
    mode = state.plan.mode
    failure = error if isinstance(error, SandboxError) else None
    if failure is None:
        if isinstance(error, userns.UsernsError):
            reason, remedy = f"{error.strerror}: {error.cause}", f"{error.remedy}; or {_ALTERNATIVES[mode]}"
        else:
            name = f" ({os.fsdecode(error.filename)})" if error.filename else ""
            reason, remedy = f"{error.strerror}{name}", _ALTERNATIVES[mode]
        message = f"--sandbox {mode} cannot be had here, `{step.name}` failed: {reason}"
        failure = SandboxError(error.errno or errno.EIO, message, remedy, step.name)
    if state.report < 0:
        raise failure from error
    os.write(state.report, b"E" + _pack(failure))
    os._exit(1)


def _pack(error: SandboxError) -> bytes:
    return os.fsencode("\0".join((str(error.errno), str(error.strerror), error.remedy, error.step)))


def _unpack(data: bytes) -> SandboxError:
    number, message, remedy, step = os.fsdecode(data).split("\0")
    return SandboxError(int(number), message, remedy, step)


# The steps, by name


def _imports(state: _State) -> None:
    # What the steps after this one take: the last of them find no library any more.
    import ctypes  # noqa: F401
    import importlib.machinery  # noqa: F401
    import resource  # noqa: F401
    import select  # noqa: F401
    import signal  # noqa: F401

    state.call("imports")
    _check_caller(state.plan, ())


def _limits(state: _State) -> None:
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


def _wait(state: _State) -> None:
    """Fork. Comes back in the server only, or with a new PID namespace in the process that will start the server."""
    import signal
    import sys

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    held: set[int] = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1}
    held |= {signal.SIGUSR2, signal.SIGWINCH, signal.SIGALRM}
    state.before = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, held)}
    report_reader, report_writer = (process.above_stdio(fd) for fd in os.pipe())
    life_reader, life_writer = (process.above_stdio(fd) for fd in os.pipe())
    if state.plan.mode == "namespace":
        process.become_subreaper()  # before there is a child: the one between may end at any time
    pid = os.fork()
    if pid == 0:
        os.close(report_reader)
        os.close(life_writer)
        state.report, state.lifeline = report_writer, life_reader
        if state.plan.mode != "namespace":
            _await_go(state)
        return
    os.close(report_writer)
    os.close(life_reader)
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the status away
        server = _see_in(state, pid, report_reader, life_writer)
    except BaseException:
        _set_mask(state.before)
        raise
    finally:
        os.close(report_reader)
    state.call("waiting")
    syscalls.set_no_new_privs()
    caps.drop(0)
    _go(life_writer)
    raise ServerEnded(_pass_on(server, held))


def _see_in(state: _State, pid: int, report: int, lifeline: int) -> int:
    """See the server in, and give its process id. Raises SandboxError with what it reports, after its end."""
    server = pid
    text = b""
    if state.plan.mode == "namespace":
        text = os.read(report, 4096)  # the answer of the process between: a number, or a failure
        os.waitpid(pid, 0)
        # Now the server is our child, and not before: what it ties to its parent from here on is tied to us.
        server = int(text[1:]) if text.startswith(b"P") else -1
    if server >= 0:
        _go(lifeline)
        text = process.read_all(report)
        if text == b"R":
            return server
    os.close(lifeline)
    if server >= 0:
        os.waitpid(server, 0)
    if text.startswith(b"E"):
        raise _unpack(text[1:])
    mode = state.plan.mode
    raise SandboxError(errno.EIO, f"the server died on its way into --sandbox {mode}", _ALTERNATIVES[mode])


def _pass_on(server: int, held: set[int]) -> int:
    """Wait for the server, pass signals on to it, and give its status."""
    import signal

    while True:
        info = signal.sigwaitinfo(held)
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(server, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            continue
        # Also what a terminal sends to its whole process group: the server has left that.
        os.kill(server, info.si_signo)


def _set_mask(before: set[int]) -> None:
    import signal

    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _go(lifeline: int) -> None:
    try:
        os.write(lifeline, b"g")
    except BrokenPipeError:
        pass  # it has ended, and why is known by other ways


def _await_go(state: _State) -> None:
    if not os.read(state.lifeline, 1):
        os._exit(1)  # the waiter has ended: nobody is there to serve for


def _namespaces(state: _State) -> None:
    plan = state.plan
    os.fchdir(state.shared) if state.shared >= 0 else os.chdir("/")
    ids = userns.Plan(plan.uids, plan.gids, new_user=plan.new_user, helpers=plan.helpers)
    # The working directory moves along, into the copy of its mount in the new namespace: no path is looked up again.
    userns.enter(ids, syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC)
    server = os.fork()
    if server:
        os.write(state.report, b"P%d" % server)
        os._exit(0)
    _await_go(state)


def _ids(state: _State) -> None:
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


def _groups(state: _State) -> None:
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


def _umask(state: _State) -> None:
    os.umask(0)


def _session(state: _State) -> None:
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


def _descriptors(state: _State) -> None:
    state.call("serving")
    process.close_inherited_fds({0, 1, 2, state.report, state.lifeline, state.shared, *state.keep})


def _proc(state: _State) -> None:
    if state.plan.mode == "chroot":
        state.proc = os.open(PROC, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return
    flags = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC
    # Mounted nowhere: a copy of the mount whose root is this directory, so that its `..` is itself. A fresh mount of
    # proc would need one that is visible in full, which containers do not have (mount_namespaces(7)).
    state.proc = syscalls.open_tree(syscalls.AT_FDCWD, PROC, flags)


def _root(state: _State) -> None:
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


def _modules(state: _State) -> None:
    """Have the interpreter look into its own binary only for what it has not loaded.

    All places that it would look into will lie inside the new root, and so belong to the guest: the path of a module
    that nobody has imported in time would be a way to run code. The C library has one such case too: the first thread
    that ends by pthread_exit(3) loads libgcc_s.
    """
    import ctypes
    import sys
    from importlib.machinery import BuiltinImporter, FrozenImporter

    if state.plan.mode != "none":
        try:
            ctypes.CDLL("libgcc_s.so.1")
        except OSError:
            pass  # another C library, which does not load it either
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter]
    sys.path_importer_cache.clear()


def _directory(state: _State) -> None:
    if state.proc >= 0:
        os.fchdir(state.proc)
    else:
        os.chdir("/")


def _no_new_privs(state: _State) -> None:
    syscalls.set_no_new_privs()


def _capabilities(state: _State) -> None:
    if not caps.drop(state.plan.keep):
        state.entered.notes.append(
            "the capability bounding set stays as it is, for want of CAP_SETPCAP; no_new_privs closes that way"
        )


def _memory(state: _State) -> None:
    # RLIMIT_CORE does not count for a core_pattern that is a pipe (core(5)). A process finds its own /proc/self/fd
    # nevertheless, and its parent may still signal it.
    syscalls.set_dumpable(False)


def _parent(state: _State) -> None:
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


def _landlock(state: _State) -> None:
    plan = state.plan
    access = landlock.READ_WRITE if plan.writable else landlock.READ_ONLY
    landlock.restrict(plan.landlock, ((state.entered.root, access),) if state.entered.root >= 0 else ())


def _seccomp(state: _State) -> None:
    state.call("seccomp")


_ACTIONS: dict[str, Callable[[_State], None]] = {
    "imports": _imports,
    "limits": _limits,
    "wait": _wait,
    "namespaces": _namespaces,
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
