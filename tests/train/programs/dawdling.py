"""`dpnn` with two workers that dawdle when their steps of an asynchronous run are done.

LATE      this rank takes 0.3 s until it says so.
DAWDLER   this rank, where it has to wait for the others, looks only every second whether they are done.
"""

import os
import sys
import time

from dpnn import cli
from dpnn.strategies.downpour import worker

RANK = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
leave = worker.Worker.leave


def leave_late(one: worker.Worker) -> None:
    time.sleep(0.3)
    leave(one)


if os.environ.get("LATE") == RANK:
    worker.Worker.leave = leave_late
if os.environ.get("DAWDLER") == RANK:
    worker._ASK_AGAIN_S = 1.0

if __name__ == "__main__":
    sys.exit(cli.main())
