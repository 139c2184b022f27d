"""What a replay said of its trace, for the report of its dataset."""

import json
from pathlib import Path

import pandas as pd

from sweep.errors import DatasetError
from sweep.report.tables import ReportTable


def trace_tables(folder: Path) -> list[ReportTable]:
    """Tables that `faultsweep replay` left in DIR/replay; none where the dataset is no replay's. Raises DatasetError."""
    path = folder / "replay" / "tables.json"
    if not path.is_file():
        return []
    try:
        return [ReportTable(str(t["title"]), pd.DataFrame(t["rows"]), str(t["note"])) for t in json.loads(path.read_bytes())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be understood ({error}); replay the trace again") from None
