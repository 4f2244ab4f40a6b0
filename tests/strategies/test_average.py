"""ParallelSGD against the paper's algorithm, written down for all replicas at once in NumPy."""

import numpy as np
import pytest

from dpnn import config
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.reduce import most_updates
from dpnn.errors import NotFiniteError, RankError
from dpnn.memory import HOST
from dpnn.optim import Segment
from dpnn.strategies.average import Average
from dpnn.strategies.flats import Flats
from dpnn.team import Team

N, STEPS, RATE, MOMENTUM = 101, 6, 0.1, 0.9
JOB = """
data.train = "none"
model.name = "none"
train = {{steps = 1, global_batch = 8}}
optimizer = {{lr = 0.1, momentum = 0.9}}
parallel = {{strategy = "average", every = {every}, state = "{state}", stall_abort_s = 30}}
"""


def curve(replica: int) -> np.ndarray:
    """The minimum that a replica's data pull towards."""
    return np.random.default_rng(replica).normal(size=N)


def samples(replica: int, step: int) -> int:
    """Of a replica in a step: unequal, and none now and then."""
    return (replica + step) % 3


def serial(replicas: int, every: int, state: str) -> np.ndarray:
    """What the mean of all replicas is in the end."""
    p, m = np.zeros((replicas, N)), np.zeros((replicas, N))
    taken = np.zeros(replicas)

    def mean(arrays: np.ndarray) -> np.ndarray:
        return np.broadcast_to(taken @ arrays / taken.sum(), arrays.shape).copy() if taken.sum() else arrays

    for step in range(1, STEPS + 1):
        for replica in range(replicas):
            if samples(replica, step):
                m[replica] = MOMENTUM * m[replica] + p[replica] - curve(replica)
                p[replica] -= RATE * m[replica]
                taken[replica] += samples(replica, step)
        if every and step % every == 0:
            p = mean(p)
            m = {"average": mean(m), "keep": m, "reset": 0 * m}[state]
            taken[:] = 0
    return mean(p)[0]


@pytest.fixture
def average(node_of, mesh_of):
    """average(where, every, state) -> (strategy, node)"""

    def make(where: str | Mesh, every: int = 0, state: str = "average", **how) -> tuple[Average, Node]:
        job = config.parse(JOB.format(every=every, state=state))
        mesh = mesh_of(where) if isinstance(where, str) else where
        node = node_of(n=N, mesh=mesh, together=False, **how)
        segments = [Segment(0, N, False, 0.0)]
        flats = Flats.of(HOST, node)
        optimizer = flats.optimizer(job.optimizer, segments, node.grads, Team(1), node.kernels, node.undo)
        return Average(mesh, node, flats, optimizer, job), node

    return make


def step(strategy: Average, node: Node, n_samples: int, gradient: np.ndarray, loss: float = 1.0) -> None:
    """What the executor does in a step."""
    strategy.rate, strategy.samples = RATE, n_samples
    strategy.begin()
    node.grads[:] = gradient
    strategy.tell(loss)
    strategy.finish()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", ["together", "halves", "not shared"])
@pytest.mark.parametrize(
    ("every", "state"), [(0, "average"), (2, "average"), (3, "keep"), (2, "reset"), (1, "average")]
)
def test_replicas_end_with_the_mean_of_the_papers_algorithm(world, average, where, every, state):
    strategy, node = average(where, every, state)
    for number in range(1, STEPS + 1):
        step(strategy, node, samples(world.rank, number), node.params - curve(world.rank))
    own = node.params.copy()
    strategy.gather()
    np.testing.assert_allclose(node.params, serial(world.size, every, state), rtol=0, atol=1e-5)
    assert len(set(world.comm.allgather(node.params.tobytes()))) == 1
    strategy.release()
    np.testing.assert_array_equal(node.params, own)
    strategy.close()


