"""ParallelSGD as a user runs it."""

from collections import Counter

import numpy as np
import pytest

from dpnn.observe import metrics

SAMPLES = 231
CHOSEN = ("train.epochs=0", "train.steps=20", "optimizer.name=sgd", "backend.precision=float64")


def test_plain_sgd_averaged_after_every_step_is_synchronous_sgd(trained, last, request):
    """The mean of p - lr g, weighted by samples, is p - lr times the mean gradient: also in an epoch's short batch."""
    chosen = (*CHOSEN, f"model.name={request.path.parent}/networks.py:plain")
    one = last(trained(1, *chosen))
    for ranks in (2, 3):
        many = last(trained(ranks, *chosen, "parallel.strategy=average", "parallel.every=1"))
        worst = max(np.abs(one.params[name] - many.params[name]).max() for name in one.params)
        assert worst < 1e-9


@pytest.mark.smoke
def test_stopped_and_resumed_every_sample_is_seen_once(mpirun, job, last, request, watched, tmp_path):
    """Between two averages, by a signal to one of two replicas; it goes on with three."""
    run, seen = job(), tmp_path / "seen"
    seen.mkdir()
    settings = (
        f"model.name={request.path.parent}/networks.py:plain",
        "parallel.strategy=average",
        "parallel.every=4",
        "train.epochs=4",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    ended = mpirun(2, "train", run.path, *words, script=watched, env={"SEEN": seen, "FAULT": "1 5 SIGTERM"})
    assert ended.returncode == 75, ended.stderr
    stopped = last(run.out)
    assert divmod(stopped.steps, 15) == (stopped.epoch, stopped.step)
    assert 6 <= stopped.steps < 60
    ended = mpirun(3, "train", "--resume", run.out, script=watched, env={"SEEN": seen})
    assert ended.returncode == 0, ended.stderr
    found = last(run.out)
    assert (found.epoch, found.step, found.steps) == (4, 0, 60)
    times = Counter()
    for path in seen.iterdir():
        for line in path.read_text().splitlines():
            epoch, _, *ids = map(int, line.split())
            times.update((epoch, sample) for sample in ids)
    assert times == Counter((epoch, sample) for epoch in range(4) for sample in range(SAMPLES))
    ends = [(line["exit"], line["steps"]) for line in metrics.read(run.out / "metrics.jsonl") if line["kind"] == "end"]
    assert ends == [(75, stopped.steps), (0, 60)]
