"""The fixed tree over grains: one sum in one way, whoever holds them."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnn.comm.grains import GrainReducer, merges, middle, stack_places, stacked

N, GRAINS = 3001, 12


def grain(number: int) -> np.ndarray:
    """Its gradient; every rank can draw every one."""
    return np.random.default_rng(number).normal(size=N).astype(np.float32)


def serial(lo: int, hi: int, of=grain):
    """The sum as the tree defines it."""
    return of(lo) if hi - lo == 1 else serial(lo, middle(lo, hi), of) + serial(middle(lo, hi), hi, of)


class Term(str):
    """Numbers whose sum shows how it was made."""

    def __add__(self, other: str) -> "Term":
        return Term(f"({self}{other})")


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)))))
def test_runs_of_any_length_come_to_the_one_sum(case):
    n, cuts = case
    bounds = sorted({0, n} | cuts)
    sums, values = [], []
    for lo, hi in pairwise(bounds):
        steps, left, most = stacked(range(lo, hi), n)
        stack: list[Term] = []
        for number, adds in zip(range(lo, hi), steps, strict=True):
            stack.append(Term(number))
            for to, source in adds:
                term = stack.pop()
                assert source in (-1, len(stack))
                assert to == len(stack) - 1
                stack[to] = stack[to] + term
        assert len(stack) == len(left) <= most
        sums += left
        values += stack
    pairs, ((root, whole),) = merges(sums, n)
    for i, j in pairs:
        values[i] = values[i] + values[j]
    assert whole == (0, n)
    assert values[root] == serial(0, n, Term)


def test_a_run_of_a_power_of_two_leaves_one_sum():
    assert [stacked(range(lo, lo + 4), 16)[1] for lo in (0, 4, 12)] == [[(0, 4)], [(4, 8)], [(12, 16)]]
    assert stack_places(0, 3) == 0


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", ["together", "halves", "one apart", "not shared"])
def test_bits_do_not_depend_on_who_holds_the_grains(world, node_of, where):
    mine = GRAINS // world.size
    node = node_of(where, n=N, partials=stack_places(GRAINS, world.size))
    arrived = np.zeros(N, int)

    def note(lo: int, hi: int) -> None:
        arrived[lo:hi] += 1

    sums = GrainReducer(node, GRAINS, note, 60)
    expected = serial(0, GRAINS)
    for _ in range(3):
        for number in range(world.rank * mine, (world.rank + 1) * mine):
            for lo, hi in ((2000, N), (0, 2000)):
                node.grads[lo:hi] = grain(number)[lo:hi]
                sums.start(lo, hi)
        sums.finish()
        sums.settle()
        assert node.sums.tobytes() == expected.tobytes()
        sums.settle()
    sums.close()
    world.comm.Allreduce(arrived.copy(), arrived)
    assert set(arrived) == {3 * len(node.groups)}  # each number at one owner on each node
