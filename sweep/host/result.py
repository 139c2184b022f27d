"""The result of a validation as a dataset: which kernels, which counts, which verdicts; and the table that README shows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import DatasetError
from sweep.host.case import AccessList
from sweep.host.compare import CaseResult, Verdict

CASES = pa.schema(
    [
        pa.field("layer", pa.string(), metadata={"doc": "memory, kvm or boot"}),
        pa.field("kernel", pa.string(), metadata={"doc": "the version the model predicted for"}),
        pa.field("release", pa.string(), metadata={"doc": "what the kernel calls itself"}),
        pa.field("mmu", pa.string(), metadata={"doc": "tdp, legacy or shadow; none without a guest"}),
        pa.field("case", pa.string(), metadata={"doc": "name"}),
        pa.field("text", pa.string(), metadata={"doc": "parameters and steps"}),
        pa.field("verdict", pa.string(), metadata={"doc": "equal, differs, left out, failed"}),
        pa.field("reason", pa.string(), metadata={"doc": "why it did not run, or failed"}),
        pa.field("accesses", pa.int64(), metadata={"doc": "single accesses named in its lists"}),
        pa.field("equal", pa.int64(), metadata={"doc": "counters that are equal, over all steps"}),
        pa.field("differs", pa.int64(), metadata={"doc": "counters that differ and must not"}),
        pa.field("free", pa.int64(), metadata={"doc": "counters that differ and may"}),
    ]
)
COUNTS = pa.schema(
    [
        *(CASES.field(name) for name in ("layer", "kernel", "release", "mmu", "case")),
        pa.field("step", pa.int32(), metadata={"doc": "from 0"}),
        pa.field("op", pa.string(), metadata={"doc": "what the step does"}),
        pa.field("counter", pa.string(), metadata={"doc": "name of the counter or gauge"}),
        pa.field("real", pa.int64(), metadata={"doc": "what the kernel counted"}),
        pa.field("predicted", pa.int64(), metadata={"doc": "what the model counts"}),
        pa.field("verdict", pa.string(), metadata={"doc": "equal, differs, free"}),
        pa.field("reason", pa.string(), metadata={"doc": "why it need not be equal"}),
    ]
)
TABLES = {"cases": CASES, "counts": COUNTS}
SEAL, HOSTS = "sealed.json", "hosts.json"


@dataclass(frozen=True)
class LayerResult:
    """What one kernel said. Without results, `skipped` says why."""

    layer: str
    kernel: str
    mmu: str
    host: Mapping[str, str]
    results: Sequence[CaseResult] = ()
    skipped: str = ""
    asked: bool = True  # False: nobody named it, so that it may be skipped
    notes: Sequence[str] = ()

    @property
    def identity(self) -> dict[str, str]:
        return {"layer": self.layer, "kernel": self.kernel, "release": self.host.get("release", ""), "mmu": self.mmu}

    def count(self, verdict: Verdict) -> int:
        return sum(result.verdict == verdict for result in self.results)


def _case_row(result: CaseResult) -> dict[str, Any]:
    tally = {
        verdict.value: sum(row.verdict == verdict for row in result.rows) for verdict in (Verdict.EQUAL, Verdict.DIFFERS, Verdict.FREE)
    }
    accesses = sum(len(step.accesses) for step in result.case.steps if isinstance(step, AccessList))
    text = str(result.case) if accesses <= 200 else str(result.case)[:400]
    return {
        "case": result.case.name,
        "text": text,
        "verdict": result.verdict.value,
        "reason": result.reason,
        "accesses": accesses,
        **tally,
    }


def tables_of(layers: Sequence[LayerResult]) -> dict[str, pa.Table]:
    """The rows of `cases` and `counts`, in the order of running."""
    ran = [(layer.identity, result) for layer in layers for result in layer.results]
    cases = [identity | _case_row(result) for identity, result in ran]
    counts = [
        identity | {"case": result.case.name, **{name: getattr(row, name) for name in COUNTS.names[5:]}}
        for identity, result in ran
        for row in result.rows
    ]
    return {"cases": pa.Table.from_pylist(cases, CASES), "counts": pa.Table.from_pylist(counts, COUNTS)}


@dataclass(frozen=True)
class Dataset:
    """`cases` and `counts`, and one entry per layer, kernel and MMU about where they come from."""

    tables: Mapping[str, pa.Table]
    hosts: Sequence[Mapping[str, Any]]

    def with_later(self, later: "Dataset") -> "Dataset":
        """Both; of a kernel that is in both, the later one's rows."""
        replaced = {_key(host) for host in later.hosts}
        tables = {}
        for name, schema in TABLES.items():
            kept = [row for row in self.tables[name].to_pylist() if _key(row) not in replaced]
            tables[name] = pa.concat_tables([pa.Table.from_pylist(kept, schema), later.tables[name]])
        ran = {_key(host, release=False) for host in later.hosts if not host["skipped"]}
        kept_hosts = [h for h in self.hosts if _key(h) not in replaced and not (h["skipped"] and _key(h, release=False) in ran)]
        return Dataset(tables, [*kept_hosts, *later.hosts])


