"""`fusewire run`: the command, its terminal, its mounts and its end, as a user without any privilege."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import squashfs_images
from e2e import NOBODY, USER, Terminal, World, digest

HELLO = "hello world\n"


def run(world: World, small: Path, script: str, *options: str, target: str = "/opt/image", **how: object):
    return world.fw("run", *options, f"{small}:{target}", "--", "sh", "-c", script, **how)


# --- the command's own affairs


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_status_is_the_commands(world: World, small: Path, code: int) -> None:
    assert run(world, small, f"exit {code}").returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGKILL])
def test_death_by_signal_is_the_commands(world: World, small: Path, number: int) -> None:
    done = run(world, small, f"ulimit -c 0; kill -{number} $$", target=f"{world.home()}/new/place")
    assert (done.returncode, done.stderr) == (-number, "")
    assert contents(world.home()) == []


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["no-such-command"], 127, "no-such-command: no such command inside"),
        (["/opt/image/missing"], 127, "/opt/image/missing: no such command inside"),
        (["/opt/image/hello.txt/x"], 127, "/opt/image/hello.txt/x"),
        (["/opt/image/not-executable"], 126, "/opt/image/not-executable: cannot be executed: Permission denied"),
        (["/opt/image/directory"], 126, "/opt/image/directory: cannot be executed"),
    ],
)
def test_command_that_cannot_be_started_is_126_or_127(
    world: World, small: Path, command: list[str], code: int, message: str
) -> None:
    done = world.fw("run", f"{small}:/opt/image", "--", *command)
    assert done.returncode == code
    assert done.stderr.startswith(f"fusewire: {message}")
    assert done.stderr.count("\n") == 1


def test_without_a_command_the_users_shell_is_run(world: World, small: Path) -> None:
    shell = world.home() / "shell"
    shell.write_text('#!/bin/sh\necho "my shell, $# arguments"\ncat /opt/image/hello.txt\n')
    shell.chmod(0o755)
    done = world.fw("run", f"{small}:/opt/image", env={"SHELL": str(shell)})
    assert done.stdout == "my shell, 0 arguments\n" + HELLO
    assert world.fw("run", f"{small}:/opt/image", input="exit 9\n").returncode == 9  # /bin/sh where SHELL is unset


def test_streams_pass_through_in_a_pipeline(world: World, small: Path) -> None:
    words = " ".join(world.tool()[:-1]) + f" -m fusewire run {small}:/opt/image --"
    done = world.sh(f"seq 100000 | {words} cat | {words} sh -c 'cat; echo 2 >&2' | md5sum; seq 100000 | md5sum")
    first, second = done.stdout.splitlines()
    assert (first, done.stderr) == (second, "2\n")


def test_reader_that_closes_the_pipe_ends_the_command(world: World, small: Path) -> None:
    words = " ".join(world.tool()[:-1])
    done = world.sh(f"{words} -m fusewire run {small}:/opt/image -- yes | head -n 2")
    assert (done.stdout, done.stderr) == ("y\ny\n", "")


def test_command_gets_the_environment_the_ids_and_the_umask_of_the_caller(world: World, small: Path) -> None:
    script = "env | sort; id; umask; ulimit -n; pwd; cat /proc/self/oom_score_adj"
    inside = run(world, small, f"umask 027; exec sh -c '{script}'", env={"ONE": "1 2\n3"})
    outside = world.sh(f"umask 027; exec sh -c '{script}'", env={"ONE": "1 2\n3"})
    assert (inside.stdout, inside.stderr) == (outside.stdout, "")


def test_arguments_are_bytes(world: World, small: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe -- \n$x")
    done = world.fw("run", f"{small}:/opt/image", "--", "printf", "%s|%s", odd, "--", env={"LANG": "C"})
    assert done.stdout == odd + "|--"


def test_command_inherits_the_callers_descriptors_and_none_of_ours(world: World, small: Path) -> None:
    reader, writer = os.pipe()
    try:
        outside = world.do(*world.tool("fds"), pass_fds=[writer])
        inside = world.fw("run", f"{small}:/opt/image", "--", *world.tool("fds"), pass_fds=[writer])
        assert inside.stdout == outside.stdout
        done = world.fw("run", f"{small}:/opt/image", "--", "bash", "-c", f"echo through >&{writer}", pass_fds=[writer])
        assert done.returncode == 0
        assert os.read(reader, 100) == b"through\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_signals_that_the_caller_ignores_stay_ignored(world: World, small: Path) -> None:
    script = "grep -E 'Sig(Ign|Blk)' /proc/self/status"

    ignore = ["sh", "-c", "trap '' INT HUP QUIT; exec \"$@\"", "sh"]  # as nohup and `command &` of a script have it
    inside = run(world, small, script, wrap=ignore)
    outside = world.sh(script, wrap=ignore)
    assert inside.stdout == outside.stdout


def test_env_and_cwd_are_the_commands(world: World, small: Path) -> None:
    done = run(world, small, 'pwd; echo "$A|$B"', "--cwd", "/opt/image/directory", "--env", "A=1=2", "--env", "B=")
    assert done.stdout == "/opt/image/directory\n1=2|\n"
    done = run(world, small, "pwd", "--cwd", "/nowhere")
    assert (done.returncode, done.stderr) == (125, "fusewire: --cwd /nowhere: No such file or directory\n")
    done = run(world, small, "pwd", "--env", "no-equals-sign")
    assert (done.returncode, done.stderr) == (125, "fusewire: --env no-equals-sign: not NAME=VALUE\n")


def test_working_directory_is_taken_by_name(world: World, small: Path) -> None:
    here = world.home() / "here"
    here.mkdir()
    done = run(world, small, "pwd; ls -d hello.txt", target=str(here), cwd=here)
    assert done.stdout == f"{here}\nhello.txt\n"


# --- signals and the terminal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR2])
def test_signal_to_run_reaches_the_command(world: World, small: Path, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'cat /opt/image/hello.txt; exit 7' {name}; echo ready; while read x; do :; done; exit 1"
    process = world.start("fusewire", "run", f"{small}:/opt/image", "--", "sh", "-c", script)
    assert process.line() == "ready"
    process.kill(number)
    assert process.wait() == 7
    done = process.finish()
    assert (done.stdout, done.stderr) == (HELLO, "")


@pytest.fixture
def terminal(world: World) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(world, *words))
        return opened[-1]

    yield start
    for one in opened:
        os.close(one.master)


def fusewire(world: World, *arguments: str) -> list[str]:
    return [*world.tool()[:-1], "-m", "fusewire", *arguments]


def test_control_c_reaches_the_command_alone_and_once(
    world: World, small: Path, terminal: Callable[..., Terminal]
) -> None:
    program = (
        "import signal, sys, os\n"
        "def say(word): os.write(1, b'%s %d\\n' % (word, os.stat('/opt/image/hello.txt').st_size))\n"
        "signal.signal(signal.SIGINT, lambda *_: say(b'caught'))\n"
        "say(b'ready')\n"
        "while line := os.read(0, 100): say(line.strip())\n"
        "sys.exit(5)\n"
    )
    # Caches are off, so that every look at the mount is one at the server.
    words = fusewire(world, "run", "-o", "attr_timeout=0,entry_timeout=0", f"{small}:/opt/image", "--")
    shell = terminal(*words, *world.tool()[:-1], "-c", program)
    shell.until(b"ready")
    shell.press(b"\x03")
    shell.until(b"caught 12")
    shell.press(b"again\n")
    assert b"caught" not in shell.until(b"again 12")
    shell.press(b"\x03")
    shell.until(b"caught 12")
    shell.press(b"\x04")
    assert shell.process.wait() == 5


def test_control_c_ends_a_command_that_does_not_care(
    world: World, small: Path, terminal: Callable[..., Terminal]
) -> None:
    shell = terminal(*fusewire(world, "run", f"{small}:/opt/image", "--", "sh", "-c", "echo ready; exec sleep 600"))
    shell.until(b"ready")
    shell.press(b"\x03")
    assert shell.process.wait() == -signal.SIGINT


@pytest.mark.parametrize("option", [[], ["--pid"]])
def test_job_control_stops_and_continues(
    world: World, small: Path, terminal: Callable[..., Terminal], option: list[str]
) -> None:
    shell = terminal("bash", "--norc", "--noprofile", "-i")
    words = " ".join(fusewire(world, "run", *option, f"{small}:/opt/image", "--"))
    shell.press(b"PS1=; PS2=; bind 'set enable-bracketed-paste off' 2>/dev/null; echo begin\n")
    shell.until(b"begin")
    shell.press(words.encode() + b" sh -c 'echo started; read x; cat /opt/image/$x'\n")
    shell.until(b"started")
    shell.press(b"\x1a")
    shell.until(b"Stopped")
    shell.press(b"jobs -s | wc -l\n")
    shell.until(b"1\r\n")
    shell.press(b"fg\n")
    shell.until(b"fusewire")  # bash repeats the job's command
    shell.press(b"hello.txt\n")
    shell.until(b"hello world")
    shell.press(b"exit\n")
    shell.process.wait()


def test_closing_the_terminal_hangs_up_the_command(
    world: World, small: Path, terminal: Callable[..., Terminal]
) -> None:
    shell = terminal(*fusewire(world, "run", f"{small}:/opt/image", "--", "sh", "-c", "echo ready; exec sleep 600"))
    shell.until(b"ready")
    os.close(shell.master)  # the window is closed: SIGHUP to the leader of the session, which is not the command
    shell.master = os.open("/dev/null", os.O_RDONLY)
    assert shell.process.wait() == -signal.SIGHUP


# --- namespaces


def test_default_is_the_callers_own_ids_and_map_root_makes_it_root(world: World, small: Path) -> None:
    assert run(world, small, "id -u; id -g").stdout == f"{USER}\n{USER}\n"
    done = run(world, small, "id -u; id -g; touch mine; stat -c %u mine; cat /opt/image/private", "--map-root")
    assert done.stdout == "0\n0\n0\nowner only\n"
    assert os.stat(world.home() / "mine").st_uid == USER


def test_map_ranges_without_any_says_what_to_ask_for(world: World, small: Path) -> None:
    done = run(world, small, "true", "--map-ranges")
    assert done.returncode == 125
    assert f"/etc/subuid gives no range to user {USER}" in done.stderr


def test_pid_gives_an_own_proc_and_ids_from_1(world: World, small: Path) -> None:
    done = run(world, small, "ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm; exec sh -c 'echo $$; exit 3'", "--pid")
    processes, init, pid = done.stdout.split()
    assert int(processes) < 8
    assert init  # the one that reaps
    assert int(pid) < 8
    assert done.returncode == 3


def test_pid_reaps_orphans_and_ends_what_is_left(world: World, small: Path) -> None:
    # An orphan of an orphan ends: its init has to reap it, or it stays in /proc. Another one would stay for ever.
    program = (
        "import os, signal, time\n"
        "r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        os.write(w, b'%d' % os.getpid())\n"
        "        os._exit(0)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "pid = int(os.read(r, 9))\n"
        "while os.path.exists(f'/proc/{pid}'): os.sched_yield()\n"
        "print('reaped', flush=True)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    signal.pause()\n"
    )
    python = world.tool()[:-1]
    done = world.fw("run", "--pid", f"{small}:/opt/image", "--", *python, "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "reaped\n", "")
    assert world.pids() == []  # at once: the namespace ends before its init does


def test_pid_namespace_ends_with_a_signal_that_is_passed_on(world: World, small: Path) -> None:
    process = world.start("fusewire", "run", "--pid", f"{small}:/opt/image", "--", "sh", "-c", "echo up; sleep 600")
    assert process.line() == "up"
    process.kill(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def background(world: World, *options: str, small: Path) -> str:
    """What a background child of the command sees of the mount once the command has ended."""
    go = world.home() / "go"
    os.mkfifo(go)
    os.chown(go, USER, USER)
    script = f"(read x < {go}; cat /opt/image/hello.txt; echo status $?) 2>&1 & echo command has ended"
    process = world.start("fusewire", "run", *options, f"{small}:/opt/image", "--", "sh", "-c", script)
    assert process.line() == "command has ended"
    if "all" not in options:
        process.wait()
    with open(go, "w") as file:
        file.write("go\n")
    done = process.finish()
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("options", [["--wait", "all"], ["--wait", "all", "--pid"]])
def test_wait_all_keeps_the_mounts_for_background_children(world: World, small: Path, options: list[str]) -> None:
    assert background(world, *options, small=small) == HELLO + "status 0\n"


def test_mounts_end_with_the_command_by_default(world: World, small: Path) -> None:
    seen = background(world, small=small)
    assert HELLO not in seen
    assert seen.endswith("status 1\n")


# --- targets


def contents(directory: str | Path) -> list[tuple[str, int]]:
    return sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(directory))


@pytest.mark.parametrize("target", ["/opt/fusewire-missing", "/opt/fusewire-missing/a/b", "/fusewire-missing", "/srv"])
def test_target_in_a_directory_that_is_not_ours_is_made_inside_only(world: World, small: Path, target: str) -> None:
    parent = "/opt" if target.startswith("/opt") else "/"
    before = contents(parent)
    done = run(world, small, f"cat {target}/hello.txt; ls -A {parent}", target=target)
    assert done.stdout.startswith(HELLO)
    made = target.removeprefix(parent).strip("/").split("/")[0]
    names = {name for name, _ in before} | {made}
    assert sorted(done.stdout.splitlines()[1:]) == sorted(names)
    assert contents(parent) == before


def test_rest_of_a_covered_directory_works_as_before(world: World, small: Path) -> None:
    shared = world.base / "shared"  # not the user's
    shared.mkdir(mode=0o755)
    (shared / "file").write_text("a file\n")
    (shared / "link").symlink_to("file")
    (shared / "mine").mkdir()
    os.chown(shared / "mine", USER, USER)
    script = f"cd {shared}; cat file link; touch mine/new; touch new 2>/dev/null || echo refused; ls"
    done = run(world, small, script, target=str(shared / "image"))
    assert done.stdout == "a file\na file\nrefused\nfile\nimage\nlink\nmine\n"
    assert (shared / "mine" / "new").exists()
    assert not (shared / "image").exists()


def test_target_in_a_directory_of_ours_is_removed_afterwards(world: World, small: Path) -> None:
    target = world.home() / "new" / "deep" / "place"
    done = run(world, small, f"cat {target}/hello.txt", target=str(target))
    assert done.stdout == HELLO
    assert contents(world.home()) == []


@pytest.mark.parametrize("target", ["relative", "./relative/deeper", "../home-4242/x", "with space", "new\nline", "ü"])
def test_target_may_be_relative_and_have_any_name(world: World, small: Path, target: str) -> None:
    done = world.fw("run", f"{small}:{target}", "--", "cat", f"{target}/hello.txt")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")
    assert contents(world.home()) == []


def test_target_with_files_in_it_is_covered(world: World, small: Path) -> None:
    target = world.home() / "full"
    target.mkdir()
    (target / "file").write_text("below\n")
    done = run(world, small, f"ls {target}", target=str(target))
    assert "hello.txt" in done.stdout
    assert "file" not in done.stdout.split()
    assert (target / "file").read_text() == "below\n"


def test_target_below_a_symlink_is_where_that_leads(world: World, small: Path) -> None:
    (world.home() / "real").mkdir()
    os.chown(world.home() / "real", USER, USER)
    (world.home() / "link").symlink_to("real")
    done = run(world, small, f"cat {world.home()}/real/x/hello.txt", target=f"{world.home()}/link/x")
    assert done.stdout == HELLO


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("/etc/passwd", "/etc/passwd is not a directory"),
        ("/etc/passwd/below", "/etc/passwd is not a directory"),
        ("/", "a mount over / is seen by nobody"),
        ("/proc/new", "no mount point can be made in /proc"),
    ],
)
def test_target_that_cannot_be_is_refused(world: World, small: Path, target: str, message: str) -> None:
    done = run(world, small, "true", target=target)
    assert done.returncode == 125
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("spec", ["image", ":/target", "image:", ":"])
def test_spec_that_is_none_is_refused_with_an_example(world: World, spec: str) -> None:
    done = world.fw("run", spec, "--", "true")
    assert done.returncode == 125
    assert "is not SOURCE:TARGET (for example" in done.stderr


def test_several_mounts_and_nested_ones_in_any_order(world: World, small: Path) -> None:
    specs = [f"{small}:/opt/a/directory/inner", f"{small}:/opt/b", f"{small}:/opt/a", f"{small}:{world.home()}/c"]
    places = ["/opt/a", "/opt/a/directory/inner", "/opt/b", f"{world.home()}/c"]
    done = world.fw("run", *specs, "--", "cat", *(f"{place}/hello.txt" for place in places))
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO * 4, "")
    assert contents(world.home()) == []


def test_mount_point_that_an_image_lacks_is_made_over_it(world: World, small: Path) -> None:
    done = world.fw(
        "run", f"{small}:/opt/a", f"{small}:/opt/a/new", "--", "cat", "/opt/a/new/hello.txt", "/opt/a/hello.txt"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO * 2, "")


def test_run_inside_run(world: World, small: Path) -> None:
    inner = fusewire(world, "run", "/opt/a/inner.sqsh:/opt/b", "--", "cat", "/opt/b/hello.txt", "/opt/a/name")
    outer = world.home() / "outer"
    outer.mkdir()
    (outer / "name").write_text("outer\n")
    (outer / "inner.sqsh").write_bytes(small.read_bytes())
    image = squashfs_images.mksquashfs(outer, world.home() / "outer.sqsh")
    image.chmod(0o644)
    done = world.fw("run", f"{image}:/opt/a", "--", *inner)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO + "outer\n", "")


def test_mount_inside_run_works_there(world: World, small: Path) -> None:
    words = " ".join(fusewire(world))
    script = f"{words} mount /opt/image/../../{small} mnt && cat mnt/hello.txt; {words} umount mnt && ls -A"
    done = run(world, small, script)
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")


# --- sources


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, image: None, "No such file or directory"),
        (lambda path, image: path.write_bytes(b""), ""),
        (lambda path, image: path.write_bytes(b"no image at all" * 1000), ""),
        (lambda path, image: path.write_bytes(image[:50]), ""),
        (lambda path, image: path.write_bytes(image[: len(image) // 2]), ""),
        (lambda path, image: (path.write_bytes(image), path.chmod(0)), "Permission denied"),
        (lambda path, image: os.mkfifo(path), "neither a file nor a block device"),
    ],
    ids=["missing", "empty", "no-image", "short", "truncated", "unreadable", "fifo"],
)
def test_source_that_cannot_be_mounted_is_named(
    world: World, small: Path, make: Callable[[Path, bytes], object], message: str
) -> None:
    source = world.home() / "source"
    make(source, small.read_bytes())
    for command in (["run", f"{source}:/opt/image", "--", "true"], ["mount", str(source), "mnt"]):
        done = world.fw(*command)
        assert done.returncode == 125
        assert str(source) in done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
    assert not (world.home() / "mnt").exists()


def test_image_behind_a_prefix_is_mounted_with_offset(world: World, small: Path) -> None:
    source = world.home() / "prefixed"
    source.write_bytes(b"#!/bin/sh\n" + bytes(5000) + small.read_bytes())
    assert run(world, source, "cat /opt/image/hello.txt", "-o", "offset=5010").stdout == HELLO
    done = run(world, source, "true", "-o", "offset=5009")
    assert done.returncode == 125
    assert str(source) in done.stderr


def test_image_behind_a_program_is_found(world: World, small: Path) -> None:
    source = world.home() / "Some.AppImage"
    source.write_bytes(Path("/bin/echo").read_bytes() + small.read_bytes())
    done = run(world, source, "cat /opt/image/hello.txt")
    assert (done.stdout, done.stderr) == (HELLO, "")


# --- what is in the image


def test_programs_and_scripts_of_the_image_run_and_files_can_be_mapped(world: World, small: Path, images: Path) -> None:
    done = run(world, small, "/opt/image/bin/echo from the image && cd /opt/image && bin/script")
    assert (done.stdout, done.stderr) == ("from the image\nscript ran in /opt/image\n", "")
    done = world.fw("run", f"{small}:/opt/image", "--", *world.tool("map", "/opt/image/data"))
    assert done.stdout.strip() == digest(os.fsencode(images / "small-tree" / "data"))


def test_four_readers_at_once_read_the_same(world: World, image_of: Callable[[str], Path], tree: Path) -> None:
    reader = " ".join(world.tool("digest", "/opt/image/big"))
    script = f"for i in 1 2 3 4; do {reader} & done; wait"
    done = run(world, image_of("zstd"), script)
    assert done.stdout.split() == [digest(os.fsencode(tree / "big"))] * 4


def test_two_mounts_of_one_image_are_two(world: World, small: Path) -> None:
    script = "cmp /opt/a/data /opt/b/data && stat -c %d /opt/a /opt/b"
    done = world.fw("run", f"{small}:/opt/a", f"{small}:/opt/b", "--", "sh", "-c", script)
    first, second = done.stdout.split()
    assert first != second


def test_nothing_can_be_written(world: World, small: Path) -> None:
    script = (
        "cd /opt/image; for c in 'touch new' 'rm data' 'mkdir d' 'chmod 0 data' 'mv data e' 'ln data f'; do $c; done"
    )
    done = run(world, small, script, "--map-root")
    assert done.stderr.count("Read-only file system") == 6


# --- options


def mountinfo_line(world: World, small: Path, *options: str, **how: object) -> tuple[list[str], str, str, list[str]]:
    """The mount's flags, type, source and superblock options, as they are inside."""
    done = run(world, small, "grep ' /opt/image ' /proc/self/mountinfo", *options, **how)
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.strip().partition(" - ")
    kind, source, inner = after.split(" ")
    return before.split(" ")[5].split(","), kind, source, inner.split(",")


