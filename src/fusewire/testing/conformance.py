"""The conformance list: `BEHAVIOURS`, and `compare`, which holds one of them against a directory of the host.

Layer `testing`. Each behaviour does the same plain system calls in two directories, one of the filesystem under test
and one of a filesystem that is believed (the oracle: tmpfs, ext4), and the transcripts have to be equal.
`python -m fusewire.testing` runs the list.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from fusewire.testing import (
    conformance_attributes,
    conformance_data,
    conformance_directories,
    conformance_locks,
    conformance_names,
    conformance_open,
    conformance_space,
    conformance_special,
    conformance_xattrs,
)
from fusewire.testing.observe import Behaviour, plain

BEHAVIOURS: dict[str, Behaviour] = {
    behaviour.name: behaviour
    for module in (
        conformance_open,
        conformance_data,
        conformance_space,
        conformance_names,
        conformance_directories,
        conformance_attributes,
        conformance_xattrs,
        conformance_locks,
        conformance_special,
    )
    for behaviour in module.BEHAVIOURS
}
"""Name -> behaviour, in the order of the subjects."""


def compare(behaviour: Behaviour, under_test: str, oracle: str) -> None:
    """Run a behaviour in new directories below both, which are removed afterwards, and compare the transcripts.

    Raises AssertionError with what differs.
    """
    theirs = transcript(behaviour, oracle)
    try:
        ours = transcript(behaviour, under_test)
    except OSError as error:
        raise AssertionError(f"{behaviour.name}: {error}") from error
    found = differences(ours, theirs)
    if found:
        raise AssertionError("\n".join([f"{behaviour.name}: under test, then oracle", *found[:30]]))


def transcript(behaviour: Behaviour, place: str) -> Any:
    """Run a behaviour in a new directory below `place` and give its transcript as JSON has it."""
    root = os.path.join(os.path.abspath(place), behaviour.name)
    umask = os.umask(0o022)
    before = _descriptors()
    try:
        os.mkdir(root)
        try:
            result = json.loads(json.dumps(plain(behaviour.run(root))))
        finally:
            _remove(root)
    finally:
        os.umask(umask)
    left = _descriptors() - before
    assert not left, f"{behaviour.name} left descriptors open: {sorted(left)}"
    return result


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _remove(root: str) -> None:
    for directory, directories, _ in os.walk(root):
        for name in directories:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(root)


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Tell, line by line, where two transcripts differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = list(dict.fromkeys([*theirs, *ours]))
        pairs = [(key, ours.get(key, "(nothing)"), theirs.get(key, "(nothing)")) for key in keys]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(str(index), one, other) for index, (one, other) in enumerate(zip(ours, theirs, strict=True))]
    elif ours == theirs and type(ours) is type(theirs):
        return []
    else:
        return [f"  at {where or 'the top'}: {ours!r}", f"     {' ' * len(where or 'the top')}  {theirs!r}"]
    return [line for key, one, other in pairs for line in differences(one, other, f"{where}[{key}]")]
