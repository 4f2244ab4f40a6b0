"""Processors with fewer instructions: the kernels' other variants, and oneDNN's other code, compute the same."""

from pathlib import Path

import pytest

from ..conftest import ONEDNN

HERE = Path(__file__).parent
SAY = """
from dpnn.backends.onednn import OneDNN
from dpnn.team import Team
made = OneDNN(Team(2))
print(made.kernels.level, made.library.isa)
"""


@pytest.mark.parametrize(("limit", "level", "isa"), [("SSE41", "baseline", "SSE4.1"), ("AVX2", "avx2", "AVX2")])
def test_networks_and_winograd_agree_with_the_reference(python, limit, level, isa):
    if ONEDNN.kernels.level in ("baseline", level):
        pytest.skip(f"this processor has no more than {level}: all other tests run there")
    env = {"ONEDNN_MAX_CPU_ISA": limit}
    assert python("-c", SAY, env=env).stdout.split(maxsplit=1) == [level, f"{isa}\n"]
    files = HERE / "test_random_shapes.py", HERE / "test_random_convolutions.py"
    names = "winograd or images_large or folded or norm-norm or lrn or maxpool or dense-norm"
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *files, env=env, timeout=100)
    assert done.returncode == 0, done.stdout
