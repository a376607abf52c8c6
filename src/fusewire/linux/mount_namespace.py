"""The mount strategy `namespace`: a user and mount namespace of this process, and a door out of it.

Layer: linux, below mount.py. The process that calls it must have one thread, becomes the namespace, and should be the
server, for nobody else keeps the namespace alive.

The door: processes outside cannot see the namespace's mounts, but /proc/PID/fd/N of this process leads every process
of the same user to the mount's root, and a symlink at the target says so. The price: getcwd(2) does not work there,
and the link dangles once this process has ended. The door is for processes of the user namespace that we came from:
one inside ours, which has lost its capabilities by execve(2), may not look into a process that has them (ptrace(2)),
and uses the mount point `inside`.
"""

from __future__ import annotations

import errno
import os
import stat

from fusewire.linux import mountinfo, process, syscalls, userns
from fusewire.linux.mount_base import (
    LONGEST_STRING,
    REFUSALS,
    Mount,
    Options,
    RefusedError,
    attach,
    check_device,
    explained,
    identity,
    locate,
    mount_by_string,
    open_device,
    open_parent,
    unmount_path,
)


class NamespaceMount(Mount):
    """`_tree` is the descriptor that makes /proc/PID/fd/N; closing it is part of unmounting, as it keeps it busy."""

    __slots__ = ("_place", "_tree")

    def __init__(self, fd: int, target: bytes, inside: bytes, place: Place | None) -> None:
        super().__init__("namespace", fd, target, inside)
        self._place = place
        self._tree = -1

    def record(self) -> dict[str, str | int | bool | None]:
        found = super().record()
        if self._place is not None:
            found["place"] = os.fsdecode(self._place.path)
            found["aside"] = os.fsdecode(self._place.aside) if self._place.existed else None
            found["parent"] = self._place.identity
        return found

    def _is_on_top(self) -> bool:
        return True

    def _attach(self, options: Options) -> None:
        """Mount on `inside`, and open the door.

        By the mount API of Linux 5.2. Where that is missing, or a call of it is refused by a seccomp profile that is
        older or has gaps, by mount(2); also where the source has a long name.
        """
        if len(options.fsname) <= LONGEST_STRING:
            try:
                self._tree = attach(self.fd, self.inside, options)
                return
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise explained(error) from error
            # The device may be that of a mount by now that never was.
            self.close()
            self.fd = open_device()
        mount_by_string(self.fd, self.inside, options, only=True)
        self._tree = process.above_stdio(os.open(self.inside, os.O_PATH | os.O_CLOEXEC))

    def _detach(self) -> None:
        """Have nobody find the mount any more; where umount2(2) is refused, it lasts as long as this process."""
        try:
            syscalls.umount2(self.inside, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self.stays = True

    def _unmount(self, lazy: bool) -> None:
        if lazy:
            self._put_back()
            self._detach()
            self._close_tree()
            return
        # The number must stay taken meanwhile, or another thread's next open(2) would appear at the user's target.
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.dup2(null, self._tree, inheritable=False)
        finally:
            os.close(null)
        try:
            unmount_path(self.inside, False, self.target)
        except OSError as error:
            if error.errno in REFUSALS:  # whether it is in use cannot be asked then
                self.stays = True
                self._close_tree()
                return
            again = os.open(self.inside, os.O_PATH | os.O_CLOEXEC)
            os.dup2(again, self._tree, inheritable=False)
            os.close(again)
            raise
        self._close_tree()

    def _tidy(self) -> None:
        self._close_tree()
        self._put_back()

    def _close_tree(self) -> None:
        tree, self._tree = self._tree, -1
        if tree >= 0:
            os.close(tree)

    def _put_back(self) -> None:
        place, self._place = self._place, None
        if place is not None and self.outside is not None:
            put_back(place.path, self.outside, place.aside if place.existed else None, place.identity)


class Place:
    """Where the link goes: what was found there is not looked up by path again. `close` it when the link is made.

    existed: an empty directory is there, which is renamed to `aside` in the same directory and back again, so that
    nothing of it is lost. parent: the descriptor of that directory, identity: what tells it from others later.
    """

    __slots__ = ("aside", "existed", "identity", "parent", "path")

    def __init__(self, path: bytes, parent: int, aside: bytes) -> None:
        self.path = path
        self.parent = parent
        self.identity = identity(os.fstat(parent))
        self.aside = aside
        self.existed = False

    @property
    def name(self) -> bytes:
        """The last part of the path."""
        return os.path.basename(self.path)

    def close(self) -> None:
        """Let go of the directory, which would be busy with us otherwise."""
        if self.parent >= 0:
            os.close(self.parent)
            self.parent = -1


def aside_name(path: bytes) -> bytes:
    """A new hidden name for what is at `path`, by which people see what it is for."""
    return _aside_prefix(path) + os.urandom(4).hex().encode()


def _aside_prefix(path: bytes) -> bytes:
    return b".%s.fusewire-" % os.path.basename(path)[:200]


def find_aside(path: bytes) -> bytes | None:
    """The name by which the directory that was at `path` is kept, for when nobody has noted it; None if there is none.

    None also if there are several.
    """
    prefix = _aside_prefix(path)
    try:
        names = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(prefix)]
    except OSError:
        return None
    return names[0] if len(names) == 1 and len(names[0]) == len(prefix) + 8 else None


