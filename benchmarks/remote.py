"""A squashfs image on a web server: the bytes that are fetched against those that are needed, and the time.

Nothing here is compared with a peer, for none mounts such an image. "Needed" are the blocks, as they are stored, that
hold what is read; inodes, names and tables come on top. The server is on loopback and may be told to be far away: then
each answer waits, which shows how many round trips there are.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness import Bench, MissingError, fusewire_command

TITLES = {
    "open": "mount and unmount, nothing read",
    "walk": "walk with stat of everything",
    "one": "one small file",
    "some": "100 small files at random",
    "large": "a large file in order",
    "all": "everything",
}
CASES = tuple(TITLES)
DISTANCES = (0.0, 0.02)  # seconds that each answer waits
_SCRIPTS = {
    "open": "true",
    "walk": "find . -type f -size +100c >/dev/null; ls -lR . >/dev/null",
    "one": 'head -1 "$1" | xargs cat >/dev/null',
    "some": 'xargs cat <"$1" >/dev/null',
    "large": "cat large/0.bin >/dev/null",
    "all": "find . -type f -print0 | xargs -0 cat >/dev/null",
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state: State = self.server.state  # type: ignore[attr-defined]
        first, last = 0, len(state.data) - 1
        asked = self.headers.get("Range", "")
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        body = state.data[first : last + 1] if self.command == "GET" else b""
        with state.lock:
            state.requests += 1
            state.sent += len(body)
        time.sleep(state.distance)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", '"1"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(state.data)}")
        self.end_headers()
        self.wfile.write(body)


class _WebServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # whoever unmounts does not wait for what was read ahead


class State:
    """The web server and what it has sent."""

    def __init__(self, data: bytes) -> None:
        """Listen on loopback and give `data` to whoever asks."""
        self.data = data
        self.distance = 0.0
        self.requests = self.sent = 0
        self.lock = threading.Lock()
        self._server = _WebServer(("127.0.0.1", 0), _Handler)
        self._server.state = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/image.sqsh"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


def _make(bench: Bench, small: int, large: int) -> tuple[Path, dict[str, Path]]:
    """Make the image, and the lists of what is read."""
    top = bench.temporary / "remote"
    tree = top / "tree"
    chance = random.Random(11)
    names = []
    for number in range(small):
        folder = tree / f"folder{number // 50:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"folder{number // 50:03d}/file{number:05d}"
        (tree / name).write_bytes(chance.randbytes(chance.randrange(200, 6_000)).hex().encode())
        names.append(name)
    (tree / "large").mkdir()
    for number in range(large):
        (tree / "large" / f"{number}.bin").write_bytes(chance.randbytes(16 << 20))
    image = top / "image.sqsh"
    subprocess.run(
        ["mksquashfs", str(tree), str(image), "-noappend", "-quiet", "-no-progress", "-comp", "gzip"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    chosen = chance.sample(names, 100)
    lists = {"one": top / "one", "some": top / "some"}
    lists["one"].write_text(f"{chosen[0]}\n")
    lists["some"].write_text("".join(f"{name}\n" for name in chosen))
    return image, lists


def _needed(image: Path, lists: dict[str, Path]) -> dict[str, int]:
    """The stored bytes of the blocks that hold what each case reads."""
    from fusewire.formats.squashfs import Image

    data = image.read_bytes()
    opened = Image(lambda offset, length: data[offset : offset + length], len(data))

    def blocks(name: str) -> dict[Any, int]:
        inode = opened.inode(opened.root)
        for part in name.encode().split(b"/"):
            found = opened.lookup(inode, part)
            assert found is not None
            inode = opened.inode(found[0])
        return {key: key[1] for key, *_ in opened.plan(inode, 0, inode.size) if key is not None}

    def total(names: list[str]) -> int:
        seen: dict[Any, int] = {}
        for name in names:
            seen.update(blocks(name))
        return sum(size & 0xFFFFFF for size in seen.values())

    found = {case: total(path.read_text().split()) for case, path in lists.items()}
    found["large"] = total(["large/0.bin"])
    found["all"] = len(data)
    return found | {"open": 0, "walk": 0}


def run(bench: Bench, rounds: int, servers: set[str], cases: set[str]) -> dict[str, Any]:
    """Measure; `servers` is for the other suites. Raises BenchError."""
    if servers and "fusewire" not in servers:
        return {"cases": {}, "missing": {}}
    done = subprocess.run(["mksquashfs", "-version"], capture_output=True)
    if done.returncode not in (0, 1):
        raise MissingError("mksquashfs (Debian: squashfs-tools) is not installed")
    small, large = (1_000, 2) if bench.quick else (5_000, 6)
    image, lists = _make(bench, small, large)
    needed = _needed(image, lists)
    state = State(image.read_bytes())
    results: dict[str, Any] = {
        "rounds": rounds,
        "image_bytes": len(state.data),
        "files": small + large,
        "cases": {},
        "missing": {},
    }
    place = bench.temporary / "remote" / "mnt"
    try:
        for case in CASES:
            if cases and case not in cases:
                continue
            figures: dict[str, Any] = {"needed": needed[case]}
            for distance in DISTANCES:
                samples = []
                for _ in range(rounds):
                    bench.progress.say(f"remote: {case}, {distance * 1000:.0f} ms away")
                    state.distance, state.requests, state.sent = distance, 0, 0
                    begun = time.perf_counter()
                    words = [*fusewire_command(), "run", f"{state.url}:{place}", "--cwd", str(place), "--"]
                    subprocess.run(
                        [*words, "sh", "-c", _SCRIPTS[case], "sh", str(lists.get(case, os.devnull))],
                        check=True,
                        stdin=subprocess.DEVNULL,
                        timeout=300,
                    )
                    samples.append(time.perf_counter() - begun)
                    figures["requests"], figures["fetched"] = state.requests, state.sent
                figures[f"seconds_{distance * 1000:.0f}ms"] = statistics.median(samples)
            results["cases"][case] = figures
    finally:
        state.close()
    return results
