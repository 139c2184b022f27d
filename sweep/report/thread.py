"""The study `thread`: its main table, its claims, its switches.

Message ids are those of the list thread of August and September 2023. Every figure comes from the dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sweep.report import overcommit
from sweep.report.claims import Claim, World
from sweep.report.story import Story
from sweep.report.tables import ReportTable, means, pick, shown

VCPUS = 8
MEANINGFUL = 0.01  # a hundredth of the boot: what "a meaningful part of boot time" is taken to be
FAR_MORE = 3.0  # "far, far more" is taken to be at least three times as much
REPORTED = {"boot_ovmf": 8000, "boot_seabios": 17000, "boot_nested": 44000}
KEYS = ("kernel", "policy", "backing", "use_zero_page", "prealloc")
BASE = {"kernel": "6.5", "policy": "mainline", "backing": "anonymous_thp", "use_zero_page": True, "prealloc": "none"}


def boot(world: World, workload: str = "boot_ovmf", **changes: object) -> "pd.Series[float] | None":
    """The row of one boot with 8 vCPUs: the base configuration with some parameters changed."""
    return _changed(world, workload, changes)


def read_ahead(world: World, **changes: object) -> "pd.Series[float] | None":
    """The read-ahead step of the OVMF boot: the step that reads what it then writes."""
    rows = pick(world.steps, workload="boot_ovmf", vcpus=VCPUS, op="touch", **{**BASE, **changes})
    rows = rows[(rows["reads"] > 0) & (rows["writes"] > 0)]
    return None if rows.empty else rows.iloc[0]


def _changed(world: World, workload: str, changes: dict[str, object]) -> "pd.Series[float] | None":
    rows = pick(world.points, workload=workload, vcpus=VCPUS, **{**BASE, **changes})
    return None if rows.empty else rows.iloc[0]


def _saving(world: World, column: str, old: dict[str, object], new: dict[str, object], workload: str = "boot_ovmf") -> float | None:
    before, after = _changed(world, workload, old), _changed(world, workload, new)
    return None if before is None or after is None else float(before[column] - after[column])


# --- two TDP faults per write to a copy-on-write page


def faults_per_cow(world: World) -> float | None:
    row = read_ahead(world)
    return None if row is None else 1.0 + float(row["pf_retry"] / row["cow_4k"])


def _faults_figure(world: World) -> str:
    row = read_ahead(world)
    assert row is not None
    return f"{faults_per_cow(world):.3f} exits per CoW write: {row['pf_retry']:,.0f} retries for {row['cow_4k']:,.0f} copies"


# --- mmu_lock taken for write three times per CoW, two once change_pte is gone


def lock_deviation(world: World) -> float | None:
    """Largest distance from three acquisitions (two where change_pte is gone) per copied page."""
    expected = {"mainline": 3.0, "no_change_pte": 2.0}
    found = [(want, _locks_per_cow(world, policy)) for policy, want in expected.items()]
    return None if any(have is None for _, have in found) else max(abs(want - have) for want, have in found if have is not None)


def _locks_per_cow(world: World, policy: str) -> float | None:
    """Acquisitions for write of the copies alone: those of PMD splits (two each) taken off."""
    row = boot(world, policy=policy)
    if row is None or not row["cow_4k"]:
        return None
    pairs_beside = row["invalidate_range_start"] - row["cow_4k"]
    return float((row["mmu_lock_write"] - 2 * pairs_beside) / row["cow_4k"])


def _lock_figure(world: World) -> str:
    return f"{_locks_per_cow(world, 'mainline'):.2f} on 6.5, {_locks_per_cow(world, 'no_change_pte'):.2f} without change_pte"


# --- a huge zero page is mapped read-only, split, then copied page by page


def split_then_copied(world: World) -> float | None:
    """Share of the read-ahead's writes on 6.5 that copied a single page of a split huge zero page."""
    row = read_ahead(world)
    return None if row is None or not row["thp_split_pmd"] else float(row["cow_4k"] / row["writes"])


