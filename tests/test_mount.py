"""`fusewire mount`, `umount`, `list`, `exec` and `path`: mounts that live in the background, by every strategy."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import squashfs_images
from e2e import NOBODY, OTHER, PATIENCE, USER, World, command_line, digest, ends, status
from fusewire.linux import mountinfo, syscalls

HELLO = "hello world\n"
STRATEGIES = ["direct", "fusermount3", "namespace"]


def on_host(place: str | Path) -> mountinfo.Mount | None:
    """The mount at a place as the host's mount table has it."""
    return mountinfo.at(os.fsencode(place))


def inner_options(place: str | Path) -> set[str]:
    found = on_host(place)
    assert found is not None
    return set((found.options + b"," + found.super_options).decode().split(","))


@pytest.fixture(params=STRATEGIES)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Who mounts in a way that `auto` takes that strategy."""
    if request.param == "direct":
        return {"uid": 0}
    if request.param == "fusermount3":
        return {"uid": request.getfixturevalue("fuse_user"), "fusermount": True}
    return {"uid": USER}


# --- every strategy


def test_mount_is_there_in_every_shell_and_gone_after_umount(world: World, small: Path, how: dict[str, Any]) -> None:
    found = world.mount(small, "mnt", **how)
    uid = how["uid"]
    strategy = {0: "direct", USER: "namespace"}.get(uid, "fusermount3")
    assert (found["strategy"], found["source"], found["target"]) == (strategy, str(small), f"{world.home(uid)}/mnt")
    assert world.sh("cat mnt/hello.txt && cd mnt && ls -d directory/inner && cat link", uid=uid).stdout == (
        HELLO + "directory/inner\n" + HELLO
    )
    listed = world.listed(uid)
    assert len(listed) == 1
    row = listed[0]
    assert (row["state"], row["strategy"], row["pid"]) == ("serving", strategy, found["pid"])
    assert (row["source"], row["target"], row["path"]) == (str(small), found["target"], found["path"])
    assert row["requests"] > 0
    assert world.fw("path", "mnt", uid=uid).stdout == found["path"] + "\n"
    assert world.sh(f"cat {found['path']}/hello.txt", uid=uid).stdout == HELLO
    done = world.fw("umount", "mnt", uid=uid)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not os.path.lexists(found["target"])
    assert world.records(uid) == []
    assert ends(found["pid"], 0.0)  # the server has ended before umount says so


def test_server_is_in_a_session_of_its_own_and_holds_nothing_of_the_callers(
    world: World, small: Path, how: dict[str, Any]
) -> None:
    reader, writer = os.pipe()
    with world.mounted(small, "mnt", pass_fds=[writer], **how) as found:
        os.close(writer)
        ended = bool(select.select([reader], [], [], PATIENCE)[0])
        os.close(reader)
        assert ended  # who reads from a pipe of the caller's gets its end
        for pid, images in ((found["pid"], 0), (found["server"], 1)):
            assert os.getsid(pid) == pid
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            kinds = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert kinds.count(str(small)) == images
            # In the server's root there is no /dev that it would be in.
            assert {os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("/dev") for fd in (0, 1, 2)} == {"/null"}
            assert len([kind for kind in kinds if kind.startswith(("pipe:", "/dev/pts"))]) == 0
            assert len(kinds) < 12


def test_auto_unmount_and_other_options_work_by_every_strategy(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    options = r"auto_unmount,noexec,noatime,max_read=131072,fsname=a\,b,subtype=x"
    if uid not in (0, USER):
        options = options.removeprefix("auto_unmount,")  # older helpers take it together with allow_other only
    with world.mounted("-o", options, small, "mnt", **how) as found:
        assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO
        assert "Permission denied" in world.sh("mnt/bin/echo", uid=uid).stderr
        if found["strategy"] == "namespace":
            inside = world.fw("exec", "mnt", "--", "sh", "-c", "grep a,b /proc/self/mountinfo", uid=uid).stdout
        else:
            inside = subprocess.check_output(["grep", "a,b", "/proc/self/mountinfo"], text=True)
        assert "fuse.fusewire.x a,b" in inside
        for word in ("ro", "nosuid", "nodev", "noexec", "noatime", "max_read=131072", f"user_id={uid}"):
            assert word in inside.strip().replace(" ", ",").split(",")


def test_umount_succeeds_lazily_and_refuses_while_busy(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    found = world.mount(small, "mnt", **how)
    reader = world.start("program", "sh", "-c", "exec 9<mnt/data; cd mnt; echo open; read x; wc -c <&9", uid=uid)
    assert reader.line() == "open"
    done = world.fw("umount", "mnt", **how)
    assert done.returncode == 125
    assert done.stderr.startswith(f"fusewire: cannot unmount {found['target']}: in use")
    assert "--lazy" in done.stderr
    assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO  # as before
    done = world.fw("umount", "--lazy", "mnt", **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert not os.path.lexists(found["target"])
    assert world.listed(uid) == []
    assert world.records(uid) == []
    reader.say("")
    assert reader.finish().stdout == "300000\n"  # what is open can be read to its end
    assert ends(found["pid"])


@pytest.mark.parametrize("how", ["fusermount3", "namespace"], indirect=True)  # root's mounts are the machine's
def test_umount_all_ends_every_mount_of_the_user(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    names = ["one", "two words", "new\nline"]
    for name in names:
        world.mount(small, name, **how)
    assert sorted(row["target"] for row in world.listed(uid)) == sorted(f"{world.home(uid)}/{name}" for name in names)
    table = world.fw("list", uid=uid).stdout
    assert len(table.splitlines()) == 4
    assert "new\\nline" in table
    assert all(world.sh(f"cat '{name}/hello.txt'", uid=uid).stdout == HELLO for name in names)
    done = world.fw("umount", "--all", **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(world.home(uid)) == []
    assert world.listed(uid) == []
    assert world.fw("umount", "--all", uid=uid).returncode == 0


def test_second_mount_on_a_target_is_refused_or_lies_on_top(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    first = world.mount(small, "mnt", **how)
    done = world.fw("mount", "--json", small, "mnt", **how)
    if first["strategy"] == "namespace":
        assert done.returncode == 125
        assert "umount" in done.stderr
    elif first["strategy"] == "fusermount3":  # the helper wants the user to be able to write there
        assert done.returncode == 125
        assert "choose a mount point that you own" in done.stderr
    else:  # as mount(8) has it
        assert done.returncode == 0, done.stderr
        assert world.fw("umount", "mnt", **how).returncode == 0
    assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO
    assert len(world.listed(uid)) == 1
    assert world.fw("umount", "mnt", **how).returncode == 0
    assert not os.path.lexists(first["target"])


def test_idle_mount_unmounts_itself_after_its_timeout(world: World, small: Path, how: dict[str, Any]) -> None:
    found = world.mount("-o", "timeout=0.2,attr_timeout=0", small, "mnt", **how)
    reader = world.start("program", "sh", "-c", "exec 9<mnt/data; echo open; read x", uid=how["uid"])
    if reader.line() == "open":  # it may have been gone already
        assert not ends(found["pid"], 0.7)  # in use is not idle, however quiet
    reader.say("")
    reader.finish()
    assert ends(found["pid"], PATIENCE)
    assert not os.path.lexists(found["target"])
    assert world.records(how["uid"]) == []


def test_foreground_ends_with_control_c(world: World, small: Path, how: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        uid = how["uid"]
        process = world.start("fusewire", "mount", "-f", "--json", small, "mnt", **how)
        found = json.loads(process.line())
        assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO
        assert found["pid"] in (process.pid, *world.pids())
        os.kill(found["pid"], number)
        done = process.finish()
        assert (done.returncode, done.stderr) == (0, "")
        assert not os.path.lexists(found["target"])


def test_debug_option_keeps_the_server_where_its_output_is_seen(world: World, small: Path) -> None:
    job = world.start("fusewire", "mount", "--json", "-o", "debug", small, "mnt")
    found = json.loads(job.line())
    assert found["pid"] in (job.pid, *world.pids())
    assert world.sh("cat mnt/hello.txt").stdout == HELLO
    job.kill(signal.SIGTERM)
    done = job.finish()
    assert done.returncode == 0
    for word in ("INIT", "LOOKUP", "READ"):
        assert f"{word} unique" in done.stderr


def test_terminating_signal_to_the_server_unmounts(world: World, small: Path, how: dict[str, Any]) -> None:
    found = world.mount(small, "mnt", **how)
    os.kill(found["pid"], signal.SIGTERM)
    assert ends(found["pid"])
    assert not os.path.lexists(found["target"])
    assert world.records(how["uid"]) == []


def test_mounts_work_in_four_readers_at_once(
    world: World, image_of: Callable[[str], Path], tree: Path, how: dict[str, Any]
) -> None:
    uid = how["uid"]
    with world.mounted("-o", "clone_fd,max_threads=3", image_of("lz4"), "mnt", **how):
        reader = " ".join(world.tool("digest", "mnt/big", uid=uid))
        done = world.sh(f"for i in 1 2 3 4; do {reader} & done; wait", uid=uid)
    assert done.stdout.split() == [digest(os.fsencode(tree / "big"))] * 4


# --- what auto takes, and what it says when nothing works


def test_namespace_made_by_others_is_mounted_in_directly(world: World, small: Path) -> None:
    words = " ".join(world.tool()[:-1])
    script = (
        "if [ -e /tmp/fusewire-0 ]; then mount -t tmpfs -o mode=700 none /tmp/fusewire-0; fi; "  # the real root's
        f"{words} -m fusewire mount --json {small} mnt && cat mnt/hello.txt && "
        f"grep -c ' {world.home()}/mnt .* fuse.fusewire' /proc/self/mountinfo && {words} -m fusewire umount mnt"
    )
    done = world.do("sh", "-c", script, wrap=["unshare", "-Urm"])
    assert done.stderr == ""
    first, rest = done.stdout.split("\n", 1)
    assert json.loads(first)["strategy"] == "direct"
    assert rest == HELLO + "1\n"


def test_descriptor_that_somebody_else_has_mounted_is_served(world: World, small: Path) -> None:
    target = world.home(0) / "mnt"
    target.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    data = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d" % (device, USER, USER)
    syscalls.mount(b"x", os.fsencode(target), b"fuse.test", 0, data)
    try:
        found = world.mount(small, f"/dev/fd/{device}", pass_fds=[device])
        os.close(device)
        device = -1
        assert found["strategy"] == "fd"
        assert world.sh(f"cat {target}/hello.txt").stdout == HELLO
        assert world.listed()[0]["state"] == "serving"
    finally:
        if device >= 0:
            os.close(device)
        syscalls.umount2(os.fsencode(target), 0)
    assert ends(found["pid"])
    assert world.listed() == []


def test_umount_of_a_descriptors_mount_ends_its_server_only(world: World, small: Path) -> None:
    target = world.home(0) / "mnt"
    target.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR)
    data = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d" % (device, USER, USER)
    syscalls.mount(b"x", os.fsencode(target), b"fuse.test", 0, data)
    try:
        found = world.mount(small, f"/proc/self/fd/{device}", pass_fds=[device])
    finally:
        os.close(device)
    try:
        assert world.sh(f"cat {target}/hello.txt").stdout == HELLO
        done = world.fw("umount", found["id"])
        assert (done.returncode, done.stderr) == (0, "")
        assert ends(found["pid"], 0.0)
        assert "not connected" in world.sh(f"cat {target}/data").stderr
    finally:
        syscalls.umount2(os.fsencode(target), 0)


def test_failing_auto_says_of_each_strategy_why_and_what_to_do(world: World, small: Path) -> None:
    full = world.home() / "full"
    full.mkdir()
    (full / "file").touch()
    done = world.fw("mount", small, full)
    assert done.returncode == 125
    lines = done.stderr.splitlines()
    assert lines[0] == f"fusewire: cannot mount {full}:"
    assert lines[1].startswith("  fd: the mount point is not /dev/fd/N")
    assert lines[2].startswith("  direct: mount(2) needs CAP_SYS_ADMIN - ")
    assert lines[3].startswith("  fusermount3: no_new_privs is set")
    assert lines[4].startswith(f"  namespace: {full} is not empty - use `fusewire run`")
    assert os.listdir(full) == ["file"]


@pytest.mark.parametrize("strategy", ["fd", "direct", "fusermount3"])
def test_strategy_that_was_asked_for_is_the_only_one_tried(world: World, small: Path, strategy: str) -> None:
    done = world.fw("mount", "--strategy", strategy, small, "mnt")
    assert done.returncode == 125
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]] == [strategy]
    assert os.listdir(world.home()) == []
    assert world.records() == []


def test_root_can_ask_for_the_namespace(world: World, small: Path) -> None:
    with world.mounted("--strategy", "namespace", small, "mnt", uid=0) as found:
        assert found["strategy"] == "namespace"
        assert world.sh("cat mnt/hello.txt", uid=0).stdout == HELLO


def test_fusermount_prog_names_the_helper(world: World, small: Path, fuse_user: int) -> None:
    helper = world.home(fuse_user) / "helper"
    helper.write_text('#!/bin/sh\necho "$@" >>"$HOME/called"\nexec fusermount3 "$@"\n')
    helper.chmod(0o755)
    env = {"FUSERMOUNT_PROG": str(helper)}
    found = world.mount(small, "mnt", uid=fuse_user, fusermount=True, env=env)
    assert found["strategy"] == "fusermount3"
    assert world.fw("umount", "mnt", uid=fuse_user, fusermount=True, env=env).returncode == 0
    assert "fsname=" in (world.home(fuse_user) / "called").read_text()
    helper.unlink()
    done = world.fw("mount", "--strategy", "fusermount3", small, "mnt", uid=fuse_user, fusermount=True, env=env)
    assert done.returncode == 125
    assert f"{helper} does not run: No such file or directory" in done.stderr


# --- who gets in


def test_other_users_are_refused(world: World, small: Path, how: dict[str, Any]) -> None:
    with world.mounted(small, "mnt", **how) as found:
        for path in (found["target"], found["path"]):
            done = world.sh(f"cat {path}/hello.txt", uid=OTHER)
            assert done.stdout == ""
            assert "Permission denied" in done.stderr
        assert world.listed(OTHER) == []
        assert world.fw("umount", found["target"], uid=OTHER).returncode == 125
        assert world.sh("cat mnt/hello.txt", uid=how["uid"]).stdout == HELLO


def test_allow_other_lets_others_in_and_checks_modes(world: World, small: Path) -> None:
    with world.mounted("-o", "allow_other", small, "mnt", uid=0) as found:
        assert {"allow_other", "default_permissions"} <= inner_options(found["target"])
        done = world.sh(f"cat {found['target']}/hello.txt {found['target']}/private", uid=OTHER)
        assert done.stdout == HELLO
        assert "private: Permission denied" in done.stderr
    done = world.fw("mount", "-o", "allow_other", small, "mnt")
    assert done.returncode == 125
    assert "allow_other lets in only processes inside the namespace" in done.stderr


def test_allow_root_lets_in_root_and_the_owner_only(world: World, small: Path, fuse_user: int) -> None:
    script = 'mount --bind "$0" /etc/fuse.conf && exec "$@"'
    conf = world.base / "fuse.conf"
    conf.write_text("user_allow_other\n")
    # A shell in a private mount namespace, where /etc/fuse.conf is another one, with the users' shells below it.
    outer = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(conf)]
    shell = world.start("program", *outer, "sh", uid=0)
    words = " ".join(world.command("fusewire", [], fuse_user, fusermount=True))
    me = " ".join(world.command("program", [], fuse_user))
    other = " ".join(world.command("program", [], OTHER))
    target = world.home(fuse_user) / "mnt"
    try:
        shell.say(f"{words} mount --json -o allow_root {small} {target} 2>&1")
        found = json.loads(shell.line())
        assert found["strategy"] == "fusermount3"
        for who, answer in (("", "0"), (me, "0"), (other, "1")):
            shell.say(f"{who} cat {target}/hello.txt >/dev/null 2>&1; echo $?")
            assert shell.line() == answer, who
    finally:
        shell.say(f"{words} umount {target} 2>&1; echo done $?")
        assert shell.line() == "done 0"
    shell.close_stdin()
    assert shell.wait() == 0


def test_owner_reads_everything_unless_the_kernel_checks_modes(world: World, small: Path) -> None:
    with world.mounted(small, "mnt"):
        assert world.sh("cat mnt/private").stdout == "owner only\n"
    with world.mounted("-o", "default_permissions", small, "mnt"):
        assert "Permission denied" in world.sh("cat mnt/private").stderr
    with world.mounted("--squash-owner", "-o", "default_permissions", small, "mnt"):
        assert world.sh("cat mnt/private; stat -c '%u %g' mnt/private").stdout == f"owner only\n{USER} {USER}\n"


def test_map_root_mounts_so_that_roots_files_are_the_callers(world: World, small: Path) -> None:
    with world.mounted("--map-root", small, "mnt"):
        assert world.sh("stat -c '%u %g' mnt/private && cat mnt/private").stdout == f"{USER} {USER}\nowner only\n"


# --- targets


def test_empty_directory_comes_back_as_it_was(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    target = world.home(uid) / "mnt"
    target.mkdir()
    os.chown(target, uid, 9999)
    target.chmod(0o2751)
    os.setxattr(target, "user.note", b"mine")
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in ((1, 7, 2**32 - 1), (2, 5, 1234), (4, 5, 2**32 - 1), (16, 5, 2**32 - 1), (32, 1, 2**32 - 1))
    )
    os.setxattr(target, "system.posix_acl_access", acl)
    os.utime(target, ns=(1, 1_000_000_001))
    before = target.lstat()
    for clean in (True, False):
        found = world.mount(small, "mnt", **how)
        assert world.sh("cat mnt/hello.txt", uid=uid).stdout == HELLO
        if not clean:
            os.kill(found["pid"], signal.SIGKILL)
            assert ends(found["pid"])
        assert world.fw("umount", "mnt", **how).returncode == 0
        assert os.listdir(world.home(uid)) == ["mnt"]
        after = target.lstat()
        names = [name for name in dir(before) if name.startswith("st_") and "ctime" not in name and "atime" not in name]
        assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
        assert os.getxattr(target, "user.note") == b"mine"
        assert os.getxattr(target, "system.posix_acl_access") == acl


@pytest.mark.parametrize("target", ["./x", "sub/../sub/x", "sub/", "sub//x/", "ü ' \"$x", "./-n"])
def test_target_may_be_named_in_many_ways(world: World, small: Path, target: str) -> None:
    sub = world.home() / "sub"
    sub.mkdir()
    os.chown(sub, USER, USER)
    world.mount(small, target)
    quoted = target.replace("'", "'\\''")
    assert world.sh(f"cat -- '{quoted}/hello.txt'").stdout == HELLO


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "exists and is not a directory"),
        ("/opt/fusewire-missing", "you may not write in /opt"),
        ("missing/deeper", "missing cannot be reached: No such file or directory"),
        ("file/deeper", "Not a directory"),
        ("dangling", ""),
    ],
)
def test_target_that_cannot_be_is_refused_and_left_alone(world: World, small: Path, target: str, message: str) -> None:
    (world.home() / "file").write_text("mine\n")
    (world.home() / "dangling").symlink_to("/proc/1/fd/99")
    done = world.fw("mount", small, target)
    assert done.returncode == 125
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(world.home())) == ["dangling", "file"]
    assert world.records() == []


def test_target_of_roots_may_hold_files(world: World, small: Path) -> None:
    full = world.home(0) / "full"
    full.mkdir()
    (full / "file").write_text("below\n")
    with world.mounted(small, full, uid=0):
        assert sorted(os.listdir(full)) == sorted(os.listdir(small.parent / "small-tree"))
    assert (full / "file").read_text() == "below\n"


# --- list, exec, path, umount


def test_exec_enters_the_namespace_of_a_mount(world: World, small: Path, how: dict[str, Any]) -> None:
    uid = how["uid"]
    with world.mounted(small, "mnt", **how) as found:
        done = world.fw("exec", "mnt", "--", "sh", "-c", "cat mnt/hello.txt; id -u; exit 3", uid=uid)
        assert (done.returncode, done.stdout, done.stderr) == (3, f"{HELLO}{uid}\n", "")
        done = world.fw("exec", found["target"], "--", "no-such-command", uid=uid)
        assert (done.returncode, done.stderr) == (127, "fusewire: no-such-command: no such command inside\n")
        done = world.fw("exec", "mnt", "--", "mnt/not-executable", uid=uid)
        assert done.returncode == 126
        done = world.fw("exec", "mnt", uid=uid, env={"SHELL": "/bin/echo"})
        assert (done.returncode, done.stdout) == (0, "\n")


def test_exec_inside_a_namespace_mount_has_a_working_directory_with_a_path(world: World, small: Path) -> None:
    with world.mounted(small, "mnt"):
        script = f"cd {world.records()[0]}/mnt"
        done = world.fw("exec", "mnt", "--", "sh", "-c", f"{script} && pwd -P && cat hello.txt && bin/script")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1] == "hello world"


@pytest.mark.parametrize("command", ["exec", "path", "umount"])
def test_target_that_is_no_mount_of_ours_is_an_error(world: World, command: str) -> None:
    done = world.fw(command, "nothing")
    assert done.returncode in (1, 125)
    assert done.stderr.startswith("fusewire: nothing: nothing that Fusewire mounted")


def test_umount_takes_the_target_the_path_the_id_and_the_pid(world: World, small: Path) -> None:
    for name in ("target", "path", "id", "pid"):
        found = world.mount(small, "mnt")
        done = world.fw("umount", str(found[name]))
        assert (done.returncode, done.stderr) == (0, ""), name


def test_umount_of_several_goes_on_after_an_error(world: World, small: Path) -> None:
    world.mount(small, "a")
    world.mount(small, "b")
    done = world.fw("umount", "a", "nothing", "b")
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert world.listed() == []


def test_mounts_of_the_real_root_are_not_those_of_a_namespaces_root(world: World, small: Path) -> None:
    with world.mounted(small, "theirs", uid=0), world.mounted(small, "ours") as ours:
        (world.runtime(0) / "fusewire").rename(world.runtime(0) / "lost")  # so that only the mount table tells of it
        try:
            assert [row["state"] for row in world.listed(0)] == ["unknown"]
            assert [row["id"] for row in world.listed(wrap=["unshare", "-Ur"])] == [ours["id"]]
        finally:
            (world.runtime(0) / "lost").rename(world.runtime(0) / "fusewire")


def test_list_of_nothing_says_so(world: World) -> None:
    done = world.fw("list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "nothing is mounted\n")
    assert world.listed() == []


def test_mount_of_another_program_is_left_to_that(world: World, small: Path) -> None:
    with squashfs_images.kernel_mount(small, world.home(0) / "kernel") as place:
        done = world.fw("umount", place, uid=0)
        assert done.returncode == 125
        assert on_host(place) is not None


def test_helpers_own_unmount_ends_the_server(world: World, small: Path, fuse_user: int) -> None:
    found = world.mount(small, "mnt", uid=fuse_user, fusermount=True)
    assert world.do("fusermount3", "-u", "mnt", uid=fuse_user, fusermount=True).returncode == 0
    assert ends(found["pid"])
    assert not os.path.lexists(found["target"])
    assert world.listed(fuse_user) == []


def test_umount8_of_a_direct_mount_ends_the_server(world: World, small: Path) -> None:
    found = world.mount(small, "mnt", uid=0)
    assert world.do("umount", found["target"], uid=0).returncode == 0
    assert ends(found["pid"])
    assert world.listed(0) == []


def test_lazy_umount8_ends_the_server_when_the_last_reader_does(world: World, small: Path) -> None:
    found = world.mount(small, "mnt", uid=0)
    reader = world.start("program", "sh", "-c", "exec 9<mnt/data; echo open; read x; md5sum <&9", uid=0)
    assert reader.line() == "open"
    assert world.do("umount", "--lazy", found["target"], uid=0).returncode == 0
    reader.say("")
    done = reader.finish()
    with open(small.parent / "small-tree" / "data", "rb") as file:
        expected = subprocess.check_output(["md5sum"], stdin=file, text=True)
    assert done.stdout == expected
    assert ends(found["pid"])


def test_mount_says_nothing_without_json(world: World, small: Path) -> None:
    done = world.fw("mount", small, "mnt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert world.fw("umount", "mnt").returncode == 0


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_descriptors_may_be_closed(world: World, small: Path, redirection: str) -> None:
    words = " ".join([*world.tool()[:-1], "-m", "fusewire"])
    done = world.sh(f"{words} mount {small} mnt {redirection}; cat mnt/hello.txt")
    assert done.stdout == HELLO
    assert world.fw("umount", "mnt").returncode == 0
    done = world.sh(f"{words} run {small}:/opt/image -- sh -c 'cat /opt/image/hello.txt >out' {redirection}; cat out")
    assert done.stdout == HELLO


def test_working_directory_that_vanished_is_no_obstacle(world: World, small: Path) -> None:
    gone = world.home() / "gone"
    gone.mkdir()
    os.chown(gone, USER, USER)
    words = " ".join([*world.tool()[:-1], "-m", "fusewire"])
    target = world.home() / "mnt"
    done = world.sh(f"rmdir {gone} && {words} mount {small} {target} && cat {target}/hello.txt", cwd=gone)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")
    assert world.fw("umount", target).returncode == 0


def test_working_directory_that_vanished_is_no_obstacle_to_run(world: World, small: Path) -> None:
    gone = world.home() / "gone"
    gone.mkdir()
    os.chown(gone, USER, USER)
    words = " ".join([*world.tool()[:-1], "-m", "fusewire"])
    done = world.sh(f"rmdir {gone} && {words} run {small}:/opt/image -- cat /opt/image/hello.txt", cwd=gone)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")


def test_server_is_small_and_named_for_what_it_is(world: World, small: Path) -> None:
    with world.mounted(small, "mnt") as found:
        for pid in (found["pid"], found["server"]):
            assert "mount" in command_line(pid)
            assert int(status(pid, "VmHWM").split()[0]) < 40 * 1024  # KiB
            assert status(pid, "NoNewPrivs") == "1"


@pytest.fixture(autouse=True)
def unmounted(world: World) -> Iterator[None]:
    """Unmount what a test has left to this fixture. Never `--all`: the mounts of root are the machine's."""
    yield
    for uid in (0, USER, NOBODY):
        for row in world.listed(uid) if world.records(uid) else []:
            world.fw("umount", "--lazy", row["id"], uid=uid)
