"""A shard comes back as it was written, or not at all."""

import errno
import os
import shutil

import h5py
import msgspec
import numpy as np
import pytest
from isal.isal_zlib import crc32

from dpnn.data import Manifest, ShardReader, check_shards
from dpnn.data import reader as reader_module
from dpnn.data.labels import Lists
from dpnn.data.manifest import Content, Shard
from dpnn.data.shards import open_shard, read_outside
from dpnn.data.writer import write_shard
from dpnn.errors import DataError

from .conftest import flip


@pytest.fixture
def data(write_folder):
    return write_folder()


@pytest.fixture
def doctored(data):
    """Change a shard with h5py and let the manifest agree, as if it had been written so."""

    def doctor(change, number=0):
        path = data.folder / data.manifest.shards[number].name
        with h5py.File(path, "r+") as file:
            change(file)
        return entry_of(data, path, number)

    return doctor


def entry_of(data, path, number):
    """The folder's manifest with size and digest of a shard as they are now."""
    shards = list(data.manifest.shards)
    shards[number] = msgspec.structs.replace(shards[number], bytes=path.stat().st_size)
    file = open_shard(path)
    digest = read_outside(file, path, shards[number]).digest
    os.close(file)
    shards[number] = msgspec.structs.replace(shards[number], digest=digest)
    return msgspec.structs.replace(data.manifest, shards=tuple(shards))


def replace_dataset(name, make):
    def change(file):
        values = file[name][...]
        del file[name]
        make(file, values)

    return change


def read_blocks(reader, number, out):
    """The first samples of a shard, with their checksums."""
    for found in reader.read_blocks(number, 0, len(out), out.data.cast("B")).values():
        raise reader.refusal(number, found)


def read_all(folder, manifest):
    """All samples through whole blocks."""
    reader = ShardReader(folder, manifest)
    parts = []
    try:
        for number, shard in enumerate(manifest.shards):
            parts.append(np.empty((shard.samples, *manifest.shape), manifest.dtype))
            read_blocks(reader, number, parts[-1])
    finally:
        reader.close()
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("shape", [(4, 3, 2), (11,), (2, 3, 4, 5)])
def test_samples_labels_and_ids_come_back(write_folder, dtype, shape):
    data = write_folder(dtype=dtype, shape=shape)
    manifest = Manifest.read(data.folder)
    assert manifest == data.manifest
    check_shards(data.folder, manifest)
    assert np.array_equal(read_all(data.folder, manifest), data.x)
    reader = ShardReader(data.folder, manifest)
    indexes = [reader.index(number) for number in range(3)]
    assert np.array_equal(np.concatenate([index.labels for index in indexes]), data.labels)
    assert np.array_equal(np.concatenate([index.ids for index in indexes]), data.ids)
    out = np.empty(shape, dtype)
    reader.read_samples(2, 63, 64, out.data.cast("B"))
    assert np.array_equal(out, data.x[-1])
    reader.close()


def test_several_labels_a_sample_come_back(write_folder):
    data = write_folder(multi=True)
    check_shards(data.folder, data.manifest)
    reader = ShardReader(data.folder, data.manifest)
    joined = Lists.join([reader.index(number).labels for number in range(3)])
    reader.close()
    assert np.array_equal(joined.indptr, data.labels.indptr)
    assert np.array_equal(joined.indices, data.labels.indices)


def test_a_shard_whose_samples_have_no_label_at_all_comes_back(tmp_path):
    content = Content(kind="raw", shape=(2,), labels="multi", num_classes=3, block=4)
    none = Lists(np.zeros(6, np.int64), np.zeros(0, np.int32))
    shard = write_shard(tmp_path / "a.h5", content, none, np.arange(5), [np.ones((4, 2)), np.ones((1, 2))])
    manifest = manifest_of(content, shard, mean=(1.0, 1.0), std=(0.0, 0.0))
    check_shards(tmp_path, manifest)


def manifest_of(content, *shards, mean=(0.0,) * 3, std=(1.0,) * 3):
    return Manifest(
        **msgspec.structs.asdict(content), samples=sum(shard.samples for shard in shards),
        histogram=(0,) * content.num_classes, mean=mean, std=std, shards=shards,
    )  # fmt: skip


def write_encoded(folder, records, block=4):
    content = Content(kind="encoded", codec="image", labels="single", num_classes=2, block=block)
    labels, ids = np.zeros(len(records), np.int32), np.arange(len(records))
    blocks = [records[lo : lo + block] for lo in range(0, len(records), block)]
    shard = write_shard(folder / "a.h5", content, labels, ids, blocks)
    return manifest_of(content, shard)


