"""README and docs say what is so: commands run, options exist and are documented, programs work, links lead somewhere.

A block after the comment `<!-- runs -->` is run by bash, in a directory that holds env.sqsh. `<!-- runs: ... -->` says
what else it takes, clauses with `; ` between them: `with FILES` (are made before), `served at URL` (so is what is in
the directory), `mounted at NAME` (env.sqsh is), `until NAME` (it appears, then Ctrl-C), `unmounts NAME` (afterwards),
`leaves NAMES` (are there in the end). A Python block after `<!-- file: NAME -->` is a file, which a test mounts or
runs. `<!-- run by: TEST -->` names the test that does what the block says. All others are only parsed, and
`<!-- not run: REASON -->` says why.
"""

from __future__ import annotations

import argparse
import configparser
import io
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tomllib
import xml.etree.ElementTree
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusewire
import rootless
from fusewire import cli
from fusewire.cli import options, share_options, share_table
from remote_server import RangeServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ROOT / "docs" / "commands.md"
IMAGE = Path(fusewire.__file__).parent / "data" / "demo.sqsh"
# Options of other programs that the pages speak of.
FOREIGN = {
    "--device",
    "--cap-add",
    "--security-opt",
    "--unshare-pid",
    "--add-subuids",
    "--add-subgids",
    "--fetch",
    "--block",
}


# Where a comment would be in the way: the two pages that are read unrendered most.
MARKS = {
    ("README.md", "fusewire run env.sqsh:/opt/env -- /opt/env/bin/python train.py"): (
        "runs: with env.sqsh train.py data/ Makefile base.tar.gz; served at https://host; until data.sock; unmounts env"
    ),
    ("README.md", "./dev demo"): "run by: tests/test_demo.py",
    ("README.md", "./dev test"): "not run: this is it",
    ("README.md", "python3 -m pip install ."): "run by: tests/test_docs.py",
    ("CONTRIBUTING.md", "./dev test"): "not run: the tool runs the tests, not the other way around",
}


class Block:
    """A fenced block: its language, the comment right before it or in its place, its text."""

    def __init__(self, page: Path, number: int, language: str, mark: str, text: str) -> None:
        self.page, self.number, self.language, self.text = page, number, language, text
        self.name = f"{page.name}:{number}"
        self.key = page.name, text.splitlines()[0].split("  ")[0]
        self.mark = mark or MARKS.get(self.key, "")


def blocks(language: str, mark: str = "") -> list[Block]:
    fences = r"^( *)```(\w*)\n(.*?)^\1```$"
    found = []
    for page in PAGES:
        text = page.read_text()
        matches = list(re.finditer(fences, text, re.DOTALL | re.MULTILINE))
        assert text.count("```") == 2 * len(matches), f"{page}: a block without an end"
        for match in matches:
            before = text[: match.start()].splitlines()[-1].strip()
            comment = before[4:-3].strip() if before.startswith("<!--") else ""
            block = Block(page, text.count("\n", 0, match.start()) + 1, match[2], comment, textwrap.dedent(match[3]))
            if block.language == language and block.mark.startswith(mark):
                found.append(block)
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser; the program's own is called ""."""
    parser = cli._parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {"": parser, **commands.choices}


def long_options(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings if word.startswith("--")}


def share_rows() -> list[share_table.Row]:
    """The rows of `fusewire share`, which reads its own command line, but for those without effect."""
    return [row for row in share_table.rows_of(share_table.SHARE) if not row.quiet]


def share_words() -> set[str]:
    """All spellings of its options, those of `-o` without a dash."""
    return {word for row in share_table.rows_of(share_table.SHARE) for word in row.words}


