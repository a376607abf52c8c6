"""The raw system calls over files, against the real kernel; the oracle is `os`, or a second way to the same fact."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from fusewire.linux import files, syscalls
from rootless import rootless_python

pytestmark = pytest.mark.usefixtures("dumpable_again")


ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
EMPTY = files.AT_EMPTY_PATH | files.AT_SYMLINK_NOFOLLOW
PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Place:
    """A directory, what was opened in it, and bytes for its names."""

    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)
        self.opened: list[int] = []
        self.fd = self.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def open(self, name: bytes, flags: int = PATH, mode: int = 0o644) -> int:
        fd = os.open(os.path.join(self.path, name), flags, mode)
        self.opened.append(fd)
        return fd

    def keep(self, fd: int) -> int:
        self.opened.append(fd)
        return fd

    def make(self, name: bytes, content: bytes = b"content") -> bytes:
        with open(os.path.join(self.path, name), "wb") as file:
            file.write(content)
        return os.path.join(self.path, name)

    def __truediv__(self, name: bytes) -> bytes:
        return os.path.join(self.path, name)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    for fd in found.opened:
        os.close(fd)


def in_thread(work: Callable[[], object]) -> object:
    """What `work` returns or raises in a thread of its own, whose ids and groups end with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def skip_for(error: OSError, number: int, reason: str) -> NoReturn:
    if error.errno != number:
        raise error
    pytest.skip(reason)


def unprivileged(code: str) -> str:
    script = (
        "import os, errno\nfrom fusewire.linux import files, syscalls, userns\nos.chdir(os.environ['HOME'])\n" + code
    )
    result = subprocess.run([*rootless_python(), "-c", script], capture_output=True, text=True, cwd="/", timeout=20)
    assert result.returncode == 0, result.stderr
    return result.stdout


def same_as_stat(got: tuple[int, ...], want: os.stat_result) -> None:
    assert got[files.SX_INO] == want.st_ino
    assert got[files.SX_MODE] == want.st_mode
    assert got[files.SX_NLINK] == want.st_nlink
    assert (got[files.SX_UID], got[files.SX_GID]) == (want.st_uid, want.st_gid)
    assert (got[files.SX_SIZE], got[files.SX_BLOCKS]) == (want.st_size, want.st_blocks)
    assert got[files.SX_BLKSIZE] == want.st_blksize
    assert os.makedev(got[files.SX_DEV_MAJOR], got[files.SX_DEV_MINOR]) == want.st_dev
    assert os.makedev(got[files.SX_RDEV_MAJOR], got[files.SX_RDEV_MINOR]) == want.st_rdev
    for seconds, nanoseconds, whole in (
        (files.SX_ATIME, files.SX_ATIME_NS, want.st_atime_ns),
        (files.SX_MTIME, files.SX_MTIME_NS, want.st_mtime_ns),
        (files.SX_CTIME, files.SX_CTIME_NS, want.st_ctime_ns),
    ):
        assert got[seconds] * 10**9 + got[nanoseconds] == whole


def test_statx_agrees_with_stat_for_every_kind_of_file(place: Place) -> None:
    place.make(b"file", b"x" * 5000)
    os.utime(place / b"file", ns=(-1_500_000_000, 2**33 * 10**9 + 7))  # before 1970, after 2038
    os.symlink(b"file", place / b"link")
    os.mkdir(place / b"directory")
    os.mkfifo(place / b"pipe")
    os.chmod(place / b"file", 0o6751)
    for name in (b"file", b"link", b"directory", b"pipe", b"/dev/null", b"/dev/tty", b"/proc/self/exe", b"/"):
        got = files.statx(place.fd, name, files.AT_SYMLINK_NOFOLLOW, files.STATX_BASIC_STATS)
        assert got[files.SX_MASK] & files.STATX_BASIC_STATS == files.STATX_BASIC_STATS
        same_as_stat(got, os.stat(name, dir_fd=place.fd, follow_symlinks=False))
    same_as_stat(files.statx(place.fd, b"link", 0, files.STATX_BASIC_STATS), os.stat(place / b"file"))


