"""Mount points where the user may make none, inside a namespace, with the host unchanged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rootless
from fusewire.linux import mountinfo
from rootless import rootless_python

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="the tests make directories that an unprivileged user may not write, which takes root"
)

PRELUDE = """
import os, subprocess, sys
from fusewire.linux import shadow, syscalls, userns
userns.enter(userns.self_plan())
s = shadow.Shadow()
def sh(command):
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    print(result.stdout + result.stderr, end="", flush=True)
"""


def run(code: str, cwd: str | Path = "/", uid: int = rootless.NOBODY) -> str:
    """The output of code after PRELUDE, as the unprivileged user in a namespace of its own."""
    script = PRELUDE + code
    result = subprocess.run(
        [*rootless_python(uid), "-c", script], capture_output=True, text=True, cwd=cwd, timeout=30, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tree(path: str | Path) -> list[tuple[str, int, int, int, float]]:
    """Everything directly in a directory, as far as a change would show."""
    found = []
    for name in sorted(os.listdir(path)):
        info = os.lstat(os.path.join(path, name))
        found.append((name, info.st_ino, info.st_mode, info.st_uid, info.st_mtime))
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of root's with a file, a symlink, a fifo, a directory that only root may enter and one for all."""
    path = Path(tempfile.mkdtemp(prefix="fusewire-shadow-", dir="/tmp"))
    path.chmod(0o755)
    (path / "file").write_text("content\n")
    (path / "link").symlink_to("dir/inner")
    (path / "long").symlink_to("/" + "x" * 900)
    (path / "dir").mkdir()
    (path / "dir" / "inner").write_text("inner\n")
    (path / "secret").mkdir(mode=0o700)
    (path / "strange name\n\\").touch()
    os.mkfifo(path / "fifo")
    before = tree(path)
    yield path
    assert tree(path) == before
    assert all(not m.mount_point.startswith(os.fsencode(path)) for m in mountinfo.mounts())
    shutil.rmtree(path)


def test_a_missing_directory_is_made_inside_and_its_neighbours_stay_visible(place: Path) -> None:
    out = run(f"""
print(s.make(b"{place}/x/y"), s.made, s.skipped)
s.seal()
sh("cd {place}; ls -d x/y; cat file link; readlink long | wc -c")
sh("cd {place}; cat secret/a; test -p fifo && echo fifo >&2; ls | wc -l >&2")
sh("mkdir {place}/more; touch {place}/x/y/z; rmdir {place}/x")
""")
    lines = out.splitlines()
    assert lines[0] == f"b'{place}/x/y' [] []"
    assert lines[1:5] == ["x/y", "content", "inner", "902"]
    assert lines[5:7] == ["cat: secret/a: Permission denied", "fifo"]
    assert lines[7] == str(len(os.listdir(place)) + 1 + 1)  # x, and the second line of the strange name
    assert out.count("Read-only file system") == 3
    assert not (place / "x").exists()


def test_a_new_directory_at_the_root_keeps_all_mounts_and_devices() -> None:
    before = tree("/")
    mounts = mountinfo.mounts()
    out = run("""
before = {m for m in os.listdir("/")}
print(s.make(b"/fusewire-env/deep"), s.made, s.skipped)
s.seal()
print(sorted(set(os.listdir("/")) - before), sorted(before - set(os.listdir("/"))))
sh("test -c /dev/null && echo > /dev/null && echo dev; cat /proc/self/comm; ls -d /fusewire-env/deep; pwd")
sh("mkdir /more 2>&1; ls -ld /bin | cut -c1; readlink /proc/self/root")
print(len(open("/proc/self/mountinfo").readlines()))
""")
    lines = out.splitlines()
    assert lines[0] == "b'/fusewire-env/deep' [] []"
    assert lines[1] == "['fusewire-env'] []"
    assert lines[2:6] == ["dev", "cat", "/fusewire-env/deep", "/"]
    assert "Read-only file system" in lines[6]
    assert lines[7:9] == ["l" if os.path.islink("/bin") else "d", "/"]
    assert int(lines[9]) >= len([m for m in mounts if m.mount_point != b"/"])
    assert tree("/") == before


