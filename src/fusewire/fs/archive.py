"""Tar and zip archives as read-only filesystems.

Layer `fs`; formats are in `formats.tar`, `formats.zip` and `formats.archive_*`. A node id is the number of a member in
the index, plus 1: the server holds no state per file. Everything is immutable, so every answer holds for ever and
nothing but lookups, listings and reads ever reaches us. What lies in the file as it is, is given as a range of it;
what has to be decompressed comes from bounded caches. Where that takes long (data that can only be reached through all
before them), a thread does it while the reader waits, and may give up.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from fusewire.formats.archive_points import points_of
from fusewire.formats.archive_streams import (
    CHUNK,
    MAGICS,
    ArchiveError,
    Chunks,
    Decoder,
    Point,
    Spooled,
    Stream,
    damaged,
    maker,
)
from fusewire.formats.archive_tree import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Builder, Tree, TreeError
from fusewire.fs.archive_cache import Cache, key_of
from fusewire.fs.archive_data import SPOOL_SIZE, Filled, Native, Spool, SpoolFile, Waiting
from fusewire.ops import FOREVER, FileRange, Operations, Statfs
from fusewire.wire.codec import ATTR_OUT, DIRENT, DIRENTPLUS, ENTRY_OUT, DirBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from fusewire.formats.archive_streams import Pread, Reader
    from fusewire.formats.archive_tree import Node, Pieces
    from fusewire.ops import Buffer, Caller, Connection, Pending

    class ArchiveOptions(Protocol):
        """What of the mount options concerns an archive."""

        offset: int | None
        cache_size: int
        uid: int | None
        gid: int | None
        umask: int | None
        squash_owner: bool
        entry_timeout: float | None
        attr_timeout: float | None
        negative_timeout: float | None

    Progress = Callable[[int, int], None]

_U64 = (1 << 64) - 1
_FIRST = 3  # cookie of a directory's first entry: 1 and 2 are "." and ".."
_DT_DIR = 4
_SEEK_DATA, _SEEK_HOLE = 3, 4
_TAR_COPIES = 512  # of zlib's state, 45 KiB each, for a whole archive
_ZIP_COPIES = 64  # for one member
_STREAMS = 16  # members of a zip archive that are being read
_SPOOLED_FROM = 32 << 20  # members packed with what has no copies: larger ones go to a temporary file
_ZIP_TAIL = 22 + 0xFFFF


class ArchiveFile:
    """The open file of an archive, and where in it the archive begins. Owns `fd`, -1 once closed."""

    __slots__ = ("base", "fd", "size")

    def __init__(self, fd: int, size: int, base: int = 0) -> None:
        self.fd = fd
        self.base = base
        self.size = max(0, size - base)

    def pread(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes at `offset`, pread(2); fewer at the end of the file."""
        if not 0 <= offset < self.size or length <= 0:
            return b""
        return os.pread(self.fd, min(length, self.size - offset), self.base + offset)

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def recognise(pread: Pread, size: int) -> str | None:
    """Tell what an archive is by its content: 'tar', 'tar.gz', 'tar.xz', 'tar.zst', 'tar.bz2', 'zip'; None: none.

    The data of a compressed file are looked at: one that holds no tar archive is none. Only where nothing is installed
    that decompresses it, it counts as one, for `open_archive` to say what is missing.
    """
    from fusewire.formats import zip as zip_format

    head = pread(0, 1024)
    if head[:4] in (zip_format.LOCAL, zip_format.EMPTY):
        return "zip"
    for kind, magic in MAGICS.items():
        if head.startswith(magic):
            try:
                decoder = Decoder(pread, 0, size, kind)
                data = b""
                while len(data) < 1024 and (part := decoder.more(1024 - len(data))):
                    data += part
            except ArchiveError as error:
                return "tar." + kind if error.errno == errno.ENOPKG else None
            return "tar." + kind if _is_tar(data, None) else None
    if head[:4] == b"hsqs":
        return None
    if _is_tar(head, size):
        return "tar"
    tail = pread(max(0, size - _ZIP_TAIL), _ZIP_TAIL)
    place = tail.rfind(zip_format.EMPTY)
    if place >= 0 and place + 22 + int.from_bytes(tail[place + 20 : place + 22], "little") == len(tail):
        # A program with an archive behind it.
        try:
            found = zip_format.find_directory(pread, size)
        except ArchiveError as error:
            return "zip" if error.errno == errno.EINVAL else None  # one of several parts, which opening it will say
        if found is not None and (not found[2] or pread(found[0], 4) == b"PK\x01\x02"):
            return "zip"
    return None


