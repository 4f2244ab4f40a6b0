"""Downpour SGD with replicas that are spread over parts, as a user runs it."""

import os
import signal

import numpy as np
import pytest

from dpnn import cli
from tests.train.runs import told, words

from .test_downpour import LONG, NETWORKS, SAMPLES, every_sample, seen_ids

LIMIT_S = 10
DOWNPOUR = (
    "train.global_batch=0", "parallel.strategy=downpour", "parallel.parts=2", "parallel.servers=2",
    "parallel.stall_abort_s=20",
)  # fmt: skip
PLAIN = (
    f"model.name={NETWORKS}:plain", 'parallel.placement={"dense*" = 1, "*" = 0}', "optimizer.name=sgd",
    "optimizer.lr=0.01", "train.replica_batch=7", *DOWNPOUR,
)  # fmt: skip
"""Placed by hand: nothing need be measured first."""
LENET = ("model.name=lenet", "model.kernel=3", "model.batchnorm=true", "model.dropout=0.3")


@pytest.mark.parametrize(
    ("network", "placement", "parts", "servers"),
    [
        (LENET, "depth", 2, 2),
        (LENET, '{"conv*" = 1, "dense*" = 0}', 2, 3),
        ((f"model.name={NETWORKS}:heads", "parallel.microbatches=2"), "filters", 2, 2),
    ],
)
def test_one_replica_that_waits_for_its_parameters_is_synchronous_sgd(
    trained, last, network, placement, parts, servers
):
    """With BatchNorm of its own, dropout, clipping, momentum, weight decay; scores, too, are those of one rank."""
    chosen = (
        "parallel.microbatches=1", *network,
        "optimizer.name=momentum", "optimizer.lr=0.05", "optimizer.clip=1.5", "data.lanes=1",
        "backend.name=reference", "backend.precision=float64", "backend.threads=1",
    )  # fmt: skip
    spread = (
        *DOWNPOUR, f"parallel.parts={parts}", f"parallel.servers={servers}", f"parallel.placement={placement}",
        "train.replica_batch=16", "parallel.fetch_ahead=0",
    )  # fmt: skip
    runs = trained(1, *chosen), trained(parts + servers, *chosen, *spread)
    one, many = (dict(last(run).arrays()) for run in runs)
    assert one.keys() == many.keys()
    worst = max(np.abs(one[name] - many[name]).max() for name in one)
    print(f"{placement}: {worst:.1e} at most between {len(one)} arrays and those of one rank (limit 1e-9)")
    assert worst < 1e-9
    losses = [[line["loss"] for line in told(run, "step")] for run in runs]
    assert len(losses[0]) == 30
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)
    scores = [[(line["epoch"], line["top1_error"], line["loss"]) for line in told(run, "eval")] for run in runs]
    np.testing.assert_allclose(scores[1][-1], scores[0][-1], rtol=1e-9)


def test_every_sample_is_seen_once_and_the_network_looked_at_between_steps(mpirun, job, watched, tmp_path):
    """Two replicas of two parts, pushes and fetches of several steps."""
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    settings = ("parallel.n_push=3", "parallel.n_fetch=2", "train.replica_batch=4", "train.epochs=5")
    ended = mpirun(6, "train", run.path, *words(*PLAIN, *settings), script=watched, env={"SEEN": seen})
    assert ended.returncode == 0, ended.stderr
    assert len(list(seen.iterdir())) == 2  # of each replica one part reads
    assert seen_ids(seen) == every_sample(5)
    assert [(line["exit"], line["images_s"] > 0) for line in told(run.out, "end")] == [(0, True)]
    assert told(run.out, "end")[0]["steps"] == told(run.out, "step")[-1]["step"]
    assert len(told(run.out, "eval")) >= 2
    # A line tells of all that has come since the one before; the first replica may be late with its first.
    steps, losses = np.transpose([(line["step"], line["loss"]) for line in told(run.out, "step")])
    slope, first = np.polyfit(steps, losses, 1)
    assert first + slope * steps[-1] < 0.95 * first  # by about a quarter: it learns
    (start,) = told(run.out, "start")
    assert (start["ranks"], start["replicas"], start["parts"], start["servers"]) == (6, 2, 2, 2)


def test_stopped_and_resumed_with_other_parts_every_sample_is_seen_once(mpirun, job, watched, tmp_path):
    """2 x 2 parts and 2 servers, then 2 whole replicas and 1, then 1 x 2 parts and 3; stopped by a signal."""
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    command = ("train", run.path, *words(*PLAIN, "train.replica_batch=2", "train.eval_every=0", "train.epochs=2"))
    for ranks, parts, servers, fault, code in (
        (6, 2, 2, "* 9 SIGTERM", 75), (3, 1, 1, "0 9 SIGUSR1", 75), (5, 2, 3, "- 0 -", 0),
    ):  # fmt: skip
        line = (*command, *words(f"parallel.parts={parts}", f"parallel.servers={servers}"))
        ended = mpirun(ranks, *line, script=watched, env={"SEEN": seen, "FAULT": fault})
        assert ended.returncode == code, ended.stderr
        end = told(run.out, "end")[-1]
        assert (end["exit"], (run.out / "checkpoints" / f"step-{end['steps']:09d}").is_dir()) == (code, True)
        if code:
            assert 0 < seen_ids(seen).total() < 2 * SAMPLES
        command = ("train", "--resume", run.out)
    assert seen_ids(seen) == every_sample(2)


