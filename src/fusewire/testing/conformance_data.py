"""Behaviours of a file's data: reading and writing, sizes, holes, memory maps, the limits of a process.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import resource
import signal
from typing import Any

from fusewire.testing import calls
from fusewire.testing.observe import Other, collect, facts, get, in_child, noise, opened, opening, outcome, plain, put

_RW = os.O_RDWR | os.O_CREAT
_PAGE = 4096


def _digest(fd: int) -> str:
    found = hashlib.sha256()
    offset = 0
    while part := os.pread(fd, 1 << 20, offset):
        found.update(part)
        offset += len(part)
    return f"{offset} bytes, {found.hexdigest()[:16]}"


def writes_at_odd_offsets_are_read_back(root: str) -> Any:
    model = bytearray()
    places = (
        (0, 1),
        (1, 4095),
        (4095, 2),
        (4097, 8191),
        (12287, 5),
        (20000, 70000),
        (65535, 3),
        (131071, 140000),
        (7, 9),
    )
    with opened(f"{root}/file", _RW) as fd:
        for seed, (offset, size) in enumerate(places):
            data = noise(size, seed)
            assert os.pwrite(fd, data, offset) == size
            model += bytes(max(0, offset + size - len(model)))
            model[offset : offset + size] = data
        equal = [os.pread(fd, size + 2, max(0, offset - 1)) for offset, size in places]
        return [
            part == model[max(0, offset - 1) : max(0, offset - 1) + size + 2]
            for part, (offset, size) in zip(equal, places, strict=True)
        ], _digest(fd)


def reads_at_and_past_the_end_are_short_or_empty(root: str) -> Any:
    put(f"{root}/file", b"0123456789")
    with opened(f"{root}/file") as fd:
        places = ((0, 100), (5, 100), (9, 1), (10, 1), (11, 5), (1 << 40, 5), (3, 0))
        return [plain(os.pread(fd, size, offset)) for offset, size in places]


def negative_and_huge_offsets_are_refused(root: str) -> Any:
    put(f"{root}/file", b"0123456789")
    with opened(f"{root}/file", os.O_RDWR) as fd:
        return (
            outcome(os.pread, fd, 1, -1),
            outcome(os.pwrite, fd, b"x", -1),
            outcome(os.lseek, fd, -1, os.SEEK_SET),
            outcome(os.lseek, fd, -11, os.SEEK_END),
            outcome(os.lseek, fd, -1, os.SEEK_CUR),
            outcome(os.lseek, fd, 0, 99),
            outcome(os.ftruncate, fd, -1),
            outcome(os.truncate, f"{root}/file", -1),
        )


def lseek_moves_where_it_is_told(root: str) -> Any:
    put(f"{root}/file", b"0123456789")
    with opened(f"{root}/file") as fd:
        found: list[Any] = [os.lseek(fd, 3, os.SEEK_SET), os.lseek(fd, 2, os.SEEK_CUR), repr(os.read(fd, 1))]
        found += [os.lseek(fd, 0, os.SEEK_END), os.lseek(fd, -4, os.SEEK_END), repr(os.read(fd, 9))]
        return *found, os.lseek(fd, 1 << 41, os.SEEK_SET), repr(os.read(fd, 9)), os.lseek(fd, 5, os.SEEK_END)


def seek_to_the_end_sees_what_others_wrote(root: str) -> Any:
    path = put(f"{root}/file", b"0123456789")
    with opened(path) as fd:
        first = os.lseek(fd, 0, os.SEEK_END)
        with opened(path, os.O_WRONLY | os.O_APPEND) as other:
            os.write(other, b"more")
        return first, os.lseek(fd, 0, os.SEEK_END), os.fstat(fd).st_size


def vectors_are_read_and_written_in_order(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        wrote = os.writev(fd, [b"one", b"", b"two", noise(10000)])
        at = os.pwritev(fd, [b"A", b"B"], 1)
        parts = [bytearray(2), bytearray(5), bytearray(20000)]
        read = os.preadv(fd, parts, 0)
        os.lseek(fd, 3, os.SEEK_SET)
        small = [bytearray(1), bytearray(2)]
        return wrote, at, read, list(map(plain, parts)), os.readv(fd, small), list(map(plain, small))


def big_file_in_uneven_pieces_is_whole(root: str) -> Any:
    data = noise(3_000_017)
    with opened(f"{root}/file", _RW) as fd:
        position = step = 0
        while position < len(data):
            step = step * 7 % 300_007 + 1
            position += os.write(fd, data[position : position + step])
        pieces = []
        os.lseek(fd, 0, os.SEEK_SET)
        while part := os.read(fd, 99_991):
            pieces.append(part)
        return b"".join(pieces) == data, os.fstat(fd).st_size


def writing_nothing_changes_nothing(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    os.utime(path, ns=(10**18, 10**18))
    with opened(path, os.O_RDWR) as fd:
        wrote = os.write(fd, b""), os.pwrite(fd, b"", 100)
        return wrote, facts(fd), os.fstat(fd).st_mtime_ns == 10**18


def two_descriptors_see_each_others_writes(root: str) -> Any:
    path = put(f"{root}/file", b"0" * 10000)
    found = []
    with opened(path, os.O_RDWR) as first, opened(path, os.O_RDWR) as second:
        for number in range(6):
            os.pwrite((first, second)[number % 2], b"%d" % number * 50, number * 2000)
            found.append(plain(os.pread((second, first)[number % 2], 60, max(0, number * 2000 - 5))))
            found.append(os.fstat((second, first)[number % 2]).st_size)
    return found


def another_process_sees_a_write_at_once(root: str) -> Any:
    path = put(f"{root}/file", b"0" * 5000)
    with opened(path, os.O_RDWR) as fd, Other(read=lambda offset: os.pread(fd, 20, offset)) as other:
        first = other.call("read", 4990)
        os.pwrite(fd, b"changed and longer", 4995)
        return first, other.call("read", 4990), other.call("read", 5005)


def writers_of_different_places_do_not_disturb_each_other(root: str) -> Any:
    path = put(f"{root}/file")
    pids = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            with opened(path, os.O_WRONLY) as fd:
                for block in range(number, 80, 4):
                    os.pwrite(fd, noise(1500, block), block * 1500)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return get(path) == b"".join(noise(1500, block) for block in range(80))


# Sizes


def write_past_the_end_leaves_zeros(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.write(fd, b"begin")
        os.pwrite(fd, b"end", 100_000)
        data = os.pread(fd, 200_000, 0)
        return len(data), data.strip(b"\0").count(b"\0"), repr(data[:6]), repr(data[-4:])


def truncation_cuts_and_extends_with_zeros(root: str) -> Any:
    path = put(f"{root}/file", noise(10000))
    found = []
    for size in (9999, 4097, 4096, 4095, 5000, 12288, 1, 0, 7, 1 << 20, 3):
        os.truncate(path, size)
        found.append((os.stat(path).st_size, plain(get(path))))
    return found


def truncation_by_descriptor_does_the_same(root: str) -> Any:
    path = put(f"{root}/file", noise(10000))
    found = []
    with opened(path, os.O_RDWR) as fd:
        os.lseek(fd, 0, os.SEEK_END)
        for size in (9999, 4096, 4095, 5000, 0, 7):
            os.ftruncate(fd, size)
            found.append((os.fstat(fd).st_size, plain(os.pread(fd, 20000, 0))))
        os.write(fd, b"x")  # where the offset was left
        return found, os.fstat(fd).st_size


def what_was_cut_off_does_not_come_back(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 10000)
    with opened(path, os.O_RDWR) as fd:
        os.ftruncate(fd, 100)
        os.pwrite(fd, b"y", 5000)
        first = os.pread(fd, 10000, 0)
        os.ftruncate(fd, 50)
        os.ftruncate(fd, 10000)
        second = os.pread(fd, 10000, 0)
    return first.count(b"x"), first.count(b"y"), len(first), second.count(b"x"), second.count(b"\0"), len(second)


def truncation_refuses_what_is_no_file(root: str) -> Any:
    os.mkdir(f"{root}/directory")
    os.symlink("missing", f"{root}/dangling")
    os.mkfifo(f"{root}/fifo")
    put(f"{root}/file", b"content")
    os.symlink("file", f"{root}/link")
    found = [
        outcome(os.truncate, f"{root}/{name}", 3) for name in ("directory", "missing", "dangling", "fifo", "file/x")
    ]
    with opened(f"{root}/file") as fd:
        found.append(outcome(os.ftruncate, fd, 3))
    return found, outcome(os.truncate, f"{root}/link", 3), os.stat(f"{root}/file").st_size


def removed_file_can_be_written_and_truncated(root: str) -> Any:
    path = put(f"{root}/file", b"0123456789")
    with opened(path, os.O_RDWR) as fd:
        os.unlink(path)
        found: list[Any] = [facts(fd)]
        os.ftruncate(fd, 5)
        found += [os.pwrite(fd, b"xyz", 4), plain(os.pread(fd, 100, 0)), facts(fd)]
        os.ftruncate(fd, 100)
        return *found, plain(os.pread(fd, 200, 0)), outcome(os.fchmod, fd, 0o600), facts(fd), opening(path, os.O_RDONLY)


def file_may_be_as_long_as_it_likes_where_it_is_empty(root: str) -> Any:
    found = []
    with opened(f"{root}/file", _RW) as fd:
        for offset in ((1 << 31) - 2, (1 << 32) - 2, (1 << 40) + 12345, (1 << 43) + 1):
            os.pwrite(fd, b"mark", offset)
            found.append((os.fstat(fd).st_size, repr(os.pread(fd, 10, offset - 2))))
        found.append((0, repr(os.pread(fd, 10, 1 << 41))))
        sparse = os.fstat(fd).st_blocks * 512 < 1 << 30
        os.ftruncate(fd, (1 << 32) + 1)
        return found, sparse, os.fstat(fd).st_size, repr(os.pread(fd, 10, (1 << 32) - 3))


def holes_are_read_as_zeros(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        for block in (1, 3, 4, 9):
            os.pwrite(fd, b"%d" % block * _PAGE, block * _PAGE)
        os.ftruncate(fd, 12 * _PAGE)
        data = os.pread(fd, 20 * _PAGE, 0)
    return [repr(data[block * _PAGE : block * _PAGE + 1]) for block in range(12)], len(data)


def file_size_limit_of_a_process_holds(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 100)

    def grow() -> list[Any]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with opened(path, os.O_RDWR) as fd:
            return [
                outcome(os.pwrite, fd, b"y" * 100, 950),
                outcome(os.pwrite, fd, b"y", 1000),
                outcome(os.ftruncate, fd, 1001),
                outcome(os.truncate, path, 5000),
                outcome(os.ftruncate, fd, 1000),
                outcome(calls.fallocate, fd, 0, 0, 2000),
                os.fstat(fd).st_size,
            ]

    def grow_and_die() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        os.truncate(path, 1001)

    return in_child(grow), in_child(grow_and_die), os.stat(path).st_size


def synchronisation_is_accepted(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    found = []
    for place, flags in ((path, os.O_RDWR), (path, os.O_RDONLY), (root, os.O_RDONLY)):
        with opened(place, flags) as fd:
            found.append([outcome(os.fsync, fd), outcome(os.fdatasync, fd), outcome(calls.syncfs, fd)])
    with opened(path, os.O_RDWR) as fd:
        os.unlink(path)
        os.write(fd, b"more")
        found.append([outcome(os.fsync, fd), outcome(os.fdatasync, fd)])
    return found


# Memory maps


def shared_map_and_calls_see_each_other(root: str) -> Any:
    path = put(f"{root}/file", b"." * 9000)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 9000) as view:
        view[4090:4100] = b"0123456789"
        first = os.pread(fd, 14, 4088), get(path)[4088:4102]
        os.pwrite(fd, b"written", 4093)
        second = view[4088:4102]
        view.flush()
        return list(map(repr, (*first, second))), plain(get(path))


def shared_map_is_written_to_the_file(root: str) -> Any:
    path = put(f"{root}/file", noise(50_000))
    with opened(path, os.O_RDWR) as fd:
        with mmap.mmap(fd, 50_000) as view:
            for place in range(0, 50_000, 4999):
                view[place] = 0
        return _digest(fd), plain(get(path)), os.fstat(fd).st_size


def shared_map_is_seen_by_another_process(root: str) -> Any:
    path = put(f"{root}/file", b"." * 8192)

    def change() -> str:
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as view:
            seen = view[:5]
            view[5000:5006] = b"theirs"
            return repr(seen)

    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as view:
        view[:5] = b"ours!"
        return in_child(change), repr(view[4998:5008]), repr(os.pread(fd, 8, 4999))


def private_map_keeps_its_changes(root: str) -> Any:
    path = put(f"{root}/file", b"." * 5000)
    with opened(path) as fd, mmap.mmap(fd, 5000, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        view[10:15] = b"12345"
        return repr(view[8:17]), repr(os.pread(fd, 9, 8)), repr(get(path)[:16])


def read_only_map_shows_later_writes(root: str) -> Any:
    path = put(f"{root}/file", b"." * 5000)
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 5000, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        first = view[4096:4100]
        os.pwrite(fd, b"new!", 4096)
        return repr(first), repr(view[4096:4100])


def map_needs_a_descriptor_that_may(root: str) -> Any:
    path = put(f"{root}/file", b"." * 5000)
    found = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        for kind, protection in (
            (mmap.MAP_SHARED, mmap.PROT_READ),
            (mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
        ):
            with opened(path, flags) as fd:
                found.append(outcome(lambda fd=fd, a=kind, b=protection: mmap.mmap(fd, 5000, a, b).close()))
    return found


def map_of_a_removed_file_lives_on(root: str) -> Any:
    path = put(f"{root}/file", noise(9000))
    fd = os.open(path, os.O_RDWR)
    view = mmap.mmap(fd, 9000)
    os.close(fd)
    os.unlink(path)
    with view:
        view[100:103] = b"new"
        return plain(view[:])


def map_ends_with_the_file(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 5000)

    def touch(place: int) -> str:
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 5000) as view:
            os.ftruncate(fd, 100 if place < 4096 else 5000)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            return repr(view[place])

    found = []
    for place in (50, 200, 4500):
        os.truncate(path, 5000)
        found.append(in_child(touch, place))

    def touch_what_is_cut_off() -> str:
        with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 5000) as view:
            os.ftruncate(fd, 100)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            return repr(view[4500])

    return found, in_child(touch_what_is_cut_off), os.stat(path).st_size


def bytes_behind_the_end_of_a_map_are_not_kept(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 100)
    with opened(path, os.O_RDWR) as fd:
        with mmap.mmap(fd, 100) as view:
            view[99] = ord("y")
        os.ftruncate(fd, 4096)
        data = os.pread(fd, 5000, 0)
    return len(data), data.count(b"\0"), repr(data[98:102])


def map_of_a_hole_makes_data(root: str) -> Any:
    with opened(f"{root}/file", _RW) as fd:
        os.ftruncate(fd, 1 << 20)
        with mmap.mmap(fd, 1 << 20) as view:
            view[700_000:700_004] = b"data"
            view.flush()
            return view[:].count(b"\0"), repr(os.pread(fd, 8, 699_998))


def map_changes_the_modification_time(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 5000)
    os.utime(path, ns=(10**18, 10**18))
    with opened(path, os.O_RDWR) as fd:
        with mmap.mmap(fd, 5000) as view:
            view[1] = 0
            view.flush()
        os.fsync(fd)
    return os.stat(path).st_mtime_ns > 10**18


def pages_can_be_dropped_from_the_cache(root: str) -> Any:
    path = put(f"{root}/file", noise(100_000))
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"changed", 5000)
        os.fsync(fd)
        found = [
            outcome(os.posix_fadvise, fd, 0, 0, advice) for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED)
        ]
        found.append(outcome(os.posix_fadvise, fd, 0, 0, 99))
        return found, _digest(fd)


def interrupted_reader_goes_on(root: str) -> Any:
    path = put(f"{root}/file", noise(2_000_000))

    def read_with_alarms() -> Any:
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        with opened(path) as fd:
            return _digest(fd)

    return in_child(read_with_alarms)


def read_into_nothing_and_from_nothing(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    with opened(path, os.O_RDWR) as fd:
        found = [plain(os.read(fd, 0)), os.write(fd, b""), os.lseek(fd, 0, os.SEEK_CUR)]
    try:
        os.read(fd, 1)
    except OSError as error:
        found.append(errno.errorcode[error.errno or 0])
    return found


BEHAVIOURS = collect(globals())
