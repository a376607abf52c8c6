"""Behaviours of names: rename, link, symlink, unlink, and what a name may be.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from fusewire.testing import calls
from fusewire.testing.calls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from fusewire.testing.observe import Clock, collect, facts, get, names, needs, opened, opening, outcome, put

_NEW = os.O_WRONLY | os.O_CREAT


def _some_of_each(root: str) -> None:
    put(f"{root}/file", b"content")
    put(f"{root}/other", b"other content")
    os.mkdir(f"{root}/empty")
    os.mkdir(f"{root}/full")
    put(f"{root}/full/inner", b"inner")
    os.symlink("file", f"{root}/link")
    os.symlink("missing", f"{root}/dangling")
    os.mkfifo(f"{root}/fifo")


# rename


def rename_gives_a_new_name(root: str) -> Any:
    path = put(f"{root}/old", b"content")
    before = os.stat(path)
    os.rename(path, f"{root}/new")
    after = os.stat(f"{root}/new")
    same = before.st_ino == after.st_ino, before.st_mtime_ns == after.st_mtime_ns
    return same, facts(f"{root}/new"), outcome(os.lstat, path), names(root), repr(get(f"{root}/new"))


def rename_replaces_a_file(root: str) -> Any:
    put(f"{root}/old", b"old content")
    put(f"{root}/new", b"new")
    with opened(f"{root}/new") as fd:
        os.rename(f"{root}/old", f"{root}/new")
        return repr(os.pread(fd, 20, 0)), facts(fd), repr(get(f"{root}/new")), names(root)


def rename_between_directories_keeps_everything(root: str) -> Any:
    _some_of_each(root)
    os.mkdir(f"{root}/to")
    found = []
    for name in ("file", "full", "link", "fifo"):
        ino = os.lstat(f"{root}/{name}").st_ino
        os.rename(f"{root}/{name}", f"{root}/to/{name}")
        found.append((os.lstat(f"{root}/to/{name}").st_ino == ino, facts(f"{root}/to/{name}")))
    up = os.stat(f"{root}/to/full/..").st_ino == os.stat(f"{root}/to").st_ino
    return found, up, names(root), names(f"{root}/to"), repr(get(f"{root}/to/full/inner"))


def rename_of_everything_onto_everything(root: str) -> Any:
    found = {}
    kinds = ("file", "empty", "full", "link", "dangling", "fifo", "missing")
    for number, (old, new) in enumerate((a, b) for a in kinds for b in kinds):
        place = f"{root}/{number}"
        os.mkdir(place)
        _some_of_each(place)
        result = outcome(os.rename, f"{place}/{old}", f"{place}/{new}")
        found[f"{old} {new}"] = (result, names(place), facts(f"{place}/{new}") if new != "missing" else "")
    return found


def rename_onto_itself_does_nothing(root: str) -> Any:
    _some_of_each(root)
    os.link(f"{root}/file", f"{root}/hard")
    found = [outcome(os.rename, f"{root}/{name}", f"{root}/{name}") for name in ("file", "full", "link")]
    return found, outcome(os.rename, f"{root}/file", f"{root}/hard"), names(root), facts(f"{root}/file")


def rename_of_a_directory_below_itself_is_refused(root: str) -> Any:
    os.makedirs(f"{root}/a/b/c")
    moves = (("a", "a/new"), ("a", "a/b/c/new"), ("a/b", "a/b/c"), ("a/b/c", "a/b"), ("a/b", "a"))
    return [outcome(os.rename, f"{root}/{old}", f"{root}/{new}") for old, new in moves], names(f"{root}/a/b")


def rename_of_a_directory_replaces_only_an_empty_one(root: str) -> Any:
    for name in ("one", "two", "three"):
        os.mkdir(f"{root}/{name}")
        put(f"{root}/{name}/in {name}")
    os.mkdir(f"{root}/empty")
    found = [outcome(os.rename, f"{root}/one", f"{root}/two"), outcome(os.rename, f"{root}/three", f"{root}/empty")]
    return found, names(root), names(f"{root}/empty")


def rename_of_an_open_file_does_not_disturb(root: str) -> Any:
    put(f"{root}/old", b"content")
    with opened(f"{root}/old", os.O_RDWR) as fd:
        os.rename(f"{root}/old", f"{root}/new")
        os.pwrite(fd, b"C", 0)
        put(f"{root}/old", b"another")
        return repr(get(f"{root}/new")), repr(os.pread(fd, 20, 0)), facts(fd), repr(get(f"{root}/old"))


def rename_refuses_dots_and_what_is_missing(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    put(f"{root}/file")
    moves = (
        ("directory/.", "new"),
        ("directory/..", "new"),
        ("directory", "directory/.."),
        ("file", "directory/."),
        ("missing", "new"),
        ("file", "missing/new"),
        ("file", "file/new"),
        ("file/x", "new"),
        ("file/", "new"),
        ("file", "new/"),
        ("directory", "new/"),
        ("file", ""),
    )
    return [outcome(os.rename, f"{root}/{a}", f"{root}/{b}") for a, b in moves], names(root)


def rename_without_replacing(root: str) -> Any:
    _some_of_each(root)
    found = []
    for new in ("other", "empty", "link", "dangling", "file", "new"):
        found.append(outcome(calls.rename2, f"{root}/file", f"{root}/{new}", RENAME_NOREPLACE))
    return found, names(root), outcome(calls.rename2, f"{root}/full", f"{root}/moved", RENAME_NOREPLACE), names(root)


def rename_exchanges_any_two(root: str) -> Any:
    found = {}
    kinds = ("file", "empty", "full", "link", "fifo")
    for old in kinds:
        for new in kinds:
            place = f"{root}/{old}-{new}"
            os.makedirs(f"{place}/sub")
            _some_of_each(place)
            os.rename(f"{place}/{new}", f"{place}/sub/{new}")
            if old == new:
                continue
            inodes = os.lstat(f"{place}/{old}").st_ino, os.lstat(f"{place}/sub/{new}").st_ino
            result = outcome(calls.rename2, f"{place}/{old}", f"{place}/sub/{new}", RENAME_EXCHANGE)
            swapped = (os.lstat(f"{place}/sub/{new}").st_ino, os.lstat(f"{place}/{old}").st_ino) == inodes
            found[f"{old} {new}"] = result, swapped, facts(f"{place}/{old}"), facts(f"{place}/sub/{new}")
    return found


def exchanged_directories_know_their_parents(root: str) -> Any:
    os.makedirs(f"{root}/a/x/inside x")
    os.makedirs(f"{root}/b/y")
    calls.rename2(f"{root}/a/x", f"{root}/b/y", RENAME_EXCHANGE)
    parents = [os.stat(f"{root}/{way}/..").st_ino == os.stat(f"{root}/{way[0]}").st_ino for way in ("a/x", "b/y")]
    return parents, names(f"{root}/b/y"), names(f"{root}/a/x")


def exchange_refuses_what_cannot_be(root: str) -> Any:
    os.makedirs(f"{root}/a/b")
    put(f"{root}/file")
    moves = (("file", "missing"), ("missing", "file"), ("a", "a/b"), ("a/b", "a"), ("file", "file"))
    found = [outcome(calls.rename2, f"{root}/{a}", f"{root}/{b}", RENAME_EXCHANGE) for a, b in moves]
    both = outcome(calls.rename2, f"{root}/file", f"{root}/new", RENAME_EXCHANGE | RENAME_NOREPLACE)
    return found, both, outcome(calls.rename2, f"{root}/file", f"{root}/new", 1 << 20), names(root)


@needs("root")
def rename_leaves_a_whiteout(root: str) -> Any:
    _some_of_each(root)
    found = [outcome(calls.rename2, f"{root}/file", f"{root}/new", RENAME_WHITEOUT), facts(f"{root}/file")]
    found += [outcome(calls.rename2, f"{root}/full", f"{root}/moved", RENAME_WHITEOUT), facts(f"{root}/full")]
    found.append(outcome(calls.rename2, f"{root}/link", f"{root}/other", RENAME_WHITEOUT))
    found.append(outcome(calls.rename2, f"{root}/fifo", f"{root}/moved", RENAME_WHITEOUT | RENAME_NOREPLACE))
    found.append(outcome(calls.rename2, f"{root}/fifo", f"{root}/moved", RENAME_WHITEOUT | RENAME_EXCHANGE))
    return found, names(root), facts(f"{root}/link"), outcome(os.unlink, f"{root}/file")


def rename_moves_the_times_of_directories_and_the_change_time(root: str) -> Any:
    clock = Clock(root)
    os.mkdir(f"{root}/a")
    os.mkdir(f"{root}/b")
    put(f"{root}/a/file")
    put(f"{root}/b/replaced")
    os.mkdir(f"{root}/a/directory")

    def move(old: str, new: str, back: str = "") -> list[str]:
        found = []
        for look in (f"{root}/a", f"{root}/b", f"{root}/{old}"):
            if look.endswith(old):
                with opened(look, os.O_PATH) as fd:
                    found.append(clock.moved(fd, lambda: os.rename(f"{root}/{old}", f"{root}/{new}")))
            else:
                found.append(clock.moved(look, lambda: os.rename(f"{root}/{old}", f"{root}/{new}")))
            os.rename(f"{root}/{new}", f"{root}/{old}")
        return found

    found = [move("a/file", "b/file"), move("a/file", "a/renamed"), move("a/directory", "b/directory")]
    with opened(f"{root}/b/replaced", os.O_PATH) as fd:
        found.append([clock.moved(fd, lambda: os.rename(f"{root}/a/file", f"{root}/b/replaced"))])
    return found


# link


def hard_links_are_one_file(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    os.mkdir(f"{root}/directory")
    os.link(path, f"{root}/second")
    os.link(f"{root}/second", f"{root}/directory/third")
    put(f"{root}/directory/third", b"changed")
    found = [facts(f"{root}/{name}") for name in ("file", "second", "directory/third")]
    inodes = {os.stat(f"{root}/{name}").st_ino for name in ("file", "second", "directory/third")}
    os.chmod(f"{root}/second", 0o600)
    os.unlink(path)
    return found, len(inodes), repr(get(f"{root}/second")), facts(f"{root}/directory/third"), names(root)


def link_counts_follow(root: str) -> Any:
    path = put(f"{root}/file")
    counts = []
    with opened(path) as fd:
        for number in range(5):
            os.link(path, f"{root}/{number}")
            counts.append((os.fstat(fd).st_nlink, os.stat(path).st_nlink))
        put(f"{root}/other")
        os.rename(f"{root}/other", f"{root}/0")
        counts.append((os.fstat(fd).st_nlink, os.stat(path).st_nlink))
        for name in ("1", "2", "3", "file", "4"):
            os.unlink(f"{root}/{name}")
            counts.append((os.fstat(fd).st_nlink, 0))
    return counts


def link_refuses_what_cannot_be(root: str) -> Any:
    _some_of_each(root)
    pairs = (
        ("file", "other"),
        ("file", "empty"),
        ("file", "dangling"),
        ("file", "file"),
        ("missing", "new"),
        ("empty", "new"),
        (".", "new"),
        ("file", "missing/new"),
        ("file", "file/new"),
        ("file/", "new"),
        ("file", "new/"),
        ("file", "empty/."),
    )
    return [outcome(os.link, f"{root}/{a}", f"{root}/{b}") for a, b in pairs], facts(f"{root}/file")


def link_of_a_symlink_is_a_symlink(root: str) -> Any:
    _some_of_each(root)
    os.link(f"{root}/link", f"{root}/hard", follow_symlinks=False)
    os.link(f"{root}/link", f"{root}/followed", follow_symlinks=True)
    os.link(f"{root}/fifo", f"{root}/second fifo")
    found = [facts(f"{root}/{name}") for name in ("hard", "followed", "second fifo")]
    return found, outcome(os.link, f"{root}/dangling", f"{root}/x", follow_symlinks=True)


def link_of_a_removed_file_is_refused(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    with opened(path) as fd:
        os.unlink(path)
        return outcome(calls.link_fd, fd, f"{root}/new"), names(root)


def link_of_an_open_file_works(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    with opened(path) as fd:
        return outcome(calls.link_fd, fd, f"{root}/new"), facts(fd), names(root)


# unlink


def unlink_removes_names_only(root: str) -> Any:
    _some_of_each(root)
    wanted = (
        "file",
        "link",
        "dangling",
        "fifo",
        "empty",
        "full",
        "missing",
        "full/missing",
        "file/x",
        "other/",
        ".",
        "",
    )
    return [outcome(os.unlink, f"{root}/{name}") for name in wanted], names(root)


def unlinked_file_lives_while_it_is_open(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    with opened(path, os.O_RDWR) as fd, opened(path) as other:
        os.unlink(path)
        os.pwrite(fd, b"more", 7)
        found = [facts(fd), repr(os.pread(other, 20, 0)), outcome(os.stat, path), names(root)]
        put(path, b"next")
        return found, facts(fd), repr(get(path)), os.fstat(fd).st_ino != os.stat(path).st_ino


def name_can_be_used_again_at_once(root: str) -> Any:
    found = []
    for number in range(5):
        found.append(facts(put(f"{root}/name", b"x" * number)))
        os.unlink(f"{root}/name")
        os.mkdir(f"{root}/name")
        found.append(facts(f"{root}/name"))
        os.rmdir(f"{root}/name")
        os.symlink("x" * (number + 1), f"{root}/name")
        found.append(facts(f"{root}/name"))
        os.unlink(f"{root}/name")
        found.append({"missing": outcome(os.lstat, f"{root}/name")})
    return found


# symlink


def symlink_holds_what_it_was_given(root: str) -> Any:
    found = []
    targets = (b"x", b"a/b/../c", b"/absolute", b"with\nnewline", b"\xff\xfe", b"y" * 255, b"z/" * 1000, b"w" * 4095)
    for number, target in enumerate(targets):
        os.symlink(target, os.fsencode(f"{root}/{number}"))
        status = os.lstat(f"{root}/{number}")
        found.append(
            (os.readlink(os.fsencode(f"{root}/{number}")) == target, status.st_size, oct(stat.S_IMODE(status.st_mode)))
        )
    return found, repr(calls.readlink(f"{root}/2", 4))


def symlink_refuses_what_cannot_be(root: str) -> Any:
    _some_of_each(root)
    pairs = (("", "new"), ("w" * 4096, "new"), ("x", "file"), ("x", "empty"), ("x", "dangling"), ("x", "missing/new"))
    found = [outcome(os.symlink, a, f"{root}/{b}") for a, b in (*pairs, ("x", "file/new"), ("x", "new/"), ("x", "."))]
    return found, [outcome(os.readlink, f"{root}/{name}") for name in ("file", "empty", "missing", "link")], names(root)


def symlinks_are_followed_in_the_middle_and_at_the_end(root: str) -> Any:
    os.makedirs(f"{root}/a/b")
    put(f"{root}/a/b/file", b"content")
    os.symlink("a", f"{root}/to a")
    os.symlink("../to a/b", f"{root}/a/around")
    os.symlink("around/file", f"{root}/a/twice")
    found = [repr(get(f"{root}/{way}")) for way in ("to a/b/file", "to a/around/file", "a/twice", "to a/twice")]
    return found, facts(f"{root}/to a")["type"], facts(f"{root}/to a/")["type"], names(f"{root}/to a/around")


def symlink_loops_are_found(root: str) -> Any:
    os.symlink("self", f"{root}/self")
    os.symlink("two", f"{root}/one")
    os.symlink("one", f"{root}/two")
    put(f"{root}/0")
    for number in range(1, 45):
        os.symlink(str(number - 1), f"{root}/{number}")
    chain = [number for number in range(1, 45) if opening(f"{root}/{number}", os.O_RDONLY) == "opened"]
    return (
        [opening(f"{root}/{name}", os.O_RDONLY) for name in ("self", "one", "44", "self/x")],
        outcome(os.stat, f"{root}/one"),
        facts(f"{root}/one"),
        max(chain),
        opening(f"{root}/self", _NEW),
    )


def trailing_slash_follows_and_wants_a_directory(root: str) -> Any:
    _some_of_each(root)
    os.symlink("full", f"{root}/dirlink")
    found = [outcome(os.lstat, f"{root}/{name}/") for name in ("file", "link", "dangling", "fifo", "missing")]
    types = [facts(f"{root}/{name}/")["type"] for name in ("full", "dirlink")]
    return found, types, outcome(os.unlink, f"{root}/dirlink/"), outcome(os.rmdir, f"{root}/dirlink/"), names(root)


def symlinks_own_attributes_are_changed_and_not_the_targets(root: str) -> Any:
    _some_of_each(root)
    calls.utimens(f"{root}/link", (10, 20), (30, 40), follow=False)
    os.chown(f"{root}/link", os.getuid(), os.getgid(), follow_symlinks=False)
    status = os.lstat(f"{root}/link")
    return status.st_mtime_ns, os.stat(f"{root}/link").st_mtime_ns > 10**18, facts(f"{root}/link")


# What a name may be


def names_are_any_bytes(root: str) -> Any:
    place = os.fsencode(root)
    odd = [
        b"\xff\xfe\x80", b"new\nline", b" ", b"...", b"-rf", b"a\\b", b"\x01\x7f", b"e\xcc\x81", b"\xc3\xa9",
        b"Case", b"case", b"~", b"*", b"\xf0\x9f\x98\x80", b"trailing ", b"trailing.", b"CON", b"%41", b"a:b",
    ]  # fmt: skip
    for number, name in enumerate(odd):
        with opened(os.fsdecode(place + b"/" + name), _NEW | os.O_EXCL) as fd:
            os.write(fd, b"%d" % number)
    listed = sorted(os.listdir(place))
    return listed == sorted(odd), [repr(get(os.fsdecode(place + b"/" + name))) for name in odd]


def names_have_255_bytes_at_most(root: str) -> Any:
    found = []
    put(f"{root}/file")
    for name in ("n" * 255, "n" * 256, "\u00e9" * 127 + "n", "\u00e9" * 128):
        path = f"{root}/{name}"
        found.append(
            [
                opening(path, _NEW),
                outcome(os.lstat, path) if opening(path, os.O_RDONLY) != "opened" else "there",
                outcome(os.unlink, path),
                outcome(os.mkdir, path),
                outcome(os.rmdir, path),
                outcome(os.symlink, "x", path),
                outcome(os.unlink, path),
                outcome(os.mkfifo, path),
                outcome(os.unlink, path),
                outcome(os.link, f"{root}/file", path),
                outcome(os.unlink, path),
                outcome(os.rename, f"{root}/file", path),
                outcome(os.rename, path, f"{root}/file"),
                outcome(os.access, path, os.F_OK),
            ]
        )
    return found, names(root)


def paths_have_a_limit_and_trees_have_none(root: str) -> Any:
    long = "d" * 200
    fd = os.open(root, os.O_RDONLY)
    fds = [fd]
    for _ in range(30):
        os.mkdir(long, dir_fd=fd)
        fd = os.open(long, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        fds.append(fd)
    os.close(os.open("leaf", _NEW, dir_fd=fd))
    found = [names(fd), outcome(os.stat, f"/{long}" * 25), outcome(os.stat, root + "/." * 2100)]
    os.unlink("leaf", dir_fd=fd)
    for number in range(30, 0, -1):
        os.close(fds[number])
        os.rmdir(long, dir_fd=fds[number - 1])
    os.close(fds[0])
    return found, names(root)


def file_is_no_directory_for_any_call(root: str) -> Any:
    put(f"{root}/file")
    put(f"{root}/other")
    below = f"{root}/file/name"
    return (
        [opening(below, flags) for flags in (os.O_RDONLY, _NEW, os.O_PATH)],
        [outcome(call, below) for call in (os.stat, os.lstat, os.unlink, os.rmdir, os.mkdir, os.readlink, os.mkfifo)],
        [outcome(call, below) for call in (os.listdir, os.statvfs)],
        [outcome(os.truncate, below, 0), outcome(os.chmod, below, 0), outcome(os.utime, below)],
        [outcome(os.link, f"{root}/other", below), outcome(os.rename, f"{root}/other", below)],
        [outcome(os.symlink, "x", below), outcome(os.link, below, f"{root}/new"), outcome(os.rename, below, root)],
    )


def dots_are_the_directory_and_its_parent(root: str) -> Any:
    os.makedirs(f"{root}/a/b")
    put(f"{root}/a/file", b"content")
    same = [
        os.path.samefile(f"{root}/{one}", f"{root}/{two}")
        for one, two in (("a/.", "a"), ("a/..", "."), ("a/b/..", "a"), ("a/b/../..", "."), ("a/./b/../file", "a/file"))
    ]
    found = [outcome(os.mkdir, f"{root}/{name}") for name in (".", "..", "a/.", "a/..")]
    found += [outcome(os.rmdir, f"{root}/{name}") for name in ("a/.", "a/..", "a/b/.")]
    return same, found, outcome(os.lstat, f"{root}/missing/.."), outcome(os.lstat, f"{root}/a/file/..")


def missing_name_appears_when_it_is_made(root: str) -> Any:
    found = []
    for number in range(3):
        path = f"{root}/{number}"
        found.append([outcome(os.stat, path), outcome(os.stat, path)])
        put(path, b"x" * number)
        found.append([os.stat(path).st_size])
        os.unlink(path)
        found.append([outcome(os.stat, path), opening(path, os.O_RDONLY)])
    return found


BEHAVIOURS = collect(globals())
