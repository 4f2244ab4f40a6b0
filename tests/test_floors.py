"""The rooms of the house import downward only, and files stay small: read from the sources, nothing is run."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "dpnn"

FLOORS = {
    room: floor
    for floor, rooms in enumerate(
        [
            ("errors", "config", "philox", "team", "native", "memory", "machine", "caches"),
            ("nn", "backends", "comm", "data"),
            ("models", "plan", "optim", "regroup", "timetable"),
            ("strategies", "checkpoint", "observe", "state", "saving", "locations"),
            (
                "train",
                "asynchronous",
                "serving",
                "course",
                "prepare",
                "balance",
                "evaluate",
                "planning",
                "needs",
                "recovery",
                "onnx",
                "cluster",
            ),
            ("preview",),
            ("cli",),
            ("__init__", "__main__"),
        ]
    )
    for room in rooms
}
BESIDE = {
    ("backends", "nn"),
    ("asynchronous", "cluster"),
    ("asynchronous", "evaluate"),
    ("asynchronous", "prepare"),
    ("asynchronous", "course"),
    ("asynchronous", "serving"),
    ("serving", "cluster"),
    ("serving", "course"),
    ("serving", "evaluate"),
    ("serving", "prepare"),
    ("course", "prepare"),
    ("balance", "evaluate"),
    ("prepare", "evaluate"),
    ("saving", "checkpoint"),
    ("saving", "state"),
    ("state", "checkpoint"),
    ("planning", "evaluate"),
    ("needs", "evaluate"),
    ("needs", "planning"),
    ("needs", "prepare"),
    ("recovery", "prepare"),
    ("recovery", "cluster"),
    ("train", "needs"),
    ("train", "recovery"),
    ("prepare", "planning"),
    ("train", "planning"),
    ("train", "asynchronous"),
    ("train", "prepare"),
    ("train", "evaluate"),
    ("train", "balance"),
    ("train", "cluster"),
}
"""Who may import a room on its own floor; `errors` is for everybody."""
ONLY = {
    "mpi4py": ("comm/", "strategies/"),
    "cupy": ("backends/cuda/",),
    "h5py": ("data/", "checkpoint/"),
}
"""Packages that only these places import."""


def imports(file: Path, house: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, wherever in it; `from a import b` is a.b."""
    here = ("dpnn", *file.relative_to(house).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def room_of(module: str, house: Path) -> str:
    """The room that a module of dpnn lies in; a bare name of the package itself is its __init__."""
    name = [*module.split("."), "__init__"][1]
    exists = (house / name).is_dir() or (house / f"{name}.py").is_file()
    return name if exists or name in FLOORS else "__init__"


def misplaced(house: Path) -> list[str]:
    """Every import that the floors forbid."""
    found = []
    for file in sorted(house.rglob("*.py")):
        place = file.relative_to(house).as_posix()
        room = place.split("/")[0].removesuffix(".py")
        if room not in FLOORS:
            found.append(f"{place}: the room {room} has no floor")
            continue
        for module in imports(file, house):
            package = module.split(".")[0]
            if package in ONLY and not place.startswith(ONLY[package]):
                found.append(f"{place} imports {module}: only {' and '.join(ONLY[package])} may")
            if package != "dpnn" or module == "dpnn.__version__":
                continue
            target = room_of(module, house)
            allowed = target in (room, "errors") or (room, target) in BESIDE
            if not allowed and FLOORS.get(target, 99) >= FLOORS[room]:
                found.append(f"{place} imports {module}: {target} isn't below {room}")
    return found


def overgrown(house: Path) -> list[str]:
    """Files that are too long, their median, and `assert` where a check would be gone under -O."""
    found = []
    lengths = []
    for file in sorted(house.rglob("*.py")):
        place = file.relative_to(house).as_posix()
        text = file.read_text()
        if text.strip():
            lengths.append(len(text.splitlines()))
        if len(text.splitlines()) > 400:
            found.append(f"{place} has {len(text.splitlines())} lines; the limit is 400")
        asserts = [node.lineno for node in ast.walk(ast.parse(text, str(file))) if isinstance(node, ast.Assert)]
        found += [f"{place}:{line}: assert is no validation; raise an error of dpnn.errors" for line in asserts]
    if lengths and statistics.median(lengths) > 120:
        found.append(f"the median file has {statistics.median(lengths):g} lines; the limit is 120")
    return found


def test_imports_go_downward():
    assert misplaced(HOUSE) == []


def test_files_are_short_and_assert_nothing():
    assert overgrown(HOUSE) == []


@pytest.fixture
def house(tmp_path):
    """An empty house with every room, and a function that writes a file of it."""
    for room in FLOORS:
        (tmp_path / f"{room}.py").touch()
    return tmp_path


def write(house: Path, place: str, text: str) -> None:
    file = house / place
    file.parent.mkdir(parents=True, exist_ok=True)
    (house / f"{place.split('/')[0]}.py").unlink(missing_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("place", "text", "culprit"),
    [
        ("nn/conv.py", "import dpnn.plan", "nn/conv.py imports dpnn.plan: plan isn't below nn"),
        ("nn/conv.py", "from dpnn.comm.world import start", "nn/conv.py imports dpnn.comm.world.start"),
        ("nn/conv.py", "from dpnn import data", "nn/conv.py imports dpnn.data: data isn't below nn"),
        ("nn/conv.py", "from .. import data", "nn/conv.py imports dpnn.data: data isn't below nn"),
        ("nn/deep/conv.py", "from ...data import x", "nn/deep/conv.py imports dpnn.data.x"),
        ("nn/conv.py", "def f() -> None:\n    from dpnn.train import run", "nn/conv.py imports dpnn.train.run"),
        ("nn/conv.py", "if TYPE_CHECKING:\n    import dpnn.cli", "nn/conv.py imports dpnn.cli"),
        ("nn/conv.py", "from dpnn.backends.base import put", "backends isn't below nn"),
        ("nn/conv.py", "from dpnn import Chain", "__init__ isn't below nn"),
        ("nn/conv.py", "import dpnn", "__init__ isn't below nn"),
        ("config.py", "import dpnn.philox", "philox isn't below config"),
        ("evaluate.py", "import dpnn.train", "train isn't below evaluate"),
        ("strategies/base.py", "import dpnn.observe", "observe isn't below strategies"),
        ("attic.py", "", "attic.py: the room attic has no floor"),
        ("plan/store.py", "import h5py", "plan/store.py imports h5py: only data/ and checkpoint/ may"),
        ("plan/store.py", "from mpi4py import MPI", "plan/store.py imports mpi4py.MPI: only comm/ and strategies/ may"),
        ("backends/base.py", "import cupy.cuda", "backends/base.py imports cupy.cuda: only backends/cuda/ may"),
    ],
)
def test_a_misplaced_import_is_found(house, place, text, culprit):
    write(house, place, text)
    found = misplaced(house)
    assert len(found) == 1
    assert culprit in found[0]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("config.py", "from dpnn.errors import JobError"),
        ("backends/reference/conv.py", "from dpnn.nn.graph import Node\nfrom .. import base"),
        ("train.py", "from dpnn import __version__, cluster, evaluate"),
        ("strategies/base.py", "from mpi4py import MPI\nimport dpnn.comm.mesh"),
        ("data/shards.py", "import h5py, os, dpnn.data.sampler"),
        ("backends/cuda/conv.py", "import cupy"),
        ("__main__.py", "from dpnn.cli import main"),
        ("__init__.py", "from dpnn.nn import Chain"),
    ],
)
def test_an_import_in_its_place_is_not_found(house, place, text):
    write(house, place, text)
    assert misplaced(house) == []


def test_a_long_file_a_high_median_and_an_assert_are_found(house):
    write(house, "config.py", "x = 1\n" * 400)
    assert overgrown(house) == ["the median file has 400 lines; the limit is 120"]
    write(house, "cli.py", "assert True\n" + "x = 1\n" * 400)
    assert [line.split(";")[0] for line in overgrown(house)] == [
        "cli.py has 401 lines",
        "cli.py:1: assert is no validation",
        "the median file has 400.5 lines",
    ]
