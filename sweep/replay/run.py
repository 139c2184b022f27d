"""`faultsweep replay`: import a trace, count, and ask what other settings would have made of it."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from kernels.policy import UnknownKernelError, parse_kernel
from sweep.dataset.files import SEALED_LEVEL, parquet_bytes, publish
from sweep.dataset.read import open_dataset
from sweep.dataset.storage import SCHEMES, sync_folder
from sweep.dataset.store import Store
from sweep.errors import DatasetError, EnvironmentProblemError, UsageError, printable
from sweep.files import nearest, read_toml, toml_value
from sweep.ownership import check_free
from sweep.replay.accesses import fold_trace
from sweep.replay.answer import Imported, as_json, for_report, tables_of, text_of
from sweep.replay.decode import Vendor, decide
from sweep.replay.doubles import by_region, in_time
from sweep.replay.formats import BY_NAME
from sweep.replay.parse import ReadOptions, read_trace
from sweep.replay.slots import parse_slots
from sweep.replay.source import STDIN
from sweep.replay.vcpus import assign
from sweep.replay.whatif import LIST_NAME, WORKLOAD, asked_study, compared, default_study, kernel_of, shown
from sweep.report.tables import ReportTable
from sweep.runner import RunOptions, RunSummary
from sweep.runner import run as run_study
from sweep.study import load_study

FOLDER = "replay"  # of the dataset: the accesses, what was counted, the study
TABLES_NAME = "tables.json"
TEMPORARY = ".raw-"
VENDORS = tuple(str(vendor) for vendor in Vendor if vendor is not Vendor.NONE)
MAX_THREADS_GIVEN = 1 << 14
SAME = 0.05  # a configuration whose faults differ from the recorded ones by less is named


@dataclass(frozen=True)
class ReplayOptions:
    """What to import, how, and what to ask."""

    trace: str
    out: str | None = None
    study: Path | None = None
    format: str | None = None
    vendor: str | None = None
    slots: str | None = None
    threads: str | None = None
    skip_bad: int = 0
    kernel: str | None = None
    import_only: bool = False
    run: RunOptions = field(default_factory=lambda: RunOptions(executor="local"))


@dataclass(frozen=True)
class Replayed:
    """An imported trace with its answers; `what_if` is empty where nothing was run."""

    imported: Imported
    out: Path
    tables: Sequence[ReportTable]
    what_if: pd.DataFrame
    summary: RunSummary | None

    def as_text(self) -> str:
        parts = []
        for table in self.tables:
            parts += [text_of(table), ""]
        parts.append(f"accesses: {self.out / FOLDER / LIST_NAME}")
        if self.summary is None:
            parts.append(f"next: faultsweep run {self.out / FOLDER / 'study.toml'} --out {self.out}")
        else:
            parts.append(f"dataset: {self.out}; next: faultsweep report {self.out}")
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        found = as_json(self.imported) | {"out": str(self.out), "accesses": str(self.out / FOLDER / LIST_NAME)}
        return found | {"what_if": self.what_if.to_dict("records")}


def replay(options: ReplayOptions) -> Replayed:
    """Raises UsageError, TraceError, StudyError, DatasetError, and what a run raises."""
    _check(options)
    out = _place(options)
    with _folder(out) as folder:
        imported = _import(options, folder)
        tables = tables_of(imported)
        publish(folder / "trace.json", json.dumps(as_json(imported), indent=1).encode())
        publish(folder / TABLES_NAME, _tables_json(for_report(imported)))
        for name, frame in (("regions.parquet", by_region(imported.folded)), ("time.parquet", in_time(imported.folded))):
            rows = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
            publish(folder / name, parquet_bytes(rows, SEALED_LEVEL))
        publish(folder / "study.toml", _study_text(options, imported).encode())
    if options.import_only:
        return Replayed(imported, out, tables, pd.DataFrame(), None)
    study = load_study(folder / "study.toml")
    if WORKLOAD not in study.workloads:
        raise UsageError(f"--study {options.study}: no point has workload = {WORKLOAD!r}, which is the trace; leave workload out")
    summary = run_study(study, out, options.run)
    points = open_dataset(out).points()
    frame = compared(points[points["workload"] == WORKLOAD], imported.faults)
    return Replayed(imported, out, [*tables[:-1], what_if_table(frame, imported.faults), tables[-1]], frame, summary)


def what_if_table(frame: pd.DataFrame, faults: int) -> ReportTable:
    """Every configuration beside what was recorded."""
    far = (frame["of_recorded"] - 1).abs()
    same = frame.loc[far[far < SAME].sort_values(kind="stable").index]
    names = list(frame.columns[: list(frame.columns).index("pf_taken")])
    settings = [" ".join(f"{name}={value}" for name, value in zip(names, row, strict=False)) for row in same.itertuples(index=False)]
    alike = (
        f"as many, within {SAME:.0%}, with {'; or '.join(settings[:3])}"
        if settings
        else f"no configuration comes within {SAME:.0%} of them"
    )
    note = f"recorded: {faults:,} faults; {alike}"
    return ReportTable("What if: the same accesses under other settings", shown(frame), note)


def _check(options: ReplayOptions) -> None:
    """Refuse at once what cannot be. Raises UsageError, StudyError."""
    if options.format is not None and options.format not in BY_NAME:
        raise UsageError(f"--format {options.format[:40]!r} is unknown; {nearest(options.format, BY_NAME)}")
    if options.vendor is not None and options.vendor not in VENDORS:
        raise UsageError(f"--vendor {options.vendor[:40]!r} is unknown; there are {', '.join(VENDORS)}")
    if options.kernel is not None:
        try:
            parse_kernel(options.kernel)
        except UnknownKernelError as error:
            raise UsageError(f"--kernel: {error}") from None
    if options.study is not None:
        read_toml(options.study)
        if options.kernel is not None:
            raise UsageError(f"--kernel {options.kernel}: --study says which kernels are asked about; give one of the two")
    if options.out is not None and options.out.startswith(SCHEMES):
        raise UsageError(f"--out {options.out}: a replay keeps its accesses beside the dataset, in a folder; give a directory")


def _threads(text: str | None) -> Sequence[int]:
    """'4145,4150-4157'. Raises UsageError."""
    found: list[int] = []
    for part in text.split(",") if text is not None else ():
        match = re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first + len(found) >= MAX_THREADS_GIVEN:
            raise UsageError(f"--threads {part[:40]!r}: thread ids are needed, like 4145,4150-4157, at most {MAX_THREADS_GIVEN}")
        found += range(first, last + 1)
    return found


def study_name(trace: str) -> str:
    """'Boot of VM 3.txt.gz' -> 'replay-boot-of-vm-3'."""
    stem = "stdin" if trace == STDIN else Path(trace).name.split(".")[0]
    return f"replay-{re.sub('[^a-z0-9]+', '-', stem.lower()).strip('-')[:50] or 'trace'}"


def _place(options: ReplayOptions) -> Path:
    """Where the dataset goes, checked to be free or a replay's. Raises DatasetError, EnvironmentProblemError."""
    out = Path(options.out if options.out is not None else Path("results") / study_name(options.trace))
    try:
        store = Store(out)
        if not store.has("study.json"):
            check_free(store)
        elif not (out / FOLDER / LIST_NAME).exists():
            raise DatasetError(f"{out}: holds the dataset of another study; choose another --out")
    except (OSError, ValueError) as error:
        raise EnvironmentProblemError(
            f"{str(out)[:200]}: cannot be used: {getattr(error, 'strerror', None) or error}; choose another --out"
        ) from None
    return out


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """DIR/replay, this replay's alone; after a failure nothing stays that was not there. Raises EnvironmentProblemError."""
    folder = out / FOLDER
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EnvironmentProblemError(f"{folder}: another replay writes here; wait for it, or choose another --out") from None
    except OSError as error:
        raise EnvironmentProblemError(f"{folder}: cannot be written: {error.strerror}; choose another --out") from None
    with lock:
        for left in folder.glob(f"{TEMPORARY}*"):  # of a replay that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield folder
        except BaseException:
            if folder in made and not (folder / LIST_NAME).exists():
                _unmake(folder, made)
            raise


