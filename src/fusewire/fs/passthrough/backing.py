"""FUSE_PASSTHROUGH: the kernel reads and writes the host's files itself (Linux 6.9), where the server may ask for it.

Layer `fs`, a part of `Passthrough`. It takes CAP_SYS_ADMIN in the first user namespace, which negotiation does not
tell: the first file that is opened does. All who have a file open at the same time must have it in the same way (the
kernel answers EIO otherwise), so an inode has one backing file as long as anybody has it open.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import Base
from fusewire.linux import files, syscalls
from fusewire.wire import abi

if TYPE_CHECKING:
    from fusewire.fs.passthrough.config import Config
    from fusewire.fs.passthrough.nodes import Fd, Node
    from fusewire.ops import Connection

# EPERM: no CAP_SYS_ADMIN. EOPNOTSUPP, ENOTTY: the kernel has none. ELOOP: the host's filesystem is stacked already.
_NEVER = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL})
_S_ISUID_OR_ISGID = 0o6000


class Backing(Base):
    """Backing files of nodes."""

    def __init__(self, source: int, config: Config) -> None:
        super().__init__(source, config)
        self._backs = config.passthrough and self._trusted
        self._backed = False  # it has worked once
        if self._backs:
            all_of_them = files.effective_capabilities()
            self._lower = files.capability_setter(all_of_them & ~(1 << syscalls.CAP_FSETID))
            self._raise = files.capability_setter(all_of_them)
        self._backing_lock = allocate_lock()  # over `opened` and `backing` of every node

    def init(self, connection: Connection) -> None:
        super().init(connection)
        if not connection.flags & abi.FUSE_PASSTHROUGH:
            self._backs = False

    def _backing_of(self, node: Node, fd: Fd, mode: int) -> int:
        """Count an open of a node, and give its backing id, or 0 if the file is served by us. `mode`: the file's now.

        In which way `fd` is open does not matter: the kernel opens the file once more for each of its users
        (fuse_passthrough_open), with the user's flags and the credentials of who registers it here. Those have no
        CAP_FSETID: what is written clears set-user-ID bits then, for the writes never reach us.
        """
        if not self._backs:
            return 0
        with self._backing_lock:
            node.opened += 1
            if node.opened == 1 and self._connection is not None and not mode & _S_ISUID_OR_ISGID:
                self._lower()
                try:
                    node.backing = self._connection.backing_open(fd.number)
                except OSError as error:
                    if error.errno in _NEVER and not self._backed:
                        self._backs = False
                finally:
                    self._raise()
                self._backed = self._backed or node.backing != 0
            return node.backing

    def _backing_end(self, node: Node) -> None:
        """Count the end of an open file; with the last one the backing file goes."""
        if not self._backs:
            return
        with self._backing_lock:
            node.opened -= 1
            if node.opened == 0 and node.backing:
                backing, node.backing = node.backing, 0
                if self._connection is not None:
                    self._connection.backing_close(backing)
