"""Trees of nodes on real mounts: the lists of behaviours, and changes that another process sees at once.

A first process makes a namespace, mounts and looks; a second one serves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import conformance
from fusewire.testing import BEHAVIOURS, READ_ONLY
from rootless import NOBODY, rootless_home, rootless_python

WRITABLE = "from fusewire.nodes import Dir, NodeFilesystem; operations = NodeFilesystem(Dir(writable=True))"

# What does not apply to nodes. Access control lists and inode flags are not offered: a class that needs them is one of
# level 1 (MemoryFS has both).
LEFT_OUT = ("acl", "inode_flags")

# The first process: argv has the mount point, whether it is mounted read-only, what makes `root`, what looks.
PROGRAM = """
import os, sys
from fusewire.linux import mount_base, syscalls, userns
place, read_only, make, look = sys.argv[1].encode(), sys.argv[2] == "1", sys.argv[3], sys.argv[4]
userns.enter(userns.default_plan())
fd = mount_base.open_device()
flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | (syscalls.MS_RDONLY if read_only else 0)
mount_base.mount_by_string(fd, place, mount_base.Options(flags=flags, default_permissions=True))
orders, order = os.pipe()
answers, answer = os.pipe()
pid = os.fork()
if pid == 0:
    status = 1
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
        os.close(order)
        from fusewire.nodes import as_operations
        from fusewire.serve import Server
        space = {}
        exec(make, space)
        def log(message, error):
            import traceback
            print(message, "".join(traceback.format_exception(error)) if error else "", file=sys.stderr, flush=True)
        server = Server(as_operations(space["root"]), fd, threads=3, log=log)
        server.start()
        assert server.wait_ready(20)
        os.write(answer, b"+")
        while word := os.read(orders, 100):
            exec(word.decode(), space)
            os.write(answer, b"+")
        server.wait()
        status = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
os.close(fd)
os.close(answer)
os.close(orders)

def ask(word):
    "Have the server run a statement."
    os.write(order, word.encode())
    assert os.read(answers, 1) == b"+", word

def read(name):
    with open(os.path.join(place.decode(), name)) as file:
        return file.read()

ready = os.read(answers, 1) == b"+"
try:
    if ready:
        exec(look, {"place": place.decode(), "ask": ask, "read": read, "os": os})
finally:
    syscalls.umount2(place, syscalls.MNT_DETACH)
    os.close(order)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(status if ready else 1)
"""


@pytest.fixture(params=["root", "rootless"])
def looks(request) -> Iterator:
    """Give a function that serves what `make` leaves in `root`, and runs `look` with `place`, `ask` and `read`."""
    uid = 0 if request.param == "root" else NOBODY
    if uid == 0 and os.geteuid() != 0:
        pytest.skip("mounting by the direct way needs root")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("/dev/fuse is missing")
    words = rootless_python(uid) if uid else [sys.executable, "-W", "error"]
    place = tempfile.mkdtemp(prefix="fusewire-nodes-", dir=rootless_home(uid) if uid else "/tmp")
    if uid and os.geteuid() == 0:
        os.chown(place, uid, uid)

    def run(make: str, look: str, *, read_only: bool = False) -> str:
        done = subprocess.run(
            [*words, "-c", PROGRAM, place, str(int(read_only)), make, look],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    try:
        yield run
    finally:
        shutil.rmtree(place)


HELLO = """
from fusewire.nodes import Bytes, Dir

class Hello(Dir):
    def children(self):
        return {b"hello.txt": Bytes(b"hello world\\n")}

root = Hello()
"""
TREE = """
import os, stat
from fusewire.nodes import Bytes, Dir, Special, Symlink

