"""An archive's members as a tree of directories: built once, packed into one block of bytes, read from there.

Layer `formats`: knows neither a kind of archive nor FUSE, and does no I/O. `Builder` takes members in the archive's
order, as an extraction would; `Tree` answers from the packed form, which is also what lies in the cache file. A million
members take 100 MB (72 bytes each, 12 for a name and the name itself) while mounted, and some 400 MB while the index is
being built.

What a path in an archive means here: nothing leads above the root. A leading `/` and `.` count for nothing; `..` goes
to the parent, and at the root stays there. What is not there is made: directories of mode 0755. A later member takes a
name from an earlier one, but a directory stays one as long as it holds something. A parent that is a symbolic link is
followed within the archive, as it would be when extracting below a root directory. Names that no directory can hold
(over 255 bytes, NUL inside) are left out, and counted.
"""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_right
from itertools import accumulate, pairwise
from struct import Struct
from struct import error as StructError  # noqa: N812

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

S_IFMT = 0o170000
S_IFDIR, S_IFREG, S_IFLNK = 0o040000, 0o100000, 0o120000
TYPES = frozenset({0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000})

NAME_MAX = 255
TARGET_MAX = 4095  # a link's target: PATH_MAX without its NUL
_PATH_MAX = 1 << 16  # of a member's path: longer ones only make the index slow
_SIZE_MAX = (1 << 63) - 1
_LINKS_MAX = 40  # symbolic links on the way to a member, one after another or in each other, path_resolution(7)
_ROUNDS = 64  # of looking for hard links to hard links that come later
_IMPLIED = 1 << 18  # directories that are only parts of names: two bytes of a name make one of 600 bytes of memory
_MOST = 1 << 31  # members, and bytes of names or of extras: more than that do not fit the packed form

# mode, nlink, uid, gid, rdev, nanoseconds of mtime; parent, first entry, count of entries; extras; size, mtime, data.
NODE = Struct("<6I3IIQqQ4x")
HEADER = Struct("<8sQQQQQ")  # magic, flags, nodes, entries, bytes of names, bytes of extras
MAGIC = b"FWtree2\n"
HAS_XATTRS = 1

# Extras: (tag, length, value) one after another, a tag of 0 at the end.
END, TARGET, SPARSE, XATTR, TIMES, PACKED = range(6)
_EXTRA = Struct("<BI")
_TIMES = Struct("<qIqI")  # atime, its nanoseconds, ctime, its nanoseconds
_PACKED = Struct("<HHIQ")  # zip: method, flags, CRC-32, compressed size

Node = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]


class TreeError(OSError):
    """The packed form is not one, or would have to be larger than it can be."""


class Member:
    """What an archive says of one member beside its path. Times are seconds and nanoseconds; `mode` has the type."""

    __slots__ = (
        *("atime", "ctime", "data", "gid", "mode", "mtime", "packed"),
        *("rdev", "size", "sparse", "target", "uid", "xattrs"),
    )

    def __init__(self, mode: int, size: int = 0, mtime: tuple[int, int] = (0, 0)) -> None:
        self.mode = mode
        self.size = size
        self.mtime = mtime
        self.atime: tuple[int, int] | None = None
        self.ctime: tuple[int, int] | None = None
        self.uid = 0
        self.gid = 0
        self.rdev = 0
        self.data = 0  # where its data begin: what that means is the format's own
        self.target = b""
        self.sparse: Sequence[tuple[int, int]] | None = None  # (offset, length) of what is stored, ascending
        self.xattrs: dict[bytes, bytes] = {}
        self.packed: tuple[int, int, int, int] | None = None


def rdev_of(major: int, minor: int) -> int:
    """The device number in the kernel's 32-bit form, new_encode_dev of <linux/kdev_t.h>; 0 if it has none."""
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        return 0
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def clamp_id(number: int) -> int:
    """A user or group id as it is; nobody's (65534) if no file can have it."""
    return number if 0 <= number < 0xFFFFFFFF else 65534