def find_place(target: bytes, aside: bytes | None = None) -> Place:
    """What is at the target now. Raises RefusedError if a link cannot or must not replace it."""
    path = locate(target)
    place = Place(path, open_parent(path), aside or aside_name(path))
    done = False
    try:
        _look_at(place, os.fsdecode(target))
        done = True
        return place
    finally:
        if not done:
            place.close()


def _look_at(place: Place, name: str) -> None:
    instead = "use `fusewire run`, or choose a name that is missing or an empty directory"
    directory = b"/proc/self/fd/%d/" % place.parent
    try:
        info = os.stat(place.name, dir_fd=place.parent, follow_symlinks=False)
    except FileNotFoundError:
        pass
    except PermissionError:
        where = os.fsdecode(os.path.dirname(place.path))
        raise RefusedError(errno.EACCES, f"you may not look into {where}", instead) from None
    else:
        if not stat.S_ISDIR(info.st_mode):
            raise RefusedError(errno.ENOTDIR, f"{name} exists and is not a directory", instead)
        try:
            empty = _is_empty(place.name, place.parent)
        except PermissionError:
            raise RefusedError(errno.EACCES, f"{name} cannot be read, so it may hold files", instead) from None
        if not empty:
            raise RefusedError(errno.ENOTEMPTY, f"{name} is not empty", instead)
        if mountinfo.id_of_path(directory + place.name) != mountinfo.id_of_fd(place.parent):
            raise RefusedError(errno.EBUSY, f"something is mounted at {name}", instead)
        place.existed = True
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        where = os.fsdecode(os.path.dirname(place.path))
        raise RefusedError(errno.EACCES, f"you may not write in {where}", instead)


def _is_empty(name: bytes, parent: int) -> bool:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        with os.scandir(fd) as entries:
            return next(entries, None) is None
    finally:
        os.close(fd)


def check(
    target: bytes | None,
    options: Options,
    private: bytes | None,
    plan: userns.Plan | None,
    aside: bytes | None = None,
) -> tuple[bytes, Place | None, userns.Plan]:
    if private is None:
        raise RefusedError(errno.EINVAL, "no private directory was given to mount on", "")
    if options.opened_to_others():
        raise RefusedError(
            errno.EINVAL,
            "allow_other lets in only processes inside the namespace, and shuts out its owner's others",
            "leave it out, or use `fusewire run`",
        )
    plan = plan or userns.default_plan()
    if (threads := userns.thread_count()) > 1:
        raise RefusedError(
            errno.EINVAL, f"this process has {threads} threads, a user namespace needs a process of one", "fork first"
        )
    return os.path.realpath(private), None if target is None else find_place(target, aside), plan


