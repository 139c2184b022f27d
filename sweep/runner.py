"""The loop: what is missing is run, committed, and, when all is there, sealed."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kernels.jit import compile_cache
from kernels.program import SUFFIX
from sweep.dataset.records import Seal
from sweep.dataset.repair import repair
from sweep.dataset.seal import clear_away, seal
from sweep.dataset.storage import LocalStorage
from sweep.dataset.store import Store
from sweep.errors import BudgetExceededError, EnvironmentProblemError, Fault, InterruptedRunError, StudyError, UsageError
from sweep.executors.base import DEADLINE_SECONDS, Forecast, Limits, Pool, drive
from sweep.executors.inline import InlinePool
from sweep.left import chosen_of, done_now, kept_of
from sweep.machine import available_bytes, default_workers
from sweep.ownership import place_of, write_study
from sweep.plan import BYTES_PER_POINT, Bools, Plan
from sweep.point import compile_kernels
from sweep.price import Estimate, Prices, stretches
from sweep.progress import Bar, Plain, Quiet, Reporter, on_terminal
from sweep.provenance import provenance
from sweep.quantity import human_size, human_time
from sweep.study import Study, load_study, study_digest
from sweep.timings import Timings
from sweep.worker import Chunk, ChunkResult, Job, lost_points

MEMORY_SHARE = 0.8  # of what is free, for all chunks in flight
DRAIN_SECONDS = 10.0
EXECUTORS = ("inline", "local", "ray")
DRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    insecure_cluster: bool = False  # join a cluster that answers without a token
    deadline: float = DEADLINE_SECONDS  # of a chunk, beside what was predicted
    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    command: Sequence[str] = ()


@dataclass
class RunSummary:
    """What a run did."""

    study: str
    out: Path | str
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
    """SIGINT, SIGTERM and SIGHUP: the first drains, the second stops at once."""

    def __init__(self, reporter: Reporter) -> None:
        self.signal = 0
        self.since = 0.0
        self._reporter = reporter

    def __call__(self, number: int, _frame: object) -> None:
        if self.signal:
            raise InterruptedRunError(number, "stopped at once; what was committed stays")
        self.signal, self.since = number, time.monotonic()
        _leave_dead_terminal()
        self._reporter.note("stopping: finishing what runs (again to stop at once)")

    def asked(self) -> bool:
        if self.signal and time.monotonic() - self.since > DRAIN_SECONDS:
            raise InterruptedRunError(self.signal, f"still running after {DRAIN_SECONDS:.0f} s; stopped; what was committed stays")
        return bool(self.signal)


def _leave_dead_terminal() -> None:
    """Where the terminal is gone (SIGHUP), what is still said goes nowhere: to write to it would be an error."""
    for handle in (1, 2):
        try:
            os.write(handle, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


@contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    wanted = [number for number in DRAINING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]  # nohup
    try:
        before = {number: signal.signal(number, stop) for number in wanted}
    except ValueError:  # not the main thread: the caller's signals are its own
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_pool(options: RunOptions, job: Job) -> Pool:
    """The executor's pool. Raises UsageError, EnvironmentProblemError."""
    workers = options.workers or default_workers()
    if options.executor == "inline":
        return InlinePool(job)
    if options.executor == "local":
        from sweep.executors.local import LocalPool

        return LocalPool(job, workers)
    from sweep.executors.ray import RayPool

    return RayPool(job, workers, options.address, options.insecure_cluster)


def run(study: Study | str | Path, out: str | Path | None = None, options: RunOptions | None = None) -> RunSummary:
    """Run what is missing of a study. A fresh directory (or URL) starts, an existing one resumes or is extended.

    Raises StudyError, UsageError, DatasetError (another study, model or run), BudgetExceededError,
    EnvironmentProblemError, InterruptedRunError."""
    options = options or RunOptions()
    check_options(options)
    study = study if isinstance(study, Study) else load_study(Path(study))
    plan = Plan(study)
    prices = Prices(plan)
    store = Store(place_of(out, study, options.new_version))
    kept = _checked(plan, prices.estimate(), options, store)
    chosen = chosen_of(kept, options.limit, options.shard)
    with store.writing():
        store.prepare()
        notes = [*study.notes, *(f"put aside: {text}" for text in repair(store))]
        done = done_now(plan, store, kept)
        left = chosen & ~done
        summary = RunSummary(study.name, store.place, int(chosen.sum()), int((chosen & done).sum()), notes=notes)
        write_study(store, study, int(kept.sum()))
        if left.any():
            chunks = chunks_of(prices, kept, left)
            check_budget(summary.left, sum(chunk.seconds for chunk in chunks), study, options)
            _execute(store, Job(study, store.name), chunks, options, summary)
        if not summary.stopped_by and not summary.failed and not summary.left:
            summary.sealed = _seal(store, plan, study, kept)
    return summary


def _checked(plan: Plan, estimate: Estimate, options: RunOptions, store: Store) -> Bools:
    """The indices that are points, of a plan that is neither empty nor too much, before anything is made."""
    if not store.has("study.json"):
        check_budget(estimate.points, estimate.seconds, plan.study, options)
        check_space(estimate, options, store)
    kept = kept_of(plan)
    if not kept.any():
        raise StudyError([Fault(plan.study.where("block", 0, "where"), "where", "keeps no point; loosen it")])
    return kept


