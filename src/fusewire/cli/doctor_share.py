"""`fusewire doctor --share DIR`: which sandboxes a share of DIR can have here, what each protects, what is missing.

Layer: cli. What a mode is, and which one `--sandbox auto` takes, is decided in `linux.sandbox`; here each one is
entered for real, in processes that end at once, filter included. Nothing is written into DIR but to a file without a
name, and nothing is left behind. DIR may be an image; what hangs is given up after a deadline.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from fusewire.cli.doctor import BAD, OK, UNKNOWN, WARNING, Probe, Row, check_ranges, say
from fusewire.cli.listing import shown
from fusewire.cli.trials import DEADLINE, Outcome, attempt
from fusewire.fs import sources
from fusewire.linux import capabilities as caps
from fusewire.linux import files, landlock, mountinfo, process, sandbox, sandbox_enter, seccomp_filter, syscalls, userns
from fusewire.linux.sandbox_plan import Plan, SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.linux.sandbox_steps import Entered

_FILTER = "kill"  # the action that a share has unless it is told otherwise
_MOST_DESCRIPTORS = 1_000_000  # what a share asks for
_RESERVE = 16384  # files that a guest should leave to the rest of the machine
_WIDTH = 90  # letters of what is explained in a line
_FEW = 4096  # descriptors: fewer are soon felt, more are not
_XATTRS = {"user.": "user.fusewire", "POSIX ACLs": "system.posix_acl_access", "security.": "security.capability"}
_GUARDS = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}

# What each version of Landlock can refuse that the one before could not.
_LANDLOCK = ("files", "moves between directories", "truncating", "TCP", "ioctl on devices", "signals, abstract sockets")

# What is lost without a capability. {uid}, {gid}: what the daemon is then.
_COSTS = (
    (1 << syscalls.CAP_SETUID | 1 << syscalls.CAP_SETGID, "whatever the guest makes belongs to uid {uid}, gid {gid}"),
    (1 << syscalls.CAP_CHOWN, "files cannot be given to other owners"),
    (1 << syscalls.CAP_DAC_OVERRIDE, "files that uid {uid} may not open are closed to the guest's root too"),
    (1 << syscalls.CAP_FOWNER, "modes, times and attributes of other owners' files stay as they are"),
    (1 << syscalls.CAP_FSETID, "set-group-ID bits get lost on files of groups that the daemon is not in"),
    (1 << syscalls.CAP_MKNOD, "device nodes cannot be made"),
    (1 << syscalls.CAP_SETFCAP, "file capabilities (security.capability) cannot be set"),
)
# Where there is one id there is nobody else to act for; these two count for the own files.
_OWN_FILES = 1 << syscalls.CAP_FSETID | 1 << syscalls.CAP_SETFCAP
_OTHER_MODES = re.compile("(; or |, or |^)use --sandbox ")


def examine(source: str, seconds: float = DEADLINE) -> dict[str, Any]:
    """Look at DIR or an image and try each mode: what `--json` prints.

    `sandbox` is what `--sandbox auto` takes, `use` the strongest confined mode that can serve DIR, either None if there
    is none; `ok` says whether there is one. Raises OSError that names what cannot be shared at all, and the way out.
    """
    facts = _facts(source, seconds)
    fd = _open(source)
    try:
        if facts["kind"] != ("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "image"):
            raise OSError(errno.ESTALE, f"{source} was replaced by something else meanwhile; look again")
        shared, image = (fd, -1) if facts["kind"] == "directory" else (None, fd)
        seccomp = check_seccomp(seconds)
        plans, outcomes = {}, {}
        for mode in sandbox.MODES:
            try:
                plans[mode] = sandbox.plan(mode, shared=shared)
                outcomes[mode] = _try(plans[mode], image, seccomp.verdict == OK, seconds)
            except SandboxError as error:
                outcomes[mode] = Outcome(False, str(error.strerror), error.remedy)
        modes = [_mode(mode, plans.get(mode), outcomes[mode], facts) for mode in sandbox.MODES]
        chosen = _auto(shared, outcomes)
        rows = [seccomp, check_landlock(chosen), check_capabilities(chosen, shared is None, outcomes["chroot"].ok)]
        rows += [check_ids(shared, image, seconds), check_descriptors(seconds)]
        rows += look_at_source(facts, chosen)
    finally:
        os.close(fd)
    usable = [mode["name"] for mode in modes if mode["confined"] and mode["readable"]]
    return {
        "source": facts["path"],
        "kind": facts["kind"],
        "modes": modes,
        "checks": [row.as_dict() for row in rows],
        "sandbox": chosen.mode if chosen else None,
        "landlock": chosen.landlock if chosen else 0,
        "seccomp": seccomp.verdict == OK,
        "use": usable[0] if usable else None,
        "ok": bool(usable),
    }


# --- DIR or the image


def _open(source: str) -> int:
    """Open what is to be shared, as a share does. Raises OSError that names it, and the way out."""
    if not source:
        raise OSError(errno.EINVAL, "--share has no name; give a directory or an image that is there")
    try:
        return sources.open_fd(os.path.abspath(source))
    except OSError as error:
        raise _cannot(source, error.errno or errno.EIO) from error


def _cannot(source: str, number: int) -> OSError:
    """What is said of a source that may not be opened or is not there: with the way out."""
    way_out = "name a directory or an image that is there"
    if number in (errno.EACCES, errno.EPERM):
        path = closed = os.path.abspath(source)
        while (above := os.path.dirname(closed)) != closed and not os.access(above, os.X_OK, effective_ids=True):
            closed = above
        right = "x" if closed != path else "rx" if os.path.isdir(path) else "r"
        way_out = f"ask for `setfacl -m u:{os.geteuid()}:{right} {closed}`, or start the share as its owner"
    return OSError(number, f"{source} cannot be shared: {os.strerror(number)}; {way_out}")


def _facts(source: str, seconds: float) -> dict[str, Any]:
    """What can be seen of DIR from outside; in a child, for who asks a filesystem without a server waits for ever."""
    from json import dumps, loads

    found = attempt(lambda: dumps(_inspect(source)), seconds)
    if not found.ok:
        gone = f"{source} cannot be looked at: {found.text}; is its server or its network gone?"
        raise OSError(errno.EIO, gone if found.text.startswith("the trial") else found.text)
    facts: dict[str, Any] = loads(found.text)
    return facts


def _inspect(source: str) -> dict[str, Any]:
    fd = _open(source)
    path = os.readlink(f"/proc/self/fd/{fd}")
    facts: dict[str, Any] = {"path": path}
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        from fusewire.cli.options import MountOptions

        try:
            sources.open_opened(fd, source, MountOptions()).destroy()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; name a directory or an image that is whole") from error
        return facts | {"kind": "image"}
    try:
        opened = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except OSError as error:
        raise _cannot(source, error.errno or errno.EIO) from error
    flags = os.statvfs(fd).f_flag
    writable = os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True)
    facts |= {
        "kind": "directory",
        "read_only": bool(flags & os.ST_RDONLY),
        "missing": [name for name, flag in _GUARDS.items() if not flags & flag],
        "writable": writable,
        "tmpfile": _make_nameless(fd) if writable else None,
        "xattrs": {word: _knows(opened, name) for word, name in _XATTRS.items()},
        "handles": _by_handle(fd, opened),
        "mount": None,
    }
    text = mountinfo.read()
    mount = mountinfo.by_id(mountinfo.id_of_fd(fd) or -1, text)
    if mount is not None:  # a chroot hides it
        facts["mount"] = [os.fsdecode(word) for word in (mount.fstype, mount.source, mount.mount_point)]
    inside = os.fsencode(path.rstrip("/") + "/")
    below = [one for one in mountinfo.parse(text) if one.mount_point.startswith(inside)]
    guards = {name.encode() for name in _GUARDS}
    facts["below"] = [os.fsdecode(one.mount_point) for one in below if not guards.issubset(one.options.split(b","))]
    return facts


def _make_nameless(directory: int) -> str:
    """Make a file that never gets a name and is gone at the end of this call; what went wrong, or nothing."""
    how = os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
    try:
        os.close(os.open(".", how, 0o600, dir_fd=directory))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _knows(opened: int, name: str) -> bool | None:
    """True if the filesystem has such attributes, whether this one is there or not; None if nobody says."""
    try:
        os.getxattr(opened, name)
    except OSError as error:
        return {errno.ENODATA: True, errno.EOPNOTSUPP: False}.get(error.errno or 0)
    return True


def _by_handle(fd: int, opened: int) -> str:
    """Open DIR by its file handle; what went wrong, or nothing."""
    try:
        handle, _ = files.name_to_handle(fd, b"", files.AT_EMPTY_PATH)
    except OSError as error:
        return "this filesystem has none" if error.errno == errno.EOPNOTSUPP else str(error.strerror)
    try:
        os.close(files.open_by_handle(opened, handle, os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        return str(error.strerror)
    return ""


def look_at_source(facts: dict[str, Any], chosen: Plan | None) -> list[Row]:
    """The rows about DIR; `chosen` is the sandbox that a share of it would have."""
    if facts["kind"] == "image":
        return [Row("image", OK, "can be read here; it is shared read-only")]
    place = "{} ({}), mounted at {}".format(*facts["mount"]) if facts["mount"] else "a mount that cannot be seen"
    rights = "may be read and written"
    if facts["read_only"]:
        rights = "mounted read-only, so the guest can change nothing"
    elif not facts["writable"]:
        rights = f"uid {os.geteuid()} may not write to it, so neither may the guest"
    return [
        Row("directory", OK, f"on {place}; {rights}"),
        _row_of_guards(facts, chosen),
        _row_of_xattrs(facts),
        _row_of_tmpfile(facts),
        _row_of_handles(facts),
    ]


def _row_of_guards(facts: dict[str, Any], chosen: Plan | None) -> Row:
    """What a guest makes in DIR should count for nothing on the host: the advice of CVE-2020-35517."""
    import shlex

    name, missing, below, path = ",".join(_GUARDS), facts["missing"], facts["below"][:4], facts["path"]
    if not missing and not below:
        return Row(name, OK, "all are set: what a guest makes there counts for nothing on the host")
    if facts["read_only"] and not below:
        return Row(name, OK, "not needed: the guest can make nothing there")
    texts = [f"without {', '.join(missing)}"] if missing else []
    texts += [f"not all are set below it: {', '.join(below)}"] if below else []
    meaning = f"a guest can make set-user-ID programs of uid {os.geteuid()}, which other users of this host could run"
    if chosen is not None and _makes_devices(chosen):
        meaning = (
            "a guest's root can make set-user-ID programs of any user, and device nodes, which count on this host; "
            "without nodev, who runs code in the daemon opens such a device himself"
        )
    elif missing == ["noexec"] and not below:
        meaning = "a guest can leave programs there that users of this host might run"
    how = [f"mount -o remount,bind,{name} {shlex.quote(point)}" for point in ([path] if missing else []) + below]
    if missing and (facts["mount"] is None or facts["mount"][2] != path):
        how.insert(0, f"mount --rbind {shlex.quote(path)} {shlex.quote(path)}")
    whom = "" if syscalls.has_capability(syscalls.CAP_SYS_ADMIN) else "ask the administrator for "
    remedy = f"{whom}`{' && '.join(how)}` (the guest's own programs run nevertheless)"
    return Row(name, WARNING, "; ".join(texts), meaning, remedy)


def _makes_devices(plan: Plan) -> bool:
    """True if code in the daemon could make device nodes: in the first user namespace only, mknod(2)."""
    return bool(plan.keep >> syscalls.CAP_MKNOD & 1) and not plan.new_user and userns.in_first_namespace()


def _row_of_xattrs(facts: dict[str, Any]) -> Row:
    name, known = "extended attributes", facts["xattrs"]
    here = ", ".join(word for word, answer in known.items() if answer) or "none"
    lacking = ", no ".join(word for word, answer in known.items() if answer is False)
    if not lacking:
        verdict = UNKNOWN if None in known.values() else OK
        return Row(name, verdict, here, "what is not listed shows only when it is tried")
    remedy = "share a directory on ext4, xfs, btrfs, or tmpfs from Linux 6.6 on, if the guest needs them"
    return Row(name, WARNING, f"{here}; this filesystem has no {lacking}", "the guest gets EOPNOTSUPP", remedy)


def _row_of_tmpfile(facts: dict[str, Any]) -> Row:
    name, problem = "O_TMPFILE", facts["tmpfile"]
    if not problem:
        return Row(name, OK, "works" if problem == "" else "not needed: nothing can be made there")
    meaning = "programs in the guest that make files without a name get that answer; most have another way"
    return Row(name, WARNING, problem, meaning, "share a directory on another filesystem if one needs it")


def _row_of_handles(facts: dict[str, Any]) -> Row:
    name = "file handles"
    if not facts["handles"]:
        return Row(name, OK, "--inode-file-handles works; it takes Landlock's place, which cannot go with it")
    meaning = "only --inode-file-handles needs them; without, a file just moved on the host may be looked up twice"
    remedy = "they take CAP_DAC_READ_SEARCH as root of the machine, and ext4, xfs, btrfs or tmpfs"
    return Row(name, WARNING, facts["handles"], meaning, remedy)


# --- the modes


def _try(plan: Plan, image: int, filtered: bool, seconds: float) -> Outcome:
    """Enter a sandbox, with the filter if that can be had, and look from inside whether DIR can be used there."""
    return attempt(lambda: _enter(plan, image, filtered), seconds)


def _enter(plan: Plan, image: int, filtered: bool) -> str:
    from json import dumps, loads

    def inside(writer: int) -> int:
        try:
            entered = sandbox_enter.enter(
                plan,
                keep={writer} if image < 0 else {writer, image},
                imports=seccomp_filter.import_all,
                seccomp=(lambda: seccomp_filter.load(_FILTER)) if filtered else None,
            )
        except sandbox_enter.ServerEnded as ended:  # this is the process that waits outside
            return ended.code if isinstance(ended.code, int) else 1
        except SandboxError as error:
            os.write(writer, dumps({"refused": error.strerror, "remedy": error.remedy}).encode())
            return 1
        os.write(writer, dumps(_look_around(entered, image)).encode())
        return 0

    answer, status = process.in_child(inside)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise OSError(errno.EIO, f"the trial of --sandbox {plan.mode} died ({code}), see the kernel log")
    found = loads(answer)
    if "refused" in found:
        reason = found["refused"].removeprefix(f"--sandbox {plan.mode} cannot be had here, ")
        raise SandboxError(errno.EPERM, reason, found["remedy"].replace(", or use fusermount3", ""))  # that mounts
    return dumps(found | {"filtered": filtered})


def _look_around(entered: Entered, image: int) -> dict[str, Any]:
    """In the sandbox: can DIR be read, and written to? It is only opened: reading would set its time of access."""
    found: dict[str, Any] = {"notes": entered.notes, "unreadable": "", "writable": False}
    try:
        if image >= 0:
            os.pread(image, 1, 0)
            return found
        os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=entered.root))
    except OSError as error:
        found["unreadable"] = error.strerror
    found["writable"] = os.access(".", os.W_OK | os.X_OK, dir_fd=entered.root, effective_ids=True)
    return found


def _auto(shared: int | None, outcomes: dict[str, Outcome]) -> Plan | None:
    """What `--sandbox auto` takes, after what was tried here."""

    def attempted(plan: Plan) -> SandboxError | None:
        outcome = outcomes[plan.mode]
        return None if outcome.ok else SandboxError(errno.EPERM, outcome.text, outcome.remedy)

    try:
        return sandbox.plan("auto", shared=shared, attempt=attempted)
    except SandboxError:
        return None


def _mode(mode: str, plan: Plan | None, outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    """A mode for JSON: what became of the trial, and what it means."""
    remedy = _OTHER_MODES.split(outcome.remedy)[0] or outcome.remedy  # how it goes with those is said beside
    row: dict[str, Any] = {"name": mode, "ok": outcome.ok, "finding": outcome.text, "remedy": remedy}
    row |= {"confined": False, "readable": False, "writable": False, "landlock": 0, "ids": None, "keeps": []}
    row |= {"protects": "", "leaves": "", "costs": [], "notes": []}
    if not outcome.ok or plan is None:
        return row
    from json import loads

    found = loads(outcome.text)
    parts = [f"with Landlock (ABI {plan.landlock})" if plan.landlock else "without Landlock"]
    if not found["filtered"]:
        parts.append("without a filter of system calls")
    if plan.new_user:
        row["ids"] = {"uid": plan.uids[0].outside, "gid": plan.gids[0].outside}
        parts.append(f"in a user namespace of uid {row['ids']['uid']} and gid {row['ids']['gid']} alone")
    if found["unreadable"]:
        parts.append(f"but the directory cannot be read inside: {found['unreadable']}")
    elif facts.get("writable") and not found["writable"]:
        parts.append("but the directory cannot be written to inside, for its owner or group has no id there")
    image = facts["kind"] == "image"
    devices = not image and _makes_devices(plan) and "nodev" in facts["missing"]
    return row | {
        "finding": ", ".join(parts),
        "confined": plan.confined,
        "readable": not found["unreadable"],
        "writable": found["writable"],
        "landlock": plan.landlock,
        "keeps": caps.names(plan.keep),
        "protects": _protects(plan, image),
        "leaves": _leaves(plan, image, devices),
        "costs": [] if image else _costs(plan),
        "notes": found["notes"],
    }


def _protects(plan: Plan, image: bool) -> str:
    if plan.mode == "namespace":
        files_part = "no file outside is there" if not image else "no file is there at all"
        return f"{files_part}, nothing else is mounted; no process, network or queue of this machine can be seen"
    if plan.mode == "chroot":
        where = "no path leads out of the share" if not image else "the root is an empty directory that has no name"
        return where + (", and Landlock opens nothing outside whatever leads there" if plan.landlock else "")
    if plan.landlock:
        return f"Landlock: no file {'' if image else 'outside '}can be opened, made, renamed or removed"
    return "nothing by itself: only checked names, and a filter that refuses programs, new sockets and mounts"


def _leaves(plan: Plan, image: bool, devices: bool) -> str:
    """What whoever runs code of his own in the daemon has; the filter is taken to be there."""
    who = f"uid {os.geteuid()}"
    own = "the open image" if image else "the share"
    stays = "mounts, processes and network stay those of this machine or container, with the filter before them"
    # What Landlock does not see: stat(2), chmod(2), chown(2), setxattr(2), utimensat(2).
    unseen = f"changes modes, owners and attributes of files whose names it knows, as {who}; it opens none of them"
    if plan.mode == "namespace":
        text = f"code in the daemon has {own}, the guest's memory, and of the kernel what the filter leaves"
    elif plan.mode == "chroot" and image:
        text = f"{stays}; code in the daemon has {own} and the guest's memory"
    elif plan.mode == "chroot":
        outside = unseen if plan.landlock else f"opens every file that {who} may open"
        text = f"{stays}; code in the daemon gets out by `..` from /proc/self/fd, where it {outside}"
    else:
        text = f"{stays}; code in the daemon {unseen if plan.landlock else f'opens every file that {who} may open'}"
    if devices and plan.mode != "namespace":  # where the share is mounted nodev
        text += "; in the share, which lacks nodev, it can make and open device nodes"
    return text


def _costs(plan: Plan) -> list[str]:
    """What a guest cannot do in this mode that a share by real root lets it do."""
    kept = plan.keep & (_OWN_FILES if _alone(plan) else caps.ALL)
    first = userns.in_first_namespace() and not plan.new_user
    if not first:
        kept &= ~(1 << syscalls.CAP_MKNOD)
    ids = {"uid": os.geteuid(), "gid": os.getegid()}
    found = [text.format(**ids) for mask, text in _COSTS if kept & mask != mask]
    if not first or not syscalls.capget().permitted >> syscalls.CAP_SYS_ADMIN & 1:
        found.append("trusted. attributes cannot be set")
    return found


def _alone(plan: Plan) -> bool:
    """True if there is but one user id where the server is."""
    if plan.new_user:
        return True
    lines = (Probe().read("/proc/self/uid_map") or "0 0 2").splitlines()
    return sum(int(line.split()[2]) for line in lines) < 2


# --- the rows about this machine


def check_seccomp(seconds: float = DEADLINE) -> Row:
    """Tried for real: the filter of a share, with its usual action, in a child."""
    name, needs = "seccomp", "a share does not start without, for code in the daemon could make every system call"

    def work() -> str:
        seccomp_filter.import_all()
        seccomp_filter.load(_FILTER)
        return ""

    try:
        seccomp_filter.program(_FILTER)
    except OSError as error:
        return Row(name, BAD, str(error.strerror), needs, "or share with `--seccomp none`")
    found = attempt(work, seconds)
    if not found.ok:
        return Row(name, BAD, found.text, needs, found.remedy or "share with `--seccomp none`")
    words = (Probe().read("/proc/sys/kernel/seccomp/actions_avail") or "kill_process trap log").split()
    actions = {"kill_process": "kill", "trap": "trap", "log": "log"}
    here = ", ".join(action for word, action in actions.items() if word in words)
    outer = ", besides the one that is in force already" if userns.seccomp_filtered() else ""
    return Row(name, OK, f"libseccomp and the kernel take the filter{outer}; actions: {here}")


def check_landlock(chosen: Plan | None) -> Row:
    """What this kernel's version refuses, or why there is none; the trials have used it."""
    name, version = "Landlock", landlock.abi()
    if chosen is not None and chosen.landlock:
        text = f"ABI {version} refuses: {', '.join(_LANDLOCK[:version])}"
        if version < len(_LANDLOCK):
            text += f"; a newer kernel also {', '.join(_LANDLOCK[version:])}"
        return Row(name, OK, text)
    used = next((note for note in chosen.notes if "Landlock" in note), "") if chosen is not None else ""
    reason = landlock.missing() or used or f"ABI {version}, not used"
    open_to = "but in the sandbox namespace, code in the daemon can open every file of this user's"
    remedy = "Linux 5.19 or later with `landlock` in lsm= at boot; in containers also a profile that allows landlock_*"
    return Row(name, WARNING if chosen is not None and chosen.confined else BAD, reason, open_to, remedy)


