"""Ranks die at random moments, and the run goes on: no update is lost beyond what is stated, none is done twice, and
every sample of every epoch is in, once. Networks get as good as undisturbed ones.

That is told from outside, by accounts.py.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.soak import write_down
from tests.train import accounts, kills
from tests.train.kills import Case, Outcome
from tests.train.runs import TOLERANT

ROOT = Path(__file__).parents[2]
NETWORKS = Path(__file__).parent / "networks.py"
SAMPLES, EPOCHS = 231, 4
COUNTED = (
    f"model.name={NETWORKS}:plain", "model.width=64", "data.lanes=12", f"train.epochs={EPOCHS}", "train.eval_every=0",
    "optimizer.name=sgd", "optimizer.lr=1", "optimizer.weight_decay=0", "parallel.stall_abort_s=20",
    "output.checkpoint_every=0.2",
)  # fmt: skip
"""Networks and data are small; plain SGD at a rate of 1 adds gradients up."""
TRAINED, TRAINED_EPOCHS, POINTS, TRAINED_LIMIT_S = 60_000, 2, 0.005, 400
"""Of MNIST; how much more of the test digits may be read wrong than by a network that nobody disturbed."""


@dataclass(frozen=True)
class Kind:
    """Runs of `ranks`, of `servers` or synchronous; so many of the workers and the servers are killed in each.

    `batches`: of one process, at most; `all_batches`: of all of them, at least; likewise for MNIST, whose job of
    jobs/ is `job`. `tried`: seeds of `make test`; `soaked`: seeds that count, and seeds of MNIST.
    """

    workers: tuple[int, ...]
    servers: tuple[int, ...]
    dying_workers: tuple[int, ...]
    dying_servers: int
    tried: int
    soaked: tuple[int, int]
    settings: tuple[str, ...]
    batches: int
    all_batches: int
    job: str
    trained_batches: int

    def draw(self, rng: random.Random, counted: bool) -> tuple[Case, list[kills.Kill]]:
        """A run, and its kills."""
        workers, servers = rng.choice(self.workers), rng.choice(self.servers)
        victims = rng.sample(range(workers), rng.choice(self.dying_workers))
        victims += rng.sample(range(workers, workers + servers), self.dying_servers)
        settings = self.settings if counted else ()
        if servers:
            settings += (f"parallel.servers={servers}", f"parallel.fetch_ahead={rng.choice([0, 1])}")
            settings += (f"parallel.n_push={rng.choice([1, 3])}",) if counted else ()
        every = rng.choice([0, 4]) if counted and not servers else 0
        if every:
            settings += ("parallel.strategy=average", f"parallel.every={every}")
        case = Case(workers + servers, servers, settings, every, () if servers else ("--with-faults",))
        batches = self.all_batches if counted else self.trained_batches
        return case, kills.draw(rng, victims, batches)


DOWNPOUR = {
    "settings": (*COUNTED, "train.global_batch=0", "train.replica_batch=7", "parallel.strategy=downpour"),
    "batches": EPOCHS * 12 * 3,
    "all_batches": EPOCHS * 12 * 3,
    "job": "mnist-downpour",
    "trained_batches": TRAINED_EPOCHS * TRAINED // 32,
}
SYNCHRONOUS = {
    "settings": (*COUNTED, "train.global_batch=12", "parallel.bucket_mb=0.01"),
    "batches": EPOCHS * 20 + 20,
    "all_batches": EPOCHS * 20 * 3,
    "job": "mnist",
    "trained_batches": TRAINED_EPOCHS * TRAINED // 64 * 3,
}
KINDS = {
    "workers": Kind((4,), (1, 2), (3,), 0, 2, (31, 4), **DOWNPOUR),
    "servers": Kind((2, 3), (2, 3), (0,), 1, 2, (60, 5), **DOWNPOUR),
    "both": Kind((3,), (2, 3), (1, 2), 1, 1, (18, 3), **DOWNPOUR),
    "synchronous": Kind((4,), (0,), (1, 2, 3), 0, 3, (46, 5), **SYNCHRONOUS),
}


def seeds(which: int) -> list[tuple[str, int]]:
    """Of all kinds, those that count (0) or those of MNIST (1)."""
    return [(name, seed) for name, kind in KINDS.items() for seed in range(1, kind.soaked[which] + 1)]


pytestmark = [
    pytest.mark.mpi,
    TOLERANT,
]


def stated(outcome: Outcome) -> Counter[tuple[int, int]]:
    """The batches of a rank that a shard hasn't got, as the run itself says."""
    found = Counter[tuple[int, int]]()
    for event in outcome.events("loss_settled"):
        found[event["server"], event["replica"]] += event["missing_steps"]
    for event in outcome.events("update_lost"):
        found[event["server"], event["replica"]] += event["steps"]
    return found


