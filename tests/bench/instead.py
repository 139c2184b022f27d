"""What a user would write instead of faultsweep: the same points, the same machine, one row each, and Parquet at the end.

`python -m tests.bench.instead` prints the table, `--write` puts it into docs/compare.md. Each way runs in a process of its own, three
times with one point and with all; medians (Ray Tune with all once, and the trivial ones alone: its trials take minutes). Wall time is
that of the process; CPU time is of every process that came out of it, read from /proc every tenth of a second or, where that is more,
as the kernel adds it up for the process that is waited for. Ray Tune needs ray[tune]; without it its line says so.
"""

import argparse
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kernels import Access, Order, Touch, simulate
from sweep.configs import config_root
from sweep.provenance import cpu_model
from sweep.quantity import human_size
from tests.orphans import adopt_orphans, wait_for_all

POINTS, TRIALS = 1_000, 100
REPEATS = 3
WORKERS = 2
KERNELS = ("6.1", "6.6", "6.12", "6.13")
SEED = 5
LOOK_SECONDS = 0.1
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = "compare.md"
HASHED = ["kernel", "replicate", "exits", "pf_taken", "guest_ns"]  # that the rows are the same


class Work(NamedTuple):
    """What a point does: random mixed touches of some memory."""

    name: str
    memory: int
    touches: int


WORKS = (Work("trivial points", 64 << 10, 16), Work("points of about 1 ms", 64 << 20, 400_000))
STUDY = """
[study]
name = "instead"
seed = {seed}
replicates = {replicates}
[point]
memory = "{memory}B"
workload = "mixed"
[[block]]
grid = {{ kernel = [{kernels}] }}
[workload.mixed]
steps = [{{ op = "touch", access = "mixed", write_percent = 50.0, order = "random", repeat = true, touches = {touches} }}]
"""


class Task(NamedTuple):
    """A point, as somebody would hand it to a pool."""

    kernel: str
    replicate: int
    memory: int
    touches: int