def _key(row: Mapping[str, Any], release: bool = True) -> tuple[str, ...]:
    return tuple(row[name] for name in ("layer", "kernel", "mmu", *(("release",) if release else ())))


def dataset_of(layers: Sequence[LayerResult], about: Mapping[str, Any]) -> Dataset:
    """What a run of `validate` found."""
    hosts = [
        {**layer.identity, "host": dict(layer.host), "skipped": layer.skipped, "notes": list(layer.notes), "about": dict(about)}
        for layer in layers
    ]
    return Dataset(tables_of(layers), hosts)


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """cases.parquet, counts.parquet, hosts.json and, last, sealed.json with their digests; what is there already is added to.

    Raises DatasetError if something else is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        dataset = read_dataset(folder).with_later(dataset)
    digests = {}
    for name, table in dataset.tables.items():
        made = folder / f".{name}.parquet"
        pq.write_table(table, made, compression="zstd", write_page_checksum=True)
        digests[f"{name}.parquet"] = _digest(made)
        made.replace(folder / f"{name}.parquet")
    digests[HOSTS] = _write(folder / HOSTS, dataset.hosts)
    _write(folder / SEAL, {"sha256": digests})


def _write(path: Path, value: Any) -> str:
    made = path.with_name(f".{path.name}")
    made.write_text(json.dumps(value, indent=1) + "\n")
    digest = _digest(made)
    made.replace(path)
    return digest


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_dataset(folder: Path) -> Dataset:
    """A sealed validation. Raises DatasetError that names what is missing or damaged."""
    try:
        sealed: dict[str, str] = json.loads((folder / SEAL).read_text())["sha256"]
        for name in (*(f"{table}.parquet" for table in TABLES), HOSTS):
            if _digest(folder / name) != sealed[name]:
                raise DatasetError(f"{folder / name}: does not match {SEAL}; the file was changed or damaged")
        tables = {name: pq.read_table(folder / f"{name}.parquet", page_checksum_verification=True) for name in TABLES}
        return Dataset(tables, json.loads((folder / HOSTS).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{folder} is no validation dataset: {type(error).__name__}: {str(error)[:200]}") from None


LAYER_NAMES = {"boot": "booted", "kvm": "/dev/kvm", "memory": "host memory"}
MMU_NAMES = {"tdp": "TDP MMU", "legacy": "legacy MMU", "shadow": "shadow paging", "none": "no guest"}


def agreement(cases: pa.Table) -> str:
    """Kernel, cases, exact, as a Markdown table: one row per layer, kernel and MMU, in the order of the dataset."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for case in cases.to_pylist():
        tally = rows.setdefault((case["layer"], case["release"], case["mmu"]), [0, 0, 0, 0])
        ran = case["verdict"] != Verdict.LEFT_OUT
        for n, more in enumerate((ran, case["verdict"] == Verdict.EQUAL, case["equal"], case["differs"])):
            tally[n] += int(more)
    lines = ["| kernel | how | MMU | cases | exact | counts equal | counts that differ |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {release} | {LAYER_NAMES[layer]} | {MMU_NAMES[mmu]} | {ran} | {exact} | {equal:,} | {differ} |"
        for (layer, release, mmu), (ran, exact, equal, differ) in rows.items()
    ]
    return "\n".join(lines)
