"""A whole training step on a GPU, beside PyTorch's: same network, batch of 64 and float32 without tensor cores.

A step is forward, backward and the update (SGD with momentum) over one batch of random numbers, which ours copies to
the device in each step; both sides wait for the device at the end of each. PyTorch runs eagerly, in both layouts;
the better one counts. The rows:

    training    seconds a step, against PyTorch
    rate        multiply-adds of the step, as the direct algorithm has them, two operations each, against the device's
                float32 rate

Without a GPU there are no rows.
"""

from functools import partial

from harness import Benchmark, alternate
from limits import GpuClock, measure
from step import NETWORKS, least

from dpnn.backends.cuda import device_of_rank
from dpnn.native import Unavailable

ROWS = 64
CASES = ("alexnet", "googlenet", "vgg16", "resnet50")
PEER_GOAL, RATE_GOAL = 1.0, 0.5


def main() -> None:
    """Every network."""
    bench = Benchmark("gpu_step", __doc__, ["numpy", "cupy-cuda13x", "torch"])
    try:
        gpu = device_of_rank(0)
    except Unavailable as error:
        bench.note(f"nothing was measured: {error}")
        bench.finish()
        return
    import torch
    from ours import Ours
    from peers import Peer

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    limits = measure(gpu, GpuClock(gpu), 5)
    bench.note(f"{gpu.about}: float32 {limits.float32 / 1e12:.1f} TFLOP/s")
    for name in ("alexnet",) if bench.quick else CASES:
        network, shape = NETWORKS[name]
        ours = Ours(network, shape, ROWS, 4, "train", gpu=True)
        peers = {
            f"PyTorch {layout}": Peer(network, shape, ROWS, 4, "train", layout, device="cuda")
            for layout in ("NCHW", "channels_last")
        }

        turns = [ours.step, *(partial(waited, side, torch) for side in peers.values())]
        mine, *times = alternate(turns, 5 if bench.quick else 20)
        best, theirs = least(dict(zip(peers, times, strict=True)))
        bench.record(f"{name}, training, batch {ROWS}", mine, theirs, best, PEER_GOAL, "s")
        done = 2 * ours.multiply_adds() / mine
        rates = done / 1e9, limits.float32 / 1e9
        bench.record(f"{name}, rate", *rates, "multiply-adds", RATE_GOAL, "GFLOP/s", more_is_better=True)
        del ours, peers, turns
        torch.cuda.empty_cache()
    bench.finish()


def waited(side, torch) -> None:
    """A step of PyTorch's, until the device is done."""
    side.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
