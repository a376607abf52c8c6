"""`fusewire doctor --share`: by every kind of user, on this machine and on one made worse for one process."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fusewire
import rootless
from fusewire.cli import doctor_share
from fusewire.linux import capabilities as caps
from fusewire.linux import landlock, mountinfo

MAIN = "import sys; from fusewire.cli import main; sys.exit(main(sys.argv[1:]))"
PYTHON = (sys.executable, "-W", "error")
IMAGE = os.path.join(os.path.dirname(fusewire.__file__), "data", "demo.sqsh")
# What a container without CAP_SYS_ADMIN leaves its root.
CONTAINED = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,net_bind_service,net_raw,sys_chroot,mknod,setfcap"
MAPPED, RANGE = 4711, 200000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make this situation")
needs_landlock = pytest.mark.skipif(landlock.abi() < 2, reason=landlock.missing() or "Landlock of ABI 1 only")
needs_known_calls = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the number of unshare is not known here"
)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that everybody may write to."""
    place = Path(rootless.rootless_home()) / f"doctor-{os.getpid()}-{os.urandom(4).hex()}"
    place.mkdir()
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


class Found:
    """What a doctor in a process of its own has found."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stderr == "", done.stderr
        self.status = done.returncode
        self.all: dict[str, Any] = json.loads(done.stdout)
        self.rows = {row["name"]: row for row in self.all["checks"]}
        self.modes = {mode["name"]: mode for mode in self.all["modes"]}
        for row in self.all["checks"]:
            assert row["verdict"] == "ok" or row["meaning"], row
        for mode in self.all["modes"]:
            assert mode["protects"] if mode["ok"] else mode["remedy"], mode


def run(words: Sequence[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*words, "doctor", "--share", *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=100)


def ask(words: Sequence[str], source: object) -> Found:
    return Found(run(words, source, "--json"))


def as_root(before: str = "") -> list[str]:
    """Words of a doctor of root's, after `before` in a mount namespace of its own."""
    return [*PYTHON, "-c", f"{_worse(before)}\n{MAIN}"]


def as_nobody(before: str = "") -> list[str]:
    return [*rootless.rootless_python(), "-c", f"{before}\n{MAIN}"]


def _worse(before: str) -> str:
    if not before:
        return ""
    return f"import os; from fusewire.linux import syscalls, userns; userns.enter(userns.current_plan())\n{before}"


def contained(before: str = "", *, namespaces: bool = True) -> list[str]:
    """Root with the capabilities of a container; without `namespaces` none can be made there."""
    words = ["setpriv", "--bounding-set", "-all,+" + CONTAINED.replace(",", ",+"), "--", *PYTHON]
    words += ["-c", f"{before}\n{MAIN}"]
    if namespaces:
        return words
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", *words]


def without(*calls: int) -> str:
    """A filter for everything that follows, which refuses these system calls with EPERM."""
    return f"""
import ctypes, struct
from fusewire.linux import syscalls
program = [struct.pack("HBBI", 0x20, 0, 0, 0)]
for number in {calls!r}:
    program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, 0x00050001)]
program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))
raw = ctypes.create_string_buffer(b"".join(program))
head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(raw)))
syscalls.set_no_new_privs()
syscalls.prctl(22, 2, ctypes.addressof(head))
"""


CREATE_RULESET = 444  # landlock_create_ruleset(2)
UNSHARE = {"x86_64": 272, "aarch64": 97}.get(platform.machine(), -1)


# --- every kind of user


