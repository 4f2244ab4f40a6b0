"""What came of a run whose ranks were killed, told from outside: by books that programs/counted.py keeps and by the
parameters at the end, never by what the run says of itself.

A contribution is a batch of a process. In Downpour every one that isn't a dead process's is in every shard, once; those
of the dead are a beginning of what it did, once, in every shard or, where that is stated, in some only. Synchronous
training may drop a step for every death; and what a dead replica has done since the last average is lost, as is stated.
All contributions that are in any shard have every sample of every epoch, once.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from dpnn import checkpoint
from dpnn.strategies.downpour.protocol import shards

UNIT = 256.0
"""Of a gradient that says which batch it is of: much more than any number that the parameters begin with."""

LEAST_SHARE = 0.05
"""Of a replica in a mean."""


class Books:
    """Of a run of `ranks` processes, in `folder`: who trained on what, batch by batch."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self.ranks = folder, ranks
        self._read, self._counted = [0] * ranks, 0

    def n_batches(self) -> int:
        """So far, of all processes."""
        for rank in range(self.ranks):
            path = self._folder / str(rank)
            if path.exists():
                with path.open("rb") as file:
                    file.seek(self._read[rank])
                    new = file.read()
                self._read[rank] += len(new)
                self._counted += new.count(b"\n")
        return self._counted

    def contributions(self) -> list[list[Counter]]:
        """Of each process its batches, each with its (epoch, sample)."""
        return [[Counter((int(epoch), int(sample)) for sample in ids) for epoch, *ids in one] for one in self._lines()]

    def names(self) -> list[str]:
        """Of the parameters, as they lie in the flat arrays."""
        return (self._folder / "layout").read_text().split("\n")

    def _lines(self) -> list[list[list[str]]]:
        paths = (self._folder / str(rank) for rank in range(self.ranks))
        texts = [path.read_text() if path.exists() else "" for path in paths]
        return [[line.split() for line in text.splitlines()] for text in texts]


def applied(books: Books, run: Path, n_shards: int, n_slots: int, averaged: bool = False) -> np.ndarray:
    """How often each contribution is in each shard: (shards, ranks, n_slots), by the newest checkpoint of a run.

    `averaged`: parameters are means over replicas, which have a share of it, once if at all: whether it is there.
    """
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None, f"{run} has no checkpoint"
    params = checkpoint.read(found[0].path).params
    flat = np.concatenate([params[name].ravel() for name in books.names()])
    assert flat.size == sum(array.size for array in params.values()), "the layout isn't that of the parameters"
    slots, counts = books.ranks * n_slots, []
    for lo, hi in shards(flat.size, n_shards):
        copies = -flat[lo:hi][: (hi - lo) // slots * slots].reshape(-1, slots) / UNIT
        times = np.ceil(copies - LEAST_SHARE) if averaged else np.rint(copies)
        most = np.abs(copies - times).max(where=(times == 0) | (not averaged), initial=0)
        assert most < 0.02, f"a number is {most:g} from a whole one, by more than it can have begun with"
        torn = np.flatnonzero((times != times[0]).any(axis=0))
        assert torn.tolist() == [], "in a part of the shard only"
        counts.append(times[0].reshape(books.ranks, n_slots).astype(int))
    return np.array(counts)


def check_trained(books: Books, epochs: int, samples: int, dead: Collection[int], again: int = 0) -> None:
    """Fails where a sample of an epoch was never trained on, or several times though nobody who did so has died.

    `again`: so many may be, once for each that has died: those of steps that were taken back.
    """
    living, all_of_them = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for rank, batches in enumerate(books.contributions()):
        seen = Counter(chain.from_iterable(batches))
        all_of_them.update(seen)
        living.update(seen if rank not in dead else ())
    assert all_of_them.keys() == every_sample(epochs, samples).keys(), "samples that were never trained on"
    twice = living - every_sample(epochs, samples)
    assert twice.total() <= again, f"{twice.total()} samples were trained on twice, and at most {again} may be"
    assert max(twice.values(), default=0) <= len(dead), "a sample was trained on again more often than ranks have died"


def every_sample(epochs: int, samples: int) -> Counter:
    """(epoch, sample) of a whole run."""
    return Counter((epoch, sample) for epoch in range(epochs) for sample in range(samples))


def check(
    books: Books,
    counts: np.ndarray,
    epochs: int,
    samples: int,
    dead: Collection[int],
    stated: Mapping[tuple[int, int], int],
    dropped: int = 0,
    samples_lost: int = 0,
) -> int:
    """Fails where anything is lost, doubled or torn; the number of contributions.

    `dead`: processes that were killed. `stated`: by (shard, process), the batches that are said to be lost there.
    `dropped`: how many batches each process may have dropped, and taken again. `samples_lost`: so many are
    said to be in no shard.
    """
    done = books.contributions()
    assert set(np.unique(counts)) <= {0, 1}, f"applied twice: {np.argwhere(counts > 1).tolist()}"
    arrived = counts.any(axis=0)
    for rank, batches in enumerate(done):
        assert not arrived[rank, len(batches) :].any(), "a gradient that nobody has made"
        there = arrived[rank, : len(batches)]
        if rank in dead:
            there = there[: max(np.flatnonzero(there), default=-1) + 1]
        gone = np.flatnonzero(~there).tolist()
        assert len(gone) <= dropped, f"rank {rank} ({'dead' if rank in dead else 'alive'}) has lost {gone}"
    lost = {
        (shard, rank): int(n)
        for (shard, rank), n in np.ndenumerate((arrived & (counts == 0)).sum(axis=2))
        if n
    }  # fmt: skip
    said = {where: n for where, n in stated.items() if n}
    assert lost == said, f"by (shard, rank) {lost} are lost, and {said} are stated"
    seen = Counter[tuple[int, int]]()
    for rank, batches in enumerate(done):
        seen.update(chain.from_iterable(batches[number] for number in np.flatnonzero(arrived[rank]).tolist()))
    wanted = every_sample(epochs, samples)
    assert seen - wanted == Counter(), "samples that are in twice"
    absent = (wanted - seen).total()
    assert absent == samples_lost, f"{absent} samples aren't in, and {samples_lost} are stated"
    return int(arrived.sum())
