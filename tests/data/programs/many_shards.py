"""Check and read a data set of very many samples as a rank alone does; print the MiB that it takes beside batches.

Arguments: the folder to write the data set to, the number of its shards.
"""

import resource
import sys
from itertools import pairwise
from pathlib import Path

from sparse import write_sparse

from dpnn.data import Manifest, Sampler, ShardReader, check_shards, view_of
from dpnn.data.runs import epochs
from dpnn.data.window import WindowReader


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


folder, n_shards = Path(sys.argv[1]), int(sys.argv[2])
written = write_sparse(folder, n_shards)
view = view_of(written, frames=1, seed=0, mean=written.mean, std=written.std)
before = peak_mib()

manifest = Manifest.read(folder)
check_shards(folder, manifest)
sampler = Sampler(manifest.counts, manifest.block, lanes=64, global_batch=64, window=16, seed=0)
reader = WindowReader(folder, manifest, sampler, view, 64, window_mb=0.001, at_once=1, skips=False)
middle = sampler.steps // 2
seen = set()
for loaded in reader.read(epochs(range(64), sampler.steps, (1, middle), (1, middle + 15)), lambda: 0):
    assert len(loaded.ids) == 64
    seen.update(loaded.ids.tolist())
assert len(seen) == 16 * 64

every = ShardReader(folder, manifest)
for number, (lo, hi) in enumerate(pairwise(range(0, manifest.samples + 1, manifest.shards[0].samples))):
    ids = every.index(number).ids
    assert (ids.min(), ids.max()) == (lo, hi - 1)
every.close()
print(peak_mib() - before)
