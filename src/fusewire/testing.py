"""Public fakes for tests of filesystems, and the list of behaviours that every one of them has to show.

Layer `testing`, above everything but the command line; nothing that serves a mount imports it. `FakeKernel` drives a
session as bytes and judges each reply as fuse_dev_do_write (fs/fuse/dev.c) does; `READ_ONLY` holds checks for a
directory that is mounted for real. Long because it has one method per operation and one function per behaviour.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fusewire.adapters import FileReply, Reply
from fusewire.ops import Attr, Entry, Lock, Setattr, Statfs
from fusewire.session import Session
from fusewire.wire import abi, codec
from fusewire.wire.table import TABLE, Op, layout

OFFERED = 0x73FFFFFB | 0x5FD << 32
"""The INIT flags that Linux 6.18 offers to a mount in a user namespace."""

_BY_NAME = {op.name: op for op in TABLE}
_BY_CODE = {op.code: op for op in TABLE}
_INIT_OUT = layout("fuse_init_out")
# Sizes of replies that are of one size; the others are bounded by the request (out_argvar in fs/fuse).
_SIZES = {"none": 0, "entry": 128, "attr": 104, "open": 16, "create": 144, "count": 8, "u64": 8, "statfs": 80}
_SIZES |= {"lock": 24, "poll": 8, "statx": 288}
_PATIENCE = 30.0
# How many INIT flags there were before a minor.
_BITS_BEFORE = ((27, 21), (28, 22), (29, 24), (30, 25), (31, 26), (32, 27), (33, 28), (36, 30))


class BadReply(AssertionError):  # noqa: N818 - a verdict, as BadRequest is
    """A reply that the kernel would refuse, or that must not be: a fault of the server's."""


class InitReply(NamedTuple):
    """fuse_init_out; `flags` has flags2 in its upper half."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    congestion_threshold: int
    max_write: int
    time_gran: int
    max_pages: int
    map_alignment: int
    max_stack_depth: int
    request_timeout: int


class Dirent(NamedTuple):
    """One directory entry; `entry` is there in a READDIRPLUS reply whose entry was looked up."""

    name: bytes
    ino: int
    cookie: int
    dtype: int
    entry: Entry | None = None


def request(
    opcode: int,
    nodeid: int,
    body: bytes = b"",
    *,
    unique: int = 2,
    uid: int = 0,
    gid: int = 0,
    pid: int = 1,
    extlen: int = 0,
) -> bytes:
    """Give a whole request: fuse_in_header and `body`."""
    return codec.IN_HEADER.pack(40 + len(body), opcode, unique, nodeid, uid, gid, pid, extlen) + body


def body_of(name: str, *fields: int, names: Iterable[bytes] = (), tail: bytes = b"") -> bytes:
    """Give an operation's body: its struct of the table filled with `fields`, the names each with a NUL, the tail."""
    op = _BY_NAME[name]
    fixed = layout(op.args).pack(*fields) if op.args else b""
    return fixed + b"".join(item + b"\0" for item in names) + tail


def flatten(reply: Reply) -> bytes | None:
    """Give a reply as the bytes that a transport would write; the data of a `FileReply` is read."""
    if reply is None:
        return None
    if isinstance(reply, FileReply):
        data = os.pread(reply.range.fd, reply.range.size, reply.range.offset)
        return codec.OUT_HEADER.pack(16 + len(data), 0, reply.unique) + data
    return b"".join(bytes(memoryview(part)) for part in reply)


def check_reply(sent: bytes, reply: Reply) -> tuple[int, bytes]:
    """Judge a reply to the request `sent` as the kernel would; give its errno (0 for success) and its body.

    Raises BadReply for what the kernel would refuse with EINVAL, and for an answer where none may be or is due.
    """
    _, opcode, unique, *_ = codec.IN_HEADER.unpack_from(sent)
    op = _BY_CODE.get(opcode)
    message = flatten(reply)
    if message is None:
        if op is None or op.reply:
            raise BadReply(f"{_title(opcode)} got no reply")
        return 0, b""
    if op is not None and not op.reply and opcode != abi.FUSE_INTERRUPT:
        raise BadReply(f"{_title(opcode)} got a reply, and must not")
    if len(message) < 16:
        raise BadReply(f"{_title(opcode)}: a reply of {len(message)} bytes has no header")
    length, error, answered = codec.OUT_HEADER.unpack_from(message)
    body = message[16:]
    if length != len(message):
        raise BadReply(f"{_title(opcode)}: the header says {length} bytes, the reply has {len(message)}")
    if answered != unique:
        raise BadReply(f"{_title(opcode)}: request {unique:#x} was answered as {answered:#x}")
    if not -512 < error <= 0:
        raise BadReply(f"{_title(opcode)}: error {error} is out of range")
    if error and body:
        raise BadReply(f"{_title(opcode)}: an error with {len(body)} bytes of data")
    if opcode == abi.FUSE_INTERRUPT and error not in (-errno.ENOSYS, -errno.EAGAIN):
        raise BadReply(f"INTERRUPT: answered {error}")
    if not error and op is not None:
        least, most = _bounds(op, sent)
        if not least <= len(body) <= most:
            raise BadReply(f"{_title(opcode)}: a body of {len(body)} bytes where {least} to {most} are right")
    return -error, body


