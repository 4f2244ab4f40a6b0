"""Values as TOML, as errors show them and a run's own job file holds them."""

import json
import re
import typing
from collections.abc import Iterable
from datetime import date, time
from typing import Any, Literal

import msgspec


def shown(value: Any) -> str:
    """A value in an error: its beginning, where it is long."""
    text = toml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wanted_of(kind: Any) -> str:
    """What a value of this type may be, in words."""
    if typing.get_origin(kind) is Literal:
        *others, last = map(toml, typing.get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    return str(kind.__metadata__[0].description)


def did_you_mean(names: Iterable[str]) -> str:
    """What may have been meant, as an error ends."""
    return "".join(f"; did you mean {name}?" for name in names)


def key_of(name: str) -> str:
    """A TOML key, bare where it can be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml(name)


def toml(value: Any) -> str:
    """A value as TOML."""
    match value:
        case str():
            # JSON's escapes are TOML's, save that TOML wants this one too.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return f"[{', '.join(map(toml, value))}]"
        case msgspec.Struct():
            return toml(msgspec.structs.asdict(value))
        case dict():
            return "{" + ", ".join(f"{key_of(key)} = {toml(item)}" for key, item in value.items()) + "}"
        case date() | time():
            return value.isoformat()
        case _:
            return repr(value)
