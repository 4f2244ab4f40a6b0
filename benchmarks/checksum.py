"""How fast a block is checked: ISA-L's CRC32 beside zlib's, a copy in memory, and the read itself.

A checksum has to keep up with a read from the page cache, whose limit is the copy. Both CRCs are the same number.
"""

import os
import tempfile
import zlib

import numpy as np
from harness import Benchmark
from isal import isal_zlib


def main() -> None:
    """One block of each size: 256 MNIST images, 16 photos of 150 kB, the largest block."""
    bench = Benchmark("checksum", __doc__, ["numpy", "isal"])
    for nbytes in (256 * 784, 16 * 150_528, 4 << 20):
        # As many blocks as don't fit into a cache, taken in turn: a block that is read is cold or barely warm.
        n = (64 << 20) // nbytes
        blocks = np.random.default_rng(0).integers(0, 256, (n, nbytes), np.uint8)
        copy = np.empty_like(blocks)
        size, work = f"{nbytes / 1e6:.1f} MB", n * nbytes / 1e9
        with tempfile.TemporaryFile() as file:
            file.write(blocks.data)
            file.flush()

            def isal(blocks=blocks):
                return [isal_zlib.crc32(block) for block in blocks]

            def zlib_(blocks=blocks):
                return [zlib.crc32(block) for block in blocks]

            def memory(blocks=blocks, copy=copy):
                for out, block in zip(copy, blocks, strict=True):
                    out[...] = block

            def read(copy=copy, file=file, nbytes=nbytes):
                for i, out in enumerate(copy):
                    os.preadv(file.fileno(), [out], i * nbytes)

            if isal() != zlib_():
                raise SystemExit("the two checksums differ")
            bench.compare(f"crc32 {size}", isal, zlib_, "zlib.crc32", 2.0, work, "GB/s")
            bench.compare(f"crc32 {size}", isal, read, "preadv, page cache", 1.0, work, "GB/s")
            bench.compare(f"crc32 {size}", isal, memory, "copy in memory", 0.5, work, "GB/s")
    bench.finish()


if __name__ == "__main__":
    main()
