"""`dpnn` whose ranks note when they begin a training batch, for those who look on from outside.

STAMPS  a folder: each rank has a file there, its number, of numbers of 8 bytes: its process, then for each batch the
        time in seconds (CLOCK_MONOTONIC, one clock for all processes of a machine).
"""

import os
import struct
import sys
import time
from collections.abc import Callable

from dpnn import cli
from dpnn.data import Batch, Loader

NUMBER = struct.Struct("d")


def main() -> int:
    """Note the process, then run."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
    file = os.open(f"{os.environ['STAMPS']}/{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, NUMBER.pack(os.getpid()))
    next_batch = Loader.next

    def stamped(loader: Loader, *tick: Callable[[], object]) -> Batch:
        batch = next_batch(loader, *tick)
        if loader.sampler.shuffle:  # evaluation doesn't
            os.write(file, NUMBER.pack(time.monotonic()))
        return batch

    Loader.next = stamped  # type: ignore[method-assign]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
