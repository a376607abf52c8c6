"""vhost-user-fs daemons for tests: started on a socket, looked at from outside, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Where Debian keeps the peers: the C one is QEMU's own, up to Debian 12; the Rust one followed it.
PEERS = {"virtiofsd": "/usr/lib/qemu/virtiofsd", "virtiofsd-rust": "/usr/libexec/virtiofsd"}
PATIENCE = 10.0
# A share that is its own parent's child: no process waits for it outside of a sandbox.
ONE_PROCESS = ["--sandbox=none", "--landlock=off"]


def missing(kind: str) -> str:
    """Why a daemon cannot be started here, or an empty string."""
    if kind in PEERS:
        # Debian 13 has a link to the Rust one where the C one was.
        if not os.access(PEERS[kind], os.X_OK) or os.path.islink(PEERS[kind]):
            return f"{PEERS[kind]} is not there (Debian 12: qemu-system-common, C; Debian 13: virtiofsd, Rust)"
        if os.geteuid():
            return "virtiofsd is started here only by root"
        return ""
    tried = subprocess.run([sys.executable, "-m", "fusewire", "share", "--help"], capture_output=True, timeout=60)
    return "" if tried.returncode == 0 else "there is no `fusewire share`"


class Daemon:
    """A running daemon that shares `directory` on `socket`."""

    def __init__(self, kind: str, directory: Path, place: Path, options: Sequence[str] = ()) -> None:
        """Start it; `place` is where its socket and its log go."""
        self.kind = kind
        self.directory = directory
        self.socket = str(place / "share.sock")
        self.log = place / "daemon.log"
        inherited = ()
        listening = None
        if kind in PEERS:
            # By an inherited socket: with a path, the C one would leave a pid file behind.
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(self.socket)
            listening.listen(1)
            inherited = (listening.fileno(),)
            command = [PEERS[kind], f"--fd={listening.fileno()}"]
            if kind == "virtiofsd":
                command += ["-o", f"source={directory},sandbox=chroot", "-o", "xattr,posix_lock,flock"]
            else:
                command += [f"--shared-dir={directory}", "--sandbox=chroot", "--xattr"]
        else:
            command = [sys.executable, "-m", "fusewire", "share", str(directory), "--socket-path", self.socket]
            command += ONE_PROCESS
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=inherited
            )
        if listening is not None:
            listening.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def descriptors(self) -> dict[str, str]:
        """What the daemon has open."""
        found = {}
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                found[name] = os.readlink(f"/proc/{self.pid}/fd/{name}")
            except FileNotFoundError:
                continue
        return found

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it and give its status."""
        # The C virtiofsd misses a signal that comes right before it waits for its connection: it gets another one.
        times = 20 if self.kind == "virtiofsd" else 1
        for _ in range(times):
            if self.alive():
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(number)
            try:
                return self.process.wait(PATIENCE / times)
            except subprocess.TimeoutExpired:
                continue
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the daemon did not end by signal {number}:\n{self.output()}")
