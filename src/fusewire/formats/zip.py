"""Zip archives as a tree of members, and how a member's data are read; PKWARE's APPNOTE.TXT, Info-ZIP's extra fields.

Layer `formats`: given a `pread(offset, size) -> bytes`; does no other I/O. Only the central directory counts. It is
parsed here rather than by zipfile, which keeps 1 KB for each member and raises whatever comes to it. Everything read is
untrusted; no member gives more bytes than the directory says it has.
"""

from __future__ import annotations

import errno
import time
from struct import Struct
from struct import error as StructError  # noqa: N812

from fusewire.formats.archive_streams import CHUNK, LZMA_MEMORY, ArchiveError, Decoder, damaged
from fusewire.formats.archive_tree import S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, TARGET_MAX, TYPES, Builder, Member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Pread = Callable[[int, int], bytes]

LOCAL = b"PK\x03\x04"
EMPTY = b"PK\x05\x06"
_END = Struct("<4s4H2LH")  # signature, disk, first disk, entries here, entries, size, offset, comment's length
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")
_CENTRAL = Struct("<4sBBHHHHHLLLHHHHHLL")
_LOCAL = Struct("<4s5H3L2H")
_DIRECTORY_MAX = 4 << 30

STORED, DEFLATED = 0, 8
# Method -> kind of `archive_streams.maker`. lzma has a header of its own before the stream.
KINDS = {8: "deflate", 12: "bz2", 14: "lzma", 93: "zst", 20: "zst", 95: "xz"}
_NAMES = {1: "shrink", 6: "implode", 9: "deflate64", 10: "PKWARE's implode", 98: "PPMd", 96: "JPEG", 97: "WavPack"}
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_AES = 99
_LZMA_MARKED = 0x2
_UTF8 = 0x800
_UNIX = (3, 19)  # "version made by": Unix, and Darwin
_BACKSLASHED = (0, 10, 11, 14)  # FAT, NTFS, MVS, VFAT: some of their writers use `\`


