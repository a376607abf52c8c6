"""Golden bytes: for every row of the table a request and its reply, written out by hand as a little-endian kernel does.

Each line has bytes in hex, then what they are. Longer than other files because it is the protocol in examples.
"""

import sys
from typing import Any, NamedTuple

import pytest

from fusewire.ops import Caller, Entry, Extensions, Lock, Operations, Setattr, Statfs
from fusewire.session import Session
from fusewire.testing import OFFERED, flatten, request
from fusewire.wire import abi
from fusewire.wire.codec import DirBuffer
from fusewire.wire.table import TABLE, layout

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are those of a little-endian machine")


def wire(text: str) -> bytes:
    return bytes.fromhex("".join(line.partition("|")[0] for line in text.splitlines()))


WHO = "e8030000 e9030000 d2040000 0000 0000 | uid 1000, gid 1001, pid 1234, total_extlen 0, padding"
ENOSYS = "10000000 daffffff 0600000000000000 | len 16, error -38 ENOSYS, unique 6"
DONE = "10000000 00000000 0600000000000000 | len 16, error 0, unique 6"
ATTR_BYTES = """
    0200000000000000  | ino 2
    8813000000000000  | size 5000
    0a00000000000000  | blocks 10
    0100006500000000  | atime 0x65000001
    0200006500000000  | mtime 0x65000002
    ffffffffffffffff  | ctime -1, a second before 1970
    01000000 02000000 03000000  | atimensec, mtimensec, ctimensec
    a4810000          | mode 0100644
    01000000          | nlink 1
    e8030000 e9030000 | uid 1000, gid 1001
    00000000          | rdev 0
    00100000          | blksize 4096
    00000000          | flags 0
"""
ENTRY_BYTES = f"""
    0200000000000000  | nodeid 2
    0300000000000000  | generation 3
    0100000000000000  | entry_valid 1 s
    0200000000000000  | attr_valid 2 s
    0065cd1d          | entry_valid_nsec 500000000
    80b2e60e          | attr_valid_nsec 250000000
    {ATTR_BYTES}
"""
ATTR_OUT_BYTES = f"""
    0200000000000000  | attr_valid 2 s
    80b2e60e 00000000 | attr_valid_nsec 250000000, dummy
    {ATTR_BYTES}
"""
OPEN_OUT_BYTES = "0700000000000000 02000000 00000000 | fh 7, open_flags KEEP_CACHE, backing_id 0"
LK_IN_BYTES = """
    0700000000000000 0900000000000000  | fh 7, owner 9
    0000000000000000 6300000000000000  | lk.start 0, lk.end 99
    01000000 d2040000                  | lk.type F_WRLCK, lk.pid 1234
    01000000 00000000                  | lk_flags LK_FLOCK, padding
"""
COPY_IN_BYTES = """
    0700000000000000 0000000000000000  | fh_in 7, off_in 0
    0800000000000000 0900000000000000  | nodeid_out 8, fh_out 9
    0010000000000000 6400000000000000  | off_out 4096, len 100
    0000000000000000                   | flags 0
"""
STATX_BYTES = f"""
    ff070000 00100000                  | mask 0x7ff, blksize 4096
    1000000000000000                   | attributes STATX_ATTR_IMMUTABLE
    01000000 e8030000 e9030000         | nlink 1, uid 1000, gid 1001
    a481 0000                          | mode 0100644, spare
    0200000000000000 8813000000000000  | ino 2, size 5000
    0a00000000000000 1000000000000000  | blocks 10, attributes_mask
    0100006500000000 01000000 00000000 | atime
    0400006500000000 04000000 00000000 | btime
    ffffffffffffffff 03000000 00000000 | ctime
    0200006500000000 02000000 00000000 | mtime
    00000000 00000000 08000000 01000000 | rdev 0:0, dev 8:1
    {"00" * 112}                       | spare
"""
FIELDS = (2, 5000, 10, 0x65000001, 0x65000002, 2**64 - 1, 1, 2, 3, 0o100644, 1, 1000, 1001, 0, 4096, 0)
ENTRY = Entry(2, FIELDS, 1.5, 2.25, 3)
CALLER = Caller(1000, 1001, 1234, 6)
STATX_FIELDS = (0x7FF, 4096, 16, 1, 1000, 1001, 0o100644, 2, 5000, 10, 16)
STATX_FIELDS += (0x65000001, 1, 0x65000004, 4, -1, 3, 0x65000002, 2, 0, 0, 8, 1)


def listing(*, plus: bool) -> bytearray:
    buffer = DirBuffer(4096)
    assert buffer.add_plus(b"f", 1, ENTRY) if plus else buffer.add(b"f", 2, 1, 8)
    return buffer.data


class Golden(NamedTuple):
    name: str
    request: str
    """The bytes that the kernel sends."""
    method: str
    """The method that is called, with these arguments; "" for what no filesystem is asked."""
    arguments: tuple[Any, ...]
    result: Any
    reply: str | None
    refusal: str | None = ENOSYS
    """The answer after INIT when the filesystem does not offer it."""


