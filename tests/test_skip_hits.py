"""skip_hits: the same distribution as touches made one by one, the same bits as the reference, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import Access, DirtyLog, Fork, Ksm, Order, Touch, reference, simulate
from kernels.blocks import BLOCK
from kernels.checks import PointError
from kernels.reference_skip import order as permutation
from kernels.reference_workload import draw
from kernels.spec import Call
from kernels.steps import WorkloadError
from sweep.steps import TouchStep, build_step

MIB = 1 << 20
FIGURES = ("pf_taken", "cow_4k", "zero_page_maps", "reads", "hits")


def touches(n: int, skip: bool = True, **changes: Any) -> Touch:
    fields = {"access": Access.MIXED, "write_percent": 30.0, "order": Order.RANDOM, "repeat": True} | changes
    return Touch(touches=n, skip_hits=skip, **fields)


@pytest.mark.parametrize(("order", "theta"), [(Order.RANDOM, 0.99), (Order.ZIPF, 0.99), (Order.ZIPF, 2.0)])
@pytest.mark.parametrize("n", [700, 6000])
def test_the_distribution_is_that_of_touches_made_one_by_one(order: Order, theta: float, n: int) -> None:
    """Means within 4 standard errors of their difference, spreads within a factor that 120 runs allow."""
    runs = 120

    def figures(skip: bool, seed: int) -> list[int]:
        counters = simulate(memory=4 * MIB, seed=seed, steps=[touches(n, skip, order=order, theta=theta)]).counters
        return [counters[name] for name in FIGURES]

    found = [np.array([figures(skip, seed + 1000 * skip) for seed in range(runs)]) for skip in (False, True)]
    plain, skipped = found
    error = np.sqrt((plain.var(axis=0) + skipped.var(axis=0)) / runs)
    assert np.all(np.abs(plain.mean(axis=0) - skipped.mean(axis=0)) < 4 * error)
    ratio = plain.std(axis=0) / skipped.std(axis=0)
    assert np.all((ratio > 0.7) & (ratio < 1.4))


STEPS = st.builds(
    touches,
    st.integers(0, 3000),
    order=st.sampled_from((Order.RANDOM, Order.ZIPF)),
    access=st.sampled_from((Access.MIXED, Access.MIXED, Access.WRITE, Access.READ)),
    write_percent=st.sampled_from((0.0, 3.0, 50.0, 100.0)),
    theta=st.sampled_from((0.0, 0.5, 0.99, 1.0, 3.0, 8.0)),
    every=st.sampled_from((4096, 4096, 12288)),
    start=st.sampled_from((0.0, 0.25)),
    think_ns=st.sampled_from((0, 7)),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(STEPS, min_size=1, max_size=3),
    st.sampled_from(("anonymous", "shmem", "anonymous_hugetlb_2mb", "private_memfd")),
    st.sampled_from(("tdp", "legacy")),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**64 - 1),
)
def test_kernels_and_reference_draw_the_same(steps: list[Touch], backing: str, mmu: str, fork: bool, log: bool, seed: int) -> None:
    before: list[Any] = [Touch(access=Access.READ, vcpus=1), Fork()] if fork and backing == "anonymous" else []
    before += [DirtyLog(Call.LOG_ON)] if log else []
    configuration: dict[str, Any] = {"memory": 2 * MIB, "backing": backing, "mmu": mmu, "steps": [*before, *steps], "seed": seed}
    mine, theirs = simulate(**configuration), reference.simulate(**configuration)
    for step, expected in zip(mine.steps, theirs.steps, strict=True):
        assert (step.counters, step.gauges, step.ns) == (expected.counters, expected.gauges, expected.ns)


@pytest.mark.parametrize("order", [Order.RANDOM, Order.ZIPF])
def test_queues_that_are_filled_again_are_those_of_the_reference(order: Order) -> None:
    """Several blocks of several queues, of a number of units that is no power of two."""
    configuration: dict[str, Any] = {"memory": 13 * MIB, "steps": [touches(30_000, order=order)], "seed": 5}
    mine, theirs = simulate(**configuration), reference.simulate(**configuration)
    assert mine.counters["pf_taken"] > 3 * BLOCK
    for step, expected in zip(mine.steps, theirs.steps, strict=True):
        assert (step.counters, step.gauges, step.ns) == (expected.counters, expected.gauges, expected.ns)


@pytest.mark.parametrize("order", [Order.RANDOM, Order.ZIPF])
@pytest.mark.parametrize("access", [Access.MIXED, Access.READ, Access.WRITE])
def test_each_unit_is_read_and_written_first_once(order: Order, access: Access) -> None:
    """As long as it takes: whatever touches are left are hits."""
    run = simulate(memory=3 * MIB, steps=[touches(10**13, order=order, access=access)])
    units = 3 * MIB // 4096
    firsts = run.counters["touches"] - run.counters["hits"]
    assert run.gauges["rss_bytes"] == 3 * MIB if access != Access.READ else run.counters["zero_page_maps"] == units
    assert units <= firsts <= 2 * units


def test_an_order_is_as_random_as_a_shuffle() -> None:
    """How many of the first half come to lie in the first half: hypergeometric. Four rounds, not five, are a fifth above its variance."""
    n, keys = 64, 2000
    half = range(n // 2)
    found = np.array([sum(place(i) < n // 2 for i in half) for place in (permutation(draw(7, 0, key), n) for key in range(keys))])
    variance = n / 16 * n / (n - 1)
    assert abs(found.mean() - n / 4) < 4 * np.sqrt(variance / keys)
    assert abs(found.var() / variance - 1) < 4 * np.sqrt(2 / keys)


def test_hits_cost_nothing_to_simulate_and_all_their_time() -> None:
    run = simulate(memory=MIB, steps=[touches(10**12)])
    assert run.counters["touches"] == 10**12
    assert run.counters["hits"] >= 10**12 - 512
    assert run.guest_ns > 20 * 10**12
    assert run.gauges["rss_bytes"] == MIB


@pytest.mark.parametrize(
    ("step", "parameters", "words"),
    [
        (touches(9, order=Order.SEQUENTIAL), {}, "order"),
        (touches(9, repeat=False), {}, "repeat"),
        (touches(9, access=Access.PAIRS), {}, "access"),
        (touches(9, read_first=0.5), {}, "read_first"),
        (touches(9, every=100), {}, "every"),
        (touches(2**48, think_ns=10**12), {}, "think_ns"),
        (touches(9), {"vcpus": 2}, "vcpus = 1"),
        (touches(9), {"ksm": Ksm()}, "KSM"),
        (touches(9), {"trace_rows": 10}, "trace"),
        (touches(900), {"backing": "anonymous_thp"}, "split"),
    ],
)
def test_what_cannot_be_skipped_is_refused(step: Touch, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises((PointError, WorkloadError), match=words):
        simulate(**{"memory": 4 * MIB, "steps": [step]} | parameters)


def test_a_study_can_ask_for_it(tmp_path: Path) -> None:
    """Every field of a touch step reaches the kernels."""
    spec = TouchStep(op="touch", order="zipf", touches=10**12, skip_hits=True)
    assert build_step(spec, tmp_path) == touches(10**12, order=Order.ZIPF, access=Access.WRITE, write_percent=100.0, repeat=False)
