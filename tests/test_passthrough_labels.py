"""What comes with a creating request: security labels and groups (SECURITY_CTX, CREATE_SUPP_GROUP), in process."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusewire.fs.passthrough import Config, Passthrough, open_directory
from fusewire.ops import Caller, Extensions
from fusewire.wire import abi

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set labels, and act as somebody else")
LABEL = b"security.fusewire-test"


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Passthrough]:
    flags = abi.FUSE_SECURITY_CTX | abi.FUSE_CREATE_SUPP_GROUP
    tmp_path.chmod(0o777)
    made = open_directory(str(tmp_path), Config(security_label=True))
    made.init(SimpleNamespace(flags=flags, may_block=None))
    try:
        yield made
    finally:
        made.destroy()
        gc.collect()


def caller(uid: int = 0, gid: int = 0, label: bytes = LABEL, groups: tuple[int, ...] = ()) -> Caller:
    return Caller(uid, gid, os.getpid(), 2, Extensions([(label, b"a label")] if label else [], groups))


def in_thread(work: Callable[[], object]) -> object:
    """Run as a worker would: in a thread of its own, whose ids and umask may change."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except OSError as error:
            found.append(OSError(error.errno, str(error)))  # without its frames, which hold descriptors

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


KINDS: dict[str, Callable[[Passthrough, Caller], object]] = {
    "directory": lambda fs, who: fs.mkdir(who, 1, b"new", 0o755, 0),
    "file": lambda fs, who: fs.create(who, 1, b"new", os.O_RDWR, stat.S_IFREG | 0o644, 0, 0),
    "fifo": lambda fs, who: fs.mknod(who, 1, b"new", stat.S_IFIFO | 0o644, 0, 0),
    "symlink": lambda fs, who: fs.symlink(who, 1, b"new", b"target"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_set_on_what_is_made(filesystem: Passthrough, tmp_path: Path, kind: str) -> None:
    assert not isinstance(in_thread(lambda: KINDS[kind](filesystem, caller())), OSError)
    assert os.getxattr(tmp_path / "new", LABEL, follow_symlinks=False) == b"a label"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_without_the_label_that_it_should_have(
    filesystem: Passthrough, tmp_path: Path, kind: str
) -> None:
    done = in_thread(lambda: KINDS[kind](filesystem, caller(label=b"nonsense.name")))
    assert isinstance(done, OSError)
    assert done.errno == errno.EOPNOTSUPP
    assert os.listdir(tmp_path) == []


def test_labels_go_by_the_rules_of_xattrmap(tmp_path: Path) -> None:
    made = open_directory(str(tmp_path), Config(security_label=True, xattrmap=":map:security.:user.host.:"))
    made.init(SimpleNamespace(flags=abi.FUSE_SECURITY_CTX, may_block=None))
    try:
        assert not isinstance(in_thread(lambda: KINDS["file"](made, caller())), OSError)
        assert os.getxattr(tmp_path / "new", b"user.host." + LABEL) == b"a label"
    finally:
        made.destroy()


def test_what_is_made_is_the_callers_and_his_group_counts(filesystem: Passthrough, tmp_path: Path) -> None:
    os.chown(tmp_path, 0, 1234)
    tmp_path.chmod(0o2770)  # only the group may write, and what is made gets it
    refused = in_thread(lambda: KINDS["file"](filesystem, caller(1001, 1001, b"")))
    assert isinstance(refused, PermissionError)
    done = in_thread(lambda: KINDS["file"](filesystem, caller(1001, 1001, b"", (1234,))))
    assert not isinstance(done, OSError)
    info = (tmp_path / "new").stat()
    assert (info.st_uid, info.st_gid) == (1001, 1234)
