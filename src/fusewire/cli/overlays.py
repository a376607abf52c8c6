"""Writable layers of `run`: where changes are kept, and whether the kernel's overlayfs or ours takes them.

Layer `cli`. What is tried is tried before anything is started, in a child: then the server of the image is locked in
without a place to write to wherever the kernel does the work.
"""

from __future__ import annotations

import copy
import errno
import os
import stat

from fusewire.cli.source import Source
from fusewire.linux import overlay, process
from fusewire.linux.mount_base import RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.cli.options import MountOptions
    from fusewire.linux.userns import Plan
    from fusewire.ops import Operations

TMPFS = "tmpfs"
_TRIED_AT = b"/tmp"
_MEMORY = ("/dev/shm", "/tmp")  # noqa: S108  where our own overlay keeps what a tmpfs of the namespace would


class Layer:
    """A writable layer. `where`: TMPFS or the absolute path of a directory.

    After `choose`: `own` says that it is our own overlay that the server has to be, for the `reason`, with its changes
    in `directory`, which is removed by `remove` if it was made for this run.
    """

    __slots__ = ("directory", "own", "reason", "where")

    def __init__(self, where: str) -> None:
        self.where = where if where == TMPFS else os.path.abspath(where)
        self.own = False
        self.reason = ""
        self.directory = None if where == TMPFS else os.fsencode(self.where)

    def choose(self, plan: Plan) -> None:
        """Find out in a child what works in namespaces of that plan. Raises OSError: the place cannot be used."""
        answer, _ = process.in_child(lambda writer: self._try(plan, writer))
        if answer[:1] == b"E":
            number, _, text = os.fsdecode(answer[1:]).partition(" ")
            raise OSError(int(number), text)
        self.reason = os.fsdecode(answer[1:])
        self.own = answer[:1] != b"W"
        if self.own and self.directory is None:
            import tempfile

            place = next((name for name in _MEMORY if os.access(name, os.W_OK)), None)
            self.directory = os.fsencode(tempfile.mkdtemp(prefix="fusewire-layer-", dir=place))

    def _try(self, plan: Plan, writer: int) -> int:
        from fusewire.linux import userns

        try:
            if self.directory is not None:
                overlay.prepare_place(self.directory)  # no more: the first one that writes says what DIR/upper is
                claim = overlay.claim(self.directory)
                if claim >= 0:
                    os.close(claim)
            userns.enter(plan)
            if self.directory is None:
                overlay.mount_tmpfs(_TRIED_AT)
            overlay.probe(self.directory or _TRIED_AT)
        except RefusedError as error:
            os.write(writer, os.fsencode(f"R{error.strerror}; {error.remedy}"))
        except OSError as error:
            name = f": {os.fsdecode(error.filename)}" if error.filename else ""
            os.write(writer, os.fsencode(f"E{error.errno} {error.strerror or error}{name}"))
        else:
            os.write(writer, b"W")
        return 0

    def remove(self) -> None:
        """Remove what was made for this run alone."""
        if self.where == TMPFS and self.directory is not None:
            try:
                overlay.remove(self.directory)
            except OSError:
                pass  # what is left lies where temporary files do


class Upper:
    """The kernel's overlayfs on its way over one mount, inside the namespace: made before that is mounted."""

    __slots__ = ("_fds", "claim")

    def __init__(self, layer: Layer, target: bytes) -> None:
        """Make the directories; on a tmpfs at the target, which the mount will cover. Raises OSError."""
        self.claim = -1
        if layer.directory is None:
            overlay.mount_tmpfs(target)
        else:
            self.claim = overlay.claim(layer.directory)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fds = [os.open(path, flags) for path in overlay.prepare(layer.directory or target)]

    def mount(self, target: bytes, flags: int) -> None:
        """Mount it over what is mounted at the target by now, and looks as that did. Raises OSError."""
        upper, work = (b"/proc/self/fd/%d" % fd for fd in self._fds)
        if not os.listdir(upper):  # a new one: what it shows of itself is the root
            os.chmod(upper, stat.S_IMODE(os.stat(target).st_mode))
        overlay.mount(target, upper, work, target, flags)
        for fd in self._fds:
            os.close(fd)


class LayeredSource(Source):
    """A source under our own overlay: served like a directory, that of the layer."""

    def __init__(self, path: str, options: MountOptions, layer: Layer) -> None:
        """Open both. Raises OSError that names what is wrong."""
        super().__init__(path, options)
        from fusewire.fs.overlay import root_mode

        assert layer.directory is not None
        assert self._first is not None
        overlay.prepare(layer.directory, root_mode(self._first))
        # An archive has been read by now, and could not be where the server is.
        self._lower_filesystem: Any = self._first if self._lasts else None
        if self._lasts:
            self._first, self._lasts = None, False
        self._claim = overlay.claim(layer.directory)  # as long as this process lives, and its child
        self._lower, self._fd = self._fd, os.open(layer.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lower_is_directory, self._is_directory = self._is_directory, True
        self.read_only = False

    @property
    def files_of_first(self) -> list[int]:
        if self._lower_is_directory:
            raise OSError(
                errno.EOPNOTSUPP, f"{self.path} is a directory, over which only the kernel's overlayfs can lie"
            )
        return [self._lower] if self._lower_filesystem is None else list(self._lower_filesystem.fds)

    def preload(self) -> None:
        if self._lower_filesystem is not None:
            self._lower_filesystem.preload()

    def _open(self) -> Operations:
        if not hasattr(self, "_lower"):
            return super()._open()
        from fusewire.fs import sources
        from fusewire.fs.overlay import open_overlay
        from fusewire.fs.passthrough import Config

        lower: Any = self._lower_filesystem
        if lower is None:
            lower = sources.open_opened(os.dup(self._lower), self.path, self._mount)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        upper, work = (os.open(name, flags, dir_fd=self._fd) for name in (b"upper", b"work"))
        said = {name: self._mount.directory[name] for name in ("proc", "switch_ids", "trusted")}
        return open_overlay(lower, upper, work, config=Config(**said))


def options_under(options: MountOptions, maps: str) -> MountOptions:
    """Give the options of a source that is to be written over: where only one user is known, all its files are his.

    The kernel lets nobody change a file whose owner it cannot name, nor copy it up.
    """
    if os.geteuid() == 0 or "ranges" in maps or options.uid is not None or options.gid is not None:
        return options
    found = copy.copy(options)
    found.squash_owner = True
    return found
