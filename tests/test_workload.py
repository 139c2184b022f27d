"""Access generators: each page once where it should be, the right shares, the same on every run."""

from typing import Any

import numpy as np
import pytest

from kernels import Access, Cost, Order, Run, Spread, Touch, simulate
from kernels.cost import DEFAULT_COSTS
from kernels.simulate import BudgetError, PointError
from kernels.spec import Phase, Trace
from kernels.steps import DontNeed, HostTouch, Idle, Khugepaged, Ksm, Populate, Step, TouchList, VmmCow, WorkloadError
from kernels.workload import zipf_bins

PAGES = 512
MIB2 = 2 << 20


def counted(step: Touch, **parameters: object) -> Run:
    return simulate(memory=MIB2, steps=[step], **parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [Order.SEQUENTIAL, Order.RANDOM, Order.STRIDED])
@pytest.mark.parametrize("vcpus", [1, 3, 7])
def test_an_order_without_repetition_visits_each_page_once(order: Order, vcpus: int) -> None:
    run = counted(Touch(order=order, stride=7), vcpus=vcpus)
    assert run.counters["touches"] == run.counters["pf_fixed"] == PAGES
    assert run.gauges["pages_4k"] == PAGES


def test_spread_all_lets_every_vcpu_visit_everything() -> None:
    assert counted(Touch(spread=Spread.ALL), vcpus=4).counters["touches"] == 4 * PAGES


def test_pairs_with_a_window_read_the_window_before_they_write_it() -> None:
    run = counted(Touch(access=Access.PAIRS, window=100))
    assert (run.counters["reads"], run.counters["writes"], run.counters["cow_4k"]) == (PAGES, PAGES, PAGES)


@pytest.mark.parametrize(("access", "percent", "writes"), [(Access.MIXED, 0.0, 0), (Access.MIXED, 100.0, 20_000), (Access.READ, 100.0, 0)])
def test_write_percent_at_its_ends(access: Access, percent: float, writes: int) -> None:
    step = Touch(access=access, write_percent=percent, order=Order.RANDOM, repeat=True, touches=20_000)
    assert counted(step).counters["writes"] == writes


def test_shares_follow_their_probability() -> None:
    """Within 5 standard errors of the binomial."""
    mixed = counted(Touch(access=Access.MIXED, write_percent=30.0, order=Order.RANDOM, repeat=True, touches=40_000)).counters
    assert abs(mixed["writes"] - 12_000) < 5 * (40_000 * 0.3 * 0.7) ** 0.5
    first = counted(Touch(read_first=0.25, order=Order.RANDOM, repeat=True, touches=40_000)).counters
    assert first["writes"] == 40_000
    assert abs(first["reads"] - 10_000) < 5 * (40_000 * 0.25 * 0.75) ** 0.5


def test_first_touches_of_uniform_draws_follow_the_closed_form() -> None:
    """P pages, n draws: P (1 - (1 - 1/P)^n) pages are touched, within 5 standard errors."""
    pages, draws = 8192, 6000
    run = simulate(memory=pages * 4096, steps=[Touch(order=Order.RANDOM, repeat=True, touches=draws)])
    untouched = (1 - 1 / pages) ** draws
    error = (pages * untouched * (1 - untouched)) ** 0.5
    assert abs(run.counters["pf_fixed"] - pages * (1 - untouched)) < 5 * error


def test_zipf_prefers_few_pages_and_uniform_does_not() -> None:
    def touched(theta: float) -> int:
        return simulate(memory=1 << 28, steps=[Touch(order=Order.ZIPF, theta=theta, touches=50_000)]).counters["pf_fixed"]

    assert touched(0.0) > 2 * touched(0.99) > 4 * touched(1.5)


def test_zipf_bins_weigh_ranks_by_their_power() -> None:
    lo, cuts = zipf_bins(10_000, 1.0)
    assert (lo[0], lo[-1], cuts[-1]) == (0, 10_000, 1 << 62)
    harmonic = sum(1 / rank for rank in range(1, 10_001))
    assert cuts[0] / (1 << 62) == pytest.approx(1 / harmonic, rel=1e-3)
    assert cuts[99] / (1 << 62) == pytest.approx(sum(1 / r for r in range(1, lo[100] + 1)) / harmonic, rel=1e-3)


def test_replicates_differ_and_configurations_share_their_numbers() -> None:
    step = Touch(access=Access.MIXED, write_percent=50.0, order=Order.RANDOM, repeat=True, touches=300)
    base = counted(step, seed=3).counters
    assert counted(step, seed=3, kernel="6.1", backing="anonymous_thp").counters["writes"] == base["writes"]
    assert counted(step, seed=3, prealloc="populate").counters["writes"] == base["writes"]
    others = {counted(step, seed=3, replicate=r).counters["writes"] for r in range(1, 8)} | {counted(step, seed=4).counters["writes"]}
    assert others - {base["writes"]}