def _is_tar(head: bytes, size: int | None) -> bool:
    from fusewire.formats.tar import BLOCK, is_header

    if is_header(head[:BLOCK]):
        return True
    # An empty archive is nothing but zeros, in one record of 20 blocks or of two.
    return len(head) == 2 * BLOCK and not head.strip(b"\0") and size in (None, 2 * BLOCK, 20 * BLOCK)


class _Index(NamedTuple):
    """What opening an archive comes to: the tree, what has to be said of it, and how its data are read."""

    tree: Tree
    notes: list[str]
    reader: Reader | None


def open_archive(
    fd: int,
    size: int,
    source: str,
    options: ArchiveOptions,
    *,
    kind: str | None = None,
    cache: str | None = None,
    spool: Sequence[str] = (),
    spool_size: int = SPOOL_SIZE,
    progress: Progress | None = None,
    native: bool = True,
) -> Archive:
    """Serve the archive that `fd`, which is taken over, is open on. `source` is for messages.

    kind: what `recognise` said. cache: the directory for indexes; None: none is kept.
    spool: directories to try for temporary files, before /var/tmp and /tmp; spool_size: how many bytes they may take.
    progress: hears (bytes done, bytes in all) while the index is built, and is not called when it was in the cache.
    native: use rapidgzip where it is installed: code in C++, with threads of its own.

    Raises OSError that names the source; `fd` is then still the caller's.
    """
    file = ArchiveFile(fd, size, options.offset or 0)
    try:
        kind = kind or recognise(file.pread, file.size)
        if kind is None:
            raise ArchiveError(errno.EINVAL, "not an archive that is known here (tar, also compressed, or zip)")
        room = Spool([*spool, "/var/tmp", "/tmp"], spool_size)  # noqa: S108 - files there have no name
        found = _open(file, kind, Cache(cache), room, options.cache_size, progress, native)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, f"{source}: {error.strerror or error}") from error
    except MemoryError:
        raise OSError(errno.ENOMEM, f"{source}: not enough memory for the index of this archive") from None
    serve = ArchiveWithXattrs if found.tree.has_xattrs else Archive
    filesystem = serve(found.tree, file, source, found.reader, cache_size=options.cache_size)
    filesystem.spool = room
    filesystem.notes = [f"{source}: {note}" for note in found.notes]
    filesystem.own(
        os.getuid() if options.squash_owner and options.uid is None else options.uid,
        os.getgid() if options.squash_owner and options.gid is None else options.gid,
        options.umask or 0,
    )
    filesystem.last(options.entry_timeout, options.attr_timeout, options.negative_timeout)
    return filesystem


