"""`fusewire doctor`: what rootless mounting needs on this machine, what of it is missing, and what to do about it.

Layer: cli. First it looks (each look is a row with a verdict), then it tries each way to mount for real (trials.py).
It changes nothing and leaves nothing behind. The rows can be made from a copied tree as well, for tests.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from fusewire.cli.listing import shown
from fusewire.cli.trials import DEADLINE, attempt, try_mount
from fusewire.linux import fusermount, mount_base, mountinfo, process, syscalls, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

OK, WARNING, BAD, UNKNOWN = "ok", "warning", "bad", "unknown"
_OLDEST = (4, 18)
_CONTAINER = (
    "start the container with a seccomp profile that allows unshare and mount "
    "(docker: --security-opt seccomp=unconfined, or --cap-add SYS_ADMIN), and with --device /dev/fuse"
)
_APPARMOR_PROFILE = """\
abi <abi/4.0>,
include <tunables/global>
profile fusewire {interpreter} flags=(unconfined) {{
  userns,
  include if exists <local/fusewire>
}}"""


class Row:
    """One look: `finding` is the fact, `meaning` what follows from it, `remedy` what to do if it is not ok."""

    __slots__ = ("finding", "meaning", "name", "remedy", "verdict")

    def __init__(self, name: str, verdict: str, finding: str, meaning: str = "", remedy: str = "") -> None:
        self.name = name
        self.verdict = verdict
        self.finding = finding
        self.meaning = meaning
        self.remedy = remedy

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("name", "verdict", "finding", "meaning", "remedy")}


class Probe:
    """Where to look. `root` is put before every path; with another root than "" nothing is tried, only looked at."""

    __slots__ = ("environ", "privileged", "release", "root", "uid")

    def __init__(
        self,
        root: str = "",
        *,
        release: str | None = None,
        uid: int | None = None,
        privileged: bool | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.root = root
        self.release = os.uname().release if release is None else release
        self.uid = os.geteuid() if uid is None else uid
        self.privileged = syscalls.has_capability(syscalls.CAP_SYS_ADMIN) if privileged is None else privileged
        self.environ = os.environ if environ is None else environ

    @property
    def real(self) -> bool:
        """True if this machine itself is looked at."""
        return self.root == ""

    def read(self, path: str) -> str | None:
        """The text of a file, None if it cannot be read."""
        try:
            with open(self.root + path, "rb") as file:
                return file.read().decode(errors="surrogateescape").strip("\0\n ")
        except OSError:
            return None

    @property
    def blocking(self) -> str:
        """The verdict for what stands in the way of user namespaces: who may mount anyway can do without them."""
        return WARNING if self.privileged else BAD


# --- looking


def check_kernel(probe: Probe) -> Row:
    """Linux 4.18 lets the root of a user namespace mount FUSE."""
    numbers = probe.release.replace("-", ".").split(".")
    version = tuple(int(number) for number in numbers[:2] if number.isdigit())
    name = f"Linux {probe.release}"
    if len(version) < 2:
        return Row("kernel", UNKNOWN, name, "this release number is not understood", "compare it with 4.18")
    if version >= _OLDEST:
        return Row("kernel", OK, name, "FUSE can be mounted in user namespaces since Linux 4.18")
    return Row(
        "kernel",
        probe.blocking,
        name,
        "before Linux 4.18 only real root mounts FUSE: neither `run` nor the strategy namespace can work",
        "use fusermount3, or a newer kernel",
    )


def check_device(probe: Probe) -> Row:
    """/dev/fuse has to be the character device 10:229, and to open for reading and writing."""
    path = probe.root + "/dev/fuse"
    need = "every mount speaks to the kernel through /dev/fuse"
    try:
        info = os.stat(path)
    except OSError as error:
        loaded = "nodev\tfuse" in (probe.read("/proc/filesystems") or "").splitlines()
        where = "the kernel has FUSE, so this is a container without the device" if loaded else "the kernel has no FUSE"
        return Row(
            "/dev/fuse",
            BAD,
            f"missing ({error.strerror}); {where}",
            need,
            "start the container with --device /dev/fuse" if loaded else "ask the administrator for `modprobe fuse`",
        )
    if not stat.S_ISCHR(info.st_mode) or info.st_rdev != mount_base.FUSE_DEVICE:
        found = "is not the character device 10:229"
        return Row("/dev/fuse", BAD, found, need, "ask for `rm /dev/fuse && mknod -m 666 /dev/fuse c 10 229`")
    mode = f"mode {stat.S_IMODE(info.st_mode):03o}, user {info.st_uid}, group {info.st_gid}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        remedies = {
            errno.EACCES: "ask for `chmod 666 /dev/fuse`; udev does that where it runs",
            errno.EPERM: "the device rules of the container forbid it: start it with --device /dev/fuse",
            errno.ENODEV: "ask the administrator for `modprobe fuse`",
            errno.ENXIO: "ask the administrator for `modprobe fuse`",
        }
        remedy = remedies.get(error.errno or 0, "ask the administrator what guards it")
        return Row("/dev/fuse", BAD, f"cannot be opened: {error.strerror} ({mode})", need, remedy)
    return Row("/dev/fuse", OK, f"can be opened ({mode})", need)


def check_limits(probe: Probe) -> Row:
    """user.max_user_namespaces and user.max_mnt_namespaces count what one user may have: namespaces(7)."""
    name = "namespace limits"
    found = {kind: probe.read(f"/proc/sys/user/max_{kind}_namespaces") for kind in ("user", "mnt")}
    text = ", ".join(f"user.max_{kind}_namespaces={value}" for kind, value in found.items() if value is not None)
    if "0" in found.values():
        zero = next(kind for kind, value in found.items() if value == "0")
        return Row(
            name,
            probe.blocking,
            text,
            "no user may make such a namespace",
            f"ask the administrator for `sysctl user.max_{zero}_namespaces=10000`",
        )
    if found["user"] is None:
        meaning = "the kernel is built without user namespaces, or /proc/sys is hidden; the trials below tell"
        return Row(name, UNKNOWN, "user.max_user_namespaces is missing", meaning, "use fusermount3 if they fail")
    return Row(name, OK, text, "so many namespaces one user may have")


def check_clone(probe: Probe) -> Row:
    """A setting of Debian's and hardened kernels."""
    name, value = "unprivileged namespaces", probe.read("/proc/sys/kernel/unprivileged_userns_clone")
    if value == "0":
        return Row(
            name,
            probe.blocking,
            "kernel.unprivileged_userns_clone=0",
            "only root may make user namespaces",
            "ask the administrator for `sysctl kernel.unprivileged_userns_clone=1`, or use fusermount3",
        )
    text = "this kernel has no such switch" if value is None else f"kernel.unprivileged_userns_clone={value}"
    return Row(name, OK, text, "ordinary users may make user namespaces, as far as this switch goes")


