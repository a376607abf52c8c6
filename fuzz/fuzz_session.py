"""Invariant: no bytes of a peer's make `Session.handle` raise or give anything but the one well-formed reply.

Run: python fuzz/fuzz_session.py [CORPUS] [-max_total_time=SECONDS]. Needs atheris. Without a directory for the corpus
it begins with one well-formed request of each kind, in a temporary directory.
The input is a list of requests, each with its length in two bytes before it: one session sees them all. Its first byte
chooses whether INIT was answered before and which of two filesystems serves: one that does nothing, or one that
answers everything.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import atheris

with atheris.instrument_imports(include=["fusewire"]):
    from fusewire.ops import Entry, Operations, attr
    from fusewire.session import Session
    from fusewire.testing import OFFERED, check_reply, request
    from fusewire.wire import abi
    from fusewire.wire.table import TABLE, layout

BEGIN = request(
    abi.FUSE_INIT, 0, layout("fuse_init_in").pack(7, 45, 131072, OFFERED & 0xFFFFFFFF, OFFERED >> 32), unique=2
)
FILE = attr(2, 0o100644, 5)
ENTRY = Entry(2, FILE)


class NullFs(Operations):
    """Offers nothing."""


class FullFs(Operations):
    """Offers all, believes all."""

    interruptible = True
    want = abi.FUSE_SECURITY_CTX | abi.FUSE_CREATE_SUPP_GROUP

    def lookup(self, caller, parent, name, *rest):
        assert 0 < len(name) <= 255
        assert name not in (b".", b"..")
        assert not set(name) & set(b"/\0")
        return ENTRY

    mknod = mkdir = symlink = lookup

    def link(self, caller, nodeid, newparent, newname):
        return self.lookup(caller, newparent, newname)

    def create(self, caller, parent, name, *rest):
        return self.lookup(caller, parent, name), (1, 0)

    def tmpfile(self, *rest):
        return ENTRY, (1, 0)

    def unlink(self, caller, parent, name):
        self.lookup(caller, parent, name)

    rmdir = unlink

    def rename(self, caller, parent, name, newparent, newname, flags):
        self.lookup(caller, parent, name)
        self.lookup(caller, newparent, newname)

    def getattr(self, *rest):
        return FILE, 1.0

    def setattr(self, *rest):
        return FILE, 1.0

    def read(self, nodeid, fh, offset, size, *rest):
        return bytes(min(size, 1000))

    readdir = readdirplus = read

    def write(self, nodeid, fh, offset, data, *rest):
        return len(data)

    def setxattr(self, caller, nodeid, name, value, *rest):
        assert 0 < len(name) <= 255

    def getxattr(self, caller, nodeid, name):
        assert 0 < len(name) <= 255
        return b"value"

    def listxattr(self, *rest):
        return b"user.a\0"

    def removexattr(self, caller, nodeid, name):
        assert 0 < len(name) <= 255

    def readlink(self, nodeid):
        return b"target"

    def ioctl(self, caller, nodeid, fh, flags, cmd, arg, data, out_size):
        return 0, bytes(data)[:out_size]

    def open(self, *rest):
        return 1, 0

    def opendir(self, *rest):
        return 1, 0

    def forget(self, nodeid, nlookup):
        assert nlookup >= 0


def fault(message: str, error: BaseException | None) -> None:
    # What `handle` reports is a fault of the filesystem's, and these have none but failed assertions.
    if isinstance(error, AssertionError):
        raise SystemExit(f"{message}: a name that is none reached a filesystem") from error


def one_input(data: bytes) -> None:
    if not data:
        return
    session = Session(FullFs() if data[0] & 1 else NullFs(), log=fault)
    if data[0] & 2:
        session.handle(BEGIN)
    position = 1
    while position + 2 <= len(data):
        length = int.from_bytes(data[position : position + 2], "little")
        sent = data[position + 2 : position + 2 + length]
        position += 2 + length
        if data[0] & 4 and len(sent) >= 40:
            sent = len(sent).to_bytes(4, "little") + sent[4:]
        reply = session.handle(memoryview(sent))
        if len(sent) >= 40:
            check_reply(sent, reply)
        elif reply is not None:
            raise AssertionError("something that is no request was answered")


def seeds() -> Iterator[bytes]:
    for op in TABLE:
        size = layout(op.args).size if op.args else 0
        body = bytes(size) + b"a\0b\0"[: 2 * op.names] + (b"data" if op.tail else b"")
        sent = request(op.code, 1, body)
        for mode in range(8):
            yield bytes([mode]) + len(sent).to_bytes(2, "little") + sent


def main() -> None:
    arguments = sys.argv
    if not any(os.path.isdir(argument) for argument in arguments[1:]):
        # The fuzzer ends its process without any cleaning up: the directory is removed by a parent.
        with tempfile.TemporaryDirectory(prefix="fuzz-session-") as corpus:
            for number, seed in enumerate(seeds()):
                with open(os.path.join(corpus, str(number)), "wb") as file:
                    file.write(seed)
            sys.exit(subprocess.call([sys.executable, *arguments, corpus]))
    atheris.Setup(arguments, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
