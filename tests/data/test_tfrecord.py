"""TFRecord files and the messages in them are read as PyPI's tfrecord and protobuf write them, or refused by place."""

import contextlib
import re
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tfrecord import example_pb2
from tfrecord.reader import tfrecord_iterator

from dpnn.data.pack import protobuf
from dpnn.data.pack.extents import as_extents
from dpnn.data.pack.tfrecord import TFRecords, masked_crc, scan
from dpnn.errors import DataError


def framed(payload):
    header = struct.pack("<Q", len(payload))
    crcs = (struct.pack("<I", masked_crc(part)) for part in (header, payload))
    return header + next(crcs) + payload + next(crcs)


def records(path):
    """All records of a file, as they are read one by one after listing."""
    found = [(0, offset, nbytes) for offset, nbytes, _ in scan(path, 0)]
    reader = TFRecords([path], *as_extents(found))
    return [reader.read(i) for i in range(len(reader))]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(framed(b"first") + framed(b"") + framed(bytes(range(200))))
    return path


def test_records_are_those_that_another_reader_finds(file):
    assert records(file) == [bytes(record) for record in tfrecord_iterator(str(file))]
    assert records(file) == [b"first", b"", bytes(range(200))]


def test_listing_gives_the_beginning_of_each_record(file):
    listed = list(scan(file, 10))
    assert [(offset, nbytes) for offset, nbytes, _ in listed] == [(12, 5), (33, 0), (49, 200)]
    assert listed[0][2].startswith(b"first")
    assert listed[2][2] == bytes(range(14))


@pytest.mark.parametrize("cut", [1, 11, 12, 14, 20, 30, 252])
def test_a_truncated_file_is_refused_with_the_byte_where_its_last_record_begins(file, cut):
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    begins = 0 if cut < 21 else 21 if cut < 37 else 37
    with pytest.raises(DataError, match=rf"a\.tfrecord, byte {begins}: .*copy it again"):
        list(scan(file, 100))


def test_an_empty_and_a_compressed_file_are_told(tmp_path):
    (tmp_path / "none").write_bytes(b"")
    (tmp_path / "packed").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(DataError, match="none is empty"):
        list(scan(tmp_path / "none", 0))
    with pytest.raises(DataError, match=r"packed, byte 0: .*compressed; unpack it first"):
        list(scan(tmp_path / "packed", 0))


def test_a_damaged_record_is_refused_when_it_is_read_and_the_others_are_not(file):
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)
    reader = TFRecords([file], *as_extents([(0, a, n) for a, n, _ in scan(file, 0)]))
    assert reader.read(0) == b"first"
    with pytest.raises(DataError, match=r"a\.tfrecord, byte 49: the record is damaged"):
        reader.read(2)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 252), byte=st.integers(1, 255), cut=st.none() | st.integers(0, 252))
def test_a_mutated_file_is_read_right_or_refused_by_its_name(file, at, byte, cut):
    whole = framed(b"first") + framed(b"") + framed(bytes(range(200)))
    data = bytearray(whole)
    data[at] ^= byte
    file.write_bytes(data[:cut])
    if data[:cut] == whole[: len(data[:cut])] and cut in (21, 37):  # between two records: there's nothing to see
        assert records(file) == [b"first", b""][: cut // 16]
    else:
        with pytest.raises(DataError, match=re.escape(str(file))):
            records(file)


lists = st.one_of(
    st.builds(
        lambda v: example_pb2.Feature(int64_list=example_pb2.Int64List(value=v)),
        st.lists(st.integers(-(1 << 63), (1 << 63) - 1)),
    ),
    st.builds(
        lambda v: example_pb2.Feature(float_list=example_pb2.FloatList(value=v)),
        st.lists(st.floats(width=32, allow_nan=False)),
    ),
    st.builds(lambda v: example_pb2.Feature(bytes_list=example_pb2.BytesList(value=v)), st.lists(st.binary())),
)
READERS = {
    "int64_list": protobuf.integers,
    "float_list": lambda *place: protobuf.numbers(*place).tolist(),
    "bytes_list": protobuf.strings,
}


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), lists, max_size=4))
def test_features_are_what_protobuf_wrote(features):
    message = example_pb2.Features(feature=features)
    data = message.SerializeToString()
    found = {key.decode(): (lo, hi) for key, lo, hi in protobuf.entries(data, 0, len(data))}
    assert found.keys() == features.keys()
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        assert READERS[kind](data, *found[name]) == list(getattr(feature, kind).value)
        others = {other: read for other, read in READERS.items() if other != kind}
        for read in others.values():
            with pytest.raises(protobuf.Malformed, match="a list of another type"):
                read(data, *found[name])


def test_integers_that_are_not_packed_are_read_too():
    assert protobuf.integers(bytes([0x1A, 7, 8, 5, 8, 0x82, 1, 8, 7]), 0, 9) == [5, 130, 7]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_malformed(data):
    for read in (*READERS.values(), lambda *place: list(protobuf.entries(*place)), lambda *p: protobuf.rows(*p, 3)):
        with contextlib.suppress(protobuf.Malformed):
            read(data, 0, len(data))


@pytest.mark.parametrize("frames", [0, 1, 300])
def test_frames_are_read_as_one_array(frames):
    x = np.random.default_rng(0).integers(0, 256, (frames, 128)).astype(np.uint8)
    data = feature_list([row.tobytes() for row in x])
    np.testing.assert_array_equal(protobuf.rows(data, 0, len(data), 128), x)


@pytest.mark.parametrize("values", [[b"abc", b"ab"], [b"ab", b"abc"], [b"ab", b"ab"], [b"abc" * 50, b"abc"]])
def test_frames_of_another_width_are_refused(values):
    data = feature_list(values)
    with pytest.raises(protobuf.Malformed, match="aren't each one value of 3 bytes"):
        protobuf.rows(data, 0, len(data), 3)


def feature_list(values):
    features = [example_pb2.Feature(bytes_list=example_pb2.BytesList(value=[value])) for value in values]
    return example_pb2.FeatureList(feature=features).SerializeToString()