def _title(opcode: int) -> str:
    op = _BY_CODE.get(opcode)
    return op.name.upper() if op is not None else f"opcode {opcode}"


def _bounds(op: Op, sent: bytes) -> tuple[int, int]:
    def u32(offset: int) -> int:
        return int(codec.U32.unpack_from(sent, offset)[0])

    if op.reply == "data":
        return 0, u32(56)
    if op.reply == "xattr":
        return (0, u32(40)) if u32(40) else (8, 8)
    if op.reply == "link":
        return 1, os.sysconf("SC_PAGE_SIZE") - 1
    if op.reply == "ioctl":
        return 16, 16 + u32(68)
    if op.reply == "init":
        return 8, 64
    size = _SIZES[op.reply]
    return size, size


def parse_entry(body: bytes) -> Entry:
    """Give a fuse_entry_out as the `Entry` that it was made of."""
    nodeid, generation, es, as_, en, an, *attr = codec.ENTRY_OUT.unpack_from(body)
    return Entry(nodeid, _attr(attr), es + en / 1e9, as_ + an / 1e9, generation)


def _attr(fields: Sequence[Any]) -> Attr:
    attr: Attr = tuple(fields)
    return attr


def parse_dirents(body: bytes, *, plus: bool = False) -> list[Dirent]:
    """Cut a READDIR or READDIRPLUS body into entries, as fuse_parse_dirfile does: a cut-off last one is dropped.

    Raises BadReply for what makes the kernel answer EIO: an empty or too long name, or one with "/".
    """
    found = []
    position = 0
    while position + (152 if plus else 24) <= len(body):
        entry = parse_entry(body[position : position + 128]) if plus else None
        start = position + (128 if plus else 0)
        ino, cookie, length, dtype = codec.DIRENT.unpack_from(body, start)
        name = body[start + 24 : start + 24 + length]
        if not 0 < length <= 1024:
            raise BadReply(f"a directory entry's name is {length} bytes long")
        position = start + 24 + length + (-length & 7)
        if position > len(body):
            break
        if b"/" in name:
            raise BadReply(f"a directory entry is named {name!r}")
        found.append(Dirent(name, ino, cookie, dtype, entry if entry is not None and entry.nodeid else None))
    return found


