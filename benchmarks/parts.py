"""Our side over several parts: a network as `dpnn train` places it, over MPI, without a loader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
from harness import RATE
from ours import JOB, fill
from step import NETWORKS as PLAIN
from step import PHOTO

from dpnn import config, models
from dpnn.comm.crossing import measured_crossing
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.world import start
from dpnn.data import Batch, no_samples
from dpnn.evaluate import Model, choose_backends, segments_of
from dpnn.optim import STATES
from dpnn.plan import Costs, Placement, Setting, measured, spread
from dpnn.plan.forecast import message_nbytes
from dpnn.plan.placement import Pattern
from dpnn.plan.schedule import Compute, Send
from dpnn.planning import forecasts, read, written
from dpnn.strategies.allreduce import Allreduce
from dpnn.strategies.flats import Flats
from dpnn.team import Team

NETWORKS = {**PLAIN, "googlenet_heads": (models.googlenet(1000, PHOTO, heads=True), PHOTO)}
BUCKET_NBYTES = 2**22
Calls = dict[tuple[str, str], list[float]]


@dataclass
class Profile:
    """Where the seconds of a step go, the mean over some steps."""

    step: float
    kinds: dict[str, float] = field(default_factory=dict)
    """By kind of instruction; "poke" is what MPI was given between them."""
    groups: dict[tuple[str, str], float] = field(default_factory=dict)
    """Of one call, by direction and the first node of the group."""

    def __str__(self) -> str:
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1])
        shares = [f"{kind} {seconds / self.step:.1%}" for kind, seconds in kinds if seconds > 0.001 * self.step]
        return f"{self.step:.3f} s: {', '.join(shares)}"


class Parts:
    """This rank's part of the network `name`, of as many parts as there are ranks; `step` is a training step.

    A step is over `rows` samples in `microbatches` (0: in as many as is best). `wanted`: the placement, as a job names
    it. `costs`: what another one measured, as text; else they are measured.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        wanted: str | Mapping[str, Pattern] = "depth",
        microbatches: int = 1,
        pipeline: str = "1f1b",
        costs: str = "",
    ) -> None:
        """Collective."""
        network, shape = NETWORKS[name]
        world = start()
        mesh = Mesh(world, world.size)
        job = config.parse(JOB.format(rows=rows, rate=RATE, threads=1), [f"parallel.pipeline={pipeline}"])
        options = {"parts": world.size, "placement": wanted, "microbatches": microbatches}
        job = msgspec.structs.replace(job, parallel=msgspec.structs.replace(job.parallel, **options))
        graph = models.graph(job, network, shape)
        latency, crossing = measured_crossing(world.comm, world.timeout_s)

        def chosen() -> tuple[str, str, float]:
            if world.size == 1:
                return written(Setting(Placement(1, (0,) * len(graph.nodes)), microbatches)), "", 0.0
            backends, _ = choose_backends(job, Team(1))
            known = Costs.load(costs) if costs else measured(graph, world.size, backends, rows)
            known = replace(known, latency=latency, crossing=crossing)
            _, best = forecasts(job, graph, rows, backends, known)[0]
            return written(best.setting), known.dump(), best.timing.step

        text, self._costs, self._predicted = world.first(chosen)
        setting = read(text)
        microbatches = setting.microbatches
        placed = spread(graph, setting.placement)
        model = Model(job, placed, mesh.part, 1)
        store, states = model.store, STATES[job.optimizer.name]
        node = Node(mesh, store.size, model.dtype, states, model.kernels, job.parallel.stall_abort_s)
        flats = Flats.of(model.memory, node)
        store.place(flats.params, flats.grads)
        fill(store)
        segments = segments_of(store.pieces)
        optimizer = flats.optimizer(job.optimizer, segments, node.sums, model.team, model.arithmetic)
        self._strategy = Allreduce(mesh, node, flats, optimizer, job)
        self._strategy.rate, self._strategy.samples = RATE, rows
        cuts = [rows * i // microbatches for i in range(microbatches + 1)]
        counts = [(hi - lo, hi - lo) for lo, hi in pairwise(cuts)]
        most = max(counts)[0]
        self._layout = model.lay_out(world, lambda: model.training(most, microbatches, BUCKET_NBYTES))
        self.executor = model.executor(self._layout, strategy=self._strategy, mesh=mesh)
        batch = no_samples(0, 0)
        if mesh.part == placed.reader:
            rng = np.random.default_rng(0)
            x = rng.standard_normal((rows, *shape), np.float32)
            (classes,) = graph.nodes[graph.output].shape
            labels = rng.integers(0, classes, rows, np.int32)
            batch = Batch(x, labels, np.arange(rows, dtype=np.uint64), rows, 0, 0, None)
        self._step: Any = (batch, counts, rows)

    def step(self) -> None:
        """One step over the batch."""
        self.executor.run(*self._step)

    def about(self) -> str:
        """What lies on my part."""
        nodes = [node for group in self.executor.plan.groups for node in group.nodes]
        where = f"{nodes[0].name} to {nodes[-1].name}" if nodes else "nothing"
        memory = f"{self._layout.nbytes / 2**20:.0f} MiB of buffers"
        return f"{len(nodes)} nodes ({where}), {len(self._step[1])} micro-batches, {memory}"

    def crossed(self) -> tuple[int, int]:
        """Bytes that a step of mine sends: counted, and what the plan says."""
        plan, edges = self.executor.plan, self.executor._edges
        before = edges.nbytes if edges else 0
        self.step()
        told = sum(message_nbytes(plan, step.message) for step in plan.instructions if isinstance(step, Send))
        return (edges.nbytes if edges else 0) - before, told

    def costs(self) -> str:
        """The costs that the placement was chosen by."""
        return self._costs

    def predicted(self) -> float:
        """Seconds of a step, as they were forecast."""
        return float(self._predicted)

    def profile(self, steps: int) -> Profile:
        """Time every instruction of some steps."""
        executor, plan = self.executor, self.executor.plan
        kinds: dict[str, float] = {}
        groups: Calls = {}
        bound = iter([*executor._bound, (None, None)])
        step, call = next(bound)
        timed, plain = [], executor._calls
        for each in plain:
            kind, group = "poke", None
            if each is call:
                kind = type(step).__name__
                if isinstance(step, Compute):
                    group = (kind, plan.groups[step.group].nodes[0].name)
                step, call = next(bound)
            timed.append(_timed(each, kind, group, kinds, groups))
        executor._calls = timed
        try:
            self.step()  # one to meet the others
            kinds.clear()
            groups.clear()
            begin = perf_counter()
            for _ in range(steps):
                self.step()
            took = (perf_counter() - begin) / steps
        finally:
            executor._calls = plain
        means = {group: sum(times) / len(times) for group, times in groups.items()}
        return Profile(took, {kind: seconds / steps for kind, seconds in kinds.items()}, means)


def _timed(
    call: Callable[[], object], kind: str, group: tuple[str, str] | None, kinds: dict[str, float], groups: Calls
) -> Callable[[], None]:
    """The call, which notes what it took."""

    def timed() -> None:
        begin = perf_counter()
        call()
        took = perf_counter() - begin
        kinds[kind] = kinds.get(kind, 0.0) + took
        if group is not None:
            groups.setdefault(group, []).append(took)

    return timed
