"""What a checkpoint costs a run that goes on: the pause, the steps meanwhile, and how fast it gets to the disk.

One rank, parameters and momentum of a network. The pause is what `Saver.save` takes; it is compared with one plain copy
of the same arrays (the limit is 1.5 of it, a ratio of 0.67), and with torch.save of them, which a run that has no
thread for it waits for. Steps are those of the network on all cores, while a checkpoint is written and while none is. A
checkpoint is written with digests and read again; the peer writes the same bytes, and both end on the disk.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
from harness import Benchmark, cores
from ours import Ours
from step import NETWORKS

from dpnn.comm.mesh import Mesh
from dpnn.comm.world import World, start
from dpnn.saving import Saver

ROWS = {"lenet": 64, "alexnet": 8}
PAUSE_GOAL, STEP_GOAL, WRITE_GOAL, TORCH_GOAL = 1 / 1.5, 0.7, 1 / 3, 10.0


class Case:
    """One network, with a folder for its checkpoints."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self._network = Ours(*NETWORKS[name], ROWS[name], cores(), "train")
        store = self._network.model.store
        self._momentum = np.full_like(store.params, 0.5)
        self._arrays = [store.params, self._momentum]
        self._copies = [np.full_like(array, 1.0) for array in self._arrays]
        self._folder, self._steps = folder, 0
        self.nbytes = sum(array.nbytes for array in self._arrays)
        self._saver = Saver(
            folder, Mesh(world), store, {"momentum": self._momentum}, self._network.model.team, 1, 600.0,
            lambda steps, path: None,
        )  # fmt: skip

    def copy(self) -> float:
        """Seconds of one plain copy."""
        return _seconds(lambda: [np.copyto(to, array) for to, array in zip(self._copies, self._arrays, strict=True)])

    def pause(self) -> float:
        """Seconds that training stands still; the checkpoint is written when this returns."""
        seconds = _seconds(self._save)
        self._saver.finish()
        return seconds

    def write(self) -> float:
        """Seconds from the beginning of a checkpoint to its end."""
        return _seconds(self.pause)

    def step(self) -> float:
        """Seconds of a step while nothing is written."""
        return _seconds(self._network.step)

    def step_meanwhile(self) -> float:
        """Seconds of a step while a checkpoint is written: the mean over those that begin before it is complete."""
        self._save()
        begin, steps = perf_counter(), 0
        while self._saver.busy:
            self._network.step()
            self._saver.look()
            steps += 1
        return (perf_counter() - begin) / max(steps, 1)

    def write_plainly(self) -> float:
        """Seconds that the same bytes take to the disk."""

        def write() -> None:
            with (self._folder / "plain").open("wb", buffering=0) as file:
                for array in self._arrays:
                    rest = memoryview(array).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(file.fileno())

        return _seconds(write)

    def torch_save(self) -> float:
        """Seconds of torch.save of the same arrays, and until it is on the disk."""
        import torch

        tensors = [torch.from_numpy(array) for array in self._arrays]

        def save() -> None:
            with (self._folder / "torch").open("wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())

        return _seconds(save)

    def _save(self) -> None:
        self._steps += 1
        self._saver.save((0, self._steps, self._steps), {})


def _seconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin


def best(calls: list[Callable[[], float]], repeat: int) -> list[float]:
    """The least that each call tells; they take turns, and the first turn doesn't count."""
    rounds = [[call() for call in calls] for _ in range(repeat + 1)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def main() -> None:
    """Each network."""
    bench = Benchmark("checkpoint", __doc__, ["numpy", "h5py", "isal", "torch", "onednn-cpu-gomp"])
    world = start()
    for name in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(world, name, Path(folder))
            what, repeat = f"{name}, {case.nbytes / 1e6:,.0f} MB", 3 if bench.quick else 9
            pause, copy = best([case.pause, case.copy], repeat)
            bench.record(f"{what}: pause", pause * 1e3, copy * 1e3, "one copy", PAUSE_GOAL, "ms")
            times = best([case.step_meanwhile, case.step], repeat)
            bench.record(f"{what}: step meanwhile", *times, "step with nothing written", STEP_GOAL, "s")
            ours, plain = (case.nbytes / 1e9 / seconds for seconds in best([case.write, case.write_plainly], repeat))
            bench.record(f"{what}: written", ours, plain, "write and fsync", WRITE_GOAL, "GB/s", more_is_better=True)
            try:
                pause, theirs = best([case.pause, case.torch_save], repeat)
            except ImportError as error:
                bench.note(f"torch.save: {error}")
            else:
                bench.record(f"{what}: pause", pause * 1e3, theirs * 1e3, "torch.save", TORCH_GOAL, "ms")
    bench.finish()


if __name__ == "__main__":
    main()
