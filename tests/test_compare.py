"""`report A B`: what pairs, what the differences are, and what does not pair."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sweep
from sweep.dataset.store import Store
from sweep.errors import DatasetError
from sweep.report.compare import compare, interval, summary_table

STUDY = """
[study]
name = "{name}"
seed = 5
replicates = 3
[point]
memory = "4MiB"
kernel = "{kernel}"
workload = "mixed"
[[block]]
grid = {{ backing = {backing}, vcpus = [1, 2], costs = {costs} }}
[workload.mixed]
steps = [
  {{ op = "touch", access = "read", order = "random", touches = {touches} }},
  {{ op = "touch", access = "mixed", write_percent = 40.0, order = "random", repeat = true, touches = 500 }},
]
"""
PLAIN = {"name": "s", "kernel": "6.1", "backing": '["anonymous", "anonymous_thp"]', "costs": '["default"]', "touches": "600"}


def dataset(folder: Path, name: str, **changes: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(STUDY.format(**{**PLAIN, **changes}))
    sweep.run(path, folder / name, sweep.RunOptions(executor="inline", quiet=True))
    return folder / name


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("old"), "old")


def test_two_kernels_are_paired_point_by_point(old: Path, tmp_path: Path) -> None:
    new = dataset(tmp_path, "new", kernel="6.13")
    found = compare(old, new)
    assert found.notes[0] == "What differs: kernel: 6.1 in A, 6.13 in B."
    a, b = (sweep.open_dataset(place).points() for place in (old, new))
    both = a.merge(b, on=["backing", "vcpus", "replicate"], suffixes=("_a", "_b"))
    assert len(both) == 12
    means = both.groupby(["backing", "vcpus"])[["exits_a", "exits_b"]].mean()
    rows = found.changes.frame.set_index(["backing", "vcpus"])
    for (backing, vcpus), values in means.iterrows():  # type: ignore[misc]
        shown = rows.loc[(backing, str(vcpus))]
        assert float(shown["exits, B - A"].replace(",", "")) == pytest.approx(values["exits_b"] - values["exits_a"], rel=1e-3)
    summary = found.summary.frame.set_index("measure")
    relative = (means["exits_b"] / means["exits_a"] - 1).mean()
    assert float(summary.loc["exits", "mean change, %"]) == pytest.approx(100 * relative, rel=1e-2)


def test_the_interval_of_a_configuration_is_that_of_its_paired_replicates(old: Path, tmp_path: Path) -> None:
    new = dataset(tmp_path, "new", kernel="6.13")
    rows = compare(old, new).changes.frame
    row = rows[(rows["backing"] == "anonymous_thp") & (rows["vcpus"] == "2")].iloc[0]
    a, b = (sweep.open_dataset(place).points() for place in (old, new))
    times = [p[(p["backing"] == "anonymous_thp") & (p["vcpus"] == 2)].sort_values("replicate")["total_ns"].to_numpy() / 1e6 for p in (a, b)]
    known = stats.ttest_rel(times[1], times[0]).confidence_interval(0.95)
    low, high = (float(text.replace(",", "")) for text in row["total ms, 95 %"].split(" ... "))
    assert (low, high) == pytest.approx((known.low, known.high), rel=1e-3)


def test_the_same_twice_differs_in_nothing(old: Path) -> None:
    found = compare(old, old)
    assert found.answer == "Total time is the same in all 4 configurations."
    assert set(found.summary.frame["same"]) == {"4"}
    assert found.notes[0] == "What differs: nothing that the datasets say."


def test_what_one_side_lacks_is_left_out_and_counted(old: Path, tmp_path: Path) -> None:
    found = compare(old, dataset(tmp_path, "new", backing='["anonymous_thp", "shmem"]'))
    assert "6 of 12 points of A and 6 of 12 of B have no partner." in found.notes
    assert len(found.changes.frame) == 2


def test_two_hosts_are_two_cost_files_and_moved_costs_pair(tmp_path: Path) -> None:
    first = dataset(tmp_path, "first", costs='["default", "default@vm_exit_ns=low"]')
    second = dataset(tmp_path, "second", costs='["upton-arm64", "upton-arm64@vm_exit_ns=low"]')
    found = compare(first, second)
    assert found.notes[0] == "What differs: costs: default in A, upton-arm64 in B."
    assert set(found.changes.frame["moved"]) == {"", "@vm_exit_ns=low"}
    assert len(found.changes.frame) == 8


def test_another_model_or_seed_is_named(old: Path, tmp_path: Path) -> None:
    new = dataset(tmp_path, "new")
    store = Store(new)
    record = store.json("study.json") | {"model_digest": "0" * 64, "seed": 6}
    store.write_json("study.json", record)
    notes = compare(old, new).notes[0]
    assert "the model's source differs" in notes
    assert "the seeds differ" in notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backing": '["shmem", "shmem_thp"]'}, "backing is anonymous, anonymous_thp in old and shmem, shmem_thp in new"),
        ({"touches": "700"}, "workload 'mixed' has other steps in one than in the other"),
    ],
)
def test_what_does_not_pair_says_why(old: Path, tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(DatasetError, match=re.escape("old and new do not pair: " + words)):
        compare(old, dataset(tmp_path, "new", **changes))


def test_other_parameters_together_leave_nothing_to_pair(tmp_path: Path) -> None:
    """Each value is on both sides, but no combination is."""
    text = '[study]\nname = "s"\n[point]\nmemory = "4MiB"\n[[block]]\nzip = {{ vcpus = [1, 2], backing = {} }}\n'
    for name, backing in (("x", '["anonymous", "shmem"]'), ("y", '["shmem", "anonymous"]')):
        (tmp_path / f"{name}.toml").write_text(text.format(backing))
        sweep.run(tmp_path / f"{name}.toml", tmp_path / name, sweep.RunOptions(executor="inline", quiet=True))
    with pytest.raises(DatasetError, match="no point of one has the parameters and the replicate of a point of the other"):
        compare(tmp_path / "x", tmp_path / "y")


def test_interval_needs_two() -> None:
    assert np.isnan(interval(1.0, float("nan"), 1)).all()
    assert interval(0.0, 1.0, 4) == pytest.approx((-1.5912, 1.5912), rel=1e-4)


def test_a_measure_that_is_nothing_in_a_has_no_relative_change() -> None:
    figures = {
        f"{name}_{side}": [0.0, 0.0]
        for name in ("total_ns", "guest_ns", "exits", "pf_retry", "mmu_lock_write", "held_bytes", "fault_p99_ns")
        for side in "ab"
    }
    row = summary_table(pd.DataFrame(figures)).frame.iloc[0]
    assert (row["mean change, %"], row["same"]) == ("", "2")


def test_command_prints_and_writes_the_comparison(old: Path, tmp_path: Path) -> None:
    new = dataset(tmp_path, "new", kernel="6.13")
    command = [sys.executable, "-m", "sweep", "report", str(old), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "old (A) against new (B)" in done.stdout
    assert "95 % interval" in done.stdout
    page = old / "report" / "compare-new.html"
    assert f"page: {page}" in done.stdout
    text = page.read_text()
    assert "old (A) against new (B)" in text and "Content-Security-Policy" in text
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert {row["measure"] for row in report["tables"][0]["rows"]} >= {"total ms", "exits"}
    assert page.read_text() == text
    wrong = subprocess.run([*command[:-1], str(tmp_path / "nowhere")], capture_output=True, text=True, check=False)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (3, 1)
