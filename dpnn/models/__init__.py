"""Networks by name, and a user's own by file: `build` turns a job's [model] table into a description.

A model is a function `(classes, shape, *, ...options)` that returns a network. `classes` is the number of scores it
ends in, `shape` is (C, H, W) of a sample, and the options are the keys that a job file may give it.
"""

import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec

from dpnn import config
from dpnn.errors import JobError
from dpnn.models.alexnet import alexnet
from dpnn.models.googlenet import googlenet
from dpnn.models.lenet import lenet
from dpnn.models.resnet import resnet
from dpnn.models.vgg import vgg
from dpnn.nn.chain import Branches, Chain, Network
from dpnn.nn.graph import Graph
from dpnn.nn.layer import Layer, Shape
from dpnn.nn.loss import SigmoidCrossEntropy, SoftmaxCrossEntropy

__all__ = ["MODELS", "alexnet", "build", "googlenet", "graph", "lenet", "resnet", "vgg"]

Model = Callable[..., Network]

MODELS: dict[str, Model] = {
    "lenet": lenet,
    "alexnet": alexnet,
    "vgg": vgg,
    "googlenet": googlenet,
    "resnet": resnet,
}


def build(name: str, classes: int, shape: Shape, options: Mapping[str, Any]) -> Network:
    """The network `name` ("lenet", or "path/to/file.py:function") for samples of `shape`.

    JobError where there is no such model, or where it doesn't take these options.
    """
    model = _load(name) if ":" in name or name.endswith(".py") else MODELS.get(name)
    if model is None:
        raise JobError(f"model.name = {name!r} is not a model; {_nearest(name, MODELS)}, and path/to/file.py:function")
    network = model(classes, shape, **_check(name, model, options))
    if not isinstance(network, Layer | Chain | Branches):
        raise JobError(f"model.name = {name!r} returned a {type(network).__name__}, not a Chain, Branches or a layer")
    return _plain(network)


def graph(job: config.Job, network: Network, shape: Shape) -> Graph:
    """A job's network with its loss, for samples of `shape`; JobError naming a layer that can't take its input."""
    if job.train.loss == "softmax":
        return Graph(network, shape, SoftmaxCrossEntropy(smoothing=job.train.label_smoothing))
    return Graph(network, shape, SigmoidCrossEntropy(), labels=(job.model.classes,))


def _plain(network: Network) -> Network:
    """The same network in our own classes: other ranks don't have those of a user's file."""
    if isinstance(network, Chain):
        return Chain(*map(_plain, network.parts), name=network.name)
    if isinstance(network, Branches):
        return Branches(*map(_plain, network.branches), join=network.join, name=network.name)
    return network


def _load(name: str) -> Model:
    """The function of a user's file."""
    path, _, function = name.partition(":")
    file = Path(path)
    if not function:
        raise JobError(f"model.name = {name!r} doesn't say which function; write {path}:function")
    if not file.is_file():
        raise JobError(f"model.name = {name!r}: there is no file {path} (seen from {Path.cwd()})")
    module_name = f"dpnn_model_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise JobError(f"model.name = {name!r}: {path} is not a Python file; it must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise JobError(f"model.name = {name!r}: {path} can't be loaded: {type(error).__name__}: {error}") from error
    model = getattr(module, function, None)
    if not inspect.isfunction(model):
        own = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module_name
        ]
        raise JobError(f"model.name = {name!r}: {path} has no function {function}; {_nearest(function, own)}")
    return model


def _check(name: str, model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the types that the model's signature names."""
    parameters = list(inspect.signature(model).parameters.values())
    if len(parameters) < 2 or any(p.kind != p.POSITIONAL_OR_KEYWORD for p in parameters[:2]):
        raise JobError(f"model.name = {name!r} is not a model: its first two arguments must be (classes, shape)")
    allowed = {p.name: p for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    types = typing.get_type_hints(model)
    checked = {}
    for key, value in options.items():
        if key not in allowed:
            raise JobError(f"model.{key} is not an option of {name}; {_nearest(key, allowed)}")
        try:
            checked[key] = msgspec.convert(value, types.get(key, Any))
        except msgspec.ValidationError as error:
            raise JobError(f"model.{key} = {value!r} doesn't fit {name}: {error}") from error
    missing = [key for key, parameter in allowed.items() if parameter.default is parameter.empty and key not in options]
    if missing:
        raise JobError(f"model.{missing[0]} is missing: {name} has no default for it")
    return checked


def _nearest(wrong: str, known: typing.Collection[str]) -> str:
    """What is allowed, and which of it may have been meant."""
    if not known:
        return "it has none"
    meant = "".join(f"did you mean {near}? " for near in get_close_matches(wrong, known, 1))
    return f"{meant}known are {', '.join(known)}"
