"""Joins, forks and flattening on a device: any number of inputs, widths that are and aren't multiples of four."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.cuda import Cuda
from dpnn.backends.reference import Reference

from .behind import WithReLU
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(params=[False, True], ids=["", "reverse"])
def device(request: pytest.FixtureRequest) -> Shim:
    return Shim(request.param)


def run(it: Any, inputs: Any, dys: Any) -> list[Any]:
    """The output and the gradients of the inputs."""
    y = it.put(inputs, dys).forward().copy()
    return [y, *it.backward()]


def compare(device: Shim, bench: Any, layer: nn.Layer, *shapes: nn.Shape, rows: int = 3) -> None:
    """Bit for bit what the reference writes in float32."""
    ours, wanted = (bench(kind, layer, *shapes, capacity=rows + 1) for kind in (Cuda(device), Reference(np.float32)))
    samples = ours.samples(rows)
    for a, b in zip(run(ours, *samples), run(wanted, *samples), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("inputs", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (1030,)], ids=str)
def test_a_sum_of_any_number_of_inputs(device: Shim, bench: Any, shape: nn.Shape, inputs: int) -> None:
    compare(device, bench, nn.Add(), *[shape] * inputs)


@pytest.mark.parametrize("inputs", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(3, 5, 7), (256, 3, 3), (1,)], ids=str)
def test_a_sum_and_the_relu_behind_it(device: Shim, bench: Any, shape: nn.Shape, inputs: int) -> None:
    ours = bench(WithReLU(Cuda(device)), nn.Add(), *[shape] * inputs)
    wanted = bench(Reference(np.float32), nn.Add(), *[shape] * inputs)
    xs, dys = ours.samples(3)
    total = wanted.put(xs).forward()
    y, *dxs = run(ours, xs, dys)
    np.testing.assert_array_equal(y, np.maximum(total, 0))
    for dx in dxs:
        np.testing.assert_array_equal(dx, dys[0].astype(np.float32) * (total > 0))


def test_a_sum_of_which_only_some_inputs_are_trained(device: Shim, bench: Any) -> None:
    class Half(bench):
        def d_input(self, node: nn.Node, position: int = 0) -> Any:
            return super().d_input(node, position) if position == 1 else None

    it = Half(WithReLU(Cuda(device)), nn.Add(), *[(3, 2, 2)] * 3)
    xs, dys = it.samples(2)
    y = it.put(xs, dys).forward()
    np.testing.assert_array_equal(it.backward()[1], dys[0].astype(np.float32) * (y > 0))
    assert np.isnan(it.d_inputs[2]).all()


def test_a_relu_passes_on_what_is_not_a_number(device: Shim, bench: Any) -> None:
    for kind in (nn.Add(), nn.ReLU()):
        backend = WithReLU(Cuda(device)) if isinstance(kind, nn.Add) else Cuda(device)
        it = bench(backend, kind, (5,))
        x = np.array([[1, np.nan, -1, np.inf, -np.inf]])
        np.testing.assert_array_equal(it.put([x]).forward(), [[1, np.nan, 0, np.inf, 0]])


@pytest.mark.parametrize("readers", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (1028,)], ids=str)
def test_a_fork_adds_what_its_readers_give_back(device: Shim, bench: Any, shape: nn.Shape, readers: int) -> None:
    compare(device, bench, nn.Fork(readers=readers), shape)


@pytest.mark.parametrize(
    "widths", [(1,), (1, 2, 3), (4, 8), (4, 3), (132, 260, 4), (35, 70), (4, 8, 4, 12, 8), (3, 1, 2, 5, 1, 4)], ids=str
)
@pytest.mark.parametrize("image", [(), (1, 1), (5, 9)], ids=str)
def test_inputs_are_joined_along_the_channels(device: Shim, bench: Any, widths: Any, image: Any) -> None:
    compare(device, bench, nn.Concat(), *[(width, *image) for width in widths], rows=2)


def test_joined_inputs_of_which_some_are_not_trained(device: Shim, bench: Any) -> None:
    class Half(bench):
        def d_input(self, node: nn.Node, position: int = 0) -> Any:
            return super().d_input(node, position) if position == 1 else None

    it = Half(Cuda(device), nn.Concat(), (4, 3, 3), (2, 3, 3))
    xs, dys = it.samples(2)
    it.put(xs, dys).forward()
    np.testing.assert_array_equal(it.backward()[1], dys[0][:, 4:].astype(np.float32))
    assert np.isnan(it.d_inputs[0]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (40, 1, 1), (3, 2, 5), (32, 4, 8), (33, 5, 7), (7,)], ids=str)
def test_flattening_gives_the_canonical_order(device: Shim, bench: Any, shape: nn.Shape) -> None:
    compare(device, bench, nn.Flatten(), shape)
