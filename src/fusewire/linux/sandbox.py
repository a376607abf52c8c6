"""What a sandbox is: a list of steps that can be printed, compared and tested without any privilege.

Layer: linux. Here it is decided what will be done, and with what; `sandbox_enter` does it. Nothing changes here but
that `plan("auto")` has a child process try which mode can be had.

namespace   own mount, PID, network and IPC namespace, and a user namespace for who has no CAP_SYS_ADMIN. The root is
            the shared directory, nothing else is mounted.
chroot      the root is the shared directory. Takes CAP_SYS_CHROOT only: what a container without CAP_SYS_ADMIN leaves.
none        the root stays as it is.

Every mode gives up capabilities, groups, descriptors and core dumps, and Landlock comes on top where it can.

A server of a directory reaches what its descriptors stand for by their names in /proc/self/fd, for which the
system has no other way (setxattr(2) and its like before Linux 6.13). In the two modes with a root of their own there is
no /proc: the working directory is /proc/self/fd, and the path of descriptor 7 is `7`. In `namespace` it is a mount of
nothing else, whose `..` is itself. In `chroot` it is the machine's, and its `..` leads out of the root: a guest's names
never hold a `..`, but whoever has the server execute code of his own gets out. Landlock lets him open nothing there;
what it does not see (chmod(2), chown(2), setxattr(2) by path) a server that is root can still do.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux import capabilities as caps
from fusewire.linux import landlock as ll
from fusewire.linux import syscalls
from fusewire.linux.sandbox_plan import Plan, SandboxError, Step
from fusewire.linux.userns import IdMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MODES = ("namespace", "chroot", "none")
_MAPPINGS = 340  # lines of a uid_map, user_namespaces(7)


class Asked:
    """What a plan is made for: the caller's wishes and rights, checked as far as they do not depend on the mode."""

    __slots__ = (
        "abi",
        "changes",
        "child",
        "effective",
        "egid",
        "euid",
        "executes",
        "gid_map",
        "handles",
        "landlock",
        "landlock_missing",
        "permitted",
        "readable",
        "rlimit_nofile",
        "shared",
        "uid_map",
        "writable",
    )

    abi: int
    changes: tuple[tuple[str, bool], ...]
    child: bool
    effective: int
    egid: int
    euid: int
    executes: bool
    gid_map: tuple[IdMap, ...]
    handles: bool
    landlock: str
    landlock_missing: str
    permitted: int
    readable: tuple[bytes, ...]
    rlimit_nofile: int | None
    shared: bytes | int | None
    uid_map: tuple[IdMap, ...]
    writable: bool

    def may(self, capability: int) -> bool:
        """True if the capability is effective now."""
        return bool(self.effective >> capability & 1)


