"""Each algorithm, in each direction where it can be used, on convolutions drawn at random."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from dpnn.backends.onednn import unfold, winograd
from dpnn.backends.onednn.conv import ConvOp, Kit
from dpnn.backends.onednn.geometry import DIRECTIONS, Geometry
from dpnn.backends.reference import Reference
from dpnn.errors import JobError
from dpnn.nn import Conv

from ..conftest import ONEDNN, Bench
from .conftest import force, same

SMALL = st.integers(1, 5)
SIZES = st.sampled_from([1, 3, 5]) | SMALL | st.tuples(SMALL, SMALL)
PER_GROUP = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 33])


@st.composite
def geometries(draw: Callable[..., Any]) -> tuple[Conv, tuple[int, int, int], int]:
    """A layer, the shape of its images, how many."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = 3 if groups == 1 and draw(st.booleans()) else groups * draw(PER_GROUP)
    stride = draw(st.just(1) | st.integers(1, 4) | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.integers(0, 4) | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    filters, bias = groups * draw(PER_GROUP), draw(st.booleans())
    layer = Conv(filters, draw(SIZES), stride, padding, groups, bias)
    return layer, (channels, draw(st.integers(1, 14)), draw(st.integers(1, 14))), draw(st.integers(1, 4))


def outcome(it: Bench, inputs: list[Any], dys: list[Any]) -> Iterator[tuple[str, Any]]:
    """What a convolution makes of a first and of a later micro-batch."""
    yield "y", it.put(inputs, dys).forward().copy()
    yield "dx", cast(Any, it.backward()[0]).copy()
    yield from ((f"d_{role}", d.copy()) for role, d in it.d_params.items())
    it.put(inputs, dys, first=False).forward()
    it.backward()
    yield from ((f"d_{role}, added to", d) for role, d in it.d_params.items())


def check(name: str, layer: Conv, shape: tuple[int, int, int], rows: int, seed: int) -> set[str]:
    """All directions agree with the reference in float64, with room for more rows; the directions that `name` made."""
    with pytest.MonkeyPatch.context() as patch:
        force(patch, **dict.fromkeys(DIRECTIONS, name))
        ours = Bench(ONEDNN, layer, shape, capacity=rows + 1)
        exact = Bench(Reference(np.float64), layer, shape, capacity=rows)
        rng = np.random.default_rng(seed)
        for role, value in ours.params.items():
            value[...] = rng.standard_normal(value.shape)
            exact.params[role][...] = value
        x = rng.standard_normal((rows, *shape)).astype(np.float32)
        dy = rng.standard_normal((rows, *ours.node.shape)).astype(np.float32)
        results = zip(outcome(ours, [x], [dy]), outcome(exact, [x], [dy]), strict=True)
        for (what, mine), (_, wanted) in results:
            same(f"{name} {what}", mine, wanted)
        op = ours.op
        assert isinstance(op, ConvOp)
        kit, g = op.kit, Geometry.of(ours.node, rows)
        return {direction for direction in DIRECTIONS if name in kit.algorithms(g, direction)}


@pytest.mark.parametrize("name", ["direct", "unfold"])
@settings(max_examples=100, derandomize=True, deadline=None)
@given(geometry=geometries(), seed=st.integers(0, 9))
def test_random_geometries(name: str, geometry: tuple[Conv, tuple[int, int, int], int], seed: int):
    layer, shape, rows = geometry
    try:
        layer.infer(shape)
    except JobError:
        assume(False)
    check(name, layer, shape, rows, seed)


@pytest.mark.parametrize("size", [3, 5])
@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    channels=PER_GROUP,
    filters=PER_GROUP,
    groups=st.sampled_from([1, 2]),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    image=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    tiles=st.sampled_from([12, 24, 10**6]),
)
def test_winograd_in_one_and_in_several_runs_of_tiles(
    size: int, channels: int, filters: int, groups: int, padding: tuple[int, int], image: tuple[int, int], tiles: int
):
    assume(max(padding) < size and all(n + 2 * pad >= size for n, pad in zip(image, padding, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        for number, value in (("_NBYTES", 1), ("_LEAST", tiles), ("_LEAST_OF_GRADIENT", tiles)):
            patch.setattr(winograd, number, value)
        layer = Conv(groups * filters, size, padding=padding, groups=groups)
        assert check("winograd", layer, (groups * channels, *image), 3, 0) == set(DIRECTIONS)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(geometry=geometries(), numbers=st.sampled_from([1, 300, 5000]), pixels=st.sampled_from([1, 7, 64]))
def test_unfolding_in_several_pieces(geometry: tuple[Conv, tuple[int, int, int], int], numbers: int, pixels: int):
    layer, shape, rows = geometry
    try:
        layer.infer(shape)
    except JobError:
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfold, "_NUMBERS", numbers)
        patch.setattr(unfold, "_PIXELS", pixels)
        assert {"forward", "backward_weights"} <= check("unfold", layer, shape, rows, 0)


@pytest.mark.parametrize(
    ("layer", "shape", "names"),
    [
        (Conv(8, 3, padding=1), (8, 9, 9), ("unfold winograd", "winograd", "unfold winograd")),
        (Conv(16, 11, 4), (3, 27, 27), ("unfold", "", "unfold")),
        (Conv(8, 1), (16, 5, 5), ("unfold", "unfold", "unfold")),
    ],
    ids=["3x3", "11x11-stride-4", "1x1"],
)
def test_algorithms_beside_onednns_own(layer: Conv, shape: tuple[int, int, int], names: tuple[str, str, str]):
    """Else the tests above would try less than they seem to."""
    it = Bench(ONEDNN, layer, shape, capacity=2)
    assert isinstance(it.op, ConvOp)
    g = Geometry.of(it.node, 2)
    found = [set(it.op.kit.algorithms(g, direction)) - {"direct"} for direction in DIRECTIONS]
    assert found == [set(wanted.split()) for wanted in names]


def test_the_algorithm_is_that_of_the_most_rows_for_fewer_too(monkeypatch: pytest.MonkeyPatch):
    asked = []
    choose = Kit.choose
    monkeypatch.setattr(Kit, "choose", lambda kit, g, direction: asked.append(g.n) or choose(kit, g, direction))
    it = Bench(ONEDNN, Conv(4, 3), (3, 7, 7), capacity=3)
    inputs, dys = it.samples(2)
    it.put(inputs, dys).forward()
    it.backward()
    assert set(asked) == {3}
