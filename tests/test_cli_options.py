from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusewire
from fusewire.cli import options
from fusewire.cli.options import OptionError, parse
from fusewire.linux import syscalls

MIB = 1 << 20


def test_nothing_said_means_nosuid_nodev_and_defaults():
    found = parse("")
    assert found.flags == options.MS_NOSUID | options.MS_NODEV
    assert found.cache_size == 64 * MIB
    assert (found.offset, found.timeout, found.default_permissions, found.given) == (None, 0.0, None, [])


def test_flags_have_the_numbers_of_the_system_calls():
    names = [name for name in dir(options) if name.startswith("MS_")]
    assert len(names) == 10
    assert {name: getattr(options, name) for name in names} == {name: getattr(syscalls, name) for name in names}


@pytest.mark.parametrize(
    ("text", "on", "off"),
    [
        ("ro", syscalls.MS_RDONLY, 0),
        ("ro,rw", 0, syscalls.MS_RDONLY),
        ("suid,dev", 0, syscalls.MS_NOSUID | syscalls.MS_NODEV),
        ("suid,nosuid", syscalls.MS_NOSUID, 0),
        ("noexec,exec", 0, syscalls.MS_NOEXEC),
        ("noatime", syscalls.MS_NOATIME, syscalls.MS_RELATIME),
        ("relatime,noatime", syscalls.MS_NOATIME, syscalls.MS_RELATIME),
        ("noatime,relatime", syscalls.MS_RELATIME, syscalls.MS_NOATIME),
        ("relatime,norelatime", 0, syscalls.MS_RELATIME),
        ("nodiratime", syscalls.MS_NODIRATIME, 0),
        ("sync,dirsync", syscalls.MS_SYNCHRONOUS | syscalls.MS_DIRSYNC, 0),
        ("sync,async", 0, syscalls.MS_SYNCHRONOUS),
    ],
)
def test_mount_flags_follow_the_last_of_a_contradicting_pair(text, on, off):
    flags = parse(text).flags
    assert flags & on == on
    assert not flags & off


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("allow_other", "allow_other", True),
        ("allow_other,allow_root", "allow_other", False),
        ("allow_root,allow_other", "allow_root", False),
        ("default_permissions", "default_permissions", True),
        ("default_permissions,no_default_permissions", "default_permissions", False),
        ("auto_unmount", "auto_unmount", True),
        ("kernel_cache,auto_cache", "kernel_cache", False),
        ("clone_fd", "clone_fd", True),
        ("debug", "debug", True),
        ("squash_owner", "squash_owner", True),
        ("fsname=a=b", "fsname", "a=b"),
        ("subtype=x", "subtype", "x"),
        ("max_read=131072", "max_read", 131072),
        ("uid=0,uid=4294967294", "uid", 4294967294),
        ("gid=5", "gid", 5),
        ("umask=022", "umask", 0o22),
        ("umask=0777", "umask", 0o777),
        ("entry_timeout=2.5", "entry_timeout", 2.5),
        ("attr_timeout=0", "attr_timeout", 0.0),
        ("negative_timeout=1e3", "negative_timeout", 1000.0),
        ("entry_timeout=inf", "entry_timeout", float(1 << 32)),
        ("timeout=300", "timeout", 300.0),
        ("max_threads=8", "max_threads", 8),
        ("max_idle_threads=-1", "max_idle_threads", -1),
        ("offset=4096", "offset", 4096),
        ("offset=9223372036854775807", "offset", (1 << 63) - 1),
        ("cache_size=16M", "cache_size", 16 * MIB),
        ("cache_size=1g", "cache_size", 1 << 30),
        ("cache_size=64KiB", "cache_size", 65536),
        ("cache_size=0", "cache_size", 0),
        ("max_background=12", "max_background", 12),
        ("congestion_threshold=9", "congestion_threshold", 9),
        ("max_readahead=1M", "max_readahead", MIB),
        ("max_write=128K", "max_write", 131072),
    ],
)
def test_option_sets_its_value(text, attribute, value):
    found = getattr(parse(text), attribute)
    assert found == value
    assert type(found) is type(value)


def test_several_option_strings_are_one_and_the_later_wins():
    found = parse(["ro,offset=1", "rw", "offset=2,"])
    assert not found.read_only
    assert found.offset == 2
    assert found.given == ["ro", "offset=1", "rw", "offset=2"]


def test_comma_and_backslash_in_a_value_are_escaped_as_libfuse_has_it():
    assert parse(r"fsname=a\,b\\c,ro").fsname == "a,b\\c"
    assert parse(r"fsname=a\054b\040c").fsname == "a,b c"
    assert parse("fsname=end\\").fsname == "end\\"
    assert parse(["fsname=one\\", "ro"]).read_only, "a backslash at the end escapes nothing of the next -o"


