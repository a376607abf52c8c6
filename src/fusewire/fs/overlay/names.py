"""Names in an overlay: what makes, removes and moves one.

Layer `fs`, a part of `fs.overlay`. Where a name of the lower filesystem is in question, the upper directory goes from
one state that is right to another by a single rename(2): what is new is made under a temporary name in the same
directory (so that it gets its group, its default ACL and its owner there), and whiteouts are exchanged with what they
are to take the place of. A server that is killed in between leaves temporary names, which no listing shows. Where the
filesystem can neither exchange nor leave a whiteout, that takes steps; a `.wh.` file hides the lower name meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, TypeVar

from fusewire.fs.overlay.layers import OURSELVES, entry_of, is_whiteout
from fusewire.fs.overlay.listing import Directories
from fusewire.fs.overlay.marks import is_reserved
from fusewire.linux import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.fs.overlay.nodes import Node
    from fusewire.ops import Caller

Made = TypeVar("Made")
_FREE, _WHITEOUT, _TAKEN = range(3)
# What rename(2) gives for flags that a filesystem (EINVAL), a kernel or a sandbox does not have.
_NO_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class Names(Directories):
    """The operations on names."""

    # What stands in the upper directory under a name. All called under `_names`.

    def _state(self, parent: Node, name: bytes) -> int:
        found = self._upper.find(parent.upper, name)
        if found is None:
            return _FREE
        self._upper.forget(found[0], 1)
        return _WHITEOUT if is_whiteout(found[1]) else _TAKEN

    def _check_name(self, name: bytes) -> None:
        if is_reserved(name):
            raise OSError(errno.EINVAL, "names that begin with `.wh.` mark removed files in an overlay", name)

    def _in(self, nodeid: int) -> Node:
        """Give a directory that can be changed: it is copied up. Called without `_names`."""
        node = self._nodes.get(nodeid)
        if node.kind != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", nodeid)
        if not node.upper:
            self._copy_up(node)
        return node

    def _whiteout(self, parent: Node, name: bytes) -> None:
        """Have a name of the lower filesystem be gone; whatever the upper one has by it that is no directory goes."""
        marks = self._marks
        if not marks.devices:
            self._hide(parent, name)
            if self._state(parent, name) == _TAKEN:
                self._upper.unlink(OURSELVES, parent.upper, name)
            return
        fd = self._upper.reach(parent.upper)
        if self._state(parent, name) == _FREE:
            marks.make_whiteout(fd.number, name)
            return
        temporary = marks.temporary()
        marks.make_whiteout(fd.number, temporary)
        try:
            self._upper.rename(OURSELVES, parent.upper, temporary, parent.upper, name, 0)
        except OSError:
            os.unlink(temporary, dir_fd=fd.number)
            raise

    def _hide(self, parent: Node, name: bytes) -> None:
        """Hide a lower name by a `.wh.` file. Raises ENAMETOOLONG."""
        fd = self._upper.reach(parent.upper)
        self._marks.hide(fd.number, name)
        self._hidden(parent).add(name)

    def _guard(self, parent: Node, name: bytes) -> None:
        """Hide a lower name while what hides it is replaced in several steps; `_unhide` ends that."""
        try:
            self._hide(parent, name)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # then a crash may bring the lower one back
                raise

    def _unhide(self, parent: Node, name: bytes) -> None:
        """Remove the `.wh.` file of a name that the upper directory has now."""
        if parent.hidden and name in parent.hidden:
            fd = self._upper.reach(parent.upper)
            self._marks.unhide(fd.number, name)
            parent.hidden.discard(name)

    # Making

    def _make(self, parent: Node, name: bytes, make: Callable[[int, bytes], Made], *, directory: bool = False) -> Made:
        """Have `make(upper directory, name)` create a name, also in the place of a whiteout.

        Raises FileExistsError if there is something by that name.
        """
        self._check_name(name)
        state = self._state(parent, name)
        below = state == _FREE and self._covers(parent, name)
        if state == _TAKEN or below:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        hidden = bool(parent.lower) and name in self._hidden(parent)
        if state == _FREE and not (hidden and directory):
            made = make(parent.upper, name)
            self._unhide(parent, name)
            return made
        temporary = self._marks.temporary()
        made = make(parent.upper, temporary)
        try:
            if directory:
                self._make_opaque(parent, temporary)
            self._replace(parent, temporary, name, directory and state == _WHITEOUT)
        except OSError:
            self._undo(made)
            (self._upper.rmdir if directory else self._upper.unlink)(OURSELVES, parent.upper, temporary)
            raise
        self._unhide(parent, name)
        return made

    def _undo(self, made: Any) -> None:
        """Give back what the upper filesystem has counted, and opened, for what it has made."""
        reply, opened = made if type(made) is tuple else (made, None)
        found = entry_of(reply)
        assert found is not None
        if opened is not None:
            self._upper.release(found[0], opened[0], 0, 0, 0)
        self._upper.forget(found[0], 1)

    def _make_opaque(self, parent: Node, name: bytes) -> None:
        """Make a new directory opaque."""
        found = self._upper.find(parent.upper, name)
        assert found is not None
        try:
            fd = self._upper.open_listing(found[0])
            self._marks.make_opaque(fd.number)
        finally:
            self._upper.forget(found[0], 1)

    def _replace(self, parent: Node, temporary: bytes, name: bytes, exchange: bool) -> None:
        """Put what has a temporary name in the place of a whiteout, over which only a file can be renamed."""
        above = parent.upper
        if exchange and not self._exchange_upper(above, temporary, above, name):
            self._guard(parent, name)
            self._upper.unlink(OURSELVES, above, name)
            exchange = False
        if exchange:
            self._upper.unlink(OURSELVES, above, temporary)
        else:
            self._upper.rename(OURSELVES, above, temporary, above, name, 0)

    def _exchange_upper(self, above: int, name: bytes, below: int, newname: bytes) -> bool:
        """Exchange two names in the upper filesystem; False if it cannot do that."""
        try:
            self._upper.rename(OURSELVES, above, name, below, newname, files.RENAME_EXCHANGE)
        except OSError as error:
            if error.errno in _NO_FLAGS:
                return False
            raise
        return True

    def _made(self, parent: Node, name: bytes, reply: Any) -> bytes:
        """Answer with what the upper filesystem has made."""
        found = entry_of(reply)
        assert found is not None
        return self._entry(*self._found_above(parent, name, found, True))

    def _make_entry(
        self, parent: int, name: bytes, make: Callable[[int, bytes], Any], *, directory: bool = False
    ) -> bytes:
        above = self._in(parent)
        with self._names:
            return self._made(above, name, self._make(above, name, make, directory=directory))

    def mknod(self, caller: Caller, parent: int, name: bytes, mode: int, rdev: int, umask: int) -> bytes:
        if stat.S_ISCHR(mode) and rdev == 0:
            raise PermissionError(errno.EPERM, "the device 0:0 marks removed files in an overlay", name)
        return self._make_entry(parent, name, lambda above, by: self._upper.mknod(caller, above, by, mode, rdev, umask))

    def mkdir(self, caller: Caller, parent: int, name: bytes, mode: int, umask: int) -> bytes:
        return self._make_entry(
            parent, name, lambda above, by: self._upper.mkdir(caller, above, by, mode, umask), directory=True
        )

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> bytes:
        return self._make_entry(parent, name, lambda above, by: self._upper.symlink(caller, above, by, target))

    def link(self, caller: Caller, nodeid: int, newparent: int, newname: bytes) -> bytes:
        node = self._nodes.get(nodeid)
        if not node.upper:
            self._copy_up(node)
        return self._make_entry(newparent, newname, lambda above, by: self._upper.link(caller, node.upper, above, by))

    # Removing

    def unlink(self, caller: Caller, parent: int, name: bytes) -> None:
        above = self._in(parent)
        with self._names:
            node = self._known(above, name)
            try:
                if node.kind == stat.S_IFDIR:
                    raise IsADirectoryError(errno.EISDIR, "is a directory", name)
                self._remove(above, name, node)
            finally:
                self._leave(node)

    def _remove(self, parent: Node, name: bytes, node: Node) -> None:
        if self._covers(parent, name):
            self._whiteout(parent, name)
        else:
            self._upper.unlink(OURSELVES, parent.upper, name)
        if not node.upper:
            self._nodes.removed(node)

    def rmdir(self, caller: Caller, parent: int, name: bytes) -> None:
        above = self._in(parent)
        with self._names:
            node = self._known(above, name)
            try:
                self._check_empty(node, name)
                self._remove_directory(above, name, node)
                self._nodes.removed(node)
            finally:
                self._leave(node)

    def _check_empty(self, node: Node, name: bytes) -> None:
        if node.kind != stat.S_IFDIR:
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
        if self._merged(node):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)

    def _clear(self, node: Node) -> None:
        """Remove the marks from an upper directory that is shown empty; what it hides stays hidden."""
        fd = self._upper.open_listing(node.upper)
        if node.lower:
            self._marks.make_opaque(fd.number)
            node.lower = 0
        self._marks.clear_all(fd.number)
        node.hidden = None

    def _remove_directory(self, parent: Node, name: bytes, node: Node) -> None:
        covers = self._covers(parent, name)
        if not node.upper:
            self._whiteout(parent, name)
            return
        marks = self._marks
        fd = self._upper.reach(parent.upper)
        whiteout = covers and marks.devices
        if whiteout:
            temporary = marks.temporary()
            marks.make_whiteout(fd.number, temporary)
            exchanged = False
            try:
                exchanged = self._exchange_upper(parent.upper, temporary, parent.upper, name)
            finally:
                if not exchanged:
                    os.unlink(temporary, dir_fd=fd.number)
            if exchanged:
                self._clear(node)
                self._upper.rmdir(OURSELVES, parent.upper, temporary)
                return
            self._guard(parent, name)
        elif covers:
            self._hide(parent, name)
        self._clear(node)
        self._upper.rmdir(OURSELVES, parent.upper, name)
        if whiteout:
            marks.make_whiteout(fd.number, name)
            self._unhide(parent, name)

    # Moving

    def rename(self, caller: Caller, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        """Move a name. A directory of the lower filesystem is copied up with all that is in it, however much that is:
        the kernel's overlayfs answers EXDEV, and programs that know no better fail.
        """
        if flags & ~(files.RENAME_NOREPLACE | files.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "an overlay makes whiteouts for itself only", name)
        self._check_name(newname)
        self._slow(False)
        with self._copying:
            above, below = self._in(parent), self._in(newparent)
            exchange = bool(flags & files.RENAME_EXCHANGE)
            with self._names:
                moved = self._known(above, name)
            target: tuple[Node, Any] | None = None
            try:
                with self._names:
                    target = self._find(below, newname)
                    other = None if target is None else target[0]
                    self._check_target(moved, other, newname, flags)
                self._detach(moved)
                if exchange and other is not None:
                    self._detach(other)
                    self._exchange(above, name, moved, below, newname, other)
                else:
                    self._move(above, name, moved, below, newname, other)
            finally:
                self._leave(moved)
                if target is not None:
                    self._leave(target[0])

    def _check_target(self, moved: Node, other: Node | None, newname: bytes, flags: int) -> None:
        """Raise what stands in the way of a move, before anything is copied for it."""
        if other is None:
            if flags & files.RENAME_EXCHANGE:
                raise FileNotFoundError(errno.ENOENT, "no such name", newname)
        elif flags & files.RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), newname)
        elif flags & files.RENAME_EXCHANGE or other is moved:
            pass
        elif moved.kind == stat.S_IFDIR:
            self._check_empty(other, newname)
        elif other.kind == stat.S_IFDIR:
            raise IsADirectoryError(errno.EISDIR, "is a directory", newname)

    def _detach(self, node: Node) -> None:
        """Copy up what is to be moved, and all below it."""
        if node.kind == stat.S_IFDIR:
            self._copy_tree(node)
        else:
            self._copy_up(node)

    def _exchange(self, above: Node, name: bytes, one: Node, below: Node, newname: bytes, other: Node) -> None:
        with self._names:
            for node, place, called in ((one, below, newname), (other, above, name)):
                if node.kind == stat.S_IFDIR and self._covers(place, called):
                    self._opaque(node)
            self._upper.rename(OURSELVES, above.upper, name, below.upper, newname, files.RENAME_EXCHANGE)
            self._nodes.place(one, below, newname)
            self._nodes.place(other, above, name)

    def _move(self, above: Node, name: bytes, moved: Node, below: Node, newname: bytes, other: Node | None) -> None:
        directory = moved.kind == stat.S_IFDIR
        with self._names:
            if other is moved or (other is not None and other.upper == moved.upper):
                return  # two names of one file: rename(2) does nothing
            self._check_target(moved, other, newname, 0)
            leaves = self._covers(above, name)
            state = self._state(below, newname)
            if directory:
                if below.lower and self._lower.has(below.lower, newname):
                    self._opaque(moved)  # what comes there must not be merged with what was removed
                if other is not None and other.upper:
                    if other.lower and not self._marks.opaque:
                        self._guard(below, newname)  # the file that makes it opaque is in the way too
                    self._clear(other)
            self._rename_upper(above, name, below, newname, leaves, state if directory else _FREE)
            self._unhide(below, newname)
            if other is not None and (other.kind == stat.S_IFDIR or not other.upper):
                self._nodes.removed(other)
            self._nodes.place(moved, below, newname)

    def _opaque(self, node: Node) -> None:
        fd = self._upper.reach(node.upper)
        self._marks.make_opaque(fd.number)

    def _rename_upper(self, above: Node, name: bytes, below: Node, newname: bytes, leaves: bool, state: int) -> None:
        """Move a name in the upper filesystem, and leave a whiteout if `leaves`.

        state: what a directory that is moved meets there; over a whiteout it cannot be renamed but exchanged.
        """
        upper = self._upper
        if leaves and not self._marks.devices:
            # First: a crash after it leaves a name that is there, with a mark that counts for the lower one only.
            self._hide(above, name)
            leaves = False
        if state == _WHITEOUT:
            if self._exchange_upper(above.upper, name, below.upper, newname):
                if not leaves:
                    upper.unlink(OURSELVES, above.upper, name)
                return
            self._guard(below, newname)
            upper.unlink(OURSELVES, below.upper, newname)
        if leaves:
            try:
                upper.rename(OURSELVES, above.upper, name, below.upper, newname, files.RENAME_WHITEOUT)
                return
            except OSError as error:
                if error.errno not in _NO_FLAGS and error.errno != errno.EPERM:
                    raise
            self._guard(above, name)
        upper.rename(OURSELVES, above.upper, name, below.upper, newname, 0)
        if leaves:
            fd = upper.reach(above.upper)
            self._marks.make_whiteout(fd.number, name)
            self._unhide(above, name)
