"""Ranks meet as those of dpnn do; the first prints on which node each is, in order."""

import os
import sys

from dpnn.comm.world import World, run
from dpnn.errors import DpnnError


def tell(world: World) -> int:
    nodes = world.comm.gather(os.uname().nodename)
    if nodes is not None:
        print("met on", *nodes)
    return 0


if __name__ == "__main__":
    try:
        code = run(tell, 60)
    except DpnnError as error:
        print(f"dpnn: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
