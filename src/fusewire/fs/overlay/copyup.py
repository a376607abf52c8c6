"""Copying up: what is to be changed and is in the lower filesystem gets a copy in the upper one first.

Layer `fs`, a part of `fs.overlay`. The copy is made in the work directory, whole and with all that it has beside its
data, and then renamed into its place: nobody, not even after a crash, sees a part of it.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from fusewire.fs.overlay.base import Base
from fusewire.fs.overlay.layers import INO, OURSELVES, RDEV, SIZE, signed
from fusewire.fs.overlay.marks import NOT_HERE, is_private, remove_tree
from fusewire.fs.passthrough.base import device
from fusewire.fs.passthrough.nodes import Fd

if TYPE_CHECKING:
    from fusewire.fs.overlay.nodes import Node
    from fusewire.ops import Attr

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_S_IDS = stat.S_ISUID | stat.S_ISGID


class CopyUp(Base):
    """What makes upper nodes of lower ones."""

    def _copy_up(self, node: Node, length: int | None = None) -> None:
        """Have a node, and the directories above it, in the upper filesystem.

        Of a file that is about to be cut off, only `length` bytes are copied. Raises OSError as writing does.
        """
        if node.upper:
            return
        self._slow()
        with self._copying:
            chain: list[Node] = []
            at: Node | None = node
            while at is not None and not at.upper:
                chain.append(at)
                at = at.parent
            for at in reversed(chain):
                self._copy(at, length if at is node else None)

    def _copy(self, node: Node, length: int | None) -> None:
        attr = self._lower.attr(node.handed)
        name = self._marks.temporary()
        try:
            fd = self._make_copy(node, attr, name, length)
            with self._names:
                self._place_copy(node, name, fd)
        finally:
            remove_tree(self._work, name)  # nothing, if it has found its place

    def _make_copy(self, node: Node, attr: Attr, name: bytes, length: int | None) -> Fd:
        """Make a copy in the work directory, with all attributes; give a descriptor (O_PATH)."""
        work, kind = self._work, node.kind
        if kind == stat.S_IFREG:
            number = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=work)
            opened = Fd(number)
            size = attr[SIZE] if length is None else min(length, attr[SIZE])
            if size:
                self._lower.copy(node.lower, number, size)
        elif kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=work)
        elif kind == stat.S_IFLNK:
            os.symlink(self._lower.readlink(node.lower), name, dir_fd=work)
        else:
            os.mknod(name, kind | 0o600, device(attr[RDEV]), dir_fd=work)
        fd = Fd(os.open(name, _PATH, dir_fd=work))
        self._copy_attributes(node, attr, fd)
        if kind == stat.S_IFREG and self._durable and size:
            os.fsync(opened.number)
        return fd

    def _copy_attributes(self, node: Node, attr: Attr, fd: Fd) -> None:
        path = self._upper.path(fd)
        uid, gid = attr[11], attr[12]
        owned = self._upper.own(fd.number, uid, gid)
        if node.kind != stat.S_IFLNK:
            for name in self._lower.listxattr(OURSELVES, node.lower):
                if is_private(name):
                    continue
                try:
                    os.setxattr(path, name, self._lower.getxattr(OURSELVES, node.lower, name))
                except OSError as error:
                    # As far as allowed: who may not give a file capabilities, or whose filesystem has no such
                    # attributes, could not have set them on a file of his either.
                    if error.errno not in NOT_HERE | {errno.ENODATA}:
                        raise
            mode = stat.S_IMODE(attr[9])
            # Set-user-ID for somebody else than it was meant for is taken away.
            os.chmod(path, mode if owned else mode & ~_S_IDS if node.kind == stat.S_IFREG else mode)
        self._upper.set_times(fd.number, (signed(attr[3]), attr[6]), (signed(attr[4]), attr[7]))

    def _place_copy(self, node: Node, name: bytes, fd: Fd) -> None:
        """Move a copy to where its node is now, and have the node be there."""
        parent = node.parent
        if parent is None:
            if node.kind == stat.S_IFDIR:
                raise FileNotFoundError(errno.ENOENT, "the directory has been removed", node.name)
            os.unlink(name, dir_fd=self._work)  # so has the file's name
            upper = self._upper.adopt(fd)
            ino = os.fstat(fd.number).st_ino
        else:
            above = self._upper.reach(parent.upper)
            path = self._upper.path(above)
            before = os.stat(path)
            os.rename(name, node.name, src_dir_fd=self._work, dst_dir_fd=above.number)
            # That was no change to who looks at the directory.
            try:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            except PermissionError:  # a directory that is somebody else's
                pass
            found = self._upper.find(parent.upper, node.name)
            if found is None:
                raise OSError(errno.ESTALE, "somebody else has removed a file from the upper directory", node.name)
            upper, ino = found[0], found[1][INO]
        if type(node.key) is tuple:
            # One of several names of a lower file is a file of its own from now on (the kernel's overlayfs does the
            # same, without an index), and must not be taken for the same as the other names.
            node.ino = ino
            self._shown.pop(ino, None)
            self._tell(node)
        else:
            self._shown[ino] = node.ino
        self._nodes.put_upper(node, upper)

    def _tell(self, node: Node) -> None:
        """Have the kernel ask for a node's attributes anew, and list its directory anew: its number has changed."""
        connection = self._connection
        if connection is not None:
            connection.notify_inval_inode(node.nodeid, -1)  # a negative offset: no pages
            if node.parent is not None:
                connection.notify_inval_inode(node.parent.nodeid)

    def _copy_tree(self, node: Node) -> None:
        """Have all of a directory in the upper filesystem, and nothing of it depend on the lower one.

        A directory can be moved then; called with `_copying` held. Each step leaves the tree as it looks.
        """
        self._copy_up(node)
        # Directories on the way down, each with the names that are still to come; a tree may be deeper than the stack.
        way: list[tuple[Node, list[bytes]]] = [(node, self._names_to_copy(node))]
        try:
            while way:
                at, names = way[-1]
                if names:
                    self._copy_child(at, names.pop(), way)
                    continue
                if at.lower:
                    with self._names:
                        self._part(at)
                way.pop()
                if at is not node:
                    self._leave(at)
        finally:
            for at, _ in way[1:]:
                self._leave(at)

    def _names_to_copy(self, node: Node) -> list[bytes]:
        with self._names:
            return [item[0] for item in self._merged(node)] if node.lower else []

    def _copy_child(self, parent: Node, name: bytes, way: list[tuple[Node, list[bytes]]]) -> None:
        """Copy up what has a name in a directory; if it is a directory itself, it comes next on the way."""
        with self._names:
            found = self._find(parent, name)
        if found is None:  # removed meanwhile
            return
        child = found[0]
        kept = False
        try:
            self._copy_up(child)
            if child.kind == stat.S_IFDIR:
                way.append((child, self._names_to_copy(child)))
                kept = True
        except FileNotFoundError:
            if child.parent is not None:  # not removed meanwhile
                raise
        finally:
            if not kept:
                self._leave(child)

    def _part(self, node: Node) -> None:
        """Have a directory hide the lower one, of which the upper one has, or hides, every name by now."""
        fd = self._upper.open_listing(node.upper)
        status = os.fstat(fd.number)
        self._marks.make_opaque(fd.number)
        node.lower = 0
        node.hidden = None
        self._shown[status.st_ino] = node.ino
        self._marks.clear(fd.number)
        try:
            os.utime(fd.number, ns=(status.st_atime_ns, status.st_mtime_ns))
        except PermissionError:
            pass

    def _merged(self, node: Node) -> list[tuple[bytes, int, int, tuple[int, Attr] | None]]:
        raise NotImplementedError
