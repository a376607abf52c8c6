"""What is mounted where: /proc/PID/mountinfo as proc_pid_mountinfo(5) describes it, in bytes.

Layer: linux (bottom). It only reads, and it never looks into a mount: that could wait for a dead server for ever.
"""

from __future__ import annotations

import errno
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# What stat(2) and open(2) answer on a mount that belongs to another user, or whose server has died.
NOT_MINE = frozenset((errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ESTALE))


class Mount:
    """One line of mountinfo. `device` is `major:minor`; one superblock has one, however often it is mounted."""

    __slots__ = ("device", "fstype", "id", "mount_point", "options", "parent", "root", "source", "super_options")

    def __init__(
        self,
        id: int,  # noqa: A002  the man page's word
        parent: int,
        device: bytes,
        root: bytes,
        mount_point: bytes,
        options: bytes,
        fstype: bytes,
        source: bytes,
        super_options: bytes,
    ) -> None:
        self.id = id
        self.parent = parent
        self.device = device
        self.root = root
        self.mount_point = mount_point
        self.options = options
        self.fstype = fstype
        self.source = source
        self.super_options = super_options

    def __repr__(self) -> str:
        return "Mount(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__) + ")"

    @property
    def is_fuse(self) -> bool:
        """True for the types fuse and fuse.SUBTYPE; fuseblk is a block device's, never ours."""
        return self.fstype == b"fuse" or self.fstype.startswith(b"fuse.")

    @property
    def user_id(self) -> int | None:
        """The uid that owns a FUSE mount, in the user namespace that mounted it; None for other types."""
        for option in self.super_options.split(b","):
            if option.startswith(b"user_id="):
                return int(option[8:])
        return None


def unescape(field: bytes) -> bytes:
    r"""Undo the octal escapes of mountinfo: \040 for a blank, also \011, \012, \043 and \134."""
    if b"\\" not in field:
        return field
    first, *rest = field.split(b"\\")
    parts = [first]
    for part in rest:
        if len(part) >= 3 and not part[:3].strip(b"01234567"):
            parts.append(bytes((int(part[:3], 8) & 0xFF,)) + part[3:])
        else:
            parts.append(b"\\" + part)
    return b"".join(parts)


def parse(text: bytes) -> Iterator[Mount]:
    """The mounts in a mountinfo text, in its order. A line that is not one is left out."""
    for line in text.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        fields = before.split(b" ")
        tail = after.split(b" ")
        if not separator or len(fields) < 6 or len(tail) < 2 or not (fields[0].isdigit() and fields[1].isdigit()):
            continue
        yield Mount(
            int(fields[0]),
            int(fields[1]),
            fields[2],
            unescape(fields[3]),
            unescape(fields[4]),
            fields[5],
            unescape(tail[0]),
            unescape(tail[1]),
            tail[2] if len(tail) > 2 else b"",
        )


def read(pid: int | str = "self") -> bytes:
    """The mountinfo text of a process.

    The kernel hands it out page by page, so mounts that come and go meanwhile can be listed twice or not at all. It
    also reports a change as a poll(2) event, and then the text is read anew; on a machine where mounts change all
    the time the fourth text is taken as it is.
    """
    fd = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        watch = select.poll()
        watch.register(fd, select.POLLPRI)
        for _ in range(4):
            watch.poll(0)  # forgets the changes so far
            os.lseek(fd, 0, os.SEEK_SET)
            parts = []
            while part := os.read(fd, 1 << 16):
                parts.append(part)
            if not watch.poll(0):
                break
        return b"".join(parts)
    finally:
        os.close(fd)


def mounts(pid: int | str = "self") -> list[Mount]:
    """All mounts that a process sees; what lies on top of another at the same place comes later."""
    return list(parse(read(pid)))


def by_id(mount_id: int, text: bytes | None = None) -> Mount | None:
    """The mount with that id, None if there is none (any more). Ids are given out again later."""
    text = b"\n" + (read() if text is None else text) + b"\n"
    start = text.find(b"\n%d " % mount_id)
    if start < 0:
        return None
    return next(parse(text[start + 1 : text.find(b"\n", start + 1)]), None)


def at(path: bytes, text: bytes | None = None) -> Mount | None:
    """The topmost mount exactly at an absolute path without symlinks, by name only: nothing there is touched."""
    found = None
    for mount in parse(read() if text is None else text):
        if mount.mount_point == path:
            found = mount
    return found


def holding(path: bytes, text: bytes | None = None) -> Mount | None:
    """The mount that an absolute path without symlinks lies on, by the longest name: nothing there is touched."""
    found = None
    for mount in parse(read() if text is None else text):
        point = mount.mount_point
        inside = path == point or path.startswith(point if point.endswith(b"/") else point + b"/")
        if inside and (found is None or len(point) >= len(found.mount_point)):
            found = mount
    return found


def id_of_fd(fd: int, pid: int | str = "self") -> int | None:
    """The id of the mount that an open descriptor (O_PATH also) belongs to, from /proc/PID/fdinfo.

    None for one that is not open. Raises PermissionError for a process of somebody else's.
    """
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as info:
            for line in info:
                if line.startswith(b"mnt_id:"):
                    return int(line[7:])
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None


def id_of_path(path: bytes) -> int | None:
    """The id of the mount that is on top at a path, None if the path cannot be opened.

    O_PATH on the root of a FUSE mount asks its server nothing, so this holds for a server's own mount and for a dead
    one too.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return id_of_fd(fd)
    finally:
        os.close(fd)


def stat_if_mine(path: bytes) -> os.stat_result | None:
    """lstat(2), or None for what belongs to others, is dead or is gone: scanning all mounts meets all three."""
    try:
        return os.lstat(path)
    except OSError as error:
        if error.errno in NOT_MINE:
            return None
        raise