def _open(
    file: ArchiveFile, kind: str, cache: Cache, spool: Spool, cache_size: int, progress: Progress | None, fast: bool
) -> _Index:
    """Find the index in the cache, or build it."""
    import json

    key = _key(file, kind)
    kept = cache.load(key)
    if kept is not None:
        head, _, places = kept[1].partition(b"\n")
        try:
            tree, notes = Tree(kept[0]), [str(note) for note in json.loads(head)]
        except (TreeError, ValueError, TypeError):
            kept = None
        else:
            reader = _reader(file, kind, spool, cache_size, fast, places)[0] if kind.startswith("tar.") else None
            return _Index(tree, notes, reader)
    builder = Builder(int(os.fstat(file.fd).st_mtime))
    step: Callable[[int], None] | None = None
    reader, native = _reader(file, kind, spool, cache_size, fast) if kind.startswith("tar.") else (None, None)
    if progress is not None:
        told = progress
        step = lambda position: told(reader.consumed if reader else position, file.size)  # noqa: E731
    places = b""
    try:
        if kind == "zip":
            from fusewire.formats import zip as zip_format

            zip_format.index(file.pread, file.size, builder, step)
        else:
            from fusewire.formats import tar

            read = file.pread
            if reader is not None:
                data = reader
                read = lambda offset, length: b"".join(data.read(offset, length))  # noqa: E731
            tar.check(read)
            tar.index(read, builder, step)
        packed = builder.pack()
        if native is not None:
            try:
                places = native.export()
            except ArchiveError:
                places = b""  # something behind the archive that is no gzip: it reads well without
    finally:
        if native is not None:
            native.close()  # also after Ctrl-C: its threads abort an interpreter that ends before them
    notes = [
        f"left out: {reason} ({count} time{'s' * (count > 1)}, first: {os.fsdecode(name[:200])!r})"
        for reason, (count, name) in builder.skipped.items()
    ]
    if _key(file, kind) == key:  # nobody has written to it meanwhile
        cache.store(key, packed, json.dumps(notes).encode() + b"\n" + places)
    return _Index(Tree(packed), notes, reader)


def _key(file: ArchiveFile, kind: str) -> bytes:
    import time

    # Times in zip archives are local ones.
    zone = repr((time.tzname, time.timezone)) if kind == "zip" else ""
    return key_of(os.fstat(file.fd), kind, file.base, zone)


def _reader(
    file: ArchiveFile, kind: str, spool: Spool, cache_size: int, fast: bool, places: bytes = b""
) -> tuple[Reader, Native | None]:
    """What reads the decompressed data of a compressed tar archive, and the same if it is rapidgzip."""
    kind = kind.partition(".")[2]
    if fast and kind in ("gz", "bz2") and _has_rapidgzip():
        native = Native(file.pread, file.size, kind, places)
        return native, native
    points = points_of(kind, file.pread, file.size)
    if points is None:
        store = spool.file()
        return Spooled(lambda: Decoder(file.pread, 0, file.size, kind), store), None
    copies = _TAR_COPIES if kind == "gz" else 0
    return Stream(points, Chunks(cache_size), copies=copies), None


def _has_rapidgzip() -> bool:
    from importlib.util import find_spec

    return find_spec("rapidgzip") is not None


