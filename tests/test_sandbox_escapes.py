"""Ways out of a share, tried by hostile guests and by a server that was taken over, in every sandbox there is.

What is held against them comes in layers: checks of names, descriptors in place of paths, identities of inodes, and
around all that the sandbox. So each way is tried with no sandbox too, and a taken-over server in each of them.
Long because it is a list of ways.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import rootless
from escapes import (
    BARE,
    FILTERED,
    OWN,
    PATIENCE,
    PYTHON,
    ROOT,
    SECRET,
    WAYS,
    Flipper,
    Scene,
    Served,
    Tally,
    Way,
    raw,
    served,
    skip_where_missing,
    tiny_program,
    words_of,
)
from fusewire.linux import capabilities as caps
from fusewire.testing.guest import FakeGuest
from fusewire.wire import abi
from sandboxed import Sandboxed

needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
NOTHING = "0" * 16
ATTEMPTS = 400
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0)  # CAP_NET_ADMIN, permitted and effective


@pytest.fixture(scope="module", params=WAYS, ids=str)
def share(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(request.param) as found:
        yield found


@pytest.fixture
def guest(share: Served) -> Iterator[FakeGuest]:
    assert share.alive(), "an earlier test has ended the server"
    with share.guest() as found:
        yield found
        assert share.alive()
        found.check()


@pytest.fixture
def scene(share: Served) -> Iterator[Scene]:
    found = share.scene()
    yield found
    found.check()


# From outside: what /proc says of a server with its filter, while a guest uses it


@needs_root
def test_a_serving_process_is_locked_in_with_all_its_threads(share: Served, guest: FakeGuest, scene: Scene) -> None:
    scene.put(scene.inside / "file", OWN)
    node = guest.lookup(scene.node(guest), b"file").nodeid
    fh, _ = guest.open(node, os.O_RDWR)
    way = share.way
    everything = way.user == "root" or way.mode == "namespace"
    kept = caps.KEPT if everything or way.user == "container" else 0
    tasks = os.listdir(f"/proc/{share.pid}/task")
    assert len(tasks) > 1
    for task in tasks:
        status = share.status(task)
        assert status["Seccomp"] == "2", "no filter of system calls"
        assert status["NoNewPrivs"] == "1"
        assert status["Groups"] == ""
        assert status["CapInh"] == status["CapAmb"] == NOTHING
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == kept
        # Who has no CAP_SETPCAP cannot empty it: what is left in it is what the container has left, and
        # no_new_privs keeps it from being used.
        assert status["CapBnd"] == NOTHING or (way.user == "container" and not int(status["CapBnd"], 16) >> 21 & 1)
    limits = Path(f"/proc/{share.pid}/limits").read_text().splitlines()
    assert next(line for line in limits if "core" in line).split()[4:6] == ["0", "0"]
    assert os.stat(f"/proc/{share.pid}/io").st_uid == 0, "it is dumpable: others of its user may look into it"
    guest.release(node, fh)


@needs_root
def test_a_serving_process_sees_the_share_and_nothing_else(share: Served, guest: FakeGuest) -> None:
    place = f"/proc/{share.pid}"
    same = {name: os.readlink(f"{place}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}") for name in ("net", "pid")}
    same |= {name: os.readlink(f"{place}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "ipc")}
    assert set(same.values()) == {share.way.mode != "namespace"}
    own_users = os.readlink(f"{place}/ns/user") != os.readlink("/proc/self/ns/user")
    assert own_users == (share.way.mode == "namespace" and share.way.user == "nobody")
    mounts = [line.split()[4] for line in Path(f"{place}/mountinfo").read_text().splitlines()]
    if share.way.mode == "none":
        assert os.readlink(f"{place}/root") == os.readlink(f"{place}/cwd") == "/"
    else:
        assert os.path.samefile(f"{place}/root", share.shared)
        assert all(map(str.isdigit, os.listdir(f"{place}/cwd")))
    if share.way.mode == "namespace":
        assert mounts == ["/"]
        devices = Path(f"{place}/net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in devices] == ["lo"]


@needs_root
def test_a_serving_process_has_nothing_open_but_the_share(share: Served, guest: FakeGuest, scene: Scene) -> None:
    directory = scene.put_directory("d")
    node = guest.lookup(guest.lookup(scene.node(guest), b"d").nodeid, b"secret").nodeid
    fh, _ = guest.open(node)
    device = os.stat(share.shared).st_dev
    inside = {os.stat(path).st_ino for path in (share.shared, scene.inside, directory, directory / "secret")}
    for number, (path, status) in share.opened().items():
        if number <= 2 or path.startswith(("socket:", "anon_inode:", "/memfd:", "pipe:")):
            continue
        if os.path.basename(path).startswith("libffi."):
            continue  # it (3.5) maps more of itself through that: see process.close_inherited_fds
        if share.flags(number) & os.O_PATH and status.st_dev != device:
            # The directory of its own descriptors, under whose names it opens them again.
            assert share.way.mode != "none"
            assert os.stat(f"/proc/{share.pid}/fd").st_dev == status.st_dev or share.way.mode == "namespace", path
            continue
        if share.way == BARE and (path == str(share.home) or Path(path).parent == share.home):
            continue  # its socket and pid file: nobody else is there to remove them
        assert (status.st_dev, status.st_ino in inside) == (device, True), path
    assert share.opened()[0][1].st_rdev == os.makedev(1, 3)
    guest.release(node, fh)


# Names


def test_no_operation_takes_a_name_that_is_more_than_a_name(share: Served, guest: FakeGuest, scene: Scene) -> None:
    scene.put_directory("d")
    top = scene.node(guest)
    inner = guest.lookup(top, b"d").nodeid
    file = guest.lookup(inner, b"secret").nodeid
    outside = os.fsencode(scene.outside)
    up = b"../../../" + os.fsencode(scene.outside.name)
    steps = [b"/", b".", b"..", b"", b"./", b"../", b"/..", b"d/..", b"./victim", b"../d", b"..\0", b"//"]
    before = sorted(str(path) for path in share.shared.rglob("*"))

    def attempt(name: str, nodeid: int, *fields: int, names: list[bytes]) -> None:
        error = raw(guest, name, nodeid, *fields, names=names)
        assert error in (errno.EINVAL, errno.ENAMETOOLONG), f"{name} of {names}: {errno.errorcode.get(error, error)}"

    for way in (outside, up, b"/proc/self/fd/0/../../.." + outside):
        for old in (way + b"/secret", way + b"/victim", way):
            attempt("lookup", inner, names=[old])
            attempt("unlink", inner, names=[old])
            attempt("rmdir", inner, names=[old])
            attempt("create", inner, os.O_RDWR, 0o100666, 0, 0, names=[old])
            for new in (b"taken", b"victim"):
                attempt("rename", inner, inner, names=[old, new])
                for flags in (0, 1, 2):
                    attempt("rename2", inner, inner, flags, names=[old, new])
        for new in (way + b"/made", way + b"/q/victim"):
            attempt("mknod", inner, 0o100666, 0, 0, names=[new])
            attempt("mkdir", inner, 0o777, 0, names=[new])
            attempt("symlink", inner, names=[new, b"target"])
            attempt("link", inner, file, names=[new])
            attempt("create", inner, os.O_RDWR | os.O_EXCL, 0o100666, 0, 0, names=[new])
            attempt("rename", inner, inner, names=[b"victim", new])
            for flags in (0, 1, 2):
                attempt("rename2", inner, inner, flags, names=[b"victim", new])
    for step in steps:
        attempt("lookup", inner, names=[step])
        attempt("unlink", inner, names=[step])
        attempt("rmdir", inner, names=[step])
        attempt("mknod", inner, 0o100666, 0, 0, names=[step])
        attempt("mkdir", inner, 0o777, 0, names=[step])
        attempt("symlink", inner, names=[step, b"target"])
        attempt("link", inner, file, names=[step])
        attempt("create", inner, os.O_RDWR, 0o100666, 0, 0, names=[step])
        for names in ([step, b"new"], [b"victim", step]):
            if step != b"..\0" or names[0] != step:  # which ends the first name
                attempt("rename", inner, inner, names=names)
                attempt("rename2", inner, inner, 0, names=names)
    assert sorted(str(path) for path in share.shared.rglob("*")) == before


def test_what_was_never_given_out_means_nothing(share: Served, guest: FakeGuest, scene: Scene) -> None:
    """Numbers of nodes and handles are no descriptors and no inodes of the host's."""
    scene.put(scene.inside / "file", OWN)
    top = scene.node(guest)
    guest.lookup(top, b"file")
    given = max(guest.lookups)
    inodes = {path.stat().st_ino for path in (scene.outside, scene.outside / "secret", scene.inside)}
    nodes = [0, *range(given + 1, given + 60), *inodes - set(guest.lookups), 2**31, 2**32 + 1, 2**63, 2**64 - 1]
    unknown = (errno.ESTALE, errno.EINVAL, errno.ENOENT, errno.EBADF)
    for nodeid in nodes:
        assert raw(guest, "lookup", nodeid, names=[b"secret"]) in unknown
        assert raw(guest, "link", top, nodeid, names=[b"taken"]) in unknown
        assert raw(guest, "rename", top, nodeid, names=[b"file", b"taken"]) in unknown
        assert raw(guest, "open", nodeid, os.O_RDONLY, 0) in unknown
        assert raw(guest, "create", nodeid, os.O_RDWR, 0o100666, 0, 0, names=[b"made"]) in unknown
        assert raw(guest, "setattr", nodeid, abi.FATTR_MODE, 0, *[0] * 11) in unknown
    for fh in (*range(1024), 2**31, 2**63, 2**64 - 1):  # the server's own descriptors are among them
        assert raw(guest, "read", top, fh, 0, 512, 0, 0, 0) in unknown
    assert sorted(os.listdir(scene.inside)) == ["file"]


