"""What the tests of overlays run in namespaces: our own overlay beside the kernel's, and random calls on both.

It needs nothing but fusewire and the standard library. As a program it takes the name of a function and its arguments
as JSON. The server is a process outside of the user namespace and without capabilities, as `fusewire run` has it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import Any

OLD = 1_000_000_000  # seconds; when everything in the lower directory was changed last
NAMES = ("a", "b", "c", "d", "e")
NOREPLACE, EXCHANGE = 1, 2


def build(lower: str, generator: random.Random) -> None:
    """Make the lower directory."""
    directories = [lower]
    for depth in range(3):
        for parent in list(directories[-6:]):
            for name in NAMES[: 4 - depth]:
                if generator.random() < 0.6 and not os.path.lexists(f"{parent}/{name}"):
                    os.mkdir(f"{parent}/{name}")
                    directories.append(f"{parent}/{name}")
    files = []
    for parent in directories:
        for name in generator.sample(NAMES, 3):
            path = f"{parent}/{name}"
            if os.path.lexists(path):
                continue
            if generator.random() < 0.2:
                os.symlink(generator.choice(("a", "../b", "nowhere")), path)
            elif files and generator.random() < 0.1:
                os.link(generator.choice(files), path)
            else:
                with open(path, "wb") as file:
                    file.write(os.path.relpath(path, lower).encode() * generator.choice((0, 1, 1000, 30_000)))
                os.chmod(path, generator.choice((0o644, 0o600, 0o755)))
                if generator.random() < 0.3:
                    os.setxattr(path, "user.lower", b"value")
                files.append(path)
    for directory, names, others in os.walk(lower, topdown=False):
        for name in (*names, *others):
            os.utime(f"{directory}/{name}", (OLD, OLD), follow_symlinks=False)
    os.utime(lower, (OLD, OLD))


def snapshot(root: str, numbered: bool = False) -> dict[str, Any]:
    """Give all that can be seen of a tree; `numbered`: inode numbers are those of the listing, and each file's own."""
    seen: dict[str, Any] = {}
    numbers: dict[int, str] = {}
    for directory, _, _ in os.walk(root, onerror=_raise):
        place = os.path.relpath(directory, root)
        if place == ".":
            seen["."] = _facts(directory)
        with os.scandir(directory) as entries:
            for entry in entries:
                name = os.path.normpath(f"{place}/{entry.name}")
                seen[name] = _facts(entry.path)
                if not numbered:
                    continue
                status = os.lstat(entry.path)
                assert entry.inode() == status.st_ino, (name, entry.inode(), status.st_ino)
                if status.st_nlink == 1:
                    assert status.st_ino not in numbers, (name, numbers[status.st_ino])
                numbers[status.st_ino] = name
    return seen


def _raise(error: OSError) -> None:
    raise error


