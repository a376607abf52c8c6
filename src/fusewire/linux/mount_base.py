"""What all mount strategies share: options, the mount object, the device, mount(2) and its errors explained.

Layer: linux, below mount.py and mount_namespace.py; import from mount.py.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from fusewire.linux import mountinfo, process, syscalls, userns

FUSE_DEVICE = os.makedev(10, 229)
LONGEST_STRING = 255  # bytes of a value, fsconfig(2)
# What a call gives that somebody forbids, or a seccomp filter that does not know it.
REFUSALS = frozenset((errno.EPERM, errno.EACCES, errno.ENOSYS))

# (flag of mount(2), attribute of fsmount(2), flag parameter of the superblock, word for fusermount3)
FLAGS = (
    (syscalls.MS_RDONLY, syscalls.MOUNT_ATTR_RDONLY, b"ro", b"ro"),
    (syscalls.MS_NOSUID, syscalls.MOUNT_ATTR_NOSUID, None, b"nosuid"),
    (syscalls.MS_NODEV, syscalls.MOUNT_ATTR_NODEV, None, b"nodev"),
    (syscalls.MS_NOEXEC, syscalls.MOUNT_ATTR_NOEXEC, None, b"noexec"),
    (syscalls.MS_NOATIME, syscalls.MOUNT_ATTR_NOATIME, None, b"noatime"),
    (syscalls.MS_NODIRATIME, syscalls.MOUNT_ATTR_NODIRATIME, None, None),
    (syscalls.MS_SYNCHRONOUS, 0, b"sync", b"sync"),
    (syscalls.MS_DIRSYNC, 0, b"dirsync", b"dirsync"),
)


class Options:
    """What to tell the kernel about a mount. `flags` are MS_* of mount(2).

    allow_root is no kernel option: the mount is made with allow_other, and the session must turn away everybody but
    the owner and root.
    """

    __slots__ = (
        "allow_other",
        "allow_root",
        "auto_unmount",
        "default_permissions",
        "flags",
        "fsname",
        "max_read",
        "rootmode",
        "subtype",
    )

    def __init__(
        self,
        *,
        fsname: bytes = b"fusewire",
        subtype: bytes = b"fusewire",
        flags: int = syscalls.MS_NOSUID | syscalls.MS_NODEV,
        allow_other: bool = False,
        allow_root: bool = False,
        default_permissions: bool = False,
        max_read: int | None = None,
        rootmode: int = 0o40000,
        auto_unmount: bool = False,
    ) -> None:
        self.fsname = fsname
        self.subtype = subtype
        self.flags = flags
        self.allow_other = allow_other
        self.allow_root = allow_root
        self.default_permissions = default_permissions
        self.max_read = max_read
        self.rootmode = rootmode
        self.auto_unmount = auto_unmount

    def opened_to_others(self) -> bool:
        """True if the kernel lets in other users than the owner."""
        return self.allow_other or self.allow_root


class RefusedError(OSError):
    """One strategy cannot be used: `strerror` is the reason, `remedy` what would help."""

    def __init__(self, number: int, reason: str, remedy: str) -> None:
        super().__init__(number, reason)
        self.remedy = remedy


class Mount:
    """One live mount and its /dev/fuse descriptor, which it owns: `fd` is -1 once closed.

    `target`: absolute, as the user named it. `inside`: the mount point where this process sees it. `outside`: a path
    for the other processes of this user, where that is not `inside`. `stays`: nobody finds it any more after an
    `unmount`, but as umount2(2) was refused, it ends with this process.
    """

    __slots__ = (
        "_created",
        "_device",
        "_mount_id",
        "_parent",
        "fd",
        "inside",
        "outside",
        "stays",
        "strategy",
        "target",
    )

    def __init__(self, strategy: str, fd: int, target: bytes, inside: bytes) -> None:
        self.strategy = strategy
        self.fd = fd
        self.target = target
        self.inside = inside
        self.outside: bytes | None = None
        self.stays = False
        self._created = False
        self._mount_id: int | None = None
        self._device: bytes | None = None
        self._parent: str | None = None

    def is_connected(self) -> bool:
        """True while the mount exists somewhere: the kernel reports POLLERR on a descriptor without one."""
        if self.fd < 0:
            return False
        watch = select.poll()
        watch.register(self.fd, 0)
        return not watch.poll(0)

    def unmount(self, lazy: bool = False) -> None:
        """Unmount, and put back what was at the target.

        Somebody must still answer requests meanwhile: the kernel may write back what it has cached. A mount that is
        gone already is no error, and what others have mounted at that place since is left alone. `lazy`: it vanishes
        from sight now, and those who have it open keep it until they are done (MNT_DETACH of umount(2)).

        Raises OSError(EBUSY) if something is open there; the mount lives on then.
        """
        if self.is_connected() and self._is_on_top():
            self._unmount(lazy)
        self._tidy()

    def close(self) -> None:
        """Close the /dev/fuse descriptor. If nobody else holds it, the mount is dead from now on."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def record(self) -> dict[str, str | int | bool | None]:
        """What `clean_up` needs when this process is no more; only values that JSON has."""
        return {
            "strategy": self.strategy,
            "target": os.fsdecode(self.target),
            "inside": os.fsdecode(self.inside),
            "outside": None if self.outside is None else os.fsdecode(self.outside),
            "created": self._created,
            "mount_id": self._mount_id,
            "device": None if self._device is None else os.fsdecode(self._device),
            "parent": self._parent,
        }

    def _remember(self) -> None:
        """Note which mount is ours; O_PATH on its root asks the server nothing."""
        self._mount_id = mountinfo.id_of_path(self.inside)
        if self._mount_id is not None:
            found = mountinfo.by_id(self._mount_id)
            self._device = found.device if found else None
        self._parent = identity(os.stat(os.path.dirname(self.inside)))

    def _is_on_top(self) -> bool:
        """False if our mount is not there any more. Raises EBUSY if another one covers it."""
        if self._mount_id is None or mountinfo.id_of_path(self.inside) == self._mount_id:
            return True
        if mountinfo.by_id(self._mount_id) is None:
            return False
        raise OSError(
            errno.EBUSY, "another filesystem is mounted over it, unmount that one first", os.fsdecode(self.target)
        )

    def _unmount(self, lazy: bool) -> None:
        raise NotImplementedError

    def _tidy(self) -> None:
        if self._created:
            self._created = not rmdir_if_ours(self.inside, self._parent)


