"""`dpnn` that keeps books of its training batches, whose gradients say which of them they are of.

COUNTS  a folder: before it trains on a batch, each process appends a line "epoch id id ..." to the file RANK; `layout`
        lists the parameters, in the order of the flat arrays.
SLOTS   how many batches a process may train on. With it the k-th gradient of rank r isn't the network's: in each of
        SHARDS shards it is UNIT (accounts.py) at every (ranks * SLOTS)-th place from r * SLOTS + k on, and 0 elsewhere.
        So, with plain SGD at a rate of 1, the parameters at the end say how often it was applied to each shard.
PACE    seconds that it sleeps at every training batch.

accounts.py reads it.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dpnn import cli
from dpnn.data import Batch, Loader
from dpnn.plan import Store
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.average import Average
from dpnn.strategies.downpour.protocol import shards
from dpnn.strategies.downpour.worker import Worker
from tests.train.accounts import UNIT

FOLDER, SLOTS = os.environ["COUNTS"], int(os.environ.get("SLOTS", "0"))
RANK, RANKS = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
STATE = {"batches": 0}


def append(name: str, line: str) -> None:
    """In one piece, and at once: whoever writes it may be killed the next moment."""
    file = os.open(f"{FOLDER}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, line.encode())
    os.close(file)


def counted_next(loader: Loader, *tick: Any) -> Batch:
    batch = next_batch(loader, *tick)
    if loader.sampler.shuffle:  # evaluation doesn't
        time.sleep(float(os.environ.get("PACE", "0")))
        append(str(RANK), " ".join(map(str, [batch.epoch, *batch.ids.tolist()])) + "\n")
        STATE["batches"] += 1
    return batch


def listed_store(store: Store, *args: Any) -> None:
    make_store(store, *args)
    if RANK == 0:
        names = [piece.name for piece in store.pieces]
        with open(f"{FOLDER}/layout", "w") as file:
            file.write("\n".join(names))


def mark(gradients: np.ndarray, lo: int, hi: int) -> None:
    """The gradient of the batch at hand in place of what is in [lo, hi) of the flat array."""
    slots, batch = RANKS * SLOTS, STATE["batches"] - 1
    if not 0 <= batch < SLOTS:
        raise IndexError(f"batch {batch} of at most SLOTS = {SLOTS}")
    marked = np.zeros_like(gradients)
    for first, last in shards(gradients.size, int(os.environ["SHARDS"])):
        if last - first < 2 * slots:
            raise IndexError(f"a shard has {last - first} numbers, less than two for each of {slots} slots")
        marked[first:last][RANK * SLOTS + batch :: slots] = UNIT
    gradients[lo:hi] = marked[lo:hi]


def before(kind: type, name: str, marks: Callable[..., None]) -> None:
    method = getattr(kind, name)

    def marked(strategy: Any, *args: int) -> None:
        marks(strategy, *args)
        method(strategy, *args)

    setattr(kind, name, marked)


next_batch, make_store = Loader.next, Store.__init__
Loader.next, Store.__init__ = counted_next, listed_store
if SLOTS:
    before(Worker, "finish", lambda worker: mark(worker._grads, 0, worker._grads.size))
    before(Allreduce, "ready", lambda strategy, lo, hi: mark(strategy._node.grads, lo, hi))
    before(Average, "finish", lambda strategy: mark(strategy._node.grads, 0, strategy._node.grads.size))

if __name__ == "__main__":
    sys.exit(cli.main())
