"""The keyword arguments of `FUSE()`: libfuse's mount options, read into plain values.

Layer `compat`. One table for what reaches the kernel and what libfuse's high level does itself; no I/O. A value is
written as the program's authors would have written it after -o: octal for umask, seconds for timeouts.
"""

from __future__ import annotations

import os

from fusewire.linux import syscalls
from fusewire.linux.mount_base import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Flags of mount(2): the word, what it sets, what it clears.
_FLAGS = {
    "ro": (syscalls.MS_RDONLY, 0),
    "rw": (0, syscalls.MS_RDONLY),
    "nosuid": (syscalls.MS_NOSUID, 0),
    "suid": (0, syscalls.MS_NOSUID),
    "nodev": (syscalls.MS_NODEV, 0),
    "dev": (0, syscalls.MS_NODEV),
    "noexec": (syscalls.MS_NOEXEC, 0),
    "exec": (0, syscalls.MS_NOEXEC),
    "noatime": (syscalls.MS_NOATIME, 0),
    "atime": (0, syscalls.MS_NOATIME),
    "nodiratime": (syscalls.MS_NODIRATIME, 0),
    "diratime": (0, syscalls.MS_NODIRATIME),
    "sync": (syscalls.MS_SYNCHRONOUS, 0),
    "async": (0, syscalls.MS_SYNCHRONOUS),
    "dirsync": (syscalls.MS_DIRSYNC, 0),
}
# Accepted without effect: libfuse's ways to make its own work cheaper, what is always so here, and what mount(8) and
# fstab hand on.
_IGNORED = frozenset(
    {
        "nonempty",
        "big_writes",
        "no_big_writes",
        "large_read",
        "intr",
        "intr_signal",
        "noforget",
        "remember",
        "nopath",
        "async_read",
        "sync_read",
        "splice_read",
        "no_splice_read",
        "splice_write",
        "no_splice_write",
        "splice_move",
        "no_splice_move",
        "readdir_ino",
        "no_rofd_flush",
        "no_auto_inval_data",
        "max_idle_threads",
        "async_dio",
        "no_async_dio",
        "parallel_direct_write",
        "parallel_direct_writes",
        "no_remote_lock",
        "no_remote_flock",
        "no_remote_posix_lock",
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "nofail",
        "_netdev",
        "relatime",
        "norelatime",
        "strictatime",
        "lazytime",
        "local",
        "volname",
        "iosize",
        "noappledouble",
        "noapplexattr",
        "defer_permissions",
        "auto_xattr",
        "no_atomic_o_trunc",
    }
)


class Settings:
    """What the options ask for. Times are seconds; None is "not said"."""

    __slots__ = (
        "ac_attr_timeout",
        "atomic_o_trunc",
        "attr_timeout",
        "auto_cache",
        "clone_fd",
        "congestion_threshold",
        "debug",
        "direct_io",
        "entry_timeout",
        "foreground",
        "gid",
        "hard_remove",
        "kernel",
        "kernel_cache",
        "max_background",
        "max_readahead",
        "max_threads",
        "max_write",
        "negative_timeout",
        "nothreads",
        "uid",
        "umask",
        "use_ino",
    )

    def __init__(self, fsname: str) -> None:
        self.kernel = Options(fsname=os.fsencode(fsname))
        self.foreground = self.nothreads = self.debug = False
        self.entry_timeout = self.attr_timeout = 1.0
        self.negative_timeout = 0.0
        self.ac_attr_timeout: float | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.umask: int | None = None
        self.kernel_cache = self.auto_cache = self.direct_io = False
        self.use_ino = self.hard_remove = self.atomic_o_trunc = self.clone_fd = False
        self.max_threads: int | None = None
        self.max_write: int | None = None
        self.max_readahead: int | None = None
        self.max_background: int | None = None
        self.congestion_threshold: int | None = None


def _octal(text: str) -> int:
    return int(text, 8)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds >= 0:
        raise ValueError
    return min(seconds, float(1 << 32))


def _number(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 0xFFFFFFFF:
        raise ValueError
    return number


def _count(text: str) -> int:
    return min(_number(text), 0xFFFF)  # fuse_init_out has 16 bits for it


_VALUES: dict[str, tuple[Callable[[str], Any], str]] = {
    "uid": (_number, "a user id"),
    "gid": (_number, "a group id"),
    "umask": (_octal, "octal permission bits"),
    "entry_timeout": (_seconds, "seconds"),
    "attr_timeout": (_seconds, "seconds"),
    "negative_timeout": (_seconds, "seconds"),
    "ac_attr_timeout": (_seconds, "seconds"),
    "max_threads": (_number, "a number"),
    "max_write": (_number, "a number of bytes"),
    "max_readahead": (_number, "a number of bytes"),
    "max_background": (_count, "a number"),
    "congestion_threshold": (_count, "a number"),
}
_SWITCHES = frozenset(
    {
        "foreground",
        "nothreads",
        "debug",
        "kernel_cache",
        "auto_cache",
        "direct_io",
        "use_ino",
        "hard_remove",
        "atomic_o_trunc",
        "clone_fd",
    }
)
_KERNEL_SWITCHES = frozenset({"allow_other", "allow_root", "default_permissions", "auto_unmount"})


def parse(fsname: str, arguments: Mapping[str, Any]) -> Settings:
    """Read the keyword arguments: True sets an option, False and None leave it alone, all else is its value.

    Raises ValueError that names the option.
    """
    settings = Settings(fsname)
    for name, value in arguments.items():
        if value is False or value is None:
            continue
        if value is True and "," in name:  # an -o string that was passed on whole
            for part in name.split(","):
                key, equals, text = part.partition("=")
                _take(settings, key, text if equals else True)
        else:
            _take(settings, name, value)
    settings.foreground = settings.foreground or settings.debug  # as libfuse's -d
    if settings.kernel.default_permissions is False and settings.kernel.allow_root:
        settings.kernel.default_permissions = True  # what `guarded` needs
    return settings


def _take(settings: Settings, name: str, value: Any) -> None:
    if name in _FLAGS:
        sets, clears = _FLAGS[name]
        settings.kernel.flags = settings.kernel.flags & ~clears | sets
    elif name in _KERNEL_SWITCHES:
        setattr(settings.kernel, name, True)
    elif name in _SWITCHES:
        setattr(settings, name, True)
    elif name == "fsname":
        settings.kernel.fsname = os.fsencode(str(value))
    elif name == "subtype":
        # All of ours begin so: `fusewire umount` knows by it what it may unmount.
        settings.kernel.subtype = os.fsencode(f"fusewire.{value}")
    elif name == "max_read":
        settings.kernel.max_read = _converted(name, value, _number, "a number of bytes")
    elif name in _VALUES:
        convert, what = _VALUES[name]
        setattr(settings, name, _converted(name, value, convert, what))
    elif name not in _IGNORED:
        raise ValueError(f"unknown option `{name}`: leave it out, or see the table of options in docs/fusepy.md")


def _converted(name: str, value: Any, convert: Callable[[str], Any], what: str) -> Any:
    try:
        return convert(str(value))
    except ValueError:
        raise ValueError(f"option `{name}` needs {what}, and {value!r} is none") from None
