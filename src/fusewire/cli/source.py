"""A source on its way into a server: opened and checked where its path counts, served where there may be no paths.

Layer `cli`. What a source is, is recognised in `fs.sources`.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux.process import open_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.cli.options import MountOptions
    from fusewire.linux.sandbox_steps import Entered
    from fusewire.ops import Operations


def cache_directory(name: str) -> str | None:
    """The user's directory for what can be made again, XDG Base Directory Specification; None: there is no place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):
        home = os.environ.get("HOME", "")
        if not home.startswith("/"):
            return None
        base = os.path.join(home, ".cache")
    return os.path.join(base, "fusewire", name)


def _temporary() -> list[str]:
    """The directory that the user has for temporary files, if there is one."""
    return [os.environ["TMPDIR"]] if os.environ.get("TMPDIR", "").startswith("/") else []


def _shown_option(typed: str) -> str:
    """Give an option as it may be said aloud: `storage=` may have a key or a token."""
    key, equals, rest = typed.partition("=")
    return f"{key}={rest.partition('=')[0]}=..." if key == "storage" and equals else typed


def shown(source: str) -> str:
    """Give a source as it may be said aloud: a URL without its password."""
    if kind_of(source) != "url":
        return source
    from fusewire.fs.remote import visible

    return visible(source)


def hide_words(words: dict[str, str]) -> None:
    """Write the values over the keys in this process's own command line, which everybody can read.

    proc_pid_cmdline(5), and arg_start in proc_pid_stat(5). Children that are forked from now on have it so as well.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # there is no /proc, or it is not for us
    try:
        line = old = os.pread(fd, end - start, start) if start else b""
        for secret, said in words.items():
            known = os.fsencode(secret)
            line = line.replace(known, os.fsencode(said).ljust(len(known))[: len(known)])
        if line != old:
            os.pwrite(fd, line, start)
    except OSError:
        pass  # as above
    finally:
        os.close(fd)


def kind_of(path: str) -> str:
    """Tell what a source is by its form: "program" (MODULE:NAME), "url", or "path", which everything that exists is."""
    if ":" not in path or os.path.lexists(path):
        return "path"
    if "://" in path:
        from fusewire.fs import remote

        if remote.is_url(path):
            return "url"
    from fusewire.cli import programs

    return "program" if programs.is_program(path) else "path"


class Source:
    """What is served, and the maker of its filesystem, anew for every guest: one's handles are not the next one's.

    The source is held open, so that it stays the one that was checked, whatever its path leads to later, and can be
    served where there are no paths any more.
    """

    def __init__(self, path: str, options: MountOptions) -> None:
        """Open the source, and make the first filesystem at once: what is wrong with it is to be said now.

        Raises OSError that names the source.
        """
        self.kind = kind_of(path)
        self._name = path
        self.path = os.path.abspath(path) if self.kind == "path" else path
        self._mount = options
        self._fd = -1
        self._first_fd = -1
        self._is_directory = self.kind == "path" and os.path.isdir(self.path)
        self._first: Operations | None = None
        self._lasts = False  # the first filesystem is the only one
        # Descriptors that were open before, and are nobody's business who serves a program or a URL.
        self.strange = [] if self.kind == "path" else open_fds()
        self.workers = 0  # how many suit its filesystem; 0: it does not matter
        self.read_only = False  # as far as it is known, and so is the next
        self.checked = False  # the kernel is to check modes
        if self.kind == "url":
            self.path = shown(path)  # it is said, and put on record, as are the options
            options.given, typed = [_shown_option(one) for one in options.given], options.given
            hide_words({path: self.path, **dict(zip(typed, options.given, strict=True))})
            options.archive["spool"] = _temporary()
            return  # opened by the process that serves it: connections and threads do not survive a fork
        try:
            if self.kind == "program":
                from fusewire.cli.programs import load

                first = load(path)
            else:
                from fusewire.fs import sources

                self._fd = sources.open_fd(self.path)
                first = self._open_first()
            self._first = first
            if hasattr(first, "shared"):
                # An archive: where it will be served there are neither its index nor places for temporary files.
                self._lasts = first.shared = True
            self.workers = first.workers
            self.read_only = first.read_only
            self.checked = first.default_permissions
        except BaseException:
            self.close()
            raise

    def __call__(self) -> Operations:
        """Give a filesystem; its user ends it by `destroy`."""
        first = self._first
        if not self._lasts:
            self._first = None
        return self._open() if first is None else first

    def _open_first(self) -> Operations:
        """Open it where an index can be kept, with a word about how long that takes for who is at a terminal."""
        said = self._mount.archive
        said["cache"] = cache_directory("archives")
        said["spool"] = _temporary()
        if not os.isatty(2):
            return self._open()
        from fusewire.cli.progress import Progress

        with Progress(os.path.basename(self.path)) as progress:
            said["progress"] = progress
            try:
                return self._open()
            finally:
                del said["progress"]

    def _open(self) -> Operations:
        if self.kind == "program":
            from fusewire.cli.programs import load

            return load(self.path)
        if self.kind == "url":
            from fusewire.fs.remote import open_url

            return open_url(self._name, self._mount)
        from fusewire.fs import sources

        fd = self._first_fd = os.dup(self._fd)
        return sources.open_opened(fd, self.path, self._mount)

    @property
    def is_free(self) -> bool:
        """True if nobody can tell what files, programs and networks its server needs: it is not locked in."""
        return self.kind != "path"

    def refuse_locks(self, asked: list[str]) -> None:
        """Raise OSError for options that would lock in a server which cannot be."""
        if self.is_free and asked:
            raise OSError(errno.EOPNOTSUPP, f"{asked[0]} is not for {self.path}, which is a {self.kind}: leave it out")

    @property
    def directory(self) -> int | None:
        """The directory's descriptor; None for all else."""
        return self._fd if self._is_directory else None

    @property
    def by_handle(self) -> bool:
        """True if files of the directory may be opened by their handles."""
        return self._is_directory and self._mount.directory.get("inode_file_handles", "never") != "never"

    @property
    def files(self) -> list[int]:
        """The descriptors that have to stay, but for a directory's."""
        if self._fd < 0 or self._is_directory:
            return []
        return [self._fd, *self.files_of_first]

    @property
    def files_of_first(self) -> list[int]:
        """The descriptors of the first filesystem, in a process that has no others."""
        if self._first is None or self._is_directory:
            return []
        return list(getattr(self._first, "fds", [self._first_fd]))

    def preload(self) -> None:
        """Load what the first filesystem may need later, where it can still be found."""
        preload = getattr(self._first, "preload", None)
        if preload is not None:
            preload()

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
        """Let go of the source. Filesystems that were given out live on, but for an archive's, which is one for all."""
        if self._lasts and self._first is not None:
            self._lasts = self._first.shared = False  # type: ignore[attr-defined]
        self.drop_first()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def drop_first(self) -> None:
        """End the filesystem that showed that the source can be served."""
        if self._lasts:
            return
        first, self._first = self._first, None
        if first is not None:
            first.destroy()
