"""Capabilities by name, which ones a server keeps, and how the others are given up for good.

Layer: linux. It changes the calling thread only, so it belongs before the first other thread, and it never raises a
capability. What a kept capability is good for is decided by the user namespace: capabilities(7), user_namespaces(7).
"""

from __future__ import annotations

import errno

from fusewire.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_PR_CAPBSET_READ = 23

# <linux/capability.h>, in the order of the numbers.
NAMES = (
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner"),
    *("sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice"),
    *("sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap"),
    *("mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf"),
    "checkpoint_restore",
)
ALL = (1 << len(NAMES)) - 1
HANDLES = 1 << syscalls.CAP_DAC_READ_SEARCH  # open_by_handle_at(2)

# What acting for the users of another machine takes: their ids, their files' owners and modes, devices, file
# capabilities. Left out on purpose: LINUX_IMMUTABLE (of use for an ioctl only) and MAC_OVERRIDE.
KEPT = (
    1 << syscalls.CAP_CHOWN
    | 1 << syscalls.CAP_DAC_OVERRIDE
    | 1 << syscalls.CAP_FOWNER
    | 1 << syscalls.CAP_FSETID
    | 1 << syscalls.CAP_SETGID
    | 1 << syscalls.CAP_SETUID
    | 1 << syscalls.CAP_MKNOD
    | 1 << syscalls.CAP_SETFCAP
)


def names(mask: int) -> list[str]:
    """The names of a mask's capabilities; a number for one that is newer than this list."""
    return [NAMES[bit] if bit < len(NAMES) else str(bit) for bit in range(mask.bit_length()) if mask >> bit & 1]


def number(name: str) -> int:
    """The number of a capability by its name, with or without `cap_`, in any case. Raises ValueError."""
    word = name.strip().lower().removeprefix("cap_")
    if word not in NAMES:
        raise ValueError(f"{name!r} is no capability of capabilities(7), such as chown or sys_admin")
    return NAMES.index(word)


def parse_changes(text: str) -> tuple[tuple[str, bool], ...]:
    """Read `+x:-y` of --modcaps: pairs of a name and whether it is kept. Raises ValueError that names the bad part."""
    found = []
    for item in text.split(":"):
        if item[:1] not in ("+", "-"):
            raise ValueError(f"modcaps: {item!r} has neither + nor - before it, as in +sys_admin:-chown")
        found.append((NAMES[number(item[1:])], item[0] == "+"))
    return tuple(found)


def wanted(changes: Iterable[tuple[str, bool]], permitted: int, *, handles: bool = False, usual: int = KEPT) -> int:
    """The mask to keep: `usual`, with `handles` the one that they take, changed by --modcaps, as far as permitted.

    Of two changes to one capability the last one counts. Raises ValueError for an unknown name, for a capability that
    was asked for and that this process does not have, and for dropping the one that handles take.
    """
    mask = usual | (HANDLES if handles else 0)
    asked = 0
    for name, keep in changes:
        bit = 1 << number(name)
        mask, asked = (mask | bit, asked | bit) if keep else (mask & ~bit, asked & ~bit)
    if handles and not mask & HANDLES:
        raise ValueError(
            "modcaps: -dac_read_search drops what file handles take; do without them (--inode-file-handles=never), "
            "or leave it out"
        )
    if lacking := asked & ~permitted:
        raise ValueError(
            f"modcaps: this process may not keep {', '.join(names(lacking))}, which it does not have; start it with "
            "that capability, or leave it out"
        )
    return mask & permitted


def bounding() -> int:
    """The bounding set of this thread, as a mask: PR_CAPBSET_READ, prctl(2)."""
    mask = 0
    for bit in range(64):
        try:
            mask |= syscalls.prctl(_PR_CAPBSET_READ, bit) << bit
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # beyond the last one that this kernel has
    return mask


def drop(keep: int) -> bool:
    """Keep `keep` permitted and effective, and nothing inheritable, ambient or in the bounding set, in this thread.

    False if the bounding set could not be emptied, for want of CAP_SETPCAP: then only no_new_privs, which the caller
    must have set, stands between an execve(2) and what the set still has. The user id does not matter: also somebody
    who is not 0 may have capabilities, in a user namespace of his own all of them.

    Raises OSError: EPERM if `keep` has more than what is permitted.
    """
    try:
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel before 4.3 has no such set
            raise
    rest = bounding()
    emptied = not rest
    if rest and syscalls.has_capability(syscalls.CAP_SETPCAP):
        for bit in range(rest.bit_length()):
            if rest >> bit & 1:
                syscalls.capbset_drop(bit)
        emptied = True
    syscalls.capset(keep, keep, 0)
    return emptied
