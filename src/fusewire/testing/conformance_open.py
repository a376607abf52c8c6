"""Behaviours of opening and creating files: open(2) and what its flags mean.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import Any

from fusewire.testing import calls
from fusewire.testing.observe import collect, facts, get, in_child, names, needs, opened, opening, outcome, put

_RW = os.O_RDWR
_NEW = os.O_WRONLY | os.O_CREAT


def open_of_a_missing_file_is_enoent(root: str) -> Any:
    flags = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH, os.O_TRUNC | os.O_WRONLY, os.O_DIRECTORY, os.O_EXCL)
    return [opening(f"{root}/missing", flag) for flag in flags], names(root)


def created_file_is_empty_and_has_its_mode_less_the_umask(root: str) -> Any:
    found = []
    for umask in (0, 0o022, 0o077, 0o777):
        before = os.umask(umask)
        try:
            for mode in (0o666, 0o777, 0o644, 0o000, 0o4755, 0o1777):
                path = f"{root}/{umask:o}-{mode:o}"
                found += [opening(path, _NEW, mode), facts(path)]
        finally:
            os.umask(before)
    return found


def created_file_belongs_to_its_maker(root: str) -> Any:
    status = os.stat(put(f"{root}/file"))
    return status.st_uid == os.geteuid(), status.st_gid == os.getegid()


def exclusive_creation_refuses_whatever_is_there(root: str) -> Any:
    put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("missing", f"{root}/dangling")
    os.symlink("file", f"{root}/link")
    os.mkfifo(f"{root}/fifo")
    found = [
        opening(f"{root}/{name}", _NEW | os.O_EXCL) for name in ("file", "directory", "dangling", "link", "fifo", "new")
    ]
    return found, names(root)


def exclusive_creation_has_one_winner(root: str) -> Any:
    def race() -> list[int]:
        return [number for number in range(60) if opening(f"{root}/{number}", _NEW | os.O_EXCL) == "opened"]

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        won = race()
        os.write(writer, bytes(won))
        os._exit(0)
    os.close(writer)
    ours = race()
    with open(reader, "rb") as file:
        theirs = list(file.read())
    os.waitpid(pid, 0)
    return sorted(ours + theirs) == list(range(60)), len(names(root))


def creation_through_a_dangling_symlink_makes_its_target(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    os.symlink("directory/target", f"{root}/link")
    return opening(f"{root}/link", _NEW), names(f"{root}/directory"), facts(f"{root}/link")["type"]


def creation_of_what_exists_opens_it_unchanged(root: str) -> Any:
    put(f"{root}/file", b"content", 0o600)
    with opened(f"{root}/file", _RW | os.O_CREAT, 0o777) as fd:
        return facts(fd), os.read(fd, 100)


def creation_needs_a_directory_that_is_there(root: str) -> Any:
    put(f"{root}/file")
    return [opening(f"{root}/{path}", _NEW) for path in ("missing/new", "file/new", "new/", "file/", "", "new/.")]


def truncation_by_open_empties_a_file(root: str) -> Any:
    found = []
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
        put(f"{root}/file", b"content")
        found.append((opening(f"{root}/file", flags | os.O_TRUNC), os.stat(f"{root}/file").st_size))
    return found


def truncation_by_open_is_seen_by_who_has_it_open(root: str) -> Any:
    put(f"{root}/file", b"content")
    with opened(f"{root}/file") as fd:
        first = os.read(fd, 3)
        opening(f"{root}/file", os.O_WRONLY | os.O_TRUNC)
        return first, os.read(fd, 10), os.fstat(fd).st_size


def two_that_append_overwrite_nothing(root: str) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with opened(f"{root}/file", flags) as first, opened(f"{root}/file", flags) as second:
        for number in range(20):
            os.write((first, second)[number % 2], b"%d," % number)
        os.lseek(first, 0, os.SEEK_SET)
        os.write(first, b"end")
        return os.lseek(first, 0, os.SEEK_CUR), get(f"{root}/file")


def two_processes_that_append_overwrite_nothing(root: str) -> Any:
    path = put(f"{root}/file")

    def append(letter: bytes) -> None:
        with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            for _ in range(100):
                os.write(fd, letter * 10)

    pid = os.fork()
    if pid == 0:
        append(b"a")
        os._exit(0)
    append(b"b")
    os.waitpid(pid, 0)
    data = get(path)
    parts = {data[start : start + 10] for start in range(0, len(data), 10)}
    return len(data), sorted(map(repr, parts)), data.count(b"a"), data.count(b"b")


def pwrite_to_an_appending_descriptor_goes_to_the_end(root: str) -> Any:
    put(f"{root}/file", b"12345")
    with opened(f"{root}/file", os.O_WRONLY | os.O_APPEND) as fd:
        return os.pwrite(fd, b"xy", 0), get(f"{root}/file")


def append_can_be_switched_on_and_off(root: str) -> Any:
    put(f"{root}/file", b"12345")
    with opened(f"{root}/file", _RW) as fd:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
        on = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_ACCMODE)
        os.write(fd, b"67")
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.pwrite(fd, b"x", 0)
        off = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_APPEND | os.O_ACCMODE)
        return on, off, get(f"{root}/file")


def access_modes_are_told_and_kept(root: str) -> Any:
    put(f"{root}/file", b"content")
    found = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with opened(f"{root}/file", flags) as fd:
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            found.append((mode, outcome(os.pread, fd, 4, 0), outcome(os.pwrite, fd, b"C", 0)))
    return found


def nofollow_refuses_a_symlink(root: str) -> Any:
    put(f"{root}/file", b"content")
    os.mkdir(f"{root}/directory")
    put(f"{root}/directory/inner")
    os.symlink("file", f"{root}/link")
    os.symlink("directory", f"{root}/dirlink")
    return (
        opening(f"{root}/link", os.O_NOFOLLOW),
        opening(f"{root}/link", os.O_NOFOLLOW | os.O_WRONLY | os.O_CREAT),
        opening(f"{root}/dirlink", os.O_NOFOLLOW | os.O_DIRECTORY),
        opening(f"{root}/dirlink/inner", os.O_NOFOLLOW),
        opening(f"{root}/file", os.O_NOFOLLOW),
    )


def directory_flag_wants_a_directory(root: str) -> Any:
    put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("directory", f"{root}/dirlink")
    os.symlink("file", f"{root}/link")
    return [opening(f"{root}/{name}", os.O_DIRECTORY) for name in ("file", "directory", "dirlink", "link", "missing")]


def directories_are_not_opened_for_writing(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    flags = (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT, _NEW | os.O_EXCL)
    return [opening(f"{root}/directory", flag) for flag in flags]


def path_descriptors_name_and_do_nothing_else(root: str) -> Any:
    put(f"{root}/file", b"content")
    os.mkdir(f"{root}/directory")
    put(f"{root}/directory/inner", b"inner")
    os.symlink("file", f"{root}/link")
    with opened(f"{root}/file", os.O_PATH) as fd:
        found: list[Any] = [facts(fd), outcome(os.read, fd, 1), outcome(os.ftruncate, fd, 0), outcome(os.fchmod, fd, 0)]
        found.append(get(f"/proc/self/fd/{fd}"))
    with opened(f"{root}/link", os.O_PATH | os.O_NOFOLLOW) as fd:
        found += [facts(fd), outcome(os.readlink, b"", dir_fd=fd)]
    with opened(f"{root}/directory", os.O_PATH) as fd:
        inner = os.open("inner", os.O_RDONLY, dir_fd=fd)
        found += [os.read(inner, 10), outcome(os.listdir, fd)]
        os.close(inner)
    return [repr(item) if isinstance(item, bytes) else item for item in found]


def path_descriptor_of_a_removed_file_still_knows_it(root: str) -> Any:
    put(f"{root}/file", b"content")
    with opened(f"{root}/file", os.O_PATH) as fd:
        os.unlink(f"{root}/file")
        return facts(fd), repr(get(f"/proc/self/fd/{fd}"))


def tmpfile_has_no_name(root: str) -> Any:
    with opened(root, os.O_TMPFILE | _RW, 0o640) as fd:
        os.write(fd, b"content")
        return facts(fd), repr(os.pread(fd, 10, 0)), names(root)


def tmpfile_can_be_given_a_name(root: str) -> Any:
    with opened(root, os.O_TMPFILE | _RW, 0o640) as fd:
        os.write(fd, b"content")
        calls.link_fd(fd, f"{root}/named")
        first = facts(fd)
        os.write(fd, b" and more")
        again = outcome(calls.link_fd, fd, f"{root}/second")
        taken = outcome(calls.link_fd, fd, f"{root}/named")
    return first, again, taken, facts(f"{root}/named"), repr(get(f"{root}/second")), names(root)


def exclusive_tmpfile_cannot_be_given_a_name(root: str) -> Any:
    with opened(root, os.O_TMPFILE | _RW | os.O_EXCL) as fd:
        os.write(fd, b"content")
        return outcome(calls.link_fd, fd, f"{root}/named"), names(root), facts(fd)


def tmpfile_wants_a_directory_and_writing(root: str) -> Any:
    put(f"{root}/file")
    return (
        opening(f"{root}/file", os.O_TMPFILE | _RW),
        opening(f"{root}/missing", os.O_TMPFILE | _RW),
        opening(root, os.O_TMPFILE | os.O_RDONLY),
        opening(root, os.O_TMPFILE | os.O_WRONLY),
        names(root),
    )


def tmpfile_has_its_mode_less_the_umask(root: str) -> Any:
    found = []
    for umask in (0, 0o027):
        before = os.umask(umask)
        try:
            for mode in (0o777, 0o600, 0o000):
                with opened(root, os.O_TMPFILE | _RW, mode) as fd:
                    found.append(facts(fd))
        finally:
            os.umask(before)
    return found


def mode_of_a_new_file_does_not_bind_its_own_descriptor(root: str) -> Any:
    with opened(f"{root}/none", _RW | os.O_CREAT | os.O_EXCL, 0) as fd:
        found = os.write(fd, b"abc"), repr(os.pread(fd, 3, 0))
    with opened(f"{root}/readable", os.O_WRONLY | os.O_CREAT, 0o444) as fd:
        return found, os.write(fd, b"abc"), opening(f"{root}/none", os.O_RDONLY), opening(f"{root}/readable", _RW)


def duplicates_share_an_offset_and_opens_do_not(root: str) -> Any:
    put(f"{root}/file", b"0123456789")
    with opened(f"{root}/file") as fd, opened(f"{root}/file") as other:
        twin = os.dup(fd)
        read = [os.read(fd, 2), os.read(twin, 2), os.read(other, 2), os.read(fd, 2)]
        os.close(twin)
        return list(map(repr, read)), os.lseek(fd, 0, os.SEEK_CUR), os.lseek(other, 0, os.SEEK_CUR)


def child_shares_the_offset(root: str) -> Any:
    put(f"{root}/file", b"0123456789")
    with opened(f"{root}/file") as fd:
        os.read(fd, 3)
        theirs = in_child(os.read, fd, 3)
        return theirs, repr(os.read(fd, 3))


def removed_file_can_be_opened_again_through_proc(root: str) -> Any:
    put(f"{root}/file", b"content")
    with opened(f"{root}/file") as fd:
        os.unlink(f"{root}/file")
        put(f"{root}/file", b"another")
        with opened(f"/proc/self/fd/{fd}", _RW) as again:
            os.pwrite(again, b"C", 0)
            return repr(os.pread(fd, 100, 0)), facts(again), repr(get(f"{root}/file"))


def many_descriptors_of_one_file_work(root: str) -> Any:
    put(f"{root}/file")
    fds = [os.open(f"{root}/file", _RW) for _ in range(200)]
    try:
        for number, fd in enumerate(fds):
            os.pwrite(fd, b"%03d" % number, 3 * number)
        return repr(os.pread(fds[0], 1000, 0)[-9:]), os.fstat(fds[7]).st_size
    finally:
        for fd in fds:
            os.close(fd)


def synchronous_writes_arrive(root: str) -> Any:
    found = []
    for flag in (os.O_SYNC, os.O_DSYNC, os.O_RSYNC):
        with opened(f"{root}/{flag}", _RW | os.O_CREAT | flag) as fd:
            found.append((os.write(fd, b"content"), repr(os.pread(fd, 10, 0))))
    return found


def direct_io_moves_whole_pages(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 10000)
    with mmap.mmap(-1, 8192) as page, opened(path, _RW | os.O_DIRECT) as fd:
        read = os.preadv(fd, [page], 0)
        first = page[:8192] == b"x" * 8192
        page[:4096] = b"y" * 4096
        wrote = os.pwritev(fd, [memoryview(page)[:4096]], 4096)
        tail = os.preadv(fd, [page], 8192)
    data = get(path)
    return read, first, wrote, tail, [data.count(b"x"), data.count(b"y")], len(data)


def mode_bits_keep_out_who_is_not_root(root: str) -> Any:
    found = []
    for mode in (0o000, 0o200, 0o400, 0o600, 0o077):
        path = put(f"{root}/{mode:o}", b"content")
        os.chmod(path, mode)
        found.append(
            [opening(path, flags) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC)]
        )
    for mode in (0o500, 0o300, 0o600):
        path = f"{root}/directory-{mode:o}"
        os.mkdir(path)
        put(f"{path}/file")
        os.chmod(path, mode)
        found.append(
            [
                opening(f"{path}/file", os.O_RDONLY),
                opening(f"{path}/new", _NEW),
                outcome(names, path),
                outcome(os.unlink, f"{path}/file"),
            ]
        )
        os.chmod(path, 0o700)
    return found


@needs("user_switch")
def strangers_open_what_the_mode_says(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    os.chown(path, 1001, 1002)

    def look() -> list[str]:
        return [str(opening(path, flags)) for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)]

    found = []
    for mode in (0o600, 0o060, 0o006, 0o640, 0o204, 0o070):
        os.chmod(path, mode)
        for ids in ((1001, 1, []), (1, 1002, []), (1, 1, [1002]), (1, 1, [])):
            found.append(in_child(look, ids=ids))
    return found


@needs("user_switch")
def noatime_is_for_the_owner(root: str) -> Any:
    path = put(f"{root}/file")
    os.chmod(path, 0o644)
    os.chown(path, 1001, 1001)
    return [in_child(opening, path, os.O_NOATIME, ids=(uid, 1, [])) for uid in (1001, 1002)]


@needs("user_switch")
def files_made_by_others_are_theirs(root: str) -> Any:
    os.chmod(root, 0o777)

    def make() -> None:
        put(f"{root}/file-{os.getuid()}")
        os.mkdir(f"{root}/directory-{os.getuid()}")
        os.symlink("x", f"{root}/symlink-{os.getuid()}")
        os.mkfifo(f"{root}/fifo-{os.getuid()}")

    made = [in_child(make, ids=(uid, uid + 1, [])) for uid in (1001, 2001)]
    return made, [facts(f"{root}/{name}") for name in names(root)]


@needs("user_switch")
def sticky_directories_protect_the_files_of_others(root: str) -> Any:
    found = []
    for mode in (0o777, 0o1777):
        place = f"{root}/{mode:o}"
        os.mkdir(place)
        os.chmod(place, mode)
        for name in ("a", "b", "c"):
            os.chown(put(f"{place}/{name}"), 1001, 1001)
        put(f"{place}/own")
        os.chown(f"{place}/own", 1002, 1002)
        for operation in (
            lambda place=place: os.unlink(f"{place}/a"),
            lambda place=place: os.rename(f"{place}/b", f"{place}/moved"),
            lambda place=place: os.rename(f"{place}/own", f"{place}/c"),
            lambda place=place: os.unlink(f"{place}/own"),
        ):
            found.append(in_child(operation, ids=(1002, 1002, [])))
        found.append(names(place))
    return found


def setgid_of_a_new_file_needs_no_group_execution(root: str) -> Any:
    before = os.umask(0)
    try:
        return [(opening(f"{root}/{mode:o}", _NEW, mode), facts(f"{root}/{mode:o}")) for mode in (0o2755, 0o2745)]
    finally:
        os.umask(before)


def special_files_are_told_apart_by_fstat(root: str) -> Any:
    os.mkfifo(f"{root}/fifo")
    put(f"{root}/file")
    found = []
    for name in ("fifo", "file", "."):
        with opened(f"{root}/{name}", os.O_RDONLY | os.O_NONBLOCK) as fd:
            found.append(stat.S_IFMT(os.fstat(fd).st_mode))
    return found


BEHAVIOURS = collect(globals())
