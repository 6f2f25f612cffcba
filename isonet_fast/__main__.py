"""`python -m isonet_fast` and the `isonet-fast` command."""

import sys

from isonet_fast.train.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
