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
from sweep.errors import InterruptedRunError, StudyError, UsageError
from sweep.plan import Plan
from sweep.quantity import human_time
from sweep.recommend.answer import Recommendation, recommend, tell
from sweep.recommend.asked import Asked, RecommendOptions, pose
from sweep.recommend.ranking import FIGURES, ranking, records
from sweep.recommend.reason import double_faults
from sweep.report.build import build_report
from sweep.report.facts import PARTS
from sweep.runner import RunOptions, RunSummary, run
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
    study = pose(Asked(GUEST, proposals=True), folder).study
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
    with pytest.raises(UsageError, match="every setting needs more, the least 64MiB"):
        tell(points, study, int(least) - 1)


SPARSE = '[study]\nname = "own"\n[workload.sparse]\nsteps = [{ op = "touch", access = "write", every = "2MiB" }]\n'


def sparse(asked: Asked, folder: Path) -> tuple[Study, pd.DataFrame]:
    study = pose(asked, folder).study
    run(study, folder / "out", INLINE)
    return study, open_dataset(folder / "out").points()


@pytest.fixture(scope="module")
def bloat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, pd.DataFrame]]:
    """A guest that writes one page of each 2 MiB."""
    folder = tmp_path_factory.mktemp("bloat")
    (folder / "own.toml").write_text(SPARSE)
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
    assert found.ranking.best == "anonymous, populate"
    assert found.changes.ready != "anonymous, populate"
    assert "the VMM's time counted as well" in found.as_text()
    assert any(reason.startswith("with anonymous, populate the VMM allocates the memory, in ") for reason in found.reasons)


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
    posed = pose(Asked({"kernel": "6.12", "workload": "mine"}, own=own), tmp_path)
    points = [planned.point for planned in Plan(posed.study)]
    assert {point.kernel for point in points} == {"6.12", "6.18"}
    assert {point.memory for point in points} == {16 * MIB, 32 * MIB, 64 * MIB}
    assert [(left.place, left.setting) for left in posed.left_out] == [
        ("", "anonymous_hugetlb_1gb"),  # told once, not again for every kernel
        ("", "anonymous_hugetlb_1gb, populate"),
        *((f"kernel {kernel}", "") for kernel in ("5.15", "6.1", "6.6")),
    ]
    assert posed.left_out[0].why == "memory = 32MiB is no multiple of backing anonymous_hugetlb_1gb's page, 1GiB"
    assert posed.left_out[2].why.startswith("pre_fault: kernel 5.15 has no KVM_PRE_FAULT_MEMORY")


def test_what_is_set_stays(tmp_path: Path) -> None:
    study = pose(Asked(GUEST, overrides=["thp_failure=0.5", "mmu=shadow"]), tmp_path).study
    assert {planned.point.thp_failure for planned in Plan(study)} == {0.5}
    assert {planned.point.mmu for planned in Plan(study)} == {"shadow"}
    alone = pose(Asked(GUEST, what_if=False), tmp_path).study
    assert {planned.point.kernel for planned in Plan(alone)} == {"6.1"}


def test_trace_says_guest_and_kernel(tmp_path: Path) -> None:
    trace = config_root().parent / "examples" / "traces" / "perf.txt"
    found = recommend(RecommendOptions(trace=str(trace), out=str(tmp_path / "out"), what_if=False, run=INLINE))
    assert found.question.startswith("Settings for trace, kernel ")
    assert found.ranking.rows["exits"].max() > 0
    assert len(open_dataset(tmp_path / "out").points()) == 3 * len(found.ranking.rows)


