"""What the requests of a bridge are made of: calling a program's methods, and what their answers mean.

Layer `compat`, below bridge_files.py and bridge.py. It serves no request but the first and the last.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import Any, Protocol

from fusewire.compat.paths import Node, PathTable
from fusewire.compat.structures import fuse_file_info, split_time
from fusewire.inodes import HandleTable
from fusewire.ops import Attr, Connection, Entry, Operations
from fusewire.session import to_errno
from fusewire.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.compat.options import Settings

log = logging.getLogger("fuse")

U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF


class Calls(Protocol):
    """How an interface calls a program's methods; which it would call (`has`), which are the program's own (`own`).

    create_flags, truncate_handle: they are given what they are named after. lock_pointer: `lock` is, not an address.
    """

    create_flags: bool
    truncate_handle: bool
    lock_pointer: bool
    call: Callable[..., Any]

    def has(self, name: str) -> bool: ...
    def own(self, name: str) -> bool: ...
    def init(self, connection: Connection, settings: Settings) -> None: ...


class Listing:
    """An open directory: the program's handle, and its names once they have been read."""

    __slots__ = ("entries", "fh")

    def __init__(self, fh: int) -> None:
        self.fh = fh
        self.entries: list[tuple[bytes, int, int]] | None = None


def answered(method: Any) -> Any:
    """Wrap a request's method so that whatever a program raises becomes the errno that fusepy would give."""
    name = method.__name__

    def answer(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except BaseException as error:  # noqa: BLE001 - the program's exceptions end here, each with an answer
            raise self.refusal(name, error) from None
        finally:
            self._paths.unuse()

    answer.__name__ = name
    return answer


def done(result: Any) -> None:
    """Take what a method without a value gives: a negative number is an errno, as in C."""
    if isinstance(result, int) and result < 0:
        raise OSError(-result, os.strerror(-result))


class Base(Operations):
    """A program's filesystem, without its requests."""

    def __init__(
        self,
        calls: Calls,
        settings: Settings,
        *,
        raw_fi: bool,
        encoding: str,
        errors: str,
        use_ns: bool,
        nullpath: bool,
    ) -> None:
        """Serve what `calls` reaches. nullpath: a file without a name any more is named None."""
        self._calls = calls
        self._call = calls.call
        self._settings = settings
        self._raw_fi = raw_fi
        self._encoding = encoding
        self._errors = errors
        self._use_ns = use_ns
        self._nullpath = nullpath
        self.owner: tuple[int, int] | None = None  # the only ids that the mount's user namespace knows, if that is so
        self._paths = PathTable(encoding, errors)
        self._handles: HandleTable[fuse_file_info] = HandleTable()
        self._listings: HandleTable[Listing] = HandleTable()
        self.critical: BaseException | None = None
        self.on_critical: Callable[[], None] | None = None
        # Programs empty a file in `truncate`; only who asks for it hears of O_TRUNC in `open`.
        self.refuse = 0 if settings.atomic_o_trunc else abi.FUSE_ATOMIC_O_TRUNC
        for flag, name in ((abi.FUSE_FLOCK_LOCKS, "flock"), (abi.FUSE_POSIX_LOCKS, "lock")):
            if not calls.own(name):
                self.refuse |= flag

    def refusal(self, name: str, error: BaseException) -> OSError:
        """Report what a method has raised, as fusepy does, and give the error to answer.

        An exception that is no Exception (SystemExit, KeyboardInterrupt) ends the mount, and `FUSE()` raises it.
        """
        if isinstance(error, OSError):
            number = to_errno(error)  # also of a bare FileNotFoundError, which fusepy cannot read
            if number:
                if log.isEnabledFor(logging.DEBUG):
                    kind, text = type(error), "%s raised %s: answered with errno %s"
                    log.debug(text, name, kind, number, exc_info=error)
                return error if error.errno == number else OSError(number, os.strerror(number))
            text = "%s raised an OSError whose errno is %s: answered with EINVAL"
            log.error(text, name, error.errno, exc_info=error)
        elif isinstance(error, Exception):
            log.error("%s raised what is no OSError: answered with EINVAL", name, exc_info=error)
        else:
            self.critical = self.critical or error
            log.critical("%s raised what ends the mount", name, exc_info=error)
            if self.on_critical is not None:
                self.on_critical()
            return OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    # Life

    def init(self, connection: Connection) -> None:
        try:
            self._calls.init(connection, self._settings)
        except BaseException as error:  # kept for `FUSE()`, which raises it when the mount is gone
            self.critical = error
            log.critical("init failed, which ends the mount", exc_info=True)
            raise OSError(errno.EFAULT, f"init: {error!r}") from error

    def destroy(self) -> None:
        if self._calls.has("destroy"):
            try:
                self._call("destroy", "/")
            except Exception:  # nobody is left to be told
                log.error("destroy failed", exc_info=True)
            except BaseException as error:  # noqa: BLE001 - SystemExit and its like: `FUSE()` raises it
                self.critical = self.critical or error

    # What everything below is made of

    def _need(self, name: str) -> None:
        if not self._calls.has(name):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _encoded(self, text: Any) -> bytes:
        return text if isinstance(text, bytes) else text.encode(self._encoding, self._errors)

    def _decoded(self, name: bytes) -> str:
        return name.decode(self._encoding, self._errors)

    def _fh(self, fh: int, flags: int = -1, owner: int = -1) -> Any:
        """Give what the program knows a handle by."""
        if not self._raw_fi:
            return fh
        info = self._handles.get(fh)
        if flags >= 0:
            info.flags = flags
        if owner >= 0:
            info.lock_owner = owner
        return info

    def _node(self, nodeid: int) -> Node:
        """Give the node that a request is about, whose path stays true until the answer."""
        node = self._paths.get(nodeid)
        self._paths.use(node)
        return node

    def _path(self, nodeid: int) -> str:
        self._node(nodeid)
        return self._paths.path(nodeid)

    def _open_path(self, nodeid: int) -> str | None:
        """Give the path for a method that has a handle; the last one it had, if that is gone."""
        node = self._node(nodeid)
        return None if self._nullpath and node.parent is None else node.path

    def _attr(self, nodeid: int, attrs: Any) -> Attr:
        """Make attributes of a dict as stat(2) names them; 0 where it has nothing, as libfuse."""
        get = attrs.get
        settings, use_ns = self._settings, self._use_ns
        mode, size, blocks = int(get("st_mode", 0)), int(get("st_size", 0)), get("st_blocks")
        uid, gid = get("st_uid", 0), get("st_gid", 0)
        if self.owner is not None:
            uid, gid = self.owner  # of any other, the kernel would refuse to change the file (HAS_UNMAPPED_ID)
        if settings.uid is not None:
            uid = settings.uid
        if settings.gid is not None:
            gid = settings.gid
        if settings.umask is not None:
            mode = stat.S_IFMT(mode) | (0o777 & ~settings.umask)
        atime, atimensec = split_time(get("st_atime", 0), use_ns)
        mtime, mtimensec = split_time(get("st_mtime", 0), use_ns)
        ctime, ctimensec = split_time(get("st_ctime", 0), use_ns)
        return (
            int(get("st_ino", nodeid)) & U64 if settings.use_ino else nodeid,
            size & U64,
            (size + 511) // 512 if blocks is None else int(blocks) & U64,
            atime & U64,
            mtime & U64,
            ctime & U64,
            atimensec,
            mtimensec,
            ctimensec,
            mode & U32,
            int(get("st_nlink", 1)) & U32,
            int(uid) & U32,
            int(gid) & U32,
            int(get("st_rdev", 0)) & U32,
            int(get("st_blksize", 0)) & U32,
            0,
        )

    def _entry(self, parent: Node, name: bytes, path: str, fh: Any = None) -> Entry:
        attrs = self._call("getattr", path, fh)
        self._attr(0, attrs)  # what is no attributes counts no lookup
        node = self._paths.enter(parent, name)
        settings = self._settings
        return Entry(node.id, self._attr(node.id, attrs), settings.entry_timeout, settings.attr_timeout)