def test_statx_takes_an_o_path_descriptor_of_a_symlink(place: Place) -> None:
    os.symlink(b"nowhere", place / b"link")
    fd = place.open(b"link")
    same_as_stat(files.statx(fd, b"", EMPTY, files.STATX_BASIC_STATS), os.stat(fd))


def test_statx_tells_mounts_birth_and_alignment(place: Place) -> None:
    path = place.make(b"file")
    got = files.statx(place.fd, b"file", 0, files.STATX_BASIC_STATS | files.STATX_BTIME | files.STATX_MNT_ID)
    out = subprocess.run(["stat", "--format=%W", path], capture_output=True, check=True).stdout
    if got[files.SX_MASK] & files.STATX_BTIME:
        assert got[files.SX_BTIME] == int(out)
    with open(f"/proc/self/fdinfo/{place.fd}") as info:
        mount = next(int(line.split()[1]) for line in info if line.startswith("mnt_id:"))
    assert got[files.SX_MASK] & files.STATX_MNT_ID
    assert got[files.SX_MNT_ID] == mount
    assert not got[files.SX_ATTRIBUTES] & files.STATX_ATTR_MOUNT_ROOT
    root = files.statx(place.fd, b"/proc", 0, files.STATX_BASIC_STATS)
    assert root[files.SX_ATTRIBUTES_MASK] & root[files.SX_ATTRIBUTES] & files.STATX_ATTR_MOUNT_ROOT
    assert len(got) == files.SX_DIO_OFFSET_ALIGN + 1
    aligned = files.statx(place.fd, b"file", 0, files.STATX_DIOALIGN)
    if aligned[files.SX_MASK] & files.STATX_DIOALIGN and aligned[files.SX_DIO_OFFSET_ALIGN]:
        assert aligned[files.SX_DIO_OFFSET_ALIGN] % 512 == 0


def test_a_failure_names_the_call_and_the_path(place: Place) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        files.statx(place.fd, b"missing \xff", 0, 0)
    assert (
        str(caught.value) == f"[Errno 2] statx: No such file or directory: {os.fsdecode(b'missing ' + bytes([255]))!r}"
    )
    with pytest.raises(OSError, match=r"\[Errno 9\] statx: Bad file descriptor$"):
        files.statx(-1, b"", EMPTY, 0)
    with pytest.raises(FileNotFoundError, match=r"renameat2 old: .*: 'new'"):
        files.renameat2(place.fd, b"old", place.fd, b"new", 0)


def test_many_threads_get_their_own_answers(place: Place) -> None:
    names = [b"%d" % n for n in range(4)]
    for number, name in enumerate(names):
        place.make(name, b"x" * number)
    wrong: list[object] = []

    def look(name: bytes) -> None:
        for _ in range(2000):
            size = files.statx(place.fd, name, 0, files.STATX_BASIC_STATS)[files.SX_SIZE]
            try:
                files.statx(place.fd, b"missing" + name, 0, 0)
            except FileNotFoundError as error:
                if error.filename == os.fsdecode(b"missing" + name) and size == int(name):
                    continue
            wrong.append((name, size))

    threads = [threading.Thread(target=look, args=(name,)) for name in names]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_openat2_keeps_to_its_rules(place: Place) -> None:
    os.mkdir(place / b"below")
    place.make(b"below/file")
    place.make(b"secret")
    os.symlink(b"/secret", place / b"below/absolute")
    os.symlink(b"../secret", place / b"below/up")
    os.symlink(b"file", place / b"below/link")
    below = place.open(b"below")

    def opened(name: bytes, resolve: int) -> bytes:
        fd = place.keep(files.openat2(below, name, os.O_RDONLY | os.O_CLOEXEC, 0, resolve))
        assert not os.get_inheritable(fd)
        return os.read(fd, 100)

    assert opened(b"file", files.RESOLVE_BENEATH) == opened(b"link", files.RESOLVE_BENEATH) == b"content"
    for name in (b"absolute", b"up", b"../secret", b"/etc/passwd"):
        with pytest.raises(OSError) as caught:
            opened(name, files.RESOLVE_BENEATH)
        assert caught.value.errno == errno.EXDEV
        with pytest.raises(FileNotFoundError):
            opened(name, files.RESOLVE_IN_ROOT)
    with pytest.raises(OSError) as caught:
        opened(b"link", files.RESOLVE_NO_SYMLINKS)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError) as caught:
        files.openat2(files.AT_FDCWD, b"/proc/self/exe", os.O_RDONLY, 0, files.RESOLVE_NO_MAGICLINKS)
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError) as caught:
        files.openat2(files.AT_FDCWD, b"/proc/version", os.O_RDONLY, 0, files.RESOLVE_NO_XDEV)
    assert caught.value.errno == errno.EXDEV
    with pytest.raises(OSError) as caught:  # a mode without O_CREAT
        files.openat2(below, b"file", os.O_RDONLY, 0o644, 0)
    assert caught.value.errno == errno.EINVAL


