"""The filesystem in memory: by a kernel that is played, and by the conformance list on real mounts of it.

The real mounts are served by a process of their own (conformance.py).
"""

import errno
import os
import random
import stat
import struct
import threading
from collections.abc import Iterator

import pytest

import conformance
from fusewire.fs.memory import MemoryFS
from fusewire.session import Session
from fusewire.sparse import CHUNK, SparseData
from fusewire.testing import FakeKernel
from fusewire.testing.conformance import BEHAVIOURS
from fusewire.wire import abi

MAKE = "from fusewire.fs.memory import MemoryFS; operations = MemoryFS()"


def fails(number, function, *arguments, **options):
    with pytest.raises(OSError) as caught:
        function(*arguments, **options)
    assert caught.value.errno == number, caught.value


def kernel_of(operations: MemoryFS, **ids) -> FakeKernel:
    def log(message, error):
        raise AssertionError(message) from error

    kernel = FakeKernel(Session(operations, log=log), **ids)
    kernel.init()
    return kernel


@pytest.fixture
def fs() -> MemoryFS:
    return MemoryFS(max_bytes=1 << 22, max_nodes=100, uid=0, gid=0)


@pytest.fixture
def kernel(fs) -> Iterator[FakeKernel]:
    kernel = kernel_of(fs)
    yield kernel
    assert kernel.unasked == []


# The protocol


def test_what_is_written_is_read(kernel):
    entry, fh, _ = kernel.create(1, b"file")
    assert kernel.write(entry.nodeid, fh, 0, b"hello ") == 6
    assert kernel.write(entry.nodeid, fh, 6, b"world") == 5
    assert kernel.read_file(b"file") == b"hello world"
    assert kernel.getattr(entry.nodeid)[0][1] == 11


def test_missing_name_may_be_remembered(kernel):
    entry = kernel.lookup(1, b"missing")
    assert entry.nodeid == 0
    assert entry.entry_timeout > 1e9


def test_opens_need_no_handle_and_flush_and_fsync_are_not_asked_again(kernel):
    entry, _, _ = kernel.create(1, b"file")
    fh, _ = kernel.open(entry.nodeid)
    assert fh == 0
    fails(errno.ENOSYS, kernel.flush, entry.nodeid, fh)
    fails(errno.ENOSYS, kernel.fsync, entry.nodeid, fh)
    kernel.release(entry.nodeid, fh)


def test_pages_are_kept_once_the_access_time_is_newer(kernel):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert kernel.open(entry.nodeid)[1] == 0
    kernel.read(entry.nodeid, 0, 0, 10)
    assert kernel.open(entry.nodeid)[1] == abi.FOPEN_KEEP_CACHE
    kernel.write(entry.nodeid, fh, 0, b"new")
    assert kernel.open(entry.nodeid)[1] == 0


def test_unlinked_file_lives_until_it_is_forgotten(kernel, fs):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, bytes(100_000))
    kernel.unlink(1, b"file")
    assert kernel.getattr(entry.nodeid)[0][10] == 0
    assert kernel.read(entry.nodeid, fh, 99_990, 100) == bytes(10)
    assert (fs.used_nodes, fs.used_bytes) == (2, 100_000)
    kernel.forget_all()
    assert (fs.used_nodes, fs.used_bytes) == (1, 0)
    fails(errno.ESTALE, kernel.getattr, entry.nodeid)


def test_file_that_is_forgotten_first_goes_with_its_last_name(kernel, fs):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    kernel.forget_all()
    assert fs.used_nodes == 2
    kernel.unlink(1, b"file")
    assert (fs.used_nodes, fs.used_bytes) == (1, 0)


def test_hostile_forgets_do_no_harm(kernel):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.forget(entry.nodeid, 1 << 40)
    kernel.forget(entry.nodeid, 1 << 40)
    kernel.forget(1, 1 << 40)
    kernel.forget(999, 1)
    fails(errno.ESTALE, kernel.write, entry.nodeid, fh, 0, b"x")
    assert kernel.lookup(1, b"file").nodeid not in (0, entry.nodeid)


def test_hard_links_have_one_node(kernel):
    first, fh, _ = kernel.create(1, b"first")
    second = kernel.link(first.nodeid, 1, b"second")
    assert second.nodeid == first.nodeid
    assert second.attr[10] == 2
    kernel.write(first.nodeid, fh, 0, b"shared")
    kernel.unlink(1, b"first")
    assert kernel.read_file(b"second") == b"shared"