def test_options_are_the_kernels(world: World, small: Path) -> None:
    flags, kind, source, inner = mountinfo_line(world, small)
    assert {"ro", "nosuid", "nodev"} <= set(flags)
    assert (kind, source) == ("fuse.fusewire", str(small))
    assert {"ro", f"user_id={USER}", f"group_id={USER}"} <= set(inner)
    assert not {"allow_other", "default_permissions"} & set(inner)
    flags, kind, source, inner = mountinfo_line(
        world,
        small,
        "-o",
        r"noexec,noatime,sync,dirsync,fsname=my\, name,subtype=sub",
        "-o",
        "allow_other,default_permissions,max_read=65536",
    )
    assert {"noexec", "noatime", "nosuid", "nodev"} <= set(flags)
    assert (kind, source) == ("fuse.fusewire.sub", r"my,\040name")
    assert {"sync", "dirsync", "allow_other", "default_permissions", "max_read=65536"} <= set(inner)
    done = run(world, small, "/opt/image/bin/echo", "-o", "noexec")
    assert done.returncode == 126


def test_owner_options_change_what_is_shown(world: World, small: Path) -> None:
    script = "stat -c '%u %g %a' /opt/image/bin/script /opt/image/private"
    assert run(world, small, script).stdout == "65534 65534 755\n65534 65534 600\n"
    assert run(world, small, script, "--squash-owner").stdout == f"{USER} {USER} 755\n{USER} {USER} 600\n"
    done = run(world, small, script, "-o", f"uid={USER},umask=027")
    assert done.stdout == f"{USER} 65534 750\n{USER} 65534 600\n"
    done = run(world, small, script, "-o", f"gid={USER}")
    assert done.stdout == f"65534 {USER} 755\n65534 {USER} 600\n"
    # As stored, everything can be read by the one who mounts; the kernel checks modes only if it is told to.
    assert run(world, small, "cat /opt/image/private").stdout == "owner only\n"
    done = run(world, small, "cat /opt/image/private", "-o", "default_permissions")
    assert "Permission denied" in done.stderr