def check_apparmor(probe: Probe) -> Row:
    """Ubuntu 23.10 and later take the capabilities away inside user namespaces, unless a profile allows `userns`."""
    profile = probe.read("/proc/self/attr/apparmor/current") or probe.read("/proc/self/attr/current") or "unconfined"
    restricted = probe.read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1"
    if not restricted:
        return Row("AppArmor", OK, f"does not restrict user namespaces (profile: {profile})")
    text = f"kernel.apparmor_restrict_unprivileged_userns=1 (profile: {profile})"
    if profile.split(" ")[0] != "unconfined":
        return Row("AppArmor", UNKNOWN, text, "this profile decides; the trials below tell")
    rules = _APPARMOR_PROFILE.format(interpreter=os.path.realpath(sys.executable))
    return Row(
        "AppArmor",
        probe.blocking,
        text,
        "a user namespace can be made and allows nothing inside",
        "use fusermount3, or ask the administrator to write this into /etc/apparmor.d/fusewire and to run "
        "`apparmor_parser -r /etc/apparmor.d/fusewire` (it holds for all programs of this interpreter):\n" + rules,
    )


def check_seccomp(probe: Probe) -> Row:
    """Engines like Docker forbid unshare and mount by a filter; asked with arguments that do nothing."""
    status = probe.read("/proc/self/status") or ""
    mode = next((line.split()[1] for line in status.splitlines() if line.startswith("Seccomp:")), "0")
    if mode == "0":
        return Row("seccomp", OK, "no filter is in force")
    if not probe.real:
        return Row(
            "seccomp", UNKNOWN, "a filter is in force", "what it forbids shows only when it is tried", _CONTAINER
        )
    found = attempt(_forbidden_calls)
    if found.ok and not found.text:
        return Row("seccomp", OK, "a filter is in force, and lets unshare and mount pass")
    calls = found.text if found.ok else "unshare or mount, by killing who calls it"
    if found.ok and "unshare" not in calls:
        meaning = "there are other ways than these calls for most that Fusewire does; the trials below tell"
        return Row("seccomp", WARNING, f"a filter forbids {calls}", meaning, _CONTAINER)
    return Row("seccomp", probe.blocking, f"a filter forbids {calls}", "this is a container's or sandbox's", _CONTAINER)


