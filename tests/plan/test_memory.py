"""Where buffers lie: nothing that is alive at once overlaps, and little is wasted."""

import random

import numpy as np
import pytest

from dpnn.backends.base import Room, Step
from dpnn.backends.onednn.fuse import fuse
from dpnn.backends.reference import Reference
from dpnn.nn import Add, Graph, SoftmaxCrossEntropy
from dpnn.plan import Arena, Layout, Placed, Store, compile_plan
from dpnn.plan.instructions import Backward, Forward, Load, Loss, PostRecv, Recv, Send, Sent, Weights
from dpnn.plan.memory import ALIGNMENT, BACKWARD, FORWARD, KEPT, WEIGHTS, Buffers, Life, pack

from .conftest import SHAPE, wide
from .lists import graph_of, plans_over
from .parts import random_network, random_placement

ROWS, MUCH = 3, 1 << 20
F32 = np.dtype(np.float32)


class Fusing(Reference):
    """A backend that fuses, wants room and has images channels-last; it computes nothing."""

    channels_last = True

    def __init__(self, room: Room = Room()) -> None:  # noqa: B008
        super().__init__(F32)
        self.wanted = room

    def groups(self, nodes, mode):
        return fuse(nodes, mode, self)

    def room(self, group, rows, mode):
        return self.wanted


def layout_of(*backends, mode="train", sync=False):
    """The layout of the wide network, a training plan of two micro-batches or an evaluation plan."""
    graph = Graph(wide(sync=sync), SHAPE, SoftmaxCrossEntropy())
    placed = Placed.whole(graph)
    nodes = placed.nodes(0)
    pieces = Store(nodes, F32).pieces
    return Layout(compile_plan(placed, 0, backends, mode, ROWS, 2 if mode == "train" else 1, pieces, 400))


def buffers_of(layout):
    """Its arrays; what is summed over replicas is left out."""
    arena, store = Arena(), Store(layout.graph.nodes, F32)
    arena.reserve(layout.nbytes)
    collected = {}
    for node in layout.graph.nodes:
        if node.layer.collected:
            ((reader, position),) = layout.graph.readers(node)
            collected |= {key: np.zeros(node.shape) for key in ((node.index, -1), (reader.index, position))}
    return Buffers(layout, 0, arena, store, collected, Step())


def test_buffers_that_live_at_once_never_overlap():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lives = {}
        for i in range(40):
            first = int(rng.integers(0, 50))
            lives[i, -1] = Life(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 20)))
        offsets, total = pack(lives)
        for a, life in lives.items():
            assert offsets[a] % ALIGNMENT == 0
            assert offsets[a] + life.nbytes <= total
            for b, other in lives.items():
                if a != b and life.first <= other.last and other.first <= life.last:
                    assert offsets[a] + life.nbytes <= offsets[b] or offsets[b] + other.nbytes <= offsets[a]


def test_buffers_that_follow_on_one_another_share_their_place():
    lives = {(i, -1): Life(1000, 2 * i, 2 * i + 1) for i in range(10)}
    _, total = pack(lives)
    assert total == 1024


def test_evaluation_needs_less_memory_than_training(build):
    assert build(wide(), mode="eval").layout.nbytes < build(wide()).layout.nbytes


def test_room_is_asked_for_before_any_is_taken():
    arena = Arena()
    arena.reserve(256)
    array = arena.take(64, (4, 4), np.dtype(np.float32))
    assert array.ctypes.data % ALIGNMENT == 0
    with pytest.raises(RuntimeError, match="reserve all room before"):
        arena.reserve(512)


def test_what_passes_inside_a_group_has_no_buffer():
    layout = layout_of(Fusing(), Reference(F32))
    fused = [group for group in layout.plan.groups if len(group.nodes) > 1]
    assert len(fused) >= 4
    for group in fused:
        inner = {node.index for node in group.nodes[:-1]}
        held = {key for key, _ in layout.offsets}
        assert not {(index, -1) for index in inner} & held
        edges = {(node.index, i) for node in group.nodes for i, source in enumerate(node.inputs) if source in inner}
        assert edges
        assert not edges & held


