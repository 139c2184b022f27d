"""Fitting costs to observed figures: least squares in the logarithms of both, inside bounds, with a weak pull to the start.

The model knows no time but its costs, so all of them may be counted in ticks of 1/64 ns: its figures change smoothly enough
for finite differences, although each run is made of whole numbers. What is handed back is whole ns again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import qmc

from kernels.cost import Cost
from kernels.spec import PMD_BYTES
from sweep.configs import CostFile, Workload, load_workload
from sweep.errors import StudyError
from sweep.observations import METRICS, Observation
from sweep.plan import PlannedPoint
from sweep.point import Context, simulate_point, touch_rate

Floats = NDArray[np.float64]
TICKS = 64  # of a ns
UNSCALED = frozenset({Cost.SMT_NS})  # a ratio in thousandths, no time
TOLERANCE = 0.02  # what a published figure is taken to be exact to; a row off by so much weighs as a cost at the end of its range
CONVERGED = 0.002  # fewer pages may change a figure by so much
EFFECT = 0.001  # a cost that moves no figure by more, anywhere in its range, has no effect
STEP = 0.03  # of finite differences
FINE = 100  # ns: smaller costs are rounded first, and the others fitted to that
PARALLEL = 1e-3  # costs whose effects per ns differ by less in direction are seen as one sum only
DETERMINED = 1 / 3  # of a cost's range left: the data determines it
SHRINKS = (64, 16, 4)
MAX_ROUNDS = 4
MAX_EVALUATIONS = 40
SAMPLES = 7  # 2 ** 7 points all over the ranges are tried, and the best
STARTS = 2  # of them are fitted from, beside the costs as they are
MAIN_TERM = 0.1  # of a combination's largest weight: smaller ones are not named


class Bounds(NamedTuple):
    """Whole ns that a cost may have in the fit."""

    low: int
    high: int


class Rates:
    """The model's figures for some observations under any costs: with few pages where that changes nothing, or with all."""

    def __init__(self, observations: Sequence[Observation], base: CostFile) -> None:
        self.observations, self._base = tuple(observations), base
        self._workloads: dict[str, Workload] = {}
        for name in {o.point.workload for o in observations}:
            workload, faults = load_workload(name)
            if workload is None or faults:
                raise StudyError(faults)
            self._workloads[name] = workload
        self.memory = [o.point.memory for o in self.observations]
        self._seen: dict[tuple[int, ...], Floats] = {}

    def use_few_pages(self, costs: Mapping[Cost, float]) -> None:
        """Shrink each point as far as its figure stays the same within CONVERGED under these costs."""
        self.memory = [self._shrunk(row, costs) for row in range(len(self.observations))]
        self._seen.clear()

    def use_all_pages(self) -> None:
        self.memory = [o.point.memory for o in self.observations]
        self._seen.clear()

    def _shrunk(self, row: int, costs: Mapping[Cost, float]) -> int:
        point = self.observations[row].point
        whole = self._figure(row, point.memory, costs)
        for shrink in SHRINKS:
            memory, rest = divmod(point.memory, shrink)
            actors = max(point.vcpus, point.prealloc_threads)
            if not rest and memory % (PMD_BYTES * actors) == 0 and abs(math.log(self._figure(row, memory, costs) / whole)) < CONVERGED:
                return memory
        return point.memory

    def _figure(self, row: int, memory: int, costs: Mapping[Cost, float]) -> float:
        """The model's figure of a row, for its whole memory."""
        observation = self.observations[row]
        metric = METRICS[observation.metric]
        point = observation.point
        planned = PlannedPoint("", {**point.model_dump(), "memory": memory}, 0, 0)
        values = {c: max(0, round(ns if c in UNSCALED else ns * TICKS)) for c, ns in costs.items()}
        run = simulate_point(planned, Context("", self._workloads, {point.costs: replace(self._base, values=values)}))
        rate = touch_rate(run.counters["touches"], point.vcpus, run.guest_ns)
        figure = observation.of({"total_ns": run.total_ns, "pages_per_s_per_vcpu": rate})
        pages = point.memory / memory if metric.extensive else 1.0
        return figure * pages / float(TICKS) ** metric.per_time

    def logs(self, costs: Mapping[Cost, float]) -> Floats:
        """ln of each row's figure, with few pages; shape (rows,)."""
        key = tuple(round(costs[c] * TICKS) for c in Cost)
        if key not in self._seen:
            self._seen[key] = np.log([self._figure(row, memory, costs) for row, memory in enumerate(self.memory)])
        return self._seen[key]

    def whole(self, costs: Mapping[Cost, float]) -> Floats:
        """Each row's figure with all its pages; shape (rows,)."""
        return np.array([self._figure(row, o.point.memory, costs) for row, o in enumerate(self.observations)])

    def observed(self) -> Floats:
        return np.array([o.value for o in self.observations])


