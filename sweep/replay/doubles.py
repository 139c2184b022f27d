"""Double faults in a trace: how many, in which 2 MiB regions, and when. And what the trace says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kernels.spec import PMD_BYTES
from kernels.state import Int64s
from sweep.replay.accesses import Folded
from sweep.replay.fold import Counted

DOUBLES: Mapping[Counted, str] = {
    Counted.READ_WRITE_WRITE: "read, then written: found read-only, then not present",
    Counted.WRITE_WRITE: "the same, its read not seen (under a huge mapping)",
    Counted.ABSENT_TWICE: "written: found not present, and not present again",
}
NAMES: Sequence[str] = [counted.name.lower() for counted in Counted]
DOUBLE_NAMES: Sequence[str] = [counted.name.lower() for counted in DOUBLES]


def by_region(folded: Folded) -> pd.DataFrame:
    """One row per 2 MiB region with a fault: its guest-physical address, what was counted, and `doubles`, the sum of their kinds."""
    touched = np.flatnonzero(folded.region[:, Counted.FAULTS])
    frame = _frame(folded.region[touched])
    frame.insert(0, "gpa", [folded.slots.gpa_of(int(region) * PMD_BYTES) for region in touched])
    return _with_doubles(frame)


def in_time(folded: Folded) -> pd.DataFrame:
    """One row per stretch of time: its beginning in ns from the first fault, what was counted, and `doubles`."""
    frame = _frame(folded.time)
    frame.insert(0, "from_ns", np.arange(len(frame), dtype=np.int64) * folded.width_ns)
    return _with_doubles(frame)


def _frame(counts: Int64s) -> pd.DataFrame:
    return pd.DataFrame({name: counts[:, k] for k, name in enumerate(NAMES)})


def _with_doubles(frame: pd.DataFrame) -> pd.DataFrame:
    frame["doubles"] = frame[list(DOUBLE_NAMES)].sum(axis=1)
    return frame


def totals(folded: Folded) -> dict[str, Any]:
    """Sums over the trace; of double faults also by kind, and how many regions have one."""
    found: dict[str, Any] = folded.totals
    regions = by_region(folded)
    return {
        **found,
        "doubles": sum(found[name] for name in DOUBLE_NAMES),
        "regions": len(regions),
        "regions_with_doubles": int((regions["doubles"] > 0).sum()),
        "regions_with_one_page": int((regions["pages"] == 1).sum()),
    }