def tasks_of(work: Work, count: int) -> list[Task]:
    """The first so many points."""
    every = product(KERNELS, range(POINTS // len(KERNELS)))
    return [Task(kernel, replicate, work.memory, work.touches) for kernel, replicate in islice(every, count)]


def row(task: Task) -> dict[str, Any]:
    """One point, as a notebook would run it."""
    touch = Touch(access=Access.MIXED, write_percent=50.0, order=Order.RANDOM, repeat=True, touches=task.touches)
    run = simulate(kernel=task.kernel, memory=task.memory, steps=[touch], seed=SEED, replicate=task.replicate)
    times = {"guest_ns": run.guest_ns, "total_ns": run.total_ns}
    return {"kernel": task.kernel, "replicate": task.replicate, **run.counters, **run.gauges, **run.latency, **times}


def write(rows: list[dict[str, Any]], out: Path) -> None:
    out.mkdir()
    pd.DataFrame(rows).to_parquet(out / "rows.parquet")


def with_a_loop(work: Work, count: int, out: Path) -> None:
    write([row(task) for task in tasks_of(work, count)], out)


def with_joblib(work: Work, count: int, out: Path) -> None:
    from joblib import Parallel, delayed

    write(Parallel(n_jobs=WORKERS)(delayed(row)(task) for task in tasks_of(work, count)), out)


def with_ray_tasks(work: Work, count: int, out: Path) -> None:
    from sweep.executors.ray import connect

    ray = connect(None, WORKERS)
    remote = ray.remote(num_cpus=1)(row)
    write(ray.get([remote.remote(task) for task in tasks_of(work, count)]), out)
    ray.shutdown()


def with_ray_tune(work: Work, count: int, out: Path) -> None:
    from ray import tune

    from sweep.executors.ray import connect

    ray = connect(None, WORKERS)
    tasks = tasks_of(work, count)
    space = {"task": tune.grid_search(range(len(tasks)))}
    with tempfile.TemporaryDirectory() as folder:
        kept = tune.RunConfig(storage_path=folder, verbose=0)
        tuner = tune.Tuner(lambda config: row(tasks[config["task"]]), param_space=space, run_config=kept)
        frame = tuner.fit().get_dataframe()
    out.mkdir()
    frame.to_parquet(out / "rows.parquet")
    ray.shutdown()


def with_faultsweep(executor: str) -> Callable[[Work, int, Path], None]:
    def run(work: Work, count: int, out: Path) -> None:
        import sweep

        text = STUDY.format(
            seed=SEED,
            replicates=POINTS // len(KERNELS),
            memory=work.memory,
            touches=work.touches,
            kernels=", ".join(f'"{kernel}"' for kernel in KERNELS),
        )
        path = out.with_suffix(".toml")
        path.write_text(text)
        limit = None if count == POINTS else count
        sweep.run(path, out, sweep.RunOptions(executor=executor, workers=WORKERS, limit=limit, quiet=True))

    return run


@dataclass(frozen=True)
class Way:
    """A way to run the points, and what it gives beside its speed."""

    name: str
    run: Callable[[Work, int, Path], None]
    killed: str
    more: str
    raises: str
    dies: str
    points: int = POINTS
    repeats: int = REPEATS
    works: tuple[Work, ...] = WORKS
    module: str = ""  # without which it cannot be

    @property
    def key(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:8]


NOTHING = "nothing is kept"
ALL_AGAIN = "all points again"
ENDS = "ends the run, no row is kept"
COMMITTED = "goes on with what is missing", "only the new points", "a row of `errors`, the others go on"
WAYS = (
    Way("a `for` loop, Parquet at the end", with_a_loop, NOTHING, ALL_AGAIN, ENDS, "is the run"),
    Way("joblib, Parquet at the end", with_joblib, NOTHING, ALL_AGAIN, ENDS, ENDS, module="joblib"),
    Way("one `ray.remote` task per point", with_ray_tasks, NOTHING, ALL_AGAIN, ENDS, "3 more tries, then ends the run"),
    Way(
        "Ray Tune, one trial per point",
        with_ray_tune,
        "`Tuner.restore` goes on",
        "a new experiment",
        "a trial without result, the others go on",
        "a trial without result, the others go on",
        points=TRIALS,
        repeats=1,
        works=WORKS[:1],
        module="ray.tune",
    ),
    Way("faultsweep `local`", with_faultsweep("local"), *COMMITTED, "alone again, then in halves, then a row of `errors`"),
    Way("faultsweep `ray`", with_faultsweep("ray"), *COMMITTED, "alone again, then in halves, then a row of `errors`"),
)


class Cost(NamedTuple):
    """Of a run, in seconds."""

    wall: float
    cpu: float


def below(root: int) -> Iterator[tuple[tuple[int, str], float]]:
    """((process, its start), CPU seconds) of every process below `root`."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(entry.name)] = int(fields[1])
            found[int(entry.name)] = fields[19], (int(fields[11]) + int(fields[12])) / TICKS
    known = {root}
    while more := {process for process, parent in parents.items() if parent in known} - known:
        known |= more
    for process in known - {root}:
        yield (process, found[process][0]), found[process][1]


def measured(way: Way, work: Work, count: int, out: Path) -> Cost:
    """Run it in a process of its own. Raises RuntimeError with what it said."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.instead",
        "--way",
        way.key,
        "--work",
        work.name,
        "--points",
        str(count),
        "--out",
        str(out),
    ]
    environment = os.environ | {"RAY_worker_niceness": "0"}
    seen: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryFile("w+") as said:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        ended = 0
        while not ended:
            seen.update(below(os.getpid()))
            time.sleep(LOOK_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall, process.returncode = time.monotonic() - begin, os.waitstatus_to_exitcode(status)
        wait_for_all()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{way.name}: {said.read()[-2000:]}")
    return Cost(wall, max(sum(seen.values()), usage.ru_utime + usage.ru_stime))


def rows_of(out: Path) -> str:
    """Digest of what the rows say, whoever wrote them."""
    frame = pd.read_parquet(out / "points" if (out / "points").exists() else out / "rows.parquet")
    frame = frame[HASHED].sort_values(HASHED[:2])
    return f"{len(frame)} {hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()}"


def bytes_of(out: Path) -> str:
    """Digest of the files."""
    files = [out / "sealed.json"] if (out / "sealed.json").exists() else sorted(out.glob("*.parquet"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Found(NamedTuple):
    """Of a way and a kind of points: one point alone, all of them, and whether all runs wrote the same bytes."""

    one: Cost
    all: Cost
    same: bool
    rows: str


def median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))


def figures(way: Way, work: Work, folder: Path) -> Found:
    ones = [folder / f"{way.key}-{work.touches}-one-{i}" for i in range(REPEATS)]
    outs = [folder / f"{way.key}-{work.touches}-{i}" for i in range(way.repeats)]
    one, every = [measured(way, work, 1, out) for out in ones], [measured(way, work, way.points, out) for out in outs]
    same = all(len({bytes_of(out) for out in alike}) == 1 for alike in (ones, outs))
    return Found(median(one), median(every), same, rows_of(outs[0]))


def is_there(way: Way) -> bool:
    """Its packages are installed."""
    done = subprocess.run([sys.executable, "-c", f"import {way.module or 'sys'}"], capture_output=True, check=False)
    return done.returncode == 0


def measure() -> dict[str, list[Found]]:
    """Of each way that can be, each kind of points. Raises RuntimeError where two ways gave other rows."""
    found: dict[str, list[Found]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            if not is_there(way):
                print(f"{way.name}: skipped, {way.module} cannot be imported", file=sys.stderr, flush=True)
                continue
            found[way.name] = [figures(way, work, Path(folder)) for work in way.works]
            print(way.name, found[way.name], file=sys.stderr, flush=True)
    whole = [way.name for way in WAYS if way.name in found and way.points == POINTS]
    for work, *results in zip(WORKS, *(found[name] for name in whole), strict=True):
        if len({result.rows for result in results}) > 1:
            raise RuntimeError(f"{work.name}: the ways gave other rows")
    return found


def cells(count: int, found: Found) -> list[str]:
    each = (found.all.cpu - found.one.cpu) / (count - 1) * 1e6
    return [f"{found.all.wall:.1f}", f"{found.all.cpu:.1f}", f"{each:,.0f}"]


def speed_table(found: dict[str, list[Found]]) -> str:
    """Markdown."""
    heads = [f"{work.name}: {what}" for work in WORKS for what in ("wall s", "CPU s", "CPU us a point")]
    lines = [["way", "points", *heads, "runs give the same bytes"]]
    for way in WAYS:
        results = found.get(way.name, [])
        figures = [cell for result in results for cell in cells(way.points, result)]
        missing = ["not measured"] * (len(heads) - len(figures))
        same = f"needs {way.module}" if not results else "yes" if all(result.same for result in results) else "no"
        lines.append([way.name, str(way.points), *figures, *missing, same])
    return markdown(lines)


def gives_table() -> str:
    """Markdown: what no measurement says."""
    head = ["way", "the run is killed", "an axis gets more values", "a point raises", "a worker is killed"]
    return markdown([head, *[[way.name, way.killed, way.more, way.raises, way.dies] for way in WAYS]])


def markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def page(found: dict[str, list[Found]]) -> str:
    """docs/compare.md."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "joblib", "pyarrow", "pandas"))
    machine = f"{cpu_model()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}, {packages}"
    each = " and ".join(f"{work.touches:,} touches of {human_size(work.memory)}" for work in WORKS)
    return f"""# What one would write instead

Generated by `python -m tests.bench.instead --write` on: {machine}; load {os.getloadavg()[1]:.1f} with this.

{POINTS:,} points ({len(KERNELS)} kernels, {POINTS // len(KERNELS)} replicates; Ray Tune {TRIALS} of them), {each} each,
by {WORKERS} workers. Medians of {REPEATS} runs (of all trials of Ray Tune: one), each in a process of its own, imports and start of Ray
included; *CPU us a point* is what all points take beyond one point, of all processes together. All ways that ran all points gave the
same rows (this is checked); faultsweep writes more than these: the steps, checksums, commits, provenance, sealed files.

{speed_table(found)}

What each gives beside that:

{gives_table()}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE}")
    for name in ("way", "work", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--points", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        way = next(way for way in WAYS if way.key == given.way)
        way.run(next(work for work in WORKS if work.name == given.work), given.points, Path(given.out))
        return 0
    adopt_orphans()
    text = page(measure())
    if given.write:
        (config_root().parent / "docs" / PAGE).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
