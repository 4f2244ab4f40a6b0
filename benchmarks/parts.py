"""Our side over several parts: a network as `dpnn train` places it, over MPI, without a loader."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from harness import RATE
from ours import JOB, fill
from step import NETWORKS as PLAIN
from step import PHOTO

from dpnn import config, models
from dpnn.comm.mesh import Mesh
from dpnn.comm.node import Node
from dpnn.comm.world import start
from dpnn.data import Batch, no_samples
from dpnn.evaluate import Model, segments_of
from dpnn.optim import STATES, Optimizer
from dpnn.plan import Costs, Plan, compile_plan, lay, place, spread
from dpnn.plan.costs import question
from dpnn.plan.placement import Pattern
from dpnn.plan.schedule import Backward, Forward, Instruction, Ready, Send
from dpnn.plan.simulate import simulate
from dpnn.strategies.allreduce import Allreduce

NETWORKS = {**PLAIN, "googlenet_heads": (models.googlenet(1000, PHOTO, heads=True), PHOTO)}
BUCKET_NBYTES = 2**22
SHARE = 0.01
"""Of a group's time that is counted for each of its nodes but the first, so that it isn't cut within."""
LATENCY_NBYTES, BANDWIDTH_NBYTES, TRIPS = 2**10, 2**24, 9
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

    A step is over `rows` samples in `microbatches`. `wanted`: the placement, as a job names it.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        wanted: str | Mapping[str, Pattern] = "depth",
        microbatches: int = 1,
        pipeline: str = "1f1b",
        costs: Costs | None = None,
    ) -> None:
        """Collective."""
        network, shape = NETWORKS[name]
        world = start()
        self._comm = world.comm
        mesh = Mesh(world, world.size)
        job = config.parse(JOB.format(rows=rows, rate=RATE, threads=1), [f"parallel.pipeline={pipeline}"])
        graph = models.graph(job, network, shape)
        self._placed = placed = spread(graph, place(graph, world.size, wanted, costs or Costs()))
        model = Model(job, placed, mesh.part, 1)
        store, states = model.store, STATES[job.optimizer.name]
        node = Node(mesh, store.params.size, model.dtype, states, model.kernels, job.parallel.timeout_s)
        store.place(node.params, node.grads)
        fill(store)
        args = (node.params, node.sums, model.team, model.kernels, node.state)
        self._strategy = Allreduce(mesh, node, Optimizer(job.optimizer, segments_of(store.pieces), *args), job)
        self._strategy.rate, self._strategy.samples = RATE, rows
        cuts = [rows * i // microbatches for i in range(microbatches + 1)]
        counts = [(hi - lo, hi - lo) for lo, hi in pairwise(cuts)]
        self._plan_of = (max(counts)[0], microbatches, pipeline)
        self._layout = model.lay_out(world, lambda: model.training(self._plan_of[0], microbatches, BUCKET_NBYTES))
        self.executor = model.executor(self._layout, strategy=self._strategy, mesh=mesh)
        self._model = model
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
        return f"{len(nodes)} nodes ({where}), {self._layout.nbytes / 2**20:.0f} MiB of buffers"

    def crossed(self) -> tuple[int, int]:
        """Bytes that a step of mine sends: counted, and what the plan says."""
        plan, edges = self.executor.plan, self.executor._edges
        before = edges.nbytes if edges else 0
        self.step()
        told = sum(self._nbytes(plan, step.message) for step in plan.instructions if isinstance(step, Send))
        return (edges.nbytes if edges else 0) - before, told

    def link(self) -> tuple[float, float]:
        """Seconds of a short message between the first two parts, and bytes a second of a long one. Collective."""
        times, comm = [], self._comm
        for nbytes in (LATENCY_NBYTES, BANDWIDTH_NBYTES):
            data, trips = np.zeros(nbytes, np.uint8), []
            for _ in range(TRIPS):
                comm.Barrier()
                begin = perf_counter()
                if comm.rank < 2 <= comm.size:
                    for turn in range(2):
                        (comm.Send if comm.rank == turn else comm.Recv)(data, 1 - comm.rank)
                trips.append((perf_counter() - begin) / 2)
            times.append(min(trips))
        return times[0], BANDWIDTH_NBYTES / times[1]

    def costs(self, profile: Profile, link: tuple[float, float]) -> Costs:
        """What was measured on one part, as costs of nodes."""
        found: dict[str, tuple[float, float]] = {}
        rows = self._plan_of[0]
        for group in self.executor.plan.groups:
            first, *others = group.nodes
            kinds = [profile.groups.get((kind, first.name), 0.0) / rows for kind in ("Forward", "Backward")]
            found[question(first)] = (kinds[0], kinds[1])
            found |= {question(node): (SHARE * kinds[0], SHARE * kinds[1]) for node in others}
        return Costs(latency=link[0], crossing_bandwidth=link[1], measured=found)

    def predicted(self, profile: Profile, link: tuple[float, float]) -> float:
        """Seconds of a step over all parts, from those of the groups on one part."""
        rows, microbatches, pipeline = self._plan_of
        placed, plans = self._placed, []
        for part in range(placed.parts):
            where = (placed, part, self._model.backends)
            pieces = lay(placed.nodes(part))
            plans.append(compile_plan(*where, "train", rows, microbatches, pieces, BUCKET_NBYTES, pipeline=pipeline))
        n_params = sum(math.prod(p.spec.shape) for node in placed.graph.nodes for p in node.params)
        update = sum(profile.kinds.get(kind, 0.0) for kind in ("Ready", "Finish")) / n_params

        def seconds(plan: Plan, step: Instruction) -> float:
            if isinstance(step, Forward | Backward):
                return profile.groups.get((type(step).__name__, plan.groups[step.group].nodes[0].name), 0.0)
            return update * (step.hi - step.lo) if isinstance(step, Ready) else 0.0

        return simulate(plans, seconds, lambda nbytes: link[0] + nbytes / link[1], self._nbytes).step

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
                if isinstance(step, Forward | Backward):
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

    def _nbytes(self, plan: Plan, number: int) -> int:
        """Bytes of a message of the plan: an array of a whole micro-batch."""
        node, layout = self.executor.plan.graph.nodes[plan.messages[number].node], self._layout
        return math.prod(layout.shape(node)) * layout.type(node).itemsize


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
