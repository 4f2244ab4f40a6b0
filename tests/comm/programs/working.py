"""A job that works until SIGUSR1 asks it to stop, and then ends with code 75; or, told `stubborn`, goes on."""

import os
import signal
import sys
import time

import numpy as np

from dpnn.comm.world import run


def main(world) -> int:
    asked = np.zeros(1)
    signal.signal(signal.SIGUSR1, lambda *_: asked.__setitem__(0, 1))
    print(f"rank {world.rank} works; terminal {os.environ.get('DPNN_TERMINAL')}", flush=True)
    while True:
        time.sleep(0.05)
        anybody = np.zeros(1)
        world.comm.Allreduce(asked, anybody)
        if anybody[0] and sys.argv[1:] != ["stubborn"]:
            return 75


if __name__ == "__main__":
    sys.exit(run(main, 30))
