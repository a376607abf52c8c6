"""Type checkers accept plain and async overrides of every method, of both levels, and refuse wrong ones where they are.

mypy --strict and pyright (or basedpyright) judge programs as people write them, and programs that are made here of the
signatures themselves: each method overridden plainly, as `async def`, and in wrong ways. `# wrong` marks the lines on
which there has to be an error; there must be none on any other.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusewire

SOURCES = str(Path(fusewire.__file__).parent.parent)

WRITTEN = """
import asyncio
from collections.abc import Iterable, Mapping

import fusewire


class Plain(fusewire.Operations):
    immutable = True

    def init(self, connection: fusewire.Connection) -> None:
        self.connection = connection

    def lookup(self, caller: fusewire.Caller, parent: int, name: bytes) -> fusewire.Entry:
        raise FileNotFoundError

    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[fusewire.Attr, int]:
        return fusewire.attr(nodeid, 0o40755), fusewire.FOREVER

    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> bytes:
        return b""

    def write(
        self, nodeid: int, fh: int, offset: int, data: memoryview, write_flags: int, lock_owner: int, flags: int
    ) -> int:
        return len(data)


class Async(fusewire.Operations):
    async def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> fusewire.FileRange:
        return fusewire.FileRange(0, 0, 0)

    async def create(
        self, caller: fusewire.Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[fusewire.Entry, tuple[int, int]]:
        raise PermissionError


class Later(fusewire.Operations):
    def readlink(self, nodeid: int) -> fusewire.Pending:
        return fusewire.Pending()


class BadOperations(fusewire.Operations):
    immutable = "yes"  # wrong

    def readlink(self, nodeid: int) -> str:  # wrong
        return ""

    async def statfs(self, nodeid: int) -> tuple[int, int]:  # wrong
        return 1, 2

    def getattr(self, nodeid: int, flags: int) -> tuple[fusewire.Attr, float]:  # wrong
        raise FileNotFoundError

    async def lookup(self, caller: fusewire.Caller, parent: int, name: str) -> None: ...  # wrong

    def unlink(self, caller: fusewire.Caller, parent: int, name: bytes) -> int:  # wrong
        return 0


class Note(fusewire.File):
    keep_cache = True

    def __init__(self, text: bytes) -> None:
        self.text = text

    @property
    def key(self) -> bytes:
        return self.text

    def size(self) -> int:
        return len(self.text)

    async def read(self, offset: int, size: int) -> bytes:
        await asyncio.sleep(0)
        return self.text[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        self.text = self.text[:offset] + data

    async def truncate(self, size: int) -> None:
        self.text = self.text[:size]


class Notes(fusewire.Dir):
    timeout = 0.5

    async def children(self) -> dict[str, fusewire.Node]:
        return {"note": Note(b""), "link": fusewire.Symlink("note"), "more": fusewire.Dir()}

    def create(self, name: bytes, mode: int) -> Note:
        return Note(b"")

    async def unlink(self, name: bytes) -> None: ...


class Table(fusewire.Dir):
    def children(self) -> Mapping[bytes, fusewire.Bytes]:
        return {b"bytes": fusewire.Bytes("text")}


class Large(fusewire.Dir):
    async def names(self) -> Iterable[bytes]:
        return [b"one"]

    async def lookup(self, name: bytes) -> fusewire.Bytes | None:
        return None


class BadFile(fusewire.File):
    mode = "0644"  # wrong

    def size(self) -> str:  # wrong
        return "1"

    async def read(self, offset: int, size: int) -> str:  # wrong
        return ""

    def write(self, data: bytes, offset: int) -> None: ...  # wrong

    async def truncate(self) -> None: ...  # wrong


class BadDir(fusewire.Dir):
    timeout = "1 s"  # wrong

    def children(self) -> list[str]:  # wrong
        return []

    async def lookup(self, name: str) -> fusewire.Node | None:  # wrong
        return None

    def create(self, name: bytes, mode: int) -> bytes:  # wrong
        return name

    async def rename(self, name: bytes, newname: bytes) -> None: ...  # wrong


def use() -> None:
    tree = fusewire.Dir({"readme": fusewire.Bytes("Hello\\n")}, docs=fusewire.Dir(), writable=True)
    tree["new"] = fusewire.Bytes()
    tree.changed(b"new", wait=True)
    with fusewire.mounted(Plain(), in_process=True) as m:
        path: str = m.path
        alive: bool = m.is_alive
        print(path, alive, m.pid + 1)
    fusewire.mount(Async(), "mnt", options=fusewire.Options(allow_other=True))
    fusewire.mount(tree, b"mnt")
    fusewire.share(Plain, "socket", tag="tag")
    fusewire.share(lambda: Notes(), "socket")
    fusewire.share(fusewire.NodeFilesystem(tree, max_timeout=1.0), "socket")


def misuse() -> None:
    fusewire.mount(Plain, "mnt")  # wrong
    fusewire.mount({"name": fusewire.Bytes()}, "mnt")  # wrong
    fusewire.mounted(Plain(), options="allow_other")  # wrong
    fusewire.Bytes(1)  # wrong
    fusewire.Dir({1: fusewire.Bytes()})  # wrong
    fusewire.Dir()["name"] = b"text"  # wrong


async def serve() -> None:
    await fusewire.serve_async(Async(), "mnt")
"""

HEAD = """
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

from fusewire import Connection, Dir, Node, Operations, Pending, Symlink, File
from fusewire.ops import Attr, Buffer, Caller, Entry, FileRange, Lock, Setattr, Statfs

class Other: ...
"""


def parts(union: str) -> list[str]:
    """Split `A | B[C | D]` into A and B[C | D]."""
    found, depth = [""], 0
    for letter in union:
        depth += (letter == "[") - (letter == "]")
        if letter == "|" and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def kinds(annotation: str) -> tuple[str, str | None, bool]:
    """What a plain override gives, what an async one gives if there may be one, and whether it may be `Pending`."""
    inner = re.fullmatch(r"(Answer|Eventual)\[(.*)\]", annotation)
    if inner:
        return inner[2], inner[2], inner[1] == "Answer"
    plain = [part for part in parts(annotation) if not part.startswith("Awaitable[")]
    awaited = [part[len("Awaitable[") : -1] for part in parts(annotation) if part not in plain]
    return " | ".join(plain), awaited[0] if awaited else None, False


def overrides() -> Iterator[str]:
    """A class for each way to override each method."""
    number = 0
    for base in (fusewire.Operations, fusewire.Node, fusewire.Dir, fusewire.File, fusewire.Symlink):
        for name, method in vars(base).items():
            if name[0] == "_" or not inspect.isfunction(method):
                continue
            signature = inspect.signature(method)
            plain, awaited, later = kinds(signature.return_annotation)
            if awaited is None and base is not fusewire.Operations:
                continue  # for the program to call, not to override
            given = [str(one) for one in list(signature.parameters.values())[1:]]
            ways = [("def", given, plain, "")]
            ways.append(("async def", given, awaited or plain, "" if awaited else "  # wrong"))
            if later:
                ways.append(("def", given, "Pending", ""))
            if "object" not in plain:
                ways += [("def", given, "Other", "  # wrong"), ("async def", given, "Other", "  # wrong")]
            if given:
                ways.append(("def", given[:-1], plain, "  # wrong"))
            for place in range(len(given)):
                other = [*given[:place], given[place].partition(":")[0] + ": Other", *given[place + 1 :]]
                ways.append(("def", other, plain, "  # wrong"))
            for how, takes, gives, mark in ways:
                number += 1
                yield f"class C{number}({base.__name__}):"
                yield f"    {how} {name}({', '.join(['self', *takes])}) -> {gives}:{mark}"
                yield "        raise OSError"


def marked(text: str) -> set[int]:
    return {number for number, line in enumerate(text.splitlines(), 1) if line.endswith("# wrong")}


def mypy(place: Path) -> set[tuple[str, int]]:
    pytest.importorskip("mypy", reason="mypy is not installed (pip install --group check)")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "."],
        cwd=place,
        env={**os.environ, "MYPYPATH": SOURCES, "MYPY_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    print(done.stdout + done.stderr)
    assert done.returncode in (0, 1)
    found = re.findall(r"^(\w+\.py):(\d+): error:", done.stdout, re.MULTILINE)
    return {(name, int(line)) for name, line in found}


def pyright(place: Path) -> set[tuple[str, int]]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    tool = shutil.which("basedpyright", path=path) or shutil.which("pyright", path=path)
    if tool is None:
        pytest.skip("neither basedpyright nor pyright is installed (pip install --group check)")
    # What is unused is no matter of types.
    config = {"typeCheckingMode": "strict", "extraPaths": [SOURCES], "reportUnusedImport": False}
    (place / "pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        [tool, "--outputjson", "--pythonpath", sys.executable], cwd=place, capture_output=True, text=True, timeout=100
    )
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] == 2, done.stdout + done.stderr
    found = set()
    for one in answer["generalDiagnostics"]:
        if one["severity"] == "error":
            name, line = Path(one["file"]).name, one["range"]["start"]["line"] + 1
            print(f"{name}:{line}: {one['message']}")
            found.add((name, line))
    return found


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_checkers_accept_plain_and_async_overrides_and_refuse_wrong_ones(checker, tmp_path):
    files = {"written.py": WRITTEN, "made.py": "\n".join([HEAD, *overrides()])}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = checker(tmp_path)
    expected = {(name, line) for name, text in files.items() for line in marked(text)}
    lines = {name: text.splitlines() for name, text in files.items()}
    assert sorted(f"{name}: {lines[name][line - 1]}" for name, line in found - expected) == []
    assert sorted(f"{name}: {lines[name][line - 1]}" for name, line in expected - found) == []
