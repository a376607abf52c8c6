"""From what a person names to a filesystem: recognises a SOURCE and opens it.

Layer `fs`. A source is found by its content, never by its name. Formats are loaded when they are needed.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fusewire.formats.squashfs import Image
    from fusewire.fs.imagefile import ImageFile
    from fusewire.fs.squashfs import SquashFS
    from fusewire.ops import Operations


class SourceOptions(Protocol):
    """What of the mount options concerns a source."""

    offset: int | None
    cache_size: int
    uid: int | None
    gid: int | None
    umask: int | None
    squash_owner: bool
    entry_timeout: float | None
    attr_timeout: float | None
    negative_timeout: float | None
    directory: dict[str, Any]
    archive: dict[str, Any]

    @property
    def read_only(self) -> bool: ...


def open_source(source: str, options: SourceOptions) -> Operations:
    """Open `source` (the path of an image, or a directory) as a filesystem.

    Raises OSError that names the source: it is missing, may not be read, or is nothing that we know.
    """
    return open_opened(open_fd(source), source, options)


def open_fd(source: str) -> int:
    """Open `source`, a directory by O_PATH. Raises OSError that names it."""
    try:
        if os.path.isdir(source):
            return os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, f"cannot open the source {source}: {error.strerror}") from error


def open_opened(fd: int, source: str, options: SourceOptions) -> Operations:
    """Open as a filesystem what `open_fd` gave, or a copy of it, which is taken over; `source` is for messages.

    Raises OSError that names the source.
    """
    kind = os.fstat(fd)
    if stat.S_ISDIR(kind.st_mode):
        return open_directory(fd, source, options)
    try:
        if stat.S_ISREG(kind.st_mode):
            size = kind.st_size
        elif stat.S_ISBLK(kind.st_mode):
            size = os.lseek(fd, 0, os.SEEK_END)
        else:
            raise OSError(errno.EINVAL, f"{source} is neither a file nor a block device")
        archive = _open_archive(fd, size, source, options)
        return archive if archive is not None else _open_squashfs(fd, size, source, options)
    except BaseException:
        os.close(fd)
        raise


def open_directory(fd: int, source: str, options: SourceOptions) -> Operations:
    """Serve a directory whose O_PATH descriptor is given, and taken over. Raises OSError that names the source."""
    from fusewire.fs.passthrough import Config, Passthrough

    try:
        for name in ("uid", "gid", "umask", "offset"):
            if getattr(options, name) is not None:
                raise ValueError(f"`{name}=` is for images; owners of a directory's files are mapped by translate_uid=")
        if options.squash_owner:
            raise ValueError("`squash_owner` is for images; owners of a directory's files are mapped by translate_uid=")
        said: dict[str, Any] = dict(options.directory)
        said["passthrough"] = said.get("passthrough", "auto") == "auto"
        for name in ("entry_timeout", "attr_timeout", "negative_timeout"):
            if getattr(options, name) is not None:
                said[name] = getattr(options, name)
        filesystem = Passthrough(fd, Config(**said))
        filesystem.read_only = options.read_only
        return filesystem
    except ValueError as error:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{source}: {error}") from error
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, f"{source}: {error.strerror or error}") from error


def _open_archive(fd: int, size: int, source: str, options: SourceOptions) -> Operations | None:
    """Open a tar or zip archive; None if it is none. `fd` stays the caller's until it has worked."""
    base = options.offset or 0
    if os.pread(fd, 4, base) in (b"hsqs", b"\x7fELF"):
        return None  # an image, without a look at anything else (a program with a zip archive behind it: see below)
    from fusewire.fs import archive

    file = archive.ArchiveFile(fd, size, base)
    kind = archive.recognise(file.pread, file.size)
    if kind is None:
        return None
    filesystem = archive.open_archive(fd, size, source, options, kind=kind, **options.archive)
    if isinstance(filesystem, archive.ArchiveWithXattrs) and os.geteuid() == 0:
        filesystem.trusted = _trusted(options)
    return filesystem


def _trusted(options: SourceOptions) -> bool:
    trusted = options.directory.get("trusted")
    if trusted is None:
        from fusewire.linux.userns import in_first_namespace

        trusted = in_first_namespace()
    return bool(trusted)


def _open_squashfs(fd: int, size: int, source: str, options: SourceOptions) -> Operations:
    from fusewire.formats.containers import find_image
    from fusewire.formats.squashfs import Image
    from fusewire.fs.imagefile import ImageFile

    file = ImageFile(fd)
    try:
        offset = options.offset if options.offset is not None else find_image(file.pread, size)
        image = Image(file.pread, size, offset=offset, cache_size=options.cache_size, metadata_size=4 << 20)
    except OSError as error:
        raise OSError(error.errno, f"{source}: {error.strerror or error}") from error
    return squashfs_of(image, file, options)


def squashfs_class(image: Image) -> type[SquashFS]:
    """Give the class that serves an image: one without attributes is never asked for them."""
    from fusewire.fs.squashfs import SquashFS, SquashFSWithXattrs

    return SquashFSWithXattrs if image.has_xattrs else SquashFS


def squashfs_of(image: Image, file: ImageFile, options: SourceOptions, kind: type[SquashFS] | None = None) -> SquashFS:
    """Serve a squashfs image that has been opened; `file` is what it reads from, closed at the end.

    kind: a class made of `squashfs_class`, in its place.
    """
    from fusewire.fs.squashfs import SquashFSWithXattrs
    from fusewire.ops import FOREVER

    def seconds(value: float | None) -> float:
        return FOREVER if value is None else value

    filesystem = (kind or squashfs_class(image))(
        image,
        uid=os.getuid() if options.squash_owner and options.uid is None else options.uid,
        gid=os.getgid() if options.squash_owner and options.gid is None else options.gid,
        umask=options.umask or 0,
        entry_timeout=seconds(options.entry_timeout),
        attr_timeout=seconds(options.attr_timeout),
        negative_timeout=seconds(options.negative_timeout),
        file=file,
    )
    if isinstance(filesystem, SquashFSWithXattrs) and os.geteuid() == 0:
        filesystem.trusted = _trusted(options)
    return filesystem
