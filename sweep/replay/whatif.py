"""What-if: the accesses of a trace as a workload of a study, and what its points say beside what was recorded."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kernels.policy import UnknownKernelError, parse_kernel
from kernels.spec import PMD_BYTES
from sweep.errors import Fault, StudyError
from sweep.files import read_toml, toml_value
from sweep.replay.accesses import Folded
from sweep.report.roles import PARAMETER_COLUMNS
from sweep.study_text import block, listed_workload, proposals_of

WORKLOAD = "trace"
LIST_NAME = "accesses.parquet"
WORKLOAD_TEXT = f"\n{listed_workload(WORKLOAD, LIST_NAME)}"
DEFAULT_KERNEL = "6.12"
NEWER_KERNEL = "6.13"  # the first that gives a write to the huge zero page a huge page
SMALL, HUGE = "anonymous", "anonymous_thp"
OTHERS = ("anonymous_hugetlb_2mb", "shmem")
SETTINGS = ("kernel", "policy", "backing", "use_zero_page", "prealloc")
COLUMNS: Mapping[str, str] = {"pf_taken": "faults", "pf_retry": "retries", "mmu_lock_write": "mmu_lock (write)"}


def kernel_of(release: str) -> str:
    """The kernel of a release like 6.1.0-18-amd64, if the model has it; else the default."""
    found = re.match(r"(\d+)\.(\d+)", release)
    try:
        return str(parse_kernel(f"{found[1]}.{found[2]}")) if found else DEFAULT_KERNEL
    except UnknownKernelError:
        return DEFAULT_KERNEL


def memory_of(folded: Folded) -> int:
    """Bytes of the model's slot: whole 2 MiB, so that hugetlb fits."""
    return -(-folded.slots.memory // PMD_BYTES) * PMD_BYTES


def default_study(name: str, title: str, folded: Folded, kernel: str, mmu: str) -> str:
    """The settings that a host's owner can choose, beside those of the list thread, on the kernel of the host and a newer one."""
    kernels = [kernel] if parse_kernel(kernel) >= parse_kernel(NEWER_KERNEL) else [kernel, NEWER_KERNEL]
    grids: list[Mapping[str, Sequence[Any]]] = [
        {"kernel": kernels, "backing": [SMALL, HUGE]},
        {"kernel": kernels, "backing": [HUGE], "use_zero_page": [False]},
        {"kernel": [kernel], "backing": [SMALL, HUGE], "prealloc": ["populate"]},
        {"kernel": [kernel], "backing": list(OTHERS)},
    ]
    policies = proposals_of(kernel, mmu)
    grids += [{"kernel": [kernel], "policy": policies, "backing": [SMALL, HUGE]}] if policies else []
    head = f'[study]\nname = "{name}"\ntitle = {title}\n\n'
    return head + _point(memory_of(folded), folded.vcpus, mmu) + "".join(f"\n{block(axes)}" for axes in grids) + WORKLOAD_TEXT


def asked_study(path: Path, folded: Folded, mmu: str) -> str:
    """A study file of the user's, with the workload `trace`, and memory, vCPUs and workload where its [point] says none.

    Raises StudyError."""
    content, _ = read_toml(path)
    given = content.get("point", {})
    if not isinstance(given, dict):
        raise StudyError([Fault(str(path), "point", "must be a table of parameters")])
    lines = _point(memory_of(folded), folded.vcpus, mmu).splitlines()
    kept = [line for line in lines if line.split(" = ")[0] not in given]
    return f"include = [{toml_value(str(path.resolve()))}]\n\n" + "\n".join(kept) + "\n" + WORKLOAD_TEXT


def _point(memory: int, vcpus: int, mmu: str) -> str:
    return f'[point]\nmemory = "{memory}B"\nvcpus = {vcpus}\nmmu = "{mmu}"\nworkload = "{WORKLOAD}"\n'


def compared(points: pd.DataFrame, faults: int) -> pd.DataFrame:
    """Each configuration's mean over replicates: its settings, faults, those beside the recorded ones, and what else they cost."""
    varying = [name for name in PARAMETER_COLUMNS if points[name].nunique() > 1]
    keys = list(dict.fromkeys([*SETTINGS, *varying]))
    means = points.groupby(keys, sort=False, observed=True)[["pf_taken", "pf_retry", "mmu_lock_write", "guest_ns", "held_bytes"]].mean()
    frame = means.reset_index().sort_values("pf_taken", kind="stable", ignore_index=True)
    frame.insert(len(keys) + 1, "of_recorded", frame["pf_taken"] / faults)
    return frame


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The same as text."""
    keys = list(frame.columns[: list(frame.columns).index("pf_taken")])
    out = frame[keys].astype(str)
    for column, label in COLUMNS.items():
        out[label] = [f"{value:,.0f}" for value in frame[column]]
    out.insert(len(keys) + 1, "of recorded", [f"{value:.1%}" for value in frame["of_recorded"]])
    out["guest ms"] = [f"{value / 1e6:,.3g}" if value < 1e8 else f"{value / 1e6:,.0f}" for value in frame["guest_ns"]]
    out["held MiB"] = [f"{value / (1 << 20):,.1f}" for value in frame["held_bytes"]]
    return out
