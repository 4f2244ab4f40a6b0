"""A job file read into its tables. An error names the key, its value and what is allowed; for an unknown key or word,
the nearest known one too.
"""

import re
import tomllib
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import msgspec

from dpnn.config.checks import check
from dpnn.config.tables import Job, Staleness, Table
from dpnn.config.toml import did_you_mean, shown, toml, wanted_of
from dpnn.errors import JobError


def load(path: str, overrides: Sequence[str] = ()) -> Job:
    """The job of a file, with overrides "a.b=value"; JobError where anything is wrong."""
    return parse(_text(path, "the job file"), overrides, path)


def read_table(table: type[Table], path: str, what: str) -> Any:
    """The struct `table` of another file in TOML; `what` is what people call it. JobError where anything is wrong."""
    values = _values(_text(path, what), path)
    try:
        return _read(table, values, "")
    except JobError as error:
        raise JobError(f"{path}: {error}") from error


def _text(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{what} {path} can't be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise JobError(f"{what} {path} is not text in UTF-8; name a TOML file") from error


def parse(text: str, overrides: Sequence[str] = (), name: str = "job") -> Job:
    """The job of a TOML text, likewise; `name` stands in front of every error.

    The value of an override is read as TOML, and as plain text where it isn't TOML.
    """
    values = _values(text, name)
    try:
        for override in overrides:
            _override(values, override)
        job: Job = _read(Job, values, "")
        check(job)
    except JobError as error:
        raise JobError(f"{name}: {error}") from error
    return job


def _values(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        problem, line = place.groups() if place else (str(error), None)
        line = line or max(1, len(text.splitlines()))
        raise JobError(f"{name}, line {line}: this is not TOML: {problem}") from error


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
        raise JobError(f"{path[:-1]} = {shown(values)}: a table is wanted, [{path[:-1]}] and its keys")
    hints = typing.get_type_hints(table, include_extras=True)
    unknown = {key: value for key, value in values.items() if key not in hints or key == "options"}
    if "options" in hints:
        values = {**{key: value for key, value in values.items() if key not in unknown}, "options": unknown}
    elif unknown:
        key = next(iter(unknown))
        raise JobError(f"{path}{key} = {shown(unknown[key])}: there is no such key{_nearest_key(table, path, key)}")
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(table):
        key, kind = path + field.name, hints[field.name]
        if isinstance(kind, type) and issubclass(kind, Table):
            fields[field.name] = _read(kind, values.get(field.name, {}), key + ".")
        elif field.name in values:
            fields[field.name] = _convert(values[field.name], kind, key)
        elif field.required:
            raise JobError(f"{key} is missing: {wanted_of(kind)} is wanted")
    return table(**fields)


def _convert(value: Any, kind: Any, key: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        hint = did_you_mean(map(toml, get_close_matches(str(value), choices, 1, 0.5)))
        raise JobError(f"{key} = {shown(value)}: {wanted_of(kind)} is wanted{hint}") from error


def _nearest_key(table: type, path: str, key: str) -> str:
    """The nearest name in the same table, else in another one, else all names of this table."""
    tables = {"": Job.__struct_fields__}
    for field in msgspec.structs.fields(Job):
        if isinstance(field.type, type(Table)):
            tables[field.name + "."] = field.type.__struct_fields__
    tables["parallel.staleness."] = Staleness.__struct_fields__
    tables[path] = tuple(field.name for field in msgspec.structs.fields(table))
    near = [path + name for name in get_close_matches(key, tables[path], 1)]
    near += [other + name for other, names in tables.items() for name in get_close_matches(key, names, 1, 0.8)]
    return did_you_mean(near[:1]) or f"; known are {', '.join(path + name for name in tables[path])}"
