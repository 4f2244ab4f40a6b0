"""Seen from outside, in whole numbers: each gradient is applied once, on all servers, none is lost; nobody waits."""

import time
from collections import Counter
from itertools import count, pairwise

import numpy as np
import pytest

from dpnn.strategies.downpour import lines

N = 100


def unique(at: tuple[int, int, int]) -> np.ndarray:
    """The gradient of a step: whole numbers that belong to no other, of which any sum is exact."""
    return np.random.default_rng(at).integers(-(2**30), 2**30, N).astype(np.float64)


def updates(steps) -> np.ndarray:
    """What plain SGD at a rate of 1 has made of 0 after some steps, in any order."""
    return -sum((unique(at) for at in steps), np.zeros(N))


def arrived(ledger: dict, lanes) -> list[tuple[int, int, int]]:
    """The steps that a checkpoint has, by what it says is still to be done."""
    epoch, lane = ledger["next"]
    before = [(e, n) for e in range(epoch + 1) for n in range(len(lanes)) if (e, n) < (epoch, lane)]
    left = {(e, n, step) for e, n, first, last in ledger["left"] for step in range(first, last + 1)}
    return [(e, n, step) for e, n in before for step in range(lanes[n]) if (e, n, step) not in left]


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("n_push", [1, 3])
@pytest.mark.parametrize("fetch_ahead", [0, 1])
@pytest.mark.parametrize("buffers", [1, 4])
def test_nothing_is_lost_or_applied_twice(world, downpour, monkeypatch, servers, n_push, fetch_ahead, buffers):
    """Also in the checkpoints that are made meanwhile, of several servers: each has whole pushes, the same of all.

    Workers have buffers of their own on a server, or wait for one.
    """
    if world.size <= servers:
        pytest.skip("needs a worker")
    monkeypatch.setattr(lines, "_STAGED", buffers)
    lanes, rng = (4, 7, 1, 5, 6) * 2, np.random.default_rng([world.rank, n_push])

    def gradient(me):
        time.sleep(rng.exponential(0.001 * (1 + me.replica)))
        return unique(me.at)

    settings = (f"parallel.n_push={n_push}", f"parallel.fetch_ahead={fetch_ahead}")
    run = downpour(gradient, *settings, servers=servers, lanes=lanes, total=60, every=9)
    taken = [at for worker in run.workers for at in worker.taken]
    assert len(taken) == len(set(taken)) == 60
    np.testing.assert_array_equal(run.params, updates(taken))
    for worker in run.workers:  # at the end all look at the same network
        np.testing.assert_array_equal(worker.params, run.params)
    for one in run.servers:
        assert (one.steps, one.samples, one.loss, one.version) == (60, 60, 60.0, sum(one.pushes))
        assert sum(one.histogram) == one.version
    assert list(run.ledgers) == list(run.checkpoints)
    assert list(run.checkpoints)[-1] == 60
    assert len(run.checkpoints) >= 3
    for steps, params in run.checkpoints.items():
        had = arrived(run.ledgers[steps], lanes)
        assert len(had) == steps
        np.testing.assert_array_equal(params, updates(had))


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("fetch_ahead", [0, 1])
def test_what_is_fetched_is_one_version(world, downpour, servers, fetch_ahead):
    """Shards that take long to send, pushes of others while who has asked sleeps: all whole, and as the answer says."""
    if world.size - servers < 2:
        pytest.skip("needs two workers")
    n, rng = 600_000, np.random.default_rng(world.rank)
    bounds = [0, n // 2 // 16 * 16, n] if servers == 2 else [0, n]

    def gradient(me):
        for lo, hi in pairwise(bounds):
            assert me.params[lo:hi].min() == me.params[lo:hi].max()
        assert me.params[0] == me.worker.known.version
        me.log.append(me.params[0])
        time.sleep(rng.exponential(0.003))
        return -1.0

    run = downpour(gradient, f"parallel.fetch_ahead={fetch_ahead}", servers=servers, n=n, lanes=(4,) * 12)
    assert (run.params == 48).all()
    for worker in run.workers:
        assert worker.log == sorted(worker.log)


@pytest.mark.parallel([3, 4])
def test_a_slow_worker_holds_up_nobody(world, downpour):
    """The last worker's first step lasts until all others have taken twenty, the first of which all begin together."""

    def gradient(me):
        last = me.others.size - 1
        if me.number == 0:
            me.others.barrier()
            if me.replica == last:
                assert [me.others.recv(source=other) for other in range(last)] == [20] * last
        elif me.number == 20 and me.replica != last:  # what was fetched has all twenty
            me.others.send(me.number, dest=last)
        return 0.0

    run = downpour(gradient, "parallel.fetch_ahead=0", lanes=(21,) * world.size)
    assert run.servers[0].steps == 21 * world.size


@pytest.mark.parallel([3, 4])
@pytest.mark.parametrize("fetch_ahead", [0, 1])
def test_nobody_gets_further_ahead_than_lead(downpour, fetch_ahead):
    """The first worker sleeps in each step. A push leaves after the moment that is noted, so no tolerance is needed."""
    lead = 3

    def gradient(me):
        if me.number == 0:
            me.others.barrier()  # all have joined
        me.log.append(time.monotonic())  # one clock for all processes of a machine
        if me.replica == 0:
            time.sleep(0.01)
        return 0.0

    settings = (f"parallel.lead={lead}", f"parallel.fetch_ahead={fetch_ahead}")
    run = downpour(gradient, *settings, lanes=(2,) * 40)
    slow, *others = [worker.log for worker in run.workers]
    ahead = [
        steps - sum(began < now for began in slow)
        for log in others
        for steps, now in enumerate(log)
        if now < slow[-1]  # who has left holds up nobody
    ]
    assert max(ahead) <= lead + fetch_ahead
    assert max(ahead) >= lead - 1  # it was needed


@pytest.mark.parallel([3, 4])
def test_in_the_warm_up_only_the_first_worker_trains(downpour):
    def gradient(me):
        me.log.append((time.monotonic(), me.worker.known.steps))
        return 0.0

    run = downpour(gradient, "parallel.warmup_steps=10", "parallel.fetch_ahead=0", lanes=(4,) * 50)
    first, *others = [worker.log for worker in run.workers]
    for log in filter(None, others):  # one that came late may have found nothing left
        began, known = log[0]
        assert began > first[9][0]
        assert known >= 10


@pytest.mark.parallel(3)
@pytest.mark.parametrize("policy", ["accept", "discard"])
def test_staleness_is_the_number_of_updates_in_between(downpour, policy):
    """The second worker pushes what it has computed when the first has pushed three times."""

    def gradient(me):
        first, second = me.replica == 0, me.replica == 1
        if me.number == 0:
            if second:
                me.others.send("fetched", dest=0)
                assert me.others.recv(source=0) == "go"
            else:
                assert me.others.recv(source=1) == "fetched"
        elif me.number == 1 and second:
            me.log.append((me.worker.known.staleness, me.worker.known.discarded))
            me.others.send("pushed", dest=0)
        elif me.number == 3 and first:  # what was fetched has three pushes
            me.others.send("go", dest=1)
            assert me.others.recv(source=1) == "pushed"
            me.log.append(me.params.copy())
        return 1.0 if first else 100.0

    bound = ["parallel.staleness.bound=2"] if policy == "discard" else []
    run = downpour(gradient, "parallel.fetch_ahead=0", f"parallel.staleness.policy={policy}", *bound, lanes=(4,) * 3)
    discarded = int(policy == "discard")
    assert run.workers[1].log[0] == (3, discarded)
    assert (run.workers[0].log[0] == -3).all()
    (told,) = run.servers
    # After that script the workers run freely: on a busy machine others may be as late.
    assert told.histogram[3] >= 1
    assert told.discarded >= discarded
    assert (told.steps, told.version) == (12, 12 - told.discarded)  # their samples count as taken
    pushed = Counter(worker == 0 for worker, one in enumerate(run.workers) for _ in one.taken)
    dropped = [(firsts, told.discarded - firsts) for firsts in range(told.discarded - discarded + 1)]
    possible = [-(pushed[True] - firsts) - 100 * (pushed[False] - seconds) for firsts, seconds in dropped]
    assert any((run.params == value).all() for value in possible)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("whom", ["a worker", "a server"])
def test_a_request_to_stop_reaches_all(world, downpour, whom):
    """Each ends after the step that it is in; what they have done is all in the last checkpoint."""
    lanes, turns = (6,) * 500, count()

    def gradient(me):
        me.worker.asked = whom == "a worker" and me.replica == me.others.size - 1 and me.number >= 7
        time.sleep(0.001)
        return unique(me.at)

    run = downpour(gradient, lanes=lanes, asked=lambda: whom == "a server" and next(turns) > 100)
    assert all(worker.stop for worker in run.workers)
    taken = [at for worker in run.workers for at in worker.taken]
    assert len(taken) < 3000
    (last,) = run.checkpoints
    assert last == len(taken) == run.servers[0].steps
    assert sorted(arrived(run.ledgers[last], lanes)) == sorted(taken)
    np.testing.assert_array_equal(run.checkpoints[last], updates(taken))
