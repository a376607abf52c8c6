"""Real programs on a served directory, as root on a direct mount and as a user without any privilege.

Each program runs in the mount and is asked afterwards, by its own means, whether everything is as it should be; where
it says nothing, what it has made is compared with the same on the host.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import squashfs_images
from e2e import PATH, PATIENCE, USER, World, snapshot

GIT = """
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org
export GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_COUNT=2
export GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*' GIT_CONFIG_KEY_1=gc.auto GIT_CONFIG_VALUE_1=0
"""


def need(program: str, package: str = "") -> None:
    if shutil.which(program, path=PATH) is None:
        pytest.skip(f"{program} is missing (Debian package {package or program})")


class Place:
    """A host directory, and a way to run programs where it is served. `source` is what is served, `at` where."""

    def __init__(self, world: World, uid: int) -> None:
        self.world = world
        self.uid = uid
        self.source = world.home(uid) / "source"
        self.at = world.home(uid) / "served"
        for path in (self.source, self.at):
            path.mkdir()
            os.chown(path, uid, uid)

    def words(self, command: list[str]) -> tuple[str, list[str]]:
        raise NotImplementedError

    def run(self, *command: str) -> str:
        """Run a program in the served directory to its successful end; what it has printed."""
        kind, words = self.words([*command])
        done = self.world.start(kind, *words, uid=self.uid, cwd=self.at, popen={"stdin": -3})
        out, err = done.popen.communicate(timeout=3 * PATIENCE)
        assert done.popen.returncode == 0, (
            f"{command[:2]} ended with {done.popen.returncode}:\n{out[-2000:]}{err[-3000:]}"
        )
        return str(out)

    def sh(self, script: str) -> str:
        """The same for a shell script, which ends at the first command that fails."""
        return self.run("sh", "-euc", script)

    def python(self, code: str, *arguments: str) -> str:
        """The same for a Python program."""
        return self.run(*self.world.words(self.uid)[1], "-c", code, *arguments)


class Direct(Place):
    """Root, and mount(2)."""

    def words(self, command: list[str]) -> tuple[str, list[str]]:
        return "program", command


class Rootless(Place):
    """`fusewire run` by a user without any privilege: each program gets a mount of its own."""

    options = ""

    def words(self, command: list[str]) -> tuple[str, list[str]]:
        return "fusewire", [
            *("run", "-o", self.options, "--cwd", str(self.at), f"{self.source}:{self.at}", "--"),
            *command,
        ]


@contextlib.contextmanager
def served(world: World, kind: str, options: str = "") -> Iterator[Place]:
    if kind == "rootless":
        rootless = Rootless(world, USER)
        rootless.options = options
        yield rootless
        return
    place = Direct(world, 0)
    with world.mounted(place.source, place.at, "-o", options, "--strategy", "direct", uid=0):
        yield place


@pytest.fixture(params=["root", "rootless"])
def place(world: World, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A directory, served with the options that are the default."""
    with served(world, request.param) as found:
        yield found


@pytest.fixture(params=["auto", "none", "always,writeback", "auto,passthrough=off"])
def cached(world: World, request: pytest.FixtureRequest) -> Iterator[Place]:
    """A directory, served to root in one of the cache modes."""
    with served(world, "root", f"cache={request.param}") as found:
        yield found


# --- data


FIO = """
fio --output-format=terse --minimal --eta=never --thread --group_reporting --verify=crc32c --verify_fatal=1 \
    --verify_state_save=0 --do_verify=1 --size=4m --end_fsync=1 "$@" >../fio || { cat ../fio >&2; exit 1; }
"""


def test_fio_finds_what_it_has_written(cached: Place) -> None:
    need("fio")
    jobs = [
        "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1",
        "--rw=randwrite --bs=4k --ioengine=psync --numjobs=2",
        "--rw=write --bs=128k --ioengine=psync",
        "--rw=write --bs=64k --ioengine=libaio --iodepth=8",
        "--rw=randrw --bs=512-16k --bs_unaligned --ioengine=psync",
        "--rw=randwrite --bs=4k --ioengine=mmap",
        "--rw=randwrite --bs=8k --ioengine=pvsync --numjobs=3 --fdatasync=64 --size=1m",
    ]
    cached.sh("".join(f"set -- --name=job{number} {job}\n{FIO}" for number, job in enumerate(jobs)))