def test_encoded_samples_come_back_as_stored(tmp_path):
    records = [bytes([i]) * (i + 1) for i in range(10)]
    manifest = write_encoded(tmp_path, records)
    check_shards(tmp_path, manifest)
    reader = ShardReader(tmp_path, manifest)
    assert [record for block in range(3) for record in reader.read_records(0, block)] == records
    flip(tmp_path / "a.h5", manifest.shards[0].payload_offset + 20)
    with pytest.raises(DataError, match=r"a\.h5, bytes: the block of the samples 4 to 7 is damaged"):
        reader.read_records(0, 1)
    reader.close()


def test_a_single_record_is_found_without_reading_the_whole_index_again(tmp_path, monkeypatch):
    records = [bytes([i]) * (i + 1) for i in range(10)]
    manifest = write_encoded(tmp_path, records)
    reader = ShardReader(tmp_path, manifest)
    reader.check(0)  # and doesn't keep its index
    whole, read_outside = [], reader_module.shards.read_outside
    monkeypatch.setattr(
        reader_module.shards, "read_outside", lambda *args: whole.append(args[1]) or read_outside(*args)
    )
    for i, record in enumerate(records):
        lo, hi = reader.span(0, i, i + 1)
        out = bytearray(hi - lo)
        reader.read_samples(0, i, i + 1, memoryview(out))
        assert out == record
    assert whole == []
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["offsets"][4] = 10**6  # damaged since
    with pytest.raises(DataError, match="the labels, ids or metadata are damaged"):
        reader.span(0, 3, 4)
    reader.close()


