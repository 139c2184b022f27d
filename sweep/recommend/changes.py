"""What would change the choice: another memory budget, other conditions, the VMM's time, other costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from kernels.cost import Cost
from sweep.quantity import format_size, human_time
from sweep.recommend.ranking import GUEST, Ranking, ranking
from sweep.report.sensitivity import Duel, moved_alone, point_of, with_ranges
from sweep.study import Study

SECONDS = 20.0  # of one core, predicted, for the runs with other costs
RUNS = 12  # of each cost, with the search for its break-even


@dataclass(frozen=True, eq=False)
class OverCosts:
    """How much less time the best takes than the rival, as % of the rival's: with the costs as they are, and the range with each cost alone
    at the ends of its range. `flips`: cost, value, flips (ns). `note` says why there is nothing."""

    mean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    flips: Sequence[tuple[str, int, float]] = ()
    note: str = ""


@dataclass(frozen=True, eq=False)
class Changes:
    """`budgets`: (bytes from which on, setting, its guest time in ns), ascending. `others`: conditions under which another setting is to be
    chosen, and which; `same`: those under which it stays. `ready`: the choice if the VMM's own time counts as well."""

    budgets: Sequence[tuple[float, str, float]]
    others: Sequence[tuple[str, str]]
    same: Sequence[str]
    ready: str
    costs: OverCosts

    def lines(self, best: str) -> list[str]:
        """Sentences."""
        steps = {enough(size): f"{label} ({human_time(ns / 1e9)})" for size, label, ns in self.budgets}
        found = [f"memory: from {size} on {text}" for size, text in steps.items()] if len(steps) > 1 else []
        if self.ready != best:
            found.append(f"the VMM's time counted as well: {self.ready}")
        found += [f"{conditions}: {label}" for conditions, label in self.others]
        found += [
            f"cost {name} of {flips:,.0f} ns instead of {value:,}: the other one takes less" for name, value, flips in self.costs.flips
        ]
        return found


def enough(size: float) -> str:
    """A budget that holds `size` bytes, in whole MiB, or KiB of less than one."""
    unit = 1 << 20 if size > 1 << 20 else 1 << 10
    return format_size(math.ceil(size / unit) * unit)


def changes(found: Sequence[Ranking], study: Study) -> Changes:
    """Of rankings of which the first is the one that was asked for."""
    base, others = found[0], found[1:]
    chosen = [(other.conditions, _choice(base.best, other)) for other in others]
    whole = base.points.assign(**{GUEST: base.points["total_ns"]})
    return Changes(
        by_budget(base.points),
        [(conditions, label) for conditions, label in chosen if label != base.best],
        [conditions for conditions, label in chosen if label == base.best],
        _choice(base.best, ranking(base.conditions, whole)),
        over_costs(base, study),
    )


def _choice(best: str, there: Ranking) -> str:
    """The best one there; `best` if that is as good."""
    return best if best == there.best or best in there.as_good() else there.best


def by_budget(points: pd.DataFrame) -> list[tuple[float, str, float]]:
    """Which setting is to be chosen from which budget on; all points have the same conditions."""
    found: list[tuple[float, str, float]] = []
    for budget in sorted(points.groupby("setting")["needs"].max().unique()):
        there = ranking("", points.assign(fits=points["needs"] <= budget))
        if not found or there.best != found[-1][1]:
            found.append((float(budget), there.best, float(there.row(there.best)[GUEST])))
    return found


def over_costs(base: Ranking, study: Study) -> OverCosts:
    """The best against its rival, with each cost moved over its range."""
    rival = base.rival()
    if rival is None:
        return OverCosts(note="there is nothing else to choose")
    first, second = (point_of(base.row(label)) for label in (base.best, rival))
    costs = with_ranges(study, first.costs)
    if costs is None:
        return OverCosts(note=f"cost file {first.costs!r} has no ranges")
    duel = Duel((first, second), study, costs, GUEST)
    seconds = duel.seconds * (1 + RUNS * len(duel.ranges))
    if seconds > SECONDS:
        return OverCosts(note=f"costs were not moved: that takes some {human_time(seconds)}; a study with moved costs does it")
    effects = [moved_alone(duel, Cost(cost), search=True) for cost in duel.ranges]
    ends = [effect[end] for effect in effects for end in ("low", "high")]
    flips = [(effect["cost"], effect["value"], effect["flips"]) for effect in effects if effect["flips"] == effect["flips"]]  # no NaN
    mean = 100 * duel.at({})
    return OverCosts(mean, min([mean, *ends]), max([mean, *ends]), flips)
