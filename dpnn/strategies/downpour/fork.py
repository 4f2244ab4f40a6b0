"""A second copy of a shard, which gets the pushes of a checkpoint only, while the shard itself gets all."""

from typing import Any

import numpy as np

from dpnn.strategies.downpour.copies import Copy
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.protocol import Array, Change
from dpnn.strategies.downpour.server import Server


class Fork:
    """Of a server's shard, up to so many pushes of each replica as `begin` is told."""

    def __init__(self, server: Server) -> None:
        shard = server.shard
        self.server, self.number = server, server.number
        self._copy = Copy(np.empty_like(shard.params))
        self.state = {name: np.empty_like(array) for name, array in shard.state.items()}
        self.steps = 0
        """Of all replicas, that it has; `taken`: of each."""
        self.taken = np.zeros(len(shard.accounts), np.int64)
        self._target = np.zeros_like(self.taken)
        self._ledger: Ledger | None = None
        self._open = False

    @property
    def params(self) -> Array:
        """As they are after those pushes."""
        return self._copy.params

    def begin(self, target: Array) -> None:
        """The copy, as the shard is now; what is still missing of so many pushes of each replica is to come."""
        shard = self.server.shard
        np.copyto(self.params, shard.params)
        for name, array in shard.state.items():
            np.copyto(self.state[name], array)
        self.steps, self._ledger = shard.steps, shard.ledger and shard.ledger.copy()
        self.taken[:] = [account.pushed[0] for account in shard.accounts]
        self._target[:] = target
        self._open = True

    def follow(self, change: Change, gradients: Array | None, rate: float, scale: float) -> None:
        """The shard has been changed by a push: the copy gets it too, if it belongs to the checkpoint."""
        if not self._open or change.number > self._target[change.replica]:
            return
        if scale and gradients is not None:
            optimizer = self._copy.optimizer(gradients, self.server.shard.make, self.state)
            optimizer.apply(0, self.params.size, rate, scale)
        self._take(change.replica, change.steps)

    @property
    def complete(self) -> bool:
        """Whether it has all, of those who live."""
        accounts = self.server.shard.accounts
        return not any(account.pushes < self._target[account.replica] and not account.lost for account in accounts)

    def end(self, taken: Array) -> dict[str, Any]:
        """Nothing more is to come. So many steps of each replica are in some copies, but for the last pushes of who has
        died meanwhile: they count. What the ledger says then.
        """
        for replica, steps in enumerate((taken - self.taken).tolist()):
            if steps:
                self._take(replica, steps)
        self._open = False
        return self._ledger.state() if self._ledger is not None else {}

    def drop(self) -> None:
        """There is no checkpoint of it after all."""
        self._open = False

    def _take(self, replica: int, steps: int) -> None:
        self.steps += steps
        self.taken[replica] += steps
        if self._ledger is not None:
            self._ledger.arrived(replica, steps)
