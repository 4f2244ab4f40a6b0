"""The course of an asynchronous run: its steps, their data, and who holds which parameters."""

from collections.abc import Sequence
from itertools import pairwise

from dpnn import models
from dpnn.data import Sampler
from dpnn.optim import schedule
from dpnn.plan import Piece, clip, lay, spread
from dpnn.prepare import Start
from dpnn.strategies.downpour.protocol import deal


class Course:
    """The run's steps, those of all replicas together, each of a replica's batch; and who holds which parameters."""

    def __init__(self, start: Start) -> None:
        job = start.job
        counts, block = start.train.counts, start.train.block
        owners = start.train_at.owners
        self.sampler = Sampler(counts, block, start.lanes, start.global_batch, start.window, job.seed, owners=owners)
        self.lanes = [self.sampler.lane_steps(lane) for lane in range(start.lanes)]
        self.epoch = sum(self.lanes)
        """Steps of an epoch."""
        self.leases = start.leases or {"next": [start.epoch, 0], "left": [], "steps": start.epoch * self.epoch}
        """Where the run goes on."""
        self.shift = start.steps - self.leases["steps"]
        """A run that began with another strategy counted other steps."""
        self.total = job.train.epochs * self.epoch or job.train.steps - self.shift
        self.rate = schedule(job.schedule, job.optimizer.lr, self.epoch, self.total)
        self.placed = placed = spread(models.graph(job, start.network, start.shape), start.placement)
        self.pieces = [lay(placed.nodes(part)) for part in range(placed.parts)]
        """What each part holds."""
        sizes = [pieces[-1].end if pieces else 0 for pieces in self.pieces]
        self.shards = deal(sizes, job.parallel.servers, first=placed.reader)
        """What each server holds: the first one, which leases the lanes, serves the part that reads."""

    def held(self, shard: int) -> Sequence[Piece]:
        """The pieces of a shard."""
        part, lo, hi = self.shards[shard]
        return clip(self.pieces[part], lo, hi)

    def counts(self, lane: int, step: int, microbatches: int) -> list[tuple[int, int]]:
        """For each micro-batch of a lane's step: (samples of this replica, samples that statistics are taken over)."""
        sampler = self.sampler
        rows = min(sampler.share, int(sampler.cuts[lane + 1] - sampler.cuts[lane]) - step * sampler.share)
        cuts = [rows * i // microbatches for i in range(microbatches + 1)]
        return [(hi - lo, hi - lo) for lo, hi in pairwise(cuts)]
