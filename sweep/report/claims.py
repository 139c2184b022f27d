"""Claims and their verdicts: a rule over the dataset, checked in every replicate and over the range of every cost.

A claim is measured in "worlds": one replicate under one set of costs. What differs between replicates at default costs
is its spread; a world of moved costs in which the rule gives another answer is a flip, and the verdict says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import pandas as pd

DEFAULT_COSTS = "default"


class Verdict(StrEnum):
    HOLDS = "holds"
    FAILS = "does not hold"
    DEPENDS = "holds only if"


@dataclass(frozen=True)
class World:
    """The rows of one replicate under one set of costs: points and their steps, with the point's parameters in both."""

    costs: str
    replicate: int
    points: pd.DataFrame
    steps: pd.DataFrame


@dataclass(frozen=True)
class Claim:
    """Somebody's statement, who made it where, how it is measured and when it counts as true.

    `measure` gives a number for a world, or None where the world lacks the rows. `condition` is the part of "holds only
    if" that the rows themselves show; None where the claim has none."""

    text: str
    who: str
    message: str
    rows: str
    unit: str
    measure: Callable[[World], float | None]
    holds: Callable[[float], bool]
    figure: Callable[[World], str]
    condition: Callable[[World], str] | None = None


@dataclass(frozen=True)
class Judged:
    """A claim's verdict with its figures."""

    claim: Claim
    verdict: Verdict
    text: str
    figure: str
    value: float
    spread: tuple[float, float]
    cost_spread: tuple[float, float]
    flips: tuple[str, ...]


def worlds_of(points: pd.DataFrame, steps: pd.DataFrame) -> list[World]:
    """Every (costs, replicate) of a dataset; default costs first."""
    extra = [name for name in points.columns if name not in steps.columns]
    joined = steps.merge(points[["point_id", *extra]], on="point_id", validate="many_to_one")
    names = sorted(points["costs"].unique(), key=lambda name: (name != DEFAULT_COSTS, name))
    by_steps = dict(iter(joined.groupby(["costs", "replicate"])))
    by_points = dict(iter(points.groupby(["costs", "replicate"])))
    return [
        World(str(costs), int(replicate), by_points[(costs, replicate)], by_steps[(costs, replicate)])
        for costs in names
        for replicate in sorted(points["replicate"].unique())
        if (costs, replicate) in by_points
    ]


def judge(claim: Claim, worlds: Sequence[World]) -> Judged | None:
    """Verdict of a claim; None where the dataset has no rows for it at default costs."""
    measured = [(world, value) for world in worlds if (value := claim.measure(world)) is not None]
    default = [(world, value) for world, value in measured if world.costs == DEFAULT_COSTS]
    if not default:
        return None
    answers = [claim.holds(value) for _, value in default]
    flips = _flips(claim, measured, all(answers))
    values, all_values = [value for _, value in default], [value for _, value in measured]
    condition = claim.condition(default[0][0]) if claim.condition and all(answers) else ""
    verdict, text = _verdict(answers, flips, condition)
    return Judged(
        claim=claim,
        verdict=verdict,
        text=text,
        figure=claim.figure(default[0][0]),
        value=sum(values) / len(values),
        spread=(min(values), max(values)),
        cost_spread=(min(all_values), max(all_values)),
        flips=flips,
    )


def _flips(claim: Claim, measured: Sequence[tuple[World, float]], answer: bool) -> tuple[str, ...]:
    """Costs under which some replicate gives another answer than the default costs do."""
    found: Mapping[str, None] = dict.fromkeys(
        world.costs.removeprefix(f"{DEFAULT_COSTS}@")
        for world, value in measured
        if world.costs != DEFAULT_COSTS and claim.holds(value) != answer
    )
    return tuple(found)


def _verdict(answers: Sequence[bool], flips: Sequence[str], condition: str) -> tuple[Verdict, str]:
    if any(answers) and not all(answers):
        return Verdict.DEPENDS, f"{Verdict.DEPENDS} the replicate is a lucky one: {sum(answers)} of {len(answers)}"
    if not answers[0]:
        flip = f"; flips at {', '.join(flips)}" if flips else ""
        return Verdict.FAILS, f"{Verdict.FAILS}{flip}"
    conditions = [condition] if condition else []
    conditions += [f"not {flip} (flips inside the range of that cost)" for flip in flips]
    if conditions:
        return Verdict.DEPENDS, f"{Verdict.DEPENDS} {' and '.join(conditions)}"
    return Verdict.HOLDS, str(Verdict.HOLDS)
