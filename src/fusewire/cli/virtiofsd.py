"""`fusewire-virtiofsd`: virtiofsd's own command line, for what starts it: libvirt, Kata Containers, scripts.

Layer `cli`. The same share with virtiofsd's defaults: extended attributes and locks only when asked for, and the end
with the first client. Everything else is in `share` and `share_options`.
"""

from __future__ import annotations

import sys

from fusewire.cli import _hold_stdio
from fusewire.cli.share_options import VIRTIOFSD


def main() -> int:
    """Run the command line and give the exit status."""
    _hold_stdio()
    from fusewire.cli.share import main as share

    return share(sys.argv[1:], VIRTIOFSD)


if __name__ == "__main__":
    sys.exit(main())
