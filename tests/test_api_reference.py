"""The API reference: Sphinx builds it without a warning, and every public name is in it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What programs may import from. `fusewire.nodes` and `fusewire` share names, which are described under the shorter one.
MODULES = {
    "fusewire": ["fusewire"],
    "fusewire.nodes": ["fusewire", "fusewire.nodes"],
    "fusewire.testing": ["fusewire.testing"],
    "fusewire.compat": ["fusewire.compat"],
    "fusewire.compat.fusepy": ["fusewire.compat.fusepy"],
    "fusewire.compat.mfusepy": ["fusewire.compat.mfusepy", "fusewire.compat.fusepy"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of HTML pages that `./dev docs DIR` makes."""
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("sphinx is not installed (pip install --group docs)")
    place = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *OPTIONS, "-d", place / "doctrees", ROOT / "docs" / "api", place / "html"],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return place / "html"


# As in ./dev: all pages, quietly, every warning an error, and names that lead nowhere are warnings.
OPTIONS = ["-b", "html", "-q", "-E", "-n", "-W", "--keep-going"]


def described(reference: Path) -> dict[str, str]:
    """All Python names of the reference, and what each is."""
    from sphinx.util.inventory import InventoryFile

    with (reference / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, name: name)
    return {name: kind for kind, names in inventory.items() if kind.startswith("py:") for name in names}


def test_every_public_name_is_in_the_reference(reference):
    names = described(reference)
    for module, homes in MODULES.items():
        for name in importlib.import_module(module).__all__:
            if name not in ("ENOTSUP", "log"):  # fusepy has these by accident: an errno, a logger
                assert any(f"{home}.{name}" in names for home in homes), f"{module}.{name}"


def test_every_operation_is_described_and_named_with_its_arguments(reference):
    import fusewire

    names = described(reference)
    methods = [name for name, value in vars(fusewire.Operations).items() if callable(value) and name[0] != "_"]
    assert len(methods) > 40
    for name in methods:
        assert names[f"fusewire.Operations.{name}"] == "py:method"
    page = (reference / "operations.html").read_text()
    assert "copy_file_range" in page
    assert "nodeid_out" in page


def test_nothing_private_is_in_the_reference(reference):
    private = [name for name in described(reference) if any(part[0] == "_" for part in name.split("."))]
    assert private == ["fusewire.__version__"]


def test_the_tool_builds_it_in_the_same_way():
    words = (ROOT / "dev").read_text()
    assert f"-m sphinx {' '.join(OPTIONS)} " in words