def test_symbolic_links_are_the_guests_to_follow(share: Served, guest: FakeGuest, scene: Scene) -> None:
    (scene.inside / "absolute").symlink_to(scene.outside / "secret")
    (scene.inside / "up").symlink_to(f"../../{scene.outside.name}/secret")
    (scene.inside / "directory").symlink_to(scene.outside)
    (scene.inside / "magic").symlink_to("/proc/self/fd/0")
    top = scene.node(guest)
    for name in (b"absolute", b"up", b"directory", b"magic"):
        entry = guest.lookup(top, name)
        assert stat.S_ISLNK(entry.attr[9])
        assert entry.attr[0] == os.lstat(scene.inside / os.fsdecode(name)).st_ino
        attempt = Tally()
        attempt(guest.open, entry.nodeid, os.O_RDWR)
        attempt(guest.open, entry.nodeid, os.O_RDONLY | os.O_TRUNC)
        attempt(guest.opendir, entry.nodeid)
        attempt(guest.lookup, entry.nodeid, b"secret")
        attempt(guest.create, entry.nodeid, b"made")
        attempt(guest.create, top, name, os.O_RDWR | os.O_TRUNC)
        attempt(lambda node=entry.nodeid: guest.setattr(node, abi.FATTR_SIZE, size=0))
        attempt(lambda node=entry.nodeid: guest.setattr(node, abi.FATTR_MODE, mode=0o777))
        attempt(guest.setxattr, entry.nodeid, b"user.x", b"1")
        assert attempt.served == 0
        # The link itself, which may be the guest's own.
        if guest_owns := share.way.user != "nobody" or not ROOT:
            guest.link(entry.nodeid, top, name + b" again")
        assert (scene.inside / os.fsdecode(name + b" again")).is_symlink() == guest_owns
        with contextlib.suppress(PermissionError):
            guest.setattr(entry.nodeid, abi.FATTR_ATIME | abi.FATTR_MTIME, atime=1, mtime=1)
            guest.setattr(entry.nodeid, abi.FATTR_UID | abi.FATTR_GID, uid=4711, gid=4711)


