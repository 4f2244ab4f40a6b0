"""Downpour SGD as a user runs it: whole runs of workers and servers, stopped, resumed and repeated."""

import json
import os
import shutil
import signal
from collections import Counter
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

from dpnn import cli
from dpnn.data import Sampler
from dpnn.data.manifest import Manifest
from tests.train.runs import told, words

SAMPLES = 231
NETWORKS = Path(__file__).parent / "networks.py"
DOWNPOUR = (
    f"model.name={NETWORKS}:plain", "optimizer.name=sgd",
    "train.global_batch=0", "train.replica_batch=7", "parallel.strategy=downpour", "parallel.stall_abort_s=20",
)  # fmt: skip
LONG = ("train.epochs=2000", "train.eval_every=0")
ALONE = (
    "model.name=lenet", "model.kernel=3", "model.batchnorm=true", "model.dropout=0.3",
    "data.lanes=1", "backend.threads=1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "servers"),
    [
        ("sgd", 1),
        ("momentum", 2),
        ("adagrad", 2),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in (("sgd", 2), ("momentum", 1), ("adagrad", 1))),
    ],
)
def test_one_worker_that_waits_for_its_parameters_is_synchronous_sgd(trained, identical, name, servers):
    """Bit for bit; with BatchNorm of its own, dropout, augmentation and weight decay."""
    chosen = (*ALONE, f"optimizer.name={name}", f"optimizer.lr={0.01 if name == 'adagrad' else 0.05}")
    asynchronous = (
        "train.global_batch=0", "train.replica_batch=16", "parallel.strategy=downpour",
        f"parallel.servers={servers}", "parallel.fetch_ahead=0",
    )  # fmt: skip
    n = identical(trained(1, *chosen), trained(1 + servers, *chosen, *asynchronous))
    print(f"{name}, {servers} servers: {n} numbers, none of whose bits differ (limit 0)")
    scores = [told(trained(1, *chosen), "eval"), told(trained(1 + servers, *chosen, *asynchronous), "eval")]
    assert scores[0][-1]["loss"] == pytest.approx(scores[1][-1]["loss"], rel=1e-5)


def test_a_replay_ends_with_the_same_bits(mpirun, job, identical, request):
    """Two workers, two servers; the first worker looks at the test data in between. In the replay the other is late."""
    settings = (
        *DOWNPOUR, "parallel.servers=2", "parallel.n_push=2", "parallel.n_fetch=2", "train.replica_batch=4",
        "parallel.staleness.policy=scale", "optimizer.name=momentum", "optimizer.lr=0.02", "train.epochs=3",
    )  # fmt: skip
    run = job()
    ended = mpirun(4, "train", run.path, *words(*settings, "parallel.record=true"))
    assert ended.returncode == 0, ended.stderr
    sizes = [path.stat().st_size for path in sorted((run.out / "order").iterdir())]
    assert len(sizes) == 2
    assert min(sizes) > 4 * 150  # 174 steps, 87 pushes, as many fetches
    again = run.out.with_name("again")
    program = request.path.parent / "programs" / "dawdling.py"
    line = ("train", "--replay", run.out, *words(f"output.dir={again}"))
    ended = mpirun(4, *line, script=program, env={"LATE": "1"})
    assert ended.returncode == 0, ended.stderr
    n = identical(run.out, again)
    print(f"replayed: {n} numbers, none of whose bits differ (limit 0)")
    ours, theirs = ([(line["step"], line["loss"]) for line in told(folder, "eval")] for folder in (run.out, again))
    assert ours == theirs
    steps = [[(line["step"], line["loss"], line["staleness"]) for line in told(f, "step")] for f in (run.out, again)]
    assert steps[0] == steps[1]


def test_a_worker_that_is_late_to_hear_of_the_end_ends_too(mpirun, job, request):
    """Nothing is evaluated, so that workers part after their last step."""
    run, program = job(), request.path.parent / "programs" / "dawdling.py"
    settings = words(*DOWNPOUR, "parallel.servers=1", "train.eval_every=0", "data.lanes=3", "train.epochs=1")
    ended = mpirun(4, "train", run.path, *settings, script=program, env={"LATE": "1", "DAWDLER": "2"})
    assert ended.returncode == 0, ended.stderr


def seen_ids(folder: Path) -> Counter:
    """(epoch, sample) of every batch that was trained on."""
    seen = Counter()
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            epoch, _, *ids = map(int, line.split())
            seen.update((epoch, sample) for sample in ids)
    return seen


def every_sample(epochs: int) -> Counter:
    return Counter((epoch, sample) for epoch in range(epochs) for sample in range(SAMPLES))