def test_tmpfile_gets_its_first_name_by_link(kernel, fs):
    entry, fh, _ = kernel.tmpfile(1)
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert (entry.attr[10], fs.used_nodes) == (0, 2)
    assert kernel.link(entry.nodeid, 1, b"named").attr[10] == 1
    kernel.forget_all()
    assert fs.used_nodes == 2
    assert kernel.read_file(b"named") == b"content"


def test_directory_cannot_be_moved_below_itself(kernel):
    top = kernel.mkdir(1, b"top")
    inner = kernel.mkdir(top.nodeid, b"inner")
    fails(errno.EINVAL, kernel.rename, 1, b"top", inner.nodeid, b"new")
    fails(errno.EINVAL, kernel.rename, 1, b"top", top.nodeid, b"inner", 2)
    fails(errno.EINVAL, kernel.rename, top.nodeid, b"inner", 1, b"top", 2)
    fails(errno.ENOTEMPTY, kernel.rename, top.nodeid, b"inner", 1, b"top")
    fails(errno.EINVAL, kernel.rename, 1, b"top", 1, b"new", 3)
    fails(errno.EINVAL, kernel.rename, 1, b"top", 1, b"new", 8)


def test_removed_directory_takes_no_names(kernel):
    directory = kernel.mkdir(1, b"directory")
    entry, _, _ = kernel.create(1, b"file")
    kernel.rmdir(1, b"directory")
    for call in (
        lambda: kernel.create(directory.nodeid, b"x"),
        lambda: kernel.mkdir(directory.nodeid, b"x"),
        lambda: kernel.symlink(directory.nodeid, b"x", b"y"),
        lambda: kernel.link(entry.nodeid, directory.nodeid, b"x"),
        lambda: kernel.rename(1, b"file", directory.nodeid, b"x"),
    ):
        fails(errno.ENOENT, call)


def test_calls_for_another_type_of_node_are_refused(kernel):
    directory = kernel.mkdir(1, b"directory").nodeid
    file = kernel.create(1, b"file")[0].nodeid
    link = kernel.symlink(1, b"link", b"target").nodeid
    fails(errno.EISDIR, kernel.read, directory, 0, 0, 10)
    fails(errno.EISDIR, kernel.write, directory, 0, 0, b"x")
    fails(errno.EISDIR, kernel.setattr, directory, abi.FATTR_SIZE, size=3)
    fails(errno.EINVAL, kernel.read, link, 0, 0, 10)
    fails(errno.ENOTDIR, kernel.lookup, file, b"x")
    fails(errno.ENOTDIR, kernel.opendir, file)
    fails(errno.EINVAL, kernel.readlink, file)
    fails(errno.EPERM, kernel.link, directory, 1, b"x")
    fails(errno.EISDIR, kernel.unlink, 1, b"directory")
    fails(errno.ENOTDIR, kernel.rmdir, 1, b"file")
    fails(errno.EINVAL, kernel.mknod, 1, b"x", stat.S_IFLNK | 0o777)
    fails(errno.EEXIST, kernel.create, 1, b"directory")
    fails(errno.EBADF, kernel.readdir, directory, 99)
    fails(errno.EINVAL, kernel.lseek, file, 0, 0, os.SEEK_END)


def test_creation_of_what_is_there_opens_it_unless_it_has_to_be_new(kernel):
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert kernel.create(1, b"file", os.O_RDWR)[0].nodeid == entry.nodeid
    assert kernel.getattr(entry.nodeid)[0][1] == 7
    fails(errno.EEXIST, kernel.create, 1, b"file", os.O_RDWR | os.O_EXCL)
    kernel.create(1, b"file", os.O_RDWR | os.O_TRUNC)
    assert kernel.getattr(entry.nodeid)[0][1] == 0


# Limits


def test_bytes_have_a_limit(kernel, fs):
    entry, fh, _ = kernel.create(1, b"file")
    written = 0
    with pytest.raises(OSError) as caught:
        while True:
            written += kernel.write(entry.nodeid, fh, written, bytes(100_000))
    assert caught.value.errno == errno.ENOSPC
    assert fs.max_bytes - 200_000 < fs.used_bytes <= fs.max_bytes
    assert kernel.statfs().bfree == (fs.max_bytes - fs.used_bytes) // 4096
    fails(errno.ENOSPC, kernel.fallocate, entry.nodeid, fh, 0, 1 << 40)
    kernel.write(entry.nodeid, fh, 0, b"what is there can be changed")
    kernel.setattr(entry.nodeid, abi.FATTR_SIZE, size=0)
    assert fs.used_bytes == 0
    kernel.write(entry.nodeid, fh, 0, bytes(100_000))


