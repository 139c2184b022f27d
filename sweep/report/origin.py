"""Where a dataset comes from: digests, how much of it there is, what made it. Nothing that says when: the same data give the same page."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from sweep.dataset.read import Dataset
from sweep.errors import DatasetError
from sweep.report.facts import Facts
from sweep.report.tables import ReportTable

RUN_RECORD = re.compile(r"run-[0-9]+-[0-9]+\.json")
MAX_RUNS = 200  # records that are looked at
SAID = ("python", "machine", "cpu", "kernel")


def provenance(dataset: Dataset, facts: Facts) -> list[ReportTable]:
    """Digests and counts; what the runs said of themselves; costs."""
    tables = [ReportTable("Dataset", pd.DataFrame({"what": list(_counts(facts)), "value": list(_counts(facts).values())}))]
    made = pd.DataFrame(_runs(dataset), columns=["what", "by"]).drop_duplicates().sort_values(["what", "by"], kind="stable")
    if len(made):
        tables.append(ReportTable("Made with", made))
    costs = [(name, file.digest()) for name, file in sorted(facts.study.costs.items()) if "@" not in name]
    tables.append(ReportTable("Costs", pd.DataFrame(costs, columns=["cost file", "SHA-256 of its values"])))
    return tables


def _counts(facts: Facts) -> Mapping[str, str]:
    state = "sealed" if "root_digest" in facts.digests else "not sealed: further points may come"
    counts = {
        "study": facts.study.name,
        "points": f"{facts.points:,} of {facts.planned:,}",
        "failed": f"{len(facts.failed):,}",
        "state": state,
    }
    return {
        **counts,
        "configurations": f"{len(facts.frame):,}",
        "seed": str(facts.study.seed),
        **{_name(key): value for key, value in facts.digests.items()},
    }


def _name(key: str) -> str:
    return "study digest" if key == "study" else key


def _runs(dataset: Dataset) -> list[tuple[str, str]]:
    """(what, which) that any run of the dataset said: versions, machine, commit. Records that cannot be read say nothing."""
    names = [name for name in dataset.store.storage.names("provenance") if RUN_RECORD.fullmatch(name)]
    found: list[tuple[str, str]] = []
    for name in sorted(names)[:MAX_RUNS]:
        try:
            record = dataset.store.json(f"provenance/{name}")
        except DatasetError:
            continue
        found += [(key, _short(record[key])) for key in SAID if key in record]
        found += _pairs(record.get("packages"))
        commit = record.get("git")
        if isinstance(commit, dict) and commit.get("commit"):
            found.append(("commit", _short(commit["commit"]) + (", changed" if commit.get("dirty") else "")))
    return found


def _pairs(value: Any) -> list[tuple[str, str]]:
    return [(_short(key), _short(version)) for key, version in value.items()] if isinstance(value, dict) else []


def _short(value: Any) -> str:
    return str(value)[:100]
