"""The C structures that fusepy's interface shows to a program: what libfuse would have passed by pointer.

Layer `compat`. Laid out as <fuse.h> of libfuse 2.9 has them on Linux, since a program may take their address; nobody
here reads them by it, except for `c_flock_t`, which <fcntl.h> has as `flock`.
"""

from __future__ import annotations

import ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class c_timespec(ctypes.Structure):  # noqa: N801 - the interface's name
    """struct timespec."""

    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class c_utimbuf(ctypes.Structure):  # noqa: N801 - the interface's name
    """The two times of utimensat(2), named."""

    _fields_ = [("actime", c_timespec), ("modtime", c_timespec)]


class c_stat(ctypes.Structure):  # noqa: N801 - the interface's name
    """The members of struct stat, stat(3type); in an order of our own, since nothing but their names counts here."""

    _fields_ = [
        ("st_dev", ctypes.c_ulonglong),
        ("st_ino", ctypes.c_ulonglong),
        ("st_nlink", ctypes.c_ulong),
        ("st_mode", ctypes.c_uint),
        ("st_uid", ctypes.c_uint),
        ("st_gid", ctypes.c_uint),
        ("st_rdev", ctypes.c_ulonglong),
        ("st_size", ctypes.c_longlong),
        ("st_blksize", ctypes.c_long),
        ("st_blocks", ctypes.c_longlong),
        ("st_atimespec", c_timespec),
        ("st_mtimespec", c_timespec),
        ("st_ctimespec", c_timespec),
    ]


class c_statvfs(ctypes.Structure):  # noqa: N801 - the interface's name
    """struct statvfs, statvfs(3)."""

    _fields_ = [
        (name, ctypes.c_ulong)
        for name in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
            "f_fsid",
            "f_flag",
            "f_namemax",
        )
    ]


class fuse_file_info(ctypes.Structure):  # noqa: N801 - the interface's name
    """What `raw_fi=True` passes in the place of a handle: one object from open to release, so it may carry more.

    `flags` are those of open(2). `open` and `create` may set `fh`, `direct_io`, `keep_cache` and `nonseekable`.
    """

    _fields_ = [
        ("flags", ctypes.c_int),
        ("fh_old", ctypes.c_ulong),
        ("writepage", ctypes.c_int),
        ("direct_io", ctypes.c_uint, 1),
        ("keep_cache", ctypes.c_uint, 1),
        ("flush", ctypes.c_uint, 1),
        ("nonseekable", ctypes.c_uint, 1),
        ("flock_release", ctypes.c_uint, 1),
        ("padding", ctypes.c_uint, 27),
        ("fh", ctypes.c_uint64),
        ("lock_owner", ctypes.c_uint64),
    ]


class fuse_context(ctypes.Structure):  # noqa: N801 - the interface's name
    """Who asks, as libfuse keeps it."""

    _fields_ = [
        ("fuse", ctypes.c_void_p),
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("pid", ctypes.c_int),
        ("private_data", ctypes.c_void_p),
        ("umask", ctypes.c_uint),
    ]


class fuse_conn_info(ctypes.Structure):  # noqa: N801 - the interface's name
    """What INIT has agreed on, for `init_with_config`; to be read, for it has been answered."""

    _fields_ = [
        (name, ctypes.c_uint)
        for name in (
            "proto_major",
            "proto_minor",
            "max_write",
            "max_read",
            "max_readahead",
            "capable",
            "want",
            "max_background",
            "congestion_threshold",
            "time_gran",
        )
    ]


