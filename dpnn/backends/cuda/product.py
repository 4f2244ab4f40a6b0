"""The matrix products of kernels/conv.cu, and what adds up their parts."""

from dataclasses import dataclass

from dpnn.backends.base import Array
from dpnn.backends.cuda.cut import ANYWHERE, GATHER, WEIGHTS, partial_size, plan
from dpnn.backends.cuda.device import Device, blocks
from dpnn.backends.cuda.geometry import Shape, Target, Walk, forward_walk, quads


@dataclass(frozen=True)
class Matrix:
    """(G, depth, n), whose rows lie `apart` numbers apart, a multiple of 4."""

    array: Array
    n: int
    depth: int
    apart: int


class Gather:
    """out[pixel][n] = the sum over taps and channels of images[pixel + tap][c] matrix[(tap, c)][n], for each group."""

    def __init__(self, device: Device, walk: Walk) -> None:
        self.walk, self.device = walk, device
        self._walking = walk.arguments((walk.taps[1], walk.c))
        self._products = {tile: device.kernel("conv.cu", f"gather_{tile.name}") for tile in GATHER}
        self._anywhere = {tile: device.kernel("conv.cu", f"gather_any_{tile.name}") for tile in ANYWHERE}
        self._add = device.kernel("conv_layout.cu", "add_parts")

    @staticmethod
    def scratch(walk: Walk, n: int, rows: int, processors: int, whole: bool = False) -> int:
        """Numbers of `partial`."""
        return partial_size(*_sizes(walk, n, rows), walk.groups, processors, whole)

    def multiply(
        self, rows: int, images: Array, matrix: Matrix, partial: Array, output: tuple[object, ...] | None
    ) -> int:
        """The first `rows` images. The number of parts in `partial`; 0 where one part went to `output` at once."""
        m, n, k = _sizes(self.walk, matrix.n, rows)
        quads = all(self.device.address(array) % 16 == 0 for array in (images, matrix.array))
        tiles, products = (GATHER, self._products) if quads else (ANYWHERE, self._anywhere)
        cut = plan(tiles, m, n, k, self.walk.groups, self.device.processors)
        parts = 0 if cut.parts == 1 and output else cut.parts
        sizes = (m, n, matrix.depth, matrix.apart, matrix.depth * matrix.apart, self.walk.groups, cut.part)
        to = (partial if parts else None, *(output or (None, None, 0, 0, *Target(n, 0).arguments)))
        products[cut.tile](cut.grid, (cut.tile.threads,), images, *self._walking, matrix.array, *sizes, *to)
        return parts

    def __call__(
        self,
        rows: int,
        images: Array,
        matrix: Matrix,
        partial: Array,
        out: Array,
        target: Target,
        bias: Array | None = None,
        relu: bool = False,
    ) -> None:
        """The first `rows` images, to where `target` says of `out`."""
        output = (out, bias, int(relu), 0, *target.arguments)
        parts = self.multiply(rows, images, matrix, partial, output)
        if parts:
            m = rows * self.walk.p * self.walk.q
            grid = (*blocks(m * quads(matrix.n) // 4), self.walk.groups)
            self._add(grid, (256,), partial, parts, m, matrix.n, *output)


class FilterSums:
    """dw = or += the sums over parts of partial[part][k][(tap, c)]: the products' order is not the canonical one."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.shape = shape
        self._add = device.kernel("conv_layout.cu", "add_filter_parts")

    def __call__(self, partial: Array, parts: int, c: int, dw: Array, add: int) -> None:
        """`c`: channels of `partial`, with those that only round them up."""
        shape, filters = self.shape, self.shape.groups * self.shape.k
        sizes = (parts, filters, shape.taps, c, shape.c)
        self._add(blocks(filters * shape.taps * c, 32), (256,), partial, *sizes, dw, add)


class FilterGradient:
    """dw[k][(tap, c)] = the sum over pixels of dy[pixel][k] images[pixel + tap][c], for each group; canonical."""

    def __init__(self, device: Device, shape: Shape) -> None:
        self.shape, self.processors = shape, device.processors
        self._walking = forward_walk(shape).arguments((shape.p, shape.q))
        self._products = {tile: device.kernel("conv.cu", f"weights_{tile.name}") for tile in WEIGHTS}
        self._add = FilterSums(device, shape)

    @staticmethod
    def scratch(shape: Shape, rows: int, processors: int) -> int:
        """Numbers of `partial`."""
        n = shape.taps * quads(shape.c)
        return partial_size(shape.k, n, rows * shape.p * shape.q, shape.groups, processors, not _canonical(shape))

    def __call__(self, rows: int, images: Array, dy: Array, partial: Array, dw: Array, add: int) -> None:
        """Of the first `rows` images; assigned, or added."""
        shape, c = self.shape, quads(self.shape.c)
        n = shape.taps * c
        cut = plan(WEIGHTS, shape.k, n, rows * shape.p * shape.q, shape.groups, self.processors)
        direct = cut.parts == 1 and _canonical(shape)
        sizes = (rows, shape.k, quads(shape.k), shape.groups, cut.part)
        output = (None if direct else partial, dw, None, 0, add, *Target(n, shape.k * n).arguments)
        self._products[cut.tile](cut.grid, (cut.tile.threads,), images, *self._walking, dy, *sizes, *output)
        if not direct:
            self._add(partial, cut.parts, c, dw, add)


def _sizes(walk: Walk, n: int, rows: int) -> tuple[int, int, int]:
    """(m, n, k) of a gather."""
    return rows * walk.p * walk.q, n, walk.taps[0] * walk.taps[1] * walk.c


def _canonical(shape: Shape) -> bool:
    """Whether the product's order of a filter's numbers, (r, s, c), is the canonical one, (c, r, s)."""
    return shape.taps == 1 and shape.c % 4 == 0
