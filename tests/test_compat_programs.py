"""Published programs that need fusepy or mfusepy run as they are, for a user who may do nothing, without libfuse.

They are not installed by the tests: `pip install --group programs` does that. Each is copied, with what it needs, to
where the user can read it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rootless
from compat_programs import Program, as_user, user_directory


@pytest.fixture
def home() -> Iterator[Path]:
    with user_directory() as place:
        yield place


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for PYTHONPATH that everybody can read."""
    with user_directory() as place:
        yield place


def install(site: Path, *modules: str) -> None:
    """Copy modules and packages to a site directory; skip the test if one is not installed."""
    for name in modules:
        outer, _, inner = name.partition(".")
        spec = importlib.util.find_spec(outer)
        if spec is None:
            pytest.skip(f"{outer} is not installed: pip install --group programs")
        if spec.submodule_search_locations:
            for place in spec.submodule_search_locations:
                target = site.joinpath(outer, inner) if inner else site / outer
                shutil.copytree(
                    Path(place, inner), target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
                )
        else:
            assert spec.origin is not None
            shutil.copy(spec.origin, site)
    for place, directories, files in os.walk(site):
        os.chmod(place, 0o755)
        for name in [*directories, *files]:
            os.chmod(os.path.join(place, name), 0o755 if name in directories else 0o644)


def give(*paths: Path) -> None:
    """Make the user the owner."""
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, rootless.NOBODY, rootless.NOBODY)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.mark.parametrize("threads", [False, True], ids=["one-thread", "threads"])
def test_fsspec_serves_a_local_directory(home: Path, site: Path, threads: bool) -> None:
    install(site, "fsspec")
    source = home / "source"
    source.mkdir()
    (source / "there").write_text("before\n")
    (source / "big").write_bytes(big := os.urandom(700_000))
    give(source, source / "there", source / "big")
    command = ["-m", "fusewire.compat", "-m", "fsspec.fuse", "local", str(source), "mnt"]
    with Program(command + ["-t"] * (not threads), home, site=site) as program:
        program.mounted(home / "mnt")
        script = (
            "cd mnt; cat there; sha1sum < big; echo new > made; mkdir d; echo deep > d/file; rm there; ls; cat d/file"
        )
        printed = as_user(script, home).splitlines()
        assert printed == ["before", f"{digest(big)}  -", "big", "d", "made", "deep"]
        program.assert_no_libfuse()
        program.end()
    assert program.returncode == 0, program.errors
    assert (source / "made").read_text() == "new\n"
    assert (source / "d" / "file").read_text() == "deep\n"


def test_fsspec_serves_memory_from_a_thread_of_the_program(home: Path, site: Path) -> None:
    install(site, "fsspec")
    (home / "program.py").write_text("""
import os, threading
import fusewire.compat
fusewire.compat.install()
import fsspec
from fsspec.fuse import run

fs = fsspec.filesystem("memory")
fs.pipe_file("/data/a", b"from memory")
threading.Thread(target=run, args=(fs, "/data/", "mnt"), daemon=True).start()
while not os.path.exists("mnt/a"):
    os.sched_yield()
with open("mnt/b", "w") as file:
    file.write("from outside")
print(open("mnt/a").read(), sorted(os.listdir("mnt")), flush=True)
input()
print(fs.cat_file("/data/b"), flush=True)
""")
    with Program(["program.py"], home, site=site) as program:
        assert program.line() == "from memory ['a', 'b']"
        assert as_user("cat mnt/b; rm mnt/a; ls mnt/", home) == "from outsideb\n"
        program.assert_no_libfuse()
        program.say("go on")
        assert program.line() == "b'from outside'"
    assert program.returncode == 0, program.errors
    assert not os.path.lexists(home / "mnt")