class Builder:
    """Takes the members of an archive one by one, in its order. `skipped`: reason -> count and first name."""

    def __init__(self, mtime: int = 0) -> None:
        """Begin with an empty root directory that has that time."""
        self._nodes = bytearray()
        self._names: list[dict[bytes, int] | None] = []  # of each node that is a directory: name -> node
        self._extras = bytearray(1)  # offset 0: none
        self._known: dict[bytes, int] = {}
        self._flags = 0
        self._links: list[tuple[bytes, bytes]] = []
        self._directory_names: dict[int, bytes] = {}
        self.skipped: dict[str, tuple[int, bytes]] = {}
        self._mtime = mtime
        self._implied = 0
        self._add_node(Member(S_IFDIR | 0o755, mtime=(mtime, 0)), 0, b"")

    def skip(self, reason: str, name: bytes) -> None:
        """Note that a member is left out."""
        count, first = self.skipped.get(reason, (0, name))
        self.skipped[reason] = (count + 1, first)

    # Nodes

    def _add_node(self, member: Member, parent: int, name: bytes) -> int:
        number = len(self._names)
        if number >= _MOST:
            raise TreeError(errno.EFBIG, "the archive has more members than can be indexed (2^31)")
        directory = member.mode & S_IFMT == S_IFDIR
        self._names.append({} if directory else None)
        if directory:
            self._directory_names[number] = name
        self._nodes += self._pack(member, parent, 1)
        return number

    def _pack(self, member: Member, parent: int, nlink: int) -> bytes:
        mode = member.mode
        size = len(member.target) if mode & S_IFMT == S_IFLNK else member.size if mode & S_IFMT == S_IFREG else 0
        seconds, nanoseconds = member.mtime
        return NODE.pack(
            mode, nlink, clamp_id(member.uid), clamp_id(member.gid), member.rdev, nanoseconds,
            parent, 0, 0, self._extra(member), size, max(-1 << 63, min(seconds, (1 << 63) - 1)), member.data,
        )  # fmt: skip

    def _extra(self, member: Member) -> int:
        out = b""
        if member.target:
            out += _EXTRA.pack(TARGET, len(member.target)) + member.target
        if member.sparse is not None:
            flat = array("Q")
            stored = 0
            for offset, length in member.sparse:
                flat.extend((offset, length, stored))
                stored += length
            out += _EXTRA.pack(SPARSE, 8 * len(flat)) + flat.tobytes()
        for name, value in member.xattrs.items():
            self._flags |= HAS_XATTRS
            out += _EXTRA.pack(XATTR, len(name) + 1 + len(value)) + name + b"\0" + value
        if member.atime is not None or member.ctime is not None:
            times = _TIMES.pack(*(member.atime or member.mtime), *(member.ctime or member.mtime))
            out += _EXTRA.pack(TIMES, len(times)) + times
        if member.packed is not None:
            out += _EXTRA.pack(PACKED, _PACKED.size) + _PACKED.pack(*member.packed)
        if not out:
            return 0
        out += _EXTRA.pack(END, 0)
        place = self._known.get(out)
        if place is None:
            place = len(self._extras)
            if place + len(out) > _MOST:
                raise TreeError(errno.EFBIG, "the archive has more attributes than can be indexed (2 GiB)")
            self._extras += out
            if member.xattrs and len(out) < 4096 and len(self._known) < 4096:  # many files have the same
                self._known[out] = place
        return place

    def _node(self, number: int) -> Node:
        return NODE.unpack_from(self._nodes, number * NODE.size)

    # Paths

    def _walk(self, words: list[bytes], make: bool, followed: list[int] | None = None) -> int | None:
        """The directory at a path from the root; what is missing is made. None: something else is in the way.

        `followed`: the symbolic links up to here, also those in links that are done with: links to paths of links would
        otherwise take time without end.
        """
        here = 0
        followed = [] if followed is None else followed
        for word in words:
            if word in (b"", b"."):
                continue
            if word == b"..":
                here = self._node(here)[6]
                continue
            names = self._names[here]
            assert names is not None
            found = names.get(word)
            if found is None:
                if not make or not _is_name(word):
                    return None
                self._implied += 1
                if self._implied > _IMPLIED + len(self._names) // 2:
                    text = "its names have too many directories that are no members themselves; unpack it instead"
                    raise TreeError(errno.EFBIG, text)
                found = names[word] = self._add_node(Member(S_IFDIR | 0o755, mtime=(self._mtime, 0)), here, word)
            elif self._names[found] is None:
                target = self._target(found)
                if target is None or len(followed) >= _LINKS_MAX:
                    return None
                followed.append(found)
                start = [] if target.startswith(b"/") else self._path(here)
                inner = self._walk(start + target.split(b"/"), False, followed)
                if inner is None:
                    return None
                found = inner
            here = found
        return here

    def _path(self, number: int) -> list[bytes]:
        """The names that lead to a directory."""
        words: list[bytes] = []
        while number:
            words.append(self._directory_names[number])
            number = self._node(number)[6]
        words.reverse()
        return words

    def _target(self, number: int) -> bytes | None:
        """What a symbolic link holds; None for anything else."""
        node = self._node(number)
        if node[0] & S_IFMT != S_IFLNK:
            return None
        _, length = _EXTRA.unpack_from(self._extras, node[9])
        return bytes(self._extras[node[9] + _EXTRA.size : node[9] + _EXTRA.size + length])

    def _place(self, path: bytes) -> tuple[int, bytes] | None:
        """Directory and name of a member; ("", root) for the root. None if it cannot be put anywhere."""
        words = path.split(b"/") if len(path) <= _PATH_MAX else [b"\0"]
        while words and words[-1] in (b"", b"."):
            words.pop()
        if words and words[-1] == b"..":
            self.skip("a name that ends in `..`", path)
            return None
        name = words.pop() if words else b""
        if name and not _is_name(name):
            self.skip("a name that is too long or has a NUL", path)
            return None
        parent = self._walk(words, True)
        if parent is None:
            self.skip("a parent that is no directory, or a name that cannot be", path)
            return None
        return parent, name

    def add(self, path: bytes, member: Member) -> None:
        """Add a member, or let it replace what had its path."""
        kind = member.mode & S_IFMT
        if kind == S_IFLNK and not (0 < len(member.target) <= TARGET_MAX and 0 not in member.target):
            self.skip("a symbolic link that is empty, too long or has a NUL", path)
            return
        if kind not in TYPES:
            self.skip("a kind of file that is not known", path)
            return
        if not (0 <= member.size <= _SIZE_MAX and 0 <= member.data <= _SIZE_MAX):
            self.skip("an impossible size", path)
            return
        place = self._place(path)
        if place is None:
            return
        parent, name = place
        names = self._names[parent]
        assert names is not None
        found = names.get(name) if name else 0
        if kind == S_IFDIR and found is not None and self._names[found] is not None:
            # Known already, by an earlier member or by what is in it.
            node = self._node(found)
            NODE.pack_into(self._nodes, found * NODE.size, *NODE.unpack(self._pack(member, node[6], 1)))
        elif not name or (found is not None and self._names[found]):
            self.skip("a directory's name, for something else", path)
        else:
            if found is not None and kind == S_IFDIR and self._target(found) is not None:
                inner = self._walk([*self._path(parent), name], False)
                if inner is not None:
                    return  # `lib -> usr/lib`, then `lib/`: what comes goes to usr/lib
            if found is not None:
                del names[name]  # its place in the listing is the new one's
            names[name] = self._add_node(member, parent, name)

    def link(self, path: bytes, target: bytes) -> None:
        """Give the member that is at `target` another path, now or, where it comes later, when everything is there."""
        if not self._link(path, target):
            self._links.append((path, target))

    def _link(self, path: bytes, target: bytes) -> bool:
        words = target.split(b"/")
        while words and words[-1] in (b"", b"."):
            words.pop()
        last = words.pop() if words else b""
        parent = self._walk(words, False)
        if parent is None:
            return False
        names = self._names[parent]
        assert names is not None
        number = names.get(last)
        if number is None or self._names[number] is not None:
            return False
        place = self._place(path)
        if place is None or not place[1]:
            return True
        names = self._names[place[0]]
        assert names is not None
        found = names.get(place[1])
        if found is not None and self._names[found]:
            self.skip("a directory's name, for something else", path)
        elif found != number:
            names.pop(place[1], None)
            names[place[1]] = number
        return True

    # The packed form

    def pack(self) -> bytes:
        """Give everything in the form that `Tree` reads."""
        pending = self._links
        for _ in range(_ROUNDS):  # links to links, in any order; what is left points nowhere or in circles
            left = [(path, target) for path, target in pending if not self._link(path, target)]
            if len(left) == len(pending):
                break
            pending = left[::-1]  # whole chains in one round, however they lie
        for path, _ in pending:
            self.skip("a hard link to what is not there", path)
        # Replaced members leave their numbers behind: only what can be reached from the root is written.
        order = [0]
        number_of = {0: 0}
        entries = array("I")
        lengths = array("B")
        names = bytearray()
        rows: list[tuple[int, int]] = []
        links = array("I", [0])
        inner = array("I", [0])  # directories in a directory
        by_name = array("I")
        position = 0
        while position < len(order):
            children = self._names[order[position]]
            if children is None:
                rows.append((0, 0))
            else:
                first = len(entries)
                rows.append((first, len(children)))
                for name, child in children.items():
                    number = number_of.get(child)
                    if number is None:
                        number = number_of[child] = len(order)
                        order.append(child)
                        links.append(0)
                        inner.append(0)
                    links[number] += 1
                    if self._names[child] is not None:
                        inner[position] += 1
                    entries.append(number)
                    lengths.append(len(name))
                    names += name
                keys = list(children)
                by_name.extend(sorted(range(len(keys)), key=keys.__getitem__))
                self._names[order[position]] = None if position else children
                children.clear()
            position += 1
        if len(names) > _MOST:
            raise TreeError(errno.EFBIG, "the archive has more names than can be indexed (2 GiB)")
        nodes = bytearray()
        for number, old in enumerate(order):
            mode, _, uid, gid, rdev, nanoseconds, parent, _, _, extra, size, mtime, data = self._node(old)
            directory = mode & S_IFMT == S_IFDIR
            nlink = 2 + inner[number] if directory else links[number]
            parent = number_of[parent] if directory else 0
            nodes += NODE.pack(
                mode, nlink, uid, gid, rdev, nanoseconds, parent, *rows[number], extra, size, mtime, data
            )  # fmt: skip
        self._nodes.clear()
        starts = array("I", accumulate(lengths, initial=0))
        head = HEADER.pack(MAGIC, self._flags, len(order), len(entries), len(names), len(self._extras))
        parts = [entries, by_name, starts]
        if array("I").itemsize != 4:
            raise TreeError(errno.ENOTSUP, "an unsigned int of 4 bytes is needed")
        return b"".join([head, nodes, *(part.tobytes() for part in parts), names, self._extras])


