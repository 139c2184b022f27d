"""The statistical oracle: uniform touches with repetition, against closed forms of the occupancy problem.

n touches go to uniformly drawn places (pages, or regions), each a write with probability w. A place's first touch is a
read (Z places) or a write (F); of those read first some are written later (C). All three are counters of the simulator.
With p = 1 / places, q = (1 - p)^n the chance that a place stays untouched, and first kinds independent of the places drawn:

    E[Z] = places (1 - w) (1 - q)        E[F] = places w (1 - q)        E[C] = places ((1 - (1 - p w)^n) - w (1 - q))

for a place of C is one that is written (never: (1 - p w)^n), but not one whose first touch is a write.
"""

from collections.abc import Mapping
from itertools import product
from math import log, sqrt
from statistics import fmean, variance
from typing import NamedTuple

import pytest

from kernels import Access, Order, Run, Touch, simulate

PAGE, MIB2 = 4096, 2 << 20
SEEDS = range(64)
CHANCE = 1e-6  # of a single run outside its bound


class Moments(NamedTuple):
    mean: float
    variance: float
    binomial: float  # the variance if places were independent


def moments(places: int, both: float, one: float) -> Moments:
    """Of the number of places with a property: `one` is a place's probability of it, `both` that of two certain places."""
    mean = places * one
    return Moments(mean, mean + places * (places - 1) * both - mean * mean, mean * (1 - one))


def occupancy(places: int, n: int, w: float) -> tuple[Moments, Moments, Moments]:
    """Z, F, C. For two places, with T: touched, W: ever written, F: first touch a write, C = W and not F as indicators:

    P(T T) = 1 - 2 (1 - p)^n + (1 - 2 p)^n, of which (1 - w)^2 for Z Z, w^2 for F F; P(W W) the same with p w for p;
    P(W1 F2) = w (P(T2) - P(T2, not W1)) = w ((1 - q) - ((1 - p w)^n - (1 - p w - p)^n)); C C = W W - 2 W F + F F.
    """
    p = 1 / places
    q, unwritten = (1 - p) ** n, (1 - p * w) ** n
    touched = 1 - 2 * q + (1 - 2 * p) ** n
    written = 1 - 2 * unwritten + (1 - 2 * p * w) ** n
    mixed = w * ((1 - q) - (unwritten - (1 - p * w - p) ** n))
    return (
        moments(places, (1 - w) ** 2 * touched, (1 - w) * (1 - q)),
        moments(places, w * w * touched, w * (1 - q)),
        moments(places, written - 2 * mixed + w * w * touched, (1 - unwritten) - w * (1 - q)),
    )


def bound(expected: Moments) -> float:
    """How far a single run may be off, but for CHANCE: Bernstein's inequality, which holds as if places were independent.

    The numbers of touches per place are negatively associated (multinomial), and given the kinds of each place's touches,
    which are independent of them, each of the three properties is monotone in its place's number (Z and F: from one touch on;
    C: from the first write behind a read on). So E exp(x sum) <= product of E exp(x each), and
    P(|off| >= t) <= 2 exp(-t^2 / (2 (v + t / 3))) with the binomial variance v; solved for t.
    """
    strength = log(2 / CHANCE)
    return strength / 3 + sqrt(strength**2 / 9 + 2 * strength * expected.binomial)


def check(counts: list[int], expected: Moments) -> None:
    """Each run; their mean within 4 standard errors, by the exact variance; and that they vary as much as they should.

    s^2 / variance of 64 nearly normal counts has a standard deviation of sqrt(2 / 63) = 0.18: 0.3 ... 1.9 is 4 or more."""
    assert max(abs(count - expected.mean) for count in counts) < bound(expected)
    assert abs(fmean(counts) - expected.mean) < 4 * sqrt(expected.variance / len(counts))
    assert 0.3 < variance(counts) / expected.variance < 1.9


def uniform(n: int, w: float, seed: int, **parameters: object) -> Run:
    step = Touch(access=Access.MIXED, order=Order.RANDOM, repeat=True, touches=n, write_percent=100 * w)
    return simulate(steps=[step], seed=seed, **parameters)  # type: ignore[arg-type]


def identities(counters: Mapping[str, int], expected: Mapping[str, int]) -> None:
    assert {name: counters[name] for name in expected} == expected


@pytest.mark.parametrize(("places", "n", "w"), [(2, 3, 0.5), (3, 4, 0.25), (1, 5, 0.1)])
def test_the_closed_forms_are_those_of_all_outcomes_counted_one_by_one(places: int, n: int, w: float) -> None:
    """Every sequence of n (place, kind), weighted: the formulas above without the model."""
    tallies = []
    for draws in product(product(range(places), (False, True)), repeat=n):
        kinds = [[write for place, write in draws if place == at] for at in range(places)]
        z = sum(bool(k) and not k[0] for k in kinds)
        f = sum(bool(k) and k[0] for k in kinds)
        c = sum(bool(k) and not k[0] and any(k) for k in kinds)
        weight = 1.0
        for _, write in draws:
            weight *= (w if write else 1 - w) / places
        tallies.append((weight, (z, f, c)))
    for i, expected in enumerate(occupancy(places, n, w)):
        mean = sum(weight * counts[i] for weight, counts in tallies)
        assert expected.mean == pytest.approx(mean)
        assert expected.variance == pytest.approx(sum(weight * (counts[i] - mean) ** 2 for weight, counts in tallies))


