"""Who owns what on a served directory, and who may do what: as on the host directory itself, for several users.

The scenarios are programs that run twice, on a plain directory and on a mount of another one; what they print has to
be the same. Only root can become several users, so these are mounts of root's, with `allow_other`.
"""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path

import pytest

from e2e import PATH, World, status

COMMON = """
import ctypes, errno, os, shutil, stat, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])
os.umask(0)

def show(path=None, fd=None):
    info = os.fstat(fd) if fd is not None else os.lstat(path)
    return f"{info.st_mode:o} {info.st_uid}:{info.st_gid} {info.st_nlink if not stat.S_ISDIR(info.st_mode) else ''}"

def attempt(what, work):
    '''Do something, and print how that ended.'''
    try:
        result = work()
    except OSError as error:
        result = errno.errorcode[error.errno]
    print(f"{what}: {result}", flush=True)

class User:
    '''A stay as another user, in a process of its own; the block's output is in order.'''
    def __init__(self, uid, gid=None, groups=(), umask=0o022):
        self.who = uid, uid if gid is None else gid, list(groups), umask
    def __call__(self, work):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                uid, gid, groups, umask = self.who
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
                os.umask(umask)
                print(f"--- {work.__name__} as {self.who}", flush=True)
                work()
                code = 0
            finally:
                sys.stdout.flush()
                if code:
                    import traceback
                    traceback.print_exc()
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, work.__name__
        return work

def put(path, mode=0o644, uid=0, gid=0, data=b"data"):
    with open(path, "wb") as file:
        file.write(data)
    os.chown(path, uid, gid)
    os.chmod(path, mode)

def folder(path, mode=0o755, uid=0, gid=0):
    os.mkdir(path)
    os.chown(path, uid, gid)
    os.chmod(path, mode)

def opening(path, flags, mode=0o777):
    os.close(os.open(path, flags, mode))

"""

