"""`fusewire list`: what is mounted, who serves it, and how it does.

Layer: cli. It asks servers over their sockets and reads mountinfo; it never touches a mount, for a dead or hung one
would never let go of it.
"""

from __future__ import annotations

import os
import sys
import time

from fusewire.cli import control, places, private, state
from fusewire.linux import mountinfo

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE = 1.0  # seconds that a server may take to answer
_COLUMNS = ("source", "target", "state", "strategy", "pid", "uptime", "requests", "path")


def list_mounts(json: bool, store: state.Store | None = None) -> int:
    """Print this user's mounts, as a table or as JSON; 0 is the exit status.

    state is one of serving, dead (`fusewire umount` clears it up), "no answer" (the server lives and says nothing),
    and unknown (a mount of Fusewire's of which no record is left). Raises OSError if the records cannot be trusted.
    """
    store = store or state.of_user(os.environ)
    rows, problems = collect(store)
    for problem in problems:
        print(f"fusewire: {shown(str(problem))}", file=sys.stderr)
    for path in places.left_over(os.environ):
        name = shown(os.fsdecode(path))
        print(f"fusewire: {name}: left by a run that was killed; `fusewire umount --all` removes it", file=sys.stderr)
    if json:
        from json import dumps

        print(dumps(rows, indent=1))
    elif rows:
        _print_table(rows)
    else:
        print("nothing is mounted", file=sys.stderr)
    return 0


def collect(store: state.Store) -> tuple[list[dict[str, Any]], list[state.Problem]]:
    """One dict per mount, and what is no readable record. Paths are str with surrogate escapes, times in seconds."""
    records, problems = store.load_all()
    answers = _ask_all(records)
    rows = [_row(record, answer) for record, answer in zip(records, answers, strict=True)]
    known = {path for record in records for path in (record.target, record.inside) if path}
    # The kernel shows a mount's owner as the namespace knows him that the mount was made in. One without a record that
    # was made inside a namespace of our own is left out there: outside, somebody else may have that number.
    uid = private.uid_outside()
    for mount in mountinfo.mounts():
        place = os.fsdecode(mount.mount_point)
        if mount.fstype.startswith(b"fuse.fusewire") and mount.user_id == uid and place not in known:
            row: dict[str, Any] = dict.fromkeys(("id", *_COLUMNS, "mounted_at"))
            row |= {"source": os.fsdecode(mount.source), "target": place, "path": place, "state": "unknown"}
            rows.append(row | {"fstype": os.fsdecode(mount.fstype), "options": os.fsdecode(mount.options).split(",")})
    return rows, problems


def _ask_all(records: list[state.Record]) -> list[dict[str, Any] | str]:
    """For each record its server's answer, or what is the matter; all are asked at once, so hung ones cost 1 s."""
    answers: list[dict[str, Any] | str] = [""] * len(records)

    def ask(index: int) -> None:
        try:
            answer = control.control(records[index].control, {"command": "status"}, _PATIENCE)
            answers[index] = answer if answer.get("ok") else "no answer"
        except OSError:
            answers[index] = "no answer" if state.alive(records[index]) else "dead"

    living = []
    for index, record in enumerate(records):
        if state.alive(record):
            living.append(index)
        else:
            answers[index] = "dead"
    if len(living) == 1:
        ask(living[0])
    elif living:
        import threading

        threads = [threading.Thread(target=ask, args=(index,)) for index in living]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return answers


def _row(record: state.Record, answer: dict[str, Any] | str) -> dict[str, Any]:
    serving = isinstance(answer, dict)
    return {
        "id": record.id,
        "source": record.source,
        "target": record.target,
        "state": "serving" if serving else answer,
        "strategy": record.strategy,
        "pid": record.pid,
        "server": record.server or record.pid,
        "sandbox": record.sandbox,
        "uptime": None if answer == "dead" else max(0.0, round(time.time() - record.mounted_at, 3)),
        "requests": answer.get("requests") if isinstance(answer, dict) else None,
        "path": record.outside or record.target,
        "mounted_at": record.mounted_at,
        "fstype": record.fstype,
        "options": record.options,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = [[name.upper() for name in _COLUMNS]]
    for row in rows:
        cells = dict(row)
        if row["uptime"] is not None:
            cells["uptime"] = _duration(row["uptime"])
        if row["path"] == row["target"]:
            cells["path"] = None
        table.append([shown("-" if cells[name] is None else str(cells[name])) for name in _COLUMNS])
    widths = [max(len(line[column]) for line in table) for column in range(len(_COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def shown(text: str) -> str:
    """A name in one line that every terminal and encoding takes: control characters and stray bytes are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    parts = []
    for letter in text:
        if 0xDC80 <= ord(letter) <= 0xDCFF:
            parts.append(f"\\x{ord(letter) - 0xDC00:02x}")
        elif letter.isprintable():
            parts.append(letter.encode(encoding, "backslashreplace").decode(encoding))
        else:
            parts.append(letter.encode("unicode_escape").decode())
    return "".join(parts)


def _duration(seconds: float) -> str:
    """Two units are enough for people: 1d4h, 3h12m, 5m2s, 7s."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if parts or count or unit == "s":
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])