def chunks_of(prices: Prices, kept: Bools, left: Bools) -> list[Chunk]:
    """What is left, in the plan's stretches, longest first."""
    found = []
    for stretch in stretches(prices, kept):
        here, all_here = left[stretch.start : stretch.end], kept[stretch.start : stretch.end]
        count = int(here.sum())
        if count:
            whole = np.array_equal(here, all_here)
            indices = range(stretch.start, stretch.end) if whole else stretch.start + np.flatnonzero(here)
            found.append(Chunk(indices, stretch.seconds * count / int(all_here.sum()), stretch.nbytes))
    return sorted(found, key=lambda chunk: -chunk.seconds)


def check_options(options: RunOptions) -> None:
    """Raises UsageError for options that cannot be, before anything is made."""
    if options.executor not in EXECUTORS:
        raise UsageError(f"--executor {options.executor!r} is unknown; there are {', '.join(EXECUTORS)}")
    if options.address is not None and options.executor != "ray":
        raise UsageError(f"--address {options.address!r} needs --executor ray, not {options.executor}")


def _seal(store: Store, plan: Plan, study: Study, kept: Bools) -> dict[str, Any] | None:
    """Seal what is complete, unless it is sealed already."""
    state = store.state()
    if state.seal and state.seal.completes(plan.digest) and not state.commits:
        return (clear_away(store, state.seal) if state.seal.absorbed else state.seal).as_json()
    if not np.array_equal(done_now(plan, store, kept), kept):
        return None  # other shards are to come
    return seal(store, plan.digest, study_digest(study)).as_json()


def check_budget(points: int, seconds: float, study: Study, options: RunOptions) -> None:
    """Refuse what takes longer than the study's budget allows."""
    if seconds > study.budget_cpu_hours * 3600 and not options.yes:
        raise BudgetExceededError(
            f"{points:,} points need about {human_time(seconds)} of CPU; the budget is "
            f"{study.budget_cpu_hours:g} CPU hours (study.budget_cpu_hours); --yes goes on"
        )


def check_space(estimate: Estimate, options: RunOptions, store: Store) -> None:
    """Refuse what does not fit into the memory of this machine or its disk."""
    need, free = estimate.nbytes, available_bytes()
    if options.address is None and need > free:
        raise EnvironmentProblemError(
            f"the largest point needs about {human_size(need)} of memory, {human_size(free)} are free; lower memory"
        )
    if isinstance(store.storage, LocalStorage):
        root, need = store.storage.root, estimate.points * BYTES_PER_POINT
        free = shutil.disk_usage(next(folder for folder in (root, *root.resolve().parents) if folder.is_dir())).free
        if need > free:
            raise EnvironmentProblemError(f"{root}: about {human_size(need)} are needed, {human_size(free)} are free; choose another --out")


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


def _execute(store: Store, job: Job, chunks: list[Chunk], options: RunOptions, summary: RunSummary) -> None:
    start = time.monotonic()
    with ExitStack() as stack:
        reporter = _reporter(stack, summary.left, options)
        record = provenance(list(options.command)) | {"executor": options.executor, "points": summary.left}
        record["compile_s"] = round(warm_up(reporter), 3)
        pool = make_pool(options, job)
        stop = _Stop(reporter)
        stack.enter_context(_signals(stop))  # after the pool: Ray sets handlers of its own
        limits = Limits(float("inf") if options.address else available_bytes() * MEMORY_SHARE, options.deadline)
        forecast = Forecast(sum(chunk.seconds for chunk in chunks))
        timings = Timings(store)
        orderly = False
        try:
            results = drive(pool, iter(chunks), _stopper(stop, summary, options), lost_points(job), limits, forecast)
            for result in results:
                _commit(store, result, summary, timings)
                reporter.advance(result.done, result.failed, forecast.left(pool.slots), pool.slots)
                if options.verbose:
                    reporter.note(_line(result))
            orderly = True
        finally:
            pool.close(now=not orderly)
        summary.stopped_by = stop.signal if summary.left else 0
        summary.seconds = time.monotonic() - start
        timings.flush()
        record |= {"seconds": round(summary.seconds, 3), "done": summary.done, "failed": summary.failed}
        record |= {"predicted_s": round(forecast.done, 9), "pace": round(forecast.pace, 3)}
        store.write_json(f"provenance/{timings.run}.json", record)


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


def _commit(store: Store, result: ChunkResult, summary: RunSummary, timings: Timings) -> None:
    sealed = sealed_elsewhere(store, result)
    if sealed is None:
        store.commit(result.commit)
    else:
        store.discard(result.commit, sealed)
    summary.done += result.done
    summary.failed += result.failed
    timings.add(result)


def _line(result: ChunkResult) -> str:
    seconds = int(result.wall_ns.sum()) / 1e9
    return f"{result.commit.key}: {result.done} points, {result.failed} failed, {seconds:.2f} s on {result.worker}"


def sealed_elsewhere(store: Store, result: ChunkResult) -> Seal | None:
    """None: the parts that a worker published are there. Else the seal of another run, which made them too and took them away.

    Raises EnvironmentProblemError where a worker on another machine writes what the driver cannot read."""
    gone = [part for part in result.commit.parts if store.storage.size(part.path) != part.nbytes]
    if not gone:
        return None
    sealed = store.seal()
    if sealed is not None and sealed.completes(result.commit.plan):
        return sealed
    raise EnvironmentProblemError(
        f"{store.name}: {gone[0].path}, which {result.worker} published, is not to be seen from here; "
        f"give --out on storage that all machines share, or a URL like s3://bucket/name"
    )
