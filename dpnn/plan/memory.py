"""Where every activation and every gradient of one lies: laid out once by lifetime, in one block of memory.

A buffer lives from the first to the last instruction of a micro-batch that touches it; two whose lives don't meet may
share their place. Where several micro-batches are in flight, each slot has what lasts from task to task, and all
messages, for itself; what lives within one task is common to all slots, since tasks don't interleave. Training and
evaluation are never in flight at once, so they use the same arena.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpnn.backends.base import Group, Step
from dpnn.memory import ALIGNMENT, HOST, Memory
from dpnn.nn.graph import Node
from dpnn.nn.join import Fork
from dpnn.nn.layer import Input
from dpnn.plan.instructions import Backward, Compute, Forward, Load, Loss, PostRecv, Recv, Send, Sent, Weights
from dpnn.plan.messages import Message
from dpnn.plan.schedule import Plan
from dpnn.plan.store import Store

Array = NDArray[Any]

Key = tuple[int, int]
"""(node, -1): the output of a node. (node, position): the gradient by one of its inputs. (last node of a group, KEPT
and so on): the bytes that its op asked for."""

KEPT, FORWARD, BACKWARD, WEIGHTS, ROWS = -2, -3, -4, -5, -6


@dataclass(frozen=True)
class Life:
    """How large a buffer is, and the first and the last instruction that touch it."""

    nbytes: int
    first: int
    last: int


class Arena:
    """One aligned block of a backend's memory; `reserve` before `take`, so that it is allocated once."""

    def __init__(self, memory: Memory = HOST) -> None:
        self.memory, self._nbytes = memory, 0
        self._block: Array | None = None

    def reserve(self, nbytes: int) -> None:
        """Ask for room; several plans that are never in flight at once ask for the same room."""
        if self._block is not None:
            raise RuntimeError("the arena is allocated already: reserve all room before taking any")
        self._nbytes = max(self._nbytes, nbytes)

    def take(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array over the arena's bytes from `offset` on."""
        if self._block is None:
            self._block = self.memory.empty(self._nbytes)
        nbytes = math.prod(shape) * dtype.itemsize
        return self._block[offset : offset + nbytes].view(dtype).reshape(shape)


def shape_of(plan: Plan, node: Node) -> tuple[int, ...]:
    """The shape of a node's output, with room for the largest micro-batch."""
    return (plan.rows, *node.shape) if node.layer.batched else node.shape


def type_of(plan: Plan, node: Node) -> np.dtype[Any]:
    """The type of a node's output."""
    while isinstance(node.layer, Fork):
        node = plan.graph.nodes[node.inputs[0]]
    name = node.layer.holds if isinstance(node.layer, Input) else node.layer.dtype
    return plan.dtype if name == "float" else np.dtype(name)


def output_nbytes(plan: Plan, node: Node) -> int:
    """Of a node's output, or of a gradient by it."""
    return math.prod(shape_of(plan, node)) * type_of(plan, node).itemsize


def message_nbytes(plan: Plan, number: int) -> int:
    """Of a message: always all rows."""
    return output_nbytes(plan, plan.graph.nodes[plan.messages[number].node])


class Layout:
    """The offset of every buffer of a plan in the arena, and the views that share another buffer's place."""

    def __init__(self, plan: Plan, rooms: bool = True) -> None:
        """`rooms`: also what ops want beside arrays; backends may have to time something to know that."""
        self.plan, self.graph, self.dtype = plan, plan.graph, plan.dtype
        self._same: dict[Key, Key] = {}
        for group in plan.groups:
            node = group.nodes[-1]
            if group.forward_view:
                self._same[node.index, -1] = (node.inputs[0], -1)
            if group.backward_view and self.graph.readers(node):
                self._same[node.index, 0] = self._gradient(node)
            if group.in_place is not None and self.graph.readers(node):
                self._same[group.in_place] = self._gradient(node)
        self._microbatches = 1 if plan.grains else sum(isinstance(step, Load) for step in plan.instructions)
        self.rooms = {group.nodes[-1].index: self._room(group) if rooms else {} for group in plan.groups}
        """The bytes that each group's op asked for, by key."""
        self.offsets, self.nbytes = pack(self._lives_in_slots(plan))

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's output, with room for the largest micro-batch."""
        return shape_of(self.plan, node)

    def type(self, node: Node) -> np.dtype[Any]:
        """The type of a node's output."""
        return type_of(self.plan, node)

    def root(self, key: Key) -> Key:
        """The buffer that a view shares the place of; a buffer of its own is its own root."""
        while key in self._same:
            key = self._same[key]
        return key

    def _room(self, group: Group) -> dict[int, int]:
        plan = self.plan
        room = group.backend.room(group, plan.rows, plan.mode)
        sizes = room.sizes(plan.rows * self._microbatches)
        return dict(zip((KEPT, FORWARD, BACKWARD, WEIGHTS, ROWS), sizes, strict=True))

    def _gradient(self, node: Node) -> Key:
        """The gradient by the output of `node`: its one reader's."""
        reader, position = self.graph.readers(node)[0]
        return reader.index, position

    def offset(self, key: Key, slot: int) -> int | None:
        """Where a buffer of a slot begins in the arena; None for what doesn't lie there."""
        root = self.root(key)
        return self.offsets.get((root, slot), self.offsets.get((root, 0)))

    def _lives_in_slots(self, plan: Plan) -> dict[tuple[Key, int], Life]:
        """The lives of all buffers, those that are common to all slots under slot 0."""
        lives, tasks = self._lives(plan)
        wanted = {(index, ROWS): room.get(ROWS, 0) for index, room in self.rooms.items()}
        lives |= {key: Life(nbytes, 0, len(plan.instructions)) for key, nbytes in wanted.items() if nbytes}
        if plan.slots == 1 and _alike(plan):
            return {(key, 0): life for key, life in lives.items()}
        own = {self.root(m.key) for m in plan.messages if plan.part in (m.source, m.target)}
        own |= {key for key, found in tasks.items() if key in lives and len(found) > 1}
        whole = {key: Life(lives[key].nbytes, 0, len(plan.instructions)) for key in own}
        common = {(key, 0): life for key, life in lives.items() if key not in own}
        return common | {(key, slot): life for key, life in whole.items() for slot in range(plan.slots)}

    def _lives(self, plan: Plan) -> tuple[dict[Key, Life], dict[Key, set[tuple[int, int]]]]:
        """The lives in a micro-batch, and the tasks, (direction, level), that touch each buffer."""
        lives: dict[Key, Life] = {}
        tasks: dict[Key, set[tuple[int, int]]] = {}
        end, outside = len(plan.instructions), (0, -1)
        losses = [self.graph.nodes[i] for i in self.graph.losses if plan.placed.part_of[i] == plan.part]
        for at, instruction in enumerate(plan.instructions):
            if getattr(instruction, "slot", 0) != 0:
                continue
            touched, task = set[Key](), outside
            match instruction:
                case Load(micro, _) if micro > 0:  # the micro-batches of a slot are alike: these are all lives
                    break
                case Load() if plan.part == plan.placed.reader:
                    touched = {(index, -1) for index in (self.graph.images, self.graph.labels, self.graph.ids)}
                case Forward(group, _):
                    touched, task = self._touched(plan.groups[group], FORWARD), (FORWARD, plan.levels[group])
                case Backward(group, _):
                    touched, task = self._touched(plan.groups[group], BACKWARD), (BACKWARD, plan.levels[group])
                case Weights(group, _):
                    touched, task = self._touched_by_weights(plan.groups[group]), (BACKWARD, plan.levels[group])
                case Loss():
                    touched = {(n.index, -1) for n in losses if plan.mode == "train" or not n.training_only}
                case PostRecv(number, _) | Recv(number, _) | Send(number, _) | Sent(number, _):
                    touched = {plan.messages[number].key}
            self._touch(lives, touched, at)
            for key in touched:
                tasks.setdefault(self.root(key), set()).add(task)
        if plan.mode == "eval" and plan.part == plan.placed.writer:  # they are read after the last instruction
            self._touch(lives, {(self.graph.output, -1), (self.labels, -1)}, end)
        return lives, tasks

    @property
    def labels(self) -> int:
        """The node whose output the loss reads as labels."""
        return self.graph.nodes[self.graph.losses[0]].inputs[1]

    def _touched(self, group: Group, direction: int) -> set[Key]:
        """The buffers that the op of a group reads or writes, forward or backward."""
        last = group.nodes[-1]
        keys: set[Key] = {(last.index, -1), (last.index, KEPT), (last.index, direction)}
        for node, position in group.inputs:
            source = self.graph.nodes[node.inputs[position]]
            keys.add((source.index, -1))
            if direction == BACKWARD and source.needs_grad:
                keys.add((node.index, position))
        if direction == BACKWARD:
            keys.update((reader.index, position) for reader, position in self.graph.readers(last))
        return keys

    def _touched_by_weights(self, group: Group) -> set[Key]:
        """The same of the gradients of weights, where they are made by themselves."""
        last = group.nodes[-1]
        inputs = {(node.inputs[position], -1) for node, position in group.inputs}
        return inputs | {(last.index, WEIGHTS), self._gradient(last)}

    def _touch(self, lives: dict[Key, Life], keys: set[Key], at: int) -> None:
        for key in keys:
            nbytes = self._nbytes(key)
            if nbytes:
                root = self.root(key)
                old = lives.get(root, Life(nbytes, at, at))
                lives[root] = Life(max(old.nbytes, nbytes), min(old.first, at), max(old.last, at))

    def _nbytes(self, key: Key) -> int:
        """How large a buffer is; 0 for what doesn't lie in the arena."""
        index, position = key
        node = self.graph.nodes[index]
        if position < -1:
            return self.rooms[index].get(position, 0)
        source = node if position < 0 else self.graph.nodes[node.inputs[position]]
        if source.layer.collected:
            return 0
        return output_nbytes(self.plan, source)


def _alike(plan: Plan) -> bool:
    """Whether all micro-batches go through the groups in one order."""
    orders: list[list[tuple[type[object], int]]] = []
    for step in plan.instructions:
        if isinstance(step, Load):
            orders.append([])
        elif isinstance(step, Compute):
            orders[-1].append((type(step), step.group))
    return all(order == orders[0] for order in orders)


K = TypeVar("K")


def pack(lives: dict[K, Life]) -> tuple[dict[K, int], int]:
    """Offsets of buffers such that no two whose lives meet overlap, and the bytes needed in all.

    Greedy by size, each at the lowest gap that takes it (Pisarchyk and Lee 2020, section 5.2).
    """
    offsets: dict[K, int] = {}
    placed: list[tuple[int, int, Life]] = []
    total = 0
    for key, life in sorted(lives.items(), key=lambda item: (-item[1].nbytes, item[0])):
        nbytes = -(-life.nbytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for lo, hi, other in placed:  # sorted by lo
            if other.first > life.last or other.last < life.first:
                continue
            if lo >= offset + nbytes:
                break
            offset = max(offset, hi)
        offsets[key] = offset
        placed.append((offset, offset + nbytes, life))
        placed.sort(key=lambda item: item[0])
        total = max(total, offset + nbytes)
    return offsets, total


class Buffers:
    """The arrays of one slot, by node: what a backend sees while it builds an op (`backends.base.Slot`)."""

    def __init__(
        self, layout: Layout, slot: int, arena: Arena, store: Store, collected: dict[Key, Array], step: Step
    ) -> None:
        self.step = step
        self._layout, self._slot, self._arena, self._store, self._collected = layout, slot, arena, store, collected

    def input(self, node: Node, position: int = 0) -> Array:
        """What `node` reads as its input number `position`."""
        return self.output(self._layout.graph.nodes[node.inputs[position]])

    def output(self, node: Node) -> Array:
        """What `node` writes in forward."""
        return self._array((node.index, -1), node)

    def d_output(self, node: Node) -> Array:
        """The gradient by the node's output."""
        return self.d_outputs(node)[0]

    def d_outputs(self, fork: Node) -> list[Array]:
        """The gradients that each reader wrote."""
        readers = self._layout.graph.readers(fork)
        return [self._array((reader.index, position), fork) for reader, position in readers]

    def d_input(self, node: Node, position: int = 0) -> Array | None:
        """Where `node` writes the gradient by its input number `position`; None where nobody wants it."""
        source = self._layout.graph.nodes[node.inputs[position]]
        return self._array((node.index, position), source) if source.needs_grad else None

    def room(self, group: Group) -> tuple[Array, ...]:
        """The bytes that the group's backend asked for."""
        index, layout = group.nodes[-1].index, self._layout
        return tuple(
            self._arena.take(layout.offset((index, key), self._slot) or 0, (nbytes,), np.dtype(np.uint8))
            for key, nbytes in layout.rooms[index].items()
        )

    def param(self, node: Node, role: str) -> Array:
        """A parameter, as a view of the flat array."""
        param = next(param for param in node.params if param.role == role)
        return self._store.param(param.name, param.lo)

    def d_param(self, node: Node, role: str) -> Array:
        """Its gradient, likewise."""
        param = next(param for param in node.params if param.role == role)
        return self._store.grad(param.name, param.lo)

    def message(self, message: Message) -> Array:
        """All bytes of a message's buffer, flat: rows that a smaller batch doesn't fill cross with it."""
        layout = self._layout
        node = layout.graph.nodes[message.node]
        if node.layer.collected:
            raise RuntimeError(f"{node.name} is summed over the replicas, and can't cross to another part")
        nbytes = output_nbytes(layout.plan, node)
        return self._arena.take(layout.offset(message.key, self._slot) or 0, (nbytes,), np.dtype(np.uint8))

    def _array(self, key: Key, node: Node) -> Array:
        if node.layer.collected:
            return self._collected[key]
        layout = self._layout
        offset, shape, kind = layout.offset(key, self._slot), layout.shape(node), layout.type(node)
        if offset is None:
            raise KeyError(f"part {layout.plan.part} has no buffer for {key} of {node.name}")
        if layout.plan.channels_last and len(shape) == 4:
            n, c, h, w = shape
            return self._arena.take(offset, (n, h, w, c), kind).transpose(0, 3, 1, 2)
        return self._arena.take(offset, shape, kind)
