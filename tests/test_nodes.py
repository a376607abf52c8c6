"""Trees of nodes, by a kernel that is played; on real mounts they are tried in test_nodes_mount.py."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusewire.nodes import FOREVER, Bytes, Dir, File, NodeFilesystem, Special, Symlink, as_operations
from fusewire.ops import Entry, FileRange, Operations, Statfs
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.wire import abi
from node_kernel import Counting, Kernel, fails

REGULAR = stat.S_IFREG | 0o644


# Hello world, static trees


class Hello(Dir):
    def children(self):
        return {b"hello.txt": Bytes(b"hello world\n")}


def test_hello_world_takes_three_lines():
    kernel = Kernel(Hello())
    assert kernel.names() == [b"hello.txt"]
    assert kernel.read_file(b"hello.txt") == b"hello world\n"
    assert kernel.lookup(1, b"other").nodeid == 0
    kernel.destroy()


def tree() -> Dir:
    return Dir(
        {b"text": Bytes("täxt"), "name": Bytes(b"x" * 10)},
        below=Dir(link=Symlink("../text"), fifo=Special(stat.S_IFIFO | 0o600)),
        null=Special(stat.S_IFCHR | 0o666, os.makedev(1, 3)),
    )


def test_static_tree_is_what_was_put_into_it():
    kernel = Kernel(tree())
    found = {path: (stat.S_IFMT(entry.attr[9]), entry.attr[1]) for path, entry in kernel.walk()}
    assert found == {
        b"text": (stat.S_IFREG, 5),
        b"name": (stat.S_IFREG, 10),
        b"below": (stat.S_IFDIR, 0),
        b"below/link": (stat.S_IFLNK, 7),
        b"below/fifo": (stat.S_IFIFO, 0),
        b"null": (stat.S_IFCHR, 0),
    }
    assert kernel.readlink(kernel.resolve(b"below/link").nodeid) == b"../text"
    assert kernel.read_file(b"text") == "täxt".encode()
    assert kernel.lookup(1, b"null").attr[13] == os.makedev(1, 3)
    assert (kernel.getattr(1)[0][10], kernel.getattr(1)[1]) == (3, FOREVER)


def test_static_tree_is_kept_for_ever():
    kernel = Kernel(tree())
    entry = kernel.lookup(1, b"text")
    assert (entry.entry_timeout, entry.attr_timeout) == (FOREVER, FOREVER)
    assert kernel.lookup(1, b"missing").entry_timeout == FOREVER
    assert kernel.open(entry.nodeid)[1] == abi.FOPEN_KEEP_CACHE | abi.FOPEN_NOFLUSH
    assert kernel.opendir(1)[1] == abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR


def test_lifetimes_have_a_bound_where_nobody_can_be_told():
    kernel = Kernel(tree(), max_timeout=2.0)
    entry = kernel.lookup(1, b"text")
    assert (entry.entry_timeout, entry.attr_timeout) == (2, 2)
    assert kernel.lookup(1, b"missing").entry_timeout == 2
    assert kernel.getattr(1)[1] == 2
    assert kernel.opendir(1)[1] == 0


def test_what_is_not_writable_says_so_to_every_change():
    kernel = Kernel(tree())
    file, below = kernel.lookup(1, b"text").nodeid, kernel.lookup(1, b"below").nodeid
    for call in (
        lambda: kernel.open(file, os.O_RDWR),
        lambda: kernel.open(file, os.O_TRUNC),
        lambda: kernel.write(file, 0, 0, b"x"),
        lambda: kernel.setattr(file, abi.FATTR_SIZE, size=0),
        lambda: kernel.setattr(file, abi.FATTR_MODE, mode=0o600),
        lambda: kernel.setattr(file, abi.FATTR_UID, uid=5),
        lambda: kernel.setattr(below, abi.FATTR_MTIME, mtime=5),
        lambda: kernel.setxattr(file, b"user.a", b"x"),
        lambda: kernel.removexattr(file, b"user.a"),
        lambda: kernel.create(1, b"new"),
        lambda: kernel.mknod(1, b"new", REGULAR),
        lambda: kernel.mknod(1, b"new", stat.S_IFIFO),
        lambda: kernel.tmpfile(1),
        lambda: kernel.mkdir(1, b"new"),
        lambda: kernel.symlink(1, b"new", b"x"),
        lambda: kernel.link(file, 1, b"new"),
        lambda: kernel.unlink(1, b"text"),
        lambda: kernel.rmdir(1, b"below"),
        lambda: kernel.rename(1, b"text", below, b"new"),
    ):
        fails(errno.EROFS, call)
    fails(errno.EROFS, kernel.fallocate, file, 0, 0, 5)


def test_writable_tree_can_be_served_read_only():
    kernel = Kernel(Dir({b"file": Bytes(b"x", writable=True)}, writable=True), read_only=True)
    fails(errno.EROFS, kernel.mkdir, 1, b"new")
    fails(errno.EROFS, kernel.open, kernel.lookup(1, b"file").nodeid, os.O_WRONLY)
    assert kernel.read_file(b"file") == b"x"


def test_names_that_cannot_be_are_refused_and_say_why():
    for name in (b"", b".", "..", "a/b", b"\0", b"n" * 256):
        with pytest.raises(ValueError, match="cannot be a name"):
            Dir({name: Bytes()})
    with pytest.raises(ValueError, match="no fifo"):
        Special(REGULAR)


def test_directory_has_one_name_and_is_not_in_itself():
    inner = Dir()
    outer = Dir(inner=inner)
    with pytest.raises(ValueError, match="only one"):
        outer["again"] = inner
    with pytest.raises(ValueError, match="below itself"):
        inner["loop"] = outer
    with pytest.raises(ValueError, match="below itself"):
        inner["loop"] = inner
    del outer["inner"]
    outer["again"] = inner
    assert list(outer) == [b"again"]
    assert "again" in outer
    assert outer["again"] is inner
    with pytest.raises(KeyError):
        del outer["inner"]


def test_classes_need_not_call_the_constructor():
    class Mine(Dir):
        def __init__(self, word):
            self.word = word

        def children(self):
            return {"word": Sized(self.word)}

    class Sized(File):
        def __init__(self, word):
            self.word = word

        def size(self):
            return len(self.word)

        def read(self, offset, size):
            return self.word[offset : offset + size]

    assert Kernel(Mine(b"hello")).read_file(b"word") == b"hello"


# Identity


def test_same_node_is_the_same_inode_under_each_name():
    file = Bytes(b"x")
    kernel = Kernel(Dir(one=file, two=file, below=Dir(three=file)))
    first, second = kernel.lookup(1, b"one"), kernel.lookup(1, b"two")
    third = kernel.resolve(b"below/three")
    assert first.nodeid == second.nodeid == third.nodeid
    assert first.attr[10] == 3


def test_number_lasts_as_long_as_the_node():
    kernel = Kernel(tree())
    before = {path: entry.nodeid for path, entry in kernel.walk()}
    kernel.forget_all()
    fails(errno.ESTALE, kernel.getattr, before[b"text"])
    assert {path: entry.nodeid for path, entry in kernel.walk()} == before
    assert len(set(before.values())) == len(before)
    assert {path: entry.attr[0] for path, entry in kernel.walk()} == before


def test_two_names_in_one_mapping_are_a_hard_link():
    class Twins(Dir):
        def children(self):
            file = Bytes(b"x")
            return {"one": file, "two": file, "other": Bytes()}

    kernel = Kernel(Twins())
    first = kernel.lookup(1, b"one")
    assert (first.attr[10], kernel.lookup(1, b"two").nodeid) == (2, first.nodeid)
    assert kernel.lookup(1, b"other").attr[10] == 1


def test_node_that_is_made_anew_is_the_same_file_while_the_kernel_knows_its_name():
    root = Counting()
    kernel = Kernel(root)
    first, again = kernel.lookup(1, b"number"), kernel.lookup(1, b"number")
    assert first.nodeid == again.nodeid
    assert first.entry_timeout == 0
    assert kernel.read(first.nodeid, 0, 0, 10) == b"2"
    assert again.attr[4] != 0
    kernel.forget_all()
    other = kernel.lookup(1, b"number")
    assert other.nodeid != first.nodeid
    assert kernel.read_file(b"number") == b"%d" % root.count


def test_so_is_what_lies_in_a_directory_that_is_made_anew():
    kernel = Kernel(Counting())
    first = kernel.resolve(b"below/file")
    below = kernel.lookup(1, b"below").nodeid
    assert kernel.notices(1) == {(below, b"file")}  # it has not been asked for again, and must be
    again = kernel.lookup(below, b"file")
    assert again.nodeid == first.nodeid
    assert kernel.read(again.nodeid, 0, 0, 10) == b"2"


def test_listing_and_lookup_agree_about_numbers_of_nodes_that_are_made_anew():
    kernel = FakeKernel(Session(NodeFilesystem(Counting())))
    kernel.init(flags=0x73FFFFFB & ~abi.FUSE_DO_READDIRPLUS)
    listed = {item.name: item.ino for item in kernel.listdir()}
    assert kernel.lookup(1, b"number").attr[0] == listed[b"number"]
    assert kernel.lookup(1, b"below").attr[0] == listed[b"below"]


def test_name_that_no_listing_has_stays_the_same_file_while_the_kernel_knows_it():
    kernel = Kernel(Squares())
    first = kernel.lookup(1, b"11")
    assert kernel.names() == [b"1", b"2", b"3"]
    assert kernel.lookup(1, b"11").nodeid == first.nodeid


def test_other_type_under_the_name_is_another_file():
    class Changing(Dir):
        timeout = 0
        made = Bytes

        def children(self):
            return {"it": self.made()}

    root = Changing()
    kernel = Kernel(root)
    first = kernel.lookup(1, b"it")
    root.made = Dir
    assert kernel.lookup(1, b"it").nodeid != first.nodeid


class Row(Bytes):
    """What is known by a number, and made anew each time."""

    def __init__(self, number):
        super().__init__(b"%d" % number)
        self.number = number

    @property
    def key(self):
        return self.number


def test_key_says_what_a_node_is():
    class Rows(Dir):
        timeout = 0
        names_of = {"a": 1, "b": 2, "c": 1}

        def children(self):
            return {name: Row(number) for name, number in self.names_of.items()}

    root = Rows()
    kernel = Kernel(root)
    a, b, c = (kernel.lookup(1, name) for name in (b"a", b"b", b"c"))
    assert a.nodeid == c.nodeid != b.nodeid
    assert c.attr[10] == 2
    root.names_of = {"a": 2, "moved": 1}
    assert kernel.lookup(1, b"a").nodeid == b.nodeid
    assert kernel.lookup(1, b"moved").nodeid == a.nodeid


def test_replaced_node_of_a_table_is_another_file_and_what_is_open_stays():
    root = Dir(file=Bytes(b"old"))
    kernel = Kernel(root)
    old = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(old)
    root["file"] = Bytes(b"new")
    assert kernel.notices(3) == {(1, b"file"), (1,), (old,)}
    assert kernel.read(old, fh, 0, 10) == b"old"
    assert kernel.getattr(old)[0][10] == 0
    assert kernel.lookup(1, b"file").nodeid != old
    assert kernel.read_file(b"file") == b"new"


def test_replaced_node_is_another_file_also_where_the_old_one_has_names_elsewhere_or_came_from_there():
    shared = Bytes(b"old")
    root = Dir(one=Dir(file=shared), two=Dir(file=shared, writable=True), writable=True)
    kernel = Kernel(root)
    one, two = (kernel.lookup(1, name).nodeid for name in (b"one", b"two"))
    old = kernel.lookup(one, b"file").nodeid
    assert kernel.lookup(two, b"file").nodeid == old
    root["one"]["file"] = Bytes(b"new")
    assert kernel.lookup(one, b"file").nodeid != old
    kernel.rename(two, b"file", 1, b"moved")
    root["moved"] = Bytes(b"newest")
    assert kernel.lookup(1, b"moved").nodeid != old
    assert kernel.read(old, 0, 0, 10) == b"old"


def test_key_holds_when_the_kernel_has_forgotten_the_node_meanwhile():
    class Rows(Dir):
        timeout = FOREVER

        def children(self):
            return {"row": Row(1)}

    root = Rows()
    kernel = Kernel(root)
    kernel.lookup(1, b"row")
    kernel.forget_all()
    again = kernel.lookup(1, b"row").nodeid
    root._listed = None
    assert kernel.lookup(1, b"row").nodeid == again


def test_nodes_that_were_only_listed_are_let_go_of():
    class Rows(Dir):
        timeout = 0
        count = 0

        def children(self):
            self.count += 1
            return {f"row {self.count}": Row(self.count)}

    filesystem = NodeFilesystem(Rows())
    kernel = FakeKernel(Session(filesystem))
    kernel.init(flags=0x73FFFFFB & ~abi.FUSE_DO_READDIRPLUS)
    for _ in range(5):
        kernel.listdir()
    assert len(filesystem._by_key) == len(filesystem._root.names) == 1


def test_filesystem_that_is_served_again_is_told_of_changes():
    filesystem = NodeFilesystem(Dir(file=Bytes(b"text")))
    for _ in range(2):
        kernel = FakeKernel(Session(filesystem))
        kernel.init()
        kernel.lookup(1, b"file")
        filesystem.root.changed(wait=True)
        assert len(kernel.notifications) == 2
        kernel.session.close()


def test_inode_number_may_be_the_programs():
    file = Bytes()
    file.ino = 4711
    kernel = Kernel(Dir(file=file))
    assert kernel.lookup(1, b"file").attr[0] == 4711
    assert [item.ino for item in kernel.listdir()][2:] == [4711]


# Dynamic trees


def test_children_are_asked_again_when_their_time_is_over(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fusewire.nodes.listings.monotonic", lambda: now[0])

    class Slow(Counting):
        timeout = 5

    root = Slow()
    kernel = Kernel(root)
    kernel.lookup(1, b"number")
    assert kernel.lookup(1, b"number").entry_timeout == 5
    kernel.names()
    assert root.count == 1
    now[0] += 6
    kernel.lookup(1, b"number")
    assert root.count == 2
    assert type(Hello().timeout) is float
    assert (Hello.timeout, Slow.timeout, Dir.timeout) == (1.0, 5, FOREVER)


class Squares(Dir):
    """More names than anybody would make nodes of."""

    def lookup(self, name):
        return Bytes(b"%d" % int(name) ** 2) if name.isdigit() else None

    def names(self):
        return ["1", b"2", "3", "2", "not there"]


def test_names_may_be_looked_up_one_by_one():
    kernel = Kernel(Squares())
    assert kernel.read_file(b"12345678901234567890") == b"%d" % 12345678901234567890**2
    assert kernel.lookup(1, b"x").nodeid == 0
    assert kernel.names() == [b"1", b"2", b"3"]
    plain = FakeKernel(Session(NodeFilesystem(Squares())))
    plain.init(flags=0x73FFFFFB & ~abi.FUSE_DO_READDIRPLUS)
    assert [item.name for item in plain.listdir()][2:] == [b"1", b"2", b"3"]


def test_name_that_cannot_be_does_not_cost_the_others():
    class Odd(Dir):
        def children(self):
            return {"good": Bytes(), "a/b": Bytes(), "": Bytes()}

    kernel = Kernel(Odd(), complains=True)
    assert kernel.names() == [b"good"]
    assert len(kernel.said) == 2
    assert "Odd left out a name" in kernel.said[0]


def test_what_is_no_node_does_not_cost_the_others_and_is_told():
    class Careless(Dir):
        def children(self):
            return {"text": "text", "class": Bytes, 1: Bytes(), "good": Bytes()}

        def lookup(self, name):
            return "text" if name == b"text" else None

    class Forgetful(Dir):
        def children(self):
            pass

    class OnlyChildren(Careless):
        lookup = Dir.lookup

    kernel = Kernel(OnlyChildren(), complains=True)
    assert kernel.names() == [b"good"]
    assert len(kernel.said) == 3
    assert "OnlyChildren left out a name: 'text': a node is a fusewire.Dir" in kernel.said[0]
    assert "'class': Bytes is a class: give an object of it, Bytes(...)" in kernel.said[1]
    for make, call in ((Careless, lambda kernel: kernel.lookup(1, b"text")), (Forgetful, Kernel.names)):
        kernel = Kernel(make(), complains=True)
        fails(errno.EIO, call, kernel)
        assert "a node is a" in kernel.said[0] or "Forgetful.children gives a mapping" in kernel.said[0]
    table = Dir()
    with pytest.raises(TypeError, match=r"'x': a node is a fusewire\.Dir"):
        table["x"] = "text"
    with pytest.raises(TypeError, match="give an object of it"):
        Dir(x=Bytes)
    assert list(table) == []


def test_mapping_that_changes_while_it_is_listed_is_no_error():
    class Live(Dir):
        timeout = 0
        shown = {f"{number}": Bytes() for number in range(100)}

        def children(self):
            return self.shown

    kernel = Kernel(Live())
    stop = threading.Event()

    def change():
        while not stop.is_set():
            Live.shown["more"] = Bytes()
            Live.shown.pop("more")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert len(kernel.names()) >= 100
    finally:
        stop.set()
        thread.join()


def test_names_need_not_be_utf_8():
    name = os.fsdecode(b"\xff\xfe")

    class Odd(Dir):
        def children(self):
            return {name: Bytes(b"x")}

    kernel = Kernel(Odd())
    assert kernel.names() == [b"\xff\xfe"]
    assert kernel.read_file(b"\xff\xfe") == b"x"


@pytest.mark.parametrize("size", [200, 4096, 1 << 17])
def test_big_directories_are_listed_in_any_pieces(size):
    names = [b"name %d" % number for number in range(500)]
    for root in (
        Dir({name: Bytes() for name in names}),
        type("Big", (Dir,), {"children": lambda _: dict.fromkeys(names, Bytes())})(),
    ):
        kernel = Kernel(root)
        assert [item.name for item in kernel.listdir(1, size)] == [b".", b"..", *names]


def test_error_of_one_node_does_not_cost_the_listing():
    class Broken(File):
        def size(self):
            raise OSError(errno.EIO, "broken")

    kernel = Kernel(Dir(good=Bytes(), broken=Broken(), other=Bytes()))
    assert kernel.names() == [b"good", b"broken", b"other"]
    fails(errno.EIO, kernel.lookup, 1, b"broken")


def test_errors_are_the_callers_and_surprises_are_logged_once():
    class Failing(Dir):
        def lookup(self, name):
            if name == b"missing":
                raise FileNotFoundError
            if name == b"denied":
                raise PermissionError
            raise ZeroDivisionError

    kernel = Kernel(Failing(), complains=True)
    fails(errno.ENOENT, kernel.lookup, 1, b"missing")
    fails(errno.EACCES, kernel.lookup, 1, b"denied")
    fails(errno.EIO, kernel.lookup, 1, b"x")
    fails(errno.EIO, kernel.lookup, 1, b"x")
    assert len(kernel.said) == 1


def test_root_hears_of_begin_and_end():
    class Hearing(Dir):
        heard: list[str] = []

        def init(self, connection):
            self.heard.append(f"init {connection.minor}")

        def destroy(self):
            self.heard.append("destroy")

        def statfs(self):
            return Statfs(blocks=5)

    kernel = Kernel(Hearing())
    assert kernel.statfs().blocks == 5
    kernel.destroy()
    kernel.session.close()
    assert Hearing.heard == ["init 45", "destroy"]


# Files


class Log(File):
    """Notes what is done with it."""

    def __init__(self):
        self.calls = []
        self.text = b""

    def size(self):
        return len(self.text)

    def read(self, offset, size):
        return self.text[offset : offset + size]

    def write(self, offset, data):
        assert type(data) is bytes
        self.text = self.text[:offset] + data
        if data == b"short":
            return 2
        return None

    def truncate(self, size):
        self.text = self.text[:size]

    def flush(self):
        self.calls.append("flush")

    def fsync(self, datasync):
        self.calls.append(("fsync", datasync))


def test_file_is_what_its_methods_say():
    file = Log()
    kernel = Kernel(Dir(file=file))
    assert Log.writable
    entry = kernel.lookup(1, b"file")
    assert entry.attr_timeout == 1
    fh, flags = kernel.open(entry.nodeid, os.O_RDWR)
    assert (fh, flags) == (0, 0)
    assert kernel.write(entry.nodeid, fh, 0, b"hello") == 5
    assert kernel.write(entry.nodeid, fh, 5, b"short") == 2
    assert kernel.read(entry.nodeid, fh, 3, 4) == b"losh"
    assert kernel.getattr(entry.nodeid)[0][1] == 10
    kernel.flush(entry.nodeid, fh)
    kernel.fsync(entry.nodeid, fh)
    kernel.fsync(entry.nodeid, fh, abi.FUSE_FSYNC_FDATASYNC)
    kernel.release(entry.nodeid, fh)
    assert file.calls == ["flush", ("fsync", False), ("fsync", True)]
    kernel.setattr(entry.nodeid, abi.FATTR_SIZE, size=4)
    assert file.text == b"hell"
    kernel.open(entry.nodeid, os.O_WRONLY | os.O_TRUNC)
    assert file.text == b""
    fails(errno.ENXIO, kernel.lseek, entry.nodeid, 0, 0, os.SEEK_DATA)


def test_file_without_a_size_is_read_until_it_ends():
    class Stream(File):
        def read(self, offset, size):
            return b"text"[offset : offset + size]

    kernel = Kernel(Dir(stream=Stream()))
    entry = kernel.lookup(1, b"stream")
    assert entry.attr[1] == 0
    assert kernel.open(entry.nodeid)[1] & abi.FOPEN_DIRECT_IO
    assert kernel.read_file(b"stream") == b"text"


def test_open_may_give_an_object_that_serves():
    events = []

    class Handle:
        def __init__(self, flags):
            self.flags = flags

        def read(self, offset, size):
            return b"%d" % (self.flags & os.O_ACCMODE)

        def release(self):
            events.append(("release", self.flags & os.O_ACCMODE))

        def truncate(self, size):
            events.append(("truncate", size))

    class Opened(Log):
        def open(self, flags):
            return Handle(flags) if flags & os.O_ACCMODE != os.O_WRONLY else None

    file = Opened()
    kernel = Kernel(Dir(file=file))
    node = kernel.lookup(1, b"file").nodeid
    first, _ = kernel.open(node, os.O_RDONLY)
    second, _ = kernel.open(node, os.O_RDWR | os.O_TRUNC)
    third, _ = kernel.open(node, os.O_WRONLY)
    assert 0 not in (first, second)
    assert third == 0
    assert (kernel.read(node, first, 0, 9), kernel.read(node, second, 0, 9)) == (b"0", b"2")
    kernel.write(node, second, 0, b"by the node")
    assert file.text == b"by the node"
    kernel.setattr(node, abi.FATTR_SIZE | abi.FATTR_FH, size=3, fh=second)
    kernel.release(node, first)
    fails(errno.EBADF, kernel.read, node, first, 0, 9)
    kernel.destroy()
    assert events == [("truncate", 0), ("truncate", 3), ("release", 0), ("release", 2)]


def test_hints_are_passed_on():
    file = Bytes(b"x")
    file.keep_cache, file.direct_io = False, True
    file.entry_timeout, file.attr_timeout = 3.5, 7
    root = Dir(file=file)
    root.negative_timeout = 0
    kernel = Kernel(root)
    entry = kernel.lookup(1, b"file")
    assert (entry.entry_timeout, entry.attr_timeout) == (3.5, 7)
    assert kernel.open(entry.nodeid)[1] == abi.FOPEN_DIRECT_IO | abi.FOPEN_NOFLUSH
    fails(errno.ENOENT, kernel.lookup, 1, b"missing")


def test_data_may_lie_in_a_file_of_the_host(tmp_path):
    (tmp_path / "host").write_bytes(b"from the host")
    fd = os.open(tmp_path / "host", os.O_RDONLY)

    class Host(File):
        def size(self):
            return os.fstat(fd).st_size

        def read(self, offset, size):
            return FileRange(fd, offset, size)

    try:
        assert Kernel(Dir(file=Host())).read_file(b"file") == b"from the host"
    finally:
        os.close(fd)


def test_content_that_is_assigned_is_seen():
    file = Bytes(b"old")
    kernel = Kernel(Dir(file=file))
    node = kernel.lookup(1, b"file").nodeid
    before = kernel.getattr(node)[0]
    file.data = "new text"
    assert kernel.notices(2) == {(node,), (1, b"file")}
    after = kernel.getattr(node)[0]
    assert (after[1], file.data) == (8, b"new text")
    assert after[4:] != before[4:]
    assert kernel.read_file(b"file") == b"new text"


def test_writable_bytes_are_written_sparsely_and_have_a_limit():
    file = Bytes(b"start", writable=True)
    file.limit = 1 << 20
    kernel = Kernel(Dir(file=file))
    node = kernel.lookup(1, b"file").nodeid
    assert kernel.write(node, 0, 1 << 40, b"far") == 3
    assert kernel.getattr(node)[0][1] == (1 << 40) + 3
    assert kernel.getattr(node)[0][2] * 512 < 1 << 18
    assert kernel.read(node, 0, 3, 5) == b"rt\0\0\0"
    assert kernel.lseek(node, 0, 1 << 20, os.SEEK_DATA) == 1 << 40
    fails(errno.ENOSPC, kernel.fallocate, node, 0, 0, 1 << 30)
    fails(errno.ENOSPC, kernel.write, node, 0, 0, bytes(1 << 20))
    fails(errno.EFBIG, kernel.write, node, 0, (1 << 63) - 1, b"xx")
    kernel.setattr(node, abi.FATTR_SIZE, size=5)
    assert file.data == b"start"
    kernel.fallocate(node, 0, 1, 2, 3)
    assert file.data == b"s\0\0rt"


# What takes either level


@pytest.mark.parametrize("look", [lambda node: node.data, lambda node: node.read(0, 9), Bytes.size, repr])
def test_content_is_whole_at_each_moment_of_the_first_write(look):
    """Whoever reads without the lock is held up at each of its lines in turn, and another thread writes then."""

    def look_with_write_before_line(number):
        node, lines = Bytes(b"old", writable=True), iter(range(number + 1))

        def trace(frame, event, argument):
            if event == "line" and next(lines, None) == number:
                sys.settrace(None)
                node.write(0, b"new")
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            found = look(node)
        finally:
            sys.settrace(before)
        return b"".join(found) if isinstance(found, list) else found

    assert {look_with_write_before_line(number) for number in range(12)} <= {b"old", b"new", 3, "<Bytes of 3 bytes>"}


def test_operations_are_made_of_a_tree_and_left_as_they_are():
    operations = Operations()
    assert as_operations(operations) is operations
    tree = as_operations(Dir(), read_only=True)
    assert isinstance(tree, NodeFilesystem)
    assert tree.read_only
    with pytest.raises(TypeError, match=r"give an object of it, Hello\(...\)"):
        as_operations(Hello)
    with pytest.raises(TypeError, match="put the node into a Dir"):
        as_operations(Bytes())
    with pytest.raises(TypeError, match="not int"):
        as_operations(5)


def test_entries_are_plain():
    filesystem = NodeFilesystem(Dir(file=Bytes(b"x")))
    filesystem.read_only = False
    assert type(filesystem.lookup(None, 1, b"file")) is Entry


# Types

GOOD = """
from collections.abc import Iterable, Mapping
from fusewire.nodes import Bytes, Dir, File, Node, NodeFilesystem, Symlink
from fusewire.ops import Statfs

