"""Who computes what, and when: placement, instructions, parameters, memory, and the loop that walks the list."""

from dpnn.plan.executor import Executor, Strategy, Sum
from dpnn.plan.memory import Arena, Layout
from dpnn.plan.placement import Placement
from dpnn.plan.schedule import Plan, compile_plan
from dpnn.plan.store import Piece, Store

__all__ = ["Arena", "Executor", "Layout", "Piece", "Placement", "Plan", "Store", "Strategy", "Sum", "compile_plan"]
