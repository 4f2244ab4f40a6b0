"""The main line of game records is read as it was written, and what is no game record is told by its byte."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpnn.data.pack import sgf


def nodes(text):
    (game,) = sgf.games(text.encode() if isinstance(text, str) else text)
    return game.nodes


def written(nodes):
    """A game as a file has it."""

    def value(text):
        return "[" + re.sub(r"([\\\]])", r"\\\1", text) + "]"

    return "(" + "".join(";" + "".join(n + "".join(map(value, v)) for n, v in node.items()) for node in nodes) + ")"


values = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])), min_size=1, max_size=3)
names = st.text("ABCDWZ", min_size=1, max_size=2).filter(lambda name: name != "CA")
games = st.lists(st.dictionaries(names, values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(games, min_size=1, max_size=3), st.sampled_from(["", "\n", " \r\n\t", "\ufeff"]))
def test_games_are_read_as_they_were_written(collection, between):
    data = between.join(["", *map(written, collection), ""]).encode()
    found = list(sgf.games(data))
    assert [game.nodes for game in found] == collection
    assert all(data[game.at :].startswith(written(game.nodes).encode()) for game in found)


@settings(max_examples=300, deadline=None)
@given(games, st.data())
def test_a_mutated_file_is_read_or_malformed_at_a_byte_of_it(game, data):
    text = bytearray(written(game).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    del text[data.draw(st.integers(1, len(text))) :]
    at = None
    try:
        found = list(sgf.games(bytes(text)))
    except sgf.Malformed as error:
        at = error.at
    assert found if at is None else 0 <= at <= len(text)


def test_the_first_variation_of_each_branch_is_the_main_line():
    assert nodes("(;A[1](;B[2];B[3](;B[4])(;B[5](;B[6])))(;B[7];B[8]))") == [
        {"A": ["1"]}, {"B": ["2"]}, {"B": ["3"]}, {"B": ["4"]}
    ]  # fmt: skip


def test_deeply_nested_variations_are_read():
    assert len(nodes("(;B[aa]" * 100_000 + ")" * 100_000)) == 100_000


def test_names_of_old_formats_are_shortened_and_values_of_a_name_are_gathered():
    assert nodes("(;GaMe[1]SiZe[9]AddBlack[aa] [bb]\nAB[cc])") == [
        {"GM": ["1"], "SZ": ["9"], "AB": ["aa", "bb", "cc"]}
    ]  # fmt: skip


def test_brackets_and_ends_of_line_are_escaped():
    assert nodes("(;C[a\\]b\\\\c\\:d\\\ne\\\r\nf\ng[;(])") == [{"C": ["a]b\\c:def\ng[;("]}]


@pytest.mark.parametrize("charset", ["GB18030", "gbk", "Big5", "Shift_JIS", "UTF-8"])
def test_a_letter_whose_second_byte_is_a_bracket_is_no_bracket(charset):
    letters = [chr(c) for c in range(0x4E00, 0x9FFF)]
    encoded = {c: c.encode(charset, "ignore") for c in letters}
    hard = [c for c, b in encoded.items() if len(b) == 2 and b[1:] in (b"]", b"\\")] or letters[:1]
    text = "".join(hard[:20])
    assert nodes(f"(;CA[{charset}]PB[{text}];B[aa])".encode(charset)) == [
        {"CA": [charset], "PB": [text]},
        {"B": ["aa"]},
    ]


@pytest.mark.parametrize(
    "data", [b"(;PB[J\xf6rg];B[aa])", b"(;CA[UTF-8]PB[J\xf6rg];B[aa])", b"(;CA[zip]PB[J\xf6rg];B[aa])"]
)
def test_what_its_charset_does_not_allow_is_latin_1(data):
    first, second = nodes(data)
    assert first["PB"] == ["Jörg"]
    assert second == {"B": ["aa"]}


@pytest.mark.parametrize(
    ("text", "at", "problem"),
    [
        ("", 0, "no game"),
        ("(B[aa])", 0, "no game"),
        ("é (;B[aa]", 10, "ends in the middle of a game"),
        ("(;B[aa];W[b", 8, "ends in the middle of a value"),
        ("(;C[é];B[aa]) (;B[bb]W)", 22, "'W)' is no node"),
        ("(;B[aa]x;W[bb])", 7, "'x;W[bb])' is no node"),
        ("(;B[aa](W[bb]))", 8, "the property W belongs to no node"),
        ("(;B[aa](;W[bb]);B[cc])", 15, "a node behind a variation"),
        ("(;B[aa]((;W[bb])))", 8, "a variation without a node"),
    ],
)
def test_what_is_no_game_record_is_told_by_its_byte(text, at, problem):
    with pytest.raises(sgf.Malformed, match=f"byte {at}: .*{re.escape(problem)}"):
        list(sgf.games(text.encode()))


def test_an_unclosed_value_is_told_at_once():
    with pytest.raises(sgf.Malformed, match=r"byte 2: .*middle of a value"):
        list(sgf.games(b"(;C[" + b"a\\" * 500_000))


def test_games_before_a_malformed_one_are_read():
    found = sgf.games(b"(;B[aa])(;B[bb]) junk (;B[")
    assert [next(found).nodes[0], next(found).nodes[0]] == [{"B": ["aa"]}, {"B": ["bb"]}]
    with pytest.raises(sgf.Malformed, match="byte 24"):
        next(found)


def test_points_are_rows_from_the_top_and_lists_may_be_rectangles():
    assert sgf.move(["pd"], 19, 19) == 3 * 19 + 15
    assert sgf.points(["aa", "ba:cb", "Ss".lower()], 19, 19) == [0, 1, 2, 20, 21, 360]
    assert sgf.move(["aA"], 30, 30) == 26 * 30
    assert sgf.move([""], 19, 19) == sgf.move(["tt"], 19, 19) == sgf.PASS
    assert sgf.move(["tt"], 21, 21) == 19 * 21 + 19


@pytest.mark.parametrize("value", ["a", "ta", "at", "aaa", "a1", "é", "aé", "aa:ta", "bb:aa"])
def test_what_is_no_point_of_the_board_is_told(value):
    with pytest.raises(ValueError, match=f"'({value}|{value.rpartition(':')[2]})' is"):
        sgf.points([value], 19, 19)


def test_boards_have_the_size_that_the_root_says():
    assert sgf.size({}) == (19, 19)
    assert sgf.size({"SZ": ["9"]}) == (9, 9)
    assert sgf.size({"SZ": ["13:19"]}) == (13, 19)
    for value in ("", "0", "53", "nine", "19:", "9:0"):
        with pytest.raises(ValueError, match=f"board of size '{value}'"):
            sgf.size({"SZ": [value]})
