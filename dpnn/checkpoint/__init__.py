"""Checkpoints: all that a run needs to go on, by parameter name, whole and independent of ranks, backend and mesh.

`step-000000123.h5` is plain HDF5: `params/NAME`, `optimizer/STATE/NAME`, `info` (JSON), attributes `format`, `version`,
`epoch`, `step`, `steps` and, last, `complete`. Each dataset is contiguous and has the attribute `crc32` of its bytes.
HDF5 itself can crash or hang on damaged metadata. So behind the HDF5 file, where its readers don't look, stands a tail
that says where the datasets' bytes lie and what the crc32 of all others is; that is checked before HDF5 sees the file:
    JSON of _Tail · its length and its crc32, uint32 each, little-endian · 8 bytes of magic

Where nobody holds whole arrays, each of some ranks writes slices of them, and a checkpoint is a folder of such files:
`step-000000123/part-0003-of-0008.h5` has `params/NAME/LO`, `optimizer/STATE/NAME/LO`, the numbers from LO on of the
flattened array, whose attribute `shape` is that of the whole; `info.h5`, the last, has `info` and the attributes. Until
all is there the folder's name is `.step-000000123.MARK.tmp`, with another mark for each start of the run. While a
folder takes the place of one of the same step, the old one's name is `step-000000123.old`.

They are read in two steps. One rank looks at all but the arrays (finding.py) and tells the others where what lies; then
each rank reads what it needs of the arrays, whoever wrote them (reading.py).
"""

from dpnn.checkpoint.contents import Checkpoint, Contents, Slice
from dpnn.checkpoint.file import INFO
from dpnn.checkpoint.finding import look, newest
from dpnn.checkpoint.output import Note
from dpnn.checkpoint.reading import fill, read, verify
from dpnn.checkpoint.writing import InParts, new_mark, write

__all__ = [
    "INFO", "Checkpoint", "Contents", "InParts", "Note", "Slice", "fill", "look", "new_mark", "newest", "read",
    "verify", "write",
]  # fmt: skip
