"""Synchronous training goes on where a rank dies: real processes, killed at random moments."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from dpnn.comm.launch import command
from tests.train.runs import TOLERANT, events, told, words

DYING = Path(__file__).parent / "programs" / "dying.py"
NETWORKS = Path(__file__).parent / "networks.py"
LIMIT_S = 100
SETTINGS = (
    f"model.name={NETWORKS}:plain", "train.global_batch=24", "train.eval_every=0", "parallel.stall_abort_s=20",
    "optimizer.name=momentum", "output.checkpoint_every=2", "backend.threads=1",
)  # fmt: skip


def soaked(*values: object, **how):
    """Parameters of a test that only `make soak` runs: as real as the others, and as long."""
    return pytest.param(*values, marks=pytest.mark.soak, **how)


pytestmark = [pytest.mark.mpi, TOLERANT]


@pytest.fixture
def going(start_python, job, until_trained):
    """going(ranks, *settings) -> a run under `dpnn launch --with-faults` that has taken its first steps; its folder."""

    def start(ranks: int, *settings: str, name: str = "job"):
        made = job(name, out=name)
        line = ("-m", "dpnn", "launch", "--with-faults", "-n", str(ranks), "train", made.path)
        program = start_python(*line, *words(*SETTINGS, *settings))
        until_trained(program, made.out)
        return program, made.out

    return start


@pytest.fixture
def dying(start_line, job):
    """dying(ranks, deaths, *settings) -> a run whose ranks kill themselves (programs/dying.py), and its folder."""

    def start(ranks: int, deaths: str, *settings: str, **env: str):
        made = job()
        line = command(ranks, ["train", str(made.path), *words(*SETTINGS, *settings)], (str(DYING),), survives=True)
        return start_line(line, env={"DIES": deaths, **env}), made.out

    return start


def ended_well(program, folder: Path) -> None:
    """The run has ended by itself, with all its steps."""
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 0, ended.stderr
    (start,), (end,) = told(folder, "start"), told(folder, "end")
    assert (end["exit"], end["steps"]) == (0, start["total_steps"])
    goes_on = max((event["step"] for event in events(folder, "worker_lost")), default=end["steps"])
    taken = {line["step"] for line in told(folder, "step")}  # what the first had still to write is lost with it
    assert taken >= set(range(goes_on + 1, end["steps"] + 1))


@pytest.mark.parametrize("seed", [0, *map(soaked, range(1, 20))])
def test_who_is_left_takes_every_step(going, seed):
    draw = random.Random(seed)
    program, folder = going(4, "train.epochs=40")
    pids = program.pids()
    time.sleep(draw.uniform(0.0, 0.5))
    victim = draw.randrange(4)
    os.kill(pids[victim], signal.SIGKILL)
    ended_well(program, folder)
    (event,) = events(folder, "worker_lost")
    assert (event["ranks"], event["left"]) == ([victim], 3)


@pytest.mark.parametrize(
    ("ranks", "settings", "kills", "left"),
    [
        soaked(4, ("optimizer.clip=0.5",), ((0,),), 3, id="the first"),
        soaked(4, (), ((1, 2),), 2, id="two at once"),
        pytest.param(4, (), ((3,), (0,), (1,)), 1, id="all but one"),
        soaked(4, ("parallel.parts=2",), ((3,),), 2, id="a part"),
        pytest.param(6, ("parallel.parts=2",), ((1, 2),), 4, id="two parts of different replicas"),
    ],
)
def test_replicas_form_of_who_is_left(going, python, ranks, settings, kills, left):
    draw = random.Random(ranks + len(settings))
    program, folder = going(ranks, "train.epochs=60", *settings)
    pids = program.pids()
    for victims in kills:
        time.sleep(draw.uniform(0.0, 0.3))
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
    ended_well(program, folder)
    assert events(folder, "worker_lost")[-1]["left"] == left
    assert {rank for event in events(folder, "worker_lost") for rank in event["ranks"]} >= set(sum(kills, ()))
    assert python("-m", "dpnn", "eval", folder).returncode == 0


@pytest.mark.parametrize("seed", [0, *map(soaked, range(1, 10))])
def test_the_result_is_that_of_an_undisturbed_run_to_the_last_bit(going, trained, identical, seed):
    settings = (*SETTINGS, "train.epochs=20", "train.reproducible=true", "train.grains=12")
    undisturbed = trained(2, *settings)
    draw = random.Random(100 + seed)
    program, folder = going(4, *settings)
    pids = program.pids()
    victims = draw.sample(range(4), 2)
    for victim in victims:
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(pids[victim], signal.SIGKILL)
    ended_well(program, folder)
    assert identical(undisturbed, folder) > 0


@pytest.mark.parametrize(
    ("ranks", "settings", "victims", "lost"),
    [
        soaked(4, ("parallel.every=5",), (1,), 1, id="with averages"),
        pytest.param(4, ("parallel.every=0",), (0, 3), 2, id="with one at the end"),
        soaked(4, ("parallel.every=3", "parallel.state=keep"), (3, 2, 0), 3, id="all but one"),
        soaked(6, ("parallel.every=5", "parallel.parts=2"), (2,), 1, id="a part"),
    ],
)
def test_averaging_goes_on_without_those_replicas(going, python, ranks, settings, victims, lost):
    draw = random.Random(ranks + len(settings))
    program, folder = going(ranks, "parallel.strategy=average", "train.epochs=40", *settings)
    pids = program.pids()
    for victim in victims:
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(pids[victim], signal.SIGKILL)
    ended_well(program, folder)
    assert sum(len(event["replicas"]) for event in events(folder, "samples_lost")) == lost
    assert python("-m", "dpnn", "eval", folder).returncode == 0


@pytest.mark.parametrize(
    "deaths",
    [
        soaked("1 20 kept"),
        "1 20 updated",
        soaked("0 20 updated"),
        "3 19 updated;2 20 kept",
        soaked("0 0 saving"),
        "0 0 writing",
        soaked("2 10 evaluating"),
        soaked("1 29 ending"),
        "0 29 ending",
        soaked("3 20 updated;1 20 regrouping"),
        soaked("3 20 updated;0 20 rebuilding"),
        "0 20 updated;1 29 saving;2 0 rebuilding",
    ],
)
def test_wherever_a_rank_dies_not_a_bit_is_lost(dying, trained, identical, deaths):
    settings = ("train.epochs=3", "train.reproducible=true", "train.grains=12", "train.eval_every=1")
    program, folder = dying(4, deaths, *settings)
    ended_well(program, folder)
    told_of_no_loss = deaths == "1 29 ending"  # the others have ended too
    lost = {rank for event in events(folder, "worker_lost") for rank in event["ranks"]}
    assert lost == ({int(death.split()[0]) for death in deaths.split(";")} if not told_of_no_loss else set())
    assert {line["epoch"] for line in told(folder, "eval")} == {1, 2, 3}
    assert identical(trained(2, *SETTINGS, *settings), folder) > 0


def test_samples_that_are_lost_are_those_that_the_dead_had_when_each_step_was_taken(dying):
    """Of 24 in a step each of four replicas has 6, and each of the three that are left 8."""
    settings = ("parallel.strategy=average", "parallel.every=9", "data.lanes=12")
    program, folder = dying(4, "0 4 updated;1 8 averaged", *settings)
    ended_well(program, folder)
    step, average = (event["step"] for event in events(folder, "worker_lost"))
    assert average == 9
    lost = [(event["replicas"], event["samples"], event["since"]) for event in events(folder, "samples_lost")]
    assert lost == [([0], 6 * step, 0), ([1], 6 * step + 8 * (average - step), 0)]


@pytest.mark.parametrize(
    ("ranks", "deaths", "settings"),
    [
        soaked(4, "1 6 averaged", ("parallel.every=4",)),
        soaked(4, "0 6 averaged;2 6 averaged", ("parallel.every=4", "parallel.state=reset")),
        (4, "1 6 averaged;2 6 rebuilding", ("parallel.every=4",)),
        (4, "1 6 averaged;0 6 told", ("parallel.every=4",)),
        soaked(3, "1 0 saving", ("parallel.every=0",)),
        (3, "2 10 evaluating;0 29 ending", ("parallel.every=4",)),
        soaked(6, "2 17 updated", ("parallel.every=4", "parallel.parts=2")),
        (6, "5 6 averaged", ("parallel.every=4", "parallel.parts=2", "optimizer.clip=0.5")),
    ],
)
def test_wherever_a_replica_dies_that_averages_the_others_go_on(dying, ranks, deaths, settings):
    settings = ("parallel.strategy=average", "train.epochs=3", "train.eval_every=1", *settings)
    program, folder = dying(ranks, deaths, *settings)
    ended_well(program, folder)
    lost = [rank for event in events(folder, "worker_lost") for rank in event["ranks"]]
    assert sorted(lost) == sorted(int(death.split()[0]) for death in deaths.split(";"))
    replicas = [replica for event in events(folder, "samples_lost") for replica in event["replicas"]]
    assert len(replicas) == len(set(replicas)) >= 1
    assert {line["epoch"] for line in told(folder, "eval")} == {1, 2, 3}


@pytest.mark.parametrize(
    ("nodes", "deaths"),
    [
        soaked("0 0 1 1", "1 20 updated"),
        ("0 0 1 1", "0 20 updated;1 20 rebuilding"),
        soaked("0 0 0 1", "3 20 updated"),
        soaked("0 1 2 3", "0 20 updated;2 20 updated"),
    ],
)
def test_on_several_nodes_not_a_bit_is_lost_either(dying, trained, identical, nodes, deaths):
    settings = ("train.epochs=3", "train.reproducible=true", "train.grains=12")
    program, folder = dying(4, deaths, *settings, NODES=nodes)
    ended_well(program, folder)
    lost = {rank for event in events(folder, "worker_lost") for rank in event["ranks"]}
    assert lost == {int(death.split()[0]) for death in deaths.split(";")}
    assert identical(trained(2, *SETTINGS, *settings), folder) > 0


def test_without_a_whole_replica_the_job_ends_with_the_way_out(going):
    program, folder = going(2, "train.epochs=4000", "parallel.parts=2")
    os.kill(program.pids()[1], signal.SIGKILL)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 4, ended.stderr
    assert "no rank is left of part 1 of 2; go on with --resume" in ended.stderr
    assert told(folder, "end")[-1]["exit"] == 4


def test_a_rank_that_is_stopped_ends_the_job(going):
    program, folder = going(3, "train.epochs=4000", "parallel.stall_abort_s=4")
    os.kill(program.pids()[1], signal.SIGSTOP)
    ended = program.finish(2 * LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 4, ended.stderr
    assert events(folder, "worker_lost") == []


def test_what_only_a_device_has_cannot_be_gone_on_with(start_line, job):
    script = str(DYING.with_name("stand_in.py"))
    ended = start_line(
        command(2, ["train", str(job().path)], (script,), survives=True), env={"STAND_IN": "host"}
    ).finish(LIMIT_S)
    assert ended.returncode == 2, ended.stderr
    assert "only on CPUs do the others go on where a rank dies; leave out --with-faults" in ended.stderr
