"""Our compiled kernels: the variant that fits the processor, and a clear word where they are missing."""

import importlib.util

import numpy as np
import pytest

from dpnn import native
from dpnn.native import LEVELS, Kernels, Unavailable

RUNS = """
import numpy as np
from dpnn.native import Kernels
kernels = Kernels(1)
p, g = np.ones(37, np.float32), np.full(37, 0.5, np.float32)
kernels.bind("descend", 37, p, g, None, 0.1, 1.0, 0.0, 0.0, False)()
assert np.allclose(p, 0.95), p
print(kernels.level)
"""


@pytest.mark.parametrize(("limit", "level"), [("SSE41", "baseline"), ("AVX", "baseline"), ("AVX2", "avx2")])
def test_the_environment_limits_the_instructions(python, monkeypatch, limit, level):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    here = LEVELS.index(Kernels(1).level)
    done = python("-c", RUNS)
    assert done.returncode == 0, done.stderr
    assert LEVELS.index(done.stdout.strip()) == min(LEVELS.index(level), here)


def test_kernels_that_were_not_built_are_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"not built: install a C compiler with OpenMP \(gcc\), then dpnn again"):
        Kernels(1)


def test_kernels_of_another_machine_are_named_with_the_way_out(monkeypatch, tmp_path):
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"\x7fELF" + bytes(60))
    spec = importlib.util.spec_from_file_location("foreign", foreign)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(Unavailable, match=r"can't be loaded.*install dpnn again on this machine"):
        Kernels(1)


def test_a_call_keeps_its_arrays_alive():
    kernels = Kernels(1)
    p = np.ones(5, np.float32)
    call = kernels.bind("descend", 5, p, np.ones(5, np.float32), None, 1.0, 1.0, 0.0, 0.0, False)
    np.frombuffer(bytearray(1 << 20))  # what the gradients' memory would be used for, were it free
    call()
    np.testing.assert_array_equal(p, 0.0)


def test_numbers_too_small_for_a_normal_float_are_flushed_while_it_is_asked_for_and_on_all_threads():
    kernels, n = Kernels(2), 1 << 16
    small, y = np.full((n, 1), 1e-40, np.float32), np.ones((n, 1), np.float32)
    double = kernels.bind("combine", n, 1, 0, [], [], None, 2, [small, small], False, y)
    double()
    assert y[0, 0] > 0  # this thread's
    with native.denormals_flushed():
        double()
        assert not y.any()
        with native.denormals_flushed():
            pass
        assert np.float32(1e-30) * np.float32(1e-10) == 0
    assert np.float32(1e-30) * np.float32(1e-10) > 0