# What changes on the host while the guest is on its way


def hammer(guest: FakeGuest, top: int, path: list[bytes], attempt: Tally) -> None:
    """Go once along a path that somebody exchanges meanwhile, and do everything to what is at its end."""
    directory = top
    for name in path:
        entry = attempt(guest.lookup, directory, name)
        if entry is None:
            return
        directory = entry.nodeid
    entry = attempt(guest.lookup, directory, b"secret")
    if entry is not None:
        for flags in (os.O_RDONLY, os.O_RDWR):
            opened = attempt(guest.open, entry.nodeid, flags)
            if opened is None:
                continue
            assert guest.read(entry.nodeid, opened[0], 0, 100) == OWN
            if flags == os.O_RDWR:
                guest.write(entry.nodeid, opened[0], 0, OWN)
            guest.release(entry.nodeid, opened[0])
        attempt(lambda: guest.setattr(entry.nodeid, abi.FATTR_MODE, mode=0o600))
        attempt(guest.setxattr, entry.nodeid, b"user.mine", b"1")
        if attempt(guest.link, entry.nodeid, top, b"linked"):
            guest.unlink(top, b"linked")
    attempt(guest.unlink, directory, b"victim")
    made = attempt(guest.create, directory, b"victim", os.O_RDWR, 0o666)
    if made is not None:
        guest.write(made[0].nodeid, made[1], 0, OWN)
        guest.release(made[0].nodeid, made[1])
    attempt(guest.mkdir, directory, b"made")
    attempt(guest.rmdir, directory, b"made")
    attempt(guest.symlink, directory, b"made", b"x")
    attempt(guest.rename, directory, b"made", directory, b"renamed")
    attempt(guest.unlink, directory, b"renamed")
    handle = attempt(guest.opendir, directory)
    if handle is not None:
        names = {entry.name for entry in guest.readdirplus(directory, handle[0], 0, 8192)}
        assert b"only outside" not in names
        guest.releasedir(directory, handle[0])


