"""The `-o` option string of mount(8), libfuse and squashfuse users: one table row per option, parsed into plain values.

Layer: cli. It reads neither argv nor the environment, does no I/O, and decides nothing: what an option means to a
mount is for the code that mounts. It is loaded on the way to every mount, so it imports nothing but builtins.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Value = int | float | str

# <linux/mount.h>, under the names of fusewire.linux.syscalls, which costs the import of ctypes.
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

DEFAULT_CACHE_SIZE = 64 << 20
_FOREVER = float(1 << 32)  # seconds; a longer one would not fit everywhere it goes
_LAST_ID = 0xFFFFFFFE  # 2^32-1 means "no change" to chown(2)
_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SUFFIXES = {"": 1, "b": 1} | {unit + rest: size for unit, size in _UNITS.items() for rest in ("", "b", "ib")}


class OptionError(ValueError):
    """An option that cannot be taken; the text names it, says why, and what would be right."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"option `{option}`: {reason}")
        self.option = option
        self.reason = reason


class MountOptions:
    """What the options ask for. None is "not said": the filesystem's or the kernel's own default holds.

    `flags` are MS_* of mount(2), with MS_NOSUID and MS_NODEV unless `suid` or `dev` was said. Times are in seconds
    (0 for `timeout`: never), sizes and `offset` in bytes. `given` has the options as they were typed, in order.
    """

    __slots__ = (
        "ac_attr_timeout",
        "allow_other",
        "allow_root",
        "archive",
        "attr_timeout",
        "auto_cache",
        "auto_unmount",
        "cache_size",
        "clone_fd",
        "congestion_threshold",
        "debug",
        "default_permissions",
        "directory",
        "entry_timeout",
        "flags",
        "fsname",
        "gid",
        "given",
        "kernel_cache",
        "max_background",
        "max_idle_threads",
        "max_read",
        "max_readahead",
        "max_threads",
        "max_write",
        "negative_timeout",
        "offset",
        "squash_owner",
        "storage_words",
        "subtype",
        "timeout",
        "uid",
        "umask",
    )

    def __init__(self) -> None:
        self.flags = MS_NOSUID | MS_NODEV
        self.given: list[str] = []
        self.allow_other = False
        self.allow_root = False
        self.default_permissions: bool | None = None
        self.auto_unmount = False
        self.fsname: str | None = None
        self.subtype: str | None = None
        self.max_read: int | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.umask: int | None = None
        self.squash_owner = False
        self.entry_timeout: float | None = None
        self.attr_timeout: float | None = None
        self.negative_timeout: float | None = None
        self.ac_attr_timeout: float | None = None
        self.kernel_cache = False
        self.auto_cache = False
        self.max_threads: int | None = None
        self.max_idle_threads: int | None = None
        self.clone_fd = False
        self.debug = False
        self.offset: int | None = None
        self.timeout = 0.0
        self.cache_size = DEFAULT_CACHE_SIZE
        self.max_background: int | None = None
        self.congestion_threshold: int | None = None
        self.max_readahead: int | None = None
        self.max_write: int | None = None
        # What concerns a host directory, under the names of fs.passthrough.Config; what was not said is not in it.
        self.directory: dict[str, Any] = {}
        # What concerns an archive, under the names of fs.archive.open_archive.
        self.archive: dict[str, Any] = {}
        # What fsspec's filesystem behind a URL is to be made with, as KEY=VALUE.
        self.storage_words: list[str] = []

    @property
    def storage(self) -> dict[str, Any]:
        """`storage_words` as a dictionary. Raises ValueError."""
        from fusewire.fs.remote import storage_options

        return storage_options(self.storage_words)

    @property
    def read_only(self) -> bool:
        """True after `ro`."""
        return bool(self.flags & MS_RDONLY)

    def __repr__(self) -> str:
        return "MountOptions(" + ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__) + ")"


def _digits(text: str) -> int:
    # int() would also take blanks, underscores, signs and the digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise ValueError("needs a whole number")
    return int(text)


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def convert(text: str) -> int:
        number = -_digits(text[1:]) if low < 0 and text.startswith("-") else _digits(text)
        if not low <= number <= high:
            raise ValueError(f"must be from {low} to {high}")
        return number

    return convert


