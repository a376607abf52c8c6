"""POSIX access control lists as a filesystem has to keep them: acl(5) in the wire form of <linux/posix_acl_xattr.h>.

Layer `fs`, below memory.py; pure functions. The kernel does the checking of access (FUSE_POSIX_ACL); what is left to
the filesystem is to keep an ACL and the mode in step, and what new files inherit.
"""

from __future__ import annotations

import errno
from struct import Struct

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

_VERSION = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_TAGS = (_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER)  # in the order in which they have to come
_ENTRY = Struct("<HHI")
_HEADER = Struct("<I")
_NO_ID = 0xFFFFFFFF

Entries = list[tuple[int, int, int]]


def parse(data: bytes) -> Entries:
    """Give the entries (tag, permissions, id). Raises OSError(EINVAL) for what is no valid ACL, acl_valid(3)."""
    if len(data) < 4 or (len(data) - 4) % 8:
        raise OSError(errno.EINVAL, "an ACL has a header of 4 bytes and entries of 8")
    if _HEADER.unpack_from(data)[0] != _VERSION:
        raise OSError(errno.EOPNOTSUPP, "an ACL of an unknown version")
    entries: Entries = list(_ENTRY.iter_unpack(data[4:]))
    tags = [tag for tag, _, _ in entries]
    if not all(tag in _TAGS and bits <= 7 for tag, bits, _ in entries) or tags != sorted(tags):
        raise OSError(errno.EINVAL, "entries of an ACL are unknown or not in order")
    single = all(tags.count(tag) == 1 for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER)) and tags.count(_MASK) <= 1
    if not single or (len(entries) > 3 and _MASK not in tags):
        raise OSError(
            errno.EINVAL, "an ACL needs its owner, group, others and, with more than these, a mask, once each"
        )
    return entries


def pack(entries: Entries) -> bytes:
    """Give the wire form."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _permissions(entries: Entries, tag: int) -> int | None:
    return next((bits for kind, bits, _ in entries if kind == tag), None)


def to_mode(entries: Entries) -> int:
    """Give the nine permission bits that show an ACL: the group's are those of the mask if there is one."""
    mask = _permissions(entries, _MASK)
    group = mask if mask is not None else _permissions(entries, _GROUP_OBJ)
    return (_permissions(entries, _USER_OBJ) or 0) << 6 | (group or 0) << 3 | (_permissions(entries, _OTHER) or 0)


def with_mode(entries: Entries, mode: int) -> Entries:
    """Give the ACL after chmod(2): the group's bits go to the mask if there is one."""
    group = _MASK if _permissions(entries, _MASK) is not None else _GROUP_OBJ
    bits = {_USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, _OTHER: mode & 7}
    return [(tag, bits.get(tag, old), who) for tag, old, who in entries]


def is_mode_only(entries: Entries) -> bool:
    """Tell whether the mode says all that the ACL says, so that there is nothing to keep."""
    return len(entries) == 3


def inherit(default: Entries, mode: int) -> tuple[Entries, int]:
    """Give the access ACL and the mode of a new file that was asked for with `mode`, in a directory with `default`.

    The umask does not count then (acl(5), OBJECT CREATION AND DEFAULT ACLs).
    """
    allowed = to_mode(default) & mode
    return with_mode(default, allowed), mode & ~0o777 | allowed
