"""Batches reach a device's memory without a copy on the host where they lie as it does, and else by one."""

import numpy as np
import pytest

from dpnn.backends.cuda.memory import DeviceMemory, without_limit

from .shim import Shim


class Noting(Shim):
    """Knows what was pushed."""

    def __init__(self):
        super().__init__()
        self.pushed = []

    def push(self, buf, array):
        self.pushed.append(buf)
        return super().push(buf, array)


def made(memory, n, dtype=np.float32):
    """An array of n images (n, 3, 4, 5) in a device's memory, which is channels-last."""
    return memory.empty(n * 60 * np.dtype(dtype).itemsize).view(dtype).reshape(n, 4, 5, 3).transpose(0, 3, 1, 2)


def test_a_batch_of_the_same_order_is_copied_from_where_it_lies():
    device = Noting()
    memory = DeviceMemory(device, without_limit)
    wire = memory.wire(made(memory, 6))
    room = memory.host(8 * 240).view(np.float32).reshape(8, 4, 5, 3)
    room[...] = np.random.default_rng(0).normal(size=room.shape)
    batch = room.transpose(0, 3, 1, 2)[2:7]
    wire.load(batch)
    assert np.shares_memory(device.pushed[0], room)
    wire.wait()
    assert np.array_equal(device.read(wire.array[:5]), batch)


@pytest.mark.parametrize("make", [
    lambda x: np.ascontiguousarray(x), lambda x: x.astype(np.float64), lambda x: np.repeat(x, 2, axis=0)[::2],
], ids=["channels first", "float64", "with gaps"])  # fmt: skip
def test_any_other_batch_arrives_too(make):
    device = Noting()
    memory = DeviceMemory(device, without_limit)
    wire = memory.wire(made(memory, 6))
    for seed in (0, 1):
        x = np.random.default_rng(seed).normal(size=(5, 4, 5, 3)).astype(np.float32).transpose(0, 3, 1, 2)
        batch = make(x)
        wire.load(batch)
        assert not np.shares_memory(device.pushed[-1], batch)
        batch[...] = 0  # it was copied on the host
        wire.wait()
        assert np.array_equal(device.read(wire.array[:5]), x)