def _forbidden_calls() -> str:
    missing = b"/nonexistent/fusewire"  # looked up before any right is checked: ENOENT unless a filter answers first
    harmless: dict[str, Callable[[], object]] = {
        "unshare": lambda: syscalls.unshare(0),
        "mount": lambda: syscalls.mount(b"none", missing, b"fuse", 0),
        "umount2": lambda: syscalls.umount2(missing),
    }
    forbidden = []
    for name, call in harmless.items():
        try:
            call()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):
                forbidden.append(name)
    return ", ".join(forbidden)


def check_chroot(probe: Probe) -> Row:
    """unshare(2) refuses a user namespace to a process whose root is not that of its mount namespace."""
    text = probe.read("/proc/self/mountinfo")
    if text is None:
        return Row("chroot", UNKNOWN, "/proc/self/mountinfo cannot be read", "is /proc mounted?", "mount /proc")
    points = [m.mount_point for m in mountinfo.parse(text.encode(errors="surrogateescape"))]
    inside = b"/" not in points
    if probe.real and not inside:
        try:
            same = os.readlink("/proc/1/ns/mnt") == os.readlink("/proc/self/ns/mnt")
            inside = same and not os.path.samefile("/", "/proc/1/root/")
        except OSError:  # only root may look; a chroot onto a mount point shows in the trials
            inside = False
    if not inside:
        return Row("chroot", OK, "not in a chroot, as far as can be seen")
    return Row(
        "chroot",
        probe.blocking,
        "the root directory is not the root of a mount: this is a chroot",
        "no user namespace can be made in a chroot",
        "run outside of it, or enter it with pivot_root (bubblewrap, a container engine) instead of chroot",
    )


def check_helper(probe: Probe) -> Iterator[Row]:
    """The set-user-ID helper: one row for each that is found."""
    if probe.real:
        programs = fusermount.find(probe.environ.get("FUSERMOUNT_PROG"))
    else:
        programs = [path for name in fusermount.NAMES if os.path.exists(path := f"{probe.root}/usr/bin/{name}")]
    if not programs:
        meaning = "not needed where namespaces work"
        yield Row("fusermount3", WARNING, "not installed", meaning, "ask the administrator to install fuse3")
    for program in programs:
        name = os.path.basename(program)
        try:
            if not os.access(program, os.X_OK):
                raise mount_base.RefusedError(errno.EACCES, f"{program} may not be executed", "ask the administrator")
            fusermount.check(program)
            yield Row(name, OK, f"{program} can gain the privilege that it needs")
        except OSError as error:
            remedy = str(getattr(error, "remedy", ""))
            yield Row(name, WARNING, str(error.strerror), "only the strategy fusermount3 needs it", remedy)


def check_fuse_conf(probe: Probe) -> Row:
    """/etc/fuse.conf is read by the helper only: mount.fuse3(8)."""
    path = probe.root + "/etc/fuse.conf"
    try:
        with open(path, errors="replace") as file:
            lines = [line.split("#")[0].strip() for line in file]
    except FileNotFoundError:
        lines = []
    except OSError as error:
        return Row("/etc/fuse.conf", UNKNOWN, f"cannot be read: {error.strerror}", "it limits fusermount3 only")
    limit = next(
        (line.split("=")[1].strip() for line in lines if line.replace(" ", "").startswith("mount_max=")), "1000"
    )
    shared = "user_allow_other" in lines
    text = f"user_allow_other is {'set' if shared else 'not set'}, mount_max is {limit}"
    if limit == "0":
        return Row("/etc/fuse.conf", WARNING, text, "fusermount3 mounts nothing", "ask for a larger mount_max")
    meaning = "-o allow_other works with fusermount3" if shared else "-o allow_other with fusermount3 is for root only"
    return Row("/etc/fuse.conf", OK, text, meaning)


