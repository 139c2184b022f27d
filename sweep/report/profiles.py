"""What a setting does inside one scenario: fault latencies, where the time goes, memory held beside speed."""

import pandas as pd

from sweep.report.facts import PARTS, QUANTILES, TIME, Facts
from sweep.report.moves import HIGHLIGHTED
from sweep.report.standings import Standings

SCENARIOS, SETTINGS, ROWS = 24, 24, 1200  # at most so many of each in a chart
REST = "all other work of faults"


def scenes(facts: Facts, found: Standings, rows_each: int) -> pd.DataFrame:
    """Configurations of the scenarios that are looked at, fastest first in each, the reference first. Columns `panel`, `label`, `rank`
    (0 ... of the fastest, -1 beyond HIGHLIGHTED), `place` are added. `rows_each`: rows that a configuration will become."""
    rows = facts.plain[facts.plain["setting"].map(found.same) == facts.plain["setting"]]
    sizes = rows.groupby("scenario").size().clip(upper=SETTINGS)
    largest = sizes.sort_values(ascending=False, kind="stable").index[: SCENARIOS + 1]
    ranked = [found.reference, *(scenario for scenario in largest if scenario != found.reference)][:SCENARIOS]
    room = ROWS // rows_each
    taken = sizes.reindex(ranked, fill_value=0).cumsum()
    places = {scenario: place for place, scenario in enumerate(ranked) if place == 0 or taken[scenario] <= room}
    rows = rows[rows["scenario"].isin(places)]
    rows = rows.assign(order=rows["scenario"].map(places)).sort_values(["order", TIME, "setting"], kind="stable")
    rows = rows.assign(place=rows.groupby("order").cumcount())
    rows = rows[rows["place"] < SETTINGS]
    rank = rows["place"].where(rows["place"] < HIGHLIGHTED, -1)
    return rows.assign(rank=rank, panel=facts.scenarios.labels(rows["scenario"]), label=facts.settings.labels(rows["setting"]))


def latencies(facts: Facts, found: Standings) -> pd.DataFrame:
    """panel, label, rank, quantile, y (us): one row per quantile; configurations without a fault are left out."""
    rows = scenes(facts, found, len(QUANTILES))
    rows = rows[rows["fault_max_ns"] > 0]
    parts = [
        rows[["panel", "label", "rank", "order", "place"]].assign(quantile=name, y=rows[column] / 1e3) for column, name in QUANTILES.items()
    ]
    return pd.concat(parts).sort_values(["order", "place"], kind="stable").drop(columns=["order", "place"])


def time_parts(facts: Facts, found: Standings) -> pd.DataFrame:
    """panel, label, part, rank (of the part), x (ms), share (%): the summed time of faults and of the VMM's work, by what it went to.
    What is left of `fault_ns` is REST; parts that are nothing anywhere are left out."""
    rows = scenes(facts, found, 6)
    parts = rows[list(PARTS)]
    in_faults = parts.drop(columns="core_wait_ns").sum(axis=1)
    whole = parts.assign(rest=(rows["fault_ns"] - in_faults).clip(lower=0)).rename(columns={"rest": "rest_ns"})
    names = {**PARTS, "rest_ns": REST}
    used = [column for column in names if whole[column].sum() > 0]
    total = whole.sum(axis=1)
    made = [
        rows[["panel", "label", "order", "place"]].assign(
            part=names[column], rank=rank, x=whole[column] / 1e6, share=100 * whole[column] / total
        )
        for rank, column in enumerate(used)
    ]
    if not made:
        return pd.DataFrame(columns=["panel", "label", "part", "rank", "x", "share"])
    found_rows = pd.concat(made).sort_values(["order", "place", "rank"], kind="stable").drop(columns=["order", "place"])
    return found_rows[found_rows["x"] > 0]


def memory_and_time(facts: Facts, found: Standings) -> pd.DataFrame:
    """panel, label, rank, x (MiB held), y (ms): rank 0 ... for settings that no other one beats in both, -1 for the rest."""
    rows = scenes(facts, found, 1)
    rows = rows[rows[TIME] > 0]
    least = rows.groupby("order")["held_bytes"].cummin()  # rows come in the order of time
    beaten = least.groupby(rows["order"]).shift().le(rows["held_bytes"])
    front = (~beaten).groupby(rows["order"]).cumsum() - 1
    rank = front.where(~beaten, -1).astype(int)
    return rows[["panel", "label"]].assign(rank=rank, x=rows["held_bytes"] / (1 << 20), y=rows[TIME] / 1e6)
