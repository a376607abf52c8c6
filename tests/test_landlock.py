"""Landlock: what a process may still do below one directory, and what it may not do anywhere else."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from fusewire.linux import landlock
from rootless import rootless_home, rootless_python

needs_landlock = pytest.mark.skipif(landlock.abi() < 2, reason=landlock.missing() or "Landlock of ABI 1 only")

PROGRAM = """
import errno, os, socket, sys
from fusewire.linux import files, landlock, syscalls
version = int(sys.argv[2]) or landlock.abi()
place = os.open(sys.argv[1] + "/in", os.O_PATH)
outside = os.open(sys.argv[1], os.O_PATH)
os.chdir(sys.argv[1] + "/in")
syscalls.set_no_new_privs()
def tried(call, *args, **named):
    try:
        call(*args, **named)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory `in` with a file and a subdirectory, beside a file that is outside."""
    home = Path(rootless_home()) / f"landlock-{os.getpid()}-{tmp_path.name}"
    for name in ("in/sub", "out"):
        (home / name).mkdir(parents=True)
    for name in ("in/file", "outside", "out/file"):
        (home / name).write_text(name)
    if os.geteuid() == 0:
        subprocess.check_call(["chown", "-R", "65534:65534", str(home)])
    return home


def run(code: str, place: Path, version: int = 0) -> list[str]:
    words = [*rootless_python(), "-c", PROGRAM + code, str(place), str(version)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_landlock
def test_files_below_the_directory_are_served_without_any_privilege(place: Path) -> None:
    out = run(
        """
landlock.restrict(version, ((place, landlock.READ_WRITE),))
print(tried(os.open, "file", os.O_RDWR), tried(os.open, "new", os.O_RDWR | os.O_CREAT), tried(os.listdir, "."))
print(tried(os.rename, "file", "sub/file"), tried(os.link, "sub/file", "linked"), tried(os.truncate, "linked", 1))
print(tried(os.mkdir, "dir"), tried(os.symlink, "/", "link"), tried(os.mkfifo, "fifo"), tried(os.unlink, "fifo"))
fd = os.open("new", os.O_PATH)
print(tried(os.open, f"/proc/self/fd/{fd}", os.O_RDWR))
os.unlink("linked")
made = os.open("sub", os.O_TMPFILE | os.O_RDWR)
print(tried(files.linkat, files.AT_FDCWD, b"/proc/self/fd/%d" % made, place, b"made", files.AT_SYMLINK_FOLLOW))
print(tried(os.open, f"/proc/self/fd/{os.open('new', os.O_PATH)}", os.O_RDWR))
print(tried(files.linkat, files.AT_FDCWD, b"/proc/self/fd/%d" % fd, place, b"again", files.AT_SYMLINK_FOLLOW))
""",
        place,
    )
    assert set(out) == {"done"}, out
    assert len(out) == 14


@needs_landlock
def test_nothing_outside_is_opened_whatever_way_leads_there(place: Path) -> None:
    out = run(
        """
os.symlink("../outside", "link")
held = os.open("../outside", os.O_PATH)
landlock.restrict(version, ((place, landlock.READ_WRITE),))
print(tried(os.open, "../outside", os.O_RDONLY), tried(os.open, "/etc/passwd", os.O_RDONLY))
print(tried(os.open, "outside", os.O_RDONLY, dir_fd=outside), tried(os.open, "link", os.O_RDONLY))
print(tried(os.open, f"/proc/self/fd/{held}", os.O_RDONLY), tried(os.listdir, outside), tried(os.listdir, ".."))
print(tried(os.unlink, "../outside"), tried(os.mkdir, "../dir"), tried(os.truncate, "../outside", 0))
""",
        place,
    )
    assert set(out) <= {"EACCES", "EBADF"} and len(out) == 10
    assert out.count("EBADF") == 1  # listing an O_PATH descriptor
    assert (place / "outside").read_text() == "outside"


@needs_landlock
def test_without_the_rules_every_one_of_those_ways_is_open(place: Path) -> None:
    out = run('print(tried(os.open, "../outside", os.O_RDWR), tried(os.listdir, ".."))', place)
    assert out == ["done", "done"]


@needs_landlock
def test_files_leave_the_directory_neither_by_rename_nor_by_link(place: Path) -> None:
    out = run(
        """
