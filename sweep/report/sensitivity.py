"""Break-even: how far the costs, which are guesses with ranges, move the difference between the two rival settings, and where it flips.

Morris' screening (Technometrics 33, 1991) by SALib over the ranges of all costs at once, the model run anew for each draw; then each cost
that matters alone, from one end of its range to the other, with bisection where the sign changes. Decided before anything runs: as many
trajectories as fit into SECONDS by the prediction of run time, which no clock enters. Where the model does not give what the dataset holds
for both, or the ranges are not known, or that would take too long, the study's own points with moved costs speak instead, and else nothing
does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from kernels.cost import Cost
from sweep.configs import COST_NAMES, CostFile, config_root, load_costs
from sweep.errors import FaultsweepError
from sweep.parameters import COLUMN_OF, DAEMONS, PARAMETERS, Point
from sweep.plan import PlannedPoint
from sweep.point import Context, simulate_point
from sweep.predict import predict_seconds
from sweep.report.facts import TIME, Facts
from sweep.report.standings import Standings, difference
from sweep.study import Study

SECONDS = 2.5  # of one core, predicted
TRAJECTORIES = (8, 4, 2)
LEVELS = 4  # of each cost in the screening
SHOWN = 12  # costs that are moved alone
SEARCHES = 6  # of those, whose break-even is searched
STEPS = 20  # of a bisection
Costs = Mapping[Cost, int]
Ranges = Mapping[Cost, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much less time (% of the rival's) the best setting takes, and what moves that.

    `effects`: one row per cost that matters, strongest first: cost, value, range_low, range_high (ns), low, high (% at the ends of its
    range, the others as they are), flips (ns where both take the same time; NaN: nowhere in its range), and of a screening mu_star, sigma
    (points of % over the whole range; NaN without one). `flipped`: part of the screening's draws in which the rival wins (None without
    one)."""

    best: str
    rival: str
    scenario: str
    mean: float
    effects: pd.DataFrame
    flipped: float | None
    note: str


def sensitivity(facts: Facts, found: Standings, rows: pd.DataFrame) -> Sensitivity | None:
    """Of the rivals in the reference scenario; None where there are none, or nothing is known of the costs. `rows`: details() of it."""
    rivals = found.rivals()
    if rivals is None:
        return None
    names = (facts.settings.label(rivals[0]), facts.settings.label(rivals[1]), facts.scenarios.label(found.reference))
    mean = 100 * difference(rows, *rivals).mean
    try:
        duel = duel_of(facts, found, rivals)
        if duel is not None and duel.agrees(rows, rivals):
            effects, flipped, note = screened(duel, facts.study.seed)
            return Sensitivity(*names, 100 * duel.at({}), effects, flipped, note)
    except (FaultsweepError, ValueError, LookupError, ArithmeticError, RuntimeError):  # a file that is gone, names that are not the study's
        pass
    effects = measured(facts, rows, rivals)
    note = "from the study's own points with moved costs"
    return Sensitivity(*names, mean, effects, None, note) if len(effects) else None


@dataclass(frozen=True)
class Duel:
    """Two points, the costs they are run with, and the time that is compared (a column)."""

    points: tuple[Point, Point]
    study: Study
    costs: CostFile
    time: str = TIME

    @property
    def seconds(self) -> float:
        """Predicted for one run of both."""
        return sum(predict_seconds(point, self.study.workloads[point.workload]) for point in self.points)

    @property
    def ranges(self) -> Ranges:
        return {cost: (low, high) for cost, (low, high) in self.costs.ranges.items() if low < high}

    def agrees(self, rows: pd.DataFrame, rivals: tuple[int, int]) -> bool:
        """The model gives what the dataset holds: it is the one that made it, as far as these points show."""
        plain = rows[(rows["moved"] == "") & (rows["replicate"] == 0)].set_index("setting")[TIME]
        return all(self._ns(point, self.costs.values) == plain.get(rival) for point, rival in zip(self.points, rivals, strict=True))

    def at(self, moved: Costs) -> float:
        """How much less time the first takes, as a part of the second's, with some costs moved. Raises what the model raises."""
        first, second = (self._ns(point, {**self.costs.values, **moved}) for point in self.points)
        return 1 - first / second

    def _ns(self, point: Point, costs: Costs) -> int:
        context = Context(self.study.name, dict(self.study.workloads), {point.costs: CostFile(point.costs, costs, {}, ())})
        result = simulate_point(PlannedPoint("", point.model_dump(), 0, self.study.seed), context)
        return int(getattr(result, self.time))


