"""The tables of a job file as frozen structs. The words for what is allowed stand beside the type, so that they can't
part.
"""

import sys
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dpnn.config.toml import key_of, toml

_LARGEST = sys.float_info.max
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1, description="a whole number from 0 to 4294967295")]
Count = Annotated[int, Meta(ge=1, description="a whole number of 1 or more")]
CountOr0 = Annotated[int, Meta(ge=0, description="a whole number of 0 or more")]
CountOrNone = Annotated[int, Meta(ge=0, description="a whole number of 1 or more")]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST, description="a number above 0")]
PositiveOr0 = Annotated[float, Meta(ge=0, le=_LARGEST, description="a number of 0 or more")]
Share = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to less than 1")]
Text = Annotated[str, Meta(description="text in quotes")]
Texts = Annotated[tuple[str, ...], Meta(description="a list of texts in quotes")]
Name = Annotated[str, Meta(min_length=1, description="text in quotes, not empty,")]
Switch = Annotated[bool, Meta(description="true or false")]
PLACEMENTS = ("auto", "branches", "depth", "filters")
Placing = Annotated[
    str | dict[str, int | tuple[int, ...]],
    Meta(
        description=f"{', '.join(map(toml, PLACEMENTS))}, or a table of parts by patterns of names, "
        'as in {"conv*" = 0, "dense1" = [0, 1]},'
    ),
]
Epochs = Annotated[tuple[Positive, ...], Meta(description="a list of numbers above 0")]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all tables of a job file."""


class Data(Table, frozen=True, kw_only=True):
    """[data]: `train` and `test` are folders of shards, or "digits"."""

    train: Name
    test: Text = ""
    lanes: CountOr0 = 0
    """Runs that an epoch is cut into; 0: chosen."""
    size: CountOr0 = 0
    """Height and width of the network's images; 0: 224 for encoded images, others as stored."""
    frames: CountOr0 = 0
    """That the network sees of a sample of frames; 0: 128."""
    augment: Literal["none", "crop-flip", "imagenet"] = "none"
    window: CountOr0 = 0
    """Samples that a lane is shuffled within; 0: chosen."""
    window_mb: Positive = 2048.0
    """The most memory for a rank's windows; above it the rank reads single samples."""
    threads: CountOr0 = 0
    """That make batches on a rank; 0: its share of the node's cores."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do where a sample can't be used; `skip`: another one takes its place."""
    bad_limit: Count = 100
    """The most samples that may be skipped in an epoch, on all ranks together."""
    location: Literal["shared", "local"] = "shared"
    """`local`: each node has only some of the shards, on a disk of its own."""
    stage: Text = ""
    """A folder on the nodes' own disks, which the shards are copied to before training."""


class Model(Table, frozen=True, kw_only=True):
    """[model]: any key beside these is an option of the model's own."""

    name: Name
    classes: CountOr0 = 0
    """Number of scores; 0: as many as the data have classes."""
    options: dict[str, Any] = {}


class Train(Table, frozen=True, kw_only=True):
    """[train]: exactly one of `epochs` and `steps`, and one of `global_batch` and `replica_batch`; the other is 0."""

    epochs: CountOrNone = 0
    steps: CountOrNone = 0
    global_batch: CountOrNone = 0
    """Samples of a step on all replicas together."""
    replica_batch: CountOrNone = 0
    """Samples of a step on each replica."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    eval_every: CountOr0 = 1
    """Epochs; 0: never."""
    label_smoothing: Share = 0.0
    balance: Switch = False
    """Each replica's share of the global batch by its speed, measured when the run starts."""
    reproducible: Switch = False
    """The same bits on any number of ranks that divides `grains`."""
    grains: CountOr0 = 0
    """Pieces of the global batch whose gradients are summed in a fixed order; 0: chosen."""


class Optimizer(Table, frozen=True, kw_only=True):
    """[optimizer]: `clip` is the largest norm of the whole gradient; 0: any."""

    name: Literal["sgd", "momentum", "adagrad"] = "momentum"
    lr: Positive
    momentum: Share = 0.9
    nesterov: Switch = False
    weight_decay: PositiveOr0 = 0.0
    clip: PositiveOr0 = 0.0


class Schedule(Table, frozen=True, kw_only=True):
    """[schedule]: how the learning rate changes; `milestones` and `warmup_epochs` in epochs since the start."""

    name: Literal["constant", "step", "cosine", "poly"] = "constant"
    warmup_epochs: PositiveOr0 = 0.0
    milestones: Epochs = ()
    factor: Positive = 0.1
    power: Positive = 2.0


