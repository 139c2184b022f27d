"""The driver: study, plan, executors, dataset, report. `run()` runs a study, `open_dataset()` reads its result."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent.parent
_KERNELS = importlib.util.find_spec("kernels")  # found, not imported: that takes a while
_FOUND = Path(_KERNELS.origin if _KERNELS and _KERNELS.origin else "nowhere").resolve().parent.parent
if _FOUND != _HERE:
    raise ImportError(
        f"faultsweep found a foreign package 'kernels' at {_FOUND}, not its own at {_HERE}: "
        "uninstall that one, or put faultsweep's folder first on the path"
    )

if TYPE_CHECKING:
    from sweep.dataset.read import Dataset, open_dataset
    from sweep.runner import RunOptions, RunSummary, run
    from sweep.study import Study, load_study

_WHERE = {
    "Dataset": "sweep.dataset.read",
    "open_dataset": "sweep.dataset.read",
    "RunOptions": "sweep.runner",
    "RunSummary": "sweep.runner",
    "run": "sweep.runner",
    "Study": "sweep.study",
    "load_study": "sweep.study",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a worker that only simulates needs neither pandas nor DuckDB."""
    if name not in _WHERE:
        raise AttributeError(f"module 'sweep' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


__all__ = ["Dataset", "RunOptions", "RunSummary", "Study", "load_study", "open_dataset", "run"]
