"""`dpnn` whose initial numbers of the parameter BAD are infinite."""

import os
import sys

import numpy as np

from dpnn import cli
from dpnn.plan import store

draw = store.draw


def spoiled(seed, name, *args):
    drawn = draw(seed, name, *args)
    return np.full_like(drawn, np.inf) if name == os.environ["BAD"] else drawn


store.draw = spoiled

if __name__ == "__main__":
    sys.exit(cli.main())
