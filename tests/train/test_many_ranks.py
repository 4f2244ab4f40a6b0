"""Sixty-four ranks on one machine: right, and small."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

RANKS, STEPS = 64, 20
LIMIT_MB = 50
CHOSEN = (
    "train.epochs=0", f"train.steps={STEPS}", "train.eval_every=0", "train.global_batch=128", "data.lanes=64",
    "backend.threads=1", "optimizer.lr=0.01",
)  # fmt: skip


def beyond_flat_arrays(pid: int, flat_nbytes: int) -> float:
    """Proportional set size of a rank without its share of the node's flat arrays, MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return (int(line.split()[1]) * 1024 - flat_nbytes) / 1e6
    raise AssertionError("no Pss")


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_they_take_correct_steps_in_bounded_memory(start_mpirun, trained, last, job, watched, request):
    network = f"model.name={request.path.parent}/networks.py:smooth"
    it = job(out="many")
    words = [word for setting in (*CHOSEN, network) for word in ("--set", setting)]
    many = start_mpirun(RANKS, "train", it.path, *words, script=watched, env={"FAULT": f"* {STEPS - 1} SIGSTOP"})
    many.wait_for("fault: SIGSTOP", times=RANKS, timeout=300)
    pids = many.pids()
    assert len(pids) == RANKS
    while not all(map(stopped, pids.values())):  # the test's time limit bounds it
        time.sleep(0.1)
    one = last(trained(1, *CHOSEN, network))
    n = sum(array.size for array in one.params.values())
    sizes = [beyond_flat_arrays(pid, 4 * n * (2 + RANKS) // RANKS) for pid in pids.values()]
    for pid in pids.values():
        os.kill(pid, signal.SIGCONT)
    ended = many.finish(timeout=300)
    assert ended.returncode == 0, ended.stderr
    print(f"{RANKS} ranks: {min(sizes):.1f} to {max(sizes):.1f} MB beyond the flat arrays (limit {LIMIT_MB})")
    assert max(sizes) < LIMIT_MB
    found = last(it.out)
    assert found.steps == STEPS
    # Of all together: biases before a BatchNorm are nothing but rounding errors.
    mine, theirs = (np.concatenate([array.ravel() for array in it.params.values()]) for it in (one, found))
    worst = float(np.linalg.norm(mine - theirs) / np.linalg.norm(mine))
    print(f"relative difference from one rank: {worst:.1e}")
    assert worst < 1e-5


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_network_of_64_branches_lies_on_as_many_ranks(mpirun, trained, last, job, request):
    """Each rank has a branch; they are broadcast to and collated by all together. Ten steps, as on one rank."""
    chosen = (
        "train.epochs=0", "train.steps=10", "train.eval_every=0", "backend.threads=1", "backend.precision=float64",
        f"model.name={request.path.parent}/networks.py:sixty_four",
    )  # fmt: skip
    parts = (f"parallel.parts={RANKS}", "parallel.placement=branches")
    it = job(out="wide")
    words = [word for setting in (*chosen, *parts) for word in ("--set", setting)]
    begin = time.monotonic()
    ended = mpirun(RANKS, "train", it.path, *words, timeout=500)
    assert ended.returncode == 0, ended.stderr
    print(f"{RANKS} parts: {time.monotonic() - begin:.0f} s")
    one, found = last(trained(1, *chosen)), last(it.out)
    assert found.steps == 10
    for name, array in one.arrays():
        np.testing.assert_allclose(dict(found.arrays())[name], array, 1e-9, 1e-9, err_msg=name)
