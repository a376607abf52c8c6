"""The command lines of `fusewire share` and of virtiofsd: words in, a `ShareOptions` or an OptionError out.

Layer: cli. It reads neither argv nor the environment and does no I/O. What a sandbox, a socket or a limit takes to be
set up is for the code that does it; the options themselves are rows of `share_table`.

Every option has one key, whatever its spelling; of several the last one wins, also across spellings. Not so where a
repetition would widen what is shared or who gets at it, or weaken the confinement: two different values are refused
there, for a command line is put together by several hands (a runtime's defaults, an annotation, a template), and the
last one must not undo what the first one has promised. Rules of translation and maps add up instead; two that say
something different about one id are refused.
"""

from __future__ import annotations

from fusewire.cli import options
from fusewire.cli.options import MS_RDONLY, MountOptions, OptionError
from fusewire.cli.share_table import (
    DEFAULT_QUEUES,
    DIRECTORY_KEYS,
    GROUPS,
    IMAGE_KEYS,
    SHARE,
    VIRTIOFSD,
    Row,
    rows_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["SHARE", "VIRTIOFSD", "OptionError", "ShareOptions", "describe", "parse", "usage"]


class ShareOptions:
    """What a command line asks for.

    program: SHARE or VIRTIOFSD, whose defaults differ. action: "help", "version", "capabilities", "qemu", or "" to
    serve. Exactly one of socket_path and fd (-1: none) is given, unless the action is one of the first three.
    socket_mode: permission bits, None for 0600, or 0660 with a group. tag: b"" if none was given. threads: of a pool;
    0 handles a request where it arrives. rlimit_nofile: None for as many as there may be, 0 to leave it. sandbox,
    seccomp, modcaps (name, kept?), uid_map and gid_map (inside, outside, count) say what confinement is wanted.
    mount: what `open_source` has to know. said: the keys that were given, as opposed to defaults. ignored: what was
    given and changes nothing, with the reason.
    """

    __slots__ = (
        "action",
        "as_json",
        "daemonize",
        "debug",
        "fd",
        "gid_map",
        "ignored",
        "landlock",
        "log_level",
        "modcaps",
        "mount",
        "once",
        "pid_file",
        "program",
        "queues",
        "rlimit_nofile",
        "said",
        "sandbox",
        "seccomp",
        "socket_group",
        "socket_mode",
        "socket_path",
        "source",
        "syslog",
        "tag",
        "threads",
        "uid_map",
    )

    def __init__(self, program: str) -> None:
        like_virtiofsd = program == VIRTIOFSD
        self.program = program
        self.action = ""
        self.source = ""
        self.socket_path = ""
        self.socket_group = ""
        self.socket_mode: int | None = None
        self.fd = -1
        self.pid_file = ""
        self.tag = b""
        self.queues = DEFAULT_QUEUES
        self.threads = 0
        self.once = like_virtiofsd
        self.daemonize = False
        self.debug = False
        self.as_json = False
        self.log_level = "info"
        self.syslog = False
        self.rlimit_nofile: int | None = None
        self.sandbox = "namespace" if like_virtiofsd else "auto"
        self.seccomp = "kill"
        self.landlock = "auto"
        self.modcaps: tuple[tuple[str, bool], ...] = ()
        self.uid_map: tuple[tuple[int, int, int], ...] = ()
        self.gid_map: tuple[tuple[int, int, int], ...] = ()
        self.mount = MountOptions()
        self.said: frozenset[str] = frozenset()
        self.ignored: tuple[tuple[str, str], ...] = ()

    @property
    def read_only(self) -> bool:
        """True after `--readonly`."""
        return self.mount.read_only

    @property
    def directory(self) -> dict[str, Any]:
        """What concerns a host directory, under the names of fs.passthrough.Config."""
        return self.mount.directory


# virtiofsd's defaults where they are not those of fs.passthrough.Config. Where the C and the Rust one differ it is
# Rust's, which is the one that still lives: submounts are announced, and file handles used where they can be.
_VIRTIOFSD_DIRECTORY: dict[str, str | bool] = {
    "xattr": False,
    "posix_lock": False,
    "flock": False,
    "killpriv_v2": False,
    "allow_direct_io": False,
    "allow_mmap": False,
    "preserve_noatime": False,
    "inode_file_handles": "prefer",
}


_ATTRIBUTES = frozenset(ShareOptions.__slots__)


# Parsing


class _Given:
    """One option as it was typed, and its value."""

    __slots__ = ("row", "typed", "value")

    def __init__(self, row: Row, value: Any, typed: str) -> None:
        self.row = row
        self.value = value
        self.typed = typed


def parse(arguments: list[str], program: str = SHARE) -> ShareOptions:
    """Read a command line, without the program's name.

    Raises OptionError that names the option and says what would be right.
    """
    return _settle(list(_read(arguments, program)), program)


def _read(arguments: list[str], program: str) -> Iterator[_Given]:
    known = {word: row for row in rows_of(program) for word in row.words}
    waiting = list(reversed(arguments))
    only_names = False
    while waiting:
        word = waiting.pop()
        if only_names or word == "-" or not word.startswith("-"):
            if program == VIRTIOFSD:
                raise OptionError(word, f"is no option; write `--shared-dir {word}` if that is what is to be shared")
            yield _Given(known["source"], _converted(known["source"], word, word), word)
        elif word == "--":
            only_names = True
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            yield _long(known, name, value if equals else None, waiting)
        elif word.startswith("-o"):
            if word == "-o" and not waiting:
                raise OptionError("-o", "needs options behind it, as in `-o source=/srv,cache=none`")
            for element in _elements(word[2:] or waiting.pop()):
                yield _element(known, element)
        else:
            for letter in word[1:]:
                row = known.get(f"-{letter}")
                if row is None:
                    raise OptionError(word, f"-{letter} is not known; `{program} --help` lists the options")
                yield _Given(row, row.words[f"-{letter}"], f"-{letter}")


def _long(known: dict[str, Row], name: str, value: str | None, waiting: list[str]) -> _Given:
    row = known.get(name)
    typed = name if value is None else f"{name}={value}"
    if row is None:
        raise OptionError(typed, _unknown(name, known))
    fixed = row.words[name]
    if row.convert is None or fixed is False:
        if value is not None:
            raise OptionError(typed, f"takes no value; write `{name}`")
        return _Given(row, fixed, typed)
    if value is None and fixed is not None:
        return _Given(row, fixed, typed)
    if value is None and row.bare is not None:
        return _Given(row, row.bare, typed)
    if value is None:
        # A value may begin with one dash (--modcaps -chown), not with two: that is the next option.
        if not waiting or waiting[-1].startswith("--"):
            raise OptionError(name, f"needs a value: `{name}={row.value}`")
        value = waiting.pop()
        typed = f"{name} {value}"
    return _Given(row, _converted(row, value, typed), typed)


def _elements(text: str) -> list[str]:
    """The options of a `-o`. libvirt writes a comma of a path twice, as QEMU has it; libfuse has a backslash before."""
    return options.split(text if "\\" in text else text.replace(",,", "\\,"))


def _element(known: dict[str, Row], element: str) -> _Given:
    name, equals, value = element.partition("=")
    typed = f"-o {element}"
    row = None if name.startswith("-") else known.get(name)
    if row is None:
        raise OptionError(typed, _unknown(name, known))
    fixed = row.words[name]
    if fixed is not None:
        if equals:
            raise OptionError(typed, f"takes no value; write `-o {name}`")
        return _Given(row, fixed, typed)
    if not value:
        raise OptionError(typed, f"needs a value: `-o {name}={row.value}`")
    return _Given(row, _converted(row, value, typed), typed)


def _converted(row: Row, text: str, typed: str) -> Any:
    assert row.convert is not None
    try:
        return row.convert(text)
    except ValueError as error:
        raise OptionError(typed, str(error)) from None


def _unknown(name: str, known: dict[str, Row]) -> str:
    """Why it is not taken: the option of the same spelling with the fewest typing errors, if there is one."""
    long = name.startswith("--")
    offered = [word for word, row in known.items() if not row.quiet and word.startswith("--" if long else "")]
    if not long:
        offered = [word for word in offered if not word.startswith("-")]
    if 0 < len(name) <= 64:
        best = min(offered, key=lambda word: options._distance(name.lower(), word))
        if options._distance(name.lower(), best) <= (len(name.lstrip("-")) + 1) // 2:
            row = known[best]
            shown = best if row.words[best] is not None else f"{best}={row.value}"
            return f"is not known; did you mean `{shown if long else '-o ' + shown}`?"
    return "is not known; `--help` lists the options"


# From what was typed to what holds


def _settle(given: list[_Given], program: str) -> ShareOptions:
    result = ShareOptions(program)
    if program == VIRTIOFSD:
        result.directory.update(_VIRTIOFSD_DIRECTORY)
    values: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for one in given:
        row, key = one.row, one.row.key
        if row.many:
            before = values.get(key, ())
            values[key] = before if one.value in before else (*before, one.value)
        else:
            if row.strict and key in values and values[key] != one.value:
                raise OptionError(
                    one.typed,
                    f"contradicts `{typed[key]}`: what decides on what is shared, with whom and how confined is said "
                    "once, not overridden; remove one of the two",
                )
            values[key] = one.value
        typed[key] = one.typed
        if row.note:
            result.ignored = (*result.ignored, (one.typed, row.note))
        _apply(result, key, values[key])
    # The guest's file is not a file of this kernel's, and its processes are not this machine's.
    result.directory["passthrough"] = "off"
    result.directory["remote"] = True
    result.directory.setdefault("allow_direct_io", False)
    result.said = frozenset(values)
    result.mount.given = [one.typed for one in given]
    _imply(result, values, typed)
    _check_ids(result, values, typed)
    if result.action not in ("help", "version", "capabilities"):
        _check_whole(result, typed)
    return result


def _apply(result: ShareOptions, key: str, value: Any) -> None:
    if key == "readonly":
        result.mount.flags = result.mount.flags & ~MS_RDONLY | (MS_RDONLY if value else 0)
    elif key == "timeout":
        result.mount.entry_timeout = result.mount.attr_timeout = value
    elif key == "debug":
        result.debug, result.log_level, result.daemonize = True, "debug", False
    elif key == "log_level":
        result.log_level = value
        result.debug = value in ("debug", "trace")
    elif key == "action":
        result.action = result.action or value
    elif key in DIRECTORY_KEYS:
        result.directory[key] = value
    elif key in IMAGE_KEYS:
        setattr(result.mount, key, value)
    elif key in _ATTRIBUTES:
        setattr(result, key, value)


def _imply(result: ShareOptions, values: dict[str, Any], typed: dict[str, str]) -> None:
    """Switch extended attributes on for what needs them."""
    directory = result.directory
    for key in ("xattrmap", "posix_acl", "security_label"):
        if not directory.get(key):
            continue
        if values.get("xattr") is False:
            raise OptionError(typed[key], f"needs extended attributes; leave `{typed['xattr']}` out")
        directory["xattr"] = True


def _check_ids(result: ShareOptions, values: dict[str, Any], typed: dict[str, str]) -> None:
    """Check what is said of ids and names of attributes, by those who will read it."""
    for key in ("translate_uid", "translate_gid"):
        rules = result.directory.get(key)
        if not isinstance(rules, tuple):
            continue
        if result.directory.get("posix_acl"):
            raise OptionError(
                typed[key],
                f"goes not with `{typed['posix_acl']}`: the ids in access control lists are not translated; "
                "choose one of the two",
            )
        from fusewire.fs.idmap import parse_translations

        try:
            parse_translations(rules)
        except ValueError as error:
            raise OptionError(typed[key], str(error)) from None
    rules = result.directory.get("xattrmap")
    if isinstance(rules, str):
        from fusewire.fs.xattrmap import XattrMap

        try:
            XattrMap.parse(rules)
        except ValueError as error:
            raise OptionError(typed["xattrmap"], str(error)) from None
    for key in ("uid_map", "gid_map"):
        if key in typed and result.sandbox != "namespace":
            raise OptionError(
                typed[key],
                "is for the user namespace of `--sandbox namespace`; without one, `--translate-uid` and "
                "`--translate-gid` say who is who",
            )
    handles = result.directory.get("inode_file_handles", "never")
    if handles != "never" and ("dac_read_search", False) in result.modcaps:
        raise OptionError(
            typed["modcaps"], "drops what file handles take; add `--inode-file-handles=never`, or leave it out"
        )
    if values.get("migration_mode") == "file-handles":
        for key in ("migration_verify_handles", "migration_confirm_paths"):
            if key in typed:
                raise OptionError(typed[key], f"is for find-paths, not for `{typed['migration_mode']}`")


def _check_whole(result: ShareOptions, typed: dict[str, str]) -> None:
    """Check that there is something to share, and one way to connect."""
    if not result.source:
        what = "--shared-dir=PATH" if result.program == VIRTIOFSD else "SOURCE, a directory or an image"
        raise OptionError("--shared-dir", f"nothing is said about what to share; add {what}")
    if not result.socket_path and result.fd < 0:
        raise OptionError("--socket-path", "is missing; say where the virtual machine connects: --socket-path=PATH")
    if result.fd >= 0:
        for key in ("socket_path", "socket_group", "socket_mode"):
            if key in typed:
                raise OptionError(
                    typed[key], f"goes not with `{typed['fd']}`, a socket that listens already; leave one of them out"
                )
        if result.action == "qemu":
            raise OptionError("--print-qemu", f"needs --socket-path: where `{typed['fd']}` listens is not known")


# Help


def usage(program: str) -> str:
    """How the command is called, in a line."""
    if program == VIRTIOFSD:
        return "fusewire-virtiofsd --shared-dir=PATH (--socket-path=PATH | --fd=N) [options]"
    return "fusewire share SOURCE --socket-path=PATH [options]"


def describe(program: str) -> str:
    """The help: a line for each option, in groups."""
    about = (
        "Share a directory or an image with a virtual machine over virtio-fs; virtiofsd's command line."
        if program == VIRTIOFSD
        else "Share a directory or an image with a virtual machine over virtio-fs."
    )
    lines = [f"usage: {usage(program)}", "", about, ""]
    for title, rows in GROUPS:
        shown = [row for row in rows if (program == SHARE or not row.ours) and not row.quiet]
        if not shown:
            continue
        lines.append(f"{title}:")
        for row in shown:
            left = _spelling(row)
            lines.append(f"  {left:<34}{row.help}" if len(left) < 34 else f"  {left}\n{'':36}{row.help}")
        lines.append("")
    lines.append("What concerns caching and files may be denied as --no-NAME, and is also understood the way that C")
    lines.append("virtiofsd has it: `-o source=PATH,cache=MODE,xattr,no_flock`.")
    return "\n".join(lines)


def _spelling(row: Row) -> str:
    words = [word for word in row.words if word.startswith("-") and not word.startswith("--no-")]
    words = words or [f"-o {word}" for word in row.words if not word.startswith("no_")]
    if not row.value:
        return ", ".join(words)
    return f"{words[0]}[={row.value}]" if row.bare is not None else f"{words[0]}={row.value}"