def test_nodes_have_a_limit_and_so_have_names(kernel, fs):
    for number in range(90):
        kernel.mkdir(1, b"%d" % number)
    entry = kernel.mknod(1, b"file", stat.S_IFREG | 0o644)
    for number in range(8):
        kernel.link(entry.nodeid, 1, b"link %d" % number)
    assert kernel.statfs().ffree == 0
    for call in (
        lambda: kernel.mkdir(1, b"new"),
        lambda: kernel.create(1, b"new"),
        lambda: kernel.tmpfile(1),
        lambda: kernel.symlink(1, b"new", b"x"),
        lambda: kernel.link(entry.nodeid, 1, b"new"),
        lambda: kernel.rename(1, b"file", 1, b"new", 4),
    ):
        fails(errno.ENOSPC, call)
    assert kernel.lookup(1, b"new").nodeid == 0
    kernel.unlink(1, b"link 0")
    kernel.rmdir(1, b"0")
    kernel.forget_all()
    assert kernel.statfs().ffree == 2


def test_attributes_count_as_bytes(kernel, fs):
    node = kernel.create(1, b"file")[0].nodeid
    kernel.setxattr(node, b"user.a", bytes(1000))
    kernel.setxattr(node, b"user.a", bytes(10))
    kernel.setxattr(node, b"security.capability", bytes(20))
    assert fs.used_bytes == 6 + 10 + 19 + 20
    kernel.write(node, 0, 0, b"x")
    assert fs.used_bytes == 16 + 1
    kernel.removexattr(node, b"user.a")
    assert fs.used_bytes == 1
    fs.max_bytes = 100
    fails(errno.ENOSPC, kernel.setxattr, node, b"user.a", bytes(200))


def test_far_offsets_cost_nothing(kernel, fs):
    node = kernel.create(1, b"file")[0].nodeid
    for exponent in (31, 32, 40, 50, 62):
        kernel.write(node, 0, 1 << exponent, b"mark")
    assert fs.used_bytes == 5 * 4
    assert kernel.getattr(node)[0][1] == (1 << 62) + 4
    assert kernel.read(node, 0, (1 << 40) - 2, 8) == b"\0\0mark\0\0"
    assert kernel.lseek(node, 0, (1 << 40) + CHUNK, os.SEEK_DATA) == 1 << 50
    fails(errno.EFBIG, kernel.write, node, 0, (1 << 63) - 2, b"mark")
    fails(errno.EFBIG, kernel.setattr, node, abi.FATTR_SIZE, size=1 << 63)
    fails(errno.EFBIG, kernel.fallocate, node, 0, (1 << 63) - 1, 5)
    kernel.fallocate(node, 0, 0, (1 << 62) + 4, 3)
    assert fs.used_bytes == 0


# Privileges, attributes


def test_set_user_id_goes_when_the_kernel_says_so(kernel):
    node = kernel.mknod(1, b"file", stat.S_IFREG | 0o6777).nodeid

    def mode() -> int:
        return stat.S_IMODE(kernel.getattr(node)[0][9])

    kernel.write(node, 0, 0, b"x")
    assert mode() == 0o6777
    kernel.call("write", node, 0, 0, 1, abi.FUSE_WRITE_KILL_SUIDGID, 0, 0, tail=b"x")
    assert mode() == 0o777
    kernel.setattr(node, abi.FATTR_MODE, mode=0o6767)
    kernel.setattr(node, abi.FATTR_SIZE | abi.FATTR_KILL_SUIDGID, size=0)
    assert mode() == 0o2767  # where no group executes, that bit means locking: it stays
    kernel.setattr(node, abi.FATTR_MODE, mode=0o4755)
    kernel.call("open", node, os.O_WRONLY | os.O_TRUNC, abi.FUSE_OPEN_KILL_SUIDGID)
    assert mode() == 0o755
    kernel.setattr(node, abi.FATTR_MODE, mode=0o6755)
    kernel.setattr(node, abi.FATTR_UID, uid=5)
    assert mode() == 0o755


