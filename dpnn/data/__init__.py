"""Data: shards on disk, the order in which an epoch goes through them, and the threads that read ahead.

`manifest.py` says what a folder holds, `shards.py` writes and checks one file, `reader.py` reads blocks, `owners.py`
parts the shards among nodes, `stage.py` copies them, `sampler.py` is the order of samples, `runs.py` says which of its
steps are read, `loader.py` brings batches, `augment.py` varies them, `pack/` writes folders of shards.
"""

from dpnn.data.augment import AUGMENTATIONS
from dpnn.data.loader import Batch, Loader, no_samples
from dpnn.data.manifest import Manifest
from dpnn.data.owners import Location
from dpnn.data.reader import ShardReader, check_shards
from dpnn.data.runs import Leases, Run
from dpnn.data.sampler import Sampler, default_grains, default_lanes, default_window

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "Leases",
    "Loader",
    "Location",
    "Manifest",
    "Run",
    "Sampler",
    "ShardReader",
    "check_shards",
    "default_grains",
    "default_lanes",
    "default_window",
    "no_samples",
]
