"""Decompressors: every provider that is installed gives the bytes back, and none gives more than it was asked for."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from fusewire.formats import compression
from fusewire.formats.compression import CorruptDataError, MissingDecompressorError, available, decompressor
from squashfs_images import COMPRESSORS, noise, packers, text


def installed() -> list[tuple[str, str]]:
    """Every (compressor, provider) that is here, not only the one that would be chosen."""
    return [(name, provider) for name in COMPRESSORS for provider, _ in compression._providers(name)]


def get(name: str, provider: str) -> compression.Decompress:
    return dict(compression._providers(name))[provider]


def pack(name: str, raw: bytes) -> bytes:
    if name not in packers():
        pytest.skip(f"nothing here compresses {name}: pip install 'fusewire[squashfs]'")
    return packers()[name][1](raw)


each = pytest.mark.parametrize(("name", "provider"), installed())


@each
@pytest.mark.parametrize("raw", [b"x", text(8192), text(131072), noise(8192), bytes(131072), noise(99) * 500], ids=len)
def test_what_was_packed_comes_back(name: str, provider: str, raw: bytes) -> None:
    function = get(name, provider)
    stored = pack(name, raw)
    assert function(stored, len(raw)) == raw
    assert function(stored, len(raw) + 1) == raw
    assert function(stored, max(8192, 2 * len(raw))) == raw


@each
def test_a_stream_of_one_byte_too_many_is_refused(name: str, provider: str) -> None:
    function = get(name, provider)
    for raw in (text(8193), noise(131073), bytes(131073)):
        with pytest.raises(CorruptDataError):
            function(pack(name, raw), len(raw) - 1)


@each
def test_a_bomb_is_refused_in_little_memory(name: str, provider: str) -> None:
    get(name, provider)
    pack(name, b"x")
    # In a process of its own: peak memory only ever grows.
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_compression as t\n"
        f"bomb = t.pack({name!r}, bytes(48 << 20)); f = t.get({name!r}, {provider!r})\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "for bound in (8192, 131072, 1 << 20):\n"
        "    try: f(bomb, bound)\n"
        "    except t.CorruptDataError: pass\n"
        "    else: sys.exit('not refused')\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 12 * 1024, "KiB more than before the bomb"


@each
def test_damage_is_reported_and_nothing_else_happens(name: str, provider: str) -> None:
    function = get(name, provider)
    raw = text(20000)
    stored = pack(name, raw)
    for cut in (0, 1, 2, 5, 13, len(stored) // 2, len(stored) - 1):
        try:
            short = function(stored[:cut], 20000)
        except CorruptDataError:
            continue
        assert len(short) < 20000  # lz4 blocks have no end of their own; the reader compares lengths
    for place in range(0, len(stored), 41):
        flipped = stored[:place] + bytes([stored[place] ^ 0x55]) + stored[place + 1 :]
        try:
            assert len(function(flipped, 20000)) <= 20000
        except CorruptDataError:
            pass
    for junk in (b"", b"\0", b"\xff" * 100, noise(3000), bytes(3000)):
        try:
            assert len(function(junk, 8192)) <= 8192
        except CorruptDataError:
            pass


@each
def test_threads_may_share_a_decompressor(name: str, provider: str) -> None:
    function = get(name, provider)
    raws = [text(30000, seed) for seed in range(8)]
    stored = [pack(name, raw) for raw in raws]
    wrong = []

    def worker(start: int) -> None:
        for i in range(40):
            k = (start + i) % len(raws)
            if function(stored[k], 30000) != raws[k]:
                wrong.append(k)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("raw", [text(50000), noise(5000), bytes(100_000), noise(70) * 900, b"a" * 17, b"ab" * 300])
def test_the_length_of_an_lzo_stream_is_counted_without_unpacking_it(raw: bytes) -> None:
    assert compression.lzo_length(pack("lzo", raw), 1 << 30) == len(raw)


def test_counting_an_lzo_stream_stops_at_the_bound_and_at_junk() -> None:
    assert 8192 < compression.lzo_length(pack("lzo", bytes(50 << 20)), 8192) < 60 << 20
    for junk in (b"", b"\x11", b"\xff" * 100, noise(3000), bytes(3000)):
        assert compression.lzo_length(junk, 8192) >= 0


def test_every_compressor_has_a_provider_or_a_hint() -> None:
    found = available()
    assert set(found) == set(COMPRESSORS)
    for name, (provider, hint) in found.items():
        assert hint
        if provider:
            assert decompressor(name)[0] == provider
    assert found["gzip"][0] is not None


def test_a_missing_decompressor_says_how_to_get_it() -> None:
    # A process without the C libraries (ctypes is shut out) and without the packages.
    code = (
        "import sys\n"
        "for name in ('ctypes', 'backports', 'zstandard', 'compression.zstd', 'lz4', 'lzallright', 'isal'):\n"
        "    sys.modules[name] = None\n"
        "from fusewire.formats.compression import *\n"
        "for name in ('zstd', 'lz4', 'lzo'):\n"
        "    try: decompressor(name)\n"
        "    except MissingDecompressorError as exc: print(exc)\n"
        "print(available()['gzip'][0], available()['xz'][0], available()['zstd'][0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(" is installed")[0] for line in lines[:3]] == [
        f"no {name} decompressor" for name in ("zstd", "lz4", "lzo")
    ]
    assert all("pip install 'fusewire[squashfs]'" in line for line in lines[:3])
    assert [line.split("Debian's ")[1] for line in lines[:3]] == ["libzstd1", "liblz4-1", "liblzo2-2"]
    assert lines[3] == "zlib lzma None"
    assert issubclass(MissingDecompressorError, ImportError)


def test_only_what_an_image_needs_is_loaded() -> None:
    code = (
        "import sys; from fusewire.formats import squashfs\n"
        "print([name for name in ('ctypes', 'lzma', 'zlib', 'lz4', 'isal', 'backports', 'asyncio', 'dataclasses')"
        " if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.stdout == "[]\n", done.stderr