@dataclass(frozen=True)
class Sum:
    """Costs that the data sees only as one weighted sum (a single cost is a sum of one)."""

    costs: tuple[Cost, ...]
    weights: tuple[float, ...]  # how often each counts in it; 1 for the least
    ns: float  # the sum
    error: float  # relative, one standard deviation
    determined: bool


@dataclass(frozen=True)
class Fit:
    """Fitted costs, and what the data says about them."""

    values: dict[Cost, int]
    bounds: dict[Cost, Bounds]
    free: tuple[Cost, ...]  # those that have an effect on some row
    sums: tuple[Sum, ...]  # of the free ones
    combinations: tuple[tuple[tuple[Cost, float], ...], ...]  # what the data determines: products of costs to these powers
    before: Floats
    after: Floats  # under the rounded costs, all pages
    pages: tuple[float, ...] = field(default=())  # share of each row's pages that the fit ran

    def at_bound(self, cost: Cost) -> bool:
        return cost in self.bounds and self.values[cost] in self.bounds[cost]

    def sum_of(self, cost: Cost) -> Sum | None:
        return next((s for s in self.sums if cost in s.costs), None)


def fit(rates: Rates, base: CostFile, bounds: Mapping[Cost, Bounds]) -> Fit:
    """Fit the costs that have bounds to the observations; the others stay."""
    start: dict[Cost, float] = {c: float(v) for c, v in base.values.items()}
    bounds = {c: b for c, b in bounds.items() if max(1, b.low) < b.high}
    before = rates.whole(start)
    found, free, fitted = start, list[Cost](), before
    for number in range(MAX_ROUNDS):  # until no other cost has an effect, and fewer pages tell the same
        rates.use_few_pages(found)
        more = [c for c in _effective(rates, found, bounds) if c not in free]
        if number and not more and np.abs(rates.logs(found) - fitted).max() < CONVERGED:
            break
        free = [c for c in Cost if c in free or c in more]
        found = _solve(rates, start, free, bounds, found if number else None)
        fitted = rates.logs(found)
    rounded = _rounded(rates, start, found, free, bounds)
    jacobian = _jacobian(rates, rounded, free, bounds)
    return Fit(
        values={c: round(v) for c, v in rounded.items()},
        bounds=dict(bounds),
        free=tuple(free),
        sums=_sums(jacobian, rounded, free, bounds),
        combinations=_combinations(jacobian, free, bounds),
        before=before,
        after=rates.whole(rounded),
        pages=tuple(few / o.point.memory for few, o in zip(rates.memory, rates.observations, strict=True)),
    )


def _effective(rates: Rates, costs: dict[Cost, float], bounds: Mapping[Cost, Bounds]) -> list[Cost]:
    """Costs that move some figure, anywhere in their range, the others as they are."""
    here = rates.logs(costs)
    found = []
    for cost, (low, high) in bounds.items():
        moved = [rates.logs({**costs, cost: float(end)}) for end in (low, high)]
        if max(float(np.abs(logs - here).max()) for logs in moved) > EFFECT:
            found.append(cost)
    return found


def _inside(value: float, bound: Bounds) -> float:
    return min(max(value, bound.low, 1.0), float(bound.high))


def _spread(bound: Bounds) -> float:
    """Half the width of a range, in logarithms."""
    return math.log(bound.high / max(1, bound.low)) / 2


def _solve(
    rates: Rates, start: dict[Cost, float], free: Sequence[Cost], bounds: Mapping[Cost, Bounds], near: dict[Cost, float] | None = None
) -> dict[Cost, float]:
    """The costs in `free` that fit best, pulled to `start`; from `near` on, or, without, from anywhere in the ranges."""
    if not free:
        return start
    spread = np.array([_spread(bounds[c]) for c in free])
    pull = np.log([_inside(start[c], bounds[c]) for c in free])
    low, high = (np.log([max(1, bounds[c][end]) for c in free]) for end in (0, 1))
    observed = np.log(rates.observed())

    def costs_of(x: Floats) -> dict[Cost, float]:
        return start | {c: math.exp(v) for c, v in zip(free, x, strict=True)}

    def residuals(x: Floats) -> Floats:
        return np.concatenate([(rates.logs(costs_of(x)) - observed) / TOLERANCE, (x - pull) / spread])

    def jacobian(x: Floats) -> Floats:
        return np.vstack([_jacobian(rates, costs_of(x), free, bounds) / TOLERANCE, np.diag(1 / spread)])

    if near is None:
        anywhere = low + qmc.Sobol(len(free), scramble=False).random_base2(SAMPLES) * (high - low)
        starts = [pull, *sorted(anywhere, key=lambda x: float(np.square(residuals(x)).sum()))[:STARTS]]
    else:
        starts = [np.log([_inside(near[c], bounds[c]) for c in free])]
    ends = [
        least_squares(residuals, x, jac=jacobian, bounds=(low, high), x_scale=spread, max_nfev=MAX_EVALUATIONS, ftol=1e-5, xtol=1e-5)
        for x in starts
    ]
    return costs_of(min(ends, key=lambda end: float(end.cost)).x)