def test_openat2_creates_with_the_mode(place: Place) -> None:
    mask = os.umask(0)
    try:
        place.keep(files.openat2(place.fd, b"new", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o2741, 0))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(place / b"new").st_mode) == 0o2741


def handle_of(place: Place, name: bytes) -> tuple[bytes, int]:
    try:
        return files.name_to_handle(place.fd, name, 0)
    except OSError as error:
        skip_for(error, errno.EOPNOTSUPP, "the filesystem of temporary files has no handles")


def test_a_handle_names_an_inode_and_its_mount(place: Place) -> None:
    place.make(b"file")
    place.make(b"other")
    os.link(place / b"file", place / b"twin")
    handle, mount = handle_of(place, b"file")
    assert len(handle) == 8 + int.from_bytes(handle[:4], sys.byteorder)
    assert files.name_to_handle(place.fd, b"twin", 0) == (handle, mount)
    assert files.name_to_handle(place.open(b"file"), b"", files.AT_EMPTY_PATH) == (handle, mount)
    assert files.name_to_handle(place.fd, b"other", 0)[0] != handle
    assert mount == files.statx(place.fd, b"file", 0, files.STATX_MNT_ID)[files.SX_MNT_ID]
    with pytest.raises(OSError) as caught:
        files.name_to_handle(files.AT_FDCWD, b"/proc/version", 0)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_the_unique_id_of_a_mount_fits(place: Place) -> None:
    place.make(b"file")
    handle, _ = handle_of(place, b"file")
    try:
        got = files.name_to_handle(place.fd, b"file", files.AT_HANDLE_MNT_ID_UNIQUE)
    except OSError as error:
        skip_for(error, errno.EINVAL, "this kernel has no unique ids of mounts in name_to_handle_at (Linux 6.12)")
    unique = files.statx(place.fd, b"file", 0, files.STATX_MNT_ID_UNIQUE)
    assert got == (handle, unique[files.SX_MNT_ID])


@needs_root
def test_a_handle_opens_until_the_file_is_gone(place: Place) -> None:
    path = place.make(b"file", b"found")
    handle, _ = handle_of(place, b"file")
    os.rename(path, place / b"moved")
    assert os.read(place.keep(files.open_by_handle(place.fd, handle, os.O_RDONLY | os.O_CLOEXEC)), 9) == b"found"
    linked = place.keep(files.open_by_handle(place.fd, handle, PATH))
    assert os.stat(linked).st_ino == os.stat(place / b"moved").st_ino
    os.unlink(place / b"moved")
    for fd in place.opened[1:]:
        os.close(fd)
    del place.opened[1:]
    with pytest.raises(OSError, match="open_by_handle_at") as caught:
        files.open_by_handle(place.fd, handle, os.O_RDONLY)
    assert caught.value.errno == errno.ESTALE


def test_handles_are_not_opened_without_privilege() -> None:
    out = unprivileged("""
open("file", "w").close()
directory = os.open(".", os.O_RDONLY)
try: handle, _ = files.name_to_handle(directory, b"file", 0)
except OSError as error: print(error.errno == errno.EOPNOTSUPP and "True")
else:
    try: files.open_by_handle(directory, handle, os.O_RDONLY)
    except PermissionError: print(True)
""")
    assert out == "True\n"