def plan(
    mode: str,
    *,
    shared: bytes | int | None,
    euid: int | None = None,
    egid: int | None = None,
    capabilities: syscalls.Capabilities | None = None,
    uid_map: Iterable[tuple[int, int, int]] = (),
    gid_map: Iterable[tuple[int, int, int]] = (),
    modcaps: str | Iterable[tuple[str, bool]] = (),
    handles: bool = False,
    landlock: str = "auto",
    landlock_abi: int | None = None,
    rlimit_nofile: int | None = None,
    writable: bool = True,
    readable: Iterable[bytes] = (),
    executes: bool = False,
    child: bool = False,
    attempt: Callable[[Plan], SandboxError | None] | None = None,
) -> Plan:
    """The steps into a mode: namespace, chroot, none, or auto for the first of these that works.

    shared: the directory to serve (a descriptor of it may be O_PATH); None for the server of an image. euid, egid,
    capabilities, landlock_abi: those of this process and kernel, if they are not given. uid_map, gid_map: (inside,
    outside, count) of the user namespace. modcaps: `+x:-y`, or pairs of a name and whether to keep it. handles: file
    handles will be opened. landlock: auto, require or off. rlimit_nofile: how many descriptors may be open; None
    leaves it. writable: False takes writing from Landlock's rule too. readable: directories outside that can be read in
    spite of Landlock, where there is a way to them. executes: for a mount with backing files (FUSE_PASSTHROUGH), which
    the kernel opens with the rights of who registered them, also for exec. child: plan for `sandbox_enter.start`.
    attempt: how auto finds out, `sandbox_enter.probe`.

    Raises SandboxError for a mode that cannot be had, with what can; ValueError for options that make no sense.
    """
    if mode not in (*MODES, "auto"):
        raise ValueError(f"there is no sandbox {mode!r}: auto, or one of {', '.join(MODES)}")
    if landlock not in ("auto", "require", "off"):
        raise ValueError(f"landlock is auto, require or off, and not {landlock!r}")
    asked = Asked()
    asked.shared = shared
    asked.euid = os.geteuid() if euid is None else euid
    asked.egid = os.getegid() if egid is None else egid
    own = syscalls.capget() if capabilities is None else capabilities
    asked.effective, asked.permitted = own.effective, own.permitted
    asked.uid_map = _checked("uid-map", uid_map)
    asked.gid_map = _checked("gid-map", gid_map)
    asked.changes = caps.parse_changes(modcaps) if isinstance(modcaps, str) else tuple(modcaps)
    asked.handles, asked.writable, asked.rlimit_nofile = handles, writable, rlimit_nofile
    asked.readable, asked.executes, asked.child = tuple(readable), executes, child
    asked.landlock = landlock
    asked.landlock_missing = ""
    if landlock == "off":
        asked.abi = 0
    elif landlock_abi is None:
        asked.abi = ll.abi()
        asked.landlock_missing = ll.missing()
    else:
        asked.abi = landlock_abi
        asked.landlock_missing = "" if landlock_abi else "this kernel has no Landlock"
    if mode != "auto":
        return _build(mode, asked)
    return _strongest(asked, attempt)


def _strongest(asked: Asked, attempt: Callable[[Plan], SandboxError | None] | None) -> Plan:
    if attempt is None:
        from fusewire.linux.sandbox_enter import probe

        attempt = probe
    refused: list[tuple[str, str]] = []
    for mode in MODES:
        if mode != "namespace" and (asked.uid_map or asked.gid_map):
            break
        try:
            found = _build(mode, asked)
        except SandboxError as error:
            refused.append((mode, str(error.strerror)))
            continue
        refusal = attempt(found)
        if refusal is None:
            found.refused = refused
            return found
        if refusal.errno in (errno.EAGAIN, errno.ENOMEM):
            raise refusal  # which says nothing of the mode, and will pass
        refused.append((mode, str(refusal.strerror)))
    raise SandboxError(
        errno.EPERM,
        "no sandbox can be had: " + "; ".join(f"{mode}: {reason}" for mode, reason in refused),
        "--uid-map and --gid-map take --sandbox namespace" if asked.uid_map or asked.gid_map else "",
    )


def _checked(option: str, lines: Iterable[tuple[int, int, int]]) -> tuple[IdMap, ...]:
    """The lines of a map. Raises ValueError for those that the kernel would refuse without saying why."""
    maps = tuple(IdMap(*line) for line in lines)
    if len(maps) > _MAPPINGS:
        raise ValueError(f"--{option}: {len(maps)} ranges, and the kernel takes {_MAPPINGS}")
    for one in maps:
        if one.count < 1:
            raise ValueError(f"--{option} :{one.inside}:{one.outside}:{one.count}: is for no id")
    for side in ("inside", "outside"):
        taken = sorted((getattr(one, side), one.count) for one in maps)
        end = 0
        for first, count in taken:
            if first < end:
                raise ValueError(f"--{option}: {side} of the namespace, id {first} is in two ranges")
            end = first + count
    return maps