@pytest.mark.parametrize("which", ["itself", "its parent"])
def test_a_directory_that_turns_into_a_symlink_again_and_again_leads_nowhere(
    share: Served, guest: FakeGuest, scene: Scene, which: str
) -> None:
    if which == "itself":
        scene.put_directory("flips")
        (scene.inside / "other").symlink_to(scene.outside)
        path = [b"flips"]
    else:
        (scene.inside / "flips").mkdir()
        (scene.inside / "flips").chmod(0o777)
        scene.put_directory("flips/q")
        (scene.inside / "other").symlink_to(f"../../{scene.outside.name}")
        path = [b"flips", b"q"]
    top = scene.node(guest)
    attempt = Tally()
    with Flipper(scene.inside / "flips", scene.inside / "other") as flipper:
        for _ in range(ATTEMPTS):
            hammer(guest, top, path, attempt)
            for nodeid, count in list(guest.lookups.items()):
                if nodeid != top and count > 0:
                    guest.forget(nodeid, count)
    assert flipper.count > ATTEMPTS
    assert attempt.served > ATTEMPTS, attempt.refused
    assert sum(attempt.refused.values()) > 10, "the race was not run"


def test_a_file_that_turns_into_a_symlink_again_and_again_is_never_followed(
    share: Served, guest: FakeGuest, scene: Scene
) -> None:
    scene.put(scene.inside / "flips", OWN)
    (scene.inside / "other").symlink_to(scene.outside / "secret")
    top = scene.node(guest)
    attempt = Tally()
    with Flipper(scene.inside / "flips", scene.inside / "other") as flipper:
        for _ in range(ATTEMPTS):
            entry = attempt(guest.lookup, top, b"flips")
            for flags in (os.O_RDONLY, os.O_RDWR):
                opened = attempt(guest.open, entry.nodeid, flags)
                if opened is not None:
                    assert guest.read(entry.nodeid, opened[0], 0, 100) == OWN
                    guest.release(entry.nodeid, opened[0])
            attempt(lambda node=entry.nodeid: guest.setattr(node, abi.FATTR_SIZE, size=len(OWN)))
            attempt(lambda node=entry.nodeid: guest.setattr(node, abi.FATTR_MODE, mode=0o666))
            attempt(guest.setxattr, entry.nodeid, b"user.mine", b"1")
            made = attempt(guest.create, top, b"flips", os.O_RDWR, 0o666)
            if made is not None:
                assert guest.read(made[0].nodeid, made[1], 0, 100) == OWN
                guest.release(made[0].nodeid, made[1])
                guest.forget(made[0].nodeid)
            guest.forget(entry.nodeid)
    assert flipper.count > ATTEMPTS
    assert attempt.served > ATTEMPTS
    assert sum(attempt.refused.values()) > 10, "the race was not run"


