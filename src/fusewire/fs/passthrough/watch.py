"""What is changed on the host is seen at once: watches on the directories that the client uses (inotify(7)).

Layer `fs`, a part of `Passthrough`. Only directories that were listed or looked into are watched, and at most a fixed
number, the oldest go first: what is not watched is seen when its timeout has passed, as without. A change that the
client makes itself comes back as an event too; it is left out where the server has just made it.
"""

from __future__ import annotations

import os
import select
import threading
from time import monotonic
from typing import TYPE_CHECKING

from fusewire.fs.passthrough.base import Base
from fusewire.linux import files

if TYPE_CHECKING:
    from fusewire.fs.passthrough.config import Config
    from fusewire.fs.passthrough.nodes import Fd, Node
    from fusewire.ops import Connection

_MOST = 8192
_NAMES = files.IN_CREATE | files.IN_DELETE | files.IN_MOVED_FROM | files.IN_MOVED_TO
_CONTENTS = files.IN_MODIFY | files.IN_ATTRIB | files.IN_CLOSE_WRITE
_WANTED = _NAMES | _CONTENTS | files.IN_ONLYDIR | files.IN_EXCL_UNLINK
_ECHO = 0.1  # seconds in which an event is taken for the echo of our own change


class Watch(Base):
    """Watches of nodes."""

    def __init__(self, source: int, config: Config) -> None:
        super().__init__(source, config)
        self._watches: dict[int, Node] = {}  # watch descriptor -> directory, the oldest first
        self._watched: dict[Node, int] = {}
        self.watching = False
        self._inotify = -1
        self._stop = -1
        self._own: dict[tuple[Node, bytes], float] = {}  # names that we are changing, or have changed just now
        self._watch_lock = threading.Lock()  # over all of these

    def init(self, connection: Connection) -> None:
        super().init(connection)
        if not self.config.watch or self.config.mode.timeout == 0:
            return
        try:
            self._inotify = files.inotify_init()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            threading.Thread(target=self._hear, name="fuse-watch", daemon=True).start()
            self.watching = True
        except (OSError, RuntimeError) as error:
            connection.log_once(
                f"watch: {error}; changes on the host are seen after {self.config.attr_timeout:g} s "
                "(fs.inotify.max_user_instances)"
            )
            self._close_watch()

    def _look_at(self, node: Node, fd: Fd) -> None:
        """Watch a directory that the client is looking at."""
        if node in self._watched:
            return
        with self._watch_lock:
            try:
                watch = files.inotify_add_watch(self._inotify, self._path(fd), _WANTED)
                while len(self._watches) >= _MOST:
                    oldest = next(iter(self._watches))
                    files.inotify_rm_watch(self._inotify, oldest)
                    self._watched.pop(self._watches.pop(oldest), None)
            except OSError as error:  # ENOSPC: fs.inotify.max_user_watches
                self._watched[node] = -1
                if self._connection is not None:
                    self._connection.log_once(f"watch: {error}; see fs.inotify.max_user_watches")
                return
            self._watches[watch] = node
            self._watched[node] = watch

    def _look_away(self, node: Node) -> None:
        """Forget a directory that the client has forgotten."""
        with self._watch_lock:
            watch = self._watched.pop(node, -1)
            if watch >= 0 and self._watches.pop(watch, None) is not None:
                try:
                    files.inotify_rm_watch(self._inotify, watch)
                except OSError:
                    pass  # the directory is gone, and its watch with it

    def _changing(self, node: Node | None, name: bytes) -> None:
        """Hear that we are about to change something by this name ourselves."""
        if self.watching and node is not None:
            now = monotonic()
            with self._watch_lock:
                self._own[node, name] = now + _ECHO
                if len(self._own) > 4096:
                    self._own = {what: until for what, until in self._own.items() if until > now}

    def _hear(self) -> None:
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._stop in ready:
                self._close_watch()
                return
            try:
                data = os.read(self._inotify, 65536)
            except BlockingIOError:
                continue
            for watch, mask, _, name in files.parse_inotify(data):
                try:
                    self._tell(watch, mask, name)
                except OSError as error:
                    if self._connection is not None:
                        self._connection.log_once("watch", error)

    def _tell(self, watch: int, mask: int, name: bytes) -> None:
        connection = self._connection
        if connection is None:
            return
        if mask & files.IN_Q_OVERFLOW:
            for nodeid in self.nodes.table.numbers():
                connection.notify_inval_inode(nodeid)
            return
        directory = self._watches.get(watch)
        if directory is None:
            return
        if mask & files.IN_IGNORED:
            with self._watch_lock:
                self._watches.pop(watch, None)
                self._watched.pop(directory, None)
            return
        parent = self.nodes.table.find(directory.key)
        if not parent:
            return
        if not name:
            connection.notify_inval_inode(parent, -1)
            return
        if self._own.get((directory, name), 0.0) > monotonic():
            return
        if mask & _NAMES:
            connection.notify_inval_entry(parent, name)
            connection.notify_inval_inode(parent)
        fd = directory.fd
        if mask & _CONTENTS and fd is not None:
            node = self.nodes.at(fd, name)
            nodeid = self.nodes.table.find(node.key) if node is not None else 0
            if nodeid:
                connection.notify_inval_inode(nodeid, -1 if mask & _CONTENTS == files.IN_ATTRIB else 0)

    def _close_watch(self) -> None:
        self.watching = False
        with self._watch_lock:
            inotify, self._inotify = self._inotify, -1
            stop, self._stop = self._stop, -1
            self._watches.clear()
            self._watched.clear()
        for fd in (inotify, stop):
            if fd >= 0:
                os.close(fd)

    def destroy(self) -> None:
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)
        super().destroy()