class Staleness(Table, frozen=True, kw_only=True):
    """[parallel] staleness: what becomes of a gradient whose parameters have changed since; of `downpour`."""

    policy: Literal["accept", "scale", "discard"] = "accept"
    """`scale`: by 1 / the number of changes; `discard`: where they are more than `bound`."""
    bound: CountOr0 = 0


class Parallel(Table, frozen=True, kw_only=True):
    """[parallel]: how the work is shared among ranks."""

    strategy: Literal["allreduce", "average", "downpour"] = "allreduce"
    parts: Count = 1
    """Ranks that one replica of the network is spread over."""
    placement: Placing = "auto"
    """Which layers lie on which part; a table gives parts by patterns of names."""
    pipeline: Literal["1f1b", "gpipe"] = "1f1b"
    """In which order parts go through the micro-batches."""
    memory_gb: PositiveOr0 = 0.0
    """Of `placement = "auto"`: the most memory of a rank for the network, in GB; 0: any."""
    servers: CountOr0 = 0
    """Of `downpour`: ranks that hold the parameters."""
    n_push: Count = 1
    """Of `downpour`: steps from one push of gradients to the next."""
    n_fetch: Count = 1
    """Of `downpour`: steps from one fetch of parameters to the next."""
    fetch_ahead: CountOr0 = 1
    """Of `downpour`: steps that a fetch may take before it is waited for."""
    staleness: Staleness = Staleness()
    lead: CountOr0 = 0
    """Of `downpour`: steps that a replica may be ahead of the slowest one; 0: any number."""
    warmup_steps: CountOr0 = 0
    """Of `downpour`: steps that the first replica takes before the others join."""
    spares: CountOr0 = 0
    """Of `downpour`: replicas that wait until another one dies, and then take its place."""
    silence_s: Positive = 30.0
    """Of `downpour`, where a job outlives its ranks: how long a worker says nothing before it counts as dead."""
    record: Switch = False
    """Of `downpour`: write the order of arrival at every server, for `dpnn train --replay`."""
    mirror: Switch = True
    """Of `downpour` with two servers or more, where the job survives a rank's death: each has a copy of another's
    parameters, and takes them over where that one dies."""
    every: CountOr0 = 0
    """Of `average`: steps from one average to the next; 0: one, at the end."""
    state: Literal["average", "keep", "reset"] = "average"
    """Of `average`: what becomes of what the optimizer keeps."""
    microbatches: CountOr0 = 0
    """Pieces that a replica goes through its share of a step in; 0: chosen where there are several parts, else 1."""
    bucket_mb: PositiveOr0 = 0.0
    """Least size of a bucket of gradients; 0: measured."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """What gradients cross between nodes as."""
    stall_warn_s: Positive = 30.0
    """A rank that hasn't got on for so long says what it is at, and for whom it waits."""
    stall_abort_s: Positive = 300.0
    """How long a rank waits for another, or may be at one and the same thing, before the job ends."""


class Backend(Table, frozen=True, kw_only=True):
    """[backend]: how layers are computed. float64 is for checking, on the reference only."""

    name: Literal["auto", "cuda", "onednn", "reference"] = "auto"
    threads: CountOr0 = 0
    """0: the rank's share of the node's cores."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: products of convolutions only; arrays stay float32."""

    @property
    def may_use_gpu(self) -> bool:
        """Whether it computes on a GPU, where there is one."""
        return self.name in ("auto", "cuda") and self.precision == "float32"

    @property
    def needs_onednn(self) -> bool:
        """Whether no other backend will do."""
        return self.name == "onednn" or self.precision == "bfloat16"


class Output(Table, frozen=True, kw_only=True):
    """[output]: the run folder."""

    dir: Text = ""
    """Empty: runs/JOB-001 and so on."""
    checkpoint_every: Positive = 1.0
    """Epochs."""
    keep: Count = 3
    """Checkpoints that stay: the newest ones."""


class Job(Table, frozen=True, kw_only=True):
    """A whole job file."""

    seed: Seed = 0
    data: Data
    model: Model
    train: Train
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    backend: Backend = Backend()
    output: Output = Output()

    def dump(self) -> str:
        """The job as TOML with every value written out; read again it gives an equal job."""
        lines = [f"seed = {self.seed}"]
        for section in self.__struct_fields__[1:]:
            values = msgspec.structs.asdict(getattr(self, section))
            values |= values.pop("options", {})
            lines += ["", f"[{section}]"]
            lines += [f"{key_of(key)} = {toml(value)}" for key, value in values.items()]
        return "\n".join(lines) + "\n"
