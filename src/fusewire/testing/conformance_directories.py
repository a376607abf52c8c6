"""Behaviours of directories: making, removing, listing, and what happens to one that changes or goes meanwhile.

Layer `testing`; see observe.py for what a transcript may hold. The order of a listing differs between filesystems.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from fusewire.testing import calls
from fusewire.testing.observe import Clock, collect, facts, in_child, names, needs, opened, opening, outcome, put

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_WRONLY | os.O_CREAT


def _listed(fd: int, size: int = 1024) -> list[calls.Dirent]:
    found = []
    while part := calls.getdents(fd, size):
        found += part
    return found


def _fill(place: str, count: int) -> list[str]:
    os.mkdir(place)
    made = [f"name {number:04}" for number in range(count)]
    for name in made:
        os.close(os.open(f"{place}/{name}", _NEW))
    return made


def mkdir_makes_an_empty_directory_with_its_mode(root: str) -> Any:
    found = []
    for umask in (0, 0o022, 0o077):
        before = os.umask(umask)
        try:
            for mode in (0o777, 0o755, 0o700, 0o1777, 0o6755, 0o000):
                path = f"{root}/{umask:o}-{mode:o}"
                os.mkdir(path, mode)
                found.append(facts(path))
        finally:
            os.umask(before)
    return found, names(f"{root}/22-777")


def mkdir_refuses_what_is_there(root: str) -> Any:
    put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("missing", f"{root}/dangling")
    os.symlink("directory", f"{root}/link")
    wanted = ("file", "directory", "dangling", "link", "link/", "directory/", "missing/new", "file/new", "new/", "")
    return [outcome(os.mkdir, f"{root}/{name}") for name in wanted], names(root)


def rmdir_removes_only_empty_directories(root: str) -> Any:
    put(f"{root}/file")
    os.makedirs(f"{root}/full/inner")
    os.mkdir(f"{root}/empty")
    os.mkdir(f"{root}/slash")
    os.symlink("empty", f"{root}/link")
    wanted = (
        "file",
        "full",
        "link",
        "missing",
        "full/missing",
        "file/x",
        "empty",
        "empty",
        "slash/",
        "full/inner",
        "full",
    )
    return [outcome(os.rmdir, f"{root}/{name}") for name in wanted], names(root)


def link_counts_of_directories_are_consistent(root: str) -> Any:
    def count(name: str = "") -> int:
        return os.stat(f"{root}/top{name}").st_nlink

    os.mkdir(f"{root}/top")
    if count() == 1:
        return True  # a filesystem that does not count: always 1, as stat(2) users know it of btrfs
    counts = [count()]
    for number in range(3):
        os.mkdir(f"{root}/top/{number}")
        counts.append(count())
    put(f"{root}/top/file")
    os.rmdir(f"{root}/top/0")
    counts.append(count())
    os.rename(f"{root}/top/1", f"{root}/away")
    counts.append(count())
    os.rename(f"{root}/away", f"{root}/top/2")
    counts.append(count())
    os.rename(f"{root}/top/2", f"{root}/top/3")
    counts.append(count())
    calls.rename2(f"{root}/top/3", f"{root}/top/file", calls.RENAME_EXCHANGE)
    counts += [count(), count("/file")]
    os.mkdir(f"{root}/side")
    calls.rename2(f"{root}/top/file", put(f"{root}/side/file"), calls.RENAME_EXCHANGE)
    return [*counts, count(), os.stat(f"{root}/side").st_nlink] == [2, 3, 4, 5, 4, 3, 3, 3, 3, 2, 2, 3]


@needs("root")
def setgid_directories_give_their_group(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    os.chown(f"{root}/directory", 1001, 2002)
    os.chmod(f"{root}/directory", 0o2775)
    place = f"{root}/directory"
    put(f"{place}/file")
    os.mkdir(f"{place}/sub")
    os.mkdir(f"{place}/sub/sub")
    os.symlink("x", f"{place}/symlink")
    os.mkfifo(f"{place}/fifo")
    os.mknod(f"{place}/node", stat.S_IFREG | 0o644)
    os.link(put(f"{root}/outside"), f"{place}/link")
    with opened(place, os.O_TMPFILE | os.O_RDWR) as fd:
        found = [facts(fd)]
    found += [facts(f"{place}/{name}") for name in (*names(place), "sub/sub")]
    os.rename(f"{place}/file", f"{root}/moved")
    return found, facts(f"{root}/moved")


def _make_setgid(place: str) -> list[Any]:
    os.umask(0)
    for name, mode in (("executable", 0o2775), ("plain", 0o2664)):
        os.close(os.open(f"{place}/{name}", _NEW, mode))
    os.mkdir(f"{place}/sub")
    with opened(place, os.O_TMPFILE | os.O_RDWR, 0o2775) as fd:
        found = [facts(fd)]
    return [*found, *(facts(f"{place}/{name}") for name in names(place))]


@needs("user_switch")
def setgid_of_a_new_file_is_for_members_of_its_group(root: str) -> Any:
    found = []
    for number, groups in enumerate(([], [2002])):
        place = f"{root}/{number}"
        os.mkdir(place)
        os.chown(place, 1001, 2002)
        os.chmod(place, 0o2777)
        found.append(in_child(_make_setgid, place, ids=(1001, 1001, groups)))
    return found


# Listing


def empty_directory_lists_only_dots(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        found = _listed(fd)
        inodes = {item.name: item.ino for item in found}
        known = inodes[b"."] == os.fstat(fd).st_ino, inodes[b".."] == os.stat(root).st_ino
        return sorted(item.name.decode() for item in found), known, names(f"{root}/directory")


def listing_has_types_and_inode_numbers(root: str) -> Any:
    put(f"{root}/file")
    os.mkdir(f"{root}/directory")
    os.symlink("x", f"{root}/symlink")
    os.mkfifo(f"{root}/fifo")
    os.mknod(f"{root}/socket", stat.S_IFSOCK | 0o600)
    os.link(f"{root}/file", f"{root}/hard")
    with opened(root, _DIRECTORY) as fd:
        found = {item.name.decode(): item for item in _listed(fd)}
    types = {name: item.type for name, item in sorted(found.items())}
    inodes = [item.ino == os.lstat(f"{root}/{name}").st_ino for name, item in found.items() if name not in (".", "..")]
    return types, inodes


def thousand_names_are_listed_once_each(root: str) -> Any:
    made = _fill(f"{root}/directory", 1000)
    found = []
    for size in (280, 4096, 1 << 20):
        with opened(f"{root}/directory", _DIRECTORY) as fd:
            listed = [item.name.decode() for item in _listed(fd, size)]
        found.append((len(listed), sorted(listed) == sorted([".", "..", *made])))
    return found, len(names(f"{root}/directory"))


def listing_is_stable_while_nothing_changes(root: str) -> Any:
    _fill(f"{root}/directory", 200)
    with opened(f"{root}/directory", _DIRECTORY) as fd, opened(f"{root}/directory", _DIRECTORY) as other:
        first = [(item.name, item.ino, item.type) for item in _listed(fd, 500)]
        second = [(item.name, item.ino, item.type) for item in _listed(other, 7000)]
    return first == second, len(first)


def listing_goes_on_where_it_was_told(root: str) -> Any:
    _fill(f"{root}/directory", 300)
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        whole = _listed(fd, 700)
        good = []
        for place in (0, 1, 2, 57, 150, 299, 300, 301, 5):
            os.lseek(fd, whole[place].offset, os.SEEK_SET)
            rest = [item.name for item in _listed(fd, 900)]
            good.append(rest == [item.name for item in whole[place + 1 :]])
        distinct = len({item.offset for item in whole})
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        os.lseek(fd, whole[100].offset, os.SEEK_SET)
        again = [item.name for item in _listed(fd)] == [item.name for item in whole[101:]]
    return good, distinct, again


def rewinding_shows_what_is_new(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    put(f"{root}/directory/old")
    put(f"{root}/directory/going")
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        first = sorted(item.name.decode() for item in _listed(fd))
        put(f"{root}/directory/new")
        os.unlink(f"{root}/directory/going")
        at_end = outcome(lambda: len(_listed(fd)) <= 1)
        os.lseek(fd, 0, os.SEEK_SET)
        return first, at_end, sorted(item.name.decode() for item in _listed(fd))


def names_that_stay_are_listed_once_while_others_come_and_go(root: str) -> Any:
    made = _fill(f"{root}/directory", 300)
    stay = set(made[::3])
    seen: list[str] = []
    gone = iter([name for name in made if name not in stay])
    number = 0
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        while part := calls.getdents(fd, 600):
            seen += [item.name.decode() for item in part]
            for _ in range(10):
                if (name := next(gone, None)) is not None:
                    os.unlink(f"{root}/directory/{name}")
            if number < 100:
                number += 1
                put(f"{root}/directory/new {number}")
    kept = [name for name in seen if name in stay]
    return len(kept), len(set(kept)), len(seen) == len(set(seen))


def listing_and_removing_in_turns_empties_a_directory(root: str) -> Any:
    _fill(f"{root}/directory", 500)
    removed = 0
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        for _ in range(10):
            os.lseek(fd, 0, os.SEEK_SET)
            while part := calls.getdents(fd, 900):
                for item in part:
                    if item.name not in (b".", b".."):
                        os.unlink(item.name, dir_fd=fd)
                        removed += 1
    return removed, outcome(os.rmdir, f"{root}/directory")


def renaming_while_listing_loses_nobody(root: str) -> Any:
    made = _fill(f"{root}/directory", 200)
    seen: list[str] = []
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        for step, name in enumerate(made[:50]):
            if step % 5 == 0:
                seen += [item.name.decode() for item in calls.getdents(fd, 300)]
            os.rename(f"{root}/directory/{name}", f"{root}/directory/renamed {name}")
        seen += [item.name.decode() for item in _listed(fd)]
    rest = [name for name in seen if name in made[50:]]
    return len(rest), len(set(rest)), len(names(f"{root}/directory"))


def two_list_independently(root: str) -> Any:
    _fill(f"{root}/directory", 100)
    with opened(f"{root}/directory", _DIRECTORY) as first, opened(f"{root}/directory", _DIRECTORY) as second:
        found: tuple[list[bytes], list[bytes]] = ([], [])
        more = True
        while more:
            more = False
            for fd, seen, size in ((first, found[0], 400), (second, found[1], 700)):
                part = calls.getdents(fd, size)
                seen += [item.name for item in part]
                more = more or bool(part)
    return found[0] == found[1], len(found[0])


def listing_buffer_may_be_too_small(root: str) -> Any:
    put(f"{root}/{'n' * 200}")
    with opened(root, _DIRECTORY) as fd:
        return outcome(calls.getdents, fd, 16)


# A directory that is gone


def removed_directory_is_dead(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    with opened(f"{root}/directory", _DIRECTORY) as fd:
        os.rmdir(f"{root}/directory")
        return (
            outcome(calls.getdents, fd, 1000),
            outcome(os.open, "new", _NEW, dir_fd=fd),
            outcome(os.mkdir, "new", dir_fd=fd),
            outcome(os.stat, "missing", dir_fd=fd),
            outcome(lambda: stat.S_ISDIR(os.fstat(fd).st_mode)),
            outcome(os.symlink, "x", "new", dir_fd=fd),
            outcome(os.link, put(f"{root}/file"), "new", dst_dir_fd=fd),
            outcome(os.rename, f"{root}/file", "new", dst_dir_fd=fd),
            outcome(os.fchmod, fd, 0o700),
        )


def working_directory_may_be_removed(root: str) -> Any:
    os.mkdir(f"{root}/directory")

    def work() -> list[Any]:
        os.chdir(f"{root}/directory")
        before = os.path.basename(os.getcwd())
        os.rename(f"{root}/directory", f"{root}/renamed")
        between = os.path.basename(os.getcwd())
        put("inside")
        os.unlink("inside")
        os.rmdir(f"{root}/renamed")
        return [before, between, outcome(os.getcwd), opening("new", _NEW), outcome(names, "."), outcome(os.chdir, "..")]

    return in_child(work)


def directory_descriptor_survives_a_rename(root: str) -> Any:
    os.makedirs(f"{root}/a/b")
    os.mkdir(f"{root}/c")
    with opened(f"{root}/a/b", _DIRECTORY) as fd:
        os.rename(f"{root}/a/b", f"{root}/c/d")
        os.close(os.open("made", _NEW, dir_fd=fd))
        up = os.stat("..", dir_fd=fd).st_ino == os.stat(f"{root}/c").st_ino
        return names(f"{root}/c/d"), up, names(fd)


def directories_are_not_read_or_written(root: str) -> Any:
    with opened(root, _DIRECTORY) as fd:
        return (
            outcome(os.read, fd, 10),
            outcome(os.pread, fd, 10, 0),
            outcome(os.write, fd, b"x"),
            outcome(os.ftruncate, fd, 0),
            outcome(os.truncate, root, 0),
        )


def deep_trees_work(root: str) -> Any:
    path = root
    for number in range(100):
        path += f"/{number}"
        os.mkdir(path)
    put(f"{path}/leaf", b"deep")
    depth = sum(1 for _ in os.walk(root)) - 1
    inner = os.stat(f"{path}{'/..' * 100}").st_ino == os.stat(root).st_ino
    return depth, inner, os.stat(f"{path}/leaf").st_size


# Times


def changes_of_entries_move_the_times_of_the_directory(root: str) -> Any:
    clock = Clock(root)
    place = f"{root}/directory"
    os.mkdir(place)
    put(f"{root}/outside")
    return {
        name: clock.moved(place, operation)
        for name, operation in {
            "create": lambda: put(f"{place}/file"),
            "mkdir": lambda: os.mkdir(f"{place}/sub"),
            "symlink": lambda: os.symlink("x", f"{place}/symlink"),
            "mkfifo": lambda: os.mkfifo(f"{place}/fifo"),
            "link": lambda: os.link(f"{root}/outside", f"{place}/hard"),
            "rename": lambda: os.rename(f"{place}/file", f"{place}/renamed"),
            "exchange": lambda: calls.rename2(f"{place}/renamed", f"{place}/hard", calls.RENAME_EXCHANGE),
            "unlink": lambda: os.unlink(f"{place}/hard"),
            "rmdir": lambda: os.rmdir(f"{place}/sub"),
            "move in": lambda: os.rename(f"{root}/outside", f"{place}/in"),
            "move out": lambda: os.rename(f"{place}/in", f"{root}/out"),
        }.items()
    }


def changes_of_files_do_not_move_the_times_of_the_directory(root: str) -> Any:
    clock = Clock(root)
    place = f"{root}/directory"
    os.mkdir(place)
    path = put(f"{place}/file", b"content")
    return {
        name: clock.moved(place, operation)
        for name, operation in {
            "write": lambda: put(path, b"new"),
            "chmod": lambda: os.chmod(path, 0o600),
            "utime": lambda: os.utime(path),
            "truncate": lambda: os.truncate(path, 1),
            "missing": lambda: outcome(os.unlink, f"{place}/missing"),
            "refused": lambda: outcome(os.mkdir, path),
            "stat": lambda: os.stat(path),
        }.items()
    }


def listing_moves_the_access_time_of_an_old_directory(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    put(f"{root}/directory/file")
    os.utime(f"{root}/directory", ns=(10**18, 10**18))
    names(f"{root}/directory")
    status = os.stat(f"{root}/directory")
    return status.st_atime_ns > 10**18, status.st_mtime_ns == 10**18


BEHAVIOURS = collect(globals())
