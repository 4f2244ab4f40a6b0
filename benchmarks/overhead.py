"""What the spine costs: a step of LeNet on one rank with kernels that do nothing.

Executor, loader, reduction and metrics are the real ones, as `dpnn train` builds them. Once the layers' ops are empty
("empty ops"). Once they are those of the onednn backend with all their calls, into C and back, but what is called does
nothing ("onednn, empty kernels"). The optimizer's pass is empty. The limit is 300 microseconds a step of 64 images of
28 x 28. The mean counts, from the start of one step to the start of the next, so that nothing that happens between the
steps is left out.
"""

import ctypes
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from unittest import mock

import numpy as np
from harness import Benchmark

from dpnn.backends.base import Backend, Group, Mode, Slot
from dpnn.backends.onednn import OneDNN
from dpnn.backends.reference import Reference
from dpnn.cluster.signals import StopRequest
from dpnn.comm.world import World, start
from dpnn.data.pack import pack
from dpnn.nn import SoftmaxCrossEntropy
from dpnn.optim import Optimizer
from dpnn.prepare import prepare
from dpnn.recovery import Past
from dpnn.team import Team
from dpnn.train import Training, located

LIMIT_US = 300.0
WARM_UP = 300
JOB = """
[data]
train = "data/train"
[model]
name = "lenet"
[train]
steps = {steps}
global_batch = 64
[optimizer]
lr = 0.1
"""


class Nothing:
    """An op that has no effect."""

    def forward(self) -> None:
        """Nothing."""

    def backward(self) -> None:
        """Nothing."""

    def weights(self) -> None:
        """Nothing."""


class NullBackend(Reference):
    """Ops that do nothing; the loss is 1."""

    name = "nothing"

    def build(self, group: Group, slot: Slot, mode: Mode) -> Nothing:
        node = group.nodes[-1]
        if isinstance(node.layer, SoftmaxCrossEntropy):
            slot.output(node)[...] = 1.0
        return Nothing()


def empty_onednn() -> OneDNN:
    """The onednn backend, of which every call reaches C and finds nothing to do there."""
    backend = OneDNN(Team(1))
    nothing = ctypes.CDLL(backend.library.path).omp_get_thread_num  # 0, which is also success
    backend.kernels.bind = lambda name, *arguments: nothing
    backend.library.execute = lambda *arguments: nothing()
    return backend


def run_nothing(team: Team, shares: Sequence[object]) -> None:
    """In the place of `Team.run`."""


class NullOptimizer(Optimizer):
    """Updates nothing."""

    def apply(self, lo: int, hi: int, rate: float, scale: float = 1.0) -> None:
        """Nothing."""


class Stamped(Training):
    """A run that notes when each step starts."""

    def _take_step(self, *args):
        self.stamps.append(perf_counter())
        return super()._take_step(*args)


def step_times(world: World, steps: int, backends: list[Backend]) -> list[float]:
    """Seconds from the start of each step to that of the next, after the warm-up."""
    Path("job.toml").write_text(JOB.format(steps=steps))
    prepared = located(world, prepare("job.toml", (), None, None, 1, {}))
    with (
        mock.patch("dpnn.evaluate.choose_backends", return_value=(backends, "")),
        mock.patch.object(Team, "run", run_nothing),
        mock.patch("dpnn.strategies.flats.Optimizer", NullOptimizer),
    ):
        training = Stamped(world, prepared, Past())
    training.stamps = []
    training.run(StopRequest())
    return np.diff(training.stamps)[WARM_UP:].tolist()


def main() -> None:
    """One run of `steps` steps over 60,000 random images."""
    bench = Benchmark("overhead", __doc__, ["numpy", "mpi4py", "h5py"])
    world = start()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        images = rng.integers(0, 256, (60_000, 28, 28, 1), np.uint8)
        np.savez("images.npz", x=images, y=rng.integers(0, 10, 60_000))
        pack("images.npz", "data")
        steps = 3_000 if bench.quick else 20_000
        for case, backends in (
            ("empty ops", [NullBackend()]),
            ("onednn, empty kernels", [empty_onednn(), NullBackend()]),
        ):
            times = sorted(seconds * 1e6 for seconds in step_times(world, steps, backends))
            for what, found in (
                ("mean", statistics.fmean(times)),
                ("median", statistics.median(times)),
                ("99 of 100", times[len(times) * 99 // 100]),
            ):
                bench.record(f"{case}, {what}", found, LIMIT_US, "the limit", 1.0, "us")
        os.chdir("/")
    bench.finish()


if __name__ == "__main__":
    main()