@pytest.mark.parametrize("settings", [
    ("parallel.warmup_steps=1000000",),  # longer than the run: both parts of the other replica wait
    ("parallel.lead=1", "parallel.n_push=3", "parallel.microbatches=3", "output.checkpoint_every=0.01"),
    ("parallel.n_push=5", "parallel.n_fetch=7", "parallel.fetch_ahead=7", "optimizer.clip=0.1", "data.test="),
], ids=" ".join)  # fmt: skip
def test_odd_settings_work(mpirun, job, last, settings):
    run = job()
    ended = mpirun(6, "train", run.path, *words(*PLAIN, "train.epochs=1", *settings))
    assert ended.returncode == 0, ended.stderr
    assert all(np.isfinite(array).all() for array in last(run.out).params.values())


@pytest.mark.soak
def test_a_replay_ends_with_the_same_bits(mpirun, job, identical, request):
    """Two replicas of two parts; in the replay a part is late."""
    settings = (
        *PLAIN, "parallel.n_push=2", "parallel.n_fetch=2", "train.replica_batch=4", "train.epochs=3",
        "parallel.staleness.policy=scale", "optimizer.name=momentum", "optimizer.lr=0.02",
    )  # fmt: skip
    run = job()
    ended = mpirun(6, "train", run.path, *words(*settings, "parallel.record=true"))
    assert ended.returncode == 0, ended.stderr
    assert len(list((run.out / "order").iterdir())) == 2
    again = run.out.with_name("again")
    line = ("train", "--replay", run.out, *words(f"output.dir={again}"))
    ended = mpirun(6, *line, script=request.path.parent / "programs" / "dawdling.py", env={"LATE": "1"})
    assert ended.returncode == 0, ended.stderr
    n = identical(run.out, again)
    print(f"replayed: {n} numbers, none of whose bits differ (limit 0)")
    for kind in ("step", "eval"):
        ours, theirs = ([(line["step"], line["loss"]) for line in told(folder, kind)] for folder in (run.out, again))
        assert ours == theirs


@pytest.fixture
def going(start_mpirun, job, until_trained):
    """A long run of two replicas of two parts, and two servers, and its folder: it has taken steps."""
    made = job()
    program = start_mpirun(6, "train", made.path, *words(*PLAIN, *LONG, "output.checkpoint_every=1000"))
    until_trained(program, made.out)
    return program, made.out


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [3, 5], ids=["a part that doesn't read", "the server of such parts"])
def test_a_request_to_stop_to_one_rank_stops_all_at_a_checkpoint(going, rank, messages):
    program, folder = going
    os.kill(program.pids()[rank], signal.SIGTERM)
    ended = program.finish(2 * LIMIT_S)
    assert ended.returncode == 75, ended.stderr
    (end,) = told(folder, "end")
    assert end["exit"] == 75
    assert (folder / "checkpoints" / f"step-{end['steps']:09d}" / "info.h5").exists()
    (message,) = messages(ended.stderr)
    assert message.startswith(f"dpnn: stopped after step {end['steps']} of ")


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [2, 3, 4, 5], ids=["reader", "part", "first server", "server"])
def test_it_ends_when_a_rank_is_killed(going, rank):
    program, folder = going
    os.kill(program.pids()[rank], signal.SIGKILL)
    ended = program.finish(LIMIT_S)
    program.until_gone(LIMIT_S)
    assert ended.returncode not in (0, 75)
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_loss_that_is_not_finite_is_told_once_by_its_layer(mpirun, job, messages, watched):
    """The part that has the loss isn't the one where it began."""
    run = job()
    line = ("train", run.path, *words(*PLAIN, *LONG))
    ended = mpirun(6, *line, script=watched, env={"FAULT": "2 4 infinite"})
    assert ended.returncode == 5, ended.stderr
    (message,) = messages(ended.stderr)
    assert message.startswith(("dpnn: rank 2: ", "dpnn: rank 3: "))
    assert "conv1: its output is not finite (step " in message
    assert "RuntimeWarning" not in ended.stderr


def test_fewer_servers_than_parts_are_refused(job, capfd, messages):
    run = job()
    assert cli.main(["train", str(run.path), *words(*PLAIN, "parallel.servers=1")]) == 2
    (message,) = messages(capfd.readouterr().err)
    assert "parallel.servers = 1: each of parallel.parts = 2 has servers of its own" in message
    assert "use parallel.servers = 2 or more" in message
    assert not run.out.exists()
