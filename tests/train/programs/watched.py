"""`dpnn` with an eye on the training batches, and a fault at one of them.

SEEN      a folder: each process writes a line "epoch step id id ..." for every batch that it trains on.
TOGETHER  a number: no process goes on from its first batch before so many have written into SEEN.
FAULT     "RANK STEP DEED": at its training batch number STEP (from 0, in this process) the rank, or every rank ("*"),
          does DEED: a signal's name, sent to itself; "raise"; "infinite" (its samples become so); "truncate PATH";
          "touch PATH"; "hoard PATH" (joins the control group whose list of processes PATH is, and takes 1 GiB);
          "exhaust" (takes 1 GiB, where its address space may grow by less than a thread needs); "sleep SECONDS";
          "pause" or "hold": sleep for ever in C, as in a driver, where Python's other threads run on, or don't.
PACE      seconds that it sleeps at every training batch.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from dpnn import cli
from dpnn.data import Batch, Loader

STATE = {"batches": 0}
next_batch = Loader.next


def watched_next(loader: Loader, *tick) -> Batch:
    batch = next_batch(loader, *tick)
    if loader.sampler.shuffle:  # evaluation doesn't
        if "SEEN" in os.environ:
            note(batch)
        if os.environ.get("FAULT", "none") != "none":
            rank, step, deed = os.environ["FAULT"].split(" ", 2)
            here = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK", "0")
            if rank in ("*", here) and STATE["batches"] == int(step):
                do(deed, batch)
        STATE["batches"] += 1
        time.sleep(float(os.environ.get("PACE", "0")))
    return batch


def note(batch: Batch) -> None:
    with open(f"{os.environ['SEEN']}/{os.getpid()}", "a") as file:
        print(batch.epoch, batch.step, *batch.ids.tolist(), file=file)
    end = time.monotonic() + 15
    while STATE["batches"] == 0 and len(os.listdir(os.environ["SEEN"])) < int(os.environ.get("TOGETHER", "0")):
        if time.monotonic() > end:
            raise TimeoutError(f"only {len(os.listdir(os.environ['SEEN']))} processes came to their first batch")
        time.sleep(0.01)


def do(deed: str, batch: Batch) -> None:
    print(f"fault: {deed}", flush=True)
    if deed.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[deed])
    elif deed == "raise":
        raise ValueError("bad value")
    elif deed == "infinite":
        batch.x[...] = float("inf")
    elif deed.startswith("truncate "):
        os.truncate(deed.removeprefix("truncate "), 1000)
    elif deed.startswith("touch "):
        Path(deed.removeprefix("touch ")).touch()
    elif deed.startswith("hoard "):
        Path(deed.removeprefix("hoard ")).write_text(str(os.getpid()))
        np.ones(1 << 27)
    elif deed == "exhaust":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        np.ones(1 << 27)
    elif deed.startswith("sleep "):
        time.sleep(float(deed.removeprefix("sleep ")))
    elif deed == "pause":
        ctypes.CDLL(None).pause()
    elif deed == "hold":
        ctypes.PyDLL(None).pause()


Loader.next = watched_next

if __name__ == "__main__":
    sys.exit(cli.main())
