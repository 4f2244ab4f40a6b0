"""Pictures and frames are packed as they are, or smaller, or decoded; each was decoded once, and bad ones are named."""

import csv
import itertools

import numpy as np
import pytest

from dpnn.data import Manifest, check_shards
from dpnn.data.decode import centre_crop, decode, encode, resize_shorter
from dpnn.data.pack import pack
from dpnn.data.pack.formats import Format, Options
from dpnn.data.pack.moments import Running, Sums, merged
from dpnn.data.reader import ShardReader
from dpnn.errors import DataError, JobError
from tests.data import packing

FILES = Options(format="files")

# packing registers its format where it is imported
assert packing


def noise(number, height, width):
    """A smooth picture, so that JPEG keeps its mean."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.ascontiguousarray(resize_shorter(coarse, max(height, width))[:height, :width])


@pytest.fixture
def pictures(tmp_path):
    """70 JPEGs of several sizes for training, 10 for testing."""
    folder = tmp_path / "pictures"
    for part, count in (("train", 70), ("test", 10)):
        (folder / part).mkdir(parents=True)
        for i in range(count):
            name = folder / part / f"{i % 3}-{i:03d}.jpg"
            name.write_bytes(encode(noise(i, 20 + i % 7, 30 + i % 11)))
    (folder / "shape").write_text("picture")
    return folder


def records(folder):
    """All records by id, and their labels."""
    manifest = Manifest.read(folder)
    check_shards(folder, manifest)
    reader = ShardReader(folder, manifest)
    found, labels = {}, {}
    for shard, entry in enumerate(manifest.shards):
        index = reader.index(shard)
        blocks = range(-(-entry.samples // manifest.block))
        kept = itertools.chain.from_iterable(reader.read_records(shard, block) for block in blocks)
        found |= dict(zip(index.ids.tolist(), map(bytes, kept), strict=True))
        labels |= dict(zip(index.ids.tolist(), index.labels.tolist(), strict=True))
    reader.close()
    assert len(found) == manifest.samples
    return found, labels


def paths_of(folder, part="train"):
    return sorted((folder / part).iterdir())


def test_pictures_are_kept_byte_for_byte_with_the_moments_of_their_pixels(tmp_path, pictures):
    pack(str(pictures), tmp_path / "out", options=FILES, shard_mb=0.02)
    manifest = Manifest.read(tmp_path / "out/train")
    assert (manifest.kind, manifest.codec, manifest.shape) == ("encoded", "image", ())
    assert manifest.class_names == ("ant", "bee", "cat")
    assert len(manifest.shards) > 2
    found, labels = records(tmp_path / "out/train")
    paths = paths_of(pictures)
    assert sorted(found) == list(range(70))
    assert all(found[i] == path.read_bytes() for i, path in enumerate(paths))
    assert all(labels[i] == int(path.name[0]) for i, path in enumerate(paths))
    pixels = np.concatenate([decode(path.read_bytes()).reshape(-1, 3) for path in paths])
    assert manifest.mean == pytest.approx(pixels.mean(0), rel=1e-12)
    assert manifest.std == pytest.approx(pixels.std(0), rel=1e-12)
    assert list(manifest.histogram) == np.bincount([int(path.name[0]) for path in paths]).tolist()
    assert len(records(tmp_path / "out/test")[0]) == 10
    assert not (tmp_path / "out/train/rejected.csv").exists()


def test_only_larger_pictures_are_made_smaller(tmp_path, pictures):
    pack(str(pictures), tmp_path / "out", options=FILES, shorter_side=22)
    found, _ = records(tmp_path / "out/train")
    smaller = 0
    for i, path in enumerate(paths_of(pictures)):
        before = decode(path.read_bytes())
        if min(before.shape[:2]) <= 22:
            assert found[i] == path.read_bytes()
        else:
            smaller += 1
            assert found[i] == encode(resize_shorter(before, 22), quality=95)
    assert smaller


def test_pictures_are_stored_decoded_as_squares(tmp_path, pictures):
    pack(str(pictures), tmp_path / "out", options=FILES, raw=16, shard_mb=0.02)
    manifest = Manifest.read(tmp_path / "out/train")
    assert (manifest.kind, manifest.codec, manifest.shape, manifest.dtype) == ("raw", "", (16, 16, 3), "uint8")
    check_shards(tmp_path / "out/train", manifest)
    reader = ShardReader(tmp_path / "out/train", manifest)
    paths = paths_of(pictures)
    squares = [centre_crop(resize_shorter(decode(path.read_bytes()), 16), 16) for path in paths]
    seen = 0
    for shard, entry in enumerate(manifest.shards):
        x = np.empty((entry.samples, 16, 16, 3), np.uint8)
        reader.read_blocks(shard, 0, x)
        for number, square in zip(reader.index(shard).ids, x, strict=True):
            assert np.array_equal(square, squares[number])
            seen += 1
    reader.close()
    assert seen == 70
    assert manifest.mean == pytest.approx(np.stack(squares).mean((0, 1, 2)), rel=1e-12)


def test_bad_pictures_are_left_out_and_named(tmp_path, pictures):
    paths = paths_of(pictures)
    whole = paths[5].read_bytes()
    paths[5].write_bytes(whole[: len(whole) // 2])
    paths[6].write_bytes(b"")
    paths[7].write_bytes(b"<html>not found</html>")
    paths[8].unlink()
    paths[8].mkdir()
    summary = str(pack(str(pictures), tmp_path / "out", options=FILES, shard_mb=0.02))
    found, labels = records(tmp_path / "out/train")
    assert sorted(found) == [i for i in range(70) if i not in (5, 6, 7, 8)]
    assert all(found[i] == paths[i].read_bytes() for i in found)
    assert all(labels[i] == int(paths[i].name[0]) for i in found)
    manifest = Manifest.read(tmp_path / "out/train")
    assert manifest.samples == 66 == sum(manifest.histogram)
    with open(tmp_path / "out/train/rejected.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "reason"]
    assert [row[0] for row in rows] == [str(path) for path in paths[5:9]]
    assert "damaged" in rows[0][1]
    assert [rows[i][1] for i in (1, 3)] == ["it is empty", "it is a folder"]
    assert f"4 left out, named in {tmp_path}/out/train/rejected.csv: " in summary
    assert "1 x it is empty" in summary
    assert not (tmp_path / "out/test/rejected.csv").exists()


def test_a_bad_picture_ends_the_packing_where_that_is_asked_for(tmp_path, pictures):
    path = paths_of(pictures)[5]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path}: it is empty; mend it, or use --on-bad reject"):
        pack(str(pictures), tmp_path / "out", options=FILES, on_bad="stop", shard_mb=0.01)
    assert not (tmp_path / "out/train/manifest.json").exists()
    # What was packed until then stands; a packing that left the sample out isn't taken for one without bad samples.
    pack(str(pictures), tmp_path / "out", options=FILES, shard_mb=0.01)
    assert Manifest.read(tmp_path / "out/train").samples == 69


def test_shards_without_a_good_sample_are_left_out(tmp_path, pictures):
    for path in paths_of(pictures)[1:]:
        path.write_bytes(b"")
    pack(str(pictures), tmp_path / "out", options=FILES, shard_mb=1e-5)
    manifest = Manifest.read(tmp_path / "out/train")
    assert (manifest.samples, len(manifest.shards)) == (1, 1)
    assert list((tmp_path / "out/train").glob("*.h5")) == [tmp_path / "out/train" / manifest.shards[0].name]
    assert sorted(records(tmp_path / "out/train")[0]) == [0]


def test_a_part_without_a_good_sample_is_an_error(tmp_path, pictures):
    paths = paths_of(pictures, "test")
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(
        DataError, match=rf"all 10 samples for .*out/test are bad; the first is {paths[0]}: it is empty"
    ):
        pack(str(pictures), tmp_path / "out", options=FILES)
    assert not (tmp_path / "out/train/manifest.json").exists()


@pytest.fixture
def videos(tmp_path):
    """90 samples of 1 to 9 frames of 6 numbers."""
    folder, rng = tmp_path / "videos", np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for i in range(90):
        frames = rng.integers(0, 256, (rng.integers(1, 10), 6)).astype(np.uint8)
        (folder / "train" / f"{i % 3}-{i:03d}").write_bytes(frames.tobytes())
    (folder / "shape").write_text("6")
    return folder


def test_frames_are_kept_with_the_moments_of_each_of_their_numbers(tmp_path, videos):
    pack(str(videos), tmp_path / "out", options=FILES, test_fraction=0.2)
    manifest = Manifest.read(tmp_path / "out/train")
    assert (manifest.kind, manifest.codec, manifest.shape) == ("encoded", "frames", (6,))
    train, test = (records(tmp_path / "out" / part)[0] for part in ("train", "test"))
    assert (len(train), len(test)) == (72, 18)
    paths = paths_of(videos)
    assert {i: path.read_bytes() for i, path in enumerate(paths)} == train | test
    frames = np.frombuffer(b"".join(train.values()), np.uint8).reshape(-1, 6)
    assert manifest.mean == pytest.approx(frames.mean(0), rel=1e-12)
    assert manifest.std == pytest.approx(frames.std(0), rel=1e-12)


def test_records_that_are_no_frames_are_left_out(tmp_path, videos):
    paths = paths_of(videos)
    paths[3].write_bytes(b"")
    paths[4].write_bytes(bytes(13))
    pack(str(videos), tmp_path / "out", options=FILES)
    rows = (tmp_path / "out/train/rejected.csv").read_text().splitlines()[1:]
    assert rows == [f"{paths[3]},its 0 bytes are no frames of 6", f"{paths[4]},its 13 bytes are no frames of 6"]


def test_arrays_that_can_be_read_only_in_part_are_packed_in_part(tmp_path, monkeypatch):
    class Torn(packing.Files):
        def __init__(self):
            self.shape, self.dtype = (4,), np.dtype("float32")

        def read(self, numbers):
            if 17 in numbers:
                raise DataError("rows[17] holds a number that isn't finite")
            return np.repeat(numbers[:, None], 4, axis=1).astype(np.float32)

        def name(self, number):
            return f"rows[{number}]"

    split = packing.Split("train", Torn(), np.zeros(100, np.int32), np.arange(100, dtype=np.uint64))
    monkeypatch.setitem(
        packing.FORMATS, "torn", Format(lambda path, options: packing.Source([split], 1), lambda path: False)
    )
    pack(str(tmp_path), tmp_path / "out", options=Options(format="torn"))
    manifest = Manifest.read(tmp_path / "out/train")
    assert manifest.samples == 99
    kept = np.delete(np.arange(100.0), 17)
    assert manifest.mean == pytest.approx([kept.mean()] * 4)
    assert manifest.std == pytest.approx([kept.std()] * 4)
    rows = (tmp_path / "out/train/rejected.csv").read_text().splitlines()
    assert rows == ["name,reason", "rows[17],holds a number that isn't finite"]


@pytest.mark.parametrize("option", ["shorter_side", "raw"])
def test_options_for_pictures_are_refused_for_other_samples(tmp_path, videos, option):
    with pytest.raises(JobError, match=rf"--{option.replace('_', '-')} 8 is for picture files"):
        pack(str(videos), tmp_path / "out", options=FILES, **{option: 8})
    assert not (tmp_path / "out").exists()


def test_a_file_whose_name_is_no_text_is_named_in_the_list(tmp_path, pictures):
    paths_of(pictures)[0].rename(pictures / "train" / "0-\udcff\n.jpg")
    (pictures / "train" / "0-\udcff\n.jpg").write_bytes(b"")
    pack(str(pictures), tmp_path / "out", options=FILES)
    with open(tmp_path / "out/train/rejected.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[1] == [f"{pictures}/train/0-\\xff\n.jpg", "it is empty"]


def test_whole_numbers_are_summed_exactly_in_any_order_and_shape():
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((1, 1), (700, 900), (3, 511), (64, 64))]
    everything = np.concatenate([sample.reshape(-1, 3) for sample in samples]).astype(np.int64)
    for order in itertools.permutations(samples):
        whole = merged(map(Sums.of, order))
        assert whole.sums == everything.sum(0).tolist()
        assert whole.squares == (everything**2).sum(0).tolist()


def test_moments_of_floats_do_not_cancel():
    values = np.random.default_rng(0).normal(1e6, 1e-2, (1000, 2))
    whole = merged(Running.of(values[lo : lo + 70]) for lo in range(0, 1000, 70))
    assert whole.mean == pytest.approx(values.mean(0), rel=1e-12)
    assert whole.std == pytest.approx(values.std(0), rel=1e-6)
