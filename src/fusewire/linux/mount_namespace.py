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
    FLAGS,
    Mount,
    Options,
    RefusedError,
    check_device,
    explained,
    locate,
    mount_by_string,
    open_device,
    unmount_path,
)

_LONGEST = 255  # bytes of a value, fsconfig(2)


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
            found["previous"] = self._place.previous
        return found

    def _is_on_top(self) -> bool:
        return True

    def _unmount(self, lazy: bool) -> None:
        if lazy:
            self._put_back()
            syscalls.umount2(self.inside, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
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
        except OSError:
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
            put_back(place.path, self.outside, place.previous)


class Place:
    """What the symlink replaces: `previous` is the mode of an empty directory, None if there was nothing."""

    __slots__ = ("path", "previous")

    def __init__(self, path: bytes, previous: int | None) -> None:
        self.path = path
        self.previous = previous


def find_place(target: bytes) -> Place:
    """What is at the target now. Raises RefusedError if a link cannot or must not replace it."""
    name = os.fsdecode(target)
    instead = "use `fusewire run`, or choose a name that is missing or an empty directory"
    path = locate(target)
    parent = os.path.dirname(path)
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        previous = None
    else:
        if not stat.S_ISDIR(info.st_mode):
            raise RefusedError(errno.ENOTDIR, f"{name} exists and is not a directory", instead)
        try:
            with os.scandir(path) as entries:
                empty = next(entries, None) is None
        except PermissionError:
            raise RefusedError(errno.EACCES, f"{name} cannot be read, so it may hold files", instead) from None
        if not empty:
            raise RefusedError(errno.ENOTEMPTY, f"{name} is not empty", instead)
        if mountinfo.id_of_path(path) != mountinfo.id_of_path(parent):
            raise RefusedError(errno.EBUSY, f"something is mounted at {name}", instead)
        previous = stat.S_IMODE(info.st_mode)
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise RefusedError(errno.EACCES, f"you may not write in {os.fsdecode(parent)}", instead)
    return Place(path, previous)


def check(
    target: bytes | None, options: Options, private: bytes | None, plan: userns.Plan | None, probe: bool = False
) -> tuple[bytes, Place | None, userns.Plan]:
    if private is None:
        raise RefusedError(errno.EINVAL, "no private directory was given to mount on", "")
    if options.opened_to_others():
        raise RefusedError(
            errno.EINVAL,
            "allow_other lets in only processes inside the namespace, and shuts out its owner's others",
            "leave it out, or use `fusewire run`",
        )
    place = None if target is None else find_place(target)
    plan = plan or userns.default_plan()
    if (threads := userns.thread_count()) > 1:
        raise RefusedError(
            errno.EINVAL, f"this process has {threads} threads, a user namespace needs a process of one", "fork first"
        )
    if probe:
        if refusal := userns.probe(plan):
            raise refusal
        check_device()
    return os.path.realpath(private), place, plan


def mount(target: bytes | None, options: Options, private: bytes | None, plan: userns.Plan | None) -> Mount:
    inside, place, plan = check(target, options, private, plan)
    check_device()  # before there is no way back
    userns.enter(plan)
    # Only now: the kernel wants /dev/fuse opened in the user namespace that mounts (fuse_fill_super).
    result = NamespaceMount(open_device(), target or inside, inside, place)
    attached = done = False
    try:
        result._tree = _attach(result.fd, inside, options)
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
                syscalls.umount2(inside, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
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


def _attach(fd: int, path: bytes, options: Options) -> int:
    """Mount on `path` and give a descriptor of the mount's root.

    By the mount API of Linux 5.2. Where that is missing, or refused by an old seccomp profile, by mount(2); also where
    the source has a long name, for fsconfig(2) takes 255 bytes.
    """
    context = -1
    if len(options.fsname) <= _LONGEST:
        try:
            context = syscalls.fsopen(b"fuse")
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise explained(error) from error
    if context < 0:
        mount_by_string(fd, path, options)
        return process.above_stdio(os.open(path, os.O_PATH | os.O_CLOEXEC))
    tree = -1
    done = False
    try:
        _configure(context, fd, options)
        attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        for flag, attribute, _, _ in FLAGS:
            if options.flags & flag:
                attributes |= attribute
        tree = process.above_stdio(syscalls.fsmount(context, syscalls.FSMOUNT_CLOEXEC, attributes))
        syscalls.move_mount(tree, b"", syscalls.AT_FDCWD, path, syscalls.MOVE_MOUNT_F_EMPTY_PATH)
        done = True
        return tree
    except OSError as error:
        raise explained(error) from error
    finally:
        os.close(context)
        if not done and tree >= 0:
            os.close(tree)


def _configure(context: int, fd: int, options: Options) -> None:
    strings = [
        (b"source", options.fsname),
        (b"fd", b"%d" % fd),
        (b"rootmode", b"%o" % options.rootmode),
        (b"user_id", b"%d" % os.getuid()),
        (b"group_id", b"%d" % os.getgid()),
    ]
    if options.subtype:
        strings.append((b"subtype", options.subtype))
    if options.max_read is not None:
        strings.append((b"max_read", b"%d" % options.max_read))
    for key, value in strings:
        syscalls.fsconfig_set_string(context, key, value)
    for flag, _, word, _ in FLAGS:
        if word is not None and options.flags & flag:
            syscalls.fsconfig_set_flag(context, word)
    if options.default_permissions:
        syscalls.fsconfig_set_flag(context, b"default_permissions")
    syscalls.fsconfig_create(context)


def _replace(place: Place, link: bytes) -> None:
    """Put the symlink at the target. rmdir(2) takes only an empty directory, so whatever raced in stays."""
    name = os.fsdecode(place.path)
    if place.previous is not None:
        try:
            os.rmdir(place.path)
        except OSError as error:
            text = f"the empty directory cannot be replaced by a link: {error.strerror}"
            raise OSError(error.errno, text, name) from error
    try:
        os.symlink(link, place.path)
    except OSError as error:
        if place.previous is not None:
            make_again(place.path, place.previous)
        raise OSError(error.errno, f"the link to the mount cannot be made: {error.strerror}", name) from error


def put_back(path: bytes, link: bytes, previous: int | None) -> None:
    """Undo the symlink: remove it if it still says `link`, and make the directory of mode `previous` again.

    Safe to call twice and from another process; anything else that is there by now stays.
    """
    try:
        if os.readlink(path) != link:
            return
        os.unlink(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
            return
        raise
    if previous is not None:
        make_again(path, previous)


def make_again(path: bytes, mode: int) -> None:
    """Make the directory that was at a target, unless something is there by now."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    # By descriptor: where others may write in the parent, the name may mean a file of ours by now.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchmod(fd, mode)
    finally:
        os.close(fd)
