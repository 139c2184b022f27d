"""One point: the only place that calls the kernels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kernels.cost import DEFAULT_COSTS, Cost
from kernels.simulate import Run, StepResult, latency_of, simulate
from kernels.steps import Khugepaged, Ksm, Step, Touch
from sweep.configs import CostFile, Workload
from sweep.parameters import Point
from sweep.plan import PlannedPoint
from sweep.steps import build_step
from sweep.study import Study


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


@dataclass(frozen=True)
class PointRows:
    """The rows of one point: one of `points` and its `steps`, or one of `errors`."""

    point: dict[str, Any] | None
    steps: list[dict[str, Any]]
    error: dict[str, Any] | None


def simulate_point(planned: PlannedPoint, context: Context, trace_rows: int = 0) -> Run:
    """Run one point. Raises what `kernels.simulate()` raises, and StudyError for a touch list that cannot be read."""
    point, workload = planned.point, context.workloads[planned.point.workload]
    steps = [build_step(spec, workload.folder) for spec in workload.specs]
    return simulate_steps(point, steps, context.costs[point.costs].values, planned.seed, planned.replicate, trace_rows)


def simulate_steps(
    point: Point, steps: Sequence[Step], costs: Mapping[Cost, int] = DEFAULT_COSTS, seed: int = 0, replicate: int = 0, trace_rows: int = 0
) -> Run:
    """Run a point's parameters with these steps, whatever workload it names. Raises what `kernels.simulate()` raises."""
    return simulate(
        steps=steps,
        kernel=point.kernel,
        policy=point.policy,
        mmu=point.mmu,
        backing=point.backing,
        memory=point.memory,
        vcpus=point.vcpus,
        thp_enabled=point.thp_enabled,
        use_zero_page=point.use_zero_page,
        thp_failure=point.thp_failure,
        offset=point.offset,
        guest_page=point.guest_page,
        nx_huge_pages=point.nx_huge_pages,
        eager_page_split=point.eager_page_split,
        pml=point.pml,
        khugepaged=Khugepaged(**point.khugepaged) if point.khugepaged else None,
        ksm=Ksm(**point.ksm) if point.ksm else None,
        prealloc=point.prealloc,
        prealloc_threads=point.prealloc_threads,
        cores=point.cores,
        smt=point.smt,
        costs=costs,
        seed=seed,
        replicate=replicate,
        trace_rows=trace_rows,
    )


def compile_kernels() -> None:
    """Make the kernels compile, or load from the cache."""
    simulate(steps=[Touch()], memory=1 << 21)


def _identity(planned: PlannedPoint, context: Context) -> dict[str, Any]:
    return {"point_id": planned.point_id, "study": context.study, "replicate": planned.replicate, "seed": planned.seed}


def point_row(planned: PlannedPoint, context: Context, run: Run) -> dict[str, Any]:
    """The row of table `points`."""
    seconds = run.guest_ns / 1e9
    rate = run.counters["touches"] / planned.point.vcpus / seconds if run.guest_ns else 0.0
    return {
        **_identity(planned, context),
        **planned.point.columns(),
        "costs_digest": context.cost_digests[planned.point.costs],
        **run.counters,
        **run.gauges,
        "guest_ns": run.guest_ns,
        "total_ns": run.total_ns,
        "pages_per_s_per_vcpu": rate,
        **run.latency,
    }


def step_row(planned: PlannedPoint, context: Context, number: int, step: StepResult) -> dict[str, Any]:
    """A row of table `steps`."""
    return {
        **_identity(planned, context),
        "step": number,
        "op": step.op,
        **step.counters,
        **step.gauges,
        "step_ns": step.ns,
        **latency_of(step.hist, step.fault_max_ns),
    }


def run_point(planned: PlannedPoint, context: Context) -> PointRows:
    """Run one point; what it raises becomes a row of `errors`, so that the sweep goes on."""
    try:
        run = simulate_point(planned, context)
    except Exception as error:  # whatever it is, it is this point's; the sweep goes on
        return PointRows(None, [], error_row(planned, type(error).__name__, str(error)))
    steps = [step_row(planned, context, number, step) for number, step in enumerate(run.steps)]
    return PointRows(point_row(planned, context, run), steps, None)


def error_row(planned: PlannedPoint, kind: str, message: str) -> dict[str, Any]:
    """A row of table `errors`."""
    return {"point_id": planned.point_id, "parameters": planned.point.model_dump_json(), "kind": kind, "message": message[:2000]}
