"""Behaviours of what is no plain data: special files, programs, waiting for readiness, change notification.

Layer `testing`; see observe.py for what a transcript may hold.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
import stat
import struct
from typing import Any

from fusewire.testing import calls
from fusewire.testing.observe import (
    Other,
    collect,
    facts,
    get,
    in_child,
    names,
    needs,
    noise,
    opened,
    opening,
    outcome,
    put,
)

_NEW = os.O_WRONLY | os.O_CREAT


def mknod_makes_files_fifos_and_sockets(root: str) -> Any:
    before = os.umask(0o027)
    found = []
    try:
        for kind in (stat.S_IFREG, 0, stat.S_IFIFO, stat.S_IFSOCK):
            path = f"{root}/{kind:o}"
            found.append((outcome(os.mknod, path, kind | 0o666), facts(path), outcome(os.mknod, path, kind | 0o666)))
    finally:
        os.umask(before)
    refused = [outcome(os.mknod, f"{root}/x", kind | 0o666) for kind in (stat.S_IFDIR, stat.S_IFLNK, 0o030000)]
    return found, refused, names(root)


@needs("root")
def device_nodes_keep_their_numbers(root: str) -> Any:
    found = []
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        for major, minor in ((1, 3), (0, 0), (259, 1), (4095, 255), (10, 300000)):
            path = f"{root}/{kind:o}-{major}-{minor}"
            found.append((outcome(os.mknod, path, kind | 0o600, os.makedev(major, minor)), facts(path)))
    os.link(f"{root}/{stat.S_IFCHR:o}-1-3", f"{root}/hard")
    os.rename(f"{root}/hard", f"{root}/renamed")
    return found, facts(f"{root}/renamed")


def devices_are_not_for_everybody(root: str) -> Any:
    if os.geteuid() == 0:
        return "root"
    return outcome(os.mknod, f"{root}/device", stat.S_IFCHR | 0o600, os.makedev(1, 3)), names(root)


def fifo_carries_data_between_processes(root: str) -> Any:
    path = f"{root}/fifo"
    os.mkfifo(path)
    data = noise(200_000)

    def write() -> None:
        with opened(path, os.O_WRONLY) as fd:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    pid = os.fork()
    if pid == 0:
        write()
        os._exit(0)
    with open(path, "rb") as file:
        arrived = file.read()
    os.waitpid(pid, 0)
    return arrived == data, facts(path)


def fifo_wants_a_reader(root: str) -> Any:
    path = f"{root}/fifo"
    os.mkfifo(path)
    found = [opening(path, os.O_WRONLY | os.O_NONBLOCK), opening(path, os.O_RDONLY | os.O_NONBLOCK)]
    with opened(path, os.O_RDONLY | os.O_NONBLOCK) as reader, opened(path, os.O_WRONLY | os.O_NONBLOCK) as writer:
        found.append(outcome(os.read, reader, 10))
        os.write(writer, b"data")
        os.unlink(path)
        found += [outcome(os.read, reader, 10), outcome(os.lseek, reader, 0, os.SEEK_SET)]
    return found


def socket_can_be_bound_and_reached(root: str) -> Any:
    with opened(root, os.O_RDONLY | os.O_DIRECTORY) as fd:
        place = f"/proc/self/fd/{fd}/socket"  # a path of any length

        def talk() -> Any:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(place)
                client.sendall(b"question")
                return client.recv(100)

        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as second:
            server.bind(place)
            server.listen(1)
            found: list[Any] = [facts(f"{root}/socket"), outcome(second.bind, place), opening(place, os.O_RDWR)]
            with Other(talk=talk) as other:
                other.start("talk")
                connection, _ = server.accept()
                with connection:
                    found.append(repr(connection.recv(100)))
                    connection.sendall(b"answer")
                found.append(other.result())
        found.append(outcome(talk))
        os.unlink(place)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
            again.bind(place)
            os.rename(place, f"{root}/renamed")
            again.sendto(b"datagram", f"/proc/self/fd/{fd}/renamed")
            found.append(repr(again.recv(100)))
    return found, names(root)


# Programs


def _run(path: str, *arguments: str) -> Any:
    """Run a program and give its output and how it ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(writer, 1)
            os.execv(path, [path, *arguments])
        except OSError as error:
            os.write(1, errno.errorcode[error.errno or 0].encode())
        os._exit(99)
    os.close(writer)
    with open(reader, "rb") as file:
        output = file.read()
    return output.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _program(root: str, name: str = "program") -> str:
    path = f"{root}/{name}"
    shutil.copyfile("/bin/echo", path)
    os.chmod(path, 0o755)
    return path