@pytest.mark.parametrize(("pages", "n", "w"), [(512, 400, 0.3), (512, 600, 0.9), (1000, 5000, 0.02), (2048, 3000, 0.1), (4096, 2000, 0.5)])
@pytest.mark.parametrize(("kernel", "locks"), [("6.1", 3), ("6.12", 2)])
def test_zero_pages_first_writes_and_copies_of_4k_memory(pages: int, n: int, w: float, kernel: str, locks: int) -> None:
    """A page read first maps the zero page (one exit); written later it is copied (two exits, one of them a retry)."""
    found = []
    for seed in SEEDS:
        done = uniform(n, w, seed, memory=pages * PAGE, kernel=kernel)
        zero, copied = done.counters["zero_page_maps"], done.counters["cow_4k"]
        fresh = done.counters["pgfault"] - zero - copied
        moves = {"pf_fixed": zero + fresh + copied, "pf_retry": copied, "pf_taken": zero + fresh + 2 * copied, "touches": n}
        pairs = {"invalidate_range_start": copied, "remote_tlb_flush_requests": copied, "mmu_lock_write": locks * copied}
        identities(done.counters, moves | pairs | {"bytes_cleared": (fresh + copied) * PAGE})
        identities(done.gauges, {"rss_bytes": (fresh + copied) * PAGE, "pages_4k": zero + fresh})
        found.append((zero, fresh, copied))
    for counts, expected in zip(zip(*found, strict=True), occupancy(pages, n, w), strict=True):
        check(list(counts), expected)


@pytest.mark.parametrize(("regions", "n", "w"), [(32, 40, 0.3), (64, 100, 0.1), (64, 50, 0.6)])
def test_huge_zero_pages_on_6_13_are_the_same_with_regions_for_pages(regions: int, n: int, w: float) -> None:
    """Read first: the huge zero page; written later: a THP for it, with one pair. Everything else in the region is a hit."""
    found = []
    for seed in SEEDS:
        done = uniform(n, w, seed, memory=regions * MIB2, kernel="6.13", backing="anonymous_thp")
        zero, replaced = done.counters["huge_zero_maps"], done.counters["invalidate_range_start"]
        fresh = done.counters["thp_fault_alloc"] - replaced
        moves = {"pf_fixed": zero + fresh + replaced, "pf_retry": replaced, "pf_taken": zero + fresh + 2 * replaced, "thp_split_pmd": 0}
        identities(done.counters, moves | {"bytes_cleared": (fresh + replaced) * MIB2, "mmu_lock_write": 2 * replaced})
        identities(done.gauges, {"anon_huge_bytes": (fresh + replaced) * MIB2, "pages_2m": zero + fresh})
        found.append((zero, fresh, replaced))
    for counts, expected in zip(zip(*found, strict=True), occupancy(regions, n, w), strict=True):
        check(list(counts), expected)


def copies_in_split_regions(regions: int, n: int, w: float) -> float:
    """Expected pages that are written in regions whose first touch is a read.

    A page is written ever: 1 - (1 - p w)^n, p = 1 / pages. Less those in regions (r = 1 / regions) whose first touch is a write:
    w (1 - (1 - r)^n), without the case that the page itself is never written: the first touch of the region, as touch k, is a
    write to another page, and none later writes the page: the sum over k of (1 - r)^k w (r - p) (1 - p w)^(n - k - 1).
    """
    pages = 512 * regions
    p, r = 1 / pages, 1 / regions
    unwritten, untouched = (1 - p * w) ** n, (1 - r) ** n
    never = w * (r - p) * (unwritten - untouched) / (r - p * w)
    return pages * ((1 - unwritten) - (w * (1 - untouched) - never))


@pytest.mark.parametrize(("regions", "n", "w"), [(32, 60, 0.3), (64, 200, 0.1), (16, 400, 0.2)])
def test_huge_zero_pages_on_6_1_are_split_once_and_then_copied_page_by_page(regions: int, n: int, w: float) -> None:
    """Z, F and C of regions as above, C: splits. Copies: every page written in a region read first, one retry each; a split is
    a pair of its own inside the first copy's fault. Their variance is taken from the 64 runs."""
    found, copies = [], []
    for seed in SEEDS:
        counters = uniform(n, w, seed, memory=regions * MIB2, kernel="6.1", backing="anonymous_thp").counters
        zero, fresh, split, copied = (counters[name] for name in ("huge_zero_maps", "thp_fault_alloc", "thp_split_pmd", "cow_4k"))
        pairs = {"invalidate_range_start": split + copied, "change_pte": copied, "mmu_lock_write": 2 * split + 3 * copied}
        identities(counters, pairs | {"pf_retry": copied, "bytes_cleared": fresh * MIB2 + copied * PAGE})
        found.append((zero, fresh, split))
        copies.append(copied)
    for counts, expected in zip(zip(*found, strict=True), occupancy(regions, n, w), strict=True):
        check(list(counts), expected)
    assert abs(fmean(copies) - copies_in_split_regions(regions, n, w)) < 4 * sqrt(variance(copies) / len(copies))
