"""Shards on the nodes' own disks: who owns which of them, and which lanes are whose."""

import itertools
import os

import msgspec
import numpy as np
import pytest

from dpnn.data.manifest import Content, Manifest, Shard
from dpnn.data.owners import Owners, evenly, held, part
from dpnn.errors import DataError, JobError


def manifest_of(*counts):
    content = Content(kind="raw", shape=(1,), labels="single", num_classes=1, block=8)
    shards = tuple(
        Shard(name=f"s-{i}.h5", samples=n, bytes=n + 100, uuid=str(i), digest="", payload_offset=0, payload_bytes=n)
        for i, n in enumerate(counts)
    )
    return Manifest(
        **msgspec.structs.asdict(content), samples=sum(counts), histogram=(sum(counts),), mean=(0.0,), std=(1.0,),
        shards=shards,
    )  # fmt: skip


def parted(counts, holds, homes, lanes=0):
    return part("data", manifest_of(*counts), np.array(holds, bool), homes, lanes)


def test_a_shard_that_one_node_has_is_its_own_and_others_go_to_the_least_loaded():
    holds = [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    owners = parted([40, 30, 20, 10, 40], holds, homes=[0, 1])
    # 40 and 40 to begin with; then 30 to the one, 20 and 10 to the other.
    assert owners.shards in ((0, 0, 1, 1, 1), (0, 1, 0, 0, 1))
    assert owners.replicas == (0, 1)


def test_replicas_that_need_them_get_lanes_and_no_other_shards():
    owners = parted([10] * 8, [[1] * 8] * 2, homes=[0, 0, 0, 1])
    assert [owners.shards.count(owner) for owner in (0, 1)] == [4, 4]
    assert sorted(owners.lanes) == [1, 3]


def test_all_shards_of_a_shared_folder_are_dealt_out_evenly():
    owners = parted([100] * 90 + [37] * 10, [[1] * 100] * 10, homes=range(10))
    loads = np.bincount(owners.shards, manifest_of(*[100] * 90, *[37] * 10).counts)
    assert loads.tolist() == [937.0] * 10


def test_the_order_of_the_nodes_changes_nothing():
    holds = np.array([[1, 0, 0, 1, 1], [0, 1, 0, 0, 1], [0, 1, 1, 0, 0]], bool)
    counts, lanes = [30, 20, 10, 25, 5], 9
    one = parted(counts, holds, [0, 1, 2, 2], lanes)
    for order in itertools.permutations(range(3)):
        homes = [order.index(node) for node in (0, 1, 2, 2)]
        assert parted(counts, holds[list(order)], homes, lanes) == one
    assert one.digest != parted(counts, holds, [0, 1, 2, 2], lanes + 1).digest


def test_a_shard_that_no_node_has_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"data: no node has s-1\.h5 with its 120 bytes; .* copy it there"):
        parted([10, 20, 30], [[1, 0, 1], [0, 0, 1]], [0, 1])
    with pytest.raises(DataError, match=r"s-0\.h5 with its 110 bytes \(and 2 more shards\)"):
        parted([10, 20, 30], [[0, 0, 0], [0, 0, 0]], [0, 1])


def test_a_node_that_may_own_nothing_is_an_error():
    with pytest.raises(DataError, match=r"a node have nothing to read \(replica 2 is one of them\): 2 shards"):
        parted([10, 10], [[1, 1], [1, 1], [1, 1]], [0, 1, 2])


def test_lanes_make_the_longest_as_short_as_can_be_and_each_replica_has_one():
    owners = parted([100, 10, 10], np.eye(3), [0, 1, 2, 2], lanes=8)
    assert owners.lanes == (5, 1, 2)
    assert owners.runs() == [range(5), range(5, 6), range(6, 7), range(7, 8)]
    assert [owners.of_replica(replica) for replica in range(4)] == [[0], [1], [2], [2]]
    with pytest.raises(JobError, match=r"data.lanes = 3 is less than the 4 replicas"):
        parted([100, 10, 10], np.eye(3), [0, 1, 2, 2], lanes=3)


def test_other_numbers_of_replicas_on_the_same_nodes_keep_owners_and_lanes():
    """So that a run stopped in the middle of an epoch goes on with them."""
    counts, holds = [100, 50, 60, 90], [[1, 0, 0, 1], [0, 1, 1, 0]]
    digests = {parted(counts, holds, homes, lanes=12).digest for homes in ([0, 1], [1, 0, 0, 1, 1], [0] * 7 + [1])}
    assert len(digests) == 1


def test_lanes_of_an_owner_lie_on_its_samples_only():
    owners = Owners(shards=(0, 1, 0, 1), lanes=(2, 3), replicas=(1, 0, 1))
    cuts = owners.cut(np.array([10, 7, 3, 20]))
    assert cuts.tolist() == [0, 6, 13, 22, 31, 40]
    assert owners.runs() == [range(2, 3), range(2), range(3, 5)]


def test_replicas_anywhere_read_lanes_of_their_own_node():
    owners = parted([10] * 6, [[1, 0] * 3, [0, 1] * 3], homes=[0, 1, 0, 1], lanes=8)
    assert owners.shards == (0, 1, 0, 1, 0, 1)
    assert owners.runs() == [range(2), range(4, 6), range(2, 4), range(6, 8)]


def test_one_owner_has_what_a_shared_folder_has():
    owners = Owners.one(3, 5)
    assert owners.cut(np.array([10, 0, 7])).tolist() == [i * 17 // 5 for i in range(6)]


def test_evenly_cut_lanes_differ_by_one():
    assert evenly(range(3, 10), 3) == [range(3, 5), range(5, 7), range(7, 10)]


def test_a_folder_holds_what_is_there_in_its_full_size(write_folder):
    data = write_folder()
    assert held(data.folder, data.manifest).tolist() == [True, True, True]
    names = [shard.name for shard in data.manifest.shards]
    (data.folder / names[0]).unlink()
    os.truncate(data.folder / names[2], 100)
    assert held(data.folder, data.manifest).tolist() == [False, True, False]
    assert held(data.folder / "nowhere", data.manifest).tolist() == [False, False, False]