def section(page: Path, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    text = page.read_text()
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no `{heading}`"
    return found[1]


# --- options


@pytest.mark.parametrize("command", sorted(set(parsers()) - {""}))
def test_every_option_of_a_command_is_documented(command):
    text = section(COMMANDS, f"## fusewire {command}")
    missing = [word for word in long_options(parsers()[command]) if f"`{word}" not in text and f"[{word}]" not in text]
    assert sorted(set(missing) - {"--help"}) == []


def test_every_option_of_share_is_documented():
    text = section(COMMANDS, "## fusewire share")
    for row in share_rows():
        words = [word for word in row.words if not word.startswith(("--no-", "no_"))]
        assert any(re.search(rf"`(-o )?{re.escape(word)}[`=]", text) for word in words), row.key


def test_no_option_of_share_is_documented_that_does_not_exist():
    rows = re.findall(r"^\| (`-.*?) \|", section(COMMANDS, "## fusewire share"), re.MULTILINE)
    assert len(rows) > 30
    for name in re.findall(r"`(?:-o )?([a-z_-]+)[=`]", " ".join(rows)):
        assert name in share_words(), name


def test_every_command_has_a_section_and_no_other_has():
    headings = re.findall(r"^## fusewire (\w+)$", COMMANDS.read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(set(parsers()) - {""})
    assert "`fusewire --version`" in COMMANDS.read_text()


def test_every_mount_option_is_documented():
    text = section(COMMANDS, "## Mount options")
    offered = [word.split("=")[0] for word in re.findall(r"^  (\S+)  ", options.describe(), re.MULTILINE)]
    ignored = options.describe().rpartition("accepted without effect:")[2].split()
    assert len(offered) > 40
    assert len(ignored) > 20
    missing = []
    for name in [*offered, *ignored]:
        plain = name.removeprefix("no_") if "splice" in name else name
        if not re.search(rf"`{re.escape(plain)}(=[\w=]+)?`", text) and name != "x-*":
            missing.append(name)
    assert missing == []


def test_no_mount_option_is_documented_that_does_not_exist():
    known = set(options._KNOWN) | share_words()
    for page in PAGES:
        for text in re.findall(r"`-o ([a-z_]+)", page.read_text()):
            assert text in known | {"help"}, f"{page.name}: -o {text}"
    rows = re.findall(r"^\| (`.*?) \|", section(COMMANDS, "## Mount options"), re.MULTILINE)
    for name in re.findall(r"`([a-z_]+)[=`]", " ".join(rows)):
        assert name in known, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page):
    known = set().union(*map(long_options, parsers().values())) | FOREIGN
    known |= share_words() | set(re.findall(r"--[a-z][a-z-]+", (ROOT / "dev").read_text()))
    for code in re.findall(r"`([^`]+)`", prose(page)):
        if code.split()[0] in ("fusewire", "-o") or code.startswith("--"):
            for word in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code):
                assert word in known, code


# --- commands


