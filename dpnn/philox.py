"""All randomness: counter-based, so that a number depends on what it is for and never on who asks, or when.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Two generators of that paper: Philox4x64-10 as
NumPy has it, for long runs of words, and Philox4x32-10 for words by sample, as kernels/philox.cuh has it for devices.
Seeds are 0..2**32-1. NumPy promises the raw words of its Philox for ever, but not `Generator.permutation`.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOW = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_TILE = 1 << 13
"""Counters that are worked on at a time: what a round touches stays in the cache."""


def words(n: int, seed: int, *stream: int, start: int = 0) -> NDArray[np.uint64]:
    """The words [start, start + n) of the stream named by up to three numbers of 64 bits, as uint64[n]."""
    if len(stream) > 3:
        raise ValueError(f"a stream is named by at most 3 numbers, not {len(stream)}")
    tag, *rest = (*stream, 0, 0, 0)[:3]
    key = np.array([seed, tag], np.uint64)
    # The first number of the counter runs, one for four words; the last keeps streams of unequal length apart.
    counter = np.array([start // 4, *rest, len(stream)], np.uint64)
    skipped = start % 4
    raw: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(skipped + n)
    return raw[skipped:]


def permutation(n: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """The numbers 0..n-1 in an order drawn from the stream, as int64[n]."""
    return np.argsort(words(n, seed, *stream), kind="stable").astype(np.int64, copy=False)


def by_sample(seed: int, epoch: int, purpose: str, ids: NDArray[Any], n: int) -> NDArray[np.uint32]:
    """`n` words for each sample, as uint32[N, n], from `ids` as uint64[N].

    Word i of a sample is word i % 4 of Philox4x32-10 at counter (i // 4, id's low half, id's high half, epoch) with the
    key (seed, crc32 of `purpose`).
    """
    ids = np.asarray(ids, np.uint64)
    blocks = -(-n // 4)
    out = np.empty((len(ids) * blocks, 4), np.uint32)
    key = (seed & 0xFFFFFFFF, zlib.crc32(purpose.encode()))
    for lo in range(0, len(out), _TILE):
        row, block = np.divmod(np.arange(lo, min(lo + _TILE, len(out))), blocks)
        counter = np.empty((4, len(row)), np.uint64)
        counter[0] = block
        counter[1] = ids[row] & _LOW
        counter[2] = ids[row] >> np.uint64(32)
        counter[3] = epoch & 0xFFFFFFFF
        out[lo : lo + len(row)] = philox4x32(counter, key).T
    return out.reshape(len(ids), 4 * blocks)[:, :n]


def philox4x32(counter: NDArray[Any], key: Sequence[int]) -> NDArray[np.uint32]:
    """Philox4x32-10 at the counters (4, M), numbers of 32 bits; four words each, as uint32[4, M]."""
    even = counter[0::2].astype(np.uint64)
    odd = counter[1::2].astype(np.uint64)
    product, high = np.empty_like(even), np.empty_like(even)
    for turn in range(10):
        # (c0, c1, c2, c3) becomes (high(m1 c2) ^ c1 ^ k0, low(m1 c2), high(m0 c0) ^ c3 ^ k1, low(m0 c0)).
        round_key = np.array([[(k + turn * w) & 0xFFFFFFFF] for k, w in zip(key, _WEYL, strict=True)], np.uint64)
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product, np.uint64(32), out=high)
        np.bitwise_xor(high[::-1], odd, out=even)
        np.bitwise_xor(even, round_key, out=even)
        np.bitwise_and(product[::-1], _LOW, out=odd)
    return np.stack((even[0], odd[0], even[1], odd[1])).astype(np.uint32)