@pytest.mark.parametrize("sync", [False, True])
def test_a_gradient_in_place_lies_where_the_outputs_gradient_lies(sync):
    layout = layout_of(Fusing(), Reference(F32), sync=sync)
    buffers = buffers_of(layout)
    found = [group for group in layout.plan.groups if group.in_place is not None]
    assert len(found) >= 3
    for group in found:
        index, position = group.in_place
        source = layout.graph.nodes[layout.graph.nodes[index].inputs[position]]
        if not source.needs_grad:
            continue
        dx, (dy, *others) = buffers.d_input(layout.graph.nodes[index], position), buffers.d_outputs(group.nodes[-1])
        assert (dx.ctypes.data, dx.shape, dx.strides) == (dy.ctypes.data, dy.shape, dy.strides)
        for node, i in group.inputs:
            if (node.index, i) != group.in_place and (other := buffers.d_input(node, i)) is not None:
                others.append(other)
        assert not any(np.shares_memory(dx, other) for other in others)


def test_a_sum_has_a_gradient_in_place_and_copies():
    layout = layout_of(Fusing(), Reference(F32))
    (group,) = (group for group in layout.plan.groups if any(isinstance(node.layer, Add) for node in group.nodes))
    assert len(group.inputs) == 2
    assert group.in_place == (group.nodes[1].index, 1)  # the shortcut's, not the normalisation's


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("sync", [False, True])
def test_buffers_of_a_fused_plan_never_overlap_while_they_live(mode, sync):
    layout = layout_of(Fusing(Room(kept=700, forward=5000, backward=3000)), Reference(F32), mode=mode, sync=sync)
    lives = layout._lives_in_slots(layout.plan)
    assert lives.keys() == layout.offsets.keys()
    places = [(layout.offsets[key], layout.offsets[key] + life.nbytes, life) for key, life in lives.items()]
    for i, (lo, hi, life) in enumerate(places):
        for other_lo, other_hi, other in places[:i]:
            if life.first <= other.last and other.first <= life.last:
                assert hi <= other_lo or other_hi <= lo


def test_what_an_op_keeps_lives_from_its_forward_to_its_backward_and_scratch_for_one_call():
    layout = layout_of(Fusing(Room(kept=700, forward=5000, backward=3000, weights=2000)), Reference(F32))
    lives, instructions = layout._lives(layout.plan)[0], layout.plan.instructions
    mine = [(i, group) for i, group in enumerate(layout.plan.groups) if isinstance(group.backend, Fusing)]
    walked = [(i, group) for i, group in mine if not group.forward_view]
    assert len(walked) > 6
    for i, group in walked:
        index = group.nodes[-1].index
        forward, backward = instructions.index(Forward(i, 0)), instructions.index(Backward(i, 0))
        assert lives[index, KEPT] == Life(700, forward, backward)
        assert lives[index, FORWARD] == Life(5000, forward, forward)
        assert lives[index, BACKWARD] == Life(3000, backward, backward)
        if group.splits:
            weights = instructions.index(Weights(i, 0))
            assert lives[index, WEIGHTS] == Life(2000, weights, weights)


def test_scratch_is_shared_and_what_is_kept_is_not():
    least = layout_of(Fusing(), Reference(F32)).nbytes
    scratch = layout_of(Fusing(Room(forward=MUCH, backward=MUCH)), Reference(F32))
    kept = layout_of(Fusing(Room(kept=MUCH)), Reference(F32))
    walked = [group for group in kept.plan.groups if isinstance(group.backend, Fusing) and not group.forward_view]
    assert least < scratch.nbytes <= least + MUCH
    assert kept.nbytes >= len(walked) * MUCH


