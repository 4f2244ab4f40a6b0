"""Downpour SGD goes on where a server dies: real processes, killed at random moments."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from dpnn.comm.launch import command
from tests.train.runs import TOLERANT, events, told, words

SAMPLES, EPOCHS = 231, 12
NETWORKS, DYING = Path(__file__).parent / "networks.py", Path(__file__).parent / "programs" / "dying.py"
DOWNPOUR = (
    f"model.name={NETWORKS}:plain", "optimizer.name=momentum", "optimizer.lr=0.01", "train.global_batch=0",
    "train.replica_batch=7", "parallel.strategy=downpour", "parallel.stall_abort_s=20", "train.eval_every=0",
    "output.checkpoint_every=2", f"train.epochs={EPOCHS}",
)  # fmt: skip
LIMIT_S = 120
BUFFERS = 5
"""Pushes that a server may have applied, and its mirror not yet."""


def seeds(n: int) -> list:
    """One that is always tried, and more."""
    return [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, n))]


pytestmark = [
    pytest.mark.mpi,
    TOLERANT,
]


def until(program, found) -> None:
    end = time.monotonic() + LIMIT_S
    while not found():
        assert time.monotonic() < end, program.stderr
        assert program.process.poll() is None, program.stderr
        time.sleep(0.01)


def until_taken(program, folder: Path, share: float) -> None:
    """Until that share of the run's steps has been taken."""
    (start,) = told(folder, "start")
    until(program, lambda: told(folder, "step")[-1]["step"] >= share * start["total_steps"])


def kill(program, *ranks: int) -> None:
    pids = program.pids()
    for rank in ranks:
        os.kill(pids[rank], signal.SIGKILL)


@pytest.fixture
def going(start_line, job, watched, tmp_path, until_trained):
    """going(ranks, *settings) -> a run that survives deaths and has taken its first steps; its folder."""

    def start(ranks: int, *settings: str, out: str = "run"):
        made = job(out=out, name=out)
        (tmp_path / f"{out}-seen").mkdir()
        line = ["train", str(made.path), *words(*DOWNPOUR, *settings)]
        program = start_line(
            command(ranks, line, (str(watched),), survives=True),
            env={"SEEN": str(tmp_path / f"{out}-seen"), "PACE": "0.015"},
        )
        until_trained(program, made.out)
        return program, made.out

    return start


def check(program, folder: Path, servers: set[int] | None, worker: int | None = None) -> None:
    """The run has ended by itself, with all steps; every sample was trained on once in an epoch, save those of a worker
    that was lost, which another may have had to take again.
    """
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    (start,) = told(folder, "start")
    assert told(folder, "end"), ended.stderr
    (end,) = told(folder, "end")
    assert (end["exit"], end.get("steps")) == (0, start["total_steps"]), ended.stderr
    if servers is not None:
        assert {event["server"] for event in events(folder, "server_lost")} == servers, ended.stderr
    assert {event["replica"] for event in events(folder, "worker_lost")} == {worker} - {None}
    assert (folder / "checkpoints" / f"step-{end['steps']:09d}" / "info.h5").exists()
    seen = Counter()
    for path in folder.with_name(f"{folder.name}-seen").iterdir():
        for line in path.read_text().splitlines():
            epoch, _, *ids = map(int, line.split())
            seen.update((epoch, sample) for sample in ids)
    every = Counter((epoch, sample) for epoch in range(EPOCHS) for sample in range(SAMPLES))
    assert seen == every if worker is None else seen >= every


@pytest.mark.parametrize("seed", seeds(5))
@pytest.mark.parametrize("victim", [2, 3], ids=["first", "second"])
def test_one_of_two_servers_dies(going, victim, seed):
    program, folder = going(4, "parallel.servers=2", f"parallel.fetch_ahead={seed % 2}")
    until_taken(program, folder, random.Random(seed * 10 + victim).uniform(0.0, 0.5))
    kill(program, victim)
    check(program, folder, {victim - 2})
    lost = events(folder, "update_lost")
    assert {event["server"] for event in lost} <= {victim - 2}
    assert len(lost) <= 2 * 2 + BUFFERS


@pytest.mark.parametrize("seed", seeds(5))
def test_servers_die_one_after_the_other_down_to_one(going, seed):
    draw = random.Random(seed)
    program, folder = going(5, "parallel.servers=3", "parallel.n_push=2", "optimizer.name=adagrad")
    victims = draw.sample(range(3), 2)
    for victim in victims:
        kill(program, 2 + victim)
        until(program, lambda victim=victim: any(event["server"] == victim for event in events(folder, "server_lost")))
        time.sleep(draw.uniform(0.2, 0.4))  # until there is a new mirror
    check(program, folder, set(victims))


