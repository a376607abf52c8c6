"""Our own overlay without a kernel: what its upper directory holds, and how a file is followed when it is copied up."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import squashfs_images
from fusewire.cli.options import parse
from fusewire.fs.overlay import Overlay, open_overlay, root_mode
from fusewire.fs.passthrough import Config, open_directory
from fusewire.fs.sources import open_source
from fusewire.ops import Caller, FileRange, Operations, Setattr
from fusewire.wire import abi
from fusewire.wire.codec import ATTR_OUT, DIRENT, ENTRY_OUT

ME = Caller(os.geteuid(), os.getegid(), os.getpid(), 1)
OLD = 1_000_000_000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users, which only root can")


class Connection:
    """A connection that agreed to everything, and remembers what was said."""

    minor, flags, max_write, max_readahead, max_pages = 45, abi.FUSE_HANDLE_KILLPRIV_V2, 1 << 20, 1 << 17, 256

    def __init__(self) -> None:
        self.said: list[Any] = []

    def may_block(self, long: bool = False) -> None:
        pass

    def log_once(self, message: str, error: BaseException | None = None, *, place: str = "") -> None:
        self.said.append(message)

    def notify_inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        self.said.append(nodeid)
        return True


class Client:
    """Uses an overlay as the kernel does, by paths; every lookup is taken back at the end."""

    def __init__(self, lower: Operations, place: Path, **how: Any) -> None:
        self.place = place
        for name in ("upper", "work"):
            (place / name).mkdir(exist_ok=True, parents=True)
        fds = [os.open(place / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("upper", "work")]
        self.overlay: Overlay = open_overlay(lower, *fds, **how)
        self.connection = Connection()
        self.overlay.init(self.connection)  # type: ignore[arg-type]
        self.counts: dict[int, int] = {}

    def _count(self, reply: bytes) -> tuple[Any, ...]:
        fields = ENTRY_OUT.unpack(reply)
        self.counts[fields[0]] = self.counts.get(fields[0], 0) + 1
        return fields

    def node(self, path: str) -> int:
        """Look a path up. Raises FileNotFoundError."""
        nodeid = 1
        for name in path.split("/"):
            if name:
                reply = self.overlay.lookup(ME, nodeid, name.encode())
                if reply is None or not ENTRY_OUT.unpack(reply)[0]:
                    raise FileNotFoundError(errno.ENOENT, "no such name", path)
                nodeid = self._count(reply)[0]
        return nodeid

    def attr(self, path: str) -> tuple[Any, ...]:
        return ATTR_OUT.unpack(self.overlay.getattr(self.node(path), 0, 0))[2:]

    def exists(self, path: str) -> bool:
        try:
            return bool(self.node(path))
        except FileNotFoundError:
            return False

    def split(self, path: str) -> tuple[int, bytes]:
        parent, _, name = path.rpartition("/")
        return self.node(parent), name.encode()

    def open(self, path: str, flags: int = os.O_RDONLY) -> tuple[int, int]:
        nodeid = self.node(path)
        return nodeid, self.overlay.open(ME, nodeid, flags, 0)[0]

    def read(self, opened: tuple[int, int], size: int = 1 << 20) -> bytes:
        data = self.overlay.read(*opened, 0, size, 0, 0, os.O_RDONLY)
        if isinstance(data, FileRange):
            return os.pread(data.fd, data.size, data.offset)
        return b"".join(data)

    def write(self, opened: tuple[int, int], data: bytes, offset: int = 0) -> None:
        assert self.overlay.write(*opened, offset, memoryview(data), 0, 0, os.O_RDWR) == len(data)

    def close(self, opened: tuple[int, int]) -> None:
        self.overlay.release(*opened, 0, 0, 0)

    def get(self, path: str) -> bytes:
        opened = self.open(path)
        try:
            return self.read(opened)
        finally:
            self.close(opened)

    def put(self, path: str, data: bytes) -> None:
        """Write a file that is there."""
        opened = self.open(path, os.O_RDWR)
        self.write(opened, data)
        self.close(opened)

    def make(self, path: str, data: bytes = b"") -> None:
        parent, name = self.split(path)
        reply, (fh, _) = self.overlay.create(ME, parent, name, os.O_RDWR, 0o644, 0o022, 0)
        nodeid = self._count(reply)[0]
        if data:
            self.write((nodeid, fh), data)
        self.close((nodeid, fh))

    def mkdir(self, path: str) -> None:
        self._count(self.overlay.mkdir(ME, *self.split(path), 0o755, 0o022))

    def unlink(self, path: str) -> None:
        self.overlay.unlink(ME, *self.split(path))

    def rmdir(self, path: str) -> None:
        self.overlay.rmdir(ME, *self.split(path))

    def rename(self, path: str, other: str, flags: int = 0) -> None:
        self.overlay.rename(ME, *self.split(path), *self.split(other), flags)

    def set(self, path: str | int, valid: int, **fields: int) -> None:
        change = Setattr(valid, *[0] * 12)._replace(**fields)
        self.overlay.setattr(ME, self.node(path) if isinstance(path, str) else path, change)

    def list(self, path: str = "") -> dict[str, int]:
        """Give name -> inode number."""
        nodeid = self.node(path)
        fh, _ = self.overlay.opendir(ME, nodeid, 0, 0)
        found, offset = {}, 0
        while data := bytes(self.overlay.readdir(nodeid, fh, offset, 200, 0, 0, 0)):  # type: ignore[arg-type]
            place = 0
            while place < len(data):
                ino, offset, length, _ = DIRENT.unpack_from(data, place)
                name = data[place + 24 : place + 24 + length].decode()
                assert name not in found
                found[name] = ino
                place += 24 + length + 7 & ~7
        self.overlay.releasedir(nodeid, fh, 0, 0, 0)
        assert found.pop(".") and found.pop("..")
        return found

    def upper(self, path: str) -> Path:
        return self.place / "upper" / path

    def end(self) -> None:
        """Forget everything: nothing may be left."""
        for nodeid, count in self.counts.items():
            self.overlay.forget(nodeid, count)
        overlay = self.overlay
        left = len(overlay._nodes), len(overlay._upper.nodes), len(overlay._handles), os.listdir(overlay._work)
        lower = overlay._lower.operations
        if hasattr(lower, "nodes"):
            left += (len(lower.nodes),)
        overlay.destroy()
        assert left[:3] == (1, 1, 0)
        assert left[3:] in (([],), ([], 1))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "lower"
    (tree / "dir" / "sub").mkdir(parents=True)
    (tree / "file").write_bytes(b"old data")
    (tree / "dir" / "one").write_bytes(b"one" * 50_000)
    (tree / "dir" / "sub" / "two").write_bytes(b"two")
    (tree / "program").write_bytes(b"#!")
    (tree / "program").chmod(0o6755)
    (tree / "link").symlink_to("file")
    (tree / "names").mkdir()
    (tree / "names" / "a").write_bytes(b"shared")
    os.link(tree / "names" / "a", tree / "names" / "b")
    os.setxattr(tree / "file", "user.kept", b"value")
    for path in ("dir/sub/two", "dir/sub", "dir/one", "dir", "file"):
        os.utime(tree / path, ns=(OLD * 10**9 + 3, OLD * 10**9 + 5))
    return tree


@pytest.fixture(params=["directory", "squashfs"])
def lower(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Callable[[], Operations]:
    """What opens the lower filesystem, of either kind."""
    if request.param == "directory":
        return lambda: open_directory(tree)
    image = squashfs_images.mksquashfs(tree, tmp_path / "image", "-comp", "gzip", "-b", "16K")
    return lambda: open_source(str(image), parse(""))


@pytest.fixture
def client(lower: Callable[[], Operations], tmp_path: Path) -> Iterator[Client]:
    client = Client(lower(), tmp_path)
    yield client
    client.end()


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def opaque(path: Path) -> bool:
    return os.getxattr(path, "user.overlay.opaque") == b"y" if "user.overlay.opaque" in os.listxattr(path) else False


def test_nothing_is_written_while_nothing_is_changed(client: Client) -> None:
    assert client.get("file") == b"old data"
    assert client.get("dir/one") == b"one" * 50_000
    assert set(client.list()) == {"dir", "file", "link", "names", "program"}
    assert os.listdir(client.upper("")) == []


def test_copy_has_data_mode_times_and_attributes(client: Client) -> None:
    client.set("file", abi.FATTR_MODE, mode=0o600)
    copy = client.upper("file")
    status = copy.stat()
    assert copy.read_bytes() == b"old data"
    assert os.getxattr(copy, "user.kept") == b"value"
    assert (stat.S_IMODE(status.st_mode), int(status.st_mtime)) == (0o600, OLD)


def test_directories_above_come_along_and_keep_their_times(client: Client) -> None:
    client.set("dir/sub/two", abi.FATTR_MODE, mode=0o600)
    assert sorted(os.listdir(client.upper("dir"))) == ["sub"]
    assert [int(client.upper(path).stat().st_mtime) for path in ("dir", "dir/sub")] == [OLD, OLD]
    assert set(client.list("dir")) == {"one", "sub"}


def test_truncation_copies_no_more_than_what_stays(client: Client) -> None:
    client.set("dir/one", abi.FATTR_SIZE, size=4)
    assert client.upper("dir/one").read_bytes() == b"oneo"
    opened = client.open("file", os.O_RDWR | os.O_TRUNC)
    client.close(opened)
    assert client.upper("file").read_bytes() == b""


def test_holes_stay_holes(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    with open(tmp_path / "lower" / "sparse", "wb") as file:
        file.truncate(32 << 20)
        file.seek(16 << 20)
        file.write(b"data")
    image = squashfs_images.mksquashfs(tmp_path / "lower", tmp_path / "image", "-comp", "gzip")
    client = Client(open_source(str(image), parse("")), tmp_path)
    client.set("sparse", abi.FATTR_MODE, mode=0o600)
    copy = client.upper("sparse")
    assert copy.read_bytes() == (tmp_path / "lower" / "sparse").read_bytes()
    assert copy.stat().st_blocks * 512 < 4 << 20
    client.end()


def test_who_has_a_file_open_sees_what_is_written_to_its_copy(client: Client) -> None:
    reader = client.open("file")
    assert client.read(reader) == b"old data"
    client.put("file", b"new")
    assert client.read(reader) == b"new data"
    client.close(reader)


def test_inode_number_stays_when_a_file_is_copied_up(client: Client) -> None:
    before = client.attr("file")[0], client.attr("dir")[0], client.attr("dir/one")[0]
    client.put("dir/one", b"x")
    client.put("file", b"x")
    for nodeid, count in client.counts.items():
        client.overlay.forget(nodeid, count)
    client.counts.clear()
    assert (client.attr("file")[0], client.attr("dir")[0], client.attr("dir/one")[0]) == before
    assert client.list()["file"] == before[0]
    assert client.list("dir")["one"] == before[2]


def test_names_of_one_lower_file_are_copied_up_by_themselves(client: Client) -> None:
    assert client.attr("names/a")[0] == client.attr("names/b")[0]
    client.put("names/a", b"SH")
    assert (client.get("names/a"), client.get("names/b")) == (b"SHared", b"shared")
    assert client.attr("names/a")[0] != client.attr("names/b")[0]
    assert client.connection.said, "the kernel has to hear that an inode number is another one now"


def test_removed_file_is_changed_by_descriptor_only(client: Client) -> None:
    reader = client.open("file")
    client.unlink("file")
    client.set(reader[0], abi.FATTR_MODE | abi.FATTR_SIZE, mode=0o640, size=3)
    assert client.read(reader) == b"old"
    assert not client.exists("file")
    assert is_whiteout(client.upper("file"))
    client.close(reader)


def test_removed_names_leave_whiteouts_and_new_ones_take_their_place(client: Client) -> None:
    client.unlink("file")
    assert is_whiteout(client.upper("file"))
    assert "file" not in client.list()
    client.make("file", b"mine")
    assert client.upper("file").read_bytes() == b"mine"
    client.unlink("file")
    assert is_whiteout(client.upper("file"))
    client.make("mine")
    client.unlink("mine")
    assert not os.path.lexists(client.upper("mine"))


def test_directory_made_in_the_place_of_a_removed_one_is_opaque(client: Client) -> None:
    for path in ("dir/one", "dir/sub/two"):
        client.unlink(path)
    with pytest.raises(OSError) as caught:
        client.rmdir("dir")
    assert caught.value.errno == errno.ENOTEMPTY
    client.rmdir("dir/sub")
    client.rmdir("dir")
    assert is_whiteout(client.upper("dir"))
    client.mkdir("dir")
    assert opaque(client.upper("dir"))
    assert client.list("dir") == {}
    assert sorted(os.listdir(client.upper(""))) == ["dir"]


def test_moved_directory_brings_all_that_was_in_it(client: Client) -> None:
    ino = client.attr("dir")[0]
    client.unlink("dir/one")
    client.rename("dir", "moved")
    assert client.get("moved/sub/two") == b"two"
    assert client.list("moved").keys() == {"sub"}
    assert not client.exists("dir")
    assert client.attr("moved")[0] == ino
    assert is_whiteout(client.upper("dir"))
    assert sorted(os.listdir(client.upper("moved"))) == ["sub"]  # an opaque directory needs no whiteouts
    client.rename("moved", "dir")
    assert opaque(client.upper("dir"))
    assert client.list("dir").keys() == {"sub"}


def test_directory_moved_onto_another_one_is_not_merged_with_it(client: Client) -> None:
    client.mkdir("new")
    client.make("new/inner")
    for path in ("names/a", "names/b"):
        client.unlink(path)
    client.rename("new", "names")
    assert client.list("names").keys() == {"inner"}
    assert sorted(os.listdir(client.upper(""))) == ["names"]


def test_lower_directories_can_be_exchanged(client: Client) -> None:
    client.rename("dir", "names", 2)
    assert client.list("names").keys() == {"one", "sub"}
    assert client.list("dir").keys() == {"a", "b"}


def test_what_was_kept_is_there_the_next_time(client: Client, lower: Callable[[], Operations], tmp_path: Path) -> None:
    client.put("file", b"new")
    client.unlink("names/a")
    client.rename("dir", "moved")
    client.make("made", b"made")
    other = Client(lower(), tmp_path)
    assert set(other.list()) == {"file", "link", "made", "moved", "names", "program"}
    assert (other.get("file"), other.get("moved/sub/two"), other.get("made")) == (b"new data", b"two", b"made")
    assert other.list("names").keys() == {"b"}
    other.end()


def test_marks_by_name_are_made_where_nothing_else_can_be(lower: Callable[[], Operations], tmp_path: Path) -> None:
    for turn in range(2):  # the second time they are read
        client = Client(lower(), tmp_path)
        client.overlay._marks.devices, client.overlay._marks.opaque = False, ()
        if not turn:
            client.unlink("file")
            client.unlink("names/a")
            client.unlink("names/b")
            client.rmdir("names")
            client.mkdir("names")
            client.rename("dir", "moved")
            client.make("file")
            client.unlink("file")
        assert client.list().keys() == {"link", "moved", "names", "program"}
        assert client.list("names") == {}
        assert client.get("moved/sub/two") == b"two"
        client.end()
    assert sorted(os.listdir(tmp_path / "upper")) == [".wh.dir", ".wh.file", "moved", "names"]
    assert os.listdir(tmp_path / "upper" / "names") == [".wh..wh..opq"]


@pytest.mark.parametrize("name", ["user.overlay.opaque", "user.fuseoverlayfs.opaque"])
def test_opaque_directories_of_others_are_understood(tree: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "upper" / "dir").mkdir(parents=True)
    os.setxattr(tmp_path / "upper" / "dir", name, b"y")
    client = Client(open_directory(tree), tmp_path)
    assert client.list("dir") == {}
    assert not client.exists("dir/one")
    assert client.overlay.listxattr(ME, client.node("dir")) == b""
    with pytest.raises(OSError):
        client.overlay.setxattr(ME, client.node("dir"), name.encode(), b"n", 0, 0)
    client.end()


def test_names_of_marks_are_nobodys(client: Client) -> None:
    with pytest.raises(OSError, match="mark removed files"):
        client.make(".wh.file")
    with pytest.raises(OSError, match="mark removed files"):
        client.rename("file", ".wh.x")
    with pytest.raises(PermissionError, match="0:0"):
        client.overlay.mknod(ME, 1, b"null", stat.S_IFCHR | 0o600, 0, 0)
    assert not client.exists(".wh.file")


def test_link_to_a_lower_file_is_one_to_its_copy(client: Client) -> None:
    client._count(client.overlay.link(ME, client.node("dir/one"), 1, b"another"))
    client.put("another", b"ONE")
    assert client.get("dir/one")[:6] == b"ONEone"
    assert client.attr("another")[0] == client.attr("dir/one")[0]
    assert client.attr("another")[10] == 2


def test_listing_goes_on_after_its_cookie_while_names_come_and_go(client: Client) -> None:
    for number in range(20):
        client.make(f"dir/new{number:02}")
    nodeid = client.node("dir")
    fh, _ = client.overlay.opendir(ME, nodeid, 0, 0)

    def names(offset: int) -> list[tuple[int, bytes]]:
        data = bytes(client.overlay.readdir(nodeid, fh, offset, 4096, 0, 0, 0))  # type: ignore[arg-type]
        found, place = [], 0
        while place < len(data):
            _, cookie, length, _ = DIRENT.unpack_from(data, place)
            found.append((cookie, data[place + 24 : place + 24 + length]))
            place += 24 + length + 7 & ~7
        return found

    first = names(0)
    client.unlink("dir/new03")
    client.make("dir/later")
    middle, _ = first[10]
    assert names(middle) == first[11:]
    again = dict(names(0))
    assert {cookie: name for cookie, name in first if name != b"new03"}.items() <= again.items()
    assert b"later" in again.values()
    assert b"new03" not in again.values()
    client.overlay.releasedir(nodeid, fh, 0, 0, 0)


@needs_root
def test_owner_is_kept(tree: Path, tmp_path: Path) -> None:
    os.chown(tree / "program", 70000, 70001)
    (tree / "program").chmod(0o6755)
    client = Client(open_directory(tree), tmp_path)
    client.set("program", abi.FATTR_ATIME, atime=OLD)
    status = client.upper("program").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (70000, 70001, 0o6755)
    client.end()


def test_set_user_id_goes_where_the_owner_cannot_be_kept(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(open_directory(tree), tmp_path)
    monkeypatch.setattr(type(client.overlay._upper), "own", lambda *_: False)
    client.set("program", abi.FATTR_ATIME, atime=OLD)
    assert stat.S_IMODE(client.upper("program").stat().st_mode) == 0o755
    client.end()


def test_failed_copy_leaves_nothing_behind(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(open_directory(tree), tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(type(client.overlay._lower), "copy", fail)
    with pytest.raises(OSError) as caught:
        client.open("dir/one", os.O_RDWR)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "work") == []
    assert client.get("dir/one") == b"one" * 50_000
    client.end()


def test_work_directory_is_cleared_of_what_a_killed_server_left(tree: Path, tmp_path: Path) -> None:
    left = tmp_path / "work" / ".wh..wh.tmp.12.1" / "below"
    left.mkdir(parents=True)
    left.parent.chmod(0)
    client = Client(open_directory(tree), tmp_path)
    client.end()


def test_server_needs_no_proc_in_its_place(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc/self/fd")  # as a sandbox has it, which has no other path
    client = Client(open_directory(tree, Config(proc=b"")), tmp_path, config=Config(proc=b""))
    client.put("dir/one", b"x")
    client.unlink("file")
    client.rename("dir", "moved")
    client.mkdir("dir")
    assert client.get("moved/one")[:3] == b"xne"
    assert opaque(client.upper("dir"))
    client.end()


def test_lower_filesystem_has_to_answer_at_once(tree: Path, tmp_path: Path) -> None:
    class Late(type(open_directory(tree))):  # type: ignore[misc]
        async def lookup(self, caller: Caller, parent: int, name: bytes) -> bytes | None:
            return None

    late = Late(os.open(tree, os.O_PATH))
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    fds = [os.open(tmp_path / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("upper", "work")]
    with pytest.raises(TypeError, match="lookup is async"):
        open_overlay(late, *fds)
    late.destroy()


def test_upper_directory_can_have_the_mode_of_the_lower_root(tree: Path) -> None:
    tree.chmod(0o711)
    lower = open_directory(tree)
    assert root_mode(lower) == 0o711
    lower.destroy()
