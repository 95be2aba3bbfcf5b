"""`python -m dparallel` is the command `dparallel`."""

import sys

from dparallel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
