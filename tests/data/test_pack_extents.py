"""Byte ranges of files are read where they lie, by several threads, and a file that has changed is told by name."""

import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dpnn.data.pack.extents import OPEN_FILES, Extents
from dpnn.errors import DataError


def test_each_record_is_its_own_bytes_though_more_files_are_used_than_are_kept_open(tmp_path):
    n_files, per_file = OPEN_FILES + 20, 5
    wanted, files, offsets, lengths = [], [], [], []
    for file in range(n_files):
        records = [os.urandom(length) for length in range(1, per_file + 1)]
        (tmp_path / f"{file}").write_bytes(b"head" + b"".join(records))
        for record in records:
            files.append(file)
            offsets.append(4 + sum(map(len, records[: len(record) - 1])))
            lengths.append(len(record))
            wanted.append(record)
    before = len(os.listdir("/proc/self/fd"))
    records = Extents([tmp_path / f"{i}" for i in range(n_files)], *map(np.array, (files, offsets, lengths)))
    records.read(0)
    records = pickle.loads(pickle.dumps(records))  # as the other ranks get it
    order = np.random.default_rng(0).permutation(len(records))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(records.read, order)) == [wanted[i] for i in order]
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES + 1
    assert records.nbytes == 3
    assert records.name(6) == f"{tmp_path / '1'}, byte 5"
    del records
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_has_become_shorter_or_is_gone_is_told_by_name(tmp_path):
    path = tmp_path / "pictures.tar"
    path.write_bytes(bytes(10))
    records = Extents([path], np.array([0, 0]), np.array([0, 6]), np.array([6, 4]))
    assert records.read(1) == bytes(4)
    os.truncate(path, 8)
    with pytest.raises(DataError, match=r"pictures.tar is truncated: it ends at byte 8 of 10"):
        records.read(1)
    path.unlink()
    again = Extents([path], records.files, records.offsets, records.lengths)
    with pytest.raises(FileNotFoundError, match=r"pictures.tar"):
        again.read(0)
