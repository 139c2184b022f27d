"""States that random lives seldom reach, counted by hand from docs/model.md, in both implementations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kernels import Access, Call, ChildExit, DirtyLog, DontNeed, Fork, HostTouch, KsmMerge, Populate, Run, Touch, TouchList, simulate
from kernels.simulate import BudgetError
from kernels.spec import PAGE_BYTES, PMD_BYTES, PMD_PAGES, PUD_PAGES, HostPmd, Spread, SptePmd, Vm
from kernels.steps import Step
from tests.test_differential import compare, rows

GIB = PUD_PAGES * PAGE_BYTES
GIGANTIC = "anonymous_hugetlb_1gb"
LOG_ON, LOG_OFF = DirtyLog(Call.LOG_ON), DirtyLog(Call.LOG_OFF)
READ_ONE, WRITE_ONE = Touch(access=Access.READ, touches=1), Touch(touches=1)
LEAVES = ("pages_4k", "pages_2m", "pages_1g")


def write(gfn: int) -> TouchList:
    return TouchList(np.array([0]), np.array([gfn]), np.array([True]))


def run(*steps: Step, **parameters: Any) -> Run:
    """The compiled implementation, once the reference has said the same."""
    configuration = {"memory": PMD_BYTES, **parameters, "steps": steps}
    compare(configuration)
    return simulate(**configuration)


def last(*steps: Step, **parameters: Any) -> Mapping[str, int]:
    step = run(*steps, **parameters).steps[-1]
    return step.counters | step.gauges


def of(counters: Mapping[str, int], *names: str) -> tuple[int, ...]:
    return tuple(counters[name] for name in names)


@pytest.mark.parametrize("mmu", ["tdp", "legacy"])
@pytest.mark.parametrize(
    ("kernel", "nx", "leaves"),
    [
        ("6.1", False, (0, 0, 1)),
        ("6.1", True, (0, 1, 0)),  # any table bars the 1G leaf; the region's own has none yet
        ("6.12", False, (0, 0, 1)),
        ("6.12", True, (0, 0, 1)),  # only tables made for a fetch do
    ],
)
def test_empty_tables_give_way_to_a_1g_leaf(kernel: str, nx: bool, leaves: tuple[int, ...], mmu: str) -> None:
    """Dirty logging made tables for one 4K leaf, MADV_DONTNEED took the leaf; afterwards another region is written."""
    steps = (LOG_ON, WRITE_ONE, DontNeed(), LOG_OFF, write(600))
    done = last(*steps, kernel=kernel, mmu=mmu, backing=GIGANTIC, memory=GIB, nx_huge_pages=nx)
    assert of(done, *LEAVES, "remote_tlb_flush_requests") == (*leaves, leaves[2])


def test_a_table_for_a_fetch_bars_leaves_of_its_own_level_alone() -> None:
    """Below a 1G entry whose table was made for data, a 2M entry has one for a fetch: the 1G leaf of later data takes both."""
    half = Touch(access=Access.EXEC, start=0.5, touches=1)
    steps = (LOG_ON, WRITE_ONE, half, DontNeed(), LOG_OFF, Touch(start=0.5, touches=1))
    assert of(last(*steps, kernel="6.12", backing=GIGANTIC, memory=GIB, nx_huge_pages=True), *LEAVES) == (0, 0, 1)


def test_two_vcpus_read_one_new_page_of_a_private_file() -> None:
    """The second sleeps on the page's lock, and the page is read once."""
    done = last(Touch(access=Access.READ, spread=Spread.ALL, touches=2), backing="private_memfd", vcpus=2)
    assert of(done, "pf_fixed", "pf_spurious", "bytes_cleared", "rss_bytes") == (1, 1, PAGE_BYTES, PAGE_BYTES)


def test_two_vcpus_write_one_new_page_of_a_private_file() -> None:
    """The second sleeps on the file's page, which is read and copied once; the copy's commit wakes it."""
    done = last(Touch(spread=Spread.ALL, touches=2), backing="private_memfd", vcpus=2)
    assert of(done, "bytes_cleared", "bytes_copied", "rss_bytes", "held_bytes") == (PAGE_BYTES, PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES)


def test_two_vcpus_write_one_huge_page_that_a_child_shares() -> None:
    """The second sleeps until the first has copied."""
    steps = (Touch(vcpus=1, touches=1), Fork(), Touch(spread=Spread.ALL, touches=2))
    done = last(*steps, backing="anonymous_hugetlb_2mb", vcpus=2)
    assert of(done, "cow_huge", "bytes_copied", "pages_2m") == (1, PMD_BYTES, 1)


@pytest.mark.parametrize("mmu", ["legacy", "shadow"])
def test_prefetch_ends_with_the_slot(mmu: str) -> None:
    """511 pages that end with the VMA: the last group of eight has seven."""
    steps = (Populate(access=Access.WRITE), write(510))
    done = last(*steps, backing="anonymous", mmu=mmu, memory=511 * PAGE_BYTES, offset=PAGE_BYTES)
    assert done["pages_4k"] == 7


def test_shared_hugetlb_is_found_in_the_page_cache_again() -> None:
    """MADV_DONTNEED drops the mapping alone; a read then maps it writable."""
    found = run(WRITE_ONE, DontNeed(), READ_ONE, WRITE_ONE, backing="shared_hugetlb_2mb").steps
    assert of(found[2].counters, "pf_fixed", "bytes_cleared") == (1, 0)
    assert of(found[3].counters, "hits") == (1,)