def duel_of(facts: Facts, found: Standings, rivals: tuple[int, int]) -> Duel | None:
    """The rivals as points that can be run again; None where the costs have no known ranges, or where that would take too long."""
    rows = found.at_reference().set_index("setting")
    points = tuple(point_of({str(name): value for name, value in rows.loc[number].items()}) for number in rivals)
    costs = with_ranges(facts.study, points[0].costs)
    if costs is None:
        return None
    duel = Duel((points[0], points[1]), facts.study, costs)
    return duel if duel.ranges and duel.seconds * _runs(duel, TRAJECTORIES[-1]) <= SECONDS else None


def _runs(duel: Duel, trajectories: int) -> int:
    return trajectories * (len(duel.ranges) + 1) + 2 * SHOWN + SEARCHES * STEPS


def point_of(row: Mapping[str, Any]) -> Point:
    """The point of a row of table `points`. Raises pydantic.ValidationError (a ValueError) for a row that is none."""
    values: dict[str, Any] = {}
    for name in PARAMETERS:
        value = row[COLUMN_OF.get(name, name)]
        value = value.item() if isinstance(value, np.generic) else value
        if name in DAEMONS:
            value = _daemon(value)
        values[name] = f"{value}B" if name in COLUMN_OF and value else value
    return Point(**values)


def _daemon(text: str) -> Any:
    """'a=1,b=0.5' as a table; 'false' as False."""
    if text == "false":
        return False
    pairs = (pair.split("=", 1) for pair in text.split(","))
    return {key: float(value) if "." in value else int(value) for key, value in pairs}


def with_ranges(study: Study, name: str) -> CostFile | None:
    """A cost file of the study with its ranges: its own, where it was read from its file; else those of the shared file of that name, if
    its values are still the same; else what the study's own moved costs (NAME@cost=low) say of them. None where nothing does."""
    file = study.costs[name]
    if any(low < high for low, high in file.ranges.values()):
        return file
    if not name.endswith(".toml"):
        try:
            shared = load_costs(name, config_root())
            return shared if shared.digest() == file.digest() else None
        except FaultsweepError:
            pass
    ranges: dict[Cost, tuple[int, int]] = {}
    for other, moved in study.costs.items():
        cost = COST_NAMES.get(other.removeprefix(f"{name}@").partition("=")[0]) if other.startswith(f"{name}@") else None
        if cost is not None:
            low, high = ranges.get(cost, (file.values[cost], file.values[cost]))
            ranges[cost] = (min(low, moved.values[cost]), max(high, moved.values[cost]))
    return CostFile(name, file.values, ranges, ()) if ranges else None