OWNERS = """
folder("all", 0o777)
folder("sticky", 0o1777)
folder("setgid", 0o2777, 0, 2000)
folder("setgid-own", 0o2777, 0, 3000)
folder("group", 0o770, 0, 3000)
folder("private", 0o700)
put("sticky/roots"); put("sticky/other", uid=1001); put("all/roots"); put("sticky/open", 0o666)
put("private/hidden"); put("group-file", 0o640, 0, 3000); put("roots-own", 0o600); put("readable", 0o644)
os.mkfifo("all/fifo-of-root"); put("mine", 0o644, 1000, 1000); put("mine-suid", 0o6755, 1000, 1000)
put("mine-foreign-group", 0o2755, 1000, 2000); folder("my-directory", 0o755, 1000, 1000)
put("acl-like", 0o604, 0, 1000); put("no-x", 0o644); put("run", 0o711, data=b"#!/bin/sh\\nexit 0\\n")
put("time", 0o666); put("my-time", 0o444, 1000, 1000)

def make():
    attempt("file", lambda: (opening("all/file", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), show("all/file"))[1])
    attempt("suid file", lambda: (opening("all/suid", os.O_CREAT | os.O_WRONLY, 0o6777), show("all/suid"))[1])
    attempt("directory", lambda: (os.mkdir("all/dir", 0o777), show("all/dir"))[1])
    attempt("symlink", lambda: (os.symlink("x", "all/link"), show("all/link"))[1])
    attempt("fifo", lambda: (os.mkfifo("all/fifo", 0o666), show("all/fifo"))[1])
    attempt("node", lambda: (os.mknod("all/node", stat.S_IFREG | 0o666), show("all/node"))[1])
    attempt("device", lambda: os.mknod("all/device", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
    attempt("whiteout", lambda: (os.mknod("all/white", stat.S_IFCHR, 0), show("all/white"))[1])
    attempt("hard link", lambda: (os.link("all/file", "all/file2"), show("all/file2"))[1])
    attempt("link to root's", lambda: os.link("roots-own", "all/stolen"))
    attempt("link to readable", lambda: os.link("readable", "all/stolen2"))
    for where in ("setgid", "setgid-own"):
        attempt("file in " + where, lambda: (opening(where + "/f", os.O_CREAT, 0o666), show(where + "/f"))[1])
        attempt("sgid file", lambda: (opening(where + "/g", os.O_CREAT, 0o2777), show(where + "/g"))[1])
        attempt("sgid no x", lambda: (opening(where + "/h", os.O_CREAT, 0o2666), show(where + "/h"))[1])
        attempt("dir", lambda: (os.mkdir(where + "/d", 0o777), show(where + "/d"))[1])
        attempt("dir in it", lambda: (os.mkdir(where + "/d/d", 0o777), show(where + "/d/d"))[1])
        attempt("link", lambda: (os.symlink("x", where + "/l"), show(where + "/l"))[1])
        attempt("node", lambda: (os.mknod(where + "/n", stat.S_IFIFO | 0o2777), show(where + "/n"))[1])
    def unnamed():
        fd = os.open("all", os.O_TMPFILE | os.O_RDWR, 0o666)
        text = show(fd=fd)
        os.link(f"/proc/self/fd/{fd}", "all/was-unnamed", follow_symlinks=True)
        os.close(fd)
        return text, show("all/was-unnamed")
    attempt("tmpfile", unnamed)
    attempt("in group", lambda: (opening("group/f", os.O_CREAT, 0o666), show("group/f"))[1])
    attempt("in private", lambda: opening("private/f", os.O_CREAT))
    attempt("in root's", lambda: opening("f", os.O_CREAT))

def clean():
    for name in ("all/file", "all/suid", "all/link", "all/fifo", "all/node", "all/file2", "all/was-unnamed", "group/f",
                 "all/white", "all/stolen2"):
        if os.path.lexists(name):
            os.unlink(name)
    os.rmdir("all/dir")
    for where in ("setgid", "setgid-own"):
        for name in "fghln":
            os.unlink(f"{where}/{name}")
        shutil.rmtree(f"{where}/d")

for user in (User(1000), User(1000, groups=[3000], umask=0o027), User(1000, 3000, [2000, 5], umask=0o077),
             User(0, 0), User(0, 7, [3000])):
    user(make)
    clean()

@User(1000)
def sticky():
    attempt("unlink root's", lambda: os.unlink("sticky/roots"))
    attempt("rename root's", lambda: os.rename("sticky/roots", "sticky/x"))
    attempt("unlink other's", lambda: os.unlink("sticky/other"))
    attempt("write open", lambda: opening("sticky/open", os.O_WRONLY))
    attempt("create over", lambda: opening("sticky/open", os.O_WRONLY | os.O_CREAT))
    attempt("over root's", lambda: (opening("sticky/m", os.O_CREAT), os.rename("sticky/m", "sticky/roots")))
    attempt("own", lambda: (os.rename("sticky/m", "sticky/n"), os.unlink("sticky/n")))
    attempt("root's in all", lambda: os.unlink("all/roots"))
    attempt("fifo of root", lambda: os.rename("all/fifo-of-root", "all/moved"))
    attempt("directory of another", lambda: os.rename("private", "all/private"))

def reading():
    for path in ("group-file", "roots-own", "readable", "private/hidden", "acl-like", "mine", "run", "no-x"):
        attempt("read " + path, lambda: opening(path, os.O_RDONLY))
        attempt("write " + path, lambda: opening(path, os.O_WRONLY))
        attempt("access " + path, lambda: [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK, os.F_OK)])
        attempt("lstat " + path, lambda: show(path))
        attempt("truncate " + path, lambda: os.truncate(path, 1))
    attempt("run", lambda: subprocess.run(["./run"]).returncode)
    attempt("run no-x", lambda: subprocess.run(["./no-x"]).returncode)
    attempt("list private", lambda: os.listdir("private"))
    attempt("list group", lambda: os.listdir("group"))
    attempt("cd group", lambda: os.chdir("group"))
    attempt("noatime", lambda: opening("/proc/self/cwd/../readable", os.O_RDONLY | os.O_NOATIME))

for user in (User(1000), User(1000, groups=[3000]), User(1001, 1001, [1000, 3000]), User(1001), User(0), User(0, 9)):
    user(reading)

def changing():
    for path in ("mine", "mine-suid", "mine-foreign-group", "my-directory", "readable"):
        attempt("chmod", lambda: (os.chmod(path, 0o640), show(path))[1])
        attempt("chmod sgid", lambda: (os.chmod(path, 0o2755), show(path))[1])
        attempt("chmod all", lambda: (os.chmod(path, 0o7777), show(path))[1])
        attempt("chown same", lambda: (os.chown(path, -1, -1), show(path))[1])
        attempt("chown own group", lambda: (os.chown(path, -1, 1000), show(path))[1])
        attempt("chown user", lambda: (os.chown(path, 1001, -1), show(path))[1])
        attempt("chown foreign group", lambda: (os.chown(path, -1, 2000), show(path))[1])
        attempt("chown supplementary", lambda: (os.chown(path, 1000, 3000), show(path))[1])
        attempt("user xattr", lambda: os.setxattr(path, "user.x", b"1"))
        attempt("trusted xattr", lambda: os.setxattr(path, "trusted.x", b"1"))
        attempt("security xattr", lambda: os.setxattr(path, "security.x", b"1"))
        attempt("list xattr", lambda: os.listxattr(path))
    attempt("sticky xattr", lambda: os.setxattr("sticky", "user.x", b"1"))
    attempt("fifo xattr", lambda: os.setxattr("all/moved", "user.x", b"1", follow_symlinks=False))

for user in (User(1000), User(1000, groups=[3000]), User(1001), User(0)):
    user(changing)
    for path in ("mine", "mine-suid", "mine-foreign-group", "my-directory"):
        os.chown(path, 1000, 2000 if "foreign" in path else 1000)
        os.chmod(path, 0o6755)

WRITING = (
    ("write", os.O_WRONLY, lambda fd: os.write(fd, b"y")),
    ("append", os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"y")),
    ("write nothing", os.O_WRONLY, lambda fd: os.write(fd, b"")),
    ("ftruncate", os.O_WRONLY, lambda fd: os.ftruncate(fd, 5)),
    ("ftruncate same", os.O_WRONLY, lambda fd: os.ftruncate(fd, 100)),
    ("open O_TRUNC", os.O_WRONLY | os.O_TRUNC, lambda fd: None),
    ("fallocate", os.O_WRONLY, lambda fd: os.posix_fallocate(fd, 0, 200)),
    ("several", os.O_WRONLY, lambda fd: os.pwritev(fd, [b"a", b"b"], 3)),
    ("open only", os.O_WRONLY, lambda fd: None),
)
# Not 0o2767 or 0o2666: of a set-group-ID bit without group execution FUSE in the kernel takes no notice.
for mode in (0o4777, 0o2777, 0o6777):
    for what, flags, work in WRITING:
        put("victim", mode, 1001, 1001, b"x" * 100)
        for who in ((1000, 1000, []), (1001, 1001, []), (1001, 5, [1001]), (0, 0, [])):
            os.chmod("victim", mode)
            def kill():
                fd = os.open("victim", flags)
                work(fd)
                attempt(f"{what} {mode:o}", lambda: (show(fd=fd), show("victim")))
                os.close(fd)
            User(*who)(kill)
            attempt("later", lambda: show("victim"))
for mode in (0o4777, 0o6777, 0o2767):
    put("victim", mode, 1000, 1000, b"x" * 100)
    @User(1000)
    def truncating():
        attempt("truncate", lambda: (os.truncate("victim", 3), show("victim"))[1])
    put("victim", mode, 1000, 1000, b"x" * 100)
    @User(1000, groups=[3000])
    def chowning():
        attempt("chown", lambda: (os.chown("victim", -1, 3000), show("victim"))[1])
    put("victim", mode, 1000, 1000, b"x" * 100)
    attempt("root chown", lambda: (os.chown("victim", 1001, 3000), show("victim"))[1])

def times():
    for path in ("time", "my-time", "readable"):
        attempt("now", lambda: os.utime(path))
        attempt("then", lambda: os.utime(path, (1, 2)))
        attempt("both now", lambda: libc.utimensat(-100, path.encode(), None, 0))

for user in (User(1000), User(1001), User(0)):
    user(times)

attempt("space", lambda: os.statvfs(".").f_bavail <= os.statvfs(".").f_bfree)
"""