@pytest.mark.parametrize(("offsets", "message"), [
    ([0, 1, 3, 2, 10], r"offsets\[2:4\] = \[3, 2\]: the record has a negative length"),
    ([0, 1, 3, 3, 10], r"offsets\[2:4\] = \[3, 3\]: the record is empty"),
    ([0, 1, 3, 6, 11], r"offsets runs from 0 to 11 instead of 0 to 10"),
])  # fmt: skip
def test_offsets_that_do_not_rise_to_the_end_are_refused(tmp_path, offsets, message):
    manifest = write_encoded(tmp_path, [b"a", b"bb", b"ccc", b"dddd"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["offsets"][...] = offsets
    data = type("Data", (), {"manifest": manifest})
    with pytest.raises(DataError, match=message):
        check_shards(tmp_path, entry_of(data, tmp_path / "a.h5", 0))


def test_any_tool_sees_plain_contiguous_datasets(data):
    with h5py.File(data.folder / data.manifest.shards[2].name) as file:
        assert np.array_equal(file["x"][...], data.x[42:])
        assert np.array_equal(file["y"][...], data.labels[42:])
        assert file["block_crc32"][3] == crc32(data.x[42 + 24 : 42 + 32].tobytes())
        for dataset in file.values():
            assert dataset.chunks is None
            assert dataset.id.get_offset() is not None
        assert dict(file.attrs) == {
            "format": "dpnn-shard", "version": 1, "num_samples": 64, "num_classes": 7, "block": 8,
            "uuid": data.manifest.shards[2].uuid, "complete": 1,
        }  # fmt: skip


def test_a_large_payload_is_aligned_to_pages(write_folder):
    data = write_folder(counts=(300,), shape=(16, 16, 3), block=64)
    assert data.manifest.shards[0].payload_offset % 4096 == 0


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_a_truncated_shard_is_refused_before_training(data, part):
    path = data.folder / data.manifest.shards[1].name
    size = path.stat().st_size
    os.truncate(path, int(size * part))
    with pytest.raises(DataError, match=rf"{path.name} has {int(size * part)} bytes, .* {size}: it is truncated; copy"):
        check_shards(data.folder, data.manifest)


def test_a_missing_shard_is_refused(data):
    path = data.folder / data.manifest.shards[2].name
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: the manifest names this shard, but it is missing; copy"):
        check_shards(data.folder, data.manifest)


def test_each_replica_checks_its_own_part_of_the_shards(data):
    (data.folder / data.manifest.shards[2].name).unlink()
    check_shards(data.folder, data.manifest, 0, 3)
    check_shards(data.folder, data.manifest, 1, 3)
    with pytest.raises(DataError, match="missing"):
        check_shards(data.folder, data.manifest, 2, 3)


def test_any_flipped_byte_is_found(data):
    """In the payload when its block is read; anywhere else before training."""
    shard = data.manifest.shards[0]
    path = data.folder / shard.name
    whole = path.read_bytes()
    payload = range(shard.payload_offset, shard.payload_offset + shard.payload_bytes)
    for at in [*range(0, len(whole), 97), payload[0], payload[-1], payload[-1] + 1, len(whole) - 1]:
        flip(path, at)
        if at in payload:
            check_shards(data.folder, data.manifest)
            block = (at - payload[0]) // (8 * data.manifest.sample_nbytes)
            message = rf"{path.name}, x: the block of the samples {8 * block} to {min(8 * block + 7, 36)} is damaged"
            with pytest.raises(DataError, match=message):
                read_all(data.folder, data.manifest)
        else:
            with pytest.raises(DataError, match=rf"{path.name}: the labels, ids or metadata are damaged"):
                check_shards(data.folder, data.manifest)
        path.write_bytes(whole)
    check_shards(data.folder, data.manifest)


def test_two_shards_exchanged_are_noticed(data, write_folder):
    other = write_folder(name="other", classes=6)
    shutil.copy(other.folder / other.manifest.shards[0].name, data.folder / data.manifest.shards[0].name)
    with pytest.raises(DataError, match="or it is another file"):
        check_shards(data.folder, data.manifest)


def test_a_shard_that_the_manifest_does_not_name_is_noticed(data):
    shutil.copy(data.folder / data.manifest.shards[0].name, data.folder / "train-00007-of-00009.h5")
    with pytest.raises(DataError, match=r"holds train-00007-of-00009\.h5, which its manifest doesn't name; remove it"):
        check_shards(data.folder, data.manifest)


def test_leftover_temporary_files_are_ignored(data):
    (data.folder / ".train-00001-of-00003.h5.123.tmp").write_bytes(b"half a shard")
    check_shards(data.folder, data.manifest)


def bad_label(file):
    file["y"][5] = 7


def negative_label(file):
    file["y"][6] = -1


def two_ids(file):
    file["id"][9] = file["id"][4]


def other_attribute(name, value):
    def change(file):
        file.attrs[name] = value

    return change


def no_attribute(name):
    def change(file):
        del file.attrs[name]

    return change


def without(name):
    def change(file):
        del file[name]

    return change


def moved_payload(file):
    file["new"] = file["x"][...]
    del file["x"]
    file.move("new", "x")


WRONG = {
    "label too large": (bad_label, r"y\[5\] = 7: the label of sample 5 is not in 0\.\.6"),
    "label negative": (negative_label, r"y\[6\] = -1: the label of sample 6 is not in 0\.\.6"),
    "ids twice": (two_ids, r"id\[4\] = \d+ stands there twice"),
    "uuid": (other_attribute("uuid", "0" * 32), "attribute uuid = '0{32}' instead of"),
    "classes": (other_attribute("num_classes", 8), "attribute num_classes = .*8.* instead of 7"),
    "version": (other_attribute("version", 2), "attribute version = .*2.* instead of 1"),
    "not complete": (no_attribute("complete"), "has no attribute 'complete': it was never completed"),
    "foreign": (no_attribute("format"), "has no attribute 'format': it is no shard of dpnn's"),
    "no labels": (without("y"), "has no dataset 'y'"),
    "no payload": (without("x"), "has no dataset 'x'"),
    "labels of another type": (
        replace_dataset("y", lambda file, y: file.create_dataset("y", data=y.astype(np.int64))),
        "y has the type <i8 instead of int32",
    ),
    "big-endian": (
        replace_dataset("y", lambda file, y: file.create_dataset("y", data=y.astype(">i4"))),
        "y has the type >i4 instead of int32",
    ),
    "too few labels": (
        replace_dataset("y", lambda file, y: file.create_dataset("y", data=y[:-1])),
        r"y has the shape \(36,\) instead of the shape \(37,\)",
    ),
    "chunked": (
        replace_dataset("id", lambda file, ids: file.create_dataset("id", data=ids, chunks=(8,))),
        "id is not contiguous",
    ),
    "never written": (
        replace_dataset("id", lambda file, ids: file.create_dataset("id", ids.shape, ids.dtype)),
        "id is not contiguous, or was never written",
    ),
    "payload elsewhere": (moved_payload, "the payload begins at byte"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_shard_that_breaks_the_format_is_refused(data, doctored, what):
    change, message = WRONG[what]
    with pytest.raises(DataError, match=message) as raised:
        check_shards(data.folder, doctored(change))
    assert str(raised.value).startswith(str(data.folder / data.manifest.shards[0].name))


def test_of_very_many_shards_the_digests_are_compared_and_the_rest_is_checked_when_they_are_read(data, monkeypatch):
    monkeypatch.setattr(reader_module, "MOST_WHOLE", 1)
    path = data.folder / data.manifest.shards[1].name
    with h5py.File(path, "r+") as file:
        file["y"][2] = 7
    with pytest.raises(DataError, match="the labels, ids or metadata are damaged"):
        check_shards(data.folder, data.manifest)
    wrong = entry_of(data, path, 1)
    check_shards(data.folder, wrong)
    reader = ShardReader(data.folder, wrong)
    with pytest.raises(DataError, match=r"y\[2\] = 7: the label of sample 2 is not in 0\.\.6"):
        reader.index(1)
    reader.close()


def test_a_list_of_labels_that_breaks_the_format_is_refused(write_folder):
    data = write_folder(multi=True)
    path = data.folder / data.manifest.shards[0].name
    last = int(data.labels.indptr[4])
    assert data.labels.indptr[5] > last
    with h5py.File(path, "r+") as file:
        file["y_indices"][last] = 7
    with pytest.raises(DataError, match=rf"y_indices\[{last}\] = 7: the label of sample 4 is not in 0\.\.6"):
        check_shards(data.folder, entry_of(data, path, 0))
    with h5py.File(path, "r+") as file:
        file["y_indptr"][3] = 10**6
    with pytest.raises(DataError, match=r"y_indptr\[3:5\] = .*: the record has a negative length"):
        check_shards(data.folder, entry_of(data, path, 0))


def test_what_is_no_hdf5_file_is_refused(data):
    path = data.folder / data.manifest.shards[0].name
    path.write_bytes(b"no HDF5" * 2000)
    with pytest.raises(DataError, match=rf"{path.name} can't be opened as HDF5"):
        check_shards(data.folder, entry_of(data, path, 0))


def test_a_shard_that_shrinks_while_it_is_read_is_an_error_and_no_crash(data):
    reader = ShardReader(data.folder, data.manifest)
    reader.index(0)
    os.truncate(data.folder / data.manifest.shards[0].name, data.manifest.shards[0].payload_offset + 100)
    out = np.empty((8, 4, 3, 2), np.uint8)
    with pytest.raises(DataError, match=r"train-00000-of-00003\.h5 shrank while being read: nothing at byte \d+"):
        read_blocks(reader, 0, out)
    reader.close()


def test_short_reads_go_on_where_they_ended(data, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:7]], at))
    assert np.array_equal(read_all(data.folder, data.manifest), data.x)


def test_a_stale_handle_is_opened_again_once(data, monkeypatch):
    preadv, stale = os.preadv, []

    def once(file, buffers, at):
        if not stale:
            stale.append(file)
            raise OSError(errno.ESTALE, "Stale file handle")
        return preadv(file, buffers, at)

    reader = ShardReader(data.folder, data.manifest)
    reader.index(0)
    monkeypatch.setattr(os, "preadv", once)
    out = np.empty((8, 4, 3, 2), np.uint8)
    read_blocks(reader, 0, out)
    assert stale
    assert np.array_equal(out, data.x[:8])
    reader.close()


def test_few_files_are_open_and_few_indexes_kept(data, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_FILES", 2)
    monkeypatch.setattr(reader_module, "INDEX_NBYTES", 1)
    opened = []
    format_ = reader_module.shards
    read_layout = format_.read_layout
    monkeypatch.setattr(format_, "read_layout", lambda path, *args: opened.append(path) or read_layout(path, *args))
    before = len(os.listdir("/proc/self/fd"))
    reader = ShardReader(data.folder, data.manifest)
    for _ in range(3):
        for number, (lo, hi) in enumerate(zip(data.cuts[:-1], data.cuts[1:], strict=True)):
            out = np.empty((hi - lo, 4, 3, 2), np.uint8)
            read_blocks(reader, number, out)
            assert np.array_equal(out, data.x[lo:hi])
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert len(opened) == 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_label_out_of_range_is_not_written(tmp_path):
    content = Content(kind="raw", shape=(2,), labels="single", num_classes=3, block=4)
    with pytest.raises(DataError, match=r"y\[1\] = 3: the label of sample 1 is not in 0\.\.2"):
        write_shard(tmp_path / "a.h5", content, np.array([0, 3]), np.arange(2), [np.ones((2, 2))])
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    content = Content(kind="raw", shape=(2,), labels="single", num_classes=3, block=4)

    def blocks():
        yield np.ones((4, 2))
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shard(tmp_path / "a.h5", content, np.zeros(8, np.int32), np.arange(8), blocks())
    assert not list(tmp_path.iterdir())


def test_the_entry_names_the_payload(data):
    for number, shard in enumerate(data.manifest.shards):
        assert isinstance(shard, Shard)
        payload = (data.folder / shard.name).read_bytes()[shard.payload_offset :][: shard.payload_bytes]
        assert payload == data.x[data.cuts[number] : data.cuts[number + 1]].tobytes()