class fuse_config(ctypes.Structure):  # noqa: N801 - the interface's name
    """libfuse 3's own options, for `init_with_config`, which may change them."""

    _fields_ = [
        ("set_gid", ctypes.c_int),
        ("gid", ctypes.c_uint),
        ("set_uid", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("set_mode", ctypes.c_int),
        ("umask", ctypes.c_uint),
        ("entry_timeout", ctypes.c_double),
        ("negative_timeout", ctypes.c_double),
        ("attr_timeout", ctypes.c_double),
        ("intr", ctypes.c_int),
        ("intr_signal", ctypes.c_int),
        ("remember", ctypes.c_int),
        ("hard_remove", ctypes.c_int),
        ("use_ino", ctypes.c_int),
        ("readdir_ino", ctypes.c_int),
        ("direct_io", ctypes.c_int),
        ("kernel_cache", ctypes.c_int),
        ("auto_cache", ctypes.c_int),
        ("ac_attr_timeout_set", ctypes.c_int),
        ("ac_attr_timeout", ctypes.c_double),
        ("nullpath_ok", ctypes.c_int),
        ("show_help", ctypes.c_int),
        ("modules", ctypes.c_char_p),
        ("debug", ctypes.c_int),
    ]


class c_flock_t(ctypes.Structure):  # noqa: N801 - the interface's name
    """struct flock, fcntl(2): what `lock` is given a pointer to, or the address of."""

    _fields_ = [
        ("l_type", ctypes.c_short),
        ("l_whence", ctypes.c_short),
        ("l_start", ctypes.c_longlong),
        ("l_len", ctypes.c_longlong),
        ("l_pid", ctypes.c_int),
    ]


class fuse_buf(ctypes.Structure):  # noqa: N801 - the interface's name
    """libfuse's buffer; no method gets one, signatures name it."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_longlong),
    ]


class fuse_bufvec(ctypes.Structure):  # noqa: N801 - the interface's name
    """Several of them."""

    _fields_ = [
        ("count", ctypes.c_size_t),
        ("idx", ctypes.c_size_t),
        ("off", ctypes.c_size_t),
        ("buf", ctypes.POINTER(fuse_buf)),
    ]


# Names of types that programs have in their signatures and structures.
c_dev_t = ctypes.c_ulonglong
c_fsblkcnt_t = c_fsfilcnt_t = ctypes.c_ulonglong
c_gid_t = c_mode_t = c_uid_t = ctypes.c_uint
c_off_t = ctypes.c_longlong
c_pid_t = ctypes.c_int
c_byte_p = ctypes.POINTER(ctypes.c_byte)
c_uint64_p = ctypes.POINTER(ctypes.c_uint64)
c_stat_p = ctypes.POINTER(c_stat)
c_statvfs_p = ctypes.POINTER(c_statvfs)
c_utimbuf_p = ctypes.POINTER(c_utimbuf)
fuse_fi_p = ctypes.POINTER(fuse_file_info)
fuse_bufvec_p = ctypes.POINTER(fuse_bufvec)
fuse_bufvec_pp = ctypes.POINTER(fuse_bufvec_p)
fuse_pollhandle_p = ctypes.c_void_p
FuseConnInfoPointer = ctypes.POINTER(fuse_conn_info)
FuseConfigPointer = ctypes.POINTER(fuse_config)


def time_of_timespec(ts: Any, use_ns: bool = False) -> float:
    """Give a c_timespec as nanoseconds, or as seconds with a fraction."""
    if use_ns:
        return int(ts.tv_sec * 10**9 + ts.tv_nsec)
    return float(ts.tv_sec + ts.tv_nsec / 1e9)


def split_time(value: float, use_ns: bool) -> tuple[int, int]:
    """Split a time, nanoseconds or seconds with a fraction, into whole seconds and the nanoseconds after them."""
    if use_ns:
        return divmod(int(value), 10**9)
    whole = int(value // 1)
    return whole, int((value - whole) * 1e9)


def set_st_attrs(st: Any, attrs: dict[str, Any], use_ns: bool = False) -> None:
    """Write the members that a dict of attributes names into a c_stat; names that it has not are left out."""
    for name, value in attrs.items():
        if name in ("st_atime", "st_mtime", "st_ctime"):
            spec = getattr(st, name + "spec")
            spec.tv_sec, spec.tv_nsec = split_time(value, use_ns)
        elif hasattr(st, name):
            setattr(st, name, value)