def screened(duel: Duel, seed: int) -> tuple[pd.DataFrame, float, str]:
    """(effects, flipped, note) of a screening and what follows it."""
    from SALib.analyze import morris as analysis  # 1 s, which other commands need not wait for
    from SALib.sample import morris as sampling

    costs = list(duel.ranges)
    problem = {"num_vars": len(costs), "names": [cost.name for cost in costs], "bounds": [list(duel.ranges[cost]) for cost in costs]}
    count = next(n for n in TRAJECTORIES if duel.seconds * _runs(duel, n) <= SECONDS)
    draws = sampling.sample(problem, count, num_levels=LEVELS, seed=seed)
    results = np.array([100 * duel.at(dict(zip(costs, np.rint(draw).astype(int).tolist(), strict=True))) for draw in draws])
    found = analysis.analyze(problem, draws, results, num_levels=LEVELS, seed=seed)
    strength = pd.DataFrame({"mu_star": np.asarray(found["mu_star"]), "sigma": np.asarray(found["sigma"])}, index=pd.Index(costs))
    strong = strength[strength["mu_star"] > 1e-9].sort_values("mu_star", ascending=False, kind="stable").head(SHOWN)
    rows = [moved_alone(duel, Cost(cost), place < SEARCHES) for place, cost in enumerate(strong.index)]
    effects = pd.DataFrame(rows, columns=_COLUMNS).assign(mu_star=strong["mu_star"].to_numpy(), sigma=strong["sigma"].to_numpy())
    note = (
        f"Morris' screening: {count} trajectories over the ranges of {len(costs)} costs, {2 * len(draws):,} runs of the model, replicate 0"
    )
    return effects, float((results < 0).mean()), note


_COLUMNS = ["cost", "value", "range_low", "range_high", "low", "high", "flips"]


def moved_alone(duel: Duel, cost: Cost, search: bool) -> dict[str, Any]:
    """A row of effects without the screening's columns."""
    low, high = duel.ranges[cost]
    value = duel.costs.values[cost]

    def percent(ns: int) -> float:
        return 100 * duel.at({cost: ns})

    ends = percent(low), percent(high)
    flips = break_even(percent, (low, ends[0]), (high, ends[1])) if search else float("nan")
    return dict(zip(_COLUMNS, (cost.name.lower(), value, low, high, *ends, flips), strict=True))


def break_even(percent: Callable[[int], float], low: tuple[int, float], high: tuple[int, float]) -> float:
    """Where `percent` changes its sign between two (ns, its value there), to a hundredth of the way; NaN if it does not."""
    if (low[1] < 0) == (high[1] < 0):
        return float("nan")
    (left, at_left), right = low, high[0]
    near = max(1, (right - left) // 100)
    for _ in range(STEPS):
        if right - left <= near:
            break
        middle = (left + right) // 2
        if (percent(middle) < 0) == (at_left < 0):
            left = middle
        else:
            right = middle
    return (left + right) / 2


def measured(facts: Facts, rows: pd.DataFrame, rivals: tuple[int, int]) -> pd.DataFrame:
    """Effects from points with moved costs; a break-even is interpolated."""
    base = str(rows[rows["moved"] == ""]["base"].iloc[0])
    values = facts.study.costs[base].values if base in facts.study.costs else {}
    times = rows[rows["setting"].isin(rivals)].pivot_table(index="moved", columns="setting", values=TIME).dropna()
    less = 100 * (1 - times[rivals[0]] / times[rivals[1]])
    found: dict[Cost, list[tuple[int, float]]] = {}
    for moved, percent in less.items():
        cost = COST_NAMES.get(str(moved).partition("=")[0])
        file = facts.study.costs.get(f"{base}@{moved}")
        if cost is not None and cost in values and file is not None:
            found.setdefault(cost, []).append((file.values[cost], float(percent)))
    table = []
    for cost, ends in found.items():
        value = values[cost]
        line = sorted({(value, float(less[""])), *ends})
        flips = [a[0] + (b[0] - a[0]) * a[1] / (a[1] - b[1]) for a, b in pairwise(line) if (a[1] < 0) != (b[1] < 0)]
        table.append((cost.name.lower(), value, line[0][0], line[-1][0], line[0][1], line[-1][1], flips[0] if flips else float("nan")))
    effects = pd.DataFrame(table, columns=_COLUMNS).assign(mu_star=float("nan"), sigma=float("nan"))
    strength = (effects["high"] - effects["low"]).abs()
    return effects.loc[strength[strength > 1e-9].sort_values(ascending=False, kind="stable").index].head(SHOWN).reset_index(drop=True)
