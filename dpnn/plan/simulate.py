"""All parts' lists of a step, gone through together without MPI: do they fit, and how long do they take.

A message needs its receive to be posted before it moves, as large ones do in MPI; so what passes here can't wait for a
buffer of MPI's own. It takes the time of who receives it, as on one node. Whoever waits for what never comes is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpnn.plan.instructions import Instruction, PostRecv, Recv, Send, Sent
from dpnn.plan.schedule import Plan


class Unmatched(Exception):
    """The lists of the parts don't fit together: a mistake of dpnn's, not of a job's."""


@dataclass
class Timing:
    """What a step is predicted to take on each part, in seconds."""

    step: float = 0.0
    busy: list[float] = field(default_factory=list)
    """Computing."""
    sent: list[int] = field(default_factory=list)
    """Bytes that each part sends."""

    @property
    def idle(self) -> float:
        """The share of all parts' time in which they compute nothing."""
        return 1 - sum(self.busy) / (self.step * len(self.busy)) if self.step else 0.0


@dataclass
class _Line:
    """The messages of one number: when they were written and when room for them was made, in order."""

    written: list[float] = field(default_factory=list)
    posted: list[float] = field(default_factory=list)
    taken: int = 0
    """Received so far."""
    waited: int = 0
    """Of those written, how many the sender knows to be gone."""


def simulate(
    plans: Sequence[Plan],
    seconds: Callable[[Plan, Instruction], float] = lambda plan, step: 0.0,
    crossing: Callable[[int], float] = lambda nbytes: 0.0,
    nbytes: Callable[[Plan, int], int] = lambda plan, number: 0,
) -> Timing:
    """Go through a step of all parts, plans[part]; Unmatched where it doesn't come to an end.

    `seconds` that an instruction computes, `crossing` that a message of so many bytes takes, `nbytes` of a message.
    """
    lines = [_Line() for _ in plans[0].messages]
    clocks, places = [0.0] * len(plans), [0] * len(plans)
    timing = Timing(busy=[0.0] * len(plans), sent=[0] * len(plans))
    active: set[tuple[int, type[object], int, int]] = set()
    moved = True
    while moved:
        moved = False
        for part, plan in enumerate(plans):
            while places[part] < len(plan.instructions):
                step = plan.instructions[places[part]]
                if isinstance(step, PostRecv | Recv | Send | Sent):
                    line, length = lines[step.message], nbytes(plan, step.message)
                    after = _talk(step, line, clocks[part], crossing(length))
                    if after is None:
                        break
                    clocks[part] = after
                    _check_request(step, part, plan, active)
                    timing.sent[part] += length if isinstance(step, Send) else 0
                else:
                    took = seconds(plan, step)
                    clocks[part] += took
                    timing.busy[part] += took
                places[part] += 1
                moved = True
    timing.step = max(clocks)
    for part, plan in enumerate(plans):
        if places[part] < len(plan.instructions):
            raise Unmatched(f"part {part} waits for ever at instruction {places[part]}: {_named(plan, places[part])}")
    for number, line in enumerate(lines):
        counts = {len(line.written), len(line.posted), line.taken, line.waited}
        if len(counts) > 1:
            message = plans[0].messages[number]
            raise Unmatched(
                f"message {number} ({message}) is sent {len(line.written)} times, posted {len(line.posted)}, "
                f"received {line.taken}, waited for by its sender {line.waited} times"
            )
    return timing


def _check_request(
    step: PostRecv | Recv | Send | Sent, part: int, plan: Plan, active: set[tuple[int, type[object], int, int]]
) -> None:
    """Unmatched where a request of a slot is started while it is under way, or waited for while it isn't."""
    begins = isinstance(step, PostRecv | Send)
    kind = PostRecv if isinstance(step, PostRecv | Recv) else Send
    request = (part, kind, step.message, step.slot)
    if begins == (request in active):
        message = plan.messages[step.message]
        raise Unmatched(f"part {part}: {step} while its request is {'' if begins else 'not '}under way ({message})")
    (active.add if begins else active.remove)(request)


def _talk(step: PostRecv | Recv | Send | Sent, line: _Line, now: float, takes: float) -> float | None:
    """The time after an instruction; None where what it waits for hasn't happened yet."""
    match step:
        case PostRecv():
            line.posted.append(now)
            return now
        case Send():
            line.written.append(now)
            return now
        case Recv():
            if line.taken >= min(len(line.written), len(line.posted)):
                return None
            written, line.taken = line.written[line.taken], line.taken + 1
            return max(now, written) + takes
        case _:
            if line.waited >= min(len(line.written), len(line.posted)):
                return None
            begun, line.waited = max(line.written[line.waited], line.posted[line.waited]), line.waited + 1
            return max(now, begun + takes)


def _named(plan: Plan, place: int) -> str:
    return str(plan).splitlines()[place]