def _is_name(word: bytes) -> bool:
    return 0 < len(word) <= NAME_MAX and 0 not in word and word not in (b".", b"..")


class Pieces:
    """What is stored of a sparse file, in order: (offset in the file, length, offset in all that is stored).

    There may be a million of them: nothing here takes longer for that.
    """

    __slots__ = ("_flat",)

    def __init__(self, flat: memoryview) -> None:
        self._flat = flat

    def __len__(self) -> int:
        return len(self._flat) // 3

    @property
    def stored(self) -> int:
        """Bytes of all of them."""
        return self._flat[-2] + self._flat[-1] if len(self._flat) else 0

    def since(self, offset: int) -> Iterator[tuple[int, int, int]]:
        """Give those that end behind `offset` of the file."""
        flat = self._flat
        number = bisect_right(range(len(self)), offset, key=lambda number: flat[3 * number])
        if number and flat[3 * number - 3] + flat[3 * number - 2] > offset:
            number -= 1
        for at in range(3 * number, len(flat), 3):
            yield flat[at], flat[at + 1], flat[at + 2]


class Tree:
    """The packed form of a tree. Nodes are numbered from 0, the root; entries of a directory are in archive order."""

    __slots__ = ("_by_name", "_entries", "_extras", "_names", "_nodes", "_starts", "count", "has_xattrs", "packed")

    def __init__(self, packed: bytes) -> None:
        """Read what `Builder.pack` gave. Raises TreeError if it is something else."""
        try:
            magic, flags, nodes, entries, names, extras = HEADER.unpack_from(packed)
        except StructError:
            raise TreeError(errno.EINVAL, "not an index of an archive") from None
        sizes = (HEADER.size, nodes * NODE.size, entries * 4, entries * 4, entries * 4 + 4, names, extras)
        if magic != MAGIC or sum(sizes) != len(packed) or not nodes:
            raise TreeError(errno.EINVAL, "not an index of an archive")
        view = memoryview(packed)
        ends = list(accumulate(sizes))
        pieces = [view[start:end] for start, end in pairwise(ends)]
        self.packed = packed
        self.count = nodes
        self.has_xattrs = bool(flags & HAS_XATTRS)
        self._nodes = pieces[0]
        self._entries = pieces[1].cast("I")
        self._by_name = pieces[2].cast("I")
        self._starts = pieces[3].cast("I")
        self._names = pieces[4]
        self._extras = pieces[5]

    def node(self, number: int) -> Node:
        """Give a node's fields: those of `NODE`. Raises OSError(ESTALE) for a number that is none."""
        if not 0 <= number < self.count:
            raise OSError(errno.ESTALE, "no such file in the archive", number)
        return NODE.unpack_from(self._nodes, number * NODE.size)

    def entries(self, node: Node, start: int) -> Iterator[tuple[int, bytes, int]]:
        """Give (position, name, node number) of a directory's entries from position `start` on."""
        first, count = node[7], node[8]
        starts, names, numbers = self._starts, self._names, self._entries
        for position in range(start, count):
            at = first + position
            yield position, bytes(names[starts[at] : starts[at + 1]]), numbers[at]

    def lookup(self, node: Node, name: bytes) -> int | None:
        """Find a name in a directory."""
        first, count = node[7], node[8]
        starts, names, by_name = self._starts, self._names, self._by_name
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            at = first + by_name[first + middle]
            found = bytes(names[starts[at] : starts[at + 1]])
            if found < name:
                low = middle + 1
            elif found == name:
                return self._entries[at]
            else:
                high = middle
        return None

    def extras(self, node: Node, tag: int) -> Iterator[memoryview]:
        """Give the values of one kind of extra that a node has."""
        place = node[9]
        while place:
            kind, length = _EXTRA.unpack_from(self._extras, place)
            if kind == END:
                return
            place += _EXTRA.size
            if kind == tag:
                yield self._extras[place : place + length]
            place += length

    def target(self, node: Node) -> bytes:
        """What a symbolic link holds."""
        return bytes(next(self.extras(node, TARGET), b""))

    def sparse(self, node: Node) -> Pieces | None:
        """What is stored of a sparse file; None: all of it is."""
        flat = next(self.extras(node, SPARSE), None)
        return None if flat is None else Pieces(flat.cast("Q"))

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Extended attributes by name."""
        found = {}
        for value in self.extras(node, XATTR):
            name, _, content = bytes(value).partition(b"\0")
            found[name] = content
        return found

    def times(self, node: Node) -> tuple[int, int, int, int] | None:
        """(atime, nanoseconds, ctime, nanoseconds), where the archive has them."""
        value = next(self.extras(node, TIMES), None)
        return None if value is None else _TIMES.unpack(value)

    def compressed(self, node: Node) -> tuple[int, int, int, int] | None:
        """(method, flags, CRC-32, compressed size) of a zip archive's member."""
        value = next(self.extras(node, PACKED), None)
        return None if value is None else _PACKED.unpack(value)
