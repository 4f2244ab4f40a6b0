"""The same global batches give the same network, on however many ranks they are worked out.

Twenty steps each: past the end of an epoch, whose last batch is uneven, and with numbers of ranks that don't divide
the lanes.
"""

import numpy as np
import pytest

LIMIT = 1e-9
EXACT = ("train.epochs=0", "train.steps=20", "train.eval_every=0", "backend.precision=float64")
CASES = {
    # 16 lanes; the last batch of an epoch has 7 samples, so that of 4 ranks two have 1 and none more than 3.
    "sync_batchnorm": ("optimizer.nesterov=true",),
    # 5 lanes on 3 and 4 ranks, two losses, a clip that is always reached.
    "clipped_microbatches": (
        "model.name=networks.py:heads", "train.global_batch=20", "data.lanes=5",
        "parallel.microbatches=2", "parallel.bucket_mb=0.001", "optimizer.clip=0.5", "optimizer.lr=0.2",
    ),
    # The last batch is a single sample: all ranks but one have none.
    "last_batch_of_one": ("train.global_batch=46", "data.window=4"),
}  # fmt: skip


def settings(case: str, folder) -> tuple[str, ...]:
    return EXACT + tuple(s.replace("networks.py", f"{folder}/networks.py") for s in CASES[case])


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        pytest.param("sync_batchnorm", 2, marks=pytest.mark.smoke),
        ("sync_batchnorm", 3),
        pytest.param("sync_batchnorm", 4, marks=pytest.mark.smoke),
        ("clipped_microbatches", 3),
        ("clipped_microbatches", 4),
        ("last_batch_of_one", 2),
    ],
)
def test_in_float64_ranks_make_no_difference(trained, last, request, case, ranks):
    """Parameters, statistics and momentum: relative to the largest number of each array."""
    chosen = settings(case, request.path.parent)
    one, many = last(trained(1, *chosen)), last(trained(ranks, *chosen))
    assert (one.epoch, one.step, one.steps) == (many.epoch, many.step, many.steps)
    arrays, others = dict(one.arrays()), dict(many.arrays())
    assert arrays.keys() == others.keys()
    worst, name = max(
        (np.abs(arrays[name] - others[name]).max() / np.abs(arrays[name]).max(), name)
        for name in arrays
        if arrays[name].any()
    )
    print(f"{case}, {ranks} ranks: largest relative difference {worst:.1e}, of {name} (limit {LIMIT:g})")
    assert all(array.dtype == np.float64 for array in arrays.values())
    assert worst <= LIMIT


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_in_float32_ranks_matter_no_more_than_threads_do(trained, last, request, ranks):
    """Within three times of what one rank differs from itself on one and on two threads.

    Two threads cut the matrix products of NumPy's BLAS otherwise, as ranks do. The network has no ReLU and no maximum:
    where a rounding error flips one of their decisions, the difference jumps by 10 to 100 times, by chance, whatever
    its source. Where two threads give the same bits (one core, another BLAS), float32's rounding unit stands for the
    difference.
    """
    chosen = (
        "train.epochs=0", "train.steps=20", "train.eval_every=0", "train.global_batch=48", "optimizer.lr=0.02",
        f"model.name={request.path.parent}/networks.py:smooth",
    )  # fmt: skip
    one = flat(last(trained(1, *chosen, "backend.threads=1")))
    two_threads = distance(one, flat(last(trained(1, *chosen, "backend.threads=2"))))
    found = distance(one, flat(last(trained(ranks, *chosen, "backend.threads=1"))))
    limit = 3 * max(two_threads, float(np.finfo(np.float32).eps) / 2)
    print(f"{ranks} ranks differ by {found:.1e}, two threads by {two_threads:.1e} (limit {limit:.1e})")
    assert found <= limit


def flat(checkpoint) -> np.ndarray:
    return np.concatenate([array.ravel() for array in checkpoint.params.values()]).astype(np.float64)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Relative, of all parameters together."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))