def _kernels_that_split(world: World) -> tuple[list[str], list[str]]:
    """(kernels that split, kernels that do not), of those in the dataset."""
    split: list[str] = []
    whole: list[str] = []
    for kernel in ("6.5", "6.10", "6.13"):
        row = read_ahead(world, kernel=kernel)
        if row is not None:
            (split if row["thp_split_pmd"] else whole).append(kernel)
    return split, whole


def _split_condition(world: World) -> str:
    split, whole = _kernels_that_split(world)
    return f"the kernel is older than {whole[0]} ({', '.join(split)} still split)" if whole else ""


def _split_figure(world: World) -> str:
    texts = []
    for kernel in ("6.5", "6.10", "6.13"):
        row = read_ahead(world, kernel=kernel)
        if row is not None:
            texts.append(f"{kernel}: {row['thp_split_pmd']:,.0f} splits, {row['cow_4k']:,.0f} copies, {row['thp_fault_alloc']:,.0f} THPs")
    return "; ".join(texts)


# --- patch 2 saves one exit per CoW, 8,000+ per boot


def saved_exits(world: World, workload: str = "boot_ovmf") -> float | None:
    return _saving(world, "pf_taken", {}, {"policy": "change_pte_prefetch"}, workload)


def _patch_figure(world: World) -> str:
    texts = []
    for workload, reported in REPORTED.items():
        saved, row = saved_exits(world, workload), boot(world, workload)
        if saved is not None and row is not None:
            texts.append(f"{workload}: {saved:,.0f} saved of {row['cow_4k']:,.0f} copies (reported {reported:,}+)")
    return "; ".join(texts)


# --- that saving is not a meaningful part of boot time


def patch_time_share(world: World) -> float | None:
    saved, row = _saving(world, "guest_ns", {}, {"policy": "change_pte_prefetch"}), boot(world)
    return None if saved is None or row is None else saved / float(row["guest_ns"])


def _share_figure(world: World) -> str:
    saved, row = _saving(world, "guest_ns", {}, {"policy": "change_pte_prefetch"}), boot(world)
    assert saved is not None and row is not None
    return (
        f"{saved / 1e6:.1f} ms of {row['guest_ns'] / 1e6:,.0f} ms ({saved / row['guest_ns']:.2%}; of all fault time "
        f"{saved / row['fault_ns']:.1%}); the answer flips for a boot shorter than {saved / MEANINGFUL / 1e9:.2f} s"
    )


# --- THP or hugetlb, or no huge zero page, matters far, far more

SETTINGS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "THP instead of 4K": ({"backing": "anonymous"}, {}),
    "hugetlb instead of THP with zero page": ({}, {"backing": "anonymous_hugetlb_2mb"}),
    "huge zero page off": ({}, {"use_zero_page": False}),
}


def setting_ratios(world: World) -> dict[str, float] | None:
    """Guest time that each setting saves, over what patch 2 saves."""
    patch = _saving(world, "guest_ns", {}, {"policy": "change_pte_prefetch"})
    savings = {name: _saving(world, "guest_ns", *change) for name, change in SETTINGS.items()}
    if not patch or any(value is None for value in savings.values()):
        return None
    return {name: value / patch for name, value in savings.items() if value is not None}


def least_setting(world: World) -> float | None:
    ratios = setting_ratios(world)
    return None if ratios is None else min(ratios.values())


def _settings_figure(world: World) -> str:
    ratios = setting_ratios(world) or {}
    return "; ".join(f"{name}: {ratio:.1f} times patch 2" for name, ratio in ratios.items())


# --- one fault in all with an always-writable slot, at the price of memory


def always_writable_faults(world: World) -> float | None:
    """Exits per page that the read-ahead reads and writes."""
    row = read_ahead(world, policy="always_writable", backing="anonymous")
    return None if row is None else float(row["pf_taken"] / row["writes"])


