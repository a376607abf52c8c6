"""Directories for mount points where the user may not make any: inside a mount namespace only.

Layer: linux. It is used after `userns.enter` and changes what this mount namespace sees; the host is changed only
where the user may make a directory anyway, and `Shadow.made` says which.

To make /opt/x/y where only root may write in /opt, a small tmpfs is mounted over /opt and every entry of the old /opt
is bound into it, with all that is mounted below; then x/y is made, and the tmpfs sealed against writing. Mount flags
and locked mounts (mount_namespaces(7)) stay as they are: a recursive bind takes nothing apart.

Nothing can be mounted over / so that it is seen. There the tmpfs is filled elsewhere, moved over / and entered by
chroot(2). That is not the chroot that forbids user namespaces: the kernel compares with the topmost mount at the
namespace's root. pivot_root(2) would do too, but not on systems that run from their initramfs.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import mountinfo, syscalls, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV
# How often to look at a target that other runs may be removing and making again between two looks.
_LOOKS = 20

# What mkdir(2) says where a directory cannot be made on the host but can be in a shadow. ENOENT is autofs and alike.
_NOT_HERE = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMLINK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.EIO,
    )
)


class Shadow:
    """The shadowed directories of one mount namespace.

    `made`: directories made on the host, in the order in which they can be removed. `skipped`: entries of shadowed
    directories that could not be kept visible, as (path, reason). `before` is told of each directory that is about to
    be made on the host, with `mode`.

    Mount points that do not lie below one another are best made all together, before anything is mounted on them; a
    mount point inside another mount when that one is served, by a process that is not this one.
    """

    __slots__ = ("_before", "_mode", "_sealed", "_tmpfs", "made", "skipped")

    def __init__(self, before: Callable[[bytes], object] | None = None, mode: int = 0o755) -> None:
        self._before = before
        self._mode = mode
        self.made: list[bytes] = []
        self.skipped: list[tuple[bytes, str]] = []
        self._tmpfs: dict[int, bytes] = {}  # device -> where
        self._sealed: set[int] = set()

    def make(self, target: bytes) -> bytes:
        """Make sure that the directory `target` exists here; its path without symlinks.

        Raises OSError: ENOTDIR if it or a part of it is a file, EBUSY for /, EACCES for a directory whose entries
        cannot be listed and so not kept, EINVAL below /proc.
        """
        path = _resolve(target)
        name = os.fsdecode(target)
        if path == b"/":
            raise OSError(errno.EBUSY, "a mount over / is seen by nobody, choose another mount point", name)
        ancestor, missing = _split(path, name)
        if not missing:
            return path
        device = os.stat(ancestor).st_dev
        if device not in self._tmpfs:
            first = os.path.join(ancestor, missing[0])
            try:
                self._make_on_host(first)
            except FileExistsError:
                if mountinfo.stat_if_mine(first) is not None:
                    return self.make(target)  # somebody was faster
                raise OSError(
                    errno.EACCES, f"{os.fsdecode(first)} is a dead mount or another user's, choose another place", name
                ) from None
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise OSError(error.errno, f"the mount point cannot be made: {error.strerror}", name) from error
                try:
                    device = self._cover(ancestor, name)
                except OSError as refusal:
                    raise _explained(refusal, name) from refusal
            else:
                missing = missing[1:]
                ancestor = first
        if device in self._sealed:
            self._remount(device, 0)
            self._sealed.discard(device)
        for part in missing:
            ancestor = os.path.join(ancestor, part)
            if device in self._tmpfs:
                os.mkdir(ancestor, 0o755)
            else:
                self._make_on_host(ancestor)
        return path

    def _make_on_host(self, path: bytes) -> None:
        if self._before is not None and os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=True):
            self._before(path)
        os.mkdir(path, self._mode)
        self.made.insert(0, path)

    def seal(self) -> None:
        """Make the shadows read-only, as the directories were that they stand for. `make` opens them again."""
        for device in self._tmpfs:
            if device not in self._sealed:
                self._remount(device, syscalls.MS_RDONLY)
                self._sealed.add(device)

    def _remount(self, device: int, readonly: int) -> None:
        syscalls.mount(None, self._tmpfs[device], None, syscalls.MS_REMOUNT | syscalls.MS_BIND | _FLAGS | readonly)

    def _cover(self, directory: bytes, name: str) -> int:
        """Put a tmpfs with the same entries in the place of `directory`; its device number."""
        if directory == b"/proc" or directory.startswith(b"/proc/"):
            raise OSError(errno.EINVAL, "no mount point can be made in /proc, choose another", name)
        cwd = _cwd()
        options = b"mode=%o,size=64m" % (stat.S_IMODE(os.stat(directory).st_mode) | stat.S_IRWXU)
        if not os.access(directory, os.X_OK, effective_ids=True):
            # Nothing in there is of any use to this user, so nothing is lost.
            syscalls.mount(b"fusewire", directory, b"tmpfs", _FLAGS, options)
        else:
            self._cover_with_entries(directory, options, name)
        device = os.stat(directory).st_dev
        self._tmpfs[device] = directory
        if cwd is not None:  # it still lies under the cover, where nothing new will be seen
            _chdir(cwd)
        return device

    def _cover_with_entries(self, directory: bytes, options: bytes, name: str) -> None:
        try:
            original = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            where = os.fsdecode(directory)
            raise OSError(
                errno.EACCES, f"{where} can neither be written nor listed, choose a mount point elsewhere", name
            ) from None
        try:
            with os.scandir(original) as found:
                entries = sorted((os.fsencode(entry.name), _kind(entry)) for entry in found)
            if directory == b"/":
                self._cover_root(original, entries, options)
            else:
                syscalls.mount(b"fusewire", directory, b"tmpfs", _FLAGS, options)
                self._fill(directory, directory, original, entries)
        finally:
            os.close(original)

    def _cover_root(self, original: int, entries: list[tuple[bytes, int]], options: bytes) -> None:
        # Any directory will do to fill the tmpfs on; it is bound last, when the tmpfs has moved away from it.
        place = next((name for name, kind in entries if kind == stat.S_IFDIR and name != b"proc"), None)
        if place is None:
            raise OSError(errno.ENOENT, "the root directory has no directory to build a new one on", "/")
        top = b"/" + place
        syscalls.mount(b"fusewire", top, b"tmpfs", _FLAGS, options)
        self._fill(top, b"/", original, [entry for entry in entries if entry[0] != place])
        os.chdir(top)
        syscalls.mount(b".", b"/", None, syscalls.MS_MOVE)
        os.chroot(b".")
        os.chdir(b"/")
        self._fill(b"/", b"/", original, [(place, stat.S_IFDIR)])

    def _fill(self, directory: bytes, name: bytes, original: int, entries: list[tuple[bytes, int]]) -> None:
        """Make the entries of the directory `original` visible in `directory`, which the user knows as `name`."""
        for entry, kind in entries:
            source = b"/proc/self/fd/%d/" % original + entry
            path = os.path.join(directory, entry)
            try:
                if kind == stat.S_IFLNK:
                    os.symlink(os.readlink(source), path)
                    continue
                if kind == stat.S_IFDIR:
                    os.mkdir(path)
                else:
                    os.mknod(path, stat.S_IFREG | 0o444)
                syscalls.mount(source, path, None, syscalls.MS_BIND | syscalls.MS_REC)
            except OSError as error:
                # The name stays, as something empty: that the entry exists is still true.
                self.skipped.append((os.path.join(name, entry), error.strerror or str(error)))


def _explained(error: OSError, name: str) -> OSError:
    """A refused mount(2) with its likely cause and the way out, other errors as they are."""
    if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS) or not str(error.strerror).startswith("mount "):
        return error
    cause, remedy = userns.explain("mount", error.errno)
    text = f"the mount point cannot be made, mount(2) is refused: {cause}; choose one that exists, or {remedy}"
    return OSError(error.errno, text, name)


def _kind(entry: os.DirEntry[str]) -> int:
    """The file type as far as it matters here; from the listing if it has it, so that nothing is looked into."""
    try:
        if entry.is_symlink():
            return stat.S_IFLNK
        return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG
    except OSError:
        return stat.S_IFREG


def _resolve(target: bytes) -> bytes:
    """The target without symlinks.

    realpath(3) reads the link /proc/PID/fd/N as text, where the kernel follows it to another namespace. So what exists
    of the target must be the same thing both ways.
    """
    for _ in range(_LOOKS):
        existing = target
        while not os.path.exists(existing):
            if os.path.islink(existing):
                if os.readlink(existing).startswith(b"/proc/"):
                    break  # the link to a mount of another namespace, which we may not follow, or to a dead one
                return os.path.realpath(target)  # dangling: what it names will be made
            existing = os.path.dirname(existing) or b"."
        try:
            if os.path.samestat(os.stat(existing), os.stat(os.path.realpath(existing))):
                return os.path.realpath(target)
        except (FileNotFoundError, PermissionError):
            continue
    name = os.fsdecode(target)
    raise OSError(errno.EXDEV, "the mount point lies in a mount of another namespace, choose another", name)


def _split(path: bytes, name: str) -> tuple[bytes, list[bytes]]:
    """The deepest directory that exists, and the names missing (or hidden from us) below it."""
    missing: list[bytes] = []
    while True:
        try:
            info = os.stat(path)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            missing.insert(0, os.path.basename(path))
            path = os.path.dirname(path)
            continue
        if not stat.S_ISDIR(info.st_mode):
            role = "a mount point cannot lie below it" if missing else "the mount point must be one"
            raise OSError(errno.ENOTDIR, f"{os.fsdecode(path)} is not a directory, {role}", name)
        return path, missing


def _cwd() -> bytes | None:
    try:
        return os.getcwdb()
    except OSError:  # removed, or unreachable
        return None


def _chdir(path: bytes) -> None:
    try:
        os.chdir(path)
    except OSError:  # stays where it was
        return
