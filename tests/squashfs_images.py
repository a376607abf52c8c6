"""Makers of squashfs images for tests: source trees, runs of the real tools, a writer for images that no tool makes.

`snapshot` and `image_snapshot` describe a tree in the same terms, so that what the kernel mounts can be compared with
what Fusewire reads. Everything is made below a directory that the caller gives and cleans up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import stat
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fusewire.formats.squashfs import Image, Inode, SquashfsError

COMPRESSORS = ("gzip", "lzo", "lz4", "xz", "zstd", "lzma")
TOOLS = {"mksquashfs": "squashfs-tools", "unsquashfs": "squashfs-tools", "gensquashfs": "squashfs-tools-ng"}
TOOLS |= {"tar2sqfs": "squashfs-tools-ng", "setfattr": "attr"}


def need(tool: str) -> str:
    """The path of a tool, or a skip that says which package has it."""
    found = shutil.which(tool)
    if found is None:
        import pytest

        pytest.skip(f"{tool} is not installed (Debian package {TOOLS[tool]})")
    return found


def need_root() -> None:
    if os.geteuid() != 0:
        import pytest

        pytest.skip("needs root: the oracle is the kernel's own squashfs mount, and the tree has device nodes")


def _why_no_kernel_mount(image: Path) -> str | None:
    """What this machine or container lacks for the kernel's own mount of an image; None if nothing is known to lack."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> 21 & 1:
        return "root has no CAP_SYS_ADMIN here, so it cannot mount (a container needs --privileged)"
    try:
        done = subprocess.run(["losetup", "--find", "--show", "--read-only", image], capture_output=True, text=True)
    except FileNotFoundError:
        return "losetup is not installed (Debian package mount)"
    if done.returncode != 0:
        return f"no loop device for the kernel's own mount (a container needs --privileged): {done.stderr.strip()}"
    run("losetup", "--detach", done.stdout.strip())
    with open("/proc/filesystems") as known:
        if "squashfs" not in known.read().split():
            return "this kernel has no squashfs (module squashfs)"
    return None


def run(*command: str | os.PathLike[str], stdin: bytes | None = None) -> bytes:
    done = subprocess.run([os.fspath(part) for part in command], input=stdin, capture_output=True)
    assert done.returncode == 0, f"{command}: {done.stderr.decode(errors='replace')}"
    return done.stdout


def mksquashfs(source: Path, image: Path, *options: str) -> Path:
    run(need("mksquashfs"), source, image, "-noappend", "-no-progress", "-quiet", "-processors", "2", *options)
    return image


