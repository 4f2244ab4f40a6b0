"""What `dpnn.cluster.devices` does in a process of its own, on a stand-in for a GPU.

HOW: "well"; "elsewhere": its memory can't be read by the host, as a GPU's; "other": what is read isn't what was sent.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

from dpnn.backends import cuda
from dpnn.cluster import devices

sys.path.insert(0, str(Path(__file__).parents[2] / "backends" / "cuda"))
from shim import Shim


class Elsewhere(Shim):
    """Its memory has addresses, and whoever uses them on the host is ended by the system."""

    def empty(self, nbytes):
        block = mmap.mmap(-1, nbytes)
        array = np.frombuffer(block, np.uint8)
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(array.ctypes.data, nbytes, 0) == 0
        return array

    def push(self, buf, array):
        return lambda: True

    def zero(self, array):
        pass


class Other(Shim):
    def read(self, array):
        return super().read(array) + 1


how = {"well": Shim, "elsewhere": Elsewhere, "other": Other}[os.environ["HOW"]]
cuda.device_of_rank = lambda local_rank: how()
sys.exit(devices.main(sys.argv[1:]))
