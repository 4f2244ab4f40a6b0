"""Ranks that pack together write what one would: the same bytes; and an error of one ends all."""

import signal
import time

import numpy as np
import pytest

from dpnn.data import Manifest, check_shards
from dpnn.data.decode import encode
from dpnn.data.pack import pack
from dpnn.data.pack.formats import Options
from tests.data import packing

FILES = Options(format="files")


class Ended(Exception):
    """What a test ends a packing by."""


def write_pictures(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 20)):
        (folder / part).mkdir(parents=True)
        for i in range(count):
            record = encode(rng.integers(0, 256, (12, 14, 3)).astype(np.uint8))
            (folder / part / f"{i % 3}-{i:03d}").write_bytes(record if i != 7 else b"")
    (folder / "shape").write_text("picture")
    return folder


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("kind", ["pictures", "squares", "floats"])
def test_any_number_of_ranks_writes_the_same_bytes(world, shared_path, kind):
    def make():
        if kind != "floats":
            return write_pictures(shared_path / "source")
        x = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
        np.savez(shared_path / "source.npz", x=x, y=np.arange(100) % 3)
        return shared_path / "source.npz"

    source = str(world.first(make))
    how = {"options": Options() if kind == "floats" else FILES, "raw": 8 * (kind == "squares"), "shard_mb": 0.0004}
    counted = []
    summary = pack(
        source, shared_path / "out", **how, ranks=world, progress=lambda done, total: counted.append((done, total))
    )
    # Every rank compares with what it packs alone.
    alone = pack(source, shared_path / f"alone{world.rank}", **how)
    assert files(shared_path / "out") == files(shared_path / f"alone{world.rank}")
    assert [part.manifest for part in summary.parts] == [part.manifest for part in alone.parts]
    assert len(summary.parts[0].manifest.shards) > 2
    total = 100 if kind == "floats" else 80
    assert counted[-1] == (total, total)
    assert counted == sorted(counted)
    world.meet()


@pytest.mark.parallel([2])
def test_a_packing_goes_on_with_another_number_of_ranks(world, shared_path):
    source = str(world.first(lambda: write_pictures(shared_path / "source")))

    def begin():
        def stop(done, total):
            if done > 30:
                raise Ended

        with pytest.raises(Ended):
            pack(source, shared_path / "out", options=FILES, shard_mb=0.002, progress=stop)
        return {path: path.stat().st_mtime_ns for path in shared_path.rglob("out/*/*.h5")}

    finished = world.first(begin)
    pack(source, shared_path / "out", options=FILES, shard_mb=0.002, ranks=world)
    assert finished
    for path, since in finished.items():
        assert path.stat().st_mtime_ns == since
    check_shards(shared_path / "out/train", Manifest.read(shared_path / "out/train"))


def test_an_error_on_one_rank_ends_all_with_one_message(mpirun, tmp_path):
    source, out = write_pictures(tmp_path / "source"), tmp_path / "out"
    large = np.random.default_rng(1).integers(0, 256, (120, 120, 3)).astype(np.uint8)
    for path in (source / "train").iterdir():
        path.write_bytes(encode(large, quality=95))
    line = ("pack", source, out, "--format", "files", "--shard-mb", "0.5")
    ended = mpirun(2, *line, script=packing.__file__, env={"FULL": "1"})
    assert ended.returncode != 0
    assert ended.stderr.count("dpnn:") == 1
    assert f"dpnn: rank 1: {out} can't be written ([Errno 27] File too large)" in ended.stderr
    assert not (out / "train/manifest.json").exists()
    ended = mpirun(3, *line, script=packing.__file__)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("60 samples of pictures") == 1
    check_shards(out / "train", Manifest.read(out / "train"))


def test_ranks_that_are_told_to_stop_say_so_once(start_mpirun, tmp_path):
    source, out = write_pictures(tmp_path / "source"), tmp_path / "out"
    for i in range(400):
        (source / f"train/0-more{i}").write_bytes((source / "train/0-000").read_bytes())
    line = ("pack", source, out, "--format", "files", "--shard-mb", "0.001")
    program = start_mpirun(2, *line, script=packing.__file__)
    while not list(out.glob("train/*.h5")):
        assert program.process.poll() is None
        time.sleep(0.001)
    program.signal(signal.SIGUSR1)
    ended = program.finish()
    assert ended.returncode == 75, ended.stderr
    assert ended.stderr.count("packing was told to stop; give the same command again to go on") == 1
    pack(str(source), out, options=FILES, shard_mb=0.001)
    assert Manifest.read(out / "train").samples == 459


def test_a_wrong_source_is_told_once(mpirun, tmp_path):
    ended = mpirun(2, "pack", tmp_path / "nowhere", tmp_path / "out")
    assert ended.returncode == 2
    assert ended.stderr.count("dpnn:") == 1
    assert f"'{tmp_path}/nowhere' doesn't exist" in ended.stderr


def test_without_a_launcher_no_mpi_is_loaded(python, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((9, 3)), y=np.arange(9))
    program = "import sys; from dpnn import cli; assert cli.main() == 0; assert 'mpi4py' not in sys.modules"
    ended = python("-c", program, "pack", tmp_path / "a.npz", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert "9 samples of 3 float32" in ended.stdout


@pytest.mark.mpi
def test_launch_packs_on_several_ranks(python, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((90, 3)), y=np.arange(90) % 4)
    ended = python("-m", "dpnn", "launch", "-n", "2", "pack", tmp_path / "a.npz", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("90 samples of 3 float32") == 1