def _unmake(folder: Path, made: Sequence[Path]) -> None:
    """Folders that were made and hold nothing but the lock."""
    (folder / ".lock").unlink(missing_ok=True)
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _import(options: ReplayOptions, folder: Path) -> Imported:
    slots = parse_slots(options.slots) if options.slots is not None else None
    reading = ReadOptions(options.format, _threads(options.threads), options.skip_bad)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as temporary:
        raw, listed = Path(temporary) / "raw.arrow", Path(temporary) / LIST_NAME
        try:
            trace = read_trace(options.trace, reading, raw)
            decision = decide(trace, options.vendor)
            assignment = assign(trace)
            folded = fold_trace(trace, raw, decision, assignment, slots, listed)
            _publish_list(listed, folder / LIST_NAME)
        except OSError as error:
            raise EnvironmentProblemError(
                f"{folder}: cannot be written: {error.strerror or error}; free space, or choose another --out"
            ) from None
    return Imported(trace, decision, assignment, folded)


def _publish_list(made: Path, place: Path) -> None:
    """Give the list its name. Raises DatasetError where another trace's has it."""
    if place.exists() and _digest(place) != _digest(made):
        raise DatasetError(f"{place}: holds the accesses of another trace, or of this one read otherwise; choose another --out")
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.replace(place)
    sync_folder(place.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _study_text(options: ReplayOptions, imported: Imported) -> str:
    mmu = "shadow" if imported.decision.vendor is Vendor.SHADOW else "tdp"
    if options.study is not None:
        return asked_study(options.study, imported.folded, mmu)
    kernel = options.kernel or kernel_of(imported.trace.release)
    title = toml_value(f"What if: the faults of {printable(Path(imported.trace.name).name, 200)} under other settings")
    return default_study(study_name(options.trace), title, imported.folded, kernel, mmu)


def _tables_json(tables: Sequence[ReportTable]) -> bytes:
    """What the report's page shows of the trace: sweep/report/replayed.py reads it."""
    return json.dumps(
        [{"title": t.title, "note": t.note, "rows": t.frame.astype(str).to_dict("records")} for t in tables], indent=1
    ).encode()