def _held_by_reads(world: World, policy: str) -> float:
    rows = pick(world.points, workload="first_read", policy=policy, backing="anonymous")
    return float("nan") if rows.empty else float(rows.iloc[0]["held_bytes"]) / (1 << 20)


def _writable_figure(world: World) -> str:
    plain, flag = boot(world), boot(world, policy="always_writable")
    assert plain is not None and flag is not None
    more = (flag["held_bytes"] - plain["held_bytes"]) / (1 << 20)
    return (
        f"{always_writable_faults(world):.2f} exits per page read and written; memory: {more:+,.0f} MiB in this boot, and for 1 GiB "
        f"only read {_held_by_reads(world, 'always_writable'):,.0f} MiB instead of {_held_by_reads(world, 'mainline'):,.0f}"
    )


def _writable_condition(_world: World) -> str:
    return "the guest writes what it reads: memory that is only read is allocated all the same"


# --- removing change_pte also helps CoW of VMM memory that no guest maps


def _vmm_cow(world: World, policy: str) -> "pd.Series[float] | None":
    rows = pick(world.points, workload="vmm_cow", kernel="6.5", policy=policy)
    return None if rows.empty else rows.iloc[0]


def vmm_cow_saving(world: World) -> float | None:
    """Share of a VMM copy's time that goes with change_pte."""
    old, new = _vmm_cow(world, "mainline"), _vmm_cow(world, "no_change_pte")
    return None if old is None or new is None else float((old["total_ns"] - new["total_ns"]) / old["total_ns"])


def _vmm_figure(world: World) -> str:
    old, new = _vmm_cow(world, "mainline"), _vmm_cow(world, "no_change_pte")
    assert old is not None and new is not None
    copies = old["cow_4k"]
    calls = [(r["invalidate_range_start"] + r["change_pte"] + r["invalidate_range_end"]) / copies for r in (old, new)]
    ns = (old["total_ns"] - new["total_ns"]) / copies
    return (
        f"{calls[0]:.0f} callbacks per copy become {calls[1]:.0f}, no mmu_lock in either; {ns:.0f} ns ({vmm_cow_saving(world):.1%}) a copy"
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        text="a write to a CoW page takes two TDP faults",
        who="Yan Zhao",
        message="ZN1jBFBH4C2bFjzZ@",
        rows="6.5 mainline, THP, zero page; read-ahead step",
        unit="exits per CoW write",
        measure=faults_per_cow,
        holds=lambda v: abs(v - 2) < 0.02,
        figure=_faults_figure,
    ),
    Claim(
        text="mmu_lock is taken for write three times per CoW, two once change_pte is gone",
        who="Sean Christopherson",
        message="ZN5elYQ5szQndN8n@google.com",
        rows="6.5 mainline and no_change_pte, THP, zero page",
        unit="largest distance from 3 and 2",
        measure=lock_deviation,
        holds=lambda v: v < 0.01,
        figure=_lock_figure,
    ),
    Claim(
        text="a huge zero page is mapped read-only, split, then copied page by page",
        who="Yan Zhao",
        message="20230808085431.14814-1-yan.y.zhao@intel.com",
        rows="6.5, 6.10, 6.13 mainline, THP, zero page; read-ahead step",
        unit="share of writes that copied one page",
        measure=split_then_copied,
        holds=lambda v: v > 0.95,
        figure=_split_figure,
        condition=_split_condition,
    ),
    Claim(
        text="patch 2 saves one exit per CoW, 8,000+ per boot",
        who="Yan Zhao",
        message="20230808085431.14814-1-yan.y.zhao@intel.com",
        rows="6.5 mainline and change_pte_prefetch, THP, zero page",
        unit="exits saved per OVMF boot",
        measure=saved_exits,
        holds=lambda v: v >= REPORTED["boot_ovmf"],
        figure=_patch_figure,
    ),
    Claim(
        text="that saving is not a meaningful part of boot time",
        who="Sean Christopherson",
        message="ZN5elYQ5szQndN8n@google.com",
        rows="6.5 mainline and change_pte_prefetch, THP, zero page",
        unit=f"share of guest time (meaningful: {MEANINGFUL:.0%} or more)",
        measure=patch_time_share,
        holds=lambda v: v < MEANINGFUL,
        figure=_share_figure,
    ),
    Claim(
        text="THP or hugetlb, or no huge zero page, matters far, far more",
        who="Sean Christopherson",
        message="ZN0S28lkbo6+D7aF@google.com",
        rows="6.5 mainline: 4K, THP, zero page off, hugetlb; change_pte_prefetch",
        unit=f"guest time saved by the least of them, in units of patch 2's (far more: {FAR_MORE:g})",
        measure=least_setting,
        holds=lambda v: v >= FAR_MORE,
        figure=_settings_figure,
    ),
    Claim(
        text="one fault in all with an always-writable slot, at the price of memory",
        who="Sean Christopherson",
        message="ZPeND9WFHR2Xx8BM@google.com",
        rows="6.5 always_writable, 4K; first_read",
        unit="exits per page read and written",
        measure=always_writable_faults,
        holds=lambda v: abs(v - 1) < 0.01,
        figure=_writable_figure,
        condition=_writable_condition,
    ),
    Claim(
        text="removing change_pte also helps CoW of VMM memory that no guest maps",
        who="Paolo Bonzini",
        message="20240405115815.3226315-1-pbonzini@redhat.com",
        rows="vmm_cow: 6.5 mainline and no_change_pte",
        unit="share of a copy's time",
        measure=vmm_cow_saving,
        holds=lambda v: v > 0,
        figure=_vmm_figure,
    ),
    overcommit.CLAIM,
)


