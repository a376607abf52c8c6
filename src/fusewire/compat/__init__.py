"""Programs written for other FUSE libraries, run unchanged: `fusewire.compat.fusepy` and `fusewire.compat.mfusepy`.

Layer `compat`, above serve and the mount strategies; nothing below knows of it. Three ways in, by how much of a program
may be changed: `import fusewire.compat.fusepy as fuse`; `fusewire.compat.install()` before the program is imported;
`python -m fusewire.compat PROGRAM ARGUMENTS` with no change at all.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# What programs import -> the module of ours. `fusepy` is what some systems call their package of fuse.py.
_STANDS_IN = {"fuse": "fusepy", "fusepy": "fusepy", "mfusepy": "mfusepy"}

__all__ = ["install"]


def install(names: Iterable[str] = ("fuse", "fusepy", "mfusepy")) -> None:
    """Have `import NAME` give our module, for the rest of this process; what was imported before keeps what it has.

    Raises ValueError for a name that none of our modules stands in for.
    """
    import sys
    from importlib import import_module

    wanted = list(names)
    for name in wanted:
        if name not in _STANDS_IN:
            raise ValueError(f"nothing stands in for a module {name!r}: choose from {', '.join(_STANDS_IN)}")
    for name in wanted:
        sys.modules[name] = import_module(f"fusewire.compat.{_STANDS_IN[name]}")