@needs_root
def test_root_gets_all_modes_and_nothing_is_left_behind(shared, capsys):
    (shared / "file").write_text("mine")
    before = os.stat(shared), mountinfo.read(), sorted(os.listdir("/proc/self/fd"))
    assert doctor_share.doctor_share(str(shared), json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (os.stat(shared), mountinfo.read(), sorted(os.listdir("/proc/self/fd"))) == before
    assert os.listdir(shared) == ["file"]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert (found["sandbox"], found["use"], found["kind"]) == ("namespace", "namespace", "directory")
    assert found["source"] == str(shared)
    for mode in found["modes"]:
        assert mode["ok"], mode
        assert mode["readable"]
        assert mode["writable"]
        assert mode["ids"] is None
        assert mode["keeps"] == caps.names(caps.KEPT)
        assert mode["costs"] == []


def test_user_without_any_privilege_gets_a_user_namespace_and_is_told_what_that_costs(shared):
    found = ask(as_nobody(), shared)
    assert found.status == 0
    assert found.all["sandbox"] == found.all["use"] == "namespace"
    mode = found.modes["namespace"]
    assert mode["ids"] == {"uid": rootless.NOBODY, "gid": rootless.NOBODY} or os.geteuid() != 0
    assert "device nodes cannot be made" in mode["costs"]
    assert "trusted. attributes cannot be set" in mode["costs"]
    assert any(cost.startswith("whatever the guest makes belongs to uid") for cost in mode["costs"])
    assert not any("security.capability" in cost for cost in mode["costs"])
    assert found.rows["capabilities"]["verdict"] == "warning"
    assert "more ids" in found.rows["capabilities"]["remedy"]
    chroot = found.modes["chroot"]
    assert not chroot["ok"]
    assert "CAP_SYS_CHROOT" in chroot["finding"]
    assert chroot["remedy"] == "start it with that capability"
    none = found.modes["none"]
    assert none["ok"]
    assert any("security.capability" in cost for cost in none["costs"])
    assert none["keeps"] == []
    assert os.listdir(shared) == []


@needs_root
def test_root_of_a_container_is_told_that_chroot_keeps_all_owners(shared):
    found = ask(contained(), shared)
    assert found.status == 0
    assert found.all["sandbox"] == "namespace"
    assert found.modes["namespace"]["ids"] == {"uid": 0, "gid": 0}
    assert "use --sandbox chroot" in found.rows["capabilities"]["remedy"]
    chroot = found.modes["chroot"]
    assert chroot["ok"]
    assert chroot["keeps"] == caps.names(caps.KEPT)
    assert chroot["costs"] == ["trusted. attributes cannot be set"]
    assert any("bounding set" in note for note in chroot["notes"])


@needs_root
def test_root_of_a_container_without_user_namespaces_gets_chroot(shared):
    found = ask(contained(namespaces=False), shared)
    assert found.status == 0
    assert found.all["sandbox"] == found.all["use"] == "chroot"
    mode = found.modes["namespace"]
    assert not mode["ok"]
    assert "user.max_user_namespaces=0" in mode["finding"]
    assert mode["remedy"] == "ask the administrator for `sysctl user.max_user_namespaces=10000`"
    assert "device nodes cannot be made" in found.modes["chroot"]["costs"]  # of a user namespace that somebody made


@needs_landlock
def test_landlock_is_what_confines_who_may_neither_unshare_nor_chroot(shared):
    if UNSHARE < 0:
        pytest.skip("the number of unshare is not known here")
    found = ask(as_nobody(without(UNSHARE)), shared)
    assert found.status == 0
    assert found.all["sandbox"] == found.all["use"] == "none"
    assert found.modes["none"]["confined"]
    assert "no file outside can be opened" in found.modes["none"]["protects"]
    assert "changes modes, owners and attributes" in found.modes["none"]["leaves"]
    assert "not there: chown" in found.rows["capabilities"]["finding"]


@needs_known_calls
def test_status_is_1_where_nothing_confines(shared):
    found = ask(as_nobody(without(UNSHARE, CREATE_RULESET)), shared)
    assert found.status == 1
    assert (found.all["sandbox"], found.all["use"], found.all["ok"]) == ("none", None, False)
    none = found.modes["none"]
    assert none["ok"]
    assert not none["confined"]
    assert "opens every file that uid" in none["leaves"]
    assert found.rows["Landlock"]["verdict"] == "bad"
    done = run(as_nobody(without(UNSHARE, CREATE_RULESET)), shared)
    assert done.returncode == 1
    assert "takes none, which does not confine it" in done.stdout.splitlines()[-1]


@needs_root
def test_chroot_without_landlock_is_said_to_leave_a_way_out(shared):
    found = ask(contained(without(CREATE_RULESET), namespaces=False), shared)
    assert found.status == 0
    assert found.modes["chroot"]["landlock"] == 0
    assert "gets out by `..` from /proc/self/fd, where it opens every file" in found.modes["chroot"]["leaves"]
    row = found.rows["Landlock"]
    assert row["verdict"] == "warning"
    assert "Operation not permitted" in row["finding"]


@needs_root
def test_directory_that_the_namespace_cannot_read_is_seen_and_chroot_is_advised(shared):
    """Its owner has no id in the user namespace, so that root's rights do not hold for it."""
    os.chown(shared, 1000, 1000)
    shared.chmod(0o711)
    found = ask(contained(), shared)
    assert found.status == 0
    assert (found.all["sandbox"], found.all["use"]) == ("namespace", "chroot")
    assert "cannot be read inside: Permission denied" in found.modes["namespace"]["finding"]
    assert found.modes["chroot"]["readable"]
    done = run(contained(), shared)
    assert done.stdout.splitlines()[-1].endswith("which cannot read it there: give --sandbox chroot")
    shared.chmod(0o700)  # not even entered
    found = ask(contained(), shared)
    assert found.all["sandbox"] == found.all["use"] == "chroot"
    assert "Permission denied" in found.modes["namespace"]["finding"]


@needs_root
@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="newuidmap (uidmap) is missing")
def test_ranges_are_tried_and_the_options_for_them_are_said(shared, tmp_path):
    if rootless.has_name(MAPPED):
        pytest.skip(f"there is a user with uid {MAPPED}")
    if not (os.path.exists("/etc/subuid") and os.path.exists("/etc/subgid")):
        pytest.skip("/etc/subuid or /etc/subgid is missing, so that nothing can be put in its place")
    tmp_path.chmod(0o755)
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(f"{MAPPED}:{RANGE}:1000\n")
    (tmp_path / "passwd").write_text(Path("/etc/passwd").read_text() + f"mapped:x:{MAPPED}:{MAPPED}::/:/bin/sh\n")
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("subuid", "subgid", "passwd"))
    words = ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    found = ask([*words, *rootless.rootless_python(MAPPED, fusermount=True), "-c", MAIN], shared)
    row = found.rows["id maps"]
    assert row["verdict"] == "ok", row
    assert row["finding"] == (
        "1000 user ids and 1000 group ids: --sandbox=namespace "
        f"--uid-map=:0:{MAPPED}:1: --uid-map=:1:{RANGE}:1000: --gid-map=:0:{MAPPED}:1: --gid-map=:1:{RANGE}:1000:"
    )


