"""How fast parameters are updated: SGD with momentum beside a copy in memory.

An update has to move 20 bytes a number: it reads parameter, gradient and momentum, and writes parameter and momentum. A
copy moves 8, and is made by as many threads as there are cores. Both as GB/s.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

import numpy as np
from harness import Benchmark, cores, medians

from dpnn import config
from dpnn.native import Kernels
from dpnn.optim import Optimizer, Segment
from dpnn.team import Team

GOAL = 0.7


def seconds(call, number: int) -> float:
    """What one call takes, the mean over `number` calls."""
    begin = perf_counter()
    for _ in range(number):
        call()
    return (perf_counter() - begin) / number


def main() -> None:
    """60 million numbers, about AlexNet's parameters."""
    bench = Benchmark("optimizer", __doc__)
    n, n_threads = 60_000_000, cores()
    rng = np.random.default_rng(0)
    params, grads = rng.standard_normal((2, n), np.float32)
    options = config.Optimizer(name="momentum", lr=1e-3, momentum=0.9, weight_decay=1e-4)
    segments = [Segment(0, n, decay=True, statistic=0.0)]
    optimizer = Optimizer(options, segments, params, grads, Team(n_threads), Kernels(n_threads))
    source, target = np.array_split(grads, n_threads), np.array_split(np.zeros(n, np.float32), n_threads)
    with ThreadPoolExecutor(n_threads) as pool:

        def copy():
            list(pool.map(np.copyto, target, source))

        def update():
            optimizer.apply(0, n, 1e-3)

        ours, peer = medians([partial(seconds, update), partial(seconds, copy)], 2.0 if bench.quick else 20.0)
    title, peer_name = f"momentum, {n / 1e6:.0f} M numbers", f"copy, {n_threads} threads"
    bench.record(title, 20e-9 * n / ours, 8e-9 * n / peer, peer_name, GOAL, "GB/s", more_is_better=True)
    bench.finish()


if __name__ == "__main__":
    main()
