"""The loop: what is missing is run, committed, and, when all is there, sealed."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kernels.jit import compile_cache, model_digest
from kernels.program import SUFFIX
from sweep.dataset.files import publish, publish_json, read_object
from sweep.dataset.store import Store
from sweep.errors import BudgetExceededError, DatasetError, EnvironmentProblemError, InterruptedRunError, UsageError
from sweep.executors.base import Chunk, ChunkResult, Pool, drive
from sweep.executors.inline import InlinePool
from sweep.plan import BYTES_PER_POINT, Plan, PlannedPoint, chunks_of
from sweep.point import Context, compile_kernels
from sweep.predict import predict_bytes, predict_seconds
from sweep.progress import Bar, Plain, Quiet, Reporter, on_terminal
from sweep.provenance import provenance
from sweep.quantity import human_size, human_time
from sweep.record import study_record
from sweep.schema import SCHEMA_VERSION
from sweep.study import Study, load_study

CHUNK_SECONDS = 1.0
DRAIN_SECONDS = 10.0
EXECUTORS = ("inline", "local", "ray")


@dataclass(frozen=True)
class RunOptions:
    """How to run: nothing here changes a result."""

    executor: str = "ray"
    address: str | None = None
    workers: int | None = None
    limit: int | None = None
    shard: tuple[int, int] = (0, 1)
    on_error: str = "continue"
    max_failures: int | None = None
    yes: bool = False
    new_version: bool = False
    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    command: Sequence[str] = ()


@dataclass
class RunSummary:
    """What a run did."""

    study: str
    out: Path
    total: int
    done_before: int
    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    sealed: dict[str, Any] | None = None
    stopped_by: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.total - self.done_before - self.done - self.failed

    @property
    def exit_status(self) -> int:
        if self.stopped_by:
            return 128 + self.stopped_by
        return 1 if self.failed or self.left else 0


class _Stop:
    """SIGINT and SIGTERM: the first drains, the second stops at once."""

    def __init__(self, reporter: Reporter) -> None:
        self.signal = 0
        self.since = 0.0
        self._reporter = reporter

    def __call__(self, number: int, _frame: object) -> None:
        if self.signal:
            raise InterruptedRunError(number, "stopped at once; what was committed stays")
        self.signal, self.since = number, time.monotonic()
        self._reporter.note("stopping: finishing what runs (again to stop at once)")

    def asked(self) -> bool:
        if self.signal and time.monotonic() - self.since > DRAIN_SECONDS:
            raise InterruptedRunError(self.signal, f"still running after {DRAIN_SECONDS:.0f} s; stopped; what was committed stays")
        return bool(self.signal)


@contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's signals are its own
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_workers() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def make_pool(options: RunOptions, context: Context) -> Pool:
    """The executor's pool. Raises UsageError, EnvironmentProblemError."""
    workers = options.workers or default_workers()
    if options.executor == "inline":
        return InlinePool(context)
    if options.executor == "local":
        from sweep.executors.local import LocalPool

        return LocalPool(context, workers)
    from sweep.executors.ray import RayPool

    return RayPool(context, workers, options.address)


def run(study: Study | str | Path, out: str | Path | None = None, options: RunOptions | None = None) -> RunSummary:
    """Run what is missing of a study. A fresh directory starts, an existing one resumes or is extended.

    Raises StudyError, UsageError, DatasetError (another study, model or run), BudgetExceededError,
    EnvironmentProblemError, InterruptedRunError."""
    options = options or RunOptions()
    check_options(options)
    study = study if isinstance(study, Study) else load_study(Path(study))
    plan = Plan(study)
    points = select(plan.points(), options)
    store = Store(_root(out, study, options))
    if not (store.root / "study.json").exists():
        check_budget(points, study, options, store.root)  # before anything is made
    store.prepare()
    with store.lock():
        notes = [*study.notes, *(f"put aside: {text}" for text in store.repair())]
        store.sweep_up()
        done = store.done()
        left = [p for p in points if p.point_id not in done]
        summary = RunSummary(study.name, store.root, len(points), len(points) - len(left), notes=notes)
        if left:
            check_budget(left, study, options, store.root)
            _execute(store, plan, left, options, summary)
        else:
            write_study(store, study, len(plan.points()))
        complete = not summary.stopped_by and not summary.failed and summary.left == 0 and len(points) == len(plan.points())
        summary.sealed = _seal(store, bool(left)) if complete else None
    return summary