# --- the filter and the limits


@needs_root
def test_missing_libseccomp_is_named_and_the_sandboxes_are_tried_without(shared):
    library = next((path for path in _mapped_after_loading("libseccomp.so.2") if "libseccomp" in path), None)
    if library is None:
        pytest.skip("libseccomp is missing")
    found = ask(as_root(f"syscalls.mount(b'/dev/null', {library!r}.encode(), None, syscalls.MS_BIND)"), shared)
    assert found.status == 0
    row = found.rows["seccomp"]
    assert row["verdict"] == "bad"
    assert "install it" in row["finding"]
    assert not found.all["seccomp"]
    assert "without a filter of system calls" in found.modes["namespace"]["finding"]


def _mapped_after_loading(name: str) -> list[str]:
    code = f"import ctypes; ctypes.CDLL({name!r}); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    return [line.split()[-1] for line in done.stdout.splitlines() if "/" in line]


@needs_root
def test_few_descriptors_and_a_machine_that_has_few_are_warnings(shared, tmp_path):
    (tmp_path / "max").write_text("8192\n")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    row = ask(as_nobody(low), shared).rows["descriptors"]
    assert row["verdict"] == "warning"
    assert row["finding"].startswith("256 for the daemon")
    assert "ulimit -Hn" in row["remedy"]
    if 0 <= hard < 4096:
        pytest.skip(f"only {hard} descriptors are allowed here")
    place = str(tmp_path / "max")
    words = as_root(f"syscalls.mount({place!r}.encode(), b'/proc/sys/fs/file-max', None, syscalls.MS_BIND)")
    row = ask(words, shared).rows["descriptors"]
    assert row["verdict"] == "warning"
    assert "--rlimit-nofile=4096" in row["remedy"]


