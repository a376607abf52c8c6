"""The options of `fusewire share` and of virtiofsd, C's `-o` list and Rust's long options: one row for each.

Layer: cli. Plain data and the conversion of single values, no I/O. What options mean together is for share_options.
"""

from __future__ import annotations

from fusewire.cli import options
from fusewire.cli.messages import LEVELS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

SHARE = "fusewire share"
VIRTIOFSD = "fusewire-virtiofsd"
DEFAULT_QUEUES = 4
_MAX_TAG = 36  # struct virtio_fs_config, virtio specification 5.11.4
_LAST_ID = 0xFFFFFFFF
_CAPABILITIES = (
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service "
    "net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct "
    "sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control "
    "setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore"
)


# Values


def _text(what: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if not text or "\0" in text:
            raise ValueError(f"needs {what}")
        return text

    return convert


def _choice(*offered: str, **same: str) -> Callable[[str], str]:
    """One of `offered`; `same` has other spellings of them."""

    def convert(text: str) -> str:
        if text not in offered and text not in same:
            raise ValueError(f"must be one of {', '.join(offered)}")
        return same.get(text, text)

    return convert


def _negotiated(text: str) -> bool:
    return _choice("never", "auto", "always")(text) != "never"


def _tag(text: str) -> bytes:
    tag = text.encode(errors="surrogateescape")
    if not 0 < len(tag) <= _MAX_TAG:
        raise ValueError(f"a tag has from 1 to {_MAX_TAG} bytes, this one has {len(tag)}")
    return tag


def _mode(text: str) -> int:
    mode = options._octal(text)
    if mode & 0o600 != 0o600:
        raise ValueError("takes reading and writing from the owner, who could not connect; use 600, 660 or 666")
    return mode


def _capabilities(text: str) -> tuple[tuple[str, bool], ...]:
    found = []
    for item in text.split(":"):
        name = item[1:].lower().removeprefix("cap_")
        if item[:1] not in ("+", "-"):
            raise ValueError(f"{item!r} has neither + nor - before it, as in +sys_admin:-chown")
        if name not in _CAPABILITIES.split():
            raise ValueError(f"{name!r} is no capability of capabilities(7), such as chown or sys_admin")
        found.append((name, item[0] == "+"))
    return tuple(found)


def _map(text: str) -> tuple[int, int, int]:
    fields = text.removeprefix(":").removesuffix(":").split(":")
    if len(fields) != 3 or not all(field.isascii() and field.isdigit() and len(field) <= 10 for field in fields):
        raise ValueError("is not :INSIDE:OUTSIDE:COUNT:, as in :0:100000:65536:")
    inside, outside, count = (int(field) for field in fields)
    if not count or max(inside, outside) + count > _LAST_ID:
        raise ValueError(f"leads beyond the last id, {_LAST_ID - 1}" if count else "is for no id: the count is 0")
    return inside, outside, count


# The table


class Row:
    """One option.

    words: its spellings, those with dashes as arguments and those without as elements of `-o`; with the value that a
    spelling stands for, or None where the value follows. bare: what it stands for without a value, where that is
    allowed. strict: two different values are refused. many: they add up. ours: virtiofsd has none such. quiet: not in
    the help. note: why it has no effect.
    """

    __slots__ = ("bare", "convert", "help", "key", "many", "note", "ours", "quiet", "strict", "value", "words")

    def __init__(
        self,
        key: str,
        text: str,
        words: dict[str, Any],
        *,
        value: str = "",
        convert: Callable[[str], Any] | None = None,
        bare: Any = None,
        strict: bool = False,
        many: bool = False,
        ours: bool = False,
        quiet: bool = False,
        note: str = "",
    ) -> None:
        self.key = key
        self.help = text
        self.words = words
        self.value = value
        self.convert = convert
        self.bare = bare
        self.strict = strict
        self.many = many
        self.ours = ours
        self.quiet = quiet
        self.note = note


def _switch(key: str, text: str, **how: Any) -> Row:
    """An option that is said or denied, in both spellings."""
    long = key.replace("_", "-")
    return Row(key, text, {f"--{long}": True, f"--no-{long}": False, key: True, f"no_{key}": False}, **how)


def _valued(key: str, value: str, convert: Callable[[str], Any], text: str, *words: str, **how: Any) -> Row:
    spelled = words or (f"--{key.replace('_', '-')}", key)
    return Row(key, text, dict.fromkeys(spelled), value=value, convert=convert, **how)


_WHOLE = options._whole
_NOT_MIGRATED = "the state of a guest's files cannot be migrated by this version"
_SOURCE = (
    _valued(
        "source", "PATH", _text("a path"), "the directory or image to share", "--shared-dir", "source", strict=True
    ),
    Row(
        "readonly",
        "the guest cannot change anything; an image is always so",
        {"--readonly": True, "ro": True, "rw": False},
        strict=True,
    ),
    _switch("announce_submounts", "the guest sees mounts below the directory as such (default)", strict=True),
    _valued("tag", "TAG", _tag, "name for front ends that ask the daemon for it (crosvm); QEMU has its own `tag=`"),
)
_SOCKET = (
    _valued("socket_path", "PATH", _text("a path"), "listen there", "--socket-path", "--socket", strict=True),
    _valued("socket_group", "GROUP", _text("a group"), "whose members may connect", "--socket-group", strict=True),
    _valued(
        "socket_mode", "OCTAL", _mode, "permission bits of the socket (default 600)", "--mode", strict=True, ours=True
    ),
    _valued("fd", "N", _WHOLE(0, (1 << 31) - 1), "an inherited socket that listens already", "--fd", strict=True),
    _valued("pid_file", "PATH", _text("a path"), "also write the process id there", "--pid-file", ours=True),
    _valued("queues", "N", _WHOLE(1, 255), f"request queues (default {DEFAULT_QUEUES})", "--queues", ours=True),
    Row("once", "end with the first client (default: --reconnect)", {"--once": True, "--reconnect": False}, ours=True),
)
_CACHING = (
    _valued(
        "cache",
        "MODE",
        _choice("none", "metadata", "auto", "always", never="none"),
        "none (or never), metadata, auto (default) or always",
    ),
    _switch("writeback", "the guest collects writes"),
    _switch("allow_mmap", "shared mappings with cache=none"),
    _switch("allow_direct_io", "O_DIRECT of the guest reaches the host"),
    _switch("readdirplus", "attributes come with names (default, but for cache=none)"),
    _valued("timeout", "SECONDS", options._seconds, "how long the guest keeps names and attributes", "timeout"),
)
_FILES = (
    _switch("xattr", "extended attributes"),
    _valued("xattrmap", "RULES", _text("rules"), "how their names are stored; implies xattr", strict=True),
    _switch("posix_acl", "access control lists count; implies xattr", convert=_negotiated),
    _switch("security_label", "labels are set on creation; implies xattr", convert=_negotiated),
    _switch("killpriv_v2", "the daemon clears set-user-ID bits"),
    _switch("posix_lock", "record locks are taken on the host"),
    _switch("flock", "flock(2) too"),
    _valued(
        "inode_file_handles",
        "WHEN",
        _choice("never", "prefer", "mandatory", fallback="prefer"),
        "never, prefer or mandatory: handles in place of open descriptors",
        bare="prefer",
        strict=True,
    ),
    Row("preserve_noatime", "O_NOATIME of the guest reaches the host", {"--preserve-noatime": True}),
    _valued("translate_uid", "RULE", _text("a rule"), "TYPE:FROM:TO:COUNT, may be repeated", many=True),
    _valued("translate_gid", "RULE", _text("a rule"), "the same for groups", many=True),
)
_CONFINEMENT = (
    Row(
        "sandbox",
        "namespace, chroot, none, or auto: the strongest that works",
        {"--sandbox": None, "sandbox": None, "chroot": "chroot", "no_chroot": "namespace"},
        value="MODE",
        convert=_choice("namespace", "chroot", "none", "auto"),
        strict=True,
    ),
    _valued(
        "seccomp", "ACTION", _choice("none", "kill", "log", "trap"), "kill, trap, log or none", "--seccomp", strict=True
    ),
    _valued(
        "landlock",
        "WHEN",
        _choice("auto", "require", "off"),
        "auto (default), require or off: reach nothing else, on top of every sandbox",
        "--landlock",
        strict=True,
        ours=True,
    ),
    _valued("modcaps", "LIST", _capabilities, "capabilities to keep or drop: +sys_admin:-chown", strict=True),
    _valued("uid_map", "MAP", _map, ":INSIDE:OUTSIDE:COUNT: of the user namespace", "--uid-map", many=True),
    _valued("gid_map", "MAP", _map, "the same for groups", "--gid-map", many=True),
)
_PROCESS = (
    _valued("rlimit_nofile", "N", _WHOLE(0, 1 << 31), "most descriptors (0: as it is)", "--rlimit-nofile"),
    _valued("threads", "N", _WHOLE(0, 65535), "threads of a request queue (0, default: two)", "--thread-pool-size"),
    Row(
        "daemonize", "go on in the background once the socket listens (default: -f)", {"--daemonize": True, "-f": False}
    ),
    _valued(
        "log_level",
        "LEVEL",
        _choice(*LEVELS, err="error"),
        "error, warn, info (default), debug, trace or off",
        "--log-level",
        "log_level",
        "loglevel",
    ),
    Row("debug", "every request and its answer; implies -f", {"-d": True, "--debug": True, "debug": True}),
    Row("syslog", "messages go to syslog", {"--syslog": True}),
    Row("as_json", "print what a program wants to know as JSON", {"--json": True}, ours=True),
)
_ACTIONS = (
    Row("action", "print this help", {"-h": "help", "--help": "help"}),
    Row("action", "print the version", {"-V": "version", "--version": "version"}),
    Row("action", "what this daemon can do, as vhost-user.json has it", {"--print-capabilities": "capabilities"}),
    Row("action", "QEMU's arguments for this share", {"--print-qemu": "qemu"}, ours=True),
    Row("action", "the steps into the sandbox, each with its reason", {"--dry-run": "dry-run"}, ours=True),
)
_OF_MOUNT = "offset cache_size uid gid umask squash_owner entry_timeout attr_timeout negative_timeout"


def _of_mount(name: str) -> Row:
    row = options._KNOWN[name]
    words = {name: None if row.convert is not None else True}
    return Row(name, row.help, words, value=row.value, convert=row.convert, ours=True)


_IMAGE = tuple(_of_mount(name) for name in _OF_MOUNT.split())
IMAGE_KEYS = frozenset(row.key for row in _IMAGE)
# What is taken so that a command line works, and changes nothing.
_WITHOUT_EFFECT = (
    _valued("max_idle_threads", "N", _WHOLE(-1, 1 << 31), "", "max_idle_threads", quiet=True),
    Row("allow_root", "", {"allow_root": True}, quiet=True),
    Row("norace", "", {"norace": True}, quiet=True),
    _valued("fsname", "NAME", _text("a name"), "", "fsname", quiet=True),
    _valued("subtype", "NAME", _text("a name"), "", "subtype", quiet=True),
    _valued(
        "migration_mode",
        "MODE",
        _choice("find-paths", "file-handles"),
        "",
        "--migration-mode",
        quiet=True,
        note=_NOT_MIGRATED,
    ),
    _valued(
        "migration_on_error",
        "WHAT",
        _choice("abort", "guest-error"),
        "",
        "--migration-on-error",
        quiet=True,
        note=_NOT_MIGRATED,
    ),
    Row("migration_verify_handles", "", {"--migration-verify-handles": True}, quiet=True, note=_NOT_MIGRATED),
    Row("migration_confirm_paths", "", {"--migration-confirm-paths": True}, quiet=True, note=_NOT_MIGRATED),
)
GROUPS = (
    ("what is shared", _SOURCE),
    ("the socket", _SOCKET),
    ("caching in the guest", _CACHING),
    ("files of a directory", _FILES),
    ("files of an image", _IMAGE),
    ("confinement", _CONFINEMENT),
    ("the process", _PROCESS),
    ("instead of sharing", _ACTIONS),
)
DIRECTORY_KEYS = frozenset({row.key for row in (*_CACHING, *_FILES)} - {"timeout"} | {"announce_submounts"})


def rows_of(program: str) -> Iterator[Row]:
    for _, rows in GROUPS:
        for row in rows:
            if program == SHARE or not row.ours:
                yield row
    yield from _WITHOUT_EFFECT
