"""The loader's batches are those of a direct, slow computation; its threads always end, and never fail in silence."""

import os
import threading
import time

import numpy as np
import pytest

from dpnn.data import Loader, Sampler, ShardReader, view_of
from dpnn.data import loader as loader_module
from dpnn.data.sampler import Epoch
from dpnn.errors import DataError

from .conftest import take

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    running = [thread.name for thread in threading.enumerate()]
    assert [name for name in running if name.startswith("dpnn-") and name != "dpnn-team"] == []


def sampler_of(data, **options):
    options = {"lanes": 6, "global_batch": 12, "window": 9, "seed": 3} | options
    return Sampler(data.manifest.counts, data.manifest.block, **options)


def view_in(data, **options):
    """A view of the samples, normalised by their own mean and deviation."""
    options = {"seed": 3, "mean": data.manifest.mean, "std": data.manifest.std} | options
    return view_of(data.manifest, **options)


def expected(data, sampler, epoch, step, replica=0, replicas=1):
    """A batch, sample by sample: x as stored, labels, ids."""
    shards, samples = sampler.epoch(epoch).samples(step, sampler.owned(replica, replicas))
    numbers = data.cuts[shards] + samples
    return data.x[numbers], data.labels[numbers], data.ids[numbers]


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
@pytest.mark.parametrize(("shape", "dtype"), [((4, 3, 2), "uint8"), ((5,), "float32"), ((3, 2, 2, 2), "float16")])
def test_batches_equal_a_direct_computation(write_folder, window_mb, shape, dtype):
    data = write_folder(shape=shape, dtype=dtype)
    sampler = sampler_of(data)
    for replica in range(4):
        with Loader(data.folder, data.manifest, sampler, replica, 4, window_mb=window_mb, dtype=np.float64) as loader:
            for number, batch in enumerate(take(loader, 2 * sampler.steps + 1)):
                assert (batch.epoch, batch.step) == divmod(number, sampler.steps)
                x, labels, ids = expected(data, sampler, batch.epoch, batch.step, replica, 4)
                x = (x.astype(np.float64) - data.manifest.mean) / data.manifest.std
                if len(shape) == 3:
                    x = x.transpose(0, 3, 1, 2)
                assert batch.rows == len(ids) == sampler.micro(batch.step, replica, 4, 1)[0][0]
                np.testing.assert_allclose(batch.x, x, rtol=1e-12)
                assert np.array_equal(batch.labels, labels)
                assert np.array_equal(batch.ids, ids)
                assert (batch.x.dtype, batch.labels.dtype, batch.ids.dtype) == (np.float64, np.int32, np.uint64)


def test_several_labels_a_sample_come_as_rows_of_zeros_and_ones(write_folder):
    data = write_folder(multi=True)
    sampler = sampler_of(data)
    with Loader(data.folder, data.manifest, sampler) as loader:
        for batch in take(loader, sampler.steps + 2):
            lists = expected(data, sampler, batch.epoch, batch.step)[1]
            assert (batch.labels.shape, batch.labels.dtype) == ((batch.rows, 7), np.uint8)
            assert np.array_equal(np.nonzero(batch.labels)[1], lists.indices)
            assert np.array_equal(batch.labels.sum(1), np.diff(lists.indptr))