def _facts(path: str) -> list[Any]:
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    when: int | str = status.st_mtime_ns if status.st_mtime < 2 * OLD - OLD // 2 else "new"
    facts = [oct(status.st_mode), status.st_uid, status.st_gid, when]
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            data = file.read()
        facts += [status.st_size, data[:40].decode(), zlib.crc32(data)]
    if kind == stat.S_IFLNK:
        facts.append(os.readlink(path))
    else:
        names = [name for name in os.listxattr(path) if name.startswith("user.") and "overlay" not in name]
        facts += [[name, os.getxattr(path, name).decode()] for name in sorted(names)]
    return facts


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Tell how two trees differ, "" if they do not."""
    lines = [
        f"{key}: {one.get(key)} | {other.get(key)}" for key in sorted(one | other) if one.get(key) != other.get(key)
    ]
    return "\n".join(lines[:20])


class Driver:
    """Makes each call on both sides."""

    def __init__(self, ours: str, kernel: str, generator: random.Random, bare: bool = False) -> None:
        self.sides = (ours, kernel)
        self.bare = bare  # ours can exchange no names
        self.generator = generator
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.done: list[str] = []

    def path(self) -> str:
        """Give a path that may be there."""
        generator = self.generator
        parts = [generator.choice(NAMES) for _ in range(generator.choice((1, 1, 2, 2, 3, 4)))]
        return "/".join(parts)

    def both(self, what: str, call: Callable[[str], Any]) -> list[Any]:
        outcomes: list[Any] = []
        for side in self.sides:
            try:
                outcomes.append(call(side))
            except OSError as error:
                outcomes.append(errno.errorcode[error.errno or 0])
        self.done.append(f"{what}: {outcomes}")
        return outcomes

    def same(self, what: str, call: Callable[[str], Any]) -> None:
        outcomes = self.both(what, call)
        assert outcomes[0] == outcomes[1], what

    def rename(self, one: str, two: str, flags: int) -> None:
        def call(side: str, flags: int = flags) -> str:
            at = -100
            if self.libc.renameat2(at, os.fsencode(f"{side}/{one}"), at, os.fsencode(f"{side}/{two}"), flags):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return "done"

        ours, kernels = self.both(f"rename {one} {two} {flags}", call)
        if kernels == "EXDEV" and ours == "done":
            # The kernel's moves no lower directories, but mv(1) does it.
            if flags == EXCHANGE:
                call(self.sides[0])
                for path in (os.path.dirname(name) for name in (one, two)):
                    for side in self.sides:
                        os.utime(f"{side}/{path}")
                return
            source, target = (f"{self.sides[1]}/{name}" for name in (one, two))
            subprocess.run(["mv", "-T", source, target], check=True)
            return
        if ours == "EINVAL" and flags == EXCHANGE and self.bare:
            if kernels == "done":
                call(self.sides[1])  # back again
            return
        if kernels == "EXDEV" and ours == "ENOTEMPTY":
            return  # which of two reasons is given
        assert ours == kernels, f"rename {one} {two} {flags}"

    def step(self) -> None:
        """Make one call."""
        generator = self.generator
        path, other = self.path(), self.path()
        number = len(self.done)

        def write(side: str) -> None:
            flags = generator_flags | os.O_WRONLY
            fd = os.open(f"{side}/{path}", flags, 0o644)
            try:
                os.write(fd, b"%d " % number * length)
            finally:
                os.close(fd)

        generator_flags = generator.choice((0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL))
        generator_flags |= generator.choice((0, 0, os.O_TRUNC, os.O_APPEND))
        length = generator.choice((1, 100, 5000))
        mode = generator.choice((0o755, 0o700, 0o711))
        size = generator.choice((0, 10, 5000, 200_000))
        word = generator.choice(("user.lower", "user.new"))
        calls: list[tuple[str, Callable[[str], Any]]] = [
            ("write", write),
            ("write", write),
            ("truncate", lambda side: os.truncate(f"{side}/{path}", size)),
            ("mkdir", lambda side: os.mkdir(f"{side}/{path}", mode)),
            ("mkdir", lambda side: os.mkdir(f"{side}/{path}", mode)),
            ("rmdir", lambda side: os.rmdir(f"{side}/{path}")),
            ("unlink", lambda side: os.unlink(f"{side}/{path}")),
            ("unlink", lambda side: os.unlink(f"{side}/{path}")),
            ("symlink", lambda side: os.symlink(other, f"{side}/{path}")),
            ("mkfifo", lambda side: os.mknod(f"{side}/{path}", stat.S_IFSOCK | mode)),
            ("link", lambda side: os.link(f"{side}/{path}", f"{side}/{other}", follow_symlinks=False)),
            ("chmod", lambda side: os.chmod(f"{side}/{path}", mode)),
            ("utime", lambda side: os.utime(f"{side}/{path}", (OLD + number, OLD + number), follow_symlinks=False)),
            ("setxattr", lambda side: os.setxattr(f"{side}/{path}", word, b"%d" % number)),
            ("removexattr", lambda side: os.removexattr(f"{side}/{path}", word)),
            ("listdir", lambda side: sorted(os.listdir(f"{side}/{path}"))),
            ("rmtree", lambda side: shutil.rmtree(f"{side}/{path}") if number % 5 == 0 else None),
        ]
        choice = generator.randrange(len(calls) + 7)
        if choice < len(calls):
            what, call = calls[choice]
            self.same(f"{what} {path} {other}", call)
        else:
            self.rename(path, other, generator.choice((0, 0, 0, NOREPLACE, EXCHANGE)))

    def compare(self) -> dict[str, Any]:
        ours, kernels = snapshot(self.sides[0], True), snapshot(self.sides[1])
        assert not (wrong := difference(ours, kernels)), f"ours | the kernel's\n{wrong}"
        return ours

    def run(self, steps: int) -> dict[str, Any]:
        try:
            for number in range(steps):
                self.step()
                if number % 20 == 19:
                    self.compare()
            return self.compare()
        except BaseException:
            print("\n".join(self.done), file=sys.stderr)
            raise


class Serving:
    """A server of what `make` gives, in a process made before any namespace is entered; `mount` gives it a mount.

    `make` is called when there is a mount: another overlay may use its directories before.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.near, far = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.near.close()
                self._serve(far, make)
                status = 0
            except BaseException:  # noqa: BLE001 - the child's end
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        far.close()

    @staticmethod
    def _serve(far: socket.socket, make: Callable[[], Any]) -> None:
        from fusewire.linux import syscalls, userns
        from fusewire.serve import Server

        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
        failed = []

        def log(message: str, error: BaseException | None) -> None:
            failed.append(message)
            print(message, "".join(traceback.format_exception(error)) if error else "", file=sys.stderr, flush=True)

        _, received, _, _ = socket.recv_fds(far, 10, 1)
        if not received:
            return
        filesystem = make()
        if hasattr(filesystem, "serve_namespace"):
            filesystem.serve_namespace(*userns.maps_of(os.getppid()))
        server = Server(filesystem, received[0], threads=3, log=log)
        server.start()
        assert server.wait_ready(20)
        far.send(b"+")
        server.wait()
        assert not failed

    def mount(self, target: str) -> None:
        from fusewire.linux import mount_base

        fd = mount_base.open_device()
        options = mount_base.Options(allow_other=True, default_permissions=True)
        mount_base.mount_by_string(fd, os.fsencode(target), options)
        socket.send_fds(self.near, [b"fd"], [fd])
        os.close(fd)
        assert self.near.recv(1) == b"+"
        os.stat(target)

    def end(self, target: str) -> None:
        from fusewire.linux import syscalls

        syscalls.umount2(os.fsencode(target))
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0, "the server had something to complain of"
        self.near.close()