def test_renameat2_exchanges_and_does_not_replace(place: Place) -> None:
    place.make(b"a", b"A")
    place.make(b"b", b"B")
    with pytest.raises(FileExistsError):
        files.renameat2(place.fd, b"a", place.fd, b"b", files.RENAME_NOREPLACE)
    files.renameat2(place.fd, b"a", place.fd, b"b", files.RENAME_EXCHANGE)
    assert Path(os.fsdecode(place / b"a")).read_bytes() == b"B"
    files.renameat2(place.fd, b"a", place.fd, b"b", 0)
    assert os.listdir(place.path) == [b"b"]
    with pytest.raises(OSError) as caught:
        files.renameat2(place.fd, b"b", place.fd, b"c", 1 << 20)
    assert caught.value.errno == errno.EINVAL


def test_utimensat_sets_one_time_and_leaves_the_other(place: Place) -> None:
    path = place.make(b"file")
    os.symlink(b"nowhere", place / b"link")
    os.utime(path, ns=(11_000_000_001, 22_000_000_002))
    omit = (0, files.UTIME_OMIT)
    files.utimensat(place.fd, b"file", (-5, 999_999_999), omit)
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (-4_000_000_001, 22_000_000_002)
    files.utimensat(place.fd, b"file", omit, (2**32 + 9, 8))
    assert (os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns) == (-4_000_000_001, (2**32 + 9) * 10**9 + 8)
    opened = place.open(b"file", os.O_RDWR)
    files.utimensat(opened, None, (1, 2), (0, files.UTIME_NOW))
    now = os.stat(opened)
    assert now.st_atime_ns == 1_000_000_002
    assert now.st_mtime_ns == now.st_ctime_ns
    files.utimensat(place.fd, b"link", (3, 4), (5, 6), files.AT_SYMLINK_NOFOLLOW)
    assert os.lstat(place / b"link").st_mtime_ns == 5_000_000_006
    with pytest.raises(OSError) as caught:
        files.utimensat(place.fd, b"file", (0, 10**9), omit)
    assert caught.value.errno == errno.EINVAL


def test_times_mode_and_owner_are_set_by_o_path_descriptors(place: Place) -> None:
    os.symlink(b"nowhere", place / b"link")
    place.make(b"file")
    link, file = place.open(b"link"), place.open(b"file")
    files.utimensat(link, b"", (7, 8), (9, 10), files.AT_EMPTY_PATH)
    assert os.lstat(place / b"link").st_mtime_ns == 9_000_000_010
    with pytest.raises(OSError) as caught:  # the reason why there is fchownat_empty
        os.chown(file, os.getuid(), os.getgid())
    assert caught.value.errno == errno.EBADF
    files.fchownat_empty(link, files.NO_ID, os.getgid())
    try:
        files.fchmodat2(file, b"", 0o1640, files.AT_EMPTY_PATH)
        files.fchmodat2(place.fd, b"link", 0o600, 0)
    except FileNotFoundError:
        pass  # the link leads nowhere
    except OSError as error:
        skip_for(error, errno.ENOSYS, "this kernel has no fchmodat2 (Linux 6.6)")
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o1640
    with pytest.raises(OSError) as caught:
        files.fchmodat2(place.fd, b"link", 0o600, files.AT_SYMLINK_NOFOLLOW)
    assert caught.value.errno == errno.EOPNOTSUPP


@needs_root
def test_chown_by_descriptor_takes_every_id(place: Place) -> None:
    os.symlink(b"nowhere", place / b"link")
    link = place.open(b"link")
    files.fchownat_empty(link, 0xFFFFFFFE, 70_000)
    assert (os.stat(link).st_uid, os.stat(link).st_gid) == (0xFFFFFFFE, 70_000)
    files.fchownat(place.fd, b"link", files.NO_ID, 5, files.AT_SYMLINK_NOFOLLOW)
    assert (os.stat(link).st_uid, os.stat(link).st_gid) == (0xFFFFFFFE, 5)


