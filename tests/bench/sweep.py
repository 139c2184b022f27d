"""Figures of sweeps: points that cost nothing themselves, and how well two workers share those that do.

`python -m tests.bench.sweep [--points N]`. Times are CPU time of the whole process tree (each run is a process of its own, which waits
for all it starts), so that other work on the machine changes little; sizes follow N.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from json import loads
from pathlib import Path
from statistics import median

import pyarrow.compute as pc
import pyarrow.dataset as ds

import sweep
from sweep.dataset.store import Store
from sweep.left import done_now, kept_of
from sweep.plan import Plan
from sweep.study import load_study
from sweep.verify import verify
from tests.bench.figures import ROOT, Figure
from tests.bench.table import line

POINTS = 1_000_000
WORKERS = 2
FIRST_SECONDS = 120.0  # to wait for a first result
STUDY = """[study]
name = "{name}"
replicates = {replicates}
budget_cpu_hours = 100000
[point]
{point}
[[block]]
grid = {{ {grid} }}
"""
TRIVIAL = 'workload = "nothing"\nmemory = "4KiB"'
MACHINES = 'kernel = ["6.1", "6.12"], vcpus = {{ range = [1, {vcpus}] }}, thp_failure = {{ linspace = [0.0, 1.0, {chances}] }}'
KERNELS = ["5.15", "5.18", "6.1", "6.2", "6.6", "6.8", "6.10", "6.12", "6.13", "6.18"]
OTHERS = (
    'thp_failure = {{ linspace = [0.0, 1.0, {chances}] }}, kernel = ["5.15", "5.18", "6.1", "6.6", "6.12"], vcpus = {{ range = [1, 101] }}'
)
WORK = """
[workload.work]
steps = [{{ op = "touch", access = "mixed", write_percent = 50.0, order = "random", repeat = true, touches = {touches} }}]
"""
QUERY = "select kernel, vcpus, avg(total_ns) as mean, quantile_cont(total_ns, 0.99) as p99 from points group by all order by all"


@dataclass(frozen=True)
class Ran:
    """What a run of a study took (tests.bench.driver)."""

    out: Path
    points: int
    wall_s: float
    cpu_s: float
    driver_cpu_s: float
    seal_cpu_s: float
    peak_bytes: int

    @property
    def workers_cpu_s(self) -> float:
        return self.cpu_s - self.driver_cpu_s - self.seal_cpu_s


class Bench:
    """A folder with studies, and what was run of them."""

    def __init__(self, folder: Path, points: int) -> None:
        self.folder, self.points = folder, points

    def study(self, name: str, grid: str, point: str = TRIVIAL, replicates: int = 1, more: str = "") -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(STUDY.format(name=name, grid=grid, point=point, replicates=replicates) + more)
        return path

    def run(self, study: Path, executor: str) -> Ran:
        """The study, from nothing to sealed, in a process of its own."""
        out = self.folder / f"{study.stem}-{executor}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "tests.bench.driver", str(study), str(out), executor, str(WORKERS)]
        ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return Ran(out=out, **loads(ran.stdout))

    def working(self, name: str, touches: int, replicates: int) -> Path:
        """Points that take faults, each with other random numbers."""
        return self.study(name, f"kernel = {KERNELS}", 'workload = "work"\nmemory = "8MiB"', replicates, WORK.format(touches=touches))

    @cached_property
    def one(self) -> Path:
        return self.study("one", "vcpus = [1]")

    @cached_property
    def machines(self) -> Path:
        """Each point another configuration."""
        return self.study("trivial", MACHINES.format(vcpus=51, chances=max(1, self.points // 100)))

    @cached_property
    def trivial(self) -> Ran:
        return self.run(self.machines, "local")


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of this process, with all its threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def trivial(bench: Bench) -> Iterator[Figure]:
    one, ran = bench.run(bench.one, "local"), bench.trivial
    sealing = ran.seal_cpu_s / ran.points * 1e6
    text = f"{ran.points:,} points, each another configuration, 2 local workers, sealed; of it sealing {sealing:.1f} us"
    yield Figure("CPU per trivial point, whole tree", ran.cpu_s / ran.points * 1e6, 25, 5, "us", text)
    text = f"peak of the driver: {one.peak_bytes / 1e6:.0f} MB with one point, {ran.peak_bytes / 1e6:.0f} MB"
    yield Figure(f"driver memory, 1 -> {ran.points:,} points", (ran.peak_bytes - one.peak_bytes) / 1e6, 32, 10, "MB", text)
    verifying = cpu_seconds(lambda: _checked(ran.out))
    seconds = ran.driver_cpu_s + ran.workers_cpu_s / WORKERS + ran.seal_cpu_s + verifying
    text = (
        f"CPU: driver {ran.driver_cpu_s:.1f} + workers {ran.workers_cpu_s:.1f} / 2 + seal {ran.seal_cpu_s:.1f} + verify {verifying:.1f} s"
    )
    yield Figure(f"{ran.points:,} points, plan to verified", seconds, 60, 15, "s", f"{text}; wall time of the run here: {ran.wall_s:.0f} s")


def _checked(out: Path) -> None:
    if wrong := verify(out).wrong:
        raise RuntimeError(wrong[0])


def other_machines(bench: Bench) -> Iterator[Figure]:
    for name, grid, replicates, what in (
        ("replicates", MACHINES.format(vcpus=51, chances=max(1, bench.points // 10_000)), 100, "100 replicates of each configuration"),
        ("others", OTHERS.format(chances=max(1, bench.points // 500)), 1, "each point another number of vCPUs than the one before"),
    ):
        ran = bench.run(bench.study(name, grid, replicates=replicates), "inline")
        text = f"{ran.points:,} points, inline, sealed; of it sealing {ran.seal_cpu_s / ran.points * 1e6:.1f} us"
        yield Figure(f"the same, {what}", ran.cpu_s / ran.points * 1e6, 25, 5, "us", text)


def left(bench: Bench) -> Iterator[Figure]:
    ran = bench.trivial
    more = bench.study("more", MACHINES.format(vcpus=52, chances=max(1, bench.points // 100)))
    more.write_text(more.read_text().replace('name = "more"', 'name = "trivial"'))
    for study, what, asked in ((bench.machines, "all done", 1.0), (more, "done but for one more vCPU", 10.0)):
        found: list[int] = []

        def decide(study: Path = study, found: list[int] = found) -> None:
            plan = Plan(load_study(study))
            kept = kept_of(plan)
            found.append(int((kept & ~done_now(plan, Store(ran.out), kept)).sum()))

        seconds = cpu_seconds(decide)
        text = f"study read, plan made, records read; {found[0]:,} points are left"
        yield Figure(f"what is left, {ran.points:,} points {what}", seconds, asked, 0.3, "s", text)


def on_disk(bench: Bench) -> Iterator[Figure]:
    ran = bench.trivial
    nbytes = sum(path.stat().st_size for table in ("points", "steps", "errors") for path in (ran.out / table).glob("*"))
    text = "sealed: all columns of points and steps, whose counts are 0"
    yield Figure("bytes per trivial point on disk", nbytes / ran.points, 300, 150, "B", text)
    worked = bench.run(bench.working("worked", 2000, max(1, bench.points // 200)), "local")
    nbytes = sum(path.stat().st_size for table in ("points", "steps", "errors") for path in (worked.out / table).glob("*"))
    text = f"{worked.points:,} points of 2,000 mixed touches each, whose counts and times differ"
    yield Figure("bytes per point with faults on disk", nbytes / worked.points, 300, 150, "B", text)


def query(bench: Bench) -> Iterator[Figure]:
    dataset = sweep.open_dataset(bench.trivial.out)
    seconds = median([cpu_seconds(lambda: dataset.sql(QUERY)) for _ in range(5)])
    yield Figure(
        f"grouped mean and p99, {bench.trivial.points:,} rows", seconds, 1, 0.1, "s", "100 groups, faultsweep query; median of five"
    )


def first_result(bench: Bench) -> Iterator[Figure]:
    for executor, asked, aim in (("local", 2, 1), ("ray", 8, 4)):
        found = sorted([_first(bench, executor) for _ in range(3)])
        text = f"CPU of the whole tree from start to the first commit, median of three; wall time here: {found[1][1]:.1f} s"
        yield Figure(f"start to first result, {executor}", found[1][0], asked, aim, "s CPU", text)


def _first(bench: Bench, executor: str) -> tuple[float, float]:
    """(CPU, wall) seconds until a fresh run has committed something."""
    out = bench.folder / "first"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sweep", "run", str(bench.one), "--out", str(out), "--executor", executor, "--workers", "2", "-q"]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while time.monotonic() < start + FIRST_SECONDS and process.poll() is None:
            if list((out / "commits").glob("*.json")) or (out / "sealed.json").exists():
                break
            time.sleep(0.005)
        return _cpu_of(process.pid), time.monotonic() - start


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process and its descendants, dead ones that were waited for included."""
    ticks, children = 0, dict[int, list[int]]()
    used: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        number = int(path.parent.name)
        children.setdefault(int(fields[1]), []).append(number)
        used[number] = sum(map(int, fields[11:15]))
    left = [pid]
    while left:
        each = left.pop()
        ticks += used.get(each, 0)
        left += children.get(each, ())
    return ticks / os.sysconf("SC_CLK_TCK")


