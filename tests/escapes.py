"""Shares in every sandbox that this machine can have, and what lies around them, for tests of ways out.

with served(WAYS[0], "--cache=none") as share, share.guest() as guest:
    scene = share.scene()
    ...
    scene.check()  # what is outside is as it was
"""

from __future__ import annotations

import os
import select
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

import rootless
import sandboxed
from fusewire.linux import landlock
from fusewire.testing.guest import FakeGuest
from fusewire.testing.replies import BY_NAME, OFFERED, body_of, request
from fusewire.wire import abi

ROOT = os.geteuid() == 0
PYTHON = (sys.executable, "-W", "error")
PATIENCE = 20.0
SECRET = b"nobody in the guest may read this"
OWN = b"this is the guest's own"
# What a container without CAP_SYS_ADMIN leaves its root.
CONTAINED = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,net_bind_service,net_raw,sys_chroot,mknod,setfcap"


class Way(NamedTuple):
    """A sandbox, who starts it, and what is asked of Landlock."""

    mode: str
    user: str
    landlock: str

    def __str__(self) -> str:
        return f"{self.mode} as {self.user}, Landlock {self.landlock}"

    @property
    def kept_in(self) -> bool:
        """True if the sandbox forbids to open what has left the share."""
        return self.landlock == "require"


# The last one is no sandbox at all: there, what the core does has to be enough.
BARE = Way("none", "root", "off")
WAYS = [
    Way("namespace", "root", "off"),
    Way("namespace", "nobody", "require"),
    Way("chroot", "root", "require"),
    Way("chroot", "container", "off"),
    Way("none", "root", "require"),
    Way("none", "nobody", "require"),
    BARE,
]


def words_of(user: str) -> Sequence[str]:
    """The words before `-m fusewire` or `-c`."""
    if user == "nobody":
        return rootless.rootless_python()
    if user == "container":
        return ("setpriv", "--bounding-set", "-all,+" + CONTAINED.replace(",", ",+"), "--", *PYTHON)
    return PYTHON


def skip_where_missing(way: Way) -> None:
    """Skip what cannot be had here."""
    if way.user != "nobody" and not ROOT:
        pytest.skip("needs root")
    if way.landlock == "require" and landlock.abi() < landlock.MOVES_FILES:
        pytest.skip(landlock.missing() or "Landlock of ABI 1 only")


class Scene:
    """A part of the share of one test (`inside`), and a directory that is not shared (`outside`) with a secret.

    Permissions guard nothing here: whoever gets out may do everything.
    """

    def __init__(self, home: Path, number: int) -> None:
        self.inside = home / "shared" / f"scene{number}"
        self.outside = home / f"outside{number}"
        for directory in (self.inside, self.outside, self.outside / "q"):
            directory.mkdir()
            directory.chmod(0o777)
        for directory in (self.outside, self.outside / "q"):
            self.put(directory / "secret", SECRET)
            self.put(directory / "victim", SECRET)
            self.put(directory / "only outside", SECRET)
        self.before = self.look()

    @staticmethod
    def put(path: Path, content: bytes) -> Path:
        """Make a file that everybody may change."""
        path.write_bytes(content)
        path.chmod(0o666)
        return path

    def put_directory(self, name: str) -> Path:
        """Make a directory of the guest's, with files of the names that there are outside too."""
        made = self.inside / name
        made.mkdir(parents=True)
        made.chmod(0o777)
        self.put(made / "secret", OWN)
        self.put(made / "victim", OWN)
        return made

    def look(self) -> dict[str, Any]:
        """Everything that can be seen outside."""
        found: dict[str, Any] = {}
        for path in (self.outside, *self.outside.rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
            names = os.listxattr(path, follow_symlinks=False)
            found[str(path)] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_nlink if stat.S_ISREG(status.st_mode) else 0,
                status.st_mtime_ns,
                names,
                content,
            )
        return found

    def check(self) -> None:
        """Fail if anything outside was changed."""
        assert self.look() == self.before

    def node(self, guest: FakeGuest) -> int:
        """Have the guest look its part of the share up."""
        return guest.lookup(1, os.fsencode(self.inside.name)).nodeid