def our_overlay(lower: str, place: str, by_name: bool = False) -> Any:
    """Open our overlay over a directory or an image, `by_name` with the marks that need no support."""
    from fusewire.cli.options import parse
    from fusewire.fs.overlay import open_overlay
    from fusewire.fs.sources import open_source
    from fusewire.linux import overlay

    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in overlay.prepare(os.fsencode(place))]
    filesystem = open_overlay(open_source(lower, parse("")), fds[0], fds[1])
    if by_name:
        filesystem._marks.devices, filesystem._marks.opaque = False, ()
    return filesystem


def bare_overlay(lower: str, place: str) -> Any:
    """Open our overlay with its changes on a mount of ours that can neither exchange names nor leave whiteouts."""
    from fusewire.fs.passthrough import Passthrough
    from fusewire.linux import overlay, userns

    class Bare(Passthrough):
        def rename(self, caller: Any, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
            if flags & ~NOREPLACE:
                raise OSError(errno.EINVAL, "no such flags here", name)
            super().rename(caller, parent, name, newparent, newname, flags)

        def tmpfile(self, *_: Any) -> Any:
            raise OSError(errno.EOPNOTSUPP, "no files without a name")

    def make() -> Any:
        from fusewire.fs.passthrough import Config

        return Bare(os.open(place, os.O_PATH | os.O_DIRECTORY), Config())

    overlay.prepare(os.fsencode(place))
    serving = Serving(make)
    userns.enter(userns.default_plan())
    os.mkdir(f"{place}-bare")
    serving.mount(f"{place}-bare")
    return our_overlay(lower, f"{place}-bare")


def in_child(call: Callable[[], Any]) -> Any:
    """Call in a child without capabilities; its value comes back as JSON."""
    from fusewire.linux import syscalls

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            if os.getuid():
                syscalls.capset(0, 0, 0)
            answer = json.dumps(call()).encode()
            while answer:
                answer = answer[os.write(writer, answer) :]
            status = 0
        except BaseException:  # noqa: BLE001 - the child's end
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return json.loads(answer)


def keep_capability() -> None:
    """Have the next program keep what it takes to mount; execve(2) takes that from all but root."""
    from fusewire.linux import syscalls

    own = syscalls.capget()
    syscalls.capset(own.effective, own.permitted, own.inheritable | 1 << syscalls.CAP_SYS_ADMIN)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, syscalls.CAP_SYS_ADMIN)


