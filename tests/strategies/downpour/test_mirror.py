"""What a mirror does, without MPI: all that its shard's holder has done, in that order, makes the same of the same."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from dpnn import config
from dpnn.errors import RankError
from dpnn.optim import STATES, Optimizer, Segment
from dpnn.strategies.downpour.holders import Holders
from dpnn.strategies.downpour.ledger import Ledger
from dpnn.strategies.downpour.mirror import Shadow
from dpnn.strategies.downpour.protocol import Change, Deed, Letter
from dpnn.strategies.downpour.shard import Shard
from dpnn.team import Team

N, REPLICAS, LANES = 300, 4, (3, 5, 2, 4) * 30
POLICIES = {"accept": 0, "scale": 0, "discard": 2}


def made(name: str, policy: str) -> Shard:
    job = config.parse(
        'data.train = "none"\nmodel.name = "none"\ntrain = {steps = 1, replica_batch = 1}\n'
        f'optimizer = {{name = "{name}", lr = 0.1}}\n'
        'parallel = {strategy = "downpour", servers = 2}',
        [f"parallel.staleness.policy={policy}", f"parallel.staleness.bound={POLICIES[policy]}"],
    )

    def make(params, grads, state):
        return Optimizer(job.optimizer, [Segment(0, N, False, 0.0)], params, grads, Team(1), None, state)

    state = {kept: np.zeros(N) for kept in STATES[name]}
    ledger = Ledger(LANES, sum(LANES), REPLICAS)
    return Shard(np.zeros(N), state, make, lambda step: 0.1 / (1 + step), job.parallel, REPLICAS, ledger)


class Random:
    """What workers and servers might do to a shard, at random: each time a change, and a gradient where one goes."""

    def __init__(self, shard: Shard, seed: int) -> None:
        self.shard, self.draw, self.rng = shard, random.Random(seed), np.random.default_rng(seed)

    def change(self) -> tuple[Change, np.ndarray | None] | None:
        """The next one, which the shard has not done; None: this time nothing could be done."""
        shard, draw = self.shard, self.draw
        living = [account for account in shard.accounts if not account.lost]
        account, spare = draw.choice(living), sum(not account.left for account in living) > 2
        replica, held = account.replica, sum(run.last - run.first + 1 for run in shard.ledger.held[account.replica])
        steps, base = min(held, draw.randrange(1, 4)), max(0, shard.version - draw.randrange(4))
        numbers = (account.pushes + 1, steps, 7, base, draw.random(), 1)
        match draw.randrange(12):
            case 0 | 1 | 2 | 3 if not account.left:
                return (Change(Deed.GRANT, replica), None) if can_grant(shard, replica) else None
            case 4 | 5 | 6 | 7 if held:
                return Change(Deed.PUSH, replica, *numbers), self.rng.normal(size=N)
            case 8 if held:
                return Change(Deed.SKIP, replica, *numbers), None
            case 9:
                return Change(draw.choice([Deed.REST, Deed.STOP]), replica), None
            case 10 if spare and draw.random() < 0.2:
                return Change(Deed.LOSE, replica), None
            case 11 if shard.losses:
                lost = shard.accounts[shard.losses[0]]
                steps, samples, loss, bad = lost.pushed
                held = sum(run.last - run.first + 1 for run in shard.ledger.held[lost.replica])
                more = draw.randrange(held + 1)  # that have arrived elsewhere
                totals = (int(steps) + more, int(samples), 0, loss, int(bad))
                return Change(Deed.SETTLE, lost.replica, 0, *totals), None
            case _ if spare and not held and not account.left and draw.random() < 0.1:
                return Change(Deed.LEAVE, replica), None
        return None


def can_grant(shard: Shard, replica: int) -> bool:
    return shard.ledger.copy().lease(replica) is not None


def do(shard: Shard, change: Change, gradients: np.ndarray | None) -> None:
    """As it arrives at a mirror: in a letter."""
    letter = Letter(Change)
    letter.write(change)
    shard.do(letter.read(), gradients)


def said(shard: Shard) -> dict:
    """All that a shard is, beside its arrays."""
    accounts = [{**vars(account), "pushed": account.pushed.tolist()} for account in shard.accounts]
    names = ("version", "steps", "samples", "bad", "loss", "discarded", "left", "stop", "over", "written")
    numbers = [getattr(shard, name) for name in names]
    ledger = shard.ledger
    return {
        "accounts": accounts, "numbers": numbers, "losses": shard.losses, "histogram": shard.histogram.tolist(),
        "held": [list(runs) for runs in ledger.held], "ledger": ledger.state(),
    }  # fmt: skip


def assert_alike(one: Shard, other: Shard) -> None:
    assert said(one) == said(other)
    np.testing.assert_array_equal(one.params, other.params)
    for name, array in one.state.items():
        np.testing.assert_array_equal(array, other.state[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["sgd", "momentum", "adagrad"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_mirror_equals_its_shard_bit_for_bit(name, policy, seed):
    """From a snapshot in the middle on, after any changes; so does a mirror of the mirror."""
    holder, mirror, later = (made(name, policy) for _ in range(3))
    source = Random(holder, seed)
    for step in range(300):
        if step == 100:
            restore(mirror, holder)
        if step == 200:
            restore(later, mirror)
        happened = source.change()
        if happened is None:
            continue
        for shard in (holder, *[mirror] * (step >= 100), *[later] * (step >= 200)):
            do(shard, *happened)
    assert holder.version > 20
    assert_alike(holder, mirror)
    assert_alike(holder, later)


def restore(shard: Shard, of: Shard) -> None:
    shard.restore(of.snapshot())
    np.copyto(shard.params, of.params)
    for name, array in of.state.items():
        np.copyto(shard.state[name], array)


def test_a_push_that_has_been_applied_is_refused():
    shard = made("sgd", "accept")
    shard.do(Change(Deed.GRANT, 1))
    shard.do(Change(Deed.PUSH, 1, number=1, steps=1), np.ones(N))
    with pytest.raises(RankError, match="push 1 of replica 1 came after its push 1"):
        shard.do(Change(Deed.PUSH, 1, number=1, steps=1), np.ones(N))
    with pytest.raises(RankError, match="push 3 of replica 1 came after its push 1"):
        shard.do(Change(Deed.PUSH, 1, number=3, steps=1), np.ones(N))
    assert (shard.version, shard.steps) == (1, 1)


class Dying:
    """The line to a holder that tells of one change and dies, and its requests.

    As in MPI, the request that this fails is done for, and one that is done for counts as complete.
    """

    rank = 0

    def __init__(self, change: Change) -> None:
        self.letter, self.starts, self.failed = Letter(Change), 0, False
        self.letter.write(change)

    def Recv_init(self, buffer, rank, tag):
        buffer[:] = self.letter.bytes
        return self

    def Irecv(self, buffer, rank, tag):
        return SimpleNamespace(Test=lambda: False, Cancel=lambda: None)

    def Iprobe(self, rank):
        return False

    def Start(self):
        self.starts += 1

    def Test(self):
        if self.starts == 2 and not self.failed:
            self.failed = True
            raise MPI.Exception(MPI.ERR_OTHER)
        return True

    def Cancel(self):
        pass


def test_what_a_holder_told_last_is_not_done_again_when_it_dies(monkeypatch):
    monkeypatch.setattr("dpnn.strategies.downpour.mirror.has_died", lambda error: True)
    shard = made("sgd", "accept")
    shadow = Shadow(Dying(Change(Deed.GRANT, 1)), 0, 0, shard)
    assert [shadow.turn() for _ in range(4)] == [True, False, False, False]
    assert shadow.finish() is None
    assert shard.accounts[1].leases == 1


@pytest.mark.parametrize("servers", [2, 3, 5])
def test_who_holds_a_shard_follows_from_who_has_died(servers):
    """In whatever order: the next one that lives, which was the mirror before; the next but one mirrors it."""
    for seed in range(20):
        draw = random.Random(seed)
        dead = draw.sample(range(servers), servers - 1)
        holders, again = Holders(servers, mirrored=True), Holders(servers, mirrored=True)
        again.dead.update(dead)
        for victim in dead:
            before = {shard: (holders.of(shard), holders.mirror(shard)) for shard in range(servers)}
            holders.dead.add(victim)
            for shard, (holder, mirror) in before.items():
                assert holders.of(shard) == (mirror if holder == victim else holder)
                assert holders.mirror(shard) not in (victim, holders.of(shard))
        left = ({*range(servers)} - {*dead}).pop()
        assert holders.held_by(left) == again.held_by(left) == list(range(servers))
        assert holders.mirror(0) is None
        assert not holders.lost


def test_without_mirrors_a_shard_dies_with_its_server():
    holders = Holders(3, mirrored=False)
    assert holders.mirror(0) is None
    holders.dead.add(1)
    assert holders.lost
    assert (holders.of(0), holders.of(2)) == (0, 2)
    with pytest.raises(RankError, match="server 1 has died, and its parameters with it"):
        holders.of(1)
