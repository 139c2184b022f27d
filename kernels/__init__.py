"""The model: numbers in, numbers out. `simulate()` runs one virtual machine on one kernel."""

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import PROPOSALS, REGIMES, Behaviour, behaviours
from kernels.simulate import Run, StepResult, simulate
from kernels.spec import Access, Backing, Order, Prealloc, Spread, ThpEnabled
from kernels.steps import Populate, PreFault, Touch, TouchList, VmmCow

__all__ = [
    "DEFAULT_COSTS",
    "PROPOSALS",
    "REGIMES",
    "Access",
    "Backing",
    "Behaviour",
    "Cost",
    "Order",
    "Populate",
    "PreFault",
    "Prealloc",
    "Run",
    "Spread",
    "StepResult",
    "ThpEnabled",
    "Touch",
    "TouchList",
    "VmmCow",
    "behaviours",
    "simulate",
]
