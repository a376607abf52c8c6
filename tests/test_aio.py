"""Handlers that are `async def`: in process, on real mounts, and inside somebody's event loop (asyncio's, uvloop's)."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

import fusewire
import rootless
from fusewire import aio
from fusewire.ops import Caller, Entry, FileRange, Operations, Pending, attr
from fusewire.serve_share import ShareServer
from fusewire.session import Session
from fusewire.testing import FakeKernel
from fusewire.testing.guest import FakeGuest

PATIENCE = 30.0

FS = '''
import asyncio, ctypes, errno, os, stat, threading  # libffi 3.5 opens itself when ctypes is imported
import fusewire

class Async(fusewire.Operations):
    """`now` is there, `never` takes no end, `broken` cannot be read."""
    def __init__(self):
        self.events = []
        self.loops = set()
    async def init(self, connection):
        await asyncio.sleep(0)
        self.events.append("init")
    async def destroy(self):
        await asyncio.sleep(0)
        self.events.append("destroy")
    def _attr(self, nodeid):
        mode = stat.S_IFDIR | 0o755 if nodeid == 1 else stat.S_IFREG | 0o644
        return fusewire.attr(nodeid, mode, 4, uid=os.getuid(), gid=os.getgid())
    async def lookup(self, caller, parent, name):
        self.loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        if name == b"never":
            self.events.append("wait")
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.events.append("cancelled")
                raise
        return fusewire.Entry({b"now": 2, b"broken": 3}[name], self._attr(2)) if name in (b"now", b"broken") else None
    async def getattr(self, nodeid, flags, fh):
        return self._attr(nodeid), 1
    async def read(self, nodeid, fh, offset, size, *rest):
        await asyncio.sleep(0.001)
        if nodeid == 3:
            raise OSError(errno.ENXIO, "broken")
        return b"now\\n"[offset : offset + size]
'''
space: dict = {}
exec(FS, space)
Async = space["Async"]


def filesystem(**members) -> Operations:
    def method(function):
        if inspect.iscoroutinefunction(function):

            async def call(self, *arguments):
                return await function(*arguments)

            return call
        return lambda self, *arguments: function(*arguments)

    return type("Given", (Operations,), {k: method(v) if callable(v) else v for k, v in members.items()})()


def kernel_of(fs: Operations, **options) -> FakeKernel:
    kernel = FakeKernel(Session(fs, **options))
    kernel.init()
    return kernel


def fails(number: int, function, *arguments) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == number, caught.value


# In process


def test_async_handlers_answer_as_plain_ones_do():
    fs = Async()
    kernel = kernel_of(fs)
    assert kernel.lookup(1, b"now").nodeid == 2
    fails(errno.ENOENT, kernel.lookup, 1, b"missing")
    assert stat.S_ISDIR(kernel.getattr(1)[0][9])
    assert kernel.read(2, 0, 1, 100) == b"ow\n"
    fails(errno.ENXIO, kernel.read, 3, 0, 0, 10)
    kernel.session.close()
    assert fs.events == ["init", "destroy"]


def test_async_handler_that_breaks_is_logged_and_answered_with_eio():
    said = []

    async def attributes(nodeid, flags, fh):
        await asyncio.sleep(0)
        raise ValueError("broken")

    kernel = kernel_of(filesystem(getattr=attributes), log=lambda message, error: said.append((message, str(error))))
    fails(errno.EIO, kernel.getattr, 1)
    fails(errno.EIO, kernel.getattr, 1)
    assert said == [("getattr failed", "broken")]


def test_async_handler_that_is_not_implemented_is_not_offered():
    async def attributes(nodeid, flags, fh):
        raise NotImplementedError

    fails(errno.ENOSYS, kernel_of(filesystem(getattr=attributes)).getattr, 1)


def test_async_operation_without_a_value_succeeds_or_fails():
    gone = []

    async def unlink(caller, parent, name):
        await asyncio.sleep(0)
        if name in gone:
            raise FileNotFoundError
        gone.append(name)

    kernel = kernel_of(filesystem(unlink=unlink))
    kernel.unlink(1, b"name")
    fails(errno.ENOENT, kernel.unlink, 1, b"name")


def test_async_filesystem_that_does_not_start_is_refused():
    async def init(connection):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens")

    session = Session(filesystem(init=init))
    with pytest.raises(OSError):
        FakeKernel(session).init()
    assert "nobody listens" in session.refused


def test_data_to_write_outlive_the_request():
    kept = []

    async def write(nodeid, fh, offset, data, *rest):
        await asyncio.sleep(0.01)
        kept.append(bytes(data))
        return len(data)

    kernel = kernel_of(filesystem(write=write))
    request = bytearray(kernel_request(kernel, b"first"))
    assert kernel.session.handle(memoryview(request)) is None
    request[80:] = b"other"
    assert kernel.write(2, 0, 0, b"second") == 6
    assert kept == [b"first", b"second"]


def kernel_request(kernel: FakeKernel, data: bytes) -> bytes:
    from fusewire.testing import body_of, request
    from fusewire.wire import abi

    return request(abi.FUSE_WRITE, 2, body_of("write", 0, 0, len(data), 0, 0, 0, tail=data), unique=1000)


def test_range_of_a_file_is_read_for_an_async_handler(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:

        async def read(nodeid, fh, offset, size, *rest):
            await asyncio.sleep(0)
            return FileRange(file.fileno(), offset, size)

        assert kernel_of(filesystem(read=read)).read(2, 0, 3, 4) == b"3456"


def test_forget_may_be_async_and_is_logged_once():
    heard = threading.Semaphore(0)
    said = []

    async def forget(nodeid, nlookup):
        heard.release()
        raise ValueError(nodeid)

    kernel = kernel_of(filesystem(forget=forget), log=lambda message, error: said.append(message))
    kernel.forget(5)
    kernel.batch_forget([(6, 1), (7, 2)])
    for _ in range(3):
        assert heard.acquire(timeout=PATIENCE)
    kernel.session.close()  # what is at work ends before that
    assert said == ["forget failed"]


def test_slow_handler_does_not_hold_up_others():
    go: list = []

    async def attributes(nodeid, flags, fh):
        if nodeid == 2:
            event = asyncio.Event()
            go.append((asyncio.get_running_loop(), event))
            await event.wait()
        return attr(nodeid, stat.S_IFDIR | 0o755), 1

    kernel = kernel_of(filesystem(getattr=attributes))
    slow = [kernel.start(3, 2, bytes(16)) for _ in range(50)]
    assert kernel.getattr(1)[0][0] == 1
    assert not any(map(kernel.answered, slow))
    for loop, event in go:
        loop.call_soon_threadsafe(event.set)
    for unique in slow:
        kernel.finish(unique)


def test_interrupt_cancels_the_task():
    fs = Async()
    kernel = kernel_of(fs)
    waiting = kernel.start(1, 1, b"never\0")
    kernel.lookup(1, b"now")  # its task has begun before this one's
    assert kernel.interrupt(waiting)
    fails(errno.EINTR, kernel.finish, waiting)
    assert fs.events == ["init", "wait", "cancelled"]


def test_task_may_answer_an_interrupt_with_what_it_has():
    begun = threading.Event()

    async def read(nodeid, fh, offset, size, *rest):
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return b"so far"

    kernel = kernel_of(filesystem(read=read))
    waiting = kernel.start(15, 2, bytes(16) + (100).to_bytes(4, "little") + bytes(20))
    assert begun.wait(PATIENCE)
    kernel.interrupt(waiting)
    assert kernel.finish(waiting) == b"so far"


def test_end_of_the_mount_cancels_what_is_at_work():
    fs = Async()
    kernel = kernel_of(fs)
    waiting = kernel.start(1, 1, b"never\0")
    kernel.lookup(1, b"now")
    kernel.session.close()
    fails(errno.ECANCELED, kernel.finish, waiting)
    assert fs.events == ["init", "wait", "cancelled", "destroy"]


def test_plain_handler_may_give_a_pending_of_its_own():
    async def later() -> tuple:
        await asyncio.sleep(0)
        return attr(1, stat.S_IFDIR | 0o755), 1

    def attributes(nodeid, flags, fh) -> Pending:
        return aio.pending(later())

    assert kernel_of(filesystem(getattr=attributes)).getattr(1)[0][0] == 1


def test_filesystem_without_async_methods_has_no_runner():
    def lookup(caller: Caller, parent, name) -> Entry | None:
        return None

    session = Session(filesystem(lookup=lookup))
    assert session.runner is None
    assert not session.operations.interruptible
    kernel = FakeKernel(session)
    kernel.init()
    assert not kernel.interrupt(kernel.start(1, 1, b"x\0"))


def test_loop_that_has_ended_answers_all_the_same():
    loop = asyncio.new_event_loop()
    loop.close()
    fs = Async()
    session = Session(fs)
    session.ready = True
    session.runner.loop = loop
    fails(errno.ECANCELED, FakeKernel(session).lookup, 1, b"now")


# On real mounts


@pytest.fixture(params=["root", "rootless"])
def python(request) -> list[str]:
    if request.param == "rootless":
        return rootless.rootless_python()
    if os.geteuid() != 0:
        pytest.skip("needs root")
    rootless.open_fuse_device()
    return [sys.executable, "-W", "error"]


def run(python: list[str], program: str) -> None:
    done = subprocess.run([*python, "-c", FS + program], capture_output=True, text=True, timeout=PATIENCE, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")


USE = '''
import signal, subprocess, sys, time
# A call that a signal interrupts: the kernel tells the server so, and the answer ends the call.
GIVE_UP = """
import os, signal, sys
class Enough(Exception): pass
def enough(*_): raise Enough
signal.signal(signal.SIGALRM, enough)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    os.stat(sys.argv[1])
except Enough:
    print("enough")
