"""How near each CUDA kernel comes to what bounds it: moving bytes, or float32 arithmetic; at batch 64.

The bounds are measured on the same GPU in the same run: a copy within its memory, and multiply-adds that don't wait for
one another. A layer's bound is the longer of the times that its bytes and its operations take. Bytes are those of a
layer by itself that reads each array once, BatchNorm twice. Convolutions stand beside PyTorch too, channels-last and
without tensor cores. Caches are cold, times are medians. Without a GPU there are no rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from convolution import NETWORKS, convolutions
from harness import Benchmark
from limits import Call, Clock, GpuClock, Limits, measure
from lone import PATTERN, Lone

from dpnn import nn
from dpnn.backends.cuda import Cuda
from dpnn.native import Unavailable
from dpnn.nn import Layer, Shape
from dpnn.nn.layer import pair

ROWS = 64
N_FLAT = 138_357_544
"""VGG-16's parameters."""
MEMORY_GOAL, FLOAT32_GOAL, PEER_GOAL = 0.8, 0.7, 1.0

PASSES: dict[type[Layer], tuple[tuple[int, int], tuple[int, int]]] = {
    nn.ReLU: ((1, 1), (1, 2)),
    nn.Add: ((1, 1), (1, 2)),
    nn.Concat: ((1, 1), (1, 1)),
    nn.Dropout: ((1, 1), (1, 1)),
    nn.Flatten: ((1, 1), (1, 1)),
    nn.MaxPool: ((1, 1), (2, 1)),
    nn.AvgPool: ((1, 1), (1, 1)),
    nn.GlobalAvgPool: ((1, 1), (1, 1)),
    nn.LocalResponseNorm: ((1, 1), (2, 1)),
    nn.BatchNorm: ((2, 1), (3, 2)),
    nn.SoftmaxCrossEntropy: ((1, 0), (2, 0)),
}
"""How often forward, and backward, read or write what has the inputs' size, and what has the output's. Backward of a
ReLU, and of Add with one behind it, reads the output; that of MaxPool, LRN, BatchNorm and the loss reads the inputs."""


@dataclass(frozen=True)
class Case:
    """A layer, a ReLU behind it or not, the shapes of its inputs."""

    layer: Layer
    shapes: Sequence[Shape]
    relu: bool = False

    def __str__(self) -> str:
        kind = type(self.layer).__name__ + "+ReLU" * self.relu
        if isinstance(self.layer, nn.MaxPool | nn.AvgPool):
            kind += f" {self.layer.size}/{self.layer.step[0]}"
        return f"{kind} {' '.join('x'.join(map(str, shape)) for shape in self.shapes if shape)}"


CASES = [
    Case(nn.ReLU(), [(64, 112, 112)]),
    Case(nn.Add(), [(256, 56, 56)] * 2, relu=True),
    Case(nn.BatchNorm(), [(64, 112, 112)], relu=True),
    Case(nn.BatchNorm(), [(256, 56, 56)], relu=True),
    Case(nn.BatchNorm(), [(2048, 7, 7)], relu=True),
    Case(nn.MaxPool(2), [(64, 224, 224)]),
    Case(nn.MaxPool(3, 2, padding=1), [(64, 112, 112)]),
    Case(nn.MaxPool(3, 1, padding=1), [(480, 14, 14)]),
    Case(nn.GlobalAvgPool(), [(2048, 7, 7)]),
    Case(nn.AvgPool(5, 3), [(512, 14, 14)]),
    Case(nn.LocalResponseNorm(5), [(96, 55, 55)]),
    Case(nn.LocalResponseNorm(5), [(192, 56, 56)]),
    Case(nn.Concat(), [(64, 28, 28), (128, 28, 28), (32, 28, 28), (32, 28, 28)]),
    Case(nn.Flatten(), [(512, 7, 7)]),
    Case(nn.Dropout(), [(9216,)]),
    Case(nn.SoftmaxCrossEntropy(), [(1000,), ()]),
]
DENSE = [(nn.Dense(4096), (25088,)), (nn.Dense(4096), (4096,)), (nn.Dense(1000), (4096,))]


