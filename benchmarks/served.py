"""What the directory suite serves: a tree to walk, a repository, a large file, an archive; all of it on a tmpfs.

The same on every run. Nothing here measures.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from harness import Bench, BenchError, Server

LIMIT = 90.0  # seconds for one sample
BLOCK = 4096
_OLD = 1_600_000_000  # mtime of what was there before


class Plan(NamedTuple):
    """How much work there is. Files of the walk and the repository are in folders of `per_folder`."""

    entries: int
    stats_off: int
    stats_on: int
    passes: int
    small: int
    archive: int
    big: int
    span: int  # bytes of the file that fio reads or writes in
    blocks: int
    repository: int
    per_folder: int = 49


FULL = Plan(25_000, 20_000, 10_000, 10, 5_000, 5_000, 1 << 30, 256 << 20, 40_000, 10_000)
QUICK = Plan(5_000, 2_500, 2_500, 10, 800, 800, 256 << 20, 64 << 20, 4_000, 2_000)


class Work:
    """The tmpfs with everything that is served, and the facts about it."""

    def __init__(self, bench: Bench, kinds: set[str]) -> None:
        self.bench = bench
        self.plan = QUICK if bench.quick else FULL
        self.top = bench.temporary / "served"
        self.lists = bench.temporary / "lists"
        self.empty = bench.temporary / "empty"
        for folder in (self.top, self.lists, self.empty):
            folder.mkdir()
        bench.tmpfs(self.top, self._room())
        bench.progress.say("making what is served")
        if "tree" in kinds:
            self._make_tree()
        if "repository" in kinds:
            self._make_repository()
        if "files" in kinds:
            self._make_files()
        if "archive" in kinds:
            self._make_archive()
        (self.lists / "small").write_text("".join(f"small{i:05d}\n" for i in range(self.plan.small)))
        (self.lists / "new").write_text("new\n")
        (self.lists / "big").write_text("big\n")
        self.nobody = Server(bench, "the directory itself", self.empty)  # of clients that look without a server
        self._count = 0

    def _room(self) -> int:
        """Give the size of the tmpfs: the file that is read, the one that is written, and the small ones."""
        room = 2 * self.plan.big + self.plan.span + (512 << 20)
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        # And once more the largest file, in the page cache of the mount.
        if found is not None and int(found[1]) * 1024 < room + self.plan.big:
            raise BenchError(
                f"directory: {(room + self.plan.big) >> 20} MiB of free memory are needed; --quick takes less"
            )
        return room

    def folders(self, count: int) -> list[str]:
        """Give the names of folders for `count` files and folders in all, two levels deep."""
        number = -(-count // (self.plan.per_folder + 1))
        return [f"area{i // 25:02d}/folder{i % 25:02d}" for i in range(number)]

    def _make_tree(self) -> None:
        paths: list[str] = []
        for folder in self.folders(self.plan.entries):
            home = self.top / "tree" / folder
            home.mkdir(parents=True)
            for i in range(self.plan.per_folder):
                name = f"{folder}/file{i:02d}.txt"
                path = self.top / "tree" / name
                with path.open("wb") as file:
                    file.truncate(len(paths) % 9973)
                os.utime(path, (_OLD, _OLD + len(paths)))
                paths.append(name)
        chance = random.Random(2)
        for name, count in (("stat_off", self.plan.stats_off), ("stat_on", self.plan.stats_on)):
            chance.shuffle(paths)
            (self.lists / name).write_text("".join(f"{path}\n" for path in paths[:count]))

    def _make_repository(self) -> None:
        home = self.top / "repository"
        names: list[str] = []
        for folder in self.folders(self.plan.repository):
            (home / folder).mkdir(parents=True)
            for i in range(self.plan.per_folder):
                names.append(f"{folder}/module{i:02d}.c")
                path = home / names[-1]
                path.write_text(f"int module_{len(names)}(void) {{ return {len(names)}; }}\n")
                os.utime(path, (_OLD, _OLD))
        git = self.git(home)
        if git is None:
            return
        # The index is to hold what every server shows alike: not inode numbers and devices.
        settings = ["-c", "core.checkStat=minimal", "-c", "core.trustctime=false", "-c", "gc.auto=0"]
        author = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
        for argv in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            done = subprocess.run([*git, *settings, *author, *argv], capture_output=True, text=True)
            if done.returncode != 0:
                raise BenchError(f"git {argv[0]}: {done.stderr.strip()[-300:]}")
        with (home / ".git" / "config").open("a") as config:
            config.write("[core]\n\tcheckStat = minimal\n\ttrustctime = false\n")
        for name in names[7::997]:
            (home / name).write_text("changed\n")
        for name in names[11::1499]:
            (home / name).unlink()
        for name in names[13::1201]:
            (home / name).with_suffix(".orig").write_text("new\n")

    def git(self, home: Path) -> list[str] | None:
        """Give the beginning of a git command that heeds nobody's settings, or None without git."""
        program = shutil.which("git")
        if program is None:
            return None
        nobody = ["env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1"]
        return [*nobody, program, "--no-optional-locks", "-c", "safe.directory=*", "-C", str(home)]

    def _make_files(self) -> None:
        """A large file whose every block holds its own offset, in words of 64 bits: fio's pattern %o."""
        home = self.top / "files"
        home.mkdir()
        with (home / "big").open("wb", buffering=0) as file:
            for start in range(0, self.plan.big, 1 << 20):
                offsets = range(start, start + (1 << 20), BLOCK)
                file.write(b"".join(offset.to_bytes(8, "little") * (BLOCK // 8) for offset in offsets))

    def _make_archive(self) -> None:
        chance = random.Random(3)
        with tarfile.open(self.top / "archive.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            names: list[str] = []
            known: set[str] = set()
            for folder in self.folders(self.plan.archive):
                # Each folder before its files, so that tar sets its time when it is done with it.
                for home in (os.path.dirname(folder), folder):
                    if home not in known:
                        known.add(home)
                        member = tarfile.TarInfo(home)
                        member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, _OLD
                        archive.addfile(member)
                for i in range(self.plan.per_folder):
                    member = tarfile.TarInfo(f"{folder}/file{i:02d}.txt")
                    member.size, member.mode, member.mtime = chance.randrange(12_000), 0o644, _OLD + len(names)
                    archive.addfile(member, io.BytesIO(chance.randbytes(member.size)))
                    names.append(member.name)
        (self.lists / "untar").write_text("".join(f"{name}\n" for name in names))

    def source(self, holds: str, *, blank: bool = False) -> Path:
        """Give the directory to serve: the one of that name, or a new one; with a file of zeros in it if `blank`."""
        if holds:
            return self.top / holds
        fresh = self.scratch("work")
        if blank:
            with (fresh / "new").open("wb", buffering=0) as file:
                for _ in range(self.plan.span >> 20):
                    file.write(bytes(1 << 20))
        return fresh

    def scratch(self, name: str) -> Path:
        """Give a new directory on the tmpfs, with a number behind its name."""
        self._count += 1
        fresh = self.top / f"{name}{self._count}"
        fresh.mkdir()
        return fresh

    def look(self, *arguments: object) -> Any:
        """Run a command of client.c on what was served, without any server."""
        return self.bench.client(*arguments, server=self.nobody, limit=LIMIT)
