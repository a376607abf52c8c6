"""Trees of nodes that change, by callers and by the program, and async ones; by a kernel that is played."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusewire.nodes import FOREVER, Bytes, Dir, File, Symlink
from fusewire.ops import Statfs
from fusewire.wire import abi, codec
from node_kernel import Counting, Kernel, fails

REGULAR = stat.S_IFREG | 0o644


# Writable trees


@pytest.fixture
def root() -> Dir:
    return Dir(writable=True)


@pytest.fixture
def kernel(root) -> Iterator[Kernel]:
    kernel = Kernel(root)
    yield kernel
    assert kernel.unasked == []
    assert kernel.notifications == []


def test_caller_makes_files_that_are_his_own(kernel, root):
    entry, fh, _ = kernel.create(1, b"file", os.O_RDWR, 0o100640)
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert root["file"].data == b"content"
    attr = kernel.getattr(entry.nodeid)[0]
    assert (attr[9], attr[11], attr[12], attr[10]) == (0o100640, 1000, 1000, 1)
    fails(errno.EEXIST, kernel.create, 1, b"file", os.O_RDWR | os.O_EXCL)
    assert kernel.create(1, b"file", os.O_RDWR | os.O_TRUNC)[0].nodeid == entry.nodeid
    assert root["file"].data == b""
    assert kernel.mknod(1, b"node", REGULAR).attr[9] == REGULAR
    assert kernel.mknod(1, b"fifo", stat.S_IFIFO | 0o600).attr[9] == stat.S_IFIFO | 0o600
    fails(errno.EINVAL, kernel.mknod, 1, b"x", stat.S_IFLNK | 0o777)
    assert kernel.readlink(kernel.symlink(1, b"link", b"there").nodeid) == b"there"


def test_group_of_a_directory_is_inherited(kernel, root):
    root.mode, root.gid = 0o2755, 7
    assert kernel.create(1, b"file")[0].attr[12] == 7
    directory = kernel.mkdir(1, b"directory")
    assert (directory.attr[9], directory.attr[12]) == (stat.S_IFDIR | 0o2755, 7)


def test_unlinked_file_lives_until_it_is_forgotten(kernel):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.link(entry.nodeid, 1, b"second")
    kernel.unlink(1, b"file")
    assert kernel.getattr(entry.nodeid)[0][10] == 1
    kernel.unlink(1, b"second")
    assert kernel.getattr(entry.nodeid)[0][10] == 0
    kernel.write(entry.nodeid, fh, 0, b"still here")
    assert kernel.read(entry.nodeid, fh, 0, 100) == b"still here"
    kernel.forget_all()
    fails(errno.ESTALE, kernel.getattr, entry.nodeid)


def test_tmpfile_gets_its_name_by_link(kernel, root):
    entry, fh, _ = kernel.tmpfile(1)
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert entry.attr[10] == 0
    assert kernel.link(entry.nodeid, 1, b"named").attr[10] == 1
    assert root["named"].data == b"content"


def test_rename_follows_its_rules(kernel, root):
    top = kernel.mkdir(1, b"top").nodeid
    inner = kernel.mkdir(top, b"inner").nodeid
    file = kernel.create(1, b"file")[0].nodeid
    fails(errno.EINVAL, kernel.rename, 1, b"top", inner, b"new")
    fails(errno.EINVAL, kernel.rename, 1, b"top", top, b"inner", 2)
    fails(errno.EINVAL, kernel.rename, top, b"inner", 1, b"top", 2)
    fails(errno.ENOTEMPTY, kernel.rename, top, b"inner", 1, b"top")
    fails(errno.EEXIST, kernel.rename, 1, b"file", 1, b"top", 1)
    fails(errno.EISDIR, kernel.rename, 1, b"file", 1, b"top")
    fails(errno.ENOTDIR, kernel.rename, 1, b"top", 1, b"file")
    fails(errno.ENOENT, kernel.rename, 1, b"missing", 1, b"x")
    fails(errno.ENOENT, kernel.rename, 1, b"file", 1, b"missing", 2)
    fails(errno.EINVAL, kernel.rename, 1, b"file", 1, b"x", 3)
    kernel.rename(1, b"file", top, b"moved")
    assert kernel.lookup(top, b"moved").nodeid == file
    assert kernel.lookup(1, b"file").nodeid == 0
    kernel.rename(top, b"moved", top, b"inner", 2)
    assert (kernel.lookup(top, b"moved").nodeid, kernel.lookup(top, b"inner").nodeid) == (inner, file)
    kernel.rename(top, b"moved", 1, b"out")
    assert [kernel.getattr(node)[0][10] for node in (1, top, inner)] == [4, 2, 2]
    kernel.rename(top, b"inner", top, b"file", 4)
    assert kernel.lookup(top, b"inner").attr[9] == stat.S_IFCHR
    kernel.rename(1, b"out", 1, b"top2")
    assert sorted(root) == [b"top", b"top2"]


class Shelf(Dir):
    """Objects come and go; what they are is in a dict."""

    def __init__(self, keyed):
        self.notes, self.keyed = {b"one": b"1", b"two": b"22"}, keyed

    def children(self):
        return {name: Note(self, name) for name in self.notes}

    def create(self, name, mode):
        self.notes[name] = b""
        return Note(self, name)

    def rename(self, name, newdir, newname, flags):
        if flags & 2:
            self.notes[name], newdir.notes[newname] = newdir.notes[newname], self.notes[name]
        else:
            newdir.notes[newname] = self.notes.pop(name)


class Note(File):
    def __init__(self, shelf, name):
        self.shelf, self.name = shelf, name

    @property
    def key(self):
        return (id(self.shelf), self.name) if self.shelf.keyed else None

    def size(self):
        return len(self.shelf.notes[self.name])

    def read(self, offset, size):
        return self.shelf.notes[self.name][offset : offset + size]

    def write(self, offset, data):
        self.shelf.notes[self.name] = bytes(data)


@pytest.mark.parametrize("keyed", [True, False])
def test_file_of_a_computed_directory_is_the_object_of_its_new_name_once_it_is_moved(keyed):
    first, second = Shelf(keyed), Shelf(keyed)
    kernel = Kernel(Dir(first=first, second=second))
    places = [kernel.lookup(1, name).nodeid for name in (b"first", b"second")]
    one, two = (kernel.lookup(places[0], name).nodeid for name in (b"one", b"two"))

    def reads(nodeid):
        fh, _ = kernel.open(nodeid)
        data = kernel.read(nodeid, fh, 0, 100)
        kernel.release(nodeid, fh)
        assert kernel.getattr(nodeid)[0][1] == len(data)
        return data

    kernel.rename(places[0], b"one", places[0], b"moved")
    assert reads(one) == b"1"
    kernel.rename(places[0], b"moved", places[0], b"two", 2)
    assert (reads(one), reads(two)) == (b"1", b"22")
    kernel.rename(places[0], b"two", places[1], b"two")
    fh, _ = kernel.open(one, os.O_WRONLY)
    kernel.write(one, fh, 0, b"written")
    assert (first.notes, second.notes[b"two"]) == ({b"moved": b"22"}, b"written")
    assert kernel.lookup(places[1], b"two").nodeid == one
    assert kernel.lookup(places[0], b"moved").nodeid == two


def test_directory_whose_names_are_computed_is_not_removed_by_callers():
    class Computed(Dir):
        def children(self):
            return {"file": Bytes()}

    root = Dir(computed=Computed(), other=Dir(), writable=True)
    kernel = Kernel(root)
    fails(errno.ENOTEMPTY, kernel.rmdir, 1, b"computed")
    fails(errno.ENOTEMPTY, kernel.rename, 1, b"other", 1, b"computed")
    assert set(root) == {b"computed", b"other"}


def test_removed_directory_takes_no_names(kernel):
    directory = kernel.mkdir(1, b"directory").nodeid
    file = kernel.create(1, b"file")[0].nodeid
    fails(errno.ENOTDIR, kernel.rmdir, 1, b"file")
    fails(errno.EISDIR, kernel.unlink, 1, b"directory")
    kernel.create(directory, b"x")
    fails(errno.ENOTEMPTY, kernel.rmdir, 1, b"directory")
    kernel.unlink(directory, b"x")
    kernel.rmdir(1, b"directory")
    assert kernel.getattr(directory)[0][10] == 0
    for call in (
        lambda: kernel.create(directory, b"x"),
        lambda: kernel.mkdir(directory, b"x"),
        lambda: kernel.link(file, directory, b"x"),
        lambda: kernel.rename(1, b"file", directory, b"x"),
    ):
        fails(errno.ENOENT, call)
    fails(errno.EPERM, kernel.link, kernel.mkdir(1, b"other").nodeid, 1, b"x")


def test_attributes_are_changed(kernel, root):
    node = kernel.mknod(1, b"file", stat.S_IFREG | 0o6777).nodeid
    attr, _ = kernel.setattr(node, abi.FATTR_MODE | abi.FATTR_UID | abi.FATTR_GID, mode=0o6600, uid=5, gid=6)
    assert (attr[9] & 0o7777, attr[11], attr[12]) == (0o6600, 5, 6)
    attr, _ = kernel.setattr(node, abi.FATTR_ATIME | abi.FATTR_MTIME, atime=(1 << 64) - 5, atimensec=7, mtime=9)
    assert (attr[3], attr[6], attr[4]) == ((1 << 64) - 5, 7, 9)
    assert root["file"].atime_ns == -5 * 10**9 + 7
    kernel.call("write", node, 0, 0, 1, abi.FUSE_WRITE_KILL_SUIDGID, 0, 0, tail=b"x")
    assert kernel.getattr(node)[0][9] & 0o7777 == 0o2600
    assert kernel.statx(node)[3:7] == (1, 5, 6, 0o102600)


def test_extended_attributes_are_kept(kernel, root):
    node = kernel.create(1, b"file")[0].nodeid
    fails(errno.ENODATA, kernel.getxattr, node, b"user.a")
    kernel.setxattr(node, b"user.a", b"value")
    assert kernel.getxattr(node, b"user.a") == b"value"
    fails(errno.EEXIST, kernel.setxattr, node, b"user.a", b"x", os.XATTR_CREATE)
    fails(errno.ENODATA, kernel.setxattr, node, b"user.b", b"x", os.XATTR_REPLACE)
    fails(errno.EOPNOTSUPP, kernel.setxattr, node, b"other.a", b"x")
    fails(errno.EINVAL, kernel.setxattr, node, b"user.", b"x")
    root["file"].xattrs[b"trusted.b"] = b"for root"
    assert kernel.listxattr(node) == [b"user.a"]
    kernel.uid = 0
    assert kernel.listxattr(node) == [b"user.a", b"trusted.b"]
    kernel.removexattr(node, b"user.a")
    fails(errno.ENODATA, kernel.removexattr, node, b"user.a")


def test_attributes_of_what_is_not_writable_are_shown_if_it_has_any():
    file, plain = Bytes(), Bytes()
    file.xattrs = {b"user.a": b"value"}
    kernel = Kernel(Dir(file=file, plain=plain))
    node = kernel.lookup(1, b"file").nodeid
    assert (kernel.getxattr(node, b"user.a"), kernel.listxattr(node)) == (b"value", [b"user.a"])
    fails(errno.ENODATA, kernel.getxattr, node, b"user.b")
    fails(errno.EOPNOTSUPP, kernel.getxattr, kernel.lookup(1, b"plain").nodeid, b"user.a")


def test_calls_for_another_type_of_node_are_refused(kernel):
    directory = kernel.mkdir(1, b"directory").nodeid
    file = kernel.create(1, b"file")[0].nodeid
    link = kernel.symlink(1, b"link", b"target").nodeid
    fails(errno.EISDIR, kernel.read, directory, 0, 0, 10)
    fails(errno.EISDIR, kernel.setattr, directory, abi.FATTR_SIZE, size=3)
    fails(errno.EINVAL, kernel.read, link, 0, 0, 10)
    fails(errno.ENOTDIR, kernel.lookup, file, b"x")
    fails(errno.ENOTDIR, kernel.opendir, file)
    fails(errno.EINVAL, kernel.readlink, file)
    fails(errno.EBADF, kernel.readdir, directory, 99)
    fails(errno.EINVAL, kernel.lseek, file, 0, 0, os.SEEK_END)
    fails(errno.EBADF, kernel.read, file, 99, 0, 1)
    fails(errno.ESTALE, kernel.getattr, 4711)


def test_hostile_forgets_do_no_harm(kernel):
    entry, _, _ = kernel.create(1, b"file")
    for _ in range(2):
        kernel.forget(entry.nodeid, 1 << 40)
    kernel.forget(1, 1 << 40)
    kernel.forget(999, 1)
    fails(errno.ESTALE, kernel.getattr, entry.nodeid)
    assert kernel.lookup(1, b"file").nodeid == entry.nodeid
    kernel.lookups.clear()


def test_names_that_a_class_serves_itself_can_be_changed():
    class Store(Dir):
        timeout = FOREVER

        def __init__(self):
            self.store = {}

        def children(self):
            return {name: Item(self.store, name) for name in self.store}

        def create(self, name, mode):
            self.store[name] = b""
            return Item(self.store, name)

        def unlink(self, name):
            del self.store[name]

        def rename(self, name, newdir, newname, flags):
            newdir.store[newname] = self.store.pop(name)

    class Item(File):
        def __init__(self, store, name):
            self.store, self.name = store, name

        def size(self):
            return len(self.store[self.name])

        def read(self, offset, size):
            return self.store[self.name][offset : offset + size]

        def write(self, offset, data):
            self.store[self.name] = self.store[self.name][:offset] + data

    root = Store()
    kernel = Kernel(root)
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert root.store == {b"file": b"content"}
    assert kernel.names() == [b"file"]
    kernel.rename(1, b"file", 1, b"other")
    assert kernel.names() == [b"other"]
    assert kernel.lookup(1, b"other").nodeid == entry.nodeid
    assert kernel.read_file(b"other") == b"content"
    kernel.unlink(1, b"other")
    assert kernel.names() == []
    fails(errno.EROFS, kernel.mkdir, 1, b"x")


def test_file_that_cannot_be_opened_after_all_is_closed_again():
    released = []

    class Handle:
        def release(self):
            released.append("released")

    class Failing(File):
        writable = True

        def open(self, flags):
            return Handle()

        def size(self):
            raise OSError(errno.EIO, "no size")

        def truncate(self, size):
            raise OSError(errno.ENOSPC, "no room")

    class Root(Dir):
        def create(self, name, mode):
            return Failing()

        def lookup(self, name):
            return Opened() if name == b"opened" else None

    class Opened(Failing):
        def size(self):
            return 0

    kernel = Kernel(Root())
    fails(errno.EIO, kernel.create, 1, b"file")
    fails(errno.ENOSPC, kernel.open, kernel.lookup(1, b"opened").nodeid, os.O_WRONLY | os.O_TRUNC)
    assert released == ["released", "released"]


# Changes that the program makes


def test_one_call_tells_all_that_the_kernel_may_keep(root):
    kernel = Kernel(root)
    directory = kernel.mkdir(1, b"directory").nodeid
    file = kernel.create(directory, b"file")[0].nodeid
    assert kernel.lookup(directory, b"missing").nodeid == 0
    root["directory"].changed()
    assert kernel.notices(4) == {(directory,), (directory, b"file"), (directory, b"missing"), (1, b"directory")}
    root["directory"]["file"].changed(wait=True)
    assert kernel.notices(2) == {(file,), (directory, b"file")}
    root["directory"].changed("missing", wait=True)
    assert kernel.notices(2) == {(directory,), (directory, b"missing")}


def test_what_the_kernel_does_not_know_it_is_not_told(root):
    kernel = Kernel(root)
    root["new"] = Dir(file=Bytes())
    assert kernel.notices(2) == {(1,), (1, b"new")}
    root["new"]["file"].changed(wait=True)
    root["new"].changed(wait=True)
    Bytes().changed(wait=True)
    assert kernel.notifications == []
    kernel.destroy()
    root["other"] = Bytes()
    root.changed(wait=True)
    assert kernel.notifications == []


def test_change_drops_what_children_gave():
    root = Counting()
    root.timeout = FOREVER
    kernel = Kernel(root)
    kernel.lookup(1, b"number")
    kernel.lookup(1, b"number")
    assert root.count == 1
    root.changed()
    kernel.notices(2)
    kernel.lookup(1, b"number")
    assert root.count == 2


def test_method_of_a_node_may_say_that_something_changed():
    class Control(File):
        def write(self, offset, data):
            root.text.data = data

    class Root(Dir):
        text = Bytes()

    root = Root(control=Control())
    root["text"] = root.text
    kernel = Kernel(root)
    node, control = kernel.lookup(1, b"text").nodeid, kernel.lookup(1, b"control").nodeid
    kernel.write(control, 0, 0, b"by control")
    assert kernel.notices(2) == {(node,), (1, b"text")}


def test_two_mounts_of_a_tree_see_each_others_changes(root):
    first, second = Kernel(root), Kernel(root)
    entry, fh, _ = first.create(1, b"file")
    assert second.notices(2) == {(1,), (1, b"file")}
    assert second.lookup(1, b"file").nodeid
    first.write(entry.nodeid, fh, 0, b"content")
    node = second.lookup(1, b"file").nodeid
    assert second.notices(2) == {(node,), (1, b"file")}
    assert second.read_file(b"file") == b"content"
    second.destroy()
    first.unlink(1, b"file")
    assert first.notifications == second.notifications == []


def test_workers_do_not_disturb_each_other(root):
    kernel = Kernel(root)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            directory = kernel.mkdir(1, b"of %d" % seed).nodeid
            for step in range(100):
                entry, fh, _ = kernel.create(directory, b"file %d" % step)
                kernel.write(entry.nodeid, fh, step, b"%d" % step)
                assert kernel.read(entry.nodeid, fh, step, 100) == b"%d" % step
                kernel.rename(directory, b"file %d" % step, 1, b"%d-%d" % (seed, step % 10))
                kernel.listdir(1)
                if step % 3 == 0:
                    kernel.unlink(1, b"%d-%d" % (seed, step % 10))
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(root) == 4 + sum(1 for name in root if b"-" in name)
    kernel.forget_all()
    assert len(kernel.filesystem._inodes) == 1
    for name in root:
        del root[name]
    assert root.nlink == 2


# Async


class Later(Dir):
    """Everything waits a little."""

    timeout = 0

    async def children(self):
        await asyncio.sleep(0)
        return {"file": LaterFile(), "link": LaterLink(b"")}


class LaterFile(File):
    text = b"later"

    async def size(self):
        await asyncio.sleep(0)
        return len(self.text)

    async def open(self, flags):
        await asyncio.sleep(0)

    async def read(self, offset, size):
        await asyncio.sleep(0)
        return self.text[offset : offset + size]

    async def write(self, offset, data):
        await asyncio.sleep(0)
        type(self).text = self.text[:offset] + data

    async def getxattr(self, name):
        await asyncio.sleep(0)
        if name == b"user.bad":
            raise OSError(errno.ENODATA, "none")
        return name


class LaterLink(Symlink):
    async def readlink(self):
        return b"somewhere"


def test_methods_may_be_async():
    kernel = Kernel(Later())
    assert kernel.names() == [b"file", b"link"]
    entry = kernel.lookup(1, b"file")
    assert entry.attr[1] == 5
    fh, _ = kernel.open(entry.nodeid, os.O_RDWR)
    assert kernel.read(entry.nodeid, fh, 1, 3) == b"ate"
    assert kernel.write(entry.nodeid, fh, 5, b" on") == 3
    assert kernel.getattr(entry.nodeid)[0][1] == 8
    assert kernel.statx(entry.nodeid)[8] == 8
    assert kernel.getxattr(entry.nodeid, b"user.x") == b"user.x"
    fails(errno.ENODATA, kernel.getxattr, entry.nodeid, b"user.bad")
    assert kernel.readlink(kernel.lookup(1, b"link").nodeid) == b"somewhere"
    assert kernel.lookup(1, b"link").attr[1] == 9


def test_async_directories_make_and_remove_names():
    class Async(Dir):
        writable = True

        async def lookup(self, name):
            await asyncio.sleep(0)
            return super().lookup(name)

        async def create(self, name, mode):
            await asyncio.sleep(0)
            return super().create(name, mode)

        async def unlink(self, name):
            await asyncio.sleep(0)
            super().unlink(name)

        async def init(self, connection):
            self.begun = True

        async def statfs(self):
            return Statfs(blocks=7)

    root = Async()
    kernel = Kernel(root)
    assert root.begun
    kernel.create(1, b"file")
    assert kernel.create(1, b"file")[0].nodeid == kernel.lookup(1, b"file").nodeid
    fails(errno.EEXIST, kernel.create, 1, b"file", os.O_EXCL)
    kernel.unlink(1, b"file")
    assert kernel.lookup(1, b"file").nodeid == 0
    assert kernel.statfs().blocks == 7


def test_slow_async_method_holds_up_nobody_and_can_be_given_up():
    begun = threading.Event()

    class Slow(File):
        async def read(self, offset, size):
            begun.set()
            await asyncio.Event().wait()
            return b""

    kernel = Kernel(Dir(slow=Slow(), quick=Bytes(b"quick")))
    node = kernel.lookup(1, b"slow").nodeid
    waiting = kernel.start(abi.FUSE_READ, node, codec.U64.pack(0) * 2 + bytes(24))
    assert begun.wait(20)
    assert kernel.read_file(b"quick") == b"quick"
    assert not kernel.answered(waiting)
    kernel.interrupt(waiting)
    fails(errno.EINTR, kernel.finish, waiting)


def test_asyncio_is_loaded_only_where_something_is_async():
    program = """
import sys
from fusewire.nodes import Dir, Bytes, NodeFilesystem
from fusewire.session import Session
from fusewire.wire import codec
session = Session(NodeFilesystem(Dir(file=Bytes(b"x"))))
heavy = {"asyncio", "dataclasses", "enum", "inspect", "contextlib", "subprocess", "typing"}
print(*sorted(heavy & set(sys.modules)))
"""
    clean = (
        program.replace("session = ", "# ")
        .replace("fusewire.nodes", "fusewire.ops")
        .replace("Dir, Bytes, NodeFilesystem", "Entry")
    )
    words = [sys.executable, "-I", "-S", "-c"]
    source = str(Path(__file__).parent.parent / "src")
    add = f"import sys; sys.path.insert(0, {source!r})\n"
    found, before = (
        subprocess.run([*words, add + text], capture_output=True, text=True, check=True).stdout
        for text in (program, clean)
    )
    assert found == before
