"""Names in a served host directory: lookup, forget, and everything that makes, moves or removes one.

Layer `fs`, a part of `Passthrough`. Names are one component each, checked by the session; descriptors of directories
and O_NOFOLLOW do the rest: no path of the client's is ever resolved.
"""

from __future__ import annotations

import errno
import os
from time import monotonic
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import S_IFDIR, S_IFMT, device
from fusewire.fs.passthrough.watch import Watch
from fusewire.linux import files
from fusewire.wire import abi

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.fs.passthrough.nodes import Fd, Node
    from fusewire.ops import Caller


class Names(Watch):
    """The operations on names."""

    def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
        nodes = self.nodes
        above = nodes.get(parent)
        directory = above.fd or nodes.fd(above)
        if self.watching:
            self._look_at(above, directory)
        if not above.looked:
            above.looked_since = monotonic()
        above.looked += 1
        status = files.status_if_any(directory.number, name, files.AT_SYMLINK_NOFOLLOW)
        if status is None:
            return self._missing
        nodeid, node = nodes.enter(above, directory, name, status)
        return self._entry(nodeid, node, status)

    def forget(self, nodeid: int, nlookup: int) -> None:
        node = self.nodes.forget(nodeid, nlookup)
        if node is not None and self.watching:
            self._look_away(node)

    def readlink(self, nodeid: int) -> bytes:
        fd = self.nodes.fd(self.nodes.get(nodeid))
        try:
            return os.readlink(b"", dir_fd=fd.number)
        except FileNotFoundError:  # readlinkat(2) says so of an O_PATH descriptor of anything else
            raise OSError(errno.EINVAL, "not a symbolic link", nodeid) from None

    # Making

    def _make(self, caller: Caller, parent: int, name: bytes, make: Callable[[int], None]) -> bytes:
        """Have `make(directory's descriptor)` create `name` as the caller, and look it up."""
        above = self.nodes.get(parent)
        directory = self.nodes.fd(above)
        self._changing(above, name)
        labels = self._labels(caller)
        person = self._as(caller)
        try:
            make(directory.number)
        finally:
            if person is not None:
                person.leave()
        if labels:
            self._set_labels(directory, name, labels)
        return self._found(above, directory, name)

    def _labels(self, caller: Caller) -> list[tuple[bytes, bytes]]:
        """Give the security labels that came with the request, under the names that they have on the host."""
        extensions = caller.extensions
        if extensions is None or not extensions.security:
            return []
        mapped = self._xattrs
        return [(mapped.to_host(name) if mapped is not None else name, value) for name, value in extensions.security]

    def _set_labels(self, directory: Fd, name: bytes, labels: list[tuple[bytes, bytes]]) -> None:
        """Label what was made just now; if that fails, it must not stay without."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.number)
        try:
            for label, value in labels:
                os.setxattr(b"%s%d" % (self._proc, fd), label, value)
        except OSError:
            if os.fstat(fd).st_mode & S_IFMT == S_IFDIR:
                os.rmdir(name, dir_fd=directory.number)
            else:
                os.unlink(name, dir_fd=directory.number)
            raise
        finally:
            os.close(fd)

    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> bytes:
        number = device(rdev)
        with self._umask(umask):
            return self._make(caller, parent, name, lambda at: os.mknod(name, mode & 0o177777, number, dir_fd=at))

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> bytes:
        with self._umask(umask):
            return self._make(caller, parent, name, lambda at: os.mkdir(name, mode & 0o7777, dir_fd=at))

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> bytes:
        return self._make(caller, parent, name, lambda at: os.symlink(target, name, dir_fd=at))

    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> bytes:
        above = self.nodes.get(newparent)
        directory = self.nodes.fd(above)
        fd = self.nodes.fd(self.nodes.get(nodeid))
        self._changing(above, newname)
        # By /proc: AT_EMPTY_PATH would take CAP_DAC_READ_SEARCH. The magic link leads to the inode itself, also to one
        # that has no name any more or is a symlink.
        files.linkat(files.AT_FDCWD, self._path(fd), directory.number, newname, files.AT_SYMLINK_FOLLOW)
        return self._found(above, directory, newname)

    # Removing and moving. Whoever still has the inode in use goes on using it: its descriptor is opened first.

    def unlink(self, caller: Caller, parent: int, name: bytes) -> None:
        self._remove(parent, name, os.unlink)

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> None:
        self._remove(parent, name, os.rmdir)

    def _remove(self, parent: int, name: bytes, remove: Callable[..., None]) -> None:
        above = self.nodes.get(parent)
        directory = self.nodes.fd(above)
        kept = self.nodes.keep(directory, name)
        self._changing(above, name)
        try:
            remove(name, dir_fd=directory.number)
        except OSError:
            if kept is not None:
                kept.pinned = False
            raise

    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        nodes = self.nodes
        above, below = nodes.get(parent), nodes.get(newparent)
        source, target = nodes.fd(above), nodes.fd(below)
        self._changing(above, name)
        self._changing(below, newname)
        other: Node | None = None
        kept: Node | None = None
        with nodes.moving:
            moved = nodes.at(source, name)
            if flags & files.RENAME_EXCHANGE:
                other = nodes.at(target, newname)
            elif not flags & files.RENAME_NOREPLACE:
                kept = nodes.keep(target, newname)
            person = self._as(caller) if flags & files.RENAME_WHITEOUT else None
            try:
                if flags:
                    files.renameat2(source.number, name, target.number, newname, flags)
                else:
                    os.rename(name, newname, src_dir_fd=source.number, dst_dir_fd=target.number)
            except OSError:
                if kept is not None:
                    kept.pinned = False
                raise
            finally:
                if person is not None:
                    person.leave()
            if moved is not None:
                moved.parent, moved.name = below, newname
            if other is not None:
                other.parent, other.name = above, name

    def _umask(self, mask: int) -> Umask | NoUmask:
        if not self.flags & abi.FUSE_DONT_MASK:
            if getattr(self._threads, "own_umask", False):
                return _NO_UMASK
            mask = 0
        return Umask(self, mask)


class NoUmask:
    """A umask that is right already: this worker's own, and the kernel has applied the caller's."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NO_UMASK = NoUmask()


class Umask:
    """The umask of this thread alone, for the time of one creation.

    The kernel has applied the caller's already; only with POSIX ACLs, where a directory's default ACL takes its place,
    that is left to the host. Ours must not be in the way: each worker has one of its own, 0 (unshare(2), CLONE_FS).
    Where a container forbids that, creations take turns.
    """

    __slots__ = ("_before", "_lock", "_mask")

    def __init__(self, owner: Names, mask: int) -> None:
        local = owner._threads
        if not hasattr(local, "own_umask"):
            try:
                files.unshare_fs()
                local.own_umask = True
                os.umask(0)
            except OSError:
                local.own_umask = False
        self._lock = None if local.own_umask else owner._umask_lock
        self._mask = mask
        self._before = 0

    def __enter__(self) -> None:
        if self._lock is not None:
            self._lock.acquire()
        if self._mask or self._lock is not None:
            self._before = os.umask(self._mask)

    def __exit__(self, *_: object) -> None:
        if self._mask or self._lock is not None:
            os.umask(self._before)
        if self._lock is not None:
            self._lock.release()