def check_capabilities(chosen: Plan | None, image: bool, chroot: bool) -> Row:
    """What is kept of virtiofsd's set in the mode that would be taken; `chroot` says whether that one works."""
    name, meaning = "capabilities", "what that costs is said with the mode"
    if chosen is None:
        return Row(name, UNKNOWN, "no sandbox works, so nothing can be said")
    if image:
        return Row(name, OK, "none is kept: an image needs none")
    text = f"kept: {', '.join(caps.names(chosen.keep)) or 'none'}"
    if lacking := caps.KEPT & ~chosen.keep:
        remedy = "start it with them if the guest needs what they are for"
        return Row(name, WARNING, f"{text}; not there: {', '.join(caps.names(lacking))}", meaning, remedy)
    if _alone(chosen):
        text += f"; they count for files of uid {os.geteuid()} and gid {os.getegid()} only"
        remedy = "map more ids (--uid-map, --gid-map), or start it as root, if the guest needs other owners"
        if chosen.new_user and chroot and syscalls.has_capability(syscalls.CAP_CHOWN):
            remedy = "use --sandbox chroot, where they count for all files, if the guest needs other owners"
        return Row(name, WARNING, text, meaning, remedy)
    if syscalls.has_capability(syscalls.CAP_SYS_ADMIN) and userns.in_first_namespace():
        text += "; trusted. attributes take --modcaps=+sys_admin"
    return Row(name, OK, text)


