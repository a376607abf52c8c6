"""From the kernel's requests, by node id, to the methods of a fusepy program, by path.

Layer `compat`. It does what libfuse's high level does between the two: names and paths, attributes after every change,
files that are removed while they are open, listings kept for one reading. What a program's class does not offer is
taken out of a subclass made for it (`bridge`), so that the session answers and the kernel stops asking.

The manner of calling is the `Calls` that the interface gives: fusepy's or mfusepy's.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from fusewire.compat.bridge_base import Calls, answered, done
from fusewire.compat.bridge_files import LAST_BYTE, Files
from fusewire.compat.paths import Node
from fusewire.compat.structures import fuse_file_info
from fusewire.ops import Attr, Caller, Entry, Operations, Setattr, Statfs
from fusewire.session import to_errno
from fusewire.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.compat.options import Settings

_HIDING_TRIES = 10

# Request -> the program's methods any of which make it worth asking. Others are always served.
_NEEDS: dict[str, tuple[str, ...]] = {
    "symlink": ("symlink",),
    "mknod": ("mknod", "create"),
    "mkdir": ("mkdir",),
    "unlink": ("unlink",),
    "rmdir": ("rmdir",),
    "rename": ("rename",),
    "link": ("link",),
    "readlink": ("readlink",),
    "access": ("access",),
    "setxattr": ("setxattr",),
    "getxattr": ("getxattr",),
    "listxattr": ("listxattr",),
    "removexattr": ("removexattr",),
    "create": ("create",),
    "write": ("write",),
    "flush": ("flush", "lock"),
    "fsync": ("fsync",),
    "fsyncdir": ("fsyncdir",),
    "ioctl": ("ioctl",),
    "fallocate": ("fallocate",),
    "statfs": ("statfs",),
    "getlk": ("lock",),
    "setlk": ("lock", "flock"),
    "setlkw": ("lock", "flock"),
}
# What fusepy's own class answers to these is what the kernel takes for granted where it is told not to ask.
_NOTHING = frozenset(
    {"access", "flush", "fsync", "fsyncdir", "ioctl", "lock", "flock", "statfs", "getxattr", "setxattr", "removexattr"}
)


class Bridge(Files):
    """A program's filesystem as the session wants it; made by `bridge`."""

    # Names

    @answered
    def lookup(self, caller: Caller, parent: int, name: bytes) -> Entry | None:
        directory = self._node(parent)
        try:
            return self._entry(directory, name, self._paths.child(directory, name))
        except OSError as error:
            if to_errno(error) != errno.ENOENT:
                raise
        if self._settings.negative_timeout:
            return Entry(0, (0,) * 16, self._settings.negative_timeout)
        return None

    def forget(self, nodeid: int, nlookup: int) -> None:
        self._paths.forget(nodeid, nlookup)

    @answered
    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Entry:
        directory = self._node(parent)
        path = self._paths.child(directory, name)
        done(self._call("symlink", path, self._decoded(target)))
        return self._entry(directory, name, path)

    @answered
    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> Entry:
        directory = self._node(parent)
        path = self._paths.child(directory, name)
        if stat.S_ISREG(mode) and self._calls.has("create"):  # as libfuse: who can create needs no mknod for files
            try:
                fh = self._create(path, mode, fuse_file_info(flags=os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except OSError as error:
                if to_errno(error) != errno.ENOSYS:
                    raise
            else:
                try:
                    return self._entry(directory, name, path)
                finally:
                    if self._calls.has("release"):
                        self._call("release", path, fh)
        self._need("mknod")
        done(self._call("mknod", path, mode, rdev))
        return self._entry(directory, name, path)

    @answered
    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> Entry:
        directory = self._node(parent)
        path = self._paths.child(directory, name)
        done(self._call("mkdir", path, mode))
        return self._entry(directory, name, path)

    @answered
    def unlink(self, caller: Caller, parent: int, name: bytes) -> None:
        directory = self._node(parent)
        with self._paths.moving(self._paths.find(directory, name)):
            if not self._hide(directory, name):
                done(self._call("unlink", self._paths.child(directory, name)))
                self._paths.remove(directory, name)

    @answered
    def rmdir(self, caller: Caller, parent: int, name: bytes) -> None:
        directory = self._node(parent)
        done(self._call("rmdir", self._paths.child(directory, name)))
        self._paths.remove(directory, name)

    @answered
    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        if flags:
            raise OSError(errno.EINVAL, "rename(old, new) knows no flags")  # callers fall back to none
        paths = self._paths
        old, new = paths.get(parent), paths.get(newparent)
        paths.use(old, new)
        moved, replaced = paths.find(old, name), paths.find(new, newname)
        with paths.moving(moved, replaced):
            if replaced is not moved:
                self._hide(new, newname)
            done(self._call("rename", paths.child(old, name), paths.child(new, newname)))
            paths.move(old, name, new, newname)

    def _hide(self, directory: Node, name: bytes) -> bool:
        """Rename a file that is open out of the way, as libfuse does, since a path is all that a program has of it.

        It is removed with its last handle. False if it is not open, or the program cannot rename. Nobody else may use
        the file meanwhile (`PathTable.moving`).
        """
        node = self._paths.find(directory, name)
        if node is None or not node.opens or self._settings.hard_remove or not self._calls.own("rename"):
            return False
        path = self._paths.child(directory, name)
        for attempt in range(_HIDING_TRIES):
            hidden = b".fuse_hidden%08x%08x" % (node.id, attempt)
            place = self._paths.child(directory, hidden)
            try:
                self._call("getattr", place, None)
            except OSError as error:
                if to_errno(error) != errno.ENOENT:
                    raise
                done(self._call("rename", path, place))
                self._paths.move(directory, name, directory, hidden)
                node.hidden = True
                return True
        raise OSError(errno.EBUSY, "every name to hide the open file by is taken", path)

    @answered
    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> Entry:
        directory = self._paths.get(newparent)
        self._paths.use(directory, self._paths.get(nodeid))
        path = self._paths.child(directory, newname)
        done(self._call("link", path, self._paths.path(nodeid)))
        return self._entry(directory, newname, path)

    @answered
    def readlink(self, nodeid: int) -> bytes:
        return self._encoded(self._call("readlink", self._path(nodeid)))

    # Attributes

    @answered
    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[Attr, float]:
        if flags & abi.FUSE_GETATTR_FH:
            attrs = self._call("getattr", self._open_path(nodeid), self._fh(fh))
        else:
            attrs = self._call("getattr", self._path(nodeid), None)
        attr = self._attr(nodeid, attrs)
        if attr[10] and self._paths.get(nodeid).hidden:  # its one name is ours
            attr = (*attr[:10], attr[10] - 1, *attr[11:])
        return attr, self._settings.attr_timeout

    @answered
    def setattr(self, caller: Caller, nodeid: int, change: Setattr) -> tuple[Attr, float]:
        valid = change.valid
        fh = None
        path: str | None
        if valid & abi.FATTR_FH:
            fh = self._fh(change.fh)
            path = self._open_path(nodeid)
        else:
            path = self._path(nodeid)
        if valid & abi.FATTR_MODE:
            self._need("chmod")
            done(self._call("chmod", path, change.mode))
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            self._need("chown")
            uid = change.uid if valid & abi.FATTR_UID else -1
            gid = change.gid if valid & abi.FATTR_GID else -1
            done(self._call("chown", path, uid, gid))
        if valid & abi.FATTR_SIZE:
            self._need("truncate")
            done(
                self._call(
                    "truncate", path, change.size, *(() if fh is None or not self._calls.truncate_handle else (fh,))
                )
            )
        if valid & (abi.FATTR_ATIME | abi.FATTR_MTIME):
            self._need("utimens")
            done(self._call("utimens", path, self._times(path, fh, change)))
        return self._attr(nodeid, self._call("getattr", path, fh)), self._settings.attr_timeout

    def _times(self, path: str | None, fh: Any, change: Setattr) -> tuple[float, float]:
        """Give both times; the one that stays as it is (UTIME_OMIT of utimensat(2)) as the program has it."""
        before: Any = {}
        if change.valid & (abi.FATTR_ATIME | abi.FATTR_MTIME) != abi.FATTR_ATIME | abi.FATTR_MTIME:
            before = self._call("getattr", path, fh)
        atime, mtime = before.get("st_atime", 0), before.get("st_mtime", 0)
        if change.valid & abi.FATTR_ATIME:
            atime = self._time(change.atime, change.atimensec)
        if change.valid & abi.FATTR_MTIME:
            mtime = self._time(change.mtime, change.mtimensec)
        return atime, mtime

    def _time(self, seconds: int, nanoseconds: int) -> float:
        if seconds > LAST_BYTE:
            seconds -= 1 << 64
        return seconds * 10**9 + nanoseconds if self._use_ns else seconds + nanoseconds / 1e9

    @answered
    def access(self, caller: Caller, nodeid: int, mask: int) -> None:
        done(self._call("access", self._path(nodeid), mask))

    @answered
    def setxattr(self, caller: Caller, nodeid: int, name: bytes, value: bytes, flags: int, setxattr_flags: int) -> None:
        done(self._call("setxattr", self._path(nodeid), self._decoded(name), bytes(value), flags))

    @answered
    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        result = self._call("getxattr", self._path(nodeid), self._decoded(name))
        done(result)
        # fusepy's own example answers '' for none, which it lets pass.
        return self._encoded(result) if isinstance(result, str) else bytes(memoryview(result))

    @answered
    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        names = self._call("listxattr", self._path(nodeid)) or ()
        return b"".join(self._encoded(name) + b"\0" for name in names)

    @answered
    def removexattr(self, caller: Caller, nodeid: int, name: bytes) -> None:
        done(self._call("removexattr", self._path(nodeid), self._decoded(name)))

    # The whole

    @answered
    def statfs(self, nodeid: int) -> Statfs:
        get = self._call("statfs", self._path(nodeid)).get
        frsize = int(get("f_frsize", 0) or get("f_bsize", 0) or 512)
        return Statfs(
            int(get("f_blocks", 0)),
            int(get("f_bfree", 0)),
            int(get("f_bavail", 0)),
            int(get("f_files", 0)),
            int(get("f_ffree", 0)),
            int(get("f_bsize", 0) or frsize),
            int(get("f_namemax", 0) or 255),
            frsize,
        )


def bridge(calls: Calls, settings: Settings, **arguments: Any) -> Bridge:
    """Make the Bridge of one program: a subclass of its own, without the requests that its class does not offer."""

    def wanted(name: str) -> bool:
        return calls.own(name) if name in _NOTHING else calls.has(name)

    absent = [name for name, needs in _NEEDS.items() if not any(map(wanted, needs))]
    members = {name: getattr(Operations, name) for name in absent}
    kind: type[Bridge] = type("Bridge", (Bridge,), members)
    return kind(calls, settings, **arguments)
