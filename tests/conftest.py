"""Shared fixtures: small studies, run once per session."""

import shutil
import sys
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep import cli
from sweep.configs import config_root
from sweep.report.build import Report, build_report

Command = Callable[..., tuple[int, str, str]]
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


@pytest.fixture(scope="session")
def thread_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of the published thread dataset."""
    place = tmp_path_factory.mktemp("published") / "thread"
    shutil.copytree(config_root().parent / "results" / "published" / "thread", place)
    return build_report(place)


@pytest.fixture
def faultsweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["faultsweep", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded, summed up: how many examples ran; and why some did not run, one line for each reason."""
    recorded = Tally[str]()
    for report in terminalreporter.stats.get("passed", []):
        recorded.update(dict(report.user_properties))
    for name, total in recorded.items():
        terminalreporter.write_line(f"{name}: {total:,}")
    reasons = Tally(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    for reason, total in reasons.items():
        terminalreporter.write_line(f"{total} skipped: {reason}")
