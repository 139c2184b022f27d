"""The driver: study, plan, executors, dataset, report. `run()` runs a study, `open_dataset()` reads its result."""

from pathlib import Path

import kernels as _kernels

_HERE = Path(__file__).resolve().parent.parent
_FOUND = Path(_kernels.__file__ or "nowhere").resolve().parent.parent
if _FOUND != _HERE or not hasattr(_kernels, "simulate"):
    raise ImportError(
        f"faultsweep found a foreign package 'kernels' at {_FOUND}, not its own at {_HERE}: "
        "uninstall that one, or put faultsweep's folder first on the path"
    )

from sweep.dataset.read import Dataset, open_dataset  # noqa: E402
from sweep.run import RunOptions, RunSummary, run  # noqa: E402
from sweep.study import Study, load_study  # noqa: E402

__all__ = ["Dataset", "RunOptions", "RunSummary", "Study", "load_study", "open_dataset", "run"]