def _size(low: int, high: int) -> Callable[[str], int]:
    """A number of bytes from `low` to `high`: 65536, 64K, 64KiB, 1G."""

    def convert(text: str) -> int:
        number = text.rstrip("kKmMgGtTiIbB")
        factor = _SUFFIXES.get(text[len(number) :].lower())
        if factor is None or not (number.isascii() and number.isdigit()):
            raise ValueError("needs a number of bytes, as 65536, 64K, 16M or 1G")
        if not low <= int(number) * factor <= high:
            raise ValueError(f"must be from {_short(low)} to {_short(high)} bytes")
        return int(number) * factor

    return convert


def _short(size: int) -> str:
    for letter in "TGMK":
        unit = _UNITS[letter.lower()]
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def _seconds(text: str) -> float:
    try:
        seconds = float(text) if text.isascii() and "_" not in text and text == text.strip() else -1.0
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:  # NaN too
        raise ValueError("needs a number of seconds, 0 or more; fractions are allowed")
    return min(seconds, _FOREVER)


def _octal(text: str) -> int:
    if not 0 < len(text) <= 5 or text.strip("01234567") or int(text, 8) > 0o777:
        raise ValueError("needs octal permission bits, 000 to 777")
    return int(text, 8)


def _name(limit: int) -> Callable[[str], str]:
    """A text of at most `limit` bytes."""

    def convert(text: str) -> str:
        if "\0" in text:
            raise ValueError("must not contain a NUL byte")
        if len(text.encode(errors="surrogateescape")) > limit:
            raise ValueError(f"must not be longer than {limit} bytes")
        return text

    return convert


class _Row:
    """One option: what it sets, or how its value is read, or why it is ignored or refused."""

    __slots__ = ("clear", "convert", "directory", "help", "ignored", "name", "refused", "set", "sets", "value")

    def __init__(
        self,
        name: str,
        text: str = "",
        *,
        set: int = 0,  # noqa: A002  the pair is called so in mount(2)'s users
        clear: int = 0,
        sets: dict[str, bool] | None = None,
        value: str = "",
        convert: Callable[[str], Value] | None = None,
        ignored: bool = False,
        refused: str = "",
        directory: bool = False,
    ) -> None:
        self.name = name
        self.directory = directory
        self.help = text
        self.set = set
        self.clear = clear
        self.sets = sets
        self.value = value
        self.convert = convert
        self.ignored = ignored
        self.refused = refused


def _flag(name: str, text: str, **sets: bool) -> _Row:
    return _Row(name, text, sets=sets)


def _valued(name: str, value: str, convert: Callable[[str], Value], text: str) -> _Row:
    return _Row(name, text, value=value, convert=convert)


