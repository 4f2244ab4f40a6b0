"""Updates that the replicas of a node make by shares equal those of one rank that has the whole gradient."""

import time

import numpy as np
import pytest

from dpnn import config
from dpnn.errors import NotFiniteError
from dpnn.memory import HOST
from dpnn.optim import STATES, Optimizer, Segment
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.flats import Flats
from dpnn.team import Team

N = 1000
SEGMENTS = (Segment(0, 301, True, 0.0), Segment(301, 900, False, 0.0), Segment(900, N, False, 0.1))
STATISTICS, BUCKETS = (900, N), [(400, 900), (17, 400), (0, 17)]
WHERE = ["together", "halves", "one apart", "not shared"]
OPTIONS = {
    "momentum": config.Optimizer(name="momentum", lr=0.1, weight_decay=0.01),
    "clipped": config.Optimizer(name="momentum", lr=0.1, weight_decay=0.01, nesterov=True, clip=0.5),
    "sgd": config.Optimizer(name="sgd", lr=0.1),
}


def gradient(rank: int, step: int) -> np.ndarray:
    """A rank's share: whole numbers by 64, whose sums are exact in any order."""
    return (np.random.default_rng([step, rank]).integers(-100, 100, N) / 64).astype(np.float32)


def start() -> np.ndarray:
    return np.random.default_rng(99).normal(size=N).astype(np.float32)


def serial(options: config.Optimizer, size: int, steps: int) -> Optimizer:
    """One rank, in float64, that has the whole gradient."""
    params, grads = start().astype(np.float64), np.zeros(N)
    optimizer = Optimizer(options, SEGMENTS, params, grads, Team(1))
    for step in range(steps):
        grads[:] = sum(gradient(rank, step) for rank in range(size))
        scale = optimizer.clip_scale(optimizer.sum_of_squares(0, N)) if options.clip else 1.0
        optimizer.apply(0, N, 0.1, scale)
    optimizer.state["params"] = params
    return optimizer


def job(options: config.Optimizer) -> config.Job:
    data, model = config.Data(train="data"), config.Model(name="resnet20")
    train = config.Train(steps=1, global_batch=1)
    return config.Job(
        data=data, model=model, train=train, optimizer=options, parallel=config.Parallel(stall_abort_s=60)
    )


class Replica:
    """This rank's strategy, and the steps that an executor would take with it."""

    def __init__(self, world, mesh, node, options: config.Optimizer) -> None:
        self.rank, self.node = world.rank, node
        flats = Flats.of(HOST, node)
        self.optimizer = flats.optimizer(options, SEGMENTS, node.sums, Team(1), node.kernels, node.undo)
        self.strategy = Allreduce(mesh, node, flats, self.optimizer, job(options))
        self.strategy.rate = 0.1
        if world.rank == 0:
            node.params[:] = start()
        node.share(node.params)

    def step(self, step: int, loss: float = 1.0, pause_s: float = 0.0, late: bool = False) -> None:
        """`late`: the loss is told after all gradients, which then can't be used when they arrive."""
        strategy, grads = self.strategy, self.node.grads
        strategy.begin()
        grads[:] = np.nan
        if not late:
            strategy.tell(loss)
        for lo, hi in (STATISTICS, *BUCKETS):
            time.sleep(pause_s)
            strategy.open(lo, hi)
            grads[lo:hi] = gradient(self.rank, step)[lo:hi]
            strategy.ready(lo, hi)
            strategy.poke()
        if late:
            strategy.tell(loss)
        strategy.finish()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"params": self.node.params, **self.node.state}


@pytest.fixture
def replica(world, mesh_of, node_of):
    """replica(where, options) -> Replica."""
    made = []

    def make(where: str, options: config.Optimizer) -> Replica:
        mesh = mesh_of(where)
        made.append(Replica(world, mesh, node_of(where, n=N, states=STATES[options.name], mesh=mesh), options))
        return made[-1]

    yield make
    for one in made:  # before its communicators go: a thread may still be calling MPI on them
        one.strategy.close()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", OPTIONS)
def test_steps_equal_those_of_one_rank(world, replica, where, kind):
    me = replica(where, OPTIONS[kind])
    for step in range(4):
        one_is_late = 2e-3 * (world.rank == step % world.size)
        me.step(step, loss=world.rank + 0.5, pause_s=one_is_late, late=step == 2)
        assert me.strategy.loss == sum(rank + 0.5 for rank in range(world.size))
    expected = serial(OPTIONS[kind], world.size, 4)
    assert set(me.arrays()) == set(expected.state)
    for name, array in me.arrays().items():
        np.testing.assert_allclose(array, expected.state[name], rtol=2e-6, atol=2e-6)
        assert len(set(world.comm.allgather(array.tobytes()))) == 1


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "bad"), [("momentum", np.nan), ("clipped", np.inf)])
def test_a_loss_that_is_not_finite_is_an_error_on_all_and_changes_nothing(world, replica, where, kind, bad):
    me = replica(where, OPTIONS[kind])
    me.step(0)
    world.comm.barrier()
    before = {name: array.copy() for name, array in me.arrays().items()}
    world.comm.barrier()
    with pytest.raises(NotFiniteError, match=r"the loss is (nan|inf)"):
        me.step(1, loss=bad if world.rank == world.size - 1 else 1.0)
    world.comm.barrier()
    for name, array in me.arrays().items():
        assert array.tobytes() == before[name].tobytes(), name


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("where", ["together", "not shared"])
def test_one_request_to_stop_reaches_all(world, replica, where):
    me = replica(where, OPTIONS["sgd"])
    me.step(0)
    assert not me.strategy.stop
    me.strategy.stop = world.rank == world.size - 1
    me.step(1)
    assert me.strategy.stop