def _build(mode: str, asked: Asked) -> Plan:
    result = Plan(mode, asked.shared)
    result.writable, result.rlimit_nofile = asked.writable, asked.rlimit_nofile
    result.child, result.executes = asked.child, asked.executes
    if mode == "none":
        result.readable = asked.readable
    if mode != "namespace" and (asked.uid_map or asked.gid_map):
        raise ValueError("--uid-map and --gid-map are for the user namespace of --sandbox namespace")
    if mode == "namespace":
        _plan_ids(result, asked)
    elif mode == "chroot" and not asked.may(syscalls.CAP_SYS_CHROOT):
        raise SandboxError(
            errno.EPERM,
            "chroot(2) takes CAP_SYS_CHROOT, which this process does not have",
            "start it with that capability, or use --sandbox namespace, or --sandbox none --landlock require, which "
            "takes no privilege",
            "root",
        )
    permitted = caps.ALL if result.new_user else asked.permitted
    # Who serves an image reads descriptors that are open: that takes none.
    usual = 0 if asked.shared is None else caps.KEPT
    result.keep = caps.wanted(asked.changes, permitted, handles=asked.handles, usual=usual)
    _plan_landlock(result, asked)
    _add_notes(result, asked)
    result.steps = tuple(_steps(result))
    return result


def _plan_ids(result: Plan, asked: Asked) -> None:
    if asked.may(syscalls.CAP_SYS_ADMIN):
        if asked.uid_map or asked.gid_map:
            raise ValueError(
                "--uid-map and --gid-map are for who has no CAP_SYS_ADMIN: root makes no user namespace and has all "
                "ids; leave them out, or start it as another user"
            )
        return
    result.uids = asked.uid_map or (IdMap(asked.euid, asked.euid),)
    result.gids = asked.gid_map or (IdMap(asked.egid, asked.egid),)
    for maps, own in ((result.uids, asked.euid), (result.gids, asked.egid)):
        if len(maps) > 1 or maps[0].count > 1 or maps[0].outside != own:
            result.helpers = True


def _plan_landlock(result: Plan, asked: Asked) -> None:
    if asked.landlock == "off":
        return
    reason = asked.landlock_missing
    if not reason and asked.shared is not None:
        if asked.writable and asked.abi < ll.MOVES_FILES:
            reason = "this kernel's Landlock (ABI 1) would refuse every rename into another directory"
        elif asked.handles:
            # A file that is opened by its handle need not hang in the tree, and what does not is refused.
            reason = "files opened by handle would be refused"
    if not reason:
        result.landlock = asked.abi
    elif asked.landlock == "require":
        raise SandboxError(
            errno.EOPNOTSUPP,
            f"--landlock require: {reason}",
            "do without file handles (--inode-file-handles=never)"
            if asked.abi >= ll.MOVES_FILES
            else "use --landlock auto with --sandbox namespace or chroot",
            "landlock",
        )
    else:
        result.notes.append(f"no Landlock: {reason}")


def _add_notes(result: Plan, asked: Asked) -> None:
    note = result.notes.append
    if result.mode == "chroot":
        note(
            "chroot is less than namespace: mounts, processes and the network stay those of the machine or container, "
            "so it counts on the seccomp filter and on whoever made that container"
        )
        if result.shared is not None and not result.landlock:
            note(
                "its working directory /proc/self/fd lies outside of the root: only the checks of names and the "
                "seccomp filter keep the server inside; Landlock would"
            )
    elif result.new_user and sum(one.count for one in result.uids) == 1 and asked.may(syscalls.CAP_CHOWN):
        note(
            "one user id only: files of others cannot be served; --sandbox chroot keeps this process's rights over them"
        )
    elif not result.confined:
        note("not confined to the shared directory: every file that this user may open can be reached")
    lacking = caps.wanted(_removals(asked), caps.ALL) & ~asked.permitted
    if lacking and not result.new_user and result.shared is not None:
        note(f"capabilities that are not there to keep: {', '.join(caps.names(lacking))}")
    if result.keep & caps.HANDLES:
        note("file handles (dac_read_search) reach every file of the filesystem that the shared directory is on")


def _removals(asked: Asked) -> list[tuple[str, bool]]:
    return [change for change in asked.changes if not change[1]]


def waits(result: Plan) -> bool:
    """True if a process outside waits for the server. It is what can still remove what was made there."""
    return result.confined or result.child


