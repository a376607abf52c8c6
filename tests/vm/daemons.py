"""Daemons for guests: any that takes `--fd`, as virtiofsd does, on a socket that listens already.

    with Daemon(["virtiofsd", "--fd={fd}", "-o", "source=/srv"]) as daemon, Guest([Share(daemon.path)]) as guest:

The socket is made here and handed on, so nobody has to wait until the daemon has made its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

PATIENCE = 10.0  # seconds until a daemon that was asked to end is killed
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


class Daemon:
    """A process that serves one socket, `path`. `{fd}` in its words becomes the number of the listening descriptor.

    It ends with the thread that started it. What it says is kept in a file for `said`.
    """

    def __init__(self, words: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="fusewire-vm-", dir="/tmp"))  # the path of a socket is short
        self._directory.chmod(0o755)
        self.path = self._directory / "socket"
        with socket.socket(socket.AF_UNIX) as listener, (self._directory / "said").open("wb") as said:
            listener.bind(str(self.path))
            self.path.chmod(0o666)
            listener.listen()
            fd = listener.fileno()
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *[os.fspath(word).replace("{fd}", str(fd)) for word in words]],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[fd],
                env=None if env is None else {**os.environ, **env},
            )

    def said(self) -> str:
        """What it has written on standard output and standard error."""
        return (self._directory / "said").read_text(errors="replace")

    @property
    def server(self) -> int:
        """The process that serves: in a sandbox it is a descendant of the one that was started."""
        found = self.process.pid
        while children := Path(f"/proc/{found}/task/{found}/children").read_text().split():
            found = int(children[0])
        return found

    def descriptors(self) -> list[str]:
        """What the server has open, as proc(5) tells it; in a mount namespace of its own, by the paths there."""
        found = []
        server = self.server
        for name in os.listdir(f"/proc/{server}/fd"):
            try:
                found.append(os.readlink(f"/proc/{server}/fd/{name}"))
            except FileNotFoundError:
                continue
        return sorted(found)

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        """End it as a service manager does and remove everything; gives its exit status."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self.kill()
            return self.process.wait()
        finally:
            shutil.rmtree(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def virtiofsd_missing() -> str:
    """What this machine lacks for `virtiofsd`; "" if nothing."""
    if not os.path.exists(VIRTIOFSD):
        return f"{VIRTIOFSD} is missing (Debian 12: package qemu-system-common)"
    return "" if os.geteuid() == 0 else "virtiofsd has to be started by root"


def virtiofsd(directory: Path, *options: str) -> Daemon:
    """QEMU's own daemon, to compare with: the C one, that QEMU had before 8.0. `options`: of its -o."""
    return Daemon([VIRTIOFSD, "--fd={fd}", "-o", ",".join([f"source={directory}", "sandbox=chroot", *options])])


def share(source: str | os.PathLike[str], *options: str, within: Sequence[str] = ()) -> Daemon:
    """Ours: `fusewire share`. Warnings of Python's are errors. `within`: words that start it, where not just here."""
    command = [sys.executable, "-W", "error", "-m", "fusewire", "share", source, "--fd={fd}"]
    return Daemon([*within, *command, *options])


# With CAP_SYS_ADMIN, for trusted attributes, as the C virtiofsd is started here too.
FULL = ("--modcaps=+sys_admin",) if os.geteuid() == 0 else ()


def fusewire(source: str | os.PathLike[str], *options: str) -> Daemon:
    """Ours, with all that a guest may be given."""
    return share(source, *FULL, *options)


# What a container without CAP_SYS_ADMIN leaves its root.
CONTAINED = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,net_bind_service,net_raw,sys_chroot,mknod,setfcap"
# What the filter of its engine refuses, then.
REFUSED = """unshare setns mount umount2 pivot_root mount_setattr open_tree move_mount fsopen fsconfig fsmount fspick
    open_by_handle_at bpf quotactl sethostname setdomainname"""
CONTAINER = f"""
import ctypes, os, sys
library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
def refuse(name, number):
    call = library.seccomp_syscall_resolve_name(name.encode())
    assert library.seccomp_rule_add_array(context, 0x50000 | number, call, 0, None) == 0, name
for name in {REFUSED.split()}:
    refuse(name, {errno.EPERM})
refuse("clone3", {errno.ENOSYS})
assert library.seccomp_load(context) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""


def container() -> list[str]:
    """Words that start a program as the root of a container without CAP_SYS_ADMIN, where no namespace can be made."""
    drop = ["setpriv", "--bounding-set", "-all,+" + CONTAINED.replace(",", ",+"), "--"]
    return [*drop, sys.executable, "-c", CONTAINER]


def fusewire_virtiofsd(*options: str) -> Daemon:
    """Ours by virtiofsd's command line, which all of `options` are of."""
    return Daemon([sys.executable, "-W", "error", "-m", "fusewire.cli.virtiofsd", "--fd={fd}", *options])
