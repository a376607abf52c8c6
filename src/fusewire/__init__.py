"""Fusewire: filesystems in Python, mounted without root.

The public surface, `__all__`. Each name is loaded from its module when it is first used, so that `import fusewire`
costs nothing on the command line's way to a mount.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.linux.mount import MountError
    from fusewire.linux.mount_base import Options
    from fusewire.loops import serve_async
    from fusewire.mounts import mount, mounted, share
    from fusewire.mounts_held import Mounted
    from fusewire.nodes import Bytes, Dir, File, Node, NodeFilesystem, Special, Symlink
    from fusewire.ops import (
        FOREVER,
        Attr,
        Buffer,
        Caller,
        Connection,
        Entry,
        FileRange,
        Lock,
        Operations,
        Pending,
        Setattr,
        Statfs,
        attr,
    )

__version__ = "0.1.0"

__all__ = [
    "FOREVER",
    "Attr",
    "Buffer",
    "Bytes",
    "Caller",
    "Connection",
    "Dir",
    "Entry",
    "File",
    "FileRange",
    "Lock",
    "MountError",
    "Mounted",
    "Node",
    "NodeFilesystem",
    "Operations",
    "Options",
    "Pending",
    "Setattr",
    "Special",
    "Statfs",
    "Symlink",
    "__version__",
    "attr",
    "mount",
    "mounted",
    "serve_async",
    "share",
]

_HOMES = {
    "fusewire.linux.mount": ("MountError",),
    "fusewire.linux.mount_base": ("Options",),
    "fusewire.loops": ("serve_async",),
    "fusewire.mounts": ("mount", "mounted", "share"),
    "fusewire.mounts_held": ("Mounted",),
    "fusewire.nodes": ("Bytes", "Dir", "File", "Node", "NodeFilesystem", "Special", "Symlink"),
    "fusewire.ops": (
        *("FOREVER", "Attr", "Buffer", "Caller", "Connection", "Entry", "FileRange", "Lock", "Operations", "Pending"),
        *("Setattr", "Statfs", "attr"),
    ),
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that it lives in (PEP 562)."""
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            found: object = getattr(import_module(home), name)
            globals()[name] = found  # the next use does not come here
            return found
    raise AttributeError(f"module 'fusewire' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Give the public names too that nobody has used yet."""
    return sorted({*globals(), *__all__})
