"""vhost-user-fs daemons for tests: started on a socket, looked at from outside, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

C_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"  # Debian's qemu-system-common before trixie
PATIENCE = 10.0
# A share that is its own parent's child: no process waits for it outside of a sandbox.
ONE_PROCESS = ["--sandbox=none", "--landlock=off"]


def missing(kind: str) -> str:
    """Why a daemon cannot be started here, or an empty string."""
    if kind == "virtiofsd":
        if not os.access(C_VIRTIOFSD, os.X_OK):
            return f"{C_VIRTIOFSD} is not there (Debian: qemu-system-common)"
        if os.geteuid():
            return "the C virtiofsd runs only as root"
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
        if kind == "virtiofsd":
            # By an inherited socket: with a path, it would leave a pid file behind.
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(self.socket)
            listening.listen(1)
            inherited = (listening.fileno(),)
            command = [C_VIRTIOFSD, f"--fd={listening.fileno()}", "-o", f"source={directory},sandbox=chroot"]
            command += ["-o", "xattr,posix_lock,flock"]
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
        times = 1 if self.kind == "fusewire" else 20
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
