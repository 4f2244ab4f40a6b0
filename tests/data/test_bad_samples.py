"""What becomes of samples that can't be used: an error that names them, or others take their places, and are told."""

import itertools
import re

import numpy as np
import pytest

from dpnn.data import Bad, Loader, Sampler, Skipped, view_of
from dpnn.errors import DataError
from tests.pictures import jpegs, write_encoded

from .conftest import take

pytestmark = pytest.mark.timeout(60)

COUNTS, BLOCK = (29, 12, 40), 8
CUTS = np.cumsum([0, *COUNTS])


def cut_short(record):
    """A JPEG without its end: its checksum in the shard is right."""
    return record[: len(record) // 2]


def flip(folder, manifest, shard, share):
    """Change a byte of a shard's payload."""
    entry = manifest.shards[shard]
    with (folder / entry.name).open("r+b") as file:
        file.seek(entry.payload_offset + int(entry.payload_bytes * share))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def write_pictures(tmp_path):
    """write_pictures(numbers of bad ones over all shards) -> (folder, manifest, labels)."""

    def write(*bad):
        records, labels = jpegs(sum(COUNTS))
        records = [cut_short(record) if number in bad else record for number, record in enumerate(records)]
        return tmp_path / "train", write_encoded(tmp_path / "train", records, labels, COUNTS, BLOCK), labels

    return write


def view_in(manifest, **options):
    return view_of(manifest, mean=manifest.mean, std=manifest.std, **options)


def epoch_of(folder, manifest, threads=2, replicas=1, view=None, **options):
    """An epoch's batches, those of all replicas joined: x, labels, ids, bad."""
    sampler = Sampler(manifest.counts, manifest.block, 6, 12, 9, seed=3)
    view = view or view_in(manifest, size=8)
    parts = []
    for replica in range(replicas):
        with Loader(
            folder, manifest, sampler, replica, replicas, view=view, threads=threads, skips=True, **options
        ) as loader:
            parts.append(take(loader, sampler.steps))
    steps = list(zip(*parts, strict=True))
    arrays = [[np.concatenate([getattr(b, name) for b in step]) for step in steps] for name in ("x", "labels", "ids")]
    return (*(np.concatenate(array) for array in arrays), [bad for step in steps for b in step for bad in b.bad])


def wanted_ids(manifest, replaced):
    """The ids of an epoch, where `replaced` says whose place is taken by whom, by numbers over all shards."""
    sampler = Sampler(manifest.counts, manifest.block, 6, 12, 9, seed=3)
    found = []
    for step in range(sampler.steps):
        shards, samples = sampler.epoch(0).samples(step, range(6))
        found += [replaced.get(number, number) for number in (CUTS[shards] + samples).tolist()]
    return np.array(found) + 1000


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
def test_a_record_that_is_no_picture_stops_with_its_name(write_pictures, window_mb):
    folder, manifest, _ = write_pictures(29 + 3)
    sampler = Sampler(manifest.counts, manifest.block, 6, 12, 9, seed=3)
    name = re.escape(str(folder / manifest.shards[1].name))
    with Loader(folder, manifest, sampler, view=view_in(manifest, size=8), threads=2, window_mb=window_mb) as loader:
        with pytest.raises(DataError, match=rf"{name}, sample 3 \(id 1032\): its JPEG data .*on_bad"):
            take(loader, sampler.steps)
        with pytest.raises(DataError, match="sample 3"):
            loader.next()


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_next_good_sample_of_the_block_takes_the_place_of_a_bad_one(write_pictures, window_mb, threads):
    # Alone; two in a row; the last of its block, so that the first one comes; the last of a short block.
    folder, manifest, labels = write_pictures(2, 12, 13, 23, 29 + 11)
    replaced = {2: 3, 12: 14, 13: 14, 23: 16, 40: 37}
    x, found_labels, ids, bad = epoch_of(folder, manifest, threads, window_mb=window_mb)
    wanted = wanted_ids(manifest, replaced)
    assert np.array_equal(ids, wanted)
    assert np.array_equal(found_labels, labels[wanted - 1000])
    assert sorted((b.id, b.sample) for b in bad) == [(1002, 2), (1012, 12), (1013, 13), (1023, 23), (1040, 11)]
    assert all("JPEG" in b.reason for b in bad)
    assert {b.file for b in bad} == {str(folder / shard.name) for shard in manifest.shards[:2]}
    # Without an augmentation a sample looks the same wherever it stands.
    where = {sample: place for place, sample in enumerate(ids.tolist())}
    assert all(np.array_equal(x[place], x[where[sample]]) for place, sample in enumerate(ids.tolist()))


@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_what_takes_a_place_is_the_same_for_any_number_of_threads_and_ranks(write_pictures, augment):
    folder, manifest, _ = write_pictures(2, 12, 13, 50, 80)
    flip(folder, manifest, 2, 0.5)
    view = view_in(manifest, size=8, augment=augment, seed=3)
    first, *others = [
        epoch_of(folder, manifest, threads, replicas, view) for threads, replicas in ((1, 1), (3, 1), (2, 3), (1, 6))
    ]
    assert len(first[3]) == 5 + 8
    for other in others:
        for one, same in itertools.zip_longest(first[:3], other[:3]):
            assert np.array_equal(one, same)
        assert first[3] == other[3]


def test_a_damaged_block_stops_with_its_name(write_pictures):
    folder, manifest, _ = write_pictures()
    flip(folder, manifest, 0, 0.01)
    sampler = Sampler(manifest.counts, manifest.block, 6, 12, 9, seed=3)
    with (
        Loader(folder, manifest, sampler, view=view_in(manifest, size=8)) as loader,
        pytest.raises(DataError, match=rf"{manifest.shards[0].name}, bytes: the block of the samples 0 to 7 is damag"),
    ):
        take(loader, sampler.steps)


@pytest.mark.parametrize("shape", [(4, 3, 2), (5,)])
def test_the_samples_of_a_damaged_block_are_replaced_by_the_next_block(write_folder, shape):
    data = write_folder(counts=COUNTS, shape=shape)
    flip(data.folder, data.manifest, 0, 0.99)  # the last block of a shard, so that the first one comes
    flip(data.folder, data.manifest, 2, 0.01)
    view = view_in(data.manifest)
    x, labels, ids, bad = epoch_of(data.folder, data.manifest, view=view)
    lost = [*range(24, 29), *range(41, 49)]
    replaced = {number: 0 if number < 29 else 49 for number in lost}
    numbers = wanted_ids(data.manifest, replaced) - 1000
    assert np.array_equal(ids, data.ids[numbers])
    assert np.array_equal(labels, data.labels[numbers])
    wanted = np.empty(x.shape if len(shape) == 1 else (len(x), *shape), np.float32)
    view.put(data.x, numbers, view.draw(ids, 0), wanted)
    assert np.array_equal(x, wanted.transpose(0, 3, 1, 2) if len(shape) == 3 else wanted)
    assert sorted(b.id for b in bad) == sorted(data.ids[lost].tolist())
    assert all("is damaged (CRC32" in b.reason for b in bad)


def test_several_labels_move_with_their_sample(write_folder):
    data = write_folder(counts=COUNTS, multi=True)
    flip(data.folder, data.manifest, 2, 0.01)
    _, labels, ids, bad = epoch_of(data.folder, data.manifest, view=view_in(data.manifest))
    assert len(bad) == 8
    place = {sample: number for number, sample in enumerate(data.ids.tolist())}
    lists = data.labels[np.array([place[sample] for sample in ids.tolist()])]
    assert np.array_equal(np.nonzero(labels)[1], lists.indices)
    assert np.array_equal(labels.sum(1), np.diff(lists.indptr))


def test_a_shard_without_a_good_sample_is_an_error(write_pictures):
    folder, manifest, _ = write_pictures(*range(29, 41))
    with pytest.raises(DataError, match=rf"{manifest.shards[1].name}, sample \d+ .* has no good sample to take its pl"):
        epoch_of(folder, manifest)


def test_too_many_skipped_samples_are_an_error_on_ranks_that_met_one():
    skipped, idle = Skipped(3), Skipped(3)
    skipped.note([Bad("a.h5", 1, 11, "it is empty"), Bad("b.h5", 2, 22, "it is torn")])
    skipped.note([])
    skipped.check(3)
    idle.check(4)
    with pytest.raises(DataError, match=r"4 bad samples .*bad_limit = 3; .* b\.h5, sample 2 \(id 22\): it is torn"):
        skipped.check(4)
    skipped.check(6, epochs=2)
    with pytest.raises(DataError, match=r"7 bad samples were skipped in 2 epochs, and .*bad_limit = 3"):
        skipped.check(7, epochs=2)