_NOTHING = "; no effect on a read-only image"
_ACCESS = (
    _Row("ro", "read-only; an image always is", set=MS_RDONLY),
    _Row("rw", "for reading and writing" + _NOTHING, clear=MS_RDONLY),
    _flag(
        "allow_other", "other users get in (a namespace mount: only those inside)", allow_other=True, allow_root=False
    ),
    _flag("allow_root", "root gets in besides the owner", allow_other=False, allow_root=True),
    _flag("default_permissions", "the kernel checks permission bits", default_permissions=True),
    _flag("no_default_permissions", "it does not", default_permissions=False),
    _Row("nosuid", "set-user-ID bits count for nothing (default)", set=MS_NOSUID),
    _Row("suid", "they count; the kernel allows it to a privileged mounter only", clear=MS_NOSUID),
    _Row("nodev", "device nodes do not work (default)", set=MS_NODEV),
    _Row("dev", "they work; the kernel allows it to a privileged mounter only", clear=MS_NODEV),
    _Row("noexec", "no program can be started from it", set=MS_NOEXEC),
    _Row("exec", "programs can be started (default)", clear=MS_NOEXEC),
    _Row("noatime", "access times are not kept", set=MS_NOATIME, clear=MS_RELATIME | MS_STRICTATIME),
    _Row("atime", "access times as the kernel does by default", clear=MS_NOATIME | MS_STRICTATIME),
    _Row("relatime", "access times at most once a day", set=MS_RELATIME, clear=MS_NOATIME | MS_STRICTATIME),
    _Row("norelatime", "undoes relatime", clear=MS_RELATIME),
    _Row("strictatime", "access times always", set=MS_STRICTATIME, clear=MS_NOATIME | MS_RELATIME),
    _Row("nostrictatime", "undoes strictatime", clear=MS_STRICTATIME),
    _Row("nodiratime", "no access times of directories", set=MS_NODIRATIME),
    _Row("diratime", "undoes nodiratime", clear=MS_NODIRATIME),
    _Row("sync", "writes are synchronous", set=MS_SYNCHRONOUS),
    _Row("async", "they are not (default)", clear=MS_SYNCHRONOUS),
    _Row("dirsync", "changes of directories are synchronous", set=MS_DIRSYNC),
)
_OWNERSHIP = (
    _valued("uid", "ID", _whole(0, _LAST_ID), "every file belongs to this user"),
    _valued("gid", "ID", _whole(0, _LAST_ID), "every file belongs to this group"),
    _valued("umask", "OCTAL", _octal, "permission bits that no file shows"),
    _flag("squash_owner", "every file belongs to me", squash_owner=True),
)
_SOURCE = (
    _valued("offset", "BYTES", _size(0, (1 << 63) - 1), "where the image begins in its file (default: found)"),
    _valued("storage", "KEY=VALUE", _name(65536), "what a URL's filesystem is made with; may be repeated"),
    _valued("spool_size", "BYTES", _size(0, 1 << 60), "most that an archive may keep in temporary files (default 32G)"),
    _valued("fsname", "NAME", _name(3500), "what df and mountinfo show as the source"),
    _valued("subtype", "NAME", _name(200), "the type is shown as fuse.fusewire.NAME"),
)
_LIFE = (
    _flag("auto_unmount", "unmounted when the server ends, however it ends", auto_unmount=True),
    _valued("timeout", "SECONDS", _seconds, "unmounted after so long without use (default 0: never)"),
    _flag("debug", "every request and its answer go to standard error; implies `mount -f`", debug=True),
)
_CACHING = (
    _valued("cache_size", "BYTES", _size(0, 1 << 40), "most memory for unpacked blocks (default 64M)"),
    _valued("entry_timeout", "SECONDS", _seconds, "how long the kernel keeps names"),
    _valued("attr_timeout", "SECONDS", _seconds, "how long it keeps attributes"),
    _valued("negative_timeout", "SECONDS", _seconds, "how long it keeps that a name is missing"),
    _valued("ac_attr_timeout", "SECONDS", _seconds, "for libfuse's sake" + _NOTHING),
    _flag(
        "kernel_cache",
        "contents stay cached when opened again" + _NOTHING,
        kernel_cache=True,
        auto_cache=False,
    ),
    _flag(
        "auto_cache",
        "they stay unless size or time changed" + _NOTHING,
        kernel_cache=False,
        auto_cache=True,
    ),
)
_REQUESTS = (
    _valued("max_threads", "N", _whole(1, 1024), "worker threads"),
    _valued(
        "max_idle_threads",
        "N",
        _whole(-1, 1 << 31),
        "for libfuse's sake" + _NOTHING,
    ),
    _flag("clone_fd", "each worker gets a /dev/fuse descriptor of its own", clone_fd=True),
    _valued("max_read", "BYTES", _size(0, (1 << 32) - 1), "largest read request (0: no limit)"),
    _valued("max_write", "BYTES", _size(4096, 1 << 20), "largest write request" + _NOTHING),
    _valued("max_readahead", "BYTES", _size(0, (1 << 32) - 1), "how far the kernel reads ahead"),
    _valued("max_background", "N", _whole(1, 65535), "asynchronous requests at a time"),
    _valued("congestion_threshold", "N", _whole(1, 65535), "from how many of them on the kernel holds back"),
)


