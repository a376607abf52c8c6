"""Landlock: a process without any privilege takes file and network access from itself, for good (landlock(7)).

Layer: linux. The rules hold for the calling thread and those that it starts later, so it belongs before the first
other thread. It decides nothing: which directory, and whether it is wanted at all, is said by the caller.

What it adds to another sandbox: an open(2), link, rename or unlink outside of the tree is refused whatever way leads
there, also by `..` from a descriptor of a directory outside. What it does not see: stat(2), readlink(2), chdir(2) and
chmod(2) by path, descriptors that are open already, and O_PATH.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from fusewire.linux import syscalls

_NR_CREATE_RULESET = 444
_NR_ADD_RULE = 445
_NR_RESTRICT_SELF = 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

# LANDLOCK_ACCESS_FS_*, <linux/landlock.h>
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
_REFER = 1 << 13  # ABI 2
_TRUNCATE = 1 << 14  # ABI 3
_IOCTL_DEV = 1 << 15  # ABI 5
_FIRST = _REFER - 1  # all of ABI 1
_NET_TCP = 0b11  # ABI 4: BIND_TCP and CONNECT_TCP
_SCOPED = 0b11  # ABI 6: ABSTRACT_UNIX_SOCKET and SIGNAL

READ_ONLY = READ_FILE | READ_DIR
# Nothing in the tree is executed by a server (but see the plan's `executes`), and no device in it is its business.
READ_WRITE = (_FIRST | _REFER | _TRUNCATE) & ~EXECUTE

# Before ABI 2 a rename or a link from one directory to another is refused (EXDEV) whatever the rules say.
MOVES_FILES = 2


def abi() -> int:
    """The version of Landlock in this kernel, 0 if there is none for us: landlock_create_ruleset(2)."""
    return max(0, _version())


def missing() -> str:
    """Why there is no Landlock here, or an empty string."""
    if _version() >= 0:
        return ""
    number = ctypes.get_errno()
    if number == errno.EOPNOTSUPP:
        return "Landlock is switched off in this kernel (`landlock` is missing from the boot option lsm=)"
    if number == errno.ENOSYS:
        return (
            "this kernel has no Landlock (Linux 5.13 and later do, where it is built in), or a seccomp filter hides it"
        )
    return f"Landlock cannot be used: {os.strerror(number)}"


def _version() -> int:
    return syscalls._syscall(_NR_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)


def handled(version: int) -> tuple[int, int, int]:
    """All that this version can forbid: file accesses, network accesses, scopes. What has no rule is forbidden then."""
    files = _FIRST
    for since, bit in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if version >= since:
            files |= bit
    return files, _NET_TCP if version >= 4 else 0, _SCOPED if version >= 6 else 0


def restrict(version: int, allowed: tuple[tuple[int, int], ...]) -> None:
    """Forbid this thread everything that `version` can forbid, except the file accesses below some directories.

    `allowed` are pairs of a directory's descriptor (O_PATH will do) and the accesses. TCP and, from ABI 6 on, abstract
    sockets and signals to processes outside are forbidden altogether. no_new_privs must be set.

    Raises OSError: EPERM without no_new_privs, E2BIG after 16 layers of rules.
    """
    files, net, scoped = handled(version)
    fields = (files, net, scoped)[: 1 if version < 4 else 2 if version < 6 else 3]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = syscalls._syscall(_NR_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        syscalls._fail("landlock_create_ruleset")
    try:
        for directory, access in allowed:
            rule = struct.pack("=Qi", access & files, directory)
            if syscalls._syscall(_NR_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0):
                syscalls._fail("landlock_add_rule")
        if syscalls._syscall(_NR_RESTRICT_SELF, ruleset, 0):
            syscalls._fail("landlock_restrict_self")
    finally:
        os.close(ruleset)
