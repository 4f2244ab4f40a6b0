"""Leased runs of single lanes, in any order and cut anywhere, bring what the lanes hold, each sample once an epoch."""

import threading
import time
from collections import Counter

import numpy as np
import pytest

from dpnn.data import Leases, Loader, Run, Sampler, view_of
from dpnn.data.runs import epochs

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    running = [thread.name for thread in threading.enumerate()]
    assert [name for name in running if name.startswith("dpnn-") and name != "dpnn-team"] == []


def sampler_of(data, lanes=6, global_batch=18, window=7):
    return Sampler(data.manifest.counts, data.manifest.block, lanes, global_batch, window, seed=3)


def open_leased(data, sampler, leases, **options):
    return Loader(data.folder, data.manifest, sampler, 0, sampler.lanes, runs=leases, **options)


def cut_runs(sampler, epoch, rng):
    """Every lane's steps of an epoch, most lanes in two runs, in any order."""
    runs = []
    for lane in range(sampler.lanes):
        steps = sampler.lane_steps(lane)
        cut = int(rng.integers(0, steps + 1))
        runs += [Run(epoch, range(lane, lane + 1), lo, hi - 1) for lo, hi in ((0, cut), (cut, steps)) if lo < hi]
    return [runs[i] for i in rng.permutation(len(runs))]


def take_runs(loader, runs):
    """Copies of the batches of some runs."""
    for run in runs:
        for step in range(run.first, run.last + 1):
            batch = loader.next()
            assert (batch.epoch, batch.lanes, batch.step) == (run.epoch, run.lanes, step)
            yield batch._replace(x=batch.x.copy(), labels=batch.labels.copy(), ids=batch.ids.copy())
            loader.release(batch)


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
@pytest.mark.parametrize(("lanes", "share", "window"), [(1, 5, 7), (6, 3, 7), (5, 3, 100), (53, 2, 1), (64, 1, 4)])
def test_leased_runs_in_any_order_bring_every_sample_once(write_folder, window_mb, lanes, share, window):
    data = write_folder()
    sampler = sampler_of(data, lanes, lanes * share, window)
    rng = np.random.default_rng(lanes)
    runs = cut_runs(sampler, 0, rng) + cut_runs(sampler, 1, rng)
    leases, seen = Leases(), Counter()

    def lease():
        for run in runs:
            leases.add(run)
            time.sleep(0.0005)

    leasing = threading.Thread(target=lease)
    leasing.start()
    with open_leased(data, sampler, leases, window_mb=window_mb, dtype=np.float64) as loader:
        for batch in take_runs(loader, runs):
            shards, samples = sampler.epoch(batch.epoch).samples(batch.step, batch.lanes)
            numbers = data.cuts[shards] + samples
            assert batch.rows == len(batch.x) == len(numbers) > 0
            x = (data.x[numbers].astype(np.float64) - data.manifest.mean) / data.manifest.std
            np.testing.assert_allclose(batch.x, x.transpose(0, 3, 1, 2), rtol=1e-12)
            assert np.array_equal(batch.labels, data.labels[numbers])
            assert np.array_equal(batch.ids, data.ids[numbers])
            seen.update((batch.epoch, sample) for sample in batch.ids.tolist())
    leasing.join()
    assert seen == Counter((epoch, sample) for epoch in (0, 1) for sample in data.ids.tolist())


def test_leased_lanes_give_the_batches_of_replicas_with_a_lane_each(write_folder):
    data = write_folder(multi=True)
    sampler = sampler_of(data, global_batch=6)
    static = {}
    for lane in range(sampler.lanes):
        last = (1, sampler.steps - 1)
        view = view_of(data.manifest, augment="crop-flip", seed=3, mean=data.manifest.mean, std=data.manifest.std)
        with Loader(data.folder, data.manifest, sampler, lane, sampler.lanes, view=view, last=last) as loader:
            own = range(lane, lane + 1)
            for batch in take_runs(loader, epochs(own, sampler.steps, (0, 0), last)):
                static[batch.epoch, lane, batch.step] = batch
    leases, rng = Leases(), np.random.default_rng(0)
    runs = cut_runs(sampler, 0, rng) + cut_runs(sampler, 1, rng)
    for run in runs:
        leases.add(run)
    with open_leased(data, sampler, leases, view=view) as loader:
        for batch in take_runs(loader, runs):
            same = static.pop((batch.epoch, batch.lanes.start, batch.step))
            assert np.array_equal(batch.x, same.x)
            assert np.array_equal(batch.labels, same.labels)
            assert np.array_equal(batch.ids, same.ids)
    # What isn't leased are the last, empty batches of the shorter lanes.
    assert {(lane, step) for _, lane, step in static} == {(0, 17), (3, 17)}
    assert not any(batch.rows for batch in static.values())


