"""The structs and constants of `wire` against <linux/fuse.h>, as a C compiler sees it.

FUSEWIRE_UAPI_INCLUDE may name a directory that has a newer `linux/fuse.h` than the system's.
"""

import os
import re
import shutil
import struct
import subprocess
from typing import NamedTuple

import pytest

from fusewire.wire import abi
from fusewire.wire.table import LAYOUTS, OPCODE_LIMIT, TABLE, layout

# What came after 7.38, the oldest header that the test can read: the minor that brought it.
SINCE = {
    "fuse_supp_groups": 39,  # 7.38, but the stable 6.1 kernels' 7.38 is without
    "FUSE_CREATE_SUPP_GROUP": 39,
    "FUSE_EXT_GROUPS": 39,
    "fuse_statx": 39,
    "fuse_statx_in": 39,
    "fuse_statx_out": 39,
    "fuse_sx_time": 39,
    "FUSE_STATX": 39,
    "FUSE_DIRECT_IO_ALLOW_MMAP": 39,
    "fuse_backing_map": 40,
    "fuse_init_out.max_stack_depth": 40,
    "fuse_open_out.backing_id": 40,
    "FOPEN_PASSTHROUGH": 40,
    "FUSE_DEV_IOC_BACKING_CLOSE": 40,
    "FUSE_DEV_IOC_BACKING_OPEN": 40,
    "FUSE_HAS_RESEND": 40,
    "FUSE_NOTIFY_RESEND": 40,
    "FUSE_NO_EXPORT_SUPPORT": 40,
    "FUSE_PASSTHROUGH": 40,
    "FUSE_UNIQUE_RESEND": 40,
    "FUSE_ALLOW_IDMAP": 41,
    "FUSE_OVER_IO_URING": 42,
    "fuse_init_out.request_timeout": 43,
    "fuse_init_out.unused": 43,  # what it leaves
    "FUSE_REQUEST_TIMEOUT": 43,
    "FUSE_NOTIFY_INC_EPOCH": 44,
    "fuse_copy_file_range_out": 45,
    "fuse_notify_prune_out": 45,
    "FUSE_COPY_FILE_RANGE_64": 45,
    "FUSE_DEV_IOC_SYNC_INIT": 45,
    "FUSE_NOTIFY_PRUNE": 45,
}
# Structs that are others put together, or that belong to transports that are not spoken.
STRUCTS_LEFT_OUT = {"fuse_statfs_out", "fuse_direntplus"} | {
    "fuse_uring_ent_in_out",
    "fuse_uring_req_header",
    "fuse_uring_cmd_req",
}
CONSTANTS_LEFT_OUT = re.compile(
    r"FUSE_COMPAT_\w+|FUSE_\w*URING_\w+|\w+_BSWAP_RESERVED|FUSE_INIT_RESERVED|FUSE_DEV_IOC_MAGIC|FUSE_INVALID_UIDGID"
    r"|FUSE_(REC|DIRENT)_ALIGN|FUSE_NAME_OFFSET\w*|FUSE_DIRENT\w*_SIZE|FUSE_REMOVEMAPPING_MAX_ENTRY"
    # obsolete names of other constants
    r"|FUSE_WRITE_KILL_PRIV|FUSE_DIRECT_IO_RELAX"
)
OURS = {"FUSE_KERNEL_MINOR_VERSION", "MINOR_MIN", "MINOR_MAX", "NAME_MAX"}


class Header(NamedTuple):
    minor: int
    text: str
    measured: dict[str, tuple[int, ...]]


def fields_of(name: str) -> list[tuple[str, str]]:
    """Give (C member, struct code) of a layout; one leading underscore only marks padding."""
    pairs = [field.split(":") for field in LAYOUTS[name].split()]
    return [(label.removeprefix("_"), code) for label, code in pairs]


def constants() -> dict[str, int]:
    return {name: value for name, value in vars(abi).items() if name.isupper() and name not in OURS}


