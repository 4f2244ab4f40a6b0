"""After the plan is built a step reserves no memory: allocations and page faults are counted."""

import json
from pathlib import Path

import pytest

STEPS = Path(__file__).parent / "programs" / "steps.py"


@pytest.mark.parametrize(
    ("network", "rows", "side", "microbatches"), [("lenet", 64, 28, 1), ("resnet", 8, 64, 1), ("lenet", 64, 28, 2)]
)
def test_a_step_reserves_nothing(python, network, rows, side, microbatches):
    done = python(STEPS, network, rows, side, microbatches, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Vectors of a channel's length and the loss of a few scores are made anew; no activation, gradient or filter is.
    assert found["peak"] < 200_000 < found["array"] / 2 < found["arena"]
    assert found["kept"] < 20_000
    # NumPy's own buffers may come from pages that malloc gave back; an activation has hundreds of pages.
    assert found["faults"] < 10
