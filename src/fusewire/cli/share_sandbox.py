"""How a share locks itself in: from the options to a sandbox's plan, and into it.

Layer `cli`. What the steps are is decided in `linux.sandbox`; here is what this daemon brings along: its socket, its
source, and the modules that it will need once nothing can be loaded any more.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from fusewire.cli.messages import Messages
    from fusewire.cli.share_options import ShareOptions
    from fusewire.cli.source import Source
    from fusewire.linux.listening import Listening, PidFile
    from fusewire.linux.sandbox_plan import Plan
    from fusewire.linux.sandbox_steps import Entered


def plan_for(options: ShareOptions, shared: int | None) -> Plan:
    """Give the steps into the sandbox that is asked for; `shared` is the directory's descriptor, None for an image.

    Raises OSError that says why a mode cannot be had, and what can.
    """
    from fusewire.linux import sandbox

    try:
        return sandbox.plan(
            options.sandbox,
            shared=shared,
            uid_map=options.uid_map,
            gid_map=options.gid_map,
            modcaps=options.modcaps,
            handles=shared is not None and options.directory.get("inode_file_handles", "never") != "never",
            landlock=options.landlock,
            writable=not options.read_only,
        )
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error


def free(options: ShareOptions, source: Source) -> None:
    """Leave a program or a URL out of the sandbox: nobody knows what files, networks and libraries its server needs.

    Raises OSError if a sandbox was asked for.
    """
    if not source.is_free:
        return
    said = [name for name in ("sandbox", "landlock", "seccomp") if name in options.said]
    source.refuse_locks([f"--{name}" for name in said if getattr(options, name) not in ("none", "off")])
    options.sandbox = options.seccomp = "none"
    options.landlock = "off"


def enter(
    options: ShareOptions,
    factory: Source,
    listening: Listening,
    pid_file: PidFile | None,
    messages: Messages,
    tell: int | None,
) -> Entered:
    """Lock this process in. Comes back in the server; in the process that waits for it ServerEnded is raised.

    Raises OSError that names the step that failed.
    """
    from fusewire.linux import sandbox, sandbox_enter
    from fusewire.linux.userns import in_first_namespace

    plan = plan_for(options, factory.directory)
    alone = not sandbox.waits(plan)
    messages.say("info", plan.summary())
    for note in plan.notes:
        messages.say("info", f"sandbox: {note}")
    first_namespace = in_first_namespace() and not plan.new_user
    factory.preload()
    factory.drop_first()  # its descriptors would be closed under it
    keep = [listening.fileno(), *factory.files, *messages.files]
    if tell is not None:
        keep.append(tell)
    if alone:  # nobody else is there to remove what has been made
        keep += listening.files
        keep += pid_file.files if pid_file is not None else []

    def forget() -> None:
        """In the server: what it has no descriptors for any more is the waiting process's to remove."""
        listening.release()
        if pid_file is not None:
            pid_file.release()

    def let_go() -> None:
        """In the waiting process: a socket that nobody serves must not be open."""
        listening.socket.close()
        factory.let_go()
        if tell is not None:
            os.close(tell)

    entered = sandbox_enter.enter(
        plan,
        keep=keep,
        imports=_import_all,
        serving=None if alone else forget,
        waiting=let_go,
        seccomp=_filter(options, messages),
    )
    for note in entered.notes:
        messages.say("info", f"sandbox: {note}")
    factory.move_in(entered, trusted=first_namespace)
    return entered


def _import_all() -> None:
    from fusewire.linux import seccomp_filter

    late = ("fusewire.fs.sources", "fusewire.serve_share", "fusewire.cli.serving", "traceback", "json")
    seccomp_filter.import_all(*late)
    # Inside, the path of a source file leads into the share, where a guest may have put a FIFO: no lines of source.
    import linecache

    linecache.updatecache = lambda filename, module_globals=None: []
    linecache.checkcache = lambda filename=None: None


def _filter(options: ShareOptions, messages: Messages) -> Callable[[], None] | None:
    if options.seccomp == "none":
        return None
    from fusewire.linux import seccomp_filter

    # Once out here: what is wrong with it is said in time, and the library is loaded where its file can be found.
    seccomp_filter.program(options.seccomp, syslog=options.syslog)

    def load() -> None:
        seccomp_filter.load(options.seccomp, syslog=options.syslog, say=lambda text: messages.say("error", text))

    return load