def probe(target: bytes | None, options: Options, private: bytes | None, plan: userns.Plan | None) -> None:
    """Raise what `mount` would, as far as that can be told without mounting."""
    _, place, plan = check(target, options, private, plan)
    if place is not None:
        place.close()
    if refusal := userns.probe(plan):
        raise refusal
    check_device()


def mount(
    target: bytes | None,
    options: Options,
    private: bytes | None,
    plan: userns.Plan | None,
    aside: bytes | None = None,
) -> Mount:
    inside, place, plan = check(target, options, private, plan, aside)
    try:
        return _mount(target or inside, options, inside, place, plan)
    finally:
        if place is not None:
            place.close()


def _mount(target: bytes, options: Options, inside: bytes, place: Place | None, plan: userns.Plan) -> Mount:
    check_device()  # before there is no way back
    userns.enter(plan)
    # Only now: the kernel wants /dev/fuse opened in the user namespace that mounts (fuse_fill_super).
    result = NamespaceMount(open_device(), target, inside, place)
    attached = done = False
    try:
        result._attach(options)
        attached = True
        result._mount_id = mountinfo.id_of_fd(result._tree)
        _open_door()
        # As /proc has it: in a PID namespace with the outer /proc, getpid(2) is a number that others do not know.
        outside = b"/proc/%s/fd/%d" % (os.readlink(b"/proc/self"), result._tree)
        if place is not None:
            _replace(place, outside)
        result.outside = outside
        done = True
        return result
    finally:
        if not done:
            result._close_tree()
            if attached:
                result._detach()
            result.close()


def _open_door() -> None:
    """Let other processes of this user look into /proc/PID/fd: proc(5) and ptrace(2) ask for a dumpable process."""
    try:
        if syscalls.get_dumpable() != 1:
            syscalls.set_dumpable()
    except OSError as error:
        raise RefusedError(
            error.errno or errno.EPERM,
            "this process may not become dumpable, so nobody else could reach the mount",
            "use `fusewire run`",
        ) from error


def _replace(place: Place, link: bytes) -> None:
    """Put the symlink at the target, in the place of an empty directory; whatever raced in there stays."""
    name = os.fsdecode(place.path)
    if place.existed:
        try:
            os.rename(place.name, place.aside, src_dir_fd=place.parent, dst_dir_fd=place.parent)
            if not _is_empty(place.aside, place.parent):
                raise OSError(errno.ENOTEMPTY, "it is not empty any more")
        except OSError as error:
            _restore(place.aside, place.name, place.parent)
            text = f"the empty directory cannot be replaced by a link: {error.strerror}"
            raise OSError(error.errno, text, name) from error
    try:
        os.symlink(link, place.name, dir_fd=place.parent)
    except OSError as error:
        if place.existed:
            _restore(place.aside, place.name, place.parent)
        raise OSError(error.errno, f"the link to the mount cannot be made: {error.strerror}", name) from error


def put_back(path: bytes, link: bytes, aside: bytes | None, parent: str | None) -> None:
    """Undo the symlink: remove it if it still says `link`, and give the directory that is kept `aside` its name again.

    parent: the identity of the directory that they are in. Safe to call twice and from another process; anything else
    that is there by now stays.
    """
    try:
        fd = open_parent(path, parent)
    except (RefusedError, FileNotFoundError):
        return
    name = os.path.basename(path)
    try:
        try:
            if os.readlink(name, dir_fd=fd) == link:
                os.unlink(name, dir_fd=fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
                raise
        if aside is not None:
            _restore(aside, name, fd)
    finally:
        os.close(fd)


def _restore(aside: bytes, name: bytes, parent: int) -> None:
    """Give the directory that is kept `aside` its name again; where that is taken, it goes, if it is empty."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        taken = False
    else:
        taken = True
    try:
        if taken:
            os.rmdir(aside, dir_fd=parent)
        else:
            os.rename(aside, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError as error:
        # Not empty, or the name was taken at this moment: it stays where it is, as nothing must be lost.
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EACCES):
            raise
