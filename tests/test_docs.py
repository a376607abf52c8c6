"""README and docs say what is so: commands run, options exist and are documented, programs work, links lead somewhere.

A block after the comment `<!-- runs -->` is run by bash, in a directory that holds env.sqsh. `<!-- runs: ... -->` says
what else it takes, clauses with `; ` between them: `mounted at NAME` (env.sqsh is), `with FILES` (are made before),
`until NAME` (it appears, then Ctrl-C), `leaves NAMES` (are there afterwards). A Python block after
`<!-- file: NAME -->` is a file, which a test mounts or runs. All others are only parsed, and `<!-- not run: REASON -->`
says why.
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


class Block:
    """A fenced block: its language, the comment right before it, its text."""

    def __init__(self, page: Path, number: int, language: str, mark: str, text: str) -> None:
        self.page, self.number, self.language, self.mark, self.text = page, number, language, mark, text
        self.name = f"{page.name}:{number}"


def blocks(language: str, mark: str = "") -> list[Block]:
    found = []
    for page in PAGES:
        lines = page.read_text().splitlines()
        start = None
        for number, line in enumerate(lines):
            if not line.startswith("```"):
                continue
            if start is None:
                start = number
                continue
            before = lines[start - 1] if start else ""
            comment = before[4:-3].strip() if before.startswith("<!--") else ""
            if lines[start][3:] == language and comment.startswith(mark):
                found.append(Block(page, start + 1, language, comment, "\n".join(lines[start + 1 : number]) + "\n"))
            start = None
        assert start is None, f"{page}: a block without an end"
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


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


def place(words: list[str], tmp_path: Path) -> Path:
    """A directory to work in for the user whom `words` make, with an image and a `fusewire` command in it."""
    home = Path(rootless.rootless_home()) if "setpriv" in words else tmp_path
    work = home / f"docs-{os.urandom(4).hex()}"
    (work / "bin").mkdir(parents=True)
    shutil.copy(IMAGE, work / "env.sqsh")
    shim = work / "bin" / "fusewire"
    shim.write_text(f'#!/bin/sh\nexec {words[-3]} -m fusewire "$@"\n')
    shim.chmod(0o755)
    if os.geteuid() == 0 and "setpriv" in words:
        os.chown(work, rootless.NOBODY, rootless.NOBODY)
    return work


@pytest.mark.parametrize("who", ["rootless", "root"])
@pytest.mark.parametrize("block", blocks("sh", "runs"), ids=lambda block: block.name)
def test_shell_blocks_run(block, who, tmp_path):
    if who == "root" and os.geteuid() != 0:
        pytest.skip("only root can try it as root")
    rootless.open_fuse_device()
    words = rootless.rootless_python() if who == "rootless" else ["env", sys.executable, "-W", "error"]
    work = place(words, tmp_path)
    clauses = dict(re.findall(r"(mounted at|with|until|leaves) ([^;]+)", block.mark))
    mounted = clauses.get("mounted at", "")
    for name in clauses.get("with", "").split():
        make_file(work / name)
    before = {path.name for path in work.iterdir()}
    script = f"export PATH={work}/bin:$PATH XDG_RUNTIME_DIR={work}\ncd {work}\n"
    if mounted:
        script += f"fusewire mount env.sqsh {mounted}\nexec 5<{mounted}/README\n"
    script += block.text
    if mounted:
        script += f"exec 5<&-\nfusewire umount {mounted}\n"
    program = subprocess.Popen(
        [*words[:-3], "bash", "-euo", "pipefail", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        process_group=0,
    )
    try:
        if "until" in clauses:
            while not (work / clauses["until"]).exists() and program.poll() is None:
                os.sched_yield()
            os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=90)
        assert program.returncode == 0, out + err
        assert out.strip() or "until" in clauses
        after = {path.name for path in work.iterdir()} - before
        assert after - {"fusewire"} == set(clauses.get("leaves", "").split())
        assert str(work) not in Path("/proc/self/mountinfo").read_text()
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
        shutil.rmtree(work, ignore_errors=True)


def make_file(path: Path) -> None:
    """Make an archive of the two files `one` and `two`."""
    contents = {"one": b"1\n", "two": b"2\n"}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, f"w:{path.suffix[1:]}") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "block", [*blocks("sh"), *blocks("python")], ids=lambda block: f"{block.language}-{block.name}"
)
def test_block_is_run_or_says_why_not(block):
    if block.page == COMMANDS and f"## {' '.join(block.text.split()[:2])}" in block.page.read_text():
        return  # the synopsis of a command
    reason = NOT_RUN.get((block.page.name, block.text.splitlines()[0].split("  ")[0]))
    assert reason or re.match("runs$|runs: .|file: .|not run: .", block.mark), f"{block.name} is not run, for no reason"


# Where a comment would be in the way: the two pages that are read unrendered most.
NOT_RUN = {
    ("README.md", "fusewire run env.sqsh:/opt/env -- /opt/env/bin/python train.py"): "run piece by piece further down",
    ("README.md", "./dev demo"): "tests/test_demo.py runs it",
    ("README.md", "./dev test"): "this is it",
    ("README.md", "python3 -m pip install ."): "it changes the Python that runs it",
    ("CONTRIBUTING.md", "./dev test"): "the tool runs the tests, not the other way around",
}


def test_every_reason_not_to_run_a_block_is_for_one_that_there_is():
    there = {(block.page.name, block.text.splitlines()[0].split("  ")[0]) for block in blocks("sh")}
    assert set(NOT_RUN) <= there


def test_blocks_of_data_are_well_formed():
    for block in blocks("xml"):
        xml.etree.ElementTree.fromstring(f"<all>{block.text}</all>")
    for block in blocks("toml"):
        tomllib.loads(block.text)
    for block in blocks("ini"):
        configparser.RawConfigParser(strict=False).read_string(block.text)


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

# The files in pages, and the test that mounts or runs them.
PROGRAMS = {
    "README.md": {"test_docs.py": ["hello.py"]},
    "writing-a-filesystem.md": {"test_docs.py": ["test_share.py", "test_tree.py", "tree.py"]},
    "nodes.md": {
        "test_nodes_mount.py": [
            *("node_clock.py", "node_hello.py", "node_notes.py", "node_slow.py", "node_users.py", "test_node_notes.py"),
        ]
    },
    "python-api.md": {"test_public_api.py": ["api_async.py", "api_mounted.py", "test_api.py"]},
    "fusepy.md": {"test_compat_fusepy.py": ["greeting.py"]},
    "remote.md": {"test_docs.py": ["remote_options.py"]},
    "clusters.md": {"test_clusters.py": ["cluster.py"]},
}


def files() -> dict[str, str]:
    return {block.mark.removeprefix("file: "): block.text for block in blocks("python", "file: ")}


def test_all_python_blocks_are_files_that_are_tested():
    found: dict[str, list[str]] = {}
    for block in blocks("python", "file: "):
        found.setdefault(block.page.name, []).append(block.mark.removeprefix("file: "))
    assert {page: sorted(names) for page, names in found.items()} == {
        page: sorted(name for names in tests.values() for name in names) for page, tests in PROGRAMS.items()
    }
    for tests in PROGRAMS.values():
        for test, names in tests.items():
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
