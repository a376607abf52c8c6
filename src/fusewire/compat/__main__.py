"""`python -m fusewire.compat PROGRAM ARGUMENTS`: run a program that imports fuse or mfusepy, with ours in their place.

Layer `compat`. PROGRAM is a Python file, or the name of a command on PATH that is one (what pip installs for an entry
point); `-m MODULE` runs a module. The program sees the arguments and the import path that it would have by itself.
"""

from __future__ import annotations

import os
import sys

from fusewire.compat import install

USAGE = """usage: python -m fusewire.compat PROGRAM [ARGUMENT ...]
       python -m fusewire.compat -m MODULE [ARGUMENT ...]

Run a Python program that uses fusepy or mfusepy without libfuse: both are served by Fusewire.
PROGRAM is a Python file or a command on PATH that is one."""


def _find(program: str) -> str:
    """Give the path of a program as a shell would find it, or a file of the working directory as `python` does."""
    if "/" in program or os.path.isfile(program):
        return program
    import shutil

    return shutil.which(program) or program


def _refusal(path: str) -> str | None:
    """Say why a file cannot be run here, if so: only Python sees what was put in the place of fuse."""
    try:
        with open(path, "rb") as file:
            line, second = file.readline(256), file.readline(256)
    except IsADirectoryError:
        return None  # with a __main__.py in it
    except OSError as error:
        return f"{path}: {error.strerror}; name a Python file, a command on PATH, or -m MODULE"
    python = b"python" in line or b"pypy" in line or second.startswith(b"'''exec' ")  # pip's, of a long path
    if line.startswith(b"\x7fELF") or (line.startswith(b"#!") and not python and not path.endswith(".py")):
        return f"{path} is no Python program; run the Python file or module (-m) that it starts"
    return None


def main(arguments: list[str]) -> int:
    """Run what the arguments name; give the exit status if it ends without one of its own."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    import runpy

    if arguments[0] == "-m":
        if len(arguments) < 2:
            print("fusewire.compat: -m needs the name of a module", file=sys.stderr)
            return 2
        install()
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return 0
    path = _find(arguments[0])
    if refusal := _refusal(path):
        print(f"fusewire.compat: {refusal}", file=sys.stderr)
        return 2
    install()
    sys.argv = [path, *arguments[1:]]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(path))  # where `python -m` has put the working directory
    runpy.run_path(path, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