def test_linkat_names_a_file_that_had_no_name(place: Place) -> None:
    try:
        file = place.open(b"", os.O_TMPFILE | os.O_RDWR)
    except OSError as error:
        skip_for(error, errno.EOPNOTSUPP, "the filesystem of temporary files has no O_TMPFILE")
    os.write(file, b"text")
    files.linkat(files.AT_FDCWD, b"/proc/self/fd/%d" % file, place.fd, b"name", files.AT_SYMLINK_FOLLOW)
    assert Path(os.fsdecode(place / b"name")).read_bytes() == b"text"
    with pytest.raises(FileExistsError, match="linkat"):
        files.linkat(place.fd, b"name", place.fd, b"name", 0)
    if ROOT:
        files.linkat(place.open(b"name"), b"", place.fd, b"second", files.AT_EMPTY_PATH)
        assert os.stat(file).st_nlink == 2


def test_fallocate_makes_and_punches(place: Place) -> None:
    place.make(b"file", b"x" * 12288)
    file = place.open(b"file", os.O_RDWR)
    files.fallocate(file, files.FALLOC_FL_KEEP_SIZE, 12288, 65536)
    assert os.stat(file).st_size == 12288
    files.fallocate(file, 0, 0, 20000)
    assert os.stat(file).st_size == 20000
    files.fallocate(file, files.FALLOC_FL_PUNCH_HOLE | files.FALLOC_FL_KEEP_SIZE, 4096, 4096)
    assert os.pread(file, 12288, 0) == b"x" * 4096 + bytes(4096) + b"x" * 4096
    for offset, length in ((0, 0), (2**64 - 1, 1)):
        with pytest.raises(OSError, match="fallocate") as caught:
            files.fallocate(file, 0, offset, length)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:  # an offset beyond 32 bits arrives as such
        files.fallocate(file, 0, 1 << 62, 1 << 62)
    assert caught.value.errno == errno.EFBIG


def test_syncfs_wants_an_open_file(place: Place) -> None:
    files.syncfs(place.fd)
    place.make(b"file")
    with pytest.raises(OSError, match="syncfs") as caught:
        files.syncfs(place.open(b"file"))
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("size", [300, 4096, 65536])
def test_directory_entries_are_those_of_listdir(place: Place, size: int) -> None:
    names = [b"%d" % n + b"\xfe" * (n % 200) for n in range(500)]
    for name in names:
        place.make(name, b"")
    os.mkdir(place / b"directory")
    os.symlink(b"x", place / b"link")
    os.mkfifo(place / b"pipe")
    buffer = bytearray(b"\xaa" * size)
    entries = []
    while got := files.getdents64(place.fd, buffer):
        entries += files.parse_dents(buffer, got)
    found = {entry[0]: entry for entry in entries}
    assert len(found) == len(entries)
    assert sorted(found) == sorted([b".", b"..", *os.listdir(place.path)])
    for name, inode, _, kind in entries[:50] + [found[n] for n in (b"directory", b"link", b"pipe", b".")]:
        here = os.lstat(place / name)
        assert (inode, kind) == (here.st_ino, here.st_mode >> 12) or name == b".."
    # Every d_off leads to the entry that follows.
    for place_of, entry in ((index, entries[index]) for index in range(0, len(entries) - 1, 37)):
        os.lseek(place.fd, entry[2], os.SEEK_SET)
        got = files.getdents64(place.fd, buffer)
        assert files.parse_dents(buffer, got)[0] == entries[place_of + 1]
    buffer.append(0)  # nothing holds on to it


