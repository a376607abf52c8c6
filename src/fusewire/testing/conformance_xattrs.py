"""Behaviours of extended attributes, POSIX access control lists and inode flags.

Layer `testing`; see observe.py for what a transcript may hold. Values stay small: ext4 has one block for all of them.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

from fusewire.testing import calls
from fusewire.testing.observe import (
    Clock,
    collect,
    facts,
    in_child,
    names,
    needs,
    noise,
    opened,
    opening,
    outcome,
    plain,
    put,
)

_CREATE, _REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE
_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
# Tags of <linux/posix_acl.h>.
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32


def _users(path: str | int, **how: Any) -> list[str]:
    return sorted(name for name in os.listxattr(path, **how) if name.startswith(("user.", "trusted.", "system.posix")))


@needs("xattr")
def attributes_are_set_listed_and_removed(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    found = []
    for path in (put(f"{root}/file"), f"{root}/directory"):
        values = {"user.a": b"1", "user.empty": b"", "user.binary": bytes(range(256)), "user.long": noise(1500)}
        for name, value in values.items():
            os.setxattr(path, name, value)
        found.append([_users(path), [os.getxattr(path, name) == value for name, value in values.items()]])
        os.setxattr(path, "user.long", b"short")
        os.setxattr(path, "user.a", noise(500))
        os.removexattr(path, "user.empty")
        found.append([_users(path), plain(os.getxattr(path, "user.long")), plain(os.getxattr(path, "user.a"))])
    return found


@needs("xattr")
def creating_and_replacing_are_told_apart(root: str) -> Any:
    path = put(f"{root}/file")
    return (
        outcome(os.setxattr, path, "user.a", b"1", _REPLACE),
        outcome(os.setxattr, path, "user.a", b"2", _CREATE),
        outcome(os.setxattr, path, "user.a", b"3", _CREATE),
        outcome(os.getxattr, path, "user.a"),
        outcome(os.setxattr, path, "user.a", b"4", _REPLACE),
        outcome(os.getxattr, path, "user.a"),
        outcome(os.setxattr, path, "user.a", b"5", 8),
        outcome(os.removexattr, path, "user.a"),
        outcome(os.removexattr, path, "user.a"),
        outcome(os.getxattr, path, "user.a"),
        outcome(os.getxattr, f"{root}/missing", "user.a"),
    )


@needs("xattr")
def sizes_are_probed(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, "user.a", b"0123456789")
    os.setxattr(path, "user.empty", b"")
    found = [outcome(calls.getxattr, path, "user.a", size) for size in (0, 1, 9, 10, 11, 65536)]
    found += [outcome(calls.getxattr, path, "user.empty", size) for size in (0, 1)]
    listed = calls.listxattr(path, 0)
    exact = [outcome(calls.listxattr, path, size) == listed for size in (listed, listed + 100)]
    return found, exact, outcome(calls.listxattr, path, 5), listed >= len("user.a user.empty ")


@needs("xattr")
def attributes_have_limits(root: str) -> Any:
    path = put(f"{root}/file")
    long = "user." + "n" * 250
    return (
        outcome(os.setxattr, path, long, b"x"),
        outcome(os.getxattr, path, long),
        outcome(os.setxattr, path, long + "n", b"x"),
        outcome(os.getxattr, path, long + "n"),
        outcome(os.setxattr, path, "user.a", bytes(65537)),
        outcome(os.setxattr, path, "user.", b"x"),
        outcome(os.setxattr, path, "", b"x"),
        _users(path) == [long],
    )


@needs("xattr")
def unknown_namespaces_are_not_supported(root: str) -> Any:
    path = put(f"{root}/file")
    found = []
    for name in ("unknown.a", "user", "a", "system.unknown", "os2.a", ".a"):
        found.append([outcome(os.setxattr, path, name, b"x"), outcome(os.getxattr, path, name)])
        found.append([outcome(os.removexattr, path, name)])
    return found, _users(path)


@needs("xattr")
def attributes_of_users_are_for_files_and_directories(root: str) -> Any:
    put(f"{root}/file")
    os.symlink("file", f"{root}/link")
    os.mkfifo(f"{root}/fifo")
    found = []
    for name in ("link", "fifo"):
        path = f"{root}/{name}"
        found.append(outcome(os.setxattr, path, "user.a", b"x", follow_symlinks=False))
        found.append(outcome(os.getxattr, path, "user.a", follow_symlinks=False))
        found.append(_users(path, follow_symlinks=False))
    os.setxattr(f"{root}/link", "user.a", b"x")
    return found, _users(f"{root}/file")


@needs("xattr", "root")
def trusted_attributes_are_for_root(root: str) -> Any:
    put(f"{root}/file")
    os.symlink("file", f"{root}/link")
    os.mkfifo(f"{root}/fifo")
    found: list[Any] = []
    for name in ("file", "link", "fifo", "."):
        path = f"{root}/{name}"
        os.setxattr(path, "trusted.a", name.encode(), follow_symlinks=False)
        found += [outcome(os.getxattr, path, "trusted.a", follow_symlinks=False), _users(path, follow_symlinks=False)]
    os.removexattr(f"{root}/link", "trusted.a", follow_symlinks=False)
    return found, _users(f"{root}/link", follow_symlinks=False), _users(f"{root}/link")


@needs("xattr", "user_switch")
def trusted_attributes_are_hidden_from_others(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, "trusted.a", b"x")
    os.setxattr(path, "user.a", b"y")
    os.chmod(path, 0o666)
    ids: tuple[int, int, list[int]] = (1001, 1001, [])
    return (
        in_child(_users, path, ids=ids),
        in_child(os.getxattr, path, "trusted.a", ids=ids),
        in_child(os.setxattr, path, "trusted.a", b"z", ids=ids),
        in_child(os.getxattr, path, "user.a", ids=ids),
        in_child(os.setxattr, path, "user.a", b"z", ids=ids),
    )


@needs("xattr")
def trusted_attributes_need_the_capability(root: str) -> Any:
    path = put(f"{root}/file")
    found = [outcome(os.setxattr, path, "trusted.a", b"x"), outcome(os.getxattr, path, "trusted.a")]
    return found, outcome(os.removexattr, path, "trusted.a")


@needs("xattr", "user_switch")
def attributes_follow_the_mode(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, "user.a", b"x")
    ids: tuple[int, int, list[int]] = (1001, 1001, [])
    found = []
    for mode in (0o600, 0o604, 0o602, 0o606):
        os.chmod(path, mode)
        found.append(
            [in_child(os.getxattr, path, "user.a", ids=ids), in_child(os.setxattr, path, "user.a", b"x", ids=ids)]
        )
    os.mkdir(f"{root}/sticky")
    os.chmod(f"{root}/sticky", 0o1777)
    return found, in_child(os.setxattr, f"{root}/sticky", "user.a", b"x", ids=ids)


@needs("xattr")
def attributes_stay_with_the_file(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, "user.a", b"first")
    os.link(path, f"{root}/hard")
    os.rename(path, f"{root}/renamed")
    put(path)
    found = [_users(path), _users(f"{root}/hard"), _users(f"{root}/renamed")]
    os.setxattr(f"{root}/hard", "user.a", b"second")
    found.append(plain(os.getxattr(f"{root}/renamed", "user.a")))
    os.unlink(f"{root}/hard")
    os.unlink(f"{root}/renamed")
    put(f"{root}/hard")
    return found, _users(f"{root}/hard")


@needs("xattr")
def attributes_are_reached_by_descriptors(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path) as fd:
        os.setxattr(fd, "user.a", b"x")
        os.unlink(path)
        found = [outcome(os.setxattr, fd, "user.b", b"y"), _users(fd), plain(os.getxattr(fd, "user.b"))]
        found.append(outcome(os.removexattr, fd, "user.a"))
        return found, _users(fd)


@needs("xattr")
def many_attributes_fit(root: str) -> Any:
    path = put(f"{root}/file")
    for number in range(40):
        os.setxattr(path, f"user.name {number:02}", b"value %d" % number)
    for number in range(0, 40, 2):
        os.removexattr(path, f"user.name {number:02}")
    return _users(path), plain(os.getxattr(path, "user.name 07"))


@needs("xattr")
def attributes_move_the_change_time_only(root: str) -> Any:
    path = put(f"{root}/file")
    clock = Clock(root)
    return (
        clock.moved(path, lambda: os.setxattr(path, "user.a", b"x")),
        clock.moved(path, lambda: os.setxattr(path, "user.a", b"y")),
        clock.moved(path, lambda: os.getxattr(path, "user.a")),
        clock.moved(path, lambda: os.listxattr(path)),
        clock.moved(path, lambda: os.removexattr(path, "user.a")),
    )


@needs("xattr", "root")
def security_attributes_are_kept(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, "security.fusewire", b"label")
    found = [outcome(os.getxattr, path, "security.fusewire"), "security.fusewire" in os.listxattr(path)]
    os.removexattr(path, "security.fusewire")
    return found, outcome(os.getxattr, path, "security.fusewire")


@needs("xattr", "root")
def capabilities_of_a_program_go_when_it_is_written(root: str) -> Any:
    path = put(f"{root}/file", b"program", 0o755)
    # VFS_CAP_REVISION_2 with CAP_NET_RAW permitted, capabilities(7).
    os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000000, 1 << 13, 0, 0, 0))
    found = [plain(os.getxattr(path, "security.capability"))]
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, b"P")
    found.append(outcome(os.getxattr, path, "security.capability"))
    os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000000, 1 << 13, 0, 0, 0))
    os.chown(path, 1001, 1001)
    return found, outcome(os.getxattr, path, "security.capability")


# Access control lists, acl(5): struct posix_acl_xattr_header and its entries.


def _acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, bits, who & 0xFFFFFFFF) for tag, bits, who in entries
    )


def _entries(data: bytes) -> list[tuple[int, int, int]]:
    return [(tag, bits, who) for tag, bits, who in struct.iter_unpack("<HHI", data[4:])]


def _common(user: int = 7, group: int = 5, mask: int = 7, other: int = 4) -> bytes:
    named = 1001 if os.geteuid() == 0 else os.geteuid()  # an id has to be mapped in the mount's user namespace
    return _acl(
        (_USER_OBJ, user, -1), (_USER, 6, named), (_GROUP_OBJ, group, -1), (_MASK, mask, -1), (_OTHER, other, -1)
    )


def _read(path: str, name: str = _ACCESS) -> Any:
    try:
        return _entries(os.getxattr(path, name))
    except OSError as error:
        return outcome(lambda error=error: (_ for _ in ()).throw(error))


@needs("acl")
def acl_is_kept_and_shows_in_the_mode(root: str) -> Any:
    path = put(f"{root}/file")
    found: list[Any] = [_read(path)]
    os.setxattr(path, _ACCESS, _common(mask=3))
    found += [_read(path), facts(path), _users(path)]
    os.setxattr(path, _ACCESS, _acl((_USER_OBJ, 6, -1), (_GROUP_OBJ, 4, -1), (_OTHER, 1, -1)))
    found += [_read(path), facts(path), _users(path)]
    os.setxattr(path, _ACCESS, _common())
    os.removexattr(path, _ACCESS)
    return *found, _read(path), facts(path)


@needs("acl")
def chmod_changes_the_acl(root: str) -> Any:
    path = put(f"{root}/file")
    os.setxattr(path, _ACCESS, _common())
    found = []
    for mode in (0o640, 0o707, 0o4755, 0o000):
        os.chmod(path, mode)
        found.append((facts(path), _read(path)))
    return found


@needs("acl")
def default_acl_is_inherited(root: str) -> Any:
    place = f"{root}/directory"
    os.mkdir(place)
    os.setxattr(place, _DEFAULT, _common(user=7, group=7, mask=7, other=5))
    before = os.umask(0o077)
    try:
        put(f"{place}/file", mode=0o664)
        os.mkdir(f"{place}/sub", 0o775)
        os.mkdir(f"{place}/sub/sub", 0o700)
        os.mkfifo(f"{place}/fifo", 0o640)
        os.symlink("x", f"{place}/link")
        with opened(place, os.O_TMPFILE | os.O_RDWR, 0o660) as fd:
            calls.link_fd(fd, f"{place}/nameless")
    finally:
        os.umask(before)
    found = []
    for name in ("", "file", "sub", "sub/sub", "fifo", "nameless"):
        path = f"{place}/{name}"
        found.append((name, facts(path), _read(path), _read(path, _DEFAULT)))
    return found, facts(f"{place}/link"), names(place)


@needs("acl")
def small_default_acl_replaces_the_umask(root: str) -> Any:
    place = f"{root}/directory"
    os.mkdir(place)
    os.setxattr(place, _DEFAULT, _acl((_USER_OBJ, 7, -1), (_GROUP_OBJ, 6, -1), (_OTHER, 1, -1)))
    before = os.umask(0o077)
    try:
        put(f"{place}/file", mode=0o666)
        os.mkdir(f"{place}/sub", 0o777)
    finally:
        os.umask(before)
    os.removexattr(place, _DEFAULT)
    put(f"{place}/later", mode=0o666)
    return [(facts(f"{place}/{name}"), _read(f"{place}/{name}")) for name in ("file", "sub", "later")], _read(
        place, _DEFAULT
    )


@needs("acl")
def acl_has_to_be_one(root: str) -> Any:
    path = put(f"{root}/file")
    os.symlink("file", f"{root}/link")
    bad = (
        b"",
        b"x",
        struct.pack("<I", 3),
        _common()[:-3],
        _acl((_USER_OBJ, 7, -1)),
        _acl((_USER_OBJ, 7, -1), (_USER, 7, 5), (_GROUP_OBJ, 7, -1), (_OTHER, 7, -1)),
        _acl((_OTHER, 7, -1), (_USER_OBJ, 7, -1), (_GROUP_OBJ, 7, -1)),
        _acl((_USER_OBJ, 15, -1), (_GROUP_OBJ, 7, -1), (_OTHER, 7, -1)),
    )
    found = [outcome(os.setxattr, path, _ACCESS, data) for data in bad]
    found.append(outcome(os.setxattr, path, _DEFAULT, _common()))
    found.append(outcome(os.setxattr, f"{root}/link", _ACCESS, _common(), follow_symlinks=False))
    found.append(outcome(os.removexattr, path, _ACCESS))
    return found, facts(path)


@needs("acl", "user_switch")
def acl_lets_in_whom_it_names(root: str) -> Any:
    path = put(f"{root}/file")
    os.chown(path, 1000, 1000)
    os.chmod(path, 0o600)

    def look() -> list[Any]:
        return [opening(path, flags) for flags in (os.O_RDONLY, os.O_WRONLY)]

    found = []
    for acl in (
        _common(),
        _common(mask=4),
        _acl((1, 6, -1), (4, 0, -1), (8, 4, 2002), (16, 7, -1), (32, 0, -1)),
        _acl((1, 6, -1), (2, 0, 1001), (4, 6, -1), (16, 7, -1), (32, 6, -1)),
    ):
        os.setxattr(path, _ACCESS, acl)
        for ids in ((1001, 1001, []), (1002, 2002, []), (1002, 1, [2002]), (1002, 1002, []), (1000, 1000, [])):
            found.append(in_child(look, ids=ids))
    found.append(in_child(os.setxattr, path, _ACCESS, _common(), ids=(1001, 1001, [])))
    os.removexattr(path, _ACCESS)
    return found, in_child(look, ids=(1001, 1001, []))


# Inode flags, ioctl_iflags(2)


def _flags(path: str) -> int:
    with opened(path) as fd:
        data = fcntl.ioctl(fd, calls.FS_IOC_GETFLAGS, bytes(8))
    return int(struct.unpack_from("=I", data)[0])


def _set_flags(path: str, flags: int) -> None:
    with opened(path) as fd:
        fcntl.ioctl(fd, calls.FS_IOC_SETFLAGS, struct.pack("=Q", flags))


@needs("inode_flags")
def inode_flags_are_kept(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    found: list[Any] = []
    for path in (put(f"{root}/file"), f"{root}/directory"):
        before = _flags(path)
        found += [before & calls.FS_NODUMP_FL, outcome(_set_flags, path, before | calls.FS_NODUMP_FL)]
        with opened(path) as fd:
            extended = struct.unpack("=5I8x", fcntl.ioctl(fd, calls.FS_IOC_FSGETXATTR, bytes(28)))
        found += [_flags(path) == before | calls.FS_NODUMP_FL, extended[0] & calls.FS_XFLAG_NODUMP, extended[3]]
        _set_flags(path, before)
        found.append(_flags(path) == before)
    return found


def unknown_control_calls_are_refused(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path) as fd, opened(root) as place:
        return [outcome(fcntl.ioctl, item, 0x5401, bytes(64)) for item in (fd, place)]  # TCGETS


BEHAVIOURS = collect(globals())
