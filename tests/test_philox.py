"""Random words depend on what they are for, and never change."""

import ctypes
import itertools
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from dpnn.philox import by_sample, permutation, philox4x32, words

HEADER = Path(__file__).parents[1] / "kernels" / "philox.cuh"

KNOWN = [  # Random123's known-answer vectors: counter, key, words
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

WORDS = [15047842521578985209, 9880855764717987387, 10936040715835090888]
PERMUTATION = [4, 9, 7, 3, 8, 1, 2, 5, 0, 6]
BY_SAMPLE = [
    [560200052, 4020151638, 1515922304, 2874989469, 2148173847],
    [839196192, 1555154403, 2142331660, 3462235784, 2749164397],
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox4x32_gives_the_published_words(counter, key, expected):
    counters = np.array([counter, counter], np.uint64).T
    assert philox4x32(counters, key).T.tolist() == [expected, expected]


def test_words_and_permutations_are_the_same_for_ever():
    assert words(3, 7, 1, 2).tolist() == WORDS
    assert permutation(10, 7, 1, 2).tolist() == PERMUTATION
    assert by_sample(7, 3, "dropout1", np.array([5, 2**32 + 5], np.uint64), 5).tolist() == BY_SAMPLE


@pytest.mark.parametrize("start", range(6))
def test_words_go_on_where_they_were_left(start):
    assert np.array_equal(words(11, 3, 4, 5, 6, start=start), words(20, 3, 4, 5, 6)[start : start + 11])


def test_streams_differ_in_every_number_and_in_length():
    streams = [(), (0,), (0, 0), (0, 0, 0), (1,), (0, 1), (0, 0, 1), (1, 0)]
    first = [int(words(1, seed, *stream)[0]) for seed in (0, 1) for stream in streams]
    assert len(set(first)) == len(first)
    with pytest.raises(ValueError, match="at most 3"):
        words(1, 0, 1, 2, 3, 4)


def test_a_permutation_holds_every_number_once():
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))
    assert permutation(0, 1).tolist() == []


def test_a_samples_words_depend_on_nothing_but_seed_epoch_purpose_and_id():
    ids = np.array([9, 2**40 + 1, 3, 2**64 - 1], np.uint64)
    whole = by_sample(1, 2, "crop", ids, 10)
    assert whole.shape == (4, 10)
    assert np.array_equal(by_sample(1, 2, "crop", ids[::-1], 10), whole[::-1])
    assert np.array_equal(by_sample(1, 2, "crop", ids[1:2], 7), whole[1:2, :7])
    others = [(2, 2, "crop"), (1, 3, "crop"), (1, 2, "flip")]
    assert not any((by_sample(*other, ids, 10) == whole).any() for other in others)
    assert not (by_sample(1, 2, "crop", ids + np.uint64(2**32), 10)[:3] == whole[:3]).any()


def test_by_sample_takes_no_samples_and_no_words():
    assert by_sample(1, 2, "crop", np.array([], np.uint64), 5).shape == (0, 5)
    assert by_sample(1, 2, "crop", np.array([1], np.uint64), 0).shape == (1, 0)


def test_words_by_sample_are_uniform_and_independent():
    drawn = by_sample(0, 0, "dropout", np.arange(500), 400) / 2.0**32
    assert abs(drawn.mean() - 0.5) < 5 / np.sqrt(12 * drawn.size)
    counts = np.histogram(drawn, 64, (0, 1))[0]
    expected = drawn.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square, 63 degrees of freedom: p is about 1e-5
    for a, b in itertools.pairwise([drawn[0], drawn[1], drawn[:, 0][:400], drawn[:, 1][:400]]):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.25


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """The CUDA header's `by_sample`, compiled for the CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (g++, c++) to compile kernels/philox.cuh with")
    folder = tmp_path_factory.mktemp("philox")
    source = folder / "wrapper.cpp"
    source.write_text(
        f'#include "{HEADER}"\n'
        'extern "C" void words(unsigned seed, unsigned epoch, unsigned purpose, unsigned long long id, unsigned n,\n'
        "                      unsigned* out) {\n"
        "    for (unsigned i = 0; i < n; ++i) out[i] = dpnn::by_sample(seed, epoch, purpose, id, i / 4).w[i % 4];\n"
        "}\n"
    )
    library = folder / "wrapper.so"
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).words
    word = ctypes.c_uint32
    function.argtypes = [word, word, word, ctypes.c_uint64, word, ctypes.POINTER(word)]
    function.restype = None
    return function


@pytest.mark.parametrize("sample", [0, 5, 2**32 + 5, 2**64 - 1])
def test_the_cuda_header_draws_the_same_words(header, sample):
    out = (ctypes.c_uint32 * 13)()
    header(2**32 - 1, 17, zlib.crc32(b"dropout1"), sample, 13, out)
    assert list(out) == by_sample(2**32 - 1, 17, "dropout1", np.array([sample], np.uint64), 13)[0].tolist()
