"""How an upper directory says what is not to be seen of the lower one: whiteouts and opaque directories.

Layer `fs`, a part of `fs.overlay`; knows descriptors and names, nothing of nodes.

Two forms of both are in use, and all are read. The kernel's: a character device 0:0 in the place of a removed name,
and the attribute `overlay.opaque` = y of a directory (below `user.` with the mount option userxattr, else below
`trusted.`). Where an unprivileged user may not make that device (Linux before 5.8, some sandboxes), or there are no
attributes: empty files `.wh.NAME` beside the name and `.wh..wh..opq` in the directory, which fuse-overlayfs and image
layers know, and the kernel does not.
"""

from __future__ import annotations

import errno
import os
import stat
from itertools import count

from fusewire.linux import files

PREFIX = b".wh."
OPAQUE_FILE = b".wh..wh..opq"
TEMPORARY = b".wh..wh.tmp."
WHITEOUT_MODE = stat.S_IFCHR
OPAQUE = b"user.overlay.opaque"
PRIVILEGED_OPAQUE = b"trusted.overlay.opaque"
_OPAQUE_NAMES = (OPAQUE, PRIVILEGED_OPAQUE, b"user.fuseoverlayfs.opaque")
_PRIVATE = (b"user.overlay.", b"trusted.overlay.", b"user.fuseoverlayfs.")
# Of a file whose data, of a directory whose names, or of something whose kind, mode and owner are elsewhere: with the
# options redirect_dir and metacopy of the kernel's overlayfs, and xattr_permissions of fuse-overlayfs.
_ELSEWHERE = (".overlay.redirect", ".overlay.metacopy")
_OVERRIDDEN = ".override_stat"
# What a call gives for something that a filesystem or a sandbox does not have.
NOT_HERE = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_AT_ONCE = 65536  # bytes of entries


def is_reserved(name: bytes) -> bool:
    """Tell whether a name can only be a mark; nobody else may have a file of such a name."""
    return name.startswith(PREFIX)


def is_private(xattr: bytes) -> bool:
    """Tell whether an extended attribute is one of an overlay filesystem's own, to be seen by nobody."""
    return xattr.startswith(_PRIVATE)


def entries(fd: int) -> list[files.Dirent]:
    """Give all entries of a directory that is open for reading, from the beginning, without "." and ".."."""
    found: list[files.Dirent] = []
    buffer = bytearray(_READ_AT_ONCE)
    os.lseek(fd, 0, os.SEEK_SET)
    while length := files.getdents64(fd, buffer):
        found += [entry for entry in files.parse_dents(buffer, length) if entry[0] not in (b".", b"..")]
    return found


