"""How many files a rank opens until its first step, and that what all need is read by one (docs/cluster.md).

A thousand ranks that start together ask one file system for all of these.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

MOST_OPENED, MOST_LOOKED_FOR = 600, 3800
"""By a rank that isn't the first, but for what lies on the node itself; counted: 540, and 3,200 names looked for, with
Open MPI 5 from its wheel.
"""
UNUSED = ("dpnn/backends/cuda/", "dpnn/data/pack/", "dpnn/strategies/downpour/", "/rich/", "/cupy/", "/sklearn/")
LOCAL = ("/proc/", "/sys/", "/dev/", "/etc/", "/tmp/ompi", "/lib/", "/usr/lib/", "/usr/share/")
SETTINGS = (
    "train.epochs=0", "train.steps=1", "train.eval_every=0", "backend.name=onednn", "model.name=lenet",
    "model.kernel=3", "model.padding=1", "model.filters=[32, 64]", "train.global_batch=64",
)  # fmt: skip
_CALL = re.compile(r'^\d+\s+(\w+)\([^"]*"([^"]*)".* = (-?\d+)', re.MULTILINE)
_OPENING = ("open", "openat", "execve")
TRACER = """#!/bin/sh
exec {strace} -f -qq -e trace=open,openat,execve,stat,newfstatat,statx,access,readlink,rename,renameat \
    -o {folder}/rank-${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} "$@"
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The calls of each of two ranks, with an empty cache: [(name, path, result)]."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace isn't installed: apt-get install strace")
    return strace, tmp_path_factory.mktemp("traces"), {}


@pytest.fixture
def traced(calls, start_line, job):
    """Run once: the calls by rank, the run's folder, and that of the cache."""
    from dpnn.comm.launch import command

    strace, folder, kept = calls
    if not kept:
        tracer = folder / "trace"
        tracer.write_text(TRACER.format(strace=strace, folder=folder))
        tracer.chmod(0o755)
        it = job(out="run")
        line = command(2, ["train", str(it.path), *(word for s in SETTINGS for word in ("--set", s))], ("-m", "dpnn"))
        at = line.index(sys.executable)
        ended = start_line([*line[:at], str(tracer), *line[at:]], env={"XDG_CACHE_HOME": str(folder / "cache")})
        done = ended.finish(100)
        assert done.returncode == 0, done.stderr
        for rank in range(2):
            found = _CALL.findall((folder / f"rank-{rank}").read_text())
            kept[rank] = [(name, path, int(result)) for name, path, result in found]
        kept["run"], kept["cache"] = it.out, folder / "cache" / "dpnn"
    return kept


def test_a_rank_opens_few_files_on_file_systems_that_all_share(traced):
    shared = [call for call in traced[1] if call[1].startswith("/") and not call[1].startswith(LOCAL)]
    opened = [path for name, path, result in shared if name in _OPENING and result >= 0]
    assert 100 < len(opened) <= MOST_OPENED
    assert len(shared) - len(opened) <= MOST_LOOKED_FOR


def test_what_all_need_is_read_by_the_first_rank(traced):
    opened = [{Path(path).name for name, path, _ in traced[rank] if name in _OPENING} for rank in range(2)]
    assert {"job.toml", "manifest.json", "choices.json", "metrics.jsonl"} & opened[1] == set()
    assert {"manifest.json", "metrics.jsonl"} <= opened[0]
    assert not any(Path(path).is_relative_to(traced["run"]) for _, path, _ in traced[1])


def test_a_cache_is_written_by_one_rank_and_read_by_no_other(traced):
    def touched(rank):
        return [name for name, path, _ in traced[rank] if Path(path).is_relative_to(traced["cache"])]

    assert "rename" in touched(0) or "renameat" in touched(0)
    assert touched(1) == []
    assert [path.suffix for path in traced["cache"].iterdir()] == [".json"]


def test_a_rank_imports_only_what_it_uses(traced):
    opened = {path for name, path, result in traced[1] if name in _OPENING and result >= 0}
    assert any("dpnn/backends/onednn/" in path for path in opened)
    assert [(unused, path) for path in opened for unused in UNUSED if unused in path] == []


def test_a_cache_that_can_not_be_written_costs_time_only(python, job, tmp_path):
    (tmp_path / "file").write_text("")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = python("-m", "dpnn", "train", job().path, *settings, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert done.returncode == 0, done.stderr
    assert f"what was timed or compiled is lost for other runs: {tmp_path}/file/dpnn/onednn-" in done.stdout
