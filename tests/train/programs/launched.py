"""launched.py SCRIPT ARGS...: `dpnn ARGS`; where that launches ranks, they run SCRIPT in place of dpnn."""

import sys
from functools import partial

from dpnn import cli
from dpnn.comm import launch

if __name__ == "__main__":
    launch.launch = partial(launch.launch, program=(sys.argv[1],))
    sys.exit(cli.main(sys.argv[2:]))