"""
def use(path):
    def read(name):
        with open(path + name, "rb") as file:
            return file.read()
    assert read("/now") == b"now\\n"
    waiting = subprocess.Popen([sys.executable, "-c", GIVE_UP, path + "/never"], stdout=subprocess.PIPE)
    for _ in range(20):
        assert read("/now") == b"now\\n"
    assert waiting.communicate()[0] == b"enough\\n"
    try:
        read("/broken")
    except OSError as error:
        assert error.errno == errno.ENXIO
    assert not os.path.exists(path + "/missing")
'''


@pytest.mark.parametrize("in_process", [False, True], ids=["child", "in_process"])
def test_mounted_filesystem_may_be_async(python, in_process):
    run(
        python,
        USE
        + f"""
fs = Async()
with fusewire.mounted(fs, in_process={in_process}) as m:
    use(m.path)
if {in_process}:
    assert fs.events == ["init", "wait", "cancelled", "destroy"], fs.events
    assert len(fs.loops) == 1
""",
    )


@pytest.mark.parametrize("in_process", [False, True], ids=["child", "in_process"])
def test_async_handler_that_would_end_the_program_does_not_end_the_loop_of_the_others(python, in_process):
    run(
        python,
        f"""
class Ending(Async):
    async def read(self, *arguments):
        raise SystemExit("enough")
