"""A host directory as a filesystem: every operation that Linux offers, for local mounts and for virtual machines.

Layer `fs`. It is written for a client that lies: names are single components, descriptors stand for inodes, symbolic
links are data, and nothing but files and directories is ever opened. Who may do what is the kernel's to check, the
mount's own (default_permissions) and the host's.
"""

from __future__ import annotations

import os

from fusewire.fs.passthrough.config import MODES, Config
from fusewire.fs.passthrough.data import Data
from fusewire.fs.passthrough.directories import Directories
from fusewire.fs.passthrough.ioctls import Ioctls
from fusewire.wire import abi

__all__ = ["MODES", "Config", "Passthrough", "open_directory"]


class Passthrough(Directories, Ioctls, Data):
    """Mirrors the directory `source`, an O_PATH descriptor that it takes over."""

    def __init__(self, source: int, config: Config | None = None) -> None:
        """Begin. Raises OSError where the options ask for what the server may not do; ValueError for bad rules."""
        config = config or Config()
        super().__init__(source, config)
        self.want = self._wanted()
        if not config.readdirplus:
            self.refuse |= abi.FUSE_DO_READDIRPLUS
        if not config.posix_lock:
            self.refuse |= abi.FUSE_POSIX_LOCKS
        if not config.flock:
            self.refuse |= abi.FUSE_FLOCK_LOCKS

    def _wanted(self) -> int:
        config = self.config
        want = abi.FUSE_SUBMOUNTS | abi.FUSE_CREATE_SUPP_GROUP | abi.FUSE_READDIRPLUS_AUTO
        if config.writeback:
            want |= abi.FUSE_WRITEBACK_CACHE
        if config.posix_acl:
            want |= abi.FUSE_POSIX_ACL | abi.FUSE_DONT_MASK
        if config.security_label:
            want |= abi.FUSE_SECURITY_CTX
        if self._backs:
            want |= abi.FUSE_PASSTHROUGH
        if config.killpriv_v2:
            want |= abi.FUSE_HANDLE_KILLPRIV_V2
        if config.allow_mmap:
            want |= abi.FUSE_DIRECT_IO_ALLOW_MMAP
        return want


def open_directory(path: str | bytes, config: Config | None = None) -> Passthrough:
    """Serve the directory `path`. Raises OSError that names it, ValueError for bad options."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Passthrough(fd, config)
    except BaseException:
        os.close(fd)
        raise