def test_umask_is_applied_only_where_the_kernel_has_not(fs):
    kernel = FakeKernel(Session(fs))
    kernel.init(flags=0x73FFFFFB | 0x5FD << 32)
    assert kernel.agreed.flags & abi.FUSE_DONT_MASK
    assert stat.S_IMODE(kernel.mkdir(1, b"new", 0o777, umask=0o027).attr[9]) == 0o750
    other = FakeKernel(Session(MemoryFS()))
    other.init(flags=0x73FFFFFB & ~abi.FUSE_DONT_MASK)
    assert stat.S_IMODE(other.mkdir(1, b"new", 0o750, umask=0o777).attr[9]) == 0o750


def test_time_stamps_of_the_wire_are_signed(kernel):
    node = kernel.create(1, b"file")[0].nodeid
    before = (1 << 64) - 5
    valid = abi.FATTR_ATIME | abi.FATTR_MTIME | abi.FATTR_CTIME
    attr, _ = kernel.setattr(node, valid, atime=before, atimensec=7, mtime=1 << 33, mtimensec=8, ctime=9, ctimensec=1)
    assert attr[3:9] == (before, 1 << 33, 9, 7, 8, 1)
    assert kernel.statx(node)[11:13] == (-5, 7)


def test_trusted_attributes_are_listed_for_root_only(fs):
    kernel = kernel_of(fs)
    node = kernel.create(1, b"file")[0].nodeid
    kernel.setxattr(node, b"trusted.a", b"x")
    kernel.setxattr(node, b"user.b", b"y")
    assert kernel.listxattr(node) == [b"trusted.a", b"user.b"]
    kernel.uid = 1000
    assert kernel.listxattr(node) == [b"user.b"]


def test_acl_that_is_none_is_refused(kernel):
    node = kernel.create(1, b"file")[0].nodeid
    for value in (b"", b"\2\0\0\0", struct.pack("<IHHI", 2, 1, 7, 0), struct.pack("<I", 2) + b"x" * 7):
        fails(errno.EINVAL, kernel.setxattr, node, b"system.posix_acl_access", value)
    fails(errno.EOPNOTSUPP, kernel.setxattr, node, b"system.posix_acl_access", b"\3\0\0\0")


