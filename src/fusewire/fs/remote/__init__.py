"""Sources behind a URL: squashfs images on web servers and in object stores, and whatever fsspec has a filesystem for.

Layer `fs`. Nothing is loaded before it is needed. `is_url` tells whether a SOURCE is one of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from fusewire.fs.sources import SourceOptions
    from fusewire.ops import Operations

__all__ = ["is_url", "open_url", "shown", "storage_options", "visible"]

_IMAGES = (".sqsh", ".squashfs", ".sqfs", ".squash", ".sfs", ".sif", ".appimage", ".snap")
_NO_SECRETS = ("github", "git")  # ORG:REPOSITORY@BRANCH
_SCHEME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-._")


def is_url(source: str) -> bool:
    """Tell whether a SOURCE is a URL, or a chain of them as fsspec has it, and no path: PROTOCOL://..., A::B://..."""
    head, colons, _ = source.partition("://")
    parts = head.split("::")
    return bool(colons) and all(part and set(part) <= _SCHEME for part in parts)


def open_url(url: str, options: SourceOptions) -> Operations:
    """Open a URL as a filesystem: a squashfs image as one, all else by fsspec.

    A file on a web server is looked at; elsewhere the name tells (.sqsh, .sif, ...). `options.storage`, where there is
    one, has what fsspec's filesystem is to be made with. Raises OSError that names the URL.
    """
    from fusewire.fs.remote.image import NotAnImage, open_image_url

    if names_image(url) or options.offset is not None:
        return open_image_url(url, options)
    web = url.partition("://")[0].lower() in ("http", "https")
    if web and not url.partition("?")[0].endswith("/") and not getattr(options, "storage", None):
        try:
            return open_image_url(url, options)
        except NotAnImage:
            pass  # a page that lists a directory, as it seems
    from fusewire.fs.remote.filesystem import open_fsspec

    return open_fsspec(url, options)


def shown(url: str) -> str:
    """Give a URL as it may be said aloud: no password, and no query, which may be a signature. Raises nothing."""
    scheme, mark, rest = url.partition("://")
    end = min(rest.find(letter) for letter in "/?#" if letter in rest) if set("/?#") & set(rest) else len(rest)
    user, at, host = rest[:end].rpartition("@")
    path, query, _ = rest[end:].partition("#")[0].partition("?")
    if scheme in _NO_SECRETS:
        host = user + at + host
    elif scheme not in ("http", "https"):
        host = user.partition(":")[0] + at + host  # a container, or the name of a user
    text = scheme + mark + host + path + ("?..." if query else "")
    return "".join(letter if letter.isprintable() or "\udc80" <= letter <= "\udcff" else "?" for letter in text)


def visible(url: str) -> str:
    """Give a URL, or a chain of them, as it may be said aloud. Raises nothing."""
    return "::".join(shown(part) if "://" in part else part for part in url.split("::"))


def names_image(url: str) -> bool:
    """Tell whether the URL of a file ends as the names of images do; what follows a `?` or `#` does not count."""
    if "::" in url:
        url = url.partition("::")[0].partition("://")[2]
    return url.partition("#")[0].partition("?")[0].lower().endswith(_IMAGES)


def storage_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Make what fsspec takes of words `key=value`: `anon=true`, `s3.endpoint_url=http://...` for one of a chain.

    A value that is JSON (true, 5, null, {...}, "5") is taken as such, and as text otherwise. Raises ValueError.
    """
    import json

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            raise ValueError(f"`{pair}` is no KEY=VALUE or PROTOCOL.KEY=VALUE")
        value: Any
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        place = found
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"`{pair}`: `{part}` has a value already")
        place[path[-1]] = value
    return found
