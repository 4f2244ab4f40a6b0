"""PyTorch's side of a measurement: the same networks, made from our own descriptions of them."""

import os
from typing import Literal

import numpy as np
import torch
from harness import RATE
from torch.nn import functional

from dpnn import nn
from dpnn.nn.layer import pair


class Join(torch.nn.Module):
    """Modules side by side, as `dpnn.nn.Branches`."""

    def __init__(self, branches: list[torch.nn.Module], join: nn.Add | nn.Concat) -> None:
        super().__init__()
        self.branches, self.join = torch.nn.ModuleList(branches), join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum is made in place, as torchvision's ResNet does."""
        first, *others = [branch(x) for branch in self.branches]
        if isinstance(self.join, nn.Concat):
            return torch.cat([first, *others], 1)
        for other in others:
            first += other
        return first


def module(network: nn.Network, shape: nn.Shape) -> tuple[torch.nn.Module, nn.Shape]:
    """A network as a module, and the shape of its output, for samples of `shape`; TypeError where there is no peer."""
    if isinstance(network, nn.Chain):
        parts = []
        for part in network.parts:
            made, shape = module(part, shape)
            parts.append(made)
        return torch.nn.Sequential(*parts), shape
    if isinstance(network, nn.Branches):
        if isinstance(network.join, nn.Heads):
            raise TypeError("no peer for a network with several heads")
        made, shapes = zip(*(module(branch, shape) for branch in network.branches), strict=True)
        return Join(list(made), network.join), network.join.infer(*shapes)
    return _layer(network, shape), network.infer(shape)


def _layer(layer: nn.Layer, shape: nn.Shape) -> torch.nn.Module:
    match layer:
        case nn.Conv():
            window = pair(layer.size), pair(layer.stride), pair(layer.padding)
            return torch.nn.Conv2d(shape[0], layer.filters, *window, groups=layer.groups, bias=layer.bias)
        case nn.Dense():
            return torch.nn.Linear(shape[0], layer.units, layer.bias)
        case nn.MaxPool():
            return torch.nn.MaxPool2d(layer.size, layer.step, layer.padding, ceil_mode=layer.ceil)
        case nn.AvgPool():
            return torch.nn.AvgPool2d(layer.size, layer.step, layer.padding, layer.ceil)
        case nn.GlobalAvgPool():
            return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        case nn.BatchNorm(sync=False):
            norm = torch.nn.BatchNorm2d if len(shape) == 3 else torch.nn.BatchNorm1d
            return norm(shape[0], layer.eps, layer.momentum)
        case nn.LocalResponseNorm():
            return torch.nn.LocalResponseNorm(layer.size, layer.alpha, layer.beta, layer.k)
        case nn.ReLU():
            return torch.nn.ReLU(inplace=True)
        case nn.Dropout():
            return torch.nn.Dropout(layer.rate)
        case nn.Flatten():
            return torch.nn.Flatten()
    raise TypeError(f"no peer for {layer}")


class Peer:
    """What `Ours` is, in PyTorch. `layout`: how images and filters lie in memory."""

    def __init__(
        self,
        network: nn.Network,
        shape: nn.Shape,
        rows: int,
        threads: int,
        mode: Literal["train", "eval"],
        layout: Literal["NCHW", "channels_last"],
        compiled: bool = False,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        net, (classes,) = module(network, shape)
        net.to(device, memory_format=order).train(mode == "train")
        self._x = torch.randn(rows, *shape, device=device).contiguous(memory_format=order)
        self._labels = torch.randint(classes, (rows,), device=device)
        self._net = torch.compile(net) if compiled else net
        # One pass over all numbers: five times as fast as `foreach` on CPUs.
        self._sgd = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=1e-4, fused=True)
        self._run = self._train if mode == "train" else self._infer

    def step(self) -> None:
        """One training step, or a forward pass."""
        self._run()

    def _train(self) -> None:
        self._sgd.zero_grad(set_to_none=True)
        functional.cross_entropy(self._net(self._x), self._labels).backward()
        self._sgd.step()

    @torch.inference_mode()
    def _infer(self) -> None:
        self._net(self._x)


class Parallel(Peer):
    """One process of DistributedDataParallel; its number stands in RANK. All meet in `file`, which isn't there yet."""

    def __init__(
        self,
        network: nn.Network,
        shape: nn.Shape,
        rows: int,
        threads: int,
        layout: Literal["NCHW", "channels_last"],
        file: str,
    ) -> None:
        super().__init__(network, shape, rows, threads, "train", layout)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # not by the name of this machine, which may not be known
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=size)
        self._net = torch.nn.parallel.DistributedDataParallel(self._net, gradient_as_bucket_view=True)


def check_equal(network: nn.Network, shape: nn.Shape, threads: int) -> None:
    """AssertionError where the two sides make different scores of the same images by the same parameters."""
    from ours import Ours  # here only: what we import isn't to count as PyTorch's memory

    rows, rng = 2, np.random.default_rng(1)
    ours = Ours(network, shape, rows, threads, "eval")
    store, params = ours.model.store, list(ours.model.graph.params())
    for param in params:
        if len(param.spec.shape) == 1:  # biases and running means that aren't 0, weights and variances that aren't 1
            store.param(param.name)[...] = rng.uniform(0.5, 1.5, param.spec.shape)
    net = module(network, shape)[0].eval()
    names = [name for name in net.state_dict() if not name.endswith("num_batches_tracked")]
    if [name.rpartition(".")[2] for name in names] != [param.role for param in params]:
        raise AssertionError("the two networks have different parameters")
    state = {name: torch.from_numpy(store.param(param.name)) for name, param in zip(names, params, strict=True)}
    net.load_state_dict(state, strict=False)
    x = rng.standard_normal((rows, *shape), np.float32)
    with torch.inference_mode():
        theirs = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours.scores(x), theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