def test_getdents64_says_when_the_buffer_is_too_small_or_the_directory_gone(place: Place) -> None:
    with pytest.raises(OSError) as caught:
        files.getdents64(place.fd, bytearray(10))
    assert caught.value.errno == errno.EINVAL
    os.mkdir(place / b"gone")
    gone = place.open(b"gone", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(place / b"gone")
    with pytest.raises(FileNotFoundError, match="getdents64"):
        files.getdents64(gone, bytearray(4096))
    assert files.parse_dents(b"", 0) == []


@needs_root
def test_ids_and_groups_change_in_one_thread_only(place: Place) -> None:
    os.chmod(place.path, 0o777)

    def switched() -> tuple[int, ...]:
        before = os.getgroups()
        assert files.setfsgid(40_001) == 0
        files.setgroups([9, 8, 70_000])
        assert files.setfsuid(0xFFFFFFFE) == 0
        assert files.setfsuid(files.NO_ID) == 0xFFFFFFFE
        assert files.setfsgid(files.NO_ID) == 40_001
        assert sorted(os.getgroups()) == [8, 9, 70_000]
        os.close(os.open(b"mine", os.O_CREAT | os.O_EXCL, dir_fd=place.fd))  # others may not enter the path
        assert in_main.wait(10)
        files.setfsuid(0)
        files.setgroups(before)
        found = os.stat(place / b"mine")
        return found.st_uid, found.st_gid

    in_main = threading.Event()
    groups = os.getgroups()
    outcome: list[object] = []
    thread = threading.Thread(target=lambda: outcome.append(switched()))
    thread.start()
    while not os.path.exists(place / b"mine") and thread.is_alive():
        thread.join(0.01)
    place.make(b"others")
    assert os.getgroups() == groups
    in_main.set()
    thread.join()
    assert outcome == [(0xFFFFFFFE, 40_001)]
    assert os.stat(place / b"others").st_uid == 0


@needs_root
def test_leaving_user_0_takes_the_powers_over_files_away(place: Place) -> None:
    def tried() -> tuple[bool, bool, bool]:
        over_files = 1 << syscalls.CAP_DAC_OVERRIDE
        before = bool(files.effective_capabilities() & over_files)
        files.setfsuid(1)
        within = bool(files.effective_capabilities() & over_files)
        with pytest.raises(PermissionError):
            os.stat(place / b"closed/file")
        files.setfsuid(0)
        return before, within, bool(files.effective_capabilities() & over_files)

    os.mkdir(place / b"closed", 0o700)
    place.make(b"closed/file")
    assert in_thread(tried) == (True, False, True)


@needs_root
def test_capabilities_are_dropped_and_regained_in_one_thread_only(place: Place) -> None:
    everything = files.effective_capabilities()
    assert everything == syscalls.capget().effective
    fsetid = 1 << syscalls.CAP_FSETID

    def dropped() -> int:
        assert files.set_effective_capabilities(everything & ~fsetid) == everything
        assert files.effective_capabilities() == everything & ~fsetid
        with open("/proc/self/status") as main:  # the first thread's
            assert f"{everything:016x}" in main.read()
        os.chmod(file, 0o6755)
        os.write(file, b"x")  # takes the bits as for a user who is not privileged
        mode = os.stat(file).st_mode
        assert files.set_effective_capabilities(everything) == everything & ~fsetid
        return mode & 0o6000

    place.make(b"file")
    file = place.open(b"file", os.O_RDWR)
    assert in_thread(dropped) == 0
    os.chmod(file, 0o6755)
    os.write(file, b"x")
    assert os.stat(file).st_mode & 0o6000 == 0o6000


def test_what_needs_privilege_is_refused_without_it() -> None:
    out = unprivileged("""
print(files.effective_capabilities(), files.setfsuid(0) == os.getuid(), files.setfsuid(files.NO_ID) == os.getuid())
for call in (lambda: files.setgroups([1]), lambda: files.set_effective_capabilities(1)):
    try: call()
    except PermissionError as error: print(error)
open("file", "w").close()
fd = os.open("file", os.O_PATH)
try: files.fchownat_empty(fd, 12345, files.NO_ID)
except PermissionError as error: print(error)
files.fchownat_empty(fd, os.getuid(), os.getgid())
""")
    assert out == (
        "0 True True\n[Errno 1] setgroups: Operation not permitted\n"
        "[Errno 1] capset: Operation not permitted\n[Errno 1] fchownat: Operation not permitted\n"
    )


def test_the_first_user_of_a_namespace_has_capabilities_and_one_id() -> None:
    out = unprivileged("""
userns.enter(userns.root_plan())
print(bool(files.effective_capabilities() >> syscalls.CAP_SETUID & 1), files.setfsuid(5), files.setfsuid(files.NO_ID))
""")
    assert out == "True 0 0\n"


def test_a_thread_gets_a_working_directory_and_umask_of_its_own(place: Place) -> None:
    here = os.getcwd()

    def moved() -> str:
        files.unshare_fs()
        os.fchdir(place.fd)
        os.umask(0o777)
        return os.getcwd()

    mask = os.umask(0o022)
    try:
        assert in_thread(moved) == os.fsdecode(os.path.realpath(place.path))
        assert os.getcwd() == here
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)


