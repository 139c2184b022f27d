"""The figures of `make bench`, each with what is asked at least, what is aimed at, and its method."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels import Access, Order, Touch, simulate
from kernels.alone import new_scratch
from kernels.spec import Counter
from sweep.configs import Workload
from sweep.parameters import Point
from sweep.predict import predict_seconds
from sweep.steps import TouchStep
from tests.bench.guest import GIB, RUNS, TIB, Guest, medians, mixed
from tests.bench.loops import LoopInC, gather_seconds

TOUCHES_PER_PAGE = 4  # a third of them fault
PMD = 2 << 20
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Figure:
    """`asked` is a limit from above, or from below where more is better."""

    name: str
    measured: float
    asked: float
    aim: float
    unit: str
    method: str
    more_is_better: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.asked if self.more_is_better else self.measured <= self.asked


def first_touches(memory: int) -> Guest:
    """Uniform mixed touches of a guest that has nothing yet."""
    return Guest(memory=memory, steps=[mixed(memory // 4096 * TOUCHES_PER_PAGE)])


def uniform() -> Iterator[Figure]:
    for memory, name, asked, aim, runs in ((16 * GIB, "16 GiB", 1.5, 1.15, 9), (GIB, "1 GiB", 1.8, 1.1, 31)):
        guest = first_touches(memory)
        mine, least = medians(guest.fresh, lambda g=guest: gather_seconds(g), runs=runs)  # type: ignore[misc]
        ns, least_ns = mine / guest.touches * 1e9, least / guest.touches * 1e9
        text = f"{ns:.2f} ns a touch ({guest.faulting():.0%} fault) over {least_ns:.2f} ns of random read-modify-write and generation alone"
        yield Figure(f"uniform mixed, 4K, {name}: over gather + generation", ns / least_ns, asked, aim, "x", text)


def faults_against_hits() -> Iterator[Figure]:
    guest = Guest(memory=16 * GIB, steps=[Touch(), mixed(16 * GIB // 4096 * TOUCHES_PER_PAGE)])

    def hits() -> float:
        guest.step(0)  # all pages are there and writable
        return guest.step(1)

    def faults() -> float:
        guest.reset()
        return guest.step(1)

    missed, hit = medians(faults, hits)
    text = f"the same touches of 16 GiB, first (a third fault) and after a write of every page: {hit / guest.touches * 1e9:.2f} ns a hit"
    yield Figure("uniform mixed over all hits, 4K", missed / hit, 1.5, 1.2, "x", text)


def sequence() -> Iterator[Figure]:
    guest = Guest(memory=16 * GIB, steps=[Touch()])
    (seconds,) = medians(guest.fresh, runs=31)
    yield Figure(
        "sequential first touch, 4K", guest.touches / seconds, 1e9, 2e10, "touches/s", "16 GiB, one pass of writes", more_is_better=True
    )


def growth() -> Iterator[Figure]:
    for backing, name, asked, aim in (("anonymous", "4K", 10.0, 5.0), ("anonymous_thp", "THP", 2.0, 1.6)):
        steps = [Touch(every=PMD), mixed(1 << 24)]
        small, large = (Guest(memory=memory, backing=backing, steps=steps) for memory in (GIB, TIB))
        few, many = medians(small.fresh, large.fresh)
        text = f"2**24 mixed touches after one of each region: {few / 2**24 * 1e9:.2f} and {many / 2**24 * 1e9:.2f} ns"
        yield Figure(f"growth from 1 GiB to 1 TiB, uniform mixed, {name}", many / few, asked, aim, "x", text)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state() -> Iterator[Figure]:
    pages = 64 * GIB // 4096
    for backing, name, asked, aim in (("anonymous", "4K", 2.0, 1.0), ("anonymous_thp", "THP only", 0.02, 0.005)):
        simulate(memory=PMD, backing=backing, steps=[Touch()])
        guest = None
        before = resident()
        guest = Guest(memory=64 * GIB, backing=backing, steps=[Touch()])
        scratch = new_scratch(guest.machine)
        scratch.modes[:] = 0
        text = "growth of the process's resident memory by a 64 GiB guest, all touched, with the loop's scratch"
        yield Figure(f"state per 4 KiB of the guest, {name}", (resident() - before) / pages, asked, aim, "B", text)


def against_c() -> Iterator[Figure]:
    if not LoopInC.possible():
        return
    loop = LoopInC()
    guest = Guest(memory=16 * GIB, steps=[Touch(every=PMD), mixed(16 * GIB // 4096 * TOUCHES_PER_PAGE)])
    loop.learn()

    def in_c() -> float:
        guest.reset()
        guest.step(0)
        return loop.seconds(guest)

    mine, theirs = medians(guest.fresh, in_c)
    guest.fresh()
    same = "the same counts" if loop.agrees() else "DIFFERENT COUNTS"
    ns, ns_in_c = mine / guest.touches * 1e9, theirs / guest.touches * 1e9
    text = f"16 GiB, uniform mixed: {ns:.2f} ns against {ns_in_c:.2f} ns (gcc -O3 -march=native), {same}"
    yield Figure("lone vCPU's loop over the same in C", mine / theirs, 1.15, 1.0, "x", text)


COMPILE = """
import time
from kernels import Call, DirtyLog, Ksm, Touch, simulate
for parameters in ({}, {"vcpus": 2}, {"ksm": Ksm()}, {"steps": [DirtyLog(Call.LOG_ON)]}):
    simulate(**{"memory": 2 << 20, "steps": [Touch()]} | parameters)
