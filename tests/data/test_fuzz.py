"""Damaged shards, manifests, pictures and TFRecord files are read right or refused; `fuzz.py` has the cases."""

import json
import os
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz.py")


@pytest.fixture
def fuzz(start_python, tmp_path):
    """Run the cases [0, n), each process a share; what went wrong, by the number of the case."""

    def run(n, timeout):
        share = -(-n // min(len(os.sched_getaffinity(0)), 8))
        firsts = range(0, n, share)
        programs = []
        for first in firsts:
            folder = tmp_path / f"from-{first}"
            folder.mkdir()
            programs.append(start_python(PROGRAM, first, min(first + share, n), folder))
        wrong = {}
        for first, program in zip(firsts, programs, strict=True):
            ended = program.finish(timeout)
            said = [json.loads(line) for line in ended.stdout.splitlines()]
            wrong |= dict(line for line in said if isinstance(line, list))
            begun = [line for line in said if isinstance(line, int)]
            if ended.returncode:
                wrong[begun[-1] if begun else first] = f"the process ended with {ended.returncode}: {ended.stderr}"
            else:
                assert begun == [*range(first, min(first + share, n))]
        return wrong

    return run


def test_500_cases_are_read_right_or_refused_by_name(fuzz):
    assert fuzz(500, timeout=90) == {}


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_10000_cases_are_read_right_or_refused_by_name(fuzz):
    assert fuzz(10_000, timeout=1100) == {}


@pytest.mark.parametrize("end", ["os.abort()", "import time; time.sleep(99)"])
def test_a_case_that_crashes_or_hangs_is_told_by_its_number(python, tmp_path, end):
    program = f"""
import os, sys
sys.path.insert(0, {str(PROGRAM.parent)!r})
import fuzz

def case(subject, rng):
    {end}

fuzz.Pictures.case = case
fuzz.LIMIT_S = 4
fuzz.main(0, 9, {str(tmp_path)!r})
"""
    ended = python("-c", program)
    assert ended.returncode
    assert ended.stdout.split()[-1] == "4"