def test_root_runs_programs_of_other_users_on_its_mounts(world: World, small: Path) -> None:
    script = (
        f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "
        "sh -c 'cat /opt/image/hello.txt; cat /opt/image/private'"
    )
    done = run(world, small, script, uid=0)
    assert done.stdout == HELLO
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("alow_other", "did you mean `allow_other`?"),
        ("max_reed=1", "did you mean `max_read="),
        ("max_read=many", "option `max_read=many`"),
        ("offset", "option `offset`: needs a value"),
        ("ro=1", "option `ro=1`: takes no value"),
        ("fd=3", "option `fd=3`: is Fusewire's own business"),
    ],
)
@pytest.mark.parametrize("command", ["run", "mount"])
def test_wrong_option_is_named_with_the_nearest_known_one(
    world: World, small: Path, command: str, option: str, message: str
) -> None:
    place = [f"{small}:/opt/image"] if command == "run" else [str(small), "mnt"]
    done = world.fw(command, "-o", option, *place)
    assert done.returncode == (125 if command == "run" else 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run"], 125),
        (["run", "--nonsense", "a:/b"], 125),
        (["run", "--wait", "nothing", "a:/b"], 125),
        (["exec"], 125),
        (["exec", "--nonsense", "mnt"], 125),
        (["exec", "nothing", "--", "true"], 125),
        (["mount", "a"], 2),
        (["mount", "--nonsense", "a", "b"], 2),
        (["mount", "a", "b", "--", "true"], 2),
        (["umount"], 2),
        (["list", "more"], 2),
        (["path", "nothing"], 1),
        (["nonsense"], 2),
        ([], 2),
    ],
)
def test_wrong_command_line_is_125_where_another_commands_status_is_given_on(
    world: World, words: list[str], code: int
) -> None:
    done = world.fw(*words)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fusewire")