landlock.restrict(version, ((place, landlock.READ_WRITE),))
print(tried(os.rename, "file", "../file"), tried(os.link, "file", "../file"), tried(os.link, "../outside", "taken"))
""",
        place,
    )
    assert set(out) <= {"EACCES", "EXDEV"} and len(out) == 3


@needs_landlock
def test_read_only_rule_takes_no_writing(place: Path) -> None:
    out = run(
        """
landlock.restrict(version, ((place, landlock.READ_ONLY),))
print(tried(os.open, "file", os.O_RDONLY), tried(os.listdir, "sub"))
print(tried(os.open, "file", os.O_WRONLY), tried(os.mkdir, "dir"), tried(os.unlink, "file"))
""",
        place,
    )
    assert out == ["done", "done", "EACCES", "EACCES", "EACCES"]


@needs_landlock
def test_without_a_rule_no_file_can_be_opened_but_open_ones_stay(place: Path) -> None:
    out = run(
        """
image = os.open("file", os.O_RDONLY)
landlock.restrict(version, ())
print(tried(os.open, "file", os.O_RDONLY), tried(os.open, "/", os.O_RDONLY), os.pread(image, 10, 0).decode())
""",
        place,
    )
    assert out == ["EACCES", "EACCES", "in/file"]


@pytest.mark.skipif(landlock.abi() < 4, reason=landlock.missing() or "Landlock here does not know the network")
def test_tcp_is_refused(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        out = run(
            f"""
sockets = [socket.socket() for _ in range(3)]
print(tried(sockets[0].connect, ("127.0.0.1", {port})))
landlock.restrict(version, ())
print(tried(sockets[1].connect, ("127.0.0.1", {port})), tried(sockets[2].bind, ("127.0.0.1", 0)))
for one in sockets: one.close()
""",
            place,
        )
    assert out == ["done", "EACCES", "EACCES"]


@pytest.mark.skipif(landlock.abi() < 6, reason=landlock.missing() or "Landlock here has no scopes")
def test_abstract_sockets_and_processes_outside_are_out_of_reach(place: Path) -> None:
    name = f"\0fusewire-landlock-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen(4)
        out = run(
            f"""
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
first, second = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
print(tried(first.connect, {name!r}), tried(os.kill, child, 0))
landlock.restrict(version, ())
print(tried(second.connect, {name!r}), tried(os.kill, child, 9), tried(os.kill, os.getpid(), 0))
os.close(writer)
os.waitpid(child, 0)
first.close(), second.close()
""",
            place,
        )
    assert out == ["done", "done", "EPERM", "EPERM", "done"]


@needs_landlock
@pytest.mark.parametrize("version", range(1, landlock.abi() + 1))
def test_every_older_version_of_the_rules_can_be_spoken(place: Path, version: int) -> None:
    out = run(
        """
landlock.restrict(version, ((place, landlock.READ_WRITE),))
print(tried(os.open, "file", os.O_RDWR), tried(os.open, "../outside", os.O_RDONLY), tried(os.rename, "file", "sub/f"))
""",
        place,
        version,
    )
    assert out == ["done", "EACCES", "done" if version >= landlock.MOVES_FILES else "EXDEV"]


def test_what_a_version_handles_grows_with_it() -> None:
    assert landlock.handled(1) == (0x1FFF, 0, 0)
    assert landlock.handled(3) == (0x7FFF, 0, 0)
    assert landlock.handled(4) == (0x7FFF, 3, 0)
    assert landlock.handled(5) == (0xFFFF, 3, 0)
    assert landlock.handled(6) == landlock.handled(7) == (0xFFFF, 3, 3)


@needs_landlock
def test_without_no_new_privs_it_is_refused_to_who_has_no_privilege(place: Path) -> None:
    code = (
        "import os, sys; from fusewire.linux import landlock\n"
        "try: landlock.restrict(landlock.abi(), ())\n"
        "except PermissionError as error: print(error.strerror)"
    )
    words = [*rootless_python(fusermount=True), "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if os.geteuid() == 0:
        assert done.stdout == "landlock_restrict_self: Operation not permitted\n", done.stderr