class Sync(File):
    def size(self) -> int:
        return 5

    def read(self, offset: int, size: int) -> bytes:
        return b"12345"[offset : offset + size]

    def write(self, offset: int, data: bytes) -> int:
        return len(data)

    def open(self, flags: int) -> object:
        return None

    def truncate(self, size: int) -> None:
        return

class Async(File):
    async def size(self) -> int:
        return 5

    async def read(self, offset: int, size: int) -> list[bytes]:
        return [b"1", b"2"]

    async def write(self, offset: int, data: bytes) -> None:
        return

    async def chmod(self, mode: int) -> None:
        return

class Key(Bytes):
    @property
    def key(self) -> tuple[str, int]:
        return ("key", 5)

class Where(Symlink):
    async def readlink(self) -> bytes:
        return b"there"

class Tree(Dir):
    timeout = 5

    def children(self) -> dict[str, Bytes]:
        return {"a": Bytes("a")}

class AsyncTree(Dir):
    async def children(self) -> Mapping[bytes, Node]:
        return {b"a": Async(), b"b": Sync()}

    async def create(self, name: bytes, mode: int) -> File:
        return Async()

    async def statfs(self) -> Statfs:
        return Statfs()

class Looked(Dir):
    def lookup(self, name: bytes) -> File | None:
        return None

    async def names(self) -> Iterable[str]:
        return ["a"]

