"""Each sample of an epoch is seen exactly once: whatever the shards, ranks, batches, windows, nodes and stops."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpnn.data import Loader, Sampler
from dpnn.data.owners import Owners, part

COUNTS = st.lists(st.integers(1, 90), min_size=1, max_size=6)
"""Of the shards: any of them may end with a short block."""
BLOCKS = st.integers(1, 17)


@st.composite
def nodes_of(draw, shards):
    """Which of a few nodes owns each shard; each owns some."""
    nodes = draw(st.integers(1, min(shards, 4)))
    owners = [*range(nodes), *draw(st.lists(st.integers(0, nodes - 1), min_size=shards - nodes, max_size=shards))]
    return draw(st.permutations(owners[:shards]))


def replicas_on(draw, nodes, lanes):
    """The node of each replica, in any order: each node has some, and all nodes at most one for each lane."""
    others = draw(st.lists(st.integers(0, nodes - 1), max_size=min(5, lanes - nodes)))
    return draw(st.permutations([*range(nodes), *others]))


@st.composite
def cases(draw, counts=COUNTS, blocks=BLOCKS):
    """A data set, its nodes, an epoch, and what runs go through it: from a step on, with replicas on the nodes."""
    counts = draw(counts)
    nodes = draw(nodes_of(len(counts)))
    n_nodes = max(nodes) + 1
    lanes = draw(st.integers(n_nodes, 12))
    options = {
        "block": draw(blocks), "lanes": lanes, "global_batch": lanes * draw(st.integers(1, 5)),
        "window": draw(st.integers(1, 40)), "seed": draw(st.integers(0, 2**32 - 1)), "shuffle": draw(st.booleans()),
    }  # fmt: skip
    homes = replicas_on(draw, n_nodes, lanes)
    owners = owners_of(counts, nodes, homes, lanes)
    sampler = Sampler(counts, **options, owners=owners)
    stops = draw(st.lists(st.integers(0, sampler.steps), max_size=3))
    runs = []
    for lo, hi in zip([0, *sorted(stops)], [*sorted(stops), sampler.steps], strict=True):
        runs.append(SimpleNamespace(steps=range(lo, hi), homes=homes))
        homes = others_on(draw, homes, owners.lanes, nodes)
    return SimpleNamespace(
        counts=counts, nodes=nodes, options=options, owners=owners, epoch=draw(st.integers(0, 3)), runs=runs
    )


def others_on(draw, homes, lanes, nodes):
    """Other replicas on the same nodes, on none more than it has lanes: so these stay as they are."""
    first = {node: nodes.index(node) for node in set(nodes)}
    number = {node: i for i, node in enumerate(sorted(first, key=first.get))}
    least = [node for node in set(homes) for _ in range(draw(st.integers(1, min(3, lanes[number[node]]))))]
    return draw(st.permutations(least))


def owners_of(counts, nodes, homes, lanes):
    holds = np.array([[node == owner for owner in nodes] for node in range(max(nodes) + 1)])
    shards = [SimpleNamespace(name="", bytes=0) for _ in counts]
    return part("data", SimpleNamespace(shards=shards, counts=counts), holds, homes, lanes)


def sampler_of(case, homes):
    """The sampler of a run, as training makes it."""
    dealt = Owners(case.owners.shards, case.owners.lanes, numbers(case, homes))
    sampler = Sampler(case.counts, **case.options, owners=dealt)
    sampler.deal(dealt.runs())
    return sampler


def numbers(case, homes):
    """The owner of each replica: owners are numbered by their first shards."""
    firsts = sorted(set(case.nodes), key=case.nodes.index)
    return tuple(firsts.index(home) for home in homes)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_each_sample_of_an_epoch_is_taken_once(case):
    before = np.concatenate(([0], np.cumsum(case.counts)))
    seen = np.zeros(before[-1], np.int64)
    for run in case.runs:
        sampler = sampler_of(case, run.homes)
        epoch, replicas = sampler.epoch(case.epoch), len(run.homes)
        for step in run.steps:
            total = 0
            for replica, owner in enumerate(numbers(case, run.homes)):
                shards, samples = epoch.samples(step, sampler.owned(replica, replicas))
                assert all(case.owners.shards[shard] == owner for shard in shards)
                assert sampler.micro(step, replica, replicas, 1)[0][0] == len(samples) <= sampler.max_rows(replicas)
                np.add.at(seen, before[shards] + samples, 1)
                total += len(samples)
            assert 0 < total == sampler.total(step) <= sampler.global_batch
    assert (seen == 1).all()


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
def test_the_loader_brings_each_sample_of_an_epoch_once(write_folder, window_mb):
    """Shards with short last blocks, through the files and the loader's threads."""
    number = count()
    folders = {}

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(counts=st.sampled_from([(37, 5, 64), (1, 1, 1), (90, 3, 17)]), blocks=st.just(8)))
    def check(case):
        data = folders.get(tuple(case.counts)) or write_folder(case.counts, block=8, name=f"data-{next(number)}")
        folders[tuple(case.counts)] = data
        seen = []
        for run in case.runs:
            sampler, replicas = sampler_of(case, run.homes), len(run.homes)
            steps = [(case.epoch, step) for step in run.steps]
            for replica in range(replicas if steps else 0):
                place = (data.folder, data.manifest, sampler, replica, replicas)
                with Loader(*place, window_mb=window_mb, start=steps[0], last=steps[-1]) as loader:
                    for step in run.steps:
                        batch = loader.next()
                        assert (batch.step, batch.rows) == (step, sampler.micro(step, replica, replicas, 1)[0][0])
                        seen += batch.ids.tolist()
                        loader.release(batch)
        assert sorted(seen) == sorted(data.ids.tolist())

    check()
