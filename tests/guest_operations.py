"""A guest's script for two daemons: some hundred operations, chosen by a seed, and a line for what each has done.

    python3 guest_operations.py DIRECTORY [SEED [OPERATIONS]]

The directory has to be empty. Nothing outside it is touched. The lines are the same on every filesystem that does what
Linux asks of one; they name no inode numbers and no times but those that were set. Needs the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import stat
import struct
import sys
from collections.abc import Callable
from typing import Any

NAMES = ("a", "b", "c", "name with spaces", "ü" * 100)
DIRECTORIES = (".", "one", "one/inner")
ATTRIBUTES = ("user.one", "user.two", "trusted.three", "security.four")
AT_FDCWD = -100
NOREPLACE, EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
WRITE_LOCK, READ_LOCK, UNLOCK = fcntl.F_WRLCK, fcntl.F_RDLCK, fcntl.F_UNLCK


_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Any) -> None:
    """A system call that Python lacks."""
    if getattr(_libc, function)(*arguments):
        raise OSError(ctypes.get_errno(), function)


def shown(value: Any) -> str:
    """A value as a short text."""
    if isinstance(value, bytes) and len(value) > 40:
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:12]}"
    return repr(value)


def facts(status: os.stat_result) -> tuple[object, ...]:
    """What is the same everywhere about a file."""
    directory = stat.S_ISDIR(status.st_mode)
    size = () if directory else (status.st_size, status.st_nlink)
    return oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, *size


class Script:
    """The operations: each method that begins with do_ is one, and chooses what it works on."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.open: list[int] = []

    def path(self) -> str:
        return f"{self.rng.choice(DIRECTORIES)}/{self.rng.choice(NAMES)}"

    def fd(self) -> int:
        """An open file; there is always one."""
        return self.rng.choice(self.open)

    def data(self) -> bytes:
        return self.rng.randbytes(self.rng.choice((0, 1, 100, 4096, 5000, 40_000)))

    def offset(self) -> int:
        return self.rng.choice((0, 1, 4095, 4096, 10_000, 100_000))

    def attribute(self) -> str:
        return self.rng.choice(ATTRIBUTES)

    def do_open(self) -> str:
        flags = self.rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
        for flag in (os.O_CREAT, os.O_EXCL, os.O_TRUNC, os.O_APPEND, os.O_NOFOLLOW):
            flags |= flag if self.rng.random() < 0.4 else 0
        if not flags & os.O_CREAT:
            flags &= ~os.O_EXCL  # which means nothing alone
        self.open.append(os.open(self.path(), flags | os.O_NONBLOCK, self.rng.choice((0o600, 0o644, 0o4755))))
        if len(self.open) > 12:
            os.close(self.open.pop(0))
        return oct(flags)

    def do_write(self) -> int:
        return os.pwrite(self.fd(), self.data(), self.offset())

    def do_append(self) -> int:
        return os.write(self.fd(), self.data())

    def do_read(self) -> bytes:
        return os.pread(self.fd(), self.rng.choice((1, 4096, 200_000)), self.offset())

    def do_read_all(self) -> bytes:
        fd = os.open(self.path(), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)

    def do_seek(self) -> int:
        fd = self.fd()
        where = os.lseek(fd, self.offset(), os.SEEK_SET)
        return where + os.lseek(fd, 0, os.SEEK_END)

    def do_truncate(self) -> None:
        os.truncate(self.path(), self.offset())

    def do_ftruncate(self) -> None:
        os.ftruncate(self.fd(), self.offset())

    def do_fallocate(self) -> None:
        os.posix_fallocate(self.fd(), self.offset(), 5000)

    def do_fsync(self) -> None:
        os.fsync(self.fd())

    def do_fstat(self) -> tuple[object, ...]:
        return facts(os.fstat(self.fd()))

    def do_stat(self) -> tuple[object, ...]:
        return facts(os.stat(self.path()))

    def do_lstat(self) -> tuple[object, ...]:
        return facts(os.lstat(self.path()))

    def do_mkdir(self) -> None:
        os.mkdir(self.path(), self.rng.choice((0o700, 0o755, 0o2775)))

    def do_rmdir(self) -> None:
        os.rmdir(self.path())

    def do_unlink(self) -> None:
        os.unlink(self.path())

    def do_symlink(self) -> None:
        os.symlink(self.rng.choice((*NAMES, "inner/a", "/nowhere/else", "")), self.path())

    def do_readlink(self) -> str:
        return os.readlink(self.path())

    def do_link(self) -> None:
        os.link(self.path(), self.path(), follow_symlinks=False)

    def do_rename(self) -> None:
        os.rename(self.path(), self.path())

    def do_rename_with_flags(self) -> None:
        flags = self.rng.choice((NOREPLACE, EXCHANGE, NOREPLACE | EXCHANGE))
        call("renameat2", AT_FDCWD, self.path().encode(), AT_FDCWD, self.path().encode(), flags)

    def do_tmpfile(self) -> bytes:
        fd = os.open(self.rng.choice(DIRECTORIES), os.O_TMPFILE | os.O_RDWR)
        try:
            os.write(fd, self.data())
            return os.pread(fd, 1 << 20, 0)
        finally:
            os.close(fd)

    def do_punch(self) -> None:
        mode = self.rng.choice((KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE))
        call("fallocate", self.fd(), mode, ctypes.c_int64(self.offset()), ctypes.c_int64(9000))

    def do_holes(self) -> tuple[int, int]:
        fd = self.fd()
        return os.lseek(fd, 0, os.SEEK_HOLE), os.lseek(fd, self.offset(), os.SEEK_DATA)

    def do_mknod(self) -> None:
        kind = self.rng.choice((stat.S_IFIFO, stat.S_IFREG, stat.S_IFSOCK, stat.S_IFCHR))
        os.mknod(self.path(), kind | 0o640, os.makedev(1, 3) if kind == stat.S_IFCHR else 0)

    def do_chmod(self) -> None:
        os.chmod(self.path(), self.rng.choice((0, 0o600, 0o755, 0o6755, 0o1777)))

    def do_chown(self) -> None:
        os.chown(self.path(), self.rng.choice((-1, 0, 1000)), self.rng.choice((-1, 0, 1000)), follow_symlinks=False)

    def do_utime(self) -> tuple[int, int]:
        path = self.path()
        os.utime(path, ns=(self.rng.randrange(1 << 60), self.rng.randrange(1 << 60)), follow_symlinks=False)
        status = os.lstat(path)
        return status.st_atime_ns, status.st_mtime_ns

    def do_list(self) -> list[str]:
        return sorted(os.listdir(self.rng.choice(DIRECTORIES)))

    def do_types(self) -> list[tuple[str, bool, bool]]:
        with os.scandir(self.rng.choice(DIRECTORIES)) as found:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in found)

    def do_set_attribute(self) -> None:
        flags = self.rng.choice((0, os.XATTR_CREATE, os.XATTR_REPLACE))
        os.setxattr(self.path(), self.attribute(), self.data()[:200], flags, follow_symlinks=False)

    def do_get_attribute(self) -> bytes:
        return os.getxattr(self.path(), self.attribute(), follow_symlinks=False)

    def do_list_attributes(self) -> list[str]:
        return sorted(os.listxattr(self.path(), follow_symlinks=False))

    def do_remove_attribute(self) -> None:
        os.removexattr(self.path(), self.attribute(), follow_symlinks=False)

    def do_lock(self) -> None:
        kind = self.rng.choice((WRITE_LOCK, READ_LOCK, UNLOCK))
        fcntl.fcntl(self.fd(), fcntl.F_SETLK, struct.pack("hhqqi4x", kind, 0, self.offset(), 10, 0))

    def do_flock(self) -> None:
        fcntl.flock(self.fd(), self.rng.choice((fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_UN)) | fcntl.LOCK_NB)

    def do_copy(self) -> int:
        return os.copy_file_range(self.fd(), self.fd(), 3000, self.offset(), self.offset() + 200_000)

    def do_space(self) -> tuple[int, int]:
        found = os.statvfs(self.path())
        return found.f_bsize, found.f_namemax

    def do_access(self) -> bool:
        return os.access(self.path(), self.rng.choice((os.R_OK, os.W_OK, os.X_OK)))

    def do_close(self) -> None:
        if len(self.open) > 1:
            os.close(self.open.pop(self.rng.randrange(len(self.open))))


def outcome(function: Callable[[], Any]) -> str:
    try:
        return shown(function())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def tree() -> list[str]:
    """Everything that there is at the end."""
    lines = []
    for directory, directories, names in os.walk("."):
        directories.sort()
        for name in sorted([*directories, *names]):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            lines.append(f"{path} {facts(status)}")
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    lines.append(f"  {hashlib.sha256(file.read()).hexdigest()[:12]}")
    return lines


def main(directory: str, seed: int = 1, operations: int = 800) -> None:
    """Run the script and print what has come of it."""
    os.umask(0o022)
    os.chdir(directory)
    script = Script(seed)
    script.open.append(os.open("a", os.O_RDWR | os.O_CREAT, 0o644))
    for place in DIRECTORIES[1:]:
        os.mkdir(place)
    kinds = sorted(name for name in dir(script) if name.startswith("do_"))
    for number in range(operations):
        # An operation that fails half way must not leave the next ones with other numbers.
        script.rng.seed(seed * 1_000_003 + number)
        name = script.rng.choice([*kinds, "do_open", "do_write", "do_append", "do_read"])
        print(f"{number} {name[3:]} {outcome(getattr(script, name))}")
    print(*tree(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