with fusewire.mounted(Ending(), in_process={in_process}, log=lambda *_: None) as m:
    for _ in range(5):
        try:
            with open(m.path + "/now") as file:
                file.read()
        except OSError as error:
            assert error.errno == errno.EIO, error
        else:
            raise AssertionError("it was read")
""",
    )


def test_task_that_is_cancelled_before_it_begins_is_answered():
    answers = []

    async def never():
        raise AssertionError("it has begun")

    async def main():
        runner = aio.Runner()
        pending = runner.pending(never())
        pending.bind(lambda result, error: answers.append(error))
        await runner.stop(1)

    asyncio.run(main())
    assert [error.errno for error in answers] == [errno.ECANCELED]


def test_each_process_has_a_loop_of_its_own_for_async_handlers(python):
    run(
        python,
        """
with fusewire.mounted(Async(), in_process=True) as here:
    assert os.listdir("/proc/self/task") != [] and os.path.exists(here.path + "/now")
    with fusewire.mounted(Async()) as there:
        assert os.path.exists(there.path + "/now") and not os.path.exists(here.path + "/missing")
""",
    )


LOOP = """
async def main():
    loop = asyncio.get_running_loop()
    fs = Async()
    ready = loop.create_future()
    before = sorted(os.listdir("/proc/self/fd"))
    serving = asyncio.create_task(fusewire.serve_async(fs, ready=ready.set_result))
    path = await ready
    await asyncio.to_thread(use, path)
    assert fs.loops == {loop}
    assert fs.events == ["init", "wait", "cancelled"], fs.events
    stuck = subprocess.Popen([sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", path + "/never"],
                             stderr=subprocess.DEVNULL)
    while fs.events[-1] != "wait":
        await asyncio.sleep(0.001)
    serving.cancel()
    try:
        await serving
    except asyncio.CancelledError:
        pass
    else:
        raise AssertionError("not cancelled")
    assert await asyncio.to_thread(stuck.wait, 10) == 1
    assert fs.events[-2:] == ["cancelled", "destroy"], fs.events
    assert sorted(os.listdir("/proc/self/fd")) == before
"""


def test_serve_async_runs_on_the_loop_of_the_program(python):
    run(python, USE + LOOP + "asyncio.run(main())\n")


def test_serve_async_runs_on_uvloop():
    pytest.importorskip("uvloop", reason="uvloop is not installed")
    if os.geteuid() == 0:
        rootless.open_fuse_device()
    run([sys.executable], USE + LOOP + "import uvloop\nuvloop.run(main())\n")


TRIO = """
import trio, math, signal
class Trio(Async):
    async def init(self, connection):
        await trio.sleep(0)
        self.events.append("init")
    async def destroy(self):
        await trio.sleep(0)
        self.events.append("destroy")
    async def lookup(self, caller, parent, name):
        self.loops.add(trio.lowlevel.current_root_task())
        await trio.sleep(0)
        if name == b"never":
            self.events.append("wait")
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.events.append("cancelled")
                raise
        return fusewire.Entry({b"now": 2, b"broken": 3}[name], self._attr(2)) if name in (b"now", b"broken") else None
    async def read(self, nodeid, fh, offset, size, *rest):
        await trio.sleep(0.001)
        if nodeid == 3:
            raise OSError(errno.ENXIO, "broken")
        return b"now\\n"[offset : offset + size]

class Ready:
    def __init__(self):
        self.event = trio.Event()
    def __call__(self, path):
        self.path = path
        self.event.set()
"""


def run_trio(program: str) -> None:
    pytest.importorskip("trio", reason="trio is not installed")
    if os.geteuid() == 0:
        rootless.open_fuse_device()
    run([sys.executable, "-W", "error"], USE + TRIO + program)


def test_serve_async_runs_in_a_run_of_trio():
    run_trio(
        """
async def main():
    fs, ready = Trio(), Ready()
    await trio.to_thread.run_sync(lambda: None)
    before = sorted(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        async def serve():
            await fusewire.serve_async(fs, ready=ready)
        nursery.start_soon(serve)
        await ready.event.wait()
        await trio.to_thread.run_sync(use, ready.path)
        assert fs.loops == {trio.lowlevel.current_root_task()}
        assert fs.events == ["init", "wait", "cancelled"], fs.events
        stuck = subprocess.Popen([sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", ready.path + "/never"],
                                 stderr=subprocess.DEVNULL)
        while fs.events[-1] != "wait":
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(stuck.wait, 10) == 1
    assert fs.events[-2:] == ["cancelled", "destroy"], fs.events
    assert sorted(os.listdir("/proc/self/fd")) == before
trio.run(main)
"""
    )


def test_tree_of_nodes_may_await_what_trio_has():
    run_trio(
        """
class Released:
    async def release(self):
        await trio.sleep(0)
        events.append("released")
class File(fusewire.File):
    async def open(self, flags):
        return Released()
    async def read(self, offset, size):
        await trio.sleep(0)
        return b"text"[offset:]
class Tree(fusewire.Dir):
    async def init(self, connection):
        await trio.sleep(0)
        events.append("init")
    async def destroy(self):
        await trio.sleep(0)
        events.append("destroy")
    async def children(self):
        await trio.sleep(0)
        return {"file": File()}
def look(path):
    with open(path + "/file") as file:
        assert file.read() == "text"
    return os.open(path + "/file", os.O_RDONLY)
async def main():
    ready = Ready()
    async with trio.open_nursery() as nursery:
        async def serve():
            await fusewire.serve_async(Tree(), ready=ready)
        nursery.start_soon(serve)
        await ready.event.wait()
        descriptor = await trio.to_thread.run_sync(look, ready.path)
        nursery.cancel_scope.cancel()
    assert sorted(events) == ["destroy", "init", "released", "released"], events
    try:
        os.close(descriptor)
    except OSError as error:
        assert error.errno == errno.ENOTCONN
events = []
trio.run(main)
"""
    )


def test_failures_under_trio_are_errors_and_no_groups():
    run_trio(
        """
class Broken(Trio):
    async def init(self, connection):
        raise ValueError("no such source")
async def main():
    before = sorted(os.listdir("/proc/self/fd"))
    try:
        await fusewire.serve_async(Broken(), log=lambda *_: None)
    except OSError as error:
        assert "no such source" in str(error), error
    else:
        raise AssertionError("it started")
    with trio.move_on_after(0) as scope:
        await fusewire.serve_async(Trio())
    assert scope.cancelled_caught
    assert sorted(os.listdir("/proc/self/fd")) == before, (before, sorted(os.listdir("/proc/self/fd")))
async def warm():
    await trio.to_thread.run_sync(int)
    await main()
trio.run(warm)
"""
    )


def test_method_that_ends_the_program_ends_the_run_of_trio():
    run_trio(
        """
class Ending(Trio):
    async def read(self, *arguments):
        raise SystemExit("enough")
async def main():
    ready = Ready()
    async with trio.open_nursery() as nursery:
        async def serve():
            await fusewire.serve_async(Ending(), ready=ready, log=lambda *_: None)
        nursery.start_soon(serve)
        await ready.event.wait()
        def read():
            try:
                with open(ready.path + "/now") as file:
                    file.read()
            except OSError:
                pass
        await trio.to_thread.run_sync(read)
        await trio.sleep_forever()
try:
    trio.run(main)
except BaseExceptionGroup as group:
    assert group.subgroup(SystemExit) and not group.subgroup(Exception)
else:
    raise AssertionError("it has not ended")
"""
    )


def test_serve_async_ends_under_trio_when_it_is_unmounted(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    run_trio(
        f"""
async def main():
    fs, ready = Trio(), Ready()
    place = {str(tmp_path / "mnt")!r}
    async with trio.open_nursery() as nursery:
        async def serve():
            await fusewire.serve_async(fs, place, ready=ready)
        nursery.start_soon(serve)
        await ready.event.wait()
        await trio.run_process(["umount", place])
    assert fs.events == ["init", "destroy"] and not os.path.lexists(place)
trio.run(main)
"""
    )


def test_async_init_of_a_tree_is_waited_for_on_a_loop(python):
    run(
        python,
        """
class Tree(fusewire.Dir):
    started = 0
    async def init(self, connection):
        await asyncio.sleep(0.01)
        self.loop = asyncio.get_running_loop()
        self.started += 1
    async def destroy(self):
        await asyncio.sleep(0)
        self.started += 1
class Broken(Tree):
    async def init(self, connection):
        raise ValueError("no such source")
class Slow(Tree):
    async def lookup(self, name):
        self.asked = asyncio.current_task()
        await asyncio.sleep(3600)
async def main():
    try:
        await fusewire.serve_async(Broken(), log=lambda *_: None)
    except OSError as error:
        assert "no such source" in str(error), error
    else:
        raise AssertionError("it started")
    tree, ready = Slow(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(fusewire.serve_async(tree, ready=ready.set_result))
    path = await ready
    assert tree.started == 1 and tree.loop is asyncio.get_running_loop()
    looking = asyncio.create_task(asyncio.to_thread(os.path.exists, path + "/x"))
    while not hasattr(tree, "asked"):
        await asyncio.sleep(0.001)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert tree.started == 2 and tree.asked.done()
    assert await looking is False
    assert asyncio.all_tasks() == {asyncio.current_task()}
asyncio.run(main())
""",
    )


def test_plain_filesystem_is_served_on_a_loop_too(python):
    run(
        python,
        """
from fusewire.fs.memory import MemoryFS
def use(path):
    with open(path + "/file", "wb") as file:
        file.write(bytes(3_000_000))
    assert os.listdir(path) == ["file"] and os.stat(path + "/file").st_size == 3_000_000
async def main():
    ready = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(fusewire.serve_async(MemoryFS(), ready=ready.set_result))
        await asyncio.to_thread(use, await ready)
        serving.cancel()
asyncio.run(main())
""",
    )


def test_serve_async_ends_when_it_is_unmounted_and_when_it_cannot_start(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    run(
        [sys.executable, "-W", "error"],
        f"""
import subprocess
async def main():
    ready = asyncio.get_running_loop().create_future()
    place = {str(tmp_path / "mnt")!r}
    fs = Async()
    serving = asyncio.create_task(fusewire.serve_async(fs, place, ready=ready.set_result))
    assert await ready == place
    assert await asyncio.to_thread(os.listdir, {str(tmp_path)!r}) == ["mnt"]
    await asyncio.to_thread(subprocess.run, ["umount", place], check=True)
    await serving
    assert fs.events == ["init", "destroy"] and not os.path.lexists(place)

    class Broken(Async):
        async def init(self, connection):
            raise ValueError("no such source")
    try:
        await fusewire.serve_async(Broken(), place, log=lambda *_: None)
    except OSError as error:
        assert "no such source" in str(error), error
    else:
        raise AssertionError("it started")
    assert not os.path.lexists(place)
    assert len(asyncio.all_tasks()) == 1
asyncio.run(main())
""",
    )


def test_serve_async_takes_a_descriptor(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    (tmp_path / "mnt").mkdir()
    run(
        [sys.executable, "-W", "error"],
        f"""
from fusewire.linux.mount import mount
async def main():
    held = mount({str(tmp_path / "mnt").encode()!r}, fusewire.Options(), "direct")
    fs = Async()
    serving = asyncio.create_task(fusewire.serve_async(fs, fd=held.fd))
    def read():
        with open({str(tmp_path / "mnt/now")!r}) as file:
            return file.read()
    assert await asyncio.to_thread(read) == "now\\n"
    await asyncio.to_thread(held.unmount)
    await serving
    assert fs.events == ["init", "destroy"]
asyncio.run(main())
""",
    )


def test_serve_async_without_a_loop_says_what_it_needs():
    coroutine = fusewire.serve_async(Async())
    with pytest.raises(
        RuntimeError, match=r"needs a running event loop, of asyncio .* or trio: call it in a coroutine"
    ):
        coroutine.send(None)


EVERYTHING = """
import subprocess, sys
from fusewire.fs.memory import MemoryFS

class AsyncMemory(MemoryFS):
    pass

def make_async(name):
    plain = getattr(MemoryFS, name)
    async def method(self, *arguments):
        await asyncio.sleep(0)
        return plain(self, *arguments)
    setattr(AsyncMemory, name, method)

for name, base in vars(fusewire.Operations).items():
    if not name.startswith("_") and callable(base) and getattr(MemoryFS, name) is not base:
        if name not in ("init", "destroy", "renumber", "idle"):
            make_async(name)

async def main(place, host):
    ready = asyncio.get_running_loop().create_future()
    options = fusewire.Options(allow_other=True, default_permissions=True)
    serving = asyncio.create_task(fusewire.serve_async(AsyncMemory(), place, ready=ready.set_result, options=options))
    path = await ready
    await asyncio.to_thread(os.mkdir, path + "/directory")
    words = [sys.executable, "-m", "fusewire.testing", path + "/directory", host]
    done = await asyncio.to_thread(subprocess.run, words, stdout=subprocess.PIPE, text=True)
    serving.cancel()
    await asyncio.wait([serving])
    assert done.returncode == 0, done.stdout
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_behaviours_hold_when_every_method_is_async_on_a_loop():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with tempfile.TemporaryDirectory(prefix="fusewire-aio-", dir="/tmp") as work:
        os.chmod(work, 0o755)
        host = os.path.join(work, "host")
        os.mkdir(host, 0o755)
        words = [sys.executable, "-c", FS + EVERYTHING, os.path.join(work, "mnt"), host]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr


def test_guest_is_served_by_async_handlers(tmp_path):
    fs = Async()
    path = str(tmp_path / "fs.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        server = ShareServer(lambda: fs, listening, queues=1)
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            with FakeGuest.connect(path) as guest:
                guest.init()
                assert guest.read_file(b"now") == b"now\n"
                waiting = guest.start(1, 1, b"never\0")
                assert guest.read_file(b"now") == b"now\n"
                guest.interrupt(waiting)
                fails(errno.EINTR, guest.finish, waiting)
        finally:
            server.stop()
            thread.join()
    assert fs.events == ["init", "wait", "cancelled", "destroy"]


# The plugin for pytest

TESTS = """
import os
from hello import Async

def test_a_mount(mounted_filesystem):
    path = mounted_filesystem(Async())
    with open(path + "/now") as file:
        assert file.read() == "now\\n"
    open(os.environ["SEEN"], "w").write(path)

def test_the_mount_of_another_test_is_gone():
    assert not os.path.exists(open(os.environ["SEEN"]).read() + "/now")

def test_a_kernel(fake_kernel):
    fs = Async()
    kernel = fake_kernel(fs)
    assert kernel.read_file(b"now") == b"now\\n"
"""


def test_plugin_mounts_for_tests(tmp_path):
    if os.geteuid() == 0:
        rootless.open_fuse_device()
    (tmp_path / "hello.py").write_text(FS)
    (tmp_path / "test_hello.py").write_text(TESTS)
    plugin = [] if _plugin_is_installed() else ["-p", "fusewire.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, "."],
        cwd=tmp_path,
        env={**os.environ, "SEEN": str(tmp_path / "seen"), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def _plugin_is_installed() -> bool:
    from importlib.metadata import entry_points

    return any(point.value == "fusewire.testing.plugin" for point in entry_points(group="pytest11"))
