"""Squashfs images on web servers and in object stores, mounted without being downloaded: only what is read is fetched.

Layer `fs`, part of `fs.remote`. For http and https it needs nothing but the standard library; for other URLs, fsspec.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fusewire.fs.imagefile import ImageFile
from fusewire.fs.remote.blocks import Blocks, RemoteData
from fusewire.fs.remote.crew import Crew
from fusewire.fs.remote.http import HttpFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from fusewire.fs.remote.retry import Patience
    from fusewire.fs.sources import SourceOptions
    from fusewire.ops import Connection, Operations

    class RangedFile(Protocol):
        """A file of which ranges can be had."""

        url: str
        size: int
        beginning: bytes
        whole: bytes | None

        def fetch(self, offset: int, length: int) -> bytes: ...
        def close(self) -> None: ...


# A data block of an image is 128 KiB by default and half of that when compressed: blocks of ours that are larger would
# mostly fetch what nobody wants, and neighbours are fetched by one request anyway.
_BLOCK = 1 << 16
_CAPACITY = 32 << 20  # bytes of the image, as it is stored
_REQUESTS = 6  # at a time
_WORKERS = 8


class NotAnImage(OSError):  # noqa: N818 - it leads to another way, and rarely to a message
    """What is behind the URL is something else."""


class ImageUrl(ImageFile):
    """A remote image in the place of an open file: `pread` gives its bytes, from the blocks that are held or not."""

    __slots__ = ("_file", "blocks", "data", "log")

    def __init__(self, file: RangedFile, capacity: int = _CAPACITY) -> None:
        super().__init__(-1)
        self._file = file
        size = file.size
        self.blocks = Blocks(capacity, _BLOCK)
        self.data = RemoteData(self.blocks, file.fetch, size)
        self.log: Callable[[str, BaseException | None], None] | None = None
        for number in range(len(file.beginning) // _BLOCK if file.whole is None else 0):
            self.blocks.put(self.data.number, number, file.beginning[number * _BLOCK : (number + 1) * _BLOCK])

    def begin(self, connection: Connection) -> None:
        """Go on with threads, and say by `connection` what goes wrong."""
        super().begin(connection)
        self.log = connection.log_once
        if self._file.whole is None:
            self.blocks.crew = Crew(_REQUESTS, "fetch")

    def pread(self, offset: int, length: int) -> bytes:
        """Give up to `length` bytes at `offset`; fewer at the end. Raises OSError that names the URL."""
        if self.may_block is not None and not self.data.ready(offset, length):
            self.may_block(True)
        try:
            return self.data.pread(offset, length)
        except OSError as error:
            if self.log is not None:
                self.log(error.strerror or str(error), None)
            raise

    def statistics(self) -> dict[str, int]:
        """Give the counters of blocks and requests."""
        return self.blocks.statistics()

    def close(self) -> None:
        """Close connections, end threads, forget data."""
        if self.blocks.crew is not None:
            self.blocks.crew.close()
        self._file.close()
        self.data.close()


def open_image_url(url: str, options: SourceOptions, *, patience: Patience | None = None) -> Operations:
    """Serve the squashfs image (or AppImage, or SIF) at `url` without downloading it.

    No thread is started before `init`, so the caller may still fork. Raises OSError that names the URL.
    """
    file: RangedFile
    storage = getattr(options, "storage", None)
    if url.partition("://")[0].lower() in ("http", "https") and not storage:
        file = HttpFile(url, patience)
    else:
        from fusewire.fs.remote.store import open_file

        file = open_file(url, storage or {}, patience)
    return image_of(ImageUrl(file), file, options)


def image_of(source: ImageUrl, file: RangedFile, options: SourceOptions) -> Operations:
    """Serve an image that has been opened. `source` is closed when that is not possible."""
    from fusewire.formats.containers import find_image
    from fusewire.formats.squashfs import Image, NotSquashfsError
    from fusewire.fs.sources import squashfs_class, squashfs_of

    found = options.offset is not None
    try:
        try:
            offset = options.offset if options.offset is not None else find_image(source.pread, file.size)
            found = True
            image = Image(source.pread, file.size, offset=offset, cache_size=options.cache_size, metadata_size=8 << 20)
        except NotSquashfsError as error:
            kind = OSError if found else NotAnImage
            raise kind(errno.EINVAL, f"{file.url}: {error.strerror}") from error
        except OSError as error:
            if (error.strerror or "").startswith(file.url):
                raise
            raise OSError(error.errno or errno.EIO, f"{file.url}: {error.strerror or error}") from error
        # Inodes, directories and tables, which are read in pieces of 8 KiB, are at the end of an image.
        superblock = image.superblock
        source.data.dense = (offset + superblock.inode_table, offset + superblock.bytes_used)

        class Remote(squashfs_class(image)):  # type: ignore[misc]
            workers = _WORKERS  # they wait

        return squashfs_of(image, source, options, Remote)
    except BaseException:
        source.close()
        raise
