"""The hello benchmark's filesystem, written once for each library: hello.py KIND TARGET THREADS.

One directory with one file of 4 KiB, nothing cached. Each is written as its library's own examples are, and a careful
author would: attributes that do not change are made once. KIND is a name in MAKERS; THREADS 0 is the library's default.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable

NAME, DATA = "hello", b"Hello, world. " * 292 + b"Goodbye."  # 4096 bytes, as hello.c expects them
FILE_MODE, FOLDER_MODE = stat.S_IFREG | 0o444, stat.S_IFDIR | 0o755


def operations(target: str, threads: int) -> None:
    """Fusewire, level 1."""
    import fusewire
    from fusewire.wire.codec import DirBuffer

    root, file = 1, 2
    attributes = {root: fusewire.attr(root, FOLDER_MODE, nlink=2), file: fusewire.attr(file, FILE_MODE, len(DATA))}
    entry = fusewire.Entry(file, attributes[file], 0, 0)
    name = NAME.encode()

    class Hello(fusewire.Operations):
        def lookup(self, caller: fusewire.Caller, parent: int, wanted: bytes) -> fusewire.Entry | None:
            return entry if wanted == name else None

        def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[fusewire.Attr, float]:
            return attributes[nodeid], 0.0

        def read(
            self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
        ) -> bytes:
            return DATA[offset : offset + size]

        def open(self, caller: fusewire.Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
            return 0, 0

        def opendir(self, caller: fusewire.Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
            return 0, 0

        def readdir(
            self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
        ) -> bytearray:
            listing = DirBuffer(size)
            if offset == 0:
                listing.add(name, file, 1, stat.S_IFREG >> 12)
            return listing.data

    fusewire.mount(Hello(), target, strategy="direct", threads=threads or None)


def nodes(target: str, threads: int) -> None:
    """Fusewire, level 2."""
    import fusewire

    class Folder(fusewire.Dir):
        timeout = 0.0

    class Text(fusewire.Bytes):
        mode = 0o444
        attr_timeout = 0.0
        keep_cache = False

    # Without default_permissions, which the others do not have either (see pyfuse3 below).
    options = fusewire.Options(fsname=b"hello")
    fusewire.mount(Folder(hello=Text(DATA)), target, options=options, strategy="direct", threads=threads or None)


def by_path(module: str) -> Callable[[str, int], None]:
    """fusepy, and what has its interface."""

    def serve(target: str, threads: int) -> None:
        from importlib import import_module

        if module == "fuse":
            os.environ.pop("FUSE_LIBRARY_PATH", None)  # the benchmarks say libfuse 3, and fusepy knows libfuse 2 alone
        fuse = import_module(module)
        common = {"st_uid": 0, "st_gid": 0, "st_atime": 0, "st_mtime": 0, "st_ctime": 0}
        attributes = {
            "/": {"st_mode": FOLDER_MODE, "st_nlink": 2, **common},
            "/" + NAME: {"st_mode": FILE_MODE, "st_nlink": 1, "st_size": len(DATA), **common},
        }

        class Hello(fuse.Operations):  # type: ignore[misc, name-defined]
            use_ns = True

            def getattr(self, path, fh=None):  # type: ignore[no-untyped-def]
                try:
                    return attributes[path]
                except KeyError:
                    raise fuse.FuseOSError(errno.ENOENT) from None

            def read(self, path, size, offset, fh):  # type: ignore[no-untyped-def]
                return DATA[offset : offset + size]

            def readdir(self, path, fh):  # type: ignore[no-untyped-def]
                return [".", "..", NAME]

        timeouts = {"entry_timeout": 0, "attr_timeout": 0, "negative_timeout": 0}
        fuse.FUSE(Hello(), target, foreground=True, nothreads=threads == 1, fsname="hello", **timeouts)

    return serve


def pyfuse3(target: str, _threads: int) -> None:
    """pyfuse3, which has one thread."""
    import pyfuse3 as fuse
    import trio

    root, file, name = fuse.ROOT_INODE, fuse.ROOT_INODE + 1, NAME.encode()
    attributes = {}
    for node, mode, size in ((root, FOLDER_MODE, 0), (file, FILE_MODE, len(DATA))):
        entry = attributes[node] = fuse.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_size, entry.st_nlink = node, mode, size, 1
        entry.entry_timeout = entry.attr_timeout = 0
    info = fuse.FileInfo(fh=file, keep_cache=False)

    class Hello(fuse.Operations):  # type: ignore[misc, name-defined]
        async def lookup(self, parent_inode, wanted, ctx=None):  # type: ignore[no-untyped-def]
            if wanted != name:
                raise fuse.FUSEError(errno.ENOENT)
            return attributes[file]

        async def getattr(self, inode, ctx=None):  # type: ignore[no-untyped-def]
            return attributes[inode]

        async def open(self, inode, flags, ctx):  # type: ignore[no-untyped-def]
            return info

        async def read(self, fh, off, size):  # type: ignore[no-untyped-def]
            return DATA[off : off + size]

        async def opendir(self, inode, ctx):  # type: ignore[no-untyped-def]
            return inode

        async def readdir(self, fh, start_id, token):  # type: ignore[no-untyped-def]
            if start_id == 0:
                fuse.readdir_reply(token, name, attributes[file], 1)

    # Without its default_permissions: with it the kernel asks for the directory's attributes once more for each name.
    fuse.init(Hello(), target, {"fsname=hello"})
    try:
        trio.run(fuse.main)
    finally:
        fuse.close(unmount=True)


MAKERS = {
    "operations": operations,
    "nodes": nodes,
    "compat": by_path("fusewire.compat.fusepy"),
    "pyfuse3": pyfuse3,
    "mfusepy": by_path("mfusepy"),
    "fusepy": by_path("fuse"),
}


def main() -> None:
    MAKERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    main()