class Served:
    """A share that runs in one of the ways; the process that waits is `process`, the server `pid`."""

    def __init__(self, way: Way, home: Path, options: Sequence[str], words: Sequence[str]) -> None:
        self.way = way
        self.home = home
        self.shared = home / "shared"
        self.socket = home / "s"
        self.said: list[str] = []
        self._scenes = 0
        command = [*words, "-m", "fusewire", "share", str(self.shared), "--socket-path", str(self.socket)]
        command += [f"--sandbox={way.mode}", f"--landlock={way.landlock}", *options]
        # Inside, there is no other place to write to than what was open before.
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            self._listen()
            found = self.process.pid
            while children := Path(f"/proc/{found}/task/{found}/children").read_text().split():
                found = int(children[0])
            self.pid = found
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        """Wait until it listens."""
        assert self.process.stderr is not None
        text = b""
        while b" is shared at " not in text or not text.endswith(b"\n"):
            # Not by a buffered reader, which may have taken more lines than it gives.
            assert select.select([self.process.stderr], [], [], PATIENCE)[0], text
            more = os.read(self.process.stderr.fileno(), 65536)
            assert more, text
            text += more
        self.said += text.decode().splitlines()

    def guest(self, **options: Any) -> FakeGuest:
        """Connect a guest and say INIT."""
        found = FakeGuest.connect(str(self.socket), **options)
        try:
            found.init(flags=OFFERED | abi.FUSE_SUBMOUNTS)
        except BaseException:
            found.close()
            raise
        return found

    def scene(self) -> Scene:
        """Make a part of the share for a test."""
        self._scenes += 1
        return Scene(self.home, self._scenes)

    def alive(self) -> bool:
        """True as long as it serves."""
        return self.process.poll() is None

    def status(self, task: str = "") -> dict[str, str]:
        """/proc/PID/status of the server, or of one of its threads."""
        path = f"/proc/{self.pid}/task/{task}/status" if task else f"/proc/{self.pid}/status"
        with open(path) as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}

    def opened(self) -> dict[int, tuple[str, os.stat_result]]:
        """What the server has open: where it is, as its own paths say, and what it is."""
        place = f"/proc/{self.pid}/fd"
        found = {}
        for name in os.listdir(place):
            try:
                found[int(name)] = (os.readlink(f"{place}/{name}"), os.stat(f"{place}/{name}"))
            except FileNotFoundError:  # closed meanwhile
                continue
        return found

    def opened_specials(self) -> list[str]:
        """What it has open of devices and FIFOs, but for its standard streams. O_PATH opens nothing.

        Pipes without a name are its own: they cannot be had from the tree.
        """
        found = []
        for number, (path, status) in self.opened().items():
            special = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) or stat.S_ISFIFO(status.st_mode)
            if number > 2 and special and not path.startswith("pipe:[") and not self.flags(number) & os.O_PATH:
                found.append(path)
        return found

    def flags(self, number: int) -> int:
        """With which flags of open(2) a descriptor was opened."""
        try:
            text = Path(f"/proc/{self.pid}/fdinfo/{number}").read_text()
        except FileNotFoundError:
            return os.O_PATH
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags:")), 8)

    def close(self) -> None:
        """End it. What it has said besides is in `said`."""
        self.process.terminate()
        try:
            rest = self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            rest = self.process.communicate()[1]
            raise AssertionError(f"the share did not end: {rest}") from None
        self.said += rest.splitlines()


@contextmanager
def served(way: Way, *options: str, words: Sequence[str] = ()) -> Iterator[Served]:
    """Start a share of an empty directory in a directory of its own."""
    skip_where_missing(way)
    home = Path(rootless.rootless_home()) / f"escapes-{os.getpid()}-{os.urandom(4).hex()}"
    (home / "shared").mkdir(parents=True)
    for path in (home, home / "shared"):
        path.chmod(0o777)
    try:
        share = Served(way, home, options, words or words_of(way.user))
        try:
            yield share
        finally:
            share.close()
        assert not [line for line in share.said if "Traceback" in line], share.said
    finally:
        shutil.rmtree(home)


class Flipper:
    """A process of the host's that exchanges two names all the time, renameat2(2) with RENAME_EXCHANGE."""

    PROGRAM = """
import ctypes, select, sys
renameat2 = ctypes.CDLL(None).renameat2
one, other, flips = sys.argv[1].encode(), sys.argv[2].encode(), 0
ended = lambda: bool(select.select([0], [], [], 0)[0])
print("ready", flush=True)
while not ended():
    for _ in range(32):
        flips += renameat2(-100, one, -100, other, 2) == 0
print(flips)
"""

    def __init__(self, one: Path, other: Path) -> None:
        self.count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.PROGRAM, str(one), str(other)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        try:
            assert self._process.stdout.readline() == "ready\n"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            out, _ = self._process.communicate("", timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise
        self.count = int(out or 0)


class Tally:
    """How many of many attempts were served, and how many refused."""

    def __init__(self) -> None:
        self.served = 0
        self.refused: dict[int, int] = {}

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Give what a call gives, None if it fails with an errno."""
        try:
            result = call(*arguments)
        except TimeoutError:
            raise
        except OSError as error:
            number = error.errno or 0
            self.refused[number] = self.refused.get(number, 0) + 1
            return None
        self.served += 1
        return True if result is None else result


def raw(guest: FakeGuest, name: str, nodeid: int, *fields: int, names: Sequence[bytes] = (), uid: int = 0) -> int:
    """Send a request that no kernel would send, and give the errno of its answer, 0 for success."""
    op = BY_NAME[name]
    body = body_of(name, *fields, names=names)
    return guest.request(request(op.code, nodeid, body, unique=0x7000_0001, uid=uid, gid=uid), room=4096).error


_LOADED = "from fusewire.linux import seccomp_filter as f; f.import_all(); f.program('kill')"


def _under_filter(program: str) -> str:
    """The probe of `sandboxed` with the filter of system calls on: it may neither recv(2) nor send(2) then."""
    changes = (
        (
            "wire.sendall(json.dumps(what, default=repr).encode() +",
            "os.write(given['wire'], json.dumps(what).encode() +",
        ),
        ('in wire.makefile("r"):', "in open(given['wire'], closefd=False):"),
        ("    if given", "    if name == 'seccomp':\n        f.load('kill')\n    if given"),
        (
            "\ngiven = ",
            f"\nimport stat\n{_LOADED}\ngiven = ",
        ),
    )
    for old, new in changes:
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    return program


FILTERED = _under_filter(sandboxed.PROGRAM)


def tiny_program() -> bytes:
    """A program of 64-bit x86 that needs no library: its exit status is the last byte of its effective user id."""
    code = bytes.fromhex("b86b000000 0f05 89c7 b83c000000 0f05".replace(" ", ""))  # geteuid, exit
    start = 0x400000
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        2,  # ET_EXEC
        62,  # EM_X86_64
        1,
        start + 120,
        64,
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    size = 120 + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, start, start, size, size, 4096) + code
