"""Which setting wins where: settings compared inside each scenario, those that give the same taken together, the answer in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd

from sweep.quantity import human_size, human_time
from sweep.report.facts import TIME, Facts

MATTERS = 0.01  # settings whose times differ by less are taken to be as good as one another
ALIKE = (TIME, "guest_ns", "held_bytes", "exits")  # settings that agree in these wherever they meet are shown as one
MAX_CELLS = 4_000_000  # settings x scenarios that are looked at for that
MAX_DETAILS = 100_000  # rows
MAX_NAMED = 3


@dataclass(frozen=True, eq=False)
class Standings:
    """`rows`: configurations of `Facts.plain` in scenarios with two settings or more, one of those that give the same, with `ratio` to
    the scenario's least TIME. `table`: one row per setting (index), best first: scenarios, wins, ratio (geometric mean).
    `same`: setting -> the one that stands for it. `reference`: the scenario that is looked at closely."""

    rows: pd.DataFrame
    table: pd.DataFrame
    same: Mapping[int, int]
    reference: int

    @property
    def compares(self) -> bool:
        return len(self.table) > 1

    def at_reference(self) -> pd.DataFrame:
        """Rows of the reference scenario, fastest first."""
        return self.rows[self.rows["scenario"] == self.reference].sort_values([TIME, "setting"])

    def rivals(self) -> tuple[int, int] | None:
        """The fastest setting of the reference scenario, and the next one that is slower by as much as matters (or, if none is, at
        all); None where nothing is slower."""
        ranked = self.at_reference()
        slower = ranked[ranked["ratio"] > 1]
        if slower.empty:
            return None
        clearly = slower[slower["ratio"] > 1 + MATTERS]
        return int(ranked["setting"].iloc[0]), int((slower if clearly.empty else clearly)["setting"].iloc[0])


def standings(facts: Facts) -> Standings:
    """Compare the settings of a dataset."""
    same = same_settings(facts.plain, facts.settings.values)
    rows = facts.plain[facts.plain[TIME] > 0]
    rows = rows[rows["setting"].map(same) == rows["setting"]]
    rows = rows[rows.groupby("scenario")["setting"].transform("size") > 1]
    rows = rows.assign(ratio=rows[TIME] / rows.groupby("scenario")[TIME].transform("min"))
    by_setting = rows.assign(log=np.log(rows["ratio"]), win=rows["ratio"] == 1).groupby("setting")
    table = pd.DataFrame({"scenarios": by_setting.size(), "wins": by_setting["win"].sum(), "ratio": np.exp(by_setting["log"].mean())})
    table = table.sort_values(["wins", "ratio"], ascending=[False, True], kind="stable")
    return Standings(rows, table, same, _reference(facts, rows, table))


def same_settings(plain: pd.DataFrame, values: pd.DataFrame) -> dict[int, int]:
    """Each setting -> the one that has all its scenarios and the same figures in each, of several the one with the most parameters in
    common; itself if there is none. `values`: the parameters of each setting."""
    settings, scenarios = len(values), int(plain["scenario"].max()) + 1
    same = {number: number for number in range(settings)}
    if settings * scenarios * len(ALIKE) > MAX_CELLS:
        return same
    figures = np.full((settings, scenarios, len(ALIKE)), np.nan)
    figures[plain["setting"], plain["scenario"]] = plain[list(ALIKE)].to_numpy()
    there = ~np.isnan(figures).any(axis=2)
    parameters = values.to_numpy()
    leaders: list[int] = []
    for number in sorted(range(settings), key=lambda number: (-int(there[number].sum()), number)):
        mine = there[number]
        alike = [lead for lead in leaders if there[lead][mine].all() and np.array_equal(figures[lead][mine], figures[number][mine])]
        same[number] = max(alike, key=lambda lead: int((parameters[lead] == parameters[number]).sum()), default=number)
        if not alike:
            leaders.append(number)
    return same


def _reference(facts: Facts, rows: pd.DataFrame, table: pd.DataFrame) -> int:
    """Of the scenarios that the best setting wins, if possible over a clearly slower one: the one with the most moved costs, then the most
    settings, then the first."""
    if rows.empty:
        return int(facts.plain["scenario"].iloc[0])
    won = rows[(rows["setting"] == table.index[0]) & (rows["ratio"] == 1)]["scenario"]
    moved = facts.frame[facts.frame["moved"] != ""].groupby("scenario").size()
    by_scenario = rows.groupby("scenario")["ratio"]
    merits = pd.DataFrame({"beats": by_scenario.max() > 1 + MATTERS, "moved": moved, "settings": by_scenario.size()}).reindex(won).fillna(0)
    return int(merits.sort_values(["beats", "moved", "settings"], ascending=False, kind="stable").index[0])


def details(database: duckdb.DuckDBPyConnection, facts: Facts, scenario: int) -> pd.DataFrame:
    """Every replicate of a scenario: costs, setting, replicate, TIME. Columns `base`, `moved`, `setting` as in Facts.frame."""
    rows = facts.frame[facts.frame["scenario"] == scenario]
    keys = [name for name in facts.varying if name in rows]
    wanted = rows[keys].astype(dict.fromkeys(keys, object)).assign(number=range(len(rows)))
    database.register("wanted", wanted)
    on = " and ".join(f"points.{name} = wanted.{name}" for name in keys) or "true"
    query = f"select number, replicate, {TIME} from points join wanted on {on} order by number, replicate limit {MAX_DETAILS}"  # noqa: S608
    found: pd.DataFrame = database.sql(query).df()
    return found.join(rows[["setting", "base", "moved"]].reset_index(drop=True), on="number")


@dataclass(frozen=True)
class Difference:
    """How much less time one setting takes than another, as a part of the other's: mean, and ranges (least, greatest) over replicates
    (of the same number: they touch the same pages) and over costs moved one by one; None where there is one replicate or no moved cost."""

    mean: float
    over_replicates: tuple[float, float] | None
    over_costs: tuple[float, float] | None

    def text(self) -> str:
        ranges = [("replicates", self.over_replicates), ("each cost over its range", self.over_costs)]
        told = "; ".join(f"{name} {spread[0]:.2%} ... {spread[1]:.2%}" for name, spread in ranges if spread)
        return f"{self.mean:.2%}" + (f" ({told})" if told else "")


def difference(rows: pd.DataFrame, best: int, other: int) -> Difference:
    """From details()."""
    times = rows[rows["setting"].isin((best, other))].pivot_table(index=["moved", "replicate"], columns="setting", values=TIME, sort=True)
    less = (1 - times[best] / times[other]).dropna()
    plain = less[less.index.get_level_values("moved") == ""]
    moved = less.groupby(level="moved").mean()
    return Difference(
        float(plain.mean()),
        (float(plain.min()), float(plain.max())) if len(plain) > 1 else None,
        (float(moved.min()), float(moved.max())) if len(moved) > 1 else None,
    )


def answer(facts: Facts, found: Standings, rows: pd.DataFrame) -> str:
    """The answer in a sentence or three, from the dataset alone. `rows`: details() of the reference scenario."""
    rivals = found.rivals()
    if not found.compares:
        return _one_setting(facts)
    label = facts.settings.label
    best, scenarios = int(found.table.index[0]), found.rows["scenario"].nunique()
    parts = [f"{label(best)} takes the least time in {found.table['wins'].iloc[0]:,} of the {scenarios:,} scenarios with a choice."]
    if rivals is not None:
        first, other = (found.at_reference().set_index("setting").loc[number].to_dict() for number in rivals)
        part = difference(rows, *rivals)
        held, instead = human_size(first["held_bytes"]), human_size(other["held_bytes"])
        holds = f", and holds {held} instead of {instead}" if held != instead else ""
        parts.append(
            f"In {facts.scenarios.label(found.reference)} it takes {_time(first[TIME])}, {part.text()} less than {label(rivals[1])}{holds}."
        )
    ranked = found.at_reference()
    alike = [label(number) for number in ranked[ranked["ratio"] <= 1 + MATTERS]["setting"] if number not in (best, *(rivals or ()))]
    if alike:
        parts.append(f"As good there, within {MATTERS:.0%}: {named(alike)}.")
    wins = found.table["wins"].iloc[1:]
    rest = [f"{label(int(number))} in {count:,}" for number, count in zip(wins.index, wins, strict=True) if count]
    if rest:
        parts.append(f"Least time elsewhere: {named(rest)}.")
    return " ".join(parts)


def named(texts: list[str]) -> str:
    """A list that stays short."""
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return "; ".join(texts[:MAX_NAMED]) + more


def _time(ns: float) -> str:
    return human_time(ns / 1e9)


def _one_setting(facts: Facts) -> str:
    """Nothing to choose: the range of times."""
    rows = facts.plain.sort_values([TIME, "id"], kind="stable")
    by, combinations = ("scenario", facts.scenarios) if len(facts.scenarios) > 1 else ("setting", facts.settings)
    least, most = rows.iloc[0], rows.iloc[-1]
    if len(rows) == 1:
        return f"{_time(least[TIME])}, {least['exits']:,.0f} exits, {human_size(least['held_bytes'])} held."
    ends = (f"{_time(row[TIME])} ({combinations.label(int(row[by]))})" for row in (least, most))
    return f"From {' to '.join(ends)}."
