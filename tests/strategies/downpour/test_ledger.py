"""Leases and arrivals in any order, a run cut anywhere: every step of every lane arrives exactly once."""

import json
from collections import Counter, deque
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpnn.data import Run
from dpnn.data.owners import Owners
from dpnn.strategies.downpour.ledger import Ledger


def in_order(lanes):
    """Every (epoch, lane, step), as they are leased."""
    return (
        (epoch, lane, step) for epoch in count() for lane, steps in enumerate(lanes) for step in range(steps)
    )  # fmt: skip


def steps_of(run: Run) -> list[tuple[int, int, int]]:
    return [(run.epoch, run.lanes.start, step) for step in range(run.first, run.last + 1)]


def lane(epoch: int, number: int, first: int, last: int) -> Run:
    return Run(epoch, range(number, number + 1), first, last)


def test_lanes_are_leased_in_order_epoch_after_epoch():
    ledger = Ledger([3, 2], total=10, replicas=2)
    leased = [ledger.lease(replica) for replica in (0, 1, 1, 0)]
    assert leased == [lane(0, 0, 0, 2), lane(0, 1, 0, 1), lane(1, 0, 0, 2), lane(1, 1, 0, 1)]
    assert [ledger.lease(replica) for replica in (0, 1)] == [None, None]


def test_it_is_open_until_all_has_arrived():
    ledger = Ledger([3, 2], total=4, replicas=2)
    ledger.lease(0), ledger.lease(1)
    ledger.arrived(1, 1)
    assert ledger.open
    ledger.arrived(0, 3)
    assert not ledger.open


def test_a_lane_without_steps_is_passed_over():
    ledger = Ledger([2, 0, 1], total=6, replicas=1)
    assert [ledger.lease(0) for _ in range(5)] == [
        lane(0, 0, 0, 1), lane(0, 2, 0, 0), lane(1, 0, 0, 1), lane(1, 2, 0, 0), None,
    ]  # fmt: skip


def test_what_arrives_is_the_first_that_the_replica_has_leased():
    ledger = Ledger([4, 4], total=16, replicas=2)
    for replica in (0, 1, 0):
        ledger.lease(replica)
    ledger.arrived(0, 5)  # all of a lane, and the first step of the next
    ledger.arrived(1, 3)
    assert ledger.steps == 8
    assert ledger.state() == {"next": [1, 1], "left": [[0, 1, 3, 3], [1, 0, 1, 3]], "steps": 8}


def test_a_copy_goes_its_own_way():
    ledger = Ledger([4], total=8, replicas=1)
    ledger.lease(0)
    before = ledger.copy()
    ledger.arrived(0, 4)
    assert (before.steps, ledger.steps) == (0, 4)
    assert before.state()["left"] == [[0, 0, 0, 3]]
    assert ledger.state()["left"] == []


@pytest.mark.parametrize("more", [2, 3, 12])
def test_the_limit_cuts_a_lane_and_a_longer_run_goes_on_behind_the_cut(more):
    ledger = Ledger([4, 4], total=6, replicas=1)
    assert [ledger.lease(0) for _ in range(3)] == [lane(0, 0, 0, 3), lane(0, 1, 0, 1), None]
    ledger.arrived(0, 6)
    longer = Ledger([4, 4], total=6 + more, replicas=1)
    longer.resume(json.loads(json.dumps(ledger.state())))
    leased = []
    while run := longer.lease(0):
        leased += steps_of(run)
    assert leased == list(islice(in_order([4, 4]), 6, 6 + more))


class Outside:
    """A ledger, and what its replicas have in hand: they go through their leases in order."""

    def __init__(self, ledger: Ledger, total: int, replicas: int, seen: Counter) -> None:
        self.ledger, self.total, self.seen = ledger, total, seen
        self.hands = [deque() for _ in range(replicas)]

    def lease(self, replica: int) -> bool:
        run = self.ledger.lease(replica)
        if run is not None:
            assert run.first <= run.last
            self.hands[replica] += steps_of(run)
        return run is not None

    def push(self, replica: int, steps: int) -> None:
        steps = min(steps, len(self.hands[replica]))
        self.seen.update(self.hands[replica].popleft() for _ in range(steps))
        self.ledger.arrived(replica, steps)

    def do(self, deeds: list[tuple[int, int]]) -> None:
        """(replica, 0): it leases; (replica, n): it pushes n steps, or what it has."""
        for replica, steps in deeds:
            replica %= len(self.hands)
            if steps:
                self.push(replica, steps)
            else:
                self.lease(replica)

    def finish(self) -> None:
        while self.ledger.steps + sum(map(len, self.hands)) < self.total:
            for replica in range(len(self.hands)):
                self.lease(replica)
        assert not any(map(self.lease, range(len(self.hands))))
        for replica, hand in enumerate(self.hands):
            self.push(replica, len(hand))


DEEDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    lanes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    total=st.integers(0, 60),
    parts=st.lists(st.tuples(st.integers(1, 4), DEEDS), min_size=1, max_size=4),
)
def test_cut_anywhere_and_resumed_on_other_replicas_every_step_arrives_once(lanes, total, parts):
    """`parts` of a run: its number of replicas, and what they do until it is cut; the last one goes to the end."""
    seen, state = Counter(), None
    for replicas, deeds in parts:
        ledger = Ledger(lanes, total, replicas)
        if state is not None:
            ledger.resume(state)
        assert ledger.steps == seen.total()
        outside = Outside(ledger, total, replicas, seen)
        outside.do(deeds)
        state = json.loads(json.dumps(ledger.state()))
    outside.finish()
    assert ledger.steps == total
    assert seen == Counter(islice(in_order(lanes), total))


@settings(max_examples=300, deadline=None)
@given(
    lanes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    total=st.integers(0, 60),
    lives=st.lists(st.tuples(DEEDS, st.integers(0, 3), st.integers(0, 3)), max_size=3),
)
def test_whoever_dies_every_step_arrives_once(lanes, total, lives):
    """`lives`: what four replicas do until one dies, which one, and how many of its steps only others have got."""
    seen = Counter()
    ledger = Ledger(lanes, total, 4)
    outside = Outside(ledger, total, 4, seen)
    living = [0, 1, 2, 3]
    for deeds, which, elsewhere in lives:
        outside.do([(living[replica % len(living)], steps) for replica, steps in deeds])
        dead = living.pop(which % len(living))
        steps = min(elsewhere, len(outside.hands[dead]))
        seen.update(outside.hands[dead].popleft() for _ in range(steps))
        assert ledger.lose(dead, steps) == 0
        outside.hands[dead].clear()
        assert not ledger.held[dead]
    while ledger.steps + sum(map(len, outside.hands)) < total:
        assert any(list(map(outside.lease, living)))
    for replica in living:
        outside.push(replica, len(outside.hands[replica]))
        assert not any(ledger.held_by_others(other) for other in living) or replica != living[-1]
    assert ledger.steps == total
    assert seen == Counter(islice(in_order(lanes), total))


def test_lanes_of_a_node_without_replicas_are_given_up():
    ledger = Ledger([3, 2, 4], total=18, replicas=2, owners=owners_of([[3], [2, 4]], [1, 0]))
    run = ledger.lease(0)
    ledger.arrived(0, 1)
    assert (run.lanes.start, ledger.lose(0, 0)) == (1, 2 * (2 + 4) - 1)
    steps = 0
    while run := ledger.lease(1):
        steps += run.last - run.first + 1
    assert steps == 2 * 3


def owners_of(lanes, replicas):
    return Owners(shards=(), lanes=tuple(map(len, lanes)), replicas=tuple(replicas))


def test_a_replica_is_leased_lanes_of_its_own_node_only():
    ledger = Ledger([3, 2, 4], total=18, replicas=2, owners=owners_of([[3], [2, 4]], [1, 0]))
    assert [ledger.lease(1) for _ in range(3)] == [lane(0, 0, 0, 2), lane(1, 0, 0, 2), None]
    assert ledger.lease(0) == lane(0, 1, 0, 1)
    # A node that is behind has whole lanes left.
    assert ledger.state() == {
        "next": [2, 0],
        "left": [[0, 0, 0, 2], [0, 1, 0, 1], [0, 2, 0, 3], [1, 0, 0, 2], [1, 1, 0, 1], [1, 2, 0, 3]],
        "steps": 0,
    }


@settings(max_examples=300, deadline=None)
@given(
    lanes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3).filter(
        lambda owners: any(map(any, owners))
    ),
    epochs=st.integers(1, 3),
    parts=st.lists(st.tuples(st.integers(0, 3), DEEDS), min_size=1, max_size=4),
    data=st.data(),
)
def test_nodes_that_are_cut_anywhere_do_their_own_lanes_once_an_epoch(lanes, epochs, parts, data):
    """As above, where each of some nodes has lanes of its own, and replicas: one, and some more on any node."""
    steps = [n for owned in lanes for n in owned]
    owner_of = [owner for owner, owned in enumerate(lanes) for _ in owned]
    total, seen, state = epochs * sum(steps), Counter(), None
    for more, deeds in parts:
        others = st.lists(st.integers(0, len(lanes) - 1), min_size=more, max_size=more)
        replicas = data.draw(st.permutations([*range(len(lanes)), *data.draw(others)]))
        ledger = Ledger(steps, total, len(replicas), owners_of(lanes, replicas))
        if state is not None:
            ledger.resume(state)
        assert ledger.steps == seen.total()
        outside = Outside(ledger, total, len(replicas), seen)
        outside.do(deeds)
        for replica, hand in enumerate(outside.hands):
            assert all(owner_of[lane] == replicas[replica] for _, lane, _ in hand)
        state = json.loads(json.dumps(ledger.state()))
    outside.finish()
    assert ledger.steps == total
    assert seen == Counter(islice(in_order(steps), total))
