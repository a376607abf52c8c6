"""`fusewire info IMAGE`: what is in an image, from its superblock, and with `count` from a walk of its directories.

Layer: cli. Nothing is mounted, and nothing is unpacked but metadata.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from fusewire.cli.listing import shown
from fusewire.cli.options import MountOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.formats.squashfs import Image

_BATCH = 4096
_KINDS = {1: "directories", 2: "files", 3: "symlinks", 4: "devices", 5: "devices", 6: "fifos", 7: "sockets"}


def info(image: str, *, offset: int | None = None, count: bool = False, json: bool = False) -> int:
    """Print what is in an image, as lines or as JSON; 0 is the exit status.

    offset: where the image begins in the file, in bytes; None finds it. Raises OSError that names the image, and says
    what the file is instead if it is none.
    """
    found = describe(image, offset, count)
    if json:
        from json import dumps

        print(dumps(found, indent=1))
        return 0
    for name, value in _lines(found):
        print(f"{name + ':':<14}{shown(value)}")
    if found.get("damaged"):
        print(f"fusewire: {image}: {found['damaged']} damaged directories or inodes were left out", file=sys.stderr)
    return 0


def describe(path: str, offset: int | None = None, count: bool = False) -> dict[str, Any]:
    """What `info` prints. Sizes are bytes; `created` is UTC as ISO 8601 has it, `created_seconds` since the epoch."""
    from fusewire.fs.sources import open_source

    options = MountOptions()
    options.offset = offset
    source = open_source(path, options)
    try:
        image: Image | None = getattr(source, "image", None)
        if image is None:
            raise OSError(errno.EINVAL, f"{path} can be mounted, but is no image that there is more to say of")
        with open(path, "rb") as file:
            head = file.read(64)
            size = file.seek(0, os.SEEK_END)
        found: dict[str, Any] = {"image": os.path.abspath(path), "file_size": size}
        found |= image.summary()
        found["container"] = _container(head, found["offset"])
        found["created_seconds"] = found["created"]
        found["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found["created"]))
        if count:
            found |= count_files(image)
        return found
    finally:
        source.destroy()


def _container(head: bytes, offset: int) -> str:
    if offset == 0:
        return "plain"
    if head[:4] == b"\x7fELF":
        return "AppImage" if head[8:11] == b"AI\x02" else "ELF program"
    if head[32:42] == b"SIF_MAGIC\0":
        return "SIF"
    return "unknown"


def count_files(image: Image) -> dict[str, int]:
    """Walk the whole tree: how many names there are of each kind, and how many bytes the regular files have.

    A file with several names counts once in `file_bytes`. What is damaged is counted and left out, and a directory
    that is reached a second time, as only a hostile image has it, is not entered again.
    """
    counts = dict.fromkeys((*_KINDS.values(), "hard_links", "file_bytes", "damaged"), 0)
    counts["directories"] = 1
    entered = {image.root}
    linked: set[int] = set()
    left = [image.root]
    while left:
        cookie = 0
        try:
            directory = image.inode(left.pop())
            while batch := image.attributes(directory, cookie, _BATCH):
                for _, _, ref, kind, _, mode, _, _, size, _, _, nlink, _ in batch:
                    if not mode:
                        counts["damaged"] += 1
                        continue
                    counts[_KINDS[kind]] += 1
                    if kind == 1:
                        if ref in entered:
                            counts["damaged"] += 1
                        else:
                            entered.add(ref)
                            left.append(ref)
                    elif nlink > 1 and ref in linked:
                        counts["hard_links"] += 1
                    else:
                        if nlink > 1:
                            linked.add(ref)
                        if kind == 2:
                            counts["file_bytes"] += size
                cookie = batch[-1][0]
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EINVAL):
                raise
            counts["damaged"] += 1
    return counts


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    where = "" if found["container"] == "plain" else f", image at byte {found['offset']}"
    chosen = ", ".join(f"{name} {value}" for name, value in found["compressor_options"].items())
    lines = [
        ("image", found["image"]),
        ("container", found["container"] + where),
        ("format", found["format"]),
        ("compressor", found["compressor"] + (f" ({chosen})" if chosen else "")),
        ("read by", str(found["decompressor"])),
        ("block size", _bytes(found["block_size"])),
        ("image size", _bytes(found["bytes_used"])),
        ("file size", _bytes(found["file_size"])),
        ("inodes", str(found["inodes"])),
        ("fragments", str(found["fragments"])),
        ("ids", str(found["ids"])),
        ("created", found["created"]),
        ("xattrs", "yes" if found["xattrs"] else "no"),
        ("exportable", "yes" if found["exportable"] else "no"),
        ("flags", ", ".join(found["flags"]) or "none"),
    ]
    if "files" in found:
        kinds = [(name, found[name]) for name in dict.fromkeys(_KINDS.values()) if found[name]]
        lines.append(("contents", ", ".join(f"{number} {name}" for name, number in kinds)))
        lines.append(("hard links", str(found["hard_links"])))
        lines.append(("unpacked", _bytes(found["file_bytes"])))
    return lines


def _bytes(size: int) -> str:
    for unit, letters in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {letters} ({size} bytes)"
    return f"{size} bytes"
