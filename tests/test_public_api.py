"""The public surface: what `import fusewire` offers, what it costs, and what type checkers say of those who use it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusewire
import rootless

# Whoever changes this list changes what programs can rely on: say so in the change log.
PUBLIC = """
    FOREVER Attr Buffer Bytes Caller Connection Dir Entry File FileRange Lock MountError Mounted Node NodeFilesystem
    Operations Options Pending Setattr Special Statfs Symlink __version__ attr mount mounted serve_async share
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_these():
    assert sorted(fusewire.__all__) == sorted(PUBLIC.split())


def test_every_public_name_is_there_and_lives_where_it_says():
    for home, names in fusewire._HOMES.items():
        module = importlib.import_module(home)
        for name in names:
            assert getattr(fusewire, name) is getattr(module, name)
    offered = {name for names in fusewire._HOMES.values() for name in names}
    assert offered | {"__version__"} == set(fusewire.__all__)
    assert set(fusewire.__all__) <= set(dir(fusewire))


def test_type_checkers_see_the_same_names():
    import ast

    source = ast.parse(Path(fusewire.__file__).read_text())
    (block,) = [node for node in source.body if isinstance(node, ast.If)]
    imported = {node.module: {name.name for name in node.names} for node in block.body}
    assert imported == {home: set(names) for home, names in fusewire._HOMES.items()}


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fusewire' has no attribute 'mout'"):
        _ = fusewire.mout


def test_import_of_the_package_loads_nothing():
    loaded = run("import sys; before = set(sys.modules); import fusewire; print(*set(sys.modules) - before)")
    assert loaded.split() == ["fusewire"]


def test_plain_filesystem_is_mounted_without_asyncio():
    heavy = {"asyncio", "dataclasses", "inspect", "typing_extensions", "importlib.metadata"}
    loaded = run("import sys, fusewire; fusewire.mounted, fusewire.Operations; print(*sys.modules)")
    assert heavy.isdisjoint(loaded.split())
    assert "fusewire.aio" not in loaded.split()


# Type checkers

GOOD = """
import fusewire

class Plain(fusewire.Operations):
    def init(self, connection: fusewire.Connection) -> None: ...
    def lookup(self, caller: fusewire.Caller, parent: int, name: bytes) -> fusewire.Entry | None:
        return None
    def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[fusewire.Attr, float]:
        return fusewire.attr(nodeid, 0o40755), 1.0
    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> bytes:
        return b""
    def unlink(self, caller: fusewire.Caller, parent: int, name: bytes) -> None: ...

class Async(fusewire.Operations):
    async def init(self, connection: fusewire.Connection) -> None: ...
    async def destroy(self) -> None: ...
    async def forget(self, nodeid: int, nlookup: int) -> None: ...
    async def lookup(self, caller: fusewire.Caller, parent: int, name: bytes) -> fusewire.Entry | None:
        return None
    async def getattr(self, nodeid: int, flags: int, fh: int) -> tuple[fusewire.Attr, float]:
        return fusewire.attr(nodeid, 0o40755), 1.0
    async def read(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> fusewire.FileRange:
        return fusewire.FileRange(0, 0, 0)
    async def unlink(self, caller: fusewire.Caller, parent: int, name: bytes) -> None: ...
    async def create(
        self, caller: fusewire.Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[fusewire.Entry, tuple[int, int]]:
        raise PermissionError

class Later(fusewire.Operations):
    def getattr(self, nodeid: int, flags: int, fh: int) -> fusewire.Pending:
        return fusewire.Pending()

def use() -> None:
    with fusewire.mounted(Plain(), in_process=True) as m:
        path: str = m.path
        alive: bool = m.is_alive
        print(path, alive)
    fusewire.mount(Async(), "mnt", options=fusewire.Options(allow_other=True))
    fusewire.mount(fusewire.Dir(), b"mnt")
    fusewire.share(Plain, "socket", tag="tag")

async def serve() -> None:
    await fusewire.serve_async(Async(), "mnt")
"""

# Each line replaces the body of a class; what is wrong is what it gives, or how it is called.
WRONG = [
    "    def readlink(self, nodeid: int) -> str: return ''",
    "    async def readlink(self, nodeid: int) -> str: return ''",
    "    def readlink(self, nodeid: str) -> bytes: return b''",
    "    def getattr(self, nodeid: int, flags: int) -> tuple[fusewire.Attr, float]: raise OSError",
    "    async def lookup(self, caller: fusewire.Caller, parent: int, name: str) -> None: ...",
    "    async def statfs(self, nodeid: int) -> tuple[int, int]: return 1, 2",
    "    def unlink(self, caller: fusewire.Caller, parent: int, name: bytes) -> int: return 0",
]


def test_mypy_accepts_sync_and_async_overrides_and_refuses_wrong_ones(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "good.py").write_text(GOOD)
    for number, body in enumerate(WRONG):
        (tmp_path / f"wrong{number}.py").write_text(f"import fusewire\n\nclass Wrong(fusewire.Operations):\n{body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file=", "."],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(fusewire.__file__).parent.parent), "MYPY_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line and not line.startswith("/")]
    assert [line for line in errors if line.startswith("good.py")] == [], done.stdout + done.stderr
    found = {line.split(":")[0] for line in errors if "[override]" in line}
    assert found == {f"wrong{number}.py" for number in range(len(WRONG))}, done.stdout + done.stderr


# The guide

PAGE = Path(__file__).parent.parent / "docs" / "python-api.md"
BLOCKS = dict(re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
PRINTED = {
    "api_mounted.py": "['Ada.txt', 'Grace.txt']\nHello, Ada!\nHello, Grace!\n",
    "api_async.py": "unmounted\n",
}


def test_all_blocks_of_the_guide_are_run():
    assert PAGE.read_text().count("```python") == len(BLOCKS)
    assert sorted(BLOCKS) == sorted([*PRINTED, "test_api.py"])


@pytest.mark.parametrize("who", ["rootless", "root"])
@pytest.mark.parametrize("name", sorted(PRINTED))
def test_program_of_the_guide_runs(name, who):
    if who == "root" and os.geteuid() != 0:
        pytest.skip("only root can try it as root")
    rootless.open_fuse_device()
    words = rootless.rootless_python() if who == "rootless" else [sys.executable, "-W", "error"]
    done = subprocess.run([*words, "-c", BLOCKS[name]], capture_output=True, text=True, timeout=60, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, PRINTED[name], "")


def test_tests_of_the_guide_pass(tmp_path):
    from importlib.metadata import entry_points

    rootless.open_fuse_device()
    (tmp_path / "test_api.py").write_text(BLOCKS["test_api.py"])
    installed = any(point.value == "fusewire.testing.plugin" for point in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "fusewire.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *plugin, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