# --- the directory


def _on(shared: Path, fstype: str, flags: str) -> list[str]:
    """A doctor of root's for whom `shared` is such a mount."""
    return as_root(f"syscalls.mount(b'none', {str(shared)!r}.encode(), {fstype.encode()!r}, {flags})")


@needs_root
def test_mount_options_of_the_advisory_are_looked_for(shared):
    row = ask(_on(shared, "tmpfs", "0"), shared).rows["nosuid,nodev,noexec"]
    assert row["verdict"] == "warning"
    assert "device nodes" in row["meaning"]
    assert f"`mount -o remount,bind,nosuid,nodev,noexec {shared}`" in row["remedy"]
    everything = "syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC"
    found = ask(_on(shared, "tmpfs", everything), shared)
    assert found.rows["nosuid,nodev,noexec"]["verdict"] == "ok"
    assert found.rows["directory"]["finding"].startswith(f"on tmpfs (none), mounted at {shared};")
    assert not any("device nodes" in mode["leaves"] for mode in found.modes.values())


@needs_root
def test_advised_command_is_what_it_takes(shared):
    row = ask(as_root(), shared).rows["nosuid,nodev,noexec"]
    assert row["verdict"] == "warning"
    command = row["remedy"].split("`")[1]
    found = ask(as_root(f"import subprocess; subprocess.check_call({command!r}, shell=True)"), shared)
    assert found.rows["nosuid,nodev,noexec"]["verdict"] == "ok"


@needs_root
def test_mount_below_without_them_is_named(shared):
    (shared / "below").mkdir()
    flags = "syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC"
    before = f"""
path = {str(shared)!r}.encode()
syscalls.mount(b'none', path, b'tmpfs', {flags})
os.mkdir(path + b'/below')
syscalls.mount(b'none', path + b'/below', b'tmpfs', 0)
"""
    row = ask(as_root(before), shared).rows["nosuid,nodev,noexec"]
    assert row["finding"] == f"not all are set below it: {shared}/below"
    assert row["remedy"].startswith(f"`mount -o remount,bind,nosuid,nodev,noexec {shared}/below`")


@needs_root
def test_read_only_directory_is_no_error(shared):
    found = ask(_on(shared, "tmpfs", "syscalls.MS_RDONLY"), shared)
    assert found.status == 0
    assert "mounted read-only" in found.rows["directory"]["finding"]
    for name in ("directory", "O_TMPFILE", "nosuid,nodev,noexec"):
        assert found.rows[name]["verdict"] == "ok", name


@needs_root
def test_filesystem_without_extended_attributes_is_a_warning(shared):
    found = ask(_on(shared, "ramfs", "0"), shared)
    assert found.status == 0
    row = found.rows["extended attributes"]
    assert row["verdict"] == "warning"
    assert "no user." in row["finding"]


@needs_root
def test_directory_that_may_not_be_written_to_is_no_error(shared):
    shared.chmod(0o755)
    found = ask(as_nobody(), shared)
    assert found.status == 0
    assert "may not write to it" in found.rows["directory"]["finding"]
    assert found.rows["O_TMPFILE"]["finding"].startswith("not needed")
    assert not found.modes["namespace"]["writable"]


# --- an image


@needs_root
@pytest.mark.skipif(
    any(place.startswith("/tmp/") for place in (__file__, sys.prefix)), reason="it hides /tmp, where the checkout lies"
)
def test_image_needs_no_capability_and_leaves_nothing_in_tmp():
    """The empty directories that are made for its modes have no names any more afterwards."""
    image = shutil.copy(IMAGE, "/var/tmp/" + f"doctor-{os.getpid()}.sqsh")
    try:
        before = "syscalls.mount(b'none', b'/tmp', b'tmpfs', 0)\nimport atexit; atexit.register(os.rmdir, '/tmp/only')"
        before += "\nos.mkdir('/tmp/only'); atexit.register(lambda: os.listdir('/tmp') == ['only'] or os._exit(77))"
        found = ask(as_root(before), image)
    finally:
        os.unlink(image)
    assert found.status == 0
    assert (found.all["kind"], found.all["sandbox"]) == ("image", "namespace")
    for mode in found.modes.values():
        assert mode["ok"]
        assert mode["keeps"] == []
        assert mode["costs"] == []
    assert "none is kept" in found.rows["capabilities"]["finding"]
    assert "directory" not in found.rows


