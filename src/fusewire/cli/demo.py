"""`fusewire demo`: the main job with the small image that ships in the package, each step said in a line.

Layer: cli. It does nothing by itself: every step is the real command, or one of the system's own, in a process of its
own, and what that prints is shown. Started by root, it first becomes a user who may do nothing, so that what is shown
is the rootless job; where such a user could not even start Python, it says so and stays root. Nothing is left behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import fusewire
from fusewire.cli.listing import shown
from fusewire.linux import mountinfo, process, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = 65534
_PATIENCE = 60.0  # seconds for one command; an idle machine needs 0.2
_ELSEWHERE = "/opt/fusewire-demo"
# Why a user without rights cannot play the part, by the exit status of the process that tried.
_REASONS = {
    2: f"this process may not become user {NOBODY}",
    3: f"user {NOBODY} may not use the Python that is running, or the temporary directory",
    4: "/dev/fuse is for root only here (udev makes it usable where it runs: chmod 0666 /dev/fuse)",
}


class Failed(Exception):  # noqa: N818 - the end of the story, not a fault of the program
    """A step that did not work, and how."""


class _Stage:
    """As whom, where and with which Python the steps run. `note` says what had to be arranged for that."""

    __slots__ = ("base", "environ", "note", "package", "python", "step")

    def __init__(self, base: str) -> None:
        self.base = base
        self.python = sys.executable
        self.package = os.path.dirname(os.path.abspath(fusewire.__file__))
        self.note = ""
        self.step = 0
        # Short commands, no left-overs elsewhere, and a listing that looks the same everywhere.
        self.environ = os.environ | {"XDG_RUNTIME_DIR": os.path.join(base, "run"), "TMPDIR": base, "LC_ALL": "C"}

    def say(self, text: str) -> None:
        """Begin the next step."""
        self.step += 1
        print(f"\n{self.step}. {text}", flush=True)

    def run(self, *words: str, silent: bool = False) -> str:
        """Run a command, show it and what it prints; give that. Raises Failed if it fails."""
        if not silent:
            print(f"   $ {' '.join(words)}", flush=True)
        command = [self.python, "-m", *words] if words[0] == "fusewire" else list(words)
        try:
            done = subprocess.run(
                command,
                cwd=self.base,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="surrogateescape",
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"`{' '.join(words)}` has not ended within {_PATIENCE:g} s") from None
        except OSError as error:
            raise Failed(f"`{words[0]}` cannot be started: {error.strerror}") from error
        if not silent:
            for line in (done.stdout + done.stderr).splitlines():
                print(f"     {shown(line)}".rstrip(), flush=True)
        if done.returncode:
            raise Failed(f"`{' '.join(words)}` ended with {_ending(done.returncode)}")
        return done.stdout

    def expect(self, truth: bool, claim: str) -> None:
        """Raise Failed unless what a step claims is so."""
        if not truth:
            raise Failed(f"not so: {claim}")


def _ending(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"signal {-code}"


def demo() -> int:
    """Show everything; the exit status is 0 only if every step worked.

    Raises OSError if the image or a temporary directory is missing.
    """
    image = os.path.join(os.path.dirname(fusewire.__file__), "data", "demo.sqsh")
    base = os.path.realpath(tempfile.mkdtemp(prefix="fusewire-demo-"))
    try:
        stage = _Stage(base)
        os.mkdir(os.path.join(base, "run"), 0o700)
        os.mkdir(os.path.join(base, "demo"), 0o755)
        try:
            shutil.copy(image, os.path.join(base, "demo.sqsh"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "the demo's image is missing; install Fusewire anew", image
            ) from error
        print("Fusewire demo: the squashfs image that comes with it is mounted, used and unmounted again")
        print(f"image: {shown(image)} ({os.path.getsize(image)} bytes)")
        print(f"in a directory of its own: {shown(base)}", flush=True)
        if os.geteuid() == 0 and _cast(stage):
            return _as_nobody(lambda: _play(stage))
        return _play(stage)
    finally:
        shutil.rmtree(base, ignore_errors=True)


# --- as whom


def _cast(stage: _Stage) -> bool:
    """Started by root: find how a user without rights can do it. False if root has to."""
    for name in ("", "run", "demo", "demo.sqsh"):
        os.chown(os.path.join(stage.base, name), NOBODY, NOBODY)
    stage.environ["HOME"] = stage.base
    stage.note = "started as root, which it has given up for this"
    reason = _as_nobody(lambda: _try_out(stage))
    if reason == 3:
        # Root's home is closed to others, and often where root keeps a checkout or a virtual environment. The package
        # is small, pure Python, and needs nothing else for this image.
        library = os.path.join(stage.base, "lib")
        original, stage.package = stage.package, os.path.join(library, "fusewire")
        shutil.copytree(original, stage.package, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", library], check=True)
        before = stage.environ.get("PYTHONPATH")
        stage.environ["PYTHONPATH"] = library
        for python in (sys.executable, os.path.realpath(sys.executable)):
            stage.python = python
            if (reason := _as_nobody(lambda: _try_out(stage))) != 3:
                stage.note += f"; {shown(python)} runs a copy of the package, for others may not read the original"
                break
        else:
            stage.python, stage.package = sys.executable, original
            del stage.environ["PYTHONPATH"]
            if before is not None:
                stage.environ["PYTHONPATH"] = before
    if not reason:
        return True
    stage.note = f"started as root, and stays root: {_REASONS.get(reason, 'giving up all rights failed')}"
    for name in ("", "run", "demo", "demo.sqsh"):
        os.chown(os.path.join(stage.base, name), 0, 0)
    return False


def _try_out(stage: _Stage) -> int:
    """In a process that has given up everything: see whether it can do its part; 0, or a key of _REASONS."""
    try:
        # Another Fusewire than this one may be there to be found where this one cannot be read.
        found = stage.run(stage.python, "-c", "import fusewire.cli; print(fusewire.__file__)", silent=True)
    except Failed:
        return 3
    if os.path.dirname(os.path.abspath(found.rstrip("\n"))) != stage.package:
        return 3
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return 4
    except OSError:
        pass  # the same for everybody: the mount itself will say what is the matter
    return 0


def _as_nobody(work: Callable[[], int]) -> int:
    """Do `work` in a child that has given up all rights; its exit status, 2 if they cannot be given up."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 2
        try:
            _give_up_everything()
            code = 1
            code = work()
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:
            pass  # whoever read our output has enough
        except BaseException:  # noqa: BLE001 - the child's last stop
            if code != 2:  # else the caller says what it means
                import traceback

                traceback.print_exc()
        finally:
            os._exit(code)
    # Ctrl-C is for the child, which cleans up; we go on to remove the directory when it has.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait(child)
    finally:
        signal.signal(signal.SIGINT, before)


