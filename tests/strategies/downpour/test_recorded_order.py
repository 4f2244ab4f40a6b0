"""With the order that a server wrote down, an asynchronous run is a serial program: here it is, in NumPy."""

import time
from collections import deque

import numpy as np
import pytest

from dpnn.strategies.downpour.protocol import Kind, shards

N, RATE, MOMENTUM, START, TOTAL = 70, 0.03125, 0.9, 2.0, 60
POLICIES = {
    "accept": ("accept", 0),
    "scale": ("scale", 0),
    "discard": ("discard", 1),
}


def curve(replica: int) -> np.ndarray:
    """The minimum that a worker's data pull towards."""
    return np.random.default_rng(replica).normal(size=N)


class SerialWorker:
    """Algorithm 7.1 of Dean et al. 2012 on one shard; `fetched`: (parameters, version) as it was sent them."""

    def __init__(self, minimum: np.ndarray, steps: int, n_push: int, n_fetch: int, ahead: int) -> None:
        self.minimum, self.steps, self.n_push, self.n_fetch, self.ahead = minimum, steps, n_push, n_fetch, ahead
        self.fetched, self.at = deque(), 0
        self.p, self.version = None, 0

    def push(self) -> tuple[np.ndarray, int, int]:
        """Its next push: the gradients of some steps, added up; their number; the version that they began from."""
        if self.p is None:
            self._install()  # what it waited for before its first step
        total, begin = 0.0, self.at
        while self.at < min(begin + self.n_push, self.steps):
            due = self.at - self.ahead
            if due >= 0 and due % self.n_fetch == 0:
                self._install()
            if self.at == begin:
                base = self.version
            g = self.p - self.minimum
            total = total + g
            self.p = self.p - g * RATE
            self.at += 1
        return total, self.at - begin, base

    def _install(self) -> None:
        p, self.version = self.fetched.popleft()
        self.p = p.copy()


def serial(order: np.ndarray, workers: list[SerialWorker], size: int, policy: str, bound: int):
    """What a server does: its parameters and momentum, the staleness of each push, the number of those discarded."""
    p, m, version, discarded, staleness = np.full(size, START), np.zeros(size), 0, 0, []
    for replica, kind in (divmod(int(entry), 8) for entry in order):
        if kind == Kind.FETCH:
            workers[replica].fetched.append((p.copy(), version))
        elif kind == Kind.PUSH:
            g, _, base = workers[replica].push()
            stale = version - base
            staleness.append(stale)
            if policy == "discard" and stale > bound:
                discarded += 1
                continue
            if policy == "scale" and stale > 1:
                g = g * (1.0 / stale)
            m = m * MOMENTUM + g
            p = p - m * RATE
            version += 1
    return p, m, staleness, discarded


@pytest.fixture
def pulled(world, downpour):
    """pulled(settings, **how) -> the outcome of a run whose workers pull towards their own minima, at random speeds."""

    def run(settings, seed, **how):
        rng = np.random.default_rng([world.rank, seed])

        def gradient(me):
            time.sleep(rng.exponential(0.002))
            return me.params - curve(me.replica)

        words = (f"optimizer.lr={RATE}", "optimizer.name=momentum", f"optimizer.momentum={MOMENTUM}", *settings)
        return downpour(gradient, *words, n=N, lanes=(7, 3, 5), total=TOTAL, start=START, **how)

    return run


def words(policy: str, n_push: int, n_fetch: int, ahead: int) -> tuple[str, ...]:
    name, bound = POLICIES[policy]
    return (
        f"parallel.staleness.policy={name}", f"parallel.staleness.bound={bound}",
        f"parallel.n_push={n_push}", f"parallel.n_fetch={n_fetch}", f"parallel.fetch_ahead={ahead}",
    )  # fmt: skip


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("servers", "n_push", "n_fetch", "ahead"), [(1, 1, 1, 0), (1, 1, 1, 1), (2, 2, 3, 1), (1, 3, 2, 2)]
)
def test_a_run_equals_the_serial_program_of_its_order(
    world, pulled, shared_path, policy, servers, n_push, n_fetch, ahead
):
    """Bit for bit, on every server; staleness is counted likewise."""
    if world.size <= servers:
        pytest.skip("needs a worker")
    run = pulled(words(policy, n_push, n_fetch, ahead), 1, servers=servers, record=shared_path)
    assert sum(len(worker.taken) for worker in run.workers) == TOTAL
    for number, (server, (lo, hi)) in enumerate(zip(run.servers, shards(N, servers), strict=True)):
        workers = [
            SerialWorker(curve(replica)[lo:hi], len(worker.taken), n_push, n_fetch, ahead)
            for replica, worker in enumerate(run.workers)
        ]
        order = np.fromfile(shared_path / f"server-{number}", np.uint32)
        p, m, staleness, discarded = serial(order, workers, hi - lo, *POLICIES[policy])
        np.testing.assert_array_equal(server.params, p)
        np.testing.assert_array_equal(server.state["momentum"], m)
        assert server.histogram == np.bincount(staleness).tolist()
        assert server.discarded == discarded
        assert [worker.at for worker in workers] == [len(worker.taken) for worker in run.workers]
    if world.size - servers > 1:
        assert max(len(server.histogram) for server in run.servers) > 1  # there was something to count


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("lingers_s", [(0.0, 0.1), (0.1, 0.0)], ids=["later", "earlier"])
def test_replayed_it_ends_with_the_same_bits(world, pulled, shared_path, policy, servers, lingers_s):
    """Though the workers are fast and slow in other places, end at other times, and the checkpoints are others."""
    if world.size <= servers:
        pytest.skip("needs a worker")
    settings = words(policy, 1, 2, 1)
    once = pulled(settings, 2, servers=servers, record=shared_path, lingers_s=lingers_s[0])
    again = pulled(settings, 3, servers=servers, replay=shared_path, every=10, lingers_s=lingers_s[1])
    assert [worker.taken for worker in again.workers] == [worker.taken for worker in once.workers]
    np.testing.assert_array_equal(again.params, once.params)
    for worker, other in zip(again.workers, once.workers, strict=True):
        np.testing.assert_array_equal(worker.params, other.params)
    for server, other in zip(again.servers, once.servers, strict=True):
        np.testing.assert_array_equal(server.state["momentum"], other.state["momentum"])
        assert (server.histogram, server.discarded) == (other.histogram, other.discarded)
