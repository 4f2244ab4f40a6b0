"""A shard of the parameters, and all that changes it: no messages, so a server and its mirror do the same.

What a shard is follows from where it began and from its changes, in their order. Who holds it does each and tells its
mirror, which does them too: the two are alike, bit for bit.
"""

import pickle
from collections.abc import Callable

import numpy as np

from dpnn import config
from dpnn.data import Run
from dpnn.errors import RankError
from dpnn.optim import Optimizer
from dpnn.strategies.downpour.copies import Copies, Copy
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.protocol import Array, Change, Deed

_BINS = 128
"""Of the histogram of staleness; the last one has all that is more."""
_NUMBERS = (
    *("version", "steps", "samples", "bad", "discarded", "loss"),
    *("left", "lost", "stop", "over", "written", "losses"),
)

Make = Callable[[Array, Array, dict[str, Array]], Optimizer]
Send = Callable[[Copy, Callable[[int, int], None]], None]


class Account:
    """What has come of a replica."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.pushes = self.staleness = self.lead = self.leases = 0
        """Pushes that were applied; the staleness of the last one; steps, as far as `parallel.lead` counts them; leases
        that it was given."""
        self.pushed = np.zeros(4)
        """Steps, samples, loss and bad samples of its pushes."""
        self.leased: Run | None = None
        """The last lease."""
        self.joined = self.left = self.lost = False
        """Whether it takes part; will push no more; has died."""


class Shard:
    """Some of the parameters, what the optimizer keeps of them, and what has come of every replica.

    `make(params, grads, state)`: an optimizer over such arrays. `rate`: the learning rate by the number of steps of all
    replicas. `ledger`: of the first shard.
    """

    def __init__(
        self,
        params: Array,
        state: dict[str, Array],
        make: Make,
        rate: Callable[[int], float],
        options: config.Parallel,
        replicas: int,
        ledger: Ledger | None = None,
    ) -> None:
        self.copies, self.state, self.make, self.rate, self.ledger = Copies(params), state, make, rate, ledger
        self._policy, self._bound = options.staleness.policy, options.staleness.bound
        self._warmup, self._spares = options.warmup_steps, options.spares
        self.accounts = [Account(replica) for replica in range(replicas)]
        self.left = replicas
        """Replicas that may still push."""
        self.lost = 0
        """Replicas that have died."""
        self.version = self.steps = self.samples = self.bad = self.discarded = 0
        self.loss = 0.0
        self.stop = self.over = self.written = False
        """Whether the run stops; is over, as the speaker says; whether the last checkpoint is written."""
        self.losses: list[int] = []
        """Who has died and whose leases are still to be settled."""
        self.histogram = np.zeros(_BINS, np.int64)
        """Pushes by staleness: updates of this shard since the parameters that they were computed from."""

    @property
    def params(self) -> Array:
        """The newest."""
        return self.copies.newest.params

    @property
    def speaker(self) -> Account | None:
        """The first replica that hasn't died: it speaks for the run."""
        return next((account for account in self.accounts if not account.lost), None)

    def do(self, change: Change, gradients: Array | None = None) -> None:
        """Any change, as who holds the shard has done it."""
        account = self.accounts[change.replica]
        match change.deed:
            case Deed.PUSH | Deed.SKIP:
                self.push(change, gradients)
            case Deed.GRANT:
                self.grant(account.replica)
            case Deed.REST:
                account.joined = False
            case Deed.LEAVE:
                self._leave(account)
            case Deed.LOSE:
                account.lost = True
                self.lost += 1
                self.losses.append(account.replica)
            case Deed.SETTLE:
                self.settle(change)
            case Deed.STOP:
                self.stop = True
            case Deed.OVER:
                self.over = True
            case Deed.WRITTEN:
                self.written = True

    def push(self, change: Change, gradients: Array | None, send: Send | None = None) -> tuple[float, float]:
        """Update by a push, unless it is too stale, or its gradients are lost (None). Some copy has to be free.

        Returned: the rate and the scale that it was applied at; 0: not at all. `send(copy, update)` is to call
        `update(lo, hi)` for all slices of the copy, in their order, which has these numbers of the next version then.
        """
        account = self.accounts[change.replica]
        if change.number != account.pushes + 1:
            raise RankError(f"push {change.number} of replica {change.replica} came after its push {account.pushes}")
        rate, scale = self.rate(self.steps), 0.0
        if gradients is not None:
            account.staleness = max(0, self.version - change.base)  # less than 0 after updates that were lost
            self.histogram[min(account.staleness, _BINS - 1)] += 1
            scale = self._scale(account.staleness)
            self.discarded += scale == 0.0
        if gradients is not None and scale:
            self._update(gradients, rate, scale, send)
        elif send:
            send(self.copies.newest, lambda lo, hi: None)
        account.pushes += 1
        account.lead += change.steps
        account.pushed += (change.steps, change.samples, change.loss, change.bad)
        self._count(change.steps, change.samples, change.loss, change.bad)
        if self.ledger is not None:
            self.ledger.arrived(change.replica, change.steps)
        return rate, scale

    def grant(self, replica: int) -> Run | None:
        """Lease some steps to a replica, if any are left."""
        run = self.ledger.lease(replica) if self.ledger is not None else None
        if run is not None:
            account = self.accounts[replica]
            account.leases, account.leased = account.leases + 1, run
            if not account.joined:
                account.joined = True
                account.lead = self._slowest(account, account.lead)
        return run

    def settle(self, change: Change) -> tuple[int, int]:
        """A replica has died, and so much has arrived of it where the most has: others are leased the rest.

        Returned: its steps that this shard hasn't got, and those that nobody can take.
        """
        account = self.accounts[change.replica]
        pushed = np.array((change.steps, change.samples, change.loss, change.bad), np.float64)
        steps, samples, loss, bad = (pushed - account.pushed).tolist()
        account.pushed = pushed
        self._count(int(steps), int(samples), loss, int(bad))
        out_of_reach = 0
        if account.replica in self.losses:
            self.losses.remove(account.replica)
            out_of_reach = self.ledger.lose(account.replica, int(steps)) if self.ledger is not None else 0
        self._leave(account)
        return int(steps), out_of_reach

    def ahead(self, replica: int, steps: int = 0) -> int:
        """How many steps a replica is ahead of the slowest other one, after so many more."""
        lead = self.accounts[replica].lead + steps
        return lead - self._slowest(self.accounts[replica], lead)

    def _slowest(self, but: Account, default: int) -> int:
        """The least that any other replica has done, of those that have joined and not left."""
        others = (account for account in self.accounts if account is not but and not account.lost)
        return min((account.lead for account in others if account.joined and not account.left), default=default)

    def warms_up(self, replica: int) -> bool:
        """Whether a replica has to wait, since the first one still takes its steps alone."""
        speaker = self.speaker
        alone = self.steps < self._warmup and speaker is not None and not speaker.left
        return alone and speaker is not self.accounts[replica]

    def is_spare(self, replica: int) -> bool:
        """Whether so many before a replica live that it isn't needed."""
        return sum(not account.lost for account in self.accounts[:replica]) >= len(self.accounts) - self._spares

    def snapshot(self) -> bytes:
        """All that is no array as long as the shard."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return pickle.dumps((self.accounts, self.ledger, self.histogram, numbers))

    def restore(self, snapshot: bytes) -> None:
        """What another has."""
        self.accounts, self.ledger, self.histogram, numbers = pickle.loads(snapshot)
        for name, value in numbers.items():
            setattr(self, name, value)

    def _scale(self, staleness: int) -> float:
        if self._policy == "scale" and staleness > 1:
            return 1.0 / staleness
        return 0.0 if self._policy == "discard" and staleness > self._bound else 1.0

    def _update(self, gradients: Array, rate: float, scale: float, send: Send | None) -> None:
        """Write the next version into a copy."""
        old, copy = self.copies.newest, self.copies.to_write()
        if copy is None:
            raise ValueError("all copies are being sent")
        optimizer = copy.optimizer(gradients, self.make, self.state)

        def update(lo: int, hi: int) -> None:
            copy.update(lo, hi, old, optimizer, rate, scale, self.copies.stores)

        if send is None:
            update(0, copy.params.size)
        else:
            send(copy, update)
        self.copies.newest = copy
        self.version += 1

    def _count(self, steps: int, samples: int, loss: float, bad: int) -> None:
        self.steps, self.samples = self.steps + steps, self.samples + samples
        self.loss, self.bad = self.loss + loss, self.bad + bad

    def _leave(self, account: Account) -> None:
        if not account.left:
            account.left = True
            self.left -= 1
