"""What every directory that is mounted read-only has to show: `READ_ONLY`, name -> check.

Layer `testing`. Each check takes the directory's path, and raises AssertionError, or OSError for what should have
worked. They change nothing and need nothing to be in the tree; the more is in it, the more they see.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any


def _fails(number: int, function: Callable[..., Any], *args: Any) -> None:
    got = 0
    try:
        function(*args)
    except OSError as error:
        got = error.errno or 0
    assert got == number, f"{args}: {errno.errorcode.get(got, 'success')} instead of {errno.errorcode[number]}"


def _some(root: str, wanted: Callable[[int], bool], limit: int = 20) -> list[str]:
    found = []
    for directory, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = os.path.join(directory, name)
            if wanted(os.lstat(path).st_mode):
                found.append(path)
                if len(found) == limit:
                    return found
    return found


def _root_is_a_directory(root: str) -> None:
    status = os.stat(root)
    assert stat.S_ISDIR(status.st_mode)
    assert status.st_nlink >= 1


def _missing_name_is_enoent(root: str) -> None:
    for _ in range(2):  # the second time from the cache
        _fails(errno.ENOENT, os.stat, os.path.join(root, "no such name"))


def _name_of_255_bytes_is_looked_up(root: str) -> None:
    _fails(errno.ENOENT, os.stat, os.path.join(root, "n" * 255))


def _name_of_256_bytes_is_enametoolong(root: str) -> None:
    _fails(errno.ENAMETOOLONG, os.stat, os.path.join(root, "n" * 256))


def _listing_has_each_name_once(root: str) -> None:
    for directory in [root, *_some(root, stat.S_ISDIR)]:
        names = os.listdir(directory)
        assert len(set(names)) == len(names)
        assert sorted(names) == sorted(os.listdir(directory))
        assert not {".", ".."} & set(names)


def _listed_names_can_be_looked_up(root: str) -> None:
    for directory in [root, *_some(root, stat.S_ISDIR)]:
        with os.scandir(directory) as entries:
            for entry in entries:
                status = os.lstat(entry.path)
                assert entry.inode() == status.st_ino
                assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
                assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(status.st_mode)
                assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)


def _dotdot_leads_back(root: str) -> None:
    for directory in _some(root, stat.S_ISDIR):
        assert os.path.samefile(os.path.join(directory, ".."), os.path.dirname(directory))
        assert os.path.samefile(os.path.join(directory, "."), directory)


def _file_has_as_many_bytes_as_it_says(root: str) -> None:
    for path in _some(root, stat.S_ISREG):
        with open(path, "rb") as file:
            size = 0
            while part := file.read(1 << 20):
                size += len(part)
        assert size == os.stat(path).st_size


def _reads_at_odd_places_agree(root: str) -> None:
    for path in _some(root, stat.S_ISREG):
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            if size > 1 << 24:
                continue
            whole = os.pread(fd, size, 0)
            for offset in {0, 1, 4095, 4096, 4097, size // 2, max(0, size - 1), size}:
                assert os.pread(fd, 5000, offset) == whole[offset : offset + 5000]
        finally:
            os.close(fd)


def _read_past_the_end_is_empty(root: str) -> None:
    for path in _some(root, stat.S_ISREG):
        fd = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            assert os.pread(fd, 100, size) == b""
            assert os.pread(fd, 100, size + (1 << 32)) == b""
        finally:
            os.close(fd)


def _file_is_no_directory(root: str) -> None:
    for path in _some(root, stat.S_ISREG, 3):
        _fails(errno.ENOTDIR, os.stat, path + "/name")
        _fails(errno.ENOTDIR, os.listdir, path)


def _directory_cannot_be_read_as_a_file(root: str) -> None:
    fd = os.open(root, os.O_RDONLY)
    try:
        _fails(errno.EISDIR, os.read, fd, 1)
    finally:
        os.close(fd)


def _symlink_is_as_long_as_it_says(root: str) -> None:
    for path in _some(root, stat.S_ISLNK):
        target = os.fsencode(os.readlink(path))
        assert target
        assert len(target) == os.lstat(path).st_size


def _statistics_are_given(root: str) -> None:
    status = os.statvfs(root)
    assert status.f_namemax >= 1
    assert status.f_bsize >= 1


def _changes_are_refused(root: str) -> None:
    path = os.path.join(root, "new")
    _fails(errno.EROFS, os.mkdir, path)
    _fails(errno.EROFS, os.symlink, "x", path)
    _fails(errno.EROFS, os.open, path, os.O_CREAT | os.O_WRONLY)
    _fails(errno.EROFS, os.chmod, root, 0o700)
    for file in _some(root, stat.S_ISREG, 1):
        _fails(errno.EROFS, os.open, file, os.O_WRONLY)
        _fails(errno.EROFS, os.unlink, file)
        _fails(errno.EROFS, os.truncate, file, 0)
        _fails(errno.EROFS, os.rename, file, path)


READ_ONLY: dict[str, Callable[[str], None]] = {
    function.__name__[1:]: function
    for function in (
        _root_is_a_directory,
        _missing_name_is_enoent,
        _name_of_255_bytes_is_looked_up,
        _name_of_256_bytes_is_enametoolong,
        _listing_has_each_name_once,
        _listed_names_can_be_looked_up,
        _dotdot_leads_back,
        _file_has_as_many_bytes_as_it_says,
        _reads_at_odd_places_agree,
        _read_past_the_end_is_empty,
        _file_is_no_directory,
        _directory_cannot_be_read_as_a_file,
        _symlink_is_as_long_as_it_says,
        _statistics_are_given,
        _changes_are_refused,
    )
}
"""Name -> check of a directory mounted read-only."""
