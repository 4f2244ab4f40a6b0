"""A whole training step, and inference, beside PyTorch's: same network, batch, threads and float32.

A step is forward, backward and the update (SGD with momentum) over one batch of random numbers that lies in memory;
inference is a forward pass. PyTorch runs eagerly with images as NCHW and as channels_last; at batch 16 (LeNet: 64) also
compiled, in the layout that was faster eagerly, and the best of them all counts. Its networks are made from our
descriptions, and before anything is measured both must give the same scores. Each side is a process of its own; they
take turns, and medians count. The rows:

    training, inference    seconds a step, against PyTorch's best; for some networks also against its best without
                           compiling
    rate                   multiply-adds of the step, counted as the direct algorithm has them, two operations each,
                           against NumPy's product of matrices of 4096 x 4096, measured in turns with the step
    peak memory            resident, of the whole process after three steps, against the lower of PyTorch's eager ones
"""

from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from harness import Benchmark, Worker, WorkerEnded, cores, medians

from dpnn.models import alexnet, googlenet, lenet, resnet, vgg

PHOTO = (3, 224, 224)
NETWORKS = {
    "lenet": (lenet(10, (1, 28, 28)), (1, 28, 28)),
    "alexnet": (alexnet(1000, (3, 227, 227)), (3, 227, 227)),
    "googlenet": (googlenet(1000, PHOTO), PHOTO),
    "vgg16": (vgg(1000, PHOTO, depth=16), PHOTO),
    "resnet50": (resnet(1000, PHOTO, depth=50), PHOTO),
}
MAIN = {name: 64 if name == "lenet" else 16 for name in NETWORKS}
"""The batch at which the goals are high, PyTorch also compiles, and memory is compared."""
BATCHES = {name: (64,) if name == "lenet" else (1, 4, 16, 64) for name in NETWORKS}
QUICK = {"lenet": (64,), "alexnet": (4,), "resnet50": (2,)}

FASTER, NOT_SLOWER = 1.25, 1.0
FASTER_THAN_EAGER = {"alexnet": 1.6, "googlenet": 1.6}
RATE = {"vgg16": 0.77, "resnet50": 0.65}
"""The share of the machine's matrix-product rate that a training step reaches."""
MATRIX = 4096
WORDS = {"train": "training", "eval": "inference"}
BUDGET_S, QUICK_BUDGET_S = 30.0, 2.0
"""How long the sides of one case take turns, save where that would be less than three turns each."""


class Product:
    """NumPy's matrix product, the measure of what the machine can do."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a, self._b = rng.standard_normal((2, MATRIX, MATRIX), np.float32)
        self._c = np.empty_like(self._a)

    def step(self) -> None:
        """One product."""
        np.matmul(self._a, self._b, out=self._c)


# Each process imports its own side only: the other one's libraries would count as its memory.
def make_ours(*args):
    """Our side."""
    from ours import Ours

    return Ours(*args)


def make_peer(*args):
    """PyTorch's side."""
    from peers import Peer

    return Peer(*args)


