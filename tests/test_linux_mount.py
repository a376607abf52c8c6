"""Every mount strategy for real, as root and as a user with no privileges whatever."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rootless
from fusewire.linux import mount, mountinfo, syscalls
from rootless import GETATTR, HELLO, INIT, NOBODY, Server, rootless_python

OTHER = 65533

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount directly and become other users")
needs_fusermount = pytest.mark.skipif(
    shutil.which("fusermount3") is None
    or not os.stat(shutil.which("fusermount3") or "/").st_mode & stat.S_ISUID
    or syscalls.get_no_new_privs(),
    reason="no set-user-ID fusermount3 that would work here",
)


def root_python() -> list[str]:
    path = os.pathsep.join((rootless.TESTS, os.path.dirname(os.path.dirname(mount.__file__)) + "/.."))
    return ["env", f"PYTHONPATH={path}", sys.executable, "-W", "error"]


@pytest.fixture
def home() -> Iterator[Path]:
    """A fresh directory of the unprivileged user's, with the private directory of the namespace strategy in it."""
    place = Path(tempfile.mkdtemp(dir=rootless.rootless_home(), prefix="test-"))
    (place / "private").mkdir()
    for path in (place, place / "private"):
        path.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)
    yield place
    left = [m.mount_point for m in mountinfo.mounts() if m.mount_point.startswith(os.fsencode(place))]
    for path in left:
        syscalls.umount2(path, syscalls.MNT_DETACH)
    assert left == []
    assert os.listdir(place / "private") == []
    shutil.rmtree(place)


def as_user(command: str, uid: int = NOBODY) -> subprocess.CompletedProcess[str]:
    """A shell command in a process of its own, in no namespace of ours."""
    prefix = rootless_python(uid)
    until = prefix.index("env") if "env" in prefix else len(prefix) - 3
    return subprocess.run([*prefix[:until], "sh", "-c", command], capture_output=True, text=True, cwd="/", timeout=20)