@pytest.fixture
def account(start_python, job, tmp_path) -> Callable[[str, int], Outcome]:
    """account(kind, seed) -> what came of a run that is killed as drawn from the seed, all accounted for."""

    def run(name: str, seed: int) -> Outcome:
        kind = KINDS[name]
        case, plan = kind.draw(random.Random(f"{name} {seed}"), counted=True)
        print(f"{name}, seed {seed}: {case.ranks} ranks; {'; '.join(map(str, plan))}; {' '.join(case.settings[-3:])}")
        shards = case.servers or 1
        env = {"SLOTS": str(kind.batches), "SHARDS": str(shards), "PACE": "0.01"}
        outcome = kills.run(start_python, job(), case, plan, tmp_path / "books", env, kills.LIMIT_S)
        counts = accounts.applied(outcome.books, outcome.folder, shards, kind.batches, averaged=case.every > 0)
        dropped = 0 if case.servers else len(plan) * max(1, case.every)
        lost = sum(event["samples"] for event in outcome.events("samples_lost"))
        n = accounts.check(outcome.books, counts, EPOCHS, SAMPLES, outcome.dead, stated(outcome), dropped, lost)
        print(f"{len(outcome.killed)} kills: {n} batches, each in once")
        return outcome

    return run


@pytest.fixture(scope="module")
def results() -> Callable[[str, int, Outcome, dict], None]:
    """results(kind, seed, outcome, values): write the run down, with all others of its kind."""
    rows = defaultdict(list)

    def write(kind: str, seed: int, outcome: Outcome, values: dict) -> None:
        moments = [*map(str, outcome.killed)]
        rows[kind].append({"case": "counted", "seed": seed, "kills": len(moments), "moments": moments, **values})
        write_down(f"soak-{kind}", rows[kind])

    return write


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, float]:
    """The error of a network that nobody has disturbed, by kind."""
    return {}


@pytest.fixture
def error_of(start_python, mnist, tmp_path) -> Callable[[str, int], tuple[Outcome, float]]:
    """error_of(kind, seed) -> a run over MNIST that is killed as drawn from the seed (0: it isn't), and its error."""

    def run(name: str, seed: int) -> tuple[Outcome, float]:
        kind, where = KINDS[name], tmp_path / f"seed-{seed}"
        case, plan = kind.draw(random.Random(f"{name} {seed} mnist"), counted=False)
        case.settings += (
            f"data.train={mnist}/train", f"data.test={mnist}/test", f"output.dir={where}",
            f"train.epochs={TRAINED_EPOCHS}",
        )  # fmt: skip
        made = SimpleNamespace(path=ROOT / "jobs" / f"{kind.job}.toml", out=where)
        books = tmp_path / f"books-{seed}"
        outcome = kills.run(start_python, made, case, plan if seed else [], books, {}, TRAINED_LIMIT_S)
        batch = 0 if case.servers else outcome.told("start")[0]["global_batch"]
        accounts.check_trained(outcome.books, TRAINED_EPOCHS, TRAINED, outcome.dead, len(outcome.killed) * batch)
        error = outcome.told("eval")[-1]["top1_error"]
        print(f"{name}, seed {seed}: {'; '.join(map(str, outcome.killed)) or 'nobody killed'}: error {error:.2%}")
        return outcome, error

    return run


@pytest.mark.parametrize(("kind", "seed"), [(name, seed + 1) for name in KINDS for seed in range(KINDS[name].tried)])
def test_what_is_killed_leaves_the_books_in_order(account, kind, seed):
    assert account(kind, seed).killed


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "seed"), seeds(0))
def test_kills_without_number_leave_the_books_in_order(account, results, kind, seed):
    results(kind, seed, account(kind, seed), {})


@pytest.mark.soak
@pytest.mark.timeout(2 * TRAINED_LIMIT_S)
@pytest.mark.parametrize(("kind", "seed"), seeds(1))
def test_a_network_gets_as_good_as_one_that_nobody_disturbed(error_of, results, undisturbed, kind, seed):
    if kind not in undisturbed:
        undisturbed[kind] = error_of(kind, 0)[1]
    outcome, error = error_of(kind, seed)
    assert error <= undisturbed[kind] + POINTS
    results(kind, seed, outcome, {"case": "MNIST", "top1_error": error, "undisturbed": undisturbed[kind]})
