"""What each layer says of itself: the shape it makes, the parameters it needs, and what it can't take."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn import nn
from dpnn.errors import JobError
from dpnn.nn.window import slide


@pytest.mark.parametrize(
    ("layer", "shapes", "out"),
    [
        (nn.Conv(20, 5), [(1, 28, 28)], (20, 24, 24)),
        (nn.Conv(96, 11, stride=4, padding=2), [(3, 224, 224)], (96, 55, 55)),
        (nn.Conv(7, (1, 3), stride=(2, 1), padding=(0, 1)), [(4, 5, 6)], (7, 3, 6)),
        (nn.Dense(10), [(500,)], (10,)),
        (nn.MaxPool(3, 2), [(64, 55, 55)], (64, 27, 27)),
        (nn.MaxPool(3, 2, ceil=True), [(64, 112, 112)], (64, 56, 56)),
        (nn.MaxPool(3, 2, padding=1), [(64, 112, 112)], (64, 56, 56)),
        (nn.AvgPool((2, 3)), [(5, 7, 7)], (5, 3, 2)),
        (nn.AvgPool(2, ceil=True), [(5, 7, 6)], (5, 4, 3)),
        (nn.MaxPool(2, 2, padding=1, ceil=True), [(1, 3, 3)], (1, 2, 2)),
        (nn.GlobalAvgPool(), [(2048, 7, 7)], (2048,)),
        (nn.BatchNorm(), [(3, 4, 5)], (3, 4, 5)),
        (nn.BatchNorm(), [(3,)], (3,)),
        (nn.BatchSums(), [(3, 4, 5)], (2, 3)),
        (nn.BatchNormalize(), [(3, 4, 5), (2, 3)], (3, 4, 5)),
        (nn.LocalResponseNorm(), [(96, 5, 5)], (96, 5, 5)),
        (nn.ReLU(), [(3, 4, 5)], (3, 4, 5)),
        (nn.Dropout(0), [(3, 4, 5), ()], (3, 4, 5)),
        (nn.Flatten(), [(3, 4, 5)], (60,)),
        (nn.Flatten(), [(3,)], (3,)),
        (nn.Concat(), [(3, 4, 5), (2, 4, 5)], (5, 4, 5)),
        (nn.Add(), [(3, 4, 5), (3, 4, 5)], (3, 4, 5)),
        (nn.Fork(readers=2), [(3, 4, 5)], (3, 4, 5)),
        (nn.SoftmaxCrossEntropy(), [(10,), ()], ()),
        (nn.SigmoidCrossEntropy(), [(10,), (10,)], ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else None,
)
def test_the_shape_of_the_output(layer: nn.Layer, shapes: list[nn.Shape], out: nn.Shape) -> None:
    assert layer.infer(*shapes) == out


def test_the_parameters_of_a_convolution() -> None:
    specs = nn.Conv(6, (3, 2), groups=3).params((9, 8, 8))
    assert specs["weight"] == nn.ParamSpec((6, 3, 3, 2), "he", fan_in=18, decay=True)
    assert specs["bias"] == nn.ParamSpec((6,), "zeros")
    assert list(nn.Conv(6, 3, bias=False).params((9, 8, 8))) == ["weight"]


def test_the_parameters_of_a_dense_layer() -> None:
    specs = nn.Dense(5).params((7,))
    assert specs["weight"] == nn.ParamSpec((5, 7), "he", fan_in=7, decay=True)
    assert specs["bias"] == nn.ParamSpec((5,), "zeros")
    assert list(nn.Dense(5, bias=False).params((7,))) == ["weight"]


@pytest.mark.parametrize("layer", [nn.BatchNorm(momentum=0.2), nn.BatchNormalize(momentum=0.2)])
def test_batch_normalisation_keeps_statistics_that_move_by_its_momentum(layer: nn.Layer) -> None:
    assert layer.params((4, 3, 3), (2, 4)) == {
        "weight": nn.ParamSpec((4,), "ones"),
        "bias": nn.ParamSpec((4,), "zeros"),
        "running_mean": nn.ParamSpec((4,), "zeros", statistic=0.2),
        "running_var": nn.ParamSpec((4,), "ones", statistic=0.2),
    }


@pytest.mark.parametrize(
    "layer",
    [nn.MaxPool(2), nn.AvgPool(2), nn.GlobalAvgPool(), nn.LocalResponseNorm(), nn.ReLU(), nn.Dropout(), nn.Flatten()],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_parameters(layer: nn.Layer) -> None:
    assert layer.params((4, 4, 4)) == {}


@pytest.mark.parametrize(
    ("layer", "shapes", "says"),
    [
        (nn.Conv(4, 3), [(10,)], r"\(10,\).*\(C, H, W\)"),
        (nn.Conv(4, 5, padding=1), [(1, 2, 9)], r"\(1, 2, 9\).*at least 3 rows and 3 columns"),
        (nn.Conv(4, 3, groups=3), [(3, 9, 9)], "filters = 4 can't be divided among groups = 3"),
        (nn.Conv(6, 3, groups=3), [(4, 9, 9)], "input channels = 4 can't be divided among groups = 3"),
        (nn.Conv(0, 3), [(4, 9, 9)], "filters = 0.*use 1 or more"),
        (nn.Conv(4, 3, stride=0), [(4, 9, 9)], "stride = 0.*use 1 or more"),
        (nn.Conv(4, 3, padding=-1), [(4, 9, 9)], "padding = -1.*0 or more"),
        (nn.Dense(10), [(4, 9, 9)], r"\(4, 9, 9\).*Flatten"),
        (nn.Dense(0), [(4,)], "units = 0"),
        (nn.MaxPool(4), [(4, 3, 9)], r"\(4, 3, 9\).*at least 4 rows"),
        (nn.MaxPool(4, 2, ceil=True), [(4, 2, 9)], r"\(4, 2, 9\).*at least 3 rows"),
        (nn.MaxPool(2), [(4,)], r"\(4,\).*\(C, H, W\)"),
        (nn.AvgPool(3, padding=2), [(4, 9, 9)], "padding = 2 is more than half of size = 3"),
        (nn.GlobalAvgPool(), [(4,)], r"\(4,\).*\(C, H, W\)"),
        (nn.BatchNorm(), [(4, 4)], r"\(4, 4\)"),
        (nn.BatchNorm(momentum=0), [(4,)], "momentum = 0"),
        (nn.BatchNormalize(), [(4,), (2, 5)], r"\(4,\), \(2, 5\)"),
        (nn.BatchSums(), [(4, 4)], r"\(4, 4\)"),
        (nn.LocalResponseNorm(), [(4,)], r"\(4,\).*\(C, H, W\)"),
        (nn.LocalResponseNorm(k=0), [(4, 2, 2)], "k = 0.*k above 0"),
        (nn.Dropout(1.0), [(4,), ()], "rate = 1.0.*less than 1"),
        (nn.Concat(), [(4, 3, 3), (4, 3, 2)], r"\(4, 3, 3\), \(4, 3, 2\).*one height and width"),
        (nn.Add(), [(4, 3, 3), (5, 3, 3)], r"\(4, 3, 3\), \(5, 3, 3\).*one shape"),
        (nn.SoftmaxCrossEntropy(), [(4,), (4,)], r"\(4,\), \(4,\).*sigmoid"),
        (nn.SoftmaxCrossEntropy(), [(4, 2, 2), ()], r"\(4, 2, 2\), \(\)"),
        (nn.SoftmaxCrossEntropy(smoothing=1.0), [(4,), ()], "smoothing = 1.0"),
        (nn.SigmoidCrossEntropy(), [(4,), ()], r"\(4,\), \(\).*softmax"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Layer) else None,
)
def test_what_does_not_fit_is_told_with_the_name_of_the_layer(
    layer: nn.Layer, shapes: list[nn.Shape], says: str
) -> None:
    with pytest.raises(JobError, match=f"^here: .*{says}"):
        replace(layer, name="here").infer(*shapes)


def test_a_misfit_in_a_network_is_told_with_the_full_name() -> None:
    network = nn.Chain(nn.Chain(nn.Conv(4, 3), nn.Dense(5), name="head"))
    with pytest.raises(JobError, match=r"^head.dense1: .*\(4, 6, 6\)"):
        nn.Graph(network, (3, 8, 8), nn.SoftmaxCrossEntropy())


def test_a_layer_without_a_shape_says_so() -> None:
    with pytest.raises(TypeError, match="Layer doesn't say"):
        nn.Layer().infer((3,))


@given(
    n=st.integers(1, 30),
    size=st.integers(1, 7),
    stride=st.integers(1, 5),
    padding=st.integers(0, 3),
    ceil=st.booleans(),
)
def test_windows_are_counted_as_they_are_laid(n: int, size: int, stride: int, padding: int, ceil: bool) -> None:
    padding = min(padding, size // 2)
    end = n + 2 * padding
    if ceil:  # lay windows until one reaches the end; each starts inside the image or the padding before it
        starts = [0]
        while starts[-1] + size < end and starts[-1] + stride < n + padding:
            starts.append(starts[-1] + stride)
        count = len(starts) if size - end < stride else 0
    else:
        count = len([start for start in range(0, end, stride) if start + size <= end])
    if count:
        assert slide("it", (1, n, n), size, stride, padding, ceil) == (count, count)
    else:
        with pytest.raises(JobError, match="it: can't take"):
            slide("it", (1, n, n), size, stride, padding, ceil)
