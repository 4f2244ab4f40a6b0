"""Games of Go become their positions, each with the move that was played; what isn't a game is left out and told."""

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpnn.data import Manifest
from dpnn.data.pack import pack
from dpnn.data.pack.games import read_games
from dpnn.data.pack.go import BLACK, WHITE, Board
from dpnn.data.pack.planes import planes
from dpnn.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "go"


@pytest.fixture
def games(tmp_path):
    """Read games that are written into a folder, each under its name."""

    def write(**texts):
        folder = tmp_path / "games"
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.sgf").write_text(text)
        return read_games(folder)

    return write


def game(moves, root=""):
    return f"(;GM[1]SZ[19]{root};" + ";".join(f"{'BW'[i % 2]}[{move}]" for i, move in enumerate(moves)) + ")"


def random_games(n, moves, seed=0):
    """Games whose moves are all on different rows of points, so that none is illegal."""
    rng = np.random.default_rng(seed)
    points = [f"{chr(97 + p % 19)}{chr(97 + p // 19)}" for p in range(0, 361, 2)]
    return {f"g{i:03}": game([points[p] for p in rng.permutation(len(points))[:moves]]) for i in range(n)}


def point(name):
    return (ord(name[1]) - 97) * 19 + ord(name[0]) - 97


def test_a_sample_is_the_position_before_a_move_and_its_class_is_the_point(games):
    moves = ["pd", "dp", "", "aa", "tt", "ss"]
    source = games(a=game(moves, "AB[ab]AB[ac:ad]AW[bb];AE[ac]"))
    (split,) = source.splits
    assert split.labels.tolist() == [point(move) for move in ("pd", "dp", "aa", "ss")]
    assert source.num_classes == 361
    assert source.class_names[point("pd")] == "Q16"
    assert source.class_names[0] == "A19"
    assert source.class_names[-1] == "T1"
    board = Board()
    board.arrange([(point("ab"), BLACK), (point("ad"), BLACK), (point("bb"), WHITE)])
    wanted = []
    for i, move in enumerate(moves):
        colour = 1 + i % 2
        if move in ("", "tt"):
            board.skip()
        else:
            wanted.append(planes(board, colour))
            board.play(colour, point(move))
    np.testing.assert_array_equal(split.samples.read(np.arange(4)), wanted)
    assert split.samples.dtype == np.uint8
    assert split.samples.shape == (19, 19, 20)
    assert [split.samples.name(i).rpartition(", ")[2] for i in range(4)] == ["move 1", "move 2", "move 4", "move 6"]


def test_positions_of_several_games_are_read_in_any_order(games):
    (split,) = games(**random_games(5, 30)).splits
    assert np.bincount(split.groups).tolist() == [30] * 5
    alone = np.concatenate([split.samples.read(np.array([i])) for i in range(150)])
    order = np.random.default_rng(1).integers(0, 150, 200)  # some twice
    np.testing.assert_array_equal(split.samples.read(order), alone[order])
    assert (alone[..., :2].sum(axis=(1, 2, 3)) == np.tile(np.arange(30), 5)).all()


def test_the_player_to_move_is_the_one_who_moved(games):
    (split,) = games(a="(;;B[aa];B[bb];W[cc])").splits
    x = split.samples.read(np.arange(3))
    assert x[..., 0].sum(axis=(1, 2)).tolist() == [0, 1, 0]
    assert x[..., 1].sum(axis=(1, 2)).tolist() == [0, 0, 2]


def test_games_that_are_something_else_are_left_out(games):
    source = games(
        good="(;;B[aa])",
        empty="",
        blank="(;GM[1]SZ[19])",
        small="(;SZ[9];B[aa])",
        odd="(;SZ[x];B[aa])",
        chess="(;GM[3];B[aa])",
        cut="(;GM[1];B[bb];W[c",
        same="(;C[the same game];B[aa])",
    )
    told = {Path(name).stem: reason for name, reason in source.left_out}
    assert told.pop("same").startswith("it has the moves of another game (")
    assert told == {
        "blank": "it has no moves",
        "chess": "it isn't a game of Go",
        "cut": "the file ends in the middle of a value (at byte 14)",
        "empty": "no game, which would begin with (; (at byte 0)",
        "odd": "a board without a size ('x')",
        "small": "its board is 9 x 9, not 19 x 19",
    }
    assert len(source.splits[0].labels) == 1


@pytest.mark.parametrize(
    ("moves", "root", "kept", "problem"),
    [
        (["aa", "bb", "aa", "cc"], "", 2, "there is a stone (left out from move 3 on)"),
        (["aa", "", "zz"], "", 1, "a point that isn't on the board ('zz') (left out from move 3 on)"),
        (["ba", "cc", "ab", "aa"], "", 3, "it is suicide (left out from move 4 on)"),
        (["ba", "ca", "ab", "bb", "ss", "aa", "ba"], "", 6, "it retakes a ko at once (left out from move 7 on)"),
        (["cc"], "AB[ba][ab]AW[aa]", 0, "it sets up a stone without a liberty (left out from move 1 on)"),
    ],
)
def test_a_game_is_left_out_from_its_first_illegal_move_on(games, moves, root, kept, problem):
    source = games(bad=game(moves, root), good="(;;B[ss])")
    assert [(Path(name).name, reason) for name, reason in source.left_out] == [("bad.sgf", problem)]
    assert len(source.splits[0].labels) == kept + 1