def test_what_is_left_out_is_told_with_its_reason(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(OWN)
    asked = RecommendOptions(study=own, workload="mine", kernel="6.12", memory="4MiB", overrides=["vcpus=1", "thp_failure=0.0"], run=INLINE)
    found = recommend(asked)
    lines = found.as_text().partition("\nLeft out\n")[2].splitlines()
    assert lines[0].startswith("  anonymous_hugetlb_1gb; anonymous_hugetlb_1gb, populate: memory = 4MiB is no multiple of ")
    assert lines[1].startswith("  kernel 5.15: pre_fault: kernel 5.15 has no ")
    assert [left["place"] for left in found.as_json()["left_out"]] == ["", "", "kernel 5.15", "kernel 6.1", "kernel 6.6"]


def test_large_differences_are_told_without_decimals(asking: Asking) -> None:
    study, points, _ = asking
    slow = points.assign(guest_ns=points["guest_ns"].where(points["backing"] != "anonymous", 50 * points["guest_ns"]))
    more = tell(slow, study, None).ranking.rows.loc["anonymous", "more"]
    assert more > 10
    assert f" +{100 * more:,.0f}% " in tell(slow, study, None).as_text()


def test_interrupted_it_says_where_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.recommend.answer.run_study", lambda *_: RunSummary("a study", "out", 1, 0, stopped_by=15))
    asked = RecommendOptions(workload="first_touch", memory="4MiB", what_if=False, run=INLINE)
    with pytest.raises(InterruptedRunError, match="with --out DIR what is done is"):
        recommend(asked)
    with pytest.raises(InterruptedRunError, match=f"kept in {tmp_path / 'out'}: ask again"):
        recommend(replace(asked, out=str(tmp_path / "out")))


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
    base = dict.fromkeys((*FIGURES, *PARTS), 0) | {"replicate": 0, "needs": 8, "fits": True, "guest_ns": 1000}
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
        pose(Asked({"memory": 3 * MIB, "workload": "first_touch"}, overrides=["backing=anonymous_hugetlb_2mb"]), tmp_path)


def test_where_no_setting_is_left_no_condition_is_recommended_in_its_place(tmp_path: Path) -> None:
    """Other kernels are looked at all the same; they are not for the guest to choose."""
    fixed = ["backing=anonymous", "prealloc=none", "use_zero_page=true"]
    found = tell(*sparse(Asked({**GUEST, "memory": 4 * MIB}, overrides=fixed), tmp_path)[::-1], None)
    assert found.ranking.best == "anonymous"
    assert found.reasons == ["no other setting was asked about"]
    assert "kernel 6.18" in found.changes.same


def test_settings_that_are_alike_are_told_by_name_and_the_default_is_chosen(tmp_path: Path) -> None:
    asked = Asked({**GUEST, "memory": 4 * MIB}, what_if=False, overrides=["backing=anonymous", "prealloc=none"])
    found = tell(*sparse(asked, tmp_path)[::-1], None)
    assert (found.ranking.best, found.ranking.as_good()) == ("anonymous", ["anonymous, use_zero_page=False"])
    assert found.reasons == ["both take the same exits; nothing in the model tells them apart"]
    assert "-0.00%" not in found.as_text()
    assert "What would change it\n  nothing that was looked at" in found.as_text()


def test_reason_is_told_where_exits_are_equal(tmp_path: Path) -> None:
    """Preallocated hugetlb takes an exit a page, as without."""
    own = tmp_path / "own.toml"
    own.write_text('[study]\nname = "own"\n[workload.late]\nsteps = [{ op = "idle", ns = 20000000000 }, { op = "touch" }]\n')
    fixed = ["backing=anonymous_hugetlb_2mb", "use_zero_page=true"]
    found = tell(*sparse(Asked({**GUEST, "workload": "late"}, own=own, what_if=False, overrides=fixed), tmp_path)[::-1], None)
    rows = found.ranking.rows
    assert rows["exits"].nunique() == 1
    populate = (rows["total_ns"] - rows["guest_ns"])["anonymous_hugetlb_2mb, populate"] - 20e9
    spent = human_time(populate / 1e9)
    assert found.reasons[0] == f"with anonymous_hugetlb_2mb, populate the VMM allocates the memory, in {spent}, not the guest's faults"


def test_double_faults_are_no_more_than_exits(tmp_path: Path) -> None:
    """Patch 2 maps the copy at once: a page that is read and written takes two exits, of which one is a retry."""
    asked = Asked({**GUEST, "kernel": "6.5", "memory": 4 * MIB, "vcpus": 1}, proposals=True, what_if=False)
    rows = tell(*sparse(asked, tmp_path)[::-1], None).ranking.rows
    pages = 1024
    assert {name: double_faults(records(rows.loc[[name]])[0]) for name in ("anonymous", "anonymous, change_pte_prefetch")} == {
        "anonymous": 2 * pages,
        "anonymous, change_pte_prefetch": pages,
    }
    assert all(double_faults(row) <= row["exits"] for row in records(rows))


def test_a_dataset_of_another_question_is_not_part_of_the_answer(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    first = RecommendOptions(workload="first_touch", memory="4MiB", what_if=False, out=out, proposals=True, run=INLINE)
    recommend(first)
    second = replace(first, workload="read_then_write", memory="8MiB", proposals=False)
    assert recommend(second).as_text() == recommend(replace(second, out=str(tmp_path / "new"))).as_text().replace("new", "out")


@pytest.mark.parametrize("workload", ["nothing", "vmm_cow"])
def test_a_guest_that_does_nothing_is_refused(workload: str) -> None:
    with pytest.raises(UsageError, match="the guest takes no time in it"):
        recommend(RecommendOptions(workload=workload, memory="4MiB", what_if=False, run=INLINE))


def test_the_budget_that_an_error_asks_for_is_enough(tmp_path: Path) -> None:
    """Of the asked guest, not of others that hold less."""
    own = tmp_path / "own.toml"
    own.write_text('[study]\nname = "own"\n[workload.part]\nsteps = [{ op = "touch", range = [0.0, 0.13] }]\n')
    asked = RecommendOptions(workload="part", memory="8MiB", study=own, overrides=["prealloc=none"], budget="4KiB", run=INLINE)
    with pytest.raises(UsageError, match="allow that") as told:
        recommend(asked)
    least = str(told.value).split("the least ")[1].split(";")[0]
    assert "shmem" in recommend(replace(asked, budget=least)).ranking.fitting.index


def test_policies_about_the_huge_zero_page_can_be_set(tmp_path: Path) -> None:
    study = pose(Asked({**GUEST, "kernel": "6.5"}, what_if=False, overrides=["policy=huge_zero_thp"]), tmp_path).study
    assert {planned.point.use_zero_page for planned in Plan(study)} == {True}


@pytest.mark.parametrize(
    ("step", "backings"),
    [
        ('{ op = "dontneed", every = "2MiB", size = "4KiB" }', {"anonymous", "anonymous_thp", "shmem", "shmem_thp"}),  # a balloon
        ('{ op = "collapse" }', {"anonymous_thp", "shmem_thp"}),
    ],
)
def test_backings_that_a_step_cannot_have_are_left_out(tmp_path: Path, step: str, backings: set[str]) -> None:
    own = tmp_path / "own.toml"
    own.write_text(f'[study]\nname = "own"\n[workload.some]\nsteps = [{{ op = "touch" }}, {step}, {{ op = "touch" }}]\n')
    asked = Asked({**GUEST, "workload": "some"}, own=own)
    study = pose(asked, tmp_path).study
    assert {planned.point.backing for planned in Plan(study)} == backings
    assert next(iter(Plan(study))).point.kernel == GUEST["kernel"]
    with pytest.raises(StudyError, match=r"own\.toml:4: "):
        pose(replace(asked, overrides=["backing=shared_hugetlb_2mb"]), tmp_path)
