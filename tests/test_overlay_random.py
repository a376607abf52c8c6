"""Random calls on our own overlay and on the kernel's, over the same tree: what they show has to be the same.

Ours lies over the directory, with either form of marks, and over an image of it; or it keeps its changes on a
filesystem that can neither exchange names nor leave whiteouts.

Afterwards each one's upper directory is given to the others, to fuse-overlayfs too, who have to show the same tree.
The length of a run is set by FUSEWIRE_RANDOM_STEPS; with FUSEWIRE_RANDOM_SEED=random each run is another one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from rootless import NOBODY, TESTS, rootless_python

STEPS = int(os.environ.get("FUSEWIRE_RANDOM_STEPS", "250"))
SEEDS = [random.randrange(1 << 32)] if os.environ.get("FUSEWIRE_RANDOM_SEED") == "random" else [1, 2]


@pytest.mark.parametrize("kind", ["directory", "names", "image", "bare"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("place", [0, NOBODY], ids=["root", "rootless"], indirect=True)
def test_our_overlay_shows_what_the_kernels_does(place: tuple[int, str], seed: int, kind: str) -> None:
    if kind == "image" and shutil.which("mksquashfs") is None:
        pytest.skip("mksquashfs (squashfs-tools) is missing")
    uid, base = place
    if kind == "bare" and uid:
        pytest.skip("the upper directory is on a mount that the server of the overlay makes, which only root can")
    words = rootless_python(uid) if uid else [sys.executable, "-W", "error"]
    program = shutil.copy(f"{TESTS}/overlay_driver.py", base)
    os.chmod(program, 0o755)
    orders = json.dumps({"base": base, "seed": seed, "steps": STEPS, "kind": kind})
    done = subprocess.run([*words, program, "compare", orders], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
