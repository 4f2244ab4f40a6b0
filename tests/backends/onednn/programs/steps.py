"""Takes steps of a network and prints, as JSON, what they allocate: NETWORK, ROWS, SIDE of the images, MICROBATCHES."""

import gc
import json
import resource
import sys
import tracemalloc

import numpy as np

from dpnn import models, nn
from dpnn.backends.onednn import OneDNN
from dpnn.backends.reference import Reference
from dpnn.data import Batch
from dpnn.plan import Arena, Executor, Layout, Placed, Store, compile_plan
from dpnn.team import Team

WARM_UP, STEPS = 3, 20


class Alone:
    """A strategy, and a sum over replicas, of a lone rank."""

    def __getattr__(self, name):
        return lambda *arguments: None


def main() -> None:
    name, rows, side, microbatches = sys.argv[1], *map(int, sys.argv[2:])
    shape = (1 if name == "lenet" else 3, side, side)
    options = {"depth": 18} if name == "resnet" else {}
    graph = nn.Graph(models.build(name, 10, shape, options), shape, nn.SoftmaxCrossEntropy())
    placed = Placed.whole(graph)
    nodes = placed.nodes(0)
    store, backends = Store(nodes, np.dtype(np.float32)), [OneDNN(Team(2)), Reference(np.float32)]
    store.draw(0)
    plan = compile_plan(placed, 0, backends, "train", rows // microbatches, microbatches, store.pieces)
    layout, arena = Layout(plan), Arena()
    arena.reserve(layout.nbytes)
    executor = Executor(layout, store, arena, 0, lambda array: Alone(), Alone())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, *shape), np.float32)
    batch = Batch(x, rng.integers(0, 10, rows).astype(np.int32), np.arange(rows, dtype=np.uint64), rows, 0, 0, None)

    def step() -> None:
        executor.run(batch, [(rows // microbatches, rows // microbatches)] * microbatches, rows)

    for _ in range(WARM_UP):
        step()
    gc.collect()
    gc.disable()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    tracemalloc.start()
    step()
    tracemalloc.clear_traces()
    tracemalloc.reset_peak()
    step()
    current, peak = tracemalloc.get_traced_memory()
    largest = max(array.nbytes for array in (x, store.params))
    print(
        json.dumps({"faults": faults / STEPS, "peak": peak, "kept": current, "arena": layout.nbytes, "array": largest})
    )


if __name__ == "__main__":
    main()