def find_directory(pread: Pread, size: int) -> tuple[int, int, int, int] | None:
    """(offset, length, entries) of the central directory, and what all offsets have to be shifted by; None: no zip.

    Raises ArchiveError for an archive in several parts.
    """
    length = min(size, _END.size + 0xFFFF)
    tail = pread(size - length, length)
    place = len(tail)
    while (place := tail.rfind(EMPTY, 0, place)) >= 0:
        if place + _END.size <= len(tail):
            _, disk, first_disk, _, count, extent, offset, comment = _END.unpack_from(tail, place)
            if place + _END.size + comment <= len(tail):
                break
    else:
        return None
    end = size - length + place
    if 0xFFFF in (disk, count) or 0xFFFFFFFF in (extent, offset):
        locator = pread(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
        if locator[:4] == b"PK\x06\x07":
            # The record lies right before its locator, unless it has further fields: then at the offset given.
            for at in (end - _LOCATOR.size - _END64.size, _LOCATOR.unpack(locator)[2]):
                record = pread(at, _END64.size) if 0 <= at < size else b""
                if record[:4] == b"PK\x06\x06" and len(record) == _END64.size:
                    _, _, _, _, disk, first_disk, _, count, extent, offset = _END64.unpack(record)
                    end = at
                    break
    if disk or first_disk:
        raise ArchiveError(errno.EINVAL, "one part of a zip archive in several; join them with `zip -s 0 IN --out OUT`")
    shift = end - extent - offset  # a program or anything else may lie before the archive
    if extent > _DIRECTORY_MAX or shift < 0 or count * _CENTRAL.size > extent:
        raise damaged("the zip file's central directory is impossible")
    return offset + shift, extent, count, shift


def index(pread: Pread, size: int, builder: Builder, step: Callable[[int], None] | None = None) -> None:
    """Put all members into `builder`; `Member.data` is where the local header is. `step` hears how far it has come.

    Raises ArchiveError where the directory is damaged.
    """
    found = find_directory(pread, size)
    if found is None:
        raise damaged("no central directory at the end of the zip file; is the file complete?")
    start, extent, count, shift = found
    place = 0
    window, base = b"", 0
    for number in range(count):
        if place + _CENTRAL.size + 3 * 0xFFFF > base + len(window) and base + len(window) < extent:
            base = place
            window = pread(start + place, min(1 << 20, extent - place))
        at = place - base
        try:
            fields = _CENTRAL.unpack_from(window, at)
        except StructError:
            raise damaged(f"the zip file's directory ends after {number} of {count} members") from None
        name_length, extra_length, comment_length = fields[11:14]
        if fields[0] != b"PK\x01\x02":
            raise damaged(f"member {number} of the zip file's directory is none")
        at += _CENTRAL.size
        name = window[at : at + name_length]
        extra = window[at + name_length : at + name_length + extra_length]
        place += _CENTRAL.size + name_length + extra_length + comment_length
        if place > extent:
            raise damaged(f"the zip file's directory ends after {number} of {count} members")
        _add(pread, size, fields, name, extra, shift, builder)
        if step is not None:
            step(start + place)


def _add(
    pread: Pread, size: int, fields: tuple[int, ...], name: bytes, extra: bytes, shift: int, builder: Builder
) -> None:
    _, _, system, _, flags, method, clock, date, crc, packed, unpacked, _, _, _, _, _, attributes, offset = fields
    member = Member(0, unpacked, _dos_time(date, clock))
    member.data = offset
    path = _extras(member, extra, name, packed, unpacked, offset)
    packed = member.packed[3] if member.packed else packed
    if path is None:
        path = name if flags & _UTF8 or (system in _UNIX and _is_utf8(name)) else _from_cp437(name)
    if system in _BACKSLASHED and b"/" not in path:
        path = path.replace(b"\\", b"/")
    mode = attributes >> 16 if system in _UNIX or attributes >> 16 & S_IFMT in TYPES else 0
    directory = path.endswith(b"/") or (not mode & S_IFMT and bool(attributes & 0x10))
    if not mode & 0o7777 and not mode & S_IFMT:
        mode = 0o755 if directory else 0o444 if attributes & 1 else 0o644
    kind = S_IFDIR if directory else mode & S_IFMT if mode & S_IFMT in TYPES - {S_IFDIR} else S_IFREG
    member.mode = kind | mode & 0o7777
    member.data += shift
    member.packed = (method, flags, crc, packed)
    if kind == S_IFLNK:
        if not 0 < member.size <= TARGET_MAX:
            builder.skip("a symbolic link that is empty, too long or has a NUL", path)
            return
        try:
            member.target = _whole(pread, size, member)
        except OSError:
            builder.skip("a symbolic link that cannot be read", path)
            return
        member.packed = None
    elif kind != S_IFREG:
        member.packed = None
    builder.add(path, member)


def _extras(member: Member, extra: bytes, name: bytes, packed: int, unpacked: int, offset: int) -> bytes | None:
    """Take from the extra fields what is in them: 64-bit sizes, times, owners; give the name if it is there anew."""
    path = None
    place = 0
    while place + 4 <= len(extra):
        kind = int.from_bytes(extra[place : place + 2], "little")
        length = int.from_bytes(extra[place + 2 : place + 4], "little")
        data = extra[place + 4 : place + 4 + length]
        place += 4 + length
        if kind == 0x0001:  # Zip64: the fields that are all ones in the header, in this order
            at = 0
            if unpacked == 0xFFFFFFFF and len(data) >= at + 8:
                member.size = int.from_bytes(data[at : at + 8], "little")
                at += 8
            if packed == 0xFFFFFFFF and len(data) >= at + 8:
                member.packed = (0, 0, 0, int.from_bytes(data[at : at + 8], "little"))
                at += 8
            if offset == 0xFFFFFFFF and len(data) >= at + 8:
                member.data = int.from_bytes(data[at : at + 8], "little")
        elif kind == 0x5455 and len(data) >= 5 and data[0] & 1:  # extended timestamp: UTC
            member.mtime = (int.from_bytes(data[1:5], "little", signed=True), 0)
        elif kind == 0x000A and len(data) >= 32 and data[4:8] == b"\1\0\x18\0":  # NTFS: 100 ns since 1601
            ticks = int.from_bytes(data[8:16], "little")
            if ticks:
                seconds, rest = divmod(ticks - 116_444_736_000_000_000, 10_000_000)
                member.mtime = (seconds, rest * 100)
        elif kind == 0x5855 and len(data) >= 8:  # Info-ZIP's old form: atime, mtime
            member.mtime = (int.from_bytes(data[4:8], "little", signed=True), 0)
        elif kind == 0x7875 and len(data) >= 3 and data[0] == 1:  # Info-ZIP: user and group ids of any size
            width = data[1]
            group = data[2 + width : 3 + width]
            member.uid = int.from_bytes(data[2 : 2 + width], "little")
            member.gid = int.from_bytes(data[3 + width : 3 + width + group[0]], "little") if group else 0
        elif kind == 0x7075 and len(data) > 5 and data[0] == 1:  # the name in UTF-8, with the CRC of the other one
            import zlib

            if int.from_bytes(data[1:5], "little") == zlib.crc32(name):
                path = data[5:]
    return path


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _from_cp437(name: bytes) -> bytes:
    """The name in UTF-8; APPNOTE appendix D: without flag 11 names are in the IBM PC's code page."""
    return name if name.isascii() else name.decode("cp437").encode()


def _dos_time(date: int, clock: int) -> tuple[int, int]:
    """Seconds of an MS-DOS date and time, which is the local time of who reads it; 0 if it is none."""
    day = (1980 + (date >> 9), date >> 5 & 15, date & 31, clock >> 11, clock >> 5 & 63, (clock & 31) * 2, 0, 0, -1)
    if not (1 <= day[1] <= 12 and day[2] and day[3] < 24 and day[4] < 60 and day[5] < 60):
        return 0, 0
    try:
        return int(time.mktime(day)), 0
    except (OverflowError, ValueError):
        return 0, 0


# -- Data


def refusal(method: int, flags: int) -> OSError | None:
    """Why a member's data cannot be given, if they cannot."""
    if flags & _ENCRYPTED or method == _AES:
        return ArchiveError(errno.EACCES, "it is encrypted; unpack it with 7z or unzip, and its password")
    if method != STORED and method not in KINDS:
        name = _NAMES.get(method, f"method {method}")
        return ArchiveError(errno.EOPNOTSUPP, f"it is packed with {name}, which is not known here; 7z may unpack it")
    return None


def data_offset(pread: Pread, size: int, offset: int, packed: int) -> int:
    """Where a member's data begin: behind its local header at `offset`. Raises ArchiveError if that is none."""
    header = pread(offset, _LOCAL.size) if offset < size else b""
    if len(header) < _LOCAL.size or header[:4] != LOCAL:
        raise damaged(f"there is no member at byte {offset} of the zip file")
    fields = _LOCAL.unpack(header)
    start: int = offset + _LOCAL.size + fields[9] + fields[10]
    if start + packed > size:
        raise damaged(f"the data of the member at byte {offset} of the zip file would end behind it")
    return start


def decoder(pread: Pread, start: int, packed: int, unpacked: int, method: int, flags: int) -> Decoder:
    """What decompresses a member whose data lie at `start`. Raises ArchiveError."""
    kind = KINDS[method]
    end = start + packed
    prefix = b""
    if kind == "lzma":
        # 2 bytes of version, 2 of the properties' length, then those; .lzma files have them and the size instead.
        head = pread(start, min(9, packed))
        if len(head) < 9 or head[2:4] != b"\5\0":
            raise damaged("the lzma properties are impossible")
        if int.from_bytes(head[5:9], "little") > LZMA_MEMORY:
            raise damaged("the lzma dictionary is too large")
        length = (1 << 64) - 1 if flags & _LZMA_MARKED else unpacked
        prefix = head[4:9] + length.to_bytes(8, "little")
        start += 9
    return Decoder(pread, start, end, kind, prefix=prefix, joined=kind == "zst")


def _whole(pread: Pread, size: int, member: Member) -> bytes:
    """All data of a small member."""
    assert member.packed is not None
    method, flags, crc, packed = member.packed
    error = refusal(method, flags)
    if error is not None:
        raise error
    start = data_offset(pread, size, member.data, packed)
    return unpack(pread, start, packed, member.size, method, flags, crc)


def unpack(pread: Pread, start: int, packed: int, unpacked: int, method: int, flags: int, crc: int) -> bytes:
    """Give all data of a member that has at most `CHUNK` bytes. Raises ArchiveError."""
    import zlib

    assert unpacked <= CHUNK
    if method == STORED:
        data = pread(start, min(packed, unpacked))
    else:
        source = decoder(pread, start, packed, unpacked, method, flags)
        parts = []
        left = unpacked
        while left and (part := source.more(left)):
            parts.append(part)
            left -= len(part)
        data = b"".join(parts)
    if len(data) != unpacked:
        raise damaged(f"its data end at {len(data)} instead of {unpacked} bytes")
    if zlib.crc32(data) != crc:
        raise damaged("its checksum is wrong")
    return data