def check_ids(shared: int | None, image: int, seconds: float = DEADLINE) -> Row:
    """Subordinate ids for --uid-map and --gid-map, tried for real."""
    name, meaning = "id maps", "only --uid-map and --gid-map need them: without, a user namespace has your own id"
    if syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
        return Row(name, OK, "not needed: no user namespace is made, all ids are there")
    row = check_ranges(Probe())
    if row.verdict != OK:
        return Row(name, row.verdict, row.finding, meaning, row.remedy)
    try:
        ranges = userns.ranges_plan(as_root=True)
        uids, gids = ([one.fields() for one in maps] for maps in (ranges.uids, ranges.gids))
        mapped = sandbox.plan("namespace", shared=shared, uid_map=uids, gid_map=gids)
        outcome = _try(mapped, image, False, seconds)
    except userns.UsernsError as error:
        return Row(name, WARNING, f"{error.strerror}: {error.cause}", meaning, error.remedy)
    except SandboxError as error:
        outcome = Outcome(False, str(error.strerror), error.remedy)
    if not outcome.ok:
        return Row(name, WARNING, f"{row.finding}, but: {outcome.text}", meaning, outcome.remedy)
    options = [f"--uid-map=:{one[0]}:{one[1]}:{one[2]}:" for one in uids]
    options += [f"--gid-map=:{one[0]}:{one[1]}:{one[2]}:" for one in gids]
    return Row(name, OK, f"{row.finding}: --sandbox=namespace {' '.join(options)}")


