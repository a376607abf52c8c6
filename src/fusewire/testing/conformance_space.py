"""Behaviours of space and of copying within the kernel: fallocate, SEEK_DATA, copy_file_range, sendfile, splice.

Layer `testing`; see observe.py for what a transcript may hold. Which modes fallocate(2) has differs between
filesystems: where one is refused as unknown, the transcript has what it would have made.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from fusewire.testing import calls
from fusewire.testing.calls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from fusewire.testing.observe import collect, facts, get, noise, opened, outcome, plain, put

_RW = os.O_RDWR | os.O_CREAT
_MIB = 1 << 20


def allocation_extends_a_file_with_zeros(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, b"content")
        found = outcome(calls.fallocate, fd, 0, 5000, 5000)
        data = os.pread(fd, 20000, 0)
        return found, os.fstat(fd).st_size, repr(data[:8]), data.count(b"\0"), os.lseek(fd, 0, os.SEEK_CUR)


def allocation_within_a_file_changes_no_data(root: str) -> Any:
    path = put(f"{root}/file", noise(20000))
    with opened(path, os.O_RDWR) as fd:
        return outcome(calls.fallocate, fd, 0, 100, 10000), facts(fd), plain(get(path))


def allocation_may_keep_the_size(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, b"content")
        found = outcome(calls.fallocate, fd, FALLOC_FL_KEEP_SIZE, 0, 100_000)
        first = os.fstat(fd).st_size
        os.pwrite(fd, b"x", 50_000)
        return found, first, os.fstat(fd).st_size, os.pread(fd, 60_000, 0).count(b"\0")


def posix_allocation_works(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        return outcome(os.posix_fallocate, fd, 0, 12345), os.fstat(fd).st_size, outcome(os.posix_fallocate, fd, 0, 0)


def punched_hole_is_read_as_zeros(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 50_000)
    found = []
    with opened(path, os.O_RDWR) as fd:
        for offset, length in ((4096, 8192), (100, 50), (20_001, 9999), (49_000, 100_000), (0, 1)):
            kept = os.pread(fd, 60_000, 0)
            done = outcome(calls.fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
            data = os.pread(fd, 60_000, 0)
            outside = data[:offset] == kept[:offset] and data[offset + length :] == kept[offset + length :]
            found.append((done, len(data), data.count(b"\0"), outside))
    return found


def punched_hole_past_the_end_keeps_the_size(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, b"content")
        done = outcome(calls.fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100_000, 4096)
        return done, os.fstat(fd).st_size


def punched_hole_gives_space_back(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, noise(_MIB))
        os.fsync(fd)
        calls.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, _MIB // 2)
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512 < _MIB * 3 // 4


def range_can_be_zeroed(root: str) -> Any:
    found = []
    for mode in (FALLOC_FL_ZERO_RANGE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE):
        with opened(f"{root}/{mode}", _RW) as fd:
            os.write(fd, b"x" * 20_000)
            for offset, length in ((5000, 5000), (19_000, 4000)):
                try:
                    calls.fallocate(fd, mode, offset, length)
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
                    stop = min(offset + length, os.fstat(fd).st_size) if mode & FALLOC_FL_KEEP_SIZE else offset + length
                    os.pwrite(fd, bytes(stop - offset), offset)
                found.append((os.fstat(fd).st_size, os.pread(fd, 30_000, 0).count(b"x")))
    return found


def allocation_refuses_what_makes_no_sense(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    os.mkfifo(f"{root}/fifo")
    found = []
    with opened(path, os.O_RDWR) as fd:
        for mode, offset, length in ((0, 0, 0), (0, -1, 10), (0, 0, -1), (1, 5, 0), (0, 1, (1 << 63) - 1)):
            found.append(outcome(calls.fallocate, fd, mode, offset, length))
        found.append(outcome(calls.fallocate, fd, FALLOC_FL_PUNCH_HOLE, 0, 10))
        found.append(outcome(calls.fallocate, fd, 1 << 20, 0, 10))
    for place, flags in ((path, os.O_RDONLY), (f"{root}/fifo", os.O_RDWR), (root, os.O_RDONLY)):
        with opened(place, flags) as fd:
            found.append(outcome(calls.fallocate, fd, 0, 0, 10))
    return found, os.stat(path).st_size


# Data and holes


def data_is_found_where_it_is(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        for place in (1, 5):
            os.pwrite(fd, noise(_MIB), place * _MIB)
        os.ftruncate(fd, 8 * _MIB)
        os.fsync(fd)
        covered = []
        position = 0
        while True:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                end = errno.errorcode[error.errno or 0]
                break
            position = os.lseek(fd, start, os.SEEK_HOLE)
            covered.append((start, position))
        data_inside = all(any(a <= p * _MIB and (p + 1) * _MIB <= b for a, b in covered) for p in (1, 5))
        return data_inside, end, covered == sorted(covered), os.lseek(fd, 0, os.SEEK_CUR) == position


def end_of_a_file_is_a_hole(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, noise(10_000))
        return (
            [outcome(os.lseek, fd, place, os.SEEK_DATA) for place in (0, 1, 9999, 10_000, 20_000)],
            [outcome(os.lseek, fd, place, os.SEEK_HOLE) for place in (0, 1, 9999, 10_000, 20_000)],
            outcome(os.lseek, fd, -1, os.SEEK_DATA),
            outcome(os.lseek, fd, -1, os.SEEK_HOLE),
        )


def empty_file_has_no_data(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        return outcome(os.lseek, fd, 0, os.SEEK_DATA), outcome(os.lseek, fd, 0, os.SEEK_HOLE)


def data_that_was_just_written_is_found(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.ftruncate(fd, 4 * _MIB)
        os.pwrite(fd, b"x", 3 * _MIB)
        first = os.lseek(fd, 0, os.SEEK_DATA) <= 3 * _MIB
        return first, os.lseek(fd, 3 * _MIB, os.SEEK_DATA), os.lseek(fd, 3 * _MIB, os.SEEK_HOLE) > 3 * _MIB


# Copying


def _copy(source: int, target: int, count: int, offset: int | None, place: int | None) -> Any:
    done = 0
    while done < count:
        step = os.copy_file_range(
            source,
            target,
            count - done,
            offset + done if offset is not None else None,
            place + done if place is not None else None,
        )
        if not step:
            break
        done += step
    return done


def range_is_copied_to_another_file(root: str) -> Any:
    data = noise(300_000)
    put(f"{root}/source", data)
    found = []
    with opened(f"{root}/source") as source, opened(f"{root}/target", _RW) as target:
        for offset, count, place in ((0, 300_000, 0), (12_345, 100_000, 500_001), (4096, 8192, 0), (299_999, 1, 7)):
            found.append((_copy(source, target, count, offset, place), os.fstat(target).st_size))
        found.append((os.lseek(source, 0, os.SEEK_CUR), os.lseek(target, 0, os.SEEK_CUR)))
    return found, plain(get(f"{root}/target"))


def copying_moves_the_offsets(root: str) -> Any:
    put(f"{root}/source", b"0123456789")
    with opened(f"{root}/source") as source, opened(f"{root}/target", _RW) as target:
        os.lseek(source, 3, os.SEEK_SET)
        os.write(target, b"ab")
        count = _copy(source, target, 4, None, None)
        return count, [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, target)], repr(get(f"{root}/target"))


def copying_past_the_end_gives_what_there_is(root: str) -> Any:
    put(f"{root}/source", b"0123456789")
    with opened(f"{root}/source") as source, opened(f"{root}/target", _RW) as target:
        counts = [outcome(_copy, source, target, size, offset, 0) for size, offset in ((100, 7), (100, 10), (5, 100))]
        return counts, repr(get(f"{root}/target"))


def range_is_copied_within_a_file(root: str) -> Any:
    path = put(f"{root}/file", noise(50_000))
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDWR) as other:
        found = [_copy(fd, fd, 10_000, 0, 40_000), _copy(fd, other, 20_000, 20_000, 60_000)]
        return found, plain(get(path))


def overlapping_copy_is_refused(root: str) -> Any:
    path = put(f"{root}/file", noise(50_000))
    with opened(path, os.O_RDWR) as fd:
        found = [outcome(os.copy_file_range, fd, fd, 10_000, 0, place) for place in (0, 1, 9999)]
        return *found, outcome(os.copy_file_range, fd, fd, 10_000, 5000, 0), plain(get(path))


def copying_needs_the_right_descriptors(root: str) -> Any:
    path = put(f"{root}/file", b"0123456789")
    found = []
    for first, second in (
        (os.O_WRONLY, os.O_RDWR),
        (os.O_RDONLY, os.O_RDONLY),
        (os.O_RDONLY, os.O_WRONLY | os.O_APPEND),
    ):
        with opened(path, first) as source, opened(f"{root}/target", second | os.O_CREAT) as target:
            found.append(outcome(os.copy_file_range, source, target, 5))
    with opened(root) as source, opened(path, os.O_RDWR) as target:
        found.append(outcome(os.copy_file_range, source, target, 5))
        found.append(outcome(os.copy_file_range, target, target, 0))
    return found


def copying_takes_what_was_just_written(root: str) -> Any:
    with opened(f"{root}/source", _RW) as source, opened(f"{root}/target", _RW) as target:
        os.write(source, b"first")
        os.write(target, b"." * 10)
        counts = [_copy(source, target, 5, 0, 0)]
        os.pwrite(source, b"SECOND", 0)
        counts.append(_copy(source, target, 6, 0, 2))
        return counts, repr(os.pread(target, 20, 0))


def holes_are_copied_as_zeros(root: str) -> Any:
    with opened(f"{root}/source", _RW) as source, opened(f"{root}/target", _RW) as target:
        os.write(target, b"x" * 100_000)
        os.pwrite(source, b"end", 70_000)
        count = _copy(source, target, 70_003, 0, 5)
        data = os.pread(target, 200_000, 0)
        return count, data.count(b"\0"), data.count(b"x"), repr(data[70_003:70_010])


def sendfile_copies(root: str) -> Any:
    data = noise(200_000)
    put(f"{root}/source", data)
    with opened(f"{root}/source") as source, opened(f"{root}/target", _RW) as target:
        done = 0
        while done < 150_000:
            done += os.sendfile(target, source, 1000 + done, 150_000 - done)
        past = os.sendfile(target, source, 200_000, 10)
        return done, past, get(f"{root}/target") == data[1000:151_000], os.lseek(target, 0, os.SEEK_CUR)


def sendfile_feeds_a_pipe(root: str) -> Any:
    put(f"{root}/source", noise(5000))
    reader, writer = os.pipe()
    with opened(f"{root}/source") as source:
        count = os.sendfile(writer, source, 100, 3000)
        data = os.read(reader, 10_000)
    os.close(reader)
    os.close(writer)
    return count, plain(data)


def splice_goes_both_ways(root: str) -> Any:
    data = noise(40_000)
    put(f"{root}/source", data)
    reader, writer = os.pipe()
    done = 0
    with opened(f"{root}/source") as source, opened(f"{root}/target", _RW) as target:
        while count := os.splice(source, writer, 10_000, offset_src=done):
            moved = 0
            while moved < count:
                moved += os.splice(reader, target, count - moved, offset_dst=done + moved)
            done += moved
    os.close(reader)
    os.close(writer)
    return done, get(f"{root}/target") == data


def splice_sees_the_latest_data(root: str) -> Any:
    path = put(f"{root}/file", b"." * 10_000)
    reader, writer = os.pipe()
    with opened(path, os.O_RDWR) as fd:
        os.pread(fd, 10_000, 0)
        os.pwrite(fd, b"new", 4095)
        count = os.splice(fd, writer, 10, offset_src=4090)
        data = os.read(reader, 100)
    os.close(reader)
    os.close(writer)
    return count, plain(data)


BEHAVIOURS = collect(globals())