@dataclass(frozen=True)
class Switch:
    """One line of the thread's list of what removes the CoW, and what must be seen."""

    name: str
    expected: str
    changes: dict[str, object]
    workload: str = "boot_ovmf"


SWITCHES: tuple[Switch, ...] = (
    Switch("guest clears pages on allocation (init_on_alloc=1)", "no CoW", {}, "boot_ovmf_init_on_alloc"),
    Switch("swiotlb does not bounce in for reads from the device", "no CoW", {}, "boot_ovmf_no_bounce_in"),
    Switch("disk with 64-bit DMA", "no CoW", {}, "boot_ovmf_dma64"),
    Switch("page cache below 4 GiB", "no CoW", {}, "boot_ovmf_low_page_cache"),
    Switch("use_zero_page=0 with THP", "no CoW", {"use_zero_page": False}),
    Switch("hugetlb", "no CoW", {"backing": "anonymous_hugetlb_2mb"}),
    Switch("VMM preallocation", "no CoW, no notifier, no flush", {"prealloc": "populate"}),
    Switch("preallocation and KVM_PRE_FAULT_MEMORY (6.13)", "no exit", {"prealloc": "populate+pre_fault", "kernel": "6.13"}),
    Switch("patch 2", "one write exit per CoW", {"policy": "change_pte_prefetch"}),
    Switch("no change_pte", "the same exits, fewer locks", {"policy": "no_change_pte"}),
    Switch("always-writable slot", "no CoW", {"policy": "always_writable"}),
)


def switch_row(world: World, switch: Switch) -> "pd.Series[float] | None":
    return _changed(world, switch.workload, switch.changes)


def switch_as_expected(switch: Switch, row: "pd.Series[float]", base: "pd.Series[float]") -> bool:
    """What the thread says a switch does, as a rule over its row and the base's."""
    notifiers = row["invalidate_range_start"] + row["remote_tlb_flush_requests"]
    rules = {
        "no CoW": row["cow_4k"] == 0,
        "no CoW, no notifier, no flush": row["cow_4k"] == 0 and notifiers == 0,
        "no exit": row["pf_taken"] == 0,
        "one write exit per CoW": base["pf_taken"] - row["pf_taken"] > 0.95 * base["cow_4k"] and row["cow_4k"] == base["cow_4k"],
        "the same exits, fewer locks": row["pf_taken"] == base["pf_taken"] and row["mmu_lock_write"] < base["mmu_lock_write"],
    }
    return bool(rules[switch.expected])