def test_fio_finds_what_it_has_written_without_root(world: World) -> None:
    need("fio")
    with served(world, "rootless") as place:
        place.sh(
            f"set -- --name=one --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1\n{FIO}"
            f"set -- --name=two --rw=write --bs=128k --ioengine=psync\n{FIO}"
            f"set -- --name=three --rw=randwrite --bs=4k --ioengine=mmap\n{FIO}"
        )


WRITERS = """
import os, sqlite3, sys

def connect(path):
    found = sqlite3.connect(path, timeout=60, isolation_level=None)
    assert found.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
    found.execute("pragma synchronous=normal")
    return found

def insert(path, who):
    base = connect(path)
    for number in range(rows):
        base.execute("begin immediate")
        base.execute("insert into t values (?, ?, ?)", (who, number, bytes([who]) * (number * 37 % 5000)))
        if number % 50 == 49:
            base.execute("update t set data = zeroblob(length(data)) where who = ? and number < ?", (who, number // 2))
        base.execute("commit")
    base.close()

mode, rows, *paths = sys.argv[1:]
rows = int(rows)
base = connect(paths[0])
base.execute("create table t (who int, number int, data blob, primary key (who, number))")
base.close()
children = []
for who, path in enumerate(paths):
    pid = os.fork()
    if pid == 0:
        insert(path, who)
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
base = connect(paths[0])
assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
assert base.execute("select who, count(*) from t group by who").fetchall() == [(0, rows), (1, rows)]
filled = "replace(hex(zeroblob(length(data))), '00', printf('%02X', who))"
wrong = f"select count(*) from t where data != zeroblob(length(data)) and hex(data) != {filled}"
assert base.execute(wrong).fetchone() == (0,)
"""


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_two_sqlite_writers_share_a_database(cached: Place, mode: str) -> None:
    cached.python(WRITERS, mode, "150", "base.db", "base.db")


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_two_sqlite_writers_share_a_database_without_root(world: World, mode: str) -> None:
    with served(world, "rootless") as place:
        place.python(WRITERS, mode, "100", "base.db", "base.db")


@pytest.mark.parametrize("kind", ["root", "rootless"])
def test_sqlite_shares_a_database_with_a_process_of_the_host(world: World, kind: str) -> None:
    # By record locks that both see; nothing of the file may be kept over a lock (cache=none).
    with served(world, kind, "cache=none") as place:
        place.python(WRITERS, "delete", "60", f"{place.at}/base.db", f"{place.source}/base.db")


# --- trees


def test_git_clones_checks_and_packs(place: Place) -> None:
    need("git")
    origin = place.world.home(place.uid) / "origin"
    for number in range(2000):
        path = origin / f"d{number % 40}" / f"e{number % 7}" / f"file {number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d\n" % number * (number % 90 + 1))
    (origin / "link").symlink_to("d1/e1")
    (origin / "run").write_text("#!/bin/sh\n")
    (origin / "run").chmod(0o755)
    made = place.world.sh(
        f"set -e;{GIT} cd {origin}; git init -q -b main; git add .; git commit -qm first; git gc -q\n"
        f"chown -R {place.uid} .",
        uid=0,
    )
    assert made.returncode == 0, made.stderr
    script = f"""{GIT}
    git clone -q --no-hardlinks {origin} clone
    cd clone
    test -z "$(git status --porcelain)"
    git fsck --full --strict
    test "$(git ls-files | wc -l)" = 2002
    git switch -qc side
    git rm -qr d3 d4
    for n in 1 2 3 4 5; do echo changed >> "d$n$n/e1/new"; done 2>/dev/null || mkdir -p d11/e1
    git mv d5 moved
    git add -A
    git commit -qm second
    git switch -q main
    test -z "$(git status --porcelain)"
    test -e d5/e5/'file 5' && test ! -e moved
    git merge -q --no-ff -m merged side
    git gc -q --prune=now
    git fsck --full --strict
    test -z "$(git status --porcelain)"
    git diff --quiet HEAD
    """
    place.sh(script)


