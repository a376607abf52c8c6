"""The command line: `fusewire COMMAND ...`. The only layer that reads argv and the environment.

Each command's module is loaded when it is used: what `run` does not need, it does not pay for.
"""

from __future__ import annotations

import argparse
import os
import sys

import fusewire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from fusewire.cli.options import MountOptions
    from fusewire.cli.server_process import Locks

_EPILOG = """\
examples:
  fusewire run env.sqsh:/opt/env -- /opt/env/bin/python train.py
  fusewire mount env.sqsh env && ls env && fusewire umount env
  fusewire doctor
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and give the exit status."""
    _hold_stdio()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["share"]:  # has virtiofsd's command line, which is not argparse's
        from fusewire.cli.share import main as share

        return share(argv[1:])
    command: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, command = argv[:cut], argv[cut + 1 :]
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    arguments.command = command
    try:
        return int(arguments.handler(arguments, arguments.parser))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        from fusewire.cli.messages import explain

        print(f"fusewire: {explain(error)}", file=sys.stderr)
        return 125 if arguments.parser.wrong == 125 else 1


def _hold_stdio() -> None:
    """Take the numbers of closed standard descriptors, or an image that is opened next would be one of them.

    A server redirects its own to /dev/null, and messages are written to 2. What we execute finds them closed again.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)  # gets the lowest number that is free: fd
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115  it lives as long as we do


class _Parser(argparse.ArgumentParser):
    """wrong: the exit status for a wrong command line."""

    wrong = 2

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(self.wrong, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="fusewire",
        description="Mount filesystems without root: squashfs images and host directories over FUSE, in a namespace of "
        "their own where need be. Share them with virtual machines over virtio-fs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fusewire {fusewire.__version__}")
    # prog is given, for argparse would load shutil to find it out.
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND", prog="fusewire")

    def add(
        name: str, handler: Callable[[argparse.Namespace, _Parser], int], text: str, usage: str | None, wrong: int = 2
    ) -> _Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            usage=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.wrong = wrong
        sub.set_defaults(handler=handler, parser=sub)
        return sub

    # Where another command's exit status is given on, 125 is ours: env(1), timeout(1), `docker run`.
    run = add("run", _run, "run a command with images or directories mounted, seen by it alone", _RUN_USAGE, 125)
    run.add_argument(
        "specs",
        nargs="+",
        metavar="SOURCE:TARGET",
        help="image or directory, and where it appears; with :rw to be written to",
    )
    _add_options(run)
    _add_maps(run)
    _add_locks(run)
    run.add_argument("--pid", action="store_true", help="own PID namespace, with a /proc of its own and a reaping init")
    run.add_argument(
        "--wait",
        choices=("command", "all"),
        default="command",
        help="keep the mounts until the command ends (default), or until its last background child does",
    )
    run.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="DIR",
        help="keep what is written to SOURCE:TARGET:rw in DIR, or `tmpfs`: forget it (default)",
    )
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set for the command")
    run.add_argument("--cwd", metavar="DIR", help="working directory of the command, inside")

    mount = add("mount", _mount, "mount an image or a directory where every shell of the user sees it", None)
    mount.add_argument("source", metavar="SOURCE")
    mount.add_argument("target", metavar="TARGET", help="an empty directory, a missing name, or /dev/fd/N")
    _add_options(mount)
    _add_maps(mount)
    _add_locks(mount)
    mount.add_argument(
        "--strategy",
        choices=("auto", "fd", "direct", "fusermount3", "namespace"),
        default="auto",
        help="how to mount; auto takes the first that works, in this order",
    )
    mount.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground; Ctrl-C unmounts")
    mount.add_argument("--json", action="store_true", help="print what was mounted, for a program")

    commands.add_parser(
        "share", help="share an image or a directory with a virtual machine (virtio-fs)", add_help=False
    )

    umount = add("umount", _umount, "unmount, and put back what was at the target", None)
    umount.add_argument("targets", nargs="*", metavar="TARGET")
    umount.add_argument("-l", "--lazy", action="store_true", help="also when in use, or when its server hangs")
    umount.add_argument("-a", "--all", action="store_true", help="all mounts of this user")

    listing = add("list", _list, "list the mounts of this user", None)
    listing.add_argument("--json", action="store_true")

    execute = add(
        "exec", _exec, "run a command in the namespace of a mount", "fusewire exec TARGET -- COMMAND [ARG ...]", 125
    )
    execute.add_argument("target", metavar="TARGET")

    path = add("path", _path, "print a path of a mount that works outside of its namespace", None)
    path.add_argument("target", metavar="TARGET")

    info = add("info", _info, "tell what is in an image", None)
    info.add_argument("image", metavar="IMAGE")
    info.add_argument("-o", action="append", default=[], dest="options", metavar="offset=N")
    info.add_argument("--count", action="store_true", help="walk the image and count files of each type")
    info.add_argument("--json", action="store_true")

    doctor = add("doctor", _doctor, "check and explain what rootless mounting needs, and try each way", None)
    doctor.add_argument(
        "--share",
        metavar="DIR",
        help="say which sandboxes a share of DIR (or of an image) can have here, and what each protects",
    )
    doctor.add_argument("--json", action="store_true", help="print all of it, for a program")

    add("demo", _demo, "show the main job with a small image that comes with Fusewire", None)
    return parser


_RUN_USAGE = "fusewire run SOURCE:TARGET[:rw] [SOURCE:TARGET[:rw] ...] [options] -- COMMAND [ARG ...]"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        action="append",
        default=[],
        dest="options",
        metavar="OPT[,OPT ...]",
        help="mount options; `-o help` lists them",
    )


def _add_maps(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--map-root", action="store_true", help="be root inside (the caller's files are root's there)")
    group.add_argument(
        "--map-ranges", action="store_true", help="map the ranges of /etc/subuid and /etc/subgid too (newuidmap)"
    )
    group.add_argument("--map-root-ranges", action="store_true", help="both: be root, with a range of other users")
    parser.add_argument(
        "--squash-owner", action="store_true", help="all files of the image belong to the caller (-o squash_owner)"
    )


def _add_locks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sandbox",
        choices=("auto", "namespace", "chroot", "none"),
        default="auto",
        help="where the server of the mount is locked in; auto: as far as it costs no function",
    )
    parser.add_argument(
        "--landlock", choices=("auto", "require", "off"), default="auto", help="and whether Landlock keeps it there too"
    )
    parser.add_argument(
        "--seccomp",
        choices=("auto", "kill", "trap", "log", "none"),
        default="auto",
        help="what becomes of it at a system call that it does not need (auto: kill, if there is libseccomp)",
    )


def _locks(arguments: argparse.Namespace) -> Locks:
    from fusewire.cli.server_process import Locks

    return Locks(arguments.sandbox, arguments.landlock, arguments.seccomp)


def _maps(arguments: argparse.Namespace) -> str:
    if arguments.map_root:
        return "root"
    if arguments.map_root_ranges:
        return "root-ranges"
    return "ranges" if arguments.map_ranges else "self"


def _options(arguments: argparse.Namespace, parser: _Parser) -> MountOptions:
    from fusewire.cli import options

    if "help" in arguments.options:
        print(options.describe())
        sys.exit(0)
    try:
        parsed = options.parse(arguments.options)
    except options.OptionError as error:
        parser.exit(parser.wrong, f"fusewire: {error}\n")
    if getattr(arguments, "squash_owner", False):
        parsed.squash_owner = True
    return parsed


def _run(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.run import Run, add_layers, parse_spec, run

    if arguments.options == ["help"]:
        _options(arguments, parser)
    environment = {}
    for item in arguments.env:
        name, equals, value = item.partition("=")
        if not name or not equals:
            parser.exit(parser.wrong, f"fusewire: --env {item}: not NAME=VALUE\n")
        environment[name] = value
    try:
        specs = [parse_spec(text) for text in arguments.specs]
        if arguments.overlay or any(spec.writable for spec in specs):
            add_layers(specs, arguments.overlay)
    except ValueError as error:
        parser.exit(parser.wrong, f"fusewire: {error}\n")
    command = arguments.command or [os.environ.get("SHELL") or "/bin/sh"]
    job = Run(
        specs,
        command,
        _options(arguments, parser),
        maps=_maps(arguments),
        own_pids=arguments.pid,
        wait_all=arguments.wait == "all",
        environment=environment,
        cwd=arguments.cwd,
        locks=_locks(arguments),
    )
    code = run(job)
    # Nothing is left that the interpreter's own end would have to do, and it would take longer than the rest.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _no_command(arguments: argparse.Namespace, parser: _Parser) -> None:
    if arguments.command:
        parser.exit(2, f"fusewire: {arguments.name} takes no command after --\n")


def _mount(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.mount import Job, mount

    _no_command(arguments, parser)
    options = _options(arguments, parser)
    return mount(
        Job(
            arguments.source,
            arguments.target,
            options,
            strategy=arguments.strategy,
            maps=_maps(arguments),
            foreground=arguments.foreground or options.debug,  # its standard error is what was asked for
            as_json=arguments.json,
            program=os.environ.get("FUSERMOUNT_PROG"),
            locks=_locks(arguments),
        )
    )


def _umount(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.umount import umount

    _no_command(arguments, parser)
    if bool(arguments.targets) == arguments.all:
        parser.exit(2, "fusewire: umount takes TARGETs, or --all\n")
    return umount(
        arguments.targets,
        lazy=arguments.lazy,
        everything=arguments.all,
        program=os.environ.get("FUSERMOUNT_PROG"),
    )


def _exec(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.umount import execute

    execute(arguments.target, arguments.command or [os.environ.get("SHELL") or "/bin/sh"])


def _path(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.umount import path_of

    return path_of(arguments.target)


def _list(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.listing import list_mounts

    return list_mounts(json=arguments.json)


def _info(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.info import info

    return info(arguments.image, offset=_options(arguments, parser).offset, count=arguments.count, json=arguments.json)


def _doctor(arguments: argparse.Namespace, parser: _Parser) -> int:
    if arguments.share is not None:
        from fusewire.cli.doctor_share import doctor_share

        return doctor_share(arguments.share, json=arguments.json)
    from fusewire.cli.doctor import doctor

    return doctor(json=arguments.json)


def _demo(arguments: argparse.Namespace, parser: _Parser) -> int:
    from fusewire.cli.demo import demo

    return demo()