def test_a_nested_user_namespace_still_works_under_a_new_root() -> None:
    out = run("""
s.make(b"/fusewire-env")
s.seal()
sh("unshare -Ur id -u")
pid = os.fork()
if pid == 0:
    print(userns.chrooted(), userns.probe(userns.self_plan()), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
""")
    assert out == "0\nFalse None\n"


def test_entering_the_namespace_from_outside_finds_the_new_root() -> None:
    script = PRELUDE + "s.make(b'/fusewire-env'); s.seal(); print(os.getpid(), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [*rootless_python(), "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    ) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        code = f"""
import os
from fusewire.linux import userns
print(os.path.exists("/fusewire-env"))
userns.join({pid})
print(os.path.exists("/fusewire-env"), os.getcwd(), os.getuid())
"""
        result = subprocess.run([*rootless_python(), "-c", code], capture_output=True, text=True, cwd="/tmp")
        assert result.stdout == f"False\nTrue / {rootless.NOBODY}\n", result.stderr


def test_a_shadow_stays_usable_when_the_working_directory_lies_in_it(place: Path) -> None:
    out = run(
        f"""
s.make(b"{place}/x")
s.seal()
print(os.getcwd(), os.path.exists("inner"), os.path.exists("../x"))
sh("pwd; /bin/pwd; cat inner")
""",
        cwd=place / "dir",
    )
    assert out == f"{place}/dir True True\n{place}/dir\n{place}/dir\ninner\n"


def test_the_working_directory_survives_a_new_root(place: Path) -> None:
    out = run(
        """
s.make(b"/fusewire-env/x")
s.seal()
print(os.getcwd())
sh("/bin/pwd; cat inner; ls -d ../../../fusewire-env/x")
""",
        cwd=place / "dir",
    )
    assert out == f"{place}/dir\n{place}/dir\ninner\n../../../fusewire-env/x\n"


def test_several_targets_share_shadows_also_after_sealing(place: Path) -> None:
    out = run(f"""
for name in ("a/b", "a/c", "d", "dir/e/f"): s.make(b"{place}/" + name.encode())
s.seal()
count = len(open("/proc/self/mountinfo").readlines())
s.make(b"{place}/a/g")
s.make(b"{place}/h")
s.make(b"{place}/dir/e/f")
s.seal()
print(len(open("/proc/self/mountinfo").readlines()) - count)
sh("cd {place}; ls -d a/b a/c d dir/e/f a/g h; cat dir/inner; mkdir a/x dir/x")
sh("mount -t tmpfs none {place}/a/b")
""")
    assert out.startswith("0\na/b\na/c\na/g\nd\ndir/e/f\nh\ninner\n")
    assert out.count("Read-only file system") == 2


def test_a_target_inside_another_mount_and_below_a_shadow_is_made_there(place: Path) -> None:
    out = run(f"""
s.make(b"{place}/x")
s.seal()
syscalls.mount(b"none", b"{place}/x", b"tmpfs", 0, b"mode=755")
os.mkdir("{place}/x/there"); open("{place}/x/there/file", "w").close()
syscalls.mount(None, b"{place}/x", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
s.make(b"{place}/x/inside/deep")
s.make(b"{place}/x/there/below")
s.seal()
sh("cd {place}; find x | sort")
""")
    assert out.split() == ["x", "x/inside", "x/inside/deep", "x/there", "x/there/below", "x/there/file"]


def test_mounts_below_a_shadowed_directory_stay_in_place(place: Path) -> None:
    out = run(f"""
syscalls.mount(b"none", b"{place}/dir", b"tmpfs", 0, b"mode=755")
os.mkdir("{place}/dir/sub")
syscalls.mount(b"none", b"{place}/dir/sub", b"tmpfs", 0, b"mode=755")
open("{place}/dir/sub/deep", "w").close()
print(s.make(b"{place}/x"), s.skipped)
sh("ls {place}/dir/sub")
""")
    assert out == f"b'{place}/x' []\ndeep\n"


def test_a_directory_that_the_user_may_make_is_made_on_the_host_and_told() -> None:
    home = Path(tempfile.mkdtemp(dir=rootless.rootless_home()))
    home.chmod(0o777)
    out = run(f"""
print(s.make(b"{home}/x/y/z"), s.made)
sh("ls -d {home}/x/y/z")
""")
    assert out.startswith(f"b'{home}/x/y/z' [b'{home}/x/y/z', b'{home}/x/y', b'{home}/x']\n")
    assert (home / "x" / "y" / "z").is_dir()
    shutil.rmtree(home)