@pytest.fixture
def tree(place: Place) -> Path:
    """A tree with everything, on the host."""
    root = squashfs_images.make_tree(place.world.home(place.uid) / "tree", special=place.uid == 0)
    for path in sorted((root / "many").iterdir())[100:]:
        path.unlink()
    os.utime(root / "many", (0, 1_234_567_890))
    if place.uid:
        os.setxattr(root / "noise", "user.note", b"something")
        os.setxattr(root / "deep", "user.binary", bytes(range(256)))
        (root / "size-513").chmod(0o400)
        for path in [root, *root.rglob("*")]:
            mode = path.lstat().st_mode
            os.chown(path, place.uid, place.uid, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(mode & 0o7777)
    return root


# What a copy cannot have from its original.
OWN = ("ino", "ctime_ns", "blocks")


def same_trees(first: Path, second: Path, *, times_of_symlinks: bool = True) -> None:
    """Compare two trees of the host in all that can be seen of them."""
    found, other = snapshot(os.fsencode(first)), snapshot(os.fsencode(second))
    assert sorted(found) == sorted(other)
    for name, row in found.items():
        for what, value in row.items():
            if what in OWN or ("names" in row and what in ("size", "nlink")):
                continue
            if what == "mtime_ns" and "target" in row and not times_of_symlinks:
                continue
            assert other[name][what] == value, (name, what)
    first_links, second_links = hard_links(found), hard_links(other)
    assert first_links == second_links


def hard_links(tree: dict[bytes, dict[str, object]]) -> list[list[bytes]]:
    """The names that each inode has, of those with several."""
    groups: dict[object, list[bytes]] = {}
    for name in sorted(tree):
        groups.setdefault(tree[name]["ino"], []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def test_tar_takes_a_tree_there_and_back(place: Place, tree: Path) -> None:
    need("tar")
    (tree / "socket").unlink()  # tar(1) leaves sockets out, and devices have one name each
    (tree / "char-link").unlink(missing_ok=True)
    os.utime(tree, (0, 1_234_567_890))
    flags = "--xattrs --xattrs-include='*' --numeric-owner --sparse --sort=name --warning=no-file-ignored"
    owner = "--same-owner" if place.uid == 0 else ""
    place.sh(
        f"tar -C {tree} {flags} -cf ../first.tar .\n"
        f"mkdir there\n"
        f"tar -C there {flags} {owner} -xpf ../first.tar\n"
        f"tar -C there {flags} --compare -f ../first.tar\n"
        f"tar -C there {flags} -cf second.tar .\n"
        f"tar -C {tree} {flags} --compare -f second.tar\n"
        f"mkdir ../back && tar -C ../back {flags} {owner} -xpf second.tar\n"
    )
    same_trees(tree, place.source / "there")
    same_trees(tree, place.source.parent / "back")
    assert (place.source / "there" / "all-hole").stat().st_blocks == 0


def test_rsync_finds_no_difference_in_what_it_has_copied(place: Place, tree: Path) -> None:
    need("rsync")
    devices = "-D" if place.uid == 0 else "--specials"
    place.sh(
        f"rsync -rlptgoHX -S {devices} --numeric-ids {tree}/ there\n"
        f"rsync -rlptgoHX {devices} --numeric-ids --checksum --delete -i {tree}/ there > ../differences\n"
        f"rsync -rlptgoHX -S {devices} --numeric-ids there/ again\n"
        f"test ! -s ../differences || {{ cat ../differences >&2; exit 1; }}\n"
    )
    # The time of a symlink with several names is not its business.
    same_trees(tree, place.source / "there", times_of_symlinks=False)
    same_trees(tree, place.source / "again", times_of_symlinks=False)


def test_cp_copies_a_tree_with_all_that_belongs_to_it(place: Place, tree: Path) -> None:
    place.sh(
        f"cp -a --reflink=auto {tree} there\ncp -a --reflink=auto --sparse=auto there again\nrm -rf there\nsync -f ."
    )
    same_trees(tree, place.source / "again")
    assert sorted(os.listdir(place.source)) == ["again"]


def test_access_lists_travel_with_a_tree(world: World) -> None:
    need("setfacl", "acl")
    need("rsync")
    with served(world, "root", "posix_acl,allow_other") as place:
        script = f"""
        mkdir ../tree ../tree/d; echo x > ../tree/f
        setfacl -m u:{USER}:rw,g:7777:r ../tree/f
        setfacl -m u:{USER}:rwx,d:u:7778:rx,d:g:7777:rwx,d:o::- ../tree/d
        tar -C ../tree --acls --xattrs -cf - . | (mkdir tar; tar -C tar --acls --xattrs -xpf -)
        cp -a ../tree cp
        rsync -aHAX ../tree/ rsync
        for how in tar cp rsync; do
            (cd ../tree && getfacl -nR .) > ../wanted
            (cd $how && getfacl -nR .) > ../got
            cmp ../wanted ../got
            (cd ../source/$how && getfacl -nR .) > ../got
            cmp ../wanted ../got
        done
        """
        place.sh(script)


# --- builds


def test_make_builds_a_project_and_sees_what_is_up_to_date(place: Place) -> None:
    need("make")
    need("gcc")
    project = place.source / "project"
    project.mkdir()
    for number in range(40):
        (project / f"part{number}.c").write_text(
            f'#include "all.h"\nint part{number}(int x) {{ return x * {number}; }}\n'
        )
    (project / "all.h").write_text("".join(f"int part{number}(int);\n" for number in range(40)))
    calls = " + ".join(f"part{number}(2)" for number in range(40))
    (project / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (project / "Makefile").write_text(
        "PARTS = $(patsubst %.c,%.o,$(wildcard *.c))\n"
        "program: libparts.a main.o\n\tgcc -o $@ main.o -L. -lparts\n"
        "libparts.a: $(filter-out main.o,$(PARTS))\n\tar crs $@ $^\n"
        "%.o: %.c all.h\n\tgcc -O0 -g -c -o $@ $<\n"
    )
    for path in [project, *project.iterdir()]:
        os.chown(path, place.uid, place.uid)
    out = place.sh(
        "cd project\nmake -j2 >/dev/null\n./program\nmake -q\ntouch part7.c\n! make -q\n"
        "make -j2 | grep -c 'gcc -O0'\nmake -q\nstrip program\n./program\n"
    )
    assert out.split() == ["1560", "1", "1560"]


FIND_PIP = """
import ensurepip, glob, os, venv
places = os.path.join(os.path.dirname(ensurepip.__file__), "_bundled"), "/usr/share/python-wheels"
print(*(path for place in places for path in glob.glob(f"{place}/pip-*.whl")))
"""


def test_pip_installs_into_an_environment_in_the_mount(place: Place) -> None:
    # The pip that ensurepip would install runs from its wheel as it is: that saves unpacking it.
    python = "/usr/bin/python3"
    found = place.world.do(python, "-c", FIND_PIP, uid=0).stdout.split()
    if not found:
        pytest.skip("venv or ensurepip are missing (Debian package python3-venv)")
    pip = f"env/bin/python {found[0]}/pip"
    wheel = place.world.home(place.uid) / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        names = []
        for number in range(300):
            names.append(f"sample/module{number}.py")
            archive.writestr(names[-1], f"VALUE = {number}\n")
        archive.writestr("sample/__init__.py", "def main():\n    print('it runs')\n")
        info = "sample-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nsample = sample:main\n")
        names += ["sample/__init__.py", *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt"))]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*names, f"{info}/RECORD"]))
    out = place.sh(
        f"export PIP_NO_INDEX=1 PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1\n"
        f"{python} -m venv --without-pip env\n"
        f"{pip} install -q --no-warn-script-location {wheel} 2>../warnings || {{ cat ../warnings >&2; exit 1; }}\n"
        "env/bin/sample\n"
        "env/bin/python -c 'import sample.module299 as m; print(m.VALUE, m.__file__)'\n"
        f"{pip} uninstall -q -y sample 2>/dev/null\n"
        "find env -name 'sample*'\n"
    )
    assert out.splitlines() == ["it runs", f"299 {site(place)}/sample/module299.py"]


def site(place: Place) -> str:
    """Where the environment has its modules, as a path in the mount."""
    found = next((place.source / "env" / "lib").glob("python3*")).name
    return f"{place.at}/env/lib/{found}/site-packages"


PYTHON_TESTS = [
    *("test.test_shutil", "test.test_fileio", "test.test_mmap", "test.test_tempfile"),
    *("test.test_os.FileTests", "test.test_os.StatAttributeTests"),
    *("test.test_os.UtimeTests", "test.test_os.WalkTests", "test.test_os.FwalkTests", "test.test_os.MakedirTests"),
    *("test.test_os.RemoveDirsTests", "test.test_os.ExtendedAttributeTests", "test.test_os.TestScandir"),
    *("test.test_os.LinkTests", "test.test_os.TestSendfile"),
]


def test_pythons_own_tests_of_files_pass(place: Place) -> None:
    candidates = ["/usr/bin/python3"] + ([sys.executable] if find_spec("test.test_shutil") and not place.uid else [])
    for python in candidates:
        if place.world.sh(f"{python} -c 'import test.test_shutil'", uid=place.uid).returncode == 0:
            break
    else:
        pytest.skip("Python's own tests are missing (Debian package libpython3.11-testsuite)")
    names = PYTHON_TESTS if place.uid == 0 else PYTHON_TESTS[:3]
    place.sh(
        "export TMPDIR=$PWD/tmp; mkdir tmp; cd tmp\n"
        f"{python} -m unittest -q {' '.join(names)} >../out 2>&1 || {{ cat ../out >&2; exit 1; }}\n"
    )


# --- watching and finding


def test_find_newer_and_links_see_what_happened_last(place: Place) -> None:
    out = place.sh(
        "touch -d '2020-01-01' old mark; touch -d '2020-01-02' new; mkdir d; touch -d '2030-01-01' d/later\n"
        "find . -newer mark -type f | sort\n"
        "ln new second; find . -samefile new | sort; find . -links 2 -type f | sort\n"
        "mv d e; find e -name later -newermt 2029-01-01\n"
    )
    assert out.split() == ["./d/later", "./new", "./new", "./second", "./new", "./second", "e/later"]


INOTIFY = """
import os, select
from fusewire.linux import files

watch = files.inotify_init()
files.inotify_add_watch(watch, b".", 0xFFF)
seen = []

def wait_for(*wanted):
    wanted = set(wanted)
    while wanted:
        assert select.select([watch], [], [], 10)[0], (wanted, seen)
        for _, mask, _, name in files.parse_inotify(os.read(watch, 65536)):
            for bit, what in ((0x100, "create"), (2, "modify"), (4, "attrib"), (8, "close"), (0x40, "from"),
                              (0x80, "to"), (0x200, "delete"), (0x20, "open")):
                if mask & bit:
                    seen.append((what, name.decode()))
                    wanted.discard((what, name.decode()))

with open("file", "w") as file:
    wait_for(("create", "file"), ("open", "file"))
    file.write("x")
wait_for(("modify", "file"), ("close", "file"))
os.chmod("file", 0o600)
wait_for(("attrib", "file"))
os.rename("file", "moved")
wait_for(("from", "file"), ("to", "moved"))
os.mkdir("d")
os.rmdir("d")
os.unlink("moved")
wait_for(("create", "d"), ("delete", "d"), ("delete", "moved"))
"""


def test_inotify_tells_what_is_done_in_the_mount(place: Place) -> None:
    place.python(INOTIFY)


# --- locks


LOCKS = """
import ctypes, errno, fcntl, os, select, signal, struct, sys, time

host, mount = sys.argv[1] + "/locked", sys.argv[2] + "/locked"
with open(host, "wb") as file:
    file.write(bytes(100))
libc = ctypes.CDLL(None, use_errno=True)
FLOCK = struct.Struct("hhqqi4x")

def lock(fd, how, wait):
    '''Take a lock in one go; 0 or the errno.'''
    if how == "flock":
        result = libc.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    else:
        result = libc.fcntl(fd, fcntl.F_SETLKW if wait else fcntl.F_SETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 10, 20, 0))
    return 0 if result == 0 else ctypes.get_errno()

class Child:
    '''A process that opens a file, takes a lock, says how that ended, and keeps it until told to end.'''
    def __init__(self, path, how, wait=True):
        said, say = os.pipe()
        go, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            for fd in (said, end):
                os.close(fd)
            signal.signal(signal.SIGINT, lambda *_: None)
            fd = os.open(path, os.O_RDWR)
            os.write(say, b"r")
            os.write(say, b"%c" % lock(fd, how, wait))
            os.read(go, 1)
            os._exit(0)
        os.close(say)
        os.close(go)
        self.said, self.end = said, end
        assert os.read(said, 1) == b"r"

    def answer(self, seconds=10):
        assert select.select([self.said], [], [], seconds)[0], "no answer"
        return os.read(self.said, 1)[0]

    def waits(self):
        '''Wait until it sleeps in the call; True.'''
        deadline = time.monotonic() + 10
        while True:
            with open(f"/proc/{self.pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
            if state in "SD":
                return not select.select([self.said], [], [], 0)[0]
            assert time.monotonic() < deadline

    def ends(self, seconds=2.0):
        '''True if the process ends within that time.'''
        pidfd = os.pidfd_open(self.pid)
        ended = bool(select.select([pidfd], [], [], seconds)[0])
        os.close(pidfd)
        if ended:
            os.waitpid(self.pid, 0)
        return ended

    def leave(self):
        os.write(self.end, b"e")  # not closed: those that were forked later have it too
        assert self.ends()

def free(path, how):
    child = Child(path, how, wait=False)
    result = child.answer()
    child.leave()
    return result == 0

def becomes_free(path, how):
    # An flock goes with RELEASE, which comes after close(2) has returned.
    child = Child(path, how)
    assert child.answer() == 0, "it stays locked"
    child.leave()

for how in ("flock", "fcntl"):
    assert free(host, how)
    assert free(mount, how)
    for held, wanted in ((host, mount), (mount, host), (mount, mount)):
        where = (how, held, wanted)
        holder = Child(held, how)
        assert holder.answer() == 0, where
        refused = Child(wanted, how, wait=False)
        assert refused.answer() in (errno.EAGAIN, errno.EACCES), where
        refused.leave()
        # The one that waits is interrupted, another one killed: neither gets the lock, and both are free at once.
        waiter = Child(wanted, how)
        assert waiter.waits(), where
        os.kill(waiter.pid, signal.SIGINT)
        assert waiter.answer(2) == errno.EINTR, where
        waiter.leave()
        waiter = Child(wanted, how)
        assert waiter.waits(), where
        os.kill(waiter.pid, signal.SIGKILL)
        assert waiter.ends(1.0), (where, "killed, and still there")
        # Several wait; each gets it once, and all of them in the end.
        waiters = [Child(wanted, how) for _ in range(3)]
        assert all(waiter.waits() for waiter in waiters), where
        holder.leave()
        while waiters:
            ready = select.select([waiter.said for waiter in waiters], [], [], 10)[0]
            assert len(ready) == 1, (where, len(ready))
            first = next(waiter for waiter in waiters if waiter.said in ready)
            assert first.answer() == 0
            waiters.remove(first)
            assert not free(host, how), where
            assert not free(mount, how), where
            first.leave()
        becomes_free(host, how)
        becomes_free(mount, how)

# A process that dies leaves no lock behind.
for how in ("flock", "fcntl"):
    holder = Child(mount, how)
    assert holder.answer() == 0
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.ends(2.0)
    becomes_free(host, how)

# A record lock ends with any close of the file by its process, an flock with the last of its open file.
one, two = os.open(mount, os.O_RDWR), os.open(mount, os.O_RDWR)
assert lock(one, "fcntl", False) == 0 and not free(host, "fcntl")
os.close(two)
assert free(host, "fcntl")
copy = os.dup(one)
assert lock(one, "flock", False) == 0
os.close(one)
assert not free(host, "flock")
assert not free(mount, "flock")
os.close(copy)
becomes_free(host, "flock")

# Ranges, and who is in the way.
one = os.open(mount, os.O_RDWR)
assert lock(one, "fcntl", False) == 0
pid = os.fork()
if pid == 0:
    other = os.open(mount, os.O_RDWR)
    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 30)
    found = FLOCK.unpack(fcntl.fcntl(other, fcntl.F_GETLK, FLOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0)))
    os._exit(0 if (found[0], found[2], found[3]) == (fcntl.F_WRLCK, 10, 20) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_locks_hold_on_both_sides_and_who_gives_up_is_free_at_once(place: Place) -> None:
    place.python(LOCKS, str(place.source), str(place.at))


def test_locks_that_are_not_forwarded_hold_among_the_users_of_the_mount(world: World) -> None:
    with served(world, "root", "no_flock,no_posix_lock") as place:
        place.python(LOCKS, str(place.at), str(place.at))


def test_flock_1_takes_turns(place: Place) -> None:
    need("flock", "util-linux")
    out = place.sh(
        "echo 0 > count\n"
        "add() { flock lock sh -c 'x=$(cat count); echo $((x + 1)) > count'; }\n"
        "for n in 1 2 3 4; do (for m in 1 2 3 4 5; do add; done) & done\n"
        "wait\ncat count\nflock -n lock echo taken\nflock lock flock -n lock echo taken twice || echo refused\n"
    )
    assert out.splitlines() == ["20", "taken", "refused"]
