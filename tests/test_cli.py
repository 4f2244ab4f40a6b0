"""The commands, as they are typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpnn
from dpnn import cli

ROOT = Path(__file__).parents[1]
JOB = """
[data]
train = "digits"
[model]
name = "lenet"
kernel = 3
padding = 1
[train]
steps = 1
global_batch = 8
[optimizer]
lr = 0.1
"""
HEAVY = ("mpi4py", "numpy", "h5py", "msgspec", "rich", "threadpoolctl", "dpnn.nn", "dpnn.data", "dpnn.train")
PROGRAM = """
import json, sys
from dpnn.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(json.dumps([ended.code, [name for name in sys.modules]]))
"""


def modules_after(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, the modules that a command has imported, and what it printed."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    *printed, last = ended.stdout.splitlines()
    code, modules = json.loads(last)
    return code, set(modules), "\n".join(printed)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("pack", "data", "train", "eval", "launch")),
        ["data", "check", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_that_a_login_node_forbids(arguments):
    code, modules, printed = modules_after(*arguments)
    assert code == 0
    assert modules.intersection(HEAVY) == set()
    assert printed


def test_the_launcher_imports_neither_mpi_nor_numpy():
    program = "import sys, dpnn.comm.launch; sys.exit(any(name in sys.modules for name in ('mpi4py', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dpnn {dpnn.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["launch", "-n", "two", "train"], "invalid int value: 'two'"),
        (["eval"], "the following arguments are required: RUN"),
    ],
)
def test_a_mistyped_command_is_told_with_its_usage(capsys, arguments, told):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("usage: dpnn")
    assert told in stderr


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ([], "the following arguments are required"),
        (["trian", "job.toml"], "invalid choice: 'trian'"),
        (["train", "job.toml", "--resumee"], "unrecognized arguments: --resumee"),
        (["plan", "job.toml"], "dpnn: plan runs in one process: leave out launch"),
    ],
)
def test_launch_refuses_a_wrong_command_once_and_starts_nothing(command, told):
    line = [sys.executable, "-m", "dpnn", "launch", "-n", "3", *command]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count(told) == 1
    assert ended.stdout == ""


@pytest.mark.parametrize("arguments", [["plan", "jobs/digits.toml", "--instructions"], ["doctor"], ["--help"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments, tmp_path):
    """As in `dpnn plan ... | head`."""
    job = tmp_path / "jobs" / "digits.toml"
    job.parent.mkdir()
    job.write_text(JOB)
    read, write = os.pipe()
    os.close(read)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, "-m", "dpnn", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
        check=False, cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")