def busy(target: bytes) -> OSError:
    """The error for an unmount that is refused because somebody is inside."""
    return OSError(
        errno.EBUSY,
        "in use: end what has files open or its working directory there, or unmount lazily",
        os.fsdecode(target),
    )


def identity(info: os.stat_result) -> str:
    """What tells a directory from another one that has got its name since."""
    return f"{info.st_dev}:{info.st_ino}"


def open_parent(path: bytes, known: str | None = None) -> int:
    """A descriptor (O_PATH) of the directory that `path`, absolute and without symlinks, is in.

    What is done relative to it is done there, whatever others rename meanwhile who may write further up.

    Raises RefusedError if the path leads to another directory by now: by a symlink, or than the `known` identity.
    """
    directory = os.path.dirname(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.readlink(b"/proc/self/fd/%d" % fd) == directory and known in (None, identity(os.fstat(fd))):
        return fd
    os.close(fd)
    raise RefusedError(
        errno.EAGAIN, f"{os.fsdecode(path)} is not the same place any more", "try again where nobody renames"
    )


def rmdir_if_ours(path: bytes, parent: str | None = None) -> bool:
    """Remove a directory that we had made; `parent` is the identity of the one that it was made in.

    It stays if it is in use for something else by now.
    """
    try:
        fd = open_parent(path, parent)
    except OSError:
        return False
    try:
        os.rmdir(os.path.basename(path), dir_fd=fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def unmount_path(path: bytes, lazy: bool, target: bytes, mount_id: int | None = None) -> None:
    """umount2(2) of `path`, whose name for the user is `target`; with `mount_id` of no other mount than that one."""
    parent = open_parent(path)
    # Nobody in this namespace can rename or remove the name itself while something is mounted there.
    exactly = b"/proc/self/fd/%d/%s" % (parent, os.path.basename(path))
    try:
        if mount_id is not None and mountinfo.id_of_path(exactly) != mount_id:
            raise RefusedError(errno.EAGAIN, f"{os.fsdecode(path)} is not the same place any more", "try again")
        syscalls.umount2(exactly, syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise busy(target) from error
        if error.errno in REFUSALS and userns.seccomp_filtered():
            reason = (
                "umount2(2) is refused: a seccomp filter forbids it; end the process that serves the mount and unmount "
                "it outside of that sandbox"
            )
            raise OSError(error.errno, reason, os.fsdecode(target)) from error
        if error.filename is not None:
            error.filename = os.fsdecode(path)
        raise
    finally:
        os.close(parent)


def need_target(target: bytes | None) -> bytes:
    """The target, for strategies that cannot do without."""
    if target is None:
        raise RefusedError(errno.EINVAL, "it needs a mount point", "name one")
    return target


def open_device() -> int:
    """A new /dev/fuse descriptor above 2. Raises RefusedError that says what is wrong with the device."""
    try:
        fd = process.above_stdio(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        number = error.errno or errno.EIO
        if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            reason = "/dev/fuse is missing" if number == errno.ENOENT else "the kernel module fuse is not loaded"
            remedy = "ask the administrator for `modprobe fuse`; in a container, start it with `--device /dev/fuse`"
        elif number == errno.EACCES:
            reason = "/dev/fuse may not be opened by this user"
            remedy = "ask the administrator for `chmod 666 /dev/fuse`, which udev does where it runs"
        elif number == errno.EPERM:
            reason = "/dev/fuse is refused by the device rules of this container"
            remedy = "start the container with `--device /dev/fuse`"
        else:
            reason, remedy = f"/dev/fuse cannot be opened: {error.strerror}", ""
        raise RefusedError(number, reason, remedy) from error
    if os.fstat(fd).st_rdev != FUSE_DEVICE:
        os.close(fd)
        remedy = "ask for `mknod -m 666 /dev/fuse c 10 229`; in a container, start it with `--device /dev/fuse`"
        raise RefusedError(errno.ENXIO, "/dev/fuse is not the character device 10:229", remedy)
    return fd


def check_device() -> None:
    """Raise what `open_device` would."""
    os.close(open_device())


def locate(target: bytes) -> bytes:
    """The absolute target without symlinks, also where it does not exist yet.

    What a namespace mount has put at its target is refused: the kernel follows /proc/PID/fd/N to another namespace,
    but read as text it names a path here that has nothing to do with it.
    """
    name = os.fsdecode(target)
    path = target
    for _ in range(40):
        if not os.path.islink(path):
            break
        text = os.readlink(path)
        if text.startswith(b"/proc/") and b"/fd/" in text:
            raise RefusedError(errno.EBUSY, f"{name} is the link to a mount, live or dead", f"`fusewire umount {name}`")
        path = os.path.join(os.path.dirname(path), text).rstrip(b"/") or b"/"
    else:
        raise RefusedError(errno.ELOOP, f"{name} leads through too many symlinks", "name another place")
    if os.path.basename(path) in (b"", b".", b".."):
        path = os.path.realpath(path)
    parent = os.path.dirname(path)
    real = os.path.realpath(parent)
    try:
        same = os.path.samestat(os.stat(parent), os.stat(real))
    except OSError as error:
        raise RefusedError(
            error.errno or errno.ENOENT, f"{os.fsdecode(parent)} cannot be reached: {error.strerror}", "make it"
        ) from error
    if not same:
        raise RefusedError(errno.EXDEV, f"{name} leads through a mount of another namespace", "name another place")
    return os.path.join(real, os.path.basename(path))


def find_mount_point(target: bytes, options: Options) -> tuple[bytes, bool]:
    """Where the target really is, and whether it must be made first."""
    real = locate(target)
    name = os.fsdecode(target)
    try:
        info = os.stat(real)
    except FileNotFoundError:
        return real, True
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise RefusedError(errno.ENOTCONN, f"a dead mount is at {name}", f"`fusewire umount {name}`") from error
        raise
    if stat.S_ISDIR(options.rootmode) != stat.S_ISDIR(info.st_mode):
        kind = "a directory" if stat.S_ISDIR(options.rootmode) else "a file"
        raise RefusedError(errno.ENOTDIR, f"{name} is not {kind}", "choose another mount point")
    return real, False


def make_directory(path: bytes) -> None:
    """Make a missing mount point."""
    parent = open_parent(path)
    try:
        os.mkdir(os.path.basename(path), 0o755, dir_fd=parent)
    except OSError as error:
        raise OSError(
            error.errno, f"the mount point is missing and cannot be made: {error.strerror}", os.fsdecode(path)
        ) from error
    finally:
        os.close(parent)


def mount_by_string(fd: int, path: bytes, options: Options, only: bool = False) -> None:
    """mount(2). The kernel reads user_id and group_id in the mounter's user namespace, where getuid(2) reads too.

    Where a seccomp filter refuses that call, by the mount API of Linux 5.2, unless `only`: the caller has tried it.
    """
    data = b"fd=%d,rootmode=%o,user_id=%d,group_id=%d" % (fd, options.rootmode, os.getuid(), os.getgid())
    if options.opened_to_others():
        data += b",allow_other"
    if options.default_permissions:
        data += b",default_permissions"
    if options.max_read is not None:
        data += b",max_read=%d" % options.max_read
    flags = options.flags
    if not userns.in_first_namespace():
        flags |= syscalls.MS_NOSUID | syscalls.MS_NODEV
    kind = b"fuse." + options.subtype if options.subtype else b"fuse"
    try:
        try:
            syscalls.mount(options.fsname, path, kind, flags, data)
        except OSError as error:
            if error.errno != errno.ENODEV or not options.subtype:
                raise
            # Kernels without subtypes; there the source carries it, as libfuse has it.
            syscalls.mount(options.subtype + b"#" + options.fsname, path, b"fuse", flags, data)
    except OSError as error:
        if only or error.errno not in REFUSALS or not userns.seccomp_filtered():
            raise explained(error) from error
        try:
            os.close(attach(fd, path, options))
        except OSError:
            raise explained(error) from error


def attach(fd: int, path: bytes, options: Options) -> int:
    """Mount on `path` by the mount API of Linux 5.2 and give a descriptor (O_PATH) of the mount's root.

    fsconfig(2) takes no value that is longer than LONGEST_STRING. Raises OSError; `fd` may be of no use then.
    """
    tree = -1
    done = False
    context = syscalls.fsopen(b"fuse")
    try:
        _configure(context, fd, options)
        attributes = 0
        if not userns.in_first_namespace():
            attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        for flag, attribute, _, _ in FLAGS:
            if options.flags & flag:
                attributes |= attribute
        tree = process.above_stdio(syscalls.fsmount(context, syscalls.FSMOUNT_CLOEXEC, attributes))
        # Symlinks are followed as by mount(2): the path may be that of a descriptor.
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH | syscalls.MOVE_MOUNT_T_SYMLINKS
        syscalls.move_mount(tree, b"", syscalls.AT_FDCWD, path, flags)
        done = True
        return tree
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
    if options.opened_to_others():
        syscalls.fsconfig_set_flag(context, b"allow_other")
    if options.default_permissions:
        syscalls.fsconfig_set_flag(context, b"default_permissions")
    syscalls.fsconfig_create(context)


def first_look(path: bytes) -> None:
    """Have the kernel ask for the attributes of a mount's root; for a process that does not serve it.

    Until then it takes the root for a directory of user 0, whom a namespace may not know: nobody could make anything
    in it (inode_permission, EACCES).
    """
    try:
        os.stat(path)
    except OSError:
        pass  # a mount that this process may not enter, or that has ended; whoever may will see


def explained(error: OSError) -> OSError:
    """The error of a refused mount with its likely cause, others as they are."""
    if error.errno == errno.ENODEV:
        return RefusedError(errno.ENODEV, "this kernel has no FUSE", "ask the administrator for `modprobe fuse`")
    if isinstance(error, RefusedError) or error.errno not in REFUSALS:
        return error
    cause, remedy = userns.explain("mount", error.errno)
    if cause == os.strerror(error.errno):
        cause = "this process does not own its mount namespace, or the kernel (before 4.18) lets only real root mount"
        remedy = "`unshare -m`, or another strategy"
    call = str(error.strerror).split(":")[0].split(" ")[0]  # its name comes first in every message of syscalls.py
    return RefusedError(error.errno, f"{call}(2) is refused: {cause}", remedy)