class Archive(Operations):
    """Serves a tree of members whose data lie in `file`, or come from `reader`, the decompressed archive."""

    immutable = True
    read_only = True
    announces_blocking = True
    interruptible = True
    shared = False
    """Served by one session after the other: `destroy` lets go of nothing then."""

    def __init__(
        self, tree: Tree, file: ArchiveFile, source: str, reader: Reader | None = None, *, cache_size: int = 64 << 20
    ) -> None:
        """Serve `tree`; `file` is closed at the end."""
        self.tree = tree
        self.notes: list[str] = []
        # Descriptors that must stay open where a process closes what it does not know.
        self.fds = [file.fd]
        if isinstance(reader, Spooled) and isinstance(reader.store, SpoolFile):
            self.fds.append(reader.store.fd)
        self.spool = Spool(["/var/tmp", "/tmp"])  # noqa: S108 - files there have no name
        self._file = file
        self._source = source
        self._reader = reader
        self._connection: Connection | None = None
        self._cache = Chunks(cache_size)
        self._streams: OrderedDict[int, Reader] = OrderedDict()  # zip: node -> what reads it, last used last
        self._starts: dict[int, int] = {}  # zip: node -> where its data begin
        self._lock = allocate_lock()
        self._waiting = Waiting()
        self.own(None, None, 0)
        self.last(None, None, None)

    def own(self, uid: int | None, gid: int | None, umask: int) -> None:
        """Show everything as that owner's (None: as it is stored), without the bits of `umask`."""
        self._uid, self._gid, self._mask = uid, gid, ~umask & 0xFFFF

    def last(self, entry: float | None, attr: float | None, negative: float | None) -> None:
        """Set lifetimes, in seconds; None: for ever."""
        self._entry_valid = _seconds(entry)
        self._attr_valid = _seconds(attr)
        missing = _seconds(negative)
        self._missing = ENTRY_OUT.pack(0, 0, missing, 0, *[0] * 18) if missing else None

    def init(self, connection: Connection) -> None:
        self._connection = connection
        for note in self.notes:
            connection.log_once(note)

    def destroy(self) -> None:
        if self.shared:
            return
        self._waiting.close()
        if isinstance(self._reader, Native):
            self._reader.close()
        self._file.close()

    def preload(self) -> None:
        """Load every module that reading may need: for servers that will find no files any more."""
        for kind in ("deflate", "bz2", "lzma", "zst"):
            try:
                maker(kind)
            except ArchiveError:
                continue  # who reads what needs it will be told
        from importlib import import_module

        native = ("rapidgzip", "io", "json") if isinstance(self._reader, Native) else ()
        for name in ("threading", "tempfile", "zlib", "fusewire.formats.zip", *native):
            import_module(name)

    # Names and attributes

    def _directory(self, nodeid: int) -> Node:
        node = self.tree.node(nodeid - 1)
        if node[0] & S_IFMT != S_IFDIR:
            raise OSError(errno.ENOTDIR, "not a directory", nodeid)
        return node

    def _attr(self, number: int, node: Node) -> tuple[int, ...]:
        mode, nlink, uid, gid, rdev, nanoseconds, _, _, _, extra, size, mtime, _ = node
        blocks = (size + 511) // 512
        atime = ctime = mtime & _U64
        a_nanoseconds = c_nanoseconds = nanoseconds
        if extra:
            times = self.tree.times(node)
            if times is not None:
                atime, a_nanoseconds, ctime, c_nanoseconds = times
                atime, ctime = atime & _U64, ctime & _U64
            sparse = self.tree.sparse(node)
            if sparse is not None:
                blocks = (sparse.stored + 511) // 512
        return (
            number + 1, size, blocks, atime, mtime & _U64, ctime, a_nanoseconds, nanoseconds, c_nanoseconds,
            mode & (S_IFMT | self._mask), nlink, uid if self._uid is None else self._uid,
            gid if self._gid is None else self._gid, rdev, 4096, 0,
        )  # fmt: skip

    def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
        number = self.tree.lookup(self._directory(parent), name)
        if number is None:
            return self._missing
        attr = self._attr(number, self.tree.node(number))
        return ENTRY_OUT.pack(number + 1, 0, self._entry_valid, self._attr_valid, 0, 0, *attr)

    def getattr(self, nodeid: int, flags: int, fh: int) -> bytes:
        return ATTR_OUT.pack(self._attr_valid, 0, *self._attr(nodeid - 1, self.tree.node(nodeid - 1)))

    def readlink(self, nodeid: int) -> bytes:
        node = self.tree.node(nodeid - 1)
        if node[0] & S_IFMT != S_IFLNK:
            raise OSError(errno.EINVAL, "not a symbolic link", nodeid)
        return self.tree.target(node)

    # Directories

    def _dots(self, nodeid: int, node: Node, offset: int) -> list[tuple[bytes, int, int]]:
        return [(b".", nodeid, 1), (b"..", node[6] + 1, 2)][offset:] if offset < 2 else []

    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        node = self._directory(nodeid)
        buffer = DirBuffer(size)
        for name, number, cookie in self._dots(nodeid, node, offset):
            if not buffer.add(name, number, cookie, _DT_DIR):
                return buffer.data
        for position, name, number in self.tree.entries(node, max(0, offset - _FIRST + 1)):
            if not buffer.add(name, number + 1, position + _FIRST, self.tree.node(number)[0] >> 12):
                break
        return buffer.data

    def readdirplus(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> Buffer:
        node = self._directory(nodeid)
        data = bytearray()
        for name, number, cookie in self._dots(nodeid, node, offset):
            # No lookup goes with these two: the kernel skips a node id of 0.
            if len(data) + 160 > size:
                return data
            data += bytes(128) + DIRENT.pack(number, cookie, len(name), _DT_DIR) + name.ljust(8, b"\0")
        pack, entry_valid, attr_valid = DIRENTPLUS.pack, self._entry_valid, self._attr_valid
        fixed, attr_of, node_of = DIRENTPLUS.size, self._attr, self.tree.node
        for position, name, number in self.tree.entries(node, max(0, offset - _FIRST + 1)):
            length = len(name)
            padding = -length & 7
            if len(data) + fixed + length + padding > size:
                break
            attr = attr_of(number, node_of(number))
            data += pack(
                number + 1, 0, entry_valid, attr_valid, 0, 0, *attr,
                number + 1, position + _FIRST, length, attr[9] >> 12,
            )  # fmt: skip
            data += name
            data += b"\0" * padding
        return data

    # Data

    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> Any:
        number = nodeid - 1
        node = self.tree.node(number)
        kind = node[0] & S_IFMT
        if kind != S_IFREG:
            raise OSError(errno.EISDIR if kind == S_IFDIR else errno.EINVAL, "not a regular file", nodeid)
        size = min(size, node[10] - offset)
        if size <= 0:
            return b""
        try:
            if node[9]:
                packed = self.tree.compressed(node)
                if packed is not None:
                    return self._read_zip(number, node, packed, offset, size)
                sparse = self.tree.sparse(node)
                if sparse is not None:
                    return self._read_sparse(node, sparse, offset, size)
            if self._reader is not None:
                return self._read_from(self._reader, node[12] + offset, size)
            return self._range(node[12] + offset, size)
        except OSError as error:
            raise self._told(error) from None

    def _range(self, offset: int, size: int) -> FileRange:
        """Give a range of the file as it is. Raises ArchiveError if the file has become too short for it."""
        if not self._file.pread(offset + size - 1, 1):  # the kernel would take that for the end of the member
            raise damaged("the file has become shorter since it was mounted")
        return FileRange(self._file.fd, self._file.base + offset, size, self._file)

    def _told(self, error: OSError) -> OSError:
        """Have an error said in the log, where there is more room than in an errno."""
        text = f"{self._source}: {error.strerror or error}"
        if self._connection is not None:
            self._connection.log_once(text)
        return OSError(error.errno, text)

    def _read_from(self, reader: Reader, offset: int, size: int) -> Sequence[Buffer] | Pending:
        if not reader.ready(offset, size):
            if self._connection is not None:
                self._connection.may_block(True)
            if not reader.approach(offset, size):
                return self._waiting.add(reader, offset, size, self._told)
        return reader.read(offset, size)

    def _read_sparse(self, node: Node, sparse: Pieces, offset: int, size: int) -> Sequence[Buffer] | Pending:
        """Put what is stored between the holes; it lies in the archive in one piece."""
        out = bytearray(size)
        plan: list[tuple[int, int]] = []  # where in `out`, length
        begin = length = 0
        for start, extent, place in sparse.since(offset):
            if start >= offset + size:
                break
            low, high = max(start, offset), min(start + extent, offset + size)
            if not plan:
                begin = node[12] + place + low - start
            plan.append((low - offset, high - low))
            length += high - low

        def fill(stored: Sequence[Buffer]) -> Sequence[Buffer]:
            data = memoryview(b"".join(stored))
            if len(data) != length:
                raise damaged("its data end early")
            at = 0
            for place, extent in plan:
                out[place : place + extent] = data[at : at + extent]
                at += extent
            return [out]

        reader = self._reader
        if reader is None or not length:
            return fill([self._file.pread(begin, length)])
        return self._read_from(Filled(reader, fill), begin, length)

    def _read_zip(
        self, number: int, node: Node, packed: tuple[int, int, int, int], offset: int, size: int
    ) -> Sequence[Buffer] | FileRange | Pending:
        from fusewire.formats import zip as zip_format

        method, flags, crc, stored = packed
        error = zip_format.refusal(method, flags)
        if error is not None:
            raise error
        start = self._starts.get(number)
        if start is None:
            start = zip_format.data_offset(self._file.pread, self._file.size, node[12], stored)
            if len(self._starts) >= 4096:
                self._starts.clear()
            self._starts[number] = start
        whole = node[10]
        if method == zip_format.STORED:
            if stored != whole:
                raise ArchiveError(errno.EIO, "damaged archive: a stored member has two sizes")
            return self._range(start + offset, size)
        if whole <= CHUNK:
            key = (number, 0)
            if key not in self._cache and self._connection is not None:
                self._connection.may_block(False)
            data = self._cache.load(
                key, lambda _: zip_format.unpack(self._file.pread, start, stored, whole, method, flags, crc)
            )
            return [memoryview(data)[offset : offset + size]]
        return self._read_from(self._member(number, start, stored, whole, method, flags, crc), offset, size)

    def _member(self, number: int, start: int, stored: int, whole: int, method: int, flags: int, crc: int) -> Reader:
        """What reads a large compressed member of a zip archive."""
        from fusewire.formats import zip as zip_format

        with self._lock:
            reader = self._streams.get(number)
            if reader is None:

                def begin() -> Decoder:
                    return zip_format.decoder(self._file.pread, start, stored, whole, method, flags)

                store = None
                if method != zip_format.DEFLATED and whole > _SPOOLED_FROM:
                    try:
                        store = self.spool.file()
                    except OSError:
                        pass  # no paths in a sandbox: reading backwards begins at the start then
                if store is not None:
                    reader = Spooled(begin, store, size=whole, crc=crc)
                else:
                    copies = _ZIP_COPIES if method == zip_format.DEFLATED else 0
                    reader = Stream([Point(0, begin)], self._cache, number, copies=copies, size=whole, crc=crc)
                self._streams[number] = reader
                while len(self._streams) > _STREAMS:
                    self._streams.popitem(last=False)
            else:
                self._streams.move_to_end(number)
            return reader

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        node = self.tree.node(nodeid - 1)
        size = node[10]
        if offset >= size or whence not in (_SEEK_DATA, _SEEK_HOLE):
            raise OSError(errno.ENXIO if whence in (_SEEK_DATA, _SEEK_HOLE) else errno.EINVAL, "nothing there", nodeid)
        sparse = self.tree.sparse(node) if node[9] else None
        if sparse is None:
            return offset if whence == _SEEK_DATA else size
        for start, length, _ in sparse.since(offset):
            if whence == _SEEK_DATA:
                return max(start, offset)
            if start > offset:
                break
            offset = start + length
        if whence == _SEEK_DATA:
            raise OSError(errno.ENXIO, "only a hole from there on", nodeid)
        return offset

    def statfs(self, nodeid: int) -> Statfs:
        return Statfs(blocks=(self._file.size + 4095) // 4096, files=self.tree.count)


class ArchiveWithXattrs(Archive):
    """For archives that hold extended attributes; the others let the kernel stop asking after the first question."""

    trusted = False

    def getxattr(self, caller: Caller, nodeid: int, name: bytes) -> bytes:
        value = self.tree.xattrs(self.tree.node(nodeid - 1)).get(name)
        if value is None:
            raise OSError(errno.ENODATA, "no such attribute", name)
        return value

    def listxattr(self, caller: Caller, nodeid: int) -> bytes:
        names = list(self.tree.xattrs(self.tree.node(nodeid - 1)))
        if not (self.trusted and caller.uid == 0):  # xattr(7): trusted.* is for CAP_SYS_ADMIN
            names = [name for name in names if not name.startswith(b"trusted.")]
        return b"".join(name + b"\0" for name in names)


def _seconds(timeout: float | None) -> int:
    return FOREVER if timeout is None else min(int(-(-timeout // 1)), FOREVER)
