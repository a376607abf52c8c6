"""Run Python programs as a user who may do nothing: no root, no capabilities to gain, no set-user-ID helpers.

    subprocess.run([*rootless_python(), "-c", "import fusewire"])

Also here, for processes on both sides: a FUSE server of one file that needs nothing of ours but the descriptor.
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import pwd
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
from typing import Self

NOBODY = 65534
TESTS = os.path.dirname(os.path.abspath(__file__))
# Optional decompressors that images need; copied along when the interpreter's own cannot be read by others.
DEPENDENCIES = ("backports/zstd", "lz4", "lzallright", "isal", "fsspec")


def rootless_python(uid: int = NOBODY, *, fusermount: bool = False) -> list[str]:
    """The words that run a Python with fusewire importable as `uid` (and its equal gid), to be followed by arguments.

    The process has no supplementary groups, no_new_privs and an empty capability bounding set; with `fusermount` it
    lacks the last two, so that a set-user-ID fusermount3 works. Its environment is empty but for PATH, HOME (a
    directory of its own), TMPDIR and PYTHONPATH. If the tests are not run by root, it is the same user as the tests'.
    """
    open_fuse_device()
    interpreter, path = _readable_python()
    home = rootless_home(uid)
    environment = [
        "env",
        "-i",
        f"PATH={os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/bin:/sbin:/bin",
        f"HOME={home}",
        f"TMPDIR={home}",
        "LANG=C.UTF-8",
        "PYTHONDONTWRITEBYTECODE=1",
        f"PYTHONPATH={path}",
    ]
    return [*_become(uid, fusermount), *environment, interpreter, "-W", "error"]


def _become(uid: int, fusermount: bool) -> list[str]:
    if os.geteuid() != 0:
        if uid not in (NOBODY, os.geteuid()):
            _skip(f"only root can run a program as uid {uid}")
        return [] if fusermount else ["setpriv", "--no-new-privs", "--"]
    if shutil.which("setpriv") is None:
        _skip("setpriv (util-linux) is missing")
    words = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    if not fusermount:
        words += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return [*words, "--"]


def _skip(reason: str) -> None:
    import pytest  # children import this module without it

    pytest.skip(reason)


@functools.cache
def rootless_home(uid: int = NOBODY) -> str:
    """A directory of that user's, below a path that everybody can reach; removed when the tests end."""
    home = tempfile.mkdtemp(prefix=f"fusewire-home-{uid}-", dir="/tmp")
    if os.geteuid() == 0:
        os.chown(home, uid, uid)
    os.chmod(home, 0o755)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


def open_fuse_device() -> None:
    """Make /dev/fuse usable for all, as the udev rule of Debian's fuse3 does; machines without udev lack that."""
    try:
        mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    except FileNotFoundError:
        _skip("/dev/fuse is missing")
    if mode & 0o666 != 0o666:
        if os.geteuid() != 0:
            _skip("/dev/fuse may be opened by root only")
        os.chmod("/dev/fuse", 0o666)


@functools.cache
def _readable_python(copy: bool = False) -> tuple[str, str]:
    """An interpreter that every user can run, and the PYTHONPATH for fusewire and this module."""
    import fusewire

    package = os.path.dirname(os.path.abspath(fusewire.__file__))
    libraries = sysconfig.get_paths()["purelib"]
    mine = (sys.executable, package, TESTS, libraries, os.path.dirname(os.__file__))
    if not copy and (os.geteuid() != 0 or all(map(readable_by_all, mine))):
        return sys.executable, f"{os.path.dirname(package)}:{TESTS}"
    system = "/usr/bin/python3"
    try:
        version = subprocess.check_output([system, "-c", "import sys; print(*sys.version_info[:2])"], text=True).split()
    except OSError:
        _skip(f"{sys.executable} cannot be read by other users, and there is no {system}")
    if tuple(map(int, version)) < (3, 11):
        _skip(f"{sys.executable} cannot be read by other users, and {system} is {'.'.join(version)}")
    place = tempfile.mkdtemp(prefix="fusewire-python-", dir="/tmp")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, os.path.join(place, "fusewire"), ignore=ignore)
    shutil.copy(os.path.join(TESTS, "rootless.py"), place)
    if tuple(map(int, version)) == sys.version_info[:2]:  # compiled ones fit no other
        for name in DEPENDENCIES:
            if os.path.isdir(source := os.path.join(libraries, name)):
                shutil.copytree(source, os.path.join(place, name), ignore=ignore)
    subprocess.check_call(["chmod", "-R", "a+rX", place])
    return system, place