def expect(what: str, seen: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert not (wrong := difference(seen, wanted)), f"{what}\n{wrong}"


def compare(base: str, seed: int, steps: int, kind: str) -> None:
    """Make random calls on both, and then give the upper directories to the others."""
    from fusewire.linux import overlay, syscalls, userns

    os.umask(0o022)
    generator = random.Random(seed)
    lower, ours, kernels, one, two = (f"{base}/{name}" for name in ("lower", "ours", "kernel", "one", "two"))
    for path in (lower, one, two):
        os.mkdir(path)
    build(lower, generator)
    untouched = snapshot(lower)
    by_name = kind == "names"
    source = f"{base}/image" if kind == "image" else lower
    if kind == "image":
        subprocess.run(["mksquashfs", lower, source, "-quiet", "-no-progress", "-comp", "gzip"], check=True)
    serving = Serving(lambda: bare_overlay(source, ours) if kind == "bare" else our_overlay(source, ours, by_name))
    again = Serving(lambda: our_overlay(source, kernels))
    userns.enter(userns.default_plan())
    places = {place: overlay.prepare(os.fsencode(place)) for place in (ours, kernels)}

    def kernel_mount(place: str) -> None:
        overlay.mount(os.fsencode(lower), *places[place], os.fsencode(two))

    serving.mount(one)
    kernel_mount(kernels)
    shown = in_child(lambda: Driver(one, two, generator, kind == "bare").run(steps))
    serving.end(one)
    syscalls.umount2(os.fsencode(two))

    if not by_name:
        kernel_mount(ours)
        expect("our upper directory under the kernel's | under ours", in_child(lambda: snapshot(two)), shown)
        syscalls.umount2(os.fsencode(two))
    again.mount(one)
    expect("the kernel's upper directory under ours | under its own", in_child(lambda: snapshot(one, True)), shown)
    again.end(one)
    if shutil.which("fuse-overlayfs"):
        os.mkdir(f"{base}/work")  # the kernel leaves its own behind in a mode that keeps others out
        options = f"lowerdir={lower},upperdir={os.fsdecode(places[ours][0])},workdir={base}/work"
        process = subprocess.Popen(
            ["fuse-overlayfs", "-f", "-o", options, one],
            stdout=subprocess.DEVNULL,
            preexec_fn=keep_capability,  # noqa: PLW1509
        )
        device = os.stat(base).st_dev
        while os.stat(one).st_dev == device:
            assert process.poll() is None, "fuse-overlayfs has ended"
        expect("our upper directory under fuse-overlayfs | under ours", in_child(lambda: snapshot(one)), shown)
        syscalls.umount2(os.fsencode(one))
        process.wait()
    assert snapshot(lower) == untouched, "the lower directory was changed"


def kernel_over_image(base: str, image: str, kind: str) -> None:
    """Have the kernel's overlayfs over a mount of ours; every path has characters that mean something in options."""
    from fusewire.cli.options import parse
    from fusewire.fs.sources import open_source
    from fusewire.linux import overlay, syscalls, userns

    target, place = (f"{base}/{name}, a:b\\c" for name in ("mount", "changes"))
    os.mkdir(target)
    serving = Serving(lambda: open_source(image, parse("")))
    userns.enter(userns.default_plan())
    if kind == "tmpfs":
        # Below the mount that is to come: it takes no other place, and goes when the namespace goes.
        overlay.mount_tmpfs(os.fsencode(target), b"20M")
        place = target
    upper, work = overlay.prepare(os.fsencode(place))
    overlay.probe(os.fsencode(place))
    assert sorted(os.listdir(place)) == ["upper", "work"], "the probe has left something"
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (upper, work)]
    if kind == "tmpfs":
        upper, work = (b"/proc/self/fd/%d" % fd for fd in fds)
    serving.mount(target)
    overlay.mount(os.fsencode(target), upper, work, os.fsencode(target))
    os.close(fds[1])
    os.chdir(target)
    with open("file", "ab") as file:
        file.write(b" and more")
    with open("file", "rb") as file:
        assert file.read() == b"old data and more"
    os.unlink("dir/one")
    os.rename("link", "dir/link")
    os.rmdir("empty")
    os.mkdir("empty")
    assert sorted(os.listdir("dir")) == ["link", "sub"]
    assert sorted(os.listdir(fds[0])) == ["dir", "empty", "file", "link"]
    os.chdir("/")
    os.close(fds[0])
    syscalls.umount2(os.fsencode(target))
    serving.end(target)


def refusals(base: str) -> None:
    """See what is said where the kernel's overlayfs cannot be had."""
    import re

    from fusewire.fs.passthrough import Config, open_directory
    from fusewire.linux import overlay, syscalls, userns
    from fusewire.linux.mount_base import RefusedError

    for name in ("served", "mount", "ram", "tmp"):
        os.mkdir(f"{base}/{name}")
    serving = Serving(lambda: open_directory(f"{base}/served", Config(xattr=False)))
    userns.enter(userns.default_plan())

    def refused(reason: str, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except RefusedError as error:
            caught = error
        else:
            raise AssertionError(f"not refused: {reason}")
        assert re.search(reason, str(caught)), str(caught)
        assert caught.remedy

    serving.mount(f"{base}/mount")
    refused("mount, which is on FUSE, has no extended attributes", overlay.probe, os.fsencode(f"{base}/mount"))
    assert os.listdir(f"{base}/served") == []
    serving.end(f"{base}/mount")
    syscalls.mount(b"ramfs", os.fsencode(f"{base}/ram"), b"ramfs", 0)
    os.chmod(f"{base}/ram", 0o700)
    refused("no extended attributes", overlay.probe, os.fsencode(f"{base}/ram"))
    assert os.listdir(f"{base}/ram") == []
    target = os.fsencode(f"{base}/tmp")
    refused("much is no size", overlay.mount_tmpfs, target, b"much")
    overlay.mount(target, *overlay.prepare(os.fsencode(f"{base}/served")), target)
    refused("tmp, which is on overlayfs, cannot take", overlay.probe, target)
    syscalls.umount2(target)
    syscalls.umount2(os.fsencode(f"{base}/ram"))


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