def _jacobian(rates: Rates, costs: dict[Cost, float], free: Sequence[Cost], bounds: Mapping[Cost, Bounds]) -> Floats:
    """d ln figure / d ln cost at these costs; shape (rows, costs)."""
    here = rates.logs(costs)
    columns = []
    for cost in free:
        now = costs[cost]
        there = now * (1 + STEP) if now * (1 + STEP) <= bounds[cost].high else now / (1 + STEP)
        columns.append((rates.logs({**costs, cost: there}) - here) / math.log(there / now))
    return np.array(columns).T.reshape(len(here), len(free))


def _rounded(
    rates: Rates, start: dict[Cost, float], found: dict[Cost, float], free: Sequence[Cost], bounds: Mapping[Cost, Bounds]
) -> dict[Cost, float]:
    """Whole ns: small costs, which a rounding moves most, first; the others are fitted to that."""
    small = [c for c in free if found[c] < FINE]
    fixed = {**start, **{c: float(round(found[c])) for c in small}}
    found = _solve(rates, fixed, [c for c in free if c not in small], bounds, found)
    return {c: float(round(v)) for c, v in found.items()}


def _scaled(jacobian: Floats, free: Sequence[Cost], bounds: Mapping[Cost, Bounds]) -> tuple[Floats, Floats]:
    """(the Jacobian in units of what a figure is exact to and of each cost's range, those ranges)."""
    spread = np.array([_spread(bounds[c]) for c in free])
    return jacobian * spread / TOLERANCE, spread


def _sums(jacobian: Floats, costs: dict[Cost, float], free: Sequence[Cost], bounds: Mapping[Cost, Bounds]) -> tuple[Sum, ...]:
    """Which costs, or sums of them, the data determines."""
    scaled, spread = _scaled(jacobian, free, bounds)
    covariance = np.linalg.inv(scaled.T @ scaled + np.eye(len(free)))
    now = np.array([costs[c] for c in free])
    slopes = jacobian / now
    sums = []
    for members in _parallel(slopes):
        norms = np.linalg.norm(slopes[:, members], axis=0)
        weights = norms / norms.min() if norms.all() else np.ones(len(members))
        total = float(weights @ now[members])
        direction = np.zeros(len(free))
        direction[members] = weights * now[members] / total * spread[members]
        error = math.sqrt(float(direction @ covariance @ direction))
        known = error < DETERMINED * float(np.linalg.norm(direction))
        sums.append(Sum(tuple(free[i] for i in members), tuple(map(float, weights)), total, error, known))
    return tuple(sums)


def _combinations(jacobian: Floats, free: Sequence[Cost], bounds: Mapping[Cost, Bounds]) -> tuple[tuple[tuple[Cost, float], ...], ...]:
    """Directions of the costs' logarithms that the data determines, the strongest first; each as its main terms."""
    scaled, spread = _scaled(jacobian, free, bounds)
    _, singular, directions = np.linalg.svd(scaled, full_matrices=False)
    found = []
    for strength, direction in zip(singular, directions, strict=True):
        if strength * DETERMINED > 1:
            powers = direction / spread
            largest = float(powers[np.abs(powers).argmax()])
            terms = [(c, float(p) / largest) for c, p in zip(free, powers, strict=True) if abs(p / largest) >= MAIN_TERM]
            found.append(tuple(sorted(terms, key=lambda term: -abs(term[1]))))
    return tuple(found)


def _parallel(slopes: Floats) -> list[list[int]]:
    """Columns that point the same way, together; the largest first."""
    groups: list[list[int]] = []
    units = slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-300)
    for i in np.argsort(-np.linalg.norm(slopes, axis=0)):
        for group in groups:
            if slopes[:, i].any() and np.linalg.norm(units[:, i] - units[:, group[0]]) < PARALLEL:
                group.append(int(i))
                break
        else:
            groups.append([int(i)])
    return [sorted(group) for group in groups]
