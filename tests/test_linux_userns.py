"""User namespaces: plans, entering, and what is said when the kernel refuses."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rootless
from fusewire.linux import syscalls, userns
from fusewire.linux.userns import IdMap
from rootless import NOBODY, rootless_python

MAPPED = 65530  # nobody's id here, so it can be given ranges for one test


def run(code: str, uid: int = NOBODY, *, fusermount: bool = False, prefix: list[str] | None = None) -> str:
    script = "import os\nfrom fusewire.linux import syscalls, userns\n" + code
    words = [*(prefix or []), *rootless_python(uid, fusermount=fusermount), "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=20)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_default_plan_maps_an_unprivileged_caller_to_itself() -> None:
    out = run("""
userns.enter(userns.default_plan())
print(os.getuid(), os.getgid(), open("/proc/self/uid_map").read().split(), open("/proc/self/setgroups").read().strip())
""")
    uid, gid = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    assert out == f"{uid} {gid} ['{uid}', '{uid}', '1'] deny\n"


def test_root_plan_maps_the_caller_to_root() -> None:
    assert run("userns.enter(userns.root_plan()); print(os.getuid(), os.getgid())") == "0 0\n"


def test_default_plan_makes_no_user_namespace_for_who_has_the_capability() -> None:
    out = run("""
userns.enter(userns.root_plan())
before = os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt")
plan = userns.default_plan()
userns.enter(plan)
after = os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt")
print(plan.new_user, before[0] == after[0], before[1] == after[1])
""")
    assert out == "False True False\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a mount that propagates")
def test_mounts_do_not_propagate_out_of_a_mount_namespace_of_roots(tmp_path: Path) -> None:
    code = f"""
