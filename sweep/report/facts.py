"""What a report is made of: one pass over a dataset, then one row per configuration, whatever its size.

A configuration is a point without its replicate. Sums and means are made by DuckDB over the files, of the columns that are needed, on one
thread: the same rows give the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import pandas as pd

from sweep.dataset.read import Dataset, connection
from sweep.errors import DatasetError
from sweep.record import study_of
from sweep.report.roles import CONDITIONS, PARAMETER_COLUMNS, chosen, given, rank, scenario_label, setting_label
from sweep.study import Study

TIME = "total_ns"  # what settings are compared by: preallocation is not free, so the VMM's steps count
PARTS: Mapping[str, str] = {  # of the summed time; they do not overlap (docs/model.md section 12)
    "clear_ns": "clearing memory",
    "flush_ns": "TLB shootdowns",
    "mmu_lock_wait_ns": "waiting for mmu_lock",
    "mmap_lock_wait_ns": "waiting for mmap_lock",
    "cache_line_wait_ns": "cache lines of the locks",
    "zone_lock_wait_ns": "waiting for zone->lock",
    "page_table_lock_wait_ns": "waiting for page-table locks",
    "bandwidth_wait_ns": "memory bandwidth",
    "core_wait_ns": "waiting for a CPU",
}
QUANTILES: Mapping[str, str] = {
    "fault_p50_ns": "50 %",
    "fault_p90_ns": "90 %",
    "fault_p99_ns": "99 %",
    "fault_p999_ns": "99.9 %",
    "fault_max_ns": "max",
}
COUNTS = ("exits", "pf_retry", "mmu_lock_write", "touches", "held_bytes")
MEASURED = (*COUNTS, "guest_ns", "total_ns", "fault_ns", "pages_per_s_per_vcpu", *PARTS, *QUANTILES)
MAX_QUESTION = 1000


@dataclass(frozen=True, eq=False)
class Combinations:
    """The combinations of some parameters that a study has, numbered in their order; `values`: one row each. Labels are made when asked
    for: there may be a million."""

    values: pd.DataFrame
    words: Callable[[Mapping[str, object]], str]

    def __len__(self) -> int:
        return len(self.values)

    def label(self, number: int) -> str:
        return self.words({str(name): value for name, value in self.values.iloc[number].items()})

    def labels(self, numbers: "pd.Series[int]") -> "pd.Series[str]":
        """The label of each number."""
        return numbers.map({number: self.label(number) for number in numbers.unique()})


@dataclass(frozen=True, eq=False)
class Facts:
    """A dataset as a report sees it. `frame`: one row per configuration, sorted by parameters.

    Columns of `frame`: the parameters; `id` (least point id), `replicates`; each measure of MEASURED (mean over replicates); `low`, `high`
    (least and greatest TIME of a replicate); `paired_low`, `paired_high` (the same of TIME over the least of the same scenario and
    replicate, as a part of their mean: replicates touch the same pages in every setting, so this spread is smaller); `base`, `moved`
    (costs, and which of them is moved: '' for none); `setting`, `scenario` (numbers of `settings` and `scenarios`)."""

    study: Study
    question: str
    points: int
    planned: int
    frame: pd.DataFrame
    varying: tuple[str, ...]
    settings: Combinations
    scenarios: Combinations
    failed: pd.DataFrame
    digests: Mapping[str, str]

    @property
    def title(self) -> str:
        return self.study.title or self.study.name

    @cached_property
    def plain(self) -> pd.DataFrame:
        """Configurations whose costs are not moved."""
        return self.frame[self.frame["moved"] == ""]

    @property
    def given(self) -> tuple[str, ...]:
        """The parameters that scenarios are made of."""
        return tuple(self.scenarios.values.columns)


def gather(dataset: Dataset) -> Facts:
    """Read what the report needs. Raises DatasetError for a dataset without points, or one that is damaged."""
    record = dataset.store.json("study.json")
    study = study_of(record, dataset.store.name)
    table = dataset.scanned("points", ["point_id", "replicate", *PARAMETER_COLUMNS, *MEASURED])
    with connection({"points": table}, threads=1) as database:
        frame = configurations(database)
    if frame.empty:
        raise no_points(dataset)
    seal = dataset.store.seal()
    digests = {"study": str(record["digest"]), "model_digest": str(record["model_digest"])}
    digests |= {"root_digest": seal.root_digest, "content_digest": seal.content_digest} if seal else {}
    return facts_of(frame, study, question_of(dataset), int(record["points"]), dataset.errors(), digests)


def no_points(dataset: Dataset) -> DatasetError:
    """Of a dataset that has none, and why."""
    name, failed = dataset.store.name, len(dataset.errors())
    if not failed:
        return DatasetError(f"{name}: holds no points yet; run the study first")
    why = f"faultsweep query {name} 'from errors' says why"
    return DatasetError(f"{name}: no point has a result, {failed:,} failed; {why}")


def facts_of(frame: pd.DataFrame, study: Study, question: str, planned: int, failed: pd.DataFrame, digests: Mapping[str, str]) -> Facts:
    """From the rows of configurations(). Settings and scenarios are numbered in the order of their parameters."""
    frame = frame.copy()
    frame["base"], frame["moved"] = split_costs(frame["costs"])
    varying = tuple(name for name in PARAMETER_COLUMNS if name in frame and frame[name].nunique() > 1)
    own = frame.assign(costs=frame["base"])
    roles = tuple(name for name in varying if name != "costs" or frame["base"].nunique() > 1)
    own = own.loc[order_of(own, [name for name in (*CONDITIONS, *PARAMETER_COLUMNS) if name in varying])]
    frame = frame.loc[own.index]
    frame["setting"], settings = numbered(own, chosen(roles), setting_label)
    frame["scenario"], scenarios = numbered(own, given(roles), scenario_label)
    points = int(frame["replicates"].sum())
    return Facts(study, question, points, planned, frame.reset_index(drop=True), varying, settings, scenarios, failed, digests)


def configurations(database: duckdb.DuckDBPyConnection) -> pd.DataFrame:
    """One row per configuration of table `points`, in the order of `id`; see Facts.frame."""
    there = set(database.table("points").columns)
    parameters = [name for name in PARAMETER_COLUMNS if name in there]
    keys = _varying(database, parameters)
    means = [f"avg({name})::double as {name}" for name in MEASURED if name in there]
    ranges = [f"min({TIME})::double as low", f"max({TIME})::double as high"]
    ratio = f"{TIME} / least"
    pairs = [f"{end}({ratio}) / avg({ratio}) as paired_{word}" for end, word in (("min", "low"), ("max", "high"))]
    fixed = [f"any_value({name}) as {name}" for name in parameters if name not in keys]
    columns = ", ".join([*keys, *fixed, "min(point_id) as id", "count(*) as replicates", *ranges, *pairs, *means])
    scenario = ", ".join([*given(keys), "replicate"])
    query = (
        f"with fastest as (select {scenario}, min(nullif({TIME}, 0)) as least from points group by all) "  # noqa: S608  our own names
        f"select {columns} from points join fastest using ({scenario}) group by all having count(*) > 0 order by id"
    )
    frame: pd.DataFrame = database.sql(query).to_arrow_table().to_pandas(strings_to_categorical=True)
    for name in MEASURED:
        if name not in there:  # a dataset of an older version
            frame[name] = 0.0
    return frame.assign(costs=frame["costs"].astype(str), id=frame["id"].astype(str))


def _varying(database: duckdb.DuckDBPyConnection, names: Sequence[str]) -> list[str]:
    """Columns with more than one value."""
    counts = database.sql(f"select {', '.join(f'count(distinct {name})' for name in names)} from points").fetchall()[0]  # noqa: S608
    return [name for name, count in zip(names, counts, strict=True) if count > 1]


def split_costs(costs: "pd.Series[str]") -> tuple["pd.Series[str]", "pd.Series[str]"]:
    """('default', 'vm_exit_ns=low') of 'default@vm_exit_ns=low' where `default` itself is there; else the whole name, and ''."""
    names = costs.unique()
    bases = {name for name in names if "@" not in name}
    parts = {name: tuple(name.split("@", 1)) if name.split("@", 1)[0] in bases and "@" in name else (name, "") for name in names}
    return costs.map({name: part[0] for name, part in parts.items()}), costs.map({name: part[1] for name, part in parts.items()})


def order_of(frame: pd.DataFrame, names: Sequence[str]) -> "pd.Index[Any]":
    """The frame's index in the order of these columns, kernels as versions; rows that agree in all stay as they are."""
    keys = pd.DataFrame({name: _places(frame[name]) for name in names}, index=frame.index)
    return keys.sort_values(list(names), kind="stable").index if names else frame.index