def test_ratarmount_serves_a_compressed_archive(home: Path, site: Path) -> None:
    install(site, "ratarmount", "ratarmountcore", "indexed_gzip")
    files = {"a": b"hello\n", "d/empty": b"", "d/big": os.urandom(900_000), "d/name \u00e9": b"accent\n"}
    with tarfile.open(home / "archive.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            (home / "file").write_bytes(data)
            archive.add(home / "file", name)
        (home / "link").symlink_to("d/big")
        archive.add(home / "link", "link")
    give(home / "archive.tar.gz")
    command = "import sys; from ratarmount.__main__ import cli; sys.exit(cli())"
    (home / "ratarmount.py").write_text(f"import sys; sys.path.pop(0)\n{command}\n")
    with Program(["-m", "fusewire.compat", "ratarmount.py", "-f", "archive.tar.gz", "mnt"], home, site=site) as program:
        program.mounted(home / "mnt")
        found = as_user('cd mnt; find . -type f | sort | while read n; do sha1sum "$n"; done; readlink link', home)
        assert found.splitlines() == [
            *(f"{digest(files[name])}  ./{name}" for name in sorted(files, key=lambda name: "./" + name)),
            "d/big",
        ]
        assert as_user("dd if=mnt/d/big bs=1000 skip=333 count=3 2> /dev/null | sha1sum", home).split()[0] == digest(
            files["d/big"][333_000:336_000]
        )
        as_user("! touch mnt/new 2> /dev/null", home)
        program.assert_no_libfuse()
        program.end()
    assert program.returncode == 0, program.errors


def test_ratarmount_goes_to_the_background_and_is_unmounted(home: Path, site: Path) -> None:
    install(site, "ratarmount", "ratarmountcore", "indexed_gzip")
    (home / "file").write_text("hello\n")
    with tarfile.open(home / "archive.tar.gz", "w:gz") as archive:
        archive.add(home / "file", "file")
    give(home / "archive.tar.gz")
    command = "-m ratarmount.__main__ archive.tar.gz mnt"
    with Program(["-m", "fusewire.compat", *command.split()], home, site=site) as program:
        program.lines()
    assert program.returncode == 0, program.errors
    assert as_user("cat mnt/file; $PYTHON -m fusewire umount mnt", home) == "hello\n"
    assert not os.path.lexists(home / "mnt")


def test_fuse_cache_mtime_serves_a_directory_with_a_cache(home: Path, site: Path) -> None:
    install(site, "fuse_cache_mtime")
    source, cache = home / "source", home / "cache"
    for place in (source, cache):
        place.mkdir()
    (source / "there").write_text("there\n")
    give(source, cache, source / "there")
    command = ["-m", "fusewire.compat", "-m", "fuse_cache_mtime.main", str(source), "mnt", "--cache-dir", str(cache)]
    with Program(command, home, site=site) as program:
        program.mounted(home / "mnt")
        script = (
            "cat there; echo new > new; mkdir d; mv new d/moved; cat d/moved; chmod 600 d/moved; echo more >> there"
        )
        assert as_user(f"cd mnt; {script}; rm -r d; ls", home) == "there\nnew\nthere\n"
        program.assert_no_libfuse()
        program.end()
    assert program.returncode == 0, program.errors
    assert (source / "there").read_text() == "there\nmore\n"
    assert (cache / "there").exists()


def test_pymountd_serves_the_variables_of_a_session(home: Path, site: Path) -> None:
    install(site, "pyfuse")
    # The command that it asks for each variable, of another package, in the simplest form that it understands.
    commands = home / "bin"
    commands.mkdir()
    (
        commands / "pysh"
    ).write_text(f"""#!{sys.executable if rootless.readable_by_all(sys.executable) else "/usr/bin/python3"}
import json, sys
place = {str(home / "variables")!r}
variables = json.load(open(place))
if sys.argv[1] == "vars":
    print(json.dumps(list(variables)))
elif sys.argv[1] == "run":
    words = sys.argv[3]
    if words.startswith("repr("):
        print(repr(variables[words[5:-1]]))
    elif words.startswith("del "):
        del variables[words[4:]]
    else:
        name, _, value = words.partition(" = ")
        variables[name] = eval(value)
    json.dump(variables, open(place, "w"))
""")
    (commands / "pysh").chmod(0o755)
    (home / "variables").write_text('{"one": 1, "text": "some"}')
    give(home / "variables")
    (home / "start.py").write_text(f"""
import os, sys
os.environ["PATH"] = {str(commands)!r} + ":" + os.environ["PATH"]
sys.path.pop(0)
import pyfuse
sys.exit(pyfuse.main())
""")
    with Program(["-m", "fusewire.compat", "start.py", "session", "mnt"], home, site=site) as program:
        program.mounted(home / "mnt")
        assert as_user("cd mnt; ls; cat one text", home) == "one\ntext\n1'some'"
        assert as_user("cd mnt; echo 40 + 2 > one; cat one; rm text; ls", home) == "42one\n"
        program.assert_no_libfuse()
        program.end()
    assert program.returncode == 0, program.errors
    assert (home / "variables").read_text() == '{"one": 42}'


def test_explosive_fuse_serves_zip_files(home: Path, site: Path) -> None:
    install(site, "explosive.fuse")
    big = os.urandom(400_000)
    with zipfile.ZipFile(home / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", "hello\n")
        archive.writestr("d/big", big)
    give(home / "archive.zip")
    (home / "explode.py").write_text("from explosive.fuse.ctrl import main; main()\n")
    with Program(["-m", "fusewire.compat", "explode.py", "-f", "mnt", "archive.zip"], home, site=site) as program:
        program.mounted(home / "mnt")
        found = as_user("cd mnt/archive.zip; cat a; find . -type f | wc -l; sha1sum < d/big", home).split()
        assert found == ["hello", "2", digest(big), "-"]
        program.assert_no_libfuse()
        program.end()
    assert program.returncode == 0, program.errors


def test_the_programs_would_import_the_libraries_that_they_name() -> None:
    """What stands in for fuse and mfusepy has all that those modules are known to give to programs."""
    import fusewire.compat.fusepy
    import fusewire.compat.mfusepy

    common = {"FUSE", "FuseOSError", "LoggingMixIn", "Operations", "fuse_exit", "fuse_get_context", "ENOTSUP"}
    common |= {
        "c_stat",
        "c_statvfs",
        "c_timespec",
        "c_utimbuf",
        "fuse_file_info",
        "set_st_attrs",
        "time_of_timespec",
        "log",
    }
    assert common <= set(dir(fusewire.compat.fusepy))
    assert common | {"log_callback", "overrides", "fuse_config", "fuse_conn_info"} <= set(dir(fusewire.compat.mfusepy))
    assert "ctypes.util" not in fusewire.compat.fusepy.__dict__
    assert sys.modules.get("fuse") is not fusewire.compat.fusepy
