"""Behaviours of attributes: modes, owners, times, statistics, access(2), and which operation moves which time.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

from fusewire.testing import calls
from fusewire.testing.calls import UTIME_NOW, UTIME_OMIT
from fusewire.testing.observe import Clock, collect, facts, in_child, needs, opened, outcome, put

_SECOND = 10**9
_OLD = 10**18  # nanoseconds: 2001


def _mode(path: str | int) -> str:
    return oct(stat.S_IMODE(os.stat(path).st_mode))


# Modes


def chmod_sets_every_bit(root: str) -> Any:
    path = put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    found = []
    for mode in (0o000, 0o777, 0o644, 0o755, 0o4755, 0o2755, 0o1644, 0o7777, 0o6000, 0o421, 0o600):
        for place in (path, f"{root}/directory"):
            os.chmod(place, mode)
            found.append(facts(place))
    os.chmod(f"{root}/directory", 0o700)
    return found


def fchmod_does_the_same(root: str) -> Any:
    path = put(f"{root}/file")
    found = []
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with opened(path, flags) as fd:
            for mode in (0o4711, 0o644):
                os.fchmod(fd, mode)
                found.append((_mode(fd), _mode(path)))
    with opened(root) as fd:
        os.fchmod(fd, 0o711)
        found.append((_mode(fd), _mode(root)))
        os.fchmod(fd, 0o755)
    return found


def chmod_follows_symlinks_and_needs_a_file(root: str) -> Any:
    put(f"{root}/file")
    os.symlink("file", f"{root}/link")
    os.symlink("missing", f"{root}/dangling")
    found = [outcome(os.chmod, f"{root}/{name}", 0o640) for name in ("link", "dangling", "missing", "file/x")]
    return found, facts(f"{root}/file"), facts(f"{root}/link")


@needs("user_switch")
def chmod_is_for_the_owner(root: str) -> Any:
    path = put(f"{root}/file")
    os.chmod(path, 0o666)
    os.chown(path, 1001, 1001)
    found = [in_child(os.chmod, path, mode, ids=(1002, 1001, [])) for mode in (0o666, 0o777)]
    return found, in_child(os.chmod, path, 0o640, ids=(1001, 5, [])), _mode(path)


@needs("user_switch")
def setgid_is_for_members_of_the_group(root: str) -> Any:
    found = []
    for groups in ([], [2002]):
        for kind in ("file", "directory"):
            path = f"{root}/{kind}-{len(groups)}"
            put(path) if kind == "file" else os.mkdir(path)
            os.chown(path, 1001, 2002)
            found.append((in_child(os.chmod, path, 0o2755, ids=(1001, 1001, groups)), _mode(path)))
    return found


# Owners


@needs("root")
def chown_sets_owner_and_group(root: str) -> Any:
    path = put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("file", f"{root}/link")
    found = []
    for uid, gid in ((1001, 2002), (-1, 3003), (4004, -1), (-1, -1), (0, 0), (65534, 4294967294)):
        os.chown(path, uid, gid)
        os.chown(f"{root}/directory", uid, gid)
        os.chown(f"{root}/link", uid, gid, follow_symlinks=False)
        found.append([facts(f"{root}/{name}") for name in ("file", "directory", "link")])
    with opened(path) as fd:
        os.fchown(fd, 7, 8)
    os.chown(f"{root}/link", 9, -1)
    return found, facts(path), facts(f"{root}/link")


@needs("root")
def chown_clears_set_user_id(root: str) -> Any:
    path = put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    found = []
    for mode in (0o6755, 0o4711, 0o2755, 0o2744, 0o6644, 0o1755):
        for place in (path, f"{root}/directory"):
            os.chown(place, 0, 0)
            os.chmod(place, mode)
            os.chown(place, 1001, -1)
            found.append(_mode(place))
            os.chmod(place, mode)
            os.chown(place, -1, 2002)
            found.append(_mode(place))
    return found


@needs("user_switch")
def owner_may_give_a_file_to_a_group_of_his(root: str) -> Any:
    path = put(f"{root}/file")
    os.chown(path, 1001, 1001)
    os.chmod(path, 0o6777)
    steps: tuple[tuple[int, int, int, list[int]], ...] = (
        (1001, 1001, 2002, []),
        (1001, -1, 2002, [2002]),
        (1001, -1, 1001, []),
        (1001, 1002, -1, []),
        (1002, -1, 1002, []),
        (1002, 1002, -1, []),
        (1001, 1001, 1001, []),
        (1001, -1, -1, []),
    )
    found = []
    for uid, owner, group, groups in steps:
        found.append((in_child(os.chown, path, owner, group, ids=(uid, uid, groups)), facts(path)))
    return found


@needs("user_switch")
def writing_clears_set_user_id(root: str) -> Any:
    path = put(f"{root}/file", b"content")

    def write() -> None:
        with opened(path, os.O_WRONLY) as fd:
            os.write(fd, b"x")

    def truncate() -> None:
        os.truncate(path, 3)

    def ftruncate() -> None:
        with opened(path, os.O_WRONLY) as fd:
            os.ftruncate(fd, 2)

    def trunc() -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

    found = {}
    for operation in (write, truncate, ftruncate, trunc):
        for mode in (0o6777, 0o4766, 0o2777):
            for uid in (1001, 1002, 0):
                put(path, b"content")
                os.chown(path, 1001, 1001)
                os.chmod(path, mode)
                done = in_child(operation, ids=(uid, uid, []))
                found[f"{operation.__name__} {mode:o} {uid}"] = done, _mode(path)
    return found


# Times


def times_are_kept_to_the_nanosecond(root: str) -> Any:
    path = put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    found = []
    moments = ((0, 1), (1, 999_999_999), (1_600_000_000, 123_456_789), (1, 0), (-1, 5), (-100_000, 999_999_999))
    for seconds, nano in (*moments, (1 << 31, 7), ((1 << 32) + 12345, 999), (-(1 << 31), 0), (1 << 33, 1)):
        for place in (path, f"{root}/directory"):
            calls.utimens(place, (seconds, nano), (seconds // 2, nano // 2))
            status = os.stat(place)
            found.append((status.st_atime_ns, status.st_mtime_ns))
    return found


def times_survive_without_the_cache(root: str) -> Any:
    path = put(f"{root}/file")
    calls.utimens(path, (-5, 123_456_789), (1 << 32, 987_654_321))
    os.rename(path, f"{root}/renamed")
    os.link(f"{root}/renamed", f"{root}/hard")
    status = calls.statx(f"{root}/hard")
    return status.atime_ns, status.mtime_ns


def utimensat_knows_now_and_omit(root: str) -> Any:
    path = put(f"{root}/file")
    clock = Clock(root)
    found = []
    for atime, mtime in ((0, UTIME_NOW), (0, UTIME_OMIT), (UTIME_NOW, 0), (UTIME_OMIT, 0), (UTIME_NOW, UTIME_NOW)):
        os.utime(path, ns=(_OLD, _OLD))
        clock.tick()
        before = os.stat(path)
        calls.utimens(path, (77, atime), (88, mtime))
        after = os.stat(path)
        found.append(
            [
                "omitted" if value == _OLD else "now" if value > before.st_ctime_ns else value
                for value in (after.st_atime_ns, after.st_mtime_ns)
            ]
            + [after.st_ctime_ns > before.st_ctime_ns]
        )
    return found


def utimensat_that_omits_both_does_nothing(root: str) -> Any:
    path = put(f"{root}/file")
    clock = Clock(root)
    omit = (0, UTIME_OMIT)
    return (
        clock.moved(path, lambda: calls.utimens(path, omit, omit)),
        outcome(calls.utimens, path, (0, -1), omit),
        outcome(calls.utimens, path, (0, 10**9), omit),
        outcome(calls.utimens, f"{root}/missing", (0, 0), (0, 0)),
    )


def utime_without_times_is_now(root: str) -> Any:
    path = put(f"{root}/file")
    os.utime(path, ns=(_OLD, _OLD))
    clock = Clock(root)
    found = clock.moved(path, lambda: os.utime(path))
    with opened(path, os.O_RDWR) as fd:
        return found, clock.moved(path, lambda: os.utime(fd))


@needs("user_switch")
def strangers_may_only_touch(root: str) -> Any:
    path = put(f"{root}/file")
    now, omit, fixed = (0, UTIME_NOW), (0, UTIME_OMIT), (5, 5)
    found = []
    for mode in (0o666, 0o644):
        os.chown(path, 1001, 1001)
        os.chmod(path, mode)
        for times in ((now, now), (fixed, fixed), (now, omit), (omit, now), (fixed, omit), (omit, omit)):
            found.append(in_child(calls.utimens, path, *times, ids=(1002, 1002, [])))
    return found


def operations_move_the_times_that_they_should(root: str) -> Any:
    clock = Clock(root)
    path = put(f"{root}/file", b"content")
    fd = os.open(path, os.O_RDWR)
    # An access time after the others, so that reads need not move it: relatime, mount(2).
    later = os.stat(path).st_mtime_ns + 3600 * _SECOND

    def there_and_back() -> None:
        os.rename(path, f"{root}/renamed")
        os.rename(f"{root}/renamed", path)

    operations: dict[str, Callable[[], Any]] = {
        "write": lambda: os.pwrite(fd, b"x", 0),
        "append": lambda: os.pwrite(fd, b"more", 100),
        "truncate down": lambda: os.truncate(path, 50),
        "truncate up": lambda: os.truncate(path, 60),
        "ftruncate": lambda: os.ftruncate(fd, 10),
        "open with O_TRUNC": lambda: put(path, b""),
        "punch": lambda: calls.fallocate(fd, 3, 0, 5),
        "chmod": lambda: os.chmod(path, 0o600),
        "chmod to the same": lambda: os.chmod(path, 0o600),
        "chown to the same": lambda: os.chown(path, os.getuid(), os.getgid()),
        "link": lambda: os.link(path, f"{root}/hard"),
        "unlink of another name": lambda: os.unlink(f"{root}/hard"),
        "rename": there_and_back,
        "utime": lambda: os.utime(path, ns=(later, _OLD)),
        "stat": lambda: os.stat(path),
        "open and close": lambda: os.close(os.open(path, os.O_RDWR)),
        "access": lambda: os.access(path, os.R_OK),
        "fsync": lambda: os.fsync(fd),
        "seek": lambda: os.lseek(fd, 0, os.SEEK_END),
        "open refused": lambda: outcome(os.open, path, os.O_CREAT | os.O_EXCL),
    }
    found = {}
    try:
        for name, operation in operations.items():
            os.utime(path, ns=(later, _OLD))
            clock.tick()
            found[name] = clock.moved(path, operation)
        os.utime(path, ns=(later, _OLD))
        found["unlink"] = clock.moved(fd, lambda: os.unlink(path))
    finally:
        os.close(fd)
    return found


def reading_moves_an_old_access_time_only(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    found = []
    for atime, mtime in ((_OLD, _OLD), (_OLD, _OLD + _SECOND)):
        os.utime(path, ns=(atime, mtime))
        with open(path, "rb") as file:
            file.read()
        status = os.stat(path)
        found.append((status.st_atime_ns > atime, status.st_mtime_ns == mtime))
    recent = os.stat(path).st_ctime_ns + 3600 * _SECOND
    os.utime(path, ns=(recent, _OLD))
    with open(path, "rb") as file:
        file.read()
    return found, os.stat(path).st_atime_ns == recent


def reading_a_symlink_moves_an_old_access_time(root: str) -> Any:
    os.symlink("target", f"{root}/link")
    os.utime(f"{root}/link", ns=(_OLD, _OLD), follow_symlinks=False)
    os.readlink(f"{root}/link")
    status = os.lstat(f"{root}/link")
    return status.st_atime_ns > _OLD, status.st_mtime_ns == _OLD


def new_files_have_the_time_of_now(root: str) -> Any:
    clock = Clock(root)
    found: list[Any] = []
    makers: tuple[Callable[[str], Any], ...] = (
        put,
        os.mkdir,
        lambda path: os.symlink("x", path),
        os.mkfifo,
        lambda path: os.mknod(path, stat.S_IFREG | 0o600),
    )
    for make in makers:
        before = os.stat(clock.path).st_ctime_ns
        clock.tick()
        make(f"{root}/{len(found)}")
        status = os.lstat(f"{root}/{len(found)}")
        times = {status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns}
        clock.tick()
        found.append((len(times) == 1, min(times) > before, max(times) < os.stat(clock.path).st_ctime_ns))
    return found


def time_of_birth_stays(root: str) -> Any:
    path = put(f"{root}/file")
    clock = Clock(root)
    born = calls.statx(path)
    clock.tick()
    put(path, b"changed")
    os.utime(path, ns=(_OLD, _OLD))
    os.rename(path, f"{root}/renamed")
    after = calls.statx(f"{root}/renamed")
    with_time = bool(born.mask & calls.STATX_BTIME)
    return with_time, born.btime_ns == after.btime_ns, born.btime_ns == born.ctime_ns, after.ctime_ns > after.btime_ns


# Telling


def statx_agrees_with_stat(root: str) -> Any:
    put(f"{root}/file", b"content")
    os.mkdir(f"{root}/directory")
    os.symlink("file", f"{root}/link")
    os.mkfifo(f"{root}/fifo")
    found = []
    for name in ("file", "directory", "link", "fifo"):
        new, old = calls.statx(f"{root}/{name}", follow=False), os.lstat(f"{root}/{name}")
        found.append(
            (new.nlink, new.uid, new.gid, new.mode, new.ino, new.size, new.atime_ns, new.mtime_ns, new.ctime_ns)
            == (old.st_nlink, old.st_uid, old.st_gid, old.st_mode, old.st_ino, old.st_size)
            + (old.st_atime_ns, old.st_mtime_ns, old.st_ctime_ns)
        )
    return found, outcome(calls.statx, f"{root}/missing")


def statistics_make_sense(root: str) -> Any:
    put(f"{root}/file", b"x" * 100_000)
    found = []
    with opened(f"{root}/file") as fd:
        for status in (os.statvfs(root), os.statvfs(f"{root}/file"), os.fstatvfs(fd)):
            found.append(
                (
                    status.f_namemax,
                    status.f_bsize > 0 and status.f_frsize > 0,
                    status.f_blocks >= status.f_bfree >= status.f_bavail > 0,
                    status.f_files >= status.f_ffree > 0,
                )
            )
    return found, outcome(os.statvfs, f"{root}/missing")


def everything_lies_on_one_device(root: str) -> Any:
    put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("x", f"{root}/link")
    device = os.stat(root).st_dev
    inodes = {os.lstat(f"{root}/{name}").st_ino for name in (".", "file", "directory", "link")}
    status = os.stat(f"{root}/file")
    return [os.lstat(f"{root}/{name}").st_dev == device for name in ("file", "directory", "link")] + [
        len(inodes),
        status.st_blksize >= 512,
        status.st_rdev,
    ]


def inode_number_lasts_as_long_as_the_file(root: str) -> Any:
    path = put(f"{root}/file")
    number = os.stat(path).st_ino
    os.mkdir(f"{root}/directory")
    found = []
    operations: tuple[Callable[[], Any], ...] = (
        lambda: put(path, b"content"),
        lambda: os.chmod(path, 0o600),
        lambda: os.link(path, f"{root}/hard"),
        lambda: os.unlink(path),
        lambda: os.rename(f"{root}/hard", path),
        lambda: os.rename(path, f"{root}/directory/x"),
        lambda: os.link(f"{root}/directory/x", path),
    )
    for operation in operations:
        operation()
        known = [f"{root}/{name}" for name in ("file", "hard", "directory/x") if os.path.exists(f"{root}/{name}")]
        found.append([os.stat(name).st_ino == number for name in known])
    return found


def blocks_tell_that_there_is_data(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 100_000)
    with opened(path) as fd:
        os.fsync(fd)
        return 100_000 <= os.fstat(fd).st_blocks * 512 < 400_000, os.stat(put(f"{root}/empty")).st_blocks


def access_says_what_the_mode_says(root: str) -> Any:
    found = []
    for mode in (0o000, 0o400, 0o200, 0o100, 0o755, 0o055):
        path = put(f"{root}/{mode:o}")
        os.chmod(path, mode)
        found.append([os.access(path, wanted) for wanted in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK)])
        found.append([os.access(path, wanted, effective_ids=True) for wanted in (os.R_OK, os.X_OK)])
    os.symlink("missing", f"{root}/dangling")
    return found, [os.access(f"{root}/{name}", os.F_OK) for name in ("missing", "dangling", ".", "0/x")]


@needs("user_switch")
def access_asks_for_groups_too(root: str) -> Any:
    path = put(f"{root}/file")
    os.chown(path, 1001, 1002)
    os.chmod(path, 0o751)

    def look() -> list[bool]:
        return [os.access(path, wanted) for wanted in (os.R_OK, os.W_OK, os.X_OK)]

    return [in_child(look, ids=ids) for ids in ((1001, 1, []), (1, 1002, []), (1, 1, [5, 1002]), (1, 1, []))]


BEHAVIOURS = collect(globals())