def test_an_existing_directory_needs_nothing(place: Path) -> None:
    out = run(f"""
before = open("/proc/self/mountinfo").read()
print(s.make(b"{place}/dir"), s.made, open("/proc/self/mountinfo").read() == before)
""")
    assert out == f"b'{place}/dir' [] True\n"


def test_symlinks_in_the_path_are_followed_as_far_as_they_go(place: Path) -> None:
    (place / "to").symlink_to("dir")
    (place / "dangling").symlink_to("dir/nowhere/else")
    out = run(f"""
print(s.make(b"{place}/to/x"))
print(s.make(b"{place}/dangling/y"))
sh("cd {place}; ls -d to/x dangling/y dir/inner")
""")
    assert out.splitlines() == [
        f"b'{place}/dir/x'",
        f"b'{place}/dir/nowhere/else/y'",
        "dangling/y",
        "dir/inner",
        "to/x",
    ]
    (place / "to").unlink()
    (place / "dangling").unlink()
    os.utime(place, ns=(place.stat().st_atime_ns, place.stat().st_mtime_ns))


def test_relative_targets_start_at_the_working_directory(place: Path) -> None:
    assert run("print(s.make(b'x/y'), s.make(b'../n'))", cwd=place / "dir") == f"b'{place}/dir/x/y' b'{place}/n'\n"


def test_a_directory_that_the_user_cannot_enter_gets_a_shadow_without_its_secrets(place: Path) -> None:
    out = run(f"""
print(s.make(b"{place}/secret/env"), s.made)
s.seal()
sh("ls {place}/secret; cat {place}/file")
""")
    assert out == f"b'{place}/secret/env' []\nenv\ncontent\n"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("{place}/file", "{place}/file is not a directory, the mount point must be one"),
        ("{place}/file/x", "{place}/file is not a directory, a mount point cannot lie below it"),
        ("{place}/unlisted/x", "{place}/unlisted can neither be written nor listed"),
        ("/", "a mount over / is seen by nobody"),
        ("/proc/fusewire", "no mount point can be made in /proc"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(place: Path, target: str, text: str) -> None:
    (place / "unlisted").mkdir(mode=0o711)
    target, text = target.format(place=place), text.format(place=place)
    out = run(f"""
before = open("/proc/self/mountinfo").read()
try: s.make(b"{target}")
except OSError as error: print(error, open("/proc/self/mountinfo").read() == before)
""")
    assert text in out
    assert f"'{target}' True\n" in out
    (place / "unlisted").rmdir()


def test_mounts_of_others_that_cannot_be_seen_into_are_not_taken_for_missing(place: Path) -> None:
    (place / "theirs").mkdir()
    server = rootless.Server(
        ["env", f"PYTHONPATH={os.path.dirname(rootless.__file__)}", sys.executable], str(place / "theirs"), "direct"
    )
    with server:
        out = run(f"""
try: s.make(b"{place}/theirs/x")
except OSError as error: print(error)
s.make(b"{place}/y")
print(s.skipped)
sh("ls -d {place}/y")
""")
        server.ask("unmount")
    assert "another user's" in out
    assert out.endswith(f"[]\n{place}/y\n")
    (place / "theirs").rmdir()


def test_real_root_in_a_mount_namespace_of_its_own_gets_shadows_on_read_only_filesystems(place: Path) -> None:
    code = f"""
import os
from fusewire.linux import shadow, syscalls, userns
userns.enter(userns.current_plan())
syscalls.mount(b"{place}", b"{place}", None, syscalls.MS_BIND)
syscalls.mount(None, b"{place}", None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
s = shadow.Shadow()
s.make(b"{place}/x")
print(sorted(os.listdir("{place}"))[-1], open("{place}/file").read(), s.made, s.skipped)
"""
    path = f"{os.path.dirname(rootless.__file__)}"
    result = subprocess.run(
        ["env", f"PYTHONPATH={path}", sys.executable, "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert result.stdout == "x content\n [] []\n", result.stderr