def test_locks_belong_to_the_open_file(place: Place) -> None:
    place.make(b"file")
    one, two = place.open(b"file", os.O_RDWR), place.open(b"file", os.O_RDWR)
    files.ofd_setlk(one, fcntl.F_WRLCK, 10, 19)
    files.ofd_setlk(one, fcntl.F_WRLCK, 12, 13)  # its own is not in the way
    with pytest.raises(BlockingIOError, match="F_OFD_SETLK"):
        files.ofd_setlk(two, fcntl.F_RDLCK, 0, files.OFFSET_MAX)
    files.ofd_setlk(two, fcntl.F_WRLCK, 20, files.OFFSET_MAX)
    assert files.ofd_getlk(two, fcntl.F_RDLCK, 0, 2**64 - 1) == (fcntl.F_WRLCK, 10, 19, -1)
    assert files.ofd_getlk(one, fcntl.F_RDLCK, 15, 30) == (fcntl.F_WRLCK, 20, files.OFFSET_MAX, -1)
    assert files.ofd_getlk(two, fcntl.F_WRLCK, 0, 9)[0] == fcntl.F_UNLCK
    files.ofd_setlk(one, fcntl.F_UNLCK, 0, files.OFFSET_MAX)
    files.ofd_setlk(two, fcntl.F_RDLCK, 10, 10)
    files.ofd_setlk(one, fcntl.F_RDLCK, 10, 10)
    files.ofd_setlk(two, fcntl.F_RDLCK, files.OFFSET_MAX, files.OFFSET_MAX)


@pytest.mark.parametrize(("start", "end"), [(5, 4), (-1, 4), (2**63, 2**64 - 1), (2**64 - 1, 2**64 - 1)])
def test_a_range_that_is_none_cannot_be_locked(place: Place, start: int, end: int) -> None:
    place.make(b"file")
    file = place.open(b"file", os.O_RDWR)
    for call in (files.ofd_setlk, files.ofd_getlk):
        with pytest.raises(OSError, match="F_OFD_") as caught:
            call(file, fcntl.F_RDLCK, start, end)
        assert caught.value.errno == errno.EINVAL