def test_a_directory_that_is_moved_out_takes_along_what_was_in_it_and_leads_to_nothing_else(
    share: Served, guest: FakeGuest, scene: Scene
) -> None:
    """As with a process that has it open. Landlock is stricter: nothing in it can be opened or changed any more."""
    below = scene.put_directory("d/below")
    (scene.inside / "d").chmod(0o777)
    top = scene.node(guest)
    moved = guest.lookup(top, b"d").nodeid
    node = guest.lookup(moved, b"below").nodeid
    file = guest.lookup(node, b"secret").nodeid
    fh, _ = guest.open(file, os.O_RDWR)
    handles = [(nodeid, guest.opendir(nodeid)[0]) for nodeid in (moved, node)]
    (scene.inside / "d").rename(scene.outside / "d")
    try:
        # What is open stays open.
        assert guest.read(file, fh, 0, 100) == OWN
        guest.write(file, fh, 0, OWN[::-1])
        assert (scene.outside / "d" / "below" / "secret").read_bytes() == OWN[::-1]
        # Nothing leads up. The number of the directory above is all that a listing tells of it.
        for nodeid in (moved, node):
            for name in (b"..", b"../secret", b"../../secret"):
                assert raw(guest, "lookup", nodeid, names=[name]) == errno.EINVAL
            for name in (b"only outside", b"q"):
                with pytest.raises(OSError):
                    assert guest.lookup(nodeid, name).nodeid == 0
                    raise FileNotFoundError
        for nodeid, directory in handles:
            for entry in guest.readdirplus(nodeid, directory):
                assert entry.name in (b".", b"..", b"below", b"secret", b"victim")
                assert not (entry.name in (b".", b"..") and entry.entry is not None and entry.entry.nodeid)
            guest.releasedir(nodeid, directory)
        # What was in it is the guest's still, but where Landlock asks which tree a file is in.
        attempt = Tally()
        attempt(guest.create, node, b"made")
        attempt(guest.open, guest.lookup(node, b"victim").nodeid)
        attempt(guest.link, file, top, b"linked")
        attempt(guest.rename, node, b"victim", top, b"fetched")
        if share.way.kept_in:
            # With a mount of the share alone, what left it is of no tree, and kernels differ on that.
            assert attempt.served == 0 or share.way.mode == "namespace"
            assert set(attempt.refused) <= {errno.EACCES, errno.EXDEV, errno.ESTALE}
        else:
            assert attempt.served == 4, attempt.refused
            assert sorted(os.listdir(scene.inside)) == ["fetched", "linked"]
        # Under its name it is not there any more.
        with pytest.raises(FileNotFoundError):
            guest.lookup(top, b"d")
        guest.release(file, fh)
    finally:
        shutil.rmtree(scene.outside / "d")
        os.utime(scene.outside, ns=(0, scene.before[str(scene.outside)][4]))
    assert not below.exists()


# What is no file and no directory


def plant_specials(scene: Scene) -> list[bytes]:
    os.mkfifo(scene.inside / "fifo")
    here = os.getcwd()
    os.chdir(scene.inside)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.chdir(here)
    names = [b"fifo", b"socket"]
    if ROOT:
        os.mknod(scene.inside / "zero", stat.S_IFCHR, os.makedev(1, 5))
        os.mknod(scene.inside / "terminal", stat.S_IFCHR, os.makedev(5, 0))
        os.mknod(scene.inside / "loop", stat.S_IFBLK, os.makedev(7, 0))
        names += [b"zero", b"terminal", b"loop"]
    for name in names:
        (scene.inside / os.fsdecode(name)).chmod(0o666)
    return names


def refuse_to_open(share: Served, guest: FakeGuest, top: int, name: bytes) -> None:
    node = guest.lookup(top, name).nodeid
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_TRUNC):
        with pytest.raises(OSError) as caught:
            guest.open(node, flags)  # a server that waits is a TimeoutError of another kind
        assert caught.value.errno == errno.EBADF
        with pytest.raises(OSError) as caught:
            guest.create(top, name, flags)
        assert caught.value.errno in (errno.ESTALE, errno.EEXIST)
    with pytest.raises(NotADirectoryError):
        guest.opendir(node)
    with pytest.raises(OSError) as caught:
        guest.setattr(node, abi.FATTR_SIZE, size=0)
    assert caught.value.errno == errno.EBADF
    if ROOT:
        assert share.opened_specials() == []


