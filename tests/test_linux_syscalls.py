"""The thin functions over system calls: what they return, and what their errors say."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess

from fusewire.linux import syscalls
from rootless import rootless_python


def unprivileged(code: str) -> str:
    script = "import os\nfrom fusewire.linux import syscalls, userns\n" + code
    words = [*rootless_python(), "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=20)
    assert result.returncode == 0, result.stderr
    return result.stdout


def capabilities() -> dict[str, int]:
    with open("/proc/self/status") as status:
        return {line[3:6]: int(line[7:], 16) for line in status if line.startswith("Cap")}


CAPABILITIES = inspect.getsource(capabilities)


def test_capabilities_are_the_same_from_the_call_and_from_proc() -> None:
    call, proc = syscalls.capget(), capabilities()
    assert (call.effective, call.permitted, call.inheritable) == (proc["Eff"], proc["Prm"], proc["Inh"])


def test_rootless_python_has_nothing_to_gain() -> None:
    out = unprivileged(f"""{CAPABILITIES}
caps = capabilities()
print(caps["Eff"] | caps["Prm"] | caps["Inh"] | caps["Amb"], syscalls.get_no_new_privs(), os.getgroups())
""")
    assert out.startswith("0 True ")
    if os.geteuid() == 0:
        assert out == "0 True []\n"
        assert unprivileged(CAPABILITIES + "print(capabilities()['Bnd'])") == "0\n"


def test_capabilities_can_be_given_up() -> None:
    out = unprivileged("""
userns.enter(userns.root_plan())
full = syscalls.capget()
print(syscalls.has_capability(syscalls.CAP_SYS_ADMIN), full.permitted > 1 << 32)
keep = 1 << syscalls.CAP_SYS_ADMIN | 1 << 38
syscalls.capset(keep, keep, 0)
now = syscalls.capget()
print(now.effective == now.permitted == keep, syscalls.has_capability(syscalls.CAP_CHOWN))
""")
    assert out == "True True\nTrue False\n"


def test_the_kernels_own_words_are_in_the_error_of_a_refused_filesystem() -> None:
    out = unprivileged("""
userns.enter(userns.self_plan())
context = syscalls.fsopen(b"fuse")
try: syscalls.fsconfig_set_string(context, b"no_such_option", b"1")
except OSError as error: print(error)
syscalls.fsconfig_set_string(context, b"rootmode", b"40000")
try: syscalls.fsconfig_create(context)
except OSError as error: print(error)
try: syscalls.fsopen(b"nosuchfs")
except OSError as error: print(error)
""")
    lines = out.splitlines()
    assert lines[0] == (
        "[Errno 22] fsconfig no_such_option=1: Invalid argument (fuse: Unknown parameter 'no_such_option')"
    )
    assert lines[1].startswith("[Errno 22] fsconfig create: Invalid argument")
    assert lines[2] == "[Errno 19] fsopen nosuchfs: No such device"


def test_a_mount_can_be_made_read_only_and_copied_by_the_new_calls() -> None:
    out = unprivileged("""
place = os.path.join(os.environ["HOME"], "place").encode()
os.makedirs(place, exist_ok=True)
userns.enter(userns.self_plan())
syscalls.mount(b"none", place, b"tmpfs", 0)
open(place + b"/file", "w").close()
syscalls.mount_setattr(syscalls.AT_FDCWD, place, 0, syscalls.MOUNT_ATTR_RDONLY)
try: os.mkdir(place + b"/more")
except OSError as error: print(error.strerror)
tree = syscalls.open_tree(syscalls.AT_FDCWD, place, syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC)
syscalls.umount2(place)
print(os.listdir(place), os.listdir(f"/proc/self/fd/{tree}"))
""")
    assert out == "Read-only file system\n[] ['file']\n"


def test_a_failed_call_names_itself_its_subject_and_its_path() -> None:
    out = unprivileged("""
try: syscalls.mount(b"none", b"/tmp", b"tmpfs", 0)
except OSError as error: print(error)
try: syscalls.setns(0, syscalls.CLONE_NEWNS)
except OSError as error: print(error)
try: syscalls.pivot_root(b"/nowhere", b"/tmp")
except OSError as error: print(error.errno, error.filename)
""")
    lines = out.splitlines()
    assert lines[0] == "[Errno 1] mount tmpfs: Operation not permitted: '/tmp'"
    assert lines[1].startswith("[Errno 22] setns: ")
    assert lines[2] in (f"{errno.EPERM} /nowhere", f"{errno.ENOENT} /nowhere")