def is_whiteout_at(directory: int, name: bytes) -> bool:
    """Tell whether `name` is a whiteout of the kernel's form."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _xattrs(path: bytes, follow: bool) -> list[str]:
    """Give the names of extended attributes; "trusted." ones are listed to CAP_SYS_ADMIN only, which can read them."""
    try:
        return os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno in NOT_HERE:
            return []
        raise


def _touch(directory: int, name: bytes) -> None:
    """Have a file by that name. Not by open(2), which follows symlinks and waits for the reader of a FIFO."""
    try:
        os.mknod(name, stat.S_IFREG | 0o600, dir_fd=directory)
    except FileExistsError:
        pass


def remove_tree(directory: int, name: bytes) -> None:
    """Remove `name` and all below it, also what its modes keep its owner out of; a missing one is no error."""
    try:
        os.unlink(name, dir_fd=directory)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # unlink(2) of a directory: EISDIR here, EPERM in POSIX
        if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise
    # Between chmod and open nobody but us has business in a work directory.
    os.chmod(name, 0o700, dir_fd=directory)
    fd = os.open(name, _LIST, dir_fd=directory)
    try:
        for entry in entries(fd):
            remove_tree(fd, entry[0])
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=directory)


class Marks:
    """Makes and reads marks in one upper directory, in the best form that there is in it."""

    def __init__(self, work: int, proc: bytes) -> None:
        """Find out, in the work directory `work`, what can be made. `proc`: prefix of descriptors as paths."""
        self._proc = proc
        # Process ids come again, in a container at once, and a killed server leaves its names behind.
        self._names = map((TEMPORARY + os.urandom(6).hex().encode() + b".%d").__mod__, count())
        self.devices = self._try_device(work)
        self.opaque = self._try_xattrs(work)

    def temporary(self) -> bytes:
        """Give a name for something that is about to be renamed; it is hidden wherever marks are understood."""
        return next(self._names)

    def _try_device(self, work: int) -> bool:
        name = self.temporary()
        try:
            os.mknod(name, WHITEOUT_MODE, 0, dir_fd=work)
        except OSError as error:
            if error.errno in NOT_HERE:
                return False
            raise
        os.unlink(name, dir_fd=work)
        return True

    def _try_xattrs(self, work: int) -> tuple[bytes, ...]:
        """Both where both can be had: then the kernel understands it with and without the option userxattr."""
        name = self.temporary()
        os.mkdir(name, 0o700, dir_fd=work)
        try:
            fd = os.open(name, _LIST, dir_fd=work)
            try:
                return tuple(xattr for xattr in (OPAQUE, PRIVILEGED_OPAQUE) if self._set(fd, xattr))
            finally:
                os.close(fd)
        finally:
            os.rmdir(name, dir_fd=work)

    def _set(self, fd: int, xattr: bytes) -> bool:
        try:
            os.setxattr(self._proc + b"%d" % fd, xattr, b"y")
        except OSError as error:
            if error.errno in NOT_HERE or error.errno == errno.ENOSPC:
                return False
            raise
        return True

    def is_opaque(self, fd: int) -> bool:
        """Tell whether a directory, given by a descriptor (O_PATH too), hides all of the lower one's."""
        path = self._proc + b"%d" % fd
        if self._is_marked(path, _xattrs(path, True)):
            return True
        return files.status_if_any(fd, OPAQUE_FILE, files.AT_SYMLINK_NOFOLLOW) is not None

    @staticmethod
    def _is_marked(path: bytes, names: list[str]) -> bool:
        return any(os.fsencode(name) in _OPAQUE_NAMES and os.getxattr(path, name) == b"y" for name in names)

    def check_whole(self, directory: int, name: bytes) -> None:
        """Refuse a file or a directory that another overlay has made, which has only a part of itself here.

        Raises PermissionError, as the kernel does where these options are not given.
        """
        path = self._proc + b"%d/%s" % (directory, name)
        names = _xattrs(path, False)
        for xattr in names:
            # A directory that is opaque has been followed to its end already.
            if xattr.endswith(_OVERRIDDEN) or (xattr.endswith(_ELSEWHERE) and not self._is_marked(path, names)):
                raise PermissionError(
                    errno.EPERM,
                    f"it has the attribute {xattr} of an overlay with redirect_dir, metacopy or xattr_permissions, "
                    "which cannot be followed here: mount it with that overlay, and copy what you need",
                    name,
                )

    def make_opaque(self, fd: int) -> None:
        """Have a directory hide all of the lower one's. Raises OSError."""
        if not sum(self._set(fd, xattr) for xattr in self.opaque):
            _touch(fd, OPAQUE_FILE)

    def make_whiteout(self, directory: int, name: bytes) -> None:
        """Make a whiteout of the kernel's form under a name that is free."""
        os.mknod(name, WHITEOUT_MODE, 0, dir_fd=directory)

    def hide(self, directory: int, name: bytes) -> None:
        """Say by a file `.wh.NAME` that `name` is not to be seen; it may be said already. Raises ENAMETOOLONG."""
        if len(name) + len(PREFIX) > 255:
            raise OSError(errno.ENAMETOOLONG, "the name is too long for a `.wh.` file, which has to hide it", name)
        _touch(directory, PREFIX + name)

    def unhide(self, directory: int, name: bytes) -> None:
        """Take that back."""
        try:
            os.unlink(PREFIX + name, dir_fd=directory)
        except FileNotFoundError:
            pass

    def clear(self, fd: int) -> None:
        """Remove all marks of names from a directory that is open for reading; what makes it opaque stays."""
        for name, _, _, kind in entries(fd):
            if name == OPAQUE_FILE:
                continue
            if is_reserved(name):
                remove_tree(fd, name)
            elif kind in (0, 2) and is_whiteout_at(fd, name):  # DT_UNKNOWN, DT_CHR
                os.unlink(name, dir_fd=fd)

    def clear_all(self, fd: int) -> None:
        """Remove all marks, so that the directory can be removed."""
        self.clear(fd)
        try:
            os.unlink(OPAQUE_FILE, dir_fd=fd)
        except FileNotFoundError:
            pass