def inside(path: Path) -> subprocess.Popen[str]:
    """A process of the user's with its working directory in `path`, until its input is closed."""
    prefix = rootless_python()
    process = subprocess.Popen(
        [*prefix[: prefix.index("env")], "sh", "-c", f"cd {path} && echo there && read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    return process


def namespace_server(target: Path, **options: object) -> Server:
    return Server(rootless_python(), str(target), "namespace", str(target.parent / "private"), **options)


# --- namespace


def test_namespace_mount_is_seen_by_other_processes_of_the_user_through_the_target(home: Path) -> None:
    target = home / "mnt"
    with namespace_server(target) as server:
        assert os.readlink(target) == server.ready["outside"]
        assert re.fullmatch(rf"/proc/{server.ready['pid']}/fd/\d+", os.readlink(target))
        seen = as_user(f"ls {target}/ && cat {target}/hello && cd {target} && cat hello && pwd")
        assert seen.stdout == f"hello\n{HELLO.decode() * 2}{target}\n"
        assert server.ask("unmount")["connected"] is False
        assert not os.path.lexists(target)


def test_namespace_mount_with_the_caller_mapped_to_root_is_seen_outside_too(home: Path) -> None:
    target = home / "mnt"
    with namespace_server(target, map_root=True) as server:
        assert as_user(f"cat {target}/hello").stdout == HELLO.decode()
        assert server.ask("unmount")["connected"] is False
        assert not os.path.lexists(target)


def test_a_mount_without_a_target_is_reached_by_its_outside_path(home: Path) -> None:
    code = f"""
import os, threading, rootless
from fusewire.linux import mount
m = mount.mount(None, mount.Options(), private=b"{home}/private")
thread = threading.Thread(target=rootless.serve_hello, args=(m.fd,)); thread.start()
print(os.fsdecode(m.outside), flush=True)
input()
m.unmount(); thread.join(); m.close()
"""
    process = subprocess.Popen(
        [*rootless_python(), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    assert process.stdout is not None
    outside = process.stdout.readline().strip()
    assert as_user(f"cat {outside}/hello").stdout == HELLO.decode()
    process.communicate("\n")
    assert process.returncode == 0


@needs_root
def test_namespace_mount_refuses_other_users_and_root(home: Path) -> None:
    target = home / "mnt"
    with namespace_server(target) as server:
        assert "Permission denied" in as_user(f"ls {target}/", OTHER).stderr
        with pytest.raises(PermissionError):
            os.listdir(target)
        server.ask("unmount")


def test_namespace_mount_appears_in_no_host_mount_table(home: Path) -> None:
    with namespace_server(home / "mnt", fsname=os.fsencode(home)) as server:
        assert os.fsencode(home) in mountinfo.read(server.ready["pid"])
        assert os.fsencode(home) not in mountinfo.read()
        server.ask("unmount")


def test_namespace_mount_is_nosuid_nodev_and_carries_its_names(home: Path) -> None:
    with namespace_server(home / "mnt", fsname=b"a,b\\c d", flags=syscalls.MS_RDONLY, max_read=4096) as server:
        pid = server.ready["pid"]
        (line,) = [m for m in mountinfo.mounts(pid) if m.mount_point == os.fsencode(home / "private")]
        assert line.fstype == b"fuse.fusewire"
        assert line.source == b"a,b\\c d"
        assert {b"ro", b"nosuid", b"nodev"} <= set(line.options.split(b","))
        assert {b"ro", b"max_read=4096"} <= set(line.super_options.split(b","))
        assert line.user_id == home.stat().st_uid
        server.ask("unmount")


def test_an_empty_directory_comes_back_with_its_mode_after_unmount(home: Path) -> None:
    target = home / "mnt"
    target.mkdir()
    os.chown(target, *(home.stat().st_uid, home.stat().st_gid))
    target.chmod(0o2710)
    with namespace_server(target) as server:
        assert target.is_symlink()
        server.ask("unmount")
        assert not target.is_symlink()
        assert stat.S_IMODE(target.stat().st_mode) == 0o2710


def test_unmount_refuses_while_busy_and_the_mount_lives_on(home: Path) -> None:
    target = home / "mnt"
    with namespace_server(target) as server:
        with inside(target):
            answer = server.ask("unmount")
            assert answer["errno"] == errno.EBUSY
            assert str(target) in answer["text"]
            assert as_user(f"cat {target}/hello").stdout == HELLO.decode()
            assert os.readlink(target) == server.ready["outside"]
        assert server.ask("unmount")["connected"] is False
        assert not os.path.lexists(target)


def test_lazy_unmount_succeeds_while_busy_and_lets_the_user_finish(home: Path) -> None:
    target = home / "mnt"
    with namespace_server(target) as server:
        prefix = rootless_python()
        reader = subprocess.Popen(
            [*prefix[: prefix.index("env")], "sh", "-c", f"cd {target} && echo there && read line; cat hello"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "there\n"
        assert server.ask("lazy")["connected"] is True
        assert not os.path.lexists(target)
        assert reader.communicate("\n")[0] == HELLO.decode()
        assert server.ask("unmount")["connected"] is False


def test_a_directory_with_files_is_never_replaced(home: Path) -> None:
    target = home / "mnt"
    target.mkdir()
    (target / "precious").touch()
    with namespace_server(target) as server:
        assert server.ready["errno"] == errno.ENOTEMPTY
        assert f"{target} is not empty" in server.ready["text"]
        assert "fusewire run" in server.ready["text"]
    assert [p.name for p in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("kind", ["file", "unwritable", "stale link", "no parent"])
def test_a_target_that_cannot_become_a_link_is_refused_with_a_way_out(home: Path, kind: str) -> None:
    target = home / "mnt"
    if kind == "file":
        target.touch()
    elif kind == "stale link":
        target.symlink_to("/proc/1/fd/1000000")
    elif kind == "no parent":
        target = home / "missing" / "mnt"
    else:
        if os.geteuid() != 0:
            pytest.skip("the current user may write in its own home")
        os.chown(home, 0, 0)
    with Server(rootless_python(), str(target), "namespace", str(home / "private")) as server:
        expected = {
            "file": "exists and is not a directory",
            "unwritable": "you may not write in",
            "stale link": "fusewire umount",
            "no parent": "cannot be reached",
        }
        assert expected[kind] in server.ready["text"]


def test_a_symlink_to_an_empty_directory_is_followed(home: Path) -> None:
    (home / "real").mkdir()
    os.chown(home / "real", home.stat().st_uid, home.stat().st_gid)
    (home / "link").symlink_to("real")
    with namespace_server(home / "link") as server:
        assert (home / "real").is_symlink()
        assert as_user(f"cat {home}/link/hello").stdout == HELLO.decode()
        server.ask("unmount")
    assert (home / "real").is_dir()
    assert os.readlink(home / "link") == "real"


def test_a_target_below_a_namespace_mount_is_refused(home: Path) -> None:
    with namespace_server(home / "mnt") as server:
        with Server(rootless_python(), str(home / "mnt" / "sub"), "auto", str(home / "private")) as second:
            assert "another namespace" in second.ready["text"]
        server.ask("unmount")


def test_allow_other_is_refused_in_a_namespace_as_it_shuts_the_owner_out(home: Path) -> None:
    with namespace_server(home / "mnt", allow_other=True) as server:
        assert "allow_other lets in only processes inside the namespace" in server.ready["text"]


def test_a_killed_server_leaves_a_link_that_clean_up_removes(home: Path) -> None:
    target = home / "mnt"
    target.mkdir()
    os.chown(target, home.stat().st_uid, home.stat().st_gid)
    server = namespace_server(target)
    server.kill()
    assert "No such file" in as_user(f"ls {target}/").stderr
    mount.clean_up(server.ready)
    assert target.is_dir()
    assert not target.is_symlink()
    mount.clean_up(server.ready)  # twice is once


def test_clean_up_leaves_what_is_not_ours(home: Path) -> None:
    server = namespace_server(home / "mnt")
    server.kill()
    (home / "mnt").unlink()
    (home / "mnt").symlink_to("elsewhere")
    mount.clean_up(server.ready)
    assert os.readlink(home / "mnt") == "elsewhere"


def test_a_failure_after_the_mount_undoes_everything(home: Path) -> None:
    code = f"""
import os
from fusewire.linux import mount, mount_namespace, mountinfo
def fail(place, link): raise OSError(28, "no space for a link", "mnt")
mount_namespace._replace = fail
before = len(os.listdir("/proc/self/fd"))
try: mount.mount(b"{home}/mnt", mount.Options(), "namespace", private=b"{home}/private")
except mount.MountError as error: print(error.errno, error)
print(len(os.listdir("/proc/self/fd")) - before, mountinfo.at(b"{home}/private"))
"""
    result = subprocess.run([*rootless_python(), "-c", code], capture_output=True, text=True, cwd="/", timeout=20)
    assert "no space for a link: mnt" in result.stdout
    assert result.stdout.splitlines()[-1] == "0 None", result.stderr
    assert not os.path.lexists(home / "mnt")


def test_mounting_works_without_the_mount_api_of_linux_5_2(home: Path) -> None:
    code = f"""
import errno, os, rootless, threading
from fusewire.linux import mount, syscalls
def missing(*args): raise OSError(errno.ENOSYS, "fsopen")
syscalls.fsopen = missing
rootless.serve_commands("{home}/mnt", "namespace", "{home}/private")
"""
    process = subprocess.Popen(
        [*rootless_python(), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    assert as_user(f"cat {home}/mnt/hello").stdout == HELLO.decode()
    process.communicate("unmount\n")
    assert not os.path.lexists(home / "mnt")


def test_closed_standard_descriptors_do_not_clash(home: Path) -> None:
    prefix = " ".join(rootless_python())
    code = f"""
import os
for fd in (0, 1, 2): os.close(fd)
from fusewire.linux import mount
m = mount.mount(b"{home}/mnt", mount.Options(), "namespace", private=b"{home}/private")
link = os.readlink("{home}/mnt")
m.unmount(lazy=True)
os._exit(0 if m.fd > 2 and int(link.rsplit("/", 1)[1]) > 2 else 1)
"""
    assert subprocess.run([*prefix.split(), "-c", code], cwd="/", timeout=20).returncode == 0


def test_a_process_with_threads_is_told_to_fork_first(home: Path) -> None:
    code = f"""
import threading
from fusewire.linux import mount
stop = threading.Event()
thread = threading.Thread(target=stop.wait); thread.start()
try: mount.mount(b"{home}/mnt", mount.Options(), "namespace", private=b"{home}/private")
except mount.MountError as error: print(error)
stop.set(); thread.join()
"""
    result = subprocess.run([*rootless_python(), "-c", code], capture_output=True, text=True, cwd="/", timeout=20)
    assert "this process has 2 threads" in result.stdout


def test_mounting_asks_the_server_nothing_but_init(home: Path) -> None:
    with namespace_server(home / "mnt") as server:
        assert server.ask("seen")["seen"] in ([], [INIT])  # its thread may not have come to INIT yet
        assert as_user(f"ls {home}/mnt/").returncode == 0
        seen = server.ask("unmount")["seen"]
        assert seen[0] == INIT
        assert GETATTR in seen


def test_repeated_mounts_leak_no_descriptors(home: Path) -> None:
    with namespace_server(home / "mnt") as server:
        during = server.ask("seen")["fds"]
        after = server.ask("unmount")["fds"]
        assert after == during - 1  # the tree; the device stays until close


# --- auto, reasons


def test_auto_lists_every_strategy_with_its_reason_when_all_fail(home: Path) -> None:
    (home / "file").touch()
    with Server(rootless_python(), str(home / "file"), "auto", str(home / "private")) as server:
        lines = server.ready["text"].splitlines()
        assert lines[0] == f"cannot mount {home}/file:"
        assert [line.split(":")[0].strip() for line in lines[1:]] == list(mount.STRATEGIES)
        if os.geteuid() == 0:
            assert "CAP_SYS_ADMIN" in lines[2]
            assert "no_new_privs is set" in lines[3]


def test_auto_falls_through_to_the_namespace_without_privileges(home: Path) -> None:
    with Server(rootless_python(), str(home / "mnt"), "auto", str(home / "private")) as server:
        assert server.ready["strategy"] == "namespace"
        server.ask("unmount")


def test_an_unknown_strategy_is_named(home: Path) -> None:
    with pytest.raises(mount.MountError, match="use auto or one of fd, direct, fusermount3, namespace"):
        mount.mount(os.fsencode(home), mount.Options(), "magic")


def test_reasons_tell_without_mounting_what_would_work(home: Path) -> None:
    code = f"""
import json
from fusewire.linux import mount
print(json.dumps(mount.reasons(b"{home}/mnt", mount.Options(), private=b"{home}/private")))
"""
    result = subprocess.run([*rootless_python(), "-c", code], capture_output=True, text=True, cwd="/", timeout=20)
    found = {name: reason for name, reason, _ in json.loads(result.stdout)}
    assert list(found) == list(mount.STRATEGIES)
    assert found["namespace"] is None
    assert found["fd"] == "the mount point is not /dev/fd/N"
    assert not os.path.lexists(home / "mnt")


# --- fd


def test_fd_strategy_refuses_what_is_not_a_mounted_fuse_device() -> None:
    with open("/dev/null", "rb") as null, pytest.raises(mount.MountError, match="is not /dev/fuse"):
        mount.mount(b"/dev/fd/%d" % null.fileno(), mount.Options(), "fd")
    with pytest.raises(mount.MountError, match="is not open"):
        mount.mount(b"/dev/fd/987", mount.Options(), "fd")
    rootless.open_fuse_device()
    with open("/dev/fuse", "rb+", 0) as device, pytest.raises(mount.MountError, match="nothing is mounted with"):
        mount.mount(b"/dev/fd/%d" % device.fileno(), mount.Options(), "fd")


@needs_root
def test_an_inherited_descriptor_is_served(home: Path) -> None:
    (home / "mnt").mkdir()
    ours = mount.mount(os.fsencode(home / "mnt"), mount.Options(allow_other=True), "direct")
    try:
        os.set_inheritable(ours.fd, True)
        code = f"import rootless; rootless.serve_commands('/dev/fd/{ours.fd}', 'auto', None)"
        child = subprocess.Popen(
            [*rootless_python(), "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            pass_fds=[ours.fd],
        )
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["strategy"] == "fd"
        assert as_user(f"cat {home}/mnt/hello", OTHER).stdout == HELLO.decode()
        ours.unmount()
        child.communicate()
        assert child.returncode == 0
    finally:
        ours.unmount(lazy=True)
        ours.close()


# --- direct


@needs_root
def test_direct_mount_as_root(home: Path) -> None:
    with Server(root_python(), str(home / "mnt"), "auto", allow_other=True, subtype=b"tiny") as server:
        assert server.ready["strategy"] == "direct"
        assert as_user(f"cat {home}/mnt/hello", OTHER).stdout == HELLO.decode()
        found = mountinfo.at(os.fsencode(home / "mnt"))
        assert found is not None
        assert found.fstype == b"fuse.tiny"
        assert found.id == server.ready["mount_id"]
        with inside(home / "mnt"):
            assert server.ask("unmount")["errno"] == errno.EBUSY
        assert server.ask("unmount")["connected"] is False
    assert not (home / "mnt").exists()


def test_direct_mount_as_root_of_a_namespace_somebody_else_made(home: Path) -> None:
    prefix = rootless_python()
    at = prefix.index("env")
    with Server([*prefix[:at], "unshare", "-Urm", *prefix[at:]], str(home / "mnt"), "auto") as server:
        assert server.ready["strategy"] == "direct"
        pid = server.ready["pid"]
        assert as_user(f"cat /proc/{pid}/root{home}/mnt/hello").stdout == HELLO.decode()
        (line,) = [m for m in mountinfo.mounts(pid) if m.is_fuse and m.mount_point == os.fsencode(home / "mnt")]
        assert {b"nosuid", b"nodev"} <= set(line.options.split(b","))
        server.ask("unmount")
    assert not (home / "mnt").exists()


@needs_root
def test_what_others_mounted_over_it_is_not_unmounted(home: Path) -> None:
    (home / "mnt").mkdir()
    with (
        Server(root_python(), str(home / "mnt"), "direct") as ours,
        Server(root_python(), str(home / "mnt"), "direct") as theirs,
    ):
        answer = ours.ask("unmount")
        assert "another filesystem is mounted over it" in answer["text"]
        assert theirs.ask("seen")["connected"] is True
        theirs.ask("unmount")
        assert ours.ask("unmount")["connected"] is False


@needs_root
def test_a_stranger_that_took_the_place_of_a_mount_is_left_alone(home: Path) -> None:
    (home / "mnt").mkdir()
    with Server(root_python(), str(home / "mnt"), "direct") as ours:
        syscalls.umount2(os.fsencode(home / "mnt"))
        with Server(root_python(), str(home / "mnt"), "direct") as theirs:
            assert ours.ask("unmount")["connected"] is False
            assert theirs.ask("seen")["connected"] is True
            theirs.ask("unmount")


@needs_root
def test_clean_up_clears_a_dead_direct_mount_and_the_directory_made_for_it(home: Path) -> None:
    server = Server(root_python(), str(home / "mnt"), "direct")
    server.kill()
    with pytest.raises(OSError) as caught:
        os.listdir(home / "mnt")
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(mount.MountError, match="a dead mount is at"):
        mount.mount(os.fsencode(home / "mnt"), mount.Options(), "direct")
    mount.clean_up(server.ready)
    assert not (home / "mnt").exists()


@needs_root
def test_a_mount_over_the_root_directory_is_refused() -> None:
    with pytest.raises(mount.MountError, match="seen by nobody"):
        mount.mount(b"/", mount.Options(), "direct")


@needs_root
def test_a_file_can_be_a_mount_point_for_a_file(home: Path) -> None:
    (home / "file").touch()
    with pytest.raises(mount.MountError, match="is not a directory"):
        mount.mount(os.fsencode(home / "file"), mount.Options(), "direct")
    mounted = mount.mount(os.fsencode(home / "file"), mount.Options(rootmode=0o100000), "direct")
    mounted.unmount()
    mounted.close()


# --- fusermount3


@needs_fusermount
def test_fusermount3_mounts_for_a_user_and_refuses_to_unmount_while_busy(home: Path) -> None:
    fsname = b"a,b\\c"
    with Server(rootless_python(fusermount=True), str(home / "mnt"), "auto", fsname=fsname) as server:
        assert server.ready["strategy"] == "fusermount3"
        assert as_user(f"cat {home}/mnt/hello").stdout == HELLO.decode()
        found = mountinfo.at(os.fsencode(home / "mnt"))
        assert found is not None
        assert found.source == fsname
        with inside(home / "mnt"):
            answer = server.ask("unmount")
            assert answer["errno"] == errno.EBUSY
            assert str(home / "mnt") in answer["text"]
        assert server.ask("unmount")["connected"] is False
    assert not (home / "mnt").exists()


@needs_root
@needs_fusermount
def test_auto_unmount_clears_the_mount_of_a_killed_server(home: Path) -> None:
    # fusermount3 before 3.15 looks at the dead mount as root, so it needs allow_other, so it needs another fuse.conf.
    (home / "fuse.conf").write_text("user_allow_other\n")
    script = f'mount --bind {home}/fuse.conf /etc/fuse.conf && exec "$@"'
    prefix = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *rootless_python(fusermount=True)]
    server = Server(prefix, str(home / "mnt"), "fusermount3", auto_unmount=True, allow_other=True)
    pid = server.ready["pid"]
    assert mountinfo.by_id(server.ready["mount_id"], mountinfo.read(pid)) is not None
    (helper,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    pidfd = os.pidfd_open(helper)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    try:
        server.kill()
        select.select([pidfd], [], [])
        look = ["nsenter", f"--mount=/proc/self/fd/{namespace}", "cat", "/proc/self/mountinfo"]
        text = subprocess.run(look, pass_fds=[namespace], check=True, capture_output=True).stdout
    finally:
        os.close(pidfd)
        os.close(namespace)
    assert b"/etc/fuse.conf" in text
    assert mountinfo.at(os.fsencode(home / "mnt"), text) is None


@needs_fusermount
def test_auto_unmount_helper_is_gone_after_an_ordinary_unmount(home: Path) -> None:
    prefix = rootless_python(fusermount=True)
    with Server(prefix, str(home / "mnt"), "fusermount3", auto_unmount=True) as server:
        pid = server.ready["pid"]
        children = Path(f"/proc/{pid}/task/{pid}/children")
        assert len(children.read_text().split()) == 1
        server.ask("unmount")
        assert children.read_text() == ""


@needs_fusermount
def test_clean_up_clears_a_dead_fusermount3_mount(home: Path) -> None:
    server = Server(rootless_python(fusermount=True), str(home / "mnt"), "fusermount3")
    server.kill()
    code = f"from fusewire.linux import mount; mount.clean_up({server.ready!r})"
    subprocess.run([*rootless_python(fusermount=True), "-c", code], check=True, cwd="/", timeout=20)
    assert not (home / "mnt").exists()


@needs_fusermount
def test_what_fusermount3_complains_of_is_in_the_error_with_a_remedy(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory that the user does not own")
    (home / "mnt").mkdir()
    with Server(rootless_python(fusermount=True), str(home / "mnt"), "fusermount3") as server:
        assert "user has no write access to mountpoint" in server.ready["text"]
        assert "choose a mount point that you own" in server.ready["text"]


@pytest.mark.parametrize("what", ["missing", "not executable", "no program", "silent"])
def test_a_helper_that_does_not_work_is_a_reason_and_no_crash(home: Path, what: str) -> None:
    program = home / "helper"
    if what == "not executable":
        program.write_text("#!/bin/sh\n")
        program.chmod(0o644)
    elif what == "no program":
        program.write_bytes(b"\0\1\2\3")
        program.chmod(0o755)
    elif what == "silent":
        program.write_text("#!/bin/sh\nexit 3\n")
        program.chmod(0o755)
    (home / "mnt").mkdir()
    with Server(rootless_python(), str(home / "mnt"), "fusermount3", program=str(program)) as server:
        expected = "ended with status 3" if what == "silent" else "does not run"
        assert expected in server.ready["text"]
        assert str(program) in server.ready["text"]


def test_a_helper_without_set_user_id_bit_is_a_reason(home: Path) -> None:
    from fusewire.linux import fusermount

    program = home / "fusermount3"
    shutil.copy("/bin/true", program)
    code = f"""
from fusewire.linux import fusermount
try: fusermount.check({str(program)!r})
except fusermount.HelperError as error: print(error.strerror, error.remedy, sep="|")
"""
    assert fusermount.find(str(program)) == [str(program)]
    prefix = rootless_python(fusermount=True)
    result = subprocess.run([*prefix, "-c", code], capture_output=True, text=True, cwd="/", timeout=20)
    assert result.stdout.startswith(f"{program} is not set-user-ID root|ask the administrator for `chmod u+s"), result


def test_the_helper_gets_the_socket_and_no_other_descriptor(home: Path) -> None:
    program = home / "helper"
    program.write_text(f"#!/bin/sh\nexec ls -l /proc/self/fd >{home}/fds 2>&1\n")
    program.chmod(0o755)
    code = f"""
import os
from fusewire.linux import fusermount
for fd in (0, 1, 2): os.close(fd)
os.set_inheritable(os.open("/etc/passwd", os.O_RDONLY), True)
os.set_inheritable(os.dup(0), True)
try: fusermount.mount({str(program)!r}, b"/nowhere", b"ro")
except fusermount.HelperError: pass
"""
    subprocess.run([*rootless_python(), "-c", code], check=True, cwd="/", timeout=20)
    listing = (home / "fds").read_text()
    assert listing.count("socket:") == 1
    assert "passwd" not in listing
