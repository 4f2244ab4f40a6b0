"""What a second thread brings to a convolution: each one of VGG-16 and ResNet-50 at batch 16, on 2 threads and on 1.

The layer stands in a small network, behind a cheap convolution that makes it send a gradient back, save where it is the
first of its own network. Its op alone is timed: forward, and forward with backward by data and by weights. A library
fixes its threads when it is loaded, so that each number of threads has a process; the two take turns, and medians
count.
"""

from dataclasses import replace
from functools import partial

from harness import Benchmark, Worker, medians

from dpnn.models import resnet, vgg
from dpnn.nn import Chain, Conv, Dense, GlobalAvgPool, Graph, Network, Shape, SoftmaxCrossEntropy
from dpnn.nn.layer import pair

PHOTO = (3, 224, 224)
NETWORKS = {"vgg16": vgg(1000, PHOTO, depth=16), "resnet50": resnet(1000, PHOTO, depth=50)}
THREADS = 2
GOAL = 1.8


class Lone:
    """One convolution after the other, with a number of threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def load(self, conv: Conv, shape: Shape, first: bool, rows: int) -> None:
        """Take this one from now on; one step, so that all buffers hold what they hold in training."""
        from ours import Ours

        self._op = self._ours = None  # its memory is needed
        parts = (replace(conv, name="it"), GlobalAvgPool(), Dense(10))
        network = Chain(*parts) if first else Chain(Conv(shape[0], 1), *parts)
        self._ours = Ours(network, shape if first else (1, *shape[1:]), rows, self._threads, "train")
        self._ours.step()
        executor = self._ours.executor
        places = [i for i, group in enumerate(executor.plan.groups) if "it" in [node.name for node in group.nodes]]
        self._op = executor._ops[0][places[0]]

    def forward(self) -> None:
        """Forward alone."""
        self._op.forward()

    def both(self) -> None:
        """Forward and backward."""
        self._op.forward()
        self._op.backward()
        self._op.weights()


def convolutions(network: Network) -> list[tuple[Conv, Shape, bool]]:
    """The different ones: the layer without its name, the shape of its input, whether that is the images."""
    graph = Graph(network, PHOTO, SoftmaxCrossEntropy())
    found = {}
    for node in graph.nodes:
        if isinstance(node.layer, Conv):
            source = graph.nodes[node.inputs[0]]
            found[replace(node.layer, name=""), source.shape, not source.needs_grad] = None
    return list(found)


def main() -> None:
    """All of them, or (quick) every sixth one at batch 2."""
    bench = Benchmark("convolution", __doc__, ["numpy", "onednn-cpu-gomp"])
    rows, budget_s, every = (2, 0.5, 6) if bench.quick else (16, 4.0, 1)
    with Worker("2 threads", Lone, THREADS, threads=THREADS) as two, Worker("1 thread", Lone, 1, threads=1) as one:
        for name, network in NETWORKS.items():
            for conv, shape, first in convolutions(network)[::every]:
                for side in (two, one):
                    side.call("load", conv, shape, first, rows)
                window, stride = "x".join(map(str, pair(conv.size))), pair(conv.stride)[0]
                title = f"{name} {'x'.join(map(str, shape))}, {conv.filters} of {window}" + f"/{stride}" * (stride > 1)
                for method in ("forward", "both"):
                    ours, peer = medians([partial(side.seconds, method) for side in (two, one)], budget_s)
                    bench.record(f"{title}, {method}", ours, peer, "1 thread", GOAL, "s")
    bench.finish()


if __name__ == "__main__":
    main()