class FakeKernel:
    """The kernel's side of a mount, in process: one method per operation, errors raised as OSError.

    Every reply is checked (`check_reply`). `lookups` counts what the filesystem gave, `forget_all` takes it back.
    `notifications` has each (code, body) that the server sent. An answer may come late, from any thread.
    """

    def __init__(self, session: Session, *, uid: int = 0, gid: int = 0, pid: int = 1) -> None:
        """Attach to `session` as its transport."""
        self.session = session
        self.uid, self.gid, self.pid = uid, gid, pid
        self.agreed: InitReply | None = None
        self.lookups: dict[int, int] = {}
        self.notifications: list[tuple[int, bytes]] = []
        self.unasked: list[bytes] = []
        self._unique = 0
        self._waiting: dict[int, bytes] = {}
        self._late: dict[int, Reply] = {}
        self._condition = threading.Condition()
        session.send = self._receive

    def _receive(self, buffers: list[Any]) -> None:
        message = flatten(buffers) or b""
        length, code, unique = codec.OUT_HEADER.unpack_from(message)
        if length != len(message):
            raise BadReply(f"a message of {len(message)} bytes says {length}")
        with self._condition:
            if unique == 0:
                self.notifications.append((code, message[16:]))
            elif unique in self._waiting and unique not in self._late:
                self._late[unique] = buffers
                self._condition.notify_all()
            else:
                self.unasked.append(message)

    # Requests as bytes

    def start(self, opcode: int, nodeid: int, body: bytes = b"", *, extlen: int = 0, unique: int = 0) -> int:
        """Send a request and give its `unique`; `finish` waits for the answer."""
        with self._condition:
            self._unique += 2
            unique = unique or self._unique
        sent = request(opcode, nodeid, body, unique=unique, uid=self.uid, gid=self.gid, pid=self.pid, extlen=extlen)
        with self._condition:
            self._waiting[unique] = sent
        reply = self.session.handle(memoryview(sent))
        op = _BY_CODE.get(opcode)
        if reply is not None or (op is not None and not op.reply):
            with self._condition:
                if unique in self._late:
                    raise BadReply(f"{_title(opcode)} was answered twice")
                self._late[unique] = reply
        return unique

    def answered(self, unique: int) -> bool:
        """Tell whether the answer to a started request is there."""
        return unique in self._late

    def finish(self, unique: int, timeout: float = _PATIENCE) -> bytes:
        """Give the body of the answer to a started request. Raises OSError if it is an error, or TimeoutError."""
        with self._condition:
            if not self._condition.wait_for(lambda: unique in self._late, timeout):
                raise TimeoutError(f"request {unique} was not answered within {timeout} s")
            sent, reply = self._waiting.pop(unique), self._late.pop(unique)
        error, body = check_reply(sent, reply)
        if error:
            raise OSError(error, os.strerror(error), _title(codec.IN_HEADER.unpack_from(sent)[1]))
        return body

    def raw(self, opcode: int, nodeid: int, body: bytes = b"", *, extlen: int = 0) -> bytes:
        """Send a request of any shape and give its answer's body. Raises OSError if it is an error."""
        return self.finish(self.start(opcode, nodeid, body, extlen=extlen))

    def call(
        self, name: str, nodeid: int, *fields: int, names: Iterable[bytes] = (), tail: bytes = b"", extlen: int = 0
    ) -> bytes:
        """Send an operation by its name in the table; `fields` fill its struct."""
        return self.raw(_BY_NAME[name].code, nodeid, body_of(name, *fields, names=names, tail=tail), extlen=extlen)

    # Life

    def init(
        self, minor: int = abi.MINOR_MAX, flags: int = OFFERED, *, major: int = 7, max_readahead: int = 131072
    ) -> InitReply:
        """Offer the protocol, as a kernel of that minor does (16 bytes before 7.36), and give what was agreed.

        Of `flags`, a kernel before 7.36 offers only those that it can know.
        """
        flags &= (1 << next((bits for known, bits in _BITS_BEFORE if minor < known), 64)) - 1
        body = layout("fuse_init_in").pack(major, minor, max_readahead, flags & 0xFFFFFFFF, flags >> 32)
        answer = _INIT_OUT.unpack(self.raw(abi.FUSE_INIT, 0, body if minor >= 36 else body[:16]).ljust(64, b"\0"))
        reply = InitReply._make((*answer[:3], answer[3] | answer[10] << 32, *answer[4:10], *answer[11:]))
        self.agreed = reply
        return reply

    def destroy(self) -> None:
        """Say the end, as a kernel does to virtio-fs and privileged mounts."""
        self.call("destroy", 0)

    def _has(self, flag: int) -> bool:
        return bool((self.agreed or self.session).flags & flag)  # a session that was resumed has had its INIT

    # Names

    def _entry(self, body: bytes) -> Entry:
        entry = parse_entry(body)
        self._count(entry)
        return entry

    def _count(self, entry: Entry) -> None:
        if entry.nodeid:
            self.lookups[entry.nodeid] = self.lookups.get(entry.nodeid, 0) + 1

    def lookup(self, parent: int, name: bytes) -> Entry:
        """Look a name up. An Entry with nodeid 0 is a name that may be remembered as missing."""
        return self._entry(self.call("lookup", parent, names=[name]))

    def forget(self, nodeid: int, nlookup: int = 1) -> None:
        """Give lookups back."""
        self.lookups[nodeid] = self.lookups.get(nodeid, 0) - nlookup
        self.call("forget", nodeid, nlookup)

    def batch_forget(self, items: Sequence[tuple[int, int]]) -> None:
        """Give lookups of several nodes back."""
        tail = b"".join(codec.FORGET_ONE.pack(nodeid, nlookup) for nodeid, nlookup in items)
        for nodeid, nlookup in items:
            self.lookups[nodeid] = self.lookups.get(nodeid, 0) - nlookup
        self.call("batch_forget", 0, len(items), tail=tail)

    def forget_all(self) -> None:
        """Give every lookup back, as memory pressure makes the kernel do."""
        items = [item for item in self.lookups.items() if item[1] > 0]
        if items:
            self.batch_forget(items)
        self.lookups.clear()

    def symlink(self, parent: int, name: bytes, target: bytes) -> Entry:
        """Make a symbolic link."""
        return self._entry(self.call("symlink", parent, names=[name, target]))

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int = 0, umask: int = 0) -> Entry:
        """Make a node."""
        return self._entry(self.call("mknod", parent, mode, rdev, umask, names=[name]))

    def mkdir(self, parent: int, name: bytes, mode: int = 0o755, umask: int = 0) -> Entry:
        """Make a directory."""
        return self._entry(self.call("mkdir", parent, mode, umask, names=[name]))

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name."""
        self.call("unlink", parent, names=[name])

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove a directory."""
        self.call("rmdir", parent, names=[name])

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int = 0) -> None:
        """Move a name: RENAME2 when there are flags, else RENAME."""
        if flags:
            self.call("rename2", parent, newparent, flags, names=[name, newname])
        else:
            self.call("rename", parent, newparent, names=[name, newname])

    def link(self, nodeid: int, newparent: int, newname: bytes) -> Entry:
        """Give a node another name."""
        return self._entry(self.call("link", newparent, nodeid, names=[newname]))

    def readlink(self, nodeid: int) -> bytes:
        """Give a symbolic link's target."""
        return self.call("readlink", nodeid)

    # Attributes

    def getattr(self, nodeid: int, fh: int | None = None) -> tuple[Attr, float]:
        """Give attributes and their lifetime."""
        body = self.call("getattr", nodeid, 0 if fh is None else abi.FUSE_GETATTR_FH, fh or 0)
        return self._attributes(body)

    @staticmethod
    def _attributes(body: bytes) -> tuple[Attr, float]:
        seconds, nano, *attr = codec.ATTR_OUT.unpack(body)
        return _attr(attr), seconds + nano / 1e9

    def setattr(self, nodeid: int, valid: int, **fields: int) -> tuple[Attr, float]:
        """Change what `valid` (FATTR_*) names; fields as in `ops.Setattr`."""
        change = Setattr(valid, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)._replace(**fields)
        return self._attributes(self.call("setattr", nodeid, *change))

    def statx(self, nodeid: int, mask: int = 0x7FF) -> tuple[int, ...]:
        """Give the fields of fuse_statx without padding."""
        return layout("fuse_statx_out").unpack(self.call("statx", nodeid, 0, 0, 0, mask))[3:]

    def access(self, nodeid: int, mask: int) -> None:
        """Check access."""
        self.call("access", nodeid, mask)

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute, by the struct that INIT agreed on."""
        fixed = layout("fuse_setxattr_in").pack(len(value), flags, 0)
        body = (fixed if self._has(abi.FUSE_SETXATTR_EXT) else fixed[:8]) + name + b"\0" + value
        self.raw(abi.FUSE_SETXATTR, nodeid, body)

    def getxattr(self, nodeid: int, name: bytes, size: int = 65536) -> bytes:
        """Give an extended attribute; with size 0, its length as fuse_getxattr_out."""
        return self.call("getxattr", nodeid, size, names=[name])

    def listxattr(self, nodeid: int, size: int = 65536) -> list[bytes]:
        """Give the names of the extended attributes."""
        body = self.call("listxattr", nodeid, size)
        if body and not body.endswith(b"\0"):
            raise BadReply("LISTXATTR: the last name has no NUL")
        return body.split(b"\0")[:-1]

    def removexattr(self, nodeid: int, name: bytes) -> None:
        """Remove an extended attribute."""
        self.call("removexattr", nodeid, names=[name])

    # Files

    def _open(self, name: str, nodeid: int, flags: int, unneeded: int) -> tuple[int, int]:
        try:
            fh, open_flags, _ = codec.OPEN_OUT.unpack(self.call(name, nodeid, flags, 0))
        except OSError as error:
            if error.errno == errno.ENOSYS and self._has(unneeded):
                return 0, abi.FOPEN_KEEP_CACHE
            raise
        return fh, open_flags

    def open(self, nodeid: int, flags: int = os.O_RDONLY) -> tuple[int, int]:
        """Open a file and give (fh, FOPEN_* flags); ENOSYS means that none is needed, as NO_OPEN_SUPPORT has it."""
        return self._open("open", nodeid, flags, abi.FUSE_NO_OPEN_SUPPORT)

    def create(self, parent: int, name: bytes, flags: int = os.O_RDWR, mode: int = 0o100644) -> tuple[Entry, int, int]:
        """Make and open a file; give (entry, fh, FOPEN_* flags)."""
        body = self.call("create", parent, flags, mode, 0, 0, names=[name])
        fh, open_flags, _ = codec.OPEN_OUT.unpack(body[128:])
        return self._entry(body[:128]), fh, open_flags

    def tmpfile(self, parent: int, flags: int = os.O_RDWR, mode: int = 0o100600) -> tuple[Entry, int, int]:
        """Make and open a file without a name, which the kernel calls "/"."""
        body = self.call("tmpfile", parent, flags, mode, 0, 0, names=[b"/"])
        fh, open_flags, _ = codec.OPEN_OUT.unpack(body[128:])
        return self._entry(body[:128]), fh, open_flags

    def read(self, nodeid: int, fh: int, offset: int, size: int) -> bytes:
        """Read up to `size` bytes."""
        return self.call("read", nodeid, fh, offset, size, 0, 0, 0)

    def write(self, nodeid: int, fh: int, offset: int, data: bytes) -> int:
        """Write and give the count of bytes. Raises BadReply for more than there were (the kernel answers EIO)."""
        (written,) = codec.WRITE_OUT.unpack(self.call("write", nodeid, fh, offset, len(data), 0, 0, 0, tail=data))
        if written > len(data):
            raise BadReply(f"WRITE: {written} bytes of {len(data)} were written")
        return int(written)

    def flush(self, nodeid: int, fh: int, lock_owner: int = 0) -> None:
        """Close one descriptor."""
        self.call("flush", nodeid, fh, lock_owner)

    def release(self, nodeid: int, fh: int, flags: int = 0) -> None:
        """End a handle."""
        self.call("release", nodeid, fh, flags, 0, 0)

    def fsync(self, nodeid: int, fh: int, fsync_flags: int = 0) -> None:
        """Make a file durable."""
        self.call("fsync", nodeid, fh, fsync_flags)

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        """Find data or a hole."""
        return int(codec.U64.unpack(self.call("lseek", nodeid, fh, offset, whence))[0])

    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int = 0) -> None:
        """Reserve or punch space."""
        self.call("fallocate", nodeid, fh, offset, length, mode)

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, length: int
    ) -> int:
        """Copy within the filesystem, by the 64-bit request from 7.45 on."""
        fields = (fh, offset, nodeid_out, fh_out, offset_out, length, 0)
        if self.agreed is not None and self.agreed.minor >= 45:
            return int(codec.U64.unpack(self.call("copy_file_range_64", nodeid, *fields))[0])
        return int(codec.WRITE_OUT.unpack(self.call("copy_file_range", nodeid, *fields))[0])

    def ioctl(
        self, nodeid: int, fh: int, cmd: int, arg: int = 0, data: bytes = b"", out_size: int = 0
    ) -> tuple[int, bytes]:
        """Give (result, output)."""
        body = self.call("ioctl", nodeid, fh, 0, cmd, arg, len(data), out_size, tail=data)
        return codec.IOCTL_OUT.unpack_from(body)[0], body[16:]

    def poll(self, nodeid: int, fh: int, events: int, *, kh: int = 0) -> int:
        """Give the ready events; with `kh`, ask to be notified."""
        flags = abi.FUSE_POLL_SCHEDULE_NOTIFY if kh else 0
        return int(codec.POLL_OUT.unpack(self.call("poll", nodeid, fh, kh, flags, events))[0])

    def bmap(self, nodeid: int, block: int, blocksize: int) -> int:
        """Map a block."""
        return int(codec.U64.unpack(self.call("bmap", nodeid, block, blocksize))[0])

    # Directories

    def opendir(self, nodeid: int, flags: int = os.O_DIRECTORY) -> tuple[int, int]:
        """Open a directory, as `open`."""
        return self._open("opendir", nodeid, flags, abi.FUSE_NO_OPENDIR_SUPPORT)

    def readdir(self, nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> list[Dirent]:
        """Give one reply's entries."""
        return parse_dirents(self.call("readdir", nodeid, fh, offset, size, 0, 0, 0))

    def readdirplus(self, nodeid: int, fh: int, offset: int = 0, size: int = 4096) -> list[Dirent]:
        """Give one reply's entries, each but "." and ".." counted as a lookup."""
        found = parse_dirents(self.call("readdirplus", nodeid, fh, offset, size, 0, 0, 0), plus=True)
        for item in found:
            if item.entry is not None:
                if item.name in (b".", b".."):
                    raise BadReply(f"READDIRPLUS: {item.name!r} has a node, which the kernel never forgets")
                self._count(item.entry)
        return found

    def releasedir(self, nodeid: int, fh: int) -> None:
        """End a directory handle."""
        self.call("releasedir", nodeid, fh, 0, 0, 0)

    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int = 0) -> None:
        """Make a directory durable."""
        self.call("fsyncdir", nodeid, fh, fsync_flags)

    # Locks

    def getlk(self, nodeid: int, fh: int, owner: int, lock: Lock) -> Lock:
        """Give the lock that stands in the way."""
        return Lock(*codec.FILE_LOCK.unpack(self.call("getlk", nodeid, fh, owner, *lock, 0)))

    def setlk(self, nodeid: int, fh: int, owner: int, lock: Lock, *, wait: bool = False, lk_flags: int = 0) -> None:
        """Take or drop a lock."""
        self.call("setlkw" if wait else "setlk", nodeid, fh, owner, *lock, lk_flags)

    # The whole

    def statfs(self, nodeid: int = 1) -> Statfs:
        """Give statistics."""
        return Statfs(*codec.KSTATFS.unpack(self.call("statfs", nodeid)))

    def syncfs(self, nodeid: int = 1) -> None:
        """Make everything durable."""
        self.call("syncfs", nodeid)

    def interrupt(self, unique: int) -> bool:
        """Say that the caller of `unique` gives up; give False when the server wants to hear of none (ENOSYS)."""
        sent = self.start(abi.FUSE_INTERRUPT, 0, codec.U64.pack(unique), unique=unique | 1)
        try:
            self.finish(sent)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return False
            raise
        return True

    def notify_reply(self, unique: int, offset: int, data: bytes, nodeid: int = 1) -> None:
        """Answer a RETRIEVE notification whose `notify_unique` is given."""
        body = body_of("notify_reply", offset, len(data), tail=data)
        self.finish(self.start(abi.FUSE_NOTIFY_REPLY, nodeid, body, unique=unique))

    # Paths

    def listdir(self, nodeid: int = 1, size: int = 4096) -> list[Dirent]:
        """List a whole directory by READDIRPLUS if that was agreed, else by READDIR.

        Raises BadReply when a name comes twice or a cookie leads nowhere.
        """
        fh, _ = self.opendir(nodeid)
        found: list[Dirent] = []
        try:
            step = self.readdirplus if self._has(abi.FUSE_DO_READDIRPLUS) else self.readdir
            while part := step(nodeid, fh, found[-1].cookie if found else 0, size):
                found += part
                if len({item.name for item in found}) != len(found):
                    raise BadReply(f"directory {nodeid} lists a name twice")
        finally:
            self.releasedir(nodeid, fh)
        return found

    def resolve(self, path: bytes) -> Entry:
        """Look a path up from the root, name by name."""
        entry = Entry(1, self.getattr(1)[0])
        for name in path.split(b"/"):
            if name:
                entry = self.lookup(entry.nodeid, name)
                if not entry.nodeid:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return entry

    def read_file(self, path: bytes, size: int = 131072) -> bytes:
        """Read a whole file by its path."""
        nodeid = self.resolve(path).nodeid
        fh, _ = self.open(nodeid)
        parts = []
        offset = 0
        try:
            while part := self.read(nodeid, fh, offset, size):
                parts.append(part)
                offset += len(part)
        finally:
            self.release(nodeid, fh)
        return b"".join(parts)

    def walk(self, nodeid: int = 1, path: bytes = b"") -> Iterator[tuple[bytes, Entry]]:
        """Give (path, entry) of everything below a directory, parents first, each directory's names in its order."""
        for item in self.listdir(nodeid):
            if item.name in (b".", b".."):
                continue
            entry = item.entry or self.lookup(nodeid, item.name)
            below = path + b"/" + item.name if path else item.name
            yield below, entry
            if stat.S_ISDIR(entry.attr[9]):
                yield from self.walk(entry.nodeid, below)


# Behaviours of a directory that is really mounted. Each takes its path, and raises AssertionError, or OSError for what
# should have worked. They change nothing and need nothing to be in the tree; the more is in it, the more they see.


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
