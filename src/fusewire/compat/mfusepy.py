"""The interface of mfusepy 3, served by Fusewire: `import fusewire.compat.mfusepy as mfusepy`.

Layer `compat`. mfusepy is fusepy's continuation, and differs in how a program's methods are called: directly, not
through `operations(name, ...)`; and what a class does not override is not there at all.
"""

from __future__ import annotations

import errno
import functools
import logging

from fusewire.compat import fusepy
from fusewire.compat.fusepy import (
    ENOTSUP,
    FuseOSError,
    c_stat,
    c_statvfs,
    c_timespec,
    c_utimbuf,
    fuse_context,
    fuse_exit,
    fuse_file_info,
    fuse_get_context,
    log,
    set_st_attrs,
    time_of_timespec,
)
from fusewire.compat.structures import fuse_config, fuse_conn_info

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from fusewire.compat.bridge_base import Calls
    from fusewire.compat.options import Settings
    from fusewire.ops import Connection

ENOATTR = errno.ENODATA  # as Linux calls it
# What a program may ask for: the libfuse whose behaviour it sees.
fuse_version_major = 3
fuse_version_minor = 10

callback_logger = logging.getLogger("fuse.log-mixin")

__all__ = [
    "ENOTSUP",
    "FUSE",
    "FuseOSError",
    "LoggingMixIn",
    "Operations",
    "c_stat",
    "c_statvfs",
    "c_timespec",
    "c_utimbuf",
    "fuse_config",
    "fuse_conn_info",
    "fuse_context",
    "fuse_exit",
    "fuse_file_info",
    "fuse_get_context",
    "log",
    "log_callback",
    "overrides",
    "set_st_attrs",
    "time_of_timespec",
]


def __getattr__(name: str) -> Any:
    """Give what fusepy's does, and `ReadDirResult`, a type for annotations."""
    if name == "ReadDirResult":
        from collections.abc import Iterable

        return Iterable[str | tuple[str, dict[str, int], int] | tuple[str, int, int]]
    return fusepy.__getattr__(name)


class FUSE(fusepy.FUSE):
    """Mounts a program's operations, and serves them until the mount is gone: as `fusepy.FUSE`, in mfusepy's manner."""

    @staticmethod
    def _calls(operations: Any) -> Calls:
        return _Calls(operations)


class Operations(fusepy.Operations):
    """What a program derives its filesystem from; a method that it does not override is an operation it has not.

    Beside fusepy's: `readdir_with_offset`, `init_with_config`, `flock` and `fallocate`.
    """

    __call__: Any = None  # mfusepy calls the methods themselves

    def init_with_config(self, conn_info: Any, config_3: Any) -> None:
        """Begin: instead of `init`, with what was agreed on and libfuse 3's options, which may be changed."""

    def readdir_with_offset(self, path: str, offset: int, fh: int) -> Any:
        """Give (name, attributes or mode, offset) of what comes after an `offset`; 0 is the beginning."""
        return [".", ".."]

    def flock(self, path: str, fh: int, op: int) -> int:
        """Take or drop a lock, flock(2)."""
        raise FuseOSError(errno.ENOSYS)

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        """Reserve or punch space, fallocate(2)."""
        raise FuseOSError(errno.ENOSYS)

    def lock(self, path: str, fh: int, cmd: int, lock: Any) -> int:
        """Take, drop or look at a record lock, fcntl_locking(2); `lock` points to a c_flock_t."""
        raise FuseOSError(errno.ENOSYS)

    def bmap(self, path: str, blocksize: int, idx: Any) -> int:
        """Map a block; nobody asks, as no block device is mounted."""
        return 0

    def poll(self, path: str, fh: int, ph: Any, reventsp: Any) -> int:
        """Wait for readiness; never called: the kernel takes a file for always ready."""
        raise FuseOSError(errno.ENOSYS)

    def read_buf(self, path: str, bufpp: Any, size: int, offset: int, fh: int) -> int:
        """Read into libfuse's buffers; never called, `read` is."""
        raise FuseOSError(errno.ENOSYS)

    def write_buf(self, path: str, buf: Any, offset: int, fh: int) -> int:
        """Write from libfuse's buffers; never called, `write` is."""
        raise FuseOSError(errno.ENOSYS)


