"""`dpnn plan`: what it shows, from what, and that it needs no MPI."""

import json
import re

import pytest

from dpnn import cli
from dpnn.plan import Costs
from dpnn.plan.costs import Time

JOB = """
[data]
train = "digits"
[model]
name = "lenet"
kernel = 3
padding = 1
[train]
steps = 10
global_batch = 32
[optimizer]
lr = 0.1
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the digits are packed once."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "job.toml").write_text(JOB)
    return folder


@pytest.fixture
def plan(folder, monkeypatch, capsys):
    """plan(*arguments) -> the exit code, and what was printed, of a job on the digits."""
    monkeypatch.chdir(folder)

    def run(*arguments, source="job.toml"):
        code = cli.main(["plan", str(source), *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out + told.err

    return run


def words(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def test_parts_layers_messages_and_the_step_are_shown(plan):
    code, text = plan("--ranks", 4, *words("parallel.parts=2", "parallel.placement=depth", "parallel.microbatches=2"))
    assert code == 0
    assert "2 replicas of 2 parts on 4 ranks" in text
    assert "placement: depth; 2 micro-batches of 8 samples, 1f1b" in text
    assert re.search(r"a step of 16 samples on a replica: .* s predicted, .*% of the ranks' time idle", text)
    assert f"figures assumed: {Costs()}" in text
    assert "memory of a rank: any, assumed; a run takes its share of the node's (this machine's ranks may have " in text
    assert re.search(r"^ +0  0, 2 +\d+ .* conv1 \.\.\. ", text, re.MULTILINE)
    assert re.search(r"0 -> 1 +[\d,]+ bytes  labels", text)
    assert re.search(r"1 -> 0 +[\d,]+ bytes  gradient by ", text)
    assert "Forward(" not in text


def test_instructions_of_every_part_are_printed(plan):
    _, text = plan("--ranks", 2, "--instructions", *words("parallel.parts=2", "parallel.placement=depth"))
    assert text.count("Finish()") == 2
    assert {"Load", "PostRecv", "Recv", "Forward", "Send", "Sent", "Loss", "Backward"} <= {
        line.partition("(")[0] for line in text.splitlines()
    }


def test_one_part_is_planned_too(plan):
    code, text = plan()
    assert code == 0
    assert "1 replicas of 1 parts on 1 ranks" in text


def test_auto_says_what_else_it_looked_at(plan):
    _, text = plan("--ranks", 2, *words("parallel.parts=2", "train.global_batch=2"))
    assert "also looked at" in text


def test_it_goes_by_what_a_run_measured_and_chose(plan, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.toml").write_text(JOB + "[parallel]\nparts = 2\n")
    (run / "choices.json").write_text(json.dumps({"costs": Costs(multiply_adds=123e9).dump()}))
    code, text = plan("--ranks", 2, *words("train.global_batch=2"), source=run)
    assert code == 0
    assert "figures measured by the run: 123 G multiply-adds/s" in text


def test_measured_costs_are_read_as_they_were_written_by_earlier_runs_too():
    """These measured backward as a whole."""
    costs = Costs(groups={"it": Time((1, 4), (1.0, 2.0), (1.5, 3.0), (0.5, 2.0))})
    assert Costs.load(costs.dump()) == costs
    earlier = json.loads(costs.dump())
    del earlier["groups"]["it"]["weights"]
    assert Costs.load(json.dumps(earlier)).groups["it"].of(4) == (2.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", 0], "--ranks 0: use 1 or more"),
        (["--ranks", 3, *words("parallel.parts=2")], "parallel.parts = 2: 3 ranks can't be divided into replicas"),
        (["--ranks", 2, *words("parallel.parts=2", "parallel.placement=branches")], "the network has none"),
        (
            ["--ranks", 2, *words("parallel.parts=2", "parallel.memory_gb=1e-6", "train.global_batch=2")],
            "the least is .* GB on a rank",
        ),
        (["--ranks", 1, *words("parallel.memory_gb=1e-6")], "with parallel.parts = 1 the least is .* GB on a rank"),
        (words("parallel.placement=deep"), 'parallel.placement = "deep": .* did you mean "depth"?'),
        (words("parallel.memory_gb=1", "parallel.placement=depth"), "it is a limit for what"),
        (words("parallel.pipeline=gpip"), 'did you mean "gpipe"?'),
    ],
)
def test_what_can_not_be_is_refused(plan, arguments, said):
    code, text = plan(*arguments)
    assert code == 2
    assert re.search(said, text), text


def test_a_folder_that_is_no_run_is_refused(plan, tmp_path):
    code, text = plan(source=tmp_path)
    assert (code, "is no run folder: it has no job.toml" in text) == (2, True)


def test_it_needs_no_mpi(python, folder):
    script = (
        "import sys, os; os.chdir(sys.argv[1]); from dpnn import cli; "
        "two = ['--set', 'parallel.parts=2', '--set', 'train.global_batch=2']; "
        "code = cli.main(['plan', 'job.toml', '--ranks', '2', *two]); "
        "assert 'mpi4py.MPI' not in sys.modules; sys.exit(code)"
    )
    ended = python("-c", script, folder)
    assert ended.returncode == 0, ended.stderr
