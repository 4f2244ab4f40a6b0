"""Kernels are compiled once on a node, and kept where CuPy finds them again."""

import os

import pytest

from dpnn.backends.cuda import gpu
from dpnn.backends.cuda.gpu import Gpu
from dpnn.caches import one_by_one

from .test_gpu import cupy  # noqa: F401


@pytest.fixture
def compiling(request, tmp_path, monkeypatch):
    """Whether each compilation had the node for itself; in a cache, and with locks, of the test's own."""
    fake, alone = request.getfixturevalue("cupy"), []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "")  # what is set by the code is taken back
    made = fake.RawModule

    def compile(code, options):
        with one_by_one("kernels-pointwise.cu", 0) as free:
            alone.append(not free)
        return made(code, options)

    monkeypatch.setattr(fake, "RawModule", compile, raising=False)
    gpu._unkept.cache_clear()
    yield alone
    gpu._unkept.cache_clear()


def test_one_process_of_a_node_compiles_at_a_time(compiling, tmp_path):
    device = Gpu()
    device.kernel("pointwise.cu", "relu")
    assert compiling == [True]  # when it was opened
    assert device.unkept == ""
    assert os.environ["CUPY_CACHE_IN_MEMORY"] == ""


def test_where_nothing_can_be_kept_each_compiles_for_itself_in_memory(compiling, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no folder")
    device = Gpu()
    assert compiling == [False]
    assert device.unkept == f"{tmp_path / 'cache'} can't be written (File exists)"
    assert os.environ["CUPY_CACHE_IN_MEMORY"] == "1"