print(time.process_time())
"""


NUMBA_ALONE = """
import time
import numba
numba.njit(lambda x: x)(1)
print(time.process_time())
"""


def start() -> Iterator[Figure]:
    def seconds(program: str, folder: str) -> float:
        environment = os.environ | {"FAULTSWEEP_CACHE_DIR": folder}
        ran = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return float(ran.stdout)

    with tempfile.TemporaryDirectory() as folder:
        cold = seconds(COMPILE, folder)
        warm, alone = medians(lambda: seconds(COMPILE, folder), lambda: seconds(NUMBA_ALONE, folder))
    text = "CPU of a new process that imports kernels and runs each of the four loops once"
    yield Figure("warm start of all kernels", warm, 0.5, 0.25, "s CPU", f"{text}, compiled before; numba alone takes {alone:.2f} s")
    yield Figure("cold compile of all kernels", cold, 10.0, 4.0, "s CPU", f"{text}, with an empty cache; one run")


def many() -> Iterator[Figure]:
    hits = [Guest(memory=GIB, vcpus=n, steps=[Touch(), Touch(access=Access.READ)]) for n in (1, 1024)]
    one, most = medians(*[lambda g=g: g.step_as_many(1) / g.touches for g in hits], runs=3)  # type: ignore[misc]
    text = f"1 GiB, 4K, event loop for both: {one * 1e9:.1f} and {most * 1e9:.1f} ns a hit"
    yield Figure("hits: 1024 vCPUs over 1", most / one, 1.3, 1.3, "x", text)
    faults = [Guest(memory=GIB, vcpus=n, steps=[Touch()]) for n in (1, 1024)]
    one, most = medians(*[lambda g=g: g.fresh(event_loop=True) / g.events for g in faults], runs=3)  # type: ignore[misc]
    text = f"1 GiB, 4K, first touch of all, event loop for both: {one * 1e9:.0f} and {most * 1e9:.0f} ns an event"
    yield Figure("all touches fault: 1024 vCPUs over 1", most / one, 4.0, 4.0, "x", text)


def skipping() -> Iterator[Figure]:
    for order in (Order.RANDOM, Order.ZIPF):
        touches = Touch(access=Access.MIXED, write_percent=30.0, order=order, repeat=True, touches=10**12, skip_hits=True)
        guest = Guest(memory=16 * GIB, steps=[touches])
        (seconds,) = medians(guest.fresh)
        faults = int(guest.machine.counters[Counter.PF_FIXED])
        text = f"10**12 mixed touches of 16 GiB, {faults:,} faults"
        yield Figure(f"skip_hits, {order.name.lower()}: per fault", seconds / faults * 1e9, 40.0, 20.0, "ns", text)


def prediction() -> Iterator[Figure]:
    point = Point.model_validate({"memory": "16GiB", "vcpus": 64, "workload": "first_touch"})
    workload = Workload("first_touch", (TouchStep(op="touch"),), Path())
    guest = Guest(memory=16 * GIB, vcpus=64, steps=[Touch()])
    (seconds,) = medians(lambda: guest.fresh(event_loop=True), runs=3)
    predicted = predict_seconds(point, workload)
    text = f"16 GiB, 4K pages, all touched once by 64 vCPUs: {predicted:.2f} s predicted, {seconds:.2f} s; the larger over the smaller"
    yield Figure("prediction of seconds", max(predicted / seconds, seconds / predicted), 1.5, 1.5, "x", text)


GROUPS: tuple[Callable[[], Iterator[Figure]], ...] = (
    uniform,
    faults_against_hits,
    sequence,
    growth,
    state,
    against_c,
    start,
    many,
    skipping,
    prediction,
)
__all__ = ["GROUPS", "RUNS", "Figure"]
