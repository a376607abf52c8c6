"""What `run` and `mount` share: from the parsed `-o` options to the kernel's, and to a server with its workers.

Layer `cli`.
"""

from __future__ import annotations

import errno
import os

from fusewire.linux.mount_base import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fusewire.cli.options import MountOptions
    from fusewire.ops import Operations
    from fusewire.serve import Server

SUBTYPE = "fusewire"


def kernel_options(options: MountOptions, source: str, *, checked: bool = False, opened: bool = False) -> Options:
    """Give the options of mount(2) for `source`; `checked`: its filesystem has the kernel check modes.

    `opened` makes the mount usable by every user of its namespace, as a kernel filesystem would be. Once it is, the
    kernel has to check modes (default_permissions), or the image's 0600 files would be anybody's; without it, only the
    owner gets in and may read whatever the image holds, also files of ids that the namespace does not know.
    """
    allow_other = options.allow_other or opened
    default_permissions = options.default_permissions
    if default_permissions is None:
        default_permissions = checked or allow_other or options.allow_root
    # An image is read-only; the flag makes the kernel say so by itself.
    from fusewire.cli.source import kind_of, shown
    from fusewire.linux.syscalls import MS_RDONLY

    file = kind_of(source) == "path"
    directory = file and os.path.isdir(source)
    if directory and allow_other and not default_permissions:
        raise OSError(
            errno.EINVAL,
            f"{source} is a directory: with allow_other and no_default_permissions nobody would check permissions",
        )
    read_only = MS_RDONLY if file and not directory else 0

    return Options(
        fsname=os.fsencode(options.fsname or (os.path.abspath(source) if file else shown(source))),
        subtype=os.fsencode(SUBTYPE if options.subtype is None else f"{SUBTYPE}.{options.subtype}"),
        flags=options.flags | read_only,
        allow_other=allow_other,
        allow_root=options.allow_root,
        default_permissions=default_permissions,
        max_read=options.max_read,
        auto_unmount=options.auto_unmount,
    )


def own_ids_inside(options: MountOptions, maps: str) -> None:
    """Have `squash_owner` mean the user as the mount's namespace has him: where he is root inside, that is 0."""
    if options.squash_owner and "root" in maps:
        options.uid = 0 if options.uid is None else options.uid
        options.gid = 0 if options.gid is None else options.gid


def log_to_stderr(message: str, error: BaseException | None = None) -> None:
    """Report a fault of a session, with the places that an exception has come through.

    Not by the traceback module, which takes as long to load as all the rest of a mount, and reads files.
    """
    lines = [f"fusewire: {message}"]
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"  {code.co_filename}:{trace.tb_lineno} in {code.co_qualname}")
        trace = trace.tb_next
    if error is not None:
        lines.append(f"  {type(error).__name__}: {error}")
    os.write(2, os.fsencode("\n".join(lines) + "\n"))


def tune_process() -> None:
    """Set the interpreter up for serving; for a process that does nothing else.

    Whoever waits for the interpreter lock gets it after 0.2 ms instead of 5: a thread that plans ahead must not hold
    up an answer. What has been loaded by now lives as long as the process; the collector need not look at it again.
    """
    import gc
    import sys

    sys.setswitchinterval(0.0002)
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def make_server(
    filesystem: Operations, fd: int, options: MountOptions, owner: tuple[int, int], devices: list[int] | None = None
) -> Server:
    """Make the server of one mount; it takes over `fd`, `devices` and the filesystem.

    owner: the uid and gid of the mount's owner in its user namespace. devices: more descriptors of /dev/fuse, for
    workers that get one of their own.
    """
    from fusewire import serve

    server = serve.Server(
        filesystem,
        fd,
        threads=options.max_threads or filesystem.workers or serve.DEFAULT_THREADS,
        clone_fd=options.clone_fd,
        debug=options.debug,
        log=log_to_stderr,
        owner=owner if options.allow_root else None,
        devices=devices,
    )
    server.session.limit(options.max_readahead, options.max_background, options.congestion_threshold)
    return server


def spare_devices(options: MountOptions, workers: int = 0) -> list[int]:
    """Open what the workers of a server with `clone_fd` need, in the user namespace of its mount; or nothing.

    The kernel makes no clone of one that was opened in another (fuse_dev_ioctl_clone), and a server that is locked in
    cannot open any.
    """
    if not options.clone_fd:
        return []
    from fusewire import serve
    from fusewire.linux.mount_base import open_device

    return [open_device() for _ in range(min(250, (options.max_threads or workers or serve.DEFAULT_THREADS) - 1))]