def fusewire_commands(text: str) -> Iterator[list[str]]:
    """The words of each fusewire command in a shell text, up to the operator that ends it."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("();<>|&"):
                if words[:1] == ["fusewire"]:
                    yield words[1:]
                words = []
            else:
                words.append(word)


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.name)
def test_shell_blocks_are_shell_and_their_commands_are_ours(block, capsys):
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for words in fusewire_commands(block.text):
        if any(word.startswith("[") for word in words):
            continue  # a synopsis
        if "--" in words:
            words = words[: words.index("--")]
        if words[:1] == ["share"]:
            share_options.parse(words[1:])
            continue
        try:
            parsers()[""].parse_args(words)
        except SystemExit:
            pytest.fail(f"fusewire {' '.join(words)}: {capsys.readouterr().err}")


def test_every_use_of_the_tool_is_one_that_it_knows():
    known = set(re.findall(r"\./dev (\w+)", (ROOT / "dev").read_text())) | {"COMMAND"}
    assert {"demo", "test", "check", "lint", "types", "imports", "bench", "fuzz", "run", "format"} <= known
    for page in [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / ".ci" / "run"]:
        assert set(re.findall(r"\./dev (\w+)", page.read_text())) <= known, page


def test_the_two_commands_are_on_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "./dev demo" in lines[:40]
    assert "./dev test" in lines[:40]


def place(words: list[str], tmp_path: Path, *files: str) -> Path:
    """A directory to work in for the user whom `words` make, with an image, `files` and the commands of the pages."""
    home = Path(rootless.rootless_home()) if "setpriv" in words else tmp_path
    work = home / f"docs-{os.urandom(4).hex()}"
    (work / "bin").mkdir(parents=True)
    shutil.copy(IMAGE, work / "env.sqsh")
    for name, start in (("fusewire", "-m fusewire "), ("python", "")):
        shim = work / "bin" / name
        shim.write_text(f'#!/bin/sh\nexec {words[-3]} {start}"$@"\n')
        shim.chmod(0o755)
    for name in files:
        make_file(work / name, words[-3])
    if os.geteuid() == 0 and "setpriv" in words:
        for path in (work, *work.rglob("*")):
            os.lchown(path, rootless.NOBODY, rootless.NOBODY)
    return work


def shell(words: list[str], work: Path, text: str) -> subprocess.Popen[str]:
    """Start bash with a text as the user whom `words` make, in a group of its own."""
    text = f"export PATH={work}/bin:$PATH XDG_RUNTIME_DIR={work}\ncd {work}\n{text}"
    return subprocess.Popen(
        [*words[:-3], "bash", "-euo", "pipefail", "-c", text],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        process_group=0,
    )


@pytest.mark.parametrize("who", ["rootless", "root"])
@pytest.mark.parametrize("block", blocks("sh", "runs"), ids=lambda block: block.name)
def test_shell_blocks_run(block, who, tmp_path):
    if who == "root" and os.geteuid() != 0:
        pytest.skip("only root can try it as root")
    rootless.open_fuse_device()
    words = rootless.rootless_python() if who == "rootless" else ["env", sys.executable, "-W", "error"]
    clauses = dict(re.findall(r"(mounted at|with|served at|until|unmounts|leaves) ([^;]+)", block.mark))
    for tool in ("mksquashfs", "make"):
        if shutil.which(tool) is None and (tool in block.text or "env.sqsh" in clauses.get("with", "")):
            pytest.skip(f"{tool} is missing")
    work = place(words, tmp_path, *clauses.get("with", "").split())
    before = {path.name for path in work.iterdir()}
    text, mounted = block.text, clauses.get("mounted at", "")
    if mounted:
        text = f"fusewire mount env.sqsh {mounted}\nexec 5<{mounted}/README\n{text}"
        text += f"exec 5<&-\nfusewire umount {mounted}\n"

    try:
        with RangeServer(
            {f"/{name}": (work / name).read_bytes() for name in before if (work / name).is_file()}
        ) as server:
            if "served at" in clauses:
                text = text.replace(clauses["served at"], server.url)
            out, err = finished(shell(words, work, text), work / clauses["until"] if "until" in clauses else None)
        assert out.strip() or "until" in clauses, err
        if "unmounts" in clauses:
            assert finished(shell(words, work, f"fusewire umount {clauses['unmounts']}")) == ("", "")
        after = {path.name for path in work.iterdir()} - before
        assert after - {"fusewire"} == set(clauses.get("leaves", "").split())
        assert str(work) not in Path("/proc/self/mountinfo").read_text()
    finally:
        tidy(words, work)


def finished(program: subprocess.Popen[str], until: Path | None = None) -> tuple[str, str]:
    """What it has printed, once it has ended in order: by itself, or by Ctrl-C as soon as `until` is there."""
    try:
        if until is not None:
            while not until.exists() and program.poll() is None:
                os.sched_yield()
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=90)
        assert program.returncode == 0, out + err
        return out, err
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()


def tidy(words: list[str], work: Path) -> None:
    """End what is mounted there still, after a failure, and remove the directory."""
    try:
        for path in work.iterdir():  # not `--all`, which is all of this user's
            if path.is_symlink() or path.is_mount():
                shell(words, work, f"fusewire umount --lazy {path.name}").communicate(timeout=30)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_file(path: Path, python: str) -> None:
    """Make what blocks speak of, by its name: an archive of the files `one` and `two`, an image with a Python, ..."""
    contents = {"one": b"1\n", "two": b"2\n"}
    if path.name == "env.sqsh":
        with tempfile.TemporaryDirectory() as tree:
            (Path(tree) / "bin").mkdir()
            (Path(tree) / "bin" / "python").symlink_to(python)
            subprocess.run(["mksquashfs", tree, path, "-quiet", "-no-progress", "-noappend"], check=True)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
    elif ".tar" in path.suffixes:
        with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
            for name, data in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    elif path.suffix == ".py":
        path.write_text("print('it runs')\n")
    elif path.name == "Makefile":
        path.write_text("all:\n\tls -l /srv/data\ninstall:\n\ttouch /opt/base/three\n")
    else:
        path.mkdir()
        (path / "one").write_bytes(contents["one"])


@pytest.mark.parametrize(
    "block", [*blocks("sh"), *blocks("python")], ids=lambda block: f"{block.language}-{block.name}"
)
def test_block_is_run_or_says_why_not(block):
    if block.page == COMMANDS and f"## {' '.join(block.text.split()[:2])}" in block.page.read_text():
        return  # the synopsis of a command
    assert re.match(r"runs$|(runs|file|run by|not run): .", block.mark), f"{block.name} is not run, for no reason"
    if block.mark.startswith("run by: "):
        assert (ROOT / block.mark.removeprefix("run by: ")).is_file()
    if block.language == "python":
        compile(block.text, block.name, "exec")


def test_every_mark_is_for_a_block_that_there_is():
    assert set(MARKS) <= {block.key for block in blocks("sh")}


@pytest.mark.timeout(600)
def test_the_package_is_installed_as_the_readme_says(tmp_path):
    if not os.environ.get("FUSEWIRE_INSTALL"):
        pytest.skip("it takes a minute and a network: FUSEWIRE_INSTALL=1 runs it")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (block,) = [block for block in blocks("sh") if block.mark == "run by: tests/test_docs.py"]
    script = f"export PATH={tmp_path}/venv/bin:$PATH\n{block.text}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fusewire run:   works" in done.stdout


def test_blocks_of_data_are_well_formed():
    for block in blocks("xml"):
        xml.etree.ElementTree.fromstring(f"<all>{block.text}</all>")
    for block in blocks("toml"):
        tomllib.loads(block.text)
    for block in blocks("ini"):
        configparser.RawConfigParser(strict=False).read_string(block.text)


def test_arguments_of_the_guide_are_those_that_are_printed(tmp_path, monkeypatch):
    (asked,) = (block for block in blocks("sh", "runs") if "--tag data --print-qemu" in block.text)
    (shown,) = (block for block in blocks("text") if "-chardev" in block.text)
    monkeypatch.chdir(tmp_path)
    command = asked.text.splitlines()[1]
    words = [sys.executable, "-m", *command.split()]
    (tmp_path / "data").mkdir()
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = [line for line in out.splitlines() if not line.startswith("#")]
    assert "\n".join(lines).replace(f"{tmp_path}/", "/home/me/") == textwrap.indent(shown.text, "  ").rstrip()


def test_pod_of_the_guide_runs_a_command_that_exists():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    (block,) = blocks("yaml")
    pod = yaml.safe_load(block.text)
    (container,) = pod["spec"]["containers"]
    words = container["command"]
    assert words[0] == "fusewire"
    parsers()[""].parse_args(words[1 : words.index("--")])
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert words[2].startswith(mount["mountPath"] + "/")


# --- programs

# The test that mounts or runs a page's files, and the files.
PROGRAMS = {
    "README.md": ("test_docs.py", {"hello.py"}),
    "writing-a-filesystem.md": ("test_docs.py", {"test_share.py", "test_tree.py", "tree.py"}),
    "nodes.md": (
        "test_nodes_mount.py",
        {"node_clock.py", "node_hello.py", "node_notes.py", "node_slow.py", "node_users.py", "test_node_notes.py"},
    ),
    "python-api.md": ("test_public_api.py", {"api_async.py", "api_mounted.py", "test_api.py"}),
    "fusepy.md": ("test_compat_fusepy.py", {"greeting.py"}),
    "remote.md": ("test_docs.py", {"remote_options.py"}),
    "clusters.md": ("test_clusters.py", {"cluster.py"}),
}


def files() -> dict[str, str]:
    return {block.mark.removeprefix("file: "): block.text for block in blocks("python", "file: ")}


def test_all_python_blocks_are_files_that_are_tested():
    found: dict[str, set[str]] = {}
    for block in blocks("python", "file: "):
        found.setdefault(block.page.name, set()).add(block.mark.removeprefix("file: "))
    assert found == {page: names for page, (_, names) in PROGRAMS.items()}
    for test, names in PROGRAMS.values():
        text = (ROOT / "tests" / test).read_text()
        assert [name for name in names if name not in text] == []


def test_program_about_options_of_remote_sources_runs():
    done = subprocess.run([sys.executable, "-W", "error", "-c", files()["remote_options.py"]], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


LOOK = """
import os, sys
from fusewire import testing
for name, check in testing.READ_ONLY.items():
    if name != sys.argv[2]:
        check("m/")
