"""What is written down of a run: a row of whole numbers for each step and for each point, filled by compiled code."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kernels.jit import jit, shared
from kernels.spec import HIST_BUCKETS, Counter, Gauge, Vm
from kernels.state import Int64s, Machine, bucket_top, latency_bucket

COUNTERS = tuple(counter.name.lower() for counter in Counter)
GAUGES = tuple(gauge.name.lower() for gauge in Gauge)
PERCENTILES: Mapping[str, tuple[int, int]] = {
    "fault_p50_ns": (50, 100),
    "fault_p90_ns": (90, 100),
    "fault_p99_ns": (99, 100),
    "fault_p999_ns": (999, 1000),
}
LATENCIES = (*PERCENTILES, "fault_max_ns")
VALUES = (*COUNTERS, *GAUGES, "guest_ns", "total_ns", *LATENCIES)
"""Columns of a row: of a step, its own counters and times, the state after it; of a point, sums, and the state at its end."""
WIDTH = len(VALUES)
FIRST_GAUGE = len(COUNTERS)
GUEST_NS, TOTAL_NS, FAULT_MAX_NS = (VALUES.index(name) for name in ("guest_ns", "total_ns", "fault_max_ns"))
FIRST_LATENCY = VALUES.index(LATENCIES[0])
PARTS = tuple(PERCENTILES.values())
TOO_LONG = np.int64(-4)  # a reason, beside those of engine.py: the step might end after NEVER


class At(IntEnum):
    """Index of Results.at: how far they are, and why the last point came to no end."""

    STEPS = 0  # rows
    POINTS = 1
    BUCKETS = 2  # of `hist` that are in use
    POINTS_STEPS = 3  # row of the present point's first step
    FAILED_STEP = 4  # of the point
    REASON = 5  # what its loop returned


class Results(NamedTuple):
    """Rows of steps and points, as many as there is room for."""

    steps: Int64s  # (rows, WIDTH)
    points: Int64s  # (rows, WIDTH)
    hists: Int64s  # (rows, HIST_BUCKETS) fault latencies of each step; 0 rows: they are not kept
    hist: Int64s  # (HIST_BUCKETS,) of the point so far
    at: Int64s  # (len(At),)


def new_results(steps: int, points: int, hists: bool = False) -> Results:
    """Room for so many steps of so many points."""
    return Results(
        steps=np.zeros((steps, WIDTH), np.int64),
        points=np.zeros((points, WIDTH), np.int64),
        hists=np.zeros((steps if hists else 0, HIST_BUCKETS), np.int64),
        hist=np.zeros(HIST_BUCKETS, np.int64),
        at=np.zeros(len(At), np.int64),
    )


@jit
def begin_row(results: Results) -> None:
    """The row of a point that begins."""
    for bucket in range(results.at[At.BUCKETS]):
        results.hist[bucket] = 0
    results.at[At.BUCKETS] = 0
    results.at[At.POINTS_STEPS] = results.at[At.STEPS]
    for i in range(WIDTH):
        results.points[results.at[At.POINTS], i] = 0


@jit
def give_up(results: Results, step: int, reason: int) -> None:
    """The point's rows are written over by the next."""
    results.at[At.STEPS] = results.at[At.POINTS_STEPS]
    results.at[At.FAILED_STEP] = step
    results.at[At.REASON] = reason


@jit
def end_row(results: Results) -> None:
    point = results.at[At.POINTS]
    write_latencies(results.points, point, results.hist, results.points[point, FAULT_MAX_NS])
    results.at[At.POINTS] = point + 1


@jit
def percentile(hist: Int64s, faults: int, fault_max_ns: int, part: int, whole: int) -> int:
    """The top of the bucket in which that part of the latencies ends, never above the largest."""
    rank = max(1, -(-faults * part // whole))
    bucket, below = 0, hist[0]
    while below < rank:
        bucket += 1
        below += hist[bucket]
    return min(fault_max_ns, bucket_top(bucket))


@shared
def write_latencies(rows: Int64s, row: int, hist: Int64s, fault_max_ns: int) -> None:
    """Percentiles of a histogram, and the largest; 0 without a fault, and where faults take no time."""
    rows[row, FAULT_MAX_NS] = fault_max_ns
    faults = 0
    if fault_max_ns:
        for bucket in range(latency_bucket(fault_max_ns) + 1):
            faults += hist[bucket]
    for i in range(len(PARTS)):
        rows[row, FIRST_LATENCY + i] = percentile(hist, faults, fault_max_ns, PARTS[i][0], PARTS[i][1]) if faults else 0


@jit
def add_latencies(m: Machine, results: Results, row: int) -> None:
    """To those of the point."""
    used = latency_bucket(m.vm[Vm.FAULT_MAX_NS]) + 1
    results.at[At.BUCKETS] = max(results.at[At.BUCKETS], used)
    for bucket in range(used):
        results.hist[bucket] += m.hist[bucket]
        if len(results.hists):
            results.hists[row, bucket] = m.hist[bucket]


@shared
def write_row(m: Machine, results: Results, ns: int, guest_ns: int) -> None:
    """The step that was run, by itself and in the row of its point; `guest_ns` are those of it that are the guest's."""
    row, point = results.at[At.STEPS], results.at[At.POINTS]
    for i in range(len(m.counters)):
        results.steps[row, i] = m.counters[i]
        results.points[point, i] += m.counters[i]
    for i in range(len(m.gauges)):
        results.steps[row, FIRST_GAUGE + i] = results.points[point, FIRST_GAUGE + i] = m.gauges[i]
    results.steps[row, TOTAL_NS] = ns
    results.steps[row, GUEST_NS] = guest_ns
    results.points[point, TOTAL_NS] += ns
    results.points[point, GUEST_NS] += guest_ns
    write_latencies(results.steps, row, m.hist, m.vm[Vm.FAULT_MAX_NS])
    results.points[point, FAULT_MAX_NS] = max(results.points[point, FAULT_MAX_NS], m.vm[Vm.FAULT_MAX_NS])
    add_latencies(m, results, row)
    results.at[At.STEPS] = row + 1