class Case:
    """One network, batch and mode: its processes, and its rows."""

    def __init__(self, bench: Benchmark, name: str, mode: str, rows: int) -> None:
        self.bench, self.name, self.mode, self.rows = bench, name, mode, rows
        self.main = rows == MAIN[name] and not bench.quick
        self.title = f"{name}, {WORDS[mode]}, batch {rows}"
        self.sides = ExitStack()

    def measure(self) -> None:
        """Everything; a note in place of rows where it doesn't fit into memory, or a process dies for want of it."""
        free = available()
        with self.sides:
            try:
                ours = self._start("dpnn", make_ours)
                needed = ours.call("nbytes") + ours.call("peer_nbytes")
                if needed > free:
                    text = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                    self.bench.note(f"{self.title}: not measured: {text}")
                    return
                self.bench.note(f"{self.title}: {ours.call('backends')}, {cores()} threads")
                self._measure(ours)
            except WorkerEnded as error:
                self.bench.note(f"{self.title}: not measured: {error}")

    def _measure(self, ours: Worker) -> None:
        layouts = ("NCHW",) if self.bench.quick else ("NCHW", "channels_last")
        eager = {f"PyTorch {layout}": self._start(f"PyTorch {layout}", make_peer, layout) for layout in layouts}
        for side in (ours, *eager.values()):
            side.seconds("step", 3 if self.main else 1)
        if self.main and self.mode == "train":
            name, nbytes = least({name: side.peak_nbytes for name, side in eager.items()})
            self._record("peak memory", ours.peak_nbytes / 1e6, nbytes / 1e6, name, NOT_SLOWER, "MB")
        others = dict(eager)
        if self.main:
            layout, _ = least({layout: eager[f"PyTorch {layout}"].seconds("step", 1) for layout in layouts})
            name = f"torch.compile {layout}"
            others[name] = self._start(name, make_peer, layout, True)
            others[name].seconds("step", 2)
        rate = RATE.get(self.name) if self.main and self.mode == "train" else None
        if rate:
            others["product"] = self.sides.enter_context(Worker("NumPy", Product, threads=cores()))
        turns = [partial(side.seconds, "step") for side in (ours, *others.values())]
        mine, *times = medians(turns, QUICK_BUDGET_S if self.bench.quick else BUDGET_S)
        seconds = dict(zip(others, times, strict=True))
        if rate:
            done, able = 2 * ours.call("multiply_adds") / mine, 2 * MATRIX**3 / seconds.pop("product")
            self._record("rate", done / 1e9, able / 1e9, "NumPy matrix product", rate, "GFLOP/s", more_is_better=True)
        self._record_times(mine, seconds, list(eager))

    def _record_times(self, mine: float, seconds: dict[str, float], eager: list[str]) -> None:
        """Against the best of all, and for some networks against the best eager one."""
        if len(seconds) > 1:
            self.bench.note("; ".join(f"{name} {time:.4g} s" for name, time in seconds.items()))
        high = self.main and self.name != "lenet"
        name, best = least(seconds)
        self._record(WORDS[self.mode], mine, best, name, FASTER if high else NOT_SLOWER, "s")
        if high and self.name in FASTER_THAN_EAGER:
            name, best = least({name: seconds[name] for name in eager})
            self._record(f"{WORDS[self.mode]}, eager", mine, best, name, FASTER_THAN_EAGER[self.name], "s")

    def _record(self, what: str, *figures, **options) -> None:
        self.bench.record(f"{self.name}, {what}, batch {self.rows}", *figures, **options)

    def _start(self, name: str, make, *args) -> Worker:
        network, shape = NETWORKS[self.name]
        common = (network, shape, self.rows, cores(), self.mode)
        return self.sides.enter_context(Worker(name, make, *common, *args, threads=cores()))


def least(found: dict[str, float]) -> tuple[str, float]:
    """The name of the smallest number, and the number."""
    return min(found.items(), key=lambda item: item[1])


def available() -> int:
    """Bytes of memory that programs can still get."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def main() -> None:
    """Every network, mode and batch that is asked for."""
    options = {
        "--only": {"metavar": "NETWORK", "action": "append", "choices": list(NETWORKS), "help": ", ".join(NETWORKS)},
        "--batch": {
            "metavar": "N",
            "action": "append",
            "type": int,
            "help": "in place of the usual ones; inference takes 64 at most",
        },
    }
    bench = Benchmark("step", __doc__, ["numpy", "torch", "onednn-cpu-gomp"], options)
    batches = QUICK if bench.quick else BATCHES
    names = bench.options.only or list(batches)
    with Worker("both sides", import_module, "peers", threads=cores()) as both:
        for name in names:
            both.call("check_equal", *NETWORKS[name], cores())
    for name in names:
        for mode in ("train",) if bench.quick else ("train", "eval"):
            for rows in bench.options.batch or batches.get(name, (4,)):
                Case(bench, name, mode, rows).measure()
    bench.finish()


if __name__ == "__main__":
    main()
