"""What other servers of the same kind have been broken by, tried on ours: a test for each, named after it.

Where the sandbox alone could have helped, it is left out here: the core has to stand on its own.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from escapes import BARE, OWN, PATIENCE, PYTHON, ROOT, Flipper, Served, Tally, Way, raw, served
from fusewire.linux import landlock
from fusewire.testing.guest import FakeGuest
from fusewire.testing.replies import body_of
from fusewire.wire import abi

pytestmark = pytest.mark.skipif(not ROOT, reason="needs root: to make devices, and to be somebody else")
ATTEMPTS = 1500
GROUP = 4242  # of which the guest's user is no member
HANDLES = ["never", "mandatory"]


def refused(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


# CVE-2020-10717: a guest opens files until the host has no descriptors left (virtiofsd)


def test_cve_2020_10717_a_guest_that_opens_everything_meets_enfile_and_the_host_goes_on() -> None:
    most = 128
    with served(BARE, "--cache=none", f"--rlimit-nofile={most}") as share:
        scene = share.scene()
        for number in range(300):
            scene.put(scene.inside / str(number), b"%d" % number)
        with share.guest() as guest:
            top = scene.node(guest)
            for _ in range(2):
                attempt = Tally()
                opened = []
                for number in range(600):
                    entry = attempt(guest.lookup, top, b"%d" % (number % 300))
                    found = attempt(guest.open, entry.nodeid) if entry is not None else None
                    if found is not None:
                        opened.append((entry.nodeid, found[0], number % 300))
                attempt(guest.create, top, b"one more")
                attempt(guest.tmpfile, top)
                attempt(guest.opendir, top)
                assert set(attempt.refused) == {errno.ENFILE}
                assert attempt.refused[errno.ENFILE] > 100, attempt.served
                assert len(opened) >= 30
                assert len(share.opened()) <= most
                # What was opened is there, names and attributes too, and the host has descriptors.
                for node, fh, number in opened:
                    assert guest.read(node, fh, 0, 10) == b"%d" % number
                    assert guest.getattr(node)[0][1] == len(str(number))
                os.close(os.open(scene.inside / "0", os.O_RDONLY))
                for node, fh, _ in opened:
                    guest.release(node, fh)
                assert guest.read_file(os.fsencode(scene.inside.name) + b"/299") == b"299"
                guest.forget_all()
                top = scene.node(guest)
            for number in range(300):
                entry = attempt(guest.lookup, top, b"%d" % number)
                if entry is not None:
                    attempt(guest.open, entry.nodeid)
        # The guest is gone with all of it open, and the next one has what it needs.
        with share.guest() as guest:
            assert guest.read_file(os.fsencode(scene.inside.name) + b"/7") == b"7"
            assert len(share.opened()) < 40


def test_cve_2020_10717_many_names_cost_no_descriptors() -> None:
    with served(BARE, "--rlimit-nofile=128") as share, share.guest() as guest:
        scene = share.scene()
        for number in range(400):
            (scene.inside / f"d{number}").mkdir()
            scene.put(scene.inside / f"d{number}" / "file", b"%d" % number)
        top = scene.node(guest)
        files = [guest.lookup(guest.lookup(top, b"d%d" % number).nodeid, b"file").nodeid for number in range(400)]
        for number, node in enumerate(files):
            fh, _ = guest.open(node)
            assert guest.read(node, fh, 0, 10) == b"%d" % number
            guest.release(node, fh)
        assert len(share.opened()) <= 128


def test_cve_2020_10717_the_limit_stays_below_what_all_processes_may_open_together(tmp_path: Path) -> None:
    """fs.file-max (proc_sys_fs(5)) is a tenth of the memory in KiB where no init system has raised it."""
    file_max = 10_000
    (tmp_path / "file-max").write_text(f"{file_max}\n")
    script = f'mount --bind {tmp_path}/file-max /proc/sys/fs/file-max && exec "$@"'
    words = ("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *PYTHON)
    with served(BARE, words=words) as share:
        limits = Path(f"/proc/{share.pid}/limits").read_text().splitlines()
        soft, hard = next(line for line in limits if "open files" in line).split()[3:5]
        assert int(soft) <= int(hard)
        assert int(soft) <= file_max // 2


# CVE-2020-35517: a guest makes a device and opens it on the host (virtiofsd)


@pytest.mark.parametrize("handles", HANDLES)
def test_cve_2020_35517_devices_fifos_and_sockets_of_the_guest_are_not_opened_by_the_host(handles: str) -> None:
    with served(BARE, f"--inode-file-handles={handles}") as share, share.guest() as guest:
        scene = share.scene()
        top = scene.node(guest)
        kinds = {
            b"disk": (stat.S_IFBLK, 7 << 8),
            b"zero": (stat.S_IFCHR, 1 << 8 | 5),
            b"fifo": (stat.S_IFIFO, 0),
            b"socket": (stat.S_IFSOCK, 0),
        }
        for name, (kind, number) in kinds.items():
            node = guest.mknod(top, name, kind | 0o666, number).nodeid
            for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_NONBLOCK, os.O_RDWR | os.O_TRUNC):
                assert refused(guest.open, node, flags) == errno.EBADF
                # CREATE of what is there: a new file only, or a file.
                assert refused(guest.create, top, name, flags) == errno.ESTALE
                assert refused(guest.create, top, name, flags | os.O_EXCL) == errno.EEXIST
            assert refused(lambda node=node: guest.setattr(node, abi.FATTR_SIZE, size=0)) == errno.EBADF
            assert refused(guest.opendir, node) == errno.ENOTDIR
            assert guest.getattr(node)[0][9] == kind | 0o666
            assert share.opened_specials() == []


# CVE-2021-20263: capabilities of a file survive a write, for they have another name on the host (virtiofsd)

CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0)  # CAP_NET_ADMIN, permitted and effective
STORED = "user.virtiofs.security.capability"


def _write(guest: FakeGuest, node: int) -> None:
    fh, _ = guest.open(node, os.O_WRONLY)
    guest.write(node, fh, 0, b"another program")
    guest.release(node, fh)


def _append(guest: FakeGuest, node: int) -> None:
    fh, _ = guest.open(node, os.O_WRONLY | os.O_APPEND)
    guest.call("write", node, fh, 0, 4, 0, 0, os.O_WRONLY | os.O_APPEND, tail=b"more")
    guest.release(node, fh)


def _write_much(guest: FakeGuest, node: int) -> None:
    fh, _ = guest.open(node, os.O_WRONLY)
    guest.write(node, fh, 0, bytes(300_000))
    guest.release(node, fh)


def _cut(guest: FakeGuest, node: int) -> None:
    guest.setattr(node, abi.FATTR_SIZE, size=3)


def _cut_by_handle(guest: FakeGuest, node: int) -> None:
    fh, _ = guest.open(node, os.O_RDWR)
    guest.setattr(node, abi.FATTR_SIZE | abi.FATTR_FH, size=3, fh=fh)
    guest.release(node, fh)


def _open_to_cut(guest: FakeGuest, node: int) -> None:
    guest.release(node, guest.open(node, os.O_WRONLY | os.O_TRUNC)[0])


def _chown(guest: FakeGuest, node: int) -> None:
    guest.setattr(node, abi.FATTR_UID, uid=1000)


def _allocate(guest: FakeGuest, node: int) -> None:
    fh, _ = guest.open(node, os.O_RDWR)
    guest.fallocate(node, fh, 0, 4096, 0)
    guest.release(node, fh)


def _copy_into(guest: FakeGuest, node: int) -> None:
    made, own, _ = guest.create(1, b"source")
    guest.write(made.nodeid, own, 0, b"another program")
    fh, _ = guest.open(node, os.O_RDWR)
    assert guest.copy_file_range(made.nodeid, own, 0, node, fh, 0, 15) == 15
    guest.release(node, fh)
    guest.release(made.nodeid, own)


@pytest.mark.parametrize(
    "change",
    [_write, _append, _write_much, _cut, _cut_by_handle, _open_to_cut, _chown, _allocate, _copy_into],
    ids=lambda change: change.__name__.strip("_").replace("_", " "),
)
def test_cve_2021_20263_capabilities_under_another_name_go_when_the_file_changes(
    change: Callable[[FakeGuest, int], None],
) -> None:
    with served(BARE, "--xattrmap=:map::user.virtiofs.:") as share, share.guest() as guest:
        scene = share.scene()
        path = scene.put(scene.inside / "program", OWN)
        node = guest.lookup(scene.node(guest), b"program").nodeid
        guest.setxattr(node, b"security.capability", CAPABILITY)
        guest.setxattr(node, b"user.other", b"stays")
        assert os.getxattr(path, STORED) == CAPABILITY
        fh, _ = guest.open(node)
        assert guest.read(node, fh, 0, 100) == OWN
        guest.release(node, fh)
        guest.setattr(node, abi.FATTR_MODE, mode=0o755)
        assert guest.getxattr(node, b"security.capability") == CAPABILITY, "reading and chmod(2) leave it"
        change(guest, node)
        assert os.listxattr(path) == ["user.virtiofs.user.other"]
        assert refused(guest.getxattr, node, b"security.capability") == errno.ENODATA
        assert guest.getxattr(node, b"user.other") == b"stays"


# CVE-2022-0358: groups of the daemon's starter give set-group-ID files of theirs (virtiofsd)
# CVE-2018-13405: who is no member of a directory's group makes set-group-ID programs of it (Linux)

DAEMONS = [Way("namespace", "root", "off"), Way("chroot", "root", "off"), BARE]


def group_directory(share: Served) -> tuple[Path, bytes]:
    """Make a directory whose files inherit a group, and where everybody may make some."""
    scene = share.scene()
    os.chown(scene.inside, 0, GROUP)
    scene.inside.chmod(0o2777)
    return scene.inside, os.fsencode(scene.inside.name)


def made_in(share: Served, guest: FakeGuest, *, member: bool = False) -> dict[str, os.stat_result]:
    """Have the guest make programs in such a directory, in every way, and give what the host sees."""
    place, name = group_directory(share)
    top = guest.lookup(1, name).nodeid
    tail, extlen = b"", 0
    if member:  # fuse_ext_header and fuse_supp_groups: the process is in one group more, and says so
        tail = struct.pack("<IIII", 16, abi.FUSE_EXT_GROUPS, 1, GROUP)
        extlen = len(tail) // 8
    mode = stat.S_IFREG | 0o2755

    def make(operation: str, *fields: int, names: list[bytes]) -> bytes:
        return guest.raw(
            getattr(abi, f"FUSE_{operation.upper()}"),
            top,
            body_of(operation, *fields, names=names) + tail,
            extlen=extlen,
        )

    make("create", os.O_RDWR | os.O_EXCL, mode, 0, 0, names=[b"created"])
    make("create", os.O_RDWR, mode, 0, 0, names=[b"opened"])
    make("mknod", mode, 0, 0, names=[b"made"])
    body = make("tmpfile", os.O_RDWR, mode, 0, 0, names=[b"/"])
    guest.link(int.from_bytes(body[:8], "little"), top, b"linked")
    return {path.name: path.stat() for path in place.iterdir()}


@pytest.mark.parametrize("way", DAEMONS, ids=str)
def test_cve_2022_0358_groups_of_the_daemons_starter_are_nobodys_in_the_guest(way: Way) -> None:
    with served(way, words=("setpriv", f"--groups={GROUP},27", "--", *PYTHON)) as share, share.guest() as guest:
        assert share.status()["Groups"] == ""
        guest.uid = guest.gid = 1000
        found = made_in(share, guest)
        assert sorted(found) == ["created", "linked", "made", "opened"]
        for name, status in found.items():
            assert (status.st_uid, status.st_gid) == (1000, GROUP), name  # as the directory's bit has it
            assert stat.S_IMODE(status.st_mode) == 0o755, name
        for task in os.listdir(f"/proc/{share.pid}/task"):
            assert share.status(task)["Groups"] == ""


@pytest.mark.parametrize("supplementary", [True, False], ids=["guest says groups", "guest of before 6.3"])
def test_cve_2018_13405_only_members_make_set_group_id_programs_in_a_groups_directory(supplementary: bool) -> None:
    with served(BARE) as share, FakeGuest.connect(str(share.socket)) as guest:
        from fusewire.testing.kernel import OFFERED

        guest.init(flags=OFFERED if supplementary else OFFERED & ~abi.FUSE_CREATE_SUPP_GROUP)
        guest.uid = guest.gid = 1000
        for name, status in made_in(share, guest).items():
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, GROUP, 0o755), name
        if supplementary:
            for name, status in made_in(share, guest, member=True).items():
                assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, GROUP, 0o2755), name
        guest.gid = GROUP
        for name, status in made_in(share, guest).items():
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, GROUP, 0o2755), name
        # Directories inherit the bit, whoever makes them: what is made in them is the group's.
        guest.gid = 1000
        place, name = group_directory(share)
        guest.mkdir(guest.lookup(1, name).nodeid, b"below", 0o755)
        assert stat.S_IMODE((place / "below").stat().st_mode) == 0o2755


# CVE-2026-47243: an absolute name in SYMLINK, of a daemon without sandbox and filter (Kata Containers)


def test_cve_2026_47243_a_symlink_with_an_absolute_name_is_made_nowhere() -> None:
    with served(BARE, "--seccomp=none") as share, share.guest() as guest:
        assert share.status()["Seccomp"] == "0"
        scene = share.scene()
        top = scene.node(guest)
        outside = os.fsencode(scene.outside)
        up = b"../../" + os.fsencode(scene.outside.name)
        for name in (outside + b"/link", b"/" + outside + b"/link", up + b"/link", b"./link", b"link/", b"/link"):
            for parent in (1, top):
                assert raw(guest, "symlink", parent, names=[name, b"/etc/shadow"]) == errno.EINVAL, name
        assert os.listdir(scene.inside) == []
        assert not os.path.lexists("/link")
        scene.check()
        guest.symlink(top, b"link", b"/etc/shadow")  # where it leads is the guest's business
        assert os.readlink(scene.inside / "link") == "/etc/shadow"


# GHSA-rr59-xxvx-96qr: who may append options to a daemon's undoes those before (Kata Containers)

PROGRAMS = {
    "fusewire share": ("fusewire", "share"),
    "fusewire-virtiofsd": ("fusewire.cli.virtiofsd",),
}


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        (["-o", "source={share}"], ["-o", "source=/"], "-o source=/"),
        (["--shared-dir={share}"], ["-o", "source=/"], "-o source=/"),
        (["--shared-dir={share}"], ["--shared-dir=/"], "--shared-dir=/"),
        (["--shared-dir={share}", "--sandbox=namespace"], ["--sandbox=none"], "--sandbox=none"),
        (["--shared-dir={share}", "--sandbox=namespace"], ["-o", "no_chroot,sandbox=none"], "-o sandbox=none"),
        (["--shared-dir={share}", "-o", "sandbox=chroot"], ["--sandbox", "none"], "--sandbox none"),
        (["--shared-dir={share}", "--seccomp=kill"], ["--seccomp=none"], "--seccomp=none"),
        (["--shared-dir={share}", "--announce-submounts"], ["--no-announce-submounts"], "--no-announce-submounts"),
        (["--shared-dir={share}", "--readonly"], ["-o", "rw"], "-o rw"),
        (["--shared-dir={share}", "--modcaps=-mknod"], ["--modcaps=+sys_admin"], "--modcaps=+sys_admin"),
        (
            ["--shared-dir={share}", "--inode-file-handles=never"],
            ["--inode-file-handles=prefer"],
            "--inode-file-handles=prefer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value).replace("{share}", "DIR"),
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_ghsa_rr59_xxvx_96qr_options_that_widen_are_not_said_twice(
    program: str, first: list[str], then: list[str], named: str, tmp_path: Path
) -> None:
    (tmp_path / "share").mkdir()
    words = [word.format(share=tmp_path / "share") for word in first]
    command = [*PYTHON, "-m", *PROGRAMS[program], f"--socket-path={tmp_path}/s", *words, *then]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done
    assert done.stdout == ""
    name = "fusewire" if program == "fusewire share" else program
    assert re.match(rf"{name}: option `{re.escape(named)}`: contradicts `.+`: .+; remove one of the two", done.stderr)
    assert os.listdir(tmp_path) == ["share"]


def test_ghsa_rr59_xxvx_96qr_landlock_that_is_required_is_not_given_up_for_file_handles(tmp_path: Path) -> None:
    if landlock.abi() < landlock.MOVES_FILES:
        pytest.skip(landlock.missing() or "Landlock of ABI 1 only")
    (tmp_path / "share").mkdir()
    words = [str(tmp_path / "share"), f"--socket-path={tmp_path}/s", "--landlock=require", "--sandbox=none"]
    command = [*PYTHON, "-m", "fusewire", "share", *words, "--inode-file-handles=prefer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "--landlock require" in done.stderr
    assert "--inode-file-handles=never" in done.stderr
    assert os.listdir(tmp_path) == ["share"]


# CVE-2023-2861: a special file takes the place of another one between the check and the opening (QEMU's 9pfs)


@pytest.mark.parametrize("handles", HANDLES)
@pytest.mark.parametrize("kind", ["device", "fifo"])
def test_cve_2023_2861_what_turns_into_a_special_file_while_it_is_opened_is_not_opened(kind: str, handles: str) -> None:
    with served(BARE, "--cache=none", f"--inode-file-handles={handles}") as share, share.guest() as guest:
        scene = share.scene()
        scene.put(scene.inside / "flips", OWN)
        if kind == "device":
            os.mknod(scene.inside / "other", stat.S_IFCHR, os.makedev(1, 5))  # its content is another one
        else:
            os.mkfifo(scene.inside / "other")  # who opens it waits
        (scene.inside / "other").chmod(0o666)
        top = scene.node(guest)
        attempt = Tally()
        with Flipper(scene.inside / "flips", scene.inside / "other") as flipper:
            for number in range(ATTEMPTS):
                entry = attempt(guest.lookup, top, b"flips")
                flags = (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_NONBLOCK)[number % 3]
                opened = attempt(guest.open, entry.nodeid, flags)
                if opened is not None:
                    assert guest.read(entry.nodeid, opened[0], 0, 100) == OWN
                    guest.release(entry.nodeid, opened[0])
                if number % 5 == 0:
                    attempt(lambda node=entry.nodeid: guest.setattr(node, abi.FATTR_SIZE, size=len(OWN)))
                    made = attempt(guest.create, top, b"flips", flags)
                    if made is not None:
                        assert guest.read(made[0].nodeid, made[1], 0, 100) == OWN
                        guest.release(made[0].nodeid, made[1])
                        guest.forget(made[0].nodeid)
                guest.forget(entry.nodeid)
        assert flipper.count > ATTEMPTS
        assert sum(attempt.refused.values()) > 100, "the race was not run"
        assert attempt.served > ATTEMPTS
        assert share.opened_specials() == []


def test_cve_2023_2861_a_device_with_the_inode_number_of_a_file_that_is_gone_is_not_opened_for_it() -> None:
    """On overlayfs, where nothing tells two inodes of one number apart; here the guest removes a name of the second."""
    script = """mkdir "$7.upper" "$7.work" && mount -t overlay overlay \
        -o "lowerdir=$7,upperdir=$7.upper,workdir=$7.work" "$7" && chmod 777 "$7" && exec "$@" """
    words = ("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *PYTHON)
    with served(BARE, "--cache=none", words=words) as share, share.guest() as guest:
        place = Path(f"/proc/{share.pid}/root{share.shared}")
        if subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True).stdout != "overlayfs\n":
            pytest.skip("overlayfs cannot be mounted here")
        for number in range(100):
            path = place / str(number)
            path.write_bytes(OWN)
            inode = path.stat().st_ino
            node = guest.lookup(1, b"%d" % number).nodeid
            path.unlink()
            device = place / f"device{number}"
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 5))
            if device.stat().st_ino == inode:
                break
            guest.forget(node)
        else:
            pytest.skip("this filesystem gives an inode's number away later")
        guest.unlink(1, os.fsencode(device.name))
        for flags in (os.O_RDONLY, os.O_RDWR):
            assert refused(guest.open, node, flags) in (errno.ESTALE, errno.EBADF)
        assert share.opened_specials() == []