def test_mode_and_acl_follow_each_other(kernel):
    node = kernel.mknod(1, b"file", stat.S_IFREG | 0o2640).nodeid
    entries = ((1, 7, -1), (2, 6, 1000), (4, 0, -1), (16, 5, -1), (32, 1, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    name = b"system.posix_acl_access"
    kernel.call("setxattr", node, len(acl), 0, abi.FUSE_SETXATTR_ACL_KILL_SGID, names=[name], tail=acl)
    assert stat.S_IMODE(kernel.getattr(node)[0][9]) == 0o751
    kernel.setattr(node, abi.FATTR_MODE, mode=0o640)
    assert kernel.getxattr(node, name)[4:] == b"".join(
        struct.pack("<HHi", *entry) for entry in ((1, 6, -1), (2, 6, 1000), (4, 0, -1), (16, 4, -1), (32, 0, -1))
    )
    assert kernel.listxattr(node) == [name]
    kernel.removexattr(node, name)
    kernel.removexattr(node, name)
    assert kernel.listxattr(node) == []


# Directories


@pytest.mark.parametrize("flags", [0x73FFFFFB | 0x5FD << 32, 0x73FFFFFB & ~abi.FUSE_DO_READDIRPLUS])
def test_big_directory_is_listed_in_any_pieces(flags):
    kernel = FakeKernel(Session(MemoryFS()))
    kernel.init(flags=flags)
    names = [b"name %d" % number for number in range(500)]
    for name in names:
        kernel.mknod(1, name, stat.S_IFREG | 0o600)
    for size in (300, 4096, 1 << 17):
        assert [item.name for item in kernel.listdir(1, size)] == [b".", b"..", *names]


def test_name_keeps_its_cookie_while_it_exists(kernel):
    for name in (b"a", b"b", b"c"):
        kernel.create(1, name)
    first = {item.name: item.cookie for item in kernel.listdir()}
    kernel.create(1, b"d")
    kernel.rename(1, b"d", 1, b"b")
    kernel.rename(1, b"a", 1, b"c", 2)
    assert {item.name: item.cookie for item in kernel.listdir()} == first
    kernel.unlink(1, b"a")
    kernel.create(1, b"a")
    assert {item.name: item.cookie for item in kernel.listdir()}[b"a"] > max(first.values())


def test_listing_goes_on_by_another_handle(kernel):
    for number in range(20):
        kernel.create(1, b"%02d" % number)
    fh, _ = kernel.opendir(1)
    first = kernel.readdir(1, fh, 0, 400)
    kernel.releasedir(1, fh)
    fails(errno.EBADF, kernel.readdir, 1, fh)
    again, _ = kernel.opendir(1)
    rest = kernel.readdir(1, again, first[-1].cookie, 4096)
    assert [item.name for item in first[2:] + rest] == [b"%02d" % number for number in range(20)]


def test_workers_do_not_disturb_each_other(fs):
    fs.max_nodes = 10_000
    kernel = kernel_of(fs)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        try:
            directory = kernel.mkdir(1, b"of %d" % seed).nodeid
            for step in range(150):
                entry, fh, _ = kernel.create(directory, b"file %d" % step)
                data = mine.randbytes(mine.randrange(3000))
                kernel.write(entry.nodeid, fh, step, data)
                assert kernel.read(entry.nodeid, fh, step, 5000) == data
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
    for item in kernel.listdir(1):
        if item.name not in (b".", b".."):
            kernel.rmdir(1, item.name) if item.dtype == 4 else kernel.unlink(1, item.name)
    kernel.forget_all()
    assert (fs.used_nodes, fs.used_bytes) == (1, 0)


# Sparse data


@pytest.mark.parametrize("seed", range(4))
def test_sparse_data_behaves_as_a_plain_array(seed):
    choose = random.Random(seed)
    data, model = SparseData(), bytearray()
    limit = 6 * CHUNK
    for _ in range(400):
        offset = choose.choice((choose.randrange(limit), choose.randrange(6) * CHUNK, len(model)))
        size = choose.choice((choose.randrange(1, 200), choose.randrange(1, 3 * CHUNK), CHUNK))
        operation = choose.randrange(5)
        before, grows = data.allocated, data.grows(offset, size)
        if operation == 0:
            data.truncate(offset)
            del model[offset:]
            model += bytes(offset - len(model))
        elif operation == 1:
            data.zero(offset, size)
            stop = min(len(model), offset + size)
            if stop > offset:
                model[offset:stop] = bytes(stop - offset)
        elif operation == 2:
            data.reserve(offset, size)
            assert data.allocated - before <= grows
            assert data.grows(offset, size) == 0
        else:
            new = choose.randbytes(size)
            data.write(offset, memoryview(new))
            model += bytes(max(0, offset - len(model)))
            model[offset : offset + size] = new
            assert data.allocated - before <= grows
        assert data.size == len(model)
        assert data.allocated == sum(map(len, data.chunks.values()))
        assert b"".join(data.read(offset, size)) == model[offset : offset + size]
        covered = bytearray(len(model))
        position = data.next_data(0)
        while position < data.size:
            end = data.next_hole(position)
            covered[position:end] = model[position:end]
            position = data.next_data(end)
        assert covered == model
    assert b"".join(data.read(0, 2 * limit)) == model


def test_what_was_read_does_not_change_later():
    data = SparseData()
    data.write(0, memoryview(b"first"))
    parts = data.read(0, 100)
    data.write(0, memoryview(b"OTHER and more"))
    data.truncate(2)
    assert b"".join(parts) == b"first"


# Real mounts


@pytest.fixture(scope="module")
def mount_of_root() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def rootless_mount() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE, uid=conformance.NOBODY, tmpfs=False) as mounted:
        yield mounted


def test_list_of_behaviours_is_long_and_needs_no_more_than_it_says():
    assert len(BEHAVIOURS) >= 120
    marks = {mark for behaviour in BEHAVIOURS.values() for mark in behaviour.marks}
    assert marks == {"root", "user_switch", "xattr", "acl", "locks", "inode_flags"}
    assert all("root" in item.marks for item in BEHAVIOURS.values() if "user_switch" in item.marks)


@pytest.mark.parametrize("name", conformance.cases())
def test_mount_of_root_does_what_tmpfs_does(mount_of_root, name):
    mount_of_root.check(name)


@pytest.mark.parametrize("name", conformance.cases("root"))  # what only root may do: owners, devices, trusted.*
def test_rootless_mount_does_what_a_directory_does(rootless_mount, name):
    rootless_mount.check(name)