def _steps(result: Plan) -> Iterable[Step]:
    files = result.shared is not None
    yield Step("imports", "import what serving takes", "from inside there is no library to load")
    yield Step(
        "limits", _limits(result), "a core dump holds the guest's memory; descriptors run out here, not elsewhere"
    )
    if waits(result):
        yield Step("wait", *(_STAYS if result.child else _WAITS))
    if result.mode == "namespace":
        yield Step("namespaces", _namespaces(result), "no mounts, processes, networks and queues but its own to act on")
    if result.new_user:
        yield Step("ids", "become id 0 of the user namespace if that is mapped", "files belong to ids that are mapped")
    yield Step("groups", "drop the supplementary groups", "no file is reached or made by a group of the starter's")
    yield Step("umask", "set the umask to 0", "the modes of files are the guest's to choose")
    if waits(result):
        yield Step("session", "leave the session, input from /dev/null", "no terminal to push keystrokes into")
    yield Step("descriptors", "close every descriptor but those needed", "an open directory outside is a way outside")
    if result.confined:
        yield Step("modules", "load no module or library any more", "a file of the guest's would be run as a module")
    if result.mode != "none":
        if files:
            yield Step("proc", _PROC[result.mode], "the server opens again what its descriptors stand for")
        yield Step("root", _root(result), "a path leads to the shared directory or to nothing")
    elif files:
        yield Step("root", "open the shared directory", "the server begins there")
    yield Step("directory", _directory(result), "descriptors have short names there" if files else "nothing is there")
    yield Step("no_new_privs", "set no_new_privs", "no set-user-ID program and no file capability gives anything back")
    kept = ", ".join(caps.names(result.keep)) or "none"
    yield Step("capabilities", f"keep {kept}; drop all others from every set", "what serving files takes, and no more")
    yield Step("memory", "make the process undumpable", "its memory is the guest's: no core dump, no debugger")
    if waits(result):
        yield Step("parent", "end with the waiting process", "no server is left behind whom nobody knows")
    if result.landlock:
        yield Step("landlock", _landlock(result), "other files cannot be opened whatever way leads to them")
    # After the capabilities, unlike virtiofsd: with no_new_privs a filter takes none, and need not allow to drop them.
    yield Step("seccomp", "load the system call filter", "what serving does not call, nobody calls")


_WAITS = (
    "fork; this process stays outside without capabilities, passes signals in and the exit status out",
    "the socket and the pid file are removed by somebody who has never read a guest's byte",
)
_STAYS = (
    "fork; this process stays outside as it is",
    "what was made outside is removed by somebody who has never read a request",
)
_PROC = {
    "namespace": "keep /proc/self/fd, as a mount of nothing else",
    "chroot": "keep /proc/self/fd open",
}


def _limits(result: Plan) -> str:
    text = "RLIMIT_CORE 0"
    return text if result.rlimit_nofile is None else f"{text}, RLIMIT_NOFILE {result.rlimit_nofile}"


def _namespaces(result: Plan) -> str:
    text = "new mount (slave), PID, network and IPC namespace"
    if not result.new_user:
        return text
    maps = "; ".join(
        f"{what} " + ", ".join(f"{one.inside}={one.outside}" + f"+{one.count}" * (one.count > 1) for one in maps)
        for what, maps in (("uid", result.uids), ("gid", result.gids))
    )
    return f"{text} in a new user namespace ({maps}{', by newuidmap and newgidmap' if result.helpers else ''})"


def _root(result: Plan) -> str:
    if result.mode == "namespace":
        if result.shared is None:
            return "pivot_root to an empty read-only tmpfs, detach everything else"
        return "bind-mount the shared directory with all below it, pivot_root to it, detach everything else"
    return (
        "chroot to an empty directory that has no name" if result.shared is None else "chroot to the shared directory"
    )


def _directory(result: Plan) -> str:
    in_proc = result.mode != "none" and result.shared is not None
    return "work in /proc/self/fd" if in_proc else "work in /"


def _landlock(result: Plan) -> str:
    below = "no file at all"
    if result.shared is not None:
        below = "files below the shared directory" + ("" if result.writable else ", for reading,") + " only"
        if result.readable:
            below += f" ({', '.join(map(os.fsdecode, result.readable))} for reading)"
    parts = [below]
    _, net, scoped = ll.handled(result.landlock)
    if net:
        parts.append("no TCP")
    if scoped:
        parts.append("no abstract sockets, no signals to processes outside")
    return f"Landlock ABI {result.landlock}: {', '.join(parts)}"