class Rates:
    """Rows of one run."""

    def __init__(self, bench: Benchmark, backend: Cuda, clock: Clock, limits: Limits, rows: int, repeat: int) -> None:
        self.bench, self.backend, self.rows = bench, backend, rows
        self._limits, self.seconds = limits, partial(clock.seconds, repeat=repeat)

    def rate(self, title: str, seconds: float, nbytes: float, operations: float = 0.0) -> None:
        """A row beside what bounds the case."""
        if operations / self._limits.float32 > nbytes / self._limits.copy:
            done, limit, name, goal, unit = operations, self._limits.float32, "multiply-adds", FLOAT32_GOAL, "GFLOP/s"
        else:
            done, limit, name, goal, unit = nbytes, self._limits.copy, "copy", MEMORY_GOAL, "GB/s"
        self.bench.record(title, done / seconds / 1e9, limit / 1e9, name, goal, unit, more_is_better=True)

    def moving(self, case: Case) -> None:
        """A layer that memory bounds."""
        lone = Lone(self.backend, case.layer, case.shapes, self.rows, case.relu)
        op = lone.build()
        for name, call, (xs, ys) in zip(
            ("forward", "backward"), (op.forward, op.backward), PASSES[type(case.layer)], strict=True
        ):
            self.rate(f"{case}, {name}", self.seconds(call), 4 * (xs * lone.n_inputs + ys * lone.n_outputs))

    def product(self, title: str, layer: nn.Conv | nn.Dense, shape: Shape, first: bool, peers: dict[str, Call]) -> None:
        """A convolution or dense layer, and the same by PyTorch.

        Backward by the data is what backward takes beyond that by the weights.
        """
        lone = Lone(self.backend, layer, [shape], self.rows)
        lone.data = False
        weights = lone.build()
        times = {"forward": self.seconds(weights.forward), "weights": self.seconds(weights.backward)}
        if not first:
            lone.data = True
            times["data"] = self.seconds(lone.build().backward) - times["weights"]
        operations = 2 * lone.n_outputs * lone.n_weights // lone.node.shape[0]
        nbytes = 4 * (lone.n_inputs + lone.n_outputs + lone.n_weights)
        for name, seconds in times.items():
            if seconds <= 0:
                self.bench.note(f"{title}, {name}: too short to tell")
                continue
            self.rate(f"{title}, {name}", seconds, nbytes, operations)
            if name in peers:
                self.bench.record(f"{title}, {name}", seconds, self.seconds(peers[name]), "PyTorch", PEER_GOAL, "s")

    def flat(self, n: int) -> None:
        """Updates, sums and bfloat16 over n numbers."""
        device, flat = self.backend.device, self.backend.arithmetic
        p, g, kept = (device.empty(4 * n).view(np.float32) for _ in range(3))
        device.push(np.resize(PATTERN, n), g)
        for array in (p, kept):
            device.zero(array)
        half = device.empty(4 * n).view(np.uint16)
        rule = (1e-6, 1.0, 1e-4)
        for title, moved, call in (
            ("momentum", 20, partial(flat.call, "descend", n, p, g, kept, *rule, 0.9, False)),
            ("plain SGD", 12, partial(flat.call, "descend", n, p, g, None, *rule, 0.0, False)),
            ("Adagrad", 20, partial(flat.call, "adagrad", n, p, g, kept, *rule, 1e-10)),
            ("running statistics", 12, partial(flat.call, "blend", n, p, g, 0.1)),
            ("sum of two", 12, partial(flat.call, "add", n, 2, [p, g], p)),
            ("sum of squares", 4, partial(flat.sum_of_squares, [g])),
            ("to bfloat16", 14, partial(flat.call, "to_bfloat16", n, g, kept, half)),
            ("sum of two in bfloat16", 8, partial(flat.call, "add_bfloat16", n, 2, n, half, p)),
        ):
            self.rate(f"{title}, {n / 1e6:.3g} M numbers", self.seconds(call), moved * n)