shared = Bytes(b"shared")
root = Dir(
    {b"text": Bytes(b"text"), b"big": Bytes(os.urandom(3_000_000)), b"empty": Bytes(), b"one": shared, b"two": shared},
    link=Symlink("text"),
    fifo=Special(stat.S_IFIFO | 0o600),
    below=Dir(deeper=Dir({b"%d" % number: Bytes(b"%d" % number) for number in range(300)}), nothing=Dir()),
)
"""
CHECKS = """
from fusewire.testing import READ_ONLY
for name, check in READ_ONLY.items():
    try:
        check(place)
    except (AssertionError, OSError) as error:
        print(name, repr(error))
"""


def test_hello_world_is_read(looks):
    look = 'print(os.listdir(place), read("hello.txt"), os.path.exists(f"{place}/other"))'
    assert looks(HELLO, look) == "['hello.txt'] hello world\n False\n"


@pytest.mark.parametrize("read_only", [True, False], ids=["mounted read-only", "mounted writable"])
@pytest.mark.parametrize("make", [HELLO, TREE], ids=["hello", "tree"])
def test_tree_that_is_not_writable_does_what_a_read_only_one_does(looks, make, read_only):
    assert len(READ_ONLY) >= 15
    assert looks(make, CHECKS, read_only=read_only) == ""


def test_hard_links_are_seen(looks):
    look = """
one, two = os.stat(f"{place}/one"), os.stat(f"{place}/two")
print(one.st_ino == two.st_ino, one.st_nlink, os.stat(f"{place}/below").st_nlink)
"""
    assert looks(TREE, look) == "True 2 4\n"


CHANGING = """
from fusewire.nodes import Bytes, Dir, FOREVER

class Computed(Dir):
    timeout = FOREVER
    words = {"a": "first"}

    def children(self):
        return {name: Bytes(word) for name, word in self.words.items()}

root = Dir(file=Bytes("old"), table=Dir(), computed=Computed())
"""


def test_change_is_seen_by_another_process_as_soon_as_it_is_told(looks):
    look = """
def show(name):
    try:
        return read(name)
    except FileNotFoundError:
        return None

held = open(f"{place}/file")
def seen():
    held.seek(0)
    return show("file"), held.read(), os.stat(f"{place}/file").st_size
print(seen())
ask("root['file'].data = 'new and longer'; root['file'].changed(wait=True)")
print(seen())

print(show("table/x"), os.listdir(f"{place}/table"))
ask("root['table']['x'] = Bytes('here'); root['table'].changed('x', wait=True)")
print(show("table/x"), os.listdir(f"{place}/table"))
ask("root['table']['x'] = Bytes('other'); root['table'].changed('x', wait=True)")
print(show("table/x"))
ask("del root['table']['x']; root['table'].changed('x', wait=True)")
print(show("table/x"), os.listdir(f"{place}/table"))

print(show("computed/a"), show("computed/b"), os.listdir(f"{place}/computed"))
ask("Computed.words = {'a': 'second word', 'b': 'new'}")
print(show("computed/a"), show("computed/b"), os.listdir(f"{place}/computed"))
ask("root['computed'].changed(wait=True)")
print(show("computed/a"), show("computed/b"), os.listdir(f"{place}/computed"))
held.close()
"""
    assert looks(CHANGING, look).splitlines() == [
        "('old', 'old', 3)",
        "('new and longer', 'new and longer', 14)",
        "None []",
        "here ['x']",
        "other",
        "None []",
        "first None ['a']",
        "first None ['a']",
        "second word new ['a', 'b']",
    ]


def test_change_that_a_callers_request_makes_is_told_too(looks):
    make = """
import threading
from fusewire.nodes import Bytes, Dir, File

class Control(File):
    def write(self, offset, data):
        # Of a file in the same directory, and of the directory, whose lock the kernel may hold for this very caller.
        root["text"].data = data
        root["made by " + data.decode()] = Bytes()

    def truncate(self, size):
        root.changed()

class Root(Dir):
    def mkdir(self, name, mode):
        self.changed()
        return super().mkdir(name, mode)

root = Root(text=Bytes("old"), control=Control(), writable=True)
"""
    look = """