def test_image_can_be_shared_by_who_may_do_nothing(shared):
    image = shutil.copy(IMAGE, shared / "image.sqsh")
    os.chmod(image, 0o644)
    found = ask(as_nobody(), image)
    assert found.status == 0
    assert found.all["kind"] == "image"
    assert "no file is there at all" in found.modes["namespace"]["protects"]


# --- what cannot be shared


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file or directory; name a directory or an image that is there"),
        (lambda path: path.write_text("plain"), "; name a directory or an image that is whole"),
        (os.mkfifo, "is neither a file nor a block device; name a directory or an image that is whole"),
        (lambda path: path.symlink_to(path), "; name a directory or an image that is there"),
    ],
    ids=["missing", "text", "fifo", "loop"],
)
def test_what_cannot_be_shared_is_named_with_the_way_out(shared, make, message):
    path = shared / "thing"
    make(path)
    done = run([*PYTHON, "-c", MAIN], path, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"fusewire: {path}")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_empty_name_is_not_the_working_directory():
    done = run([*PYTHON, "-c", MAIN], "")
    assert done.returncode == 1
    assert "--share has no name" in done.stderr


@needs_root
def test_closed_directory_is_named_with_the_right_that_is_missing(shared):
    closed = shared / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    for source, missing in ((closed, f"rx {closed}"), (closed / "inner", f"x {closed}")):
        done = run(as_nobody(), source)
        assert done.returncode == 1
        assert f"{source} cannot be shared: Permission denied" in done.stderr
        assert f"`setfacl -m u:{rootless.NOBODY}:{missing}`" in done.stderr
    closed.chmod(0o711)
    (closed / "inner").chmod(0o711)
    assert f"{rootless.NOBODY}:rx {closed}/inner`" in run(as_nobody(), closed / "inner").stderr


@needs_root
def test_filesystem_that_does_not_answer_does_not_hang_the_doctor(shared):
    rootless.open_fuse_device()
    words = as_root(f"""
fuse = os.open("/dev/fuse", os.O_RDWR)
syscalls.mount(b"x", {str(shared)!r}.encode(), b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse)
from fusewire.cli import doctor_share
doctor_share.examine.__defaults__ = (0.5,)
""")
    done = run(words, shared)
    assert done.returncode == 1
    assert "gave no answer within 0.5 s; is its server or its network gone?" in done.stderr


# --- telling


def test_words_for_people_end_in_what_auto_takes(shared):
    done = run(as_nobody(), shared)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0] == f"directory {shared}, each sandbox tried for real:"
    assert lines[1].startswith("works    --sandbox namespace")
    assert any(line.strip().startswith("protects: no file outside is there") for line in lines)
    assert any(line.strip().startswith("costs:    whatever the guest makes") for line in lines)
    assert any(line.startswith("fails    --sandbox chroot") for line in lines)
    assert lines[-1].startswith("fusewire share: --sandbox auto takes namespace")


def test_what_auto_takes_is_what_a_share_says(shared):
    """By the same words as `fusewire share --dry-run`."""
    found = ask(as_nobody(), shared)
    code = "import sys; from fusewire.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [*rootless.rootless_python(), "-c", code, "share", str(shared), "--socket-path=/x", "--dry-run"]
    done = subprocess.run(words, text=True, capture_output=True, timeout=60)
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"sandbox: {found.all['sandbox']}")
    assert ("with Landlock" in first) == (found.all["landlock"] > 0)


@needs_root
def test_device_that_is_shared_by_mistake_is_refused(tmp_path):
    path = tmp_path / "null"
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert "neither a file nor a block device" in run([*PYTHON, "-c", MAIN], path).stderr
