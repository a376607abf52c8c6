"""What `-o debug` shows: a line on standard error for each request.

Layer `serve`, below the runners.
"""

from __future__ import annotations

import os
from typing import Any

from fusewire.wire.codec import IN_HEADER, OUT_HEADER
from fusewire.wire.table import TABLE


def trace_to_stderr(request: Any, reply: Any) -> None:
    """Print one line per request, as `-o debug` asks."""
    length, opcode, unique, nodeid, uid, gid, pid, _ = IN_HEADER.unpack_from(request)
    name = next((op.name.upper() for op in TABLE if op.code == opcode), str(opcode))
    if reply is None:
        answer = "no reply"
    elif type(reply) is list:
        size, error, _ = OUT_HEADER.unpack_from(reply[0])
        answer = f"{size} bytes" if error == 0 else os.strerror(-error)
    else:
        answer = f"{reply.range.size} bytes of a file"
    line = f"{name} unique {unique} node {nodeid} uid {uid} gid {gid} pid {pid} ({length} bytes) -> {answer}\n"
    try:
        os.write(2, line.encode())
    except OSError:
        pass  # whoever listened has gone: no reason to stop serving