def test_name_that_is_not_utf8_survives():
    name = b"\xff\xe4\\,x".decode(errors="surrogateescape")
    assert parse(f"fsname={name}").fsname == b"\xff\xe4,x".decode(errors="surrogateescape")


@pytest.mark.parametrize(
    "text", ["defaults,_netdev,nofail,user=joe,x-systemd.automount,X-mount.mkdir=0755", "nonempty,,,loop,comment=x"]
)
def test_what_mount_passes_on_is_accepted_without_effect(text):
    found = parse(text)
    assert found.flags == parse("").flags
    assert all(getattr(found, name) == getattr(parse(""), name) for name in found.__slots__ if name != "given")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("allow_othre", ["`allow_othre`", "did you mean `allow_other`?"]),
        ("Offset=5", ["`Offset=5`", "did you mean `offset=BYTES`?"]),
        ("cachesize=5", ["did you mean `cache_size=BYTES`?"]),
        ("nosiud", ["did you mean `nosuid`?"]),
        ("qqqqqqqqqq", ["`qqqqqqqqqq`", "`-o help`"]),
        ("=", ["`=`", "is not known"]),
        ("x" * 5000, ["is not known"]),
        ("offset", ["needs a value: `offset=BYTES`"]),
        ("fsname=", ["needs a value: `fsname=NAME`"]),
        ("ro=1", ["takes no value; write `ro`"]),
        ("offset=-1", ["needs a number of bytes"]),
        ("offset=1_000", ["needs a number of bytes"]),
        ("offset=٣", ["needs a number of bytes"]),
        ("offset=1i", ["needs a number of bytes"]),
        ("offset=8388608T", ["must be from 0 to"]),
        ("cache_size=2T", ["must be from 0 to 1T bytes"]),
        ("max_write=1K", ["must be from 4K to 1M bytes"]),
        ("max_threads=0", ["must be from 1 to 1024"]),
        ("max_background=65536", ["must be from 1 to 65535"]),
        ("uid=4294967295", ["must be from 0 to 4294967294"]),
        ("uid=joe", ["needs a whole number"]),
        ("umask=8", ["octal"]),
        ("umask=1000", ["octal"]),
        ("entry_timeout=-1", ["number of seconds"]),
        ("entry_timeout=nan", ["number of seconds"]),
        ("entry_timeout= 1", ["number of seconds"]),
        ("timeout=soon", ["number of seconds"]),
        (r"fsname=\000", ["NUL"]),
        ("fsname=" + "x" * 4000, ["longer than"]),
        ("subdir=/etc", ["is not offered"]),
        ("fd=3", ["/dev/fd/N"]),
    ],
)
def test_wrong_option_is_refused_by_name_and_with_the_way_out(text, parts):
    with pytest.raises(OptionError) as caught:
        parse(["ro", text])
    for part in parts:
        assert part in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_gives_options_or_an_option_error(text):
    refusal = ""
    try:
        parse(text)
    except OptionError as error:
        refusal = str(error)
    assert refusal == "" or refusal.startswith("option `")


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20), max_size=5
    )
)
def test_escaped_values_come_back_from_split(values):
    escaped = [value.replace("\\", "\\\\").replace(",", "\\,") for value in values]
    assert options.split(",".join(escaped)) == values


def test_help_describes_every_option_that_is_offered():
    text = options.describe()
    for name in parse("").__slots__:
        if name not in ("flags", "given", "storage_words"):
            assert name in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_says_what_has_no_effect_on_a_read_only_image():
    lines = options.describe().splitlines()
    without = {line.split()[0].partition("=")[0] for line in lines if "no effect on a read-only image" in line}
    assert without == {"rw", "kernel_cache", "auto_cache", "ac_attr_timeout", "max_write", "max_idle_threads"}


def test_module_loads_nothing_that_costs_start_up_time():
    code = (
        "import sys, fusewire.cli; before = set(sys.modules); import fusewire.cli.options;"
        "print(*sorted(set(sys.modules) - before))"
    )
    source = os.path.dirname(os.path.dirname(fusewire.__file__))
    found = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONPATH": source}, text=True)
    assert set(found.split()) <= {"fusewire.cli.options", "__future__"}


def test_options_of_a_directory_are_kept_apart_and_have_a_negative_form() -> None:
    found = parse("cache=always,no_xattr,posix_acl,translate_uid=map:0:1000:1,translate_uid=map:1:5:1,watch,no_watch")
    assert found.directory == {
        "cache": "always",
        "xattr": False,
        "posix_acl": True,
        "translate_uid": ("map:0:1000:1", "map:1:5:1"),
        "watch": False,
    }


@pytest.mark.parametrize("text", ["cache=sometimes", "xattr=1", "no_cache", "no_cache=none", "inode_file_handles=x"])
def test_wrong_options_of_a_directory_are_named(text: str) -> None:
    with pytest.raises(options.OptionError, match=text.split("=")[0]):
        parse(text)