def test_fifos_sockets_and_devices_are_never_opened(share: Served, guest: FakeGuest, scene: Scene) -> None:
    names = plant_specials(scene)
    top = scene.node(guest)
    for name in names:
        refuse_to_open(share, guest, top, name)
    with pytest.raises(OSError) as caught:
        os.open(scene.inside / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO, "somebody reads from the FIFO"


def test_devices_that_the_guest_makes_are_not_for_it_to_open(share: Served, guest: FakeGuest, scene: Scene) -> None:
    top = scene.node(guest)
    guest.mknod(top, b"fifo", stat.S_IFIFO | 0o666)
    names = [b"fifo"]
    for name, kind, number in ((b"disk", stat.S_IFBLK, 7 << 8), (b"zero", stat.S_IFCHR, 1 << 8 | 5)):
        if share.way.user == "nobody":  # CAP_MKNOD of a user namespace is none
            with pytest.raises(PermissionError):
                guest.mknod(top, name, kind | 0o666, number)
        else:
            guest.mknod(top, name, kind | 0o666, number)
            names.append(name)
    for name in names:
        refuse_to_open(share, guest, top, name)


# Programs


@pytest.mark.parametrize("share", [way for way in WAYS if way.user == "nobody"], indirect=True, ids=str)
def test_set_user_id_bits_of_an_unprivileged_share_give_no_other_user_than_its_own(
    share: Served, guest: FakeGuest, scene: Scene
) -> None:
    top = scene.node(guest)
    entry, fh, _ = guest.create(top, b"program", os.O_RDWR, 0o755)
    guest.write(entry.nodeid, fh, 0, tiny_program())
    guest.release(entry.nodeid, fh)
    guest.setattr(entry.nodeid, abi.FATTR_MODE, mode=0o6755)
    for uid in (0, 1, 1000):
        with pytest.raises(PermissionError):
            guest.setattr(entry.nodeid, abi.FATTR_UID, uid=uid)
        with pytest.raises(PermissionError):
            guest.setattr(entry.nodeid, abi.FATTR_GID, gid=uid)
    found = (scene.inside / "program").stat()
    assert found.st_uid == (rootless.NOBODY if ROOT else os.geteuid())
    if ROOT:  # files of root's that everybody may write to
        for name, mode in (("of root", 0o6777), ("written", 0o4777), ("cut", 0o4777)):
            scene.put(scene.inside / name, tiny_program()).chmod(mode)
        (scene.inside / "plain").write_bytes(tiny_program())
        for name in (b"of root", b"plain"):
            with pytest.raises(PermissionError):
                guest.setattr(guest.lookup(top, name).nodeid, abi.FATTR_MODE, mode=0o4777)
        with pytest.raises(PermissionError):
            guest.setxattr(guest.lookup(top, b"plain").nodeid, b"security.capability", CAPABILITY)
        written = guest.lookup(top, b"written").nodeid
        fh, _ = guest.open(written, os.O_WRONLY)
        guest.write(written, fh, 0, b"\x7fELF")
        guest.release(written, fh)
        guest.setattr(guest.lookup(top, b"cut").nodeid, abi.FATTR_SIZE, size=64)
        for name in ("written", "cut"):
            assert not (scene.inside / name).stat().st_mode & 0o6000
        if os.uname().machine == "x86_64":
            ran = subprocess.run(["setpriv", "--reuid=1000", "--clear-groups", "--", str(scene.inside / "program")])
            assert ran.returncode == rootless.NOBODY & 0xFF, "not the share's user"


# What a server could do that runs the guest's code


@pytest.fixture
def shared() -> Iterator[Path]:
    home = Path(rootless.rootless_home()) / f"escapes-{os.getpid()}-{os.urandom(4).hex()}"
    (home / "shared").mkdir(parents=True)
    for path in (home, home / "shared"):
        path.chmod(0o777)
    Scene.put(home / "secret", SECRET)
    yield home / "shared"
    assert (home / "secret").read_bytes() == SECRET
    shutil.rmtree(home)


def taken_over(way: Way, shared: Path, program: str = "") -> Sandboxed:
    skip_where_missing(way)
    options = {"program": program} if program else {}
    box = Sandboxed(way.mode, shared, words_of(way.user), by_descriptor=True, landlock=way.landlock, **options)
    if box.error:
        box.close()
        raise AssertionError(box.error)
    return box


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_server_that_was_taken_over_runs_no_program(way: Way, shared: Path) -> None:
    program = shared / "program"
    program.write_bytes(tiny_program())
    program.chmod(0o4755)
    for call in ("os.execv('/program', ['x'])", "os.posix_spawn('/program', ['x'], {})", "os.fork()"):
        call = call.replace("/program", str(program) if way.mode == "none" else "/program")
        with taken_over(way, shared, FILTERED) as box:
            assert box.ask("'it answers'") == "it answers"
            with pytest.raises(AssertionError, match=r"it ended|waiter"):
                box.ask(call)
            assert box.wait() in (-signal.SIGSYS, 128 + signal.SIGSYS)


@needs_root
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="there is a program of a few bytes for x86_64 only")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_set_user_id_program_gives_a_server_without_its_filter_nothing(way: Way, shared: Path) -> None:
    program = shared / "program"
    program.write_bytes(tiny_program())
    os.chown(program, 77, 77)
    program.chmod(0o6755)
    path = str(program) if way.mode == "none" else "/program"
    # Its status is its effective user. Landlock has no right to execute in its rule.
    expression = f"""[pid := os.fork(), pid or (tried(os.execv, {path!r}, ['x']), os._exit(200)),
        os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])][-1]"""
    with taken_over(way, shared) as box:
        own = box.ask("os.geteuid() & 255")
        assert box.ask(expression) == (200 if way.kept_in else own)