def test_a_process_in_the_way_is_named(place: Place) -> None:
    path = place.make(b"file")
    script = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.lockf(f,fcntl.LOCK_EX,5,2); print(flush=True); input()"
    words = [sys.executable, "-c", script, os.fsdecode(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        got = files.ofd_getlk(place.open(b"file", os.O_RDWR), fcntl.F_RDLCK, 0, files.OFFSET_MAX)
        holder.communicate(b"\n")
    assert got == (fcntl.F_WRLCK, 2, 6, holder.pid)


def test_inotify_tells_what_happened_in_a_directory(place: Place) -> None:
    fd = place.keep(files.inotify_init())
    path = b"/proc/self/fd/%d" % place.fd
    interest = files.IN_CREATE | files.IN_DELETE | files.IN_MOVED_FROM | files.IN_MOVED_TO | files.IN_ONLYDIR
    watch = files.inotify_add_watch(fd, path, interest)
    assert files.inotify_add_watch(fd, place.path, interest | files.IN_MASK_ADD) == watch
    with pytest.raises(BlockingIOError):
        os.read(fd, 4096)
    place.make(b"file")
    os.rename(place / b"file", place / (b"n" * 255))
    os.mkdir(place / b"directory")
    os.unlink(place / (b"n" * 255))
    assert select.select([fd], [], [], 5)[0] == [fd]
    events = files.parse_inotify(os.read(fd, 4096))
    cookie = events[1][2]
    assert cookie != 0
    assert events == [
        (watch, files.IN_CREATE, 0, b"file"),
        (watch, files.IN_MOVED_FROM, cookie, b"file"),
        (watch, files.IN_MOVED_TO, cookie, b"n" * 255),
        (watch, files.IN_CREATE | files.IN_ISDIR, 0, b"directory"),
        (watch, files.IN_DELETE, 0, b"n" * 255),
    ]
    files.inotify_rm_watch(fd, watch)
    assert files.parse_inotify(os.read(fd, 4096)) == [(watch, files.IN_IGNORED, 0, b"")]
    with pytest.raises(OSError, match="inotify_rm_watch"):
        files.inotify_rm_watch(fd, watch)
    with pytest.raises(FileNotFoundError, match=r"inotify_add_watch.*'/nowhere'"):
        files.inotify_add_watch(fd, b"/nowhere", files.IN_MODIFY)
    once = files.inotify_add_watch(fd, place.path, files.IN_CREATE | files.IN_ONESHOT)  # bit 31
    place.make(b"again")
    assert [event[:2] for event in files.parse_inotify(os.read(fd, 4096))] == [
        (once, files.IN_CREATE),
        (once, files.IN_IGNORED),
    ]


HEADERS = "#include <fcntl.h>\n#include <linux/falloc.h>\n#include <linux/stat.h>\n#include <linux/openat2.h>\n"
HEADERS += "#include <linux/fs.h>\n#include <linux/inotify.h>\n#include <linux/sched.h>\n"


def test_constants_are_those_of_the_kernels_headers(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler and the kernel's headers")
    families = ("STATX_", "RESOLVE_", "RENAME_", "FALLOC_FL_", "IN_", "AT_", "CLONE_FS")
    names = [name for name in vars(files) if name.startswith(families)]
    source = HEADERS + "".join(f"#ifdef {name}\nfusewire {name} {name}\n#endif\n" for name in names)
    # A name that the preprocessor would replace is kept by the paste of the second line.
    source = re.sub(r"fusewire (\w+) \1", r'fusewire "\1" \1', source)
    out = subprocess.run(
        ["cc", "-D_GNU_SOURCE", "-E", "-P", "-xc", "-"], input=source, capture_output=True, text=True, check=True
    )
    seen = 0
    for name, text in re.findall(r'fusewire "(\w+)" (.*)', out.stdout):
        number = re.sub(r"(?<=[0-9a-fA-F])[uUlL]+\b", "", text)
        if re.fullmatch(r"[\s()|<0-9a-fA-Fx-]+", number):
            assert eval(number) == getattr(files, name), name
            seen += 1
    assert seen > 40


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"),
        ("i386", "x86_64-linux-gnu/asm/unistd_32.h"),
        ("aarch64", "asm-generic/unistd.h"),
    ],
)
def test_call_numbers_are_those_of_the_kernels_headers(machine: str, header: str) -> None:
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is missing")
    numbers = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", path.read_text()))
    names = ["statx", "renameat2", "getdents64", "utimensat", "setfsuid", "setfsgid", "setgroups"]
    if machine == "i386":
        names[3:] = ["utimensat_time64", "setfsuid32", "setfsgid32", "setgroups32"]
    assert files._OLD_NUMBERS[machine] == tuple(int(numbers[name]) for name in names)


def test_an_unknown_machine_is_answered_enosys() -> None:
    code = """
import os
real = os.uname()
os.uname = lambda: os.uname_result((*real[:4], "mips64"))
from fusewire.linux import files
for call in (lambda: files.setfsuid(0), lambda: files.setgroups([]), lambda: files.openat2(-100, b"/", 0, 0, 0)):
    try: call()
    except OSError as error: print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True).stdout
    assert out.splitlines() == [
        "[Errno 38] setfsuid: Function not implemented",
        "[Errno 38] setgroups: Function not implemented",
        "[Errno 38] openat2: Function not implemented: '/'",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="has capabilities to give up only as root")
def test_prepared_capabilities_are_set_for_the_calling_thread_alone() -> None:
    before = files.effective_capabilities()
    lower, again = files.capability_setter(before & ~(1 << syscalls.CAP_FSETID)), files.capability_setter(before)
    seen = []

    def work() -> None:
        lower()
        seen.append(files.effective_capabilities())
        again()
        seen.append(files.effective_capabilities())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before & ~(1 << syscalls.CAP_FSETID), before]
    assert files.effective_capabilities() == before