@pytest.mark.parametrize("seed", seeds(3))
def test_with_parts_of_a_replica_on_several_ranks(going, seed):
    program, folder = going(8, "parallel.servers=4", "parallel.parts=2")
    victims = random.Random(seed).choice([(4,), (6,), (4, 6), (5, 7)])
    kill(program, *victims)
    check(program, folder, {victim - 4 for victim in victims})


@pytest.mark.parametrize("seed", seeds(5))
def test_a_server_and_a_worker_die_at_once(going, seed):
    draw = random.Random(seed)
    server, worker = draw.randrange(2), draw.randrange(3)
    program, folder = going(5, "parallel.servers=2")
    until_taken(program, folder, draw.uniform(0.0, 0.5))
    kill(program, *draw.sample([worker, 3 + server], 2))
    check(program, folder, {server}, worker)


@pytest.mark.parametrize("victims", [(3, 4), pytest.param((4, 3), marks=pytest.mark.soak)])
def test_where_a_server_and_its_mirror_die_at_once_the_run_goes_on_from_a_checkpoint(
    start_python, python, job, victims
):
    made = job()
    line = ("-m", "dpnn", "launch", "-n", "5", "train", made.path)
    program = start_python(*line, *words(*DOWNPOUR, "parallel.servers=2", "train.epochs=400"))
    until(program, lambda: list((made.out / "checkpoints").glob("step-*")))
    kill(program, *victims)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode == 4, ended.stderr
    assert "has died, and its parameters with it" in ended.stderr
    (newest, *_) = sorted((made.out / "checkpoints").glob("step-*"), reverse=True)
    resumed = python("-m", "dpnn", "launch", "-n", "3", "train", "--resume", made.out, *words("train.epochs=4"))
    assert resumed.returncode == 0, resumed.stderr
    assert int(newest.name.removeprefix("step-")) <= told(made.out, "end")[-1]["steps"]


@pytest.mark.parametrize("seed", seeds(3))
def test_servers_die_while_a_checkpoint_is_written(going, seed):
    program, folder = going(5, "parallel.servers=3", "output.checkpoint_every=0.3")
    draw = random.Random(seed)
    victim = draw.randrange(3)
    for _ in range(draw.randrange(1, 4)):
        until(program, lambda: list((folder / "checkpoints").glob(".step-*")))
    kill(program, 2 + victim)
    check(program, folder, {victim})


@pytest.mark.parametrize("victim", [2, 3], ids=["first", "second"])
@pytest.mark.parametrize("at", ["last checkpoint", "end"])
def test_a_server_dies_at_the_end_of_the_run(going, victim, at):
    program, folder = going(4, "parallel.servers=2")
    last = folder / "checkpoints" / f"step-{told(folder, 'start')[0]['total_steps']:09d}"
    if at == "end":
        until(program, lambda: told(folder, "end"))
    else:
        until(program, lambda: last.exists() or list(last.parent.glob(f".{last.name}*")))
    kill(program, victim)
    check(program, folder, None)


@pytest.mark.parametrize(
    ("name", "victim"), [("momentum", 1), ("adagrad", 2), pytest.param("momentum", 2, marks=pytest.mark.soak)]
)
def test_what_the_optimizer_keeps_survives(going, identical, name, victim):
    """One worker that waits for what becomes of its pushes: bit for bit as in a run that nothing has disturbed."""
    settings = ("parallel.servers=2", "parallel.fetch_ahead=0", f"optimizer.name={name}")
    check(*going(3, *settings, out="calm"), set())
    program, folder = going(3, *settings)
    until_taken(program, folder, 0.4)
    kill(program, victim)
    check(program, folder, {victim - 1})
    if not events(folder, "update_lost"):
        identical(folder.with_name("calm"), folder)


def test_the_last_checkpoint_is_there_though_the_first_server_dies_when_all_shards_are_written(start_line, job):
    made, settings = job(), words(*DOWNPOUR, "parallel.servers=2", "train.epochs=1", "output.checkpoint_every=1000")
    line = command(4, ["train", str(made.path), *settings], (str(DYING),), survives=True)
    ended = start_line(line, env={"DIES": "2 0 completing"}).finish(LIMIT_S)
    assert [event["rank"] for event in events(made.out, "server_lost")] == [2], ended.stderr
    (end,) = told(made.out, "end")
    assert (made.out / "checkpoints" / f"step-{end['steps']:09d}" / "info.h5").exists()