class AsyncLooked(Dir):
    async def lookup(self, name: bytes) -> Node | None:
        return None

    def names(self) -> list[bytes]:
        return [b"a"]

tree = Dir({b"a": Bytes(b"")}, b=Tree(), c=Dir(writable=True))
tree["d"] = Special = Symlink("x")
tree.changed("d", wait=True)
NodeFilesystem(tree)
"""

BAD = [
    "class X(File):\n    def size(self) -> str: return ''",
    "class X(File):\n    async def size(self) -> None: return None",
    "class X(File):\n    def read(self, offset: int) -> bytes: return b''",
    "class X(File):\n    async def read(self, offset: int, size: int) -> str: return ''",
    "class X(Dir):\n    def children(self) -> list[Node]: return []",
    "class X(Dir):\n    async def children(self) -> dict[int, Node]: return {}",
    "class X(Dir):\n    def lookup(self, name: str) -> Node | None: return None",
    "class X(Dir):\n    async def lookup(self, name: bytes) -> bytes: return name",
    "Dir({b'a': b'bytes'})",
    "NodeFilesystem(Bytes())",
]


def test_types_admit_sync_and_async_methods_and_no_wrong_ones(tmp_path):
    pytest.importorskip("mypy", reason="mypy is missing")
    (tmp_path / "good.py").write_text(GOOD)
    names = ["good"]
    for number, text in enumerate(BAD):
        names.append(f"bad{number}")
        (tmp_path / f"bad{number}.py").write_text(
            f"from fusewire.nodes import Bytes, Dir, File, Node, NodeFilesystem\n\n{text}\n"
        )
    source = str(Path(__file__).parent.parent / "src")
    words = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    done = subprocess.run(
        [*words, f"--cache-dir={tmp_path}", *[f"{name}.py" for name in names]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": source},
    )
    wrong = {line.split(".py:")[0] for line in done.stdout.splitlines() if ": error:" in line}
    assert wrong == set(names[1:]), done.stdout + done.stderr