def noise(length: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, the same for the same seed."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(length // 32 + 1))[:length]


def text(length: int, seed: int = 1) -> bytes:
    """Bytes that compress about as well as text does."""
    lines = (b"line %d of %d: %s\n" % (i, seed, noise(12, seed + i).hex().encode()) for i in range(length // 24 + 1))
    return b"".join(lines)[:length]


def make_tree(root: Path, block: int = 131072, *, special: bool | None = None) -> Path:
    """A tree with every kind of inode and every awkward size for images of that block size.

    `special` adds what only root can make: device nodes, foreign owners, trusted.* attributes.
    """
    if special is None:
        special = os.geteuid() == 0
    root.mkdir(parents=True)
    put = root.joinpath
    sizes = {0, 1, 511, 512, 513, block - 1, block, block + 1, 2 * block, 2 * block + 777}
    for size in sorted(sizes):
        put(f"size-{size}").write_bytes(text(size, size))
    put("noise").write_bytes(noise(block + 5000))
    put("twin").write_bytes(put("noise").read_bytes())
    put("zeros").write_bytes(bytes(2 * block))
    with put("holes").open("wb") as f:  # data, a hole, data, a hole at the end
        f.write(noise(100, 5))
        f.seek(3 * block)
        f.write(b"between")
        f.truncate(6 * block + 10)
    with put("all-hole").open("wb") as f:
        f.truncate(3 * block)
    with put("tail-hole").open("wb") as f:
        f.write(text(block, 9))
        f.truncate(block + 4000)
    small = put("small")
    small.mkdir()
    for i in range(60):
        small.joinpath(f"file {i:03}").write_bytes(text(37 * i + 1, i))
    many = put("many")  # a listing of more than one metadata block, runs of more than 256 entries
    many.mkdir()
    for i in range(700):
        many.joinpath(f"a rather long name so that the listing gets an index {i:05}").touch()
    put("empty").mkdir()
    put("deep").mkdir()
    deep = put("deep")
    for i in range(20):
        deep = deep / f"level{i}"
        deep.mkdir()
    deep.joinpath("bottom").write_bytes(b"bottom\n")
    names = put("names")
    names.mkdir()
    for name in (
        b"x" * 255,
        b"\xff\xfe not utf-8",
        "ünïcode".encode(),
        b"new\nline",
        b"a",
        b"..a",
        b"...",
        b".a",
        b" ",
    ):
        Path(os.fsdecode(os.path.join(os.fsencode(names), name))).write_bytes(name)
    put("short-link").symlink_to("small/file 001")
    put("dangling").symlink_to("nowhere")
    put("long-link").symlink_to("/".join(["x" * 250] * 16))
    os.link(put("noise"), put("hard-link"))
    os.link(put("size-1"), small / "hard-link-1")
    os.link(put("short-link"), put("hard-link-of-symlink"), follow_symlinks=False)
    # mksquashfs takes two names for one file if they have the same status; reading the first one would move its atime.
    os.utime(put("short-link"), (time.time() + 3600, 1_500_000_000), follow_symlinks=False)
    os.mkfifo(put("fifo"), 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(root)  # the path of a socket is limited to 107 bytes
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    put("size-512").chmod(0o4755)
    put("size-513").chmod(0o000)
    if not os.access(put("size-513"), os.R_OK):  # an ordinary user's packers and `snapshot` have to read it
        put("size-513").chmod(0o400)
    put("empty").chmod(0o1777)
    if special:
        os.mknod(put("char"), stat.S_IFCHR | 0o620, os.makedev(5, 1))
        os.mknod(put("block"), stat.S_IFBLK | 0o660, os.makedev(259, 1048575))
        os.link(put("char"), put("char-link"))
        os.chown(put("size-1"), 4_000_000_000, 65_536)
        for i in range(60):
            os.chown(small / f"file {i:03}", 100_000 + 7 * i, 200_000 + i)
        os.chown(put("dangling"), 77, 78, follow_symlinks=False)
        _attributes(root)
    times = [p for p in sorted(root.rglob("*")) if not p.is_symlink()]
    for i, path in enumerate(times):
        os.utime(path, (i, 1_000_000_000 + i))
    os.utime(put("size-1"), (0, 3_000_000_000))  # past 2^31
    os.utime(put("size-0"), (0, 0))
    os.utime(root, (0, 1_234_567_890))
    return root


def _attributes(root: Path) -> None:
    put = root.joinpath
    big = noise(3000, 3)
    for i in range(8):  # equal large values are stored once, out of line
        os.setxattr(put(f"small/file {i:03}"), "user.big", big)
        os.setxattr(put(f"small/file {i:03}"), f"user.own{i}", b"%d" % i)
    os.setxattr(put("size-1"), "trusted.secret", b"\0\1\2")
    os.setxattr(put("size-1"), "security.label", b"confined")
    os.setxattr(put("size-1"), "user.empty", b"")
    os.setxattr(put("deep"), "user.directory", b"yes")
    os.setxattr(put("many"), "trusted.directory", b"indexed")
    os.setxattr(put("char"), "trusted.device", b"console")
    os.setxattr(put("fifo"), "trusted.fifo", big)
    os.setxattr(put("socket"), "trusted.socket", big)
    os.setxattr(put("long-link"), "trusted.link", b"symlink", follow_symlinks=False)


Snapshot = dict[bytes, tuple[object, ...]]


def _digest(chunks: Iterator[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _content(path: bytes) -> str:
    with open(path, "rb", buffering=0) as f:
        return _digest(iter(lambda: f.read(1 << 20), b""))


def snapshot(root: Path, *, blocks: bool = True) -> Snapshot:
    """Everything that lstat, readlink, listxattr and reading say of each path below `root`, b"" being itself.

    `blocks` False leaves out what only a squashfs mount has: st_blocks, inode numbers' kinship, directory sizes.
    """
    found: Snapshot = {}
    top = os.fsencode(root)
    stack = [b""]
    while stack:
        relative = stack.pop()
        path = os.path.join(top, relative) if relative else top
        st = os.lstat(path)
        body: object = None
        if stat.S_ISDIR(st.st_mode):
            body = sorted(os.listdir(path))
            stack += [os.path.join(relative, name) for name in body]
        elif stat.S_ISLNK(st.st_mode):
            body = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            body = _content(path)
        try:
            names = sorted(os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False))
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:  # an image without an xattr table
                raise
            names = []
        xattrs = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
        device = st.st_rdev and (os.major(st.st_rdev), os.minor(st.st_rdev))
        found[relative] = (st.st_mode, st.st_uid, st.st_gid, int(st.st_mtime), device, xattrs, body)
        if not stat.S_ISDIR(st.st_mode):
            found[relative] += (st.st_nlink, st.st_size)
        if blocks:
            found[relative] += (st.st_ino, st.st_nlink, st.st_size, st.st_blocks)
    return found


def image_snapshot(image: Image, *, blocks: bool = True, chunk: int = 1 << 20) -> Snapshot:
    """The same of an image, as Fusewire reads it. Looks every name up and lists in both ways on the way."""
    found: Snapshot = {}
    stack = [(b"", image.root_inode)]
    while stack:
        relative, inode = stack.pop()
        body: object = None
        if inode.type == 1:
            body = []
            for entry in list_all(image, inode):
                name, ref = entry[1], entry[2]
                child = image.inode(ref)
                assert image.lookup(inode, name) == (ref, child.type, child.number), name
                assert entry[3:] == (
                    child.type, child.number, child.mode, child.uid, child.gid, child.size, child.blocks, child.mtime,
                    child.nlink, child.rdev,
                ), name  # fmt: skip
                body.append(name)
                stack.append((os.path.join(relative, name), child))
            assert body == sorted(body)
            assert [entry[1] for entry in image.entries(inode)] == body
        elif inode.type == 3:
            body = image.readlink(inode)
        elif inode.type == 2:
            body = _digest(contents(image, inode, chunk))
        xattrs = sorted(image.xattrs(inode))
        assert sorted(image.xattr_names(inode)) == [name for name, _ in xattrs]
        # new_encode_dev: 12 bits of major above the low 8 of 20 bits of minor
        rdev = inode.rdev
        device = rdev and (rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)
        found[relative] = (inode.mode, inode.uid, inode.gid, inode.mtime, device, xattrs, body)
        if inode.type != 1:
            found[relative] += (inode.nlink, inode.size)
        if blocks:
            found[relative] += (inode.number, inode.nlink, inode.size, inode.blocks)
    return found


def list_all(image: Image, directory: Inode, limit: int = 300) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    cookie = 0
    while part := image.attributes(directory, cookie, limit):
        found += part
        cookie = part[-1][0]
    return found


def contents(image: Image, inode: Inode, chunk: int = 1 << 20) -> Iterator[bytes]:
    for offset in range(0, inode.size, chunk):
        part = b"".join(image.read(inode, offset, chunk))
        assert len(part) == min(chunk, inode.size - offset)
        yield part
    assert image.read(inode, inode.size, 1) == []


@contextmanager
def kernel_mount(image: Path, where: Path, offset: int = 0) -> Iterator[Path]:
    """The kernel's own squashfs mount of an image, for the time of the block."""
    need_root()
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "squashfs", "-o", f"loop,ro,offset={offset}", os.fspath(image), os.fspath(where)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode != 0:
        if (missing := _why_no_kernel_mount(image)) is not None:
            import pytest

            pytest.skip(missing)
        raise AssertionError(f"{command}: {done.stderr.decode(errors='replace')}")
    try:
        yield where
    finally:
        run("umount", where)


@contextmanager
def opened(path: Path, **options: int) -> Iterator[Image]:
    """An image file opened by Fusewire's reader."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Image(lambda offset, size: os.pread(fd, size, offset), os.fstat(fd).st_size, **options)
    finally:
        os.close(fd)


def from_bytes(data: bytes, **options: int) -> Image:
    """An image held in memory."""
    return Image(memory(data), len(data), **options)


def memory(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: data[offset : offset + size]


def find(image: Image, path: bytes) -> Inode:
    inode = image.root_inode
    for name in path.split(b"/"):
        found = image.lookup(inode, name)
        assert found is not None, path
        inode = image.inode(found[0])
    return inode


# -- using an image whatever is in it

SMALL_CACHES = {"cache_size": 1 << 20, "metadata_size": 1 << 20}


def exercise(image: Image, depth: int = 6, budget: int = 400) -> int:
    """Use everything that an image offers, a bounded number of times; only SquashfsError is caught. Inodes seen."""
    used = 0
    stack = [(image.root_inode, 0)]
    while stack and used < budget:
        inode, level = stack.pop()
        used += 1
        for use in (image.xattrs, image.xattr_names, lambda i: image.xattr(i, b"user.big"), image.readlink):
            try:
                use(inode)
            except SquashfsError:
                pass
        for offset in (0, inode.size // 2, max(0, inode.size - 100), inode.size):
            try:
                parts = image.read(inode, offset, 200_000)
            except SquashfsError:
                continue
            assert sum(map(len, parts)) == min(200_000, max(0, inode.size - offset))
        try:
            image.find_inode(inode.number)
        except SquashfsError:
            pass
        if inode.type != 1:
            continue
        names: list[bytes] = []
        try:
            for cookie, name, ref, _, _ in image.entries(inode):
                assert 3 < cookie <= inode.size
                assert 0 < len(name) < 256
                assert not {b"/", b"\0"} & {name[i : i + 1] for i in range(len(name))}
                assert name not in (b".", b"..")
                names.append(name)
                if len(names) > budget:
                    break
                try:
                    child = image.inode(ref)
                except SquashfsError:
                    continue
                if level < depth:
                    stack.append((child, level + 1))
        except SquashfsError:
            pass
        for start in (0, 50, inode.size // 2, inode.size - 1, 1 << 40):
            try:
                listed = image.attributes(inode, start, 50)
            except SquashfsError:
                continue
            assert all(0 < len(entry[1]) < 256 for entry in listed)
        for name in [*names[:20], b"missing", b"\0", b""]:
            try:
                image.lookup(inode, name)
            except SquashfsError:
                pass
    image.summary()
    image.statistics()
    return used


def survive(data: bytes) -> int:
    """Open these bytes as an image and use it; how many inodes came of it, 0 when it is refused."""
    try:
        image = from_bytes(data, **SMALL_CACHES)
    except SquashfsError:
        return 0
    return exercise(image)


# -- images that no tool makes

NONE = 0xFFFFFFFF
ABSENT = 0xFFFFFFFFFFFFFFFF


def metadata(raw: bytes, pack: Callable[[bytes], bytes] | None = None) -> bytes:
    """Metadata blocks that hold `raw`, uncompressed or each packed by `pack`."""
    out = b""
    for start in range(0, len(raw), 8192):
        part = raw[start : start + 8192]
        body = pack(part) if pack else part
        out += struct.pack("<H", len(body) | (0 if pack else 0x8000)) + body
    return out


def header(kind: int, number: int, mode: int = 0o755, uid: int = 0, gid: int = 0) -> bytes:
    return struct.pack("<HHHHII", kind, mode, uid, gid, 0, number)


def directory(number: int, size: int, parent: int = 0, start: int = 0, offset: int = 0, mode: int = 0o755) -> bytes:
    return header(1, number, mode) + struct.pack("<IIHHI", start, 2, size + 3, offset, parent)


def regular(number: int, size: int, words: list[int], start: int = 96, fragment: int = NONE, offset: int = 0) -> bytes:
    body = struct.pack("<IIII", start, fragment, offset, size)
    return header(2, number, 0o644) + body + struct.pack(f"<{len(words)}I", *words)


def symlink(number: int, target: bytes, size: int | None = None) -> bytes:
    return header(3, number, 0o777) + struct.pack("<II", 1, len(target) if size is None else size) + target


def listing(entries: list[tuple[bytes, int, int, int]], block: int = 0, base: int = 0) -> bytes:
    """One run of (name, inode offset, type, number)."""
    out = struct.pack("<III", len(entries) - 1, block, base)
    for name, offset, kind, number in entries:
        out += struct.pack("<HhHH", offset, number - base, kind, (len(name) - 1) & 0xFFFF) + name
    return out


def build(
    inodes: bytes,
    directories: bytes,
    *,
    data: bytes = b"",
    root: int = 0,
    fragments: list[tuple[int, int]] | None = None,
    compression: int = 1,
    ids: int = 1,
    block_log: int = 12,
    inode_blocks: bytes | None = None,
    directory_blocks: bytes | None = None,
    xattrs: bytes = b"",
    **fields: int,
) -> bytes:
    """An image of these tables: raw inodes and listings, or ready-made metadata blocks; `fields` of the superblock."""
    out = data
    place = {"inode_table": 96 + len(out)}
    out += metadata(inodes) if inode_blocks is None else inode_blocks
    place["directory_table"] = 96 + len(out)
    out += metadata(directories) if directory_blocks is None else directory_blocks
    place["fragment_table"] = ABSENT
    if fragments:
        block = 96 + len(out)
        out += metadata(b"".join(struct.pack("<QII", start, word, 0) for start, word in fragments))
        place["fragment_table"] = 96 + len(out)
        out += struct.pack("<Q", block)
    block = 96 + len(out)
    out += metadata(struct.pack(f"<{ids}I", *range(1000, 1000 + ids)))
    place["id_table"] = 96 + len(out)
    out += struct.pack("<Q", block)
    place["xattr_table"] = ABSENT
    if xattrs:
        kinds = 96 + len(out)
        pairs = metadata(xattrs)
        ids_at = kinds + len(pairs)
        out += pairs + metadata(struct.pack("<QII", 0, 1, len(xattrs)))
        place["xattr_table"] = 96 + len(out)
        out += struct.pack("<QIIQ", kinds, 1, 0, ids_at)
    values = {
        "magic": 0x73717368, "inodes": 100, "mkfs_time": 0, "block_size": 1 << block_log,
        "fragments": len(fragments or ()), "compression": compression, "block_log": block_log, "flags": 0, "ids": ids,
        "major": 4, "minor": 0, "root": root, "bytes_used": 96 + len(out), "id_table": place["id_table"],
        "xattr_table": place["xattr_table"], "inode_table": place["inode_table"],
        "directory_table": place["directory_table"], "fragment_table": place["fragment_table"], "export_table": ABSENT,
    }  # fmt: skip
    values |= fields
    return struct.pack("<5I6H8Q", *values.values()) + out


def packers() -> dict[str, tuple[int, Callable[[bytes], bytes]]]:
    """Compressors by name, with their number in the superblock, as squashfs wants their output; those installed."""
    import lzma

    def chain(kind: int) -> list[dict[str, int]]:
        return [{"id": kind, "dict_size": 1 << 20}]

    found: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
        "gzip": (1, zlib.compress),
        "lzma": (2, lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE, filters=chain(lzma.FILTER_LZMA1))),
        "xz": (4, lambda raw: lzma.compress(raw, check=lzma.CHECK_CRC32, filters=chain(lzma.FILTER_LZMA2))),
    }
    try:
        import lzallright

        found["lzo"] = (3, lambda raw: lzallright.LZOCompressor().compress(raw))
    except ImportError:
        pass
    try:
        import lz4.block

        found["lz4"] = (5, lambda raw: lz4.block.compress(raw, store_size=False))
    except ImportError:
        pass
    try:
        from backports import zstd

        found["zstd"] = (6, zstd.compress)
    except ImportError:
        pass
    return found
