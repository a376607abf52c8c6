"""A played kernel for trees of nodes: it waits for notifications, and fails where the filesystem complains."""

from __future__ import annotations

import threading

import pytest

from fusewire.nodes import Bytes, Dir, NodeFilesystem
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.wire import abi, codec

INODE = abi.FUSE_NOTIFY_INVAL_INODE


def fails(number, function, *arguments, **options):
    with pytest.raises(OSError) as caught:
        function(*arguments, **options)
    assert caught.value.errno == number, caught.value


class Kernel(FakeKernel):
    """One that can wait for notifications, and fails where the filesystem had something to complain of."""

    def __init__(self, root, *, complains=False, **options) -> None:
        self.said: list[str] = []
        self.told = threading.Condition()

        def log(message, error):
            self.said.append(f"{message}: {error!r}" if error is not None else message)
            if not complains:
                raise AssertionError(message) from error

        self.filesystem = NodeFilesystem(root, **options)
        super().__init__(Session(self.filesystem, log=log), uid=1000, gid=1000)
        self.init()

    def _receive(self, buffers) -> None:
        super()._receive(buffers)
        with self.told:
            self.told.notify_all()

    def notices(self, count: int) -> set:
        """Wait for so many notifications and give them: (node,) or (node, name)."""
        with self.told:
            assert self.told.wait_for(lambda: len(self.notifications) >= count, 20)
        found, self.notifications = self.notifications, []
        assert len(found) == count
        for code, body in found:  # names are only expired: a directory that is in use keeps its name
            assert code == INODE or codec.U32.unpack_from(body, 12)[0] == abi.FUSE_EXPIRE_ONLY
        return {
            (codec.U64.unpack_from(body)[0],) if code == INODE else (codec.U64.unpack_from(body)[0], body[16:-1])
            for code, body in found
        }

    def names(self, nodeid: int = 1) -> list[bytes]:
        return [item.name for item in self.listdir(nodeid)][2:]


class Counting(Dir):
    """Makes new nodes each time."""

    timeout = 0

    def __init__(self):
        self.count = 0
        self.kept = None

    def children(self):
        self.count += 1
        kept = {} if self.kept is None else {"kept": self.kept}
        return {"number": Bytes(b"%d" % self.count), "below": Dir(file=Bytes(b"%d" % self.count)), **kept}
