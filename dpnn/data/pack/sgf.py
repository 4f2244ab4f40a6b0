"""Game records in the Smart Game Format, FF[1] to FF[4] (red-bean.com/sgf): the main line of each game of a file.

A game is "(", nodes, its variations as games again, ")"; a node is ";" and properties; a property is a name and values
in brackets. The first variation of each branch is the main line.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

Node = dict[str, list[str]]
"""The values of each property; lower-case letters of old formats' names are left out: "SiZe" is SZ."""

PASS = -1

_START = re.compile(r"\(\s*+;")
_TOKEN = re.compile(r"\s*+(?:([();])|([A-Za-z]++)((?:\s*+\[(?:[^\\\]]++|\\.)*+\])++))", re.DOTALL)
_VALUE = re.compile(r"\[((?:[^\\\]]++|\\.)*+)\]", re.DOTALL)
_ESCAPED = re.compile(r"\\(\r\n|\n\r|.)", re.DOTALL)
_CHARSET = re.compile(rb"CA\s*\[\s*([\w.:-]+)\s*\]")
_CHARSETS = {"utf-8", "iso8859-1", "cp1252", "gb2312", "gbk", "gb18030", "big5", "cp950", "shift_jis", "cp932"}
_CHARSETS |= {"euc_jp", "euc_kr", "cp949", "koi8-r", "cp1251", "iso8859-15"}
"""Those of game servers and editors, by Python's names; another can't hide a bracket in a letter, and is latin-1."""


class Malformed(ValueError):
    """The text is no game record. `at`: the byte of the file."""

    def __init__(self, at: int, problem: str) -> None:
        super().__init__(f"byte {at}: {problem}")
        self.at = at


@dataclass(frozen=True)
class Game:
    """The main line of a game, which begins at a byte of its file."""

    at: int
    nodes: list[Node]


def games(data: bytes) -> Iterator[Game]:
    """The games of a file. Malformed where one can't be read; what comes behind it isn't."""
    text, charset = _decode(data)
    start, at = 0, len(data) - len(text.encode(charset))  # behind a byte order mark
    while (found := _START.search(text, start)) is not None:
        at += len(text[start : found.start()].encode(charset))
        start = found.start()
        try:
            nodes, end = _main_line(text, start)
        except _Broken as error:
            place, problem = error.args
            raise Malformed(at + len(text[start:place].encode(charset)), problem) from error
        yield Game(at, nodes)
        at += len(text[start:end].encode(charset))
        start = end
    if not start:
        raise Malformed(0, "no game, which would begin with (;")


def points(values: list[str], columns: int, rows: int) -> list[int]:
    """The points of a list, row * columns + column; "aa:cc" is a rectangle. ValueError where one is off the board."""
    found = []
    for value in values:
        first, colon, last = value.strip().partition(":")
        left, top = _place(first, columns, rows)
        right, bottom = _place(last, columns, rows) if colon else (left, top)
        if right < left or bottom < top:
            raise ValueError(f"{value!r} is no rectangle")
        found += [row * columns + column for row in range(top, bottom + 1) for column in range(left, right + 1)]
    return found


def move(values: list[str], columns: int, rows: int) -> int:
    """The point of a move, or PASS: "", and "tt" on boards up to 19. ValueError where it is off the board."""
    if len(values) != 1:
        raise ValueError(f"{len(values)} moves at once")
    value = values[0].strip()
    if not value or (value == "tt" and max(columns, rows) <= 19):
        return PASS
    column, row = _place(value, columns, rows)
    return row * columns + column


def size(root: Node) -> tuple[int, int]:
    """Columns and rows of the board. ValueError where they are none."""
    value = root.get("SZ", ["19"])[0]
    columns, colon, rows = value.partition(":")
    try:
        found = int(columns), int(rows if colon else columns)
    except ValueError:
        raise ValueError(f"a board of size {value!r}") from None
    if not (min(found) >= 1 and max(found) <= 52):
        raise ValueError(f"a board of size {value!r}")
    return found


class _Broken(Exception):
    """Where in the text (in characters), and what."""


def _main_line(text: str, at: int) -> tuple[list[Node], int]:
    """The nodes of the game that begins here, and where it ends. The main line ends where the first bracket closes."""
    nodes: list[Node] = []
    depth, before, closed = 0, "", False
    while True:
        token = _TOKEN.match(text, at)
        if token is None:
            raise _Broken(at, _problem(text, at))
        mark, name, values = token.groups()
        if name is not None:
            if before != ";":
                raise _Broken(token.start(2), f"the property {name} belongs to no node")
            if not closed:
                if not name.isupper():
                    name = "".join(letter for letter in name if letter.isupper())
                found = _VALUE.findall(values)
                if "\\" in values:
                    found = [_ESCAPED.sub(_unescaped, value) for value in found]
                nodes[-1].setdefault(name, []).extend(found)
        else:
            if mark == ";":
                if before == ")":
                    raise _Broken(token.start(1), "a node behind a variation")
                if not closed:
                    nodes.append({})
            elif mark == "(":
                if before == "(":
                    raise _Broken(token.start(1), "a variation without a node")
                depth += 1
            else:
                depth -= 1
                closed = True
                if not depth:
                    return nodes, token.end()
            before = mark
        at = token.end()


def _problem(text: str, at: int) -> str:
    rest = text[at : at + 100].lstrip()
    if not rest and len(text) - at < 100:
        return "the file ends in the middle of a game"
    if re.match(r"[A-Za-z]+\s*\[", rest):
        return "the file ends in the middle of a value"
    return f"{rest[:10]!r} is no node, property or variation"


def _unescaped(found: re.Match[str]) -> str:
    """What stands for an escaped letter; an escaped end of line stands for nothing."""
    return "" if found[1][0] in "\r\n" else found[1]


def _place(value: str, columns: int, rows: int) -> tuple[int, int]:
    """Column and row of "pd"; capitals go on behind z."""
    if len(value) == 2 and value.isascii() and value.isalpha():
        column, row = (ord(c) - ord("a") if c >= "a" else ord(c) - ord("A") + 26 for c in value)
        if column < columns and row < rows:
            return column, row
    raise ValueError(f"{value[:10]!r} is not on a board of {columns} x {rows}")


def _decode(data: bytes) -> tuple[str, str]:
    """The text and its charset: what CA says or UTF-8, where the bytes can be that, else latin-1."""
    found = _CHARSET.search(data[: 1 << 16])
    name = "utf-8" if found is None else found[1].decode()
    try:
        charset = codecs.lookup(name).name
        if charset in _CHARSETS:
            return data.removeprefix(codecs.BOM_UTF8).decode(charset), charset
    except (LookupError, UnicodeDecodeError):
        pass
    return data.decode("latin-1"), "latin-1"
