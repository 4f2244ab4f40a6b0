"""Data: shards on disk, the order in which an epoch goes through them, and the threads that read ahead.

`manifest.py` says what a folder holds, `shards.py` writes and checks one file, `reader.py` reads blocks, `owners.py`
parts the shards among nodes, `stage.py` copies them, `sampler.py` is the order of samples, `runs.py` says which of its
steps are read, `window.py` reads these, `view/` says what the network sees of a sample, `making.py` makes batches,
`loader.py` brings them, `pack/` writes folders of shards.
"""

from dpnn.data.batch import Bad, Batch, Skipped, no_samples
from dpnn.data.loader import Loader
from dpnn.data.manifest import Manifest
from dpnn.data.owners import Location
from dpnn.data.reader import ShardReader, check_shards
from dpnn.data.runs import Leases, Run
from dpnn.data.sampler import Sampler, default_grains, default_lanes, default_window, pools_nbytes
from dpnn.data.view import View, network_shape, view_of

__all__ = [
    "Bad",
    "Batch",
    "Leases",
    "Loader",
    "Location",
    "Manifest",
    "Run",
    "Sampler",
    "ShardReader",
    "Skipped",
    "View",
    "check_shards",
    "default_grains",
    "default_lanes",
    "default_window",
    "network_shape",
    "no_samples",
    "pools_nbytes",
    "view_of",
]