@pytest.mark.smoke
def test_in_an_epoch_every_sample_is_seen_once(mpirun, job, watched, tmp_path):
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    settings = words(*DOWNPOUR, "parallel.servers=1", "parallel.n_push=3", "train.epochs=2")
    ended = mpirun(4, "train", run.path, *settings, script=watched, env={"SEEN": seen})
    assert ended.returncode == 0, ended.stderr
    assert len(list(seen.iterdir())) == 3
    assert seen_ids(seen) == every_sample(2)
    (end,) = told(run.out, "end")
    steps = sum(-(-len(range(lane * SAMPLES // 12, (lane + 1) * SAMPLES // 12)) // 7) for lane in range(12)) * 2
    assert (end["exit"], end["steps"]) == (0, steps)


def test_stopped_and_resumed_on_other_workers_and_servers_every_sample_is_seen_once(
    mpirun, job, watched, tmp_path, capfd, messages
):
    """Three workers and a server, then one and two, then two and one; stopped by a signal to whoever comes first.

    In the middle of an epoch no other strategy can go on.
    """
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    command = ("train", run.path, *words(*DOWNPOUR, "train.replica_batch=2", "train.eval_every=0", "train.epochs=2"))
    workers = 0
    for ranks, servers, fault, code in (
        (4, 1, "* 9 SIGTERM", 75), (3, 2, "0 9 SIGUSR1", 75), (3, 1, "- 0 -", 0),
    ):  # fmt: skip
        line = (*command, *words(f"parallel.servers={servers}"))
        workers += ranks - servers  # all take part, also those that come late
        ended = mpirun(ranks, *line, script=watched, env={"SEEN": seen, "TOGETHER": str(workers), "FAULT": fault})
        assert ended.returncode == code, ended.stderr
        if code:
            (end,) = told(run.out, "end")[-1:]
            taken = end["steps"]
            assert (end["exit"], (run.out / "checkpoints" / f"step-{taken:09d}").is_dir()) == (75, True)
            assert messages(ended.stderr)[0].startswith(f"dpnn: stopped after step {taken} of ")
            assert 0 < seen_ids(seen).total() < 2 * SAMPLES
            together = words(
                "parallel.strategy=allreduce", "parallel.servers=0", "train.replica_batch=0", "train.global_batch=16"
            )
            assert cli.main(["train", "--resume", str(run.out), *together]) == 2
            (message,) = messages(capfd.readouterr().err)
            assert "stands in the middle of an epoch with " in message
        command = ("train", "--resume", run.out)
    assert len(list(seen.iterdir())) == 3 + 1 + 2
    assert seen_ids(seen) == every_sample(2)


def held(info: dict, data: Path) -> Counter:
    """(epoch, sample) that a checkpoint has, by what it says is still to be done."""
    manifest = Manifest.read(data / "train")
    ids = [h5py.File(path)["id"][:] for path in sorted((data / "train").glob("*.h5"))]
    sampler = Sampler(
        manifest.counts, manifest.block, info["lanes"], info["global_batch"], info["window"], info["seed"]
    )
    leases, found = info["leases"], Counter()
    left = {(epoch, lane, step) for epoch, lane, lo, hi in leases["left"] for step in range(lo, hi + 1)}
    for epoch in range(leases["next"][0] + 1):
        for lane in range(info["lanes"] if epoch < leases["next"][0] else leases["next"][1]):
            for step in range(sampler.lane_steps(lane)):
                if (epoch, lane, step) not in left:
                    places = zip(*sampler.epoch(epoch).samples(step, range(lane, lane + 1)), strict=True)
                    found.update((epoch, int(ids[shard][number])) for shard, number in places)
    return found


def test_after_a_kill_it_goes_on_from_a_checkpoint_that_was_made_meanwhile(
    mpirun, job, images, last, watched, tmp_path
):
    """All ranks that train are killed; what the checkpoint has, and what is trained on after it, is every sample."""
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    settings = words(
        *DOWNPOUR, "parallel.servers=2", "train.replica_batch=2", "train.eval_every=0", "train.epochs=3",
        "output.checkpoint_every=0.2", "parallel.n_push=2",
    )  # fmt: skip
    ended = mpirun(4, "train", run.path, *settings, script=watched, env={"FAULT": "* 120 SIGKILL"})
    assert ended.returncode not in (0, 75)
    found = last(run.out)
    assert found.steps == found.info["leases"]["steps"]
    kept = held(found.info, images)
    assert 0 < kept.total() < 3 * SAMPLES
    ended = mpirun(3, "train", "--resume", run.out, *words("parallel.servers=1"), script=watched, env={"SEEN": seen})
    assert ended.returncode == 0, ended.stderr
    assert kept + seen_ids(seen) == every_sample(3)


def test_a_checkpoint_goes_from_one_strategy_to_the_other_and_back(mpirun, python, job, last):
    run = job()
    settings = (*DOWNPOUR, "optimizer.name=momentum", "parallel.servers=2", "train.epochs=1")
    ended = mpirun(4, "train", run.path, *words(*settings))
    assert ended.returncode == 0, ended.stderr
    steps = last(run.out).steps
    said = told(run.out, "eval")[-1]
    ended = python("-m", "dpnn", "eval", run.out)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"loss {said['loss']:.4f} ({said['samples']} samples)" in ended.stdout

    together = words(
        "parallel.strategy=allreduce", "parallel.servers=0", "train.replica_batch=0", "train.global_batch=16",
        "train.epochs=2",
    )  # fmt: skip
    ended = mpirun(2, "train", "--resume", run.out, *together)
    assert ended.returncode == 0, ended.stderr
    found = last(run.out)
    assert (found.epoch, found.step, found.steps) == (2, 0, steps + 15)

    apart = words(*settings[2:], "parallel.servers=1", "train.epochs=3")
    ended = mpirun(3, "train", "--resume", run.out, *apart)
    assert ended.returncode == 0, ended.stderr
    found = last(run.out)
    assert (found.epoch, found.step) == (3, 0)
    lanes = found.info["lanes"]
    cuts = [lane * SAMPLES // lanes for lane in range(lanes + 1)]
    assert found.steps == steps + 15 + sum(-(-(hi - lo) // 7) for lo, hi in pairwise(cuts))
    assert told(run.out, "eval")[-1]["epoch"] == 3
    assert [line["exit"] for line in told(run.out, "end")] == [0, 0, 0]


@pytest.mark.mpi
def test_ctrl_c_stops_at_a_checkpoint(start_python, job):
    run = job()
    line = ("launch", "-n", 3, "train", run.path, *words(*DOWNPOUR, *LONG, "parallel.servers=1"))
    program = start_python("-m", "dpnn", *line)
    program.wait_for("parameters, on 2 replicas and 1 servers")
    program.signal(signal.SIGINT)
    ended = program.finish()
    assert ended.returncode == 75, ended.stderr
    (end,) = told(run.out, "end")
    assert end["exit"] == 75
    assert (run.out / "checkpoints" / f"step-{end['steps']:09d}" / "info.h5").exists()


def test_every_push_is_in_the_histogram_of_its_staleness(trained):
    settings = (*DOWNPOUR, "parallel.servers=2", "parallel.staleness.policy=discard", "parallel.staleness.bound=1")
    folder = trained(4, *settings)
    events = [line for line in told(folder, "event") if line["event"] == "staleness"]
    assert sorted(event["server"] for event in events) == [0, 1]
    steps = told(folder, "end")[0]["steps"]
    for event in events:
        assert sum(event["pushes"]) == steps
        assert event["discarded"] == sum(event["pushes"][2:])


@pytest.mark.parametrize(
    ("settings", "culprit", "way_out"),
    [
        (["parallel.servers=0"], "parallel.servers = 0", 'parallel.strategy = "downpour" needs 1 or more'),
        (["parallel.servers=1"], "parallel.servers = 1 of 1 ranks", "start more ranks, or set fewer servers"),
        (
            ["train.replica_batch=0", "train.global_batch=16", "parallel.servers=1"],
            "train.global_batch = 16",
            "needs train.replica_batch",
        ),
        (["parallel.servers=1", "parallel.fetch_ahead=2"], "parallel.fetch_ahead = 2", "use at most that"),
        (["parallel.servers=1", "parallel.staleness.bound=3"], "parallel.staleness.bound = 3", "only there"),
        (["parallel.servers=1", "parallel.staleness.policy=discard"], "parallel.staleness.bound = 0", "1 or more"),
        (
            ["parallel.servers=1", "parallel.staleness.policy=forget"],
            'parallel.staleness.policy = "forget"',
            '"accept", "scale" or "discard" is wanted',
        ),
        (["parallel.servers=1", "parallel.staleness.bond=3"], "there is no such key", "parallel.staleness.bound?"),
        (
            ["parallel.strategy=allreduce", "parallel.n_push=2"],
            "parallel.n_push = 2",
            'it needs parallel.strategy = "downpour"; leave it out',
        ),
        (["parallel.strategy=allreduce", "parallel.servers=1"], "parallel.servers = 1", "leave it out"),
        (["parallel.servers=1", "parallel.every=2"], "parallel.every = 2", 'it needs parallel.strategy = "average"'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_job_is_refused(job, capfd, messages, settings, culprit, way_out):
    run = job()
    assert cli.main(["train", str(run.path), *words(*DOWNPOUR, *settings)]) == 2
    (message,) = messages(capfd.readouterr().err)
    assert culprit in message
    assert way_out in message
    assert not run.out.exists()


@pytest.mark.parametrize(("setting", "told"), [
    (f"model.name={NETWORKS}:mixed", "sums over all replicas in the middle of a step; leave out sync = true"),
    ("parallel.spares=1", "parallel.spares = 1 of 1 replicas: at least one has to train"),
], ids=["BatchNorm over all replicas", "only spares"])  # fmt: skip
def test_a_wrong_job_is_refused_by_all_ranks(mpirun, job, messages, setting, told):
    run = job()
    ended = mpirun(2, "train", run.path, *words(*DOWNPOUR, "parallel.servers=1", setting))
    assert ended.returncode == 2, ended.stderr
    (message,) = messages(ended.stderr)
    assert told in message
    assert not run.out.exists()


RECORDED = (*DOWNPOUR, "parallel.servers=1", "train.epochs=1", "train.eval_every=0", "parallel.record=true")


def test_only_a_recorded_run_is_repeated_and_only_as_it_was(trained, tmp_path, capfd, messages):
    """Not one that wasn't recorded, nor on another number of ranks, nor one that was resumed."""
    plain, recorded = trained(2), trained(3, *RECORDED)
    resumed = shutil.copytree(recorded, tmp_path / "resumed")
    with (resumed / "metrics.jsonl").open("a") as file:
        print(json.dumps(told(resumed, "start")[0]), file=file)
    for folder, said in (
        (plain, f"{plain} was not recorded; record a run with --set parallel.record=true"),
        (recorded, f"{recorded} ran on 3 ranks, not 1; start as many"),
        (resumed, f"{resumed} was started 2 times: only a run from its start can be repeated"),
    ):
        assert cli.main(["train", "--replay", str(folder), *words(f"output.dir={tmp_path}/again")]) == 2
        (message,) = messages(capfd.readouterr().err)
        assert said in message
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_without_its_whole_order_a_run_is_not_repeated(mpirun, trained, tmp_path, messages, damage):
    folder = shutil.copytree(trained(3, *RECORDED), tmp_path / "copy")
    (order,) = (folder / "order").iterdir()
    if damage == "missing":
        order.unlink()
    else:
        os.truncate(order, order.stat().st_size // 8 * 4)
    ended = mpirun(3, "train", "--replay", folder, *words(f"output.dir={tmp_path}/again"))
    wanted = {
        "missing": (3, f"{order} can't be read (No such file or directory)"),
        "short": (4, f"the run goes on after all that {order} holds: it was cut short"),
    }[damage]
    assert ended.returncode == wanted[0], ended.stderr
    (message,) = messages(ended.stderr)
    assert wanted[1] in message


def test_a_run_that_goes_on_is_not_recorded(mpirun, trained, tmp_path, messages):
    folder = shutil.copytree(trained(3, *RECORDED), tmp_path / "copy")
    ended = mpirun(3, "train", "--resume", folder, *words("train.epochs=2"))
    assert ended.returncode == 2, ended.stderr
    (message,) = messages(ended.stderr)
    assert "only a whole run can be recorded; go on with --set parallel.record=false" in message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{job}", "--replay", "{run}"], "leave out the job file and --resume"),
        (["--resume", "{run}", "--replay", "{run}"], "leave out the job file and --resume"),
        (["--replay", "absent"], "absent is not a run folder"),
    ],
)
def test_a_wrong_replay_is_refused(job, capfd, messages, tmp_path, arguments, told):
    run = job()
    places = {"job": run.path, "run": run.out}
    assert cli.main(["train", *(word.format(**places) for word in arguments)]) == 2
    (message,) = messages(capfd.readouterr().err)
    assert told in message
    assert not run.out.exists()


@pytest.mark.parametrize("settings", [
    ("parallel.n_push=5", "parallel.n_fetch=7", "parallel.fetch_ahead=7", "backend.precision=float64"),
    ("parallel.lead=1", "parallel.n_push=3", "parallel.microbatches=3", "output.checkpoint_every=0.01"),
    ("parallel.warmup_steps=1000000", "data.test="),  # longer than the run: the first worker does it all
    ("train.epochs=0", "train.steps=1", "train.replica_batch=100"),
], ids=" ".join)  # fmt: skip
def test_odd_settings_work(mpirun, job, last, settings):
    run = job()
    ended = mpirun(3, "train", run.path, *words(*DOWNPOUR, "parallel.servers=1", "train.epochs=1", *settings))
    assert ended.returncode == 0, ended.stderr
    assert all(np.isfinite(array).all() for array in last(run.out).params.values())
