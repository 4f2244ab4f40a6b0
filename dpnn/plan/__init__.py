"""Who computes what, and when: placement, instructions, parameters, memory, and the loop that walks the list."""

from dpnn.plan.auto import choose, place
from dpnn.plan.costs import Costs, n_params
from dpnn.plan.executor import Edges, Executor, Strategy, Sum
from dpnn.plan.forecast import Forecast, Forecaster, Setting
from dpnn.plan.measure import measured
from dpnn.plan.memory import Arena, Layout
from dpnn.plan.placement import Placement
from dpnn.plan.schedule import Plan, compile_plan
from dpnn.plan.spread import Placed, spread
from dpnn.plan.store import Piece, Store, clip, lay

__all__ = [
    "Arena",
    "Costs",
    "Edges",
    "Executor",
    "Forecast",
    "Forecaster",
    "Layout",
    "Piece",
    "Placed",
    "Placement",
    "Plan",
    "Setting",
    "Store",
    "Strategy",
    "Sum",
    "choose",
    "clip",
    "compile_plan",
    "lay",
    "measured",
    "n_params",
    "place",
    "spread",
]
