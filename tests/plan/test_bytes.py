"""What crosses between parts is what the plan says, byte for byte."""

from math import prod

import pytest

from dpnn.backends.reference import Reference
from dpnn.nn import Add, Branches, Chain, Concat, Conv, Dense, Flatten, MaxPool, ReLU
from dpnn.plan import Costs, Forecaster, Placement, place
from dpnn.plan.schedule import Send

from .parts import Course, train

ITEMSIZE = 8  # of float64, in which these networks are trained
DEEP = Chain(Conv(4, 3, padding=1), ReLU(), Conv(6, 3, padding=1), ReLU(), MaxPool(2), Flatten(), Dense(5))
WIDE = Chain(
    Conv(4, 3, padding=1),
    Branches(Conv(2, 1), Conv(3, 3, padding=1), MaxPool(3, 1, padding=1), join=Concat()),
    Branches(Conv(9, 1), Conv(9, 3, padding=1), Chain(), join=Add()),
    Flatten(),
    Dense(5),
)
PLACED = [(DEEP, "depth"), (WIDE, "branches"), (WIDE, "depth"), (DEEP, "filters"), (WIDE, "filters")]


def placement(course: Course, parts: int, wanted) -> Placement:
    loads = Forecaster(course.graph, [Reference()], course.rows, 1, Costs()).loads(1)
    return place(course.graph, parts, wanted, loads)


def planned(plan) -> int:
    """Bytes of all messages that this part sends in a step, from the shapes of what they carry."""
    nodes = [plan.graph.nodes[plan.messages[step.message].node] for step in plan.instructions if isinstance(step, Send)]
    types = {plan.graph.labels: 4, plan.graph.ids: 8}
    return sum(plan.rows * prod(node.shape) * types.get(_source(plan.graph, node), ITEMSIZE) for node in nodes)


def _source(graph, node) -> int:
    """The node whose output a Fork passes on."""
    while type(node.layer).__name__ == "Fork":
        node = graph.nodes[node.inputs[0]]
    return node.index


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize(("network", "wanted"), PLACED)
def test_as_many_bytes_cross_as_the_plan_says(world, network, wanted, microbatches):
    course = Course(network, microbatches=microbatches)
    trained = train(world, course, placement(course, world.size, wanted))
    assert trained.sent == planned(trained.plan)
    assert world.comm.allreduce(trained.sent) > 0


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(("network", "wanted"), PLACED)
def test_a_step_reserves_nothing_for_what_crosses(world, network, wanted):
    """Nothing is packed, pickled or copied on the way: an array of 2 MB crosses, and not a tenth of it is reserved."""
    onednn = {"name": "onednn", "threads": 1}
    course = Course(network, shape=(3, 96, 96), rows=16, backend=onednn, traced=True)
    trained = train(world, course, placement(course, world.size, wanted))
    assert trained.reserved < 200_000
    assert max(world.comm.allgather(trained.sent)) > 2_000_000


@pytest.mark.parallel([2])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_cut_sends_its_array_forward_and_its_gradient_back(world, microbatches):
    course = Course(DEEP, microbatches=microbatches)
    trained = train(world, course, placement(course, 2, {"conv2": 1}))
    images = course.rows * prod((4, 8, 8)) * ITEMSIZE
    data = course.rows * (4 + 0)  # labels; ids are read by nobody there
    forward, backward = world.comm.allgather(trained.sent)
    assert backward == images
    assert forward - images in (data, data + 8 * course.rows)