def test_a_page_whose_child_is_gone_is_reused_and_can_be_shared_again() -> None:
    found = run(WRITE_ONE, Fork(), ChildExit(), WRITE_ONE, Fork(), WRITE_ONE).steps
    assert of(found[3].counters, "cow_reuse", "cow_4k") == (1, 0)
    assert of(found[5].counters, "cow_reuse", "cow_4k") == (0, 1)


@pytest.mark.parametrize(("kernel", "reused"), [("6.1", 1), ("6.12", 0)])
def test_a_new_page_beside_the_last_part_of_a_thp_is_new(kernel: str, reused: int) -> None:
    """Of a THP that a child shared, one page is left. Its neighbour is allocated; itself is reused or copied."""
    steps = (Touch(), Fork(), ChildExit(), DontNeed(start=1 / PMD_PAGES), write(1), WRITE_ONE)
    found = run(*steps, kernel=kernel, backing="anonymous_thp").steps
    assert of(found[4].counters, "bytes_cleared", "bytes_copied", "cow_reuse") == (PAGE_BYTES, 0, 0)
    assert of(found[5].counters, "cow_reuse", "cow_4k") == (reused, 1 - reused)


def test_a_read_leaves_the_leaf_that_another_vcpu_made_meanwhile() -> None:
    """6.13: three vCPUs on one page that the kernel does not know to be exclusive. vCPU 0 maps it read-only; vCPU 1, a little behind,
    finds it writable, since vCPU 2 has just reused it, but leaves the leaf: vCPU 2's write still has one to fix."""
    before = (
        Touch(vcpus=1, touches=2),
        Fork(),
        ChildExit(),
        Populate(access=Access.READ),
        Touch(access=Access.READ, start=511 / 512, touches=1),
    )
    race = rows((0, 0, False), *[(1, 511, False)] * 52, (1, 0, False), (2, 0, True))
    done = last(*before, race, kernel="6.13", backing="anonymous", vcpus=3)
    assert of(done, "pf_taken", "pf_spurious") == (3, 1)


def test_a_huge_zero_page_that_is_dropped_frees_nothing() -> None:
    dropped = last(READ_ONE, DontNeed(), backing="anonymous_thp")
    assert of(dropped, "held_bytes", "rss_bytes") == (0, 0)


@pytest.mark.parametrize(("backing", "kept"), [("shmem", True), ("anonymous", False)])
def test_a_table_over_pages_of_the_page_cache_is_not_empty(backing: str, kept: bool) -> None:
    """6.14 frees an empty table with MADV_DONTNEED; a page of the page cache is found through it again."""
    done = run(WRITE_ONE, DontNeed(), READ_ONE, kernel="6.14", backing=backing)
    assert done.steps[2].counters["bytes_cleared"] == 0
    dropped = run(WRITE_ONE, DontNeed(), kernel="6.14", backing=backing).machine
    assert dropped.host_pmd[0] == (HostPmd.TBL if kept else HostPmd.NONE)


@pytest.mark.parametrize(("child", "reused"), [((), 0), ((ChildExit(),), 1)])
def test_ksm_takes_a_shared_part_of_a_split_thp(child: tuple[Step, ...], reused: int) -> None:
    """One pair makes all its parts pages of their own, shared with the child or ours alone; the next makes the last a KSM page."""
    split = (Touch(), DontNeed(end=1 / PMD_PAGES), Fork(), *child)
    merged, written = run(*split, KsmMerge(fraction=1 / PMD_PAGES), write(1), backing="anonymous_thp").steps[-2:]
    assert merged.counters["invalidate_range_start"] == 2
    assert of(written.counters, "cow_reuse", "cow_4k") == (reused, 1 - reused)


@pytest.mark.parametrize("before", [(HostTouch(every=GIB), LOG_ON), (WRITE_ONE, LOG_ON)])
def test_dirty_log_ends_over_a_1g_page_without_a_table(before: tuple[Step, ...]) -> None:
    """KVM maps nothing, or a write-protected 1G leaf that was never split: there is no table to zap."""
    done = run(*before, LOG_OFF, kernel="6.1", backing=GIGANTIC, memory=GIB, eager_page_split=False).steps[-2:]
    assert of(done[1].gauges, *LEAVES) == of(done[0].gauges, *LEAVES)
    assert done[1].counters["remote_tlb_flush_requests"] == 0


@pytest.mark.parametrize(("kernel", "zapped"), [("6.1", 1), ("6.13", 0)])
@pytest.mark.parametrize(("backing", "memory"), [(GIGANTIC, GIB), ("anonymous_hugetlb_2mb", PMD_BYTES)])
def test_dirty_log_ends_over_a_table_without_a_leaf(backing: str, memory: int, kernel: str, zapped: int) -> None:
    """fork() zapped the one leaf; the host's huge page is there. The table is zapped; from 6.13 on it stays, having no rights to give."""
    done = run(LOG_ON, WRITE_ONE, Fork(), LOG_OFF, kernel=kernel, backing=backing, memory=memory)
    top = done.machine.spte_pud if memory == GIB else done.machine.spte_pmd
    assert (top[0] == SptePmd.T, done.steps[-1].counters["remote_tlb_flush_requests"]) == (not zapped, zapped)
    assert of(done.gauges, *LEAVES) == (0, 0, 0)


def test_a_lone_vcpu_may_take_just_as_many_events_as_its_budget() -> None:
    """With rmaps a fault looks at its neighbours, so that each goes through its phases, event by event."""
    point: dict[str, Any] = {"memory": PMD_BYTES, "mmu": "legacy", "steps": [WRITE_ONE]}
    needed = int(simulate(**point).machine.vm[Vm.EVENTS])
    assert needed > 1
    assert simulate(**point, max_events=needed).counters["pf_fixed"] == 1
    with pytest.raises(BudgetError):
        simulate(**point, max_events=needed - 1)
