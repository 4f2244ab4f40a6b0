"""How a matrix product (m, k) x (k, n) is cut among a device's multiprocessors: the tiles of kernels/tile.cuh.

Each block makes one tile of the result. Where there are fewer tiles than multiprocessors, or a few more than a
multiple of them, the sum over k is cut into parts as well; each is written to scratch, and another kernel adds them up.
"""

from dataclasses import dataclass
from functools import lru_cache

from dpnn.backends.cuda.device import Grid

STEP = 16
"""Summands that a kernel has in shared memory at a time."""
LEAST = 4 * STEP
"""Summands that are worth a part."""
AREA = 8 * 128 * 128
"""Results, in all parts together, that a multiprocessor may get where the sum is cut: it bounds scratch."""


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` results of a block; `speed`: its share of multiply-adds among what it issues."""

    rows: int
    columns: int
    speed: float

    @property
    def name(self) -> str:
        """As in the names of kernels."""
        return f"{self.rows}x{self.columns}"

    @property
    def threads(self) -> int:
        """A thread makes 64 results."""
        return self.rows * self.columns // 64


GATHER = (Tile(128, 128, 0.88), Tile(128, 64, 0.86), Tile(64, 128, 0.86), Tile(128, 32, 0.82), Tile(64, 64, 0.83))
ANYWHERE = (Tile(64, 128, 0.6),)
"""Of gathers whose operands may lie anywhere in memory."""
WEIGHTS = (Tile(128, 128, 0.87), Tile(128, 64, 0.85), Tile(64, 128, 0.83), Tile(64, 64, 0.80))


@dataclass(frozen=True)
class Plan:
    """`grid`: tiles down, tiles across, parts x groups; `part`: summands of one part."""

    tile: Tile
    grid: Grid
    parts: int
    part: int


@lru_cache(maxsize=4096)
def plan(tiles: tuple[Tile, ...], m: int, n: int, k: int, groups: int, processors: int) -> Plan:
    """The fastest cut, by a rough count of clocks; it depends on nothing else, so that a sum's order doesn't either."""
    return min((cut for tile in tiles for cut in _cuts(tile, m, n, k, groups, processors)), key=lambda cut: cut[0])[1]


def _cuts(tile: Tile, m: int, n: int, k: int, groups: int, processors: int) -> list[tuple[float, Plan]]:
    """Clocks and plan of each number of parts that gives each multiprocessor another number of blocks."""
    down, across, steps = -(-m // tile.rows), -(-n // tile.columns), -(-k // STEP)
    tiles = down * across * groups
    most = min(max_parts(k), AREA * processors // (tiles * tile.rows * tile.columns))
    cuts = []
    for parts in sorted({1, *(min(most, each * processors // tiles) for each in range(1, 33))} - {0, -1}):
        length = max(1, -(-steps // parts))
        real = max(1, -(-steps // length))
        each = -(-tiles * real // processors)  # blocks of the busiest multiprocessor
        side = 512 // tile.threads  # blocks that it holds at a time; fewer at the end leave clocks empty
        full, rest = each // side * side, each % side
        turns = full + (rest * side) ** 0.5
        clocks = turns * tile.rows * tile.columns * (length * STEP / 128 + 0.25) / tile.speed
        if real > 1:
            clocks += 4000 + 8 * real * groups * m * n / (12 * processors)  # one more kernel; 12 bytes a clock
        cuts.append((clocks, Plan(tile, (down, across, real * groups), real, length * STEP)))
    return cuts


def max_parts(k: int) -> int:
    """Into how many parts a sum of k may be cut."""
    return max(1, k // LEAST)


def partial_size(m: int, n: int, k: int, groups: int, processors: int, whole: bool = False) -> int:
    """Numbers of scratch for the parts of any product of at most these sizes; `whole`: a sum of one part goes there."""
    results = groups * m * -(-n // 4) * 4
    parts = min(max_parts(k) * results, AREA * processors) if max_parts(k) > 1 else 0
    return max(parts, results if whole else 0)
