from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

import rootless
from fusewire.cli import doctor, trials
from fusewire.cli.doctor import Probe, look
from fusewire.cli.trials import attempt, try_mount
from fusewire.linux import mountinfo

ASK = "import json, sys; from fusewire.cli.doctor import doctor; sys.exit(doctor(json=True))"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make this situation")


class Found:
    """What a doctor in a process of its own has found."""

    def __init__(self, done):
        assert done.stderr == "", done.stderr
        self.status = done.returncode
        self.all = json.loads(done.stdout)
        self.rows = {row["name"]: row for row in self.all["checks"]}
        self.trials = {trial["name"]: trial for trial in self.all["trials"]}

    def works(self):
        return [name for name, trial in self.trials.items() if trial["ok"]]


def ask(words, **options):
    return Found(subprocess.run(words, text=True, capture_output=True, timeout=100, **options))


def ask_rootless(before="", *, fusermount=False, code=ASK):
    """A doctor run by a user who may do nothing, after root has run `before` in a mount namespace of its own."""
    words = [*rootless.rootless_python(fusermount=fusermount), "-c", code]
    if not before:
        return ask(words)
    prepare = (
        "import os, sys; from fusewire.linux import syscalls, userns; userns.enter(userns.current_plan())\n"
        f"{before}\n"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    return ask([sys.executable, "-c", prepare, *words])


# --- this machine as it is


def test_user_without_any_privilege_gets_namespaces_and_status_0():
    found = ask_rootless()
    assert found.status == 0
    assert found.works() == ["namespace", "run"]
    assert (found.all["mount"], found.all["run"], found.all["ok"]) == ("namespace", True, True)
    assert "CAP_SYS_ADMIN" in found.trials["direct"]["finding"]
    for name in ("kernel", "/dev/fuse", "namespace limits", "namespaces", "fsopen", "state directory"):
        assert found.rows[name]["verdict"] == "ok", name
    if "fusermount3" in found.rows and os.path.exists("/usr/bin/fusermount3"):
        assert found.rows["fusermount3"]["verdict"] == "warning"
        assert "no_new_privs" in found.rows["fusermount3"]["finding"]


@needs_root
def test_user_with_a_working_helper_gets_fusermount3():
    if not os.path.exists("/usr/bin/fusermount3") or not os.stat("/usr/bin/fusermount3").st_mode & stat.S_ISUID:
        pytest.skip("fusermount3 with its set-user-ID bit is missing")
    if not rootless.has_name(rootless.NOBODY):
        pytest.skip("fusermount3 wants a user with a name, and uid 65534 has none")
    found = ask_rootless(fusermount=True)
    assert found.works() == ["fusermount3", "namespace", "run"]
    assert found.all["mount"] == "fusermount3"
    assert found.rows["fusermount3"]["verdict"] == "ok"


@needs_root
def test_root_gets_direct_and_nothing_is_left_behind(tmp_path, monkeypatch, capsys):
    rootless.open_fuse_device()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    before = mountinfo.read(), sorted(os.listdir("/proc/self/fd"))
    assert doctor.doctor(json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mount"] == "direct"
    assert found["run"]
    assert (mountinfo.read(), sorted(os.listdir("/proc/self/fd"))) == before
    assert os.listdir(tmp_path) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_words_for_people_end_in_what_mount_and_run_do():
    code = "import sys; from fusewire.cli.doctor import doctor; sys.exit(doctor())"
    done = subprocess.run([*rootless.rootless_python(), "-c", code], text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].split()[:2] == ["ok", "kernel"]
    assert any(line.startswith("works    strategy namespace") for line in lines)
    assert any("fails    strategy direct" in line and "CAP_SYS_ADMIN" in line for line in lines)
    assert lines[-2:] == ["fusewire mount: will use the strategy namespace", "fusewire run:   works"]


# --- this machine, made worse for one process


@needs_root
def test_device_that_is_missing_is_named_and_nothing_works():
    found = ask_rootless("syscalls.mount(b'none', b'/dev', b'tmpfs', 0)")
    assert found.status == 1
    assert found.works() == []
    assert found.all["mount"] is None
    row = found.rows["/dev/fuse"]
    assert row["verdict"] == "bad"
    assert "missing" in row["finding"]
    assert "the kernel has FUSE" in row["finding"]
    assert "--device /dev/fuse" in row["remedy"]
    assert "/dev/fuse is missing" in found.trials["namespace"]["finding"]


@needs_root
def test_device_of_mode_600_is_named_with_the_remedy(tmp_path):
    os.mknod(tmp_path / "fuse", 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    found = ask_rootless(f"syscalls.mount({str(tmp_path / 'fuse')!r}.encode(), b'/dev/fuse', None, syscalls.MS_BIND)")
    assert found.works() == []
    row = found.rows["/dev/fuse"]
    assert "Permission denied (mode 600, user 0" in row["finding"]
    assert "chmod 666 /dev/fuse" in row["remedy"]
    assert found.rows["namespaces"]["verdict"] == "ok"


@needs_root
def test_device_that_is_something_else_is_seen():
    found = ask_rootless("syscalls.mount(b'/dev/null', b'/dev/fuse', None, syscalls.MS_BIND)")
    assert "is not the character device 10:229" in found.rows["/dev/fuse"]["finding"]


def test_namespaces_switched_off_by_sysctl_are_named():
    """In a user namespace of our own, whose limit of namespaces below it its root may set."""
    setpriv = "os.execvp('setpriv', ['setpriv', '--bounding-set=-all', '--inh-caps=-all', *sys.orig_argv[:-1], ask])"
    code = (
        "import os, sys; from fusewire.linux import userns; userns.enter(userns.root_plan())\n"
        "with open('/proc/sys/user/max_user_namespaces', 'w') as limit: limit.write('0')\n"
        f"ask = {ASK!r}\n"
        f"{setpriv}"
    )
    found = ask_rootless(code=code)
    assert found.status == 1
    assert found.works() == []
    assert found.rows["namespace limits"]["verdict"] == "bad"
    assert found.rows["namespace limits"]["remedy"].endswith("`sysctl user.max_user_namespaces=10000`")
    assert found.rows["namespaces"]["verdict"] == "bad"
    assert "max_user_namespaces=0" in found.rows["namespaces"]["finding"]
    assert "max_user_namespaces=0" in found.trials["run"]["finding"]


def test_root_of_a_namespace_that_somebody_else_made_gets_direct():
    if shutil.which("unshare") is None:
        pytest.skip("unshare (util-linux) is missing")
    words = rootless.rootless_python()
    at = words.index("env")
    found = ask([*words[:at], "unshare", "-Urm", *words[at:], "-c", ASK])
    assert found.all["mount"] == "direct"
    assert found.all["run"]


FILTER = """
import ctypes, os, platform, struct, sys
from fusewire.linux import syscalls
calls = {"x86_64": (272, 165, 166), "aarch64": (97, 40, 39)}[platform.machine()]
program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the number of the call
for number in calls:
    program += [struct.pack("HBBI", 0x15, 0, 1, number), struct.pack("HBBI", 0x06, 0, 0, ACTION)]
program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
raw = ctypes.create_string_buffer(b"".join(program))
head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(raw)))
syscalls.set_no_new_privs()
syscalls.prctl(22, 2, ctypes.addressof(head))
"""
needs_known_calls = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the numbers of unshare and mount are not known here"
)


@needs_known_calls
def test_seccomp_filter_that_forbids_unshare_and_mount_is_named():
    found = ask_rootless(code=FILTER.replace("ACTION", "0x00050001") + ASK)
    assert found.works() == []
    row = found.rows["seccomp"]
    assert row["verdict"] == "bad"
    assert row["finding"] == "a filter forbids unshare, mount, umount2"
    assert "--security-opt seccomp" in row["remedy"]
    assert "seccomp" in found.rows["namespaces"]["finding"]


@needs_known_calls
def test_seccomp_filter_that_kills_does_not_kill_the_doctor():
    found = ask_rootless(code=FILTER.replace("ACTION", "0x80000000") + ASK)
    assert found.status == 1
    assert "by killing" in found.rows["seccomp"]["finding"]
    assert "died" in found.trials["namespace"]["finding"]


@needs_known_calls
def test_seccomp_filter_that_forbids_nothing_of_ours_is_fine():
    found = ask_rootless(code=FILTER.replace("ACTION", "0x7FFF0000") + ASK)
    assert found.status == 0
    assert found.rows["seccomp"]["verdict"] == "ok"
    assert "lets unshare and mount pass" in found.rows["seccomp"]["finding"]


@needs_root
def test_chroot_is_recognised(tmp_path):
    """A directory with everything of / mounted in it, which is itself no mount."""
    os.chmod(tmp_path, 0o755)
    before = (
        f"root = {str(tmp_path)!r}\n"
        "for entry in os.scandir('/'):\n"
        "    if entry.is_symlink(): os.symlink(os.readlink(entry.path), f'{root}/{entry.name}')\n"
        "    elif entry.is_dir():\n"
        "        os.mkdir(f'{root}/{entry.name}')\n"
        "        syscalls.mount(entry.path.encode(), f'{root}/{entry.name}'.encode(), None,"
        " syscalls.MS_BIND | syscalls.MS_REC)\n"
        "os.chroot(root); os.chdir('/')"
    )
    found = ask_rootless(before)
    assert found.works() == []
    assert found.rows["chroot"]["verdict"] == "bad"
    assert "this is a chroot" in found.rows["chroot"]["finding"]
    assert "chroot" in found.rows["namespaces"]["finding"]


@needs_root
def test_masked_proc_is_told_with_what_hides_it():
    found = ask_rootless("syscalls.mount(b'none', b'/proc/irq', b'tmpfs', syscalls.MS_RDONLY)")
    assert found.status == 0
    row = found.rows["/proc"]
    assert row["verdict"] == "warning"
    assert "/proc/irq" in row["finding"]
    assert row["meaning"] == "only `run --pid` needs it"


@needs_root
def test_helper_without_its_set_user_id_bit_is_named(tmp_path):
    if not os.path.exists("/usr/bin/fusermount3"):
        pytest.skip("fusermount3 is missing")
    shutil.copy("/usr/bin/fusermount3", tmp_path / "plain")
    path = str(tmp_path / "plain")
    os.chmod(path, 0o755)
    found = ask_rootless(
        f"syscalls.mount({path!r}.encode(), b'/usr/bin/fusermount3', None, syscalls.MS_BIND)", fusermount=True
    )
    assert found.rows["fusermount3"]["finding"] == "/usr/bin/fusermount3 is not set-user-ID root"
    assert "chmod u+s" in found.rows["fusermount3"]["remedy"]
    assert found.all["mount"] == "namespace"


def test_state_directory_that_cannot_be_used_is_named(tmp_path):
    code = f"import os; os.environ['XDG_RUNTIME_DIR'] = {rootless.rootless_home()!r}\n" + ASK
    blocker = f"{rootless.rootless_home()}/fusewire"
    os.symlink("/etc", blocker)
    try:
        found = ask_rootless(code=code)
    finally:
        os.unlink(blocker)
    assert found.rows["state directory"]["verdict"] == "bad"
    assert "it is a symlink" in found.rows["state directory"]["finding"]


# --- trials end


def test_trial_that_hangs_is_killed_with_its_children():
    reader, writer = os.pipe()

    def hang():
        if os.fork() == 0:
            signal.pause()
        os.close(writer)
        signal.pause()
        return ""

    outcome = attempt(hang, seconds=0.2)
    os.close(writer)
    assert not outcome.ok
    assert outcome.text == "the trial gave no answer within 0.2 s"
    assert os.read(reader, 1) == b"", "a child of the trial still holds the pipe"
    os.close(reader)


def test_trial_that_dies_is_told():
    outcome = attempt(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert outcome.text == "the trial died (-9)"
    assert attempt(lambda: "fine").text == "fine"


def test_helper_that_hangs_does_not_hang_the_doctor(tmp_path, monkeypatch):
    helper = tmp_path / "fusermount3"
    helper.write_text("#!/bin/sh\nexec sleep 600\n")
    helper.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    outcome = try_mount("fusermount3", 0.5, str(helper))
    assert outcome.text == "the trial gave no answer within 0.5 s"
    assert os.listdir(tmp_path) == ["fusermount3"]


@needs_root
def test_trial_killed_while_mounted_leaves_nothing(tmp_path, monkeypatch):
    """The looker waits for ever; fusermount3 alone mounts where everybody sees it."""
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is missing")
    rootless.open_fuse_device()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(trials, "_look_at", lambda target, go: signal.pause())
    outcome = try_mount("fusermount3", 2)
    assert "no answer" in outcome.text
    assert os.listdir(tmp_path) == []
    assert str(tmp_path).encode() not in mountinfo.read()


# --- rows from a copied tree


@pytest.fixture
def tree(tmp_path):
    """Put files below a root: tree({"/proc/...": text})."""

    def plant(files):
        for path, text in files.items():
            place = tmp_path / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return str(tmp_path)

    return plant


def rows(root, **options):
    options = {"release": "6.1.0-18-amd64", "uid": 1000, "privileged": False, "environ": {}} | options
    return {row.name: row for row in look(Probe(root, **options))}


@pytest.mark.parametrize(
    ("release", "verdict"),
    [
        ("6.18.44-fc-v769", "ok"),
        ("4.18.0-553.el8.x86_64", "ok"),
        ("4.17.19", "bad"),
        ("3.10.0-1160.el7.x86_64", "bad"),
        ("10.0-rc1", "ok"),
        ("5-custom", "unknown"),
        ("weird", "unknown"),
    ],
)
def test_kernel_before_4_18_is_bad(tree, release, verdict):
    assert rows(tree({}), release=release)["kernel"].verdict == verdict


def test_what_is_bad_for_users_is_a_warning_for_who_may_mount_anyway(tree):
    root = tree({"/proc/sys/user/max_user_namespaces": "0\n"})
    assert rows(root)["namespace limits"].verdict == "bad"
    assert rows(root, privileged=True)["namespace limits"].verdict == "warning"
    assert rows(root, privileged=True, release="3.10.0")["kernel"].verdict == "warning"


@pytest.mark.parametrize(
    ("files", "name", "verdict", "finding", "remedy"),
    [
        ({"/proc/sys/user/max_user_namespaces": "15000\n"}, "namespace limits", "ok", "15000", ""),
        ({}, "namespace limits", "unknown", "missing", "fusermount3"),
        (
            {"/proc/sys/user/max_user_namespaces": "9", "/proc/sys/user/max_mnt_namespaces": "0"},
            "namespace limits",
            "bad",
            "user.max_mnt_namespaces=0",
            "sysctl user.max_mnt_namespaces=10000",
        ),
        (
            {"/proc/sys/kernel/unprivileged_userns_clone": "0\n"},
            "unprivileged namespaces",
            "bad",
            "kernel.unprivileged_userns_clone=0",
            "sysctl kernel.unprivileged_userns_clone=1",
        ),
        (
            {"/proc/sys/kernel/unprivileged_userns_clone": "1\n"},
            "unprivileged namespaces",
            "ok",
            "kernel.unprivileged_userns_clone=1",
            "",
        ),
        ({}, "unprivileged namespaces", "ok", "no such switch", ""),
        ({}, "AppArmor", "ok", "does not restrict", ""),
        ({"/proc/self/attr/current": "docker-default (enforce)\n"}, "AppArmor", "ok", "docker-default", ""),
        (
            {
                "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n",
                "/proc/self/attr/current": "unconfined\0",
            },
            "AppArmor",
            "bad",
            "apparmor_restrict_unprivileged_userns=1",
            "userns,",
        ),
        (
            {
                "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n",
                "/proc/self/attr/apparmor/current": "fusewire (unconfined)\n",
            },
            "AppArmor",
            "unknown",
            "profile: fusewire",
            "",
        ),
        ({"/proc/self/status": "Name:\tx\nSeccomp:\t0\n"}, "seccomp", "ok", "no filter", ""),
        ({"/proc/self/status": "Seccomp:\t2\n"}, "seccomp", "unknown", "a filter is in force", "--security-opt"),
        ({}, "chroot", "unknown", "cannot be read", "mount /proc"),
        (
            {"/proc/self/mountinfo": "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n"},
            "chroot",
            "ok",
            "not in a chroot",
            "",
        ),
        (
            {"/proc/self/mountinfo": "22 27 0:21 / /proc rw - proc proc rw\n"},
            "chroot",
            "bad",
            "this is a chroot",
            "pivot_root",
        ),
        ({}, "/dev/fuse", "bad", "the kernel has no FUSE", "modprobe fuse"),
        ({"/proc/filesystems": "nodev\tfuse\n\text4\n"}, "/dev/fuse", "bad", "the kernel has FUSE", "--device"),
        ({"/dev/fuse": ""}, "/dev/fuse", "bad", "not the character device", "mknod"),
        ({}, "fusermount3", "warning", "not installed", "install fuse3"),
        ({}, "/etc/fuse.conf", "ok", "user_allow_other is not set, mount_max is 1000", ""),
        (
            {"/etc/fuse.conf": "#user_allow_other\nuser_allow_other\nmount_max = 5\n"},
            "/etc/fuse.conf",
            "ok",
            "user_allow_other is set, mount_max is 5",
            "",
        ),
        ({"/etc/fuse.conf": "mount_max = 0\n"}, "/etc/fuse.conf", "warning", "mount_max is 0", "larger mount_max"),
        ({}, "id ranges", "warning", "/etc/subuid gives you none", "usermod --add-subuids"),
        ({"/etc/subuid": "1000:100000:65536\n"}, "id ranges", "warning", "/etc/subgid gives you none", "usermod"),
        (
            {"/etc/subuid": "1000:100000:65536\n", "/etc/subgid": "1000:1:2\n"},
            "id ranges",
            "warning",
            "newuidmap is not installed",
            "uidmap",
        ),
    ],
)
def test_row_from_a_copied_tree(tree, files, name, verdict, finding, remedy):
    row = rows(tree(files))[name]
    assert row.verdict == verdict
    assert finding in row.finding
    assert remedy in row.remedy
    assert row.verdict == "ok" or row.meaning


def test_apparmor_profile_is_for_the_interpreter_at_hand(tree):
    row = rows(tree({"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"}))["AppArmor"]
    assert f"profile fusewire {os.path.realpath(sys.executable)} flags=(unconfined) {{" in row.remedy
    assert "apparmor_parser -r /etc/apparmor.d/fusewire" in row.remedy


@needs_root
def test_ranges_and_helpers_that_are_there_are_ok(tree, tmp_path):
    names = ("newuidmap", "newgidmap", "fusermount3")
    root = tree(
        {f"/usr/bin/{name}": "" for name in names}
        | {"/etc/subuid": "1000:100000:65536\n", "/etc/subgid": "1000:100000:7\nother:1:2\n"}
    )
    for name in names:
        os.chmod(f"{root}/usr/bin/{name}", 0o4755)
    found = rows(root)
    assert (found["id ranges"].verdict, found["id ranges"].finding) == ("ok", "65536 user ids and 7 group ids")
    assert found["fusermount3"].verdict == "ok"
    os.chmod(f"{root}/usr/bin/fusermount3", 0o4600)
    assert "may not be executed" in rows(root)["fusermount3"].finding