def _root(out: str | Path | None, study: Study, options: RunOptions) -> Path:
    """The dataset's directory, checked to be free or this study's. Raises DatasetError, EnvironmentProblemError."""
    root = Path(out) if out is not None else Path("results") / study.name
    try:
        if options.new_version:
            return sibling(root, study)
        check_same_study(Store(root), study)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblemError(f"{str(root)[:200]}: cannot be used: {reason}; choose another with --out") from None
    return root


def check_options(options: RunOptions) -> None:
    """Raises UsageError for options that cannot be, before anything is made."""
    if options.executor not in EXECUTORS:
        raise UsageError(f"--executor {options.executor!r} is unknown; there are {', '.join(EXECUTORS)}")
    if options.address is not None and options.executor != "ray":
        raise UsageError(f"--address {options.address!r} needs --executor ray, not {options.executor}")


def _seal(store: Store, changed: bool) -> dict[str, Any] | None:
    sealed = store.sealed()
    fresh = store.seal_fits() and not changed and not any((store.root / "commits").glob("*.json"))
    return sealed if fresh else store.seal(str(read_object(store.root / "study.json")["digest"]))


def select(points: list[PlannedPoint], options: RunOptions) -> list[PlannedPoint]:
    """`--shard i/n` takes every n-th point, `--limit N` the first N."""
    index, count = options.shard
    if not 0 <= index < count:
        raise UsageError(f"--shard {index}/{count}: i/n with 0 <= i < n is needed")
    chosen = points[index::count]
    return chosen if options.limit is None else chosen[: options.limit]


def check_same_study(store: Store, study: Study) -> None:
    """Refuse a directory of another study, model or cost file, with what differs and the way out. Raises DatasetError."""
    path = store.root / "study.json"
    if not path.exists():
        if store.root.is_dir() and any(store.root.iterdir()):
            names = {entry.name for entry in store.root.iterdir()} - DATASET_NAMES
            if names:
                raise DatasetError(f"{store.root}: holds {min(names)} but no dataset; choose an empty directory with --out")
        return
    old, new = read_object(path), {**study.identity(), "model_digest": model_digest(), "schema_version": SCHEMA_VERSION}
    differs = [f"{key} ({_short(old.get(key))} there, {_short(new[key])} now)" for key in _FIXED if old.get(key) != new[key]]
    for kind in ("workloads", "costs"):
        for name, digest in new[kind].items():
            if name in old.get(kind, {}) and old[kind][name] != digest:
                differs.append(f"{kind[:-1]} {name!r} ({_short(old[kind][name])} there, {_short(digest)} now)")
    if differs:
        raise DatasetError(
            f"{store.root}: was made with another {'; '.join(differs)}; use --new-version for a sibling directory, or another --out"
        )


DATASET_NAMES = frozenset({"points", "steps", "errors", "commits", "provenance", "quarantine", ".lock"})
_FIXED = ("name", "seed", "model_digest", "schema_version")


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) > 16 else text


def sibling(root: Path, study: Study) -> Path:
    """The first of DIR, DIR.2, DIR.3 ... that is free or of this very study, model and costs."""
    for number in range(1, 1000):
        candidate = root if number == 1 else root.with_name(f"{root.name}.{number}")
        try:
            check_same_study(Store(candidate), study)
        except DatasetError:
            continue
        return candidate
    raise UsageError(f"{root}: has 999 versions; remove some")


def write_study(store: Store, study: Study, points: int) -> None:
    """study.toml as given, study.json as understood (workloads and costs of earlier runs stay named)."""
    path = store.root / "study.json"
    record = study_record(study, points)
    if path.exists():
        old = read_object(path)
        for kind in ("workloads", "costs"):
            record[kind] = {**old.get(kind, {}), **record[kind]}
        if old == json.loads(json.dumps(record)):
            return
    publish(store.root / "study.toml", study.text.encode())
    publish_json(path, record)


def check_budget(left: list[PlannedPoint], study: Study, options: RunOptions, root: Path) -> None:
    """Refuse what is larger than the study's budget, the machine's memory or its disk."""
    seconds = sum(predict_seconds(p.point, study.workloads[p.point.workload]) for p in left)
    if seconds > study.budget_cpu_hours * 3600 and not options.yes:
        raise BudgetExceededError(
            f"{len(left):,} points need about {human_time(seconds)} of CPU; the budget is {study.budget_cpu_hours:g} CPU hours "
            f"(study.budget_cpu_hours); --yes goes on"
        )
    workers = 1 if options.executor == "inline" else options.workers or default_workers()
    need = max(predict_bytes(p.point) for p in left) * workers
    free = available_bytes()
    if options.address is None and need > free:
        raise EnvironmentProblemError(
            f"{workers} workers need about {human_size(need)} of memory, {human_size(free)} are free; lower --workers or memory"
        )
    disk = shutil.disk_usage(next(folder for folder in (root, *root.resolve().parents) if folder.is_dir())).free
    if len(left) * BYTES_PER_POINT > disk:
        raise EnvironmentProblemError(
            f"{root}: about {human_size(len(left) * BYTES_PER_POINT)} are needed, {human_size(disk)} are free; choose another --out"
        )


