"""A pytest plugin: a mounted filesystem for each test, and the kernel's side of one without any mount.

Layer `testing`. pytest loads it by its entry point, in every run: what mounts is loaded when a test asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    from fusewire.mounts import Filesystem
    from fusewire.testing.kernel import FakeKernel

    class MountForTest(Protocol):
        """Takes a filesystem and what `fusewire.mounted` takes, and gives the path of its mount."""

        def __call__(self, fs: Filesystem, /, **options: Any) -> str: ...


@pytest.fixture
def mounted_filesystem() -> Iterator[MountForTest]:
    """Mount filesystems for one test: `path = mounted_filesystem(Hello())`. They are unmounted when it ends.

    No root and no mount point are needed, but /dev/fuse and user namespaces: the test is skipped, with what is missing,
    where there are none. A test fails if the process that served its filesystem has died.
    """
    from contextlib import ExitStack

    from fusewire import MountError, mounted

    with ExitStack() as stack:

        def mount_for_test(fs: Filesystem, /, **options: Any) -> str:
            try:
                mount = mounted(fs, **options)
            except MountError as error:
                pytest.skip(str(error))
            stack.enter_context(mount)
            return mount.path

        yield mount_for_test


@pytest.fixture
def fake_kernel() -> Iterator[Callable[..., FakeKernel]]:
    """Drive filesystems as the kernel would, in process: `kernel = fake_kernel(Hello())`; INIT has been answered.

    `session` options follow as keywords. `destroy` is called when the test ends.
    """
    from fusewire.mounts import as_operations
    from fusewire.session import Session
    from fusewire.testing.kernel import FakeKernel

    sessions: list[Session] = []

    def make(fs: Filesystem, /, **options: Any) -> FakeKernel:
        session = Session(as_operations(fs), **options)
        sessions.append(session)
        kernel = FakeKernel(session)
        kernel.init()
        return kernel

    yield make
    for session in reversed(sessions):
        session.close()