ACLS = """
def acl(*words):
    return subprocess.run(["setfacl", *words], check=True)

def see(*paths):
    return subprocess.run(["getfacl", "-nE", *paths], check=True, stdout=subprocess.PIPE, text=True).stdout

folder("shared", 0o777)
acl("-m", "d:u:1001:rwx,d:u:1002:---,d:g:3000:r-x,d:m::rwx,d:o::r--", "shared")
folder("plain", 0o777)
put("file", 0o600, 1000, 1000)
acl("-m", "u:1001:rw,g:3000:r,m::rw", "file")
put("masked", 0o600, 1000, 1000)
acl("-m", "u:1001:rw,m::r", "masked")
folder("closed", 0o700, 1000, 1000)
put("closed/in", 0o644, 1000, 1000)
acl("-m", "u:1001:x,g:3000:rx", "closed")
folder("setgid", 0o2777, 0, 3000)
acl("-m", "d:u:1001:rwx", "setgid")
print(see("file", "masked", "closed", "shared", "setgid"))

def make():
    for number, (umask, mode) in enumerate(((0o077, 0o666), (0o022, 0o600), (0, 0o640), (0o777, 0o777))):
        os.umask(umask)
        for where in ("shared", "plain", "setgid"):
            path = f"{where}/{number}"
            opening(path + "-f", os.O_CREAT, mode)
            os.mkdir(path + "-d", mode)
            os.mkdir(path + "-d/e", mode) if mode & 0o300 == 0o300 and not umask & 0o300 else None
            os.mkfifo(path + "-p", mode)
            os.symlink("x", path + "-l")
            os.close(os.open(where, os.O_TMPFILE | os.O_WRONLY, mode))
            for what in ("-f", "-d", "-p", "-l"):
                attempt(path + what, lambda: show(path + what))
            print(see(path + "-f", path + "-d"))

User(1000)(make)
shutil.rmtree("shared/0-d")
User(1000, groups=[3000])(lambda: None)

def reach():
    for path in ("file", "masked", "closed/in", "shared/0-f", "shared/2-f", "plain/0-f"):
        attempt("read " + path, lambda: opening(path, os.O_RDONLY))
        attempt("write " + path, lambda: opening(path, os.O_WRONLY))
        attempt("access " + path, lambda: [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)])
        attempt("see " + path, lambda: os.getxattr(path, "system.posix_acl_access"))
    attempt("list", lambda: sorted(os.listdir("closed")))
    name = "system.posix_acl_access"
    attempt("set", lambda: os.setxattr("file", name, os.getxattr("file", name)))
    attempt("drop", lambda: os.removexattr("masked", name))

for user in (User(1000), User(1001), User(1002), User(1003, 3000), User(1003, 1003, [3000]), User(1004), User(0)):
    user(reach)

@User(1000)
def change():
    for mode in (0o640, 0o777, 0o2770, 0o600):
        attempt("chmod", lambda: (os.chmod("file", mode), show("file"))[1])
        print(see("file"))
    acl("-b", "file")
    acl("-m", "u:1005:rwx,o::rwx", "file")
    print(see("file"), show("file"))
    acl("-m", "u::rw,g::r,o::-,m::r", "file")
    print(see("file"), show("file"))
    acl("-bk", "shared/1-d")
    print(see("shared/1-d"))

# An access list that is set by who is not in the file's group takes its set-group-ID bit away.
put("sgid", 0o2775, 1000, 3000)
@User(1000)
def losing():
    acl("-m", "u:1001:rx", "sgid")
    attempt("sgid", lambda: show("sgid"))
put("sgid2", 0o2775, 1000, 3000)
@User(1000, groups=[3000])
def keeping():
    acl("-m", "u:1001:rx", "sgid2")
    attempt("sgid2", lambda: show("sgid2"))
"""