def _places(column: "pd.Series[Any]") -> "pd.Series[Any]":
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        return column
    places = {value: place for place, value in enumerate(sorted(column.unique(), key=lambda value: rank(str(column.name), value)))}
    return column.map(places).astype(int)


def numbered(
    frame: pd.DataFrame, names: Sequence[str], words: Callable[[Mapping[str, object]], str]
) -> tuple["pd.Series[int]", Combinations]:
    """The number of each row's combination of `names`, in order of appearance, and the combinations."""
    if not names:
        return pd.Series(0, index=frame.index), Combinations(pd.DataFrame(index=[0]), words)
    numbers = frame.groupby(list(names), sort=False, observed=True).ngroup()
    rows = frame.loc[~numbers.duplicated(), list(names)].reset_index(drop=True)
    return numbers, Combinations(rows.astype(dict.fromkeys(names, object)), words)


def question_of(dataset: Dataset) -> str:
    """The question at the head of study.toml ('# Question: ...?'), up to its last question mark; '' without one."""
    if not dataset.store.has("study.toml"):
        return ""
    head = dataset.store.storage.read("study.toml")[: 4 * MAX_QUESTION].decode("utf-8", "replace").splitlines()
    comment = []
    for line in head:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    text = " ".join(comment)
    asked, mark, _ = text.partition("Question:")[2].strip()[:MAX_QUESTION].rpartition("?")
    return f"{asked[:1].upper()}{asked[1:]}{mark}"
