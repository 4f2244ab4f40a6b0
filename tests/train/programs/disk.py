"""`dpnn` whose checkpoints go to a disk that behaves badly.

DISK  "RANK STEP DEED": wherever RANK ("*": every rank) writes bytes of a checkpoint after STEP steps, or more, it first
      does DEED. "until N": wait until it has taken N steps, at most 20 s. "slow S": wait S seconds. "block": wait for
      ever. "limit N": let no file grow beyond N bytes. "vanish": delete the folder of checkpoints. A signal's name:
      send it to itself. Another deed comes before: "infinite": a parameter becomes so.
"""

import os
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

from dpnn import cli
from dpnn.checkpoint import output
from dpnn.saving import Saver
from dpnn.train import Training

RANK, STEP, DEED = os.environ["DISK"].split(" ", 2)
HERE = RANK in ("*", os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK", "0"))
STATE = {"steps": 0, "saving": 0}
FOLDERS = []
save, take_step = Saver.save, Training._take_step


def counted_step(training, *args):
    samples = take_step(training, *args)
    STATE["steps"] += 1
    return samples


def watched_save(saver, place, info):
    if HERE and place[2] >= int(STEP):
        STATE["saving"] = place[2]
        FOLDERS[:] = [saver._folder]
        if DEED == "infinite":
            saver._store.params[0] = float("inf")
    save(saver, place, info)


def bad_pwrite(descriptor, data, at):
    if STATE["saving"]:
        do(*DEED.split(" "))
    return os.pwrite(descriptor, data, at)


def do(deed, value="0"):
    if deed == "until":
        end = time.monotonic() + 20
        while STATE["steps"] < int(value):
            if time.monotonic() > end:
                raise TimeoutError(f"after {STATE['steps']} steps training doesn't go on")
            time.sleep(0.005)
    elif deed == "slow":
        time.sleep(float(value))
    elif deed == "block":
        time.sleep(1000)
    elif deed == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
    elif deed == "vanish":
        shutil.rmtree(FOLDERS[0], ignore_errors=True)
    elif deed.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[deed])


Training._take_step, Saver.save = counted_step, watched_save
output.os = SimpleNamespace(**{**vars(os), "pwrite": bad_pwrite})  # there alone

if __name__ == "__main__":
    sys.exit(cli.main())
