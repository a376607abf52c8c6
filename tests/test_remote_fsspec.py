"""Filesystems of fsspec, mounted: memory, zip, a directory, a web server; and the conformance list through memory."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import conformance
from fusewire.cli.options import parse
from fusewire.fs.remote import open_url, visible
from fusewire.fs.remote.retry import Patience
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.wire import abi
from remote_mounts import Mount, mounting
from remote_server import RangeServer
from rootless import NOBODY

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed (extra remote)")

from fusewire.fs.remote.filesystem import RemoteFS, open_fsspec  # noqa: E402
from fusewire.fs.remote.store import Store  # noqa: E402

QUICK = Patience(attempts=3, timeout=5, total=10, first_pause=0.01)
MAKE = """
from fusewire.cli.options import parse
from fusewire.fs.remote.filesystem import open_fsspec
operations = open_fsspec("memory://top", parse(""))
"""

# What remote files are not able to, and the behaviours that need it.
NOT_OFFERED = {
    "no symbolic links": (
        "exclusive_creation_refuses_whatever_is_there",
        "creation_through_a_dangling_symlink_makes_its_target",
        "nofollow_refuses_a_symlink",
        "directory_flag_wants_a_directory",
        "path_descriptors_name_and_do_nothing_else",
        "truncation_refuses_what_is_no_file",
        "rename_between_directories_keeps_everything",
        "rename_of_everything_onto_everything",
        "rename_onto_itself_does_nothing",
        "rename_without_replacing",
        "link_refuses_what_cannot_be",
        "link_of_a_symlink_is_a_symlink",
        "unlink_removes_names_only",
        "name_can_be_used_again_at_once",
        "symlink_holds_what_it_was_given",
        "symlink_refuses_what_cannot_be",
        "symlinks_are_followed_in_the_middle_and_at_the_end",
        "symlink_loops_are_found",
        "trailing_slash_follows_and_wants_a_directory",
        "symlinks_own_attributes_are_changed_and_not_the_targets",
        "mkdir_refuses_what_is_there",
        "rmdir_removes_only_empty_directories",
        "listing_has_types_and_inode_numbers",
        "changes_of_entries_move_the_times_of_the_directory",
        "chmod_follows_symlinks_and_needs_a_file",
        "reading_a_symlink_moves_an_old_access_time",
        "new_files_have_the_time_of_now",
        "statx_agrees_with_stat",
        "everything_lies_on_one_device",
        "access_says_what_the_mode_says",
        "program_runs_from_the_filesystem",
    ),
    "what nobody has open is gone when it is removed": ("path_descriptor_of_a_removed_file_still_knows_it",),
    "no files without a name": (
        "tmpfile_has_no_name",
        "tmpfile_can_be_given_a_name",
        "exclusive_tmpfile_cannot_be_given_a_name",
        "tmpfile_wants_a_directory_and_writing",
        "tmpfile_has_its_mode_less_the_umask",
    ),
    "no special files": (
        "special_files_are_told_apart_by_fstat",
        "names_have_255_bytes_at_most",
        "mknod_makes_files_fifos_and_sockets",
        "fifo_carries_data_between_processes",
        "fifo_wants_a_reader",
        "socket_can_be_bound_and_reached",
    ),
    "no space can be reserved or punched out": (
        "allocation_extends_a_file_with_zeros",
        "allocation_within_a_file_changes_no_data",
        "allocation_may_keep_the_size",
        "punched_hole_is_read_as_zeros",
        "punched_hole_past_the_end_keeps_the_size",
        "punched_hole_gives_space_back",
        "allocation_refuses_what_makes_no_sense",
        "operations_move_the_times_that_they_should",
    ),
    "a file that is moved has the time of its copy": (
        "rename_gives_a_new_name",
        "rename_moves_the_times_of_directories_and_the_change_time",
    ),
    "names cannot be exchanged": (
        "rename_exchanges_any_two",
        "exchanged_directories_know_their_parents",
        "link_counts_of_directories_are_consistent",
    ),
    "no hard links": (
        "hard_links_are_one_file",
        "link_counts_follow",
        "link_of_an_open_file_works",
        "times_survive_without_the_cache",
        "inode_number_lasts_as_long_as_the_file",
        "watcher_hears_of_changes",
    ),
    "names in a store are of UTF-8": ("names_are_any_bytes",),
    "access times and times of birth are not kept": (
        "listing_moves_the_access_time_of_an_old_directory",
        "reading_moves_an_old_access_time_only",
        "time_of_birth_stays",
    ),
}
# It would be uploaded: 4 GiB.
TOO_LARGE = "file_may_be_as_long_as_it_likes_where_it_is_empty"
FAILS = {name: reason for reason, names in NOT_OFFERED.items() for name in names}
CASES = [
    case
    for case in conformance.cases("root", "user_switch", "xattr", "acl", "inode_flags", fails=FAILS)
    if case != TOO_LARGE
]


def options(text: str = "", **storage: Any) -> Any:
    found = parse(text)
    given = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
    return type("Options", (), {**given, "storage": storage})()


@pytest.fixture
def mount() -> Iterator[Callable[..., Mount]]:
    with mounting() as make:
        yield make


class World:
    """Kernels on filesystems of this process, which end with the test; what they said is in `said`."""

    def __init__(self) -> None:
        self.filesystems: list[RemoteFS] = []
        self.said: list[str] = []

    def kernel(self, url: str, text: str = "", **storage: Any) -> FakeKernel:
        filesystem = open_fsspec(url, options(text, **storage), patience=QUICK)
        self.filesystems.append(filesystem)
        kernel = FakeKernel(Session(filesystem, log=lambda message, error: self.said.append(message)))
        kernel.init()
        return kernel


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for filesystem in world.filesystems:
        filesystem.destroy()


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def fails(number: int, function, *arguments, **more) -> str:
    with pytest.raises(OSError) as caught:
        function(*arguments, **more)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


# The conformance list


@pytest.fixture(scope="module")
def mount_of_memory() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE) as mounted:
        yield mounted


@pytest.mark.parametrize("name", CASES)
def test_memory_through_fsspec_behaves_as_the_host_does(mount_of_memory, name):
    mount_of_memory.check(name)


@pytest.fixture(scope="module")
def mount_of_memory_rootless() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(MAKE, uid=NOBODY) as mounted:
        yield mounted


@pytest.mark.parametrize(
    "name",
    [
        "created_file_is_empty_and_has_its_mode_less_the_umask",
        "rename_replaces_a_file",
        "unlinked_file_lives_while_it_is_open",
        "working_directory_may_be_removed",
        "holes_are_read_as_zeros",
    ],
)
def test_memory_behaves_so_for_an_unprivileged_user(mount_of_memory_rootless, name):
    mount_of_memory_rootless.check(name)


# Reading


def make_zip(path: Path, *more: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hello.txt", b"hello world\n")
        archive.writestr("directory/big", bytes(range(256)) * 8000)
        archive.writestr("directory/inner/empty", b"")
        for name in more:
            archive.writestr(name, b"hostile")
    path.chmod(0o644)
    return path


@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "rootless"])
def test_zip_archive_is_a_read_only_directory(images, mount, uid):
    if uid == 0 and os.geteuid() != 0:
        pytest.skip("needs root")
    path = make_zip(images / f"remote-{uid}.zip")
    mounted = mount(f"zip://::file://{path}", uid=uid)
    assert mounted.run("answer = read('hello.txt')") == "hello world\n"
    assert mounted.run("answer = len(read_bytes('directory/big'))") == 256 * 8000
    problems = mounted.run(
        "from fusewire.testing import READ_ONLY\n"
        "answer = []\n"
        "for name, check in READ_ONLY.items():\n"
        "    try: check(place)\n"
        "    except (AssertionError, OSError) as error: answer.append(f'{name}: {error}')\n"
    )
    assert problems == []


def test_hostile_archive_shows_nothing_above_its_root(images, world):
    hostile = (
        "../above",
        "/absolute",
        "directory/../../x",
        "directory//double",
        "./dot",
        "n" * 300,
        "../../etc/passwd",
    )
    kernel = world.kernel(f"zip://::file://{make_zip(images / 'hostile.zip', *hostile)}")
    seen = []
    rest = [(1, b"")]
    while rest:
        nodeid, path = rest.pop()
        for item in kernel.listdir(nodeid):
            if item.name not in (b".", b".."):
                seen.append(path + b"/" + item.name)
                if item.dtype == 4:
                    rest.append((kernel.lookup(nodeid, item.name).nodeid, seen[-1]))
    assert {b"/hello.txt", b"/directory", b"/directory/big", b"/directory/inner/empty"} <= set(seen)
    assert not any(part in (b"", b".", b"..") for path in seen for part in path[1:].split(b"/"))
    assert len(seen) < 20


class Listing:
    """A filesystem that lists whatever it is told to."""

    protocol = ("listing",)
    async_impl = False

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    @staticmethod
    def _strip_protocol(path: str) -> str:
        return path

    def invalidate_cache(self, path: str) -> None:
        pass

    def ls(self, path: str, detail: bool = True) -> list[Any]:
        return self.entries


def test_names_of_a_hostile_listing_never_lead_elsewhere():
    store = Store.__new__(Store)
    store.url, store.root, store.web, store.local, store.requests = "listing://", "root", False, False, 0
    store._patience, store._closed, store.is_async = QUICK, threading.Event(), False
    store.protocols = ("listing",)
    bad = ["root/..", "root/.", "root/", "root", "root/a/b", "root/a\0b", "root/\udc80", "root/" + "n" * 256]
    bad += ["/etc/passwd", "other/x", "rootx", "", "../root/x", 5, None, "root//x/y"]
    store.fs = Listing([{"name": name, "size": 1, "type": "file"} for name in [*bad, "root/good", "root/good"]])
    assert list(store.list("root")) == [b"good"]
    store.fs = Listing([{}, {"name": "root/x", "size": -5, "mtime": "nonsense", "type": 7, "mode": "x"}])
    assert store.list("root")[b"x"].size is None


def test_directory_of_a_web_server_is_listed_by_its_page(world):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed, which fsspec needs for http")
    data = os.urandom(1_000_000)
    page = b'<a href="?C=N">sort</a> <a href="../">up</a> <a href="sub/">sub</a> <a href="a%20b.bin">a b</a>'
    page += b'<a href="/etc/passwd">x</a> <a href="http://other.invalid/x">y</a> <a href="a%2Fb">z</a>'
    with RangeServer({"/top/": page, "/top/a b.bin": data, "/top/sub/": b"", "/top/hidden": b"there"}) as server:
        for path in ("/top/", "/top/sub/"):
            server.types[path] = "text/html"
        kernel = world.kernel(server.url + "/top/")
        assert sorted(item.name for item in kernel.listdir()) == [b".", b"..", b"a b.bin", b"sub"]
        assert kernel.read_file(b"a b.bin") == data
        assert kernel.read_file(b"hidden") == b"there"
        assert kernel.lookup(1, b"missing").nodeid == 0
        assert kernel.lookup(1, b"sub").attr[9] & 0o170000 == 0o040000
        fails(errno.EROFS, kernel.create, 1, b"new")
        server.fault = lambda handler, number: handler.plain(503)
        fails(errno.EIO, kernel.lookup, kernel.lookup(1, b"sub").nodeid, b"x")
        assert any("503" in line for line in world.said)


def test_only_what_is_read_is_fetched_of_a_large_file(world):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed, which fsspec needs for http")
    data = os.urandom(1 << 20) * 30
    with RangeServer({"/": b'<a href="big">', "/big": data}) as server:
        server.types["/"] = "text/html"
        kernel = world.kernel(server.url + "/")
        node = kernel.lookup(1, b"big").nodeid
        fh, _ = kernel.open(node)
        assert kernel.read(node, fh, 20_000_000, 5000) == data[20_000_000:20_005_000]
        assert server.sent < 400_000
        before = server.requests
        assert kernel.read(node, fh, 20_001_000, 5000) == data[20_001_000:20_006_000]
        assert server.requests == before
        server.etag, server.files["/big"] = '"2"', data[::-1]
        fails(errno.ESTALE, kernel.read, node, fh, 0, 5000)
        kernel.release(node, fh)


# Writing


def test_file_is_written_at_close_and_not_before(world, memory):
    kernel = world.kernel("memory://top")
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    assert not memory.exists("/top/file")
    assert kernel.lookup(1, b"file").nodeid == entry.nodeid
    assert [item.name for item in kernel.listdir()][2:] == [b"file"]
    kernel.flush(entry.nodeid, fh)
    assert memory.cat("/top/file") == b"content"
    kernel.write(entry.nodeid, fh, 7, b" and more")
    kernel.fsync(entry.nodeid, fh)
    assert memory.cat("/top/file") == b"content and more"
    kernel.release(entry.nodeid, fh)
    assert kernel.read_file(b"file") == b"content and more"


def test_large_file_goes_in_pieces(world, memory):
    kernel = world.kernel("memory://top")
    data = os.urandom(1 << 20) * 9
    entry, fh, _ = kernel.create(1, b"file")
    for offset in range(0, len(data), 1 << 17):
        kernel.write(entry.nodeid, fh, offset, data[offset : offset + (1 << 17)])
    kernel.flush(entry.nodeid, fh)
    kernel.release(entry.nodeid, fh)
    assert memory.cat("/top/file") == data


def test_error_of_the_store_is_the_error_of_close(world, memory, monkeypatch):
    kernel = world.kernel("memory://top")
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", refuse)
        fails(errno.EACCES, kernel.flush, entry.nodeid, fh)
        fails(errno.EACCES, kernel.fsync, entry.nodeid, fh)
        kernel.release(entry.nodeid, fh)
        assert any("memory://top: file" in line for line in world.said)
    # It is kept, and can be brought there by the next one who closes it.
    fh, _ = kernel.open(entry.nodeid, os.O_RDWR)
    assert kernel.read(entry.nodeid, fh, 0, 100) == b"content"
    kernel.flush(entry.nodeid, fh)
    assert memory.cat("/top/file") == b"content"


def test_part_of_a_file_is_changed(world, memory):
    memory.pipe_file("/top/file", b"0123456789" * 50_000)
    kernel = world.kernel("memory://top")
    node = kernel.lookup(1, b"file").nodeid
    fh, _ = kernel.open(node, os.O_RDWR)
    kernel.write(node, fh, 250_003, b"XYZ")
    kernel.flush(node, fh)
    kernel.release(node, fh)
    data = memory.cat("/top/file")
    assert (len(data), data[250_000:250_008]) == (500_000, b"012XYZ67")
    kernel.setattr(node, abi.FATTR_SIZE, size=5)
    assert memory.cat("/top/file") == b"01234"


def test_what_is_not_closed_is_saved_at_the_end(memory):
    world = World()
    kernel = world.kernel("memory://top")
    entry, fh, _ = kernel.create(1, b"file")
    kernel.write(entry.nodeid, fh, 0, b"content")
    world.filesystems[0].destroy()
    assert memory.cat("/top/file") == b"content"


def test_rename_moves_what_is_open_and_not_yet_there(world, memory):
    kernel = world.kernel("memory://top")
    entry, fh, _ = kernel.create(1, b"tmp")
    kernel.write(entry.nodeid, fh, 0, b"new")
    memory.pipe_file("/top/target", b"old")
    kernel.rename(1, b"tmp", 1, b"target")
    kernel.flush(entry.nodeid, fh)
    kernel.release(entry.nodeid, fh)
    assert memory.cat("/top/target") == b"new"
    assert not memory.exists("/top/tmp")
    top = kernel.mkdir(1, b"directory")
    kernel.rename(1, b"target", top.nodeid, b"inner")
    kernel.rename(1, b"directory", 1, b"moved")
    assert memory.cat("/top/moved/inner") == b"new"
    assert kernel.read(entry.nodeid, kernel.open(entry.nodeid)[0], 0, 10) == b"new"


def test_changes_by_others_are_seen_once_what_was_known_is_old(world, memory):
    memory.pipe_file("/top/file", b"old")
    kernel = world.kernel("memory://top", "attr_timeout=0,entry_timeout=0")
    assert kernel.read_file(b"file") == b"old"
    memory.pipe_file("/top/file", b"newer")
    memory.pipe_file("/top/other", b"x")
    assert kernel.read_file(b"file") == b"newer"
    assert {item.name for item in kernel.listdir()} == {b".", b"..", b"file", b"other"}
    memory.rm_file("/top/file")
    assert kernel.lookup(1, b"file").nodeid == 0


def test_read_only_and_missing_things_are_refused(world, memory):
    memory.pipe_file("/top/file", b"x")
    kernel = world.kernel("memory://top", "ro")
    fails(errno.EROFS, kernel.create, 1, b"new")
    fails(errno.EROFS, kernel.unlink, 1, b"file")
    fails(errno.ENOTDIR, open_fsspec, "memory://top/file", options(), patience=QUICK)
    assert "no_such" in fails(errno.EINVAL, open_fsspec, "no_such://x", options(), patience=QUICK)
    fails(errno.ENOENT, open_fsspec, "file:///no/such/directory", options(), patience=QUICK)


def test_directory_of_the_host_is_a_source_too(world, tmp_path):
    (tmp_path / "a\udcffb").write_bytes(b"any bytes")
    (tmp_path / "sub").mkdir()
    kernel = world.kernel(f"file://{tmp_path}")
    assert kernel.read_file(b"a\xffb") == b"any bytes"
    entry, fh, _ = kernel.create(kernel.lookup(1, b"sub").nodeid, b"new")
    kernel.write(entry.nodeid, fh, 0, b"content")
    kernel.flush(entry.nodeid, fh)
    kernel.release(entry.nodeid, fh)
    assert (tmp_path / "sub" / "new").read_bytes() == b"content"
    assert kernel.getattr(entry.nodeid)[0][4] == int((tmp_path / "sub" / "new").stat().st_mtime)


def test_interrupted_reader_gives_up_and_leaves_nothing(world, memory, monkeypatch):
    memory.pipe_file("/top/file", b"content")
    world.kernel("memory://top")
    filesystem = world.filesystems[0]
    begun, go = threading.Event(), threading.Event()

    def slow(self: object, path: str) -> None:
        begun.set()
        assert go.wait(10)
        raise FileNotFoundError(path)

    monkeypatch.setattr(Store, "info", slow)
    pending = filesystem.lookup(kernel_caller(), 1, b"file")
    assert begun.wait(10)
    answers: list[Any] = []
    pending.bind(lambda result, error: answers.append((result, error)))
    pending.interrupt()
    go.set()
    assert isinstance(answers[0][1], InterruptedError)
    assert len(filesystem._tree.nodes) == 1


def kernel_caller() -> Any:
    from fusewire.ops import Caller

    return Caller(0, 0, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_end_up_in_the_store_as_they_were_made(world, memory, seed):
    choose = random.Random(seed)
    kernel = world.kernel("memory://top", choose.choice(["", "attr_timeout=0,entry_timeout=0,negative_timeout=0"]))
    model: dict[bytes, bytearray] = {}
    opened: list[tuple[bytes, int, int, bytearray]] = []  # name, node, handle, content
    names = [b"%d" % number for number in range(6)]
    for _ in range(300):
        name = choose.choice(names)
        step = choose.randrange(9)
        if step <= 1 and len(opened) < 4:
            if name in model:
                node = kernel.lookup(1, name).nodeid
                fh, _ = kernel.open(node, os.O_RDWR)
            else:
                entry, fh, _ = kernel.create(1, name)
                node, model[name] = entry.nodeid, bytearray()
            opened.append((name, node, fh, model[name]))
        elif step <= 3 and opened:
            _, node, fh, content = choose.choice(opened)
            offset, data = choose.randrange(300_000), choose.randbytes(choose.randrange(1, 100_000))
            kernel.write(node, fh, offset, data)
            content += bytes(max(0, offset - len(content)))
            content[offset : offset + len(data)] = data
        elif step == 4 and opened:
            _, node, fh, content = opened.pop(choose.randrange(len(opened)))
            assert kernel.read(node, fh, 0, 1 << 17) == content[: 1 << 17]
            kernel.flush(node, fh)
            kernel.release(node, fh)
        elif step == 5 and name in model:
            size = choose.randrange(200_000)
            kernel.setattr(kernel.lookup(1, name).nodeid, abi.FATTR_SIZE, size=size)
            del model[name][size:]
            model[name] += bytes(size - len(model[name]))
        elif step == 6 and name in model:
            other = choose.choice(names)
            kernel.rename(1, name, 1, other)
            model[other] = model.pop(name)
        elif step == 7 and name in model:
            kernel.unlink(1, name)
            del model[name]
        elif step == 8:
            assert sorted(item.name for item in kernel.listdir())[2:] == sorted(model)
            if name in model:
                assert kernel.getattr(kernel.lookup(1, name).nodeid)[0][1] == len(model[name])
    for _, node, fh, _ in opened:
        kernel.flush(node, fh)
        kernel.release(node, fh)
    assert {key.rpartition("/")[2].encode(): memory.cat(key) for key in memory.store} == model
    kernel.forget_all()
    assert len(world.filesystems[0]._tree.nodes) == 1
    assert world.said == []


def test_callers_do_not_wait_for_each_other(world, memory, monkeypatch):
    for number in range(8):
        memory.pipe_file(f"/top/{number}", b"%d" % number)
    kernel = world.kernel("memory://top")
    gate = threading.Barrier(8)
    info = Store.info

    def together(self: Store, path: str) -> Any:
        gate.wait(10)
        return info(self, path)

    monkeypatch.setattr(Store, "info", together)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda number=number: found.append(kernel.lookup(1, b"%d" % number).nodeid))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_url_of_a_web_page_is_a_directory_and_that_of_an_image_is_one(small):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed, which fsspec needs for http")
    with RangeServer({"/top": b'<a href="file">', "/top/": b'<a href="file">', "/image": small.read_bytes()}) as server:
        server.types.update({"/top": "text/html", "/top/": "text/html"})
        for path, kind in (("/top", "RemoteFS"), ("/top/", "RemoteFS"), ("/image", "Remote")):
            filesystem = open_url(server.url + path, options())
            assert type(filesystem).__name__ == kind
            filesystem.destroy()


# Messages


def test_missing_packages_are_named_with_the_way_to_get_them():
    code = "import sys; sys.modules['fsspec'] = None\n"
    program = (
        "from fusewire.fs.remote.store import Store\n"
        "try: Store('s3://bucket/x', {})\n"
        "except OSError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code + program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'fusewire[remote]'" in said
    code = "import sys; sys.modules['s3fs'] = None\n"
    said = subprocess.run([sys.executable, "-c", code + program], capture_output=True, text=True, check=True).stdout
    assert "s3fs" in said
    assert "s3://bucket/x" in said


def test_passwords_are_in_no_message():
    assert visible("zip://a::https://me:secret@host/x?key=hidden") == "zip://a::https://host/x?..."


def test_large_zip_in_memory_is_read_in_any_order(world, memory):
    data = os.urandom(3_000_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x", data)
    memory.pipe_file("/x.zip", packed.getvalue())
    kernel = world.kernel("zip://::memory://x.zip")
    node = kernel.lookup(1, b"x").nodeid
    fh, _ = kernel.open(node)
    for offset in (2_000_000, 0, 1_000_000, 2_990_000):
        assert kernel.read(node, fh, offset, 100_000) == data[offset : offset + 100_000]
    kernel.release(node, fh)