def _choice(*offered: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in offered:
            raise ValueError(f"must be one of {', '.join(offered)}")
        return text

    return convert


_DIRECTORY = (
    _Row(
        "cache",
        "none, metadata, auto (default) or always",
        value="MODE",
        directory=True,
        convert=_choice("none", "never", "metadata", "auto", "always"),
    ),
    _Row("writeback", "the kernel collects writes", directory=True),
    _Row("posix_lock", "record locks are taken on the host (default)", directory=True),
    _Row("flock", "flock(2) too (default)", directory=True),
    _Row("xattr", "extended attributes (default)", directory=True),
    _Row(
        "xattrmap",
        "how their names are stored, in virtiofsd's rules",
        value="RULES",
        directory=True,
        convert=_name(65536),
    ),
    _Row("posix_acl", "access control lists count", directory=True),
    _Row("security_label", "labels are set on creation", directory=True),
    _Row("killpriv_v2", "the server clears set-user-ID bits (default)", directory=True),
    _Row("readdirplus", "attributes come with names (default, but for cache=none)", directory=True),
    _Row("announce_submounts", "mounts below the directory are shown as such (default)", directory=True),
    _Row("allow_direct_io", "O_DIRECT passes the cache by (default)", directory=True),
    _Row("allow_mmap", "shared mappings with cache=none (default)", directory=True),
    _Row(
        "inode_file_handles",
        "never (default), prefer or mandatory",
        value="WHEN",
        directory=True,
        convert=_choice("never", "prefer", "mandatory"),
    ),
    _Row("translate_uid", "TYPE:FROM:TO:COUNT, may be repeated", value="RULE", directory=True, convert=_name(200)),
    _Row("translate_gid", "the same for groups", value="RULE", directory=True, convert=_name(200)),
    _Row(
        "passthrough",
        "auto (default; the kernel reads and writes itself, if it may) or off",
        value="WHEN",
        directory=True,
        convert=_choice("auto", "off"),
    ),
    _Row("watch", "what is changed on the host is seen at once", directory=True),
)
_GROUPS = (
    ("access and mount flags", _ACCESS),
    ("ownership", _OWNERSHIP),
    ("what is mounted", _SOURCE),
    ("life", _LIFE),
    ("caching", _CACHING),
    ("requests", _REQUESTS),
    ("a host directory; those without a value also as no_NAME", _DIRECTORY),
)
# What mount(8), /etc/fstab and older libfuse scripts hand on, and what changes nothing here.
_IGNORED = (
    "defaults auto noauto user nouser users owner group nofail _netdev comment loop lazytime nolazytime silent loud "
    "nonempty large_read big_writes use_ino readdir_ino hard_remove intr intr_signal async_read noforget remember "
    "splice_read no_splice_read splice_write no_splice_write splice_move no_splice_move"
)
_REFUSED = {
    "fd": "is Fusewire's own business; give /dev/fd/N as the target to use an inherited descriptor",
    "rootmode": "is Fusewire's own business",
    "user_id": "is Fusewire's own business; `uid=` sets who owns the files",
    "group_id": "is Fusewire's own business; `gid=` sets which group owns the files",
    "blkdev": "makes no sense here: no block device is mounted",
    "blksize": "makes no sense here: no block device is mounted",
    "fmask": "is not offered; `umask=` is, for files and directories alike",
    "dmask": "is not offered; `umask=` is, for files and directories alike",
    "modules": "is libfuse's own: there are no such modules here",
    "subdir": "is not offered; mount the whole image and use the directory in it",
    "notify_pipe": "is not needed: `fusewire mount` returns when the mount is ready",
    "setuid": "is mount.fuse3's own; run fusewire as that user",
    "drop_privileges": "is mount.fuse3's own; run fusewire as a user without privileges",
    "direct_io": "is not offered",
}


def _rows() -> Iterator[_Row]:
    for _, rows in _GROUPS:
        yield from rows
    for name in _IGNORED.split():
        yield _Row(name, ignored=True)
    for name, reason in _REFUSED.items():
        yield _Row(name, refused=reason)


_KNOWN = {row.name: row for row in _rows()}


def parse(text: str | list[str]) -> MountOptions:
    r"""Read `-o` strings, one or several: a later option wins over an earlier one that contradicts it.

    A comma or backslash that belongs to a value is written `\,` or `\\`, a byte also as three octal digits, as
    fuse_opt_parse(3) of libfuse has it.

    Raises OptionError.
    """
    result = MountOptions()
    for one in [text] if isinstance(text, str) else text:
        for element in split(one):
            _apply(result, element)
            result.given.append(element)
    return result


def split(text: str) -> list[str]:
    """The options in an option string, unescaped; empty ones are left out."""
    if "\\" not in text:
        return [element for element in text.split(",") if element]
    try:
        raw = text.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise OptionError(text, "has half a surrogate pair, which no argument of a program can have") from error
    elements = [bytearray()]
    at = 0
    while at < len(raw):
        byte = raw[at]
        if byte == 0x2C:
            elements.append(bytearray())
        elif byte == 0x5C and at + 1 < len(raw):
            octal = raw[at + 1 : at + 4]
            if len(octal) == 3 and octal[0] in b"0123" and not octal.strip(b"01234567"):
                byte, at = int(octal, 8), at + 3
            else:
                byte, at = raw[at + 1], at + 1
            elements[-1].append(byte)
        else:
            elements[-1].append(byte)
        at += 1
    return [element.decode(errors="surrogateescape") for element in elements if element]


def _apply(result: MountOptions, element: str) -> None:
    name, equals, value = element.partition("=")
    if name.startswith(("x-", "X-")):  # mount(8): remarks for other programs
        return
    row = _KNOWN.get(name)
    if row is None and name.startswith("no_"):
        row = _KNOWN.get(name[3:])
        if row is not None and (not row.directory or row.convert is not None):
            row = None
    if row is None:
        raise OptionError(element, _unknown(name))
    if row.directory and row.convert is None:
        if equals:
            raise OptionError(element, f"takes no value; write `{name}`")
        result.directory[row.name] = name == row.name
        return
    if row.ignored:
        return
    if row.refused:
        raise OptionError(element, row.refused)
    if row.convert is None:
        if equals:
            raise OptionError(element, f"takes no value; write `{name}`")
        result.flags = (result.flags & ~row.clear) | row.set
        for attribute, state in (row.sets or {}).items():
            setattr(result, attribute, state)
        return
    if not value:
        raise OptionError(element, f"needs a value: `{name}={row.value}`")
    try:
        converted = row.convert(value)
    except ValueError as error:
        raise OptionError(element, str(error)) from None
    if name == "spool_size":
        result.archive[name] = converted
    elif name == "storage":
        result.storage_words.append(value)
    elif not row.directory:
        setattr(result, name, converted)
    elif name.startswith("translate_"):
        before = result.directory.get(name, ())
        result.directory[name] = (*before, value) if isinstance(before, tuple) else (value,)
    else:
        result.directory[name] = value


def _unknown(name: str) -> str:
    near = nearest(name)
    if near is None:
        return "is not known; `-o help` lists those that are"
    row = _KNOWN[near]
    return f"is not known; did you mean `{near}={row.value}`?" if row.value else f"is not known; did you mean `{near}`?"


def nearest(name: str) -> str | None:
    """The known option with the fewest typing errors between it and `name`, None if that is more than half of it."""
    if not name or len(name) > 64:
        return None
    offered = [row.name for row in _KNOWN.values() if not row.ignored and not row.refused]
    best = min(offered, key=lambda known: _distance(name.lower(), known))
    return best if _distance(name.lower(), best) <= (len(name) + 1) // 2 else None


def _distance(a: str, b: str) -> int:
    """How many letters to add, drop, change or swap with their neighbour to get from `a` to `b`."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, last, row = row, before, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def describe() -> str:
    """The options for `--help`: one line each, in groups."""
    lines = []
    for title, rows in _GROUPS:
        lines.append(f"{title}:")
        for row in rows:
            left = f"{row.name}={row.value}" if row.value else row.name
            lines.append(f"  {left:<26}{row.help}")
    lines.append("accepted without effect:")
    line = " "
    for name in [*_IGNORED.split(), "x-*"]:
        if len(line) + len(name) >= 78:
            lines.append(line)
            line = " "
        line += " " + name
    lines.append(line)
    return "\n".join(lines)
