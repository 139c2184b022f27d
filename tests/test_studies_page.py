"""docs/studies.md says what the reports of the studies say.

FAULTSWEEP_STUDIES names the studies that are run for it, or is "all" (default: the one that takes seconds).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import sweep
from sweep.configs import config_root
from sweep.dataset.read import Dataset
from sweep.report.build import build_report
from sweep.report.facts import question_of

PAGE = config_root().parent / "docs" / "studies.md"
WRITTEN: Mapping[str, str] = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
ASKED = os.environ.get("FAULTSWEEP_STUDIES", "bloat")
NAMES = sorted(WRITTEN) if ASKED == "all" else ASKED.split()


def file_of(name: str) -> Path:
    return config_root() / "studies" / f"{name}.toml"


def as_written(place: Path, points: int) -> list[str]:
    """The lines of the page that a run decides, but for the seconds it took."""
    report = build_report(place)
    claims = (f"| {j.claim.text} ({j.claim.rows}) | {j.figure} | **{j.text}** |" for j in report.claims)
    head = [f"*{question_of(Dataset(place))}*", f"`faultsweep run configs/studies/{place.name}.toml`: {points:,} points"]
    return [*head, f"> {report.answer}", *claims]


def test_every_study_that_answers_a_question_is_on_the_page() -> None:
    elsewhere = {"thread", "published"}  # README, docs/calibrate.md
    assert {path.stem for path in file_of("x").parent.glob("*.toml")} - elsewhere == set(WRITTEN)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_the_report_says(name: str, tmp_path: Path) -> None:
    summary = sweep.run(sweep.load_study(file_of(name)), tmp_path / name, sweep.RunOptions(executor="local", quiet=True))
    assert summary.exit_status == 0
    written = [re.sub(r", \d+ s of CPU\. The answer:$", "", line) for line in WRITTEN[name].splitlines()]
    decided = [line for line in written if line.startswith(("*", "`faultsweep run", "> ", "| ")) and not line.startswith("| claim |")]
    assert decided == as_written(tmp_path / name, summary.total)
