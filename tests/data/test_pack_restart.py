"""A packing that was killed, or that found no room, goes on: what it had finished is checked, and kept."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpnn.data import Manifest, check_shards
from dpnn.data.decode import encode
from dpnn.data.pack import pack
from dpnn.data.pack.formats import Options
from dpnn.data.writer import verify
from dpnn.errors import DataError, JobError
from tests.data import packing

ROOT = Path(__file__).parents[2]
FILES = Options(format="files")
PROGRAM = [sys.executable, packing.__file__]
SHARD_MB = 0.008


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """150 small JPEGs for training and 50 for testing, among them three bad ones."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for part, count in (("train", 150), ("test", 50)):
        (folder / part).mkdir()
        for i in range(count):
            record = encode(rng.integers(0, 256, (12, 14, 3)).astype(np.uint8))
            (folder / part / f"{i % 3}-{i:03d}").write_bytes(record if i % 60 != 7 else record[:300])
    (folder / "shape").write_text("picture")
    return folder


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """The folder that a packing makes that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack(str(pictures), out, options=FILES, shard_mb=SHARD_MB)
    return out


def files(folder):
    """The bytes of all files under a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder):
    """Which file each finished shard is, and since when, by its name."""
    names = [path.name.removesuffix(".json") for path in (folder / ".packing").glob("*.h5.json")]
    paths = [path for path in folder.rglob("*.h5") if path.name in names]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def start(pictures, out, **env):
    line = [*PROGRAM, "pack", pictures, out, "--format", "files", "--shard-mb", str(SHARD_MB)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(line, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_and_go_on(pictures, undisturbed, folder, times):
    """Kill packings at random moments, most while shards are written; then nothing is wrong, and a rerun completes.

    How many were killed when none, some or all shards were finished.
    """
    choose, stages = random.Random(times), Counter()
    for attempt in range(times):
        out = folder / str(attempt)
        process = start(pictures, out)
        there = choose.randrange(len(list(undisturbed.rglob("*.h5"))))
        while len(list(out.glob("t*/*.h5"))) < there and process.poll() is None:
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.02 if there else 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for part in ("train", "test"):
            if (out / part / "manifest.json").exists():
                check_shards(out / part, Manifest.read(out / part))
                assert files(out / part) == files(undisturbed / part)
        finished = shards(out)
        complete = not (out / ".packing").exists()
        stages["complete" if complete else "some" if finished else "none"] += 1
        if complete:
            continue
        pack(str(pictures), out, options=FILES, shard_mb=SHARD_MB)
        assert files(out) == files(undisturbed)
        for path, file in finished.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == file
    return stages


def test_a_killed_packing_goes_on_and_keeps_what_it_had_finished(pictures, undisturbed, tmp_path):
    assert kill_and_go_on(pictures, undisturbed, tmp_path, 3)["some"]


@pytest.mark.soak
def test_twenty_killed_packings_go_on(pictures, undisturbed, tmp_path):
    assert kill_and_go_on(pictures, undisturbed, tmp_path, 20)["some"] > 5


class Ended(Exception):
    """What a test ends a packing by."""


def until(samples):
    """A progress that ends the packing after so many samples."""

    def progress(done, total):
        if done >= samples:
            raise Ended

    return progress


@pytest.fixture
def half(pictures, tmp_path):
    """A folder in which a packing ended half-way."""
    out = tmp_path / "half"
    with pytest.raises(Ended):
        pack(str(pictures), out, options=FILES, shard_mb=SHARD_MB, progress=until(100))
    assert len(shards(out)) > 3
    return out


def test_the_reasons_of_samples_left_out_before_the_end_are_told_at_the_end(pictures, undisturbed, half):
    counted = []
    summary = pack(
        str(pictures), half, options=FILES, shard_mb=SHARD_MB, progress=lambda done, total: counted.append(done)
    )
    assert files(half) == files(undisturbed)
    assert sum(summary.parts[0].rejected.values()) == 3
    assert counted[-1] == 200
    assert sorted(half.iterdir()) == [half / "test", half / "train"]


@pytest.mark.parametrize("damage", ["payload", "labels", "cut", "gone", "note"])
def test_a_finished_shard_that_was_damaged_is_written_again(pictures, undisturbed, half, damage):
    path, *others = sorted(shards(half))
    before = shards(half)
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "note":
        (half / f".packing/{path.name}.json").write_text("{")
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        data[4100 if damage == "payload" else -1] ^= 1
        path.write_bytes(data)
    pack(str(pictures), half, options=FILES, shard_mb=SHARD_MB)
    assert files(half) == files(undisturbed)
    assert all((other.stat().st_ino, other.stat().st_mtime_ns) == before[other] for other in others)


def test_temporary_files_of_a_killed_packing_are_removed(pictures, undisturbed, half):
    for name in ("train/.train-00001-of-00009.h5.77.tmp", "test/.manifest.json.77.tmp", ".packing/.a.json.77.tmp"):
        (half / name).write_text("half")
    pack(str(pictures), half, options=FILES, shard_mb=SHARD_MB)
    assert files(half) == files(undisturbed)


@pytest.mark.parametrize(("change", "told"), [
    ({"seed": 3}, r"begun with seed = 0 \(now 3\)"),
    ({"shorter_side": 8}, r"begun with shorter_side = 0 \(now 8\)"),
    ({"test_fraction": 0.0}, r"begun with test_fraction = None \(now 0\.0\)"),
    ({}, "begun with another source"),
])  # fmt: skip
def test_another_packing_is_not_mixed_with_one_that_is_not_complete(
    pictures, undisturbed, half, tmp_path, change, told
):
    source = pictures
    if not change:
        source = shutil.copytree(pictures, tmp_path / "other")
        (source / "train/0-000").unlink()
    finished = shards(half)
    options = {"options": FILES, "shard_mb": SHARD_MB} | change
    with pytest.raises(JobError, match=rf"half holds a packing that was {told}: .* or begin anew with --force"):
        pack(str(source), half, **options)
    assert shards(half) == finished
    pack(str(source), half, force=True, **options)
    assert not (half / ".packing").exists()
    for part in ("train", "test"):
        check_shards(half / part, Manifest.read(half / part))
    assert (files(half) == files(undisturbed)) == ("test_fraction" in change)


def test_samples_left_out_before_are_told_where_none_may_be(pictures, half):
    with pytest.raises(DataError, match=r"source\d*/train/\S+: .* mend it, or use --on-bad reject"):
        pack(str(pictures), half, options=FILES, shard_mb=SHARD_MB, on_bad="stop")


def test_a_packing_ended_while_it_cleared_up_is_complete(pictures, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "out")
    (out / ".packing.done").mkdir()
    (out / ".packing.done/train-00000-of-00007.h5.json").write_text("{}")
    with pytest.raises(JobError, match="holds packed data already"):
        pack(str(pictures), out, options=FILES, shard_mb=SHARD_MB)
    assert files(out) == files(undisturbed)


def test_a_full_disk_is_told_and_the_rerun_completes(pictures, undisturbed, tmp_path):
    """RLIMIT_FSIZE: a shard with one large record can't be written; those before it are kept."""
    source, out = shutil.copytree(pictures, tmp_path / "source"), tmp_path / "out"
    large = np.random.default_rng(1).integers(0, 256, (100, 100, 3)).astype(np.uint8)
    (source / "train/0-000").write_bytes(encode(large, quality=100))
    process = start(source, out, FULL="0")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3
    assert told.decode().startswith(f"dpnn: {out} can't be written ([Errno 27] File too large); make room there and")
    assert told.count(b"\n") == 1
    assert not list(out.rglob("*.tmp"))
    assert not (out / "train/manifest.json").exists()
    finished = shards(out)
    assert finished
    process = start(source, out)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"147 samples of pictures" in said
    for path, file in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == file
    check_shards(out / "train", Manifest.read(out / "train"))


def test_too_little_room_is_told_before_anything_is_written(pictures, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"has room for 0\.1 MB, and about 0\.\d MB are still to be written"):
        pack(str(pictures), tmp_path / "out", options=FILES, shard_mb=SHARD_MB)
    assert not list((tmp_path / "out").rglob("*.h5"))


def test_a_packing_that_is_told_to_stop_goes_on_later(pictures, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start(pictures, out)
    while not list(out.glob("t*/*.h5")):
        time.sleep(0.001)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    assert told.decode() == "dpnn: packing was told to stop; give the same command again to go on\n"
    pack(str(pictures), out, options=FILES, shard_mb=SHARD_MB)
    assert files(out) == files(undisturbed)


def test_packing_again_gives_the_same_files_and_other_samples_other_names(pictures, undisturbed, tmp_path):
    pack(str(pictures), tmp_path / "again", options=FILES, shard_mb=SHARD_MB)
    assert files(tmp_path / "again") == files(undisturbed)
    pack(str(pictures), tmp_path / "other", options=FILES, shard_mb=SHARD_MB, seed=1)
    one, other = (
        {shard["uuid"] for shard in json.loads((folder / "train/manifest.json").read_text())["shards"]}
        for folder in (undisturbed, tmp_path / "other")
    )
    assert not one & other


def test_a_shard_is_verified_by_its_size_its_digest_and_its_blocks(undisturbed, tmp_path):
    manifest = Manifest.read(undisturbed / "train")
    shard = manifest.shards[0]
    path = tmp_path / shard.name
    whole = (undisturbed / "train" / shard.name).read_bytes()
    path.write_bytes(whole)
    assert verify(path, manifest, shard) == shard
    for place, told in ((shard.payload_offset + 50, "is damaged"), (len(whole) - 1, "digest"), (None, "truncated")):
        data = bytearray(whole)
        if place is None:
            data.pop()
        else:
            data[place] ^= 16
        path.write_bytes(data)
        with pytest.raises(DataError, match=told):
            verify(path, manifest, shard)
