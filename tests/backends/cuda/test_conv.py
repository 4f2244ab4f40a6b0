"""Convolutions and dense layers on the kernels' own source, in both orders of threads, against float64."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.backends.base import Array
from dpnn.backends.cuda import Cuda, cut, product
from dpnn.backends.cuda.bias import BiasGradient
from dpnn.backends.reference import Reference

from ..conftest import Bench
from .shim import Shim

pytestmark = pytest.mark.usefixtures("machine")

CASES = {
    "alexnet-11x11-stride-4": (nn.Conv(10, 11, stride=4, padding=2), (3, 23, 19)),
    "resnet-7x7-stride-2": (nn.Conv(8, 7, stride=2, padding=3), (3, 15, 14)),
    "vgg-3x3": (nn.Conv(36, 3, padding=1), (20, 7, 9)),
    "vgg-first": (nn.Conv(64, 3, padding=1), (3, 9, 17)),
    "vgg-first-out-of-quads": (nn.Conv(66, 3, padding=1), (3, 9, 8)),
    "resnet-first": (nn.Conv(64, 7, stride=2, padding=3), (3, 18, 35)),
    "few-channels-many-filters": (nn.Conv(116, (2, 3), stride=(3, 1)), (3, 9, 8)),
    "few-channels-large-stride": (nn.Conv(48, (3, 2), stride=(1, 4), padding=2), (3, 9, 15)),
    "few-channels-chunks": (nn.Conv(56, (1, 9), padding=(0, 4)), (3, 3, 18)),
    "one-channel": (nn.Conv(60, 5, stride=(2, 1), padding=2), (1, 11, 21)),
    "googlenet-1x1": (nn.Conv(24, 1), (48, 7, 7)),
    "googlenet-5x5": (nn.Conv(33, 5, padding=2, bias=False), (6, 7, 6)),
    "resnet-1x1-stride-2": (nn.Conv(12, 1, stride=2), (16, 7, 8)),
    "resnet-3x3-stride-2": (nn.Conv(20, 3, stride=2, padding=1), (8, 9, 8)),
    "stride-larger-than-the-filter": (nn.Conv(4, (2, 1), stride=(3, 4), padding=1), (4, 9, 8)),
    "alexnet-groups": (nn.Conv(12, 5, padding=2, groups=2), (8, 6, 6)),
    "groups-out-of-quads": (nn.Conv(9, 3, stride=2, groups=3), (15, 7, 6)),
    "depthwise": (nn.Conv(6, 3, padding=1, groups=6), (6, 6, 5)),
    "filter-larger-than-the-image": (nn.Conv(3, (19, 6), padding=(9, 4)), (2, 4, 5)),
    "one-channel-one-filter": (nn.Conv(1, 3), (1, 5, 5)),
    "dense": (nn.Dense(68), (140,)),
    "dense-out-of-quads": (nn.Dense(33), (49,)),
    "dense-one": (nn.Dense(1), (1,)),
}


@pytest.fixture(params=[False, True], ids=["forward", "reverse"])
def shim(request: pytest.FixtureRequest) -> Shim:
    """A device for each order of threads."""
    return Shim(request.param)


def outcome(it: Bench, x: Array, dy: Array) -> Iterator[tuple[str, Any]]:
    """What a layer makes of a first and of a later micro-batch."""
    yield "y", it.put([x], [dy]).forward().copy()
    yield "dx", it.backward()[0].copy()  # type: ignore[union-attr]
    yield from ((role, d.copy()) for role, d in it.d_params.items())
    it.put([x], [dy], first=False).forward()
    it.backward()
    yield from ((f"{role}, added to", d) for role, d in it.d_params.items())


def check(device: Shim, layer: nn.Layer, shape: nn.Shape, rows: int = 2, kind: type[Bench] = Bench) -> None:
    """All that a layer writes agrees with the reference in float64, with room for more rows."""
    ours = kind(Cuda(device), layer, shape, capacity=rows + 1)
    exact = Bench(Reference(np.float64), layer, shape, capacity=rows)
    rng = np.random.default_rng(3)
    for role, value in ours.params.items():
        value[...] = rng.standard_normal(value.shape)
        exact.params[role][...] = value
    x = rng.standard_normal((rows, *shape)).astype(np.float32)
    dy = rng.standard_normal((rows, *ours.node.shape)).astype(np.float32)
    for (what, value), (_, wanted) in zip(outcome(ours, x, dy), outcome(exact, x, dy), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max(), err_msg=what)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(shim: Shim, case: str) -> None:
    check(shim, *CASES[case])


@pytest.mark.parametrize("case", ["vgg-3x3", "resnet-3x3-stride-2", "alexnet-groups", "dense", "dense-out-of-quads"])
def test_parts_of_sums_are_added_up(shim: Shim, case: str) -> None:
    shim.processors = 32
    check(shim, *CASES[case], rows=5)


@pytest.mark.parametrize("case", ["vgg-first", "resnet-first", "few-channels-many-filters", "one-channel"])
def test_blocks_go_from_tile_to_tile_where_channels_are_few(shim: Shim, case: str) -> None:
    shim.processors = 1  # which holds 6 blocks at most, of 7 tiles and more
    check(shim, *CASES[case], rows=7)


@pytest.mark.parametrize("tile", cut.GATHER, ids=lambda tile: tile.name)
def test_every_tile_of_a_gather(shim: Shim, tile: cut.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "GATHER", (tile,))
    check(shim, nn.Conv(132, 3, padding=1), (12, 9, 8))


@pytest.mark.parametrize("case", ["vgg-3x3", "alexnet-groups", "dense", "dense-out-of-quads"])
def test_a_gather_of_operands_that_lie_anywhere(shim: Shim, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "address", lambda array: 4)
    check(shim, *CASES[case], rows=5)


@pytest.mark.parametrize("tile", cut.WEIGHTS, ids=lambda tile: tile.name)
def test_every_tile_of_a_gradient_of_filters(shim: Shim, tile: cut.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "WEIGHTS", (tile,))
    check(shim, nn.Conv(132, (2, 3)), (24, 5, 4))


@pytest.mark.parametrize("processors", [2, 32], ids=["whole", "in-parts"])
@pytest.mark.parametrize(
    "case", ["vgg-first", "vgg-3x3", "groups-out-of-quads", "googlenet-5x5", "dense", "dense-out-of-quads"]
)
def test_the_relu_behind_is_computed_with_it(shim: Shim, case: str, processors: int) -> None:
    shim.processors = processors
    layer, shape = CASES[case]
    ours, exact = (Bench(backend, layer, shape) for backend in (Cuda(shim), Reference(np.float64)))
    for role, value in ours.params.items():
        value[...] = np.random.default_rng(1).standard_normal(value.shape)
        exact.params[role][...] = value
    ours.op.relu = True  # type: ignore[attr-defined]
    (x,), (dy,) = ours.samples(3)
    wanted = exact.put([x]).forward()
    y = ours.put([x], [dy]).forward()
    np.testing.assert_allclose(y, np.maximum(wanted, 0), atol=3e-6 * wanted.max())
    assert 0.1 < (y == 0).mean() < 0.9
    exact.put([x], [np.where(y > 0, dy, 0)])
    for ours_dx, wanted_dx in zip(ours.backward(), exact.backward(), strict=True):
        np.testing.assert_allclose(ours_dx, wanted_dx, atol=3e-6 * np.abs(wanted_dx).max())  # type: ignore[type-var]
    for role, value in exact.d_params.items():
        np.testing.assert_allclose(ours.d_params[role], value, atol=3e-6 * np.abs(value).max(), err_msg=role)


class Shifted(Bench):
    """Parameters and their gradients lie one number behind a multiple of 16 bytes, as they may in a flat array."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.moved: dict[tuple[str, str], Array] = {}
        super().__init__(*args, **kwargs)

    def _moved(self, kind: str, arrays: dict[str, Array], role: str) -> Array:
        if (kind, role) not in self.moved:
            value = arrays[role]
            raw = np.zeros(value.size + 8, np.float32)
            start = -(raw.ctypes.data // 4) % 4 + 1
            arrays[role] = self.moved[kind, role] = raw[start : start + value.size].reshape(value.shape)
            arrays[role][...] = value
        return self.moved[kind, role]

    def param(self, node: nn.Node, role: str) -> Array:
        return self._moved("value", self.params, role)

    def d_param(self, node: nn.Node, role: str) -> Array:
        return self._moved("gradient", self.d_params, role)


@pytest.mark.parametrize("case", ["dense", "googlenet-1x1", "vgg-first", "vgg-3x3"])
def test_parameters_may_lie_anywhere(shim: Shim, case: str) -> None:
    check(shim, *CASES[case], kind=Shifted)


@pytest.mark.parametrize("k", [1, 6, 36, 132])
@pytest.mark.parametrize("m", [1, 37, 150])
def test_the_pass_over_dy(shim: Shim, m: int, k: int) -> None:
    rng = np.random.default_rng(m + k)
    y, dy = (rng.standard_normal((m, k)).astype(np.float32) for _ in range(2))
    wanted = np.where(y > 0, dy, 0)
    total = np.full(k, 2, np.float32)
    partial = np.full(BiasGradient.scratch(k, shim.processors), np.nan, np.float32)
    gradient = BiasGradient(shim, k)
    plain = dy.copy()
    gradient(m, None, plain, partial, total, 0)
    np.testing.assert_array_equal(plain, dy)
    np.testing.assert_allclose(total, dy.sum(0, np.float64), atol=1e-5)
    gradient(m, y, dy, partial, total, 1)
    np.testing.assert_array_equal(dy, wanted)
    np.testing.assert_allclose(total, plain.sum(0, np.float64) + wanted.sum(0, np.float64), atol=1e-5)


@pytest.mark.parametrize("tiles", [cut.GATHER, cut.WEIGHTS], ids=["gather", "weights"])
def test_a_cut_covers_the_product_and_fits_its_scratch(tiles: tuple[cut.Tile, ...]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        m, n, k = (int(2 ** rng.uniform(0, 14)) for _ in range(3))
        groups, processors = int(rng.integers(1, 4)), int(rng.choice([2, 108, 132]))
        chosen = cut.plan(tiles, m, n, k, groups, processors)
        down, across, depth = chosen.grid
        assert down * chosen.tile.rows >= m
        assert across * chosen.tile.columns >= n
        assert depth == chosen.parts * groups
        assert chosen.part % cut.STEP == 0
        assert (chosen.parts - 1) * chosen.part < k <= chosen.parts * chosen.part
        if chosen.parts > 1:
            more = int(rng.integers(0, 3))
            size = cut.partial_size(m + more, n + more, k + more, groups, processors)
            assert chosen.parts * groups * m * -(-n // 4) * 4 <= size
