"""Batches of encoded samples are what the view makes of each record, for any number of threads and ranks."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dpnn.data import Loader, Sampler, view_of
from dpnn.data.window import Records
from tests.pictures import jpegs, write_encoded

from .conftest import take

pytestmark = pytest.mark.timeout(60)

COUNTS = (29, 5, 40)


@pytest.fixture
def pictures(tmp_path):
    records, labels = jpegs(sum(COUNTS))
    manifest = write_encoded(tmp_path / "train", records, labels, COUNTS)
    return SimpleNamespace(folder=tmp_path / "train", manifest=manifest, records=records, labels=labels)


@pytest.fixture
def films(tmp_path):
    rng = np.random.default_rng(0)
    records = [rng.bytes(6 * frames) for frames in rng.integers(1, 9, sum(COUNTS))]
    labels = rng.integers(0, 5, len(records)).astype(np.int32)
    manifest = write_encoded(tmp_path / "train", records, labels, COUNTS, frame=(6,))
    return SimpleNamespace(folder=tmp_path / "train", manifest=manifest, records=records, labels=labels)


def sampler_of(data, **options):
    options = {"lanes": 6, "global_batch": 12, "window": 9, "seed": 3} | options
    return Sampler(data.manifest.counts, data.manifest.block, **options)


def view_in(data, **options):
    return view_of(data.manifest, seed=3, mean=data.manifest.mean, std=data.manifest.std, **options)


def check(data, view, sampler, batches, replica=0, replicas=1):
    """Each sample of the batches was made from its own record."""
    cuts = np.cumsum([0, *COUNTS])
    for batch in batches:
        shards, samples = sampler.epoch(batch.epoch).samples(batch.step, sampler.owned(replica, replicas))
        numbers = cuts[shards] + samples
        assert np.array_equal(batch.ids, numbers + 1000)
        assert np.array_equal(batch.labels, data.labels[numbers])
        choices = view.draw(batch.ids, batch.epoch)
        wanted = np.empty((len(numbers), *view.shape), np.float32)
        for i, number in enumerate(numbers):
            record = data.records[number]
            source = Records(memoryview(record), np.array([0, len(record)]))
            view.put(source, np.array([0]), choices[i : i + 1], wanted[i : i + 1])
        assert np.array_equal(batch.x, wanted.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
@pytest.mark.parametrize("augment", ["none", "crop-flip", "imagenet"])
@pytest.mark.parametrize("threads", [1, 3])
def test_pictures_reach_the_batch_that_they_belong_to(pictures, window_mb, augment, threads):
    sampler, view = sampler_of(pictures), view_in(pictures, augment=augment, size=16)
    for replica in range(2):
        with Loader(
            pictures.folder, pictures.manifest, sampler, replica, 2, view=view, threads=threads, window_mb=window_mb
        ) as loader:
            assert loader.pooled == (window_mb > 0)
            check(pictures, view, sampler, take(loader, 2 * sampler.steps), replica, 2)


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
def test_frames_reach_the_batch_that_they_belong_to(films, window_mb):
    sampler, view = sampler_of(films), view_in(films, frames=4)
    with Loader(films.folder, films.manifest, sampler, view=view, threads=2, window_mb=window_mb) as loader:
        batches = take(loader, 2 * sampler.steps)
    assert batches[0].x.shape == (12, 6, 4, 1)
    check(films, view, sampler, batches)


def test_small_batches_of_frames_are_made_several_at_once(films):
    sampler, view = sampler_of(films), view_in(films, frames=4)
    with Loader(films.folder, films.manifest, sampler, view=view, last=(0, sampler.steps - 1)) as loader:
        assert loader._at_once > 1
        check(films, view, sampler, take(loader, sampler.steps))


def test_batches_are_the_same_for_any_number_of_threads_and_ranks(pictures):
    sampler, view = sampler_of(pictures), view_in(pictures, augment="imagenet", size=16)
    made = {}
    for threads, replicas in ((1, 1), (4, 1), (2, 3), (1, 6)):
        parts = []
        for replica in range(replicas):
            with Loader(
                pictures.folder, pictures.manifest, sampler, replica, replicas, view=view, threads=threads
            ) as loader:
                parts.append(take(loader, 2 * sampler.steps))
        made[threads, replicas] = [np.concatenate([batch.x for batch in step]) for step in zip(*parts, strict=True)]
    first, *others = made.values()
    for other in others:
        assert all(np.array_equal(one, same) for one, same in zip(first, other, strict=True))


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("delay_s", [0, 0.05])
def test_close_ends_all_threads_whatever_they_do(pictures, taken, delay_s):
    loader = Loader(
        pictures.folder, pictures.manifest, sampler_of(pictures), view=view_in(pictures, size=16), threads=3
    )
    for _ in range(taken):
        loader.release(loader.next())
    time.sleep(delay_s)
    loader.close()
    assert not any(thread.is_alive() for thread in loader._threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dpnn-decode")]


def test_a_window_larger_than_the_average_makes_its_pool_grow(tmp_path):
    small, labels = jpegs(sum(COUNTS), sizes=(8, 9))
    large, _ = jpegs(8, sizes=(90, 91))
    records = [*small[:-8], *large]
    manifest = write_encoded(tmp_path / "train", records, labels, COUNTS)
    data = SimpleNamespace(folder=tmp_path / "train", manifest=manifest, records=records, labels=labels)
    sampler, view = sampler_of(data, lanes=1, global_batch=4, window=4), view_in(data, size=8)
    with Loader(data.folder, manifest, sampler, view=view) as loader:
        before = max(pool.data.nbytes for pool in loader._reader._pools)
        check(data, view, sampler, take(loader, sampler.steps))
        assert max(pool.data.nbytes for pool in loader._reader._pools) > before
