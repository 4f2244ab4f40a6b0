"""A library that lacks functions is refused in words; a second instance leaves the first one's memory alone."""

import shutil
import subprocess

import pytest

from dpnn.backends.onednn.library import Library, Unavailable

INCOMPLETE = """
typedef struct { int major, minor, patch; } version;
const version *dnnl_version(void) { static version here = {3, 9, 4}; return &here; }
"""
MORE_THREADS = """
import numpy as np
from dpnn.backends.onednn import OneDNN
from dpnn.team import Team
from tests.backends.conftest import Bench, ONEDNN, nn
it = Bench(ONEDNN, nn.BatchNorm(), (256, 20, 20), capacity=4)  # on two threads
x = np.random.default_rng(0).standard_normal((4, 256, 20, 20)).astype(np.float32)
it.put([x], [x]).forward()
wanted = it.backward()[0].copy()
later = OneDNN(Team(7))
for _ in range(30):
    it.put([x], [x]).forward()
    assert np.allclose(it.backward()[0], wanted, rtol=1e-4, atol=1e-4)
print("alike")
"""


def test_a_library_of_the_right_version_without_the_functions_is_refused(tmp_path, monkeypatch):
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which makes the library, is missing")
    source, file = tmp_path / "library.c", tmp_path / "libdnnl.so.3"
    source.write_text(INCOMPLETE)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", file], check=True, timeout=60)
    monkeypatch.setenv("DPNN_ONEDNN", str(file))
    with pytest.raises(Unavailable, match="pip install onednn-cpu-gomp"):
        Library(1)


def test_a_library_that_is_found_says_what_it_is():
    library = Library(2)
    assert library.version.startswith("3.")
    assert library.isa
    assert "libdnnl" in library.path


@pytest.mark.timeout(60)
def test_a_second_instance_with_more_threads_leaves_the_first_ones_memory_alone(python):
    done = python("-c", MORE_THREADS, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alike\n"