def _give_up_everything() -> None:
    """Become NOBODY, without groups, capabilities, or any way to gain some: capabilities(7), PR_SET_NO_NEW_PRIVS."""
    os.setgroups([])
    if syscalls.has_capability(syscalls.CAP_SETPCAP):
        for capability in range(64):
            try:
                syscalls.capbset_drop(capability)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the kernel knows no more of them
                    raise
                break
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    syscalls.capset(0, 0, 0)
    syscalls.set_no_new_privs()


# --- the steps


def _play(stage: _Stage) -> int:
    try:
        _introduce(stage)
        _mount_and_use(stage)
        _run(stage)
    except Failed as failure:
        print(f"\nfusewire demo: step {stage.step} failed: {failure}", file=sys.stderr)
        print("`fusewire doctor` tells what is missing on this machine, and what to do about it", file=sys.stderr)
        return 1
    print("\nThat was all: every step worked.")
    return 0


def _introduce(stage: _Stage) -> None:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    stage.say("Who does all this, as /proc/self/status has it:")
    for field, meaning in (
        ("Uid", "real, effective, saved and filesystem user id"),
        ("CapEff", "the capabilities that it has"),
        ("CapBnd", "those that it could ever gain"),
        ("NoNewPrivs", "1: set-user-ID programs, as fusermount3 is one, give it nothing"),
    ):
        value = " ".join(status.get(field, "?").split())
        print(f"     {field + ':':<12}{value:<28}{meaning}")
    if stage.note:
        print(f"   ({stage.note})", flush=True)


def _mount_and_use(stage: _Stage) -> None:
    stage.say("Mount the image. Its server is a process of this user, in the background, in a namespace of its own:")
    try:
        stage.run("fusewire", "mount", "--strategy", "namespace", "demo.sqsh", "demo")

        stage.say(
            "List it from outside. This `ls` has nothing to do with the mount; `demo` is a link that leads there:"
        )
        stage.run("ls", "-ld", "demo")
        stage.run("ls", "-l", "demo/")
        if os.geteuid() != 0:
            print("   (the files are root's in the image; a namespace that knows one id only shows others as nobody)")
        stage.expect(not _mounted(stage.base), "the mount table of this machine knows nothing of it")

        stage.say("List it from inside the namespace of the mount:")
        stage.run("fusewire", "exec", "demo", "--", "ls", "-l", "demo/docs")

        stage.say("Read a file of it:")
        text = stage.run("cat", "demo/latest")
        stage.expect(text.startswith("You are reading a file inside a squashfs image."), "the file holds its text")
        pid = int(os.readlink(os.path.join(stage.base, "demo")).split("/")[2])
        began = process.start_time(pid)

        stage.say("Unmount. The directory is put back, the server ends:")
        stage.run("fusewire", "umount", "demo")
        stage.run("ls", "-ld", "demo")
        stage.expect(os.path.isdir(os.path.join(stage.base, "demo")), "`demo` is a directory again")
        stage.expect(began is None or not process.is_alive(pid, began), "the server has ended")
    finally:
        if os.path.islink(os.path.join(stage.base, "demo")):
            try:
                stage.run("fusewire", "umount", "--lazy", "demo", silent=True)
            except Failed as failure:
                print(f"fusewire demo: the mount is left behind: {failure}", file=sys.stderr)


def _run(stage: _Stage) -> None:
    was_there = os.path.lexists(_ELSEWHERE)
    parent = os.path.dirname(_ELSEWHERE)
    if os.access(parent, os.W_OK):
        where = f"at {_ELSEWHERE}"
    else:
        where = f"at {_ELSEWHERE}, although this user may not write in {parent}"
    stage.say(f"The other way: run one command that sees the image {where}:")
    stage.run("fusewire", "run", f"demo.sqsh:{_ELSEWHERE}", "--", f"{_ELSEWHERE}/bin/hello")

    stage.say("Nothing is left: no mount, no record of one, no directory:")
    if not was_there:
        print(f"     {_ELSEWHERE} does not exist")
        stage.expect(not os.path.lexists(_ELSEWHERE), f"{_ELSEWHERE} does not exist")
    left = stage.run("fusewire", "list", "--json", silent=True)
    stage.expect(stage.base not in left and not _mounted(stage.base), "no mount of this demo is left")
    print("     no mount of the demo in `fusewire list` or in the mount table", flush=True)


def _mounted(base: str) -> bool:
    prefix = os.fsencode(base) + b"/"
    return any(mount.mount_point.startswith(prefix) for mount in mountinfo.mounts())
