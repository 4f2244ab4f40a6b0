"""What a rank does in a step, one thing after the other: the words that its list is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Go on to micro-batch `micro` in `slot`; on the part that reads, copy its rows into the inputs."""

    micro: int
    slot: int


@dataclass(frozen=True)
class PostRecv:
    """Message number `message` may come from now on."""

    message: int
    slot: int


@dataclass(frozen=True)
class Recv:
    """Wait until the message is there."""

    message: int
    slot: int


@dataclass(frozen=True)
class Send:
    """The message is written: start to send it."""

    message: int
    slot: int


@dataclass(frozen=True)
class Sent:
    """Wait until its buffer may be written again."""

    message: int
    slot: int


@dataclass(frozen=True)
class Forward:
    """Run the forward op of group number `group`."""

    group: int
    slot: int


@dataclass(frozen=True)
class Loss:
    """Add up the losses; after the `last` micro-batch the strategy is told."""

    slot: int
    last: bool


@dataclass(frozen=True)
class Backward:
    """Run the backward op of group number `group`."""

    group: int
    slot: int


@dataclass(frozen=True)
class Weights:
    """Make the gradients of the weights of group number `group`, which splits; its backward op has run."""

    group: int
    slot: int


@dataclass(frozen=True)
class Collect:
    """Start to sum the output of node `node` over the replicas, or (`gradient`) the gradient by it."""

    node: int
    slot: int
    gradient: bool


@dataclass(frozen=True)
class Collected:
    """Wait until that sum is there."""

    node: int
    slot: int
    gradient: bool


@dataclass(frozen=True)
class Open:
    """From here on grads[lo:hi] is written: wait until nobody reads its last contents."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Ready:
    """grads[lo:hi] is complete: the strategy may exchange it."""

    lo: int
    hi: int


@dataclass(frozen=True)
class Finish:
    """Every gradient is ready: complete the exchange and update the parameters."""


Compute = Forward | Backward | Weights
Instruction = Load | PostRecv | Recv | Compute | Send | Sent | Loss | Collect | Collected | Open | Ready | Finish
