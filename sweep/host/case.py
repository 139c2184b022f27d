"""A case: a point and steps, which both the model and a real kernel can run; and what the model predicts for it."""

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels import steps as model
from kernels.checks import StepChecks
from kernels.policy import behaviours
from kernels.spec import PAGE_BYTES, Mmu
from kernels.state import geometry_of
from sweep.parameters import Point
from sweep.point import simulate_steps
from sweep.quantity import format_size
from sweep.steps import STEP, TouchStep, build_step, traits_of_point

MAX_CASE_BYTES = 1 << 30  # the litmus program's slot
_NO_FOLDER = Path()  # no step of a case reads a file


@dataclass(frozen=True)
class Access:
    """One guest access: which vCPU, which page of the slot, store or load."""

    vcpu: int
    page: int
    write: bool


@dataclass(frozen=True)
class AccessList:
    """Guest accesses one by one, in order per vCPU."""

    accesses: tuple[Access, ...]
    op = "touch_list"

    def __str__(self) -> str:
        return " ".join(f"{a.vcpu}:{'w' if a.write else 'r'}{a.page}" for a in self.accesses)

    def to_model(self) -> model.TouchList:
        columns = zip(*((a.vcpu, a.page, a.write) for a in self.accesses), strict=True) if self.accesses else ((), (), ())
        vcpu, page, write = columns
        return model.TouchList(np.array(vcpu, np.int64), np.array(page, np.int64), np.array(write, bool))


@dataclass(frozen=True)
class Case:
    """Steps are specifications of `sweep.steps`, or an AccessList."""

    name: str
    point: Point
    steps: tuple[Any, ...]

    @property
    def pages(self) -> int:
        return self.point.memory // PAGE_BYTES

    def __str__(self) -> str:
        """One line: what somebody needs to run it again."""
        p = self.point
        parts = [f"{p.backing} {format_size(p.memory)}", f"vcpus={p.vcpus}", f"mmu={p.mmu}", f"kernel={p.kernel}"]
        parts += [f"{key}={value}" for key, value in p.model_dump(mode="json", exclude_defaults=True).items() if key not in SHOWN_ALWAYS]
        return " ".join(parts) + ": " + "; ".join(step_text(step) for step in self.steps)


SHOWN_ALWAYS = frozenset({"backing", "memory", "vcpus", "mmu", "kernel", "workload", "costs"})


def step_text(step: Any) -> str:
    """A step on one line: its op and what is not the default."""
    if isinstance(step, AccessList):
        return f"touch {step}"
    fields = step.model_dump(mode="json", exclude_defaults=True)
    return " ".join([fields.pop("op", step.op), *(f"{key}={value}" for key, value in fields.items())])


def case_from_json(case: Mapping[str, Any]) -> Case:
    """A case of a file in tests/cases. Raises pydantic.ValidationError."""
    return Case(case["name"], Point.model_validate(case["point"]), tuple(STEP.validate_python(step) for step in case["steps"]))


def _model_step(step: Any) -> model.Step:
    return step.to_model() if isinstance(step, AccessList) else build_step(step, _NO_FOLDER)


def faults_of(case: Case) -> list[str]:
    """Why the case cannot be, if it cannot: the model's rules of which step may follow which."""
    p = case.point
    traits = traits_of_point(p)
    checks = StepChecks(
        behaviours(p.kernel, p.policy), Mmu[p.mmu.upper()], p.kernel, traits, geometry_of(p.memory, p.offset, traits.gigantic)
    )
    return [f"step {n}: {text}" for n, step in enumerate(case.steps) if (text := checks.fault(_model_step(step)))]


def predict(case: Case) -> list[dict[str, int]]:
    """The model's counters and gauges after each step. Raises what `kernels.simulate()` raises."""
    run = simulate_steps(case.point, [_model_step(step) for step in case.steps])
    return [step.counters | step.gauges for step in run.steps]


def units_of(step: TouchStep, pages: int) -> range:
    """The pages a sequential step visits, in order; `every` in whole pages."""
    first, end = int(step.range[0] * pages), int(step.range[1] * pages)
    return range(first + step.at // PAGE_BYTES, end, step.every // PAGE_BYTES)


def shuffled(access: str, pages: int, seed: str) -> AccessList:
    """Every page once, in an order drawn from the seed: 'read', 'write', or 'pairs'."""
    order = list(range(pages))
    random.Random(hashlib.sha256(seed.encode()).digest()).shuffle(order)  # noqa: S311 (no secret)
    return listed(access, order)


def listed(access: str, pages: Iterable[int], vcpu: int = 0) -> AccessList:
    """These pages in this order."""
    kinds = {"read": (False,), "write": (True,), "pairs": (False, True)}[access]
    return AccessList(tuple(Access(vcpu, page, write) for page in pages for write in kinds))