def compiler(arguments: list[str], source: str) -> str:
    include = os.environ.get("FUSEWIRE_UAPI_INCLUDE")
    command = ["gcc", "-std=gnu11", *(["-I", include] if include else []), *arguments, "-x", "c", "-"]
    run = subprocess.run(command, input=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing")
    include = os.environ.get("FUSEWIRE_UAPI_INCLUDE") or "/usr/include"
    if not os.path.exists(os.path.join(include, "linux/fuse.h")):
        pytest.skip("linux/fuse.h is missing (Debian: linux-libc-dev)")
    text = compiler(["-E", "-dD"], "#include <linux/fuse.h>\n")
    minor = int(re.search(r"#define FUSE_KERNEL_MINOR_VERSION (\d+)", text).group(1))
    if minor < 38:
        pytest.skip(f"linux/fuse.h speaks 7.{minor}; 7.38 or newer is needed (set FUSEWIRE_UAPI_INCLUDE)")

    def known(name: str) -> bool:
        return SINCE.get(name, 0) <= minor

    lines = []
    for name in filter(known, LAYOUTS):
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        for member, code in fields_of(name):
            if known(f"{name}.{member}"):
                place = f"((struct {name} *)0)->{member}"
                signed = "0" if code.endswith("s") else f"((__typeof__({place}))-1 < 0)"
                values = f"offsetof(struct {name}, {member}), sizeof({place}), {signed}"
                lines.append(f'printf("{name}.{member} %zu %zu %d\\n", {values});')
    lines += [f'printf("{name} %llu\\n", (unsigned long long)({name}));' for name in filter(known, constants())]
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/fuse.h>\n"
    source += "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    program = tmp_path_factory.mktemp("layout") / "layout"
    compiler(["-Wall", "-Werror", "-o", str(program)], source)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    measured = {name: tuple(map(int, values)) for name, *values in map(str.split, output.splitlines())}
    return Header(minor, text, measured)


@pytest.mark.parametrize("name", LAYOUTS)
def test_struct_lies_as_the_header_says(header, name):
    if name not in header.measured:
        pytest.skip(f"linux/fuse.h speaks 7.{header.minor}; struct {name} came with 7.{SINCE[name]}")
    assert layout(name).size == header.measured[name][0]
    offset = 0
    for member, code in fields_of(name):
        size = struct.calcsize("=" + code)
        if SINCE.get(f"{name}.{member}", 0) <= header.minor:
            signed = int(not code.endswith("s") and code.islower())
            assert (offset, size, signed) == header.measured[f"{name}.{member}"], member
        offset += size


def test_constants_have_the_values_of_the_header(header):
    ours = {name: (value,) for name, value in constants().items() if SINCE.get(name, 0) <= header.minor}
    assert ours == {name: header.measured[name] for name in ours}


def test_no_constant_of_the_header_is_missing(header):
    defined = set(re.findall(r"#define ((?:FUSE|FOPEN|FATTR)_\w+)", header.text))
    defined |= set(re.findall(r"^\s*(FUSE_\w+)\s*=", header.text, re.MULTILINE))
    missing = {name for name in defined - constants().keys() - OURS if not CONSTANTS_LEFT_OUT.fullmatch(name)}
    assert not missing
    assert len(defined) > 150


def test_no_struct_of_the_header_is_missing(header):
    defined = set(re.findall(r"^struct (fuse_\w+) \{", header.text, re.MULTILINE))
    assert not defined - LAYOUTS.keys() - STRUCTS_LEFT_OUT
    assert len(defined) > 55


def test_every_opcode_of_the_header_has_a_row(header):
    body = re.search(r"enum fuse_opcode \{(.*?)\};", header.text, re.DOTALL).group(1)
    codes = {name: int(value) for name, value in re.findall(r"(\w+)\s*=\s*(\d+)", body)}
    rows = {f"FUSE_{op.name.upper()}": op.code for op in TABLE}
    known = {name: code for name, code in rows.items() if SINCE.get(name, 0) <= header.minor}
    assert {name: code for name, code in codes.items() if code < OPCODE_LIMIT} == known
    # The rest is CUSE's, and marks of the wrong byte order.
    assert {name for name, code in codes.items() if code >= OPCODE_LIMIT} == {
        "CUSE_INIT",
        "CUSE_INIT_BSWAP_RESERVED",
        "FUSE_INIT_BSWAP_RESERVED",
    }


def test_rows_name_structs_and_encoders_that_exist():
    from fusewire.wire import codec

    assert len({op.code for op in TABLE}) == len({op.name for op in TABLE}) == len(TABLE)
    for op in TABLE:
        assert not op.args or op.args in LAYOUTS
        assert not op.reply or callable(getattr(codec, f"encode_{op.reply}"))
        assert op.code < OPCODE_LIMIT
