"""The policy table: complete, ordered, one row to add."""

from functools import partial
from importlib import import_module

import pytest

from kernels.policy import (
    LAST_MINOR,
    NEWEST,
    OLDEST,
    PROPOSALS,
    REGIMES,
    Behaviour,
    PolicyError,
    Regime,
    UnknownKernelError,
    Version,
    behaviours,
    parse_kernel,
    policy_row,
    regime,
)
from kernels.spec import PMD_BYTES, Access
from kernels.steps import Touch

ALL = [f"{major}.{minor}" for major, last in LAST_MINOR.items() for minor in range(last + 1) if OLDEST <= Version(major, minor) <= NEWEST]


def test_every_mainline_release_has_a_complete_row() -> None:
    assert ALL[0] == "5.15"
    assert ALL[-1] == "7.3"
    for kernel in ALL:
        assert set(regime(kernel)) == set(Behaviour)
        assert policy_row(regime(kernel)).shape == (len(Behaviour),)


def test_regimes_are_in_order_and_the_first_is_complete() -> None:
    assert [r.since for r in REGIMES] == sorted({r.since for r in REGIMES})
    assert set(REGIMES[0].changes) == set(Behaviour)


@pytest.mark.parametrize(
    ("behaviour", "first_with", "before", "after"),
    [
        (Behaviour.HUGETLB_PGFAULT, "6.6", 0, 1),
        (Behaviour.STALE_PRECHECK, "6.8", 0, 1),
        (Behaviour.CHANGE_PTE, "6.10", 1, 0),
        (Behaviour.PRE_FAULT_MEMORY, "6.11", 0, 1),
        (Behaviour.HUGE_ZERO_WRITE_THP, "6.13", 0, 1),
        (Behaviour.DUPLICATE_IS_SPURIOUS, "6.13", 0, 1),
        (Behaviour.RECOVER_HUGE_SPTE, "6.13", 0, 1),
        (Behaviour.EAGER_SPLIT, "5.18", 0, 1),
        (Behaviour.HUGETLB_DONTNEED, "5.18", 0, 1),
        (Behaviour.COLLAPSE, "6.1", 0, 1),
        (Behaviour.SPLIT_HUGE_SPTE, "6.2", 0, 1),
        (Behaviour.NX_MARKED_TABLES, "6.2", 0, 1),
        (Behaviour.HUGETLB_ZAP_TWICE, "6.2", 1, 0),
        (Behaviour.LAST_SUBPAGE_REUSE, "6.7", 1, 0),
        (Behaviour.RECLAIM_PAGE_TABLES, "6.14", 0, 1),
        (Behaviour.SUBPAGE_REUSE, "6.15", 0, 1),
    ],
)
def test_a_behaviour_changes_in_one_release_and_stays(behaviour: Behaviour, first_with: str, before: int, after: int) -> None:
    values = [regime(kernel)[behaviour] for kernel in ALL]
    turn = ALL.index(first_with)
    assert values == [before] * turn + [after] * (len(ALL) - turn)


def test_the_dirty_bit_is_dropped_between_two_releases() -> None:
    assert [k for k in ALL if regime(k)[Behaviour.REWRITE_DROPS_DIRTY]] == ALL[ALL.index("5.16") : ALL.index("6.13")]


def test_proposals_are_off_on_every_mainline_kernel() -> None:
    for kernel in ALL:
        assert regime(kernel)[Behaviour.CHANGE_PTE_PREFETCH] == regime(kernel)[Behaviour.ALWAYS_WRITABLE] == 0


@pytest.mark.parametrize("policy", PROPOSALS)
def test_a_proposal_sets_only_what_it_names(policy: str) -> None:
    before, after = regime("6.5"), behaviours("6.5", policy)
    assert {b: v for b, v in after.items() if before[b] != v} == {b: v for b, v in PROPOSALS[policy].changes.items() if before[b] != v}


@pytest.mark.parametrize("policy", ["change_pte_prefetch", "no_change_pte"])
def test_a_proposal_about_change_pte_is_refused_once_it_is_gone(policy: str) -> None:
    assert behaviours("6.9", policy)
    with pytest.raises(PolicyError, match=r"6\.10 removed|which 6\.10"):
        behaviours("6.10", policy)


@pytest.mark.parametrize("text", ["", "6", "6.", "6.1.2", "6.01", "5.14", "7.4", "5.20", "6.20", "6.12-rc1", "v6.12", "٦.1", "8.0", "-6.1"])
def test_what_is_no_mainline_release_is_refused(text: str) -> None:
    with pytest.raises(UnknownKernelError, match="mainline release"):
        parse_kernel(text)


def test_a_new_kernel_regime_is_one_row() -> None:
    """The example of docs/model.md: a release that brought change_pte back."""
    table = (*REGIMES, Regime(Version(7, 2), {Behaviour.CHANGE_PTE: 1}))
    assert regime("7.1", table)[Behaviour.CHANGE_PTE] == 0
    assert regime("7.2", table) == {**regime("7.1", table), Behaviour.CHANGE_PTE: 1}
    assert behaviours("7.3", "change_pte_prefetch", table)[Behaviour.CHANGE_PTE_PREFETCH] == 1


def test_a_new_row_is_all_that_both_implementations_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """A what-if kernel: 7.2 with change_pte, and with the split of the huge zero page."""
    table = (*REGIMES, Regime(Version(7, 2), {Behaviour.CHANGE_PTE: 1, Behaviour.HUGE_ZERO_WRITE_THP: 0}))
    what_if = partial(behaviours, table=table)
    monkeypatch.setattr(import_module("kernels.simulate"), "behaviours", what_if)
    monkeypatch.setattr(import_module("kernels.reference"), "behaviours", what_if)
    steps = [Touch(access=Access.READ), Touch()]
    for kernel, exits, change_pte in (("7.1", 3, 0), ("7.2", 1025, 512)):  # as 6.13 and as 6.9: fault-path oracle, one region
        for simulate in (import_module("kernels.simulate").simulate, import_module("kernels.reference").simulate):
            counters = simulate(kernel=kernel, backing="anonymous_thp", memory=PMD_BYTES, steps=steps).counters
            assert (counters["pf_taken"], counters["change_pte"]) == (exits, change_pte)
