"""How threads lie over activations, seen as (pixels, channels): the launches of kernels that use channels.cuh."""

from dpnn.backends.cuda.device import Device, Grid, Kernel

_THREADS = 256
_BLOCKS = {False: 8, True: 4}
"""Of a multiprocessor, by whether threads have four numbers: all that it holds at a time, so that none comes late."""
_PIXELS = 4
"""What a thread should have at least before there are more blocks."""


class Tiling:
    """Blocks of (across, down) threads over rows of `channels` numbers; four numbers a thread where `fours`."""

    def __init__(self, channels: int, device: Device, fours: bool = True) -> None:
        fours = fours and channels % 4 == 0
        threads = channels // 4 if fours else channels
        across = min(32, 1 << (threads - 1).bit_length())
        self._device, self._suffix = device, "4" if fours else ""
        self.block: Grid = (across, _THREADS // across)
        self._columns = -(-threads // across)
        self._most = max(1, _BLOCKS[fours] * device.processors // self._columns)

    def grid(self, pixels: int) -> Grid:
        """(columns of blocks, chunks of pixels) for at least one pixel: more pixels never make fewer chunks."""
        return self._columns, min(self._most, -(-pixels // (_PIXELS * self.block[1])))

    def kernel(self, file: str, name: str) -> Kernel:
        """A kernel, in its form for as many numbers as a thread has."""
        return self._device.kernel(file, name + self._suffix)
