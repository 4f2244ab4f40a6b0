"""The job file: TOML read into frozen structs, and every check of a value.

An error names the key, its value and what is allowed; for an unknown key or word, the nearest known one too. The words
for what is allowed stand beside the type, so that they can't part.
"""

import json
import re
import sys
import tomllib
import typing
from collections.abc import Iterable, Sequence
from datetime import date, time
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dpnn.errors import JobError

_LARGEST = sys.float_info.max
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1, description="a whole number from 0 to 4294967295")]
Count = Annotated[int, Meta(ge=1, description="a whole number of 1 or more")]
CountOr0 = Annotated[int, Meta(ge=0, description="a whole number of 0 or more")]
CountOrNone = Annotated[int, Meta(ge=0, description="a whole number of 1 or more")]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST, description="a number above 0")]
PositiveOr0 = Annotated[float, Meta(ge=0, le=_LARGEST, description="a number of 0 or more")]
Share = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to less than 1")]
Text = Annotated[str, Meta(description="text in quotes")]
Name = Annotated[str, Meta(min_length=1, description="text in quotes, not empty,")]
Switch = Annotated[bool, Meta(description="true or false")]
Epochs = Annotated[tuple[Positive, ...], Meta(description="a list of numbers above 0")]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all tables of a job file."""


class Data(Table, frozen=True, kw_only=True):
    """[data]: `train` and `test` are folders of shards, or "digits"."""

    train: Name
    test: Text = ""
    lanes: CountOr0 = 0
    """Runs that an epoch is cut into; 0: chosen."""
    augment: Literal["none", "crop-flip"] = "none"
    window: Count = 1024
    """Samples that a lane is shuffled within."""
    window_mb: Positive = 2048.0
    """The most memory for a rank's windows; above it the rank reads single samples."""


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

    name: Literal["sgd", "momentum"] = "momentum"
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


class Parallel(Table, frozen=True, kw_only=True):
    """[parallel]: how the work is shared among ranks."""

    strategy: Literal["allreduce", "average"] = "allreduce"
    every: CountOr0 = 0
    """Of `average`: steps from one average to the next; 0: one, at the end."""
    state: Literal["average", "keep", "reset"] = "average"
    """Of `average`: what becomes of what the optimizer keeps."""
    microbatches: Count = 1
    bucket_mb: PositiveOr0 = 0.0
    """Least size of a bucket of gradients; 0: measured."""
    wire: Literal["float32", "bfloat16"] = "float32"
    """What gradients cross between nodes as."""
    timeout_s: Positive = 300.0
    """How long a rank waits for another."""


class Backend(Table, frozen=True, kw_only=True):
    """[backend]: how layers are computed. float64 is for checking, on the reference only."""

    name: Literal["auto", "onednn", "reference"] = "auto"
    threads: CountOr0 = 0
    """0: the rank's share of the node's cores."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: products of convolutions only; arrays stay float32."""

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
            lines += [f"{_key(key)} = {_toml(value)}" for key, value in values.items()]
        return "\n".join(lines) + "\n"


# Exactly one of each is given.
_PAIRS = (("train.epochs", "train.steps"), ("train.global_batch", "train.replica_batch"))

# Keys that mean something only where another key has this value.
_NEEDS: dict[str, tuple[str, str | bool]] = {
    "optimizer.momentum": ("optimizer.name", "momentum"),
    "optimizer.nesterov": ("optimizer.name", "momentum"),
    "schedule.milestones": ("schedule.name", "step"),
    "schedule.factor": ("schedule.name", "step"),
    "schedule.power": ("schedule.name", "poly"),
    "parallel.wire": ("parallel.strategy", "allreduce"),
    "train.grains": ("train.reproducible", True),
    "parallel.every": ("parallel.strategy", "average"),
    "parallel.state": ("parallel.strategy", "average"),
    "train.label_smoothing": ("train.loss", "softmax"),
}