class Torch:
    """PyTorch's calls, in the queue of a `Gpu`."""

    def __init__(self, gpu: Any) -> None:
        """ImportError where it isn't installed, or for CPUs only."""
        import torch

        if not torch.cuda.is_available():
            raise ImportError("this PyTorch finds no GPU")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        self._torch, self._stream = torch, torch.cuda.ExternalStream(gpu._queue.ptr)

    def conv(self, conv: nn.Conv, shape: Shape, rows: int) -> dict[str, Call]:
        """Forward, and both halves of backward."""
        torch = self._torch

        def random(*shape: int) -> Any:
            return torch.randn(shape, device="cuda").contiguous(memory_format=torch.channels_last)

        size, stride, padding = pair(conv.size), pair(conv.stride), pair(conv.padding)
        with torch.cuda.stream(self._stream):
            x, w = random(rows, *shape), random(conv.filters, shape[0] // conv.groups, *size)
            dy = random(rows, *conv.infer(shape))
            bias = torch.randn(conv.filters, device="cuda") if conv.bias else None
        forward = partial(torch.nn.functional.conv2d, x, w, bias, stride, padding, 1, conv.groups)
        sizes = [conv.filters] if conv.bias else None
        how = (dy, x, w, sizes, stride, padding, (1, 1), False, (0, 0), conv.groups)
        backward = partial(torch.ops.aten.convolution_backward, *how)
        calls = {
            "forward": forward,
            "weights": partial(backward, [False, True, conv.bias]),
            "data": partial(backward, [True, False, False]),
        }
        return {name: partial(self._run, call) for name, call in calls.items()}

    def _run(self, call: Callable[[], object]) -> None:
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            call()


def products(every: int) -> Iterator[tuple[str, nn.Conv, Shape, bool]]:
    """Every so-manieth of the different convolutions of VGG-16 and ResNet-50, with a title."""
    for name, network in NETWORKS.items():
        for conv, shape, first in convolutions(network)[::every]:
            window, stride = "x".join(map(str, pair(conv.size))), pair(conv.stride)[0]
            title = f"{name} {'x'.join(map(str, shape))} {conv.filters} of {window}" + f"/{stride}" * (stride > 1)
            yield title, conv, shape, first


def main() -> None:
    """All cases, or (quick) some at batch 8."""
    bench = Benchmark("kernels", __doc__, ["numpy", "cupy-cuda13x", "torch"])
    try:
        from dpnn.backends.cuda.gpu import Gpu

        gpu = Gpu()
    except (ImportError, Unavailable) as error:
        bench.note(f"no GPU to measure on: {error}")
        return
    rows, repeat, every = (8, 5, 6) if bench.quick else (ROWS, 20, 1)
    clock = GpuClock(gpu)
    limits = measure(gpu, clock, repeat)
    bench.note(f"{gpu.about}: a copy {limits.copy / 1e9:.0f} GB/s, float32 {limits.float32 / 1e12:.1f} TFLOP/s")
    rates = Rates(bench, Cuda(gpu), clock, limits, rows, repeat)
    rates.flat(N_FLAT // 8 if bench.quick else N_FLAT)
    for case in CASES:
        rates.moving(case)
    try:
        torch = Torch(gpu)
    except ImportError as error:
        bench.note(f"convolutions have no peer: {error}")
        torch = None
    for title, conv, shape, first in products(every):
        rates.product(title, conv, shape, first, torch.conv(conv, shape, rows) if torch else {})
    for dense, shape in DENSE:
        rates.product(f"dense {shape[0]} to {dense.units}", dense, shape, False, {})
    bench.finish()


if __name__ == "__main__":
    main()