@needs_root
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_server_that_was_taken_over_opens_no_file_by_a_handle_of_its_own_making(way: Way, shared: Path) -> None:
    """Without CAP_DAC_READ_SEARCH; the handle of a file outside can be guessed, for it is an inode's number."""
    code = (
        "from fusewire.linux import files; import os, sys; print(files.name_to_handle(-100, sys.argv[1].encode(), 0))"
    )
    found = subprocess.run(
        [*PYTHON, "-c", code, str(shared.parent / "secret")], capture_output=True, text=True, timeout=PATIENCE
    )
    assert found.returncode == 0, found.stderr
    handle = eval(found.stdout)[0]
    with taken_over(way, shared, FILTERED) as box:
        expression = f"tried(files.open_by_handle, entered.root, {handle!r}, os.O_RDONLY)"
        assert box.ask(expression) in ("EPERM", "EBADF")
        readable = "[d := os.open(entered.proc + b'%d' % entered.root, os.O_RDONLY), "
        assert box.ask(f"{readable}tried(files.open_by_handle, d, {handle!r}, os.O_RDONLY)][1]") == "EPERM"


@pytest.mark.parametrize("way", [way for way in WAYS if way.user != "nobody" and way.mode == "namespace"], ids=str)
def test_a_server_that_was_taken_over_opens_no_device_that_it_has_made(way: Way, shared: Path) -> None:
    """It may make them, for the guest's root may, but a disk that could be opened would be the whole host's."""
    with taken_over(way, shared, FILTERED) as box:
        box.ask("os.mknod('/zero', stat.S_IFCHR | 0o666, os.makedev(1, 5))")
        assert box.ask("tried(os.open, '/zero', os.O_RDONLY)") == "EACCES"
        assert box.ask("os.stat('/zero').st_rdev") == os.makedev(1, 5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != BARE], ids=str)