def load(path: str, overrides: Sequence[str] = ()) -> Job:
    """The job of a file, with overrides "a.b=value"; JobError where anything is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"the job file {path} can't be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise JobError(f"the job file {path} is not text in UTF-8; name a TOML file") from error
    return parse(text, overrides, path)


def parse(text: str, overrides: Sequence[str] = (), name: str = "job") -> Job:
    """The job of a TOML text, likewise; `name` stands in front of every error.

    The value of an override is read as TOML, and as plain text where it isn't TOML.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        problem, line = place.groups() if place else (str(error), None)
        line = line or max(1, len(text.splitlines()))
        raise JobError(f"{name}, line {line}: this is not TOML: {problem}") from error
    try:
        for override in overrides:
            _override(values, override)
        job: Job = _read(Job, values, "")
        _check(job)
    except JobError as error:
        raise JobError(f"{name}: {error}") from error
    return job


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise JobError(f"--set {override}: KEY=VALUE is wanted, as in train.epochs=3")
    for depth, part in enumerate(path[:-1], 1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise JobError(f"--set {override}: {'.'.join(path[:depth])} is a value, not a table")
    values[path[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text


def _read(table: type, values: Any, path: str) -> Any:
    """The struct `table` from the values of one table of the file, which stands at `path` ("" or "section.")."""
    if not isinstance(values, dict):
        raise JobError(f"{path[:-1]} = {_shown(values)}: a table is wanted, [{path[:-1]}] and its keys")
    hints = typing.get_type_hints(table, include_extras=True)
    unknown = {key: value for key, value in values.items() if key not in hints or key == "options"}
    if "options" in hints:
        values = {**{key: value for key, value in values.items() if key not in unknown}, "options": unknown}
    elif unknown:
        key = next(iter(unknown))
        raise JobError(f"{path}{key} = {_shown(unknown[key])}: there is no such key{_nearest_key(path, key)}")
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(table):
        key, kind = path + field.name, hints[field.name]
        if isinstance(kind, type) and issubclass(kind, Table):
            fields[field.name] = _read(kind, values.get(field.name, {}), key + ".")
        elif field.name in values:
            fields[field.name] = _convert(values[field.name], kind, key)
        elif field.required:
            raise JobError(f"{key} is missing: {_wanted(kind)} is wanted")
    return table(**fields)


def _convert(value: Any, kind: Any, key: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        hint = _did_you_mean(map(_toml, get_close_matches(str(value), choices, 1, 0.5)))
        raise JobError(f"{key} = {_shown(value)}: {_wanted(kind)} is wanted{hint}") from error


def _wanted(kind: Any) -> str:
    """What a value of this type may be, in words."""
    if typing.get_origin(kind) is Literal:
        *others, last = map(_toml, typing.get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    return str(kind.__metadata__[0].description)


def _nearest_key(path: str, key: str) -> str:
    """The nearest name in the same table, else in another one, else all names of this table."""
    tables = {"": Job.__struct_fields__}
    for field in msgspec.structs.fields(Job):
        if isinstance(field.type, type(Table)):
            tables[field.name + "."] = field.type.__struct_fields__
    near = [path + name for name in get_close_matches(key, tables[path], 1)]
    near += [other + name for other, names in tables.items() for name in get_close_matches(key, names, 1, 0.8)]
    return _did_you_mean(near[:1]) or f"; known are {', '.join(path + name for name in tables[path])}"


def _did_you_mean(names: Iterable[str]) -> str:
    return "".join(f"; did you mean {name}?" for name in names)


_PRECISIONS = {"onednn": ("float32", "bfloat16"), "reference": ("float32", "float64")}


def _check(job: Job) -> None:
    """What one key's type can't say."""

    def value(key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(job, section), name)

    for one, other in _PAIRS:
        if not value(one) and not value(other):
            raise JobError(f"{one} is missing: {one} or {other}, {_wanted(CountOrNone)}, is wanted")
        if value(one) and value(other):
            raise JobError(
                f"{one} = {value(one)} and {other} = {value(other)}: exactly one of them is wanted; set the other to 0"
            )
    for key, (other, wanted) in _NEEDS.items():
        if value(other) != wanted and value(key) != _default(key):
            raise JobError(f"{key} = {_shown(value(key))}: it needs {other} = {_toml(wanted)}; leave it out")
    milestones = job.schedule.milestones
    if job.schedule.name == "step" and not milestones:
        raise JobError("schedule.milestones is missing: a list of epochs is wanted, as in [30, 60]")
    if list(milestones) != sorted(set(milestones)):
        raise JobError(f"schedule.milestones = {_shown(milestones)}: epochs in rising order are wanted")
    backend, precision = job.backend.name, job.backend.precision
    if precision not in _PRECISIONS.get(backend, (precision,)):
        wanted = " or ".join(map(_toml, _PRECISIONS[backend]))
        raise JobError(
            f'backend.precision = "{precision}": backend.name = "{backend}" computes in {wanted}; use "auto"'
        )
    if job.train.reproducible and (job.parallel.strategy != "allreduce" or job.parallel.microbatches > 1):
        raise JobError(
            'train.reproducible = true: it needs parallel.strategy = "allreduce" and parallel.microbatches = 1 '
            "(each grain is a micro-batch of its own)"
        )
    if job.train.reproducible and job.parallel.wire != "float32":
        raise JobError('parallel.wire = "bfloat16": train.reproducible = true needs "float32"; leave it out')
    if job.train.balance and (job.train.reproducible or not job.train.global_batch):
        raise JobError(
            "train.balance = true: it needs train.global_batch, and can't be had together with train.reproducible: "
            "leave it out"
        )
    batch, lanes = job.train.global_batch, job.data.lanes
    if lanes and batch % lanes:
        below, above = batch // lanes * lanes, -(-batch // lanes) * lanes
        fitting = f"{below} or {above}" if below else str(above)
        raise JobError(
            f"train.global_batch = {batch} can't be divided among data.lanes = {lanes}; "
            f"use a multiple of {lanes} ({fitting})"
        )


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    table = next(field.type for field in msgspec.structs.fields(Job) if field.name == section)
    return next(field.default for field in msgspec.structs.fields(table) if field.name == name)


def _shown(value: Any) -> str:
    """A value in an error: its beginning, where it is long."""
    text = _toml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _key(name: str) -> str:
    """A TOML key, bare where it can be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    """A value as TOML."""
    match value:
        case str():
            # JSON's escapes are TOML's, save that TOML wants this one too.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return "{" + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
        case date() | time():
            return value.isoformat()
        case _:
            return repr(value)