GOLDEN = [
    Golden(
        "lookup",
        f"""2a000000 01000000 0600000000000000 0100000000000000 | len 42, LOOKUP, unique 6, node 1
            {WHO}
            66 00 | "f" """,
        "lookup",
        (CALLER, 1, b"f"),
        ENTRY,
        f"""90000000 00000000 0600000000000000 | len 144, error 0, unique 6
            {ENTRY_BYTES}""",
    ),
    Golden(
        "forget",
        f"""30000000 02000000 0600000000000000 0200000000000000 | len 48, FORGET, unique 6, node 2
            {WHO}
            0300000000000000 | nlookup 3""",
        "forget",
        (2, 3),
        None,
        None,
        None,
    ),
    Golden(
        "getattr",
        f"""38000000 03000000 0600000000000000 0200000000000000 | len 56, GETATTR, unique 6, node 2
            {WHO}
            01000000 00000000 0700000000000000 | getattr_flags GETATTR_FH, dummy, fh 7""",
        "getattr",
        (2, abi.FUSE_GETATTR_FH, 7),
        (FIELDS, 2.25),
        f"""78000000 00000000 0600000000000000 | len 120, error 0, unique 6
            {ATTR_OUT_BYTES}""",
    ),
    Golden(
        "setattr",
        f"""80000000 04000000 0600000000000000 0200000000000000 | len 128, SETATTR, unique 6, node 2
            {WHO}
            29000000 00000000                  | valid MODE SIZE MTIME, padding
            0700000000000000                   | fh 7
            8813000000000000 0900000000000000  | size 5000, lock_owner 9
            0100006500000000 0200006500000000  | atime, mtime
            ffffffffffffffff                   | ctime -1
            01000000 02000000 03000000         | atimensec, mtimensec, ctimensec
            a4810000 00000000                  | mode 0100644, unused4
            e8030000 e9030000 00000000         | uid 1000, gid 1001, unused5""",
        "setattr",
        (
            CALLER,
            2,
            Setattr(0x29, 7, 5000, 9, 0x65000001, 0x65000002, 2**64 - 1, 1, 2, 3, 0o100644, 1000, 1001),
        ),
        (FIELDS, 2.25),
        f"""78000000 00000000 0600000000000000 | len 120, error 0, unique 6
            {ATTR_OUT_BYTES}""",
    ),
    Golden(
        "readlink",
        f"""28000000 05000000 0600000000000000 0200000000000000 | len 40, READLINK, unique 6, node 2
            {WHO}""",
        "readlink",
        (2,),
        b"target",
        """16000000 00000000 0600000000000000 | len 22, error 0, unique 6
           746172676574 | "target", without a NUL""",
    ),
    Golden(
        "symlink",
        f"""2e000000 06000000 0600000000000000 0100000000000000 | len 46, SYMLINK, unique 6, node 1
            {WHO}
            6c 00       | name "l"
            742f78 00   | target "t/x" """,
        "symlink",
        (CALLER, 1, b"l", b"t/x"),
        ENTRY,
        f"""90000000 00000000 0600000000000000 | len 144, error 0, unique 6
            {ENTRY_BYTES}""",
    ),
    Golden(
        "mknod",
        f"""3a000000 08000000 0600000000000000 0100000000000000 | len 58, MKNOD, unique 6, node 1
            {WHO}
            a4110000 01050000 12000000 00000000 | mode 010644, rdev 5:1, umask 022, padding
            70 00 | name "p" """,
        "mknod",
        (CALLER, 1, b"p", 0o10644, 0x501, 0o22),
        ENTRY,
        f"""90000000 00000000 0600000000000000 | len 144, error 0, unique 6
            {ENTRY_BYTES}""",
    ),
    Golden(
        "mkdir",
        f"""32000000 09000000 0600000000000000 0100000000000000 | len 50, MKDIR, unique 6, node 1
            {WHO}
            ed010000 12000000 | mode 0755, umask 022
            64 00 | name "d" """,
        "mkdir",
        (CALLER, 1, b"d", 0o755, 0o22),
        ENTRY,
        f"""90000000 00000000 0600000000000000 | len 144, error 0, unique 6
            {ENTRY_BYTES}""",
    ),
    Golden(
        "unlink",
        f"""2a000000 0a000000 0600000000000000 0100000000000000 | len 42, UNLINK, unique 6, node 1
            {WHO}
            66 00 | "f" """,
        "unlink",
        (CALLER, 1, b"f"),
        None,
        DONE,
    ),
    Golden(
        "rmdir",
        f"""2a000000 0b000000 0600000000000000 0100000000000000 | len 42, RMDIR, unique 6, node 1
            {WHO}
            64 00 | "d" """,
        "rmdir",
        (CALLER, 1, b"d"),
        None,
        DONE,
    ),
    Golden(
        "rename",
        f"""34000000 0c000000 0600000000000000 0100000000000000 | len 52, RENAME, unique 6, node 1
            {WHO}
            0500000000000000 | newdir 5
            61 00 62 00      | "a" to "b" """,
        "rename",
        (CALLER, 1, b"a", 5, b"b", 0),
        None,
        DONE,
    ),
    Golden(
        "rename2",
        f"""3c000000 2d000000 0600000000000000 0100000000000000 | len 60, RENAME2, unique 6, node 1
            {WHO}
            0500000000000000 01000000 00000000 | newdir 5, flags RENAME_NOREPLACE, padding
            61 00 62 00      | "a" to "b" """,
        "rename",
        (CALLER, 1, b"a", 5, b"b", 1),
        None,
        DONE,
    ),
    Golden(
        "link",
        f"""32000000 0d000000 0600000000000000 0100000000000000 | len 50, LINK, unique 6, node 1: the new parent
            {WHO}
            0800000000000000 | oldnodeid 8
            6e 00            | "n" """,
        "link",
        (CALLER, 8, 1, b"n"),
        ENTRY,
        f"""90000000 00000000 0600000000000000 | len 144, error 0, unique 6
            {ENTRY_BYTES}""",
    ),
    Golden(
        "open",
        f"""30000000 0e000000 0600000000000000 0200000000000000 | len 48, OPEN, unique 6, node 2
            {WHO}
            02800000 01000000 | flags O_RDWR O_LARGEFILE, open_flags OPEN_KILL_SUIDGID""",
        "open",
        (CALLER, 2, 0x8002, 1),
        (7, abi.FOPEN_KEEP_CACHE),
        f"""20000000 00000000 0600000000000000 | len 32, error 0, unique 6
            {OPEN_OUT_BYTES}""",
    ),
    Golden(
        "read",
        f"""50000000 0f000000 0600000000000000 0200000000000000 | len 80, READ, unique 6, node 2
            {WHO}
            0700000000000000 0010000000000000 | fh 7, offset 4096
            00000100 02000000                 | size 65536, read_flags READ_LOCKOWNER
            0900000000000000                  | lock_owner 9
            00800000 00000000                 | flags O_LARGEFILE, padding""",
        "read",
        (2, 7, 4096, 65536, 2, 9, 0x8000),
        [b"da", memoryview(b"ta")],
        """14000000 00000000 0600000000000000 | len 20, error 0, unique 6
           64617461 | "data" """,
    ),
    Golden(
        "write",
        f"""54000000 10000000 0600000000000000 0200000000000000 | len 84, WRITE, unique 6, node 2
            {WHO}
            0700000000000000 0010000000000000 | fh 7, offset 4096
            04000000 01000000                 | size 4, write_flags WRITE_CACHE
            0900000000000000                  | lock_owner 9
            01800000 00000000                 | flags O_WRONLY O_LARGEFILE, padding
            64617461                          | "data" """,
        "write",
        (2, 7, 4096, b"data", 1, 9, 0x8001),
        4,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           04000000 00000000 | size 4, padding""",
    ),
    Golden(
        "statfs",
        f"""28000000 11000000 0600000000000000 0100000000000000 | len 40, STATFS, unique 6, node 1
            {WHO}""",
        "statfs",
        (1,),
        Statfs(1, 2, 3, 4, 5, 4096, 255, 512),
        """60000000 00000000 0600000000000000 | len 96, error 0, unique 6
           0100000000000000 0200000000000000 0300000000000000 | blocks, bfree, bavail
           0400000000000000 0500000000000000                  | files, ffree
           00100000 ff000000 00020000 00000000                | bsize 4096, namelen 255, frsize 512, padding
           000000000000000000000000000000000000000000000000   | spare""",
        """60000000 00000000 0600000000000000 | len 96, error 0, unique 6
           00000000000000000000000000000000000000000000000000000000000000000000000000000000 | no blocks, no files
           00100000 ff000000 00100000 00000000                | bsize 4096, namelen 255, frsize 4096, padding
           000000000000000000000000000000000000000000000000   | spare""",
    ),
    Golden(
        "release",
        f"""40000000 12000000 0600000000000000 0200000000000000 | len 64, RELEASE, unique 6, node 2
            {WHO}
            0700000000000000 02800000 01000000 | fh 7, flags O_RDWR O_LARGEFILE, release_flags RELEASE_FLUSH
            0900000000000000                   | lock_owner 9""",
        "release",
        (2, 7, 0x8002, 1, 9),
        None,
        DONE,
        DONE,
    ),
    Golden(
        "fsync",
        f"""38000000 14000000 0600000000000000 0200000000000000 | len 56, FSYNC, unique 6, node 2
            {WHO}
            0700000000000000 01000000 00000000 | fh 7, fsync_flags FSYNC_FDATASYNC, padding""",
        "fsync",
        (2, 7, 1),
        None,
        DONE,
    ),
    Golden(
        "setxattr",
        f"""41000000 15000000 0600000000000000 0200000000000000 | len 65, SETXATTR, unique 6, node 2
            {WHO}
            02000000 01000000 01000000 00000000 | size 2, flags XATTR_CREATE, setxattr_flags ACL_KILL_SGID, padding
            757365722e61 00 | name "user.a"
            7631            | value "v1" """,
        "setxattr",
        (CALLER, 2, b"user.a", b"v1", 1, 1),
        None,
        DONE,
    ),
    Golden(
        "getxattr",
        f"""37000000 16000000 0600000000000000 0200000000000000 | len 55, GETXATTR, unique 6, node 2
            {WHO}
            40000000 00000000 | size 64, padding
            757365722e61 00   | name "user.a" """,
        "getxattr",
        (CALLER, 2, b"user.a"),
        b"v1",
        """12000000 00000000 0600000000000000 | len 18, error 0, unique 6
           7631 | "v1" """,
    ),
    Golden(
        "getxattr",
        f"""37000000 16000000 0600000000000000 0200000000000000 | len 55, GETXATTR, unique 6, node 2
            {WHO}
            00000000 00000000 | size 0: how long is it?
            757365722e61 00   | name "user.a" """,
        "getxattr",
        (CALLER, 2, b"user.a"),
        b"v1",
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           02000000 00000000 | size 2, padding""",
    ),
    Golden(
        "getxattr",
        f"""37000000 16000000 0600000000000000 0200000000000000 | len 55, GETXATTR, unique 6, node 2
            {WHO}
            01000000 00000000 | size 1: too small
            757365722e61 00   | name "user.a" """,
        "getxattr",
        (CALLER, 2, b"user.a"),
        b"v1",
        "10000000 deffffff 0600000000000000 | len 16, error -34 ERANGE, unique 6",
    ),
    Golden(
        "listxattr",
        f"""30000000 17000000 0600000000000000 0200000000000000 | len 48, LISTXATTR, unique 6, node 2
            {WHO}
            40000000 00000000 | size 64, padding""",
        "listxattr",
        (CALLER, 2),
        b"user.a\0",
        """17000000 00000000 0600000000000000 | len 23, error 0, unique 6
           757365722e61 00 | "user.a" """,
    ),
    Golden(
        "removexattr",
        f"""2f000000 18000000 0600000000000000 0200000000000000 | len 47, REMOVEXATTR, unique 6, node 2
            {WHO}
            757365722e61 00 | name "user.a" """,
        "removexattr",
        (CALLER, 2, b"user.a"),
        None,
        DONE,
    ),
    Golden(
        "flush",
        f"""40000000 19000000 0600000000000000 0200000000000000 | len 64, FLUSH, unique 6, node 2
            {WHO}
            0700000000000000 00000000 00000000 0900000000000000 | fh 7, unused, padding, lock_owner 9""",
        "flush",
        (2, 7, 9),
        None,
        DONE,
    ),
    Golden(
        "opendir",
        f"""30000000 1b000000 0600000000000000 0100000000000000 | len 48, OPENDIR, unique 6, node 1
            {WHO}
            00000100 00000000 | flags O_DIRECTORY, open_flags 0""",
        "opendir",
        (CALLER, 1, 0x10000, 0),
        (7, abi.FOPEN_KEEP_CACHE),
        f"""20000000 00000000 0600000000000000 | len 32, error 0, unique 6
            {OPEN_OUT_BYTES}""",
    ),
    Golden(
        "readdir",
        f"""50000000 1c000000 0600000000000000 0100000000000000 | len 80, READDIR, unique 6, node 1
            {WHO}
            0700000000000000 0000000000000000 | fh 7, offset 0
            00100000 00000000                 | size 4096, read_flags 0
            0000000000000000                  | lock_owner 0
            00000100 00000000                 | flags O_DIRECTORY, padding""",
        "readdir",
        (1, 7, 0, 4096, 0, 0, 0x10000),
        listing(plus=False),
        """30000000 00000000 0600000000000000 | len 48, error 0, unique 6
           0200000000000000 0100000000000000  | ino 2, off 1
           01000000 08000000                  | namelen 1, type DT_REG
           66 00000000000000                  | "f", padded to 8""",
    ),
    Golden(
        "releasedir",
        f"""40000000 1d000000 0600000000000000 0100000000000000 | len 64, RELEASEDIR, unique 6, node 1
            {WHO}
            0700000000000000 00000100 00000000 | fh 7, flags O_DIRECTORY, release_flags 0
            0000000000000000                   | lock_owner 0""",
        "releasedir",
        (1, 7, 0x10000, 0, 0),
        None,
        DONE,
        DONE,
    ),
    Golden(
        "fsyncdir",
        f"""38000000 1e000000 0600000000000000 0100000000000000 | len 56, FSYNCDIR, unique 6, node 1
            {WHO}
            0700000000000000 00000000 00000000 | fh 7, fsync_flags 0, padding""",
        "fsyncdir",
        (1, 7, 0),
        None,
        DONE,
    ),
    Golden(
        "getlk",
        f"""58000000 1f000000 0600000000000000 0200000000000000 | len 88, GETLK, unique 6, node 2
            {WHO}
            {LK_IN_BYTES}""",
        "getlk",
        (CALLER, 2, 7, 9, Lock(0, 99, 1, 1234), abi.FUSE_LK_FLOCK),
        Lock(5, 6, 0, 77),
        """28000000 00000000 0600000000000000 | len 40, error 0, unique 6
           0500000000000000 0600000000000000  | start 5, end 6
           00000000 4d000000                  | type F_RDLCK, pid 77""",
    ),
    Golden(
        "setlk",
        f"""58000000 20000000 0600000000000000 0200000000000000 | len 88, SETLK, unique 6, node 2
            {WHO}
            {LK_IN_BYTES}""",
        "setlk",
        (CALLER, 2, 7, 9, Lock(0, 99, 1, 1234), abi.FUSE_LK_FLOCK),
        None,
        DONE,
    ),
    Golden(
        "setlkw",
        f"""58000000 21000000 0600000000000000 0200000000000000 | len 88, SETLKW, unique 6, node 2
            {WHO}
            {LK_IN_BYTES}""",
        "setlkw",
        (CALLER, 2, 7, 9, Lock(0, 99, 1, 1234), abi.FUSE_LK_FLOCK),
        None,
        DONE,
    ),
    Golden(
        "access",
        f"""30000000 22000000 0600000000000000 0200000000000000 | len 48, ACCESS, unique 6, node 2
            {WHO}
            04000000 00000000 | mask R_OK, padding""",
        "access",
        (CALLER, 2, 4),
        None,
        DONE,
    ),
    Golden(
        "create",
        f"""3a000000 23000000 0600000000000000 0100000000000000 | len 58, CREATE, unique 6, node 1
            {WHO}
            42000000 a4810000 12000000 00000000 | flags O_RDWR O_CREAT, mode 0100644, umask 022, open_flags 0
            66 00 | "f" """,
        "create",
        (CALLER, 1, b"f", 0x42, 0o100644, 0o22, 0),
        (ENTRY, (7, abi.FOPEN_KEEP_CACHE)),
        f"""a0000000 00000000 0600000000000000 | len 160, error 0, unique 6
            {ENTRY_BYTES}
            {OPEN_OUT_BYTES}""",
    ),
    Golden(
        "bmap",
        f"""38000000 25000000 0600000000000000 0200000000000000 | len 56, BMAP, unique 6, node 2
            {WHO}
            0300000000000000 00020000 00000000 | block 3, blocksize 512, padding""",
        "bmap",
        (2, 3, 512),
        9,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           0900000000000000 | block 9""",
    ),
    Golden(
        "destroy",
        f"""28000000 26000000 0600000000000000 0000000000000000 | len 40, DESTROY, unique 6, node 0
            {WHO}""",
        "destroy",
        (),
        None,
        DONE,
        DONE,
    ),
    Golden(
        "ioctl",
        f"""4c000000 27000000 0600000000000000 0200000000000000 | len 76, IOCTL, unique 6, node 2
            {WHO}
            0700000000000000 00000000 01540000 | fh 7, flags 0, cmd 0x5401
            0000fe7f00000000 04000000 08000000 | arg 0x7ffe0000, in_size 4, out_size 8
            01020304                           | input""",
        "ioctl",
        (CALLER, 2, 7, 0, 0x5401, 0x7FFE0000, b"\1\2\3\4", 8),
        (5, b"ok"),
        """22000000 00000000 0600000000000000   | len 34, error 0, unique 6
           05000000 00000000 00000000 00000000  | result 5, flags 0, in_iovs 0, out_iovs 0
           6f6b                                 | output""",
    ),
    Golden(
        "poll",
        f"""40000000 28000000 0600000000000000 0200000000000000 | len 64, POLL, unique 6, node 2
            {WHO}
            0700000000000000 0b00000000000000  | fh 7, kh 11
            01000000 05000000                  | flags POLL_SCHEDULE_NOTIFY, events POLLIN POLLOUT""",
        "poll",
        (2, 7, 11, 1, 5),
        1,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           01000000 00000000 | revents POLLIN, padding""",
    ),
    Golden(
        "fallocate",
        f"""48000000 2b000000 0600000000000000 0200000000000000 | len 72, FALLOCATE, unique 6, node 2
            {WHO}
            0700000000000000 0010000000000000  | fh 7, offset 4096
            0020000000000000 03000000 00000000 | length 8192, mode PUNCH_HOLE KEEP_SIZE, padding""",
        "fallocate",
        (2, 7, 4096, 8192, 3),
        None,
        DONE,
    ),
    Golden(
        "readdirplus",
        f"""50000000 2c000000 0600000000000000 0100000000000000 | len 80, READDIRPLUS, unique 6, node 1
            {WHO}
            0700000000000000 0000000000000000 | fh 7, offset 0
            00100000 00000000                 | size 4096, read_flags 0
            0000000000000000                  | lock_owner 0
            00000100 00000000                 | flags O_DIRECTORY, padding""",
        "readdirplus",
        (1, 7, 0, 4096, 0, 0, 0x10000),
        listing(plus=True),
        f"""b0000000 00000000 0600000000000000 | len 176, error 0, unique 6
            {ENTRY_BYTES}
            0200000000000000 0100000000000000  | ino 2, off 1
            01000000 08000000                  | namelen 1, type DT_REG
            66 00000000000000                  | "f", padded to 8""",
    ),
    Golden(
        "lseek",
        f"""40000000 2e000000 0600000000000000 0200000000000000 | len 64, LSEEK, unique 6, node 2
            {WHO}
            0700000000000000 0010000000000000 | fh 7, offset 4096
            03000000 00000000                 | whence SEEK_DATA, padding""",
        "lseek",
        (2, 7, 4096, 3),
        8192,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           0020000000000000 | offset 8192""",
    ),
    Golden(
        "copy_file_range",
        f"""60000000 2f000000 0600000000000000 0200000000000000 | len 96, COPY_FILE_RANGE, unique 6, node 2
            {WHO}
            {COPY_IN_BYTES}""",
        "copy_file_range",
        (2, 7, 0, 8, 9, 4096, 100, 0),
        100,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           64000000 00000000 | size 100, padding""",
    ),
    Golden(
        "copy_file_range_64",
        f"""60000000 35000000 0600000000000000 0200000000000000 | len 96, COPY_FILE_RANGE_64, unique 6, node 2
            {WHO}
            {COPY_IN_BYTES}""",
        "copy_file_range",
        (2, 7, 0, 8, 9, 4096, 100, 0),
        1 << 32,
        """18000000 00000000 0600000000000000 | len 24, error 0, unique 6
           0000000001000000 | bytes_copied 2^32""",
    ),
    Golden(
        "setupmapping",
        f"""50000000 30000000 0600000000000000 0200000000000000 | len 80, SETUPMAPPING, unique 6, node 2
            {WHO}
            0700000000000000 0000000000000000  | fh 7, foffset 0
            0000200000000000 0200000000000000  | len 2 MiB, flags READ
            0000000000000000                   | moffset 0""",
        "",
        (),
        None,
        ENOSYS,
    ),
    Golden(
        "removemapping",
        f"""3c000000 31000000 0600000000000000 0200000000000000 | len 60, REMOVEMAPPING, unique 6, node 2
            {WHO}
            01000000                           | count 1
            0000000000000000 0000200000000000  | moffset 0, len 2 MiB""",
        "",
        (),
        None,
        ENOSYS,
    ),
    Golden(
        "syncfs",
        f"""30000000 32000000 0600000000000000 0100000000000000 | len 48, SYNCFS, unique 6, node 1
            {WHO}
            0000000000000000 | padding""",
        "syncfs",
        (1,),
        None,
        DONE,
    ),
    Golden(
        "tmpfile",
        f"""3a000000 33000000 0600000000000000 0100000000000000 | len 58, TMPFILE, unique 6, node 1
            {WHO}
            02004100 80810000 12000000 00000000 | flags O_RDWR O_TMPFILE, mode 0100600, umask 022, open_flags 0
            2f 00 | "/", as vfs_tmpfile calls it""",
        "tmpfile",
        (CALLER, 1, 0x410002, 0o100600, 0o22, 0),
        (ENTRY, (7, abi.FOPEN_KEEP_CACHE)),
        f"""a0000000 00000000 0600000000000000 | len 160, error 0, unique 6
            {ENTRY_BYTES}
            {OPEN_OUT_BYTES}""",
    ),
    Golden(
        "statx",
        f"""40000000 34000000 0600000000000000 0200000000000000 | len 64, STATX, unique 6, node 2
            {WHO}
            01000000 00000000 0700000000000000 | getattr_flags GETATTR_FH, reserved, fh 7
            00200000 ff0f0000                  | sx_flags AT_STATX_FORCE_SYNC, sx_mask 0xfff""",
        "statx",
        (2, 1, 7, 0x2000, 0xFFF),
        (STATX_FIELDS, 2.25, 0),
        f"""30010000 00000000 0600000000000000 | len 304, error 0, unique 6
            0200000000000000                   | attr_valid 2 s
            80b2e60e 00000000                  | attr_valid_nsec 250000000, flags
            00000000000000000000000000000000   | spare
            {STATX_BYTES}""",
    ),
]