print(read("text"))
for word in ("one", "two", "three"):
    with open(f"{place}/control", "w") as file:
        file.write(word)
    os.mkdir(f"{place}/{word}")
ask("root.changed(wait=True); root['text'].changed(wait=True)")
print(read("text"), *sorted(os.listdir(place)))
"""
    assert looks(make, look).splitlines() == [
        "old",
        "three control made by one made by three made by two one text three two",
    ]


def test_directory_that_is_in_use_keeps_its_name_when_it_changes(looks):
    look = """
os.chdir(f"{place}/table")
ask("root.changed(wait=True); root['table'].changed(wait=True)")
print(os.path.relpath(os.getcwd(), place), os.listdir("."))
os.chdir("/")
"""
    assert looks(CHANGING, look) == "table []\n"


def test_async_tree_is_served(looks):
    make = """
import asyncio
from fusewire.nodes import Dir, File

class Slow(File):
    async def size(self):
        return 1 << 20

    async def read(self, offset, size):
        await asyncio.sleep(0.01)
        return b"x" * min(size, (1 << 20) - offset)

class Root(Dir):
    async def children(self):
        await asyncio.sleep(0.01)
        return {f"file {number}": Slow() for number in range(20)}

root = Root()
"""
    look = """
print(len(os.listdir(place)), sum(len(read(f"file {n}")) for n in range(20)), os.stat(place).st_nlink)
"""
    assert looks(make, look) == f"20 {20 << 20} 2\n"


# The list of behaviours


@pytest.fixture(scope="module")
def mount_of_root() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(WRITABLE) as mounted:
        yield mounted


@pytest.fixture(scope="module")
def rootless_mount() -> Iterator[conformance.Mounted]:
    with conformance.Mounted(WRITABLE, uid=NOBODY, tmpfs=False) as mounted:
        yield mounted


def test_few_behaviours_are_left_out():
    left = [name for name, behaviour in BEHAVIOURS.items() if behaviour.marks & set(LEFT_OUT)]
    assert len(left) <= 7, json.dumps(left)


@pytest.mark.parametrize("name", conformance.cases(*LEFT_OUT))
def test_writable_tree_of_root_does_what_tmpfs_does(mount_of_root, name):
    mount_of_root.check(name)


@pytest.mark.parametrize("name", conformance.cases(*LEFT_OUT, "root"))
def test_rootless_writable_tree_does_what_a_directory_does(rootless_mount, name):
    rootless_mount.check(name)


# The page


def page() -> dict[str, str]:
    """The files of docs/nodes.md."""
    text = (Path(__file__).parent.parent / "docs" / "nodes.md").read_text()
    return dict(re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


EXAMPLES = {
    "node_hello.py": ("Hello()", 'print(read("hello.txt"))', "hello world\n\n"),
    "node_users.py": ("Users()", 'print("root" in os.listdir(place), read("root/uid"))', "True 0\n\n"),
    "node_notes.py": (
        "Notes({b'first': b'A note.'})",
        'open(f"{place}/new", "w", opener=os.open).close(); print(read("first"), sorted(os.listdir(place)))',
        "A note. ['first', 'new']\n",
    ),
    "node_clock.py": (
        "Clock()",
        """
before = read("now")
while read("now") == before:
    pass
print(len(before), os.listdir(place))
""",
        "9 ['now', 'alarms']\n",
    ),
    "node_slow.py": ("Slowly()", 'print(len(os.listdir(place)), read("file 3"))', "10 slowly\n"),
}


def test_all_examples_of_the_page_are_tried():
    assert sorted(page()) == sorted([*EXAMPLES, "test_node_notes.py"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_of_the_page_works(looks, name):
    root, look, expected = EXAMPLES[name]
    assert looks(f"__name__ = 'example'\n{page()[name]}\nroot = {root}\n", look) == expected


def test_tests_of_the_page_pass(tmp_path):
    for name, text in page().items():
        (tmp_path / name).write_text(text)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-c", "/dev/null"]
    done = subprocess.run([*words, "test_node_notes.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