def test_a_directory_swapped_under_a_server_leads_it_to_what_its_sandbox_lets_it_see(way: Way, shared: Path) -> None:
    """A server without any care for names, as one that runs the guest's code: only the sandbox is left."""
    (shared / "flips").mkdir()
    Scene.put(shared / "flips" / "secret", OWN)
    (shared / "other").symlink_to(shared.parent)
    read = "os.read(os.open('flips/secret', os.O_RDONLY, dir_fd=entered.root), 99).decode()"
    expression = """[found := set(),
        globals().update(once=lambda: [f := os.open('flips/secret', os.O_RDONLY, dir_fd=entered.root),
            found.add(os.read(f, 99).decode()), os.close(f)], found=found),
        [found.add(tried(once)) for _ in range(3000)], sorted(found)][-1]"""
    with taken_over(way, shared, FILTERED) as box:
        assert box.ask(read) == OWN.decode()
        refusals = {"EACCES"} if way.mode == "none" else {"ENOENT"}
        expected, answers = {"done", OWN.decode()} | refusals, set[str]()
        with Flipper(shared / "flips", shared / "other"):
            for _ in range(50):  # a busy machine may give the two their turns one after the other
                answers |= set(box.ask(expression))
                if answers >= expected:
                    break
    assert answers == expected


# Mounts that the host makes later


@needs_root
@pytest.mark.parametrize("rules", ["off", "require"])
def test_what_the_host_mounts_below_the_share_later_is_shared_as_meant_and_goes_again(rules: str) -> None:
    """Mounts arrive from the host and never go there: a bind mount below the share is the host's way to share more."""
    script = 'mount --make-rshared / && exec "$@"'  # as the machine's init does
    words = ("unshare", "-m", "sh", "-c", script, "sh", *PYTHON)
    way = Way("namespace", "root", rules)
    with served(way, "--cache=none", words=words) as share, share.guest() as guest:
        here = Path(f"/proc/{share.process.pid}/mountinfo")
        assert str(share.home) not in here.read_text(), "mounts of the server reach the host"
        scene = share.scene()
        place = scene.put_directory("d")
        top = scene.node(guest)
        covered = guest.lookup(top, b"d").nodeid
        own, _ = guest.open(guest.lookup(covered, b"secret").nodeid)
        enter = ["nsenter", "-t", str(share.process.pid), "-m", "--"]
        subprocess.run([*enter, "mount", "--bind", str(scene.outside), str(place)], check=True, timeout=PATIENCE)
        entry = guest.lookup(top, b"d")
        assert entry.nodeid != covered
        assert entry.attr[15] & abi.FUSE_ATTR_SUBMOUNT
        found = guest.lookup(entry.nodeid, b"secret")
        fh, _ = guest.open(found.nodeid)
        assert guest.read(found.nodeid, fh, 0, 100) == SECRET
        # Nothing above it comes along, and what it covers is the guest's still.
        assert raw(guest, "lookup", entry.nodeid, names=[b".."]) == errno.EINVAL
        with pytest.raises(FileNotFoundError):
            guest.lookup(entry.nodeid, os.fsencode(scene.outside.name))
        with pytest.raises(OSError) as caught:
            guest.link(found.nodeid, top, b"taken")
        assert caught.value.errno == errno.EXDEV
        assert guest.read(guest.lookup(covered, b"secret").nodeid, own, 0, 100) == OWN
        # In use it is busy, as by any process; lazily it goes at once, and only what is open lives on.
        busy = subprocess.run([*enter, "umount", str(place)], capture_output=True, text=True, timeout=PATIENCE)
        assert "busy" in busy.stderr
        subprocess.run([*enter, "umount", "-l", str(place)], check=True, timeout=PATIENCE)
        assert len(Path(f"/proc/{share.pid}/mountinfo").read_text().splitlines()) == 1
        assert guest.read(found.nodeid, fh, 0, 100) == SECRET
        guest.release(found.nodeid, fh)
        again = guest.lookup(top, b"d")
        assert again.nodeid == covered
        with pytest.raises(FileNotFoundError):
            guest.lookup(again.nodeid, b"only outside")
        scene.check()


@needs_root
def test_what_the_host_mounts_elsewhere_later_does_not_arrive() -> None:
    script = 'mount --make-rshared / && exec "$@"'
    words = ("unshare", "-m", "sh", "-c", script, "sh", *PYTHON)
    with served(Way("namespace", "root", "off"), words=words) as share, share.guest() as guest:
        scene = share.scene()
        enter = ["nsenter", "-t", str(share.process.pid), "-m", "--"]
        subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(scene.outside)], check=True, timeout=PATIENCE)
        assert guest.getattr(1)[0][0] == share.shared.stat().st_ino
        assert [line.split()[4] for line in Path(f"/proc/{share.pid}/mountinfo").read_text().splitlines()] == ["/"]
