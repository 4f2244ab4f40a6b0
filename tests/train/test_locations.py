"""Shards on the nodes' own disks, or copied there before the run: as a user meets it, on nodes that are emulated."""

import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from dpnn import cli
from dpnn.data import Manifest, ShardReader
from dpnn.observe import metrics

HERE = Path(__file__).parent
APART = HERE / "programs" / "apart.py"
JOB = f"""
seed = 3
[data]
train = "train"
test = "test"
augment = "crop-flip"
window = 8
location = "local"
[model]
name = "{HERE}/networks.py:plain"
[train]
epochs = 2
global_batch = 16
[optimizer]
lr = 0.01
[parallel]
stall_abort_s = 20
[output]
dir = "{{out}}"
"""


@pytest.fixture(scope="session")
def packed(tmp_path_factory, images) -> Path:
    """The images in more shards."""
    folder = tmp_path_factory.mktemp("data") / "small"
    assert cli.main(["pack", f"{images}.npz", str(folder), "--shard-mb", "0.012"]) == 0
    return folder


def ids_of(folder: Path) -> list[int]:
    manifest = Manifest.read(folder)
    reader = ShardReader(folder, manifest)
    ids = [int(i) for number in range(len(manifest.shards)) for i in reader.index(number).ids]
    reader.close()
    return ids


@pytest.fixture
def disks(tmp_path, packed):
    """disks(nodes, holds=...) -> a job, and a disk for each node with the shards that it holds (part, number)."""

    def make(nodes: int, holds=lambda node, part, number: False) -> SimpleNamespace:
        for node in range(nodes):
            for part in ("train", "test"):
                folder = tmp_path / f"node-{node}" / part
                folder.mkdir(parents=True)
                shutil.copy(packed / part / "manifest.json", folder)
                for number, shard in enumerate(Manifest.read(packed / part).shards):
                    if holds(node, part, number):
                        shutil.copy(packed / part / shard.name, folder)
        job, out, seen = tmp_path / "job.toml", tmp_path / "run", tmp_path / "seen"
        job.write_text(JOB.format(out=out))
        seen.mkdir()
        return SimpleNamespace(job=job, out=out, seen=seen, path=tmp_path)

    return make


@pytest.fixture
def on_nodes(mpirun):
    """on_nodes(disks, nodes, *words, **env) -> CompletedProcess of `dpnn train` on ranks on these nodes."""

    def run(disks: SimpleNamespace, nodes: str, *words: object, **env: object):
        line = ("train", *(words or (disks.job,)))
        env = {"NODES": nodes, "DISKS": str(disks.path), "SEEN": str(disks.seen), **env}
        return mpirun(len(nodes.split()), *line, script=APART, env={k: str(v) for k, v in env.items()})

    return run


def seen(disks: SimpleNamespace) -> Counter:
    """How often each (epoch, id) was trained on."""
    lines = [line.split() for path in disks.seen.iterdir() for line in path.read_text().splitlines()]
    return Counter((int(epoch), int(i)) for epoch, _, *ids in lines for i in ids)


def once(packed: Path, epochs: int = 2) -> Counter:
    return Counter((epoch, i) for epoch in range(epochs) for i in ids_of(packed / "train"))


def by_turns(node: int, part: str, number: int) -> bool:
    """Two nodes: every third shard is the second one's; the last lies on both."""
    return node == (number % 3 == 1) or (part, number) == ("train", 5)