def compare(world: World, scenario: str, options: str) -> None:
    """Run a scenario on a plain directory and on a mount: what it prints there, and what it leaves, is the same."""
    plain, source, target = (world.home(0) / name for name in ("plain", "source", "target"))
    for path in (world.home(0), plain, source, target):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    python = [*world.words(0)[1], "-c", COMMON + scenario]
    wanted = world.do(*python, str(plain), uid=0)
    assert wanted.returncode == 0, wanted.stderr
    with world.mounted(source, target, "-o", f"allow_other,suid,dev,{options}", "--strategy", "direct", uid=0):
        found = world.do(*python, str(target), uid=0)
    assert found.returncode == 0, found.stderr
    difference = list(difflib.unified_diff(wanted.stdout.splitlines(), found.stdout.splitlines(), "host", "mount", n=3))
    assert difference == []
    assert owners(source) == owners(plain)


def owners(top: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        info = path.lstat()
        found[str(path.relative_to(top))] = info.st_mode, info.st_uid, info.st_gid
    return found


@pytest.mark.parametrize(
    "options",
    [
        "cache=auto",
        "cache=none,passthrough=off",
        "cache=auto,writeback",
        "no_killpriv_v2,passthrough=off",
        "posix_acl,inode_file_handles=prefer",
    ],
)
def test_owners_and_permissions_are_those_of_the_host_directory(world: World, options: str) -> None:
    compare(world, OWNERS, options)


@pytest.mark.parametrize("options", ["cache=auto", "cache=none,passthrough=off"])
def test_access_lists_do_what_they_do_on_the_host_directory(world: World, options: str) -> None:
    if shutil.which("setfacl", path=PATH) is None:
        pytest.skip("setfacl is missing (Debian package acl)")
    compare(world, ACLS, f"posix_acl,{options}")


def test_access_lists_are_refused_where_they_would_not_count(world: World) -> None:
    source, target = world.home(0) / "source", world.home(0) / "target"
    source.mkdir()
    target.mkdir()
    with (
        world.mounted(source, target, "-o", "allow_other", "--strategy", "direct", uid=0),
        pytest.raises(OSError, match="not supported"),
    ):
        os.getxattr(target, "system.posix_acl_access")


@pytest.fixture
def both(world: World) -> tuple[Path, Path]:
    """A source and a target."""
    source, target = world.home(0) / "source", world.home(0) / "target"
    world.home(0).chmod(0o755)
    source.mkdir()
    target.mkdir()
    return source, target


def test_the_servers_umask_counts_for_nothing_and_stays(world: World, both: tuple[Path, Path]) -> None:
    source, target = both
    with world.mounted(
        *(source, target, "-o", "allow_other,max_threads=4", "--strategy", "direct"),
        uid=0,
        wrap=["sh", "-c", 'umask 077; exec "$@"', "-"],
    ) as found:
        done = world.sh(
            f"cd {target}; umask 0; for n in 1 2 3 4 5 6 7 8; do (touch f$n; mkdir d$n; mkfifo p$n) & done; wait", uid=0
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert status(found["pid"], "Umask") == "0077"
        assert status(found["server"], "Umask") == "0000"
    modes = {path.name[0]: oct(path.stat().st_mode & 0o7777) for path in source.iterdir()}
    assert modes == {"f": "0o666", "d": "0o777", "p": "0o666"}
    assert len(list(source.iterdir())) == 24


def test_a_read_only_mount_refuses_every_change(world: World, both: tuple[Path, Path]) -> None:
    source, target = both
    (source / "file").write_bytes(b"data")
    with world.mounted(source, target, "-o", "ro,allow_other", "--strategy", "direct", uid=0):
        script = (
            "for how in 'touch new' 'rm file' 'mkdir d' 'chmod 600 file' 'mv file g' 'ln file h' 'truncate -s 0 file'"
        )
        done = world.sh(
            f"cd {target}; {script} 'setfattr -n user.x -v 1 file'; do $how && exit 1; done; cat file", uid=0
        )
        assert done.stdout == "data"
        assert done.stderr.count("Read-only file system") == 8, done.stderr
    assert sorted(os.listdir(source)) == ["file"]


def test_ids_are_translated_both_ways(world: World, both: tuple[Path, Path]) -> None:
    source, target = both
    source.chmod(0o1777)
    (source / "theirs").touch()
    os.chown(source / "theirs", 105_001, 205_002)
    rules = "translate_uid=map:0:100000:65536,translate_gid=map:0:200000:65536"
    (source / "unmapped").touch()
    os.chown(source, 100_000, 200_000)
    with world.mounted(source, target, "-o", f"allow_other,{rules}", "--strategy", "direct", uid=0):
        assert (os.stat(target / "theirs").st_uid, os.stat(target / "theirs").st_gid) == (5001, 5002)
        script = f"cd {target}; touch mine; mkdir dir; ln -s x link; chgrp 1000 mine"
        done = world.do(*("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups", "sh", "-c", script), uid=0)
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("mine", "dir", "link"):
            seen, real = os.lstat(target / name), os.lstat(source / name)
            assert (seen.st_uid, seen.st_gid) == (1000, 1000)
            assert (real.st_uid, real.st_gid) == (101_000, 201_000)
        os.chown(target / "theirs", 7, 8)
    assert (os.stat(source / "theirs").st_uid, os.stat(source / "theirs").st_gid) == (100_007, 200_008)


def test_ids_are_squashed_and_forbidden(world: World, both: tuple[Path, Path]) -> None:
    source, target = both
    source.chmod(0o1777)
    options = "allow_other,translate_uid=squash-guest:0:4242:1000,translate_uid=forbid-guest:1000:10"
    with world.mounted(source, target, "-o", options, "--strategy", "direct", uid=0):
        (target / "by-root").touch()
        words = ("setpriv", "--reuid", "1005", "--regid", "1005", "--clear-groups")
        assert world.do(*words, "touch", str(target / "forbidden"), uid=0).returncode == 1
        words = ("setpriv", "--reuid", "1010", "--regid", "1010", "--clear-groups")
        assert world.do(*words, "touch", str(target / "allowed"), uid=0).returncode == 0
    assert {path.name: path.stat().st_uid for path in source.iterdir()} == {"by-root": 4242, "allowed": 1010}


def test_attributes_are_kept_under_other_names(world: World, both: tuple[Path, Path]) -> None:
    source, target = both
    (source / "file").touch()
    with world.mounted(
        *(source, target, "-o", "allow_other,xattrmap=:map::user.virtiofs.:", "--strategy", "direct"), uid=0
    ):
        os.setxattr(target / "file", "trusted.overlay.opaque", b"y")
        os.setxattr(target / "file", "user.note", b"n")
        os.setxattr(source / "file", "user.of-the-host", b"h")
        assert sorted(os.listxattr(target / "file")) == ["trusted.overlay.opaque", "user.note"]
        assert os.getxattr(target / "file", "trusted.overlay.opaque") == b"y"
        with pytest.raises(OSError, match="No data"):
            os.getxattr(target / "file", "user.of-the-host")
        os.removexattr(target / "file", "user.note")
    assert sorted(os.listxattr(source / "file")) == ["user.of-the-host", "user.virtiofs.trusted.overlay.opaque"]