def efficiency(bench: Bench) -> Iterator[Figure]:
    for ms, touches, points, asked, aim in (
        (1, 375_000, bench.points // 32, 0.95, 0.99),
        (100, 47_000_000, bench.points // 3200, 0.97, 0.995),
    ):
        studies = bench.working(f"work{ms}", touches, max(1, points // len(KERNELS))), bench.working(f"begun{ms}", 1, 4)
        inline, local = ([bench.run(study, executor) for study in studies] for executor in ("inline", "local"))
        alone, shared = (ran[0].cpu_s - ran[1].cpu_s for ran in (inline, local))
        balance = _balance(local[0].out)
        text = (
            f"{inline[0].points:,} points of {alone / inline[0].points * 1e3:.2f} ms; CPU {alone:.1f} s inline, "
            f"{shared:.1f} s with two workers, whose work is {balance:.1%} even; starting left out"
        )
        yield Figure(f"efficiency of 2 workers, {ms} ms points", alone / shared * balance, asked, aim, "", text, more_is_better=True)


def _balance(out: Path) -> float:
    """The mean of the workers' times over the longest."""
    times = ds.dataset(sorted((out / "provenance").glob("*.parquet"))).to_table(["worker", "wall_ns"])
    sums = times.group_by("worker").aggregate([("wall_ns", "sum")]).column("wall_ns_sum")
    return float(pc.mean(sums).as_py() / pc.max(sums).as_py()) if len(sums) == WORKERS else 1 / WORKERS


GROUPS: tuple[Callable[[Bench], Iterator[Figure]], ...] = (trivial, other_machines, left, on_disk, query, first_result, efficiency)


def figures(points: int = POINTS) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), points)
        for group in GROUPS:
            yield from group(bench)


def main() -> int:
    parser = argparse.ArgumentParser(description="Figures of sweeps, asked and measured.")
    parser.add_argument("--points", type=int, default=POINTS, help="of the sweep of trivial points; all else follows (default 1,000,000)")
    for figure in figures(parser.parse_args().points):
        print(f"{line(figure)}\n    {figure.method}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
