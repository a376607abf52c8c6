"""`fusewire share SOURCE --socket-path SOCKET`: serve an image or a directory to a virtual machine over virtio-fs.

Layer `cli`. From a parsed command line to a `ShareServer` that listens: the source, the socket and its lock, the limit
of descriptors, signals, messages, the background. What virtiofsd's own command line differs in is in `virtiofsd`.
"""

from __future__ import annotations

import os
import signal
import sys

from fusewire.cli import share_options, share_sandbox
from fusewire.cli.messages import Messages
from fusewire.cli.options import OptionError
from fusewire.cli.share_options import SHARE, ShareOptions
from fusewire.cli.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from fusewire.linux.listening import Listening, PidFile
    from fusewire.serve_share import ShareServer

EXIT_FAILED = 1
EXIT_USAGE = 2
_MOST_DESCRIPTORS = 1_000_000
_GRACE = 0.5  # seconds
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str], program: str = SHARE) -> int:
    """Run the command line behind the program's name, and give the exit status."""
    name = "fusewire" if program == SHARE else program
    if not arguments:
        print(share_options.describe(program), file=sys.stderr)
        return EXIT_USAGE
    try:
        options = share_options.parse(arguments, program)
    except OptionError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if options.action:
            print(_ACTIONS[options.action](options), flush=True)
            return 0
        for typed, reason in options.ignored:
            print(f"{name}: `{typed}` has no effect: {reason}", file=sys.stderr)
        return _in_background(options, name) if options.daemonize else _serve(options, name, None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        from fusewire.cli.messages import explain

        print(f"{name}: {explain(error)}", file=sys.stderr)
        return EXIT_FAILED


# What is printed instead of sharing


def _capabilities(options: ShareOptions) -> str:
    """The output of --print-capabilities, vhost-user.json of QEMU.

    `separate-options` is left out although it would be true: libvirt takes it for the sign of the virtiofsd that
    cannot forward locks and refuses <lock> in a domain, while with `-o`, which we understand too, everything works.
    """
    return '{\n  "type": "fs",\n  "features": []\n}'


def _version(options: ShareOptions) -> str:
    import fusewire

    return f"{'fusewire' if options.program == SHARE else options.program} {fusewire.__version__}"


def _qemu(options: ShareOptions) -> str:
    r"""QEMU's arguments, a line of a shell command each; as JSON they are one list. Remarks go to standard error.

    The guest's memory has to be shared with the daemon. A guest makes no request of more pages than the queue has
    entries, less four (virtio_fs_get_tree): QEMU's default of 128 would cut the largest ones, of 256, in half.
    """
    tag = os.fsdecode(options.tag or b"fusewire").replace(",", ",,")
    path = os.path.abspath(options.socket_path).replace(",", ",,")
    chardev = f"fusewire-{_identifier(tag)}"
    words = [
        ("-chardev", f"socket,id={chardev},path={path}"),
        (
            "-device",
            f"vhost-user-fs-pci,chardev={chardev},tag={tag},queue-size=1024,num-request-queues={options.queues}",
        ),
        ("-m", "2G"),
        ("-object", "memory-backend-memfd,id=fusewire-memory,size=2G,share=on"),
        ("-machine", "memory-backend=fusewire-memory"),
    ]
    if options.as_json:
        import json

        return json.dumps([word for pair in words for word in pair])
    import shlex

    name = shlex.quote(tag.replace(",,", ","))
    print(
        "# 2G is the guest's memory, the same in both places; the last three lines are said once for all its shares.\n"
        f"# In the guest: mount -t virtiofs {name} /mnt",
        file=sys.stderr,
    )
    return " \\\n".join(f"  {flag} {shlex.quote(value)}" for flag, value in words)


def _identifier(tag: str) -> str:
    """The tag as a part of an id, for which QEMU takes letters, digits and -._ only."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-._") else "-" for letter in tag)


def _dry_run(options: ShareOptions) -> str:
    """The steps into the sandbox, with their reasons."""
    from fusewire.cli.share_sandbox import plan_for

    source = os.path.abspath(options.source)
    if not os.path.isdir(source):
        return plan_for(options, None).describe()
    directory = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return plan_for(options, directory).describe()
    finally:
        os.close(directory)


def _help(options: ShareOptions) -> str:
    return share_options.describe(options.program)


_ACTIONS: dict[str, Callable[[ShareOptions], str]] = {
    "help": _help,
    "version": _version,
    "capabilities": _capabilities,
    "qemu": _qemu,
    "dry-run": _dry_run,
}


# Serving


class _Ending:
    """The handler of the signals that end us. Until there is a server it remembers them."""

    def __init__(self) -> None:
        self.seen = False
        self._server: ShareServer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        if self._server is not None:
            self._server.stop()

    def watch(self, server: ShareServer) -> None:
        """From now on it is this server that is to stop."""
        self._server = server
        if self.seen:
            server.stop()


def _serve(options: ShareOptions, name: str, tell: int | None) -> int:
    """Share until we are told to end; `tell` is the pipe to the process that waits for us to listen."""
    messages = Messages(name, options.log_level, syslog=options.syslog)
    _limit_descriptors(options.rlimit_nofile, messages)
    # A source may hang as long as it likes: until we listen, an interrupt ends us, for nothing has been made yet.
    on_interrupt = signal.getsignal(signal.SIGINT)
    if callable(on_interrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    factory = Source(options.source, options.mount)
    share_sandbox.free(options, factory)
    listening: Listening | None = None
    pid_file: PidFile | None = None
    try:
        ending = _Ending()
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, ending)
        listening = _listen(options)
        if options.pid_file and os.path.abspath(options.pid_file) != f"{listening.path}.pid":  # which there is already
            from fusewire.linux.listening import PidFile

            pid_file = PidFile(os.path.abspath(options.pid_file))
        report = _report(options, factory.path)
        if tell is not None:
            from fusewire.linux import process

            process.detach_from_terminal()
        share_sandbox.enter(options, factory, listening, pid_file, messages, tell)
        server = _make_server(options, factory, listening, messages)
        ending.watch(server)
        _ready(report, options, messages, tell)
        return server.serve()
    finally:
        if pid_file is not None:
            pid_file.close()
        if listening is not None:
            listening.close()
        factory.close()


def _listen(options: ShareOptions) -> Listening:
    from fusewire.linux import listening

    if options.fd >= 0:
        return listening.adopt(options.fd)
    path = os.path.abspath(options.socket_path)  # where it is said from, not where a daemon works
    return listening.listen(path, mode=options.socket_mode, group=options.socket_group)


def _make_server(options: ShareOptions, factory: Source, listening: Listening, messages: Messages) -> ShareServer:
    from fusewire.cli.serving import tune_process
    from fusewire.serve_share import ShareServer

    server = ShareServer(
        factory,
        listening.socket,
        queues=options.queues,
        tag=options.tag,
        threads=options.threads,
        once=options.once,
        log=messages,
        debug=options.debug,
    )
    tune_process()
    return server


def _report(options: ShareOptions, source: str) -> dict[str, object]:
    """What is shared where, and the process that is to be signalled to end it all."""
    return {
        "source": source,
        "socket": None if options.fd >= 0 else os.path.abspath(options.socket_path),
        "pid": os.getpid(),
        "tag": os.fsdecode(options.tag) or None,
        "queues": options.queues,
    }


def _ready(report: dict[str, object], options: ShareOptions, messages: Messages, tell: int | None) -> None:
    """Say that the socket listens."""
    text = ""
    if options.as_json:
        import json

        text = json.dumps(report) + "\n"
    if tell is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        os.write(tell, b"R" + os.fsencode(text))  # EPIPE if nobody waits any more: then it is not wanted
        os.close(tell)
    where = f"descriptor {options.fd}" if options.fd >= 0 else report["socket"]
    messages.say("info", f"{report['source']} is shared at {where}")


def _limit_descriptors(wanted: int | None, messages: Messages) -> None:
    """Set how many descriptors may be open, RLIMIT_NOFILE.

    By default as many as there may be, up to a million and half of what the machine has; 0 leaves it all as it is.
    The hard limit too: a filesystem takes what it may have.
    """
    import resource

    if wanted == 0:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted or _most_descriptors()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, target))
    except (OSError, ValueError):
        if wanted:
            messages.say("warn", f"--rlimit-nofile={wanted} is not allowed: {hard} it is (`ulimit -Hn`)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _most_descriptors() -> int:
    try:
        with open("/proc/sys/fs/nr_open", "rb") as own, open("/proc/sys/fs/file-max", "rb") as everybodys:
            # No more than half of what all processes may have open together: a guest must not use up the machine's.
            return min(_MOST_DESCRIPTORS, int(own.read()), int(everybodys.read()) // 2)
    except (OSError, ValueError):
        return _MOST_DESCRIPTORS


# The background


def _in_background(options: ShareOptions, name: str) -> int:
    """Start the daemon and wait until it listens. Gives the exit status of the process that was started."""
    from fusewire.cli import background

    return background.start(
        lambda tell: _serve(options, name, tell),
        keep=_named_fds(options),
        name=name,
        died="the daemon died before its socket listened",
        failed=EXIT_FAILED,
        give_up=_give_up,
    )


def _named_fds(options: ShareOptions) -> list[int]:
    """The descriptors that the command line names, by number or as /dev/fd/N."""
    directory, _, number = options.source.rpartition("/")
    named = directory in ("/dev/fd", "/proc/self/fd") and number.isdecimal()
    return [fd for fd in (options.fd, int(number) if named else -1) if fd >= 0]


def _give_up(daemon: int) -> None:
    """End a daemon that does not listen yet: it may hang, in a source that somebody has lost patience with."""
    from fusewire.linux import process

    held = process.hold(daemon, process.start_time(daemon) or 0)
    if held is not None:
        with held:
            held.kill(signal.SIGTERM)
            if not held.wait(_GRACE):
                held.kill(signal.SIGKILL)  # what it leaves is stale, and cleared away by the next one