def check_ranges(probe: Probe) -> Row:
    """Subordinate ids for `--map-ranges`: subuid(5), newuidmap(1)."""
    name, meaning = "id ranges", "only `--map-ranges` needs them: without, your own id is mapped"
    names = [str(probe.uid).encode()]
    if probe.real:
        import pwd

        try:
            names.append(pwd.getpwuid(probe.uid).pw_name.encode(errors="surrogateescape"))
        except KeyError:
            pass
    counts = []
    for path in ("/etc/subuid", "/etc/subgid"):
        counts.append(sum(count for _, count in userns.subordinate_ranges(probe.root + path, names)))
        if not counts[-1]:
            remedy = f"ask for `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {names[-1].decode()}`"
            return Row(name, WARNING, f"{path} gives you none", meaning, remedy)
    for helper in ("newuidmap", "newgidmap"):
        program = userns.find_helper(helper) if probe.real else f"{probe.root}/usr/bin/{helper}"
        try:
            if program is None or not os.path.exists(program):
                remedy = "ask for uidmap (Debian, Ubuntu) or shadow-utils-subid (Fedora)"
                raise mount_base.RefusedError(errno.ENOENT, f"{helper} is not installed", remedy)
            fusermount.check(program)  # the same conditions hold for every set-user-ID helper
        except OSError as error:
            return Row(name, WARNING, str(error.strerror), meaning, str(getattr(error, "remedy", "")))
    return Row(name, OK, f"{counts[0]} user ids and {counts[1]} group ids", meaning)


def check_decompressors(probe: Probe) -> Row:
    """What images can be read here."""
    from fusewire.formats.compression import available

    found = available()
    here = ", ".join(f"{name} ({provider})" for name, (provider, _) in found.items() if provider)
    missing = [name for name, (provider, _) in found.items() if not provider]
    if not missing:
        return Row("decompressors", OK, here)
    hints = "; ".join(dict.fromkeys(found[name][1] for name in missing))
    text = f"{here}; none for {', '.join(missing)}"
    return Row("decompressors", WARNING, text, "images that use those cannot be read", hints)


def check_state(probe: Probe) -> Row:
    """Background mounts are noted in a private directory."""
    from fusewire.cli import state

    store = state.of_user(probe.environ)
    root = store.roots[0]
    new = not os.path.lexists(root)
    try:
        store.remove(store.create("doctor", None))
        if new:
            os.rmdir(root)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}"
        return Row("state directory", BAD, text, "`mount` has to note what is mounted", "`run` does without")
    return Row("state directory", OK, root)


def check_namespaces(probe: Probe) -> Row:
    """Tried for real: a user namespace (a mount namespace for who has CAP_SYS_ADMIN), with the caller's id mapped."""
    refusal = userns.probe(userns.default_plan())
    if refusal is None:
        kind = "a mount namespace" if probe.privileged else "a user and mount namespace"
        return Row("namespaces", OK, f"{kind} can be made")
    text = f"{refusal.strerror}: {refusal.cause}"
    return Row("namespaces", BAD, text, "neither `run` nor the strategy namespace works", refusal.remedy)


def check_fsopen(probe: Probe) -> Row:
    """Tried for real: the mount API of Linux 5.2."""

    def work() -> str:
        userns.enter(userns.default_plan())
        os.close(syscalls.fsopen(b"fuse"))
        return ""

    found = attempt(work)
    if found.ok:
        return Row("fsopen", OK, "the mount API of Linux 5.2 works")
    meaning = "not needed: the older mount(2) is used instead"
    return Row("fsopen", WARNING, found.text, meaning, found.remedy or "a newer kernel, or a newer seccomp profile")