def recorder(method: str, result: Any) -> tuple[Operations, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    def record(self: Operations, *arguments: Any) -> Any:
        calls.append(tuple(bytes(item) if isinstance(item, memoryview) else item for item in arguments))
        return result

    return type("Recorder", (Operations,), {method: record} if method else {})(), calls


def handle(session: Session, text: str) -> bytes | None:
    return flatten(session.handle(memoryview(wire(text))))


def expected(text: str | None) -> bytes | None:
    return None if text is None else wire(text)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_request_reaches_its_method_and_the_answer_has_the_bytes_of_the_protocol(golden):
    operations, calls = recorder(golden.method, golden.result)
    session = Session(operations)
    assert handle(session, golden.request) == expected(golden.reply)
    assert calls == ([golden.arguments] if golden.method else [])


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_request_that_is_not_offered_gets_the_answer_that_ends_the_asking(golden):
    session = Session(Operations())
    begin = layout("fuse_init_in").pack(7, 45, 131072, OFFERED & 0xFFFFFFFF, OFFERED >> 32)
    session.handle(request(abi.FUSE_INIT, 0, begin))
    assert handle(session, golden.request) == expected(golden.refusal)


def test_every_row_has_a_golden_request():
    elsewhere = {"init", "interrupt", "notify_reply", "batch_forget"}
    assert {golden.name for golden in GOLDEN} | elsewhere == {op.name for op in TABLE}


@pytest.mark.parametrize("opcode", ["07000000", "13000000", "36000000", "3f000000", "40000000", "00100000", "ffffffff"])
def test_opcode_that_nobody_knows_is_answered_enosys(opcode):
    text = f"28000000 {opcode} 0600000000000000 0100000000000000 {WHO.partition('|')[0]}"
    assert handle(Session(Operations()), text) == wire(ENOSYS)


def test_batch_forget_reaches_forget_once_for_each_node():
    operations, calls = recorder("forget", None)
    text = f"""50000000 2a000000 0600000000000000 0000000000000000 | len 80, BATCH_FORGET, unique 6, node 0
               {WHO}
               02000000 00000000                 | count 2, dummy
               0200000000000000 0100000000000000 | node 2, nlookup 1
               0300000000000000 0200000000000000 | node 3, nlookup 2"""
    assert handle(Session(operations), text) is None
    assert calls == [(2, 1), (3, 2)]
    assert handle(Session(Operations()), text) is None


INTERRUPT = f"""30000000 24000000 0700000000000000 0000000000000000 | len 48, INTERRUPT, unique 6 | 1, node 0
                {WHO}
                0600000000000000 | unique of the request that is meant"""


def test_interrupt_is_answered_enosys_by_who_wants_none():
    answer = "10000000 daffffff 0700000000000000 | len 16, error -38 ENOSYS, unique 7"
    assert handle(Session(Operations()), INTERRUPT) == wire(answer)


def test_interrupt_is_not_answered_by_who_wants_it():
    class Interruptible(Operations):
        interruptible = True

    assert handle(Session(Interruptible()), INTERRUPT) is None


def test_setxattr_before_setxattr_ext_has_the_short_struct():
    operations, calls = recorder("setxattr", None)
    session = Session(operations)
    session.handle(request(abi.FUSE_INIT, 0, layout("fuse_init_in").pack(7, 31, 131072, 0x07FFFFFB, 0)[:16]))
    text = f"""39000000 15000000 0600000000000000 0200000000000000 | len 57, SETXATTR, unique 6, node 2
               {WHO}
               02000000 01000000 | size 2, flags XATTR_CREATE
               757365722e61 00   | name "user.a"
               7631              | value "v1" """
    assert handle(session, text) == wire(DONE)
    assert calls == [(CALLER, 2, b"user.a", b"v1", 1, 0)]


MKDIR_EXTENDED = """
    6a000000 09000000 0600000000000000 0100000000000000 | len 106, MKDIR, unique 6, node 1
    e8030000 e9030000 d2040000 0700 0000                | uid, gid, pid, total_extlen 7: 56 bytes, padding
    ed010000 12000000                                   | mode 0755, umask 022
    64 00                                               | name "d"
    28000000 01000000                                   | fuse_secctx_header: size 40, nr_secctx 1
    04000000 00000000                                   | fuse_secctx: size 4, padding
    73656375726974792e73656c696e7578 00                 | "security.selinux"
    753a7200                                            | "u:r" with its NUL
    000000                                              | padded to 8
    10000000 20000000                                   | fuse_ext_header: size 16, type EXT_GROUPS
    01000000 e9030000                                   | fuse_supp_groups: nr_groups 1, gid 1001
"""


def test_security_context_and_group_after_the_name_are_given_to_who_agreed_to_them():
    operations, calls = recorder("mkdir", ENTRY)
    operations.want = abi.FUSE_SECURITY_CTX | abi.FUSE_CREATE_SUPP_GROUP
    session = Session(operations)
    session.handle(
        request(abi.FUSE_INIT, 0, layout("fuse_init_in").pack(7, 45, 131072, OFFERED & 0xFFFFFFFF, OFFERED >> 32))
    )
    assert handle(session, MKDIR_EXTENDED)[:16] == wire("90000000 00000000 0600000000000000")
    extensions = Extensions([(b"security.selinux", b"u:r\0")], (1001,))
    assert calls == [(CALLER._replace(extensions=extensions), 1, b"d", 0o755, 0o22)]


def init_request(minor: int, flags: str, flags2: str | None) -> str:
    if flags2 is None:
        return f"""38000000 1a000000 0600000000000000 0000000000000000 | len 56, INIT, unique 6, node 0
                   {WHO}
                   07000000 {minor:02x}000000 | major 7, minor
                   00000200 {flags}           | max_readahead 131072, flags"""
    return f"""68000000 1a000000 0600000000000000 0000000000000000 | len 104, INIT, unique 6, node 0
               {WHO}
               07000000 {minor:02x}000000 | major 7, minor
               00000200 {flags}           | max_readahead 131072, flags
               {flags2}                   | flags2
               {"00" * 44}                | unused"""


def init_reply(minor: int, flags: str, max_pages: str, flags2: str) -> str:
    return f"""50000000 00000000 0600000000000000 | len 80, error 0, unique 6
               07000000 {minor:02x}000000         | major 7, minor
               00000200 {flags}                   | max_readahead 131072, flags
               4000 3000                          | max_background 64, congestion_threshold 48
               00100000 01000000                  | max_write 4096, time_gran 1
               {max_pages} 0000                   | max_pages, map_alignment
               {flags2}                           | flags2
               00000000 0000                      | max_stack_depth, request_timeout
               {"00" * 22}                        | unused"""


@pytest.mark.parametrize(
    ("minor", "offered", "offered2", "agreed", "max_pages", "agreed2"),
    [
        # ASYNC_READ BIG_WRITES AUTO_INVAL_DATA ASYNC_DIO NO_OPEN_SUPPORT PARALLEL_DIROPS ABORT_ERROR MAX_PAGES
        # NO_OPENDIR_SUPPORT SETXATTR_EXT INIT_EXT, HAS_EXPIRE_ONLY HAS_RESEND
        (45, "fbffff73", "fd050000", "21906661", "0001", "88000000"),
        # no flag of flags2 is ours yet
        (36, "fbffff73", "03000000", "21906661", "0001", "00000000"),
        # no SETXATTR_EXT, no INIT_EXT: the request ends after flags
        (31, "fbffff07", None, "21906601", "0001", "00000000"),
        # no NO_OPENDIR_SUPPORT
        (28, "fbffff00", None, "21906600", "0001", "00000000"),
        # no ABORT_ERROR, no MAX_PAGES
        (26, "fbff1f00", None, "21900600", "0000", "00000000"),
    ],
)
def test_init_agrees_on_what_both_know(minor, offered, offered2, agreed, max_pages, agreed2):
    session = Session(Operations(), max_pages=256, max_background=64, congestion_threshold=48)
    answer = handle(session, init_request(minor, offered, offered2))
    assert answer == wire(init_reply(minor, agreed, max_pages, agreed2))
    assert session.ready
    assert session.minor == minor


def test_init_of_a_newer_minor_is_answered_with_ours():
    session = Session(Operations(), max_pages=256, max_background=64, congestion_threshold=48)
    answer = handle(session, init_request(99, "fbffff73", "fd050000"))
    assert answer == wire(init_reply(45, "21906661", "0001", "88000000"))


@pytest.mark.parametrize("minor", [0, 8, 25])
def test_init_before_7_26_is_refused_with_a_reason(minor):
    reports: list[str] = []
    session = Session(Operations(), log=lambda message, error: reports.append(message))
    answer = handle(session, init_request(minor, "fbff0f00", None))
    assert answer == wire("10000000 b9ffffff 0600000000000000 | len 16, error -71 EPROTO, unique 6")
    assert not session.ready
    assert f"7.{minor}" in session.refused
    assert reports == [session.refused]


def test_init_of_a_newer_major_is_answered_with_ours_and_asked_again():
    session = Session(Operations())
    text = f"""38000000 1a000000 0600000000000000 0000000000000000 | len 56, INIT, unique 6, node 0
               {WHO}
               08000000 00000000 | major 8, minor 0
               00000200 ffffffff | max_readahead, flags"""
    answer = f"""50000000 00000000 0600000000000000 | len 80, error 0, unique 6
                 07000000 2d000000 | major 7, minor 45
                 {"00" * 56}       | nothing else is read"""
    assert handle(session, text) == wire(answer)
    assert not session.ready
    assert handle(session, init_request(45, "fbffff73", "fd050000"))[16:24] == wire("07000000 2d000000")
    assert session.ready


NOTIFICATIONS = [
    (
        lambda session: session.notify_poll(11),
        """18000000 01000000 0000000000000000 | len 24, NOTIFY_POLL, unique 0
           0b00000000000000 | kh 11""",
    ),
    (
        lambda session: session.notify_inval_inode(2, -1),
        """28000000 02000000 0000000000000000 | len 40, NOTIFY_INVAL_INODE, unique 0
           0200000000000000 ffffffffffffffff 0000000000000000 | ino 2, off -1: attributes only, len 0""",
    ),
    (
        lambda session: session.notify_inval_entry(1, b"f"),
        """22000000 03000000 0000000000000000 | len 34, NOTIFY_INVAL_ENTRY, unique 0
           0100000000000000 01000000 00000000 | parent 1, namelen 1, flags 0
           66 00 | "f" with its NUL""",
    ),
    (
        lambda session: session.notify_inval_entry(1, b"f", expire_only=True),
        """22000000 03000000 0000000000000000 | len 34, NOTIFY_INVAL_ENTRY, unique 0
           0100000000000000 01000000 01000000 | parent 1, namelen 1, flags EXPIRE_ONLY
           66 00 | "f" with its NUL""",
    ),
    (
        lambda session: session.notify_delete(1, 2, b"f"),
        """2a000000 06000000 0000000000000000 | len 42, NOTIFY_DELETE, unique 0
           0100000000000000 0200000000000000  | parent 1, child 2
           01000000 00000000                  | namelen 1, padding
           66 00 | "f" with its NUL""",
    ),
    (
        lambda session: session.notify_store(2, 4096, memoryview(b"data")),
        """2c000000 04000000 0000000000000000 | len 44, NOTIFY_STORE, unique 0
           0200000000000000 0010000000000000  | nodeid 2, offset 4096
           04000000 00000000                  | size 4, padding
           64617461                           | "data" """,
    ),
    (
        lambda session: session.notify_retrieve(2, 4096, 8192, lambda offset, data: None),
        """30000000 05000000 0000000000000000 | len 48, NOTIFY_RETRIEVE, unique 0
           0100000000000000 0200000000000000  | notify_unique 1, nodeid 2
           0010000000000000 00200000 00000000 | offset 4096, size 8192, padding""",
    ),
    (
        lambda session: session.notify_resend(),
        "10000000 07000000 0000000000000000 | len 16, NOTIFY_RESEND, unique 0",
    ),
    (
        lambda session: session.notify_inc_epoch(),
        "10000000 08000000 0000000000000000 | len 16, NOTIFY_INC_EPOCH, unique 0",
    ),
    (
        lambda session: session.notify_prune(iter([2, 3])),
        """30000000 09000000 0000000000000000 | len 48, NOTIFY_PRUNE, unique 0
           02000000 00000000 0000000000000000 | count 2, padding, spare
           0200000000000000 0300000000000000  | nodes 2, 3""",
    ),
]


@pytest.mark.parametrize(("notify", "message"), NOTIFICATIONS)
def test_notification_has_the_bytes_of_the_protocol(notify, message):
    sent: list[bytes] = []
    session = Session(Operations())
    session.handle(
        request(abi.FUSE_INIT, 0, layout("fuse_init_in").pack(7, 45, 131072, OFFERED & 0xFFFFFFFF, OFFERED >> 32))
    )
    session.send = lambda buffers: sent.append(b"".join(buffers))
    assert notify(session) is True
    assert sent == [wire(message)]


def test_notify_reply_brings_what_was_retrieved():
    found: list[tuple[int, bytes]] = []
    session = Session(Operations())
    session.send = lambda buffers: None
    session.notify_retrieve(2, 4096, 8192, lambda offset, data: found.append((offset, bytes(data))))
    text = f"""54000000 29000000 0100000000000000 0200000000000000 | len 84, NOTIFY_REPLY, the notify_unique 1, node 2
               {WHO}
               0000000000000000 0010000000000000 | dummy1, offset 4096
               04000000 00000000                 | size 4, dummy2
               0000000000000000 0000000000000000 | dummy3, dummy4
               64617461                          | "data" """
    assert handle(session, text) is None
    assert found == [(4096, b"data")]
    assert handle(session, text) is None
    assert len(found) == 1
