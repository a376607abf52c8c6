"""A mount whose server does what an attacker in its place would try; a program for tests.

python probe_mount.py TARGET PRIVATE SANDBOX LANDLOCK SECCOMP [DIRECTORY]

The server is made as `fusewire mount` makes it: of an image (there is none behind it), or of DIRECTORY. The extended
attribute `user.EXPRESSION` of the mount's root has as its value what the expression gives in the server, the name of an
errno if it raises OSError, or what else it raises. Prints a line of JSON when it is mounted, ends when its input does.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket  # noqa: F401  for expressions
import stat
import sys
import threading

from fusewire.cli.messages import describe
from fusewire.cli.options import parse
from fusewire.cli.server_process import Locks, ServerProcess
from fusewire.linux import mount, process, syscalls  # noqa: F401
from fusewire.ops import Caller, Operations, attr


class Probe(Operations):
    """A root directory with attributes that nobody has set."""

    read_only = True

    def getattr(self, nodeid: int, flags: int, fh: int) -> object:
        return attr(1, stat.S_IFDIR | 0o755, nlink=2), 0

    def lookup(self, caller: Caller, parent: int, name: bytes) -> object:
        raise FileNotFoundError

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        if not name.startswith(b"user."):
            raise OSError(errno.ENODATA, "no such attribute")
        try:
            found = repr(eval(name[5:].decode()))
        except OSError as error:
            found = errno.errorcode[error.errno or 0]
        except Exception as error:  # noqa: BLE001  the caller judges
            found = repr(error)
        return found.encode()


class Source:
    """In the place of `cli.source.Source`."""

    path = "probe"
    workers = 2
    read_only = by_handle = is_free = False

    def __init__(self, directory: str | None) -> None:
        self.directory = None if directory is None else os.open(directory, os.O_PATH | os.O_DIRECTORY)
        self.files_of_first = [] if directory is not None else [os.open(__file__, os.O_RDONLY)]

    def __call__(self) -> Probe:
        return Probe()

    def drop_first(self) -> None:
        pass

    preload = drop_first

    def move_in(self, entered: object, *, trusted: bool) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    target, private, *locks = sys.argv[1:6]
    options = parse([])
    held = mount.mount(os.fsencode(target), mount.Options(), private=os.fsencode(private))
    server = ServerProcess([Source(*sys.argv[6:7] or [None])], options, Locks(*locks))  # type: ignore[list-item]
    try:
        ended = threading.Event()
        server.on_end = ended.set
        server.add(0, [held.fd], os.getpid())
        print(json.dumps({"server": server.pid, "strategy": held.strategy, "how": server.summary}), flush=True)
        while not ended.is_set():
            threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
            ended.wait()
        died = server.died
        print(json.dumps({"died": describe(died) if died else ""}), flush=True)
    finally:
        held.unmount(lazy=True)
        server.wait_end(5.0)
        server.close()
        held.close()
    signal.alarm(0)
    os._exit(0)


main()