@pytest.mark.parallel([2, 3])
def test_between_two_averages_no_replica_waits_for_another(world, average):
    strategy, node = average("together")
    last = world.size - 1
    if world.rank == last:  # this one takes its first step when the others have taken seven
        assert [world.comm.recv(source=other) for other in range(last)] == [7] * last
    for _ in range(7):
        step(strategy, node, 1, node.params - curve(world.rank))
    if world.rank != last:
        world.comm.send(7, dest=last)
    strategy.close()


@pytest.mark.parallel([1, 2, 3])
def test_all_replicas_stop_after_the_same_step_when_one_is_asked_to(world, average):
    strategy, node = average("together")
    stopped = []
    for number in range(1, 40):
        strategy.stop = world.rank == world.size - 1 and number >= 5
        step(strategy, node, 1, node.params - curve(world.rank))
        if strategy.stop:
            stopped.append(number)
            break
    assert len(stopped) == 1
    assert len(set(world.comm.allgather(stopped[0]))) == 1
    strategy.close()


@pytest.mark.parallel([1, 2, 3])
def test_a_loss_that_is_not_finite_ends_all_replicas_after_the_same_step(world, average):
    strategy, node = average("together")
    taken = []

    def run() -> None:
        for number in range(1, 40):
            taken.append(number)
            step(strategy, node, 1, node.params, loss=np.nan if world.rank == 0 and number == 3 else 1.0)

    with pytest.raises(NotFiniteError, match="the loss of 1 replicas"):
        run()
    assert len(set(world.comm.allgather(len(taken)))) == 1
    assert np.isfinite(node.params).all()


@pytest.mark.parallel(4)
def test_a_part_goes_back_to_where_the_others_of_its_replica_stand(world, average):
    strategy, node = average(Mesh(world, 2), every=2, updates=most_updates(N, 1))
    kept, stands = [node.params, *node.state.values()], []

    def note() -> None:
        stands.append(([array.copy() for array in kept], strategy.since))

    def goes_back(steps: int, averages: int, stand: int) -> bool:
        since = strategy.go_back(steps, averages)
        arrays = [array.tolist() for array in kept]
        return arrays == [array.tolist() for array in stands[stand][0]] and since == stands[stand][1]

    mean = strategy._to_mean
    strategy._to_mean = lambda wires: (note(), mean(wires))
    for number in range(1, 3):
        step(strategy, node, 1 + world.rank, node.params - curve(world.rank + number))
        note()
    # After a step, before the average, and after it; then also in the middle of a checkpoint.
    assert [stand[1].averages for stand in stands] == [0, 0, 1]
    assert strategy.held() == (2, 1)
    strategy.gather()
    assert goes_back(2, 1, stand=2)
    strategy.gather()
    strategy.release()
    assert goes_back(2, 1, stand=2)
    assert goes_back(1, 0, stand=0)
    world.comm.barrier()


@pytest.mark.parallel([1, 2, 4])
def test_where_an_average_was_not_ended_it_is_as_if_it_had_not_begun(world, average, monkeypatch):
    monkeypatch.setattr("dpnn.strategies.average.survives", lambda: True)
    strategy, node = average("together", every=2, updates=most_updates(N, 1))
    mean = strategy._to_mean

    def breaks_off(wires) -> None:
        mean(wires[:1])
        raise RankError("another rank has died")

    step(strategy, node, 1, node.params - curve(world.rank))
    strategy._to_mean = breaks_off
    kept = [node.params, *node.state.values()]
    with pytest.raises(RankError):
        step(strategy, node, 2, node.params - curve(world.rank + 1))
    own = serial_steps([(1, curve(world.rank)), (2, curve(world.rank + 1))])
    assert strategy.held() == (2, 0)
    assert strategy.go_back(2, 0) == (2, 3, 0)
    for array, expected in zip(kept, own, strict=True):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)


def serial_steps(steps: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and momentum after steps of one replica: (samples, minimum)."""
    p, m = np.zeros(N), np.zeros(N)
    for _, minimum in steps:
        m = MOMENTUM * m + p - minimum
        p = p - RATE * m
    return p, m