def test_debug_option_prints_every_request(world: World, small: Path) -> None:
    done = run(world, small, "cat /opt/image/hello.txt", "-o", "debug")
    assert done.stdout == HELLO
    for word in ("INIT", "LOOKUP", "READ"):
        assert f"{word} unique" in done.stderr


def test_fifty_runs_leave_nothing(world: World, small: Path) -> None:
    words = " ".join(fusewire(world, "run", f"{small}:/opt/image", f"{small}:new", "--", "cat", "new/hello.txt"))
    # Four at a time, as a build does; two of them may make and remove the same directory at once.
    done = world.sh(f"seq 50 | xargs -n 1 -P 4 sh -c '{words}' x")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO * 50, "")
    assert world.pids() == []
    assert world.mounts() == []
    assert contents(world.home()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGABRT])
def test_pid_namespace_passes_on_the_signal_that_ended_the_command(
    world: World, small: Path, number: signal.Signals
) -> None:
    done = world.fw("run", f"{small}:/opt/image", "--pid", "--", "sh", "-c", f"kill -{int(number)} $$")
    assert done.returncode == -number


def test_squashed_owner_of_a_namespace_with_root_is_root(world: World, small: Path) -> None:
    done = world.fw(
        "run", f"{small}:/opt/image", "--map-root", "--squash-owner", "--", "stat", "-c", "%u:%g", "/opt/image"
    )
    assert done.stdout == "0:0\n"
