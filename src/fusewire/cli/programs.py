"""Filesystems that are programs: `module:Name` on the command line, or the name that a package has given to its own.

Layer `cli`. What is named here is run, with the rights of whoever named it.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fusewire.ops import Operations

GROUP = "fusewire.filesystems"
"""The group of entry points. One is a callable that gives a filesystem for what stands behind `NAME:`, a text."""


def is_program(source: str) -> bool:
    """True if `source` is MODULE:NAME, or begins with a package's NAME and a colon, and is no file."""
    module, colon, name = source.partition(":")
    if not colon or name.startswith("//") or os.path.lexists(source):
        return False
    return (_are_names(module) and _are_names(name)) or _entry_point(module) is not None


def load(source: str) -> Operations:
    """Make the filesystem. Modules are looked for in the working directory too.

    Raises OSError that names what is wrong with it; what its own code raises passes through.
    """
    module, _, name = source.partition(":")
    point = _entry_point(module)
    if point is not None:
        found = point.load()(name)
    else:
        found = _attribute(module, name)
        if callable(found):
            found = _called(found, source)
    from fusewire.mounts import as_operations

    try:
        return as_operations(found)
    except TypeError as error:
        raise OSError(errno.EINVAL, f"{source}: {error}") from error


def _called(maker: Any, source: str) -> Any:
    try:
        return maker()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # its own code has failed
        way = "name an object, or something that can be called without arguments"
        raise OSError(errno.EINVAL, f"{source}: {error} - {way}") from error


def _are_names(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _entry_point(name: str) -> Any:
    if not name.isidentifier():
        return None
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP, name=name):
        return point
    return None


def _attribute(module: str, name: str) -> Any:
    from importlib import import_module

    if "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something else that it needs is missing
        raise OSError(errno.ENOENT, f"there is neither a file {module}:{name} nor a module {module}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise OSError(errno.ENOENT, f"the module {module} has no {name}") from error
    return found