def program_runs_from_the_filesystem(root: str) -> Any:
    path = _program(root)
    script = put(f"{root}/script", b"#!/bin/sh\necho script $1\nexit 3\n", 0o755)
    os.symlink("program", f"{root}/link")
    return _run(path, "hello"), _run(script, "ran"), _run(f"{root}/link", "linked")


def program_needs_the_execution_bit(root: str) -> Any:
    path = _program(root)
    os.chmod(path, 0o644)
    found = [_run(path), _run(root), _run(f"{root}/missing"), _run(f"{path}/x")]
    os.chmod(path, 0o755)
    return found, _run(path, "now"), _run(put(f"{root}/text", b"no program", 0o755))


def running_program_cannot_be_written(root: str) -> Any:
    path = f"{root}/program"
    shutil.copyfile("/bin/sleep", path)
    os.chmod(path, 0o755)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, ["sleep", "100"])
        finally:
            os._exit(99)
    os.close(writer)  # the other end closes with execve(2): both are CLOEXEC
    os.read(reader, 1)
    os.close(reader)
    try:
        found = [opening(path, os.O_WRONLY), outcome(os.truncate, path, 0), opening(path, os.O_RDONLY)]
        found += [outcome(os.rename, path, f"{root}/renamed"), outcome(os.unlink, f"{root}/renamed")]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def file_open_for_writing_is_not_run(root: str) -> Any:
    path = _program(root)
    with opened(path, os.O_WRONLY):
        found = _run(path, "busy")
    return found, _run(path, "free")


def changed_program_runs_changed(root: str) -> Any:
    path = put(f"{root}/script", b"#!/bin/sh\necho first\n", 0o755)
    found = [_run(path)]
    put(path, b"#!/bin/sh\necho second one\n")
    return found, _run(path)


@needs("user_switch")
def program_is_run_by_whom_the_mode_allows(root: str) -> Any:
    path = _program(root)
    os.chown(path, 1001, 1002)
    found = []
    for mode in (0o711, 0o701, 0o710, 0o700, 0o001, 0o755):
        os.chmod(path, mode)
        for uid, gid in ((1001, 1), (1, 1002), (1, 1)):
            found.append(in_child(_run, path, "x", ids=(uid, gid, [])))
    return found


# Readiness and notification


def files_are_always_ready(root: str) -> Any:
    path = put(f"{root}/file", b"content")
    with opened(path, os.O_RDWR) as fd:
        ready = [bool(part) for part in select.select([fd], [fd], [fd], 0)]
        watch = select.poll()
        watch.register(fd, select.POLLIN | select.POLLOUT | select.POLLPRI)
        polled = [events for _, events in watch.poll(0)]
        os.lseek(fd, 0, os.SEEK_END)
        return ready, polled, [bool(part) for part in select.select([fd], [fd], [], 0)]


def watcher_hears_of_changes(root: str) -> Any:
    mask = calls.IN_MODIFY | calls.IN_ATTRIB | calls.IN_CLOSE_WRITE | calls.IN_CREATE | calls.IN_DELETE
    fd = calls.inotify(root, mask | calls.IN_MOVED_FROM | calls.IN_MOVED_TO)
    try:
        path = put(f"{root}/file", b"content")
        os.chmod(path, 0o600)
        os.link(path, f"{root}/hard")
        os.rename(path, f"{root}/renamed")
        os.mkdir(f"{root}/directory")
        os.symlink("x", f"{root}/link")
        for name in ("renamed", "hard", "link"):
            os.unlink(f"{root}/{name}")
        os.rmdir(f"{root}/directory")
        data = os.read(fd, 65536)
    finally:
        os.close(fd)
    found = []
    position = 0
    while position < len(data):
        _, event, _, length = struct.unpack_from("=iIII", data, position)
        found.append((f"{event:x}", data[position + 16 : position + 16 + length].rstrip(b"\0").decode()))
        position += 16 + length
    return found


def small_database_pattern_works(root: str) -> Any:
    """A journal written, synchronised, renamed into place and removed: what editors and databases do."""
    for number in range(5):
        with opened(f"{root}/.new", _NEW | os.O_EXCL, 0o600) as fd:
            os.write(fd, noise(5000, number))
            os.fsync(fd)
            os.fchmod(fd, 0o644)
        os.rename(f"{root}/.new", f"{root}/data")
        with opened(root, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)
    return names(root), facts(f"{root}/data"), get(f"{root}/data") == noise(5000, 4)


BEHAVIOURS = collect(globals())
