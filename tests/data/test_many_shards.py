"""Memory doesn't grow with the data set. The mission's size itself is in benchmarks/data.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "programs" / "many_shards.py"


def test_a_rank_alone_reads_millions_of_samples_in_little_memory(python, tmp_path):
    """6.4 million samples in 300 shards, whose labels, ids and offsets alone are 128 MB."""
    ended = python(PROGRAM, tmp_path, 300, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"})
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 90
