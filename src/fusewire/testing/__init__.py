"""Public fakes for tests of filesystems, and the lists of behaviours that every one of them has to show.

Layer `testing`, above everything but the command line; nothing that serves a mount imports it. `FakeKernel` drives a
session as bytes. `READ_ONLY` holds checks for a directory that is mounted read-only; `BEHAVIOURS` has what a filesystem
that can be written to does just as the host's own directories do, and `compare` looks whether it does.

Each name is loaded when it is first used: pytest imports this package in every run, for the plugin in it.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.testing.conformance import BEHAVIOURS, compare
    from fusewire.testing.kernel import FakeKernel, InitReply
    from fusewire.testing.observe import Behaviour
    from fusewire.testing.read_only import READ_ONLY
    from fusewire.testing.replies import (
        OFFERED,
        BadReply,
        Dirent,
        body_of,
        check_reply,
        flatten,
        parse_dirents,
        parse_entry,
        request,
    )

__all__ = [
    "BEHAVIOURS",
    "OFFERED",
    "READ_ONLY",
    "BadReply",
    "Behaviour",
    "Dirent",
    "FakeKernel",
    "InitReply",
    "body_of",
    "check_reply",
    "compare",
    "flatten",
    "parse_dirents",
    "parse_entry",
    "request",
]

_HOMES = {
    "conformance": ("BEHAVIOURS", "compare"),
    "kernel": ("FakeKernel", "InitReply"),
    "observe": ("Behaviour",),
    "read_only": ("READ_ONLY",),
    "replies": (
        *("OFFERED", "BadReply", "Dirent", "body_of", "check_reply", "flatten", "parse_dirents", "parse_entry"),
        "request",
    ),
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that it lives in (PEP 562)."""
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            found: object = getattr(import_module(f"fusewire.testing.{home}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'fusewire.testing' has no attribute {name!r}")
