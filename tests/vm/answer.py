"""What a guest runs for `behaviours.py`: `python3 answer.py ORACLE`; standard input names a directory and a behaviour
per line, and each is answered by a line, the JSON of the two and of what is wrong.

The oracle shows each behaviour once, however many directories are compared with it: it costs half as long as a share.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

from fusewire.testing.conformance import BEHAVIOURS, differences, transcript


def main(oracle: str) -> None:
    """Answer until the input ends."""
    known: dict[str, Any] = {}
    for line in sys.stdin:
        directory, name = line.split()
        wrong = ""
        try:
            if name not in known:
                known[name] = transcript(BEHAVIOURS[name], oracle)
            found = differences(transcript(BEHAVIOURS[name], directory), known[name])
            if found:
                wrong = "\n".join([f"{name}: under test, then oracle", *found[:30]])
        except AssertionError as error:
            wrong = str(error) or traceback.format_exc()
        except OSError as error:
            wrong = f"{name}: {error}"
        except Exception:  # noqa: BLE001 - whoever asks wants to know what is wrong with a behaviour, too
            wrong = traceback.format_exc()
        print(json.dumps([directory, name, wrong]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
