"""Shared fixtures: small studies, run once per session."""

from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest

SMALL_STUDY = """
[study]
name = "small"
seed = 5
replicates = 2
[point]
memory = "8MiB"
workload = "mixed"
[[block]]
grid = { kernel = ["6.1", "6.12", "6.13"], backing = ["anonymous", "anonymous_thp"], vcpus = [1, 3] }
[workload.mixed]
steps = [
  { op = "touch", access = "read", order = "random" },
  { op = "touch", access = "mixed", write_percent = 40.0, order = "random", repeat = true, touches = 3000 },
]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """A study of 24 points that takes well under a second."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL_STUDY)
    return path


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded, summed up: how many examples ran."""
    recorded = Tally[str]()
    for report in terminalreporter.stats.get("passed", []):
        recorded.update(dict(report.user_properties))
    for name, total in recorded.items():
        terminalreporter.write_line(f"{name}: {total:,}")
    for report in terminalreporter.stats.get("skipped", []):  # a kernel that was not asked is said aloud
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if "validate: " in reason:
            terminalreporter.write_line(reason)
