"""The model: numbers in, numbers out. `simulate()` runs one virtual machine on one kernel."""

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.policy import PROPOSALS, REGIMES, Behaviour, behaviours
from kernels.simulate import Run, StepResult, simulate
from kernels.spec import Access, Backing, Call, Mmu, Order, Prealloc, Spread, ThpEnabled
from kernels.steps import (
    ChildExit,
    Collapse,
    DirtyLog,
    DontNeed,
    Fork,
    HostTouch,
    Idle,
    Khugepaged,
    Ksm,
    KsmMerge,
    Populate,
    PreFault,
    Touch,
    TouchList,
    VmmCow,
)

__all__ = [
    "DEFAULT_COSTS",
    "PROPOSALS",
    "REGIMES",
    "Access",
    "Backing",
    "Behaviour",
    "Call",
    "ChildExit",
    "Collapse",
    "Cost",
    "DirtyLog",
    "DontNeed",
    "Fork",
    "HostTouch",
    "Idle",
    "Khugepaged",
    "Ksm",
    "KsmMerge",
    "Mmu",
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
