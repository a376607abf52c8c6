"""Mounting FUSE: one small interface, and behind it every way that a person may be allowed to mount.

Layer: linux. A strategy gives a /dev/fuse descriptor whose mount exists; nobody reads requests here, so a process that
calls `mount` must not look at the target afterwards before a server answers - and never if it is that server.

fd          the target is /dev/fd/N: somebody has mounted already and left us the descriptor.
direct      mount(2), for who has CAP_SYS_ADMIN in the user namespace.
fusermount3 the set-user-ID helper (then the older fusermount).
namespace   a user and mount namespace of this process. Others reach the mount through an open descriptor of it,
            /proc/PID/fd/N, which a symlink at the target names. The process must be the server, and of one thread.

`auto` tries them in this order. auto_unmount is a job for the helper (before fusermount3 3.15 it works only together
with allow_other): namespaces die with their last process, and `fd` and `direct` accept the option and leave the
clearing up to whoever finds the dead mount (`clean_up`).
"""

from __future__ import annotations

import errno
import os
import select
import stat

from fusewire.linux import fusermount, mount_namespace, mountinfo, syscalls, userns
from fusewire.linux.mount_base import (
    FLAGS,
    FUSE_DEVICE,
    Mount,
    Options,
    RefusedError,
    busy,
    check_device,
    find_mount_point,
    make_directory,
    mount_by_string,
    need_target,
    open_device,
    rmdir_if_ours,
    unmount_path,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STRATEGIES = ("fd", "direct", "fusermount3", "namespace")


class MountError(OSError):
    """No strategy worked. `attempts` has (strategy, reason, remedy) of each one, and the text a line for each."""

    def __init__(self, number: int, target: bytes | None, attempts: list[tuple[str, str, str]]) -> None:
        name = "a private mount" if target is None else os.fsdecode(target)
        super().__init__(number, f"cannot mount {name}")
        self.attempts = attempts

    def __str__(self) -> str:
        lines = [f"{self.strerror}:"]
        lines += [
            f"  {strategy}: {reason}{f' - {remedy}' if remedy else ''}" for strategy, reason, remedy in self.attempts
        ]
        return "\n".join(lines)


class _InheritedMount(Mount):
    __slots__ = ()

    def _is_on_top(self) -> bool:
        return True

    def _unmount(self, lazy: bool) -> None:
        # Where it is mounted only the one who mounted it knows; libfuse also just lets go of the descriptor.
        del lazy
        self.close()


class _DirectMount(Mount):
    __slots__ = ()

    def _unmount(self, lazy: bool) -> None:
        unmount_path(self.inside, lazy, self.target, self._mount_id)


class _HelperMount(Mount):
    __slots__ = ("_pid", "_program", "_socket")

    def __init__(self, program: str, fd: int, target: bytes, inside: bytes, pid: int, socket: int) -> None:
        super().__init__("fusermount3", fd, target, inside)
        self._program = program
        self._pid = pid
        self._socket = socket

    def _unmount(self, lazy: bool) -> None:
        _helper_unmount(self._program, self.inside, lazy, self.target)

    def _tidy(self) -> None:
        self._let_go_of_helper()
        super()._tidy()

    def close(self) -> None:
        super().close()
        self._let_go_of_helper()  # it looks for ENOTCONN, so after the descriptor

    def _let_go_of_helper(self) -> None:
        if self._socket >= 0:
            os.close(self._socket)
            os.waitpid(self._pid, 0)
            self._socket = self._pid = -1


def _helper_unmount(program: str, path: bytes, lazy: bool, target: bytes) -> None:
    try:
        fusermount.unmount(program, path, lazy)
    except fusermount.HelperError as error:
        raise (busy(target) if error.errno == errno.EBUSY else error) from error


def mount(
    target: bytes | None,
    options: Options,
    strategy: str = "auto",
    *,
    private: bytes | None = None,
    plan: userns.Plan | None = None,
    program: str | None = None,
    aside: bytes | None = None,
) -> Mount:
    """Mount FUSE at `target` by one strategy, or by the first of all that works.

    target: None for a mount without a place of its own, which only `namespace` has. A missing one is made and later
    removed. private: an empty directory of the user's for `namespace` to mount on, seen by nobody else. plan: its id
    mapping, the caller itself by default. program: the helper instead of fusermount3 from PATH. aside: the name (see
    `mount_namespace.aside_name`) by which `namespace` keeps an empty directory that its link takes the place of.

    Raises MountError; nothing is left behind then, except that a process that got as far as `namespace` stays in it.
    """
    if target is not None:
        target = _absolute(target)
    attempts: list[tuple[str, str, str]] = []
    number = errno.EPERM
    for name in STRATEGIES if strategy == "auto" else (strategy,):
        try:
            if name == "fd":
                return _mount_fd(target)
            if name == "direct":
                return _mount_direct(target, options)
            if name == "fusermount3":
                return _mount_helper(target, options, program)
            if name == "namespace":
                return mount_namespace.mount(target, options, private, plan, aside)
            raise RefusedError(errno.EINVAL, "there is no such strategy", f"use auto or one of {', '.join(STRATEGIES)}")
        except OSError as error:
            number = error.errno or number
            attempts.append((name, *_why(error)))
    raise MountError(number, target, attempts)


def reasons(
    target: bytes | None,
    options: Options,
    *,
    private: bytes | None = None,
    plan: userns.Plan | None = None,
    program: str | None = None,
) -> list[tuple[str, str | None, str]]:
    """For each strategy why it would not work, as (strategy, reason or None, remedy); nothing is mounted.

    `namespace` is tried as far as making one, in a child. None is a strong hint and no promise.
    """
    if target is not None:
        target = _absolute(target)
    checks: tuple[Callable[[], object], ...] = (
        lambda: _check_fd(target),
        lambda: _check_direct(target, options),
        lambda: _check_helper(target, options, program),
        lambda: mount_namespace.probe(target, options, private, plan),
    )
    found: list[tuple[str, str | None, str]] = []
    for name, check in zip(STRATEGIES, checks, strict=True):
        try:
            check()
            found.append((name, None, ""))
        except OSError as error:
            found.append((name, *_why(error)))
    return found


def _why(error: OSError) -> tuple[str, str]:
    if isinstance(error, userns.UsernsError):
        return f"{error.strerror}: {error.cause}", error.remedy
    reason = str(error.strerror or error)
    if error.filename is not None:
        reason += f": {os.fsdecode(error.filename)}"
    return reason, str(getattr(error, "remedy", ""))


def _absolute(path: bytes) -> bytes:
    # Not normpath: `a/../b` is another place than `b` where `a` is a symlink.
    if not path.startswith(b"/"):  # else the working directory need not have a path
        path = os.path.join(os.getcwdb(), path)
    return path.rstrip(b"/") or b"/"


# --- fd


def _check_fd(target: bytes | None) -> int:
    prefix, _, number = (target or b"").rpartition(b"/")
    if prefix not in (b"/dev/fd", b"/proc/self/fd") or not number.isdigit() or len(number) > 9:
        raise RefusedError(errno.EINVAL, "the mount point is not /dev/fd/N", "")
    fd = int(number)
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise RefusedError(
            errno.EBADF, f"descriptor {fd} is not open", "let the caller leave it open for us"
        ) from error
    if not stat.S_ISCHR(info.st_mode) or info.st_rdev != FUSE_DEVICE:
        raise RefusedError(
            errno.EINVAL, f"descriptor {fd} is not /dev/fuse", "let the caller open /dev/fuse and mount it"
        )
    watch = select.poll()
    watch.register(fd, 0)
    if watch.poll(0):
        raise RefusedError(
            errno.ENODEV, f"nothing is mounted with descriptor {fd}", "let the caller mount before it starts us"
        )
    return fd


def _mount_fd(target: bytes | None) -> Mount:
    fd = _check_fd(target)
    os.set_inheritable(fd, False)
    target = need_target(target)
    return _InheritedMount("fd", fd, target, target)


# --- direct


def _check_direct(target: bytes | None, options: Options) -> None:
    if not syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
        raise RefusedError(errno.EPERM, "mount(2) needs CAP_SYS_ADMIN", "be root, or of a namespace (`fusewire run`)")
    find_mount_point(need_target(target), options)
    check_device()


def _mount_direct(target: bytes | None, options: Options) -> Mount:
    _check_direct(target, options)
    target = need_target(target)
    inside, created = find_mount_point(target, options)
    if inside == b"/":
        raise RefusedError(errno.EBUSY, "a mount over / is seen by nobody", "choose another mount point")
    fd = open_device()
    done = False
    try:
        if created:
            make_directory(inside)
        _mount_exactly(fd, inside, options)
        result = _DirectMount("direct", fd, target, inside)
        result._created = created
        result._remember()
        done = True
        return result
    finally:
        if not done:
            os.close(fd)
            if created:
                rmdir_if_ours(inside)


def _mount_exactly(fd: int, path: bytes, options: Options) -> None:
    """mount(2) at a path without symlinks, as it was found: root mounts in directories where others may rename."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    name = b"/proc/self/fd/%d" % place
    try:
        if os.readlink(name) != path:
            raise RefusedError(
                errno.EAGAIN, f"{os.fsdecode(path)} is not the same place any more", "try again where nobody renames"
            )
        mount_by_string(fd, name, options)
    except OSError as error:
        if error.filename == os.fsdecode(name):
            error.filename = os.fsdecode(path)
        raise
    finally:
        os.close(place)


# --- fusermount3


def _check_helper(target: bytes | None, options: Options, program: str | None) -> list[str]:
    """The helpers that are worth a try. A program that the user named is trusted to be what it takes."""
    programs = fusermount.find(program)
    if not programs:
        raise RefusedError(
            errno.ENOENT, "neither fusermount3 nor fusermount is installed", "ask the administrator to install fuse3"
        )
    if program is not None:
        return programs
    if options.opened_to_others() and os.geteuid() != 0 and not fusermount.user_allow_other():
        raise RefusedError(
            errno.EPERM,
            "/etc/fuse.conf does not let users mount with allow_other",
            "leave out allow_other, or ask for the line `user_allow_other` in /etc/fuse.conf",
        )
    usable = []
    refusal: OSError | None = None
    for path in programs:
        try:
            fusermount.check(path)
            usable.append(path)
        except OSError as error:
            refusal = refusal or error
    if refusal and not usable:
        raise refusal
    find_mount_point(need_target(target), options)
    check_device()  # the helper opens it with the user's rights
    return usable


def _helper_options(options: Options) -> bytes:
    words = [word for flag, _, _, word in FLAGS if word is not None and options.flags & flag]
    words.append(b"fsname=" + fusermount.escape(options.fsname))
    if options.subtype:
        words.append(b"subtype=" + fusermount.escape(options.subtype))
    if options.opened_to_others():
        words.append(b"allow_other")
    if options.default_permissions:
        words.append(b"default_permissions")
    if options.max_read is not None:
        words.append(b"max_read=%d" % options.max_read)
    if options.auto_unmount:
        words.append(b"auto_unmount")
    return b",".join(words)


def _mount_helper(target: bytes | None, options: Options, program: str | None) -> Mount:
    programs = _check_helper(target, options, program)
    target = need_target(target)
    inside, created = find_mount_point(target, options)
    if created:
        make_directory(inside)
    done = False
    refusal: OSError | None = None
    try:
        for path in programs:
            try:
                fd, pid, socket = fusermount.mount(path, inside, _helper_options(options), options.auto_unmount)
            except fusermount.HelperError as error:
                refusal = refusal or error
                continue
            result = _HelperMount(path, fd, target, inside, pid, socket)
            result._created = created
            result._remember()
            done = True
            return result
        raise refusal or OSError(errno.ENOENT, "no helper")
    finally:
        if not done and created:
            rmdir_if_ours(inside)


# --- after a crash


def clean_up(record: dict[str, str | int | bool | None], program: str | None = None) -> None:
    """Remove what a mount has left whose server is dead, from its `Mount.record()`. The caller knows that it is dead.

    A link or a directory is removed only if it is the one that was made, a mount only if it is a FUSE mount with the
    recorded place, id and device. Raises OSError if the mount is there and cannot be removed.
    """
    strategy = record["strategy"]
    parent = record.get("parent")
    parent = parent if isinstance(parent, str) else None
    if strategy == "namespace":
        place, outside, aside = record.get("place"), record["outside"], record.get("aside")
        if isinstance(place, str) and isinstance(outside, str):
            name = os.fsencode(aside) if isinstance(aside, str) else None
            mount_namespace.put_back(os.fsencode(place), os.fsencode(outside), name, parent)
        return
    if strategy == "fd":
        return
    inside = os.fsencode(str(record["inside"]))
    found = mountinfo.at(inside)
    if found and found.is_fuse and found.id == record["mount_id"] and os.fsdecode(found.device) == record["device"]:
        target = os.fsencode(str(record["target"]))
        if syscalls.has_capability(syscalls.CAP_SYS_ADMIN):
            unmount_path(inside, True, target, found.id)
        else:
            programs = fusermount.find(program)
            if not programs:
                raise OSError(errno.ENOENT, "a dead mount stays: fusermount3 is not installed", os.fsdecode(target))
            _helper_unmount(programs[0], inside, True, target)
    if record["created"]:
        rmdir_if_ours(inside, parent)