@pytest.mark.parametrize(("lanes", "global_batch", "window"), [(1, 5, 7), (16, 16, 1), (53, 53, 4), (64, 128, 1000)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_lanes_and_windows_bring_every_sample_once(write_folder, lanes, global_batch, window, shuffle):
    data = write_folder()
    sampler = sampler_of(data, lanes=lanes, global_batch=global_batch, window=window, shuffle=shuffle)
    with Loader(data.folder, data.manifest, sampler, last=(0, sampler.steps - 1)) as loader:
        ids = [batch.ids for batch in take(loader, sampler.steps)]
    assert sorted(np.concatenate(ids)) == sorted(data.ids)


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
def test_a_loader_started_at_any_step_goes_on_with_the_same_batches(write_folder, window_mb):
    data = write_folder()
    sampler = sampler_of(data, window=4)
    view = view_in(data, augment="crop-flip")
    with Loader(data.folder, data.manifest, sampler, view=view, window_mb=window_mb) as loader:
        whole = take(loader, 2 * sampler.steps)
    for step in range(sampler.steps + 1):
        with Loader(data.folder, data.manifest, sampler, view=view, start=(0, step)) as loader:
            for batch, same in zip(take(loader, sampler.steps), whole[step:], strict=False):
                assert batch[4:6] == same[4:6]
                assert np.array_equal(batch.x, same.x)
                assert np.array_equal(batch.ids, same.ids)


def test_batches_are_what_the_view_makes_of_the_samples(write_folder):
    data = write_folder(shape=(6, 5, 3))
    sampler = sampler_of(data)
    view = view_in(data, augment="crop-flip", mean=[1, 2, 3], std=[4, 5, 0], dtype=np.float64)
    with Loader(data.folder, data.manifest, sampler, view=view, dtype=np.float64) as loader:
        for batch in take(loader, sampler.steps + 2):
            x, _, ids = expected(data, sampler, batch.epoch, batch.step)
            seen = np.empty(x.shape)
            view.put(x, np.arange(len(x)), view.draw(ids, batch.epoch), seen)
            assert np.array_equal(batch.x, seen.transpose(0, 3, 1, 2))


def test_nothing_is_read_beyond_the_last_step(write_folder, monkeypatch):
    data = write_folder()
    sampler = sampler_of(data, window=2)
    windows, window = [], Epoch.window
    monkeypatch.setattr(
        Epoch, "window", lambda self, number, lanes: windows.append(number) or window(self, number, lanes)
    )
    with Loader(data.folder, data.manifest, sampler, last=(0, 2)) as loader:
        assert len(take(loader, 3)) == 3
        with pytest.raises(RuntimeError, match="the loader has given its last batch"):
            loader.next()
        for thread in loader._threads:
            thread.join(10)
            assert not thread.is_alive()
    assert windows == [0, 1, 2]


def test_batches_stay_as_they_are_until_they_are_released(write_folder, monkeypatch):
    monkeypatch.setattr(loader_module, "_AT_ONCE_NBYTES", 1)
    data = write_folder()
    with Loader(data.folder, data.manifest, sampler_of(data)) as loader:
        held = [loader.next() for _ in range(3)]
        copies = [batch.x.copy() for batch in held]
        time.sleep(0.1)
        assert all(np.array_equal(batch.x, copy) for batch, copy in zip(held, copies, strict=True))
        assert len({batch.buffer for batch in held}) == 3
        loader.release(held[0])
        assert loader.next().buffer == held[0].buffer


@pytest.mark.parametrize("start", [(0, 0), (0, 2)])
def test_batches_made_several_at_a_time_are_those_made_one_by_one(write_folder, monkeypatch, start):
    data = write_folder()
    sampler = sampler_of(data)
    last = (1, sampler.steps - 1)
    n = 2 * sampler.steps - start[1]
    with Loader(data.folder, data.manifest, sampler, start=start, last=last) as loader:
        several = take(loader, n)
        assert loader._at_once > 1
    monkeypatch.setattr(loader_module, "_AT_ONCE_NBYTES", 1)
    with Loader(data.folder, data.manifest, sampler, start=start, last=last) as loader:
        single = take(loader, n)
        assert loader._at_once == 1
    for one, other in zip(several, single, strict=True):
        assert (one.epoch, one.step, one.rows) == (other.epoch, other.step, other.rows)
        assert np.array_equal(one.x, other.x)
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.ids, other.ids)


def test_damage_met_while_reading_reaches_the_caller(write_folder):
    data = write_folder()
    shard = data.manifest.shards[2]
    with open(data.folder / shard.name, "r+b") as file:
        file.seek(shard.payload_offset + shard.payload_bytes // 2)
        file.write(b"\0\1\2\3\4\5\6\7")
    sampler = sampler_of(data)
    with Loader(data.folder, data.manifest, sampler) as loader:
        with pytest.raises(DataError, match=rf"{shard.name}, x: the block of the samples 32 to 39 is damaged"):
            take(loader, sampler.steps)
        with pytest.raises(DataError, match="is damaged"):
            loader.next()


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
def test_a_shard_cut_under_a_running_loader_is_an_error(write_folder, window_mb):
    data = write_folder(counts=(600,))
    sampler = sampler_of(data)
    with Loader(data.folder, data.manifest, sampler, window_mb=window_mb) as loader:
        take(loader, 1)
        os.truncate(data.folder / data.manifest.shards[0].name, data.manifest.shards[0].payload_offset)
        with pytest.raises(DataError, match="shrank while being read"):
            take(loader, 2 * sampler.steps)


@pytest.mark.parametrize("method", ["draw", "put"])
def test_any_exception_of_the_threads_reaches_the_caller(write_folder, monkeypatch, method):
    data = write_folder()
    view = view_in(data)

    def fail(*args):
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(view, method, fail)
    with Loader(data.folder, data.manifest, sampler_of(data), view=view, threads=2) as loader:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="in a thread"):
                loader.next()


@pytest.mark.parametrize("window_mb", [2048, 0], ids=["windows", "single samples"])
@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("delay_s", [0, 0.05])
def test_close_ends_all_threads_whatever_they_wait_for(write_folder, window_mb, taken, delay_s):
    data = write_folder()
    loader = Loader(data.folder, data.manifest, sampler_of(data), window_mb=window_mb)
    for _ in range(taken):
        loader.release(loader.next())
    time.sleep(delay_s)
    files = len(os.listdir("/proc/self/fd"))
    loader.close()
    assert not any(thread.is_alive() for thread in loader._threads)
    assert len(os.listdir("/proc/self/fd")) <= files
    loader.close()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.next()


def test_close_ends_a_loader_that_waits_for_a_released_batch(write_folder):
    data = write_folder()
    loader = Loader(data.folder, data.manifest, sampler_of(data))
    for _ in range(3):
        loader.next()
    loader.close()
    assert not any(thread.is_alive() for thread in loader._threads)


def test_a_step_that_no_epoch_has_is_refused(write_folder):
    data = write_folder(shape=(5,))
    sampler = sampler_of(data)
    with pytest.raises(DataError, match=rf"step 99 of an epoch of {sampler.steps} steps: these are not the data"):
        Loader(data.folder, data.manifest, sampler, start=(0, 99))


def test_a_file_system_that_does_not_answer_is_an_error_in_time(write_folder, monkeypatch):
    data = write_folder()
    held = threading.Event()
    monkeypatch.setattr(ShardReader, "read_blocks", lambda *args: held.wait(30))
    told = rf"no batch came from {data.folder} for 0.2 s: its file system"
    with (
        Loader(data.folder, data.manifest, sampler_of(data), limit_s=0.2) as loader,
        pytest.raises(DataError, match=told),
    ):
        loader.next()
    held.set()
    for thread in loader._threads:  # which `close` has not waited for
        thread.join(30)
    loader.close()


def test_the_limit_of_memory_is_that_of_both_pools(write_folder):
    data = write_folder()
    sampler = sampler_of(data)
    with Loader(data.folder, data.manifest, sampler) as loader:
        assert loader.pooled
        needed = loader.window_mb
        take(loader, 2 * sampler.steps)
        assert sum(pool.data.nbytes for pool in loader._reader._pools) == pytest.approx(needed * 2**20)
    with Loader(data.folder, data.manifest, sampler, window_mb=needed * 0.999) as loader:
        assert not loader.pooled
    with Loader(data.folder, data.manifest, sampler, window_mb=needed) as loader:
        assert loader.pooled
