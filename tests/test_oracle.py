"""The tree that Fusewire shows equals the kernel's own squashfs mount of the same image, for every compressor.

Compared of each path: type and mode, times, size, st_blocks, link count, inode number, device number, names, link
targets, contents, and extended attributes. Owners and trusted.* attributes are compared where all ids are mapped and
CAP_SYS_ADMIN is real, on a direct mount as root. In a user namespace an id that is not mapped there is shown as the
kernel's overflow id, and nobody may read trusted.*.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import squashfs_images
from e2e import NOBODY, USER, World, snapshot
from squashfs_images import COMPRESSORS

Tree = dict[bytes, dict[str, object]]
OVERFLOW = 65534
KERNEL = [name for name in COMPRESSORS if name != "lzma"]  # Linux has no lzma for squashfs


@pytest.fixture(scope="session")
def oracle(images: Path, image_of: Callable[[str], Path]) -> Callable[[str], Tree]:
    """What the kernel shows of the image of a compressor, to root."""
    known: dict[str, Tree] = {}

    def look(compressor: str) -> Tree:
        if compressor not in known:
            with squashfs_images.kernel_mount(image_of(compressor), images / "kernel") as place:
                known[compressor] = snapshot(os.fsencode(place))
        return known[compressor]

    return look


def seen_by_run(world: World, image: Path, *options: str, uid: int = USER, **how: object) -> Tree:
    """The tree as a command of `fusewire run` sees it."""
    file = world.home(uid) / "seen"
    inspect = world.tool("snapshot", "/opt/image", file, uid=uid)
    done = world.fw("run", *options, f"{image}:/opt/image", "--", *inspect, uid=uid, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return load(file)


def load(file: Path) -> Tree:
    found: Tree = pickle.loads(file.read_bytes())
    return found


def owners(tree: Tree, uid: Callable[[int], int], gid: Callable[[int], int]) -> Tree:
    """The same tree with other ids."""
    return {path: row | {"uid": uid(row["uid"]), "gid": gid(row["gid"])} for path, row in tree.items()}  # type: ignore[arg-type]


def without_trusted(tree: Tree) -> Tree:
    return {
        path: row | {"xattrs": {k: v for k, v in row["xattrs"].items() if not k.startswith("trusted.")}}  # type: ignore[attr-defined]
        for path, row in tree.items()
    }


def only(known: int) -> Callable[[int], int]:
    return lambda number: number if number == known else OVERFLOW


def same(found: Tree, expected: Tree) -> None:
    """Compare row by row: a difference of thousands of rows says nothing."""
    assert sorted(found) == sorted(expected)
    differences = [(path, found[path], expected[path]) for path in expected if found[path] != expected[path]]
    assert differences[:3] == []


@pytest.mark.parametrize("compressor", KERNEL)
def test_tree_equals_the_kernels_own_mount(
    world: World, image_of: Callable[[str], Path], oracle: Callable[[str], Tree], compressor: str
) -> None:
    expected = without_trusted(owners(oracle(compressor), only(USER), only(USER)))
    assert len(expected) > 3800
    same(seen_by_run(world, image_of(compressor)), expected)


def test_tree_of_an_lzma_image_equals_its_source(world: World, image_of: Callable[[str], Path], tree: Path) -> None:
    expected = without_trusted(owners(snapshot(os.fsencode(tree)), only(USER), only(USER)))
    found = seen_by_run(world, image_of("lzma"))
    # What only a mounted image has, or only the machine's own filesystem.
    for row in (*found.values(), *expected.values()):
        for name in ("ino", "blocks", "ctime_ns", "size") if "names" in row else ("ino", "blocks", "ctime_ns"):
            del row[name]
    for row in expected.values():
        row["mtime_ns"] = row["mtime_ns"] // 1_000_000_000 * 1_000_000_000  # type: ignore[operator]
    same(found, expected)


@pytest.fixture
def privileged(world: World, image_of: Callable[[str], Path]) -> Iterator[Path]:
    with world.mounted(image_of("zstd"), "mnt", uid=0) as found:
        assert found["strategy"] == "direct"
        yield Path(found["target"])


def test_owners_and_trusted_attributes_equal_the_kernels_on_a_mount_of_roots(
    world: World, privileged: Path, oracle: Callable[[str], Tree]
) -> None:
    file = world.home(0) / "seen"
    assert world.do(*world.tool("snapshot", privileged, file, uid=0), uid=0).returncode == 0
    found = load(file)
    assert any(name.startswith("trusted.") for row in found.values() for name in row["xattrs"])  # type: ignore[attr-defined]
    assert len({row["uid"] for row in found.values()}) > 60
    same(found, oracle("zstd"))


def test_mount_in_every_shell_shows_the_same_tree(
    world: World, image_of: Callable[[str], Path], oracle: Callable[[str], Tree]
) -> None:
    file = world.home() / "seen"
    with world.mounted(image_of("gzip"), "mnt") as found:
        assert found["strategy"] == "namespace"
        done = world.do(*world.tool("snapshot", f"{found['target']}/.", file))
        assert done.returncode == 0, done.stderr
    # The ids of a namespace's mount are seen from outside of it here: what is not mapped inside is nobody's.
    same(load(file), without_trusted(owners(oracle("gzip"), only(USER), only(USER))))


def test_squash_owner_makes_every_file_the_callers(
    world: World, image_of: Callable[[str], Path], oracle: Callable[[str], Tree]
) -> None:
    expected = without_trusted(owners(oracle("zstd"), lambda _: USER, lambda _: USER))
    same(seen_by_run(world, image_of("zstd"), "--squash-owner"), expected)


def test_map_root_shows_roots_files_as_roots(
    world: World, image_of: Callable[[str], Path], oracle: Callable[[str], Tree]
) -> None:
    same(seen_by_run(world, image_of("zstd"), "--map-root"), without_trusted(owners(oracle("zstd"), only(0), only(0))))


@pytest.fixture
def with_ranges(world: World) -> dict[str, object]:
    """How to start a user who has subordinate ids: /etc/subuid of a private mount namespace says so."""
    for tool in ("newuidmap", "newgidmap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian package uidmap)")
    script = ""
    for name in ("subuid", "subgid"):
        if not os.path.exists(f"/etc/{name}"):
            pytest.skip(f"/etc/{name} does not exist, so nothing can be bound over it")
        file = world.base / name
        file.write_text("nobody:300000:65536\n")
        script += f"mount --bind {file} /etc/{name} && "
    outer = ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{script}exec "$@"', "sh"]
    return {"uid": NOBODY, "fusermount": True, "outer": outer}


@pytest.mark.parametrize("option", ["--map-ranges", "--map-root-ranges"])
def test_mapped_ranges_show_owners_as_stored(
    world: World,
    image_of: Callable[[str], Path],
    oracle: Callable[[str], Tree],
    with_ranges: dict[str, object],
    option: str,
) -> None:
    # 65,536 subordinate ids and one's own fill 0 to 65536; what the image has beyond is nobody's.
    def shown(number: int) -> int:
        return number if number <= 65_536 else OVERFLOW

    found = seen_by_run(world, image_of("zstd"), option, **with_ranges)
    same(found, without_trusted(owners(oracle("zstd"), shown, shown)))
    assert {row["uid"] for row in found.values()} >= {0, 77}
