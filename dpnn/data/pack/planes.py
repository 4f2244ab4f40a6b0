"""What a network sees of a position of Go: planes over the board, of 0 and 1.

The basic ones of "Mastering the game of Go with deep neural networks and tree search", 2016, extended data table 2: all
but captures, self-atari, ladders and what is sensible. Another set is another such function and its number of planes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack.go import NEVER, Board

Array = NDArray[Any]

PLANES = 20
AGES, LIBERTIES = 8, 8
_ONES, _AGE, _LIBERTY = 3, 4, 12
"""Where each kind begins; before them: own stones, the opponent's, empty points."""


def planes(board: Board, colour: int) -> Array:
    """The planes for the player who moves next, uint8 (size, size, 20).

    0 own stones; 1 the opponent's; 2 empty; 3 ones; 4-11 stones that came 1, 2, ..., 8 or more turns ago; 12-19 stones
    whose group has 1, 2, ..., 8 or more liberties. Stones that were set up came long ago.
    """
    colours = np.array(board.colours)
    came = np.array(board.came)
    liberties = np.array([0 if group is None else len(group.liberties) for group in board.groups])
    out = np.zeros((len(colours), PLANES), np.uint8)
    out[:, 0] = colours == colour
    out[:, 1] = colours == 3 - colour
    out[:, 2] = colours == 0
    out[:, _ONES] = 1
    stones = np.flatnonzero(colours)
    ages = np.where(came[stones] == NEVER, AGES, board.turn - came[stones])
    out[stones, _AGE - 1 + np.minimum(ages, AGES)] = 1
    out[stones, _LIBERTY - 1 + np.minimum(liberties[stones], LIBERTIES)] = 1
    return out.reshape(board.size, board.size, PLANES)