import os
from fusewire.linux import syscalls, userns
os.mkdir("{tmp_path}/shared")
syscalls.unshare(syscalls.CLONE_NEWNS)
syscalls.mount(None, b"/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
syscalls.mount(b"none", b"{tmp_path}", b"tmpfs", 0)
syscalls.mount(None, b"{tmp_path}", None, syscalls.MS_SHARED)
outside = os.open("/proc/self/ns/mnt", os.O_RDONLY)
userns.enter(userns.current_plan())
os.mkdir("{tmp_path}/m")
syscalls.mount(b"none", b"{tmp_path}/m", b"tmpfs", 0)
inside = open("/proc/self/mountinfo").read().count("{tmp_path}/m ")
syscalls.setns(outside, syscalls.CLONE_NEWNS)
print(inside, open("/proc/self/mountinfo").read().count("{tmp_path}/m "))
"""
    import sys

    path = os.path.dirname(os.path.dirname(os.path.dirname(userns.__file__)))
    words = ["env", f"PYTHONPATH={path}", sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "1 0\n"


def test_a_process_of_several_threads_is_told_so() -> None:
    out = run("""
import threading
stop = threading.Event()
thread = threading.Thread(target=stop.wait); thread.start()
try: userns.enter(userns.self_plan())
except userns.UsernsError as error: print(error.errno, error)
stop.set(); thread.join()
""")
    assert out.startswith(f"{errno.EINVAL} cannot make a user namespace: this process has 2 threads")


def test_a_namespace_limit_is_named() -> None:
    out = run("""
userns.enter(userns.root_plan())
with open("/proc/sys/user/max_user_namespaces", "w") as file: file.write("0")
try: userns.enter(userns.root_plan())
except userns.UsernsError as error: print(error.errno, error.cause, error.remedy, sep="|")
print(userns.probe(userns.root_plan()).cause)
""")
    number, cause, rest = out.split("|", 2)
    assert int(number) == errno.ENOSPC
    assert cause == "user namespaces are switched off (user.max_user_namespaces=0)"
    assert rest.splitlines()[0].startswith("ask the administrator for `sysctl user.max_user_namespaces=")
    assert rest.splitlines()[1] == cause


def test_a_chroot_is_recognised() -> None:
    out = run("""
home = os.environ["HOME"]
userns.enter(userns.root_plan())
root = home + "/root"
os.makedirs(root + "/proc", exist_ok=True)
syscalls.mount(b"/proc", os.fsencode(root) + b"/proc", None, syscalls.MS_BIND | syscalls.MS_REC)
os.chroot(root); os.chdir("/")
try: userns.enter(userns.root_plan())
except userns.UsernsError as error: print(error.errno, error.cause)
""")
    assert out == f"{errno.EPERM} this process is in a chroot, where no user namespace can be made\n"


def test_a_map_of_ids_that_are_not_the_callers_is_explained() -> None:
    out = run("""
plan = userns.Plan((userns.IdMap(0, 12345),), (userns.IdMap(0, os.getgid()),))
try: userns.enter(plan)
except userns.UsernsError as error: print(error.errno, error)
""")
    assert out.startswith(f"{errno.EPERM} cannot map ids in the new user namespace (writing uid_map)")
    assert "newuidmap" in out


def test_a_process_that_is_not_dumpable_becomes_so() -> None:
    out = run("syscalls.set_dumpable(False); userns.enter(userns.self_plan()); print(syscalls.get_dumpable())")
    assert out == "1\n"


def test_probe_tries_in_a_child_and_leaves_this_process_alone() -> None:
    out = run("""
before = os.readlink("/proc/self/ns/user"), len(os.listdir("/proc/self/fd"))
print(userns.probe(userns.self_plan()))
print(before == (os.readlink("/proc/self/ns/user"), len(os.listdir("/proc/self/fd"))))
""")
    assert out == "None\nTrue\n"


def test_pid_namespace_holds_the_next_child() -> None:
    out = run("""
userns.enter(userns.self_plan(), syscalls.CLONE_NEWPID)
pid = os.fork()
if pid == 0:
    print(os.getpid(), flush=True); os._exit(0)
os.waitpid(pid, 0)
""")
    assert out == "1\n"


# --- ranges


def test_subordinate_ranges_are_found_by_name_and_by_number(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    path.write_text("other:1:1\nme:100000:65536\n4711:300000:10\nme:broken\nme:5:0\nme:x:7\n\n")
    assert userns.subordinate_ranges(str(path), [b"4711", b"me"]) == [(100000, 65536), (300000, 10)]
    assert userns.subordinate_ranges(str(path), [b"nobody"]) == []
    assert userns.subordinate_ranges(str(tmp_path / "missing"), [b"me"]) == []


@given(
    inside=st.integers(0, 70000),
    ranges=st.lists(st.tuples(st.integers(100000, 200000), st.integers(1, 70000)), max_size=4),
)
def test_laid_out_ranges_map_every_subordinate_id_once(inside: int, ranges: list[tuple[int, int]]) -> None:
    maps = userns._lay_out(inside, 4711, ranges)
    assert IdMap(inside, 4711, 1) in maps
    assert sum(m.count for m in maps) == 1 + sum(count for _, count in ranges)
    assert all(m.count > 0 for m in maps)
    assert all(a.inside + a.count <= b.inside for a, b in itertools.pairwise(maps))
    spans = sorted((m.outside, m.outside + m.count) for m in maps if m.inside != inside)
    wanted = sorted((start, start + count) for start, count in ranges)
    assert sum(end - start for start, end in spans) == sum(end - start for start, end in wanted)


def test_identity_keeps_the_own_id_in_the_middle_of_the_ranges() -> None:
    assert userns._lay_out(2, 2, [(1000, 5)]) == (IdMap(0, 1000, 2), IdMap(2, 2, 1), IdMap(3, 1002, 3))
    assert userns._lay_out(0, 77, [(1000, 5)]) == (IdMap(0, 77, 1), IdMap(1, 1000, 5))


def test_missing_ranges_say_which_line_to_ask_for() -> None:
    out = run("""
try: userns.ranges_plan()
except userns.UsernsError as error: print(error)
else: print("mapped")
""")
    if os.geteuid() != 0 and out == "mapped\n":
        pytest.skip("/etc/subuid and /etc/subgid give ranges to the user who runs the tests")
    assert "/etc/subuid gives no range to user" in out or "newuidmap is not installed" in out


needs_newuidmap = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("newuidmap") is None, reason="needs root, to give ranges, and newuidmap (uidmap)"
)


@pytest.fixture
def with_ranges(tmp_path: Path) -> list[str]:
    """Words to run a program where /etc/subuid and /etc/subgid give MAPPED a range; the machine's stay as they are."""
    if rootless.has_name(MAPPED):
        pytest.skip(f"there is a user with uid {MAPPED}")
    os.chmod(tmp_path, 0o755)
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(f"{MAPPED}:200000:1000\n")
    passwd = Path("/etc/passwd").read_text() + f"mapped:x:{MAPPED}:{MAPPED}::/:/bin/sh\n"
    (tmp_path / "passwd").write_text(passwd)
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("subuid", "subgid", "passwd"))
    # newuidmap insists on files that exist; the machine may have none to mount over
    for name in ("subuid", "subgid"):
        if not os.path.exists(f"/etc/{name}"):
            pytest.skip(f"/etc/{name} does not exist")
    return ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{mounts} && exec "$@"', "sh"]


