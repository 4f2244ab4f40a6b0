"""The rules of Go: what a move takes and forbids, against a board that looks at every stone anew."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpnn.data.pack.go import BLACK, EMPTY, NEVER, WHITE, Board, IllegalMove, beside
from dpnn.data.pack.planes import PLANES, planes


def board(text, **options):
    """A board from rows of . (empty), X (black), O (white)."""
    rows = text.split()
    made = Board(len(rows), **options)
    made.arrange((i, ".XO".index(c)) for i, c in enumerate("".join(rows)) if c != ".")
    return made


def shown(board):
    text = "".join(".XO"[colour] for colour in board.colours)
    return " ".join(re.findall("." * board.size, text))


def group(colours, size, point):
    """Stones and liberties of the group at a point."""
    stones, liberties, ahead = set(), set(), {point}
    while ahead:
        stone = ahead.pop()
        stones.add(stone)
        for near in beside(size)[stone]:
            if not colours[near]:
                liberties.add(near)
            elif colours[near] == colours[point] and near not in stones:
                ahead.add(near)
    return stones, liberties


def played(colours, size, colour, point, suicide):
    """The colours after a move, by definition; None where it is illegal (ko aside)."""
    if colours[point]:
        return None
    after = list(colours)
    after[point] = colour
    for near in beside(size)[point]:
        if after[near] == 3 - colour:
            stones, liberties = group(after, size, near)
            for stone in stones if not liberties else ():
                after[stone] = EMPTY
    stones, liberties = group(after, size, point)
    if not liberties:
        if not suicide or len(stones) == 1:
            return None
        for stone in stones:
            after[stone] = EMPTY
    return after


def check(board):
    """All that a board says of its groups is what looking at every stone says."""
    for point, colour in enumerate(board.colours):
        found = board.groups[point]
        if not colour:
            assert found is None
            assert board.came[point] == NEVER
        else:
            assert (found.stones, found.liberties) == group(board.colours, board.size, point)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 1 << 32), st.booleans())
def test_any_moves_leave_the_board_that_the_rules_say(size, suicide, seed, turns):
    rng = np.random.default_rng(seed)
    board = Board(size, suicide)
    before = None  # the position before the last move
    came = {}
    for turn in range(150):
        colour = 1 + turn % 2 if turns else int(rng.integers(1, 3))
        point = int(rng.integers(size**2))
        last = list(board.colours)
        wanted = played(last, size, colour, point, suicide)
        if wanted is not None and wanted == before and sum(a != b for a, b in zip(last, wanted, strict=True)) == 2:
            wanted = None
        if wanted is None:
            with pytest.raises(IllegalMove):
                board.play(colour, point)
            assert board.colours == last
        else:
            came[point] = board.turn
            board.play(colour, point)
            assert board.colours == wanted
            before = last
            assert all(board.came[i] == came[i] for i, c in enumerate(wanted) if c)
        check(board)


def test_a_ko_is_retaken_after_a_move_elsewhere_or_a_pass():
    start = ".XO. X.XO .XO. ...."
    for between in (lambda board: board.play(BLACK, 15), lambda board: board.skip()):
        made = board(start)
        made.play(WHITE, 5)
        assert shown(made) == ".XO. XO.O .XO. ...."
        with pytest.raises(IllegalMove, match="retakes a ko at once"):
            made.play(BLACK, 6)
        between(made)
        made.play(WHITE, 12)
        made.play(BLACK, 6)
        assert shown(made)[5:9] == "X.XO"


def test_a_ko_may_be_filled():
    made = board(".XO. X.XO .XO. ....")
    made.play(WHITE, 5)
    made.play(WHITE, 6)
    assert shown(made)[5:9] == "XOOO"


def test_one_stone_that_took_two_may_be_taken_at_once():
    made = board(".OOX OXX. .... ....")
    made.play(BLACK, 0)
    assert shown(made) == "X..X OXX. .... ...."
    made.play(WHITE, 1)
    assert shown(made) == ".O.X OXX. .... ...."


def test_suicide_is_for_several_stones_where_the_rules_allow_it():
    start = ".XO. XOO. O... ...."
    with pytest.raises(IllegalMove, match="suicide"):
        board(start).play(BLACK, 0)
    made = board(start, suicide=True)
    made.play(BLACK, 0)
    assert shown(made) == "..O. .OO. O... ...."
    check(made)
    with pytest.raises(IllegalMove, match="suicide"):
        board(".O. O.. ...", suicide=True).play(BLACK, 0)


def test_stones_set_up_later_join_and_split_groups():
    made = board("XXX ... ...")
    made.play(WHITE, 8)
    made.arrange([(1, EMPTY), (4, WHITE), (5, WHITE)])
    assert shown(made) == "X.X .OO ..O"
    check(made)
    assert made.turn == 1
    with pytest.raises(IllegalMove, match="without a liberty"):
        made.arrange([(1, WHITE), (3, WHITE)])


def test_planes_are_seen_by_the_player_who_moves():
    made = board("X.. ... ...")
    made.play(WHITE, 1)
    made.play(BLACK, 4)
    made.skip()
    made.play(WHITE, 2)
    x = planes(made, BLACK)
    assert x.shape == (3, 3, PLANES)
    assert x.dtype == np.uint8
    own, other, empty, ones = (x[..., i].ravel().nonzero()[0].tolist() for i in range(4))
    assert (own, other, empty, ones) == ([0, 4], [1, 2], [3, 5, 6, 7, 8], [*range(9)])
    assert [x[..., 4 + i].ravel().nonzero()[0].tolist() for i in range(8)] == [[2], [], [4], [1], [], [], [], [0]]
    assert [x[..., 12 + i].ravel().nonzero()[0].tolist() for i in range(3)] == [[0, 1, 2], [], [4]]
    np.testing.assert_array_equal(planes(made, WHITE)[..., [1, 0]], x[..., :2])


def test_ages_and_liberties_end_in_a_last_plane():
    made = Board(19)
    for point in range(0, 20, 2):
        made.play(BLACK, point)
    x = planes(made, WHITE)
    assert x[..., 11].sum() == 3
    made.play(BLACK, 1)
    made.play(BLACK, 3)
    assert planes(made, WHITE)[0, 0, 12:].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    made.play(BLACK, 5)
    made.play(BLACK, 7)
    made.play(BLACK, 9)
    assert planes(made, WHITE)[0, 0, 12:].tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
