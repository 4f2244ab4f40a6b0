"""The order of samples: each one once, the same for any number of ranks, whole blocks of few lanes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpnn.data.sampler import Epoch, Sampler, default_lanes, default_window, most_slots
from dpnn.errors import DataError, JobError

COUNTS = st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(sum)


@st.composite
def samplers(draw):
    lanes = draw(st.integers(1, 12))
    return Sampler(
        counts=draw(COUNTS),
        block=draw(st.integers(1, 17)),
        lanes=lanes,
        global_batch=lanes * draw(st.integers(1, 5)),
        window=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 2**32 - 1)),
        shuffle=draw(st.booleans()),
    )


def batch(sampler, epoch, step, replica=0, replicas=1):
    """The numbers, over all shards, of the samples of a step."""
    order = epoch if isinstance(epoch, Epoch) else sampler.epoch(epoch)
    shards, samples = order.samples(step, sampler.owned(replica, replicas))
    before = np.concatenate(([0], np.cumsum(sampler.counts)))
    return (before[shards] + samples).tolist()


def global_batch(sampler, epoch, step, replicas=1):
    return [number for replica in range(replicas) for number in batch(sampler, epoch, step, replica, replicas)]


@settings(max_examples=100, deadline=None)
@given(sampler=samplers(), replicas=st.integers(1, 12), epoch=st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_on_any_number_of_replicas(sampler, replicas, epoch):
    replicas, epoch = min(replicas, sampler.lanes), sampler.epoch(epoch)
    steps = [global_batch(sampler, epoch, step, replicas) for step in range(sampler.steps)]
    assert sorted(itertools.chain(*steps)) == list(range(sampler.samples))
    assert steps == [global_batch(sampler, epoch, step) for step in range(sampler.steps)]
    assert [len(step) for step in steps] == [sampler.total(step) for step in range(sampler.steps)]
    assert all(len(step) == sampler.global_batch for step in steps[:-1])
    rows = [[sampler.micro(s, r, replicas, 1)[0][0] for r in range(replicas)] for s in range(sampler.steps)]
    assert rows == [[len(batch(sampler, epoch, s, r, replicas)) for r in range(replicas)] for s in range(sampler.steps)]
    assert sampler.max_rows(replicas) == max(map(max, rows))


@settings(max_examples=50, deadline=None)
@given(sampler=samplers(), before=st.integers(1, 12), after=st.integers(1, 12), data=st.data())
def test_a_run_resumed_on_another_number_of_replicas_sees_the_rest_once(sampler, before, after, data):
    before, after = min(before, sampler.lanes), min(after, sampler.lanes)
    stop = data.draw(st.integers(0, sampler.steps))
    stopped, resumed = sampler.epoch(1), sampler.epoch(1)
    seen = [global_batch(sampler, stopped, step, before) for step in range(stop)]
    seen += [global_batch(sampler, resumed, step, after) for step in range(stop, sampler.steps)]
    assert sorted(itertools.chain(*seen)) == list(range(sampler.samples))


@settings(max_examples=50, deadline=None)
@given(sampler=samplers())
def test_lanes_differ_by_at_most_one_sample(sampler):
    lengths = np.diff(sampler.cuts)
    assert lengths.sum() == sampler.samples
    assert lengths.max() - lengths.min() <= 1
    assert lengths.max() == sampler.longest


@settings(max_examples=50, deadline=None)
@given(sampler=samplers())
def test_a_lane_gives_samples_to_its_steps_and_to_no_others(sampler):
    epoch = sampler.epoch(0)
    for lane in range(sampler.lanes):
        rows = [len(epoch.samples(step, range(lane, lane + 1))[0]) for step in range(sampler.steps)]
        steps = sampler.lane_steps(lane)
        assert all(rows[:steps])
        assert not any(rows[steps:])


@settings(max_examples=50, deadline=None)
@given(sampler=samplers(), replicas=st.integers(1, 12))
def test_a_replica_reads_only_the_blocks_of_its_lanes(sampler, replicas):
    replicas = min(replicas, sampler.lanes)
    sizes = {}
    for shard, count in enumerate(sampler.counts.tolist()):
        for first in range(0, count, sampler.block):
            sizes[shard, first] = min(sampler.block, count - first)
    total = 0
    for replica in range(replicas):
        lanes, epoch = sampler.owned(replica, replicas), sampler.epoch(0)
        read = set()
        for number in range(sampler.windows):
            window = epoch.window(number, lanes)
            runs = zip(window.shards, window.firsts, np.diff(window.slots), strict=True)
            for shard, first, count in runs:
                blocks = [(shard, at) for at in range(first, first + count, sampler.block)]
                assert sum(sizes[block] for block in blocks) == count
                read.update(blocks)
        mine = sampler.cuts[lanes.stop] - sampler.cuts[lanes.start]
        # At each end of its part of the epoch a replica reads a block that is another's too.
        assert sum(sizes[block] for block in read) <= mine + 2 * (sampler.block - 1)
        total += len(read)
    assert total <= len(sizes) + replicas - 1 + (replicas > sampler.samples) * replicas


@settings(max_examples=50, deadline=None)
@given(sampler=samplers(), replicas=st.integers(1, 12), microbatches=st.integers(1, 5))
def test_micro_batches_cut_every_replicas_rows_alike(sampler, replicas, microbatches):
    replicas = min(replicas, sampler.lanes)
    for step in {0, sampler.steps - 1}:
        counts = [sampler.micro(step, replica, replicas, microbatches) for replica in range(replicas)]
        for replica, mine in enumerate(counts):
            n = sampler.micro(step, replica, replicas, 1)[0][0]
            cuts = [n * m // microbatches for m in range(microbatches + 1)]
            assert [rows for rows, _ in mine] == np.diff(cuts).tolist()
        for m in range(microbatches):
            assert {replica[m][1] for replica in counts} == {sum(replica[m][0] for replica in counts)}
        assert sum(all_ for _, all_ in counts[0]) == sampler.total(step)


def test_counts_of_a_step_are_looked_up_not_computed():
    sampler = Sampler([1000], 16, 8, 32, 64, 0)
    assert sampler.micro(3, 1, 3, 2) is sampler.micro(7, 1, 3, 2)
    assert sampler.micro(sampler.steps - 1, 1, 3, 2) is not sampler.micro(7, 1, 3, 2)


def test_without_shuffling_the_order_is_the_natural_one_cut_into_lanes():
    sampler = Sampler([10, 7], block=4, lanes=2, global_batch=4, window=6, seed=9, shuffle=False)
    assert batch(sampler, 0, 0) == [0, 1, 8, 9]
    assert batch(sampler, 3, 1) == [2, 3, 10, 11]
    assert batch(sampler, 0, 4) == [16]
    assert batch(sampler, 0, 4, replica=0, replicas=2) == []


def test_the_order_changes_with_seed_and_epoch_and_never_otherwise():
    def order(seed, epoch):
        return batch(Sampler([50], 4, 3, 6, 9, seed), epoch, 0)

    assert order(0, 0) == [4, 6, 0, 24, 16, 39]
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)


def test_a_window_holds_whole_shares():
    sampler = Sampler([1000], 16, 4, 12, window=10, seed=0)
    assert sampler.window == 12
    assert sampler.steps_per_window == 4


def test_samples_are_shuffled_over_the_window_and_not_beyond():
    sampler = Sampler([4096], block=16, lanes=4, global_batch=16, window=128, seed=0)
    epoch = sampler.epoch(0)
    for number in range(sampler.windows):
        window = epoch.window(number, range(1))
        taken = window.order[window.order >= 0]
        assert len(taken) == 128
        assert window.slots[-1] <= 128 + 2 * 15
        # Neighbours in a batch come from all over the window's eight or nine blocks.
        assert np.abs(np.diff(taken)).mean() > 30


def test_global_batch_that_lanes_do_not_divide_is_refused():
    with pytest.raises(JobError, match=r"global_batch = 100 .* 8 lanes; use a multiple of 8 \(96 or 104\)"):
        Sampler([1000], 16, 8, 100, 64, 0)
    with pytest.raises(JobError, match=r"global_batch = 3 .* 8 lanes; use a multiple of 8 \(8\)"):
        Sampler([1000], 16, 8, 3, 64, 0)


def test_more_replicas_than_lanes_or_samples_are_refused():
    with pytest.raises(JobError, match=r"data.lanes = 4 is less than the 5 replicas"):
        Sampler([1000], 16, 4, 100, 64, 0).check(5)
    with pytest.raises(DataError, match=r"3 samples can't be divided among 5 replicas"):
        Sampler([3], 16, 8, 8, 64, 0).check(5)
    with pytest.raises(DataError, match="no samples"):
        Sampler([0, 0], 16, 8, 8, 64, 0)


@pytest.mark.parametrize(("global_batch", "lanes"), [(64, 64), (128, 64), (100, 50), (1, 1), (96, 48), (101, 1)])
def test_default_lanes_divide_the_global_batch(global_batch, lanes):
    assert default_lanes(global_batch) == lanes


@pytest.mark.parametrize(
    ("global_batch", "replicas", "lanes"), [(1024, 64, 64), (1024, 65, 128), (101, 2, 101), (8, 9, 8)]
)
def test_default_lanes_are_at_least_the_replicas_where_the_batch_allows_it(global_batch, replicas, lanes):
    assert default_lanes(global_batch, replicas) == lanes


@pytest.mark.parametrize(
    ("samples", "lanes", "share", "block", "kb", "window_mb", "window"),
    [
        (60_000, 64, 4, 64, 0.784, 2048, 1024),  # MNIST: all of it fits
        (1_281_167, 64, 4, 16, 110, 2048, 64),  # ImageNet's JPEGs
        (1_281_167, 64, 4, 16, 110, 8192, 512),
        (1_281_167, 1, 256, 16, 110, 2048, 1024),  # one lane, as leased ones are
        (10**6, 64, 4, 64, 150, 2048, 64),  # not even a block of each lane fits
        (10**6, 64, 300, 64, 150, 2048, 300),
        (100, 4, 4, 16, 10_000, 2048, 1024),  # few samples: a window of 1024 holds no more than all of them
    ],
)
def test_the_default_window_is_the_largest_that_fits_for_all_lanes(samples, lanes, share, block, kb, window_mb, window):
    nbytes = kb * 1000
    assert default_window(samples, lanes, share, block, nbytes, window_mb) == window
    taken = [2 * most_slots(samples, lanes, n, block) * nbytes / 2**20 for n in (window, 2 * window)]
    if window > max(block, share):
        assert taken[0] <= window_mb
    if window < 1024:
        assert taken[1] > window_mb


def test_an_epoch_of_millions_of_blocks_is_laid_out_block_by_block():
    sampler = Sampler([20_000] * 500, block=64, lanes=64, global_batch=256, window=1024, seed=0)
    epoch = sampler.epoch(5)
    shards, samples = epoch.samples(sampler.steps // 2, sampler.owned(3, 16))
    assert len(shards) == 16
    assert len(set(shards.tolist())) > 8
    assert samples.max() < 20_000


def test_grains_that_do_not_fit_lanes_or_replicas_are_refused():
    with pytest.raises(JobError, match=r"train.grains = 5 doesn't divide the 12 lanes; use 1, 2, 3, 4, 6, 12"):
        Sampler([100], 8, lanes=12, global_batch=24, window=8, seed=0, grains=5)
    sampler = Sampler([100], 8, lanes=12, global_batch=24, window=8, seed=0, grains=4)
    sampler.check(2)
    with pytest.raises(JobError, match=r"4 can't be divided among 3 replicas; .* or train.grains = 3, 6, 12"):
        sampler.check(3)


@pytest.mark.parametrize("replicas", [1, 2, 3, 6])
def test_grains_have_the_same_rows_on_any_number_of_replicas(replicas):
    sampler = Sampler([100, 13], 8, lanes=12, global_batch=24, window=8, seed=0, grains=6)
    for step in (0, sampler.steps - 1):
        rows = [n for r in range(replicas) for n, _ in sampler.micro(step, r, replicas, 6 // replicas)]
        assert rows == [n for n, _ in sampler.micro(step, 0, 1, 6)]
        assert sum(rows) == sampler.total(step)
        assert max(rows) <= sampler.max_micro_rows(replicas, 6 // replicas)
