"""The rules of Go: a board on which a game is replayed, with the liberties of each group at hand.

A point is row * size + column.
"""

from collections.abc import Iterable
from functools import cache

EMPTY, BLACK, WHITE = 0, 1, 2
"""The other colour is 3 - colour."""

NEVER = -1


class IllegalMove(ValueError):
    """The rules forbid it; says why."""


class Group:
    """Stones of a colour that hang together, and the empty points beside them."""

    __slots__ = ("liberties", "stones")

    def __init__(self, stones: set[int], liberties: set[int]) -> None:
        self.stones, self.liberties = stones, liberties


class Board:
    """Stones as they stand after some moves. `suicide`: whether the rules let a player take several own stones.

    The rules agree that a single stone may not be retaken at once (ko), and differ in how longer cycles are forbidden:
    those are allowed.
    """

    def __init__(self, size: int = 19, suicide: bool = False) -> None:
        self.size, self.suicide = size, suicide
        self.colours = [EMPTY] * size**2
        self.groups: list[Group | None] = [None] * size**2
        """Of the stone at each point."""
        self.turn = 0
        """Moves so far, and passes."""
        self.came = [NEVER] * size**2
        """The turn in which the stone at each point was played; NEVER, where it was set up."""
        self._ko = (NEVER, EMPTY)
        """Where who may not play in this turn."""
        self._beside = beside(size)

    def play(self, colour: int, point: int) -> None:
        """Put a stone and take what has no liberties then. IllegalMove leaves the board as it was."""
        colours, groups, beside = self.colours, self.groups, self._beside[point]
        if colours[point]:
            raise IllegalMove("there is a stone")
        if self._ko == (point, colour):
            raise IllegalMove("it retakes a ko at once")
        stones, liberties = {point}, {near for near in beside if not colours[near]}
        friends, taken = [], []
        for near in beside:
            group = groups[near]
            if group is None:
                continue
            if colours[near] == colour:
                if group not in friends:
                    friends.append(group)
            elif len(group.liberties) == 1 and group not in taken:
                taken.append(group)
        suicide = not liberties and not taken and all(len(group.liberties) == 1 for group in friends)
        if suicide and not (self.suicide and friends):
            raise IllegalMove("it is suicide")
        for group in friends:
            stones |= group.stones
            liberties |= group.liberties
        liberties.discard(point)
        for near in beside:
            group = groups[near]
            if group is not None and colours[near] != colour:
                group.liberties.discard(point)
        joined = Group(stones, liberties)
        colours[point] = colour
        for stone in stones if friends else (point,):
            groups[stone] = joined
        self.came[point] = self.turn
        for group in taken:
            self._take(group)
        if suicide:
            self._take(joined)
        self._ko = (NEVER, EMPTY)
        if len(stones) == 1 == len(joined.liberties) and len(taken) == 1 == len(taken[0].stones):
            self._ko = (next(iter(taken[0].stones)), 3 - colour)
        self.turn += 1

    def skip(self) -> None:
        """Pass."""
        self._ko = (NEVER, EMPTY)
        self.turn += 1

    def arrange(self, stones: Iterable[tuple[int, int]]) -> None:
        """Set up stones, (point, colour), or EMPTY points.

        IllegalMove where a stone has no liberty then; the board is of no use any more.
        """
        for point, colour in stones:
            self.colours[point], self.came[point] = colour, NEVER
        self._ko = (NEVER, EMPTY)
        self.groups = [None] * len(self.colours)
        for point, found in enumerate(self.colours):
            if found and self.groups[point] is None:
                group = self._gather(point)
                if not group.liberties:
                    raise IllegalMove("it sets up a stone without a liberty")
                for stone in group.stones:
                    self.groups[stone] = group

    def _gather(self, point: int) -> Group:
        """The group of a stone, found stone by stone."""
        group = Group(set(), set())
        ahead = [point]
        while ahead:
            stone = ahead.pop()
            if stone in group.stones:
                continue
            group.stones.add(stone)
            for near in self._beside[stone]:
                if not self.colours[near]:
                    group.liberties.add(near)
                elif self.colours[near] == self.colours[point]:
                    ahead.append(near)
        return group

    def _take(self, group: Group) -> None:
        """Remove a group; its points are liberties of the groups beside it."""
        colours, groups = self.colours, self.groups
        for stone in group.stones:
            colours[stone], groups[stone], self.came[stone] = EMPTY, None, NEVER
        for stone in group.stones:
            for near in self._beside[stone]:
                other = groups[near]
                if other is not None:
                    other.liberties.add(stone)


@cache
def beside(size: int) -> tuple[tuple[int, ...], ...]:
    """The points beside each point."""
    return tuple(
        tuple(
            row * size + column
            for row, column in ((r - 1, c), (r, c - 1), (r, c + 1), (r + 1, c))
            if 0 <= row < size and 0 <= column < size
        )
        for r in range(size)
        for c in range(size)
    )
