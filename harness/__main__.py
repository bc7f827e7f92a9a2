"""`python -m harness`."""

import sys

from harness.cli import main

if __name__ == "__main__":  # the data generator's worker processes import this file
    sys.exit(main())
