"""Level 2 of the API: a filesystem as a tree of nodes: `Dir`, `File`, `Bytes`, `Symlink`, `Special`.

Layer `nodes`: above ops and inodes, below every filesystem; no I/O of its own. `NodeFilesystem` serves a tree as
`Operations`, and `as_operations` takes either. Names are bytes (str is taken and encoded); a method of a node may be
`async def`. What a node gives is documented in base.py, files.py and directories.py, in that order.
"""

from __future__ import annotations

from fusewire.nodes.base import Node, Special, Symlink
from fusewire.nodes.directories import Dir
from fusewire.nodes.files import Bytes, File
from fusewire.nodes.filesystem import NodeFilesystem, as_operations
from fusewire.ops import FOREVER

__all__ = ["FOREVER", "Bytes", "Dir", "File", "Node", "NodeFilesystem", "Special", "Symlink", "as_operations"]
