"""Sandboxes really entered, by every kind of user, and looked at from outside and from inside."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import rootless
from fusewire.linux import capabilities as caps
from fusewire.linux import landlock, syscalls
from sandboxed import PATIENCE, Sandboxed

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
needs_landlock = pytest.mark.skipif(landlock.abi() < 2, reason=landlock.missing() or "Landlock of ABI 1 only")
PYTHON = (sys.executable, "-W", "error")
MAPPED = 4711
# What a container without CAP_SYS_ADMIN leaves its root.
CONTAINED = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,net_bind_service,net_raw,sys_chroot,mknod,setfcap"
NOTHING = "0" * 16


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that everybody may write to, with a file, a fifo and ways out; a secret is beside it."""
    home = Path(rootless.rootless_home()) / f"sandbox-{os.getpid()}-{os.urandom(4).hex()}"
    place = home / "shared"
    (place / "sub").mkdir(parents=True)
    (place / "file").write_text("inside")
    (home / "secret").write_text("outside")
    (place / "up").symlink_to("../secret")
    (place / "absolute").symlink_to(home / "secret")
    for path in (home, place, place / "sub"):
        path.chmod(0o777)
    (home / "secret").chmod(0o666)
    yield place
    shutil.rmtree(home)


def contained(*, namespaces: bool = True) -> tuple[str, ...]:
    """Words that run as root with the capabilities of a container; without `namespaces` none can be made there."""
    drop = ("setpriv", "--bounding-set", "-all,+" + CONTAINED.replace(",", ",+"), "--")
    if namespaces:
        return (*drop, *PYTHON)
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    return ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", *drop, *PYTHON)


def as_nobody(**options: bool) -> tuple[str, ...]:
    return tuple(rootless.rootless_python(**options))


def words_of(user: str) -> Sequence[str]:
    return {"root": PYTHON, "container": contained(), "nobody": as_nobody()}[user]


WAYS = [
    (mode, user, rules)
    for mode, user in (
        ("namespace", "root"),
        ("namespace", "nobody"),
        ("chroot", "root"),
        ("chroot", "container"),
        ("none", "root"),
        ("none", "nobody"),
    )
    for rules in ("off", "require")
    if (mode, rules) != ("none", "off")
]


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def box(request: pytest.FixtureRequest, shared: Path) -> Iterator[Sandboxed]:
    mode, user, rules = request.param
    if user != "nobody" and not ROOT:
        pytest.skip("needs root")
    if rules == "require" and landlock.abi() < landlock.MOVES_FILES:
        pytest.skip(landlock.missing() or "Landlock of ABI 1 only")
    with Sandboxed(mode, shared, words_of(user), by_descriptor=True, landlock=rules) as found:
        assert not found.error, found.error
        found.user, found.mode, found.rules = user, mode, rules  # type: ignore[attr-defined]
        yield found


# From outside


