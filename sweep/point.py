"""One point: the only place that calls the kernels."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kernels.cost import DEFAULT_COSTS, Charges, Cost, charges_of
from kernels.results import Results
from kernels.script import Script
from kernels.simulate import Prepared, Run, Simulator, simulate
from kernels.steps import Khugepaged, Ksm, Step, Touch
from sweep.configs import CostFile, Workload
from sweep.parameters import Point
from sweep.plan import Int64s, PlannedPoint, Points
from sweep.steps import TouchListStep, build_step
from sweep.study import Study

CHANCE = frozenset({"thp_failure"})  # points that differ in nothing else run on one prepared machine


@dataclass(frozen=True)
class Context:
    """What all points of a study share: small, and sent once to each worker."""

    study: str
    workloads: dict[str, Workload]
    costs: dict[str, CostFile]

    @cached_property
    def cost_digests(self) -> dict[str, str]:
        """Digest of each cost file's values, computed once."""
        return {name: file.digest() for name, file in self.costs.items()}


def context_of(study: Study) -> Context:
    return Context(study.name, dict(study.workloads), dict(study.costs))


def _script(workload: Workload) -> Script:
    """Raises StudyError for a touch list that cannot be read."""
    return Script([build_step(spec, workload.folder) for spec in workload.specs])


def _machine(values: Mapping[str, Any]) -> dict[str, Any]:
    """A point's parameters as simulate() takes them, but for steps, costs and CHANCE."""
    found = {**values}
    del found["workload"], found["costs"], found["thp_failure"]
    found["khugepaged"] = Khugepaged(**values["khugepaged"]) if values["khugepaged"] else None
    found["ksm"] = Ksm(**values["ksm"]) if values["ksm"] else None
    return found


def simulate_point(planned: PlannedPoint, context: Context, trace_rows: int = 0) -> Run:
    """Run one point by itself. Raises what `kernels.simulate()` raises, and StudyError for a touch list that cannot be read."""
    values = planned.values
    steps = _script(context.workloads[values["workload"]]).steps
    return _simulate(values, steps, context.costs[values["costs"]].values, planned.seed, planned.replicate, trace_rows)


def simulate_steps(point: Point, steps: Sequence[Step]) -> Run:
    """Run a point's parameters with these steps, at default costs, whatever workload it names. Raises what `kernels.simulate()` raises."""
    return _simulate(point.model_dump(), steps, DEFAULT_COSTS, 0, 0, 0)


def _simulate(
    values: Mapping[str, Any], steps: Sequence[Step], costs: Mapping[Cost, int], seed: int, replicate: int, trace_rows: int
) -> Run:
    return simulate(
        **_machine(values),
        thp_failure=values["thp_failure"],
        steps=steps,
        costs=costs,
        seed=seed,
        replicate=replicate,
        trace_rows=trace_rows,
    )


class Ran(NamedTuple):
    """What came of some points."""

    ops: list[tuple[str, ...]]  # of those that came to their ends: what their steps do
    wall_ns: Int64s  # (points,); of points that are run in one call, their mean
    failures: list[tuple[int, Exception]]


class Runner:
    """Runs points; what they share is made once. Their rows come together until forget()."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._simulator = Simulator()
        self._scripts: dict[str, Script] = {}
        self._charges: dict[str, Charges] = {}

    def prepare(self, values: Mapping[str, Any]) -> Prepared:
        """Make ready the machine of these parameters, but for CHANCE. Raises what `kernels.simulate()` raises, and StudyError for a
        touch list that cannot be read."""
        workload, costs = values["workload"], values["costs"]
        if workload not in self._scripts:
            self._keep_script(workload)
        if costs not in self._charges:
            self._charges[costs] = charges_of(self.context.costs[costs].values)
        return self._simulator.prepare(**_machine(values), script=self._scripts[workload], charges=self._charges[costs])

    def run(self, points: Points) -> Ran:
        """Run them one after the other and add the rows of those that came to their ends; a point that fails stops no other.
        Raises MemoryError: whether there is memory depends on what else runs, so all of them are tried again."""
        ran = Ran([], np.zeros(len(points), np.int64), [])
        failures, which = points.values_of("thp_failure")
        self._simulator.take(points.seed, points.replicates, np.array(failures, np.float64)[which])
        for first, end in points.runs(CHANCE):
            at = first
            try:
                prepared = self.prepare(points.values(first))
                for at in range(first, end, prepared.ready.at_once):
                    self._run(prepared, at, min(end, at + prepared.ready.at_once), ran)
            except MemoryError:
                raise
            except Exception as error:  # whatever it is, it is these points'
                ran.failures.extend((number, error) for number in range(at, end))
        return ran

    def _run(self, prepared: Prepared, first: int, end: int, ran: Ran) -> None:
        start = time.perf_counter_ns()
        failures = self._simulator.run(prepared, first, end)
        ran.wall_ns[first:end] = -(-(time.perf_counter_ns() - start) // (end - first))
        ran.failures.extend(failures)
        ran.ops.extend([prepared.ready.ops] * (end - first - len(failures)))

    def results(self) -> Results:
        """Rows of the points that were run since forget(), and of their steps."""
        return self._simulator.results()

    def forget(self) -> None:
        self._simulator.forget()

    def _keep_script(self, name: str) -> None:
        """Touch lists are large: one of them is kept."""
        workload = self.context.workloads[name]
        if any(isinstance(spec, TouchListStep) for spec in workload.specs):
            self._scripts.clear()
        self._scripts[name] = _script(workload)


def compile_kernels() -> None:
    """Make the kernels compile, or load from the cache."""
    simulate(steps=[Touch()], memory=1 << 21)


def touch_rate(touches: int, vcpus: int, guest_ns: int) -> float:
    """Guest accesses per vCPU and second of guest time; 0 without guest time."""
    return touches / vcpus / (guest_ns / 1e9) if guest_ns else 0.0


def error_row(planned: PlannedPoint, kind: str, message: str) -> dict[str, Any]:
    """A row of table `errors`."""
    return {"point_id": planned.point_id, "parameters": planned.point.model_dump_json(), "kind": kind, "message": message[:2000]}
