"""The public surface: what `import fusewire` offers, in which form, and what it costs.

`python tests/test_public_api.py` writes `public_api.txt` anew, after a change of the surface that was meant.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusewire
import rootless

# Whoever changes this file changes what programs can rely on: say so in the change log.
SURFACE = Path(__file__).with_name("public_api.txt")
BUILTINS = ("AssertionError", "OSError", "object", "tuple")
MODULES = ("fusewire", "fusewire.nodes", "fusewire.testing", "fusewire.testing.plugin")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def surface() -> list[str]:
    """A line for each public name: functions and methods with their arguments, classes with what they have."""
    lines = []
    for module in map(importlib.import_module, MODULES):
        for name in sorted(getattr(module, "__all__", ("fake_kernel", "mounted_filesystem"))):
            value = getattr(module, name)
            if module is not fusewire and getattr(fusewire, name, None) is value:
                continue
            lines.append(f"{module.__name__}.{name}" + (form(value) if name != "__version__" else ""))
            if isinstance(value, type):
                lines += sorted(f"{module.__name__}.{name}.{line}" for line in members(value))
    return lines


def members(cls: type) -> Iterator[str]:
    """What a class has itself, but for the fields of tuples, which its signature names."""
    if cls is fusewire.NodeFilesystem:
        return  # an Operations like others: to be made, and handed on
    fields = getattr(cls, "_fields", ())
    yield from (name + form(value) for name, value in vars(cls).items() if name[0] != "_" and name not in fields)
    declared = inspect.get_annotations(cls).items()
    yield from (f"{name}: {kind}" for name, kind in declared if name[0] != "_" and name not in vars(cls))


def form(value: object) -> str:
    """What programs rely on in a value: how it is called, what it is derived from, what a constant is."""
    if isinstance(value, bool | int | float | str | bytes | None):
        return f" = {value!r}"
    of, call = "", value
    if isinstance(value, type):
        of = next(
            f" of {base.__name__}" for base in value.__mro__[1:] if base.__name__ in (*fusewire.__all__, *BUILTINS)
        )
        call = value.__init__ if inspect.isfunction(value.__init__) else value
    elif not inspect.isroutine(value):
        return ""
    try:
        parameters = inspect.signature(call).parameters.values()
    except ValueError:  # an exception's
        return of
    return str(inspect.Signature([one.replace(annotation=one.empty) for one in parameters])) + of


def test_public_surface_is_this():
    assert surface() == SURFACE.read_text().splitlines(), "if it is meant to be so: python tests/test_public_api.py"


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


if __name__ == "__main__":
    SURFACE.write_text("\n".join([*surface(), ""]))
