"""Files on a web server: what is asked for, what is fetched, and what comes of servers that misbehave."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest

from fusewire.fs.remote.blocks import Blocks, RemoteData
from fusewire.fs.remote.crew import Crew
from fusewire.fs.remote.http import HttpFile
from fusewire.fs.remote.retry import Patience
from remote_server import RangeServer, meet

DATA = random.Random(1).randbytes(3_000_000)
QUICK = Patience(attempts=3, timeout=3, total=10, first_pause=0.01)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with RangeServer({"/file": DATA, "/empty": b"", "/a b": b"spaces"}) as server:
        yield server


@pytest.fixture
def opened() -> Iterator[Callable[[str], HttpFile]]:
    """Open files that are closed when the test ends."""
    files: list[HttpFile] = []

    def open_file(url: str) -> HttpFile:
        files.append(HttpFile(url, QUICK))
        return files[-1]

    yield open_file
    for file in files:
        file.close()


@pytest.fixture
def file(server: RangeServer, opened: Callable[[str], HttpFile]) -> HttpFile:
    return opened(server.url + "/file")


def fails(number: int, function, *arguments, **options) -> str:
    with pytest.raises(OSError) as caught:
        function(*arguments, **options)
    assert caught.value.errno == number, caught.value
    return str(caught.value)


# The file


def test_ranges_are_fetched_over_one_connection(server, file):
    connections = set()
    server.fault = lambda handler, number: bool(connections.add(handler.client_address))
    assert file.size == len(DATA)
    for offset, length in ((0, 10), (1_000_000, 70_000), (len(DATA) - 5, 5)):
        assert file.fetch(offset, length) == DATA[offset : offset + length]
    assert len(connections) == 1
    assert server.sent == 65536 + 10 + 70_000 + 5


def test_names_with_blanks_and_empty_files_are_read(server, opened):
    assert opened(server.url + "/a b").size == 6
    assert opened(server.url + "/empty").size == 0


def test_errors_name_the_url_and_the_status(server):
    text = fails(errno.ENOENT, HttpFile, server.url + "/missing", QUICK)
    assert server.url + "/missing" in text
    assert "404" in text
    for status, number in ((403, errno.EACCES), (401, errno.EACCES), (410, errno.ENOENT), (400, errno.EIO)):
        server.fault = lambda handler, _, status=status: handler.plain(status, b"no")
        assert f"{status}" in fails(number, HttpFile, server.url + "/file", QUICK)


def test_password_goes_to_the_server_and_into_no_message(server):
    url = server.url.replace("//", "//me:s%65cret@") + "/missing?signature=hidden"
    text = fails(errno.ENOENT, HttpFile, url, QUICK)
    assert server.headers[-1]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "secret" not in text
    assert "hidden" not in text
    assert server.ranges[-1][0].endswith("?signature=hidden")


def test_what_passes_is_tried_again(server, file):
    server.reset()
    server.fault = lambda handler, number: handler.plain(503, Retry_After="0") if number < 3 else False
    assert file.fetch(5, 10) == DATA[5:15]
    assert server.requests == 3
    server.reset()
    server.fault = lambda handler, number: handler.plain(503)
    assert "503" in fails(errno.EIO, file.fetch, 5, 10)
    assert server.requests == 3


def test_connection_that_ends_is_made_again(server, file):
    server.reset()
    server.fault = lambda handler, number: number < 3 and handler.drop()
    assert file.fetch(5, 10) == DATA[5:15]
    server.reset()
    server.fault = lambda handler, number: number < 3 and handler.answer(cut=4)
    assert file.fetch(5, 10) == DATA[5:15]
    server.fault = lambda handler, number: handler.answer(cut=4)
    fails(errno.EIO, file.fetch, 5, 10)


def test_answer_of_other_bytes_is_never_taken(server, file):
    for said in ("bytes 6-15/3000000", "bytes 5-13/3000000", "bytes 5-14/*", "items 5-14/3000000", "nonsense"):
        server.fault = lambda handler, number, said=said: handler.answer(say=said)
        assert "Content-Range" in fails(errno.EIO, file.fetch, 5, 10)
    server.reset()
    server.fault = lambda handler, number: number < 2 and handler.answer(say="bytes 0-9/3000000")
    assert file.fetch(5, 10) == DATA[5:15]


def test_silence_ends_in_a_timeout(server, file):
    over = threading.Event()
    server.fault = lambda handler, number: over.wait(20) and handler.drop()
    file._patience = Patience(attempts=2, timeout=0.2, total=10, first_pause=0.01)
    file._drop_idle()
    try:
        assert server.url in fails(errno.ETIMEDOUT, file.fetch, 5, 10)
    finally:
        over.set()


def test_nobody_who_listens_is_an_error_that_names_the_host(server):
    url = server.url + "/file"
    with RangeServer({}) as other:
        gone = other.url
    assert gone in fails(errno.EIO, HttpFile, gone + "/file", QUICK)
    assert "no-such-host.invalid" in fails(errno.EHOSTUNREACH, HttpFile, "http://no-such-host.invalid/x", QUICK)
    fails(errno.EINVAL, HttpFile, "http:///nothing", QUICK)
    fails(errno.EINVAL, HttpFile, "ftp://host/file", QUICK)
    fails(errno.EINVAL, HttpFile, url.replace("127.0.0.1", "127.0.0.1:99999:") + "/x", QUICK)


@pytest.mark.parametrize("how", ["etag", "size", "shorter"])
def test_file_that_changes_is_stale_and_never_mixed(server, file, how):
    assert file.fetch(5, 10) == DATA[5:15]
    if how == "etag":
        server.etag = '"2"'
    elif how == "size":
        server.files["/file"] = DATA + b"more"
    else:
        server.files["/file"] = DATA[:100]
    assert server.url in fails(errno.ESTALE, file.fetch, 1000, 10)
    server.etag, server.files["/file"] = '"1"', DATA
    fails(errno.ESTALE, file.fetch, 1000, 10)


def test_small_file_of_a_server_without_ranges_is_kept_in_memory(server, opened):
    server.ranges_given = False
    file = opened(server.url + "/file")
    assert file.fetch(2_000_000, 100) == DATA[2_000_000:2_000_100]
    assert server.requests == 1
    server.files["/file"] = bytes(5 << 20)
    text = fails(errno.EOPNOTSUPP, HttpFile, server.url + "/file", QUICK)
    assert "download it" in text
    assert "5 MiB" in text


def test_redirects_are_followed_and_asked_anew_when_they_run_out(server, opened):
    def fault(handler, number):
        if handler.path == "/link":
            return handler.plain(302, Location=f"/file?signature={number}")
        if handler.path != f"/file?signature={server.valid}":
            return handler.plain(403)
        return False

    server.fault, server.valid = fault, 1
    file = opened(server.url + "/link")
    assert file.fetch(5, 10) == DATA[5:15]
    assert server.requests == 3
    server.valid = 5  # the number of the request that will be redirected next
    assert file.fetch(5, 10) == DATA[5:15]
    server.fault = lambda handler, number: handler.plain(302, Location="/link")
    fails(errno.ELOOP, HttpFile, server.url + "/link", QUICK)


def test_password_is_not_given_to_another_host(server, opened):
    with RangeServer({"/file": DATA}) as other:
        server.fault = lambda handler, number: handler.plain(302, Location=other.url + "/file")
        assert opened(server.url.replace("//", "//me:secret@") + "/link").size == len(DATA)
        assert "Authorization" in server.headers[-1]
        assert "Authorization" not in other.headers[-1]


def test_proxy_of_the_environment_is_asked(server, monkeypatch, opened):
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:word@"))
    server.files["http://example.invalid/file"] = DATA
    file = opened("http://example.invalid/file")
    assert file.fetch(5, 10) == DATA[5:15]
    assert server.headers[-1]["Proxy-Authorization"] == "Basic dXNlcjp3b3Jk"
    assert server.headers[-1]["Host"] == "example.invalid"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert opened(server.url + "/file").size == len(DATA)


def test_idle_connection_that_the_server_has_closed_costs_no_attempt(server, file):
    server.fault = lambda handler, number: setattr(handler, "close_connection", True) or handler.answer()
    assert file.fetch(5, 10) == DATA[5:15]
    server.fault = None
    file._patience = Patience(attempts=1)
    assert file.fetch(50, 10) == DATA[50:60]


def test_forked_child_makes_its_own_connections(server, file):
    file.fetch(0, 10)
    pid = os.fork()
    if not pid:
        os._exit(0 if file.fetch(100, 10) == DATA[100:110] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert file.fetch(5, 10) == DATA[5:15]


# Blocks


class Recorder:
    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []
        self.gate: threading.Barrier | None = None
        self.error: OSError | None = None

    def __call__(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        if self.gate is not None:
            self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return self.data[offset : offset + length]


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(4, "test")
    yield crew
    crew.close()


def test_missing_neighbours_are_one_request():
    source = Recorder()
    data = RemoteData(Blocks(1 << 20, 1 << 16), source, len(DATA))
    assert data.pread(100_000, 10) == DATA[100_000:100_010]
    assert data.pread(0, 262_144) == DATA[:262_144]
    assert sorted(source.asked) == [(0, 65536), (65536, 65536), (131072, 131072)]
    assert data.pread(len(DATA) - 5, 100) == DATA[-5:]
    assert data.pread(len(DATA), 5) == data.pread(-5, 3) == data.pread(1 << 70, 3) == b""


def test_memory_is_bounded_and_the_least_used_goes_first():
    source = Recorder()
    blocks = Blocks(200_000, 1 << 16)
    data = RemoteData(blocks, source, len(DATA))
    for offset in (0, 1 << 20, 0, 2 << 20, 0, 1 << 20, 5 << 16):
        assert data.pread(offset, 10) == DATA[offset : offset + 10]
        assert blocks.held <= 200_000
    assert [offset for offset, _ in source.asked] == [0, 1 << 20, 2 << 20, 5 << 16]
    data.close()
    assert blocks.held == 0


def test_readers_of_one_block_share_one_request():
    source = Recorder()
    data = RemoteData(Blocks(1 << 20), source, len(DATA))
    begun, go = threading.Event(), threading.Event()

    def fetch(offset: int, length: int) -> bytes:
        begun.set()
        assert go.wait(10)
        return source(offset, length)

    data.fetch = fetch
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda: got.append(data.pread(5, 10))) for _ in range(5)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    assert got == [DATA[5:15]] * 5
    assert len(source.asked) == 1


def test_large_reads_are_fetched_side_by_side(crew):
    source = Recorder()
    source.gate = threading.Barrier(4)
    data = RemoteData(Blocks(1 << 22, 1 << 16, crew), source, len(DATA))
    assert data.pread(0, 1 << 20) == DATA[: 1 << 20]
    assert sorted(source.asked) == [(number << 18, 1 << 18) for number in range(4)]


def test_reader_in_order_is_run_ahead_of(crew):
    source = Recorder()
    blocks = Blocks(1 << 22, 1 << 16, crew)
    data = RemoteData(blocks, source, len(DATA))
    for offset in range(0, len(DATA), 1 << 16):
        assert data.pread(offset, 1 << 16) == DATA[offset : offset + (1 << 16)]
    assert sum(length for _, length in source.asked) == len(DATA)
    assert len(source.asked) < 20  # of 46 blocks
    crew.close()


def test_random_reads_are_not_run_ahead_of(crew):
    source = Recorder()
    data = RemoteData(Blocks(1 << 22, 1 << 14, crew), source, len(DATA))
    for number in (5, 100, 50, 20, 77, 3):
        data.pread(number << 14, 100)
    assert len(source.asked) == 6
    assert {length for _, length in source.asked} == {1 << 14}


def test_dense_region_is_fetched_in_larger_pieces():
    source = Recorder()
    data = RemoteData(Blocks(1 << 22, 1 << 16), source, len(DATA))
    data.dense = (1 << 20, 2 << 20)
    data.pread((1 << 20) + 5, 10)
    data.pread(0, 10)
    assert source.asked == [(1 << 20, 5 << 16), (0, 1 << 16)]


def test_failed_fetch_is_an_error_for_all_and_is_tried_again():
    source = Recorder()
    source.error = OSError(errno.EIO, "http://host/file: broken")
    data = RemoteData(Blocks(1 << 22), source, len(DATA))
    assert "broken" in fails(errno.EIO, data.pread, 0, 10)
    source.error = None
    assert data.pread(0, 10) == DATA[:10]
    source.data = DATA[:5]
    fails(errno.EIO, data.pread, 1 << 20, 10)


@pytest.mark.parametrize("seed", range(3))
def test_threads_that_read_anywhere_get_what_is_there(seed, crew):
    source = Recorder()
    blocks = Blocks(500_000, 1 << 14, crew)
    data = RemoteData(blocks, source, len(DATA))
    wrong: list[object] = []

    def work(number: int) -> None:
        choose = random.Random(seed * 10 + number)
        for _ in range(60):
            offset, length = choose.randrange(len(DATA)), choose.randrange(200_000)
            if data.pread(offset, length) != DATA[offset : offset + length]:
                wrong.append((offset, length))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert blocks.held <= 500_000
    for run in list(blocks._flying.values()):  # what was fetched ahead
        with run.done:
            pass
    assert blocks._flying == {}


def test_large_read_over_http_has_several_requests_at_work(server, file, crew):
    data = RemoteData(Blocks(1 << 22, 1 << 16, crew), file.fetch, file.size)
    server.reset()
    server.fault = meet(3)
    assert data.pread(0, 3 << 18) == DATA[: 3 << 18]
    assert server.at_once >= 3
