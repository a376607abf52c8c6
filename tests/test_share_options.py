"""The command lines of `fusewire share` and of virtiofsd: both spellings, what holds together, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusewire
from fusewire.cli import share_table
from fusewire.cli.share_options import SHARE, VIRTIOFSD, OptionError, describe, parse
from fusewire.cli.source import Source
from fusewire.fs.passthrough import Config
from fusewire.ops import Caller

BASE = ["--shared-dir", "/srv", "--socket-path", "/run/s"]
CALLER = Caller(0, 0, 1, 1)
DEMO = Path(fusewire.__file__).parent / "data" / "demo.sqsh"


def told(options, key):
    """What the options say under a key: of themselves, of the mount, or of a directory."""
    if key in options.directory:
        return options.directory[key]
    return getattr(options, key) if hasattr(options, key) else getattr(options.mount, key)


# One line per spelling of every option that either virtiofsd has: arguments, key, value.
ROWS = [
    # shared directory, tag
    (["--shared-dir", "/srv"], "source", "/srv"),
    (["--shared-dir=/srv"], "source", "/srv"),
    (["-o", "source=/srv"], "source", "/srv"),
    (["-osource=/srv"], "source", "/srv"),
    (["--tag", "fs"], "tag", b"fs"),
    (["--tag=" + "x" * 36], "tag", b"x" * 36),
    # the socket
    (["--socket-path=/run/s"], "socket_path", "/run/s"),
    (["--socket", "/run/s"], "socket_path", "/run/s"),
    (["--socket-group=kvm"], "socket_group", "kvm"),
    (["--socket-group", "kvm"], "socket_group", "kvm"),
    # the process
    (["--daemonize"], "daemonize", True),
    (["-f"], "daemonize", False),
    (["--daemonize", "-f"], "daemonize", False),
    (["-f", "--daemonize"], "daemonize", True),
    (["--daemonize", "-d"], "daemonize", False),
    (["--print-capabilities"], "action", "capabilities"),
    (["-h"], "action", "help"),
    (["--help"], "action", "help"),
    (["-V"], "action", "version"),
    (["--version"], "action", "version"),
    (["-d"], "debug", True),
    (["-d"], "log_level", "debug"),
    (["-df"], "debug", True),
    (["-o", "debug"], "debug", True),
    (["--debug"], "debug", True),
    (["-o", "log_level=err"], "log_level", "error"),
    (["-o", "log_level=warn"], "log_level", "warn"),
    (["-o", "loglevel=info"], "log_level", "info"),
    (["--log-level", "trace"], "log_level", "trace"),
    (["--log-level=off"], "log_level", "off"),
    (["--log-level=debug"], "debug", True),
    (["--syslog"], "syslog", True),
    (["--rlimit-nofile=0"], "rlimit_nofile", 0),
    (["--rlimit-nofile", "65536"], "rlimit_nofile", 65536),
    (["--thread-pool-size=1"], "threads", 1),
    (["--thread-pool-size", "64"], "threads", 64),
    # confinement
    (["--sandbox", "none"], "sandbox", "none"),
    (["--sandbox=chroot"], "sandbox", "chroot"),
    (["-o", "sandbox=namespace"], "sandbox", "namespace"),
    (["-o", "chroot"], "sandbox", "chroot"),
    (["-o", "no_chroot"], "sandbox", "namespace"),
    (["--seccomp", "none"], "seccomp", "none"),
    (["--seccomp=log"], "seccomp", "log"),
    (["--seccomp=trap"], "seccomp", "trap"),
    (["--seccomp=kill"], "seccomp", "kill"),
    (["--modcaps=+sys_admin:-chown"], "modcaps", (("sys_admin", True), ("chown", False))),
    (["--modcaps", "-mknod"], "modcaps", (("mknod", False),)),
    (["-o", "modcaps=+CAP_SYS_ADMIN"], "modcaps", (("sys_admin", True),)),
    (["--sandbox=namespace", "--uid-map=:0:100000:65536:"], "uid_map", ((0, 100000, 65536),)),
    (
        ["--sandbox=namespace", "--gid-map", ":0:1000:1:", "--gid-map", ":1:100000:9:"],
        "gid_map",
        ((0, 1000, 1), (1, 100000, 9)),
    ),
    (["--translate-uid=map:0:1000:1"], "translate_uid", ("map:0:1000:1",)),
    (
        ["--translate-uid", "forbid-guest:0:1", "--translate-uid", "guest:1:9:1"],
        "translate_uid",
        ("forbid-guest:0:1", "guest:1:9:1"),
    ),
    (["--translate-gid=squash-guest:0:1000:65536"], "translate_gid", ("squash-guest:0:1000:65536",)),
    (
        ["--translate-gid=host:0:1:1", "--translate-gid=squash-host:7:8:1"],
        "translate_gid",
        ("host:0:1:1", "squash-host:7:8:1"),
    ),
    # caching
    (["-o", "cache=none"], "cache", "none"),
    (["-o", "cache=auto"], "cache", "auto"),
    (["-o", "cache=always"], "cache", "always"),
    (["--cache", "never"], "cache", "none"),
    (["--cache=metadata"], "cache", "metadata"),
    (["--cache=auto"], "cache", "auto"),
    (["--cache=always"], "cache", "always"),
    (["-o", "timeout=2.5"], "entry_timeout", 2.5),
    (["-o", "timeout=2.5"], "attr_timeout", 2.5),
    (["--allow-mmap"], "allow_mmap", True),
    (["-o", "readdirplus"], "readdirplus", True),
    (["-o", "no_readdirplus"], "readdirplus", False),
    (["--no-readdirplus"], "readdirplus", False),
    (["-o", "writeback"], "writeback", True),
    (["-o", "no_writeback"], "writeback", False),
    (["--writeback"], "writeback", True),
    (["-o", "allow_direct_io"], "allow_direct_io", True),
    (["-o", "no_allow_direct_io"], "allow_direct_io", False),
    (["--allow-direct-io"], "allow_direct_io", True),
    (["--preserve-noatime"], "preserve_noatime", True),
    # attributes and locks
    (["-o", "xattr"], "xattr", True),
    (["-o", "no_xattr"], "xattr", False),
    (["--xattr"], "xattr", True),
    (["-o", "xattrmap=:map::user.virtiofs.:"], "xattrmap", ":map::user.virtiofs.:"),
    (["-o", "xattrmap=:map::user.virtiofs.:"], "xattr", True),
    (["--xattrmap", ":map::user.virtiofs.:"], "xattrmap", ":map::user.virtiofs.:"),
    (["-o", "posix_acl"], "posix_acl", True),
    (["-o", "posix_acl"], "xattr", True),
    (["-o", "no_posix_acl"], "posix_acl", False),
    (["--posix-acl"], "posix_acl", True),
    (["--posix-acl=never"], "posix_acl", False),
    (["--posix-acl=always"], "posix_acl", True),
    (["-o", "security_label"], "security_label", True),
    (["-o", "no_security_label"], "security_label", False),
    (["--security-label"], "xattr", True),
    (["--security-label=auto"], "security_label", True),
    (["-o", "killpriv_v2"], "killpriv_v2", True),
    (["-o", "no_killpriv_v2"], "killpriv_v2", False),
    (["--killpriv-v2"], "killpriv_v2", True),
    (["--no-killpriv-v2"], "killpriv_v2", False),
    (["-o", "posix_lock"], "posix_lock", True),
    (["-o", "no_posix_lock"], "posix_lock", False),
    (["-o", "flock"], "flock", True),
    (["-o", "no_flock"], "flock", False),
    # nodes
    (["-o", "announce_submounts"], "announce_submounts", True),
    (["--announce-submounts"], "announce_submounts", True),
    (["--no-announce-submounts"], "announce_submounts", False),
    (["--inode-file-handles=never"], "inode_file_handles", "never"),
    (["--inode-file-handles=mandatory"], "inode_file_handles", "mandatory"),
    (["--inode-file-handles=prefer"], "inode_file_handles", "prefer"),
    (["--inode-file-handles=fallback"], "inode_file_handles", "prefer"),
    (["--inode-file-handles"], "inode_file_handles", "prefer"),
    (["--readonly"], "read_only", True),
    # taken for the command line's sake
    (["-o", "allow_root,fsname=fs,subtype=x,max_idle_threads=10,norace"], "source", "/srv"),
    (["--migration-mode", "find-paths", "--migration-verify-handles", "--migration-confirm-paths"], "source", "/srv"),
    (["--migration-mode=file-handles", "--migration-on-error=guest-error"], "source", "/srv"),
]


@pytest.mark.parametrize("program", [SHARE, VIRTIOFSD])
@pytest.mark.parametrize(
    ("arguments", "key", "value"), ROWS, ids=lambda found: " ".join(found) if isinstance(found, list) else ""
)
def test_every_option_of_both_virtiofsds_is_understood(program, arguments, key, value):
    found = told(parse([*BASE, *arguments], program), key)
    assert found == value
    assert type(found) is type(value)


def test_an_inherited_socket_takes_the_place_of_a_path():
    for words in (["--fd=17"], ["--fd", "17"]):
        found = parse(["--shared-dir=/srv", *words], VIRTIOFSD)
        assert (found.fd, found.socket_path) == (17, "")


def test_virtiofsd_has_its_own_defaults():
    found = parse(BASE, VIRTIOFSD)
    assert {
        "xattr": False,
        "posix_lock": False,
        "flock": False,
        "killpriv_v2": False,
    }.items() <= found.directory.items()
    assert (found.directory["allow_direct_io"], found.directory["allow_mmap"]) == (False, False)
    assert found.directory["inode_file_handles"] == "prefer"
    assert (found.sandbox, found.seccomp, found.once, found.daemonize) == ("namespace", "kill", True, False)
    assert (found.log_level, found.debug, found.threads, found.rlimit_nofile) == ("info", False, 0, None)
    config = Config(**{**found.directory, "passthrough": False})
    assert (config.cache, config.announce_submounts, config.writeback, config.readdirplus) == (
        "auto",
        True,
        False,
        True,
    )


def test_share_has_the_defaults_of_a_mount():
    found = parse(["/srv", "--socket-path", "s"])
    assert found.directory == {"passthrough": "off", "remote": True, "allow_direct_io": False}
    config = Config(passthrough=False)
    assert (config.xattr, config.posix_lock, config.flock, config.killpriv_v2) == (True, True, True, True)
    assert (found.source, found.socket_path, found.sandbox, found.once) == ("/srv", "s", "auto", False)
    assert (found.queues, found.tag, found.said) == (4, b"", {"source", "socket_path"})


def test_what_is_ours_is_understood_by_share_alone():
    words = ["--queues=8", "--once", "--pid-file=/run/p", "--mode=660", "--json", "--print-qemu"]
    found = parse(["/srv", "--socket-path=s", *words])
    assert (found.queues, found.once, found.pid_file, found.socket_mode) == (8, True, "/run/p", 0o660)
    assert (found.as_json, found.action) == (True, "qemu")
    assert parse(["/srv", "--socket-path=s", "--once", "--reconnect"]).once is False
    for word in words:
        with pytest.raises(OptionError, match="is not known"):
            parse([*BASE, word], VIRTIOFSD)
    with pytest.raises(OptionError, match="`/srv`: is no option; write `--shared-dir /srv`"):
        parse(["/srv", "--socket-path=s"], VIRTIOFSD)


def test_options_of_images_reach_the_mount():
    found = parse(
        ["a.sqsh", "--socket-path=s", "-o", "offset=4K,cache_size=1M,uid=5,gid=6,umask=022,squash_owner"]
    ).mount
    assert (found.offset, found.cache_size, found.uid, found.gid) == (4096, 1 << 20, 5, 6)
    assert (found.umask, found.squash_owner) == (0o22, True)
    later = parse(["a", "--socket-path=s", "-o", "timeout=1,entry_timeout=2,negative_timeout=3"]).mount
    assert (later.entry_timeout, later.attr_timeout, later.negative_timeout) == (2.0, 1.0, 3.0)
    assert parse(["a", "--socket-path=s", "-o", "ro"]).read_only


# As they are really called


def test_libvirt_before_it_knew_long_options():
    found = parse(
        ["--fd=24", "-o", "source=/srv/share,cache=always,sandbox=chroot,xattr,no_flock,posix_lock", "-d"], VIRTIOFSD
    )
    assert (found.fd, found.source, found.sandbox, found.debug) == (24, "/srv/share", "chroot", True)
    assert {"cache": "always", "xattr": True, "flock": False, "posix_lock": True}.items() <= found.directory.items()


def test_libvirt_writes_a_comma_of_a_path_twice():
    found = parse(["--fd=24", "-o", "source=/srv/a,,xattr,,b,cache=none"], VIRTIOFSD)
    assert (found.source, found.directory["cache"], found.directory["xattr"]) == ("/srv/a,xattr,b", "none", False)
    assert parse(["--fd=3", "-o", r"source=/srv/a\,b"], VIRTIOFSD).source == "/srv/a,b"
    assert parse(["--fd=3", "--shared-dir", "/srv/a,,b"], VIRTIOFSD).source == "/srv/a,,b"


def test_libvirt_with_long_options_as_an_ordinary_user():
    found = parse(
        ["--fd=24", "--shared-dir", "/home/a b", "--cache", "never", "--xattr", "--thread-pool-size=4"]
        + ["--rlimit-nofile=524288", "--log-level", "debug", "--uid-map=:0:1000:1:", "--uid-map=:1:100000:65536:"]
        + ["--gid-map=:0:1000:1:", "--gid-map=:1:100000:65536:"],
        VIRTIOFSD,
    )
    assert (found.source, found.directory["cache"], found.threads, found.rlimit_nofile) == (
        "/home/a b",
        "none",
        4,
        524288,
    )
    assert found.uid_map == found.gid_map == ((0, 1000, 1), (1, 100000, 65536))


def test_kata_containers():
    found = parse(
        ["--syslog", "--cache=auto", "--shared-dir=/run/kata-containers/shared/sandboxes/1/shared", "--fd=3"]
        + ["--thread-pool-size=1", "--announce-submounts"],
        VIRTIOFSD,
    )
    assert (found.fd, found.threads, found.syslog, found.directory["announce_submounts"]) == (3, 1, True, True)
    older = parse(["--fd=3", "-o", "source=/run/x,cache=none", "--syslog", "-o", "no_posix_lock", "-f"], VIRTIOFSD)
    assert (older.source, older.directory["cache"], older.directory["posix_lock"]) == ("/run/x", "none", False)


def test_qemu_as_its_manual_has_it():
    found = parse(
        ["--socket-path=/tmp/vhostqemu", "-o", "source=/srv", "-o", "cache=always", "-o", "timeout=10"], VIRTIOFSD
    )
    assert (found.socket_path, found.source, found.mount.attr_timeout) == ("/tmp/vhostqemu", "/srv", 10.0)


# Repetitions


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "source=/"],
        ["--shared-dir=/"],
        ["--socket-path=/run/other"],
        ["--socket=/run/other"],
        ["--sandbox=chroot", "--sandbox", "none"],
        ["-o", "sandbox=chroot", "--sandbox=none"],
        ["-o", "chroot,sandbox=namespace"],
        ["--seccomp=kill", "--seccomp=none"],
        ["--announce-submounts", "--no-announce-submounts"],
        ["-o", "announce_submounts,no_announce_submounts"],
        ["--modcaps=-mknod", "-o", "modcaps=+sys_admin"],
        ["--readonly", "-o", "rw"],
        ["--socket-group=kvm", "--socket-group=users"],
        ["--xattrmap=:map::user.v.:", "-o", "xattrmap=:ok:all:::"],
    ],
)
@pytest.mark.parametrize("program", [SHARE, VIRTIOFSD])
def test_what_would_widen_the_share_is_not_overridden(program, words):
    with pytest.raises(OptionError) as caught:
        parse([*BASE, *words], program)
    assert "contradicts `" in str(caught.value)
    last = words[-1] if words[-2:-1] not in (["-o"], ["--sandbox"]) else words[-1].split(",")[-1]
    assert last in caught.value.option  # and the one before it in the reason
    assert "remove one of the two" in caught.value.reason


def test_modes_of_the_socket_and_inherited_ones_are_not_overridden():
    with pytest.raises(OptionError, match=r"`--mode=666`: contradicts `--mode=600`"):
        parse([*BASE, "--mode=600", "--mode=666"])
    with pytest.raises(OptionError, match=r"`--fd 4`: contradicts `--fd=3`"):
        parse(["--shared-dir=/srv", "--fd=3", "--fd", "4"], VIRTIOFSD)
    with pytest.raises(OptionError, match="`/b`: contradicts `/a`"):
        parse(["/a", "/b", "--socket-path=s"])


def test_an_equal_repetition_passes_whatever_its_spelling():
    found = parse(
        [
            *BASE,
            "-o",
            "source=/srv,chroot,announce_submounts,modcaps=-mknod",
            "--sandbox=chroot",
            "--announce-submounts",
        ]
        + ["--socket=/run/s", "--modcaps", "-mknod", "--translate-uid=map:0:5:1", "-o", "translate_uid=map:0:5:1"],
        VIRTIOFSD,
    )
    assert (found.source, found.sandbox, found.directory["translate_uid"]) == ("/srv", "chroot", ("map:0:5:1",))


def test_of_other_repetitions_the_last_one_wins_across_spellings():
    found = parse(
        [*BASE, "--cache=always", "-o", "cache=none,no_xattr,flock", "--xattr", "--no-flock", "-o", "loglevel=warn"]
    )
    assert (found.directory["cache"], found.directory["xattr"], found.directory["flock"]) == ("none", True, False)
    assert parse([*BASE, "-d", "--log-level=info"]).debug is False
    assert parse([*BASE, "--thread-pool-size=1", "--thread-pool-size=2"]).threads == 2


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--socket-path=s"], "`--shared-dir`: nothing is said about what to share"),
        (["/srv"], "`--socket-path`: is missing; say where"),
        (["/srv", "--fd=3", "--socket-path=s"], "`--socket-path=s`: goes not with `--fd=3`"),
        (["/srv", "--fd=3", "--socket-group=kvm"], "`--socket-group=kvm`: goes not with `--fd=3`"),
        (["/srv", "--fd=3", "--mode=600"], "`--mode=600`: goes not with `--fd=3`"),
        (["/srv", "--fd=3", "--print-qemu"], "`--print-qemu`: needs --socket-path"),
        (["/srv", "--fd=x"], "`--fd=x`: needs a whole number"),
        (["/srv", "--fd=-1"], "`--fd=-1`: needs a whole number"),
        ([*BASE, "--tag="], "`--tag=`: a tag has from 1 to 36 bytes, this one has 0"),
        ([*BASE, "--tag=" + "é" * 19], "a tag has from 1 to 36 bytes, this one has 38"),
        ([*BASE, "--mode=400"], "`--mode=400`: takes reading and writing from the owner"),
        ([*BASE, "--mode=9"], "`--mode=9`: "),
        ([*BASE, "--queues=0"], "`--queues=0`: must be from 1 to 255"),
        ([*BASE, "--cache=some"], "`--cache=some`: must be one of none, metadata, auto, always"),
        ([*BASE, "-o", "cache=some"], "`-o cache=some`: must be one of"),
        ([*BASE, "--cache"], "`--cache`: needs a value: `--cache=MODE`"),
        ([*BASE, "--cache", "--xattr"], "`--cache`: needs a value"),
        ([*BASE, "-o", "cache"], "`-o cache`: needs a value: `-o cache=MODE`"),
        ([*BASE, "-o"], "`-o`: needs options behind it"),
        ([*BASE, "--xattr=yes"], "`--xattr=yes`: takes no value; write `--xattr`"),
        ([*BASE, "-o", "xattr=yes"], "`-o xattr=yes`: takes no value; write `-o xattr`"),
        ([*BASE, "--no-posix-acl=auto"], "takes no value"),
        ([*BASE, "--posix-acl=perhaps"], "must be one of never, auto, always"),
        ([*BASE, "--sandbox=jail"], "must be one of namespace, chroot, none"),
        ([*BASE, "--seccomp=maybe"], "must be one of none, kill, log, trap"),
        ([*BASE, "--modcaps=sys_admin"], "'sys_admin' has neither \\+ nor - before it"),
        ([*BASE, "--modcaps=+root"], "'root' is no capability"),
        ([*BASE, "--uid-map=:0:1000:1:"], "`--uid-map=:0:1000:1:`: is for the user namespace of `--sandbox namespace`"),
        ([*BASE, "--sandbox=namespace", "--uid-map=0-5"], "is not :INSIDE:OUTSIDE:COUNT:"),
        ([*BASE, "--sandbox=namespace", "--gid-map=:0:1:0:"], "is for no id"),
        ([*BASE, "--sandbox=namespace", "--gid-map=:0:4294967295:1:"], "beyond the last id"),
        ([*BASE, "--posix-acl", "--translate-uid=map:0:1:1"], "goes not with `--posix-acl`"),
        ([*BASE, "-o", "posix_acl", "--translate-gid=map:0:1:1"], "goes not with `-o posix_acl`"),
        ([*BASE, "--translate-uid=map:0:1"], "`--translate-uid=map:0:1`: the translation 'map:0:1' is not"),
        (
            [*BASE, "--translate-uid=map:0:1:5", "--translate-uid=guest:4:9:1"],
            "both say what becomes of the guest's id 4",
        ),
        ([*BASE, "--xattrmap=:map:"], "`--xattrmap=:map:`: xattrmap: rule 1"),
        ([*BASE, "--no-xattr", "--posix-acl"], "`--posix-acl`: needs extended attributes; leave `--no-xattr` out"),
        ([*BASE, "-o", "security_label,no_xattr"], "leave `-o no_xattr` out"),
        ([*BASE, "--inode-file-handles=mandatory", "--modcaps=-dac_read_search"], "drops what file handles take"),
        (
            [*BASE, "--migration-mode=file-handles", "--migration-verify-handles"],
            "`--migration-verify-handles`: is for find-paths, not for `--migration-mode=file-handles`",
        ),
        ([*BASE, "-x"], "-x is not known"),
        ([*BASE, "-dx"], "-x is not known"),
        ([*BASE, "--"], None),
        ([*BASE, "--", "--cache"], "`--cache`: contradicts `--shared-dir /srv`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message):
    if message is None:
        parse(arguments)
        return
    with pytest.raises(OptionError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--chache=none"], "did you mean `--cache=MODE`"),
        (["--sandbx", "none"], "did you mean `--sandbox=MODE`"),
        (["--read-only"], "did you mean `--readonly`"),
        (["--socket_path=s"], "did you mean `--socket-path=PATH`"),
        (["-o", "chache=none"], "did you mean `-o cache=MODE`"),
        (["-o", "no_xatr"], "did you mean `-o no_xattr`"),
        (["-o", "--sandbox=none"], "is not known"),
        (["--supercalifragilistic"], "is not known; `--help` lists the options"),
        (["-o", "supercalifragilistic"], "is not known; `--help` lists the options"),
        (["-o", "allow_other"], "did you mean"),
    ],
)
@pytest.mark.parametrize("program", [SHARE, VIRTIOFSD])
def test_an_unknown_option_is_refused_with_the_nearest_one(program, arguments, hint):
    with pytest.raises(OptionError, match=hint):
        parse([*BASE, *arguments], program)


def test_migration_is_named_as_having_no_effect():
    found = parse([*BASE, "--migration-on-error=abort", "-o", "fsname=x"], VIRTIOFSD)
    assert [typed for typed, _ in found.ignored] == ["--migration-on-error=abort"]


def test_printing_needs_nothing_else():
    for word, action in (("--help", "help"), ("-V", "version"), ("--print-capabilities", "capabilities")):
        assert parse([word], VIRTIOFSD).action == action
        assert parse([word]).action == action


@pytest.mark.parametrize("program", [SHARE, VIRTIOFSD])
def test_the_help_has_every_option(program):
    text = describe(program)
    for row in share_table.rows_of(program):
        if not row.quiet:
            assert any(word in text for word in row.words), row.key
    assert ("--queues" in text) is (program == SHARE)
    assert max(map(len, text.splitlines())) <= 120


WORDS = st.sampled_from(
    sorted({word for row in share_table.rows_of(SHARE) for word in row.words}) + ["-o", "--", "x", ""]
)


@given(
    st.lists(st.one_of(WORDS, st.builds("{}={}".format, WORDS, st.text(max_size=6)), st.text(max_size=8)), max_size=6)
)
def test_any_words_give_options_or_an_error_that_names_one(words):
    for program in (SHARE, VIRTIOFSD):
        try:
            parse(words, program)
        except OptionError as error:
            said = error.reason
        else:
            said = "options"
        assert said


# The filesystem


def source_of(options):
    return Source(options.source, options.mount)


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "share"
    place.mkdir()
    (place / "file").write_bytes(b"here")
    return place


def test_a_directory_is_served_anew_by_each_call_and_stays_the_one_that_was_checked(directory):
    options = parse([str(directory), "--socket-path=s", "--cache=none", "--translate-uid=map:0:0:1", "--readonly"])
    before = len(os.listdir("/proc/self/fd"))
    factory = source_of(options)
    directory.rename(directory.with_name("moved"))
    directory.mkdir()
    for _ in range(3):
        filesystem = factory()
        assert filesystem.read_only
        assert filesystem.config.cache == "none"
        assert filesystem.config.passthrough is False
        assert filesystem.lookup(CALLER, 1, b"file")[0] > 1
        filesystem.destroy()
    factory.close()
    unused = source_of(options)
    unused.close()
    unused.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_image_stays_the_one_that_was_opened(tmp_path):
    image = tmp_path / "image"
    shutil.copy(DEMO, image)
    before = len(os.listdir("/proc/self/fd"))
    factory = source_of(parse([str(image), "--socket-path=s", "-o", "uid=77"]))
    first, second = factory(), factory()
    assert first is not second
    for filesystem in (first, second):
        assert struct.unpack_from("=I", filesystem.getattr(1, 0, 0), 16 + 68) == (77,)  # fuse_attr_out: attr.uid
    image.unlink()
    third = factory()
    for filesystem in (first, second, third):
        filesystem.destroy()
    factory.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_wrong_with_the_source_is_said_at_once(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match="nothing"):
        source_of(parse([str(tmp_path / "nothing"), "--socket-path=s"]))
    with pytest.raises(OSError, match="`uid=` is for images"):
        source_of(parse([str(directory), "--socket-path=s", "-o", "uid=5"]))
    with pytest.raises(OSError, match="file: "):
        source_of(parse([str(directory / "file"), "--socket-path=s"]))


# The programs, as far as they need no guest


def run(program, *arguments, **how):
    code = "import sys; from fusewire.cli.share import main; sys.exit(main(sys.argv[1:]))"
    words = ["-c", code] if program == SHARE else ["-m", "fusewire.cli.virtiofsd"]
    return subprocess.run(
        [sys.executable, "-W", "error", *words, *arguments], capture_output=True, text=True, timeout=60, **how
    )


def test_capabilities_are_printed_as_qemu_wants_them():
    for program in (SHARE, VIRTIOFSD):
        found = run(program, "--print-capabilities")
        assert (found.returncode, found.stderr) == (0, "")
        assert json.loads(found.stdout) == {"type": "fs", "features": []}


def test_help_and_version_are_printed():
    assert run(VIRTIOFSD, "--help").stdout == describe(VIRTIOFSD) + "\n"
    assert run(VIRTIOFSD, "-V").stdout == f"fusewire-virtiofsd {fusewire.__version__}\n"
    assert run(SHARE, "--version").stdout == f"fusewire {fusewire.__version__}\n"
    empty = run(VIRTIOFSD)
    assert (empty.returncode, empty.stderr) == (2, describe(VIRTIOFSD) + "\n")


def test_a_wrong_command_line_ends_with_2_and_one_line():
    found = run(VIRTIOFSD, "--shared-dir=/", "--socket-path=/nonexistent/s", "--sandbox=none", "-o", "sandbox=chroot")
    assert found.returncode == 2
    assert found.stderr.startswith("fusewire-virtiofsd: option `-o sandbox=chroot`: contradicts `--sandbox=none`")
    assert found.stderr.count("\n") == 1


def test_the_steps_into_the_sandbox_are_told(tmp_path):
    for words, first in (
        (["--sandbox=chroot"], "sandbox: chroot"),
        (["--sandbox=none", "--landlock=off"], "sandbox: none"),
        ([], "sandbox: "),
    ):
        found = run(SHARE, str(tmp_path), "--socket-path=s", "--dry-run", *words)
        if os.geteuid() and "--sandbox=chroot" in words:
            assert found.returncode == 1
            assert "CAP_SYS_CHROOT" in found.stderr and "--sandbox" in found.stderr
            continue
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.startswith(first)
        assert "no_new_privs" in found.stdout
    assert not (tmp_path / "s").exists()


def test_a_confinement_that_makes_no_sense_is_refused(tmp_path):
    found = run(SHARE, str(tmp_path), "--socket-path", str(tmp_path / "s"), "--modcaps=+no_such_thing")
    assert found.returncode in (1, 2)
    assert "no_such_thing" in found.stderr
    assert run(SHARE, str(tmp_path), "--socket-path=s", "--sandbox=nowhere").returncode == 2
    assert run(SHARE, str(tmp_path), "--socket-path=s", "--seccomp=maybe").returncode == 2
    assert run(SHARE, str(tmp_path), "--socket-path=s", "--landlock=maybe").returncode == 2


def test_arguments_for_qemu_can_be_pasted(tmp_path):
    words = ["x", "--socket-path=a b,c.sock", "--queues=2", "--tag=my,tag", "--print-qemu"]
    found = run(SHARE, *words, cwd=tmp_path)
    assert (found.returncode, found.stderr.count("mount -t virtiofs my,tag /mnt")) == (0, 1)
    listed = json.loads(run(SHARE, *words, "--json", cwd=tmp_path).stdout)
    pasted = subprocess.check_output(["sh", "-c", f"printf '%s\\n' \\\n{found.stdout}"], text=True, timeout=60)
    assert pasted.splitlines() == listed
    assert listed[:2] == ["-chardev", f"socket,id=fusewire-my--tag,path={tmp_path}/a b,,c.sock"]
    assert listed[3].startswith("vhost-user-fs-pci,chardev=fusewire-my--tag,tag=my,,tag,")
    assert listed[3].endswith(",num-request-queues=2")
    assert "size=2G,share=on" in listed[7]


def test_the_way_to_a_share_loads_nothing_heavy():
    code = (
        "import sys; from fusewire.cli.share import Source, share_options; "
        "import fusewire.linux.listening; options = share_options.parse(sys.argv[1:]);"
        "source = Source(options.source, options.mount); source.close(); print(*sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__), "--socket-path=s"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert not {"asyncio", "dataclasses", "inspect", "importlib.metadata", "subprocess", "json", "logging"} & set(found)