@needs_newuidmap
def test_whole_ranges_are_mapped_by_newuidmap_and_setgroups_stays_allowed(with_ranges: list[str]) -> None:
    out = run(
        """
userns.enter(userns.ranges_plan(as_root=True))
print(open("/proc/self/uid_map").read().split(), open("/proc/self/setgroups").read().strip())
os.setgroups([5]); os.setgid(7); os.setuid(7)
print(os.getuid(), os.getgid(), os.getgroups())
""",
        MAPPED,
        fusermount=True,
        prefix=with_ranges,
    )
    assert out == f"['0', '{MAPPED}', '1', '1', '200000', '1000'] allow\n7 7 [5]\n"


@needs_newuidmap
def test_what_newuidmap_complains_of_is_the_cause(with_ranges: list[str]) -> None:
    out = run(
        """
plan = userns.Plan((userns.IdMap(0, 1, 1),), (userns.IdMap(0, os.getgid(), 1),), helpers=True)
try: userns.enter(plan)
except userns.UsernsError as error: print(error)
""",
        MAPPED,
        fusermount=True,
        prefix=with_ranges,
    )
    assert "newuidmap: uid range [0-1) -> [1-2) not allowed" in out
    assert "/etc/subuid" in out


@needs_newuidmap
def test_ranges_under_no_new_privs_are_refused_before_anything_is_done(with_ranges: list[str]) -> None:
    out = run(
        """
before = os.readlink("/proc/self/ns/user")
try: userns.enter(userns.ranges_plan())
except userns.UsernsError as error: print(error.cause)
print(before == os.readlink("/proc/self/ns/user"))
""",
        MAPPED,
        prefix=with_ranges,
    )
    assert out == "no_new_privs is set, so newuidmap and newgidmap gain no privilege\nTrue\n"


# --- explanations, from what /proc would say


@pytest.mark.parametrize(
    ("step", "number", "sysctls", "cause"),
    [
        ("unshare", errno.EPERM, {"kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=0"),
        ("unshare", errno.EPERM, {"kernel/apparmor_restrict_unprivileged_userns": "1"}, "AppArmor restricts"),
        ("unshare", errno.ENOSPC, {"user/max_user_namespaces": "500"}, "user.max_user_namespaces=500"),
        ("unshare", errno.EINVAL, {}, "this kernel has no user namespaces"),
        ("gid_map", errno.EPERM, {}, "only the caller's own id can be mapped"),
    ],
)
def test_refusals_are_traced_to_their_setting(
    monkeypatch: pytest.MonkeyPatch, step: str, number: int, sysctls: dict[str, str], cause: str
) -> None:
    monkeypatch.setattr(userns, "_sysctl", sysctls.get)
    monkeypatch.setattr(userns, "thread_count", lambda: 1)
    found, remedy = userns.explain(step, number)
    assert cause in found
    assert remedy


def test_apparmor_is_not_blamed_outside_a_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "_sysctl", {"kernel/apparmor_restrict_unprivileged_userns": "1"}.get)
    monkeypatch.setattr(userns, "in_first_namespace", lambda: True)
    assert "AppArmor restricts" not in userns.explain("mount", errno.EPERM)[0]
    monkeypatch.setattr(userns, "in_first_namespace", lambda: False)
    assert "AppArmor restricts" in userns.explain("mount", errno.EACCES)[0]


def test_this_process_is_left_as_it_was() -> None:
    assert syscalls.get_dumpable() == 1
    assert userns.thread_count() >= 1
    assert not userns.chrooted()
