"""The bench that every backend is put on: one layer, in buffers of its own, and the layers that are tried.

A backend that comes later is added to BACKENDS; the bodies of the tests stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.base import Array, Backend, Group, Mode, Op, SplitOp, Step
from dpnn.backends.cuda import Cuda
from dpnn.backends.onednn import OneDNN
from dpnn.backends.reference import Reference
from dpnn.team import Team

from .cuda.copied import on_gpu
from .cuda.shim import DONE, Shim
from .cuda.verified import Verified

ONEDNN = OneDNN(Team(2))
MICROBATCHES = 3
"""That there is room for where gradients are made of the rows of all."""
BACKENDS: dict[str, Callable[[Any], Backend]] = {
    "reference": Reference,
    "onednn": lambda dtype: ONEDNN,
    "cuda": lambda dtype: Cuda(Shim()),
    "gpu": lambda dtype: Cuda(on_gpu()),
}
DTYPES = {"reference": (np.float32, np.float64), "onednn": (np.float32,), "cuda": (np.float32,), "gpu": (np.float32,)}


@dataclass(frozen=True)
class Case:
    """A layer and the shapes of its inputs."""

    label: str
    layer: nn.Layer
    shapes: tuple[nn.Shape, ...]


def _case(label: str, layer: nn.Layer, *shapes: nn.Shape) -> Case:
    return Case(label, layer, shapes)


CASES = [
    _case("conv", nn.Conv(4, 3), (3, 7, 6)),
    _case("conv-1x1", nn.Conv(5, 1, bias=False), (3, 4, 5)),
    _case("conv-rectangular", nn.Conv(2, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 8, 5)),
    _case("conv-stride-leaves-a-row", nn.Conv(2, 3, stride=2), (1, 8, 6)),
    _case("conv-large-padding", nn.Conv(3, 5, stride=3, padding=4), (3, 5, 4)),
    _case("conv-groups", nn.Conv(6, 3, padding=1, groups=3), (3, 5, 4)),
    _case("conv-groups-of-two", nn.Conv(4, (1, 3), groups=2, bias=False), (6, 3, 5)),
    _case("conv-depthwise", nn.Conv(5, 3, padding=1, groups=5), (5, 4, 4)),
    _case("dense", nn.Dense(5), (7,)),
    _case("dense-without-bias", nn.Dense(1, bias=False), (3,)),
    _case("maxpool", nn.MaxPool(2), (3, 6, 5)),
    _case("maxpool-overlap", nn.MaxPool(3, 2), (3, 7, 8)),
    _case("maxpool-padding", nn.MaxPool(3, 2, padding=1), (2, 6, 5)),
    _case("maxpool-ceil", nn.MaxPool(3, 2, ceil=True), (3, 6, 8)),
    _case("maxpool-ceil-padding", nn.MaxPool((2, 3), (3, 2), padding=(1, 0), ceil=True), (1, 7, 6)),
    _case("maxpool-larger-than-the-image", nn.MaxPool(3, 2, ceil=True), (2, 2, 2)),
    _case("avgpool", nn.AvgPool(2), (3, 5, 4)),
    _case("avgpool-padding", nn.AvgPool(3, 1, padding=1), (3, 4, 5)),
    _case("avgpool-ceil", nn.AvgPool((3, 2), (2, 3), ceil=True), (2, 6, 7)),
    _case("avgpool-ceil-padding", nn.AvgPool(3, 2, padding=1, ceil=True), (1, 6, 8)),
    _case("avgpool-larger-than-the-image", nn.AvgPool(4, 3, ceil=True), (2, 2, 5)),
    _case("globalavgpool", nn.GlobalAvgPool(), (3, 3, 5)),
    _case("batchnorm", nn.BatchNorm(), (3, 4, 3)),
    _case("batchnorm-vector", nn.BatchNorm(momentum=0.3, eps=1e-3), (5,)),
    _case("lrn", nn.LocalResponseNorm(5, alpha=0.3, beta=0.75, k=2.0), (7, 3, 2)),
    _case("lrn-even", nn.LocalResponseNorm(4, alpha=0.5), (6, 2, 3)),
    _case("lrn-wider-than-channels", nn.LocalResponseNorm(9, alpha=0.5), (3, 2, 2)),
    _case("relu", nn.ReLU(), (3, 4, 5)),
    _case("dropout", nn.Dropout(0.3), (3, 3, 5)),
    _case("flatten", nn.Flatten(), (3, 2, 5)),
    _case("fork", nn.Fork(readers=3), (3, 2, 2)),
    _case("concat", nn.Concat(), (1, 3, 2), (3, 3, 2), (2, 3, 2)),
    _case("concat-vectors", nn.Concat(), (4,), (1,)),
    _case("add", nn.Add(), (3, 2, 3), (3, 2, 3), (3, 2, 3)),
    _case("softmax", nn.SoftmaxCrossEntropy(), (7,), ()),
    _case("softmax-smoothing", nn.SoftmaxCrossEntropy(weight=0.3, smoothing=0.1), (4,), ()),
    _case("sigmoid", nn.SigmoidCrossEntropy(weight=0.5), (6,), (6,)),
]


class Bench:
    """One layer of a backend, bound to buffers that are NaN wherever nothing was put: it is the slot, too.

    Buffers have room for `capacity` rows. Of integers, where there is no NaN, the largest stands where nothing was put.
    """

    def __init__(
        self,
        backend: Backend,
        layer: nn.Layer,
        *shapes: nn.Shape,
        capacity: int = 3,
        mode: Mode = "train",
        name: str = "it",
    ) -> None:
        layer = replace(layer, name=name)
        if layer.reads_ids:
            shapes = (*shapes, ())
        params = tuple(
            nn.Param(f"{name}.{role}", role, spec, 0, spec.shape) for role, spec in layer.params(*shapes).items()
        )
        inputs = tuple(range(len(shapes)))
        self.node = nn.Node(len(shapes), name, layer, inputs, shapes, layer.infer(*shapes), params, True, False)
        declined = Reference(backend.dtype).groups([self.node], mode)  # as in a plan, where the next backend is asked
        self.group: Group = (backend.groups([self.node], mode) or declined)[0]
        self.dtype, self.capacity, self.step = backend.dtype, capacity, Step()
        self.channels_last = backend.channels_last
        room = self.group.backend.room(self.group, capacity, mode)
        self.rooms = [self._bytes(n) for n in room.sizes(capacity * MICROBATCHES)]
        self.inputs = [self._room(shape, self._kind(i), self._batched(i)) for i, shape in enumerate(shapes)]
        self.d_inputs = [self._like(x) if np.issubdtype(x.dtype, np.floating) else None for x in self.inputs]
        kind = self.dtype if layer.dtype == "float" else np.dtype(layer.dtype)
        self.output_buffer = self._room(self.node.shape, kind, layer.batched)
        readers = layer.readers if isinstance(layer, nn.Fork) else 1
        self.dys = [self._like(self.output_buffer) for _ in range(readers)]
        if self.group.forward_view:
            self.output_buffer = self.inputs[0].reshape(self.output_buffer.shape)
        if self.group.backward_view:
            self.d_inputs[0] = self.dys[0].reshape(self.inputs[0].shape)
        if self.group.in_place is not None:
            self.d_inputs[self.group.in_place[1]] = self.dys[0]
        rng = np.random.default_rng(5)
        self.params = {p.role: rng.uniform(0.5, 1.5, p.spec.shape).astype(self.dtype) for p in params}
        self.d_params = {role: np.full_like(value, np.nan) for role, value in self.params.items()}
        self.op: Op = self.group.backend.build(self.group, self, mode)

    def _kind(self, position: int) -> np.dtype[Any]:
        layer = self.node.layer
        if position == 0 or isinstance(layer, nn.Concat | nn.Add):
            return self.dtype
        if isinstance(layer, nn.BatchNormalize):
            return np.dtype(np.float64)
        kinds = {nn.Dropout: np.uint64, nn.SoftmaxCrossEntropy: np.int32, nn.SigmoidCrossEntropy: np.uint8}
        return np.dtype(kinds[type(layer)])

    def _batched(self, position: int) -> bool:
        return not (isinstance(self.node.layer, nn.BatchNormalize) and position == 1)

    def _room(self, shape: nn.Shape, dtype: np.dtype[Any], batched: bool) -> Array:
        nothing = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
        if batched and len(shape) == 3 and self.channels_last:
            c, h, w = shape
            return np.full((self.capacity, h, w, c), nothing, dtype).transpose(0, 3, 1, 2)
        return np.full((self.capacity, *shape) if batched else shape, nothing, dtype)

    def _like(self, array: Array) -> Array:
        return np.full_like(array, np.nan)

    def _bytes(self, n: int) -> Array:
        """Scratch: aligned, and NaN whatever it is taken for."""
        raw = np.full(n + 64, 255, np.uint8)
        return raw[-raw.ctypes.data % 64 :][:n]

    def room(self, group: Group) -> tuple[Array, ...]:
        return tuple(self.rooms)

    def input(self, node: nn.Node, position: int = 0) -> Array:
        return self.inputs[position]

    def output(self, node: nn.Node) -> Array:
        return self.output_buffer

    def d_output(self, node: nn.Node) -> Array:
        return self.dys[0]

    def d_outputs(self, fork: nn.Node) -> list[Array]:
        return self.dys

    def d_input(self, node: nn.Node, position: int = 0) -> Array | None:
        return self.d_inputs[position]

    def param(self, node: nn.Node, role: str) -> Array:
        return self.params[role]

    def d_param(self, node: nn.Node, role: str) -> Array:
        return self.d_params[role]

    def put(self, inputs: Sequence[Array], dys: Sequence[Array] = (), **step: Any) -> "Bench":
        """Fill the first rows: as many as the inputs have. `step`: fields of Step, else those of a lone rank."""
        rows = len(inputs[0])
        values = {"rows": rows, "batch": rows, "total": rows, **step}
        for name, value in values.items():
            setattr(self.step, name, value)
        for position, value in enumerate(inputs):
            if self._batched(position):
                self.inputs[position][:rows] = value
            else:
                self.inputs[position][...] = value
        for buffer, value in zip(self.dys, dys, strict=False):
            if self.node.layer.batched:
                buffer[:rows] = value
            else:
                buffer[...] = value
        return self

    def forward(self) -> Array:
        """The output of the rows that were put."""
        if not self.group.forward_view:
            self.op.forward()
        return self.output_buffer[: self.step.rows] if self.node.layer.batched else self.output_buffer

    def backward(self) -> list[Array | None]:
        """The gradients of the inputs, of the rows that were put."""
        if not self.group.backward_view:
            self.op.backward()
        if self.group.splits:
            cast(SplitOp, self.op).weights()
        return [
            dx if dx is None or not self._batched(i) else dx[: self.step.rows] for i, dx in enumerate(self.d_inputs)
        ]

    def samples(self, rows: int, seed: int = 0) -> tuple[list[Array], list[Array]]:
        """Inputs and gradients of outputs, drawn for this layer.

        Numbers of inputs lie apart from each other and from zero, so that no small step crosses a kink.
        """
        rng = np.random.default_rng(seed)
        inputs: list[Array] = []
        for position, buffer in enumerate(self.inputs):
            shape = (rows, *buffer.shape[1:])
            if np.issubdtype(buffer.dtype, np.floating):
                n = int(np.prod(shape))
                inputs.append(((rng.permutation(n) - n / 2 + 0.25) * (4 / max(n, 1))).reshape(shape))
            elif isinstance(self.node.layer, nn.Dropout):
                inputs.append(rng.integers(0, 2**63, shape, np.uint64))
            else:
                classes = self.inputs[0].shape[1] if position == 1 and len(shape) == 1 else 2
                inputs.append(rng.integers(0, classes, shape))
        dys = [rng.standard_normal((rows, *self.node.shape)) for _ in self.dys] if self.node.layer.batched else []
        return inputs, dys


@pytest.fixture
def bench() -> type[Bench]:
    """What puts a layer of a backend on the bench."""
    return Bench


@pytest.fixture(params=CASES, ids=lambda case: case.label)
def case(request: pytest.FixtureRequest) -> Case:
    """Every layer."""
    return request.param


@pytest.fixture(params=[c for c in CASES if not isinstance(c.layer, nn.Dropout)], ids=lambda case: case.label)
def steady_case(request: pytest.FixtureRequest) -> Case:
    """Every layer that draws no random numbers."""
    return request.param


@pytest.fixture(
    params=[
        pytest.param((name, dtype), marks=pytest.mark.gpu if name == "gpu" else ())
        for name in BACKENDS
        for dtype in DTYPES[name]
    ],
    ids=lambda p: f"{p[0]}-{p[1].__name__}",
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend in every type that it computes in."""
    name, dtype = request.param
    return BACKENDS[name](dtype)


@pytest.fixture(params=[name for name in BACKENDS if np.float64 in DTYPES[name]])
def exact_backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend that computes in float64."""
    return BACKENDS[request.param](np.float64)


def pytest_configure(config: pytest.Config) -> None:
    """Notes for `--verified`."""
    folder = config.getoption("--verified")
    if folder:
        config.pluginmanager.register(Verified(folder, DONE))