def test_each_node_reads_its_own_shards_and_every_sample_is_seen_once(disks, on_nodes, packed, last):
    run = disks(2, by_turns)
    ended = on_nodes(run, "0 1 0", FAULT="1 9 SIGTERM")
    assert ended.returncode == 75, ended.stderr
    assert last(run.out).step == 10
    # Nodes in another order, and with other numbers of ranks: the shards are parted as before.
    for path in ("node-0", "node-1"):
        (run.path / path).rename(run.path / f"was-{path}")
    (run.path / "was-node-0").rename(run.path / "node-1")
    (run.path / "was-node-1").rename(run.path / "node-0")
    ended = on_nodes(run, "0 1", "--resume", run.out)
    assert ended.returncode == 0, ended.stderr
    assert seen(run) == once(packed)
    scores = [line for line in metrics.read(run.out / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["samples"] for line in scores] == [len(ids_of(packed / "test"))] * 2


def test_what_each_node_evaluates_adds_up_to_the_score_of_one_rank(disks, on_nodes, packed, python):
    run = disks(2, by_turns)
    assert on_nodes(run, "0 1").returncode == 0
    there = [line for line in metrics.read(run.out / "metrics.jsonl") if line["kind"] == "eval"][-1]
    alone = python(
        "-m", "dpnn", "eval", run.out, "--set", 'data.location="shared"', "--set", f"data.test={packed}/test"
    )
    assert f"top-1 error {there['top1_error']:.2%}" in alone.stdout, alone.stderr
    assert f"loss {there['loss']:.4f}" in alone.stdout


def test_parted_in_another_way_in_the_middle_of_an_epoch_is_refused(disks, on_nodes, packed, messages):
    run = disks(2, by_turns)
    assert on_nodes(run, "0 1", FAULT="0 4 SIGTERM").returncode == 75
    for path in (run.path / "node-0" / "train").glob("*.h5"):
        shutil.copy(path, run.path / "node-1" / "train")
    ended = on_nodes(run, "0 1", "--resume", run.out)
    assert ended.returncode == 2
    (said,) = messages(ended.stderr)
    assert "in the middle of an epoch, in which the shards were parted among the nodes in another way" in said


def test_a_shard_that_no_node_has_ends_the_job_before_training(disks, on_nodes, packed, messages):
    run = disks(2, lambda node, part, number: by_turns(node, part, number) and (part, number) != ("train", 3))
    ended = on_nodes(run, "0 1 1")
    assert ended.returncode == 3
    (said,) = messages(ended.stderr)
    missing = Manifest.read(packed / "train").shards[3]
    assert f"train: no node has {missing.name} with its {missing.bytes} bytes; with data.location" in said
    assert not seen(run)


def test_manifests_that_differ_are_refused(disks, on_nodes, messages):
    run = disks(2, by_turns)
    folder = run.path / "node-1" / "train"
    found = Manifest.read(folder)
    replace(found, mean=tuple(2 * mean for mean in found.mean)).write(folder)
    ended = on_nodes(run, "0 1")
    assert ended.returncode == 3
    (said,) = messages(ended.stderr)
    assert "train on node-1 has the manifest of other data" in said


def test_a_damaged_shard_on_one_nodes_disk_is_found_before_training(disks, on_nodes, packed, messages):
    run = disks(2, by_turns)
    shard = Manifest.read(packed / "train").shards[1]
    with (run.path / "node-1" / "train" / shard.name).open("r+b") as file:
        file.seek(shard.bytes - 10)
        file.write(b"damaged!")
    ended = on_nodes(run, "0 1")
    assert ended.returncode == 3
    (said,) = messages(ended.stderr)
    assert f"{shard.name}: the labels, ids or metadata are damaged" in said


def test_downpour_leases_each_node_its_own_lanes(disks, on_nodes, packed):
    run = disks(2, by_turns)
    downpour = (
        "train.global_batch=0", "train.replica_batch=7", "parallel.strategy=downpour", "parallel.servers=1",
        "optimizer.name=sgd",
    )  # fmt: skip
    words = [word for setting in downpour for word in ("--set", setting)]
    ended = on_nodes(run, "0 1 1 0", run.job, *words)
    assert ended.returncode == 0, ended.stderr
    assert seen(run) == once(packed)
    lines = metrics.read(run.out / "metrics.jsonl")
    # The first replica's node has only some of the test shards: all look at the end.
    assert [line["samples"] for line in lines if line["kind"] == "eval"] == [len(ids_of(packed / "test"))]


def test_all_shards_are_copied_to_every_node_and_are_used_again(disks, on_nodes, packed):
    run = disks(2)
    shared = run.path / "shared"
    shutil.copytree(packed, shared)
    where = ("data.location=shared", f"data.train={shared}/train", f"data.test={shared}/test", "data.stage=fast")
    words = [word for setting in where for word in ("--set", setting)]
    ended = on_nodes(run, "0 1 0", run.job, *words)
    assert ended.returncode == 0, ended.stderr
    assert "dpnn: the first replica copies " in ended.stderr
    names = {path.name for path in (shared / "train").iterdir()}
    staged = [next((run.path / f"node-{node}" / "fast").glob("train-*")) for node in (0, 1)]
    assert [{path.name for path in folder.iterdir()} for folder in staged] == [names, names]
    for name in names:
        assert (staged[1] / name).read_bytes() == (shared / "train" / name).read_bytes()
    assert seen(run) == once(packed)
    # Again, without the originals.
    for path in shared.glob("*/*.h5"):
        path.unlink()
    ended = on_nodes(run, "0 1 0", run.job, *words, "--set", f"output.dir={run.path}/again")
    assert ended.returncode == 0, ended.stderr
    assert "copies" not in ended.stderr


def test_shards_are_dealt_out_over_the_nodes_and_copied_there(disks, on_nodes, packed):
    run = disks(2)
    where = (f"data.train={packed}/train", f"data.test={packed}/test", "data.stage=fast")
    words = [word for setting in where for word in ("--set", setting)]
    ended = on_nodes(run, "0 1", run.job, *words)
    assert ended.returncode == 0, ended.stderr
    held = [{path.name for path in (run.path / f"node-{node}").glob("fast/train-*/*.h5")} for node in (0, 1)]
    assert held[0] | held[1] == {path.name for path in (packed / "train").glob("*.h5")}
    assert not held[0] & held[1]
    assert seen(run) == once(packed)


def test_a_shard_that_is_damaged_is_not_copied(disks, on_nodes, packed, messages):
    run = disks(1)
    shared = run.path / "shared"
    shutil.copytree(packed, shared)
    shard = Manifest.read(shared / "train").shards[2]
    with (shared / "train" / shard.name).open("r+b") as file:
        file.seek(shard.payload_offset + 5)
        file.write(os.urandom(8))
    where = ("data.location=shared", f"data.train={shared}/train", f"data.test={shared}/test", "data.stage=fast")
    ended = on_nodes(run, "0 0", run.job, *[word for setting in where for word in ("--set", setting)])
    assert ended.returncode == 3
    said = [line for line in messages(ended.stderr) if "copies" not in line]
    assert len(said) == 1
    assert f"{shard.name}, x: the block of the samples 0 to " in said[0]
    assert not list((run.path / "node-0").glob(f"fast/train-*/*{shard.name}*"))