def check_descriptors(seconds: float = DEADLINE) -> Row:
    """RLIMIT_NOFILE as a share gets it, beside fs.file-max, which is for the whole machine: proc_sys_fs(5)."""
    name, most = "descriptors", int(Probe().read("/proc/sys/fs/file-max") or 0)
    found = attempt(lambda: str(_raise_limit()), seconds)
    if not found.ok:
        return Row(name, UNKNOWN, found.text, "so many files a guest can have in use")
    limit = int(found.text)
    text = f"{limit} for the daemon" + (f", fs.file-max={most} for the machine" if most else "")
    if limit < _FEW:
        meaning = "a guest that has more files open at a time gets ENFILE"
        return Row(name, WARNING, text, meaning, "raise the hard limit (`ulimit -Hn`, LimitNOFILE= of systemd)")
    if most and limit + _RESERVE > most:
        meaning = "a guest can take so many that other processes of this machine find none left"
        fewer = max(most - _RESERVE, most // 2)
        return Row(name, WARNING, text, meaning, f"share with `--rlimit-nofile={fewer}`, or raise fs.file-max")
    return Row(name, OK, text)


def _raise_limit() -> int:
    """As a share does it: as far as is allowed, up to a million."""
    import resource

    target = min(_MOST_DESCRIPTORS, int(Probe().read("/proc/sys/fs/nr_open") or _MOST_DESCRIPTORS))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return target if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (target, hard if hard == resource.RLIM_INFINITY else max(hard, target))
        )
    except (OSError, ValueError):
        return hard
    return target