def test_suicide_of_several_stones_is_legal_where_the_rules_allow_it(games):
    text = "(;RU[{}]AW[ca][bb][ac]AB[ba][ab];B[aa];W[ba])"
    source = games(here=text.format("NZ"), there=text.format("Japanese"))
    assert [(Path(name).name, reason) for name, reason in source.left_out] == [
        ("there.sgf", "it is suicide (left out from move 1 on)")
    ]
    assert source.splits[0].labels.tolist() == [point("aa"), point("ba")]
    assert source.splits[0].samples.read(np.array([1]))[0, :2, :2, 2].tolist() == [[1, 1], [1, 0]]


def test_all_games_of_a_file_are_read_and_named_by_their_byte(games):
    source = games(many="(;;B[aa])\n(;;B[bb];W[bb])\n(;;B[cc])(;;B[dd]")
    (split,) = source.splits
    assert split.labels.tolist() == [point(name) for name in ("aa", "bb", "cc")]
    assert split.samples.name(0).endswith("many.sgf, move 1")
    assert split.samples.name(2).endswith("many.sgf, byte 26, move 1")
    assert [(Path(name).name, reason) for name, reason in source.left_out] == [
        ("many.sgf, byte 10", "there is a stone (left out from move 2 on)"),
        ("many.sgf", "the file ends in the middle of a game (at byte 43)"),
    ]


def test_a_folder_without_games_is_told(games, tmp_path):
    with pytest.raises(DataError, match=r"small\.sgf: its board is 9 x 9"):
        games(small="(;SZ[9];B[aa])")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"there is no \.sgf file"):
        read_games(tmp_path / "none")
    (tmp_path / "none" / "gone.SGF").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.SGF can't be read \(No such file"):
        read_games(tmp_path / "none")


def test_whole_games_are_held_out(games, tmp_path):
    (split,) = games(**random_games(10, 12), blank="(;)").splits
    summary = pack(str(tmp_path / "games"), tmp_path / "packed", test_fraction=0.2)
    held = {}
    for part, n in (("train", 96), ("test", 24)):
        manifest = Manifest.read(tmp_path / "packed" / part)
        assert (manifest.samples, manifest.shape, manifest.num_classes) == (n, (19, 19, 20), 361)
        for shard in manifest.shards:
            with h5py.File(tmp_path / "packed" / part / shard.name) as file:
                ids = file["id"][:].astype(int)
                np.testing.assert_array_equal(file["x"][:], split.samples.read(ids))
                np.testing.assert_array_equal(file["y"][:], split.labels[ids])
                held.setdefault(part, set()).update(split.groups[ids].tolist())
    assert len(held["train"]) == 8
    assert len(held["test"]) == 2
    assert not held["train"] & held["test"]
    assert f"of the source, 1 left out, named in {tmp_path / 'packed' / 'rejected.csv'}: 1 x it has no moves" in str(
        summary
    )
    with open(tmp_path / "packed" / "rejected.csv", newline="") as file:
        assert [*csv.reader(file)] == [["name", "reason"], [str(tmp_path / "games" / "blank.sgf"), "it has no moves"]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the game records aren't here")
def test_recorded_games_are_read():
    source = read_games(SHARED)
    (split,) = source.splits
    names = [
        Path(split.samples.name(i).rpartition(", ")[0]).name for i in np.unique(split.groups, return_index=True)[1]
    ]
    counts = dict(zip(names, np.bincount(split.groups).tolist(), strict=True))
    assert counts["Lee-Sedol-vs-AlphaGo-20160309.sgf"] == 186
    assert counts["AlphaGo-vs-Lee-Sedol-20160310.sgf"] == 211
    assert counts["20160312-Lee-Sedol-vs-AlphaGo.sgf"] == 176
    assert counts["20160313-AlphaGo-vs-Lee-Sedol.sgf"] == 180
    assert counts["Lee-Sedol-vs-AlphaGo-20160315.sgf"] == 280
    told = {Path(name).name: reason for name, reason in source.left_out}
    assert told["blank_game.sgf"] == "it has no moves"
    assert told["example_game.sgf"] == told["xmgt97.sgf"] == "its board is 9 x 9, not 19 x 19"
    assert told["LS vs AG - G4 - English.sgf"].startswith("it has the moves of another game (")
    assert len(told) == 4


@pytest.mark.skipif(not SHARED.is_dir(), reason="the game records aren't here")
def test_positions_are_those_that_another_program_made_of_the_same_games():
    """RocAlphaGo's file: planes as ours up to the ages of stones, by column before row; moves are (column, row)."""
    (split,) = read_games(SHARED / "RocAlphaGo").splits
    with h5py.File(SHARED / "RocAlphaGo" / "alphago-vs-lee-sedol-features.hdf5") as file:
        places = {name.rpartition("::")[2]: place[:] for name, place in file["file_offsets"].items()}
        for name, (start, n) in places.items():
            (numbers,) = np.nonzero([Path(split.samples.name(i).rpartition(", ")[0]).name == name for i in range(1033)])
            assert len(numbers) == n
            actions = file["actions"][start : start + n].astype(int)
            np.testing.assert_array_equal(split.labels[numbers], actions[:, 1] * 19 + actions[:, 0])
            states = file["states"][start : start + n].transpose(0, 3, 2, 1)
            np.testing.assert_array_equal(split.samples.read(numbers)[..., :12], states)