def test_room_is_as_large_as_asked_for_and_aligned():
    layout = layout_of(Fusing(Room(kept=7, forward=130, backward=1, weights=65, row=10)), Reference(F32))
    buffers = buffers_of(layout)
    group = layout.plan.groups[0]
    rooms = buffers.room(group)
    assert [(room.dtype, room.shape) for room in rooms] == [(np.uint8, (n,)) for n in (7, 130, 1, 65, 10 * ROWS * 2)]
    assert all(room.ctypes.data % ALIGNMENT == 0 for room in rooms)


@pytest.mark.parametrize("last", [True, False])
def test_images_lie_as_the_first_backend_wants_them(last):
    layout = layout_of(*[Fusing()] * last, Reference(F32))
    buffers = buffers_of(layout)
    seen = {2: 0, 4: 0}
    for group in layout.plan.groups:
        node = group.nodes[-1]
        if not node.layer.batched:
            continue
        arrays = [buffers.output(node), *buffers.d_outputs(node)]
        arrays += [dx for reader, i in group.inputs if (dx := buffers.d_input(reader, i)) is not None]
        for array in arrays:
            if array.ndim in seen and array.dtype == F32:
                seen[array.ndim] += 1
                lying = array.transpose(0, 2, 3, 1) if last and array.ndim == 4 else array
                assert lying.flags.c_contiguous
                assert len(array) == ROWS
        assert buffers.output(node).shape == (ROWS, *node.shape)
    assert min(seen.values()) > 4


def lives_of(layout):
    """What every instruction of a whole step touches, as lives of (buffer, slot): a new one in each micro-batch."""
    plan, root = layout.plan, layout.root
    received = {root(message.key) for message in plan.messages if message.target == plan.part}
    current, found = {}, []
    for at, step in enumerate(plan.instructions):
        slot, keys, fresh = getattr(step, "slot", 0), set(), False
        if isinstance(step, Load):
            for key in [key for key in current if key[1] == slot and key[0] not in received]:
                del current[key]
            inputs = (layout.graph.images, layout.graph.labels, layout.graph.ids)
            keys = {(i, -1) for i in inputs if plan.part == plan.placed.reader}
        elif isinstance(step, Forward | Backward):
            keys = layout._touched(plan.groups[step.group], FORWARD if isinstance(step, Forward) else BACKWARD)
        elif isinstance(step, Weights):
            keys = layout._touched_by_weights(plan.groups[step.group])
        elif isinstance(step, PostRecv | Recv | Send | Sent):
            keys, fresh = {plan.messages[step.message].key}, isinstance(step, PostRecv)
        elif isinstance(step, Loss):
            keys = {(i, -1) for i in layout.graph.losses if plan.placed.part_of[i] == plan.part}
        for key in {root(key) for key in keys if layout._nbytes(key)}:
            if fresh or (key, slot) not in current:
                current[key, slot] = [key, slot, at, at]
                found.append(current[key, slot])
            current[key, slot][3] = at
    return found


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe"])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_alive_in_several_slots_never_overlaps(seed, pipeline):
    """Of random networks and placements: every buffer of every micro-batch, from its first to its last use."""
    rng = random.Random(seed)
    graph = graph_of(random_network(rng))
    placement = random_placement(rng, graph, rng.randint(2, 4))
    in_flight = 0
    for plan in plans_over(graph, placement, microbatches=4, pipeline=pipeline):
        layout = Layout(plan)
        in_flight = max(in_flight, plan.slots)
        lives = []
        for key, slot, first, last in lives_of(layout):
            lo = layout.offset(key, slot)
            lives.append((lo, lo + layout._nbytes(key), first, last, key))
            assert lives[-1][1] <= layout.nbytes
        for i, (lo, hi, first, last, key) in enumerate(lives):
            for other_lo, other_hi, other_first, other_last, other in lives[:i]:
                if first <= other_last and other_first <= last:
                    assert hi <= other_lo or other_hi <= lo, (plan.part, key, other)
    assert in_flight <= 4
