"""Programs that mount by another library's interface, run by a user who may do nothing, and that user's shell."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import rootless

PATIENCE = 30.0


@contextlib.contextmanager
def user_directory() -> Iterator[Path]:
    """A directory of the user's, below a path that everybody can reach."""
    place = Path(tempfile.mkdtemp(prefix="fusewire-compat-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            os.chown(place, rootless.NOBODY, rootless.NOBODY)
        place.chmod(0o755)
        yield place
    finally:
        for name in os.listdir(place):  # a test that failed may have left a mount
            if os.path.islink(place / name) and (words := os.readlink(place / name).split("/"))[1] == "proc":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(words[2]), signal.SIGTERM)
                    Program.gone(int(words[2]))
        shutil.rmtree(place)


def _words(root: bool, site: Path | None, fusermount: bool = False) -> list[str]:
    """What begins a command line: become that user, with a clean environment; ends before the interpreter."""
    words = rootless.rootless_python(fusermount=fusermount)[:-2]  # no `-W error`: the programs are not ours
    start = words.index("env") if root else 0
    found = [word for word in words[start:-1] if not word.startswith("PYTHONPATH=")]
    path = next(word for word in words if word.startswith("PYTHONPATH="))
    return [*found, path + (f":{site}" if site else ""), f"PYTHON={words[-1]}"]


def as_user(script: str, home: Path, *, fusermount: bool = False) -> str:
    """Give what a shell script of the user's prints; `$PYTHON` is an interpreter that has fusewire."""
    words = [*_words(False, None, fusermount), "sh", "-c", script]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Program:
    """A Python program of the user's (or root's): `python ARGUMENTS`, in a directory. Its end is awaited, or made."""

    def __init__(
        self,
        arguments: Sequence[str],
        home: Path,
        *,
        root: bool = False,
        site: Path | None = None,
        fusermount: bool = False,
    ) -> None:
        words = _words(root, site, fusermount)
        python = words[-1].partition("=")[2]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [*words, python, *arguments],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.home = home
        self.errors = ""
        self.returncode: int | None = None

    def line(self) -> str:
        """Wait for a line that it prints."""
        assert self._process.stdout is not None
        with self._patience():
            line = self._process.stdout.readline()
        assert line, f"it ended with status {self._process.wait(PATIENCE)}: {self._read_errors()}"
        return line.rstrip("\n")

    def lines(self) -> list[str]:
        """Give all that it prints from now on, until its end or until it has left for the background."""
        assert self._process.stdout is not None
        with self._patience():
            return self._process.stdout.read().splitlines()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """End the program if it says nothing for too long."""
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def say(self, line: str) -> None:
        """Give it a line to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def mounted(self, target: Path) -> None:
        """Wait until something is mounted there by a namespace, whose link appears."""
        from fusewire.linux import files

        fd = files.inotify_init()
        try:
            files.inotify_add_watch(fd, os.fsencode(target.parent), 0x100 | 0x80)  # IN_CREATE, IN_MOVED_TO
            while not target.is_symlink():
                ready = select.select([fd], [], [], PATIENCE)[0]
                assert ready, f"nothing was mounted: {self._read_errors()}"
                assert self._process.poll() is None, self._read_errors()
                os.read(fd, 65536)
        finally:
            os.close(fd)

    def ready(self) -> None:
        """Wait for the line `ready`, and for the mount `mnt`."""
        assert self.line() == "ready"
        self.mounted(self.home / "mnt")

    def end(self) -> None:
        """Send it what Ctrl-C sends."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it as violently as can be."""
        self._process.kill()

    def wait(self) -> int:
        """Wait for its end; gives its status."""
        return self._process.wait(PATIENCE)

    def children(self) -> list[int]:
        """Give the processes that it has started."""
        pid = self._process.pid
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    @staticmethod
    def gone(pid: int) -> None:
        """Wait for the end of a process that is not ours."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} goes on"
        finally:
            os.close(fd)

    def assert_no_libfuse(self) -> None:
        """Fail if it has loaded any libfuse."""
        maps = Path(f"/proc/{self._process.pid}/maps").read_text()
        assert "libfuse" not in maps
        assert "python" in maps

    def _read_errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is not None and self._process.poll() is None:
                self._process.kill()
            self._process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        finally:
            self.returncode = self._process.returncode
            self.errors = self._read_errors()
            self._errors.close()
