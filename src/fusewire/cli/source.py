"""A source on its way into a server: opened and checked where its path counts, served where there may be no paths.

Layer `cli`. What a source is, is recognised in `fs.sources`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.cli.options import MountOptions
    from fusewire.linux.sandbox_steps import Entered
    from fusewire.ops import Operations


def is_program(path: str) -> bool:
    """True if a source is a filesystem that is a program; the path of a file is none."""
    if ":" not in path:
        return False
    from fusewire.cli import programs

    return programs.is_program(path)


class Source:
    """What is served, and the maker of its filesystem, anew for every guest: one's handles are not the next one's.

    The source is held open, so that it stays the one that was checked, whatever its path leads to later, and can be
    served where there are no paths any more.
    """

    def __init__(self, path: str, options: MountOptions) -> None:
        """Open the source, and make the first filesystem at once: what is wrong with it is to be said now.

        Raises OSError that names the source.
        """
        self.is_program = is_program(path)
        self.path = path if self.is_program else os.path.abspath(path)
        self._mount = options
        self._fd = -1
        self._first_fd = -1
        self._is_directory = not self.is_program and os.path.isdir(self.path)
        self._first: Operations | None = None
        self.strange: list[int] = []  # descriptors that were open before a program was loaded, and are not its
        try:
            if self.is_program:
                from fusewire.cli.programs import load
                from fusewire.linux.process import open_fds

                self.strange = open_fds()
                first = load(path)
            else:
                from fusewire.fs import sources

                self._fd = sources.open_fd(self.path)
                first = self._open()
            self._first = first
            self.workers = first.workers  # how many suit it; 0: it does not matter
            self.read_only = first.read_only
        except BaseException:
            self.close()
            raise

    def __call__(self) -> Operations:
        """Give a filesystem; its user ends it by `destroy`."""
        first, self._first = self._first, None
        return self._open() if first is None else first

    def _open(self) -> Operations:
        if self.is_program:
            from fusewire.cli.programs import load

            return load(self.path)
        from fusewire.fs import sources

        fd = self._first_fd = os.dup(self._fd)
        return sources.open_opened(fd, self.path, self._mount)

    @property
    def directory(self) -> int | None:
        """The directory's descriptor; None for an image or a program."""
        return self._fd if self._is_directory else None

    @property
    def by_handle(self) -> bool:
        """True if files of the directory may be opened by their handles."""
        return self._is_directory and self._mount.directory.get("inode_file_handles", "never") != "never"

    @property
    def files(self) -> list[int]:
        """The descriptors that have to stay, but for a directory's; the last one is the first filesystem's."""
        if self._fd < 0 or self._is_directory:
            return []
        return [self._fd] if self._first is None else [self._fd, self._first_fd]

    def move_in(self, entered: Entered, *, trusted: bool) -> None:
        """Go on inside a sandbox, where a directory's descriptor stands for the new root.

        trusted: what the server may do in the first user namespace counts there.
        """
        from fusewire.linux.syscalls import CAP_SYS_ADMIN

        directory = self._mount.directory
        directory["proc"] = entered.proc
        directory["switch_ids"] = entered.switch_ids
        directory["trusted"] = trusted and bool(entered.capabilities >> CAP_SYS_ADMIN & 1)

    def let_go(self) -> None:
        """Close the source, in a process that only waits for the one that serves it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Let go of the source. Filesystems that were given out live on."""
        self.drop_first()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def drop_first(self) -> None:
        """End the filesystem that showed that the source can be served."""
        first, self._first = self._first, None
        if first is not None:
            first.destroy()
