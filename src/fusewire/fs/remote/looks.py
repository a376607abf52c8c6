"""What a look at a file of a store tells, in the many words that libraries have for it, and whether two looks agree.

Layer `fs`, part of `fs.remote`. Plain values: no request goes out from here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_SECOND = 1_000_000_000  # nanoseconds
_VERSIONS = ("ETag", "etag", "version_id", "generation", "md5Hash", "content_md5", "crc32c", "checksum", "sha")
_TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "date_time", "created")


class Info(NamedTuple):
    """What is known of a file. `size` None: unknown. `mtime` in nanoseconds, 0: unknown.

    `tags` are what the store has to tell versions apart, by its names. `told`: whether anything but the size does.
    """

    path: str
    directory: bool
    size: int | None = 0
    mtime: int = 0
    mode: int | None = None
    tags: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> bool:
        return bool(self.tags or self.mtime)


def same(one: Info, other: Info) -> bool:
    """Tell whether two looks at a file saw the same contents.

    Listings and single looks need not tell the same things, nor times to the same precision: what only one has does
    not count.
    """
    if one.size != other.size and None not in (one.size, other.size):
        return False
    ours, theirs = dict(one.tags), dict(other.tags)
    common = ours.keys() & theirs.keys()
    if common:
        return all(ours[key] == theirs[key] for key in common)
    if not one.mtime or not other.mtime or one.mtime == other.mtime:
        return True
    if one.mtime % _SECOND and other.mtime % _SECOND:
        return False
    return one.mtime // _SECOND == other.mtime // _SECOND


def info_of(path: str, entry: Any) -> Info:
    """Make an `Info` of what fsspec says of a file, or a web server in the head of an answer."""
    size, kind, mode = entry.get("size"), entry.get("type"), entry.get("mode")
    if not isinstance(size, int) or size < 0:
        size = None
    if isinstance(mode, str) and mode.isdigit():  # as git has it
        mode = int(mode, 8) if not set(mode) & set("89") else None
    directory = kind == "directory"
    tags = tuple((key, str(entry[key])) for key in _VERSIONS if entry.get(key) is not None)
    mtime = 0
    for key in _TIMES:
        if entry.get(key) is not None and (mtime := _nanoseconds(entry[key])):
            break
    mode = mode & 0o777 if isinstance(mode, int) else None
    return Info(path, directory, 0 if directory else size, mtime, mode or None, tags)


def _nanoseconds(value: Any) -> int:
    """Make a time of the forms that filesystems have; 0 for what is none."""
    from datetime import UTC, datetime

    try:
        if isinstance(value, str):
            if value.endswith("GMT"):
                from email.utils import parsedate_to_datetime

                value = parsedate_to_datetime(value)
            else:
                value = datetime.fromisoformat(value)
        elif isinstance(value, tuple):
            value = datetime(*value).astimezone()  # a zip archive has local time
        if isinstance(value, datetime):
            if value.tzinfo is None and value.year > 1980:
                value = value.replace(tzinfo=UTC)
            value = value.timestamp()
        seconds = float(value)
        return int(seconds * 1_000_000) * 1000 if abs(seconds) < 1 << 33 else 0
    except (ValueError, TypeError, OverflowError, OSError):
        return 0
