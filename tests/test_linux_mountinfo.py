"""Reading mountinfo: any line, any name, and the machine's own."""

from __future__ import annotations

import os
import subprocess

from hypothesis import given
from hypothesis import strategies as st

from fusewire.linux import mountinfo

TEXT = rb"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
60 27 0:39 / /mnt/a\040b rw,nosuid,nodev shared:2 master:1 - fuse.fuse\134wire a\054b\134c ro,user_id=1000,group_id=5
61 27 0:40 /sub /mnt/a\040b rw - tmpfs none
not a line at all
62 27 0:41 / /mnt rw - fuse x
"""


def test_lines_are_parsed_with_escapes_undone() -> None:
    proc, root, fuse, cover, bare = mountinfo.parse(TEXT)
    assert (proc.id, proc.parent, proc.device, proc.mount_point, proc.fstype) == (22, 27, b"0:21", b"/proc", b"proc")
    assert root.source == b"/dev/vda"
    assert fuse.mount_point == cover.mount_point == b"/mnt/a b"
    assert (fuse.fstype, fuse.source, fuse.is_fuse, fuse.user_id) == (b"fuse.fuse\\wire", b"a,b\\c", True, 1000)
    assert (cover.root, cover.super_options, cover.is_fuse, cover.user_id) == (b"/sub", b"", False, None)
    assert bare.is_fuse


def test_what_lies_on_top_is_what_is_found() -> None:
    found = mountinfo.at(b"/mnt/a b", TEXT)
    assert found is not None
    assert found.id == 61
    assert mountinfo.at(b"/mnt/a", TEXT) is None


def test_a_path_is_held_by_the_deepest_mount() -> None:
    for path, number in ((b"/mnt/a b/c", 61), (b"/mnt/a b", 61), (b"/mnt/a bc", 62), (b"/mntx", 27), (b"/proc/1", 22)):
        found = mountinfo.holding(path, TEXT)
        assert found is not None
        assert found.id == number


def test_mounts_are_found_by_id() -> None:
    found = [mountinfo.by_id(number, TEXT) for number in (22, 60, 6, 2, 99)]
    assert [mount and mount.id for mount in found] == [22, 60, None, None, None]


def test_the_last_line_is_found_by_id_without_a_newline() -> None:
    found = mountinfo.by_id(62, TEXT.rstrip(b"\n"))
    assert found is not None
    assert found.source == b"x"


@given(st.binary())
def test_no_text_raises(text: bytes) -> None:
    list(mountinfo.parse(text))
    mountinfo.by_id(1, text)


@given(st.binary(max_size=40).filter(lambda name: b"\0" not in name))
def test_unescaping_undoes_what_the_kernel_escapes(name: bytes) -> None:
    escaped = name
    for char in b"\\ \t\n#":
        escaped = escaped.replace(bytes((char,)), b"\\%03o" % char)
    assert mountinfo.unescape(escaped) == name


def test_this_machines_own_mounts_are_the_same_as_findmnt_says() -> None:
    ours = [m.mount_point for m in mountinfo.mounts() if not m.is_fuse]
    assert b"/" in ours or b"/proc" in ours
    root = mountinfo.id_of_path(b"/")
    assert root is not None
    listed = mountinfo.by_id(root)
    assert listed is None or listed.mount_point == b"/"  # None in a chroot


def test_ids_come_from_descriptors_too() -> None:
    with open("/proc/self/status", "rb") as file:
        number = mountinfo.id_of_fd(file.fileno())
    assert number == mountinfo.id_of_path(b"/proc/self/status")
    assert mountinfo.id_of_path(b"/nonexistent") is None
    assert mountinfo.id_of_fd(987654) is None


def test_what_is_gone_is_not_ours() -> None:
    assert mountinfo.stat_if_mine(b"/nonexistent") is None
    assert mountinfo.stat_if_mine(b"/") is not None


def test_other_processes_mounts_can_be_read() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert [m.id for m in mountinfo.parse(mountinfo.read(child.pid))]
        assert os.path.exists(f"/proc/{child.pid}")