def switch_table(world: World) -> ReportTable:
    """What each switch does in the OVMF boot, beside what the thread says."""
    base = boot(world)
    rows = []
    for switch in SWITCHES:
        row = switch_row(world, switch)
        if row is not None and base is not None:
            rows.append(
                {
                    "switch": switch.name,
                    "the thread says": switch.expected,
                    "cow_4k": f"{row['cow_4k']:,.0f}",
                    "exits": f"{row['exits']:,.0f}",
                    "mmu_lock_write": f"{row['mmu_lock_write']:,.0f}",
                    "flushes": f"{row['remote_tlb_flush_requests']:,.0f}",
                    "as said": "yes" if switch_as_expected(switch, row, base) else "no",
                }
            )
    note = "" if base is None else f"base: {base['cow_4k']:,.0f} copies, {base['exits']:,.0f} exits, {base['mmu_lock_write']:,.0f} locks"
    return ReportTable("Switches of the thread, OVMF boot, kernel 6.5, THP, 8 vCPUs", pd.DataFrame(rows), note)


def main_tables(points: pd.DataFrame) -> list[ReportTable]:
    """Per boot: every configuration with 8 vCPUs, relative to 6.5 mainline with THP and zero page."""
    tables = []
    for workload in REPORTED:
        rows = pick(points, workload=workload, vcpus=VCPUS, costs="default")
        if rows.empty:
            continue
        frame = in_order(means(rows, KEYS))
        base = pick(frame, **BASE)
        title = f"{workload}, {VCPUS} vCPUs; (x): relative to 6.5 mainline, THP, zero page"
        tables.append(ReportTable(title, shown(frame, KEYS, None if base.empty else base.iloc[0])))
    if tables and not pick(points, workload="boot_ovmf_parallel").empty:
        tables.append(overcommit.overcommit_table(points))
    return tables


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order a reader looks for them: preallocation, backing, zero page, kernel, policy."""
    ranks: dict[str, list[object]] = {
        "prealloc": ["none", "populate", "pre_fault", "populate+pre_fault"],
        "backing": ["anonymous", "anonymous_thp", "anonymous_hugetlb_2mb", "shmem"],
        "use_zero_page": [True, False],
        "kernel": ["6.5", "6.10", "6.13"],
        "policy": ["mainline", "change_pte_prefetch", "no_change_pte", "always_writable"],
    }
    keys = pd.DataFrame({name: frame[name].map({value: i for i, value in enumerate(order)}) for name, order in ranks.items()})
    return frame.loc[keys.sort_values(list(ranks), kind="stable").index]


def answer(worlds: Sequence[World]) -> str:
    """The answer to the thread's question, from the first world; '' where the rows for it are not there."""
    world = worlds[0]
    ratios, share = setting_ratios(world), patch_time_share(world)
    if ratios is None or share is None:
        return ""
    first, *rest = (f"{name} {'' if place else 'saves '}{ratio:.1f} times" for place, (name, ratio) in enumerate(ratios.items()))
    word = "Hardly" if share < MEANINGFUL else "Yes"
    return f"{word}: patch 2 saves {saved_exits(world):,.0f} exits and {share:.2%} of the guest's time. {first} as much, {', '.join(rest)}."


def tables(worlds: Sequence[World]) -> list[ReportTable]:
    """The main tables and the switches; none without the boots."""
    found = main_tables(pd.concat([world.points for world in worlds]))
    return [*found, switch_table(worlds[0])] if found else []


STORY = Story(tables, answer, CLAIMS)
