"""Invariant: whatever bytes pose as a squashfs image, using it gives values or SquashfsError, in bounded time, memory.

    python fuzz/fuzz_squashfs.py [-max_total_time=SECONDS] [CORPUS_DIRECTORY]

Needs atheris, and mksquashfs for the first corpus, which is made anew in a temporary directory at each run: one tiny
image for each compressor, and images without compression, where the fuzzer reaches every field. The options are those
of libFuzzer. What it finds stays in that directory, whose name it then prints.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "src")]

with atheris.instrument_imports(include=["fusewire.formats"]):
    from fusewire.formats import containers, squashfs

from squashfs_images import COMPRESSORS, mksquashfs, survive, text  # noqa: E402


def tiny_tree(root: Path) -> Path:
    root.mkdir()
    root.joinpath("file").write_bytes(text(5000))
    root.joinpath("holes").write_bytes(bytes(9000) + b"end")
    root.joinpath("link").symlink_to("file")
    os.mkfifo(root / "fifo")
    os.link(root / "file", root / "second")
    try:
        os.setxattr(root / "file", "user.name", b"value")
    except OSError:
        pass  # the temporary directory's filesystem has none
    for i in range(20):
        root.joinpath("directory").mkdir(exist_ok=True)
        root.joinpath(f"directory/name{i}").write_bytes(text(10 * i))
    many = root / "many"
    many.mkdir()
    for i in range(150):
        many.joinpath(f"a name that fills more than one metadata block {i:06}").touch()
    return root


def make_corpus(base: Path) -> None:
    tree = tiny_tree(base / "tree")
    corpus = base / "corpus"
    corpus.mkdir()
    for compressor in COMPRESSORS:
        mksquashfs(tree, corpus / compressor, "-comp", compressor, "-b", "4K", "-nopad")
    mksquashfs(tree, corpus / "plain", "-noI", "-noD", "-noF", "-noX", "-b", "4K", "-nopad")
    mksquashfs(tree, corpus / "whole", "-noI", "-noD", "-no-fragments", "-no-exports", "-b", "4K", "-nopad")


def one_input(data: bytes) -> None:
    survive(data)
    try:
        containers.find_image(lambda offset, size: data[offset : offset + size], len(data))
    except squashfs.SquashfsError:
        pass


def main() -> int:
    base = Path(tempfile.mkdtemp(prefix="fuzz-squashfs-"))
    make_corpus(base)
    child = os.fork()  # libFuzzer ends its process without returning, and somebody has to clean up
    if not child:
        limits = ["-max_len=65536", "-timeout=20", "-rss_limit_mb=1024", f"-artifact_prefix={base}/"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(base / "corpus")], one_input)
        atheris.Fuzz()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print(f"found something: see {base}", file=sys.stderr)
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
