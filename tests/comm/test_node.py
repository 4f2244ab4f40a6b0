"""The arrays of a node are one memory for all its replicas; where that can't be, all of them know, and sum by MPI."""

import errno
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from dpnn.comm import node as module
from dpnn.comm.launch import command
from dpnn.comm.reduce import GradientReducer
from dpnn.errors import RankError

N = 1003
WHERE = ["together", "halves", "one apart", "not shared"]
SLICES = [(0, 0), (5, 5), (0, 1), (3, 20), (0, 16), (1, 33), (7, N), (0, 100_001)]
CRAMPED = Path(__file__).parent / "programs" / "cramped.py"
MIB = 1 << 20


@pytest.fixture
def folder(world, monkeypatch):
    """Where the nodes of this test have their files, and nobody else."""
    made = world.comm.bcast(tempfile.mkdtemp(prefix="dpnn-test-", dir="/dev/shm") if world.rank == 0 else None)
    monkeypatch.setattr(module, "SHARED_MEMORY", made)
    yield Path(made)
    world.comm.barrier()
    if world.rank == 0:
        shutil.rmtree(made)


def mapped(folder: Path) -> list[str]:
    """The files of `folder` in this process's memory, as Linux tells."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def left(world, folder: Path) -> list[Path]:
    """What is still there when every rank has come so far."""
    world.comm.barrier()
    return list(folder.iterdir())


def check_not_shared(world, node) -> None:
    """Every replica is alone with its memory, and what they bring is summed all the same."""
    assert node.comm.size == node.owners == 1
    node.params[:] = node.grads[:] = 1 + world.rank
    reducer = GradientReducer(node, lambda lo, hi: None, 60)
    reducer.start(0, node.grads.size)
    reducer.finish()
    reducer.settle()
    reducer.close()
    assert np.unique(node.sums).tolist() == [sum(range(1, world.size + 1))]
    assert np.unique(node.params).tolist() == [1 + world.rank]


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize(("n", "partials"), [(0, 0), (1, 2), (N, 0), (4096, 2)])
def test_parameters_and_state_are_the_nodes_and_gradients_each_replicas(world, node_of, n, partials):
    node = node_of(n=n, states=("momentum", "second"), partials=partials)
    first, last = 0, world.size - 1
    assert (node.comm.size, node.owners, node.across, node.note) == (world.size, world.size, None, "")
    if world.rank == last:
        node.params[:] = 1
    if world.rank == first:
        node.state["momentum"][:], node.state["second"][:] = 2, 3
    own = [node.grads, *node.partials[world.rank]]
    for i, array in enumerate(own):
        array[:] = 10 * (1 + i) + world.rank
    world.comm.barrier()

    seen = [node.params, *node.state.values()]
    expected = [1, 2, 3]
    for rank in range(world.size):
        seen += [node.all_grads[rank], *node.partials[rank]]
        expected += [10 * (1 + i) + rank for i in range(1 + partials)]
    assert [array.tolist() for array in seen] == [[value] * n for value in expected]
    assert all(array.dtype == np.float32 for array in seen)
    assert node.sums.tolist() == [20 if partials else 10] * n


@pytest.mark.parallel([1, 2, 3, 4])
def test_replicas_that_part_ways_have_parameters_of_their_own(world, node_of):
    node = node_of(n=N, together=False)
    node.params[:] = node.state["momentum"][:] = node.grads[:] = world.rank
    world.comm.barrier()
    assert node.params.tolist() == node.state["momentum"].tolist() == [world.rank] * N
    assert [grads.tolist() for grads in node.all_grads] == [[rank] * N for rank in range(world.size)]


@pytest.mark.parallel([1, 2, 3, 4])
def test_a_counter_is_as_far_as_the_last_replica(world, node_of):
    node = node_of(n=N)
    steps = [node.advance(0) for _ in range(2 + world.rank)]
    node.advance(1)
    world.comm.barrier()
    assert steps == list(range(1, 3 + world.rank))
    assert (node.least(0), node.least(1)) == (2, 1)
    assert not any(array.any() for array in (node.params, node.state["momentum"], *node.all_grads))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("native", [True, False])
def test_arrays_are_added_into_the_first(node_of, native):
    arrays = [np.random.default_rng(i).normal(size=N).astype(np.float32) for i in range(3)]
    expected = arrays[0] + arrays[1] + arrays[2]
    add = node_of(n=N, native=native).adds(arrays)
    add()
    assert arrays[0].tobytes() == expected.tobytes()


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
def test_shares_of_the_owners_cover_a_slice_once(node_of, where):
    node = node_of(where, n=N)
    for lo, hi in SLICES:
        shares = node.comm.allgather(node.mine(lo, hi))
        times = np.zeros(hi + 1, int)
        for start, end in shares:
            assert lo <= start <= end <= hi
            times[start:end] += 1
        assert times[lo:hi].all()
        assert times.sum() == hi - lo
        lengths = [end - start for start, end in shares]
        assert not any(lengths[node.owners :])
        assert max(lengths[: node.owners]) - min(lengths[: node.owners]) <= 32


MEET = {
    # Where, ranks: how many of a node own a share; the ranks that own the same one.
    ("together", 2): (2, []),
    ("together", 4): (4, []),
    ("halves", 2): (1, [[0, 1]]),
    ("halves", 3): (1, [[0, 2]]),
    ("halves", 4): (2, [[0, 2], [1, 3]]),
    ("one apart", 4): (1, [[0, 3]]),
    ("not shared", 3): (1, [[0, 1, 2]]),
    ("not shared", 4): (1, [[0, 1, 2, 3]]),
}


@pytest.mark.parallel([2, 3, 4])
def test_owners_of_the_same_share_meet_across_all_nodes(world, node_of):
    for where, size in MEET:
        if size == world.size:
            owners, meetings = MEET[where, size]
            node = node_of(where, n=N)
            met = node.across.allgather(world.rank) if node.across is not None else None
            assert met == next((ranks for ranks in meetings if world.rank in ranks), None)
            assert (node.owners, node.replicas) == (owners, size)
            assert [group[world.comm.rank - group[0]] for group in node.groups if world.rank in group] == [world.rank]
            assert sorted(replica for group in node.groups for replica in group) == list(range(size))
            if node.across is not None:
                assert len(set(node.across.allgather(node.mine(5, N)))) == 1


@pytest.mark.parallel([1, 2, 3, 4])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("together", [True, False])
def test_share_brings_the_first_replicas_values_to_all(world, node_of, where, together):
    node = node_of(where, n=N, together=together)
    arrays = [node.params, node.state["momentum"]]
    for array in arrays if node.comm.rank == 0 or not together else []:
        array[:] = -1 - world.rank
    world.comm.barrier()
    if world.rank == 0:
        time.sleep(0.02)  # the others wait for it
        for i, array in enumerate(arrays):
            array[:] = np.arange(N) + 5000 * i
    for array in arrays:
        node.share(array)
    for i, array in enumerate(arrays):
        assert array.tolist() == list(range(5000 * i, 5000 * i + N))


@pytest.mark.parallel([1, 2, 4])
def test_the_memory_has_no_name_as_soon_as_it_is_there(world, folder, node_of):
    node = node_of(n=N)
    node.params[:] = 1
    assert left(world, folder) == []
    assert len(mapped(folder)) == (world.size > 1)


@pytest.mark.parallel([2, 3])
def test_a_folder_that_can_not_be_written_is_named_on_all_ranks(world, monkeypatch, node_of):
    monkeypatch.setattr(module, "SHARED_MEMORY", "/proc/nowhere")
    node = node_of(n=N)
    assert "/proc/nowhere can't be written" in node.note
    check_not_shared(world, node)


def check_one_without_room(world, monkeypatch, folder, node_of, where, full) -> None:
    if world.rank == full:

        def refuse(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    node = node_of(where, n=N)
    reason = f"0 MiB in {folder}: No space left on device" if world.rank == full else "another rank or node has no room"
    assert reason in node.note
    assert left(world, folder) == mapped(folder) == []
    check_not_shared(world, node)


@pytest.mark.parallel([2, 3, 4])
@pytest.mark.parametrize("which", [0, -1])
def test_where_one_rank_finds_no_room_nobody_shares(world, monkeypatch, folder, node_of, which):
    check_one_without_room(world, monkeypatch, folder, node_of, "together", which % world.size)


@pytest.mark.parallel([3, 4])
def test_where_one_node_has_no_room_no_node_shares(world, monkeypatch, folder, node_of):
    check_one_without_room(world, monkeypatch, folder, node_of, "halves", world.size - 1)


@pytest.mark.parallel([2, 3])
def test_where_no_file_may_be_so_large_nobody_shares_and_none_is_left(world, folder, node_of):
    """The limit of `ulimit -f`, on the rank that makes the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        node = node_of(n=MIB // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert node.note
    check_not_shared(world, node)
    assert left(world, folder) == []


@pytest.mark.mpi
def test_memory_that_is_too_small_ends_no_rank(start_line):
    """A real file system of 256 KiB, which these two ranks alone see, and which ends with them."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=256k none "$0" && exec "$@"']
    small = tempfile.mkdtemp(prefix="dpnn-test-")
    try:
        tried = ["sh", "-c", 'exec "$@"', "sh", *mount, small, "true"]  # sh: also where there is no unshare
        if subprocess.run(tried, stderr=subprocess.DEVNULL, check=False).returncode:
            pytest.skip("only root may mount a file system")
        ended = start_line([*mount, small, *command(2, [small, "20000", "1000"], (str(CRAMPED),))]).finish()
    finally:
        os.rmdir(small)
    assert ended.returncode == 0, ended.stderr
    told = sorted(line.split(", note: ")[0] for line in ended.stdout.splitlines())
    assert told == ["1000: 2 share, sums {3.0}, files []"] * 2 + ["20000: 1 share, sums {3.0}, files []"] * 2
    assert "No space left on device" in ended.stdout


@pytest.mark.parallel([1, 2, 3])
def test_without_kernels_each_replica_is_for_itself(world, folder, node_of):
    node = node_of(n=N, dtype="float64", native=False)
    assert ("no compiled kernels" in node.note) == (world.size > 1)
    assert left(world, folder) == []
    assert node.params.dtype == node.grads.dtype == np.float64
    check_not_shared(world, node)


@pytest.mark.parallel([2, 3])
def test_a_replica_that_stays_away_is_a_rank_error_and_leaves_no_file(world, folder, mesh_of):
    mesh = mesh_of("together")
    late = world.size - 1

    def make(limit_s: float):
        return module.Node(mesh, N, np.dtype(np.float32), (), module.Kernels(1), limit_s)

    if world.rank != late:
        # What is raised holds the arrays that MPI still waits with.
        with pytest.raises(RankError, match=r"waited 0\.2 s for the other replicas") as raised:
            make(0.2)
    assert left(world, folder) == []
    if world.rank == late:
        node = make(60)  # takes part in what the others began
        assert "another rank" in node.note or "No such file" in node.note
    else:
        assert raised.value.exit_code == 4
    world.comm.barrier()