def check_proc(probe: Probe) -> Row:
    """Tried for real: /proc of a PID namespace of our own, which the kernel refuses where parts of /proc are hidden."""

    def work() -> str:
        userns.enter(userns.default_plan(), syscalls.CLONE_NEWPID)
        first = os.fork()
        if first == 0:
            try:
                syscalls.mount(b"proc", b"/proc", b"proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
                os._exit(0)
            except OSError as error:
                os._exit(error.errno or errno.EIO)
        code = process.wait(first)
        if code:
            raise OSError(code, f"/proc cannot be mounted anew: {os.strerror(code)}")
        return ""

    try:
        mounts = mountinfo.mounts()
    except OSError as error:
        finding = f"/proc/self/mountinfo cannot be read: {error.strerror}"
        return Row("/proc", BAD, finding, "ids are mapped and mounts are found through /proc", "mount /proc")
    masked = [m for m in mounts if m.mount_point.startswith(b"/proc/") and m.fstype != b"binfmt_misc"]
    found = attempt(work)
    if found.ok:
        return Row("/proc", OK, "a PID namespace can have a /proc of its own")
    text = found.text
    if masked:
        text += f"; parts of it are hidden here: {', '.join(os.fsdecode(m.mount_point) for m in masked[:4])}"
    meaning = "only `run --pid` needs it"
    return Row("/proc", WARNING, text, meaning, "containers: --security-opt systempaths=unconfined")


def look(probe: Probe) -> list[Row]:
    """All rows, in the order in which they matter."""
    rows = [check_kernel(probe), check_device(probe), check_limits(probe), check_clone(probe), check_apparmor(probe)]
    rows += [check_seccomp(probe), check_chroot(probe)]
    if probe.real:
        rows += [check_namespaces(probe), check_fsopen(probe), check_proc(probe)]
    rows += [*check_helper(probe), check_fuse_conf(probe), check_ranges(probe)]
    if probe.real:
        rows += [check_decompressors(probe), check_state(probe)]
    return rows


# --- telling

_KINDS = ("direct", "fusermount3", "namespace", "run")


def examine(probe: Probe | None = None, seconds: float = DEADLINE) -> dict[str, Any]:
    """Look and try: what `--json` prints. `mount` is the strategy that it will use, None if none works."""
    probe = probe or Probe()
    rows = look(probe)
    helper = probe.environ.get("FUSERMOUNT_PROG")
    trials = {kind: try_mount(kind, seconds, helper) for kind in _KINDS} if probe.real else {}
    chosen = next((kind for kind in _KINDS[:3] if kind in trials and trials[kind].ok), None)
    return {
        "checks": [row.as_dict() for row in rows],
        "trials": [{"name": k, "ok": o.ok, "finding": o.text, "remedy": o.remedy} for k, o in trials.items()],
        "mount": chosen,
        "run": "run" in trials and trials["run"].ok,
        "ok": any(outcome.ok for outcome in trials.values()),
    }


def doctor(json: bool = False, probe: Probe | None = None) -> int:
    """Print what `examine` finds; the exit status is 0 only if some way to mount works."""
    found = examine(probe)
    if json:
        from json import dumps

        print(dumps(found, indent=1))
        return 0 if found["ok"] else 1
    for row in found["checks"]:
        say(row["verdict"], row["name"], row["finding"])
        if row["verdict"] != OK:
            say("", "", row["meaning"])
            say("", "", row["remedy"], "-> ")
    print("\ntried for real:")
    for trial in found["trials"]:
        name = "fusewire run" if trial["name"] == "run" else f"strategy {trial['name']}"
        say("works" if trial["ok"] else "fails", name, trial["finding"])
        say("", "", trial["remedy"], "-> ")
    print()
    chosen = found["mount"]
    print(f"fusewire mount: will use the strategy {chosen}" if chosen else "fusewire mount: does not work here")
    print(f"fusewire run:   {'works' if found['run'] else 'does not work here'}")
    return 0 if found["ok"] else 1


def say(verdict: str, name: str, text: str, arrow: str = "") -> None:
    """Print a row, or a line of what belongs to one: both names are empty then. Nothing for nothing."""
    if not (verdict or text):
        return
    head = f"{verdict:<9}{name:<25}"
    for number, line in enumerate(text.split("\n") if text else [""]):
        lead = arrow if number == 0 else " " * len(arrow)
        print(f"{head if number == 0 else ' ' * len(head)}{shown(lead + line)}".rstrip())
