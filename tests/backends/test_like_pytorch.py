"""Every layer computes what PyTorch's of the same name does, forward and backward."""

from typing import Any

import numpy as np
import pytest

from dpnn import nn
from dpnn.nn.layer import pair

torch = pytest.importorskip("torch", reason="PyTorch isn't installed: layers aren't compared with its own")
F = torch.nn.functional


def peer(layer: nn.Layer, xs: list[Any], p: dict[str, Any]) -> Any:
    """PyTorch's output, from tensors; running statistics in `p` are updated in place."""
    x = xs[0]
    match layer:
        case nn.Conv():
            stride, padding = pair(layer.stride), pair(layer.padding)
            return F.conv2d(x, p["weight"], p.get("bias"), stride, padding, groups=layer.groups)
        case nn.Dense():
            return F.linear(x, p["weight"], p.get("bias"))
        case nn.MaxPool():
            return F.max_pool2d(x, layer.size, layer.stride, layer.padding, ceil_mode=layer.ceil)
        case nn.AvgPool():
            return F.avg_pool2d(x, layer.size, layer.stride, layer.padding, layer.ceil, count_include_pad=True)
        case nn.GlobalAvgPool():
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        case nn.BatchNorm():
            statistics = p["running_mean"], p["running_var"]
            return F.batch_norm(x, *statistics, p["weight"], p["bias"], True, layer.momentum, layer.eps)
        case nn.LocalResponseNorm():
            return F.local_response_norm(x, layer.size, layer.alpha, layer.beta, layer.k)
        case nn.ReLU():
            return F.relu(x)
        case nn.Flatten():
            return x.flatten(1)
        case nn.Fork():
            return x.clone()
        case nn.Concat():
            return torch.cat(xs, 1)
        case nn.Add():
            return torch.stack(xs).sum(0)
        case nn.SoftmaxCrossEntropy():
            return layer.weight * F.cross_entropy(x, xs[1].long(), label_smoothing=layer.smoothing)
        case nn.SigmoidCrossEntropy():
            summed = F.binary_cross_entropy_with_logits(x, xs[1].to(x.dtype), reduction="sum")
            return layer.weight * summed / len(x)
    raise TypeError(f"no peer for {layer}")


@pytest.mark.parametrize("rows", [2, 3])
def test_forward_and_backward(backend: Any, bench: Any, steady_case: Any, rows: int) -> None:
    layer, close = steady_case.layer, {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 2e-5}[backend.dtype]

    def same(ours: Any, theirs: Any) -> None:
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=close, atol=close * max(1, np.abs(theirs).max(initial=0)))

    it = bench(backend, layer, *steady_case.shapes)
    inputs, dys = it.samples(rows)
    y = it.put(inputs, dys).forward()
    dxs = it.backward()
    tensors = [torch.from_numpy(x[:rows].copy()) for x in it.inputs]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    trained = [p.role for p in it.node.params if p.spec.statistic == 0]
    p = {role: torch.from_numpy(v.copy()).requires_grad_(role in trained) for role, v in it.params.items()}
    theirs = peer(layer, leaves, p)
    same(y, theirs)
    theirs.backward(torch.from_numpy(np.sum(dys, axis=0).astype(backend.dtype)) if dys else None)
    for dx, leaf in zip(dxs, leaves, strict=True):
        if dx is not None:
            same(dx, leaf.grad)
    for role in trained:
        same(it.d_params[role], p[role].grad)
    for param in it.node.params:  # what the optimizer makes of statistics
        move = param.spec.statistic
        if move:
            same((1 - move) * it.params[param.role] + move * it.d_params[param.role], p[param.role])