def _inherited(name: str) -> Any:
    """Make a method that is there to be overridden: it does what the base class does, and is marked as ignored."""
    base = getattr(Operations, name)

    @functools.wraps(base)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base(self, *args, **kwargs)

    method.libfuse_ignore = True  # type: ignore[attr-defined]
    return method


# The mark that programs look for as well.
for _name in {*vars(fusepy.Operations), *vars(Operations)}:
    if not _name.startswith("_") and _name != "getattr" and callable(getattr(Operations, _name)):
        setattr(Operations, _name, _inherited(_name))
del _name


def _logged(method: Callable[..., Any], *args: Any) -> Any:
    name = getattr(method, "__name__", repr(method))
    callback_logger.debug("-> %s %s", name, repr(args))
    result: Any = "[Unhandled Exception]"
    try:
        result = method(*args)
        return result
    except OSError as error:
        result = str(error)
        raise
    finally:
        callback_logger.debug("<- %s %s", name, repr(result))


class LoggingMixIn:
    """Derived from before Operations, reports every call and what came of it to the logger `fuse.log-mixin`."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or not callable(value) or not hasattr(Operations, name):
            return value
        return value if getattr(value, "libfuse_ignore", False) else functools.partial(_logged, value)


def log_callback(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate one method to be reported as LoggingMixIn does all of them."""

    def logged(*args: Any) -> Any:
        return _logged(method, *args)

    return logged


def overrides(parent_class: type) -> Callable[[Any], Any]:
    """Decorate a method that is meant to override one of `parent_class`.

    Raises TypeError if there is none of that name.
    """

    def check(method: Any) -> Any:
        if not callable(getattr(parent_class, method.__name__, None)):
            raise TypeError(f"{parent_class.__name__} has no method {method.__name__}")
        return method

    return check


class _Calls:
    """mfusepy's manner: methods are called themselves, and those that are marked as ignored are not there."""

    lock_pointer = True

    def __init__(self, operations: Any) -> None:
        self._operations = operations
        self.call = self._call
        self.create_flags = not self._takes("create", 2)
        # libfuse 3 has lost the handle on the way to mfusepy's truncate, which may have no place for it.
        self.truncate_handle = not self._takes("truncate", 2)

    def _takes(self, name: str, count: int) -> bool:
        """Tell whether a method takes so many arguments, and no more."""
        if not self.has(name):
            return False
        import inspect

        try:
            return len(inspect.signature(getattr(self._operations, name)).parameters) == count
        except ValueError:
            return False  # built in, and written without a signature

    def _call(self, name: str, *args: Any) -> Any:
        return getattr(self._operations, name)(*args)

    def has(self, name: str) -> bool:
        method = getattr(self._operations, name, None)
        return method is not None and not getattr(method, "libfuse_ignore", False)

    def own(self, name: str) -> bool:
        return self.has(name)

    def init(self, connection: Connection, settings: Settings) -> None:
        if not self.has("init_with_config"):
            if self.has("init"):
                self._operations.init("/")
            return
        info = fuse_conn_info(7, connection.minor, connection.max_write, 0, connection.max_readahead)
        info.capable = info.want = connection.flags & 0xFFFFFFFF
        config = fuse_config(
            entry_timeout=settings.entry_timeout,
            attr_timeout=settings.attr_timeout,
            negative_timeout=settings.negative_timeout,
        )
        switches = ("hard_remove", "use_ino", "direct_io", "kernel_cache", "auto_cache")
        for switch in switches:
            setattr(config, switch, getattr(settings, switch))
        self._operations.init_with_config(info, config)
        for switch in switches:
            setattr(settings, switch, bool(getattr(config, switch)))
        settings.entry_timeout, settings.attr_timeout = config.entry_timeout, config.attr_timeout
        settings.negative_timeout = config.negative_timeout
        for name, said in (("uid", config.set_uid), ("gid", config.set_gid), ("umask", config.set_mode)):
            if said:
                setattr(settings, name, getattr(config, name))
