"""`python -m fusewire`: the command line."""

import sys

from fusewire.cli import main

sys.exit(main())
