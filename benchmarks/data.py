"""How fast samples come: from shards, through decoding and augmentation, to a network; and what that takes of memory.

- Raw samples (224 x 224 x 3) by our reader, which compares checksums, and by the whole loader, which makes normalised
  float32 of them: it writes four bytes for each that it reads. The limit is preadv of the same bytes in the same order
  into memory that stays in the cache. Cold: the files are dropped from the page cache before each turn.
  What it writes is also compared with a copy in memory.
- JPEGs (500 x 375, quality 90). The limit is simplejpeg's decoding alone, in as many threads, on records in memory.
- Augmentations in one thread; the limit is what their parts take, measured alone.
- The same work by PyTorch's DataLoader with as many processes as we have threads, and what both take of memory: of all
  their processes, beside what was there before the loader was made.
- A consumer that takes 80 % of the samples that the loader can bring.
- A rank that reads 34 million samples in 1,600 shards: what it takes of memory and time before the first step.
- Packing a folder of JPEGs, each of which is read, decoded once, written and read back; checking what was packed.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

from feeds import Blocks, Copying, Decoding, Feed, Parts, Rank
from harness import Benchmark, Worker, cores, medians
from photos import write_jpegs
from sparse import SHARDS, write_sparse

from dpnn.data.check import check
from dpnn.data.pack import pack
from dpnn.data.view.images import CentreBox, RandomBox, ResizedBox

BATCH = 64
SIZE = 224


class Benches:
    """Makes the data in `folder`, and measures one thing after the other."""

    def __init__(self, bench: Benchmark, folder: Path) -> None:
        self._bench, self._folder = bench, folder
        self._jpegs, self._encoded, self._raw = (folder / name for name in ("jpegs", "encoded", "raw"))
        self._records = write_jpegs(self._jpegs, 256 if bench.quick else 4096)

    def packing(self) -> None:
        """Also makes the shards that others read."""
        n, threads = len(self._records), cores()
        nbytes = sum(map(len, self._records))

        def packed() -> float:
            shutil.rmtree(self._encoded, ignore_errors=True)
            begin = perf_counter()
            pack(str(self._jpegs), self._encoded)
            return perf_counter() - begin

        ours, peer = self._alternate(packed, Decoding(self._records, threads).epoch)
        self._rate("pack a folder of JPEGs", n / ours, n / peer, f"simplejpeg, {_threads(threads)}", 0.8)
        report = check(self._encoded, threads=threads)
        self._bench.note(f"dpnn data check: {nbytes / report.seconds / 1e6:.0f} MB/s of JPEGs, {_threads(threads)}")
        pack(str(self._jpegs), self._raw, raw=SIZE)

    def reading(self) -> None:
        """Raw samples."""
        blocks = Blocks(self._raw / "train")
        feed = Feed(self._raw / "train", BATCH, cores())
        megabytes = blocks.nbytes / 1e6
        feed.open()

        def cold(epoch: Callable[[], float]) -> float:
            blocks.forget()
            return epoch()

        for what, epoch in (("reader, checksums", blocks.checked), ("loader, to float32", feed.epoch)):
            ours, peer = self._alternate(epoch, blocks.plain)
            self._rate(f"raw, {what}, warm", megabytes / ours, megabytes / peer, "preadv", 0.8, "MB/s")
            ours, peer = self._alternate(partial(cold, epoch), partial(cold, blocks.plain))
            self._rate(f"raw, {what}, cold", megabytes / ours, megabytes / peer, "preadv", 0.8, "MB/s")
        ours, peer = self._alternate(feed.epoch, Copying(4 * blocks.nbytes, cores()).epoch)
        peer_name = f"copy in memory, {cores()} threads"
        self._rate(
            "raw, loader, float32 written, warm", 4 * megabytes / ours, 4 * megabytes / peer, peer_name, 0.8, "MB/s"
        )
        feed.close()

    def decoding(self) -> None:
        """JPEGs that are decoded; and that are resized, cut and normalised as well."""
        n = len(self._records)
        for threads in (1, 2):
            feed = Feed(self._encoded / "train", BATCH, threads, size=SIZE)
            feed.open()
            simple = Decoding(self._records, threads)
            ours, peer = self._alternate(Decoding(self._records, threads, ours=True).epoch, simple.epoch)
            self._rate(f"JPEG, decoded, {_threads(threads)}", n / ours, n / peer, "simplejpeg", 0.9)
            ours, peer = self._alternate(feed.epoch, simple.epoch)
            self._rate(f"JPEG, to float32, {_threads(threads)}", n / ours, n / peer, "simplejpeg", 0.9)
            feed.close()

    def augmentations(self) -> None:
        """On one thread."""
        n = len(self._records)
        for augment, boxes in (("none", CentreBox()), ("crop-flip", RandomBox(0)), ("imagenet", ResizedBox(0))):
            feed = Feed(self._encoded / "train", BATCH, 1, size=SIZE, augment=augment)
            feed.open()
            parts = Parts(self._records, boxes, SIZE)
            ours, peer = self._alternate(feed.epoch, parts.epoch)
            self._rate(f"JPEG, {augment}, 1 thread", n / ours, n / peer, "its parts alone", 0.9)
            shares = ", ".join(f"{name} {1e6 * seconds / n:.0f}" for name, seconds in parts.seconds.items())
            self._bench.note(f"its parts, us an image: {shares}")
            feed.close()

    def consumer(self) -> None:
        """80 % of our own rate, which is measured just before."""
        feed = Feed(self._encoded / "train", BATCH, 2, size=SIZE, augment="imagenet")
        feed.open()
        (seconds,) = self._alternate(feed.epoch)
        rate = 0.8 * feed.samples / seconds
        waited = feed.waited(rate, 2 if self._bench.quick else 10)
        self._bench.record(f"waits at 80 % ({rate:.0f} images/s)", 100 * waited, 1.0, "the limit", 1.0, "% of time")
        feed.close()

    def peers(self) -> None:
        """PyTorch's DataLoader."""
        from imagefolder import Peer

        n, threads = len(self._records), 2
        make = partial(Feed, augment="imagenet", size=SIZE)
        for library, goal in (("pillow", 2.0), ("simplejpeg", 1.2)):
            with (
                Worker("ours", make, self._encoded / "train", BATCH, threads, threads=1) as ours,
                Worker(library, Peer, self._jpegs, library, True, threads=1) as peer,
            ):
                before = nbytes(ours.pid), nbytes(peer.pid)
                peaks = [watched(ours, "open")[1], watched(peer, "open", BATCH, threads)[1]]
                times = self._alternate(partial(ours.call, "epoch"), partial(peer.call, "epoch"))
                peaks = [max(most, watched(side, "epoch")[1]) for most, side in zip(peaks, (ours, peer), strict=True)]
            name = f"DataLoader, {library}"
            self._rate(f"JPEG, imagenet, {_threads(threads)}", n / times[0], n / times[1], name, goal)
            added = [(most - least) / 1e6 for most, least in zip(peaks, before, strict=True)]
            self._bench.record("memory of all its processes", *added, name, 1.0, "MB")

    def size(self) -> None:
        """Shards whose samples are holes in the files."""
        folder, n_shards, ranks = self._folder / "sparse", 160 if self._bench.quick else SHARDS, 4
        samples = write_sparse(folder, n_shards).samples
        what = f"{samples / 1e6:.1f} M samples, {n_shards} shards"
        found = []
        for resumes in (False, True):
            with Worker("rank", Rank, folder, ranks, threads=1) as rank:
                before, (seconds, peak) = nbytes(rank.pid), watched(rank, "start", resumes)
            found.append((seconds["check"] + seconds["batch"], seconds["batch"], peak - before - seconds["batches"]))
        (start_s, *_), (_, resume_s, _) = found
        added = max(more for *_, more in found)
        self._bench.record(f"{what}: start", start_s, 2.0, "the limit", 1.0, "s")
        self._bench.record("resuming in an epoch, once checked", resume_s, 1.0, "the limit", 1.0, "s")
        self._bench.record("memory beside batches", added / 1e6, 100.0, "the limit", 1.0, "MB")

    def _alternate(self, *epochs: Callable[[], float]) -> list[float]:
        """The median time of each, in seconds."""

        def repeated(epoch: Callable[[], float], number: int) -> float:
            return sum(epoch() for _ in range(number)) / number

        budget_s = 1.0 if self._bench.quick else 30.0
        return medians([partial(repeated, epoch) for epoch in epochs], budget_s)

    def _rate(self, case: str, ours: float, peer: float, peer_name: str, goal: float, unit: str = "images/s") -> None:
        self._bench.record(case, ours, peer, peer_name, goal, unit, more_is_better=True)


def watched(worker: Worker, method: str, *args: object) -> tuple[Any, int]:
    """What a call returns, and the most memory that all processes of the worker had meanwhile."""
    peak, ended = 0, Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, nbytes(worker.pid))

    thread = Thread(target=watch)
    thread.start()
    try:
        result = worker.call(method, *args)
    finally:
        ended.set()
        thread.join()
    return result, peak


def nbytes(pid: int) -> int:
    """Memory of a process and all its descendants; what several of them share is counted once."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    total, family = 0, [pid]
    for one in family:
        with suppress(OSError):
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
        family += [child for child, parent in parents.items() if parent == one]
    return total


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def main() -> None:
    """All of it, on data that is removed afterwards."""
    bench = Benchmark("data", __doc__, ["numpy", "simplejpeg", "opencv-python-headless", "pillow", "torch"])
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:
        benches = Benches(bench, Path(folder))
        benches.packing()
        benches.reading()
        benches.decoding()
        benches.augmentations()
        benches.peers()
        benches.consumer()
        benches.size()
    bench.finish()


if __name__ == "__main__":
    main()