def readable_by_all(path: str) -> bool:
    """True if every user can read the file, or list the directory, behind that path."""
    for way in (os.path.abspath(path), os.path.realpath(path)):
        if not os.stat(way).st_mode & stat.S_IROTH:
            return False
        while (way := os.path.dirname(way)) != "/":
            if not os.stat(way).st_mode & stat.S_IXOTH:
                return False
    return True


def has_name(uid: int) -> bool:
    """True if the user database knows that uid."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


# --- a FUSE server: a directory with the file `hello`

HELLO = b"hello world\n"
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH = 1, 2, 3, 14, 15, 17, 18, 25
INIT, OPENDIR, READDIR, RELEASEDIR, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = 26, 27, 28, 29, 34, 36, 38, 42


def _attributes(node: int) -> bytes:
    size, mode, links = (0, 0o40755, 2) if node == 1 else (len(HELLO), 0o100644, 1)
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, links, os.getuid(), os.getgid(), 0, 4096, 0)


def reply_to(request: bytes) -> bytes | None:
    """The answer of that little filesystem, None for requests that have none."""
    _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
    error, body = 0, b""
    if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
        return None
    if opcode == INIT:
        body = struct.pack("<IIIIHHIIHHIIH22x", 7, 45, 65536, 0, 0, 0, 65536, 1, 0, 0, 0, 0, 0)
    elif opcode == GETATTR:
        body = struct.pack("<QII", 0, 0, 0) + _attributes(node)
    elif opcode == LOOKUP and request[40:] == b"hello\0":
        body = struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + _attributes(2)
    elif opcode == LOOKUP:
        error = errno.ENOENT
    elif opcode in (OPEN, OPENDIR):
        body = bytes(16)
    elif opcode == READ:
        offset = struct.unpack_from("<Q", request, 48)[0]
        body = HELLO[offset:]
    elif opcode == READDIR:
        if struct.unpack_from("<Q", request, 48)[0] == 0:
            body = struct.pack("<QQII8s", 2, 1, 5, 8, b"hello")
    elif opcode not in (RELEASE, RELEASEDIR, DESTROY):
        error = errno.ENOSYS
    return struct.pack("<IiQ", 16 + len(body), -error, unique) + body


def serve_hello(fd: int, seen: list[int] | None = None) -> None:
    """Answer requests until the mount is gone; the opcodes are added to `seen`."""
    while True:
        try:
            request = os.read(fd, 1 << 18)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            if error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EBADF):
                return
            raise
        if seen is not None:
            seen.append(struct.unpack_from("<I", request, 4)[0])
        if (reply := reply_to(request)) is not None:
            try:
                os.write(fd, reply)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise


def serve_commands(target: str, strategy: str, private: str | None, **options: object) -> None:
    """Mount, serve, and obey lines on standard input: `unmount`, `lazy`, `seen`. Each is answered by a line of JSON."""
    import json
    import threading

    from fusewire.linux import mount, userns

    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    program = options.pop("program", None)
    plan = userns.root_plan() if options.pop("map_root", False) else None
    try:
        mounted = mount.mount(
            os.fsencode(target),
            mount.Options(**options),  # type: ignore[arg-type]
            strategy,
            private=private and os.fsencode(private),
            program=program,
            plan=plan,
        )
    except mount.MountError as error:
        say(errno=error.errno, text=str(error), attempts=error.attempts)
        return
    seen: list[int] = []
    server = threading.Thread(target=serve_hello, args=(mounted.fd, seen), daemon=True)
    server.start()
    say(pid=os.getpid(), **mounted.record())
    for line in sys.stdin:
        try:
            if line in ("unmount\n", "lazy\n"):
                mounted.unmount(lazy=line == "lazy\n")
                if line == "unmount\n":
                    server.join()
        except OSError as error:
            say(errno=error.errno, text=str(error))
        else:
            say(seen=list(seen), connected=mounted.is_connected(), fds=len(os.listdir("/proc/self/fd")))
    mounted.close()


class Server:
    """A process that runs `serve_commands`, as the words of `prefix` say. `ready` is its first answer."""

    def __init__(self, prefix: list[str], target: str, strategy: str, private: str | None = None, **options: object):
        code = f"import rootless; rootless.serve_commands({target!r}, {strategy!r}, {private!r}, **{options!r})"
        self.process = subprocess.Popen(
            [*prefix, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        self.ready = self._answer()

    def _answer(self) -> dict:
        import json

        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server ended with status {self.process.wait()}"
        return json.loads(line)

    def ask(self, command: str) -> dict:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def kill(self) -> None:
        """As violently as can be. The kernel closes its /dev/fuse, so nobody can be left waiting for it."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.communicate()
