"""Devices for tests of kernels: what a kernel writes may depend on none of this."""

from collections.abc import Iterator

import pytest

from .copied import Copied, on_gpu
from .shim import Shim

WAYS = {"forward": {}, "backward": {"reverse": True}, "shuffled": {"seed": 0}, "watched": {"watch": True}}


@pytest.fixture(params=WAYS)
def shim(request: pytest.FixtureRequest) -> Iterator[Shim]:
    """The stand-in for a GPU, with its threads in different orders, and with every access watched."""
    device = Shim(**WAYS[request.param])
    yield device
    device.check()


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels of the test's stand-ins run: there, or on a GPU."""
    if request.param == "gpu":
        on_gpu()
        monkeypatch.setattr(Shim, "kernel", Copied.kernel)
