"""What a step has changed is taken back, whoever changed it, and wherever it was stopped."""

import random
import time
from pathlib import Path

import numpy as np
import pytest

from dpnn import config
from dpnn.comm.undo import Undo, log_nbytes
from dpnn.native import Kernels
from dpnn.optim import STATES, Optimizer, Segment
from dpnn.team import Team

N, UPDATED = 100, 300_000
SEGMENTS = (
    Segment(0, 200_000, True, 0.0),
    Segment(200_000, 299_001, False, 0.0),
    Segment(299_001, UPDATED, False, 0.1),
)
KINDS = {
    "sgd": config.Optimizer(name="sgd", lr=0.1, weight_decay=0.01),
    "momentum": config.Optimizer(name="momentum", lr=0.1, weight_decay=0.01),
    "nesterov": config.Optimizer(name="momentum", lr=0.1, momentum=0.8, nesterov=True),
    "adagrad": config.Optimizer(name="adagrad", lr=0.1),
}
LIMITS = {"SSE41": "baseline", "AVX2": "avx2", "": "avx512"}
"""By the limit for oneDNN: the kernels that it leaves."""
ENDLESS = """
import sys
from itertools import count
from tests.comm.test_undo import steps
take = steps(sys.argv[1], sys.argv[2], int(sys.argv[3]))
for step in count():
    take(step)
"""
"""Update a file's arrays step by step, and never end."""


def ranks() -> tuple[list[np.ndarray], list[Undo]]:
    """Two ranks of a node that change the same two arrays."""
    memory = np.zeros((4, N), np.float32)
    arrays, shadows = [*memory[:2]], [*memory[2:]]
    arrays[0][:], arrays[1][:] = np.arange(N), 1
    logs = [np.zeros(log_nbytes(10) // 8, np.int64) for _ in range(2)]
    return arrays, [Undo(arrays, shadows, logs, rank) for rank in range(2)]


def change(arrays, undo: Undo, lo: int, hi: int, until: int | None = None) -> None:
    undo.keep(lo, hi)
    for array in arrays:
        array[lo : hi if until is None else until] *= -3


@pytest.mark.parametrize("until", [50, 70, None])
def test_a_step_is_taken_back_also_of_others_and_also_in_the_middle(until):
    arrays, (mine, other) = ranks()
    before = [array.copy() for array in arrays]
    for undo in (mine, other):
        undo.begin(5)
    change(arrays, mine, 0, 20)
    change(arrays, mine, 20, 30)
    change(arrays, other, 50, 90, until)
    mine.take_back(5)
    mine.take_back(5)
    for array, was in zip(arrays, before, strict=True):
        assert array.tolist() == was.tolist()
    assert mine.back(5)
    assert other.back(5)
    assert not other.back(4)


def test_only_that_step_is_taken_back():
    arrays, (mine, other) = ranks()
    mine.begin(5)
    other.begin(5)
    change(arrays, mine, 0, 20)
    change(arrays, other, 20, 40)
    after = [array.copy() for array in arrays]
    mine.begin(6)
    change(arrays, mine, 0, 20)
    other.take_back(6)
    for array, was in zip(arrays, after, strict=True):
        assert array.tolist() == was.tolist()
    assert not other.back(5)


def test_shadows_that_are_not_all_as_far_are_refused():
    memory = np.zeros((5, N), np.float32)
    with pytest.raises(ValueError, match="not all as far"):
        Undo(memory[:2], [memory[2], memory[4]], [np.zeros(log_nbytes(1) // 8, np.int64)], 0)


def mapped(path: Path, states: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """A file's arrays, their shadows, and the logs of two ranks."""
    log = log_nbytes(20)
    memory = np.memmap(path, np.uint8, "r+", shape=(2 * (1 + states) * 4 * UPDATED + 2 * log,))
    flat = [np.frombuffer(memory, np.float32, UPDATED, i * 4 * UPDATED) for i in range(2 * (1 + states))]
    logs = [np.frombuffer(memory, np.int64, log // 8, memory.size - (2 - rank) * log) for rank in range(2)]
    return flat[: 1 + states], flat[1 + states :], logs


def steps(path: str, kind: str, threads: int):
    """take(step): a step that updates the arrays of a file, which were drawn, in three runs; and that can be undone."""
    options = KINDS[kind]
    (params, *state), shadows, logs = mapped(Path(path), len(STATES[options.name]))
    undo, gradients = Undo([params, *state], shadows, logs, 0), drawn(1)
    kept = dict(zip(STATES[options.name], state, strict=True))
    optimizer = Optimizer(options, SEGMENTS, params, gradients, Team(threads), Kernels(threads), kept, undo)

    def take(step: int) -> None:
        undo.begin(step)
        for lo, hi in ((150_000, UPDATED), (0, 100_016), (100_016, 150_000)):
            optimizer.apply(lo, hi, 0.001)

    return take


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(UPDATED).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    """file(kind, name) -> a new file of arrays, of which the parameters are drawn, as bytes of all that is computed."""

    def make(kind: str, name: str) -> Path:
        path, states = tmp_path / name, len(STATES[KINDS[kind].name])
        path.write_bytes(drawn(0).tobytes() + bytes((1 + 2 * states) * 4 * UPDATED + 2 * log_nbytes(20)))
        return path

    return make


def held(path: Path, kind: str) -> bytes:
    """The parameters, and what the optimizer keeps."""
    arrays, _, _ = mapped(path, len(STATES[KINDS[kind].name]))
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_that_keep_what_they_change_change_it_likewise_and_it_is_taken_back(monkeypatch, file, kind, limit):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    if Kernels(2).level != LIMITS[limit]:
        pytest.skip(f"this processor has nothing above {Kernels(2).level}")
    path = file(kind, "arrays")
    take = steps(str(path), kind, 2)
    params, options, before = drawn(0), KINDS[kind], b""
    plain = Optimizer(options, SEGMENTS, params, drawn(1), Team(2), Kernels(2))
    for step in range(3):
        before = held(path, kind)
        take(step)
        plain.apply(0, UPDATED, 0.001)
        assert held(path, kind) == b"".join(array.tobytes() for array in (params, *plain.state.values()))
    arrays, shadows, logs = mapped(path, len(STATES[options.name]))
    Undo(arrays, shadows, logs, 1).take_back(2)
    assert held(path, kind) == before


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 10))])
@pytest.mark.parametrize(("kind", "threads"), [("momentum", 1), ("momentum", 3), ("adagrad", 2), ("sgd", 2)])
def test_who_is_killed_in_the_middle_of_an_update_leaves_what_takes_it_back(start_python, file, kind, threads, seed):
    rng = random.Random(f"{kind} {threads} {seed}")
    whole = file(kind, "whole")
    take = steps(str(whole), kind, threads)
    torn = file(kind, "torn")
    arrays, shadows, logs = mapped(torn, len(STATES[KINDS[kind].name]))
    program = start_python("-c", ENDLESS, torn, kind, threads)
    end = time.monotonic() + 60
    while logs[0][0] < 3:
        assert program.process.poll() is None, program.stderr
        assert time.monotonic() < end
        time.sleep(1e-3)
    time.sleep(rng.uniform(0, 0.02))
    program.process.kill()
    program.process.wait()
    step = int(logs[0][0])
    undo = Undo(arrays, shadows, logs, 1)
    undo.take_back(step)
    for taken in range(step):
        take(taken)
    if held(torn, kind) != held(whole, kind):
        assert logs[0][1] == 0  # killed when it was about to begin the next step, and had ended this one
        take(step)
    assert held(torn, kind) == held(whole, kind)