def test_server_has_what_it_keeps_and_nothing_more(box: Sandboxed, shared: Path) -> None:
    status = box.status()
    assert status["NoNewPrivs"] == "1"
    assert status["Groups"] == ""
    assert status["Umask"] == "0000"
    assert status["CapInh"] == status["CapAmb"] == NOTHING
    kept = int(status["CapPrm"], 16)
    assert status["CapEff"] == status["CapPrm"]
    assert kept == box.entered["capabilities"]
    everything = box.user == "root" or box.mode == "namespace"
    if everything:
        assert kept == caps.KEPT
        assert status["CapBnd"] == NOTHING
    elif box.user == "container":
        assert kept == caps.KEPT
        assert any("bounding set stays" in note for note in box.entered["notes"])
    else:
        assert kept == 0
    limits = Path(f"/proc/{box.pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if "core" in line).split()[4:6] == ["0", "0"]
    assert box.ask("syscalls.get_dumpable()") != 1
    found = box.descriptors()
    assert not [path for path in found.values() if path in ("/usr", "/")] or box.mode != "none"
    root = box.entered["root"]
    known = {0, 1, 2, root, *[number for number, path in found.items() if path.startswith("socket:")]}
    proc = {number for number in found if number not in known}
    assert len(proc) == (0 if box.mode == "none" else 1)
    assert found[0].endswith("/null")  # of a mount that is not there any more


def test_server_sees_its_own_namespaces_only(box: Sandboxed) -> None:
    same = {
        name: box.link(f"ns/{name}") == os.readlink(f"/proc/self/ns/{name}") for name in ("net", "pid", "mnt", "ipc")
    }
    assert set(same.values()) == {box.mode != "namespace"}
    own_users = box.link("ns/user") != os.readlink("/proc/self/ns/user")
    assert own_users == (box.mode == "namespace" and box.user == "nobody")
    if box.mode == "namespace":
        lines = box.mounts()
        assert len(lines) == 1
        assert lines[0][4] == "/"
        assert box.status()["NSpid"].split()[-1] == "1"
        assert box.ask("[name for _, name in socket.if_nameindex()]") == ["lo"]


def test_root_is_the_shared_directory_and_work_is_done_among_descriptors(box: Sandboxed, shared: Path) -> None:
    if box.mode == "none":
        assert box.link("root") == "/"
        assert box.entered["proc"] == "/proc/self/fd/"
        return
    theirs, ours = os.stat(f"/proc/{box.pid}/root"), os.stat(shared)
    assert (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
    assert box.link("root") == ("/" if box.mode == "namespace" else str(shared))
    assert all(map(str.isdigit, os.listdir(f"/proc/{box.pid}/cwd")))
    assert box.entered["proc"] == ""


def test_descriptors_are_reopened_by_their_names(box: Sandboxed) -> None:
    expression = """[
        held := os.open("file", os.O_PATH, dir_fd=entered.root),
        name := entered.proc + b"%d" % held,
        os.read(os.open(name, os.O_RDWR), 10).decode(),
        os.setxattr(name, b"user.x", b"1"), os.getxattr(name, b"user.x").decode(), os.listxattr(name),
        os.chmod(name, 0o640), oct(os.stat(name).st_mode), os.access(name, os.R_OK, effective_ids=True),
        os.truncate(name, 3),
        files.linkat(files.AT_FDCWD, name, entered.root, b"linked", files.AT_SYMLINK_FOLLOW),
        os.stat("linked", dir_fd=entered.root).st_size,
        tried(os.open, name, os.O_RDONLY | os.O_NOFOLLOW)
    ][2::]"""
    if box.user != "root":  # the file is root's, the directory everybody's
        box.ask("os.unlink('file', dir_fd=entered.root)")
        box.ask("os.write(os.open('file', os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=entered.root), b'inside')")
    answer = box.ask(expression)
    assert answer == ["inside", None, "1", ["user.x"], None, "0o100640", True, None, None, 3, "ELOOP"]


def test_workers_with_their_own_working_directory_reopen_them_too(box: Sandboxed) -> None:
    expression = """[
        found := [],
        held := os.open("sub", os.O_PATH, dir_fd=entered.root),
        worker := threading.Thread(target=lambda: (
            files.unshare_fs(), found.append(os.listdir(os.open(entered.proc + b"%d" % held, os.O_RDONLY))))),
        worker.start(), worker.join(), found[0]][-1]"""
    assert box.ask(expression) == []


# From inside


def test_no_path_leads_out(box: Sandboxed, shared: Path) -> None:
    secret = str(shared.parent / "secret")
    ways = [
        f"os.open({secret!r}, os.O_RDONLY)",
        "os.open('/etc/passwd', os.O_RDONLY)",
        "os.open('/../../../../etc/passwd', os.O_RDONLY)",
        "os.open('../secret', os.O_RDONLY, dir_fd=entered.root)",
        "os.open('up', os.O_RDONLY, dir_fd=entered.root)",
        "os.open('absolute', os.O_RDONLY, dir_fd=entered.root)",
        "os.open('sub/../../secret', os.O_RDONLY, dir_fd=entered.root)",
        f"os.open('{secret}', os.O_WRONLY, dir_fd=entered.root)",
        f"os.open('/proc/self/fd/0/../../../../{secret}', os.O_RDONLY)",
        "os.open('/proc/1/root/etc/passwd', os.O_RDONLY)",
    ]
    for way in ways:
        assert box.ask(way) in ("ENOENT", "EACCES", "ENOTDIR", "EXDEV"), way


def test_dots_from_the_working_directory_lead_nowhere(box: Sandboxed) -> None:
    """In chroot alone they do, which is documented: see the module's first lines and the plan's notes."""
    up = "os.open('../../../etc/passwd', os.O_RDONLY)"
    if box.mode == "chroot" and box.rules == "off":
        assert isinstance(box.ask(up), int)
        return
    assert box.ask(up) in ("ENOENT", "EACCES")
    if box.mode == "namespace":
        assert box.ask("os.stat('../../..').st_ino == os.stat('.').st_ino")


def test_directory_that_is_moved_out_during_a_walk_leads_nowhere(box: Sandboxed, shared: Path) -> None:
    box.ask("globals().update(deep=os.open('sub', os.O_PATH, dir_fd=entered.root))")
    os.rename(shared / "sub", shared.parent / "moved")
    up = box.ask("os.open('../secret', os.O_RDONLY, dir_fd=deep)")
    if box.mode == "chroot" and box.rules == "off":  # like every chroot; names with dots never come this far
        assert isinstance(up, int)
    else:  # the kernel sees that the directory has left the mount
        assert up == ("ENOENT" if box.mode == "namespace" else "EACCES")


def test_privileges_do_not_come_back(box: Sandboxed) -> None:
    full = 1 << syscalls.CAP_SYS_ADMIN
    assert box.ask(f"tried(syscalls.capset, {full}, {full}, 0)") == "EPERM"
    assert box.ask("tried(syscalls.unshare, syscalls.CLONE_NEWNS)") == "EPERM"
    assert box.ask("tried(syscalls.mount, b'x', b'/', b'tmpfs', 0)") == "EPERM"
    assert box.ask("tried(os.chroot, '/')") in ("EPERM", "EACCES")


@needs_landlock
def test_network_is_out_of_reach(box: Sandboxed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        answer = box.ask(f"tried(socket.socket().connect, (b'127.0.0.1', {number}))")
    if box.mode == "namespace":
        assert answer in ("ENETUNREACH", "EACCES")
    else:
        assert answer == ("done" if box.rules == "off" else "EACCES")


def test_modules_of_the_guest_are_not_imported(box: Sandboxed, shared: Path) -> None:
    """Where the interpreter looks for what is loaded late, the guest could put something of his own."""
    path = box.ask("sys.path[-1]").lstrip("/")
    (shared / path).mkdir(parents=True, exist_ok=True)
    (shared / path / "wave.py").write_text("raise SystemExit('the guest runs code')")
    box.ask("globals().update(missing=lambda name: [__import__(name)])")
    with pytest.raises(AssertionError, match=r"ModuleNotFoundError.*No module named .*wave"):
        box.ask("missing('wave')")


def test_mounts_made_later_on_the_host_arrive(shared: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to mount")
    script = 'mount --make-rshared / && exec "$@"'  # propagation is what the machine's init sets up
    words = ("unshare", "-m", "sh", "-c", script, "sh", *PYTHON)
    with Sandboxed("namespace", shared, words) as box:
        enter = ["nsenter", "-t", str(box.process.pid), "-m"]
        subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(shared / "sub")], check=True)
        assert len(box.mounts()) == 2
        assert box.ask("os.stat('/sub').st_dev != os.stat('/').st_dev") is True


def test_submounts_that_are_there_come_along(shared: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to mount")
    script = f'mount -t tmpfs tmpfs {shared}/sub && echo below > {shared}/sub/file && exec "$@"'
    with Sandboxed("namespace", shared, ("unshare", "-m", "sh", "-c", script, "sh", *as_nobody())) as box:
        assert box.ask("os.read(os.open('/sub/file', os.O_RDONLY), 9).decode()") == "below\n"
        assert len(box.mounts()) == 2


# Images: no files at all


@pytest.mark.parametrize(
    ("mode", "user"),
    [("namespace", "root"), ("namespace", "nobody"), ("chroot", "root"), ("none", "root"), ("none", "nobody")],
)
@needs_landlock
def test_server_of_an_image_can_open_nothing_but_has_its_image(mode: str, user: str, shared: Path) -> None:
    if user == "root" and not ROOT:
        pytest.skip("needs root")
    with Sandboxed(mode, None, words_of(user), image=shared / "file") as box:
        assert box.entered["root"] == -1
        assert box.ask("os.pread(image, 9, 0).decode()") == "inside"
        status = box.status()
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
        for path in ("/", ".", "..", "/etc/passwd", "/proc/self/fd", str(shared / "file"), f"/proc/self/fd/{3}"):
            assert box.ask(f"tried(os.open, {path!r}, os.O_RDONLY)") in ("EACCES", "ENOENT"), path
        assert box.ask("tried(os.mkdir, '/made')") in ("EACCES", "EROFS", "ENOENT")
        if mode != "none":
            assert box.ask("len(os.listdir('/'))") == "EACCES"
        assert [path for path in box.descriptors().values() if path.startswith("/")].count("/dev/null") <= 2


@needs_root
@pytest.mark.parametrize("mode", ["namespace", "chroot"])
def test_root_of_an_image_server_is_empty_also_without_landlock(mode: str, shared: Path) -> None:
    with Sandboxed(mode, None, image=shared / "file", landlock="off") as box:
        assert box.ask("os.listdir('/')") == []
        assert box.ask("os.listdir('/..')") == []
        assert box.ask("tried(os.mkdir, '/made')") in ("EROFS", "ENOENT")
        assert not [name for name in os.listdir("/tmp") if name.startswith("fusewire-empty-")]


# Users and their ids


def test_one_id_of_its_own_is_mapped_to_itself(shared: Path) -> None:
    with Sandboxed("namespace", shared, as_nobody()) as box:
        assert box.ask("(os.getresuid(), os.getresgid())") == [[65534] * 3] * 2
        assert Path(f"/proc/{box.pid}/uid_map").read_text().split() == ["65534", "65534", "1"]
        assert box.entered["switch_ids"] is False
        assert box.ask("os.write(os.open('/new', os.O_CREAT | os.O_WRONLY, 0o600), b'x')") == 1
    assert (shared / "new").stat().st_uid in (65534, os.geteuid())


def test_own_id_can_be_mapped_to_another(shared: Path) -> None:
    options = {"uid_map": [(0, 65534, 1)], "gid_map": [(0, 65534, 1)]}
    with Sandboxed("namespace", shared, as_nobody(), **options) as box:
        assert not box.error, box.error
        assert box.ask("(os.getresuid(), os.getresgid())") == [[0] * 3] * 2


@pytest.fixture
def with_ranges(tmp_path: Path) -> tuple[str, ...]:
    """Words that run as MAPPED, to whom /etc/subuid and /etc/subgid of a private mount namespace give a range."""
    if not ROOT or shutil.which("newuidmap") is None:
        pytest.skip("needs root, to give ranges, and newuidmap (uidmap)")
    if rootless.has_name(MAPPED) or not all(os.path.exists(f"/etc/{name}") for name in ("subuid", "subgid")):
        pytest.skip(f"there is a user {MAPPED}, or no /etc/subuid")
    tmp_path.chmod(0o755)
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(f"{MAPPED}:200000:70000\n")
    (tmp_path / "passwd").write_text(Path("/etc/passwd").read_text() + f"mapped:x:{MAPPED}:{MAPPED}::/:/bin/sh\n")
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("subuid", "subgid", "passwd"))
    words = rootless.rootless_python(MAPPED, fusermount=True)
    return ("unshare", "-m", "--propagation", "private", "sh", "-c", f'{mounts} && exec "$@"', "sh", *words)


@pytest.mark.parametrize("own", [True, False])
def test_ranges_are_mapped_by_newuidmap_and_the_server_is_root_of_them(
    own: bool, with_ranges: tuple[str, ...], shared: Path
) -> None:
    maps = [(0, MAPPED, 1), (1, 200000, 1000)] if own else [(0, 200000, 1000)]
    with Sandboxed("namespace", shared, with_ranges, uid_map=maps, gid_map=maps) as box:
        assert not box.error, box.error
        assert box.ask("(os.getresuid(), os.getresgid(), os.getgroups())") == [[0] * 3, [0] * 3, []]
        assert box.status()["Uid"].split()[0] == str(MAPPED if own else 200000)
        assert int(box.status()["CapEff"], 16) == caps.KEPT
        assert box.entered["switch_ids"] is True
        box.ask("os.close(os.open('/new', os.O_CREAT | os.O_WRONLY, 0o600))")
        box.ask("os.chown('/new', 7, 8)")
        found = (shared / "new").stat()
        assert (found.st_uid, found.st_gid) == ((200006, 200007) if own else (200007, 200008))
        box.process.send_signal(signal.SIGTERM)  # also to a server that has another id than the waiter
        box.ask("1")


def test_ranges_that_nobody_gave_are_refused_with_the_helpers_words(shared: Path) -> None:
    if not ROOT or shutil.which("newuidmap") is None:
        pytest.skip("needs root, to be another user, and newuidmap (uidmap)")
    words = as_nobody(fusermount=True)
    with Sandboxed("namespace", shared, words, uid_map=[(0, 1, 1)], gid_map=[(0, 1, 1)]) as box:
        assert box.error["step"] == "namespaces"
        assert "newuidmap" in box.error["error"]
        assert "--sandbox chroot" in box.error["error"]


def test_supplementary_groups_are_dropped_where_that_is_allowed(shared: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to have groups")
    words = ("setpriv", "--groups", "5,6", "--")
    with Sandboxed("namespace", shared, (*words, *PYTHON)) as box:
        assert box.status()["Groups"] == ""
    nobody = list(as_nobody())
    nobody[nobody.index("--clear-groups")] = "--groups=5,6"
    with Sandboxed("none", shared, nobody) as box:
        assert box.status()["Groups"] == "5 6"
        assert any("groups stay" in note for note in box.entered["notes"])


# Which mode


@needs_root
def test_auto_takes_the_strongest_mode_and_says_why_not_a_stronger_one(shared: Path) -> None:
    with Sandboxed("auto", shared) as box:
        assert (box.entered["mode"], box.entered["refused"]) == ("namespace", [])
    with Sandboxed("auto", shared, contained(namespaces=False)) as box:
        assert not box.error, box.error
        assert box.entered["mode"] == "chroot"
        assert box.entered["refused"][0][0] == "namespace"
        assert "`namespaces` failed: cannot make a user namespace" in box.entered["refused"][0][1]
    drop = ("unshare", "--user", "--map-root-user", "sh", "-c")
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all -- "$@"'
    with Sandboxed("auto", shared, (*drop, script, "sh", *PYTHON)) as box:
        assert not box.error, box.error
        assert box.entered["mode"] == "none"
        assert [mode for mode, _ in box.entered["refused"]] == ["namespace", "chroot"]


@needs_root
def test_mode_that_was_asked_for_is_never_replaced_by_a_weaker_one(shared: Path) -> None:
    with Sandboxed("namespace", shared, contained(namespaces=False)) as box:
        assert box.error["step"] == "namespaces"
        assert "--sandbox chroot (takes CAP_SYS_CHROOT only)" in box.error["error"]
    assert box.wait() == 3


def test_chroot_without_its_capability_names_the_alternatives(shared: Path) -> None:
    with Sandboxed("chroot", shared, as_nobody()) as box:
        assert "takes CAP_SYS_CHROOT" in box.error["error"]
        assert "--landlock require" in box.error["error"]


# The two processes


@pytest.mark.parametrize("mode", ["namespace", "chroot", "none"])
def test_waiter_has_no_privileges_and_passes_the_status_on(mode: str, shared: Path) -> None:
    if mode == "none" and landlock.abi() < 2:
        pytest.skip(landlock.missing())
    with Sandboxed(mode, shared, words_of("root" if ROOT else "nobody")) as box:
        if box.error and not ROOT:
            pytest.skip(box.error["error"])
        status = box.status(box.process.pid)
        assert status["CapEff"] == status["CapPrm"] == NOTHING
        assert status["NoNewPrivs"] == "1"
        assert os.readlink(f"/proc/{box.process.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        said = box.tell_last()
        assert said["waiter"][0] == said["waiter"][1] == NOTHING
        assert said["sees"] is True
        assert box.wait() == 5
    by_pid = dict(box.hooks)
    assert by_pid["waiting"] == by_pid["imports"] == box.process.pid
    assert by_pid["serving"] == by_pid["seccomp"] != box.process.pid
    assert next(name for name, _ in box.hooks) == "imports"


@pytest.mark.parametrize("mode", ["namespace", "none"])
def test_waiter_passes_signals_on(mode: str, shared: Path) -> None:
    with Sandboxed(mode, shared, words_of("nobody")) as box:
        box.ask("signal.signal(signal.SIGTERM, lambda number, frame: os._exit(42)) and 0")
        deadline = time.monotonic() + PATIENCE
        while box.process.poll() is None and time.monotonic() < deadline:
            # More than once: Python does not see one that comes right before it sleeps in a system call.
            box.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                box.process.wait(1)
        assert box.wait() == 42


@pytest.mark.parametrize("mode", ["namespace", "none"])
def test_server_that_is_killed_ends_the_waiter_with_a_status_like_a_shells(mode: str, shared: Path) -> None:
    with Sandboxed(mode, shared, words_of("nobody")) as box:
        os.kill(box.pid, signal.SIGKILL)
        assert box.wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("mode", ["namespace", "none"])
def test_server_dies_with_the_waiter(mode: str, shared: Path) -> None:
    with Sandboxed(mode, shared, words_of("nobody")) as box:
        server = os.pidfd_open(box.pid)
        try:
            box.process.kill()
            box.process.wait(PATIENCE)
            watch = select.poll()
            watch.register(server, select.POLLIN)
            assert watch.poll(PATIENCE * 1000), "the server lives on"
        finally:
            os.close(server)


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_without_a_sandbox_one_process_gives_up_the_same_privileges(user: str, shared: Path) -> None:
    if user == "root" and not ROOT:
        pytest.skip("needs root")
    with Sandboxed("none", shared, words_of(user), landlock="off") as box:
        assert box.pid == box.process.pid
        assert [name for name, _ in box.hooks] == ["imports", "serving", "seccomp"]
        status = box.status()
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == (caps.KEPT if user == "root" else 0)
        assert (status["CapBnd"], status["NoNewPrivs"], status["Groups"], status["Umask"]) == (NOTHING, "1", "", "0000")
        assert sorted(path for path in box.descriptors().values() if path.startswith("/")) == sorted(
            ["/dev/null", "/dev/null", str(shared)]
        )
        assert box.ask("len(os.listdir('/')) > 1"), "which is what none means"


def test_waiter_that_is_slow_to_look_finds_its_server(shared: Path) -> None:
    code = """
import os, sys, time
from fusewire.linux import sandbox, sandbox_enter
fork = os.fork
def slow():
    waits = sys._getframe(1).f_code.co_name == "_wait"
    pid = fork()
    if pid and waits:
        time.sleep(0.3)  # until what this process has started has started the next one, and ended
    return pid
os.fork = slow
plan = sandbox.plan("namespace", shared=os.fsencode(sys.argv[1]))
print(sandbox_enter.probe(plan), flush=True)
try:
    sandbox_enter.enter(plan)
except sandbox_enter.ServerEnded as ended:
    sys.exit(ended.code)
os._exit(7)
"""
    process = subprocess.Popen(
        [*as_nobody(), "-c", code, str(shared)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert (out, process.returncode) == ("None\n", 7), err


def test_step_that_fails_is_an_error_of_the_caller_and_leaves_no_process(shared: Path) -> None:
    with Sandboxed("namespace", shared, words_of("nobody"), seccomp_fails=True) as box:
        assert box.error["step"] == "seccomp"
        assert "`seccomp` failed: no filters here" in box.error["error"]
        assert box.wait() == 3


def test_descriptors_of_the_starter_are_closed(shared: Path) -> None:
    reader, writer = os.pipe()
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with Sandboxed("namespace", shared, words_of("nobody"), pass_fds=(writer, directory), stdin=reader) as box:
            os.close(writer)
            writer = -1
            kept = box.descriptors()
            assert [number for number, path in kept.items() if path.startswith("pipe:")] == [2]
            assert kept[0].endswith("/null")
            assert len(kept) == 3 + 3  # the wire, the shared directory, /proc/self/fd
    finally:
        os.close(directory)
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_threads_and_directories_to_keep_are_refused_before_anything_is_done(shared: Path) -> None:
    code = """
import os, threading
from fusewire.linux import sandbox, sandbox_enter
plan = sandbox.plan("none", shared=os.fsencode(os.environ["SHARED"]))
end = threading.Event()
worker = threading.Thread(target=end.wait)
worker.start()
try: sandbox_enter.enter(plan)
except OSError as error: print(error)
end.set()
worker.join()
try: sandbox_enter.enter(plan, keep=[os.open("/", os.O_PATH)])
except ValueError as error: print(error)
"""
    done = subprocess.run(
        [*PYTHON, "-c", code], env=os.environ | {"SHARED": str(shared)}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("this process has 2 threads")
    assert "is a directory: kept open, it leads out" in second