for directory, directories, names in sorted(os.walk("m/")):
    print(directory, sorted(directories), sorted(names))
print(open("m/" + sys.argv[1]).read(), end="")
"""


@pytest.mark.parametrize("who", ["rootless", "root"])
@pytest.mark.parametrize(
    ("name", "file", "but", "listing"),
    [
        # Not mounted read-only, to keep it short, so that a file can be opened for writing, though not written.
        ("hello.py", "hello.txt", "changes_are_refused", "m/ [] ['hello.txt']\nhello world\n"),
        ("tree.py", "latest", "", "m/ ['docs'] ['README', 'latest']\nm/docs [] ['one', 'two']\n2\n"),
    ],
    ids=["hello.py", "tree.py"],
)
def test_an_example_can_be_mounted_used_and_ended_by_ctrl_c(name, file, but, listing, who, tmp_path):
    if who == "root" and os.geteuid() != 0:
        pytest.skip("only root can try it as root")
    rootless.open_fuse_device()
    words = rootless.rootless_python() if who == "rootless" else [sys.executable, "-W", "error"]
    work = place(words, tmp_path)
    (work / name).write_text(files()[name])
    inside = ["env", "-C", str(work), *words] if who == "root" else [*words[:-3], "env", "-C", str(work), *words[-3:]]
    (work / "m").mkdir()
    if who == "rootless" and os.geteuid() == 0:
        os.chown(work / "m", rootless.NOBODY, rootless.NOBODY)
    before = (work / "m").lstat()
    program = subprocess.Popen([*inside, name, "m"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_mount(work / "m", before, program)
        looked = subprocess.run([*inside, "-c", LOOK, file, but], capture_output=True, text=True, timeout=60)
        assert looked.stdout == listing, looked.stderr
        program.send_signal(signal.SIGINT)
        errors = program.communicate(timeout=30)[1]
        assert (program.returncode, errors) == (0, "")
        after = (work / "m").lstat()
        assert stat.S_ISDIR(after.st_mode)
        assert after.st_dev == before.st_dev
        assert os.listdir(work / "m") == []
    finally:
        program.kill()
        program.communicate()
        subprocess.run(["umount", "-l", work / "m"], capture_output=True)
        shutil.rmtree(work, ignore_errors=True)


@pytest.mark.parametrize(("name", "file"), [("hello:Hello", "hello.txt"), ("tree:Tree", "docs/one")])
def test_an_example_can_be_mounted_by_the_command_line(name, file, tmp_path):
    words = rootless.rootless_python()
    work = place(words, tmp_path)
    module = f"{name.partition(':')[0]}.py"
    (work / module).write_text(files()[module])
    try:
        said = finished(shell(words, work, f"fusewire mount {name} m\ncat m/{file}\nfusewire umount m"))
        assert said == ({"hello.txt": "hello world\n", "docs/one": "1\n"}[file], "")
        assert not os.path.lexists(work / "m")
    finally:
        tidy(words, work)


def wait_for_mount(target: Path, before: os.stat_result, program: subprocess.Popen[str]) -> None:
    """Until something else is at the target: a link, or the root of a mount."""
    while True:
        try:
            now = target.lstat()
        except FileNotFoundError:  # the directory has gone and the link has not come
            now = before
        if (now.st_dev, now.st_ino, now.st_mode) != (before.st_dev, before.st_ino, before.st_mode):
            return
        if program.poll() is not None:
            pytest.fail(f"the example has ended: {program.communicate()[1]}")
        os.sched_yield()


def test_the_tests_in_the_guide_pass(tmp_path):
    for name in ("tree.py", "test_tree.py", "test_share.py"):
        (tmp_path / name).write_text(files()[name])
    path = os.pathsep.join([str(Path(fusewire.__file__).parent.parent), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-c", "/dev/null"]
        + ["--rootdir", tmp_path, "test_tree.py", "test_share.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


# --- pages


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda p: f"{p.parent.name}-{p.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        if anchor:
            assert anchor in anchors(to), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_change_notes_have_a_kind_and_a_text():
    for note in (ROOT / "changelog.d").iterdir():
        if note.name == ".gitignore":
            continue
        assert re.fullmatch(r"\+[a-z0-9-]+\.(feature|bugfix|doc|removal|misc)\.md", note.name), note.name
        assert note.read_text().strip()
