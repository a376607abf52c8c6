"""Tar archives as a tree of members: ustar, GNU and pax, with everything that their headers can say of a file.

Layer `formats`: given a `read(offset, length) -> bytes` of the archive after decompression; does no other I/O. Headers
are parsed by the standard library's tarfile, which is told nothing but where to read: no member's data pass through it.
What it lets happen on hostile input is held off here (a position that does not grow, headers of gigabytes, exceptions
of all kinds).
"""

from __future__ import annotations

import errno
import tarfile

from fusewire.formats.archive_streams import ArchiveError, damaged
from fusewire.formats.archive_tree import S_IFDIR, S_IFLNK, S_IFREG, Builder, Member, rdev_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BLOCK = 512
_HEADER_MAX = 64 << 20  # of extended headers: names, attributes and maps of holes
_TYPES = {
    tarfile.DIRTYPE: S_IFDIR,
    b"D": S_IFDIR,  # GNU: a directory with the list of its names
    tarfile.SYMTYPE: S_IFLNK,
    tarfile.CHRTYPE: 0o020000,
    tarfile.BLKTYPE: 0o060000,
    tarfile.FIFOTYPE: 0o010000,
}
_LABELS = {b"V": "a volume's label", b"M": "a file that goes on from another volume", b"N": "an old GNU name list"}


def is_header(block: bytes) -> bool:
    """Tell whether a block is a tar header, by its checksum: the sum of all bytes, with blanks for its own."""
    if len(block) < BLOCK or not block[0]:
        return False
    digits = block[148:156].replace(b"\0", b" ").split()
    try:
        stored = int(digits[0], 8) if digits else -1
    except ValueError:
        return False
    unsigned = 256 + sum(block[:148]) + sum(block[156:BLOCK])
    if stored == unsigned:
        return True
    return stored == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:BLOCK])  # of signed bytes


class _File:
    """What tarfile reads headers from."""

    __slots__ = ("_position", "_read")

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _HEADER_MAX or self._position < 0:
            raise damaged(f"a header at byte {self._position} has an impossible length")
        data = self._read(self._position, length)
        self._position += len(data)
        return data


def index(read: Callable[[int, int], bytes], builder: Builder, step: Callable[[int], None] | None = None) -> None:
    """Put all members into `builder`; `Member.data` is the offset in the archive. `step` hears how far it has come.

    Raises ArchiveError where the archive is cut off or damaged: half of a tree is never shown as if it were whole.
    """
    position = 0
    try:
        # Any: the list of members and the map of holes are not in what type checkers know of tarfile.
        archive: Any = tarfile.TarFile(fileobj=_File(read), encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        if archive.firstmember is None and archive.offset:
            raise damaged(f"a header before byte {archive.offset} is impossible")
        while (info := archive.next()) is not None:
            archive.members.clear()  # it would keep them all, at 1 KB each
            if info.issparse() and "size" in info.pax_headers:
                # tarfile goes on behind as many bytes as the file has, holes and all.
                stored = sum(length for _, length in info.sparse or ())
                archive.offset = info.offset_data + (stored + BLOCK - 1) // BLOCK * BLOCK
            if archive.offset <= position:
                raise damaged(f"a header near byte {position} has an impossible length")
            position = archive.offset
            _add(info, builder)
            if step is not None:
                step(position)
    except tarfile.TarError as error:
        raise damaged(f"{error}, at byte {position}; is the file complete?") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"a header that tarfile cannot read ({error}), near byte {position}") from None
    # tarfile takes an impossible size in an extended header for the end, once it has gone past the member.
    rest = read(position, BLOCK)
    if archive.offset != position or rest.strip(b"\0"):
        raise damaged(f"what is at byte {position} is no tar header")


def _add(info: Any, builder: Builder) -> None:
    name = _bytes(info.name)
    kind = info.type
    if kind in _LABELS:
        builder.skip(_LABELS[kind], name)
        return
    if kind == tarfile.LNKTYPE:
        builder.link(name, _bytes(info.linkname))
        return
    pax = info.pax_headers
    member = Member(_TYPES.get(kind, S_IFREG) | info.mode & 0o7777, info.size, _time(pax.get("mtime"), info.mtime))
    member.uid, member.gid = info.uid, info.gid
    member.data = info.offset_data
    if kind == tarfile.SYMTYPE:
        member.target = _bytes(info.linkname)
    elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        member.rdev = rdev_of(info.devmajor, info.devminor)
    if info.sparse is not None:
        member.sparse = _map(info.sparse, info.size)
    if pax:
        if "atime" in pax:
            member.atime = _time(pax["atime"], 0)
        if "ctime" in pax:
            member.ctime = _time(pax["ctime"], 0)
        for key, value in pax.items():
            if key.startswith("SCHILY.xattr."):
                # GNU tar writes `=` and `%` in names as URLs do.
                word = _bytes(key[13:]).replace(b"%3D", b"=").replace(b"%25", b"%")
                _xattr(member, word, _bytes(value))
            elif key.startswith("LIBARCHIVE.xattr."):
                _libarchive_xattr(member, key[17:], value)
            elif key == "RHT.security.selinux":
                _xattr(member, b"security.selinux", _bytes(value).rstrip(b"\0") + b"\0")
    builder.add(name, member)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _xattr(member: Member, name: bytes, value: bytes) -> None:
    """Keep an attribute that a file can have, xattr(7)."""
    if 0 < len(name) <= 255 and b"\0" not in name and len(value) <= 65536:
        member.xattrs[name] = value


def _libarchive_xattr(member: Member, name: str, value: str) -> None:
    """Names as in URLs, values in base64 (tar(5) of libarchive); where both forms are there they say the same."""
    import binascii
    from urllib.parse import unquote_to_bytes

    word = unquote_to_bytes(_bytes(name))
    if word not in member.xattrs:
        data = _bytes(value)
        try:
            _xattr(member, word, binascii.a2b_base64(data + b"=" * (-len(data) % 4)))
        except binascii.Error:
            return


def _map(sparse: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What is stored of a file with holes, in order. Raises ArchiveError if it overlaps or does not fit."""
    end = 0
    found = []
    for offset, length in sparse:
        if not length:
            continue  # GNU tar ends the map with the size, or fills up a block
        if offset < end or length < 0 or offset + length > size:
            raise damaged("the map of a sparse file is impossible")
        end = offset + length
        found.append((offset, length))
    return found


def _time(text: str | None, seconds: float) -> tuple[int, int]:
    """Seconds and nanoseconds; from a pax header's decimal digits, which a float could not hold, if it has any."""
    if text is not None:
        whole, _, fraction = text.partition(".")
        try:
            number = int(whole or "0")
            nanoseconds = int(fraction[:9].ljust(9, "0")) if fraction else 0
        except ValueError:
            number = nanoseconds = 0
        if nanoseconds and whole.startswith("-"):
            number, nanoseconds = number - 1, 1_000_000_000 - nanoseconds
        if nanoseconds >= 0:
            return number, nanoseconds
    try:
        return int(seconds // 1), 0
    except (ValueError, OverflowError):
        return 0, 0


def check(read: Callable[[int, int], bytes]) -> None:
    """Raise ArchiveError (EINVAL) unless the data begin as a tar archive does."""
    head = read(0, 2 * BLOCK)
    if not is_header(head) and (head.strip(b"\0") or len(head) < 2 * BLOCK):
        raise ArchiveError(errno.EINVAL, "its data are no tar archive; decompress it to get at them")
