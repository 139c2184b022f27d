"""`faultsweep recommend`: what is chosen, why, and what would change it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from sweep.cli import app
from sweep.configs import config_root
from sweep.dataset.read import open_dataset
from sweep.errors import StudyError, UsageError
from sweep.plan import Plan
from sweep.recommend.answer import Recommendation, recommend, tell
from sweep.recommend.asked import Asked, RecommendOptions, load
from sweep.recommend.ranking import ranking
from sweep.report.build import build_report
from sweep.runner import RunOptions, run
from sweep.study import Study

INLINE = RunOptions(executor="inline", quiet=True)
GUEST = {"memory": 64 << 20, "vcpus": 2, "kernel": "6.1", "workload": "read_then_write"}
MIB = 1 << 20
OWN = """
[study]
name = "mine"
[point]
memory = "32MiB"
[workload.mine]
steps = [{ op = "touch", access = "read" }, { op = "pre_fault" }, { op = "touch", access = "write" }]
"""

Asking = tuple[Study, pd.DataFrame, Path]


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Asking:
    folder = tmp_path_factory.mktemp("recommend")
    study = load(Asked(GUEST, proposals=True), folder)
    run(study, folder / "out", INLINE)
    return study, open_dataset(folder / "out").points(), folder / "out"


@pytest.fixture(scope="module")
def told(asking: Asking) -> Recommendation:
    return tell(asking[1], asking[0], None)


def test_the_fastest_is_chosen_and_of_those_as_good_the_one_that_needs_least(told: Recommendation) -> None:
    rows = told.ranking.rows
    assert rows["guest_ns"].is_monotonic_increasing
    good = rows[rows["guest_ns"] <= 1.01 * rows["guest_ns"].iloc[0]]
    assert told.ranking.best in good.index
    assert rows.loc[told.ranking.best, "needs"] == good["needs"].min()
    assert set(told.ranking.as_good()) == set(good.index) - {told.ranking.best}


def test_reason_counts_the_exits_of_the_dataset(asking: Asking) -> None:
    """4K pages that are read, then written: every one is copied."""
    study, points, _ = asking
    of_interest = points[~points["backing"].str.contains("hugetlb|thp|shmem") & (points["prealloc"] == "none") | ~points["use_zero_page"]]
    found = tell(of_interest[of_interest["policy"] == "mainline"], study, None)
    pages = GUEST["memory"] // 4096  # type: ignore[operator]
    assert found.ranking.rival() == "anonymous"
    row = found.ranking.rows.loc["anonymous"]
    assert row["cow_4k"] == pages
    assert (
        f"{pages + row['pf_retry']:,.0f} of {row['exits']:,.0f} exits with anonymous are CoW double faults ({pages:,} copies"
        in found.reasons[0]
    )


def test_a_budget_excludes_what_needs_more(asking: Asking) -> None:
    study, points, _ = asking
    everything = tell(points, study, None)
    hugetlb = everything.ranking.rows.filter(like="hugetlb", axis=0)
    assert (hugetlb["needs"] == GUEST["memory"]).all(), "reserved, whether touched or not"
    least = float(everything.ranking.rows["needs"].min())
    with pytest.raises(UsageError, match="every setting needs more, the least 64 MiB"):
        tell(points, study, int(least) - 1)


SPARSE = '[study]\nname = "own"\n[workload.sparse]\nsteps = [{ op = "touch", access = "write", every = "2MiB" }]\n'


def sparse(asked: Asked, folder: Path) -> tuple[Study, pd.DataFrame]:
    study = load(asked, folder)
    run(study, folder / "out", INLINE)
    return study, open_dataset(folder / "out").points()


@pytest.fixture(scope="module")
def bloat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, pd.DataFrame]]:
    """A guest that writes one page of each 2 MiB."""
    folder = tmp_path_factory.mktemp("bloat")
    (folder / "own.toml").write_text(
        '[study]\nname = "own"\n[workload.sparse]\nsteps = [{ op = "touch", access = "write", every = "2MiB" }]\n'
    )
    yield sparse(Asked({**GUEST, "workload": "sparse"}, own=folder / "own.toml"), folder)


def test_choice_by_budget_is_the_choice_under_that_budget(bloat: tuple[Study, pd.DataFrame]) -> None:
    study, points = bloat
    steps = tell(points, study, None).changes.budgets
    assert len(steps) > 1, "4K pages hold less, huge ones are faster or as fast"
    assert [size for size, _, _ in steps] == sorted(size for size, _, _ in steps)
    for size, label, guest_ns in steps:
        found = tell(points, study, int(size))
        assert (found.ranking.best, found.ranking.rows.loc[label, "guest_ns"]) == (label, guest_ns)
        assert (found.ranking.fitting["needs"] <= size).all()
    assert tell(points, study, None).ranking.best == steps[-1][1]


def test_other_conditions_are_told_as_changing_it_or_not(asking: Asking, told: Recommendation) -> None:
    _, points, _ = asking
    places = {*told.changes.same, *(conditions for conditions, _ in told.changes.others)}
    assert places >= {"kernel 5.15", "kernel 6.18", "1 vCPU", "4 vCPUs", "32MiB", "128MiB", "1 core", "THP failure 1"}
    for conditions, label in told.changes.others:
        assert label != told.ranking.best, conditions
    failing = points[points["thp_failure"] == 1.0]
    assert len(failing) == 3 * failing.groupby(["backing", "prealloc", "use_zero_page", "policy"]).ngroups, "three replicates each"


def test_memory_budget_grows_with_memory(bloat: tuple[Study, pd.DataFrame]) -> None:
    """A budget is for the guest that was asked about: one twice as large gets twice as much."""
    study, points = bloat
    label_of = tell(points, study, None).changes.budgets[0]
    found = tell(points, study, int(label_of[0]))
    assert "128MiB" in found.changes.same
    assert "32MiB" in found.changes.same


def test_intervals_hold_the_mean(told: Recommendation) -> None:
    rows, costs = told.ranking.rows, told.changes.costs
    assert ((rows["more_low"] <= rows["more"] + 1e-12) & (rows["more"] <= rows["more_high"] + 1e-12)).all()
    assert costs.low <= costs.mean <= costs.high
    assert costs.low < costs.high


def test_time_of_the_vmm_is_told(asking: Asking) -> None:
    """Preallocation makes guests fast and their start slow."""
    study, points, _ = asking
    found = tell(points[points["backing"] == "anonymous"], study, None)
    assert found.ranking.best == "populate"
    assert found.changes.ready != "populate"
    assert "the VMM's time before the guest starts counted as well" in found.as_text()


def test_ranking_is_the_same_in_any_order_of_rows(asking: Asking, told: Recommendation) -> None:
    study, points, _ = asking
    again = tell(points.sample(frac=1.0, random_state=3).reset_index(drop=True), study, None)
    assert again.as_text() == told.as_text()


def test_json_says_what_the_text_says(told: Recommendation) -> None:
    found = json.loads(json.dumps(told.as_json(), default=str))
    assert found["recommended"] == told.ranking.best
    assert [row["label"] for row in found["ranking"]] == list(told.ranking.rows.index)
    assert all(found[key] for key in ("reasons", "ranking", "by_budget"))


def test_dataset_has_a_report_of_its_own(asking: Asking) -> None:
    assert "takes the least time" in build_report(asking[2]).answer


def test_own_workload_and_conditions_that_kernels_lack(tmp_path: Path) -> None:
    """KVM_PRE_FAULT_MEMORY came with 6.11: no such guest on older kernels."""
    own = tmp_path / "own.toml"
    own.write_text(OWN)
    study = load(Asked({"kernel": "6.12", "workload": "mine"}, own=own), tmp_path)
    points = [planned.point for planned in Plan(study)]
    assert {point.kernel for point in points} == {"6.12", "6.18"}
    assert {point.memory for point in points} == {16 * MIB, 32 * MIB, 64 * MIB}


def test_what_is_set_stays(tmp_path: Path) -> None:
    study = load(Asked(GUEST, overrides=["thp_failure=0.5", "mmu=shadow"]), tmp_path)
    assert {planned.point.thp_failure for planned in Plan(study)} == {0.5}
    assert {planned.point.mmu for planned in Plan(study)} == {"shadow"}
    alone = load(Asked(GUEST, what_if=False), tmp_path)
    assert {planned.point.kernel for planned in Plan(alone)} == {"6.1"}


def test_trace_says_guest_and_kernel(tmp_path: Path) -> None:
    trace = config_root().parent / "examples" / "traces" / "perf.txt"
    found = recommend(RecommendOptions(trace=str(trace), out=str(tmp_path / "out"), what_if=False, run=INLINE))
    assert found.question.startswith("Settings for trace, kernel ")
    assert found.ranking.rows["exits"].max() > 0
    assert len(open_dataset(tmp_path / "out").points()) == 3 * len(found.ranking.rows)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--workload NAME or --trace FILE is needed"),
        (["--workload", "boot_ovmf", "--trace", "x"], "one of the two"),
        (["--workload", "boot_omvf"], "did you mean 'boot_ovmf'?"),
        (["--workload", "boot_ovmf", "--memory", "16"], "--memory: '16' is no size"),
        (["--workload", "boot_ovmf", "--memory", "1KiB"], "--memory: 1KiB (1024 bytes): a multiple of 4KiB"),
        (["--workload", "boot_ovmf", "--kernel", "4.2"], "--kernel: "),
        (["--workload", "boot_ovmf", "--vcpus", "0"], "--vcpus: must be an integer from 1"),
        (["--workload", "a\n[study]", "--study", "x.toml"], "--workload: String should match pattern"),
        (["--workload", "boot_ovmf", "--budget", "lots"], "--budget: 'lots' is no size"),
        (["--trace", "x", "--memory", "1GiB"], "--trace says memory and vCPUs itself"),
        (["--workload", "boot_ovmf", "--set", "vcpu=3"], "--set: vcpu=3: must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(app, ["recommend", "-q", "--executor", "inline", *arguments])
    assert result.exit_code != 0
    assert text in str(result.exception) + result.output


def test_ranking_prefers_among_equals_what_is_ready_first() -> None:
    base = dict.fromkeys(("held_bytes", "exits", "pf_taken", "pf_fixed", "pf_retry", "pf_spurious", "cow_4k", "cow_huge"), 0)
    from sweep.report.facts import PARTS

    base |= dict.fromkeys(PARTS, 0) | {"replicate": 0, "needs": 8, "fits": True, "guest_ns": 1000}
    points = pd.DataFrame([base | {"setting": "late", "total_ns": 5000}, base | {"setting": "early", "total_ns": 1000, "guest_ns": 1005}])
    assert ranking("", points).best == "early"


def test_files_that_an_own_study_names_are_beside_it(tmp_path: Path) -> None:
    beside, elsewhere = tmp_path / "own", tmp_path / "elsewhere"
    beside.mkdir()
    elsewhere.mkdir()
    (beside / "list.csv").write_text("vcpu,gfn,write\n0,0,0\n0,0,1\n0,5,1\n")
    shutil.copy(config_root() / "costs" / "upton-arm64.toml", beside / "mine.toml")
    (beside / "base.toml").write_text('[workload.mine]\nsteps = [{ op = "touch_list", path = "list.csv" }]\n')
    own = beside / "own.toml"
    own.write_text('include = ["base.toml"]\n[study]\nname = "thp-or-not"\n[point]\ncosts = "mine.toml"\nmemory = "4MiB"\n')
    found = tell(*sparse(Asked({"workload": "mine"}, own=own, what_if=False), elsewhere)[::-1], None)
    assert set(found.ranking.rows["costs"]) == {"mine.toml"}
    assert found.changes.costs.low < found.changes.costs.high, "the file says ranges"


def test_cost_file_of_the_command_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(config_root() / "costs" / "upton-arm64.toml", tmp_path / "mine.toml")
    trace = config_root().parent / "examples" / "traces" / "perf.txt"
    monkeypatch.chdir(tmp_path)
    for guest in (RecommendOptions(workload="first_touch", memory="4MiB"), RecommendOptions(trace=str(trace.resolve()))):
        found = recommend(replace(guest, overrides=["costs=mine.toml"], what_if=False, run=INLINE))
        assert found.question.endswith("mine.toml")


def test_a_fault_of_the_question_names_no_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^the question: block.0: memory = 3MiB is no multiple"):
        load(Asked({"memory": 3 * MIB, "workload": "first_touch"}, overrides=["backing=anonymous_hugetlb_2mb"]), tmp_path)
