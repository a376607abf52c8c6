"""What a program is asked about files and directories that are open: reading, writing, listings and locks.

Layer `compat`, between bridge_base.py and bridge.py.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Any

from fusewire.compat.bridge_base import U64, Base, Listing, answered, done, log
from fusewire.compat.context import CONTEXT
from fusewire.compat.paths import Node
from fusewire.compat.structures import c_flock_t, fuse_file_info
from fusewire.ops import Caller, Entry, Lock, Pending
from fusewire.wire import abi
from fusewire.wire.codec import DirBuffer

LAST_BYTE = (1 << 63) - 1
"""OFFSET_MAX: where a lock to the end of the file ends."""
_UNKNOWN_INO = 0xFFFFFFFF  # as libfuse has it: a listing need not know numbers, but 0 would hide the entry
_LONGEST_NAME = 255


class Files(Base):
    """A program's filesystem, as far as it is about what is open."""

    # Files

    def _opened(self, node: Node, path: str, fh: Any) -> tuple[int, int]:
        """Give the kernel's handle and FOPEN_* for what `open` or `create` has made of a fuse_file_info or a number."""
        settings = self._settings
        keep, direct, nonseekable = settings.kernel_cache, settings.direct_io, False
        if self._raw_fi:
            keep, direct = keep or fh.keep_cache, direct or fh.direct_io
            nonseekable = bool(fh.nonseekable)
            number = self._handles.add(fh)
        else:
            number = fh
        if settings.auto_cache and not keep:
            try:
                attrs = self._call("getattr", path, fh)
            except OSError:
                node.stamp = None  # read anew: the file is open all the same
            else:
                stamp = attrs.get("st_mtime"), attrs.get("st_size")
                keep, node.stamp = node.stamp == stamp, stamp
        flags = abi.FOPEN_KEEP_CACHE if keep else 0
        flags |= abi.FOPEN_DIRECT_IO if direct else 0
        flags |= abi.FOPEN_NONSEEKABLE if nonseekable else 0
        self._paths.opened(node)
        return number, flags

    @answered
    def open(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, ...]:
        node = self._paths.get(nodeid)
        path = self._path(nodeid)
        fh: Any = 0
        if self._raw_fi:
            fh = fuse_file_info(flags=flags)
            if self._calls.has("open"):
                done(self._call("open", path, fh))
        elif self._calls.has("open"):
            fh = int(self._call("open", path, flags) or 0) & U64
        return self._opened(node, path, fh)

    def _create(self, path: str, mode: int, info: fuse_file_info) -> Any:
        if self._raw_fi:
            done(self._call("create", path, mode, info))
            return info
        flags = (info.flags,) if self._calls.create_flags else ()
        return int(self._call("create", path, mode, *flags) or 0) & U64

    @answered
    def create(
        self, caller: Caller, parent: int, name: bytes, flags: int, mode: int, umask: int, open_flags: int
    ) -> tuple[Entry, tuple[int, ...]]:
        directory = self._node(parent)
        path = self._paths.child(directory, name)
        fh = self._create(path, mode, fuse_file_info(flags=flags))
        made = False
        try:
            entry = self._entry(directory, name, path, fh)
            opened = self._opened(self._paths.get(entry.nodeid), path, fh)
            made = True
            return entry, opened
        finally:
            if not made and self._calls.has("release"):
                self._call("release", path, fh)

    @answered
    def read(self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int) -> bytes:
        result = self._call("read", self._open_path(nodeid), size, offset, self._fh(fh, flags))
        if not result:
            return b""
        done(result)
        data = result if type(result) is bytes else bytes(memoryview(result))  # the program may go on using its buffer
        if len(data) > size:
            raise ValueError(f"read gave {len(data)} bytes where {size} were asked for")
        return data

    @answered
    def write(self, nodeid: int, fh: int, offset: int, data: Any, write_flags: int, lock_owner: int, flags: int) -> int:
        result = self._call("write", self._open_path(nodeid), bytes(data), offset, self._fh(fh, flags))
        done(result)
        return int(result or 0)

    @answered
    def flush(self, nodeid: int, fh: int, lock_owner: int) -> None:
        path, handle = self._open_path(nodeid), self._fh(fh, owner=lock_owner)
        try:
            if self._calls.has("flush"):
                done(self._call("flush", path, handle))
        finally:
            if self._calls.own("lock"):  # close(2) drops all record locks of its process, fcntl_locking(2)
                self._lock(path, handle, fcntl.F_SETLK, Lock(0, LAST_BYTE, fcntl.F_UNLCK, 0))

    @answered
    def release(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        path, handle = self._open_path(nodeid), self._fh(fh, flags, lock_owner)
        node = self._paths.get(nodeid)
        if self._raw_fi:
            self._handles.remove(fh)
        try:
            if release_flags & abi.FUSE_RELEASE_FLOCK_UNLOCK and self._calls.own("flock"):
                self._call("flock", path, handle, fcntl.LOCK_UN)
            if self._calls.has("release"):
                self._call("release", path, handle)
        finally:
            directory, name = node.parent, node.name
            if self._paths.closed(node) and directory is not None:
                done(self._call("unlink", self._paths.child(directory, name)))
                self._paths.remove(directory, name)

    @answered
    def fsync(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        done(self._call("fsync", self._open_path(nodeid), fsync_flags & 1, self._fh(fh)))

    @answered
    def fallocate(self, nodeid: int, fh: int, offset: int, length: int, mode: int) -> None:
        done(self._call("fallocate", self._open_path(nodeid), mode, offset, length, self._fh(fh)))

    @answered
    def ioctl(
        self, caller: Caller, nodeid: int, fh: int, flags: int, cmd: int, arg: int, data: memoryview, out_size: int
    ) -> tuple[int, bytes]:
        import ctypes

        room = ctypes.create_string_buffer(bytes(data), max(len(data), out_size, 1))
        address = ctypes.addressof(room) if data or out_size else None
        handle = self._listings.get(fh).fh if flags & abi.FUSE_IOCTL_DIR else self._fh(fh)
        result = self._call("ioctl", self._open_path(nodeid), cmd, arg or None, handle, flags, address)
        done(result)
        return int(result or 0), room.raw[:out_size]

    # Directories

    @answered
    def opendir(self, caller: Caller, nodeid: int, flags: int, open_flags: int) -> tuple[int, int]:
        fh = self._call("opendir", self._path(nodeid)) if self._calls.has("opendir") else 0
        return self._listings.add(Listing(int(fh or 0))), 0

    @answered
    def readdir(
        self, nodeid: int, fh: int, offset: int, size: int, read_flags: int, lock_owner: int, flags: int
    ) -> bytearray:
        listing = self._listings.get(fh)
        answer = DirBuffer(size)
        if offset == 0 or (listing.entries is None and not self._calls.has("readdir_with_offset")):
            listing.entries = None
            if not self._calls.has("readdir_with_offset"):
                self._need("readdir")
                found = self._call("readdir", self._open_path(nodeid), listing.fh)
                listing.entries = [entry for entry, _ in self._entries(nodeid, found)]
        if listing.entries is None and self._read_on(nodeid, listing, offset, answer):
            return answer.data
        entries = listing.entries or []
        for cookie in range(offset, len(entries)):
            name, ino, kind = entries[cookie]
            if not answer.add(name, ino, cookie + 1, kind):
                break
        return answer.data

    def _read_on(self, nodeid: int, listing: Listing, offset: int, answer: DirBuffer) -> bool:
        """Fill from `readdir_with_offset`; False if its entries have no offsets, and are all in `listing` now."""
        found = self._call("readdir_with_offset", self._open_path(nodeid), offset, listing.fh)
        whole: list[tuple[bytes, int, int]] = []
        for (name, ino, kind), cookie in self._entries(nodeid, found):
            if cookie == 0:
                whole.append((name, ino, kind))
            elif not answer.add(name, ino, cookie & U64, kind):
                return True
        if whole:
            listing.entries = whole
        return not whole

    def _entries(self, nodeid: int, found: Any) -> Any:
        """Give ((name, inode number, DT_*), offset) of each item, a name or (name, attributes or mode, offset)."""
        node = self._paths.get(nodeid)
        for item in found:
            if isinstance(item, (str, bytes)):
                text, attrs, offset = item, None, 0
            else:
                text, attrs, offset = item
            name = self._encoded(text)
            if not 0 < len(name) <= _LONGEST_NAME or 47 in name or 0 in name:
                log.warning("readdir of %s gave %r, which can be no file name: left out.", node.path, text)
                continue
            mode = attrs if isinstance(attrs, int) else int(attrs.get("st_mode", 0)) if attrs else 0
            ino = 0
            if self._settings.use_ino and isinstance(attrs, dict):
                ino = int(attrs.get("st_ino", 0)) & U64
            known = self._paths.find(node, name)
            if name in (b".", b".."):  # of what most programs list by name alone
                known, mode = (node if name == b"." else node.parent), mode or stat.S_IFDIR
            if not ino and known is not None:
                ino = known.id
            yield (name, ino or _UNKNOWN_INO, (mode >> 12) & 15), int(offset or 0)

    @answered
    def releasedir(self, nodeid: int, fh: int, flags: int, release_flags: int, lock_owner: int) -> None:
        listing = self._listings.remove(fh)
        if self._calls.has("releasedir"):
            self._call("releasedir", self._open_path(nodeid), listing.fh)

    @answered
    def fsyncdir(self, nodeid: int, fh: int, fsync_flags: int) -> None:
        done(self._call("fsyncdir", self._open_path(nodeid), fsync_flags & 1, self._listings.get(fh).fh))

    # Locks

    def _lock(self, path: str | None, handle: Any, command: int, lock: Lock) -> c_flock_t:
        import ctypes

        length = 0 if lock.end >= LAST_BYTE else lock.end - lock.start + 1
        wanted = c_flock_t(lock.type, os.SEEK_SET, lock.start, length, lock.pid)
        # fusepy's prototype has void *, of which a method sees the address; mfusepy's has struct flock *.
        address = ctypes.pointer(wanted) if self._calls.lock_pointer else ctypes.addressof(wanted)
        done(self._call("lock", path, handle, command, address))
        return wanted

    @answered
    def getlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Lock:
        found = self._lock(self._open_path(nodeid), self._fh(fh, owner=owner), fcntl.F_GETLK, lock)
        end = found.l_start + found.l_len - 1 if found.l_len else LAST_BYTE
        return Lock(found.l_start, end, found.l_type, found.l_pid)

    @answered
    def setlk(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> None:
        self._set_lock(self._open_path(nodeid), self._fh(fh, owner=owner), lock, lk_flags, wait=False)

    @answered
    def setlkw(self, caller: Caller, nodeid: int, fh: int, owner: int, lock: Lock, lk_flags: int) -> Pending:
        from threading import Thread

        pending = Pending()
        path, handle = self._open_path(nodeid), self._fh(fh, owner=owner)
        context = CONTEXT.copy()

        def wait() -> None:
            CONTEXT.resume(context)
            try:
                pending.complete(_wait_for_lock(self, path, handle, lock, lk_flags))
            except OSError as error:
                pending.fail(error)

        # A worker must not wait: the request that ends the wait may need it.
        Thread(target=wait, name="fuse-lock", daemon=True).start()
        return pending

    def _set_lock(self, path: str | None, handle: Any, lock: Lock, lk_flags: int, *, wait: bool) -> None:
        if not lk_flags & abi.FUSE_LK_FLOCK:
            self._lock(path, handle, fcntl.F_SETLKW if wait else fcntl.F_SETLK, lock)
            return
        operation = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX}.get(lock.type, fcntl.LOCK_UN)
        done(self._call("flock", path, handle, operation | (0 if wait else fcntl.LOCK_NB)))


@answered
def _wait_for_lock(self: Files, path: str | None, handle: Any, lock: Lock, lk_flags: int) -> None:
    self._set_lock(path, handle, lock, lk_flags, wait=True)
