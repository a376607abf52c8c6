"""The interface of fusepy 3, served by Fusewire: `import fusewire.compat.fusepy as fuse`.

Layer `compat`. The same names, signatures and options; no libfuse is loaded, and nobody needs to be root. Where it
differs on purpose, docs/fusepy.md says so.
"""

from __future__ import annotations

import errno
import logging
import os
from stat import S_IFDIR

from fusewire.compat import structures
from fusewire.compat.structures import (
    c_stat,
    c_statvfs,
    c_timespec,
    c_utimbuf,
    fuse_context,
    fuse_file_info,
    set_st_attrs,
    time_of_timespec,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from fusewire.compat.bridge_base import Calls
    from fusewire.compat.options import Settings
    from fusewire.ops import Connection

ENOTSUP = errno.ENOTSUP

log = logging.getLogger("fuse")

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
    "fuse_context",
    "fuse_exit",
    "fuse_file_info",
    "fuse_get_context",
    "log",
    "set_st_attrs",
    "time_of_timespec",
]


def __getattr__(name: str) -> Any:
    """Give the errno constants and the other C types too, which programs import from here."""
    if name in errno.errorcode.values():
        return getattr(errno, name)
    if name.startswith(("c_", "fuse_", "Fuse")) and hasattr(structures, name):
        return getattr(structures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class FuseOSError(OSError):
    """The failure of an operation: an errno with its usual text."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno, os.strerror(errno))


def fuse_get_context() -> tuple[int, int, int]:
    """Give (uid, gid, pid) of the process whose request this thread serves; zeros where it serves none."""
    from fusewire.compat.context import CONTEXT

    return CONTEXT.ids()


def fuse_exit() -> None:
    """Unmount, and have `FUSE()` return; to be called by an operation.

    Raises RuntimeError outside of one.
    """
    from fusewire.compat.context import CONTEXT

    if CONTEXT.runner is None:
        raise RuntimeError("fuse_exit() can be called by an operation only: it ends the mount that asks")
    CONTEXT.runner.end()


class FUSE:
    """Mounts a program's operations, and serves them until the mount is gone.

    `raw_fi`: `open`, `create` and all that have a handle get a `fuse_file_info` in its place. Names are decoded by
    `encoding` and `errors`. `foreground=False` goes on in a child, and this process ends. `nothreads`: one request at
    a time, in the thread that calls. All other keywords are mount options: True, or a value.

    Raises RuntimeError if nothing could be mounted; its cause says why, and so does standard error. Raises what `init`
    has raised, or what was no Exception in an operation; LookupError for an encoding that is none.
    """

    OPTIONS = (("foreground", "-f"), ("debug", "-d"), ("nothreads", "-s"))

    def __init__(
        self,
        operations: Any,
        mountpoint: Any,
        raw_fi: bool = False,
        encoding: str = "utf-8",
        errors: str = "surrogateescape",
        **kwargs: Any,
    ) -> None:
        import codecs

        from fusewire.compat import bridge, options, running

        self.operations = operations
        self.raw_fi = raw_fi
        self.encoding = encoding
        codecs.lookup(encoding)
        self.errors = errors
        self.use_ns = bool(getattr(operations, "use_ns", False))
        try:
            settings = options.parse(type(operations).__name__, kwargs)
            filesystem = bridge.bridge(
                self._calls(operations),
                settings,
                raw_fi=raw_fi,
                encoding=encoding,
                errors=errors,
                use_ns=self.use_ns,
                nullpath=bool(getattr(operations, "flag_nullpath_ok", False)),
            )
            held = running.Held(os.path.join(os.getcwdb(), os.fsencode(mountpoint)), settings.kernel)
            filesystem.owner = held.owner
            if not settings.foreground:
                running.go_to_background(held)
        except (OSError, ValueError) as error:
            self._complain(error)
            raise RuntimeError(1) from error
        runner = running.Runner(filesystem, held, settings)
        runner.run()
        del self.operations  # the program's object may end with the mount
        if filesystem.critical is not None:
            raise filesystem.critical
        if runner.failure is not None:
            self._complain(runner.failure)
            raise RuntimeError(1) from runner.failure

    @staticmethod
    def _complain(error: BaseException) -> None:
        import sys

        print(f"fuse: {error}", file=sys.stderr)

    @staticmethod
    def _calls(operations: Any) -> Calls:
        return _Calls(operations)


class Operations:
    """What a program derives its filesystem from: paths begin with `/`, failure is an OSError such as FuseOSError.

    `use_ns = True` has times be nanoseconds; else they are seconds with a fraction.
    """

    def __call__(self, op: str, *args: Any) -> Any:
        """Call an operation by its name; all of them go through here, so a class may override it.

        Raises FuseOSError(EFAULT) for one that is not there.
        """
        method = getattr(self, op, None)
        if method is None:
            raise FuseOSError(errno.EFAULT)
        return method(*args)

    def access(self, path: str, amode: int) -> Any:
        """Check access(2)."""
        return 0

    bmap: Any = None

    def chmod(self, path: str, mode: int) -> Any:
        """Set the mode, chmod(2); with its type bits."""
        raise FuseOSError(errno.EROFS)

    def chown(self, path: str, uid: int, gid: int) -> Any:
        """Set owner and group, chown(2); -1 leaves one as it is."""
        raise FuseOSError(errno.EROFS)

    def create(self, path: str, mode: int, fi: Any = None) -> Any:
        """Make and open a file, and give its handle; with `raw_fi` set it in `fi`."""
        raise FuseOSError(errno.EROFS)

    def destroy(self, path: str) -> Any:
        """End: the mount is gone. `path` is `/`."""

    def flush(self, path: str, fh: Any) -> Any:
        """Answer close(2) of one descriptor."""
        return 0

    def fsync(self, path: str, datasync: int, fh: Any) -> Any:
        """Make a file durable, fsync(2)."""
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: Any) -> Any:
        """Make a directory durable."""
        return 0

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        """Give attributes by their names in stat(3type): st_mode with its type bits, st_size, st_mtime, ..."""
        if path != "/":
            raise FuseOSError(errno.ENOENT)
        return {"st_mode": S_IFDIR | 0o755, "st_nlink": 2}

    def getxattr(self, path: str, name: str, position: int = 0) -> Any:
        """Give the bytes of an extended attribute, getxattr(2)."""
        raise FuseOSError(ENOTSUP)

    def init(self, path: str) -> Any:
        """Begin, in the process that serves: the place to start threads. `path` is `/`."""

    def ioctl(self, path: str, cmd: int, arg: Any, fip: Any, flags: int, data: Any) -> Any:
        """Serve ioctl(2); `data` is the address of what goes in and out, _IOC_SIZE(cmd) bytes."""
        raise FuseOSError(errno.ENOTTY)

    def link(self, target: str, source: str) -> Any:
        """Give the file `source` another name, `target`, link(2)."""
        raise FuseOSError(errno.EROFS)

    def listxattr(self, path: str) -> Iterable[str]:
        """Give the names of all extended attributes."""
        return []

    lock: Any = None

    def mkdir(self, path: str, mode: int) -> Any:
        """Make a directory, mkdir(2)."""
        raise FuseOSError(errno.EROFS)

    def mknod(self, path: str, mode: int, dev: int) -> Any:
        """Make a node, mknod(2)."""
        raise FuseOSError(errno.EROFS)

    def open(self, path: str, flags: Any) -> Any:
        """Open a file and give its handle, a number; with `raw_fi`, `flags` is a fuse_file_info to set it in."""
        return 0

    def opendir(self, path: str) -> Any:
        """Open a directory and give its handle, a number."""
        return 0

    def read(self, path: str, size: int, offset: int, fh: Any) -> Any:
        """Give up to `size` bytes at `offset`; fewer mean the end of the file."""
        raise FuseOSError(errno.EIO)

    def readdir(self, path: str, fh: Any) -> Iterable[Any]:
        """Give the names in a directory, or (name, attributes or None, 0) of each."""
        return [".", ".."]

    def readlink(self, path: str) -> str:
        """Give what a symbolic link holds, readlink(2)."""
        raise FuseOSError(errno.ENOENT)

    def release(self, path: str, fh: Any) -> Any:
        """End a handle: the last descriptor is closed."""
        return 0

    def releasedir(self, path: str, fh: Any) -> Any:
        """End a directory's handle."""
        return 0

    def removexattr(self, path: str, name: str) -> Any:
        """Remove an extended attribute, removexattr(2)."""
        raise FuseOSError(ENOTSUP)

    def rename(self, old: str, new: str) -> Any:
        """Move a name, rename(2)."""
        raise FuseOSError(errno.EROFS)

    def rmdir(self, path: str) -> Any:
        """Remove an empty directory, rmdir(2)."""
        raise FuseOSError(errno.EROFS)

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> Any:
        """Set an extended attribute, setxattr(2)."""
        raise FuseOSError(ENOTSUP)

    def statfs(self, path: str) -> dict[str, Any]:
        """Give statistics by their names in statvfs(3)."""
        return {}

    def symlink(self, target: str, source: str) -> Any:
        """Make a symbolic link `target` that holds `source`, symlink(2)."""
        raise FuseOSError(errno.EROFS)

    def truncate(self, path: str, length: int, fh: Any = None) -> Any:
        """Set the size, truncate(2) and ftruncate(2)."""
        raise FuseOSError(errno.EROFS)

    def unlink(self, path: str) -> Any:
        """Remove a name, unlink(2)."""
        raise FuseOSError(errno.EROFS)

    def utimens(self, path: str, times: Any = None) -> Any:
        """Set (access time, modification time), utimensat(2)."""
        return 0

    def write(self, path: str, data: bytes, offset: int, fh: Any) -> Any:
        """Write at `offset`, and give the count of bytes."""
        raise FuseOSError(errno.EROFS)


class LoggingMixIn:
    """Derived from before Operations, reports every call and what came of it to the logger `fuse.log-mixin`."""

    log = logging.getLogger("fuse.log-mixin")

    def __call__(self, op: str, path: Any, *args: Any) -> Any:
        """Call an operation by its name, and log it at level DEBUG."""
        self.log.debug("-> %s %s %s", op, path, repr(args))
        result: Any = "[Unhandled Exception]"
        try:
            result = getattr(self, op)(path, *args)
            return result
        except OSError as error:
            result = str(error)
            raise
        finally:
            self.log.debug("<- %s %s", op, repr(result))


class _Calls:
    """fusepy's manner: `operations(name, ...)`, and whatever is not None is there."""

    create_flags = False
    truncate_handle = True
    lock_pointer = False

    def __init__(self, operations: Any) -> None:
        self._operations = operations
        self.call = operations
        # A class with a __call__ of its own wants to see all of them.
        self._plain = getattr(type(operations), "__call__", None) is Operations.__call__  # noqa: B004 - which one, not whether

    def has(self, name: str) -> bool:
        if name in ("readdir_with_offset", "fallocate", "flock"):  # mfusepy's
            return False
        return getattr(self._operations, name, None) is not None

    def own(self, name: str) -> bool:
        if not self.has(name):
            return False
        method = getattr(self._operations, name)
        return not self._plain or getattr(method, "__func__", method) is not getattr(Operations, name, None)

    def init(self, connection: Connection, settings: Settings) -> None:
        if self.has("init"):
            self.call("init", "/")
