"""A file in memory behaves as one on a disk, and its holes cost nothing."""

import io
import sys

import numpy as np

from dpnn.checkpoint.sparse import Sparse


def test_it_behaves_as_a_file(tmp_path):
    """Random reads, writes and cuts, at the edges of pages too."""
    rng = np.random.default_rng(0)
    with io.FileIO(tmp_path / "file", "w+") as real:
        sparse = Sparse()
        for _ in range(500):
            at, n = int(rng.integers(0, 5)) * 4096 + int(rng.integers(-2, 3)), int(rng.integers(0, 9000))
            deed = rng.integers(0, 3)
            for file in (real, sparse):
                file.seek(max(at, 0))
            if deed == 0:
                data = rng.bytes(n)
                assert real.write(data) == sparse.write(data)
            elif deed == 1:
                assert real.read(n) == sparse.read(n)
            assert real.tell() == sparse.tell()
            assert real.seek(0, io.SEEK_END) == sparse.seek(0, io.SEEK_END)
        real.seek(0)
        sparse.seek(0)
        assert real.readall() == sparse.readall()


def test_what_is_cut_off_is_gone():
    sparse = Sparse()
    sparse.write(b"abc")
    sparse.truncate(1)
    sparse.truncate(5000)
    sparse.seek(0)
    assert sparse.read() == b"a" + bytes(4999)


def test_holes_take_no_memory():
    sparse = Sparse()
    sparse.seek(1 << 40)
    sparse.write(b"end")
    assert sum(sys.getsizeof(page) for page in sparse._pages.values()) < 10_000
