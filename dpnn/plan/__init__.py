"""Who computes what, and when: placement, instructions, parameters, memory, and the loop that walks the list."""

from dpnn.plan.executor import Executor, Strategy, Sum
from dpnn.plan.memory import Arena, Layout
from dpnn.plan.placement import Placement
from dpnn.plan.schedule import Plan, compile_plan
from dpnn.plan.store import Piece, Store, clip, lay

__all__ = [
    "Arena",
    "Executor",
    "Layout",
    "Piece",
    "Placement",
    "Plan",
    "Store",
    "Strategy",
    "Sum",
    "clip",
    "compile_plan",
    "lay",
]
