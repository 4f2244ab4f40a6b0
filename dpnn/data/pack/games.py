"""A folder of Go game records in SGF: a sample for each move, of the position before it; its class is the point.

Games are kept as their moves, two bytes each, and a position is made by replaying its game up to it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpnn.data.pack import sgf
from dpnn.data.pack.go import BLACK, EMPTY, WHITE, Board, IllegalMove
from dpnn.data.pack.parts import reading
from dpnn.data.pack.planes import PLANES, planes
from dpnn.data.pack.source import Source, Split
from dpnn.errors import DataError

Array = NDArray[Any]

SIZE = 19
POINTS = SIZE**2
COLUMNS = "ABCDEFGHJKLMNOPQRST"

FILES = "*.[sS][gG][fF]"

_PASS = POINTS
"""Stands for a point where a player passes."""
_SETUP = 4
"""An event is a kind * 512 + a point; a kind is a colour that plays, or _SETUP + what is put on the point."""
_MOVES = {"B": BLACK, "W": WHITE}
_SETUPS = {"AE": EMPTY, "AB": BLACK, "AW": WHITE}
_SUICIDE = ("nz", "new zealand", "goe", "ing", "tromp")
"""How the names of the rules begin that let a player take several own stones."""


def read_games(path: Path) -> Source:
    """The positions of all games on 19 x 19 in a file, or in the *.sgf files of a folder and below.

    What can't be read, or breaks the rules, is left out from there on, and told. DataError where nothing is left.
    """
    listed = _Listed()
    for file in [path] if path.is_file() else sorted(path.rglob(FILES)):
        listed.add_file(file)
    if not listed.games:
        first = ": ".join(listed.left_out[0]) if listed.left_out else "there is no .sgf file"
        raise DataError(f"{path} holds no game of Go on {SIZE} x {SIZE} that can be packed; {first}")
    positions = Positions(listed.names, listed.games)
    ids = np.arange(len(positions.moves), dtype=np.uint64)
    names = tuple(f"{column}{SIZE - row}" for row in range(SIZE) for column in COLUMNS)
    split = Split("train", positions, positions.moves, ids, positions.games)
    return Source([split], POINTS, class_names=names, left_out=listed.left_out)


class Positions:
    """The positions before all moves of some games that aren't passes, as planes, uint8 (19, 19, 20)."""

    shape: tuple[int, ...] = (SIZE, SIZE, PLANES)
    dtype = np.dtype(np.uint8)

    def __init__(self, names: Sequence[str], games: Sequence[Array]) -> None:
        """`games`: the events of each, uint16."""
        self._names = names
        self._events = np.concatenate(games)
        self._starts = np.concatenate(([0], np.cumsum([len(game) for game in games])))
        self._places = np.flatnonzero((self._events >> 9 < _SETUP) & (self._events & 511 != _PASS))
        self.moves = (self._events[self._places] & 511).astype(np.int32)
        """The point of each sample's move, int32 (n,)."""
        self.games = (np.searchsorted(self._starts, self._places, side="right") - 1).astype(np.int32)
        """The game of each sample, int32 (n,)."""

    def read(self, numbers: Array) -> Array:
        """Some positions, (n, 19, 19, 20): each game is replayed once, up to the last of its positions."""
        out = np.empty((len(numbers), *self.shape), np.uint8)
        games = self.games[numbers]
        for game in np.unique(games):
            rows = np.flatnonzero(games == game)
            start = self._starts[game]
            places = self._places[numbers[rows]] - start
            wanted = set(places.tolist())
            events = self._events[start : start + places.max() + 1].tolist()
            board = Board(SIZE, suicide=True)  # it was checked when it was listed
            for place in _replay(board, events):
                if place in wanted:
                    out[rows[places == place]] = planes(board, events[place] >> 9)
        return out

    def name(self, number: int) -> str:
        """The game's file, and the number of the move."""
        game, place = self.games[number], self._places[number]
        return f"{self._names[game]}, move {_count_moves(self._events[self._starts[game] : place]) + 1}"


class _Listed:
    """The games of all files so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.games: list[Array] = []
        """The events of each, uint16."""
        self.left_out: list[tuple[str, str]] = []
        self._seen: dict[bytes, str] = {}

    def add_file(self, path: Path) -> None:
        """List the games of one file; DataError where the system can't read it."""
        with reading(path):
            data = path.read_bytes()
        try:
            for number, game in enumerate(sgf.games(data)):
                self._add(f"{path}, byte {game.at}" if number else str(path), game.nodes)
        except sgf.Malformed as error:
            self.left_out.append((str(path), str(error)))

    def _add(self, name: str, nodes: list[sgf.Node]) -> None:
        unfit = _unfit(nodes[0])
        found, problem = ([], unfit) if unfit else _events(nodes)
        board = Board(SIZE, nodes[0].get("RU", [""])[0].strip().lower().startswith(_SUICIDE))
        try:
            for place in _replay(board, found):
                last = place
        except IllegalMove as error:
            found, problem = found[:last], str(error)
        events = np.array(found, np.uint16)
        if problem and not unfit:
            problem += f" (left out from move {_count_moves(events) + 1} on)"
        key = hashlib.blake2b(events.data, digest_size=16).digest()
        if not _count_moves(events):
            problem = problem or "it has no moves"
        elif key in self._seen:
            problem = f"it has the moves of another game ({self._seen[key]})"
        else:
            self._seen[key] = name
            self.names.append(name)
            self.games.append(events)
        if problem:
            self.left_out.append((name, problem))


def _unfit(root: sgf.Node) -> str:
    """Why a game isn't one to be packed; nothing where it is."""
    if root.get("GM", ["1"])[0].strip() != "1":
        return "it isn't a game of Go"
    try:
        columns, rows = sgf.size(root)
    except ValueError as error:
        return str(error)
    return "" if (columns, rows) == (SIZE, SIZE) else f"its board is {columns} x {rows}, not {SIZE} x {SIZE}"


def _events(nodes: list[sgf.Node]) -> tuple[list[int], str]:
    """What happens in a game; and what can't be understood behind that, if anything."""
    events = []
    try:
        for node in nodes:
            for name, colour in _SETUPS.items():
                if name in node:
                    events += [(_SETUP + colour) << 9 | point for point in sgf.points(node[name], SIZE, SIZE)]
            for name, values in node.items():
                if name in _MOVES:
                    point = sgf.move(values, SIZE, SIZE)
                    events.append(_MOVES[name] << 9 | (_PASS if point == sgf.PASS else point))
    except ValueError as error:
        return events, str(error)
    return events, ""


def _replay(board: Board, events: list[int]) -> Iterator[int]:
    """Play a game; yields the number of each event before it happens, of stones set up together that of the first."""
    place = 0
    while place < len(events):
        yield place
        kind, point = divmod(events[place], 512)
        if kind >= _SETUP:
            end = place
            while end < len(events) and events[end] >> 9 >= _SETUP:
                end += 1
            board.arrange((event & 511, (event >> 9) - _SETUP) for event in events[place:end])
            place = end
            continue
        if point == _PASS:
            board.skip()
        else:
            board.play(kind, point)
        place += 1


def _count_moves(events: Array) -> int:
    """Moves and passes."""
    return int(np.count_nonzero(events >> 9 < _SETUP))