def available_bytes() -> int:
    """MemAvailable of the machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def warm_up(reporter: Reporter) -> float:
    """Compile the kernels for this machine, once per version, before workers start; returns seconds (0: they were there)."""
    cache = compile_cache()
    if cache is not None and any(cache.glob(f"*{SUFFIX}")):
        return 0.0
    reporter.note("compiling the kernels for this machine (once per version) ...")
    start = time.monotonic()
    compile_kernels()
    seconds = time.monotonic() - start
    reporter.note(f"compiled in {seconds:.1f} s")
    return seconds


def _execute(store: Store, plan: Plan, left: list[PlannedPoint], options: RunOptions, summary: RunSummary) -> None:
    start, study = time.monotonic(), plan.study
    with ExitStack() as stack:
        reporter = _reporter(stack, len(left), options)
        record = provenance(list(options.command)) | {"executor": options.executor, "points": len(left)}
        record["compile_s"] = round(warm_up(reporter), 3)
        pool = make_pool(options, Context(study.name, dict(study.workloads), dict(study.costs)))
        stop = _Stop(reporter)
        stack.enter_context(_signals(stop))  # after the pool: Ray sets handlers of its own
        orderly = False
        try:
            write_study(store, study, len(plan.points()))
            chunks = (Chunk(points) for points in chunks_of(left, study, _chunk_seconds(left, study, pool.slots)))
            results = drive(pool, chunks, _stopper(stop, summary, options))
            timings = _commit_all(store, results, reporter, summary, options.verbose)
            orderly = True
        finally:
            pool.close(now=not orderly)
        summary.stopped_by = stop.signal if summary.left else 0
        summary.seconds = time.monotonic() - start
        record |= {"seconds": round(summary.seconds, 3), "done": summary.done, "failed": summary.failed}
        name = f"run-{time.time_ns():020d}-{os.getpid()}"
        publish_json(store.root / "provenance" / f"{name}.json", record)
        _write_timings(store.root / "provenance" / f"{name}.parquet", timings)


def _chunk_seconds(left: list[PlannedPoint], study: Study, slots: int) -> float:
    """About a second a chunk, less for small studies, so that every worker gets several."""
    total = sum(predict_seconds(p.point, study.workloads[p.point.workload]) for p in left)
    return min(CHUNK_SECONDS, total / (8 * slots))


def _reporter(stack: ExitStack, total: int, options: RunOptions) -> Reporter:
    if options.quiet:
        return Quiet()
    if options.progress and on_terminal():
        return stack.enter_context(Bar(total))
    return Plain(total)


def _stopper(stop: _Stop, summary: RunSummary, options: RunOptions) -> Callable[[], bool]:
    most = 0 if options.on_error == "stop" else options.max_failures

    def stopping() -> bool:
        return stop.asked() or (most is not None and summary.failed > most)

    return stopping


def _commit_all(
    store: Store, results: Iterator[ChunkResult], reporter: Reporter, summary: RunSummary, verbose: bool
) -> list[tuple[str, int, str]]:
    timings: list[tuple[str, int, str]] = []
    for result in results:
        store.commit(result.key, result.tables)
        summary.done += result.done
        summary.failed += result.failed
        timings += [(point_id, wall, result.worker) for point_id, wall in result.wall_ns]
        reporter.advance(result.done, result.failed)
        if verbose:
            seconds = sum(wall for _, wall in result.wall_ns) / 1e9
            reporter.note(f"{result.key}: {result.done} points, {result.failed} failed, {seconds:.2f} s on {result.worker}")
    return timings


def _write_timings(path: Path, timings: list[tuple[str, int, str]]) -> None:
    """Wall time and worker of each point: a side table, never part of the data."""
    ids, wall, workers = zip(*timings, strict=True) if timings else ((), (), ())
    table = pa.table(
        {"point_id": pa.array(ids, pa.string()), "wall_ns": pa.array(wall, pa.int64()), "worker": pa.array(workers, pa.string())}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    publish(path, bytes(sink.getvalue()))