def test_touches_below_a_page_stay_on_it() -> None:
    run = counted(Touch(every=64, end=0.25))
    assert (run.counters["touches"], run.counters["pf_taken"]) == (PAGES // 4 * 64, PAGES // 4)


def test_only_the_first_vcpus_take_part() -> None:
    alone = counted(Touch(vcpus=1), vcpus=8)
    assert alone.counters["touches"] == PAGES
    assert alone.counters["tlb_ipis"] == 0


def test_errors_name_the_field_and_the_cure() -> None:
    with pytest.raises(WorkloadError, match="repeat = true"):
        counted(Touch(touches=PAGES + 1))
    with pytest.raises(WorkloadError, match="read_first"):
        counted(Touch(read_first=1.5))
    with pytest.raises(PointError, match="nearest: 4096 and 8192"):
        simulate(memory=5000, steps=[])
    with pytest.raises(PointError, match="known: anonymous"):
        simulate(backing="thp", steps=[])
    with pytest.raises(WorkloadError, match=r"6\.11 is the first"):
        simulate(kernel="6.10", prealloc="pre_fault", steps=[])
    with pytest.raises(BudgetError, match="max_events"):
        simulate(memory=MIB2, vcpus=2, steps=[Touch()], max_events=100)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Touch(touches=1.5), r"touch \(step 0\): touches = 1\.5: a whole number is needed"),  # type: ignore[arg-type]
        (Touch(think_ns=0.5), "think_ns = 0.5: a whole number"),  # type: ignore[arg-type]
        (Touch(vcpus=True), "vcpus = True: a whole number"),
        (Touch(touches="3"), "touches = '3': a whole number"),  # type: ignore[arg-type]
        (Touch(touches=1.5, every=4096.5), "every = 4096.5: .*; touches = 1.5: "),  # type: ignore[arg-type]
        (Touch(window=1 << 62), r"window = 4611686018427387904: at most 2\*\*50"),
        (HostTouch(every=4096.5), "every = 4096.5"),  # type: ignore[arg-type]
        (DontNeed(every=8192.5), "every = 8192.5"),  # type: ignore[arg-type]
        (Idle(1.5), "ns = 1.5"),  # type: ignore[arg-type]
        (VmmCow(1.5), "pages = 1.5"),  # type: ignore[arg-type]
        (VmmCow(1 << 70), r"pages = 1180591620717411303424: at most 2\*\*50"),
        (Populate(threads=1.5), "threads = 1.5"),  # type: ignore[arg-type]
        (Populate(threads=4097), r"threads = 4097: 1 \.\.\. 4096"),
        ("touch", "str.*'touch' is no step"),
        (TouchList(np.array([0]), np.array([1.5]), np.array([True])), "touch_list: gfn: whole numbers are needed, not float64"),
    ],
)
def test_a_number_of_a_step_that_is_no_whole_number_is_refused(step: Step, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        simulate(memory=MIB2, steps=[step])


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"smt": 2}, "smt = 2: .* give cores"),
        ({"memory": 4096.0}, "memory = 4096.0: a whole number"),
        ({"offset": 1.5}, "offset = 1.5: a whole number"),
        ({"khugepaged": Khugepaged(1.5)}, "khugepaged: pages_to_scan = 1.5: a whole number"),  # type: ignore[arg-type]
        ({"khugepaged": Khugepaged(1, "1")}, "khugepaged: scan_sleep_ms = '1': a whole number"),  # type: ignore[arg-type]
        ({"khugepaged": Khugepaged(1 << 70)}, r"khugepaged: pages_to_scan = .*: 1 \.\.\. 2\*\*32"),
        ({"ksm": Ksm(10, 0.5)}, "ksm: sleep_ms = 0.5: a whole number"),  # type: ignore[arg-type]
        ({"max_events": 1 << 63, "khugepaged": Khugepaged(1 << 32, 1)}, "max_events = 9223372036854775808: an integer from 1 to"),
        ({"max_events": 1.5}, "max_events = 1.5"),
        ({"max_events": -1}, "max_events = -1"),
        ({"trace_rows": -1}, "trace_rows = -1"),
        ({"trace_rows": 0.5}, "trace_rows = 0.5"),
    ],
)
def test_a_parameter_that_cannot_be_is_named_with_its_value(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(PointError, match=words):
        simulate(**{"memory": MIB2, "backing": "anonymous_thp", "steps": [Touch()]} | parameters)


def test_whole_numbers_of_numpy_are_taken() -> None:
    run = simulate(memory=MIB2, vcpus=2, steps=[Touch(touches=np.int64(3), vcpus=np.int32(1))])  # type: ignore[arg-type]
    assert run.counters["touches"] == 3


def test_a_budget_of_events_that_no_counter_holds_is_the_largest_one() -> None:
    """khugepaged, 2**32 pages a millisecond, for as long as 512 touches take if each meets every cost."""
    costs = DEFAULT_COSTS | {Cost.FORK_NS: 10**12}
    run = simulate(memory=MIB2, backing="anonymous_thp", khugepaged=Khugepaged(1 << 32, 1), costs=costs, steps=[Touch()])
    assert run.counters["touches"] == 512


def test_a_trace_shows_the_accesses_in_order() -> None:
    run = simulate(memory=MIB2, steps=[Touch(touches=3)], trace_rows=100)
    touched = [row[Trace.GFN] for row in run.trace.tolist() if row[Trace.PHASE] == Phase.MAP_HELD]
    assert touched == [0, 1, 2]
    first, last = run.trace.tolist()[0], run.trace.tolist()[-1]
    assert (first[Trace.PHASE], first[Trace.TIME], first[Trace.GFN], first[Trace.WRITE]) == (Phase.TOUCH, 0, 0, 1)
    assert (last[Trace.PHASE], last[Trace.TIME]) == (Phase.DONE, run.total_ns)
