"""Windows that slide over rows and columns: what convolution and pooling have in common."""

from dpnn.errors import JobError
from dpnn.nn.layer import Shape, pair

Size = int | tuple[int, int]
"""One number for rows and columns, or (rows, columns)."""


def slide(who: str, shape: Shape, size: Size, stride: Size, padding: Size, ceil: bool = False) -> tuple[int, int]:
    """How many windows (P, Q) fit onto an image of `shape` (C, H, W).

    `ceil`: a last window may hang over the end, as long as it starts inside the image or the padding before it (as
    PyTorch's ceil_mode). JobError, naming the layer `who`, where there would be none.
    """
    (r, s), (down, right), (above, left) = pair(size), pair(stride), pair(padding)
    if min(r, s) < 1 or min(down, right) < 1 or min(above, left) < 0:
        raise JobError(
            f"{who}: size = {size}, stride = {stride}, padding = {padding}; use 1 or more, padding 0 or more"
        )
    p, q = (_fit(*one, ceil) for one in ((shape[1], r, down, above), (shape[2], s, right, left)))
    if p < 1 or q < 1:
        over = (down - 1, right - 1) if ceil else (0, 0)
        raise JobError(
            f"{who}: can't take an input of shape {shape}: with size = {size} and padding = {padding} it wants "
            f"at least {max(r - 2 * above - over[0], 1)} rows and {max(s - 2 * left - over[1], 1)} columns"
        )
    return p, q


def _fit(n: int, size: int, stride: int, padding: int, ceil: bool) -> int:
    room = n + 2 * padding - size
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= n + padding else count
