"""Behaviours of locks: POSIX record locks, open file description locks, flock(2); and waiting for them.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from typing import Any

from fusewire.testing.observe import Other, collect, in_child, needs, opened, outcome, put

_READ, _WRITE, _FREE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
_FLOCK = "hhqqi4x"


def _set(fd: int, kind: int, start: int = 0, length: int = 0, command: int = fcntl.F_SETLK, whence: int = 0) -> None:
    fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, whence, start, length, 0))


def _get(fd: int, kind: int, start: int = 0, length: int = 0, command: int = fcntl.F_GETLK) -> tuple[int, ...]:
    return struct.unpack(_FLOCK, fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, 0, start, length, 0)))


def _other(fd: int, path: str) -> Other:
    """A process that has `fd` by inheritance, and opens `path` itself where it is told so."""
    mine: list[int] = []

    def own() -> int:
        if not mine:
            mine.append(os.open(path, os.O_RDWR))
        return mine[0]

    def get(kind: int, start: int = 0, length: int = 0) -> list[int]:
        return list(_get(own(), kind, start, length))

    def close() -> None:
        os.close(mine.pop())

    def wait(kind: int, start: int = 0, length: int = 0) -> None:
        _set(own(), kind, start, length, fcntl.F_SETLKW)

    return Other(
        set=lambda kind, start=0, length=0: _set(own(), kind, start, length),
        wait=wait,
        get=get,
        close=close,
        inherited=lambda kind, start=0, length=0: _set(fd, kind, start, length),
        ofd=lambda kind, start=0, length=0: _set(own(), kind, start, length, fcntl.F_OFD_SETLK),
        ofd_wait=lambda kind, start=0, length=0: _set(own(), kind, start, length, fcntl.F_OFD_SETLKW),
        flock=lambda kind: fcntl.flock(own(), kind),
        flock_inherited=lambda kind: fcntl.flock(fd, kind),
        open=lambda: bool(own()),
    )


def _begin_to_wait(other: Other, name: str, *arguments: int) -> None:
    """Have it wait for a lock. It opens its file before: to wait for that is to sleep in the kernel, too."""
    other.call("open")
    other.start(name, *arguments)
    other.wait_until_it_sleeps()


# POSIX record locks


@needs("locks")
def write_lock_keeps_others_out(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE)
        found = [other.call("set", kind) for kind in (_READ, _WRITE)]
        _set(fd, _FREE)
        return found, [other.call("set", kind) for kind in (_READ, _WRITE)]


@needs("locks")
def read_locks_are_shared(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _READ)
        return (
            [other.call("set", kind) for kind in (_READ, _WRITE)],
            outcome(_set, fd, _WRITE),
            outcome(_set, fd, _READ),
        )


@needs("locks")
def locks_of_different_ranges_do_not_meet(root: str) -> Any:
    path = put(f"{root}/file", b"0123456789")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE, 10, 10)
        places = ((0, 10), (0, 11), (19, 1), (20, 1), (20, 0), (0, 0), (15, 0), (5, 5))
        found = []
        for start, length in places:
            found.append(other.call("set", _WRITE, start, length))
            other.call("set", _FREE)
        return found


@needs("locks")
def lock_is_split_and_merged(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE, 0, 100)
        _set(fd, _FREE, 40, 20)
        found = [other.call("get", _WRITE, start)[:4] for start in (0, 40, 50, 60)]
        found.append(other.call("set", _WRITE, 40, 20))
        other.call("set", _FREE)
        _set(fd, _WRITE, 40, 20)
        found.append(other.call("get", _WRITE, 0)[:4])
        _set(fd, _READ, 10, 10)
        return found, [other.call("get", _READ, start)[:4] for start in (0, 10, 20)], other.call("get", _WRITE, 10)[:4]


@needs("locks")
def blocking_lock_is_described(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        free = other.call("get", _WRITE)
        _set(fd, _READ, 5, 7)
        kind, whence, start, length, pid = other.call("get", _WRITE)
        _set(fd, _WRITE, 100, 0)
        return (
            free[0],
            [kind, whence, start, length, pid == os.getpid()],
            other.call("get", _READ)[0],
            other.call("get", _READ, 200)[:4],
            _get(fd, _WRITE)[0],
        )


@needs("locks")
def locks_go_with_any_close_and_with_the_process(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        other.call("set", _WRITE)
        found = [outcome(_set, fd, _WRITE)]
        other.call("close")
        found += [outcome(_set, fd, _WRITE), outcome(_set, fd, _FREE)]
        other.call("set", _WRITE)
        found.append(outcome(_set, fd, _WRITE))
        other.end()
        found.append(outcome(_set, fd, _WRITE))
        third = in_child(lambda: _set(os.open(path, os.O_RDWR), _WRITE))
        os.close(os.open(path, os.O_RDONLY))
        return *found, third, in_child(lambda: _set(os.open(path, os.O_RDWR), _WRITE))


@needs("locks")
def locks_are_not_inherited(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd:
        _set(fd, _WRITE)
        with _other(fd, path) as other:
            return other.call("inherited", _READ), other.call("set", _READ)


@needs("locks")
def lock_can_be_changed_in_kind(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        found = []
        for kind in (_READ, _WRITE, _READ, _FREE):
            _set(fd, kind)
            found.append([other.call("set", _READ), other.call("set", _FREE), other.call("set", _WRITE)])
            other.call("set", _FREE)
        return found


@needs("locks")
def locks_need_the_right_descriptor(root: str) -> Any:
    path = put(f"{root}/file")
    found = []
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with opened(path, flags) as fd:
            found.append([outcome(_set, fd, kind) for kind in (_READ, _WRITE)])
    with opened(path, os.O_RDWR) as fd:
        found.append([outcome(_set, fd, 99), outcome(_set, fd, _WRITE, -1), outcome(_set, fd, _WRITE, 5, -6)])
    return found


@needs("locks")
def ranges_count_from_anywhere(root: str) -> Any:
    path = put(f"{root}/file", b"x" * 100)
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        found = []
        os.lseek(fd, 50, os.SEEK_SET)
        for start, length, whence in ((-10, 5, 1), (-10, 0, 2), (20, -5, 0), (0, 0, 1), ((1 << 62), 10, 0)):
            _set(fd, _WRITE, start, length, whence=whence)
            found.append(other.call("get", _WRITE)[:4])
            _set(fd, _FREE)
        return found


@needs("locks")
def waiting_for_a_lock_ends_with_its_release(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE)
        _begin_to_wait(other, "wait", _WRITE)
        waiting = not other.has_answered()
        _set(fd, _FREE)
        found = other.result()
        return waiting, found, outcome(_set, fd, _WRITE)


@needs("locks")
def waiting_for_a_lock_ends_with_its_holder(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as holder, _other(fd, path) as other:
        holder.call("set", _WRITE)
        _begin_to_wait(other, "wait", _WRITE)
        holder.end()
        return other.result(), outcome(_set, fd, _WRITE)


@needs("locks")
def waiting_for_a_lock_is_interrupted(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE, 0, 10)
        _begin_to_wait(other, "wait", _WRITE, 5, 10)
        os.kill(other.pid, signal.SIGUSR1)
        found = other.result()
        _set(fd, _FREE)
        return found, outcome(_set, fd, _WRITE), other.call("set", _WRITE)


@needs("locks")
def killed_waiter_leaves_no_lock(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as third:
        _set(fd, _WRITE)
        with _other(fd, path) as other:
            _begin_to_wait(other, "wait", _WRITE)
        _set(fd, _FREE)
        return third.call("set", _WRITE), outcome(_set, fd, _WRITE)


@needs("locks")
def two_that_wait_both_get_the_lock(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as first, _other(fd, path) as second:
        _set(fd, _WRITE)
        for other in (first, second):
            _begin_to_wait(other, "wait", _WRITE)
        _set(fd, _FREE)
        while not (first.has_answered() or second.has_answered(0.01)):
            pass
        winner, loser = (first, second) if first.has_answered() else (second, first)
        found = [winner.result(), loser.has_answered()]
        winner.call("set", _FREE)
        return *found, loser.result()


@needs("locks")
def waiting_readers_all_get_the_lock(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as first, _other(fd, path) as second:
        _set(fd, _WRITE)
        for other in (first, second):
            _begin_to_wait(other, "wait", _READ)
        _set(fd, _FREE)
        return first.result(), second.result(), outcome(_set, fd, _WRITE), outcome(_set, fd, _READ)


@needs("locks")
def locks_stay_with_a_renamed_or_removed_file(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd:
        _set(fd, _WRITE)
        os.rename(path, f"{root}/renamed")
        found = [in_child(lambda: _set(os.open(f"{root}/renamed", os.O_RDWR), _READ))]
        os.unlink(f"{root}/renamed")
        found.append(in_child(lambda: _set(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), _READ)))
        put(path)
        return found, in_child(lambda: _set(os.open(path, os.O_RDWR), _WRITE))


# Open file description locks


@needs("locks")
def description_locks_belong_to_the_open(root: str) -> Any:
    path = put(f"{root}/file")
    ofd = fcntl.F_OFD_SETLK
    with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDWR) as second:
        _set(fd, _WRITE, 0, 10, ofd)
        found = [outcome(_set, second, kind, 5, 10, ofd) for kind in (_READ, _WRITE)]
        twin = os.dup(fd)
        found.append(outcome(_set, twin, _READ, 0, 10, ofd))
        os.close(twin)
        found += [outcome(_set, second, kind, 5, 10, ofd) for kind in (_READ, _WRITE)]
        found.append(outcome(_set, fd, _FREE, 0, 0, ofd))
        return found, outcome(_set, second, _WRITE, 5, 10, ofd)


@needs("locks")
def description_locks_survive_the_close_of_another_open(root: str) -> Any:
    path = put(f"{root}/file")
    ofd = fcntl.F_OFD_SETLK
    fd = os.open(path, os.O_RDWR)
    _set(fd, _WRITE, 0, 0, ofd)
    with opened(path, os.O_RDWR) as second:
        os.close(os.open(path, os.O_RDWR))
        found = [outcome(_set, second, _WRITE, 0, 0, ofd)]
        os.close(fd)
        return found, outcome(_set, second, _WRITE, 0, 0, ofd)


@needs("locks")
def description_locks_and_record_locks_meet(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        _set(fd, _WRITE, 0, 10, fcntl.F_OFD_SETLK)
        found = [other.call("set", _WRITE, 5, 1), other.call("get", _WRITE), outcome(_set, fd, _WRITE, 0, 1)]
        _set(fd, _FREE, 0, 0, fcntl.F_OFD_SETLK)
        other.call("set", _WRITE, 0, 10)
        kind, _, start, length, pid = _get(fd, _WRITE, 0, 0, fcntl.F_OFD_GETLK)
        return found, [kind, start, length, pid == other.pid], outcome(_set, fd, _WRITE, 3, 1, fcntl.F_OFD_SETLK)


@needs("locks")
def description_locks_are_inherited_and_waited_for(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd:
        _set(fd, _WRITE, 0, 0, fcntl.F_OFD_SETLK)
        with _other(fd, path) as other:
            found = [other.call("ofd", _READ)]
            _begin_to_wait(other, "ofd_wait", _WRITE)
            found.append(other.has_answered())
            _set(fd, _FREE, 0, 0, fcntl.F_OFD_SETLK)
            return *found, other.result()


# flock(2)


@needs("locks")
def flock_is_shared_or_exclusive(root: str) -> Any:
    path = put(f"{root}/file")
    try_shared, try_exclusive = fcntl.LOCK_SH | fcntl.LOCK_NB, fcntl.LOCK_EX | fcntl.LOCK_NB
    found = []
    with opened(path, os.O_RDWR) as fd, opened(path) as second:
        for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN):
            fcntl.flock(fd, kind)
            found.append([outcome(fcntl.flock, second, wanted) for wanted in (try_shared, try_exclusive)])
            fcntl.flock(second, fcntl.LOCK_UN)
        fcntl.flock(second, fcntl.LOCK_SH)
        fcntl.flock(fd, fcntl.LOCK_SH)
        found.append([outcome(fcntl.flock, item, try_exclusive) for item in (fd, second)])
    return found


@needs("locks")
def flock_belongs_to_the_open(root: str) -> Any:
    path = put(f"{root}/file")
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, exclusive)
    twin = os.dup(fd)
    with _other(fd, path) as other:
        found = [other.call("flock", exclusive), other.call("flock_inherited", exclusive)]
        os.close(fd)
        found.append(other.call("flock", exclusive))
        fcntl.flock(twin, fcntl.LOCK_UN)
        found.append(other.call("flock", exclusive))
        os.close(os.open(path, os.O_RDONLY))
        found.append(outcome(fcntl.flock, twin, exclusive))
    os.close(twin)
    return found


@needs("locks")
def flock_waits_and_is_woken(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path) as fd, _other(fd, path) as other:
        fcntl.flock(fd, fcntl.LOCK_EX)
        _begin_to_wait(other, "flock", fcntl.LOCK_SH)
        waiting = not other.has_answered()
        fcntl.flock(fd, fcntl.LOCK_SH)
        return waiting, other.result(), outcome(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@needs("locks")
def flock_that_waits_is_interrupted_or_killed(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with _other(fd, path) as other:
            _begin_to_wait(other, "flock", fcntl.LOCK_EX)
            os.kill(other.pid, signal.SIGUSR1)
            found = [other.result()]
            _begin_to_wait(other, "flock", fcntl.LOCK_EX)
        fcntl.flock(fd, fcntl.LOCK_UN)
        with opened(path) as second:
            return *found, outcome(fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB)


@needs("locks")
def flock_and_record_locks_do_not_meet(root: str) -> Any:
    path = put(f"{root}/file")
    with opened(path, os.O_RDWR) as fd, _other(fd, path) as other:
        fcntl.flock(fd, fcntl.LOCK_EX)
        found = [other.call("set", _WRITE), other.call("set", _FREE), other.call("ofd", _WRITE)]
        return found, other.call("flock", fcntl.LOCK_SH | fcntl.LOCK_NB)


@needs("locks")
def directories_can_be_flocked(root: str) -> Any:
    with opened(root) as fd, opened(root) as second:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return outcome(fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB), outcome(_set, fd, _READ)


BEHAVIOURS = collect(globals())
