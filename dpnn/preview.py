"""`dpnn plan`: what the ranks of a job would do, without MPI and without computing anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dpnn import config, models
from dpnn.comm.mesh import replicas_of
from dpnn.errors import JobError
from dpnn.evaluate import choose_backends
from dpnn.machine import memory_limits, share
from dpnn.observe.folder import RunFolder
from dpnn.plan import Costs, Forecast, Setting
from dpnn.planning import COSTS, forecaster_of, forecasts, is_open, question, read
from dpnn.prepare import Start, resolve
from dpnn.team import Team

_LOOKED_AT = 6
"""Other placements that are shown."""


def preview(source: str, overrides: Sequence[str], ranks: int, instructions: bool) -> str:
    """The text of `dpnn plan` for a job file, or for a run folder: then by what the run measured and chose."""
    if ranks < 1:
        raise JobError(f"--ranks {ranks}: use 1 or more")
    folder = RunFolder(Path(source)) if Path(source).is_dir() else None
    if folder is not None and not folder.job.is_file():
        raise JobError(f"{source} is no run folder: it has no job.toml; name one, or a job file")
    start = resolve(config.load(str(folder.job if folder else source), overrides), Path(), ranks)
    choices = folder.read_choices() if folder is not None else {}
    costs = Costs.load(choices[COSTS]) if COSTS in choices else Costs()
    kept = choices.get(question(start.job, start.rows))
    job = start.job
    graph = models.graph(job, start.network, start.shape)
    backends, _ = choose_backends(job, Team(1))
    forecaster = forecaster_of(job, graph, start.rows, backends, costs)
    looked: list[tuple[str, Forecast]] = []
    if kept is not None:
        chosen = forecaster.look(read(kept))
        why = f"as the run in {source} chose"
    elif is_open(job):
        looked = forecasts(job, graph, start.rows, backends, costs)
        why, chosen = looked[0]
    else:
        chosen = forecaster.look(Setting(start.placement, job.parallel.microbatches))
        why = "as the job says"
    lines = [*_head(start, chosen, why, ranks), _figures(costs, measured=COSTS in choices), _memory(job), ""]
    lines += [*_parts(chosen, job.parallel.parts, ranks - job.parallel.servers), ""]
    lines += [*_messages(chosen), *_looked_at(looked[1:])]
    if instructions:
        lines += _instructions(chosen)
    return "\n".join(lines)


def _head(start: Start, chosen: Forecast, why: str, ranks: int) -> Iterator[str]:
    job, timing, micro = start.job, chosen.timing, chosen.setting.microbatches
    replicas = replicas_of(ranks, job.parallel.parts, job.parallel.servers)
    servers = f" and {job.parallel.servers} servers" if job.parallel.servers else ""
    yield (
        f"{job.model.name}: {chosen.placed.graph.n_params:,} parameters; {replicas} replicas of "
        f"{job.parallel.parts} parts{servers} on {ranks} ranks"
    )
    yield f"placement: {why}; {micro} micro-batches of {chosen.plans[0].rows} samples, {job.parallel.pipeline}"
    yield (
        f"a step of {start.rows} samples on a replica: {timing.step:.4g} s predicted, "
        f"{timing.idle:.1%} of the ranks' time idle, {sum(timing.sent) / 1e6:,.2f} MB between parts"
    )


def _figures(costs: Costs, measured: bool) -> str:
    whose = "measured by the run" if measured else "assumed"
    return f"figures {whose}: {costs}"


def _memory(job: config.Job) -> str:
    limit = job.parallel.memory_gb
    if limit:
        return f"memory of a rank: at most {limit:g} GB, as the job says"
    own = share([memory_limits()], 0)
    return (
        "memory of a rank: any, assumed; a run takes its share of the node's "
        f"(this machine's ranks may have {own.amount / 1e9:.3g} GB, by {own.group})"
    )


def _parts(chosen: Forecast, parts: int, workers: int) -> Iterator[str]:
    total = max(1, sum(chosen.params))
    yield "part  ranks             layers  parameters         memory     busy      sent  first to last layer"
    for part in range(parts):
        nodes = [node for node in chosen.placed.nodes(part) if node.params] or chosen.placed.nodes(part)
        ranks = [str(rank) for rank in range(part, workers, parts)]
        shown = ", ".join(ranks[:3]) + (", ..." if len(ranks) > 3 else "")
        names = f"{nodes[0].name} ... {nodes[-1].name}" if nodes else "nothing"
        yield (
            f"{part:4}  {shown:16}  {len(nodes):6}  {chosen.params[part]:11,} {chosen.params[part] / total:4.0%}"
            f"  {chosen.nbytes[part] / 1e9:6.3f} GB  {chosen.timing.busy[part] / (chosen.timing.step or 1):6.1%}"
            f"  {chosen.timing.sent[part] / 1e6:5.2f} MB  {names}"
        )


def _messages(chosen: Forecast) -> Iterator[str]:
    plan = chosen.plans[0]
    if not plan.messages:
        return
    yield "messages of a micro-batch"
    for message in plan.messages:
        what = "gradient by " if message.gradient else ""
        crew = f", among parts {', '.join(map(str, message.crew))}" if message.crew else ""
        yield (
            f"{message.number:4}  {message.source} -> {message.target}  "
            f"{chosen.message_nbytes(message.number):12,} bytes  {what}{plan.graph.nodes[message.node].name}{crew}"
        )


def _looked_at(others: Sequence[tuple[str, Forecast]]) -> Iterator[str]:
    best: dict[str, Forecast] = {}
    for name, forecast in others:
        best.setdefault(name, forecast)
    if best:
        yield "\nalso looked at (where steps are near, memory decides)"
    for name, forecast in list(best.items())[:_LOOKED_AT]:
        yield (
            f"      {forecast.timing.step:.4g} s, {max(forecast.nbytes) / 1e9:.3f} GB at most: {name}, "
            f"{forecast.setting.microbatches} micro-batches"
        )


def _instructions(chosen: Forecast) -> Iterator[str]:
    for plan in chosen.plans:
        yield f"\npart {plan.part}\n{plan}"
