"""`python -m dpnn`: the same as the command `dpnn`."""

import sys

from dpnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
