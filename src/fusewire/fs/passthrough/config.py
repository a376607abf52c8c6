"""How a host directory is served: the options of the passthrough filesystem, and what each cache mode means.

Layer `fs`; plain values, no I/O.
"""

from __future__ import annotations

from typing import NamedTuple

from fusewire.ops import FOREVER
from fusewire.wire import abi

DAY = 86400.0


class Mode(NamedTuple):
    """What a cache mode stands for. Timeouts in seconds; flags are FOPEN_*."""

    timeout: float
    open_flags: int
    dir_flags: int
    readdirplus: bool
    revalidate: bool  # keep what is cached of a file over an open if neither its size nor its time has changed


# The modes of virtiofsd, and its timeouts and flags, but for one: where it lets the kernel drop a file's pages at every
# open (auto), they are kept as long as size and mtime are those of the last open, as libfuse's auto_cache does.
MODES = {
    "none": Mode(0.0, abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES, 0, False, False),
    "metadata": Mode(
        DAY,
        abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES,
        abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE,
        True,
        False,
    ),
    "auto": Mode(1.0, 0, 0, True, True),
    "always": Mode(DAY, abi.FOPEN_KEEP_CACHE, abi.FOPEN_CACHE_DIR | abi.FOPEN_KEEP_CACHE, True, False),
}
MODES["never"] = MODES["none"]


class Config:
    """The options of `Passthrough`; the defaults suit a local mount. Raises ValueError that names a bad one."""

    __slots__ = (
        "allow_direct_io",
        "allow_mmap",
        "announce_submounts",
        "attr_timeout",
        "cache",
        "entry_timeout",
        "fd_budget",
        "flock",
        "inode_file_handles",
        "killpriv_v2",
        "mode",
        "negative_timeout",
        "passthrough",
        "posix_acl",
        "posix_lock",
        "preserve_noatime",
        "proc",
        "readdirplus",
        "remote",
        "security_label",
        "switch_ids",
        "translate_gid",
        "translate_uid",
        "trusted",
        "watch",
        "writeback",
        "xattr",
        "xattrmap",
    )

    def __init__(
        self,
        *,
        cache: str = "auto",
        timeout: float | None = None,
        entry_timeout: float | None = None,
        attr_timeout: float | None = None,
        negative_timeout: float = 0.0,
        writeback: bool = False,
        allow_direct_io: bool = True,
        allow_mmap: bool = True,
        readdirplus: bool | None = None,
        xattr: bool = True,
        xattrmap: str | None = None,
        posix_acl: bool = False,
        security_label: bool = False,
        killpriv_v2: bool = True,
        posix_lock: bool = True,
        flock: bool = True,
        inode_file_handles: str = "never",
        announce_submounts: bool = True,
        translate_uid: tuple[str, ...] = (),
        translate_gid: tuple[str, ...] = (),
        switch_ids: bool | None = None,
        passthrough: bool = False,
        watch: bool = False,
        preserve_noatime: bool = True,
        remote: bool = False,
        trusted: bool | None = None,
        fd_budget: int | None = None,
        proc: bytes = b"/proc/self/fd/",
    ) -> None:
        """Check and keep.

        posix_lock, flock: locks are taken on the host, where its own processes see them; else the kernel keeps them
        among the users of this mount. switch_ids: make files as the caller (None: if the server may). fd_budget: how
        many descriptors may be open (None: what RLIMIT_NOFILE leaves). remote: callers are processes of another
        machine, whose process ids mean nothing here. trusted: it has CAP_SYS_ADMIN in the first user namespace (None:
        if it can be seen that it does). proc: prefix of this process's descriptors as
        paths, for a server whose /proc is not in its place.
        """
        if cache not in MODES:
            raise ValueError(f"cache={cache}: the modes are none, metadata, auto and always")
        if inode_file_handles not in ("never", "prefer", "mandatory"):
            raise ValueError(f"inode_file_handles={inode_file_handles}: never, prefer or mandatory")
        for name, value in (("timeout", timeout), ("entry_timeout", entry_timeout), ("attr_timeout", attr_timeout)):
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} is no number of seconds")
        self.mode = MODES[cache]
        self.cache = cache
        default = self.mode.timeout if timeout is None else timeout
        self.entry_timeout = min(default if entry_timeout is None else entry_timeout, float(FOREVER))
        self.attr_timeout = min(default if attr_timeout is None else attr_timeout, float(FOREVER))
        self.negative_timeout = min(negative_timeout, float(FOREVER))
        self.writeback = writeback
        self.allow_direct_io = allow_direct_io
        self.allow_mmap = allow_mmap
        self.readdirplus = self.mode.readdirplus if readdirplus is None else readdirplus
        self.xattr = xattr
        self.xattrmap = xattrmap
        self.posix_acl = posix_acl
        self.security_label = security_label
        self.killpriv_v2 = killpriv_v2
        self.posix_lock = posix_lock
        self.flock = flock
        self.inode_file_handles = inode_file_handles
        self.announce_submounts = announce_submounts
        self.translate_uid = translate_uid
        self.translate_gid = translate_gid
        self.switch_ids = switch_ids
        self.passthrough = passthrough
        self.watch = watch
        self.preserve_noatime = preserve_noatime
        self.remote = remote
        self.trusted = trusted
        self.fd_budget = fd_budget
        self.proc = proc
