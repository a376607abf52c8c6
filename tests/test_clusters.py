"""Workers of a Dask cluster, real processes that are each started inside `fusewire run`, as docs/clusters.md says.

All on the loopback interface. Skipped where `distributed` is not installed for the user's interpreter.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import fusewire
from e2e import PATH, USER, Result, World

IMAGE = Path(fusewire.__file__).parent / "data" / "demo.sqsh"
PAGE = Path(__file__).parent.parent / "docs" / "clusters.md"
BLOCKS = dict(re.findall(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE))
FIRST_LINE = "You are reading a file inside a squashfs image. Nothing was unpacked to disk:"

# A task that kills the process that it runs in, once; Dask starts another process and gives it the task again.
DEADLY = """
import os, signal, sys, time
import cloudpickle
import cluster

cloudpickle.register_pickle_by_value(cluster)  # workers cannot import it
read = cluster.first_line

def first_line(path):
    mark = os.path.join(os.environ["HOME"], "killed")
    if not os.path.exists(mark):
        open(mark, "w").close()
        time.sleep(2)  # Dask's nanny gives up, and all wait for ever, if its worker dies before it has seen it begin
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path)

cluster.first_line = first_line
cluster.main(sys.argv[1], sys.argv[2], 1)
"""


class Cluster:
    """A place with an image, the program of the guide and a command `fusewire`, for one user."""

    def __init__(self, world: World, uid: int) -> None:
        self.world, self.uid = world, uid
        self.place = world.home(uid)
        self.python = world.words(uid)[1][0]
        shutil.copy(IMAGE, self.place / "env.sqsh")
        (self.place / "env.sqsh").chmod(0o644)
        (self.place / "cluster.py").write_text(BLOCKS["cluster.py"])
        (self.place / "deadly.py").write_text(DEADLY)
        command = self.place / "fusewire"
        command.write_text(f'#!/bin/sh\nexec {self.python} -W error -m fusewire "$@"\n')
        command.chmod(0o755)
        if world.do(self.python, "-c", "import distributed", uid=uid).returncode:
            pytest.skip(f"`distributed` cannot be imported by {self.python} as uid {uid} (pip install distributed)")

    def run(self, *words: str) -> Result:
        """Run a program of the place to its end."""
        return self.world.do(self.python, *words, uid=self.uid, env={"PATH": f"{self.place}:{PATH}"})


@pytest.fixture(params=[USER, 0], ids=["rootless", "root"])
def cluster(world: World, request: pytest.FixtureRequest) -> Cluster:
    return Cluster(world, request.param)


def workers(done: Result) -> list[str]:
    """The addresses of all worker processes that the log tells of."""
    return re.findall(r"Start worker at: +(\S+)", done.stderr)


def test_workers_of_a_cluster_read_the_image_that_each_has_mounted(cluster: Cluster) -> None:
    done = cluster.run("cluster.py", "env.sqsh", "/opt/env/README", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["here: False", "in the workers: True True", FIRST_LINE, FIRST_LINE]
    assert len(set(workers(done))) == 2
    assert all(address.startswith("tcp://127.0.0.1:") for address in workers(done))
    assert cluster.world.listed(cluster.uid) == []


def test_worker_that_is_killed_begins_anew_with_the_image(cluster: Cluster) -> None:
    done = cluster.run("deadly.py", "env.sqsh", "/opt/env/README")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["here: False", "in the workers: True", FIRST_LINE]
    assert len(workers(done)) == 2


def test_failure_of_a_task_reaches_the_client_and_leaves_no_worker_behind(cluster: Cluster) -> None:
    done = cluster.run("cluster.py", "env.sqsh", "/opt/env/missing", "1")
    assert done.returncode == 1
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/opt/env/missing'" in done.stderr
    assert cluster.world.listed(cluster.uid) == []  # and the world looks for processes and directories
