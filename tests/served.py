"""The beginning of a program that mounts in namespaces of its own, and serves from a child, as root or as nobody.

PROGRAM = served.mounted(flags="syscalls.MS_RDONLY", make="...; filesystem = ...") + what looks at `place`
"""

from __future__ import annotations

_HEAD = r"""
import hashlib, json, os, stat, subprocess, sys, threading
from fusewire.linux import mount_base, syscalls, userns
given = json.loads(sys.argv[1])
userns.enter(userns.default_plan())
place = given["place"]
syscalls.mount(b"tmpfs", place.encode(), b"tmpfs", 0, b"mode=755")
place += "/mnt"
os.mkdir(place)
fd = mount_base.open_device()
options = mount_base.Options(default_permissions=True%s)
mount_base.mount_by_string(fd, place.encode(), options)
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        os.close(reader)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
        from fusewire.cli.options import parse
        from fusewire.serve import Server
%s
        server = Server(filesystem, fd)
        server.start()
        if server.wait_ready(20):
            os.write(writer, b"+")
            server.wait()
            status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
os.close(writer)
os.close(fd)
assert os.read(reader, 1) == b"+"
"""


def mounted(make: str, flags: str = "") -> str:
    """Give the program up to where `place` is served by `pid`; `make`: lines that make `filesystem` in the child."""
    lines = "\n".join(f"        {line}" for line in make.strip().splitlines())
    return _HEAD % (f", flags={flags}" if flags else "", lines)
