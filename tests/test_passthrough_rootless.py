"""Host directories in namespaces: whose files they seem to be there, and that they can be written to at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e2e import ROOT, USER, World

needs_root = pytest.mark.skipif(not ROOT, reason="makes files of other users, which only root can")
OWNER = "stat -c %u:%g"


@pytest.fixture
def tree(world: World) -> Path:
    """A directory of the user's, with a file of his and one of root's that everybody may write to."""
    source = world.home() / "tree"
    source.mkdir()
    (source / "mine").write_text("mine\n")
    (source / "foreign").write_text("foreign\n")
    for path in (source, source / "mine"):
        os.chown(path, USER, USER)
    (source / "foreign").chmod(0o666)
    return source


@needs_root
@pytest.mark.parametrize(("options", "own"), [((), f"{USER}:{USER}"), (("--map-root",), "0:0")])
def test_everything_in_a_namespace_has_an_owner_that_is_known_there(
    world: World, tree: Path, options: tuple[str, ...], own: str
) -> None:
    script = (
        f"echo more >> /srv/t/foreign && echo new > /srv/t/new && {OWNER} /srv/t /srv/t/mine /srv/t/foreign /srv/t/new"
    )
    done = world.fw("run", f"{tree}:/srv/t", *options, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout.split()) == (0, [own] * 4), done.stderr
    assert (tree / "foreign").read_text() == "foreign\nmore\n"
    assert (tree / "new").stat().st_uid == USER
    assert (tree / "foreign").stat().st_uid == 0


@needs_root
def test_rules_of_translation_hold_both_ways(world: World, tree: Path) -> None:
    os.chown(tree / "mine", 70000, 70000)
    script = f"{OWNER} /srv/t/mine; chown 5:5 /srv/t/foreign && {OWNER} /srv/t/foreign; chown 0:0 /srv/t/mine"
    rule = ["-o", "translate_uid=map:5:70000:1,translate_gid=map:5:70000:1,allow_other", "--strategy", "direct"]
    target = world.home(0) / "mnt"
    with world.mounted(tree, target, *rule, uid=0):
        done = world.sh(script.replace("/srv/t", str(target)), uid=0)
    assert (done.returncode, done.stdout.split()) == (0, ["5:5", "5:5"]), done.stderr
    assert (tree / "foreign").stat().st_uid == 70000
    assert (tree / "mine").stat().st_uid == 0


@needs_root
def test_a_mount_of_a_namespace_can_be_written_to_before_anybody_has_looked_at_it(world: World, tree: Path) -> None:
    with world.mounted(tree, "mnt", "--strategy", "namespace"):
        done = world.sh(f"touch mnt/first && echo more >> mnt/foreign && {OWNER} mnt/ mnt/first mnt/foreign")
    assert (done.returncode, done.stdout.split()) == (0, [f"{USER}:{USER}"] * 3), done.stderr
    assert (tree / "first").stat().st_uid == USER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("uid=5", "`uid=` is for images"),
        ("squash_owner", "`squash_owner` is for images"),
        ("cache=sometimes", "must be one of none"),
        ("xattrmap=nonsense", "nonsense"),
        ("translate_uid=map:1", "map:1"),
        ("inode_file_handles=mandatory", "CAP_DAC_READ_SEARCH"),
        ("allow_other,no_default_permissions", "nobody would check permissions"),
    ],
)
def test_options_that_cannot_be_met_are_named(world: World, options: str, message: str) -> None:
    (world.home() / "tree").mkdir()
    for arguments in (["run", "./tree:/srv/t", "-o", options, "--", "true"], ["mount", "-o", options, "tree", "mnt"]):
        done = world.fw(*arguments)
        assert done.returncode in (2, 125)
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_read_only_holds_for_all_that_could_be_changed(world: World) -> None:
    source = world.home() / "tree"
    source.mkdir()
    (source / "file").write_text("text\n")
    for words in (
        "touch /srv/t/new",
        "rm /srv/t/file",
        "chmod 600 /srv/t/file",
        "mkdir /srv/t/d",
        "sh -c '>>/srv/t/file'",
    ):
        done = world.fw("run", f"{source}:/srv/t", "-o", "ro", "--", "sh", "-c", words)
        assert done.returncode != 0
        assert "Read-only file system" in done.stderr
    assert world.fw("run", f"{source}:/srv/t", "-o", "ro", "--", "cat", "/srv/t/file").stdout == "text\n"
