"""The instruction list: what stands in it, and in which order."""

import pytest

from dpnn.backends.reference import Reference
from dpnn.errors import JobError
from dpnn.nn import Chain, Dense, Flatten
from dpnn.plan.instructions import Backward, Collect, Collected, Finish, Forward, Load, Loss, Open, Ready, Send, Weights
from dpnn.plan.schedule import choose_groups, make_buckets

from .conftest import wide
from .lists import placed_by, plans_of


@pytest.mark.parametrize("microbatches", [1, 3])
def test_every_group_runs_forward_before_backward_in_every_micro_batch(build, microbatches):
    built = build(wide(), microbatches=microbatches)
    seen = []
    for step in built.plan.instructions:
        if isinstance(step, Load):
            seen = []
        if isinstance(step, Backward):
            assert step.group in seen or built.plan.groups[step.group].forward_view
        if isinstance(step, Forward):
            seen.append(step.group)
    kinds = [type(step) for step in built.plan.instructions]
    assert kinds.count(Load) == kinds.count(Loss) == microbatches
    assert kinds[-1] is Finish


def test_backward_runs_in_the_reverse_order_of_forward(build):
    order = [step.group for step in build(wide()).plan.instructions if isinstance(step, Backward)]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("bucket_nbytes", [1, 400, 10**9])
def test_a_bucket_is_open_while_it_is_written_and_ready_only_when_it_is_complete(build, microbatches, bucket_nbytes):
    built = build(wide(), microbatches=microbatches, bucket_nbytes=bucket_nbytes)
    group_of = {p.name: i for i, g in enumerate(built.plan.groups) for node in g.nodes for p in node.params}
    writes = []
    for piece in built.store.pieces:
        kind = Forward if piece.spec.statistic else Backward
        group = group_of[piece.name]
        kinds = [kind, Weights] if kind is Backward and built.plan.groups[group].splits else [kind]
        places = [i for i, step in enumerate(built.plan.instructions) if step in [kind(group, 0) for kind in kinds]]
        assert len(places) == microbatches * len(kinds)
        writes.append((piece, places))
    opened = {(s.lo, s.hi): i for i, s in enumerate(built.plan.instructions) if isinstance(s, Open)}
    ready = {(s.lo, s.hi): i for i, s in enumerate(built.plan.instructions) if isinstance(s, Ready)}
    assert opened.keys() == ready.keys()
    for piece, places in writes:
        bucket = next(b for b in opened if b[0] <= piece.offset and piece.end <= b[1])
        assert opened[bucket] < places[0]
        assert places[-1] < ready[bucket]


def test_gradients_of_weights_come_behind_the_last_gradient_that_is_sent_or_right_behind_their_backward():
    layers = Chain(Flatten(), Dense(4), Dense(5), Dense(6), Dense(7))
    first, second = plans_of(placed_by(layers, 2, {"dense[34]": 1, "*": 0}))
    kinds = {
        plan.part: [type(step) for step in plan.instructions if isinstance(step, Backward | Weights | Send)]
        for plan in (first, second)
    }
    assert kinds[0][-4:] == [Backward, Weights, Backward, Weights]
    assert kinds[1][-5:] == [Backward, Backward, Send, Weights, Weights]
    for plan in (first, second):
        order = [step.group for step in plan.instructions if isinstance(step, Weights)]
        assert order == [step.group for step in plan.instructions if isinstance(step, Backward)][-len(order) :]


def test_buckets_cover_every_number_once_and_are_large_enough(build):
    pieces = build(wide()).store.pieces
    buckets = make_buckets(pieces, 400, 8)
    assert sorted(buckets)[0][0] == 0
    assert all(a[1] == b[0] for a, b in zip(sorted(buckets), sorted(buckets)[1:], strict=False))
    assert sorted(buckets)[-1][1] == pieces[-1].end
    trained = [b for b in buckets if b[1] <= sum(p.hi for p in pieces if not p.spec.statistic)]
    assert all((hi - lo) * 8 >= 400 for lo, hi in trained[:-1])


def test_a_synchronous_sum_is_sent_off_when_written_and_waited_for_before_it_is_read(build):
    built = build(wide(sync=True))
    steps = built.plan.instructions
    sums = [node for node in built.graph.nodes if node.layer.collected]
    assert len(sums) == 2
    for node in sums:
        writer = next(i for i, g in enumerate(built.plan.groups) if node in g.nodes)
        reader_node = built.graph.readers(node)[0][0]
        reader = next(i for i, g in enumerate(built.plan.groups) if reader_node in g.nodes)
        place = steps.index(Collect(node.index, 0, False))
        assert steps[place - 1] == Forward(writer, 0)
        assert place < steps.index(Collected(node.index, 0, False)) < steps.index(Forward(reader, 0))
        if node.needs_grad:
            place = steps.index(Collect(node.index, 0, True))
            assert steps.index(Backward(reader, 0)) < place < steps.index(Collected(node.index, 0, True))


def test_evaluation_leaves_out_what_exists_in_training_only(build):
    plan = build(wide(sync=True), mode="eval").plan
    names = [node.name for group in plan.groups for node in group.nodes]
    assert not [name for name in names if name.endswith((".sums", "aux.dense1"))]
    assert {type(step) for step in plan.instructions} == {Load, Forward, Loss}


def test_a_plan_prints_a_line_an_instruction_with_the_names_of_its_nodes(build):
    built = build(wide())
    lines = str(built.plan).splitlines()
    assert len(lines) == len(built.plan.instructions)
    assert any("conv1" in line and line.startswith("Forward") for line in lines)


def test_an_instruction_is_told_in_the_words_of_the_network(build):
    built = build(wide(sync=True))
    told = [built.plan.words(step) for step in built.plan.instructions]
    assert "Load micro-batch 1" in told
    assert "Forward conv1" in told
    assert "Collect the output of batchnorm1.sums over the replicas" in told
    assert "Collected the gradient by batchnorm1.sums over the replicas" in told
    assert "Open gradients 711 to 729" in told
    first, second = plans_of(placed_by(Chain(Flatten(), Dense(4), Dense(5)), 2, {"dense2": 1, "*": 0}))
    sends, receives = map(first.words, first.instructions), list(map(second.words, second.instructions))
    assert "Send the output of dense1 to part 1" in sends
    assert "Recv the output of dense1 from part 0" in receives
    assert "Send the gradient by dense1 to part 0" in receives


class Declining(Reference):
    """A backend for dense layers only."""

    name = "declining"

    def groups(self, nodes, mode):
        return super().groups([node for node in nodes if isinstance(node.layer, Dense)], mode)


def test_what_one_backend_declines_the_next_one_computes_and_nobody_is_an_error(build):
    graph = build(Chain(Flatten(), Dense(3))).graph
    nodes = [node for node in graph.nodes if node.inputs]
    only_dense, reference = Declining(), Reference()
    groups = choose_groups(nodes, [only_dense, reference], "train")
    assert [group.backend.name for group in groups] == ["reference", "declining", "reference"]
    with pytest.raises(JobError, match="flatten1: none of the backends \\(declining\\) computes Flatten"):
        choose_groups(nodes, [only_dense], "train")
