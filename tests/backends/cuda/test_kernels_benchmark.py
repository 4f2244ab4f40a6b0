"""The program that measures kernels has its rows: on the stand-in, with small shapes and some bounds."""

import importlib.util
import math
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from dpnn import nn
from dpnn.backends import cuda

from .shim import Shim

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


class WallClock:
    """Seconds of the host's clock."""

    def seconds(self, call, repeat: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - begin) / repeat


@pytest.fixture
def program(monkeypatch, tmp_path) -> ModuleType:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--json", str(tmp_path / "rows.json")])
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARKS / "kernels.py")
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)
    spec.loader.exec_module(program)
    return program


@pytest.fixture
def rates(program):
    bench = program.Benchmark("kernels", "")
    limits = program.Limits(copy=1e9, float32=1e9)
    return program.Rates(bench, cuda.Cuda(Shim()), WallClock(), limits, rows=2, repeat=1)


def check(rates, layers: list[nn.Layer], each: int) -> None:
    """`each` rows for every layer that has an op, a note for the others."""
    known = [type(layer) in cuda._OPS for layer in layers]
    assert len(rates.bench.rows) == each * sum(known)
    assert len(rates.bench.notes) == len(layers) - sum(known)
    for row in rates.bench.rows:
        assert math.isfinite(row.ours)
        assert row.ours > 0
        assert row.ratio == row.ours / row.peer


def test_layers_that_move_numbers(program, rates):
    small = {1: (8,), 3: (8, 5, 5)}
    for case in program.CASES:
        shapes = [small[len(shape)] if shape else () for shape in case.shapes]
        rates.moving(program.Case(case.layer, shapes, case.relu))
    check(rates, [case.layer for case in program.CASES], 2)


def test_products_and_their_peers(rates):
    layers = [(nn.Conv(4, 3, padding=1), (3, 5, 5)), (nn.Dense(3), (7,))]
    called = []
    for layer, shape in layers:
        rates.product("product", layer, shape, True, {"forward": partial(called.append, layer)})
    peers = [row for row in rates.bench.rows if row.peer_name == "PyTorch"]
    assert [row.case for row in peers] == ["product, forward"] * len(called)
    assert called == [layer for layer, _ in layers if type(layer) in cuda._OPS]
    rates.bench.rows[:] = [row for row in rates.bench.rows if row not in peers]
    check(rates, [layer for layer, _ in layers], 2)


def test_flat_arrays(rates):
    rates.flat(1003)
    assert len(rates.bench.rows) == 8
    assert not rates.bench.notes


def test_what_takes_longer_bounds_a_case(rates):
    rates.rate("bytes", 2.0, nbytes=4e9, operations=3e9)
    rates.rate("operations", 2.0, nbytes=4e9, operations=5e9)
    by_bytes, by_operations = rates.bench.rows
    assert (by_bytes.ours, by_bytes.peer, by_bytes.unit) == (2.0, 1.0, "GB/s")
    assert (by_operations.ours, by_operations.peer, by_operations.unit) == (2.5, 1.0, "GFLOP/s")


def test_convolutions_are_those_of_the_networks(program):
    titles = [title for title, *_ in program.products(1)]
    assert titles[0] == "vgg16 3x224x224 64 of 3x3"
    assert len(set(titles)) == len(titles) > 25
    assert max(map(len, titles)) <= 40
