"""Convolutions of images of few channels, a network's first: kernels/conv_narrow.cu."""

from dataclasses import dataclass
from math import ceil

from dpnn.backends.base import Array
from dpnn.backends.cuda.device import Device
from dpnn.backends.cuda.geometry import Shape, quads
from dpnn.backends.cuda.product import FilterSums

DOWN, ACROSS, FILTERS = 8, 16, 64
"""The kernels' tile: rows and columns of outputs, and filters."""
_APART = FILTERS + 4
_TAPS = {1: (4,), 3: (3, 4)}
"""By channels: the taps of a chunk that there are kernels for. Each makes windows of whole quads."""
_SHARED = 96 * 1024
"""Bytes of shared memory that a block may ask for, on any GPU since 2020."""
_IN_BLOCK = {"forward": 4, "weights": 8}
"""Warps of a block; of a gradient's at most."""
_WARPS = {"forward": 16, "weights": 18}
"""Warps for which a multiprocessor has registers."""
_MEMORY, _OWN = 228 * 1024, 1024
"""Bytes of shared memory of an H100's multiprocessor, and what each block takes beside its own."""


@dataclass(frozen=True)
class Patch:
    """The part of an image under a tile, in shared memory: see the kernels' file."""

    shape: Shape
    taps: int
    """Of a chunk."""

    @property
    def chunks(self) -> int:
        """Of a row's taps of one residue."""
        return ceil(ceil(self.shape.s / self.shape.stride[1]) / self.taps)

    @property
    def units(self) -> int:
        """Chunks of a filter."""
        return self.shape.r * self.shape.stride[1] * self.chunks

    @property
    def residue_apart(self) -> int:
        """Numbers from one residue to the next in a row: all that is read of it."""
        return quads((ACROSS - 1 + self.chunks * self.taps) * self.shape.c)

    @property
    def row_apart(self) -> int:
        """Numbers from row to row: such that what a warp reads at a time, of two rows, lies on different banks."""
        least, stride = self.residue_apart * self.shape.stride[1], self.shape.stride[0]
        return min(range(least, least + 32, 4), key=lambda n: (n * stride % 32 in (0, 8, 24), n))

    @property
    def nbytes(self) -> int:
        """Of the patch and the places of a row's numbers."""
        shape = self.shape
        rows, width = (DOWN - 1) * shape.stride[0] + shape.r, ((ACROSS - 1) * shape.stride[1] + shape.s) * shape.c
        return 4 * (rows * self.row_apart + width)

    @property
    def forward_bytes(self) -> int:
        """Of shared memory."""
        return self.nbytes + 4 * self.units * self.taps * self.shape.c * _APART

    @property
    def weights_bytes(self) -> int:
        """Of shared memory."""
        return self.nbytes + 4 * DOWN * ACROSS * FILTERS

    @property
    def name(self) -> str:
        """As in the names of kernels."""
        return f"{self.shape.c}_{self.taps}"

    def tiles(self, rows: int) -> int:
        """Of so many images."""
        return rows * -(-self.shape.p // DOWN) * -(-self.shape.q // ACROSS)

    def arguments(self, rows: int) -> tuple[int, ...]:
        """What a kernel wants behind the images."""
        shape = self.shape
        sizes = (rows, shape.h, shape.w, shape.r, shape.s, shape.p, shape.q, *shape.stride, *shape.padding)
        return (*sizes, self.chunks, self.residue_apart, self.row_apart)


def patch_of(shape: Shape) -> Patch | None:
    """How the kernels cut a convolution; None where they aren't made for it: products are as fast there, or faster."""
    full = shape.k % 4 == 0 and 4 * shape.k >= 3 * FILTERS * -(-shape.k // FILTERS)
    if shape.groups > 1 or shape.c not in _TAPS or shape.taps == 1 or not full:
        return None
    patches = [Patch(shape, taps) for taps in _TAPS[shape.c]]
    # A chunk that is read behind another starts at a quad.
    patches = [patch for patch in patches if patch.chunks == 1 or patch.taps * shape.c % 4 == 0]
    best = min(patches, key=lambda patch: patch.units * patch.taps)
    return best if max(best.forward_bytes, best.weights_bytes) <= _SHARED else None


class NarrowForward:
    """y = the convolution of x with canonical filters, then bias and ReLU."""

    def __init__(self, device: Device, patch: Patch) -> None:
        self.patch = patch
        self._most = _resident(_IN_BLOCK["forward"], "forward", patch.forward_bytes, device.processors)
        self._kernel = device.kernel("conv_narrow.cu", f"narrow_{patch.name}")

    def __call__(self, rows: int, x: Array, w: Array, bias: Array | None, relu: bool, y: Array) -> None:
        """Of the first `rows` images."""
        patch, k = self.patch, self.patch.shape.k
        across = -(-k // FILTERS)
        grid = (min(patch.tiles(rows), max(1, self._most // across)), across)
        arguments = (x, *patch.arguments(rows), w, bias, y, k, int(relu))
        self._kernel(grid, (32 * _IN_BLOCK["forward"],), *arguments, shared=patch.forward_bytes)


class NarrowGradient:
    """dw = the sum over outputs, as `FilterGradient` has it."""

    def __init__(self, device: Device, patch: Patch) -> None:
        self.patch = patch
        self._groups, self._warps, self._most = _launch(patch, device.processors)
        self._kernel = device.kernel("conv_narrow.cu", f"narrow_weights_{patch.name}")
        self._add = FilterSums(device, patch.shape)

    @staticmethod
    def scratch(patch: Patch, rows: int, processors: int) -> int:
        """Numbers of `partial`."""
        _, _, most = _launch(patch, processors)
        return min(patch.tiles(rows), most) * patch.shape.k * patch.shape.taps * patch.shape.c

    def __call__(self, rows: int, x: Array, dy: Array, partial: Array, dw: Array, add: int) -> None:
        """Of the first `rows` images; assigned, or added."""
        patch, k = self.patch, self.patch.shape.k
        parts = min(patch.tiles(rows), self._most)
        grid = (parts, self._groups, -(-k // FILTERS))
        arguments = (x, *patch.arguments(rows), dy, partial, k)
        self._kernel(grid, (32 * self._warps,), *arguments, shared=patch.weights_bytes)
        self._add(partial, parts, patch.shape.c, dw, add)


def _launch(patch: Patch, processors: int) -> tuple[int, int, int]:
    """Of the gradient's kernel: groups of units, warps of a block, blocks beside each other."""
    groups = -(-patch.units // _IN_BLOCK["weights"])
    warps = -(-patch.units // groups)
    across = groups * -(-patch.shape.k // FILTERS)
    return groups, warps, max(1, _resident(warps, "weights", patch.weights_bytes, processors) // across)


def _resident(warps: int, kernel: str, nbytes: int, processors: int) -> int:
    """Blocks that run side by side on a device: so many have as much to do each, and none comes late."""
    return min(_WARPS[kernel] // warps, _MEMORY // (nbytes + _OWN)) * processors
