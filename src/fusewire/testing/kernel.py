"""The kernel's side of a mount, in process: `FakeKernel` drives a session as bytes and judges every reply.

Layer `testing`. It mounts nothing. Long because it has one method per operation.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fusewire.adapters import Reply
from fusewire.ops import Attr, Entry, Lock, Setattr, Statfs
from fusewire.session import Session
from fusewire.testing.replies import (
    BY_CODE,
    BY_NAME,
    OFFERED,
    BadReply,
    Dirent,
    as_attr,
    body_of,
    check_reply,
    flatten,
    parse_dirents,
    parse_entry,
    request,
    title,
)
from fusewire.wire import abi, codec
from fusewire.wire.table import layout

_INIT_OUT = layout("fuse_init_out")
_PATIENCE = 30.0
# How many INIT flags there were before a minor.
_BITS_BEFORE = ((27, 21), (28, 22), (29, 24), (30, 25), (31, 26), (32, 27), (33, 28), (36, 30))


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
        op = BY_CODE.get(opcode)
        if reply is not None or (op is not None and not op.reply):
            with self._condition:
                if unique in self._late:
                    raise BadReply(f"{title(opcode)} was answered twice")
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
            raise OSError(error, os.strerror(error), title(codec.IN_HEADER.unpack_from(sent)[1]))
        return body

    def raw(self, opcode: int, nodeid: int, body: bytes = b"", *, extlen: int = 0) -> bytes:
        """Send a request of any shape and give its answer's body. Raises OSError if it is an error."""
        return self.finish(self.start(opcode, nodeid, body, extlen=extlen))

    def call(
        self, name: str, nodeid: int, *fields: int, names: Iterable[bytes] = (), tail: bytes = b"", extlen: int = 0
    ) -> bytes:
        """Send an operation by its name in the table; `fields` fill its struct."""
        return self.raw(BY_NAME[name].code, nodeid, body_of(name, *fields, names=names, tail=tail), extlen=extlen)

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
        self._count(entry.nodeid, 1)
        return entry

    def _count(self, nodeid: int, lookups: int) -> None:
        if nodeid:
            with self._condition:  # threads look the same name up
                self.lookups[nodeid] = self.lookups.get(nodeid, 0) + lookups

    def lookup(self, parent: int, name: bytes) -> Entry:
        """Look a name up. An Entry with nodeid 0 is a name that may be remembered as missing."""
        return self._entry(self.call("lookup", parent, names=[name]))

    def forget(self, nodeid: int, nlookup: int = 1) -> None:
        """Give lookups back."""
        self._count(nodeid, -nlookup)
        self.call("forget", nodeid, nlookup)

    def batch_forget(self, items: Sequence[tuple[int, int]]) -> None:
        """Give lookups of several nodes back."""
        tail = b"".join(codec.FORGET_ONE.pack(nodeid, nlookup) for nodeid, nlookup in items)
        for nodeid, nlookup in items:
            self._count(nodeid, -nlookup)
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
        return as_attr(attr), seconds + nano / 1e9

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
                self._count(item.entry.nodeid, 1)
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