def test_two_loaders_share_the_lanes_of_an_epoch(write_folder):
    data = write_folder()
    sampler = sampler_of(data)
    runs = cut_runs(sampler, 0, np.random.default_rng(1))
    found = [[], []]

    def work(worker):
        leases = Leases()
        with open_leased(data, sampler, leases) as loader:
            for run in runs[worker::2]:  # the next lease only once the last one's batches are taken
                leases.add(run)
                found[worker] += [batch.ids for batch in take_runs(loader, [run])]

    workers = [threading.Thread(target=work, args=(worker,)) for worker in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(found)
    assert sorted(np.concatenate(found[0] + found[1])) == sorted(data.ids)


@pytest.mark.parametrize("taken", [None, 0, 1], ids=["no lease", "a lease untouched", "a lease taken"])
@pytest.mark.parametrize("delay_s", [0, 0.05])
def test_close_ends_a_loader_that_waits_for_a_lease(write_folder, taken, delay_s):
    data = write_folder()
    sampler, leases = sampler_of(data), Leases()
    loader = open_leased(data, sampler, leases)
    if taken is not None:
        leases.add(Run(0, range(2, 3), 1, 2))
        list(take_runs(loader, [Run(0, range(2, 3), 1, 2)] * taken))
    time.sleep(delay_s)
    loader.close()
    assert not any(thread.is_alive() for thread in loader._threads)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.next()


def test_a_loader_whose_leases_are_closed_gives_what_was_leased_and_no_more(write_folder):
    data = write_folder()
    sampler, leases = sampler_of(data), Leases()
    run = Run(0, range(5, 6), 2, sampler.lane_steps(5) - 1)
    leases.add(run)
    leases.close()
    with open_leased(data, sampler, leases) as loader:
        assert len(list(take_runs(loader, [run]))) == run.last - 1
        with pytest.raises(RuntimeError, match="the loader has given its last batch"):
            loader.next()


def test_the_order_of_an_epoch_is_made_once_though_runs_of_two_alternate(write_folder, monkeypatch):
    data = write_folder()
    sampler, leases, made = sampler_of(data), Leases(), []
    epoch_of = sampler.epoch
    monkeypatch.setattr(sampler, "epoch", lambda number: made.append(number) or epoch_of(number))
    runs = [Run(epoch, range(4, 5), 0, 1) for epoch in (0, 0, 1, 0, 1, 1, 2, 1, 2)]
    for run in runs:
        leases.add(run)
    with open_leased(data, sampler, leases) as loader:
        assert len(list(take_runs(loader, runs))) == 2 * len(runs)
    assert made == [0, 1, 2]


def test_a_run_of_another_number_of_lanes_is_refused(write_folder):
    data = write_folder()
    sampler = sampler_of(data)
    with (
        open_leased(data, sampler, [Run(0, range(1, 3), 0, 0)]) as loader,
        pytest.raises(ValueError, match=r"lanes=range\(1, 3\).* for a loader of 1 lanes at a time"),
    ):
        loader.next()


def test_runs_from_start_to_last_are_one_for_each_epoch():
    own = range(2, 5)
    assert list(epochs(own, 10, (1, 4), (3, 6))) == [Run(1, own, 4, 9), Run(2, own, 0, 9), Run(3, own, 0, 6)]
    assert list(epochs(own, 10, (1, 4), (1, 6))) == [Run(1, own, 4, 6)]
    assert list(epochs(own, 10, (1, 7), (1, 6))) == []


def test_leases_come_in_order_to_another_thread_until_they_are_closed():
    leases, taken = Leases(), []
    taking = threading.Thread(target=lambda: taken.extend(leases), daemon=True)
    taking.start()
    added = [Run(0, range(lane, lane + 1), 0, 9) for lane in range(100)]
    for run in added:
        leases.add(run)
    time.sleep(0.02)
    assert taking.is_alive()
    leases.close()
    taking.join(10)
    assert not taking.is_alive()
    assert taken == added
    assert list(leases) == []
