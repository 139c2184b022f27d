"""The study `thread` on a host with fewer cores than vCPUs: retry storms, what they cost, and which settings avoid them.

A vCPU that loses its core between start and end of its own invalidation leaves the union of ranges open; the others
exit on every page in between, in vain, until it goes on (docs/model.md section 12).
"""

from collections.abc import Mapping

import pandas as pd

from sweep.report.claims import Claim, World
from sweep.report.tables import ReportTable, pick

VCPUS = 8
HALF = VCPUS // 2
STORM = 0.1  # exits in vain per copy: less is what two vCPUs with a core each do to one another
SETTINGS: Mapping[str, dict[str, object]] = {
    "6.5": {},
    "patch 2": {"policy": "change_pte_prefetch"},
    "6.10": {"kernel": "6.10"},
    "6.13": {"kernel": "6.13"},
    "always-writable slot": {"policy": "always_writable"},
    "huge zero page off": {"use_zero_page": False},
    "hugetlb": {"backing": "anonymous_hugetlb_2mb"},
    "4K": {"backing": "anonymous"},
    "4K, patch 2": {"backing": "anonymous", "policy": "change_pte_prefetch"},
}
BASE: Mapping[str, object] = {"kernel": "6.5", "policy": "mainline", "backing": "anonymous_thp", "use_zero_page": True, "vcpus": VCPUS}


def row_of(frame: pd.DataFrame, setting: str, cores: int, workload: str) -> "pd.Series[float] | None":
    """The first row of a setting, of points or of some of their steps."""
    rows = pick(frame, **{**BASE, **SETTINGS[setting], "cores": cores, "workload": workload})
    return None if rows.empty else rows.iloc[0]


def writes_in_vain(world: World, setting: str, cores: int) -> float | None:
    """Retries per written page, where every page was read before; a copy's own one is left out."""
    row = row_of(world.steps[world.steps["writes"] > 0], setting, cores, workload="read_then_write")
    return None if row is None else float((row["pf_retry"] - row["cow_4k"]) / row["writes"])


def storm(world: World) -> float | None:
    """Exits in vain per copy of a 4K zero page on half the cores: those of 6.5 less those of patch 2."""
    plain, patched = (writes_in_vain(world, setting, HALF) for setting in ("4K", "4K, patch 2"))
    return None if plain is None or patched is None else plain - max(0.0, patched)


def boot_cost(world: World, setting: str) -> float | None:
    """ns of the boot with parallel read-ahead on half the cores that the setting takes more than one without any CoW."""
    row, least = (row_of(world.points, name, HALF, workload="boot_ovmf_parallel") for name in (setting, "always-writable slot"))
    return None if row is None or least is None else float(row["guest_ns"] - least["guest_ns"])


def _figure(world: World) -> str:
    texts = []
    for memory, mainline, patch in (("4K zero pages", "4K", "4K, patch 2"), ("split huge zero pages", "6.5", "patch 2")):
        free, bound, with_patch = (
            writes_in_vain(world, setting, cores) for setting, cores in ((mainline, VCPUS), (mainline, HALF), (patch, HALF))
        )
        if free is not None and bound is not None and with_patch is not None:
            texts.append(
                f"{memory}: {free:.2f} exits in vain per copy with {VCPUS} cores, {bound:.2f} with {HALF}; patch 2: {with_patch:.2f}"
            )
    row = row_of(world.points, "6.5", HALF, workload="boot_ovmf_parallel")
    plain, patched = boot_cost(world, "6.5"), boot_cost(world, "patch 2")
    if row is not None and plain is not None and patched is not None:
        texts.append(
            f"a boot of {row['guest_ns'] / 1e6:,.0f} ms with the read-ahead on all vCPUs loses {plain / 1e6:.1f} ms to copy-on-write, "
            f"{patched / 1e6:.1f} ms with patch 2"
        )
    vain_of = {name: writes_in_vain(world, name, HALF) for name in SETTINGS if "patch 2" not in name}
    calm = [name for name, value in vain_of.items() if value is not None and value < STORM]
    return "; ".join([*texts, f"no storm either: {', '.join(calm)}"])


CLAIM = Claim(
    text="on an overcommitted host copy-on-write runs into retry storms, to which patch 2 is immune",
    who="nobody in the thread",
    message="this study",
    rows=f"read_then_write, 6.5 mainline and change_pte_prefetch, 4K and THP, {VCPUS} vCPUs on {HALF} cores; boot_ovmf_parallel",
    unit="exits in vain per copied page, less those of patch 2",
    measure=storm,
    holds=lambda v: v > STORM,
    figure=_figure,
)


def overcommit_table(points: pd.DataFrame) -> ReportTable:
    """Each setting with a core per vCPU and with half of them: exits in vain and boot time."""
    frame = pick(points, costs="default", replicate=0)
    rows = []
    for setting in SETTINGS:
        line: dict[str, str] = {"setting": setting}
        for cores in (VCPUS, HALF):
            boot = row_of(frame, setting, cores, workload="boot_ovmf_parallel")
            copies = row_of(frame, setting, cores, workload="read_then_write")
            if boot is not None and copies is not None:
                line |= {
                    f"retries, {cores} cores": f"{copies['pf_retry']:,.0f}",
                    f"exits, {cores} cores": f"{copies['exits']:,.0f}",
                    f"boot exits, {cores} cores": f"{boot['exits']:,.0f}",
                    f"boot ms, {cores} cores": f"{boot['guest_ns'] / 1e6:,.1f}",
                }
        rows.append(line)
    title = f"Overcommit: {VCPUS} vCPUs, 256 MiB read then written, and an OVMF boot with the read-ahead on all vCPUs"
    return ReportTable(title, pd.DataFrame(rows), "kernel 6.5, THP and zero page where the setting does not say otherwise")
