"""`dpnn` on ranks that kill themselves at a chosen place.

DIES  "RANK STEP PLACE; ...": the rank dies where it comes to PLACE for the first time when it has taken STEP steps or
      more. Places: "kept" and "updated" (before an update is noted, and amid it), "averaged" (when the first
      array is the mean, the others aren't), "saving", "writing" (a checkpoint's bytes), "completing" (a checkpoint that
      servers have written; they count no steps), "evaluating", "ending" (before the run's end is told), "regrouping"
      (who is left makes a world), "rebuilding" (and the run), "told" (of those who are lost, by the rank that does so).
NODES, where it is set, as in nodes.py.
"""

import os
import signal
import sys
from types import SimpleNamespace

from dpnn import cli, recovery, serving, train
from dpnn.checkpoint import output
from dpnn.comm.undo import Undo
from dpnn.comm.world import World
from dpnn.evaluate import Evaluator
from dpnn.observe.journal import Journal
from dpnn.optim import Optimizer
from dpnn.saving import Saver
from dpnn.strategies.average import Average

if "NODES" in os.environ:
    import nodes

    assert nodes.make_apart
RANK = os.environ["OMPI_COMM_WORLD_RANK"]
DEATHS = [death.split() for death in os.environ["DIES"].split(";")]
MINE = [(int(step), place) for rank, step, place in DEATHS if rank == RANK]
STATE = {"steps": 0}


def come_to(place: str) -> None:
    if any(place == where and STATE["steps"] >= step for step, where in MINE):
        os.kill(os.getpid(), signal.SIGKILL)


def before(kind: type, name: str, place: str) -> None:
    method = getattr(kind, name)

    def with_place(*args, **how):
        come_to(place)
        return method(*args, **how)

    setattr(kind, name, with_place)


def after(kind: type, name: str, place: str) -> None:
    method = getattr(kind, name)

    def with_place(*args, **how):
        result = method(*args, **how)
        come_to(place)
        return result

    setattr(kind, name, with_place)


apply, take_step, to_mean = Optimizer.apply, train.Training._take_step, Average._to_mean


def counted_step(training, *args):
    STATE["steps"] = training.steps
    take_step(training, *args)
    STATE["steps"] = training.steps


def apply_half(optimizer, lo, hi, *args):
    apply(optimizer, lo, (lo + hi) // 2, *args)
    come_to("updated")
    apply(optimizer, (lo + hi) // 2, hi, *args)


def one_by_one(strategy, wires):
    for wire in wires:
        to_mean(strategy, [wire])
        come_to("averaged")


def pwrite(descriptor, data, at):
    come_to("writing")
    return os.pwrite(descriptor, data, at)


train.Training._take_step, Optimizer.apply, Average._to_mean = counted_step, apply_half, one_by_one
before(Undo, "note", "kept")
before(Saver, "save", "saving")
before(serving.Shards, "complete", "completing")
before(Evaluator, "run", "evaluating")
before(Journal, "end", "ending")
before(World, "go_on", "regrouping")
after(recovery.Survivors, "_with_data", "rebuilding")
after(recovery.Survivors, "_tell", "told")
output.os = SimpleNamespace(**{**vars(os), "pwrite": pwrite})  # there alone

if __name__ == "__main__":
    sys.exit(cli.main())
