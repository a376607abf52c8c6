"""The conformance list as a program.

    python -m fusewire.testing UNDER_TEST ORACLE [NAME...]

runs it, or the behaviours that are named, in two directories that exist and can be written to. With `--answer` before
them the names are read from standard input, and each is answered by a line (`answer`).

Layer `testing`, at its top.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

from fusewire.testing.conformance import BEHAVIOURS, compare


def answer(under_test: str, oracle: str) -> None:
    """Compare what each line of standard input names; answer each by one line, the JSON of "" or of what is wrong."""
    for line in sys.stdin:
        wrong = ""
        try:
            compare(BEHAVIOURS[line.strip()], under_test, oracle)
        except AssertionError as error:
            wrong = str(error) or traceback.format_exc()
        except Exception:  # noqa: BLE001 - whoever asks wants to know what is wrong with a behaviour, too
            wrong = traceback.format_exc()
        print(json.dumps(wrong), flush=True)


def main(arguments: list[str]) -> int:
    """Run the list and print one line per behaviour; gives the exit status."""
    if arguments[:1] == ["--answer"] and len(arguments) == 3:
        answer(*arguments[1:])
        return 0
    unknown = [name for name in arguments[2:] if name not in BEHAVIOURS]
    if len(arguments) < 2 or unknown or not all(map(os.path.isdir, arguments[:2])):
        print("usage: python -m fusewire.testing UNDER_TEST ORACLE [NAME...]: two directories", file=sys.stderr)
        print(*(f"there is no behaviour {name}" for name in unknown), sep="\n", end="", file=sys.stderr)
        return 2
    under_test, oracle, *wanted = arguments
    failed = 0
    for name in wanted or BEHAVIOURS:
        if "root" in BEHAVIOURS[name].marks and os.geteuid() != 0:
            print(f"left out {name}: it needs root")
            continue
        try:
            compare(BEHAVIOURS[name], under_test, oracle)
        except (AssertionError, OSError) as error:
            failed += 1
            print(f"FAILED {name}\n{error}")
        else:
            print(f"ok     {name}")
    print(f"{failed} of {len(wanted or BEHAVIOURS)} failed")
    return 1 if failed else 0


sys.exit(main(sys.argv[1:]))