# --- telling


def doctor_share(source: str, json: bool = False) -> int:
    """Print what `examine` finds; the exit status is 0 only if DIR can be shared from some confined sandbox."""
    found = examine(source)
    if json:
        from json import dumps

        print(dumps(found, indent=1))
        return 0 if found["ok"] else 1
    from textwrap import fill

    print(f"{found['kind']} {shown(found['source'])}, each sandbox tried for real:")
    costs_of: dict[str, str] = {}
    for mode in found["modes"]:
        say("works" if mode["ok"] else "fails", f"--sandbox {mode['name']}", mode["finding"])
        say("", "", mode["remedy"], "-> ")
        costs = "; ".join(mode["costs"])
        before = costs_of.setdefault(costs, mode["name"])
        lines = [("protects", mode["protects"]), ("leaves", mode["leaves"])]
        lines.append(("costs", costs if before == mode["name"] or not costs else f"what {before} does"))
        for name, text in [*lines, *(("note", note) for note in mode["notes"])]:
            say("", "", fill(text, _WIDTH, break_on_hyphens=False), f"{name + ':':<10}")
    print()
    for row in found["checks"]:
        say(row["verdict"], row["name"], row["finding"])
        if row["verdict"] != OK:
            say("", "", row["meaning"])
            say("", "", row["remedy"], "-> ")
    print()
    print(_conclusion(found))
    return 0 if found["ok"] else 1


def _conclusion(found: dict[str, Any]) -> str:
    chosen, use = found["sandbox"], found["use"]
    if chosen is None:
        return "fusewire share: no sandbox works here, not even none"
    text = f"fusewire share: --sandbox auto takes {chosen}" + (" with Landlock" if found["landlock"] else "")
    text += "" if found["seccomp"] else ", given --seccomp none"
    if use is None:
        return f"{text}, which does not confine it: whoever takes over the daemon is uid {os.geteuid()} here"
    return text if use == chosen else f"{text}, which cannot read it there: give --sandbox {use}"
